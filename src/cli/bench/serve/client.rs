//! One request over HTTP, streamed, with the times at which its pieces came.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::StreamExt;
use reqwest::{Response, StatusCode, Url, header};
use serde_json::{Value, json};

use super::work::{Job, PASSAGE};
use crate::cli::args::LoadArgs;
use crate::cli::key;

/// A request that takes longer has failed.
const PATIENCE: Duration = Duration::from_mins(15);
/// Longest line of an answer that is believed.
const LONGEST: usize = 16 << 20;

/// How a request went.
pub enum Answer {
    Done(Done),
    /// The server had too much to do.
    Refused {
        retry_after: Option<Duration>,
    },
    Failed(String),
}

impl Answer {
    /// In words.
    pub fn describe(&self) -> String {
        match self {
            Self::Done(_) => "answered".into(),
            Self::Refused { .. } => "refused, since the server has too much to do".into(),
            Self::Failed(what) => what.clone(),
        }
    }
}

/// A whole answer.
#[derive(Default)]
pub struct Done {
    pub text: String,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub new_tokens: u64,
    /// From the request's time to the first piece of text, from piece to piece, and from the first to the last one.
    pub first: Option<Duration>,
    pub between: Vec<Duration>,
    pub streaming: Duration,
    /// From the request's time to the end.
    pub whole: Duration,
}

/// The way to a server.
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
}

impl Client {
    pub fn new(args: &LoadArgs) -> anyhow::Result<Self> {
        let url = args.url.trim_end_matches('/').to_owned();
        if Url::parse(&url).ok().is_none_or(|parsed| parsed.scheme() != "http" || parsed.host().is_none()) {
            bail!("{url:?} is no address of a server; expected http://HOST:PORT, as `moewe serve` prints it");
        }
        let key = key::presented(args.api_key_file.as_deref())?;
        let http = reqwest::Client::builder().no_proxy().build().context("cannot make an HTTP client")?;
        Ok(Self { http, url, key })
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Response> {
        let mut request = self.http.post(format!("{}{path}", self.url)).json(body).timeout(PATIENCE);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        request.send().await.with_context(|| format!("{}: no answer; is `moewe serve` running there?", self.url))
    }

    /// The tokens of the passage.
    pub async fn prepare(&self) -> anyhow::Result<Vec<u32>> {
        let asked = json!({ "prompt": PASSAGE, "add_special_tokens": false });
        let response = self.post("/tokenize", &asked).await?;
        let status = response.status();
        let body = response.text().await.unwrap_or_default();
        if !status.is_success() {
            bail!("{}/tokenize: {}", self.url, told(status, &body));
        }
        let answer: Value = serde_json::from_str(&body).unwrap_or_default();
        let ids = answer["tokens"].as_array().into_iter().flatten();
        Ok(ids.filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect())
    }

    /// Sends a request that counts from `begun` on, and reads its answer.
    pub async fn complete(&self, job: &Job, begun: Instant) -> Answer {
        let body = json!({
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": if job.seed.is_some() { 1.0 } else { 0.0 },
            "seed": job.seed,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let response = match self.post("/v1/completions", &body).await {
            Ok(response) => response,
            Err(error) => return Answer::Failed(format!("{error:#}")),
        };
        let status = response.status();
        if status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::SERVICE_UNAVAILABLE {
            let after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            if status == StatusCode::TOO_MANY_REQUESTS || after.is_some() {
                return Answer::Refused { retry_after: after.map(Duration::from_secs) };
            }
        }
        if !status.is_success() {
            return Answer::Failed(told(status, &response.text().await.unwrap_or_default()));
        }
        match read(response, begun).await {
            Ok(done) => Answer::Done(done),
            Err(error) => Answer::Failed(format!("{error:#}")),
        }
    }
}

/// What an error of the server says.
fn told(status: StatusCode, body: &str) -> String {
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    let message = value["error"]["message"].as_str().unwrap_or(body);
    format!("{status}: {}", message.chars().take(300).collect::<String>())
}

/// Reads the events of a stream.
async fn read(response: Response, begun: Instant) -> anyhow::Result<Done> {
    let mut stream = response.bytes_stream();
    let (mut line, mut done, mut ended) = (Vec::new(), Done::default(), false);
    let (mut first, mut last) = (None, None);
    while let Some(bytes) = stream.next().await {
        for byte in bytes.context("the answer broke off")? {
            if byte != b'\n' {
                line.push(byte);
                anyhow::ensure!(line.len() <= LONGEST, "a line of the answer is longer than {LONGEST} bytes");
                continue;
            }
            let text = std::str::from_utf8(&line).context("the answer is not UTF-8")?;
            let event = text.trim_end_matches('\r').strip_prefix("data: ");
            match event {
                Some("[DONE]") => ended = true,
                Some(event) if take(&mut done, event)? => {
                    let now = Instant::now();
                    first.get_or_insert(now);
                    if let Some(last) = last.replace(now) {
                        done.between.push(now - last);
                    }
                }
                Some(_) | None => {}
            }
            line.clear();
        }
    }
    anyhow::ensure!(ended, "the answer ended without its last event");
    done.first = first.map(|first| first.saturating_duration_since(begun));
    done.streaming = first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first);
    done.whole = begun.elapsed();
    Ok(done)
}

/// Takes in an event; whether it had text.
fn take(done: &mut Done, event: &str) -> anyhow::Result<bool> {
    let event: Value = serde_json::from_str(event).context("an event of the answer is no JSON")?;
    if let Some(message) = event["error"]["message"].as_str() {
        bail!("the server says: {message}");
    }
    if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
        let number = |name: &str| usage[name].as_u64().unwrap_or(0);
        done.prompt_tokens = number("prompt_tokens");
        done.cached_tokens = number("prompt_cache_hit_tokens");
        done.new_tokens = number("completion_tokens");
    }
    let text = event["choices"][0]["text"].as_str().unwrap_or("");
    done.text += text;
    Ok(!text.is_empty())
}
