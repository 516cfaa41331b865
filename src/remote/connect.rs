//! Finding a server and being let in.

use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use moewe_viewer::recording::wire::{Decoder, MAX_MESSAGE};
use tungstenite::client::{IntoClientRequest, client_with_config};
use tungstenite::http::header::AUTHORIZATION;
use tungstenite::http::uri::{Authority, Scheme};
use tungstenite::http::{HeaderValue, Uri};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{HandshakeError, Message, WebSocket};

/// Time to reach a server, and for its answer.
const CONNECT: Duration = Duration::from_secs(10);
/// Time for the description of the model.
const DESCRIBE: Duration = Duration::from_mins(1);
/// How often a waiting thread looks whether anybody wants to know.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// Longest part of a server's own words that is shown, in characters.
const MAX_WORDS: usize = 300;

/// Why a server cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is none.
    #[error("{address}: {what}")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        what: String,
    },
    /// Nobody answers there.
    #[error("cannot reach {server}: {what}; is `moewe serve` running there, and are host and port right?")]
    Unreachable {
        /// Host and port.
        server: String,
        /// What the operating system said.
        what: String,
    },
    /// Somebody answers, in another way than expected.
    #[error("{server} does not answer as `moewe serve` does: {what}")]
    NotMoewe {
        /// Host and port.
        server: String,
        /// What came.
        what: String,
    },
    /// The server does not let us in.
    #[error("{server} refuses ({status}): {what}")]
    Refused {
        /// Host and port.
        server: String,
        /// Of the HTTP answer.
        status: u16,
        /// What the server said and what to do.
        what: String,
    },
    /// What sends requests could not be set up.
    #[error("cannot send requests: {0}")]
    Client(String),
}

impl Error {
    /// Whether the same may succeed a little later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Refused { status: 429 | 500..=599, .. })
    }
}

/// A server's address, and what opens it.
#[derive(Clone)]
pub struct Server {
    authority: Authority,
    key: Option<String>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("authority", &self.authority).finish_non_exhaustive() // never the key
    }
}

impl Server {
    /// Whether this is an address rather than a file.
    pub fn is_address(text: &str) -> bool {
        ["http://", "https://", "ws://", "wss://"].iter().any(|scheme| text.starts_with(scheme))
    }

    /// `http://HOST:PORT`, also as clients of the OpenAI API are given it, with `/v1` behind it.
    ///
    /// # Errors
    /// [`Error::Address`].
    pub fn new(address: &str, key: Option<String>) -> Result<Self, Error> {
        let wrong = |what: &str| Error::Address { address: address.into(), what: what.into() };
        let uri: Uri = address.parse().map_err(|_| wrong("no address; expected http://HOST:PORT"))?;
        if uri.scheme() == Some(&Scheme::HTTPS) || uri.scheme_str() == Some("wss") {
            return Err(wrong(
                "encrypted connections are not spoken here; reach the server through a tunnel, such as \
                 `ssh -L 8080:localhost:8080 HOST`, and give http://localhost:8080",
            ));
        }
        let authority = uri.authority().filter(|authority| !authority.host().is_empty());
        let authority = authority.ok_or_else(|| wrong("no host; expected http://HOST:PORT"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("no name or password belongs into the address; give a key with --api-key-file"));
        }
        if !matches!(uri.path(), "" | "/" | "/v1" | "/v1/") || uri.query().is_some() {
            return Err(wrong("nothing belongs behind host and port; expected http://HOST:PORT"));
        }
        if let Some(key) = &key
            && HeaderValue::from_str(&format!("Bearer {key}")).is_err()
        {
            return Err(wrong("the key for it has characters that no key has"));
        }
        Ok(Self { authority: authority.clone(), key })
    }

    /// Host and port.
    pub fn name(&self) -> &str {
        self.authority.as_str()
    }

    /// The key.
    pub(super) fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Opens the stream of what happens, and reads what the model is.
    pub(super) fn watch(&self, taps: &str) -> Result<(WebSocket<TcpStream>, Decoder), Error> {
        let server = || self.name().to_owned();
        let not_moewe = |what: String| Error::NotMoewe { server: server(), what };
        let url = format!("ws://{}/v1/watch?taps={}", self.authority, query(taps));
        let mut request = url.into_client_request().map_err(|error| not_moewe(error.to_string()))?;
        if let Some(key) = &self.key
            && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {key}"))
        {
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let stream =
            self.connect().map_err(|error| Error::Unreachable { server: server(), what: error.to_string() })?;
        let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let mut socket = match client_with_config(request, stream, Some(config)) {
            Ok((socket, _)) => socket,
            Err(HandshakeError::Interrupted(_)) => {
                return Err(not_moewe(format!("no answer within {CONNECT:?}")));
            }
            Err(HandshakeError::Failure(tungstenite::Error::Http(answer))) => {
                let said = said(answer.body().as_deref().unwrap_or_default());
                return Err(self.refused(answer.status().as_u16(), &said));
            }
            Err(HandshakeError::Failure(error)) => return Err(not_moewe(plain(&error.to_string()))),
        };
        let set = socket.get_ref().set_read_timeout(Some(TICK));
        set.map_err(|error| Error::Unreachable { server: server(), what: error.to_string() })?;
        let started = Instant::now();
        let beginning = loop {
            match socket.read() {
                Ok(Message::Binary(bytes)) => break bytes,
                Ok(Message::Text(_)) => return Err(not_moewe("text where the model is to be described".into())),
                Ok(Message::Close(frame)) => {
                    let why = frame.map_or_else(|| "it closes the connection".into(), |frame| plain(&frame.reason));
                    return Err(Error::Refused { server: server(), status: 503, what: why });
                }
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) if is_timeout(&error) => {}
                Err(error) => return Err(not_moewe(plain(&error.to_string()))),
            }
            if started.elapsed() > DESCRIBE {
                return Err(not_moewe(format!("it did not describe its model within {DESCRIBE:?}")));
            }
        };
        let decoder = Decoder::new(&beginning).map_err(not_moewe)?;
        Ok((socket, decoder))
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let host = self.authority.host().trim_start_matches('[').trim_end_matches(']');
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for address in (host, self.authority.port_u16().unwrap_or(80)).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(CONNECT))?;
                    stream.set_write_timeout(Some(CONNECT))?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// What an answer means that is no websocket.
    pub(super) fn refused(&self, status: u16, said: &str) -> Error {
        let server = self.name().to_owned();
        let words = |hint: &str| if said.is_empty() { hint.to_owned() } else { format!("{said}; {hint}") };
        let what = match status {
            401 if self.key.is_none() => "it wants a key: give --api-key-file FILE, or set MOEWE_API_KEY".into(),
            401 => "it does not know this key: see --api-key-file and MOEWE_API_KEY".into(),
            402 => words("the key's budget is spent"),
            403 => "it does not let itself be watched: start it with `moewe serve --allow-watch`".into(),
            404 | 405 => {
                return Error::NotMoewe { server, what: format!("it has nothing at /v1/watch (HTTP {status})") };
            }
            200..=399 => {
                return Error::NotMoewe { server, what: format!("HTTP {status} where a websocket was asked for") };
            }
            400 | 422 => words("see --taps"),
            503 if said.is_empty() => "it is not ready, or others watch it already; try again a little later".into(),
            _ if said.is_empty() => "it does not say why".into(),
            _ => said.to_owned(),
        };
        Error::Refused { server, status, what }
    }
}

/// Whether nothing came for a while.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// The message of an error in OpenAI's form; nothing of anything else.
pub(super) fn said(body: &[u8]) -> String {
    let body: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    plain(body.as_ref().and_then(|body| body["error"]["message"].as_str()).unwrap_or_default())
}

/// Others' words as they may stand in a line: no control characters, not endless.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS).collect()
}

/// A list of taps as it stands in a query: letters, digits, commas and colons as they are.
fn query(taps: &str) -> String {
    let is_safe = |c: &u8| c.is_ascii_alphanumeric() || b",:_".contains(c);
    taps.bytes().map(|c| if is_safe(&c) { char::from(c).to_string() } else { format!("%{c:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for address in
            ["http://localhost:8080", "http://127.0.0.1:8080/", "http://[::1]:80/v1", "http://a/v1/", "ws://a"]
        {
            assert!(Server::is_address(address));
            Server::new(address, None).unwrap();
        }
        assert_eq!(Server::new("http://[::1]:80/v1", None).unwrap().name(), "[::1]:80");
        let wrong = [
            ("https://a:8080", "tunnel"),
            ("http://", "expected http://HOST:PORT"),
            ("http://user:secret@a", "--api-key-file"),
            ("http://a/v2", "nothing belongs behind"),
            ("http://a/?taps=all", "nothing belongs behind"),
            ("http://a b", "no address"),
        ];
        for (address, word) in wrong {
            let error = Server::new(address, None).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = Server::new("http://a", Some("x\ny".into())).unwrap_err().to_string();
        assert!(error.contains("key") && !error.contains('x'), "{error}");
        let server = Server::new("http://a", Some("secret".into())).unwrap();
        assert!(!format!("{server:?}").contains("secret"));
    }

    #[test]
    fn refusals_say_what_to_do() {
        let server = |key: Option<&str>| Server::new("http://a:1", key.map(Into::into)).unwrap();
        let told = |status, said: &str| server(Some("k")).refused(status, said).to_string();
        assert!(server(None).refused(401, "").to_string().contains("give --api-key-file"));
        assert!(told(401, "").contains("does not know this key"));
        assert!(told(403, "").contains("--allow-watch"));
        assert!(told(404, "").contains("does not answer as `moewe serve`"));
        assert!(told(302, "").contains("HTTP 302"));
        assert!(told(400, "no tap `x`").contains("no tap `x`; see --taps"));
        assert!(told(503, "").contains("try again"));
        assert_eq!(told(500, "oh\u{1b}[2J"), "a:1 refuses (500): oh\u{1b}[2J");
        assert_eq!(said(br#"{"error":{"message":"oh\u001b[2J"}}"#), "oh [2J");
        assert_eq!(said(b"<html>"), "");
        assert!(server(None).refused(503, "").is_passing() && !server(None).refused(403, "").is_passing());
    }

    #[test]
    fn taps_in_a_query() {
        assert_eq!(query("routing,latents:3"), "routing,latents:3");
        assert_eq!(query("a b&c=é"), "a%20b%26c%3D%C3%A9");
    }
}
