//! Header of one safetensors file, read with the distrust that a downloaded file deserves.
//!
//! Layout: 8 bytes little-endian header length n, n bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`
//! (offsets count from the end of the header), then the data, without gaps or overlaps, to the end of the file.

use std::{collections::HashSet, fmt, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};

use crate::dtype::Dtype;
use crate::error::{Error, Result, clip};

/// Longest header accepted; the same limit as the reference implementation's.
const MAX_HEADER: u64 = 100_000_000;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// One tensor of a file. `offset` counts from the beginning of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) offset: usize,
    pub(super) len: usize,
}

/// Parses and checks the header of `file`, all of the bytes of `path`. Entries come in the order of their data.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Vec<Entry>> {
    let damaged = |detail: String| Error::Safetensors { path: path.to_owned(), detail };
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(damaged(format!("{} bytes are too few for a safetensors file", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(damaged(format!("header length {length} is absurd, at most {MAX_HEADER} bytes are allowed")));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return Err(damaged(format!(
            "header length {length} goes beyond the end of the file, which has {} bytes",
            file.len()
        )));
    };
    if header.first() != Some(&b'{') {
        return Err(damaged("the header does not begin with `{`".into()));
    }
    let Header(raw) =
        serde_json::from_slice(header).map_err(|e| damaged(format!("header: {}", clip(&e.to_string()))))?;

    let start = 8 + length as usize;
    let mut names = HashSet::with_capacity(raw.len());
    let mut entries = Vec::with_capacity(raw.len());
    for (name, raw) in &raw {
        if !names.insert(name.as_str()) {
            return Err(entry_error(path, name, "occurs twice in the header".into()));
        }
        entries.push(check_entry(path, name, raw, start, data.len())?);
    }
    entries.sort_by_key(|e| (e.offset, e.len));
    check_coverage(path, &entries, start, file.len())?;
    Ok(entries)
}

fn entry_error(path: &Path, name: &str, detail: String) -> Error {
    Error::Entry { path: path.to_owned(), tensor: clip(name), detail }
}

/// Checks one entry on its own: known dtype, byte range inside the data and as long as shape and dtype say.
fn check_entry(path: &Path, name: &str, raw: &RawEntry, start: usize, available: usize) -> Result<Entry> {
    let bad = |detail| entry_error(path, name, detail);
    let Some(dtype) = Dtype::from_safetensors(&raw.dtype) else {
        return Err(bad(format!("unknown dtype \"{}\"", clip(&raw.dtype))));
    };
    if raw.shape.len() > MAX_RANK {
        return Err(bad(format!("{} dimensions, at most {MAX_RANK} are supported", raw.shape.len())));
    }
    let [begin, end] = raw.data_offsets;
    if begin > end {
        return Err(bad(format!("data begins at byte {begin} and ends before that, at {end}")));
    }
    if end > available as u64 {
        return Err(bad(format!(
            "data ends at byte {end} but the file holds only {available} bytes of data (truncated)"
        )));
    }
    let bits = raw.shape.iter().try_fold(dtype.bits() as u64, |n, d| n.checked_mul(*d));
    if bits.map(|b| (b % 8, b / 8)) != Some((0, end - begin)) {
        return Err(bad(format!("shape {:?} of {dtype} does not fill the stated {} bytes", raw.shape, end - begin)));
    }
    Ok(Entry {
        name: name.to_owned(),
        dtype,
        shape: raw.shape.iter().map(|d| *d as usize).collect(),
        offset: start + begin as usize,
        len: (end - begin) as usize,
    })
}

/// Checks that entries, sorted by offset, cover the data exactly.
fn check_coverage(path: &Path, entries: &[Entry], start: usize, file_len: usize) -> Result<()> {
    let mut end = start;
    let mut last = "";
    for entry in entries {
        if entry.offset < end {
            let detail = format!("its bytes overlap those of tensor `{}`", clip(last));
            return Err(entry_error(path, &entry.name, detail));
        }
        if entry.offset > end {
            let detail = format!("{} bytes before it belong to no tensor", entry.offset - end);
            return Err(entry_error(path, &entry.name, detail));
        }
        end = entry.offset + entry.len;
        last = &entry.name;
    }
    if end != file_len {
        let detail = format!("{} bytes after the last tensor belong to no tensor", file_len - end);
        return Err(Error::Safetensors { path: path.to_owned(), detail });
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Name–entry pairs as written, repetitions included.
struct Header(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut pairs = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry =
                        map.next_value().map_err(|e| A::Error::custom(format!("tensor `{}`: {e}", clip(&name))))?;
                    pairs.push((name, entry));
                }
                Ok(Header(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
