//! `moewe bench`.

mod floor;
mod measure;

use moewe_plan::{Precision, Program, ProgramKind};
use moewe_runtime::{Bandwidth, DeviceType, SessionOptions, copy_bandwidth};
use serde_json::{Value, json};

use super::args::BenchArgs;
use super::progress::Bars;
use super::{interrupt, model, output};
use floor::{Floor, Machine};
use measure::{Measured, Spread};

/// What one line measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Prompts of so many tokens, up to the first new token of each.
    Prefill { prompt_tokens: u32, batch: u32 },
    /// So many tokens for each sequence, behind so many in its cache.
    Decode { context: u32, batch: u32, steps: u32 },
}

impl Work {
    fn batch(self) -> u32 {
        match self {
            Work::Prefill { batch, .. } | Work::Decode { batch, .. } => batch,
        }
    }

    /// Positions that each sequence fills.
    fn positions(self) -> u64 {
        match self {
            Work::Prefill { prompt_tokens, .. } => prompt_tokens.into(),
            Work::Decode { context, steps, .. } => u64::from(context) + u64::from(steps),
        }
    }

    /// Tokens whose time is taken.
    fn tokens(self) -> u64 {
        match self {
            Work::Prefill { prompt_tokens, batch } => u64::from(prompt_tokens) * u64::from(batch),
            Work::Decode { batch, steps, .. } => u64::from(steps) * u64::from(batch),
        }
    }
}

/// A line of the result.
struct Line {
    work: Work,
    seconds: Spread,
    floor: Floor,
}

/// Measures prefill and decode.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let bandwidth = copy_bandwidth(opened.gpu())?;
    let precision = Precision::from(args.model.precision);
    // A software driver is to be done within a minute, too.
    let is_slow = opened.gpu().info().device_type == DeviceType::Cpu;
    let or = |said: &[u32], fast: &[u32], slow: &[u32]| match (said, is_slow) {
        ([], true) => slow.to_vec(),
        ([], false) => fast.to_vec(),
        _ => said.to_vec(),
    };
    let prompts = or(&args.prompt_tokens, &[128, 512], &[64, 256]);
    let batches = or(&args.batch, &[1, 4, 16], &[1, 4]);
    let contexts = or(&args.context, &[0, 1024], &[0, 256]);
    let kinds = [ProgramKind::Forward];
    let loaded = opened.load(&kinds)?;
    let plan = loaded.plan();
    let programs: Vec<&Program> =
        plan.programs.iter().filter(|p| p.kind == ProgramKind::Forward && p.precision == precision).collect();
    let rows = programs.iter().map(|program| program.max_rows).max().unwrap_or(1);
    let most = batches.iter().copied().filter(|batch| *batch <= rows).max().unwrap_or(1);
    let options = SessionOptions { precision, kinds: kinds.to_vec(), max_sequences: most, ..Default::default() };
    let mut session = model::session_with(&loaded, options)?;
    let (chunk, max_batch) = session.capacity(ProgramKind::Forward)?;
    let chunk = args.model.prefill_chunk.map_or(chunk, |limit| chunk.min(limit as usize));
    let machine = Machine { plan, programs, chunk: chunk as u64, bytes_per_second: fastest(&bandwidth) };

    let prefill = batches
        .iter()
        .flat_map(|&batch| prompts.iter().map(move |&prompt_tokens| Work::Prefill { prompt_tokens, batch }));
    let decode = batches.iter().flat_map(|&batch| {
        let steps = args.decode_tokens;
        contexts.iter().map(move |&context| Work::Decode { context, batch, steps })
    });
    let works: Vec<Work> = prefill.chain(decode).collect();
    let (mut lines, mut skipped) = (Vec::new(), Vec::new());
    let bars = Bars::default();
    for (index, &work) in works.iter().enumerate() {
        if interrupt::is_set() {
            break;
        }
        bars.set("measuring", index as u64, works.len() as u64, false);
        if let Some(reason) = too_large(work, max_batch.min(most as usize), &session) {
            skipped.push((work, reason));
            continue;
        }
        match measure::measure(&mut session, work, chunk, args)? {
            Measured::Seconds(seconds) => lines.push(Line { work, seconds, floor: machine.floor(work) }),
            Measured::Interrupted => break,
        }
    }
    drop(bars);
    let head = Head { args, opened: &opened, bandwidth };
    if args.json {
        return output::json(&head.json(&lines, &skipped));
    }
    Ok(output::write(&(head.text() + &tables(&lines) + &notes(&skipped)))?)
}

/// Bytes a second of the faster kind of copy: a floor must not be too high.
fn fastest(bandwidth: &Bandwidth) -> f64 {
    bandwidth.kernel.max(bandwidth.copy) * 1e9
}

/// Why a line cannot be measured, if it cannot.
fn too_large(work: Work, max_batch: usize, session: &moewe_runtime::Session) -> Option<String> {
    let (batch, positions) = (u64::from(work.batch()), work.positions());
    let max_context = session.model().plan().model.max_context;
    let pages = positions.div_ceil(moewe_plan::PAGE_TOKENS.into()) * batch;
    let (there, _) = session.pages();
    if batch > max_batch as u64 {
        Some(format!("at most {max_batch} sequences run at once"))
    } else if positions > max_context.into() {
        Some(format!("{positions} positions, the model has {max_context}"))
    } else if pages > there as u64 {
        Some(format!("{pages} pages of the latent cache, there is room for {there}"))
    } else {
        None
    }
}

/// What all lines have in common.
struct Head<'a> {
    args: &'a BenchArgs,
    opened: &'a model::Opened,
    bandwidth: Bandwidth,
}

/// What floors assume.
const ASSUMPTIONS: [&str; 5] = [
    "a run reads each weight once and each sequence's latents once, and its steps hand activations on through memory",
    "what stays in a processor's caches need not move: a model that fits them can pass its floor",
    "T tokens choose k of E experts evenly and independently, so a layer reads E * (1 - (1 - k/E)^T), at most min(T * k, E)",
    "copy speed counts bytes read and written, and is that of the faster of kernel and driver",
    "arithmetic, dispatches and submissions cost nothing",
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
            "median of {} (lowest – highest), random tokens; copies: {:.1} GB/s by a kernel, {:.1} by the driver\n",
            self.args.repeat, self.bandwidth.kernel, self.bandwidth.copy
        );
        out += "\nFloor: bytes that must move / copy speed. It assumes:\n";
        for assumption in ASSUMPTIONS {
            out += &format!("  - {assumption}\n");
        }
        out
    }

    fn json(&self, lines: &[Line], skipped: &[(Work, String)]) -> Value {
        let (info, plan) = (self.opened.gpu().info(), self.opened.plan());
        let skipped = skipped.iter().map(|(work, reason)| {
            let mut value = work_json(*work);
            value["reason"] = json!(reason);
            value
        });
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
            "assumptions": ASSUMPTIONS,
            "repeat": self.args.repeat,
            "seed": self.args.seed,
            "lines": lines.iter().map(Line::json).collect::<Vec<_>>(),
            "skipped": skipped.collect::<Vec<_>>(),
        })
    }
}

fn work_json(work: Work) -> Value {
    match work {
        Work::Prefill { prompt_tokens, batch } => {
            json!({ "kind": "prefill", "batch": batch, "prompt_tokens": prompt_tokens })
        }
        Work::Decode { context, batch, steps } => {
            json!({ "kind": "decode", "batch": batch, "context": context, "decode_tokens": steps })
        }
    }
}

impl Line {
    /// Tokens a second of all sequences: median, lowest, highest.
    fn rates(&self) -> Spread {
        let tokens = self.work.tokens() as f64;
        let Spread { median, min, max } = self.seconds;
        Spread { median: tokens / median, min: tokens / max, max: tokens / min }
    }

    fn reached(&self) -> f64 {
        self.floor.seconds / self.seconds.median
    }

    fn json(&self) -> Value {
        let spread = |Spread { median, min, max }: Spread| json!({ "median": median, "min": min, "max": max });
        let mut value = work_json(self.work);
        value["seconds"] = spread(self.seconds);
        value["tokens_per_second"] = spread(self.rates());
        match self.work {
            Work::Prefill { .. } => value["first_token_seconds"] = json!(self.seconds.median),
            Work::Decode { steps, .. } => value["step_seconds"] = json!(self.seconds.median / f64::from(steps)),
        }
        value["floor"] = json!({
            "bytes": self.floor.bytes,
            "flops": self.floor.flops,
            "seconds": self.floor.seconds,
            "tokens_per_second": self.work.tokens() as f64 / self.floor.seconds,
        });
        value["share_of_floor"] = json!(self.reached());
        value
    }

    /// Cells of a table; bytes and flops are those of all that is timed, divided by `per`.
    fn cells(&self, size: u32, milliseconds: f64, per: u32) -> [String; 9] {
        let rates = self.rates();
        [
            self.work.batch().to_string(),
            size.to_string(),
            format!("{milliseconds:.2}"),
            format!("{:.1}", rates.median),
            format!("{:.1} – {:.1}", rates.min, rates.max),
            output::bytes(self.floor.bytes / f64::from(per)),
            output::count(self.floor.flops as f64 / f64::from(per)),
            format!("{:.1}", self.work.tokens() as f64 / self.floor.seconds),
            format!("{:.2} %", self.reached() * 100.0),
        ]
    }
}

fn tables(lines: &[Line]) -> String {
    let head = |name: &'static str, time: &'static str| {
        output::table(&[
            "batch",
            name,
            time,
            "tokens/s",
            "lowest – highest",
            "bytes",
            "flops",
            "floor tokens/s",
            "reached",
        ])
    };
    let mut prefill = head("prompt", "first token ms");
    let mut decode = head("context", "ms a step");
    for line in lines {
        let milliseconds = line.seconds.median * 1e3;
        match line.work {
            Work::Prefill { prompt_tokens, .. } => prefill.add_row(line.cells(prompt_tokens, milliseconds, 1)),
            Work::Decode { context, steps, .. } => {
                decode.add_row(line.cells(context, milliseconds / f64::from(steps), steps))
            }
        };
    }
    let part = |name: &str, table: &comfy_table::Table| match table.row_count() {
        0 => String::new(),
        _ => format!("\n{name}\n{table}\n"),
    };
    part("Prefill: prompts of random tokens, up to the first new token of each", &prefill)
        + &part("Decode: bytes and flops of a step", &decode)
}

fn notes(skipped: &[(Work, String)]) -> String {
    let note = |(work, reason): &(Work, String)| match work {
        Work::Prefill { prompt_tokens, batch } => {
            format!("left out: prefill of {batch} × {prompt_tokens} tokens: {reason}\n")
        }
        Work::Decode { context, batch, .. } => {
            format!("left out: decode of {batch} sequences behind {context} tokens: {reason}\n")
        }
    };
    let notes: String = skipped.iter().map(note).collect();
    let interrupted = if interrupt::is_set() { "interrupted: this is what was measured so far\n" } else { "" };
    if notes.is_empty() && interrupted.is_empty() { notes } else { format!("\n{notes}{interrupted}") }
}
