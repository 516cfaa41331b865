//! Which pages of the latent cache are free.

use moewe_plan::PAGE_TOKENS;

use crate::{Error, Result};

/// Pages that `tokens` tokens fill.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS as usize)
}

/// The free pages of a cache.
#[derive(Debug)]
pub(crate) struct Pages {
    /// Taken from the end, so low pages first.
    free: Vec<u32>,
    total: usize,
}

impl Pages {
    pub(crate) fn new(total: u32) -> Self {
        Self { free: (0..total).rev().collect(), total: total as usize }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Lengthens each list to its wanted length, or changes nothing if there are too few pages. Says which
    /// lists grew.
    pub(crate) fn ensure<'a>(&mut self, lists: impl Iterator<Item = (&'a mut Vec<u32>, usize)>) -> Result<Vec<bool>> {
        let lists: Vec<_> = lists.collect();
        let needed = lists.iter().map(|(list, wanted)| wanted.saturating_sub(list.len())).sum();
        if needed > self.free.len() {
            return Err(Error::OutOfPages { needed, free: self.free.len(), total: self.total });
        }
        let grow = |(list, wanted): (&mut Vec<u32>, usize)| {
            let more = wanted.saturating_sub(list.len());
            list.extend(self.free.drain(self.free.len() - more..).rev());
            more > 0
        };
        Ok(lists.into_iter().map(grow).collect())
    }

    pub(crate) fn give_back(&mut self, pages: Vec<u32>) {
        self.free.extend(pages.into_iter().rev());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_together_or_not_at_all() {
        let mut pages = Pages::new(5);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert_eq!(pages.ensure([(&mut a, 2), (&mut b, 1)].into_iter()).unwrap(), [true, true]);
        assert_eq!((&a[..], &b[..]), (&[0, 1][..], &[2][..]));
        let error = pages.ensure([(&mut a, 3), (&mut b, 3)].into_iter()).unwrap_err();
        assert!(matches!(error, Error::OutOfPages { needed: 3, free: 2, total: 5 }), "{error}");
        assert_eq!((a.len(), b.len(), pages.free()), (2, 1, 2));
        assert_eq!(pages.ensure([(&mut a, 1), (&mut b, 2)].into_iter()).unwrap(), [false, true]);
        pages.give_back(a);
        assert_eq!(pages.free(), 3);
        let mut c = Vec::new();
        pages.ensure([(&mut c, 3)].into_iter()).unwrap();
        c.extend(b);
        c.sort_unstable();
        assert_eq!(c, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_page_is_counted_when_its_first_token_comes() {
        assert_eq!([0, 1, 64, 65, 128].map(pages_for), [0, 1, 1, 2, 2]);
    }
}
