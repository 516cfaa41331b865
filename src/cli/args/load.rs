//! Arguments of `moewe bench serve`.

use std::path::PathBuf;

use clap::{Args, value_parser};

/// Send requests to a running server as many people would, and measure what they see
#[derive(Args, Debug)]
#[command(after_help = "Example: moewe serve models/demo --port 8080, and then\n  \
    moewe bench serve http://127.0.0.1:8080 --rate 2 --requests 100\n\n\
    Without --rate, every client sends its next request when its last one is answered. With --rate, requests come at random, \
    so many a second on average (a Poisson process), and wait here while all clients are busy; times count from then.")]
pub struct LoadArgs {
    /// Address of the server: http://HOST:PORT
    #[arg(value_name = "URL")]
    pub url: String,

    /// File whose first line with a key has the key to use, as for --api-key-file of serve [default: $MOEWE_API_KEY, if set]
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Requests a second on average, at random times [default: as fast as the clients get answers]
    #[arg(long, value_name = "N", value_parser = rate)]
    pub rate: Option<f64>,

    /// Most requests in flight
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u32).range(1..=4096))]
    pub clients: u32,

    /// Requests to send
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u32).range(1..), conflicts_with = "seconds")]
    pub requests: u32,

    /// Send requests for so many seconds, and wait for the answers
    #[arg(long, value_name = "S", value_parser = value_parser!(u32).range(1..))]
    pub seconds: Option<u32>,

    /// Fewest and most tokens of a prompt
    #[arg(long, value_name = "MIN,MAX", default_value = "8,200", value_parser = range)]
    pub prompt_tokens: (u32, u32),

    /// Fewest and most tokens of an answer
    #[arg(long, value_name = "MIN,MAX", default_value = "4,64", value_parser = range)]
    pub max_tokens: (u32, u32),

    /// Different requests, each sent again and again; every second one is sampled, with a seed
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u32).range(1..=100_000))]
    pub distinct: u32,

    /// Send each of them alone first, and count answers that differ from that
    #[arg(long)]
    pub verify: bool,

    /// Seed of prompts, lengths and times
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if rate > 0.0 && rate <= 1e6 { Ok(rate) } else { Err("expected a number above 0, at most a million".into()) }
}

fn range(text: &str) -> Result<(u32, u32), String> {
    let wrong =
        || format!("{text:?}: expected two numbers, such as 8,200, the first at least 1 and no larger than the second");
    let (least, most) = text.split_once(',').ok_or_else(wrong)?;
    let number = |part: &str| part.trim().parse::<u32>().map_err(|_| wrong());
    let (least, most) = (number(least)?, number(most)?);
    if least >= 1 && least <= most { Ok((least, most)) } else { Err(wrong()) }
}
