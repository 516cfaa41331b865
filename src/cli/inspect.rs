//! `moewe inspect`.

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::inspect::{Gpu, GpuOptions, Options, Report, inspect};
use serde_json::json;

use super::args::InspectArgs;
use super::{model, output};

/// Counts what a model holds and costs.
pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    model::must_exist(&args.model, "give a checkpoint, a bundle or a config.json")?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let gpu = match &args.gpu {
        None => None,
        Some(name) => {
            let mut options = GpuOptions::new(Gpu::named(name)?);
            options.price_per_gpu_hour = args.price_per_gpu_hour;
            if let Some(context) = args.context {
                options.context = context as usize;
            }
            Some(options)
        }
    };
    let options = Options { cache_bits: args.cache_bits, gpu, ..Options::default() };
    let report = inspect(checkpoint.config(), Some(&checkpoint), &options)?;
    if args.json {
        return output::json(&json!(report));
    }
    Ok(output::write(&text(&report))?)
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out += &text;
        out.push('\n');
    };
    let config = &report.config;
    line(format!(
        "{:?}, {} layers, hidden size {}, {} routed experts ({} a token), context {}",
        config.family,
        config.num_hidden_layers,
        config.hidden_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.max_position_embeddings
    ));
    let parameters = &report.parameters;
    let shown = |number: u64| format!("{} ({})", output::count(number as f64), output::grouped(number));
    line("\nParameters".into());
    line(format!("  total   {}", shown(parameters.total)));
    line(format!("  active  {}", shown(parameters.active)));
    if parameters.mtp > 0 {
        line(format!("  MTP     {}, beside those", shown(parameters.mtp)));
    }
    for part in &parameters.parts {
        let name = serde_json::to_value(part.part).ok().and_then(|name| name.as_str().map(str::to_owned));
        let active = output::count(part.active as f64);
        line(format!("    {:<16} {:>9}, active {active}", name.unwrap_or_default(), output::count(part.total as f64)));
    }
    let tensors = &report.tensors;
    let state = if tensors.stored { "stored" } else { "implied by the configuration" };
    line(format!("\nTensors: {}, {}, {state}", tensors.count, output::bytes(tensors.bytes as f64)));
    for dtype in &tensors.dtypes {
        line(format!(
            "    {:<9} {:>7} tensors, {}",
            dtype.dtype.to_string(),
            dtype.count,
            output::bytes(dtype.bytes as f64)
        ));
    }
    let cache = &report.latent_cache;
    line("\nLatent cache".into());
    line(format!("  {} numbers a token and layer, {} layers", cache.numbers_per_token_per_layer, cache.layers));
    line(format!(
        "  {} a token at {} bits; plain attention would need {} at {} bits: {:.1} % saved",
        output::bytes(cache.bytes_per_token),
        cache.bits,
        output::bytes(cache.plain_attention_bytes_per_token),
        cache.plain_attention_bits,
        100.0 * cache.saved_fraction
    ));
    if let Some(gpu) = &report.gpu {
        let fits = if gpu.fits_one { "fits one".to_owned() } else { format!("needs {}", gpu.gpus) };
        line(format!(
            "\n{}: {} of weights, {} of memory: {fits}; floors at {} tokens of context",
            gpu.gpu.name,
            output::bytes(gpu.weight_bytes as f64),
            output::bytes(gpu.gpu.memory_bytes as f64),
            gpu.context
        ));
        let mut table =
            output::table(&["batch", "GPUs", "experts hit", "read a step", "ms a step", "tokens/s", "$/M tokens"]);
        for floor in &gpu.floors {
            table.add_row([
                floor.batch.to_string(),
                floor.gpus.to_string(),
                format!("{:.1}", floor.distinct_experts),
                output::bytes(floor.bytes),
                format!("{:.3}", floor.milliseconds),
                format!("{:.0}", floor.tokens_per_second),
                floor.dollars_per_million_tokens.map_or_else(|| "–".into(), |dollars| format!("{dollars:.3}")),
            ]);
        }
        line(table.to_string());
    }
    line("\nAssumptions".into());
    for assumption in &report.assumptions {
        line(format!("  · {assumption}"));
    }
    out
}
