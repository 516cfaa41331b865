//! Recordings to try things on.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use moewe_plan::{FrameTensor, Numbers};
use moewe_viewer::recording::{Recorder, Recording};
use moewe_viewer::source::{Event, Source};
use moewe_viewer::store::Store;
use moewe_viewer::subject::Subject;
use moewe_viewer::synthetic::Shape;
use serde_json::Value;

/// A model and three texts so small that a recording of them has a few thousand bytes.
pub fn tiny() -> Shape {
    Shape {
        layers: 2,
        experts: (4, 2),
        groups: (2, 1),
        heads: 1,
        latent: (4, 2),
        hidden: 2,
        texts: [("a", 3), ("b", 2), ("c", 4)].map(|(name, tokens)| (name.to_owned(), tokens)).to_vec(),
        taps: "routing,latents:1,timing".parse().unwrap(),
    }
}

pub fn record(path: &Path, subject: &Subject, events: &[Event]) {
    let mut recorder = Recorder::create(path, subject).unwrap();
    for event in events {
        recorder.push(event).unwrap();
    }
    recorder.finish().unwrap();
}

/// All that a recording tells.
pub fn drain(recording: &mut Recording) -> Vec<Event> {
    let started = Instant::now();
    let mut events = Vec::new();
    while recording.status().busy {
        assert!(started.elapsed() < Duration::from_mins(1), "reading takes a minute");
        let more = recording.poll();
        if more.is_empty() {
            std::thread::yield_now();
        }
        events.extend(more);
    }
    events
}

pub fn open(path: &Path) -> (Recording, Vec<String>) {
    Recording::open(path).unwrap()
}

pub fn read(path: &Path) -> Vec<Event> {
    let (mut recording, warnings) = open(path);
    assert_eq!(warnings, Vec::<String>::new());
    drain(&mut recording)
}

pub fn store(subject: &Subject, events: &[Event]) -> Store {
    let mut store = Store::new(subject.model.experts, 256 << 20);
    for event in events {
        store.apply(event.clone());
    }
    store
}

/// Events as text: bits instead of floats, so that NaN equals itself; without tensors that have no rows, which no
/// recording holds; tensors by name.
pub fn comparable(events: &[Event]) -> Vec<String> {
    let tensor = |tensor: &FrameTensor| {
        let numbers = match &tensor.data {
            Numbers::F32(numbers) => (true, numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>()),
            Numbers::U32(numbers) => (false, numbers.clone()),
        };
        (Arc::clone(&tensor.name), tensor.group, tensor.layer, tensor.columns, numbers)
    };
    let text = |event: &Event| {
        let Event::Frame(frame) = event else { return format!("{event:?}") };
        let mut tensors: Vec<_> = frame.tensors.iter().map(tensor).collect();
        tensors.retain(|_| !frame.tokens.is_empty());
        tensors.sort_by(|one, other| one.0.cmp(&other.0));
        format!("{} {:?} {tensors:?} {:?}", frame.number, frame.tokens, frame.times)
    };
    events.iter().map(text).collect()
}

/// Fails unless all of `part` stands in `whole` with the same numbers; rows and tokens may be missing.
pub fn assert_within(part: &Store, whole: &Store) {
    for text in part.sequences() {
        let of = whole.sequence(text.info.number).expect("a text that there never was");
        assert_eq!(text.info, of.info);
        assert!(of.tokens.starts_with(&text.tokens), "tokens of text {}", text.info.number);
        for key in text.keys() {
            let (rows, expected) = (text.column(key).unwrap(), of.column(key).expect("a tensor that there never was"));
            for position in 0..of.tokens.len() + 200 {
                let bits = |row: Option<&[f32]>| row.map(|row| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                if rows.has(position) {
                    assert_eq!(bits(rows.floats(position)), bits(expected.floats(position)), "{key:?} {position}");
                    assert_eq!(rows.ints(position), expected.ints(position), "{key:?} {position}");
                }
            }
        }
    }
    assert!(part.runs().iter().all(|run| whole.runs().contains(run)));
}

pub fn assert_same(one: &Store, other: &Store) {
    assert_within(one, other);
    assert_within(other, one);
    assert_eq!((one.runs(), one.lost(), one.memory()), (other.runs(), other.lost(), other.memory()));
    let numbers = |store: &Store| store.sequences().iter().map(|s| (s.info.number, s.running)).collect::<Vec<_>>();
    assert_eq!(numbers(one), numbers(other));
    (0..64).for_each(|layer| assert_eq!(one.load(layer), other.load(layer)));
}

/// A line with the right hash, and its chunk.
pub fn sealed(line: &Value, bytes: &[u8]) -> Vec<u8> {
    let line = line.to_string();
    let body = line.strip_suffix('}').unwrap();
    let hash = blake3::Hasher::new().update(body.as_bytes()).update(bytes).finalize();
    [format!("{body},\"blake3\":\"{}\"}}\n", hash.to_hex()).as_bytes(), bytes].concat()
}

/// Line and bytes of each chunk, by the letter of `docs/recording.md`.
pub fn chunks(path: &Path) -> Vec<(Value, Vec<u8>)> {
    let mut file = BufReader::new(std::fs::File::open(path).unwrap());
    let mut line = String::new();
    file.read_line(&mut line).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["format"], "moewe recording");
    let mut chunks = Vec::new();
    loop {
        line.clear();
        if file.read_line(&mut line).unwrap() == 0 {
            return chunks;
        }
        let index: Value = serde_json::from_str(&line).unwrap();
        let mut bytes = vec![0; index["bytes"].as_u64().unwrap() as usize];
        file.read_exact(&mut bytes).unwrap();
        let hash = blake3::Hasher::new().update(&line.as_bytes()[..line.len() - 78]).update(&bytes).finalize();
        assert_eq!(index["blake3"], hash.to_hex().as_str());
        chunks.push((index, bytes));
    }
}

/// The first line of a recording.
pub fn head(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    bytes[..end].to_vec()
}

pub struct Scene {
    _directory: tempfile::TempDir,
    pub path: PathBuf,
    pub subject: Subject,
    pub events: Vec<Event>,
}

/// A recording of a shape.
pub fn scene(shape: &Shape) -> Scene {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.moewe");
    let (subject, events) = (shape.subject(), shape.events().collect::<Vec<_>>());
    record(&path, &subject, &events);
    Scene { _directory: directory, path, subject, events }
}
