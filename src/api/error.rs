//! Mistakes and misfortunes as clients are told of them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// An answer other than the one hoped for, in OpenAI's form.
///
/// Every mistake in a body has status 400. DeepSeek's API tells malformed bodies (400) from bad values (422); OpenAI's
/// answers 400 to both, and its clients raise `BadRequestError` for 400 alone, which is what programs written for it
/// catch. `code` and `param` tell the cases apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The kind of error, `type` on the wire.
    pub kind: &'static str,
    /// The error's name for programs.
    pub code: Option<&'static str>,
    /// The field that it is about, such as `messages[0].content`.
    pub param: Option<String>,
    /// The error's text for people.
    pub message: String,
    /// After how many seconds it may be worth another try.
    pub retry_after: Option<u32>,
}

/// An error as sent.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// What is wrong.
    error: ErrorDetail,
}

/// What is wrong.
#[derive(Debug, Serialize, ToSchema)]
struct ErrorDetail {
    /// For people.
    message: String,
    /// The kind of error.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field of the request that it is about, such as `messages[0].content`.
    param: Option<String>,
    /// The error's name for programs.
    code: Option<&'static str>,
}

/// The kind of all errors that are the client's.
const INVALID_REQUEST: &str = "invalid_request_error";

impl ApiError {
    fn new(status: u16, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into(), retry_after: None }
    }

    /// 400: the body is not JSON. `param` is the field it breaks off in, if it gets that far.
    pub fn invalid_json(param: Option<String>, message: impl Into<String>) -> Self {
        Self { param, ..Self::new(400, INVALID_REQUEST, Some("invalid_json"), message) }
    }

    /// 400: the field `param` is missing, of the wrong type, out of range, or at odds with another.
    pub fn bad_request(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(400, INVALID_REQUEST, Some("invalid_value"), message) }
    }

    /// 400: the field `param` asks for something that this server does not do.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(400, INVALID_REQUEST, Some("unsupported_parameter"), message) }
    }

    /// 400: prompt and answer do not fit the model's context of `limit` tokens. `answer` is 0 where no length was
    /// asked for.
    pub fn context_length_exceeded(param: impl Into<String>, limit: usize, prompt: usize, answer: usize) -> Self {
        let asked = match answer {
            0 => format!("the prompt has {prompt} tokens, which leaves no room for an answer; shorten it"),
            _ => format!(
                "{} were asked for: {prompt} of the prompt and {answer} of the answer; shorten the prompt or ask for \
                 a shorter answer",
                prompt.saturating_add(answer)
            ),
        };
        let message = format!("the model's context is {limit} tokens, and {asked}");
        let code = Some("context_length_exceeded");
        Self { param: Some(param.into()), ..Self::new(400, INVALID_REQUEST, code, message) }
    }

    /// 401: no key, or one that is not known. Never shows it.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(401, "authentication_error", Some("invalid_api_key"), message)
    }

    /// 402: the key's budget is spent.
    pub fn insufficient_balance(message: impl Into<String>) -> Self {
        Self::new(402, "insufficient_balance_error", Some("insufficient_balance"), message)
    }

    /// 403: the key is good, but this is not allowed.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, "permission_error", Some("forbidden"), message)
    }

    /// 404: another model is asked for than the one `served`.
    pub fn model_not_found(asked: &str, served: &str) -> Self {
        let message = format!("the model {} does not exist here; this server has {served:?}", super::shown(asked));
        Self { param: Some("model".into()), ..Self::new(404, INVALID_REQUEST, Some("model_not_found"), message) }
    }

    /// 404: there is nothing at this path.
    pub fn not_found(method: &str, path: &str) -> Self {
        let path = super::shown(path);
        Self::new(404, INVALID_REQUEST, Some("unknown_url"), format!("there is nothing at {path} ({method})"))
    }

    /// 405: the path takes other methods, those in `allowed`.
    pub fn method_not_allowed(method: &str, path: &str, allowed: &str) -> Self {
        let message = format!("{} takes {allowed}, not {method}", super::shown(path));
        Self::new(405, INVALID_REQUEST, Some("method_not_allowed"), message)
    }

    /// 413: the body has more than `limit` bytes.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than the {limit} bytes that this server takes");
        Self::new(413, INVALID_REQUEST, Some("request_too_large"), message)
    }

    /// 429: too much is asked at once. `retry_after` is in seconds.
    pub fn too_many_requests(message: impl Into<String>, retry_after: u32) -> Self {
        let error = Self::new(429, "rate_limit_error", Some("rate_limit_exceeded"), message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 500: the server failed.
    pub fn server(message: impl Into<String>) -> Self {
        Self::new(500, "server_error", Some("internal_error"), message)
    }

    /// 503: the server cannot answer now. `retry_after` is in seconds.
    pub fn unavailable(message: impl Into<String>, retry_after: u32) -> Self {
        let error = Self::new(503, "server_error", Some("service_unavailable"), message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// The error as sent: `{"error": {"message", "type", "param", "code"}}`.
    pub fn to_json(&self) -> Value {
        let (message, param) = (self.message.clone(), self.param.clone());
        let error = ErrorDetail { message, kind: self.kind, param, code: self.code };
        serde_json::to_value(ErrorBody { error }).expect("texts can be written as JSON")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let json = [(header::CONTENT_TYPE, "application/json")];
        let unauthorized = status == StatusCode::UNAUTHORIZED;
        let mut response = (status, json, self.to_json().to_string()).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
