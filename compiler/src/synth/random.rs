//! Counter-based random numbers: element i of a tensor depends on the seed, the tensor's name and i alone.

use std::sync::LazyLock;

use half::bf16;

use crate::dtype::Dtype;

/// Distribution of the elements of a tensor: normal, cut off at [`max_z`] standard deviations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Law {
    pub(super) mean: f64,
    pub(super) std: f64,
}

/// Steps of the table of normal quantiles that F32 and BF16 elements are drawn from.
const STEPS: usize = 1 << 12;
/// The same for FP8 codes, one byte of randomness each.
const CODE_STEPS: usize = 1 << 8;
/// Largest e4m3 number.
const E4M3_MAX: f64 = 448.0;

/// Scales that give decoded FP8 weights the standard deviation `std`, varying from block to block.
pub(super) fn scale_law(std: f64) -> Law {
    let mean = std * max_z(CODE_STEPS) / E4M3_MAX;
    Law { mean, std: mean * 0.05 }
}

/// Elements that one 64-bit random number yields.
pub(super) fn per_word(dtype: Dtype) -> usize {
    if dtype == Dtype::F8E4m3 { 8 } else { 4 }
}

/// Fills `out` with elements `first…` of a tensor; `first` is a multiple of [`per_word`].
pub(super) fn fill(key: u64, dtype: Dtype, law: Law, first: u64, out: &mut [u8]) {
    static NORMAL: LazyLock<Vec<f64>> = LazyLock::new(|| quantiles(STEPS));
    static CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let scale = E4M3_MAX / max_z(CODE_STEPS);
        quantiles(CODE_STEPS).iter().map(|z| encode_e4m3(z * scale)).collect()
    });
    let word = |i: usize, per: u64| mix(key, first / per + i as u64);
    match dtype {
        Dtype::F8E4m3 => {
            let codes = &CODES[..CODE_STEPS];
            for (i, chunk) in out.chunks_mut(8).enumerate() {
                for (o, b) in chunk.iter_mut().zip(word(i, 8).to_le_bytes()) {
                    *o = codes[b as usize];
                }
            }
        }
        Dtype::Bf16 => fill_from(out, law, &NORMAL, word, |v| bf16::from_f32(v).to_le_bytes()),
        Dtype::F32 => fill_from(out, law, &NORMAL, word, f32::to_le_bytes),
        other => unreachable!("{other} is never synthesised"),
    }
}

/// Four elements of `N` bytes from each word, 12 of its bits each.
fn fill_from<const N: usize>(
    out: &mut [u8],
    law: Law,
    normal: &[f64],
    word: impl Fn(usize, u64) -> u64,
    encode: impl Fn(f32) -> [u8; N],
) {
    let values: Vec<[u8; N]> = normal.iter().map(|z| encode((law.mean + law.std * z) as f32)).collect();
    let values = &values[..STEPS];
    for (i, chunk) in out.chunks_mut(4 * N).enumerate() {
        let bits = word(i, 4);
        for (j, element) in chunk.chunks_exact_mut(N).enumerate() {
            element.copy_from_slice(&values[(bits >> (16 * j)) as usize % STEPS]);
        }
    }
}

/// Key of a tensor.
pub(super) fn key(seed: u64, name: &str) -> u64 {
    // FNV-1a of the name, then mixed with the seed.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3));
    mix(hash, seed)
}

/// SplitMix64's output function at position `counter` of the stream `key`.
fn mix(key: u64, counter: u64) -> u64 {
    let mut z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `steps` equally likely values of the standard normal distribution.
fn quantiles(steps: usize) -> Vec<f64> {
    (0..steps).map(|i| quantile((i as f64 + 0.5) / steps as f64)).collect()
}

/// Largest of [`quantiles`].
fn max_z(steps: usize) -> f64 {
    quantile(1.0 - 0.5 / steps as f64)
}

/// Inverse of the standard normal distribution function, by bisection of its series.
fn quantile(p: f64) -> f64 {
    if p < 0.5 {
        return -quantile(1.0 - p);
    }
    let (mut lo, mut hi) = (0.0, 8.0);
    for _ in 0..60 {
        let mid = f64::midpoint(lo, hi);
        if distribution(mid) < p { lo = mid } else { hi = mid }
    }
    f64::midpoint(lo, hi)
}

/// Standard normal distribution function for x ≥ 0: 1/2 + φ(x)·(x + x³/3 + x⁵/15 + …).
fn distribution(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= x * x / (2 * n + 1) as f64;
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// Nearest e4m3 code; saturates, never gives a NaN code.
fn encode_e4m3(x: f64) -> u8 {
    float8::F8E4M3::from_f64(x.clamp(-E4M3_MAX, E4M3_MAX)).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_quantiles() {
        for (p, z) in
            [(0.5, 0.0), (0.841_344_746_068_543, 1.0), (0.975, 1.959_963_984_540_054), (0.001, -3.090_232_306_167_813)]
        {
            assert!((quantile(p) - z).abs() < 1e-9, "{p}: {}", quantile(p));
        }
    }

    #[test]
    fn e4m3_codes() {
        for (x, code) in
            [(0.0, 0), (448.0, 0x7e), (1e9, 0x7e), (-448.0, 0xfe), (1.0, 0x38), (-1.125, 0xb9), (0.001_953_125, 1)]
        {
            assert_eq!(encode_e4m3(x), code, "{x}");
        }
    }

    #[test]
    fn chunks_continue_each_other() {
        let law = Law { mean: 0.0, std: 1.0 };
        for dtype in [Dtype::F8E4m3, Dtype::Bf16, Dtype::F32] {
            let bytes = dtype.bytes();
            let mut whole = vec![0; 37 * bytes];
            fill(5, dtype, law, 0, &mut whole);
            let mut tail = vec![0; 21 * bytes];
            fill(5, dtype, law, 16, &mut tail);
            assert_eq!(whole[16 * bytes..], tail[..], "{dtype}");
        }
    }
}
