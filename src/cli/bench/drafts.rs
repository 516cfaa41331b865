//! Single streams with drafts of multi-token prediction, against the same without.

use moewe_plan::{MAX_DRAFTS, PAGE_TOKENS, ProgramKind, Sampling};
use moewe_runtime::SessionOptions;
use moewe_runtime::engine::{Engine, EngineOptions, Mtp, Request};
use serde_json::{Value, json};

use super::super::generate::mtp_json;
use super::super::progress::Bars;
use super::super::{interrupt, model, output};
use super::floor::Floor;
use super::measure::{Spread, Taken, Times, Tokens};
use super::{Done, LeftOut, Part, Setup, timed_json, titled, wait};

/// Tokens of the beginning that the model writes itself behind a single random one.
const BEGINNING: usize = 64;
/// Random text would be guessed by nobody, and the likeliest text soon repeats itself.
const TEMPERATURE: f64 = 0.8;
/// A stream has so many times as many tokens as `--decode-tokens` says: that drafting pays is found out on the way.
const LONGER: usize = 4;

/// What one way of drafting brought.
struct Line {
    mtp: Mtp,
    /// Tokens of the prompt, and tokens behind the first new one.
    prompt: usize,
    tokens: u64,
    times: Times,
    /// Speed against no drafts, if that was measured.
    ratio: Option<Spread>,
    /// For each position behind a token, how many drafts were verified there and how many of them accepted.
    acceptance: Vec<(u64, u64)>,
    tokens_per_pass: f64,
    floor: Floor,
    /// Whether the tokens were those of the first way, all the time.
    same_text: bool,
}

/// Measures all modes, taking turns, so that their ratios mean something.
pub(super) fn measure(setup: &Setup, modes: &[Mtp]) -> anyhow::Result<Part> {
    let count = LONGER * setup.sizes.args.decode_tokens as usize;
    // With room for the drafts behind its end.
    let positions = 1 + BEGINNING + count + 2 * MAX_DRAFTS as usize;
    let mut part = Part::default();
    if modes.is_empty() || interrupt::is_set() {
        return Ok(part);
    }
    if positions as u64 > setup.max_context() {
        part.left_out = modes
            .iter()
            .map(|&mtp| LeftOut {
                line: mode_json(mtp, 1 + BEGINNING, count),
                name: format!("drafting, --mtp {}", mode_name(mtp)),
                reason: format!("{positions} positions, the model has {}", setup.max_context()),
            })
            .collect();
        return Ok(part);
    }
    let engines = modes.iter().map(|&mtp| engine(setup, mtp, positions)).collect::<anyhow::Result<Vec<_>>>()?;
    let runs = turns(setup, &engines, count)?;
    let lines: Vec<Line> = if runs.is_empty() {
        Vec::new()
    } else {
        (0..modes.len()).map(|mode| line(setup, modes, &runs, mode)).collect()
    };
    part.text = table(&lines, count);
    part.lines = lines.iter().map(Line::json).collect();
    Ok(part)
}

/// An engine for one stream, which keeps nothing for the next one.
fn engine(setup: &Setup, mtp: Mtp, positions: usize) -> anyhow::Result<Engine> {
    let mut kinds = vec![ProgramKind::Forward];
    if mtp != Mtp::Off {
        let drafts = |program: &&&moewe_plan::Program| matches!(program.kind, ProgramKind::Draft { .. });
        kinds.extend(setup.machine.programs.iter().filter(drafts).map(|program| program.kind));
        kinds.dedup();
    }
    let pages = Some(positions.div_ceil(PAGE_TOKENS as usize) as u32 + 1);
    let options = SessionOptions { precision: setup.precision(), kinds, pages, ..SessionOptions::default() };
    let session = model::session_with(setup.model, options)?;
    let prefill_chunk = setup.sizes.args.model.prefill_chunk.map(|chunk| chunk as usize);
    Ok(Engine::new(session, &EngineOptions { mtp, prefix_cache: false, prefill_chunk, ..EngineOptions::default() })?)
}

/// What each engine made of each text, without the first text, which warms up; less if Ctrl-C comes.
fn turns(setup: &Setup, engines: &[Engine], count: usize) -> anyhow::Result<Vec<Vec<Done>>> {
    let mut first = Tokens::new(setup.sizes.args.seed, setup.model.plan().model.vocab_size);
    let repeats = setup.sizes.args.repeat as usize;
    let bars = Bars::default();
    let mut runs = Vec::with_capacity(repeats);
    for repeat in 0..=repeats {
        let seed = setup.sizes.args.seed.wrapping_add(repeat as u64);
        let sampling = Sampling {
            temperature: TEMPERATURE as f32,
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            ..Sampling::default()
        };
        let request = |prompt, max_new_tokens| Request {
            prompt,
            max_new_tokens,
            sampling,
            ignore_eos: true,
            ..Request::default()
        };
        let mut prompt = first.take(1);
        let Some(beginning) = wait(engines[0].submit(request(prompt.clone(), BEGINNING))?)? else { break };
        prompt.extend(beginning.tokens);
        let mut turn: Vec<Option<Done>> = engines.iter().map(|_| None).collect();
        for place in 0..engines.len() {
            bars.set(
                "drafting",
                (repeat * engines.len() + place) as u64,
                ((repeats + 1) * engines.len()) as u64,
                false,
            );
            // Not always in the same order.
            let at = (place + repeat) % engines.len();
            turn[at] = wait(engines[at].submit(request(prompt.clone(), count))?)?;
            if turn[at].is_none() {
                return Ok(runs);
            }
        }
        if repeat > 0 {
            runs.push(turn.into_iter().flatten().collect());
        }
    }
    Ok(runs)
}

/// What one of the modes brought, in runs by text and mode.
fn line(setup: &Setup, modes: &[Mtp], runs: &[Vec<Done>], mode: usize) -> Line {
    let of = |mode: usize| runs.iter().map(move |turn| &turn[mode].finished);
    let seconds = |mode: usize| of(mode).map(|finished| finished.decode.as_secs_f64());
    let taken = |done: &Done| Taken { seconds: done.finished.decode.as_secs_f64(), cpu: done.decode_cpu };
    let off = modes.iter().position(|mtp| *mtp == Mtp::Off);
    let ratio = off.map(|off| Spread::of(seconds(off).zip(seconds(mode)).map(|(off, on)| off / on).collect()));
    let mut acceptance = vec![(0, 0); MAX_DRAFTS as usize];
    for finished in of(mode) {
        for (sum, (drafted, accepted)) in acceptance.iter_mut().zip(&finished.acceptance) {
            *sum = (sum.0 + drafted, sum.1 + accepted);
        }
    }
    let prompt = of(mode).map(|finished| finished.prompt_tokens).max().unwrap_or(0);
    let tokens = of(mode).map(|finished| finished.new_tokens.saturating_sub(1) as u64).max().unwrap_or(0);
    let passes = passes(tokens * runs.len() as u64, &acceptance);
    // Latents grow with the text, evenly: those behind its middle are the mean.
    let middle = prompt as u64 + tokens.saturating_sub(1) / 2;
    let all = passes.iter().zip(0..).map(|(&passes, drafts)| setup.machine.pass(drafts, middle).times(passes as f64));
    let made = made(&passes, &acceptance);
    Line {
        mtp: modes[mode],
        prompt,
        tokens,
        times: Times::of(&runs.iter().map(|turn| taken(&turn[mode])).collect::<Vec<_>>()),
        ratio,
        tokens_per_pass: made as f64 / passes.iter().sum::<u64>() as f64,
        floor: Floor::sum(all).times(tokens as f64 / made as f64),
        acceptance,
        same_text: runs.iter().all(|turn| turn[mode].tokens == turn[0].tokens),
    }
}

/// Passes by their number of drafts, which made so many tokens. The last one may have made more than were wanted.
fn passes(tokens: u64, acceptance: &[(u64, u64)]) -> Vec<u64> {
    let (with_drafts, accepted) = (acceptance.first().map_or(0, |first| first.0), accepted(acceptance));
    let mut passes = vec![tokens.saturating_sub(with_drafts + accepted)];
    for (at, &(drafted, _)) in acceptance.iter().enumerate() {
        passes.push(drafted - acceptance.get(at + 1).map_or(0, |next| next.0));
    }
    passes
}

/// Tokens that these passes made: one each, and the drafts that were accepted.
fn made(passes: &[u64], acceptance: &[(u64, u64)]) -> u64 {
    passes.iter().sum::<u64>() + accepted(acceptance)
}

fn accepted(acceptance: &[(u64, u64)]) -> u64 {
    acceptance.iter().map(|(_, accepted)| accepted).sum()
}

fn mode_name(mtp: Mtp) -> String {
    match mtp {
        Mtp::Off => "off".into(),
        Mtp::Auto => "auto".into(),
        Mtp::Fixed(drafts) => drafts.to_string(),
    }
}

fn mode_json(mtp: Mtp, prompt: usize, count: usize) -> Value {
    let mode = &mtp_json(mtp, &[])["mode"];
    json!({ "kind": "mtp", "mode": mode, "prompt_tokens": prompt, "decode_tokens": count })
}

impl Line {
    fn json(&self) -> Value {
        // The first one is prefill's.
        let mut value = mode_json(self.mtp, self.prompt, self.tokens as usize + 1);
        for (name, figure) in mtp_json(self.mtp, &self.acceptance).as_object().into_iter().flatten() {
            value[name] = figure.clone();
        }
        value["timed_tokens"] = json!(self.tokens);
        value["temperature"] = json!(TEMPERATURE);
        value["same_text"] = json!(self.same_text);
        value["tokens_per_pass"] = json!(self.tokens_per_pass);
        value["ratio_to_off"] = self.ratio.map_or(Value::Null, Spread::json);
        timed_json(&mut value, &self.times, self.tokens, self.floor);
        value
    }

    fn cells(&self) -> [String; 11] {
        let rates = self.times.seconds.rates(self.tokens);
        let tried = self.acceptance.iter().take_while(|position| position.0 > 0);
        let shares: Vec<String> =
            tried.map(|&(drafted, accepted)| format!("{:.0}", 100.0 * accepted as f64 / drafted as f64)).collect();
        [
            mode_name(self.mtp),
            format!("{:.1}", rates.median),
            format!("{:.1} – {:.1}", rates.min, rates.max),
            self.ratio.map_or_else(|| "–".into(), |ratio| format!("{:.3}", ratio.median)),
            if shares.is_empty() { "–".into() } else { shares.join(" ") },
            format!("{:.2}", self.tokens_per_pass),
            self.times.cpu_cell(self.tokens),
            output::bytes(self.floor.bytes / self.tokens as f64),
            format!("{:.1}", self.tokens as f64 / self.floor.seconds),
            self.floor.bound().name().to_owned(),
            format!("{:.2} %", self.floor.seconds / self.times.seconds.median * 100.0),
        ]
    }
}

fn table(lines: &[Line], count: usize) -> String {
    let mut table = output::table(&[
        "--mtp",
        "tokens/s",
        "lowest – highest",
        "of off",
        "accepted %",
        "a pass",
        "CPU ms",
        "bytes a token",
        "at floor",
        "bound",
        "reached",
    ]);
    for line in lines {
        table.add_row(line.cells());
    }
    let title = format!(
        "Drafting: one stream of {count} tokens behind {} that the model wrote itself, all at temperature {TEMPERATURE}, modes \
         in turn;\naccepted: share of the 1st, 2nd, … draft behind a token; a pass: tokens that it makes",
        1 + BEGINNING
    );
    let mut text = titled(&title, &table);
    for line in lines.iter().filter(|line| !line.same_text) {
        text += &format!("with --mtp {}, the text was not the same\n", mode_name(line.mtp));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_follow_from_acceptance() {
        // Ten tokens without drafts are ten passes.
        assert_eq!(passes(10, &[(0, 0), (0, 0)]), [10, 0, 0]);
        // Four passes with a draft, three of them accepted: seven tokens.
        assert_eq!(passes(7, &[(4, 3), (0, 0)]), [0, 4, 0]);
        // The last pass made one too many.
        assert_eq!(passes(6, &[(4, 3), (0, 0)]), [0, 4, 0]);
        // Two passes with one draft, three with two (5 accepted together), and five without.
        let mixed = [(5, 4), (3, 1)];
        assert_eq!(passes(15, &mixed), [5, 2, 3]);
        assert_eq!(made(&passes(15, &mixed), &mixed), 15);
        assert_eq!(made(&passes(6, &[(4, 3)]), &[(4, 3)]), 7);
    }
}
