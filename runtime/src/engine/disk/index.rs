//! Which files of pages there are, in the order of their last use, and where they stand.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs::{self, DirEntry, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Ends the names of pages' files.
const PAGE: &str = ".page";
/// Begin and end of the names of files that are being written.
const TEMPORARY: (&str, &str) = ("moewe-", ".tmp");

/// How far a file's time may be in the future.
const CLOCK_ERROR: Duration = Duration::from_hours(1);

/// Where a page stands below the cache's directory: `<model>/<first byte of the key>/<key>.page`, all in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Name {
    /// Beginning of the model's hash.
    model: [u8; 8],
    key: [u8; 32],
}

impl Name {
    pub(super) fn new(model: &[u8; 32], key: [u8; 32]) -> Self {
        Self { model: *model.first_chunk().expect("32 are more than 8"), key }
    }

    /// The folder, if it and those above it are directories and no links; `make` makes those that are missing.
    pub(super) fn folder(&self, root: &Path, make: bool) -> io::Result<PathBuf> {
        if make {
            fs::create_dir_all(root)?;
        }
        let mut path = root.to_path_buf();
        for part in [hex(&self.model), hex(&self.key[..1])] {
            path.push(part);
            real_folder(&path, make)?;
        }
        Ok(path)
    }

    /// The file's own name.
    pub(super) fn file(&self) -> String {
        hex(&self.key) + PAGE
    }
}

/// Fails unless `path` is a directory and no link; `make` makes it first if it is missing.
fn real_folder(path: &Path, make: bool) -> io::Result<()> {
    if make
        && let Err(error) = fs::create_dir(path)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(error);
    }
    if fs::symlink_metadata(path)?.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

/// The bytes that [`hex`] makes this text of.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |c: u8| (c as char).to_digit(16).filter(|_| !c.is_ascii_uppercase());
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let bytes = pairs.iter().map(|&[a, b]| Some((digit(a)? * 16 + digit(b)?) as u8));
    bytes.collect::<Option<Vec<_>>>()?.try_into().ok()
}

/// What is known of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) bytes: u64,
    pub(super) used: SystemTime,
    /// Whether it has the draft modules' latents, if it was looked into.
    pub(super) drafted: Option<bool>,
}

/// The files of all models' pages.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: HashMap<Name, Entry>,
    order: BTreeSet<(SystemTime, Name)>,
    bytes: u64,
}

impl Index {
    pub(super) fn get(&self, name: &Name) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub(super) fn insert(&mut self, name: Name, entry: Entry) {
        self.remove(&name);
        self.entries.insert(name, entry);
        self.order.insert((entry.used, name));
        self.bytes += entry.bytes;
    }

    pub(super) fn remove(&mut self, name: &Name) {
        if let Some(entry) = self.entries.remove(name) {
            self.order.remove(&(entry.used, *name));
            self.bytes -= entry.bytes;
        }
    }

    /// The file that was not used for longest.
    pub(super) fn oldest(&self) -> Option<(Name, Entry)> {
        self.order.first().map(|(_, name)| (*name, self.entries[name]))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Looks what is below `root`. Temporary files that nobody writes any more are removed; whatever does not have a name
    /// and a place of ours is left alone, as is what cannot be read. Links are not followed.
    pub(super) fn scan(root: &Path, now: SystemTime) -> Self {
        let mut index = Self::default();
        let folders = |path: &Path| list(path).filter(|(entry, _)| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        for (models, model) in folders(root) {
            let Some(model) = unhex(&model) else { continue };
            for (folder, first) in folders(&models.path()) {
                let Some([first]) = unhex(&first) else { continue };
                for (file, name) in list(&folder.path()) {
                    let Some(metadata) = file.metadata().ok().filter(fs::Metadata::is_file) else { continue };
                    if name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1) {
                        remove_abandoned(&file.path());
                    } else if let Some(key) = name.strip_suffix(PAGE).and_then(unhex::<32>)
                        && key[0] == first
                    {
                        let mut used = metadata.modified().unwrap_or(UNIX_EPOCH);
                        if used > now + CLOCK_ERROR {
                            // It would stay for ever.
                            let set = File::open(file.path()).and_then(|file| file.set_modified(now));
                            used = set.map_or(UNIX_EPOCH, |()| now);
                        }
                        index.insert(Name { model, key }, Entry { bytes: metadata.len(), used, drafted: None });
                    }
                }
            }
        }
        index
    }
}

/// What is in a folder, as far as it can be read and has a name in Unicode.
fn list(folder: &Path) -> impl Iterator<Item = (DirEntry, String)> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok().map(|name| (entry, name)))
}

/// Removes a temporary file unless its writer lives.
fn remove_abandoned(path: &Path) {
    if let Ok(file) = File::options().write(true).open(path)
        && file.try_lock().is_ok()
    {
        // An error here leaves nothing better to do.
        let _ = fs::remove_file(path);
    }
}

/// A file that is being written, locked as long as its writer lives. The name says which process that is.
pub(super) struct Temporary {
    pub(super) file: File,
    path: PathBuf,
}

impl Temporary {
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // Processes of two containers may have the same number.
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let path = folder.join(format!("{}{process}-{nanos:x}-{count}{}", TEMPORARY.0, TEMPORARY.1));
        let file = File::create_new(&path)?;
        // Where files cannot be locked, nobody else can either, and what a dead process left there stays.
        let _ = file.try_lock();
        Ok(Self { file, path })
    }

    /// Gives the file its name. What was there before is replaced in one step.
    pub(super) fn rename(&self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After `rename` nothing is there.
        let _ = fs::remove_file(&self.path);
    }
}
