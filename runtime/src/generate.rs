//! Generating text of one sequence, token by token for the caller, in bursts for the device.

use std::ops::ControlFlow;
use std::time::Instant;

use moewe_plan::Sampling;

use crate::{MAX_BURST, Result, SequenceId, Session};

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Tokens that end the text besides the model's own.
    pub stop_tokens: Vec<u32>,
    /// Go on past the model's own end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Most tokens of the prompt in one run; as many as possible without it.
    pub chunk: Option<usize>,
    /// Most tokens between two reads from the device. Bursts begin with 1 and double, so that text starts at once.
    pub burst: u32,
}

impl Default for GenerateOptions {
    /// 128 tokens, greedy.
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: Sampling::default(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            chunk: None,
            burst: 8,
        }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A token that ends the text was drawn.
    Eos,
    /// As many tokens as asked for.
    Length,
    /// The context or the latent cache is full.
    Context,
    /// The caller said so.
    Stopped,
}

impl StopReason {
    /// The word for JSON.
    pub fn name(self) -> &'static str {
        match self {
            StopReason::Eos => "eos",
            StopReason::Length => "length",
            StopReason::Context => "context",
            StopReason::Stopped => "stopped",
        }
    }
}

/// Wall-clock times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// Tokens of the prompt that were run.
    pub prompt_tokens: usize,
    /// Seconds until the first new token.
    pub prefill_seconds: f64,
    /// Tokens drawn after the first, dropped ones included.
    pub decode_tokens: usize,
    /// Seconds for them.
    pub decode_seconds: f64,
}

impl Timing {
    /// Tokens a second of the prompt; 0 if nothing ran.
    pub fn prefill_rate(&self) -> f64 {
        if self.prefill_seconds > 0.0 { self.prompt_tokens as f64 / self.prefill_seconds } else { 0.0 }
    }

    /// Tokens a second after the first; 0 if there was none.
    pub fn decode_rate(&self) -> f64 {
        if self.decode_seconds > 0.0 { self.decode_tokens as f64 / self.decode_seconds } else { 0.0 }
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The new tokens, with the one that ended the text, if one did.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// How long it took.
    pub timing: Timing,
}

/// Generates from a prompt in a sequence of its own, which is removed afterwards. `on_token` is called for each new
/// token; it ends generation by breaking.
pub fn generate(
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    let sequence = session.add_sequence(prompt, options.sampling)?;
    let generated = continue_sequence(session, sequence, options, on_token);
    session.remove_sequence(sequence)?;
    generated
}

/// Runs what a sequence holds and generates behind it. Afterwards the sequence holds exactly the tokens that `on_token`
/// saw, so that a conversation goes on with [`Session::append`] and another call.
pub fn continue_sequence(
    session: &mut Session,
    sequence: SequenceId,
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    session.set_sampling(sequence, options.sampling)?;
    let eos = session.model().plan().model.eos_token_ids.clone();
    let ends = |token: u32| options.stop_tokens.contains(&token) || (!options.ignore_eos && eos.contains(&token));
    let before = session.tokens(sequence)?.len();
    let mut timing = Timing::default();
    let mut tokens: Vec<u32> = Vec::new();
    let mut burst = 1;
    let stop_reason = 'generation: loop {
        if tokens.len() >= options.max_new_tokens {
            break StopReason::Length;
        }
        // What a prompt needs is an error if it is not there; what comes after it ends the text.
        session.ensure(sequence, session.tokens(sequence)?.len())?;
        let room = session.room(sequence)?;
        if room == 0 {
            break StopReason::Context;
        }
        let started = Instant::now();
        let drawn = if tokens.is_empty() {
            timing.prompt_tokens = before - session.cached(sequence)?;
            let drawn = session.prefill(&[sequence], options.chunk)?;
            timing.prefill_seconds = started.elapsed().as_secs_f64();
            drawn
        } else {
            let most = (options.max_new_tokens - tokens.len()).min(room);
            let steps = burst.min(most.try_into().unwrap_or(u32::MAX));
            burst = (burst * 2).clamp(1, options.burst.clamp(1, MAX_BURST));
            let drawn = session.decode(&[sequence], steps)?;
            timing.decode_seconds += started.elapsed().as_secs_f64();
            timing.decode_tokens += drawn.len();
            drawn.into_iter().flatten().collect()
        };
        for token in drawn {
            tokens.push(token);
            let flow = on_token(token);
            if ends(token) {
                break 'generation StopReason::Eos;
            }
            if flow.is_break() {
                break 'generation StopReason::Stopped;
            }
        }
    };
    session.rewind(sequence, before + tokens.len())?;
    Ok(Generated { tokens, stop_reason, timing })
}
