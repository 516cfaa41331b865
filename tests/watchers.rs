//! What passes of an engine show: which experts were chosen, and what watchers see of requests that run together.

#[path = "common/golden.rs"]
mod common;
#[path = "common/engine.rs"]
mod engines;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use engines::{all, all_pages_are_free, alone, engine, load, mtp, request, session};
use moewe_plan::{Numbers, TapChoice, TapFrame};
use moewe_runtime::engine::{Engine, EngineOptions, Mtp, Request, Watched, Watcher};
use moewe_runtime::{Error, Model, StopReason};

/// Rows of all tensors by position: names, and the bits of their numbers.
type Rows = BTreeMap<u32, BTreeMap<String, Vec<u32>>>;

fn add_rows(rows: &mut Rows, frame: &TapFrame, row: usize) {
    let position = frame.tokens[row].position;
    let seen = rows.entry(position).or_default();
    assert_eq!(seen.insert("id".into(), vec![frame.tokens[row].id]), None, "position {position} was shown twice");
    for tensor in &frame.tensors {
        let columns = tensor.columns as usize;
        let bits = match &tensor.data {
            Numbers::F32(numbers) => numbers[row * columns..][..columns].iter().map(|n| n.to_bits()).collect(),
            Numbers::U32(numbers) => numbers[row * columns..][..columns].to_vec(),
        };
        seen.insert(tensor.name.to_string(), bits);
    }
}

/// What a session shows that runs a request alone, without an engine: its tokens, and the rows of all that were run.
fn reference(model: &Arc<Model>, request: &Request, taps: &TapChoice) -> (Vec<u32>, Rows) {
    let mut session = session(model, 1, 8, Some(256 << 20));
    session.set_watch(taps.clone()).unwrap();
    let id = session.add_sequence(&request.prompt, request.sampling).unwrap();
    let mut tokens = session.prefill(&[id], None).unwrap();
    for _ in 1..request.max_new_tokens {
        tokens.extend(session.decode(&[id], 1).unwrap().remove(0));
    }
    let mut rows = Rows::new();
    for frame in session.frames() {
        (0..frame.tokens.len()).for_each(|row| add_rows(&mut rows, &frame, row));
    }
    assert_eq!((session.dropped(), rows.len()), (0, request.prompt.len() + tokens.len() - 1));
    (tokens, rows)
}

fn routing() -> TapChoice {
    "routing".parse().unwrap()
}

/// `[positions, layers, top_k]` of some positions.
fn experts_of(model: &Model, rows: &Rows, positions: std::ops::Range<usize>) -> Vec<u16> {
    let layers = &model.plan().model.moe_layers;
    let of = |position: usize| {
        layers
            .iter()
            .flat_map(move |layer| rows[&(position as u32)][&format!("moe.{layer}.ids")].iter().map(|&id| id as u16))
    };
    positions.flat_map(of).collect()
}

#[test]
fn experts_are_those_of_the_passes_that_drew_the_tokens() {
    let model = load("v3-tiny");
    let make = |seed: u32| request(seed, 76 - seed * 15, 155 - seed as usize * 9);
    let expected: Vec<_> = (0..6).map(|seed| reference(&model, &make(seed), &routing())).collect();
    let cases = [
        (6, 64, Mtp::Fixed(2), None, true),
        (3, 64, Mtp::Off, Some(7), false),
        // Pages run out: requests are computed again, with and without what was kept.
        (6, 6, Mtp::Fixed(1), None, true),
        (6, 6, Mtp::Off, Some(13), false),
    ];
    for (places, pages, drafts, prefill_chunk, prefix_cache) in cases {
        let options = EngineOptions { prefill_chunk, prefix_cache, ..mtp(drafts) };
        let engine = engine(&model, places, pages, &options);
        let mut preempted = 0;
        for round in 0..2 {
            let what = format!("{options:?} round {round}");
            // Half of them ask, the others run beside them.
            let ask = |seed: u32| Request { experts: seed % 2 == round || seed == 5, ..make(seed) };
            let streams: Vec<_> = (0..6).map(|seed| engine.submit(ask(seed)).unwrap()).collect();
            for (seed, (stream, (tokens, rows))) in (0..).zip(streams.into_iter().zip(&expected)) {
                let (told, end) = all(stream);
                assert_eq!(&told.ids, tokens, "{what}: {seed}");
                if !ask(seed).experts {
                    assert!(told.experts.is_empty() && told.prompt_experts.is_empty());
                    continue;
                }
                let end = end.unwrap();
                preempted += end.preemptions;
                assert_eq!(end.cached_tokens, 0, "{what}: {seed}");
                let prompt = make(seed).prompt.len();
                assert_eq!(told.prompt_experts, experts_of(&model, rows, 0..prompt), "{what}: prompt of {seed}");
                let drawn = experts_of(&model, rows, prompt - 1..prompt - 1 + tokens.len());
                assert_eq!(told.experts, drawn, "{what}: {seed}");
            }
        }
        assert_eq!(preempted > 0, pages == 6, "{:?}", engine.stats());
        // Nobody asks any more: what was kept is used, and there are drafts again.
        let drafted = |engine: &Engine| engine.stats().acceptance.first().map_or(0, |(drafted, _)| *drafted);
        let before = drafted(&engine);
        let (told, end) = all(engine.submit(make(0)).unwrap());
        assert_eq!(told.ids, expected[0].0);
        assert!(!prefix_cache || pages == 6 || end.unwrap().cached_tokens > 0);
        assert_eq!(drafted(&engine) > before, drafts != Mtp::Off);
        all_pages_are_free(&engine);
    }
}

#[test]
fn experts_end_where_texts_end() {
    let model = load("v3-mtp-accept-tiny");
    let base = request(0, 40, 24);
    let (text, rows) = reference(&model, &base, &routing());
    let engine = engine(&model, 4, 32, &mtp(Mtp::Auto));
    for at in [0, 1, 4, 9, 17] {
        let end = text.iter().position(|token| *token == text[at]).unwrap();
        let stops = Request { stop_tokens: vec![text[at]], experts: true, ..base.unconstrained() };
        let (told, finished) = all(engine.submit(stops).unwrap());
        assert_eq!((&told.ids[..], finished.unwrap().stop_reason), (&text[..=end], StopReason::Eos));
        assert_eq!(told.experts, experts_of(&model, &rows, 39..40 + end));
        assert_eq!(told.prompt_experts, experts_of(&model, &rows, 0..40));
    }
    all_pages_are_free(&engine);
}

#[test]
fn too_few_bytes_for_frames_are_an_error_or_shorter_passes() {
    let model = load("v3-tiny");
    let base = || Request { experts: true, ..request(2, 150, 20) };
    let (tokens, rows) = reference(&model, &base(), &routing());
    // 24 numbers of 4 bytes for each token, and its place.
    for ring_bytes in [8 << 10, 1 << 14, 1 << 16] {
        let engine = Engine::new(session(&model, 3, 16, Some(ring_bytes)), &mtp(Mtp::Off)).unwrap();
        let beside = engine.submit(request(1, 30, 60)).unwrap();
        let (told, end) = all(engine.submit(base()).unwrap());
        end.unwrap();
        assert_eq!((&told.ids, &told.prompt_experts), (&tokens, &experts_of(&model, &rows, 0..150)), "{ring_bytes}");
        assert_eq!(told.experts, experts_of(&model, &rows, 149..149 + tokens.len()));
        assert_eq!(all(beside).0.ids.len(), 60);
    }
    let engine = Engine::new(session(&model, 2, 16, Some(64)), &mtp(Mtp::Off)).unwrap();
    let beside = engine.submit(request(1, 30, 60)).unwrap();
    let (told, end) = all(engine.submit(base()).unwrap());
    let error = end.unwrap_err();
    assert!(matches!(*error, Error::FramesLost { ring_bytes: 64 }), "{error}");
    assert!(told.ids.is_empty());
    assert_eq!(all(beside).0.ids.len(), 60);
    all_pages_are_free(&engine);
}

/// Text, rows and reason of each request.
type Seen = BTreeMap<u32, (Vec<u32>, Rows, String)>;

/// All that a watcher saw of each request until so many had ended: text, rows, reason.
fn seen(watcher: &Watcher, mut ends: usize) -> (Seen, u64) {
    let mut all = Seen::new();
    let (mut dropped, mut number) = (0, None);
    while ends > 0 {
        match watcher.recv_timeout(Duration::from_mins(1)).expect("an event") {
            Watched::Began { request, prompt } => {
                assert!(all.insert(request, (prompt, Rows::new(), String::new())).is_none());
            }
            Watched::Tokens { request, ids } => all.get_mut(&request).unwrap().0.extend(ids),
            Watched::Frame(frame) => {
                assert!(number < Some(frame.number));
                number = Some(frame.number);
                for (row, token) in frame.tokens.iter().enumerate() {
                    let (text, rows, _) = all.get_mut(&token.sequence).unwrap();
                    assert_eq!(text[token.position as usize], token.id, "texts come before what was seen of them");
                    add_rows(rows, &frame, row);
                }
            }
            Watched::Dropped(frames) => dropped += frames,
            Watched::Ended { request, reason, tokens_per_second } => {
                assert!(tokens_per_second >= 0.0);
                all.get_mut(&request).unwrap().2 = reason;
                ends -= 1;
            }
        }
    }
    (all, dropped)
}

fn only(rows: &Rows, wanted: impl Fn(&str) -> bool) -> Rows {
    let of = |seen: &BTreeMap<String, Vec<u32>>| {
        seen.iter()
            .filter(|(name, _)| *name == "id" || wanted(name))
            .map(|(name, bits)| (name.clone(), bits.clone()))
            .collect()
    };
    rows.iter().map(|(position, seen)| (*position, of(seen))).collect()
}

#[test]
fn watchers_see_of_each_request_what_it_shows_alone() {
    let model = load("v3-tiny");
    let taps: TapChoice = "routing,latents:1,hidden".parse().unwrap();
    let make = |seed: u32| request(seed, 102 - seed * 41, 130);
    let expected: Vec<_> = (0..3).map(|seed| reference(&model, &make(seed), &taps)).collect();
    for (pages, drafts, prefill_chunk) in [(32, Mtp::Off, None), (32, Mtp::Fixed(2), Some(9)), (4, Mtp::Off, None)] {
        let options = EngineOptions { prefill_chunk, prefix_cache: false, ..mtp(drafts) };
        let engine = engine(&model, 4, pages, &options);
        // This one runs already, so it is not shown; nor is what has ended.
        let mut before = engine.submit(request(8, 10, 120)).unwrap();
        before.recv().unwrap();
        let everything = engine.watch(taps.clone()).unwrap();
        let hidden = engine.watch("hidden:2".parse().unwrap()).unwrap();
        let texts = engine.watch(TapChoice::none()).unwrap();
        let streams: Vec<_> = (0..3).map(|seed| engine.submit(make(seed)).unwrap()).collect();
        let numbers: Vec<u32> = streams.iter().map(|stream| stream.id() as u32).collect();
        for (stream, (tokens, _)) in streams.into_iter().zip(&expected) {
            assert_eq!(&all(stream).0.ids, tokens);
        }
        assert_eq!(engine.stats().preempted > 0, pages == 4);
        let (everything, hidden, texts) = (seen(&everything, 3), seen(&hidden, 3), seen(&texts, 3));
        assert_eq!((everything.1, hidden.1, texts.1), (0, 0, 0));
        for (seed, (number, (tokens, rows))) in numbers.iter().zip(&expected).enumerate() {
            let what = format!("{seed} with {pages} pages, {drafts:?}");
            let text = [&make(seed as u32).prompt[..], tokens].concat();
            let (found, shown, reason) = &everything.0[number];
            assert_eq!((found, reason.as_str()), (&text, StopReason::Length.name()), "{what}");
            assert!(rows[&0].len() > 6, "{:?}", rows[&0].keys());
            assert_eq!(shown, rows, "{what}");
            let (found, shown, _) = &hidden.0[number];
            assert_eq!(found, &text);
            assert_eq!(shown, &only(rows, |name| ["hidden.0", "hidden.3", "final_norm"].contains(&name)), "{what}");
            let (found, shown, _) = &texts.0[number];
            assert_eq!((found, shown.len()), (&text, 0));
        }
        assert_eq!(everything.0.len(), 3);
        drop(before);
    }
}

#[test]
fn nobody_waits_for_a_slow_watcher() {
    let model = load("v3-tiny");
    let expected = alone(&model, (0..3).map(|seed| request(seed, 50, 60)));
    let engine = engine(&model, 3, 32, &EngineOptions { watcher_bytes: 40_000, ..mtp(Mtp::Off) });
    let slow = engine.watch("hidden".parse().unwrap()).unwrap();
    let other = engine.watch(routing()).unwrap();
    let streams: Vec<_> = (0..3).map(|seed| engine.submit(request(seed, 50, 60)).unwrap()).collect();
    for (stream, expected) in streams.into_iter().zip(&expected) {
        assert_eq!(&all(stream).0.ids, &expected.ids);
    }
    let (found, dropped) = seen(&slow, 3);
    let rows: usize = found.values().map(|(_, rows, _)| rows.len()).sum();
    assert!(dropped > 0 && rows > 0 && rows < 3 * 109, "{dropped} frames were dropped, {rows} rows seen");
    for ((text, _, _), expected) in found.values().zip(&expected) {
        assert_eq!(text[50..], expected.ids, "texts are never dropped");
    }
    assert!(!slow.is_closed() && slow.recv_timeout(Duration::ZERO).is_none());
    drop(other);
    // One that never looks is let go at last.
    for seed in 0..60 {
        all(engine.submit(request(seed, 250, 5)).unwrap()).1.unwrap();
    }
    while slow.recv_timeout(Duration::ZERO).is_some() {}
    assert!(slow.is_closed());
    all_pages_are_free(&engine);
}

#[test]
fn a_watcher_that_goes_takes_its_taps_with_it() {
    let model = load("v3-mtp-accept-tiny");
    let engine = engine(&model, 2, 32, &EngineOptions { prefix_cache: false, ..mtp(Mtp::Fixed(1)) });
    let expected = alone(&model, [request(0, 30, 40)]).remove(0).ids;
    let drafted = |stream| {
        let (told, end) = all(stream);
        assert_eq!(told.ids, expected);
        end.unwrap().acceptance[0].0
    };
    let submit = || engine.submit(request(0, 30, 40)).unwrap();
    assert!(drafted(submit()) > 0);
    let watcher = engine.watch("latents".parse().unwrap()).unwrap();
    assert_eq!(drafted(submit()), 0);
    drop(watcher);
    assert!(drafted(submit()) > 0);
    let texts = engine.watch(TapChoice::none()).unwrap();
    assert!(drafted(submit()) > 0, "texts alone are shown without taps");
    // One may come in the middle, and go.
    let stream = submit();
    let watcher = engine.watch(TapChoice::all()).unwrap();
    let mut other = engine.submit(request(4, 20, 150)).unwrap();
    other.recv().unwrap();
    while !matches!(watcher.recv_timeout(Duration::from_mins(1)), Some(Watched::Frame(_))) {}
    drop(watcher);
    drafted(stream);
    engine.cancel(other.id());
    assert_eq!(other.finish().unwrap().1.stop_reason, StopReason::Stopped);
    engine.stop().unwrap();
    while texts.recv_timeout(Duration::ZERO).is_some() {}
    assert!(texts.is_closed());
    // Nothing to see.
    let blind = Engine::new(session(&model, 1, 8, None), &EngineOptions::default()).unwrap();
    assert!(matches!(blind.watch(routing()).unwrap_err(), Error::NotPrepared { .. }));
    let watcher = blind.watch(TapChoice::none()).unwrap();
    let number = blind.submit(request(0, 30, 40)).unwrap();
    let id = number.id() as u32;
    assert_eq!(all(number).0.ids, expected);
    assert_eq!(seen(&watcher, 1).0[&id].0[30..], expected);
}
