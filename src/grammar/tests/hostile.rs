//! Schemas from strangers: an error or a constraint, soon, and never a panic.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::schemas::Random;
use super::{DEMO, format, schema};
use crate::api::OutputFormat;
use crate::grammar::GrammarError;

/// Far above what anything takes, as other tests run at the same time.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of a format: the error, or that of a few random texts under it.
pub(super) fn outcome(wanted: &OutputFormat) -> Result<(), String> {
    let began = Instant::now();
    let made = format(&DEMO.grammars, wanted);
    let compiled = began.elapsed();
    let shown = format!("{wanted:?}").chars().take(150).collect::<String>();
    println!("{compiled:?} {shown}: {:?}", made.as_ref().err().map(ToString::to_string));
    assert!(compiled < PATIENCE, "{shown}: {compiled:?} to compile");
    let mut constraint = made.map_err(|error| error.to_string())?;
    let mut random = Random(7);
    let mut mask = vec![0; DEMO.grammars.vocabulary.len().div_ceil(32) as usize];
    let mut slowest = Duration::ZERO;
    for _ in 0..40 {
        if constraint.ended() {
            break;
        }
        let began = Instant::now();
        mask.fill(0);
        constraint.allowed(&mut mask)?;
        let allowed = super::ids(&mask);
        assert!(!allowed.is_empty(), "{shown}");
        constraint.drawn(*random.of(&allowed))?;
        slowest = slowest.max(began.elapsed());
        assert!(slowest < PATIENCE, "{shown}: {slowest:?} for a step");
    }
    println!("    slowest step: {slowest:?}");
    Ok(())
}

#[test]
fn hostile_schemas() {
    let nested =
        |depth: usize| (0..depth).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}));
    let many = |count: usize, value: fn(usize) -> Value| (0..count).map(value).collect::<Vec<Value>>();
    let chain = |length: usize| {
        let step = |n: usize| (format!("d{n}"), json!({"$ref": format!("#/$defs/d{}", n + 1)}));
        let mut definitions: serde_json::Map<String, Value> = (0..length).map(step).collect();
        definitions.insert(format!("d{length}"), json!({"type": "null"}));
        json!({"$ref": "#/$defs/d0", "$defs": definitions})
    };
    let optional: serde_json::Map<String, Value> =
        (0..1_000).map(|n| (format!("p{n}"), json!({"type": "null"}))).collect();
    let patterns: serde_json::Map<String, Value> = (0..50).map(|n| (format!("^(a|b)*{n}$"), json!({}))).collect();
    let big = json!({"type": "object", "properties": (0..15).map(|n| (format!("p{n}"), json!({"type": "string", "pattern":
        "^(([a-z])+.)+[A-Z]([a-z])+$"}))).collect::<serde_json::Map<_, _>>()});
    let all_of = |options: usize| json!({"anyOf": many(options, |n| json!({"type": "object", "properties": {format!("k{n}"): {}}}))});
    let good = [
        json!({}),
        json!(true),
        nested(60),
        json!({"enum": many(5_000, |n| json!(format!("value {n}")))}),
        json!({"enum": many(3_000, |n| json!(n))}),
        json!({"type": "string", "enum": ["\u{0}", "🦉\u{202e}", "</think>", "<｜User｜>"]}),
        chain(500),
        json!({"type": "object", "properties": optional.clone()}),
        json!({"type": "object", "properties": optional.clone(), "required": optional.keys().collect::<Vec<_>>()}),
        big,
        json!({"type": "string", "minLength": 100_000}),
        json!({"type": "string", "maxLength": 4_000_000}),
        json!({"type": "array", "items": {"type": "null"}, "minItems": 1_000_000, "maxItems": 1_000_000_000}),
        json!({"type": "integer", "multipleOf": 983}),
        json!({"type": "string", "format": "no such format"}),
        json!({"type": "integer", "multipleOf": 997, "minimum": 0}),
        json!({"type": "number", "multipleOf": 0.997, "minimum": 0, "maximum": 100_000_000}),
        json!({"allOf": [{"type": "integer", "multipleOf": 31}, {"multipleOf": 29}]}),
        json!({"type": "number", "multipleOf": 0.001}),
        json!({"type": "integer", "minimum": -9_007_199_254_740_993_i64, "maximum": i64::MAX}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}}),
        json!({"x-guidance": {"whitespace_flexible": true}, "type": "null"}),
        json!({"type": "object", "properties": {"$ref": {"type": "null"}, "x-guidance": {"type": "null"}}}),
        json!({"$schema": "http://json-schema.org/draft-07/schema#", "$id": "http://localhost/x", "type": "null"}),
        json!({"type": "string", "pattern": "^(a?){50}a{50}$"}),
        json!({"type": "string", "pattern": "(x+x+)+y"}),
        json!({"type": "object", "patternProperties": patterns}),
    ];
    for wanted in good {
        let outcome = outcome(&schema(wanted.clone()));
        assert_eq!(outcome, Ok(()), "{}", wanted.to_string().chars().take(200).collect::<String>());
    }
    let bad = [
        json!(false),
        json!(null),
        json!([]),
        json!("object"),
        json!(1),
        nested(70),
        chain(1_001),
        json!({"$ref": "https://example.com/schema.json"}),
        json!({"$ref": "file:///etc/passwd"}),
        json!({"properties": {"a": {"items": {"$ref": "other.json#/x"}}}}),
        json!({"$id": "http://localhost/a", "$ref": "b"}),
        json!({"$ref": "#/$defs/none"}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        json!({"$ref": "#"}),
        json!({"$ref": 5}),
        json!({"$schema": "http://localhost/no-such-draft", "type": "null"}),
        json!({"$id": "%%%", "type": "null"}),
        json!({"type": "strnig"}),
        json!({"type": 5}),
        json!({"type": []}),
        json!({"enum": []}),
        json!({"enum": "é".repeat(200)}),
        json!({"$ref": ["é".repeat(200)]}),
        json!({"minimum": "é".repeat(200), "type": "integer"}),
        json!({"properties": []}),
        json!({"properties": {"a": 7}}),
        json!({"required": "a", "type": "object"}),
        json!({"required": [5], "type": "object"}),
        json!({"type": "array", "items": {"type": "null"}, "uniqueItems": true}),
        json!({"not": {"type": "null"}}),
        json!({"type": "object", "patternProperties": {"^a.*(x|y){0,200}": {}, "b[^q]{0,300}$": {}}}),
        json!({"if": {}, "then": {}, "else": {}}),
        json!({"type": "array", "contains": {}}),
        json!({"type": "array", "minItems": 3, "maxItems": 2}),
        json!({"type": "array", "minItems": -1}),
        json!({"type": "array", "maxItems": 1.5}),
        json!({"type": "integer", "minimum": 3, "maximum": 2}),
        json!({"type": "integer", "multipleOf": 0}),
        json!({"type": "number", "minimum": -1e300, "maximum": 1e300}),
        json!({"type": "number", "multipleOf": 1e-300}),
        json!({"type": "integer", "multipleOf": 1_009}),
        json!({"type": "number", "multipleOf": 1e300}),
        json!({"allOf": [{"type": "integer", "multipleOf": 37}, {"multipleOf": 29}]}),
        json!({"allOf": [{"type": "number", "multipleOf": 0.31}, {"multipleOf": 33}]}),
        json!({"allOf": [{"type": "null"}, {"type": "boolean"}]}),
        json!({"allOf": [{"type": "integer", "multipleOf": 4_294_967_291_u32}, {"multipleOf": 4_294_967_279_u32}]}),
        json!({"type": "object", "required": ["a"], "properties": {"a": false}}),
        json!({"type": "string", "pattern": "("}),
        json!({"type": "string", "pattern": "(?=x)y"}),
        json!({"type": "string", "pattern": "(a)\\1"}),
        json!({"type": "string", "pattern": "a".repeat(10_000)}),
        json!({"type": "string", "pattern": "^a$", "minLength": 2}),
        json!({"allOf": [all_of(60), all_of(60), all_of(60)]}),
        json!({"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}]}),
        json!({"enum": many(25_000, |n| json!(n))}),
        json!({"const": "x".repeat(300_000)}),
    ];
    for wanted in bad {
        let outcome = outcome(&schema(wanted.clone()));
        let shown = wanted.to_string().chars().take(200).collect::<String>();
        let error = outcome.expect_err(&shown);
        assert!(!error.contains("panic") && !error.contains("internal") && error.len() < 2_000, "{shown}: {error}");
    }
}

/// The compiler recurses along references, within its depth limit in each definition. Running out of stack would end the
/// process, not the request.
#[test]
fn the_longest_recursions_fit_the_stack() {
    type Step = fn(Value) -> Value;
    let steps: [Step; 8] = [
        |inner| json!({"type": "array", "items": inner}),
        |inner| json!({"type": "array", "prefixItems": [inner]}),
        |inner| json!({"items": inner}),
        |inner| json!({"additionalProperties": inner}),
        |inner| json!({"anyOf": [inner]}),
        |inner| json!({"allOf": [inner]}),
        |inner| json!({"oneOf": [inner]}),
        |inner| json!({"properties": {"a": inner}, "type": "object"}),
    ];
    for step in steps {
        // As far as 64 levels, 1,000 references and 20,000 values allow.
        let one = step(json!(null));
        let (values, depth) =
            (count(&one) - 1, if one.to_string().contains("[null]") || one["properties"].is_object() { 2 } else { 1 });
        for levels in [1, 58 / depth] {
            let definitions = (19_900 / (levels * values + 2)).min(240_000 / (levels * one.to_string().len())).min(999);
            let definition = |n: usize| {
                let next = if n + 1 == definitions {
                    json!({"type": "null"})
                } else {
                    json!({"$ref": format!("#/$defs/{}", n + 1)})
                };
                (n.to_string(), (0..levels).fold(next, |inner, _| step(inner)))
            };
            let definitions: serde_json::Map<String, Value> = (0..definitions).map(definition).collect();
            let alone = json!({"$ref": "#/$defs/0", "$defs": definitions});
            let beside =
                json!({"$ref": "#/$defs/0", "minItems": 1, "type": ["array", "object", "null"], "$defs": definitions});
            for wanted in [alone, beside] {
                if let Err(error) = outcome(&schema(wanted)) {
                    assert!(!error.contains("internal") && !error.contains("at most"), "{error}");
                }
            }
        }
    }
}

fn count(value: &Value) -> usize {
    let parts: Vec<&Value> = match value {
        Value::Array(list) => list.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => Vec::new(),
    };
    1 + parts.into_iter().map(count).sum::<usize>()
}

#[test]
fn nothing_is_fetched() {
    for reference in ["https://example.com/schema.json", "file:///etc/passwd", "//host/x", "x.json", "urn:uuid:1"] {
        let wanted = json!({"type": "object", "properties": {"a": {"$ref": reference}}});
        let refused = format(&DEMO.grammars, &schema(wanted)).expect_err("another document");
        assert_eq!(refused, GrammarError::Reference { reference: reference.into() });
    }
    // Not a reference, only spelt like one.
    let spelt = json!({"const": {"$ref": "http://localhost:1/x"}});
    assert_eq!(outcome(&schema(spelt)), Ok(()));
}

/// Any JSON, most of it with names that schemas have.
fn nonsense(random: &mut Random, depth: usize) -> Value {
    const KEYWORDS: [&str; 34] = [
        "type",
        "properties",
        "items",
        "required",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "$defs",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minItems",
        "maxItems",
        "prefixItems",
        "additionalProperties",
        "patternProperties",
        "minProperties",
        "maxProperties",
        "additionalItems",
        "$id",
        "$schema",
        "x-guidance",
        "not",
        "uniqueItems",
        "$anchor",
    ];
    const TEXTS: [&str; 16] = [
        "object",
        "array",
        "string",
        "integer",
        "number",
        "boolean",
        "null",
        "#",
        "#/$defs/a",
        "^a+$",
        "(",
        "date",
        "é🦉",
        "",
        "#/properties/type",
        "https://json-schema.org/draft/2020-12/schema",
    ];
    match random.below(if depth == 0 { 4 } else { 8 }) {
        0 => json!(random.of(&TEXTS)),
        1 => json!(random.below(6) as i64 - 1),
        2 => [json!(null), json!(true), json!(false), json!(1e308), json!(-0.0), json!(u64::MAX)][random.below(6)]
            .clone(),
        3 => json!({"type": random.of(&TEXTS[..7])}),
        4 => Value::Array((0..random.below(4)).map(|_| nonsense(random, depth - 1)).collect()),
        _ => {
            let count = 1 + random.below(4);
            let entry = |_| ((*random.of(&KEYWORDS)).to_owned(), nonsense(random, depth - 1));
            Value::Object((0..count).map(entry).collect())
        }
    }
}

#[test]
fn nonsense_is_an_error_or_a_constraint() {
    let (mut good, mut bad) = (0, 0);
    for seed in 0..2_000 {
        let mut random = Random(seed);
        let mut wanted = nonsense(&mut random, 4);
        // Something to refer to.
        if let (true, Value::Object(map)) = (random.chance(50), &mut wanted) {
            map.insert("$defs".into(), json!({"a": nonsense(&mut random, 3)}));
        }
        match outcome(&schema(wanted.clone())) {
            Ok(()) => good += 1,
            Err(error) => {
                bad += 1;
                assert!(
                    !error.contains("panic") && !error.contains("internal error"),
                    "seed {seed}: {error}: {wanted}"
                );
            }
        }
    }
    assert!(good > 100 && bad > 100, "{good} good, {bad} bad");
}
