//! From messages to the model's prompt.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::dialect::{Calls, Dialect, Reasoning, System};
use super::shield::Cover;
use super::syntax::ToolSyntax;
use crate::api::{ApiError, ChatRequest, ToolChoice};
use crate::text::{ChatOptions, Message, Text, TextError};

/// What a model is given to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatPrompt {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Whether the answer begins within reasoning.
    pub in_reasoning: bool,
    /// Whether the model was told of tools, so that the answer may call them.
    pub tools: bool,
}

impl Dialect {
    /// Writes a conversation as the prompt for its next answer, or for the rest of the answer that it ends with.
    ///
    /// A template's own mind about `thinking` is overruled where it has no variable for it: reasoning that it opens, or
    /// that the model would open, is closed again if thinking was declined.
    pub fn chat_prompt(&self, text: &Text, request: &ChatRequest) -> Result<ChatPrompt, ApiError> {
        let conversation = Conversation::new(self, text, request)?;
        let (prompt, in_reasoning) =
            if request.prefix { conversation.continued()? } else { conversation.asked(request.thinking)? };
        Ok(ChatPrompt { tokens: conversation.encode(&prompt)?, in_reasoning, tools: conversation.offered })
    }

    /// The tokens of a conversation that is not to be answered.
    pub fn transcript(&self, text: &Text, request: &ChatRequest) -> Result<Vec<u32>, ApiError> {
        let conversation = Conversation::new(self, text, request)?;
        conversation.encode(&conversation.render(&conversation.messages, false)?)
    }

    /// The prompt upon which the model writes what stands between two texts.
    pub fn fim_prompt(&self, text: &Text, prefix: &str, suffix: &str) -> Result<Vec<u32>, ApiError> {
        let Some(fim) = self.fim else {
            let why = "this model cannot fill gaps: its vocabulary has no `<｜fim▁hole｜>`; leave `suffix` out";
            return Err(ApiError::unsupported("suffix", why));
        };
        let cover = self.shield.cover(&[], &[prefix.into(), suffix.into()])?;
        let encode = |part| text.encode_hidden(&cover.hide(part), |c| cover.shown(c)).map_err(failed);
        let mut ids: Vec<u32> = text.begin_id().into_iter().collect();
        ids.push(fim.begin);
        ids.extend(encode(prefix)?);
        ids.push(fim.hole);
        ids.extend(encode(suffix)?);
        ids.push(fim.end);
        Ok(ids)
    }
}

/// A conversation as the template takes it, control tokens in its texts hidden.
struct Conversation<'a> {
    text: &'a Text,
    reasoning: Option<Reasoning>,
    cover: Cover,
    messages: Vec<Message>,
    options: ChatOptions,
    /// Whether the model is told of tools.
    offered: bool,
}

impl<'a> Conversation<'a> {
    fn new(dialect: &Dialect, text: &'a Text, request: &ChatRequest) -> Result<Self, ApiError> {
        let reasoning = dialect.reasoning;
        let offered = request.tool_choice != ToolChoice::None && !request.tools.is_empty();
        // Some templates know calls and results, but leave it to others to tell the model what there is to call.
        let told_here = dialect.tools.filter(|_| offered && !dialect.manners.tools);
        if offered && !dialect.manners.tools && told_here.is_none() {
            let why = "this model's chat template does not tell the model of tools; leave them out, or describe them \
                       in a message and ask for JSON by `response_format`";
            return Err(ApiError::unsupported("tools", why));
        }
        let tools: Vec<Value> = request.tools.iter().filter(|_| offered).map(|tool| tool.raw.clone()).collect();
        let messages = fit(dialect, request)?;
        let cover = dialect.shield.cover(&messages, &tools)?;
        let hide = |message: Message| {
            // Templates know these marks in what the model said before, and cut its reasoning off there.
            let marks = reasoning.filter(|_| message.role == "assistant");
            let marks: Vec<&str> = marks.iter().flat_map(|marks| [marks.open, marks.close]).collect();
            let content = message.content.map(|content| cover.hide_except(&content, &marks));
            let more = message.more.into_iter().map(|(name, value)| (name, cover.hide_all(&value))).collect();
            Message { role: message.role, content, more }
        };
        let mut messages: Vec<Message> = messages.into_iter().map(hide).collect();
        let mut tools: Option<Vec<Value>> = offered.then(|| tools.iter().map(|tool| cover.hide_all(tool)).collect());
        if let Some((syntax, tools)) = told_here.zip(tools.take_if(|_| told_here.is_some())) {
            tell_of_tools(dialect.manners.system, &mut messages, &described(&syntax, &tools));
        }
        let mut variables = Map::new();
        if let Some(thinking) = request.thinking {
            variables.insert("thinking".into(), thinking.into());
            variables.insert("enable_thinking".into(), thinking.into());
        }
        let options = ChatOptions { add_generation_prompt: true, tools, variables };
        Ok(Self { text, reasoning, cover, messages, options, offered })
    }

    /// The prompt for an answer, and whether that begins within reasoning.
    fn asked(&self, thinking: Option<bool>) -> Result<(String, bool), ApiError> {
        let mut prompt = self.render(&self.messages, true)?;
        let Some(Reasoning { open, close }) = self.reasoning else { return Ok((prompt, false)) };
        let opened = prompt.trim_end().ends_with(open);
        if thinking != Some(false) {
            return Ok((prompt, opened));
        }
        let knows = |what| self.text.template_mentions(what);
        if opened {
            prompt += &if prompt.ends_with('\n') { format!("\n{close}\n\n") } else { close.to_owned() };
        } else if !prompt.trim_end().ends_with(close) && knows(close) && !knows("thinking") {
            prompt += &format!("{open}\n\n{close}\n\n");
        }
        Ok((prompt, false))
    }

    /// The prompt for the rest of the last message, and whether that goes on with reasoning.
    fn continued(&self) -> Result<(String, bool), ApiError> {
        let (last, before) = self.messages.split_last().expect("`fit` saw the message that is continued");
        let content = last.content.as_deref().unwrap_or_default();
        let thought = last.more.get("reasoning_content").and_then(Value::as_str).filter(|text| !text.is_empty());
        if let (Some(marks), Some(thought)) = (self.reasoning, thought) {
            return Ok((self.with_thought(before, marks, thought, content)?, content.is_empty()));
        }
        // Whatever the template puts behind a message is behind this.
        let sentinel = self.cover.sentinel();
        let mut messages = self.messages.clone();
        let open_end = messages.last_mut().expect("there is a last message");
        open_end.content = Some(format!("{content}{sentinel}"));
        open_end.more.insert("prefix".into(), true.into());
        let mut prompt = self.render(&messages, false)?;
        let Some(end) = prompt.rfind(sentinel) else {
            let why = "this model's chat template does not show the last message, so it cannot be continued";
            return Err(ApiError::unsupported("messages", why));
        };
        prompt.truncate(end);
        let without = self.render(before, false).unwrap_or_default();
        let common = prompt.char_indices().zip(without.chars()).find(|((_, a), b)| a != b);
        let answer = &prompt[common.map_or(without.len().min(prompt.len()), |((at, _), _)| at)..];
        let within = self.reasoning.is_some_and(|marks| answer.rfind(marks.open) > answer.rfind(marks.close));
        Ok((prompt, within))
    }

    /// The prompt for an answer with this reasoning, complete if there is content.
    fn with_thought(
        &self,
        before: &[Message],
        marks: Reasoning,
        thought: &str,
        content: &str,
    ) -> Result<String, ApiError> {
        let mut options = self.options.clone();
        options.variables.extend(["thinking", "enable_thinking"].map(|name| (name.to_owned(), true.into())));
        let mut prompt = self.render_with(before, &options)?;
        let end = prompt.trim_end();
        if !end.ends_with(marks.open) {
            // A template that declines to think writes a closing mark, some an opening one before it.
            let declined = end.strip_suffix(marks.close).map(str::trim_end);
            let kept = declined.map(|rest| rest.strip_suffix(marks.open).unwrap_or(rest).len());
            prompt.truncate(kept.unwrap_or(prompt.len()));
            prompt += marks.open;
            if kept.is_none() {
                prompt.push('\n');
            }
        }
        let newline = if prompt.ends_with('\n') { "\n" } else { "" };
        prompt += thought;
        if !content.is_empty() {
            prompt += &[newline, marks.close, newline, newline, content].concat();
        }
        Ok(prompt)
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ApiError> {
        self.render_with(messages, &ChatOptions { add_generation_prompt, ..self.options.clone() })
    }

    fn render_with(&self, messages: &[Message], options: &ChatOptions) -> Result<String, ApiError> {
        self.text.render_chat(messages, options).map_err(|error| match error {
            TextError::TemplateRender { detail, .. } => {
                let detail: String = detail.chars().map(|c| self.cover.shown(c)).collect();
                let message = format!("the model's chat template does not take this conversation: {detail}");
                ApiError::bad_request("messages", message)
            }
            TextError::TemplateLimit { limit, .. } => {
                let message = format!("the model's chat template was stopped after {limit}; shorten the conversation");
                ApiError::bad_request("messages", message)
            }
            TextError::NoChatTemplate { .. } => {
                let why = "this model has no chat template and takes plain text only; use /v1/completions";
                ApiError::unsupported("messages", why)
            }
            other => failed(other),
        })
    }

    fn encode(&self, prompt: &str) -> Result<Vec<u32>, ApiError> {
        self.text.encode_hidden(prompt, |c| self.cover.shown(c)).map_err(failed)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "handed to map_err")]
fn failed(error: TextError) -> ApiError {
    ApiError::server(error.to_string())
}

/// Tools, and how to call them, as a model is told where its template does not do it.
fn described(syntax: &ToolSyntax, tools: &[Value]) -> String {
    let mut text = "## Tools\n\nYou may call these tools:\n".to_owned();
    for tool in tools {
        let part = |name: &str| &tool["function"][name];
        let name = part("name").as_str().unwrap_or_default();
        let description = part("description").as_str().unwrap_or_default();
        text += &format!("\n### {name}\n{description}\n\nParameters: {}\n", part("parameters"));
    }
    let ToolSyntax { section_begin, section_end, call_begin, arguments_begin, call_end, between, .. } = syntax;
    let number = if syntax.numbered { ":0" } else { "" };
    let call = |name: &str| format!("{call_begin}{name}{number}{arguments_begin}{{\"argument\": \"value\"}}{call_end}");
    let calls = [call("NAME"), call("ANOTHER_NAME")].join(between);
    text + &format!(
        "\nTo call tools, end your answer with exactly this, with one call or more:\n{section_begin}{calls}{section_end}"
    )
}

/// Adds a text to what the system says.
fn tell_of_tools(shown: System, messages: &mut Vec<Message>, told: &str) {
    let role = if shown == System::None { "user" } else { "system" };
    match messages.iter_mut().find(|message| message.role == role) {
        Some(message) if role == "system" => {
            let content = message.content.get_or_insert_default();
            *content += &format!("\n\n{told}");
        }
        Some(message) => {
            message.content = Some(format!("{told}\n\n{}", message.content.as_deref().unwrap_or_default()));
        }
        None => messages.insert(0, Message::new(role, told)),
    }
}

/// The messages as far as the template can show them.
fn fit(dialect: &Dialect, request: &ChatRequest) -> Result<Vec<Message>, ApiError> {
    let manners = dialect.manners;
    let mut messages = Vec::with_capacity(request.messages.len() + 1);
    for (i, message) in request.messages.iter().enumerate() {
        if message.role == "tool" && !manners.results {
            let why = "this model's chat template does not show the model what tools gave";
            return Err(ApiError::unsupported(format!("messages[{i}]"), why));
        }
        let mut message = message.clone();
        let calls = message.more.remove("tool_calls").filter(|calls| calls.as_array().is_some_and(|c| !c.is_empty()));
        let Some(calls) = calls else {
            message.content.get_or_insert_default();
            messages.push(message);
            continue;
        };
        let field = format!("messages[{i}].tool_calls");
        let Some(form) = manners.calls else {
            return Err(ApiError::unsupported(field, "this model's chat template does not show calls of tools"));
        };
        if request.prefix && i + 1 == request.messages.len() {
            return Err(ApiError::unsupported(field, "a message that is to be continued cannot call tools"));
        }
        message.content = message.content.filter(|content| !content.is_empty());
        if message.content.is_some() && !form.with_content {
            let mut calling = Message { content: None, ..message.clone() };
            calling.more.remove("reasoning_content");
            messages.push(std::mem::replace(&mut message, calling));
        }
        if message.content.is_none() {
            message.content = form.no_content.map(str::to_owned);
        }
        message.more.insert("tool_calls".into(), fit_calls(calls, form, &field)?);
        messages.push(message);
    }
    if dialect.tools.is_some_and(|syntax| syntax.numbered) {
        number_calls(&mut messages);
    }
    place_system(manners.system, &mut messages);
    Ok(messages)
}

/// Calls of tools with their arguments as the template takes them.
fn fit_calls(mut calls: Value, form: Calls, field: &str) -> Result<Value, ApiError> {
    for (i, call) in calls.as_array_mut().into_iter().flatten().enumerate() {
        let Some(arguments) = call.pointer_mut("/function/arguments").filter(|_| form.objects) else { continue };
        let Some(text) = arguments.as_str() else { continue };
        *arguments = serde_json::from_str(text).map_err(|e| {
            let message = format!("this model's chat template takes arguments that are JSON only: {e}");
            ApiError::bad_request(format!("{field}[{i}].function.arguments"), message)
        })?;
    }
    Ok(calls)
}

/// Names calls as models with numbered calls do, by tool and number, for their templates show the names.
fn number_calls(messages: &mut [Message]) {
    let mut names: HashMap<String, String> = HashMap::new();
    let mut number = 0;
    for message in messages {
        for call in message.more.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(tool) = call.pointer("/function/name").and_then(Value::as_str) else { continue };
            let name = format!("functions.{tool}:{number}");
            number += 1;
            if let Some(id) = call.get("id").and_then(Value::as_str) {
                names.insert(id.to_owned(), name.clone());
            }
            call["id"] = name.into();
        }
        if let Some(id) = message.more.get_mut("tool_call_id")
            && let Some(name) = id.as_str().and_then(|id| names.get(id))
        {
            *id = name.as_str().into();
        }
    }
}

/// Puts the texts of system messages where the template shows them.
fn place_system(shown: System, messages: &mut Vec<Message>) {
    let is_system = |message: &Message| message.role == "system";
    let placed = match shown {
        System::All => true,
        System::First => messages.iter().skip(1).all(|message| !is_system(message)),
        System::None => !messages.iter().any(is_system),
    };
    if placed {
        return;
    }
    let texts = messages.extract_if(.., |message| is_system(message)).filter_map(|message| message.content);
    let mut text = texts.collect::<Vec<_>>().join("\n\n");
    if shown == System::First {
        messages.insert(0, Message::system(text));
        return;
    }
    match messages.iter_mut().find(|message| message.role == "user") {
        Some(message) => {
            text += "\n\n";
            text += message.content.as_deref().unwrap_or_default();
            message.content = Some(text);
        }
        None => messages.insert(0, Message::user(text)),
    }
}
