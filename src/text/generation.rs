//! The sampling defaults of `generation_config.json`.

use std::path::Path;

use moewe_plan::Sampling;
use serde_json::Value;

use super::TextError;
use super::source::JsonFile;

/// `generation_config.json` is some hundred bytes.
const LIMIT: u64 = 1 << 20;

/// What a model's publisher recommends for sampling. A field is `None` where the file does not say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Whether to sample at all; `Some(false)` means greedy, whatever the other fields say.
    pub do_sample: Option<bool>,
    /// Divides the logits; at least 0, where 0 means greedy.
    pub temperature: Option<f32>,
    /// Keep only the likeliest tokens; 0 keeps all.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens up to this probability, in (0, 1].
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the likeliest, in [0, 1].
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens that have occurred; above 0, 1 does nothing.
    pub repetition_penalty: Option<f32>,
    /// The ids that end a text; never empty.
    pub eos_token_ids: Option<Vec<u32>>,
    /// The id that begins a text.
    pub bos_token_id: Option<u32>,
    /// The most tokens to generate; at least 1.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// How tokens are drawn where nobody says otherwise. A model that recommends no sampling is run greedily, whatever else
    /// its file says.
    pub fn sampling(&self) -> Sampling {
        let nothing = Self::default();
        let recommended = if self.do_sample == Some(true) { self } else { &nothing };
        let temperature = recommended.temperature.or(recommended.do_sample.map(|_| 1.0));
        Sampling {
            temperature: temperature.unwrap_or(0.0),
            top_p: recommended.top_p.unwrap_or(1.0),
            min_p: recommended.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            top_k: recommended.top_k.unwrap_or(0),
            ..Sampling::default()
        }
    }

    /// Reads `generation_config.json` of a model directory; all fields are `None` if there is no such file.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let Some(json) = JsonFile::load(&dir.join("generation_config.json"), LIMIT)? else {
            return Ok(Self::default());
        };
        let number = |field: &str, expected: &'static str, holds: fn(f32) -> bool| {
            json.parse(field, expected, |v| v.as_f64().map(|x| x as f32).filter(|&x| holds(x)))
        };
        Ok(Self {
            do_sample: json.parse("do_sample", "true or false", Value::as_bool)?,
            temperature: number("temperature", "a number of at least 0", |x| (0.0..f32::INFINITY).contains(&x))?,
            top_k: json.parse("top_k", "a whole number of at least 0", as_u32)?,
            top_p: number("top_p", "a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?,
            min_p: number("min_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: number("repetition_penalty", "a number above 0", |x| x > 0.0 && x.is_finite())?,
            eos_token_ids: json.parse("eos_token_id", "a token id or a list of token ids", eos_ids)?,
            bos_token_id: json.parse("bos_token_id", "a token id", as_u32)?,
            max_new_tokens: json
                .parse("max_new_tokens", "a whole number of at least 1", |v| as_u32(v).filter(|&n| n > 0))?,
        })
    }
}

fn as_u32(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok())
}

/// One id or a list of ids, without repetitions.
fn eos_ids(value: &Value) -> Option<Vec<u32>> {
    let Value::Array(values) = value else { return as_u32(value).map(|id| vec![id]) };
    let mut ids = values.iter().map(as_u32).collect::<Option<Vec<_>>>()?;
    ids.sort_unstable();
    ids.dedup();
    (!ids.is_empty()).then_some(ids)
}
