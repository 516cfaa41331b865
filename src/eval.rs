//! How well a model predicts a text, and how far the predictions of two models are apart: windows of tokens, the logits of
//! a session's trace program, and mathematics over them. Logits are f32, everything computed from them is f64.

use std::ops::Range;

use moewe_plan::{ProgramKind, Sampling};
use moewe_runtime::{Batch, SequenceId, Session, Words};

/// Why something could not be evaluated.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    /// There is nothing to predict.
    #[error("{tokens} tokens, expected 2 or more: the first one is not predicted")]
    TooShort {
        /// Tokens there are.
        tokens: usize,
    },
    /// A window has no room for a prediction.
    #[error("a context of {context} tokens, expected 2 or more: the first one is not predicted")]
    Context {
        /// Tokens of a window.
        context: usize,
    },
    /// Windows would stand still or leave tokens out.
    #[error("a stride of {stride} tokens, expected 1 to the context's {context}")]
    Stride {
        /// Tokens from one window to the next.
        stride: usize,
        /// Tokens of a window.
        context: usize,
    },
    /// A logit is no number.
    #[error("the logit of token {token} is {value}, expected a finite number")]
    Logit {
        /// The token that it stands for.
        token: usize,
        /// Its value.
        value: f32,
    },
    /// Rows of different vocabularies, or of none.
    #[error("{found} logits, expected {expected}")]
    Vocabulary {
        /// Logits there are.
        found: usize,
        /// Logits there should be.
        expected: usize,
    },
}

/// Tokens that a model sees together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its tokens, as indices into the text.
    pub tokens: Range<usize>,
    /// The first of them whose prediction counts; the later ones count as well.
    pub first_predicted: usize,
}

/// Windows of `context` tokens that begin `stride` tokens apart, the last one ending with the text.
///
/// The first window predicts all of its tokens but the first. Of a later one only those count that no window before it
/// held: its last `stride`. Where windows do not overlap, their first tokens are predicted by nobody.
///
/// # Errors
/// [`Error::TooShort`], [`Error::Context`] and [`Error::Stride`].
pub fn windows(tokens: usize, context: usize, stride: usize) -> Result<Vec<Window>, Error> {
    if tokens < 2 {
        return Err(Error::TooShort { tokens });
    }
    if context < 2 {
        return Err(Error::Context { context });
    }
    if stride == 0 || stride > context {
        return Err(Error::Stride { stride, context });
    }
    let mut windows: Vec<Window> = Vec::new();
    let mut begin = 0_usize;
    loop {
        let end = begin.saturating_add(context).min(tokens);
        let seen = windows.last().map_or(0, |window| window.tokens.end);
        let first_predicted = seen.max(begin + 1);
        // A token alone in the last window predicts nothing.
        if first_predicted < end {
            windows.push(Window { tokens: begin..end, first_predicted });
        }
        if end == tokens {
            return Ok(windows);
        }
        begin += stride;
    }
}

impl Window {
    /// The window in pieces of at most `chunk` tokens to run, in order. Its last token predicts nothing that is in it, so
    /// it is not run.
    pub fn parts(&self, chunk: usize) -> Vec<Part> {
        let end = self.tokens.end - 1;
        let starts = self.tokens.clone().take(end - self.tokens.start).step_by(chunk.max(1));
        let part = |start: usize| {
            let tokens = start..(start + chunk.max(1)).min(end);
            let first_row = (self.first_predicted - 1).clamp(tokens.start, tokens.end);
            Part { window: self.tokens.clone(), rows: first_row..tokens.end, tokens }
        };
        starts.map(part).collect()
    }
}

/// Tokens that are run at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The tokens of its window.
    pub window: Range<usize>,
    /// The tokens to run.
    pub tokens: Range<usize>,
    /// Those of them whose logits are wanted: each predicts the token behind it.
    pub rows: Range<usize>,
}

/// A session that gives logits.
pub struct Scorer {
    session: Session,
    sequence: Option<SequenceId>,
}

impl Scorer {
    /// Takes a session that was made for [`ProgramKind::Trace`] and has room for one more sequence.
    pub fn new(session: Session) -> Self {
        Self { session, sequence: None }
    }

    /// Most tokens of a part.
    ///
    /// # Errors
    /// If the session was not made for [`ProgramKind::Trace`].
    pub fn capacity(&self) -> Result<usize, moewe_runtime::Error> {
        let (tokens, rows) = self.session.capacity(ProgramKind::Trace)?;
        Ok(tokens.min(rows))
    }

    /// Runs a part and returns the logits of its rows, `[rows, vocab_size]`. The parts of a window must be run in order.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn run(&mut self, tokens: &[u32], part: &Part) -> Result<Vec<f32>, moewe_runtime::Error> {
        let sequence = match self.sequence {
            Some(sequence) if part.tokens.start > part.window.start => sequence,
            before => {
                if let Some(before) = before {
                    self.sequence = None;
                    self.session.remove_sequence(before)?;
                }
                let window = &tokens[part.window.clone()];
                *self.sequence.insert(self.session.add_sequence(window, Sampling::default())?)
            }
        };
        let position = (part.tokens.start - part.window.start) as u32;
        let mut batch = Batch::of(sequence, &tokens[part.tokens.clone()], position);
        batch.rows = part.rows.clone().map(|row| (row - part.tokens.start) as u32).collect();
        self.session.run(ProgramKind::Trace, &batch)?;
        if part.rows.is_empty() {
            return Ok(Vec::new());
        }
        match self.session.read_tap(ProgramKind::Trace, "logits")?.data {
            Words::F32(logits) => Ok(logits),
            Words::U32(_) => Err(moewe_runtime::Error::Plan { what: "its tap logits holds no floats".into() }),
        }
    }
}

/// A row of logits as log probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Distribution<'a> {
    logits: &'a [f32],
    /// ln Σ exp(logit).
    log_sum: f64,
    top: usize,
}

impl<'a> Distribution<'a> {
    /// Normalises a row.
    ///
    /// # Errors
    /// [`Error::Logit`] if one is not finite, [`Error::Vocabulary`] if there is none.
    pub fn new(logits: &'a [f32]) -> Result<Self, Error> {
        if logits.is_empty() {
            return Err(Error::Vocabulary { found: 0, expected: 1 });
        }
        if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(Error::Logit { token, value: logits[token] });
        }
        // The first of the largest, as the sampler has it.
        let top = logits.iter().enumerate().fold(0, |top, (i, logit)| if *logit > logits[top] { i } else { top });
        let largest = f64::from(logits[top]);
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
        Ok(Self { logits, log_sum: largest + sum.ln(), top })
    }

    /// ln p(token); −∞ for a token outside of the vocabulary.
    pub fn log_probability(&self, token: usize) -> f64 {
        self.logits.get(token).map_or(f64::NEG_INFINITY, |&logit| f64::from(logit) - self.log_sum)
    }

    /// The likeliest token, the first one of several.
    pub fn top(&self) -> usize {
        self.top
    }

    /// The Kullback–Leibler divergence KL(self ‖ other) = Σ p · (ln p − ln q), in nats: what is lost by taking `other` for
    /// this distribution. Exactly 0 for equal rows, never below.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] if the rows differ in length.
    pub fn divergence(&self, other: &Distribution<'_>) -> Result<f64, Error> {
        if self.logits.len() != other.logits.len() {
            return Err(Error::Vocabulary { found: other.logits.len(), expected: self.logits.len() });
        }
        let terms = self.logits.iter().zip(other.logits).map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - self.log_sum, f64::from(q) - other.log_sum);
            p.exp() * (p - q)
        });
        Ok(terms.sum::<f64>().max(0.0)) // rounding can leave a sum of nearly nothing below 0
    }
}

/// Numbers that were measured, one for each predicted token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Adds one.
    pub fn push(&mut self, number: f64) {
        self.0.push(number);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their mean; NaN of none.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// Standard error of the mean, for independent numbers; NaN of fewer than two.
    pub fn standard_error(&self) -> f64 {
        let (mean, count) = (self.mean(), self.0.len() as f64);
        let squares: f64 = self.0.iter().map(|number| (number - mean).powi(2)).sum();
        if count < 2.0 { f64::NAN } else { (squares / (count - 1.0) / count).sqrt() }
    }

    /// The number that this share of them do not exceed, between neighbours in proportion; NaN of none. 0.5 is the median,
    /// 1 the maximum.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        let at = share.clamp(0.0, 1.0) * last as f64;
        let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
        if below < above { below + (above - below) * at.fract() } else { below }
    }
}

/// How well tokens were predicted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// −ln p of each predicted token, in nats.
    pub nats: Sample,
    /// How many of them were the likeliest token.
    pub hits: usize,
}

impl Likelihood {
    /// Adds a prediction and the token that came.
    pub fn add(&mut self, predicted: &Distribution<'_>, token: u32) {
        self.nats.push(-predicted.log_probability(token as usize));
        self.hits += usize::from(predicted.top() == token as usize);
    }

    /// exp of the mean of nats.
    pub fn perplexity(&self) -> f64 {
        self.nats.mean().exp()
    }

    /// Share of the tokens that were the likeliest.
    pub fn accuracy(&self) -> f64 {
        self.hits as f64 / self.nats.len() as f64
    }
}

/// How far the predictions of a model are from those of a reference.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// KL(reference ‖ model) for each predicted token, in nats.
    pub divergence: Sample,
    /// |Δp| of the reference's likeliest token.
    pub shift: Sample,
    /// How often both have the same likeliest token.
    pub agreed: usize,
    /// How well the model predicts.
    pub model: Likelihood,
    /// How well the reference predicts.
    pub reference: Likelihood,
}

impl Comparison {
    /// Adds both predictions and the token that came.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] if they differ in length.
    pub fn add(&mut self, reference: &Distribution<'_>, model: &Distribution<'_>, token: u32) -> Result<(), Error> {
        self.divergence.push(reference.divergence(model)?);
        let top = reference.top();
        self.shift.push((reference.log_probability(top).exp() - model.log_probability(top).exp()).abs());
        self.agreed += usize::from(top == model.top());
        self.model.add(model, token);
        self.reference.add(reference, token);
        Ok(())
    }

    /// Share of the predictions with the same likeliest token.
    pub fn agreement(&self) -> f64 {
        self.agreed as f64 / self.divergence.len() as f64
    }
}
