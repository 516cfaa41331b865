//! `moewe run --batch`: a file of requests in, a file of results out, each as soon as it is done.

mod lines;
mod requests;
mod results;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use moewe_runtime::Error;
use moewe_runtime::engine::{Event, Stats, Stream};
use serde_json::{Value, json};

use super::args::RunArgs;
use super::generate::{Outcome, mtp_json};
use super::model::{self, Opened};
use super::served::{self, MAX_SEQUENCES, Served};
use super::{interrupt, output, usage};
use requests::{Numbered, Requests};
use results::Results;

/// Requests that are handed to the engine at once, so that it never lacks one, and few texts are held.
const AT_ONCE: usize = 4 * MAX_SEQUENCES as usize;
/// Time between two looks at what is done.
const LOOK: Duration = Duration::from_millis(5);

/// A request that the engine has.
struct Running {
    request: Numbered,
    stream: Stream,
    tokens: Vec<u32>,
}

/// What became of the requests of a file.
#[derive(Default)]
struct Counts {
    requests: usize,
    /// Results that were there before.
    resumed: usize,
    done: usize,
    failed: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    new_tokens: usize,
}

/// Serves the requests of a file.
pub fn run(args: &RunArgs, file: &Path) -> anyhow::Result<()> {
    if args.watch.record.is_some() || !args.edits.edits().is_empty() {
        return usage("--batch serves the unchanged model unwatched; record and change it with single prompts");
    }
    model::must_exist(file, "--batch is a file with one JSON object in each line")?;
    if !file.is_file() {
        return usage(format!("{}: is no plain file; a batch is read twice, first to check it", file.display()));
    }
    let out = args.out.clone().unwrap_or_else(|| file.with_extension("results.jsonl"));
    let started = Instant::now();
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let mtp = served::mtp(opened.plan(), &args.engine)?;
    let requests = Requests::new(&opened, args, file)?;
    let hashes = requests.check()?;
    let (mut results, done) = Results::open(&out, file, &hashes)?;
    let mut counts = Counts { requests: hashes.iter().flatten().count(), resumed: done.len(), ..Counts::default() };
    let mut report = Report {
        out,
        mtp: (served::draft_modules(opened.plan()) > 0).then_some(mtp),
        args,
        load_seconds: 0.0,
        seconds: 0.0,
    };
    if counts.resumed > 0 && !args.json {
        output::note(&format!("{}: {} results are there already", report.out.display(), counts.resumed));
    }
    let mut stats = Stats::default();
    if counts.resumed < counts.requests {
        let most = counts.requests - counts.resumed;
        let (_, served) = Served::new(&opened, &args.model, &args.engine, most, &[])?;
        report.load_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let left = requests.read(&hashes)?.filter(|request| match request {
            Ok(request) => !done.contains(&request.number),
            Err(_) => true,
        });
        serve(&served, &opened, left, &mut results, &mut counts)?;
        if counts.resumed + counts.done + counts.failed < counts.requests && !interrupt::is_set() {
            anyhow::bail!("{}: the file was changed while it was served", file.display());
        }
        report.seconds = started.elapsed().as_secs_f64();
        stats = served.stats();
        served.finish()?;
    }
    report.write(&counts, &stats)
}

/// Runs requests until none is left, or Ctrl-C.
fn serve(
    served: &Served,
    opened: &Opened,
    mut requests: impl Iterator<Item = anyhow::Result<Numbered>>,
    results: &mut Results,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let bar = bar(counts);
    let started = Instant::now();
    let mut running: Vec<Running> = Vec::new();
    // One for which there was no room.
    let mut waiting: Option<(Numbered, Vec<u32>)> = None;
    while !interrupt::is_set() {
        while running.len() < AT_ONCE && !interrupt::is_set() {
            let (request, ids) = match waiting.take() {
                Some(waiting) => waiting,
                None => match requests.next().transpose()? {
                    None => break,
                    Some(request) => match request.encode(opened.text.as_ref()) {
                        Ok(ids) => (request, ids),
                        Err(error) => {
                            results.failed(&request, &error)?;
                            counts.failed += 1;
                            continue;
                        }
                    },
                },
            };
            match served.submit(ids.clone(), &request.options, request.priority) {
                Ok(stream) => running.push(Running { request, stream, tokens: Vec::new() }),
                Err(Error::QueueFull { .. }) if !running.is_empty() => {
                    waiting = Some((request, ids));
                    break;
                }
                Err(error) if ends_all(&error) => return Err(error.into()),
                Err(error) => {
                    results.failed(&request, &error.into())?;
                    counts.failed += 1;
                }
            }
        }
        if running.is_empty() {
            break;
        }
        let mut heard = false;
        let mut index = 0;
        while let Some(one) = running.get_mut(index) {
            match one.stream.recv_timeout(Duration::ZERO) {
                None => {
                    index += 1;
                    continue;
                }
                Some(Event::Began { .. }) => {}
                Some(Event::Tokens(more)) => {
                    counts.new_tokens += more.ids.len();
                    one.tokens.extend(more.ids);
                }
                Some(Event::Finished(finished)) => {
                    let Running { request, tokens, .. } = running.swap_remove(index);
                    let outcome = Outcome::of_request(tokens, *finished);
                    results.done(&request, &outcome, opened.text.as_ref())?;
                    counts.done += 1;
                    counts.prompt_tokens += outcome.prompt_tokens;
                    counts.cached_tokens += outcome.cached_tokens;
                }
                Some(Event::Failed(error)) => {
                    if ends_all(&error) {
                        return Err(error.into());
                    }
                    let Running { request, .. } = running.swap_remove(index);
                    results.failed(&request, &error.into())?;
                    counts.failed += 1;
                }
            }
            heard = true;
        }
        if heard {
            let rate = counts.new_tokens as f64 / started.elapsed().as_secs_f64().max(1e-9);
            bar.set_message(format!(" {rate:.0} tokens/s"));
            bar.set_position((counts.resumed + counts.done + counts.failed) as u64);
        } else {
            std::thread::sleep(LOOK);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// Whether an error is none of the request's own, so that all others would fail, too.
fn ends_all(error: &Error) -> bool {
    matches!(error, Error::DeviceLost { .. } | Error::EngineStopped | Error::Interrupted)
}

fn bar(counts: &Counts) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(counts.requests as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("requests [{bar:30}] {pos}/{len}{msg} {eta}");
    bar.set_style(style.expect("a constant template").progress_chars("=> "));
    bar.set_position(counts.resumed as u64);
    bar.reset_eta();
    bar
}

/// What is said at the end.
struct Report<'a> {
    out: PathBuf,
    mtp: Option<moewe_runtime::engine::Mtp>,
    args: &'a RunArgs,
    load_seconds: f64,
    seconds: f64,
}

impl Report<'_> {
    fn write(&self, counts: &Counts, stats: &Stats) -> anyhow::Result<()> {
        let Self { load_seconds, seconds, .. } = *self;
        let rate = if seconds > 0.0 { counts.new_tokens as f64 / seconds } else { 0.0 };
        if self.args.json {
            output::json(&json!({
                "results": self.out,
                "requests": counts.requests,
                "resumed": counts.resumed,
                "done": counts.done,
                "failed": counts.failed,
                "prompt_tokens": counts.prompt_tokens,
                "cached_tokens": counts.cached_tokens,
                "new_tokens": counts.new_tokens,
                "load_seconds": load_seconds,
                "seconds": seconds,
                "tokens_per_second": rate,
                "mtp": self.mtp.map_or(Value::Null, |mtp| mtp_json(mtp, &stats.acceptance)),
            }))?;
        } else {
            output::write(&format!(
                "{}: {} of {} requests done ({} of them before), {} failed; prompts of {} tokens ({} cached), {} new tokens in \
                 {seconds:.1} s, {rate:.1} tokens/s\n",
                self.out.display(),
                counts.done + counts.resumed,
                counts.requests,
                counts.resumed,
                counts.failed,
                counts.prompt_tokens,
                counts.cached_tokens,
                counts.new_tokens,
            ))?;
        }
        if counts.failed > 0 && !interrupt::is_set() {
            anyhow::bail!(
                "{} of {} requests failed; {} says why (\"error\"), and the same call tries them again",
                counts.failed,
                counts.requests,
                self.out.display()
            );
        }
        Ok(())
    }
}
