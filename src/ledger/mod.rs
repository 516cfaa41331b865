//! Who may ask, what tokens cost, and what was used: API keys, prices, and a usage file in SQLite.
//!
//! Tokens are on record before they are handed out ([`Meter::tokens`] returns once they are), so that a server that is
//! killed has never handed out a token that is not in the file. It may have recorded one piece more per stream: the one it
//! was about to hand out. Where the file cannot be written, the request fails, and nothing is served unmetered.
//!
//! Several servers may write to one file; each knows within a second what keys spent at the others.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::oneshot;

mod amount;
mod error;
mod keys;
mod report;
mod store;
#[cfg(test)]
mod tests;
mod writer;

pub use amount::{Amount, AmountError, Price, Prices};
pub use error::LedgerError;
pub use keys::{ANONYMOUS, Key, KeyError, Keys};
pub use report::{By, Filter, Report, RequestRow, Row, Totals, Usage};

use store::{Head, Record, Store};
use writer::{Message, Spent};

/// Where the usage file is unless told: `moewe/usage.sqlite` in the user's folder for application data.
pub fn default_path() -> Result<PathBuf, LedgerError> {
    let folder = dirs::data_local_dir().ok_or(LedgerError::NoDefault)?;
    Ok(folder.join("moewe").join("usage.sqlite"))
}

/// [`default_path`], with its folder made if it is not there.
pub fn default_path_made() -> Result<PathBuf, LedgerError> {
    let path = default_path()?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|error| LedgerError::Open { path: path.clone(), reason: error.to_string() })?;
    }
    Ok(path)
}

/// What a request has used and costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Tokens of the prompt that the prefix cache had.
    pub prompt_hit_tokens: u64,
    /// Tokens of the prompt that were computed.
    pub prompt_miss_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
    /// What they cost together.
    #[serde(rename = "cost")]
    pub amount: Amount,
}

/// A key has spent what it may.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the key {key} has spent {spent} of its budget of {budget}")]
pub struct BudgetSpent {
    /// The key's name.
    pub key: String,
    /// What it has spent.
    pub spent: Amount,
    /// What it may spend.
    pub budget: Amount,
}

/// The usage file and the thread that writes it.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    writer: mpsc::Sender<Message>,
    thread: Option<JoinHandle<()>>,
    spent: Spent,
}

impl Ledger {
    /// Opens the usage file, or makes it, readable by its owner alone. Requests that a killed server left running are
    /// closed as `killed`, with the tokens and cost that are on record.
    ///
    /// # Errors
    ///
    /// A file that is damaged, of a later version or not ours is an error and is left as it is.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        Self::over(Store::open(path)?)
    }

    fn over(store: Store) -> Result<Self, LedgerError> {
        let path = store.path().to_owned();
        let spent = Spent::new(RwLock::new(store.spent()?));
        let (writer, inbox) = mpsc::channel();
        let told = Arc::clone(&spent);
        let thread = std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || writer::run(store, &inbox, &told))
            .map_err(|error| LedgerError::Open { path: path.clone(), reason: error.to_string() })?;
        Ok(Self { path, writer, thread: Some(thread), spent })
    }

    /// Begins to count for a request. It does not wait; the row is on record with the first tokens at the latest.
    pub fn begin(&self, key: &str, model: &str, prices: &Prices) -> Meter {
        let begun = now();
        // The crate counts within a millisecond, so that requests of one server sort as they began.
        let id = uuid::Uuid::now_v7().to_string();
        let head = Arc::new(Head { id, key: key.into(), model: model.into(), begun });
        let meter = Meter {
            head,
            prices: *prices,
            writer: self.writer.clone(),
            asked: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        };
        meter.send(0, 0, 0, Amount::ZERO, None, None);
        meter
    }

    /// What a key has spent, ever, as far as it is on record.
    pub fn spent(&self, key: &str) -> Amount {
        let spent: &HashMap<_, _> = &self.spent.read().unwrap_or_else(PoisonError::into_inner);
        spent.get(key).copied().unwrap_or_default()
    }

    /// Whether a key may begin another request. One that is running goes on, so that a key may exceed its budget by what
    /// its running requests still cost.
    pub fn check_budget(&self, key: &Key) -> Result<(), BudgetSpent> {
        let Some(budget) = key.budget() else { return Ok(()) };
        let spent = self.spent(key.name());
        if spent >= budget { Err(BudgetSpent { key: key.name().into(), spent, budget }) } else { Ok(()) }
    }

    /// What is on record.
    pub fn report(&self, filter: &Filter) -> Result<Report, LedgerError> {
        Usage::open(&self.path)?.report(filter)
    }
}

impl Drop for Ledger {
    /// Writes what is waiting. Requests that still run are closed as `stopped`, and what they count from now on fails.
    fn drop(&mut self) {
        let _ = self.writer.send(Message::Stop); // an error says that the thread has ended
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there has been told on standard error
        }
    }
}

/// Counts for one request. Dropped before its end, it closes the request as `cancelled`.
#[derive(Debug)]
pub struct Meter {
    head: Arc<Head>,
    prices: Prices,
    writer: mpsc::Sender<Message>,
    /// Picounits that were to be recorded, whether they were or not.
    asked: AtomicU64,
    ended: AtomicBool,
}

impl Meter {
    /// The request's id in the usage file. Ids sort by the time that requests began; those of one server within a millisecond too.
    pub fn id(&self) -> &str {
        &self.head.id
    }

    /// Records the tokens of the prompt: those that the prefix cache had, and those that it had not. It returns once they
    /// are on record. What is dropped before it returns is recorded or not.
    pub async fn prompt(&self, hit: u64, miss: u64) -> Result<(), LedgerError> {
        self.add(hit, miss, 0).await
    }

    /// Records generated tokens. It returns once they are on record, and only then may they be handed out. What is dropped
    /// before it returns is recorded or not.
    pub async fn tokens(&self, tokens: u64) -> Result<(), LedgerError> {
        self.add(0, 0, tokens).await
    }

    /// Ends the request, for a reason such as `stop` or `length`, and tells all that is on record of it. Should this fail,
    /// the tokens are on record all the same, and the end is written as soon as that is possible.
    pub async fn finish(&self, reason: &str) -> Result<Cost, LedgerError> {
        if self.ended.swap(true, Ordering::SeqCst) {
            return Err(LedgerError::Ended);
        }
        let (reply, answer) = oneshot::channel();
        self.send(0, 0, 0, Amount::ZERO, Some(reason), Some(reply));
        answer.await.unwrap_or(Err(LedgerError::Stopped))
    }

    async fn add(&self, hit: u64, miss: u64, completion: u64) -> Result<(), LedgerError> {
        if self.ended.load(Ordering::SeqCst) {
            return Err(LedgerError::Ended);
        }
        let cost = self.prices.cost(hit, miss, completion);
        let fits = |sum: u128| i64::try_from(sum).ok().map(|_| sum as u64);
        let cost_fits = self.asked.try_update(Ordering::SeqCst, Ordering::SeqCst, |asked| {
            fits(u128::from(asked).saturating_add(cost.picounits()))
        });
        if cost_fits.is_err() || [hit, miss, completion].iter().any(|tokens| *tokens > u64::from(u32::MAX)) {
            return Err(LedgerError::TooLarge);
        }
        let (reply, answer) = oneshot::channel();
        self.send(hit, miss, completion, cost, None, Some(reply));
        answer.await.unwrap_or(Err(LedgerError::Stopped)).map(|_| ())
    }

    /// Tells the thread. Should it have ended, the reply is dropped, which its receiver sees.
    fn send(
        &self,
        hit: u64,
        miss: u64,
        completion: u64,
        cost: Amount,
        reason: Option<&str>,
        reply: Option<oneshot::Sender<Result<Cost, LedgerError>>>,
    ) {
        let record = Record {
            head: Arc::clone(&self.head),
            prompt_hit: hit as i64,
            prompt_miss: miss as i64,
            completion: completion as i64,
            cost: cost.picounits() as i64,
            end: reason.map(|reason| (reason.to_owned(), now())),
        };
        let _ = self.writer.send(Message::Record(record, reply));
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            self.send(0, 0, 0, Amount::ZERO, Some("cancelled"), None);
        }
    }
}

/// Milliseconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
