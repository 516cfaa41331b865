//! Events on their way into a chunk.

use std::collections::BTreeMap;

use super::Entry;
use super::chunk::Filling;
use crate::source::Event;
use crate::store::SequenceInfo;

/// Counts tokens of texts, shifts numbers and puts events into the chunk that is being filled.
#[derive(Debug)]
pub(super) struct Intake {
    /// Tokens of each text.
    texts: BTreeMap<u32, u32>,
    /// What is added to numbers of texts and of frames.
    shift: (u32, u64),
}

impl Intake {
    pub(super) fn new(shift: (u32, u64)) -> Self {
        Self { texts: BTreeMap::new(), shift }
    }

    /// Takes an event; frames have to be checked before. An event that makes no sense is an error and changes nothing.
    pub(super) fn take(&mut self, event: &Event, filling: &mut Filling) -> Result<(), String> {
        let shifted = |sequence: u32| {
            sequence.checked_add(self.shift.0).ok_or_else(|| format!("text {sequence} has too large a number"))
        };
        match event {
            Event::Begin(info) => {
                let parent = info.parent.map(|(parent, at)| Ok::<_, String>((shifted(parent)?, at))).transpose()?;
                let number = shifted(info.number)?;
                filling.entry(Entry::Begin(SequenceInfo { number, parent, ..info.clone() }))?;
                self.texts.insert(info.number, 0);
            }
            Event::Token { sequence, token } => {
                let number = shifted(*sequence)?;
                let position = self.texts.get_mut(sequence);
                let position = position.ok_or_else(|| format!("a token of text {sequence}, which never began"))?;
                filling.token(number, *position, *token)?;
                *position += 1;
            }
            Event::Frame(frame) => filling.frame(frame, self.shift.0, self.shift.1)?,
            Event::Dropped(frames) => filling.entry(Entry::Dropped(*frames))?,
            Event::End { sequence, reason, tokens_per_second } => {
                let rate = if tokens_per_second.is_finite() { *tokens_per_second } else { 0.0 };
                let (number, reason) = (shifted(*sequence)?, reason.clone());
                filling.entry(Entry::End { sequence: number, reason, tokens_per_second: rate })?;
            }
            Event::Note(text) => filling.entry(Entry::Note(text.clone()))?,
            Event::Error(text) => filling.entry(Entry::Error(text.clone()))?,
            Event::Reset => return Err("a recording does not go back".into()),
        }
        Ok(())
    }

    /// A text that ended gets no more tokens, so nothing has to be kept of it.
    pub(super) fn forget(&mut self, sequence: u32) {
        self.texts.remove(&sequence);
    }
}
