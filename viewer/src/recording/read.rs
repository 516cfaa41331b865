//! Opening a recording: which chunks it has and where. Only lines are read; chunks are when they are wanted.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::Deserialize;

use super::decode::{self, Told};
use super::{CHUNK, Error, HEAD, Kind, Line, MAX_CHUNK, MAX_HEAD, MAX_LINE, SEAL_BYTES, VERSION, is_sound};
use crate::subject::Subject;

/// Places that are tried as the beginning of a chunk behind damaged bytes, in the whole file.
const MAX_TRIES: usize = 256;
/// Warnings that are listed; the rest is counted.
const MAX_WARNINGS: usize = 20;

/// Where in the file things are.
pub(super) struct Layout {
    pub(super) path: PathBuf,
    pub(super) subject: Subject,
    pub(super) chunks: Vec<ChunkAt>,
    /// Tokens in all chunks.
    pub(super) tokens: u64,
    /// Where the next chunk may be written: the end of the file, or the beginning of a chunk that was cut off.
    pub(super) end: u64,
    /// One more than the highest number of a text and of a frame.
    pub(super) next: (u32, u64),
    file: Mutex<File>,
}

/// Where a chunk is, as its line says. Whether that is true shows when the chunk is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChunkAt {
    kind: Kind,
    /// Its first byte, that of the line.
    pub(super) at: u64,
    line: u64,
    bytes: u64,
    /// Tokens of the chunks before it.
    pub(super) first: u64,
    pub(super) tokens: u64,
}

/// What is needed of a line to find the next one.
#[derive(Deserialize)]
struct Place {
    kind: Kind,
    bytes: u64,
    #[serde(default)]
    tokens: u64,
    #[serde(default)]
    frames: Option<(u64, u64)>,
    #[serde(default)]
    sequences: Option<(u32, u32)>,
}

#[derive(Deserialize)]
struct Head {
    version: u64,
}

#[derive(Deserialize)]
struct WholeHead {
    subject: Subject,
}

impl Layout {
    pub(super) fn open(path: &Path) -> Result<(Self, Vec<String>), Error> {
        let meta = std::fs::metadata(path).map_err(Error::read(path))?;
        if !meta.is_file() {
            return Err(Error::NotARecording { path: path.into(), what: "expected a regular file".into() });
        }
        let file = File::open(path).map_err(Error::read(path))?;
        let (mut subject, end) = head(path, &file)?;
        let mut scan = Scan { path, file: BufReader::new(file), len: meta.len(), tries: 0, warnings: Vec::new() };
        let Found { chunks, end, next } = scan.chunks(end)?;
        let mut warnings = scan.warnings;
        let tokens = chunks.last().map_or(0, |chunk| chunk.first + chunk.tokens);
        let mut file = scan.file.into_inner();
        match chunks.iter().find(|chunk| chunk.kind == Kind::Subject) {
            None => warnings.push("the texts of tokens and the biases of experts are missing".into()),
            Some(chunk) => {
                let read =
                    read_chunk(&mut file, chunk).and_then(|(_, bytes)| decode::fill_subject(&bytes, &mut subject));
                if let Err(what) = read {
                    warnings.push(format!(
                        "byte {}: the texts of tokens and the biases of experts cannot be read: {what}",
                        chunk.at
                    ));
                }
            }
        }
        if warnings.len() > MAX_WARNINGS {
            let more = warnings.len() - MAX_WARNINGS;
            warnings.truncate(MAX_WARNINGS);
            warnings.push(format!("and {more} more of this kind"));
        }
        let (path, file) = (path.into(), Mutex::new(file));
        Ok((Self { path, subject, chunks, tokens, end, next, file }, warnings))
    }

    /// What happened in a chunk; nothing for one that tells of the model.
    pub(super) fn read(&self, chunk: &ChunkAt) -> Result<Vec<Told>, String> {
        if chunk.kind == Kind::Subject {
            return Ok(Vec::new());
        }
        let (line, bytes) = {
            let mut file = self.file.lock().map_err(|_| "another reader failed".to_owned())?;
            read_chunk(&mut file, chunk)?
        };
        decode::events(line, &bytes, &self.subject)
    }
}

/// Why a first line says nothing.
pub(super) enum BadHead {
    /// It is the line of something else.
    Other(String),
    /// It is of another version.
    Version(u64),
    /// It is not what was written.
    Damaged(String),
}

impl BadHead {
    fn of(self, path: &Path) -> Error {
        let path = path.into();
        match self {
            Self::Other(what) => Error::NotARecording { path, what },
            Self::Version(found) => Error::Version { path, found },
            Self::Damaged(what) => Error::Damaged { path, what },
        }
    }
}

/// The first line's subject, and where the line ends.
fn head(path: &Path, file: &File) -> Result<(Subject, u64), Error> {
    let mut reader = BufReader::new(file);
    let mut start = vec![0; HEAD.len()];
    let found = read_up_to(&mut reader, &mut start).map_err(Error::read(path))?;
    start.truncate(found);
    if start == HEAD.as_bytes() {
        reader.take(MAX_HEAD).read_until(b'\n', &mut start).map_err(Error::read(path))?;
    }
    let subject = parse_head(&start).map_err(|bad| bad.of(path))?;
    Ok((subject, start.len() as u64))
}

/// What a first line says, which ends with its newline.
pub(super) fn parse_head(line: &[u8]) -> Result<Subject, BadHead> {
    let damaged = |error: serde_json::Error| BadHead::Damaged(format!("first line: {error}"));
    if line.is_empty() {
        return Err(BadHead::Other("it is empty".into()));
    } else if !HEAD.as_bytes().starts_with(&line[..line.len().min(HEAD.len())]) {
        return Err(BadHead::Other("it does not begin as one".into()));
    } else if line.last() != Some(&b'\n') {
        let what = format!("it ends in its first line, after {} bytes, so nothing can be read", line.len());
        return Err(BadHead::Damaged(what));
    }
    let version = serde_json::from_slice::<Head>(line).map_err(damaged)?;
    if version.version != u64::from(VERSION) {
        return Err(BadHead::Version(version.version));
    }
    if !is_sound(line, &[]) {
        let what = "its first line is not what was written (the hash differs), so nothing can be read";
        return Err(BadHead::Damaged(what.into()));
    }
    let head: WholeHead = serde_json::from_slice(line).map_err(damaged)?;
    super::check_subject(&head.subject).map_err(|what| BadHead::Damaged(format!("first line: {what}")))?;
    Ok(head.subject)
}

fn read_up_to(reader: &mut impl Read, bytes: &mut [u8]) -> std::io::Result<usize> {
    let mut found = 0;
    while found < bytes.len() {
        match reader.read(&mut bytes[found..])? {
            0 => break,
            more => found += more,
        }
    }
    Ok(found)
}

/// A chunk's line and its bytes, if they are what was written.
fn read_chunk(file: &mut File, chunk: &ChunkAt) -> Result<(Line, Vec<u8>), String> {
    let mut all = vec![0; (chunk.line + chunk.bytes) as usize];
    file.seek(SeekFrom::Start(chunk.at)).map_err(|error| error.to_string())?;
    file.read_exact(&mut all).map_err(|error| error.to_string())?;
    let bytes = all.split_off(chunk.line as usize);
    if !is_sound(&all, &bytes) {
        return Err("it is not what was written (the hash differs)".into());
    }
    let line = serde_json::from_slice(&all).map_err(|error| error.to_string())?;
    Ok((line, bytes))
}

/// A walk over the lines of a file.
struct Scan<'a> {
    path: &'a Path,
    file: BufReader<File>,
    len: u64,
    tries: usize,
    warnings: Vec<String>,
}

/// Chunks, the place for another one, and the first free numbers of texts and frames.
struct Found {
    chunks: Vec<ChunkAt>,
    end: u64,
    next: (u32, u64),
}

/// Why there is no chunk at a place.
enum NoChunk {
    /// The file ends in it.
    Torn,
    /// Something else stands there.
    Other,
}

impl Scan<'_> {
    /// What there is behind the first line.
    fn chunks(&mut self, mut at: u64) -> Result<Found, Error> {
        let mut chunks: Vec<ChunkAt> = Vec::new();
        let mut end = self.len;
        let mut next = (0, 0);
        let mut first = 0u64;
        while at < self.len {
            match self.chunk(at)? {
                Ok((place, line)) => {
                    let (kind, bytes, tokens) = (place.kind, place.bytes, place.tokens);
                    chunks.push(ChunkAt { kind, at, line, bytes, first, tokens });
                    first += tokens;
                    next.0 = next.0.max(place.sequences.map_or(0, |(_, last)| last.saturating_add(1)));
                    next.1 = next.1.max(place.frames.map_or(0, |(_, last)| last.saturating_add(1)));
                    at += line + bytes;
                }
                Err(why) => {
                    let found = self.next_chunk(at + 1)?;
                    let lost = found.unwrap_or(self.len) - at;
                    self.warnings.push(match (found, why) {
                        (None, NoChunk::Torn) if self.tries < MAX_TRIES => {
                            end = at;
                            format!(
                                "the recording was cut off: its last {lost} bytes, from byte {at}, are no whole chunk"
                            )
                        }
                        _ => format!("byte {at}: {lost} bytes are damaged and left out"),
                    });
                    match found {
                        Some(found) => at = found,
                        None => break,
                    }
                }
            }
        }
        Ok(Found { chunks, end, next })
    }

    /// The chunk that begins at a place, and the length of its line.
    fn chunk(&mut self, at: u64) -> Result<Result<(Place, u64), NoChunk>, Error> {
        self.file.seek(SeekFrom::Start(at)).map_err(Error::read(self.path))?;
        let mut line = Vec::new();
        let reader = &mut self.file;
        reader.take(MAX_LINE).read_until(b'\n', &mut line).map_err(Error::read(self.path))?;
        let left = self.len - at;
        if line.last() != Some(&b'\n') {
            return Ok(Err(if line.len() as u64 == left { NoChunk::Torn } else { NoChunk::Other }));
        }
        let Ok(place) = serde_json::from_slice::<Place>(&line) else { return Ok(Err(NoChunk::Other)) };
        let length = line.len() as u64;
        // Each token takes at least 13 bytes; a line that claims more would make the time slider absurdly long.
        let is_sound = line.len() > SEAL_BYTES && place.bytes <= MAX_CHUNK && place.tokens <= place.bytes / 13;
        Ok(match is_sound {
            false => Err(NoChunk::Other),
            true if length + place.bytes > left => Err(NoChunk::Torn),
            true => Ok((place, length)),
        })
    }

    /// The next place from `at` on where a chunk begins, as far as one can see from its line.
    fn next_chunk(&mut self, mut at: u64) -> Result<Option<u64>, Error> {
        let mark = CHUNK.as_bytes();
        let mut block = vec![0; 64 << 10];
        while at < self.len && self.tries < MAX_TRIES {
            self.file.seek(SeekFrom::Start(at)).map_err(Error::read(self.path))?;
            let found = read_up_to(&mut self.file, &mut block).map_err(Error::read(self.path))?;
            let mut starts = block[..found].windows(mark.len()).enumerate().filter(|(_, window)| *window == mark);
            match starts.next() {
                Some((start, _)) => {
                    at += start as u64;
                    self.tries += 1;
                    if self.chunk(at)?.is_ok() {
                        return Ok(Some(at));
                    }
                    at += 1;
                }
                None if found < mark.len() => break,
                None => at += (found - mark.len() + 1) as u64,
            }
        }
        Ok(None)
    }
}
