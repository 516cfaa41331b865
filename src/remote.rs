//! A model that a server runs as a source for the viewer: what happens comes over a websocket, texts to write go to the
//! server as any client's do.

mod connect;
mod follow;
mod write;

use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use moewe_viewer::recording::wire::Decoder;
use moewe_viewer::source::{Command, Event, Source, Status};
use moewe_viewer::subject::Subject;
use serde_json::{Map, Value};

pub use connect::{Error, Server};
use write::Writer;

/// Events that one poll hands out at most, so that a window stays smooth.
const EVENTS_PER_POLL: usize = 512;
/// Messages that are read ahead. When so many wait, the server is left waiting, which then leaves frames out.
const AHEAD: usize = 16;
/// Time for what a server shows of a text behind its answer.
const AFTERMATH: Duration = Duration::from_secs(5);

type Wake = Arc<Mutex<Option<Box<dyn Fn() + Send + Sync>>>>;

/// A server that is watched.
pub struct Remote {
    server: Server,
    messages: Receiver<Vec<Event>>,
    /// What is to be told at once.
    told: (Sender<Event>, Receiver<Event>),
    /// What comes next, of the message that was read last.
    events: VecDeque<Event>,
    /// Texts that are being written, by anyone.
    texts: BTreeSet<u32>,
    /// Texts that have ended.
    ended: usize,
    /// Nothing comes any more.
    lost: bool,
    writer: Writer,
    wake: Wake,
}

impl Remote {
    /// Watches all that a server writes from now on, and says what its model is. `taps` are as for `moewe view --taps`;
    /// `fields` belong to each request for a text, besides prompt, length, temperature and seed.
    ///
    /// # Errors
    /// If there is no such server, or if it refuses; what to do about it is said.
    pub fn connect(server: Server, taps: &str, fields: Map<String, Value>) -> Result<(Self, Subject), Error> {
        let (socket, decoder) = server.watch(taps)?;
        let subject = Decoder::subject(&decoder).clone();
        let wake = Wake::default();
        let (sender, messages) = sync_channel(AHEAD);
        let told = channel();
        let writer = Writer::new(&server, fields, told.0.clone(), Arc::clone(&wake))?;
        follow::spawn(server.clone(), taps.to_owned(), (socket, decoder), sender, Arc::clone(&wake));
        let (events, texts) = (VecDeque::new(), BTreeSet::new());
        Ok((Self { server, messages, told, events, texts, ended: 0, lost: false, writer, wake }, subject))
    }

    fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            match self.messages.try_recv() {
                Ok(events) => self.events = events.into(),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => {
                    self.lost = true;
                    return None;
                }
            }
        }
    }
}

impl Source for Remote {
    fn poll(&mut self) -> Vec<Event> {
        let mut events: Vec<Event> = self.told.1.try_iter().take(EVENTS_PER_POLL).collect();
        while events.len() < EVENTS_PER_POLL
            && let Some(event) = self.next()
        {
            match &event {
                Event::Begin(info) => drop(self.texts.insert(info.number)),
                Event::End { sequence, .. } => self.ended += usize::from(self.texts.remove(sequence)),
                _ => {}
            }
            events.push(event);
        }
        events
    }

    fn send(&mut self, command: Command) {
        match command {
            Command::Generate(request) => self.writer.write(request),
            Command::Stop => self.writer.stop(),
        }
    }

    fn status(&self) -> Status {
        let (open, answered, last) = self.writer.standing();
        // The answer comes by another way than what is shown of it.
        let is_behind = self.ended < answered && last.is_some_and(|last: Instant| last.elapsed() < AFTERMATH);
        let busy = open > 0 || !self.lost && (!self.texts.is_empty() || is_behind);
        let doing = match (self.texts.len(), open) {
            _ if !busy => String::new(),
            (0, 0) => "waiting for what is still on its way".into(),
            (0, _) => format!("waiting for {}", self.server.name()),
            (1, _) => "the server writes a text".into(),
            (texts, _) => format!("the server writes {texts} texts"),
        };
        Status { is_live: true, busy, doing, progress: None }
    }

    fn set_wake(&mut self, wake: Box<dyn Fn() + Send + Sync>) {
        wake(); // something may have come before
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }
}

/// Tells the window that there is news, if it asked for that.
fn call(wake: &Wake) {
    if let Some(wake) = &*wake.lock().unwrap_or_else(PoisonError::into_inner) {
        wake();
    }
}

#[cfg(test)]
mod tests;
