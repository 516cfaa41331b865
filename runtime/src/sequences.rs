//! Sequences of a session: their tokens, pages, sampling parameters and what of them the device has to learn.

use moewe_plan::{Role, Sampling};

use crate::constraints::Constraints;
use crate::pages::{Page, pages_for};
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
    /// What was drafted behind the tokens and is verified by the next step.
    pub(crate) drafts: Vec<u32>,
    /// How the latents of modules of multi-token prediction came about.
    pub(crate) module_cache: ModuleCache,
    pub(crate) pages: Vec<Page>,
    sampling: Sampling,
    pub(crate) constraints: Constraints,
    pub(crate) changed: Changed,
}

/// Of what the device has an older state, besides constraints.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Changed {
    pages: bool,
    /// Sampling parameters, with the bits of the constraints.
    pub(crate) sampling: bool,
    /// Seen tokens and holes.
    tokens: bool,
}

impl Changed {
    const ALL: Self = Self { pages: true, sampling: true, tokens: true };
    const NOTHING: Self = Self { pages: false, sampling: false, tokens: false };
}

impl Sequence {
    /// Makes a beginning from elsewhere its own.
    pub(crate) fn begin_with(&mut self, pages: Vec<Page>, tokens: usize, drafted: bool) {
        self.pages = pages;
        self.changed.pages = true;
        self.cached = tokens;
        self.drafted = tokens == 0;
        let known = ModuleCache { end: tokens, hole: [0; 2], joint: Some(tokens) };
        self.module_cache = if drafted { known } else { ModuleCache::default() };
    }

    /// Notes that modules see the rows from here on. What they have not seen is a hole.
    pub(crate) fn begin_drafting(&mut self, modules: u32) {
        let ModuleCache { end, hole, joint } = &mut self.module_cache;
        if *end >= self.cached {
            return;
        }
        // Module j stands j positions further than the row that it reads.
        let start = joint.take().unwrap_or(*end + 1) as u32;
        let start = if hole[1] > 0 { hole[0].min(start) } else { start };
        *hole = [start, self.cached as u32 + modules];
        self.changed.tokens = true;
    }
}

/// What modules of multi-token prediction have cached of a sequence that drafts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ModuleCache {
    /// Tokens whose hidden rows the modules have seen, those in the hole not counted out.
    pub(crate) end: usize,
    /// Positions without latents, from the first one up to, and without, the second one.
    pub(crate) hole: [u32; 2],
    /// Where a beginning from elsewhere ends: the rows there need what was computed with it, which is gone. They are
    /// cleared, so that nothing of another sequence is in them.
    pub(crate) joint: Option<usize>,
}

/// The sequences by slot.
#[derive(Debug)]
pub(crate) struct Slots {
    sequences: Vec<Option<Sequence>>,
    generation: u32,
    /// For each slot whether a bias was written there, of a sequence that may be gone.
    biased: Vec<bool>,
}

impl Slots {
    pub(crate) fn new(count: u32) -> Self {
        Self { sequences: (0..count).map(|_| None).collect(), generation: 0, biased: vec![false; count as usize] }
    }

    /// Notes that the device has to be told everything again.
    pub(crate) fn all_changed(&mut self) {
        for sequence in self.sequences.iter_mut().flatten() {
            sequence.changed = Changed::ALL;
            sequence.constraints.all_changed();
        }
    }

    pub(crate) fn by_slot(&self, slot: u32) -> Result<SequenceId> {
        let sequence = self.sequences.get(slot as usize).and_then(Option::as_ref);
        sequence.map(|sequence| sequence.id).ok_or(Error::UnknownSequence { slot })
    }

    pub(crate) fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.sequences.get(id.slot as usize).and_then(Option::as_ref);
        sequence.filter(|sequence| sequence.id == id).ok_or(Error::UnknownSequence { slot: id.slot })
    }

    pub(crate) fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        let sequence = self.sequences.get_mut(id.slot as usize).and_then(Option::as_mut);
        sequence.filter(|sequence| sequence.id == id).ok_or(Error::UnknownSequence { slot: id.slot })
    }
}

impl Session {
    /// Adds a sequence that begins with a prompt. Nothing runs yet; see [`Session::prefill`].
    pub fn add_sequence(&mut self, prompt: &[u32], sampling: Sampling) -> Result<SequenceId> {
        check_sampling(&sampling)?;
        self.check_tokens(prompt, 0)?;
        let free = self.slots.sequences.iter().position(Option::is_none);
        let slot = free.ok_or(Error::OutOfSequences { max_sequences: self.slots.sequences.len() as u32 })? as u32;
        self.slots.generation = self.slots.generation.wrapping_add(1);
        let id = SequenceId { slot, generation: self.slots.generation };
        self.slots.sequences[slot as usize] = Some(Sequence {
            id,
            tokens: prompt.to_vec(),
            cached: 0,
            drafted: true,
            drafts: Vec::new(),
            module_cache: ModuleCache::default(),
            pages: Vec::new(),
            sampling,
            constraints: Constraints::new(self.slots.biased[slot as usize]),
            changed: Changed::ALL,
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
        sequence.drafts.clear();
        sequence.changed.tokens = true;
        Ok(())
    }

    /// Removes a sequence and frees its pages.
    pub fn remove_sequence(&mut self, sequence: SequenceId) -> Result<()> {
        self.slots.get(sequence)?;
        if let Some(sequence) = self.slots.sequences[sequence.slot as usize].take() {
            self.pages.give_back(sequence.pages);
        }
        Ok(())
    }

    /// Forgets all tokens of a sequence behind the first `length`, of which there must be one. Frames that were made of
    /// the forgotten tokens are not taken back: see [`Session::frames`]. Pages that others use, too, are copied before the
    /// sequence writes to them again.
    pub fn rewind(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.slots.get(sequence)?;
        if length == 0 {
            return Err(Error::EmptyPrompt);
        }
        self.unshare(sequence, (length - 1) / moewe_plan::PAGE_TOKENS as usize)?;
        let sequence = self.slots.get_mut(sequence)?;
        if length < sequence.tokens.len() {
            sequence.tokens.truncate(length);
            sequence.drafts.clear();
            sequence.module_cache.end = sequence.module_cache.end.min(length - 1);
            // The last token is run again: only a run samples what follows.
            sequence.cached = sequence.cached.min(length - 1);
            sequence.drafted |= sequence.cached == 0;
            sequence.changed.tokens = true;
        }
        Ok(())
    }

    /// Gives a sequence copies of its pages from the `first` on that others use, too, so that it may write to them.
    fn unshare(&mut self, id: SequenceId, first: usize) -> Result<()> {
        for index in first..self.slots.get(id)?.pages.len() {
            let page = self.slots.get(id)?.pages[index];
            if self.pages.users(page) > 1 {
                let copy = self.copy_of(page)?;
                let sequence = self.slots.get_mut(id)?;
                sequence.pages[index] = copy;
                sequence.changed.pages = true;
                self.pages.give_back([page]);
            }
        }
        Ok(())
    }

    /// Changes how the sequence's next tokens are drawn.
    pub fn set_sampling(&mut self, sequence: SequenceId, sampling: Sampling) -> Result<()> {
        check_sampling(&sampling)?;
        let sequence = self.slots.get_mut(sequence)?;
        sequence.sampling = sampling;
        sequence.changed.sampling = true;
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
        let mut lengths = vec![None; self.slots.sequences.len()];
        for &(id, tokens) in wanted {
            self.slots.get(id)?;
            if tokens > max_context {
                return Err(Error::ContextExceeded { tokens, max_context });
            }
            lengths[id.slot as usize] = Some(tokens);
        }
        let mut sequences: Vec<(&mut Sequence, usize)> = self
            .slots
            .sequences
            .iter_mut()
            .zip(lengths)
            .filter_map(|(sequence, tokens)| Some((sequence.as_mut()?, pages_for(tokens?))))
            .collect();
        let grown = self.pages.ensure(sequences.iter_mut().map(|(sequence, pages)| (&mut sequence.pages, *pages)))?;
        for ((sequence, _), grown) in sequences.iter_mut().zip(grown) {
            sequence.changed.pages |= grown;
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

    /// Uploads what changed of each sequence: pages, sampling parameters, seen tokens, mask, bias.
    pub(crate) fn upload_sequences(&mut self) {
        let info = &self.model.plan().model;
        let table_width = pages_for(info.max_context as usize);
        let seen_width = info.vocab_size.div_ceil(32) as usize;
        for slot in 0..self.slots.sequences.len() {
            let Some(sequence) = &self.slots.sequences[slot] else { continue };
            if sequence.changed.pages {
                self.write(Role::PageTable, slot * table_width, &sequence.pages);
            }
            if sequence.changed.sampling {
                let s = &sequence.sampling;
                let [temperature, top_p, min_p, penalty] =
                    [s.temperature, s.top_p, s.min_p, s.repetition_penalty].map(f32::to_bits);
                let constraints = sequence.constraints.bits();
                let words = [temperature, top_p, min_p, penalty, s.top_k, s.seed_low, s.seed_high, constraints];
                self.write(Role::Sampling, slot * 8, &words);
            }
            self.upload_constraints(slot, &sequence.constraints);
            if sequence.changed.tokens {
                self.write(Role::Holes, slot * 2, &sequence.module_cache.hole);
                if self.buffers.role(Role::Seen).is_some() {
                    let mut seen = vec![0; seen_width];
                    for token in &sequence.tokens {
                        seen[*token as usize / 32] |= 1u32 << (token % 32);
                    }
                    self.write(Role::Seen, slot * seen_width, &seen);
                }
            }
            if let Some(sequence) = &mut self.slots.sequences[slot] {
                sequence.changed = Changed::NOTHING;
                self.slots.biased[slot] |= sequence.constraints.uploaded();
            }
        }
    }

    /// Whether these can follow `before` tokens.
    fn check_tokens(&self, tokens: &[u32], before: usize) -> Result<()> {
        let info = &self.model.plan().model;
        check_tokens(tokens, before, info.vocab_size, info.max_context as usize)
    }
}

/// Whether these can follow `before` tokens.
pub(crate) fn check_tokens(tokens: &[u32], before: usize, vocab_size: u32, max_context: usize) -> Result<()> {
    if tokens.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    if let Some(index) = tokens.iter().position(|&token| token >= vocab_size) {
        return Err(Error::TokenOutOfVocabulary { index, token: tokens[index], vocab_size });
    }
    let tokens = before.saturating_add(tokens.len());
    if tokens > max_context { Err(Error::ContextExceeded { tokens, max_context }) } else { Ok(()) }
}

pub(crate) fn check_sampling(sampling: &Sampling) -> Result<()> {
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
