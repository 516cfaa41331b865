//! Requests that clients really send, and what they become.

use serde_json::{Map, Value, json};

use crate::api::{
    ChatRequest, CompletionRequest, DetokenizeRequest, Options, OutputFormat, Prompt, TokenizeInput, TokenizeRequest,
    Tool, ToolChoice,
};
use crate::text::Message;

fn chat(body: &Value) -> ChatRequest {
    ChatRequest::parse(body.to_string().as_bytes()).unwrap_or_else(|e| panic!("{body}: {e}"))
}

fn completion(body: &Value) -> CompletionRequest {
    CompletionRequest::parse(body.to_string().as_bytes()).unwrap_or_else(|e| panic!("{body}: {e}"))
}

/// A chat with one field more.
fn with(field: &str, value: impl Into<Value>) -> ChatRequest {
    let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    body[field] = value.into();
    chat(&body)
}

fn message(role: &str, content: Option<&str>, more: &Value) -> Message {
    let more = more.as_object().cloned().unwrap_or_default();
    Message { role: role.into(), content: content.map(Into::into), more }
}

#[test]
fn a_chat_of_one_message_leaves_all_to_the_defaults() {
    let expected = ChatRequest {
        model: None,
        messages: vec![Message::user("Hi")],
        prefix: false,
        tools: Vec::new(),
        tool_choice: ToolChoice::None,
        parallel_tool_calls: true,
        thinking: None,
        format: OutputFormat::Text,
        options: Options::default(),
    };
    assert_eq!(chat(&json!({ "messages": [{ "role": "user", "content": "Hi" }] })), expected);
    // As clients write that send every field they know.
    let nulls = json!({
        "messages": [{ "role": "user", "content": "Hi", "name": null, "tool_calls": null, "audio": null,
                       "function_call": null, "refusal": null, "annotations": [] }],
        "model": null, "max_tokens": null, "temperature": null, "top_p": null, "n": null, "stop": null, "seed": null,
        "logit_bias": null, "logprobs": null, "top_logprobs": null, "stream": null, "stream_options": null,
        "tools": null, "tool_choice": null, "response_format": null, "thinking": null, "functions": null,
        "modalities": ["text"], "audio": null, "best_of": 1, "use_beam_search": false, "length_penalty": 1.0,
        "skip_special_tokens": true, "add_generation_prompt": true, "stop_token_ids": [], "store": false,
        "metadata": {"a": [1, {"b": null}]}, "service_tier": "auto", "chat_template_kwargs": null,
    });
    assert_eq!(chat(&nulls), expected);
}

#[test]
fn all_options_are_taken() {
    let body = json!({
        "model": "m", "prompt": "x", "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.25,
        "min_p": 0.125, "repetition_penalty": 1.5, "top_k": 3, "presence_penalty": -2, "frequency_penalty": 2.0,
        "seed": -1, "stop": ["a", "b"], "n": 16, "best_of": 16, "logit_bias": {"7": -100, "0": 100, "12": 0.5},
        "logprobs": 0, "stream": true, "stream_options": {"include_usage": true, "other": 1}, "routed_experts": true,
        "priority": 3, "user": "u", "response_format": {"type": "json_object"}, "echo": false,
    });
    let expected = Options {
        max_tokens: Some(7),
        temperature: Some(0.5),
        top_p: Some(0.25),
        min_p: Some(0.125),
        repetition_penalty: Some(1.5),
        top_k: Some(3),
        presence_penalty: -2.0,
        frequency_penalty: 2.0,
        seed: Some(u64::MAX),
        stop: vec!["a".into(), "b".into()],
        n: 16,
        logit_bias: vec![(0, 100.0), (7, -100.0), (12, 0.5)],
        logprobs: Some(0),
        stream: true,
        include_usage: true,
        routed_experts: true,
        priority: -3,
        user: Some("u".into()),
    };
    let request = completion(&body);
    assert_eq!(request.options, expected);
    assert_eq!(request.model.as_deref(), Some("m"));
    assert_eq!(request.format, OutputFormat::JsonObject);
}

#[test]
fn numbers_may_be_written_in_any_way() {
    let options = |text: &str| {
        let body = format!(r#"{{"messages": [{{"role": "user", "content": ""}}], {text}}}"#);
        ChatRequest::parse(body.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e}")).options
    };
    assert_eq!(options(r#""max_tokens": 1e2"#).max_tokens, Some(100));
    assert_eq!(options(r#""n": 2.0"#).n, 2);
    assert_eq!(options(r#""max_tokens": 4294967295"#).max_tokens, Some(u32::MAX));
    assert_eq!(options(r#""seed": 18446744073709551615"#).seed, Some(u64::MAX));
    assert_eq!(options(r#""seed": -9223372036854775808"#).seed, Some(1 << 63));
    assert_eq!(options(r#""seed": -0"#).seed, Some(0));
    assert_eq!(options(r#""temperature": -0"#).temperature.map(f32::to_bits), Some(0));
    assert_eq!(options(r#""temperature": -0.0"#).temperature.map(f32::to_bits), Some(0));
    // Too cold to divide by.
    assert_eq!(options(r#""temperature": 1e-30"#).temperature, Some(0.0));
    assert_eq!(options(r#""temperature": 0.01"#).temperature, Some(0.01));
    assert_eq!(options(r#""top_k": -1"#).top_k, Some(0));
    assert_eq!(options(r#""priority": -2147483648"#).priority, i32::MAX);
    assert_eq!(options(r#""stop": "x""#).stop, ["x"]);
    assert_eq!(options(r#""stop": []"#).stop, [""; 0]);
}

#[test]
fn conversations_are_taken_as_templates_want_them() {
    let request = chat(&json!({ "messages": [
        { "role": "developer", "content": "Be brief.", "name": "d" },
        { "role": "user", "content": [{ "type": "text", "text": "one" }, { "text": " two", "type": "text", "x": 1 }] },
        { "role": "assistant", "reasoning_content": "hm", "tool_calls": [
            { "id": "a", "type": "function", "function": { "name": "f", "arguments": "{not json" } },
            { "id": "b", "function": { "name": "g", "arguments": "" }, "index": 1 } ] },
        { "role": "tool", "tool_call_id": "a", "content": "1", "name": "f" },
        { "role": "assistant", "content": "So", "prefix": true, "reasoning_content": "" },
    ] }));
    let call = |id: &str, name: &str, arguments: &str| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
    let calls = [call("a", "f", "{not json"), call("b", "g", "")];
    let expected = [
        message("system", Some("Be brief."), &json!({ "name": "d" })),
        message("user", Some("one two"), &json!({})),
        message("assistant", None, &json!({ "reasoning_content": "hm", "tool_calls": calls })),
        message("tool", Some("1"), &json!({ "name": "f", "tool_call_id": "a" })),
        message("assistant", Some("So"), &json!({ "reasoning_content": "" })),
    ];
    assert_eq!(request.messages, expected);
    assert!(request.prefix);
    // The continued message may have no text so far; without `prefix` it is an earlier answer.
    let last = |message: Value| chat(&json!({ "messages": [{ "role": "user", "content": "" }, message] }));
    let begun = last(json!({ "role": "assistant", "content": null, "prefix": true, "reasoning_content": "I think" }));
    assert_eq!((begun.messages[1].content.as_deref(), begun.prefix), (Some(""), true));
    assert!(!last(json!({ "role": "assistant", "content": "x" })).prefix);
    assert!(!last(json!({ "role": "assistant", "content": "x", "prefix": false })).prefix);
    // No calls is the same as none.
    let none = last(json!({ "role": "assistant", "content": "x", "tool_calls": [] }));
    assert_eq!(none.messages[1].more, Map::new());
    assert_eq!(chat(&json!({ "messages": vec![json!({ "role": "user", "content": [] }); 4096] })).messages.len(), 4096);
}

#[test]
fn tools_and_choices_are_taken() {
    let tools = json!([
        { "type": "function", "function": { "name": "a-1", "description": "A", "strict": true, "x": 1,
          "parameters": { "type": "object", "properties": { "z": {}, "a": {} } } } },
        { "type": "function", "function": { "name": "B_" } },
    ]);
    let request = |choice: Value| {
        let messages = json!([{ "role": "user", "content": "" }]);
        chat(&json!({ "messages": messages, "tools": tools, "tool_choice": choice, "parallel_tool_calls": false }))
    };
    let parameters = json!({ "type": "object", "properties": { "z": {}, "a": {} } });
    let none = json!({ "type": "object", "properties": {} });
    let expected = [
        Tool {
            name: "a-1".into(),
            description: Some("A".into()),
            parameters: parameters.clone(),
            strict: true,
            raw: json!({ "type": "function", "function": {
                "name": "a-1", "description": "A", "parameters": parameters, "strict": true } }),
        },
        Tool {
            name: "B_".into(),
            description: None,
            parameters: none.clone(),
            strict: false,
            raw: json!({ "type": "function", "function": { "name": "B_", "description": "", "parameters": none } }),
        },
    ];
    let auto = request(Value::Null);
    assert_eq!(auto.tools, expected);
    // Templates print tools as they stand, so their order is the client's.
    assert!(auto.tools[0].raw.to_string().contains(r#""z":{},"a":{}"#));
    assert!(!auto.parallel_tool_calls);
    assert_eq!(auto.tool_choice, ToolChoice::Auto);
    assert_eq!(request("auto".into()).tool_choice, ToolChoice::Auto);
    assert_eq!(request("none".into()).tool_choice, ToolChoice::None);
    assert_eq!(request("required".into()).tool_choice, ToolChoice::Required);
    let named = json!({ "type": "function", "function": { "name": "B_" } });
    assert_eq!(request(named).tool_choice, ToolChoice::Function("B_".into()));
    assert_eq!(with("tool_choice", "auto").tool_choice, ToolChoice::None);
    assert_eq!(with("tools", json!([])).tools, []);
}

#[test]
fn thinking_may_be_asked_for_in_four_ways() {
    assert_eq!(with("thinking", json!({ "type": "enabled" })).thinking, Some(true));
    assert_eq!(with("thinking", json!({ "type": "disabled", "x": 1 })).thinking, Some(false));
    assert_eq!(with("reasoning_effort", "none").thinking, Some(false));
    assert_eq!(with("reasoning_effort", "high").thinking, None);
    assert_eq!(with("chat_template_kwargs", json!({ "thinking": true })).thinking, Some(true));
    assert_eq!(with("chat_template_kwargs", json!({ "enable_thinking": false })).thinking, Some(false));
    assert_eq!(with("chat_template_kwargs", json!({})).thinking, None);
}

#[test]
fn formats_may_be_asked_for_in_many_ways() {
    let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
    let named = |name: &str| OutputFormat::JsonSchema { name: name.into(), schema: schema.clone() };
    let response = |value: Value| with("response_format", value).format;
    assert_eq!(response(json!({ "type": "text" })), OutputFormat::Text);
    assert_eq!(response(json!({ "type": "json_object", "json_schema": null })), OutputFormat::JsonObject);
    let body = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema, "strict": false } });
    assert_eq!(response(body), named("n"));
    assert_eq!(response(json!({ "type": "json_schema", "json_schema": { "schema": schema } })), named("schema"));
    assert_eq!(response(json!({ "type": "regex", "pattern": "a|b" })), OutputFormat::Regex("a|b".into()));
    assert_eq!(with("guided_json", schema.clone()).format, named("schema"));
    assert_eq!(with("guided_json", schema.to_string()).format, named("schema"));
    assert_eq!(with("guided_regex", "a").format, OutputFormat::Regex("a".into()));
    assert_eq!(with("structured_outputs", json!({ "json": schema })).format, named("schema"));
    assert_eq!(with("structured_outputs", json!({ "json": schema, "choice": null })).format, named("schema"));
    assert_eq!(with("structured_outputs", json!({ "regex": "a" })).format, OutputFormat::Regex("a".into()));
    assert_eq!(with("structured_outputs", json!({ "json_object": true })).format, OutputFormat::JsonObject);
    assert_eq!(with("structured_outputs", json!({})).format, OutputFormat::Text);
}

#[test]
fn logprobs_of_chats_and_completions() {
    let body = |logprobs: Value, top: Value| {
        let messages = json!([{ "role": "user", "content": "" }]);
        chat(&json!({ "messages": messages, "logprobs": logprobs, "top_logprobs": top })).options.logprobs
    };
    assert_eq!(body(true.into(), Value::Null), Some(0));
    assert_eq!(body(true.into(), 20.into()), Some(20));
    assert_eq!(body(false.into(), 0.into()), None);
    assert_eq!(body(Value::Null, Value::Null), None);
    assert_eq!(completion(&json!({ "prompt": "", "logprobs": 20 })).options.logprobs, Some(20));
    assert_eq!(completion(&json!({ "prompt": "" })).options.logprobs, None);
}

#[test]
fn prompts_may_be_texts_or_tokens_one_or_many() {
    let prompts = |value: Value| completion(&json!({ "prompt": value })).prompts;
    let text = |text: &str| Prompt::Text(text.into());
    assert_eq!(prompts("a".into()), [text("a")]);
    assert_eq!(prompts(json!(["a", ""])), [text("a"), text("")]);
    assert_eq!(prompts(json!([1, 4_294_967_295_u32])), [Prompt::Tokens(vec![1, u32::MAX])]);
    assert_eq!(prompts(json!([[1], [2, 3]])), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
    assert_eq!(prompts(json!(["a", [1]])), [text("a"), Prompt::Tokens(vec![1])]);
    let gap = completion(&json!({ "prompt": "a", "suffix": "b", "echo": true }));
    assert_eq!((gap.suffix.as_deref(), gap.echo), (Some("b"), true));
    assert_eq!(completion(&json!({ "prompt": [1], "suffix": "" })).suffix, None);
}

#[test]
fn texts_and_conversations_are_tokenized() {
    let tokenize = |body: Value| TokenizeRequest::parse(body.to_string().as_bytes()).unwrap();
    let text = |prompt: &str, add_special_tokens| TokenizeInput::Text { prompt: prompt.into(), add_special_tokens };
    assert_eq!(tokenize(json!({ "prompt": "a" })).input, text("a", true));
    assert_eq!(tokenize(json!({ "prompt": "", "add_special_tokens": false })).input, text("", false));
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "Hi" }], "add_special_tokens": false,
                       "tools": [{ "type": "function", "function": { "name": "f" } }], "add_generation_prompt": false });
    let request = tokenize(body);
    assert_eq!(request.model.as_deref(), Some("m"));
    let TokenizeInput::Chat { request, add_generation_prompt: false } = request.input else { panic!("{request:?}") };
    assert_eq!((request.messages, request.tools.len()), (vec![Message::user("Hi")], 1));
    let tokens = DetokenizeRequest::parse(br#"{"tokens": [0, 4294967295], "model": "m"}"#).unwrap();
    assert_eq!(tokens, DetokenizeRequest { model: Some("m".into()), tokens: vec![0, u32::MAX] });
}
