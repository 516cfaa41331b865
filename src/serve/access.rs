//! The log: a line for each request, on standard error. Keys are never in it, and prompts only if they were asked for.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::http::{Method, StatusCode};

use super::app::{App, Log};
use super::host::Host;
use crate::api::Usage;

/// What is known of a request. Its line is written when this is dropped: when the answer was sent, or its client has gone.
#[derive(Debug)]
pub struct Access {
    app: Arc<App>,
    begun: Instant,
    method: Method,
    path: String,
    noted: Mutex<Noted>,
}

#[derive(Debug, Default)]
struct Noted {
    status: Option<StatusCode>,
    /// The route, for figures: paths that do not exist are no names for them.
    route: &'static str,
    key: Option<String>,
    usage: Option<Usage>,
}

impl Access {
    /// Of a request that has just come.
    pub fn new(app: &Arc<App>, method: &Method, path: &str) -> Arc<Self> {
        let noted = Mutex::new(Noted { route: "unknown", ..Noted::default() });
        let (app, begun, method, path) = (Arc::clone(app), Instant::now(), method.clone(), path.to_owned());
        Arc::new(Self { app, begun, method, path, noted })
    }

    fn note(&self, note: impl FnOnce(&mut Noted)) {
        note(&mut self.noted.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Notes what was answered.
    pub fn answered(&self, status: StatusCode) {
        self.note(|noted| noted.status = Some(status));
    }

    /// Notes what was asked for.
    pub fn route(&self, route: &'static str) {
        self.note(|noted| noted.route = route);
    }

    /// Notes who asks.
    pub fn key(&self, name: &str) {
        self.note(|noted| noted.key = Some(name.to_owned()));
    }

    /// Notes what it took.
    pub fn used(&self, usage: &Usage) {
        self.note(|noted| noted.usage = Some(usage.clone()));
    }

    /// Writes a prompt, if prompts are to be written.
    pub fn prompt(&self, host: &Host, tokens: &[u32]) {
        if self.app.policy.log == Log::Prompts {
            // As JSON it is one line, whatever is in it.
            line(&format!("prompt {}", serde_json::Value::from(host.text.decode(tokens, false))));
        }
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        let noted = std::mem::take(self.noted.get_mut().unwrap_or_else(PoisonError::into_inner));
        // A client that goes before it is answered is noted as nginx does.
        let status = noted.status.map_or(499, |status| status.as_u16());
        if let Some(metrics) = self.app.metrics() {
            metrics.add_http_request(noted.route, status);
        }
        if self.app.policy.log == Log::Nothing {
            return;
        }
        let key = noted.key.map(|key| format!(" key={key}")).unwrap_or_default();
        let used = noted.usage.map(|usage| {
            let Usage { prompt_tokens, prompt_cache_hit_tokens, completion_tokens, .. } = usage;
            format!(" prompt={prompt_tokens} cached={prompt_cache_hit_tokens} completion={completion_tokens}")
        });
        let (seconds, used) = (self.begun.elapsed().as_secs_f64(), used.unwrap_or_default());
        line(&format!("{status} {} {}{key}{used} {seconds:.3} s", self.method, self.path));
    }
}

/// Writes a line with the time. If nobody reads standard error, there is nobody to tell.
fn line(text: &str) {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ");
    let _ = writeln!(std::io::stderr(), "{now} {text}");
}
