//! The one error type of this crate. Every message is one sentence that names the file and the tensor or field,
//! says what was found and what was expected, and ends with what to do about it.

use std::{fmt::Write as _, io, path::PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a checkpoint directory and a bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read a file or directory.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// File or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },

    /// The operating system refused to write (read-only place, full disk, no rights).
    #[error("cannot write {}: {source}; nothing was left behind, choose another place or make room", path.display())]
    Write {
        /// File or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },

    /// The output of a command already exists.
    #[error("{} already exists; choose another output directory or remove it first", path.display())]
    Exists {
        /// File or directory.
        path: PathBuf,
    },

    /// A file is not the JSON that its name promises.
    #[error("{} is not usable JSON: {detail}; download the file again", path.display())]
    Json {
        /// File.
        path: PathBuf,
        /// Where and what.
        detail: String,
    },

    /// A field of `config.json` is absent, of the wrong type, out of range, or contradicts another field.
    #[error("{}: field `{field}` is {found}, expected {expected}; {advice}", path.display())]
    Field {
        /// The config file.
        path: PathBuf,
        /// The field, with the object that holds it in front (`rope_scaling.factor`).
        field: String,
        /// The value found, as JSON, or "absent".
        found: String,
        /// What would have been accepted.
        expected: String,
        /// What to do.
        advice: &'static str,
    },

    /// `config.json` describes a model family that is not supported.
    #[error("{}: unknown architecture: {found}; supported are {SUPPORTED}", path.display())]
    UnknownArchitecture {
        /// The config file.
        path: PathBuf,
        /// `model_type` and `architectures` as found.
        found: String,
    },

    /// A safetensors file is damaged as a whole (too short, absurd header length, header is no JSON object, …).
    #[error("{}: {detail}; the file is damaged or incomplete, download it again", path.display())]
    Safetensors {
        /// The safetensors file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },

    /// One entry of a safetensors header is damaged.
    #[error("{}: tensor `{tensor}`: {detail}; the file is damaged or incomplete, download it again", path.display())]
    Entry {
        /// The safetensors file.
        path: PathBuf,
        /// Tensor name.
        tensor: String,
        /// What is wrong with it.
        detail: String,
    },

    /// `model.safetensors.index.json` cannot be used.
    #[error("{}: {detail}; download the index and the shards again", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },

    /// The directory is no checkpoint.
    #[error("{}: is no checkpoint: config.json is not in it; give a directory with config.json and *.safetensors", path.display())]
    NoConfig {
        /// The directory.
        path: PathBuf,
    },

    /// The directory holds no weights in a supported format.
    #[error("{}: no weights: neither model.safetensors nor model.safetensors.index.json is there; \
        download the safetensors files of the model", path.display())]
    NoWeights {
        /// The checkpoint directory.
        path: PathBuf,
    },

    /// A tensor that the configuration asks for is not in the checkpoint.
    #[error("{}: tensor `{tensor}` is missing, expected {expected}; \
        the checkpoint is incomplete or its config.json belongs to another model", path.display())]
    MissingTensor {
        /// The checkpoint directory.
        path: PathBuf,
        /// Tensor name.
        tensor: String,
        /// Shape and dtypes that would have been accepted.
        expected: String,
    },

    /// A tensor has another shape or dtype than the configuration implies.
    #[error("{}: tensor `{tensor}` is {found}, expected {expected}; \
        the file is damaged or config.json belongs to another model", path.display())]
    WrongTensor {
        /// The safetensors file.
        path: PathBuf,
        /// Tensor name.
        tensor: String,
        /// Shape or dtype found.
        found: String,
        /// Shape or dtype expected.
        expected: String,
    },

    /// The checkpoint holds a tensor that would change the numbers but has no place in the configured model.
    #[error("{}: tensor `{tensor}` has no place in the model that config.json describes: {detail}; \
        use the config.json of this checkpoint", path.display())]
    UnexpectedTensor {
        /// The safetensors file.
        path: PathBuf,
        /// Tensor name.
        tensor: String,
        /// Which field contradicts it.
        detail: String,
    },

    /// A weight that is to be quantised is no finite number: its whole group would become useless.
    #[error("{}: tensor `{tensor}` is {found} in row {row}, column {column}, expected finite numbers; \
        download the file again, or keep the format that the weights are stored in", path.display())]
    NotFinite {
        /// The safetensors file.
        path: PathBuf,
        /// Tensor name.
        tensor: String,
        /// Its row, from 0.
        row: usize,
        /// Its column, from 0.
        column: usize,
        /// Its value, block scale included.
        found: f32,
    },

    /// The caller asked to stop.
    #[error("interrupted; nothing was left behind")]
    Interrupted,

    /// No profile of this name.
    #[error("target {found} is neither a profile nor a file; known profiles are {known}")]
    Target {
        /// What was given.
        found: String,
        /// Names of the built-in profiles.
        known: String,
    },

    /// A file is no sound profile.
    #[error("{}: no usable device profile: {detail}; begin with a copy of one of those in compiler/profiles", path.display())]
    Profile {
        /// File.
        path: PathBuf,
        /// Which field, and what is wrong with it.
        detail: String,
    },

    /// A kernel could not be made: a bug of the compiler.
    #[error("the compiler made an impossible kernel, please report it: {detail}")]
    Kernel {
        /// What the linker, the validator or the lowering said.
        detail: String,
    },

    /// The bundle could not be written.
    #[error(transparent)]
    Bundle(#[from] moewe_plan::Error),

    /// A value given by the caller (an option, an override) makes no sense.
    #[error("{what} is {found}, expected {expected}")]
    Argument {
        /// Which value.
        what: String,
        /// What was given.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
}

/// The supported families, for messages.
pub const SUPPORTED: &str = "DeepseekV2ForCausalLM (model_type deepseek_v2), DeepseekV3ForCausalLM (model_type deepseek_v3: \
     V3, V3.1 and R1; model_type kimi_k2: Kimi K2)";

/// Shortens a text from an untrusted file for an error message: no control characters, at most 80 characters.
pub(crate) fn clip(text: &str) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == 80 {
            out.push('…');
            break;
        }
        if c.is_control() {
            let _ = write!(out, "\\u{{{:x}}}", c as u32);
        } else {
            out.push(c);
        }
    }
    out
}
