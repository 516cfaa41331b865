//! What an answer must look like: OpenAI's `response_format` and vLLM's names for the same.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use utoipa::ToSchema;

use super::types::{Json, Object};
use super::{required, wrong};
use crate::api::{ApiError, OutputFormat, shown};

/// Most bytes of a regular expression; grammars are bounded where they are compiled.
const MAX_REGEX: usize = 64 << 10;

/// What an answer must look like; one of the fields at most.
#[derive(Debug, Deserialize, ToSchema)]
pub struct FormatBody {
    /// What the answer must look like.
    #[schema(value_type = Option<ResponseFormat>)]
    response_format: Option<Object<ResponseFormat>>,
    /// vLLM's form of the same.
    #[schema(value_type = Option<StructuredOutputs>)]
    structured_outputs: Option<Object<StructuredOutputs>>,
    /// vLLM's older form: a JSON schema, as an object or as text.
    #[schema(value_type = Option<serde_json::Value>)]
    guided_json: Option<Json>,
    /// vLLM's older form: a regular expression.
    guided_regex: Option<String>,
}

/// What the answer must look like.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ResponseFormat {
    /// `text`, `json_object`, `json_schema` or `regex`.
    #[serde(rename = "type")]
    #[schema(value_type = String, required = true)]
    kind: Option<String>,
    /// With `json_schema`.
    #[schema(value_type = Option<NamedSchema>)]
    json_schema: Option<Object<NamedSchema>>,
    /// With `regex`: what the whole answer must match.
    pattern: Option<String>,
}

/// A JSON schema with its name.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NamedSchema {
    /// Its name.
    name: Option<String>,
    /// The schema. It is always kept to strictly.
    #[schema(value_type = Object, required = true)]
    schema: Option<Json>,
}

/// What the answer must look like, one of the fields.
#[derive(Debug, Deserialize, ToSchema)]
pub struct StructuredOutputs {
    /// A JSON schema, as an object or as text.
    #[schema(value_type = Option<serde_json::Value>)]
    json: Option<Json>,
    /// A regular expression that the whole answer must match.
    regex: Option<String>,
    /// Whether it must be a JSON object.
    json_object: Option<bool>,
    #[schema(ignore)]
    choice: Option<IgnoredAny>,
    #[schema(ignore)]
    grammar: Option<IgnoredAny>,
    #[schema(ignore)]
    structural_tag: Option<IgnoredAny>,
}

impl FormatBody {
    /// The one format that is asked for.
    pub(super) fn format(self) -> Result<OutputFormat, ApiError> {
        let mut asked: Vec<(&str, OutputFormat)> = Vec::new();
        if let Some(Object(format)) = self.response_format {
            let format = format.format()?;
            if format != OutputFormat::Text {
                asked.push(("response_format", format));
            }
        }
        if let Some(Object(outputs)) = self.structured_outputs {
            let StructuredOutputs { choice, grammar, structural_tag, .. } = &outputs;
            for (name, given) in [("choice", choice), ("grammar", grammar), ("structural_tag", structural_tag)] {
                if given.is_some() {
                    let param = format!("structured_outputs.{name}");
                    let message =
                        format!("`{param}` is not supported: give a schema as `json` or a pattern as `regex`");
                    return Err(ApiError::unsupported(param, message));
                }
            }
            if let Some(Json(schema)) = outputs.json {
                asked.push(("structured_outputs.json", from_schema("structured_outputs.json", None, schema)?));
            }
            if let Some(pattern) = outputs.regex {
                asked.push(("structured_outputs.regex", from_regex("structured_outputs.regex", pattern)?));
            }
            if outputs.json_object == Some(true) {
                asked.push(("structured_outputs.json_object", OutputFormat::JsonObject));
            }
        }
        if let Some(Json(schema)) = self.guided_json {
            asked.push(("guided_json", from_schema("guided_json", None, schema)?));
        }
        if let Some(pattern) = self.guided_regex {
            asked.push(("guided_regex", from_regex("guided_regex", pattern)?));
        }
        if let [(first, _), (second, _), ..] = asked[..] {
            return Err(wrong(second, format!("it together with `{first}`"), "one format"));
        }
        Ok(asked.pop().map_or(OutputFormat::Text, |(_, format)| format))
    }
}

impl ResponseFormat {
    fn format(self) -> Result<OutputFormat, ApiError> {
        const KINDS: &str = "\"text\", \"json_object\", \"json_schema\" or \"regex\"";
        let kind = required(self.kind, "response_format.type", KINDS)?;
        match kind.as_str() {
            "text" => Ok(OutputFormat::Text),
            "json_object" => Ok(OutputFormat::JsonObject),
            "json_schema" => {
                let param = "response_format.json_schema";
                let Object(named) = required(self.json_schema, param, "an object with `name` and `schema`")?;
                let param = "response_format.json_schema.schema";
                let Json(schema) = required(named.schema, param, "a JSON schema, which is an object")?;
                from_schema(param, named.name, schema)
            }
            "regex" => {
                let param = "response_format.pattern";
                from_regex(param, required(self.pattern, param, "a regular expression")?)
            }
            _ => Err(wrong("response_format.type", shown(&kind), KINDS)),
        }
    }
}

/// A schema, as an object or as the text of one.
fn from_schema(param: &str, name: Option<String>, schema: Value) -> Result<OutputFormat, ApiError> {
    let schema = match schema {
        Value::String(text) => {
            let Json(schema) = serde_json::from_str(&text)
                .map_err(|e| wrong(param, format!("a text that is not JSON ({e})"), "a JSON schema"))?;
            schema
        }
        schema => schema,
    };
    if !schema.is_object() {
        return Err(wrong(param, kind_of(&schema), "a JSON schema, which is an object"));
    }
    Ok(OutputFormat::JsonSchema { name: name.unwrap_or_else(|| "schema".to_owned()), schema })
}

fn from_regex(param: &str, pattern: String) -> Result<OutputFormat, ApiError> {
    match pattern.len() {
        0 => Err(wrong(param, "an empty text", "a regular expression")),
        1..=MAX_REGEX => Ok(OutputFormat::Regex(pattern)),
        bytes => Err(wrong(param, format!("{bytes} bytes"), format!("at most {MAX_REGEX}"))),
    }
}

/// What a value is, for errors.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
