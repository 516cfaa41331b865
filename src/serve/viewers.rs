//! `/v1/watch`: viewers from elsewhere.

use std::sync::Arc;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::app::App;
use super::routes::Held;
use super::watch;
use crate::api::ApiError;

/// What a viewer asks for.
#[derive(Debug, Deserialize)]
struct Asked {
    taps: Option<String>,
}

/// Seconds after which there may be a place for another viewer.
const RETRY: u32 = 10;

/// Lets a viewer in. `held` lives as long as it watches.
pub async fn admit(app: &Arc<App>, parts: &mut Parts, held: Arc<Held>) -> Result<Response, ApiError> {
    let host = app.host()?;
    let Some(gallery) = host.gallery.clone() else {
        return Err(ApiError::forbidden("this server shows nobody what its experts do; start it with --allow-watch"));
    };
    let wrong = |error: String| ApiError::bad_request("taps", error);
    let Query(asked) =
        Query::<Asked>::from_request_parts(parts, &()).await.map_err(|error| wrong(error.body_text()))?;
    let taps = watch::taps(asked.taps.as_deref()).map_err(wrong)?;
    let upgrade = WebSocketUpgrade::from_request_parts(parts, &()).await.map_err(|error| {
        let mut refused = ApiError::bad_request("upgrade", format!("{error}: viewers ask for a websocket"));
        refused.status = error.into_response().status().as_u16();
        refused
    })?;
    let seat = gallery.seat();
    let seat = seat.ok_or_else(|| ApiError::unavailable("all places for viewers are taken", RETRY))?;
    let watcher = host.engine.watch(taps).map_err(|error| host.told(&error))?;
    let stop = app.draining().clone();
    Ok(watch::limited(upgrade).on_upgrade(move |socket| async move {
        watch::serve(socket, gallery, seat, watcher, stop).await;
        drop(held);
    }))
}
