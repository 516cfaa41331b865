//! A window in the same process draws with the same device: it submits, polls and makes mistakes of its own, and neither
//! side waits for the other or answers for its errors.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{continuation, load, plan, prompt};
use moewe_plan::{ProgramKind, Sampling};
use moewe_runtime::{Handles, Session, SessionOptions, Watch};
use wgpu::{BufferDescriptor, BufferUsages, MapMode, PollType};

fn session() -> Session {
    let kinds = vec![ProgramKind::Forward, ProgramKind::Watch];
    let watch = Some(Watch { taps: "hidden,routing,timing".parse().unwrap(), ..Watch::default() });
    Session::new(load(plan()).unwrap(), SessionOptions { kinds, watch, ..SessionOptions::default() }).unwrap()
}

fn buffer(handles: &Handles, usage: BufferUsages) -> wgpu::Buffer {
    let descriptor = BufferDescriptor { label: Some("window"), size: 1 << 16, usage, mapped_at_creation: false };
    handles.device.create_buffer(&descriptor)
}

/// Copies, maps, destroys and polls until told to stop; counts its rounds.
fn draw(handles: &Handles, stop: &AtomicBool, rounds: &AtomicU64) {
    let source = buffer(handles, BufferUsages::COPY_SRC | BufferUsages::COPY_DST);
    while !stop.load(Ordering::Relaxed) {
        let target = buffer(handles, BufferUsages::COPY_DST | BufferUsages::MAP_READ);
        let round = rounds.fetch_add(1, Ordering::Relaxed);
        handles.queue.write_buffer(&source, 0, &round.to_le_bytes());
        let mut encoder = handles.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&source, 0, &target, 0, 1 << 16);
        let index = handles.queue.submit([encoder.finish()]);
        target.map_async(MapMode::Read, .., |mapped| mapped.expect("the window's buffer can be mapped"));
        handles.device.poll(PollType::Poll).unwrap();
        handles.device.poll(PollType::Wait { submission_index: Some(index), timeout: None }).unwrap();
        target.unmap();
        // Takes wgpu's lock for itself, as a window does that shows a picture.
        target.destroy();
    }
}

#[test]
fn a_window_that_submits_and_polls_changes_no_token_and_no_frame() {
    let mut session = session();
    let handles = session.model().gpu().handles();
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let ids = prompt(60, 3);
    let expected = continuation(&ids, 65, false);
    std::thread::scope(|scope| {
        let windows: Vec<_> = (0..2).map(|_| scope.spawn(|| draw(&handles, &stop, &rounds))).collect();
        for _ in 0..6 {
            let receiver = session.frame_receiver().unwrap();
            let reader = scope.spawn(move || (0..4 + 64).map(|_| receiver.recv().unwrap()).collect::<Vec<_>>());
            let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
            let mut tokens = session.prefill(&[sequence], Some(15)).unwrap();
            for _ in 0..2 {
                tokens.extend(session.decode(&[sequence], 32).unwrap().into_iter().flatten());
            }
            assert_eq!(tokens, expected);
            let frames = reader.join().unwrap();
            let all = session.tokens(sequence).unwrap();
            let rows: Vec<_> = frames.iter().flat_map(|frame| &frame.tokens).collect();
            assert!(
                rows.iter()
                    .zip(0..)
                    .all(|(row, position)| (row.position, row.id) == (position, all[position as usize]))
            );
            assert_eq!((rows.len(), session.dropped()), (124, 0));
            session.remove_sequence(sequence).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        for window in windows {
            window.join().unwrap();
        }
    });
    assert!(rounds.load(Ordering::Relaxed) > 20, "the window had its turns");
    assert_eq!(session.model().gpu().stray_error(), None);
}

#[test]
fn errors_of_a_window_are_not_ours_and_not_lost() {
    let mut session = session();
    let gpu = session.model().gpu().clone();
    let handles = gpu.handles();
    let ids = prompt(20, 3);
    let sequence = session.add_sequence(&ids, Sampling::default()).unwrap();
    let mut tokens = session.prefill(&[sequence], None).unwrap();
    // On this thread and on another one: buffers for uses that exclude one another.
    let mistake = || drop(buffer(&handles, BufferUsages::MAP_READ | BufferUsages::STORAGE));
    for other_thread in [false, true] {
        assert_eq!(gpu.stray_error(), None);
        if other_thread {
            std::thread::scope(|scope| scope.spawn(mistake).join().unwrap());
        } else {
            mistake();
        }
        tokens.extend(session.decode(&[sequence], 3).unwrap().into_iter().flatten());
        let stray = gpu.stray_error().expect("the error is told to whoever asks");
        assert!(stray.contains("window"), "{stray}");
    }
    // In a scope of its own, it is the window's alone.
    let scope = handles.device.push_error_scope(wgpu::ErrorFilter::Validation);
    mistake();
    tokens.extend(session.decode(&[sequence], 3).unwrap().into_iter().flatten());
    assert!(pollster::block_on(scope.pop()).is_some());
    assert_eq!(gpu.stray_error(), None);
    assert_eq!(tokens, continuation(&ids, 10, false));
    // The handles keep the device open when all else is gone.
    drop((session, gpu));
    buffer(&handles, BufferUsages::COPY_DST);
    handles.device.poll(PollType::wait_indefinitely()).unwrap();
}
