//! Errors of reading and writing bundles.

use std::path::PathBuf;

/// Why a bundle could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The bundle could not be written (read-only place, full disk, no rights).
    #[error("cannot write {}: {source}; nothing was left behind, choose another place or make room", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The directory is no bundle at all.
    #[error("{}: not a moewe bundle: {what}; make one with `moewe compile CHECKPOINT -o DIR`", path.display())]
    NotABundle {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The bundle is only a plan.
    #[error(
        "{}: this bundle has no weights (it was compiled with --plan-only), so it cannot run; compile the checkpoint \
         without that", path.display()
    )]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// A file of the bundle differs from what was written, or says what no compiler of ours would.
    #[error("{}: damaged bundle: {what}; compile the checkpoint again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        what: String,
    },
    /// The bundle was written by another version of moewe.
    #[error(
        "{}: bundle format {found}, this moewe reads format {expected}; compile the checkpoint again", path.display()
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Version expected.
        expected: u32,
    },
    /// The output exists already.
    #[error("{}: exists already and is not a moewe bundle; choose another output directory", path.display())]
    OutputExists {
        /// The directory.
        path: PathBuf,
    },
}

impl Error {
    /// An [`Error::Io`] maker for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// An [`Error::Write`] maker for `map_err`.
    pub fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }
}
