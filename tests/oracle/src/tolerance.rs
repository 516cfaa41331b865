//! How far the numbers of kernels may be from the oracle's, and comparing them.

use crate::ops;

/// How far a kernel's numbers may be from the oracle's.
pub struct Tolerance {
    /// The kernel.
    pub kernel: &'static str,
    /// Largest error of a number, in units of its condition: the sum of the magnitudes of all that was added up.
    pub bound: f64,
    /// Why it may be as large.
    pub reason: &'static str,
}

const fn tolerance(kernel: &'static str, bound: f64, reason: &'static str) -> Tolerance {
    Tolerance { kernel, bound, reason }
}

/// For each kernel. An f32 operation is off by at most 6e-8.
pub const TOLERANCES: [Tolerance; 23] = [
    tolerance("absorb_output", 1e-6, "sums of up to 520 products, in four or more partial sums"),
    tolerance("absorb_query", 1e-6, "sums of up to 128 products, one after the other; angles from two f32 factors"),
    tolerance("absorb_write", 0.0, "the bits of absorb_query and latent_write"),
    tolerance("accept", 0.0, "integers"),
    tolerance("embed", 1.2e-7, "at most one product"),
    tolerance("experts_down", 1e-6, "two sums and their products"),
    tolerance("experts_gate_up", 2e-6, "two sums, RMSNorm and an exponential, whose argument is such a sum"),
    tolerance("experts_sort", 0.0, "integers"),
    tolerance("experts_sum", 1e-6, "a sum of a few products"),
    tolerance("gather_rows", 0.0, "a copy"),
    tolerance("gemm", 2e-6, "a sum of up to 288 products; RMSNorm and SwiGLU add as much again"),
    tolerance(
        "gemm_coop",
        2e-6,
        "as gemm, of factors rounded to the 11 bits of an f16; below 2⁻²¹ of a row's largest, to fewer",
    ),
    tolerance("gemm_tiled", 2e-6, "as gemm"),
    tolerance("latent_attention", 2e-6, "sums over numbers and over positions, and an exponential for each position"),
    tolerance("latent_write", 1e-6, "RMSNorm, or a rotation by an angle from two f32 factors"),
    tolerance("linear", 2e-6, "a sum of up to 1030 products; RMSNorm and SwiGLU add as much again"),
    tolerance("mtp_join", 1e-6, "RMSNorm"),
    tolerance("propose", 0.0, "integers"),
    tolerance("rms_norm", 1e-6, "a sum in at least 64 parts, a root and two products"),
    tolerance("router", 2e-6, "an exponential and a sum over all or the chosen experts"),
    tolerance("router_product", 2e-6, "logits as linear's; the choice is the router's for them"),
    tolerance("sample", 0.0, "integers; draws whose lead is less than an error of the times are not compared"),
    tolerance("top_tokens", 2e-6, "exponentials of differences, a sum over the vocabulary and its logarithm"),
];

/// A number so small that a device may flush it to zero, times what it may be multiplied with.
const FLUSHED: f64 = 1e-33;

/// The largest error in units of `size`, or where the result is wrong. Numbers that are not finite must be the same.
///
/// # Errors
/// The first number that is wrong.
pub fn compare(kernel: &str, got: &[f32], want: &[f64], size: &[f64]) -> Result<f64, String> {
    assert!(!want.is_empty(), "nothing to compare");
    assert_eq!((got.len(), size.len()), (want.len(), want.len()), "lengths");
    let bound = TOLERANCES.iter().find(|tolerance| tolerance.kernel == kernel).expect("a kernel of the table").bound;
    let mut worst = 0.0f64;
    for (i, ((&got, &want), &size)) in got.iter().zip(want).zip(size).enumerate() {
        let got = f64::from(got);
        let fine = if want.is_nan() {
            got.is_nan()
        } else if want.is_infinite() {
            got.is_infinite() && got.signum().total_cmp(&want.signum()).is_eq()
        } else {
            let error = (got - want).abs();
            if error > FLUSHED {
                worst = worst.max(error / size);
            }
            error <= bound * size + FLUSHED
        };
        if !fine {
            return Err(format!("number {i}: {got:e} instead of {want:e}, of size {size:e}"));
        }
    }
    Ok(worst)
}

/// Absolute values.
pub fn magnitudes(numbers: &[f64]) -> Vec<f64> {
    numbers.iter().map(|number| number.abs()).collect()
}

/// `[T, K] × [N, K]ᵀ` of magnitudes: the condition of a matrix product.
pub fn product_size(x: &[f64], w: &[f64], inputs: usize) -> Vec<f64> {
    ops::linear(&magnitudes(x), &magnitudes(w), None, inputs)
}

/// The condition of `silu(gate) · up` from values and conditions of both.
pub fn swiglu_size(gate: &[f64], gate_size: &[f64], up: &[f64], up_size: &[f64]) -> Vec<f64> {
    let one = |i: usize| 1.1 * gate_size[i] * up[i].abs() + ops::silu(gate[i]).abs() * up_size[i];
    (0..gate.len()).map(one).collect()
}
