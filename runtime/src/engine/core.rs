//! The thread of an engine: requests, their sequences, and one tick after the other.

use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use moewe_plan::FORMAT_VERSION;

use super::cache::PrefixCache;
use super::disk::{Disk, DiskOptions};
use super::drafting::{Costs, Drafting, Mtp};
use super::pool::{self, PagePool};
use super::request::{Event, Finished, Request};
use super::scheduler::{Item, Limits, Plan, Reason, Scheduler};
use super::{Command, EngineOptions, Shared, Stats, host_bytes, lock};
use crate::{Error, Result, SequenceId, Session, Stepped, StopReason, Work};

/// Most passes between two looks at what is new.
const MAX_BURST: usize = 8;
/// Of so many requests one finds out by itself whether drafting pays; the others believe what is known.
const TRIES: u64 = 16;
/// Fewest tokens of a prompt beside another prompt.
const MIN_CHUNK: usize = 16;
/// Pages that are handed to the disk between two batches.
const WRITES_PER_TICK: usize = 2;

/// A request that is not done.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) request: Request,
    events: mpsc::Sender<Event>,
    /// Prompt and what was drawn.
    pub(super) tokens: Vec<u32>,
    /// While it is admitted.
    pub(super) sequence: Option<SequenceId>,
    drafting: Drafting,
    /// Drafts that it is to have behind its newest token.
    pub(super) drafts: usize,
    /// Tokens of the prompt that were there when it was admitted first.
    pub(super) cached_tokens: usize,
    pub(super) preemptions: u32,
    submitted: Instant,
    pub(super) admitted: Option<Instant>,
    pub(super) first_token: Option<Instant>,
}

impl Live {
    fn new_tokens(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Whether the item runs the token that was drawn last, not a part of a prompt.
    fn decodes(&self, item: &Item) -> bool {
        item.samples && item.tokens == 1 && self.new_tokens() > 0
    }
}

/// What the thread owns.
#[derive(Debug)]
pub(super) struct Core {
    session: Session,
    cache: PrefixCache,
    scheduler: Scheduler,
    live: HashMap<u64, Live>,
    costs: Costs,
    mtp: Mtp,
    prefill_chunk: usize,
    eos: Vec<u32>,
    shared: Arc<Shared>,
    stats: Stats,
    /// Why nothing can run any more.
    broken: Option<Arc<Error>>,
}

impl Core {
    pub(super) fn new(session: Session, options: &EngineOptions, shared: Arc<Shared>) -> Result<Self> {
        let disk = options.cache_dir.as_ref().filter(|_| options.prefix_cache).map(|(dir, max_bytes)| {
            Disk::open(DiskOptions {
                dir: dir.clone(),
                max_bytes: *max_bytes,
                model: identity(&session),
                page_bytes: session.page_bytes() as usize,
            })
        });
        let cache = PrefixCache::new(options.prefix_cache, disk.transpose()?);
        let modules = session.draft_modules() as usize;
        let (tokens, rows) = session.step_capacity()?;
        let running = session.options().max_sequences.max(1) as usize;
        let lead = modules.saturating_sub(1);
        let tokens = tokens.saturating_sub(lead * running.min(rows)).max(1);
        let limits = Limits { tokens, rows, running, min_chunk: MIN_CHUNK, lead };
        let mut core = Self {
            cache,
            scheduler: Scheduler::new(limits),
            live: HashMap::new(),
            costs: Costs::default(),
            mtp: if modules > 0 { options.mtp } else { Mtp::Off },
            prefill_chunk: options.prefill_chunk.unwrap_or(usize::MAX).max(1),
            eos: session.model().plan().model.eos_token_ids.clone(),
            shared,
            stats: Stats::default(),
            broken: None,
            session,
        };
        core.publish();
        Ok(core)
    }

    /// Serves until it is told to stop, or nobody can tell it anything any more.
    pub(super) fn serve(mut self, commands: &mpsc::Receiver<Command>) -> Session {
        let mut stopped = false;
        while !stopped {
            let next =
                if self.has_work() { commands.try_recv().ok() } else { commands.recv().ok().or(Some(Command::Stop)) };
            match next {
                Some(Command::Submit { id, request, events }) => self.submit(id, request, events),
                Some(Command::Cancel(id)) => self.cancel(id),
                Some(Command::Clear(done)) => {
                    self.cache.clear(&mut self.session);
                    self.publish();
                    let _ = done.send(()); // whoever asked may have gone
                }
                Some(Command::Flush(done)) => {
                    self.flush();
                    let _ = done.send(()); // whoever asked may have gone
                }
                Some(Command::Stop) => stopped = true,
                None => self.tick(),
            }
        }
        self.stop();
        self.session
    }

    fn has_work(&self) -> bool {
        self.broken.is_none() && (!self.scheduler.idle() || self.cache.has_writes())
    }

    fn stop(&mut self) {
        let ids: Vec<u64> = self.live.keys().copied().collect();
        for id in ids {
            self.fail(id, &Arc::new(Error::EngineStopped));
        }
        self.flush();
        self.cache.clear(&mut self.session);
        self.publish();
    }

    fn submit(&mut self, id: u64, request: Request, events: mpsc::Sender<Event>) {
        let room = (self.session.model().plan().model.max_context as usize).saturating_sub(request.prompt.len());
        let max_new = request.max_new_tokens.min(room);
        let (prompt, priority) = (request.prompt.len(), request.priority);
        let drafting = Drafting::new(self.mtp, moewe_plan::MAX_DRAFTS as usize);
        let mut drafting = if id.is_multiple_of(TRIES) { drafting } else { drafting.trusting() };
        // Its prompt may be run before drafts are chosen again, and modules have to see all of it.
        let drafts = drafting.next(&self.costs, self.live.len() + 1);
        let live = Live {
            tokens: request.prompt.clone(),
            request,
            events,
            sequence: None,
            drafting,
            drafts,
            cached_tokens: 0,
            preemptions: 0,
            submitted: Instant::now(),
            admitted: None,
            first_token: None,
        };
        self.live.insert(id, live);
        if let Some(error) = self.broken.clone() {
            self.fail(id, &error);
        } else if max_new == 0 {
            self.end(id, self.full_reason(id));
        } else {
            self.scheduler.submit(super::scheduler::Request { id, priority, prompt, max_new });
        }
        self.publish();
    }

    /// Why a request that has drawn all it may ends.
    fn full_reason(&self, id: u64) -> StopReason {
        let live = &self.live[&id];
        if live.new_tokens() >= live.request.max_new_tokens { StopReason::Length } else { StopReason::Context }
    }

    fn cancel(&mut self, id: u64) {
        if self.live.contains_key(&id) {
            self.end(id, StopReason::Stopped);
            self.publish();
        }
    }

    fn tick(&mut self) {
        self.choose_drafts();
        let Self { session, cache, live, stats, .. } = self;
        let mut pool = PagePool { session, cache, live, stats, errors: Vec::new() };
        // What is tried is looked at after each pass.
        let learns = pool.live.values().any(|live| live.drafting.learns());
        let mut plan = self.scheduler.plan(&mut pool, if learns { 1 } else { MAX_BURST });
        let errors = std::mem::take(&mut pool.errors);
        let sound = errors.is_empty();
        for (id, error) in errors {
            self.fault(error, &[id]);
        }
        for &(id, reason) in &plan.failed {
            self.give_up(id, reason);
        }
        // A plan with requests that are gone is made again.
        if sound && !plan.items.is_empty() {
            self.run(&mut plan);
        }
        for _ in 0..WRITES_PER_TICK {
            // The page is lost to the disk, nothing else.
            if let Err(error) = self.cache.write_one(&mut self.session) {
                self.warn(error.to_string());
            }
        }
        self.publish();
    }

    /// Writes what the disk is still to have, and waits for it.
    fn flush(&mut self) {
        while self.broken.is_none() && self.cache.has_writes() {
            if let Err(error) = self.cache.write_one(&mut self.session) {
                self.warn(error.to_string());
            }
        }
        if let Some(disk) = self.cache.disk() {
            disk.flush();
        }
        self.publish();
    }

    fn choose_drafts(&mut self) {
        let sequences = self.live.values().filter(|live| live.sequence.is_some()).count();
        for (&id, live) in self.live.iter_mut().filter(|(_, live)| live.sequence.is_some()) {
            live.drafts = live.drafting.next(&self.costs, sequences);
            self.scheduler.set_drafts(id, live.drafts);
        }
    }

    fn run(&mut self, plan: &mut Plan) {
        for item in plan.items.iter_mut().filter(|item| item.tokens > self.prefill_chunk) {
            (item.tokens, item.samples) = (self.prefill_chunk, false);
        }
        let work: Vec<Work> = plan.items.iter().filter_map(|item| self.work(item)).collect();
        let ids: Vec<u64> = plan.items.iter().map(|item| item.id).collect();
        let decodes = plan.items.iter().all(|item| self.live.get(&item.id).is_some_and(|live| live.decodes(item)));
        for work in work.iter().filter(|work| work.drafts > 0) {
            pool::ensure_behind(&mut self.session, &mut self.cache, work);
        }
        let started = Instant::now();
        let stepped = match self.session.step(&work, plan.burst as u32) {
            Ok(stepped) if stepped.len() == plan.items.len() => stepped,
            Ok(_) => return self.fault(Error::EngineStopped, &ids),
            Err(error) => return self.fault(error, &ids),
        };
        let now = Instant::now();
        let passes = stepped.iter().map(|stepped| stepped.passes).max().unwrap_or(1).max(1);
        self.stats.passes += u64::from(passes);
        if decodes {
            let drafts = work.iter().map(|work| work.drafts).max().unwrap_or(0) as usize;
            let seconds = (now - started).as_secs_f64() / f64::from(passes);
            self.costs.saw(drafts, work.len(), seconds);
        }
        for (item, stepped) in plan.items.iter().zip(stepped) {
            self.ran(item, &stepped, now);
        }
    }

    fn work(&self, item: &Item) -> Option<Work> {
        let live = self.live.get(&item.id)?;
        // Modules have to see the prompt if they are to draft behind it.
        let drafts = if live.decodes(item) { item.drafts } else { live.drafts };
        Some(Work { sequence: live.sequence?, tokens: item.tokens, drafts: drafts as u32 })
    }

    /// Takes in what a request was given.
    fn ran(&mut self, item: &Item, stepped: &Stepped, now: Instant) {
        let Some(live) = self.live.get_mut(&item.id) else { return };
        let prefills = live.new_tokens() == 0 || item.tokens > 1;
        if prefills {
            self.stats.prefill_tokens += item.tokens as u64;
        }
        if stepped.verified.is_empty() && !prefills {
            (0..stepped.passes).for_each(|_| live.drafting.saw(0, 0));
        }
        for &(drafted, accepted) in &stepped.verified {
            live.drafting.saw(drafted as usize, accepted as usize);
            self.costs.saw_drafts(drafted as usize, accepted as usize);
            let positions = &mut self.stats.acceptance;
            positions.resize(positions.len().max(drafted as usize), (0, 0));
            for (position, (offered, taken)) in positions.iter_mut().enumerate().take(drafted as usize) {
                *offered += 1;
                *taken += u64::from(position < accepted as usize);
            }
        }
        let room = live.request.max_new_tokens - live.new_tokens();
        let ends = |token: &u32| {
            live.request.stop_tokens.contains(token) || (!live.request.ignore_eos && self.eos.contains(token))
        };
        let stop = stepped.tokens.iter().take(room).position(ends);
        let count = stop.map_or(stepped.tokens.len().min(room), |at| at + 1);
        let tokens = stepped.tokens[..count].to_vec();
        live.tokens.extend(&tokens);
        self.stats.new_tokens += count as u64;
        let first = count > 0 && live.first_token.is_none();
        if first {
            live.first_token = Some(now);
        }
        let heard = tokens.is_empty() || live.events.send(Event::Tokens(tokens)).is_ok();
        let max_context = self.session.model().plan().model.max_context as usize;
        let full = live.new_tokens() >= live.request.max_new_tokens || live.tokens.len() >= max_context;
        if stepped.poisoned && stop.is_none() && !full {
            return self.fail(item.id, &Arc::new(Error::Poisoned));
        }
        if !heard {
            return self.end(item.id, StopReason::Stopped);
        }
        if stop.is_some() {
            return self.end(item.id, StopReason::Eos);
        }
        if full {
            return self.end(item.id, self.full_reason(item.id));
        }
        self.scheduler.ran(item, stepped.tokens.len());
        // Others that begin alike need not wait for its end.
        if prefills && count > 0 {
            self.keep(item.id, false);
        }
    }

    /// Keeps the latents of a request for others.
    fn keep(&mut self, id: u64, ends: bool) {
        let Some(live) = self.live.get(&id) else { return };
        let Some(sequence) = live.sequence else { return };
        if let Err(error) = self.cache.keep(&mut self.session, sequence, &live.tokens, ends) {
            self.warn(error.to_string());
        }
    }

    /// Ends a request whose prompt and text are too long for all pages.
    fn give_up(&mut self, id: u64, reason: Reason) {
        let Some(live) = self.live.get_mut(&id) else { return };
        live.preemptions = live.preemptions.saturating_sub(u32::from(live.admitted.is_some()));
        let Reason::OutOfPages { needed, total, .. } = reason;
        if live.new_tokens() > 0 {
            self.end(id, StopReason::Context);
        } else {
            self.fail(id, &Arc::new(Error::OutOfPages { needed, free: total, total }));
        }
    }

    /// Ends a request well.
    fn end(&mut self, id: u64, stop_reason: StopReason) {
        // What was computed up to here is right, whatever the reason.
        if self.live.get(&id).is_some_and(|live| live.first_token.is_some()) {
            self.keep(id, true);
        }
        let Some(live) = self.forget(id) else { return };
        let now = Instant::now();
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        self.stats.cancelled += u64::from(stop_reason == StopReason::Stopped);
        let finished = Finished {
            stop_reason,
            prompt_tokens: live.request.prompt.len(),
            cached_tokens: live.cached_tokens,
            new_tokens: live.new_tokens(),
            acceptance: live.drafting.acceptance(),
            preemptions: live.preemptions,
            waited: between(Some(live.submitted), live.admitted.or(Some(now))),
            prefill: between(live.admitted, live.first_token),
            decode: between(live.first_token, Some(now)),
        };
        // Whoever hears of the end finds it in the figures.
        self.publish();
        let _ = live.events.send(Event::Finished(Box::new(finished))); // whoever asked may have gone
    }

    /// Ends a request with an error.
    fn fail(&mut self, id: u64, error: &Arc<Error>) {
        let Some(live) = self.forget(id) else { return };
        self.stats.failed += 1;
        self.publish();
        let _ = live.events.send(Event::Failed(Arc::clone(error))); // whoever asked may have gone
    }

    /// Takes a request out, and frees what it had.
    fn forget(&mut self, id: u64) -> Option<Live> {
        let live = self.live.remove(&id)?;
        self.scheduler.remove(id);
        if let Some(sequence) = live.sequence {
            // It cannot be unknown: it was added when the request was admitted.
            let _ = self.session.remove_sequence(sequence);
        }
        self.stats.requests += 1;
        let mut used = lock(&self.shared.host_bytes);
        *used = used.saturating_sub(host_bytes(&live.request));
        drop(used);
        Some(live)
    }

    /// Something could not be run. The requests concerned fail; if the device is gone, all do.
    fn fault(&mut self, error: Error, concerned: &[u64]) {
        let lost = matches!(error, Error::DeviceLost { .. } | Error::Interrupted);
        let error = Arc::new(error);
        let mut ids = concerned.to_vec();
        if lost {
            self.broken = Some(Arc::clone(&error));
            ids = self.live.keys().copied().collect();
        }
        for id in ids {
            self.fail(id, &error);
        }
        self.publish();
    }

    fn warn(&mut self, text: String) {
        if !self.stats.warnings.contains(&text) && self.stats.warnings.len() < 16 {
            self.stats.warnings.push(text);
        }
    }

    /// Shows the figures of now.
    fn publish(&mut self) {
        if let Some(warning) = self.cache.disk().and_then(Disk::take_warning) {
            self.warn(warning);
        }
        let counts = self.scheduler.counts();
        let (pages, free_pages) = self.session.pages();
        let disk = self.cache.disk();
        *lock(&self.shared.stats) = Stats {
            waiting: counts.waiting,
            running: counts.prefill + counts.decode,
            pages,
            free_pages,
            cached_pages: self.cache.pages(),
            preempted: counts.preempted,
            host_bytes: *lock(&self.shared.host_bytes),
            disk: disk.map(Disk::stats),
            ..self.stats.clone()
        };
    }
}

/// What latents depend on beside their tokens: a page of another model, precision or device profile is another page.
fn identity(session: &Session) -> [u8; 32] {
    let plan = session.model().plan();
    let mut hasher = blake3::Hasher::new();
    let parts = [
        plan.model.checkpoint.as_str(),
        plan.generator.as_str(),
        plan.requirements.profile.as_str(),
        session.options().precision.name(),
    ];
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.update(&FORMAT_VERSION.to_le_bytes()).update(&session.page_bytes().to_le_bytes());
    hasher.update(&session.draft_modules().to_le_bytes());
    *hasher.finalize().as_bytes()
}
