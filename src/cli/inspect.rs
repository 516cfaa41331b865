//! `moewe inspect`.

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::config::Config;
use moewe_compiler::inspect::{
    Amount, Bound, Gpu, GpuOptions, Options, Pass, PassCost, Report, Stage, arithmetic, inspect,
};
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
    if let (true, Some(gpu)) = (args.parts, &options.gpu) {
        return parts(&checkpoint, &options, gpu, args.json);
    }
    let report = inspect(checkpoint.config(), Some(&checkpoint), &options)?;
    if args.json {
        return output::json(&json!(report));
    }
    Ok(output::write(&text(&report))?)
}

/// Batches of decode and prompts whose passes are shown by part.
const BATCHES: [u64; 3] = [1, 8, 64];
const PROMPTS: [u64; 2] = [512, 4096];

/// `--parts`.
fn parts(checkpoint: &Checkpoint, options: &Options, gpu: &GpuOptions, as_json: bool) -> anyhow::Result<()> {
    let config = checkpoint.config();
    // Refuses options that make no sense, and tensors that do not fit.
    inspect(config, Some(checkpoint), options)?;
    let decode = BATCHES.map(|batch| (format!("decode {batch}"), Pass::decode(batch, gpu.context as u64)));
    let prefill = PROMPTS.map(|tokens| (format!("prefill {tokens}"), Pass::prefill(tokens)));
    let (names, passes): (Vec<String>, Vec<Pass>) = decode.into_iter().chain(prefill).unzip();
    let costs = arithmetic(config, Some(checkpoint), options.cache_bits, &gpu.gpu, &passes);
    if as_json {
        return output::json(&json!({
            "gpu": gpu.gpu,
            "context": gpu.context,
            "cache_bits": options.cache_bits,
            "passes": costs,
        }));
    }
    Ok(output::write(&parts_text(config, options, gpu, &names, &costs))?)
}

fn parts_text(config: &Config, options: &Options, gpu: &GpuOptions, names: &[String], costs: &[PassCost]) -> String {
    let header: Vec<&str> = std::iter::once("").chain(names.iter().map(String::as_str)).collect();
    let table = |cell: &dyn Fn(&PassCost, &Amount) -> String| {
        let mut table = output::table(&header);
        let of = |cost: &PassCost, stage| cost.parts.iter().find(|part| part.0 == stage).map(|part| part.1);
        for stage in Stage::ALL {
            let amounts: Option<Vec<Amount>> = costs.iter().map(|cost| of(cost, stage)).collect();
            let Some(amounts) = amounts else { continue };
            let cells = costs.iter().zip(&amounts).map(|(cost, amount)| cell(cost, amount));
            table.add_row(std::iter::once(stage.name().to_owned()).chain(cells));
        }
        let cells = costs.iter().map(|cost| cell(cost, &cost.total));
        table.add_row(std::iter::once("all".to_owned()).chain(cells));
        table
    };
    let bytes = table(&|cost, amount| output::bytes(amount.bytes / cost.pass.tokens as f64));
    let flops = table(&|cost, amount| output::count(amount.flops / cost.pass.tokens as f64));
    let times = table(&|_, amount| {
        let bound = match amount.bound {
            Bound::Bytes => "bytes",
            Bound::Flops => "flops",
        };
        format!("{:.3} {bound}", amount.seconds * 1e3)
    });
    let experts: Vec<String> = costs.iter().map(|cost| format!("{:.1}", cost.distinct_experts)).collect();
    let text = format!(
        "{:?}, {} layers, decode behind {} tokens, latents of {} bits; distinct experts of {} read in a layer: {}\n\n\
         Bytes a token\n{bytes}\n\nFlops a token\n{flops}\n\n\
         Milliseconds of a pass at {} TB/s and {} TFLOP/s ({}), and what bounds them\n{times}\n",
        config.family,
        config.num_hidden_layers,
        gpu.context,
        options.cache_bits,
        config.n_routed_experts,
        experts.join(", "),
        gpu.gpu.bandwidth / 1e12,
        gpu.gpu.flops / 1e12,
        gpu.gpu.name,
    );
    // Tables pad their last column.
    text.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
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
