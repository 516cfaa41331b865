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

/// A token whose embedding is NaN.
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

/// A golden checkpoint with NaN in the rows (counted from the first number of each tensor) that are chosen.
fn with_nan(gpu: &Arc<Gpu>, name: &str, rows: impl Fn(&str) -> Option<std::ops::Range<usize>>) -> Arc<Model> {
    let temp = tempfile::tempdir().unwrap();
    let from = golden(name);
    std::fs::copy(from.join("config.json"), temp.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    for (name, tensor) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let Some(rows) = rows(name) else { continue };
        assert_eq!(tensor["dtype"], "F32");
        let width = tensor["shape"][1].as_u64().unwrap_or(1) as usize * 4;
        let start = 8 + length + tensor["data_offsets"][0].as_u64().unwrap() as usize;
        for number in bytes[start + rows.start * width..start + rows.end * width].chunks_exact_mut(4) {
            number.copy_from_slice(&f32::NAN.to_le_bytes());
        }
    }
    std::fs::write(temp.path().join("model.safetensors"), bytes).unwrap();
    load(gpu, temp.path())
}

/// A golden checkpoint with a token that is not a number.
fn poisoned(gpu: &Arc<Gpu>, name: &str, token: u32) -> Arc<Model> {
    let row = token as usize..token as usize + 1;
    with_nan(gpu, name, |name| (name == "model.embed_tokens.weight").then(|| row.clone()))
}

fn session(model: &Arc<Model>, precision: Precision, max_sequences: u32, pages: u32) -> Session {
    let drafts = (1..=model.plan().model.mtp_modules).map(|module| ProgramKind::Draft { module });
    let kinds = [ProgramKind::Forward].into_iter().chain(drafts).collect();
    let options = SessionOptions { precision, kinds, max_sequences, pages: Some(pages), ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

fn engine(model: &Arc<Model>, max_sequences: u32, pages: u32, options: &EngineOptions) -> Engine {
    Engine::new(session(model, Precision::Exact, max_sequences, pages), options).unwrap()
}

fn mtp(mtp: Mtp) -> EngineOptions {
    EngineOptions { mtp, ..EngineOptions::default() }
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
    requests.iter().map(|request| engine.submit(request.unconstrained()).unwrap().finish().unwrap().0).collect()
}

fn all_pages_are_free(engine: &Engine) {
    engine.clear_cache();
    let stats = engine.stats();
    assert_eq!((stats.free_pages, stats.waiting, stats.running, stats.host_bytes), (stats.pages, 0, 0, 0));
}

#[test]
fn a_poisoned_sequence_fails_alone_and_leaves_nothing_behind() {
    let model = poisoned(&gpu(), "v3-tiny", POISON);
    let requests: Vec<Request> = (0..6).map(|seed| request(seed, 20 + seed * 30, 20)).collect();
    let expected = alone(&model, &requests);
    for drafts in [Mtp::Off, Mtp::Fixed(2)] {
        let engine = engine(&model, 8, 24, &mtp(drafts));
        // Twice, so that pages of the poisoned ones come to others.
        for _ in 0..2 {
            let streams: Vec<_> =
                requests.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
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
                assert_eq!(&stream.finish().unwrap().0, expected, "{drafts:?}");
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
    let engine = engine(&model, 6, 30, &mtp(Mtp::Fixed(1)));
    for round in 0..12 {
        let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
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
    let engine = engine(&model, 4, 3, &mtp(Mtp::Fixed(1)));
    let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
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
    assert!(matches!(streams[0].recv(), Some(Event::Began { cached_tokens: 0 })));
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
            let (tokens, finished) = engine.submit(request.unconstrained()).unwrap().finish().unwrap();
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

/// What is waiting for the disk, and what begins like a request, may be in the way of it for a moment, but never for good.
#[test]
fn kept_pages_are_never_in_the_way() {
    let model = load(&gpu(), &golden("v3-tiny"));
    let temp = tempfile::tempdir().unwrap();
    let grows = |seed| request(seed, 30, 200);
    let mut requests: Vec<Request> = (0..5).map(|seed| request(seed, 250, 1 + seed as usize % 3)).collect();
    requests.extend([grows(11), request(12, 250, 1), request(14, 255, 1), grows(15)]);
    // Begins like the one before, for a part of a page.
    let mut alike = requests[3].unconstrained();
    alike.prompt[10..].rotate_left(77);
    requests.insert(4, alike);
    let expected = alone(&model, &requests);
    for (cache_dir, drafts) in [(Some((temp.path().to_owned(), 1 << 30)), Mtp::Off), (None, Mtp::Fixed(3))] {
        let options = EngineOptions { cache_dir, mtp: drafts, ..EngineOptions::default() };
        for together in [true, false] {
            let engine = engine(&model, 2, 4, &options);
            let submit = |request: &Request| engine.submit(request.unconstrained()).unwrap();
            let found: Vec<Vec<u32>> = if together {
                let streams: Vec<_> = requests.iter().map(submit).collect();
                streams.into_iter().map(|stream| stream.finish().unwrap().0).collect()
            } else {
                requests.iter().map(|request| submit(request).finish().unwrap().0).collect()
            };
            assert_eq!(found, expected, "{options:?} together {together}");
            all_pages_are_free(&engine);
        }
    }
}

#[test]
fn drafts_change_nothing_where_texts_end() {
    let model = load(&gpu(), &golden("v3-mtp-accept-tiny"));
    let info = &model.plan().model;
    let (context, vocab) = (info.max_context, info.vocab_size);
    // Up to the end of the context,
    let full: Vec<Request> = (0..10).map(|back| request(back, context - back, 999)).collect();
    let mut cases: Vec<(Request, Vec<u32>)> =
        full.iter().map(Request::unconstrained).zip(alone(&model, &full)).collect();
    for (request, text) in &cases {
        assert_eq!(text.len(), context as usize - request.prompt.len());
    }
    // to a stop token, and to a length, wherever these stand in a burst or among accepted drafts.
    let base = request(20, 60, 24);
    let text = alone(&model, std::slice::from_ref(&base)).remove(0);
    for (at, &stop) in text.iter().enumerate() {
        let end = text.iter().position(|&token| token == stop).unwrap();
        cases.push((Request { stop_tokens: vec![vocab + 5, stop], ..base.unconstrained() }, text[..=end].to_vec()));
        cases.push((Request { max_new_tokens: at + 1, ..base.unconstrained() }, text[..=at].to_vec()));
    }
    // What was kept at these ends is right: texts go on from there as if all were computed.
    let goes_on = |(request, text): &(Request, Vec<u32>)| Request {
        prompt: [&request.prompt[..], text, &[3]].concat(),
        max_new_tokens: 4,
        ..base.unconstrained()
    };
    let more: Vec<Request> = cases[full.len()..].iter().step_by(5).map(goes_on).collect();
    let after = alone(&model, &more);
    for drafts in [Mtp::Off, Mtp::Fixed(1), Mtp::Fixed(3), Mtp::Fixed(1000), Mtp::Auto] {
        let prefill_chunk = (drafts == Mtp::Fixed(3)).then_some(7);
        let engine = engine(&model, 6, 64, &EngineOptions { prefill_chunk, ..mtp(drafts) });
        let submit = |request: &Request| engine.submit(request.unconstrained()).unwrap();
        let streams: Vec<_> = cases.iter().map(|(request, _)| submit(request)).collect();
        for (stream, (request, expected)) in streams.into_iter().zip(&cases) {
            let (tokens, finished) = stream.finish().unwrap();
            assert_eq!(&tokens, expected, "{drafts:?} {} of {:?}", request.max_new_tokens, request.stop_tokens);
            let stopped = tokens.last().is_some_and(|token| request.stop_tokens.contains(token));
            let all = tokens.len() == request.max_new_tokens;
            let reason = match (stopped, all) {
                (true, _) => StopReason::Eos,
                (_, true) => StopReason::Length,
                _ => StopReason::Context,
            };
            assert_eq!((finished.stop_reason, finished.new_tokens), (reason, tokens.len()));
        }
        for (request, expected) in more.iter().zip(&after) {
            let (tokens, finished) = submit(request).finish().unwrap();
            assert_eq!(&tokens, expected, "{drafts:?}");
            assert!(finished.cached_tokens >= request.prompt.len() - 2, "{finished:?}");
        }
        all_pages_are_free(&engine);
    }
}

/// Nothing that is not a number gets into what is kept, even if the token that is not one ends a text.
#[test]
fn a_poisonous_stop_token_is_not_kept() {
    let gpu = gpu();
    let sound = load(&gpu, &golden("v3-mtp-accept-tiny"));
    let base = request(5, 50, 40);
    let text = alone(&sound, std::slice::from_ref(&base)).remove(0);
    // A token that is drawn first somewhere behind, and not in the prompt.
    let new = |at: &usize| !base.prompt.contains(&text[*at]) && !text[..*at].contains(&text[*at]);
    for at in (5..40).filter(new).take(3) {
        let model = poisoned(&gpu, "v3-mtp-accept-tiny", text[at]);
        for drafts in [Mtp::Off, Mtp::Fixed(1), Mtp::Fixed(4)] {
            let engine = engine(&model, 2, 16, &mtp(drafts));
            let run = |request: &Request| engine.submit(request.unconstrained()).unwrap().finish();
            let stopping = Request { stop_tokens: vec![text[at]], ..base.unconstrained() };
            let (tokens, finished) = run(&stopping).unwrap();
            assert_eq!((&tokens[..], finished.stop_reason), (&text[..=at], StopReason::Eos), "{drafts:?}");
            let mut stream = engine.submit(base.unconstrained()).unwrap();
            let mut heard = Vec::new();
            let error = loop {
                match stream.recv().unwrap() {
                    Event::Began { .. } => {}
                    Event::Tokens(tokens) => heard.extend(tokens.ids),
                    Event::Finished(finished) => panic!("{finished:?}"),
                    Event::Failed(error) => break error,
                }
            };
            assert!(matches!(*error, Error::Poisoned), "{error}");
            assert_eq!(heard, text[..=at], "{drafts:?}");
            let exact = Request { max_new_tokens: at + 1, ..base.unconstrained() };
            assert_eq!(run(&exact).unwrap().0, text[..=at]);
            // What comes behind it is not drawn from what is no number; what comes in its place is.
            let with = |token| Request {
                prompt: [&base.prompt[..], &text[..at], &[token, 2]].concat(),
                ..base.unconstrained()
            };
            let error = run(&with(text[at])).unwrap_err();
            assert!(matches!(*error, Error::Poisoned), "{error}");
            let other = with(1);
            let expected = alone(&sound, std::slice::from_ref(&other)).remove(0);
            if !expected.contains(&text[at]) {
                let (tokens, finished) = run(&other).unwrap();
                assert_eq!(tokens, expected);
                assert!(finished.cached_tokens >= base.prompt.len() + at - 1, "{finished:?}");
            }
            all_pages_are_free(&engine);
        }
    }
}

#[test]
fn modules_that_draft_nonsense_change_no_token() {
    let gpu = gpu();
    let sound = load(&gpu, &golden("v3-mtp-accept-tiny"));
    let requests: Vec<Request> = (0..5).map(|seed| request(seed, 20 + seed * 33, 40)).collect();
    let expected = alone(&sound, &requests);
    let last = format!("model.layers.{}.", sound.plan().model.layers);
    for part in ["eh_proj", "enorm", "self_attn.kv_a_layernorm", "shared_head.norm", "mlp"] {
        let mut hit = false;
        let model = with_nan(&gpu, "v3-mtp-accept-tiny", |name| {
            (name.starts_with(&last) && name.contains(part)).then_some(0..1)
        });
        for drafts in [1, 3] {
            let engine = engine(&model, 5, 40, &mtp(Mtp::Fixed(drafts)));
            // Twice: what they left is there for the second time.
            for _ in 0..2 {
                let streams: Vec<_> =
                    requests.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
                for (stream, expected) in streams.into_iter().zip(&expected) {
                    let (tokens, finished) = stream.finish().unwrap();
                    assert_eq!(&tokens, expected, "NaN in {part}, {drafts} drafts");
                    hit |= finished.acceptance[0].0 > 0;
                }
            }
            all_pages_are_free(&engine);
        }
        assert!(hit, "nothing was drafted");
    }
}

/// A model without modules, two engines on one model, fast precision, a cache that is cleared all the time.
#[test]
fn engines_do_not_disturb_each_other() {
    let gpu = gpu();
    for (name, precision) in [("v2-tiny", Precision::Exact), ("v3-mtp-accept-tiny", Precision::Fast)] {
        let model = load(&gpu, &golden(name));
        let requests: Vec<Request> = (0..10).map(|seed| request(seed / 2, 5 + seed * 13, 20)).collect();
        let plain = EngineOptions { prefix_cache: false, ..mtp(Mtp::Off) };
        let single = Engine::new(session(&model, precision, 1, 16), &plain).unwrap();
        let expected: Vec<Vec<u32>> = requests
            .iter()
            .map(|request| single.submit(request.unconstrained()).unwrap().finish().unwrap().0)
            .collect();
        let engines = [(Mtp::Fixed(2), Some(1)), (Mtp::Off, None)].map(|(drafts, prefill_chunk)| {
            let options = EngineOptions { prefill_chunk, ..mtp(drafts) };
            Engine::new(session(&model, precision, 4, 10), &options).unwrap()
        });
        std::thread::scope(|scope| {
            for engine in &engines {
                let requests: Vec<Request> = requests.iter().map(Request::unconstrained).collect();
                let expected = &expected;
                scope.spawn(move || {
                    for round in 0..3 {
                        let streams: Vec<_> =
                            requests.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
                        for (stream, expected) in streams.into_iter().zip(expected) {
                            engine.clear_cache();
                            assert_eq!(&stream.finish().unwrap().0, expected, "{name} round {round}");
                        }
                    }
                    all_pages_are_free(engine);
                });
            }
        });
        let streams: Vec<_> =
            requests.iter().map(|request| engines[0].submit(request.unconstrained()).unwrap()).collect();
        drop(engines);
        for stream in streams {
            match stream.finish() {
                Ok((tokens, _)) => assert!(expected.contains(&tokens)),
                Err(error) => assert!(matches!(*error, Error::EngineStopped), "{error}"),
            }
        }
    }
}

#[test]
fn pages_on_disk_serve_those_who_draft_and_those_who_do_not() {
    let model = load(&gpu(), &golden("v3-mtp-accept-tiny"));
    let temp = tempfile::tempdir().unwrap();
    let long = request(3, 220, 20);
    let expected = alone(&model, std::slice::from_ref(&long)).remove(0);
    // Written without drafts, then with; read by both.
    for (round, drafts) in [Mtp::Off, Mtp::Fixed(2), Mtp::Off, Mtp::Fixed(2), Mtp::Auto].into_iter().enumerate() {
        let cache_dir = Some((temp.path().to_owned(), 1 << 30));
        let engine = engine(&model, 1, 8, &EngineOptions { cache_dir, ..mtp(drafts) });
        for cached in [if round == 0 { 0 } else { 192 }, 219] {
            let (tokens, finished) = engine.submit(long.unconstrained()).unwrap().finish().unwrap();
            assert_eq!((&tokens, finished.cached_tokens), (&expected, cached), "{round} {drafts:?}");
        }
        engine.flush();
        let disk = engine.stats().disk.unwrap();
        assert_eq!((disk.files, disk.damaged, disk.write_errors), (3, 0, 0), "{round}: {disk:?}");
    }
}

#[test]
fn what_cannot_be_written_is_told_once() {
    let model = load(&gpu(), &golden("v3-tiny"));
    let temp = tempfile::tempdir().unwrap();
    let cache_dir = Some((temp.path().join("cache"), 1 << 30));
    let engine = engine(&model, 2, 32, &EngineOptions { cache_dir, ..EngineOptions::default() });
    std::fs::remove_dir_all(temp.path().join("cache")).unwrap();
    std::fs::write(temp.path().join("cache"), "no directory").unwrap();
    let requests: Vec<Request> = (0..3).map(|seed| request(seed, 200, 6)).collect();
    let expected = alone(&model, &requests);
    for (request, expected) in requests.iter().zip(&expected) {
        assert_eq!(&engine.submit(request.unconstrained()).unwrap().finish().unwrap().0, expected);
    }
    engine.flush();
    let stats = engine.stats();
    let [warning] = &stats.warnings[..] else { panic!("{:?}", stats.warnings) };
    assert!(warning.contains("cannot write to the prefix cache"), "{warning}");
    assert!(stats.disk.is_some_and(|disk| disk.write_errors > 0 && disk.writes == 0));
}
