//! Mistakes, and what is said of them.

use crate::api::{ApiError, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest};

/// An error as a line: code, field, message.
fn line(error: &ApiError) -> String {
    assert_eq!((error.status, error.kind, error.retry_after), (400, "invalid_request_error", None));
    format!("[{}] {} | {}", error.code.unwrap(), error.param.as_deref().unwrap_or("-"), error.message)
}

/// What is said of each body, under the body.
fn said<T: std::fmt::Debug>(bodies: &[&str], parse: impl Fn(&[u8]) -> Result<T, ApiError>) -> String {
    let said = |body: &&str| format!("{body}\n    {}\n", line(&parse(body.as_bytes()).expect_err(body)));
    bodies.iter().map(said).collect()
}

/// A chat of one message with more fields.
fn chat(fields: &[&str]) -> String {
    said(fields, |field| {
        let mut body = br#"{"messages": [{"role": "user", "content": "Hi"}], "#.to_vec();
        body.extend(field);
        body.push(b'}');
        ChatRequest::parse(&body)
    })
}

/// A chat of these messages.
fn conversation(messages: &[&str]) -> String {
    said(messages, |messages| ChatRequest::parse(&[br#"{"messages": "#.as_slice(), messages, br"}"].concat()))
}

macro_rules! snapshot {
    ($name:literal, $said:expr) => {
        insta::with_settings!({ omit_expression => true }, { insta::assert_snapshot!($name, $said) })
    };
}

#[test]
fn bodies_that_are_not_json_objects() {
    let bodies = [
        "",
        " \n",
        "{",
        "nonsense",
        "\u{feff}{}",
        "[]",
        "[[]]",
        "7",
        "null",
        "\"text\"",
        "{}",
        "{} {}",
        r#"{"messages": [{"role": "user", "content": "Hi"}]"#,
        r#"{"messages": [{"role": "user", "content": "H"#,
        r#"{"messages": [{"role": "user", "content": "\ud800"}]}"#,
        r#"{"messages": [{"role": "user", "content": "\x"}]}"#,
        r#"{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}"#,
        r#"{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}"#,
        r#"{"messages": [{"role": "user", "content": "Hi"}], "temperature": -Infinity}"#,
        r#"{"messages": [{"role": "user", "content": "Hi"}], "temperature": 01}"#,
        r#"{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1,}"#,
    ];
    snapshot!("bodies", said(&bodies, ChatRequest::parse));
    let invalid = b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\"}]}";
    assert_eq!(ChatRequest::parse(invalid).unwrap_err().param.as_deref(), Some("messages[0].content"));
}

#[test]
fn options_out_of_range() {
    snapshot!(
        "options",
        chat(&[
            r#""temperature": "hot""#,
            r#""temperature": 2.0001"#,
            r#""temperature": -0.1"#,
            r#""temperature": 1e300"#,
            r#""temperature": [1]"#,
            r#""temperature": 1, "temperature": 1"#,
            r#""top_p": 0"#,
            r#""top_p": 1e-60"#,
            r#""top_p": 1.5"#,
            r#""min_p": -1"#,
            r#""repetition_penalty": 0"#,
            r#""repetition_penalty": 2.5"#,
            r#""presence_penalty": 2.1"#,
            r#""frequency_penalty": -3"#,
            r#""top_k": -2"#,
            r#""top_k": 1.5"#,
            r#""max_tokens": 0"#,
            r#""max_tokens": -1"#,
            r#""max_tokens": 4294967296"#,
            r#""max_tokens": 123456789012345678901234567890"#,
            r#""max_tokens": "10""#,
            r#""max_completion_tokens": 0"#,
            r#""n": 0"#,
            r#""n": 17"#,
            r#""n": true"#,
            r#""best_of": 2"#,
            r#""n": 2, "best_of": 1"#,
            r#""seed": 1.5"#,
            r#""seed": 18446744073709551616"#,
            r#""seed": -9223372036854775809"#,
            r#""priority": 2147483648"#,
            r#""stop": """#,
            r#""stop": ["a", ""]"#,
            r#""stop": [1]"#,
            r#""stop": {"a": 1}"#,
            r#""stop": ["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"]"#,
            r#""stream": 1"#,
            r#""stream": "true""#,
            r#""stream_options": []"#,
            r#""stream_options": {"include_usage": "yes"}"#,
            r#""stream_options": {"include_usage": true, "include_usage": true}"#,
            r#""logit_bias": []"#,
            r#""logit_bias": {"a": 1}"#,
            r#""logit_bias": {"01": 1}"#,
            r#""logit_bias": {"+1": 1}"#,
            r#""logit_bias": {"-1": 1}"#,
            r#""logit_bias": {"4294967296": 1}"#,
            r#""logit_bias": {"7": 100.5}"#,
            r#""logit_bias": {"7": null}"#,
            r#""logit_bias": {"7": 1, "8": 1, "7": 1}"#,
            r#""logprobs": 3"#,
            r#""top_logprobs": 3"#,
            r#""logprobs": true, "top_logprobs": 21"#,
            r#""logprobs": true, "top_logprobs": -1"#,
            r#""routed_experts": 1"#,
            r#""user": 5"#,
            r#""model": {"a": 1}"#,
        ])
    );
    let long = format!("\"stop\": \"{}\"", "x".repeat(257));
    assert!(chat(&[&long]).ends_with("`stop[0]`: found 257 bytes, expected a text of 1 to 256 bytes\n"));
    let many: Vec<_> = (0..1025).map(|id| format!("\"{id}\": 1")).collect();
    let many = format!("\"logit_bias\": {{{}}}", many.join(","));
    assert!(chat(&[&many]).contains("`logit_bias`: found more than 1024 tokens, expected at most 1024"));
}

#[test]
fn conversations_that_make_no_sense() {
    snapshot!(
        "conversations",
        conversation(&[
            "[]",
            "null",
            "{}",
            "\"Hi\"",
            "[null]",
            r#"[["user", "Hi"]]"#,
            r#"["Hi"]"#,
            "[{}]",
            r#"[{"content": "Hi"}]"#,
            r#"[{"role": "robot", "content": "Hi"}]"#,
            r#"[{"role": "function", "name": "f", "content": "Hi"}]"#,
            r#"[{"role": 1, "content": "Hi"}]"#,
            r#"[{"role": "user"}]"#,
            r#"[{"role": "user", "content": null}]"#,
            r#"[{"role": "user", "content": 5}]"#,
            r#"[{"role": "user", "content": {"type": "text", "text": "Hi"}}]"#,
            r#"[{"role": "user", "content": ["Hi"]}]"#,
            r#"[{"role": "user", "content": [{"text": "Hi"}]}]"#,
            r#"[{"role": "user", "content": [{"type": "text"}]}]"#,
            r#"[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]}]"#,
            r#"[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]"#,
            r#"[{"role": "user", "content": "a", "content": "b"}]"#,
            r#"[{"role": "user", "content": "a", "name": 5}]"#,
            r#"[{"role": "tool", "content": "a"}]"#,
            r#"[{"role": "tool", "tool_call_id": "a"}]"#,
            r#"[{"role": "assistant", "content": null}]"#,
            r#"[{"role": "assistant", "content": "a", "audio": {"id": "x"}}]"#,
            r#"[{"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": ""}}]"#,
            r#"[{"role": "assistant", "tool_calls": {}}]"#,
            r#"[{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": ""}}]}]"#,
            r#"[{"role": "assistant", "tool_calls": [{"id": "a", "type": "custom"}]}]"#,
            r#"[{"role": "assistant", "tool_calls": [{"id": "a"}]}]"#,
            r#"[{"role": "assistant", "tool_calls": [{"id": "a", "function": {"arguments": ""}}]}]"#,
            r#"[{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]}]"#,
            r#"[{"role": "user", "content": "a", "prefix": true}]"#,
            r#"[{"role": "assistant", "content": "a", "prefix": true}, {"role": "user", "content": "a"}]"#,
            r#"[{"role": "assistant", "prefix": true, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]}]"#,
        ])
    );
    let many = vec![r#"{"role": "user", "content": ""}"#; 4097].join(",");
    assert!(conversation(&[&format!("[{many}]")]).contains("`messages`: found more than 4096 elements"));
}

#[test]
fn tools_thinking_and_formats_that_cannot_be() {
    let tool = r#""tools": [{"type": "function", "function": {"name": "f"}}]"#;
    snapshot!(
        "extras",
        chat(&[
            r#""tools": {}"#,
            r#""tools": [{}]"#,
            r#""tools": [{"type": "web_search"}]"#,
            r#""tools": [{"type": "function"}]"#,
            r#""tools": [{"type": "function", "function": {}}]"#,
            r#""tools": [{"type": "function", "function": {"name": "a b"}}]"#,
            r#""tools": [{"type": "function", "function": {"name": ""}}]"#,
            r#""tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]"#,
            r#""tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": {"b": 1, "b": 2}}}}]"#,
            r#""tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1e999]}}}]"#,
            r#""tools": [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "f"}}]"#,
            r#""tool_choice": "required""#,
            r#""tool_choice": "sometimes""#,
            r#""tool_choice": 1"#,
            r#""tool_choice": {}"#,
            r#""tool_choice": {"type": "function"}"#,
            r#""tool_choice": {"type": "allowed_tools"}"#,
            &format!(r#"{tool}, "tool_choice": {{"type": "function", "function": {{"name": "g"}}}}"#),
            r#""parallel_tool_calls": "no""#,
            r#""thinking": true"#,
            r#""thinking": {}"#,
            r#""thinking": {"type": "a lot"}"#,
            r#""reasoning_effort": "huge""#,
            r#""chat_template_kwargs": {"thinking": "yes"}"#,
            r#""chat_template_kwargs": {"custom": 1}"#,
            r#""thinking": {"type": "enabled"}, "reasoning_effort": "none""#,
            r#""chat_template_kwargs": {"thinking": true, "enable_thinking": false}"#,
            r#""response_format": "json""#,
            r#""response_format": {}"#,
            r#""response_format": {"type": "yaml"}"#,
            r#""response_format": {"type": "json_schema"}"#,
            r#""response_format": {"type": "json_schema", "json_schema": {"name": "a"}}"#,
            r#""response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": true}}"#,
            r#""response_format": {"type": "regex"}"#,
            r#""response_format": {"type": "regex", "pattern": ""}"#,
            r#""guided_json": "{""#,
            r#""guided_json": "[]""#,
            r#""guided_json": 5"#,
            r#""guided_regex": 5"#,
            r#""guided_choice": ["a", "b"]"#,
            r#""structured_outputs": {"choice": ["a", "b"]}"#,
            r#""structured_outputs": {"json": {}, "regex": "a"}"#,
            r#""guided_regex": "a", "response_format": {"type": "json_object"}"#,
        ])
    );
    let long = format!("\"guided_regex\": \"{}\"", "x".repeat((64 << 10) + 1));
    assert!(chat(&[&long]).ends_with("`guided_regex`: found 65537 bytes, expected at most 65536\n"));
}

#[test]
fn what_cannot_be_honoured() {
    snapshot!(
        "unsupported",
        chat(&[
            r#""audio": {"voice": "alloy"}"#,
            r#""modalities": ["text", "audio"]"#,
            r#""functions": [{"name": "f"}]"#,
            r#""function_call": "auto""#,
            r#""web_search_options": {}"#,
            r#""verbosity": "low""#,
            r#""echo": true"#,
            r#""continue_final_message": true"#,
            r#""add_generation_prompt": false"#,
            r#""chat_template": "{{ messages }}""#,
            r#""documents": [{}]"#,
            r#""min_tokens": 5"#,
            r#""ignore_eos": true"#,
            r#""stop_token_ids": [1]"#,
            r#""include_stop_str_in_output": true"#,
            r#""prompt_logprobs": 0"#,
            r#""use_beam_search": true"#,
            r#""length_penalty": 1.5"#,
            r#""skip_special_tokens": false"#,
            r#""min_tokens": 5, "min_tokens": 0"#,
        ])
    );
}

#[test]
fn completions_and_tokens_with_mistakes() {
    let bodies = [
        "{}",
        r#"{"prompt": null}"#,
        r#"{"prompt": 5}"#,
        r#"{"prompt": {}}"#,
        r#"{"prompt": []}"#,
        r#"{"prompt": [[]]}"#,
        r#"{"prompt": [1, "a"]}"#,
        r#"{"prompt": ["a", 1]}"#,
        r#"{"prompt": [[1], 1]}"#,
        r#"{"prompt": [-1]}"#,
        r#"{"prompt": [1.5]}"#,
        r#"{"prompt": [4294967296]}"#,
        r#"{"prompt": [[1], [-1]]}"#,
        r#"{"prompt": [[["a"]]]}"#,
        r#"{"prompt": [null]}"#,
        r#"{"prompt": "a", "suffix": 5}"#,
        r#"{"prompt": [1], "suffix": "b"}"#,
        r#"{"prompt": "a", "echo": true, "logprobs": 0}"#,
        r#"{"prompt": "a", "logprobs": 21}"#,
        r#"{"prompt": "a", "logprobs": true}"#,
        r#"{"prompt": "a", "best_of": 3}"#,
        r#"{"prompt": "a", "messages": []}"#,
        r#"{"prompt": "a", "add_special_tokens": false}"#,
    ];
    snapshot!("completions", said(&bodies, CompletionRequest::parse));
    let many = format!(r#"{{"prompt": [{}]}}"#, vec![r#""a""#; 129].join(","));
    assert!(said(&[&many], CompletionRequest::parse).contains("`prompt`: found more than 128 prompts"));
    let bodies = [
        "{}",
        r#"{"prompt": ["a"]}"#,
        r#"{"prompt": "a", "messages": []}"#,
        r#"{"messages": []}"#,
        r#"{"messages": [{"role": "user", "content": ""}], "add_special_tokens": true}"#,
        r#"{"messages": [{"role": "user", "content": ""}], "chat_template": "x"}"#,
        r#"{"prompt": "a", "add_special_tokens": 1}"#,
    ];
    snapshot!("tokenize", said(&bodies, TokenizeRequest::parse));
    let bodies = ["{}", r#"{"tokens": "a"}"#, r#"{"tokens": [-1]}"#, r#"{"tokens": [[1]]}"#, r#"{"tokens": [1e10]}"#];
    snapshot!("detokenize", said(&bodies, DetokenizeRequest::parse));
}
