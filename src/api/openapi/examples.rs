//! Examples of requests. Each can be sent as it stands.

use std::collections::BTreeMap;

use utoipa::openapi::RefOr;
use utoipa::openapi::example::{Example, ExampleBuilder};

/// Examples: name, what they show, and the body.
pub(super) type Examples = &'static [(&'static str, &'static str, &'static str)];

/// Examples as the document has them.
pub(super) fn read(examples: &Examples) -> BTreeMap<String, RefOr<Example>> {
    let read = |(name, summary, body): &(&str, &str, &str)| {
        let body = serde_json::from_str(body).expect("examples are JSON");
        ((*name).to_owned(), ExampleBuilder::new().summary(*summary).value(Some(body)).build().into())
    };
    examples.iter().map(read).collect()
}

pub(super) const CHAT: Examples = &[
    (
        "question",
        "A question",
        r#"{
            "model": "demo",
            "messages": [
                {"role": "system", "content": "Answer in one sentence."},
                {"role": "user", "content": "Why is the sky blue?"}
            ],
            "max_tokens": 64,
            "temperature": 0.6
        }"#,
    ),
    (
        "stream",
        "An answer piece by piece, with its usage and the experts that its tokens chose",
        r#"{
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}],
            "stream": true,
            "stream_options": {"include_usage": true},
            "routed_experts": true,
            "seed": 7
        }"#,
    ),
    (
        "schema",
        "An answer that fits a JSON schema, with log probabilities",
        r#"{
            "messages": [{"role": "user", "content": "Name a city and how many people live there."}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "city",
                    "strict": true,
                    "schema": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
                        "required": ["name", "people"],
                        "additionalProperties": false
                    }
                }
            },
            "logprobs": true,
            "top_logprobs": 3
        }"#,
    ),
    (
        "tools",
        "A conversation with a tool, thinking allowed",
        r#"{
            "messages": [
                {"role": "user", "content": "What is the weather in Bremen?"},
                {
                    "role": "assistant",
                    "content": null,
                    "tool_calls": [{
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": "{\"city\": \"Bremen\"}"}
                    }]
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "rain, 12 degrees"}
            ],
            "tools": [{
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Tells the weather of a city.",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string"}},
                        "required": ["city"]
                    }
                }
            }],
            "tool_choice": "auto",
            "thinking": {"type": "enabled"}
        }"#,
    ),
    (
        "prefix",
        "An answer that goes on from a beginning and ends before a text",
        r#"{
            "messages": [
                {"role": "user", "content": "Write a function that doubles a number."},
                {"role": "assistant", "content": "```python\n", "prefix": true}
            ],
            "stop": ["```"]
        }"#,
    ),
];

pub(super) const COMPLETION: Examples = &[
    (
        "text",
        "Two texts to continue, greedily",
        r#"{"model": "demo", "prompt": ["Once upon a time", "The end"], "max_tokens": 16, "temperature": 0}"#,
    ),
    ("tokens", "Token ids to continue, with log probabilities", r#"{"prompt": [1, 17, 4], "logprobs": 2, "n": 2}"#),
    (
        "gap",
        "A gap to fill",
        r#"{"prompt": "def double(x):\n    ", "suffix": "\nprint(double(21))", "max_tokens": 32}"#,
    ),
    (
        "regex",
        "A text that a pattern matches",
        r#"{"prompt": "Is water wet? ", "guided_regex": "yes|no", "logit_bias": {"17": -100}}"#,
    ),
];

pub(super) const TOKENIZE: Examples = &[
    ("text", "A text", r#"{"model": "demo", "prompt": "Hello", "add_special_tokens": false}"#),
    (
        "conversation",
        "A conversation as the model gets it",
        r#"{"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": true}"#,
    ),
];

pub(super) const DETOKENIZE: Examples = &[("tokens", "Token ids", r#"{"model": "demo", "tokens": [17, 4]}"#)];
