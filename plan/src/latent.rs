//! Formats of the latent cache.

use serde::{Deserialize, Serialize};

/// Format of the rows of the latent cache. Each is a file in `shaders/wesl/latent`, which has its layout; [`Latent::words`]
/// must agree with the constant `CELLS` there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Latent {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// The latent in FP8 e4m3 with an f32 scale for each 128 numbers, the rope part in bf16.
    Fp8,
    /// The latent in six-bit codes with a bf16 scale for each 32 numbers, the rope part in bf16.
    Q6,
}

impl Latent {
    /// Every format.
    pub const ALL: [Latent; 4] = [Latent::F32, Latent::F16, Latent::Fp8, Latent::Q6];

    /// Words of a row of `rank` numbers of the latent and `rope` of the rotated key.
    pub fn words(self, rank: u64, rope: u64) -> u64 {
        let (units, rope_units) = (rank.div_ceil(16), rope.div_ceil(8));
        let cells = match self {
            Latent::F32 => 4 * units + 2 * rope_units,
            Latent::F16 => 2 * units + rope_units,
            Latent::Fp8 => units + rope_units + rank.div_ceil(128).div_ceil(4),
            Latent::Q6 => units.div_ceil(2) + units.div_ceil(4) + rope_units + rank.div_ceil(32).div_ceil(8),
        };
        4 * cells
    }

    /// The name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Latent::F32 => "f32",
            Latent::F16 => "f16",
            Latent::Fp8 => "fp8",
            Latent::Q6 => "q6",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_v3_has_the_bytes_that_its_format_promises() {
        let bytes = Latent::ALL.map(|latent| 4 * latent.words(512, 64));
        assert_eq!(bytes, [2304, 1152, 656, 544]);
        assert!(Latent::ALL.iter().all(|latent| latent.words(1, 2).is_multiple_of(4)));
    }
}
