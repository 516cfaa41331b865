//! Recordings that are continued, and files that are not overwritten.

use moewe_viewer::recording::{Error, Recorder};
use moewe_viewer::source::Event;
use moewe_viewer::store::SequenceInfo;

use crate::tools::{read, scene, store, tiny};

#[test]
fn going_on_shifts_numbers_and_removes_what_was_cut_off() {
    let scene = scene(&tiny());
    let bytes = std::fs::read(&scene.path).unwrap();
    std::fs::write(&scene.path, &bytes[..bytes.len() - 10]).unwrap(); // the third text is lost
    let mut recorder = Recorder::append(&scene.path, &scene.subject).unwrap();
    let child = Event::Begin(SequenceInfo { number: 5, parent: Some((1, 1)), ..SequenceInfo::default() });
    for event in scene.events.iter().chain([&child]) {
        recorder.push(event).unwrap();
    }
    recorder.finish().unwrap();
    let events = read(&scene.path);
    let store = store(&scene.subject, &events);
    let numbers: Vec<u32> = store.sequences().iter().map(|sequence| sequence.info.number).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 7]);
    assert_eq!(store.sequence(7).unwrap().info.parent, Some((3, 1)));
    assert_eq!(store.sequence(2).unwrap().tokens, store.sequence(0).unwrap().tokens);
    assert_eq!(store.sequence(2).unwrap().routing(1, 2), store.sequence(0).unwrap().routing(1, 2));
    assert_eq!(store.runs().iter().map(|run| run.number).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
}

#[test]
fn going_on_with_something_else_is_refused() {
    let scene = scene(&tiny());
    let before = std::fs::read(&scene.path).unwrap();
    let mut other = scene.subject.clone();
    other.model.checkpoint = "another".into();
    let mut fast = scene.subject.clone();
    fast.precision = "fast".into();
    let mut device = scene.subject.clone();
    device.device = "another".into();
    let mut compiled = scene.subject.clone();
    compiled.programs[0].pop();
    for (subject, word) in [(other, "checkpoint"), (fast, "precision"), (device, "device"), (compiled, "compiled")] {
        let error = Recorder::append(&scene.path, &subject).map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::OtherSubject { what, .. } if what.contains(word)), "{error}");
    }
    assert_eq!(std::fs::read(&scene.path).unwrap(), before);
    let text = scene.path.with_extension("txt");
    std::fs::write(&text, "my thesis").unwrap();
    assert!(matches!(Recorder::append(&text, &scene.subject), Err(Error::NotARecording { .. })));
    assert!(matches!(Recorder::create(&text, &scene.subject), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read(&text).unwrap(), b"my thesis");
    let none = scene.path.with_extension("none");
    assert!(matches!(Recorder::append(&none, &scene.subject), Err(Error::Write { .. })));
    assert!(!none.exists());
}

#[test]
fn one_recorder_at_a_time_writes_a_file() {
    let scene = scene(&tiny());
    let recorder = Recorder::create(&scene.path, &scene.subject).unwrap();
    assert!(matches!(Recorder::create(&scene.path, &scene.subject), Err(Error::InUse { .. })));
    assert!(matches!(Recorder::append(&scene.path, &scene.subject), Err(Error::InUse { .. })));
    drop(recorder);
    Recorder::append(&scene.path, &scene.subject).unwrap();
}
