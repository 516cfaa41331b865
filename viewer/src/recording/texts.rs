//! Putting tokens in their places.

use std::collections::BTreeMap;

use super::decode::Told;
use crate::source::Event;

/// How many tokens of each text were told. Behind a gap nothing of a text can be put in its place any more: the store
/// counts tokens as they come.
#[derive(Default)]
pub(super) struct Texts(BTreeMap<u32, Text>);

#[derive(Default)]
struct Text {
    tokens: u32,
    is_cut: bool,
}

impl Texts {
    /// What is told where it belongs.
    pub(super) fn place(&mut self, told: Told) -> Vec<Event> {
        match told {
            Told::Token { sequence, position, token } => {
                // Without its beginning nothing is known of a text.
                let Some(text) = self.0.get_mut(&sequence).filter(|text| !text.is_cut) else { return Vec::new() };
                if position == text.tokens {
                    text.tokens += 1;
                    return vec![Event::Token { sequence, token }];
                }
                text.is_cut = true;
                let what = format!("token {} follows token {}", position, i64::from(text.tokens) - 1);
                vec![Event::Error(format!("text {sequence} is left out from token {} on: {what}", text.tokens))]
            }
            Told::Event(Event::Frame(frame)) => {
                let is_cut = |sequence: &u32| self.0.get(sequence).is_some_and(|text| text.is_cut);
                if frame.tokens.iter().any(|token| is_cut(&token.sequence)) {
                    return vec![Event::Dropped(1)];
                }
                vec![Event::Frame(frame)]
            }
            Told::Event(event) => {
                if let Event::Begin(info) = &event {
                    self.0.insert(info.number, Text::default());
                }
                vec![event]
            }
        }
    }

    /// A text that ended gets no more tokens, so nothing has to be kept of it.
    pub(super) fn forget(&mut self, sequence: u32) {
        self.0.remove(&sequence);
    }
}
