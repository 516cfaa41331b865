//! `moewe explain`.

use moewe_plan::{Bundle, Kernel, Plan, Program, ProgramKind, Step, Symbols, When};
use serde_json::{Value, json};

use super::args::ExplainArgs;
use super::cost::{Load, cost as cost_of};
use super::{model, output};

/// Shows what a bundle's programs consist of.
pub fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    model::must_exist(&args.bundle, "BUNDLE is a directory that `moewe compile` wrote")?;
    let bundle = Bundle::open(&args.bundle)?;
    let plan = &bundle.plan;
    let programs: Vec<&Program> = plan.programs.iter().filter(|p| p.precision == args.precision.into()).collect();
    if args.json {
        let programs: Vec<Value> = programs.iter().map(|program| program_json(plan, program, args)).collect();
        return output::json(&json!({
            "target": plan.requirements.profile,
            "tokens": args.tokens,
            "context": args.context,
            "programs": programs,
        }));
    }
    let mut out = format!(
        "{}: {}, {} layers, compiled for {} by {}\n{} kernels, {} of weights, bindings up to {}\n",
        args.bundle.display(),
        plan.model.architecture,
        plan.model.layers,
        plan.requirements.profile,
        plan.generator,
        plan.kernels.len(),
        output::bytes(plan.weights.iter().map(moewe_plan::Weight::bytes).sum::<u64>() as f64),
        output::bytes(plan.requirements.max_binding_bytes as f64),
    );
    // The forward program that serves this batch, then one line for each other program.
    let chosen = programs.iter().find(|p| p.kind == ProgramKind::Forward && p.max_tokens >= args.tokens);
    let chosen = chosen.or_else(|| programs.iter().rfind(|p| p.kind == ProgramKind::Forward));
    if let Some(program) = chosen {
        out += &program_text(plan, program, args);
    }
    out += "\nPrograms\n";
    for program in &programs {
        let marker = if chosen.is_some_and(|chosen| std::ptr::eq(*chosen, *program)) { "  (shown above)" } else { "" };
        out += &format!(
            "  {:<9} up to {:>3} tokens: {} dispatches{}{marker}\n",
            kind_name(program.kind),
            program.max_tokens,
            plain(program).count(),
            more(program)
        );
    }
    if let Some(text) = chosen.and_then(|chosen| drafting_text(&programs, chosen)) {
        out += &text;
    }
    Ok(output::write(&out)?)
}

fn kind_name(kind: ProgramKind) -> String {
    match kind {
        ProgramKind::Forward => "forward".into(),
        ProgramKind::Watch => "watch".into(),
        ProgramKind::Trace => "trace".into(),
        ProgramKind::Draft { module } => format!("draft {module}"),
    }
}

/// Steps that run whatever is watched, and without drafting. A draft program does nothing but draft.
fn plain(program: &Program) -> impl Iterator<Item = &Step> {
    let drafts = matches!(program.kind, ProgramKind::Draft { .. });
    program.steps.iter().filter(move |step| step.only_for.is_empty() && step.when.holds(drafts, false))
}

/// Steps that drafting adds to a program.
fn drafting(program: &Program) -> usize {
    let always = program.steps.iter().filter(|step| step.only_for.is_empty() && step.when.holds(true, false)).count();
    always - plain(program).count()
}

/// What taps, drafting and log probabilities add to them, in words.
fn more(program: &Program) -> String {
    let taps = program.steps.iter().filter(|step| !step.only_for.is_empty()).count();
    let logprobs = program.steps.iter().filter(|step| step.when == When::Logprobs).count();
    let parts = [
        (drafting(program), "", "for drafting"),
        (taps, "up to ", "for taps"),
        (logprobs, "", "for log probabilities"),
    ];
    let mut text = String::new();
    for (more, up_to, what) in parts.into_iter().filter(|(more, ..)| *more > 0) {
        text += &format!(", {up_to}{more} more {what}");
    }
    text
}

/// What it costs to draft behind a pass, in words; `None` without modules that could.
fn drafting_text(programs: &[&Program], forward: &Program) -> Option<String> {
    let module = |program: &Program| match program.kind {
        ProgramKind::Draft { module } => Some(module),
        _ => None,
    };
    let last = programs.iter().filter_map(|program| module(program)).max()?;
    let dispatches = |number: u32| {
        let of = programs.iter().find(|program| module(program) == Some(number));
        of.map_or(0, |program| plain(program).count())
    };
    let each: Vec<String> = (1..=last).map(|number| format!("draft {number}: {}", dispatches(number))).collect();
    Some(format!(
        "\nDrafting\n  Dispatches that it adds to a forward pass: {}, and those of a draft program for each token drafted\n  \
         ({}{}). Drafts are checked by the next forward pass.\n",
        drafting(forward),
        each.join(", "),
        if last == 1 { ", again for each further one" } else { ", the last again for each further one" }
    ))
}

/// Rows whose logits are wanted: those of the last token.
const ROWS: u64 = 1;

/// Bytes and operations of a step for a batch.
fn cost(step: &Step, args: &ExplainArgs) -> (u64, u64) {
    let tokens = u64::from(args.tokens);
    let attended = tokens * u64::from(args.context);
    cost_of(step, &Load { tokens, rows: ROWS, cached: attended, attended })
}

fn symbols(args: &ExplainArgs) -> Symbols {
    Symbols { tokens: args.tokens.into(), rows: ROWS, sequences: 1, pages: 1 }
}

/// Plain steps of one layer, in order; those outside of layers stand before or behind.
fn by_layer(program: &Program) -> Vec<(Option<u32>, Vec<&Step>)> {
    let mut layers: Vec<(Option<u32>, Vec<&Step>)> = Vec::new();
    for step in plain(program) {
        match layers.last_mut() {
            Some((layer, steps)) if *layer == step.layer => steps.push(step),
            _ => layers.push((step.layer, vec![step])),
        }
    }
    layers
}

/// The part of a label behind the layer.
fn part(step: &Step) -> &str {
    step.label.strip_prefix("layers.").and_then(|rest| rest.split_once('.')).map_or(&step.label, |(_, part)| part)
}

/// Kernel, plugs and flags of a variant's name, without its constants.
fn short(kernel: &Kernel) -> &str {
    kernel.name.split("__").next().unwrap_or_default()
}

fn program_text(plan: &Plan, program: &Program, args: &ExplainArgs) -> String {
    let mut out = format!(
        "\nForward pass, tokens: {}, with logits: {ROWS}, context behind each: {}, dispatches: {}, recorded ahead as one pass.\n\
         CPU visits between its tokens and dispatches: none. Grids come from the size of the batch, chosen experts are read\n\
         by the kernels, and the sampled token is the next pass's input on the device.\n",
        args.tokens,
        args.context,
        plain(program).count()
    );
    let mut shown: Vec<(String, String)> = Vec::new();
    let mut why: Vec<&str> = Vec::new();
    for (layer, steps) in by_layer(program) {
        let name = layer.map_or_else(|| "outside of layers".to_owned(), |layer| format!("layer {layer}"));
        let totals =
            steps.iter().map(|step| cost(step, args)).fold((0, 0), |sum, cost| (sum.0 + cost.0, sum.1 + cost.1));
        let mut table = output::table(&["step", "kernel", "grid", "bytes", "flops"]);
        table.column_mut(1).into_iter().for_each(|column| {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        });
        for step in &steps {
            let kernel = &plan.kernels[step.kernel as usize];
            if !why.contains(&kernel.why.as_str()) {
                why.push(&kernel.why);
            }
            let grid: Vec<String> = step.grid.iter().map(|dim| dim.eval(&symbols(args)).to_string()).collect();
            let (bytes, flops) = cost(step, args);
            let flops = if flops == 0 { "–".into() } else { output::count(flops as f64) };
            table.add_row([
                part(step).to_owned(),
                short(kernel).to_owned(),
                grid.join(" × "),
                output::bytes(bytes as f64),
                flops,
            ]);
        }
        let table = table.to_string();
        let head = format!(
            "\n{name}: dispatches {}, bytes moved {}, flops {}",
            steps.len(),
            output::bytes(totals.0 as f64),
            output::count(totals.1 as f64)
        );
        // Layers of one kind look alike: the first is shown whole.
        if let Some((_, first)) = shown.iter().find(|(text, _)| *text == table) {
            out += &format!("{head}, like {first}\n");
        } else {
            out += &format!("{head}\n{table}\n");
            shown.push((table, name));
        }
    }
    out += "\nWhy these variants\n";
    for why in why {
        out += &format!("  {why}\n");
    }
    out
}

fn program_json(plan: &Plan, program: &Program, args: &ExplainArgs) -> Value {
    let layers = by_layer(program).into_iter().map(|(layer, steps)| {
        let steps: Vec<Value> = steps
            .iter()
            .map(|step| {
                let kernel = &plan.kernels[step.kernel as usize];
                let (bytes, flops) = cost(step, args);
                json!({
                    "label": step.label,
                    "kernel": kernel.name,
                    "why": kernel.why,
                    "grid": step.grid.iter().map(|dim| dim.eval(&symbols(args))).collect::<Vec<_>>(),
                    "bytes": bytes,
                    "flops": flops,
                })
            })
            .collect();
        json!({ "layer": layer, "dispatches": steps.len(), "steps": steps })
    });
    json!({
        "program": kind_name(program.kind),
        "max_tokens": program.max_tokens,
        "dispatches": plain(program).count(),
        "drafting_dispatches": drafting(program),
        "cpu_visits": 0,
        "layers": layers.collect::<Vec<_>>(),
    })
}
