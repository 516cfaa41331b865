//! Arguments of `moewe usage`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// `moewe usage`.
#[derive(Args, Debug)]
#[command(
    after_help = "A server writes the file as it hands out tokens, so that this shows running requests, too. Days and times \
    are UTC. Costs are in the currency of the server's prices.\n\n\
    Examples:\n  \
    moewe usage\n  \
    moewe usage --by day --since 2026-11-01\n  \
    moewe usage --by request --json"
)]
pub struct UsageArgs {
    /// Usage file of the server [default: moewe/usage.sqlite among this user's application data]
    #[arg(long, value_name = "FILE")]
    pub usage_db: Option<PathBuf>,

    /// What to sum up
    #[arg(long, value_enum, default_value_t)]
    pub by: ByArg,

    /// Leave out requests that began before: a day such as 2026-11-22, or a time such as 2026-11-22T08:30:00Z
    #[arg(long, value_name = "DATE", value_parser = since)]
    pub since: Option<i64>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What a line of `moewe usage` is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ByArg {
    /// Each key
    #[default]
    Key,
    /// Each model
    Model,
    /// Each day
    Day,
    /// Each request
    Request,
}

/// Milliseconds since 1970 of a day's beginning or of a time.
fn since(text: &str) -> Result<i64, &'static str> {
    let time = match text.parse::<jiff::civil::Date>() {
        Ok(day) if text.len() == 10 => day.to_zoned(jiff::tz::TimeZone::UTC).map(|day| day.timestamp()),
        _ => text.parse(),
    };
    time.map(jiff::Timestamp::as_millisecond)
        .map_err(|_| "expected a day such as 2026-11-22, or a time such as 2026-11-22T08:30:00Z")
}

#[cfg(test)]
mod tests {
    use super::since;

    #[test]
    fn reads_days_and_times() {
        assert_eq!(since("2026-11-22"), Ok(1_795_305_600_000));
        assert_eq!(since("2026-11-22T08:30:00.250Z"), Ok(1_795_336_200_250));
        assert_eq!(since("2026-11-22T08:30:00+02:00"), Ok(1_795_329_000_000));
        for text in
            ["", "yesterday", "2026-13-01", "2026-02-30", "2026-11-22T08:30:00", "22.11.2026", "1795305600", "2026-1-2"]
        {
            assert!(since(text).is_err(), "{text}");
        }
    }
}
