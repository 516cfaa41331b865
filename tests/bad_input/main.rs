//! Bad input of every kind: each gives exit code 2 (called wrongly) or 1 (failed), one sentence that names the file and
//! the tensor or field, no panic, and leaves nothing behind. The program itself is run, except where thousands of inputs
//! are tried.

#[path = "../common/cli.rs"]
mod cli;

mod bundles;
mod config;
mod devices;
mod fuzz;
mod places;
mod prompts;
mod readers;
mod safetensors;
mod text_files;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cli::{Call, Parts, copy, demo, edit_json, golden, listing, moewe, pipe, reseal, root, tiny_bundle};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The smallest golden checkpoint.
const SMALL: &str = "v3-mtp-accept-tiny";

/// A directory with a checkpoint to damage.
struct Scene {
    temp: TempDir,
    checkpoint: PathBuf,
}

impl Scene {
    fn new(name: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let checkpoint = temp.path().join("checkpoint");
        copy(&golden(name), &checkpoint);
        Self { temp, checkpoint }
    }

    /// A path in the directory.
    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn config(&self, edit: impl FnOnce(&mut Value)) {
        edit_json(&self.checkpoint.join("config.json"), edit);
    }

    fn weights(&self) -> PathBuf {
        self.checkpoint.join("model.safetensors")
    }

    fn edit_weights(&self, edit: impl FnOnce(&mut Parts)) {
        let mut parts = Parts::read(&self.weights());
        edit(&mut parts);
        parts.write(&self.weights());
    }

    fn compile(&self) -> Call {
        moewe!["compile", &self.checkpoint, "-o", self.path("out"), "--target", "lavapipe"]
    }

    fn run(&self) -> Call {
        moewe!["run", &self.checkpoint, "--tokens", "1,2,3", "-n", "2"].env("MOEWE_CACHE", self.path("cache"))
    }

    /// `compile` refuses the checkpoint with exit code 1 and leaves nothing behind.
    fn compile_refuses(&self, words: &[&str]) {
        let before = listing(self.temp.path());
        self.compile().refused(1, words);
        assert_eq!(before, listing(self.temp.path()), "something was left behind");
    }

    /// So do `compile` and `run`.
    fn refuses(&self, words: &[&str]) {
        self.compile_refuses(words);
        self.run().refused(1, words);
        let left: Vec<_> =
            listing(&self.path("cache")).into_iter().filter(|(path, _)| path.extension().is_none()).collect();
        assert!(left.iter().all(|(path, _)| path.ends_with("bundles")), "left in the cache: {left:?}");
    }
}

/// Says what could not be tested on this machine, past the test harness, which shows no output of tests that pass.
fn not_tested(what: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "NOT TESTED HERE: {what}");
}
