//! Watching over the tiny model: frames tell which token was run where and what a program left of it, cost no token, and
//! never hold a session up.

mod common;

use std::collections::BTreeMap;

use common::{MAX_CONTEXT, MIX, continuation, draft, load, next, plan, prompt};
use moewe_plan::{FrameTensor, Numbers, ProgramKind, Sampling, TapChoice, TapFrame};
use moewe_runtime::{
    Batch, DECODES_PER_TIMED_RUN, Error, GenerateOptions, SequenceId, Session, SessionOptions, Watch, Words, generate,
};

const DRAFT: ProgramKind = ProgramKind::Draft { module: 1 };

fn choice(taps: &str) -> TapChoice {
    taps.parse().unwrap()
}

/// A session with all kinds of programs that watches `taps`.
fn watching(max_sequences: u32, taps: &str, ring_bytes: u64) -> Session {
    let kinds = vec![ProgramKind::Forward, ProgramKind::Watch, ProgramKind::Trace, DRAFT];
    let watch = Some(Watch { taps: choice(taps), ring_bytes });
    let options = SessionOptions { kinds, max_sequences, watch, ..SessionOptions::default() };
    Session::new(load(plan()).unwrap(), options).unwrap()
}

fn words<'a>(frame: &'a TapFrame, name: &str) -> &'a [u32] {
    let tensor = frame.tensors.iter().find(|tensor| &*tensor.name == name).unwrap_or_else(|| panic!("no {name}"));
    match &tensor.data {
        Numbers::U32(numbers) => numbers,
        Numbers::F32(_) => panic!("{name} holds floats"),
    }
}

fn names(frame: &TapFrame) -> Vec<&str> {
    frame.tensors.iter().map(|tensor| &*tensor.name).collect()
}

/// Holds frames of the watch program against what the device had in its batch and against the tokens of the sequences,
/// each with the length of its prompt, and says how many rows there were.
fn check_frames(session: &Session, frames: &[TapFrame], sequences: &[(SequenceId, usize)]) -> usize {
    let mut seen = BTreeMap::new();
    for frame in frames {
        let copy = words(frame, "copy");
        assert_eq!(copy.len(), frame.tokens.len() * 4);
        for (row, (token, copy)) in frame.tokens.iter().zip(copy.chunks(4)).enumerate() {
            let &(id, prompt) =
                sequences.iter().find(|(id, _)| id.number() == token.sequence).expect("a sequence of ours");
            let (tokens, position) = (session.tokens(id).unwrap(), token.position as usize);
            let behind = if position + 1 < prompt { tokens[position + 1] + 1 } else { 0 };
            assert_eq!(token.id, tokens[position], "frame {}, row {row}", frame.number);
            assert_eq!(copy, [token.id, token.position, id.slot(), behind], "frame {}, row {row}", frame.number);
            let mix = &words(frame, "mix")[row * MIX as usize..][..MIX as usize];
            let expected: Vec<u32> = (0..MIX).map(|c| row as u32 * 100 + token.position * 10 + c).collect();
            assert_eq!(mix, expected);
            assert_eq!(words(frame, "mix.part")[row * 3..][..3], expected[2..5]);
            assert_eq!(seen.insert((token.sequence, token.position), frame.number), None, "each token runs once");
        }
    }
    let numbers: Vec<u64> = frames.iter().map(|frame| frame.number).collect();
    assert_eq!(numbers, (0..frames.len() as u64).collect::<Vec<u64>>(), "in order, and none is missing");
    for &(id, _) in sequences {
        let positions = seen.range((id.number(), 0)..=(id.number(), u32::MAX)).map(|((_, position), _)| *position);
        assert!(positions.eq(0..session.cached(id).unwrap() as u32), "every token that was run is told of");
    }
    seen.len()
}

#[test]
fn frames_tell_of_every_token_in_chunks_and_bursts() {
    let mut session = watching(1, "hidden,routing", 64 << 20);
    let ids = prompt(150, 3);
    let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
    let mut tokens = session.prefill(&[sequence], Some(7)).unwrap();
    for steps in [1, 8, 32, 3] {
        tokens.extend(session.decode(&[sequence], steps).unwrap().into_iter().flatten());
    }
    assert_eq!(tokens, continuation(&ids, 45, false));
    let frames = session.frames();
    assert_eq!(frames.len(), 150usize.div_ceil(7) + 44);
    assert_eq!(names(&frames[0]), ["copy", "mix", "mix.part"]);
    assert_eq!(check_frames(&session, &frames, &[(sequence, 150)]), 194);
    assert_eq!((session.frames().len(), session.dropped()), (0, 0));
}

#[test]
fn frames_tell_sequences_apart_in_ragged_batches() {
    let mut session = watching(3, "hidden,routing", 64 << 20);
    // A sequence that is gone leaves its slot, not its number.
    let gone = session.add_sequence(&[1], Sampling::default()).unwrap();
    session.remove_sequence(gone).unwrap();
    let prompts = [prompt(70, 2), prompt(3, 9), prompt(129, 4)];
    let ids: Vec<_> = prompts.iter().map(|p| session.add_sequence(p, Sampling::default()).unwrap()).collect();
    assert_eq!((gone.slot(), gone.number() == ids[0].number()), (ids[0].slot(), false));
    session.prefill(&ids, Some(11)).unwrap();
    for (order, steps) in [([1, 0].as_slice(), 9), (&[2, 0, 1], 32), (&[2], 5)] {
        session.decode(&order.iter().map(|&i| ids[i]).collect::<Vec<_>>(), steps).unwrap();
    }
    let frames = session.frames();
    let sequences: Vec<_> = ids.iter().zip(&prompts).map(|(&id, prompt)| (id, prompt.len())).collect();
    assert_eq!(check_frames(&session, &frames, &sequences), 202 + 2 * 9 + 3 * 32 + 5);
    for (id, prompt) in ids.iter().zip(&prompts) {
        let new = &session.tokens(*id).unwrap()[prompt.len()..];
        assert_eq!(new, continuation(prompt, new.len(), false));
    }
}

#[test]
fn a_frame_holds_what_the_taps_of_a_single_run_hold() {
    let mut session = watching(1, "hidden,lens,routing,logits", 1 << 20);
    let ids = prompt(20, 6);
    let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
    // A prompt, and a run that has the logits of its only token.
    let next = session.prefill(&[sequence], None).unwrap();
    session.decode(&[sequence], 1).unwrap();
    let frames = session.frames();
    for (frame, batch) in frames.iter().zip([Batch::of(sequence, &ids, 0), Batch::of(sequence, &next, 20)]) {
        session.run(ProgramKind::Watch, &batch.with_last_row()).unwrap();
        let taps = session.read_taps(ProgramKind::Watch).unwrap();
        assert!(session.frames().is_empty(), "single runs are read by whoever runs them");
        assert_eq!((taps.len(), frame.tensors.len()), (5, 5));
        for (tap, FrameTensor { name, columns, data, .. }) in taps.iter().zip(&frame.tensors) {
            assert_eq!((tap.name.as_str(), tap.shape), (&**name, [frame.tokens.len(), *columns as usize]));
            match (&tap.data, data) {
                (Words::U32(tap), Numbers::U32(frame)) => assert_eq!(tap, frame, "{name}"),
                found => panic!("{name}: {found:?}"),
            }
        }
    }
}

#[test]
fn a_slow_reader_costs_frames_but_no_token() {
    let ids = prompt(40, 5);
    let options = GenerateOptions { max_new_tokens: 100, ignore_eos: true, ..GenerateOptions::default() };
    let expected = continuation(&ids, 100, false);
    // Two buffers of 4 KiB; 448 bytes for the second part of the prompt and eleven times 48; nothing at all.
    for (ring_bytes, held) in [(8192, 2), (1000, 12), (0, 0)] {
        let mut session = watching(1, "hidden,routing:1", ring_bytes);
        let mut generate = || generate(&mut session, &ids, &options, |_| std::ops::ControlFlow::Continue(())).unwrap();
        assert_eq!(generate().tokens, expected, "{ring_bytes}");
        let prefills = ids.len().div_ceil(32) as u64;
        let frames = session.frames();
        assert_eq!(frames.len(), held, "{ring_bytes}");
        assert_eq!(session.dropped(), prefills + 99 - held as u64, "{ring_bytes}");
        assert!(frames.windows(2).all(|pair| pair[0].number < pair[1].number));
        // Once the reader is back, so are frames; their numbers tell of the gap.
        let sequence = session.add_sequence(&ids[..3], Sampling::default()).unwrap();
        session.prefill(&[sequence], None).unwrap();
        let numbers: Vec<u64> = session.frames().iter().map(|frame| frame.number).collect();
        assert_eq!(numbers, if held > 0 { vec![prefills + 99] } else { Vec::new() }, "{ring_bytes}");
    }
}

#[test]
fn memory_for_frames_is_bounded_and_used_again() {
    let mut session = watching(1, "hidden,routing", 64 << 10);
    let ids = prompt(200, 5);
    let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
    // Single runs have no frames, but whatever else both programs need.
    for tokens in [32, 1] {
        session.run(ProgramKind::Watch, &Batch::of(sequence, &ids[..tokens], 0)).unwrap();
    }
    let before = session.model().gpu().held_bytes();
    // Frames of all sizes up to 32 tokens of 68 bytes.
    for chunk in [32, 1, 17, 3, 9, 32, 25] {
        session.rewind(sequence, 200).unwrap();
        session.prefill(&[sequence], Some(chunk)).unwrap();
        session.decode(&[sequence], 5).unwrap();
        session.rewind(sequence, 1).unwrap();
        session.append(sequence, &ids[1..]).unwrap();
        assert!(session.model().gpu().held_bytes() <= before + (64 << 10));
        assert!(!session.frames().is_empty());
    }
    assert!(session.model().gpu().held_bytes() > before, "buffers wait for further frames");
    drop(session);
}

#[test]
fn a_reader_on_another_thread_gets_frames_while_the_session_runs_and_an_end() {
    let mut session = watching(1, "hidden,routing", 64 << 20);
    let receiver = session.frame_receiver().unwrap();
    let reader = std::thread::spawn(move || std::iter::from_fn(|| receiver.recv()).collect::<Vec<TapFrame>>());
    // A receiver that nobody reads from, and one that is gone at once, do no harm.
    let idle = session.frame_receiver().unwrap();
    drop(session.frame_receiver().unwrap());
    let sequence = session.add_sequence(&prompt(100, 4), Sampling::default()).unwrap();
    session.prefill(&[sequence], Some(3)).unwrap();
    session.decode(&[sequence], 32).unwrap();
    let tokens = session.tokens(sequence).unwrap().to_vec();
    drop(session);
    let frames = reader.join().unwrap();
    assert_eq!((frames.len() as u64 + idle.dropped(), idle.dropped()), (34 + 32, 0));
    assert!(frames.iter().flat_map(|frame| &frame.tokens).all(|token| token.id == tokens[token.position as usize]));
    assert!(idle.recv().is_none() && idle.try_recv().is_none());
}

#[test]
fn frames_that_were_ready_outlive_the_session() {
    let mut session = watching(1, "hidden", 64 << 20);
    let receiver = session.frame_receiver().unwrap();
    let sequence = session.add_sequence(&prompt(5, 4), Sampling::default()).unwrap();
    session.prefill(&[sequence], None).unwrap();
    drop(session);
    assert_eq!(receiver.recv().expect("the frame is ready").tokens.len(), 5);
    assert_eq!((receiver.recv(), receiver.dropped()), (None, 0));
}

#[test]
fn looking_away_is_the_forward_program_again() {
    let mut session = watching(1, "none", 1 << 20);
    let ids = prompt(50, 7);
    let expected = continuation(&ids, 41, false);
    let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
    let mut tokens = session.prefill(&[sequence], Some(20)).unwrap();
    for (taps, frames) in [("none", 0), ("routing", 8), ("none", 0), ("hidden:0,lens", 8), ("attention", 0)] {
        session.set_watch(choice(taps)).unwrap();
        tokens.extend(session.decode(&[sequence], 8).unwrap().into_iter().flatten());
        assert_eq!(session.frames().len(), frames, "{taps}");
    }
    assert_eq!(tokens, expected);
}

#[test]
fn steps_that_serve_no_wanted_tap_are_left_out() {
    let mut session = watching(1, "routing", 1 << 20);
    let sequence = session.add_sequence(&prompt(6, 7), Sampling::default()).unwrap();
    let ticks = |session: &mut Session| {
        session.run(ProgramKind::Trace, &Batch::of(sequence, &[1], 200)).unwrap();
        session.read_tap(ProgramKind::Trace, "ticks").unwrap().data
    };
    let Words::U32(before) = ticks(&mut session) else { panic!("ticks are integers") };
    session.prefill(&[sequence], Some(2)).unwrap();
    session.decode(&[sequence], 5).unwrap();
    // The batch was run without some of its steps, so its taps may be of another run.
    assert!(matches!(session.read_taps(ProgramKind::Watch), Err(Error::NotRun { .. })));
    assert_eq!(ticks(&mut session), Words::U32(before.clone()));
    session.set_watch(choice("lens:0")).unwrap();
    session.decode(&[sequence], 5).unwrap();
    let mut after = before;
    after[0] += 5;
    assert_eq!(ticks(&mut session), Words::U32(after.clone()));
    // A layer that has no such tap leaves the step out, too; and what is wanted for itself needs no other step.
    for taps in ["lens:3", "hidden", "none"] {
        session.set_watch(choice(taps)).unwrap();
        session.decode(&[sequence], 2).unwrap();
        assert_eq!(ticks(&mut session), Words::U32(after.clone()), "{taps}");
    }
}

/// Where two taps have one name, the one of the wanted rows is read if these are all tokens in their order, and what serves
/// the other alone is left out.
#[test]
fn taps_of_wanted_rows_spare_those_of_tokens() {
    let mut session = watching(2, "routing,logits", 1 << 20);
    let ids: Vec<_> = [9, 3].map(|n| session.add_sequence(&prompt(n, 7), Sampling::default()).unwrap()).into();
    let ticks = |session: &mut Session| {
        session.run(ProgramKind::Trace, &Batch::of(ids[0], &[1], 200)).unwrap();
        let Words::U32(ticks) = session.read_tap(ProgramKind::Trace, "ticks").unwrap().data else { panic!() };
        ticks[0]
    };
    let told = |session: &Session, tokens: &[usize]| {
        let frames = session.frames();
        assert_eq!(frames.iter().map(|frame| frame.tokens.len()).collect::<Vec<_>>(), tokens);
        for frame in &frames {
            assert_eq!(names(frame), ["mix", "mix.part", "told"]);
            let slot = |number| ids.iter().find(|id| id.number() == number).unwrap().slot();
            let expected: Vec<u32> = frame.tokens.iter().flat_map(|t| [t.position, slot(t.sequence)]).collect();
            assert_eq!(words(frame, "told"), expected);
        }
    };
    let before = ticks(&mut session);
    // Chunks of 4 tokens have one wanted row or none: 4, 4, 1 and 3 of both, where rows are not tokens.
    session.prefill(&ids, Some(4)).unwrap();
    told(&session, &[4, 4, 4]);
    assert_eq!(ticks(&mut session), before + 3);
    session.decode(&ids, 5).unwrap();
    session.decode(&ids[1..], 2).unwrap();
    told(&session, &[2, 2, 2, 2, 2, 1, 1]);
    assert_eq!(ticks(&mut session), before + 3, "what serves tokens that are no rows ran");
    // A prompt of one token each is all rows, too.
    for &id in &ids {
        session.rewind(id, 1).unwrap();
    }
    session.prefill(&ids, None).unwrap();
    told(&session, &[2]);
    assert_eq!(ticks(&mut session), before + 3);
    // All tokens are rows here, but in another order.
    let tokens = ids.iter().flat_map(|&id| Batch::of(id, &[5], 0).tokens).collect();
    session.run(ProgramKind::Watch, &Batch { tokens, rows: vec![1, 0] }).unwrap();
    let told = session.read_tap(ProgramKind::Watch, "told").unwrap();
    assert_eq!((told.shape, told.data), ([2, 2], Words::U32(vec![0, ids[0].slot(), 0, ids[1].slot()])));
}

#[test]
fn parameters_change_what_is_sampled_and_neutral_ones_do_not() {
    let ids = prompt(30, 9);
    let expected = continuation(&ids, 12, false);
    let neutral = vec![vec![0.0; common::VOCAB as usize], vec![1.0; 2]];
    let mut session = watching(1, "none", 1 << 20);
    let run = |session: &mut Session| {
        let options = GenerateOptions { max_new_tokens: 12, ignore_eos: true, ..GenerateOptions::default() };
        generate(session, &ids, &options, |_| std::ops::ControlFlow::Continue(())).unwrap().tokens
    };
    // The watch program with parameters as they are in the beginning, and as they were set.
    session.set_watch(choice("routing")).unwrap();
    assert_eq!(run(&mut session), expected);
    session.set_parameters(&neutral).unwrap();
    assert_eq!(run(&mut session), expected);
    // Edits work without any tap, and make no frames.
    session.set_watch(TapChoice::none()).unwrap();
    session.frames();
    let mut edited = neutral.clone();
    edited[0][42] = 1e6;
    session.set_parameters(&edited).unwrap();
    assert_eq!(run(&mut session), [42; 12]);
    assert!(session.frames().is_empty());
    // Odd tokens lose their distance, so that token 1 is the best one.
    edited[0][42] = 0.0;
    edited[1][1] = 0.0;
    session.set_parameters(&edited).unwrap();
    let first = next(&ids, false);
    assert_eq!(run(&mut session)[0], if first.is_multiple_of(2) { first.min(1) } else { 1 });
    session.set_parameters(&neutral).unwrap();
    assert_eq!(run(&mut session), expected);
    // What is wrong is named and changes nothing.
    let say = |session: &mut Session, values: &[Vec<f32>]| session.set_parameters(values).unwrap_err().to_string();
    assert!(say(&mut session, &neutral[..1]).contains("1 lists of numbers, the plan has 2 parameters"));
    let short = [neutral[0].clone(), vec![1.0]];
    assert!(say(&mut session, &short).contains("1 numbers for ExpertScale of layer 0, expected 2"));
    let infinite = [neutral[0].clone(), vec![1.0, f32::NAN]];
    assert!(say(&mut session, &infinite).contains("NaN for ExpertScale of layer 0, expected finite numbers"));
    assert_eq!(run(&mut session), expected);
}

#[test]
fn what_was_not_prepared_for_watching_says_so() {
    let model = load(plan()).unwrap();
    let options = SessionOptions { watch: Some(Watch::default()), ..SessionOptions::default() };
    let error = Session::new(model.clone(), options).unwrap_err();
    assert!(matches!(error, Error::NotPrepared { kind: ProgramKind::Watch, place: "session" }), "{error}");
    let mut session = Session::new(model, SessionOptions::default()).unwrap();
    assert!(matches!(session.set_watch(TapChoice::all()), Err(Error::NotPrepared { .. })));
    assert!(matches!(session.frame_receiver(), Err(Error::NotPrepared { .. })));
    assert_eq!((session.frames().len(), session.dropped()), (0, 0));
    let neutral = vec![vec![0.0; common::VOCAB as usize], vec![1.0; 2]];
    session.set_parameters(&neutral).unwrap();
    let error = session.set_parameters(&[neutral[0].clone(), vec![2.0; 2]]).unwrap_err();
    assert!(matches!(error, Error::NotPrepared { kind: ProgramKind::Watch, .. }), "{error}");
}

/// The numbers of the frames that have times.
fn timed(frames: &[TapFrame]) -> Vec<u64> {
    frames.iter().filter(|frame| frame.times.is_some()).map(|frame| frame.number).collect()
}

#[test]
fn each_step_of_a_timed_run_is_timed() {
    let mut session = watching(2, "routing,timing", 64 << 20);
    let timestamps = session.model().gpu().info().timestamps;
    let ids: Vec<_> = [9, 4].map(|n| session.add_sequence(&prompt(n, 4), Sampling::default()).unwrap()).into();
    session.prefill(&ids, None).unwrap();
    // Bursts that do not know of runs to be timed.
    for steps in [1, 7, 32] {
        session.decode(&ids, steps).unwrap();
    }
    let frames = session.frames();
    assert_eq!((frames.len(), DECODES_PER_TIMED_RUN), (41, 16));
    assert_eq!(timed(&frames), if timestamps { vec![0, 1, 17, 33] } else { vec![] });
    assert!(frames.iter().all(|frame| names(frame) == ["mix", "mix.part"]));
    for times in frames.iter().filter_map(|frame| frame.times.as_ref()) {
        let program = &session.model().plan().programs[times.program as usize];
        assert_eq!((program.kind, times.rows), (ProgramKind::Watch, 2));
        assert_eq!((times.starts.len(), times.durations.len()), (program.steps.len(), program.steps.len()));
        for (step, (start, duration)) in program.steps.iter().zip(times.starts.iter().zip(&times.durations)) {
            assert_eq!(start.is_none(), step.label == "tick");
            assert!(*duration < 1_000_000_000, "step {} took {duration} ns", step.label);
        }
        let starts: Vec<u64> = times.starts.iter().flatten().copied().collect();
        assert_eq!(starts[0], 0);
        assert!(starts.is_sorted());
        assert!(*starts.last().unwrap() > 0 && times.durations.iter().any(|&duration| duration > 0), "{times:?}");
    }
    // Times alone are worth a frame, but without them there is none.
    session.set_watch(choice("timing")).unwrap();
    session.decode(&ids, 17).unwrap();
    let frames = session.frames();
    assert_eq!((frames.len(), frames.iter().all(|f| f.tensors.is_empty())), (if timestamps { 2 } else { 0 }, true));
    // Chunks of a prompt are all timed, and so is the first token behind it.
    session.set_watch(choice("routing,timing")).unwrap();
    session.append(ids[1], &prompt(10, 3)).unwrap();
    session.prefill(&[ids[1]], Some(3)).unwrap();
    session.decode(&ids[1..], 5).unwrap();
    let frames = session.frames();
    let first = frames[0].number;
    assert_eq!(frames.len(), 4 + 5);
    assert_eq!(timed(&frames), if timestamps { (first..first + 5).collect() } else { vec![] });
}

#[test]
fn drafts_behind_timed_runs_are_timed() {
    let mut session = watching(1, "mtp,hidden,timing", 64 << 20);
    if !session.model().gpu().info().timestamps {
        return;
    }
    let sequence = session.add_sequence(&prompt(30, 4), Sampling::default()).unwrap();
    session.prefill(&[sequence], None).unwrap();
    session.decode(&[sequence], 20).unwrap();
    let (main, drafts) = split(session.frames());
    // A prompt of two chunks, then the first and the 17th token.
    assert_eq!((main.len(), timed(&main)), (22, vec![0, 2, 4, 36]));
    assert_eq!((drafts.len(), timed(&drafts)), (22, vec![1, 3, 5, 37]));
    for frame in &drafts {
        assert_eq!(names(frame), ["mtp.1.ids"]);
        let Some(times) = &frame.times else { continue };
        let program = &session.model().plan().programs[times.program as usize];
        assert_eq!((program.kind, times.rows as usize), (DRAFT, frame.tokens.len()));
        assert!(times.starts.iter().all(Option::is_some));
    }
}

/// Splits frames into those of the main model and those of the draft.
fn split(frames: Vec<TapFrame>) -> (Vec<TapFrame>, Vec<TapFrame>) {
    frames.into_iter().partition(|frame| !names(frame).contains(&"mtp.1.ids"))
}

/// Holds frames of the draft against the tokens of these sequences, and says which positions of each there were.
fn check_drafts(session: &Session, drafts: &[TapFrame], sequences: &[SequenceId]) -> Vec<Vec<u32>> {
    let mut positions = vec![Vec::new(); sequences.len()];
    for frame in drafts {
        for (token, drafted) in frame.tokens.iter().zip(words(frame, "mtp.1.ids").chunks(2)) {
            let index = sequences.iter().position(|id| id.number() == token.sequence).expect("a sequence of ours");
            let tokens = session.tokens(sequences[index]).unwrap();
            let position = token.position as usize;
            assert_eq!((token.id, drafted), (tokens[position], &draft(tokens, position)[..]), "position {position}");
            positions[index].push(token.position);
        }
    }
    positions
}

#[test]
fn drafts_follow_every_token_at_the_next_position() {
    let mut session = watching(2, "mtp,hidden", 64 << 20);
    let prompts = [prompt(70, 2), prompt(9, 9)];
    let ids: Vec<_> = prompts.iter().map(|p| session.add_sequence(p, Sampling::default()).unwrap()).collect();
    // Chunks of 24 tokens, as many as a draft takes: prompts end within chunks and between them.
    session.prefill(&ids, None).unwrap();
    session.decode(&ids, 9).unwrap();
    session.decode(&ids[..1], 3).unwrap();
    let (main, drafts) = split(session.frames());
    assert_eq!(main.len(), 79usize.div_ceil(24) + 12);
    assert_eq!(main.len(), drafts.len());
    assert!(main.iter().zip(&drafts).all(|(main, draft)| main.number + 1 == draft.number));
    assert!(drafts.iter().all(|draft| names(draft) == ["mtp.1.ids"]));
    let positions = check_drafts(&session, &drafts, &ids);
    assert_eq!(positions, [(1..=82).collect::<Vec<u32>>(), (1..=18).collect()]);
    for (id, prompt) in ids.iter().zip(&prompts) {
        let new = &session.tokens(*id).unwrap()[prompt.len()..];
        assert_eq!(new, continuation(prompt, new.len(), false));
    }
    // A second turn, and what was taken back.
    session.append(ids[1], &prompt(40, 3)).unwrap();
    session.prefill(&[ids[1]], Some(5)).unwrap();
    session.rewind(ids[1], 30).unwrap();
    session.prefill(&[ids[1]], None).unwrap();
    session.decode(&ids, 4).unwrap();
    let (_, drafts) = split(session.frames());
    // The rewound sequence has other tokens behind position 29 than the nine chunks told.
    let now: Vec<TapFrame> = drafts.into_iter().skip(9).collect();
    assert_eq!(check_drafts(&session, &now, &ids)[1][..3], [30, 31, 32]);
}

#[test]
fn sequences_that_were_not_followed_from_the_start_have_no_drafts() {
    let mut session = watching(2, "none", 64 << 20);
    let ids: Vec<_> = [20, 30].map(|n| session.add_sequence(&prompt(n, 2), Sampling::default()).unwrap()).into();
    session.prefill(&ids[..1], None).unwrap();
    session.set_watch(choice("mtp")).unwrap();
    session.prefill(&ids[1..], None).unwrap();
    // Both in one batch: only the second has drafts.
    session.decode(&ids, 5).unwrap();
    let (main, drafts) = split(session.frames());
    assert!(main.is_empty(), "the main model has no such tap");
    assert_eq!(check_drafts(&session, &drafts, &ids), [vec![], (1..=35).collect::<Vec<u32>>()]);
    // A gap ends them for good; a start from the first token begins them anew.
    session.set_watch(TapChoice::none()).unwrap();
    session.decode(&ids, 1).unwrap();
    session.set_watch(choice("mtp")).unwrap();
    session.decode(&ids, 3).unwrap();
    assert!(session.frames().is_empty());
    session.rewind(ids[0], 1).unwrap();
    session.prefill(&ids[..1], None).unwrap();
    session.decode(&ids, 3).unwrap();
    let positions = check_drafts(&session, &session.frames(), &ids);
    assert_eq!(positions, [vec![1, 2, 3, 4], vec![]]);
}

#[test]
fn drafts_end_where_the_context_does() {
    let mut session = watching(1, "mtp", 64 << 20);
    let ids = prompt(MAX_CONTEXT - 10, 2);
    let options = GenerateOptions { max_new_tokens: 1000, ignore_eos: true, burst: 4, ..GenerateOptions::default() };
    let mut new = Vec::new();
    generate(&mut session, &ids, &options, |token| {
        new.push(token);
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(new, continuation(&ids, 10, false));
    let frames = session.frames();
    let positions: Vec<u32> = frames.iter().flat_map(|frame| &frame.tokens).map(|token| token.position).collect();
    assert_eq!(positions, (1..MAX_CONTEXT).collect::<Vec<u32>>());
    // A prompt that fills the context, and a decode that runs its last token.
    let full = prompt(MAX_CONTEXT, 2);
    let sequence = session.add_sequence(&full[..299], Sampling::default()).unwrap();
    session.prefill(&[sequence], None).unwrap();
    session.frames();
    assert_eq!(session.decode(&[sequence], 1).unwrap(), [continuation(&full[..299], 2, false)[1..].to_vec()]);
    assert!(session.frames().is_empty());
    session.remove_sequence(sequence).unwrap();
    let sequence = session.add_sequence(&full, Sampling::default()).unwrap();
    assert_eq!(session.prefill(&[sequence], None).unwrap(), [next(&full, false)]);
    assert!(session.frames().is_empty());
}
