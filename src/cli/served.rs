//! How `run` and `chat` generate at full speed: as requests to an engine.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use moewe_plan::{MAX_DRAFT_MODULES, MAX_DRAFTS, Plan, ProgramKind};
use moewe_runtime::engine::{Engine, EngineOptions, Event, Mtp, Request, Stats, Stream};
use moewe_runtime::{GenerateOptions, Model};

use super::args::{EditArgs, EngineArgs, ModelArgs, WatchArgs};
use super::generate::Outcome;
use super::model::{self, Opened};
use super::watched::Runner;
use super::{interrupt, usage};

/// Most sequences that share a batch.
pub const MAX_SEQUENCES: u32 = 64;
/// Time between two looks whether Ctrl-C was pressed.
const LOOK: Duration = Duration::from_millis(20);

/// What generates.
pub enum Generator {
    /// An engine.
    Served(Box<Served>),
    /// A watched session, since something is recorded or changed.
    Watched(Box<Runner>),
}

impl Generator {
    /// Loads the model for what is asked, and for `others` besides. The engine takes so many sequences at once.
    pub fn new(
        opened: &Opened,
        args: &ModelArgs,
        (engine, watch, edits): (&EngineArgs, &WatchArgs, &EditArgs),
        max_sequences: usize,
        others: &[ProgramKind],
    ) -> anyhow::Result<(Arc<Model>, Self)> {
        if watch.record.is_none() && edits.edits().is_empty() {
            let (model, served) = Served::new(opened, args, engine, max_sequences, others)?;
            return Ok((model, Self::Served(Box::new(served))));
        }
        let what = if watch.record.is_some() { "recorded with --record" } else { "changed" };
        if matches!(engine.mtp, Mtp::Fixed(_)) {
            return usage(format!(
                "--mtp: nothing is drafted where the model is {what}, since each token is a run of its own there"
            ));
        }
        if engine.cache_dir.is_some() {
            return usage(format!("--cache-dir: no latents are kept where the model is {what}"));
        }
        let (model, runner) = Runner::new(opened, args, watch, edits, others)?;
        Ok((model, Self::Watched(Box::new(runner))))
    }

    /// How it drafts; `None` if the model has no modules for it.
    pub fn mtp(&self, plan: &Plan) -> Option<Mtp> {
        let mtp = match self {
            Self::Served(served) => served.mtp,
            Self::Watched(_) => Mtp::Off,
        };
        (draft_modules(plan) > 0).then_some(mtp)
    }

    /// Completes what is written to files.
    pub fn finish(self) -> anyhow::Result<()> {
        match self {
            Self::Served(served) => served.finish(),
            Self::Watched(runner) => runner.finish(),
        }
    }
}

/// A model that an engine serves.
pub struct Served {
    engine: Engine,
    mtp: Mtp,
    max_context: usize,
    /// Requests are ended one by one.
    _noted: interrupt::Noted,
}

impl Served {
    /// Loads the model and starts the engine, for so many sequences at once.
    pub fn new(
        opened: &Opened,
        args: &ModelArgs,
        engine: &EngineArgs,
        max_sequences: usize,
        others: &[ProgramKind],
    ) -> anyhow::Result<(Arc<Model>, Self)> {
        let mtp = mtp(opened.plan(), engine)?;
        let modules = if mtp == Mtp::Off { 0 } else { draft_modules(opened.plan()) };
        let mut kinds = vec![ProgramKind::Forward];
        kinds.extend((1..=modules).map(|module| ProgramKind::Draft { module }));
        let model = opened.load_first(&kinds, others)?;
        let max_sequences = max_sequences.clamp(1, MAX_SEQUENCES as usize) as u32;
        let session = model::shared_session(&model, args, &kinds, max_sequences)?;
        let options = EngineOptions {
            mtp,
            prefix_cache: !engine.no_prefix_cache,
            cache_dir: engine.cache_dir.clone().map(|dir| (dir, engine.cache_size)),
            prefill_chunk: args.prefill_chunk.map(|chunk| chunk as usize),
            ..EngineOptions::default()
        };
        let max_context = opened.plan().model.max_context as usize;
        let engine = Engine::new(session, &options)?;
        Ok((model, Self { engine, mtp, max_context, _noted: interrupt::Noted::new() }))
    }

    /// Hands in a prompt.
    pub fn submit(
        &self,
        prompt: Vec<u32>,
        options: &GenerateOptions,
        priority: i32,
    ) -> Result<Stream, moewe_runtime::Error> {
        self.engine.submit(Request {
            prompt,
            // No text is longer, and room is kept for as many.
            max_new_tokens: options.max_new_tokens.min(self.max_context),
            sampling: options.sampling,
            stop_tokens: options.stop_tokens.clone(),
            ignore_eos: options.ignore_eos,
            priority,
            ..Request::default()
        })
    }

    /// Waits for the end of a request and calls `on_token` for each token, which ends it by breaking. Ctrl-C ends it, too.
    pub fn follow(
        &self,
        mut stream: Stream,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> anyhow::Result<Outcome> {
        let mut tokens = Vec::new();
        let mut cancelled = false;
        loop {
            let mut stop = interrupt::is_set();
            match stream.recv_timeout(LOOK) {
                Some(Event::Tokens(more)) => {
                    for token in more.ids {
                        stop |= on_token(token).is_break();
                        tokens.push(token);
                    }
                }
                Some(Event::Finished(finished)) => return Ok(Outcome::of_request(tokens, *finished)),
                Some(Event::Failed(error)) => return Err(error.into()),
                Some(Event::Began { .. }) | None => {}
            }
            if stop && !cancelled {
                self.engine.cancel(stream.id());
                cancelled = true;
            }
        }
    }

    /// Figures of the engine.
    pub fn stats(&self) -> Stats {
        self.engine.stats()
    }

    /// Writes what the prefix cache on disk is still to have, and says what went wrong beside the requests.
    pub fn finish(self) -> anyhow::Result<()> {
        self.engine.flush();
        let warnings = self.stats().warnings;
        self.engine.stop()?;
        model::warn(&warnings);
        Ok(())
    }
}

/// Modules of multi-token prediction that a plan can draft with.
pub fn draft_modules(plan: &Plan) -> u32 {
    let modules = plan.model.mtp_modules;
    let has = |module| plan.programs.iter().any(|program| program.kind == ProgramKind::Draft { module });
    if modules <= MAX_DRAFT_MODULES.min(MAX_DRAFTS) && (1..=modules).all(has) { modules } else { 0 }
}

/// How a model is to draft; a usage error if it cannot.
pub fn mtp(plan: &Plan, args: &EngineArgs) -> anyhow::Result<Mtp> {
    match args.mtp {
        Mtp::Fixed(_) if draft_modules(plan) == 0 => {
            usage("--mtp: the model has no modules of multi-token prediction that could draft; leave it out")
        }
        mtp => Ok(if draft_modules(plan) == 0 { Mtp::Off } else { mtp }),
    }
}
