//! Numbers that a view shows, named and shaped, on their way to a file.

/// An array with a name, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Its name, for example `routing.layer3.weights`.
    pub name: String,
    /// What its dimensions are, for example `["token", "expert"]`.
    pub axes: Vec<String>,
    /// Their lengths.
    pub shape: Vec<usize>,
    /// Its numbers.
    pub cells: Cells,
}

/// Numbers or words.
#[derive(Clone, Debug, PartialEq)]
pub enum Cells {
    /// Floats.
    F32(Vec<f32>),
    /// Integers.
    I64(Vec<i64>),
    /// Words, for example tokens. Left out of npz files.
    Text(Vec<String>),
}

impl Table {
    /// A table of floats.
    pub fn floats(name: impl Into<String>, axes: &[(&str, usize)], cells: Vec<f32>) -> Self {
        Self::new(name, axes, Cells::F32(cells))
    }

    /// A table of integers.
    pub fn integers(name: impl Into<String>, axes: &[(&str, usize)], cells: Vec<i64>) -> Self {
        Self::new(name, axes, Cells::I64(cells))
    }

    /// A list of words.
    pub fn words(name: impl Into<String>, axis: &str, cells: Vec<String>) -> Self {
        let axes = [(axis, cells.len())];
        Self::new(name, &axes, Cells::Text(cells))
    }

    fn new(name: impl Into<String>, axes: &[(&str, usize)], cells: Cells) -> Self {
        let (axes, shape) = axes.iter().map(|(axis, length)| ((*axis).to_owned(), *length)).unzip();
        let table = Self { name: name.into(), axes, shape, cells };
        assert_eq!(table.shape.iter().product::<usize>(), table.len(), "{}: shape {:?}", table.name, table.shape);
        table
    }

    /// How many cells it has.
    pub fn len(&self) -> usize {
        match &self.cells {
            Cells::F32(cells) => cells.len(),
            Cells::I64(cells) => cells.len(),
            Cells::Text(cells) => cells.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
