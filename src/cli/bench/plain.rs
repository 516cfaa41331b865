//! Prefill and decode: what a session does without an engine around it.

use moewe_plan::ProgramKind;
use moewe_runtime::{Error, Session, SessionOptions};
use serde_json::{Value, json};

use super::super::args::BenchPart;
use super::super::progress::Bars;
use super::super::{interrupt, model, output};
use super::floor::{Floor, Machine};
use super::measure::{Measured, Times, measure as measure_line};
use super::{LeftOut, Part, Setup, Sizes, floor_json, timed_json, titled};

/// What one line measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
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

    /// Pages of the latent cache that all of them fill.
    fn pages(self) -> u64 {
        self.positions().div_ceil(moewe_plan::PAGE_TOKENS.into()) * u64::from(self.batch())
    }

    /// Tokens whose time is taken.
    fn tokens(self) -> u64 {
        match self {
            Work::Prefill { prompt_tokens, batch } => u64::from(prompt_tokens) * u64::from(batch),
            Work::Decode { batch, steps, .. } => u64::from(steps) * u64::from(batch),
        }
    }

    fn json(self) -> Value {
        match self {
            Work::Prefill { prompt_tokens, batch } => {
                json!({ "kind": "prefill", "batch": batch, "prompt_tokens": prompt_tokens })
            }
            Work::Decode { context, batch, steps } => {
                json!({ "kind": "decode", "batch": batch, "context": context, "decode_tokens": steps })
            }
        }
    }

    /// Times that a program runs for each sequence, as far as lines tell of one time.
    fn steps(self) -> f64 {
        match self {
            Work::Prefill { .. } => 1.0,
            Work::Decode { steps, .. } => steps.into(),
        }
    }

    fn left_out(self, reason: String) -> LeftOut {
        let name = match self {
            Work::Prefill { prompt_tokens, batch } => format!("prefill of {batch} × {prompt_tokens} tokens"),
            Work::Decode { context, batch, .. } => format!("decode of {batch} sequences behind {context} tokens"),
        };
        LeftOut { line: self.json(), name, reason }
    }
}

/// A line of the result.
struct Line {
    work: Work,
    times: Times,
    floor: Floor,
}

/// All that is asked for.
fn works(sizes: &Sizes) -> Vec<Work> {
    let (prompts, contexts) = (sizes.prompts(), sizes.contexts());
    let mut works = Vec::new();
    for &batch in sizes.batches().iter().filter(|_| sizes.has(BenchPart::Prefill)) {
        works.extend(prompts.iter().map(|&prompt_tokens| Work::Prefill { prompt_tokens, batch }));
    }
    let steps = sizes.args.decode_tokens;
    for &batch in sizes.batches().iter().filter(|_| sizes.has(BenchPart::Decode)) {
        works.extend(contexts.iter().map(|&context| Work::Decode { context, batch, steps }));
    }
    works
}

/// The floors of all that is asked for, without running it.
pub(super) fn floors(sizes: &Sizes, machine: &Machine) -> Part {
    let mut part = Part::default();
    let columns = ["work", "batch", "tokens", "ms", "tokens/s", "bytes", "flops", "bound"];
    let mut table = output::table(&columns);
    for work in works(sizes) {
        if work.positions() > machine.plan.model.max_context.into() {
            part.left_out.push(work.left_out(too_long(work, machine.plan.model.max_context)));
            continue;
        }
        let (floor, per) = (machine.floor(work), work.steps());
        let mut line = work.json();
        line["floor"] = floor_json(floor, work.tokens());
        part.lines.push(line);
        let (name, size) = match work {
            Work::Prefill { prompt_tokens, .. } => ("prefill", prompt_tokens),
            Work::Decode { context, .. } => ("decode behind", context),
        };
        table.add_row([
            name.to_owned(),
            work.batch().to_string(),
            size.to_string(),
            format!("{:.3}", floor.seconds * 1e3 / per),
            format!("{:.1}", work.tokens() as f64 / floor.seconds),
            output::bytes(floor.bytes / per),
            output::count(floor.flops as f64 / per),
            floor.bound().name().to_owned(),
        ]);
    }
    part.text = titled("Floors: of a prompt, and of a step of decode", &table);
    part
}

/// Measures prompts and batches of the sizes asked for.
pub(super) fn measure(setup: &Setup) -> anyhow::Result<Part> {
    let Setup { sizes, machine, .. } = setup;
    let works = works(sizes);
    if works.is_empty() {
        return Ok(Part::default());
    }
    let forward = machine.programs.iter().filter(|program| program.kind == ProgramKind::Forward);
    let rows = forward.map(|program| program.max_rows).max().unwrap_or(1);
    let most = works.iter().map(|work| work.batch()).filter(|batch| *batch <= rows).max().unwrap_or(1);
    let mut session = session(setup, &works, most)?;
    let (max_tokens, max_batch) = session.capacity(ProgramKind::Forward)?;
    let chunk = max_tokens.min(machine.chunk as usize);

    let (mut lines, mut left_out) = (Vec::new(), Vec::new());
    let bars = Bars::default();
    for (index, &work) in works.iter().enumerate() {
        if interrupt::is_set() {
            break;
        }
        bars.set("measuring", index as u64, works.len() as u64, false);
        if let Some(reason) = too_large(work, max_batch.min(most as usize), &session) {
            left_out.push(work.left_out(reason));
            continue;
        }
        match measure_line(&mut session, work, chunk, sizes.args)? {
            Measured::Times(times) => lines.push(Line { work, times, floor: machine.floor(work) }),
            Measured::Interrupted => break,
        }
    }
    Ok(Part { text: tables(&lines), lines: lines.iter().map(Line::json).collect(), left_out })
}

/// A session with room for the largest work that the device has room for, if any is larger than what sessions have anyway.
fn session(setup: &Setup, works: &[Work], max_sequences: u32) -> anyhow::Result<Session> {
    let kinds = vec![ProgramKind::Forward];
    let options = SessionOptions { precision: setup.precision(), kinds, max_sequences, ..Default::default() };
    let session = model::session_with(setup.model, options.clone())?;
    let possible = |work: &&Work| work.batch() <= max_sequences && work.positions() <= setup.max_context();
    let mut pages: Vec<u64> = works.iter().filter(possible).map(|work| work.pages()).collect();
    pages.sort_unstable();
    pages.dedup();
    let (there, _) = session.pages();
    let larger: Vec<u64> = pages.into_iter().rev().take_while(|pages| *pages > there as u64).collect();
    if larger.is_empty() {
        return Ok(session);
    }
    drop(session);
    for pages in larger {
        let options = SessionOptions { pages: u32::try_from(pages).ok(), ..options.clone() };
        match model::session_with(setup.model, options) {
            Ok(session) => return Ok(session),
            Err(error) => match error.downcast_ref() {
                Some(Error::OutOfMemory { .. } | Error::BufferTooLarge { .. }) => {}
                _ => return Err(error),
            },
        }
    }
    model::session_with(setup.model, options)
}

/// That a work has more positions than the model.
fn too_long(work: Work, max_context: u32) -> String {
    format!("{} positions, the model has {max_context}", work.positions())
}

/// Why a line cannot be measured, if it cannot.
fn too_large(work: Work, max_batch: usize, session: &Session) -> Option<String> {
    let (batch, positions) = (u64::from(work.batch()), work.positions());
    let max_context = session.model().plan().model.max_context;
    let pages = work.pages();
    let (there, _) = session.pages();
    if batch > max_batch as u64 {
        Some(format!("at most {max_batch} sequences run at once"))
    } else if positions > max_context.into() {
        Some(too_long(work, max_context))
    } else if pages > there as u64 {
        Some(format!("{pages} pages of the latent cache, there is room for {there}"))
    } else {
        None
    }
}

impl Line {
    fn json(&self) -> Value {
        let mut value = self.work.json();
        timed_json(&mut value, &self.times, self.work.tokens(), self.floor);
        match self.work {
            Work::Prefill { .. } => value["first_token_seconds"] = json!(self.times.seconds.median),
            Work::Decode { steps, .. } => value["step_seconds"] = json!(self.times.seconds.median / f64::from(steps)),
        }
        value
    }

    /// Cells of a table; milliseconds, bytes and flops are those of a step.
    fn cells(&self, size: u32) -> [String; 11] {
        let (rates, per) = (self.times.seconds.rates(self.work.tokens()), self.work.steps());
        let milliseconds = self.times.seconds.median * 1e3 / per;
        [
            self.work.batch().to_string(),
            size.to_string(),
            format!("{milliseconds:.2}"),
            format!("{:.1}", rates.median),
            format!("{:.1} – {:.1}", rates.min, rates.max),
            self.times.cpu_cell(self.work.tokens()),
            output::bytes(self.floor.bytes / per),
            output::count(self.floor.flops as f64 / per),
            format!("{:.1}", self.work.tokens() as f64 / self.floor.seconds),
            self.floor.bound().name().to_owned(),
            format!("{:.2} %", self.floor.seconds / self.times.seconds.median * 100.0),
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
            "CPU ms",
            "bytes",
            "flops",
            "at floor",
            "bound",
            "reached",
        ])
    };
    let mut prefill = head("prompt", "first token ms");
    let mut decode = head("context", "ms a step");
    for line in lines {
        match line.work {
            Work::Prefill { prompt_tokens, .. } => prefill.add_row(line.cells(prompt_tokens)),
            Work::Decode { context, .. } => decode.add_row(line.cells(context)),
        };
    }
    titled("Prefill: prompts of random tokens, up to the first new token of each", &prefill)
        + &titled("Decode behind random tokens: bytes and flops of a step", &decode)
}
