//! Tables as comma-separated values.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{Error, write_file};
use crate::numbers::{Cells, Table};

/// Writes tables as CSV, one file each, and returns the files. A path that ends in `.csv` is the file of a single
/// table; several become `PATH.NAME.csv` beside it. Any other path is a directory, which is made if need be, with
/// `NAME.csv` in it.
///
/// A file has a line for each place along all dimensions but the last, which is spread over the columns:
/// `token,expert 0,expert 1,…`. A list has a line for each item.
///
/// # Errors
/// [`Error::Nothing`] without tables, [`Error::Exists`], [`Error::Write`].
pub fn csv(tables: &[Table], path: &Path, overwrite: bool) -> Result<Vec<PathBuf>, Error> {
    if tables.is_empty() {
        return Err(Error::nothing(path, "there are no numbers to write"));
    }
    let is_file = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) && !path.is_dir();
    if !is_file {
        std::fs::create_dir_all(path).map_err(|source| Error::Write { path: path.into(), source })?;
    }
    let mut taken = BTreeSet::new();
    let place = |table: &Table| match (is_file, tables.len()) {
        (true, 1) => path.to_owned(),
        (true, _) => path.with_extension(format!("{}.csv", free_name(&table.name, &mut taken))),
        (false, _) => path.join(format!("{}.csv", free_name(&table.name, &mut taken))),
    };
    let places: Vec<PathBuf> = tables.iter().map(place).collect();
    if let Some(path) = places.iter().find(|path| !overwrite && path.exists()) {
        return Err(Error::Exists { path: path.clone() });
    }
    for (table, path) in tables.iter().zip(&places) {
        write_file(path, overwrite, |file| write_table(table, file))?;
    }
    Ok(places)
}

/// A name that is fit for a file and was not used yet.
pub(super) fn free_name(name: &str, taken: &mut BTreeSet<String>) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.chars().map(plain).take(128).collect();
    let name = if name.trim_matches('.').is_empty() { "table".to_owned() } else { name };
    let numbered = std::iter::once(name.clone()).chain((2..).map(|n| format!("{name}-{n}")));
    // Not every file system tells upper from lower case.
    let free = numbered.into_iter().find(|name| taken.insert(name.to_ascii_lowercase()));
    free.expect("there are endless numbers")
}

fn write_table(table: &Table, file: &mut impl Write) -> io::Result<()> {
    let mut writer = csv::Writer::from_writer(file);
    let (last, outer) = table.shape.split_last().map_or((1, &[][..]), |(last, outer)| (*last, outer));
    // A list goes down, everything else to the right, too.
    let (width, outer) = if table.shape.len() == 1 { (1, &table.shape[..]) } else { (last, outer) };
    let mut header: Vec<String> = table.axes[..outer.len()].to_vec();
    match table.axes.get(outer.len()) {
        Some(axis) => header.extend((0..width).map(|i| format!("{axis} {i}"))),
        None => header.push(table.name.clone()),
    }
    writer.write_record(&header)?;
    if width == 0 {
        return writer.flush();
    }
    for row in 0..table.len() / width {
        let mut rest = row;
        let mut places: Vec<String> = outer.iter().rev().map(|length| index(&mut rest, *length)).collect();
        places.reverse();
        let cells = row * width..(row + 1) * width;
        places.extend(cells.map(|i| match &table.cells {
            Cells::F32(cells) => cells[i].to_string(),
            Cells::I64(cells) => cells[i].to_string(),
            Cells::Text(cells) => cells[i].clone(),
        }));
        writer.write_record(&places)?;
    }
    writer.flush()
}

/// The index along the last dimension, which is taken off.
fn index(rest: &mut usize, length: usize) -> String {
    let index = *rest % length;
    *rest /= length;
    index.to_string()
}
