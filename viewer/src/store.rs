//! What has been seen so far: texts, their tokens, and what the taps showed at each token. One writer (the source), many
//! readers (the views). Memory is bounded: the bulkiest and oldest rows go first, running totals stay.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use moewe_plan::{Edit, FrameTensor, Numbers, RunTimes, TapFrame, TapGroup};
use serde::{Deserialize, Serialize};

/// Rows in a block: what is kept and dropped together.
pub const BLOCK_ROWS: usize = 64;
/// Runs whose times are kept.
const MAX_RUNS: usize = 4096;

/// A text that the model reads and writes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SequenceInfo {
    /// Number in [`moewe_plan::FrameToken::sequence`].
    pub number: u32,
    /// What people call it: a prompt's name, or its beginning.
    pub name: String,
    /// Tokens of the prompt; those behind were generated.
    pub prompt_tokens: u32,
    /// What was changed about the model.
    pub edits: Vec<Edit>,
    /// The sequence that this one repeats with other edits, and the position from which on it may differ.
    pub parent: Option<(u32, u32)>,
}

/// A token of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Whether the model wrote it.
    pub generated: bool,
}

/// Which tensor: its group, layer and the last part of its name. `lens.3.probs` is `(Lens, Some(3), "probs")`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The tap's group.
    pub group: TapGroup,
    /// The tap's layer.
    pub layer: Option<u32>,
    /// What of it.
    pub part: Part,
}

/// Parts of tap names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// `moe.{l}.ids`, `logits.ids`, `lens.{l}.ids`, `mtp.{j}.ids`.
    Ids,
    /// `moe.{l}.weights`.
    Weights,
    /// `moe.{l}.router_logits`.
    RouterLogits,
    /// `mla.{l}.c_kv`.
    CKv,
    /// `mla.{l}.k_rope`.
    KRope,
    /// `mla.{l}.query`.
    Query,
    /// `hidden.{l+1}` as layer l; `hidden.0`, the embedding, without a layer.
    Hidden,
    /// `final_norm`.
    FinalNorm,
    /// `….probs`.
    Probs,
    /// `….stats`: entropy in nats, log probability, rank.
    Stats,
}

impl Key {
    /// The key of a tensor by its tap's name; `None` for names that no view shows.
    pub fn of(name: &str, group: TapGroup, layer: Option<u32>) -> Option<Self> {
        let part = match (group, name.rsplit('.').next()?) {
            (TapGroup::Hidden, "final_norm") => Part::FinalNorm,
            (TapGroup::Hidden, _) => Part::Hidden,
            (_, "ids") => Part::Ids,
            (_, "weights") => Part::Weights,
            (_, "router_logits") => Part::RouterLogits,
            (_, "c_kv") => Part::CKv,
            (_, "k_rope") => Part::KRope,
            (_, "query") => Part::Query,
            (_, "probs") => Part::Probs,
            (_, "stats") => Part::Stats,
            _ => return None,
        };
        Some(Self { group, layer, part })
    }

    /// A tensor of a layer.
    pub fn layer(group: TapGroup, layer: u32, part: Part) -> Self {
        Self { group, layer: Some(layer), part }
    }
}

/// A block of rows: `[BLOCK_ROWS, columns]` and which rows are there. Integers are kept as their own bits.
#[derive(Clone, Debug)]
pub struct Block {
    words: Vec<u32>,
    present: u64,
}

/// The rows of a tensor along a sequence. Cloning is cheap: blocks are shared until they change.
#[derive(Clone, Debug)]
pub struct Column {
    columns: usize,
    is_float: bool,
    blocks: Vec<Option<Arc<Block>>>,
    held: usize,
}

impl Column {
    /// Numbers in a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Whether its numbers are floats; else they are unsigned integers.
    pub fn is_float(&self) -> bool {
        self.is_float
    }

    fn bits(&self, position: usize) -> Option<&[u32]> {
        let block = self.blocks.get(position / BLOCK_ROWS)?.as_ref()?;
        let row = position % BLOCK_ROWS;
        (block.present >> row & 1 == 1).then(|| &block.words[row * self.columns..][..self.columns])
    }

    /// The row at a position, if it is held and floats.
    pub fn floats(&self, position: usize) -> Option<&[f32]> {
        if self.is_float { self.bits(position).map(bytemuck::cast_slice) } else { None }
    }

    /// The row at a position, if it is held and integers.
    pub fn ints(&self, position: usize) -> Option<&[u32]> {
        if self.is_float { None } else { self.bits(position) }
    }

    /// Whether the row at a position is held.
    pub fn has(&self, position: usize) -> bool {
        self.bits(position).is_some()
    }

    fn set(&mut self, position: usize, row: &[u32]) {
        let index = position / BLOCK_ROWS;
        if self.blocks.len() <= index {
            self.blocks.resize(index + 1, None);
        }
        let columns = self.columns;
        let block = self.blocks[index]
            .get_or_insert_with(|| Arc::new(Block { words: vec![0; BLOCK_ROWS * columns], present: 0 }));
        let block = Arc::make_mut(block);
        block.words[position % BLOCK_ROWS * columns..][..columns].copy_from_slice(row);
        block.present |= 1 << (position % BLOCK_ROWS);
    }

    fn block_bytes(&self) -> usize {
        BLOCK_ROWS * self.columns * 4
    }
}

/// A text and what was seen at each of its tokens.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// What it is.
    pub info: SequenceInfo,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Whether more may come.
    pub running: bool,
    columns: BTreeMap<Key, Column>,
}

impl Sequence {
    /// A tensor along this text, if any row of it ever came.
    pub fn column(&self, key: Key) -> Option<&Column> {
        self.columns.get(&key)
    }

    /// A row of floats.
    pub fn floats(&self, key: Key, position: usize) -> Option<&[f32]> {
        self.columns.get(&key)?.floats(position)
    }

    /// A row of integers.
    pub fn ints(&self, key: Key, position: usize) -> Option<&[u32]> {
        self.columns.get(&key)?.ints(position)
    }

    /// Experts and weights of a layer at a token.
    pub fn routing(&self, layer: u32, position: usize) -> Option<(&[u32], &[f32])> {
        let ids = self.ints(Key::layer(TapGroup::Routing, layer, Part::Ids), position)?;
        let weights = self.floats(Key::layer(TapGroup::Routing, layer, Part::Weights), position)?;
        Some((ids, weights))
    }

    /// A copy with no other tensors than these, for jobs. Rows are shared until they change.
    #[must_use]
    pub fn with_only(&self, keys: &[Key]) -> Self {
        let columns = keys.iter().filter_map(|key| Some((*key, self.columns.get(key)?.clone())));
        let (info, tokens) = (self.info.clone(), self.tokens.clone());
        Self { info, tokens, running: self.running, columns: columns.collect() }
    }

    /// All tensors that it has.
    pub fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.columns.keys().copied()
    }
}

/// Tokens and summed weights that the experts of a layer got, over all that was ever seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Tokens by expert.
    pub tokens: Vec<u64>,
    /// Summed weights by expert.
    pub weights: Vec<f64>,
}

/// Everything seen.
#[derive(Clone, Debug)]
pub struct Store {
    sequences: Vec<Sequence>,
    loads: BTreeMap<u32, Load>,
    runs: VecDeque<Arc<Run>>,
    experts: usize,
    budget: usize,
    held: usize,
    evicted: u64,
    dropped: u64,
    version: u64,
}

/// A run whose steps were timed.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Number of its frame.
    pub number: u64,
    /// Tokens in its batch.
    pub tokens: usize,
    /// Longest context of its tokens.
    pub context: u32,
    /// Times of its steps.
    pub times: RunTimes,
}

impl Store {
    /// An empty store for a model with so many experts, which holds about `budget` bytes of rows.
    pub fn new(experts: u32, budget: usize) -> Self {
        Self {
            sequences: Vec::new(),
            loads: BTreeMap::new(),
            runs: VecDeque::new(),
            experts: experts as usize,
            budget,
            held: 0,
            evicted: 0,
            dropped: 0,
            version: 0,
        }
    }

    /// Forgets everything, running totals too. Versions go on growing.
    pub fn clear(&mut self) {
        let version = self.version + 1;
        *self = Self { version, ..Self::new(self.experts as u32, self.budget) };
    }

    /// The texts, oldest first.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// The text of a number.
    pub fn sequence(&self, number: u32) -> Option<&Sequence> {
        self.sequences.iter().find(|sequence| sequence.info.number == number)
    }

    /// What the experts of a layer got over all texts.
    pub fn load(&self, layer: u32) -> Option<&Load> {
        self.loads.get(&layer)
    }

    /// Timed runs, oldest first.
    pub fn runs(&self) -> &VecDeque<Arc<Run>> {
        &self.runs
    }

    /// Grows with every change: what was computed from an older version is stale.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Bytes of rows that are held, and how many are allowed.
    pub fn memory(&self) -> (usize, usize) {
        (self.held, self.budget)
    }

    /// Blocks of rows that had to go to stay within memory, and frames that never came.
    pub fn lost(&self) -> (u64, u64) {
        (self.evicted, self.dropped)
    }

    /// A text begins.
    pub fn begin(&mut self, info: SequenceInfo) {
        self.version += 1;
        self.sequences.retain(|sequence| sequence.info.number != info.number);
        self.sequences.push(Sequence { info, tokens: Vec::new(), running: true, columns: BTreeMap::new() });
    }

    /// A token stands behind the others of a text.
    pub fn push_token(&mut self, sequence: u32, token: Token) {
        self.version += 1;
        if let Some(sequence) = self.sequences.iter_mut().find(|s| s.info.number == sequence) {
            sequence.tokens.push(token);
        }
    }

    /// No more tokens come.
    pub fn end(&mut self, sequence: u32) {
        self.version += 1;
        if let Some(sequence) = self.sequences.iter_mut().find(|s| s.info.number == sequence) {
            sequence.running = false;
        }
    }

    /// Frames that never came.
    pub fn count_dropped(&mut self, frames: u64) {
        self.version += 1;
        self.dropped += frames;
    }

    /// What a run showed. Rows of texts that never began, and numbers of other shapes than before, are left out.
    pub fn push_frame(&mut self, frame: &TapFrame) {
        self.version += 1;
        if let Some(times) = &frame.times {
            let context = frame.tokens.iter().map(|token| token.position + 1).max().unwrap_or(0);
            let (number, tokens) = (frame.number, frame.tokens.len());
            self.runs.push_back(Arc::new(Run { number, tokens, context, times: times.clone() }));
            if self.runs.len() > MAX_RUNS {
                self.runs.pop_front();
            }
        }
        for tensor in &frame.tensors {
            if let Some(key) = Key::of(&tensor.name, tensor.group, tensor.layer) {
                self.push_tensor(frame, key, tensor);
            }
        }
        self.count_loads(frame);
        self.evict();
    }

    fn push_tensor(&mut self, frame: &TapFrame, key: Key, tensor: &FrameTensor) {
        let columns = tensor.columns as usize;
        let (words, is_float): (&[u32], bool) = match &tensor.data {
            Numbers::F32(numbers) => (bytemuck::cast_slice(numbers), true),
            Numbers::U32(numbers) => (numbers, false),
        };
        if columns == 0 || words.len() != frame.tokens.len() * columns {
            return;
        }
        for (token, row) in frame.tokens.iter().zip(words.chunks(columns)) {
            let Some(sequence) = self.sequences.iter_mut().find(|s| s.info.number == token.sequence) else { continue };
            let column = sequence.columns.entry(key).or_insert_with(|| Column {
                columns,
                is_float,
                blocks: Vec::new(),
                held: 0,
            });
            // A hostile recording may name a position far behind the text's end.
            let position = token.position as usize;
            if column.columns != columns || column.is_float != is_float || position > sequence.tokens.len() + BLOCK_ROWS
            {
                continue;
            }
            let new = column.blocks.get(position / BLOCK_ROWS).is_none_or(Option::is_none);
            column.set(position, row);
            if new {
                column.held += 1;
                self.held += column.block_bytes();
            }
        }
    }

    fn count_loads(&mut self, frame: &TapFrame) {
        let tensor = |group, layer, part| {
            let is = |t: &&FrameTensor| Key::of(&t.name, t.group, t.layer) == Some(Key { group, layer, part });
            frame.tensors.iter().find(is).map(|t| &t.data)
        };
        for ids_of in frame.tensors.iter().filter(|t| t.group == TapGroup::Routing) {
            let (Some(layer), Numbers::U32(ids)) = (ids_of.layer, &ids_of.data) else { continue };
            let weights = tensor(TapGroup::Routing, Some(layer), Part::Weights);
            let load = self
                .loads
                .entry(layer)
                .or_insert_with(|| Load { tokens: vec![0; self.experts], weights: vec![0.0; self.experts] });
            for (i, &id) in ids.iter().enumerate() {
                let Some(count) = load.tokens.get_mut(id as usize) else { continue };
                *count += 1;
                if let Some(Numbers::F32(weights)) = weights
                    && let Some(weight) = weights.get(i).filter(|weight| weight.is_finite())
                {
                    load.weights[id as usize] += f64::from(*weight);
                }
            }
        }
    }

    /// Drops the oldest blocks of the bulkiest groups until the budget is kept. Routing goes last.
    fn evict(&mut self) {
        while self.held > self.budget {
            let mut bytes: BTreeMap<TapGroup, usize> = BTreeMap::new();
            for (key, column) in self.sequences.iter().flat_map(|sequence| &sequence.columns) {
                *bytes.entry(key.group).or_default() += column.held * column.block_bytes();
            }
            let others = bytes.iter().filter(|(group, bytes)| **group != TapGroup::Routing && **bytes > 0);
            let Some(group) = others
                .max_by_key(|(_, bytes)| **bytes)
                .map(|(group, _)| *group)
                .or_else(|| bytes.get(&TapGroup::Routing).filter(|bytes| **bytes > 0).map(|_| TapGroup::Routing))
            else {
                return;
            };
            if !self.evict_oldest(group) {
                return;
            }
        }
    }

    /// Drops the first held blocks (the same rows of all layers) of the oldest text that has any of this group.
    fn evict_oldest(&mut self, group: TapGroup) -> bool {
        for sequence in &mut self.sequences {
            let of_group = |(key, _): &(&Key, &mut Column)| key.group == group;
            let first = |column: &Column| column.blocks.iter().position(Option::is_some);
            let columns = sequence.columns.iter_mut().filter(of_group);
            let oldest = columns.filter_map(|(_, column)| first(column)).min();
            let Some(oldest) = oldest else { continue };
            for (_, column) in sequence.columns.iter_mut().filter(of_group) {
                if let Some(slot) = column.blocks.get_mut(oldest)
                    && slot.take().is_some()
                {
                    column.held -= 1;
                    self.held -= column.block_bytes();
                    self.evicted += 1;
                }
            }
            return true;
        }
        false
    }
}
