//! A checkpoint's tensors by their Hugging Face names, in f64. Spec §§1, 8.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::numeric::block_dequant;
use crate::safetensors::{self, Dtype, RawTensor};
use crate::{Error, Result};

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// As stored, `[out, in]` for linears.
    pub shape: Vec<usize>,
    /// Dequantised values, row-major.
    pub data: Vec<f64>,
}

/// All tensors of a checkpoint, FP8 ones dequantised and their scales gone.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights(BTreeMap<String, Weight>);

impl Weights {
    /// Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names. `fp8_block` is
    /// `weight_block_size`.
    pub fn load(dir: &Path, fp8_block: [usize; 2]) -> Result<Self> {
        let mut raw = BTreeMap::new();
        for file in files(dir)? {
            raw.extend(safetensors::read(&dir.join(file))?);
        }
        let is_scale = |name: &str| name.strip_suffix("_scale_inv").is_some_and(|weight| raw.contains_key(weight));
        let mut weights = BTreeMap::new();
        for (name, tensor) in raw.iter().filter(|(name, _)| !is_scale(name)) {
            let data = match tensor.dtype {
                Dtype::F8E4m3 => dequantise(name, tensor, raw.get(&format!("{name}_scale_inv")), fp8_block)?,
                _ => tensor.to_f64(),
            };
            weights.insert(name.clone(), Weight { shape: tensor.shape.clone(), data });
        }
        Ok(Self(weights))
    }

    /// A tensor that may be absent.
    pub fn get(&self, name: &str) -> Option<&Weight> {
        self.0.get(name)
    }

    /// A tensor that must be there; panics if it is not.
    pub fn need(&self, name: &str) -> &Weight {
        self.get(name).unwrap_or_else(|| panic!("the checkpoint lacks {name}"))
    }

    /// The same, to be changed.
    pub fn need_mut(&mut self, name: &str) -> &mut Weight {
        self.0.get_mut(name).unwrap_or_else(|| panic!("the checkpoint lacks {name}"))
    }

    /// All tensors in order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.0.iter().map(|(name, weight)| (name.as_str(), weight))
    }
}

/// Names of the files that hold the tensors.
fn files(dir: &Path) -> Result<BTreeSet<String>> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(["model.safetensors".to_owned()].into());
    }
    let json = crate::read_json(&index)?;
    let malformed = || Error(format!("{}: no weight_map of file names", index.display()));
    let map = json["weight_map"].as_object().ok_or_else(malformed)?;
    map.values().map(|file| file.as_str().map(str::to_owned).ok_or_else(malformed)).collect()
}

fn dequantise(name: &str, codes: &RawTensor, scales: Option<&RawTensor>, block: [usize; 2]) -> Result<Vec<f64>> {
    let scales = scales.ok_or_else(|| Error(format!("{name} is FP8 without {name}_scale_inv")))?;
    let &[rows, cols] = codes.shape.as_slice() else {
        return Err(Error(format!("{name} is FP8 but not a matrix")));
    };
    let expected = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    if scales.shape != expected {
        return Err(Error(format!("{name}_scale_inv is {:?}, expected {expected:?}", scales.shape)));
    }
    // Scales are float32 in every release; narrowing also accepts float64 ones.
    let scales: Vec<f32> = scales.to_f64().into_iter().map(|s| s as f32).collect();
    let weights = block_dequant(&codes.bytes, [rows, cols], &scales, block);
    Ok(weights.into_iter().map(f64::from).collect())
}
