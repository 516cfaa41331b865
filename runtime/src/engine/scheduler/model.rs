//! A cache of numbered pages with shared beginnings, for tests: it knows of each page where it is.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Pool;
use crate::pages::pages_for;

const PAGE: usize = moewe_plan::PAGE_TOKENS as usize;

/// The beginning of a request's text: requests of one family share as much as the shorter of both.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Text {
    pub family: u64,
    pub shared: usize,
}

#[derive(Debug)]
pub(super) struct Model {
    total: u32,
    slots: usize,
    free: Vec<u32>,
    pub texts: HashMap<u64, Text>,
    /// Pages of the admitted requests.
    pub pages: HashMap<u64, Vec<u32>>,
    /// How many tokens were cached of requests that were admitted since someone looked.
    pub hits: HashMap<u64, usize>,
    /// Cached pages by family and block, with the number of requests that use them.
    cache: BTreeMap<(u64, usize), (u32, usize)>,
}

impl Model {
    pub fn new(total: u32, slots: usize) -> Self {
        Self {
            total,
            slots,
            free: (0..total).collect(),
            texts: HashMap::new(),
            pages: HashMap::new(),
            hits: HashMap::new(),
            cache: BTreeMap::new(),
        }
    }

    fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            let (&key, &(page, _)) = self.cache.iter().rfind(|(_, (_, users))| *users == 0).expect("an unused page");
            self.cache.remove(&key);
            page
        })
    }

    /// Panics unless each page is at exactly one place and used as often as counted.
    pub fn check(&self) {
        let mut seen: HashSet<u32> = self.free.iter().copied().collect();
        assert_eq!(seen.len(), self.free.len());
        let cached: HashMap<u32, usize> = self.cache.values().copied().collect();
        assert_eq!(cached.len(), self.cache.len());
        let mut users: HashMap<u32, usize> = HashMap::new();
        for &page in cached.keys() {
            assert!(seen.insert(page), "page {page} is free and cached");
        }
        for (id, pages) in &self.pages {
            for page in pages {
                if cached.contains_key(page) {
                    *users.entry(*page).or_default() += 1;
                } else {
                    assert!(seen.insert(*page), "page {page} of request {id} is somewhere else, too");
                }
            }
        }
        assert_eq!(seen.len(), self.total as usize, "pages were lost");
        for (page, count) in cached {
            assert_eq!(users.get(&page).copied().unwrap_or(0), count);
        }
        assert!(self.pages.len() <= self.slots);
    }
}

impl Pool for Model {
    fn total(&self) -> usize {
        self.total as usize
    }

    fn available(&self) -> usize {
        self.free.len() + self.cache.values().filter(|(_, users)| *users == 0).count()
    }

    fn admit(&mut self, id: u64, tokens: usize, spare: usize) -> Option<usize> {
        assert!(!self.pages.contains_key(&id), "{id} is admitted already");
        let text = self.texts.get(&id).copied().unwrap_or_default();
        let blocks = text.shared.min(tokens - 1) / PAGE;
        let hits = (0..blocks).take_while(|block| self.cache.contains_key(&(text.family, *block))).count();
        let pinned = (0..hits).filter(|block| self.cache[&(text.family, *block)].1 == 0).count();
        let new = pages_for(tokens) - hits;
        if self.pages.len() >= self.slots || self.available() < pinned + new + spare {
            return None;
        }
        let mut pages = Vec::new();
        for block in 0..hits {
            let (page, users) = self.cache.get_mut(&(text.family, block)).unwrap();
            *users += 1;
            pages.push(*page);
        }
        pages.extend((0..new).map(|_| self.take()));
        self.pages.insert(id, pages);
        self.hits.insert(id, hits * PAGE);
        Some(hits * PAGE)
    }

    fn grow(&mut self, id: u64, tokens: usize) -> bool {
        let more = pages_for(tokens).saturating_sub(self.pages[&id].len());
        if more > self.available() {
            return false;
        }
        for _ in 0..more {
            let page = self.take();
            self.pages.get_mut(&id).unwrap().push(page);
        }
        true
    }

    fn release(&mut self, id: u64) {
        let text = self.texts.get(&id).copied().unwrap_or_default();
        for (block, page) in
            self.pages.remove(&id).expect("only admitted requests are released").into_iter().enumerate()
        {
            match self.cache.get_mut(&(text.family, block)) {
                Some((cached, users)) if *cached == page => *users -= 1,
                None if (block + 1) * PAGE <= text.shared => _ = self.cache.insert((text.family, block), (page, 0)),
                _ => self.free.push(page),
            }
        }
    }
}
