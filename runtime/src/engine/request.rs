//! What is asked of an engine, and what comes back.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use moewe_plan::Sampling;

use super::{Command, Commands};
use crate::{Error, StopReason};

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
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
}

impl Default for Request {
    /// An empty prompt, which is refused; 128 tokens, greedy.
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            max_new_tokens: 128,
            sampling: Sampling::default(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            priority: 0,
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

/// What a request's stream tells.
#[derive(Clone, Debug)]
pub enum Event {
    /// Tokens, in order.
    Tokens(Vec<u32>),
    /// The request is done. Nothing follows.
    Finished(Box<Finished>),
    /// The request failed. Nothing follows.
    Failed(Arc<Error>),
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
    pub fn finish(mut self) -> Result<(Vec<u32>, Finished), Arc<Error>> {
        let mut tokens = Vec::new();
        loop {
            match self.recv() {
                Some(Event::Tokens(more)) => tokens.extend(more),
                Some(Event::Finished(finished)) => return Ok((tokens, *finished)),
                Some(Event::Failed(error)) => return Err(error),
                None => return Err(Arc::new(Error::EngineStopped)),
            }
        }
    }

    fn note(&mut self, event: Event) -> Event {
        self.ended = !matches!(event, Event::Tokens(_));
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
