//! Showing a recording again.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use moewe_plan::{FrameTensor, Numbers};

use super::Error;
use super::read::Layout;
use super::texts::Texts;
use crate::source::{Command, Event, Replay, Source, Status};
use crate::subject::Subject;

/// Most events that one poll tells.
const POLL_EVENTS: usize = 1024;
/// Bytes of tensors after which a poll tells no more.
const POLL_BYTES: usize = 8 << 20;
/// Chunks that are read ahead.
const AHEAD: usize = 2;

type Wake = Arc<Mutex<Option<Box<dyn Fn() + Send + Sync>>>>;

/// A recording to be shown again, as a [`crate::source::Source`] with a [`crate::source::Replay`]. All of it is shown
/// unless told otherwise. Chunks are read one by one on a thread of their own.
pub struct Recording {
    layout: Arc<Layout>,
    player: Player,
}

impl Recording {
    /// Opens a recording. What cannot be read of it is said in the warnings; the rest is there.
    ///
    /// # Errors
    /// If the file cannot be read, is no recording, is of another version, or ends or is damaged in its first line.
    pub fn open(path: &Path) -> Result<(Self, Vec<String>), Error> {
        let (layout, warnings) = Layout::open(path)?;
        let layout = Arc::new(layout);
        let player = Player::new(&layout);
        Ok((Self { layout, player }, warnings))
    }

    /// The model and the device that were recorded.
    pub fn subject(&self) -> &Subject {
        &self.layout.subject
    }
}

/// Where the replay stands.
pub(super) struct Player {
    reading: Receiver<Batch>,
    /// What comes next, of the chunk that was read last.
    events: VecDeque<Event>,
    /// Tokens of the chunks up to its end.
    end: u64,
    /// Tokens that were told.
    position: u64,
    /// Tokens that are to be told.
    target: u64,
    /// Everything was told.
    done: bool,
    /// The store is to be cleared.
    reset: bool,
    /// What is to be told at once.
    answers: Vec<Event>,
    playing: Option<Playing>,
    wake: Wake,
}

/// Time goes on.
struct Playing {
    speed: f64,
    since: Instant,
    from: u64,
    /// Wakes the window until it is dropped.
    _ticks: Sender<()>,
}

/// What a chunk told.
struct Batch {
    events: Vec<Event>,
    /// Tokens before it and behind it, as the lines of the file say.
    tokens: (u64, u64),
}

impl Player {
    pub(super) fn new(layout: &Arc<Layout>) -> Self {
        let wake = Wake::default();
        Self {
            reading: read(Arc::clone(layout), Arc::clone(&wake)),
            events: VecDeque::new(),
            end: 0,
            position: 0,
            target: layout.tokens,
            done: false,
            reset: false,
            answers: Vec::new(),
            playing: None,
            wake,
        }
    }

    /// Goes back to the beginning.
    fn rewind(&mut self, layout: &Arc<Layout>) {
        self.reading = read(Arc::clone(layout), Arc::clone(&self.wake)); // the thread before ends as nobody listens
        self.events.clear();
        (self.end, self.position) = (0, 0);
        (self.done, self.reset) = (false, true);
    }

    /// Whether the next event has to wait until more tokens are wanted.
    fn is_at_target(&self) -> bool {
        self.position >= self.target && matches!(self.events.front(), Some(Event::Token { .. }))
    }

    fn poll(&mut self, tokens: u64) -> Vec<Event> {
        if let Some(playing) = &self.playing {
            let played = playing.since.elapsed().as_secs_f64() * playing.speed;
            self.target = playing.from.saturating_add(played as u64).min(tokens);
        }
        let mut told = std::mem::take(&mut self.answers);
        if std::mem::take(&mut self.reset) {
            told.push(Event::Reset);
        }
        let mut bytes = 0;
        while told.len() < POLL_EVENTS && bytes < POLL_BYTES && !self.is_at_target() {
            let Some(event) = self.events.pop_front() else {
                self.position = self.end; // tokens that could not be read are passed by
                match self.reading.try_recv() {
                    Ok(batch) => {
                        (self.position, self.end) = batch.tokens;
                        self.events = batch.events.into();
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.done = true;
                        break;
                    }
                }
                continue;
            };
            match &event {
                Event::Token { .. } => self.position += 1,
                Event::Frame(frame) => bytes += frame.tensors.iter().map(tensor_bytes).sum::<usize>(),
                _ => {}
            }
            told.push(event);
        }
        if self.done && self.position >= tokens {
            self.playing = None;
        }
        told
    }
}

fn tensor_bytes(tensor: &FrameTensor) -> usize {
    match &tensor.data {
        Numbers::F32(numbers) => numbers.len() * 4,
        Numbers::U32(numbers) => numbers.len() * 4,
    }
}

fn call(wake: &Wake) {
    if let Some(wake) = &*wake.lock().unwrap_or_else(PoisonError::into_inner) {
        wake();
    }
}

/// Reads all chunks on a thread that ends when there are no more or nobody listens.
fn read(layout: Arc<Layout>, wake: Wake) -> Receiver<Batch> {
    let (sender, receiver) = sync_channel(AHEAD);
    std::thread::spawn(move || {
        let mut texts = Texts::default();
        for chunk in &layout.chunks {
            let events = match layout.read(chunk) {
                Ok(told) => told.into_iter().flat_map(|told| texts.place(told)).collect(),
                Err(what) => {
                    let (path, at, tokens) = (layout.path.display(), chunk.at, chunk.tokens);
                    let text = format!("{path}, byte {at}: {tokens} tokens are left out: {what}");
                    vec![Event::Error(text)]
                }
            };
            let tokens = (chunk.first, chunk.first + chunk.tokens);
            if sender.send(Batch { events, tokens }).is_err() {
                return;
            }
            call(&wake);
        }
        drop(sender);
        call(&wake);
    });
    receiver
}

impl Source for Recording {
    fn poll(&mut self) -> Vec<Event> {
        self.player.poll(self.layout.tokens)
    }

    fn send(&mut self, command: Command) {
        match command {
            Command::Stop => self.set_speed(0.0),
            Command::Generate(_) => {
                let text = "a recording cannot write texts; open the model itself with `moewe view MODEL`";
                self.player.answers.push(Event::Error(text.into()));
                call(&self.player.wake);
            }
        }
    }

    fn status(&self) -> Status {
        let player = &self.player;
        let busy = player.reset || !player.done && !player.is_at_target();
        let doing = if busy { format!("reading {}", self.layout.path.display()) } else { String::new() };
        Status { is_live: false, busy, doing, progress: Some((player.position, self.layout.tokens)) }
    }

    fn set_wake(&mut self, wake: Box<dyn Fn() + Send + Sync>) {
        wake(); // something may have come before
        *self.player.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    fn replay(&mut self) -> Option<&mut dyn Replay> {
        Some(self)
    }
}

impl Replay for Recording {
    fn len(&self) -> u64 {
        self.layout.tokens
    }

    fn position(&self) -> u64 {
        self.player.position
    }

    fn seek(&mut self, position: u64) {
        let player = &mut self.player;
        player.target = position.min(self.layout.tokens);
        if player.target < player.position {
            player.rewind(&self.layout);
        }
        if let Some(playing) = &mut player.playing {
            (playing.since, playing.from) = (Instant::now(), player.target);
        }
        call(&player.wake);
    }

    fn set_speed(&mut self, tokens_per_second: f64) {
        let player = &mut self.player;
        let was_playing = player.playing.take().is_some();
        if tokens_per_second > 0.0 && tokens_per_second.is_finite() {
            let (ticks, stopped) = channel();
            tick(tokens_per_second, stopped, Arc::clone(&player.wake));
            player.target = player.position;
            let (since, from) = (Instant::now(), player.position);
            player.playing = Some(Playing { speed: tokens_per_second, since, from, _ticks: ticks });
        } else if was_playing {
            player.target = player.position;
        }
    }

    fn speed(&self) -> f64 {
        self.player.playing.as_ref().map_or(0.0, |playing| playing.speed)
    }
}

/// Wakes the window as often as a token comes, at most 60 times a second and at least once, until told to stop.
fn tick(tokens_per_second: f64, stopped: Receiver<()>, wake: Wake) {
    let pause = Duration::from_secs_f64((1.0 / tokens_per_second).clamp(1.0 / 60.0, 1.0));
    std::thread::spawn(move || {
        while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            call(&wake);
        }
    });
}
