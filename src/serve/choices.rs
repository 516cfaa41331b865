//! The requests to the engine that one client's request takes.

use std::sync::Arc;

use moewe_runtime::Error;
use moewe_runtime::engine::{Event, Request};
use tokio::sync::mpsc;

use super::host::Host;
use crate::api::ApiError;

/// Requests to the engine, told apart by number. Dropping them cancels what is not done.
#[derive(Debug)]
pub struct Choices {
    host: Arc<Host>,
    sender: mpsc::UnboundedSender<(usize, Event)>,
    events: mpsc::UnboundedReceiver<(usize, Event)>,
    /// Number here and number at the engine of those that are not done.
    running: Vec<(usize, u64)>,
}

/// Where the engine tells its events. The channel has no bound, since the engine must not wait; a text does.
struct Ear {
    number: usize,
    sender: mpsc::UnboundedSender<(usize, Event)>,
    ended: bool,
}

impl Ear {
    fn hear(&mut self, event: Event) -> bool {
        self.ended = matches!(event, Event::Finished(_) | Event::Failed(_));
        self.sender.send((self.number, event)).is_ok()
    }
}

impl Drop for Ear {
    /// An engine whose thread has died tells nobody.
    fn drop(&mut self) {
        if !self.ended {
            self.hear(Event::Failed(Arc::new(Error::EngineStopped)));
        }
    }
}

impl Choices {
    /// None yet.
    pub fn new(host: Arc<Host>) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        Self { host, sender, events, running: Vec::new() }
    }

    /// How many are not done.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Hands a request to the engine.
    pub fn submit(&mut self, number: usize, request: Request) -> Result<(), ApiError> {
        let mut ear = Ear { number, sender: self.sender.clone(), ended: false };
        match self.host.engine.submit_to(request, move |event| ear.hear(event)) {
            Ok(id) => {
                self.running.push((number, id));
                Ok(())
            }
            Err(error) => Err(self.host.told(&error)),
        }
    }

    /// The next event of any; `None` once all are done.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        while !self.running.is_empty() {
            let (number, event) = self.events.recv().await?;
            // What comes behind a cancellation is of no interest, nor is that a refused request was dropped.
            let Some(at) = self.running.iter().position(|&(other, _)| other == number) else { continue };
            if matches!(event, Event::Finished(_) | Event::Failed(_)) {
                self.running.swap_remove(at);
            }
            return Some((number, event));
        }
        None
    }

    /// Ends a request; nothing more is heard of it.
    pub fn cancel(&mut self, number: usize) {
        if let Some(at) = self.running.iter().position(|&(other, _)| other == number) {
            let (_, id) = self.running.swap_remove(at);
            self.host.engine.cancel(id);
        }
    }
}

impl Drop for Choices {
    fn drop(&mut self) {
        for (_, id) in &self.running {
            self.host.engine.cancel(*id);
        }
    }
}
