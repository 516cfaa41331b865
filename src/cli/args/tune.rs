//! Arguments of `moewe tune`.

use std::path::PathBuf;

use clap::Args;

use super::DeviceArgs;

/// `moewe tune`.
#[derive(Args, Debug)]
#[command(
    after_help = "The shapes of the model are measured with random numbers; its weights are not read. Every kernel is \
    compared with a slow reference before it is timed. Nothing else should run on the device meanwhile.\n\n\
    Example:\n  \
    moewe tune models/demo --output here.json && moewe run models/demo \"The king said to\" --target here.json"
)]
pub struct TuneArgs {
    /// Checkpoint directory or config.json
    #[arg(value_name = "MODEL", required_unless_present = "device")]
    pub model: Option<PathBuf>,

    /// Profile to write [default: tuned-DEVICE.json]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Smaller batches, fewer repetitions, each choice tried once
    #[arg(long)]
    pub quick: bool,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print what was measured as JSON
    #[arg(long)]
    pub json: bool,
}
