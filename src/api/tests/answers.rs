//! The form of answers.

use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::document::fits;
use crate::api::{
    AnswerMessage, ApiError, CallDelta, ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs, ChunkChoice, Completion,
    CompletionChoice, Delta, Detokenized, FinishReason, LegacyLogprobs, Likeliest, ModelCard, ModelList, ModelShape,
    RoutedExperts, TokenLogprob, Tokenized, ToolCall, TopLogprob, Usage,
};

const FINGERPRINT: &str = concat!("moewe-", env!("CARGO_PKG_VERSION"));

/// Checks an answer's JSON, and that the document describes it.
fn check(answer: &impl serde::Serialize, schema: &str, expected: &Value) {
    let json = serde_json::to_string(answer).unwrap();
    let found: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(&found, expected);
    fits(&found, schema);
}

fn token(text: &str, logprob: f32) -> TokenLogprob {
    let top = vec![TopLogprob { token: "x".into(), logprob: f32::NEG_INFINITY, bytes: vec![120] }];
    TokenLogprob { token: text.into(), logprob, bytes: text.into(), top_logprobs: top }
}

#[test]
fn a_chat_completion() {
    let choice = ChatChoice {
        index: 0,
        message: AnswerMessage::new("Hi".into(), Some("hm".into()), Vec::new()),
        logprobs: Some(ChatLogprobs {
            content: vec![token("Hi", -0.1)],
            reasoning_content: vec![token("hm", f32::NAN)],
        }),
        finish_reason: FinishReason::Stop,
        routed_experts: RoutedExperts::new((0..12).collect(), 3, 2),
    };
    let usage = Usage::new(10, 4, 3, 2).with_cost(0.000_012_5);
    let mut answer = ChatCompletion::new("chatcmpl-1".into(), 5, "m".into(), vec![choice], usage);
    answer.prompt_routed_experts = RoutedExperts::new(vec![65535], 1, 1);
    let never = json!([{ "token": "x", "logprob": -9999.0, "bytes": [120] }]);
    let expected = json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "m",
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": "Hi", "reasoning_content": "hm", "refusal": null },
            "logprobs": {
                "content": [{ "token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": never }],
                "reasoning_content": [{ "token": "hm", "logprob": -9999.0, "bytes": [104, 109], "top_logprobs": never }],
            },
            "finish_reason": "stop",
            "routed_experts": [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]],
        }],
        "usage": {
            "prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13,
            "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 6,
            "prompt_tokens_details": { "cached_tokens": 4 },
            "completion_tokens_details": { "reasoning_tokens": 2 },
            "cost": 0.000_012_5,
        },
        "system_fingerprint": FINGERPRINT,
        "prompt_routed_experts": [[[65535]]],
    });
    check(&answer, "ChatCompletion", &expected);
}

#[test]
fn tool_calls_leave_the_content_null() {
    let call = ToolCall::new("call_1", "f", "{}");
    let message = AnswerMessage::new(String::new(), None, vec![call.clone()]);
    let calls = json!([{ "id": "call_1", "type": "function", "function": { "name": "f", "arguments": "{}" } }]);
    let expected = json!({ "role": "assistant", "content": null, "tool_calls": calls, "refusal": null });
    check(&message, "AnswerMessage", &expected);
    assert_eq!(AnswerMessage::new("Well".into(), None, vec![call]).content.as_deref(), Some("Well"));
    assert_eq!(AnswerMessage::new(String::new(), None, Vec::new()).content.as_deref(), Some(""));
    assert_eq!(FinishReason::ToolCalls.name(), "tool_calls");
    for reason in
        [FinishReason::Stop, FinishReason::Length, FinishReason::ToolCalls, FinishReason::InsufficientSystemResource]
    {
        check(&reason, "FinishReason", &reason.name().into());
    }
}

#[test]
fn chunks_say_only_what_is_new() {
    let chunk = |choices, usage| ChatChunk::new("i".into(), 1, "m".into(), choices, usage);
    let expected = |delta: Value, finish: Value| {
        json!({
            "id": "i", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [{ "index": 2, "delta": delta, "logprobs": null, "finish_reason": finish }],
            "usage": null, "system_fingerprint": FINGERPRINT,
        })
    };
    let check_delta = |delta: Delta, json: Value| {
        check(&chunk(vec![ChunkChoice::new(2, delta)], None), "ChatChunk", &expected(json, Value::Null));
    };
    check_delta(Delta::role(), json!({ "role": "assistant", "content": "" }));
    check_delta(Delta { content: Some("a".into()), ..Delta::default() }, json!({ "content": "a" }));
    check_delta(Delta { reasoning_content: Some("a".into()), ..Delta::default() }, json!({ "reasoning_content": "a" }));
    let begin = Delta { tool_calls: vec![CallDelta::begin(1, "c", "f")], ..Delta::default() };
    let call = json!({ "index": 1, "id": "c", "type": "function", "function": { "name": "f", "arguments": "" } });
    check_delta(begin, json!({ "tool_calls": [call] }));
    let more = Delta { tool_calls: vec![CallDelta::arguments(1, "{")], ..Delta::default() };
    check_delta(more, json!({ "tool_calls": [{ "index": 1, "function": { "arguments": "{" } }] }));
    let mut last = ChunkChoice::new(2, Delta::default());
    assert!(last.delta.is_empty() && !Delta::role().is_empty());
    last.finish_reason = Some(FinishReason::Length);
    check(&chunk(vec![last], None), "ChatChunk", &expected(json!({}), "length".into()));
    let usage = serde_json::to_value(chunk(Vec::new(), Some(Usage::new(2, 0, 1, 0)))).unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &json!(3)));
    assert_eq!(usage["usage"].get("cost"), None);
    fits(&usage, "ChatChunk");
}

#[test]
fn a_completion_with_legacy_logprobs() {
    let mut logprobs = LegacyLogprobs::default();
    let top = [("a".to_owned(), -0.5), ("b".to_owned(), f32::NEG_INFINITY), ("a".to_owned(), -3.0)];
    logprobs.push("a".into(), -0.5, Likeliest::new(top), 0);
    logprobs.push("é".into(), f32::INFINITY, Likeliest::default(), 1);
    let mut choice = CompletionChoice::new(0, "aé".into());
    choice.logprobs = Some(logprobs);
    choice.finish_reason = Some(FinishReason::Length);
    let answer = Completion::new("cmpl-1".into(), 5, "m".into(), vec![choice], None);
    let expected = json!({
        "id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m",
        "choices": [{
            "index": 0, "text": "aé", "finish_reason": "length",
            "logprobs": {
                "tokens": ["a", "é"], "token_logprobs": [-0.5, 0.0],
                "top_logprobs": [{ "a": -0.5, "b": -9999.0 }, {}], "text_offset": [0, 1],
            },
        }],
        "usage": null, "system_fingerprint": FINGERPRINT,
    });
    check(&answer, "Completion", &expected);
}

#[test]
fn experts_come_out_even_or_not_at_all() {
    let json = |experts: Option<RoutedExperts>| serde_json::to_value(experts).unwrap();
    assert_eq!(json(RoutedExperts::new(Vec::new(), 3, 2)), json!([]));
    assert_eq!(json(RoutedExperts::new(vec![3, 1, 2, 0], 2, 1)), json!([[[3], [1]], [[2], [0]]]));
    assert_eq!(RoutedExperts::new(vec![1, 2, 3], 2, 1), None);
    assert_eq!(RoutedExperts::new(Vec::new(), 0, 1), None);
    assert_eq!(RoutedExperts::new(vec![1], usize::MAX, 2), None);
}

#[test]
fn models_and_tokens() {
    let shape = ModelShape { experts: 8, moe_layers: 3, experts_per_token: 2 };
    let card = ModelCard::new("m", 5, 4096, shape);
    let expected = json!({
        "id": "m", "object": "model", "created": 5, "owned_by": "moewe", "max_model_len": 4096,
        "moewe": { "experts": 8, "moe_layers": 3, "experts_per_token": 2 },
    });
    check(&card, "ModelCard", &expected);
    check(&ModelList::new(vec![card]), "ModelList", &json!({ "object": "list", "data": [expected] }));
    let tokens = Tokenized { count: 2, max_model_len: 9, tokens: vec![3, 1] };
    check(&tokens, "Tokenized", &json!({ "count": 2, "max_model_len": 9, "tokens": [3, 1] }));
    check(&Detokenized { prompt: "a".into() }, "Detokenized", &json!({ "prompt": "a" }));
}

#[test]
fn errors_have_openais_form() {
    let json = |error: ApiError| {
        let json = error.to_json();
        fits(&json, "ErrorBody");
        json["error"].clone()
    };
    let expected = json!({
        "message": "`n`: bad", "type": "invalid_request_error", "param": "n", "code": "invalid_value",
    });
    assert_eq!(json(ApiError::bad_request("n", "`n`: bad")), expected);
    let of = |error: ApiError| {
        let (status, retry_after) = (error.status, error.retry_after);
        let json = json(error);
        (status, json["code"].as_str().unwrap().to_owned(), json["type"].as_str().unwrap().to_owned(), retry_after)
    };
    let is = |status, code: &str, kind: &str, retry_after| (status, code.to_owned(), kind.to_owned(), retry_after);
    let client = "invalid_request_error";
    assert_eq!(
        of(ApiError::context_length_exceeded("messages", 8, 9, 0)),
        is(400, "context_length_exceeded", client, None)
    );
    assert_eq!(of(ApiError::unauthorized("no key")), is(401, "invalid_api_key", "authentication_error", None));
    let spent = is(402, "insufficient_balance", "insufficient_balance_error", None);
    assert_eq!(of(ApiError::insufficient_balance("spent")), spent);
    assert_eq!(of(ApiError::forbidden("no")), is(403, "forbidden", "permission_error", None));
    assert_eq!(of(ApiError::model_not_found("a", "b")), is(404, "model_not_found", client, None));
    assert_eq!(of(ApiError::not_found("GET", "/x")), is(404, "unknown_url", client, None));
    assert_eq!(of(ApiError::method_not_allowed("PUT", "/x", "GET")), is(405, "method_not_allowed", client, None));
    assert_eq!(of(ApiError::too_large(5)), is(413, "request_too_large", client, None));
    assert_eq!(of(ApiError::too_many_requests("", 7)), is(429, "rate_limit_exceeded", "rate_limit_error", Some(7)));
    assert_eq!(of(ApiError::server("")), is(500, "internal_error", "server_error", None));
    assert_eq!(of(ApiError::unavailable("", 3)), is(503, "service_unavailable", "server_error", Some(3)));
}

#[test]
fn errors_say_when_to_try_again() {
    let response = ApiError::unavailable("loading", 3).into_response();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "3");
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(ApiError::unauthorized("").into_response().headers()["www-authenticate"], "Bearer");
    assert!(!ApiError::server("").into_response().headers().contains_key("retry-after"));
}

#[test]
fn errors_show_little_of_what_clients_sent() {
    let long = "x\u{7}\n".repeat(10_000);
    for error in [ApiError::model_not_found(&long, "m"), ApiError::not_found("GET", &long)] {
        assert!(error.message.len() < 500 && !error.message.contains('\n'), "{}", error.message);
    }
}
