//! The chat page: `GET /`, with its style and its script. It needs nothing from elsewhere.

use axum::http::{HeaderName, header};
use axum::response::IntoResponse;

/// What the page may do: use its own style and script, draw, and talk to the server that it came from. Nothing else is
/// loaded or run, whatever a model writes.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `GET /`.
pub fn page() -> impl IntoResponse {
    asset("text/html; charset=utf-8", include_str!("page/index.html"))
}

/// `GET /page.css`.
pub fn style() -> impl IntoResponse {
    asset("text/css; charset=utf-8", include_str!("page/page.css"))
}

/// `GET /page.js`.
pub fn script() -> impl IntoResponse {
    asset("text/javascript; charset=utf-8", include_str!("page/page.js"))
}

fn asset(kind: &'static str, body: &'static str) -> ([(HeaderName, &'static str); 5], &'static str) {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, body)
}
