//! Recording, viewing and changing models as a user does, with and without a window.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[path = "common/cli.rs"]
mod cli;

use cli::{MOEWE, demo, golden, moewe, root};
use serde_json::{Value, json};

const VIEWS: [&str; 11] =
    ["transcript", "routing", "expert", "balance", "latents", "attention", "depth", "mtp", "time", "change", "compare"];

/// A place for a test's files.
fn place(name: &str) -> PathBuf {
    let dir = root().join(name);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A recording of two texts.
fn recording(dir: &Path) -> PathBuf {
    let file = dir.join("texts.rec");
    moewe![
        "run",
        demo(),
        "--prompt",
        "english=The king said to",
        "--prompt",
        "rust=fn main() {",
        "-n",
        "20",
        "--ignore-eos",
        "--record",
        file
    ]
    .ok();
    file
}

/// Width and height of a PNG.
fn size(path: &Path) -> (u32, u32) {
    let bytes = fs::read(path).unwrap();
    assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n"), "{}", path.display());
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    (word(16), word(20))
}

#[test]
fn a_recorded_text_is_the_same_text() {
    let file = place("same").join("king.rec");
    let args = ["-n", "24", "--temperature", "0.8", "--seed", "3", "--ignore-eos", "--json"];
    let plain = cli::Call::new([&["run".into(), demo().into(), "The king".into()][..], &args.map(Into::into)].concat());
    let recorded = cli::Call::new(
        [
            &["run".into(), demo().into(), "The king".into(), "--record".into(), file.clone().into()][..],
            &args.map(Into::into),
        ]
        .concat(),
    );
    assert_eq!(plain.json()["tokens"], recorded.json()["tokens"]);
    assert!(fs::metadata(&file).unwrap().len() > 10_000);
}

#[test]
fn every_view_and_its_parts_are_drawn_without_a_window() {
    let dir = place("pictures");
    let file = recording(&dir);
    let parts =
        ["routing:texts", "balance:placement", "latents:projection", "attention:heads", "time:run", "mtp:counts"];
    for view in VIEWS.iter().chain(&parts) {
        let picture = dir.join(format!("{view}.png"));
        moewe![
            "view",
            file,
            "--view",
            view,
            "--layer",
            "2",
            "--token",
            "12",
            "--expert",
            "5",
            "--size",
            "640x480",
            "--screenshot",
            picture
        ]
        .ok();
        assert_eq!(size(&picture), (640, 480), "{view}");
    }
    let window = dir.join("window.png");
    moewe!["view", file, "--theme", "light", "--text", "rust", "--screenshot", window].ok();
    assert_eq!(size(&window), (1280, 800));
    moewe!["view", file, "--screenshot", window].refused(1, &["window.png", "exists"]);
    moewe!["view", file, "--screenshot", window, "--overwrite"].ok();
}

#[test]
fn numbers_go_to_files() {
    let dir = place("numbers");
    let file = recording(&dir);
    let [csv, npz, chrome, routed, eplb] =
        ["r.csv", "r.npz", "trace.json", "routed.npz", "eplb.npz"].map(|name| dir.join(name));
    moewe![
        "view",
        file,
        "--view",
        "balance",
        "--csv",
        csv,
        "--npz",
        npz,
        "--chrome-trace",
        chrome,
        "--routed-experts",
        routed,
        "--eplb",
        eplb
    ]
    .ok();
    for file in [&npz, &routed, &eplb] {
        assert!(fs::read(file).unwrap().starts_with(b"PK"), "{}", file.display());
    }
    let chrome: Value = serde_json::from_str(&fs::read_to_string(chrome).unwrap()).unwrap();
    let events = chrome["traceEvents"].as_array().unwrap();
    assert!(events.iter().filter(|event| event["ph"] == "X").count() > 57, "a run has 57 dispatches");
    let written: Vec<String> =
        fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(written.iter().any(|name| name.rsplit('.').next() == Some("csv")), "{written:?}");
}

#[test]
fn times_are_recorded_without_any_tensor() {
    let dir = place("times");
    let [bundle, file, chrome] = ["timed.moewe", "timed.rec", "timed.json"].map(|name| dir.join(name));
    moewe!["compile", demo(), "-o", bundle, "--taps", "timing"].ok();
    moewe!["run", bundle, "The king", "-n", "4", "--ignore-eos", "--record", file, "--taps", "timing"].ok();
    moewe!["view", file, "--chrome-trace", chrome].ok();
    let chrome: Value = serde_json::from_str(&fs::read_to_string(chrome).unwrap()).unwrap();
    assert!(chrome["traceEvents"].as_array().unwrap().iter().any(|event| event["name"] == "head"), "{chrome}");
}

#[test]
fn recordings_go_on_and_compare() {
    let dir = place("going-on");
    let file = dir.join("king.rec");
    let model = demo();
    let run = |more: &[&str]| {
        let args = ["run", model.to_str().unwrap(), "The king said to", "-n", "12", "--ignore-eos", "--json"];
        let args = args.iter().chain(more).map(Into::into).collect();
        cli::Call::new(args).json()
    };
    let path = file.to_str().unwrap();
    let plain = run(&["--record", path]);
    let before = fs::metadata(&file).unwrap().len();
    // An expert that the text uses cannot be used any more.
    let changed = run(&[
        "--record",
        path,
        "--mute",
        "2:4",
        "--mute",
        "2:3",
        "--mute",
        "2:23",
        "--mute",
        "3:1",
        "--zero-head",
        "1:0",
    ]);
    assert_ne!(plain["tokens"], changed["tokens"]);
    assert!(fs::metadata(&file).unwrap().len() > before);
    let picture = dir.join("compare.png");
    moewe!["view", file, "--view", "compare", "--screenshot", picture].ok();
    // Two recordings stand side by side.
    let other = dir.join("other.rec");
    run(&["--record", other.to_str().unwrap(), "--force", "3:7"]);
    moewe!["view", file, "--against", other, "--view", "compare", "--screenshot", picture, "--overwrite"].ok();
    // Another model's texts do not.
    let tiny = dir.join("tiny.rec");
    moewe!["run", golden("v3-tiny"), "--tokens", "1,2,3", "-n", "4", "--ignore-eos", "--record", tiny].ok();
    moewe!["view", file, "--against", tiny, "--view", "compare", "--screenshot", picture, "--overwrite"]
        .refused(2, &["tiny.rec", "one shape"]);
    moewe!["run", golden("v3-tiny"), "--tokens", "1,2,3", "--record", file].refused(1, &["king.rec"]);
}

#[test]
fn models_are_viewed_without_a_window_too() {
    let picture = place("live").join("change.png");
    moewe![
        "view",
        demo(),
        "--prompt",
        "english=The king",
        "-n",
        "8",
        "--mute",
        "2:9",
        "--view",
        "change",
        "--token",
        "2",
        "--screenshot",
        picture
    ]
    .ok();
    assert_eq!(size(&picture), (1280, 800));
    moewe!["view", demo(), "--view", "routing", "--screenshot", picture].refused(2, &["--prompt"]);
}

#[test]
fn what_cannot_be_watched_or_changed_is_refused() {
    let dir = place("refused");
    let file = recording(&dir);
    let text = dir.join("notes.txt");
    fs::write(&text, "no recording\n").unwrap();
    moewe!["view", text].refused(1, &["notes.txt"]);
    moewe!["run", demo(), "x", "--record", text].refused(1, &["notes.txt"]);
    assert_eq!(fs::read_to_string(&text).unwrap(), "no recording\n");
    moewe!["view", dir.join("nothing")].refused(2, &["nothing"]);
    moewe!["view", file, "--view", "rooting", "--screenshot", dir.join("x.png")].refused(2, &["rooting", "routing"]);
    moewe!["view", file, "--view", "routing:rows", "--screenshot", dir.join("x.png")].refused(2, &["texts"]);
    moewe!["view", file, "--text", "nobody", "--screenshot", dir.join("x.png")].refused(2, &["nobody", "english"]);
    moewe!["view", file, "--token", "999", "--screenshot", dir.join("x.png")].refused(2, &["999"]);
    moewe!["view", file, "--layer", "4", "--screenshot", dir.join("x.png")].refused(2, &["--layer", "4"]);
    moewe!["view", file, "--prompt", "more"].refused(2, &["MODEL"]);
    moewe!["view", file, "--size", "9x9", "--screenshot", dir.join("x.png")].refused(2, &["9x9", "1280x800"]);
    assert!(!dir.join("x.png").exists());
    for (flag, place, words) in [
        ("--mute", "9:1", &["9:1", "1 to 3"][..]),
        ("--mute", "2:32", &["2:32", "31"]),
        ("--mute", "2", &["3:17"]),
        ("--force", "*:40", &["*:40"]),
        ("--scale", "2:3=x", &["3:17=0.5"]),
        ("--pin", "2:1+2", &["4"]),
        ("--zero-latent", "1:64", &["1:64", "63"]),
        ("--zero-head", "0:4", &["0:4", "3"]),
    ] {
        moewe!["run", demo(), "x", flag, place].refused(2, words);
    }
    moewe!["run", demo(), "x", "--taps", "rooting", "--record", dir.join("y")].refused(2, &["rooting", "routing"]);
    moewe!["run", demo(), "x", "--taps", "latents:9", "--record", dir.join("y")].refused(2, &["latents:9", "4 layers"]);
    assert!(!dir.join("y").exists());
    let bundle = dir.join("untapped.moewe");
    moewe!["compile", golden("v3-tiny"), "-o", bundle, "--target", "lavapipe", "--taps", "none"].ok();
    moewe!["run", bundle, "--tokens", "1,2", "-n", "2"].ok();
    moewe!["run", bundle, "--tokens", "1,2", "--mute", "1:1"].refused(2, &["--taps all"]);
}

#[test]
fn a_cut_recording_shows_what_is_left_and_says_so() {
    let dir = place("cut");
    let file = recording(&dir);
    let bytes = fs::read(&file).unwrap();
    for end in [0, 1, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&file, &bytes[..end]).unwrap();
        let picture = dir.join(format!("{end}.png"));
        let said = moewe!["view", file, "--screenshot", picture].run();
        assert!(said.stderr.contains("texts.rec"), "{end}: {said:?}");
        assert_eq!(said.code == Some(0), picture.exists(), "{end}: {said:?}");
    }
    assert!(dir.join(format!("{}.png", bytes.len() - 1)).exists(), "one cut chunk does not cost the rest");
}

#[test]
fn chats_are_recorded_turn_by_turn() {
    let dir = place("chat");
    let file = dir.join("chat.rec");
    moewe!["chat", demo(), "-n", "6", "--record", file].stdin("What is 2 + 2?\nAnd 3 + 3?\n").ok();
    let csv = dir.join("balance.npz");
    moewe!["view", file, "--view", "balance", "--text", "And 3 + 3?", "--npz", csv].ok();
}

// ---- the window

/// A display in memory, which ends with the test.
struct Display {
    server: Child,
    name: String,
}

impl Display {
    fn open() -> Self {
        let name = format!(":{}", 200 + std::process::id() % 700);
        let server = Command::new("Xvfb")
            .args([&name, "-screen", "0", "1024x768x24", "-nolisten", "tcp"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("this test needs Xvfb; `scripts/setup --tests` installs it: {error}"));
        let socket = PathBuf::from(format!("/tmp/.X11-unix/X{}", &name[1..]));
        let started = Instant::now();
        while !socket.exists() {
            assert!(started.elapsed() < Duration::from_secs(30), "Xvfb does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { server, name }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[test]
fn the_window_opens_runs_live_and_closes_on_ctrl_c() {
    let display = Display::open();
    let dir = place("window");
    let (model, file) = (demo(), recording(&dir));
    for args in [
        vec!["view", model.to_str().unwrap(), "--prompt", "The king said to", "--ignore-eos", "-n", "2000"],
        vec!["view", file.to_str().unwrap()],
    ] {
        let mut child = Command::new(MOEWE)
            .args(&args)
            .env("DISPLAY", &display.name)
            .env_remove("WAYLAND_DISPLAY")
            .env("XDG_DATA_HOME", &dir)
            .env("MOEWE_CACHE", root().join("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Long enough to compile, to open and to draw while text is written.
        std::thread::sleep(Duration::from_secs(8));
        let is_open = child.try_wait().unwrap().is_none();
        cli::interrupt(&child);
        let said = cli::finish(child);
        assert!(is_open, "the window closed by itself: {said:?}");
        assert_eq!(said.code, Some(130), "{said:?}");
        assert!(!said.stderr.contains("panicked"), "{said:?}");
    }
}

#[test]
fn without_a_display_the_user_is_told_what_to_do() {
    let dir = place("no-display");
    let file = recording(&dir);
    let call = moewe!["view", file].env("DISPLAY", "").env("WAYLAND_DISPLAY", "").env("WAYLAND_SOCKET", "");
    call.refused(1, &["--screenshot", "Xvfb"]);
}

#[test]
fn json_says_what_was_changed() {
    let said = moewe!["run", demo(), "The king", "-n", "2", "--json", "--mute", "2:9", "--scale", "1:3=0.5"].json();
    assert_eq!(said["edits"], json!(["mute 2:9", "scale 1:3=0.5"]));
}
