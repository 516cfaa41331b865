//! Slots and pages, as the scheduler asks for them: those of the session, with what the prefix cache has in them.

use std::collections::HashMap;
use std::time::Instant;

use super::Stats;
use super::cache::{Beginning, PrefixCache};
use super::core::Live;
use super::scheduler::Pool;
use crate::pages::pages_for;
use crate::{Error, Result, SequenceId, Session, Work};

/// The session's slots and pages.
#[derive(Debug)]
pub(super) struct PagePool<'a> {
    pub(super) session: &'a mut Session,
    pub(super) cache: &'a mut PrefixCache,
    pub(super) live: &'a mut HashMap<u64, Live>,
    pub(super) stats: &'a mut Stats,
    /// What went wrong on the device, and for which requests. The scheduler was told that all is well: it would let others
    /// suffer for it.
    pub(super) errors: Vec<(u64, Error)>,
}

impl PagePool<'_> {
    fn try_admit(&mut self, id: u64, tokens: usize, spare: usize) -> Result<Option<usize>> {
        let Some(live) = self.live.get_mut(&id) else { return Ok(None) };
        let known = &live.tokens[..live.cacheable()];
        let mut found = self.cache.begin(self.session, known)?;
        // What was found is held, so it is not among what is available.
        let needed = pages_for(tokens).saturating_sub(found.full_pages());
        // A page that is only copied is in the way if it is the last one.
        while self.cache.available(self.session) < needed + spare {
            if !PrefixCache::end_partial(self.session, &mut found) {
                PrefixCache::end(self.session, &found);
                return Ok(None);
            }
        }
        let admitted = self.session.add_sequence(&live.tokens, live.request.sampling).and_then(|sequence| {
            let filled = fill(self.session, self.cache, (sequence, live.tokens.len()), known, &mut found);
            if filled.is_err() {
                self.session.remove_sequence(sequence)?;
            }
            filled.map(|()| sequence)
        });
        PrefixCache::end(self.session, &found);
        match admitted {
            Ok(sequence) => {
                live.sequence = Some(sequence);
                Ok(Some(found.tokens))
            }
            Err(Error::OutOfPages { .. } | Error::OutOfSequences { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Gives a fresh sequence what is there of its first tokens, and pages for so many.
fn fill(
    session: &mut Session,
    cache: &mut PrefixCache,
    (sequence, length): (SequenceId, usize),
    first: &[u32],
    found: &mut Beginning,
) -> Result<()> {
    cache.read_disk(session, first, found)?;
    cache.adopt(session, sequence, found)?;
    ensure(session, cache, sequence, length)
}

fn ensure(session: &mut Session, cache: &mut PrefixCache, sequence: SequenceId, tokens: usize) -> Result<()> {
    let more = pages_for(tokens).saturating_sub(session.pages_of(sequence)?.len());
    cache.free(session, more);
    session.ensure(sequence, tokens)
}

/// Tokens by which rows of draft modules stand further than those of the model.
fn behind(session: &Session, drafts: usize) -> usize {
    let modules = session.draft_modules() as usize;
    if drafts > 0 { modules + modules.max(drafts) } else { 0 }
}

/// Takes pages for what is drafted behind the end of a prompt, if there are any. Without them modules would not see the
/// prompt, as [`Session::step`] leaves drafts out then.
pub(super) fn ensure_behind(session: &mut Session, cache: &mut PrefixCache, work: &Work) {
    let Ok(tokens) = session.tokens(work.sequence).map(<[u32]>::len) else { return };
    let most = session.model().plan().model.max_context as usize;
    let tokens = tokens + behind(session, work.drafts as usize);
    let _ = ensure(session, cache, work.sequence, tokens.min(most)); // then there are none
}

impl Pool for PagePool<'_> {
    fn total(&self) -> usize {
        pages_for(self.session.max_context())
    }

    fn available(&self) -> usize {
        self.cache.available(self.session)
    }

    fn admit(&mut self, id: u64, tokens: usize, spare: usize) -> Option<usize> {
        match self.try_admit(id, tokens, spare) {
            Ok(Some(cached)) => {
                let live = self.live.get_mut(&id)?;
                if live.admitted.is_none() {
                    live.admitted = Some(Instant::now());
                    live.cached_tokens = cached;
                    self.stats.hit_tokens += cached as u64;
                    self.stats.miss_tokens += (tokens - cached) as u64;
                }
                Some(cached)
            }
            Ok(None) => None,
            Err(error) => {
                self.errors.push((id, error));
                Some(0)
            }
        }
    }

    fn grow(&mut self, id: u64, tokens: usize) -> bool {
        let Some(live) = self.live.get(&id) else { return false };
        let Some(sequence) = live.sequence else { return false };
        let behind = behind(self.session, live.drafts);
        let most = self.session.model().plan().model.max_context as usize;
        [tokens + behind, tokens].into_iter().any(|tokens| {
            match ensure(self.session, self.cache, sequence, tokens.min(most)) {
                Ok(()) => true,
                Err(Error::OutOfPages { .. }) => false,
                Err(error) => {
                    self.errors.push((id, error));
                    true
                }
            }
        })
    }

    fn release(&mut self, id: u64) {
        let Some(live) = self.live.get_mut(&id) else { return };
        let Some(sequence) = live.sequence.take() else { return };
        // What it has computed stays for when it comes back, as long as nobody needs the pages.
        if live.first_token.is_some()
            && let Err(error) = self.cache.keep(self.session, sequence, &live.tokens, true)
        {
            self.errors.push((id, error));
        }
        live.preemptions += 1;
        let _ = self.session.remove_sequence(sequence); // it was there a moment ago
    }
}
