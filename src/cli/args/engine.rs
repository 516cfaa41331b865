//! Arguments of the engine: drafts and the prefix cache.

use std::path::PathBuf;

use clap::Args;
use moewe_plan::MAX_DRAFTS;
use moewe_runtime::engine::Mtp;

/// How requests are served.
#[derive(Args, Debug)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Let the model's modules of multi-token prediction draft tokens, which one pass then verifies: auto, as long as it
    /// saves time; off; or so many behind each token, 1 to 7. The text is the same
    #[arg(long, value_name = "auto|off|N", default_value = "auto", value_parser = mtp, allow_negative_numbers = true)]
    pub mtp: Mtp,

    /// Keep the latents of prompts and texts in DIR, too, so that later calls need not compute the same beginning again
    #[arg(long, value_name = "DIR", conflicts_with = "no_prefix_cache")]
    pub cache_dir: Option<PathBuf>,

    /// Most bytes in DIR, such as 500M or 20G; what was not used for longest goes first
    #[arg(
        long, value_name = "BYTES", default_value = "16G", requires = "cache_dir", conflicts_with = "no_prefix_cache",
        value_parser = bytes, allow_negative_numbers = true
    )]
    pub cache_size: u64,

    /// Compute every prompt whole, even if it begins like one before
    #[arg(long)]
    pub no_prefix_cache: bool,
}

/// How to draft.
pub(super) fn mtp(text: &str) -> Result<Mtp, String> {
    match text {
        "auto" => Ok(Mtp::Auto),
        "off" => Ok(Mtp::Off),
        number => match number.parse() {
            Ok(drafts) if (1..=MAX_DRAFTS as usize).contains(&drafts) => Ok(Mtp::Fixed(drafts)),
            _ => Err(format!("expected auto, off, or how many tokens to draft, 1 to {MAX_DRAFTS}")),
        },
    }
}

/// A number of bytes, with K, M, G or T for powers of 1024.
pub(super) fn bytes(text: &str) -> Result<u64, &'static str> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(EXPECTED_BYTES),
    };
    let number: u64 = digits.parse().map_err(|_| EXPECTED_BYTES)?;
    number.checked_mul(1 << shift).filter(|&bytes| bytes > 0).ok_or(EXPECTED_BYTES)
}

const EXPECTED_BYTES: &str = "expected a number of bytes above 0, such as 500M or 20G (K, M, G, T: powers of 1024)";
