//! Generation: when it stops, what it hands out, and that bursts do not show.

mod common;

use std::ops::ControlFlow;

use common::{EOS, MAX_CONTEXT, continuation, load, options, plan, prompt, session};
use moewe_plan::Sampling;
use moewe_runtime::{Error, GenerateOptions, Session, SessionOptions, StopReason, continue_sequence, generate};

/// A prompt whose continuation draws the end-of-sequence token soon, but not at once.
fn ending_prompt() -> (Vec<u32>, usize) {
    let candidates = (1..500).map(|seed| prompt(20, seed));
    let position = |p: &Vec<u32>| continuation(p, 20, false).iter().position(|&t| t == EOS);
    candidates.filter_map(|p| Some((position(&p).filter(|at| *at > 3)?, p))).map(|(at, p)| (p, at)).next().unwrap()
}

fn run(session: &mut Session, prompt: &[u32], options: &GenerateOptions) -> (Vec<u32>, StopReason) {
    let mut streamed = Vec::new();
    let generated = generate(session, prompt, options, |token| {
        streamed.push(token);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(generated.tokens, streamed);
    assert_eq!(session.pages().0, session.pages().1, "its pages are free again");
    (generated.tokens, generated.stop_reason)
}

#[test]
fn it_stops_at_the_end_of_sequence_unless_told_not_to() {
    let mut session = session(1);
    let (prompt, at) = ending_prompt();
    let expected = continuation(&prompt, 20, false);
    for burst in [0, 1, 3, 8, 1000] {
        let options = GenerateOptions { max_new_tokens: 20, burst, ..GenerateOptions::default() };
        assert_eq!(run(&mut session, &prompt, &options), (expected[..=at].to_vec(), StopReason::Eos));
        let on = GenerateOptions { ignore_eos: true, ..options.clone() };
        assert_eq!(run(&mut session, &prompt, &on), (expected.clone(), StopReason::Length));
        let stop = GenerateOptions { stop_tokens: vec![expected[2]], ..options };
        assert_eq!(run(&mut session, &prompt, &stop), (expected[..3].to_vec(), StopReason::Eos));
    }
    let none = GenerateOptions { max_new_tokens: 0, ..GenerateOptions::default() };
    assert_eq!(run(&mut session, &prompt, &none), (Vec::new(), StopReason::Length));
}

#[test]
fn it_stops_when_context_or_cache_is_full() {
    let prompt = prompt(150, 3);
    let options_ = GenerateOptions { max_new_tokens: 1000, ignore_eos: true, ..GenerateOptions::default() };
    let mut whole = session(1);
    let expected = continuation(&prompt, 150, false);
    assert_eq!(run(&mut whole, &prompt, &options_), (expected.clone(), StopReason::Context));
    let full = common::prompt(MAX_CONTEXT, 2);
    assert_eq!(run(&mut whole, &full, &options_), (Vec::new(), StopReason::Context));
    let mut small = Session::new(load(plan()).unwrap(), SessionOptions { pages: Some(3), ..options(1) }).unwrap();
    assert_eq!(run(&mut small, &prompt, &options_), (expected[..42].to_vec(), StopReason::Context));
    let error = generate(&mut small, &full, &options_, |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::OutOfPages { needed: 5, free: 3, total: 3 }), "{error}");
    assert_eq!(small.pages(), (3, 3));
}

#[test]
fn the_caller_can_stop_it_and_go_on() {
    let mut session = session(1);
    let mut all = prompt(30, 3);
    let expected = continuation(&all, 40, false);
    let options = GenerateOptions { ignore_eos: true, ..GenerateOptions::default() };
    let sequence = session.add_sequence(&all, Sampling::default()).unwrap();
    let mut count = 0;
    let generated = continue_sequence(&mut session, sequence, &options, |_| {
        count += 1;
        if count == 6 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!((generated.tokens.as_slice(), generated.stop_reason), (&expected[..6], StopReason::Stopped));
    all.extend(&generated.tokens);
    assert_eq!(session.tokens(sequence).unwrap(), all, "the rest of the burst is forgotten");
    // The same text goes on,
    let more = GenerateOptions { max_new_tokens: 5, ..options };
    let generated = continue_sequence(&mut session, sequence, &more, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(generated.tokens, expected[6..11]);
    assert_eq!(generated.timing.prompt_tokens, 1);
    all.extend(&generated.tokens);
    // and a second turn sees all of it.
    let turn = prompt(12, 8);
    session.append(sequence, &turn).unwrap();
    all.extend(&turn);
    let generated = continue_sequence(&mut session, sequence, &more, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(generated.tokens, continuation(&all, 5, false));
    assert_eq!(generated.timing.decode_tokens, 4);
}
