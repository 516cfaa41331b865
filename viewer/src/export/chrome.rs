//! Times of runs as a trace that Perfetto and Chrome show.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::{Error, write_file};
use crate::store::Run;
use crate::subject::{StepInfo, Subject};

/// Tracks of the trace, in order.
const RUNS: u32 = 1;
const LAYERS: u32 = 2;
const STEPS: u32 = 3;

/// Writes timed runs as a trace in Chrome's format (JSON), for <https://ui.perfetto.dev>. There are three tracks:
/// runs, layers, steps. A step tells its kernel, layer, the bytes that it moved according to `bytes`, the time that
/// this takes at least (`floor_us`, if the device's speed is known) and how often the floor fits into its duration.
/// What lies between two runs was not measured: they are put one behind the other.
///
/// # Errors
/// [`Error::Nothing`] if no run was timed, [`Error::Exists`], [`Error::Write`].
pub fn chrome_trace<'a>(
    runs: impl IntoIterator<Item = &'a Run>,
    subject: &Subject,
    bytes: &dyn Fn(&StepInfo, &Run) -> f64,
    path: &Path,
    overwrite: bool,
) -> Result<(), Error> {
    let is_known = |run: &&Run| subject.programs.get(run.times.program as usize).is_some_and(|steps| fits(run, steps));
    let mut runs = runs.into_iter().filter(is_known).peekable();
    if runs.peek().is_none() {
        return Err(Error::nothing(
            path,
            "no run was timed; watch them with --taps timing (if the device has timestamps)",
        ));
    }
    write_file(path, overwrite, |file| {
        let mut trace = Trace { file, is_first: true };
        trace.begin(subject)?;
        let mut start = 0u64;
        for run in runs {
            start = trace.run(run, subject, bytes, start)?.saturating_add(start);
        }
        trace.file.write_all(b"\n]}\n")
    })
}

fn fits(run: &Run, steps: &[StepInfo]) -> bool {
    !steps.is_empty() && run.times.starts.len() == steps.len() && run.times.durations.len() == steps.len()
}

struct Trace<'a, W> {
    file: &'a mut W,
    is_first: bool,
}

impl<W: Write> Trace<'_, W> {
    fn begin(&mut self, subject: &Subject) -> io::Result<()> {
        let about = json!({
            "model": subject.name,
            "precision": subject.precision,
            "device": subject.device,
            "bytes_per_second": subject.bytes_per_second,
            "note": "time between runs was not measured; they are drawn one behind the other",
        });
        write!(self.file, "{{\"displayTimeUnit\":\"ns\",\"otherData\":{about},\"traceEvents\":[")?;
        self.event(&json!({ "ph": "M", "pid": 1, "name": "process_name", "args": { "name": subject.name } }))?;
        for (track, name) in [(RUNS, "runs"), (LAYERS, "layers"), (STEPS, "steps")] {
            let args = json!({ "name": name });
            self.event(&json!({ "ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": args }))?;
            let args = json!({ "sort_index": track });
            self.event(&json!({ "ph": "M", "pid": 1, "tid": track, "name": "thread_sort_index", "args": args }))?;
        }
        Ok(())
    }

    fn event(&mut self, event: &Value) -> io::Result<()> {
        let comma = if std::mem::take(&mut self.is_first) { "\n" } else { ",\n" };
        write!(self.file, "{comma}{event}")
    }

    /// A slice from `start` on, in nanoseconds.
    fn slice(&mut self, track: u32, name: &str, start: u64, nanoseconds: u64, args: &Value) -> io::Result<()> {
        let (ts, dur) = (start as f64 / 1e3, nanoseconds as f64 / 1e3);
        self.event(&json!({ "ph": "X", "pid": 1, "tid": track, "name": name, "ts": ts, "dur": dur, "args": args }))
    }

    /// A run that begins at `origin`, and how long it is.
    fn run(
        &mut self,
        run: &Run,
        subject: &Subject,
        bytes: &dyn Fn(&StepInfo, &Run) -> f64,
        origin: u64,
    ) -> io::Result<u64> {
        let steps = &subject.programs[run.times.program as usize];
        let times = run.times.starts.iter().zip(&run.times.durations).zip(steps);
        let ran: Vec<(u64, u64, &StepInfo)> = times
            .filter_map(|((start, duration), step)| Some(((*start)?, (*start)?.saturating_add(*duration), step)))
            .collect();
        let length = ran.iter().map(|(_, end, _)| *end).max().unwrap_or(0);
        let args = json!({
            "run": run.number, "tokens": run.tokens, "rows": run.times.rows, "context": run.context,
            "program": run.times.program, "steps": ran.len(),
        });
        self.slice(RUNS, &format!("run {}, tokens: {}", run.number, run.tokens), origin, length, &args)?;
        // Slices of a track must not overlap; the arguments of a step tell its true duration.
        let until = |i: usize, start: u64, end: u64| ran.get(i).map_or(end, |(next, _, _)| end.min((*next).max(start)));
        let mut behind = 0;
        for layer in ran.chunk_by(|(_, _, one), (_, _, other)| one.layer == other.layer) {
            behind += layer.len();
            let (first, end) = (layer[0].0, layer.iter().map(|(_, end, _)| *end).max().unwrap_or(0));
            let name = layer[0].2.layer.map_or("outside of layers".to_owned(), |layer| format!("layer {layer}"));
            let (start, args) = (origin.saturating_add(first), json!({ "steps": layer.len() }));
            self.slice(LAYERS, &name, start, until(behind, first, end) - first, &args)?;
        }
        for (i, (start, end, step)) in ran.iter().enumerate() {
            let moved = bytes(step, run);
            let floor = subject.bytes_per_second.filter(|speed| *speed > 0.0).map(|speed| moved / speed * 1e6);
            let nanoseconds = end - start;
            let args = json!({
                "kernel": step.kernel,
                "layer": step.layer,
                "bytes": moved,
                "duration_us": nanoseconds as f64 / 1e3,
                "floor_us": floor,
                "times_floor": floor.filter(|floor| *floor > 0.0).map(|floor| nanoseconds as f64 / 1e3 / floor),
            });
            let shown = until(i + 1, *start, *end) - start;
            self.slice(STEPS, &step.label, origin.saturating_add(*start), shown, &args)?;
        }
        Ok(length)
    }
}
