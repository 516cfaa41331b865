//! What a viewer must know of a model: gathered from its bundle, its tokenizer and its device.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use moewe_plan::{Bundle, Precision, Weight, WeightFormat};
use moewe_runtime::{Gpu, copy_bandwidth};
use moewe_viewer::subject::Subject;

use crate::text::Text;

/// End of the name of a router's correction bias.
const BIAS: &str = ".mlp.gate.e_score_correction_bias";

/// The subject of a bundle on a device. The device's bandwidth is measured if steps are to be timed.
///
/// # Errors
/// If a bias cannot be read from the bundle's files.
pub fn subject(
    name: &str,
    bundle: &Bundle,
    text: Option<&Text>,
    gpu: &Gpu,
    precision: Precision,
    timed: bool,
) -> io::Result<Subject> {
    let info = gpu.info();
    let device = format!("{} ({} {})", info.name, info.driver, info.driver_info);
    let mut subject = Subject::from_plan(name, &bundle.plan, precision.name(), &device);
    if let Some(text) = text {
        // The bars and blanks of DeepSeek's special tokens are in few fonts.
        let drawable = |piece: String| piece.replace('｜', "|").replace('▁', "_");
        let pieces = (0..bundle.plan.model.vocab_size).map(|id| text.token(id).map(drawable).unwrap_or_default());
        subject.pieces = pieces.collect();
    }
    subject.expert_bias = biases(bundle)?;
    if timed {
        subject.bytes_per_second = copy_bandwidth(gpu).ok().map(|bandwidth| bandwidth.kernel * 1e9);
    }
    Ok(subject)
}

/// The correction bias of each layer that has one.
fn biases(bundle: &Bundle) -> io::Result<BTreeMap<u32, Vec<f32>>> {
    let mut found = BTreeMap::new();
    for weight in &bundle.plan.weights {
        let layer = weight.name.strip_suffix(BIAS).and_then(|stem| stem.rsplit('.').next()?.parse().ok());
        if let Some(layer) = layer
            && weight.format == WeightFormat::F32
        {
            found.insert(layer, vector(bundle, weight)?);
        }
    }
    Ok(found)
}

/// The numbers of a vector, without padding.
fn vector(bundle: &Bundle, weight: &Weight) -> io::Result<Vec<f32>> {
    let mut bytes = Vec::new();
    for segment in weight.shards.iter().flat_map(|shard| &shard.segments) {
        // Verified: the segment is inside the file, and a vector is no longer than the experts are many.
        let file = File::open(bundle.dir.join(&bundle.plan.files[segment.file as usize].path))?;
        let start = bytes.len();
        bytes.resize(start + segment.bytes as usize, 0);
        file.read_exact_at(&mut bytes[start..], segment.offset)?;
    }
    let experts = bundle.plan.model.experts as usize;
    Ok(bytes.as_chunks::<4>().0.iter().take(experts).map(|word| f32::from_le_bytes(*word)).collect())
}
