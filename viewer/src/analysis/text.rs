//! What is said of each token of a text, and where its lines break.

use moewe_plan::TapGroup;

use crate::store::{Key, Part, Sequence};

/// A number that is told of each token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Quantity {
    /// Nothing.
    None,
    /// −log p of the token, in nats, by the prediction at the position before it.
    #[default]
    Surprise,
    /// Entropy in nats of the prediction that the token was drawn from: the one at the position before it.
    PredictionEntropy,
    /// Entropy in nats of how the router of a layer spreads a token over experts; see [`EntropyOf`].
    RouterEntropy,
    /// Number of the expert of a layer that has the largest weight.
    Expert,
    /// 1 where the draft of the module of multi-token prediction named the token, 0 where it named another.
    Draft,
}

/// What the router's entropy is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntropyOf {
    /// The softmax of the router's logits over all experts.
    Logits,
    /// The weights of the chosen experts, divided by their sum.
    Weights,
}

impl Quantity {
    /// All, in the order of the menu.
    pub const ALL: [Self; 6] =
        [Self::Surprise, Self::PredictionEntropy, Self::RouterEntropy, Self::Expert, Self::Draft, Self::None];

    /// The name in the menu.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Surprise => "surprise",
            Self::PredictionEntropy => "prediction entropy",
            Self::RouterEntropy => "router entropy",
            Self::Expert => "dominant expert",
            Self::Draft => "draft accepted",
        }
    }

    /// What it means, for a newcomer.
    pub fn about(self) -> &'static str {
        match self {
            Self::None => "Plain text.",
            Self::Surprise => {
                "Surprise: −log p of a token, in nats. 0 means that the model was certain of it, 4.6 that it gave it 1 %."
            }
            Self::PredictionEntropy => {
                "Prediction entropy: how undecided the model was before a token came, whichever came then, in nats. \
                 0 means that only one token was possible for it."
            }
            Self::RouterEntropy => {
                "Router entropy: how evenly the router of a layer spreads a token over its experts, in nats. 0 means \
                 that one expert gets everything."
            }
            Self::Expert => "Dominant expert: the expert of a layer that has the largest weight for a token.",
            Self::Draft => {
                "Draft accepted: whether the small module that guesses a token ahead (multi-token prediction) named the \
                 token that came."
            }
        }
    }

    /// The group of taps without which there is nothing to tell.
    pub fn needs(self) -> Option<TapGroup> {
        match self {
            Self::None => None,
            Self::Surprise | Self::PredictionEntropy => Some(TapGroup::Logits),
            Self::RouterEntropy | Self::Expert => Some(TapGroup::Routing),
            Self::Draft => Some(TapGroup::Mtp),
        }
    }

    /// Whether it is another one in each layer.
    pub fn has_layer(self) -> bool {
        matches!(self, Self::RouterEntropy | Self::Expert)
    }

    /// The tensors that it is read from.
    pub fn keys(self, layer: u32) -> Vec<Key> {
        match self {
            Self::None => Vec::new(),
            Self::Surprise | Self::PredictionEntropy => vec![STATS],
            Self::RouterEntropy => vec![SCORES.at(layer), WEIGHTS.at(layer)],
            Self::Expert => vec![IDS.at(layer), WEIGHTS.at(layer)],
            Self::Draft => vec![DRAFT],
        }
    }
}

/// Entropy, log probability and rank at each position.
pub const STATS: Key = Key { group: TapGroup::Logits, layer: None, part: Part::Stats };
/// Drafts of the first module of multi-token prediction.
const DRAFT: Key = Key { group: TapGroup::Mtp, layer: None, part: Part::Ids };
const SCORES: Of = Of(TapGroup::Scores, Part::RouterLogits);
const IDS: Of = Of(TapGroup::Routing, Part::Ids);
const WEIGHTS: Of = Of(TapGroup::Routing, Part::Weights);

struct Of(TapGroup, Part);

impl Of {
    fn at(&self, layer: u32) -> Key {
        Key::layer(self.0, layer, self.1)
    }
}

/// What a quantity is at a token; `None` where it was not seen or is no number.
pub fn value(sequence: &Sequence, quantity: Quantity, layer: u32, position: usize) -> Option<f32> {
    let before = || position.checked_sub(1);
    let value = match quantity {
        Quantity::None => None,
        // A prediction's statistics stand at the token before the one that is predicted.
        Quantity::Surprise => sequence.floats(STATS, before()?)?.get(1).map(|log| -log),
        Quantity::PredictionEntropy => sequence.floats(STATS, before()?)?.first().copied(),
        Quantity::RouterEntropy => router_entropy(sequence, layer, position).map(|(entropy, _)| entropy),
        Quantity::Expert => dominant(sequence, layer, position).map(|expert| expert as f32),
        Quantity::Draft => {
            let draft = sequence.ints(DRAFT, before()?)?.first()?;
            let token = sequence.tokens.get(position)?;
            Some(f32::from(u8::from(*draft == token.id)))
        }
    };
    value.filter(|value| value.is_finite())
}

/// Entropy in nats of the router of a layer at a token, and what it was taken of: the logits, if they are held.
pub fn router_entropy(sequence: &Sequence, layer: u32, position: usize) -> Option<(f32, EntropyOf)> {
    if let Some(logits) = sequence.floats(SCORES.at(layer), position) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        return Some((entropy(logits.iter().map(|logit| f64::from(logit - most).exp()))?, EntropyOf::Logits));
    }
    let weights = sequence.floats(WEIGHTS.at(layer), position)?;
    Some((entropy(weights.iter().map(|weight| f64::from(*weight)))?, EntropyOf::Weights))
}

/// The entropy in nats of masses that need not sum to 1; `None` if they are negative, no numbers or all 0.
fn entropy(masses: impl Iterator<Item = f64> + Clone) -> Option<f32> {
    let sum: f64 = masses.clone().sum();
    if !sum.is_finite() || sum <= 0.0 || masses.clone().any(|mass| mass < 0.0) {
        return None;
    }
    let terms = masses.filter(|mass| *mass > 0.0).map(|mass| mass / sum);
    Some(terms.map(|share| -share * share.ln()).sum::<f64>().max(0.0) as f32)
}

/// The expert of a layer that has the largest weight at a token; the first of equals.
pub fn dominant(sequence: &Sequence, layer: u32, position: usize) -> Option<u32> {
    let (ids, weights) = sequence.routing(layer, position)?;
    let pairs = ids.iter().zip(weights).filter(|(_, weight)| weight.is_finite());
    pairs.rev().max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(id, _)| *id)
}

/// A quantity along a whole text.
#[derive(Clone, Debug, Default)]
pub struct Along {
    /// `[tokens]`; NaN where it is not known.
    pub values: Vec<f32>,
    /// For how many tokens it is known.
    pub known: usize,
    /// Least and most; 0 and 1 if nothing is known.
    pub range: (f32, f32),
    /// For [`Quantity::Expert`]: experts and for how many tokens they dominate, the most frequent first.
    pub experts: Vec<(u32, usize)>,
}

impl Along {
    /// Reads all of a text.
    pub fn read(sequence: &Sequence, quantity: Quantity, layer: u32) -> Self {
        let values: Vec<f32> = (0..sequence.tokens.len())
            .map(|position| value(sequence, quantity, layer, position).unwrap_or(f32::NAN))
            .collect();
        let known = || values.iter().copied().filter(|value| !value.is_nan());
        let range = known().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        let mut counts = std::collections::BTreeMap::<u32, usize>::new();
        if quantity == Quantity::Expert {
            known().for_each(|expert| *counts.entry(expert as u32).or_default() += 1);
        }
        let mut experts: Vec<(u32, usize)> = counts.into_iter().collect();
        experts.sort_by_key(|&(expert, count)| (std::cmp::Reverse(count), expert));
        let count = known().count();
        Self { known: count, range: if count > 0 { range } else { (0.0, 1.0) }, experts, values }
    }
}

/// How a token stands in a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    /// Its width.
    pub width: f32,
    /// Whether a line may break before it.
    pub begins_word: bool,
    /// Whether a line ends behind it.
    pub ends_line: bool,
}

/// Where the lines of a text begin: broken between words where that is possible, else between tokens. Tokens are pushed
/// one by one, so a growing text costs only what is new.
#[derive(Clone, Debug)]
pub struct Lines {
    room: f32,
    starts: Vec<usize>,
    tokens: usize,
    x: f32,
    /// First token of the last word, and where it begins.
    word: (usize, f32),
    ended: bool,
}

impl Lines {
    /// No tokens yet, in lines of a width.
    pub fn new(room: f32) -> Self {
        Self { room, starts: Vec::new(), tokens: 0, x: 0.0, word: (0, 0.0), ended: true }
    }

    /// Puts a token behind the others.
    pub fn push(&mut self, piece: Piece) {
        let token = self.tokens;
        let width = piece.width.min(self.room);
        if self.ended {
            self.begin_line(token, 0.0);
            self.word = (token, 0.0);
        } else if piece.begins_word {
            self.word = (token, self.x);
        }
        if self.x + width > self.room && self.x > 0.0 {
            let (first, at) = self.word;
            let carried = self.x - at;
            if at > 0.0 && carried + width <= self.room {
                self.begin_line(first, carried);
                self.word = (first, 0.0);
            } else {
                self.begin_line(token, 0.0);
                self.word = (token, 0.0);
            }
        }
        self.x += width;
        self.ended = piece.ends_line;
        self.tokens += 1;
    }

    fn begin_line(&mut self, first: usize, x: f32) {
        self.starts.push(first);
        self.x = x;
    }

    /// Tokens that were pushed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many lines there are.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The tokens of a line.
    pub fn line(&self, line: usize) -> std::ops::Range<usize> {
        let at = |line: usize| self.starts.get(line).copied().unwrap_or(self.tokens);
        at(line)..at(line + 1)
    }

    /// The line that a token stands in.
    pub fn line_of(&self, token: usize) -> usize {
        self.starts.partition_point(|&first| first <= token).saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{SequenceInfo, Store, Token};
    use moewe_plan::{FrameTensor, FrameToken, Numbers, TapFrame};

    /// Four tokens 7, 8, 9, 7 with made-up rows; the last token's frame never came.
    fn store() -> Store {
        let mut store = Store::new(4, 1 << 20);
        store.begin(SequenceInfo::default());
        let ids = [7, 8, 9, 7];
        for id in ids {
            store.push_token(0, Token { id, generated: false });
        }
        let tensor =
            |name: &str, group, layer, columns, data| FrameTensor { name: name.into(), group, layer, columns, data };
        let tokens = (0..3).map(|i| FrameToken { sequence: 0, position: i, id: ids[i as usize] });
        let stats = vec![0.5, -1.0, 0.0, 0.6, f32::NEG_INFINITY, 9.0, 0.7, -3.0, 2.0];
        let weights = vec![0.5, 0.5, 0.25, 0.75, f32::NAN, 1.0];
        store.push_frame(&TapFrame {
            tokens: tokens.collect(),
            tensors: vec![
                tensor("logits.stats", TapGroup::Logits, None, 3, Numbers::F32(stats)),
                tensor("moe.1.ids", TapGroup::Routing, Some(1), 2, Numbers::U32(vec![3, 1, 0, 2, 1, 2])),
                tensor("moe.1.weights", TapGroup::Routing, Some(1), 2, Numbers::F32(weights)),
                tensor("moe.2.router_logits", TapGroup::Scores, Some(2), 4, Numbers::F32(vec![1.0; 12])),
                tensor("mtp.1.ids", TapGroup::Mtp, None, 2, Numbers::U32(vec![8, 1, 8, 9, 7, 0])),
            ],
            ..TapFrame::default()
        });
        store
    }

    #[test]
    fn a_tokens_prediction_stands_at_the_token_before_it() {
        let store = store();
        let all = |quantity| Along::read(&store.sequences()[0], quantity, 1);
        let surprise = all(Quantity::Surprise);
        assert!(surprise.values[0].is_nan() && surprise.values[2].is_nan());
        assert_eq!((surprise.values[1], surprise.values[3]), (1.0, 3.0));
        assert_eq!((surprise.known, surprise.range), (2, (1.0, 3.0)));
        assert_eq!(all(Quantity::PredictionEntropy).values[1..], [0.5, 0.6, 0.7]);
        assert_eq!(all(Quantity::Draft).values[1..], [1.0, 0.0, 1.0]);
        assert_eq!(all(Quantity::None).known, 0);
    }

    #[test]
    fn experts_and_router_entropy_are_those_of_the_token_itself() {
        let store = store();
        let sequence = &store.sequences()[0];
        assert_eq!([0, 1, 2, 3].map(|at| dominant(sequence, 1, at)), [Some(3), Some(2), Some(2), None]);
        assert_eq!(Along::read(sequence, Quantity::Expert, 1).experts, [(2, 2), (3, 1)]);
        let (even, of) = router_entropy(sequence, 1, 0).unwrap();
        assert!((even - 2f32.ln()).abs() < 1e-6 && of == EntropyOf::Weights);
        assert_eq!(router_entropy(sequence, 1, 2), None, "a weight that is no number");
        let (flat, of) = router_entropy(sequence, 2, 1).unwrap();
        assert!((flat - 4f32.ln()).abs() < 1e-6 && of == EntropyOf::Logits);
        assert_eq!(router_entropy(sequence, 3, 1), None);
    }

    #[test]
    fn entropy_needs_no_normalised_numbers() {
        let uneven = entropy([3.0, 1.0].into_iter()).unwrap();
        assert!((uneven - (-0.75 * 0.75f32.ln() - 0.25 * 0.25f32.ln())).abs() < 1e-6);
        assert_eq!(entropy([0.0, 5.0].into_iter()), Some(0.0));
        for wrong in [vec![], vec![0.0, 0.0], vec![1.0, -0.5], vec![f64::INFINITY, 1.0]] {
            assert_eq!(entropy(wrong.iter().copied()), None, "{wrong:?}");
        }
    }

    /// Lays out all at once, looking ahead to the end of each word.
    fn slow(pieces: &[Piece], room: f32) -> Vec<usize> {
        let (mut starts, mut x, mut i) = (vec![], f32::INFINITY, 0);
        while i < pieces.len() {
            let mut end = i + 1;
            while end < pieces.len() && !pieces[end].begins_word && !pieces[end - 1].ends_line {
                end += 1;
            }
            let word: f32 = pieces[i..end].iter().map(|piece| piece.width.min(room)).sum();
            if x + word > room && word <= room {
                starts.push(i);
                x = 0.0;
            }
            for (token, piece) in pieces.iter().enumerate().take(end).skip(i) {
                let width = piece.width.min(room);
                if x + width > room {
                    starts.push(token);
                    x = 0.0;
                }
                x += width;
            }
            x = if pieces[end - 1].ends_line { f32::INFINITY } else { x };
            i = end;
        }
        starts
    }

    proptest::proptest! {
        #[test]
        fn lines_break_where_a_slow_layout_breaks_them(
            made in proptest::collection::vec((0u8..40, 0u8..3, 0u8..8), 0..80), room in 10u8..100,
        ) {
            // Whole numbers: sums are exact in any order.
            let piece = |&(width, word, end): &(u8, u8, u8)| Piece {
                width: f32::from(width), begins_word: word == 0, ends_line: end == 0,
            };
            let pieces: Vec<Piece> = made.iter().map(piece).collect();
            let mut lines = Lines::new(f32::from(room));
            for piece in &pieces {
                lines.push(*piece);
            }
            // Words longer than a line fill what is left of the line before in the slow layout, too.
            let fits = pieces.split_inclusive(|piece| piece.ends_line).all(|part| {
                part.chunk_by(|_, next| !next.begins_word)
                    .all(|word| word.iter().map(|piece| piece.width.min(f32::from(room))).sum::<f32>() <= f32::from(room))
            });
            if fits {
                proptest::prop_assert_eq!(&lines.starts, &slow(&pieces, f32::from(room)));
            }
            proptest::prop_assert_eq!(lines.tokens(), pieces.len());
            for line in 0..lines.len() {
                let tokens = lines.line(line);
                proptest::prop_assert!(!tokens.is_empty() && lines.line_of(tokens.start) == line);
                proptest::prop_assert_eq!(lines.line_of(tokens.end - 1), line);
                let widths = pieces[tokens.clone()].iter().map(|piece| piece.width.min(f32::from(room)));
                proptest::prop_assert!(widths.sum::<f32>() <= f32::from(room));
            }
        }
    }
}
