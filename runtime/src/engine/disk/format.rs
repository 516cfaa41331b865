//! The file of a page: what is in it, and how it is read without trusting it.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `moewepag` |
//! | 4 | version of this format, 1 |
//! | 4 | 1 if the page has the draft modules' latents too, else 0 |
//! | 32 | hash of the model |
//! | 32 | key of the page |
//! | 32 | key of the page before it, zero for the first |
//! | 256 | its 64 tokens |
//! | 8 | bytes of latents |
//! | … | latents |
//! | 32 | BLAKE3 of all before |
//!
//! Numbers are little-endian. A reader knows all of the header beforehand but for the flag, so it compares instead of
//! parsing, and no length in a file is ever believed.

use std::io::{self, Read, Write};

use moewe_plan::PAGE_TOKENS;

use super::DiskPage;

/// Tokens of a page.
const TOKENS: usize = PAGE_TOKENS as usize;
const MAGIC: [u8; 8] = *b"moewepag";
const VERSION: u32 = 1;
/// Bytes before the latents.
pub(super) const HEADER: usize = 8 + 4 + 4 + 3 * 32 + 4 * TOKENS + 8;
/// Bytes of the hash behind them.
const CHECKSUM: usize = 32;

/// Names a text of full pages, by a hash of the model and of all its tokens. The default is the text without tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Key of the last page; zero if there is none.
    key: [u8; 32],
}

impl Chain {
    /// This text and one more page.
    pub(super) fn next(&self, model: &[u8; 32], tokens: &[u32; TOKENS]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(model).update(&self.key).update(&little_endian(tokens));
        Self { key: hasher.finalize().into() }
    }

    /// Key of its last page.
    pub(super) fn key(&self) -> [u8; 32] {
        self.key
    }
}

/// The first bytes of a page's file.
#[derive(Clone, Debug)]
pub(super) struct Header {
    bytes: [u8; HEADER],
    /// Bytes of latents.
    page_bytes: usize,
}

/// Where the flag is.
const DRAFTED: std::ops::Range<usize> = 12..16;

impl Header {
    /// The header of the page that makes the text `before` the text `page`, without the draft modules' latents.
    pub(super) fn new(
        model: &[u8; 32],
        before: &Chain,
        page: &Chain,
        tokens: &[u32; TOKENS],
        page_bytes: usize,
    ) -> Self {
        let mut bytes = [0; HEADER];
        let fields: [&[u8]; 8] = [
            &MAGIC,
            &VERSION.to_le_bytes(),
            &[0; DRAFTED.end - DRAFTED.start],
            model,
            &page.key,
            &before.key,
            &little_endian(tokens),
            &(page_bytes as u64).to_le_bytes(),
        ];
        let mut rest = &mut bytes[..];
        for field in fields {
            let (place, behind) = rest.split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = behind;
        }
        Self { bytes, page_bytes }
    }

    /// The same with the flag.
    pub(super) fn drafted(mut self, drafted: bool) -> Self {
        self.bytes[DRAFTED].copy_from_slice(&u32::from(drafted).to_le_bytes());
        self
    }

    /// Reads as many bytes and says whether they are these, and if so, what the flag is.
    pub(super) fn read_flag(&self, file: &mut impl Read) -> io::Result<Option<bool>> {
        let mut found = [0; HEADER];
        file.read_exact(&mut found)?;
        Ok([false, true].into_iter().find(|&flag| self.clone().drafted(flag).bytes == found))
    }

    /// Reads a page behind this header. `None` if anything is not as it must be.
    pub(super) fn read_page(&self, file: &mut impl Read) -> io::Result<Option<DiskPage>> {
        let Some(drafted) = self.read_flag(file)? else { return Ok(None) };
        let mut bytes = vec![0; self.page_bytes];
        file.read_exact(&mut bytes)?;
        let mut checksum = [0; CHECKSUM];
        file.read_exact(&mut checksum)?;
        let more = file.read(&mut [0])? > 0;
        let whole = !more && self.clone().drafted(drafted).checksum(&bytes) == checksum;
        Ok(whole.then_some(DiskPage { bytes, drafted }))
    }

    /// Writes the file of a page with these latents.
    pub(super) fn write_page(&self, file: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
        file.write_all(&self.bytes)?;
        file.write_all(bytes)?;
        file.write_all(self.checksum(bytes).as_bytes())
    }

    fn checksum(&self, bytes: &[u8]) -> blake3::Hash {
        blake3::Hasher::new().update(&self.bytes).update(bytes).finalize()
    }
}

/// Length of the file of a page with so many bytes of latents.
pub(super) fn file_bytes(page_bytes: usize) -> u64 {
    (HEADER + CHECKSUM) as u64 + page_bytes as u64
}

fn little_endian(tokens: &[u32; TOKENS]) -> [u8; 4 * TOKENS] {
    let mut bytes = [0; 4 * TOKENS];
    for (place, token) in bytes.chunks_exact_mut(4).zip(tokens) {
        place.copy_from_slice(&token.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_models_texts_and_places_apart() {
        let (root, a, b) = (Chain::default(), [1; 32], [2; 32]);
        let (one, two) = ([1; TOKENS], [2; TOKENS]);
        let [a1, a2, b1] = [root.next(&a, &one), root.next(&a, &two), root.next(&b, &one)];
        let keys = [root, a1.next(&a, &two), a2.next(&a, &one), a1.next(&b, &two), b1.next(&a, &two), a1, a2, b1];
        for (i, x) in keys.iter().enumerate() {
            assert_eq!(keys.iter().position(|y| x == y), Some(i));
        }
    }

    #[test]
    fn no_length_of_a_file_is_believed() {
        let (model, before) = ([3; 32], Chain::default());
        let tokens = std::array::from_fn(|i| i as u32);
        let header = Header::new(&model, &before, &before.next(&model, &tokens), &tokens, 10);
        let mut file = Vec::new();
        header.clone().drafted(true).write_page(&mut file, b"0123456789").unwrap();
        assert_eq!(file.len() as u64, file_bytes(10));
        let page = header.read_page(&mut &file[..]).unwrap().unwrap();
        assert_eq!((&page.bytes[..], page.drafted), (&b"0123456789"[..], true));
        // A file that says it is larger than any memory, with a checksum that agrees.
        let mut huge = file[..HEADER + 10].to_vec();
        huge[HEADER - 8..HEADER].copy_from_slice(&u64::MAX.to_le_bytes());
        let checksum = blake3::hash(&huge);
        huge.extend(checksum.as_bytes());
        assert!(header.read_page(&mut &huge[..]).unwrap().is_none());
        // One with more behind it.
        file.push(0);
        assert!(header.read_page(&mut &file[..]).unwrap().is_none());
    }
}
