//! Engines on golden models, and what requests told.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::Path;
use std::sync::Arc;

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::compile;
use moewe_plan::{Bundle, Precision, ProgramKind, Sampling, TapChoice};
use moewe_runtime::engine::{Engine, EngineOptions, Event, Finished, Mtp, Request, Stream, Tokens};
use moewe_runtime::{Error, Model, Session, SessionOptions, Watch};

use crate::common::{gpu, options, profile};

/// A golden model on the device.
pub fn load(name: &str) -> Arc<Model> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("bundle");
    compile(&Checkpoint::open(&dir).unwrap(), &options(profile("lavapipe")), &out, &|_, _| ()).unwrap();
    Model::load(&gpu(), &Bundle::open(&out).unwrap(), &|_| ()).unwrap()
}

/// A session that drafts, and can be watched if it has bytes for frames.
pub fn session(model: &Arc<Model>, max_sequences: u32, pages: u32, ring_bytes: Option<u64>) -> Session {
    let drafts = (1..=model.plan().model.mtp_modules).map(|module| ProgramKind::Draft { module });
    let mut kinds: Vec<ProgramKind> = [ProgramKind::Forward].into_iter().chain(drafts).collect();
    kinds.extend(ring_bytes.map(|_| ProgramKind::Watch));
    let watch = ring_bytes.map(|ring_bytes| Watch { taps: TapChoice::none(), ring_bytes });
    let precision = Precision::Exact;
    let options =
        SessionOptions { precision, kinds, max_sequences, pages: Some(pages), watch, ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

/// An engine with room for frames.
pub fn engine(model: &Arc<Model>, max_sequences: u32, pages: u32, options: &EngineOptions) -> Engine {
    Engine::new(session(model, max_sequences, pages, Some(8 << 20)), options).unwrap()
}

pub fn mtp(mtp: Mtp) -> EngineOptions {
    EngineOptions { mtp, ..EngineOptions::default() }
}

/// A prompt of its own for each seed; every third is greedy.
pub fn request(seed: u32, length: u32, max_new_tokens: usize) -> Request {
    let id = |i: u32| (i * 31 + seed * 7 + i * i) % 77;
    let sampling = match seed % 3 {
        0 => Sampling::default(),
        1 => Sampling { temperature: 0.9, seed_low: seed, ..Sampling::default() },
        _ => Sampling { temperature: 1.1, top_p: 0.9, repetition_penalty: 1.2, seed_low: seed, ..Sampling::default() },
    };
    Request { prompt: (0..length).map(id).collect(), max_new_tokens, sampling, ignore_eos: true, ..Request::default() }
}

/// All that a stream told, put together.
pub fn all(mut stream: Stream) -> (Tokens, Result<Finished, Arc<Error>>) {
    let mut told = Tokens::default();
    let mut began = false;
    let end = loop {
        match stream.recv().expect("an end") {
            Event::Began { .. } => {
                assert!(!began && told.ids.is_empty());
                began = true;
            }
            Event::Tokens(tokens) => {
                assert!(began && !tokens.ids.is_empty());
                told.ids.extend(tokens.ids);
                told.logprobs.extend(tokens.logprobs);
                told.experts.extend(tokens.experts);
                told.prompt_experts.extend(tokens.prompt_experts);
            }
            Event::Finished(finished) => break Ok(*finished),
            Event::Failed(error) => break Err(error),
        }
    };
    assert!(stream.recv().is_none(), "nothing follows the end");
    (told, end)
}

/// Runs these one after the other in an engine of their own, without drafts and kept latents.
pub fn alone(model: &Arc<Model>, requests: impl IntoIterator<Item = Request>) -> Vec<Tokens> {
    let options = EngineOptions { mtp: Mtp::Off, prefix_cache: false, ..EngineOptions::default() };
    let engine = engine(model, 1, 16, &options);
    let run = |request| {
        let (tokens, end) = all(engine.submit(request).unwrap());
        end.unwrap();
        tokens
    };
    requests.into_iter().map(run).collect()
}

pub fn all_pages_are_free(engine: &Engine) {
    engine.clear_cache();
    let stats = engine.stats();
    assert_eq!((stats.free_pages, stats.waiting, stats.running, stats.host_bytes), (stats.pages, 0, 0, 0));
}
