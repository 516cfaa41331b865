//! What is copied of a watched run, and how a frame is made of the copy.

use std::sync::Arc;

use moewe_plan::{DType, FrameTensor, FrameToken, Numbers, RunTimes, TapFrame, TapGroup};

use crate::timing::{self, STEP_BYTES};

/// Words of one [`moewe_plan::TokenInfo`].
const TOKEN_WORDS: usize = 4;

/// A tensor in the copy.
#[derive(Debug)]
struct Place {
    name: Arc<str>,
    group: TapGroup,
    layer: Option<u32>,
    dtype: DType,
    /// First word of the first row.
    word: usize,
    stride: usize,
    columns: usize,
}

/// Bytes to be copied from a buffer of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    pub(crate) buffer: u32,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Where they come to lie.
    pub(crate) at: u64,
}

/// A tap that is wanted, and the bytes of its buffer from its first to its last number.
pub(crate) struct Wanted<'a> {
    pub(crate) tap: &'a moewe_plan::TapSpec,
    pub(crate) dtype: DType,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// Which steps are timed.
#[derive(Debug)]
pub(crate) struct Timed {
    /// Index into the plan's programs.
    pub(crate) program: u32,
    /// Rows whose logits are wanted.
    pub(crate) rows: u32,
    /// For each step, whether it runs.
    pub(crate) ran: Vec<bool>,
    /// Nanoseconds of a tick.
    pub(crate) period: f32,
}

impl Timed {
    /// How many steps run.
    pub(crate) fn steps(&self) -> usize {
        self.ran.iter().filter(|ran| **ran).count()
    }
}

/// How a copy of a run is laid out: the batch as it was before the run, the tensors, the timestamps.
#[derive(Debug)]
pub(crate) struct Layout {
    tokens: usize,
    places: Vec<Place>,
    /// Copies behind the run, as few as possible.
    pub(crate) copies: Vec<Copy>,
    pub(crate) timed: Option<Timed>,
    /// Where the timestamps lie.
    pub(crate) times_at: u64,
    /// Length of all.
    pub(crate) bytes: u64,
}

impl Layout {
    pub(crate) fn new(tokens: usize, wanted: &[Wanted<'_>], timed: Option<Timed>) -> Self {
        let mut order: Vec<&Wanted<'_>> = wanted.iter().collect();
        order.sort_by_key(|wanted| (wanted.tap.buffer, wanted.offset));
        let mut at = (tokens * TOKEN_WORDS * 4) as u64;
        let mut copies: Vec<Copy> = Vec::new();
        for wanted in order {
            let (buffer, offset, end) = (wanted.tap.buffer, wanted.offset, wanted.offset + wanted.bytes);
            match copies.last_mut() {
                // Taps that touch or overlap are one copy.
                Some(last) if last.buffer == buffer && offset <= last.offset + last.bytes => {
                    let longer = end.saturating_sub(last.offset).max(last.bytes);
                    at += longer - last.bytes;
                    last.bytes = longer;
                }
                _ => {
                    copies.push(Copy { buffer, offset, bytes: wanted.bytes, at });
                    at += wanted.bytes;
                }
            }
        }
        let place = |wanted: &Wanted<'_>| {
            let (buffer, offset) = (wanted.tap.buffer, wanted.offset);
            // The last copy that begins at or before the tap holds it.
            let copy = copies[copies.partition_point(|copy| (copy.buffer, copy.offset) <= (buffer, offset)) - 1];
            Place {
                name: wanted.tap.name.as_str().into(),
                group: wanted.tap.group,
                layer: wanted.tap.layer,
                dtype: wanted.dtype,
                word: ((copy.at + offset - copy.offset) / 4) as usize,
                stride: wanted.tap.stride as usize,
                columns: wanted.tap.columns as usize,
            }
        };
        let places = wanted.iter().map(place).collect();
        let bytes = at + timed.as_ref().map_or(0, |timed| timed.steps() as u64 * STEP_BYTES);
        Self { tokens, places, copies, timed, times_at: at, bytes }
    }

    /// Bytes of the batch, in front of all else.
    pub(crate) fn token_bytes(&self) -> u64 {
        (self.tokens * TOKEN_WORDS * 4) as u64
    }

    /// The frame in a copy. `tokens` are the rows, without their ids; a row without a token is left out.
    pub(crate) fn frame(&self, number: u64, tokens: &[Option<FrameToken>], bytes: &[u8]) -> TapFrame {
        let word = |index: usize| &bytes[index * 4..][..4];
        let u32_at = |index: usize| u32::from_le_bytes(word(index).try_into().expect("four bytes"));
        let rows: Vec<usize> = (0..self.tokens).filter(|&row| tokens[row].is_some()).collect();
        let token = |&row: &usize| FrameToken { id: u32_at(row * TOKEN_WORDS), ..tokens[row].unwrap_or_default() };
        let tensor = |place: &Place| {
            let row = |&row: &usize| {
                let first = (place.word + row * place.stride) * 4;
                bytes[first..first + place.columns * 4].as_chunks::<4>().0
            };
            let numbers = rows.iter().flat_map(row);
            let data = match place.dtype {
                DType::F32 => Numbers::F32(numbers.map(|word| f32::from_le_bytes(*word)).collect()),
                DType::U32 => Numbers::U32(numbers.map(|word| u32::from_le_bytes(*word)).collect()),
            };
            let (name, columns) = (Arc::clone(&place.name), place.columns as u32);
            FrameTensor { name, group: place.group, layer: place.layer, columns, data }
        };
        TapFrame {
            number,
            tokens: rows.iter().map(token).collect(),
            tensors: self.places.iter().map(tensor).collect(),
            times: self.timed.as_ref().map(|timed| self.times(timed, bytes)),
        }
    }

    fn times(&self, timed: &Timed, bytes: &[u8]) -> RunTimes {
        let ticks = &bytes[self.times_at as usize..][..timed.steps() * STEP_BYTES as usize];
        let ticks: Vec<u64> = ticks.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        timing::times(timed.program, timed.rows, &timed.ran, ticks.as_chunks::<2>().0, timed.period)
    }
}

#[cfg(test)]
mod tests {
    use moewe_plan::{Dim, TapSpec};

    use super::*;

    fn tap(name: &str, buffer: u32, stride: u32, offset: u32, columns: u32) -> TapSpec {
        let (group, layer, rows) = (TapGroup::Routing, Some(1), Dim::Const(0));
        TapSpec { name: name.into(), group, layer, buffer, rows, stride, offset, columns }
    }

    fn wanted(tap: &TapSpec, rows: u64) -> Wanted<'_> {
        let words = (rows - 1) * u64::from(tap.stride) + u64::from(tap.columns);
        Wanted { tap, dtype: DType::U32, offset: u64::from(tap.offset) * 4, bytes: words * 4 }
    }

    #[test]
    fn neighbours_are_copied_together_and_read_apart() {
        // Two interleaved taps of buffer 5, one of buffer 2 inside another, and one far behind.
        let taps = [tap("b", 5, 4, 2, 2), tap("a", 5, 4, 0, 2), tap("all", 2, 3, 0, 3), tap("in", 2, 3, 1, 1)];
        let far = TapSpec { offset: 40, stride: 41, ..tap("far", 2, 41, 40, 1) };
        let mut all: Vec<Wanted<'_>> = taps.iter().map(|tap| wanted(tap, 2)).collect();
        all.push(wanted(&far, 2));
        let layout = Layout::new(2, &all, None);
        let copies: Vec<_> = layout.copies.iter().map(|c| (c.buffer, c.offset, c.bytes, c.at)).collect();
        assert_eq!(copies, [(2, 0, 24, 32), (2, 160, 168, 56), (5, 0, 32, 224)]);
        assert_eq!(layout.bytes, 256);
        // Numbers tell where they come from: buffer times 1000 plus their word; tokens 7 and 8.
        let mut words = vec![7u32, 0, 0, 0, 8, 0, 0, 0];
        for copy in &layout.copies {
            words.extend((copy.offset / 4..(copy.offset + copy.bytes) / 4).map(|w| copy.buffer * 1000 + w as u32));
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let row = |sequence, position| Some(FrameToken { sequence, position, id: 0 });
        let frame = layout.frame(3, &[row(4, 10), row(5, 20)], &bytes);
        assert_eq!((frame.number, frame.tokens[0].id, frame.tokens[1].id), (3, 7, 8));
        let data = |name: &str| match &frame.tensors.iter().find(|t| &*t.name == name).unwrap().data {
            Numbers::U32(numbers) => numbers.clone(),
            Numbers::F32(_) => panic!("{name} is not of floats"),
        };
        assert_eq!(data("a"), [5000, 5001, 5004, 5005]);
        assert_eq!(data("b"), [5002, 5003, 5006, 5007]);
        assert_eq!(data("all"), [2000, 2001, 2002, 2003, 2004, 2005]);
        assert_eq!(data("in"), [2001, 2004]);
        assert_eq!(data("far"), [2040, 2081]);
        let names: Vec<&str> = frame.tensors.iter().map(|tensor| &*tensor.name).collect();
        assert_eq!(names, ["b", "a", "all", "in", "far"], "in the order of the plan");
        // Without its first row.
        let one = Layout::new(2, &all[..4], None).frame(0, &[None, row(5, 20)], &bytes);
        assert_eq!((one.tokens.len(), one.tokens[0].sequence, one.tokens[0].id), (1, 5, 8));
        assert_eq!(one.tensors[2].data, Numbers::U32(vec![2003, 2004, 2005]));
    }
}
