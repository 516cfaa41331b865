//! The HTTP server: OpenAI's API as DeepSeek extends it, over one model.
//!
//! A connection (`connections`) is watched over by `io`, so that a client that sends or reads nothing costs little and not
//! for long. A request goes through `routes` (path, key, body) to `chat` or `completions`, which make prompts of it and
//! hand them to `generate`: that follows the engine's events, has tokens recorded before they are sent, and cancels what a
//! client no longer waits for. A stream is a task of its own, which ends when its client has gone; an answer in one piece is
//! part of its connection, and is dropped with it.

mod access;
mod answer;
mod app;
mod chat;
mod choices;
mod completions;
mod connections;
mod generate;
mod host;
mod io;
mod metrics;
mod page;
mod routes;
mod sse;
mod texts;
mod viewers;
pub(crate) mod watch;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep_until, timeout};

pub use app::{App, Log, Policy};
pub use connections::Limits;
pub use host::{Host, HostError, Parts};

/// What whoever runs the server may be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The model is loaded, and requests are served.
    Ready,
    /// The server is coming to an end as soon as so many requests are done.
    Left(usize),
    /// There is no more time for so many requests.
    Cancelled(usize),
}

/// Pause between two notices of how many requests are left.
const SAY: Duration = Duration::from_secs(1);
/// Pause between two looks whether viewers have gone.
const LOOK: Duration = Duration::from_millis(20);
/// Time for clients to be told, once nothing runs any more.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves what `load` loads until `stop` is done; requests that run then have `drain` to come to an end. Gives the model back.
///
/// While the model is being loaded, requests are told to come again.
///
/// # Errors
/// What `load` says, or that the model cannot be served.
pub async fn serve<E: From<HostError> + Send + 'static>(
    listener: TcpListener,
    app: Arc<App>,
    load: impl FnOnce() -> Result<Parts, E> + Send + 'static,
    stop: impl Future<Output = ()>,
    drain: Duration,
    notice: impl Fn(Notice),
) -> Result<Option<Arc<Host>>, E> {
    let graceful = GracefulShutdown::new();
    let mut accepting = Box::pin(connections::accept(listener, Arc::clone(&app), &graceful));
    let mut stop = pin!(stop);
    let name = app.name.clone();
    let mut loading = tokio::task::spawn_blocking(move || -> Result<Host, E> {
        let parts = load()?;
        Ok(Host::new(name, parts)?)
    });
    let loaded = tokio::select! {
        never = &mut accepting => match never {},
        () = &mut stop => None,
        loaded = &mut loading => Some(loaded),
    };
    match loaded {
        // What is half loaded is given up, as soon as whoever loads it notices.
        None => drop(timeout(drain, loading).await),
        Some(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
        Some(Ok(host)) => {
            app.loaded(Arc::new(host?));
            notice(Notice::Ready);
            tokio::select! {
                never = &mut accepting => match never {},
                () = &mut stop => {}
            }
        }
    }
    app.drain();
    drop(accepting);
    finish(&app, graceful, drain, &notice).await;
    let host = app.unload();
    if let Some(gallery) = host.as_ref().and_then(|host| host.gallery.as_ref()) {
        // Viewers were told when the draining began; most are gone already.
        let deadline = Instant::now() + FAREWELL;
        while gallery.viewers() > 0 && Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
        }
    }
    Ok(host)
}

/// Waits until requests are done, or there is no more time, and connections are closed.
async fn finish(app: &App, graceful: GracefulShutdown, drain: Duration, notice: &impl Fn(Notice)) {
    let deadline = Instant::now() + drain;
    let mut running = app.running();
    let mut closed = pin!(graceful.shutdown());
    let mut is_closed = false;
    let mut said = 0;
    loop {
        let left = *running.borrow_and_update();
        if left == 0 {
            break;
        }
        if left != said {
            notice(Notice::Left(left));
            said = left;
        }
        let pause = Instant::now() + SAY;
        tokio::select! {
            () = &mut closed, if !is_closed => is_closed = true,
            () = sleep_until(deadline) => {
                notice(Notice::Cancelled(left));
                app.cancel();
                let _ = timeout(FAREWELL, running.wait_for(|running| *running == 0)).await; // there is no more to do
                break;
            }
            () = sleep_until(pause) => {}
        }
    }
    if !is_closed {
        let _ = timeout(FAREWELL, closed).await; // there is no more to do
    }
}
