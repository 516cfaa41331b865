//! Files that lost bytes or have other ones.

use moewe_viewer::recording::{Error, Recorder, Recording};
use moewe_viewer::source::Event;
use moewe_viewer::synthetic::Shape;
use proptest::prelude::*;

use crate::tools::{Scene, assert_within, chunks, comparable, drain, head, open, scene, store, tiny};

#[test]
fn a_recording_cut_off_at_any_byte_shows_what_is_left() {
    let scene = scene(&tiny());
    let bytes = std::fs::read(&scene.path).unwrap();
    let path = scene.path.with_extension("cut");
    let head = head(&scene.path).len();
    let mut ends = vec![head];
    for (_, chunk) in chunks(&scene.path) {
        let line = bytes[*ends.last().unwrap()..].iter().position(|byte| *byte == b'\n').unwrap() + 1;
        ends.push(ends.last().unwrap() + line + chunk.len());
    }
    assert_eq!(ends.last(), Some(&bytes.len()));
    let (mut least, expected) = (usize::MAX, comparable(&scene.events));
    std::fs::write(&path, &bytes).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for cut in (0..bytes.len()).rev() {
        file.set_len(cut as u64).unwrap();
        match Recording::open(&path) {
            Err(Error::NotARecording { .. }) => assert_eq!(cut, 0),
            Err(Error::Damaged { .. }) => assert!((1..head).contains(&cut), "{cut}"),
            Err(error) => panic!("{cut}: {error}"),
            Ok((mut recording, warnings)) => {
                assert!(cut >= head);
                assert_eq!(warnings.is_empty(), ends[1..].contains(&cut), "{cut}: {warnings:?}");
                let events = drain(&mut recording);
                assert!(expected.starts_with(&comparable(&events)), "{cut}");
                assert!(events.len() <= least);
                least = events.len();
                let whole = ends.iter().filter(|end| **end <= cut).count().saturating_sub(2);
                let ended = events.iter().filter(|event| matches!(event, Event::End { .. })).count();
                assert_eq!(ended, whole, "each whole chunk is shown");
            }
        }
    }
}

#[test]
fn zeros_at_the_end_and_rubbish_in_the_middle_are_passed_by() {
    let scene = scene(&tiny());
    let whole = std::fs::read(&scene.path).unwrap();
    let path = scene.path.with_extension("bad");
    std::fs::write(&path, [&whole[..], &[0; 5000]].concat()).unwrap();
    let (mut recording, warnings) = open(&path);
    assert!(warnings.len() == 1 && warnings[0].contains("cut off"), "{warnings:?}");
    assert_eq!(comparable(&drain(&mut recording)), comparable(&scene.events));
    // The second text's chunk is overwritten: the first and the third are there.
    let chunks = chunks(&scene.path);
    let begins: Vec<usize> =
        whole.windows(9).enumerate().filter(|(_, w)| w == b"{\"kind\":\"").map(|(i, _)| i).collect();
    assert_eq!(begins.len(), chunks.len());
    let mut bad = whole.clone();
    bad[begins[2]..begins[3]].fill(b'\n');
    std::fs::write(&path, &bad).unwrap();
    let (mut recording, warnings) = open(&path);
    assert!(warnings.len() == 1 && warnings[0].contains("damaged"), "{warnings:?}");
    let store = store(&scene.subject, &drain(&mut recording));
    assert_eq!(store.sequences().iter().map(|s| s.info.name.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    // Going on behind it destroys nothing.
    Recorder::append(&path, &scene.subject).unwrap().finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bad);
}

#[test]
fn a_text_is_cut_where_a_chunk_of_it_is_lost() {
    let shape = Shape { texts: vec![("long".into(), 1000)], ..tiny() };
    let scene = scene(&shape);
    let chunks = chunks(&scene.path);
    let at = chunks[3].0["blake3"].as_str().unwrap().to_owned();
    let mut bytes = std::fs::read(&scene.path).unwrap();
    let at = bytes.windows(64).position(|window| window == at.as_bytes()).unwrap() + 64 + 3 + chunks[3].1.len() - 1;
    bytes[at] ^= 1;
    std::fs::write(&scene.path, bytes).unwrap();
    let (mut recording, _) = open(&scene.path);
    let events = drain(&mut recording);
    let errors: Vec<&String> =
        events.iter().filter_map(|e| if let Event::Error(text) = e { Some(text) } else { None }).collect();
    assert!(errors.len() == 2 && errors[0].contains("hash") && errors[1].contains("left out"), "{errors:?}");
    let (found, whole) = (store(&scene.subject, &events), store(&scene.subject, &scene.events));
    assert_within(&found, &whole);
    let expected: u64 = chunks[..3].iter().filter_map(|(line, _)| line["tokens"].as_u64()).sum();
    assert_eq!(found.sequences()[0].tokens.len() as u64, expected);
    assert!(found.lost().1 > 0, "what is not shown is counted");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_never_give_other_numbers(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..=255), 1..4),
    ) {
        thread_local!(static SCENE: (Scene, Vec<u8>) = {
            let scene = scene(&tiny());
            let bytes = std::fs::read(&scene.path).unwrap();
            (scene, bytes)
        });
        SCENE.with(|(scene, bytes)| {
            let mut bytes = bytes.clone();
            for (at, flip) in &flips {
                let at = at.index(bytes.len());
                bytes[at] ^= flip;
            }
            let path = scene.path.with_extension("flipped");
            std::fs::write(&path, &bytes).unwrap();
            if let Ok((mut recording, warnings)) = Recording::open(&path) {
                let pieces = &recording.subject().pieces;
                assert!(pieces.is_empty() || *pieces == scene.subject.pieces);
                let is_whole = *recording.subject() == scene.subject;
                let events = drain(&mut recording);
                let told = events.iter().filter(|event| matches!(event, Event::Error(_))).count();
                let (found, whole) = (store(&scene.subject, &events), store(&scene.subject, &scene.events));
                assert_within(&found, &whole);
                // What is missing was said.
                let is_whole = is_whole && comparable(&events) == comparable(&scene.events);
                assert!(is_whole || told > 0 || !warnings.is_empty());
            }
        });
    }

    #[test]
    fn any_bytes_behind_the_first_line_are_no_reason_to_fail(
        rubbish in prop::collection::vec(any::<u8>(), 0..2000),
        starts in any::<bool>(),
    ) {
        thread_local!(static HEAD: (Scene, Vec<u8>) = {
            let scene = scene(&tiny());
            let head = head(&scene.path);
            (scene, head)
        });
        HEAD.with(|(scene, head)| {
            let path = scene.path.with_extension("rubbish");
            let start: &[u8] = if starts { br#"{"kind":"tokens","bytes":"# } else { b"" };
            std::fs::write(&path, [head, start, &rubbish].concat()).unwrap();
            let (mut recording, warnings) = open(&path);
            assert!(!warnings.is_empty());
            assert_eq!(drain(&mut recording), []);
        });
    }
}
