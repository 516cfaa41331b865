//! Texts that are not free: constraints, biases, penalties; log probabilities; and requests whose readers misbehave.

#[path = "common/golden.rs"]
mod common;
#[path = "common/engine.rs"]
mod engines;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use engines::{all, all_pages_are_free, alone, engine, load, mtp, request, session};
use moewe::trace::{self, Numbers};
use moewe_plan::{LOGPROB_TOP, Precision, Sampling};
use moewe_runtime::engine::{Constraint, Engine, EngineOptions, Event, Mtp, Request, Tokens};
use moewe_runtime::{Error, Model, StopReason};

/// Lets one text through, and notes what was drawn.
#[derive(Debug)]
struct Forced {
    text: Vec<u32>,
    drawn: Arc<Mutex<Vec<u32>>>,
}

fn allow(mask: &mut [u32], token: u32) {
    mask[token as usize / 32] |= 1 << (token % 32);
}

impl Constraint for Forced {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        assert!(mask.iter().all(|word| *word == 0));
        allow(mask, self.text[self.drawn.lock().unwrap().len()]);
        Ok(())
    }

    fn drawn(&mut self, token: u32) -> Result<(), String> {
        self.drawn.lock().unwrap().push(token);
        Ok(())
    }

    fn ended(&self) -> bool {
        self.drawn.lock().unwrap().len() == self.text.len()
    }
}

/// What may come next depends on all that was drawn: a quarter of the vocabulary.
#[derive(Debug)]
struct Winding {
    state: u32,
    vocab_size: u32,
}

impl Winding {
    fn allows(&self, token: u32) -> bool {
        (token ^ self.state).wrapping_mul(0x9e37_79b9) >> 30 == 0
    }
}

impl Constraint for Winding {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        (0..self.vocab_size).filter(|&token| self.allows(token)).for_each(|token| allow(mask, token));
        Ok(())
    }

    fn drawn(&mut self, token: u32) -> Result<(), String> {
        if !self.allows(token) {
            return Err(format!("{token} was not allowed"));
        }
        self.state = self.state.wrapping_mul(31).wrapping_add(token + 1);
        Ok(())
    }

    fn ended(&self) -> bool {
        false
    }
}

fn vocab_size(model: &Model) -> u32 {
    model.plan().model.vocab_size
}

fn forced(text: &[u32]) -> (Box<dyn Constraint>, Arc<Mutex<Vec<u32>>>) {
    let drawn = Arc::default();
    (Box::new(Forced { text: text.to_vec(), drawn: Arc::clone(&drawn) }), drawn)
}

fn ids(tokens: Vec<Tokens>) -> Vec<Vec<u32>> {
    tokens.into_iter().map(|tokens| tokens.ids).collect()
}

#[test]
fn a_constraint_forces_its_text_and_others_do_not_notice() {
    let model = load("v3-mtp-accept-tiny");
    let last = vocab_size(&model) - 1;
    let free: Vec<Request> = (0..4).map(|seed| request(seed, 12 + seed * 30, 40)).collect();
    let expected = ids(alone(&model, free.iter().map(Request::unconstrained)));
    for drafts in [Mtp::Off, Mtp::Fixed(2), Mtp::Auto] {
        let engine = engine(&model, 8, 64, &mtp(drafts));
        let streams: Vec<_> = free.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
        let texts: Vec<Vec<u32>> = vec![vec![5, last, last, 0, 31, 32, 5], vec![9], (0..30).rev().collect()];
        let mut constrained = Vec::new();
        for (text, seed) in texts.iter().zip(0..) {
            let (constraint, drawn) = forced(text);
            let request = Request { constraint: Some(constraint), ..request(seed, 20 + 70 * seed, 50) };
            constrained.push((engine.submit(request).unwrap(), drawn));
        }
        // One that is over before its text is.
        let (constraint, drawn) = forced(&[1, 2, 3, 4, 5]);
        let short = engine.submit(Request { constraint: Some(constraint), ..request(1, 9, 3) }).unwrap();
        for ((stream, drawn), text) in constrained.into_iter().zip(&texts) {
            let (tokens, end) = all(stream);
            let end = end.unwrap();
            assert_eq!((&tokens.ids, end.stop_reason, end.new_tokens), (text, StopReason::Eos, text.len()));
            assert_eq!(*drawn.lock().unwrap(), *text, "each token once");
            assert!(end.acceptance.iter().all(|&(drafted, _)| drafted == 0), "{:?}", end.acceptance);
        }
        let (tokens, end) = all(short);
        assert_eq!((tokens.ids, end.unwrap().stop_reason), (vec![1, 2, 3], StopReason::Length));
        assert_eq!(*drawn.lock().unwrap(), [1, 2, 3]);
        let mut drafted = 0;
        for (stream, expected) in streams.into_iter().zip(&expected) {
            let (tokens, end) = all(stream);
            assert_eq!(&tokens.ids, expected, "{drafts:?}");
            drafted += end.unwrap().acceptance.first().map_or(0, |position| position.0);
        }
        assert!(drafts != Mtp::Fixed(2) || drafted > 0, "the others went on drafting");
        all_pages_are_free(&engine);
    }
}

#[test]
fn an_end_of_sequence_token_ends_a_constrained_text_if_it_is_allowed() {
    let model = load("v3-tiny");
    let engine = engine(&model, 2, 16, &mtp(Mtp::Auto));
    let (constraint, drawn) = forced(&[4, 8, 15, 16, 23]);
    let base = Request { stop_tokens: vec![15], ..request(0, 5, 50) };
    let (tokens, end) = all(engine.submit(Request { constraint: Some(constraint), ..base }).unwrap());
    assert_eq!((tokens.ids, end.unwrap().stop_reason), (vec![4, 8, 15], StopReason::Eos));
    assert_eq!(*drawn.lock().unwrap(), [4, 8, 15]);
}

/// How a constraint goes wrong, at which token.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Nothing,
    OutsideOnly,
    ErrAllowed,
    ErrDrawn,
    PanicAllowed,
    PanicDrawn,
    PanicEnded,
    PanicDropped,
}

#[derive(Debug)]
struct Faulty {
    fault: Fault,
    left: u32,
    vocab_size: u32,
}

impl Constraint for Faulty {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        match self.fault {
            _ if self.left > 0 => mask.fill(u32::MAX),
            Fault::Nothing => {}
            Fault::OutsideOnly => (self.vocab_size..mask.len() as u32 * 32).for_each(|t| allow(mask, t)),
            Fault::ErrAllowed => return Err("no idea what follows".into()),
            Fault::PanicAllowed => panic!("allowed"),
            _ => mask.fill(u32::MAX),
        }
        Ok(())
    }

    fn drawn(&mut self, _token: u32) -> Result<(), String> {
        if self.left > 0 {
            self.left -= 1;
            return Ok(());
        }
        match self.fault {
            Fault::ErrDrawn => Err("not this one".into()),
            Fault::PanicDrawn => panic!("drawn"),
            _ => Ok(()),
        }
    }

    fn ended(&self) -> bool {
        assert!(self.left > 0 || self.fault != Fault::PanicEnded, "ended");
        false
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        assert!(self.fault != Fault::PanicDropped, "dropped");
    }
}

#[test]
fn a_constraint_that_fails_ends_its_own_text_alone() {
    let model = load("v3-tiny");
    let free: Vec<Request> = (0..3).map(|seed| request(seed, 20 + seed * 40, 60)).collect();
    let expected = ids(alone(&model, free.iter().map(Request::unconstrained)));
    let engine = engine(&model, 5, 64, &mtp(Mtp::Fixed(1)));
    let faults = [
        (Fault::Nothing, 0, "no token may"),
        (Fault::OutsideOnly, 0, "no token may"),
        (Fault::ErrAllowed, 0, "no idea what follows"),
        (Fault::ErrDrawn, 1, "not this one"),
        (Fault::PanicAllowed, 0, "panicked"),
        (Fault::PanicDrawn, 1, "panicked"),
        (Fault::PanicEnded, 0, "panicked"),
    ];
    let streams: Vec<_> = free.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
    for (fault, more, says) in faults {
        for left in [0, 2] {
            let constraint = Faulty { fault, left, vocab_size: vocab_size(&model) };
            let constraint: Option<Box<dyn Constraint>> = Some(Box::new(constraint));
            let (tokens, end) = all(engine.submit(Request { constraint, ..request(7, 30, 20) }).unwrap());
            let error = end.unwrap_err();
            assert!(matches!(&*error, Error::Constraint { what } if what.contains(says)), "{fault:?}: {error}");
            let drawn = if fault == Fault::PanicEnded { left.max(1) } else { left + more };
            assert_eq!(tokens.ids.len() as u32, drawn, "{fault:?} after {left}");
        }
    }
    let constraint = Faulty { fault: Fault::PanicDropped, left: 9, vocab_size: vocab_size(&model) };
    let (tokens, end) =
        all(engine.submit(Request { constraint: Some(Box::new(constraint)), ..request(7, 30, 4) }).unwrap());
    assert_eq!((tokens.ids.len(), end.unwrap().stop_reason), (4, StopReason::Length));
    for (stream, expected) in streams.into_iter().zip(&expected) {
        assert_eq!(&all(stream).0.ids, expected);
    }
    assert_eq!(engine.stats().failed, 14);
    all_pages_are_free(&engine);
}

/// All that the host has a hand in, in a request.
fn steered(model: &Model, seed: u32, length: u32, count: usize) -> Request {
    let base = request(seed, length, count);
    match seed % 4 {
        1 => {
            let constraint = Winding { state: seed, vocab_size: vocab_size(model) };
            Request { constraint: Some(Box::new(constraint)), presence_penalty: 0.7, logprobs: Some(2), ..base }
        }
        2 => Request { presence_penalty: 1.5, frequency_penalty: 0.4, ..base },
        3 => Request { logit_bias: (0..90).step_by(3).map(|token| (token, 2.0)).collect(), logprobs: Some(0), ..base },
        _ => base,
    }
}

#[test]
fn preempted_requests_go_on_as_they_were() {
    let model = load("v3-tiny");
    let make = |seed: u32| steered(&model, seed, 80 - seed * 9, 160);
    let expected = alone(&model, (0..8).map(make));
    let free = alone(&model, (0..8).map(|seed| request(seed, 80 - seed * 9, 160)));
    for seed in 0..8 {
        let same = expected[seed as usize].ids == free[seed as usize].ids;
        assert_eq!(same, seed % 4 == 0, "{seed}: something was steered");
    }
    let mut preempted = [0; 4];
    for (drafts, pages, prefix_cache) in [(Mtp::Off, 6, true), (Mtp::Fixed(2), 6, false), (Mtp::Off, 9, true)] {
        let engine = engine(&model, 5, pages, &EngineOptions { prefix_cache, ..mtp(drafts) });
        let streams: Vec<_> = (0..8).map(|seed| engine.submit(make(seed)).unwrap()).collect();
        for (seed, (stream, expected)) in streams.into_iter().zip(&expected).enumerate() {
            let (tokens, end) = all(stream);
            let end = end.unwrap();
            assert_eq!(end.stop_reason, StopReason::Length);
            assert_eq!(&tokens, expected, "{seed} {drafts:?}");
            preempted[seed % 4] += end.preemptions;
        }
        all_pages_are_free(&engine);
    }
    assert!(preempted[1..].iter().all(|count| *count > 0), "{preempted:?}");
}

/// Logits of each token of a text, as the trace program computes them.
fn logits(model: &Arc<Model>, text: &[u32]) -> Vec<Vec<f32>> {
    let mut session = common::session(model, trace::kinds(0), Some(16), Precision::Exact);
    let mut traced = trace::trace(&mut session, text, None, &|name| name == "logits").unwrap();
    let Some(trace::Tensor { shape, data: Numbers::F32(numbers) }) = traced.remove("logits") else {
        panic!("no logits")
    };
    numbers.chunks(shape[1]).map(<[f32]>::to_vec).collect()
}

#[test]
fn penalties_and_biases_are_what_they_are_said_to_be() {
    let model = load("v3-tiny");
    let cases =
        [(0.0, 0.0, 0.0), (0.6, 0.0, 0.0), (0.0, 0.3, 0.0), (1.2, 0.5, 0.0), (-0.5, -0.2, 0.0), (0.9, 0.2, 1.5)];
    for (presence_penalty, frequency_penalty, bias) in cases {
        let logit_bias: Vec<(u32, f32)> = (0..320)
            .step_by(7)
            .filter(|_| bias != 0.0)
            .map(|token| (token, bias * (1.0 + token as f32 / 320.0)))
            .collect();
        let base = Request { sampling: Sampling::default(), ..request(5, 30, 40) };
        let asked = Request {
            presence_penalty,
            frequency_penalty,
            logit_bias: logit_bias.clone(),
            logprobs: Some(LOGPROB_TOP),
            ..base.unconstrained()
        };
        let told = alone(&model, [asked]).remove(0);
        let text = [&base.prompt[..], &told.ids].concat();
        let logits = logits(&model, &text);
        let mut counts = [0u32; 320];
        for (index, (&drawn, told)) in told.ids.iter().zip(&told.logprobs).enumerate() {
            let row = &logits[base.prompt.len() + index - 1];
            let added = |token: usize| {
                let listed = logit_bias.iter().find(|(id, _)| *id as usize == token).map_or(0.0, |(_, bias)| *bias);
                let count = counts[token];
                listed - if count > 0 { presence_penalty + frequency_penalty * count as f32 } else { 0.0 }
            };
            let score = |token: usize| row[token] + added(token);
            let best = (0..320).map(score).fold(f32::MIN, f32::max);
            assert!(best - score(drawn as usize) < 1e-4, "token {index}: {} of at most {best}", score(drawn as usize));
            counts[drawn as usize] += 1;
            // Log probabilities are those of the model, whatever was added.
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            let expected = |token: u32| f64::from(row[token as usize]) - sum.ln();
            assert!((f64::from(told.logprob) - expected(drawn)).abs() < 1e-4);
            assert_eq!(told.top.len(), 20);
            let mut order: Vec<u32> = (0..320).collect();
            order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
            for (&(id, logprob), &token) in told.top.iter().zip(&order) {
                assert!(
                    (f64::from(logprob) - expected(token)).abs() < 1e-4
                        && (expected(id) - expected(token)).abs() < 1e-4
                );
            }
        }
    }
}

#[test]
fn a_bias_forces_and_forbids() {
    let model = load("v3-mtp-accept-tiny");
    let base = Request { sampling: Sampling::default(), ..request(0, 25, 30) };
    let free = alone(&model, [base.unconstrained()]).remove(0).ids;
    let engine = engine(&model, 4, 64, &mtp(Mtp::Fixed(2)));
    let run = |request| all(engine.submit(request).unwrap());
    let last = vocab_size(&model) - 1;
    let (tokens, end) = run(Request { logit_bias: vec![(last, 100.0)], ..base.unconstrained() });
    assert_eq!(tokens.ids, [last; 30]);
    assert!(end.unwrap().acceptance[0].0 > 0, "a bias alone does not end drafts");
    let forbidden: Vec<u32> = free[..10].to_vec();
    let mut logit_bias: Vec<(u32, f32)> = forbidden.iter().map(|&token| (token, -100.0)).collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    logit_bias.dedup();
    let (tokens, _) = run(Request { logit_bias, ..base.unconstrained() });
    assert!(tokens.ids.iter().all(|token| !forbidden.contains(token)), "{:?}", tokens.ids);
    // A later sequence in the same place has nothing of it.
    assert_eq!(run(base).0.ids, free);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let model = load("v3-tiny");
    let engine = Engine::new(session(&model, 1, 8, None), &EngineOptions::default()).unwrap();
    let base = || request(0, 4, 2);
    let wrong = [
        Request { logit_bias: vec![(320, 1.0)], ..base() },
        Request { logit_bias: vec![(3, f32::NAN)], ..base() },
        Request { logit_bias: vec![(3, f32::INFINITY)], ..base() },
        Request { logit_bias: vec![(3, 1.0), (4, 1.0), (3, 1.0)], ..base() },
        Request { presence_penalty: f32::NAN, ..base() },
        Request { frequency_penalty: f32::NEG_INFINITY, ..base() },
        Request { logprobs: Some(21), ..base() },
    ];
    for request in wrong {
        let what = format!("{request:?}");
        let error = engine.submit(request).unwrap_err();
        assert!(matches!(error, Error::Request { .. } | Error::Sampling { .. }), "{what}: {error}");
    }
    let error = engine.submit(Request { experts: true, ..base() }).unwrap_err();
    assert!(matches!(error, Error::NotPrepared { .. }), "{error}");
    // Numbers that are finite one by one.
    let most =
        Request { logit_bias: vec![(3, f32::MIN)], presence_penalty: f32::MAX, frequency_penalty: f32::MAX, ..base() };
    assert_eq!(all(engine.submit(Request { max_new_tokens: 9, ..most }).unwrap()).0.ids.len(), 9);
    all_pages_are_free(&engine);
}

#[test]
fn log_probabilities_do_not_depend_on_who_shares_the_batch() {
    let model = load("v3-mtp-accept-tiny");
    let make = |seed: u32| Request { logprobs: Some(seed % 5 * 5), ..request(seed, 3 + seed * 17, 30) };
    let expected = alone(&model, (0..8).map(make));
    let (full, all_told) = (alone(&model, [Request { logprobs: Some(20), ..make(3) }]).remove(0), &expected[3]);
    for (full, told) in full.logprobs.iter().zip(&all_told.logprobs) {
        assert_eq!((full.logprob, &full.top[..15]), (told.logprob, &told.top[..]));
    }
    for drafts in [Mtp::Off, Mtp::Fixed(1), Mtp::Fixed(3)] {
        let options = EngineOptions { prefill_chunk: (drafts == Mtp::Fixed(1)).then_some(11), ..mtp(drafts) };
        let engine = engine(&model, 6, 64, &options);
        // Some of them want none.
        let wants = |seed: u32| if seed % 3 == 2 { Request { logprobs: None, ..make(seed) } } else { make(seed) };
        let streams: Vec<_> = (0..8).map(|seed| engine.submit(wants(seed)).unwrap()).collect();
        for (seed, (stream, expected)) in (0..).zip(streams.into_iter().zip(&expected)) {
            let (told, _) = all(stream);
            assert_eq!(told.ids, expected.ids, "{seed} {drafts:?}");
            let none = seed % 3 == 2;
            assert_eq!(told.logprobs, if none { Vec::new() } else { expected.logprobs.clone() }, "{seed} {drafts:?}");
            assert!(none || told.logprobs.iter().all(|logprobs| logprobs.top.len() as u32 == seed % 5 * 5));
        }
    }
}

#[test]
fn sinks_may_refuse_and_panic() {
    let model = load("v3-tiny");
    let expected = ids(alone(&model, [request(3, 30, 40)])).remove(0);
    let engine = engine(&model, 4, 32, &mtp(Mtp::Auto));
    // Refuses, or panics, at the n-th event: the first one is `Began`.
    for panics in [false, true] {
        for at in [0, 1, 3] {
            let (sender, events) = mpsc::channel();
            let calls = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&calls);
            let sink = move |event: Event| {
                let call = count.fetch_add(1, Ordering::SeqCst);
                assert!(!panics || call < at, "a sink that panics");
                sender.send(event).unwrap();
                call < at
            };
            let done = engine.stats().requests;
            let id = engine.submit_to(request(1, 20, 200), sink).unwrap();
            while engine.stats().requests == done {
                std::thread::sleep(Duration::from_millis(1));
            }
            engine.cancel(id);
            let heard = events.iter().count();
            assert_eq!(calls.load(Ordering::SeqCst), at + 1, "it is not called again");
            assert_eq!(heard, at + usize::from(!panics));
        }
    }
    assert_eq!(engine.stats().cancelled, 6);
    // A sink hears the end once, and a cancelled one, too.
    let (sender, events) = mpsc::channel();
    let told = sender.clone();
    engine.submit_to(request(3, 30, 40), move |event| sender.send(event).is_ok()).unwrap();
    let id = engine.submit_to(request(5, 30, 9000), move |event| told.send(event).is_ok()).unwrap();
    engine.cancel(id);
    let events: Vec<Event> = events.iter().collect();
    let ends = events.iter().filter_map(|event| match event {
        Event::Finished(finished) => Some(finished.stop_reason),
        _ => None,
    });
    let ends: Vec<StopReason> = ends.collect();
    assert!(ends.len() == 2 && ends.contains(&StopReason::Stopped) && ends.contains(&StopReason::Length), "{ends:?}");
    assert_eq!(all(engine.submit(request(3, 30, 40)).unwrap()).0.ids, expected);
    all_pages_are_free(&engine);
}

#[test]
fn no_more_wait_than_may() {
    let model = load("v3-tiny");
    let options = EngineOptions { max_waiting: Some(2), ..mtp(Mtp::Off) };
    let engine = engine(&model, 3, 32, &options);
    // Three places and two who wait, however fast they come.
    let mut streams: Vec<_> = (0..5).map(|seed| engine.submit(request(seed, 20, 200)).unwrap()).collect();
    let error = engine.submit(request(9, 20, 200)).unwrap_err();
    assert!(matches!(error, Error::TooManyWaiting { limit: 2, waiting: 2 }), "{error}");
    streams.pop();
    // There is a place as soon as the engine has heard of it.
    let stream = loop {
        match engine.submit(request(9, 20, 2)) {
            Ok(stream) => break stream,
            Err(error) => assert!(matches!(error, Error::TooManyWaiting { .. }), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    drop(streams);
    assert_eq!(all(stream).0.ids.len(), 2);
    drop(engine);
    // None may wait: that is no reason to refuse one for whom there is a place.
    let engine = engines::engine(&model, 2, 3, &EngineOptions { max_waiting: Some(0), ..mtp(Mtp::Off) });
    let first = engine.submit(request(1, 100, 80)).unwrap();
    let second = engine.submit(request(2, 100, 80)).unwrap();
    assert!(matches!(engine.submit(request(3, 1, 1)).unwrap_err(), Error::TooManyWaiting { limit: 0, .. }));
    assert_eq!((all(first).0.ids.len(), all(second).0.ids.len()), (80, 80));
    assert_eq!(all(engine.submit(request(3, 1, 1)).unwrap()).0.ids.len(), 1);
}
