//! `oneOf` as it is mostly meant: a union of parts that exclude each other, told apart by a property.

use serde_json::{Map, Value};

/// Most parts that are compared with each other.
const MOST_PARTS: usize = 64;
/// How deep parts are compared. References count, too.
const DEEPEST: usize = 8;

/// Turns a `oneOf` whose parts exclude each other into an `anyOf`, which says the same then. The compiler knows only parts
/// that exclude each other at first sight, not behind references. `root` is the whole schema.
pub(super) fn relax(schema: &mut Map<String, Value>, root: &Value) {
    let Some(Value::Array(parts)) = schema.get("oneOf") else { return };
    let excluded = |at: usize, part: &Value| parts[at + 1..].iter().all(|other| exclude(part, other, root, DEEPEST));
    let exclusive = parts.len() <= MOST_PARTS && parts.iter().enumerate().all(|(at, part)| excluded(at, part));
    if exclusive && !schema.contains_key("anyOf") {
        let parts = schema.remove("oneOf").expect("looked at above");
        schema.insert("anyOf".into(), parts);
    }
}

/// Whether it is certain that no value fits both.
fn exclude(a: &Value, b: &Value, root: &Value, depth: usize) -> bool {
    let (Value::Object(a), Value::Object(b)) = (a, b) else { return *a == false || *b == false };
    let Some(deeper) = depth.checked_sub(1) else { return false };
    for (one, other) in [(a, b), (b, a)] {
        if let Some(target) = one.get("$ref").and_then(Value::as_str).and_then(|target| target.strip_prefix('#')) {
            let target = root.pointer(target);
            let other = Value::Object(other.clone());
            if target.is_some_and(|target| exclude(target, &other, root, deeper)) {
                return true;
            }
        }
    }
    types_exclude(a, b) || values_exclude(a, b) || properties_exclude(a, b, root, deeper)
}

fn types_exclude(a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
    let types = |schema: &Map<String, Value>| -> Option<Vec<String>> {
        let names = match schema.get("type")? {
            Value::Array(names) => names.clone(),
            name => vec![name.clone()],
        };
        // Every integer is a number.
        let name = |name: &Value| name.as_str().map(|name| if name == "integer" { "number" } else { name }.to_owned());
        names.iter().map(name).collect()
    };
    let (Some(a), Some(b)) = (types(a), types(b)) else { return false };
    a.iter().all(|name| !b.contains(name))
}

fn values_exclude(a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
    let values = |schema: &Map<String, Value>| match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(vec![value.clone()]),
        (None, Some(Value::Array(values))) => Some(values.clone()),
        _ => None,
    };
    let (Some(a), Some(b)) = (values(a), values(b)) else { return false };
    // 1 and 1.0 are the same number, whatever they look like, so only texts are known to differ.
    a.iter().chain(&b).all(Value::is_string) && a.iter().all(|value| !b.contains(value))
}

/// Whether an object has to have a property that cannot be as both want it.
fn properties_exclude(a: &Map<String, Value>, b: &Map<String, Value>, root: &Value, depth: usize) -> bool {
    let object = |schema: &Map<String, Value>| schema.get("type").is_some_and(|name| name == "object");
    let (Some(of_a), Some(of_b)) = (a.get("properties"), b.get("properties")) else { return false };
    let required = |schema: &Map<String, Value>, name: &str| {
        schema.get("required").and_then(Value::as_array).is_some_and(|names| names.iter().any(|found| found == name))
    };
    let names = of_a.as_object().into_iter().flat_map(Map::keys);
    let mut both = names.filter_map(|name| Some((name, of_a.get(name)?, of_b.get(name)?)));
    (object(a) || object(b))
        && both.any(|(name, in_a, in_b)| (required(a, name) || required(b, name)) && exclude(in_a, in_b, root, depth))
}
