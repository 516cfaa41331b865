//! What attention is computed from: tensors of a text, and which of its tokens are looked at.

use moewe_plan::TapGroup;

use crate::analysis::attention::Keys;
use crate::store::{Column, Key, Part, Sequence};

/// Tokens on each side of a map, at most; it moves by half of them.
const WINDOW: usize = 256;
/// While a text is being written, pictures of all of it are made anew every so many tokens.
pub(super) const STRIDE: usize = 64;

/// What a computation depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct OfKey {
    pub(super) sequence: u32,
    pub(super) layer: u32,
    /// The looking token, or the end of what is summed up.
    pub(super) position: usize,
    /// Rows that are held up to it.
    pub(super) held: usize,
    /// The first number of the looking query: another text may have the same number.
    pub(super) first: u32,
}

/// The tensors of a layer that attention is made of.
pub(super) struct Tensors<'a> {
    pub(super) c_kv: &'a Column,
    pub(super) k_rope: &'a Column,
    pub(super) query: &'a Column,
}

impl<'a> Tensors<'a> {
    pub(super) fn of(sequence: &'a Sequence, layer: u32, heads: u32) -> Option<Self> {
        let column = |group, part| sequence.column(Key::layer(group, layer, part));
        let found = Self {
            c_kv: column(TapGroup::Latents, Part::CKv)?,
            k_rope: column(TapGroup::Latents, Part::KRope)?,
            query: column(TapGroup::Attention, Part::Query)?,
        };
        let fits = found.query.columns() == heads as usize * (found.c_kv.columns() + found.k_rope.columns());
        fits.then_some(found)
    }

    fn held(&self, tokens: usize) -> usize {
        (0..tokens).filter(|&at| self.c_kv.has(at) && self.k_rope.has(at)).count()
    }

    pub(super) fn key(&self, sequence: &Sequence, layer: u32, position: usize) -> OfKey {
        let first = self.query.floats(position).and_then(|row| row.first()).map_or(0, |first| first.to_bits());
        OfKey { sequence: sequence.info.number, layer, position, held: self.held(position + 1), first }
    }

    pub(super) fn keys(&self, tokens: usize) -> impl FnOnce() -> Keys + Send + 'static {
        let (c_kv, k_rope) = (self.c_kv.clone(), self.k_rope.clone());
        move || Keys::gather(&c_kv, &k_rope, tokens)
    }
}

/// Layers whose queries and latents were both recorded.
pub(super) fn layers(sequence: &Sequence) -> Vec<u32> {
    let is_query = |key: &Key| key.group == TapGroup::Attention && key.part == Part::Query;
    let has_latents = |layer: &u32| sequence.column(Key::layer(TapGroup::Latents, *layer, Part::CKv)).is_some();
    sequence.keys().filter(is_query).filter_map(|key| key.layer).filter(has_latents).collect()
}

/// The looking token: the selected one, or the newest.
pub(super) fn looking(sequence: &Sequence, token: Option<u32>) -> Option<usize> {
    let last = sequence.tokens.len().checked_sub(1)?;
    Some(match token {
        Some(token) => (token as usize).min(last),
        // Not every new token is worth a computation.
        None if sequence.running => last / STRIDE * STRIDE,
        None => last,
    })
}

/// Positions that a map shows.
pub(super) fn window(position: usize, tokens: usize) -> std::ops::Range<usize> {
    let half = WINDOW / 2;
    let first = (position / half * half).saturating_sub(half).min(tokens.saturating_sub(WINDOW));
    first..(first + WINDOW).min(tokens)
}
