//! JSON that comes from strangers, and what is said of its mistakes.

use serde::de::DeserializeOwned;
use serde_json::error::Category;

use super::types::Object;
use crate::api::{ApiError, TEXT_SHOWN, shortened};

/// Most values of a body, lists and objects among them. A few bytes of JSON can take a hundred in memory; this bounds
/// it to some 100 MB, and is enough for a prompt of a million token ids.
const MAX_VALUES: usize = 1 << 20;
/// Most characters of a field's path in an error.
const PATH_SHOWN: usize = 128;

/// Reads an object.
///
/// The depth of lists and objects in each other is bounded by serde_json, at 128.
pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    if body.trim_ascii().is_empty() {
        return Err(ApiError::invalid_json(None, "the body is empty, expected a JSON object"));
    }
    if has_more_values(body, MAX_VALUES) {
        return Err(ApiError::invalid_json(None, format!("the body has more than {MAX_VALUES} JSON values")));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let Object(value) = serde_path_to_error::deserialize(&mut json).map_err(|e| describe(path(e.path()), e.inner()))?;
    json.end().map_err(|e| describe(None, &e))?;
    Ok(value)
}

/// Where an error is; `None` for the body as a whole.
fn path(path: &serde_path_to_error::Path) -> Option<String> {
    let path = path.to_string();
    // Between two fields it ends with "?".
    let known = path.strip_suffix('?').map_or(path.as_str(), |known| known.trim_end_matches('.'));
    (!known.is_empty() && known != ".").then(|| known.to_owned())
}

/// Whether there are more values than `limit`: each stands behind a comma, a colon or an opening bracket.
fn has_more_values(body: &[u8], limit: usize) -> bool {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values > limit
}

/// A parser's error for clients.
fn describe(path: Option<String>, error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let text = text.strip_suffix(&place).unwrap_or(&text);
    let short = |path: String| shortened(&path, PATH_SHOWN);
    if error.classify() != Category::Data {
        let at = path.as_ref().map_or_else(String::new, |path| format!(" in `{}`", short(path.clone())));
        let message = format!("the body is not valid JSON{at}: {}{place}", shortened(text, PATH_SHOWN));
        return ApiError::invalid_json(path.map(short), message);
    }
    // A field that is there twice belongs to the path, too; one that is not known is there already.
    let twice = text.strip_prefix("duplicate field `").and_then(|rest| rest.strip_suffix('`'));
    let unknown = text.strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, "));
    let path = match twice {
        Some(field) => Some(path.map_or_else(|| field.to_owned(), |path| format!("{path}.{field}"))),
        None => path,
    };
    let path = path.map(short);
    let at = path.as_deref().map_or_else(|| "the body".to_owned(), |path| format!("`{path}`"));
    if twice.is_some() {
        return ApiError::bad_request(path.unwrap_or_default(), format!("{at}: found twice, expected once"));
    }
    if let Some((_, expected)) = unknown {
        let message = format!("{at}: this server does not know it, {expected}");
        return ApiError::unsupported(path.unwrap_or_default(), message);
    }
    let message = format!("{at}: {}", reworded(text));
    match path {
        Some(path) => ApiError::bad_request(path, message),
        None => ApiError { param: None, ..ApiError::bad_request("", message) },
    }
}

/// "invalid type: map, expected a string" in our words, with what was found cut short.
fn reworded(text: &str) -> String {
    let parts = text.split_once(": ").zip(text.rsplit_once(", expected "));
    let Some(((_, found), (_, expected))) = parts.filter(|((what, _), _)| what.starts_with("invalid ")) else {
        return shortened(text, 2 * PATH_SHOWN);
    };
    let found = found.strip_suffix(expected).and_then(|found| found.strip_suffix(", expected ")).unwrap_or(found);
    let found = match found.split_once(' ') {
        None if found == "map" => "an object".to_owned(),
        None if found == "sequence" => "a list".to_owned(),
        // The parser has quoted it already.
        Some(("string", text)) => match text.char_indices().nth(TEXT_SHOWN) {
            Some((end, _)) => format!("{}…\"", &text[..end]),
            None => text.to_owned(),
        },
        _ => {
            let kinds = ["integer `", "floating point `", "boolean `"];
            let bare = kinds.iter().find_map(|kind| found.strip_prefix(kind));
            shortened(bare.map_or(found, |bare| bare.trim_end_matches('`')), PATH_SHOWN)
        }
    };
    format!("found {found}, expected {expected}")
}
