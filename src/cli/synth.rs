//! `moewe synth`.

use std::time::Instant;

use moewe_compiler::synth::{Options, Shape, Storage, write};
use serde_json::json;

use super::args::SynthArgs;
use super::progress::Bars;
use super::{interrupt, output};

/// Writes a checkpoint with random weights.
pub fn run(args: &SynthArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let storage = args.dtype.as_deref().map(Storage::named).transpose()?;
    let shape = Shape::new(&args.like, &args.scale, storage)?;
    let options = Options { seed: args.seed, interrupt: Some(interrupt::flag()), ..Options::default() };
    let bars = Bars::default();
    let summary = write(&shape, &args.out, options, &|done, total| bars.set("writing weights", done, total, true))?;
    drop(bars);
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        return output::json(&json!({
            "checkpoint": args.out,
            "files": summary.files,
            "tensors": summary.tensors,
            "bytes": summary.bytes,
            "seconds": seconds,
        }));
    }
    output::note(&format!(
        "{}: {} tensors, {} in {} file(s), in {seconds:.1} s",
        args.out.display(),
        summary.tensors,
        output::bytes(summary.bytes as f64),
        summary.files.len()
    ));
    Ok(())
}
