//! What all requests share.

use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::connections::Limits;
use super::host::Host;
use super::metrics::{EngineNumbers, Metrics};
use crate::api::ApiError;
use crate::ledger::{Keys, Ledger, Prices};

/// What is written to standard error about requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Log {
    /// Nothing.
    #[default]
    Nothing,
    /// A line for each request.
    Requests,
    /// What is asked, too.
    Prompts,
}

/// Who may ask, and what is kept of it.
#[derive(Debug)]
pub struct Policy {
    /// Who may ask.
    pub keys: Keys,
    /// What tokens cost; `None`: nobody is told a cost.
    pub prices: Option<Prices>,
    /// Where the usage is on record.
    pub ledger: Ledger,
    /// What is logged.
    pub log: Log,
}

/// What all requests share.
#[derive(Debug)]
pub struct App {
    /// What clients may do.
    pub limits: Limits,
    /// Who may ask, and what is kept of it.
    pub policy: Policy,
    /// The served model's name.
    pub name: String,
    /// Figures, once there is a model.
    metrics: OnceLock<Metrics>,
    /// Bytes of bodies.
    bodies: Arc<Semaphore>,
    /// The model, once it is loaded.
    host: RwLock<Option<Arc<Host>>>,
    draining: CancellationToken,
    running: watch::Sender<usize>,
    cancelled: CancellationToken,
    /// Turns for work that keeps a core busy.
    turns: Arc<Semaphore>,
}

/// Seconds after which a request may find the model loaded, or another server.
const RETRY_LOADING: u32 = 5;

impl App {
    /// Of a server whose model, to be served under a name, is still being loaded.
    pub fn new(name: String, policy: Policy, limits: Limits) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Arc::new(Self {
            metrics: OnceLock::new(),
            bodies: Arc::new(Semaphore::new(limits.bodies_bytes)),
            limits,
            policy,
            name,
            host: RwLock::default(),
            draining: CancellationToken::new(),
            running: watch::Sender::new(0),
            cancelled: CancellationToken::new(),
            turns: Arc::new(Semaphore::new(cores)),
        })
    }

    /// From now on requests are served, unless the server is coming to an end already.
    pub fn loaded(&self, host: Arc<Host>) {
        let _ = self.metrics.set(Metrics::new(&self.name, host.max_context() as u64)); // it is set once
        *self.host.write().unwrap_or_else(PoisonError::into_inner) = Some(host);
    }

    /// From now on requests are refused.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Whether the server is coming to an end.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// Gives the model back.
    pub fn unload(&self) -> Option<Arc<Host>> {
        self.host.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The model, even one that answers no more.
    fn any_host(&self) -> Option<Arc<Host>> {
        self.host.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The model; 503 if there is none (yet, or any more).
    pub fn host(&self) -> Result<Arc<Host>, ApiError> {
        if self.draining.is_cancelled() {
            return Err(ending());
        }
        let host = self.any_host();
        let host = host.ok_or_else(|| ApiError::unavailable("the model is still being loaded", RETRY_LOADING))?;
        match host.lost() {
            Some(why) => Err(ApiError::unavailable(why, RETRY_LOADING)),
            None => Ok(host),
        }
    }

    /// Why nothing will ever be served again, if that is so.
    pub fn broken(&self) -> Option<String> {
        self.any_host()?.lost()
    }

    /// Figures; nothing is counted before there is a model.
    pub fn metrics(&self) -> Option<&Metrics> {
        self.metrics.get()
    }

    /// All figures as text.
    pub fn figures(&self) -> Result<String, ApiError> {
        let (Some(host), Some(metrics)) = (self.any_host(), self.metrics()) else {
            return self.host().map(|_| String::new());
        };
        let stats = host.engine.stats();
        Ok(metrics.render(&EngineNumbers {
            running: stats.running as u64,
            waiting: stats.waiting as u64,
            pages: stats.pages as u64,
            free_pages: stats.free_pages as u64,
            cached_pages: stats.cached_pages as u64,
            hit_tokens: stats.hit_tokens,
            miss_tokens: stats.miss_tokens,
            new_tokens: stats.new_tokens,
            preempted: stats.preempted,
            acceptance: stats.acceptance,
        }))
    }

    /// Notes a request that is worked on until what is returned is dropped.
    pub fn begin(self: &Arc<Self>) -> Running {
        self.running.send_modify(|running| *running += 1);
        Running(Arc::clone(self))
    }

    /// How many requests are worked on, from now on.
    pub fn running(&self) -> watch::Receiver<usize> {
        self.running.subscribe()
    }

    /// Ends what is running.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// Whether what is running is to be cut short.
    pub fn cancelled(&self) -> &CancellationToken {
        &self.cancelled
    }

    /// Does work that keeps a core busy, beside the threads that serve connections and as many at once as there are cores.
    pub async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let turn = Arc::clone(&self.turns).acquire_owned().await.map_err(|_| ending())?;
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        done.await.unwrap_or_else(|_| Err(panicked()))
    }

    /// Keeps room for so many bytes of a body; 503 if there is none.
    pub fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.bodies).try_acquire_many_owned(bytes);
        room.map_err(|_| ApiError::unavailable("too many bytes are being sent to the server at once", 1))
    }
}

/// 503: the server is coming to an end.
pub fn ending() -> ApiError {
    ApiError::unavailable("the server is shutting down", RETRY_LOADING)
}

/// 500: a panic, of which the client learns no more.
pub fn panicked() -> ApiError {
    ApiError::server("the server failed at this request; others go on")
}

/// A request is worked on.
#[derive(Debug)]
pub struct Running(Arc<App>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.send_modify(|running| *running -= 1);
    }
}
