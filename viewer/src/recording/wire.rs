//! A recording that is sent instead of written: what a server tells those who watch it. Messages are pieces of a file.
//! The first is what every file begins with, the line about the model and the chunk `subject`; each of the others is one
//! chunk. Put one behind the other they are a recording.

use std::sync::Arc;

use super::chunk::{Filling, check_frame, subject_chunk};
use super::decode;
use super::intake::Intake;
use super::read::{BadHead, parse_head};
use super::texts::Texts;
use super::{Kind, Line, MAX_HEAD, MAX_LINE, VERSION, head_line, is_sound};
use crate::source::Event;
use crate::subject::Subject;

/// Largest message, in bytes. Files may have larger chunks.
pub const MAX_MESSAGE: usize = 64 << 20;
/// Most bytes of numbers in a frame that is sent: with what a chunk holds besides, it stays below [`MAX_MESSAGE`].
const MAX_FRAME: usize = 40 << 20;

/// The first message.
///
/// # Errors
/// What is wrong with a subject that no recording can hold.
pub fn beginning(subject: &Subject) -> Result<Vec<u8>, String> {
    let mut message = head_line(subject)?;
    message.extend(subject_chunk(subject)?);
    if message.len() > MAX_MESSAGE {
        return Err(format!("the model's description has {} bytes, at most {MAX_MESSAGE} are sent", message.len()));
    }
    Ok(message)
}

/// Makes messages of events.
#[derive(Debug)]
pub struct Encoder {
    subject: Arc<Subject>,
    intake: Intake,
    filling: Filling,
    /// Chunks that are full.
    full: Vec<Vec<u8>>,
}

impl Encoder {
    /// For those who were sent the [`beginning`] with this subject.
    pub fn new(subject: Arc<Subject>) -> Self {
        Self { subject, intake: Intake::new((0, 0)), filling: Filling::default(), full: Vec::new() }
    }

    /// Takes in what happened.
    ///
    /// # Errors
    /// What is wrong with an event that makes no sense or is too large to be sent. It alone is left out.
    pub fn push(&mut self, event: &Event) -> Result<(), String> {
        if let Event::Frame(frame) = event {
            check_frame(frame, &self.subject)?;
            let bytes: usize =
                frame.tensors.iter().map(|tensor| frame.tokens.len() * tensor.columns as usize * 4).sum();
            if bytes > MAX_FRAME {
                return Err(format!("frame {} has {bytes} bytes, at most {MAX_FRAME} are sent", frame.number));
            }
            if !self.filling.takes(frame) {
                self.close()?;
            }
        }
        if self.filling.is_full() {
            self.close()?;
        }
        self.intake.take(event, &mut self.filling)?;
        if let Event::End { sequence, .. } = event {
            self.intake.forget(*sequence); // a server goes on for months
        }
        Ok(())
    }

    /// Whether there is enough for a message.
    pub fn is_ready(&self) -> bool {
        !self.full.is_empty() || self.filling.is_full()
    }

    /// The messages of what was taken in since the last call.
    ///
    /// # Errors
    /// If what was taken in makes no message that can be read. It is left out.
    pub fn messages(&mut self) -> Result<Vec<Vec<u8>>, String> {
        self.close()?;
        Ok(std::mem::take(&mut self.full))
    }

    fn close(&mut self) -> Result<(), String> {
        if !self.filling.is_empty() {
            let message = std::mem::take(&mut self.filling).encode()?;
            if message.len() > MAX_MESSAGE {
                return Err(format!("{} bytes at once, at most {MAX_MESSAGE} are sent", message.len()));
            }
            self.full.push(message);
        }
        Ok(())
    }
}

/// Makes events of messages. Their author may be anyone: everything is checked as in a file.
pub struct Decoder {
    subject: Subject,
    texts: Texts,
}

impl Decoder {
    /// Reads the first message.
    ///
    /// # Errors
    /// What was found, and what was expected.
    pub fn new(message: &[u8]) -> Result<Self, String> {
        let (line, rest) = split(message, MAX_HEAD)?;
        let mut subject = parse_head(line).map_err(|bad| match bad {
            BadHead::Other(what) | BadHead::Damaged(what) => format!("no beginning of a recording: {what}"),
            BadHead::Version(found) => format!("format {found}, this moewe reads format {VERSION}"),
        })?;
        match chunk(rest)? {
            (Line { kind: Kind::Subject, .. }, bytes) => decode::fill_subject(bytes, &mut subject)?,
            _ => return Err("the model's texts and biases are missing".into()),
        }
        Ok(Self { subject, texts: Texts::default() })
    }

    /// The model and the device.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Reads one of the messages behind the first.
    ///
    /// # Errors
    /// What was found, and what was expected; nothing of the message is told then.
    pub fn events(&mut self, message: &[u8]) -> Result<Vec<Event>, String> {
        let (line, bytes) = chunk(message)?;
        if line.kind != Kind::Tokens {
            return Err("the model is told of a second time".into());
        }
        let told = decode::events(line, bytes, &self.subject)?;
        let events: Vec<Event> = told.into_iter().flat_map(|told| self.texts.place(told)).collect();
        for event in &events {
            if let Event::End { sequence, .. } = event {
                self.texts.forget(*sequence);
            }
        }
        Ok(events)
    }
}

/// A line with its newline, and what is behind it.
fn split(message: &[u8], longest: u64) -> Result<(&[u8], &[u8]), String> {
    let searched = &message[..message.len().min(longest as usize)];
    match searched.iter().position(|byte| *byte == b'\n') {
        Some(end) => Ok(message.split_at(end + 1)),
        None => Err(format!("no line ends in the first {} bytes", searched.len())),
    }
}

/// The only chunk of some bytes.
fn chunk(bytes: &[u8]) -> Result<(Line, &[u8]), String> {
    let (line, bytes) = split(bytes, MAX_LINE)?;
    if !is_sound(line, bytes) {
        return Err("it is not what was written (the hash differs)".into());
    }
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if line.bytes != bytes.len() as u64 {
        return Err(format!("a chunk of {} bytes, its line says {}", bytes.len(), line.bytes));
    }
    Ok((line, bytes))
}
