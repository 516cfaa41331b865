//! Time to the first token behind a beginning that was run before, kept in the device's memory or on disk, or not at all.

use std::path::Path;

use anyhow::Context;
use moewe_plan::{PAGE_TOKENS, ProgramKind};
use moewe_runtime::engine::{Engine, EngineOptions, Event, Finished, Mtp, Request};
use moewe_runtime::{Session, SessionOptions};
use serde_json::{Value, json};

use super::super::args::BenchPart;
use super::super::progress::Bars;
use super::super::{interrupt, model, output};
use super::floor::Floor;
use super::measure::{Clock, Spread, Taken, Times, Tokens};
use super::{LeftOut, Part, Setup, timed_json, titled, wait};

/// Tokens behind the beginning, which are new each time.
const NEW: u32 = 8;

/// Where latents of the beginning are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Nowhere,
    Device,
    Disk,
}

const ALL: [Kept; 3] = [Kept::Nowhere, Kept::Device, Kept::Disk];

impl Kept {
    fn name(self) -> &'static str {
        match self {
            Self::Nowhere => "nowhere",
            Self::Device => "device",
            Self::Disk => "disk",
        }
    }

    fn json(self, beginning: u32) -> Value {
        json!({ "kind": "prefix_cache", "kept": self.name(), "beginning": beginning, "prompt_tokens": beginning + NEW })
    }
}

struct Line {
    kept: Kept,
    beginning: u32,
    /// Tokens of the prompt that were run.
    computed: u64,
    copied_bytes: u64,
    times: Times,
    floor: Floor,
}

/// Measures prompts of the sizes asked for.
pub(super) fn measure(setup: &Setup) -> anyhow::Result<Part> {
    let mut part = Part::default();
    if !setup.sizes.has(BenchPart::Prefix) || interrupt::is_set() {
        return Ok(part);
    }
    let kinds = vec![ProgramKind::Forward];
    let options = SessionOptions { precision: setup.precision(), kinds, ..SessionOptions::default() };
    let mut session = model::session_with(setup.model, options)?;
    let (mut lines, mut warnings) = (Vec::new(), Vec::new());
    let (prompts, bars) = (setup.sizes.prompts(), Bars::default());
    for (index, &beginning) in prompts.iter().enumerate() {
        bars.set("prefix cache", index as u64, prompts.len() as u64, false);
        if let Some(reason) = too_large(setup, &session, beginning) {
            part.left_out.extend(ALL.map(|kept| LeftOut {
                line: kept.json(beginning),
                name: format!("prefix cache with {beginning} tokens of beginning, kept: {}", kept.name()),
                reason: reason.clone(),
            }));
            continue;
        }
        let page_bytes = session.page_bytes();
        let (back, runs, warned) = runs(setup, session, beginning)?;
        session = back;
        warnings.extend(warned);
        // All three or nothing.
        if runs.iter().any(Vec::is_empty) {
            break;
        }
        lines.extend(ALL.into_iter().zip(runs).map(|(kept, runs)| line(setup, page_bytes, (kept, beginning), &runs)));
    }
    drop(bars);
    warnings.dedup();
    model::warn(&warnings);
    part.text = table(&lines);
    part.lines = lines.iter().map(Line::json).collect();
    Ok(part)
}

/// Why a line cannot be measured, if it cannot.
fn too_large(setup: &Setup, session: &Session, beginning: u32) -> Option<String> {
    let positions = u64::from(beginning) + u64::from(NEW) + 1;
    // Two prompts share the beginning's full pages.
    let pages = positions.div_ceil(PAGE_TOKENS.into()) + 2;
    let (there, _) = session.pages();
    if positions > setup.max_context() {
        Some(format!("{positions} positions, the model has {}", setup.max_context()))
    } else if pages > there as u64 {
        Some(format!("{pages} pages of the latent cache, there is room for {there}"))
    } else {
        None
    }
}

/// A run, timed from its submission to its first token.
type Run = (Taken, Finished);

/// Runs of each kind, without the first ones, which warm up; fewer if Ctrl-C comes. Gives the session back, and what went
/// wrong besides.
fn runs(setup: &Setup, session: Session, beginning: u32) -> anyhow::Result<(Session, [Vec<Run>; 3], Vec<String>)> {
    let vocab_size = setup.model.plan().model.vocab_size;
    let mut random = Tokens::new(setup.sizes.args.seed, vocab_size);
    let beginning = random.take(beginning);
    let mut tail = random.take(NEW);
    // What follows differs from its first token on, so that nothing of it is ever found.
    let mut prompt = || {
        tail[0] = (tail[0] + 1) % vocab_size;
        [&beginning[..], &tail].concat()
    };
    let dir = tempfile::tempdir().context("cannot make a temporary directory for the prefix cache on disk")?;
    let mut runs = [Vec::new(), Vec::new(), Vec::new()];
    let mut warnings = Vec::new();

    let writer = engine(setup, session, Some(dir.path()))?;
    let done = wait(writer.submit(request(beginning.clone()))?)?;
    let mut session = stop(writer, &mut warnings)?;
    if done.is_none() {
        return Ok((session, runs, warnings));
    }
    for repeat in 0..=setup.sizes.args.repeat {
        let in_memory = engine(setup, session, None)?;
        let nowhere = first_token(&in_memory, prompt())?;
        let device = first_token(&in_memory, prompt())?;
        let from_disk = engine(setup, stop(in_memory, &mut warnings)?, Some(dir.path()))?;
        let disk = first_token(&from_disk, prompt())?;
        session = stop(from_disk, &mut warnings)?;
        let (Some(nowhere), Some(device), Some(disk)) = (nowhere, device, disk) else { break };
        if repeat > 0 {
            for (runs, run) in runs.iter_mut().zip([nowhere, device, disk]) {
                runs.push(run);
            }
        }
    }
    Ok((session, runs, warnings))
}

fn engine(setup: &Setup, session: Session, dir: Option<&Path>) -> anyhow::Result<Engine> {
    let options = EngineOptions {
        mtp: Mtp::Off,
        cache_dir: dir.map(|dir| (dir.to_owned(), u64::MAX)),
        prefill_chunk: setup.sizes.args.model.prefill_chunk.map(|chunk| chunk as usize),
        ..EngineOptions::default()
    };
    Ok(Engine::new(session, &options)?)
}

/// Ends an engine, whose prefix cache in the device's memory goes with it.
fn stop(engine: Engine, warnings: &mut Vec<String>) -> anyhow::Result<Session> {
    engine.flush();
    warnings.extend(engine.stats().warnings);
    Ok(engine.stop()?)
}

fn request(prompt: Vec<u32>) -> Request {
    Request { prompt, max_new_tokens: 1, ignore_eos: true, ..Request::default() }
}

/// Runs a prompt up to its first token; `None` if Ctrl-C came first.
fn first_token(engine: &Engine, prompt: Vec<u32>) -> anyhow::Result<Option<Run>> {
    let clock = Clock::start();
    let mut stream = engine.submit(request(prompt))?;
    let mut taken = Taken::default();
    loop {
        match stream.recv() {
            Some(Event::Began { .. }) => {}
            Some(Event::Tokens(_)) => taken = clock.stop(),
            Some(Event::Finished(finished)) => return Ok((!interrupt::is_set()).then_some((taken, *finished))),
            Some(Event::Failed(error)) if matches!(*error, moewe_runtime::Error::Interrupted) => return Ok(None),
            Some(Event::Failed(error)) => return Err(error.into()),
            None => return Ok(None),
        }
    }
}

fn line(setup: &Setup, page_bytes: u64, (kept, beginning): (Kept, u32), runs: &[Run]) -> Line {
    let prompt = u64::from(beginning) + u64::from(NEW);
    // The same each time.
    let known = runs.iter().map(|(_, finished)| finished.cached_tokens as u64).min().unwrap_or(0);
    let page = u64::from(PAGE_TOKENS);
    // Pages in the device's memory are shared, but for one that is not full.
    let pages = match kept {
        Kept::Nowhere => 0,
        Kept::Device => u64::from(!known.is_multiple_of(page)),
        Kept::Disk => known / page,
    };
    let copied_bytes = pages * page_bytes;
    Line {
        kept,
        beginning,
        computed: prompt - known,
        copied_bytes,
        times: Times::of(&runs.iter().map(|(taken, _)| *taken).collect::<Vec<_>>()),
        floor: setup.machine.resumed(known, prompt - known, 2 * copied_bytes),
    }
}

impl Line {
    fn json(&self) -> Value {
        let mut value = self.kept.json(self.beginning);
        value["computed_tokens"] = json!(self.computed);
        value["copied_bytes"] = json!(self.copied_bytes);
        value["first_token_seconds"] = json!(self.times.seconds.median);
        timed_json(&mut value, &self.times, u64::from(self.beginning + NEW), self.floor);
        value
    }

    fn cells(&self) -> [String; 10] {
        let Spread { median, min, max } = self.times.seconds;
        [
            self.kept.name().to_owned(),
            (self.beginning + NEW).to_string(),
            self.computed.to_string(),
            format!("{:.2}", median * 1e3),
            format!("{:.2} – {:.2}", min * 1e3, max * 1e3),
            output::bytes(self.copied_bytes as f64),
            output::bytes(self.floor.bytes),
            format!("{:.3}", self.floor.seconds * 1e3),
            self.floor.bound().name().to_owned(),
            format!("{:.2} %", self.floor.seconds / median * 100.0),
        ]
    }
}

fn table(lines: &[Line]) -> String {
    let mut table = output::table(&[
        "kept",
        "prompt",
        "computed",
        "first token ms",
        "lowest – highest",
        "copied",
        "bytes",
        "floor ms",
        "bound",
        "reached",
    ]);
    for line in lines {
        table.add_row(line.cells());
    }
    let title = format!(
        "Prefix cache: a prompt of random tokens, all but the last {NEW} of which were run before; where their latents were kept"
    );
    titled(&title, &table)
}
