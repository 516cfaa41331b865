//! Times of steps against the least that moving their bytes takes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::store::Run;
use crate::subject::{StepInfo, Subject};

/// What a run was for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// It read more tokens than it drew: a prompt, or a part of one.
    Prefill,
    /// It drew a token behind each that it read.
    #[default]
    Decode,
    /// A module of multi-token prediction.
    Draft,
}

impl Pass {
    /// All of them.
    pub const ALL: [Pass; 3] = [Pass::Prefill, Pass::Decode, Pass::Draft];

    /// The name shown to users.
    pub fn name(self) -> &'static str {
        match self {
            Pass::Prefill => "prefill",
            Pass::Decode => "decode",
            Pass::Draft => "draft",
        }
    }

    /// What a run was for; `None` if its program is not known or has another number of steps.
    pub fn of(run: &Run, subject: &Subject) -> Option<Self> {
        let steps = steps(run, subject)?;
        if steps.iter().any(|step| step.kernel == "mtp_join" || part(step) == "eh_proj") {
            Some(Pass::Draft)
        } else if run.tokens as u64 > u64::from(run.times.rows) {
            Some(Pass::Prefill)
        } else {
            Some(Pass::Decode)
        }
    }
}

/// The steps of a run's program.
pub fn steps<'a>(run: &Run, subject: &'a Subject) -> Option<&'a [StepInfo]> {
    let steps = subject.programs.get(run.times.program as usize)?;
    let fits = steps.len() == run.times.durations.len() && steps.len() == run.times.starts.len();
    (fits && !steps.is_empty()).then_some(steps)
}

/// The part of a label behind the layer.
pub fn part(step: &StepInfo) -> &str {
    step.label.strip_prefix("layers.").and_then(|rest| rest.split_once('.')).map_or(&step.label, |(_, part)| part)
}

/// Whether a step works on the rows whose logits are wanted, and not on every token.
fn counts_rows(step: &StepInfo) -> bool {
    match part(step) {
        "wanted_rows" | "head" | "sample" | "accept" => true,
        // Behind the main model it is made for all tokens, behind a module of drafts for the wanted rows.
        "top" => step.layer.is_some(),
        _ => false,
    }
}

/// Bytes that a step moved in a run: [`moewe_plan::Cost`]. Contexts are those of one text: the longest is known, and the
/// tokens of a prompt stand one behind the other.
pub fn bytes(step: &StepInfo, run: &Run, pass: Pass) -> f64 {
    let tokens = if counts_rows(step) { f64::from(run.times.rows) } else { run.tokens as f64 };
    let longest = f64::from(run.context);
    let context = if pass == Pass::Prefill { (longest - (run.tokens as f64 - 1.0) / 2.0).max(1.0) } else { longest };
    let each = step.cost.token_bytes as f64 + context * step.cost.context_bytes as f64;
    step.cost.fixed_bytes as f64 + tokens * each
}

/// Seconds, bytes and dispatches of some steps of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Amount {
    /// Summed durations.
    pub seconds: f64,
    /// Bytes moved.
    pub bytes: f64,
    /// Steps that were not left out.
    pub dispatches: usize,
}

impl Amount {
    fn add(&mut self, other: Amount) {
        self.seconds += other.seconds;
        self.bytes += other.bytes;
        self.dispatches += other.dispatches;
    }
}

/// A run, added up.
#[derive(Clone, Debug, PartialEq)]
pub struct Total {
    /// Number of its frame.
    pub number: u64,
    /// What it was for.
    pub pass: Pass,
    /// Tokens read.
    pub tokens: usize,
    /// Tokens drawn.
    pub rows: u32,
    /// All steps.
    pub all: Amount,
    /// From the start of the first step to the end of the last.
    pub span: f64,
}

impl Total {
    /// Seconds in which no step ran.
    pub fn gaps(&self) -> f64 {
        (self.span - self.all.seconds).max(0.0)
    }
}

/// The steps of a run that ran: index, start and duration in nanoseconds.
pub fn ran(run: &Run) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
    let steps = run.times.starts.iter().zip(&run.times.durations).enumerate();
    steps.filter_map(|(index, (start, duration))| start.map(|start| (index, start, *duration)))
}

/// Adds a run up; `None` if its steps are not known.
pub fn total(run: &Run, subject: &Subject) -> Option<Total> {
    let (steps, pass) = (steps(run, subject)?, Pass::of(run, subject)?);
    let mut all = Amount::default();
    ran(run).for_each(|(index, _, duration)| all.add(amount(&steps[index], run, pass, duration)));
    let first = ran(run).map(|(_, start, _)| start).min().unwrap_or(0);
    let last = ran(run).map(|(_, start, duration)| start.saturating_add(duration)).max().unwrap_or(0);
    let span = last.saturating_sub(first) as f64 * 1e-9;
    Some(Total { number: run.number, pass, tokens: run.tokens, rows: run.times.rows, all, span })
}

fn amount(step: &StepInfo, run: &Run, pass: Pass, duration: u64) -> Amount {
    Amount { seconds: duration as f64 * 1e-9, bytes: bytes(step, run, pass), dispatches: 1 }
}

/// Medians over runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Medians {
    /// Runs that were looked at.
    pub runs: usize,
    /// Seconds from the first start to the last end.
    pub span: f64,
    /// Seconds in which no step ran.
    pub gaps: f64,
    /// Tokens read.
    pub tokens: f64,
    /// Tokens drawn.
    pub rows: f64,
    /// All steps.
    pub all: Amount,
    /// By kernel, the one that takes longest first.
    pub kernels: Vec<(String, Amount)>,
    /// By layer (`None`: outside of layers, the last) and kernel (index into `kernels`).
    pub cells: BTreeMap<(Option<u32>, usize), Amount>,
}

/// Medians over some runs, all of one pass: of each number on its own. A kernel that a run has not counts as 0 there.
pub fn medians(runs: &[Arc<Run>], subject: &Subject) -> Medians {
    let totals: Vec<Total> = runs.iter().filter_map(|run| total(run, subject)).collect();
    let mut by_kernel: BTreeMap<&str, Vec<Amount>> = BTreeMap::new();
    let mut by_cell: BTreeMap<(Option<u32>, &str), Vec<Amount>> = BTreeMap::new();
    let known = runs.iter().filter_map(|run| Some((run, steps(run, subject)?, Pass::of(run, subject)?)));
    for (at, (run, steps, pass)) in known.enumerate() {
        for (index, _, duration) in ran(run) {
            let step = &steps[index];
            let amount = amount(step, run, pass, duration);
            let none = || vec![Amount::default(); totals.len()];
            by_kernel.entry(&step.kernel).or_insert_with(none)[at].add(amount);
            by_cell.entry((step.layer, &step.kernel)).or_insert_with(none)[at].add(amount);
        }
    }
    let mut kernels: Vec<(String, Amount)> =
        by_kernel.into_iter().map(|(kernel, amounts)| (kernel.to_owned(), middle(&amounts))).collect();
    kernels.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    let index = |kernel: &str| kernels.iter().position(|(name, _)| name == kernel).unwrap_or_default();
    let cells = by_cell.iter().map(|((layer, kernel), amounts)| ((*layer, index(kernel)), middle(amounts))).collect();
    let of = |number: &dyn Fn(&Total) -> f64| median(totals.iter().map(number).collect());
    Medians {
        runs: totals.len(),
        span: of(&|total| total.span),
        gaps: of(&Total::gaps),
        tokens: of(&|total| total.tokens as f64),
        rows: of(&|total| f64::from(total.rows)),
        all: middle(&totals.iter().map(|total| total.all).collect::<Vec<_>>()),
        kernels,
        cells,
    }
}

fn middle(amounts: &[Amount]) -> Amount {
    let of = |number: &dyn Fn(&Amount) -> f64| median(amounts.iter().map(number).collect());
    Amount {
        seconds: of(&|amount| amount.seconds),
        bytes: of(&|amount| amount.bytes),
        dispatches: of(&|amount| amount.dispatches as f64).round() as usize,
    }
}

/// The middle number, or the mean of both; 0 of nothing.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match numbers.len() {
        0 => 0.0,
        count if count % 2 == 1 => numbers[middle],
        _ => f64::midpoint(numbers[middle - 1], numbers[middle]),
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these numbers are exact")]
mod tests {
    use moewe_plan::{Cost, RunTimes};

    use super::*;
    use crate::synthetic::Shape;

    fn step(label: &str, layer: Option<u32>, kernel: &str, cost: [u64; 3]) -> StepInfo {
        let [fixed_bytes, token_bytes, context_bytes] = cost;
        let cost = Cost { fixed_bytes, token_bytes, context_bytes, ..Cost::default() };
        StepInfo { label: label.into(), layer, kernel: kernel.into(), cost }
    }

    fn subject() -> Subject {
        let main = vec![
            step("embed", None, "embed", [0, 8, 0]),
            step("layers.0.attention", Some(0), "latent_attention", [10, 2, 3]),
            step("layers.1.attention", Some(1), "latent_attention", [10, 2, 3]),
            step("head", None, "linear", [1000, 5, 0]),
            step("top_head", None, "linear", [1000, 5, 0]),
        ];
        let draft = vec![
            step("layers.2.join", Some(2), "mtp_join", [0, 4, 0]),
            step("layers.2.top", Some(2), "top_tokens", [0, 7, 0]),
        ];
        Subject { programs: vec![main, draft], ..Shape::small().subject() }
    }

    fn run(program: u32, rows: u32, tokens: usize, context: u32, times: &[(Option<u64>, u64)]) -> Arc<Run> {
        let (starts, durations) = times.iter().copied().unzip();
        Arc::new(Run { number: 1, tokens, context, times: RunTimes { program, rows, starts, durations } })
    }

    fn times(scale: u64) -> [(Option<u64>, u64); 5] {
        [(Some(0), 10 * scale), (Some(15 * scale), 20 * scale), (Some(40 * scale), 30 * scale), (None, 0), (None, 0)]
    }

    #[test]
    fn bytes_are_counted_by_tokens_rows_and_context() {
        let subject = subject();
        let steps = &subject.programs[0];
        // Positions 6, 7, 8, 9: contexts of 7, 8, 9 and 10 tokens.
        let prefill = run(0, 1, 4, 10, &times(1));
        assert_eq!(Pass::of(&prefill, &subject), Some(Pass::Prefill));
        assert_eq!(bytes(&steps[1], &prefill, Pass::Prefill), (10 + 4 * 2 + (7 + 8 + 9 + 10) * 3) as f64);
        assert_eq!(bytes(&steps[3], &prefill, Pass::Prefill), 1005.0, "one row of logits");
        assert_eq!(bytes(&steps[4], &prefill, Pass::Prefill), 1020.0, "logits of every token");
        let decode = run(0, 1, 1, 10, &times(1));
        assert_eq!(Pass::of(&decode, &subject), Some(Pass::Decode));
        assert_eq!(bytes(&steps[1], &decode, Pass::Decode), 42.0);
        let draft = run(1, 2, 5, 10, &[(Some(0), 1), (Some(1), 1)]);
        assert_eq!(Pass::of(&draft, &subject), Some(Pass::Draft));
        assert_eq!(bytes(&subject.programs[1][1], &draft, Pass::Draft), 14.0);
    }

    #[test]
    fn gaps_are_what_no_step_fills_and_steps_left_out_do_not_count() {
        let total = total(&run(0, 1, 1, 1, &times(1000)), &subject()).unwrap();
        assert!((total.span - 70e-6).abs() < 1e-12 && (total.gaps() - 10e-6).abs() < 1e-12);
        assert_eq!(total.all.dispatches, 3);
        assert_eq!(total.all.bytes, 8.0 + 15.0 + 15.0);
        // Steps that overlap leave no gap, not a negative one.
        let overlapping = run(1, 1, 1, 1, &[(Some(0), 10), (Some(2), 9)]);
        assert_eq!(super::total(&overlapping, &subject()).unwrap().gaps(), 0.0);
    }

    #[test]
    fn medians_are_taken_by_kernel_and_by_layer() {
        let runs: Vec<Arc<Run>> = [1, 5, 2].map(|scale| run(0, 1, 1, 1, &times(scale * 1000))).to_vec();
        let found = medians(&runs, &subject());
        assert_eq!(found.runs, 3);
        let names: Vec<&str> = found.kernels.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["latent_attention", "embed"]);
        assert!((found.kernels[0].1.seconds - 100e-6).abs() < 1e-12);
        assert_eq!(found.kernels[0].1.dispatches, 2);
        assert!((found.cells[&(Some(1), 0)].seconds - 60e-6).abs() < 1e-12);
        assert!((found.cells[&(None, 1)].seconds - 20e-6).abs() < 1e-12);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(medians(&[], &subject()), Medians::default());
    }

    #[test]
    fn runs_of_unknown_programs_and_odd_lengths_are_left_out() {
        let subject = subject();
        let odd = [run(9, 1, 1, 1, &times(1)), run(1, 1, 1, 1, &times(1)), run(0, 1, 1, 1, &times(1)[..2])];
        for run in &odd {
            assert!(total(run, &subject).is_none() && Pass::of(run, &subject).is_none());
        }
        assert_eq!(medians(&odd, &subject).runs, 0);
        let huge = run(1, 1, 1, 1, &[(Some(u64::MAX), u64::MAX), (Some(0), u64::MAX)]);
        assert!(total(&huge, &subject).is_some_and(|total| total.span.is_finite()));
    }
}
