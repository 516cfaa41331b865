//! A chunk while it is filled, and its bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use moewe_plan::{Edit, FrameTensor, Numbers, RunTimes, TapFrame, TapGroup};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::{Entry, Kind, Line, MAX_CHUNK, MAX_COLUMNS, MAX_LINE, MAX_ROWS, MAX_TENSORS, seal};
use crate::store::Token;
use crate::subject::Subject;

/// A chunk with so many tokens or rows is written.
const FULL_TOKENS: usize = 256;
/// A chunk with so many bytes is written.
const FULL_BYTES: usize = 8 << 20;
/// A chunk whose line has so much text is written.
const FULL_TEXT: usize = 128 << 10;
/// Longest name of a tensor, in bytes.
const MAX_NAME: usize = 64;
/// Lists that a chunk has of its own, or how their names begin.
const OWN: [&str; 9] = ["sequence", "position", "token", "events", "text.", "frame.", "run.", "rows.", "__"];

/// Marks in the list `events`, counted from 0.
pub(super) const TOKEN: u8 = 0;
pub(super) const FRAME: u8 = 1;
pub(super) const ENTRY: u8 = 2;

/// What happened since the last chunk.
#[derive(Debug, Default)]
pub(super) struct Filling {
    order: Vec<u8>,
    entries: Vec<Entry>,
    text: Rows,
    generated: Vec<u8>,
    rows: Rows,
    frame_number: Vec<i64>,
    frame_rows: Vec<i32>,
    run_frame: Vec<i32>,
    run_program: Vec<i32>,
    run_rows: Vec<i32>,
    run_steps: Vec<i32>,
    run_start: Vec<i64>,
    run_duration: Vec<i64>,
    tensors: BTreeMap<Arc<str>, Tensor>,
    bytes: usize,
    text_bytes: usize,
    /// Whether it is to be written whatever its size.
    pub(super) due: bool,
}

/// Which tokens the rows of something are.
#[derive(Debug, Default)]
struct Rows {
    sequence: Vec<i32>,
    position: Vec<i32>,
    token: Vec<i32>,
}

#[derive(Debug)]
struct Tensor {
    group: TapGroup,
    layer: Option<u32>,
    columns: usize,
    is_float: bool,
    words: Vec<u32>,
    rows: Vec<i32>,
}

impl Tensor {
    fn is_like(&self, other: &FrameTensor) -> bool {
        let is_float = matches!(other.data, Numbers::F32(_));
        (self.group, self.layer, self.columns, self.is_float)
            == (other.group, other.layer, other.columns as usize, is_float)
    }
}

/// Checks what is about a frame alone, so that all that is written can be read.
pub(super) fn check_frame(frame: &TapFrame, subject: &Subject) -> Result<(), String> {
    let tokens = frame.tokens.len();
    let mut bytes = 0;
    if frame.tensors.len() > MAX_TENSORS || tokens > MAX_ROWS / 2 {
        let (number, tensors) = (frame.number, frame.tensors.len());
        return Err(format!(
            "frame {number} has {tensors} tensors of {tokens} tokens, at most {MAX_TENSORS} of {} can be",
            MAX_ROWS / 2
        ));
    }
    for (index, tensor) in frame.tensors.iter().enumerate() {
        let FrameTensor { name, columns, data, .. } = tensor;
        let columns = *columns as usize;
        let (len, ids) = match data {
            Numbers::F32(numbers) => (numbers.len(), None),
            Numbers::U32(numbers) => (numbers.len(), Some(numbers)),
        };
        if !is_name(name) {
            return Err(format!("no tensor may be called {:?}", name.chars().take(MAX_NAME).collect::<String>()));
        }
        if frame.tensors[..index].iter().any(|other| other.name == *name) {
            return Err(format!("two tensors of frame {} are called {name}", frame.number));
        }
        if columns == 0 || columns > MAX_COLUMNS || tokens.checked_mul(columns) != Some(len) {
            return Err(format!("{name} has {len} numbers, expected {tokens} tokens × {columns} columns"));
        }
        check_tensor(name, tensor.group, tensor.layer, ids.into_iter().flatten().copied().max(), subject)?;
        bytes += len * 4;
    }
    if let Some(times) = &frame.times {
        check_times(times.program as usize, times.starts.len(), times.durations.len(), subject)?;
        signed(times.rows)?;
    }
    // A chunk never has more than one frame behind its limit; names and lists need a little more.
    if bytes as u64 + (FULL_BYTES as u64) * 4 > MAX_CHUNK {
        return Err(format!("frame {} has {bytes} bytes; watch less at a time (fewer taps or layers)", frame.number));
    }
    Ok(())
}

/// Whether a tensor may be called so: short, plain, and no name of the chunk's own.
pub(super) fn is_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let is_own = |own: &str| own == name || own.ends_with(['.', '_']) && name.starts_with(own);
    (1..=MAX_NAME).contains(&name.len()) && name.chars().all(is_plain) && !OWN.iter().any(|own| is_own(own))
}

/// Checks that a tensor belongs to the model.
pub(super) fn check_tensor(
    name: &str,
    group: TapGroup,
    layer: Option<u32>,
    largest: Option<u32>,
    subject: &Subject,
) -> Result<(), String> {
    let layers = super::layers(subject);
    if let Some(layer) = layer.filter(|layer| *layer >= layers) {
        return Err(format!("{name} is of layer {layer}, the last is {}", layers - 1));
    }
    let limit = if group == TapGroup::Routing { subject.model.experts } else { subject.model.vocab_size };
    match largest {
        Some(largest) if largest >= limit => Err(format!("{name} says {largest}, expected at most {}", limit - 1)),
        _ => Ok(()),
    }
}

/// Checks that times are those of the steps of a program.
pub(super) fn check_times(program: usize, starts: usize, durations: usize, subject: &Subject) -> Result<(), String> {
    let steps = subject.programs.get(program).map(Vec::len);
    if steps == Some(starts) && starts == durations {
        return Ok(());
    }
    Err(format!("{starts} starts and {durations} durations for program {program}, which has {steps:?} steps"))
}

fn signed<T: TryInto<i32> + Copy + std::fmt::Display>(number: T) -> Result<i32, String> {
    number.try_into().map_err(|_| format!("{number} is more than fits, expected at most {}", i32::MAX))
}

/// Times are kept as signed numbers; the longest that fits is 292 years.
fn nanoseconds(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl Filling {
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        let rows = self.text.token.len().max(self.rows.token.len()).max(self.order.len() / 4);
        self.due || rows >= FULL_TOKENS || self.bytes >= FULL_BYTES || self.text_bytes >= FULL_TEXT
    }

    /// Whether a frame's tensors are like those of the same name that it has already, and do not make it too large.
    pub(super) fn takes(&self, frame: &TapFrame) -> bool {
        let new = frame.tensors.iter().filter(|tensor| !self.tensors.contains_key(&tensor.name)).count();
        let is_like = |tensor: &FrameTensor| self.tensors.get(&tensor.name).is_none_or(|held| held.is_like(tensor));
        self.tensors.len() + new <= MAX_TENSORS && frame.tensors.iter().all(is_like)
    }

    /// Takes a token of a text.
    pub(super) fn token(&mut self, sequence: u32, position: u32, token: Token) -> Result<(), String> {
        self.text.push(signed(sequence)?, signed(position)?, signed(token.id)?);
        self.generated.push(u8::from(token.generated));
        self.order.push(TOKEN);
        self.bytes += 14;
        Ok(())
    }

    /// Takes an event without tensors.
    pub(super) fn entry(&mut self, entry: Entry) -> Result<(), String> {
        if let Entry::Begin(info) = &entry {
            let is_wrong = |edit: &&Edit| matches!(edit, Edit::Scale(_, factor) if !factor.is_finite());
            if let Some(edit) = info.edits.iter().find(is_wrong) {
                return Err(format!("{edit} of text {} is no number", info.number));
            }
        }
        let text = serde_json::to_string(&entry).map_err(|error| error.to_string())?.len();
        if text as u64 > MAX_LINE / 2 {
            return Err(format!("{text} bytes of text in one event, at most {} can be", MAX_LINE / 2));
        }
        self.due |= matches!(entry, Entry::Dropped(_) | Entry::End { .. });
        self.text_bytes += text;
        self.entries.push(entry);
        self.order.push(ENTRY);
        Ok(())
    }

    /// Takes a frame that was checked and that it [`Filling::takes`]; numbers of texts and of the frame are shifted.
    pub(super) fn frame(&mut self, frame: &TapFrame, sequences: u32, frames: u64) -> Result<(), String> {
        let number = frame.number.checked_add(frames).and_then(|number| i64::try_from(number).ok());
        let number = number.ok_or_else(|| format!("frame {} has too large a number", frame.number))?;
        let mut rows = Rows::default();
        for token in &frame.tokens {
            let sequence = i64::from(token.sequence) + i64::from(sequences);
            rows.push(signed(sequence)?, signed(token.position)?, signed(token.id)?);
        }
        let first = self.rows.token.len();
        signed(first + rows.token.len())?;
        self.bytes += rows.token.len() * 12 + 12;
        self.rows.append(rows);
        for tensor in frame.tensors.iter().filter(|_| !frame.tokens.is_empty()) {
            let held = self.tensors.entry(Arc::clone(&tensor.name)).or_insert_with(|| Tensor {
                group: tensor.group,
                layer: tensor.layer,
                columns: tensor.columns as usize,
                is_float: matches!(tensor.data, Numbers::F32(_)),
                words: Vec::new(),
                rows: Vec::new(),
            });
            match &tensor.data {
                Numbers::F32(numbers) => held.words.extend_from_slice(bytemuck::cast_slice(numbers)),
                Numbers::U32(numbers) => held.words.extend_from_slice(numbers),
            }
            held.rows.extend(first as i32..self.rows.token.len() as i32);
            self.bytes += frame.tokens.len() * tensor.columns as usize * 4;
        }
        if let Some(times) = &frame.times {
            self.times(times);
        }
        self.frame_number.push(number);
        self.frame_rows.push(frame.tokens.len() as i32);
        self.order.push(FRAME);
        Ok(())
    }

    fn times(&mut self, times: &RunTimes) {
        self.run_frame.push(self.frame_rows.len() as i32);
        self.run_program.push(times.program as i32);
        self.run_rows.push(times.rows as i32);
        self.run_steps.push(times.starts.len() as i32);
        self.run_start.extend(times.starts.iter().map(|start| start.map_or(-1, nanoseconds)));
        self.run_duration.extend(times.durations.iter().copied().map(nanoseconds));
        self.bytes += times.starts.len() * 16 + 16;
    }

    /// Its line and its bytes, sealed; an error if either is larger than may be.
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        let mut lists = Lists::default();
        lists.add("events", Dtype::U8, self.order.clone());
        lists.ints("text.sequence", &self.text.sequence);
        lists.ints("text.position", &self.text.position);
        lists.ints("text.token", &self.text.token);
        lists.add("text.generated", Dtype::U8, self.generated.clone());
        lists.ints("sequence", &self.rows.sequence);
        lists.ints("position", &self.rows.position);
        lists.ints("token", &self.rows.token);
        lists.longs("frame.number", &self.frame_number);
        lists.ints("frame.rows", &self.frame_rows);
        if !self.run_frame.is_empty() {
            lists.ints("run.frame", &self.run_frame);
            lists.ints("run.program", &self.run_program);
            lists.ints("run.rows", &self.run_rows);
            lists.ints("run.steps", &self.run_steps);
            lists.longs("run.start", &self.run_start);
            lists.longs("run.duration", &self.run_duration);
        }
        // Tensors of the same frames share a list of rows.
        let mut row_lists: Vec<&[i32]> = Vec::new();
        let mut taps = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let index = row_lists.iter().position(|rows| *rows == tensor.rows).unwrap_or_else(|| {
                row_lists.push(&tensor.rows);
                row_lists.len() - 1
            });
            let (dtype, bytes) = tensor_bytes(&tensor.words, tensor.is_float);
            lists.0.push((name.to_string(), dtype, vec![tensor.rows.len(), tensor.columns], bytes));
            taps.insert(name.to_string(), (tensor.group, tensor.layer, format!("rows.{index}")));
        }
        for (index, rows) in row_lists.iter().enumerate() {
            lists.ints(&format!("rows.{index}"), rows);
        }
        let all = self.text.sequence.iter().chain(&self.rows.sequence).map(|sequence| *sequence as u32);
        let begun = self.entries.iter().filter_map(|entry| match entry {
            Entry::Begin(info) => Some(info.number),
            _ => None,
        });
        let sequences = all.chain(begun);
        let numbers = self.frame_number.iter().map(|number| *number as u64);
        let line = Line {
            kind: Kind::Tokens,
            bytes: 0,
            tokens: self.text.token.len() as u64,
            rows: self.rows.token.len() as u64,
            frames: numbers.clone().min().zip(numbers.max()),
            sequences: sequences.clone().min().zip(sequences.max()),
            events: self.entries.clone(),
            taps,
        };
        lists.seal(line)
    }
}

impl Rows {
    fn push(&mut self, sequence: i32, position: i32, token: i32) {
        self.sequence.push(sequence);
        self.position.push(position);
        self.token.push(token);
    }

    fn append(&mut self, mut more: Self) {
        self.sequence.append(&mut more.sequence);
        self.position.append(&mut more.position);
        self.token.append(&mut more.token);
    }
}

/// The chunk that says what stands in no line: texts of tokens, biases of experts.
pub(super) fn subject_chunk(subject: &Subject) -> Result<Vec<u8>, String> {
    let mut lists = Lists::default();
    let mut end = 0;
    let ends: Result<Vec<i32>, String> = subject
        .pieces
        .iter()
        .map(|piece| {
            end += piece.len();
            signed(end)
        })
        .collect();
    lists.add("pieces.bytes", Dtype::U8, subject.pieces.concat().into_bytes());
    lists.ints("pieces.end", &ends?);
    for (layer, bias) in &subject.expert_bias {
        let words: Vec<u32> = bias.iter().map(|number| number.to_bits()).collect();
        lists.add(&format!("moe.{layer}.bias"), Dtype::F32, word_bytes(&words));
    }
    let line = Line {
        kind: Kind::Subject,
        bytes: 0,
        tokens: 0,
        rows: 0,
        frames: None,
        sequences: None,
        events: Vec::new(),
        taps: BTreeMap::new(),
    };
    lists.seal(line)
}

/// Lists and tensors of a chunk: name, type, shape, bytes.
#[derive(Default)]
struct Lists(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Lists {
    fn add(&mut self, name: &str, dtype: Dtype, bytes: Vec<u8>) {
        let len = bytes.len() / (dtype.bitsize() / 8);
        self.0.push((name.to_owned(), dtype, vec![len], bytes));
    }

    fn ints(&mut self, name: &str, numbers: &[i32]) {
        let words: Vec<u32> = numbers.iter().map(|number| *number as u32).collect();
        self.add(name, Dtype::I32, word_bytes(&words));
    }

    fn longs(&mut self, name: &str, numbers: &[i64]) {
        self.add(name, Dtype::I64, numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    }

    fn seal(&self, line: Line) -> Result<Vec<u8>, String> {
        let views = self.0.iter().map(|(name, dtype, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| error.to_string())?))
        });
        let views: Vec<(&str, TensorView<'_>)> = views.collect::<Result<_, String>>()?;
        let bytes = safetensors::serialize(views, None).map_err(|error| error.to_string())?;
        let line = Line { bytes: bytes.len() as u64, ..line };
        let line = serde_json::to_string(&line).map_err(|error| error.to_string())?;
        if bytes.len() as u64 > MAX_CHUNK || (line.len() + super::SEAL_BYTES) as u64 > MAX_LINE {
            return Err(format!("a chunk has a line of {} bytes and {} bytes of tensors", line.len(), bytes.len()));
        }
        Ok(seal(line, &bytes))
    }
}

/// Little-endian bytes: floats as they are, integers as the shortest signed type that holds them all.
fn tensor_bytes(words: &[u32], is_float: bool) -> (Dtype, Vec<u8>) {
    let largest = words.iter().copied().max().unwrap_or(0);
    if is_float {
        (Dtype::F32, word_bytes(words))
    } else if i16::try_from(largest).is_ok() {
        let mut bytes = vec![0; words.len() * 2];
        for (place, word) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *place = (*word as u16).to_le_bytes();
        }
        (Dtype::I16, bytes)
    } else {
        // Ids are below the number of experts or tokens, which `check_tensor` and `check_subject` keep in range.
        (Dtype::I32, word_bytes(words))
    }
}

fn word_bytes(words: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0; words.len() * 4];
    for (place, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *place = word.to_le_bytes();
    }
    bytes
}
