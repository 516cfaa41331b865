//! The prefix cache on disk while its writer is killed, and on a disk that is full: texts are right all the same.

#[path = "common/cli.rs"]
mod cli;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cli::{Call, Said, listing, moewe, root, tiny_bundle};
use serde_json::{Value, json};

const ROUNDS: u32 = 50;
/// Rounds from one complete run to the next.
const BETWEEN: u32 = 5;

/// A file of requests, of 64 to 200 tokens, all different: what they leave is some 12 pages.
struct Scene {
    dir: PathBuf,
}

impl Scene {
    fn new(name: &str, requests: u32) -> Self {
        let dir = root().join(name);
        fs::create_dir_all(&dir).unwrap();
        let lines: Vec<String> = (0..requests)
            .map(|seed| {
                let tokens: Vec<u32> = (0..64 + seed * 53 % 137).map(|i| (i * 31 + seed * 7 + i * i) % 300).collect();
                json!({ "id": seed, "tokens": tokens, "max_new_tokens": 4, "ignore_eos": true }).to_string()
            })
            .collect();
        fs::write(dir.join("requests.jsonl"), lines.join("\n")).unwrap();
        Self { dir }
    }

    fn cache(&self) -> PathBuf {
        self.dir.join("pages")
    }

    /// A run of all requests, with the prefix cache on disk or without one.
    fn call(&self, cached: bool) -> Call {
        let out = self.dir.join("out.jsonl");
        let _ = fs::remove_file(&out);
        let batch = self.dir.join("requests.jsonl");
        let model = tiny_bundle();
        if cached {
            moewe!["run", model, "--batch", batch, "--out", out, "--mtp", "off", "--json", "--cache-dir", self.cache()]
        } else {
            moewe!["run", model, "--batch", batch, "--out", out, "--mtp", "off", "--json", "--no-prefix-cache"]
        }
    }

    /// The texts of a complete run, by request.
    fn texts(&self) -> BTreeMap<String, Value> {
        let text = fs::read_to_string(self.dir.join("out.jsonl")).unwrap();
        let results = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        results.map(|result| (result["id"].to_string(), result["tokens"].clone())).collect()
    }

    /// Files of pages, and files that were being written.
    fn files(&self) -> (usize, usize) {
        let listing = listing(&self.cache());
        let count = |end: &str| listing.iter().filter(|(path, _)| path.to_string_lossy().ends_with(end)).count();
        (count(".page"), count(".tmp"))
    }
}

/// Numbers from 0 to 1 that look random.
fn random() -> impl FnMut() -> f64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[test]
fn killed_fifty_times_while_it_writes() {
    let scene = Scene::new("killed", 8);
    scene.call(false).ok();
    let expected = scene.texts();
    assert_eq!(expected.len(), 8);
    let begun = Instant::now();
    scene.call(true).ok();
    let whole = begun.elapsed();
    assert_eq!(scene.texts(), expected);
    let (all, left) = scene.files();
    assert!(all >= 10 && left == 0, "{all} pages, {left} temporary files");
    let mut random = random();
    // Killed while a file was half written; with some pages written, but not all; those of them that it wrote itself.
    let (mut torn, mut between, mut fresh) = (0, 0, 0);
    for round in 1..=ROUNDS {
        if round % BETWEEN == 1 {
            fs::remove_dir_all(scene.cache()).unwrap();
        }
        let (before, _) = scene.files();
        let mut child = scene.call(true).spawn();
        // Every other time not while the model is loaded, but later.
        let part = if round % 2 == 0 { random() } else { 0.4 + 0.6 * random() };
        std::thread::sleep(Duration::from_secs_f64(whole.as_secs_f64() * part));
        child.kill().unwrap();
        child.wait().unwrap();
        let (pages, temporary) = scene.files();
        torn += u32::from(temporary > 0);
        between += u32::from((1..all).contains(&pages));
        fresh += u32::from(pages > before);
        if round % BETWEEN == 0 {
            let said = scene.call(true).ok();
            assert_eq!(said.stderr, "", "round {round}");
            assert_eq!(scene.texts(), expected, "round {round}");
            assert_eq!(scene.files(), (all, 0), "round {round}");
        }
    }
    println!("{whole:?} a run; of {ROUNDS} kills {torn} in a file, {between} between files, {fresh} behind new ones");
    assert!(torn + between > 0 && fresh > 0, "no kill hit the time of writing");
}

/// Warnings on standard error.
fn warnings(said: &Said) -> Vec<&str> {
    said.stderr.lines().filter(|line| line.starts_with("moewe: warning: ")).collect()
}

#[test]
fn a_full_disk_costs_a_warning() {
    let scene = Scene::new("full", 6);
    scene.call(false).ok();
    let expected = scene.texts();
    // No file of more than so many blocks of 512 bytes: results fit, pages do not.
    let said = scene.call(true).through("trap '' XFSZ; ulimit -f 24; exec \"$@\"").ok();
    assert_eq!(scene.texts(), expected);
    let told = warnings(&said);
    assert!(matches!(told[..], [line] if line.contains("cannot write to the prefix cache")), "{said:?}");
    assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    let report: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!((&report["done"], &report["failed"]), (&json!(6), &json!(0)), "{report}");
    assert_eq!(scene.files(), (0, 0));
    // With room, it begins to write.
    assert_eq!(scene.call(true).ok().stderr, "");
    assert!(scene.files().0 > 5 && Path::new(&scene.cache()).is_dir());
}
