//! What the search box understands: places in the model, positions, and text.

use std::num::ParseIntError;

use crate::store::Sequence;
use crate::subject::Subject;

/// What the search box says when it is empty or not understood.
pub const POSSIBLE: &str = "possible: 3:17 or expert 3:17 (layer 3, expert 17), expert 17, token 812, layer 5, head 2, or \
                            text; \"in quotes\" is always text";

/// What a search leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// An expert of a layer.
    Expert {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
    },
    /// The token at a position.
    Token(u32),
    /// A layer.
    Layer(u32),
    /// An attention head.
    Head(u32),
    /// Positions at which a text begins, in order; never empty.
    Text(Vec<u32>),
}

/// Understands a search; `layer` is the selected one, which `expert 17` is about. The error says what is wrong and what is
/// possible.
pub fn search(query: &str, subject: &Subject, layer: u32, sequence: Option<&Sequence>) -> Result<Found, String> {
    let query = query.trim();
    if let Some(quoted) = query.strip_prefix('"').filter(|quoted| !quoted.is_empty()) {
        return text(quoted.strip_suffix('"').unwrap_or(quoted), subject, sequence);
    }
    if query.is_empty() {
        return Err(POSSIBLE.into());
    }
    let mut words = query.split_whitespace();
    let first = words.next().unwrap_or_default().to_lowercase();
    let rest: Vec<&str> = words.collect();
    match (first.as_str(), rest.as_slice()) {
        ("expert", [place]) if place.contains(':') => expert_at(place, subject),
        ("expert", [number]) => expert(layer, parse(number, "expert")?, subject),
        ("token", [number]) => token(parse(number, "token")?, sequence),
        ("layer", [number]) => within(parse(number, "layer")?, "layer", subject.model.layers.into()).map(Found::Layer),
        ("head", [number]) => {
            within(parse(number, "head")?, "head", subject.model.num_attention_heads.into()).map(Found::Head)
        }
        (place, []) if looks_like_a_place(place) => expert_at(place, subject),
        _ => text(query, subject, sequence),
    }
}

/// Digits, a colon, digits.
fn looks_like_a_place(word: &str) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    word.split_once(':').is_some_and(|(layer, expert)| is_number(layer) && is_number(expert))
}

fn parse(number: &str, what: &str) -> Result<u64, String> {
    let wrong = |_: ParseIntError| format!("{number:?} is no number of a {what}, as in {what} 2; {POSSIBLE}");
    number.parse().map_err(wrong)
}

fn expert_at(place: &str, subject: &Subject) -> Result<Found, String> {
    let (layer, number) = place.split_once(':').unwrap_or((place, ""));
    let layer = within(parse(layer, "layer")?, "layer", subject.model.layers.into())?;
    expert(layer, parse(number, "expert")?, subject)
}

fn expert(layer: u32, number: u64, subject: &Subject) -> Result<Found, String> {
    if !subject.model.moe_layers.contains(&layer) {
        let layers = ranges(&subject.model.moe_layers);
        return Err(if layers.is_empty() {
            "this model has no experts".into()
        } else {
            format!("layer {layer} has no experts; layers that have are {layers}")
        });
    }
    let expert = within(number, "expert", subject.model.experts.into())?;
    Ok(Found::Expert { layer, expert })
}

fn token(number: u64, sequence: Option<&Sequence>) -> Result<Found, String> {
    let tokens = sequence.map_or(0, |sequence| sequence.tokens.len());
    if tokens == 0 {
        return Err("there are no tokens yet".into());
    }
    within(number, "token", tokens as u64).map(Found::Token)
}

/// A number below `count`.
fn within(number: u64, what: &str, count: u64) -> Result<u32, String> {
    if number < count {
        return Ok(number as u32);
    }
    Err(match count {
        0 => format!("there is no {what} {number}: there are none at all"),
        _ => format!("there is no {what} {number}; there are 0 to {}", count - 1),
    })
}

/// Numbers in order, as `1 to 3, 5`.
fn ranges(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    let write = |run: &[u32]| match run {
        [one] => one.to_string(),
        _ => format!("{} to {}", run[0], run[run.len() - 1]),
    };
    runs.map(write).collect::<Vec<_>>().join(", ")
}

/// Tokens at which the needle begins, whatever its case. It may go over several tokens.
fn text(needle: &str, subject: &Subject, sequence: Option<&Sequence>) -> Result<Found, String> {
    let Some(sequence) = sequence.filter(|sequence| !sequence.tokens.is_empty()) else {
        return Err("there is no text to search in yet".into());
    };
    if subject.pieces.is_empty() {
        return Err("the tokens' text is unknown (no tokenizer), so only numbers can be looked for: token 812".into());
    }
    let mut whole = String::new();
    let mut ends = Vec::with_capacity(sequence.tokens.len());
    for token in &sequence.tokens {
        if let Some(piece) = subject.pieces.get(token.id as usize) {
            whole.extend(piece.chars().flat_map(char::to_lowercase));
        }
        ends.push(whole.len());
    }
    let needle: String = needle.chars().flat_map(char::to_lowercase).collect();
    let mut found: Vec<u32> = Vec::new();
    let mut from = 0;
    while let Some(at) = whole.get(from..).and_then(|rest| rest.find(&needle)) {
        // The first token that ends behind the place: tokens without text end where they begin.
        let token = ends.partition_point(|end| *end <= from + at);
        found.push(token as u32);
        // What begins in the same token is the same answer.
        from = ends[token.min(ends.len() - 1)].max(from + at + 1);
        while !whole.is_char_boundary(from) {
            from += 1;
        }
    }
    if found.is_empty() { Err(format!("no token contains {needle:?}; {POSSIBLE}")) } else { Ok(Found::Text(found)) }
}

/// The match before or behind the selected token, going round at the ends, and its number from 1.
pub fn step(matches: &[u32], selected: Option<u32>, forward: bool) -> Option<(usize, u32)> {
    let last = matches.len().checked_sub(1)?;
    let index = match (selected, forward) {
        (None, true) => 0,
        (None, false) => last,
        (Some(at), true) => matches.iter().position(|position| *position > at).unwrap_or(0),
        (Some(at), false) => matches.iter().rposition(|position| *position < at).unwrap_or(last),
    };
    Some((index + 1, matches[index]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{SequenceInfo, Store, Token};
    use crate::synthetic::Shape;

    fn stage(pieces: &[&str], ids: &[u32]) -> (Subject, Store) {
        let mut subject = Shape::small().subject();
        subject.pieces = pieces.iter().map(|piece| (*piece).to_owned()).collect();
        let mut store = Store::new(32, 1 << 20);
        store.begin(SequenceInfo::default());
        for &id in ids {
            store.push_token(0, Token { id, generated: false });
        }
        (subject, store)
    }

    #[test]
    fn places_and_positions_are_found() {
        let (subject, store) = stage(&["a"], &[0; 100]);
        let find = |query: &str| search(query, &subject, 2, store.sequence(0));
        let expert = Ok(Found::Expert { layer: 3, expert: 17 });
        assert_eq!(find("expert 3:17"), expert);
        assert_eq!(find("  3:17 "), expert);
        assert_eq!(find("Expert 17"), Ok(Found::Expert { layer: 2, expert: 17 }));
        assert_eq!(find("token 99"), Ok(Found::Token(99)));
        assert_eq!(find("layer 0"), Ok(Found::Layer(0)));
        assert_eq!(find("head 3"), Ok(Found::Head(3)));
    }

    #[test]
    fn wrong_input_says_what_is_possible() {
        let (subject, store) = stage(&["a"], &[0; 100]);
        let find = |query: &str| search(query, &subject, 2, store.sequence(0)).unwrap_err();
        assert_eq!(find("token 100"), "there is no token 100; there are 0 to 99");
        assert_eq!(find("layer 4"), "there is no layer 4; there are 0 to 3");
        assert_eq!(find("head 4294967296"), "there is no head 4294967296; there are 0 to 3");
        assert_eq!(find("0:1"), "layer 0 has no experts; layers that have are 1 to 3");
        assert_eq!(find("expert 3:32"), "there is no expert 32; there are 0 to 31");
        for query in ["", "  ", "token x", "token -1", "expert 3:", "layer 1e3", "expert 99999999999999999999", "zebra"]
        {
            assert!(find(query).contains(POSSIBLE), "{query:?}: {}", find(query));
        }
        assert!(search("token 0", &subject, 0, None).unwrap_err().contains("no tokens yet"));
        assert!(search("a", &subject, 0, None).unwrap_err().contains("no text"));
    }

    #[test]
    fn text_is_found_within_and_across_tokens() {
        let (subject, store) = stage(&["The ", "King", "kin", "", "g s", "É", "aa"], &[0, 1, 2, 3, 4, 5, 6, 0]);
        let find = |query: &str| search(query, &subject, 2, store.sequence(0));
        assert_eq!(find("king"), Ok(Found::Text(vec![1, 2])));
        assert_eq!(find("the "), Ok(Found::Text(vec![0, 7])));
        assert_eq!(find("\"G S\""), Ok(Found::Text(vec![4])));
        assert_eq!(find("é"), Ok(Found::Text(vec![5])));
        assert_eq!(find("a"), Ok(Found::Text(vec![6])));
        assert!(find("\"3:17\"").is_err());
        let (mut subject, store) = stage(&[], &[0, 1]);
        subject.pieces.clear();
        assert!(search("king", &subject, 2, store.sequence(0)).unwrap_err().contains("no tokenizer"));
    }

    #[test]
    fn matches_are_stepped_through_in_a_circle() {
        let matches = [3, 5, 9];
        assert_eq!(step(&matches, None, true), Some((1, 3)));
        assert_eq!(step(&matches, Some(3), true), Some((2, 5)));
        assert_eq!(step(&matches, Some(9), true), Some((1, 3)));
        assert_eq!(step(&matches, Some(4), false), Some((1, 3)));
        assert_eq!(step(&matches, Some(3), false), Some((3, 9)));
        assert_eq!(step(&[], None, true), None);
    }
}
