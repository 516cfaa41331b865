//! What a configuration costs: parameters, bytes, latent cache, and the memory-bandwidth floor of a token on a GPU.
//!
//! Pure arithmetic over [`Config`] and, where there are weights, over the tensors stored; nothing is measured.

mod arithmetic;
mod gpu;

use std::collections::BTreeMap;

use serde::Serialize;

pub use self::arithmetic::{Amount, Bound, Pass, PassCost, Stage, arithmetic};
pub use self::gpu::{BatchFloor, GPUS, Gpu, GpuOptions, GpuReport};
use crate::{
    checkpoint::Checkpoint,
    config::Config,
    dtype::Dtype,
    error::{Error, Result},
    tensors::{self, Expected, Part, Role},
};

/// What to compute beyond the plain counts.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bits per number in the latent cache.
    pub cache_bits: f64,
    /// Bits per number in the cache of plain multi-head attention that it is compared with.
    pub plain_bits: f64,
    /// Floors on this GPU.
    pub gpu: Option<GpuOptions>,
}

impl Options {
    fn check(&self) -> Result<()> {
        let gpu = self.gpu.as_ref();
        let price = gpu.and_then(|g| g.price_per_gpu_hour);
        for (what, value, max) in [
            ("bits per cached number", Some(self.cache_bits), 64.0),
            ("bits per number of the plain cache", Some(self.plain_bits), 64.0),
            ("usable share of the GPU memory", gpu.map(|g| g.usable), 1.0),
            ("price per GPU hour", price, 1e9),
        ] {
            if let Some(value) = value
                && !(value > 0.0 && value <= max)
            {
                let expected = format!("a number above 0 and at most {max}");
                return Err(Error::Argument { what: what.into(), found: value.to_string(), expected });
            }
        }
        Ok(())
    }
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_bits: 16.0, plain_bits: 16.0, gpu: None }
    }
}

/// Everything `moewe inspect` says about a model.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The resolved configuration.
    pub config: Config,
    /// Parameter counts.
    pub parameters: Parameters,
    /// Tensors and their bytes.
    pub tensors: Tensors,
    /// Latent cache against plain multi-head attention.
    pub latent_cache: LatentCache,
    /// Floors on a GPU, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuReport>,
    /// What the numbers rest on, one sentence each.
    pub assumptions: Vec<String>,
}

/// Parameter counts, block scales not counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// All parameters of the main model, MTP modules not counted; a tied head counts once.
    pub total: u64,
    /// Parameters of the main model that one token is multiplied with: k of E routed experts, the output head in full,
    /// of the embedding nothing (a token reads one row). This is how DeepSeek counts 37 B for V3.
    pub active: u64,
    /// Parameters of the MTP modules, without their copies of embedding and head.
    pub mtp: u64,
    /// The same by part, main model only.
    pub parts: Vec<PartCount>,
}

/// Parameters of one part of the main model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartCount {
    /// Which part.
    pub part: Part,
    /// All its parameters.
    pub total: u64,
    /// Those one token is multiplied with.
    pub active: u64,
}

/// Tensors of a checkpoint, or of a configuration without weights as they would be stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tensors {
    /// Whether they are there; false: computed from the configuration.
    pub stored: bool,
    /// How many.
    pub count: usize,
    /// Their bytes together.
    pub bytes: u64,
    /// By element type, largest first.
    pub dtypes: Vec<DtypeCount>,
    /// By name with layer and expert numbers left out, largest first.
    pub groups: Vec<TensorGroup>,
}

/// Tensors of one element type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DtypeCount {
    /// Element type.
    pub dtype: Dtype,
    /// How many tensors.
    pub count: usize,
    /// Their bytes together.
    pub bytes: u64,
}

/// Tensors of the same name apart from layer and expert number, the same shape and element type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorGroup {
    /// Name with `{l}` and `{e}` for the numbers.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape of each.
    pub shape: Vec<usize>,
    /// How many tensors.
    pub count: usize,
    /// Their bytes together.
    pub bytes: u64,
}

/// Size of a key-value cache per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CacheShape {
    /// Numbers kept per token and layer.
    pub numbers_per_layer: u64,
    /// Layers that keep them.
    pub layers: u64,
    /// Bits per number.
    pub bits: f64,
}

impl CacheShape {
    /// The latent cache of a model, r + dr numbers a layer, MTP modules not counted.
    pub fn latent(config: &Config, bits: f64) -> Self {
        Self { numbers_per_layer: config.latent_dim() as u64, layers: config.num_hidden_layers as u64, bits }
    }

    /// Keys and values of the same heads without compression.
    pub fn plain(config: &Config, bits: f64) -> Self {
        let numbers = config.num_attention_heads * (config.qk_head_dim() + config.v_head_dim);
        Self { numbers_per_layer: numbers as u64, layers: config.num_hidden_layers as u64, bits }
    }

    /// Grouped-query attention: keys and values of `kv_heads` heads.
    pub fn grouped(kv_heads: u64, head_dim: u64, layers: u64, bits: f64) -> Self {
        Self { numbers_per_layer: 2 * kv_heads * head_dim, layers, bits }
    }

    /// Bytes per token over all layers.
    pub fn bytes_per_token(&self) -> f64 {
        (self.numbers_per_layer * self.layers) as f64 * self.bits / 8.0
    }

    /// Which fraction of `other` this saves; negative if it is larger.
    pub fn saved_against(&self, other: &Self) -> f64 {
        1.0 - self.bytes_per_token() / other.bytes_per_token()
    }
}

/// Latent cache against plain multi-head attention of the same heads.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatentCache {
    /// r + dr.
    pub numbers_per_token_per_layer: u64,
    /// Layers that cache, MTP modules not counted.
    pub layers: u64,
    /// Bits per number.
    pub bits: f64,
    /// Bytes per token over all layers.
    pub bytes_per_token: f64,
    /// H · (dn + dr + dv), what plain attention would cache.
    pub plain_attention_numbers_per_token_per_layer: u64,
    /// Bits per number of the plain cache.
    pub plain_attention_bits: f64,
    /// Bytes per token that plain attention would need.
    pub plain_attention_bytes_per_token: f64,
    /// 1 − latent / plain.
    pub saved_fraction: f64,
}

impl LatentCache {
    fn new(config: &Config, bits: f64, plain_bits: f64) -> Self {
        let (latent, plain) = (CacheShape::latent(config, bits), CacheShape::plain(config, plain_bits));
        Self {
            numbers_per_token_per_layer: latent.numbers_per_layer,
            layers: latent.layers,
            bits,
            bytes_per_token: latent.bytes_per_token(),
            plain_attention_numbers_per_token_per_layer: plain.numbers_per_layer,
            plain_attention_bits: plain_bits,
            plain_attention_bytes_per_token: plain.bytes_per_token(),
            saved_fraction: latent.saved_against(&plain),
        }
    }
}

/// Describes a model. With a checkpoint that has weights, bytes are those stored; otherwise those that the
/// configuration implies.
///
/// # Errors
/// A checkpoint whose tensors do not fit its configuration, see [`tensors::check`], or [`Error::Argument`] for an option
/// that makes no sense.
pub fn inspect(config: &Config, checkpoint: Option<&Checkpoint>, options: &Options) -> Result<Report> {
    options.check()?;
    let checkpoint = checkpoint.filter(|c| c.has_weights());
    if let Some(checkpoint) = checkpoint {
        tensors::check(checkpoint)?;
    }
    let expected = tensors::expected(config);
    let mut assumptions = vec![
        "total counts the main model without MTP modules and without FP8 block scales".to_owned(),
        "active counts what one token is multiplied with: the output head in full, k of E routed experts, and of the \
         embedding nothing, as a token only reads one row of it"
            .to_owned(),
        format!(
            "the latent cache keeps {} + {} numbers per token and layer at {} bits; plain attention would keep keys of {} \
             and values of {} channels for each of {} heads at {} bits; MTP modules keep one layer more each, not counted",
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            options.cache_bits,
            config.qk_head_dim(),
            config.v_head_dim,
            config.num_attention_heads,
            options.plain_bits
        ),
    ];
    if checkpoint.is_none() {
        let plain = plain_dtype(config);
        assumptions.push(match config.quantization {
            Some(q) => format!(
                "there are no weights here: linears are taken as F8_E4M3 with an F32 scale per block of {:?}, the rest as {plain}",
                q.weight_block_size
            ),
            None => format!("there are no weights here: all tensors are taken as {plain}"),
        });
    }
    let gpu = options.gpu.as_ref().map(|gpu| {
        let bytes = PartBytes::new(config, checkpoint, &expected);
        gpu::floors(config, &bytes, options.cache_bits, gpu, &mut assumptions)
    });
    Ok(Report {
        config: config.clone(),
        parameters: count_parameters(config, &expected),
        tensors: list_tensors(config, checkpoint, &expected),
        latent_cache: LatentCache::new(config, options.cache_bits, options.plain_bits),
        gpu,
        assumptions,
    })
}

/// Parameter counts of a configuration.
pub fn parameters(config: &Config) -> Parameters {
    count_parameters(config, &tensors::expected(config))
}

fn count_parameters(config: &Config, expected: &[Expected]) -> Parameters {
    let mut parts: BTreeMap<Part, (u64, u64)> = BTreeMap::new();
    let mut mtp = 0;
    for tensor in expected {
        let n = tensor.elements();
        if tensor.layer.is_some_and(|l| l >= config.num_hidden_layers) {
            if !tensor.optional {
                mtp += n;
            }
            continue;
        }
        let active = match tensor.part {
            Part::Embedding if !config.tie_word_embeddings => 0,
            // k of E: the first k of equally large experts stand for them.
            Part::RoutedExperts if tensor.expert.is_some_and(|e| e >= config.num_experts_per_tok) => 0,
            _ => n,
        };
        let count = parts.entry(tensor.part).or_default();
        count.0 += n;
        count.1 += active;
    }
    Parameters {
        total: parts.values().map(|c| c.0).sum(),
        active: parts.values().map(|c| c.1).sum(),
        mtp,
        parts: parts.into_iter().map(|(part, (total, active))| PartCount { part, total, active }).collect(),
    }
}

/// Type of what is not quantised, where nothing is stored.
fn plain_dtype(config: &Config) -> Dtype {
    match config.torch_dtype {
        Some(dtype) if dtype != Dtype::F8E4m3 => dtype,
        _ => Dtype::Bf16,
    }
}

/// Element type in which a tensor is stored where nothing says so.
fn implied_dtype(config: &Config, tensor: &Expected) -> Dtype {
    match tensor.role {
        Role::Linear if config.quantization.is_some() => Dtype::F8E4m3,
        Role::Vector if tensor.part == Part::Router => Dtype::F32,
        _ => plain_dtype(config),
    }
}

/// Name, element type and shape of each tensor that a configuration implies, block scales included.
fn implied(config: &Config, tensor: &Expected) -> impl Iterator<Item = (String, Dtype, Vec<usize>)> {
    let dtype = implied_dtype(config, tensor);
    let scale =
        config.quantization.filter(|_| dtype == Dtype::F8E4m3).and_then(|q| tensor.scale_shape(q.weight_block_size));
    let scale = scale.map(|shape| (tensor.scale_name(), Dtype::F32, shape.to_vec()));
    std::iter::once((tensor.name.clone(), dtype, tensor.shape.clone())).chain(scale)
}

fn list_tensors(config: &Config, checkpoint: Option<&Checkpoint>, expected: &[Expected]) -> Tensors {
    let mut groups: BTreeMap<(String, Dtype, Vec<usize>), (usize, u64)> = BTreeMap::new();
    let mut add = |name: &str, dtype: Dtype, shape: &[usize]| {
        let bytes = shape.iter().map(|d| *d as u64).product::<u64>() * dtype.bytes() as u64;
        let group = groups.entry((pattern(name), dtype, shape.to_vec())).or_default();
        group.0 += 1;
        group.1 += bytes;
    };
    match checkpoint {
        Some(checkpoint) => checkpoint.tensors().for_each(|t| add(t.name, t.dtype, t.shape)),
        None => {
            expected.iter().flat_map(|t| implied(config, t)).for_each(|(name, dtype, shape)| add(&name, dtype, &shape));
        }
    }
    let mut dtypes: BTreeMap<Dtype, (usize, u64)> = BTreeMap::new();
    for ((_, dtype, _), (count, bytes)) in &groups {
        let sum = dtypes.entry(*dtype).or_default();
        sum.0 += count;
        sum.1 += bytes;
    }
    let mut dtypes: Vec<_> =
        dtypes.into_iter().map(|(dtype, (count, bytes))| DtypeCount { dtype, count, bytes }).collect();
    dtypes.sort_by_key(|d| std::cmp::Reverse(d.bytes));
    let mut groups: Vec<_> = groups
        .into_iter()
        .map(|((name, dtype, shape), (count, bytes))| TensorGroup { name, dtype, shape, count, bytes })
        .collect();
    groups.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
    Tensors {
        stored: checkpoint.is_some(),
        count: groups.iter().map(|g| g.count).sum(),
        bytes: groups.iter().map(|g| g.bytes).sum(),
        dtypes,
        groups,
    }
}

/// A tensor's name with `{l}` for the layer and `{e}` for the expert.
fn pattern(name: &str) -> String {
    let mut out = Vec::new();
    for part in name.split('.') {
        let number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        out.push(match out.last() {
            Some(&"layers") if number => "{l}",
            Some(&"experts") if number => "{e}",
            _ => part,
        });
    }
    out.join(".")
}

/// Bytes of a tensor and its block scales: those stored, or those that the configuration implies.
fn tensor_bytes(config: &Config, checkpoint: Option<&Checkpoint>, tensor: &Expected) -> u64 {
    match checkpoint {
        Some(c) => [c.find(&tensor.name), c.scale_of(&tensor.name)].iter().flatten().map(|t| t.data.len() as u64).sum(),
        None => implied(config, tensor)
            .map(|(_, dtype, shape)| shape.iter().map(|d| *d as u64).product::<u64>() * dtype.bytes() as u64)
            .sum(),
    }
}

/// Bytes of the main model by what a token reads of them.
struct PartBytes {
    /// Token embedding; a token reads one row.
    embedding: u64,
    /// All routed experts of all layers.
    routed: u64,
    /// Everything else, read in full for every batch. A tied head counts here and not as embedding.
    dense: u64,
}

impl PartBytes {
    fn new(config: &Config, checkpoint: Option<&Checkpoint>, expected: &[Expected]) -> Self {
        let mut bytes = Self { embedding: 0, routed: 0, dense: 0 };
        let main = |t: &&Expected| t.layer.is_none_or(|l| l < config.num_hidden_layers);
        for tensor in expected.iter().filter(main) {
            let n = tensor_bytes(config, checkpoint, tensor);
            match tensor.part {
                Part::Embedding if !config.tie_word_embeddings => bytes.embedding += n,
                Part::RoutedExperts => bytes.routed += n,
                _ => bytes.dense += n,
            }
        }
        bytes
    }

    fn total(&self) -> u64 {
        self.embedding + self.routed + self.dense
    }
}
