//! Answers to completion requests.

use serde::Serialize;
use utoipa::ToSchema;

use super::{FINGERPRINT, FinishReason, LegacyLogprobs, RoutedExperts, Usage};

/// Continued texts, whole or, in a stream, a piece of them.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Completion {
    /// The answer's id, the same in all pieces.
    pub id: String,
    /// Always `text_completion`, for pieces, too.
    pub object: &'static str,
    /// When the request came, in seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The texts, in order: the `n` of the first prompt, those of the second, and so on. In a stream the pieces; none
    /// in the one that tells the usage.
    pub choices: Vec<CompletionChoice>,
    /// How many tokens they took; in a stream in the last piece if it was asked for.
    pub usage: Option<Usage>,
    /// The server's name and version.
    pub system_fingerprint: &'static str,
}

impl Completion {
    /// An answer or a piece of one.
    pub fn new(id: String, created: u64, model: String, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Self {
        Self { id, object: "text_completion", created, model, choices, usage, system_fingerprint: FINGERPRINT }
    }
}

/// One text.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Which of the texts.
    pub index: u32,
    /// The text, or what is new of it.
    pub text: String,
    /// The tokens' log probabilities, if they were asked for.
    pub logprobs: Option<LegacyLogprobs>,
    /// Why it ended; null in all pieces of a stream but the last.
    pub finish_reason: Option<FinishReason>,
    /// The experts that the new tokens chose: `[tokens, moe_layers, top_k]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub routed_experts: Option<RoutedExperts>,
    /// The experts that the prompt's tokens chose, in the text's first piece: `[tokens, moe_layers, top_k]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub prompt_routed_experts: Option<RoutedExperts>,
}

impl CompletionChoice {
    /// A text that has not ended.
    pub fn new(index: u32, text: String) -> Self {
        let (logprobs, finish_reason, routed_experts, prompt_routed_experts) = (None, None, None, None);
        Self { index, text, logprobs, finish_reason, routed_experts, prompt_routed_experts }
    }
}
