//! Slow, plain reference of every operation, in f64: the specification as code, for tests to compare against.
//!
//! It depends on nothing else of this workspace and never tries to be fast. A malformed checkpoint is an [`Error`];
//! arguments whose shapes do not fit panic.
#![allow(clippy::missing_panics_doc, reason = "shapes are documented, and a wrong one panics everywhere")]

pub mod config;
mod decode;
pub mod edits;
pub mod model;
pub mod numeric;
pub mod ops;
pub mod prediction;
pub mod rope;
pub mod router;
pub mod safetensors;
pub mod sampling;
mod tensor;
pub mod tolerance;
mod weights;

pub use edits::Edits;
pub use model::Model;
pub use tensor::{Data, Tensor, Trace, rel_l2};
pub use weights::{Weight, Weights};

/// What is wrong with a file, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(pub String);

/// Result of everything that reads files.
pub type Result<T> = std::result::Result<T, Error>;

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Reads a whole file, naming it if that fails.
fn read_file(path: &std::path::Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error(format!("{}: {e}", path.display())))
}

/// Reads a JSON file, naming it if that fails.
fn read_json(path: &std::path::Path) -> Result<serde_json::Value> {
    serde_json::from_slice(&read_file(path)?).map_err(|e| Error(format!("{}: {e}", path.display())))
}
