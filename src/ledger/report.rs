//! Reading the usage file.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags};
use serde::Serialize;

use super::store::{self, count};
use super::{Amount, LedgerError};

/// What a row of a report is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// A key.
    #[default]
    Key,
    /// A model.
    Model,
    /// A day in UTC.
    Day,
    /// A request.
    Request,
}

/// What to report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// A row for each of these.
    pub by: By,
    /// Requests that began at this time or later: milliseconds since 1970.
    pub since: Option<i64>,
}

/// Sums over requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Requests.
    pub requests: u64,
    /// Those of them that had not ended when this was read.
    pub running: u64,
    /// Tokens of prompts that the prefix cache had.
    pub prompt_hit_tokens: u64,
    /// Tokens of prompts that were computed.
    pub prompt_miss_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
    /// What they cost.
    pub cost: Amount,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.running = self.running.saturating_add(other.running);
        self.prompt_hit_tokens = self.prompt_hit_tokens.saturating_add(other.prompt_hit_tokens);
        self.prompt_miss_tokens = self.prompt_miss_tokens.saturating_add(other.prompt_miss_tokens);
        self.completion_tokens = self.completion_tokens.saturating_add(other.completion_tokens);
        self.cost += other.cost;
    }
}

/// What is known of a single request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RequestRow {
    /// Whose it is.
    pub key: String,
    /// The model.
    pub model: String,
    /// When it began, in UTC.
    pub begun: String,
    /// When it ended; not known of one that runs or was killed.
    pub ended: Option<String>,
    /// Why it ended, or `running`.
    pub reason: String,
}

/// A row of a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The key's name, the model, the day or the request's id.
    pub name: String,
    /// Of a single request: what else is known.
    #[serde(flatten)]
    pub request: Option<RequestRow>,
    /// What it used.
    #[serde(flatten)]
    pub totals: Totals,
}

/// A report: rows in the order of their names, and their sum.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What the rows are about.
    pub by: By,
    /// The rows.
    pub rows: Vec<Row>,
    /// Their sum.
    pub total: Totals,
}

/// The usage file, open for reading, beside any servers that write to it.
#[derive(Debug)]
pub struct Usage {
    path: PathBuf,
    connection: Connection,
    new: bool,
}

impl Usage {
    /// Opens the usage file. It changes nothing in it: requests of killed servers are still `running` here.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => return Err(LedgerError::Foreign { path: path.to_owned(), found: "no regular file".into() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(LedgerError::Missing { path: path.to_owned() });
            }
            Err(error) => return Err(LedgerError::Open { path: path.to_owned(), reason: error.to_string() }),
        }
        let connection = store::connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let new = store::is_new(&connection, path)?;
        Ok(Self { path: path.to_owned(), connection, new })
    }

    /// What is on record. The rows and their sum are of one moment.
    pub fn report(&self, filter: &Filter) -> Result<Report, LedgerError> {
        let mut rows = Vec::new();
        // A server that was killed before it had written anything leaves an empty file.
        if !self.new {
            rows = self.rows(filter).map_err(|error| LedgerError::of(&self.path, &error))?;
        }
        let mut total = Totals::default();
        for row in &rows {
            total.add(&row.totals);
        }
        Ok(Report { by: filter.by, rows, total })
    }

    fn rows(&self, filter: &Filter) -> rusqlite::Result<Vec<Row>> {
        let name = match filter.by {
            By::Key => "key",
            By::Model => "model",
            By::Day => "date(begun / 1000, 'unixepoch')",
            By::Request => "id",
        };
        // Costs are summed in two halves, which cannot overflow: SQLite's integers have 64 bits.
        let mut query = self.connection.prepare(&format!(
            "SELECT {name} AS name, count(*), sum(reason = 'running'), sum(prompt_hit_tokens), sum(prompt_miss_tokens),
                sum(completion_tokens), sum(cost >> 32), sum(cost & 4294967295),
                min(key), min(model), min(begun), min(ended), min(reason)
            FROM requests WHERE begun >= ?1 GROUP BY name ORDER BY name"
        ))?;
        let rows = query.query_map([filter.since.unwrap_or(i64::MIN)], |row| {
            let [high, low] = [count(row, 6)?, count(row, 7)?].map(u128::from);
            let request = match filter.by {
                By::Request => Some(RequestRow {
                    key: row.get(8)?,
                    model: row.get(9)?,
                    begun: time(row.get(10)?),
                    ended: row.get::<_, Option<i64>>(11)?.map(time),
                    reason: row.get(12)?,
                }),
                _ => None,
            };
            let totals = Totals {
                requests: count(row, 1)?,
                running: count(row, 2)?,
                prompt_hit_tokens: count(row, 3)?,
                prompt_miss_tokens: count(row, 4)?,
                completion_tokens: count(row, 5)?,
                cost: Amount::from_picounits((high << 32) + low),
            };
            // A day that is out of all calendars has no name.
            Ok(Row { name: row.get::<_, Option<String>>(0)?.unwrap_or_default(), request, totals })
        })?;
        rows.collect()
    }
}

/// A time in UTC, to the millisecond.
fn time(milliseconds: i64) -> String {
    jiff::Timestamp::from_millisecond(milliseconds)
        .map_or_else(|_| milliseconds.to_string(), |time| format!("{time:.3}"))
}
