//! From a request to its answer: paths, keys, bodies.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, Request, header};
use axum::response::{IntoResponse, Response};
use futures_util::{FutureExt, StreamExt};
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use super::access::Access;
use super::app::{self, App};
use super::io::Busy;
use super::{chat, completions, metrics, page, texts, viewers};
use crate::api::{self, ApiError, ChatRequest, CompletionRequest, DetokenizeRequest, ModelList, TokenizeRequest};
use crate::ledger::Key;

/// The description of the API, written when it is first asked for.
static OPENAPI: OnceLock<String> = OnceLock::new();

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'a> {
    Page,
    Style,
    Script,
    Health,
    Ready,
    Metrics,
    OpenApi,
    Models,
    Model(&'a str),
    Chat,
    Completions,
    Tokenize,
    Detokenize,
    Watch,
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        let plain = match path {
            "/" => Self::Page,
            "/page.css" => Self::Style,
            "/page.js" => Self::Script,
            "/health" => Self::Health,
            "/ready" => Self::Ready,
            "/metrics" => Self::Metrics,
            "/openapi.json" => Self::OpenApi,
            "/tokenize" => Self::Tokenize,
            "/detokenize" => Self::Detokenize,
            "/v1/watch" => Self::Watch,
            _ => return Self::of_api(["/v1", "/beta"].iter().find_map(|base| path.strip_prefix(base)).unwrap_or(path)),
        };
        Some(plain)
    }

    /// Under `/v1`, `/beta` and neither.
    fn of_api(path: &'a str) -> Option<Self> {
        Some(match path {
            "/chat/completions" => Self::Chat,
            "/completions" => Self::Completions,
            "/models" => Self::Models,
            _ => Self::Model(path.strip_prefix("/models/").filter(|name| !name.is_empty())?),
        })
    }

    /// The methods that it takes.
    fn methods(self) -> &'static [Method] {
        match self {
            Self::Chat | Self::Completions | Self::Tokenize | Self::Detokenize => &[Method::POST],
            _ => &[Method::GET, Method::HEAD],
        }
    }

    /// Whether it is open to all.
    fn is_open(self) -> bool {
        matches!(self, Self::Page | Self::Style | Self::Script | Self::Health | Self::Ready)
    }

    /// Its name in figures.
    fn name(self) -> &'static str {
        match self {
            Self::Page | Self::Style | Self::Script => "/",
            Self::Health => "/health",
            Self::Ready => "/ready",
            Self::Metrics => "/metrics",
            Self::OpenApi => "/openapi.json",
            Self::Models | Self::Model(_) => "/v1/models",
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
            Self::Watch => "/v1/watch",
        }
    }
}

/// Answers a request. The connection counts as busy until the answer was sent.
pub async fn answer(app: Arc<App>, busy: Busy, request: Request<Incoming>) -> Response {
    let (parts, body) = request.into_parts();
    let access = Access::new(&app, &parts.method, parts.uri.path());
    let held = Arc::new(Held { _busy: busy, _access: Arc::clone(&access) });
    let response = guarded(dispatch(&app, parts, Body::new(body), &access, &held)).await;
    access.answered(response.status());
    response.map(|body| Body::new(Holding { body, _held: held }))
}

/// What a request comes to; 500 if that panics.
async fn guarded(answer: impl Future<Output = Result<Response, ApiError>>) -> Response {
    match AssertUnwindSafe(answer).catch_unwind().await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => error.into_response(),
        Err(_) => app::panicked().into_response(),
    }
}

async fn dispatch(
    app: &Arc<App>,
    mut parts: Parts,
    body: Body,
    access: &Arc<Access>,
    held: &Arc<Held>,
) -> Result<Response, ApiError> {
    let path = parts.uri.path().to_owned();
    let Some(route) = Route::of(&path) else { return Err(ApiError::not_found(parts.method.as_str(), &path)) };
    access.route(route.name());
    if !route.methods().contains(&parts.method) {
        let allowed: Vec<&str> = route.methods().iter().map(Method::as_str).collect();
        let allowed = allowed.join(", ");
        let mut response = ApiError::method_not_allowed(parts.method.as_str(), &path, &allowed).into_response();
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_str(&allowed).expect("names of methods"));
        return Ok(response);
    }
    check_origin(&parts)?;
    let key = if route.is_open() { None } else { Some(who(app, &parts.headers)?) };
    if let Some(key) = &key {
        access.key(key.name());
    }
    match route {
        Route::Page => Ok(page::page().into_response()),
        Route::Style => Ok(page::style().into_response()),
        Route::Script => Ok(page::script().into_response()),
        Route::Health => match app.broken() {
            Some(why) => Err(ApiError::unavailable(why, 30)),
            None => Ok(json(r#"{"status":"ok"}"#)),
        },
        Route::Ready => app.host().map(|_| json(r#"{"status":"ready"}"#)),
        Route::Metrics => Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], app.figures()?).into_response()),
        Route::OpenApi => Ok(json(OPENAPI.get_or_init(api::openapi).as_str())),
        Route::Models => Ok(json(chat::json(&ModelList::new(vec![app.host()?.card()])))),
        Route::Model(name) => {
            let host = app.host()?;
            host.check_name(Some(name))?;
            Ok(json(chat::json(&host.card())))
        }
        Route::Watch => viewers::admit(app, &mut parts, Arc::clone(held)).await,
        Route::Chat | Route::Completions | Route::Tokenize | Route::Detokenize => {
            let host = app.host()?;
            let running = app.begin();
            let (bytes, room) = read(app, &parts.headers, body).await?;
            let key = key.ok_or_else(|| ApiError::unauthorized("a key is needed"))?;
            let access = Arc::clone(access);
            match route {
                Route::Chat => {
                    let request = app.work(move || ChatRequest::parse(&bytes)).await?;
                    drop(room);
                    chat::complete(Arc::clone(app), host, request, key, access, running).await
                }
                Route::Completions => {
                    let request = app.work(move || CompletionRequest::parse(&bytes)).await?;
                    drop(room);
                    completions::complete(Arc::clone(app), host, request, key, access, running).await
                }
                Route::Tokenize => {
                    let work = move || texts::tokenize(&host, &TokenizeRequest::parse(&bytes)?);
                    Ok(json(app.work(work).await?))
                }
                _ => {
                    let work = move || texts::detokenize(&host, &DetokenizeRequest::parse(&bytes)?);
                    Ok(json(app.work(work).await?))
                }
            }
        }
    }
}

fn json(body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.into()).into_response()
}

/// Who asks; 401 if that is nobody we know.
fn who(app: &App, headers: &HeaderMap) -> Result<Key, ApiError> {
    let presented = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let presented = presented.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    match app.policy.keys.who(presented) {
        Some(key) => Ok(key.clone()),
        None if presented.is_none() => {
            Err(ApiError::unauthorized("a key is needed: send it as `Authorization: Bearer KEY`"))
        }
        None => Err(ApiError::unauthorized("this key is not known here")),
    }
}

/// 403 if a page of another site sent the request: whoever looks at it has not agreed to that.
fn check_origin(parts: &Parts) -> Result<(), ApiError> {
    let text = |name: &str| parts.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let Some(origin) = text("origin") else { return Ok(()) };
    // HTTP/2 has the host in the request line; a proxy may have put it elsewhere, where no browser lets a page write.
    let host = parts.uri.authority().map(ToString::to_string);
    let mut hosts = [host, text("host"), text("x-forwarded-host")].into_iter().flatten();
    let (_, authority) = origin.split_once("://").unwrap_or_default();
    if !authority.is_empty() && hosts.any(|host| host.eq_ignore_ascii_case(authority)) {
        return Ok(());
    }
    Err(ApiError::forbidden(
        "pages of other sites may not ask this server (a proxy in front of it has to pass the Host header on)",
    ))
}

/// Reads a body, within limits of size and time.
async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<(Bytes, Option<OwnedSemaphorePermit>), ApiError> {
    let limits = &app.limits;
    let (all, pause) = limits.body;
    let deadline = Instant::now() + all;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let slow = || ApiError { status: 408, ..ApiError::bad_request("body", "the body did not come in time") };
    let mut stream = body.into_data_stream();
    if length.is_some_and(|length| length > limits.body_bytes) {
        return Err(too_large(limits.body_bytes, stream, deadline).await);
    }
    let mut bytes = Vec::new();
    let mut room: Option<OwnedSemaphorePermit> = None;
    loop {
        let next = timeout_at(deadline.min(Instant::now() + pause), stream.next()).await.map_err(|_| slow())?;
        let Some(chunk) = next else { break };
        let chunk = chunk.map_err(|error| ApiError::invalid_json(None, format!("the body cannot be read: {error}")))?;
        if bytes.len() + chunk.len() > limits.body_bytes {
            drop((bytes, room));
            return Err(too_large(limits.body_bytes, stream, deadline).await);
        }
        let more = app.room(chunk.len())?;
        match &mut room {
            Some(room) => room.merge(more),
            None => room = Some(more),
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes.into(), room))
}

/// Time and bytes for which a body that is too large is read on: a client that still sends may miss the answer.
const LINGER: std::time::Duration = std::time::Duration::from_secs(3);
const LINGER_BYTES: usize = 64 << 20;

async fn too_large(limit: usize, mut stream: axum::body::BodyDataStream, deadline: Instant) -> ApiError {
    let read_on = async {
        let mut bytes = 0;
        while let Some(Ok(chunk)) = stream.next().await {
            bytes += chunk.len();
            if bytes > LINGER_BYTES {
                break;
            }
        }
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let _ = timeout(LINGER.min(left), read_on).await; // the answer is the same
    ApiError::too_large(limit)
}

/// What lives until an answer was sent.
#[derive(Debug)]
pub struct Held {
    _busy: Busy,
    _access: Arc<Access>,
}

/// A body and what lives as long.
struct Holding {
    body: Body,
    _held: Arc<Held>,
}

impl HttpBody for Holding {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_known_under_all_bases() {
        for base in ["", "/v1", "/beta"] {
            let of = |path: &str| format!("{:?}", Route::of(&format!("{base}{path}")));
            assert_eq!(of("/chat/completions"), "Some(Chat)");
            assert_eq!(of("/completions"), "Some(Completions)");
            assert_eq!(of("/models"), "Some(Models)");
            assert_eq!(of("/models/a/b"), "Some(Model(\"a/b\"))");
            assert_eq!(of("/models/"), "None");
            assert_eq!(of("/chat/completions/"), "None");
        }
        assert_eq!(Route::of("/"), Some(Route::Page));
        for path in ["", "/v1", "/v1/", "/v1/health", "/v1/v1/models", "/v1models", "//", "/watch"] {
            assert_eq!(Route::of(path), None, "{path}");
        }
    }

    #[test]
    fn other_sites_are_refused() {
        let fine = |list: &[(&str, &str)]| {
            let mut request = Request::builder().uri("/v1/models");
            for (name, value) in list {
                request = request.header(*name, *value);
            }
            check_origin(&request.body(()).unwrap().into_parts().0).is_ok()
        };
        assert!(fine(&[]));
        assert!(fine(&[("host", "127.0.0.1:8080")]));
        assert!(fine(&[("host", "127.0.0.1:8080"), ("origin", "http://127.0.0.1:8080")]));
        assert!(fine(&[("host", "Models.example"), ("origin", "https://models.example")]));
        assert!(fine(&[
            ("host", "inner:80"),
            ("x-forwarded-host", "models.example"),
            ("origin", "https://models.example")
        ]));
        assert!(!fine(&[("host", "127.0.0.1:8080"), ("origin", "http://127.0.0.1:80")]));
        assert!(!fine(&[("host", "127.0.0.1:8080"), ("origin", "https://evil.example")]));
        assert!(!fine(&[("host", "127.0.0.1:8080"), ("origin", "null")]));
        assert!(!fine(&[("host", ""), ("origin", "null")]));
        assert!(!fine(&[("origin", "https://evil.example")]));
    }

    #[tokio::test]
    async fn a_panic_becomes_an_answer() {
        let response = guarded(async { panic!("on purpose") }).await;
        assert_eq!(response.status(), 500);
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"]["type"], "server_error", "{body}");
        assert!(!body.to_string().contains("on purpose"), "{body}");
    }
}
