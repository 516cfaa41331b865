//! Following a call's arguments to their end.

use super::marks::{self, Found};

/// Where a JSON object stands, by its brackets and strings.
///
/// Within a string a mark is text. Once the object can be no JSON any more, it is followed no further: it ends at the
/// next mark.
#[derive(Debug, Default)]
pub struct Arguments {
    /// The brackets that will close those that are open.
    closing: Vec<char>,
    in_string: bool,
    escaped: bool,
    broken: bool,
}

/// What comes after the bytes taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// More of the arguments.
    More,
    /// The object is complete.
    Complete,
    /// A mark that ends the call.
    Mark,
}

impl Arguments {
    /// Takes what belongs to the arguments: so many bytes, and what comes after them. With `ended`, no text follows.
    pub fn take(&mut self, text: &str, marks: &[&str], ended: bool) -> (usize, Next) {
        for (at, c) in text.char_indices() {
            if (self.broken || !self.in_string) && marks.iter().any(|mark| mark.starts_with(c)) {
                match marks::here(&text[at..], marks, ended) {
                    Found::Mark(..) => return (at, Next::Mark),
                    Found::Beginning(_) => return (at, Next::More),
                    Found::Nothing => {}
                }
            }
            self.follow(c);
            if !self.broken && self.closing.is_empty() {
                return (at + c.len_utf8(), Next::Complete);
            }
        }
        (text.len(), Next::More)
    }

    fn follow(&mut self, c: char) {
        if self.broken {
            return;
        }
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                '\0'..' ' => self.broken = true,
                _ => {}
            }
            return;
        }
        match c {
            '"' => self.in_string = true,
            '{' => self.closing.push('}'),
            '[' => self.closing.push(']'),
            '}' | ']' => self.broken = self.closing.pop() != Some(c),
            ' ' | '\t' | '\n' | '\r' | ',' | ':' | '+' | '-' | '.' | '0'..='9' | 'a'..='z' | 'E' => {}
            _ => self.broken = true,
        }
    }
}
