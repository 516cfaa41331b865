//! Finding marks in a text that is still growing.

/// What is known of a text's beginning, or of a place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// There is no mark in the text, nor the beginning of one at its end.
    Nothing,
    /// The mark with this index begins at this byte.
    Mark(usize, usize),
    /// What goes from this byte to the text's end may become a mark.
    Beginning(usize),
}

/// The first place where one of the marks begins. With `ended`, nothing can become a mark any more.
///
/// A mark may not be the beginning of another.
pub fn find(text: &str, marks: &[&str], ended: bool) -> Found {
    for (at, c) in text.char_indices() {
        if !marks.iter().any(|mark| mark.starts_with(c)) {
            continue;
        }
        match here(&text[at..], marks, ended) {
            Found::Mark(mark, _) => return Found::Mark(mark, at),
            Found::Beginning(_) => return Found::Beginning(at),
            Found::Nothing => {}
        }
    }
    Found::Nothing
}

/// Whether one of the marks begins right at the beginning.
pub fn here(text: &str, marks: &[&str], ended: bool) -> Found {
    match marks.iter().position(|mark| text.starts_with(mark)) {
        Some(mark) => Found::Mark(mark, 0),
        None if !ended && marks.iter().any(|mark| mark.starts_with(text)) => Found::Beginning(0),
        None => Found::Nothing,
    }
}

/// Whether a text begins with something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begins {
    /// Yes; this many bytes are it.
    Yes(usize),
    /// No, whatever follows.
    No,
    /// That depends on what follows.
    Maybe,
}

/// Whether a text begins with some words, each of which may have white space before it.
pub fn begins(text: &str, words: &[&str]) -> Begins {
    let mut rest = text;
    for word in words {
        rest = rest.trim_start();
        match rest.strip_prefix(word) {
            Some(after) => rest = after,
            None if word.starts_with(rest) => return Begins::Maybe,
            None => return Begins::No,
        }
    }
    Begins::Yes(text.len() - rest.len())
}

/// The first `limit` bytes of a text, and whether it has as many: what is not found there is not there.
pub fn window(text: &str, limit: usize) -> (&str, bool) {
    (&text[..text.floor_char_boundary(limit)], text.len() >= limit)
}
