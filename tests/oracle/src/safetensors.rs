//! A minimal safetensors reader, and a writer for f32 and i32.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{Data, Error, Result, Tensor, numeric};

/// Element types the reader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// e4m3fn (spec §8).
    F8E4m3,
    /// 64-bit integer.
    I64,
    /// 32-bit integer.
    I32,
    /// Byte.
    U8,
}

impl Dtype {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "F64" => Self::F64,
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F8_E4M3" => Self::F8E4m3,
            "I64" => Self::I64,
            "I32" => Self::I32,
            "U8" => Self::U8,
            _ => return None,
        })
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 | Self::U8 => 1,
        }
    }
}

/// A stored tensor, undecoded.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Extent of each dimension.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub bytes: Vec<u8>,
}

impl RawTensor {
    /// Every element as f64: exact, but for large 64-bit integers. e4m3 codes are decoded without their scales.
    pub fn to_f64(&self) -> Vec<f64> {
        let b = &self.bytes;
        match self.dtype {
            Dtype::F64 => elements(b, f64::from_le_bytes),
            Dtype::F32 => elements(b, |e| f64::from(f32::from_le_bytes(e))),
            Dtype::F16 => elements(b, |e| f64::from(numeric::f16_to_f32(u16::from_le_bytes(e)))),
            Dtype::Bf16 => elements(b, |e| f64::from(numeric::bf16_to_f32(u16::from_le_bytes(e)))),
            Dtype::F8E4m3 => elements(b, |[e]| f64::from(numeric::e4m3_to_f32(e))),
            Dtype::I64 => elements(b, |e| i64::from_le_bytes(e) as f64),
            Dtype::I32 => elements(b, |e| f64::from(i32::from_le_bytes(e))),
            Dtype::U8 => elements(b, |[e]| f64::from(e)),
        }
    }

    /// The same as a [`Tensor`], integers as ids.
    pub fn to_tensor(&self) -> Tensor {
        match self.dtype {
            Dtype::I64 => Tensor::ids(elements(&self.bytes, i64::from_le_bytes), self.shape.clone()),
            Dtype::I32 => Tensor::ids(elements(&self.bytes, i32::from_le_bytes), self.shape.clone()),
            Dtype::U8 => Tensor::ids(self.bytes.iter().copied(), self.shape.clone()),
            _ => Tensor { shape: self.shape.clone(), data: Data::F64(self.to_f64()) },
        }
    }
}

/// Decodes every N bytes.
fn elements<const N: usize, T>(bytes: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| decode(chunk)).collect()
}

/// Reads every tensor of a safetensors file.
pub fn read(path: &Path) -> Result<BTreeMap<String, RawTensor>> {
    let file = crate::read_file(path)?;
    parse(&file).map_err(|Error(e)| Error(format!("{}: {e}", path.display())))
}

/// Reads every tensor from the bytes of a safetensors file: u64 header length, JSON header, data.
pub fn parse(file: &[u8]) -> Result<BTreeMap<String, RawTensor>> {
    let malformed = |what: &str| Error(format!("malformed safetensors: {what}"));
    let (length, rest) = file.split_first_chunk().ok_or_else(|| malformed("no header length"))?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| malformed("header length"))?;
    let (header, data) = rest.split_at_checked(length).ok_or_else(|| malformed("header beyond the end"))?;
    let header: Map<String, Value> = serde_json::from_slice(header).map_err(|e| malformed(&e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let tensor = parse_entry(&entry, data).ok_or_else(|| malformed(&format!("entry of {name}: {entry}")))?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// The tensor of one header entry, or nothing if the entry makes no sense.
fn parse_entry(entry: &Value, data: &[u8]) -> Option<RawTensor> {
    let dtype = Dtype::parse(entry["dtype"].as_str()?)?;
    let numbers = |key: &str| -> Option<Vec<usize>> {
        entry[key].as_array()?.iter().map(|v| usize::try_from(v.as_u64()?).ok()).collect()
    };
    let (shape, offsets) = (numbers("shape")?, numbers("data_offsets")?);
    let &[begin, end] = offsets.as_slice() else {
        return None;
    };
    let bytes = data.get(begin..end)?.to_vec();
    let expected = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d))?;
    (bytes.len() == expected).then_some(RawTensor { dtype, shape, bytes })
}

/// Writes tensors in the given order, real numbers as F32 and ids as I32.
pub fn write<'a>(path: &Path, tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<()> {
    std::fs::write(path, serialize(tensors)).map_err(|e| Error(format!("{}: {e}", path.display())))
}

/// The bytes [`write()`] writes.
pub fn serialize<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, tensor) in tensors {
        let begin = data.len();
        let dtype = match &tensor.data {
            Data::F64(values) => {
                data.extend(values.iter().flat_map(|&v| (v as f32).to_le_bytes()));
                "F32"
            }
            Data::I32(ids) => {
                data.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
                "I32"
            }
        };
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        header.insert(name.to_owned(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' '); // the data must be aligned
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let real = Tensor { shape: vec![2, 1], data: Data::F64(vec![0.5, -3.25]) };
        let ids = Tensor::ids([7, -1, 3], vec![3]);
        let file = serialize([("real", &real), ("ids", &ids)]);
        let read = parse(&file).expect("own output");
        assert_eq!(read.len(), 2);
        assert_eq!(read["real"].to_tensor(), real);
        assert_eq!(read["ids"].to_tensor(), ids);
    }

    #[test]
    fn lies_in_the_header_are_errors() {
        let tensor = Tensor::ids([1, 2], vec![2]);
        let good = serialize([("a", &tensor)]);
        assert!(parse(&good[..good.len() - 1]).is_err(), "data cut off");
        assert!(parse(&good[..7]).is_err(), "length cut off");
        let text = String::from_utf8(good[8..good.len() - 8].to_vec()).expect("JSON");
        for lie in [text.replace("[2]", "[3]"), text.replace("I32", "I31"), text.replace("[0,8]", "[8,0]")] {
            assert_ne!(lie, text);
            let file = [&(lie.len() as u64).to_le_bytes()[..], lie.as_bytes(), &[0; 8]].concat();
            assert!(parse(&file).is_err(), "{lie}");
        }
    }
}
