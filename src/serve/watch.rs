//! What taps show of all requests, for viewers: `GET /v1/watch?taps=routing,latents` as a websocket. Its messages are the
//! pieces of a recording (`docs/recording.md`): first what describes the model, then a chunk each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use futures_util::{SinkExt, StreamExt};
use moewe_plan::TapChoice;
use moewe_runtime::engine::{Watched, Watcher};
use moewe_viewer::recording::wire::{Encoder, beginning};
use moewe_viewer::source::Event;
use moewe_viewer::store::{SequenceInfo, Token};
use moewe_viewer::subject::Subject;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

/// Viewers at once.
pub const MAX_VIEWERS: usize = 8;
/// Events are gathered for so long before they are sent.
const BATCH: Duration = Duration::from_millis(50);
/// How often a thread that waits for events looks whether anybody wants them.
const LOOK: Duration = Duration::from_millis(500);
/// A viewer that takes nothing for so long is let go.
const STALL: Duration = Duration::from_secs(30);
/// Pauses between pings, which find viewers that have gone without a word.
const PING: Duration = Duration::from_secs(20);
/// A viewer that is not heard of for so long, not even its answers to pings, is let go.
const SILENCE: Duration = Duration::from_secs(70);
/// Largest message that a viewer may send: it has nothing to say.
const MAX_INCOMING: usize = 4 << 10;

/// Where events come from.
pub trait Watching: Send + 'static {
    /// The next event, if there is one by then.
    fn recv_timeout(&self, timeout: Duration) -> Option<Watched>;
    /// Whether nothing can come any more.
    fn is_closed(&self) -> bool;
}

impl Watching for Watcher {
    fn recv_timeout(&self, timeout: Duration) -> Option<Watched> {
        Watcher::recv_timeout(self, timeout)
    }

    fn is_closed(&self) -> bool {
        Watcher::is_closed(self)
    }
}

/// What viewers are shown, and room for them.
#[derive(Debug)]
pub struct Gallery {
    subject: Arc<Subject>,
    beginning: Vec<u8>,
    seats: Arc<Semaphore>,
}

/// A viewer's place, until it is dropped.
#[derive(Debug)]
pub struct Seat {
    _permit: OwnedSemaphorePermit,
}

impl Gallery {
    /// For a model.
    ///
    /// # Errors
    /// What is wrong with a model that no recording can describe.
    pub fn new(subject: Subject) -> Result<Self, String> {
        let beginning = beginning(&subject)?;
        Ok(Self { subject: Arc::new(subject), beginning, seats: Arc::new(Semaphore::new(MAX_VIEWERS)) })
    }

    /// A place for one more viewer, to be taken before the websocket is agreed on; `None` if all [`MAX_VIEWERS`] are taken.
    pub fn seat(&self) -> Option<Seat> {
        Arc::clone(&self.seats).try_acquire_owned().ok().map(|permit| Seat { _permit: permit })
    }

    /// Viewers that there are.
    pub fn viewers(&self) -> usize {
        MAX_VIEWERS - self.seats.available_permits()
    }
}

/// The taps that a query asks for: routing if it does not say.
///
/// # Errors
/// What is wrong with them.
pub fn taps(asked: Option<&str>) -> Result<TapChoice, String> {
    asked.unwrap_or("routing").parse()
}

/// A websocket on which nobody can send much.
pub fn limited(upgrade: WebSocketUpgrade) -> WebSocketUpgrade {
    upgrade.max_message_size(MAX_INCOMING).max_frame_size(MAX_INCOMING).write_buffer_size(0)
}

/// Tells a viewer what happens until it goes, the events end, or `stop` says so. A viewer that is slow loses frames (what
/// it does not take stays in the watcher, whose room is bounded) and never holds anybody up.
pub async fn serve(
    socket: WebSocket,
    gallery: Arc<Gallery>,
    seat: Seat,
    watching: impl Watching,
    stop: CancellationToken,
) {
    let (sender, receiver) = channel(1);
    let subject = Arc::clone(&gallery.subject);
    let gathering = tokio::task::spawn_blocking(move || gather(&watching, subject, &sender));
    send(socket, gallery.beginning.clone(), receiver, &stop).await;
    // The thread sees that the channel is closed. Until then the place is not free.
    let _ = gathering.await;
    drop(seat);
}

/// Makes messages of events, until nobody takes them or none come.
fn gather(watching: &impl Watching, subject: Arc<Subject>, sender: &Sender<Vec<u8>>) {
    let mut encoder = Encoder::new(subject);
    while !sender.is_closed() {
        let Some(first) = watching.recv_timeout(LOOK) else {
            if watching.is_closed() {
                return;
            }
            continue;
        };
        let until = Instant::now() + BATCH;
        let mut next = Some(first);
        while let Some(watched) = next {
            push(&mut encoder, watched);
            let left = until.saturating_duration_since(Instant::now());
            next = if encoder.is_ready() || left.is_zero() { None } else { watching.recv_timeout(left) };
        }
        // What cannot be sent was left out; what came with it is in the next messages.
        for message in encoder.messages().unwrap_or_default() {
            if sender.blocking_send(message).is_err() {
                return;
            }
        }
    }
}

/// Takes in what happened. A frame that cannot be sent counts as dropped.
fn push(encoder: &mut Encoder, watched: Watched) {
    let mut push = |event: Event| encoder.push(&event);
    let tokens = |ids: Vec<u32>, generated| ids.into_iter().map(move |id| Token { id, generated });
    match watched {
        Watched::Began { request, prompt } => {
            let (name, prompt_tokens) = (format!("request {request}"), prompt.len() as u32);
            let info = SequenceInfo { number: request, name, prompt_tokens, ..SequenceInfo::default() };
            let _ = push(Event::Begin(info));
            for token in tokens(prompt, false) {
                let _ = push(Event::Token { sequence: request, token });
            }
        }
        Watched::Tokens { request, ids } => {
            for token in tokens(ids, true) {
                let _ = push(Event::Token { sequence: request, token });
            }
        }
        Watched::Frame(frame) => {
            if push(Event::Frame(Arc::unwrap_or_clone(frame))).is_err() {
                let _ = push(Event::Dropped(1));
            }
        }
        Watched::Dropped(frames) => {
            let _ = push(Event::Dropped(frames));
        }
        Watched::Ended { request, reason, tokens_per_second } => {
            let _ = push(Event::End { sequence: request, reason, tokens_per_second });
        }
    }
}

/// Sends messages, and says at the end why no more come, unless the viewer has gone.
async fn send(socket: WebSocket, beginning: Vec<u8>, mut messages: Receiver<Vec<u8>>, stop: &CancellationToken) {
    let (mut sink, mut stream) = socket.split();
    let mut pings = interval(PING);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let mut next = Some(Message::Binary(beginning.into()));
    let (code, reason) = loop {
        if let Some(message) = next.take() {
            let sent = tokio::select! {
                sent = timeout(STALL, sink.send(message)) => sent,
                () = stop.cancelled() => break (close_code::AWAY, "the server stops"),
            };
            match sent {
                Ok(Ok(())) => {}
                // It has gone, or takes nothing: there is nobody to tell.
                Ok(Err(_)) | Err(_) => return,
            }
        }
        tokio::select! {
            () = stop.cancelled() => break (close_code::AWAY, "the server stops"),
            message = messages.recv() => match message {
                Some(message) => next = Some(Message::Binary(message.into())),
                None => break (close_code::AGAIN, "nothing more can be shown: too slow, or the model has ended"),
            },
            incoming = stream.next() => match incoming {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => heard = Instant::now(),
            },
            _ = pings.tick() => {
                if heard.elapsed() > SILENCE {
                    return;
                }
                next = Some(Message::Ping(Vec::new().into()));
            }
        }
    };
    let close = Message::Close(Some(CloseFrame { code, reason: reason.into() }));
    let _ = timeout(Duration::from_secs(1), sink.send(close)).await; // it may have gone
}
