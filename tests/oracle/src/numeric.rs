//! Number formats: bf16, f16 and e4m3fn (decode is exact, encode rounds to nearest even), FP8 block
//! dequantisation and dynamic 1×block activation quantisation. Spec §8.
//!
//! f16 and e4m3 share one pair of functions that follow the definition of a small float with arithmetic instead of
//! bit tricks, so that they can be checked by reading.

/// Smallest normal exponent and mantissa width of a small IEEE-like float.
#[derive(Clone, Copy)]
struct Minifloat {
    min_exponent: i32,
    mantissa_bits: u32,
}

const F16: Minifloat = Minifloat { min_exponent: -14, mantissa_bits: 10 };
const E4M3: Minifloat = Minifloat { min_exponent: -6, mantissa_bits: 3 };

/// Largest finite e4m3fn value, code 0x7E (spec §8).
pub const E4M3_MAX: f32 = 448.0;

impl Minifloat {
    /// Value of a code without its sign bit, for codes that are finite.
    fn decode(self, code: u32) -> f32 {
        let exponent = (code >> self.mantissa_bits) as i32;
        let fraction = code & ((1 << self.mantissa_bits) - 1);
        // Exponent field 0 is subnormal: no implicit leading one, same quantum as field 1.
        let implicit = if exponent == 0 { 0 } else { 1 << self.mantissa_bits };
        let quantum = 2f64.powi(exponent.max(1) - 1 + self.min_exponent - self.mantissa_bits as i32);
        (f64::from(implicit + fraction) * quantum) as f32
    }

    /// Code of the nearest value (ties to even) for a finite `a >= 0`, as if the exponent had no upper limit.
    fn encode(self, a: f32) -> u32 {
        let exponent = ((a.to_bits() >> 23) as i32 - 127).max(self.min_exponent);
        let quantum = 2f64.powi(exponent - self.mantissa_bits as i32);
        let steps = (f64::from(a) / quantum).round_ties_even() as u32;
        // A normal value has steps in [2^m, 2^(m+1)], so its leading one adds 1 to the exponent field, and rounding
        // up to the next power of two carries into it as it should.
        (((exponent - self.min_exponent) as u32) << self.mantissa_bits) + steps
    }
}

/// bf16 bits to f32, exact.
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 to the nearest bf16, ties to even; overflow goes to infinity and NaN stays NaN.
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        // Set a mantissa bit that survives the cut, or the NaN could become an infinity.
        return (bits >> 16) as u16 | 0x0040;
    }
    let round_up = 0x7FFF + ((bits >> 16) & 1);
    ((bits + round_up) >> 16) as u16
}

/// f16 bits to f32, exact.
pub fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7FFF);
    let value = match magnitude {
        0x7C00 => f32::INFINITY,
        m if m > 0x7C00 => f32::NAN,
        m => F16.decode(m),
    };
    if bits >> 15 == 1 { -value } else { value }
}

/// f32 to the nearest f16, ties to even; overflow goes to infinity and NaN to the quiet NaN.
pub fn f32_to_f16(x: f32) -> u16 {
    let sign = ((x.to_bits() >> 31) as u16) << 15;
    let magnitude = if x.is_nan() {
        0x7E00
    } else if x.is_infinite() {
        0x7C00
    } else {
        F16.encode(x.abs()).min(0x7C00) as u16
    };
    sign | magnitude
}

/// e4m3fn code to f32, exact: bias 7, subnormals m·2⁻⁹, NaN only at 0x7F and 0xFF, no infinities (spec §8).
pub fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7F);
    let value = if magnitude == 0x7F { f32::NAN } else { E4M3.decode(magnitude) };
    if code >> 7 == 1 { -value } else { value }
}

/// f32 to the nearest e4m3fn code, ties to even, saturating at ±448; NaN becomes 0x7F or 0xFF (spec §8).
pub fn f32_to_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 31) as u8) << 7;
    let magnitude = if x.is_nan() { 0x7F } else { E4M3.encode(x.abs().min(E4M3_MAX)) as u8 };
    sign | magnitude
}

/// Dequantises a block-scaled FP8 weight (spec §8): `w[i, j] = e4m3(codes[i, j]) · scale_inv[i / block[0], j / block[1]]`,
/// the product rounded to f32.
///
/// `codes` is `shape` = [rows, cols]; `scale_inv` is [⌈rows/block 0⌉, ⌈cols/block 1⌉], partial tail blocks included.
pub fn block_dequant(codes: &[u8], shape: [usize; 2], scale_inv: &[f32], block: [usize; 2]) -> Vec<f32> {
    let [rows, cols] = shape;
    let scale_cols = cols.div_ceil(block[1]);
    assert_eq!(codes.len(), rows * cols, "codes do not fill {shape:?}");
    assert_eq!(scale_inv.len(), rows.div_ceil(block[0]) * scale_cols, "scales do not cover {shape:?} in {block:?}");
    let mut out = Vec::with_capacity(codes.len());
    for i in 0..rows {
        for j in 0..cols {
            out.push(e4m3_to_f32(codes[i * cols + j]) * scale_inv[i / block[0] * scale_cols + j / block[1]]);
        }
    }
    out
}

/// Activations quantised to e4m3 with one scale for each token and `block` input channels (spec §8).
#[derive(Debug, Clone, PartialEq)]
pub struct QuantisedActivations {
    /// e4m3fn codes, [T, K].
    pub codes: Vec<u8>,
    /// Multipliers, [T, ⌈K/block⌉].
    pub scales: Vec<f32>,
    /// Channels K of a row.
    pub channels: usize,
    /// Channels that share a scale.
    pub block: usize,
}

impl QuantisedActivations {
    /// The values the codes stand for, [T, K]. The product is not rounded to f32.
    pub fn dequantise(&self) -> Vec<f64> {
        let row_scales = self.channels.div_ceil(self.block);
        let scale = |i: usize| self.scales[i / self.channels * row_scales + i % self.channels / self.block];
        self.codes.iter().enumerate().map(|(i, &q)| f64::from(e4m3_to_f32(q)) * f64::from(scale(i))).collect()
    }
}

/// Dynamic activation quantisation (spec §8) of `x` [T, K] with K = `channels`: a = max(max|x|, 1e-4), s = a/448,
/// q = e4m3(x/s), all in f32. With `ue8m0` the scale is rounded up to a power of two.
pub fn quantise_activations(x: &[f32], channels: usize, block: usize, ue8m0: bool) -> QuantisedActivations {
    assert_eq!(x.len() % channels, 0, "x is not whole rows of {channels}");
    let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::new());
    for part in x.chunks_exact(channels).flat_map(|row| row.chunks(block)) {
        let largest = part.iter().fold(1e-4f32, |a, v| a.max(v.abs()));
        let scale = largest / E4M3_MAX;
        let scale = if ue8m0 { next_power_of_two(scale) } else { scale };
        codes.extend(part.iter().map(|v| f32_to_e4m3(v / scale)));
        scales.push(scale);
    }
    QuantisedActivations { codes, scales, channels, block }
}

/// Smallest power of two that is at least `x`, for positive normal `x`.
fn next_power_of_two(x: f32) -> f32 {
    let floor = f32::from_bits(x.to_bits() & 0xFF80_0000);
    if floor < x { floor * 2.0 } else { floor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_small_float_survives_a_round_trip() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16_to_f32(bits), bf16_to_f32(bits));
            if !half.is_nan() {
                assert_eq!(f32_to_f16(half), bits);
            }
            if !brain.is_nan() {
                assert_eq!(f32_to_bf16(brain), bits);
            }
        }
        for code in 0..=u8::MAX {
            assert_eq!(f32_to_e4m3(e4m3_to_f32(code)) & 0x7F, code & 0x7F);
        }
    }

    #[test]
    fn ties_go_to_even_and_overflow_is_as_documented() {
        assert_eq!(f32_to_bf16(f32::from_bits(0x3F80_8000)), 0x3F80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3F81_8000)), 0x3F82);
        assert_eq!(f32_to_bf16(f32::MAX), 0x7F80);
        assert!(bf16_to_f32(f32_to_bf16(f32::from_bits(0x7F80_0001))).is_nan());
        assert_eq!(f32_to_f16(1.0 + 2f32.powi(-11)), 0x3C00);
        assert_eq!(f32_to_f16(1.0 + 3.0 * 2f32.powi(-11)), 0x3C02);
        assert_eq!(f32_to_f16(2f32.powi(-25)), 0);
        assert_eq!(f32_to_f16(-3.0 * 2f32.powi(-25)), 0x8002);
        assert_eq!(f32_to_f16(65519.0), 0x7BFF);
        assert_eq!(f32_to_f16(65520.0), 0x7C00);
        assert_eq!(f32_to_e4m3(f32::INFINITY), 0x7E);
    }
}
