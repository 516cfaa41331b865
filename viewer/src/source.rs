//! Where what is seen comes from: a running session, a recording, or numbers made up for tests.

use moewe_plan::{Edit, TapFrame};

use crate::store::{SequenceInfo, Store, Token};

/// Something that happened at a source.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// All that was told before is void: a recording goes back, and tells everything from its beginning again.
    Reset,
    /// A text begins.
    Begin(SequenceInfo),
    /// A token of a text, in order.
    Token {
        /// The text's number.
        sequence: u32,
        /// The token.
        token: Token,
    },
    /// What the taps showed of a run.
    Frame(TapFrame),
    /// So many frames were dropped.
    Dropped(u64),
    /// A text ended.
    End {
        /// The text's number.
        sequence: u32,
        /// Why, in a word or two.
        reason: String,
        /// Tokens a second of its generation; 0 if there was none.
        tokens_per_second: f64,
    },
    /// Something to tell the user.
    Note(String),
    /// Something went wrong; the source may go on.
    Error(String),
}

impl Event {
    /// Adds to the numbers of texts and frames, so that they do not meet those of another source.
    #[must_use]
    pub fn shifted(mut self, sequences: u32, frames: u64) -> Self {
        let shift = |number: &mut u32| *number = number.saturating_add(sequences);
        match &mut self {
            Self::Begin(info) => {
                shift(&mut info.number);
                info.parent.iter_mut().for_each(|(parent, _)| shift(parent));
            }
            Self::Token { sequence, .. } | Self::End { sequence, .. } => shift(sequence),
            Self::Frame(frame) => {
                frame.number = frame.number.saturating_add(frames);
                frame.tokens.iter_mut().for_each(|token| shift(&mut token.sequence));
            }
            Self::Reset | Self::Dropped(_) | Self::Note(_) | Self::Error(_) => {}
        }
        self
    }
}

/// What a user asks of a source.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Write a text: a live session answers with [`Event::Begin`] and so on.
    Generate(Request),
    /// Stop writing.
    Stop,
}

/// A text to write.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// What to begin with.
    pub prompt: Prompt,
    /// A name for it; the beginning of the text without it.
    pub name: Option<String>,
    /// Most tokens to write.
    pub max_new_tokens: usize,
    /// Temperature; 0 takes the likeliest.
    pub temperature: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// What to change about the model.
    pub edits: Vec<Edit>,
    /// The text that this repeats, and the position from which on it may differ.
    pub parent: Option<(u32, u32)>,
}

/// How a text begins.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// As text, which the source turns into tokens.
    Text(String),
    /// As tokens.
    Tokens(Vec<u32>),
}

impl Default for Prompt {
    fn default() -> Self {
        Prompt::Text(String::new())
    }
}

/// How a source stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Whether it can be told to write ([`Command::Generate`]).
    pub is_live: bool,
    /// Whether it is writing or reading now.
    pub busy: bool,
    /// What it is doing, to show beside a spinner; empty if nothing.
    pub doing: String,
    /// For recordings: tokens that were shown and tokens that there are.
    pub progress: Option<(u64, u64)>,
}

/// A source of frames. Nothing here waits: the window is drawn on the same thread.
pub trait Source {
    /// What happened since the last call, up to a bounded amount; more comes with the next one.
    fn poll(&mut self) -> Vec<Event>;
    /// Asks for something. What a source cannot do, it answers with [`Event::Error`].
    fn send(&mut self, command: Command);
    /// How it stands.
    fn status(&self) -> Status;
    /// Calls `wake` when [`Source::poll`] has something new, from any thread.
    fn set_wake(&mut self, wake: Box<dyn Fn() + Send + Sync>);
    /// Replay, if the source is a recording.
    fn replay(&mut self) -> Option<&mut dyn Replay> {
        None
    }
}

/// A source whose time can be moved.
pub trait Replay {
    /// Tokens that there are.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Tokens that are shown.
    fn position(&self) -> u64;
    /// Shows so many tokens, and all that was seen up to the last of them; a step is `seek(position() + 1)`. What is shown
    /// comes with the next calls of [`Source::poll`], as fast as it can be read. To go back, [`Source::poll`] tells
    /// [`Event::Reset`], which clears the [`Store`], and then everything from the beginning up to there.
    fn seek(&mut self, position: u64);
    /// Tokens a second from here on; 0 stands still.
    fn set_speed(&mut self, tokens_per_second: f64);
    /// How fast it plays.
    fn speed(&self) -> f64;
}

impl Store {
    /// Takes in what happened. Returns what is to be shown to the user.
    pub fn apply(&mut self, event: Event) -> Option<Notice> {
        match event {
            Event::Reset => self.clear(),
            Event::Begin(info) => self.begin(info),
            Event::Token { sequence, token } => self.push_token(sequence, token),
            Event::Frame(frame) => self.push_frame(&frame),
            Event::Dropped(frames) => self.count_dropped(frames),
            Event::End { sequence, reason, tokens_per_second } => {
                self.end(sequence);
                let rate =
                    if tokens_per_second > 0.0 { format!(", {tokens_per_second:.1} tokens/s") } else { String::new() };
                return Some(Notice { text: format!("ended: {reason}{rate}"), is_error: false });
            }
            Event::Note(text) => return Some(Notice { text, is_error: false }),
            Event::Error(text) => return Some(Notice { text, is_error: true }),
        }
        None
    }
}

/// A line to show for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What it says.
    pub text: String,
    /// Whether something went wrong.
    pub is_error: bool,
}
