//! Whether something fits a schema at all: a definition that cannot do without itself never comes to an end.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::GrammarError;

/// Refuses a schema with a reference to a part that no finite JSON fits, for instance an object that requires another
/// one of its kind. A text could run into such a part and not get out of it.
pub(super) fn check(schema: &Value) -> Result<(), GrammarError> {
    // What is referred to, and whether something finite is known to fit it.
    let mut targets = HashMap::new();
    collect(schema, &mut targets);
    loop {
        let found = targets.iter().filter(|(_, fits)| !**fits);
        let found = found.filter(|(target, _)| at(schema, target).is_none_or(|part| fits(part, &targets)));
        let found: Vec<&str> = found.map(|(target, _)| *target).collect();
        if found.is_empty() {
            break;
        }
        for target in found {
            targets.insert(target, true);
        }
    }
    match targets.iter().filter(|(_, fits)| !**fits).map(|(target, _)| *target).min() {
        None => Ok(()),
        Some(target) => {
            let reason = format!("{target:?} contains itself without end, so that nothing fits it");
            Err(GrammarError::Schema { reason })
        }
    }
}

fn collect<'a>(value: &'a Value, targets: &mut HashMap<&'a str, bool>) {
    match value {
        Value::Array(list) => list.iter().for_each(|value| collect(value, targets)),
        Value::Object(map) => {
            if let Some(Value::String(target)) = map.get("$ref") {
                targets.insert(target, false);
            }
            map.values().for_each(|value| collect(value, targets));
        }
        _ => {}
    }
}

/// The part that a reference names; `None` if it is named otherwise than by its place.
fn at<'a>(schema: &'a Value, target: &str) -> Option<&'a Value> {
    let pointer = target.strip_prefix('#')?;
    // Percent signs escape bytes, which the library sees to. It tells of places that do not exist, too.
    schema.pointer(pointer).filter(|_| !pointer.contains('%'))
}

/// Whether something finite is known to fit a schema, as far as recursion is concerned.
fn fits(schema: &Value, targets: &HashMap<&str, bool>) -> bool {
    let Value::Object(schema) = schema else { return true };
    let list = |keyword| schema.get(keyword).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let reference = schema.get("$ref").and_then(Value::as_str);
    let one = |keyword| list(keyword).is_empty() || list(keyword).iter().any(|part| fits(part, targets));
    reference.is_none_or(|target| targets.get(target).copied().unwrap_or(true))
        && one("anyOf")
        && one("oneOf")
        && list("allOf").iter().all(|part| fits(part, targets))
        && (has_flat_value(schema) || (object_fits(schema, targets) && list_fits(schema, targets)))
}

/// Whether the schema names its values, or a type whose values have no parts.
fn has_flat_value(schema: &Map<String, Value>) -> bool {
    const FLAT: [&str; 5] = ["null", "boolean", "integer", "number", "string"];
    let flat = |name: &Value| name.as_str().is_some_and(|name| FLAT.contains(&name));
    schema.contains_key("enum")
        || schema.contains_key("const")
        || schema
            .get("type")
            .is_some_and(|types| types.as_array().map_or_else(|| flat(types), |all| all.iter().any(flat)))
}

fn object_fits(schema: &Map<String, Value>, targets: &HashMap<&str, bool>) -> bool {
    let required = schema.get("required").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let property = |name: &str| schema.get("properties")?.get(name).or_else(|| schema.get("additionalProperties"));
    required.iter().filter_map(Value::as_str).all(|name| property(name).is_none_or(|part| fits(part, targets)))
}

fn list_fits(schema: &Map<String, Value>, targets: &HashMap<&str, bool>) -> bool {
    let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(0);
    let first = schema.get("prefixItems").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let first_fit = first.iter().zip(0..least).all(|(part, _)| fits(part, targets));
    first_fit && (least <= first.len() as u64 || schema.get("items").is_none_or(|part| fits(part, targets)))
}
