//! Sessions over a tiny model whose next token is known: prompts in chunks, decoding in bursts, ragged batches,
//! pages, taps. They need a Vulkan device; a software one will do.

mod common;

use common::{MAX_CONTEXT, MIX, VOCAB, continuation, load, next, options, plan, prompt, session};
use moewe_plan::{ProgramKind, Sampling};
use moewe_runtime::{Batch, Error, Session, SessionOptions, Words};

/// The index of the largest number.
fn largest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("there are logits") as u32
}

#[test]
fn a_prompt_in_chunks_gives_what_it_gives_whole() {
    let mut session = session(1);
    let prompt = prompt(150, 3);
    for chunk in [None, Some(1), Some(5), Some(64), Some(0)] {
        let sequence = session.add_sequence(&prompt, Sampling::default()).unwrap();
        let first = session.prefill(&[sequence], chunk).unwrap();
        assert_eq!(first, [next(&prompt, false)], "chunk {chunk:?}");
        assert_eq!(session.cached(sequence).unwrap(), 150);
        session.remove_sequence(sequence).unwrap();
    }
}

#[test]
fn decoding_in_bursts_feeds_back_on_the_device() {
    let mut session = session(1);
    let prompt = prompt(60, 5);
    let expected = continuation(&prompt, 101, false);
    let sequence = session.add_sequence(&prompt, Sampling::default()).unwrap();
    let mut tokens = session.prefill(&[sequence], None).unwrap();
    for steps in [1, 7, 32, 3, 32, 25] {
        tokens.extend(session.decode(&[sequence], steps).unwrap().into_iter().flatten());
    }
    assert_eq!(tokens, expected);
    assert_eq!(&session.tokens(sequence).unwrap()[60..], expected);
}

#[test]
fn ragged_sequences_give_what_each_gives_alone() {
    let mut session = session(3);
    let prompts = [prompt(70, 2), prompt(3, 9), prompt(129, 4)];
    for chunk in [None, Some(7)] {
        let ids: Vec<_> = prompts.iter().map(|p| session.add_sequence(p, Sampling::default()).unwrap()).collect();
        let mut tokens: Vec<Vec<u32>> = session.prefill(&ids, chunk).unwrap().into_iter().map(|t| vec![t]).collect();
        // In another order than the slots, and with one that joins late.
        for (order, steps) in [([1, 0].as_slice(), 9), (&[2, 0, 1], 32), (&[2], 5), (&[0, 2], 8)] {
            let chosen: Vec<_> = order.iter().map(|&i| ids[i]).collect();
            for step in session.decode(&chosen, steps).unwrap() {
                order.iter().zip(step).for_each(|(&i, token)| tokens[i].push(token));
            }
        }
        for (prompt, tokens) in prompts.iter().zip(&tokens) {
            assert_eq!(tokens, &continuation(prompt, tokens.len(), false));
        }
        for id in ids {
            session.remove_sequence(id).unwrap();
        }
        assert_eq!(session.pages().0, session.pages().1, "all pages are free again");
    }
}

#[test]
fn more_sequences_than_rows_are_prefilled_in_several_runs() {
    let mut session = session(7);
    let prompts: Vec<_> = (1..8).map(|i| prompt(i, i)).collect();
    let ids: Vec<_> = prompts.iter().map(|p| session.add_sequence(p, Sampling::default()).unwrap()).collect();
    let expected: Vec<u32> = prompts.iter().map(|p| next(p, false)).collect();
    assert_eq!(session.prefill(&ids, None).unwrap(), expected);
    let error = session.decode(&ids, 1).unwrap_err();
    assert!(matches!(error, Error::BatchTooLarge { tokens: 7, rows: 7, max_tokens: 32, max_rows: 4, .. }), "{error}");
}

#[test]
fn more_runs_than_the_ring_holds_are_read_in_between() {
    let mut session = session(40);
    // With chunks of one token, each of these prompts ends in a run of its own.
    let prompts: Vec<_> = (0..40).map(|i| prompt(1 + i % 2, i)).collect();
    let ids: Vec<_> = prompts.iter().map(|p| session.add_sequence(p, Sampling::default()).unwrap()).collect();
    let expected: Vec<u32> = prompts.iter().map(|p| next(p, false)).collect();
    assert_eq!(session.prefill(&ids, Some(1)).unwrap(), expected);
}

#[test]
fn tokens_seen_in_the_prompt_and_sampled_ones_are_marked() {
    let mut session = session(2);
    let fresh = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
    let prompts = [prompt(20, 1), prompt(30, 6)];
    // The second sequence repeats freely; the first must not see its marks.
    let a = session.add_sequence(&prompts[0], fresh).unwrap();
    let b = session.add_sequence(&prompts[1], Sampling::default()).unwrap();
    let mut tokens = vec![session.prefill(&[a, b], None).unwrap()];
    tokens.extend(session.decode(&[a, b], 30).unwrap());
    let column = |i: usize| tokens.iter().map(|step| step[i]).collect::<Vec<u32>>();
    assert_eq!(column(0), continuation(&prompts[0], 31, true));
    assert_eq!(column(1), continuation(&prompts[1], 31, false));
    // What was sampled and taken back is not seen any more.
    session.rewind(a, 22).unwrap();
    assert_eq!(session.prefill(&[a], None).unwrap()[0], tokens[2][0]);
}

#[test]
fn a_conversation_goes_on_where_it_stopped() {
    let mut session = session(1);
    let first = prompt(63, 8);
    let sequence = session.add_sequence(&first, Sampling::default()).unwrap();
    let mut all = first.clone();
    all.extend(session.prefill(&[sequence], None).unwrap());
    all.extend(session.decode(&[sequence], 10).unwrap().into_iter().flatten());
    let second = prompt(17, 5);
    session.append(sequence, &second).unwrap();
    all.extend(&second);
    // The last sampled token had not been run: it goes with the second turn.
    assert_eq!(session.cached(sequence).unwrap(), 73);
    let error = session.decode(&[sequence], 1).unwrap_err();
    assert!(matches!(error, Error::Pending { pending: 18, .. }), "{error}");
    let next_token = session.prefill(&[sequence], Some(4)).unwrap()[0];
    assert_eq!(next_token, next(&all, false));
    assert_eq!(session.tokens(sequence).unwrap().len(), 92);
}

#[test]
fn pages_run_out_with_an_error_that_changes_nothing() {
    let model = load(plan()).unwrap();
    let mut session = Session::new(model, SessionOptions { pages: Some(3), ..options(2) }).unwrap();
    assert_eq!(session.max_context(), 192);
    let a = session.add_sequence(&prompt(100, 1), Sampling::default()).unwrap();
    let b = session.add_sequence(&prompt(65, 2), Sampling::default()).unwrap();
    let error = session.prefill(&[a, b], None).unwrap_err();
    assert!(matches!(error, Error::OutOfPages { needed: 4, free: 3, total: 3 }), "{error}");
    session.prefill(&[a], None).unwrap();
    assert!(matches!(session.prefill(&[b], None), Err(Error::OutOfPages { needed: 2, free: 1, .. })));
    session.decode(&[a], 28).unwrap();
    session.remove_sequence(a).unwrap();
    assert_eq!(session.prefill(&[b], None).unwrap(), [next(&prompt(65, 2), false)]);
    let error = session.decode(&[a], 1).unwrap_err();
    assert!(matches!(error, Error::UnknownSequence { slot: 0 }), "{error}");
    // A new sequence in the old slot is not the old one.
    let c = session.add_sequence(&prompt(2, 1), Sampling::default()).unwrap();
    assert_eq!(c.slot(), a.slot());
    assert!(session.tokens(a).is_err() && session.remove_sequence(a).is_err());
    let error = session.add_sequence(&[1], Sampling::default()).unwrap_err();
    assert!(matches!(error, Error::OutOfSequences { max_sequences: 2 }), "{error}");
}

#[test]
fn buffers_keep_to_the_binding_limit_of_the_plan() {
    let mut plan = plan();
    // Three rows of logits, four pages of cache.
    plan.requirements.max_binding_bytes = u64::from(VOCAB) * 4 * 3;
    let mut session = Session::new(load(plan).unwrap(), options(1)).unwrap();
    assert_eq!(session.capacity(ProgramKind::Forward).unwrap(), (32, 3));
    assert_eq!(session.capacity(ProgramKind::Trace).unwrap(), (32, 3));
    assert_eq!(session.pages(), (4, 4));
    let prompt = prompt(200, 3);
    let sequence = session.add_sequence(&prompt, Sampling::default()).unwrap();
    let mut tokens = session.prefill(&[sequence], None).unwrap();
    tokens.extend(session.decode(&[sequence], 32).unwrap().into_iter().flatten());
    assert_eq!(tokens, continuation(&prompt, 33, false));
    let long = session.add_sequence(&prompt, Sampling::default());
    assert!(matches!(long, Err(Error::OutOfSequences { .. })));
}

#[test]
fn taps_are_gathered_by_row_stride_and_offset() {
    let mut session = session(2);
    let ids = prompt(9, 4);
    let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
    assert!(matches!(session.read_taps(ProgramKind::Trace), Err(Error::NotRun { .. })));
    let mut batch = Batch::of(sequence, &ids, 0);
    batch.rows = vec![8, 2];
    session.run(ProgramKind::Trace, &batch).unwrap();
    let taps = session.read_taps(ProgramKind::Trace).unwrap();
    let names: Vec<&str> = taps.iter().map(|tap| tap.name.as_str()).collect();
    assert_eq!(names, ["logits", "mix", "mix.part", "weight", "ticks"]);
    let Words::F32(logits) = &taps[0].data else { panic!("logits are floats") };
    assert_eq!(taps[0].shape, [2, VOCAB as usize]);
    assert_eq!(largest(&logits[..VOCAB as usize]), next(&ids, false));
    assert_eq!(largest(&logits[VOCAB as usize..]), next(&ids[..3], false));
    let mix = |columns: std::ops::Range<u32>| {
        let rows = (0..9).flat_map(|t| columns.clone().map(move |c| t * 100 + t * 10 + c));
        Words::U32(rows.collect())
    };
    assert_eq!((taps[1].shape, &taps[1].data), ([9, MIX as usize], &mix(0..6)));
    assert_eq!((taps[2].shape, &taps[2].data), ([9, 3], &mix(2..5)));
    assert_eq!(session.read_tap(ProgramKind::Trace, "mix.part").unwrap(), taps[2]);
    let error = session.read_tap(ProgramKind::Trace, "nothing").unwrap_err();
    assert!(matches!(error, Error::NoTap { .. }), "{error}");
    // The shards' bytes in order, whatever the segments' borders.
    let bytes: Vec<u32> = common::table().chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(taps[3].data, Words::U32(bytes));
    // Zero rows are no error.
    session.run(ProgramKind::Trace, &Batch::of(sequence, &ids[..1], 0)).unwrap();
    assert_eq!(session.read_tap(ProgramKind::Trace, "logits").unwrap().data, Words::F32(Vec::new()));
    // A forward run leaves no trace.
    session.prefill(&[sequence], None).unwrap();
    assert!(matches!(session.read_taps(ProgramKind::Trace), Err(Error::NotRun { .. })));
}

#[test]
fn a_trace_in_pieces_sees_the_whole_sequence() {
    let mut session = session(1);
    let ids = prompt(200, 7);
    let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
    for start in (0..200).step_by(25) {
        let batch = Batch::of(sequence, &ids[start..start + 25], start as u32).with_all_rows();
        session.run(ProgramKind::Trace, &batch).unwrap();
        let Words::F32(logits) = session.read_tap(ProgramKind::Trace, "logits").unwrap().data else { panic!() };
        for (row, logits) in logits.chunks(VOCAB as usize).enumerate() {
            assert_eq!(largest(logits), next(&ids[..=start + row], false), "position {}", start + row);
        }
    }
    // Single runs do not count among the tokens of the sequence.
    assert_eq!(session.cached(sequence).unwrap(), 0);
    let batch = Batch::of(sequence, &ids[199..], 199).with_last_row();
    session.run(ProgramKind::Forward, &batch).unwrap();
    assert_eq!(session.prefill(&[sequence], None).unwrap(), [next(&ids, false)]);
}

#[test]
fn wrong_input_is_named() {
    let mut session = session(1);
    let greedy = Sampling::default();
    let say = |error: Error| error.to_string();
    assert!(matches!(session.add_sequence(&[], greedy), Err(Error::EmptyPrompt)));
    assert_eq!(
        say(session.add_sequence(&[1, 2, VOCAB], greedy).unwrap_err()),
        "token 2 of the prompt is 97, the vocabulary has 97 tokens (0 to 96)"
    );
    assert_eq!(
        say(session.add_sequence(&prompt(MAX_CONTEXT + 1, 1), greedy).unwrap_err()),
        "301 tokens, the model's context holds 300; shorten the prompt"
    );
    for (sampling, field) in [
        (Sampling { temperature: -1.0, ..greedy }, "temperature"),
        (Sampling { temperature: f32::NAN, ..greedy }, "temperature"),
        (Sampling { temperature: f32::INFINITY, ..greedy }, "temperature"),
        (Sampling { top_p: 0.0, ..greedy }, "top_p"),
        (Sampling { min_p: 1.5, ..greedy }, "min_p"),
        (Sampling { repetition_penalty: 0.0, ..greedy }, "repetition_penalty"),
    ] {
        let error = session.add_sequence(&[1], sampling).unwrap_err();
        assert!(matches!(error, Error::Sampling { field: found, .. } if found == field), "{error}");
    }
    let sequence = session.add_sequence(&prompt(40, 1), greedy).unwrap();
    assert!(matches!(session.decode(&[sequence], 1), Err(Error::Pending { pending: 40, .. })));
    assert!(matches!(session.prefill(&[], None), Err(Error::Batch { .. })));
    assert!(matches!(session.prefill(&[sequence, sequence], None), Err(Error::Batch { .. })));
    session.prefill(&[sequence], None).unwrap();
    assert!(matches!(session.decode(&[sequence], 0), Err(Error::Batch { .. })));
    assert!(matches!(session.decode(&[sequence], 33), Err(Error::Batch { .. })));
    assert!(matches!(session.rewind(sequence, 0), Err(Error::EmptyPrompt)));
    let error = session.append(sequence, &prompt(260, 1)).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { tokens: 301, max_context: 300 }), "{error}");

    let run = |session: &mut Session, batch: &Batch| session.run(ProgramKind::Trace, batch).unwrap_err();
    assert!(matches!(run(&mut session, &Batch::default()), Error::Batch { .. }));
    let mut batch = Batch::of(sequence, &[1], 0);
    batch.rows = vec![1];
    assert!(matches!(run(&mut session, &batch), Error::Batch { .. }));
    assert!(matches!(run(&mut session, &Batch::of(sequence, &[1], MAX_CONTEXT)), Error::ContextExceeded { .. }));
    assert!(matches!(run(&mut session, &Batch::of(sequence, &[VOCAB], 0)), Error::TokenOutOfVocabulary { .. }));
    let mut batch = Batch::of(sequence, &[1], 0);
    batch.tokens[0].sequence = 5;
    assert!(matches!(run(&mut session, &batch), Error::UnknownSequence { slot: 5 }));
    let error = run(&mut session, &Batch::of(sequence, &prompt(33, 1), 0));
    assert!(matches!(error, Error::BatchTooLarge { tokens: 33, max_tokens: 32, .. }), "{error}");
    let error = session.run(ProgramKind::Draft { module: 1 }, &Batch::of(sequence, &[1], 0)).unwrap_err();
    assert!(matches!(error, Error::NotPrepared { place: "session", .. }), "{error}");
    // After all that it still works.
    assert_eq!(session.decode(&[sequence], 1).unwrap().len(), 1);
}
