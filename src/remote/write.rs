//! Texts to write, as requests to the server.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moewe_viewer::source::{Event, Prompt, Request};
use serde_json::{Map, Value, json};
use tokio::runtime::{self, Runtime};
use tokio::task::AbortHandle;

use super::connect::{Error, Server, plain, said};
use super::{Wake, call};

/// Time to reach the server.
const CONNECT: Duration = Duration::from_secs(10);
/// Bytes of an error that are read.
const MAX_ERROR: usize = 64 << 10;

/// Sends requests, and reads answers only to see them end: what is written shows on the stream of what happens.
pub(super) struct Writer {
    url: String,
    key: Option<String>,
    name: String,
    fields: Map<String, Value>,
    client: reqwest::Client,
    /// Until this is dropped.
    runtime: Option<Runtime>,
    standing: Arc<Mutex<Standing>>,
    told: Sender<Event>,
    wake: Wake,
}

#[derive(Default)]
struct Standing {
    /// Requests that are being answered.
    open: Vec<(tokio::task::Id, AbortHandle)>,
    /// Requests that were answered, with a text.
    answered: usize,
    /// When the last of them was.
    last: Option<Instant>,
}

impl Writer {
    pub(super) fn new(
        server: &Server,
        fields: Map<String, Value>,
        told: Sender<Event>,
        wake: Wake,
    ) -> Result<Self, Error> {
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|error| Error::Client(error.to_string()))?;
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error| Error::Client(error.to_string()))?;
        Ok(Self {
            url: format!("http://{}/v1/completions", server.name()),
            key: server.key().map(str::to_owned),
            name: server.name().to_owned(),
            fields,
            client,
            runtime: Some(runtime),
            standing: Arc::default(),
            told,
            wake,
        })
    }

    /// Asks for a text.
    pub(super) fn write(&self, request: Request) {
        if !request.edits.is_empty() {
            let what = "a server's model cannot be changed; open the model itself with `moewe view MODEL`";
            return tell(&self.told, &self.wake, what.into());
        }
        let prompt = match request.prompt {
            Prompt::Text(text) => json!(text),
            Prompt::Tokens(tokens) => json!(tokens),
        };
        let mut body = self.fields.clone();
        body.insert("prompt".into(), prompt);
        body.insert("max_tokens".into(), request.max_new_tokens.into());
        // As text: 0.7 in 32 bits is not 0.7 in 64.
        body.insert("temperature".into(), request.temperature.to_string().parse().unwrap_or(Value::Null));
        body.insert("seed".into(), request.seed.into());
        body.insert("stream".into(), true.into());
        let mut asked = self.client.post(&self.url).json(&body);
        if let Some(key) = &self.key {
            asked = asked.bearer_auth(key);
        }
        let Some(runtime) = &self.runtime else { return };
        let (standing, told, wake) = (Arc::clone(&self.standing), self.told.clone(), Arc::clone(&self.wake));
        let name = self.name.clone();
        let mut open = lock(&self.standing); // held until the handle is in, so that the task cannot end before
        let task = runtime.spawn(async move {
            let answered = answer(asked).await;
            {
                let mut standing = lock(&standing);
                standing.open.retain(|(id, _)| *id != tokio::task::id());
                if answered.is_ok() {
                    standing.answered += 1;
                    standing.last = Some(Instant::now());
                }
            }
            match answered {
                Ok(()) => call(&wake),
                Err(what) => tell(&told, &wake, format!("{name}: {what}")),
            }
        });
        open.open.push((task.id(), task.abort_handle()));
    }

    /// Hangs up, which the server takes as a wish to stop.
    pub(super) fn stop(&self) {
        let open = std::mem::take(&mut lock(&self.standing).open);
        for (_, task) in open {
            task.abort();
        }
        call(&self.wake);
    }

    /// Requests that are being answered, those that were, and when the last was.
    pub(super) fn standing(&self) -> (usize, usize, Option<Instant>) {
        let standing = lock(&self.standing);
        (standing.open.len(), standing.answered, standing.last)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn lock(standing: &Mutex<Standing>) -> MutexGuard<'_, Standing> {
    standing.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tell(told: &Sender<Event>, wake: &Wake, what: String) {
    let _ = told.send(Event::Error(what)); // nobody listens: then there is nobody to tell
    call(wake);
}

/// Reads an answer to its end.
async fn answer(asked: reqwest::RequestBuilder) -> Result<(), String> {
    let mut answer = asked.send().await.map_err(|error| cause(&error))?;
    let status = answer.status();
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(|error| cause(&error))? {
        if !status.is_success() {
            body.extend_from_slice(&part[..part.len().min(MAX_ERROR - body.len())]);
            if body.len() == MAX_ERROR {
                break;
            }
        }
    }
    match said(&body) {
        _ if status.is_success() => Ok(()),
        said if said.is_empty() => Err(format!("the text was refused (HTTP {})", status.as_u16())),
        said => Err(format!("the text was refused (HTTP {}): {said}", status.as_u16())),
    }
}

/// The innermost cause: the others name the URL, which everybody knows.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    plain(&cause.to_string())
}
