//! Sequences of a session: their tokens, pages, sampling parameters and what of them the device has to learn.

use moewe_plan::{Role, Sampling};

use crate::pages::pages_for;
use crate::{Error, Result, Session};

/// A sequence of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    slot: u32,
    /// Tells a sequence from an earlier one of the same slot.
    generation: u32,
}

impl SequenceId {
    /// Its row of the page table and of the sampling parameters.
    pub fn slot(self) -> u32 {
        self.slot
    }

    /// A number that no other sequence of its session has (as long as there are fewer than 2³² of them). Frames name
    /// sequences by it.
    pub fn number(self) -> u32 {
        self.generation
    }
}

#[derive(Debug)]
pub(crate) struct Sequence {
    id: SequenceId,
    /// Prompt and sampled tokens.
    pub(crate) tokens: Vec<u32>,
    /// How many of them the model has run; always fewer than all.
    pub(crate) cached: usize,
    /// Whether a draft has followed every one of them, so that the draft's own cache has no gaps.
    pub(crate) drafted: bool,
    pages: Vec<u32>,
    sampling: Sampling,
    /// Whether the device has other pages, or other sampling parameters and seen tokens.
    pages_changed: bool,
    tokens_changed: bool,
}

/// The sequences by slot.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Vec<Option<Sequence>>,
    generation: u32,
}

impl Slots {
    pub(crate) fn new(count: u32) -> Self {
        Self { slots: (0..count).map(|_| None).collect(), generation: 0 }
    }

    /// Notes that the device has to be told everything again.
    pub(crate) fn all_changed(&mut self) {
        for sequence in self.slots.iter_mut().flatten() {
            sequence.pages_changed = true;
            sequence.tokens_changed = true;
        }
    }

    pub(crate) fn by_slot(&self, slot: u32) -> Result<SequenceId> {
        let sequence = self.slots.get(slot as usize).and_then(Option::as_ref);
        sequence.map(|sequence| sequence.id).ok_or(Error::UnknownSequence { slot })
    }

    pub(crate) fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.slots.get(id.slot as usize).and_then(Option::as_ref);
        sequence.filter(|sequence| sequence.id == id).ok_or(Error::UnknownSequence { slot: id.slot })
    }

    pub(crate) fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        let sequence = self.slots.get_mut(id.slot as usize).and_then(Option::as_mut);
        sequence.filter(|sequence| sequence.id == id).ok_or(Error::UnknownSequence { slot: id.slot })
    }
}

impl Session {
    /// Adds a sequence that begins with a prompt. Nothing runs yet; see [`Session::prefill`].
    pub fn add_sequence(&mut self, prompt: &[u32], sampling: Sampling) -> Result<SequenceId> {
        check_sampling(&sampling)?;
        self.check_tokens(prompt, 0)?;
        let free = self.slots.slots.iter().position(Option::is_none);
        let slot = free.ok_or(Error::OutOfSequences { max_sequences: self.slots.slots.len() as u32 })? as u32;
        self.slots.generation = self.slots.generation.wrapping_add(1);
        let id = SequenceId { slot, generation: self.slots.generation };
        self.slots.slots[slot as usize] = Some(Sequence {
            id,
            tokens: prompt.to_vec(),
            cached: 0,
            drafted: true,
            pages: Vec::new(),
            sampling,
            pages_changed: true,
            tokens_changed: true,
        });
        Ok(id)
    }

    /// Appends tokens to a sequence, for the next turn of a conversation. A token that was sampled last and has not
    /// been run yet is run together with them by the next [`Session::prefill`].
    pub fn append(&mut self, sequence: SequenceId, tokens: &[u32]) -> Result<()> {
        let before = self.slots.get(sequence)?.tokens.len();
        self.check_tokens(tokens, before)?;
        let sequence = self.slots.get_mut(sequence)?;
        sequence.tokens.extend_from_slice(tokens);
        sequence.tokens_changed = true;
        Ok(())
    }

    /// Removes a sequence and frees its pages.
    pub fn remove_sequence(&mut self, sequence: SequenceId) -> Result<()> {
        self.slots.get(sequence)?;
        if let Some(sequence) = self.slots.slots[sequence.slot as usize].take() {
            self.pages.give_back(sequence.pages);
        }
        Ok(())
    }

    /// Forgets all tokens of a sequence behind the first `length`, of which there must be one. Frames that were made of
    /// the forgotten tokens are not taken back: see [`Session::frames`].
    pub fn rewind(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        let sequence = self.slots.get_mut(sequence)?;
        if length == 0 {
            return Err(Error::EmptyPrompt);
        }
        if length < sequence.tokens.len() {
            sequence.tokens.truncate(length);
            // The last token is run again: only a run samples what follows.
            sequence.cached = sequence.cached.min(length - 1);
            sequence.drafted |= sequence.cached == 0;
            sequence.tokens_changed = true;
        }
        Ok(())
    }

    /// Changes how the sequence's next tokens are drawn.
    pub fn set_sampling(&mut self, sequence: SequenceId, sampling: Sampling) -> Result<()> {
        check_sampling(&sampling)?;
        let sequence = self.slots.get_mut(sequence)?;
        sequence.sampling = sampling;
        sequence.tokens_changed = true;
        Ok(())
    }

    /// All tokens of a sequence, sampled ones included.
    pub fn tokens(&self, sequence: SequenceId) -> Result<&[u32]> {
        Ok(&self.slots.get(sequence)?.tokens)
    }

    /// Tokens of a sequence that the model has run, so that their latents are cached.
    pub fn cached(&self, sequence: SequenceId) -> Result<usize> {
        Ok(self.slots.get(sequence)?.cached)
    }

    /// Allocates pages so that the sequence can hold so many tokens.
    pub fn ensure(&mut self, sequence: SequenceId, tokens: usize) -> Result<()> {
        self.ensure_all(&[(sequence, tokens)])
    }

    /// Allocates pages for several sequences, or none if they do not suffice for all.
    pub(crate) fn ensure_all(&mut self, wanted: &[(SequenceId, usize)]) -> Result<()> {
        let max_context = self.model.plan().model.max_context as usize;
        let mut lengths = vec![None; self.slots.slots.len()];
        for &(id, tokens) in wanted {
            self.slots.get(id)?;
            if tokens > max_context {
                return Err(Error::ContextExceeded { tokens, max_context });
            }
            lengths[id.slot as usize] = Some(tokens);
        }
        let mut sequences: Vec<(&mut Sequence, usize)> = self
            .slots
            .slots
            .iter_mut()
            .zip(lengths)
            .filter_map(|(sequence, tokens)| Some((sequence.as_mut()?, pages_for(tokens?))))
            .collect();
        let grown = self.pages.ensure(sequences.iter_mut().map(|(sequence, pages)| (&mut sequence.pages, *pages)))?;
        for ((sequence, _), grown) in sequences.iter_mut().zip(grown) {
            sequence.pages_changed |= grown;
        }
        Ok(())
    }

    /// Tokens by which a sequence can still grow, given the context and the free pages.
    pub(crate) fn room(&self, sequence: SequenceId) -> Result<usize> {
        let sequence = self.slots.get(sequence)?;
        let pages = (sequence.pages.len() + self.pages.free()) * moewe_plan::PAGE_TOKENS as usize;
        let context = self.model.plan().model.max_context as usize;
        Ok(context.min(pages).saturating_sub(sequence.tokens.len()))
    }

    /// Uploads page table, sampling parameters and seen tokens of the sequences for which they changed.
    pub(crate) fn upload_sequences(&mut self) {
        let info = &self.model.plan().model;
        let table_width = pages_for(info.max_context as usize);
        let seen_width = info.vocab_size.div_ceil(32) as usize;
        for slot in 0..self.slots.slots.len() {
            let Some(sequence) = &self.slots.slots[slot] else { continue };
            if sequence.pages_changed {
                self.write(Role::PageTable, slot * table_width, &sequence.pages);
            }
            if sequence.tokens_changed {
                let s = &sequence.sampling;
                let [temperature, top_p, min_p, penalty] =
                    [s.temperature, s.top_p, s.min_p, s.repetition_penalty].map(f32::to_bits);
                let words = [temperature, top_p, min_p, penalty, s.top_k, s.seed_low, s.seed_high, 0];
                self.write(Role::Sampling, slot * 8, &words);
                if self.buffers.role(Role::Seen).is_some() {
                    let mut seen = vec![0; seen_width];
                    for token in &sequence.tokens {
                        seen[*token as usize / 32] |= 1u32 << (token % 32);
                    }
                    self.write(Role::Seen, slot * seen_width, &seen);
                }
            }
            if let Some(sequence) = &mut self.slots.slots[slot] {
                sequence.pages_changed = false;
                sequence.tokens_changed = false;
            }
        }
    }

    /// Whether these can follow `before` tokens.
    fn check_tokens(&self, tokens: &[u32], before: usize) -> Result<()> {
        let info = &self.model.plan().model;
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(index) = tokens.iter().position(|&token| token >= info.vocab_size) {
            return Err(Error::TokenOutOfVocabulary { index, token: tokens[index], vocab_size: info.vocab_size });
        }
        let (all, max_context) = (before.saturating_add(tokens.len()), info.max_context as usize);
        if all > max_context {
            return Err(Error::ContextExceeded { tokens: all, max_context });
        }
        Ok(())
    }
}

fn check_sampling(sampling: &Sampling) -> Result<()> {
    let checks: [(&str, f32, bool, &str); 4] = [
        ("temperature", sampling.temperature, sampling.temperature >= 0.0, "a number from 0"),
        ("top_p", sampling.top_p, sampling.top_p > 0.0 && sampling.top_p <= 1.0, "a number above 0, at most 1"),
        ("min_p", sampling.min_p, (0.0..=1.0).contains(&sampling.min_p), "a number from 0 to 1"),
        ("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0.0, "a number above 0"),
    ];
    for (field, found, sound, expected) in checks {
        if !sound || !found.is_finite() {
            return Err(Error::Sampling { field, found, expected });
        }
    }
    Ok(())
}
