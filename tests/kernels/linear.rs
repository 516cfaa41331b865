//! `linear`, `embed` and the weight formats.

use moewe_oracle::ops;
use moewe_plan::WeightFormat;
use moewe_shaders::{Reduce, Variant};

use super::data::{FORMATS, GROUPED, Matrix, Rng, assert_agrees, compare, decode, f64s, product_size, swiglu_size};
use super::harness::{Call, UNTOUCHED, Way, ways};

const EPS: f64 = 1e-5;

/// A call of `linear`. Dispatches of `parts` follow one another.
struct Linear {
    w: Matrix,
    u: Option<Matrix>,
    n: usize,
    /// Rows of activations.
    t: usize,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
    way: Way,
    tile: usize,
    over_rows: bool,
    parts: Vec<(usize, usize)>,
}

impl Linear {
    fn plain(w: Matrix, x: Vec<f32>) -> Self {
        let (n, t) = (w.codes.len() / w.columns, x.len() / w.columns);
        let parts = vec![(0, n)];
        Self {
            w,
            u: None,
            n,
            t,
            x,
            norm: None,
            bias: None,
            residual: None,
            way: Way::new(Reduce::None, 32, 1),
            tile: 3,
            over_rows: false,
            parts,
        }
    }

    fn variant(&self) -> Variant {
        let variant = self
            .way
            .plug(self.w.plug(Variant::new("linear")), &self.w)
            .flag("norm", self.norm.is_some())
            .flag("bias", self.bias.is_some())
            .flag("residual", self.residual.is_some())
            .flag("gated", self.u.is_some())
            .int("N", self.n)
            .int("K", self.w.columns)
            .int("TILE", self.tile);
        if self.norm.is_some() { variant.float("EPS", EPS) } else { variant }
    }

    fn run(&self) -> Vec<f32> {
        let mut y = vec![UNTOUCHED; self.t * self.n];
        for &(first, count) in &self.parts {
            // The other count must not matter.
            let (tokens, rows) = if self.over_rows { (1, self.t) } else { (self.t, 1) };
            let mut call = Call::new(&self.variant())
                .batch(tokens, rows)
                .part(first, count, self.over_rows)
                .floats("x", &self.x)
                .matrix("w", &self.w, first, count)
                .words("y", &y);
            if let Some(u) = &self.u {
                call = call.matrix("u", u, first, count);
            }
            if let Some(norm) = &self.norm {
                call = call.fours("norm", norm);
            }
            for (name, numbers) in [("bias", &self.bias), ("residual", &self.residual)] {
                if let Some(numbers) = numbers {
                    call = call.floats(name, numbers);
                }
            }
            let grid = [self.way.groups(count), self.t.div_ceil(self.tile), 1];
            y = call.run(grid).words("y").to_vec();
        }
        y.into_iter().map(f32::from_bits).collect()
    }

    /// Expected numbers and their condition.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let (k, w) = (self.w.columns, self.w.numbers());
        let mut x = f64s(&self.x);
        if let Some(norm) = &self.norm {
            x = ops::rms_norm(&x, &f64s(norm), EPS);
        }
        let (mut y, mut size) = (ops::linear(&x, &w, None, k), product_size(&x, &w, k));
        if let Some(u) = &self.u {
            let u = u.numbers();
            let up = ops::linear(&x, &u, None, k);
            size = swiglu_size(&y, &size, &up, &product_size(&x, &u, k));
            y = ops::swiglu(&y, &up);
        }
        for (i, (y, size)) in y.iter_mut().zip(&mut size).enumerate() {
            let bias = self.bias.as_ref().map(|bias| bias[i % self.n]);
            for more in [bias, self.residual.as_ref().map(|residual| residual[i])].into_iter().flatten() {
                *y += f64::from(more);
                *size += f64::from(more).abs();
            }
        }
        (y, size)
    }

    fn check(&self, what: &str) {
        let (want, size) = self.expected();
        assert_agrees("linear", what, &self.run(), &want, &size);
    }
}

/// All ways, tiles and flags of a format, with shapes that go on from one format to the next.
fn ways_tiles_and_flags(turn: usize) {
    assert_eq!(FORMATS.len(), 4, "each has a test below");
    let mut rng = Rng::new(1000 + turn as u64);
    let (ks, ns, ts) = ([1, 2, 3, 5, 63, 64, 65, 132, 259, 96, 288], [1, 3, 17, 34, 70], [1, 2, 7, 8, 9]);
    let (format, ways, tiles) = (FORMATS[turn], ways(), [1, 3, 8]);
    let first = turn * ways.len() * tiles.len();
    let all = ways.into_iter().flat_map(|way| tiles.map(|tile| (way, tile)));
    let mut cases = 0;
    for (case, (way, tile)) in (first..).zip(all) {
        let (k, n, t) = (ks[case % ks.len()], ns[case % ns.len()], ts[case % ts.len()]);
        let w = Matrix::random(&mut rng, format, n, k);
        let x = rng.numbers(t * k);
        let mut linear = Linear { way, tile, ..Linear::plain(w, x) };
        linear.norm = (case % 2 == 0).then(|| rng.norm(k));
        if case % 3 == 0 {
            let gate = Matrix::random(&mut rng, format, n, k);
            linear.u = Some(gate);
        } else {
            linear.bias = (case % 4 < 2).then(|| rng.numbers(n));
            linear.residual = (case % 5 < 3).then(|| rng.numbers(t * n));
        }
        linear.check(&format!("{format:?} {way:?} tile {tile}, K {k}, N {n}, T {t}"));
        cases += 1;
    }
    assert!(cases >= 15, "only {cases} cases");
}

// A test each, since drivers take long to compile them.
#[test]
fn ways_tiles_and_flags_of_f32() {
    ways_tiles_and_flags(0);
}

#[test]
fn ways_tiles_and_flags_of_bf16() {
    ways_tiles_and_flags(1);
}

#[test]
fn ways_tiles_and_flags_of_f16() {
    ways_tiles_and_flags(2);
}

#[test]
fn ways_tiles_and_flags_of_fp8() {
    ways_tiles_and_flags(3);
}

#[test]
fn blocks_of_the_release_with_partial_ones_at_both_ends() {
    let mut rng = Rng::new(3);
    for (case, (n, k)) in [(130, 257), (300, 128), (129, 132), (257, 256), (70, 384)].into_iter().enumerate() {
        let w = Matrix::random(&mut rng, WeightFormat::Fp8, n, k).blocks(&mut rng, [128, 128]);
        let u = Matrix::random(&mut rng, WeightFormat::Fp8, n, k).blocks(&mut rng, [128, 128]);
        let x = rng.numbers(2 * k);
        for way in ways() {
            let mut case = Linear { way, tile: [1, 8][case % 2], ..Linear::plain(w.clone(), x.clone()) };
            case.parts = vec![(0, n / 2), (n / 2, n - n / 2)];
            case.check(&format!("FP8 {n} × {k} {way:?}"));
            case.u = Some(u.clone());
            case.check(&format!("FP8 {n} × {k} gated {way:?}"));
        }
    }
}

#[test]
fn parts_write_their_rows_only() {
    let mut rng = Rng::new(4);
    for format in FORMATS {
        let (n, k, t) = (37, 20, 4);
        let x = rng.numbers(t * k);
        let mut case = Linear::plain(Matrix::random(&mut rng, format, n, k), x);
        case.over_rows = true;
        case.bias = Some(rng.numbers(n));
        case.residual = Some(rng.numbers(t * n));
        case.parts = vec![(0, 13), (13, 1), (14, 23)];
        case.check(&format!("{format:?} in three parts over wanted rows"));
        case.parts = vec![(13, 9)];
        let (got, (want, size)) = (case.run(), case.expected());
        for (i, number) in got.iter().enumerate() {
            let inside = (13..22).contains(&(i % n));
            assert_eq!(number.to_bits() == UNTOUCHED, !inside, "number {i}");
            if inside {
                compare("linear", &got[i..=i], &want[i..=i], &size[i..=i]).unwrap();
            }
        }
    }
}

#[test]
fn extreme_magnitudes_and_cancellation() {
    let mut rng = Rng::new(5);
    for (format, largest) in [(WeightFormat::F32, 1e18), (WeightFormat::Bf16, 1e18), (WeightFormat::F16, 65504.0)] {
        for way in ways() {
            let (n, k, t) = (6, [66, 64][usize::from(way.pooled)], 3);
            let mut w = Matrix::random(&mut rng, format, n, k);
            let mut x = rng.numbers(t * k);
            w.codes.iter_mut().step_by(7).for_each(|code| *code = super::data::encode(format, largest));
            w.codes.iter_mut().step_by(11).for_each(|code| *code = super::data::encode(format, -largest));
            x.iter_mut().step_by(5).for_each(|x| *x *= 1e15);
            x.iter_mut().step_by(6).for_each(|x| *x *= 1e-30);
            x[k..2 * k].fill(0.0);
            Linear { way, ..Linear::plain(w, x) }.check(&format!("{format:?} up to {largest:e}"));
        }
    }
}

/// Infinities and NaN stay in their own token, also among tokens that share a row, and in their own row.
#[test]
fn what_is_not_finite_spreads_to_its_own_token_and_row_only() {
    let mut rng = Rng::new(6);
    for way in ways() {
        let (n, k, t) = (19, 24, 6);
        let mut x = rng.numbers(t * k);
        x[k + 3] = f32::INFINITY;
        x[3 * k + 5] = f32::NAN;
        let mut w = Matrix::random(&mut rng, WeightFormat::Fp8, n, k);
        w.codes[2 * k + 7] = 0x7f;
        w.codes[11 * k + 23] = 0xff;
        let case = Linear { way, tile: 8, ..Linear::plain(w, x) };
        let (want, size) = case.expected();
        let finite = want.iter().filter(|number| number.is_finite()).count();
        assert_eq!(finite, (t - 2) * (n - 2), "what the oracle expects");
        assert_agrees("linear", &format!("{way:?} with infinities and NaN"), &case.run(), &want, &size);
    }
}

#[test]
fn a_long_row() {
    let mut rng = Rng::new(7);
    for way in ways() {
        for k in [1030, 1056] {
            let (w, x) = (Matrix::random(&mut rng, WeightFormat::Bf16, 5, k), rng.numbers(2 * k));
            let mut case = Linear { way, tile: 1, ..Linear::plain(w, x) };
            case.norm = Some(rng.norm(k));
            case.check(&format!("{way:?} K {k}"));
        }
    }
}

#[test]
fn groups_with_scales_of_their_own() {
    let mut rng = Rng::new(18);
    for (case, format) in GROUPED.into_iter().enumerate() {
        for way in ways() {
            let (n, k, t) = ([5, 131][case % 2], [32, 96, 288][case % 3], 3);
            let w = Matrix::random(&mut rng, format, n, k);
            let mut linear = Linear { way, tile: [1, 2][case % 2], ..Linear::plain(w, rng.numbers(t * k)) };
            linear.norm = Some(rng.norm(k));
            linear.parts = vec![(0, 2), (2, n - 2)];
            linear.check(&format!("{format:?} {way:?} K {k}, N {n}"));
            linear.u = Some(Matrix::random(&mut rng, format, n, k));
            linear.check(&format!("{format:?} {way:?} K {k}, N {n}, gated"));
        }
    }
    let w = Matrix::random(&mut rng, WeightFormat::Int8, 7, 96);
    let ids = [6, 0, 3];
    let got: Vec<f32> = embed(&w, &ids, &[(0, 4), (4, 3)]).into_iter().map(f32::from_bits).collect();
    let numbers = w.numbers();
    let want: Vec<f64> = ids.iter().flat_map(|&id| &numbers[id as usize * 96..][..96]).copied().collect();
    assert_agrees("embed", "Int8", &got, &want, &super::data::magnitudes(&want));
}

/// Two matrices with one input: rows of the second follow those of the first.
#[test]
fn a_second_matrix_with_the_same_input() {
    let mut rng = Rng::new(17);
    for format in FORMATS {
        for (case, way) in ways().into_iter().enumerate() {
            let k = [64, 20, 96, 33][case % 4];
            let (n, n2, t) = ([40, 3, 129][case % 3], [5, 140, 1][case % 3], 1 + case % 3);
            let [w, v] = [n, n2].map(|rows| Matrix::random(&mut rng, format, rows, k));
            let (x, norm) = (rng.numbers(t * k), rng.norm(k));
            let variant = way.plug(w.plug(Variant::new("linear")), &w).flag("second", true).flag("norm", true);
            let variant = variant.int("N", n).int("N2", n2).int("K", k).int("TILE", 2).float("EPS", EPS);
            let call = Call::new(&variant)
                .batch(t, 1)
                .part(0, n, false)
                .floats("x", &x)
                .matrix("w", &w, 0, n)
                .matrix("v", &v, 0, n2)
                .fours("norm", &norm)
                .words("y", &vec![UNTOUCHED; t * n])
                .words("y2", &vec![UNTOUCHED; t * n2]);
            let got = call.run([way.groups(n + n2), t.div_ceil(2), 1]);
            let normed = ops::rms_norm(&f64s(&x), &f64s(&norm), EPS);
            for (name, matrix) in [("y", &w), ("y2", &v)] {
                let numbers = matrix.numbers();
                let (want, size) = (ops::linear(&normed, &numbers, None, k), product_size(&normed, &numbers, k));
                assert_agrees("linear", &format!("{format:?} {way:?} {name} of two"), &got.floats(name), &want, &size);
            }
        }
    }
}

/// Saturated gates: silu of ±large numbers is the number or zero, never NaN.
#[test]
fn gates_far_from_zero() {
    let mut rng = Rng::new(8);
    let (n, k) = (4, 4);
    let gates = [200.0, -200.0, 60.0, -60.0].map(|gate| [gate, 0.0, 0.0, 0.0].map(f32::to_bits)).concat();
    let up = Matrix::random(&mut rng, WeightFormat::F32, n, k);
    let mut case = Linear::plain(Matrix::of(WeightFormat::F32, n, k, gates), vec![1.0, 2.0, 3.0, 4.0]);
    case.u = Some(up);
    case.check("saturated gates");
}

/// The comparison notices one changed weight, a swapped operand and a lost bias.
#[test]
fn wrong_results_are_noticed() {
    let mut rng = Rng::new(9);
    for format in FORMATS {
        let k = 12;
        let (w, x) = (Matrix::random(&mut rng, format, k, k), rng.numbers(k * k));
        let mut case = Linear::plain(w, x);
        case.bias = Some(rng.numbers(k));
        let got = case.run();
        let verdict = |case: &Linear| {
            let (want, size) = case.expected();
            compare("linear", &got, &want, &size)
        };
        assert!(verdict(&case).is_ok());
        let at = (0..k * k).find(|&i| decode(format, case.w.codes[i]).abs() > 0.02).expect("some weight is not tiny");
        let original = case.w.clone();
        case.w.codes[at] ^= 1 << if format == WeightFormat::F32 { 16 } else { 0 };
        assert!(verdict(&case).is_err(), "{format:?}: a changed weight went unnoticed");
        case.w = original.clone();
        case.w.codes = (0..k * k).map(|i| original.codes[i % k * k + i / k]).collect();
        assert!(verdict(&case).is_err(), "{format:?}: a transposed matrix went unnoticed");
        case.w = original;
        case.bias = None;
        assert!(verdict(&case).is_err(), "{format:?}: a lost bias went unnoticed");
    }
}

/// Rows of `w` for these token ids, one dispatch for each part.
fn embed(w: &Matrix, ids: &[u32], parts: &[(usize, usize)]) -> Vec<u32> {
    let d = w.columns;
    let variant = w.plug(Variant::new("embed")).int("D", d).int("WG", 64);
    let tokens: Vec<u32> = ids.iter().flat_map(|&id| [id, 7, 0, 0]).collect();
    let mut y = vec![UNTOUCHED; ids.len() * d];
    for &(first, count) in parts {
        let call = Call::new(&variant).part(first, count, false).words("tokens", &tokens);
        let call = call.matrix("w", w, first, count).words("y", &y);
        y = call.run([d.div_ceil(4).div_ceil(64), ids.len(), 1]).words("y").to_vec();
    }
    y
}

/// All codes of the small formats, and each kind of f32, come out bit for bit; NaN as NaN.
#[test]
fn every_code_is_decoded_exactly() {
    let specials = [0, 1, 0x007f_ffff, 0x0080_0000, 0x3f80_0000, 0x7f7f_ffff, 0x7f80_0000, 0x7fc0_0000];
    let f32s: Vec<u32> = specials.iter().flat_map(|&code| [code, code | 0x8000_0000]).collect();
    for format in FORMATS.into_iter().chain([WeightFormat::Int8]) {
        let (codes, columns): (Vec<u32>, usize) = match format {
            WeightFormat::F32 => (f32s.clone(), 4),
            WeightFormat::Bf16 | WeightFormat::F16 => ((0..65536).collect(), 256),
            WeightFormat::Fp8 => ((0..256).collect(), 16),
            WeightFormat::Int8 => ((0..256).collect(), 32),
            WeightFormat::Int4 => unreachable!("embeddings have no four bits"),
        };
        let rows = codes.len() / columns;
        let ids: Vec<u32> = (0..rows as u32).collect();
        let got = embed(&Matrix::of(format, rows, columns, codes.clone()), &ids, &[(0, rows)]);
        assert_eq!(got.len(), codes.len());
        for (&code, &got) in codes.iter().zip(&got) {
            let want = decode(format, code);
            let same = if want.is_nan() { f32::from_bits(got).is_nan() } else { got == want.to_bits() };
            assert!(same && got != UNTOUCHED, "{format:?} code {code:#x}: {got:#x} instead of {want:e}");
        }
    }
}

#[test]
fn embeddings_in_parts() {
    let mut rng = Rng::new(10);
    for format in FORMATS {
        for d in [1, 2, 3, 5, 63, 65, 300] {
            let vocab = 12;
            let w = Matrix::random(&mut rng, format, vocab, d);
            let ids = [11, 0, 4, 3, 5, 4, 11, 10, 1];
            let got: Vec<f32> = embed(&w, &ids, &[(0, 4), (4, 1), (5, 7)]).into_iter().map(f32::from_bits).collect();
            let want = ops::embed(&w.numbers(), d, &ids);
            assert_agrees("embed", &format!("{format:?} D {d}"), &got, &want, &super::data::magnitudes(&want));
            // Ids of other parts, and of none, are left alone.
            let got = embed(&w, &[5, 3, 12, u32::MAX, 7], &[(4, 3)]);
            let touched: Vec<bool> = got.chunks(d).map(|row| row.iter().all(|&word| word != UNTOUCHED)).collect();
            assert_eq!(touched, [true, false, false, false, false], "{format:?} D {d}");
        }
    }
}
