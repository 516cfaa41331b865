//! The prefix cache of an engine: which pages of its session serve later requests, in the device's memory and on disk.

use std::collections::{HashMap, VecDeque};

use moewe_plan::PAGE_TOKENS;

use super::disk::{Chain, Disk};
use super::prefix::PrefixTree;
use crate::pages::{Page, pages_for};
use crate::{Result, SequenceId, Session};

const FULL: usize = PAGE_TOKENS as usize;

/// The prefix cache.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    /// `None` if nothing is to be kept.
    tree: Option<PrefixTree>,
    disk: Option<Disk>,
    /// Full pages that are still to be written to disk; each is held.
    to_write: VecDeque<Unwritten>,
}

#[derive(Debug)]
struct Unwritten {
    /// The pages before it.
    before: Chain,
    tokens: [u32; FULL],
    drafted: bool,
    page: Page,
}

/// What a request's beginning was found in.
#[derive(Debug, Default)]
pub(super) struct Beginning {
    pages: Vec<Page>,
    partial: Option<(Page, usize)>,
    drafted: bool,
    pub(super) tokens: usize,
}

impl Beginning {
    /// Pages that are shared, not copied.
    pub(super) fn full_pages(&self) -> usize {
        self.pages.len()
    }
}

impl PrefixCache {
    pub(super) fn new(keep: bool, disk: Option<Disk>) -> Self {
        Self { tree: keep.then(PrefixTree::new), disk, to_write: VecDeque::new() }
    }

    pub(super) fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// Pages that it holds.
    pub(super) fn pages(&self) -> usize {
        self.tree.as_ref().map_or(0, PrefixTree::len)
    }

    /// Pages that are free, or would be if everything that no sequence uses were written and forgotten.
    pub(super) fn available(&self, session: &Session) -> usize {
        let queued = self.queued();
        let evictable = self.tree.as_ref().map_or(0, |tree| tree.evictable(&in_use(session, &queued)));
        // The tree has exchanged or lost some that still wait to be written.
        let only_queued = queued.iter().filter(|&(&page, &holds)| session.page_users(page) == holds).count();
        session.pages().1 + evictable + only_queued
    }

    /// Frees pages until there are so many, if it can, the least recently used first.
    pub(super) fn free(&mut self, session: &mut Session, pages: usize) -> bool {
        let missing = pages.saturating_sub(session.pages().1);
        let queued = if missing > 0 { self.queued() } else { HashMap::new() };
        if let Some(tree) = self.tree.as_mut().filter(|_| missing > 0) {
            let evicted = tree.evict(missing, &in_use(session, &queued));
            session.release(&evicted);
        }
        while session.pages().1 < pages && self.has_writes() {
            // A page that cannot be read is lost to the disk, nothing else; a lost device shows in the next pass.
            let _ = self.write_one(session);
        }
        session.pages().1 >= pages
    }

    /// How often each page waits to be written, and is held for it.
    fn queued(&self) -> HashMap<Page, u32> {
        let mut queued = HashMap::new();
        for unwritten in &self.to_write {
            *queued.entry(unwritten.page).or_default() += 1;
        }
        queued
    }

    /// What is there of a text, as far as it is in the device's memory. What is found stays until [`Self::end`].
    pub(super) fn begin(&mut self, session: &mut Session, tokens: &[u32]) -> Result<Beginning> {
        let Some(tree) = &mut self.tree else { return Ok(Beginning::default()) };
        // The last token is run in any case: only a run draws what follows.
        let hit = tree.lookup(&tokens[..tokens.len().saturating_sub(1)]);
        for &page in hit.pages.iter().chain(hit.partial.iter().map(|(page, _)| page)) {
            session.hold(page)?;
        }
        Ok(Beginning { pages: hit.pages, partial: hit.partial, drafted: hit.drafted, tokens: hit.tokens })
    }

    /// Adds to what was found the pages that the disk has behind it.
    pub(super) fn read_disk(&mut self, session: &mut Session, tokens: &[u32], found: &mut Beginning) -> Result<()> {
        let (Some(disk), true) = (&self.disk, self.tree.is_some()) else { return Ok(()) };
        let usable = &tokens[..tokens.len().saturating_sub(1)];
        let full = |index: usize| usable.get(index * FULL..(index + 1) * FULL)?.first_chunk::<FULL>();
        let mut chain = Chain::default();
        for index in 0..found.pages.len() {
            let Some(page) = full(index) else { return Ok(()) };
            chain = disk.next(&chain, page);
        }
        while let Some(tokens) = full(found.pages.len()) {
            let Some(disk) = &self.disk else { break };
            let Some(stored) = disk.get(&chain, tokens) else { break };
            chain = disk.next(&chain, tokens);
            if !self.free(session, 1) {
                break;
            }
            let page = session.load_page(&stored.bytes)?;
            if let Some((partial, _)) = found.partial.take() {
                session.release(&[partial]);
            }
            found.drafted &= stored.drafted;
            found.pages.push(page);
            let all = &usable[..found.pages.len() * FULL];
            found.tokens = all.len();
            self.insert(session, all, &found.pages.clone(), found.drafted)?;
        }
        Ok(())
    }

    /// Lets a sequence begin with what was found.
    pub(super) fn adopt(&mut self, session: &mut Session, sequence: SequenceId, found: &mut Beginning) -> Result<()> {
        if found.partial.is_some() && !self.free(session, 1) {
            // No page to copy it to.
            Self::end_partial(session, found);
        }
        if found.tokens > 0 { session.adopt(sequence, &found.pages, found.partial, found.drafted) } else { Ok(()) }
    }

    /// Lets go of what was found.
    pub(super) fn end(session: &mut Session, found: &Beginning) {
        session.release(&found.pages);
        session.release(found.partial.map(|(page, _)| page).as_slice());
    }

    /// Lets go of the page that would be copied, and says whether there was one.
    pub(super) fn end_partial(session: &mut Session, found: &mut Beginning) -> bool {
        let Some((page, tokens)) = found.partial.take() else { return false };
        session.release(&[page]);
        found.tokens -= tokens;
        true
    }

    /// Keeps what a sequence has computed of `tokens`, which are its first ones. Its full pages only, as long as it may
    /// still write to the last one.
    pub(super) fn keep(
        &mut self,
        session: &mut Session,
        sequence: SequenceId,
        tokens: &[u32],
        ends: bool,
    ) -> Result<()> {
        if self.tree.is_none() {
            return Ok(());
        }
        let computed = tokens.len().min(session.cached(sequence)?);
        let count = if ends { computed } else { computed / FULL * FULL };
        let pages = session.pages_of(sequence)?[..pages_for(count)].to_vec();
        let drafted = session.is_drafted(sequence)?;
        let held = self.insert(session, &tokens[..count], &pages, drafted)?;
        let Some(disk) = &self.disk else { return Ok(()) };
        let mut before = Chain::default();
        for (chunk, &page) in tokens[..count].chunks(FULL).zip(&pages) {
            let Some(tokens) = chunk.first_chunk::<FULL>() else { break };
            if held.contains(&page) && !disk.contains(&before, tokens, drafted) {
                session.hold(page)?;
                self.to_write.push_back(Unwritten { before: before.clone(), tokens: *tokens, drafted, page });
            }
            before = disk.next(&before, tokens);
        }
        Ok(())
    }

    fn insert(&mut self, session: &mut Session, tokens: &[u32], pages: &[Page], drafted: bool) -> Result<Vec<Page>> {
        let Some(tree) = &mut self.tree else { return Ok(Vec::new()) };
        let changed = tree.insert(tokens, pages, drafted);
        for &page in &changed.held {
            session.hold(page)?;
        }
        session.release(&changed.released);
        Ok(changed.held)
    }

    /// Whether pages wait to be written.
    pub(super) fn has_writes(&self) -> bool {
        !self.to_write.is_empty()
    }

    /// Hands a page to the disk, if one waits.
    pub(super) fn write_one(&mut self, session: &mut Session) -> Result<()> {
        let (Some(disk), Some(next)) = (&self.disk, self.to_write.pop_front()) else { return Ok(()) };
        let bytes = session.read_page(next.page);
        session.release(&[next.page]);
        disk.put(&next.before, &next.tokens, next.drafted, bytes?);
        Ok(())
    }

    /// Forgets everything in the device's memory.
    pub(super) fn clear(&mut self, session: &mut Session) {
        for unwritten in self.to_write.drain(..) {
            session.release(&[unwritten.page]);
        }
        if let Some(tree) = &mut self.tree {
            let pages = tree.clear();
            session.release(&pages);
        }
    }
}

/// Whether a page of the tree is used by more than the tree and those who write it.
fn in_use(session: &Session, queued: &HashMap<Page, u32>) -> impl Fn(Page) -> bool {
    move |page| session.page_users(page) > 1 + queued.get(&page).copied().unwrap_or(0)
}
