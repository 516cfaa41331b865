//! `moewe usage`.

use moewe::ledger::{self, By, Filter, Report, Row, Totals, Usage};

use super::args::{ByArg, UsageArgs};
use super::output;

/// Shows what a server's usage file has on record.
pub fn run(args: &UsageArgs) -> anyhow::Result<()> {
    let path = match &args.usage_db {
        Some(path) => path.clone(),
        None => ledger::default_path()?,
    };
    let by = match args.by {
        ByArg::Key => By::Key,
        ByArg::Model => By::Model,
        ByArg::Day => By::Day,
        ByArg::Request => By::Request,
    };
    let report = Usage::open(&path)?.report(&Filter { by, since: args.since })?;
    if args.json {
        return output::json(&report);
    }
    if report.rows.is_empty() {
        let since = if args.since.is_some() { " since then" } else { "" };
        return Ok(output::write(&format!("{} has no requests{since}\n", path.display()))?);
    }
    Ok(output::write(&format!("{}\n", table(&report)))?)
}

fn table(report: &Report) -> comfy_table::Table {
    let first: &[&str] = match report.by {
        By::Key => &["key", "requests"],
        By::Model => &["model", "requests"],
        By::Day => &["day", "requests"],
        By::Request => &["begun", "key", "model", "ended"],
    };
    let mut table = output::table(&[first, &["prompt", "of it cached", "completion", "cost"]].concat());
    if report.by == By::Request {
        // Names and words, not numbers.
        for column in table.column_iter_mut().skip(1).take(3) {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        }
    }
    for row in &report.rows {
        table.add_row([about(row), numbers(&row.totals)].concat());
    }
    let mut total = match report.by {
        By::Request => {
            vec!["total".into(), output::grouped(report.total.requests) + " requests", String::new(), String::new()]
        }
        _ => vec!["total".into(), requests(&report.total)],
    };
    total.extend(numbers(&report.total));
    table.add_row(total);
    table
}

/// The cells before a row's tokens.
fn about(row: &Row) -> Vec<String> {
    match &row.request {
        Some(request) => {
            vec![request.begun.clone(), request.key.clone(), request.model.clone(), request.reason.clone()]
        }
        None => vec![row.name.clone(), requests(&row.totals)],
    }
}

fn requests(totals: &Totals) -> String {
    let all = output::grouped(totals.requests);
    if totals.running > 0 { format!("{all} ({} running)", output::grouped(totals.running)) } else { all }
}

fn numbers(totals: &Totals) -> Vec<String> {
    let prompt = totals.prompt_hit_tokens.saturating_add(totals.prompt_miss_tokens);
    let tokens = [prompt, totals.prompt_hit_tokens, totals.completion_tokens];
    tokens.map(output::grouped).into_iter().chain([totals.cost.to_string()]).collect()
}

#[cfg(test)]
mod tests {
    use moewe::ledger::RequestRow;

    use super::*;

    fn report(by: By, request: Option<RequestRow>) -> Report {
        let totals = Totals {
            requests: 1,
            running: 1,
            prompt_hit_tokens: 64,
            prompt_miss_tokens: 1936,
            completion_tokens: 7,
            cost: "0.00108".parse().unwrap(),
        };
        Report { by, rows: vec![Row { name: "alice".into(), request, totals }], total: totals }
    }

    fn lines(report: &Report) -> Vec<String> {
        table(report).to_string().lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    #[test]
    fn shows_sums() {
        let lines = lines(&report(By::Key, None));
        assert_eq!(lines[0], "key requests prompt of it cached completion cost");
        assert_eq!(lines[2], "alice 1 (1 running) 2 000 64 7 0.00108");
        assert_eq!(lines[3], "total 1 (1 running) 2 000 64 7 0.00108");
    }

    #[test]
    fn shows_requests() {
        let begun = "2026-11-22T08:25:30.044Z".to_owned();
        let request =
            RequestRow { key: "alice".into(), model: "demo".into(), begun, ended: None, reason: "running".into() };
        let lines = lines(&report(By::Request, Some(request)));
        assert_eq!(lines[0], "begun key model ended prompt of it cached completion cost");
        assert_eq!(lines[2], "2026-11-22T08:25:30.044Z alice demo running 2 000 64 7 0.00108");
        assert_eq!(lines[3], "total 1 requests 2 000 64 7 0.00108");
    }
}
