//! Writing to standard output.

use std::io::{self, IsTerminal, Write};

/// Writes text at once.
pub fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| io::Error::new(error.kind(), format!("cannot write to standard output: {error}")))
}

/// Writes a line to standard error. If nobody reads there, there is nobody to tell.
pub fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes a value as pretty JSON with a newline.
pub fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    Ok(write(&(serde_json::to_string_pretty(value)? + "\n"))?)
}

/// Whether an error only says that the reader of our output went away (`moewe … | head`).
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Whether to use colour on standard output.
pub fn color() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Text in the background of what follows, where there is colour.
pub fn dim(text: &str) -> String {
    if color() && !text.is_empty() { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
}

/// Characters in a line of the terminal.
pub fn width() -> usize {
    let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    columns.unwrap_or_else(|| usize::from(console::Term::stdout().size().1)).clamp(40, 200)
}

/// A number with thousands separated by thin gaps: 671 026 419 200.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// Bytes in binary units.
pub fn bytes(number: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = number;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.2} {}", units[unit]) }
}

/// A count in decimal units: 671 G.
pub fn count(number: f64) -> String {
    let units = ["", " k", " M", " G", " T", " P"];
    let mut value = number;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0}") } else { format!("{value:.2}{}", units[unit]) }
}

/// A table without outer borders, numbers to the right.
pub fn table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    let lines = comfy_table::LineStyle::none().fill('─').junction('─');
    table.load_style(comfy_table::TableStyle::new().header_separator(lines)).set_header(header.iter().copied());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    table
}
