//! Lines of a file, one at a time and none longer than allowed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Reads the lines of a file.
pub struct Lines {
    reader: BufReader<File>,
    path: PathBuf,
    limit: u64,
    number: u64,
    buffer: Vec<u8>,
}

/// A line.
pub struct Line<'a> {
    /// Its number; the first is 1.
    pub number: u64,
    /// Its bytes, without the end of the line.
    pub bytes: &'a [u8],
    /// Whether it has an end of line.
    pub is_whole: bool,
}

impl Lines {
    /// The lines of a file from its beginning, of at most `limit` bytes each.
    pub fn new(file: File, path: &Path, limit: u64) -> Self {
        Self { reader: BufReader::new(file), path: path.into(), limit, number: 0, buffer: Vec::new() }
    }

    /// The next one.
    pub fn next(&mut self) -> anyhow::Result<Option<Line<'_>>> {
        self.buffer.clear();
        let mut reader = self.reader.by_ref().take(self.limit + 1);
        let read = reader.read_until(b'\n', &mut self.buffer).with_context(|| self.path.display().to_string())?;
        self.number += 1;
        if read == 0 {
            return Ok(None);
        }
        let is_whole = self.buffer.pop_if(|last| *last == b'\n').is_some();
        if self.buffer.len() as u64 > self.limit {
            anyhow::bail!("{}:{}: the line is longer than {} bytes", self.path.display(), self.number, self.limit);
        }
        Ok(Some(Line { number: self.number, bytes: &self.buffer, is_whole }))
    }
}
