//! The engine: what a request is given does not depend on who shares its batches, nothing leaks, and what was computed
//! before is not computed again.

#[path = "common/golden.rs"]
mod common;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use common::{bundle, gpu, options, profile};
use moewe_plan::{Precision, ProgramKind, Sampling};
use moewe_runtime::engine::{Engine, EngineOptions, Finished, Mtp, Request};
use moewe_runtime::{Model, Session, SessionOptions, StopReason};

/// The demo model, loaded once for all tests.
fn demo() -> Arc<Model> {
    static DEMO: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || {
        let temp = tempfile::tempdir().unwrap();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
        let bundle = bundle(&dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
        Model::load(&gpu(), &bundle, &|_| ()).unwrap()
    };
    DEMO.get_or_init(load).clone()
}

fn session(model: &Arc<Model>, max_sequences: u32, pages: u32) -> Session {
    let drafts = (1..=model.plan().model.mtp_modules).map(|module| ProgramKind::Draft { module });
    let kinds = [ProgramKind::Forward].into_iter().chain(drafts).collect();
    let precision = Precision::Exact;
    let options = SessionOptions { precision, kinds, max_sequences, pages: Some(pages), ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

fn engine(max_sequences: u32, pages: u32, options: &EngineOptions) -> Engine {
    Engine::new(session(&demo(), max_sequences, pages), options).unwrap()
}

/// Numbers that look random.
fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    }
}

fn requests(count: u64) -> Vec<Request> {
    let vocab = u64::from(demo().plan().model.vocab_size);
    (0..count)
        .map(|number| {
            let mut random = random(number + 1);
            let length = [1, 2, 5, 9, 17, 30, 62][random(7) as usize] + random(5);
            let sampling = match random(3) {
                0 => Sampling::default(),
                1 => Sampling { temperature: 0.8, seed_low: number as u32, ..Sampling::default() },
                _ => Sampling { temperature: 1.0, top_p: 0.9, repetition_penalty: 1.1, ..Sampling::default() },
            };
            Request {
                prompt: (0..length).map(|_| random(vocab) as u32).collect(),
                max_new_tokens: 1 + random(24) as usize,
                sampling,
                ignore_eos: true,
                priority: random(3) as i32,
                ..Request::default()
            }
        })
        .collect()
}

#[test]
fn sixty_four_sequences_are_given_what_each_is_given_alone() {
    let requests = requests(64);
    let alone = EngineOptions { mtp: Mtp::Off, prefix_cache: false, ..EngineOptions::default() };
    let single = engine(1, 16, &alone);
    let expected: Vec<(Vec<u32>, Finished)> =
        requests.iter().map(|request| single.submit(request.unconstrained()).unwrap().finish().unwrap()).collect();
    drop(single);
    for (mtp, pages) in [(Mtp::Off, 400), (Mtp::Auto, 400), (Mtp::Fixed(2), 60)] {
        let model = demo();
        let before = model.gpu().held_bytes();
        let engine = engine(24, pages, &EngineOptions { mtp, ..EngineOptions::default() });
        let holding = model.gpu().held_bytes();
        let mut streams = Vec::new();
        for (number, request) in requests.iter().enumerate() {
            streams.push(engine.submit(request.unconstrained()).unwrap());
            if number % 9 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        for (number, (stream, (tokens, _))) in streams.into_iter().zip(&expected).enumerate() {
            let (found, finished) = stream.finish().unwrap();
            assert_eq!(&found, tokens, "request {number} with {mtp:?} and {pages} pages");
            assert_eq!(finished.stop_reason, StopReason::Length);
        }
        let stats = engine.stats();
        println!("{mtp:?} {pages} pages: {stats:?}");
        assert_eq!((stats.waiting, stats.running, stats.requests, stats.host_bytes), (0, 0, 64, 0));
        engine.clear_cache();
        let stats = engine.stats();
        assert_eq!((stats.free_pages, stats.pages), (pages as usize, pages as usize));
        let session = engine.stop().unwrap();
        assert_eq!(session.pages(), (pages as usize, pages as usize));
        assert_eq!(model.gpu().held_bytes(), holding);
        drop(session);
        assert_eq!(model.gpu().held_bytes(), before);
    }
}

#[test]
fn a_shared_beginning_is_computed_once() {
    let vocab = u64::from(demo().plan().model.vocab_size);
    let mut random = random(99);
    let shared: Vec<u32> = (0..1000).map(|_| random(vocab) as u32).collect();
    let with = |tail: &[u32]| Request {
        prompt: [&shared, tail].concat(),
        max_new_tokens: 12,
        ignore_eos: true,
        ..Request::default()
    };
    let plain = EngineOptions { mtp: Mtp::Off, prefix_cache: false, ..EngineOptions::default() };
    let expected = engine(1, 32, &plain).submit(with(&[1, 2, 3])).unwrap().finish().unwrap();
    let engine = engine(2, 64, &EngineOptions { mtp: Mtp::Fixed(1), ..EngineOptions::default() });
    let (_, first) = engine.submit(with(&[7, 8])).unwrap().finish().unwrap();
    let (tokens, second) = engine.submit(with(&[1, 2, 3])).unwrap().finish().unwrap();
    assert_eq!(tokens, expected.0);
    assert_eq!((first.cached_tokens, second.cached_tokens), (0, 1000));
    println!("first {:?}, second {:?}", first.prefill, second.prefill);
    assert!(second.prefill * 8 < first.prefill, "{:?} against {:?}", second.prefill, first.prefill);
    let stats = engine.stats();
    assert_eq!((stats.hit_tokens, stats.miss_tokens), (1000, 1002 + 3));
}
