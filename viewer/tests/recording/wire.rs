//! Recordings that are sent in messages.

use std::sync::Arc;

use moewe_plan::{FrameTensor, FrameToken, Numbers, TapFrame, TapGroup};
use moewe_viewer::recording::wire::{Decoder, Encoder, beginning};
use moewe_viewer::source::Event;
use moewe_viewer::store::{SequenceInfo, Token};
use moewe_viewer::subject::Subject;
use moewe_viewer::synthetic::Shape;
use proptest::prelude::*;

use crate::tools::{assert_same, comparable, open, read, store, tiny};

/// The messages of a scene, a new one after each `step` events.
fn messages(subject: &Subject, events: &[Event], step: usize) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(Arc::new(subject.clone()));
    let mut messages = vec![beginning(subject).unwrap()];
    for events in events.chunks(step) {
        for event in events {
            encoder.push(event).unwrap();
        }
        messages.extend(encoder.messages().unwrap());
    }
    messages
}

fn told(messages: &[Vec<u8>]) -> (Subject, Vec<Event>) {
    let mut decoder = Decoder::new(&messages[0]).unwrap();
    let events = messages[1..].iter().flat_map(|message| decoder.events(message).unwrap()).collect();
    (decoder.subject().clone(), events)
}

#[test]
fn what_is_sent_comes_out_and_is_a_recording() {
    for (shape, step) in [(tiny(), 1), (tiny(), 1000), (Shape::small(), 7), (Shape::small(), 100_000)] {
        let (subject, events) = (shape.subject(), shape.events().collect::<Vec<_>>());
        let messages = messages(&subject, &events, step);
        let (told_subject, told) = told(&messages);
        assert_eq!(told_subject, subject);
        assert!(comparable(&told) == comparable(&events), "events differ");
        assert_same(&store(&subject, &told), &store(&subject, &events));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sent");
        std::fs::write(&path, messages.concat()).unwrap();
        assert_eq!(open(&path).0.subject(), &subject);
        assert!(comparable(&read(&path)) == comparable(&events), "events differ in the file");
    }
}

#[test]
fn nothing_new_is_no_message() {
    let subject = Arc::new(tiny().subject());
    let mut encoder = Encoder::new(subject);
    assert_eq!(encoder.messages().unwrap(), Vec::<Vec<u8>>::new());
    encoder.push(&Event::Note("x".into())).unwrap();
    assert_eq!(encoder.messages().unwrap().len(), 1);
    assert_eq!(encoder.messages().unwrap(), Vec::<Vec<u8>>::new());
}

#[test]
fn events_that_make_no_sense_are_left_out_alone() {
    let subject = Arc::new(tiny().subject());
    let mut encoder = Encoder::new(Arc::clone(&subject));
    let token = |sequence| Event::Token { sequence, token: Token::default() };
    let end = Event::End { sequence: 4, reason: "stop".into(), tokens_per_second: 1.0 };
    let begin = Event::Begin(SequenceInfo { number: 4, ..SequenceInfo::default() });
    // 5120 rows of 2048 numbers have 40 MiB, and one more has more.
    let wide = |rows: usize| {
        let data = Numbers::F32(vec![0.5; rows * 2048]);
        let tensor =
            FrameTensor { name: "hidden.1".into(), group: TapGroup::Hidden, layer: Some(0), columns: 2048, data };
        let tokens = (0..rows as u32).map(|position| FrameToken { sequence: 4, position, id: 0 }).collect();
        Event::Frame(TapFrame { tokens, tensors: vec![tensor], ..TapFrame::default() })
    };
    let sound = [begin, token(4), wide(5120), end];
    assert!(encoder.push(&token(4)).unwrap_err().contains("never began"));
    for event in &sound {
        encoder.push(event).unwrap();
    }
    assert!(encoder.push(&token(4)).unwrap_err().contains("never began"), "it ended");
    assert!(encoder.push(&wide(5121)).unwrap_err().contains("at most 41943040"));
    let mut all = vec![beginning(&subject).unwrap()];
    all.extend(encoder.messages().unwrap());
    assert!(comparable(&told(&all).1) == comparable(&sound));
}

#[test]
fn wrong_messages_are_refused_with_a_reason() {
    let shape = tiny();
    let messages = messages(&shape.subject(), &shape.events().collect::<Vec<_>>(), 1000);
    let refused = |message: &[u8]| Decoder::new(message).err().unwrap();
    let line = messages[0].iter().position(|byte| *byte == b'\n').unwrap() + 1;
    assert_eq!(refused(b""), "no line ends in the first 0 bytes");
    assert_eq!(refused(b"hello\n"), "no beginning of a recording: it does not begin as one");
    assert_eq!(refused(&messages[0][..line]), "no line ends in the first 0 bytes");
    assert!(refused(&messages[0][..messages[0].len() - 1]).contains("hash"));
    let other = String::from_utf8_lossy(&messages[0]).replacen(r#""version":1"#, r#""version":9"#, 1);
    assert_eq!(refused(other.as_bytes()), "format 9, this moewe reads format 1");
    assert_eq!(refused(&[&messages[0][..line], &messages[1]].concat()), "the model's texts and biases are missing");

    let mut decoder = Decoder::new(&messages[0]).unwrap();
    let mut refused = |message: &[u8]| decoder.events(message).unwrap_err();
    assert_eq!(refused(&messages[0][line..]), "the model is told of a second time");
    assert!(refused(&messages[1][1..]).contains("hash"));
    assert!(refused(&[&messages[1][..], &messages[1]].concat()).contains("hash"));
    assert!(decoder.events(&messages[1]).is_ok(), "what was refused leaves no trace");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_no_reason_to_fail(at in 0usize..100_000, bytes in prop::collection::vec(any::<u8>(), 0..40), cut in any::<bool>()) {
        let shape = tiny();
        let sent = messages(&shape.subject(), &shape.events().collect::<Vec<_>>(), 1000);
        for message in &sent {
            let mut changed = message.clone();
            let at = at % changed.len();
            if cut {
                changed.truncate(at);
                changed.extend(&bytes);
            } else {
                let end = (at + bytes.len()).min(changed.len());
                changed.splice(at..end, bytes.iter().copied());
            }
            prop_assume!(changed != *message);
            prop_assert!(Decoder::new(&changed).is_err());
            prop_assert!(Decoder::new(&sent[0]).unwrap().events(&changed).is_err());
        }
    }
}
