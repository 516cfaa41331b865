//! Read-only memory maps of files.

use std::fs::File;
use std::ops::{Deref, Range};
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

    /// Waits until the bytes of `range` are in memory, and asks for the `ahead` bytes behind them. The range must lie in
    /// the file.
    pub fn fetch(&self, range: Range<usize>, ahead: usize) {
        let Some(map) = &self.0 else { return };
        // Page faults alone ask for a hundred KiB at a time, too little for a disk with a queue. That the system does not
        // know such advice costs only speed.
        #[cfg(unix)]
        let _ = map.advise_range(
            memmap2::Advice::WillNeed,
            range.start,
            (range.len() + ahead).min(map.len() - range.start),
        );
        let touched = map[range].iter().step_by(SMALLEST_PAGE).fold(0, |seen, byte| seen ^ byte);
        std::hint::black_box(touched);
    }
}

/// Bytes of the smallest page that any system has.
const SMALLEST_PAGE: usize = 4096;

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
