//! Conversion of tensors and the writing of weight files, streaming: one tensor is in memory at a time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use float8::F8E4M3;
use half::{bf16, f16};
use moewe_plan::{Entry, Mapped, Segment, Staging, Weight, WeightFile, WeightFormat, hash_file};
use rayon::prelude::*;
use safetensors::tensor::{View, serialize_to_file};

use crate::checkpoint::{Checkpoint, TensorView};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::pack::{Content, Item, Packer, Piece, place_item, scale_name};
use crate::quantize;

/// A weight file of a bundle is not larger than this if its tensors allow.
const MAX_FILE_BYTES: u64 = 4 << 30;
/// Tensor of zeros from which flat lists are padded.
const ZEROS: &str = "moewe.zeros";

/// What writing the weights found worth saying.
pub type Warnings = Vec<String>;

/// Says how far long work is: bytes done, bytes in all.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Counts the bytes that were handed to the writer.
struct Meter<'a> {
    done: AtomicU64,
    total: AtomicU64,
    progress: Progress<'a>,
    /// Set from elsewhere to stop.
    stop: &'a AtomicBool,
}

impl Meter<'_> {
    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed);
        (self.progress)(done, self.total.load(Ordering::Relaxed));
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        if self.stopped() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// A tensor to be written.
struct Output<'a> {
    name: String,
    shape: Vec<usize>,
    format: WeightFormat,
    source: Source<'a>,
    meter: &'a Meter<'a>,
}

enum Source<'a> {
    /// The bytes as they are.
    Same(&'a [u8]),
    /// Converted, rows padded with zeros to the output's width.
    Convert(Matrix<'a>),
    /// The codes of a tensor's groups, which `format` says.
    Codes { matrix: Matrix<'a>, chosen: &'a Chosen },
    /// Their scales, in f16.
    Scales { matrix: Matrix<'a>, format: WeightFormat, chosen: &'a Chosen },
    /// Numbers.
    Numbers(&'a [f32]),
}

/// A tensor of the checkpoint, or some of its columns, with the scales of its blocks, if it has any.
#[derive(Clone)]
struct Matrix<'a> {
    tensor: TensorView<'a>,
    columns: Range<usize>,
    scales: Option<(TensorView<'a>, [usize; 2])>,
}

impl<'a> Matrix<'a> {
    /// A tensor of `checkpoint`, or some of its columns, on its way to `format`.
    fn new(
        checkpoint: &'a Checkpoint,
        tensor: TensorView<'a>,
        columns: Option<Range<usize>>,
        format: WeightFormat,
    ) -> Self {
        let columns = columns.unwrap_or(0..tensor.shape.last().copied().unwrap_or(1).max(1));
        let decode = tensor.dtype == Dtype::F8E4m3 && format != WeightFormat::Fp8;
        let block = checkpoint.config().quantization.as_ref().map(|q| q.weight_block_size);
        Self { tensor, columns, scales: if decode { checkpoint.scale_of(tensor.name).zip(block) } else { None } }
    }

    /// Numbers of a row of the tensor.
    fn width(&self) -> usize {
        self.tensor.shape.last().copied().unwrap_or(1).max(1)
    }

    fn columns(&self) -> usize {
        self.columns.len()
    }

    fn rows(&self) -> usize {
        self.tensor.elements() / self.width()
    }

    /// Number `column` of its own columns.
    fn number(&self, row: usize, column: usize) -> f32 {
        let column = self.columns.start + column;
        let value = number(&self.tensor, row * self.width() + column);
        match &self.scales {
            None => value,
            Some((scales, block)) => {
                value * number(scales, row / block[0] * self.width().div_ceil(block[1]) + column / block[1])
            }
        }
    }

    /// An error for the first number that is not finite.
    fn check_finite(&self, checkpoint: &Checkpoint) -> Result<()> {
        let bad = (0..self.rows()).into_par_iter().find_map_first(|row| {
            let mut numbers = (0..self.columns()).map(|column| (self.number(row, column), row, column));
            numbers.find(|(number, ..)| !number.is_finite())
        });
        let Some((found, row, column)) = bad else { return Ok(()) };
        let path = checkpoint.files()[self.tensor.file].path.clone();
        Err(Error::NotFinite { path, tensor: self.tensor.name.to_owned(), row, column, found })
    }

    /// Calls `make` with the numbers of each group, in parallel, to fill `bytes` bytes for each.
    fn groups(&self, bytes: usize, make: impl Fn(usize, &quantize::Numbers, &mut [u8]) + Sync) -> Vec<u8> {
        let in_row = self.columns() / quantize::LEN;
        let mut out = vec![0; self.rows() * in_row * bytes];
        out.par_chunks_mut(in_row * bytes).enumerate().for_each(|(row, out)| {
            for (at, out) in out.chunks_exact_mut(bytes).enumerate() {
                let numbers = std::array::from_fn(|i| self.number(row, at * quantize::LEN + i));
                make(row * in_row + at, &numbers, out);
            }
        });
        out
    }
}

/// Scales that were chosen for the first of two outputs, codes and scales, and wait for the other. Both stand in one file or
/// in neighbours, so those of a file are all that ever wait.
#[derive(Default)]
struct Chosen(Mutex<HashMap<(String, usize), Vec<u8>>>);

impl Chosen {
    /// The scales of a tensor's groups.
    fn scales(&self, matrix: &Matrix, format: WeightFormat) -> Vec<u8> {
        let key = (matrix.tensor.name.to_owned(), matrix.columns.start);
        if let Some(scales) = self.0.lock().expect("nobody panics with it").remove(&key) {
            return scales;
        }
        let scales = matrix.groups(2, |_, numbers, out| {
            out.copy_from_slice(&quantize::scale(numbers, format).to_le_bytes());
        });
        self.0.lock().expect("nobody panics with it").insert(key, scales.clone());
        scales
    }

    /// The codes of a tensor's groups.
    fn codes(&self, matrix: &Matrix, format: WeightFormat) -> Vec<u8> {
        let scales = self.scales(matrix, format);
        let (scales, _) = scales.as_chunks::<2>();
        matrix.groups(quantize::LEN * format.bits() as usize / 8, |group, numbers, out| {
            let scale = f16::from_le_bytes(scales[group]);
            quantize::pack(&quantize::codes(numbers, scale, format), format, out);
        })
    }
}

impl View for Output<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.format {
            WeightFormat::F32 => safetensors::Dtype::F32,
            WeightFormat::Bf16 => safetensors::Dtype::BF16,
            WeightFormat::F16 => safetensors::Dtype::F16,
            WeightFormat::Fp8 => safetensors::Dtype::F8_E4M3,
            WeightFormat::Int8 => safetensors::Dtype::I8,
            WeightFormat::Int4 => safetensors::Dtype::U8, // two numbers in each
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.meter.stopped() {
            return Cow::Borrowed(&[]); // the writer cannot be stopped, but its file will be thrown away
        }
        self.meter.add(self.data_len() as u64);
        match &self.source {
            Source::Same(bytes) => Cow::Borrowed(bytes),
            Source::Numbers(numbers) => Cow::Borrowed(bytemuck::cast_slice(numbers)),
            Source::Convert(matrix) => {
                let padded = self.shape.last().copied().unwrap_or(1);
                Cow::Owned(convert(matrix, self.format, padded))
            }
            Source::Codes { matrix, chosen } => Cow::Owned(chosen.codes(matrix, self.format)),
            Source::Scales { matrix, format, chosen } => Cow::Owned(chosen.scales(matrix, *format)),
        }
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.format.bits().div_ceil(8) as usize
    }
}

/// Number `i` of a tensor.
fn number(tensor: &TensorView, i: usize) -> f32 {
    let data = tensor.data;
    match tensor.dtype {
        Dtype::F32 => f32::from_le_bytes([data[4 * i], data[4 * i + 1], data[4 * i + 2], data[4 * i + 3]]),
        Dtype::F16 => f16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32(),
        Dtype::F8E4m3 => F8E4M3::from_bits(data[i]).to_f32(),
        other => unreachable!("{other} is refused when the checkpoint is checked"),
    }
}

fn convert(matrix: &Matrix, format: WeightFormat, padded: usize) -> Vec<u8> {
    let columns = matrix.columns();
    let width = format.bits() as usize / 8;
    let mut out = vec![0; matrix.rows() * padded * width];
    out.par_chunks_mut(padded * width).enumerate().for_each(|(row, out)| {
        if format == WeightFormat::Fp8 {
            let first = row * matrix.width() + matrix.columns.start;
            out[..columns].copy_from_slice(&matrix.tensor.data[first..][..columns]); // only ever cut or re-padded
            return;
        }
        for (column, out) in out.chunks_exact_mut(width).take(columns).enumerate() {
            let value = matrix.number(row, column);
            match format {
                WeightFormat::F32 => out.copy_from_slice(&value.to_le_bytes()),
                WeightFormat::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                WeightFormat::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                WeightFormat::Fp8 | WeightFormat::Int8 | WeightFormat::Int4 => unreachable!("made elsewhere"),
            }
        }
    });
    out
}

/// Numbers that are NaN, and for f16 output those that would overflow to infinity.
fn count_bad(tensor: &TensorView, format: WeightFormat) -> (usize, usize) {
    let nans = |bad: &(dyn Fn(&[u8]) -> bool + Sync)| {
        let width = tensor.dtype.bytes();
        tensor.data.par_chunks(1 << 20).map(|chunk| chunk.chunks_exact(width).filter(|n| bad(n)).count()).sum()
    };
    let nan = match tensor.dtype {
        Dtype::F32 => nans(&|n| u32::from_le_bytes([n[0], n[1], n[2], n[3]]) & 0x7fff_ffff > 0x7f80_0000),
        Dtype::F16 => nans(&|n| u16::from_le_bytes([n[0], n[1]]) & 0x7fff > 0x7c00),
        Dtype::Bf16 => nans(&|n| u16::from_le_bytes([n[0], n[1]]) & 0x7fff > 0x7f80),
        Dtype::F8E4m3 => nans(&|n| n[0] & 0x7f == 0x7f),
        _ => 0,
    };
    let overflow = if format == WeightFormat::F16 && matches!(tensor.dtype, Dtype::F32 | Dtype::Bf16) {
        (0..tensor.elements()).into_par_iter().filter(|i| number(tensor, *i).abs() > 65519.0).count()
    } else {
        0
    };
    (nan, overflow)
}

/// What is to be said of the numbers of a tensor that becomes `format`.
fn bad_numbers(tensor: &TensorView, format: WeightFormat) -> Warnings {
    let (name, (nan, overflow)) = (tensor.name, count_bad(tensor, format));
    let mut warnings = Vec::new();
    if nan > 0 {
        warnings.push(format!("tensor `{name}` holds {nan} NaN values; text made with it will be useless"));
    }
    if overflow > 0 {
        warnings.push(format!("tensor `{name}` holds {overflow} values beyond the range of f16; they become infinite"));
    }
    warnings
}

/// A tensor that a weight is made of, as the checkpoint has it, and whether its bytes serve as they are.
struct Part<'a> {
    tensor: TensorView<'a>,
    as_is: bool,
}

fn part<'a>(checkpoint: &'a Checkpoint, item: &Item, piece: &Piece) -> Result<Part<'a>> {
    let tensor = checkpoint.tensor(&piece.tensor)?;
    let same_format = matches!(
        (tensor.dtype, item.weight.format),
        (Dtype::F32, WeightFormat::F32)
            | (Dtype::F16, WeightFormat::F16)
            | (Dtype::Bf16, WeightFormat::Bf16)
            | (Dtype::F8E4m3, WeightFormat::Fp8)
    );
    let columns = item.weight.shape.last().copied().unwrap_or(0);
    let is_whole = piece.columns.is_none();
    Ok(Part { tensor, as_is: is_whole && same_format && (item.flat || columns.is_multiple_of(4)) })
}

/// Writes the weights into `staging`, or refers to the checkpoint's own files for tensors that serve as they are. Returns
/// the files, the weights with their segments, and warnings.
pub fn write_weights(
    packer: Packer,
    staging: &mut Staging,
    reference: bool,
    progress: Progress,
    stop: &AtomicBool,
) -> Result<(Vec<WeightFile>, Vec<Weight>, Warnings)> {
    let mut warnings: Warnings = packer.warning().into_iter().collect();
    let Packer { checkpoint, mut items, .. } = packer;
    let chosen = Chosen::default();
    let meter = Meter { done: AtomicU64::new(0), total: AtomicU64::new(0), progress, stop };
    let mut outputs: Vec<Output> = Vec::new();
    let mut referenced: Vec<usize> = Vec::new(); // files of the checkpoint
    let mut as_is: HashMap<String, (usize, u64, u64)> = HashMap::new();
    for item in &items {
        let format = item.weight.format;
        let pieces = match &item.content {
            Content::Generated(numbers) => {
                let (name, shape) = (item.weight.name.clone(), vec![numbers.len()]);
                outputs.push(Output { name, shape, format, source: Source::Numbers(numbers), meter: &meter });
                continue;
            }
            Content::Scales(pieces, codes) => {
                for piece in pieces {
                    let tensor = checkpoint.tensor(&piece.tensor)?;
                    let matrix = Matrix::new(checkpoint, tensor, piece.columns.clone(), *codes);
                    let shape = vec![matrix.rows(), matrix.columns() / quantize::LEN];
                    let source = Source::Scales { matrix, format: *codes, chosen: &chosen };
                    let name = scale_name(&piece.name());
                    outputs.push(Output { name, shape, format, source, meter: &meter });
                }
                continue;
            }
            Content::Tensors(pieces) => pieces,
        };
        for piece in pieces {
            meter.check()?;
            let (name, Part { tensor, as_is: serves }) = (piece.name(), part(checkpoint, item, piece)?);
            let matrix = Matrix::new(checkpoint, tensor, piece.columns.clone(), format);
            if format.is_grouped() {
                matrix.check_finite(checkpoint)?;
            } else if matrix.columns.start == 0 {
                warnings.extend(bad_numbers(&tensor, format));
            }
            if serves && reference {
                as_is.insert(name, (tensor.file, tensor.offset as u64, tensor.data.len() as u64));
                referenced.push(tensor.file);
                continue;
            }
            let mut shape = tensor.shape.to_vec();
            if let Some(last) = shape.last_mut() {
                *last = matrix.columns();
            }
            let source = if serves {
                Source::Same(tensor.data)
            } else if format.is_grouped() {
                if let Some(last) = shape.last_mut() {
                    *last = *last * format.bits() as usize / 8;
                }
                Source::Codes { matrix, chosen: &chosen }
            } else {
                if let (Some(last), true) = (shape.last_mut(), !item.flat) {
                    *last = last.next_multiple_of(4);
                }
                Source::Convert(matrix)
            };
            outputs.push(Output { name, shape, format, source, meter: &meter });
        }
    }
    let zeros = [0f32; 4];
    outputs.push(Output {
        name: ZEROS.into(),
        shape: vec![4],
        format: WeightFormat::F32,
        source: Source::Numbers(&zeros),
        meter: &meter,
    });
    referenced.sort_unstable();
    referenced.dedup();

    let mut files = Vec::new();
    let mut places: HashMap<String, Segment> = HashMap::new();
    for at in &referenced {
        meter.check()?;
        let file = &checkpoint.files()[*at];
        let path = file.path.canonicalize().map_err(|source| Error::Read { path: file.path.clone(), source })?;
        let blake3 = hash_file(&file.bytes);
        let path = path.to_string_lossy().into_owned();
        for (name, (_, offset, bytes)) in as_is.iter().filter(|(_, (file, ..))| file == at) {
            places.insert(name.clone(), Segment { file: files.len() as u32, offset: *offset, bytes: *bytes });
        }
        files.push(WeightFile { path, referenced: true, bytes: file.bytes.len() as u64, blake3 });
    }
    let total = outputs.iter().map(|output| output.data_len() as u64).sum();
    meter.total.store(total, Ordering::Relaxed);
    outputs.sort_by(|a, b| a.name.cmp(&b.name));
    for (number, group) in split(outputs).into_iter().enumerate() {
        let name = format!("weights-{:05}.safetensors", number + 1);
        let entry = write_file(staging, &name, group, files.len() as u32, &mut places).map_err(|error| {
            // A stopped writer fails in ways of its own.
            meter.check().err().unwrap_or(error)
        })?;
        meter.check()?;
        staging.weight_file(&name, entry.clone());
        files.push(WeightFile { path: name, referenced: false, bytes: entry.bytes, blake3: entry.blake3 });
    }
    progress(total, total);

    let zeros = places.get(ZEROS).copied();
    for item in &mut items {
        place_item(item, |name| places[name], zeros);
    }
    Ok((files, items.into_iter().map(|item| item.weight).collect(), warnings))
}

/// Groups of tensors, each one file.
fn split(outputs: Vec<Output>) -> Vec<Vec<Output>> {
    let mut groups: Vec<Vec<Output>> = vec![Vec::new()];
    let mut bytes = 0;
    for output in outputs {
        let more = output.data_len() as u64;
        if bytes + more > MAX_FILE_BYTES && bytes > 0 {
            groups.push(Vec::new());
            bytes = 0;
        }
        bytes += more;
        groups.last_mut().expect("never empty").push(output);
    }
    groups
}

/// Writes one file and notes where its tensors stand.
fn write_file(
    staging: &Staging,
    name: &str,
    outputs: Vec<Output>,
    file: u32,
    places: &mut HashMap<String, Segment>,
) -> Result<Entry> {
    let path = &staging.dir().join(name);
    let failed = |source: std::io::Error| Error::Write { path: staging.output().join(name), source };
    let named = outputs.into_iter().map(|output| (output.name.clone(), output));
    // `serialize_to_file` puts a file in place that only its owner may read.
    let permissions = File::create(path).and_then(|file| file.metadata()).map_err(failed)?.permissions();
    serialize_to_file(named, None, path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => failed(source),
        other => failed(std::io::Error::other(other)),
    })?;
    std::fs::set_permissions(path, permissions).map_err(failed)?;
    let map = Mapped::open(path).map_err(failed)?;
    let (header, metadata) =
        safetensors::SafeTensors::read_metadata(&map).map_err(|error| failed(std::io::Error::other(error)))?;
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        places.insert(name, Segment { file, offset: (8 + header + start) as u64, bytes: (end - start) as u64 });
    }
    Ok(Entry { bytes: map.len() as u64, blake3: hash_file(&map) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes() {
        for code in 0..=255 {
            let (ours, oracle) = (F8E4M3::from_bits(code).to_f32(), moewe_oracle::numeric::e4m3_to_f32(code));
            assert!(
                ours.to_bits() == oracle.to_bits() || ours.is_nan() && oracle.is_nan(),
                "{code:#x}: {ours} {oracle}"
            );
        }
    }
}
