//! A model that thinks, calls tools and fills gaps. Its weights know nothing of that, so that constraints make it call.

use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::cli::{demo, root};
use crate::harness::{Server, chat};
use crate::model::write_model;

fn with_all(ask: impl FnOnce(&Server)) {
    // One server is enough, and it ends with the test.
    static DIR: OnceLock<std::path::PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = root().join("everything");
        std::fs::create_dir_all(&dir).unwrap();
        write_model(&demo(), &dir);
        dir
    });
    ask(&Server::of(dir, &[]));
}

/// The pieces of one kind of a stream's deltas.
fn pieces(chunks: &[Value], field: &str) -> String {
    let deltas = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    deltas.filter_map(|choice| choice["delta"][field].as_str()).collect()
}

fn weather() -> Value {
    let parameters = json!({
        "type": "object", "properties": { "place": { "enum": ["Rome", "Oslo"] } }, "required": ["place"],
        "additionalProperties": false,
    });
    json!({ "type": "function", "function": { "name": "get_weather", "parameters": parameters } })
}

#[test]
fn reasoning_tools_and_gaps() {
    with_all(|server| {
        // What it thinks is told apart, and counted.
        let body =
            chat("Why?", &json!({ "thinking": { "type": "enabled" }, "max_tokens": 12, "logit_bias": { "1": -100 } }));
        let whole = server.json("/v1/chat/completions", &body);
        let message = &whole["choices"][0]["message"];
        assert!(message["reasoning_content"].as_str().is_some_and(|text| !text.is_empty()), "{whole}");
        assert_eq!(message["content"], "");
        assert_eq!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"], 12);
        let chunks = server.stream("/v1/chat/completions", &body).all();
        assert_eq!(json!(pieces(&chunks, "reasoning_content")), message["reasoning_content"]);
        assert_eq!(pieces(&chunks, "content"), "");

        // Calls, whole and in pieces.
        for choice in [json!("required"), json!({ "type": "function", "function": { "name": "get_weather" } })] {
            let more =
                json!({ "tools": [weather()], "tool_choice": choice, "max_tokens": 200, "parallel_tool_calls": false });
            let body = chat("Weather?", &more);
            let whole = server.json("/v1/chat/completions", &body);
            let choice = &whole["choices"][0];
            assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            assert_eq!((calls.len(), &calls[0]["function"]["name"]), (1, &json!("get_weather")), "{whole}");
            let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
            let place = serde_json::from_str::<Value>(arguments).unwrap()["place"].clone();
            assert!(["Rome", "Oslo"].contains(&place.as_str().unwrap()), "{arguments}");
            let chunks = server.stream("/v1/chat/completions", &body).all();
            let deltas = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0]);
            let deltas: Vec<&Value> = deltas.filter(|delta| delta.is_object()).collect();
            assert_eq!(deltas[0]["function"]["name"], "get_weather");
            assert!(deltas[0]["id"].as_str().unwrap().starts_with("call_"));
            let joined: String = deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
            assert_eq!(joined, arguments);
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
        }
        // A call cannot be free and bound at once.
        let mut strict = weather();
        strict["function"]["strict"] = true.into();
        let both = json!({ "tools": [strict], "response_format": { "type": "json_object" } });
        assert_eq!(server.post("/v1/chat/completions", &chat("Weather?", &both)).error()["param"], "response_format");

        // Gaps.
        let body = json!({ "prompt": "The king", "suffix": " to the people.", "max_tokens": 4 });
        assert_eq!(server.json("/beta/completions", &body)["usage"]["completion_tokens"], 4);
    });
}
