//! A tensor of results, and how far two of them are apart.

use std::collections::BTreeMap;

/// Numbers with a shape, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Extent of each dimension, the outermost first.
    pub shape: Vec<usize>,
    /// The numbers.
    pub data: Data,
}

/// Contents of a [`Tensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// Real numbers.
    F64(Vec<f64>),
    /// Token or expert ids.
    I32(Vec<i32>),
}

/// Named intermediate results of a forward pass, under the names of spec §10.
pub type Trace = BTreeMap<String, Tensor>;

impl Tensor {
    /// A tensor of rows: as many as `data` holds of `width`.
    pub fn rows(data: Vec<f64>, width: usize) -> Self {
        Self { shape: vec![data.len() / width, width], data: Data::F64(data) }
    }

    /// Ids in the given shape.
    pub fn ids<T: TryInto<i32>>(ids: impl IntoIterator<Item = T>, shape: Vec<usize>) -> Self {
        let narrow = |id: T| id.try_into().ok().expect("an id beyond i32");
        Self { shape, data: Data::I32(ids.into_iter().map(narrow).collect()) }
    }

    /// The numbers of an [`Data::F64`] tensor; panics on ids.
    pub fn f64s(&self) -> &[f64] {
        match &self.data {
            Data::F64(values) => values,
            Data::I32(_) => panic!("expected real numbers, found ids"),
        }
    }

    /// The ids of an [`Data::I32`] tensor; panics on real numbers.
    pub fn i32s(&self) -> &[i32] {
        match &self.data {
            Data::I32(ids) => ids,
            Data::F64(_) => panic!("expected ids, found real numbers"),
        }
    }
}

/// Relative L2 error |a − b| / |b|; the absolute one if b is zero. NaN in either gives NaN, so compare with `<=`.
pub fn rel_l2(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "comparison of different lengths");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut a.iter().zip(b).map(|(x, y)| x - y));
    let size = norm(&mut b.iter().copied());
    if size == 0.0 { error } else { error / size }
}
