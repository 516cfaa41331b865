//! Who uses an expert, and with which others.

use crate::store::Sequence;

/// Bins of the histogram of weights.
pub const BINS: usize = 24;

/// A token that chose an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Use {
    /// Number of the text.
    pub sequence: u32,
    /// Position in it.
    pub position: u32,
    /// The expert's weight there.
    pub weight: f32,
    /// Its place among the token's experts, from 0.
    pub rank: u32,
}

/// What a text gives to an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Number of the text.
    pub sequence: u32,
    /// Tokens whose routing is held.
    pub tokens: u64,
    /// Those that chose the expert.
    pub chosen: u64,
}

/// An expert that was chosen together with another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// The other expert.
    pub expert: u32,
    /// Tokens that chose both.
    pub both: u64,
    /// Tokens that chose the other one.
    pub alone: u64,
}

/// What one pass over the routing of a layer says of one of its experts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Tokens whose routing is held.
    pub tokens: u64,
    /// Those that chose the expert.
    pub chosen: u64,
    /// Those of which it was the first choice.
    pub first: u64,
    /// Sum of its weights.
    pub weight: f64,
    /// The tokens with its largest weights, the largest first.
    pub uses: Vec<Use>,
    /// By text, in the order of the store.
    pub shares: Vec<Share>,
    /// How many weights are in each bin from 0 to [`Report::most`].
    pub bins: Vec<u64>,
    /// The largest weight.
    pub most: f32,
    /// Other experts that were chosen with it, the most frequent first.
    pub pairs: Vec<Pair>,
}

impl Report {
    /// Reads what is held of all texts. Keeps `uses` tokens. Weights that are no numbers count as 0.
    pub fn read(sequences: &[Sequence], layer: u32, expert: u32, experts: usize, uses: usize) -> Self {
        let mut report = Self { bins: vec![0; BINS], ..Self::default() };
        let (mut both, mut alone) = (vec![0u64; experts], vec![0u64; experts]);
        for sequence in sequences {
            let mut share = Share { sequence: sequence.info.number, ..Share::default() };
            for position in 0..sequence.tokens.len() {
                let Some((ids, weights)) = sequence.routing(layer, position) else { continue };
                share.tokens += 1;
                let rank = ids.iter().position(|id| *id == expert);
                for &id in ids {
                    if let Some(count) = alone.get_mut(id as usize) {
                        *count += 1;
                        both[id as usize] += u64::from(rank.is_some());
                    }
                }
                if let Some(rank) = rank {
                    let weight = weights.get(rank).copied().filter(|weight| weight.is_finite()).unwrap_or(0.0);
                    share.chosen += 1;
                    report.first += u64::from(rank == 0);
                    report.weight += f64::from(weight);
                    let (sequence, position) = (share.sequence, position as u32);
                    report.uses.push(Use { sequence, position, weight, rank: rank as u32 });
                }
            }
            report.tokens += share.tokens;
            report.chosen += share.chosen;
            report.shares.push(share);
        }
        report.most = report.uses.iter().fold(0.0, |most, used| used.weight.max(most));
        for used in &report.uses {
            report.bins[bin(used.weight, report.most)] += 1;
        }
        // The sort keeps the order of texts and tokens among equals.
        report.uses.sort_by(|a, b| b.weight.total_cmp(&a.weight));
        report.uses.truncate(uses);
        let pairs = (0..experts as u32).zip(both).zip(alone).filter(|((other, both), _)| *other != expert && *both > 0);
        report.pairs = pairs.map(|((expert, both), alone)| Pair { expert, both, alone }).collect();
        report.pairs.sort_by_key(|pair| (std::cmp::Reverse(pair.both), pair.expert));
        report
    }

    /// How much more often than elsewhere a text chooses the expert: its share of the expert's traffic over its share of
    /// all tokens. `None` if the expert was never chosen or nothing is known of the text.
    pub fn lift(&self, share: &Share) -> Option<f64> {
        (self.chosen > 0 && share.tokens > 0)
            .then(|| (share.chosen as f64 / self.chosen as f64) / (share.tokens as f64 / self.tokens as f64))
    }

    /// How much more often two experts are chosen together than if they were chosen independently of each other.
    pub fn pair_lift(&self, pair: &Pair) -> f64 {
        let expected = self.chosen as f64 * pair.alone as f64 / self.tokens as f64;
        if expected > 0.0 { pair.both as f64 / expected } else { 0.0 }
    }
}

/// The bin of a weight when the largest is `most`.
fn bin(weight: f32, most: f32) -> usize {
    if most > 0.0 { ((weight / most * BINS as f32).max(0.0) as usize).min(BINS - 1) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{self, Shape};

    /// Text, position, and experts with their weights.
    type Row = (u32, u32, Vec<(u32, f32)>);

    /// Everything counted again, token by token and pair by pair.
    #[test]
    fn a_report_is_what_a_slow_count_says() {
        let store = synthetic::store(&Shape::small());
        for (layer, expert) in [(1, 0), (2, 5), (3, 31)] {
            let report = Report::read(store.sequences(), layer, expert, 32, 10);
            let rows: Vec<Row> = store
                .sequences()
                .iter()
                .flat_map(|s| (0..s.tokens.len()).map(move |at| (s, at)))
                .map(|(s, at)| {
                    let (ids, weights) = s.routing(layer, at).unwrap();
                    (s.info.number, at as u32, ids.iter().copied().zip(weights.iter().copied()).collect())
                })
                .collect();
            let weight_of = |row: &[(u32, f32)], of: u32| row.iter().find(|(id, _)| *id == of).map(|(_, w)| *w);
            let with = |of: u32| rows.iter().filter(move |(_, _, row)| weight_of(row, of).is_some());
            assert_eq!((report.tokens, report.chosen), (288, with(expert).count() as u64));
            assert_eq!(report.first, rows.iter().filter(|(_, _, row)| row[0].0 == expert).count() as u64);
            let sum: f64 = with(expert).filter_map(|(_, _, row)| weight_of(row, expert)).map(f64::from).sum();
            assert!((report.weight - sum).abs() < 1e-6);
            assert_eq!(report.bins.iter().sum::<u64>(), report.chosen);
            assert_eq!(report.uses.len() as u64, report.chosen.min(10));
            for (a, b) in report.uses.iter().zip(report.uses.iter().skip(1)) {
                let key = |used: &Use| (-used.weight, used.sequence, used.position);
                assert!(key(a) < key(b), "{a:?} {b:?}");
            }
            for pair in &report.pairs {
                let both = with(expert).filter(|(_, _, row)| weight_of(row, pair.expert).is_some()).count();
                assert_eq!((pair.both, pair.alone), (both as u64, with(pair.expert).count() as u64));
                let (p, q) = (report.chosen as f64 / 288.0, pair.alone as f64 / 288.0);
                assert!((report.pair_lift(pair) - both as f64 / 288.0 / (p * q)).abs() < 1e-9);
            }
            let others = report.pairs.iter().map(|pair| pair.both).sum::<u64>();
            assert_eq!(others, report.chosen * 3, "each token has three other experts");
            for share in &report.shares {
                let chosen = with(expert).filter(|(text, _, _)| *text == share.sequence).count() as u64;
                assert_eq!((share.tokens, share.chosen), (96, chosen));
                if report.chosen > 0 {
                    let lift = (chosen as f64 / 96.0) / (report.chosen as f64 / 288.0);
                    assert!((report.lift(share).unwrap() - lift).abs() < 1e-9);
                }
            }
        }
    }

    #[test]
    fn nothing_seen_gives_nothing() {
        let report = Report::read(&[], 1, 3, 8, 5);
        assert_eq!((report.tokens, report.chosen, report.uses.len(), report.pairs.len()), (0, 0, 0, 0));
        assert_eq!(report.lift(&Share::default()), None);
    }
}
