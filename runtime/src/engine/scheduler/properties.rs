//! Random arrivals on a model of cache and device. What must hold after every tick is checked against figures that this
//! file keeps itself.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::model::{Model, Text};
use super::{AGEING_TICKS, Limits, Phase, Plan, Pool, Request, Scheduler};
use crate::pages::pages_for;

#[derive(Clone, Debug)]
struct Job {
    arrives: u64,
    prompt: usize,
    max_new: usize,
    priority: i32,
    text: Text,
    /// New tokens after which its text ends by itself.
    ends: usize,
    /// Ticks after its arrival at which it is cancelled.
    cancelled: Option<u64>,
    drafts: usize,
}

/// What is known of a job that was submitted and has not ended.
struct Live {
    job: Job,
    tokens: usize,
    new: usize,
    /// Tokens that were run; meaningful while it has pages.
    computed: usize,
    /// Its place, reckoned again.
    rank: (i64, u64),
    /// Ticks since it was in a batch. For prompts, those count in which any prompt was.
    passed_over: usize,
}

struct Simulation {
    limits: Limits,
    scheduler: Scheduler,
    pool: Model,
    live: HashMap<u64, Live>,
    ended: HashSet<u64>,
    out_of_pages: HashSet<u64>,
    random: u64,
}

impl Simulation {
    fn new(limits: Limits, pages: u32, seed: u64) -> Self {
        Self {
            limits,
            scheduler: Scheduler::new(limits),
            pool: Model::new(pages, limits.running),
            live: HashMap::new(),
            ended: HashSet::new(),
            out_of_pages: HashSet::new(),
            random: seed | 1,
        }
    }

    /// A number below `bound` (xorshift).
    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % bound as u64) as usize
    }

    fn submit(&mut self, id: u64, job: &Job, tick: u64) {
        self.pool.texts.insert(id, job.text);
        let request = Request { id, priority: job.priority, prompt: job.prompt, max_new: job.max_new };
        assert!(self.scheduler.submit(request));
        assert!(!self.scheduler.submit(request), "an id that is in use was taken");
        self.scheduler.set_drafts(id, job.drafts);
        let rank = (tick as i64 - i64::from(job.priority) * AGEING_TICKS, id);
        let live = Live { job: job.clone(), tokens: job.prompt, new: 0, computed: 0, rank, passed_over: 0 };
        self.live.insert(id, live);
    }

    fn end(&mut self, id: u64) {
        let phase = self.scheduler.remove(id).expect("it is known");
        assert_eq!(phase != Phase::Waiting, self.pool.pages.contains_key(&id));
        if phase != Phase::Waiting {
            self.pool.release(id);
        }
        self.live.remove(&id);
        assert!(self.ended.insert(id));
    }

    fn first(&self) -> Option<u64> {
        self.live.iter().min_by_key(|(_, live)| live.rank).map(|(id, _)| *id)
    }

    fn tick(&mut self) {
        let first = self.first().filter(|id| self.pool.pages.contains_key(id));
        let max_burst = 1 + self.below(9);
        let plan = self.scheduler.plan(&mut self.pool, max_burst);
        for (id, _) in &plan.failed {
            let live = self.live.remove(id).expect("only live requests fail");
            // Alone, it would not have fitted: that is the one reason to give up.
            assert!(pages_for(live.tokens) > self.pool.total(), "request {id} could have run");
            assert!(!self.pool.pages.contains_key(id));
            self.ended.insert(*id);
            self.out_of_pages.insert(*id);
        }
        if let Some(first) = first.filter(|id| self.live.contains_key(id)) {
            assert!(self.pool.pages.contains_key(&first), "the first in rank was preempted");
        }
        for (id, cached) in self.pool.hits.drain() {
            if let Some(live) = self.live.get_mut(&id) {
                live.computed = cached;
                live.passed_over = 0;
            }
        }
        self.check(&plan, max_burst);
        // Now and then, a pass fails and is planned again.
        if self.below(16) > 0 {
            self.run(&plan);
        }
        self.pool.check();
    }

    fn check(&mut self, plan: &Plan, max_burst: usize) {
        let limits = self.limits;
        let running = self.pool.pages.len();
        let counts = self.scheduler.counts();
        assert_eq!((counts.waiting, counts.prefill + counts.decode), (self.live.len() - running, running));
        for id in self.live.keys() {
            let waits = !self.pool.pages.contains_key(id);
            assert_eq!(self.scheduler.phase(*id).expect("no request is lost") == Phase::Waiting, waits);
        }
        assert!(self.ended.iter().all(|id| self.scheduler.phase(*id).is_none()));
        assert_eq!(plan.items.is_empty(), running == 0, "nothing runs, although {running} could");

        let mut planned = HashSet::new();
        let (mut tokens, mut rows, mut decoding, mut prompts) = (0, 0, 0, 0);
        for item in &plan.items {
            assert!(planned.insert(item.id), "{} is there twice", item.id);
            let live = &self.live[&item.id];
            assert!(item.tokens >= 1 && live.computed + item.tokens <= live.tokens);
            assert_eq!(item.samples, live.computed + item.tokens == live.tokens);
            let last = live.tokens + plan.burst * (1 + item.drafts) - 1;
            let end = if item.samples { last } else { live.computed + item.tokens };
            assert!(self.pool.pages[&item.id].len() >= pages_for(end), "{item:?} has too few pages");
            assert!(live.new + plan.burst * (1 + item.drafts) <= live.job.max_new, "{item:?} draws too much");
            if self.scheduler.phase(item.id) == Some(Phase::Decode) {
                assert_eq!((item.tokens, prompts), (1, 0));
                assert!(item.drafts <= live.job.drafts);
                decoding += 1;
            } else {
                assert_eq!(item.drafts, 0);
                prompts += 1;
            }
            tokens += item.tokens + item.drafts + if item.drafts > 0 { limits.lead } else { 0 };
            rows += if item.samples { 1 + item.drafts } else { 0 };
        }
        assert!(tokens <= limits.tokens && rows <= limits.rows && plan.items.len() <= limits.rows);

        // A decoding sequence is left out only if the batch is full of others, or the cache of earlier ones.
        let full = plan.items.len() == limits.rows || tokens == limits.tokens;
        let mut paused = HashSet::new();
        for (id, pages) in self.pool.pages.iter().filter(|(id, _)| !planned.contains(id)) {
            let live = &self.live[id];
            if pages.len() < pages_for(live.tokens) && self.pool.available() == 0 {
                assert!(full || self.pool.pages.keys().any(|other| self.live[other].rank < live.rank));
                paused.insert(*id);
            }
            assert!(self.scheduler.phase(*id) == Some(Phase::Prefill) || full || paused.contains(id));
        }
        // Prompts get what decoding leaves.
        assert!(prompts > 0 || counts.prefill == 0 || tokens == limits.tokens || rows == limits.rows);
        for (id, live) in &mut self.live {
            let passed_over = match self.scheduler.phase(*id) {
                Some(Phase::Prefill) => prompts > 0,
                Some(Phase::Decode) => !paused.contains(id),
                _ => false,
            };
            live.passed_over = if planned.contains(id) { 0 } else { live.passed_over + usize::from(passed_over) };
            assert!(live.passed_over < limits.running, "{id} gets no turn");
        }
        assert!((1..=max_burst).contains(&plan.burst));
        assert!(plan.burst == 1 || decoding == running);
    }

    fn run(&mut self, plan: &Plan) {
        for item in &plan.items {
            let mut new = 0;
            if item.samples {
                for _ in 0..plan.burst {
                    new += 1 + self.below(item.drafts + 1);
                }
            }
            self.scheduler.ran(item, new);
            let live = self.live.get_mut(&item.id).unwrap();
            live.computed = if item.samples { live.tokens + new - 1 } else { live.computed + item.tokens };
            live.tokens += new;
            live.new += new;
            if live.new >= live.job.max_new.min(live.job.ends) {
                self.end(item.id);
            }
        }
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    let small = (1..40usize, 1..8usize, 1..12usize, 1..16usize, 0..3usize);
    small.prop_map(|(tokens, rows, running, min_chunk, lead)| Limits { tokens, rows, running, min_chunk, lead })
}

fn job() -> impl Strategy<Value = Job> {
    let text = (0..3u64, 0..400usize).prop_map(|(family, shared)| Text { family, shared });
    let ends = prop_oneof![3 => Just(usize::MAX), 1 => 1..100usize];
    let cancelled = prop_oneof![4 => Just(None), 1 => (0..200u64).prop_map(Some)];
    let sizes = (0..300u64, prop_oneof![1..20usize, 1..500usize], 1..150usize, -2..3i32);
    (sizes, text, ends, cancelled, 0..8usize).prop_map(
        |((arrives, prompt, max_new, priority), text, ends, cancelled, drafts)| Job {
            arrives,
            prompt,
            max_new,
            priority,
            text: Text { shared: text.shared.min(prompt), ..text },
            ends,
            cancelled,
            drafts,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_everything_ends_and_nothing_is_lost(
        limits in limits(),
        pages in prop_oneof![1..12u32, 1..60u32],
        jobs in prop::collection::vec(job(), 1..24),
        seed in any::<u64>(),
    ) {
        let mut simulation = Simulation::new(limits, pages, seed);
        let longest: usize = jobs.iter().map(|job| job.prompt + job.max_new + 1).sum();
        // At any time the first in rank gets at least a token further in as many ticks as there are slots; and one pass
        // in 16 fails.
        let last = 300 + longest * (limits.running + 1) * 2;
        for tick in 0.. {
            assert!(tick < last as u64, "{} of {} requests have not ended", simulation.live.len(), jobs.len());
            for (id, job) in jobs.iter().enumerate() {
                let id = id as u64;
                if job.arrives == tick {
                    simulation.submit(id, job, tick);
                }
                let cancelled = job.cancelled.is_some_and(|after| job.arrives + after == tick);
                if cancelled && simulation.live.contains_key(&id) {
                    simulation.end(id);
                }
            }
            simulation.tick();
            if simulation.ended.len() == jobs.len() {
                break;
            }
        }
        assert!(simulation.scheduler.idle() && simulation.live.is_empty() && simulation.pool.pages.is_empty());
        for (id, job) in jobs.iter().enumerate().filter(|(id, _)| simulation.out_of_pages.contains(&(*id as u64))) {
            assert!(pages_for(job.prompt + job.max_new) > pages as usize, "{id} was given up");
        }
    }
}
