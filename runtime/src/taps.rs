//! Reading what a program computed.

use moewe_plan::{DType, Dim, Program, ProgramKind, Symbol, Symbols, TapSpec};

use crate::{Error, Result, Session};

/// Numbers of a tap.
#[derive(Clone, Debug, PartialEq)]
pub enum Words {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 32-bit unsigned integers.
    U32(Vec<u32>),
}

/// A tensor that a program left.
#[derive(Clone, Debug, PartialEq)]
pub struct Tap {
    /// Its name.
    pub name: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Its numbers, row by row.
    pub data: Words,
}

/// Whether a tap is the one of its name that tells of a run. A program may have two, one with a row for each token and one
/// for each wanted row: where all tokens are wanted rows (`all_rows`), both hold the same, and the second is cheaper.
pub(crate) fn tells(program: &Program, tap: &TapSpec, all_rows: bool) -> bool {
    let of_rows = |tap: &TapSpec| tap.rows == Dim::Symbol(Symbol::Rows);
    let has_twin = program.taps.iter().any(|other| of_rows(other) != of_rows(tap) && other.name == tap.name);
    !has_twin || of_rows(tap) == all_rows
}

impl Session {
    /// Reads one tap of the program that ran last.
    pub fn read_tap(&self, kind: ProgramKind, name: &str) -> Result<Tap> {
        let mut taps = self.read_chosen(kind, |spec| spec.name == name)?;
        taps.pop().ok_or_else(|| Error::NoTap { name: name.into(), kind })
    }

    /// Reads all taps of the program that ran last, which must be of this kind.
    pub fn read_taps(&self, kind: ProgramKind) -> Result<Vec<Tap>> {
        self.read_chosen(kind, |_| true)
    }

    /// Reads the taps whose specification `wanted` picks, all in one copy.
    pub fn read_chosen(&self, kind: ProgramKind, wanted: impl Fn(&TapSpec) -> bool) -> Result<Vec<Tap>> {
        let last = self.last.ok_or(Error::NotRun { kind })?;
        let plan = self.model.plan();
        let program = &plan.programs[last.program];
        if program.kind != kind {
            return Err(Error::NotRun { kind });
        }
        let mut specs = Vec::new();
        let mut sources = Vec::new();
        for spec in program.taps.iter().filter(|tap| wanted(tap) && tells(program, tap, last.all_rows)) {
            let (rows, offset, bytes) = self.extent(spec, &last.symbols)?;
            if bytes > 0 {
                sources.push((self.buffers.get(spec.buffer), offset, bytes));
            }
            specs.push((spec, rows as usize, (bytes / 4) as usize));
        }
        let gpu = self.model.gpu();
        let words = self.read_bounded(&sources)?;
        gpu.check()?;
        let mut rest = &words[..];
        let gather = |(spec, rows, count): (&TapSpec, usize, usize)| {
            let (words, behind) = rest.split_at(count);
            rest = behind;
            let columns = spec.columns as usize;
            let numbers = words.chunks(spec.stride as usize).flat_map(|row| row[..columns].iter().copied());
            let data = match plan.buffers[spec.buffer as usize].dtype {
                DType::F32 => Words::F32(numbers.map(f32::from_bits).collect()),
                DType::U32 => Words::U32(numbers.collect()),
            };
            Tap { name: spec.name.clone(), shape: [rows, columns], data }
        };
        Ok(specs.into_iter().map(gather).collect())
    }

    /// Rows of a tap, and the bytes of its buffer from its first number on, up to its last one.
    pub(crate) fn extent(&self, spec: &TapSpec, symbols: &Symbols) -> Result<(u64, u64, u64)> {
        let rows = spec.rows.eval(symbols);
        let words = match rows.checked_sub(1) {
            None => Some(0),
            Some(whole) => whole.checked_mul(spec.stride.into()).and_then(|n| n.checked_add(spec.columns.into())),
        };
        let (buffer, offset) = (self.buffers.get(spec.buffer), u64::from(spec.offset) * 4);
        let bytes = words.and_then(|words| words.checked_mul(4));
        let end = bytes.and_then(|bytes| bytes.checked_add(offset));
        match bytes {
            Some(bytes) if end.is_some_and(|end| end <= buffer.bytes()) => Ok((rows, offset, bytes)),
            _ => {
                let (name, size) = (&self.model.plan().buffers[spec.buffer as usize].name, buffer.bytes());
                let what = format!("tap {} ends at {end:?} in buffer {name} of {size} bytes", spec.name);
                Err(Error::Plan { what })
            }
        }
    }

    /// Reads sources in as few copies as a buffer of moderate size allows.
    fn read_bounded(&self, sources: &[(&crate::memory::Buffer, u64, u64)]) -> Result<Vec<u32>> {
        const MOST: u64 = 256 << 20;
        let gpu = self.model.gpu();
        let mut words = Vec::new();
        let mut rest = sources;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fitting = rest.iter().take_while(|source| {
                bytes += source.2;
                bytes <= MOST
            });
            let (now, later) = rest.split_at(fitting.count().max(1));
            words.extend(gpu.read(gpu.encoder("taps"), now)?);
            rest = later;
        }
        Ok(words)
    }
}
