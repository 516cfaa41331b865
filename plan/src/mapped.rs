//! Read-only memory maps of files.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

/// A file mapped read-only into memory. Empty files map to an empty slice.
#[derive(Debug)]
pub struct Mapped(Option<memmap2::Mmap>);

impl Mapped {
    /// Maps the whole of `path`.
    ///
    /// The file must not be truncated by another program while it is mapped: the operating system would then
    /// end this program when it touches the missing part. Nothing can guard against that from inside.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        // Asked before opening: opening a pipe would wait for a writer.
        if !path.metadata()?.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the map is read-only and private to this value; the contract above covers outside changes.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self(Some(map)))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
