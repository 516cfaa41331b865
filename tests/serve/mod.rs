//! A running `moewe serve`, and a client that does exactly what a test says. Needs `common/cli.rs` as `crate::cli`.
#![allow(dead_code)] // each test binary uses its own part of this

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::{MOEWE, demo, root};

/// Nothing that is tested here takes so long, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// A running server. Dropping it kills it.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    pub pid: u32,
    stderr: Arc<Mutex<String>>,
    pub usage_db: PathBuf,
}

/// A server of the demo model that tests share. Prices are 1 for input, 0.25 for cache hits, 2 for output.
pub fn shared() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let prices = ["--price-input", "1", "--price-cache-hit", "0.25", "--price-output", "2"];
        // It is never dropped, so a shell ends it when this process is gone, which closes its input.
        let script = r#""$@" <&- & cat; kill -9 $!"#;
        let server = Server::begin(Some(script), &demo(), &[&prices[..], &["--allow-watch"]].concat());
        server.ready()
    })
}

/// A server that has not said yet where it is.
pub struct Beginning {
    child: Child,
    stderr: Arc<Mutex<String>>,
    usage_db: PathBuf,
}

impl Server {
    /// Starts a server of the demo model and waits until it is ready.
    pub fn start(args: &[&str]) -> Self {
        Self::of(&demo(), args)
    }

    /// Starts a server of a model and waits until it is ready.
    pub fn of(model: &Path, args: &[&str]) -> Self {
        Self::begin(None, model, args).ready()
    }

    /// Starts a server, at a free port unless the arguments have one.
    pub fn begin(script: Option<&str>, model: &Path, args: &[&str]) -> Beginning {
        static COUNT: Mutex<usize> = Mutex::new(0);
        let number = {
            let mut count = COUNT.lock().unwrap();
            *count += 1;
            *count
        };
        let usage_db = root().join(format!("usage-{number}.sqlite"));
        let mut command = match script {
            None => Command::new(MOEWE),
            Some(script) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", script, "sh", MOEWE]);
                shell
            }
        };
        command.arg("serve").arg(model).arg("--json").args(args);
        if !args.contains(&"--port") {
            command.args(["--port", "0"]);
        }
        command.arg("--usage-db").arg(&usage_db).env("MOEWE_CACHE", root().join("cache")).env("NO_COLOR", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let stderr: Arc<Mutex<String>> = Arc::default();
        let (reader, said) = (BufReader::new(child.stderr.take().unwrap()), Arc::clone(&stderr));
        std::thread::spawn(move || {
            for line in reader.lines() {
                let Ok(line) = line else { break };
                let mut said = said.lock().unwrap();
                *said += &line;
                said.push('\n');
            }
        });
        Beginning { child, stderr, usage_db }
    }

    /// What it has written to standard error.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Waits until standard error holds some words.
    pub fn says(&self, words: &str) {
        wait(&format!("stderr with {words:?}"), || self.stderr().contains(words), || self.stderr());
    }

    /// Sends a signal, such as TERM.
    pub fn signal(&self, name: &str) {
        let command = format!("kill -{name} {}", self.pid);
        assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
    }

    /// Waits for its end; the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "it does not end: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A connection with limits of patience.
    pub fn connect(&self) -> TcpStream {
        connect(self.address).expect("the server accepts connections")
    }

    /// Sends a request; headers come as they are given, with `Host` before and `Content-Length` behind them.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> BufReader<TcpStream> {
        let mut stream = self.connect();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n{headers}", self.address);
        let length = format!("Content-Length: {}\r\n\r\n", body.len());
        let sent = stream.write_all(&[head.as_bytes(), length.as_bytes(), body].concat());
        sent.expect("the server reads");
        BufReader::new(stream)
    }

    /// Sends a request and reads the whole answer.
    pub fn ask(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        let mut reader = self.send(method, path, headers, body);
        if method == "HEAD" {
            let (status, headers) = head(&mut reader);
            return Answer { status, headers, body: Vec::new() };
        }
        Answer::read(&mut reader)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "", b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, "Content-Type: application/json\r\n", body.to_string().as_bytes())
    }

    /// Posts and reads JSON; the status must be 200.
    pub fn json(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {answer:?}");
        answer.json()
    }

    /// Posts what asks for a stream.
    pub fn stream(&self, path: &str, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = true.into();
        let mut reader = self.send("POST", path, "", body.to_string().as_bytes());
        let (status, headers) = head(&mut reader);
        assert_eq!(status, 200, "{body}");
        assert!(headers.contains("content-type: text/event-stream"), "{headers}");
        Events(Chunks::new(reader))
    }

    /// The sum of a metric's values.
    pub fn metric(&self, beginning: &str) -> f64 {
        let text = self.get("/metrics").text();
        let lines = text.lines().filter(|line| line.starts_with(beginning));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// Waits until nothing runs or waits, and no page is in use but by the prefix cache.
    pub fn quiet(&self) {
        let busy = || {
            ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
                .map(|name| (name, self.metric(name)))
        };
        wait("an idle server", || busy().iter().all(|(_, value)| *value <= 0.0), || format!("{:?}", busy()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Beginning {
    /// Waits until it is ready.
    pub fn ready(mut self) -> Server {
        let mut line = String::new();
        BufReader::new(self.child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{error}: {line:?}: {}", self.stderr.lock().unwrap()));
        let address = ready["url"].as_str().unwrap().strip_prefix("http://").unwrap().parse().unwrap();
        let pid = ready["pid"].as_u64().unwrap() as u32;
        Server { child: self.child, address, pid, stderr: self.stderr, usage_db: self.usage_db }
    }

    /// Ends it.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection with limits of patience.
pub fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Waits until something holds.
pub fn wait(what: &str, holds: impl Fn() -> bool, otherwise: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: {}", otherwise());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// In lower case, a line each.
    pub headers: String,
    pub body: Vec<u8>,
}

impl Answer {
    /// Reads an answer.
    pub fn read(reader: &mut impl BufRead) -> Self {
        let (status, headers) = head(reader);
        let length = headers.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let mut body = Vec::new();
        if headers.contains("transfer-encoding: chunked") {
            Chunks::new(reader).read_to_end(&mut body).unwrap();
        } else if let Some(length) = length {
            body.resize(length, 0);
            reader.read_exact(&mut body).unwrap();
        }
        Self { status, headers, body }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The error, which must have OpenAI's form.
    pub fn error(&self) -> Value {
        let json = self.json();
        let error = &json["error"];
        for field in ["message", "type"] {
            assert!(error[field].as_str().is_some_and(|text| !text.is_empty()), "{self:?}");
        }
        let fields: Vec<&String> = error.as_object().unwrap().keys().collect();
        assert_eq!(fields, ["message", "type", "param", "code"], "{json}");
        assert!(self.headers.contains("content-type: application/json"), "{self:?}");
        error.clone()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.headers.lines();
        lines.find_map(|line| line.split_once(": ").filter(|(other, _)| *other == name).map(|(_, value)| value))
    }
}

/// Status and headers.
fn head(reader: &mut impl BufRead) -> (u16, String) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let read = reader.read_line(&mut head).expect("the server answers");
        assert!(read > 0, "the connection ends within {head:?}");
    }
    let (line, headers) = head.split_once("\r\n").unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    (status, headers.to_lowercase())
}

/// A body in chunks.
pub struct Chunks<R> {
    reader: R,
    left: usize,
    ended: bool,
}

impl<R: BufRead> Chunks<R> {
    fn new(reader: R) -> Self {
        Self { reader, left: 0, ended: false }
    }
}

impl<R: BufRead> Read for Chunks<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        if self.left == 0 {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            self.left = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                self.reader.read_line(&mut line)?;
                self.ended = true;
                return Ok(0);
            }
        }
        let most = buf.len().min(self.left);
        let read = self.reader.read(&mut buf[..most])?;
        self.left -= read;
        if self.left == 0 {
            self.reader.read_exact(&mut [0; 2])?;
        }
        Ok(read)
    }
}

/// Events of a stream.
pub struct Events(Chunks<BufReader<TcpStream>>);

impl Events {
    /// The data of the next event; `None` at the end.
    pub fn next_data(&mut self) -> Option<String> {
        loop {
            let mut line = Vec::new();
            let mut byte = [0];
            while !line.ends_with(b"\n") {
                if self.0.read(&mut byte).expect("the stream goes on") == 0 {
                    assert!(line.is_empty(), "the stream ends within a line: {line:?}");
                    return None;
                }
                line.push(byte[0]);
            }
            let line = String::from_utf8(line).expect("events are text");
            match line.trim_end().split_once(": ") {
                Some(("data", data)) => return Some(data.to_owned()),
                Some(("", comment)) => assert_eq!(comment, "keep-alive"),
                _ => assert_eq!(line, "\n"),
            }
        }
    }

    /// The next event's JSON.
    pub fn next_json(&mut self) -> Value {
        let data = self.next_data().expect("another event");
        serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}"))
    }

    /// All events up to `[DONE]`, behind which there is none.
    pub fn all(mut self) -> Vec<Value> {
        let mut all = Vec::new();
        loop {
            let data = self.next_data().unwrap_or_else(|| panic!("no [DONE] behind {all:?}"));
            if data == "[DONE]" {
                assert_eq!(self.next_data(), None);
                return all;
            }
            all.push(serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}")));
        }
    }
}

/// A chat request with one message.
pub fn chat(content: &str, more: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": content }], "seed": 7 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// A chat request that takes seconds: no token ends its answer before its length does.
pub fn long_chat(tokens: u32) -> Value {
    chat("The king said", &json!({ "max_tokens": tokens, "logit_bias": { "1": -100 } }))
}
