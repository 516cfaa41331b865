//! `moewe tune`: which kernels are fastest on a device for the shapes of a model.
//!
//! The cases are operations of the model's own graph ([`cases()`]), lowered alone by the compiler for each candidate profile, so
//! that what is timed is what is compiled. A candidate is verified against the oracle before it is timed ([`Device`]); of those
//! that agree the fastest is taken if it is clearly faster ([`choose()`]).

mod candidates;
mod cases;
mod check;
mod choose;
mod data;
mod run;

use std::sync::Arc;

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::lower::Bench;
use moewe_compiler::profile::{Profile, Row, Tuned};
use moewe_runtime::{AdapterInfo, DeviceType, Gpu};

pub use candidates::{Knob, knobs};
pub use cases::{Case, Load, cases};
pub use choose::{Measure, Verdict, choose, confirm};
pub use run::{Device, Dropped};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The compiler's side.
    #[error(transparent)]
    Compile(#[from] moewe_compiler::error::Error),
    /// The device's side.
    #[error(transparent)]
    Run(#[from] moewe_runtime::Error),
}

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How thoroughly.
#[derive(Clone, Debug)]
pub struct Options {
    /// Smaller batches, fewer repetitions, each choice once.
    pub quick: bool,
    /// Name of the model, for the record.
    pub model: String,
    /// When, in UTC as RFC 3339 has it.
    pub date: String,
}

/// What was found.
#[derive(Debug)]
pub struct Outcome {
    /// The profile, with what was measured.
    pub profile: Profile,
    /// For each row of it, whether the kernels are those that it started from.
    pub unchanged: Vec<bool>,
    /// Candidates that are wrong on this device.
    pub dropped: Vec<Dropped>,
    /// Cases that could not be measured.
    pub skipped: Vec<Skipped>,
}

/// A case, and why it could not be measured.
pub type Skipped = (String, String);

/// The batches that are measured on a device.
pub fn load(gpu: &Gpu, quick: bool, max_context: usize) -> Load {
    let (prompt, context) = match (gpu.info().device_type == DeviceType::Cpu, quick) {
        // How many tokens an expert has decides which tiles suit, so there must be as many as in real passes, or nearly.
        (true, true) => (64, 128),
        (true, false) => (128, 512),
        (false, true) => (256, 1024),
        (false, false) => (256, 4096),
    };
    Load { prompt: prompt.min(max_context.max(2)), context: context.min(max_context) }
}

/// Tunes these choices of `start` for a model on a device.
///
/// # Errors
/// A checkpoint that cannot be compiled, a device that fails, or an interruption.
pub fn tune(
    checkpoint: &Checkpoint,
    gpu: &Arc<Gpu>,
    start: &Profile,
    options: &Options,
    knobs: &[Knob],
    progress: &dyn Fn(usize, usize),
) -> Result<Outcome> {
    let bench = Bench::new(checkpoint)?;
    let load = load(gpu, options.quick, checkpoint.config().max_position_embeddings);
    let mut cases = cases(&bench, start, load)?;
    cases.retain(|case| knobs.iter().any(|knob| (knob.matters)(case)));
    let (cases, skipped) = feasible(&bench, gpu, cases, start, load)?;
    let mut device = Device::new(&bench, gpu, &cases, load, options.quick)?;
    let sweeps = if options.quick { 1 } else { 2 };
    let chosen = choose(start, knobs, &cases, sweeps, &mut device, progress)?;
    let (mut profile, times) = confirm(start, chosen, knobs, &cases, &mut device)?;

    let (mut rows, mut unchanged) = (Vec::new(), Vec::new());
    for (index, (case, times)) in cases.iter().zip(times).enumerate() {
        let [before, after] = times.map(|verdict| match verdict {
            Verdict::Seconds(seconds) => (seconds * 1e9).round() as u64,
            Verdict::Wrong | Verdict::Illegal => 0,
        });
        let variant = device.variant(index, &profile)?;
        unchanged.push(variant == device.variant(index, start)?);
        let (kernel, shape) = (case.name.to_owned(), case.shape.clone());
        rows.push(Row { kernel, shape, tokens: case.tokens as u32, variant, before_ns: before, after_ns: after });
    }
    let info = gpu.info();
    profile.name = name(info);
    profile.description =
        format!("{} ({} {}), tuned on {}, from {}", info.name, info.driver, info.driver_info, options.date, start.name);
    profile.tuned = Some(Tuned {
        device: info.name.clone(),
        ids: info.ids,
        driver: info.driver.clone(),
        driver_info: info.driver_info.clone(),
        date: options.date.clone(),
        model: options.model.clone(),
        rows,
    });
    let mut dropped = device.dropped;
    dropped.dedup();
    Ok(Outcome { profile, unchanged, dropped, skipped })
}

/// The cases that the device has room for, and the others with the reason.
fn feasible(
    bench: &Bench,
    gpu: &Arc<Gpu>,
    cases: Vec<Case>,
    start: &Profile,
    load: Load,
) -> Result<(Vec<Case>, Vec<Skipped>)> {
    use moewe_runtime::Error::{BufferTooLarge, OutOfMemory};
    let (mut fit, mut skipped) = (Vec::new(), Vec::new());
    for case in cases {
        let one = [case];
        let tried = Device::new(bench, gpu, &one, load, true)?.times(0, std::slice::from_ref(start));
        let [case] = one;
        match tried {
            Ok(_) => fit.push(case),
            Err(Error::Run(error @ (OutOfMemory { .. } | BufferTooLarge { .. }))) => {
                skipped.push((format!("{} {}", case.name, case.shape), error.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok((fit, skipped))
}

/// The name of a profile for a device; it can be part of a file's.
pub fn name(info: &AdapterInfo) -> String {
    let words = info.name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let words = words.take(4).map(str::to_lowercase);
    ["tuned".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join("-")
}
