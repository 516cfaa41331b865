//! Steps of a session: nonsense gives errors that say so and leaves everything usable, and what sequences share none of them
//! can change for another.

#[path = "common/golden.rs"]
mod common;

use std::sync::Arc;

use common::{bundle, gpu, options, profile};
use moewe_plan::{Precision, ProgramKind, Sampling};
use moewe_runtime::{Error, Model, SequenceId, Session, SessionOptions, Work};

fn session(max_sequences: u32, pages: u32) -> Session {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v3-mtp-accept-tiny");
    let temp = tempfile::tempdir().unwrap();
    let bundle = bundle(&dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
    let model: Arc<Model> = Model::load(&gpu(), &bundle, &|_| ()).unwrap();
    let kinds = vec![ProgramKind::Forward, ProgramKind::Draft { module: 1 }];
    let precision = Precision::Exact;
    let options = SessionOptions { precision, kinds, max_sequences, pages: Some(pages), ..SessionOptions::default() };
    Session::new(model, options).unwrap()
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 31 + seed * 7 + i * i) % 200).collect()
}

/// Runs a sequence until it has so many tokens; returns those behind `from`.
fn go_on(session: &mut Session, sequence: SequenceId, length: usize, drafts: u32, from: usize) -> Vec<u32> {
    while session.tokens(sequence).unwrap().len() < length {
        let tokens = session.tokens(sequence).unwrap().len() - session.cached(sequence).unwrap();
        session.step(&[Work { sequence, tokens, drafts, logprobs: false }], 3).unwrap();
    }
    session.tokens(sequence).unwrap()[from..length].to_vec()
}

#[test]
fn nonsense_is_refused_and_harms_nobody() {
    let mut session = session(66, 70);
    let add = |session: &mut Session, seed| session.add_sequence(&prompt(seed, 9), Sampling::default()).unwrap();
    let undisturbed = add(&mut session, 1);
    let expected = go_on(&mut session, undisturbed, 60, 0, 9);
    session.remove_sequence(undisturbed).unwrap();

    let many: Vec<SequenceId> = (1..=65).map(|seed| add(&mut session, seed)).collect();
    let gone = add(&mut session, 99);
    session.remove_sequence(gone).unwrap();
    let sequence = many[0];
    let one = |tokens, drafts| Work { sequence, tokens, drafts, logprobs: false };
    let nonsense = |session: &mut Session| {
        let pending = session.tokens(sequence).unwrap().len() - session.cached(sequence).unwrap();
        let free = session.pages().1;
        for tokens in [0, pending + 1, 1 << 40, usize::MAX - 1, usize::MAX] {
            let error = session.step(&[one(tokens, 2)], 1).unwrap_err();
            assert!(matches!(error, Error::Pending { .. }), "{tokens}: {error}");
        }
        for steps in [0, 33, u32::MAX] {
            let error = session.step(&[one(1, 2)], steps).unwrap_err();
            assert!(matches!(error, Error::Batch { .. }), "{steps}: {error}");
        }
        for work in [&[one(1, 0), one(1, 1)][..], &[]] {
            let error = session.step(work, 1).unwrap_err();
            assert!(matches!(error, Error::Batch { .. }), "{error}");
        }
        for drafts in [0, 1, 7] {
            let work: Vec<Work> =
                many.iter().map(|&sequence| Work { sequence, tokens: 1, drafts, logprobs: false }).collect();
            let error = session.step(&work, 1).unwrap_err();
            assert!(matches!(error, Error::Batch { .. } | Error::BatchTooLarge { .. }), "{error}");
        }
        let stranger = Work { sequence: gone, tokens: 1, drafts: 1, logprobs: false };
        let error = session.step(&[one(1, 1), stranger], 1).unwrap_err();
        assert!(matches!(error, Error::UnknownSequence { .. }), "{error}");
        let other = session.add_sequence(&prompt(3, 3), Sampling::default()).unwrap();
        for (pages, partial) in [(&[9999][..], None), (&[69], None), (&[], Some((9999, 1))), (&[], Some((0, 64)))] {
            assert!(session.adopt(other, pages, partial, true).is_err(), "{pages:?} {partial:?}");
        }
        session.remove_sequence(other).unwrap();
        assert!(session.hold(9999).is_err() && session.load_page(&[0; 12]).is_err());
        assert!(session.read_page(9999).is_err() && session.read_page(u32::MAX).is_err());
        assert!(session.pages().1 <= free);
    };
    nonsense(&mut session);
    session.step(&[one(4, 1)], 1).unwrap();
    nonsense(&mut session);
    session.step(&[one(5, 1000)], 1).unwrap();
    nonsense(&mut session);
    let length = session.tokens(sequence).unwrap().len();
    assert_eq!(session.tokens(sequence).unwrap()[9..length], expected[..length - 9]);
    session.step(&[one(1, u32::MAX)], 32).unwrap();
    nonsense(&mut session);
    assert_eq!(go_on(&mut session, sequence, 60, 3, 9), expected);
    for sequence in many {
        session.remove_sequence(sequence).unwrap();
    }
    assert_eq!(session.pages().0, session.pages().1);
}

/// A sequence that goes back on pages that others use writes to copies.
#[test]
fn going_back_on_shared_pages_changes_no_other_text() {
    for drafts in [0, 1, 3] {
        let mut session = session(4, 24);
        let long = prompt(4, 150);
        let alone = session.add_sequence(&long, Sampling::default()).unwrap();
        let expected = go_on(&mut session, alone, 200, 0, 150);
        session.remove_sequence(alone).unwrap();
        let other_end = [&long[..100], &prompt(9, 50)[..]].concat();
        let alone = session.add_sequence(&other_end, Sampling::default()).unwrap();
        let other_expected = go_on(&mut session, alone, 200, 0, 150);
        session.remove_sequence(alone).unwrap();

        let donor = session.add_sequence(&long, Sampling::default()).unwrap();
        go_on(&mut session, donor, 151, drafts, 150);
        let pages = session.pages_of(donor).unwrap().to_vec();
        let before: Vec<Vec<u8>> = pages[..2].iter().map(|&page| session.read_page(page).unwrap()).collect();
        let drafted = session.is_drafted(donor).unwrap();
        assert_eq!(drafted, drafts > 0);
        let sharer = session.add_sequence(&long, Sampling::default()).unwrap();
        session.adopt(sharer, &pages[..2], None, drafted).unwrap();
        // Back into a shared page, before anything was run and after, and on with another text.
        session.rewind(sharer, 100).unwrap();
        session.append(sharer, &prompt(9, 50)).unwrap();
        assert_eq!(go_on(&mut session, sharer, 200, drafts, 150), other_expected, "{drafts} drafts");
        assert_eq!(session.pages_of(sharer).unwrap()[0], pages[0]);
        assert_ne!(session.pages_of(sharer).unwrap()[1], pages[1]);
        let second = session.add_sequence(&long, Sampling::default()).unwrap();
        session.adopt(second, &pages[..2], Some((pages[2], 20)), drafted).unwrap();
        assert_eq!(go_on(&mut session, second, 170, drafts, 150), expected[..20]);
        session.rewind(second, 64).unwrap();
        session.append(second, &prompt(1, 40)).unwrap();
        go_on(&mut session, second, 180, drafts, 64);

        let after: Vec<Vec<u8>> = pages[..2].iter().map(|&page| session.read_page(page).unwrap()).collect();
        assert!(before == after, "{drafts} drafts: shared pages were written to");
        assert_eq!(go_on(&mut session, donor, 200, drafts, 150), expected, "{drafts} drafts");
        for sequence in [donor, sharer, second] {
            session.remove_sequence(sequence).unwrap();
        }
        assert_eq!(session.pages(), (24, 24));
    }
}
