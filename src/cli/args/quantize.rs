//! Arguments of `moewe quantize`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moewe_plan::WeightFormat;

use super::{DeviceArgs, KlArgs, ModelArgs, PrecisionArg, TextArgs};

/// Bits of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Bits {
    /// All matrices but routers
    #[value(name = "8")]
    Eight,
    /// Experts, dense layers, q_b and o of attention; its other projections, embedding, head and the entry of MTP modules keep 8
    #[value(name = "4")]
    Four,
}

impl From<Bits> for WeightFormat {
    fn from(bits: Bits) -> Self {
        match bits {
            Bits::Eight => Self::Int8,
            Bits::Four => Self::Int4,
        }
    }
}

/// `moewe quantize`.
#[derive(Args, Debug)]
#[command(
    after_help = "Numbers become whole numbers of 8 or 4 bits, with a scale (f16) for each 32 of a row, chosen to leave the \
        least squared error. Routers, norms and biases stay exact, and matrices whose rows do not divide by 32 keep their \
        format. Then the original (P) and the result (Q) are run over a text, and KL(P || Q) is printed in nats for each \
        predicted token, as `moewe eval kl` does; both are on the device at once. Without --text it is a chapter of \
        English that comes with moewe; a text of your own kind says more.\n\n\
        Examples:\n  \
        moewe quantize models/demo --bits 4 -o demo-int4.moewe --context 256\n  \
        moewe quantize DeepSeek-V3 --bits 4 -o v3-int4.moewe --target hopper --no-measure"
)]
pub struct QuantizeArgs {
    /// Checkpoint directory
    #[arg(value_name = "MODEL", required_unless_present = "device")]
    pub model: Option<PathBuf>,

    /// Bits of a number, scales left out
    #[arg(long, value_enum, required_unless_present = "device")]
    pub bits: Option<Bits>,

    /// Bundle to write
    #[arg(long, short, value_name = "DIR", required_unless_present = "device")]
    pub out: Option<PathBuf>,

    /// Device profile: generic-vulkan, hopper, lavapipe, webgpu or a file [default: by device]
    #[arg(long, value_name = "PROFILE", help_heading = "Device")]
    pub target: Option<String>,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Text to measure with, UTF-8; with the ending .json an array of token ids
    #[arg(long, value_name = "FILE", conflicts_with = "no_measure")]
    pub text: Option<PathBuf>,

    /// Tokens of a window of the text [default: the model's context, at most 2048]
    #[arg(long, value_name = "N", conflicts_with = "no_measure")]
    pub context: Option<usize>,

    /// Do not run the models, for those that do not fit the device together
    #[arg(long)]
    pub no_measure: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl QuantizeArgs {
    /// The comparison of the result with the original.
    pub fn kl(&self) -> KlArgs {
        let model = ModelArgs {
            model: self.out.clone(),
            device: DeviceArgs { device: self.device.device.clone() },
            target: None,
            precision: PrecisionArg::Exact,
            prefill_chunk: None,
        };
        KlArgs {
            model,
            text: TextArgs { file: self.text.clone(), context: self.context },
            against: self.model.clone(),
            against_precision: PrecisionArg::Exact,
            json: self.json,
        }
    }
}
