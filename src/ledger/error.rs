//! What can go wrong with the usage file.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

/// Something went wrong with the usage file. It is told to all requests that wait for it, so it can be cloned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// There is no such file, and only reading was asked for.
    #[error(
        "there is no usage file {}: a server writes it, moewe serve --usage-db; give the same path to both",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// No place for the file is known.
    #[error(
        "this system has no folder for application data (no HOME?): say where the usage file is with --usage-db FILE"
    )]
    NoDefault,
    /// The file or one beside it cannot be opened or made.
    #[error("cannot open the usage file {}: {reason}; it needs a folder that exists and that this user may write to", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file is there and is not one of ours. It is left alone.
    #[error("{} is not a usage file of moewe ({found}); it was left as it is: give another path with --usage-db", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// The file was written by a later version.
    #[error(
        "the usage file {} has version {found}, this moewe knows version {known}: use a newer moewe, or another file with --usage-db",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// What is in the file contradicts itself. It is left alone.
    #[error(
        "the usage file {} is damaged ({reason}); it was left as it is: restore it from a copy, or move it away with its -wal file to begin anew",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What SQLite, or we, found.
        reason: String,
    },
    /// The disk, or what this user may use of it, is full.
    #[error("no room on the disk for the usage file {} ({reason}): nothing is served that is not on record", path.display())]
    Full {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        reason: String,
    },
    /// Another process holds the file for too long.
    #[error("another process has held the usage file {} for more than {seconds} s: nothing is served that is not on record", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// Reading or writing failed otherwise.
    #[error("cannot use the usage file {} ({reason}): nothing is served that is not on record", path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        reason: String,
    },
    /// A request's tokens or cost do not fit a row.
    #[error("the tokens of one request cost more than {} units of currency, which is more than a row can hold", i64::MAX / 1_000_000_000_000)]
    TooLarge,
    /// Tokens came behind the end of their request.
    #[error("tokens were counted for a request that had ended")]
    Ended,
    /// The ledger was closed, or its thread died.
    #[error("the usage file is no longer written: the server is stopping")]
    Stopped,
}

/// How long a write waits for other processes.
pub(super) const BUSY_SECONDS: u64 = 5;

impl LedgerError {
    /// What an error of SQLite's means for this file.
    pub(super) fn of(path: &Path, error: &rusqlite::Error) -> Self {
        let (path, reason) = (path.to_owned(), error.to_string());
        match error {
            // A table or column that is not there.
            rusqlite::Error::SqlInputError { msg, .. } => return Self::Damaged { path, reason: msg.clone() },
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::Utf8Error(..) => return Self::Damaged { path, reason },
            _ => {}
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => Self::Foreign { path, found: "no SQLite database".into() },
            // Also: a sum that overflows, a row that contradicts its type.
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::Unknown | ErrorCode::ConstraintViolation) => {
                Self::Damaged { path, reason }
            }
            Some(ErrorCode::DiskFull) => Self::Full { path, reason },
            Some(ErrorCode::SystemIoFailure)
                if error.sqlite_error().is_some_and(|error| is_write(error.extended_code)) =>
            {
                Self::Full { path, reason }
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy { path, seconds: BUSY_SECONDS },
            Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
                Self::Open { path, reason }
            }
            _ => Self::Access { path, reason },
        }
    }
}

/// Whether a failure of input or output was one of writing: a quota or a limit of file sizes, mostly.
fn is_write(extended_code: i32) -> bool {
    use rusqlite::ffi::{SQLITE_IOERR_SHMSIZE, SQLITE_IOERR_TRUNCATE, SQLITE_IOERR_WRITE};
    [SQLITE_IOERR_WRITE, SQLITE_IOERR_SHMSIZE, SQLITE_IOERR_TRUNCATE].contains(&extended_code)
}
