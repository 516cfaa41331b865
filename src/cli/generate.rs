//! Prompts, sampling and streaming: what `run` and `chat` share.

use std::ops::ControlFlow;

use moewe::text::{GenerationDefaults, Text};
use moewe_plan::Sampling;
use moewe_runtime::{GenerateOptions, Generated, Timing};
use serde_json::json;

use super::args::{ModelArgs, SamplingArgs};
use super::model::Opened;
use super::{interrupt, output, usage};

/// Tokens that are generated where neither the user nor the model says how many.
const DEFAULT_NEW_TOKENS: u32 = 256;

/// The options of generation: what the user said, else what the model recommends, else greedy.
pub fn options(args: &SamplingArgs, model: &ModelArgs, opened: &Opened) -> anyhow::Result<GenerateOptions> {
    let defaults = &opened.defaults;
    // A checkpoint that recommends no sampling is run greedily, whatever else its file says.
    let recommended = if defaults.do_sample == Some(true) { defaults.clone() } else { GenerationDefaults::default() };
    let temperature = recommended.temperature.or(recommended.do_sample.map(|_| 1.0));
    let sampling = Sampling {
        temperature: args.temperature.or(temperature).unwrap_or(0.0),
        top_p: args.top_p.or(recommended.top_p).unwrap_or(1.0),
        min_p: args.min_p.or(recommended.min_p).unwrap_or(0.0),
        repetition_penalty: args.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        top_k: args.top_k.or(recommended.top_k).unwrap_or(0),
        seed_low: args.seed as u32,
        seed_high: (args.seed >> 32) as u32,
        reserved: 0,
    };
    let checks = [
        ("--temperature", sampling.temperature, sampling.temperature >= 0.0, "0 or more"),
        ("--top-p", sampling.top_p, sampling.top_p > 0.0 && sampling.top_p <= 1.0, "above 0 and at most 1"),
        ("--min-p", sampling.min_p, (0.0..=1.0).contains(&sampling.min_p), "between 0 and 1"),
        ("--repetition-penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0.0, "above 0"),
    ];
    for (flag, value, sound, expected) in checks {
        if !sound || !value.is_finite() {
            return usage(format!("{flag} is {value}, expected {expected}"));
        }
    }
    Ok(GenerateOptions {
        max_new_tokens: args.max_new_tokens.or(defaults.max_new_tokens).unwrap_or(DEFAULT_NEW_TOKENS) as usize,
        sampling,
        // Besides those that config.json names, which the plan has.
        stop_tokens: match &opened.text {
            _ if args.ignore_eos => Vec::new(),
            Some(text) => text.eos_ids(),
            None => defaults.eos_token_ids.clone().unwrap_or_default(),
        },
        ignore_eos: args.ignore_eos,
        chunk: model.prefill_chunk.map(|chunk| chunk as usize),
        ..GenerateOptions::default()
    })
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

/// The generated part of the JSON that `run` prints.
pub fn as_json(prompt: &[u32], generated: &Generated, text: Option<&str>, load_seconds: f64) -> serde_json::Value {
    let Timing { prompt_tokens, prefill_seconds, decode_tokens, decode_seconds } = generated.timing;
    json!({
        "prompt_tokens": prompt,
        "tokens": generated.tokens,
        "text": text,
        "stop_reason": if interrupt::is_set() { "interrupted" } else { generated.stop_reason.name() },
        "timing": {
            "load_seconds": load_seconds,
            "prefill_tokens": prompt_tokens,
            "prefill_seconds": prefill_seconds,
            "prefill_tokens_per_second": generated.timing.prefill_rate(),
            "decode_tokens": decode_tokens,
            "decode_seconds": decode_seconds,
            "decode_tokens_per_second": generated.timing.decode_rate(),
        },
    })
}

/// A line about how long it took.
pub fn summary(generated: &Generated) -> String {
    let timing = &generated.timing;
    format!(
        "[{} + {} tokens, stop: {}; prefill {:.1} tokens/s, decode {:.1} tokens/s]",
        timing.prompt_tokens,
        generated.tokens.len(),
        if interrupt::is_set() { "interrupted" } else { generated.stop_reason.name() },
        timing.prefill_rate(),
        timing.decode_rate()
    )
}
