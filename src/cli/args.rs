//! The command line, as clap parses it.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use moewe_plan::TapChoice;

mod engine;
mod eval;
mod load;
mod quantize;
mod serve;
mod tune;
mod usage;
mod watch;

pub use engine::EngineArgs;
pub use eval::{BenchArgs, BenchCommand, BenchPart, EvalArgs, EvalCommand, KlArgs, PerplexityArgs, TextArgs};
pub use load::LoadArgs;
pub use quantize::QuantizeArgs;
pub use serve::{LogArgs, ServeArgs};
pub use tune::TuneArgs;
pub use usage::{ByArg, UsageArgs};
use watch::taps;
pub use watch::{EditArgs, PaletteArg, PlaceArgs, ThemeArg, ViewArgs, WatchArgs};

/// Compile, run and look into mixture-of-experts models on any Vulkan GPU.
#[derive(Debug, Parser)]
#[command(
    name = "moewe",
    version,
    about,
    long_about = "moewe compiles DeepSeek-family checkpoints (mixture of experts, multi-head latent attention, FP8 block \
        scales) into WGSL kernels and runs them through Vulkan, without CUDA and without Python.",
    after_help = "Examples:\n  \
        moewe run models/demo \"The king said to\" --temperature 0.7\n  \
        moewe chat models/demo\n  \
        moewe serve models/demo\n  \
        moewe compile models/demo -o demo.moewe && moewe explain demo.moewe\n  \
        moewe quantize models/demo --bits 4 -o demo-int4.moewe\n  \
        moewe inspect config.json --gpu h200 --price-per-gpu-hour 3\n  \
        moewe doctor",
    max_term_width = 100
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a prompt
    Run(RunArgs),
    /// Talk with a model in the terminal
    Chat(ChatArgs),
    /// Serve a model over HTTP, to clients of OpenAI's and DeepSeek's APIs
    Serve(Box<ServeArgs>),
    /// Watch experts and latents: of a running model in a window, or in a recording
    View(Box<ViewArgs>),
    /// Run one forward pass and write every tensor on the way to a file
    Trace(TraceArgs),
    /// Compile a checkpoint into a bundle of kernels, plan and weights
    Compile(CompileArgs),
    /// Compile a checkpoint with weights of 8 or 4 bits, and measure what that changes
    Quantize(QuantizeArgs),
    /// Count parameters, cache and cost of a model, without a GPU
    Inspect(InspectArgs),
    /// Show the kernels of a bundle: which, why, and what they move and compute
    Explain(ExplainArgs),
    /// Measure how well a model predicts a text, or how two models differ
    Eval(EvalArgs),
    /// Measure speed, beside what the device allows
    Bench(BenchArgs),
    /// Show what requests to a server used and cost
    Usage(UsageArgs),
    /// Show Vulkan devices, their limits and speed, and what moewe would choose
    Doctor(DoctorArgs),
    /// Find the fastest kernels for a model on this device, and write a profile for compile
    Tune(TuneArgs),
    /// Write a checkpoint with random weights, for benchmarks and tests
    Synth(SynthArgs),
}

/// How activations and latents are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// Everything in f32
    #[default]
    Exact,
    /// The latent cache in the format that the bundle was compiled with (f16 unless told otherwise), the rest in f32
    Fast,
}

impl From<PrecisionArg> for moewe_plan::Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Exact => Self::Exact,
            PrecisionArg::Fast => Self::Fast,
        }
    }
}

/// One of the ids of `--tokens`.
fn token_id(text: &str) -> Result<u32, &'static str> {
    text.trim().parse().map_err(|_| "expected token ids, separated by commas, such as 1,2,3")
}

/// Which model on which device.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// Checkpoint directory (config.json, *.safetensors) or compiled bundle
    #[arg(value_name = "MODEL", required_unless_present = "device")]
    model: Option<PathBuf>,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Device profile to compile a checkpoint for: generic-vulkan, hopper, lavapipe, webgpu or a file [default: by device]
    #[arg(long, value_name = "PROFILE", help_heading = "Device")]
    pub target: Option<String>,

    /// How activations and latents are kept
    #[arg(long, value_enum, default_value_t, help_heading = "Device")]
    pub precision: PrecisionArg,

    /// Most prompt tokens in one pass [default: as many as fit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Device")]
    pub prefill_chunk: Option<u32>,
}

impl DeviceArgs {
    /// Whether the devices are only to be listed.
    pub fn is_list(&self) -> bool {
        self.device.as_deref() == Some("list")
    }
}

impl ModelArgs {
    /// MODEL, or nothing if it was left out, as `--device list` allows.
    pub fn path(&self) -> &Path {
        self.model.as_deref().unwrap_or(Path::new(""))
    }
}

/// Which device.
#[derive(Args, Debug)]
pub struct DeviceArgs {
    /// Vulkan device by index or part of its name; `list` shows them [default: the fastest kind]
    #[arg(long, value_name = "DEVICE", help_heading = "Device")]
    pub device: Option<String>,
}

/// How tokens are drawn.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Most tokens to generate [default: the model's, else 256]
    #[arg(
        long, short = 'n', value_name = "N", allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub max_new_tokens: Option<u32>,
    /// Divide logits by this; 0 always takes the most likely token [default: the model's, else 0]
    #[arg(long, short, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep only the K most likely tokens; 0 keeps all [default: the model's, else 0]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<u32>,
    /// Keep the most likely tokens up to this probability [default: the model's, else 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one [default: the model's, else 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Make tokens that occurred less likely; 1 changes nothing [default: the model's, else 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Seed of the draws: the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Go on past end-of-sequence tokens
    #[arg(long)]
    pub ignore_eos: bool,
}

/// `moewe run`.
#[derive(Args, Debug)]
#[command(after_help = "Without PROMPT, --prompt and --tokens the prompt is read from standard input. \
    A checkpoint is compiled once, into the user's cache directory (or $MOEWE_CACHE).\n\n\
    Examples:\n  \
    moewe run models/demo \"The king said to\" -n 40 --seed 7\n  \
    moewe run models/demo --prompt bible=\"The king\" --prompt json='{\"name\":' --heatmap\n  \
    moewe run models/demo --tokens 0,51,82 --temperature 0 --json\n  \
    moewe run models/demo \"The king said to\" --record king.moewe-rec && moewe view king.moewe-rec\n  \
    moewe run models/demo \"The king said to\" --mute 3:17 --force 2:8\n  \
    moewe run models/demo --batch questions.jsonl --out answers.jsonl\n\n\
    A line of a batch file is an object with one of \"prompt\" (text), \"tokens\" (ids) and \"messages\" (chat), and \
    optionally \"id\", \"max_new_tokens\", \"temperature\", \"top_k\", \"top_p\", \"min_p\", \"repetition_penalty\", \
    \"seed\", \"stop_token_ids\", \"ignore_eos\" and \"priority\" (higher ones first); what a line does not say is as on the \
    command line. Results come in the order in which they are done. Called again with the same files, a batch that was \
    stopped goes on.")]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Text to continue
    #[arg(conflicts_with_all = ["tokens", "prompts", "batch"])]
    pub prompt: Option<String>,

    /// Token ids to continue, separated by commas
    #[arg(
        long, value_name = "IDS", value_delimiter = ',', num_args = 1, value_parser = token_id,
        allow_hyphen_values = true, conflicts_with_all = ["prompts", "batch"]
    )]
    pub tokens: Option<Vec<u32>>,

    /// Named text to continue; may be given several times
    #[arg(long = "prompt", value_name = "NAME=TEXT", conflicts_with = "batch")]
    pub prompts: Vec<String>,

    /// Requests to serve, one JSON object in each line
    #[arg(long, value_name = "FILE")]
    pub batch: Option<PathBuf>,

    /// Where the results of --batch go, one JSON object in each line [default: FILE with .results.jsonl]
    #[arg(long, value_name = "RESULTS")]
    pub out: Option<PathBuf>,

    /// Show which experts each prompt and its continuation used
    #[arg(long, conflicts_with = "batch")]
    pub heatmap: bool,

    /// Print one JSON object instead of text
    #[arg(long, conflicts_with = "heatmap")]
    pub json: bool,

    #[command(flatten)]
    pub engine: EngineArgs,

    #[command(flatten)]
    pub watch: WatchArgs,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `moewe chat`.
#[derive(Args, Debug)]
#[command(after_help = "Type a message and Enter. /clear forgets the conversation, /quit or Ctrl-D ends it. \
    Ctrl-C stops an answer; where none is being written, it ends the conversation, too.")]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// System prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    #[command(flatten)]
    pub engine: EngineArgs,

    #[command(flatten)]
    pub watch: WatchArgs,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `moewe trace`.
#[derive(Args, Debug)]
#[command(after_help = "Example: what the router of layer 3 decided for each token of a text:\n  \
    moewe trace models/demo \"The king said to\" --taps moe.3 --out trace.safetensors")]
pub struct TraceArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Text to run, instead of --tokens
    #[arg(conflicts_with = "tokens")]
    pub prompt: Option<String>,

    /// Token ids to run, separated by commas
    #[arg(
        long, value_name = "IDS", value_delimiter = ',', num_args = 1, value_parser = token_id,
        allow_hyphen_values = true
    )]
    pub tokens: Option<Vec<u32>>,

    /// File to write, safetensors (f32 and i32)
    #[arg(long, short, value_name = "FILE", required_unless_present = "device")]
    pub out: Option<PathBuf>,

    /// Tensors to write: names or their beginnings, such as logits,hidden,moe.3,mla,mtp [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub taps: Vec<String>,

    /// Print what was written as JSON
    #[arg(long)]
    pub json: bool,
}

/// Formats that weights can be converted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum WeightsArg {
    /// As stored
    #[default]
    Keep,
    /// 32-bit floats
    F32,
    /// bfloat16
    Bf16,
    /// 16-bit floats
    F16,
    /// 8 bits and a scale for each 32 numbers of a row
    Int8,
    /// 4 bits and a scale for each 32 numbers of a row; embedding, head, what makes and reads latents and the entry of MTP modules as int8
    Int4,
}

/// Formats of the latent cache for `--precision fast`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LatentsArg {
    /// 16-bit floats
    #[default]
    F16,
    /// FP8 with a scale for each 128 numbers
    Fp8,
    /// Six bits with a scale for each 32 numbers
    Q6,
}

impl From<LatentsArg> for moewe_plan::Latent {
    fn from(latents: LatentsArg) -> Self {
        match latents {
            LatentsArg::F16 => Self::F16,
            LatentsArg::Fp8 => Self::Fp8,
            LatentsArg::Q6 => Self::Q6,
        }
    }
}

/// `moewe compile`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    moewe compile models/demo -o demo.moewe --target lavapipe\n  \
    moewe compile DeepSeek-V3/config.json -o v3.moewe --target hopper --plan-only")]
pub struct CompileArgs {
    /// Checkpoint directory, or a config.json with --plan-only
    #[arg(value_name = "CHECKPOINT")]
    pub checkpoint: PathBuf,

    /// Directory to write
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,

    /// Device profile: generic-vulkan, hopper, lavapipe, webgpu or a file
    #[arg(long, value_name = "PROFILE", default_value = "generic-vulkan")]
    pub target: String,

    /// Format of linears and embeddings
    #[arg(long, value_enum, default_value_t)]
    pub weights: WeightsArg,

    /// Format of the latent cache with --precision fast
    #[arg(long, value_enum, default_value_t)]
    pub latents: LatentsArg,

    /// Refer to the checkpoint's files instead of copying weights that need no repacking
    #[arg(long)]
    pub reference_weights: bool,

    /// What can be watched: routing, scores, latents, hidden, attention, logits, lens, mtp, each also for one layer as in
    /// latents:3; all, or none. Generation itself does not become slower
    #[arg(long, value_name = "GROUPS", default_value = "all", value_parser = taps)]
    pub taps: TapChoice,

    /// Make plan and kernels without weights (to read and explain, not to run)
    #[arg(long)]
    pub plan_only: bool,

    /// Print what was written as JSON
    #[arg(long)]
    pub json: bool,
}

/// `moewe inspect`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
    moewe inspect DeepSeek-V3/config.json --gpu h200 --price-per-gpu-hour 3")]
pub struct InspectArgs {
    /// Checkpoint directory, bundle or config.json
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,

    /// Whether and how fast the model would run on this GPU: h100, h200, h800, h20, …
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,

    /// Dollars for a GPU and hour: adds the price of a million tokens
    #[arg(long, value_name = "P", requires = "gpu", allow_negative_numbers = true)]
    pub price_per_gpu_hour: Option<f64>,

    /// Tokens of context that each sequence holds, for --gpu [default: 4096, at most the model's]
    #[arg(long, value_name = "N", requires = "gpu", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,

    /// Show instead what a pass reads and computes by part of the model, and which of the two bounds it on --gpu: decode of 1,
    /// 8 and 64 sequences, prompts of 512 and 4096 tokens
    #[arg(long, requires = "gpu", conflicts_with = "price_per_gpu_hour")]
    pub parts: bool,

    /// Bits of a number in the latent cache
    #[arg(long, value_name = "BITS", default_value_t = 16.0, allow_negative_numbers = true)]
    pub cache_bits: f64,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `moewe explain`.
#[derive(Args, Debug)]
pub struct ExplainArgs {
    /// Compiled bundle
    #[arg(value_name = "BUNDLE")]
    pub bundle: PathBuf,

    /// Tokens in the batch whose cost is shown
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,

    /// Tokens of context behind each of them
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub context: u32,

    /// How activations and latents are kept
    #[arg(long, value_enum, default_value_t)]
    pub precision: PrecisionArg,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `moewe doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `moewe synth`.
#[derive(Args, Debug)]
#[command(
    after_help = "Example: three layers of DeepSeek-V3's real head, latent, expert and group shape, small otherwise:\n  \
    moewe synth --like v3 --scale layers=3,hidden=256,vocab=1024 --out v3-small"
)]
pub struct SynthArgs {
    /// Shape: v2-lite, v2, v3, kimi-k2 or a config.json
    #[arg(long, value_name = "NAME|CONFIG")]
    pub like: String,

    /// Fields of config.json to change, such as layers=3,hidden=256 (also: any field by its own name)
    #[arg(long, value_name = "KEY=VALUE,…", value_delimiter = ',')]
    pub scale: Vec<String>,

    /// Storage of weights: fp8, bf16 or f32 [default: as the shape's config says]
    #[arg(long, value_name = "FORMAT")]
    pub dtype: Option<String>,

    /// Seed of the random weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Directory to write
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,

    /// Print what was written as JSON
    #[arg(long)]
    pub json: bool,
}
