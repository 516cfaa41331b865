//! Answers to chat requests, whole and in chunks.

use serde::Serialize;
use utoipa::ToSchema;

use super::{ChatLogprobs, FINGERPRINT, FinishReason, RoutedExperts, Usage};

/// A whole answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// The answer's id.
    pub id: String,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// When the request came, in seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The answers, in order.
    pub choices: Vec<ChatChoice>,
    /// How many tokens they took.
    pub usage: Usage,
    /// The server's name and version.
    pub system_fingerprint: &'static str,
    /// The experts that the prompt's tokens chose: `[tokens, moe_layers, top_k]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub prompt_routed_experts: Option<RoutedExperts>,
}

impl ChatCompletion {
    /// An answer.
    pub fn new(id: String, created: u64, model: String, choices: Vec<ChatChoice>, usage: Usage) -> Self {
        let system_fingerprint = FINGERPRINT;
        let object = "chat.completion";
        Self { id, object, created, model, choices, usage, system_fingerprint, prompt_routed_experts: None }
    }
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Which of the `n` answers.
    pub index: u32,
    /// What the model says.
    pub message: AnswerMessage,
    /// The tokens' log probabilities, if they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The experts that the answer's tokens chose: `[tokens, moe_layers, top_k]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub routed_experts: Option<RoutedExperts>,
}

/// A message of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct AnswerMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// What it says; null if it only calls tools.
    pub content: Option<String>,
    /// What it thought before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The tools that it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Always null; OpenAI's clients look for it.
    pub refusal: Option<String>,
}

impl AnswerMessage {
    /// A message. Empty content beside tool calls becomes null.
    pub fn new(content: String, reasoning_content: Option<String>, tool_calls: Vec<ToolCall>) -> Self {
        let content = (!content.is_empty() || tool_calls.is_empty()).then_some(content);
        Self { role: "assistant", content, reasoning_content, tool_calls, refusal: None }
    }
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ToolCall {
    /// The call's id, which the tool's answer names.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What is called.
    pub function: FunctionCall,
}

impl ToolCall {
    /// A call of the function `name`.
    pub fn new(id: impl Into<String>, name: impl Into<String>, arguments: impl Into<String>) -> Self {
        let function = FunctionCall { name: name.into(), arguments: arguments.into() };
        Self { id: id.into(), kind: "function", function }
    }
}

/// A function with its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FunctionCall {
    /// Its name.
    pub name: String,
    /// The arguments as the model wrote them: JSON, if it made no mistake.
    pub arguments: String,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatChunk {
    /// The answer's id, the same in all chunks.
    pub id: String,
    /// Always `chat.completion.chunk`.
    pub object: &'static str,
    /// When the request came, in seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The pieces; none in the chunk that tells the usage.
    pub choices: Vec<ChunkChoice>,
    /// How many tokens the answers took, in the last chunk if it was asked for.
    pub usage: Option<Usage>,
    /// The server's name and version.
    pub system_fingerprint: &'static str,
    /// The experts that the prompt's tokens chose, once: `[tokens, moe_layers, top_k]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub prompt_routed_experts: Option<RoutedExperts>,
}

impl ChatChunk {
    /// A chunk.
    pub fn new(id: String, created: u64, model: String, choices: Vec<ChunkChoice>, usage: Option<Usage>) -> Self {
        let object = "chat.completion.chunk";
        let system_fingerprint = FINGERPRINT;
        Self { id, object, created, model, choices, usage, system_fingerprint, prompt_routed_experts: None }
    }
}

/// A piece of one answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChunkChoice {
    /// Which of the `n` answers.
    pub index: u32,
    /// What is new.
    pub delta: Delta,
    /// The new tokens' log probabilities, if they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why the answer ended, in its last piece.
    pub finish_reason: Option<FinishReason>,
    /// The experts that the new tokens chose: `[tokens, moe_layers, top_k]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub routed_experts: Option<RoutedExperts>,
}

impl ChunkChoice {
    /// A piece that only says what is new.
    pub fn new(index: u32, delta: Delta) -> Self {
        Self { index, delta, logprobs: None, finish_reason: None, routed_experts: None }
    }
}

/// What is new in a message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Delta {
    /// `assistant`, in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More of what it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// More of what it thinks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// More of the tools that it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<CallDelta>,
}

impl Delta {
    /// The role, as the first piece of an answer tells it.
    pub fn role() -> Self {
        Self { role: Some("assistant"), content: Some(String::new()), ..Self::default() }
    }

    /// Whether nothing is new.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// More of a tool call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct CallDelta {
    /// Which of the answer's calls.
    pub index: u32,
    /// The call's id, in its first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`, in its first piece.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// What is called.
    pub function: FunctionDelta,
}

impl CallDelta {
    /// The first piece of a call: its id and the function's name.
    pub fn begin(index: u32, id: impl Into<String>, name: impl Into<String>) -> Self {
        let function = FunctionDelta { name: Some(name.into()), arguments: String::new() };
        Self { index, id: Some(id.into()), kind: Some("function"), function }
    }

    /// More of the arguments.
    pub fn arguments(index: u32, text: impl Into<String>) -> Self {
        Self { index, id: None, kind: None, function: FunctionDelta { name: None, arguments: text.into() } }
    }
}

/// More of a function with its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FunctionDelta {
    /// Its name, in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More of the arguments.
    pub arguments: String,
}
