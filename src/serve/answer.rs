//! From tokens that were drawn to what a client is told.

use moewe_runtime::engine::{Logprobs, Tokens};

use super::host::Host;
use crate::api::{TokenLogprob, TopLogprob};
use crate::chat::{Delta, Splitter};
use crate::text::TokenStream;

/// One choice's text as it grows.
pub struct Answer<'a> {
    host: &'a Host,
    stream: Option<TokenStream<'a>>,
    splitter: Splitter,
    /// Tokens whose text was not told yet.
    pending: Part,
    /// Tokens that count, and those of them that were reasoning.
    pub tokens: u64,
    pub reasoning_tokens: u64,
    /// Whether a tool was called.
    pub called: bool,
}

/// More of an answer: text, and what is told of the tokens behind it.
#[derive(Debug, Default)]
pub struct Part {
    /// The text.
    pub deltas: Vec<Delta>,
    /// Log probabilities of the tokens of content,
    pub content: Vec<TokenLogprob>,
    /// and of reasoning.
    pub reasoning: Vec<TokenLogprob>,
    /// `[tokens, moe_layers, top_k]`.
    pub experts: Vec<u16>,
    /// `[prompt, moe_layers, top_k]`, once.
    pub prompt_experts: Vec<u16>,
}

impl<'a> Answer<'a> {
    /// Nothing yet.
    pub fn new(host: &'a Host, splitter: Splitter) -> Self {
        Self {
            host,
            stream: Some(host.text.stream(false)),
            splitter,
            pending: Part::default(),
            tokens: 0,
            reasoning_tokens: 0,
            called: false,
        }
    }

    /// Takes tokens, up to a stop text; gives how many count.
    pub fn push(&mut self, tokens: Tokens) -> u64 {
        let Tokens { ids, logprobs, experts, prompt_experts } = tokens;
        let row = experts.len() / ids.len().max(1);
        self.pending.prompt_experts.extend(prompt_experts);
        let mut count = 0;
        for (index, &id) in ids.iter().enumerate() {
            if self.splitter.stopped() {
                break;
            }
            count += 1;
            self.pending.experts.extend(&experts[index * row..(index + 1) * row]);
            let was_reasoning = self.splitter.in_reasoning();
            self.reasoning_tokens += u64::from(was_reasoning);
            if self.host.ends(id) {
                continue; // it has no text, and clients are told none of it
            }
            if let Some(logprobs) = logprobs.get(index) {
                let list = if was_reasoning { &mut self.pending.reasoning } else { &mut self.pending.content };
                list.push(told(self.host, id, logprobs));
            }
            let piece = match &mut self.stream {
                Some(stream) if !self.host.dialect.hides(id) => stream.push(id),
                _ => String::new(),
            };
            let deltas = self.splitter.push(&piece);
            self.keep(deltas);
        }
        self.tokens += count;
        count
    }

    fn keep(&mut self, deltas: Vec<Delta>) {
        self.called |= deltas.iter().any(|delta| matches!(delta, Delta::ToolCall { .. }));
        for delta in deltas {
            match (self.pending.deltas.last_mut(), delta) {
                (Some(Delta::Content(text)), Delta::Content(more))
                | (Some(Delta::Reasoning(text)), Delta::Reasoning(more)) => *text += &more,
                (_, delta) => self.pending.deltas.push(delta),
            }
        }
    }

    /// Whether a stop text was met: the answer is over.
    pub fn stopped(&self) -> bool {
        self.splitter.stopped()
    }

    /// What can be told by now, if there is any text to tell.
    pub fn part(&mut self) -> Option<Part> {
        (!self.pending.deltas.is_empty()).then(|| std::mem::take(&mut self.pending))
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> Part {
        if let Some(stream) = self.stream.take() {
            let rest = stream.finish();
            if !self.splitter.stopped() && !rest.is_empty() {
                let deltas = self.splitter.push(&rest);
                self.keep(deltas);
            }
        }
        let deltas = self.splitter.finish();
        self.keep(deltas);
        let mut part = std::mem::take(&mut self.pending);
        if self.splitter.stopped() && part.deltas.is_empty() {
            // These are the stop text's.
            part.content.clear();
        }
        part
    }
}

/// Log probabilities of a token as clients are told them.
fn told(host: &Host, id: u32, logprobs: &Logprobs) -> TokenLogprob {
    let spelt = |id| {
        let bytes = host.text.bytes(id).unwrap_or_default();
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    };
    let top = logprobs.top.iter().map(|&(id, logprob)| {
        let (token, bytes) = spelt(id);
        TopLogprob { token, logprob, bytes }
    });
    let (token, bytes) = spelt(id);
    TokenLogprob { token, logprob: logprobs.logprob, bytes, top_logprobs: top.collect() }
}
