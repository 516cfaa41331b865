//! What products by cooperative matrices of f16 have to mind beyond what all products do: magnitudes.

use super::{EXPERTS, Gemm, Grouped, Matrix, Rng, TOP_K, WeightFormat, bits, cooperative_ways, random_experts};

/// Rows of f32 of all magnitudes, `kinds` of them: the last ones grow or shrink from block to block. If those of both factors did,
/// what is small in one could be all that counts.
fn wild_rows(rng: &mut Rng, rows: usize, k: usize, kinds: usize) -> Vec<f32> {
    let mut numbers = rng.numbers(rows * k);
    for (row, numbers) in numbers.chunks_mut(k).enumerate() {
        for (i, number) in numbers.iter_mut().enumerate() {
            let block = (i / 32) as i32;
            *number *= match row % kinds {
                0 => 1e5,
                1 => 1e-5,
                2 => 1e16,
                3 => 1e-16,
                4 => 0.0,
                5 => 1.0,
                6 => 1000f32.powi(block - 2),
                7 => 1000f32.powi(2 - block),
                _ => [0.0, 3e4][usize::from(block > 1)],
            };
        }
    }
    numbers
}

/// Magnitudes of [`wild_rows`] that stay.
const STEADY: usize = 6;
/// All of them.
const ALL: usize = 9;

#[test]
fn magnitudes_that_f16_does_not_have() {
    let mut rng = Rng::new(71);
    for way in cooperative_ways() {
        let (n, k, t) = (75, 160, 83);
        let mut matrix = |kinds| {
            let codes = wild_rows(&mut rng, n, k, kinds).into_iter().map(f32::to_bits).collect();
            Matrix::of(WeightFormat::F32, n, k, codes)
        };
        let [steady, wild] = [STEADY, ALL].map(&mut matrix);
        Gemm::plain(way, wild, wild_rows(&mut rng, t, k, STEADY)).check(&format!("{way:?}, wild lines"));
        let mut case = Gemm::plain(way, steady, wild_rows(&mut rng, t, k, ALL));
        case.check(&format!("{way:?}, wild tokens"));
        let together = case.run();
        // A token's bits do not change where another's sums are rescaled.
        for token in [5, 6, 7, 8, 80] {
            let alone = Gemm::plain(way, case.w.clone(), case.x[token * k..][..k].to_vec()).run();
            assert_eq!(bits(&alone), bits(&together[token * n..][..n]), "{way:?}, token {token}");
        }
        // Tokens that the norm makes alike.
        case.norm = Some(rng.norm(k));
        case.w = Matrix::random(&mut rng, WeightFormat::Bf16, n, k);
        case.x = rng.numbers(t * k);
        for (token, row) in case.x.chunks_mut(k).enumerate() {
            for x in row {
                *x *= [1e5, 1.0, 1e-2, 1e9][token % 4];
            }
        }
        case.check(&format!("{way:?}, wild tokens with norm"));
    }
}

#[test]
fn a_weight_that_is_no_number_spoils_its_line_alone() {
    let mut rng = Rng::new(72);
    for way in cooperative_ways() {
        let (n, k, t) = (67, 96, 9);
        let clean = Gemm::plain(way, Matrix::random(&mut rng, WeightFormat::F32, n, k), rng.numbers(t * k));
        let want = clean.run();
        let mut w = clean.w.clone();
        w.codes[3 * k + 1] = f32::NAN.to_bits();
        w.codes[65 * k + 70] = f32::INFINITY.to_bits();
        for (i, (got, want)) in Gemm::plain(way, w, clean.x).run().into_iter().zip(want).enumerate() {
            match i % n {
                3 => assert!(got.is_nan(), "{way:?}, number {i} is {got}"),
                65 => assert!(!got.is_finite(), "{way:?}, number {i} is {got}"),
                _ => assert_eq!(got.to_bits(), want.to_bits(), "{way:?}, number {i}"),
            }
        }
    }
}

#[test]
fn experts_with_no_token_one_and_one_more_than_a_tile() {
    let mut rng = Rng::new(73);
    for way in cooperative_ways() {
        for first in [true, false] {
            let (n, k, t) = (33, 64, 65);
            let ids: Vec<usize> = (0..t).flat_map(|token| [0, if token == 40 { 1 } else { 2 }, 5]).collect();
            let count = |expert| ids.iter().filter(|&&id| id == expert).count();
            assert_eq!((0..EXPERTS).map(count).collect::<Vec<_>>(), [65, 1, 64, 0, 0, 65]);
            let w = random_experts(&mut rng, WeightFormat::Fp8, n, k);
            let u = first.then(|| random_experts(&mut rng, WeightFormat::Fp8, n, k));
            let x = rng.numbers(if first { t } else { t * TOP_K } * k);
            let case = Grouped { way, w, u, n, x, norm: None, ids };
            let (want, size) = case.expected();
            super::assert_agrees(
                "gemm_coop",
                &format!("{way:?}, first {first}"),
                &case.run(&[(0, EXPERTS)]),
                &want,
                &size,
            );
        }
    }
}
