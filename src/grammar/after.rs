//! A text that is free at first, and held to something behind a marker.

use std::sync::{Arc, OnceLock};

use moewe_runtime::engine::Constraint;

use super::vocabulary::Vocabulary;

/// A string to look for in the bytes of a text, token by token.
#[derive(Debug)]
pub(super) struct Marker {
    bytes: Vec<u8>,
    /// For each count of matched bytes, how many stay matched when the next one does not fit (Knuth, Morris, Pratt).
    failure: Vec<usize>,
    /// For each count of matched bytes, the mask of the tokens that would go on behind the marker's end.
    overruns: Vec<OnceLock<Vec<u32>>>,
}

impl Marker {
    pub fn new(marker: &str) -> Self {
        let bytes = marker.as_bytes().to_vec();
        let mut failure = vec![0; bytes.len()];
        for at in 1..bytes.len() {
            let mut matched = failure[at - 1];
            while matched > 0 && bytes[at] != bytes[matched] {
                matched = failure[matched - 1];
            }
            failure[at] = matched + usize::from(bytes[at] == bytes[matched]);
        }
        let overruns = (0..bytes.len()).map(|_| OnceLock::new()).collect();
        Self { bytes, failure, overruns }
    }

    /// Reads `text` with `matched` bytes of the marker behind it: how many are matched then and, once all are, how
    /// much of `text` is left.
    fn read<'a>(&self, mut matched: usize, text: &'a [u8]) -> (usize, Option<&'a [u8]>) {
        for (at, byte) in text.iter().enumerate() {
            while matched > 0 && *byte != self.bytes[matched] {
                matched = self.failure[matched - 1];
            }
            matched += usize::from(*byte == self.bytes[matched]);
            if matched == self.bytes.len() {
                return (matched, Some(&text[at + 1..]));
            }
        }
        (matched, None)
    }

    fn overruns(&self, matched: usize, vocabulary: &Vocabulary) -> &[u32] {
        self.overruns[matched].get_or_init(|| {
            let mut mask = vec![0; vocabulary.free().len()];
            for id in 0..vocabulary.len() {
                if self.read(matched, vocabulary.spelling(id)).1.is_some_and(|rest| !rest.is_empty()) {
                    mask[id as usize / 32] |= 1 << (id % 32);
                }
            }
            mask
        })
    }
}

/// Free until the text has the marker, then held to another constraint.
#[derive(Debug)]
pub(super) struct After {
    vocabulary: Arc<Vocabulary>,
    marker: Arc<Marker>,
    matched: usize,
    /// Whether the text may end before the marker.
    optional: bool,
    state: State,
    inner: Box<dyn Constraint>,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Before,
    Behind,
    /// Ended before the marker came.
    Ended,
}

impl After {
    pub fn new(vocabulary: Arc<Vocabulary>, marker: Arc<Marker>, optional: bool, inner: Box<dyn Constraint>) -> Self {
        let state = if marker.bytes.is_empty() { State::Behind } else { State::Before };
        Self { vocabulary, marker, matched: 0, optional, state, inner }
    }
}

impl Constraint for After {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        if self.state == State::Behind {
            return self.inner.allowed(mask);
        }
        // A token that ends the marker and goes on would escape the constraint.
        let overruns = self.marker.overruns(self.matched, &self.vocabulary);
        for ((word, free), overrun) in mask.iter_mut().zip(self.vocabulary.free()).zip(overruns) {
            *word = free & !overrun;
        }
        if self.optional {
            for id in self.vocabulary.eos() {
                mask[*id as usize / 32] |= 1 << (id % 32);
            }
        }
        Ok(())
    }

    fn drawn(&mut self, token: u32) -> Result<(), String> {
        if self.state == State::Behind {
            return self.inner.drawn(token);
        }
        if self.vocabulary.eos().contains(&token) {
            self.state = State::Ended;
            return Ok(());
        }
        let (matched, rest) = self.marker.read(self.matched, self.vocabulary.spelling(token));
        self.matched = matched;
        match rest {
            None => Ok(()),
            Some([]) => {
                self.state = State::Behind;
                Ok(())
            }
            Some(_) => Err(format!("token {token} goes on behind the marker, which its mask did not allow")),
        }
    }

    fn ended(&self) -> bool {
        match self.state {
            State::Before => false,
            State::Behind => self.inner.ended(),
            State::Ended => true,
        }
    }
}
