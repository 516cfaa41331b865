use std::sync::Arc;

use egui::{Key, Theme};
use egui_kittest::kittest::{NodeT, Queryable};
use moewe_plan::{FrameToken, RunTimes, TapFrame};
use moewe_viewer::numbers::Cells;
use moewe_viewer::subject::Subject;
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Time;

use crate::harness::{Stage, picture, pictures, settle};

fn view() -> Box<Time> {
    Box::default()
}

/// Runs of 64 tokens, as made up, and behind them runs that draw one token each, slower and slower.
fn with_decode(shape: &Shape) -> Stage {
    let mut stage = Stage::new(view(), shape);
    let mut subject: Subject = (*stage.subject).clone();
    for step in &mut subject.programs[0] {
        if step.kernel == "latent_attention" {
            step.cost.context_bytes = 64;
        }
    }
    let steps = subject.programs[0].len() as u64;
    for position in 0..40u64 {
        let durations: Vec<u64> =
            (0..steps).map(|step| (30 + step * 31 % 101) * (1000 + 10 * position) * (1 + step % 3)).collect();
        let starts = durations.iter().scan(0, |at, duration| {
            *at += duration + 4_000;
            Some(Some(*at - duration))
        });
        let times = RunTimes { program: 0, rows: 1, starts: starts.collect(), durations };
        let token = FrameToken { sequence: 0, position: 96 + position as u32, id: 0 };
        let frame = TapFrame { number: 1000 + position, tokens: vec![token], tensors: Vec::new(), times: Some(times) };
        stage.store.push_frame(&frame);
    }
    stage.subject = Arc::new(subject);
    stage
}

fn integer(stage: &mut Stage, name: &str) -> i64 {
    match &stage.numbers().iter().find(|table| table.name == name).unwrap().cells {
        Cells::I64(cells) => cells[0],
        _ => panic!("integers"),
    }
}

#[test]
fn looks() {
    pictures(&|| view());
}

#[test]
fn looks_of_every_mode() {
    let mut harness = with_decode(&Shape::small()).open(Theme::Light);
    picture(&mut harness, "time-kernels");
    for mode in ["layers", "one run", "history"] {
        harness.get_by_label(mode).click();
        settle(&mut harness);
        picture(&mut harness, &format!("time-{}", mode.replace(' ', "-")));
    }
}

#[test]
fn looks_of_many_layers() {
    let mut harness = with_decode(&Shape { taps: "timing".parse().unwrap(), ..Shape::full() }).open(Theme::Dark);
    harness.get_by_label("layers").click();
    settle(&mut harness);
    picture(&mut harness, "time-full-layers");
    harness.get_by_label("one run").click();
    settle(&mut harness);
    picture(&mut harness, "time-full-one-run");
}

#[test]
fn prefill_and_decode_are_kept_apart() {
    let mut stage = with_decode(&Shape::small());
    assert_eq!(integer(&mut stage, "time.decode.median_over_runs"), 40);
    let mut harness = stage.open(Theme::Dark);
    harness.get_by_label_contains("Median of the last 40 runs");
    harness.get_by_label("prefill (6)").click();
    settle(&mut harness);
    harness.get_by_label_contains("Median of the last 6 runs");
    assert_eq!(integer(harness.state_mut(), "time.prefill.median_over_runs"), 6);
}

#[test]
fn numbers_are_durations_and_floors() {
    let mut stage = with_decode(&Shape::small());
    let tables = stage.numbers();
    let floats = |name: &str| match &tables.iter().find(|table| table.name == name).unwrap().cells {
        Cells::F32(cells) => cells.clone(),
        _ => panic!("floats"),
    };
    let Cells::Text(kernels) = &tables.iter().find(|t| t.name == "time.decode.kernels").unwrap().cells else {
        panic!("words")
    };
    let down = kernels.iter().position(|kernel| kernel == "experts_down").unwrap();
    // Four layers of 2^20 bytes and a sixteenth of that for the token, at 10^9 bytes a second.
    let floor = 4.0 * f64::from((1 << 20) + (1 << 16)) / 1e9;
    assert!((f64::from(floats("time.decode.kernel_floor_seconds")[down]) - floor).abs() < 1e-8);
    let total: f32 = floats("time.decode.kernel_seconds").iter().sum();
    let cells: f32 = floats("time.decode.layer_seconds").iter().sum();
    assert!((total - cells).abs() < total * 1e-3);
    let gaps = floats("time.runs.gap_seconds");
    assert!((gaps[gaps.len() - 1] - 11.0 * 4e-6).abs() < 1e-9, "between twelve steps");
}

#[test]
fn arrow_keys_walk_along_a_run() {
    let mut harness = with_decode(&Shape::small()).open(Theme::Dark);
    harness.get_by_label("one run").click();
    settle(&mut harness);
    harness.get_by_label_contains("steps of run 1039").focus();
    harness.run_steps(2);
    for layer in [0, 0, 0, 1] {
        harness.key_press(Key::ArrowRight);
        settle(&mut harness);
        assert_eq!(harness.state().selection.layer, layer);
    }
    let said = harness.get_by_label_contains(" moved, ").accesskit_node().value().unwrap();
    assert!(said.starts_with("layers.1.latent_attention: "), "{said}");
}

#[test]
fn what_is_missing_is_said() {
    let mut stage = Stage::new(view(), &Shape { taps: "routing".parse().unwrap(), ..Shape::small() });
    assert!(stage.numbers().is_empty());
    let harness = stage.open(Theme::Dark);
    harness.get_by_label_contains("--taps timing");
    harness.get_by_label_contains("no timestamps");
    let mut stage = with_decode(&Shape::small());
    let mut subject: Subject = (*stage.subject).clone();
    subject.bytes_per_second = None;
    stage.subject = Arc::new(subject.clone());
    stage.open(Theme::Dark).get_by_label_contains("speed was not measured");
    let mut stage = with_decode(&Shape::small());
    subject.programs.clear();
    stage.subject = Arc::new(subject);
    stage.open(Theme::Dark).get_by_label_contains("46 runs are left out");
}
