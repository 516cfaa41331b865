//! Arguments of `moewe serve`.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use moewe::ledger::Price;

use super::engine::bytes;
use super::{EngineArgs, ModelArgs};

/// `moewe serve`.
#[derive(Args, Debug)]
#[command(
    after_help = "Clients of OpenAI's and DeepSeek's APIs need nothing but the address, http://HOST:PORT/v1; a browser \
    finds a chat at http://HOST:PORT/. Ctrl-C or SIGTERM lets running requests end first, a second one ends at once.\n\n\
    Examples:\n  \
    moewe serve models/demo\n  \
    moewe serve DeepSeek-V3 --host 0.0.0.0 --api-key-file keys.txt --price-input 0.55 --price-output 2.19\n  \
    curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}], \"stream\": true}'"
)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Address to listen at; 0.0.0.0 or :: for all
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,

    /// Name that requests ask for [default: that of the directory]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,

    /// Print one JSON object instead of text when the server is ready
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub log: LogArgs,

    /// Let viewers see what experts and latents do: moewe view http://HOST:PORT
    #[arg(long)]
    pub allow_watch: bool,

    #[command(flatten)]
    pub limits: LimitArgs,

    #[command(flatten)]
    pub money: MoneyArgs,

    #[command(flatten)]
    pub engine: EngineArgs,
}

/// What is told of requests.
#[derive(Args, Debug)]
pub struct LogArgs {
    /// Write a line for each request to standard error
    #[arg(long)]
    pub log: bool,

    /// Write what is asked, too
    #[arg(long, requires = "log")]
    pub log_prompts: bool,
}

/// How much at once, and how long.
#[derive(Args, Debug)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Most texts that run at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub max_running: u32,

    /// Most texts that wait for a place; others are answered 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_waiting: usize,

    /// Most bytes of a request
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = bytes, allow_negative_numbers = true)]
    pub max_body: u64,

    /// Most connections; others are answered 503
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,

    /// Time for running requests to come to an end when the server is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_seconds: u32,
}

/// Who may ask, and what it costs.
#[derive(Args, Debug)]
#[command(next_help_heading = "Keys and prices")]
pub struct MoneyArgs {
    /// Keys that may ask, a line each: NAME KEY [budget=12.50] [default: anybody may]
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Price of a million tokens of prompts, in any currency
    #[arg(long, value_name = "PRICE", allow_negative_numbers = true)]
    pub price_input: Option<Price>,

    /// Price of a million tokens of prompts that the prefix cache had [default: as --price-input]
    #[arg(long, value_name = "PRICE", allow_negative_numbers = true)]
    pub price_cache_hit: Option<Price>,

    /// Price of a million generated tokens
    #[arg(long, value_name = "PRICE", allow_negative_numbers = true)]
    pub price_output: Option<Price>,

    /// Where the usage is written; `moewe usage` shows it [default: in the user's data directory]
    #[arg(long, value_name = "FILE")]
    pub usage_db: Option<PathBuf>,
}
