//! Arguments, wiring and output of the subcommands, one file each.

mod args;
mod cache;
mod chat;
mod compile;
mod doctor;
mod explain;
mod generate;
mod inspect;
mod interrupt;
mod model;
mod output;
mod progress;
mod run;
mod synth;
mod trace;

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
    let cli = Cli::parse();
    interrupt::install();
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Compile(args) => compile::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Synth(args) => synth::run(&args),
    };
    match result {
        Ok(()) if interrupt::is_set() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(_) if interrupt::is_set() => ExitCode::from(130),
        Err(error) => {
            eprintln!("moewe: {error:#}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}
