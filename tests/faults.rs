//! What goes wrong concerns nobody but the one it happens to: the request ends with an error that says why, others are
//! given what they are given alone, and nothing leaks.

#[path = "common/golden.rs"]
mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{gpu, options, profile};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::compile;
use moewe_plan::{Bundle, Precision, ProgramKind};
use moewe_runtime::engine::{Engine, EngineOptions, Event, Mtp, Request};
use moewe_runtime::{Error, Gpu, Model, Session, SessionOptions, StopReason};

/// A token whose embedding is NaN in [`poisoned`].
const POISON: u32 = 77;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(gpu: &Arc<Gpu>, dir: &Path) -> Arc<Model> {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("bundle");
    compile(&Checkpoint::open(dir).unwrap(), &options(profile("lavapipe")), &out, &|_, _| ()).unwrap();
    Model::load(gpu, &Bundle::open(&out).unwrap(), &|_| ()).unwrap()
}

/// The golden v3-tiny with a token that is not a number.
fn poisoned(gpu: &Arc<Gpu>) -> Arc<Model> {
    let temp = tempfile::tempdir().unwrap();
    let from = golden("v3-tiny");
    std::fs::copy(from.join("config.json"), temp.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let embedding = &header["model.embed_tokens.weight"];
    assert_eq!(embedding["dtype"], "F32");
    let width = embedding["shape"][1].as_u64().unwrap() as usize * 4;
    let start = 8 + length + embedding["data_offsets"][0].as_u64().unwrap() as usize + POISON as usize * width;
    for number in bytes[start..start + width].chunks_exact_mut(4) {
        number.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    std::fs::write(temp.path().join("model.safetensors"), bytes).unwrap();
    load(gpu, temp.path())
}

fn engine(model: &Arc<Model>, max_sequences: u32, pages: u32, options: &EngineOptions) -> Engine {
    let kinds = vec![ProgramKind::Forward, ProgramKind::Draft { module: 1 }];
    let precision = Precision::Exact;
    let session = SessionOptions { precision, kinds, max_sequences, pages: Some(pages), ..SessionOptions::default() };
    Engine::new(Session::new(model.clone(), session).unwrap(), options).unwrap()
}

fn request(seed: u32, length: u32, max_new_tokens: usize) -> Request {
    // Never the poisonous token.
    let id = |i: u32| (i * 31 + seed * 7 + i * i) % POISON;
    Request { prompt: (0..length).map(id).collect(), max_new_tokens, ignore_eos: true, ..Request::default() }
}

/// What each request is given alone, in an engine of its own kind.
fn alone(model: &Arc<Model>, requests: &[Request]) -> Vec<Vec<u32>> {
    let options = EngineOptions { mtp: Mtp::Off, prefix_cache: false, ..EngineOptions::default() };
    let engine = engine(model, 1, 16, &options);
    requests.iter().map(|request| engine.submit(request.clone()).unwrap().finish().unwrap().0).collect()
}

fn all_pages_are_free(engine: &Engine) {
    engine.clear_cache();
    let stats = engine.stats();
    assert_eq!((stats.free_pages, stats.waiting, stats.running, stats.host_bytes), (stats.pages, 0, 0, 0));
}

#[test]
fn a_poisoned_sequence_fails_alone_and_leaves_nothing_behind() {
    let model = poisoned(&gpu());
    let requests: Vec<Request> = (0..6).map(|seed| request(seed, 20 + seed * 30, 20)).collect();
    let expected = alone(&model, &requests);
    for mtp in [Mtp::Off, Mtp::Fixed(2)] {
        let engine = engine(&model, 8, 24, &EngineOptions { mtp, ..EngineOptions::default() });
        // Twice, so that pages of the poisoned ones come to others.
        for _ in 0..2 {
            let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
            let poisonous: Vec<_> = (0..4)
                .map(|seed| {
                    let mut request = request(seed, 70 + seed, 20);
                    // One of them begins like a sound one, for a page.
                    let at = if seed == 0 { 69 } else { request.prompt.len() / 2 };
                    request.prompt[at] = POISON;
                    engine.submit(request).unwrap()
                })
                .collect();
            for stream in poisonous {
                let error = stream.finish().unwrap_err();
                assert!(matches!(*error, Error::Poisoned), "{error}");
            }
            for (stream, expected) in streams.into_iter().zip(&expected) {
                assert_eq!(&stream.finish().unwrap().0, expected, "{mtp:?}");
            }
        }
        assert_eq!(engine.stats().failed, 8);
        all_pages_are_free(&engine);
    }
}

#[test]
fn a_sequence_may_be_cancelled_at_any_moment() {
    let model = load(&gpu(), &golden("v3-tiny"));
    let requests: Vec<Request> = (0..4).map(|seed| request(seed, 10 + seed * 40, 24)).collect();
    let expected = alone(&model, &requests);
    let engine = engine(&model, 6, 30, &EngineOptions { mtp: Mtp::Fixed(1), ..EngineOptions::default() });
    for round in 0..12 {
        let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        let mut doomed: Vec<_> = (0..5).map(|seed| engine.submit(request(seed + 9, 150, 100)).unwrap()).collect();
        let dropped = doomed.split_off(3);
        std::thread::sleep(Duration::from_millis(round * 7));
        for stream in &doomed {
            engine.cancel(stream.id());
        }
        drop(dropped);
        for stream in doomed {
            let (tokens, finished) = stream.finish().unwrap();
            assert!(tokens.len() <= 100 && finished.stop_reason == StopReason::Stopped || tokens.len() == 100);
        }
        for (stream, expected) in streams.into_iter().zip(&expected) {
            assert_eq!(&stream.finish().unwrap().0, expected, "round {round}");
        }
    }
    // Those that were dropped are gone, too, as soon as the engine has heard of it.
    while engine.stats().requests < 12 * 9 {
        std::thread::sleep(Duration::from_millis(5));
    }
    all_pages_are_free(&engine);
}

#[test]
fn what_does_not_fit_the_pages_ends_alone() {
    let model = load(&gpu(), &golden("v3-tiny"));
    let requests: Vec<Request> = (0..5).map(|seed| request(seed, 30, 60)).collect();
    let expected = alone(&model, &requests);
    // Three pages hold 192 tokens.
    let engine = engine(&model, 4, 3, &EngineOptions { mtp: Mtp::Fixed(1), ..EngineOptions::default() });
    let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    let too_long = engine.submit(request(7, 193, 4)).unwrap();
    let grows_too_long = engine.submit(request(8, 185, 40)).unwrap();
    let error = too_long.finish().unwrap_err();
    assert!(matches!(*error, Error::OutOfPages { needed: 4, total: 3, .. }), "{error}");
    let (tokens, finished) = grows_too_long.finish().unwrap();
    assert_eq!((tokens.len(), finished.stop_reason), (8, StopReason::Context));
    for (stream, expected) in streams.into_iter().zip(&expected) {
        assert_eq!(&stream.finish().unwrap().0, expected);
    }
    all_pages_are_free(&engine);
}

#[test]
fn texts_have_a_bound_in_host_memory() {
    let model = load(&gpu(), &golden("v3-tiny"));
    let engine = engine(&model, 1, 16, &EngineOptions { host_bytes: 6_000, ..EngineOptions::default() });
    let first = engine.submit(request(1, 100, 100)).unwrap();
    let second = engine.submit(request(2, 100, 100)).unwrap();
    let error = engine.submit(request(3, 100, 100)).unwrap_err();
    assert!(matches!(error, Error::QueueFull { limit: 6_000, .. }), "{error}");
    drop(second);
    assert_eq!(first.finish().unwrap().0.len(), 100);
    let third = engine.submit(request(3, 100, 2)).unwrap();
    assert_eq!(third.finish().unwrap().0.len(), 2);
    // No text is longer than the context, whatever is asked for.
    let (tokens, finished) =
        engine.submit(Request { max_new_tokens: usize::MAX, ..request(1, 1, 1) }).unwrap().finish().unwrap();
    assert_eq!((tokens.len(), finished.stop_reason), (255, StopReason::Context));
    for wrong in [vec![], vec![1 << 20]] {
        assert!(engine.submit(Request { prompt: wrong, ..Request::default() }).is_err());
    }
}

#[test]
fn a_lost_device_is_told_to_everybody() {
    let gpu = gpu();
    let model = load(&gpu, &golden("v3-tiny"));
    let engine = engine(&model, 2, 32, &EngineOptions::default());
    let mut streams: Vec<_> = (0..6).map(|seed| engine.submit(request(seed, 40, 200)).unwrap()).collect();
    assert!(matches!(streams[0].recv(), Some(Event::Tokens(_))));
    gpu.handles().device.destroy();
    for stream in streams {
        let error = stream.finish().unwrap_err();
        assert!(matches!(*error, Error::DeviceLost { .. }), "{error}");
    }
    // Nothing hangs afterwards, either.
    let error = engine.submit(request(1, 4, 4)).unwrap().finish().unwrap_err();
    assert!(matches!(*error, Error::DeviceLost { .. }), "{error}");
    assert_eq!(engine.stats().failed, 7);
}

#[test]
fn damaged_and_deleted_cache_files_cost_time_alone() {
    let model = load(&gpu(), &golden("v3-tiny"));
    let temp = tempfile::tempdir().unwrap();
    let requests: Vec<Request> = (0..3).map(|seed| request(seed, 200, 6)).collect();
    let expected = alone(&model, &requests);
    let run = |cached: usize, what: &str| {
        let cache_dir = Some((temp.path().join("cache"), 1 << 30));
        let engine = engine(&model, 2, 32, &EngineOptions { cache_dir, ..EngineOptions::default() });
        for (request, expected) in requests.iter().zip(&expected) {
            let (tokens, finished) = engine.submit(request.clone()).unwrap().finish().unwrap();
            assert_eq!(&tokens, expected, "{what}");
            assert_eq!(finished.cached_tokens, cached, "{what}");
        }
        engine.stop().unwrap();
    };
    run(0, "empty");
    run(192, "full");
    let files = || {
        let mut files = Vec::new();
        let mut dirs = vec![temp.path().join("cache")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { dirs.push(path) } else { files.push(path) }
            }
        }
        files
    };
    assert_eq!(files().iter().filter(|path| path.extension().is_some_and(|e| e == "page")).count(), 9);
    for path in files() {
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(byte) = bytes.last_mut() {
            *byte ^= 1;
        }
        std::fs::write(&path, bytes).unwrap();
    }
    run(0, "damaged");
    // Each file is found out, and written again, as soon as all before it are right.
    run(64, "the first ones were written again");
    run(128, "the second ones were written again");
    run(192, "all were written again");
    for path in files() {
        std::fs::remove_file(path).unwrap();
    }
    run(0, "deleted");
}
