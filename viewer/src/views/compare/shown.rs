//! What is compared of two texts, and what of it is drawn.

use moewe_plan::{ModelInfo, TapGroup};

use crate::analysis::divergence::{ByPosition, Difference, Map, Summary, Wholes, as_wholes, by_position};
use crate::heat::Grid;
use crate::jobs::coarse;
use crate::store::{Key, Part, Sequence, Store};

/// Experts that are listed at most.
const LISTED: usize = 500;

/// What is compared position by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Divergence of routing.
    Divergence,
    /// Experts in common.
    Overlap,
    /// Cosine of hidden states.
    Cosine,
}

impl Measure {
    /// All of them.
    pub const ALL: [Measure; 3] = [Measure::Divergence, Measure::Overlap, Measure::Cosine];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Measure::Divergence => "routing",
            Measure::Overlap => "experts in common",
            Measure::Cosine => "hidden states",
        }
    }

    /// What it is, for a newcomer.
    pub fn about(self) -> &'static str {
        match self {
            Measure::Divergence => {
                "Jensen–Shannon divergence of the weights that a token's experts get: 0 bits if both texts weigh the same \
                 experts alike, 1 bit if they have no expert in common."
            }
            Measure::Overlap => "The share of a token's experts that both texts choose, whatever their weights.",
            Measure::Cosine => {
                "The hidden state is the vector that a layer hands on. Its cosine is 1 if it points the same way in both \
                 texts, 0 if the two have nothing in common."
            }
        }
    }

    /// Unit of means and extremes.
    pub fn unit(self) -> &'static str {
        match self {
            Measure::Divergence => "bits",
            Measure::Overlap => "share in common",
            Measure::Cosine => "cosine",
        }
    }

    /// Unit of the map, where more is farther.
    pub fn distance(self) -> &'static str {
        match self {
            Measure::Divergence => "bits (Jensen–Shannon)",
            Measure::Overlap => "share of experts that changed",
            Measure::Cosine => "1 − cosine",
        }
    }

    /// The taps that it needs.
    pub fn group(self) -> TapGroup {
        if self == Measure::Cosine { TapGroup::Hidden } else { TapGroup::Routing }
    }

    /// What was found.
    pub fn map(self, found: &ByPosition) -> &Map {
        match self {
            Measure::Divergence => &found.divergence,
            Measure::Overlap => &found.overlap,
            Measure::Cosine => &found.cosine,
        }
    }

    /// The number that is farthest from “the same”, and what to call it.
    pub fn farthest(self, summary: &Summary) -> (f32, &'static str) {
        if self == Measure::Divergence { (summary.most, "largest") } else { (summary.least, "smallest") }
    }
}

/// What a result depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct JobKey {
    /// Numbers of the texts.
    pub pair: (u32, u32),
    /// In coarse steps while a text is being written, when the version of the store changes with every token.
    tokens: (u64, u64),
    version: Option<u64>,
}

impl JobKey {
    /// The key of two texts as the store stands.
    pub fn new(store: &Store, a: &Sequence, b: &Sequence) -> Self {
        let is_writing = store.sequences().iter().any(|text| text.running);
        let tokens = |text: &Sequence| {
            let tokens = text.tokens.len() as u64;
            if is_writing { coarse(tokens) } else { tokens }
        };
        Self {
            pair: (a.info.number, b.info.number),
            tokens: (tokens(a), tokens(b)),
            version: (!is_writing).then(|| store.version()),
        }
    }
}

/// All that is drawn of two texts.
pub struct Shown {
    /// What was found position by position.
    pub found: ByPosition,
    /// How far the texts are from each other, `[layers, positions]`, by [`Measure`]. Their cells are not in `found`.
    pub maps: [Grid; 3],
    /// What was found of the texts as wholes.
    pub wholes: Wholes,
    /// Share in B less share in A, `[layers, experts]`.
    pub shares: Grid,
    /// The experts that the texts use most differently.
    pub differences: Vec<Difference>,
}

impl Shown {
    /// Compares two texts.
    pub fn new(model: &ModelInfo, a: &Sequence, b: &Sequence) -> Self {
        let mut found = by_position(model, a, b);
        let (layers, positions) = (model.layers as usize, found.positions);
        let grid = |map: &mut Map, distance: fn(f32) -> f32| {
            let mut cells = std::mem::take(&mut map.cells);
            for cell in &mut cells {
                *cell = distance(*cell);
            }
            Grid::from_zero(layers, positions, cells)
        };
        let maps = [
            grid(&mut found.divergence, |bits| bits),
            grid(&mut found.overlap, |share| 1.0 - share),
            grid(&mut found.cosine, |cosine| 1.0 - cosine),
        ];
        let wholes = as_wholes(model, a, b);
        let more = wholes.shares[0].iter().zip(&wholes.shares[1]).map(|(a, b)| b - a).collect();
        let shares = Grid::around_zero(layers, wholes.experts, more);
        let differences = wholes.differences(LISTED);
        Self { found, maps, wholes, shares, differences }
    }
}

/// The tensors that are compared.
pub fn tensors(model: &ModelInfo) -> Vec<Key> {
    let of_layer = |layer| {
        [(TapGroup::Routing, Part::Ids), (TapGroup::Routing, Part::Weights), (TapGroup::Hidden, Part::Hidden)]
            .map(|(group, part)| Key::layer(group, layer, part))
    };
    (0..model.layers).flat_map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{SequenceInfo, Token};

    #[test]
    fn a_text_that_is_written_is_compared_now_and_then_and_once_it_is_done() {
        let mut store = Store::new(4, 1 << 20);
        store.begin(SequenceInfo { number: 0, ..SequenceInfo::default() });
        store.begin(SequenceInfo { number: 1, ..SequenceInfo::default() });
        let key = |store: &Store| JobKey::new(store, &store.sequences()[0], &store.sequences()[1]);
        let mut keys = vec![key(&store)];
        for _ in 0..4096 {
            store.push_token(1, Token::default());
            let new = key(&store);
            if keys.last() != Some(&new) {
                keys.push(new);
            }
        }
        assert!((16..=150).contains(&keys.len()), "{} times", keys.len());
        let before = key(&store);
        store.end(0);
        store.end(1);
        assert!(key(&store) != before && key(&store) == key(&store));
    }
}
