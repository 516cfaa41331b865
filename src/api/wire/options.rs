//! How to generate: the fields that chats and completions have in common.

use std::ops::Bound;

use serde::Deserialize;
use utoipa::ToSchema;

use super::types::{Bias, Integer, Number, Object, Texts};
use super::{integer, number, wrong};
use crate::api::{ApiError, Options};

/// Most texts that end an answer, and the most bytes of each.
const MAX_STOP: usize = 16;
const MAX_STOP_BYTES: usize = 256;
/// Most answers to a prompt.
const MAX_N: u32 = 16;
/// Temperatures below this are 0: the logits divided by them would leave the range of their type.
const COLDEST: f32 = 1e-5;

/// How to generate. What is absent or null is left to the model's own defaults.
#[derive(Debug, Deserialize, ToSchema)]
pub struct OptionsBody {
    /// The model's name.
    pub(super) model: Option<String>,
    /// Most tokens to generate.
    #[schema(value_type = Option<u32>, minimum = 1)]
    max_tokens: Option<Integer>,
    /// The newer name of `max_tokens`; it counts where both are given.
    #[schema(value_type = Option<u32>, minimum = 1)]
    max_completion_tokens: Option<Integer>,
    /// The logits are divided by it; 0 takes the likeliest token always.
    #[schema(value_type = Option<f64>, minimum = 0, maximum = 2)]
    temperature: Option<Number>,
    /// The smallest set of likeliest tokens whose probability reaches this is drawn from.
    #[schema(value_type = Option<f64>, exclusive_minimum = 0, maximum = 1)]
    top_p: Option<Number>,
    /// Tokens less likely than this times the likeliest are not drawn.
    #[schema(value_type = Option<f64>, minimum = 0, maximum = 1)]
    min_p: Option<Number>,
    /// So many of the likeliest tokens are drawn from; 0 or -1: all.
    #[schema(value_type = Option<i64>, minimum = -1)]
    top_k: Option<Integer>,
    /// Above 1 makes tokens that came before, in the prompt or the answer, less likely.
    #[schema(value_type = Option<f64>, exclusive_minimum = 0, maximum = 2)]
    repetition_penalty: Option<Number>,
    /// Taken from the logits of tokens that the answer has.
    #[schema(value_type = Option<f64>, minimum = -2, maximum = 2)]
    presence_penalty: Option<Number>,
    /// Taken from the logits of tokens that the answer has, as many times as it has them.
    #[schema(value_type = Option<f64>, minimum = -2, maximum = 2)]
    frequency_penalty: Option<Number>,
    /// The random numbers' seed: any integer of 64 bits.
    #[schema(value_type = Option<i64>)]
    seed: Option<Integer>,
    /// Texts that end the answer, which does not contain them: one or a list of at most 16, of at most 256 bytes each.
    #[schema(value_type = Option<StopSchema>)]
    stop: Option<Texts<MAX_STOP>>,
    /// Answers to each prompt.
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 16)]
    n: Option<Integer>,
    /// As many as `n`: this server does not choose among answers.
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 16)]
    best_of: Option<Integer>,
    /// What is added to tokens' logits, -100 to 100, by token id: at most 1024.
    #[schema(value_type = Option<std::collections::BTreeMap<String, f64>>)]
    logit_bias: Option<Bias>,
    /// Whether the answer is sent piece by piece, as server-sent events.
    stream: Option<bool>,
    /// What a stream tells beside the answer.
    #[schema(value_type = Option<StreamOptions>)]
    stream_options: Option<Object<StreamOptions>>,
    /// Whether to tell which experts each token chose, as `routed_experts` of the choices.
    routed_experts: Option<bool>,
    /// Requests with lower numbers run first.
    #[schema(value_type = Option<i32>)]
    priority: Option<Integer>,
    /// The client's name for the person it acts for.
    user: Option<String>,
}

/// What a stream tells beside the answer.
#[derive(Debug, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// Whether a last chunk without choices tells the usage.
    include_usage: Option<bool>,
}

/// One text or several.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "a description of what `Texts` reads")]
pub enum StopSchema {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

impl OptionsBody {
    /// Checks everything; log probabilities are the caller's, as they are asked for in two ways.
    pub(super) fn options(self, logprobs: Option<u32>) -> Result<Options, ApiError> {
        let above = |low, high| (Bound::Excluded(low), Bound::Included(high));
        let max_tokens = integer("max_tokens", self.max_tokens, 1..=u32::MAX)?;
        let max_completion_tokens = integer("max_completion_tokens", self.max_completion_tokens, 1..=u32::MAX)?;
        let temperature = number("temperature", self.temperature, 0.0..=2.0)?;
        let n = integer("n", self.n, 1..=MAX_N)?.unwrap_or(1);
        match self.best_of {
            Some(Integer(best_of)) if best_of != n.into() => {
                let message = format!(
                    "`best_of`: found {best_of} with `n` {n}, expected the same: this server does not choose among \
                     answers"
                );
                return Err(ApiError::unsupported("best_of", message));
            }
            _ => {}
        }
        let top_k = integer("top_k", self.top_k, -1..=i64::from(u32::MAX))?;
        let seed = integer("seed", self.seed, i128::from(i64::MIN)..=u64::MAX.into())?;
        let priority = integer("priority", self.priority, i32::MIN..=i32::MAX)?;
        Ok(Options {
            max_tokens: max_completion_tokens.or(max_tokens),
            temperature: temperature.map(|value| if value < COLDEST { 0.0 } else { value }),
            top_p: number("top_p", self.top_p, above(0.0, 1.0))?,
            min_p: number("min_p", self.min_p, 0.0..=1.0)?,
            repetition_penalty: number("repetition_penalty", self.repetition_penalty, above(0.0, 2.0))?,
            top_k: top_k.map(|top_k| top_k.max(0) as u32),
            presence_penalty: number("presence_penalty", self.presence_penalty, -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?.unwrap_or(0.0),
            seed: seed.map(|seed| seed as u64),
            stop: stop(self.stop)?,
            n,
            logit_bias: self.logit_bias.map(|Bias(bias)| bias).unwrap_or_default(),
            logprobs,
            stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.and_then(|Object(options)| options.include_usage).unwrap_or(false),
            routed_experts: self.routed_experts.unwrap_or(false),
            priority: priority.unwrap_or(0).saturating_neg(),
            user: self.user,
        })
    }
}

/// The texts that end an answer.
fn stop(texts: Option<Texts<MAX_STOP>>) -> Result<Vec<String>, ApiError> {
    let texts = texts.map(|Texts(texts)| texts).unwrap_or_default();
    match texts.iter().enumerate().find(|(_, text)| text.is_empty() || text.len() > MAX_STOP_BYTES) {
        Some((i, text)) => {
            let found = if text.is_empty() { "an empty text".to_owned() } else { format!("{} bytes", text.len()) };
            Err(wrong(format!("stop[{i}]"), found, format!("a text of 1 to {MAX_STOP_BYTES} bytes")))
        }
        None => Ok(texts),
    }
}
