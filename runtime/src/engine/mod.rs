//! Many requests on one session: continuous batching, drafts that never change a token, and a prefix cache.
//!
//! [`Engine::submit`] hands a prompt to a thread that owns the session, and gives a [`Stream`] of its tokens. In each tick
//! the thread asks the scheduler for a batch of decoding sequences and parts of prompts, runs it as one [`Session::step`],
//! and hands out what was drawn. What a request is given does not depend on who shares its batches.

mod cache;
mod core;
pub mod disk;
mod drafting;
mod pool;
mod prefix;
mod request;
mod scheduler;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use crate::{Error, Result, Session};

pub use self::disk::DiskStats;
pub use self::drafting::Mtp;
pub use self::request::{Event, Finished, Request, Stream};
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
}

impl Default for EngineOptions {
    /// Drafts as long as they help, a prefix cache on the device, 1 GiB of texts.
    fn default() -> Self {
        Self { mtp: Mtp::Auto, prefix_cache: true, cache_dir: None, prefill_chunk: None, host_bytes: 1 << 30 }
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
        events: mpsc::Sender<Event>,
    },
    Cancel(u64),
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
    /// Bytes of all requests that were not done yet.
    host_bytes: Mutex<u64>,
    next_id: Mutex<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that a request is counted as: its tokens and those that it may come to, twice (here and in the session).
fn host_bytes(request: &Request) -> u64 {
    (request.prompt.len() as u64).saturating_add(request.max_new_tokens as u64).saturating_mul(8).saturating_add(1024)
}

/// Serves requests on a session. Dropping it cancels what is not done.
#[derive(Debug)]
pub struct Engine {
    commands: Commands,
    shared: Arc<Shared>,
    limit: u64,
    vocab_size: u32,
    max_context: usize,
    thread: Option<JoinHandle<Session>>,
}

impl Engine {
    /// Starts a thread that serves requests on `session`, which holds no sequence yet. As many requests run at once as
    /// the session has places for sequences.
    ///
    /// # Errors
    /// If the directory of the prefix cache cannot be used, or the thread cannot be started.
    pub fn new(session: Session, options: &EngineOptions) -> Result<Self> {
        let shared =
            Arc::new(Shared { stats: Mutex::default(), host_bytes: Mutex::default(), next_id: Mutex::default() });
        let (sender, receiver) = mpsc::channel();
        let plan = session.model().plan();
        let (vocab_size, max_context) = (plan.model.vocab_size, plan.model.max_context as usize);
        let core = Core::new(session, options, Arc::clone(&shared))?;
        let thread = std::thread::Builder::new().name("moewe engine".into());
        let thread = thread.spawn(move || core.serve(&receiver)).map_err(|source| Error::Thread { source })?;
        let (commands, limit, thread) = (Commands(sender), options.host_bytes, Some(thread));
        Ok(Self { commands, shared, limit, vocab_size, max_context, thread })
    }

    /// Hands in a request.
    ///
    /// # Errors
    /// What is wrong with the request; [`Error::QueueFull`] if there is no room for its text; [`Error::EngineStopped`].
    pub fn submit(&self, mut request: Request) -> Result<Stream> {
        crate::sequences::check_tokens(&request.prompt, 0, self.vocab_size, self.max_context)?;
        crate::sequences::check_sampling(&request.sampling)?;
        // More than this cannot come, and is not to be counted.
        request.max_new_tokens = request.max_new_tokens.min(self.max_context);
        let bytes = host_bytes(&request);
        {
            let mut used = lock(&self.shared.host_bytes);
            let after = used.saturating_add(bytes);
            if after > self.limit {
                return Err(Error::QueueFull { bytes, used: *used, limit: self.limit });
            }
            *used = after;
        }
        let id = {
            let mut next = lock(&self.shared.next_id);
            *next += 1;
            *next
        };
        let (events, receiver) = mpsc::channel();
        if !self.commands.send(Command::Submit { id, request, events }) {
            return Err(Error::EngineStopped);
        }
        Ok(Stream { id, events: receiver, commands: self.commands.clone(), ended: false })
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
