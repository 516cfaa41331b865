//! Recordings: one file that holds what a source told, to be shown again later. The format is described in
//! `docs/recording.md`: a line of JSON about the model, then chunks of a line of JSON and a safetensors file each. A
//! chunk is written at once and sealed with a hash, so that what stood in the file before a crash can be read.

mod chunk;
mod decode;
mod intake;
mod read;
mod replay;
mod texts;
pub mod wire;
mod write;

use std::collections::BTreeMap;
use std::path::PathBuf;

use moewe_plan::TapGroup;
use serde::{Deserialize, Serialize};

pub use replay::Recording;
pub use write::{Recorder, Written};

use crate::store::SequenceInfo;
use crate::subject::Subject;

/// Version of the format that is written and read.
pub const VERSION: u32 = 1;
/// How every recording begins.
const HEAD: &str = r#"{"format":"moewe recording","version":"#;
/// How every chunk begins.
const CHUNK: &str = r#"{"kind":""#;
/// What stands before the hash at the end of each line.
const SEAL: &str = r#","blake3":""#;
/// Length of the end of a line, from [`SEAL`] to the newline.
const SEAL_BYTES: usize = SEAL.len() + 64 + 3;
/// Longest first line, in bytes.
const MAX_HEAD: u64 = 64 << 20;
/// Longest line of a chunk, in bytes.
const MAX_LINE: u64 = 2 << 20;
/// Largest safetensors file of a chunk, in bytes.
const MAX_CHUNK: u64 = 1 << 30;
/// Most numbers in a row of a tensor.
const MAX_COLUMNS: usize = 1 << 20;
/// Most events in a chunk.
const MAX_EVENTS: usize = 1 << 16;
/// Most rows of frames in a chunk.
const MAX_ROWS: usize = 1 << 20;
/// Most tensors in a chunk.
const MAX_TENSORS: usize = 1 << 12;

/// Why a recording could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file could not be written.
    #[error("cannot write {}: {source}; the recording ends here, what was written before can be read", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is something else.
    #[error("{}: not a moewe recording: {what}", path.display())]
    NotARecording {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        what: String,
    },
    /// Something else would be overwritten.
    #[error("{}: exists and is not a moewe recording, so it is not overwritten; choose another file", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another recorder writes the file.
    #[error("{}: another program is writing this recording; choose another file", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The format is another version.
    #[error("{}: recording format {found}, this moewe reads format {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version found.
        found: u64,
    },
    /// The beginning of the file cannot be read, and without it nothing can.
    #[error("{}: damaged recording: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        what: String,
    },
    /// The recording that is to be continued is of something else.
    #[error("{}: cannot continue this recording: {what}; choose another file", path.display())]
    OtherSubject {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// An event that no recording can hold. It was left out.
    #[error("{}: not recorded: {what}", path.display())]
    Event {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

impl Error {
    fn read(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Read { path, source }
    }

    fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }
}

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// Texts of tokens and biases of experts.
    Subject,
    /// What happened.
    Tokens,
}

/// The line before a chunk, without its hash.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    kind: Kind,
    /// Length of the safetensors file.
    bytes: u64,
    #[serde(default)]
    tokens: u64,
    #[serde(default)]
    rows: u64,
    /// Lowest and highest number of a frame.
    #[serde(default)]
    frames: Option<(u64, u64)>,
    /// Lowest and highest number of a text that occurs.
    #[serde(default)]
    sequences: Option<(u32, u32)>,
    /// What happened beside tokens and frames.
    #[serde(default)]
    events: Vec<Entry>,
    /// For each tensor of a tap its group, its layer and the name of the list of its rows.
    #[serde(default)]
    taps: BTreeMap<String, (TapGroup, Option<u32>, String)>,
}

/// An event that needs no tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Begin(SequenceInfo),
    Dropped(u64),
    End { sequence: u32, reason: String, tokens_per_second: f64 },
    Note(String),
    Error(String),
}

/// A line with its hash, and behind it the bytes of its chunk.
fn seal(mut line: String, bytes: &[u8]) -> Vec<u8> {
    debug_assert!(line.ends_with('}'), "a line is an object");
    line.pop();
    let hash = hash(line.as_bytes(), bytes);
    line.push_str(SEAL);
    line.push_str(&hash);
    line.push_str("\"}\n");
    let mut sealed = line.into_bytes();
    sealed.extend_from_slice(bytes);
    sealed
}

fn hash(body: &[u8], bytes: &[u8]) -> String {
    blake3::Hasher::new().update(body).update(bytes).finalize().to_hex().to_string()
}

/// Whether a line (with its newline) and its chunk are what was written.
fn is_sound(line: &[u8], bytes: &[u8]) -> bool {
    let Some(end) = line.len().checked_sub(SEAL_BYTES) else { return false };
    let (body, end) = line.split_at(end);
    end == format!("{SEAL}{}\"}}\n", hash(body, bytes)).as_bytes()
}

/// The first line.
fn head_line(subject: &Subject) -> Result<Vec<u8>, String> {
    check_subject(subject)?;
    let json = serde_json::to_string(subject).map_err(|error| error.to_string())?;
    // Not every float that a subject can hold can stand in JSON.
    serde_json::from_str::<Subject>(&json).map_err(|error| format!("it cannot be written as JSON: {error}"))?;
    let line = seal(format!(r#"{HEAD}{VERSION},"subject":{json}}}"#), &[]);
    if line.len() as u64 > MAX_HEAD { Err(format!("{} bytes of JSON", line.len())) } else { Ok(line) }
}

/// Whether sizes are such as a compiled model can have: views make arrays of them.
fn check_subject(subject: &Subject) -> Result<(), String> {
    let model = &subject.model;
    let ranges = [
        ("layers", model.layers, 1, 1 << 10),
        ("experts", model.experts, 0, 1 << 16),
        ("num_experts_per_tok", model.num_experts_per_tok, 0, model.experts),
        ("n_group", model.n_group, 0, model.experts.max(1)),
        ("topk_group", model.topk_group, 0, model.experts.max(1)),
        ("n_shared_experts", model.n_shared_experts, 0, 1 << 16),
        ("vocab_size", model.vocab_size, 1, 1 << 24),
        ("max_context", model.max_context, 1, 1 << 30),
        ("hidden_size", model.hidden_size, 1, 1 << 20),
        ("num_attention_heads", model.num_attention_heads, 1, 1 << 12),
        ("kv_lora_rank", model.kv_lora_rank, 1, 1 << 20),
        ("qk_rope_head_dim", model.qk_rope_head_dim, 0, 1 << 13),
        ("qk_nope_head_dim", model.qk_nope_head_dim, 0, 1 << 13),
        ("v_head_dim", model.v_head_dim, 1, 1 << 13),
        ("mtp_modules", model.mtp_modules, 0, 64),
    ];
    for (name, found, least, most) in ranges {
        if !(least..=most).contains(&found) {
            return Err(format!("{name} is {found}, expected {least} to {most}"));
        }
    }
    let in_order = model.moe_layers.windows(2).all(|pair| pair[0] < pair[1]);
    if !in_order || model.moe_layers.last().is_some_and(|last| *last >= model.layers) {
        return Err(format!("moe_layers are not layers from 0 to {} in order", model.layers - 1));
    }
    let layers = layers(subject);
    let beyond = subject.programs.iter().flatten().find(|step| step.layer.is_some_and(|layer| layer >= layers));
    beyond.map_or(Ok(()), |step| Err(format!("step {} is of a layer beyond the {layers} that there are", step.label)))
}

/// Layers with those of modules of multi-token prediction, which are counted behind the others.
fn layers(subject: &Subject) -> u32 {
    subject.model.layers + subject.model.mtp_modules
}
