//! The file of results, which a call goes on with where an earlier one was stopped.

use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use moewe::text::Text;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::lines::{Line, Lines};
use super::requests::{Hash, Numbered};
use crate::cli::generate::Outcome;
use crate::cli::{interrupt, one_line, usage};

/// Longest line, in bytes: the longest text with the tokens beside it, generously.
const MAX_LINE: u64 = 1 << 30;

/// How every result begins.
const BEGINNING: &[u8] = b"{\"line\":";

/// The file, locked and ready for more lines.
pub struct Results {
    file: File,
    path: PathBuf,
}

/// What must be known of a result to go on.
#[derive(Deserialize)]
struct Known {
    line: u64,
    request: String,
    error: Option<Value>,
}

impl Results {
    /// Opens or makes the file at `path` for the requests of `batch`. Returns the lines of the requests that are done.
    /// What failed is taken out, and so is a last line that was not written whole.
    pub fn open(path: &Path, batch: &Path, hashes: &[Option<Hash>]) -> anyhow::Result<(Self, HashSet<u64>)> {
        let file = lock(path)?;
        let place = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        if File::open(batch).and_then(|batch| Ok(place(&batch)? == place(&file)?)).unwrap_or(false) {
            return usage(format!("{}: is the batch itself; give another --out", path.display()));
        }
        let mut done = HashSet::new();
        let mut failed = HashSet::new();
        let mut end = 0;
        read(&file, path, |Line { number, bytes, is_whole }| {
            let foreign = |what: &str| {
                usage(format!(
                    "{}:{number}: {what} {}; give another --out, or remove the file",
                    path.display(),
                    batch.display()
                ))
            };
            if !is_whole && bytes.iter().zip(BEGINNING).all(|(a, b)| a == b) {
                return Ok(()); // it was being written when the process died
            }
            let Ok(known) = serde_json::from_slice::<Known>(bytes) else { return foreign("is no result of") };
            let hash = usize::try_from(known.line.wrapping_sub(1)).ok().and_then(|index| *hashes.get(index)?);
            if hash.map(word) != Some(known.request) {
                return foreign("is of another model, with other options, or of another request than is now in");
            }
            let lines = if known.error.is_some() { &mut failed } else { &mut done };
            lines.insert(known.line);
            end += bytes.len() as u64 + 1;
            Ok(())
        })?;
        file.set_len(end).with_context(|| cannot_write(path))?;
        let file = if failed.is_empty() { file } else { without_failed(file, path)? };
        Ok((Self { file, path: path.into() }, done))
    }

    /// Writes what a request has brought.
    pub fn done(&mut self, request: &Numbered, outcome: &Outcome, text: Option<&Text>) -> anyhow::Result<()> {
        self.write(&json!({
            "line": request.number,
            "id": request.id,
            "request": word(request.hash),
            "text": text.map(|text| text.decode(&outcome.tokens, true)),
            "tokens": outcome.tokens,
            "stop_reason": outcome.stop_reason.name(),
            "prompt_tokens": outcome.prompt_tokens,
            "cached_tokens": outcome.cached_tokens,
            "timing": outcome.timing(),
        }))
    }

    /// Writes why a request has failed.
    pub fn failed(&mut self, request: &Numbered, error: &anyhow::Error) -> anyhow::Result<()> {
        self.write(&json!({
            "line": request.number,
            "id": request.id,
            "request": word(request.hash),
            "error": one_line(error),
        }))
    }

    /// A line is written at once, so that a process that is killed leaves whole lines but for the last.
    fn write(&mut self, line: &Value) -> anyhow::Result<()> {
        let written = self.file.write_all((line.to_string() + "\n").as_bytes()).and_then(|()| self.file.flush());
        written.with_context(|| cannot_write(&self.path))
    }
}

/// A hash as results have it.
fn word(hash: Hash) -> String {
    format!("{hash:016x}")
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// Opens the file, made if missing, for this process alone.
fn lock(path: &Path) -> anyhow::Result<File> {
    loop {
        if path.exists() && !path.is_file() {
            return usage(format!("{}: is no plain file; --out is where results are kept", path.display()));
        }
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = file.with_context(|| cannot_write(path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                anyhow::bail!("{}: another process writes results to it; wait, or give another --out", path.display())
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| cannot_write(path)),
        }
        // Whoever had it locked may have put another file in its place meanwhile.
        let (ours, there) = (file.metadata(), path.metadata());
        if matches!((ours, there), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino())) {
            return Ok(file);
        }
    }
}

/// Reads all lines.
fn read(file: &File, path: &Path, mut take: impl FnMut(Line) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut copy = file.try_clone().with_context(|| path.display().to_string())?;
    copy.rewind().with_context(|| path.display().to_string())?;
    let mut lines = Lines::new(copy, path, MAX_LINE);
    while let Some(line) = lines.next()? {
        interrupt::check()?;
        take(line)?;
    }
    Ok(())
}

/// Puts a file without the failed requests in the place of this one. It is there whole or not at all.
fn without_failed(file: File, path: &Path) -> anyhow::Result<File> {
    // A link stays one.
    let path = &path.canonicalize().with_context(|| cannot_write(path))?;
    let mut other = NamedTempFile::new_in(path.parent().unwrap_or(path)).with_context(|| cannot_write(path))?;
    other.as_file().try_lock().with_context(|| cannot_write(path))?;
    read(&file, path, |line| {
        if serde_json::from_slice::<Known>(line.bytes).is_ok_and(|known| known.error.is_none()) {
            other.write_all(&[line.bytes, b"\n"].concat()).with_context(|| cannot_write(path))?;
        }
        Ok(())
    })?;
    let permissions = file.metadata().with_context(|| cannot_write(path))?.permissions();
    other.as_file().set_permissions(permissions).with_context(|| cannot_write(path))?;
    other.as_file().sync_all().with_context(|| cannot_write(path))?;
    // The old one stays locked until the new one is in its place.
    let other = other.persist(path).with_context(|| cannot_write(path));
    drop(file);
    other
}
