//! Typed, range-checked access to the fields of one JSON object of a configuration file.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, clip};

/// Advice that fits most bad fields.
pub(super) const ORIGINAL: &str = "take config.json from the model's original repository";

/// One JSON object of a configuration file, with what is needed to say where a field stands.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// Name of the object inside the file, with a trailing dot; empty for the file itself.
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a Path, map: &'a Map<String, Value>, prefix: &'a str) -> Self {
        Self { path, map, prefix }
    }

    /// The file that the fields come from.
    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// The value, `None` when absent.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name)
    }

    /// The value, `None` when absent or null.
    pub(super) fn present(&self, name: &str) -> Option<&'a Value> {
        self.get(name).filter(|v| !v.is_null())
    }

    /// The error for a field with what was found there.
    pub(super) fn bad(&self, name: &str, expected: impl Into<String>) -> Error {
        self.bad_advice(name, expected, ORIGINAL)
    }

    /// As [`Self::bad`], with advice of its own.
    pub(super) fn bad_advice(&self, name: &str, expected: impl Into<String>, advice: &'static str) -> Error {
        Error::Field {
            path: self.path.to_owned(),
            field: format!("{}{name}", self.prefix),
            found: self.get(name).map_or_else(|| "absent".into(), |v| clip(&v.to_string())),
            expected: expected.into(),
            advice,
        }
    }

    /// A whole number in `min..=max`; absent and null are errors.
    pub(super) fn uint(&self, name: &str, min: usize, max: usize) -> Result<usize> {
        self.get(name)
            .and_then(Value::as_u64)
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| (min..=max).contains(v))
            .ok_or_else(|| self.bad(name, format!("a whole number from {min} to {max}")))
    }

    /// As [`Self::uint`], but `None` when absent or null.
    pub(super) fn uint_opt(&self, name: &str, min: usize, max: usize) -> Result<Option<usize>> {
        self.present(name).map(|_| self.uint(name, min, max)).transpose()
    }

    /// A finite number in `min..=max`; absent and null are errors.
    pub(super) fn float(&self, name: &str, min: f64, max: f64) -> Result<f64> {
        self.get(name)
            .and_then(Value::as_f64)
            .filter(|v| v.is_finite() && (min..=max).contains(v))
            .ok_or_else(|| self.bad(name, format!("a number from {min:e} to {max:e}")))
    }

    /// As [`Self::float`], but `None` when absent or null.
    pub(super) fn float_opt(&self, name: &str, min: f64, max: f64) -> Result<Option<f64>> {
        self.present(name).map(|_| self.float(name, min, max)).transpose()
    }

    /// true or false; `default` when absent or null.
    pub(super) fn bool_or(&self, name: &str, default: bool) -> Result<bool> {
        match self.present(name) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.bad(name, "true or false")),
        }
    }

    /// A string, `None` when absent or null.
    pub(super) fn str_opt(&self, name: &str) -> Result<Option<&'a str>> {
        match self.present(name) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| self.bad(name, "a string")),
        }
    }

    /// A JSON object, `None` when absent or null.
    pub(super) fn object_opt(&self, name: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.present(name) {
            None => Ok(None),
            Some(v) => v.as_object().map(Some).ok_or_else(|| self.bad(name, "an object or null")),
        }
    }

    /// One of the strings on the left of `choices`; `None` when absent or null.
    pub(super) fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let Some(text) = self.str_opt(name)? else { return Ok(None) };
        choices.iter().find(|(s, _)| *s == text).map(|(_, t)| Some(*t)).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(s, _)| format!("\"{s}\"")).collect();
            self.bad_advice(name, names.join(" or "), "no other value is supported")
        })
    }
}
