//! Reading and writing bundles on disk.
//!
//! A bundle is a directory: `manifest.json` (length and hash of every other file, and a hash over that list),
//! `plan.json`, `kernels/*.wgsl`, `weights-*.safetensors`, and the checkpoint's tokenizer and configuration files.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::verify::{is_plain_name, verify};
use crate::{Error, FORMAT_VERSION, Mapped, Plan};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// File name of the plan.
pub const PLAN: &str = "plan.json";
/// Neither manifest, plan nor kernel of a sound bundle is larger, in bytes.
const MAX_TEXT_BYTES: u64 = 1 << 28;

/// Length and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3, in hexadecimal.
    pub blake3: String,
}

/// The list of a bundle's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Every file but the manifest, by its path in the bundle.
    pub files: BTreeMap<String, Entry>,
    /// BLAKE3 of `files` as compact JSON.
    pub blake3: String,
}

impl Manifest {
    fn digest(files: &BTreeMap<String, Entry>) -> String {
        let text = serde_json::to_vec(files).expect("a map of strings and numbers serialises");
        blake3::hash(&text).to_hex().to_string()
    }
}

/// BLAKE3 of bytes, in hexadecimal; on all cores if there are many.
pub fn hash_file(bytes: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    if bytes.len() > 1 << 20 {
        hasher.update_rayon(bytes);
    } else {
        hasher.update(bytes);
    }
    hasher.finalize().to_hex().to_string()
}

/// A bundle whose manifest, plan and kernels were read and verified.
#[derive(Debug)]
pub struct Bundle {
    /// The directory.
    pub dir: PathBuf,
    /// The plan.
    pub plan: Plan,
    /// The text of each kernel, in the order of [`Plan::kernels`].
    pub kernels: Vec<String>,
}

impl Bundle {
    /// Whether `dir` looks like a bundle (has a manifest and a plan).
    pub fn is_bundle(dir: &Path) -> bool {
        dir.join(MANIFEST).is_file() && dir.join(PLAN).is_file()
    }

    /// Reads a bundle. All files but weights are held against their hashes; those are checked by
    /// [`Bundle::map_weights`], since they may be large.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(MANIFEST);
        if !dir.is_dir() {
            return Err(Error::NotABundle { path: dir.into(), what: "it is no directory".into() });
        }
        if !path.is_file() {
            return Err(Error::NotABundle { path: dir.into(), what: format!("{MANIFEST} is missing") });
        }
        let text = read_text(&path)?;
        let version = serde_json::from_str::<serde_json::Value>(&text)
            .map_err(|error| damaged(&path, format!("not JSON: {error}")))?
            .get("format_version")
            .and_then(serde_json::Value::as_u64)
            .ok_or_else(|| damaged(&path, "format_version is missing".into()))?;
        if version != u64::from(FORMAT_VERSION) {
            let found = u32::try_from(version).unwrap_or(u32::MAX);
            return Err(Error::Version { path, found, expected: FORMAT_VERSION });
        }
        let manifest: Manifest =
            serde_json::from_str(&text).map_err(|error| damaged(&path, format!("not a manifest: {error}")))?;
        if Manifest::digest(&manifest.files) != manifest.blake3 {
            return Err(damaged(&path, "its list of files does not match its own hash".into()));
        }
        let plan_text = read_verified(dir, &manifest, PLAN)?;
        let plan_path = dir.join(PLAN);
        let plan: Plan = serde_json::from_str(&plan_text).map_err(|error| damaged(&plan_path, error.to_string()))?;
        verify(&plan).map_err(|what| damaged(&plan_path, what))?;
        let kernels =
            plan.kernels.iter().map(|kernel| read_verified(dir, &manifest, &kernel.file)).collect::<Result<_, _>>()?;
        for (name, entry) in &manifest.files {
            // Weights are hashed when they are mapped; the rest (tokenizer, configuration) now.
            if name.ends_with(".safetensors") {
                let listed = plan.files.iter().any(|f| !f.referenced && f.path == *name && f.blake3 == entry.blake3);
                if !listed {
                    return Err(damaged(&dir.join(name), "the plan does not name this file with this hash".into()));
                }
            } else if name != PLAN && !name.starts_with("kernels/") {
                read_verified(dir, &manifest, name)?;
            }
        }
        Ok(Self { dir: dir.into(), plan, kernels })
    }

    /// Maps the weight files. Only their lengths are checked: what is read from them must not be used before a
    /// [`Verifier`] has seen all of their [`WeightFiles::windows`].
    pub fn map_weights(&self) -> Result<WeightFiles, Error> {
        if self.plan.weights.iter().any(|w| w.shards.iter().any(|s| s.segments.is_empty())) {
            return Err(Error::NoWeights { path: self.dir.clone() });
        }
        let mut files = Vec::with_capacity(self.plan.files.len());
        let mut start = 0;
        for file in &self.plan.files {
            let path = self.dir.join(&file.path); // `join` takes an absolute, referenced path as it is
            let map = Mapped::open(&path).map_err(unreadable(&path))?;
            if map.len() as u64 != file.bytes {
                return Err(damaged(&path, format!("{} bytes, {} expected", map.len(), file.bytes)));
            }
            files.push(MappedFile { path, map, blake3: file.blake3.clone(), start });
            start += file.bytes;
        }
        Ok(WeightFiles { files, bytes: start })
    }
}

/// Bytes of weight files that are read and verified at once: enough to share among all cores.
const WINDOW: usize = 16 << 20;

/// A mapped weight file.
#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mapped,
    blake3: String,
    /// Where it begins if all files stood behind one another.
    start: u64,
}

/// The mapped weight files of a bundle. Positions in them count bytes as if the files stood behind one another.
#[derive(Debug)]
pub struct WeightFiles {
    files: Vec<MappedFile>,
    bytes: u64,
}

/// A piece of a weight file that is read and verified at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    file: usize,
    range: Range<usize>,
    /// The positions of its bytes.
    pub positions: Range<u64>,
}

impl WeightFiles {
    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.bytes
    }

    /// The bytes of a segment of the plan these files belong to.
    pub fn bytes(&self, segment: &crate::Segment) -> &[u8] {
        let start = segment.offset as usize;
        &self.files[segment.file as usize].map[start..start + segment.bytes as usize]
    }

    /// The position of a segment's first byte.
    pub fn position(&self, segment: &crate::Segment) -> u64 {
        self.files[segment.file as usize].start + segment.offset
    }

    /// All bytes of all files in order, in pieces. An empty file is one empty piece.
    pub fn windows(&self) -> impl Iterator<Item = Window> {
        self.files.iter().enumerate().flat_map(|(file, MappedFile { map, start, .. })| {
            (0..map.len().div_ceil(WINDOW).max(1)).map(move |index| {
                let range = index * WINDOW..map.len().min((index + 1) * WINDOW);
                let positions = start + range.start as u64..start + range.end as u64;
                Window { file, range, positions }
            })
        })
    }

    /// Waits until a window is in memory, and asks for the next one.
    pub fn fetch(&self, window: &Window) {
        self.files[window.file].map.fetch(window.range.clone(), WINDOW);
    }

    /// Begins to hold the files against their hashes.
    pub fn verifier(&self) -> Verifier<'_> {
        Verifier { files: self, hasher: blake3::Hasher::new() }
    }
}

/// Holds weight files against their hashes.
#[derive(Debug)]
pub struct Verifier<'a> {
    files: &'a WeightFiles,
    hasher: blake3::Hasher,
}

impl Verifier<'_> {
    /// Takes the next window, on all cores; all of them in order are to be given. An error after a file's last window if
    /// the file is not what was compiled.
    pub fn take(&mut self, window: &Window) -> Result<(), Error> {
        let MappedFile { path, map, blake3, .. } = &self.files.files[window.file];
        self.hasher.update_rayon(&map[window.range.clone()]);
        if window.range.end < map.len() {
            return Ok(());
        }
        let found = std::mem::take(&mut self.hasher).finalize().to_hex();
        if found.as_str() != blake3 {
            return Err(damaged(path, "its contents do not match their hash".into()));
        }
        Ok(())
    }
}

fn damaged(path: &Path, what: String) -> Error {
    Error::Damaged { path: path.into(), what }
}

/// A file that is missing is damage of the bundle; whatever else the system says is its own affair.
fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| match source.kind() {
        std::io::ErrorKind::NotFound => damaged(path, "the file is missing".into()),
        _ => Error::Io { path: path.into(), source },
    }
}

fn read_text(path: &Path) -> Result<String, Error> {
    let metadata = fs::metadata(path).map_err(unreadable(path))?;
    // Asked before opening: opening a pipe would wait for a writer.
    if !metadata.is_file() {
        return Err(damaged(path, "not a regular file".into()));
    }
    let bytes = metadata.len();
    if bytes > MAX_TEXT_BYTES {
        return Err(damaged(path, format!("{bytes} bytes, at most {MAX_TEXT_BYTES} expected")));
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|_| damaged(path, "not UTF-8".into()))
}

fn read_verified(dir: &Path, manifest: &Manifest, name: &str) -> Result<String, Error> {
    let plain =
        is_plain_name(Path::new(name)) || name.strip_prefix("kernels/").is_some_and(|n| is_plain_name(Path::new(n)));
    let path = dir.join(if plain { name } else { MANIFEST });
    if !plain {
        return Err(damaged(&path, format!("it names {name:?}, outside the bundle")));
    }
    let entry = manifest.files.get(name).ok_or_else(|| damaged(&path, format!("{MANIFEST} does not list it")))?;
    let text = read_text(&path)?;
    if text.len() as u64 != entry.bytes || hash_file(text.as_bytes()) != entry.blake3 {
        return Err(damaged(&path, format!("its contents do not match the hash in {MANIFEST}")));
    }
    Ok(text)
}

/// A bundle being written. It stands in a directory beside the output and is moved there by
/// [`Staging::finish`]; dropped before, it is removed, so that no partial output stays behind.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    output: PathBuf,
    weight_files: BTreeMap<String, Entry>,
}

impl Staging {
    /// Begins a bundle that shall end at `output`. An existing bundle there is replaced at the end; anything else
    /// there is an error.
    pub fn new(output: &Path) -> Result<Self, Error> {
        let occupied = output.exists() && !Bundle::is_bundle(output);
        let empty_dir = output.is_dir() && fs::read_dir(output).map_err(Error::io(output))?.next().is_none();
        if occupied && !empty_dir {
            return Err(Error::OutputExists { path: output.into() });
        }
        let name = output.file_name().ok_or_else(|| Error::OutputExists { path: output.into() })?;
        let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if parent.exists() && !parent.is_dir() {
            return Err(Error::write(output)(std::io::ErrorKind::NotADirectory.into()));
        }
        fs::create_dir_all(parent).map_err(Error::write(output))?;
        let dir = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(Error::write(output))?;
        }
        fs::create_dir_all(dir.join("kernels")).map_err(Error::write(output))?;
        Ok(Self { dir, output: output.into(), weight_files: BTreeMap::new() })
    }

    /// Where files are to be written.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where they will stand in the end.
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// Writes a small file.
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        fs::write(self.dir.join(name), contents).map_err(Error::write(self.output.join(name)))
    }

    /// Says that a weight file was written and hashed, so that it need not be hashed again.
    pub fn weight_file(&mut self, name: &str, entry: Entry) {
        self.weight_files.insert(name.into(), entry);
    }

    /// Writes the plan and the manifest and moves the bundle to its place.
    pub fn finish(self, plan: &Plan) -> Result<(), Error> {
        verify(plan).map_err(|what| damaged(&self.output.join(PLAN), what))?;
        // Compact: the plan of a large model has a hundred thousand segments; `moewe explain` is for reading.
        let text = serde_json::to_vec(plan).expect("a plan serialises");
        self.write(PLAN, &text)?;
        let mut files = self.weight_files.clone();
        for folder in ["", "kernels"] {
            let dir = self.dir.join(folder);
            for item in fs::read_dir(&dir).map_err(Error::io(&dir))? {
                let path = item.map_err(Error::io(&dir))?.path();
                let name = path.strip_prefix(&self.dir).expect("it is below").to_string_lossy().into_owned();
                if path.is_file() && !files.contains_key(&name) {
                    let bytes = fs::read(&path).map_err(Error::io(&path))?;
                    files.insert(name, Entry { bytes: bytes.len() as u64, blake3: hash_file(&bytes) });
                }
            }
        }
        let blake3 = Manifest::digest(&files);
        let manifest = Manifest { format_version: FORMAT_VERSION, files, blake3 };
        self.write(MANIFEST, &serde_json::to_vec_pretty(&manifest).expect("a manifest serialises"))?;
        if self.output.exists() {
            // Only an empty directory or an older bundle can stand there: `new` saw to that.
            fs::remove_dir_all(&self.output).map_err(Error::write(&self.output))?;
        }
        fs::rename(&self.dir, &self.output).map_err(Error::write(&self.output))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After `finish` the directory is gone; an error here leaves nothing better to do.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
