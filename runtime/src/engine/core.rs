//! The thread of an engine: requests, their sequences, and one tick after the other.

use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use moewe_plan::{FORMAT_VERSION, ProgramKind, TapChoice};

use super::cache::PrefixCache;
use super::constraint::Steering;
use super::disk::{Disk, DiskOptions};
use super::drafting::{Costs, Drafting, Mtp};
use super::experts::{Experts, Routing};
use super::pool::{self, PagePool};
use super::request::{Event, Request, Sink};
use super::scheduler::{Item, Limits, Plan, Scheduler};
use super::watchers::{Watchers, union};
use super::{Command, EngineOptions, Shared, Stats, lock};
use crate::ring::LEAST;
use crate::{Error, Result, SequenceId, Session, StopReason, Work};

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
    pub(super) id: u64,
    /// Without its constraint, which is in `steering`.
    pub(super) request: Request,
    /// Bytes that it is counted as.
    pub(super) bytes: u64,
    /// Where its events go, as long as anybody wants them.
    pub(super) sink: Option<Sink>,
    /// Prompt and what was drawn.
    pub(super) tokens: Vec<u32>,
    /// While it is admitted.
    pub(super) sequence: Option<SequenceId>,
    pub(super) steering: Steering,
    /// If they are to be told.
    pub(super) experts: Option<Experts>,
    /// Positions that watchers have seen.
    pub(super) seen: usize,
    /// As how many-th request it began, if it did.
    pub(super) begun: Option<u64>,
    pub(super) drafting: Drafting,
    /// Drafts that it is to have behind its newest token.
    pub(super) drafts: usize,
    /// Tokens of the prompt that were there when it was admitted first.
    pub(super) cached_tokens: usize,
    pub(super) preemptions: u32,
    pub(super) submitted: Instant,
    pub(super) admitted: Option<Instant>,
    pub(super) first_token: Option<Instant>,
}

impl Live {
    pub(super) fn new_tokens(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// How watchers call it.
    pub(super) fn number(&self) -> u32 {
        self.id as u32
    }

    /// Tells whoever asked. `false` if nobody listens any more.
    pub(super) fn tell(&mut self, event: Event) -> bool {
        let heard = self.sink.as_mut().is_some_and(|sink| sink.tell(event));
        if !heard {
            self.sink = None;
        }
        heard
    }

    /// How many of its first tokens may come from the prefix cache.
    pub(super) fn cacheable(&self) -> usize {
        // What is to be told of a token is only known if it was run.
        let told = self.experts.as_ref().map_or(usize::MAX, |experts| experts.known().saturating_add(1));
        told.min(self.tokens.len())
    }

    /// Whether the item runs the token that was drawn last, not a part of a prompt.
    fn decodes(&self, item: &Item) -> bool {
        item.samples && item.tokens == 1 && self.new_tokens() > 0
    }
}

/// What the thread owns.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) session: Session,
    pub(super) cache: PrefixCache,
    pub(super) scheduler: Scheduler,
    pub(super) live: HashMap<u64, Live>,
    pub(super) costs: Costs,
    mtp: Mtp,
    prefill_chunk: usize,
    pub(super) eos: Vec<u32>,
    pub(super) routing: Routing,
    pub(super) watchers: Watchers,
    /// The taps that are read now.
    taps: TapChoice,
    /// Tokens of passes for whose frames there is room.
    frame_tokens: usize,
    /// Frames that the session has dropped so far.
    pub(super) dropped: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) stats: Stats,
    /// Why nothing can run any more.
    pub(super) broken: Option<Arc<Error>>,
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
            routing: Routing::of(session.model().plan()),
            watchers: Watchers::default(),
            taps: TapChoice::none(),
            frame_tokens: usize::MAX,
            dropped: session.dropped(),
            shared,
            stats: Stats::default(),
            broken: None,
            session,
        };
        if core.session.options().watch.is_some() {
            core.session.set_watch(TapChoice::none())?;
        }
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
                Some(Command::Submit { id, request, bytes, sink }) => self.submit(id, request, bytes, sink),
                Some(Command::Cancel(id)) => self.cancel(id),
                Some(Command::Watch { taps, queue }) => self.watchers.add(taps, queue),
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
        self.watchers.close();
        self.flush();
        self.cache.clear(&mut self.session);
        if let Some(taps) = self.session.options().watch.as_ref().map(|watch| watch.taps.clone()) {
            // It can be watched, so it takes them.
            let _ = self.session.set_watch(taps);
        }
        self.publish();
    }

    fn submit(&mut self, id: u64, mut request: Request, bytes: u64, sink: Sink) {
        let model = &self.session.model().plan().model;
        let max_new = request.max_new_tokens.min((model.max_context as usize).saturating_sub(request.prompt.len()));
        let (prompt, priority) = (request.prompt.len(), request.priority);
        let steering = Steering::new(&mut request, model.vocab_size);
        let drafting = Drafting::new(self.mtp, moewe_plan::MAX_DRAFTS as usize);
        let mut drafting = if id.is_multiple_of(TRIES) { drafting } else { drafting.trusting() };
        // Its prompt may be run before drafts are chosen again, and modules have to see all of it.
        let drafts = if steering.is_stepwise() { 0 } else { drafting.next(&self.costs, self.live.len() + 1) };
        let live = Live {
            id,
            tokens: request.prompt.clone(),
            experts: request.experts.then(Experts::default),
            request,
            bytes,
            sink: Some(sink),
            sequence: None,
            steering,
            seen: 0,
            begun: None,
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
    pub(super) fn full_reason(&self, id: u64) -> StopReason {
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
        self.watchers.purge();
        self.choose_drafts();
        let reads = self.reads();
        let Self { session, cache, live, stats, .. } = self;
        let mut pool = PagePool { session, cache, live, stats, errors: Vec::new() };
        let running = || pool.live.values().filter(|live| live.sequence.is_some());
        // What is tried is looked at after each pass, and so is what the next draw depends on.
        let step_by_step = running().any(|live| live.steering.is_stepwise() || live.drafting.learns() && !reads);
        let mut plan = self.scheduler.plan(&mut pool, if step_by_step { 1 } else { MAX_BURST });
        let errors = std::mem::take(&mut pool.errors);
        lock(&self.shared.held).waiting = self.scheduler.counts().waiting;
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
        let reads = self.reads();
        let sequences = self.live.values().filter(|live| live.sequence.is_some()).count();
        for (&id, live) in self.live.iter_mut().filter(|(_, live)| live.sequence.is_some()) {
            let alone = reads || live.steering.is_stepwise();
            live.drafts = if alone { 0 } else { live.drafting.next(&self.costs, sequences) };
            self.scheduler.set_drafts(id, live.drafts);
        }
    }

    /// The taps that somebody wants of what runs now.
    fn wanted_taps(&self) -> TapChoice {
        let experts = self.live.values().any(|live| live.experts.is_some() && live.sequence.is_some());
        let routing = experts.then(|| self.routing.taps());
        union(self.watchers.taps().chain(routing.as_ref()))
    }

    /// Whether passes are watched now.
    fn reads(&self) -> bool {
        !self.wanted_taps().is_none()
    }

    /// Sees to it that what somebody wants is read, and nothing else.
    fn choose_taps(&mut self) -> Result<()> {
        let taps = self.wanted_taps();
        if taps != self.taps {
            self.session.set_watch(taps.clone())?;
            self.frame_tokens = self.frame_tokens(&taps);
            self.taps = taps;
        }
        Ok(())
    }

    /// Bytes of frames that the session has room for, whatever their layout: half of it, since buffers are rounded up.
    fn frame_bytes(&self) -> u64 {
        self.session.options().watch.as_ref().map_or(0, |watch| watch.ring_bytes) / 2
    }

    /// Tokens whose frames find room.
    fn frame_tokens(&self, taps: &TapChoice) -> usize {
        let options = self.session.options();
        let programs = self.session.model().programs(ProgramKind::Watch, options.precision).into_iter();
        let bytes = programs.map(|(_, program)| {
            let wanted = program.taps.iter().filter(|tap| taps.wants_tap(tap));
            16 + wanted.map(|tap| u64::from(tap.stride) * 4).sum::<u64>()
        });
        (self.frame_bytes() / bytes.max().unwrap_or(16)) as usize
    }

    fn run(&mut self, plan: &mut Plan) {
        if let Err(error) = self.choose_taps() {
            let ids: Vec<u64> = plan.items.iter().map(|item| item.id).collect();
            return self.fault(error, &ids);
        }
        self.shorten(plan);
        self.begin(plan);
        self.steer(plan);
        // Some may have ended in front of their pass.
        plan.items.retain(|item| self.live.contains_key(&item.id));
        if plan.items.is_empty() {
            return;
        }
        let reads = !self.taps.is_none();
        let work: Vec<Work> = plan.items.iter().filter_map(|item| self.work(item)).collect();
        let ids: Vec<u64> = plan.items.iter().map(|item| item.id).collect();
        let decodes = plan.items.iter().all(|item| self.live.get(&item.id).is_some_and(|live| live.decodes(item)));
        for work in work.iter().filter(|work| work.drafts > 0) {
            pool::ensure_behind(&mut self.session, &mut self.cache, work);
        }
        let steps = plan.burst.min(self.frame_passes(plan, &work)) as u32;
        let started = Instant::now();
        let stepped = match self.session.step(&work, steps) {
            Ok(stepped) if stepped.len() == plan.items.len() => stepped,
            Ok(_) => return self.fault(Error::EngineStopped, &ids),
            Err(error) => return self.fault(error, &ids),
        };
        let now = Instant::now();
        let passes = stepped.iter().map(|stepped| stepped.passes).max().unwrap_or(1).max(1);
        self.stats.passes += u64::from(passes);
        if decodes && !reads {
            let drafts = work.iter().map(|work| work.drafts).max().unwrap_or(0) as usize;
            let seconds = (now - started).as_secs_f64() / f64::from(passes);
            self.costs.saw(drafts, work.len(), seconds);
        }
        self.brought(&plan.items, stepped, now);
    }

    /// Passes whose frames find room, where experts are to be told; at least one.
    fn frame_passes(&self, plan: &Plan, work: &[Work]) -> usize {
        if !self.tells_experts(plan) {
            return MAX_BURST;
        }
        let tokens = work.iter().map(|work| work.tokens).sum::<usize>().max(1);
        (self.frame_tokens / tokens).min((self.frame_bytes() / LEAST) as usize).max(1)
    }

    /// Whether the experts of any of these are to be told.
    fn tells_experts(&self, plan: &Plan) -> bool {
        plan.items.iter().any(|item| self.live.get(&item.id).is_some_and(|live| live.experts.is_some()))
    }

    /// Takes no more of prompts into a pass than is wanted, or than there is room for where experts are to be told.
    fn shorten(&self, plan: &mut Plan) {
        let mut left = if self.tells_experts(plan) { self.frame_tokens.max(1) } else { usize::MAX };
        plan.items.retain_mut(|item| {
            let decodes = self.live.get(&item.id).is_some_and(|live| live.decodes(item));
            let most = if decodes { item.tokens } else { self.prefill_chunk.min(left) };
            if item.tokens > most {
                (item.tokens, item.samples) = (most, false);
            }
            left = left.saturating_sub(item.tokens);
            item.tokens > 0
        });
    }

    /// Tells those who run for the first time.
    fn begin(&mut self, plan: &Plan) {
        for item in &plan.items {
            let Some(live) = self.live.get_mut(&item.id).filter(|live| live.begun.is_none()) else { continue };
            live.begun = Some(self.watchers.began(live.number(), &live.request.prompt));
            if !live.tell(Event::Began { cached_tokens: live.cached_tokens }) {
                self.end(item.id, StopReason::Stopped);
            }
        }
    }

    /// Tells the session what the draws of this pass depend on.
    fn steer(&mut self, plan: &Plan) {
        for item in plan.items.iter().filter(|item| item.samples) {
            let Some(live) = self.live.get_mut(&item.id) else { continue };
            let Some(sequence) = live.sequence else { continue };
            if let Err(error) = live.steering.prepare(&mut self.session, sequence) {
                self.fail(item.id, &Arc::new(error));
            }
        }
    }

    fn work(&self, item: &Item) -> Option<Work> {
        let live = self.live.get(&item.id)?;
        // Modules have to see the prompt if they are to draft behind it.
        let drafts = if live.decodes(item) { item.drafts } else { live.drafts };
        let logprobs = live.request.logprobs.is_some();
        Some(Work { sequence: live.sequence?, tokens: item.tokens, drafts: drafts as u32, logprobs })
    }
}

/// What latents depend on beside their tokens: a page of another model, precision, format or device profile is another page.
fn identity(session: &Session) -> [u8; 32] {
    let plan = session.model().plan();
    let mut hasher = blake3::Hasher::new();
    let parts = [
        plan.model.checkpoint.as_str(),
        plan.generator.as_str(),
        plan.requirements.profile.as_str(),
        session.options().precision.name(),
        plan.fast_latents.name(),
    ];
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.update(&FORMAT_VERSION.to_le_bytes()).update(&session.page_bytes().to_le_bytes());
    hasher.update(&session.draft_modules().to_le_bytes());
    *hasher.finalize().as_bytes()
}
