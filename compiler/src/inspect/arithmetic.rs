//! What a pass of a model reads and computes by part, and which of the two takes longer.

use std::collections::BTreeMap;

use serde::Serialize;

use super::gpu::distinct_experts;
use super::{CacheShape, Gpu, tensor_bytes};
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::tensors::{self, Part, Role};

/// Parts of a pass, in the order in which a token meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// One row of the embedding for each token.
    Embedding,
    /// Query, latent and output projections, and those that absorb keys and values, with their norms.
    MlaProjections,
    /// Attention over latents: scores and weighted sums, and the latents themselves.
    LatentCache,
    /// Dense feed-forward layers.
    DenseFfn,
    /// Routers.
    Router,
    /// Shared experts.
    SharedExperts,
    /// Routed experts.
    RoutedExperts,
    /// Output head and the norms between parts.
    Head,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Embedding,
        Self::MlaProjections,
        Self::LatentCache,
        Self::DenseFfn,
        Self::Router,
        Self::SharedExperts,
        Self::RoutedExperts,
        Self::Head,
    ];

    /// The name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::MlaProjections => "MLA projections",
            Self::LatentCache => "latent cache",
            Self::DenseFfn => "dense FFN",
            Self::Router => "router",
            Self::SharedExperts => "shared experts",
            Self::RoutedExperts => "routed experts",
            Self::Head => "head, norms",
        }
    }

    fn of(part: Part) -> Self {
        match part {
            Part::Embedding => Self::Embedding,
            Part::Attention => Self::MlaProjections,
            Part::DenseFfn => Self::DenseFfn,
            Part::Router => Self::Router,
            Part::SharedExperts => Self::SharedExperts,
            Part::RoutedExperts => Self::RoutedExperts,
            Part::Head | Part::Norms | Part::MtpProjection => Self::Head,
        }
    }
}

/// The tokens of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pass {
    /// Tokens that are run.
    pub tokens: u64,
    /// Rows whose logits are wanted.
    pub rows: u64,
    /// Latents that are read, of each layer.
    pub cached: u64,
    /// Latents that each token attends to, over all tokens.
    pub attended: u64,
}

impl Pass {
    /// One token for each of `batch` sequences behind `context` others.
    pub fn decode(batch: u64, context: u64) -> Self {
        let attended = batch * (context + 1);
        Self { tokens: batch, rows: batch, cached: attended, attended }
    }

    /// A whole prompt, whose latents are read once.
    pub fn prefill(tokens: u64) -> Self {
        Self { tokens, rows: 1, cached: tokens, attended: tokens * (tokens + 1) / 2 }
    }
}

/// What takes longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Reading and writing.
    Bytes,
    /// Computing.
    Flops,
}

/// What a part moves and computes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Amount {
    /// Bytes read and written, activations left out.
    pub bytes: f64,
    /// Operations, a multiplication and an addition counted as two.
    pub flops: f64,
    /// The longer of bytes over bandwidth and operations over their rate.
    pub seconds: f64,
    /// Which one that is.
    pub bound: Bound,
}

impl Amount {
    fn new(bytes: f64, flops: f64, gpu: &Gpu) -> Self {
        let (moving, computing) = (bytes / gpu.bandwidth, flops / gpu.flops);
        let bound = if moving >= computing { Bound::Bytes } else { Bound::Flops };
        Self { bytes, flops, seconds: moving.max(computing), bound }
    }
}

/// A pass by part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PassCost {
    /// Its tokens.
    pub pass: Pass,
    /// Expected distinct experts of a layer that its tokens choose.
    pub distinct_experts: f64,
    /// Parts that the model has, in their order.
    pub parts: Vec<(Stage, Amount)>,
    /// All together, as if parts overlapped.
    pub total: Amount,
}

/// Counts passes on a GPU. Bytes of weights are those stored, or without weights those that the configuration implies;
/// a number of the latent cache has `cache_bits` bits.
///
/// Each pass reads a weight once, of the routed experts those that its tokens choose, if they choose evenly and
/// independently. Attention is absorbed: it works on latents, as moewe does it in prefill, too.
pub fn arithmetic(
    config: &Config,
    checkpoint: Option<&Checkpoint>,
    cache_bits: f64,
    gpu: &Gpu,
    passes: &[Pass],
) -> Vec<PassCost> {
    let checkpoint = checkpoint.filter(|checkpoint| checkpoint.has_weights());
    // Bytes, and numbers that a row is multiplied with.
    let mut weights: BTreeMap<Stage, (u64, u64)> = BTreeMap::new();
    let mut add = |stage, bytes, elements| {
        let sum = weights.entry(stage).or_default();
        *sum = (sum.0 + bytes, sum.1 + elements);
    };
    let main = tensors::expected(config).into_iter().filter(|t| t.layer.is_none_or(|l| l < config.num_hidden_layers));
    for tensor in main {
        let bytes = tensor_bytes(config, checkpoint, &tensor);
        let elements = if tensor.role == Role::Vector { 0 } else { tensor.elements() };
        add(Stage::of(tensor.part), bytes, elements);
        if tensor.part == Part::Embedding && config.tie_word_embeddings {
            add(Stage::Head, bytes, elements);
        }
    }
    passes.iter().map(|&pass| cost(config, &weights, cache_bits, gpu, pass)).collect()
}

fn cost(config: &Config, weights: &BTreeMap<Stage, (u64, u64)>, cache_bits: f64, gpu: &Gpu, pass: Pass) -> PassCost {
    let (tokens, rows) = (pass.tokens as f64, pass.rows as f64);
    let (experts, per_token) = (config.n_routed_experts as f64, config.num_experts_per_tok as f64);
    let distinct = distinct_experts(experts, per_token, tokens);
    let latents = CacheShape::latent(config, cache_bits).bytes_per_token();
    // Of each head a score over r + dr numbers, and a sum over r.
    let pair = 2 * config.num_hidden_layers * config.num_attention_heads * (config.latent_dim() + config.kv_lora_rank);
    let amount = |stage| {
        let (bytes, elements) = weights.get(&stage).map_or((0.0, 0.0), |sums| (sums.0 as f64, sums.1 as f64));
        match stage {
            Stage::Embedding => (bytes / config.vocab_size as f64 * tokens, 0.0),
            Stage::LatentCache => ((pass.cached as f64 + tokens) * latents, (pair as f64) * pass.attended as f64),
            Stage::RoutedExperts if experts > 0.0 => {
                (bytes * distinct / experts, 2.0 * elements * per_token / experts * tokens)
            }
            Stage::Head => (bytes, 2.0 * elements * rows),
            _ => (bytes, 2.0 * elements * tokens),
        }
    };
    let parts = Stage::ALL.into_iter().map(|stage| (stage, amount(stage))).filter(|(_, (bytes, _))| *bytes > 0.0);
    let parts: Vec<(Stage, Amount)> =
        parts.map(|(stage, (bytes, flops))| (stage, Amount::new(bytes, flops, gpu))).collect();
    let sum = |of: &dyn Fn(&Amount) -> f64| parts.iter().map(|(_, amount)| of(amount)).sum();
    let total = Amount::new(sum(&|amount| amount.bytes), sum(&|amount| amount.flops), gpu);
    PassCost { pass, distinct_experts: distinct, parts, total }
}
