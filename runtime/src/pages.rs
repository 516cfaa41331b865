//! Which pages of the latent cache are free, and how many use each of the others.

use moewe_plan::PAGE_TOKENS;

use crate::{Error, Result};

/// A page of the latent cache: the latents of 64 positions in all layers.
pub type Page = u32;

/// Pages that `tokens` tokens fill.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS as usize)
}

/// The pages of a cache. A page may have several users: sequences with a common beginning, and whoever keeps pages for
/// later ones. Users share what is written already; the page that a sequence writes to has no other.
#[derive(Debug)]
pub(crate) struct Pages {
    /// Taken from the end, so low pages first.
    free: Vec<Page>,
    /// Users of each page.
    users: Vec<u32>,
}

impl Pages {
    pub(crate) fn new(total: u32) -> Self {
        Self { free: (0..total).rev().collect(), users: vec![0; total as usize] }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn total(&self) -> usize {
        self.users.len()
    }

    /// Users of a page; 0 if it is free or does not exist.
    pub(crate) fn users(&self, page: Page) -> u32 {
        self.users.get(page as usize).copied().unwrap_or(0)
    }

    /// Lengthens each list to its wanted length, or changes nothing if there are too few pages. Says which
    /// lists grew.
    pub(crate) fn ensure<'a>(&mut self, lists: impl Iterator<Item = (&'a mut Vec<Page>, usize)>) -> Result<Vec<bool>> {
        let lists: Vec<_> = lists.collect();
        let needed = lists.iter().map(|(list, wanted)| wanted.saturating_sub(list.len())).sum();
        if needed > self.free.len() {
            return Err(Error::OutOfPages { needed, free: self.free.len(), total: self.total() });
        }
        let grow = |(list, wanted): (&mut Vec<Page>, usize)| {
            let more = wanted.saturating_sub(list.len());
            for page in self.free.drain(self.free.len() - more..).rev() {
                self.users[page as usize] = 1;
                list.push(page);
            }
            more > 0
        };
        Ok(lists.into_iter().map(grow).collect())
    }

    /// Adds a user to a page that has one.
    pub(crate) fn share(&mut self, page: Page) -> Result<()> {
        match self.users.get_mut(page as usize).filter(|users| **users > 0) {
            Some(users) => {
                *users += 1;
                Ok(())
            }
            None => Err(Error::FreePage { page, total: self.total() }),
        }
    }

    /// Takes a user from each page; those that nobody uses any more are free.
    pub(crate) fn give_back(&mut self, pages: impl IntoIterator<Item = Page, IntoIter: DoubleEndedIterator>) {
        for page in pages.into_iter().rev() {
            let users = self.users.get_mut(page as usize).filter(|users| **users > 0);
            debug_assert!(users.is_some(), "page {page} is given back, but nobody uses it");
            let Some(users) = users else { continue };
            *users -= 1;
            if *users == 0 {
                self.free.push(page);
            }
        }
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
    fn a_shared_page_is_free_when_its_last_user_has_gone() {
        let mut pages = Pages::new(2);
        let mut a = Vec::new();
        pages.ensure([(&mut a, 1)].into_iter()).unwrap();
        pages.share(a[0]).unwrap();
        assert_eq!((pages.users(a[0]), pages.free()), (2, 1));
        pages.give_back(a.clone());
        assert_eq!((pages.users(a[0]), pages.free()), (1, 1));
        pages.give_back(a);
        assert_eq!(pages.free(), 2);
        for page in [0, 1, 2] {
            assert!(matches!(pages.share(page), Err(Error::FreePage { total: 2, .. })));
        }
    }

    #[test]
    fn a_page_is_counted_when_its_first_token_comes() {
        assert_eq!([0, 1, 64, 65, 128].map(pages_for), [0, 1, 1, 2, 2]);
    }
}
