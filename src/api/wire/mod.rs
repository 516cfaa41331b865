//! From the bytes of a body to a request.
//!
//! Bodies are read by `serde` into structures that mirror the wire, and these are checked field by field. Both report
//! the field by its path, what was found and what was expected. null counts as absent, as clients send it for whatever
//! their callers left out.

mod chat;
mod completion;
mod format;
mod message;
mod options;
mod read;
mod tokens;
mod tool;
mod types;
mod unsupported;

use std::fmt::Display;
use std::ops::{Bound, RangeBounds, RangeInclusive};

pub(super) use chat::ChatBody;
pub(super) use completion::CompletionBody;
pub(super) use format::FormatBody;
pub(crate) use format::kind_of;
pub(super) use options::OptionsBody;
pub(super) use tokens::{DetokenizeBody, TokenizeBody};

use self::types::{Integer, Number};
use super::ApiError;

/// A value that will not do.
fn wrong(param: impl Into<String>, found: impl Display, expected: impl Display) -> ApiError {
    let param = param.into();
    let message = format!("`{param}`: found {found}, expected {expected}");
    ApiError::bad_request(param, message)
}

/// A field that has to be there.
fn required<T>(value: Option<T>, param: impl Into<String>, expected: &str) -> Result<T, ApiError> {
    value.ok_or_else(|| wrong(param, "nothing", expected))
}

/// A number in a range. It is looked at as the device will have it, so that none gets out of range by rounding.
fn number(param: &str, value: Option<Number>, range: impl RangeBounds<f32>) -> Result<Option<f32>, ApiError> {
    let Some(Number(exact)) = value else { return Ok(None) };
    // Minus zero becomes zero.
    let value = exact as f32 + 0.0;
    if range.contains(&value) {
        return Ok(Some(value));
    }
    let expected = match (range.start_bound(), range.end_bound()) {
        (Bound::Excluded(low), Bound::Included(high)) => format!("a number above {low} and at most {high}"),
        (Bound::Included(low), Bound::Included(high)) => format!("a number from {low} to {high}"),
        _ => "another number".to_owned(),
    };
    // Large and small ones are short with an exponent.
    let found = format!("{exact:?}");
    Err(wrong(param, found.trim_end_matches(".0"), expected))
}

/// An integer in a range.
fn integer<T: Copy + Display + Into<i128> + TryFrom<i128>>(
    param: &str,
    value: Option<Integer>,
    range: RangeInclusive<T>,
) -> Result<Option<T>, ApiError> {
    let Some(Integer(value)) = value else { return Ok(None) };
    let (low, high) = (*range.start(), *range.end());
    let inside = (low.into()..=high.into()).contains(&value);
    match T::try_from(value) {
        Ok(value) if inside => Ok(Some(value)),
        _ => Err(wrong(param, value, format!("an integer from {low} to {high}"))),
    }
}
