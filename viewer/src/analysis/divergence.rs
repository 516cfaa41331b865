//! How far two texts are from each other: in the experts that their tokens are given and in their hidden states.
//!
//! Two versions of one text are compared position by position. Texts that have nothing to do with each other are compared
//! as wholes: how each shares its traffic out among the experts.

use moewe_plan::{ModelInfo, TapGroup};

use crate::store::{Key, Part, Sequence, Store, Token};

/// Jensen–Shannon divergence of two distributions in bits: 0 if they are the same, 1 if they have nothing in common.
/// Weights need not sum to 1; they are divided by their sum, their signs left out (a scaled expert may count negatively).
/// NaN if either sums to 0 or is not finite, or if they are not equally long.
pub fn jensen_shannon(p: &[f64], q: &[f64]) -> f64 {
    let total = |weights: &[f64]| weights.iter().map(|weight| weight.abs()).sum::<f64>();
    let (p_total, q_total) = (total(p), total(q));
    let is_distribution = |total: f64| total.is_finite() && total > 0.0;
    if p.len() != q.len() || !is_distribution(p_total) || !is_distribution(q_total) {
        return f64::NAN;
    }
    let part = |share: f64, middle: f64| if share > 0.0 { share * (share / middle).log2() } else { 0.0 };
    let bits = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (p.abs() / p_total, q.abs() / q_total);
        let middle = f64::midpoint(p, q);
        f64::midpoint(part(p, middle), part(q, middle))
    });
    bits.sum::<f64>().clamp(0.0, 1.0)
}

/// [`jensen_shannon`] of the experts that two tokens were given: ids and weights of each.
pub fn routing_divergence(a: (&[u32], &[f32]), b: (&[u32], &[f32])) -> f64 {
    let mut experts: Vec<u32> = Vec::with_capacity(a.0.len() + b.0.len());
    let mut weights = [Vec::with_capacity(a.0.len() + b.0.len()), Vec::with_capacity(a.0.len() + b.0.len())];
    for (of, (ids, values)) in [a, b].into_iter().enumerate() {
        for (&id, &value) in ids.iter().zip(values) {
            let at = experts.iter().position(|&expert| expert == id).unwrap_or_else(|| {
                experts.push(id);
                weights[0].push(0.0);
                weights[1].push(0.0);
                experts.len() - 1
            });
            weights[of][at] += f64::from(value);
        }
    }
    jensen_shannon(&weights[0], &weights[1])
}

/// Share of a token's experts that both were given: |A∩B| / k. NaN if either was given none.
pub fn overlap(a: &[u32], b: &[u32]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return f64::NAN;
    }
    a.iter().filter(|id| b.contains(id)).count() as f64 / a.len().max(b.len()) as f64
}

/// Cosine of the angle between two vectors. NaN if either is all zeros or not finite, or if they are not equally long.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let (mut dot, mut a_square, mut b_square) = (0.0, 0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a), f64::from(b));
        dot += a * b;
        a_square += a * a;
        b_square += b * b;
    }
    let norm = (a_square * b_square).sqrt();
    if norm > 0.0 { (dot / norm).clamp(-1.0, 1.0) } else { f64::NAN }
}

/// The first position that both texts have and that holds different tokens.
pub fn first_difference(a: &[Token], b: &[Token]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a.id != b.id)
}

/// The position from which on two versions of one text may differ: by what their parents say, or the end of a prompt
/// that both have. `None` for other texts.
pub fn branch(store: &Store, a: u32, b: u32) -> Option<u32> {
    let (of_a, of_b) = (ancestors(store, a), ancestors(store, b));
    let common = |&(number, at): &(u32, u32)| of_b.iter().find(|of_b| of_b.0 == number).map(|of_b| at.min(of_b.1));
    of_a.iter().find_map(common).or_else(|| {
        let prompt = |number: u32| {
            let sequence = store.sequence(number)?;
            sequence.tokens.get(..sequence.info.prompt_tokens as usize).filter(|prompt| !prompt.is_empty())
        };
        let prompt = prompt(a).filter(|of_a| prompt(b).is_some_and(|of_b| *of_a == of_b))?;
        Some(prompt.len() as u32)
    })
}

/// A text, its parent and so on, each with the position up to which it is surely the same as the text.
fn ancestors(store: &Store, number: u32) -> Vec<(u32, u32)> {
    let mut line = vec![(number, u32::MAX)];
    while let Some(&(last, until)) = line.last()
        && let Some((parent, position)) = store.sequence(last).and_then(|sequence| sequence.info.parent)
        && line.iter().all(|(before, _)| *before != parent)
    {
        line.push((parent, until.min(position)));
    }
    line
}

/// What a layer has over some positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Mean over the positions that count; NaN if there are none.
    pub mean: f32,
    /// The smallest number; NaN if there are none.
    pub least: f32,
    /// The largest number; NaN if there are none.
    pub most: f32,
    /// Positions that count: both texts hold their rows there.
    pub held: usize,
}

impl Summary {
    fn of(cells: &[f32]) -> Self {
        let (mut sum, mut held, mut least, mut most) = (0.0, 0, f32::NAN, f32::NAN);
        for &cell in cells.iter().filter(|cell| !cell.is_nan()) {
            sum += f64::from(cell);
            held += 1;
            (least, most) = (cell.min(least), cell.max(most));
        }
        let mean = if held == 0 { f32::NAN } else { (sum / held as f64) as f32 };
        Self { mean, least, most, held }
    }
}

/// A number for each layer and position, and what it comes to.
#[derive(Clone, Debug)]
pub struct Map {
    /// `[layers, positions]`; NaN where a text holds no row.
    pub cells: Vec<f32>,
    /// By layer, over the positions before the first difference: the same words, so nothing but the changes shows.
    pub before: Vec<Summary>,
    /// By layer, from the first difference on.
    pub after: Vec<Summary>,
}

impl Map {
    fn new(layers: usize, positions: usize, split: usize, cell: impl Fn(u32, usize) -> f64) -> Self {
        let mut cells = Vec::with_capacity(layers * positions);
        for layer in 0..layers as u32 {
            cells.extend((0..positions).map(|position| cell(layer, position) as f32));
        }
        let rows = || (0..layers).map(|layer| &cells[layer * positions..][..positions]);
        let before = rows().map(|row| Summary::of(&row[..split])).collect();
        let after = rows().map(|row| Summary::of(&row[split..])).collect();
        Self { cells, before, after }
    }

    /// Whether any position of any layer counts.
    pub fn is_empty(&self) -> bool {
        self.before.iter().chain(&self.after).all(|summary| summary.held == 0)
    }
}

/// Two texts, position by position.
#[derive(Clone, Debug)]
pub struct ByPosition {
    /// Positions that both have.
    pub positions: usize,
    /// The first position with different tokens.
    pub first_difference: Option<usize>,
    /// [`routing_divergence`] in bits.
    pub divergence: Map,
    /// [`overlap`] of the chosen experts.
    pub overlap: Map,
    /// [`cosine`] of the hidden states behind the layer.
    pub cosine: Map,
}

/// Compares two texts position by position, in all layers of the model.
pub fn by_position(model: &ModelInfo, a: &Sequence, b: &Sequence) -> ByPosition {
    let layers = model.layers as usize;
    let positions = a.tokens.len().min(b.tokens.len());
    let first_difference = first_difference(&a.tokens, &b.tokens);
    let split = first_difference.unwrap_or(positions);
    let map = |cell: &dyn Fn(u32, usize) -> Option<f64>| {
        Map::new(layers, positions, split, |layer, position| cell(layer, position).unwrap_or(f64::NAN))
    };
    let chosen = |layer| Key::layer(TapGroup::Routing, layer, Part::Ids);
    let hidden = |layer| Key::layer(TapGroup::Hidden, layer, Part::Hidden);
    ByPosition {
        positions,
        first_difference,
        divergence: map(&|layer, at| Some(routing_divergence(a.routing(layer, at)?, b.routing(layer, at)?))),
        overlap: map(&|layer, at| Some(overlap(a.ints(chosen(layer), at)?, b.ints(chosen(layer), at)?))),
        cosine: map(&|layer, at| Some(cosine(a.floats(hidden(layer), at)?, b.floats(hidden(layer), at)?))),
    }
}

/// Two texts as wholes: how their choices fall on the experts.
#[derive(Clone, Debug)]
pub struct Wholes {
    /// Experts of a layer.
    pub experts: usize,
    /// [`jensen_shannon`] of the two loads in bits, by layer; NaN where a text holds no routing.
    pub divergence: Vec<f32>,
    /// Share of a text's choices that fell on an expert, `[layers, experts]` for A and B; NaN in layers without routing.
    pub shares: [Vec<f32>; 2],
    /// Tokens whose routing is held, by layer, for A and B.
    pub held: [Vec<usize>; 2],
}

/// An expert that two texts use differently.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Its layer.
    pub layer: u32,
    /// Its number.
    pub expert: u32,
    /// Share of A's choices.
    pub a: f32,
    /// Share of B's choices.
    pub b: f32,
}

/// Compares how two texts use the experts, over all tokens of each.
pub fn as_wholes(model: &ModelInfo, a: &Sequence, b: &Sequence) -> Wholes {
    let experts = model.experts as usize;
    let mut wholes =
        Wholes { experts, divergence: Vec::new(), shares: [Vec::new(), Vec::new()], held: [Vec::new(), Vec::new()] };
    for layer in 0..model.layers {
        let counts = [a, b].map(|text| counts(text, layer, experts));
        wholes.divergence.push(jensen_shannon(&counts[0].0, &counts[1].0) as f32);
        for (of, (counts, held)) in counts.iter().enumerate() {
            let total: f64 = counts.iter().sum();
            // 0 / 0 is NaN: no routing is not the same as none of it.
            wholes.shares[of].extend(counts.iter().map(|count| (count / total) as f32));
            wholes.held[of].push(*held);
        }
    }
    wholes
}

/// Choices of each expert, and tokens whose choices are held.
fn counts(text: &Sequence, layer: u32, experts: usize) -> (Vec<f64>, usize) {
    let (mut counts, mut held) = (vec![0.0; experts], 0);
    let Some(ids) = text.column(Key::layer(TapGroup::Routing, layer, Part::Ids)) else { return (counts, held) };
    for chosen in (0..text.tokens.len()).filter_map(|position| ids.ints(position)) {
        held += 1;
        for &id in chosen {
            if let Some(count) = counts.get_mut(id as usize) {
                *count += 1.0;
            }
        }
    }
    (counts, held)
}

impl Wholes {
    /// The experts that the texts use most differently, most different first, at most so many.
    pub fn differences(&self, most: usize) -> Vec<Difference> {
        let all = self.shares[0].iter().zip(&self.shares[1]).enumerate().map(|(at, (&a, &b))| Difference {
            layer: (at / self.experts) as u32,
            expert: (at % self.experts) as u32,
            a,
            b,
        });
        let size = |difference: &Difference| (difference.b - difference.a).abs();
        let mut all: Vec<Difference> = all.filter(|difference| size(difference) > 0.0).collect();
        all.sort_by(|x, y| size(y).total_cmp(&size(x)));
        all.truncate(most);
        all
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // these are exact
mod tests {
    use moewe_plan::{FrameTensor, FrameToken, Numbers, TapFrame};
    use proptest::prelude::*;

    use super::*;
    use crate::store::SequenceInfo;
    use crate::synthetic::{self, Shape};

    /// By the definition with entropies: H(m) − (H(p) + H(q)) / 2.
    fn by_entropy(p: &[f64], q: &[f64]) -> f64 {
        let normal = |w: &[f64]| w.iter().map(|x| x / w.iter().sum::<f64>()).collect::<Vec<_>>();
        let entropy = |w: &[f64]| -w.iter().filter(|x| **x > 0.0).map(|x| x * x.ln()).sum::<f64>() / 2f64.ln();
        let (p, q) = (normal(p), normal(q));
        let middle: Vec<f64> = p.iter().zip(&q).map(|(p, q)| 0.5 * p + 0.5 * q).collect();
        entropy(&middle) - 0.5 * (entropy(&p) + entropy(&q))
    }

    fn weights() -> impl Strategy<Value = (Vec<f64>, Vec<f64>)> {
        (1usize..12).prop_flat_map(|n| {
            let weight = || prop_oneof![Just(0.0), 1e-6..10.0f64];
            (prop::collection::vec(weight(), n), prop::collection::vec(weight(), n))
        })
    }

    proptest! {
        #[test]
        fn divergence_is_what_entropies_say((p, q) in weights()) {
            prop_assume!(p.iter().sum::<f64>() > 0.0 && q.iter().sum::<f64>() > 0.0);
            let bits = jensen_shannon(&p, &q);
            prop_assert!((bits - by_entropy(&p, &q)).abs() < 1e-9, "{bits}");
            prop_assert!((0.0..=1.0).contains(&bits));
            prop_assert_eq!(bits, jensen_shannon(&q, &p));
            prop_assert_eq!(jensen_shannon(&p, &p), 0.0);
            let scaled: Vec<f64> = p.iter().map(|p| p * 4.0).collect();
            prop_assert!((jensen_shannon(&scaled, &q) - bits).abs() < 1e-12);
        }

        #[test]
        fn few_experts_are_compared_as_all_would_be(
            a in prop::collection::btree_map(0u32..20, 1e-3..1.0f32, 1..8),
            b in prop::collection::btree_map(0u32..20, 1e-3..1.0f32, 1..8),
        ) {
            let split = |m: &std::collections::BTreeMap<u32, f32>| -> (Vec<u32>, Vec<f32>) { m.iter().rev().unzip() };
            let dense = |m: &std::collections::BTreeMap<u32, f32>| -> Vec<f64> {
                (0..20).map(|e| m.get(&e).copied().map_or(0.0, f64::from)).collect()
            };
            let ((a_ids, a_weights), (b_ids, b_weights)) = (split(&a), split(&b));
            let sparse = routing_divergence((&a_ids, &a_weights), (&b_ids, &b_weights));
            prop_assert!((sparse - by_entropy(&dense(&a), &dense(&b))).abs() < 1e-9);
        }

        #[test]
        fn hostile_numbers_give_a_number_or_nan(
            a in prop::collection::vec((any::<u32>(), any::<f32>()), 0..6),
            b in prop::collection::vec((0u32..3, any::<f32>()), 0..6),
        ) {
            let (a_ids, a_weights): (Vec<u32>, Vec<f32>) = a.into_iter().unzip();
            let (b_ids, b_weights): (Vec<u32>, Vec<f32>) = b.into_iter().unzip();
            let unit = |x: f64| x.is_nan() || (0.0..=1.0).contains(&x);
            prop_assert!(unit(routing_divergence((&a_ids, &a_weights), (&b_ids, &b_weights))));
            prop_assert!(unit(overlap(&a_ids, &b_ids)));
            prop_assert!(unit(cosine(&a_weights, &b_weights).abs()));
        }
    }

    #[test]
    fn divergence_at_its_ends() {
        let same = ([3, 9].as_slice(), [0.75f32, 0.25].as_slice());
        assert_eq!(routing_divergence(same, (&[9, 3], &[0.5, 1.5])), 0.0);
        assert_eq!(routing_divergence(same, (&[4, 10], &[0.1, 0.2])), 1.0);
        // Weights may be negative where an expert was scaled so: its part is what counts.
        assert_eq!(routing_divergence(same, (&[3, 9], &[-0.75, 0.25])), 0.0);
        assert!(routing_divergence(same, (&[3, 9], &[0.0, 0.0])).is_nan());
        assert!(routing_divergence(same, (&[3], &[f32::INFINITY])).is_nan());
        assert!(routing_divergence(same, (&[], &[])).is_nan());
        assert!(jensen_shannon(&[1.0], &[1.0, 0.0]).is_nan());
        // p = (1, 0), q = (½, ½): m = (¾, ¼), by hand.
        let by_hand = 0.5 * (4.0f64 / 3.0).log2() + 0.25 * (2.0f64 / 3.0).log2() + 0.25;
        assert!((jensen_shannon(&[1.0, 0.0], &[2.0, 2.0]) - by_hand).abs() < 1e-15);
    }

    #[test]
    fn overlaps_and_cosines() {
        assert_eq!(overlap(&[1, 2, 3, 4], &[4, 3, 9, 8]), 0.5);
        assert_eq!(overlap(&[1, 2], &[2, 1]), 1.0);
        assert_eq!(overlap(&[1, 2], &[3, 4]), 0.0);
        assert!(overlap(&[], &[1]).is_nan());
        assert_eq!(cosine(&[3.0, 4.0], &[6.0, 8.0]), 1.0);
        assert_eq!(cosine(&[3.0, 4.0], &[-6.0, -8.0]), -1.0);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 5.0]), 0.0);
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5f64.sqrt()).abs() < 1e-15);
        // Large numbers do not overflow, zeros have no direction.
        assert!((cosine(&[f32::MAX, f32::MAX], &[f32::MAX, f32::MAX]) - 1.0).abs() < 1e-12);
        for (a, b) in [([0.0, 0.0], [1.0, 2.0]), ([0.0, 0.0], [0.0, 0.0]), ([f32::NAN, 1.0], [1.0, 1.0])] {
            assert!(cosine(&a, &b).is_nan() && cosine(&b, &a).is_nan());
        }
        assert!(cosine(&[1.0], &[1.0, 1.0]).is_nan() && cosine(&[], &[]).is_nan());
    }

    fn info(number: u32, parent: Option<(u32, u32)>) -> SequenceInfo {
        SequenceInfo { number, parent, ..SequenceInfo::default() }
    }

    #[test]
    fn versions_know_where_they_part() {
        let mut store = Store::new(4, 1 << 20);
        let parents =
            [(0, None), (1, Some((0, 30))), (2, Some((1, 20))), (3, Some((1, 40))), (4, None), (5, Some((9, 3)))];
        for (number, parent) in parents {
            store.begin(info(number, parent));
        }
        assert_eq!(branch(&store, 0, 1), Some(30));
        assert_eq!(branch(&store, 1, 0), Some(30));
        assert_eq!(branch(&store, 0, 2), Some(20));
        assert_eq!(branch(&store, 3, 0), Some(30));
        assert_eq!(branch(&store, 2, 3), Some(20));
        assert_eq!(branch(&store, 0, 4), None);
        assert_eq!(branch(&store, 5, 0), None);
        assert_eq!(branch(&store, 9, 5), Some(3));
        // Texts that claim to come from each other.
        store.begin(info(6, Some((7, 1))));
        store.begin(info(7, Some((6, 2))));
        store.begin(info(8, Some((8, 2))));
        assert!(branch(&store, 6, 7).is_some());
        assert_eq!(branch(&store, 6, 8), None);
    }

    fn text(store: &mut Store, number: u32, ids: &[u32], row: impl Fn(u32) -> ([u32; 2], [f32; 2], [f32; 2])) {
        store.begin(info(number, None));
        for (position, &id) in (0..).zip(ids) {
            store.push_token(number, Token { id, generated: false });
            let (experts, weights, hidden) = row(position);
            let tensor =
                |name: &str, group, data| FrameTensor { name: name.into(), group, layer: Some(1), columns: 2, data };
            store.push_frame(&TapFrame {
                tokens: vec![FrameToken { sequence: number, position, id }],
                tensors: vec![
                    tensor("moe.1.ids", TapGroup::Routing, Numbers::U32(experts.to_vec())),
                    tensor("moe.1.weights", TapGroup::Routing, Numbers::F32(weights.to_vec())),
                    tensor("hidden.2", TapGroup::Hidden, Numbers::F32(hidden.to_vec())),
                ],
                ..TapFrame::default()
            });
        }
    }

    #[test]
    fn versions_are_compared_by_position() {
        let model = ModelInfo { layers: 3, experts: 4, ..Shape::small().subject().model };
        let mut store = Store::new(4, 1 << 20);
        text(&mut store, 0, &[5, 6, 7, 8], |_| ([0, 1], [0.5, 0.5], [1.0, 0.0]));
        text(&mut store, 1, &[5, 6, 9, 8, 7], |at| match at {
            0 => ([1, 0], [1.0, 1.0], [2.0, 0.0]),
            1 => ([2, 3], [0.5, 0.5], [0.0, 3.0]),
            2 => ([0, 2], [0.5, 0.5], [-1.0, 0.0]),
            _ => ([0, 1], [0.5, 0.5], [0.0, 0.0]),
        });
        let found = by_position(&model, store.sequence(0).unwrap(), store.sequence(1).unwrap());
        assert_eq!((found.positions, found.first_difference), (4, Some(2)));
        assert!(found.divergence.cells[..4].iter().all(|cell| cell.is_nan()), "layer 0 has no experts");
        assert_eq!(found.divergence.cells[4..8], [0.0, 1.0, 0.5, 0.0]);
        assert_eq!(found.overlap.cells[4..8], [1.0, 0.0, 0.5, 1.0]);
        assert_eq!(found.cosine.cells[4..7], [1.0, 0.0, -1.0]);
        assert!(found.cosine.cells[7].is_nan(), "zeros have no direction");
        assert_eq!(found.divergence.before[1], Summary { mean: 0.5, least: 0.0, most: 1.0, held: 2 });
        assert_eq!(found.divergence.after[1], Summary { mean: 0.25, least: 0.0, most: 0.5, held: 2 });
        assert_eq!(found.cosine.after[1], Summary { mean: -1.0, least: -1.0, most: -1.0, held: 1 });
        assert!(found.cosine.after[2].mean.is_nan() && found.cosine.after[2].held == 0);
        assert!(!found.cosine.is_empty());
    }

    #[test]
    fn wholes_are_compared_by_load() {
        let model = ModelInfo { layers: 2, experts: 4, ..Shape::small().subject().model };
        let mut store = Store::new(4, 1 << 20);
        // A: experts 0 and 1 equally. B: 0 and 2, and once an expert that the model does not have.
        text(&mut store, 0, &[1; 6], |_| ([0, 1], [0.5, 0.5], [1.0, 0.0]));
        text(&mut store, 1, &[2; 2], |at| ([0, if at == 0 { 2 } else { 77 }], [0.5, 0.5], [1.0, 0.0]));
        let wholes = as_wholes(&model, store.sequence(0).unwrap(), store.sequence(1).unwrap());
        assert_eq!(wholes.held, [[0, 6], [0, 2]]);
        assert!(wholes.divergence[0].is_nan() && wholes.shares[0][..4].iter().all(|share| share.is_nan()));
        assert_eq!(wholes.shares[0][4..], [0.5, 0.5, 0.0, 0.0]);
        assert!((wholes.shares[1][4] - 2.0 / 3.0).abs() < 1e-6);
        let expected = by_entropy(&[3.0, 3.0, 0.0, 0.0], &[2.0, 0.0, 1.0, 0.0]) as f32;
        assert!((wholes.divergence[1] - expected).abs() < 1e-6);
        let differences = wholes.differences(2);
        let places: Vec<(u32, u32)> = differences.iter().map(|d| (d.layer, d.expert)).collect();
        assert_eq!(places, [(1, 1), (1, 2)], "{differences:?}");
        assert_eq!((differences[0].a, differences[0].b), (0.5, 0.0));
    }

    #[test]
    fn a_text_is_no_way_from_itself() {
        let shape = Shape::small();
        let (model, store) = (shape.subject().model, synthetic::store(&shape));
        let text = store.sequence(1).unwrap();
        let found = by_position(&model, text, text);
        assert_eq!((found.positions, found.first_difference), (96, None));
        for layer in 1..4 {
            assert_eq!(found.divergence.before[layer], Summary { mean: 0.0, least: 0.0, most: 0.0, held: 96 });
            assert_eq!(found.overlap.before[layer].least, 1.0);
            assert!(found.cosine.before[layer].least > 1.0 - 1e-6 && found.cosine.after[layer].held == 0);
        }
        let wholes = as_wholes(&model, text, text);
        assert!(wholes.divergence[1..].iter().all(|bits| *bits == 0.0) && wholes.differences(9).is_empty());
    }
}
