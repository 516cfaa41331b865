//! `moewe compile`.

use std::time::Instant;

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile_until};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, WeightFormat};
use serde_json::json;

use super::args::{CompileArgs, WeightsArg};
use super::progress::Bars;
use super::{interrupt, model, output, usage};

/// Compiles a checkpoint into a bundle.
pub fn run(args: &CompileArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    model::must_exist(&args.checkpoint, "CHECKPOINT is a directory with config.json and *.safetensors")?;
    if Bundle::is_bundle(&args.checkpoint) {
        return usage(format!("{}: is a bundle already; compile takes a checkpoint", args.checkpoint.display()));
    }
    if args.checkpoint.is_file() && !args.plan_only {
        return usage(format!(
            "{}: is a file; give the directory of a checkpoint, or --plan-only to make a plan from a config.json",
            args.checkpoint.display()
        ));
    }
    let weights = match args.weights {
        WeightsArg::Keep => None,
        WeightsArg::F32 => Some(WeightFormat::F32),
        WeightsArg::Bf16 => Some(WeightFormat::Bf16),
        WeightsArg::F16 => Some(WeightFormat::F16),
        WeightsArg::Int8 => Some(WeightFormat::Int8),
        WeightsArg::Int4 => Some(WeightFormat::Int4),
    };
    let options = Options {
        profile: Profile::load(&args.target)?,
        weights,
        reference: args.reference_weights,
        plan_only: args.plan_only,
        latents: args.latents.into(),
        taps: args.taps.clone(),
    };
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let bars = Bars::default();
    let progress = |done, total| bars.set("compiling", done, total, true);
    let warnings = compile_until(&checkpoint, &options, &args.out, &progress, interrupt::flag())?;
    drop(bars);
    model::warn(&warnings);
    let bundle = Bundle::open(&args.out)?;
    let weight_bytes: u64 = bundle.plan.weights.iter().map(moewe_plan::Weight::bytes).sum();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        return output::json(&json!({
            "bundle": args.out,
            "target": bundle.plan.requirements.profile,
            "kernels": bundle.plan.kernels.len(),
            "programs": bundle.plan.programs.len(),
            "weight_bytes": weight_bytes,
            "warnings": warnings,
            "seconds": seconds,
        }));
    }
    output::note(&format!(
        "{}: {} kernels, {} of weights for {}, in {seconds:.1} s",
        args.out.display(),
        bundle.plan.kernels.len(),
        output::bytes(weight_bytes as f64),
        bundle.plan.requirements.profile,
    ));
    Ok(())
}
