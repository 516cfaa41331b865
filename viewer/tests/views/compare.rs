//! The view compare, over a text and a version of it.

use egui::Theme;
use egui_kittest::kittest::Queryable as _;
use moewe_plan::{Edit, Numbers};

use moewe_viewer::numbers::{Cells, Table};
use moewe_viewer::source::Event;
use moewe_viewer::store::Store;

use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Compare;

use crate::harness::{Stage, picture, pictures, settle};

type Harness = egui_kittest::Harness<'static, Stage>;

/// Where the version's words are different for the first time.
const PARTS: u32 = 36;

/// Adds a version of the first text: expert 5 of layer 2 is muted, so that from layer 2 on every other token gets another
/// expert; from token 36 on the words are others.
pub fn add_version(stage: &mut Stage, shape: &Shape, number: u32) {
    let mut position = 0;
    for event in shape.events() {
        if let Some(mut event) = changed(event, number, shape.experts.0) {
            if let Event::Token { token, .. } = &mut event {
                // Every third word stays.
                token.id = (token.id + u32::from(position >= PARTS && position % 3 != 1)) % 12;
                position += 1;
            }
            stage.store.apply(event);
        }
    }
}

fn changed(event: Event, number: u32, experts: u32) -> Option<Event> {
    Some(match event {
        Event::Begin(mut info) if info.number == 0 => {
            info.number = number;
            info.name = format!("{}, mute 2:5", info.name);
            info.edits = vec!["mute 2:5".parse::<Edit>().expect("an edit")];
            info.parent = Some((0, 32));
            info.prompt_tokens = 32;
            Event::Begin(info)
        }
        Event::Token { sequence: 0, token } => Event::Token { sequence: number, token },
        Event::Frame(mut frame) if frame.tokens[0].sequence == 0 => {
            frame.times = None;
            let positions: Vec<u32> = frame.tokens.iter().map(|token| token.position).collect();
            for token in &mut frame.tokens {
                token.sequence = number;
            }
            for tensor in frame.tensors.iter_mut().filter(|tensor| tensor.layer.is_some_and(|layer| layer >= 2)) {
                let (columns, layer) = (tensor.columns as usize, tensor.layer.unwrap_or_default());
                let is_ids = tensor.name.starts_with("moe.") && tensor.name.ends_with(".ids");
                for (row, &position) in positions.iter().enumerate() {
                    let cells = row * columns..(row + 1) * columns;
                    match &mut tensor.data {
                        Numbers::U32(ids) if is_ids => {
                            let shift = if position >= PARTS { 3 } else { u32::from(position % 2 == 0) };
                            let few = if position >= PARTS { columns } else { 1 };
                            ids[cells].iter_mut().rev().take(few).for_each(|id| *id = (*id + shift) % experts);
                        }
                        Numbers::F32(numbers) if tensor.name.starts_with("hidden.") => {
                            let size = 0.1 * layer as f32 * if position >= PARTS { 4.0 } else { 1.0 };
                            numbers[cells].iter_mut().step_by(3).for_each(|number| *number += size);
                        }
                        _ => {}
                    }
                }
            }
            Event::Frame(frame)
        }
        Event::End { sequence: 0, reason, tokens_per_second } => {
            Event::End { sequence: number, reason, tokens_per_second }
        }
        _ => return None,
    })
}

fn stage() -> Stage {
    let shape = Shape::small();
    let mut stage = Stage::new(Box::<Compare>::default(), &shape);
    add_version(&mut stage, &shape, 3);
    stage
}

fn click(harness: &mut Harness, label: &str) {
    harness.get_by_label(label).click();
    settle(harness);
}

#[test]
fn looks() {
    pictures(&|| Box::<Compare>::default());
}

#[test]
fn versions_look() {
    let mut harness = stage().open(Theme::Dark);
    picture(&mut harness, "compare-versions");
    click(&mut harness, "experts in common");
    picture(&mut harness, "compare-overlap");
}

#[test]
fn hidden_states_look() {
    let mut harness = stage().open(Theme::Light);
    click(&mut harness, "hidden states");
    picture(&mut harness, "compare-hidden");
}

#[test]
fn little_room_looks() {
    let mut harness = stage().open(Theme::Light);
    harness.set_size(egui::vec2(460.0, 640.0));
    settle(&mut harness);
    picture(&mut harness, "compare-narrow");
}

fn table(tables: &[Table], name: &str) -> Table {
    tables.iter().find(|table| table.name == name).unwrap_or_else(|| panic!("no {name}")).clone()
}

/// A and B, where B was written anew, and where the words part.
fn texts(harness: &mut Harness) -> Vec<i64> {
    match table(&harness.state_mut().numbers(), "compare.texts").cells {
        Cells::I64(cells) => cells,
        other => panic!("{other:?}"),
    }
}

#[test]
fn words_and_maps_select() {
    let mut harness = stage().open(Theme::Dark);
    click(&mut harness, "token 38: A ·said, B ·to, different");
    assert_eq!(harness.state().selection.token, Some(38));
    click(&mut harness, "token 37: A ·king, B ·king");
    assert_eq!(harness.state().selection.token, Some(37));
    click(&mut harness, "The first different word is token 36.");
    assert_eq!(harness.state().selection.token, Some(36));
    harness.get_by_label_contains("routing by layer and token: map of 4 layer by 96 token").click();
    settle(&mut harness);
    let reached = harness.state().selection;
    harness.key_press(egui::Key::ArrowRight);
    settle(&mut harness);
    harness.key_press(egui::Key::ArrowUp);
    settle(&mut harness);
    let moved = harness.state().selection;
    assert_eq!((moved.token, moved.layer), (reached.token.map(|token| token + 1), reached.layer - 1));
    // The plot: its left end is layer 0.
    let plot = harness.get_by_label("routing by layer: plot").rect();
    let pos = plot.left_center() + egui::vec2(4.0, 0.0);
    harness.hover_at(pos);
    harness.run_steps(1);
    for pressed in [true, false] {
        let (button, modifiers) = (egui::PointerButton::Primary, egui::Modifiers::NONE);
        harness.event(egui::Event::PointerButton { pos, button, pressed, modifiers });
    }
    settle(&mut harness);
    assert_eq!(harness.state().selection.layer, 0);
    harness.get_by_label("has no experts");
}

#[test]
fn a_token_chosen_elsewhere_comes_into_sight() {
    let mut harness = stage().open(Theme::Dark);
    assert!(harness.query_by_label_contains("token 90:").is_none());
    harness.state_mut().selection.token = Some(90);
    settle(&mut harness);
    harness.get_by_label_contains("token 90:");
    harness.state_mut().selection.token = Some(2);
    settle(&mut harness);
    harness.get_by_label_contains("token 2:");
}

#[test]
fn texts_are_chosen_and_swapped() {
    let mut harness = stage().open(Theme::Dark);
    assert_eq!(texts(&mut harness), [0, 3, 32, 36]);
    add_version(harness.state_mut(), &Shape::small(), 4);
    settle(&mut harness);
    assert_eq!(texts(&mut harness), [0, 4, 32, 36], "the newest version");
    harness.state_mut().selection.other = Some(3);
    settle(&mut harness);
    click(&mut harness, "Swap");
    assert_eq!((harness.state().selection.sequence, harness.state().selection.other), (3, Some(0)));
    assert_eq!(texts(&mut harness), [3, 0, 32, 36]);
    click(&mut harness, "B");
    click(&mut harness, "1 · rust · 96 tokens");
    assert_eq!(harness.state().selection.other, Some(1));
    assert_eq!(texts(&mut harness)[2], -1, "no versions of one text");
    // The same text for both: they change places.
    click(&mut harness, "B");
    click(&mut harness, "3 · bible, mute 2:5 · 96 tokens");
    assert_eq!((harness.state().selection.sequence, harness.state().selection.other), (1, Some(3)));
    // A text to compare with that is no more.
    harness.state_mut().selection.other = Some(99);
    settle(&mut harness);
    assert_eq!(texts(&mut harness)[..2], [1, 0]);
}

#[test]
fn experts_that_differ_are_listed_and_select() {
    let mut harness = Stage::new(Box::<Compare>::default(), &Shape::small()).open(Theme::Dark);
    click(&mut harness, "expert 3:19: A 11.2 %, B 0.0 %");
    assert_eq!((harness.state().selection.layer, harness.state().selection.expert), (3, Some(19)));
    harness.get_by_label_contains("share in B less share in A by layer and expert: map of 4").click();
    settle(&mut harness);
    assert_ne!(harness.state().selection.expert, Some(19));
    click(&mut harness, "by position");
    harness.get_by_label("The first different word is token 0.");
}

#[test]
fn numbers_are_what_was_made_up() {
    let mut harness = stage().open(Theme::Dark);
    let tables = harness.state_mut().numbers();
    let Cells::F32(overlap) = table(&tables, "compare.overlap").cells else { panic!() };
    // Layer 1 is the same; behind it one of four experts changes in every other token, then all.
    let expected = |layer: usize, token: usize| match (layer, token) {
        (1, _) => 1.0,
        (_, token) if token >= PARTS as usize => 0.0,
        (_, token) => {
            if token % 2 == 0 {
                0.75
            } else {
                1.0
            }
        }
    };
    for layer in 1..4 {
        for token in 0..96 {
            let found = overlap[layer * 96 + token];
            assert!((found - expected(layer, token)).abs() < 1e-6, "layer {layer}, token {token}: {found}");
        }
    }
    assert!(overlap[..96].iter().all(|share| share.is_nan()));
    let before = table(&tables, "compare.overlap.before");
    let Cells::F32(cells) = &before.cells else { panic!() };
    assert_eq!(cells[2 * 4..3 * 4], [0.875, 0.75, 1.0, 36.0]);
    for (name, shape) in [
        ("compare.divergence", vec![4, 96]),
        ("compare.cosine", vec![4, 96]),
        ("compare.cosine.after", vec![4, 4]),
        ("compare.load.divergence", vec![4]),
        ("compare.load.a", vec![4, 32]),
        ("compare.load.b.tokens", vec![4]),
        ("compare.tokens.b", vec![96]),
        ("compare.names", vec![2]),
    ] {
        assert_eq!(table(&tables, name).shape, shape, "{name}");
    }
    let Cells::F32(shares) = table(&tables, "compare.load.b").cells else { panic!() };
    assert!((shares[32..64].iter().sum::<f32>() - 1.0).abs() < 1e-5);
}

#[test]
fn what_is_missing_is_said() {
    let mut shape = Shape::small();
    shape.taps = "logits".parse().expect("a group");
    let mut stage = Stage::new(Box::<Compare>::default(), &shape);
    add_version(&mut stage, &shape, 3);
    let mut harness = stage.open(Theme::Dark);
    harness.get_by_label("No routing of the same tokens of both texts");
    harness.get_by_label_contains("--taps routing");
    click(&mut harness, "hidden states");
    harness.get_by_label_contains("--taps hidden");
    // Rows of the first 64 tokens of the version never came.
    let shape = Shape::small();
    let mut stage = Stage::new(Box::<Compare>::default(), &shape);
    let events = shape.events().filter_map(|event| changed(event, 3, 32));
    let mut frames = 0;
    for event in events {
        frames += usize::from(matches!(event, Event::Frame(_)));
        if frames != 1 || !matches!(event, Event::Frame(_)) {
            stage.store.apply(event);
        }
    }
    let harness = stage.open(Theme::Dark);
    harness.get_by_label("All 96 words that both have are the same.");
    harness.get_by_label_contains("same words: mean 1, largest 1, 32 of 96 tokens");
}

#[test]
fn one_text_is_not_enough() {
    let mut shape = Shape::small();
    shape.texts.truncate(1);
    let mut stage = Stage::new(Box::<Compare>::default(), &shape);
    stage.is_live = false;
    let mut harness = stage.open(Theme::Dark);
    harness.get_by_label("It takes two texts to compare");
    harness.get_by_label_contains("--against");
    assert!(harness.state_mut().numbers().is_empty());
    harness.state_mut().store = Store::new(32, 1 << 20);
    settle(&mut harness);
}
