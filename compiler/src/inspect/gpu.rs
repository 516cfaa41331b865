//! Memory-bandwidth floor of decoding on a GPU: the time in which the bytes that a token needs can be read at all.

use serde::Serialize;

use super::{CacheShape, PartBytes};
use crate::{
    config::Config,
    error::{Error, Result},
};

/// A GPU by its data sheet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// Name as given on the command line.
    pub name: &'static str,
    /// Memory in bytes (data-sheet gigabytes of 10⁹).
    pub memory_bytes: u64,
    /// Peak memory bandwidth in bytes per second.
    pub bandwidth: f64,
    /// Peak operations per second of dense matrices of f16, summed in f32.
    pub flops: f64,
}

const fn gpu(name: &'static str, gigabytes: u64, terabytes_per_second: f64, teraflops: f64) -> Gpu {
    let memory_bytes = gigabytes * 1_000_000_000;
    Gpu { name, memory_bytes, bandwidth: terabytes_per_second * 1e12, flops: teraflops * 1e12 }
}

/// GPUs known by name, data-sheet values.
pub const GPUS: &[Gpu] = &[
    gpu("h100", 80, 3.35, 989.0),
    gpu("h200", 141, 4.8, 989.0),
    gpu("h800", 80, 3.35, 989.0),
    gpu("h20", 96, 4.0, 148.0),
    gpu("b200", 180, 8.0, 2250.0),
    gpu("a100", 80, 2.039, 312.0),
    gpu("a100-40gb", 40, 1.555, 312.0),
    gpu("mi300x", 192, 5.3, 1307.0),
    gpu("l40s", 48, 0.864, 362.0),
    gpu("rtx-pro-6000", 96, 1.792, 504.0),
    gpu("rtx5090", 32, 1.792, 210.0),
    gpu("rtx4090", 24, 1.008, 165.0),
    gpu("rtx3090", 24, 0.936, 71.0),
];

impl Gpu {
    /// A GPU of [`GPUS`]; case, spaces, dashes and underscores do not matter.
    ///
    /// # Errors
    /// [`Error::Argument`] listing the known names.
    pub fn named(name: &str) -> Result<&'static Self> {
        let plain = |s: &str| s.to_ascii_lowercase().replace(['-', '_', ' '], "");
        GPUS.iter().find(|g| plain(g.name) == plain(name)).ok_or_else(|| Error::Argument {
            what: "GPU".into(),
            found: format!("\"{}\"", crate::error::clip(name)),
            expected: format!("one of {}", GPUS.iter().map(|g| g.name).collect::<Vec<_>>().join(", ")),
        })
    }
}

/// What to assume for the floors.
#[derive(Clone, Debug)]
pub struct GpuOptions {
    /// The GPU.
    pub gpu: Gpu,
    /// Price of one GPU per hour in dollars.
    pub price_per_gpu_hour: Option<f64>,
    /// Tokens already in the cache of each sequence.
    pub context: usize,
    /// Share of the memory that weights and cache may fill; the rest is for activations, kernels and the driver.
    pub usable: f64,
}

impl GpuOptions {
    /// Context of 4096 tokens, 90 % of the memory usable, no price.
    pub fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), price_per_gpu_hour: None, context: 4096, usable: 0.9 }
    }
}

/// Floors of decoding on the smallest number of GPUs that holds the model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuReport {
    /// The GPU.
    pub gpu: Gpu,
    /// Bytes of the main model's weights.
    pub weight_bytes: u64,
    /// Whether weights and the cache of one sequence fit one GPU.
    pub fits_one: bool,
    /// GPUs needed for weights and the cache of one sequence.
    pub gpus: u64,
    /// Tokens in the cache of each sequence.
    pub context: usize,
    /// Floors by batch size.
    pub floors: Vec<BatchFloor>,
}

/// Floor of one decoding step for a batch of sequences.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BatchFloor {
    /// Sequences, one new token each.
    pub batch: u64,
    /// GPUs that hold weights and the caches of the whole batch.
    pub gpus: u64,
    /// Expected distinct experts per MoE layer.
    pub distinct_experts: f64,
    /// Bytes read in the step.
    pub bytes: f64,
    /// Milliseconds a step takes at least.
    pub milliseconds: f64,
    /// Tokens per second of all sequences together, at most.
    pub tokens_per_second: f64,
    /// Dollars per million new tokens, at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dollars_per_million_tokens: Option<f64>,
}

/// Expected number of distinct experts when `batch` tokens each choose k of E uniformly and independently.
pub(super) fn distinct_experts(experts: f64, per_tok: f64, batch: f64) -> f64 {
    if experts == 0.0 { 0.0 } else { experts * (1.0 - (1.0 - per_tok / experts).powf(batch)) }
}

pub(super) fn floors(
    config: &Config,
    bytes: &PartBytes,
    cache_bits: f64,
    options: &GpuOptions,
    assumptions: &mut Vec<String>,
) -> GpuReport {
    let GpuOptions { gpu, price_per_gpu_hour, context, usable } = options;
    let cache = CacheShape::latent(config, cache_bits).bytes_per_token() * *context as f64;
    let room = gpu.memory_bytes as f64 * usable;
    let gpus = |batch: u64| ((bytes.total() as f64 + cache * batch as f64) / room).ceil().max(1.0);
    let (experts, per_tok) = (config.n_routed_experts as f64, config.num_experts_per_tok as f64);
    let row = bytes.embedding as f64 / config.vocab_size as f64;

    let floors = (0..9).map(|p| 1u64 << p).map(|batch| {
        let b = batch as f64;
        let distinct = distinct_experts(experts, per_tok, b);
        let routed = if experts == 0.0 { 0.0 } else { bytes.routed as f64 * distinct / experts };
        let read = bytes.dense as f64 + routed + (row + cache) * b;
        let gpus = gpus(batch);
        let seconds = read / (gpus * gpu.bandwidth);
        BatchFloor {
            batch,
            gpus: gpus as u64,
            distinct_experts: distinct,
            bytes: read,
            milliseconds: seconds * 1e3,
            tokens_per_second: b / seconds,
            dollars_per_million_tokens: price_per_gpu_hour.map(|p| p * gpus * seconds / 3600.0 / b * 1e6),
        }
    });
    let floors = floors.collect();

    assumptions.extend([
        format!(
            "{} has {} GB of memory and reads {} TB/s, by its data sheet; {:.0} % of the memory may be filled",
            gpu.name,
            gpu.memory_bytes / 1_000_000_000,
            gpu.bandwidth / 1e12,
            usable * 100.0
        ),
        "where one GPU is too small, weights, cache and reads are spread evenly over the fewest that hold them, and \
         traffic between GPUs costs nothing"
            .to_owned(),
        format!("each sequence has {context} tokens in its cache, all read for each new token"),
        "each step reads once: every weight but the embedding and the routed experts, one embedding row per token, and of \
         each MoE layer E·(1 − (1 − k/E)^batch) experts, which assumes that tokens choose experts evenly and independently"
            .to_owned(),
        "arithmetic, activations, kernel launches and MTP speculation are left out: a real system is slower, and with \
         speculation may need fewer steps"
            .to_owned(),
    ]);
    if let Some(price) = price_per_gpu_hour {
        assumptions
            .push(format!("a GPU costs ${price} per hour and does nothing but decode, always at that batch size"));
    }
    let one = gpus(1) as u64;
    GpuReport {
        gpu: gpu.clone(),
        weight_bytes: bytes.total(),
        fits_one: one == 1,
        gpus: one,
        context: *context,
        floors,
    }
}
