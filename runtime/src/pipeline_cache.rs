//! What a driver made of kernels, kept in a file for the next start.
//!
//! A file is `MAGIC`, 32 bytes BLAKE3 of the device's identity and the data, 8 bytes length of the data, and the data as
//! the driver gave it. A file that is short, altered or another device's is ignored and written anew. Nothing about the
//! file is ever an error: without it kernels are only compiled again.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Gpu;

/// Its last byte is the version of this format.
const MAGIC: [u8; 8] = *b"moewePC1";
const HASH_BYTES: usize = 32;
const HEADER_BYTES: usize = MAGIC.len() + HASH_BYTES + 8;
/// A larger file is not read but begun anew: what is in it from other models and versions never leaves otherwise.
const MAX_BYTES: u64 = 256 << 20;

/// The pipeline cache of a device and the file it is kept in.
#[derive(Debug)]
pub(crate) struct PipelineCache {
    pub(crate) raw: wgpu::PipelineCache,
    path: PathBuf,
    identity: Vec<u8>,
    /// The hash of what stands in the file, as far as is known.
    stored: Mutex<Option<[u8; HASH_BYTES]>>,
}

impl PipelineCache {
    /// The cache of a device in a directory, filled from its file there; `None` if the device can have none.
    pub(crate) fn open(gpu: &Gpu, info: &wgpu::AdapterInfo, dir: &Path) -> Option<Self> {
        let path = dir.join(wgpu::util::pipeline_cache_key(info)?);
        let identity = identity(info);
        let found = read(&path, &identity);
        let (data, hash) = found.as_ref().map_or((None, None), |(data, hash)| (Some(data.as_slice()), Some(*hash)));
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("moewe"), data, fallback: true };
        // SAFETY: the data must come from `get_data` of a device like this one. `read` gives only what `save` wrote
        // after `get_data` for the same vendor, device, name and driver, and what has not changed since, by its hash. Only
        // somebody who may write to the user's cache directory could forge that, who may also change what is run.
        #[allow(unsafe_code)]
        let raw = gpu.scoped(|| unsafe { gpu.device.create_pipeline_cache(&descriptor) }).ok()?;
        Some(Self { raw, path, identity, stored: Mutex::new(hash) })
    }

    /// Where the file is.
    pub(crate) fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// Writes the file if there is something new for it.
    pub(crate) fn save(&self) {
        static SAVED: AtomicU64 = AtomicU64::new(0);
        let Some(data) = self.raw.get_data() else { return };
        let hash = digest(&self.identity, &data);
        // Held while writing, so that of two threads the later one writes last.
        let Ok(mut stored) = self.stored.lock() else { return };
        if *stored == Some(hash) {
            return;
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + data.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&hash);
        bytes.extend_from_slice(&(data.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&data);
        // Beside it first, so that nobody reads half a file. Of two processes the later one wins; what only the other had
        // is compiled once more.
        let number = SAVED.fetch_add(1, Ordering::Relaxed);
        let partial = self.path.with_extension(format!("{}-{number}", std::process::id()));
        let written = fs::create_dir_all(self.dir())
            .and_then(|()| fs::write(&partial, bytes))
            .and_then(|()| fs::rename(&partial, &self.path));
        match written {
            Ok(()) => *stored = Some(hash),
            Err(_) => drop(fs::remove_file(partial)),
        }
    }
}

/// What must be the same for data to be used again, beside what wgpu and the driver check themselves.
fn identity(info: &wgpu::AdapterInfo) -> Vec<u8> {
    let mut identity = Vec::new();
    identity.extend_from_slice(&info.vendor.to_le_bytes());
    identity.extend_from_slice(&info.device.to_le_bytes());
    for text in [&info.name, &info.driver, &info.driver_info] {
        identity.extend_from_slice(&(text.len() as u64).to_le_bytes());
        identity.extend_from_slice(text.as_bytes());
    }
    identity
}

fn digest(identity: &[u8], data: &[u8]) -> [u8; HASH_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(identity.len() as u64).to_le_bytes());
    hasher.update(identity);
    hasher.update(data);
    hasher.finalize().into()
}

/// The data of a file and its hash, if the file is sound and of this device.
fn read(path: &Path, identity: &[u8]) -> Option<(Vec<u8>, [u8; HASH_BYTES])> {
    // Asked before opening: opening a pipe would wait for a writer.
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_BYTES + 1).read_to_end(&mut bytes).ok()?;
    if bytes.len() as u64 > MAX_BYTES {
        return None;
    }
    let (header, data) = bytes.split_at_checked(HEADER_BYTES)?;
    let (magic, header) = header.split_at(MAGIC.len());
    let (hash, length) = header.split_at(HASH_BYTES);
    let sound =
        magic == MAGIC && length == (data.len() as u64).to_le_bytes() && hash == digest(identity, data).as_slice();
    if sound { Some((data.to_vec(), hash.try_into().ok()?)) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Selector;

    fn written(data: &[u8], identity: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&digest(identity, data));
        bytes.extend_from_slice(&(data.len() as u64).to_le_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn only_a_whole_file_of_the_same_device_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let sound = written(b"what the driver gave", b"this device");
        fs::write(&path, &sound).unwrap();
        assert_eq!(read(&path, b"this device").unwrap().0, b"what the driver gave");
        assert!(read(&path, b"this devicf").is_none(), "another device");
        assert!(read(&dir.path().join("none"), b"this device").is_none());
        assert!(read(dir.path(), b"this device").is_none(), "a directory");
        for at in 0..sound.len() {
            fs::write(&path, &sound[..at]).unwrap();
            assert!(read(&path, b"this device").is_none(), "cut at {at}");
            let mut flipped = sound.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(&path, &flipped).unwrap();
            assert!(read(&path, b"this device").is_none(), "flipped at {at}");
        }
        fs::write(&path, [&sound[..], b"!"].concat()).unwrap();
        assert!(read(&path, b"this device").is_none(), "longer");
        // Bytes may not wander from the identity into the data.
        fs::write(&path, written(b"e", b"devic")).unwrap();
        assert!(read(&path, b"device").is_none());
    }

    #[test]
    fn another_driver_is_another_identity() {
        let gpu =
            Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"));
        let info = gpu.handles().adapter.get_info();
        let own = identity(&info);
        let updated = wgpu::AdapterInfo { driver_info: format!("{}1", info.driver_info), ..info.clone() };
        let renamed = wgpu::AdapterInfo { name: format!("{}1", info.name), ..info.clone() };
        let swapped = wgpu::AdapterInfo { vendor: info.device, device: info.vendor, ..info.clone() };
        for other in [updated, renamed, swapped] {
            assert_ne!(identity(&other), own);
        }
    }
}
