//! Texts that are not free: what may come next, and what the host adds to the logits.

use std::collections::HashMap;

use super::guarded;
use super::request::Request;
use crate::{Error, Result, SequenceId, Session};

/// Says which tokens may come next in a text, as a grammar does. It is asked on the engine's thread, in front of each draw,
/// so it should take less time than a pass.
pub trait Constraint: std::fmt::Debug + Send {
    /// Sets bit `i % 32` of word `i / 32` for each token `i` that may come next. `mask` comes zeroed, with
    /// ⌈vocab_size / 32⌉ words. End-of-sequence tokens are tokens like others. It may be asked several times before
    /// [`Constraint::drawn`] and has to answer alike.
    ///
    /// # Errors
    /// What went wrong; the request fails with it.
    fn allowed(&mut self, mask: &mut [u32]) -> std::result::Result<(), String>;

    /// A token was drawn. Called for every token of the text once, also if the request was computed again.
    ///
    /// # Errors
    /// What went wrong; the request fails with it.
    fn drawn(&mut self, token: u32) -> std::result::Result<(), String>;

    /// Whether the text is complete and nothing can follow. The request ends then ([`crate::StopReason::Eos`]), also
    /// without an end-of-sequence token.
    fn ended(&self) -> bool;
}

/// What the host has to do with the draws of a request.
#[derive(Debug)]
pub(super) struct Steering {
    constraint: Option<Box<dyn Constraint>>,
    mask: Vec<u32>,
    /// Words of the mask.
    words: usize,
    logit_bias: HashMap<u32, f32>,
    presence_penalty: f32,
    frequency_penalty: f32,
    /// How often each token was generated, if that matters.
    counts: HashMap<u32, u32>,
    /// The sequence that has the biases. A request that is computed again has another one.
    told: Option<SequenceId>,
    /// Tokens whose biases have changed since.
    changed: Vec<u32>,
}

impl Steering {
    /// Takes the constraint out of the request.
    pub(super) fn new(request: &mut Request, vocab_size: u32) -> Self {
        Self {
            constraint: request.constraint.take(),
            mask: Vec::new(),
            words: vocab_size.div_ceil(32) as usize,
            logit_bias: request.logit_bias.iter().copied().collect(),
            presence_penalty: request.presence_penalty,
            frequency_penalty: request.frequency_penalty,
            counts: HashMap::new(),
            told: None,
            changed: Vec::new(),
        }
    }

    fn penalizes(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether every draw has to be known before the next one.
    pub(super) fn is_stepwise(&self) -> bool {
        self.constraint.is_some() || self.penalizes()
    }

    /// Tells the session what the next draw of a sequence depends on.
    pub(super) fn prepare(&mut self, session: &mut Session, sequence: SequenceId) -> Result<()> {
        self.tell_bias(session, sequence)?;
        let Some(constraint) = &mut self.constraint else { return Ok(()) };
        self.mask.clear();
        self.mask.resize(self.words, 0);
        asked(|| constraint.allowed(&mut self.mask))?;
        session.set_mask(sequence, Some(&self.mask)).map_err(|error| match error {
            Error::Mask { what } => Error::Constraint { what },
            error => error,
        })
    }

    fn tell_bias(&mut self, session: &mut Session, sequence: SequenceId) -> Result<()> {
        if self.told != Some(sequence) {
            self.changed = self.logit_bias.keys().chain(self.counts.keys()).copied().collect();
        }
        self.told = Some(sequence);
        if self.changed.is_empty() {
            return Ok(());
        }
        let entries: Vec<(u32, f32)> = self.changed.iter().map(|&token| (token, self.bias(token))).collect();
        self.changed.clear();
        session.set_bias(sequence, &entries)
    }

    /// What is added to a token's logit now.
    fn bias(&self, token: u32) -> f32 {
        let bias = self.logit_bias.get(&token).copied().unwrap_or(0.0);
        let penalty = match self.counts.get(&token) {
            Some(&count) => self.presence_penalty + self.frequency_penalty * count as f32,
            None => 0.0,
        };
        // Finite numbers may add up to what is none, which no logit can bear.
        (bias - penalty).clamp(f32::MIN, f32::MAX)
    }

    /// Takes in what was drawn, and says whether the text is complete.
    pub(super) fn drawn(&mut self, tokens: &[u32]) -> Result<bool> {
        if self.penalizes() {
            for &token in tokens {
                *self.counts.entry(token).or_default() += 1;
                self.changed.push(token);
            }
        }
        let Some(constraint) = &mut self.constraint else { return Ok(false) };
        tokens.iter().try_for_each(|&token| asked(|| constraint.drawn(token)))?;
        asked(|| Ok(constraint.ended()))
    }
}

/// Asks a constraint, which may fail in any way.
fn asked<T>(ask: impl FnOnce() -> std::result::Result<T, String>) -> Result<T> {
    let answer = guarded(ask).unwrap_or_else(|| Err("it panicked".into()));
    answer.map_err(|what| Error::Constraint { what })
}
