//! `/chat/completions`.

use std::sync::Arc;

use axum::response::Response;
use moewe_runtime::engine::Constraint;
use serde::Serialize;
use uuid::Uuid;

use super::access::Access;
use super::answer::Part;
use super::app::{App, Running};
use super::generate::{Form, Job, Prompt, answer};
use super::host::{self, Host};
use crate::api::{
    AnswerMessage, ApiError, CallDelta, ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs, ChatRequest, ChunkChoice,
    Delta, FinishReason, OutputFormat, RoutedExperts, ToolCall, ToolChoice, Usage,
};
use crate::chat::{self, ChatPrompt, Splitter};
use crate::ledger::Key;

/// Answers a chat request.
pub async fn complete(
    app: Arc<App>,
    host: Arc<Host>,
    request: ChatRequest,
    key: Key,
    access: Arc<Access>,
    running: Running,
) -> Result<Response, ApiError> {
    host.check_name(request.model.as_deref())?;
    host.check_options(&request.options)?;
    let for_work = Arc::clone(&host);
    let (request, prompt, told) = app
        .work(move || {
            let (prompt, told) = prepare(&for_work, &request)?;
            Ok((request, prompt, told))
        })
        .await?;
    access.prompt(&host, &prompt.tokens);
    let form = Chat::new(&host, request.options.n, request.options.logprobs.is_some());
    let (dialect, stop) = (host.dialect.clone(), request.options.stop.clone());
    let splitter = move || Splitter::new(&dialect, told.in_reasoning, told.tools, stop.clone());
    let job = Job {
        host,
        prompts: vec![prompt],
        options: request.options,
        splitter: Box::new(splitter),
        key,
        access,
        _running: running,
    };
    answer(app, job, form).await
}

/// What has to be known of a prompt to read its answer.
#[derive(Clone, Copy)]
struct Told {
    in_reasoning: bool,
    tools: bool,
}

/// Writes the prompt, and makes the constraints of its answers.
fn prepare(host: &Host, request: &ChatRequest) -> Result<(Prompt, Told), ApiError> {
    let ChatPrompt { tokens, in_reasoning, tools } = host.dialect.chat_prompt(&host.text, request)?;
    let max_new_tokens = host.answer_tokens(tokens.len(), request.options.max_tokens, "messages")?;
    let constraints = (0..request.options.n).map(|_| constraint(host, request, in_reasoning));
    let constraints = constraints.collect::<Result<_, _>>()?;
    Ok((Prompt { tokens, max_new_tokens, constraints }, Told { in_reasoning, tools }))
}

/// What holds an answer to the format or the tools that were asked for.
fn constraint(host: &Host, request: &ChatRequest, in_reasoning: bool) -> Result<Option<Box<dyn Constraint>>, ApiError> {
    let must_call = matches!(request.tool_choice, ToolChoice::Required | ToolChoice::Function(_));
    let may_call = must_call || request.tool_choice == ToolChoice::Auto && !request.tools.is_empty();
    let constraint = if must_call || may_call && request.tools.iter().any(|tool| tool.strict) {
        if request.format != OutputFormat::Text && !must_call {
            let why = "an answer cannot be held to a format and call strict tools as it likes: set tool_choice to \
                       \"none\" or \"required\", or leave strict out";
            return Err(ApiError::bad_request("response_format", why));
        }
        let Some(syntax) = &host.dialect.tools else {
            return Err(ApiError::unsupported("tools", "this model has no way of calling tools"));
        };
        let calls = host.grammars.tool_calls(syntax, &request.tools, &request.tool_choice, request.parallel_tool_calls);
        calls.map_err(|error| ApiError::bad_request("tools", error.to_string()))?
    } else {
        let format = host.grammars.constraint(&request.format);
        format.map_err(|error| ApiError::bad_request("response_format", error.to_string()))?
    };
    Ok(match (constraint, &host.dialect.reasoning) {
        (Some(inner), Some(marks)) if in_reasoning => Some(host.grammars.after(marks.close, inner)),
        (constraint, _) => constraint,
    })
}

/// The answer to a chat request.
struct Chat {
    id: String,
    created: u64,
    model: String,
    experts: Shape,
    /// Whether log probabilities were asked for.
    logprobs: bool,
    choices: Vec<Whole>,
    prompt_experts: Vec<u16>,
}

/// A choice as it comes together.
#[derive(Default)]
struct Whole {
    content: String,
    reasoning: Option<String>,
    calls: Vec<ToolCall>,
    logprobs: ChatLogprobs,
    experts: Vec<u16>,
    finish: Option<FinishReason>,
}

/// How experts are told.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    moe_layers: usize,
    top_k: usize,
}

impl Shape {
    /// For a model.
    pub fn of(host: &Host) -> Self {
        Self { moe_layers: host.model.moe_layers.len(), top_k: host.model.num_experts_per_tok as usize }
    }

    /// `[tokens, moe_layers, top_k]`; nothing if there is nothing to tell.
    pub fn told(self, ids: Vec<u16>) -> Option<RoutedExperts> {
        if ids.is_empty() { None } else { RoutedExperts::new(ids, self.moe_layers, self.top_k) }
    }
}

/// JSON; the types are such that it does not fail.
pub fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain structures, and maps with text keys")
}

impl Chat {
    fn new(host: &Host, n: u32, logprobs: bool) -> Self {
        Self {
            id: format!("chatcmpl-{}", Uuid::new_v4().simple()),
            created: host::now(),
            model: host.name.clone(),
            experts: Shape::of(host),
            logprobs,
            choices: std::iter::repeat_with(Whole::default).take(n as usize).collect(),
            prompt_experts: Vec::new(),
        }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk::new(self.id.clone(), self.created, self.model.clone(), choices, usage)
    }
}

/// Deltas as they are sent: one kind in each.
fn deltas(parts: Vec<chat::Delta>) -> impl Iterator<Item = Delta> {
    parts.into_iter().map(|part| match part {
        chat::Delta::Reasoning(text) => Delta { reasoning_content: Some(text), ..Delta::default() },
        chat::Delta::Content(text) => Delta { content: Some(text), ..Delta::default() },
        chat::Delta::ToolCall { index, id, name } => {
            Delta { tool_calls: vec![CallDelta::begin(index, id, name)], ..Delta::default() }
        }
        chat::Delta::ToolArguments { index, text } => {
            Delta { tool_calls: vec![CallDelta::arguments(index, text)], ..Delta::default() }
        }
    })
}

impl Form for Chat {
    fn begin(&mut self, number: usize) -> Option<String> {
        Some(json(&self.chunk(vec![ChunkChoice::new(number as u32, Delta::role())], None)))
    }

    fn events(&mut self, number: usize, part: Part, finish: Option<FinishReason>) -> Vec<String> {
        let Part { deltas: parts, content, reasoning, experts, prompt_experts } = part;
        let mut chunks: Vec<ChatChunk> = deltas(parts)
            .chain(finish.map(|_| Delta::default()))
            .map(|delta| self.chunk(vec![ChunkChoice::new(number as u32, delta)], None))
            .collect();
        if let Some(first) = chunks.first_mut() {
            let choice = &mut first.choices[0];
            let any = !content.is_empty() || !reasoning.is_empty();
            choice.logprobs = (self.logprobs && any).then_some(ChatLogprobs { content, reasoning_content: reasoning });
            choice.routed_experts = self.experts.told(experts);
            first.prompt_routed_experts = self.experts.told(prompt_experts);
        }
        if let Some(last) = chunks.last_mut() {
            last.choices[0].finish_reason = finish;
        }
        chunks.iter().map(json).collect()
    }

    fn usage(&mut self, usage: Usage) -> String {
        json(&self.chunk(Vec::new(), Some(usage)))
    }

    fn keep(&mut self, number: usize, part: Part, finish: Option<FinishReason>) {
        let choice = &mut self.choices[number];
        for delta in part.deltas {
            match delta {
                chat::Delta::Reasoning(text) => *choice.reasoning.get_or_insert_default() += &text,
                chat::Delta::Content(text) => choice.content += &text,
                chat::Delta::ToolCall { id, name, .. } => choice.calls.push(ToolCall::new(id, name, "")),
                chat::Delta::ToolArguments { index, text } => {
                    if let Some(call) = choice.calls.get_mut(index as usize) {
                        call.function.arguments += &text;
                    }
                }
            }
        }
        choice.logprobs.content.extend(part.content);
        choice.logprobs.reasoning_content.extend(part.reasoning);
        choice.experts.extend(part.experts);
        choice.finish = finish;
        if self.prompt_experts.is_empty() {
            self.prompt_experts = part.prompt_experts;
        }
    }

    fn whole(self, usage: Usage) -> String {
        let (shape, logprobs) = (self.experts, self.logprobs);
        let choices = self.choices.into_iter().zip(0..).map(|(choice, index)| ChatChoice {
            index,
            message: AnswerMessage::new(choice.content, choice.reasoning, choice.calls),
            logprobs: logprobs.then_some(choice.logprobs),
            finish_reason: choice.finish.unwrap_or(FinishReason::Stop),
            routed_experts: shape.told(choice.experts),
        });
        let mut whole = ChatCompletion::new(self.id, self.created, self.model, choices.collect(), usage);
        whole.prompt_routed_experts = shape.told(self.prompt_experts);
        json(&whole)
    }
}
