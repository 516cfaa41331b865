//! Drafts of multi-token prediction, held against the text that was written.

use moewe_plan::TapGroup;

use crate::store::{Column, Key, Part, Sequence, Token};
use crate::subject::Subject;

/// Bars of a plot over positions or confidences, at most.
pub const BINS: usize = 16;

/// A draft and what became of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draft {
    /// Position of the token that was drafted; the draft was made one before.
    pub position: usize,
    /// The likeliest token to the module.
    pub draft: u32,
    /// Its probability.
    pub probability: f32,
    /// The token that the text has there.
    pub written: u32,
    /// Whether the model wrote that token; else it was given.
    pub generated: bool,
    /// Place of the written token among the module's likeliest, if it is there. 0 is the draft itself.
    pub place: Option<usize>,
}

impl Draft {
    /// Whether the draft is what was written.
    pub fn is_accepted(&self) -> bool {
        self.draft == self.written
    }
}

/// The tensors of the first module's drafts.
pub fn key(part: Part) -> Key {
    Key { group: TapGroup::Mtp, layer: None, part }
}

/// The key under which the drafts of a text stand: with their module's layer, or without one.
pub fn find(sequence: &Sequence, part: Part) -> Option<Key> {
    let is_draft = |found: &Key| found.group == TapGroup::Mtp && found.part == part;
    sequence.keys().find(|found| *found == key(part)).or_else(|| sequence.keys().find(is_draft))
}

/// A text and its drafts, without all else that was seen of it.
#[derive(Clone, Debug)]
pub struct Along {
    /// The text's number.
    pub number: u32,
    /// Its name.
    pub name: String,
    tokens: Vec<Token>,
    rows: Option<(Column, Column)>,
}

impl Along {
    /// What there is of a text.
    pub fn of(sequence: &Sequence) -> Self {
        let column = |part| find(sequence, part).and_then(|key| sequence.column(key)).cloned();
        let (number, name) = (sequence.info.number, sequence.info.name.clone());
        let rows = column(Part::Ids).zip(column(Part::Probs));
        Self { number, name, tokens: sequence.tokens.clone(), rows }
    }

    /// Tokens of the text.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The drafts of the text, and how many of its tokens have none though they could: the first that can is the third.
    pub fn drafts(&self) -> (Vec<Draft>, usize) {
        let Some((ids, probs)) = &self.rows else { return (Vec::new(), self.tokens.len().saturating_sub(2)) };
        let mut missing = 0;
        let mut drafts = Vec::with_capacity(self.tokens.len());
        for (position, token) in self.tokens.iter().enumerate().skip(1) {
            match (ids.ints(position - 1), probs.floats(position - 1)) {
                (Some(ids @ [draft, ..]), Some([probability, ..])) => drafts.push(Draft {
                    position,
                    draft: *draft,
                    probability: *probability,
                    written: token.id,
                    generated: token.generated,
                    place: ids.iter().position(|id| *id == token.id),
                }),
                _ => missing += usize::from(position > 1),
            }
        }
        (drafts, missing)
    }
}

/// How many of how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Drafts that were what was written.
    pub accepted: usize,
    /// All of them.
    pub of: usize,
}

impl Share {
    /// The share of a list.
    pub fn of<'a>(drafts: impl IntoIterator<Item = &'a Draft>) -> Self {
        let mut share = Self::default();
        drafts.into_iter().for_each(|draft| share.add(draft));
        share
    }

    /// One more.
    pub fn add(&mut self, draft: &Draft) {
        self.accepted += usize::from(draft.is_accepted());
        self.of += 1;
    }

    /// As a number from 0 to 1; NaN of nothing.
    pub fn rate(self) -> f32 {
        self.accepted as f32 / self.of as f32
    }
}

/// Shares of consecutive stretches of positions: the first position of each, and its share. At most [`BINS`].
pub fn by_position(drafts: &[Draft]) -> Vec<(usize, Share)> {
    let Some(end) = drafts.iter().map(|draft| draft.position + 1).max() else { return Vec::new() };
    let step = end.div_ceil(BINS).max(8);
    let mut bins: Vec<(usize, Share)> = (0..end).step_by(step).map(|first| (first, Share::default())).collect();
    for draft in drafts {
        bins[draft.position / step].1.add(draft);
    }
    bins
}

/// Drafts of about equal probability.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Confidence {
    /// Their mean probability.
    pub probability: f32,
    /// How many came true.
    pub share: Share,
}

/// Drafts by tenths of their probability; empty tenths are left out. What is no probability is left out, too.
pub fn calibration(drafts: &[Draft]) -> Vec<Confidence> {
    let mut tenths = [(0.0f64, Share::default()); 10];
    for draft in drafts.iter().filter(|draft| (0.0..=1.0).contains(&draft.probability)) {
        let (sum, share) = &mut tenths[((draft.probability * 10.0) as usize).min(9)];
        *sum += f64::from(draft.probability);
        share.add(draft);
    }
    let filled = tenths.into_iter().filter(|(_, share)| share.of > 0);
    filled.map(|(sum, share)| Confidence { probability: (sum / share.of as f64) as f32, share }).collect()
}

/// What a token is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Letters.
    Word,
    /// A space, then letters.
    SpacedWord,
    /// Digits, maybe behind a space.
    Digits,
    /// Punctuation and symbols, maybe behind a space or before a line's end.
    Punctuation,
    /// Blanks and line ends alone.
    Space,
    /// All else: mixtures, parts of characters, special tokens, and everything if there is no tokenizer.
    Other,
}

impl Kind {
    /// All kinds, in the order in which they are listed.
    pub const ALL: [Kind; 6] =
        [Kind::Word, Kind::SpacedWord, Kind::Digits, Kind::Punctuation, Kind::Space, Kind::Other];

    /// The name shown to users.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Word => "word or part of one",
            Kind::SpacedWord => "space and word",
            Kind::Digits => "digits",
            Kind::Punctuation => "punctuation",
            Kind::Space => "white space",
            Kind::Other => "other",
        }
    }

    /// The kind of a token's text.
    pub fn of(piece: &str) -> Self {
        let core = piece.trim();
        let is_mark = |c: char| !c.is_alphanumeric() && !c.is_whitespace() && !c.is_control() && c != '\u{fffd}';
        if piece.is_empty() {
            Kind::Other
        } else if core.is_empty() {
            Kind::Space
        } else if core.chars().all(char::is_alphabetic) {
            if piece.len() == core.len() {
                Kind::Word
            } else if piece.strip_prefix(' ') == Some(core) {
                Kind::SpacedWord
            } else {
                Kind::Other
            }
        } else if core.chars().all(char::is_numeric) {
            Kind::Digits
        } else if core.chars().all(is_mark) {
            Kind::Punctuation
        } else {
            Kind::Other
        }
    }
}

/// Shares by the kind of the token that was written, in the order of [`Kind::ALL`].
pub fn by_kind(drafts: &[Draft], subject: &Subject) -> [Share; 6] {
    let mut shares = [Share::default(); 6];
    for draft in drafts {
        let kind = subject.pieces.get(draft.written as usize).map_or(Kind::Other, |piece| Kind::of(piece));
        shares[kind as usize].add(draft);
    }
    shares
}

#[cfg(test)]
mod tests {
    use moewe_plan::{FrameTensor, FrameToken, Numbers, TapFrame};

    use super::*;
    use crate::store::{SequenceInfo, Store};

    fn store(texts: &[u32], rows: &[(u32, [u32; 2], f32)]) -> Store {
        let mut store = Store::new(0, 1 << 20);
        store.begin(SequenceInfo::default());
        for (at, &id) in texts.iter().enumerate() {
            store.push_token(0, Token { id, generated: at > 2 });
        }
        let tensor = |part: &str, data| FrameTensor {
            name: format!("mtp.1.{part}").into(),
            group: TapGroup::Mtp,
            layer: Some(4),
            columns: 2,
            data,
        };
        let tokens = rows.iter().map(|row| FrameToken { sequence: 0, position: row.0, id: 0 }).collect();
        let ids = Numbers::U32(rows.iter().flat_map(|row| row.1).collect());
        let probs = Numbers::F32(rows.iter().flat_map(|row| [row.2, 0.0]).collect());
        let tensors = vec![tensor("ids", ids), tensor("probs", probs)];
        store.push_frame(&TapFrame { tokens, tensors, ..TapFrame::default() });
        store
    }

    #[test]
    fn a_draft_is_held_against_the_token_behind_it() {
        // The draft behind the last token has nothing to be held against; position 3 has no draft.
        let store = store(&[5, 6, 7, 8, 9], &[(1, [7, 1], 0.9), (3, [2, 9], 0.4), (4, [1, 2], 0.3)]);
        let (drafts, missing) = Along::of(store.sequence(0).unwrap()).drafts();
        assert_eq!(missing, 1);
        let found: Vec<_> = drafts.iter().map(|d| (d.position, d.is_accepted(), d.place, d.generated)).collect();
        assert_eq!(found, [(2, true, Some(0), false), (4, false, Some(1), true)]);
        assert_eq!(Share::of(&drafts), Share { accepted: 1, of: 2 });
        assert!(Share::default().rate().is_nan());
    }

    fn draft(position: usize, probability: f32, accepted: bool) -> Draft {
        Draft { position, draft: 1, probability, written: u32::from(accepted), generated: true, place: None }
    }

    #[test]
    fn bins_hold_every_draft_once() {
        for count in [1usize, 7, 8, 100, 1000] {
            let drafts: Vec<Draft> = (0..count).map(|at| draft(at, 0.5, at % 3 == 0)).collect();
            let bins = by_position(&drafts);
            assert!(bins.len() <= BINS);
            assert_eq!(bins.iter().map(|bin| bin.1.of).sum::<usize>(), count);
            let first = bins[0].1;
            assert_eq!(first.accepted, first.of.div_ceil(3));
        }
        assert!(by_position(&[]).is_empty());
    }

    #[test]
    fn calibration_compares_what_was_promised_with_what_came() {
        let drafts = [draft(1, 0.0, false), draft(2, 0.05, true), draft(3, 1.0, true), draft(4, f32::NAN, true)];
        let found = calibration(&drafts);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], Confidence { probability: 0.025, share: Share { accepted: 1, of: 2 } });
        assert_eq!(found[1], Confidence { probability: 1.0, share: Share { accepted: 1, of: 1 } });
    }

    #[test]
    fn kinds_are_told_apart() {
        let kinds = [
            ("king", Kind::Word),
            ("ü", Kind::Word),
            (" king", Kind::SpacedWord),
            ("  king", Kind::Other),
            ("12", Kind::Digits),
            (" 7", Kind::Digits),
            (".\n", Kind::Punctuation),
            (" +=", Kind::Punctuation),
            ("\n\n", Kind::Space),
            (" ", Kind::Space),
            ("x1", Kind::Other),
            ("\u{fffd}", Kind::Other),
            ("", Kind::Other),
        ];
        for (piece, kind) in kinds {
            assert_eq!(Kind::of(piece), kind, "{piece:?}");
        }
    }
}
