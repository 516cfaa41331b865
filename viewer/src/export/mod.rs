//! Numbers on their way out: CSV, npz, traces of times, and what other programs of the field read.
//!
//! Every file is written beside its place and put there when it is whole.

mod chrome;
mod csv;
mod eplb;
mod npz;
mod routed;

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

pub use chrome::chrome_trace;
pub use csv::csv;
pub use eplb::eplb;
pub use npz::npz;
pub use routed::routed_experts;

/// Why nothing was exported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is a file already, and it was not asked to be overwritten.
    #[error("{}: exists already; choose another file or allow to overwrite it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// There is nothing that could be written, or nothing that fits.
    #[error("{}: not exported: {what}", path.display())]
    Nothing {
        /// The file.
        path: PathBuf,
        /// What is missing or does not fit.
        what: String,
    },
}

impl Error {
    fn nothing(path: &Path, what: impl Into<String>) -> Self {
        Error::Nothing { path: path.into(), what: what.into() }
    }
}

/// Writes bytes that are a file already, such as a picture.
///
/// # Errors
/// If there is a file that is not to be overwritten, or it cannot be written.
pub fn file(path: &Path, bytes: &[u8], overwrite: bool) -> Result<(), Error> {
    write_file(path, overwrite, |writer| writer.write_all(bytes))
}

/// Writes a file as a whole: until it is there, nothing is.
fn write_file(
    path: &Path,
    overwrite: bool,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), Error> {
    let failed = |source: io::Error| Error::Write { path: path.into(), source };
    let Some(name) = path.file_name() else {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "this is no name of a file")));
    };
    // The place is taken first, so that no one else's file is overwritten either.
    let is_new = OpenOptions::new().write(true).create_new(true).open(path);
    let is_new = match is_new {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_file() && overwrite => false,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(Error::Exists { path: path.into() }),
        Err(error) => return Err(failed(error)),
    };
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = path.with_file_name(beside);
    let written = File::create(&beside).and_then(|file| {
        let mut writer = BufWriter::new(file);
        write(&mut writer)?;
        writer.flush()?;
        writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_data()?;
        std::fs::rename(&beside, path)
    });
    written.map_err(|error| {
        let _ = std::fs::remove_file(&beside); // it may not even be there
        if is_new {
            let _ = std::fs::remove_file(path);
        }
        failed(error)
    })
}
