//! Keeps what people write from becoming control tokens.
//!
//! A chat template gives one string, in which `<｜User｜>` is a control token whether the template wrote it or somebody's
//! message did. So the first and the last characters of all control tokens (`<` and `>`, as a rule) are replaced in all
//! messages by characters that occur nowhere, and the replacements are taken back after the control tokens have been
//! found ([`Text::encode_hidden`](crate::text::Text::encode_hidden)). Whatever a template does with a message, cut it,
//! join it, quote it: a control token can only be found where the template itself wrote both ends of it.

use serde_json::Value;

use super::marks::{self, Found};
use crate::api::ApiError;
use crate::text::{AddedToken, Message};

/// The characters to replace.
#[derive(Debug, Clone)]
pub struct Shield {
    ends: Vec<char>,
}

impl Shield {
    /// For a vocabulary with these added tokens.
    pub fn new(tokens: &[AddedToken]) -> Self {
        let ends = |token: &AddedToken| [token.content.chars().next(), token.content.chars().next_back()];
        let mut ends: Vec<char> = tokens.iter().filter(|token| is_control(token)).flat_map(ends).flatten().collect();
        ends.sort_unstable();
        ends.dedup();
        Self { ends }
    }

    /// Chooses the replacements for a conversation, so that none of its texts has them.
    pub fn cover(&self, messages: &[Message], values: &[Value]) -> Result<Cover, ApiError> {
        let mut used = Vec::new();
        for message in messages {
            used.extend(message.content.iter().flat_map(|text| private(text)));
        }
        for value in messages.iter().flat_map(|message| message.more.values()).chain(values) {
            each_text(value, &mut |text| used.extend(private(text)));
        }
        used.sort_unstable();
        let mut free = PRIVATE.chain(MORE_PRIVATE).filter(|c| used.binary_search(c).is_err());
        let covered = self.ends.iter().map(|&end| Some((end, free.next()?))).collect::<Option<Vec<_>>>();
        match (covered, free.next()) {
            (Some(pairs), Some(sentinel)) => Ok(Cover { pairs, sentinel }),
            _ => Err(ApiError::bad_request("messages", "the texts use up all of Unicode's private characters")),
        }
    }
}

/// The supplementary private use areas, which hardly any text uses.
const PRIVATE: std::ops::RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';
const MORE_PRIVATE: std::ops::RangeInclusive<char> = '\u{100000}'..='\u{10FFFD}';

fn private(text: &str) -> impl Iterator<Item = char> {
    text.chars().filter(|c| PRIVATE.contains(c) || MORE_PRIVATE.contains(c))
}

/// Whether a token steers the model. Some vocabularies also add lone letters, words and white space.
fn is_control(token: &AddedToken) -> bool {
    let text = &token.content;
    token.special || !(text.chars().count() < 3 || text.chars().all(char::is_alphanumeric) || text.trim().is_empty())
}

/// Replacements for one conversation.
#[derive(Debug)]
pub struct Cover {
    /// Each character and what takes its place.
    pairs: Vec<(char, char)>,
    /// One more character that no text has.
    sentinel: char,
}

impl Cover {
    /// A character that no text has.
    pub fn sentinel(&self) -> char {
        self.sentinel
    }

    /// The text with its control tokens hidden.
    pub fn hide(&self, text: &str) -> String {
        text.chars()
            .map(|c| self.pairs.iter().find(|(shown, _)| *shown == c).map_or(c, |(_, hidden)| *hidden))
            .collect()
    }

    /// The text with its control tokens hidden, other than these.
    pub fn hide_except(&self, text: &str, except: &[&str]) -> String {
        let mut hidden = String::new();
        let mut rest = text;
        while let Found::Mark(token, at) = marks::find(rest, except, true) {
            hidden += &self.hide(&rest[..at]);
            hidden += except[token];
            rest = &rest[at + except[token].len()..];
        }
        hidden + &self.hide(rest)
    }

    /// The same for all texts in a value, names included.
    pub fn hide_all(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.hide(text)),
            Value::Array(list) => list.iter().map(|value| self.hide_all(value)).collect(),
            Value::Object(map) => map.iter().map(|(name, value)| (self.hide(name), self.hide_all(value))).collect(),
            other => other.clone(),
        }
    }

    /// A character's true form.
    pub fn shown(&self, c: char) -> char {
        self.pairs.iter().find(|(_, hidden)| *hidden == c).map_or(c, |(shown, _)| *shown)
    }
}

fn each_text(value: &Value, visit: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(list) => list.iter().for_each(|value| each_text(value, visit)),
        Value::Object(map) => map.iter().for_each(|(name, value)| {
            visit(name);
            each_text(value, visit);
        }),
        _ => {}
    }
}
