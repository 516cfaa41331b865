//! Two recordings as one source, to compare them.

use moewe_viewer::source::{Command, Event, Replay, Source, Status};

/// Numbers of the second recording's texts begin here.
const SECOND: u32 = 1 << 24;

/// The events of both, one after the other.
pub struct Joined {
    sources: [Box<dyn Source>; 2],
    /// What the second one's texts are called besides their names.
    name: String,
}

impl Joined {
    /// Both from their beginnings to their ends.
    pub fn new(mut sources: [Box<dyn Source>; 2], name: &str) -> Self {
        for replay in sources.iter_mut().filter_map(|source| source.replay()) {
            replay.seek(replay.len());
        }
        Self { sources, name: name.into() }
    }

    /// An event of the second recording, among those of the first.
    fn shifted(&self, event: Event) -> Option<Event> {
        Some(match event.shifted(SECOND, 0) {
            // Both are shown from the beginning, so nothing is ever to be cleared.
            Event::Reset => return None,
            Event::Begin(mut info) => {
                info.name = format!("{}: {}", self.name, info.name);
                Event::Begin(info)
            }
            other => other,
        })
    }
}

impl Source for Joined {
    fn poll(&mut self) -> Vec<Event> {
        let mut events = self.sources[0].poll();
        let second = self.sources[1].poll();
        events.extend(second.into_iter().filter_map(|event| self.shifted(event)));
        events
    }

    fn send(&mut self, command: Command) {
        self.sources[0].send(command);
    }

    fn status(&self) -> Status {
        let [first, second] = [self.sources[0].status(), self.sources[1].status()];
        if first.busy { first } else { second }
    }

    fn set_wake(&mut self, wake: Box<dyn Fn() + Send + Sync>) {
        let wake = std::sync::Arc::new(wake);
        for source in &mut self.sources {
            let wake = std::sync::Arc::clone(&wake);
            source.set_wake(Box::new(move || wake()));
        }
    }

    fn replay(&mut self) -> Option<&mut dyn Replay> {
        None
    }
}
