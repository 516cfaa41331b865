//! JSON schemas on their way to the grammar's compiler: checked, and closed where that is what was meant.

use llguidance::api::GrammarWithLexer;
use serde_json::{Map, Value, json};

use super::{GrammarError, finite, one_of};
use crate::api::kind_of;

/// Most values (objects, lists, strings, numbers, …) that a schema may consist of.
const MOST_VALUES: usize = 20_000;
/// Most bytes of all its strings and names.
const MOST_BYTES: usize = 256 << 10;
/// How deep it may be nested.
const DEEPEST: usize = 64;
/// Most references: each may lead to another one, and the compiler follows them by recursion.
const MOST_REFERENCES: usize = 1_000;
/// Most that `multipleOf` may be, its decimal point left out: there is a state for each remainder.
const MOST_REMAINDERS: u64 = 1_000;
/// The longest `pattern`, in bytes.
const LONGEST_PATTERN: usize = 2 << 10;

/// The grammar of JSON that fits a schema.
pub(super) fn grammar(schema: &Value) -> Result<GrammarWithLexer, GrammarError> {
    let mut schema = match schema {
        Value::Object(schema) => Value::Object(schema.clone()),
        Value::Bool(true) => json!({}),
        Value::Bool(false) => return Err(refused("it is false, which nothing fits")),
        other => return Err(refused(&format!("it is {}, expected an object", kind_of(other)))),
    };
    let mut size = Size::default();
    size.measure(&schema, 1)?;
    finite::check(&schema)?;
    let (mut joined, mut multiples) = (false, Vec::new());
    visit(&mut schema, &mut |part| {
        joined |= is_joined(part);
        multiples.extend(part.get("multipleOf").and_then(Value::as_f64));
        check(part)
    })?;
    check_multiples(&multiples, joined)?;
    if !joined {
        visit(&mut schema, &mut |part| {
            close(part);
            Ok(())
        })?;
    }
    let root = schema.clone();
    visit(&mut schema, &mut |part| {
        one_of::relax(part, &root);
        bound(part);
        Ok(())
    })?;
    let mut grammar = GrammarWithLexer::from_json_schema(schema);
    if let Some(Value::Object(schema)) = &mut grammar.json_schema {
        schema.insert("x-guidance".into(), options(size.control));
    }
    Ok(grammar)
}

/// How JSON is written. `\u` escapes are left out where the schema does not need them: with them a name can be spelt in
/// several ways, so that one that is taken would pass for a new one.
fn options(unicode_escapes: bool) -> Value {
    let escapes = if unicode_escapes { "nrbtf\\\"u" } else { "nrbtf\\\"" };
    json!({
        "whitespace_flexible": false,
        "item_separator": ", ?",
        "key_separator": ": ?",
        "json_allowed_escapes": escapes,
    })
}

fn refused(reason: &str) -> GrammarError {
    GrammarError::Schema { reason: reason.into() }
}

/// What a schema consists of.
#[derive(Default)]
struct Size {
    values: usize,
    bytes: usize,
    references: usize,
    /// Whether a string has a control character that JSON writes as `\u`.
    control: bool,
}

impl Size {
    fn measure(&mut self, value: &Value, depth: usize) -> Result<(), GrammarError> {
        self.values += 1;
        at_most("levels of the JSON schema", depth, DEEPEST)?;
        at_most("values in the JSON schema", self.values, MOST_VALUES)?;
        match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
            Value::String(text) => self.text(text),
            Value::Array(list) => list.iter().try_for_each(|value| self.measure(value, depth + 1)),
            Value::Object(map) => map.iter().try_for_each(|(name, value)| {
                self.text(name)?;
                self.references += usize::from(name == "$ref");
                at_most("references in the JSON schema", self.references, MOST_REFERENCES)?;
                self.measure(value, depth + 1)
            }),
        }
    }

    fn text(&mut self, text: &str) -> Result<(), GrammarError> {
        self.bytes += text.len();
        self.control |= text.chars().any(|c| c < ' ' && !matches!(c, '\n' | '\r' | '\t' | '\u{8}' | '\u{c}'));
        at_most("bytes of strings in the JSON schema", self.bytes, MOST_BYTES)
    }
}

fn at_most(what: &'static str, found: usize, limit: usize) -> Result<(), GrammarError> {
    if found > limit { Err(GrammarError::TooLarge { what, found, limit }) } else { Ok(()) }
}

/// Calls `see` for each schema within a schema, the outer first.
fn visit(
    schema: &mut Value,
    see: &mut impl FnMut(&mut Map<String, Value>) -> Result<(), GrammarError>,
) -> Result<(), GrammarError> {
    let Value::Object(schema) = schema else { return Ok(()) };
    see(schema)?;
    for (keyword, value) in schema.iter_mut() {
        match (keyword.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(parts)) => {
                parts.values_mut().try_for_each(|part| visit(part, see))?;
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems" | "items" | "additionalItems", Value::Array(parts)) => {
                parts.iter_mut().try_for_each(|part| visit(part, see))?;
            }
            ("items" | "additionalItems" | "additionalProperties", part) => visit(part, see)?,
            _ => {}
        }
    }
    Ok(())
}

/// Keywords, and what their values are.
const KEYWORDS: [(&str, &[&str]); 23] = [
    ("$ref", &["a string"]),
    ("allOf", &["a list"]),
    ("anyOf", &["a list"]),
    ("enum", &["a list"]),
    ("exclusiveMaximum", &["a number", "a boolean"]),
    ("exclusiveMinimum", &["a number", "a boolean"]),
    ("format", &["a string"]),
    ("maxItems", &["a number"]),
    ("maxLength", &["a number"]),
    ("maxProperties", &["a number"]),
    ("maximum", &["a number"]),
    ("minItems", &["a number"]),
    ("minLength", &["a number"]),
    ("minProperties", &["a number"]),
    ("minimum", &["a number"]),
    ("multipleOf", &["a number"]),
    ("oneOf", &["a list"]),
    ("pattern", &["a string"]),
    ("patternProperties", &["an object"]),
    ("prefixItems", &["a list"]),
    ("properties", &["an object"]),
    ("required", &["a list"]),
    ("type", &["a string", "a list"]),
];

/// The formats of strings that can be enforced. Any other one is a remark, as JSON Schema has it.
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Refuses what must not reach the compiler, which panics at some values of wrong kinds when it wants to show them.
fn check(schema: &mut Map<String, Value>) -> Result<(), GrammarError> {
    for (keyword, expected) in KEYWORDS {
        let found = schema.get(keyword).map(kind_of).filter(|found| !expected.contains(found));
        if let Some(found) = found {
            return Err(refused(&format!("`{keyword}` is {found}, expected {}", expected.join(" or "))));
        }
    }
    if schema.get("format").and_then(Value::as_str).is_some_and(|format| !FORMATS.contains(&format)) {
        schema.remove("format");
    }
    let names = schema.get("required").and_then(Value::as_array);
    if let Some(other) = names.into_iter().flatten().find(|name| !name.is_string()) {
        return Err(refused(&format!("`required` lists {}, expected strings", kind_of(other))));
    }
    match schema.get("$ref") {
        Some(Value::String(reference)) if !reference.starts_with('#') => {
            Err(GrammarError::Reference { reference: shortened(reference, 80) })
        }
        _ => Ok(()),
    }?;
    let patterns = schema.get("patternProperties").and_then(Value::as_object);
    let patterns = patterns.into_iter().flat_map(Map::keys).map(String::as_str);
    let pattern = schema.get("pattern").and_then(Value::as_str);
    for pattern in patterns.chain(pattern) {
        at_most("bytes of a pattern in the JSON schema", pattern.len(), LONGEST_PATTERN)?;
    }
    Ok(())
}

/// Refuses divisors with very many remainders. Where parts are joined, a number may have to be a multiple of several.
fn check_multiples(multiples: &[f64], joined: bool) -> Result<(), GrammarError> {
    const NONE: u64 = u64::MAX;
    let decimals = |value: f64| value.abs().to_string().split_once('.').map_or(0, |(_, behind)| behind.len());
    let scale = if joined { multiples.iter().map(|value| decimals(*value)).max().unwrap_or(0) } else { 0 };
    let mut common = 1;
    for value in multiples {
        let places = scale.max(decimals(*value));
        let digits = format!("{:.places$}", value.abs()).replace('.', "");
        let divisor: u64 = digits.parse().unwrap_or(NONE);
        common = if joined { least_common_multiple(common, divisor).unwrap_or(NONE) } else { divisor };
        if common > MOST_REMAINDERS {
            let (found, limit) = (usize::try_from(common).unwrap_or(usize::MAX), MOST_REMAINDERS as usize);
            return Err(GrammarError::TooLarge { what: "remainders of `multipleOf` in the JSON schema", found, limit });
        }
    }
    Ok(())
}

fn least_common_multiple(a: u64, b: u64) -> Option<u64> {
    let (mut divisor, mut rest) = (a, b);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    (a / divisor.max(1)).checked_mul(b)
}

/// A text's first characters, `most` of them.
pub(super) fn shortened(text: &str, most: usize) -> String {
    text.char_indices().nth(most).map_or_else(|| text.to_owned(), |(end, _)| format!("{}…", &text[..end]))
}

/// Whether parts of a schema hold together, so that one part's properties are another's additional ones.
fn is_joined(schema: &Map<String, Value>) -> bool {
    const ALTERNATIVES: [&str; 3] = ["anyOf", "oneOf", "$ref"];
    const ALONGSIDE: [&str; 10] =
        ["$defs", "definitions", "$schema", "$id", "$comment", "title", "description", "default", "examples", "type"];
    let alternatives = ALTERNATIVES.iter().filter(|keyword| schema.contains_key(**keyword)).count();
    let others = schema.keys().any(|key| !ALTERNATIVES.contains(&key.as_str()) && !ALONGSIDE.contains(&key.as_str()));
    schema.contains_key("allOf")
        || schema.contains_key("patternProperties")
        || alternatives > 1
        || (alternatives == 1 && others)
}

/// Bounds integers that nobody bounded by what every reader of JSON has exactly, so that their digits come to an end.
fn bound(schema: &mut Map<String, Value>) {
    const MOST: i64 = (1 << 53) - 1;
    let types = match schema.get("type") {
        Some(Value::Array(types)) => types.as_slice(),
        Some(one) => std::slice::from_ref(one),
        None => return,
    };
    if types.iter().any(|found| found == "integer") && types.iter().all(|found| found != "number") {
        for (bound, exclusive, most) in [("minimum", "exclusiveMinimum", -MOST), ("maximum", "exclusiveMaximum", MOST)]
        {
            let other = if most < 0 { ["maximum", "exclusiveMaximum"] } else { ["minimum", "exclusiveMinimum"] };
            let beyond =
                |name: &&str| schema.get(*name).and_then(Value::as_f64).is_some_and(|v| v.abs() >= MOST as f64);
            if !schema.contains_key(bound) && !schema.contains_key(exclusive) && !other.iter().any(beyond) {
                schema.insert(bound.into(), most.into());
            }
        }
    }
}

/// Says of an object that lists its properties that it has no others, unless it says something about others itself.
fn close(schema: &mut Map<String, Value>) {
    let Some(Value::Object(properties)) = schema.get("properties") else { return };
    let required = schema.get("required").and_then(Value::as_array);
    let complete =
        required.into_iter().flatten().all(|name| name.as_str().is_none_or(|name| properties.contains_key(name)));
    if complete && !schema.contains_key("minProperties") {
        schema.entry("additionalProperties").or_insert(Value::Bool(false));
    }
}
