//! Chat requests.

use serde::Deserialize;
use utoipa::ToSchema;

use super::format::FormatBody;
use super::message::{MessageBody, messages};
use super::options::OptionsBody;
use super::read::read;
use super::tool::{ToolBody, choice, tools};
use super::types::{Integer, Json, List, Object};
use super::unsupported::{self, Route};
use super::{integer, required, wrong};
use crate::api::{ApiError, ChatRequest, shown};

/// Most messages of a conversation.
const MAX_MESSAGES: usize = 4096;
/// Most functions that the model may be told of.
const MAX_TOOLS: usize = 128;

/// A conversation to continue.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatBody {
    /// The conversation, 1 to 4096 messages.
    #[schema(value_type = Vec<MessageBody>, required = true)]
    messages: Option<List<Object<MessageBody>, MAX_MESSAGES>>,
    /// The functions that the model may call, at most 128.
    #[schema(value_type = Option<Vec<ToolBody>>)]
    tools: Option<List<Object<ToolBody>, MAX_TOOLS>>,
    /// Whether it calls them: `none`, `auto`, `required`, or `{"type": "function", "function": {"name": …}}`.
    #[schema(value_type = Option<serde_json::Value>)]
    tool_choice: Option<Json>,
    /// Whether one answer may have several calls; it may if nothing is said.
    parallel_tool_calls: Option<bool>,
    /// Whether to think before answering; the chat template decides if nothing is said.
    #[schema(value_type = Option<ThinkingBody>)]
    thinking: Option<Object<ThinkingBody>>,
    /// `none` is the same as `thinking` disabled; other efforts are all the same to this server.
    reasoning_effort: Option<String>,
    /// `thinking` and `enable_thinking`, which are the same as `thinking`.
    #[schema(value_type = Option<std::collections::BTreeMap<String, bool>>)]
    chat_template_kwargs: Option<Object<TemplateBody>>,
    /// Whether to tell the tokens' log probabilities.
    logprobs: Option<bool>,
    /// Of how many of the likeliest tokens to tell them, with `logprobs`.
    #[schema(value_type = Option<u32>, maximum = 20)]
    top_logprobs: Option<Integer>,
}

/// Whether to think before answering.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ThinkingBody {
    /// `enabled` or `disabled`.
    #[serde(rename = "type")]
    #[schema(value_type = String, required = true)]
    kind: Option<String>,
}

/// The variables of chat templates that clients may set.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateBody {
    thinking: Option<bool>,
    enable_thinking: Option<bool>,
}

impl ChatRequest {
    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(body, Route::Chat)
    }
}

/// Reads the body of a chat, or of what is only to be tokenized like one.
pub(super) fn parse(body: &[u8], route: Route) -> Result<ChatRequest, ApiError> {
    let chat: ChatBody = read(body)?;
    let options: OptionsBody = read(body)?;
    let format: FormatBody = read(body)?;
    unsupported::check(body, route)?;
    let List(bodies) = required(chat.messages, "messages", "a list of messages")?;
    let (messages, prefix) = messages(bodies)?;
    let tools = tools(chat.tools.map(|List(tools)| tools).unwrap_or_default())?;
    let tool_choice = choice(chat.tool_choice, &tools)?;
    let thinking = thinking(chat.thinking, chat.reasoning_effort.as_deref(), chat.chat_template_kwargs.as_ref())?;
    let top = integer("top_logprobs", chat.top_logprobs, 0..=20_u32)?;
    let logprobs = match (chat.logprobs, top) {
        (Some(true), top) => Some(top.unwrap_or(0)),
        (_, None | Some(0)) => None,
        (_, Some(top)) => {
            return Err(wrong("top_logprobs", format!("{top} without `logprobs`"), "`logprobs` to be true"));
        }
    };
    Ok(ChatRequest {
        model: options.model.clone(),
        messages,
        prefix,
        tools,
        tool_choice,
        parallel_tool_calls: chat.parallel_tool_calls.unwrap_or(true),
        thinking,
        format: format.format()?,
        options: options.options(logprobs)?,
    })
}

/// Whether to think, which may be said in four ways, but not both yes and no.
fn thinking(
    body: Option<Object<ThinkingBody>>,
    effort: Option<&str>,
    template: Option<&Object<TemplateBody>>,
) -> Result<Option<bool>, ApiError> {
    let mut said: Vec<(&str, bool)> = Vec::new();
    if let Some(Object(ThinkingBody { kind })) = body {
        const KINDS: &str = "\"enabled\" or \"disabled\"";
        let kind = required(kind, "thinking.type", KINDS)?;
        said.push(match kind.as_str() {
            "enabled" => ("thinking", true),
            "disabled" => ("thinking", false),
            _ => return Err(wrong("thinking.type", shown(&kind), KINDS)),
        });
    }
    match effort {
        Some("none") => said.push(("reasoning_effort", false)),
        None | Some("minimal" | "low" | "medium" | "high" | "xhigh" | "max") => {}
        Some(other) => {
            let efforts = "\"none\", \"minimal\", \"low\", \"medium\", \"high\", \"xhigh\" or \"max\"";
            return Err(wrong("reasoning_effort", shown(other), efforts));
        }
    }
    if let Some(&Object(TemplateBody { thinking, enable_thinking })) = template {
        said.extend(thinking.map(|value| ("chat_template_kwargs.thinking", value)));
        said.extend(enable_thinking.map(|value| ("chat_template_kwargs.enable_thinking", value)));
    }
    let Some(&(first, thinking)) = said.first() else { return Ok(None) };
    match said.iter().find(|(_, other)| *other != thinking) {
        Some((second, _)) => Err(wrong(*second, format!("the opposite of `{first}`"), "the same")),
        None => Ok(Some(thinking)),
    }
}
