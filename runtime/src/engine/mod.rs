//! Many requests on one session: continuous batching, drafts that never change a token, and a prefix cache.
//!
//! [`Engine::submit`] hands a prompt to a thread that owns the session, and gives a [`Stream`] of its tokens. In each tick
//! the thread asks the scheduler for a batch of decoding sequences and parts of prompts, runs it as one [`Session::step`],
//! and hands out what was drawn. What a request is given does not depend on who shares its batches.

mod cache;
mod constraint;
mod core;
mod delivery;
pub mod disk;
mod drafting;
mod experts;
mod pool;
mod prefix;
mod request;
mod scheduler;
mod watchers;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use moewe_plan::{Precision, TapChoice};

use crate::{Error, Model, Result, Session};

pub use self::constraint::Constraint;
pub use self::disk::DiskStats;
pub use self::drafting::Mtp;
use self::experts::Routing;
use self::request::Sink;
pub use self::request::{Event, Finished, Logprobs, Request, Stream, Tokens};
use self::watchers::Queue;
pub use self::watchers::{Watched, Watcher};
use core::Core;

/// How an engine works.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Whether modules of multi-token prediction draft. The session must have been made with their programs.
    pub mtp: Mtp,
    /// Whether latents are kept for later requests that begin alike.
    pub prefix_cache: bool,
    /// Where they are kept beyond the engine's life, and how many bytes at most.
    pub cache_dir: Option<(PathBuf, u64)>,
    /// Most tokens of prompts in one pass; as many as a program takes, without it.
    pub prefill_chunk: Option<usize>,
    /// Bytes of host memory for prompts and texts; a request for which there is no room is refused.
    pub host_bytes: u64,
    /// Most requests that wait for a place, without it as many as there is room for. Another one is refused.
    pub max_waiting: Option<usize>,
    /// Bytes of frames that a watcher may leave lying; what does not fit is dropped for it. One that leaves lying as much again
    /// of texts is closed.
    pub watcher_bytes: u64,
}

impl Default for EngineOptions {
    /// Drafts as long as they help, a prefix cache on the device, 1 GiB of texts, 64 MiB of frames for each watcher.
    fn default() -> Self {
        Self {
            mtp: Mtp::Auto,
            prefix_cache: true,
            cache_dir: None,
            prefill_chunk: None,
            host_bytes: 1 << 30,
            max_waiting: None,
            watcher_bytes: 64 << 20,
        }
    }
}

/// Figures of an engine since it was made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Pages of the latent cache.
    pub pages: usize,
    /// Those that nobody holds.
    pub free_pages: usize,
    /// Those that the prefix cache holds.
    pub cached_pages: usize,
    /// Requests that are done, whatever the reason.
    pub requests: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Those of them that were cancelled.
    pub cancelled: u64,
    /// Tokens of prompts whose latents the prefix cache had.
    pub hit_tokens: u64,
    /// Tokens of prompts that it did not have.
    pub miss_tokens: u64,
    /// Tokens of prompts that were run, those of requests that were computed again counted again.
    pub prefill_tokens: u64,
    /// Tokens that were drawn.
    pub new_tokens: u64,
    /// Passes over a batch.
    pub passes: u64,
    /// Requests whose pages were taken for others.
    pub preempted: u64,
    /// For each position behind a token, how many drafts were verified there and how many of them accepted.
    pub acceptance: Vec<(u64, u64)>,
    /// Bytes that the requests' texts are counted as.
    pub host_bytes: u64,
    /// The disk's part of the prefix cache, if there is one.
    pub disk: Option<DiskStats>,
    /// What went wrong without ending anything, once for each kind.
    pub warnings: Vec<String>,
}

/// What an engine's thread is told.
#[derive(Debug)]
enum Command {
    Submit {
        id: u64,
        request: Request,
        /// What it counts as.
        bytes: u64,
        sink: Sink,
    },
    Cancel(u64),
    Watch {
        taps: TapChoice,
        queue: Arc<Queue>,
    },
    /// Forget the prefix cache in the device's memory.
    Clear(mpsc::Sender<()>),
    /// Write what is still to be written.
    Flush(mpsc::Sender<()>),
    /// Come to an end, and write what is still to be written.
    Stop,
}

/// The way to an engine's thread.
#[derive(Clone, Debug)]
struct Commands(mpsc::Sender<Command>);

impl Commands {
    /// Whether the thread is still there.
    fn send(&self, command: Command) -> bool {
        self.0.send(command).is_ok()
    }
}

/// What an engine and its thread both see.
#[derive(Debug)]
struct Shared {
    stats: Mutex<Stats>,
    held: Mutex<Held>,
    next_id: Mutex<u64>,
}

/// What requests hold until they are done.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    requests: usize,
    /// Bytes of their texts.
    bytes: u64,
    /// Those of them for which there was no place in the last tick.
    waiting: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls what others have written, which may panic: `None` then.
fn guarded<T>(call: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).ok()
}

/// Bytes that a request is counted as: its tokens and those that it may come to, twice (here and in the session), and the
/// experts of each, if they are to be told.
fn host_bytes(request: &Request, routing: &Routing) -> u64 {
    let experts = if request.experts { routing.row() as u64 * 2 } else { 0 };
    let tokens = (request.prompt.len() as u64).saturating_add(request.max_new_tokens as u64);
    tokens.saturating_mul(8 + experts).saturating_add(1024)
}

/// Serves requests on a session. Dropping it cancels what is not done.
#[derive(Debug)]
pub struct Engine {
    commands: Commands,
    shared: Arc<Shared>,
    options: EngineOptions,
    model: Arc<Model>,
    routing: Routing,
    precision: Precision,
    /// Whether the session can be watched.
    watch: bool,
    /// Requests that run at once.
    places: usize,
    thread: Option<JoinHandle<Session>>,
}

impl Engine {
    /// Starts a thread that serves requests on `session`, which holds no sequence yet. As many requests run at once as
    /// the session has places for sequences. Experts can be told, and requests watched, if the session was made with
    /// [`crate::SessionOptions::watch`]; what that chooses is not read here, [`Engine::watch`] says what is.
    ///
    /// # Errors
    /// If the directory of the prefix cache cannot be used, or the thread cannot be started.
    pub fn new(session: Session, options: &EngineOptions) -> Result<Self> {
        let shared = Arc::new(Shared { stats: Mutex::default(), held: Mutex::default(), next_id: Mutex::default() });
        let (sender, receiver) = mpsc::channel();
        let model = Arc::clone(session.model());
        let (precision, watch) = (session.options().precision, session.options().watch.is_some());
        let places = session.options().max_sequences.max(1) as usize;
        let core = Core::new(session, options, Arc::clone(&shared))?;
        let thread = std::thread::Builder::new().name("moewe engine".into());
        let thread = thread.spawn(move || core.serve(&receiver)).map_err(|source| Error::Thread { source })?;
        let (commands, options, routing) = (Commands(sender), options.clone(), Routing::of(model.plan()));
        Ok(Self { commands, shared, options, model, routing, precision, watch, places, thread: Some(thread) })
    }

    /// Hands in a request.
    ///
    /// # Errors
    /// What is wrong with the request; [`Error::QueueFull`] if there is no room for its text, [`Error::TooManyWaiting`] if
    /// there is no place for it, [`Error::NotPrepared`] if the session cannot tell what it asks for;
    /// [`Error::EngineStopped`].
    pub fn submit(&self, request: Request) -> Result<Stream> {
        let (sender, events) = mpsc::channel();
        let id = self.submit_to(request, move |event| sender.send(event).is_ok())?;
        Ok(Stream { id, events, commands: self.commands.clone(), ended: false })
    }

    /// Hands in a request whose events go to `sink`, and gives its number, for [`Engine::cancel`]. The sink is called on the
    /// engine's thread, maybe before this returns: it must not wait, neither for others nor for the engine. If it says
    /// `false` (or panics), the request ends and the sink is never called again; it is not called after
    /// [`Event::Finished`] or [`Event::Failed`], either.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn submit_to(&self, mut request: Request, sink: impl FnMut(Event) -> bool + Send + 'static) -> Result<u64> {
        let plan = self.model.plan();
        request.check(&plan.model)?;
        if request.experts {
            self.routing.check(plan, self.precision, self.watch)?;
        }
        // More than this cannot come, and is not to be counted.
        request.max_new_tokens = request.max_new_tokens.min(plan.model.max_context as usize);
        let bytes = host_bytes(&request, &self.routing);
        self.hold(bytes)?;
        let id = {
            let mut next = lock(&self.shared.next_id);
            *next += 1;
            *next
        };
        let sink = Sink::new(sink);
        if self.commands.send(Command::Submit { id, request, bytes, sink }) {
            Ok(id)
        } else {
            Err(Error::EngineStopped)
        }
    }

    /// Keeps a place and room for a request.
    fn hold(&self, bytes: u64) -> Result<()> {
        let mut held = lock(&self.shared.held);
        if let Some(limit) = self.options.max_waiting {
            // Places may stay free for want of pages.
            let waiting = held.waiting.max(held.requests.saturating_sub(self.places));
            if held.requests >= self.places.saturating_add(limit) || (waiting > 0 && waiting >= limit) {
                return Err(Error::TooManyWaiting { waiting, limit });
            }
        }
        let after = held.bytes.saturating_add(bytes);
        if after > self.options.host_bytes {
            return Err(Error::QueueFull { bytes, used: held.bytes, limit: self.options.host_bytes });
        }
        held.bytes = after;
        held.requests += 1;
        Ok(())
    }

    /// Shows what these taps read of all requests that begin to run from now on, and their texts; no taps, the texts alone.
    /// While there are taps to read, nobody drafts.
    ///
    /// # Errors
    /// [`Error::NotPrepared`] if there are taps to read and the session was made without
    /// [`crate::SessionOptions::watch`]; [`Error::EngineStopped`].
    pub fn watch(&self, taps: TapChoice) -> Result<Watcher> {
        if !taps.is_none() && !self.watch {
            return Err(Error::NotPrepared { kind: moewe_plan::ProgramKind::Watch, place: "session" });
        }
        let queue = Queue::new(self.options.watcher_bytes);
        if !self.commands.send(Command::Watch { taps, queue: Arc::clone(&queue) }) {
            return Err(Error::EngineStopped);
        }
        Ok(Watcher::new(queue))
    }

    /// Ends a request soon; its stream tells so. One that is done, or unknown, is left alone.
    pub fn cancel(&self, id: u64) {
        self.commands.send(Command::Cancel(id));
    }

    /// Forgets what the prefix cache has in the device's memory, as far as no request uses it.
    pub fn clear_cache(&self) {
        self.told(Command::Clear);
    }

    /// Writes what the prefix cache on disk is still to have. The figures tell afterwards what could not be written.
    pub fn flush(&self) {
        self.told(Command::Flush);
    }

    /// Waits until a command was obeyed. An engine that has ended has cleared and written everything.
    fn told(&self, command: impl FnOnce(mpsc::Sender<()>) -> Command) {
        let (sender, receiver) = mpsc::channel();
        if self.commands.send(command(sender)) {
            let _ = receiver.recv();
        }
    }

    /// Figures as of the last tick.
    pub fn stats(&self) -> Stats {
        lock(&self.shared.stats).clone()
    }

    /// Cancels what is not done, writes what the disk is still to have, and gives the session back, without sequences.
    ///
    /// # Errors
    /// [`Error::EngineStopped`] if its thread has panicked.
    pub fn stop(mut self) -> Result<Session> {
        self.commands.send(Command::Stop);
        let thread = self.thread.take();
        thread.and_then(|thread| thread.join().ok()).ok_or(Error::EngineStopped)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // whoever waits for its requests has been told
        }
    }
}
