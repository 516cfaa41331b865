//! What the answers add up to.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::client::{Answer, Done};
use crate::cli::args::LoadArgs;
use crate::cli::output;

/// Shares of requests whose times are told.
const PERCENTILES: [f64; 4] = [50.0, 90.0, 99.0, 100.0];
/// Different errors that are told.
const ERRORS: usize = 5;

/// Times, told in microseconds.
struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        Self(Histogram::new(3).expect("three digits are possible"))
    }
}

impl Times {
    fn add(&mut self, time: Duration) {
        // A histogram without a limit takes every number but those that need more memory than there is.
        let _ = self.0.record(time.as_micros().try_into().unwrap_or(u64::MAX / 2));
    }

    fn milliseconds(&self, percentile: f64) -> f64 {
        self.0.value_at_percentile(percentile) as f64 / 1000.0
    }

    fn json(&self) -> Value {
        let percentiles = PERCENTILES.map(|p| (format!("p{p}"), json!(self.milliseconds(p))));
        let mut object: serde_json::Map<String, Value> = percentiles.into_iter().collect();
        object.insert("mean".into(), json!(self.0.mean() / 1000.0));
        object.into()
    }
}

/// All figures.
#[derive(Default)]
pub struct Figures {
    pub seconds: f64,
    pub sent: u64,
    answered: u64,
    refused: u64,
    failed: u64,
    differing: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    new_tokens: u64,
    errors: BTreeMap<String, u64>,
    first: Times,
    between: Times,
    per_token: Times,
    whole: Times,
}

impl Figures {
    /// Takes in an answer; `alone` is what the same request was answered when it was alone.
    pub fn take(&mut self, answer: Answer, alone: Option<&String>) {
        match answer {
            Answer::Done(done) => {
                self.differing += u64::from(alone.is_some_and(|text| *text != done.text));
                self.done(&done);
            }
            Answer::Refused { .. } => self.refused += 1,
            Answer::Failed(what) => {
                self.failed += 1;
                if self.errors.len() < ERRORS || self.errors.contains_key(&what) {
                    *self.errors.entry(what).or_default() += 1;
                }
            }
        }
    }

    fn done(&mut self, done: &Done) {
        self.answered += 1;
        self.prompt_tokens += done.prompt_tokens;
        self.cached_tokens += done.cached_tokens;
        self.new_tokens += done.new_tokens;
        done.first.into_iter().for_each(|time| self.first.add(time));
        done.between.iter().for_each(|&time| self.between.add(time));
        if done.new_tokens > 1 {
            self.per_token.add(done.streaming / (done.new_tokens - 1) as u32);
        }
        self.whole.add(done.whole);
    }

    /// Why this run counts as failed, if it does.
    pub fn failure(&self) -> Option<String> {
        let errors: Vec<String> = self.errors.iter().map(|(error, count)| format!("{error} ({count} times)")).collect();
        if self.failed > 0 {
            return Some(format!("{} of {} requests failed: {}", self.failed, self.sent, errors.join("; ")));
        }
        (self.differing > 0).then(|| format!("{} of {} answers differ from those alone", self.differing, self.answered))
    }

    fn rate(&self, count: u64) -> f64 {
        if self.seconds > 0.0 { count as f64 / self.seconds } else { 0.0 }
    }

    /// For scripts. Times in milliseconds.
    pub fn json(&self, args: &LoadArgs) -> Value {
        json!({
            "url": args.url,
            "rate": args.rate,
            "clients": args.clients,
            "seconds": self.seconds,
            "requests": {
                "sent": self.sent,
                "answered": self.answered,
                "refused": self.refused,
                "failed": self.failed,
                "differing": args.verify.then_some(self.differing),
            },
            "errors": self.errors,
            "tokens": { "prompt": self.prompt_tokens, "cached": self.cached_tokens, "new": self.new_tokens },
            "per_second": {
                "requests": self.rate(self.answered),
                "prompt_tokens": self.rate(self.prompt_tokens),
                "new_tokens": self.rate(self.new_tokens),
            },
            "milliseconds": {
                "first_token": self.first.json(),
                "per_token": self.per_token.json(),
                "between_pieces": self.between.json(),
                "whole": self.whole.json(),
            },
        })
    }

    /// For people.
    pub fn text(&self, args: &LoadArgs) -> String {
        let arrivals = match args.rate {
            Some(rate) => format!("{rate} requests a second at random"),
            None => "each as soon as its last answer is there".into(),
        };
        let mut text = format!("{}: up to {} clients, {arrivals}, {:.1} s\n\n", args.url, args.clients, self.seconds);
        let verified = if args.verify { format!(", {} other than alone", self.differing) } else { String::new() };
        text += &format!(
            "{} requests: {} answered{verified}, {} refused (429 or 503 with Retry-After), {} failed\n{} tokens of prompts, {} of \
             them cached; {} new tokens\n{:.2} requests, {:.1} new tokens, {:.1} tokens of prompts a second\n\n",
            self.sent,
            self.answered,
            self.refused,
            self.failed,
            output::grouped(self.prompt_tokens),
            output::grouped(self.cached_tokens),
            output::grouped(self.new_tokens),
            self.rate(self.answered),
            self.rate(self.new_tokens),
            self.rate(self.prompt_tokens),
        );
        let mut table = output::table(&["milliseconds", "median", "90 %", "99 %", "worst"]);
        let lines = [
            ("to the first piece of text", &self.first),
            ("a token behind it, average of an answer", &self.per_token),
            ("from piece to piece", &self.between),
            ("to the end of the answer", &self.whole),
        ];
        for (name, times) in lines {
            let cells = PERCENTILES.map(|percentile| format!("{:.1}", times.milliseconds(percentile)));
            table.add_row(std::iter::once(name.to_owned()).chain(cells));
        }
        text + &table.to_string() + "\n"
    }
}
