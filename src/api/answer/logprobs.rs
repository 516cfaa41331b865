//! Log probabilities of tokens, in the two forms that OpenAI's API has.

use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// What stands for the logarithm of zero, which JSON has no number for; OpenAI's API says so, too.
const NEVER: f32 = -9999.0;

/// A logarithm as JSON can hold it: minus infinity and what is no number at all become [`NEVER`].
fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { NEVER } else { logprob.clamp(NEVER, 0.0) }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands fields by reference")]
fn serialize_finite<S: Serializer>(logprob: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f32(finite(*logprob))
}

/// Log probabilities of a chat answer's tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// Those of the tokens of the content, tool calls among it.
    pub content: Vec<TokenLogprob>,
    /// Those of the reasoning's tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasoning_content: Vec<TokenLogprob>,
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// Its text; bytes that are no UTF-8 by themselves are shown as U+FFFD.
    pub token: String,
    /// The natural logarithm of its probability, -9999 for none.
    #[serde(serialize_with = "serialize_finite")]
    pub logprob: f32,
    /// Its bytes, which make whole characters together with its neighbours'.
    pub bytes: Vec<u8>,
    /// The likeliest tokens at this place.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token that might have been drawn.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// The natural logarithm of its probability, -9999 for none.
    #[serde(serialize_with = "serialize_finite")]
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Log probabilities of a completion's tokens: lists of the same length.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct LegacyLogprobs {
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// The natural logarithms of their probabilities, -9999 for none.
    #[serde(serialize_with = "serialize_all_finite")]
    pub token_logprobs: Vec<f32>,
    /// The likeliest tokens at each place, by their text.
    #[schema(value_type = Vec<std::collections::HashMap<String, f32>>)]
    pub top_logprobs: Vec<Likeliest>,
    /// Where each token begins in the text, in characters.
    pub text_offset: Vec<usize>,
}

fn serialize_all_finite<S: Serializer>(logprobs: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(logprobs.iter().copied().map(finite))
}

/// The likeliest tokens at a place and their logarithms, likeliest first; an object on the wire.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Likeliest(Vec<(String, f32)>);

impl Likeliest {
    /// Takes tokens, likeliest first. Of those with the same text the first stays.
    pub fn new(tokens: impl IntoIterator<Item = (String, f32)>) -> Self {
        let mut kept: Vec<(String, f32)> = Vec::new();
        for (token, logprob) in tokens {
            if kept.iter().all(|(other, _)| *other != token) {
                kept.push((token, logprob));
            }
        }
        Self(kept)
    }
}

impl Serialize for Likeliest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, finite(*logprob))))
    }
}

impl LegacyLogprobs {
    /// Adds a token that begins at character `offset` of the text, with the likeliest ones at its place.
    pub fn push(&mut self, token: String, logprob: f32, top: Likeliest, offset: usize) {
        self.tokens.push(token);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
        self.text_offset.push(offset);
    }
}
