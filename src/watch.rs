//! A session's texts as events: what recordings are made of and what a window shows.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use moewe_plan::{ProgramKind, TapChoice, TapFrame, TapGroup};
use moewe_runtime::{FrameReceiver, GenerateOptions, Generated, Session, continue_sequence};
use moewe_viewer::source::Event;
use moewe_viewer::store::{SequenceInfo, Token};

/// The programs that a session needs to be watched: the draft module only if its drafts are to be seen.
pub fn kinds(taps: &TapChoice, mtp_modules: u32) -> Vec<ProgramKind> {
    let mut kinds = vec![ProgramKind::Watch];
    if mtp_modules > 0 && taps.wants(TapGroup::Mtp, None) {
        kinds.push(ProgramKind::Draft { module: 1 });
    }
    kinds
}

/// Characters of a text that serve as its name.
const TITLE_CHARACTERS: usize = 24;

/// A name for a text that was given none: its beginning.
pub fn title(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let title: String = line.chars().take(TITLE_CHARACTERS).collect();
    if title.len() < line.len() { title + "…" } else { title }
}

/// What comes out of a watched session.
#[derive(Debug)]
pub struct Watch {
    frames: FrameReceiver,
    dropped: u64,
}

/// Why a watched generation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error<E: std::error::Error + 'static> {
    /// The session failed.
    #[error(transparent)]
    Session(#[from] moewe_runtime::Error),
    /// What takes the events failed.
    #[error(transparent)]
    Sink(E),
}

impl Watch {
    /// Of a session that was made to be watched.
    pub fn new(frames: FrameReceiver) -> Self {
        Self { frames, dropped: 0 }
    }

    /// Generates from a prompt in a sequence of its own, which is removed afterwards. Everything that happens goes to
    /// `sink`; `info.number` and `info.prompt_tokens` are filled in here. `on_token` may end generation, and so does a
    /// failing sink.
    ///
    /// # Errors
    /// As [`moewe_runtime::generate()`], or what the sink says.
    pub fn generate<E: std::error::Error + 'static>(
        &mut self,
        session: &mut Session,
        prompt: &[u32],
        info: SequenceInfo,
        options: &GenerateOptions,
        sink: &mut dyn FnMut(Event) -> Result<(), E>,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated, Error<E>> {
        // What an earlier text left behind belongs to nobody.
        while self.frames.try_recv().is_some() {}
        let id = session.add_sequence(prompt, options.sampling)?;
        let number = id.number();
        let mut text = WatchedText { number, tokens: 0, held: VecDeque::new(), sink, failed: None };
        text.send(Event::Begin(SequenceInfo { number, prompt_tokens: prompt.len() as u32, ..info }));
        for &id in prompt {
            text.push(Token { id, generated: false });
        }
        let generated = continue_sequence(session, id, options, |token| {
            while let Some(frame) = self.frames.try_recv() {
                text.held.push_back(frame);
            }
            text.push(Token { id: token, generated: true });
            let flow = on_token(token);
            if text.failed.is_some() { ControlFlow::Break(()) } else { flow }
        });
        session.remove_sequence(id)?;
        text.release();
        let dropped = self.frames.dropped();
        if dropped > self.dropped {
            text.send(Event::Dropped(dropped - self.dropped));
            self.dropped = dropped;
        }
        let reason = match &generated {
            Ok(generated) => generated.stop_reason.name().to_owned(),
            Err(error) => error.to_string(),
        };
        let rate = generated.as_ref().map_or(0.0, |generated| generated.timing.decode_rate());
        text.send(Event::End { sequence: number, reason, tokens_per_second: rate });
        match text.failed {
            Some(error) => Err(Error::Sink(error)),
            None => Ok(generated?),
        }
    }
}

struct WatchedText<'a, E> {
    number: u32,
    tokens: u32,
    /// Frames of tokens that were not handed out yet: the device runs ahead of what is read, and what it drew behind the
    /// end of a text never happened.
    held: VecDeque<TapFrame>,
    sink: &'a mut dyn FnMut(Event) -> Result<(), E>,
    failed: Option<E>,
}

impl<E> WatchedText<'_, E> {
    fn send(&mut self, event: Event) {
        if self.failed.is_none() {
            self.failed = (self.sink)(event).err();
        }
    }

    fn push(&mut self, token: Token) {
        self.send(Event::Token { sequence: self.number, token });
        self.tokens += 1;
        if token.generated {
            self.release();
        }
    }

    /// Hands out the frames whose tokens all are known.
    fn release(&mut self) {
        let tokens = self.tokens;
        let known = |frame: &mut TapFrame| frame.tokens.iter().all(|token| token.position < tokens);
        while let Some(frame) = self.held.pop_front_if(known) {
            self.send(Event::Frame(frame));
        }
    }
}
