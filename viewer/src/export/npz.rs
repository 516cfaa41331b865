//! Tables as arrays for numpy.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use npyz::WriterBuilder;
use npyz::npz::NpzWriter;
use npyz::zip::write::FileOptions;
use npyz::zip::{CompressionMethod, DateTime};

use super::csv::free_name;
use super::{Error, write_file};
use crate::numbers::{Cells, Table};

/// Writes tables as arrays of an npz file (`numpy.load`), by their names: floats as float32, integers as int64. Words
/// are left out.
///
/// # Errors
/// [`Error::Nothing`] if no table has numbers, [`Error::Exists`], [`Error::Write`].
pub fn npz(tables: &[Table], path: &Path, overwrite: bool) -> Result<(), Error> {
    let numbers = || tables.iter().filter(|table| !matches!(table.cells, Cells::Text(_)));
    if numbers().next().is_none() {
        return Err(Error::nothing(path, "there are no numbers to write"));
    }
    write_arrays(path, overwrite, |arrays| {
        let mut taken = BTreeSet::new();
        for table in numbers() {
            let name = free_name(&table.name, &mut taken);
            match &table.cells {
                Cells::F32(cells) => arrays.add(&name, &table.shape, cells)?,
                Cells::I64(cells) => arrays.add(&name, &table.shape, cells)?,
                Cells::Text(_) => {}
            }
        }
        Ok(())
    })
}

/// The arrays of a file that is being written.
pub(super) struct Arrays<'a>(NpzWriter<&'a mut BufWriter<File>>);

/// Writes an npz file.
pub(super) fn write_arrays(
    path: &Path,
    overwrite: bool,
    write: impl FnOnce(&mut Arrays<'_>) -> io::Result<()>,
) -> Result<(), Error> {
    write_file(path, overwrite, |file| {
        let mut arrays = Arrays(NpzWriter::new(file));
        write(&mut arrays)?;
        arrays.0.zip_writer().finish()?;
        Ok(())
    })
}

impl Arrays<'_> {
    /// Adds an array.
    pub(super) fn add<T: npyz::AutoSerialize + Copy>(
        &mut self,
        name: &str,
        shape: &[usize],
        cells: &[T],
    ) -> io::Result<()> {
        // The same numbers give the same bytes, whatever the time.
        let options = FileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .last_modified_time(DateTime::default())
            .large_file(true);
        let shape: Vec<u64> = shape.iter().map(|length| *length as u64).collect();
        let mut array = self.0.array(name, options)?.default_dtype().shape(&shape).begin_nd()?;
        array.extend(cells.iter().copied())?;
        array.finish()
    }

    /// Adds JSON as an array of bytes: `json.loads(bytes(file["NAME"]))`.
    pub(super) fn add_json(&mut self, name: &str, json: &serde_json::Value) -> io::Result<()> {
        let bytes = json.to_string().into_bytes();
        self.add(name, &[bytes.len()], &bytes)
    }
}
