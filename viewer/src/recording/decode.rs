//! What a chunk says, checked to the last number: its author may be anyone.

use std::collections::BTreeMap;
use std::sync::Arc;

use moewe_plan::{FrameTensor, FrameToken, Numbers, RunTimes, TapFrame, TapGroup};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::chunk::{FRAME, TOKEN, check_tensor, check_times, is_name};
use super::{Entry, Line, MAX_COLUMNS, MAX_EVENTS, MAX_ROWS, MAX_TENSORS};
use crate::source::Event;
use crate::store::Token;
use crate::subject::Subject;

/// Something that happened, as it stands in a recording.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Told {
    /// A token of a text, at this position.
    Token { sequence: u32, position: u32, token: Token },
    /// Anything else.
    Event(Event),
}

/// The events of a chunk of tokens, in order.
pub(super) fn events(line: Line, bytes: &[u8], subject: &Subject) -> Result<Vec<Told>, String> {
    let chunk = Chunk::of(bytes)?;
    let order = chunk.bytes("events")?;
    if order.len() > MAX_EVENTS {
        return Err(format!("{} events, expected at most {MAX_EVENTS}", order.len()));
    }
    let mut tokens = tokens(&chunk)?.into_iter();
    let mut frames = frames(&line, &chunk, subject)?.into_iter();
    let mut entries = line.events.into_iter();
    let mut counts = [0; 3];
    for mark in order {
        *counts.get_mut(usize::from(*mark)).ok_or_else(|| format!("an event of kind {mark}"))? += 1;
    }
    let expected = [tokens.len(), frames.len(), entries.len()];
    if counts != expected {
        return Err(format!("events tell of {counts:?} tokens, frames and others, there are {expected:?}"));
    }
    let told = order.iter().filter_map(|mark| match *mark {
        TOKEN => tokens.next(),
        FRAME => frames.next().map(|frame| Told::Event(Event::Frame(frame))),
        _ => entries.next().map(|entry| Told::Event(entry.into())),
    });
    Ok(told.collect())
}

impl From<Entry> for Event {
    fn from(entry: Entry) -> Self {
        match entry {
            Entry::Begin(info) => Event::Begin(info),
            Entry::Dropped(frames) => Event::Dropped(frames),
            Entry::End { sequence, reason, tokens_per_second } => Event::End { sequence, reason, tokens_per_second },
            Entry::Note(text) => Event::Note(text),
            Entry::Error(text) => Event::Error(text),
        }
    }
}

/// Puts in what a chunk says of the model.
pub(super) fn fill_subject(bytes: &[u8], subject: &mut Subject) -> Result<(), String> {
    let chunk = Chunk::of(bytes)?;
    let (text, ends) = (chunk.bytes("pieces.bytes")?, chunk.ints("pieces.end")?);
    let mut pieces = Vec::with_capacity(ends.len());
    let mut start = 0;
    for end in ends.into_iter().map(|end| end as usize) {
        let piece = text.get(start..end).ok_or_else(|| format!("a token's text goes from {start} to {end}"))?;
        let piece =
            std::str::from_utf8(piece).map_err(|_| format!("the text of token {} is no UTF-8", pieces.len()))?;
        pieces.push(piece.to_owned());
        start = end;
    }
    let mut biases = BTreeMap::new();
    for layer in 0..super::layers(subject) {
        if let Ok(view) = chunk.0.tensor(&format!("moe.{layer}.bias")) {
            if (view.dtype(), view.shape()) != (Dtype::F32, &[subject.model.experts as usize][..]) {
                return Err(format!("bias of layer {layer} is {} {:?}", view.dtype(), view.shape()));
            }
            biases.insert(layer, floats(view.data()));
        }
    }
    subject.pieces = pieces;
    subject.expert_bias = biases;
    Ok(())
}

fn tokens(chunk: &Chunk<'_>) -> Result<Vec<Told>, String> {
    let (sequence, position) = (chunk.ints("text.sequence")?, chunk.ints("text.position")?);
    let (token, generated) = (chunk.ints("text.token")?, chunk.bytes("text.generated")?);
    let len = sequence.len();
    if [position.len(), token.len(), generated.len()] != [len; 3] {
        return Err("the lists of tokens differ in length".into());
    }
    let token = |i: usize| Token { id: token[i], generated: generated[i] != 0 };
    Ok((0..len).map(|i| Told::Token { sequence: sequence[i], position: position[i], token: token(i) }).collect())
}

/// A tensor of some rows of a chunk.
struct Tensor<'a> {
    name: Arc<str>,
    group: TapGroup,
    layer: Option<u32>,
    columns: usize,
    view: TensorView<'a>,
    rows: Arc<Vec<u32>>,
    /// Rows that were handed out.
    taken: usize,
}

fn frames(line: &Line, chunk: &Chunk<'_>, subject: &Subject) -> Result<Vec<TapFrame>, String> {
    let (sequence, position, token) = (chunk.ints("sequence")?, chunk.ints("position")?, chunk.ints("token")?);
    let rows = sequence.len();
    let counts = chunk.ints("frame.rows")?;
    let numbers = chunk.longs("frame.number")?;
    let sum: u64 = counts.iter().map(|rows| u64::from(*rows)).sum();
    if [position.len(), token.len()] != [rows; 2]
        || numbers.len() != counts.len()
        || sum != rows as u64
        || rows > MAX_ROWS
    {
        return Err(format!("lists of rows or frames differ in length: {rows} rows, {sum} in frames"));
    }
    let mut tensors = tensors(line, chunk, subject, rows)?;
    let mut runs = runs(chunk, counts.len(), subject)?;
    let mut start = 0;
    let mut frames = Vec::with_capacity(counts.len());
    for (index, (count, number)) in counts.into_iter().zip(numbers).enumerate() {
        let number = u64::try_from(number).map_err(|_| format!("a frame has number {number}"))?;
        let range = start..start + count as usize;
        let token = |i: usize| FrameToken { sequence: sequence[i], position: position[i], id: token[i] };
        let mut frame = TapFrame { number, times: runs.remove(&index), ..TapFrame::default() };
        frame.tokens = range.clone().map(token).collect();
        for tensor in tensors.iter_mut().filter(|_| count > 0) {
            frame.tensors.extend(tensor.take(&range)?);
        }
        frames.push(frame);
        start = range.end;
    }
    match tensors.iter().find(|tensor| tensor.taken != tensor.rows.len()) {
        Some(tensor) => Err(format!("{}: its rows are not in order", tensor.name)),
        None => Ok(frames),
    }
}

fn tensors<'a>(line: &Line, chunk: &Chunk<'a>, subject: &Subject, rows: usize) -> Result<Vec<Tensor<'a>>, String> {
    if line.taps.len() > MAX_TENSORS {
        return Err(format!("{} tensors, expected at most {MAX_TENSORS}", line.taps.len()));
    }
    let mut lists: BTreeMap<&str, Arc<Vec<u32>>> = BTreeMap::new();
    let mut tensors = Vec::with_capacity(line.taps.len());
    for (name, (group, layer, list)) in &line.taps {
        if !is_name(name) {
            return Err(format!("no tensor may be called {name:?}"));
        }
        let view = chunk.0.tensor(name).map_err(|error| format!("{name}: {error}"))?;
        let list = match lists.get(list.as_str()) {
            Some(list) => Arc::clone(list),
            None => Arc::clone(lists.entry(list).or_insert(Arc::new(chunk.ints(list)?))),
        };
        let (&[count, columns], Dtype::F32 | Dtype::I16 | Dtype::I32) = (view.shape(), view.dtype()) else {
            return Err(format!(
                "{name} is {} {:?}, expected F32, I16 or I32 [rows, columns]",
                view.dtype(),
                view.shape()
            ));
        };
        let is_sound = list.last().is_none_or(|last| (*last as usize) < rows);
        if count != list.len() || !(1..=MAX_COLUMNS).contains(&columns) || !is_sound {
            return Err(format!("{name} is {:?} for {} rows of {rows}", view.shape(), list.len()));
        }
        let largest = match view.dtype() {
            Dtype::F32 => None,
            _ => integers(&view, view.data())?.into_iter().max(),
        };
        check_tensor(name, *group, *layer, largest, subject)?;
        let (name, group, layer) = (name.as_str().into(), *group, *layer);
        tensors.push(Tensor { name, group, layer, columns, view, rows: list, taken: 0 });
    }
    Ok(tensors)
}

impl Tensor<'_> {
    /// The tensor of a frame whose rows are these, if it has any of them; then it has to have all.
    fn take(&mut self, range: &std::ops::Range<usize>) -> Result<Option<FrameTensor>, String> {
        let rest = &self.rows[self.taken..];
        if rest.first().is_none_or(|first| *first as usize >= range.end) {
            return Ok(None);
        }
        let expected = range.start as u32..range.end as u32;
        if !rest.iter().copied().take(range.len()).eq(expected) {
            return Err(format!("{} has not all rows of a frame, or not in order", self.name));
        }
        let row_bytes = self.columns * self.view.dtype().bitsize() / 8;
        let bytes = &self.view.data()[self.taken * row_bytes..][..range.len() * row_bytes];
        self.taken += range.len();
        let (name, columns) = (Arc::clone(&self.name), self.columns as u32);
        let data = numbers(&self.view, bytes)?;
        Ok(Some(FrameTensor { name, group: self.group, layer: self.layer, columns, data }))
    }
}

/// Times by the index of their frame.
fn runs(chunk: &Chunk<'_>, frames: usize, subject: &Subject) -> Result<BTreeMap<usize, RunTimes>, String> {
    if chunk.0.tensor("run.frame").is_err() {
        return Ok(BTreeMap::new());
    }
    let (frame, program) = (chunk.ints("run.frame")?, chunk.ints("run.program")?);
    let (rows, steps) = (chunk.ints("run.rows")?, chunk.ints("run.steps")?);
    let (start, duration) = (chunk.longs("run.start")?, chunk.longs("run.duration")?);
    let sum: u64 = steps.iter().map(|steps| u64::from(*steps)).sum();
    if [program.len(), rows.len(), steps.len()] != [frame.len(); 3]
        || [start.len() as u64, duration.len() as u64] != [sum; 2]
    {
        return Err("lists of runs differ in length".into());
    }
    let in_order = frame.windows(2).all(|pair| pair[0] < pair[1]);
    if !in_order || frame.last().is_some_and(|last| *last as usize >= frames) {
        return Err(format!("runs belong to frames {frame:?} of {frames}"));
    }
    if start.iter().any(|start| *start < -1) || duration.iter().any(|duration| *duration < 0) {
        return Err("a step takes less than no time".into());
    }
    let mut first = 0;
    let mut runs = BTreeMap::new();
    for (i, frame) in frame.into_iter().enumerate() {
        let range = first..first + steps[i] as usize;
        first = range.end;
        check_times(program[i] as usize, range.len(), range.len(), subject)?;
        let starts = start[range.clone()].iter().map(|start| u64::try_from(*start).ok()).collect();
        let durations = duration[range].iter().map(|duration| *duration as u64).collect();
        runs.insert(frame as usize, RunTimes { program: program[i], rows: rows[i], starts, durations });
    }
    Ok(runs)
}

/// The safetensors file of a chunk.
struct Chunk<'a>(SafeTensors<'a>);

impl<'a> Chunk<'a> {
    fn of(bytes: &'a [u8]) -> Result<Self, String> {
        SafeTensors::deserialize(bytes).map(Self).map_err(|error| error.to_string())
    }

    fn list(&self, name: &str, dtype: Dtype) -> Result<&'a [u8], String> {
        let view = self.0.tensor(name).map_err(|error| error.to_string())?;
        if view.dtype() == dtype && view.shape().len() == 1 {
            return Ok(view.data());
        }
        Err(format!("{name} is {} {:?}, expected a list of {dtype}", view.dtype(), view.shape()))
    }

    fn bytes(&self, name: &str) -> Result<&'a [u8], String> {
        self.list(name, Dtype::U8)
    }

    /// A list of numbers from 0 to 2³¹ − 1.
    fn ints(&self, name: &str) -> Result<Vec<u32>, String> {
        let bytes = self.list(name, Dtype::I32)?;
        unsigned(bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word)), name)
    }

    fn longs(&self, name: &str) -> Result<Vec<i64>, String> {
        Ok(self.list(name, Dtype::I64)?.as_chunks::<8>().0.iter().map(|word| i64::from_le_bytes(*word)).collect())
    }
}

fn unsigned(numbers: impl Iterator<Item = i32>, name: &str) -> Result<Vec<u32>, String> {
    numbers.map(|number| u32::try_from(number).map_err(|_| format!("{name} says {number}"))).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// Some of a tensor's bytes as numbers.
fn numbers(view: &TensorView<'_>, bytes: &[u8]) -> Result<Numbers, String> {
    match view.dtype() {
        Dtype::F32 => Ok(Numbers::F32(floats(bytes))),
        _ => Ok(Numbers::U32(integers(view, bytes)?)),
    }
}

fn integers(view: &TensorView<'_>, bytes: &[u8]) -> Result<Vec<u32>, String> {
    match view.dtype() {
        Dtype::I16 => unsigned(bytes.as_chunks::<2>().0.iter().map(|half| i16::from_le_bytes(*half).into()), "an id"),
        _ => unsigned(bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word)), "an id"),
    }
}
