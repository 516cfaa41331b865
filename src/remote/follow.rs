//! Following a server on a thread: across restarts, and as long as anybody looks.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use moewe_viewer::recording::wire::Decoder;
use moewe_viewer::source::Event;
use moewe_viewer::subject::Subject;
use tungstenite::{Message, WebSocket};

use super::connect::{Server, TICK, is_timeout, plain};
use super::{Wake, call};

/// A server that sends nothing for so long, not even a ping, is gone.
const SILENCE: Duration = Duration::from_secs(90);
/// Pauses between attempts to reach a server again: they double from the first to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Nobody looks any more.
struct Gone;

struct Follower {
    server: Server,
    taps: String,
    sender: SyncSender<Vec<Event>>,
    wake: Wake,
    /// Texts that are being written.
    texts: BTreeSet<u32>,
    /// What is added to the server's numbers of texts and frames, and the first numbers behind all that came.
    shift: (u32, u64),
    next: (u32, u64),
}

/// Hands over all that a server tells.
pub(super) fn spawn(
    server: Server,
    taps: String,
    connection: (WebSocket<TcpStream>, Decoder),
    sender: SyncSender<Vec<Event>>,
    wake: Wake,
) {
    let (texts, shift, next) = (BTreeSet::new(), (0, 0), (0, 0));
    let mut follower = Follower { server, taps, sender, wake, texts, shift, next };
    std::thread::spawn(move || {
        let _ = follower.follow(connection); // it only ends when nobody looks any more, or after an error that was told
        drop(follower.sender);
        call(&follower.wake);
    });
}

impl Follower {
    fn follow(&mut self, mut connection: (WebSocket<TcpStream>, Decoder)) -> Result<(), Gone> {
        let subject = connection.1.subject().clone();
        loop {
            match self.read(connection)? {
                Ok(why) => self.lost(&why)?,
                Err(what) => {
                    let server = self.server.name();
                    return self.tell(vec![Event::Error(format!("{server} sent what makes no sense: {what}"))]);
                }
            }
            match self.again(&subject)? {
                Some(again) => connection = again,
                None => return Ok(()),
            }
        }
    }

    /// Reads until the connection ends, and says why. An error is a message that makes no sense.
    fn read(
        &mut self,
        (mut socket, mut decoder): (WebSocket<TcpStream>, Decoder),
    ) -> Result<Result<String, String>, Gone> {
        let mut heard = Instant::now();
        loop {
            match socket.read() {
                Ok(Message::Binary(message)) => match decoder.events(&message) {
                    Ok(events) => {
                        let events = events.into_iter().map(|event| self.placed(event)).collect();
                        self.tell(events)?;
                    }
                    Err(what) => return Ok(Err(what)),
                },
                Ok(Message::Close(Some(frame))) if !frame.reason.is_empty() => return Ok(Ok(plain(&frame.reason))),
                Ok(Message::Close(_)) => return Ok(Ok("it closed the connection".into())),
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) if is_timeout(&error) => {
                    // An empty message finds out whether anybody looks.
                    if let Err(TrySendError::Disconnected(_)) = self.sender.try_send(Vec::new()) {
                        return Err(Gone);
                    } else if heard.elapsed() > SILENCE {
                        return Ok(Ok(format!("nothing was heard of it for {} seconds", SILENCE.as_secs())));
                    }
                    continue;
                }
                Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                    return Ok(Ok("it closed the connection".into()));
                }
                Err(tungstenite::Error::Io(error)) => return Ok(Ok(error.to_string())),
                Err(tungstenite::Error::Protocol(error)) if is_cut_off(&error) => {
                    return Ok(Ok("the connection was cut".into()));
                }
                Err(error) => return Ok(Err(plain(&error.to_string()))),
            }
            heard = Instant::now();
        }
    }

    /// An event behind all that came over earlier connections.
    fn placed(&mut self, event: Event) -> Event {
        let event = event.shifted(self.shift.0, self.shift.1);
        match &event {
            Event::Begin(info) => {
                self.texts.insert(info.number);
                self.next.0 = self.next.0.max(info.number.saturating_add(1));
            }
            Event::End { sequence, .. } => drop(self.texts.remove(sequence)),
            Event::Frame(frame) => self.next.1 = self.next.1.max(frame.number.saturating_add(1)),
            _ => {}
        }
        event
    }

    fn tell(&self, events: Vec<Event>) -> Result<(), Gone> {
        self.sender.send(events).map_err(|_| Gone)?;
        call(&self.wake);
        Ok(())
    }

    fn lost(&mut self, why: &str) -> Result<(), Gone> {
        let ended = std::mem::take(&mut self.texts).into_iter().map(|sequence| Event::End {
            sequence,
            reason: "the server was lost".into(),
            tokens_per_second: 0.0,
        });
        let note = Event::Note(format!("lost {}: {why}; trying to reach it again", self.server.name()));
        self.tell(ended.chain([note]).collect())
    }

    /// Reaches the server again, however long that takes; `None` if it is no use, which was told then.
    fn again(&mut self, subject: &Subject) -> Result<Option<(WebSocket<TcpStream>, Decoder)>, Gone> {
        let mut pause = PAUSES.0;
        loop {
            let until = Instant::now() + pause;
            while Instant::now() < until {
                std::thread::sleep(TICK);
                if let Err(TrySendError::Disconnected(_)) = self.sender.try_send(Vec::new()) {
                    return Err(Gone);
                }
            }
            pause = (pause * 2).min(PAUSES.1);
            let what = match self.server.watch(&self.taps) {
                Ok(connection) if same(connection.1.subject(), subject) => {
                    self.shift = self.next;
                    self.tell(vec![Event::Note(format!("reached {} again", self.server.name()))])?;
                    return Ok(Some(connection));
                }
                Ok(_) => format!("{} serves another model now; open it anew", self.server.name()),
                Err(error) if error.is_passing() => continue,
                Err(error) => error.to_string(),
            };
            self.tell(vec![Event::Error(what)])?;
            return Ok(None);
        }
    }
}

/// Whether a server that was restarted serves what it served; only its device's speed is measured anew.
fn same(one: &Subject, other: &Subject) -> bool {
    one.model == other.model && one.programs == other.programs && one.pieces == other.pieces
}

/// Whether an error is that of a connection that ended without a word, as a killed server's does.
fn is_cut_off(error: &tungstenite::error::ProtocolError) -> bool {
    matches!(error, tungstenite::error::ProtocolError::ResetWithoutClosingHandshake)
}
