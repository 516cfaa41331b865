//! JSON objects, schemas and regular expressions.

use serde_json::{Value, json};

use super::schemas::{Random, Reach};
use super::{DEMO, DEMO_EOS, bytes_and, format, ids, mask_of, schema, schemas, walk};
use crate::api::OutputFormat;

/// The value of a text, which has to be JSON; `None` if it has a number like 1e999, which is JSON but does not fit f64.
fn parsed(text: &str) -> Option<Value> {
    match serde_json::from_str(text) {
        Ok(value) => Some(value),
        Err(error) if error.to_string().starts_with("number out of range") => None,
        Err(error) => panic!("{error}: {text}"),
    }
}

#[test]
fn random_texts_fit_random_schemas() {
    let (mut refused, mut too_large) = (Vec::new(), 0);
    for seed in 0..1_000 {
        let mut random = Random(seed);
        let reach = if seed % 2 == 0 { Reach::Any } else { Reach::Short };
        let wanted = schemas::schema(&mut random, reach);
        let validator = jsonschema::validator_for(&wanted).expect("a valid schema");
        let mut constraint = match format(&DEMO.grammars, &schema(wanted.clone())) {
            Ok(constraint) => constraint,
            Err(error) => {
                refused.push(format!("{error}: {wanted}"));
                continue;
            }
        };
        let may_end = |text: &[u8], ends: bool| {
            let text = String::from_utf8_lossy(text);
            let complete = !ends || parsed(&text).is_none_or(|value| validator.is_valid(&value));
            // A text that fits could also be the beginning of one that is written otherwise, so this goes one way.
            assert!(complete, "seed {seed}: {wanted}: may end after {text:?}");
        };
        let walked = walk(&DEMO.grammars, &mut *constraint, &mut random, may_end);
        let walked = walked.unwrap_or_else(|error| panic!("seed {seed}: {wanted}: {error}"));
        let Some(value) = parsed(walked.text()) else {
            too_large += 1;
            continue;
        };
        let error = validator.validate(&value).err().map(|error| error.to_string());
        assert_eq!(error, None, "seed {seed}: {wanted}: {}", walked.text());
        if reach == Reach::Short {
            assert!(walked.tokens.len() < 400, "seed {seed}: {} tokens: {}", walked.tokens.len(), walked.text());
        }
    }
    assert_eq!(refused, Vec::<String>::new());
    assert!(too_large < 20, "{too_large} texts have numbers beyond f64");
}

#[test]
fn json_objects_of_any_kind() {
    let mut longest = 0;
    for seed in 0..200 {
        let mut constraint = format(&DEMO.grammars, &OutputFormat::JsonObject).expect("a good grammar");
        let walked = walk(&DEMO.grammars, &mut *constraint, &mut Random(seed), |_, _| {}).expect("an end");
        let Some(value) = parsed(walked.text()) else { continue };
        assert!(value.is_object(), "{value}");
        longest = longest.max(walked.tokens.len());
    }
    assert!(longest > 20, "the texts are too short to show anything: {longest} tokens at most");
}

#[test]
fn other_properties_come_only_where_they_are_wanted() {
    let closed = [
        json!({"type": "object", "properties": {"a": {"type": "null"}}}),
        json!({"properties": {"a": {"properties": {"a": {"type": "null"}}, "type": "object"}}, "type": "object"}),
        json!({"$ref": "#/$defs/o", "$defs": {"o": {"type": "object", "properties": {"a": {"type": "null"}}}}}),
    ];
    let open = [
        json!({"type": "object"}),
        json!({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": true}),
        json!({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "null"}}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}}, {"type": "object"}]}),
        json!({"type": "object", "properties": {"a": {"type": "null"}}, "minProperties": 1, "required": ["a"]}),
    ];
    let may = |wanted: &Value, text: &str| {
        let grammars = bytes_and(&[]);
        let mut constraint = format(&grammars, &schema(wanted.clone())).expect("a good schema");
        text.bytes().all(|byte| {
            let allowed = ids(&mask_of(&grammars, &mut *constraint).expect("a mask"));
            allowed.contains(&byte.into()) && constraint.drawn(byte.into()).is_ok()
        })
    };
    for wanted in &closed {
        assert!(may(wanted, r#"{"a""#) && !may(wanted, r#"{"b"#), "{wanted}");
    }
    for wanted in &open {
        assert!(may(wanted, r#"{"a""#) && may(wanted, r#"{"a":null,"b""#), "{wanted}");
        // Not the same name in another spelling, which would pass by the property's own schema.
        assert!(!may(wanted, r#"{"\u0061"#), "{wanted}");
    }
}

#[test]
fn unions_told_apart_by_a_property() {
    let kind = |name: &str| {
        json!({"type": "object", "properties": {"kind": {"const": name}, "x": {"type": "null"}},
        "required": ["kind"]})
    };
    let definitions = json!({"a": kind("a"), "b": kind("b"), "ab": {"type": "object", "properties": {"kind":
        {"enum": ["a", "b"]}}, "required": ["kind"]}});
    let of = |parts: Value| json!({"$defs": definitions, "type": "object", "properties": {"u": {"oneOf": parts}}, "required": ["u"]});
    let told_apart = [
        of(json!([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}])),
        of(json!([{"$ref": "#/$defs/a"}, {"type": "null"}, {"type": "string", "maxLength": 3}])),
        of(json!([{"$ref": "#/$defs/ab"}, {"type": "object", "properties": {"kind": {"const": "c"}}}])),
    ];
    for (seed, wanted) in (0..).zip(told_apart.iter().cycle().take(30)) {
        let mut constraint = format(&DEMO.grammars, &schema(wanted.clone())).expect("a good schema");
        let walked = walk(&DEMO.grammars, &mut *constraint, &mut Random(seed), |_, _| {}).expect("an end");
        assert!(
            jsonschema::is_valid(wanted, &parsed(walked.text()).expect("no numbers")),
            "{wanted}: {}",
            walked.text()
        );
    }
    let overlapping = [
        of(json!([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/ab"}])),
        of(json!([{"$ref": "#/$defs/a"}, {"type": "object", "properties": {"x": {"const": "c"}}}])),
        of(json!([{"type": "integer"}, {"type": "number"}])),
        of(json!([{"const": 1}, {"enum": [1.0]}])),
    ];
    for wanted in overlapping {
        assert!(format(&DEMO.grammars, &schema(wanted.clone())).is_err(), "{wanted}");
    }
}

#[test]
fn whitespace_is_bounded() {
    let grammars = bytes_and(&[]);
    let wanted = json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}}}});
    let mut constraint = format(&grammars, &schema(wanted)).expect("a good schema");
    for (at, byte) in br#"{"a": [null, null]}"#.iter().enumerate() {
        let allowed = ids(&mask_of(&grammars, &mut *constraint).expect("a mask"));
        assert!(allowed.contains(&u32::from(*byte)), "at {at}");
        for blank in [b'\n', b'\t', b'\r'] {
            assert!(!allowed.contains(&u32::from(blank)), "{blank} at {at}");
        }
        constraint.drawn(u32::from(*byte)).expect("allowed");
    }
    assert!(constraint.ended(), "nothing can follow, so no end token is needed");
}

#[test]
fn control_characters_can_be_prescribed() {
    let grammars = bytes_and(&[]);
    let wanted = json!({"enum": ["\u{1}x", "a\nb", "\u{7f}"]});
    let mut texts = std::collections::BTreeSet::new();
    for seed in 0..40 {
        let mut constraint = format(&grammars, &schema(wanted.clone())).expect("a good schema");
        let walked = walk(&grammars, &mut *constraint, &mut Random(seed), |_, _| {}).expect("an end");
        texts.insert(serde_json::from_str::<String>(walked.text()).expect("a JSON string"));
    }
    assert!(texts.contains("\u{1}x") && texts.contains("a\nb"), "{texts:?}");
}

#[test]
fn the_end_is_allowed_exactly_where_the_text_may_end() {
    let grammars = bytes_and(&[]);
    let mut constraint = format(&grammars, &OutputFormat::Regex("a+b?c*".into())).expect("a good pattern");
    let end = grammars.vocabulary.eos()[0];
    for (text, may_end) in [("", false), ("a", true), ("a", true), ("b", true), ("c", true), ("c", true)] {
        text.bytes().for_each(|byte| constraint.drawn(byte.into()).expect("allowed"));
        assert_eq!(ids(&mask_of(&grammars, &mut *constraint).expect("a mask")).contains(&end), may_end);
        assert!(!constraint.ended());
    }
    constraint.drawn(end).expect("allowed");
    assert!(constraint.ended());
}

#[test]
fn regular_expressions_match_the_whole_text() {
    let cases = [
        ("(yes|no)", "^(yes|no)$"),
        ("^(yes|no)$", "^(yes|no)$"),
        (r"^\d{1,3}\.\d\$$", r"^[0-9]{1,3}\.[0-9]\$$"),
        (r"[^/\s]+/x", r"^[^/\s]+/x$"),
        (r"\\\\", r"^\\\\$"),
        ("(?i:abc)|д+", "^((?i:abc)|д+)$"),
        ("a\nb|\"", "^(a\nb|\")$"),
        (r"\w\W\D\S", r"^[0-9a-zA-Z_][^0-9a-zA-Z_][^0-9]\S$"),
    ];
    for (pattern, matches) in cases {
        let matches = json!({"type": "string", "pattern": matches});
        let validator = jsonschema::validator_for(&matches).expect("a valid pattern");
        for seed in 0..30 {
            let mut constraint = format(&DEMO.grammars, &OutputFormat::Regex(pattern.into())).expect("a good pattern");
            let walked = walk(&DEMO.grammars, &mut *constraint, &mut Random(seed), |text, ends| {
                let text = String::from_utf8_lossy(text);
                assert!(!ends || validator.is_valid(&json!(text)), "{pattern}: may end after {text:?}");
            });
            let walked = walked.unwrap_or_else(|error| panic!("{pattern}: {error}"));
            assert!(validator.is_valid(&json!(walked.text())), "{pattern}: {:?}", walked.text());
        }
    }
}

#[test]
fn control_tokens_are_no_text() {
    // The demo's token for the end is spelt like this.
    let spelt = DEMO.text.token(DEMO_EOS).expect("known");
    assert_eq!(DEMO.text.encode(&spelt, false).expect("text"), [DEMO_EOS]);
    let mut constraint = format(&DEMO.grammars, &schema(json!({"const": format!("a{spelt}b")}))).expect("a schema");
    let walked = walk(&DEMO.grammars, &mut *constraint, &mut Random(1), |_, _| {}).expect("an end");
    assert_eq!(walked.text(), format!("\"a{spelt}b\""));
    assert!(walked.tokens.iter().all(|id| *id > 4), "the first five are control tokens: {:?}", walked.tokens);
}

#[test]
fn prescribed_text_comes_in_the_tokenizers_tokens() {
    let wanted = json!({"type": "object", "properties": {"the little girl was happy": {"type": "null"}},
        "required": ["the little girl was happy"]});
    let mut constraint = format(&DEMO.grammars, &schema(wanted)).expect("a good schema");
    let walked = walk(&DEMO.grammars, &mut *constraint, &mut Random(3), |_, _| {}).expect("an end");
    let name = &walked.text()[..walked.text().find(':').expect("a colon") - 1];
    let tokens = DEMO.text.encode(name, false).expect("text");
    assert_eq!(walked.tokens[..tokens.len() - 1], tokens[..tokens.len() - 1]);
}
