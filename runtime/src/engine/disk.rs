//! Pages of latents as files, so that a prefix outlives the memory of the device and the process.
//!
//! A page's file is named by a hash of the model and of all tokens up to its last one ([`Chain`]), and holds what is
//! needed to check it (`format`). A thread of its own writes: a temporary file beside the place, then a rename, so that a
//! process may die at any moment and leave whole files and temporary ones only; the latter are removed when a cache is
//! opened next. Nothing is synced to the disk: a power failure may leave any bytes in a file, and every read checks all of
//! them. What does not check is removed and is a miss.
//!
//! Several processes may share a directory, with the same model or others. The bound on its size is for all together;
//! each process knows the files of the others from when it looked last, which it does after writing a sixteenth of the
//! bound, so that together they may exceed it by that much each.

mod format;
mod index;

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moewe_plan::PAGE_TOKENS;

pub use self::format::Chain;
use self::format::{Header, file_bytes};
use self::index::{Entry, Index, Name, Temporary};
use crate::{Error, Result};

/// Bytes of latents that may wait to be written. One page may always wait.
const QUEUE_BYTES: u64 = 256 << 20;
/// How often a file is written again because it, or its folder, was removed meanwhile.
const MOST_AGAIN: usize = 8;
/// Most pages that are not even tried after a failure.
const LONGEST_PAUSE: u64 = 1024;

/// Where a disk cache is and what it is for.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Its directory; made if missing.
    pub dir: PathBuf,
    /// Most bytes that files of pages take in the directory, those of other models included.
    pub max_bytes: u64,
    /// Hash of all that the bytes of a page depend on besides the tokens: model, precision, layout.
    pub model: [u8; 32],
    /// Bytes of latents of each page.
    pub page_bytes: usize,
}

/// A page that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPage {
    /// Its latents, as they were put.
    pub bytes: Vec<u8>,
    /// Whether the draft modules' latents are among them.
    pub drafted: bool,
}

/// What a disk cache did since it was opened, and what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Pages read.
    pub hits: u64,
    /// Pages asked for that were not there, the damaged ones included.
    pub misses: u64,
    /// Pages written.
    pub writes: u64,
    /// Pages that could not be written.
    pub write_errors: u64,
    /// Pages that were not tried to be written: too many were waiting, or others had failed shortly before.
    pub dropped: u64,
    /// Files that were not what their name says, and were removed.
    pub damaged: u64,
    /// Files removed to make room.
    pub evicted: u64,
    /// Bytes of all pages' files.
    pub bytes: u64,
    /// All pages' files.
    pub files: u64,
}

/// A disk cache. Dropped, it writes what is still waiting.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

/// What the caller and the writer share.
#[derive(Debug)]
struct Shared {
    options: DiskOptions,
    state: Mutex<State>,
    /// Tells the writer that there is work, or none any more.
    work: Condvar,
    /// Tells who flushes that nothing waits any more.
    idle: Condvar,
}

#[derive(Debug, Default)]
struct State {
    index: Index,
    queue: VecDeque<Job>,
    /// Bytes of latents in the queue and at the writer.
    queued_bytes: u64,
    /// Pages in the queue and at the writer, and whether they are drafted.
    pending: HashMap<Name, bool>,
    /// Bytes written since the directory was looked through.
    unseen_bytes: u64,
    stats: DiskStats,
    /// Pages to leave out before the next try, and how many it was after the failure before.
    pause: u64,
    last_pause: u64,
    warning: Option<String>,
    warned: bool,
    closing: bool,
    /// The latest time given to a use.
    clock: Option<SystemTime>,
}

/// A page to be written.
#[derive(Debug)]
struct Job {
    name: Name,
    header: Header,
    drafted: bool,
    bytes: Vec<u8>,
}

impl Disk {
    /// Opens or begins a disk cache: looks through the directory, removes what dead processes left half written, and
    /// removes the oldest pages if there are more than `max_bytes`.
    ///
    /// Fails if the directory cannot be made or no file can be made in it, or if it may not hold even one page.
    pub fn open(options: DiskOptions) -> Result<Self> {
        let file = file_bytes(options.page_bytes);
        if file > options.max_bytes {
            return Err(Error::CacheTooSmall { max_bytes: options.max_bytes, page: file });
        }
        let cannot = |source| Error::CacheDir { path: options.dir.clone(), source };
        let folder = Name::new(&options.model, [0; 32]).folder(&options.dir, true).map_err(cannot)?;
        Temporary::new(&folder).map_err(cannot)?;

        let mut state = State::default();
        let now = state.now();
        state.index = Index::scan(&options.dir, now);
        let shared = Arc::new(Shared { options, state: state.into(), work: Condvar::new(), idle: Condvar::new() });
        shared.make_room(0);
        let writer = std::thread::Builder::new().name("prefix cache".into()).spawn({
            let shared = shared.clone();
            move || shared.write_queued()
        });
        let path = &shared.options.dir;
        let writer = writer.map_err(|source| Error::CacheDir { path: path.clone(), source })?;
        Ok(Self { shared, writer: Some(writer) })
    }

    /// The text `before` and the page with `tokens` behind it.
    pub fn next(&self, before: &Chain, tokens: &[u32; PAGE_TOKENS as usize]) -> Chain {
        before.next(&self.shared.options.model, tokens)
    }

    /// Reads the page with `tokens` behind the text `before`. Every byte is checked; what is damaged is removed.
    pub fn get(&self, before: &Chain, tokens: &[u32; PAGE_TOKENS as usize]) -> Option<DiskPage> {
        let shared = &*self.shared;
        let (name, header) = shared.name(before, tokens);
        let read = shared.read(&name, &header);
        let mut state = shared.lock();
        let now = state.now();
        match read {
            Read::Page(file, page) => {
                // Only whoever owns the file may; others use it without a trace.
                let _ = file.set_modified(now);
                state.stats.hits += 1;
                // A file that another process wrote is learnt of here, unless it was evicted meanwhile.
                if state.index.get(&name).is_some() || shared.is_there(&name) {
                    let bytes = file_bytes(page.bytes.len());
                    state.index.insert(name, Entry { bytes, used: now, drafted: Some(page.drafted) });
                }
                return Some(page);
            }
            Read::Damaged => {
                shared.remove(&name);
                state.index.remove(&name);
                state.stats.damaged += 1;
            }
            Read::Missing if !shared.is_there(&name) => state.index.remove(&name),
            Read::Missing => {}
        }
        state.stats.misses += 1;
        None
    }

    /// Whether a put of this page would write nothing, since it is there or waiting to be written. A drafted page is
    /// there only if the file is drafted, too.
    pub fn contains(&self, before: &Chain, tokens: &[u32; PAGE_TOKENS as usize], drafted: bool) -> bool {
        let (name, header) = self.shared.name(before, tokens);
        self.shared.lock().is_pending(&name, drafted) || self.shared.has(&name, &header, drafted)
    }

    /// Has the page with `tokens` behind the text `before` written soon, unless it is there or too many are waiting.
    /// `bytes` are its latents, `page_bytes` of them; `drafted` says that the draft modules' latents are among them, and
    /// then they replace a page without.
    pub fn put(&self, before: &Chain, tokens: &[u32; PAGE_TOKENS as usize], drafted: bool, bytes: Vec<u8>) {
        let page_bytes = self.shared.options.page_bytes;
        let (name, header) = self.shared.name(before, tokens);
        let mut state = self.shared.lock();
        if bytes.len() != page_bytes {
            state.fail(format!("a page has {} bytes, {page_bytes} expected", bytes.len()));
            return;
        }
        if state.is_pending(&name, drafted) || state.index.get(&name).is_some_and(|entry| entry.has(drafted)) {
            return;
        }
        let queued = state.queued_bytes + page_bytes as u64;
        if !state.queue.is_empty() && queued > QUEUE_BYTES {
            state.stats.dropped += 1;
            return;
        }
        state.queued_bytes = queued;
        state.pending.insert(name, drafted);
        state.queue.push_back(Job { name, header: header.drafted(drafted), drafted, bytes });
        self.shared.work.notify_one();
    }

    /// Waits until nothing waits to be written any more.
    pub fn flush(&self) {
        let mut state = self.shared.lock();
        while !state.pending.is_empty() {
            state = self.shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What it did and has.
    pub fn stats(&self) -> DiskStats {
        let state = self.shared.lock();
        DiskStats { bytes: state.index.bytes(), files: state.index.len() as u64, ..state.stats }
    }

    /// Why the first page that could not be written could not; told once.
    pub fn take_warning(&self) -> Option<String> {
        self.shared.lock().warning.take()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_one();
        if let Some(writer) = self.writer.take() {
            // It has nothing to say.
            let _ = writer.join();
        }
    }
}

/// What was found in the place of a file.
enum Read {
    Page(File, DiskPage),
    Damaged,
    /// Nothing, or what cannot be opened: by this user, now, or at all.
    Missing,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No state is left half changed, whatever fails.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self, before: &Chain, tokens: &[u32; PAGE_TOKENS as usize]) -> (Name, Header) {
        let DiskOptions { model, page_bytes, .. } = &self.options;
        let page = before.next(model, tokens);
        (Name::new(model, page.key()), Header::new(model, before, &page, tokens, *page_bytes))
    }

    fn path(&self, name: &Name) -> io::Result<PathBuf> {
        Ok(name.folder(&self.options.dir, false)?.join(name.file()))
    }

    /// Opens the file of a page, if it is a file.
    fn open(&self, name: &Name) -> io::Result<File> {
        let path = self.path(name)?;
        // Opening a pipe would wait for its other end.
        if !fs::symlink_metadata(&path)?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        File::open(path)
    }

    fn read(&self, name: &Name, header: &Header) -> Read {
        let Ok(mut file) = self.open(name) else { return Read::Missing };
        let expected = file_bytes(self.options.page_bytes);
        if file.metadata().is_ok_and(|metadata| metadata.len() != expected) {
            return Read::Damaged;
        }
        match header.read_page(&mut file) {
            Ok(Some(page)) => Read::Page(file, page),
            Ok(None) | Err(_) => Read::Damaged,
        }
    }

    fn is_there(&self, name: &Name) -> bool {
        self.path(name).and_then(fs::symlink_metadata).is_ok_and(|metadata| metadata.is_file())
    }

    /// Whether the file of a page is there and, if asked for, drafted. Looks at no more than the header, and at the disk
    /// only if the index does not know.
    fn has(&self, name: &Name, header: &Header, drafted: bool) -> bool {
        let known = self.lock().index.get(name).copied();
        if let Some(entry) = known.filter(|entry| entry.drafted.is_some() || !drafted) {
            return entry.has(drafted);
        }
        let Ok(mut file) = self.open(name) else { return false };
        let Ok(metadata) = file.metadata() else { return false };
        let Ok(Some(found)) = header.read_flag(&mut file) else { return false };
        let bytes = metadata.len();
        if bytes != file_bytes(self.options.page_bytes) {
            return false;
        }
        let mut state = self.lock();
        if self.is_there(name) {
            let used = known.map_or_else(|| metadata.modified().unwrap_or(UNIX_EPOCH), |entry| entry.used);
            state.index.insert(*name, Entry { bytes, used, drafted: Some(found) });
        }
        found || !drafted
    }

    /// Removes the file of a page. Says whether there was one.
    fn remove(&self, name: &Name) -> bool {
        self.path(name).and_then(fs::remove_file).is_ok()
    }

    /// What the writer does until the cache is closed.
    fn write_queued(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                if state.pause > 0 {
                    state.pause -= 1;
                    state.stats.dropped += 1;
                } else {
                    drop(state);
                    let outcome = self.write(&job);
                    state = self.lock();
                    match outcome {
                        Ok(()) => state.last_pause = 0,
                        Err(error) => {
                            let dir = self.options.dir.display();
                            state.fail(format!("cannot write to the prefix cache in {dir}: {error}"));
                        }
                    }
                }
                state.queued_bytes -= job.bytes.len() as u64;
                // The same page may wait behind this one with drafts.
                if state.pending.get(&job.name) == Some(&job.drafted) {
                    state.pending.remove(&job.name);
                }
            } else if state.closing {
                return;
            } else {
                self.idle.notify_all();
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Writes a page, unless another process did.
    fn write(&self, job: &Job) -> io::Result<()> {
        if self.has(&job.name, &job.header, job.drafted) {
            return Ok(());
        }
        let bytes = file_bytes(job.bytes.len());
        self.look_through(bytes);
        self.make_room(bytes);
        let now = self.lock().now();
        let mut again = 0..MOST_AGAIN;
        while let Err(error) = self.write_file(job, now) {
            // Somebody removed a folder, or took the temporary file for one of a dead process before it was locked.
            if error.kind() != io::ErrorKind::NotFound || again.next().is_none() {
                return Err(error);
            }
        }
        let mut state = self.lock();
        state.index.insert(job.name, Entry { bytes, used: now, drafted: Some(job.drafted) });
        state.stats.writes += 1;
        state.unseen_bytes += bytes;
        Ok(())
    }

    fn write_file(&self, job: &Job, now: SystemTime) -> io::Result<()> {
        let folder = job.name.folder(&self.options.dir, true)?;
        let mut temporary = Temporary::new(&folder)?;
        job.header.write_page(&mut temporary.file, &job.bytes)?;
        // Where this cannot be set it is about the same anyway.
        let _ = temporary.file.set_modified(now);
        temporary.rename(&folder.join(job.name.file()))
    }

    /// Looks through the directory if `bytes` more would be a sixteenth of the bound since the last time.
    fn look_through(&self, bytes: u64) {
        let mut state = self.lock();
        if state.unseen_bytes + bytes <= self.options.max_bytes / 16 {
            return;
        }
        let now = state.now();
        drop(state);
        // What is read or removed meanwhile is set right when it is asked for next.
        let index = Index::scan(&self.options.dir, now);
        let mut state = self.lock();
        state.index = index;
        state.unseen_bytes = 0;
    }

    /// Removes the files that were not used for longest until `bytes` more fit.
    fn make_room(&self, bytes: u64) {
        let mut state = self.lock();
        while state.index.bytes() + bytes > self.options.max_bytes
            && let Some((name, entry)) = state.index.oldest()
        {
            let modified = self.path(&name).and_then(fs::symlink_metadata).and_then(|metadata| metadata.modified());
            if let Ok(used) = modified
                && used > entry.used
                && used <= state.now()
            {
                // Another process used it.
                state.index.insert(name, Entry { used, ..entry });
                continue;
            }
            // What cannot be removed is forgotten, lest it keep all others from being written.
            state.index.remove(&name);
            state.stats.evicted += u64::from(self.remove(&name));
        }
    }
}

impl Entry {
    fn has(&self, drafted: bool) -> bool {
        !drafted || self.drafted == Some(true)
    }
}

impl State {
    /// The time, later than each before.
    fn now(&mut self) -> SystemTime {
        let after = self.clock.map(|clock| clock + Duration::from_nanos(1));
        let now = SystemTime::now().max(after.unwrap_or(UNIX_EPOCH));
        self.clock = Some(now);
        now
    }

    fn is_pending(&self, name: &Name, drafted: bool) -> bool {
        self.pending.get(name).is_some_and(|&pending| pending || !drafted)
    }

    /// Counts a page that could not be written, and leaves the next ones out: one, then two, then four …
    fn fail(&mut self, what: String) {
        self.stats.write_errors += 1;
        self.last_pause = (self.last_pause * 2).clamp(1, LONGEST_PAUSE);
        self.pause = self.last_pause;
        if !self.warned {
            self.warned = true;
            self.warning = Some(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_the_queue_is_dropped() {
        let page_bytes = 100 << 20;
        let dir = tempfile::tempdir().unwrap();
        let options = DiskOptions { dir: dir.path().into(), max_bytes: u64::MAX, model: [0; 32], page_bytes };
        // Nobody writes.
        let (work, idle) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { options, state: Mutex::default(), work, idle });
        let disk = Disk { shared, writer: None };
        for page in 0..5 {
            // Never touched, these bytes take no memory.
            disk.put(&Chain::default(), &[page; 64], false, vec![0; page_bytes]);
            disk.put(&Chain::default(), &[page; 64], false, vec![0; page_bytes]);
        }
        // Each of the three that found no room was put twice; the others were known to wait.
        assert_eq!(disk.stats(), DiskStats { dropped: 6, ..DiskStats::default() });
        let waits = [0, 1, 2].map(|page| disk.contains(&Chain::default(), &[page; 64], false));
        assert_eq!((waits, disk.contains(&Chain::default(), &[0; 64], true)), ([true, true, false], false));
        assert_eq!(disk.shared.lock().queued_bytes, 2 * page_bytes as u64);
    }

    #[test]
    fn times_of_use_differ_and_pauses_double() {
        let mut state = State::default();
        let times: Vec<_> = (0..1000).map(|_| state.now()).collect();
        assert!(times.is_sorted_by(|a, b| a < b));
        let pauses: Vec<_> = (0..13)
            .map(|i| {
                state.fail(format!("failure {i}"));
                state.pause
            })
            .collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024, 1024]);
        assert_eq!((state.stats.write_errors, state.warning.as_deref()), (13, Some("failure 0")));
    }
}
