//! Chromium without a window, driven over its DevTools protocol.

use std::cell::{Cell, RefCell};
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

/// Nothing that is waited for takes so long, however busy the machine is.
const PATIENCE: Duration = Duration::from_mins(2);

/// A browser with one page. It ends when it is dropped.
pub struct Browser {
    process: Child,
    _profile: tempfile::TempDir,
    socket: RefCell<WebSocket<TcpStream>>,
    commands: Cell<u64>,
    session: String,
    /// What the page complained of: exceptions, refused scripts and styles, files that were not found.
    complaints: RefCell<Vec<String>>,
}

/// The browser's program, if there is one.
fn program() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).flat_map(|dir| names.map(|name| dir.join(name))).find(|file| file.is_file())
}

impl Browser {
    /// Starts one; `None` where none is installed.
    pub fn start() -> Option<Self> {
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new(program()?);
        command.args(["--headless", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu"]);
        command.args(["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        if std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
            command.arg("--no-sandbox"); // it refuses to run as root with it
        }
        command.arg("about:blank").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("the browser starts");
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let url = lines.find_map(|line| Some(line.strip_prefix("DevTools listening on ")?.to_owned()));
        // It goes on complaining about what a container lacks.
        std::thread::spawn(move || lines.for_each(drop));
        let url = url.expect("the browser says where it listens");
        let address = url.strip_prefix("ws://").and_then(|rest| rest.split('/').next()).unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (socket, _) = tungstenite::client(url.as_str(), stream).expect("the browser speaks to us");
        let (socket, session) = (RefCell::new(socket), String::new());
        let complaints = RefCell::default();
        let mut browser = Self { process, _profile: profile, socket, commands: Cell::new(0), session, complaints };
        let page = browser.call("Target.createTarget", &json!({"url": "about:blank"}));
        let attach = json!({"targetId": page["targetId"], "flatten": true});
        browser.session = browser.call("Target.attachToTarget", &attach)["sessionId"].as_str().unwrap().into();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        Some(browser)
    }

    /// Sends a command and waits for what comes of it.
    pub fn call(&self, method: &str, params: &Value) -> Value {
        let id = self.commands.get() + 1;
        self.commands.set(id);
        let mut command = json!({"id": id, "method": method, "params": params});
        if !self.session.is_empty() {
            command["sessionId"] = self.session.as_str().into();
        }
        let mut socket = self.socket.borrow_mut();
        socket.send(Message::text(command.to_string())).unwrap();
        loop {
            let Message::Text(text) = socket.read().unwrap_or_else(|error| panic!("{method}: {error}")) else {
                continue;
            };
            let told: Value = serde_json::from_str(&text).unwrap();
            match told["method"].as_str() {
                Some("Runtime.exceptionThrown") => self.complaints.borrow_mut().push(told["params"].to_string()),
                Some("Log.entryAdded") => self.complaints.borrow_mut().push(told["params"]["entry"].to_string()),
                _ => {}
            }
            if told["id"] == id {
                assert!(told.get("error").is_none(), "{method}: {told}");
                return told["result"].clone();
            }
        }
    }

    /// Width and height of the page, and whether it is dark.
    pub fn look(&self, width: u32, height: u32, dark: bool) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", &size);
        let scheme = json!({"name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" }});
        self.call("Emulation.setEmulatedMedia", &json!({"features": [scheme]}));
    }

    /// Goes to a page.
    pub fn open(&self, url: &str) {
        let gone = self.call("Page.navigate", &json!({"url": url}));
        assert!(gone.get("errorText").is_none(), "{gone}");
        self.until("document.readyState === 'complete'");
    }

    /// What an expression gives, as JSON.
    pub fn evaluate(&self, expression: &str) -> Value {
        let asked = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let told = self.call("Runtime.evaluate", &asked);
        assert!(told.get("exceptionDetails").is_none(), "{expression}: {told}");
        told["result"]["value"].clone()
    }

    /// What an expression gives, as text.
    pub fn text(&self, expression: &str) -> String {
        let told = self.evaluate(expression);
        told.as_str().unwrap_or_else(|| panic!("{expression}: {told}")).to_owned()
    }

    /// Waits until an expression is true.
    pub fn until(&self, expression: &str) {
        let started = Instant::now();
        while self.evaluate(&format!("Boolean({expression})")) != true {
            let body = || self.text("document.body.innerText");
            assert!(started.elapsed() < PATIENCE, "{expression} does not come true: {}", body());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types text where the focus is.
    pub fn write(&self, text: &str) {
        self.call("Input.insertText", &json!({"text": text}));
    }

    /// Presses a key, `Enter` or `Escape`; `shift` holds the shift key.
    pub fn press(&self, key: &str, shift: bool) {
        let code = if key == "Enter" { 13 } else { 27 };
        let text = if key == "Enter" { "\r" } else { "" };
        let modifiers = if shift { 8 } else { 0 };
        for kind in ["keyDown", "keyUp"] {
            let mut event =
                json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers});
            if kind == "keyDown" {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", &event);
        }
    }

    /// Clicks on what a selector names.
    pub fn click(&self, selector: &str) {
        self.evaluate(&format!("document.querySelector({}).click()", json!(selector)));
    }

    /// The page as PNG.
    pub fn picture(&self) -> Vec<u8> {
        let told = self.call("Page.captureScreenshot", &json!({"format": "png"}));
        base64(told["data"].as_str().unwrap())
    }

    /// What the page complained of since the last call.
    pub fn complaints(&self) -> Vec<String> {
        self.evaluate("0"); // what was said before this has come
        self.complaints.take()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its other processes end with it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let text: Vec<u8> = text.bytes().filter(|c| *c != b'=').collect();
    let bytes = |four: &[u8]| {
        let word = four.iter().fold(0u32, |word, c| word << 6 | u32::from(digit(*c))) << (6 * (4 - four.len()));
        word.to_be_bytes()[1..four.len()].to_vec()
    };
    text.chunks(4).flat_map(bytes).collect()
}
