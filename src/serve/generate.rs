//! Answering: from prompts to choices, metered, piece by piece or whole.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use moewe_runtime::StopReason;
use moewe_runtime::engine::{Constraint, Event};

use super::access::Access;
use super::answer::{Answer, Part};
use super::app::{self, App, Running};
use super::choices::Choices;
use super::host::Host;
use super::metrics::{self, RequestTimes};
use super::sse::{self, Events};
use crate::api::{ApiError, FinishReason, Options, Usage};
use crate::chat::Splitter;
use crate::ledger::{Key, LedgerError, Meter};

/// A prompt to be answered.
#[derive(Debug)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// For each answer, what says which tokens may come.
    pub constraints: Vec<Option<Box<dyn Constraint>>>,
}

/// What is to be done for a request.
pub struct Job {
    /// The model.
    pub host: Arc<Host>,
    /// The prompts. Choice `i` of prompt `p` has the number `p * n + i`.
    pub prompts: Vec<Prompt>,
    /// How to answer them.
    pub options: Options,
    /// Makes what takes a choice's text to pieces.
    pub splitter: Box<dyn Fn() -> Splitter + Send>,
    /// Who asks.
    pub key: Key,
    /// The line of the log.
    pub access: Arc<Access>,
    /// It is worked on.
    pub _running: Running,
}

/// How an answer is written.
pub trait Form: Send + Sync + 'static {
    /// An event that a choice begins with.
    fn begin(&mut self, number: usize) -> Option<String>;
    /// Events for more of a choice.
    fn events(&mut self, number: usize, part: Part, finish: Option<FinishReason>) -> Vec<String>;
    /// The event that tells the usage.
    fn usage(&mut self, usage: Usage) -> String;
    /// Keeps more of a choice for the whole answer.
    fn keep(&mut self, number: usize, part: Part, finish: Option<FinishReason>);
    /// The whole answer.
    fn whole(self, usage: Usage) -> String;
}

/// Where an answer goes.
enum Output<'a, F> {
    Events(&'a Events, F),
    Whole(F),
}

impl<F: Form> Output<'_, F> {
    async fn begin(&mut self, number: usize) -> Result<(), Ended> {
        if let Self::Events(events, form) = self
            && let Some(event) = form.begin(number)
        {
            events.send(&event).await?;
        }
        Ok(())
    }

    async fn part(&mut self, number: usize, part: Part, finish: Option<FinishReason>) -> Result<(), Ended> {
        match self {
            Self::Whole(form) => form.keep(number, part, finish),
            Self::Events(events, form) => {
                for event in form.events(number, part, finish) {
                    events.send(&event).await?;
                }
            }
        }
        Ok(())
    }

    /// Returns once the client has gone. Where the answer is sent whole, whoever waits for it is dropped instead.
    async fn gone(&self) {
        match self {
            Self::Events(events, _) => events.closed().await,
            Self::Whole(_) => std::future::pending().await,
        }
    }
}

/// Why an answer ended early.
#[derive(Debug)]
enum Ended {
    Gone,
    Failed(ApiError),
    Unrecorded(LedgerError),
}

impl Ended {
    /// What the client is told, if it is there.
    fn told(self) -> Option<ApiError> {
        match self {
            Self::Gone => None,
            Self::Failed(error) => Some(error),
            Self::Unrecorded(error) => Some(ApiError::unavailable(error.to_string(), RETRY_LEDGER)),
        }
    }
}

impl From<sse::Gone> for Ended {
    fn from(_: sse::Gone) -> Self {
        Self::Gone
    }
}

impl From<ApiError> for Ended {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

impl From<LedgerError> for Ended {
    fn from(error: LedgerError) -> Self {
        Self::Unrecorded(error)
    }
}

/// Seconds after which the usage file may be writable again.
const RETRY_LEDGER: u32 = 10;

/// Does a job.
pub async fn answer<F: Form>(app: Arc<App>, job: Job, form: F) -> Result<Response, ApiError> {
    app.policy.ledger.check_budget(&job.key).map_err(|spent| ApiError::insufficient_balance(spent.to_string()))?;
    if !job.options.stream {
        let mut output = Output::Whole(form);
        let result = Generation::new(&app, job)?.run(&mut output).await;
        return match (result, output) {
            (Ok(usage), Output::Whole(form)) => {
                Ok(([(header::CONTENT_TYPE, "application/json")], form.whole(usage)).into_response())
            }
            (Err(ended), _) => Err(ended.told().unwrap_or_else(app::ending)),
            (Ok(_), Output::Events(..)) => Err(app::ending()),
        };
    }
    let include_usage = job.options.include_usage;
    let generation = Generation::new(&app, job)?;
    let (events, response) = sse::channel(app.limits.stall, app.limits.keep_alive);
    tokio::spawn(async move {
        let stream = stream(generation, &events, form, include_usage);
        let ended = std::panic::AssertUnwindSafe(stream).catch_unwind().await;
        let error = match ended {
            Ok(Ok(())) => None,
            Ok(Err(ended)) => ended.told(),
            Err(_) => Some(app::panicked()),
        };
        if let Some(error) = error {
            let _ = events.send(&error.to_json().to_string()).await; // it may have gone meanwhile
        }
    });
    Ok(response)
}

async fn stream<F: Form>(generation: Generation, events: &Events, form: F, include_usage: bool) -> Result<(), Ended> {
    let mut output = Output::Events(events, form);
    let usage = generation.run(&mut output).await?;
    if include_usage && let Output::Events(_, form) = &mut output {
        events.send(&form.usage(usage)).await?;
    }
    Ok(events.send("[DONE]").await?)
}

/// A choice that is to be handed in.
#[derive(Debug)]
struct Waiting {
    number: usize,
    prompt: usize,
    /// Which of the prompt's choices.
    choice: u32,
}

/// An answer on its way.
struct Generation {
    app: Arc<App>,
    job: Job,
    choices: Choices,
    meter: Meter,
    seed: u64,
    /// Tokens of each prompt.
    lengths: Vec<u64>,
    /// Whether each prompt's first choice has tokens.
    known: Vec<bool>,
    waiting: VecDeque<Waiting>,
    /// For figures, by number: times and generated tokens of what was handed in and is not done.
    times: Vec<Option<(RequestTimes, u64)>>,
    /// Whether what is not done has failed, as against its client having gone.
    failed: bool,
    /// Tokens of the prompts that have begun: all, and those of them that were cached.
    prompt_tokens: u64,
    cached_tokens: u64,
}

impl Generation {
    /// Hands in the first choices: each prompt's first one. The others follow when it has its first tokens, since the prompt
    /// is in the prefix cache then.
    fn new(app: &Arc<App>, job: Job) -> Result<Self, ApiError> {
        let meter = app.policy.ledger.begin(job.key.name(), &job.host.name, &app.policy.prices.unwrap_or_default());
        let random = || u64::from_le_bytes(*uuid::Uuid::new_v4().as_bytes().first_chunk().expect("16 bytes"));
        let n = job.options.n;
        let first = |prompt| Waiting { number: prompt * n as usize, prompt, choice: 0 };
        let mut generation = Self {
            app: Arc::clone(app),
            choices: Choices::new(Arc::clone(&job.host)),
            meter,
            seed: job.options.seed.unwrap_or_else(random),
            lengths: job.prompts.iter().map(|prompt| prompt.tokens.len() as u64).collect(),
            known: vec![false; job.prompts.len()],
            waiting: (0..job.prompts.len()).map(first).collect(),
            times: vec![None; job.prompts.len() * n as usize],
            failed: false,
            prompt_tokens: 0,
            cached_tokens: 0,
            job,
        };
        generation.submit()?;
        Ok(generation)
    }

    /// Hands in what waits, as far as one client may take all places.
    fn submit(&mut self) -> Result<(), ApiError> {
        let Self { job, choices, waiting, times, .. } = self;
        while choices.running() < job.host.max_running
            && let Some(Waiting { number, prompt, choice }) = waiting.pop_front()
        {
            let last = choice + 1 == job.options.n;
            let prompt = &mut job.prompts[prompt];
            let tokens = if last { std::mem::take(&mut prompt.tokens) } else { prompt.tokens.clone() };
            let constraint = prompt.constraints.get_mut(choice as usize).and_then(Option::take);
            let how = (self.seed, choice);
            let request = job.host.request(tokens, prompt.max_new_tokens, &job.options, how, constraint);
            choices.submit(number, request)?;
            times[number] = Some((RequestTimes::new(Instant::now()), 0));
        }
        Ok(())
    }

    /// Answers until the end, and tells the usage.
    async fn run<F: Form>(mut self, output: &mut Output<'_, F>) -> Result<Usage, Ended> {
        let result = self.follow(output).await;
        let reason = match &result {
            Ok((reason, _)) => reason.name(),
            Err(Ended::Gone) => "cancelled",
            Err(_) => "error",
        };
        let (_, usage) = match result {
            Ok(told) => told,
            Err(ended) => {
                self.failed = !matches!(ended, Ended::Gone);
                if let (Ended::Unrecorded(_), Some(metrics)) = (&ended, self.app.metrics()) {
                    metrics.add_ledger_failure();
                }
                let _ = self.meter.finish(reason).await; // the first error is the one to tell
                return Err(ended);
            }
        };
        let cost = self.meter.finish(reason).await?;
        self.job.access.used(&usage);
        Ok(match self.app.policy.prices {
            Some(_) => {
                if let Some(metrics) = self.app.metrics() {
                    metrics.add_cost(self.job.key.name(), cost.amount);
                }
                usage.with_cost(cost.amount.to_string().parse().unwrap_or_default())
            }
            None => usage,
        })
    }

    /// Takes what the engine tells until all choices are done. Gives why the last of them ended, and the usage.
    async fn follow<F: Form>(&mut self, output: &mut Output<'_, F>) -> Result<(FinishReason, Usage), Ended> {
        let host = Arc::clone(&self.job.host);
        let n = self.job.options.n as usize;
        let mut answers: Vec<Answer<'_>> = Vec::new();
        answers.resize_with(self.job.prompts.len() * n, || Answer::new(&host, (self.job.splitter)()));
        let mut last = FinishReason::Stop;
        loop {
            let next = tokio::select! {
                biased;
                () = output.gone() => return Err(Ended::Gone),
                () = self.app.cancelled().cancelled() => return Err(app::ending().into()),
                next = self.choices.next() => next,
            };
            let Some((number, event)) = next else { break };
            let answer = &mut answers[number];
            let mut ended = None;
            match event {
                Event::Began { cached_tokens } => {
                    self.began(number, cached_tokens as u64).await?;
                    output.begin(number).await?;
                }
                Event::Tokens(tokens) => {
                    self.others_of(number);
                    let count = answer.push(tokens);
                    self.meter.tokens(count).await?;
                    self.drew(number, count);
                    if answer.stopped() {
                        self.choices.cancel(number);
                        ended = Some(FinishReason::Stop);
                    } else if let Some(part) = answer.part() {
                        output.part(number, part, None).await?;
                    }
                }
                Event::Finished(finished) => {
                    self.others_of(number);
                    ended = Some(match finished.stop_reason {
                        StopReason::Eos => FinishReason::Stop,
                        StopReason::Length | StopReason::Context => FinishReason::Length,
                        StopReason::Stopped => return Err(app::ending().into()),
                    });
                }
                Event::Failed(error) => return Err(host.told(&error).into()),
            }
            if let Some(reason) = ended {
                let part = answer.finish();
                last = if answer.called && reason == FinishReason::Stop { FinishReason::ToolCalls } else { reason };
                self.observe(
                    number,
                    if last == FinishReason::Length { metrics::Ended::Length } else { metrics::Ended::Stop },
                );
                output.part(number, part, Some(last)).await?;
            }
            self.submit()?;
        }
        let sum = |of: fn(&Answer<'_>) -> u64| answers.iter().map(of).sum();
        let (tokens, reasoning) = (sum(|answer| answer.tokens), sum(|answer| answer.reasoning_tokens));
        Ok((last, Usage::new(self.prompt_tokens, self.cached_tokens, tokens, reasoning)))
    }

    /// The prompt of a first choice is known now: its other choices may follow.
    fn others_of(&mut self, number: usize) {
        let n = self.job.options.n as usize;
        let (prompt, choice) = (number / n, number % n);
        if choice == 0 && !std::mem::replace(&mut self.known[prompt], true) {
            let others = (1..n).map(|choice| Waiting { number: number + choice, prompt, choice: choice as u32 });
            self.waiting.extend(others);
        }
    }

    /// Tokens of a choice have come.
    fn drew(&mut self, number: usize, count: u64) {
        if let (Some((times, tokens)), Some(metrics)) = (&mut self.times[number], self.app.metrics()) {
            metrics.observe_tokens(times, Instant::now());
            *tokens += count;
        }
    }

    /// A choice is done.
    fn observe(&mut self, number: usize, ended: metrics::Ended) {
        let prompt = self.lengths[number / self.job.options.n as usize];
        if let (Some((times, tokens)), Some(metrics)) = (self.times[number].take(), self.app.metrics()) {
            metrics.observe_request(&times, Instant::now(), ended, prompt, tokens);
        }
    }

    /// A choice begins. Its prompt is paid for once.
    async fn began(&mut self, number: usize, cached: u64) -> Result<(), Ended> {
        if let Some((times, _)) = &mut self.times[number] {
            times.began = Some(Instant::now());
        }
        let n = self.job.options.n as usize;
        if number.is_multiple_of(n) {
            let prompt = self.lengths[number / n];
            let cached = cached.min(prompt);
            self.meter.prompt(cached, prompt - cached).await?;
            self.prompt_tokens += prompt;
            self.cached_tokens += cached;
        }
        Ok(())
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for number in 0..self.times.len() {
            self.observe(number, if self.failed { metrics::Ended::Error } else { metrics::Ended::Abort });
        }
    }
}
