//! What the logit lens says, layer by layer: see [`moewe_plan::TapGroup::Lens`].

use moewe_plan::TapGroup;

use crate::store::{Column, Key, Part, Sequence};

/// What is asked of each layer about the model's final prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Measure {
    /// How many tokens the layer holds likelier.
    #[default]
    Rank,
    /// Its probability.
    Probability,
    /// How undecided the layer is, in nats, whatever the prediction.
    Entropy,
}

impl Measure {
    /// The measure from a row of `lens.{l}.stats`; NaN if the row has too few numbers.
    pub fn of(self, stats: &[f32]) -> f32 {
        let [entropy, log_probability, rank] = *stats else { return f32::NAN };
        match self {
            Measure::Rank => rank,
            Measure::Probability => log_probability.exp(),
            Measure::Entropy => entropy,
        }
    }
}

/// `lens.{l}.stats` along a text, for each layer that has any.
#[derive(Clone, Debug)]
pub struct Lens {
    /// The layers, in order.
    pub layers: Vec<u32>,
    stats: Vec<Column>,
}

impl Lens {
    /// What a text has.
    pub fn of(sequence: &Sequence) -> Self {
        let is_stats = |key: &Key| key.group == TapGroup::Lens && key.part == Part::Stats;
        let layers: Vec<u32> = sequence.keys().filter(is_stats).filter_map(|key| key.layer).collect();
        let column = |&layer: &u32| sequence.column(Key::layer(TapGroup::Lens, layer, Part::Stats)).cloned();
        let stats = layers.iter().filter_map(column).collect();
        Self { layers, stats }
    }

    /// A measure by layer at one token; NaN where a row is missing.
    pub fn at(&self, position: usize, measure: Measure) -> Vec<f32> {
        self.stats.iter().map(|stats| stats.floats(position).map_or(f32::NAN, |stats| measure.of(stats))).collect()
    }

    /// A measure over the first `tokens` positions: `[layers, tokens]`.
    pub fn map(&self, tokens: usize, measure: Measure) -> Vec<f32> {
        let row = |stats: &Column| -> Vec<f32> {
            (0..tokens).map(|at| stats.floats(at).map_or(f32::NAN, |stats| measure.of(stats))).collect()
        };
        self.stats.iter().flat_map(row).collect()
    }

    /// The layer from which on the final prediction stays on top, by token.
    pub fn settling(&self, tokens: usize) -> Vec<Option<u32>> {
        (0..tokens).map(|at| settles(&self.at(at, Measure::Rank)).map(|index| self.layers[index])).collect()
    }
}

/// The first index from which on all ranks are 0; `None` if the last one is not, or any behind it is missing.
pub fn settles(ranks: &[f32]) -> Option<usize> {
    let behind = ranks.iter().rev().take_while(|rank| **rank == 0.0).count();
    let first = ranks.len() - behind;
    // A missing rank in front of it may have been 0 as well.
    let is_known = first == 0 || !ranks[first - 1].is_nan();
    (behind > 0 && is_known).then_some(first)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these numbers are exact")]
mod tests {
    use moewe_plan::{FrameTensor, FrameToken, Numbers, TapFrame};

    use super::*;
    use crate::store::{SequenceInfo, Store, Token};

    #[test]
    fn an_answer_settles_where_it_stays_on_top() {
        assert_eq!(settles(&[3.0, 0.0, 1.0, 0.0, 0.0]), Some(3));
        assert_eq!(settles(&[0.0, 0.0]), Some(0));
        assert_eq!(settles(&[0.0, 1.0]), None);
        assert_eq!(settles(&[0.0, f32::NAN]), None);
        assert_eq!(settles(&[0.0, f32::NAN, 0.0]), None, "it may have been on top before");
        assert_eq!(settles(&[]), None);
    }

    #[test]
    fn maps_have_a_row_for_each_recorded_layer_and_gaps_where_rows_are_missing() {
        let mut store = Store::new(0, 1 << 20);
        store.begin(SequenceInfo { number: 7, ..SequenceInfo::default() });
        for id in 0..3 {
            store.push_token(7, Token { id, generated: false });
        }
        let stats = |layer: u32, data: Vec<f32>| FrameTensor {
            name: format!("lens.{layer}.stats").into(),
            group: TapGroup::Lens,
            layer: Some(layer),
            columns: 3,
            data: Numbers::F32(data),
        };
        let tokens = [0, 2].map(|position| FrameToken { sequence: 7, position, id: position }).to_vec();
        let tensors = vec![
            stats(2, vec![1.0, 0.5f32.ln(), 4.0, 2.0, 0.25f32.ln(), 0.0]),
            stats(10, vec![3.0, 0.0, 0.0, 4.0, -1.0, 0.0]),
        ];
        store.push_frame(&TapFrame { tokens, tensors, ..TapFrame::default() });
        let lens = Lens::of(store.sequence(7).unwrap());
        assert_eq!(lens.layers, [2, 10]);
        let map = lens.map(3, Measure::Rank);
        assert_eq!([map[0], map[2], map[3], map[5]], [4.0, 0.0, 0.0, 0.0]);
        assert!(map[1].is_nan() && map[4].is_nan());
        assert_eq!(lens.at(2, Measure::Entropy), [2.0, 4.0]);
        assert!((lens.at(0, Measure::Probability)[0] - 0.5).abs() < 1e-6);
        assert_eq!(lens.settling(3), [Some(10), None, Some(2)]);
    }
}
