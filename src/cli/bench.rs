//! `moewe bench`.

mod drafts;
mod floor;
mod measure;
mod plain;
mod prefix;
mod serve;

use std::sync::Arc;

use moewe_plan::{Precision, Program, ProgramKind};
use moewe_runtime::engine::{Finished, Mtp, Stream};
use moewe_runtime::{Bandwidth, DeviceType, Error, Model, copy_bandwidth};
use serde_json::{Value, json};

use super::args::{BenchArgs, BenchCommand};
use super::served::draft_modules;
use super::{interrupt, model, output, usage};
use floor::{Floor, Machine};
use measure::Spread;

/// What all parts measure with.
struct Setup<'a> {
    args: &'a BenchArgs,
    model: &'a Arc<Model>,
    machine: Machine<'a>,
    /// Whether the device is a software driver: it is to be done within a minute, too.
    is_slow: bool,
}

/// What a part of the measurements brought.
#[derive(Default)]
struct Part {
    /// Tables.
    text: String,
    /// Their lines for scripts.
    lines: Vec<Value>,
    left_out: Vec<LeftOut>,
}

/// A line that could not be measured.
struct LeftOut {
    /// Which one: for scripts, and in words.
    line: Value,
    name: String,
    reason: String,
}

/// Measures prefill and decode, drafts and the prefix cache.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if let Some(BenchCommand::Serve(load)) = &args.command {
        return serve::run(load);
    }
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let modes = modes(args, draft_modules(opened.plan()))?;
    let bandwidth = copy_bandwidth(opened.gpu())?;
    let mut kinds = vec![ProgramKind::Forward];
    if modes.iter().any(|mode| *mode != Mtp::Off) {
        kinds.extend((1..=draft_modules(opened.plan())).map(|module| ProgramKind::Draft { module }));
    }
    let model = opened.load(&kinds)?;
    let plan = model.plan();
    let precision = Precision::from(args.model.precision);
    let programs: Vec<&Program> = plan.programs.iter().filter(|p| p.precision == precision).collect();
    let chunk = programs.iter().filter(|p| p.kind == ProgramKind::Forward).map(|p| p.max_tokens).max().unwrap_or(1);
    let chunk = args.model.prefill_chunk.map_or(chunk, |limit| chunk.min(limit)).into();
    let machine = Machine { plan, programs, chunk, bytes_per_second: fastest(&bandwidth) };
    let is_slow = opened.gpu().info().device_type == DeviceType::Cpu;
    let setup = Setup { args, model: &model, machine, is_slow };
    // Each part frees the sessions of the one before.
    let parts = [plain::measure(&setup)?, drafts::measure(&setup, &modes)?, prefix::measure(&setup)?];
    let head = Head { args, opened: &opened, bandwidth };
    if args.json {
        return output::json(&head.json(&parts));
    }
    let tables: String = parts.iter().map(|part| part.text.as_str()).collect();
    Ok(output::write(&(head.text() + &tables + &notes(&parts)))?)
}

/// How single streams are to draft, for a model with so many modules that can.
fn modes(args: &BenchArgs, modules: u32) -> anyhow::Result<Vec<Mtp>> {
    if modules > 0 {
        let default = || vec![Mtp::Off, Mtp::Fixed(1), Mtp::Auto];
        return Ok(if args.mtp.is_empty() { default() } else { args.mtp.clone() });
    }
    if args.mtp.iter().any(|mode| *mode != Mtp::Off) {
        return usage("--mtp: the model has no modules of multi-token prediction that could draft; leave it out");
    }
    Ok(args.mtp.clone())
}

/// Bytes a second of the faster kind of copy: a floor must not be too high.
fn fastest(bandwidth: &Bandwidth) -> f64 {
    bandwidth.kernel.max(bandwidth.copy) * 1e9
}

impl Setup<'_> {
    /// The sizes that were asked for, or those that suit the device.
    fn sizes(&self, said: &[u32], fast: &[u32], slow: &[u32]) -> Vec<u32> {
        match (said, self.is_slow) {
            ([], true) => slow.to_vec(),
            ([], false) => fast.to_vec(),
            _ => said.to_vec(),
        }
    }

    /// Tokens of prompts.
    fn prompts(&self) -> Vec<u32> {
        self.sizes(&self.args.prompt_tokens, &[128, 512], &[64, 256])
    }

    fn precision(&self) -> Precision {
        self.args.model.precision.into()
    }

    /// The most positions that a sequence has.
    fn max_context(&self) -> u64 {
        self.model.plan().model.max_context.into()
    }
}

/// Waits for a request; `None` if Ctrl-C came first.
fn wait(stream: Stream) -> anyhow::Result<Option<(Vec<u32>, Finished)>> {
    match stream.finish() {
        Ok(done) => Ok((!interrupt::is_set()).then_some(done)),
        Err(error) if matches!(*error, Error::Interrupted) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What all lines have in common.
struct Head<'a> {
    args: &'a BenchArgs,
    opened: &'a model::Opened,
    bandwidth: Bandwidth,
}

/// What floors assume.
const ASSUMPTIONS: [&str; 7] = [
    "a run reads each weight once and each sequence's latents once, and its steps hand activations on through memory",
    "what stays in a processor's caches need not move: a model that fits them can pass its floor",
    "T tokens choose k of E experts evenly and independently, so a layer reads E * (1 - (1 - k/E)^T), at most min(T * k, E)",
    "a pass with n drafts runs the model and each of its MTP modules over 1 + n rows, the last module over one more row for\n    \
     each draft that has no module of its own, and the head each time",
    "pages of latents that are copied, or loaded from disk, are read and written once; shared ones do not move",
    "copy speed counts bytes read and written, and is that of the faster of kernel and driver",
    "arithmetic, dispatches, submissions and files cost nothing",
];

impl Head<'_> {
    fn text(&self) -> String {
        let (info, plan) = (self.opened.gpu().info(), self.opened.plan());
        let mut out = format!(
            "{} on {} ({}, {} {})\n{} precision, compiled for {} by {}; moewe {}, {}\n",
            self.args.model.path().display(),
            info.name,
            info.device_type.name(),
            info.driver,
            info.driver_info,
            Precision::from(self.args.model.precision).name(),
            plan.requirements.profile,
            plan.generator,
            env!("CARGO_PKG_VERSION"),
            jiff::Timestamp::now().strftime("%F %T UTC"),
        );
        out += &format!(
            "median of {} (lowest – highest); copies: {:.1} GB/s by a kernel, {:.1} by the driver\n",
            self.args.repeat, self.bandwidth.kernel, self.bandwidth.copy
        );
        out += "\nFloor: bytes that must move / copy speed. It assumes:\n";
        for assumption in ASSUMPTIONS {
            out += &format!("  - {assumption}\n");
        }
        out
    }

    fn json(&self, parts: &[Part]) -> Value {
        let (info, plan) = (self.opened.gpu().info(), self.opened.plan());
        let skipped = parts.iter().flat_map(|part| &part.left_out).map(|left_out| {
            let mut value = left_out.line.clone();
            value["reason"] = json!(left_out.reason);
            value
        });
        let assumptions = ASSUMPTIONS.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
        json!({
            "model": self.args.model.path(),
            "date": jiff::Timestamp::now().strftime("%FT%TZ").to_string(),
            "complete": !interrupt::is_set(),
            "device": {
                "name": info.name,
                "type": info.device_type.name(),
                "driver": info.driver,
                "driver_info": info.driver_info,
            },
            "versions": { "moewe": env!("CARGO_PKG_VERSION"), "bundle": plan.generator },
            "target": plan.requirements.profile,
            "precision": Precision::from(self.args.model.precision).name(),
            "copy_gigabytes_per_second": { "kernel": self.bandwidth.kernel, "driver": self.bandwidth.copy },
            "assumptions": assumptions,
            "repeat": self.args.repeat,
            "seed": self.args.seed,
            "lines": parts.iter().flat_map(|part| &part.lines).collect::<Vec<_>>(),
            "skipped": skipped.collect::<Vec<_>>(),
        })
    }
}

/// A table with a title, or nothing.
fn titled(title: &str, table: &comfy_table::Table) -> String {
    if table.row_count() == 0 { String::new() } else { format!("\n{title}\n{table}\n") }
}

/// What all lines say for scripts: the time for so many tokens, beside its floor.
fn timed_json(line: &mut Value, seconds: Spread, tokens: u64, floor: Floor) {
    line["seconds"] = seconds.json();
    line["tokens_per_second"] = seconds.rates(tokens).json();
    line["floor"] = json!({
        "bytes": floor.bytes,
        "flops": floor.flops,
        "seconds": floor.seconds,
        "tokens_per_second": tokens as f64 / floor.seconds,
    });
    line["share_of_floor"] = json!(floor.seconds / seconds.median);
}

fn notes(parts: &[Part]) -> String {
    let mut notes = String::new();
    for line in parts.iter().flat_map(|part| &part.left_out) {
        notes += &format!("left out: {}: {}\n", line.name, line.reason);
    }
    let interrupted = if interrupt::is_set() { "interrupted: this is what was measured so far\n" } else { "" };
    if notes.is_empty() && interrupted.is_empty() { notes } else { format!("\n{notes}{interrupted}") }
}
