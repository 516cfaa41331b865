//! The OpenAPI document describes what is taken and sent.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::api::{ApiError, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, openapi};

/// The document.
pub(super) fn document() -> Value {
    serde_json::from_str(&openapi()).unwrap()
}

/// Reads a body with the parser of a path; none for paths without bodies.
pub(super) fn parse(path: &str, body: &[u8]) -> Result<(), ApiError> {
    match path {
        _ if path.ends_with("/chat/completions") => ChatRequest::parse(body).map(drop),
        _ if path.ends_with("/completions") => CompletionRequest::parse(body).map(drop),
        "/tokenize" => TokenizeRequest::parse(body).map(drop),
        "/detokenize" => DetokenizeRequest::parse(body).map(drop),
        _ => panic!("no body is known for {path}"),
    }
}

/// The bodies of the document's examples, with their paths.
pub(super) fn examples() -> Vec<(String, Value)> {
    let document = document();
    let mut examples = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let bodies = &item["post"]["requestBody"]["content"]["application/json"]["examples"];
        let bodies = bodies.as_object().into_iter().flatten();
        examples.extend(bodies.map(|(_, example)| (path.clone(), example["value"].clone())));
    }
    examples
}

/// Checks a value by a schema of the document.
fn check(value: &Value, schema: &Value) -> Result<(), String> {
    let mut schema = schema.clone();
    schema["components"] = document()["components"].clone();
    let validator = jsonschema::validator_for(&schema).unwrap();
    validator.validate(value).map_err(|e| format!("{e} at {}", e.instance_path()))
}

/// Checks that the document describes an answer.
pub(super) fn fits(answer: &Value, schema: &str) {
    check(answer, &json!({ "$ref": format!("#/components/schemas/{schema}") }))
        .unwrap_or_else(|e| panic!("{schema}: {e}"));
    // And that it names each of its fields.
    let document = document();
    let properties = document["components"]["schemas"][schema]["properties"].as_object();
    let described: BTreeSet<_> = properties.into_iter().flatten().map(|(name, _)| name).collect();
    for name in answer.as_object().into_iter().flatten().map(|(name, _)| name) {
        assert!(described.contains(name), "{schema} is not described to have {name}");
    }
}

#[test]
fn examples_are_taken() {
    let examples = examples();
    assert!(examples.len() > 20, "{}", examples.len());
    for (path, body) in &examples {
        parse(path, body.to_string().as_bytes()).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

#[test]
fn examples_fit_their_schemas_and_mistakes_do_not() {
    let document = document();
    let schema = |path: &str| &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"];
    for (path, body) in examples() {
        check(&body, schema(&path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
    let chat = |field: &str, value: Value| {
        let mut body = json!({ "messages": [{ "role": "user", "content": "" }] });
        body[field] = value;
        check(&body, schema("/v1/chat/completions"))
    };
    chat("temperature", Value::Null).unwrap();
    for (field, value) in [
        ("temperature", json!(3)),
        ("n", json!(17)),
        ("top_p", json!(0)),
        ("messages", json!([{ "content": "" }])),
        ("stop", json!(7)),
        ("tools", json!([{}])),
        ("top_logprobs", json!(21)),
    ] {
        chat(field, value).expect_err(field);
    }
}

#[test]
fn all_paths_are_described_once() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    let paths: Vec<_> = document["paths"].as_object().unwrap().iter().collect();
    let names: BTreeSet<_> = paths.iter().map(|(path, _)| path.as_str()).collect();
    let expected = [
        "/v1/chat/completions",
        "/chat/completions",
        "/beta/chat/completions",
        "/v1/completions",
        "/completions",
        "/beta/completions",
        "/v1/models",
        "/models",
        "/v1/models/{id}",
        "/models/{id}",
        "/tokenize",
        "/detokenize",
        "/v1/watch",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/",
    ];
    assert_eq!(names, expected.into_iter().collect());
    let operations = paths.iter().flat_map(|(_, item)| item.as_object().unwrap().values());
    let ids: Vec<_> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "{ids:?}");
}

#[test]
fn references_lead_somewhere() {
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str));
                object.values().for_each(|value| references(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document = document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 50);
    for reference in found {
        assert!(document.pointer(&reference[1..]).is_some(), "{reference}");
    }
}
