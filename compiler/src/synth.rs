//! Random-weight checkpoints of a real model's shape, for benchmarks and tests.
//!
//! Every tensor is a function of the seed and its name alone, so the same options give the same bytes whatever the number
//! of threads. Magnitudes keep activations near 1: linears have a standard deviation of 1/√fan_in, norms stand near 1.

mod random;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use serde_json::{Map, Value, json};

use self::writer::Tensor;
use crate::{
    config::{Config, read_json},
    dtype::Dtype,
    error::{Error, Result, clip},
    tensors::{self, Part, Role},
};

/// Configurations known by name: those of the public releases.
pub const PRESETS: [(&str, &str); 4] = [
    ("v2-lite", include_str!("../presets/v2-lite.json")),
    ("v2", include_str!("../presets/v2.json")),
    ("v3", include_str!("../presets/v3.json")),
    ("kimi-k2", include_str!("../presets/kimi-k2.json")),
];

/// Short names of config fields in overrides.
pub const ALIASES: [(&str, &str); 4] = [
    ("layers", "num_hidden_layers"),
    ("hidden", "hidden_size"),
    ("vocab", "vocab_size"),
    ("experts", "n_routed_experts"),
];

/// Fields that an override may add although the base does not have them.
const OPTIONAL_FIELDS: [&str; 7] = [
    "num_nextn_predict_layers",
    "rope_interleave",
    "attention_bias",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",
    "quantization_config",
];

/// Storage type of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Linears F8_E4M3 with block scales, the rest BF16.
    Fp8,
    /// All BF16.
    Bf16,
    /// All F32.
    F32,
}

impl Storage {
    /// From `fp8`, `bf16` or `f32`.
    ///
    /// # Errors
    /// [`Error::Argument`] for another word.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "fp8" => Ok(Self::Fp8),
            "bf16" => Ok(Self::Bf16),
            "f32" => Ok(Self::F32),
            _ => Err(Error::Argument {
                what: "dtype".into(),
                found: format!("\"{}\"", clip(name)),
                expected: "fp8, bf16 or f32".into(),
            }),
        }
    }

    /// Type of what is not an FP8 linear.
    fn plain(self) -> Dtype {
        if self == Self::F32 { Dtype::F32 } else { Dtype::Bf16 }
    }
}

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Seed of all random numbers.
    pub seed: u64,
    /// Most bytes of tensors per file; a single larger tensor gets a file of its own.
    pub shard_bytes: u64,
    /// Set from elsewhere to stop; what was written is then removed.
    pub interrupt: Option<&'a AtomicBool>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { seed: 0, shard_bytes: 4_000_000_000, interrupt: None }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The safetensors files.
    pub files: Vec<PathBuf>,
    /// Number of tensors, block scales included.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// A validated configuration to write: the JSON as it will be stored, and what it says.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Content of the future `config.json`.
    pub json: Value,
    /// The same, resolved.
    pub config: Config,
    storage: Storage,
}

impl Shape {
    /// Reads a preset of [`PRESETS`] or the `config.json` at a path (the file, or a directory with it) and applies
    /// overrides `FIELD=VALUE`. FIELD is a config field, one of [`ALIASES`], or `object.field`; VALUE is JSON or a word.
    ///
    /// What an override makes impossible is adapted where it was not overridden itself: `first_k_dense_replace` stays
    /// below the number of layers, so that a mixture-of-experts layer remains, and token ids stay inside the vocabulary.
    /// `storage` `None` keeps what the base states.
    ///
    /// # Errors
    /// [`Error::Argument`] for an override that cannot be applied; [`Error::Field`] when the result is no valid model.
    pub fn new(base: &str, overrides: &[impl AsRef<str>], storage: Option<Storage>) -> Result<Self> {
        let (path, mut value) = match PRESETS.iter().find(|(name, _)| *name == base) {
            Some((_, text)) => (PathBuf::from(base), serde_json::from_str(text).expect("presets are valid JSON")),
            None => read_base(base)?,
        };
        let Some(map) = value.as_object_mut() else {
            return Err(Error::Json { path, detail: "expected an object".into() });
        };
        let mut overridden = Vec::new();
        for text in overrides {
            overridden.push(apply(map, text.as_ref())?);
        }
        adapt(map, &overridden);

        let quantized = map.get("quantization_config").is_some_and(|q| !q.is_null());
        let storage = storage.unwrap_or_else(|| {
            let stated = map.get("torch_dtype").or(map.get("dtype")).and_then(Value::as_str);
            match (quantized, stated) {
                (true, _) => Storage::Fp8,
                (false, Some("float32")) => Storage::F32,
                _ => Storage::Bf16,
            }
        });
        if storage != Storage::Fp8 {
            map.remove("quantization_config");
        } else if !quantized {
            let quantization = json!({
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
            });
            map.insert("quantization_config".into(), quantization);
        }
        map.remove("dtype");
        let dtype = if storage == Storage::F32 { "float32" } else { "bfloat16" };
        map.insert("torch_dtype".into(), dtype.into());
        if let Some(heads) = map.get("num_attention_heads").cloned() {
            map.insert("num_key_value_heads".into(), heads);
        }
        let config = Config::from_value(&value, &path).map_err(|error| match error {
            Error::Field { path, field, found, expected, .. } if !overridden.is_empty() => {
                Error::Field { path, field, found, expected, advice: "override other fields, or by other values" }
            }
            other => other,
        })?;
        Ok(Self { json: value, config, storage })
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors().iter().map(|t| t.len).sum()
    }

    /// All tensors, each followed by its block scales.
    fn tensors(&self) -> Vec<Tensor> {
        let config = &self.config;
        let mut out = Vec::new();
        for tensor in tensors::expected(config) {
            let fan_in = *tensor.shape.last().expect("no scalars") as f64;
            let (mean, std) = match (tensor.role, tensor.part) {
                // A tied embedding is the output head too.
                (_, Part::Embedding) if !config.tie_word_embeddings => (0.0, 1.0),
                (Role::Linear | Role::Plain, _) => (0.0, fan_in.powf(-0.5)),
                (Role::Vector, Part::Router) => (0.0, 0.05),
                (Role::Vector, _) if tensor.name.ends_with("bias") => (0.0, 0.02),
                (Role::Vector, _) => (1.0, 0.1),
            };
            let dtype = match tensor.role {
                Role::Linear if self.storage == Storage::Fp8 => Dtype::F8E4m3,
                Role::Vector if tensor.part == Part::Router => Dtype::F32,
                _ => self.storage.plain(),
            };
            // An MTP module's copies equal the originals.
            let seed_name = match tensor.part {
                Part::Embedding => "model.embed_tokens.weight".to_owned(),
                Part::Head => "lm_head.weight".to_owned(),
                _ => tensor.name.clone(),
            };
            let scale = config.quantization.filter(|_| dtype == Dtype::F8E4m3);
            let scale = scale.and_then(|q| tensor.scale_shape(q.weight_block_size)).map(|shape| {
                Tensor::new(
                    tensor.scale_name(),
                    tensor.scale_name(),
                    Dtype::F32,
                    shape.to_vec(),
                    random::scale_law(std),
                )
            });
            let law = random::Law { mean, std };
            out.push(Tensor::new(tensor.name, seed_name, dtype, tensor.shape, law));
            out.extend(scale);
        }
        out
    }
}

/// Writes a checkpoint of random weights into the directory `out`, which must not exist or be empty. It is built in a
/// hidden directory beside it and renamed at the end, so that nothing stays behind if anything fails.
/// `progress` hears bytes done and bytes in all.
///
/// # Errors
/// [`Error::Exists`], [`Error::Write`], [`Error::Interrupted`].
pub fn write(shape: &Shape, out: &Path, options: Options, progress: &dyn Fn(u64, u64)) -> Result<Summary> {
    writer::write(&shape.json, shape.tensors(), out, options, progress)
}

fn read_base(base: &str) -> Result<(PathBuf, Value)> {
    let mut path = PathBuf::from(base);
    if path.is_dir() {
        path.push("config.json");
    }
    if !path.exists() {
        return Err(Error::Argument {
            what: "model to imitate".into(),
            found: format!("\"{}\"", clip(base)),
            expected: format!("{} or the path of a config.json", PRESETS.map(|(name, _)| name).join(", ")),
        });
    }
    let value = read_json(&path, 1 << 24)?;
    Ok((path, value))
}

/// Applies one `FIELD=VALUE` and returns the full name of the field.
fn apply(map: &mut Map<String, Value>, text: &str) -> Result<String> {
    let bad =
        |expected: String| Error::Argument { what: "override".into(), found: format!("\"{}\"", clip(text)), expected };
    let Some((field, value)) = text.split_once('=') else {
        return Err(bad("FIELD=VALUE, for example layers=4".into()));
    };
    let (field, value) = (field.trim(), value.trim());
    let field = ALIASES.iter().find(|(alias, _)| *alias == field).map_or(field, |(_, full)| full);
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    let (target, key) = match field.split_once('.') {
        None => (&mut *map, field),
        Some((object, key)) => match map.get_mut(object) {
            Some(Value::Object(inner)) => (inner, key),
            _ => return Err(bad(format!("a field of the configuration, and `{}` is no object in it", clip(object)))),
        },
    };
    if !target.contains_key(key) && !OPTIONAL_FIELDS.contains(&key) {
        let names: Vec<_> = target.keys().map(String::as_str).collect();
        let aliases = ALIASES.map(|(alias, _)| alias).join(", ");
        return Err(bad(format!("a field of the configuration: {aliases}, {}", names.join(", "))));
    }
    target.insert(key.to_owned(), value);
    Ok(field.to_owned())
}

/// Keeps fields possible that depend on overridden ones.
fn adapt(map: &mut Map<String, Value>, overridden: &[String]) {
    let free = |name: &str| !overridden.iter().any(|o| o == name);
    let number = |map: &Map<String, Value>, name: &str| map.get(name).and_then(Value::as_u64);
    if let (Some(layers), Some(dense)) = (number(map, "num_hidden_layers"), number(map, "first_k_dense_replace"))
        && dense >= layers
        && free("first_k_dense_replace")
    {
        map.insert("first_k_dense_replace".into(), layers.saturating_sub(1).into());
    }
    if let Some(vocab) = number(map, "vocab_size") {
        for (i, name) in ["bos_token_id", "eos_token_id"].iter().enumerate() {
            if free(name) && number(map, name).is_some_and(|id| id >= vocab) {
                map.insert((*name).into(), (i as u64).min(vocab.saturating_sub(1)).into());
            }
        }
    }
}
