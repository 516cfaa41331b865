//! Fields that this server knows, that would change the answer, and that it cannot honour.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::read::read;
use super::types::Json;
use crate::api::ApiError;

/// What a body is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Chat,
    Completion,
    Tokenize,
}

use Route::{Chat, Completion, Tokenize};

/// A field: its name, where it is known, the value that changes nothing (as JSON; null always does not), and what to do
/// without it.
type Field = (&'static str, &'static [Route], &'static str, &'static str);

const ALL: &[Route] = &[Chat, Completion];

const FIELDS: &[Field] = &[
    ("audio", &[Chat], "null", "the model writes text only"),
    ("modalities", &[Chat], "[\"text\"]", "the model writes text only"),
    ("functions", &[Chat], "[]", "give them as `tools`"),
    ("function_call", &[Chat], "\"none\"", "say it by `tool_choice`"),
    ("web_search_options", &[Chat], "null", "the server searches nothing; give the model a tool for it"),
    ("verbosity", &[Chat], "\"medium\"", "say in a message how long the answer should be"),
    ("echo", &[Chat], "false", "only completions can begin with their prompt"),
    ("continue_final_message", &[Chat], "false", "mark the last message by `prefix`: true"),
    ("add_generation_prompt", &[Chat], "true", "mark the last message by `prefix`: true to go on from it"),
    ("add_special_tokens", &[Chat], "false", "the chat template has them"),
    ("chat_template", &[Chat, Tokenize], "null", "the server uses the model's own"),
    ("documents", &[Chat, Tokenize], "[]", "put them into a message"),
    ("add_special_tokens", &[Completion], "true", "give the prompt as token ids"),
    ("prompt_embeds", &[Completion], "null", "give the prompt as text or token ids"),
    ("messages", &[Completion], "null", "conversations are for /v1/chat/completions"),
    ("min_tokens", ALL, "0", "the server does not put off the end of a text"),
    ("ignore_eos", ALL, "false", "the server does not put off the end of a text"),
    ("stop_token_ids", ALL, "[]", "give texts as `stop`"),
    ("include_stop_str_in_output", ALL, "false", "add the text that ended the answer yourself"),
    ("bad_words", ALL, "[]", "say it by `logit_bias`"),
    ("allowed_token_ids", ALL, "null", "say it by `logit_bias` or `response_format`"),
    ("prompt_logprobs", ALL, "null", "only generated tokens have log probabilities"),
    ("truncate_prompt_tokens", ALL, "null", "shorten the prompt yourself"),
    ("use_beam_search", ALL, "false", "the server only draws tokens"),
    ("length_penalty", ALL, "1", "the server only draws tokens"),
    ("skip_special_tokens", ALL, "true", "answers never show them"),
    ("guided_choice", ALL, "null", "give a pattern such as \"yes|no\" as `guided_regex`"),
    ("guided_grammar", ALL, "null", "give a schema as `guided_json` or a pattern as `guided_regex`"),
    ("logits_processors", ALL, "null", "say it by `logit_bias`"),
    ("mm_processor_kwargs", ALL, "null", "the model reads text only"),
];

/// Refuses the first such field of a body.
pub(super) fn check(body: &[u8], route: Route) -> Result<(), ApiError> {
    let Known(found) = read(body)?;
    for (name, value) in &found {
        let field = FIELDS.iter().find(|(field, routes, ..)| field == name && routes.contains(&route));
        let Some((_, _, harmless, instead)) = field else { continue };
        let harmless: Value = serde_json::from_str(harmless).expect("the table holds JSON");
        // 1 and 1.0 are the same.
        let same = match (value.as_f64(), harmless.as_f64()) {
            (Some(value), Some(harmless)) => value.total_cmp(&harmless).is_eq(),
            _ => *value == harmless,
        };
        if !same && !value.is_null() {
            return Err(ApiError::unsupported(*name, format!("`{name}` is not supported: {instead}")));
        }
    }
    Ok(())
}

/// The fields of a body that are in the table.
struct Known(Vec<(&'static str, Value)>);

impl<'de> Deserialize<'de> for Known {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Known;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Known, A::Error> {
                let mut known = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    match FIELDS.iter().find(|(field, ..)| *field == key) {
                        Some((field, ..)) => {
                            let Json(value) = map.next_value()?;
                            known.push((*field, value));
                        }
                        None => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(Known(known))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}
