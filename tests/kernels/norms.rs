//! `rms_norm`, `mtp_join` and `gather_rows`.

use moewe_oracle::ops;
use moewe_shaders::Variant;

use super::data::{Rng, assert_agrees, compare, f64s, magnitudes};
use super::harness::Call;

const EPS: f64 = 1e-6;
const LENGTHS: [usize; 8] = [1, 2, 3, 5, 63, 64, 65, 300];

fn rms_norm(x: &[f32], norm: &[f32], eps: f64) -> Vec<f32> {
    let (n, t) = (norm.len(), x.len() / norm.len());
    let variant = Variant::new("rms_norm").int("N", n).int("WG", 64).float("EPS", eps);
    Call::new(&variant).floats("x", x).floats("norm", norm).output("y", t * n).run([t, 1, 1]).floats("y")
}

/// Rows of ordinary, huge, tiny, zero and mixed numbers.
fn rows(rng: &mut Rng, n: usize) -> Vec<f32> {
    let mut x = rng.numbers(5 * n);
    x[n..2 * n].iter_mut().for_each(|x| *x *= 1e17);
    x[2 * n..3 * n].iter_mut().for_each(|x| *x *= 1e-25);
    x[3 * n..4 * n].fill(0.0);
    x[4 * n] = -3e15;
    x
}

#[test]
fn norms_of_ordinary_huge_and_tiny_rows() {
    let mut rng = Rng::new(30);
    for n in LENGTHS {
        for eps in [EPS, 1e-2] {
            let (x, norm) = (rows(&mut rng, n), rng.norm(n));
            let want = ops::rms_norm(&f64s(&x), &f64s(&norm), eps);
            let got = rms_norm(&x, &norm, eps);
            assert_agrees("rms_norm", &format!("N {n} eps {eps:e}"), &got, &want, &magnitudes(&want));
            let mut other = f64s(&norm);
            other[n / 2] *= 1.00002;
            let wrong = ops::rms_norm(&f64s(&x), &other, eps);
            assert!(compare("rms_norm", &got, &wrong, &magnitudes(&wrong)).is_err(), "a changed weight went unnoticed");
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    let mut rng = Rng::new(31);
    let (mut x, norm) = (rng.numbers(3 * 65), rng.norm(65));
    x[65 + 64] = f32::NAN;
    let want = ops::rms_norm(&f64s(&x), &f64s(&norm), EPS);
    assert_eq!(want.iter().filter(|number| number.is_nan()).count(), 65);
    assert_agrees("rms_norm", "with NaN", &rms_norm(&x, &norm, EPS), &want, &magnitudes(&want));
}

#[test]
fn join_of_embedding_and_hidden_row() {
    let mut rng = Rng::new(32);
    for n in LENGTHS {
        let (e, mut h) = (rows(&mut rng, n), rows(&mut rng, n));
        h.rotate_left(n);
        let (enorm, hnorm) = (rng.norm(n), rng.norm(n));
        let variant = Variant::new("mtp_join").int("N", n).int("WG", 64).float("EPS", EPS);
        let call = Call::new(&variant).floats("e", &e).floats("h", &h).floats("enorm", &enorm).floats("hnorm", &hnorm);
        let got = call.output("y", 5 * 2 * n).run([5, 2, 1]).floats("y");
        let embedded = ops::rms_norm(&f64s(&e), &f64s(&enorm), EPS);
        let carried = ops::rms_norm(&f64s(&h), &f64s(&hnorm), EPS);
        let want = ops::concat_rows(&embedded, n, &carried, n);
        assert_agrees("mtp_join", &format!("N {n}"), &got, &want, &magnitudes(&want));
        let wrong = ops::concat_rows(&carried, n, &embedded, n);
        assert!(compare("mtp_join", &got, &wrong, &magnitudes(&wrong)).is_err(), "swapped halves went unnoticed");
    }
}

#[test]
fn gathered_rows_are_copies() {
    let mut rng = Rng::new(33);
    for n in LENGTHS {
        let mut x = rng.numbers(7 * n);
        x[3 * n] = f32::INFINITY;
        let rows = [3, 0, 6, 6, 2];
        let variant = Variant::new("gather_rows").int("N", n).int("WG", 64);
        let call = Call::new(&variant).floats("x", &x).words("rows", &rows).output("y", rows.len() * n);
        let got = call.run([n.div_ceil(64), rows.len(), 1]).floats("y");
        let want: Vec<f32> = rows.iter().flat_map(|&row| &x[row as usize * n..][..n]).copied().collect();
        assert_eq!(got, want, "N {n}");
    }
}
