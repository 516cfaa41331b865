//! Maps of which tokens went to which experts.

use std::ops::Range;

use moewe_plan::{Edit, TapGroup};

use crate::jobs::coarse;
use crate::store::{Key, Part, Sequence};
use crate::subject::Subject;

/// The tensors of a layer's routing.
pub fn keys(layer: u32) -> [Key; 2] {
    [Part::Ids, Part::Weights].map(|part| Key::layer(TapGroup::Routing, layer, part))
}

/// A number that changes when a text has grown enough for its maps to be made anew.
pub fn step(sequence: &Sequence) -> (u64, bool) {
    let tokens = sequence.tokens.len() as u64;
    (if sequence.running { coarse(tokens) } else { tokens }, sequence.running)
}

/// At most `most` rows of a text: those around a token, or the last ones. Moves in steps of half its length.
pub fn window(tokens: usize, around: Option<usize>, most: usize) -> Range<usize> {
    if tokens <= most {
        return 0..tokens;
    }
    let half = (most / 2).max(1);
    let middle = around.unwrap_or(tokens).min(tokens);
    let first = (middle.saturating_sub(half / 2) / half * half).min(tokens - most);
    first..first + most
}

/// Weights by token and expert, `[tokens, experts]`: 0 where an expert was not chosen, NaN where nothing is known.
pub fn by_token(sequence: &Sequence, layer: u32, experts: usize, tokens: Range<usize>) -> Vec<f32> {
    let mut cells = vec![f32::NAN; tokens.len() * experts];
    if experts > 0 {
        for (row, position) in cells.chunks_mut(experts).zip(tokens) {
            fill(sequence, layer, position, row);
        }
    }
    cells
}

/// Weights of the experts of all layers at a token, `[layers, experts]`: NaN in layers without experts or routing.
pub fn by_layer(sequence: &Sequence, layers: u32, experts: usize, position: usize) -> Vec<f32> {
    let mut cells = vec![f32::NAN; layers as usize * experts];
    if experts > 0 {
        for (row, layer) in cells.chunks_mut(experts).zip(0..) {
            fill(sequence, layer, position, row);
        }
    }
    cells
}

fn fill(sequence: &Sequence, layer: u32, position: usize, row: &mut [f32]) {
    if let Some((ids, weights)) = sequence.routing(layer, position) {
        row.fill(0.0);
        for (&id, &weight) in ids.iter().zip(weights) {
            if let Some(cell) = row.get_mut(id as usize) {
                *cell += weight;
            }
        }
    }
}

/// What the experts of all layers got from a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// Tokens by layer whose routing is held.
    pub tokens: Vec<u32>,
    /// Tokens that chose an expert, `[layers, experts]`; NaN in layers without routing.
    pub chosen: Vec<f32>,
    /// Sums of their weights, `[layers, experts]`.
    pub weights: Vec<f32>,
}

impl Sums {
    /// Adds up a text.
    pub fn of(sequence: &Sequence, layers: u32, experts: usize) -> Self {
        let size = layers as usize * experts;
        let mut sums =
            Self { tokens: vec![0; layers as usize], chosen: vec![f32::NAN; size], weights: vec![f32::NAN; size] };
        for layer in 0..layers {
            let rows = (0..sequence.tokens.len()).filter_map(|position| sequence.routing(layer, position));
            let (mut chosen, mut summed) = (vec![0u32; experts], vec![0f64; experts]);
            let mut tokens = 0;
            for (ids, weights) in rows {
                tokens += 1;
                for (&id, &weight) in ids.iter().zip(weights).filter(|(id, _)| (**id as usize) < experts) {
                    chosen[id as usize] += 1;
                    summed[id as usize] += if weight.is_finite() { f64::from(weight) } else { 0.0 };
                }
            }
            sums.tokens[layer as usize] = tokens;
            if tokens > 0 {
                let at = layer as usize * experts;
                for expert in 0..experts {
                    sums.chosen[at + expert] = chosen[expert] as f32;
                    sums.weights[at + expert] = summed[expert] as f32;
                }
            }
        }
        sums
    }

    /// Share of tokens that chose an expert, in percent, `[layers, experts]`.
    pub fn percent(&self, experts: usize) -> Vec<f32> {
        let cells = self.chosen.iter().enumerate();
        cells.map(|(i, chosen)| 100.0 * chosen / self.tokens[i / experts.max(1)] as f32).collect()
    }
}

/// Tokens of a text whose routing in a layer is held, and the percent of them that each expert got, `[experts]`.
pub fn shares(sequence: &Sequence, layer: u32, experts: usize) -> (u32, Vec<f32>) {
    let (mut tokens, mut counts) = (0, vec![0u32; experts]);
    for (ids, _) in (0..sequence.tokens.len()).filter_map(|position| sequence.routing(layer, position)) {
        tokens += 1;
        for &id in ids {
            if let Some(count) = counts.get_mut(id as usize) {
                *count += 1;
            }
        }
    }
    (tokens, counts.iter().map(|&count| count as f32 / tokens.max(1) as f32 * 100.0).collect())
}

/// How bright the experts of a layer are at a token: the weights of those chosen there; of others the largest that is left of an
/// older one, which faded by a constant factor a token until less than 1/16 is left after `fade` tokens. `[experts]`.
pub fn glow(sequence: &Sequence, layer: u32, experts: usize, position: usize, fade: usize) -> Vec<f32> {
    let mut light = vec![0f32; experts];
    let keep = if fade == 0 { 0.0 } else { 0.0625f32.powf(1.0 / fade as f32) };
    for age in (0..=fade.min(position)).rev() {
        let Some((ids, weights)) = sequence.routing(layer, position - age) else { continue };
        for (&id, &weight) in ids.iter().zip(weights) {
            if let Some(cell) = light.get_mut(id as usize) {
                *cell = if age == 0 { weight.max(0.0) } else { cell.max(weight * keep.powi(age as i32)) };
            }
        }
    }
    light
}

/// Which groups of experts a token could choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Group numbers, ascending.
    pub groups: Vec<u32>,
    /// Whether these are all; else only groups from which an expert was chosen are known.
    pub is_complete: bool,
}

/// The groups that a token kept: those from which it chose, and the others by the rule for routers with a correction bias
/// (sum of the two largest of sigmoid(logit) + bias in the group) where logits are held and nothing was changed about the
/// choice. `None` without groups or routing.
pub fn kept_groups(subject: &Subject, sequence: &Sequence, layer: u32, position: usize) -> Option<Kept> {
    let (groups, kept) = (subject.model.n_group, subject.model.topk_group as usize);
    let size = subject.experts_per_group() as usize;
    if groups < 2 || size == 0 {
        return None;
    }
    let ids = sequence.ints(keys(layer)[0], position)?;
    let mut known: Vec<u32> = ids.iter().map(|id| id / size as u32).filter(|group| *group < groups).collect();
    known.sort_unstable();
    known.dedup();
    if known.len() >= kept {
        return Some(Kept { groups: known, is_complete: true });
    }
    let changes = |edit: &Edit| match edit {
        Edit::Mute(place) | Edit::Force(place) => place.layer.is_none_or(|l| l == layer),
        Edit::Pin(at, _) => at.is_none_or(|l| l == layer),
        _ => false,
    };
    let logits = sequence.floats(Key::layer(TapGroup::Scores, layer, Part::RouterLogits), position);
    if let (Some(bias), Some(logits)) = (subject.expert_bias.get(&layer), logits)
        && !sequence.info.edits.iter().any(changes)
        && bias.len() == logits.len()
        && logits.len() == subject.model.experts as usize
    {
        let scores: Vec<f32> =
            logits.iter().zip(bias).map(|(logit, bias)| 1.0 / (1.0 + (-logit).exp()) + bias).collect();
        let score = |group: &[f32]| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            group.iter().take(2).sum::<f32>()
        };
        let mut ranked: Vec<(f32, u32)> = scores.chunks(size).map(score).zip(0..).collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut best: Vec<u32> = ranked.into_iter().take(kept).map(|(_, group)| group).collect();
        best.sort_unstable();
        // Where the rule contradicts what was chosen, it is not this router's rule.
        if known.iter().all(|group| best.contains(group)) {
            return Some(Kept { groups: best, is_complete: true });
        }
    }
    Some(Kept { groups: known, is_complete: false })
}

/// Where the experts of a layer stand as squares: groups as blocks, all of them together nearly a square.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lattice {
    /// Experts.
    pub experts: usize,
    /// Columns and rows of a block.
    pub block: (usize, usize),
    /// Columns and rows of blocks.
    pub blocks: (usize, usize),
    /// Experts of a block.
    pub size: usize,
}

impl Lattice {
    /// Places experts in groups of consecutive ones.
    pub fn new(experts: usize, groups: usize) -> Self {
        let groups = groups.clamp(1, experts.max(1));
        let size = experts.div_ceil(groups).max(1);
        let root = size.isqrt() + usize::from(size.isqrt().pow(2) < size);
        // A block without holes, if that leaves it handsome.
        let columns = (root..=(2 * root).min(size)).find(|side| size.is_multiple_of(*side)).unwrap_or(root);
        let block = (columns, size.div_ceil(columns));
        let shape = |across: usize| (across, groups.div_ceil(across));
        let cost = |&across: &usize| {
            let (across, down) = shape(across);
            let ratio = (across * block.0) as f64 / (down * block.1) as f64;
            (ratio.ln().abs() + (across * down - groups) as f64 / groups as f64, ratio)
        };
        let better = |a: &usize, b: &usize| {
            let (a, b) = (cost(a), cost(b));
            // Of a tall and a wide one, the wide one: screens are wide.
            if (a.0 - b.0).abs() > 1e-9 { a.0.total_cmp(&b.0) } else { b.1.total_cmp(&a.1) }
        };
        let across = (1..=groups).min_by(better).unwrap_or(1);
        Self { experts, block, blocks: shape(across), size }
    }

    /// Columns and rows of squares.
    pub fn shape(&self) -> (usize, usize) {
        (self.blocks.0 * self.block.0, self.blocks.1 * self.block.1)
    }

    /// Column and row of an expert's square.
    pub fn place(&self, expert: usize) -> (usize, usize) {
        let (group, within) = (expert / self.size, expert % self.size);
        let column = group % self.blocks.0 * self.block.0 + within % self.block.0;
        (column, group / self.blocks.0 * self.block.1 + within / self.block.0)
    }

    /// The expert at a column and row, if one stands there.
    pub fn expert(&self, column: usize, row: usize) -> Option<usize> {
        let (columns, rows) = self.shape();
        if column >= columns || row >= rows {
            return None;
        }
        let group = row / self.block.1 * self.blocks.0 + column / self.block.0;
        let within = row % self.block.1 * self.block.0 + column % self.block.0;
        let expert = group * self.size + within;
        (within < self.size && expert < self.experts).then_some(expert)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{SequenceInfo, Store, Token};
    use crate::synthetic::{self, Shape};
    use moewe_plan::{FrameTensor, FrameToken, Numbers, TapFrame};

    #[test]
    fn maps_and_sums_hold_each_row_that_came() {
        let shape = Shape::small();
        let store = synthetic::store(&shape);
        let sequence = &store.sequences()[1];
        let map = by_token(sequence, 2, 32, 0..96);
        let sums = Sums::of(sequence, 4, 32);
        assert_eq!(sums.tokens, [0, 96, 96, 96]);
        assert!(sums.chosen[..32].iter().all(|cell| cell.is_nan()), "the first layer is dense");
        for expert in 0..32 {
            let column = |at: usize| map[at * 32 + expert];
            let chosen = (0..96).filter(|&at| column(at) > 0.0).count();
            assert!((sums.chosen[64 + expert] - chosen as f32).abs() < 0.5);
            assert!((sums.percent(32)[64 + expert] - chosen as f32 / 0.96).abs() < 1e-4);
            let (tokens, shares) = shares(sequence, 2, 32);
            assert!(tokens == 96 && (shares[expert] - chosen as f32 / 0.96).abs() < 1e-4);
            assert!((sums.weights[64 + expert] - (0..96).map(column).sum::<f32>()).abs() < 1e-3);
        }
        for position in [0, 95] {
            let layers = by_layer(sequence, 4, 32, position);
            assert_eq!(layers[64..96], map[position * 32..][..32]);
            assert!(layers[0].is_nan());
        }
        assert!(by_layer(sequence, 4, 32, 96).iter().all(|cell| cell.is_nan()));
        assert_eq!(shares(sequence, 0, 32), (0, vec![0.0; 32]), "nothing is known of a dense layer");
    }

    fn frame(ids: Vec<u32>, weights: Vec<f32>, more: Option<FrameTensor>) -> TapFrame {
        let columns = 2;
        let tokens = (0..ids.len() as u32 / columns).map(|position| FrameToken { sequence: 0, position, id: 0 });
        let tensor = |name: &str, data| FrameTensor {
            name: name.into(),
            group: TapGroup::Routing,
            layer: Some(1),
            columns,
            data,
        };
        let mut tensors = vec![tensor("moe.1.ids", Numbers::U32(ids)), tensor("moe.1.weights", Numbers::F32(weights))];
        tensors.extend(more);
        TapFrame { tokens: tokens.collect(), tensors, ..TapFrame::default() }
    }

    fn seen(info: SequenceInfo, frame: &TapFrame) -> Store {
        let mut store = Store::new(4, 1 << 20);
        store.begin(info);
        (0..frame.tokens.len()).for_each(|_| store.push_token(0, Token::default()));
        store.push_frame(frame);
        store
    }

    #[test]
    fn numbers_that_no_expert_has_and_weights_that_are_none_do_no_harm() {
        let store = seen(SequenceInfo::default(), &frame(vec![9, 1, 1, 1], vec![1.0, f32::NAN, 0.25, 0.5], None));
        let sequence = &store.sequences()[0];
        let map = by_token(sequence, 1, 4, 0..3);
        assert_eq!((map[0], map[5]), (0.0, 0.75));
        assert!(map[1].is_nan() && map[8..].iter().all(|cell| cell.is_nan()));
        let sums = Sums::of(sequence, 2, 4);
        assert_eq!((sums.chosen[5], sums.weights[5]), (3.0, 0.75));
        assert_eq!(by_token(sequence, 1, 0, 0..3), Vec::<f32>::new());
    }

    #[test]
    fn light_fades_with_each_token() {
        let store = seen(SequenceInfo::default(), &frame(vec![0, 1, 2, 3], vec![1.0, 0.5, 0.9, 0.1], None));
        let sequence = &store.sequences()[0];
        assert_eq!(glow(sequence, 1, 4, 1, 0), [0.0, 0.0, 0.9, 0.1]);
        let two = glow(sequence, 1, 4, 1, 2);
        for (light, wanted) in two.iter().zip([0.25, 0.125, 0.9, 0.1]) {
            assert!((light - wanted).abs() < 1e-6, "{two:?}");
        }
        assert_eq!(glow(sequence, 1, 4, 9, 0), [0.0; 4]);
        // What was chosen shows its weight, however bright it was before.
        let store = seen(SequenceInfo::default(), &frame(vec![0, 1, 0, 3], vec![1.0, 0.5, 0.01, 0.9], None));
        assert_eq!(glow(&store.sequences()[0], 1, 4, 1, 8)[..1], [0.01]);
    }

    #[test]
    fn groups_that_were_kept_are_known_from_what_was_chosen_or_from_scores() {
        let mut shape = Shape::small();
        (shape.experts, shape.groups) = ((8, 2), (4, 2));
        let mut subject = shape.subject();
        subject.expert_bias.insert(1, vec![0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0]);
        let logits = vec![3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.9];
        let scores = FrameTensor {
            name: "moe.1.router_logits".into(),
            group: TapGroup::Scores,
            layer: Some(1),
            columns: 8,
            data: Numbers::F32(logits),
        };
        let both = seen(SequenceInfo::default(), &frame(vec![0, 7], vec![1.0, 1.0], None));
        let kept = |store: &Store| kept_groups(&subject, &store.sequences()[0], 1, 0).unwrap();
        assert_eq!(kept(&both), Kept { groups: vec![0, 3], is_complete: true });
        let one = seen(SequenceInfo::default(), &frame(vec![0, 1], vec![1.0, 1.0], None));
        assert_eq!(kept(&one), Kept { groups: vec![0], is_complete: false });
        // Without the bias, group 3 would be the second.
        let told = seen(SequenceInfo::default(), &frame(vec![0, 1], vec![1.0, 1.0], Some(scores.clone())));
        assert_eq!(kept(&told), Kept { groups: vec![0, 2], is_complete: true });
        let contradicted = seen(SequenceInfo::default(), &frame(vec![6, 7], vec![1.0, 1.0], Some(scores.clone())));
        assert_eq!(kept(&contradicted), Kept { groups: vec![3], is_complete: false });
        let edits = vec![Edit::Mute("*:3".parse().unwrap())];
        let edited = SequenceInfo { edits, ..SequenceInfo::default() };
        let edited = seen(edited, &frame(vec![0, 1], vec![1.0, 1.0], Some(scores)));
        assert!(!kept(&edited).is_complete);
    }

    #[test]
    fn each_expert_has_one_square_and_groups_stay_together() {
        for (experts, groups) in [(256, 8), (32, 4), (160, 8), (64, 1), (384, 1), (7, 3), (1, 1), (12, 5), (2, 9)] {
            let lattice = Lattice::new(experts, groups);
            let (columns, rows) = lattice.shape();
            let mut seen = vec![false; experts];
            for row in 0..rows {
                for column in 0..columns {
                    if let Some(expert) = lattice.expert(column, row) {
                        assert_eq!(lattice.place(expert), (column, row));
                        assert!(!std::mem::replace(&mut seen[expert], true));
                    }
                }
            }
            assert!(seen.iter().all(|seen| *seen), "{experts} experts in {groups} groups: {lattice:?}");
            assert_eq!(lattice.expert(columns, 0), None);
        }
        let shape = |experts, groups| Lattice::new(experts, groups).shape();
        assert_eq!((shape(256, 8), shape(32, 4), shape(64, 1)), ((16, 16), (8, 4), (8, 8)));
        assert_eq!((shape(384, 1), Lattice::new(256, 8).block), ((24, 16), (8, 4)));
    }

    #[test]
    fn long_texts_are_shown_in_windows() {
        assert_eq!(window(100, None, 100), 0..100);
        assert_eq!(window(1000, None, 100), 900..1000);
        for at in 0..1000 {
            let window = window(1000, Some(at), 100);
            assert!(window.contains(&at) && window.len() == 100 && window.end <= 1000, "{at}: {window:?}");
        }
    }
}
