//! The messages of a conversation.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::types::{Content, List, Object};
use super::{required, wrong};
use crate::api::{ApiError, shown};
use crate::text::Message;

/// Most calls of a message.
const MAX_CALLS: usize = 128;

/// A message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
pub struct MessageBody {
    /// Who speaks: `system` or `developer` (the same), `user`, `assistant` or `tool`.
    #[schema(value_type = String, required = true)]
    role: Option<String>,
    /// What is said: a text, or a list of parts of type `text`, whose texts are put together as they are. An
    /// assistant's may be null beside tool calls.
    #[schema(value_type = Option<ContentSchema>)]
    content: Option<Content>,
    /// The speaker's name.
    name: Option<String>,
    /// What the assistant thought before it spoke.
    reasoning_content: Option<String>,
    /// The tools that the assistant called.
    #[schema(value_type = Option<Vec<CallBody>>)]
    tool_calls: Option<List<Object<CallBody>, MAX_CALLS>>,
    /// Of a tool: which call it answers.
    tool_call_id: Option<String>,
    /// Of the last message, the assistant's: whether the answer goes on from it.
    prefix: Option<bool>,
    #[schema(ignore)]
    audio: Option<IgnoredAny>,
    #[schema(ignore)]
    function_call: Option<IgnoredAny>,
}

/// A text, or parts of it.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "a description of what `Content` reads")]
pub enum ContentSchema {
    /// A text.
    Text(String),
    /// Parts of a text.
    Parts(Vec<PartSchema>),
}

/// A part of a text.
#[derive(ToSchema)]
#[expect(dead_code, reason = "a description of what `Content` reads")]
pub struct PartSchema {
    /// Always `text`.
    #[serde(rename = "type")]
    kind: String,
    /// The text.
    text: String,
}

/// A call of a tool.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CallBody {
    /// The call's id.
    #[schema(value_type = String, required = true)]
    id: Option<String>,
    /// Always `function`.
    #[serde(rename = "type")]
    kind: Option<String>,
    /// What was called.
    #[schema(value_type = CalledBody, required = true)]
    function: Option<Object<CalledBody>>,
}

/// A function with its arguments.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CalledBody {
    /// Its name.
    #[schema(value_type = String, required = true)]
    name: Option<String>,
    /// The arguments, as the model wrote them.
    #[schema(value_type = String, required = true)]
    arguments: Option<String>,
}

/// Checks a conversation. Also tells whether the answer goes on from its last message.
pub(super) fn messages(bodies: Vec<Object<MessageBody>>) -> Result<(Vec<Message>, bool), ApiError> {
    let last = bodies.len().checked_sub(1).ok_or_else(|| wrong("messages", "an empty list", "a message at least"))?;
    let mut prefix = false;
    let mut messages = Vec::with_capacity(bodies.len());
    for (i, Object(body)) in bodies.into_iter().enumerate() {
        let param = format!("messages[{i}]");
        if body.prefix == Some(true) {
            if i < last || body.role.as_deref() != Some("assistant") {
                return Err(wrong(format!("{param}.prefix"), "true", "it with the last message only, an assistant's"));
            }
            prefix = true;
        }
        messages.push(message(&param, body)?);
    }
    Ok((messages, prefix))
}

fn message(param: &str, body: MessageBody) -> Result<Message, ApiError> {
    const ROLES: &str = "\"system\", \"developer\", \"user\", \"assistant\" or \"tool\"";
    let at = |field: &str| format!("{param}.{field}");
    let role = required(body.role, at("role"), ROLES)?;
    if body.audio.is_some() {
        let what = format!("`{param}.audio`: the model reads text only; put what was said into `content`");
        return Err(ApiError::unsupported(at("audio"), what));
    }
    if body.function_call.is_some() {
        let what = format!("`{param}.function_call`: this older form is not read; use `tool_calls`");
        return Err(ApiError::unsupported(at("function_call"), what));
    }
    let text = |content: Option<Content>| {
        let Content(text) = required(content, at("content"), "a string or a list of parts of text")?;
        Ok(Some(text))
    };
    let mut more = Map::new();
    if let Some(name) = body.name {
        more.insert("name".to_owned(), name.into());
    }
    let (role, content) = match role.as_str() {
        "system" | "developer" => ("system", text(body.content)?),
        "user" => ("user", text(body.content)?),
        "tool" => {
            let id = required(body.tool_call_id, at("tool_call_id"), "the id of the call that it answers")?;
            more.insert("tool_call_id".to_owned(), id.into());
            ("tool", text(body.content)?)
        }
        "assistant" => {
            let calls = body.tool_calls.map(|List(calls)| calls).unwrap_or_default();
            let content = match body.content {
                None if body.prefix == Some(true) => Some(String::new()),
                None if !calls.is_empty() => None,
                content => text(content)?,
            };
            if let Some(reasoning) = body.reasoning_content {
                more.insert("reasoning_content".to_owned(), reasoning.into());
            }
            if body.prefix == Some(true) && !calls.is_empty() {
                return Err(wrong(at("prefix"), "true beside `tool_calls`", "a text to go on from"));
            }
            if !calls.is_empty() {
                let calls = calls.into_iter().enumerate();
                let calls = calls.map(|(i, Object(body))| call(&format!("{param}.tool_calls[{i}]"), body));
                more.insert("tool_calls".to_owned(), Value::Array(calls.collect::<Result<_, _>>()?));
            }
            ("assistant", content)
        }
        _ => return Err(wrong(at("role"), shown(&role), ROLES)),
    };
    Ok(Message { role: role.to_owned(), content, more })
}

/// A call as templates take it.
fn call(param: &str, body: CallBody) -> Result<Value, ApiError> {
    let id = required(body.id, format!("{param}.id"), "the call's id")?;
    if let Some(kind) = body.kind.filter(|kind| kind != "function") {
        return Err(wrong(format!("{param}.type"), shown(&kind), "\"function\""));
    }
    let Object(function) = required(body.function, format!("{param}.function"), "an object with `name`")?;
    let name = required(function.name, format!("{param}.function.name"), "the function's name")?;
    let arguments = required(function.arguments, format!("{param}.function.arguments"), "a string")?;
    Ok(json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }))
}
