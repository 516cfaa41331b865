//! The usage file: its schema, its opening, and how records get into it.
//!
//! It is in WAL mode with `synchronous = NORMAL`. A commit then is a write to the log without a sync: what was committed
//! is the system's and survives the end of this process, `kill -9` included. Loss of power may take the last commits with
//! it, but never consistency, since the log is synced before it is moved into the file. `OFF` would give that up for one
//! sync in a thousand pages; `FULL` would add a sync to each commit, and so to the wait for every token.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags, Row, Transaction, TransactionBehavior, params};

use super::error::BUSY_SECONDS;
use super::{Amount, Cost, LedgerError, now};

/// Says in the file's header whose it is: "moew".
const APPLICATION: i64 = 0x6d6f_6577;
/// The schema's version.
const VERSION: i64 = 1;

/// Times are milliseconds since 1970 (UTC), costs picounits (1e-12 of the unit of currency). `ended` stays empty where a
/// request was killed, since nobody knows when. `spent` has the sums of `requests.cost`, and keeps those of deleted rows.
const SCHEMA: &str = "
    CREATE TABLE requests (
        id TEXT PRIMARY KEY,
        server INTEGER NOT NULL,
        key TEXT NOT NULL,
        model TEXT NOT NULL,
        begun INTEGER NOT NULL,
        ended INTEGER,
        reason TEXT NOT NULL,
        prompt_hit_tokens INTEGER NOT NULL,
        prompt_miss_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        cost INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX requests_running ON requests (server) WHERE reason = 'running';
    CREATE TABLE spent (
        key TEXT PRIMARY KEY,
        units INTEGER NOT NULL,
        picounits INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE servers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        begun INTEGER NOT NULL
    ) STRICT;
";

/// Adds to a request's row, or makes it. An end is final, whatever comes behind it.
const RECORD: &str = "
    INSERT INTO requests (id, server, key, model, begun, ended, reason, prompt_hit_tokens, prompt_miss_tokens, completion_tokens, cost)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
    ON CONFLICT (id) DO UPDATE SET
        ended = coalesce(ended, excluded.ended),
        reason = CASE reason WHEN 'running' THEN excluded.reason ELSE reason END,
        prompt_hit_tokens = prompt_hit_tokens + excluded.prompt_hit_tokens,
        prompt_miss_tokens = prompt_miss_tokens + excluded.prompt_miss_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        cost = cost + excluded.cost
    RETURNING prompt_hit_tokens, prompt_miss_tokens, completion_tokens, cost";

const SPEND: &str = "
    INSERT INTO spent (key, units, picounits) VALUES (?1, ?2, ?3)
    ON CONFLICT (key) DO UPDATE SET
        units = units + excluded.units + (picounits + excluded.picounits) / 1000000000000,
        picounits = (picounits + excluded.picounits) % 1000000000000
    RETURNING units, picounits";

const CLOSE: &str = "UPDATE requests SET reason = ?2, ended = ?3 WHERE server = ?1 AND reason = 'running'";

/// What is known of a request when it begins.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) key: String,
    pub(super) model: String,
    pub(super) begun: i64,
}

/// What is added to a request: tokens and their cost, and its end.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) head: Arc<Head>,
    pub(super) prompt_hit: i64,
    pub(super) prompt_miss: i64,
    pub(super) completion: i64,
    pub(super) cost: i64,
    /// The reason and the time.
    pub(super) end: Option<(String, i64)>,
}

/// What a group of records led to: the cost of each one's request so far, and what the keys have spent.
pub(super) struct Committed {
    pub(super) costs: Vec<Cost>,
    pub(super) spent: HashMap<String, Amount>,
}

/// The usage file, open for writing.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) connection: Connection,
    path: PathBuf,
    server: i64,
    lock: Lock,
    /// SQLite's count of other connections' commits.
    seen: i64,
}

/// A file beside the usage file, locked as long as its server lives. The system unlocks it however the server ends.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn path(usage: &Path, server: i64) -> PathBuf {
        with_suffix(usage, &format!(".server-{server}"))
    }

    fn take(usage: &Path, server: i64) -> io::Result<Self> {
        let path = Self::path(usage, server);
        let file = private().create(true).truncate(false).open(&path)?;
        file.try_lock()?;
        Ok(Self { path, _file: file })
    }

    /// Whether a server still runs. If that cannot be found out, it does: its requests are not to be closed, then.
    fn held(usage: &Path, server: i64) -> bool {
        match File::open(Self::path(usage, server)) {
            Err(error) => error.kind() != io::ErrorKind::NotFound,
            Ok(file) => matches!(file.try_lock(), Err(TryLockError::WouldBlock | TryLockError::Error(_))),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // if it stays, it is not locked, and the next server removes it
    }
}

impl Store {
    /// Opens the file, or makes it if there is none. Requests of servers that were killed are closed.
    pub(super) fn open(path: &Path) -> Result<Self, LedgerError> {
        let cannot = |error: io::Error| LedgerError::Open { path: path.to_owned(), reason: error.to_string() };
        make(path)?;
        // The locks of two servers must be the same files whichever way their usage file was named.
        let path = fs::canonicalize(path).map_err(cannot)?;
        let of = |error: rusqlite::Error| LedgerError::of(&path, &error);
        let mut connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        if !is_new(&connection, &path)? {
            whole(&connection, &path)?;
        }
        into_wal(&connection, &path)?;
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(of)?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(of)?;
        if is_new(&transaction, &path)? {
            transaction.execute_batch(SCHEMA).map_err(of)?;
            transaction.pragma_update(None, "application_id", APPLICATION).map_err(of)?;
            transaction.pragma_update(None, "user_version", VERSION).map_err(of)?;
        }
        close_ended(&transaction, &path).map_err(of)?;
        transaction.execute("INSERT INTO servers (begun) VALUES (?1)", [now()]).map_err(of)?;
        let server = transaction.last_insert_rowid();
        let lock = Lock::take(&path, server).map_err(cannot)?;
        for statement in [RECORD, SPEND, CLOSE] {
            transaction.prepare_cached(statement).map_err(of)?;
        }
        transaction.commit().map_err(of)?;
        let seen = data_version(&connection).map_err(of)?;
        Ok(Self { connection, path, server, lock, seen })
    }

    /// The file, as the system names it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all records or none.
    pub(super) fn commit(&mut self, records: &[Record]) -> Result<Committed, LedgerError> {
        let server = self.server;
        let mut written = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let mut spent = HashMap::new();
            let mut costs = Vec::with_capacity(records.len());
            for record in records {
                costs.push(write(&transaction, server, record)?);
                if record.cost > 0 {
                    let total = spend(&transaction, &record.head.key, record.cost)?;
                    spent.insert(record.head.key.clone(), total);
                }
            }
            transaction.commit()?;
            Ok(Committed { costs, spent })
        };
        written().map_err(|error| LedgerError::of(&self.path, &error))
    }

    /// What each key has spent, if another process may have written since the last time.
    pub(super) fn spent_elsewhere(&mut self) -> Result<Option<HashMap<String, Amount>>, LedgerError> {
        let of = |error| LedgerError::of(&self.path, &error);
        let version = data_version(&self.connection).map_err(of)?;
        if version == self.seen {
            return Ok(None);
        }
        let spent = self.spent()?;
        self.seen = version;
        Ok(Some(spent))
    }

    /// What each key has spent, ever.
    pub(super) fn spent(&self) -> Result<HashMap<String, Amount>, LedgerError> {
        let read = || -> rusqlite::Result<_> {
            let mut query = self.connection.prepare_cached("SELECT units, picounits, key FROM spent")?;
            query.query_map([], |row| Ok((row.get(2)?, amount(row)?)))?.collect()
        };
        read().map_err(|error| LedgerError::of(&self.path, &error))
    }

    /// Closes the requests of this server that still run.
    pub(super) fn close(self) -> Result<(), LedgerError> {
        let Self { mut connection, path, server, lock, .. } = self;
        let closed = || {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute(CLOSE, params![server, "stopped", now()])?;
            transaction.execute("DELETE FROM servers WHERE id = ?1", [server])?;
            drop(lock); // before the commit, as in `close_ended`
            transaction.commit()
        };
        closed().map_err(|error| LedgerError::of(&path, &error))
    }
}

fn write(transaction: &Transaction<'_>, server: i64, record: &Record) -> rusqlite::Result<Cost> {
    let Head { id, key, model, begun } = &*record.head;
    let (reason, ended) = record.end.as_ref().map_or(("running", None), |(reason, at)| (reason.as_str(), Some(*at)));
    let Record { prompt_hit, prompt_miss, completion, cost, .. } = record;
    let values = params![id, server, key, model, begun, ended, reason, prompt_hit, prompt_miss, completion, cost];
    transaction.prepare_cached(RECORD)?.query_row(values, |row| {
        Ok(Cost {
            prompt_hit_tokens: count(row, 0)?,
            prompt_miss_tokens: count(row, 1)?,
            completion_tokens: count(row, 2)?,
            amount: Amount::from_picounits(count(row, 3)?.into()),
        })
    })
}

fn spend(transaction: &Transaction<'_>, key: &str, cost: i64) -> rusqlite::Result<Amount> {
    let (units, picounits) = Amount::from_picounits(cost.unsigned_abs().into()).parts();
    transaction.prepare_cached(SPEND)?.query_row(params![key, units as i64, picounits as i64], amount)
}

fn amount(row: &Row<'_>) -> rusqlite::Result<Amount> {
    Ok(Amount::from_parts(count(row, 0)?.into(), count(row, 1)?.into()))
}

/// A number that is never negative in a sound file.
pub(super) fn count(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, value))
}

/// Closes the requests of servers that are no more. Their locks go before the commit, so that none is forgotten when this
/// server is killed, too: a server without a lock is no more, either.
fn close_ended(transaction: &Transaction<'_>, path: &Path) -> rusqlite::Result<()> {
    let mut query = transaction.prepare("SELECT id FROM servers")?;
    let servers: Vec<i64> = query.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    for server in servers.into_iter().filter(|server| !Lock::held(path, *server)) {
        transaction.execute(CLOSE, params![server, "killed", None::<i64>])?;
        transaction.execute("DELETE FROM servers WHERE id = ?1", [server])?;
        let _ = fs::remove_file(Lock::path(path, server)); // not there, or of no use to anyone
    }
    Ok(())
}

/// SQLite's count of other connections' commits.
fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "data_version", |row| row.get(0))
}

/// Opens the file, which must be there.
pub(super) fn connect(path: &Path, access: OpenFlags) -> Result<Connection, LedgerError> {
    let connect = || {
        // SQLite does not take the path for a URI, and one thread at a time uses the connection.
        let connection = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.busy_timeout(Duration::from_secs(BUSY_SECONDS))?;
        Ok(connection)
    };
    connect().map_err(|error| LedgerError::of(path, &error))
}

/// Whether the file has nothing in it. An error if what it has is not ours.
pub(super) fn is_new(connection: &Connection, path: &Path) -> Result<bool, LedgerError> {
    // One statement, so that all is of one moment: another process may be making the file.
    let all =
        "SELECT (SELECT application_id FROM pragma_application_id), (SELECT user_version FROM pragma_user_version),
        EXISTS (SELECT 1 FROM sqlite_schema)";
    let read = || connection.query_row(all, [], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get(2)?)));
    match read().map_err(|error| LedgerError::of(path, &error))? {
        (0, 0, false) => Ok(true),
        (APPLICATION, VERSION, true) => Ok(false),
        (APPLICATION, found, _) if found > VERSION => {
            Err(LedgerError::Newer { path: path.to_owned(), found, known: VERSION })
        }
        (APPLICATION, found, _) => {
            Err(LedgerError::Damaged { path: path.to_owned(), reason: format!("no version {found} was ever written") })
        }
        _ => Err(LedgerError::Foreign { path: path.to_owned(), found: "an SQLite database of something else".into() }),
    }
}

/// Checks all pages of the file.
fn whole(connection: &Connection, path: &Path) -> Result<(), LedgerError> {
    let found: String = connection
        .pragma_query_value(None, "quick_check", |row| row.get(0))
        .map_err(|error| LedgerError::of(path, &error))?;
    match found.as_str() {
        "ok" => Ok(()),
        _ => Err(LedgerError::Damaged {
            path: path.to_owned(),
            reason: found.lines().take(2).collect::<Vec<_>>().join(" "),
        }),
    }
}

/// Has the file keep a log. Where two servers begin it at once, one waits.
fn into_wal(connection: &Connection, path: &Path) -> Result<(), LedgerError> {
    let begun = Instant::now();
    loop {
        let mode = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0));
        let error = match mode {
            Ok(mode) if mode == "wal" => return Ok(()),
            Ok(mode) => {
                let reason =
                    format!("it cannot have a write-ahead log here, only {mode}: is it on a network file system?");
                return Err(LedgerError::Open { path: path.to_owned(), reason });
            }
            Err(error) => LedgerError::of(path, &error),
        };
        if !matches!(error, LedgerError::Busy { .. }) || begun.elapsed().as_secs() >= BUSY_SECONDS {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes an empty file that its owner alone can read, if there is none. SQLite gives those beside it the same rights.
fn make(path: &Path) -> Result<(), LedgerError> {
    let cannot = |error: io::Error| LedgerError::Open { path: path.to_owned(), reason: error.to_string() };
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(LedgerError::Foreign { path: path.to_owned(), found: "no regular file".into() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if fs::metadata(with_suffix(path, "-wal")).is_ok_and(|log| log.len() > 0) {
                let reason = "its -wal file is there, but not the file itself".into();
                return Err(LedgerError::Damaged { path: path.to_owned(), reason });
            }
            match private().create_new(true).open(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(cannot(error)),
                _ => Ok(()),
            }
        }
        Err(error) => Err(cannot(error)),
    }
}

/// For writing; what it makes is readable by the owner alone.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}
