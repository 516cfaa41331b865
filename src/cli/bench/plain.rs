//! Prefill and decode: what a session does without an engine around it.

use moewe_plan::ProgramKind;
use moewe_runtime::{Session, SessionOptions};
use serde_json::{Value, json};

use super::super::progress::Bars;
use super::super::{interrupt, model, output};
use super::floor::Floor;
use super::measure::{Measured, Spread, measure as measure_line};
use super::{LeftOut, Part, Setup, timed_json, titled};

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
    seconds: Spread,
    floor: Floor,
}

/// Measures prompts and batches of the sizes asked for.
pub(super) fn measure(setup: &Setup) -> anyhow::Result<Part> {
    let Setup { args, machine, .. } = setup;
    let prompts = setup.prompts();
    let batches = setup.sizes(&args.batch, &[1, 4, 16], &[1, 4]);
    let contexts = setup.sizes(&args.context, &[0, 1024], &[0, 256]);
    let forward = machine.programs.iter().filter(|program| program.kind == ProgramKind::Forward);
    let rows = forward.map(|program| program.max_rows).max().unwrap_or(1);
    let most = batches.iter().copied().filter(|batch| *batch <= rows).max().unwrap_or(1);
    let kinds = vec![ProgramKind::Forward];
    let options = SessionOptions { precision: setup.precision(), kinds, max_sequences: most, ..Default::default() };
    let mut session = model::session_with(setup.model, options)?;
    let (max_tokens, max_batch) = session.capacity(ProgramKind::Forward)?;
    let chunk = max_tokens.min(machine.chunk as usize);

    let prefill = batches
        .iter()
        .flat_map(|&batch| prompts.iter().map(move |&prompt_tokens| Work::Prefill { prompt_tokens, batch }));
    let decode = batches.iter().flat_map(|&batch| {
        let steps = args.decode_tokens;
        contexts.iter().map(move |&context| Work::Decode { context, batch, steps })
    });
    let works: Vec<Work> = prefill.chain(decode).collect();
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
        match measure_line(&mut session, work, chunk, args)? {
            Measured::Seconds(seconds) => lines.push(Line { work, seconds, floor: machine.floor(work) }),
            Measured::Interrupted => break,
        }
    }
    Ok(Part { text: tables(&lines), lines: lines.iter().map(Line::json).collect(), left_out })
}

/// Why a line cannot be measured, if it cannot.
fn too_large(work: Work, max_batch: usize, session: &Session) -> Option<String> {
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

impl Line {
    fn json(&self) -> Value {
        let mut value = self.work.json();
        timed_json(&mut value, self.seconds, self.work.tokens(), self.floor);
        match self.work {
            Work::Prefill { .. } => value["first_token_seconds"] = json!(self.seconds.median),
            Work::Decode { steps, .. } => value["step_seconds"] = json!(self.seconds.median / f64::from(steps)),
        }
        value
    }

    /// Cells of a table; bytes and flops are those of all that is timed, divided by `per`.
    fn cells(&self, size: u32, milliseconds: f64, per: u32) -> [String; 9] {
        let rates = self.seconds.rates(self.work.tokens());
        [
            self.work.batch().to_string(),
            size.to_string(),
            format!("{milliseconds:.2}"),
            format!("{:.1}", rates.median),
            format!("{:.1} – {:.1}", rates.min, rates.max),
            output::bytes(self.floor.bytes / f64::from(per)),
            output::count(self.floor.flops as f64 / f64::from(per)),
            format!("{:.1}", self.work.tokens() as f64 / self.floor.seconds),
            format!("{:.2} %", self.floor.seconds / self.seconds.median * 100.0),
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
    titled("Prefill: prompts of random tokens, up to the first new token of each", &prefill)
        + &titled("Decode behind random tokens: bytes and flops of a step", &decode)
}
