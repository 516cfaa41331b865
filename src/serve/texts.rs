//! `/tokenize` and `/detokenize`.

use super::chat::json;
use super::host::Host;
use crate::api::{ApiError, DetokenizeRequest, Detokenized, TokenizeInput, TokenizeRequest, Tokenized};

/// The tokens of a text or conversation, as JSON.
pub fn tokenize(host: &Host, request: &TokenizeRequest) -> Result<String, ApiError> {
    host.check_name(request.model.as_deref())?;
    let tokens = match &request.input {
        TokenizeInput::Text { prompt, add_special_tokens } => {
            let encoded = host.text.encode(prompt, *add_special_tokens);
            encoded.map_err(|error| ApiError::bad_request("prompt", error.to_string()))?
        }
        TokenizeInput::Chat { request, add_generation_prompt: true } => {
            host.dialect.chat_prompt(&host.text, request)?.tokens
        }
        TokenizeInput::Chat { request, .. } => host.dialect.transcript(&host.text, request)?,
    };
    Ok(json(&Tokenized { count: tokens.len(), max_model_len: host.max_context() as u64, tokens }))
}

/// The text of tokens, as JSON.
pub fn detokenize(host: &Host, request: &DetokenizeRequest) -> Result<String, ApiError> {
    host.check_name(request.model.as_deref())?;
    if let Some(id) = request.tokens.iter().find(|&&id| id >= host.model.vocab_size) {
        let found = format!("token {id}: the model's tokens are 0 to {}", host.model.vocab_size - 1);
        return Err(ApiError::bad_request("tokens", found));
    }
    Ok(json(&Detokenized { prompt: host.text.decode(&request.tokens, false) }))
}
