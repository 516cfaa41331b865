//! Server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc;

/// Events that wait for the client.
const QUEUE: usize = 16;

/// Where events go.
#[derive(Debug)]
pub struct Events {
    sender: mpsc::Sender<Bytes>,
    stall: Duration,
}

/// The client has gone, or reads nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// A way to send events, and the response that they make up. A client that takes nothing for `stall` counts as gone; one that
/// is sent nothing for `keep_alive` is told that it is not forgotten.
pub fn channel(stall: Duration, keep_alive: Duration) -> (Events, Response) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let events = futures_util::stream::unfold(receiver, move |mut receiver| async move {
        let event = match tokio::time::timeout(keep_alive, receiver.recv()).await {
            Ok(event) => event?,
            Err(_) => Bytes::from_static(b": keep-alive\n\n"),
        };
        Some((Ok::<_, Infallible>(event), receiver))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // A proxy that gathered the events would make one answer of them.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (Events { sender, stall }, (headers, Body::from_stream(events)).into_response())
}

impl Events {
    /// Sends an event: JSON, or `[DONE]`, in one line.
    pub async fn send(&self, data: &str) -> Result<(), Gone> {
        let event = Bytes::from(format!("data: {data}\n\n"));
        self.sender.send_timeout(event, self.stall).await.map_err(|_| Gone)
    }

    /// Returns once the client has gone.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(5);
    const SHORT: Duration = Duration::from_millis(30);

    #[tokio::test]
    async fn events_come_in_order_and_the_end_shows() {
        let (events, response) = channel(LONG, LONG);
        let body = axum::body::to_bytes(response.into_body(), 1000);
        let send = async {
            events.send("{\"a\":1}").await.unwrap();
            events.send("[DONE]").await.unwrap();
            drop(events);
        };
        let (body, ()) = tokio::join!(body, send);
        assert_eq!(body.unwrap(), "data: {\"a\":1}\n\ndata: [DONE]\n\n");
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_has_gone() {
        let (events, _response) = channel(SHORT, LONG);
        for _ in 0..QUEUE {
            events.send("1").await.unwrap();
        }
        assert_eq!(events.send("1").await, Err(Gone));
    }

    #[tokio::test]
    async fn a_client_that_has_gone_is_noticed() {
        let (events, response) = channel(LONG, LONG);
        drop(response);
        events.closed().await;
        assert_eq!(events.send("1").await, Err(Gone));
    }

    #[tokio::test]
    async fn a_client_that_waits_is_told_that_it_is_not_forgotten() {
        use futures_util::StreamExt;
        let (_events, response) = channel(LONG, SHORT);
        let mut body = response.into_body().into_data_stream();
        for _ in 0..3 {
            assert_eq!(body.next().await.unwrap().unwrap(), ": keep-alive\n\n");
        }
    }
}
