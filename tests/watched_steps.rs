//! Steps of many sequences that are watched: their frames show what those of each sequence alone show, and nothing that is
//! drawn depends on whether it is watched.

#[path = "common/golden.rs"]
mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{Golden, bundle, gpu, options, profile};
use moewe_oracle::rel_l2;
use moewe_plan::{Numbers, ProgramKind, Sampling, TapChoice, TapFrame, TapGroup};
use moewe_runtime::{Model, SequenceId, Session, SessionOptions, Watch, Work};

fn model() -> (Golden, Arc<Model>) {
    let golden = Golden::open("golden/v3-mtp-accept-tiny");
    let temp = tempfile::tempdir().unwrap();
    let bundle = bundle(&golden.dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
    let model = Model::load_for(&gpu(), &bundle, &KINDS, &|_| ()).unwrap();
    (golden, model)
}

const KINDS: [ProgramKind; 3] = [ProgramKind::Forward, ProgramKind::Watch, ProgramKind::Draft { module: 1 }];

fn session(model: &Arc<Model>, kinds: &[ProgramKind]) -> Session {
    let watch = kinds.contains(&ProgramKind::Watch).then(|| Watch { ring_bytes: 1 << 30, ..Watch::default() });
    let options =
        SessionOptions { kinds: kinds.to_vec(), max_sequences: 4, pages: Some(32), watch, ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

/// Everything but times.
fn taps() -> TapChoice {
    TapChoice { timing: false, ..TapChoice::all() }
}

/// A row of a tensor, as bits.
#[derive(Clone, Debug, PartialEq)]
enum Row {
    F32(Vec<f32>),
    U32(Vec<u32>),
}

/// For each sequence (by what `name` calls it) and position: the token id, and the rows of all tensors by their names.
type Seen = BTreeMap<(usize, u32), (u32, BTreeMap<String, Row>)>;

/// Adds frames. Each position may be seen once, and drafts not at all if `strict`.
fn see(seen: &mut Seen, frames: Vec<TapFrame>, name: &dyn Fn(u32) -> usize, strict: bool) {
    for frame in frames {
        if frame.tensors.iter().any(|tensor| tensor.group == TapGroup::Mtp) {
            assert!(!strict, "a step has drafts to show");
            continue;
        }
        for (index, token) in frame.tokens.iter().enumerate() {
            let row = |columns: u32, data: &Numbers| {
                let range = index * columns as usize..(index + 1) * columns as usize;
                match data {
                    Numbers::F32(numbers) => Row::F32(numbers[range].to_vec()),
                    Numbers::U32(numbers) => Row::U32(numbers[range].to_vec()),
                }
            };
            let rows = frame.tensors.iter().map(|tensor| (tensor.name.to_string(), row(tensor.columns, &tensor.data)));
            let before = seen.insert((name(token.sequence), token.position), (token.id, rows.collect()));
            assert!(before.is_none(), "position {} of {} twice", token.position, token.sequence);
        }
    }
}

fn assert_same(seen: &Seen, expected: &Seen) {
    assert_eq!(seen.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "positions");
    for (place, (id, rows)) in seen {
        let (expected_id, expected_rows) = &expected[place];
        assert_eq!(id, expected_id, "{place:?}");
        assert_eq!(rows.keys().collect::<Vec<_>>(), expected_rows.keys().collect::<Vec<_>>(), "{place:?}");
        for (name, row) in rows {
            match (row, &expected_rows[name]) {
                (Row::F32(found), Row::F32(expected)) => {
                    let f64s = |row: &[f32]| row.iter().map(|&n| f64::from(n)).collect::<Vec<f64>>();
                    let error = rel_l2(&f64s(found), &f64s(expected));
                    assert!(found == expected || error < 2e-5, "{place:?} {name}: relative L2 {error:e}");
                }
                (found, expected) => assert_eq!(found, expected, "{place:?} {name}"),
            }
        }
    }
}

fn sampling(sequence: usize) -> Sampling {
    let temperature = if sequence == 1 { 0.9 } else { 0.0 };
    Sampling { temperature, seed_low: sequence as u32, ..Sampling::default() }
}

/// What is left of a sequence to run, at most `most`.
fn pending(session: &Session, sequence: SequenceId, most: usize) -> usize {
    (session.tokens(sequence).unwrap().len() - session.cached(sequence).unwrap()).min(most)
}

/// Tokens that each sequence draws.
const DRAWN: usize = 14;

#[test]
fn frames_of_mixed_steps_are_those_of_each_sequence_alone() {
    let (golden, model) = model();
    let base = golden.sequence("len7").ids.clone();
    let prompts = [base.clone(), base.iter().rev().copied().collect::<Vec<u32>>(), [&base[..], &base, &base].concat()];

    let mut alone = Seen::new();
    let mut texts = Vec::new();
    let mut session = session(&model, &KINDS);
    session.set_watch(taps()).unwrap();
    for (index, prompt) in prompts.iter().enumerate() {
        let sequence = session.add_sequence(prompt, sampling(index)).unwrap();
        session.prefill(&[sequence], None).unwrap();
        session.decode(&[sequence], DRAWN as u32 - 1).unwrap();
        texts.push(session.tokens(sequence).unwrap().to_vec());
        see(&mut alone, session.frames(), &|_| index, false);
        session.remove_sequence(sequence).unwrap();
    }
    assert!(alone.values().all(|(_, rows)| rows.len() > 20));

    for logprobs in [false, true] {
        let mut seen = Seen::new();
        let ids: Vec<SequenceId> = (0..3).map(|i| session.add_sequence(&prompts[i], sampling(i)).unwrap()).collect();
        let name = |number: u32| ids.iter().position(|id| id.number() == number).expect("a sequence of ours");
        let mut passes = 0;
        loop {
            let lengths: Vec<usize> = ids.iter().map(|&id| session.tokens(id).unwrap().len()).collect();
            let short = |i: &usize| lengths[*i] < prompts[*i].len() + DRAWN;
            // The first begins alone, the others come in behind; the last one's prompt runs in parts.
            let running: Vec<usize> = (0..3).filter(short).filter(|&i| passes >= i * 2).rev().collect();
            if running.is_empty() {
                break;
            }
            let most = running.iter().map(|&i| prompts[i].len() + DRAWN - lengths[i]).min().unwrap().clamp(1, 5);
            // That drafts are asked for makes no difference.
            let work = |&i: &usize| {
                let (sequence, drafts) = (ids[i], i as u32 * 2);
                Work { sequence, tokens: pending(&session, sequence, 4), drafts, logprobs }
            };
            let works: Vec<Work> = running.iter().map(work).collect();
            let stepped = session.step(&works, most as u32).unwrap();
            assert!(stepped.iter().all(|stepped| stepped.verified.is_empty()));
            assert!(stepped.iter().all(|s| s.logprobs.len() == if logprobs { s.tokens.len() } else { 0 }));
            // All frames are there at once.
            let frames = session.frames();
            assert_eq!(frames.len(), stepped[0].passes as usize);
            see(&mut seen, frames, &name, true);
            passes += 1;
        }
        assert_eq!(session.dropped(), 0);
        for (index, &id) in ids.iter().enumerate() {
            assert_eq!(session.tokens(id).unwrap(), texts[index], "a watched text");
            session.remove_sequence(id).unwrap();
        }
        assert_same(&seen, &alone);
    }
}

/// A sequence that is watched for a while goes on drafting afterwards; what was drafted before is forgotten.
#[test]
fn watching_may_begin_and_end_between_steps() {
    let (golden, model) = model();
    let prompt = golden.sequence("len7").ids.clone();
    let drive = |session: &mut Session, watch: &dyn Fn(usize) -> bool, drafts: u32| {
        let sequence = session.add_sequence(&prompt, sampling(1)).unwrap();
        let (mut accepted, mut frames, mut passes, mut logs) = (0, 0, 0, Vec::new());
        for round in 0..24 {
            let watched = watch(round);
            if session.options().watch.is_some() {
                session.set_watch(if watched { taps() } else { TapChoice::none() }).unwrap();
            }
            let work = Work { sequence, tokens: pending(session, sequence, 5), drafts, logprobs: true };
            let stepped = session.step(&[work], 2).unwrap().remove(0);
            assert!(!watched || stepped.verified.is_empty());
            accepted += stepped.verified.iter().map(|pass| pass.1).sum::<u32>();
            passes += if watched { stepped.passes as usize } else { 0 };
            frames += session.frames().len();
            logs.extend(stepped.logprobs);
        }
        assert_eq!(frames, passes);
        let tokens = session.tokens(sequence).unwrap()[prompt.len()..].to_vec();
        session.remove_sequence(sequence).unwrap();
        (tokens, logs, accepted)
    };
    let (expected, expected_logs, _) = drive(&mut session(&model, &[ProgramKind::Forward]), &|_| false, 0);
    let mut session = session(&model, &KINDS);
    for (what, watch, drafts) in [
        ("never", (&|_| false) as &dyn Fn(usize) -> bool, 2),
        ("always", &|_| true, 2),
        ("now and then", &|round| round % 5 > 2, 1),
        ("from the start", &|round| round < 6, 3),
        ("later", &|round| round > 6, 3),
    ] {
        let (tokens, logs, accepted) = drive(&mut session, watch, drafts);
        let count = tokens.len().min(expected.len());
        assert!(count >= 20);
        assert_eq!(tokens[..count], expected[..count], "watched {what}");
        for (told, expected) in logs.iter().zip(&expected_logs) {
            assert!((told.logprob - expected.logprob).abs() < 1e-4, "watched {what}");
        }
        assert_eq!(accepted > 0, what != "always", "watched {what}: {accepted} drafts were accepted");
    }
}

/// A session without forward programs makes its steps with watch programs; one without either cannot.
#[test]
fn sessions_with_one_kind_of_program() {
    let (golden, model) = model();
    let prompt = golden.sequence("len7").ids.clone();
    let greedy = &golden.sequence("len7").greedy;
    for kinds in [&[ProgramKind::Watch][..], &[ProgramKind::Forward], &[ProgramKind::Draft { module: 1 }]] {
        let mut session = session(&model, kinds);
        let sequence = session.add_sequence(&prompt, Sampling::default()).unwrap();
        let work = Work { sequence, tokens: prompt.len(), drafts: 1, logprobs: true };
        let stepped = session.step(&[work], 1);
        if matches!(kinds[0], ProgramKind::Draft { .. }) {
            assert!(matches!(stepped, Err(moewe_runtime::Error::NotPrepared { .. })), "{stepped:?}");
            continue;
        }
        assert_eq!(stepped.unwrap()[0].tokens, greedy[..1]);
        let work = Work { tokens: 1, ..work };
        assert_eq!(session.step(&[work], 4).unwrap()[0].tokens, greedy[1..5]);
        assert!(session.frames().is_empty(), "nothing is wanted");
    }
}
