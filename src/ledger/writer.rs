//! The thread that writes the usage file.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::oneshot;

use super::store::{Record, Store};
use super::{Amount, Cost, LedgerError};

/// Records that are written together at most.
const GROUP: usize = 4096;
/// Ends of requests that could not be written and are tried again, at most. Without its end, a row says that the request
/// runs until the next server closes it; its tokens are right all the same.
const LATE: usize = 65_536;
/// How often it is looked whether other servers wrote to the file.
const LOOK: Duration = Duration::from_secs(1);

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Message {
    /// Write this, and say when it is on record.
    Record(Record, Option<oneshot::Sender<Result<Cost, LedgerError>>>),
    /// Write what came before, and end.
    Stop,
}

/// What each key has spent, as far as this process knows.
pub(super) type Spent = Arc<RwLock<HashMap<String, Amount>>>;

/// Writes records until it is told to stop. Those that wait are written together, so that any number of streams costs one
/// commit at a time.
pub(super) fn run(mut store: Store, inbox: &Receiver<Message>, spent: &Spent) {
    let mut late: Vec<Record> = Vec::new();
    let mut stopped = false;
    while !stopped {
        let mut records = Vec::new();
        let mut replies = Vec::new();
        let mut next = inbox.recv_timeout(LOOK);
        loop {
            match next {
                Ok(Message::Record(record, reply)) => {
                    records.push(record);
                    replies.push(reply);
                }
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => stopped = true,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if stopped || records.is_empty() || records.len() == GROUP {
                break;
            }
            next = match inbox.try_recv() {
                Ok(message) => Ok(message),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
            };
        }
        match commit(&mut store, &records, spent) {
            Ok(costs) => {
                for (cost, reply) in costs.into_iter().zip(replies) {
                    reply.map(|reply| reply.send(Ok(cost))); // whoever no longer waits needs no answer
                }
            }
            Err(error) => {
                for reply in replies.into_iter().flatten() {
                    let _ = reply.send(Err(error.clone())); // as above
                }
                late.extend(records.into_iter().filter(|record| record.end.is_some()));
                late.truncate(LATE);
                continue;
            }
        }
        if !late.is_empty() && commit(&mut store, &late, spent).is_ok() {
            late.clear();
        }
        // What cannot be read now was read before, and is tried again in a second.
        if let Ok(Some(all)) = store.spent_elsewhere() {
            *spent.write().unwrap_or_else(PoisonError::into_inner) = all;
        }
    }
    // An error here leaves rows that say `running`, which the next server closes.
    let _ = commit(&mut store, &late, spent);
    let _ = store.close();
}

/// Writes records, if there are any, and keeps account of what their keys spent.
fn commit(store: &mut Store, records: &[Record], spent: &Spent) -> Result<Vec<Cost>, LedgerError> {
    if records.is_empty() {
        return Ok(Vec::new());
    }
    let committed = store.commit(records)?;
    spent.write().unwrap_or_else(PoisonError::into_inner).extend(committed.spent);
    Ok(committed.costs)
}
