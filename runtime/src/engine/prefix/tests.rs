//! The tree against a list of prefixes that is searched from end to end.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// A page by all tokens up to its last one.
#[derive(Clone, Debug)]
struct Known {
    prefix: Vec<u32>,
    page: Page,
    drafted: bool,
    /// Number of the operation, then the deeper the earlier.
    used: (u64, i64),
}

impl Known {
    fn start(&self) -> usize {
        (self.prefix.len() - 1) / FULL * FULL
    }
}

#[derive(Default)]
struct Naive {
    known: Vec<Known>,
    operations: u64,
}

impl Naive {
    /// Most tokens that any page shares with the beginning of `tokens`, its ancestors' included.
    fn longest(&self, tokens: &[u32]) -> usize {
        let common = |known: &Known| known.prefix.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        self.known.iter().map(common).max().unwrap_or(0)
    }

    /// Marks the pages that a lookup passed, and checks that each holds what the hit says.
    fn check_hit(&mut self, tokens: &[u32], hit: &Hit) {
        self.operations += 1;
        assert_eq!(hit.tokens, self.longest(tokens));
        assert_eq!(hit.pages.len(), hit.tokens / FULL);
        assert_eq!(hit.partial.map_or(0, |(_, tokens)| tokens), hit.tokens % FULL);
        let pages = hit.pages.iter().copied().chain(hit.partial.map(|(page, _)| page));
        let mut drafted = true;
        for (index, page) in pages.enumerate() {
            let known = self.known.iter_mut().find(|known| known.page == page).expect("the page is known");
            let matched = hit.tokens.min((index + 1) * FULL);
            assert_eq!(known.start(), index * FULL);
            assert_eq!(known.prefix[..matched], tokens[..matched]);
            known.used = (self.operations, -(index as i64));
            drafted &= known.drafted;
        }
        assert_eq!(hit.drafted, drafted);
    }

    fn insert(&mut self, tokens: &[u32], pages: &[Page], drafted: bool) -> Inserted {
        self.operations += 1;
        let mut inserted = Inserted::default();
        for (index, &page) in pages.iter().enumerate() {
            let (start, used) = (index * FULL, (self.operations, -(index as i64)));
            let prefix = tokens[..tokens.len().min(start + FULL)].to_vec();
            let here = self.known.iter_mut().filter(|known| known.start() == start);
            // Several may go on from the new one; the first of them is the one that counts as used.
            let alike = here
                .filter(|known| known.prefix.starts_with(&prefix) || prefix.starts_with(&known.prefix))
                .min_by(|a, b| a.prefix.cmp(&b.prefix));
            let Some(known) = alike else {
                inserted.held.push(page);
                self.known.push(Known { prefix, page, drafted, used });
                continue;
            };
            known.used = used;
            let better = drafted && !known.drafted && prefix.len() == known.prefix.len();
            if better || prefix.len() > known.prefix.len() {
                if known.page != page {
                    inserted.released.push(known.page);
                    inserted.held.push(page);
                }
                *known = Known { prefix, page, drafted, used };
            }
        }
        inserted
    }

    fn evict(&mut self, count: usize, in_use: &dyn Fn(Page) -> bool) -> Vec<Page> {
        let mut released = Vec::new();
        while released.len() < count {
            let leaf = |known: &Known| {
                let above = |other: &Known| other.start() > known.start() && other.prefix.starts_with(&known.prefix);
                !self.known.iter().any(above)
            };
            let candidates = (0..self.known.len()).filter(|&i| leaf(&self.known[i]) && !in_use(self.known[i].page));
            let Some(oldest) = candidates.min_by_key(|&i| self.known[i].used) else { break };
            released.push(self.known.swap_remove(oldest).page);
        }
        released
    }
}

/// What must hold between operations.
fn check_structure(tree: &PrefixTree) {
    let mut leaves = BTreeSet::new();
    let mut reached = 0;
    let mut stack = vec![ROOT];
    while let Some(id) = stack.pop() {
        let node = tree.node(id);
        for &child in &node.children {
            let below = tree.node(child);
            assert_eq!(below.parent, id);
            assert!(id == ROOT || node.tokens.len() == FULL, "only full pages have children");
            assert!(id == ROOT || node.used > below.used, "parents are used later");
            reached += 1;
        }
        for pair in node.children.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|id| &tree.node(id).tokens);
            assert!(a < b && !b.starts_with(a), "siblings are sorted, and none begins another");
        }
        if node.children.is_empty() && id != ROOT {
            leaves.insert((node.used, id));
        }
        stack.extend(&node.children);
    }
    assert_eq!(reached, tree.len(), "every node in use hangs on the root");
    assert_eq!(tree.leaves.iter().map(|(&used, &id)| (used, id)).collect::<BTreeSet<_>>(), leaves);
}

#[derive(Clone, Debug)]
enum Operation {
    Lookup(Vec<u32>),
    /// Whether the pages that are there already are used again, as by a request that found them; else all are new, as
    /// after two equal requests at once.
    Insert {
        tokens: Vec<u32>,
        drafted: bool,
        reuse: bool,
    },
    Evict {
        count: usize,
        /// Pages divisible by it are in use.
        in_use: Page,
    },
}

/// Texts that share beginnings of every kind: each page is one of few, up to a place from which it differs.
fn text() -> impl Strategy<Value = Vec<u32>> {
    let page = (0..2_u32, prop_oneof![Just(FULL), 0..FULL], 0..3_u32);
    (prop::collection::vec(page, 1..5), 1..=FULL).prop_map(|(pages, last)| {
        let mut tokens = Vec::new();
        for (kind, differs, how) in pages {
            tokens.extend((0..FULL).map(|i| if i < differs { kind } else { 10 + how }));
        }
        tokens.truncate(tokens.len() - FULL + last);
        tokens
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        3 => text().prop_map(Operation::Lookup),
        4 => (text(), any::<bool>(), any::<bool>())
            .prop_map(|(tokens, drafted, reuse)| Operation::Insert { tokens, drafted, reuse }),
        2 => (0..6_usize, 1..5_u32).prop_map(|(count, in_use)| Operation::Evict { count, in_use }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn agrees_with_a_list_of_prefixes(operations in prop::collection::vec(operation(), 1..60)) {
        let mut tree = PrefixTree::new();
        let mut naive = Naive::default();
        // What the owner of the pages has counted: references that the tree took and did not give up.
        let mut held = BTreeSet::new();
        let mut next_page = 0;
        for operation in operations {
            match operation {
                Operation::Lookup(tokens) => naive.check_hit(&tokens, &tree.lookup(&tokens)),
                Operation::Insert { tokens, drafted, reuse } => {
                    let mut pages = Vec::new();
                    if reuse {
                        let hit = tree.lookup(&tokens);
                        naive.check_hit(&tokens, &hit);
                        pages = hit.pages;
                    }
                    pages.resize_with(tokens.len().div_ceil(FULL), || {
                        next_page += 1;
                        next_page
                    });
                    let inserted = tree.insert(&tokens, &pages, drafted);
                    prop_assert_eq!(&inserted, &naive.insert(&tokens, &pages, drafted));
                    for page in inserted.released {
                        prop_assert!(held.remove(&page), "{} was released but not held", page);
                    }
                    for page in inserted.held {
                        prop_assert!(held.insert(page), "{} is held twice", page);
                    }
                    prop_assert_eq!(tree.lookup(&tokens).tokens, tokens.len());
                    naive.check_hit(&tokens, &tree.lookup(&tokens));
                }
                Operation::Evict { count, in_use } => {
                    let in_use = |page: Page| page.is_multiple_of(in_use);
                    let possible = tree.evictable(&in_use);
                    let released = tree.evict(count, &in_use);
                    prop_assert_eq!(&released, &naive.evict(count, &in_use));
                    prop_assert_eq!(released.len(), count.min(possible));
                    for page in released {
                        prop_assert!(held.remove(&page), "{} was released but not held", page);
                    }
                }
            }
            check_structure(&tree);
            prop_assert_eq!(tree.len(), naive.known.len());
            prop_assert_eq!(tree.pages().collect::<BTreeSet<_>>(), held.clone());
        }
        let cleared = tree.clear();
        prop_assert_eq!(cleared.len(), held.len());
        prop_assert_eq!(cleared.into_iter().collect::<BTreeSet<_>>(), held);
        prop_assert!(tree.len() == 0 && tree.evict(1, &|_| false).is_empty());
    }
}

fn count(tokens: u32) -> Vec<u32> {
    (0..tokens).collect()
}

#[test]
fn a_shared_beginning_of_1000_tokens_is_found_to_the_token() {
    let mut tree = PrefixTree::new();
    let mut first = count(1000);
    first.extend([7; 300]);
    let pages: Vec<Page> = (100..121).collect();
    assert_eq!(tree.insert(&first, &pages, true), Inserted { held: pages.clone(), released: vec![] });
    let mut second = count(1000);
    second.extend([8; 20]);
    let hit = tree.lookup(&second);
    assert_eq!(hit, Hit { pages: (100..115).collect(), partial: Some((115, 40)), tokens: 1000, drafted: true });
}

#[test]
fn the_child_with_the_longest_common_beginning_is_copied() {
    let mut tree = PrefixTree::new();
    let with = |place: usize, token: u32| {
        let mut tokens = vec![50; FULL];
        tokens[place] = token;
        tokens
    };
    for (page, (place, token)) in [(10, 1), (10, 99), (30, 1), (29, 99), (0, 49), (0, 51)].into_iter().enumerate() {
        tree.insert(&with(place, token), &[page as Page], false);
    }
    assert_eq!(tree.lookup(&with(40, 0)).partial, Some((2, 30)));
    assert_eq!(tree.lookup(&with(40, 99)).partial, Some((2, 30)));
    assert_eq!(tree.lookup(&with(30, 1)).pages, [2]);
    assert_eq!(tree.lookup(&with(10, 1)[..40]).partial, Some((0, 40)));
    assert_eq!(tree.lookup(&[1, 2, 3]), Hit { pages: vec![], partial: None, tokens: 0, drafted: true });
    assert_eq!(tree.lookup(&[]).tokens, 0);
}

#[test]
fn a_partial_page_grows() {
    let mut tree = PrefixTree::new();
    let tokens = count(200);
    assert_eq!(tree.insert(&tokens[..70], &[1, 2], false).held, [1, 2]);
    // The same page with more tokens, another page with more, another with fewer, a full one.
    assert_eq!(tree.insert(&tokens[..90], &[1, 2], false), Inserted::default());
    assert_eq!(tree.lookup(&tokens).partial, Some((2, 26)));
    assert_eq!(tree.insert(&tokens[..100], &[9, 3], false), Inserted { held: vec![3], released: vec![2] });
    assert_eq!(tree.insert(&tokens[..80], &[1, 4], false), Inserted::default());
    assert_eq!(tree.insert(&tokens[..140], &[1, 5, 6], false), Inserted { held: vec![5, 6], released: vec![3] });
    assert_eq!(tree.lookup(&tokens).pages, [1, 5]);
    assert_eq!(tree.len(), 3);
}

#[test]
fn pages_with_drafts_replace_those_without() {
    let mut tree = PrefixTree::new();
    let tokens = count(130);
    tree.insert(&tokens, &[1, 2, 3], false);
    assert!(!tree.lookup(&tokens).drafted);
    let replaced = tree.insert(&tokens[..128], &[11, 12], true);
    assert_eq!(replaced, Inserted { held: vec![11, 12], released: vec![1, 2] });
    assert!(tree.lookup(&tokens[..128]).drafted && !tree.lookup(&tokens).drafted);
    assert_eq!(tree.insert(&tokens, &[11, 12, 13], true), Inserted { held: vec![13], released: vec![3] });
    assert_eq!(tree.insert(&tokens, &[21, 22, 23], false), Inserted::default());
    assert_eq!(tree.insert(&tokens, &[21, 22, 23], true), Inserted::default());
    assert_eq!(tree.lookup(&tokens), Hit { pages: vec![11, 12], partial: Some((13, 2)), tokens: 130, drafted: true });
}

#[test]
fn the_longest_context_neither_overflows_nor_takes_long() {
    let mut tree = PrefixTree::new();
    let tokens = count(163_840);
    let pages: Vec<Page> = (0..2560).collect();
    for _ in 0..20 {
        tree.insert(&tokens, &pages, false);
        assert_eq!(tree.lookup(&tokens).pages, pages);
    }
    // In use from the middle: what is behind can go, from the end on.
    let middle = |page: Page| page == 1280;
    assert_eq!(tree.evictable(&middle), 1279);
    assert_eq!(tree.evict(3, &middle), [2559, 2558, 2557]);
    assert_eq!(tree.evict(usize::MAX, &middle).len(), 1276);
    assert_eq!(tree.evict(usize::MAX, &|_| false).len(), 1281);
    assert_eq!(tree.len(), 0);
    // Many texts that differ in the first token.
    for page in 0..20_000_u32 {
        tree.insert(&[page.wrapping_mul(0x9e37_79b9), page], &[page], false);
    }
    assert_eq!(tree.evict(20_000, &|page| page < 10_000), (10_000..20_000).collect::<Vec<_>>());
}
