//! Writing a recording while it happens.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::chunk::{Filling, check_frame, subject_chunk};
use super::intake::Intake;
use super::read::Layout;
use super::{Error, HEAD, head_line};
use crate::source::Event;
use crate::subject::Subject;

/// What happened is in the file after this time at the latest, if the disk keeps up.
const LATEST: Duration = Duration::from_secs(1);

/// Writes a recording. [`Recorder::push`] copies an event into the chunk that is being filled and returns; a thread of
/// the recorder's own turns full chunks into bytes and writes them. There is one chunk being filled and one being
/// written: if the disk is so slow that the first is full before the second is written, `push` waits, for a recording
/// must not lose anything silently. How long it waited is told at the end.
///
/// A recorder that is dropped writes what it has; only [`Recorder::finish`] says whether that worked.
pub struct Recorder {
    path: PathBuf,
    subject: Subject,
    shared: Arc<Shared>,
    writing: Option<JoinHandle<()>>,
    intake: Intake,
    tokens: u64,
    waited: Duration,
}

/// What a recorder wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Tokens.
    pub tokens: u64,
    /// Length of the file.
    pub bytes: u64,
    /// How long [`Recorder::push`] waited for the disk, all in all.
    pub waited: Duration,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    filling: Filling,
    /// When the chunk being filled got its first event.
    since: Option<Instant>,
    /// No more comes.
    closing: bool,
    /// What went wrong; nothing is written after that.
    failed: Option<(io::ErrorKind, String)>,
    bytes: u64,
}

impl Shared {
    /// Nothing that is done under the lock leaves it half done, so a panic elsewhere does not matter.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recorder {
    /// Begins a recording. An older recording at this place is overwritten, any other file is not.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::InUse`], [`Error::Write`], or [`Error::Event`] for a subject that no file can hold.
    pub fn create(path: &Path, subject: &Subject) -> Result<Self, Error> {
        let event = |what: String| Error::Event { path: path.into(), what: format!("the model: {what}") };
        let head = head_line(subject).map_err(event)?;
        let chunk = subject_chunk(subject).map_err(event)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::write(path))?;
        // Pipes and devices are written as they are.
        if file.metadata().map_err(Error::write(path))?.is_file() {
            lock(&file, path)?;
            let mut start = Vec::new();
            (&file).take(HEAD.len() as u64).read_to_end(&mut start).map_err(Error::read(path))?;
            if !start.is_empty() && start != HEAD.as_bytes() {
                return Err(Error::Exists { path: path.into() });
            }
            file.set_len(0).and_then(|()| file.rewind()).map_err(Error::write(path))?;
        }
        let written = file.write_all(&head).and_then(|()| file.write_all(&chunk)).and_then(|()| file.flush());
        written.map_err(Error::write(path))?;
        Ok(Self::start(path, subject.clone(), file, (head.len() + chunk.len()) as u64, (0, 0)))
    }

    /// Goes on with a recording behind its last chunk; a chunk that was cut off is removed. Numbers of texts and frames
    /// go on behind those that there are.
    ///
    /// # Errors
    /// As [`super::Recording::open`] and [`Recorder::create`]; [`Error::OtherSubject`] if the recording is of another
    /// model, precision, compilation or device.
    pub fn append(path: &Path, subject: &Subject) -> Result<Self, Error> {
        // Locked first, so that no one writes between reading and writing.
        let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(Error::write(path))?;
        if file.metadata().map_err(Error::write(path))?.is_file() {
            lock(&file, path)?;
        }
        let (layout, _) = Layout::open(path)?;
        let old = &layout.subject;
        let differs = |what: &str, old: &str, new: &str| format!("{what} is {new}, the recording's is {old}");
        let what = if old.model.checkpoint != subject.model.checkpoint {
            Some(differs("the checkpoint", &old.model.checkpoint, &subject.model.checkpoint))
        } else if old.precision != subject.precision {
            Some(differs("the precision", &old.precision, &subject.precision))
        } else if old.device != subject.device {
            Some(differs("the device", &old.device, &subject.device))
        } else if old.programs != subject.programs || old.model != subject.model {
            Some("the model was compiled in another way".into())
        } else {
            None
        };
        if let Some(what) = what {
            return Err(Error::OtherSubject { path: path.into(), what });
        }
        file.set_len(layout.end).and_then(|()| file.seek(SeekFrom::End(0))).map_err(Error::write(path))?;
        let (end, next) = (layout.end, layout.next);
        Ok(Self::start(path, layout.subject, file, end, next))
    }

    fn start(path: &Path, subject: Subject, file: File, bytes: u64, shift: (u32, u64)) -> Self {
        let state = State { bytes, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let writing = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || write_chunks(&shared, file)
        });
        let (path, writing) = (path.to_owned(), Some(writing));
        Self { path, subject, shared, writing, intake: Intake::new(shift), tokens: 0, waited: Duration::ZERO }
    }

    /// Takes in what happened.
    ///
    /// # Errors
    /// [`Error::Write`] if writing failed, now or before; then nothing more is written. [`Error::Event`] for an event
    /// that makes no sense (a token of a text that never began, numbers that do not fit): it alone is left out.
    pub fn push(&mut self, event: &Event) -> Result<(), Error> {
        let told = self.take(event);
        told.map_err(|error| match error {
            Refused::Event(what) => Error::Event { path: self.path.clone(), what },
            Refused::Write(source) => Error::Write { path: self.path.clone(), source },
        })
    }

    fn take(&mut self, event: &Event) -> Result<(), Refused> {
        if let Event::Frame(frame) = event {
            check_frame(frame, &self.subject)?;
        }
        let mut state = self.shared.lock();
        // The writing thread takes a chunk that is full or due, and leaves an empty one.
        let fits = |state: &State| match event {
            Event::Frame(frame) => state.filling.takes(frame),
            _ => true,
        };
        if !fits(&state) {
            state.filling.due = true;
            self.shared.changed.notify_all();
        }
        let started = Instant::now();
        let is_slow = |state: &mut State| state.failed.is_none() && state.filling.is_full();
        state = self.shared.changed.wait_while(state, is_slow).unwrap_or_else(PoisonError::into_inner);
        self.waited += started.elapsed();
        if let Some((kind, what)) = &state.failed {
            return Err(Refused::Write(io::Error::new(*kind, what.clone())));
        }
        self.intake.take(event, &mut state.filling)?;
        self.tokens += u64::from(matches!(event, Event::Token { .. }));
        let is_first = state.since.is_none();
        state.since.get_or_insert_with(Instant::now);
        if is_first || state.filling.is_full() {
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// Writes what is left, waits until the disk has it, and says what was written.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn finish(mut self) -> Result<Written, Error> {
        self.close();
        let state = self.shared.lock();
        match &state.failed {
            Some((kind, what)) => {
                Err(Error::Write { path: self.path.clone(), source: io::Error::new(*kind, what.clone()) })
            }
            None => Ok(Written { tokens: self.tokens, bytes: state.bytes, waited: self.waited }),
        }
    }

    fn close(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(writing) = self.writing.take()
            && writing.join().is_err()
        {
            self.shared.lock().failed = Some((io::ErrorKind::Other, "the writing thread panicked".into()));
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.close();
    }
}

/// Why an event was not taken.
enum Refused {
    Event(String),
    Write(io::Error),
}

impl From<String> for Refused {
    fn from(what: String) -> Self {
        Self::Event(what)
    }
}

fn lock(file: &File, path: &Path) -> Result<(), Error> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::InUse { path: path.into() }),
        // Not every file system can lock.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

fn write_chunks(shared: &Shared, mut file: File) {
    let mut state = shared.lock();
    loop {
        let age = state.since.map(|since| since.elapsed());
        let is_old = age.is_some_and(|age| age >= LATEST);
        if !(state.filling.is_full() || is_old || state.closing) {
            let wait = age.map_or(Duration::MAX, |age| LATEST.saturating_sub(age));
            state = match shared.changed.wait_timeout(state, wait) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
            continue;
        }
        let chunk = std::mem::take(&mut state.filling);
        state.since = None;
        let (is_last, end) = (state.closing, state.bytes);
        shared.changed.notify_all();
        drop(state);
        let mut written = write_chunk(&mut file, &chunk, end);
        if is_last && written.is_ok() {
            written = sync(&file).map(|()| written.unwrap_or_default());
        }
        state = shared.lock();
        match written {
            Ok(bytes) => state.bytes += bytes,
            Err(error) => state.failed = Some((error.kind(), error.to_string())),
        }
        if is_last || state.failed.is_some() {
            shared.changed.notify_all();
            return;
        }
    }
}

/// Writes a chunk behind `end` bytes. If that fails, what came of it is cut off again.
fn write_chunk(file: &mut File, chunk: &Filling, end: u64) -> io::Result<u64> {
    if chunk.is_empty() {
        return Ok(0);
    }
    let bytes = chunk.encode().map_err(io::Error::other)?;
    let written = file.write_all(&bytes).and_then(|()| file.flush());
    if let Err(error) = written {
        let _ = file.set_len(end); // a part of a chunk can be told from a whole one, too
        return Err(error);
    }
    Ok(bytes.len() as u64)
}

/// Waits until the disk has everything; pipes and some devices have nothing to wait for.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_data() {
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}
