//! Completion requests.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use utoipa::ToSchema;

use super::format::FormatBody;
use super::options::OptionsBody;
use super::read::read;
use super::types::{Integer, TokenId};
use super::unsupported::{self, Route};
use super::{integer, required, wrong};
use crate::api::{ApiError, CompletionRequest, Prompt};

/// Most texts of a request.
const MAX_PROMPTS: usize = 128;

/// Texts to continue.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionBody {
    /// A text, a list of token ids, or a list of at most 128 of them.
    #[schema(value_type = PromptSchema, required = true)]
    prompt: Option<Prompts>,
    /// What stands behind the gap that is to be filled.
    suffix: Option<String>,
    /// Whether the answer begins with the prompt.
    echo: Option<bool>,
    /// Whether to tell the tokens' log probabilities, and of how many of the likeliest.
    #[schema(value_type = Option<u32>, maximum = 20)]
    logprobs: Option<Integer>,
}

/// A text, a list of token ids, or a list of them.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "a description of what `Prompts` reads")]
pub enum PromptSchema {
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Several lists of token ids.
    Lists(Vec<Vec<u32>>),
}

impl CompletionRequest {
    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let completion: CompletionBody = read(body)?;
        let options: OptionsBody = read(body)?;
        let format: FormatBody = read(body)?;
        unsupported::check(body, Route::Completion)?;
        let Prompts(prompts) = required(completion.prompt, "prompt", "a text or a list of token ids")?;
        // Nothing behind the gap is no gap.
        let suffix = completion.suffix.filter(|suffix| !suffix.is_empty());
        if suffix.is_some() && prompts.iter().any(|prompt| matches!(prompt, Prompt::Tokens(_))) {
            return Err(wrong("prompt", "token ids together with `suffix`", "texts"));
        }
        let logprobs = integer("logprobs", completion.logprobs, 0..=20_u32)?;
        let echo = completion.echo.unwrap_or(false);
        if echo && logprobs.is_some() {
            let what = "`echo`: found true together with `logprobs`, expected one of them: log probabilities of the \
                        prompt are not told";
            return Err(ApiError::unsupported("echo", what));
        }
        let format = format.format()?;
        let model = options.model.clone();
        Ok(Self { model, prompts, suffix, echo, format, options: options.options(logprobs)? })
    }
}

/// One prompt or several.
#[derive(Debug)]
struct Prompts(Vec<Prompt>);

/// What stands in a list of prompts.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

const PROMPT: &str = "a string, a list of strings, a list of token ids, or a list of such lists";

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(PROMPT)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
                let (mut prompts, mut tokens) = (Vec::new(), Vec::new());
                while let Some(element) = seq.next_element()? {
                    match element {
                        Element::Token(id) if prompts.is_empty() => tokens.push(id),
                        Element::Text(text) if tokens.is_empty() => prompts.push(Prompt::Text(text)),
                        Element::Tokens(ids) if ids.is_empty() => return Err(empty()),
                        Element::Tokens(ids) if tokens.is_empty() => prompts.push(Prompt::Tokens(ids)),
                        _ => {
                            return Err(A::Error::custom(format_args!(
                                "found a list of several kinds, expected {PROMPT}"
                            )));
                        }
                    }
                    if prompts.len() > MAX_PROMPTS {
                        let what =
                            format_args!("found more than {MAX_PROMPTS} prompts, expected at most {MAX_PROMPTS}");
                        return Err(A::Error::custom(what));
                    }
                }
                match (prompts.is_empty(), tokens.is_empty()) {
                    (true, true) => Err(empty()),
                    (true, false) => Ok(Prompts(vec![Prompt::Tokens(tokens)])),
                    (false, _) => Ok(Prompts(prompts)),
                }
            }
        }
        fn empty<E: Error>() -> E {
            E::custom("found an empty list, expected a text or a token id at least")
        }
        deserializer.deserialize_any(Any)
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id, or a list of token ids")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                let wrong = |_| E::custom(format_args!("found {id}, expected a token id"));
                u32::try_from(id).map(Element::Token).map_err(wrong)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut ids = Vec::new();
                while let Some(TokenId(id)) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(Element::Tokens(ids))
            }
        }
        deserializer.deserialize_any(Any)
    }
}
