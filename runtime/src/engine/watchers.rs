//! What taps show of all requests of an engine, for those who watch.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use moewe_plan::{FrameTensor, Numbers, TapChoice, TapFrame};

use super::lock;

/// Bytes that an event counts as, beside its numbers.
const EVENT_BYTES: u64 = 64;

/// What a watcher sees. A request's number is that of its stream, as far as 32 bits hold it.
#[derive(Clone, Debug)]
pub enum Watched {
    /// A request begins to run.
    Began {
        /// The request.
        request: u32,
        /// Its prompt.
        prompt: Vec<u32>,
    },
    /// Tokens were drawn.
    Tokens {
        /// The request.
        request: u32,
        /// The tokens, at least one.
        ids: Vec<u32>,
    },
    /// What the chosen taps showed of a pass, of those requests that are shown: [`moewe_plan::FrameToken::sequence`] is the
    /// request's number. It tells of known tokens alone, of each position at most once, and of a text's last token never,
    /// since that was drawn and not run. Numbers of frames ascend; gaps mean nothing.
    Frame(Arc<TapFrame>),
    /// So many frames were dropped here, for want of room.
    Dropped(u64),
    /// A request has ended.
    Ended {
        /// The request.
        request: u32,
        /// Why: a [`crate::StopReason`]'s name, or an error.
        reason: String,
        /// Tokens a second behind the first one.
        tokens_per_second: f64,
    },
}

impl Watched {
    fn bytes(&self) -> u64 {
        EVENT_BYTES
            + match self {
                Self::Began { prompt: ids, .. } | Self::Tokens { ids, .. } => ids.len() as u64 * 4,
                Self::Frame(frame) => frame_bytes(frame),
                Self::Dropped(_) => 0,
                Self::Ended { reason, .. } => reason.len() as u64,
            }
    }
}

fn frame_bytes(frame: &TapFrame) -> u64 {
    let numbers = |tensor: &FrameTensor| match &tensor.data {
        Numbers::F32(numbers) => numbers.len() as u64,
        Numbers::U32(numbers) => numbers.len() as u64,
    };
    let words = frame.tensors.iter().map(numbers).sum::<u64>() + frame.tokens.len() as u64 * 3;
    let steps = frame.times.as_ref().map_or(0, |times| times.starts.len() as u64);
    words * 4 + steps * 24 + frame.tensors.len() as u64 * EVENT_BYTES
}

#[derive(Debug, Default)]
struct Queued {
    events: VecDeque<Watched>,
    bytes: u64,
    /// Whether either end has gone.
    closed: bool,
}

/// Events on their way from the engine's thread to a watcher.
#[derive(Debug)]
pub(super) struct Queue {
    limit: u64,
    queued: Mutex<Queued>,
    changed: Condvar,
}

impl Queue {
    /// A queue of about so many bytes.
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, queued: Mutex::default(), changed: Condvar::new() })
    }

    pub(super) fn close(&self) {
        lock(&self.queued).closed = true;
        self.changed.notify_all();
    }

    fn is_closed(&self) -> bool {
        lock(&self.queued).closed
    }

    fn push(&self, event: Watched) {
        let mut queued = lock(&self.queued);
        let frames = match &event {
            Watched::Frame(_) => 1,
            Watched::Dropped(frames) => *frames,
            _ => 0,
        };
        let after = queued.bytes + event.bytes();
        let kept = match event {
            Watched::Frame(_) if after > self.limit => None,
            Watched::Dropped(_) => None,
            event => Some(event),
        };
        let event = match (kept, queued.events.back_mut()) {
            (Some(event), _) => event,
            (None, Some(Watched::Dropped(dropped))) => {
                *dropped += frames;
                return;
            }
            (None, _) => Watched::Dropped(frames),
        };
        queued.bytes += event.bytes();
        queued.events.push_back(event);
        // Texts are never dropped. Whoever leaves even these lying does not watch.
        queued.closed |= queued.bytes > self.limit.saturating_mul(2);
        drop(queued);
        self.changed.notify_all();
    }
}

/// Sees what the taps show of all requests of an engine that begin from now on: what is queued for it are at most
/// [`super::EngineOptions::watcher_bytes`] of frames. Dropping it ends that.
#[derive(Debug)]
pub struct Watcher {
    queue: Arc<Queue>,
}

impl Watcher {
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        Self { queue }
    }

    /// The next event, if there is one by then.
    pub fn recv_timeout(&self, timeout: Duration) -> Option<Watched> {
        let until = Instant::now() + timeout;
        let mut queued = lock(&self.queue.queued);
        loop {
            if let Some(event) = queued.events.pop_front() {
                queued.bytes -= event.bytes();
                return Some(event);
            }
            let left = until.saturating_duration_since(Instant::now());
            if queued.closed || left.is_zero() {
                return None;
            }
            queued =
                self.queue.changed.wait_timeout(queued, left).map_or_else(|error| error.into_inner().0, |(q, _)| q);
        }
    }

    /// Whether nothing can come any more: the engine has ended, or so much was left lying that even the texts found no room.
    pub fn is_closed(&self) -> bool {
        let queued = lock(&self.queue.queued);
        queued.closed && queued.events.is_empty()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut queued = lock(&self.queue.queued);
        queued.closed = true;
        let events = std::mem::take(&mut queued.events);
        drop(queued);
        drop(events);
    }
}

#[derive(Debug)]
struct One {
    taps: TapChoice,
    queue: Arc<Queue>,
    /// Requests that had begun before.
    since: u64,
}

/// The engine's end of all watchers.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    all: Vec<One>,
    /// Requests that have begun.
    begun: u64,
}

impl Watchers {
    pub(super) fn add(&mut self, taps: TapChoice, queue: Arc<Queue>) {
        self.purge();
        self.all.push(One { taps, queue, since: self.begun });
    }

    /// Forgets those that have gone.
    pub(super) fn purge(&mut self) {
        self.all.retain(|one| !one.queue.is_closed());
    }

    /// Tells all that nothing follows.
    pub(super) fn close(&mut self) {
        self.all.drain(..).for_each(|one| one.queue.close());
    }

    /// What they want, one after the other.
    pub(super) fn taps(&self) -> impl Iterator<Item = &TapChoice> {
        self.all.iter().map(|one| &one.taps)
    }

    /// Shows a request to all who are there now, and says as how many-th it began.
    pub(super) fn began(&mut self, request: u32, prompt: &[u32]) -> u64 {
        self.begun += 1;
        self.tell(self.begun, || Watched::Began { request, prompt: prompt.to_vec() });
        self.begun
    }

    /// Tells those to whom the request that began as `begun`-th is shown.
    pub(super) fn tell(&self, begun: u64, event: impl Fn() -> Watched) {
        self.all.iter().filter(|one| begun > one.since).for_each(|one| one.queue.push(event()));
    }

    /// Tells that frames were dropped before anybody could see them.
    pub(super) fn dropped(&self, frames: u64) {
        let taps = self.all.iter().filter(|one| frames > 0 && !one.taps.is_none());
        taps.for_each(|one| one.queue.push(Watched::Dropped(frames)));
    }

    /// Shows a frame. For each of its rows `begun` says as how many-th its request began.
    pub(super) fn frame(&self, frame: TapFrame, begun: &[u64]) {
        let frame = Arc::new(frame);
        for one in &self.all {
            let rows: Vec<bool> = begun.iter().map(|&begun| begun > one.since).collect();
            let tensors: Vec<bool> =
                frame.tensors.iter().map(|tensor| one.taps.wants(tensor.group, tensor.layer)).collect();
            let times = one.taps.timing && frame.times.is_some();
            if !rows.contains(&true) || !(tensors.contains(&true) || times) {
                continue;
            }
            let whole = !rows.contains(&false) && !tensors.contains(&false) && times == frame.times.is_some();
            let seen = if whole { Arc::clone(&frame) } else { Arc::new(part(&frame, &rows, &tensors, times)) };
            one.queue.push(Watched::Frame(seen));
        }
    }
}

/// Some rows and tensors of a frame.
pub(super) fn part(frame: &TapFrame, rows: &[bool], tensors: &[bool], times: bool) -> TapFrame {
    let tensor = |tensor: &FrameTensor| {
        let data = match &tensor.data {
            Numbers::F32(numbers) => Numbers::F32(some_rows(numbers, tensor.columns, rows)),
            Numbers::U32(numbers) => Numbers::U32(some_rows(numbers, tensor.columns, rows)),
        };
        FrameTensor { data, name: Arc::clone(&tensor.name), ..*tensor }
    };
    TapFrame {
        number: frame.number,
        tokens: frame.tokens.iter().zip(rows).filter(|(_, wanted)| **wanted).map(|(token, _)| *token).collect(),
        tensors: frame.tensors.iter().zip(tensors).filter(|(_, wanted)| **wanted).map(|(t, _)| tensor(t)).collect(),
        times: frame.times.clone().filter(|_| times),
    }
}

fn some_rows<T: Copy>(numbers: &[T], columns: u32, rows: &[bool]) -> Vec<T> {
    let all = numbers.chunks(columns.max(1) as usize).zip(rows);
    all.filter(|(_, wanted)| **wanted).flat_map(|(row, _)| row.iter().copied()).collect()
}

/// All that these want, together.
pub(super) fn union<'a>(choices: impl Iterator<Item = &'a TapChoice>) -> TapChoice {
    let mut all = TapChoice::none();
    for choice in choices {
        all.timing |= choice.timing;
        for &(group, layer) in &choice.groups {
            if !all.wants(group, Some(layer.unwrap_or(u32::MAX))) {
                all.groups.push((group, layer));
            }
        }
    }
    all
}
