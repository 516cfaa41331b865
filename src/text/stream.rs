//! Decodes tokens one at a time, as they are generated.

use super::tokenizer::ModelTokenizer;

/// An incremental decoder.
///
/// A token of a byte-level vocabulary is a few bytes, which may end in the middle of a UTF-8 character. The decoder
/// holds back such an unfinished character, and nothing else, until the next token completes it. Bytes that cannot
/// become a character any more turn into U+FFFD, one for each maximal broken piece, as `String::from_utf8_lossy` does.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a ModelTokenizer,
    skip_special: bool,
    /// The beginning of a character: at most three bytes between calls.
    pending: Vec<u8>,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a ModelTokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, pending: Vec::new() }
    }

    /// Takes the next token and gives all text that is complete by now, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        if let Some(bytes) = self.tokenizer.bytes(id) {
            self.pending.extend_from_slice(&bytes);
        }
        let mut text = String::new();
        loop {
            let error = match str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text += rest;
                    self.pending.clear();
                    return text;
                }
                Err(error) => error,
            };
            let valid = error.valid_up_to();
            text += str::from_utf8(&self.pending[..valid]).expect("valid up to here");
            self.pending.drain(..valid + error.error_len().unwrap_or(0));
            if error.error_len().is_none() {
                return text;
            }
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }

    /// Ends the text: an unfinished character that was held back turns into U+FFFD.
    pub fn finish(self) -> String {
        if self.pending.is_empty() { String::new() } else { char::REPLACEMENT_CHARACTER.to_string() }
    }
}
