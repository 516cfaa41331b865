//! The part of a call before its arguments.

use super::marks::{Begins, begins, window};
use super::syntax::ToolSyntax;

/// What a text that begins with a mark turns out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Header {
    /// A call of this tool; its arguments begin after so many bytes.
    Call(String, usize),
    /// No call.
    Bad,
    /// That depends on what follows.
    Unfinished,
}

/// All of a header is within so many bytes. Names have 64 letters at most, the marks some 70.
const LIMIT: usize = 512;

/// Reads from the mark that begins all calls, or the mark that begins one, to the brace that opens the arguments.
///
/// White space between the parts is as the model likes it, and so is the fence around arguments.
pub fn parse(syntax: &ToolSyntax, text: &str) -> Header {
    let (text, full) = window(text, LIMIT);
    match call(syntax, text) {
        Ok((name, taken)) => Header::Call(name, taken),
        Err(Header::Unfinished) if full => Header::Bad,
        Err(other) => other,
    }
}

fn call(syntax: &ToolSyntax, text: &str) -> Result<(String, usize), Header> {
    let mut rest = text.strip_prefix(syntax.section_begin).unwrap_or(text);
    let (mark, kind) = syntax.call_mark();
    expect(&mut rest, mark)?;
    if !syntax.numbered && !kind.is_empty() {
        expect(&mut rest, kind)?;
    }
    rest = rest.trim_start();
    let end = rest.find(|c: char| !(c.is_alphanumeric() || "_-.".contains(c))).ok_or(Header::Unfinished)?;
    let (mut name, after) = rest.split_at(end);
    rest = after;
    if syntax.numbered {
        name = name.strip_prefix(kind).unwrap_or(name);
        if let Some(number) = rest.strip_prefix(':') {
            rest = number.trim_start_matches(|c: char| c.is_ascii_digit());
        }
    }
    if name.is_empty() {
        return Err(Header::Bad);
    }
    let before_arguments = syntax.arguments_begin.trim();
    match expect(&mut rest, before_arguments) {
        Err(Header::Bad) if before_arguments.starts_with('`') => {}
        other => other?,
    }
    rest = rest.trim_start();
    match rest.chars().next() {
        Some('{') => Ok((name.to_owned(), text.len() - rest.len())),
        Some(_) => Err(Header::Bad),
        None => Err(Header::Unfinished),
    }
}

fn expect(rest: &mut &str, word: &str) -> Result<(), Header> {
    match begins(rest, &[word]) {
        Begins::Yes(taken) => {
            *rest = &rest[taken..];
            Ok(())
        }
        Begins::No => Err(Header::Bad),
        Begins::Maybe => Err(Header::Unfinished),
    }
}
