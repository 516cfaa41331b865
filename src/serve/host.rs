//! A loaded model with everything that requests need of it.

use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use moewe_plan::{ModelInfo, Sampling};
use moewe_runtime::Error;
use moewe_runtime::engine::{Constraint, Engine, Request};
use moewe_viewer::subject::Subject;

use super::watch::Gallery;
use crate::api::{ApiError, ModelCard, ModelShape, Options};
use crate::chat::Dialect;
use crate::grammar::{GrammarError, Grammars};
use crate::text::{GenerationDefaults, Text};

/// What a model is made of.
pub struct Parts {
    /// What runs it.
    pub engine: Engine,
    /// What the plan says of it.
    pub model: ModelInfo,
    /// Its texts.
    pub text: Text,
    /// What its publisher recommends.
    pub defaults: GenerationDefaults,
    /// The most texts that run at once.
    pub max_running: usize,
    /// What viewers must know, if taps may be watched.
    pub subject: Option<Subject>,
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Its vocabulary cannot be used.
    #[error(transparent)]
    Vocabulary(#[from] GrammarError),
    /// No recording can describe it.
    #[error("the model cannot be watched: {0}; serve it without --allow-watch")]
    Subject(String),
}

/// A loaded model with everything that requests need of it.
#[derive(Debug)]
pub struct Host {
    /// The name that requests ask for.
    pub name: String,
    /// What runs it.
    pub engine: Engine,
    /// What the plan says of it.
    pub model: ModelInfo,
    /// Its texts.
    pub text: Arc<Text>,
    /// What chats look like.
    pub dialect: Dialect,
    /// What texts without any form look like.
    pub plain: Dialect,
    /// Makes constraints.
    pub grammars: Grammars,
    /// The most texts that run at once.
    pub max_running: usize,
    /// What viewers are shown, if taps may be watched.
    pub gallery: Option<Arc<Gallery>>,
    /// Tokens that end a text beside those of the plan.
    stop_tokens: Vec<u32>,
    recommended: Sampling,
    /// Most tokens of a text that nobody limited.
    max_new_tokens: Option<u32>,
    /// When it was loaded, in seconds since 1970.
    created: u64,
    /// Why nothing will ever run again.
    lost: OnceLock<String>,
}

impl Host {
    /// Puts a model together.
    ///
    /// # Errors
    /// Its vocabulary cannot be used, or no viewer could be told what it is.
    pub fn new(name: String, parts: Parts) -> Result<Self, HostError> {
        let Parts { engine, model, text, defaults, max_running, subject } = parts;
        let gallery = subject.map(Gallery::new).transpose().map_err(HostError::Subject)?.map(Arc::new);
        let text = Arc::new(text);
        let stop_tokens = text.eos_ids();
        let mut eos: Vec<u32> = model.eos_token_ids.iter().chain(&stop_tokens).copied().collect();
        eos.sort_unstable();
        eos.dedup();
        let grammars = Grammars::new(&text, model.vocab_size, &eos)?;
        let dialect = Dialect::of(&text);
        let mut plain = dialect.clone();
        (plain.reasoning, plain.tools) = (None, None);
        let (recommended, max_new_tokens) = (defaults.sampling(), defaults.max_new_tokens);
        let (created, lost) = (now(), OnceLock::new());
        Ok(Self {
            name,
            engine,
            model,
            text,
            dialect,
            plain,
            grammars,
            max_running,
            gallery,
            stop_tokens,
            recommended,
            max_new_tokens,
            created,
            lost,
        })
    }

    /// Tokens of prompt and answer together.
    pub fn max_context(&self) -> usize {
        self.model.max_context as usize
    }

    /// 404 unless the model asked for is this one, or none is asked for.
    pub fn check_name(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(asked) if asked != self.name => Err(ApiError::model_not_found(asked, &self.name)),
            _ => Ok(()),
        }
    }

    /// What the list of models says of it.
    pub fn card(&self) -> ModelCard {
        let shape = ModelShape {
            experts: self.model.experts,
            moe_layers: self.model.moe_layers.len() as u32,
            experts_per_token: self.model.num_experts_per_tok,
        };
        ModelCard::new(&self.name, self.created, u64::from(self.model.max_context), shape)
    }

    /// Whether a token ends a text.
    pub fn ends(&self, token: u32) -> bool {
        self.model.eos_token_ids.contains(&token) || self.stop_tokens.contains(&token)
    }

    /// 400 if the options name tokens that there are not.
    pub fn check_options(&self, options: &Options) -> Result<(), ApiError> {
        let wrong = options.logit_bias.iter().find(|(id, _)| *id >= self.model.vocab_size);
        match wrong {
            Some((id, _)) => {
                let found = format!("token {id}: the model's tokens are 0 to {}", self.model.vocab_size - 1);
                Err(ApiError::bad_request("logit_bias", found))
            }
            None => Ok(()),
        }
    }

    /// Most tokens of the answer to a prompt of so many tokens; `param` is the field that has the prompt.
    pub fn answer_tokens(&self, prompt: usize, asked: Option<u32>, param: &str) -> Result<usize, ApiError> {
        let limit = self.max_context();
        let left = limit.saturating_sub(prompt);
        let asked = asked.map_or(0, |asked| asked as usize);
        if left == 0 || asked > left {
            return Err(ApiError::context_length_exceeded(param, limit, prompt, asked));
        }
        Ok(match (asked, self.max_new_tokens) {
            (0, Some(most)) => left.min(most as usize),
            (0, None) => left,
            _ => asked,
        })
    }

    /// What the engine is asked for choice number `choice` of a prompt whose answer may have so many tokens. The seed is the
    /// first choice's.
    pub fn request(
        &self,
        prompt: Vec<u32>,
        max_new_tokens: usize,
        options: &Options,
        (seed, choice): (u64, u32),
        constraint: Option<Box<dyn Constraint>>,
    ) -> Request {
        let usual = &self.recommended;
        let seed = seed.wrapping_add(u64::from(choice));
        let sampling = Sampling {
            temperature: options.temperature.unwrap_or(usual.temperature),
            top_p: options.top_p.unwrap_or(usual.top_p),
            min_p: options.min_p.unwrap_or(usual.min_p),
            repetition_penalty: options.repetition_penalty.unwrap_or(usual.repetition_penalty),
            top_k: options.top_k.unwrap_or(usual.top_k),
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            ..*usual
        };
        Request {
            prompt,
            max_new_tokens,
            sampling,
            stop_tokens: self.stop_tokens.clone(),
            ignore_eos: false,
            priority: options.priority,
            logit_bias: options.logit_bias.clone(),
            presence_penalty: options.presence_penalty,
            frequency_penalty: options.frequency_penalty,
            constraint,
            logprobs: options.logprobs,
            experts: options.routed_experts,
        }
    }

    /// Why nothing will ever run again, if that is so.
    pub fn lost(&self) -> Option<String> {
        self.lost.get().cloned()
    }

    /// What a client is told of an error of the engine's.
    pub fn told(&self, error: &Error) -> ApiError {
        match error {
            Error::TooManyWaiting { .. } | Error::QueueFull { .. } => {
                ApiError::too_many_requests(error.to_string(), RETRY_FULL)
            }
            Error::ContextExceeded { tokens, max_context } => {
                ApiError::context_length_exceeded("prompt", *max_context, *tokens, 0)
            }
            Error::TokenOutOfVocabulary { .. } | Error::EmptyPrompt => {
                ApiError::bad_request("prompt", error.to_string())
            }
            Error::Request { .. } | Error::Sampling { .. } => ApiError::bad_request("options", error.to_string()),
            Error::OutOfPages { .. } => ApiError::bad_request("prompt", error.to_string()),
            Error::NotPrepared { .. } | Error::NoTap { .. } => {
                ApiError::unsupported("routed_experts", error.to_string())
            }
            Error::DeviceLost { .. } | Error::EngineStopped | Error::Interrupted => {
                let why = error.to_string();
                if !matches!(error, Error::Interrupted) {
                    let _ = self.lost.set(why.clone()); // the first one counts
                }
                ApiError::unavailable(why, RETRY_LOST)
            }
            _ => ApiError::server(error.to_string()),
        }
    }
}

/// Seconds after which there may be a place again,
const RETRY_FULL: u32 = 1;
/// and another server in this one's place.
const RETRY_LOST: u32 = 30;

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
