//! Element types of stored tensors.

use std::fmt;

use serde::Serialize;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    F8E4m3,
    F8E5m2,
    F8E8m0,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

impl Dtype {
    const NAMES: [(&'static str, Self, usize); 16] = [
        ("F64", Self::F64, 64),
        ("F32", Self::F32, 32),
        ("F16", Self::F16, 16),
        ("BF16", Self::Bf16, 16),
        ("F8_E4M3", Self::F8E4m3, 8),
        ("F8_E5M2", Self::F8E5m2, 8),
        ("F8_E8M0", Self::F8E8m0, 8),
        ("I64", Self::I64, 64),
        ("I32", Self::I32, 32),
        ("I16", Self::I16, 16),
        ("I8", Self::I8, 8),
        ("U64", Self::U64, 64),
        ("U32", Self::U32, 32),
        ("U16", Self::U16, 16),
        ("U8", Self::U8, 8),
        ("BOOL", Self::Bool, 8),
    ];

    pub(crate) fn from_safetensors(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(n, _, _)| *n == name).map(|(_, dtype, _)| *dtype)
    }

    /// Name in a safetensors header.
    pub fn safetensors_name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }

    /// Bits per element.
    pub fn bits(self) -> usize {
        Self::NAMES[self as usize].2
    }

    /// Bytes per element.
    pub fn bytes(self) -> usize {
        self.bits() / 8
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.safetensors_name())
    }
}
