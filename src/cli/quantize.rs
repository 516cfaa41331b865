//! `moewe quantize`.

use std::time::Instant;

use anyhow::Context;
use moewe::eval::Comparison;
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile_until};
use moewe_compiler::profile::Profile;
use moewe_compiler::tensors::expected;
use moewe_plan::{Bundle, Latent, TapChoice, Weight, WeightFormat};
use serde_json::{Value, json};

use super::args::QuantizeArgs;
use super::eval::{self, Compared, Contents};
use super::progress::Bars;
use super::{interrupt, model, output, usage};

/// What is run without --text: the text by which perplexities are held against PyTorch (docs/eval.md).
const TEXT: &str = include_str!("../../tests/data/perplexity/text.txt");

/// Compiles a checkpoint with weights of few bits and compares it with the original.
pub fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    if args.device.is_list() {
        model::open_device(&args.device)?;
        return Ok(());
    }
    let started = Instant::now();
    let (Some(path), Some(bits), Some(out)) = (&args.model, args.bits, &args.out) else {
        return usage("nothing to do: give MODEL, --bits 8 or 4, and --out");
    };
    model::must_exist(path, "MODEL is the directory of a checkpoint")?;
    if Bundle::is_bundle(path) {
        return usage(format!("{}: is a bundle already; quantize takes a checkpoint", path.display()));
    }
    if path.is_file() {
        return usage(format!("{}: is a file; MODEL is the directory of a checkpoint", path.display()));
    }
    let kl = args.kl();
    let contents = match &args.text {
        Some(_) => eval::read(&kl.text, &kl.model)?,
        None => Contents::Text(TEXT.to_owned()),
    };
    let format = WeightFormat::from(bits);
    let profile = Profile::load(&target(args)?)?;
    let checkpoint = Checkpoint::open(path)?;
    let options = Options {
        profile,
        weights: Some(format),
        latents: Latent::F16,
        reference: false,
        plan_only: false,
        taps: TapChoice::all(),
    };
    let bars = Bars::default();
    let progress = |done, total| bars.set("quantising", done, total, true);
    let warnings = compile_until(&checkpoint, &options, out, &progress, interrupt::flag())?;
    drop(bars);
    let sizes = Sizes::new(&checkpoint, &Bundle::open(out)?);
    drop(checkpoint);
    let seconds = started.elapsed().as_secs_f64();
    if args.no_measure {
        model::warn(&warnings); // else said when it is opened
    }
    if !args.json {
        output::write(&format!("{}: {} in {seconds:.1} s\n{}", out.display(), format.name(), sizes.text()))?;
    }
    let compared = if args.no_measure {
        None
    } else {
        let unmeasured = || format!("{} is written, but was not measured", out.display());
        eval::compare(&kl, &contents).with_context(unmeasured)?
    };
    if compared.as_ref().is_some_and(|compared| compared.comparison.divergence.is_empty()) {
        return interrupt::check();
    }
    if args.json {
        let mut report = json!({
            "bundle": out,
            "format": format.name(),
            "weight_bytes": sizes.after,
            "bits_per_weight": sizes.bits(sizes.after),
            "original": { "model": path, "weight_bytes": sizes.before, "bits_per_weight": sizes.bits(sizes.before) },
            "warnings": warnings,
            "seconds": seconds,
        });
        report["measured"] = compared.map_or(Value::Null, |compared| measured_json(args, &compared));
        return output::json(&report);
    }
    Ok(output::write(&compared.map_or(String::new(), |compared| measured_text(args, &compared)))?)
}

/// The profile's name: as asked, else the device's.
fn target(args: &QuantizeArgs) -> anyhow::Result<String> {
    if let Some(target) = &args.target {
        return Ok(target.clone());
    }
    let Some(gpu) = model::open_device(&args.device)? else { unreachable!("no list was asked for") };
    Ok(model::profile_for(gpu.info()).to_owned())
}

/// Bytes of weights, scales counted.
struct Sizes {
    before: u64,
    after: u64,
    parameters: u64,
}

impl Sizes {
    fn new(checkpoint: &Checkpoint, bundle: &Bundle) -> Self {
        let mut sizes = Self { before: 0, after: 0, parameters: 0 };
        for tensor in expected(checkpoint.config()) {
            // Copies of the embedding may be absent.
            let Some(view) = checkpoint.find(&tensor.name) else { continue };
            sizes.before += (view.data.len() + checkpoint.scale_of(&tensor.name).map_or(0, |s| s.data.len())) as u64;
            sizes.parameters += tensor.elements();
        }
        // What the compiler adds of its own is no weight.
        let weights = bundle.plan.weights.iter().filter(|weight| !weight.name.starts_with("moewe."));
        sizes.after = weights.map(Weight::bytes).sum();
        sizes
    }

    fn bits(&self, bytes: u64) -> f64 {
        8.0 * bytes as f64 / self.parameters as f64
    }

    fn text(&self) -> String {
        let size = |bytes| format!("{}, {:.2} bits a weight", output::bytes(bytes as f64), self.bits(bytes));
        format!("before         {}\nafter          {}\n", size(self.before), size(self.after))
    }
}

/// Where the text came from.
fn text_name(args: &QuantizeArgs) -> String {
    args.text.as_ref().map_or_else(|| "the text that comes with moewe".into(), |file| file.display().to_string())
}

fn measured_json(args: &QuantizeArgs, compared: &Compared) -> Value {
    let Comparison { divergence, model, reference, .. } = &compared.comparison;
    json!({
        "text": args.text,
        "complete": compared.is_complete(),
        "context": compared.context(),
        "predicted_tokens": divergence.len(),
        "kl": {
            "direction": "KL(original || result), nats",
            "mean": divergence.mean(),
            "standard_error": divergence.standard_error(),
            "median": divergence.quantile(0.5),
            "p99_9": divergence.quantile(0.999),
            "max": divergence.quantile(1.0),
        },
        "top1_agreement": compared.comparison.agreement(),
        "perplexity": { "original": reference.perplexity(), "result": model.perplexity() },
    })
}

fn measured_text(args: &QuantizeArgs, compared: &Compared) -> String {
    let Comparison { divergence, model, reference, .. } = &compared.comparison;
    let partial = if compared.is_complete() { "" } else { "interrupted: this is what was measured so far\n" };
    format!(
        "{partial}text           {}, {} tokens predicted\n\
         KL             {} ± {} nats, 99.9 % up to {}\n\
         same top token {:.2} %\n\
         perplexity     before {:.4}, after {:.4}\n",
        text_name(args),
        output::grouped(divergence.len() as u64),
        eval::small(divergence.mean()),
        eval::small(divergence.standard_error()),
        eval::small(divergence.quantile(0.999)),
        compared.comparison.agreement() * 100.0,
        reference.perplexity(),
        model.perplexity(),
    )
}
