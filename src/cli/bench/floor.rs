//! The time in which the bytes of a line can be moved at all.

use moewe_plan::{Binding, Plan, Program, Step};

use super::super::cost::{Load, cost};
use super::Work;

/// What floors depend on beside the work.
pub(super) struct Machine<'a> {
    pub(super) plan: &'a Plan,
    /// The forward programs, the smallest first.
    pub(super) programs: Vec<&'a Program>,
    /// Most prompt tokens in a run.
    pub(super) chunk: u64,
    /// How fast the device copies.
    pub(super) bytes_per_second: f64,
}

/// What a line must move and compute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Floor {
    pub(super) bytes: f64,
    pub(super) flops: u64,
    /// Bytes over bandwidth.
    pub(super) seconds: f64,
}

impl Machine<'_> {
    pub(super) fn floor(&self, work: Work) -> Floor {
        let mut floor = Floor::default();
        for load in runs(work, self.chunk) {
            let fits = |p: &&&Program| load.tokens <= p.max_tokens.into() && load.rows <= p.max_rows.into();
            let Some(program) = self.programs.iter().find(fits).or(self.programs.last()) else { continue };
            // Steps that serve taps alone are left out, since nothing is watched.
            for step in program.steps.iter().filter(|step| step.only_for.is_empty() && !step.drafting) {
                let (bytes, flops) = cost(step, &load);
                floor.bytes += self.without_repeated_experts(step, &load, bytes as f64);
                floor.flops += flops;
            }
        }
        floor.seconds = floor.bytes / self.bytes_per_second;
        floor
    }

    /// Bytes of a step when no expert is read twice. Its cost has each token read its own.
    fn without_repeated_experts(&self, step: &Step, load: &Load, bytes: f64) -> f64 {
        let info = &self.plan.model;
        let (experts, per_token) = (f64::from(info.experts), f64::from(info.num_experts_per_tok));
        let layout = &self.plan.kernels[step.kernel as usize].bindings;
        let bound = step.bindings.iter().zip(layout).map(|(binding, layout)| match *binding {
            // Costs leave block scales out.
            Binding::Weight { weight, shard } if !layout.name.ends_with("_scale") => {
                let weight = &self.plan.weights[weight as usize];
                let is_stacked = weight.shape.len() == 3;
                if is_stacked { weight.shards[shard as usize].count * weight.slice_bytes().unwrap_or(0) } else { 0 }
            }
            _ => 0,
        });
        let stacked: u64 = bound.sum();
        if stacked == 0 || experts == 0.0 {
            return bytes;
        }
        let one = stacked as f64 / experts;
        let repeated = load.tokens as f64 * per_token - distinct(experts, per_token, load.tokens as f64);
        (bytes - repeated * one).max(0.0)
    }
}

/// Distinct experts that tokens read if they choose evenly and independently.
fn distinct(experts: f64, per_token: f64, tokens: f64) -> f64 {
    experts * (1.0 - (1.0 - per_token / experts).powf(tokens))
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
    fn experts_are_read_once() {
        assert!((distinct(32.0, 4.0, 1.0) - 4.0).abs() < 1e-12);
        for tokens in [2.0, 4.0, 16.0, 256.0] {
            let found = distinct(32.0, 4.0, tokens);
            assert!(found > 4.0 && found <= f64::min(4.0 * tokens, 32.0), "{tokens}: {found}");
        }
    }
}
