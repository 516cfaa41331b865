//! A checkpoint directory in the Hugging Face layout: `config.json` and one safetensors file, or shards with an index.
//! Files are mapped into memory, never read whole; every header is checked before anything is used (spec §1).

mod header;
mod index;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use moewe_plan::Mapped;

use crate::{
    config::Config,
    dtype::Dtype,
    error::{Error, Result, clip},
};

/// A stored tensor, row-major, borrowed from its mapped file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Outer dimension first.
    pub shape: &'a [usize],
    /// Little-endian elements; may stand at any alignment.
    pub data: &'a [u8],
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Where `data` begins in that file, in bytes.
    pub offset: usize,
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{:?} at byte {} of file {}", self.name, self.dtype, self.shape, self.offset, self.file)
    }
}

/// One safetensors file of a checkpoint.
#[derive(Debug)]
pub struct WeightFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its bytes, header included.
    pub bytes: Mapped,
}

/// The weights of a checkpoint.
#[derive(Debug)]
struct Weights {
    files: Vec<WeightFile>,
    /// By name: file and entry.
    entries: BTreeMap<String, (usize, header::Entry)>,
}

/// An opened checkpoint: its configuration and, where present, its weights.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config_path: PathBuf,
    config: Config,
    weights: Option<Weights>,
}

impl Checkpoint {
    /// Opens a checkpoint directory, or a bare `config.json` (any path to a file) for work that needs no weights.
    ///
    /// A directory without safetensors opens too; asking it for a tensor then fails.
    ///
    /// # Errors
    /// Any damage of `config.json`, the index or a safetensors header; see [`Error`]. Whether the tensors fit the
    /// configuration is the business of [`crate::tensors::check`].
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        if !meta.is_dir() {
            let dir = path.parent().unwrap_or(Path::new("")).to_owned();
            return Ok(Self { dir, config: Config::load(path)?, config_path: path.to_owned(), weights: None });
        }
        let config_path = path.join("config.json");
        if !exists(&config_path) {
            return Err(Error::NoConfig { path: path.to_owned() });
        }
        let config = Config::load(&config_path)?;
        let index = path.join("model.safetensors.index.json");
        let single = path.join("model.safetensors");
        let weights = if exists(&index) {
            Some(Weights::sharded(path, &index)?)
        } else if exists(&single) {
            Some(Weights::open(vec![single])?)
        } else {
            None
        };
        Ok(Self { dir: path.to_owned(), config_path, config, weights })
    }

    /// The resolved configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the configuration was read from.
    pub fn config_path(&self) -> &Path {
        &self.config_path
    }

    /// The checkpoint directory; of a bare `config.json` the directory it is in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there are weights.
    pub fn has_weights(&self) -> bool {
        self.weights.is_some()
    }

    /// The safetensors files, sorted by name; none without weights.
    pub fn files(&self) -> &[WeightFile] {
        self.weights.as_ref().map_or(&[], |w| &w.files)
    }

    /// Whether a tensor of this name is stored.
    pub fn contains(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// A stored tensor; `None` when it or all weights are absent.
    pub fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let weights = self.weights.as_ref()?;
        weights.entries.get_key_value(name).map(|(name, entry)| weights.view(name, entry))
    }

    /// A stored tensor.
    ///
    /// # Errors
    /// [`Error::NoWeights`] or [`Error::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        if self.weights.is_none() {
            return Err(Error::NoWeights { path: self.dir.clone() });
        }
        self.find(name).ok_or_else(|| Error::MissingTensor {
            path: self.dir.clone(),
            tensor: name.to_owned(),
            expected: "it to be stored".into(),
        })
    }

    /// The block scales of the FP8 tensor `name`, spec §8; `None` when there are none.
    pub fn scale_of(&self, name: &str) -> Option<TensorView<'_>> {
        self.find(&format!("{name}_scale_inv"))
    }

    /// All stored tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.weights.iter().flat_map(|w| w.entries.iter().map(|(name, entry)| w.view(name, entry)))
    }
}

/// Whether something of this name is there, a dangling link included, so that it is reported and not passed over.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

impl Weights {
    /// Maps the files and checks their headers.
    fn open(paths: Vec<PathBuf>) -> Result<Self> {
        let mut files = Vec::with_capacity(paths.len());
        let mut entries = BTreeMap::new();
        for path in paths {
            let read = |source| Error::Read { path: path.clone(), source };
            // Checked before opening: opening a pipe would wait for a writer.
            if !std::fs::metadata(&path).map_err(read)?.is_file() {
                return Err(Error::Safetensors { path, detail: "it is not a regular file".into() });
            }
            let bytes = Mapped::open(&path).map_err(read)?;
            for mut entry in header::parse(&path, &bytes)? {
                let name = std::mem::take(&mut entry.name);
                if let Some((other, _)) = entries.get(&name) {
                    let other: &WeightFile = &files[*other];
                    let detail = format!("is also in {}", other.path.display());
                    return Err(Error::Entry { path, tensor: clip(&name), detail });
                }
                entries.insert(name, (files.len(), entry));
            }
            files.push(WeightFile { path, bytes });
        }
        Ok(Self { files, entries })
    }

    /// Opens every shard that the index names and checks that each tensor is where the index says.
    fn sharded(dir: &Path, index_path: &Path) -> Result<Self> {
        let map = index::read(index_path)?;
        let bad = |detail: String| Error::Index { path: index_path.to_owned(), detail };
        let mut names: Vec<&str> = map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        for name in &names {
            if !exists(&dir.join(name)) {
                return Err(bad(format!("it names the file {}, which is missing", clip(name))));
            }
        }
        let weights = Self::open(names.iter().map(|name| dir.join(name)).collect())?;
        for (tensor, file) in &map {
            match weights.entries.get(tensor) {
                Some((found, _)) if names[*found] == file => {}
                Some((found, _)) => {
                    let detail =
                        format!("tensor `{}` is said to be in {file} but is in {}", clip(tensor), names[*found]);
                    return Err(bad(detail));
                }
                None => return Err(bad(format!("tensor `{}` is said to be in {file} but is not", clip(tensor)))),
            }
        }
        Ok(weights)
    }

    fn view<'a>(&'a self, name: &'a str, (file, entry): &'a (usize, header::Entry)) -> TensorView<'a> {
        TensorView {
            name,
            dtype: entry.dtype,
            shape: &entry.shape,
            data: &self.files[*file].bytes[entry.offset..entry.offset + entry.len],
            file: *file,
            offset: entry.offset,
        }
    }
}
