//! The functions that a model may call.

use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::format::kind_of;
use super::types::{Json, Object};
use super::{required, wrong};
use crate::api::{ApiError, Tool, ToolChoice, shown};

/// A function that the model may call.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ToolBody {
    /// Always `function`.
    #[serde(rename = "type")]
    #[schema(value_type = String, required = true)]
    kind: Option<String>,
    /// The function.
    #[schema(value_type = FunctionBody, required = true)]
    function: Option<Object<FunctionBody>>,
}

/// What the model is told of a function.
#[derive(Debug, Deserialize, ToSchema)]
pub struct FunctionBody {
    /// Its name: 1 to 64 letters, digits, `_` and `-`; each function another.
    #[schema(value_type = String, required = true, pattern = "^[a-zA-Z0-9_-]{1,64}$")]
    name: Option<String>,
    /// What it does.
    description: Option<String>,
    /// The JSON schema of its arguments; absent: it takes none.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Json>,
    /// Whether the arguments have to fit the schema.
    strict: Option<bool>,
}

/// What a name is made of.
const NAME: &str = "1 to 64 letters, digits, `_` and `-`";

/// Whether a text may be a function's name.
fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

/// Checks a request's tools.
pub(super) fn tools(bodies: Vec<Object<ToolBody>>) -> Result<Vec<Tool>, ApiError> {
    let mut tools: Vec<Tool> = Vec::with_capacity(bodies.len());
    for (i, Object(body)) in bodies.into_iter().enumerate() {
        let tool = tool(&format!("tools[{i}]"), body)?;
        if tools.iter().any(|other| other.name == tool.name) {
            let param = format!("tools[{i}].function.name");
            return Err(wrong(param, format!("the name {:?} for a second time", tool.name), "each name once"));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool(param: &str, body: ToolBody) -> Result<Tool, ApiError> {
    let kind = required(body.kind, format!("{param}.type"), "\"function\"")?;
    if kind != "function" {
        return Err(wrong(format!("{param}.type"), shown(&kind), "\"function\""));
    }
    let Object(function) = required(body.function, format!("{param}.function"), "an object with `name`")?;
    let FunctionBody { name, description, parameters, strict } = function;
    let name = required(name, format!("{param}.function.name"), NAME)?;
    if !is_name(&name) {
        return Err(wrong(format!("{param}.function.name"), shown(&name), NAME));
    }
    let parameters = match parameters {
        None => json!({ "type": "object", "properties": {} }),
        Some(Json(parameters @ Value::Object(_))) => parameters,
        Some(Json(other)) => {
            let expected = "a JSON schema, which is an object";
            return Err(wrong(format!("{param}.function.parameters"), kind_of(&other), expected));
        }
    };
    let told = description.as_deref().unwrap_or("");
    let mut function = json!({ "name": name, "description": told, "parameters": parameters });
    if let Some(strict) = strict {
        function["strict"] = strict.into();
    }
    let raw = json!({ "type": "function", "function": function });
    Ok(Tool { name, description, parameters, strict: strict.unwrap_or(false), raw })
}

/// Whether the model calls functions: `none`, `auto`, `required`, or an object that names one.
pub(super) fn choice(body: Option<Json>, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    const EXPECTED: &str = "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let param = "tool_choice";
    let choice = match body.map(|Json(value)| value) {
        None if tools.is_empty() => ToolChoice::None,
        None => ToolChoice::Auto,
        Some(Value::String(text)) => match text.as_str() {
            "none" => ToolChoice::None,
            // Without tools there is nothing to choose.
            "auto" if tools.is_empty() => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(wrong(param, shown(&text), EXPECTED)),
        },
        Some(value @ Value::Object(_)) => {
            let kind = value.get("type").and_then(Value::as_str);
            let name = value.get("function").and_then(|function| function.get("name")).and_then(Value::as_str);
            match (kind, name) {
                (Some("function"), Some(name)) => ToolChoice::Function(name.to_owned()),
                (Some("function"), None) => return Err(wrong(param, "no name of a function", EXPECTED)),
                (Some(kind), _) => return Err(wrong("tool_choice.type", shown(kind), EXPECTED)),
                (None, _) => return Err(wrong("tool_choice.type", "nothing", EXPECTED)),
            }
        }
        Some(other) => return Err(wrong(param, kind_of(&other), EXPECTED)),
    };
    match &choice {
        ToolChoice::Required if tools.is_empty() => Err(wrong(param, "\"required\" without `tools`", "some tools")),
        ToolChoice::Function(name) if tools.iter().all(|tool| tool.name != *name) => {
            Err(wrong("tool_choice.function.name", shown(name), "the name of one of the `tools`"))
        }
        _ => Ok(choice),
    }
}
