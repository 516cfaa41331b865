//! The time in which the bytes of a line can be moved, and its operations made, at all.

use moewe_plan::{Binding, Plan, Program, ProgramKind, SCALE_GROUP, Step, WeightFormat};

use super::super::cost::{Load, cost};
use super::super::served::draft_modules;
use super::plain::Work;

/// What floors depend on beside the work.
pub(super) struct Machine<'a> {
    pub(super) plan: &'a Plan,
    /// The programs of one precision, of each kind the smallest first.
    pub(super) programs: Vec<&'a Program>,
    /// Most prompt tokens in a run.
    pub(super) chunk: u64,
    pub(super) rates: Rates,
}

/// How fast a device copies, and multiplies matrices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub(super) bytes_per_second: f64,
    pub(super) flops_per_second: f64,
}

/// What a line must move and compute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Floor {
    pub(super) bytes: f64,
    pub(super) flops: u64,
    /// Of each run the longer of bytes over bandwidth and operations over their rate.
    pub(super) seconds: f64,
    /// That of the runs where it was the bytes'.
    bytes_seconds: f64,
}

/// What a floor rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    Bytes,
    Flops,
}

impl Bound {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Flops => "flops",
        }
    }
}

impl Floor {
    fn plus(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            flops: self.flops + other.flops,
            seconds: self.seconds + other.seconds,
            bytes_seconds: self.bytes_seconds + other.bytes_seconds,
        }
    }

    /// So many times the same.
    pub(super) fn times(self, factor: f64) -> Self {
        Self {
            bytes: self.bytes * factor,
            flops: (self.flops as f64 * factor).round() as u64,
            seconds: self.seconds * factor,
            bytes_seconds: self.bytes_seconds * factor,
        }
    }

    /// What most of its time rests on.
    pub(super) fn bound(&self) -> Bound {
        if 2.0 * self.bytes_seconds >= self.seconds { Bound::Bytes } else { Bound::Flops }
    }

    /// Of all together.
    pub(super) fn sum(all: impl IntoIterator<Item = Self>) -> Self {
        all.into_iter().fold(Self::default(), Self::plus)
    }
}

impl Rates {
    /// Of a run that moves and computes so much.
    fn floor(&self, bytes: f64, flops: u64) -> Floor {
        let (moving, computing) = (bytes / self.bytes_per_second, flops as f64 / self.flops_per_second);
        let bytes_seconds = if moving >= computing { moving } else { 0.0 };
        Floor { bytes, flops, seconds: moving.max(computing), bytes_seconds }
    }
}

impl Machine<'_> {
    pub(super) fn floor(&self, work: Work) -> Floor {
        let loads = runs(work, self.chunk);
        Floor::sum(loads.iter().map(|load| self.run(ProgramKind::Forward, load, false)))
    }

    /// Of running `tokens` of a prompt behind `known` that are in the cache, and of moving so many bytes besides.
    pub(super) fn resumed(&self, known: u64, tokens: u64, bytes: u64) -> Floor {
        let moved = self.rates.floor(bytes as f64, 0);
        let end = known + tokens;
        let starts = (known..end).step_by(self.chunk.max(1) as usize);
        let loads =
            starts.map(|start| behind(start, self.chunk.min(end - start), u64::from(start + self.chunk >= end)));
        Floor::sum(loads.map(|load| self.run(ProgramKind::Forward, &load, false)).chain([moved]))
    }

    /// Of a pass of one sequence behind `context` tokens that verifies so many drafts, and makes as many for the next, as
    /// [`moewe_runtime::Session::step`] makes it.
    pub(super) fn pass(&self, drafts: u64, context: u64) -> Floor {
        if drafts == 0 {
            return self.run(ProgramKind::Forward, &behind(context, 1, 1), false);
        }
        let modules = u64::from(draft_modules(self.plan));
        // Rows of modules behind the first rest on drafts, and are made again.
        let again = modules.saturating_sub(1).min(context);
        let (start, tokens) = (context - again, again + 1 + drafts);
        let mut floor = self.run(ProgramKind::Forward, &behind(start, tokens, 1 + drafts), true);
        for stage in 1..=drafts.max(modules) {
            let load = if stage > modules { behind(context, 1, 1) } else { behind(start, tokens, 1) };
            floor = floor.plus(self.run(ProgramKind::Draft { module: stage.min(modules) as u32 }, &load, true));
        }
        floor
    }

    /// Of one run of the program that takes this load.
    fn run(&self, kind: ProgramKind, load: &Load, drafts: bool) -> Floor {
        let of_kind = || self.programs.iter().filter(|program| program.kind == kind);
        let fits = |p: &&&Program| load.tokens <= p.max_tokens.into() && load.rows <= p.max_rows.into();
        let Some(program) = of_kind().find(fits).or_else(|| of_kind().next_back()) else { return Floor::default() };
        let (mut all_bytes, mut all_flops) = (0.0, 0);
        // Steps that serve taps alone are left out, since nothing is watched.
        for step in program.steps.iter().filter(|step| step.only_for.is_empty() && step.when.holds(drafts, false)) {
            let (bytes, flops) = cost(step, load);
            all_bytes += self.without_repeated_experts(step, load, bytes as f64);
            all_flops += flops;
        }
        self.rates.floor(all_bytes, all_flops)
    }

    /// Bytes of a step when no expert is read twice. Its cost has each token read its own, shared ones among them.
    fn without_repeated_experts(&self, step: &Step, load: &Load, bytes: f64) -> f64 {
        let info = &self.plan.model;
        let mut shared = 0.0;
        let (experts, per_token) = (f64::from(info.experts), f64::from(info.num_experts_per_tok));
        let layout = &self.plan.kernels[step.kernel as usize].bindings;
        let bound = step.bindings.iter().zip(layout).map(|(binding, layout)| match *binding {
            // Costs leave block scales out, and have those of groups with the rows.
            Binding::Weight { weight, shard } if !layout.name.ends_with("_scale") => {
                let weight = &self.plan.weights[weight as usize];
                let is_stacked = weight.shape.len() == 3;
                if is_stacked {
                    shared = weight.shape[0] as f64 - f64::from(info.experts);
                }
                let codes = weight.shards[shard as usize].count * weight.slice_bytes().unwrap_or(0);
                let groups =
                    if weight.format.is_grouped() { codes * 8 / weight.format.bits() / SCALE_GROUP } else { 0 };
                if is_stacked { codes + groups * WeightFormat::F16.bits() / 8 } else { 0 }
            }
            _ => 0,
        });
        let stacked: u64 = bound.sum();
        if stacked == 0 || experts == 0.0 {
            return bytes;
        }
        let (one, tokens) = (stacked as f64 / (experts + shared), load.tokens as f64);
        let repeated = tokens * (per_token + shared) - (distinct(experts, per_token, tokens) + shared);
        (bytes - repeated * one).max(0.0)
    }
}

/// Distinct experts that tokens read if they choose evenly and independently.
fn distinct(experts: f64, per_token: f64, tokens: f64) -> f64 {
    experts * (1.0 - (1.0 - per_token / experts).powf(tokens))
}

/// A run of so many tokens of one sequence behind `start` others.
fn behind(start: u64, tokens: u64, rows: u64) -> Load {
    let end = start + tokens;
    Load { tokens, rows, cached: end, attended: (end * (end + 1) - start * (start + 1)) / 2 }
}

/// The runs of a line's work, as [`moewe_runtime::Session`] packs them.
fn runs(work: Work, chunk: u64) -> Vec<Load> {
    match work {
        Work::Decode { context, batch, steps } => {
            let batch = u64::from(batch);
            let step = |step: u32| {
                let attended = batch * (u64::from(context) + u64::from(step) + 1);
                Load { tokens: batch, rows: batch, cached: attended, attended }
            };
            (0..steps).map(step).collect()
        }
        Work::Prefill { prompt_tokens, batch } => {
            let length = u64::from(prompt_tokens);
            let mut runs = Vec::new();
            let mut load = Load::default();
            for _ in 0..batch {
                let mut at = 0;
                while at < length {
                    let end = length.min(at + chunk - load.tokens);
                    load.tokens += end - at;
                    load.rows += u64::from(end == length);
                    load.cached += end;
                    load.attended += (end * (end + 1) - at * (at + 1)) / 2;
                    at = end;
                    if load.tokens == chunk {
                        runs.push(std::mem::take(&mut load));
                    }
                }
            }
            runs.extend((load.tokens > 0).then_some(load));
            runs
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_packed() {
        let load = |tokens, rows, cached, attended| Load { tokens, rows, cached, attended };
        // Three prompts of 5 in runs of 4: aaaa abbb bbcc ccc.
        let work = Work::Prefill { prompt_tokens: 5, batch: 3 };
        assert_eq!(
            runs(work, 4),
            [load(4, 0, 4, 10), load(4, 1, 5 + 3, 5 + 6), load(4, 1, 5 + 2, 4 + 5 + 1 + 2), load(3, 1, 5, 3 + 4 + 5)]
        );
        // In any packing each token attends to itself and those before it.
        for chunk in [1, 3, 5, 7, 100] {
            let all = runs(work, chunk);
            assert_eq!(all.iter().map(|load| load.attended).sum::<u64>(), 3 * 15);
            assert_eq!(all.iter().map(|load| load.tokens).sum::<u64>(), 15);
            assert_eq!(all.iter().map(|load| load.rows).sum::<u64>(), 3);
        }
    }

    #[test]
    fn decoding_attends_to_one_more_each_step() {
        let all = runs(Work::Decode { context: 10, batch: 2, steps: 3 }, 4);
        assert_eq!(all.iter().map(|load| load.attended).collect::<Vec<_>>(), [22, 24, 26]);
        assert!(all.iter().all(|load| (load.tokens, load.rows, load.cached) == (2, 2, load.attended)));
    }

    #[test]
    fn the_longer_of_moving_and_computing_counts_in_each_run() {
        let rates = Rates { bytes_per_second: 10.0, flops_per_second: 100.0 };
        let (moves, computes) = (rates.floor(20.0, 100), rates.floor(5.0, 300));
        assert_eq!((moves.seconds, moves.bound()), (2.0, Bound::Bytes));
        assert_eq!((computes.seconds, computes.bound()), (3.0, Bound::Flops));
        let both = moves.plus(computes);
        // Not 4: what one run computes takes no time away from what another moves.
        assert_eq!((both.bytes, both.flops, both.seconds, both.bound()), (25.0, 400, 5.0, Bound::Flops));
        assert_eq!(moves.times(2.0).plus(computes).bound(), Bound::Bytes);
        assert_eq!(rates.floor(10.0, 100).bound(), Bound::Bytes);
        assert_eq!(Floor::default().bound(), Bound::Bytes);
    }

    #[test]
    fn experts_are_read_once() {
        assert!((distinct(32.0, 4.0, 1.0) - 4.0).abs() < 1e-12);
        for tokens in [2.0, 4.0, 16.0, 256.0] {
            let found = distinct(32.0, 4.0, tokens);
            assert!(found > 4.0 && found <= f64::min(4.0 * tokens, 32.0), "{tokens}: {found}");
        }
    }
}
