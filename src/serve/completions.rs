//! `/completions`.

use std::sync::Arc;

use axum::response::Response;
use uuid::Uuid;

use super::access::Access;
use super::answer::Part;
use super::app::{App, Running};
use super::chat::{Shape, json};
use super::generate::{Form, Job, Prompt, answer};
use super::host::{self, Host};
use crate::api::{
    self, ApiError, Completion, CompletionChoice, CompletionRequest, FinishReason, LegacyLogprobs, Likeliest, Usage,
};
use crate::chat::{Delta, Splitter};
use crate::ledger::Key;

/// Most answers to one request, all prompts taken together.
const MAX_CHOICES: usize = 1024;

/// Most tokens of an answer that nobody limited, as OpenAI has it.
const DEFAULT_TOKENS: usize = 16;

/// Answers a completion request.
pub async fn complete(
    app: Arc<App>,
    host: Arc<Host>,
    request: CompletionRequest,
    key: Key,
    access: Arc<Access>,
    running: Running,
) -> Result<Response, ApiError> {
    host.check_name(request.model.as_deref())?;
    host.check_options(&request.options)?;
    let for_work = Arc::clone(&host);
    let (request, prompts) = app
        .work(move || {
            let prompts = prepare(&for_work, &request)?;
            Ok((request, prompts))
        })
        .await?;
    for prompt in &prompts {
        access.prompt(&host, &prompt.tokens);
    }
    let form = Texts::new(&host, &request, &prompts);
    let (dialect, stop) = (host.plain.clone(), request.options.stop.clone());
    let splitter = move || Splitter::new(&dialect, false, false, stop.clone());
    let job =
        Job { host, prompts, options: request.options, splitter: Box::new(splitter), key, access, _running: running };
    answer(app, job, form).await
}

/// Encodes the prompts, and makes the constraints of their answers.
fn prepare(host: &Host, request: &CompletionRequest) -> Result<Vec<Prompt>, ApiError> {
    let (options, count) = (&request.options, request.prompts.len());
    if count.saturating_mul(options.n as usize) > MAX_CHOICES {
        let found = format!("{count} prompts with {} choices each: at most {MAX_CHOICES} answers in all", options.n);
        return Err(ApiError::bad_request("prompt", found));
    }
    let prompt = |prompt: &api::Prompt| {
        let tokens = match (prompt, &request.suffix) {
            (api::Prompt::Text(text), Some(suffix)) => host.dialect.fim_prompt(&host.text, text, suffix)?,
            (api::Prompt::Tokens(ids), Some(suffix)) => {
                host.dialect.fim_prompt(&host.text, &host.text.decode(ids, true), suffix)?
            }
            (api::Prompt::Text(text), None) => {
                let encoded = host.text.encode(text, true);
                encoded.map_err(|error| ApiError::bad_request("prompt", error.to_string()))?
            }
            (api::Prompt::Tokens(ids), None) => ids.clone(),
        };
        if tokens.is_empty() {
            let why = "the prompt has no tokens; this model needs one at least to continue";
            return Err(ApiError::bad_request("prompt", why));
        }
        if let Some(id) = tokens.iter().find(|&&id| id >= host.model.vocab_size) {
            let found = format!("token {id}: the model's tokens are 0 to {}", host.model.vocab_size - 1);
            return Err(ApiError::bad_request("prompt", found));
        }
        let most = host.answer_tokens(tokens.len(), options.max_tokens, "prompt")?;
        let max_new_tokens = if options.max_tokens.is_some() { most } else { most.min(DEFAULT_TOKENS) };
        let constraint = |_| {
            let constraint = host.grammars.constraint(&request.format);
            constraint.map_err(|error| ApiError::bad_request("response_format", error.to_string()))
        };
        let constraints = (0..options.n).map(constraint).collect::<Result<_, _>>()?;
        Ok(Prompt { tokens, max_new_tokens, constraints })
    };
    request.prompts.iter().map(prompt).collect()
}

/// The answer to a completion request.
struct Texts {
    id: String,
    created: u64,
    model: String,
    experts: Shape,
    logprobs: bool,
    choices: Vec<Whole>,
}

/// A choice as it comes together.
struct Whole {
    text: String,
    /// What it begins with, until that was sent.
    echo: String,
    logprobs: LegacyLogprobs,
    /// Characters of the tokens so far.
    offset: usize,
    experts: Vec<u16>,
    prompt_experts: Vec<u16>,
    finish: Option<FinishReason>,
}

impl Texts {
    fn new(host: &Host, request: &CompletionRequest, prompts: &[Prompt]) -> Self {
        let echo = |number: usize| {
            let prompt = number / request.options.n as usize;
            match &request.prompts[prompt] {
                _ if !request.echo => String::new(),
                api::Prompt::Text(text) => text.clone(),
                api::Prompt::Tokens(_) => host.text.decode(&prompts[prompt].tokens, false),
            }
        };
        let choice = |number| {
            let echo = echo(number);
            Whole {
                text: String::new(),
                offset: echo.chars().count(),
                echo,
                logprobs: LegacyLogprobs::default(),
                experts: Vec::new(),
                prompt_experts: Vec::new(),
                finish: None,
            }
        };
        Self {
            id: format!("cmpl-{}", Uuid::new_v4().simple()),
            created: host::now(),
            model: host.name.clone(),
            experts: Shape::of(host),
            logprobs: request.options.logprobs.is_some(),
            choices: (0..prompts.len() * request.options.n as usize).map(choice).collect(),
        }
    }

    /// Text and log probabilities of a part.
    fn read(&mut self, number: usize, part: &Part) -> (String, LegacyLogprobs) {
        let choice = &mut self.choices[number];
        let mut text = std::mem::take(&mut choice.echo);
        for delta in &part.deltas {
            if let Delta::Content(more) = delta {
                text += more;
            }
        }
        let mut logprobs = LegacyLogprobs::default();
        for token in &part.content {
            let top = token.top_logprobs.iter().map(|top| (top.token.clone(), top.logprob));
            logprobs.push(token.token.clone(), token.logprob, Likeliest::new(top), choice.offset);
            choice.offset += token.token.chars().count();
        }
        (text, logprobs)
    }

    fn answer(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> String {
        json(&Completion::new(self.id.clone(), self.created, self.model.clone(), choices, usage))
    }
}

impl Form for Texts {
    fn begin(&mut self, number: usize) -> Option<String> {
        let echo = std::mem::take(&mut self.choices[number].echo);
        let choice = CompletionChoice::new(number as u32, echo);
        (!choice.text.is_empty()).then(|| self.answer(vec![choice], None))
    }

    fn events(&mut self, number: usize, part: Part, finish: Option<FinishReason>) -> Vec<String> {
        let (text, logprobs) = self.read(number, &part);
        let mut choice = CompletionChoice::new(number as u32, text);
        choice.logprobs = (self.logprobs && !logprobs.tokens.is_empty()).then_some(logprobs);
        choice.finish_reason = finish;
        choice.routed_experts = self.experts.told(part.experts);
        choice.prompt_routed_experts = self.experts.told(part.prompt_experts);
        vec![self.answer(vec![choice], None)]
    }

    fn usage(&mut self, usage: Usage) -> String {
        self.answer(Vec::new(), Some(usage))
    }

    fn keep(&mut self, number: usize, part: Part, finish: Option<FinishReason>) {
        let (text, logprobs) = self.read(number, &part);
        let choice = &mut self.choices[number];
        choice.text += &text;
        choice.logprobs.tokens.extend(logprobs.tokens);
        choice.logprobs.token_logprobs.extend(logprobs.token_logprobs);
        choice.logprobs.top_logprobs.extend(logprobs.top_logprobs);
        choice.logprobs.text_offset.extend(logprobs.text_offset);
        choice.experts.extend(part.experts);
        choice.prompt_experts.extend(part.prompt_experts);
        choice.finish = finish;
    }

    fn whole(mut self, usage: Usage) -> String {
        let (shape, with_logprobs) = (self.experts, self.logprobs);
        let choices = std::mem::take(&mut self.choices).into_iter().zip(0..).map(|(whole, index)| {
            let mut choice = CompletionChoice::new(index, whole.text);
            choice.logprobs = with_logprobs.then_some(whole.logprobs);
            choice.finish_reason = whole.finish;
            choice.routed_experts = shape.told(whole.experts);
            choice.prompt_routed_experts = shape.told(whole.prompt_experts);
            choice
        });
        let choices = choices.collect();
        self.answer(choices, Some(usage))
    }
}
