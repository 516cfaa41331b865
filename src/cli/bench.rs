//! `moewe bench`.

mod drafts;
mod floor;
mod measure;
mod plain;
mod prefix;
mod serve;

use std::sync::Arc;

use moewe_plan::{Plan, Precision, Program, ProgramKind};
use moewe_runtime::engine::{Event, Finished, Mtp, Stream};
use moewe_runtime::{AdapterInfo, DeviceType, Error, Loaded, Model};
use serde_json::{Value, json};

use super::args::{BenchArgs, BenchCommand, BenchPart};
use super::served::draft_modules;
use super::speed::Speed;
use super::{interrupt, model, output, usage};
use floor::{Floor, Machine, Rates};
use measure::{Clock, Spread, Times};

/// What is to be measured, and in which sizes.
#[derive(Clone, Copy)]
struct Sizes<'a> {
    args: &'a BenchArgs,
    /// Whether the device is a software driver: it is to be done within a minute, too.
    is_slow: bool,
}

/// What all parts measure with.
struct Setup<'a> {
    sizes: Sizes<'a>,
    model: &'a Arc<Model>,
    machine: Machine<'a>,
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
    if args.floor && args.model.path().as_os_str().is_empty() {
        return device_floors(args);
    }
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let sizes = Sizes { args, is_slow: opened.gpu().info().device_type == DeviceType::Cpu };
    let speed = Speed::measure(opened.gpu())?;
    let head = |loaded| Head { args, opened: &opened, speed: &speed, loaded };
    if args.floor {
        return head(None).write(&[plain::floors(&sizes, &machine(args, opened.plan(), &speed))]);
    }
    let mut modes = modes(args, draft_modules(opened.plan()))?;
    if !sizes.has(BenchPart::Drafts) {
        modes.clear();
    }
    let mut kinds = vec![ProgramKind::Forward];
    if modes.iter().any(|mode| *mode != Mtp::Off) {
        kinds.extend((1..=draft_modules(opened.plan())).map(|module| ProgramKind::Draft { module }));
    }
    let model = opened.load(&kinds)?;
    let setup = Setup { sizes, model: &model, machine: machine(args, model.plan(), &speed) };
    // Each part frees the sessions of the one before.
    head(Some(model.loaded())).write(&[
        plain::measure(&setup)?,
        drafts::measure(&setup, &modes)?,
        prefix::measure(&setup)?,
    ])
}

/// `--floor` without a model: what the device can do at most.
fn device_floors(args: &BenchArgs) -> anyhow::Result<()> {
    let Some(gpu) = model::open_device(&args.model.device)? else { return Ok(()) };
    let speed = Speed::measure(&gpu)?;
    let info = gpu.info();
    if args.json {
        let mut value = json!({ "date": date_json(), "device": device_json(info) });
        speed.add_to(&mut value);
        return output::json(&value);
    }
    let head = format!("{} ({}, {} {})\n", info.name, info.device_type.name(), info.driver, info.driver_info);
    Ok(output::write(&(head + &speed.text()))?)
}

/// What floors of a plan's lines depend on.
fn machine<'a>(args: &BenchArgs, plan: &'a Plan, speed: &Speed) -> Machine<'a> {
    let precision = Precision::from(args.model.precision);
    let programs: Vec<&Program> = plan.programs.iter().filter(|p| p.precision == precision).collect();
    let chunk = programs.iter().filter(|p| p.kind == ProgramKind::Forward).map(|p| p.max_tokens).max().unwrap_or(1);
    let chunk = args.model.prefill_chunk.map_or(chunk, |limit| chunk.min(limit)).into();
    let rates =
        Rates { bytes_per_second: speed.bytes_per_second(), flops_per_second: speed.flops_per_second(precision) };
    Machine { plan, programs, chunk, rates }
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

impl Sizes<'_> {
    /// Whether a part is to be measured.
    fn has(&self, part: BenchPart) -> bool {
        self.args.only.is_empty() || self.args.only.contains(&part)
    }

    /// The sizes that were asked for, or those that suit the device.
    fn choose(&self, said: &[u32], fast: &[u32], slow: &[u32]) -> Vec<u32> {
        match (said, self.is_slow) {
            ([], true) => slow.to_vec(),
            ([], false) => fast.to_vec(),
            _ => said.to_vec(),
        }
    }

    /// Tokens of prompts.
    fn prompts(&self) -> Vec<u32> {
        self.choose(&self.args.prompt_tokens, &[128, 512], &[64, 256])
    }

    /// Sequences at once.
    fn batches(&self) -> Vec<u32> {
        self.choose(&self.args.batch, &[1, 4, 16], &[1, 4])
    }

    /// Tokens in the cache when decoding begins.
    fn contexts(&self) -> Vec<u32> {
        self.choose(&self.args.context, &[0, 1024], &[0, 256])
    }
}

impl Setup<'_> {
    fn precision(&self) -> Precision {
        self.sizes.args.model.precision.into()
    }

    /// The most positions that a sequence has.
    fn max_context(&self) -> u64 {
        self.model.plan().model.max_context.into()
    }
}

/// A request that came to its end.
struct Done {
    tokens: Vec<u32>,
    finished: Finished,
    /// Seconds of processors from its first tokens to its end, where the system tells.
    decode_cpu: Option<f64>,
}

/// Waits for a request; `None` if Ctrl-C came first.
fn wait(mut stream: Stream) -> anyhow::Result<Option<Done>> {
    let (mut tokens, mut decode) = (Vec::new(), None);
    loop {
        match stream.recv() {
            Some(Event::Began { .. }) => {}
            Some(Event::Tokens(more)) => {
                decode.get_or_insert_with(Clock::start);
                tokens.extend(more.ids);
            }
            Some(Event::Finished(finished)) => {
                let decode_cpu = decode.and_then(|clock| clock.stop().cpu);
                return Ok((!interrupt::is_set()).then_some(Done { tokens, finished: *finished, decode_cpu }));
            }
            Some(Event::Failed(error)) if matches!(*error, Error::Interrupted) => return Ok(None),
            Some(Event::Failed(error)) => return Err(error.into()),
            None => return Err(Error::EngineStopped.into()),
        }
    }
}

/// What all lines have in common.
struct Head<'a> {
    args: &'a BenchArgs,
    opened: &'a model::Opened,
    speed: &'a Speed,
    /// Unless only floors are asked for.
    loaded: Option<Loaded>,
}

/// What floors assume.
const ASSUMPTIONS: [&str; 8] = [
    "a run reads each weight once and each sequence's latents once, and its steps hand activations on through memory",
    "what stays in a processor's caches need not move: a model that fits them can pass its floor",
    "T tokens choose k of E experts evenly and independently, so a layer reads E * (1 - (1 - k/E)^T), at most min(T * k, E)",
    "a pass with n drafts runs the model and each of its MTP modules over 1 + n rows, the last module over one more row for\n    \
     each draft that has no module of its own, and the head each time",
    "pages of latents that are copied, or loaded from disk, are read and written once; shared ones do not move",
    "copy speed counts bytes read and written, and is that of the faster of kernel and driver",
    "operations are as fast as in the device's fastest product of large matrices: in f32 where the precision is exact",
    "moving and computing overlap; dispatches, submissions and files cost nothing",
];

impl Head<'_> {
    fn write(&self, parts: &[Part]) -> anyhow::Result<()> {
        if self.args.json {
            return output::json(&self.json(parts));
        }
        let tables: String = parts.iter().map(|part| part.text.as_str()).collect();
        Ok(output::write(&(self.text() + &tables + &notes(parts)))?)
    }

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
        if !self.args.floor {
            out += &format!(
                "median of {} (lowest – highest); CPU ms: time of processors for each token\n",
                self.args.repeat
            );
        }
        if let Some(loaded) = self.loaded {
            out += &format!("{loaded}\n");
        }
        out += &format!("\nThe device at most\n{}", self.speed.text());
        out += "\nFloor of each run: the longer of bytes that must move / copy speed and operations / matrix rate. It assumes:\n";
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
        let mut value = json!({
            "model": self.args.model.path(),
            "date": date_json(),
            "complete": !interrupt::is_set(),
            "device": device_json(info),
            "versions": { "moewe": env!("CARGO_PKG_VERSION"), "bundle": plan.generator },
            "target": plan.requirements.profile,
            "precision": Precision::from(self.args.model.precision).name(),
            "loaded": self.loaded.map(loaded_json),
            "assumptions": assumptions,
            "repeat": self.args.repeat,
            "seed": self.args.seed,
            "lines": parts.iter().flat_map(|part| &part.lines).collect::<Vec<_>>(),
            "skipped": skipped.collect::<Vec<_>>(),
        });
        self.speed.add_to(&mut value);
        value
    }
}

fn loaded_json(loaded: Loaded) -> Value {
    json!({
        "file_bytes": loaded.file_bytes,
        "copied_bytes": loaded.copied_bytes,
        "seconds": loaded.seconds,
        "read_seconds": loaded.read_seconds,
        "verify_seconds": loaded.verify_seconds,
        "copy_seconds": loaded.copy_seconds,
    })
}

fn date_json() -> String {
    jiff::Timestamp::now().strftime("%FT%TZ").to_string()
}

fn device_json(info: &AdapterInfo) -> Value {
    json!({
        "name": info.name,
        "type": info.device_type.name(),
        "driver": info.driver,
        "driver_info": info.driver_info,
    })
}

/// A table with a title, or nothing.
fn titled(title: &str, table: &comfy_table::Table) -> String {
    if table.row_count() == 0 { String::new() } else { format!("\n{title}\n{table}\n") }
}

/// What all lines say for scripts: the time for so many tokens, beside its floor.
fn timed_json(line: &mut Value, times: &Times, tokens: u64, floor: Floor) {
    line["seconds"] = times.seconds.json();
    line["tokens_per_second"] = times.seconds.rates(tokens).json();
    line["cpu_seconds"] = times.cpu.map_or(Value::Null, Spread::json);
    line["cpu_seconds_per_token"] = json!(times.cpu.map(|cpu| cpu.median / tokens as f64));
    line["floor"] = floor_json(floor, tokens);
    line["share_of_floor"] = json!(floor.seconds / times.seconds.median);
}

/// The floor of so many tokens, for scripts.
fn floor_json(floor: Floor, tokens: u64) -> Value {
    json!({
        "bytes": floor.bytes,
        "flops": floor.flops,
        "seconds": floor.seconds,
        "tokens_per_second": tokens as f64 / floor.seconds,
        "bound": floor.bound().name(),
    })
}

fn notes(parts: &[Part]) -> String {
    let mut notes = String::new();
    for line in parts.iter().flat_map(|part| &part.left_out) {
        notes += &format!("left out: {}: {}\n", line.name, line.reason);
    }
    let interrupted = if interrupt::is_set() { "interrupted: this is what was measured so far\n" } else { "" };
    if notes.is_empty() && interrupted.is_empty() { notes } else { format!("\n{notes}{interrupted}") }
}
