//! The user's cache directory: bundles of checkpoints that were run directly, by content, and the driver's pipelines.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::COMPANIONS;
use moewe_compiler::profile::Profile;
use moewe_plan::{FORMAT_VERSION, hash_file};
use serde::{Deserialize, Serialize};

use super::interrupt;

/// Files larger than this are hashed once and recognised later by length and time of change.
const LARGE: u64 = 64 << 20;

/// The hash of a large file as it was.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    bytes: u64,
    modified_ns: u128,
    blake3: String,
}

/// `$MOEWE_CACHE`, else the user's cache directory.
pub fn root() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("MOEWE_CACHE").filter(|dir| !dir.is_empty()) {
        return Ok(dir.into());
    }
    let dir =
        dirs::cache_dir().context("no cache directory: set HOME or MOEWE_CACHE, or compile with `moewe compile`")?;
    Ok(dir.join("moewe"))
}

/// Where the driver's compiled pipelines are kept.
pub fn pipelines_dir() -> anyhow::Result<PathBuf> {
    Ok(root()?.join("pipelines"))
}

/// Where the bundle of a checkpoint for a profile stands or will stand: a hash of the checkpoint's place and contents, the
/// profile and the compiler.
pub fn bundle_dir(checkpoint: &Checkpoint, profile: &Profile) -> anyhow::Result<PathBuf> {
    let root = root()?;
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(env!("CARGO_PKG_VERSION").as_bytes());
    add(BUILD.as_bytes());
    add(&FORMAT_VERSION.to_le_bytes());
    add(serde_json::to_string(profile)?.as_bytes());
    let place = checkpoint.dir().canonicalize().with_context(|| checkpoint.dir().display().to_string())?;
    add(place.as_os_str().as_encoded_bytes());
    for name in COMPANIONS {
        let path = checkpoint.dir().join(name);
        add(name.as_bytes());
        if path.is_file() {
            add(&fs::read(&path).with_context(|| path.display().to_string())?);
        }
    }
    let memory = root.join("hashes.json");
    // Only a shortcut: unreadable or damaged, it is made anew.
    let mut known: BTreeMap<PathBuf, Known> =
        fs::read(&memory).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let mut learned = false;
    for file in checkpoint.files() {
        interrupt::check()?;
        let metadata = fs::metadata(&file.path).with_context(|| file.path.display().to_string())?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |time| time.as_nanos());
        let bytes = file.bytes.len() as u64;
        let path = file.path.canonicalize().unwrap_or_else(|_| file.path.clone());
        let remembered = known.get(&path).filter(|k| bytes > LARGE && k.bytes == bytes && k.modified_ns == modified_ns);
        let hash = remembered.map_or_else(|| hash_file(&file.bytes), |k| k.blake3.clone());
        if bytes > LARGE && remembered.is_none() {
            known.insert(path, Known { bytes, modified_ns, blake3: hash.clone() });
            learned = true;
        }
        add(hash.as_bytes());
    }
    if learned {
        fs::create_dir_all(&root).with_context(|| root.display().to_string())?;
        let partial = root.join(format!("hashes.json.{}", std::process::id()));
        fs::write(&partial, serde_json::to_vec_pretty(&known)?).with_context(|| partial.display().to_string())?;
        fs::rename(&partial, &memory).with_context(|| memory.display().to_string())?;
    }
    Ok(root.join("bundles").join(&hasher.finalize().to_hex()[..32]))
}

/// Keeps other processes from compiling the same bundle meanwhile, and clears away what ones that were killed left.
pub fn lock(bundle: &Path) -> anyhow::Result<File> {
    let (parent, name) = (bundle.parent().unwrap_or(bundle), bundle.file_name().unwrap_or_default().to_string_lossy());
    let written = |path: &Path| format!("cannot write to the cache: {}", path.display());
    fs::create_dir_all(parent).with_context(|| written(parent))?;
    let path = parent.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| written(&path))?;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => interrupt::check()?,
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| written(&path)),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let partial = format!(".{name}.partial-");
    for entry in fs::read_dir(parent).with_context(|| written(parent))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&partial) {
            let _ = fs::remove_dir_all(entry.path()); // it only takes room
        }
    }
    Ok(file)
}

/// Changes whenever this program is built anew from other sources, so that a cached bundle always comes from the compiler
/// that reads it.
const BUILD: &str = env!("MOEWE_BUILD");
