//! Requests for tokens of texts and texts of tokens.

use serde::Deserialize;
use serde::de::IgnoredAny;
use utoipa::ToSchema;

use super::chat;
use super::message::MessageBody;
use super::read::read;
use super::types::{List, TokenId};
use super::unsupported::Route;
use super::{required, wrong};
use crate::api::{ApiError, DetokenizeRequest, TokenizeInput, TokenizeRequest};

/// Most tokens whose text is told at once.
const MAX_TOKENS: usize = 1 << 20;

/// A text whose tokens are asked for: a text as `prompt`, or a conversation as for a chat request.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeBody {
    /// The model's name.
    model: Option<String>,
    /// The text.
    prompt: Option<String>,
    /// The conversation. All other fields of a chat request may be given beside it.
    #[schema(value_type = Option<Vec<MessageBody>>)]
    messages: Option<IgnoredAny>,
    /// With `prompt`: whether the tokenizer adds the tokens that it begins texts with; it does if nothing is said.
    /// Conversations have theirs from the chat template.
    add_special_tokens: Option<bool>,
    /// With `messages`: whether to end with the beginning of the model's answer; yes if nothing is said.
    add_generation_prompt: Option<bool>,
}

impl TokenizeRequest {
    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let TokenizeBody { model, prompt, messages, add_special_tokens, add_generation_prompt } = read(body)?;
        let input = match (prompt, messages) {
            (Some(_), Some(_)) => return Err(wrong("prompt", "it together with `messages`", "one of them")),
            (None, Some(_)) if add_special_tokens == Some(true) => {
                let what = "`add_special_tokens`: found true with `messages`, expected false: a conversation has its \
                            special tokens from the chat template";
                return Err(ApiError::unsupported("add_special_tokens", what));
            }
            (None, Some(_)) => TokenizeInput::Chat {
                request: Box::new(chat::parse(body, Route::Tokenize)?),
                add_generation_prompt: add_generation_prompt.unwrap_or(true),
            },
            (prompt, None) => TokenizeInput::Text {
                prompt: required(prompt, "prompt", "a text, or `messages`")?,
                add_special_tokens: add_special_tokens.unwrap_or(true),
            },
        };
        Ok(Self { model, input })
    }
}

/// Tokens whose text is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub struct DetokenizeBody {
    /// The model's name.
    model: Option<String>,
    /// The token ids.
    #[schema(value_type = Vec<u32>, required = true)]
    tokens: Option<List<TokenId, MAX_TOKENS>>,
}

impl DetokenizeRequest {
    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let DetokenizeBody { model, tokens } = read(body)?;
        let List(tokens) = required(tokens, "tokens", "a list of token ids")?;
        Ok(Self { model, tokens: tokens.into_iter().map(|TokenId(id)| id).collect() })
    }
}
