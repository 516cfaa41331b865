//! Streams generated tensors into safetensors shards: one batch of chunks is written while the next is generated.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::{
    Options, Summary,
    random::{self, Law},
};
use crate::{
    dtype::Dtype,
    error::{Error, Result},
};

/// Elements generated at a time by one thread.
const CHUNK: u64 = 1 << 20;
/// Chunks in a batch, about 128 MB at most.
const BATCH: usize = 32;

/// A tensor to generate.
pub(super) struct Tensor {
    name: String,
    /// Name that seeds the random numbers.
    seed_name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    law: Law,
    elements: u64,
    /// Bytes.
    pub(super) len: u64,
}

impl Tensor {
    pub(super) fn new(name: String, seed_name: String, dtype: Dtype, shape: Vec<usize>, law: Law) -> Self {
        let elements = shape.iter().map(|d| *d as u64).product();
        Self { name, seed_name, dtype, shape, law, elements, len: elements * dtype.bytes() as u64 }
    }
}

/// A directory that is removed unless it was renamed to its final name.
struct Partial {
    path: PathBuf,
}

impl Partial {
    /// Creates it beside `out`, so that renaming stays on one file system.
    fn beside(out: &Path) -> Result<Self> {
        let name = out.file_name().ok_or_else(|| Error::Argument {
            what: "output directory".into(),
            found: out.display().to_string(),
            expected: "a path that ends in a name".into(),
        })?;
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let write = |source| Error::Write { path: out.to_owned(), source };
        if parent.exists() && !parent.is_dir() {
            return Err(write(std::io::ErrorKind::NotADirectory.into()));
        }
        fs::create_dir_all(parent).map_err(write)?;
        let path = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&path).map_err(write)?;
        Ok(Self { path })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

pub(super) fn write(
    config: &Value,
    tensors: Vec<Tensor>,
    out: &Path,
    options: Options,
    progress: &dyn Fn(u64, u64),
) -> Result<Summary> {
    // An empty directory may be replaced; anything else is somebody's work.
    if out.symlink_metadata().is_ok() && !fs::read_dir(out).is_ok_and(|mut dir| dir.next().is_none()) {
        return Err(Error::Exists { path: out.to_owned() });
    }
    let count = tensors.len();
    let total: u64 = tensors.iter().map(|t| t.len).sum();
    let shards = split(tensors, options.shard_bytes);
    let partial = Partial::beside(out)?;
    let failed = |name: &str, source| Error::Write { path: out.join(name), source };

    let mut done = 0;
    let mut weight_map = BTreeMap::new();
    let mut files = Vec::new();
    progress(0, total);
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let file = File::create(partial.path.join(&name)).map_err(|e| failed(&name, e))?;
        write_shard(file, shard, options, &mut |n| {
            done += n;
            progress(done, total);
        })
        .map_err(|e| match e {
            Failure::Io(source) => failed(&name, source),
            Failure::Interrupted => Error::Interrupted,
        })?;
        weight_map.extend(shard.iter().map(|t| (t.name.as_str(), name.clone())));
        files.push(out.join(name));
    }

    let pretty = |value: &Value| format!("{}\n", serde_json::to_string_pretty(value).expect("plain JSON"));
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        let name = "model.safetensors.index.json";
        fs::write(partial.path.join(name), pretty(&index)).map_err(|e| failed(name, e))?;
    }
    fs::write(partial.path.join("config.json"), pretty(config)).map_err(|e| failed("config.json", e))?;
    fs::rename(&partial.path, out).map_err(|e| failed("", e))?;
    Ok(Summary { files, tensors: count, bytes: total })
}

/// Fills files in order, each up to `limit` bytes. Inside a file wide types come first, so that all are aligned.
fn split(tensors: Vec<Tensor>, limit: u64) -> Vec<Vec<Tensor>> {
    let mut shards: Vec<Vec<Tensor>> = Vec::new();
    let mut room = 0;
    for tensor in tensors {
        if shards.is_empty() || tensor.len > room {
            shards.push(Vec::new());
            room = limit.max(tensor.len);
        }
        room -= tensor.len;
        shards.last_mut().expect("just pushed").push(tensor);
    }
    for shard in &mut shards {
        shard.sort_by_key(|t| std::cmp::Reverse(t.dtype.bytes()));
    }
    shards
}

enum Failure {
    Io(std::io::Error),
    Interrupted,
}

fn write_shard(
    mut file: File,
    shard: &[Tensor],
    options: Options,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Failure> {
    file.write_all(&header(shard)).map_err(Failure::Io)?;
    let chunks: Vec<(usize, Range<u64>)> = shard
        .iter()
        .enumerate()
        .flat_map(|(i, t)| {
            (0..t.elements.div_ceil(CHUNK)).map(move |c| (i, c * CHUNK..((c + 1) * CHUNK).min(t.elements)))
        })
        .collect();
    let generate = |chunks: &[(usize, Range<u64>)]| -> Vec<Vec<u8>> {
        chunks
            .par_iter()
            .map(|(i, range)| {
                let tensor = &shard[*i];
                debug_assert!(range.start.is_multiple_of(random::per_word(tensor.dtype) as u64));
                let mut bytes = vec![0; (range.end - range.start) as usize * tensor.dtype.bytes()];
                let key = random::key(options.seed, &tensor.seed_name);
                random::fill(key, tensor.dtype, tensor.law, range.start, &mut bytes);
                bytes
            })
            .collect()
    };

    let mut batches = chunks.chunks(BATCH);
    let mut ready = batches.next().map(generate);
    while let Some(batch) = ready {
        if options.interrupt.is_some_and(|i| i.load(Ordering::Relaxed)) {
            return Err(Failure::Interrupted);
        }
        let next = batches.next();
        let write = || batch.iter().try_for_each(|bytes| file.write_all(bytes));
        let (written, generated) = rayon::join(write, || next.map(generate));
        written.map_err(Failure::Io)?;
        progress(batch.iter().map(|b| b.len() as u64).sum());
        ready = generated;
    }
    file.flush().map_err(Failure::Io)
}

/// Length and JSON header of a safetensors file, padded so that the data begins at a multiple of 8 bytes.
fn header(shard: &[Tensor]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for tensor in shard {
        let begin = end;
        end += tensor.len;
        let entry = json!({
            "dtype": tensor.dtype.safetensors_name(), "shape": tensor.shape, "data_offsets": [begin, end]
        });
        map.insert(tensor.name.clone(), entry);
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}
