//! Slots and pages, as the scheduler asks for them: those of the session, with what the prefix cache has in them.

use std::collections::HashMap;
use std::time::Instant;

use super::Stats;
use super::cache::{Beginning, PrefixCache};
use super::core::Live;
use super::scheduler::Pool;
use crate::pages::pages_for;
use crate::{Error, Result, SequenceId, Session};

/// The session's slots and pages.
#[derive(Debug)]
pub(super) struct PagePool<'a> {
    pub(super) session: &'a mut Session,
    pub(super) cache: &'a mut PrefixCache,
    pub(super) live: &'a mut HashMap<u64, Live>,
    pub(super) stats: &'a mut Stats,
    /// What went wrong on the device, and for which request, so that the scheduler was told "no".
    pub(super) error: Option<(u64, Error)>,
}

impl PagePool<'_> {
    fn try_admit(&mut self, id: u64, tokens: usize, spare: usize) -> Result<Option<usize>> {
        let Some(live) = self.live.get_mut(&id) else { return Ok(None) };
        let mut found = self.cache.begin(self.session, &live.tokens)?;
        // What was found is held, so it is not among what is available.
        let needed = pages_for(tokens).saturating_sub(found.full_pages());
        if self.cache.available(self.session) < needed + spare {
            PrefixCache::end(self.session, &found);
            return Ok(None);
        }
        let admitted = self.session.add_sequence(&live.tokens, live.request.sampling).and_then(|sequence| {
            let filled = fill(self.session, self.cache, sequence, &live.tokens, &mut found);
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

/// Gives a fresh sequence what was found of its beginning, and pages for so many tokens.
fn fill(
    session: &mut Session,
    cache: &mut PrefixCache,
    sequence: SequenceId,
    tokens: &[u32],
    found: &mut Beginning,
) -> Result<()> {
    cache.read_disk(session, tokens, found)?;
    cache.adopt(session, sequence, found)?;
    ensure(session, cache, sequence, tokens.len())
}

fn ensure(session: &mut Session, cache: &mut PrefixCache, sequence: SequenceId, tokens: usize) -> Result<()> {
    let more = pages_for(tokens).saturating_sub(session.pages_of(sequence)?.len());
    cache.free(session, more);
    session.ensure(sequence, tokens)
}

impl Pool for PagePool<'_> {
    fn total(&self) -> usize {
        pages_for(self.session.max_context())
    }

    fn available(&self) -> usize {
        self.cache.available(self.session)
    }

    fn admit(&mut self, id: u64, tokens: usize, spare: usize) -> Option<usize> {
        if self.error.is_some() {
            return None;
        }
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
                self.error = Some((id, error));
                None
            }
        }
    }

    fn grow(&mut self, id: u64, tokens: usize) -> bool {
        let Some(sequence) = self.live.get(&id).and_then(|live| live.sequence) else { return false };
        // Rows of draft modules stand a little further than those of the model.
        let behind = 2 * self.session.draft_modules() as usize;
        let most = self.session.model().plan().model.max_context as usize;
        [tokens + behind, tokens].into_iter().any(|tokens| {
            match ensure(self.session, self.cache, sequence, tokens.min(most)) {
                Ok(()) => true,
                Err(Error::OutOfPages { .. }) => false,
                Err(error) => {
                    self.error.get_or_insert((id, error));
                    false
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
            self.error.get_or_insert((id, error));
        }
        live.preemptions += 1;
        let _ = self.session.remove_sequence(sequence); // it was there a moment ago
    }
}
