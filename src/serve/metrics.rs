//! Metrics for Prometheus, under vLLM's names where vLLM has them, so that its dashboards and gateways work.
//!
//! Served in the text format 0.0.4, which Prometheus and all its relatives read. `prometheus-client` writes OpenMetrics,
//! which differs in what it calls a counter's family; [`Metrics::render`] turns it into the other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use crate::ledger::Amount;

#[cfg(test)]
mod tests;

/// The content type of what [`Metrics::render`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// Labels beside the model's name.
type Labels = Vec<(&'static str, String)>;
type CounterOf = Family<Labels, Counter>;

/// How a request ended, in vLLM's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// At its end-of-sequence token, a stop string or a tool call.
    Stop,
    /// At the most tokens it may have.
    Length,
    /// The client went away, or the server stopped.
    Abort,
    /// Something went wrong.
    Error,
}

impl Ended {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// The label `finished_reason`.
    const fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// When what happened to a request.
#[derive(Clone, Copy, Debug)]
pub struct RequestTimes {
    /// When it arrived.
    pub arrived: Instant,
    /// When it first ran.
    pub began: Option<Instant>,
    first_tokens: Option<Instant>,
    last_tokens: Option<Instant>,
}

impl RequestTimes {
    /// Of a request that arrived at this time.
    pub const fn new(arrived: Instant) -> Self {
        Self { arrived, began: None, first_tokens: None, last_tokens: None }
    }
}

/// What the engine counts, at the time of a scrape. Counters only ever rise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineNumbers {
    /// Requests that run.
    pub running: u64,
    /// Requests that wait for a place.
    pub waiting: u64,
    /// Pages of the latent cache.
    pub pages: u64,
    /// Those that nobody holds.
    pub free_pages: u64,
    /// Those that the prefix cache holds.
    pub cached_pages: u64,
    /// Tokens of prompts that the prefix cache had.
    pub hit_tokens: u64,
    /// Tokens of prompts that it did not have.
    pub miss_tokens: u64,
    /// Generated tokens.
    pub new_tokens: u64,
    /// Requests whose pages were taken for others.
    pub preempted: u64,
    /// For each position behind a token, how many drafts were verified there and how many of them accepted.
    pub acceptance: Vec<(u64, u64)>,
}

/// All metrics of a server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    running: Gauge<u64, AtomicU64>,
    waiting: Gauge<u64, AtomicU64>,
    cache_usage: Gauge<f64, AtomicU64>,
    pages: Family<Labels, Gauge<u64, AtomicU64>>,
    prefix_queries: Counter,
    prefix_hits: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    preemptions: Counter,
    drafts: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
    accepted_tokens_at: CounterOf,
    ended: CounterOf,
    first_token: Histogram,
    between_tokens: Histogram,
    request: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    cost: Family<Labels, Counter<f64>>,
    ledger_failures: Counter,
    http_requests: CounterOf,
}

/// Registers metrics as they are made.
struct Maker(Registry);

impl Maker {
    fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn plain<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.add(name, help, M::default())
    }

    fn histogram(&mut self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(name, help, Histogram::new(buckets.iter().copied()))
    }
}

impl Metrics {
    /// Metrics of a server of the model with this served name and longest context in tokens.
    pub fn new(model_name: &str, max_model_len: u64) -> Self {
        let mut make = Maker(Registry::with_labels([("model_name".into(), model_name.to_owned().into())].into_iter()));
        let lengths = lengths(max_model_len);
        // The order here is the order of the text. What is said of a metric ends without a full stop: the encoder adds it.
        let metrics = Self {
            running: make.plain("vllm:num_requests_running", "Requests that run"),
            waiting: make.plain("vllm:num_requests_waiting", "Requests that wait for a place"),
            cache_usage: make.plain(
                "vllm:kv_cache_usage_perc",
                "Latent cache in use, 1 means all of it; what only the prefix cache holds is not in use",
            ),
            pages: make.plain("moewe_kv_cache_pages", "Pages of the latent cache, by state: used, cached or free"),
            prefix_queries: make.plain("vllm:prefix_cache_queries", "Tokens that the prefix cache was asked for"),
            prefix_hits: make.plain("vllm:prefix_cache_hits", "Tokens that the prefix cache had"),
            prompt_tokens: make.plain("vllm:prompt_tokens", "Tokens of prompts, with those that the prefix cache had"),
            generation_tokens: make.plain("vllm:generation_tokens", "Tokens that were generated"),
            preemptions: make.plain("vllm:num_preemptions", "Requests whose pages were taken for others"),
            drafts: make.plain("vllm:spec_decode_num_drafts", "Times that tokens were drafted"),
            draft_tokens: make.plain("vllm:spec_decode_num_draft_tokens", "Tokens that were drafted and verified"),
            accepted_tokens: make.plain("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted"),
            accepted_tokens_at: make.plain(
                "vllm:spec_decode_num_accepted_tokens_per_pos",
                "Drafted tokens that were accepted, by their position behind the last token",
            ),
            ended: make.plain("vllm:request_success", "Requests that ended, by reason"),
            first_token: make.histogram(
                "vllm:time_to_first_token_seconds",
                "Time from a request's arrival to its first token",
                &FIRST_TOKEN,
            ),
            between_tokens: make.histogram(
                "vllm:inter_token_latency_seconds",
                "Time from the tokens of one pass to those of the next, of a request",
                &BETWEEN_TOKENS,
            ),
            request: make.histogram(
                "vllm:e2e_request_latency_seconds",
                "Time from a request's arrival to its end",
                &REQUEST,
            ),
            queue: make.histogram("vllm:request_queue_time_seconds", "Time that requests waited for a place", &REQUEST),
            prefill: make.histogram(
                "vllm:request_prefill_time_seconds",
                "Time from a request's place to its first token",
                &REQUEST,
            ),
            decode: make.histogram(
                "vllm:request_decode_time_seconds",
                "Time from a request's first token to its last",
                &REQUEST,
            ),
            request_prompt_tokens: make.histogram("vllm:request_prompt_tokens", "Tokens of a prompt", &lengths),
            request_generation_tokens: make.histogram(
                "vllm:request_generation_tokens",
                "Tokens that a request generated",
                &lengths,
            ),
            cost: make.plain("moewe_cost", "What was generated and read cost, by key, in the currency of the prices"),
            ledger_failures: make
                .plain("moewe_ledger_failures", "Requests that failed since usage could not be recorded"),
            http_requests: make.plain("moewe_http_requests", "HTTP requests, by route and status"),
            registry: make.0,
        };
        for reason in Ended::ALL {
            drop(metrics.ended.get_or_create(&vec![("finished_reason", reason.label().into())]));
        }
        metrics
    }

    /// Tokens of a request came: its first ones, or after those before.
    pub fn observe_tokens(&self, times: &mut RequestTimes, at: Instant) {
        let (histogram, since) = match times.last_tokens {
            None => (&self.first_token, times.arrived),
            Some(last) => (&self.between_tokens, last),
        };
        histogram.observe(seconds(since, at));
        times.first_tokens.get_or_insert(at);
        times.last_tokens = Some(at);
    }

    /// A request ended.
    pub fn observe_request(
        &self,
        times: &RequestTimes,
        at: Instant,
        ended: Ended,
        prompt_tokens: u64,
        generated_tokens: u64,
    ) {
        self.ended.get_or_create(&vec![("finished_reason", ended.label().into())]).inc();
        self.request.observe(seconds(times.arrived, at));
        self.queue.observe(seconds(times.arrived, times.began.unwrap_or(at)));
        if let Some(began) = times.began {
            self.prefill.observe(seconds(began, times.first_tokens.unwrap_or(at)));
        }
        if let (Some(first), Some(last)) = (times.first_tokens, times.last_tokens) {
            self.decode.observe(seconds(first, last));
        }
        self.request_prompt_tokens.observe(prompt_tokens as f64);
        self.request_generation_tokens.observe(generated_tokens as f64);
    }

    /// A key's request cost so much. This sum is of doubles; the exact one is in the usage file.
    pub fn add_cost(&self, key: &str, cost: Amount) {
        self.cost.get_or_create(&vec![("key", key.to_owned())]).inc_by(cost.picounits() as f64 * 1e-12);
    }

    /// A request failed since its usage could not be recorded.
    pub fn add_ledger_failure(&self) {
        self.ledger_failures.inc();
    }

    /// An HTTP request was answered. The path is that of the route, not what the client sent: every one of them is kept.
    pub fn add_http_request(&self, path: &'static str, status: u16) {
        self.http_requests.get_or_create(&vec![("path", path.into()), ("status", status.to_string())]).inc();
    }

    /// All metrics as text.
    pub fn render(&self, engine: &EngineNumbers) -> String {
        self.take(engine);
        let mut text = String::new();
        // Writing to a string cannot fail, and if it did, the page would be short.
        let _ = encode_registry(&mut text, &self.registry);
        to_text(&text)
    }

    fn take(&self, engine: &EngineNumbers) {
        self.running.set(engine.running);
        self.waiting.set(engine.waiting);
        let used = engine.pages.saturating_sub(engine.free_pages).saturating_sub(engine.cached_pages);
        self.cache_usage.set(used as f64 / engine.pages.max(1) as f64);
        for (state, pages) in [("used", used), ("cached", engine.cached_pages), ("free", engine.free_pages)] {
            self.pages.get_or_create(&vec![("state", state.into())]).set(pages);
        }
        let prompts = engine.hit_tokens + engine.miss_tokens;
        raise(&self.prefix_queries, prompts);
        raise(&self.prefix_hits, engine.hit_tokens);
        raise(&self.prompt_tokens, prompts);
        raise(&self.generation_tokens, engine.new_tokens);
        raise(&self.preemptions, engine.preempted);
        raise(&self.drafts, engine.acceptance.first().map_or(0, |(verified, _)| *verified));
        raise(&self.draft_tokens, engine.acceptance.iter().map(|(verified, _)| verified).sum());
        raise(&self.accepted_tokens, engine.acceptance.iter().map(|(_, accepted)| accepted).sum());
        for (position, (_, accepted)) in engine.acceptance.iter().enumerate() {
            raise(&self.accepted_tokens_at.get_or_create(&vec![("position", position.to_string())]), *accepted);
        }
    }
}

/// Lifts a counter to a value that was counted elsewhere. Of two scrapes at once, the later value stays.
fn raise(counter: &Counter, value: u64) {
    counter.inner().fetch_max(value, Ordering::Relaxed);
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

/// 1, 2, 5, 10, 20, 50, … up to a context's length.
fn lengths(max: u64) -> Vec<f64> {
    let decades = (0..19).map(|decade| 10u64.pow(decade));
    let all = decades.flat_map(|decade| [1, 2, 5].map(|step| decade.saturating_mul(step)));
    all.take_while(|length| *length <= max.max(1)).map(|length| length as f64).collect()
}

/// OpenMetrics as text of format 0.0.4: a counter's family has the name of its samples, and there is no end mark.
fn to_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut lines = open_metrics.lines().peekable();
    while let Some(line) = lines.next() {
        let name = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' '));
        if let (Some((name, help)), Some(kind)) = (name, lines.peek().and_then(|kind| kind.strip_prefix("# TYPE "))) {
            let kind = kind.rsplit(' ').next().unwrap_or_default();
            let suffix = if kind == "counter" { "_total" } else { "" };
            text += &format!("# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n");
            lines.next();
        } else {
            text += line;
            text.push('\n');
        }
    }
    text
}
