//! A radix tree that knows which pages of the latent cache hold the latents of which tokens.
//!
//! Latents of a position depend on the tokens up to it and on nothing else, so requests that begin alike share them. A
//! node is a page: up to [`PAGE_TOKENS`] token ids and the number of the page that holds their latents, behind the pages
//! of its ancestors. Only full pages have children. Among siblings no node's tokens begin another's: the longer page
//! serves for both. Siblings are sorted by their tokens, so that the one that has most in common with some tokens stands
//! beside their place. Token ids themselves are compared, never hashes of them.
//!
//! The tree holds a reference of each of its pages, but does not count: the owner of the pages does, and learns from the
//! results which references the tree took and gave up.

use std::collections::BTreeMap;

use moewe_plan::PAGE_TOKENS;

#[cfg(test)]
mod tests;

/// Tokens of a full page.
const FULL: usize = PAGE_TOKENS as usize;

/// Number of a page of the latent cache.
pub type Page = u32;

/// What the tree has for some tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Full pages, in order.
    pub pages: Vec<Page>,
    /// The page whose beginning goes on behind them, and how many of its tokens match: 1 to [`PAGE_TOKENS`] − 1.
    pub partial: Option<(Page, usize)>,
    /// Tokens that match, those of the partial page included.
    pub tokens: usize,
    /// Whether each of these pages has the draft modules' latents too. True where there is no page.
    pub drafted: bool,
}

/// References that changed hands in an insertion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inserted {
    /// Pages that the tree holds a reference of from now on.
    pub held: Vec<Page>,
    /// Pages that it held and gave up for better ones.
    pub released: Vec<Page>,
}

/// Place of a node in the arena. Links are numbers, so that nothing recurses, however long a text is.
type NodeId = u32;

/// Above the first pages of all texts. Has no tokens and no page.
const ROOT: NodeId = 0;

#[derive(Debug)]
struct Node {
    /// 1 to [`PAGE_TOKENS`] ids; none for the root and for nodes not in use.
    tokens: Box<[u32]>,
    page: Page,
    drafted: bool,
    /// When it was used last. No two nodes have the same time, and a parent's is later than its children's.
    used: u64,
    parent: NodeId,
    /// Sorted by their tokens.
    children: Vec<NodeId>,
}

impl Node {
    fn new(tokens: &[u32], page: Page, drafted: bool, parent: NodeId) -> Self {
        Self { tokens: tokens.into(), page, drafted, used: 0, parent, children: Vec::new() }
    }
}

/// The tree.
#[derive(Debug)]
pub struct PrefixTree {
    nodes: Vec<Node>,
    /// Nodes not in use.
    free: Vec<NodeId>,
    /// Nodes without children by the time of their last use.
    leaves: BTreeMap<u64, NodeId>,
    /// Counts uses of nodes. Zero is before all of them.
    clock: u64,
}

impl Default for PrefixTree {
    fn default() -> Self {
        let root = Node::new(&[], Page::MAX, false, ROOT);
        Self { nodes: vec![root], free: Vec::new(), leaves: BTreeMap::new(), clock: 0 }
    }
}

impl PrefixTree {
    /// A tree without pages.
    pub fn new() -> Self {
        Self::default()
    }

    /// The longest beginning of `tokens` whose latents are in pages. What it passes counts as used now.
    ///
    /// It may be all of `tokens`. Who needs the logits of the last token leaves that one out of the question.
    pub fn lookup(&mut self, tokens: &[u32]) -> Hit {
        let mut hit = Hit { pages: Vec::new(), partial: None, tokens: 0, drafted: true };
        let mut path = Vec::new();
        let mut parent = ROOT;
        for chunk in tokens.chunks(FULL) {
            let Some((id, common)) = self.closest(parent, chunk) else { break };
            path.push(id);
            let node = self.node(id);
            hit.tokens += common;
            hit.drafted &= node.drafted;
            if common < FULL {
                hit.partial = Some((node.page, common));
                break;
            }
            hit.pages.push(node.page);
            parent = id;
        }
        self.touch(&path);
        hit
    }

    /// Takes in the pages that hold the latents of `tokens`, one for each [`PAGE_TOKENS`] of them, the last possibly
    /// partly filled. The latents of these tokens must not change as long as the tree holds the pages.
    ///
    /// What the tree has already stays, with two exceptions: a page with as many tokens and `drafted` (the draft
    /// modules' latents are there too) replaces one that is not, and a page with more tokens replaces one that begins
    /// like it. All pages on the way count as used now.
    pub fn insert(&mut self, tokens: &[u32], pages: &[Page], drafted: bool) -> Inserted {
        debug_assert_eq!(tokens.len().div_ceil(FULL), pages.len(), "one page for each {FULL} tokens");
        let mut inserted = Inserted::default();
        let mut path = Vec::with_capacity(pages.len());
        let mut parent = ROOT;
        for (chunk, &page) in tokens.chunks(FULL).zip(pages) {
            parent = self.place(parent, chunk, page, drafted, &mut inserted);
            path.push(parent);
        }
        self.touch(&path);
        inserted
    }

    /// Gives up to `count` pages up, those first that were not used for longest. Pages that are `in_use` stay, and so do
    /// pages before them in their texts. Returns the released pages, fewer than `count` if there are no more.
    pub fn evict(&mut self, count: usize, in_use: &dyn Fn(Page) -> bool) -> Vec<Page> {
        let mut released = Vec::new();
        let mut from = 0;
        while released.len() < count
            && let Some((&used, &id)) = self.leaves.range(from..).next()
        {
            // A parent that becomes a leaf was used later, so it is still to come.
            from = used + 1;
            if !in_use(self.node(id).page) {
                released.push(self.remove(id));
            }
        }
        released
    }

    /// How many pages [`Self::evict`] could release.
    pub fn evictable(&self, in_use: &dyn Fn(Page) -> bool) -> usize {
        let mut stays = vec![false; self.nodes.len()];
        stays[ROOT as usize] = true;
        let mut staying = 0;
        for (index, _) in self.live().filter(|(_, node)| in_use(node.page)) {
            let mut index = index;
            while !stays[index] {
                stays[index] = true;
                staying += 1;
                index = self.nodes[index].parent as usize;
            }
        }
        self.len() - staying
    }

    /// Pages held.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free.len() - 1
    }

    /// The pages held, in no particular order.
    pub fn pages(&self) -> impl Iterator<Item = Page> {
        self.live().map(|(_, node)| node.page)
    }

    /// Gives up everything. Returns the released pages.
    pub fn clear(&mut self) -> Vec<Page> {
        let pages = self.pages().collect();
        *self = Self::new();
        pages
    }

    /// Nodes in use but for the root, with their places.
    fn live(&self) -> impl Iterator<Item = (usize, &Node)> {
        self.nodes.iter().enumerate().filter(|(_, node)| !node.tokens.is_empty())
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// Where `chunk` is among the children of `parent`, or would be.
    fn position(&self, parent: NodeId, chunk: &[u32]) -> usize {
        self.node(parent).children.partition_point(|&id| *self.node(id).tokens < *chunk)
    }

    /// The child of `parent` that has most in common with the beginning of `chunk`, and how many tokens.
    fn closest(&self, parent: NodeId, chunk: &[u32]) -> Option<(NodeId, usize)> {
        let children = &self.node(parent).children;
        let position = self.position(parent, chunk);
        let beside = &children[position.saturating_sub(1)..children.len().min(position + 1)];
        let common = |id| self.node(id).tokens.iter().zip(chunk).take_while(|(a, b)| a == b).count();
        beside.iter().map(|&id| (id, common(id))).filter(|&(_, common)| common > 0).max_by_key(|&(_, common)| common)
    }

    /// Finds or makes the child of `parent` for `chunk`.
    fn place(&mut self, parent: NodeId, chunk: &[u32], page: Page, drafted: bool, inserted: &mut Inserted) -> NodeId {
        let position = self.position(parent, chunk);
        let children = &self.node(parent).children;
        // What begins like the chunk and goes on comes right behind it; what the chunk goes on from, right before it.
        let next = children.get(position).copied();
        let previous = position.checked_sub(1).map(|before| children[before]);
        if let Some(id) = next.filter(|&id| self.node(id).tokens.starts_with(chunk)) {
            let node = self.node_mut(id);
            if node.tokens.len() == chunk.len() && drafted && !node.drafted {
                node.drafted = true;
                node.exchange(page, inserted);
            }
            return id;
        }
        if let Some(id) = previous.filter(|&id| chunk.starts_with(&self.node(id).tokens)) {
            let node = self.node_mut(id);
            node.tokens = chunk.into();
            node.drafted = drafted;
            node.exchange(page, inserted);
            return id;
        }
        let node = Node::new(chunk, page, drafted, parent);
        let id = if let Some(id) = self.free.pop() {
            *self.node_mut(id) = node;
            id
        } else {
            self.nodes.push(node);
            (self.nodes.len() - 1) as NodeId
        };
        self.node_mut(parent).children.insert(position, id);
        inserted.held.push(page);
        id
    }

    /// Takes a leaf out. Returns its page.
    fn remove(&mut self, id: NodeId) -> Page {
        let node = self.node_mut(id);
        let (tokens, page, used, parent) = (std::mem::take(&mut node.tokens), node.page, node.used, node.parent);
        self.free.push(id);
        self.leaves.remove(&used);
        let children = &self.node(parent).children;
        let position = children.partition_point(|&child| child != id && *self.node(child).tokens < *tokens);
        let parent_node = self.node_mut(parent);
        parent_node.children.remove(position);
        if parent_node.children.is_empty() && parent != ROOT {
            let used = parent_node.used;
            self.leaves.insert(used, parent);
        }
        page
    }

    /// Says that the nodes of a path, given from the root on, are used now. The deeper ones count as used before those
    /// above them.
    fn touch(&mut self, path: &[NodeId]) {
        self.clock += path.len() as u64;
        for (depth, &id) in path.iter().enumerate() {
            let used = self.clock - depth as u64;
            let node = self.node_mut(id);
            let before = std::mem::replace(&mut node.used, used);
            let leaf = node.children.is_empty();
            self.leaves.remove(&before);
            if leaf {
                self.leaves.insert(used, id);
            }
        }
    }
}

impl Node {
    /// Puts another page in the place of its own, unless it is the same.
    fn exchange(&mut self, page: Page, inserted: &mut Inserted) {
        if self.page != page {
            inserted.released.push(std::mem::replace(&mut self.page, page));
            inserted.held.push(page);
        }
    }
}
