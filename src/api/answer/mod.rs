//! Answers as they are sent.

mod chat;
mod completion;
mod logprobs;

use serde::Serialize;
use serde::ser::{SerializeSeq, Serializer};
use utoipa::ToSchema;

pub use chat::{
    AnswerMessage, CallDelta, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, Delta, FunctionCall, FunctionDelta,
    ToolCall,
};
pub use completion::{Completion, CompletionChoice};
pub use logprobs::{ChatLogprobs, LegacyLogprobs, Likeliest, TokenLogprob, TopLogprob};

/// The name of this server and its version, where OpenAI tells the state of its own.
const FINGERPRINT: &str = concat!("moewe-", env!("CARGO_PKG_VERSION"));

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text did.
    Stop,
    /// It has as many tokens as were allowed, or the context is full.
    Length,
    /// The model calls tools.
    ToolCalls,
    /// The server could not go on.
    InsufficientSystemResource,
}

impl FinishReason {
    /// The reason's name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::InsufficientSystemResource => "insufficient_system_resource",
        }
    }
}

/// How many tokens a request took.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Generated tokens of all choices.
    pub completion_tokens: u64,
    /// Both.
    pub total_tokens: u64,
    /// Tokens of the prompt that were computed before.
    pub prompt_cache_hit_tokens: u64,
    /// The other tokens of the prompt.
    pub prompt_cache_miss_tokens: u64,
    /// The cache hits once more, where OpenAI's clients look for them.
    pub prompt_tokens_details: PromptTokensDetails,
    /// What the generated tokens were for.
    pub completion_tokens_details: CompletionTokensDetails,
    /// What the request costs by the server's prices; absent where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
}

/// What the prompt's tokens were.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens of the prompt that were computed before.
    pub cached_tokens: u64,
}

/// What the generated tokens were for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct CompletionTokensDetails {
    /// Tokens of the reasoning before the answers.
    pub reasoning_tokens: u64,
}

impl Usage {
    /// The usage of a request: tokens of its prompt, those of them found in the cache, generated tokens, and those of
    /// them that were reasoning.
    pub fn new(prompt: u64, cached: u64, completion: u64, reasoning: u64) -> Self {
        Self {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt.saturating_add(completion),
            prompt_cache_hit_tokens: cached,
            prompt_cache_miss_tokens: prompt.saturating_sub(cached),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: cached },
            completion_tokens_details: CompletionTokensDetails { reasoning_tokens: reasoning },
            cost: None,
        }
    }

    /// With what it costs, in the unit of the server's prices.
    #[must_use]
    pub fn with_cost(self, cost: f64) -> Self {
        Self { cost: Some(cost), ..self }
    }
}

/// The experts that tokens chose: `[tokens, moe_layers, top_k]` lists in lists on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutedExperts {
    ids: Vec<u16>,
    moe_layers: usize,
    top_k: usize,
}

impl RoutedExperts {
    /// Takes expert ids `[tokens, moe_layers, top_k]`; `None` if they do not come out even.
    pub fn new(ids: Vec<u16>, moe_layers: usize, top_k: usize) -> Option<Self> {
        let row = moe_layers.checked_mul(top_k).filter(|&row| row > 0)?;
        ids.len().is_multiple_of(row).then_some(Self { ids, moe_layers, top_k })
    }
}

impl Serialize for RoutedExperts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        /// The rows of one token.
        struct Layers<'a>(&'a [u16], usize);
        impl Serialize for Layers<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_seq(self.0.chunks_exact(self.1))
            }
        }
        let tokens = self.ids.chunks_exact(self.moe_layers * self.top_k);
        let mut list = serializer.serialize_seq(Some(tokens.len()))?;
        for token in tokens {
            list.serialize_element(&Layers(token, self.top_k))?;
        }
        list.end()
    }
}

/// The models that the server has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The models.
    pub data: Vec<ModelCard>,
}

impl ModelList {
    /// A list of models.
    pub fn new(data: Vec<ModelCard>) -> Self {
        Self { object: "list", data }
    }
}

/// A model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ModelCard {
    /// The name that requests ask for.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// Always `moewe`.
    pub owned_by: &'static str,
    /// Tokens of prompt and answer together.
    pub max_model_len: u64,
    /// What the model is built of.
    pub moewe: ModelShape,
}

impl ModelCard {
    /// A model by its name, its time of loading in seconds since 1970, its context in tokens, and what it is built of.
    pub fn new(id: impl Into<String>, created: u64, max_model_len: u64, shape: ModelShape) -> Self {
        Self { id: id.into(), object: "model", created, owned_by: "moewe", max_model_len, moewe: shape }
    }
}

/// What a model is built of, as far as it is needed to read `routed_experts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct ModelShape {
    /// Routed experts of a layer.
    pub experts: u32,
    /// Layers with experts.
    pub moe_layers: u32,
    /// Experts that each token chooses in a layer.
    pub experts_per_token: u32,
}

/// The tokens of a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Tokenized {
    /// How many there are.
    pub count: usize,
    /// The model's context in tokens.
    pub max_model_len: u64,
    /// Their ids.
    pub tokens: Vec<u32>,
}

/// The text of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}
