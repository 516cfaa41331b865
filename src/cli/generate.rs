//! Sampling, streaming, and how a generation went: what `run` and `chat` share.

use std::ops::ControlFlow;

use moewe::text::Text;
use moewe_plan::Sampling;
use moewe_runtime::engine::{Finished, Mtp};
use moewe_runtime::{GenerateOptions, Generated, StopReason};
use serde_json::{Value, json};

use super::args::{ModelArgs, SamplingArgs};
use super::model::Opened;
use super::{interrupt, output, usage};

/// Tokens that are generated where neither the user nor the model says how many.
const DEFAULT_NEW_TOKENS: u32 = 256;

/// The options of generation: what the user said, else what the model recommends, else greedy.
pub fn options(args: &SamplingArgs, model: &ModelArgs, opened: &Opened) -> anyhow::Result<GenerateOptions> {
    let defaults = &opened.defaults;
    let recommended = defaults.sampling();
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(recommended.temperature),
        top_p: args.top_p.unwrap_or(recommended.top_p),
        min_p: args.min_p.unwrap_or(recommended.min_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(recommended.repetition_penalty),
        top_k: args.top_k.unwrap_or(recommended.top_k),
        seed_low: args.seed as u32,
        seed_high: (args.seed >> 32) as u32,
        ..recommended
    };
    if let Some((field, value, expected)) = wrong(&sampling) {
        return usage(format!("--{} is {value}, expected {expected}", field.replace('_', "-")));
    }
    Ok(GenerateOptions {
        max_new_tokens: args.max_new_tokens.or(defaults.max_new_tokens).unwrap_or(DEFAULT_NEW_TOKENS) as usize,
        sampling,
        stop_tokens: if args.ignore_eos { Vec::new() } else { eos(opened) },
        ignore_eos: args.ignore_eos,
        chunk: model.prefill_chunk.map(|chunk| chunk as usize),
        ..GenerateOptions::default()
    })
}

/// What ends a text besides the tokens that config.json names, which the plan has.
pub fn eos(opened: &Opened) -> Vec<u32> {
    match &opened.text {
        Some(text) => text.eos_ids(),
        None => opened.defaults.eos_token_ids.clone().unwrap_or_default(),
    }
}

/// The first field out of range, if there is one: its name, its value, and what was expected.
pub fn wrong(sampling: &Sampling) -> Option<(&'static str, f32, &'static str)> {
    let checks = [
        ("temperature", sampling.temperature, sampling.temperature >= 0.0, "0 or more"),
        ("top_p", sampling.top_p, sampling.top_p > 0.0 && sampling.top_p <= 1.0, "above 0 and at most 1"),
        ("min_p", sampling.min_p, (0.0..=1.0).contains(&sampling.min_p), "between 0 and 1"),
        ("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0.0, "above 0"),
    ];
    let found = checks.into_iter().find(|(_, value, sound, _)| !sound || !value.is_finite());
    found.map(|(field, value, _, expected)| (field, value, expected))
}

/// Takes tokens one by one and writes their text as soon as it is complete; ids where there is no tokenizer.
pub struct Printer<'a> {
    stream: Option<moewe::text::TokenStream<'a>>,
    quiet: bool,
    text: String,
    failed: Option<std::io::Error>,
}

impl<'a> Printer<'a> {
    /// A printer; a quiet one only collects the text.
    pub fn new(text: Option<&'a Text>, quiet: bool) -> Self {
        Self { stream: text.map(|text| text.stream(true)), quiet, text: String::new(), failed: None }
    }

    fn write(&mut self, piece: &str) {
        self.text += piece;
        if !self.quiet && self.failed.is_none() {
            self.failed = output::write(piece).err();
        }
    }

    /// Takes a token. Breaks on Ctrl-C or if nobody reads any more.
    pub fn push(&mut self, token: u32) -> ControlFlow<()> {
        let piece = match &mut self.stream {
            Some(stream) => stream.push(token),
            None => format!("{token} "),
        };
        self.write(&piece);
        if interrupt::is_set() || self.failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Writes what is left and returns the whole text.
    pub fn finish(mut self) -> anyhow::Result<String> {
        if let Some(stream) = self.stream.take() {
            let rest = stream.finish();
            self.write(&rest);
        }
        match self.failed {
            Some(error) => Err(error.into()),
            None => Ok(self.text),
        }
    }
}

/// How a generation went.
pub struct Outcome {
    /// The new tokens, with the one that ended the text, if one did.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them for which nothing had to be computed.
    pub cached_tokens: usize,
    /// For each position behind a token, how many drafts were verified there and how many of them accepted.
    pub acceptance: Vec<(u64, u64)>,
    /// Seconds until it was its turn,
    waited_seconds: f64,
    /// from then on until its first token,
    prefill_seconds: f64,
    /// and from then on until its end.
    decode_seconds: f64,
    /// Tokens drawn in that time.
    decode_tokens: usize,
}

impl Outcome {
    /// Of a request to an engine.
    pub fn of_request(tokens: Vec<u32>, finished: Finished) -> Self {
        Self {
            stop_reason: finished.stop_reason,
            prompt_tokens: finished.prompt_tokens,
            cached_tokens: finished.cached_tokens,
            waited_seconds: finished.waited.as_secs_f64(),
            prefill_seconds: finished.prefill.as_secs_f64(),
            decode_seconds: finished.decode.as_secs_f64(),
            decode_tokens: tokens.len().saturating_sub(1),
            acceptance: finished.acceptance,
            tokens,
        }
    }

    /// Of a session alone, behind a prompt of so many tokens.
    pub fn of_session(prompt_tokens: usize, generated: Generated) -> Self {
        let timing = generated.timing;
        Self {
            tokens: generated.tokens,
            stop_reason: generated.stop_reason,
            prompt_tokens,
            cached_tokens: prompt_tokens.saturating_sub(timing.prompt_tokens),
            acceptance: Vec::new(),
            waited_seconds: 0.0,
            prefill_seconds: timing.prefill_seconds,
            decode_seconds: timing.decode_seconds,
            decode_tokens: timing.decode_tokens,
        }
    }

    /// Tokens of the prompt that were run.
    pub fn computed_tokens(&self) -> usize {
        self.prompt_tokens.saturating_sub(self.cached_tokens)
    }

    /// The word for JSON.
    pub fn stop_reason(&self) -> &'static str {
        if interrupt::is_set() { "interrupted" } else { self.stop_reason.name() }
    }

    fn prefill_rate(&self) -> f64 {
        rate(self.computed_tokens(), self.prefill_seconds)
    }

    fn decode_rate(&self) -> f64 {
        rate(self.decode_tokens, self.decode_seconds)
    }

    /// Times for JSON.
    pub fn timing(&self) -> Value {
        json!({
            "waited_seconds": self.waited_seconds,
            "prefill_tokens": self.computed_tokens(),
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": self.prefill_rate(),
            "decode_tokens": self.decode_tokens,
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": self.decode_rate(),
        })
    }

    /// A line about how long it took.
    pub fn summary(&self) -> String {
        let cached = if self.cached_tokens > 0 { format!(" ({} cached)", self.cached_tokens) } else { String::new() };
        let (drafted, accepted) = sum(&self.acceptance);
        let drafts = if drafted > 0 {
            format!(", {:.0} % of {drafted} drafts accepted", 100.0 * accepted as f64 / drafted as f64)
        } else {
            String::new()
        };
        format!(
            "[{}{cached} + {} tokens, stop: {}; prefill {:.1} tokens/s, decode {:.1} tokens/s{drafts}]",
            self.prompt_tokens,
            self.tokens.len(),
            self.stop_reason(),
            self.prefill_rate(),
            self.decode_rate()
        )
    }
}

/// A number in each second; 0 if there was no time.
fn rate(number: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { number as f64 / seconds } else { 0.0 }
}

fn sum(acceptance: &[(u64, u64)]) -> (u64, u64) {
    acceptance.iter().fold((0, 0), |sum, &(drafted, accepted)| (sum.0 + drafted, sum.1 + accepted))
}

/// The generated part of the JSON that `run` prints. `mtp` says how it was drafted, if the model could.
pub fn as_json(prompt: &[u32], outcome: &Outcome, text: Option<&str>, load_seconds: f64, mtp: Option<Mtp>) -> Value {
    let mut timing = json!({ "load_seconds": load_seconds });
    if let (Some(timing), Value::Object(more)) = (timing.as_object_mut(), outcome.timing()) {
        timing.extend(more);
    }
    json!({
        "prompt_tokens": prompt,
        "tokens": outcome.tokens,
        "text": text,
        "stop_reason": outcome.stop_reason(),
        "cached_tokens": outcome.cached_tokens,
        "computed_tokens": outcome.computed_tokens(),
        "mtp": mtp.map(|mtp| mtp_json(mtp, &outcome.acceptance)),
        "timing": timing,
    })
}

/// How drafting went.
pub fn mtp_json(mtp: Mtp, acceptance: &[(u64, u64)]) -> Value {
    let (drafted, accepted) = sum(acceptance);
    let used = acceptance.iter().rposition(|&(drafted, _)| drafted > 0).map_or(0, |last| last + 1);
    let positions = acceptance[..used].iter().map(|&(drafted, accepted)| {
        let rate = (drafted > 0).then(|| accepted as f64 / drafted as f64);
        json!({ "drafted": drafted, "accepted": accepted, "rate": rate })
    });
    json!({
        "mode": match mtp {
            Mtp::Auto => json!("auto"),
            Mtp::Off => json!("off"),
            Mtp::Fixed(drafts) => json!(drafts),
        },
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": positions.collect::<Vec<_>>(),
    })
}
