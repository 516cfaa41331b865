//! Which sequences run next, and who has to wait for pages: a state machine without clock, threads or tokens.
//!
//! **Order.** Every request has a rank, fixed when it arrives: its tick of arrival, less [`AGEING_TICKS`] for each level
//! of priority. Ranks are a total order that never changes, and it decides everything about memory: who is admitted
//! first, who takes pages from whom. So a waiting request ages without any bookkeeping, two requests never take pages
//! from each other in turn, and the first in rank is never preempted. What is guaranteed: a request of priority p that
//! arrives at tick t is overtaken by requests of priority q > p only if they arrive before t + (q − p) ·
//! `AGEING_TICKS`, and by others never. These are finitely many, whatever the load, and the first in rank always gets
//! on; therefore every request is served.
//!
//! **Pages.** A request is admitted with pages for all tokens that it has, so that prompts never wait for pages midway,
//! and only if every running sequence then finds one more page. Nobody overtakes the first waiting request, even if it
//! waits for pages: they would not come together otherwise. A decoding sequence that finds no page drops its drafts,
//! then preempts the running sequence of last rank. If it is the last itself, it pauses: it keeps what it has until a
//! sequence before it needs that or has ended.
//!
//! **Batches.** Decoding sequences come first, all of them if they fit; if not, they take turns, and a prompt takes turns
//! with them. Half of what is left goes to the prompt that has waited longest for a turn, so that each of n prompts gets
//! on in any n ticks in which prompts are run; the other half to those with the fewest tokens left among those of the
//! highest priority, so that a short prompt is not stuck behind a long one.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::pages::pages_for;

#[cfg(test)]
mod model;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

/// Ticks of waiting that weigh as much as one level of priority.
pub const AGEING_TICKS: i64 = 256;

/// While prompts are in prefill, drafts leave them this share of a batch's tokens,
const PROMPT_TOKENS: usize = 2;
/// and this share of its rows.
const PROMPT_ROWS: usize = 4;

/// What a batch and a session hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of a batch.
    pub tokens: usize,
    /// Rows of logits of a batch, and sequences in it.
    pub rows: usize,
    /// Sequences that run at once.
    pub running: usize,
    /// Fewest tokens of a prompt that are worth a place beside another prompt.
    pub min_chunk: usize,
    /// Tokens that are run again in front of the newest one where drafts follow it.
    pub lead: usize,
}

/// A request as the scheduler knows it.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Tells it from all others.
    pub id: u64,
    /// Higher ones come first.
    pub priority: i32,
    /// Tokens of its prompt, at least one.
    pub prompt: usize,
    /// Tokens that are drawn at most. Whoever draws them has to end the sequence then ([`Scheduler::remove`]).
    pub max_new: usize,
}

/// What the scheduler needs to know and to change of the cache's pages.
pub trait Pool {
    /// Most pages that a sequence can have: all there are, or those of the longest context.
    fn total(&self) -> usize;

    /// Pages that are free or would be after eviction, since no sequence uses them.
    fn available(&self) -> usize;

    /// Gives the request a slot, the cached pages of its beginning, and pages for all of its `tokens` tokens, if there are
    /// `spare` available pages left then. Says how many of its tokens are cached (fewer than all), or `None` if nothing
    /// was changed.
    fn admit(&mut self, id: u64, tokens: usize, spare: usize) -> Option<usize>;

    /// Sees to it that an admitted request has pages for so many tokens in all. `false`: nothing was changed.
    fn grow(&mut self, id: u64, tokens: usize) -> bool;

    /// Takes slot and pages from an admitted request. Its tokens are kept: it may be admitted again.
    fn release(&mut self, id: u64);
}

/// What one sequence does in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// The request.
    pub id: u64,
    /// Tokens that it has and that are run now, from the first one that is not cached: 1 when decoding.
    pub tokens: usize,
    /// Drafts behind them.
    pub drafts: usize,
    /// Whether its last token is among them, so that the next one is drawn.
    pub samples: bool,
}

/// What is to run next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The batch: decoding sequences, then prompts. Each request is there at most once.
    pub items: Vec<Item>,
    /// Passes that may be made of these items, each going on with what the last one drew, before the next plan. Pages
    /// suffice for all of them, and no sequence draws more than it may. 1 unless all running sequences are decoding.
    pub burst: usize,
    /// Requests that the scheduler has given up and does not know any more. Their slots and pages are released.
    pub failed: Vec<(u64, Reason)>,
}

/// Why a request was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// All pages are too few for it alone.
    #[error("{tokens} tokens need {needed} pages of the cache, which gives a sequence at most {total}")]
    OutOfPages {
        /// Its tokens.
        tokens: usize,
        /// Pages for them.
        needed: usize,
        /// Most pages that a sequence can have.
        total: usize,
    },
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It has neither slot nor pages, because it was not admitted yet or because it was preempted.
    Waiting,
    /// Its tokens are being run.
    Prefill,
    /// It draws a token in each pass.
    Decode,
}

/// Figures for reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that wait.
    pub waiting: usize,
    /// Sequences in prefill.
    pub prefill: usize,
    /// Decoding sequences.
    pub decode: usize,
    /// Admissions so far, with those after a preemption.
    pub admitted: u64,
    /// Preemptions so far.
    pub preempted: u64,
}

/// Place of a request among all others; the least comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Tick at which a request of priority 0 would have had to arrive for the same place.
    aged: i64,
    /// Which request it was, in order of arrival.
    arrival: u64,
}

#[derive(Clone, Copy, Debug)]
struct Sequence {
    id: u64,
    priority: i32,
    /// Its prompt and what was drawn.
    tokens: usize,
    /// How many of them were run; fewer than all.
    cached: usize,
    /// Tokens that may still be drawn.
    remaining: usize,
    /// Drafts that are wanted behind its newest token.
    drafts: usize,
    decoding: bool,
    /// Pages it is known to have.
    pages: usize,
    /// Its place in the queue for turns: at the end when it is admitted and whenever it was in a batch.
    turn: u64,
}

impl Sequence {
    /// Whether it may need more pages than it has.
    fn may_grow(&self) -> bool {
        pages_for((self.tokens + self.remaining).saturating_sub(1)) > self.pages
    }

    fn pending(&self) -> usize {
        self.tokens - self.cached
    }
}

/// Decides what runs. See the module's documentation for how.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    tick: u64,
    arrivals: u64,
    turns: u64,
    ranks: HashMap<u64, Rank>,
    waiting: BTreeMap<Rank, Sequence>,
    running: BTreeMap<Rank, Sequence>,
    admitted: u64,
    preempted: u64,
}

impl Scheduler {
    /// A scheduler without requests. Limits of 0 count as 1, except `lead`.
    pub fn new(limits: Limits) -> Self {
        let limits = Limits {
            tokens: limits.tokens.max(1),
            rows: limits.rows.max(1),
            running: limits.running.max(1),
            min_chunk: limits.min_chunk.max(1),
            lead: limits.lead,
        };
        Self {
            limits,
            tick: 0,
            arrivals: 0,
            turns: 0,
            ranks: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            admitted: 0,
            preempted: 0,
        }
    }

    /// Takes a request in. `false`, and nothing is changed, if its prompt is empty or its id is in use.
    pub fn submit(&mut self, request: Request) -> bool {
        if request.prompt == 0 || self.ranks.contains_key(&request.id) {
            return false;
        }
        self.arrivals += 1;
        let aged = self.tick as i64 - i64::from(request.priority) * AGEING_TICKS;
        let rank = Rank { aged, arrival: self.arrivals };
        self.ranks.insert(request.id, rank);
        let sequence = Sequence {
            id: request.id,
            priority: request.priority,
            tokens: request.prompt,
            cached: 0,
            remaining: request.max_new,
            drafts: 0,
            decoding: false,
            pages: 0,
            turn: 0,
        };
        self.waiting.insert(rank, sequence);
        true
    }

    /// Forgets a request that is finished, cancelled or failed, and says where it was. Unless it was waiting, its slot
    /// and pages are the caller's to release.
    pub fn remove(&mut self, id: u64) -> Option<Phase> {
        let phase = self.phase(id)?;
        let rank = self.ranks.remove(&id)?;
        self.waiting.remove(&rank);
        self.running.remove(&rank);
        Some(phase)
    }

    /// Where a request is; `None` if it is not known, or not any more.
    pub fn phase(&self, id: u64) -> Option<Phase> {
        let rank = self.ranks.get(&id)?;
        Some(match self.running.get(rank) {
            None => Phase::Waiting,
            Some(sequence) if sequence.decoding => Phase::Decode,
            Some(_) => Phase::Prefill,
        })
    }

    /// Sets how many drafts a request wants behind its newest token when it is decoding. Fewer are planned where they do
    /// not fit.
    pub fn set_drafts(&mut self, id: u64, drafts: usize) {
        if let Some(sequence) = self.find(id) {
            sequence.drafts = drafts.min(moewe_plan::MAX_DRAFTS as usize);
        }
    }

    /// Whether there is no request.
    pub fn idle(&self) -> bool {
        self.ranks.is_empty()
    }

    /// Figures for reports.
    pub fn counts(&self) -> Counts {
        let decode = self.running.values().filter(|sequence| sequence.decoding).count();
        Counts {
            waiting: self.waiting.len(),
            prefill: self.running.len() - decode,
            decode,
            admitted: self.admitted,
            preempted: self.preempted,
        }
    }

    /// Notes that an item of the last plan was run, and how many tokens its passes drew: 0 if it does not sample. Not to
    /// be called for requests that were removed since, nor at all if a pass failed; the tokens are planned again then.
    pub fn ran(&mut self, item: &Item, new: usize) {
        let Some(sequence) = self.ranks.get(&item.id).and_then(|rank| self.running.get_mut(rank)) else { return };
        if new > 0 {
            sequence.tokens += new;
            sequence.cached = sequence.tokens - 1;
            sequence.remaining = sequence.remaining.saturating_sub(new);
            sequence.decoding = true;
        } else if !item.samples {
            sequence.cached = (sequence.cached + item.tokens).min(sequence.tokens - 1);
        }
    }

    /// What to run next: admits what may be admitted, gives pages to those that run, preempts where it must, and fills a
    /// batch. `max_burst` bounds [`Plan::burst`]. Without items, nothing can run now; if requests wait all the
    /// same, what ran last has just failed, and the next plan admits them.
    pub fn plan(&mut self, pool: &mut dyn Pool, max_burst: usize) -> Plan {
        self.tick += 1;
        let mut failed = Vec::new();
        self.admit(pool, &mut failed);
        let decoding = self.decode(pool, &mut failed);
        let burst = self.burst(&decoding, pool, max_burst);
        let mut batch: Vec<_> = decoding.iter().map(|&(rank, drafts)| (rank, 1, drafts)).collect();
        batch.extend(self.chunks(&decoding).into_iter().map(|(rank, tokens)| (rank, tokens, 0)));
        self.queue_again(batch.iter().map(|(rank, ..)| *rank).collect());
        let items = batch.into_iter().map(|(rank, tokens, drafts)| {
            let sequence = &self.running[&rank];
            Item { id: sequence.id, tokens, drafts, samples: tokens == sequence.pending() }
        });
        let items = items.collect();
        Plan { items, burst, failed }
    }

    /// Puts these behind all others that wait for a turn, in the order in which they were.
    fn queue_again(&mut self, mut served: Vec<Rank>) {
        served.sort_by_key(|rank| self.running[rank].turn);
        for rank in served {
            self.turns += 1;
            self.running.entry(rank).and_modify(|sequence| sequence.turn = self.turns);
        }
    }

    /// Admits waiting requests in order of rank, until one of them has to go on waiting.
    fn admit(&mut self, pool: &mut dyn Pool, failed: &mut Vec<(u64, Reason)>) {
        while let Some((&rank, &sequence)) = self.waiting.first_key_value() {
            let needed = pages_for(sequence.tokens);
            let reason = Reason::OutOfPages { tokens: sequence.tokens, needed, total: pool.total() };
            let never = needed > pool.total();
            if !never && (self.try_admit(rank, sequence, pool) || self.make_room(rank, sequence, pool)) {
                continue;
            }
            if !never && !self.running.is_empty() {
                return;
            }
            // No sequence runs that could leave it pages: there is nothing to wait for.
            self.waiting.remove(&rank);
            self.ranks.remove(&sequence.id);
            failed.push((sequence.id, reason));
        }
    }

    fn try_admit(&mut self, rank: Rank, sequence: Sequence, pool: &mut dyn Pool) -> bool {
        if self.running.len() >= self.limits.running {
            return false;
        }
        let admitted = Sequence { pages: pages_for(sequence.tokens), turn: self.turns + 1, ..sequence };
        let spare =
            if self.running.is_empty() { 0 } else { self.headroom(|_| true) + usize::from(admitted.may_grow()) };
        let Some(cached) = pool.admit(sequence.id, sequence.tokens, spare) else { return false };
        self.waiting.remove(&rank);
        self.running.insert(rank, Sequence { cached: cached.min(sequence.tokens - 1), ..admitted });
        self.admitted += 1;
        self.turns += 1;
        true
    }

    /// Preempts sequences of later rank until a waiting request is admitted, if their pages can be enough.
    fn make_room(&mut self, rank: Rank, sequence: Sequence, pool: &mut dyn Pool) -> bool {
        let later = self.running.range(rank..).map(|(_, sequence)| sequence.pages).sum::<usize>();
        let needed = pages_for(sequence.tokens) + self.headroom(|other| other < rank);
        if pool.available() + later < needed {
            return false;
        }
        while let Some((&last, _)) = self.running.last_key_value().filter(|(last, _)| **last > rank) {
            self.preempt(last, pool);
            if self.try_admit(rank, sequence, pool) {
                return true;
            }
        }
        false
    }

    /// Pages that the running sequences need until each of them has crossed a page boundary.
    fn headroom(&self, of: impl Fn(Rank) -> bool) -> usize {
        self.running.iter().filter(|(rank, sequence)| of(**rank) && sequence.may_grow()).count()
    }

    /// Takes a sequence's pages and makes it wait at its old place.
    fn preempt(&mut self, rank: Rank, pool: &mut dyn Pool) {
        if let Some(sequence) = self.running.remove(&rank) {
            pool.release(sequence.id);
            self.waiting.insert(rank, Sequence { cached: 0, decoding: false, pages: 0, ..sequence });
            self.preempted += 1;
        }
    }

    /// Decoding sequences of the batch and their drafts, in order of rank. They have their pages.
    fn decode(&mut self, pool: &mut dyn Pool, failed: &mut Vec<(u64, Reason)>) -> Vec<(Rank, usize)> {
        let mut paused = BTreeSet::new();
        // A sequence that got no pages leaves its place to another one. Each round but the last has one sequence fewer.
        loop {
            let chosen = self.choose(&paused);
            let mut grown = Vec::with_capacity(chosen.len());
            for &(rank, drafts) in &chosen {
                match self.grow(rank, drafts, pool, failed) {
                    Some(drafts) => grown.push((rank, drafts)),
                    None => _ = paused.insert(rank),
                }
            }
            if grown.len() == chosen.len() {
                return grown;
            }
        }
    }

    /// Decoding sequences that fit a batch, those first whose turn it is, and as many drafts as fit.
    fn choose(&self, paused: &BTreeSet<Rank>) -> Vec<(Rank, usize)> {
        let Limits { tokens, rows, lead, .. } = self.limits;
        let decoding = self.running.iter().filter(|(rank, sequence)| sequence.decoding && !paused.contains(rank));
        let mut chosen: Vec<_> = decoding.map(|(rank, sequence)| (sequence.turn, *rank)).collect();
        chosen.sort_unstable();
        let prompts = self.running.iter().filter(|(_, sequence)| !sequence.decoding);
        let turn = prompts.clone().map(|(_, prompt)| prompt.turn).min();
        let (count, pending) = prompts.fold((0, 0), |(count, sum), (_, prompt)| (count + 1, sum + prompt.pending()));
        // If they leave no place for a prompt, it takes turns with them.
        let places = rows.min(tokens);
        let prompt_first = turn.is_some_and(|turn| chosen.get(places - 1).is_some_and(|(last, _)| turn < *last));
        chosen.truncate(places - usize::from(prompt_first));
        let wanted = |rank: &Rank| {
            let sequence = &self.running[rank];
            sequence.drafts.min(sequence.remaining.saturating_sub(1))
        };
        let mut chosen: Vec<_> = chosen.into_iter().map(|(_, rank)| (rank, wanted(&rank))).collect();
        chosen.sort_unstable();

        let tokens = tokens - pending.min((tokens / PROMPT_TOKENS).max(1));
        let rows = rows - count.min((rows / PROMPT_ROWS).max(1));
        let fits = |most: usize| {
            let drafts = chosen.iter().map(|&(_, drafts)| drafts.min(most));
            let (sum, drafting) = drafts.fold((0, 0), |(sum, count), n| (sum + n, count + usize::from(n > 0)));
            chosen.len() + sum <= rows && chosen.len() + sum + drafting * lead <= tokens
        };
        let most = (1..=moewe_plan::MAX_DRAFTS as usize).rev().find(|most| fits(*most)).unwrap_or(0);
        for (_, drafts) in &mut chosen {
            *drafts = (*drafts).min(most);
        }
        chosen
    }

    /// Gives a decoding sequence pages for the next pass and says how many drafts it can have; `None` if it was
    /// preempted before, fails or has to pause.
    fn grow(
        &mut self,
        rank: Rank,
        drafts: usize,
        pool: &mut dyn Pool,
        failed: &mut Vec<(u64, Reason)>,
    ) -> Option<usize> {
        let tokens = self.running.get(&rank)?.tokens;
        if drafts > 0 && self.take_pages(rank, tokens + drafts, pool) {
            return Some(drafts);
        }
        let needed = pages_for(tokens);
        while needed <= pool.total() {
            if self.take_pages(rank, tokens, pool) {
                return Some(0);
            }
            if self.running.len() == 1 {
                break;
            }
            let (&last, _) = self.running.last_key_value()?;
            if last == rank {
                return None;
            }
            self.preempt(last, pool);
        }
        let sequence = self.running.remove(&rank)?;
        self.ranks.remove(&sequence.id);
        pool.release(sequence.id);
        failed.push((sequence.id, Reason::OutOfPages { tokens, needed, total: pool.total() }));
        None
    }

    fn take_pages(&mut self, rank: Rank, tokens: usize, pool: &mut dyn Pool) -> bool {
        let Some(sequence) = self.running.get_mut(&rank) else { return false };
        let grown = pool.grow(sequence.id, tokens);
        if grown {
            sequence.pages = sequence.pages.max(pages_for(tokens));
        }
        grown
    }

    /// Passes that need no decision in between, with pages for all of them.
    fn burst(&mut self, decoding: &[(Rank, usize)], pool: &mut dyn Pool, max_burst: usize) -> usize {
        if decoding.is_empty() || decoding.len() < self.running.len() {
            return 1;
        }
        let steps = decoding.iter().map(|&(rank, drafts)| self.running[&rank].remaining / (1 + drafts)).min();
        let most = steps.unwrap_or(1).min(max_burst);
        let wanted = |burst: usize, scheduler: &Self| -> Vec<(Rank, usize)> {
            let after = |&(rank, drafts): &(Rank, usize)| scheduler.running[&rank].tokens + burst * (1 + drafts) - 1;
            decoding.iter().map(|item| (item.0, after(item))).collect()
        };
        let more = |wanted: &[(Rank, usize)], scheduler: &Self| -> usize {
            wanted.iter().map(|(rank, tokens)| pages_for(*tokens).saturating_sub(scheduler.running[rank].pages)).sum()
        };
        for burst in (2..=most).rev() {
            let wanted = wanted(burst, self);
            if more(&wanted, self) <= pool.available()
                && wanted.iter().all(|&(rank, tokens)| self.take_pages(rank, tokens, pool))
            {
                return burst;
            }
        }
        1
    }

    /// Chunks of prompts beside these decoding sequences, in order of rank.
    fn chunks(&self, decoding: &[(Rank, usize)]) -> BTreeMap<Rank, usize> {
        let Limits { tokens, rows, min_chunk, lead, .. } = self.limits;
        let (used_tokens, used_rows) = decoding.iter().fold((0, 0), |(tokens, rows), &(_, drafts)| {
            (tokens + 1 + drafts + if drafts > 0 { lead } else { 0 }, rows + 1 + drafts)
        });
        // A place is kept a row for each chunk, whether it reaches its prompt's end or not: so sequences fit as well.
        let (mut tokens, mut rows) = (tokens - used_tokens, rows - used_rows);
        let mut prompts: Vec<_> = self.running.iter().filter(|(_, sequence)| !sequence.decoding).collect();
        let mut chunks = BTreeMap::new();
        let turn = prompts.iter().copied().min_by_key(|(_, sequence)| sequence.turn);
        let Some((&turn, sequence)) = turn.filter(|_| tokens > 0 && rows > 0) else { return chunks };
        let chunk = sequence.pending().min(tokens.div_ceil(2).max(min_chunk)).min(tokens);
        chunks.insert(turn, chunk);
        tokens -= chunk;
        rows -= 1;
        prompts.sort_by_key(|(rank, sequence)| (Reverse(sequence.priority), sequence.pending(), **rank));
        for (rank, sequence) in prompts {
            let before = chunks.get(rank).copied();
            let left = sequence.pending() - before.unwrap_or(0);
            let chunk = left.min(tokens);
            if chunk == 0 || before.is_none() && (rows == 0 || chunk < left.min(min_chunk)) {
                continue;
            }
            rows -= usize::from(before.is_none());
            tokens -= chunk;
            chunks.insert(*rank, before.unwrap_or(0) + chunk);
        }
        chunks
    }

    fn find(&mut self, id: u64) -> Option<&mut Sequence> {
        let rank = self.ranks.get(&id)?;
        self.waiting.get_mut(rank).or_else(|| self.running.get_mut(rank))
    }
}
