//! Time that is moved.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moewe_viewer::recording::Recording;
use moewe_viewer::source::{Command, Event, Request, Source};
use moewe_viewer::store::Store;
use moewe_viewer::synthetic::Shape;

use crate::tools::{assert_same, assert_within, drain, open, scene, store, tiny};

#[test]
fn time_moves_forward_backward_and_by_steps() {
    let scene = scene(&Shape::small());
    let subject = &scene.subject;
    let (mut recording, _) = open(&scene.path);
    let mut shown = Store::new(subject.model.experts, 256 << 20);
    let mut show = |recording: &mut Recording| {
        for event in drain(recording) {
            shown.apply(event);
        }
        let tokens = shown.sequences().iter().map(|s| s.tokens.len() as u64).sum::<u64>();
        (tokens, shown.clone())
    };
    let whole = store(subject, &scene.events);
    assert_eq!(recording.replay().unwrap().len(), 288);
    assert_same(&show(&mut recording).1, &whole);
    // Back, forward, over the end, to the beginning.
    for (target, expected) in [(100, 100), (101, 101), (250, 250), (249, 249), (9999, 288), (0, 0), (1, 1), (288, 288)]
    {
        recording.replay().unwrap().seek(target);
        let (tokens, store) = show(&mut recording);
        assert_eq!((tokens, recording.replay().unwrap().position()), (expected, expected));
        assert_within(&store, &whole);
        assert_eq!(recording.status().progress, Some((expected, 288)));
    }
    let (tokens, store) = show(&mut recording);
    assert_eq!(tokens, 288);
    assert_same(&store, &whole);
    // Tokens with what was seen up to them: the first run has 64.
    recording.replay().unwrap().seek(64);
    let (_, store) = show(&mut recording);
    assert!(store.sequence(0).unwrap().routing(1, 63).is_some() && store.sequence(1).is_none());
    assert!(!recording.status().busy && recording.poll().is_empty(), "it stands still");
}

#[test]
fn it_plays_at_a_speed_and_stops_at_the_end() {
    let scene = scene(&tiny());
    let (mut recording, _) = open(&scene.path);
    let woken = Arc::new(AtomicUsize::new(0));
    recording.set_wake(Box::new({
        let woken = Arc::clone(&woken);
        move || {
            woken.fetch_add(1, Ordering::Relaxed);
        }
    }));
    recording.replay().unwrap().seek(0);
    drain(&mut recording);
    recording.replay().unwrap().set_speed(50.0);
    assert!((recording.replay().unwrap().speed() - 50.0).abs() < 1e-9);
    let (started, before) = (Instant::now(), woken.load(Ordering::Relaxed));
    let mut tokens = 0;
    while recording.replay().unwrap().speed() > 0.0 {
        assert!(started.elapsed() < Duration::from_secs(20));
        tokens += recording.poll().iter().filter(|event| matches!(event, Event::Token { .. })).count();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(tokens, 9);
    assert!(started.elapsed() >= Duration::from_millis(150), "9 tokens take 180 ms, took {:?}", started.elapsed());
    assert!(woken.load(Ordering::Relaxed) > before, "the window is woken");
    // Standing still in the middle.
    recording.replay().unwrap().seek(2);
    drain(&mut recording);
    recording.replay().unwrap().set_speed(0.5);
    recording.replay().unwrap().set_speed(0.0);
    std::thread::sleep(Duration::from_millis(20));
    assert!(recording.poll().is_empty());
    assert_eq!(recording.replay().unwrap().position(), 2);
    for odd in [f64::NAN, f64::INFINITY, -1.0] {
        recording.replay().unwrap().set_speed(odd);
        assert!(recording.replay().unwrap().speed().abs() < f64::EPSILON);
    }
    recording.replay().unwrap().set_speed(1e300);
    std::thread::sleep(Duration::from_millis(5));
    recording.poll();
    drain(&mut recording);
    assert_eq!(recording.replay().unwrap().position(), 9);
}

#[test]
fn a_recording_says_that_it_cannot_write() {
    let scene = scene(&tiny());
    let (mut recording, _) = open(&scene.path);
    drain(&mut recording);
    assert!(!recording.status().is_live);
    recording.send(Command::Generate(Request::default()));
    assert!(matches!(&recording.poll()[..], [Event::Error(text)] if text.contains("moewe view MODEL")));
}
