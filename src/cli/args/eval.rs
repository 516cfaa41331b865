//! Arguments of `moewe eval` and `moewe bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, value_parser};
use moewe_runtime::engine::Mtp;

use super::{LoadArgs, ModelArgs, PrecisionArg, engine};

/// `moewe eval`.
#[derive(Args, Debug)]
pub struct EvalArgs {
    /// What to measure
    #[command(subcommand)]
    pub what: EvalCommand,
}

/// Subcommands of `moewe eval`.
#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// How well a model predicts a text
    Perplexity(PerplexityArgs),
    /// How far a model's predictions are from a reference's: KL divergence
    Kl(KlArgs),
}

/// `moewe eval perplexity`.
#[derive(Args, Debug)]
#[command(
    after_help = "Perplexity is exp of the mean of -ln p over the predicted tokens. A window is run alone; its first token is \
        not predicted. With a stride below the context, only those tokens of a window count that the one before did not \
        have: its last STRIDE. Bits a byte are those of all tokens of FILE, the few that are not predicted taken at the \
        mean.\n\n\
        Examples:\n  \
        moewe eval perplexity models/demo text.txt\n  \
        moewe eval perplexity models/demo text.txt --context 256 --stride 128 --json"
)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub text: TextArgs,

    /// Tokens from one window to the next, at most N [default: N, so that windows do not overlap]
    #[arg(long, value_name = "STRIDE")]
    pub stride: Option<usize>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `moewe eval kl`.
#[derive(Args, Debug)]
#[command(
    after_help = "P is the reference (--against), Q is MODEL; the result is KL(P || Q) = sum of p * (ln p - ln q) in nats, 0 \
        where both predict the same. The text is run in windows that do not overlap, and the two models must have the same \
        vocabulary and split FILE into the same tokens. Both are on the device at once, so it needs the memory of both.\n\n\
        Examples:\n  \
        moewe compile models/demo -o demo-f16.moewe --weights f16\n  \
        moewe eval kl demo-f16.moewe text.txt --against models/demo\n  \
        moewe eval kl models/demo text.txt --precision fast"
)]
pub struct KlArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub text: TextArgs,

    /// Reference: checkpoint directory or bundle [default: MODEL, in another precision]
    #[arg(long, value_name = "OTHER")]
    pub against: Option<PathBuf>,

    /// How the reference keeps activations and latents
    #[arg(long, value_name = "PRECISION", value_enum, default_value_t)]
    pub against_precision: PrecisionArg,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl KlArgs {
    /// The reference as a model of its own.
    pub fn reference(&self) -> ModelArgs {
        ModelArgs {
            model: self.against.clone().or_else(|| self.model.model.clone()),
            device: super::DeviceArgs { device: self.model.device.device.clone() },
            // A target is for checkpoints: it says nothing about a bundle that is compared with one.
            target: self
                .model
                .target
                .clone()
                .filter(|_| !self.against.as_deref().is_some_and(moewe_plan::Bundle::is_bundle)),
            precision: self.against_precision,
            prefill_chunk: self.model.prefill_chunk,
        }
    }
}

/// What to predict.
#[derive(Args, Debug)]
pub struct TextArgs {
    /// Text to predict, UTF-8; with the ending .json an array of token ids
    #[arg(value_name = "FILE", required_unless_present = "device")]
    pub file: Option<PathBuf>,

    /// Tokens of a window [default: the model's context, at most 2048]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
}

/// Subcommands of `moewe bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Send requests to a running server as many people would, and measure what they see
    Serve(LoadArgs),
}

/// Parts of `moewe bench`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchPart {
    /// Prompts, up to their first new tokens
    Prefill,
    /// Tokens behind others in the cache
    Decode,
    /// A stream with drafts of multi-token prediction, and without
    Drafts,
    /// A prompt whose beginning was run before
    Prefix,
}

/// `moewe bench`.
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    mut_arg("model", |model| model.required_unless_present_any(["device", "floor"])),
    after_help = "Prompts are random tokens; where drafts are measured, the model goes on with text of its own. Each line is \
        the median of several runs behind one that warms up, beside its floor: the longer of the bytes that each run must \
        move, over the speed at which this device copies memory, and its operations, over the rate at which it multiplies \
        large matrices. What does not fit the model's context or the device is left out, with a note.\n\n\
        Examples:\n  \
        moewe bench models/demo\n  \
        moewe bench --floor\n  \
        moewe bench models/demo --mtp off,1,2,3,auto --repeat 9\n  \
        moewe bench v3.moewe --prompt-tokens 1024 --batch 1,8,64 --context 0,4096 --json > bench.json"
)]
pub struct BenchArgs {
    /// Something else to measure
    #[command(subcommand)]
    pub command: Option<BenchCommand>,

    #[command(flatten)]
    pub model: ModelArgs,

    /// Measure no model, only what the device can do at most: copies, dispatches, submissions, matrix products; with MODEL,
    /// also say what that allows it
    #[arg(long, conflicts_with_all = ["mtp", "repeat", "seed"])]
    pub floor: bool,

    /// Parts to measure [default: all]
    #[arg(long, value_name = "PART,…", value_delimiter = ',', value_enum)]
    pub only: Vec<BenchPart>,

    /// Tokens of a prompt, for prefill, and of the beginning that the prefix cache has [default: 128,512; 64,256 on a software driver]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = value_parser!(u32).range(1..))]
    pub prompt_tokens: Vec<u32>,

    /// Sequences at once [default: 1,4,16; 1,4 on a software driver]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = value_parser!(u32).range(1..))]
    pub batch: Vec<u32>,

    /// Tokens that each sequence decodes; four times as many where drafts are measured
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = value_parser!(u32).range(1..))]
    pub decode_tokens: u32,

    /// Tokens in the cache of each sequence when decoding begins [default: 0,1024; 0,256 on a software driver]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub context: Vec<u32>,

    /// Ways to draft with the model's modules of multi-token prediction, to be compared: off, auto or 1 to 7 tokens
    /// [default: off,1,auto if it has such modules]
    #[arg(long, value_name = "MODE,…", value_delimiter = ',', value_parser = engine::mtp, allow_negative_numbers = true)]
    pub mtp: Vec<Mtp>,

    /// Measured runs of each line
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = value_parser!(u32).range(1..=1000))]
    pub repeat: u32,

    /// Seed of the random tokens and of what is drawn
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
