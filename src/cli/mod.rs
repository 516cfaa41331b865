//! Arguments, wiring and output of the subcommands, one file each.

mod args;
mod batch;
mod bench;
mod cache;
mod chat;
mod compile;
mod cost;
mod doctor;
mod eval;
mod explain;
mod generate;
mod inspect;
mod interrupt;
mod key;
mod model;
mod output;
mod progress;
mod quantize;
mod run;
mod serve;
mod served;
mod speed;
mod synth;
mod trace;
mod tune;
mod usage;
mod view;
mod watched;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

/// A command that was called wrongly: exit code 2, like clap's own errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// An [`Usage`] error.
fn usage<T>(message: impl Into<String>) -> anyhow::Result<T> {
    Err(Usage(message.into()).into())
}

/// Parses the command line, runs the command and says what went wrong in one line.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_parsed(&error),
    };
    interrupt::install();
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(*args),
        Command::View(args) => view::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Compile(args) => compile::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Usage(args) => usage::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Synth(args) => synth::run(&args),
    };
    match result {
        Ok(()) if interrupt::is_set() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(_) if interrupt::is_set() => ExitCode::from(130),
        Err(error) => {
            output::note(&format!("moewe: {}", one_line(&error)));
            ExitCode::from(if is_usage(&error) { 2 } else { 1 })
        }
    }
}

/// Help and version as clap writes them, errors in one line like our own.
fn not_parsed(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() || error.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print(); // nobody reads it, then
    } else {
        let text = error.render().to_string();
        let paragraphs = text.split("\n\n").map(|paragraph| join_lines(paragraph.trim()));
        let said: Vec<String> = paragraphs.filter(|paragraph| !paragraph.is_empty()).collect();
        let said = said.join("; ").replace("For more information, try '--help'.", "--help says more");
        output::note(&format!("moewe: {}", said.trim_start_matches("error: ")));
    }
    ExitCode::from(error.exit_code() as u8)
}

/// An error and its causes, but not those that it tells of itself.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text += ": ";
            text += &cause;
        }
    }
    join_lines(&text)
}

fn join_lines(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Whether the command was called wrongly, as against something that went wrong.
fn is_usage(error: &anyhow::Error) -> bool {
    use moewe_compiler::error::Error as Compiler;
    use moewe_runtime::Error as Runtime;
    error.is::<Usage>()
        || matches!(error.downcast_ref(), Some(Compiler::Argument { .. } | Compiler::Target { .. }))
        || matches!(error.downcast_ref(), Some(Runtime::NoSuchDevice { .. }))
        || error.is::<moewe_plan::EditError>()
}
