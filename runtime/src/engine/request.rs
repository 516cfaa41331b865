//! What is asked of an engine, and what comes back.

use std::collections::HashSet;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use moewe_plan::{LOGPROB_TOP, ModelInfo, Sampling};

use super::constraint::Constraint;
use super::{Command, Commands};
use crate::{Error, Result, StopReason};

/// A prompt to continue.
#[derive(Debug)]
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// Tokens that end the text beside those of the plan.
    pub stop_tokens: Vec<u32>,
    /// Whether to go on past the plan's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Requests of a higher priority run first; 0 is usual.
    pub priority: i32,
    /// Numbers added to the logits of tokens: each token once, all finite.
    pub logit_bias: Vec<(u32, f32)>,
    /// Subtracted from the logit of each token that was generated before. The prompt does not count.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit as often as it was generated before. The prompt does not count.
    pub frequency_penalty: f32,
    /// What says which tokens may come next. The request then draws one token in a pass and has no drafts; so it is with
    /// the two penalties above.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Tells the log probability of each token that is drawn, and the tokens that were likeliest in its place: so many, at
    /// most [`LOGPROB_TOP`].
    pub logprobs: Option<u32>,
    /// Tells which experts each token chose. Such a request takes nothing from the prefix cache, and nobody drafts while it
    /// runs.
    pub experts: bool,
}

impl Request {
    /// A copy without the constraint, which cannot be copied.
    #[must_use]
    pub fn unconstrained(&self) -> Self {
        Self {
            prompt: self.prompt.clone(),
            sampling: self.sampling,
            stop_tokens: self.stop_tokens.clone(),
            logit_bias: self.logit_bias.clone(),
            constraint: None,
            ..*self
        }
    }

    /// Whether a model can be asked this.
    pub(super) fn check(&self, model: &ModelInfo) -> Result<()> {
        crate::sequences::check_tokens(&self.prompt, 0, model.vocab_size, model.max_context as usize)?;
        crate::sequences::check_sampling(&self.sampling)?;
        let penalties = [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)];
        for (field, found) in penalties {
            if !found.is_finite() {
                return Err(Error::Sampling { field, found, expected: "a finite number" });
            }
        }
        let wrong = |what: String| Err(Error::Request { what });
        let mut biased = HashSet::new();
        for &(token, bias) in &self.logit_bias {
            if token >= model.vocab_size {
                return wrong(format!("logit_bias for token {token} of a vocabulary of {}", model.vocab_size));
            }
            if !bias.is_finite() {
                return wrong(format!("a logit_bias of {bias} for token {token}, finite numbers are possible"));
            }
            if !biased.insert(token) {
                return wrong(format!("logit_bias twice for token {token}"));
            }
        }
        match self.logprobs {
            Some(count) if count > LOGPROB_TOP => {
                wrong(format!("{count} tokens with their log probabilities, at most {LOGPROB_TOP} are possible"))
            }
            _ => Ok(()),
        }
    }
}

impl Default for Request {
    /// An empty prompt, which is refused; 128 tokens, greedy, nothing else.
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            max_new_tokens: 128,
            sampling: Sampling::default(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            priority: 0,
            logit_bias: Vec::new(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            constraint: None,
            logprobs: None,
            experts: false,
        }
    }
}

/// How a request went.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them whose latents were there already when it began: nothing was computed for them.
    pub cached_tokens: usize,
    /// Generated tokens, with the one that ended the text, if one did.
    pub new_tokens: usize,
    /// For each position behind a token, how many drafts were verified there and how many of them accepted.
    pub acceptance: Vec<(u64, u64)>,
    /// How often its pages were taken for other requests, so that it was computed again.
    pub preemptions: u32,
    /// From submission until it first ran.
    pub waited: Duration,
    /// From then on until its first token.
    pub prefill: Duration,
    /// From then on until its end.
    pub decode: Duration,
}

impl Finished {
    /// Tokens a second behind the first one; 0 if there was none.
    pub fn decode_rate(&self) -> f64 {
        let seconds = self.decode.as_secs_f64();
        if seconds > 0.0 { self.new_tokens.saturating_sub(1) as f64 / seconds } else { 0.0 }
    }

    /// Tokens a second of the prompt, as far as they were computed; 0 if none was.
    pub fn prefill_rate(&self) -> f64 {
        let (tokens, seconds) = (self.prompt_tokens - self.cached_tokens, self.prefill.as_secs_f64());
        if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
    }
}

/// What a request tells.
#[derive(Clone, Debug)]
pub enum Event {
    /// The request runs for the first time. Told once, before its first tokens; not at all if it ends without running.
    Began {
        /// Tokens of the prompt whose latents are there already: nothing is computed for them.
        cached_tokens: usize,
    },
    /// Tokens, in order; at least one.
    Tokens(Tokens),
    /// The request is done. Nothing follows.
    Finished(Box<Finished>),
    /// The request failed. Nothing follows.
    Failed(Arc<Error>),
}

/// Tokens that were drawn, the one that ends a text included.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// The tokens.
    pub ids: Vec<u32>,
    /// One for each token, if [`Request::logprobs`] asks for them.
    pub logprobs: Vec<Logprobs>,
    /// `[ids, moe_layers, num_experts_per_tok]`, if [`Request::experts`] asks for them: what the token before each one chose
    /// when it was run and the one told of was drawn. Empty if the model has no experts.
    pub experts: Vec<u16>,
    /// `[prompt, moe_layers, num_experts_per_tok]`, with the first tokens: what each token of the prompt chose.
    pub prompt_experts: Vec<u16>,
}

/// Log probabilities where a token was drawn: natural logarithms of the softmax of the model's logits, before bias, penalties,
/// constraint and temperature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// Of the token that was drawn.
    pub logprob: f32,
    /// The likeliest tokens, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Where the events of a request go: called on the engine's thread, `false` ends the request.
pub(super) struct Sink(Box<dyn FnMut(Event) -> bool + Send>);

impl Sink {
    pub(super) fn new(sink: impl FnMut(Event) -> bool + Send + 'static) -> Self {
        Self(Box::new(sink))
    }

    /// Hands an event over. `false` if nobody listens any more, or who did has panicked.
    pub(super) fn tell(&mut self, event: Event) -> bool {
        super::guarded(|| (self.0)(event)).unwrap_or(false)
    }
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sink")
    }
}

/// The events of one request. Dropping it cancels the request.
#[derive(Debug)]
pub struct Stream {
    pub(super) id: u64,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) commands: Commands,
    /// Whether the last event has come.
    pub(super) ended: bool,
}

impl Stream {
    /// A number that no other request of its engine has, for [`super::Engine::cancel`].
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Waits for the next event; `None` behind the last one.
    pub fn recv(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        // An engine that ends tells every request before it lets go of it.
        let event = self.events.recv().unwrap_or_else(|_| Event::Failed(Arc::new(Error::EngineStopped)));
        Some(self.note(event))
    }

    /// The next event, if there is one by then.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Option<Event> {
        if self.ended {
            return None;
        }
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(self.note(event)),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => Some(self.note(Event::Failed(Arc::new(Error::EngineStopped)))),
        }
    }

    /// Waits for the end. Returns all tokens that had not been taken yet.
    pub fn finish(mut self) -> std::result::Result<(Vec<u32>, Finished), Arc<Error>> {
        let mut tokens = Vec::new();
        loop {
            match self.recv() {
                Some(Event::Began { .. }) => {}
                Some(Event::Tokens(more)) => tokens.extend(more.ids),
                Some(Event::Finished(finished)) => return Ok((tokens, *finished)),
                Some(Event::Failed(error)) => return Err(error),
                None => return Err(Arc::new(Error::EngineStopped)),
            }
        }
    }

    fn note(&mut self, event: Event) -> Event {
        self.ended = matches!(event, Event::Finished(_) | Event::Failed(_));
        event
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ended {
            self.commands.send(Command::Cancel(self.id));
        }
    }
}
