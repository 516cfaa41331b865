//! The types of a plan, as they stand in `plan.json`.

use serde::{Deserialize, Serialize};

use crate::{Dim, Latent};

/// A compiled model. Everything refers to everything else by index into these lists.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`crate::FORMAT_VERSION`].
    pub format_version: u32,
    /// Program and version that wrote this.
    pub generator: String,
    /// What a person or a server wants to know of the model.
    pub model: ModelInfo,
    /// What is wrong with the weights, in sentences; empty if nothing is.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Format of the latent cache in programs of [`Precision::Fast`]; those of [`Precision::Exact`] keep f32.
    pub fast_latents: Latent,
    /// What the device must offer.
    pub requirements: Requirements,
    /// Files that hold weights.
    pub files: Vec<WeightFile>,
    /// Tensors that stay on the device.
    pub weights: Vec<Weight>,
    /// Buffers that kernels read and write.
    pub buffers: Vec<Buffer>,
    /// Kernels, each one WGSL file.
    pub kernels: Vec<Kernel>,
    /// What can be changed about a watched run.
    pub parameters: Vec<Parameter>,
    /// Ordered lists of dispatches.
    pub programs: Vec<Program>,
}

/// Facts of the model that do not depend on how it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// As the checkpoint's config says, for example `DeepseekV3ForCausalLM`.
    pub architecture: String,
    /// Hash of the checkpoint's config and weights.
    pub checkpoint: String,
    /// Size of the vocabulary.
    pub vocab_size: u32,
    /// Longest context, in tokens.
    pub max_context: u32,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Decoder layers, without the modules of multi-token prediction.
    pub layers: u32,
    /// The layers among them that are mixtures of experts, in order (modules of multi-token prediction left out).
    pub moe_layers: Vec<u32>,
    /// Routed experts of a mixture-of-experts layer; 0 if there are none.
    pub experts: u32,
    /// `num_experts_per_tok`: routed experts that a token is given.
    pub num_experts_per_tok: u32,
    /// `n_group`: groups of consecutive experts; 1 if the router knows no groups.
    pub n_group: u32,
    /// `topk_group`: groups that a token may choose from.
    pub topk_group: u32,
    /// `n_shared_experts`: experts that every token uses beside the routed ones.
    pub n_shared_experts: u32,
    /// `hidden_size`.
    pub hidden_size: u32,
    /// `num_attention_heads`.
    pub num_attention_heads: u32,
    /// `kv_lora_rank`: numbers of a compressed latent.
    pub kv_lora_rank: u32,
    /// `qk_rope_head_dim`: numbers of the rotated key that all heads share.
    pub qk_rope_head_dim: u32,
    /// `qk_nope_head_dim`: numbers of a head's key that are not rotated.
    pub qk_nope_head_dim: u32,
    /// `v_head_dim`: numbers of a head's value.
    pub v_head_dim: u32,
    /// Factor of attention scores before the softmax (spec §4).
    pub softmax_scale: f32,
    /// Modules of multi-token prediction.
    pub mtp_modules: u32,
}

/// What a device must offer to run the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirements {
    /// Name of the profile that the plan was compiled for.
    pub profile: String,
    /// The device that the profile's choices were measured on, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned_on: Option<TunedOn>,
    /// No binding of weights is larger than this, in bytes; buffers are sized by the runtime to fit it too, save the ring of
    /// log probabilities, which has 336 KiB.
    pub max_binding_bytes: u64,
    /// Storage buffers that the largest kernel binds.
    pub storage_buffers: u32,
    /// Invocations in the largest workgroup.
    pub workgroup_invocations: u32,
    /// Bytes of workgroup memory of the hungriest kernel.
    pub workgroup_bytes: u32,
    /// Invocations that every subgroup must have at least; 0 if kernels use no subgroup operations.
    pub subgroup_invocations: u32,
    /// Rows and columns of the cooperative matrices (f16 with sums in f32) that programs of [`Precision::Fast`] multiply by, on a
    /// device whose subgroups all have `subgroup_invocations`: 8 or 16; 0 if none do.
    pub cooperative: u32,
}

/// A device that kernels were chosen for by measurement. Others run them, too, but may not be as fast.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunedOn {
    /// The device's name, as its driver gives it.
    pub device: String,
    /// Name of the driver.
    pub driver: String,
    /// Version of the driver.
    pub driver_info: String,
}

/// A safetensors file with weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightFile {
    /// File name in the bundle, or the absolute path of a file of the checkpoint that is referenced.
    pub path: String,
    /// Whether `path` is such a reference.
    pub referenced: bool,
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the contents, in hexadecimal.
    pub blake3: String,
}

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// 32-bit IEEE 754.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE 754.
    F16,
    /// FP8 e4m3fn; a second weight holds the scales of its blocks.
    Fp8,
    /// Signed bytes; a second weight holds the scales (f16) of their groups ([`SCALE_GROUP`]).
    Int8,
    /// Whole numbers from −8 to 7, stored plus 8 in four bits, the first of a row in the lowest bits; a second weight holds
    /// the scales (f16) of their groups ([`SCALE_GROUP`]).
    Int4,
}

/// Consecutive numbers of a row that share a scale where [`WeightFormat::is_grouped`]. Such rows divide into groups.
pub const SCALE_GROUP: u64 = 32;

impl WeightFormat {
    /// Bits of one number, scales left out.
    pub fn bits(self) -> u64 {
        match self {
            WeightFormat::F32 => 32,
            WeightFormat::Bf16 | WeightFormat::F16 => 16,
            WeightFormat::Fp8 | WeightFormat::Int8 => 8,
            WeightFormat::Int4 => 4,
        }
    }

    /// Whether groups of [`SCALE_GROUP`] numbers share a scale.
    pub fn is_grouped(self) -> bool {
        matches!(self, WeightFormat::Int8 | WeightFormat::Int4)
    }

    /// The name used in file names, labels and options.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::F16 => "f16",
            WeightFormat::Fp8 => "fp8",
            WeightFormat::Int8 => "int8",
            WeightFormat::Int4 => "int4",
        }
    }
}

/// A tensor on the device, row-major. Rows are padded with zeros to a multiple of four numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weight {
    /// The name in the checkpoint; stacked experts carry `*` for the expert's number.
    pub name: String,
    /// How numbers are stored.
    pub format: WeightFormat,
    /// Rows and columns, behind the number of experts if stacked. Columns are without padding.
    pub shape: Vec<u64>,
    /// Consecutive pieces along the first dimension, each one device buffer.
    pub shards: Vec<Shard>,
}

impl Weight {
    /// Bytes of one slice along the first dimension, padding included.
    pub fn slice_bytes(&self) -> Option<u64> {
        let (columns, outer) = self.shape.split_last()?;
        let padded = columns.checked_next_multiple_of(4)?.checked_mul(self.format.bits())? / 8;
        outer.iter().skip(1).try_fold(padded, |bytes, &dim| bytes.checked_mul(dim))
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().flat_map(|shard| &shard.segments).map(|segment| segment.bytes).sum()
    }
}

/// A piece of a weight that one binding covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// First row (or expert, if stacked).
    pub first: u64,
    /// Rows (or experts).
    pub count: u64,
    /// Its bytes, in order.
    pub segments: Vec<Segment>,
}

/// A range of bytes in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Index into [`Plan::files`].
    pub file: u32,
    /// Offset from the start of the file.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

/// Type of the numbers in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 32-bit unsigned integer (or packed pairs of f16).
    U32,
}

/// What a buffer is to the runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Holds values of one program run.
    Scratch,
    /// Holds values that a later program reads.
    State,
    /// Uniform with [`crate::Header`].
    Header,
    /// [`crate::TokenInfo`] for each token.
    Tokens,
    /// For each wanted row of logits, the index of its token.
    Rows,
    /// Page numbers `[sequences, ⌈max_context / 64⌉]`.
    PageTable,
    /// [`crate::Sampling`] for each sequence.
    Sampling,
    /// A bit for each token id that the sequence has seen `[sequences, ⌈vocab / 32⌉]`.
    Seen,
    /// A bit for each token id that may be drawn `[sequences, ⌈vocab / 32⌉]`, where [`crate::MASKED`] is set.
    Mask,
    /// What is added to logits `[sequences, vocab]`, where [`crate::BIASED`] is set.
    Bias,
    /// Word 0 counts finished steps; then `[FINISHED_STEPS, rows]` token ids, [`crate::REJECTED`] or [`crate::POISONED`].
    Finished,
    /// `[FINISHED_STEPS, rows, LOGPROB_WORDS]`: log probabilities of the passes in `Finished` that had them
    /// ([`crate::LOGPROB_WORDS`]).
    Logprobs,
    /// [`crate::Group`] for each sequence of the batch.
    Groups,
    /// `[rows, DRAFT_WORDS]`: for each group what was drafted behind it ([`crate::DRAFT_WORDS`]).
    Drafts,
    /// For each sequence two positions: modules of multi-token prediction have no latents from the first one up to, and
    /// without, the second one.
    Holes,
    /// A layer's latent cache, `[pages, 64, numbers]`.
    Cache,
    /// Numbers that the host may change between runs: a [`Parameter`].
    Parameter,
}

/// A buffer of the device. All elements have 4 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Name, unique in the plan.
    pub name: String,
    /// What its numbers are.
    pub dtype: DType,
    /// Number of elements, to be sized for the largest batch.
    pub elements: Dim,
    /// What the runtime uses it for.
    pub role: Role,
}

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Uniform buffer.
    Uniform,
    /// Storage buffer, read.
    Read,
    /// Storage buffer, read and written.
    ReadWrite,
}

/// One `@group(0) @binding(n)` of a kernel; n is its index in [`Kernel::bindings`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingLayout {
    /// Name of the variable.
    pub name: String,
    /// How it is used.
    pub access: Access,
}

/// A compute pipeline, entry point `main`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// The variant: name of the file without ending, label in logs.
    pub name: String,
    /// File in the bundle, for example `kernels/linear.bf16.wgsl`.
    pub file: String,
    /// Invocations of a workgroup.
    pub workgroup_size: [u32; 3],
    /// Bindings, in order.
    pub bindings: Vec<BindingLayout>,
    /// Why this variant was chosen.
    pub why: String,
}

/// Something bound to a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Binding {
    /// A piece of a weight.
    Weight {
        /// Index into [`Plan::weights`].
        weight: u32,
        /// Index into [`Weight::shards`].
        shard: u32,
    },
    /// Index into [`Plan::buffers`].
    Buffer(u32),
    /// The step's own [`Step::params`], as a uniform of four words.
    Params,
}

/// Bytes and operations of a step: `fixed + tokens · token + tokens · context · …`, where tokens are
/// logits rows if the grid counts rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Bytes moved once for each dispatch (weights).
    pub fixed_bytes: u64,
    /// Bytes moved for each token (activations, the chosen experts' weights).
    pub token_bytes: u64,
    /// Floating-point operations for each token.
    pub token_flops: u64,
    /// Bytes moved for each token and each position of its context.
    pub context_bytes: u64,
    /// Floating-point operations for each token and each position of its context.
    pub context_flops: u64,
}

/// One dispatch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Where in the model it belongs, for example `layers.3.router`.
    pub label: String,
    /// The layer, if it belongs to one.
    pub layer: Option<u32>,
    /// Index into [`Plan::kernels`].
    pub kernel: u32,
    /// What is bound, in the order of the kernel's bindings.
    pub bindings: Vec<Binding>,
    /// Workgroups, or the most that there can be.
    pub grid: [Dim; 3],
    /// Where their real number stands, if a step before this one found it out on the device.
    pub indirect: Option<Indirect>,
    /// Values of the `step` uniform, if the kernel has one.
    pub params: [u32; 4],
    /// What it costs.
    pub cost: Cost,
    /// The taps (indices into [`Program::taps`]) that it serves, if it serves nothing else: it is left out where none
    /// of them is read. Empty for a step that always runs.
    pub only_for: Vec<u32>,
    /// In which passes it runs.
    pub when: When,
}

/// Three words of a buffer that say how many workgroups to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Indirect {
    /// Index into [`Plan::buffers`].
    pub buffer: u32,
    /// The first of the words.
    pub word: u64,
}

/// In which passes a step runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// In all.
    #[default]
    Always,
    /// It serves drafting alone: it is left out where nothing is drafted.
    Drafting,
    /// It writes log probabilities: it is left out where nobody asks for them.
    Logprobs,
}

impl When {
    /// Whether such steps run in a pass behind which something is drafted, or whose log probabilities are wanted.
    pub fn holds(self, drafting: bool, logprobs: bool) -> bool {
        match self {
            When::Always => true,
            When::Drafting => drafting,
            When::Logprobs => logprobs,
        }
    }
}

/// How activations and latents are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Activations and latents in f32.
    Exact,
    /// Activations in f32, latents in [`Plan::fast_latents`].
    Fast,
}

impl Precision {
    /// The name used in options and file names.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Exact => "exact",
            Precision::Fast => "fast",
        }
    }
}

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgramKind {
    /// A pass that ends with sampled tokens, fed back as the next batch.
    Forward,
    /// The same with taps that can be read, and with the plan's parameters. It computes what `Forward` computes as long
    /// as no parameter is changed.
    Watch,
    /// A pass that ends with logits and keeps all taps.
    Trace,
    /// A pass of one module of multi-token prediction, with taps. It reads the hidden rows that the trace of the
    /// main model (module 1) or of the module before left for the same tokens.
    Draft {
        /// Module, from 1.
        module: u32,
    },
}

/// An ordered list of dispatches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// What it is for.
    pub kind: ProgramKind,
    /// How it keeps latents.
    pub precision: Precision,
    /// Most tokens in a batch.
    pub max_tokens: u32,
    /// Most rows of logits.
    pub max_rows: u32,
    /// Dispatches, in order.
    pub steps: Vec<Step>,
    /// Tensors that can be read when it has run.
    pub taps: Vec<TapSpec>,
}

/// A tensor that can be read after a program has run: for each row, `columns` numbers from `offset` of a row of
/// `stride` numbers in a buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapSpec {
    /// Name, for example `moe.3.weights`.
    pub name: String,
    /// What it belongs to.
    pub group: TapGroup,
    /// The layer, if it belongs to one.
    pub layer: Option<u32>,
    /// Index into [`Plan::buffers`].
    pub buffer: u32,
    /// Rows: tokens or logits rows of the batch. A program may have a tap of each kind under one name: where all tokens
    /// are logits rows in their order, both hold the same, and the second is cheaper; elsewhere only the first counts.
    pub rows: Dim,
    /// Numbers from one row to the next.
    pub stride: u32,
    /// First number of the row.
    pub offset: u32,
    /// Numbers of a row.
    pub columns: u32,
}

/// What a tap shows. Users choose taps by group and layer ([`crate::TapChoice`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TapGroup {
    /// Chosen experts and their weights: `moe.{l}.ids` and `moe.{l}.weights`, both `[T, num_experts_per_tok]`, the best
    /// expert first.
    Routing,
    /// What the router made of every expert, before score function and bias: `moe.{l}.router_logits [T, experts]`.
    Scores,
    /// What the cache holds of a token: `mla.{l}.c_kv [T, kv_lora_rank]` and `mla.{l}.k_rope [T, qk_rope_head_dim]`.
    Latents,
    /// Hidden states: `hidden.0` behind the embedding, `hidden.{l+1}` behind layer l, `final_norm`, in drafts
    /// `mtp.{j}.hidden`; each `[T, hidden_size]`.
    Hidden,
    /// Queries absorbed into latent space: `mla.{l}.query [T, heads, kv_lora_rank + qk_rope_head_dim]`. Scores are
    /// their products with the latents, times `softmax_scale` (spec §5).
    Attention,
    /// The model's prediction at each token: `logits.ids`, `logits.probs` `[T, TOP_TOKENS]` and `logits.stats [T, 3]`:
    /// entropy in nats, log probability and rank (from 0) of the token that follows. They are there twice, for tokens and
    /// for wanted rows: see [`TapSpec::rows`]. In traces all of `logits`, in drafts all of `mtp.{j}.logits`.
    Logits,
    /// The same from each layer's hidden state through the final norm and the head (the logit lens): `lens.{l}.ids`,
    /// `.probs`, and `.stats`, where the token asked for is the model's final prediction.
    Lens,
    /// Drafts of modules of multi-token prediction: `mtp.{j}.ids`, `.probs` `[T, TOP_TOKENS]`.
    Mtp,
}

impl TapGroup {
    /// All groups, in the order in which they are listed.
    pub const ALL: [TapGroup; 8] = [
        TapGroup::Routing,
        TapGroup::Scores,
        TapGroup::Latents,
        TapGroup::Hidden,
        TapGroup::Attention,
        TapGroup::Logits,
        TapGroup::Lens,
        TapGroup::Mtp,
    ];

    /// The name used in options and files.
    pub fn name(self) -> &'static str {
        match self {
            TapGroup::Routing => "routing",
            TapGroup::Scores => "scores",
            TapGroup::Latents => "latents",
            TapGroup::Hidden => "hidden",
            TapGroup::Attention => "attention",
            TapGroup::Logits => "logits",
            TapGroup::Lens => "lens",
            TapGroup::Mtp => "mtp",
        }
    }
}

/// Likeliest tokens that the taps of [`TapGroup::Logits`], [`TapGroup::Lens`] and [`TapGroup::Mtp`] tell (fewer if the
/// vocabulary is smaller).
pub const TOP_TOKENS: u32 = 8;

/// Numbers that `Watch` programs read and the host may change between runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parameter {
    /// What it changes.
    pub kind: ParameterKind,
    /// The layer whose computation it changes.
    pub layer: u32,
    /// Index into [`Plan::buffers`]; the buffer has [`Role::Parameter`].
    pub buffer: u32,
    /// How many numbers (f32).
    pub len: u32,
}

/// What a [`Parameter`] changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParameterKind {
    /// `[experts]`, added to the selection score of each expert (spec §6: u = s + bias). [`crate::MUTED`] takes the expert out before
    /// groups are ranked; [`crate::FORCED`] chooses it whatever its group. Weights still come from the scores alone.
    ExpertOffset,
    /// `[experts]`, multiplies the weight of each expert after normalisation and scaling.
    ExpertScale,
    /// `[kv_lora_rank]`, multiplies each number of the latent c_kv before it is cached.
    LatentScale,
    /// `[heads]`, multiplies what each head gives to `o_proj`.
    HeadScale,
}

impl ParameterKind {
    /// The value that changes nothing.
    pub fn neutral(self) -> f32 {
        match self {
            ParameterKind::ExpertOffset => 0.0,
            ParameterKind::ExpertScale | ParameterKind::LatentScale | ParameterKind::HeadScale => 1.0,
        }
    }
}
