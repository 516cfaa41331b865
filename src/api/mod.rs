//! The HTTP API's language: what clients may ask for, what they are answered, and how they are told of mistakes.
//!
//! The server speaks OpenAI's API as DeepSeek extends it (`reasoning_content`, `prefix`, `thinking`, cache hits in
//! `usage`) with vLLM's additions (`top_k`, `structured_outputs`, `routed_experts`, `/tokenize`), so that a client
//! changes nothing but the address. Requests come as bytes and leave as typed values whose every field is in range.
//!
//! What is not known is ignored: clients send fields of services that they were written for. What is known, would
//! change the answer, and cannot be honoured is refused by name.

mod answer;
mod error;
mod openapi;
mod request;
#[cfg(test)]
mod tests;
mod wire;

pub use answer::{
    AnswerMessage, CallDelta, ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs, ChunkChoice, Completion,
    CompletionChoice, CompletionTokensDetails, Delta, Detokenized, FinishReason, FunctionCall, FunctionDelta,
    LegacyLogprobs, Likeliest, ModelCard, ModelList, ModelShape, PromptTokensDetails, RoutedExperts, TokenLogprob,
    Tokenized, ToolCall, TopLogprob, Usage,
};
pub use error::ApiError;
pub use openapi::openapi;
pub use request::{
    ChatRequest, CompletionRequest, DetokenizeRequest, Options, OutputFormat, Prompt, TokenizeInput, TokenizeRequest,
    Tool, ToolChoice,
};
pub(crate) use wire::kind_of;

/// Characters of a client's text that errors show.
const TEXT_SHOWN: usize = 64;

/// A text of the client's as errors show it: quoted, its beginning only.
fn shown(text: &str) -> String {
    format!("{:?}", shortened(text, TEXT_SHOWN))
}

/// The beginning of a text, with a sign that there was more than `most` characters.
fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
