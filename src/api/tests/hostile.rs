//! Bodies that nobody in their right mind would send.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::document::{examples, parse};
use crate::api::{ApiError, ChatRequest, CompletionRequest, Options, Prompt, ToolChoice};

/// The paths that take a body, one for each kind.
const PATHS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

/// Checks that an error is of use and bounded in size.
fn check_error(error: &ApiError, body: &[u8]) {
    let body = String::from_utf8_lossy(&body[..body.len().min(2000)]);
    assert_eq!((error.status, error.kind), (400, "invalid_request_error"), "{body}");
    assert!(!error.message.is_empty() && error.message.len() < 1500, "{} for {body}", error.message);
    assert!(error.param.as_ref().is_none_or(|param| (1..600).contains(&param.len())), "{error:?} for {body}");
}

/// Checks that all that is promised of options is so.
fn check_options(options: &Options) {
    let within = |value: Option<f32>, low, high| value.is_none_or(|value| (low..=high).contains(&value));
    assert!(within(options.temperature, 0.0, 2.0) && options.temperature.is_none_or(|t| t == 0.0 || t >= 1e-5));
    assert!(within(options.top_p, f32::MIN_POSITIVE / 1e7, 1.0) && options.top_p != Some(0.0));
    assert!(within(options.min_p, 0.0, 1.0) && within(options.repetition_penalty, 0.0, 2.0));
    assert!(options.repetition_penalty != Some(0.0) && options.max_tokens != Some(0));
    assert!(within(Some(options.presence_penalty), -2.0, 2.0) && within(Some(options.frequency_penalty), -2.0, 2.0));
    assert!((1..=16).contains(&options.n) && options.logprobs.is_none_or(|top| top <= 20));
    assert!(options.stop.len() <= 16 && options.stop.iter().all(|text| (1..=256).contains(&text.len())));
    assert!(options.logit_bias.len() <= 1024 && options.logit_bias.is_sorted_by(|(a, _), (b, _)| a < b));
    assert!(options.logit_bias.iter().all(|(_, bias)| (-100.0..=100.0).contains(bias)));
}

/// Parses a body in every way. It may be refused, but what is taken keeps its promises.
fn check(body: &[u8]) {
    for path in PATHS {
        if let Err(error) = parse(path, body) {
            check_error(&error, body);
        }
    }
    if let Ok(request) = ChatRequest::parse(body) {
        check_options(&request.options);
        assert!((1..=4096).contains(&request.messages.len()) && request.tools.len() <= 128);
        assert!(request.tools.iter().all(|tool| tool.parameters.is_object()));
        let roles = ["system", "user", "assistant", "tool"];
        assert!(request.messages.iter().all(|message| roles.contains(&message.role.as_str())));
        let last = request.messages.last().unwrap();
        assert!(!request.prefix || last.role == "assistant" && last.content.is_some());
        match &request.tool_choice {
            ToolChoice::None => {}
            ToolChoice::Function(name) => assert!(request.tools.iter().any(|tool| tool.name == *name)),
            ToolChoice::Auto | ToolChoice::Required => assert!(!request.tools.is_empty()),
        }
    }
    if let Ok(request) = CompletionRequest::parse(body) {
        check_options(&request.options);
        assert!((1..=128).contains(&request.prompts.len()));
        assert!(request.prompts.iter().all(|prompt| *prompt != Prompt::Tokens(Vec::new())));
    }
}

/// Any JSON, with the names of fields and values that mean something among its texts.
fn any_json() -> impl Strategy<Value = Value> {
    let text = prop_oneof![any::<String>(), proptest::sample::select(WORDS.as_slice()).prop_map(str::to_owned),];
    let number = prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3..30_i32).prop_map(Value::from),
        Just(json!(-0.0)),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number,
        text.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 48, 6, move |inner| {
        let object = proptest::collection::vec((text.clone(), inner.clone()), 0..6);
        prop_oneof![
            proptest::collection::vec(inner, 0..6).prop_map(Value::from),
            object.prop_map(|fields| Value::Object(fields.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

const WORDS: [&str; 40] = [
    "messages",
    "role",
    "content",
    "user",
    "assistant",
    "tool",
    "system",
    "type",
    "text",
    "function",
    "name",
    "tools",
    "arguments",
    "tool_calls",
    "id",
    "prefix",
    "prompt",
    "suffix",
    "stop",
    "n",
    "seed",
    "logit_bias",
    "7",
    "response_format",
    "json_schema",
    "schema",
    "regex",
    "pattern",
    "thinking",
    "enabled",
    "tool_choice",
    "required",
    "temperature",
    "top_p",
    "max_tokens",
    "logprobs",
    "top_logprobs",
    "stream_options",
    "include_usage",
    "tokens",
];

/// The places of a value where something stands: those of fields and elements, outermost first.
fn places(value: &Value) -> Vec<String> {
    fn walk(value: &Value, at: &str, found: &mut Vec<String>) {
        let mut below = |name: &str, value: &Value| {
            let at = format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"));
            found.push(at.clone());
            walk(value, &at, found);
        };
        match value {
            Value::Object(object) => object.iter().for_each(|(name, value)| below(name, value)),
            Value::Array(list) => list.iter().enumerate().for_each(|(i, value)| below(&i.to_string(), value)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(value, "", &mut found);
    found
}

/// Takes a field or an element away.
fn remove(body: &mut Value, place: &str) {
    let (parent, name) = place.rsplit_once('/').unwrap();
    match body.pointer_mut(parent).unwrap() {
        Value::Object(object) => drop(object.shift_remove(&name.replace("~1", "/").replace("~0", "~"))),
        Value::Array(list) => drop(list.remove(name.parse().unwrap())),
        _ => unreachable!("places are in objects and lists"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn any_bytes(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        check(&body);
    }

    #[test]
    fn any_json_at_all(body in any_json()) {
        check(body.to_string().as_bytes());
    }

    #[test]
    fn any_value_of_any_field(field in proptest::sample::select(WORDS.as_slice()), value in any_json()) {
        for base in [json!({ "messages": [{ "role": "user", "content": "" }] }), json!({ "prompt": "" })] {
            let mut body = base;
            body[field] = value.clone();
            check(body.to_string().as_bytes());
        }
    }

    #[test]
    fn a_good_request_with_one_thing_wrong_names_the_field(
        which in any::<proptest::sample::Index>(),
        place in any::<proptest::sample::Index>(),
        value in proptest::option::of(any_json()),
    ) {
        let examples = examples();
        let (path, mut body) = examples[which.index(examples.len())].clone();
        let places = places(&body);
        let place = &places[place.index(places.len())];
        match value {
            Some(value) => *body.pointer_mut(place).unwrap() = value,
            None => remove(&mut body, place),
        }
        let body = body.to_string();
        check(body.as_bytes());
        if let Err(error) = parse(&path, body.as_bytes()) {
            let field = place[1..].split('/').next().unwrap();
            let param = error.param.unwrap_or_else(|| panic!("no field is named: {} for {body}", error.message));
            // The field that was changed, or one that only goes with it.
            let partner = match field {
                "logprobs" => "top_logprobs",
                "tools" => "tool_choice",
                // Without them /tokenize wants a text.
                "messages" => "prompt",
                _ => "",
            };
            let named = param.split(['.', '[']).next().unwrap();
            prop_assert!(named == field || named == partner, "{param} is named for {place}: {} for {body}", error.message);
        }
    }
}

/// Random numbers: splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

#[test]
fn real_requests_with_broken_bytes() {
    const TOKENS: [&[u8]; 24] = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"null",
        b"true",
        b"1e999",
        b"-0",
        b"1e-400",
        b"NaN",
        b"\\ud800",
        b"\\u0000",
        b"\xff",
        b"\xf0\x9f\xa6",
        b"99999999999999999999",
        b"[[[[[[[[",
        b"{\"a\":",
        b"\"messages\":[]",
        b"\"n\":2,",
        b"0.1",
        b"\\",
    ];
    let bodies: Vec<Vec<u8>> = examples().into_iter().map(|(_, body)| body.to_string().into_bytes()).collect();
    let mut random = Random(1);
    let (begin, mut tries) = (Instant::now(), 0_u32);
    while begin.elapsed() < Duration::from_secs(5) {
        let mut body = bodies[random.below(bodies.len())].clone();
        for _ in 0..=random.below(4) {
            let at = random.below(body.len().max(1)).min(body.len());
            let end = (at + random.below(12)).min(body.len());
            match random.below(5) {
                0 => body.truncate(at),
                1 => drop(body.drain(at..end)),
                2 => drop(body.splice(at..end, TOKENS[random.below(TOKENS.len())].iter().copied())),
                3 => {
                    let other = &bodies[random.below(bodies.len())];
                    let from = random.below(other.len());
                    let to = (from + random.below(40)).min(other.len());
                    body.splice(at..at, other[from..to].iter().copied());
                }
                _ => body.iter_mut().skip(at).take(1).for_each(|byte| *byte = random.below(256) as u8),
            }
        }
        check(&body);
        tries += 1;
    }
    assert!(tries > 100, "only {tries} bodies in 5 s");
}

#[test]
fn depth_does_not_end_the_stack() {
    let deep = |open: &str, inner: &str, close: &str, depth: usize| {
        format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
    };
    let nests = [("[", "1", "]"), (r#"{"a":"#, "1", "}"), (r#"[{"a":"#, "1", "}]")];
    let places = ["messages", "prompt", "tools", "guided_json", "stop", "unknown", "tool_choice", "tokens"];
    for (open, inner, close) in nests {
        let nest = deep(open, inner, close, 200_000);
        for place in places {
            check(format!(r#"{{"{place}": {nest}}}"#).as_bytes());
            // Never closed.
            check(format!(r#"{{"{place}": {}"#, open.repeat(200_000)).as_bytes());
        }
        check(nest.as_bytes());
    }
    let parameters = deep(r#"{"items":"#, "{}", "}", 200);
    let body = format!(
        r#"{{"messages": [{{"role": "user", "content": ""}}],
            "tools": [{{"type": "function", "function": {{"name": "f", "parameters": {parameters}}}}}]}}"#
    );
    let error = ChatRequest::parse(body.as_bytes()).unwrap_err();
    assert!(error.param.as_ref().unwrap().starts_with("tools[0].function.parameters.items"), "{error:?}");
    assert!(error.message.contains("recursion limit"), "{error}");
}

#[test]
fn size_is_answered_briefly() {
    let long = "x".repeat(3 << 20);
    let bodies = [
        format!(r#"{{"temperature": "{long}"}}"#),
        format!(r#"{{"messages": "{long}"}}"#),
        format!(r#"{{"messages": [{{"role": "{long}", "content": ""}}]}}"#),
        format!(r#"{{"messages": [{{"role": "user", "content": [{{"type": "{long}"}}]}}]}}"#),
        format!(r#"{{"logit_bias": {{"{long}": 1}}}}"#),
        format!(r#"{{"logit_bias": {{"{long}": "a"}}}}"#),
        format!(r#"{{"chat_template_kwargs": {{"{long}": "a"}}}}"#),
        format!(r#"{{"guided_json": {{"{long}": 1, "{long}": 1}}}}"#),
        format!(r#"{{"guided_json": {{"{long}": {{"{long}": [1e999]}}}}}}"#),
        format!(r#"{{"{long}": 1, "messages": 1}}"#),
        format!(r#"{{"tool_choice": "{long}", "messages": [{{"role": "user", "content": ""}}]}}"#),
        format!(r#"{{"prompt": "", "stop": "{long}"}}"#),
        format!(r#"{{"prompt": 1{}}}"#, "0".repeat(1 << 20)),
        format!(r#"{{"messages": [{{"role": "user", "content": ""}}], "model": "{long}"}}"#),
        long,
    ];
    for body in &bodies {
        check(body.as_bytes());
    }
    // Short in bytes, long in memory.
    for many in ["0,", "[],", "{},", "\"\","] {
        let many = many.repeat(1 << 20);
        let body = format!(r#"{{"guided_json": [{many}0]}}"#);
        let error = ChatRequest::parse(body.as_bytes()).unwrap_err();
        assert_eq!(error.message, "the body has more than 1048576 JSON values");
    }
    // As many commas in a text are fine.
    let text = ",[{\\\"".repeat(1 << 20);
    ChatRequest::parse(format!(r#"{{"messages": [{{"role": "user", "content": "{text}"}}]}}"#).as_bytes()).unwrap();
    // So is a prompt of many tokens.
    let tokens = vec!["7"; 1 << 19].join(",");
    CompletionRequest::parse(format!(r#"{{"prompt": [{tokens}]}}"#).as_bytes()).unwrap();
}
