use egui::{Key, Theme};
use egui_kittest::kittest::Queryable;
use moewe_viewer::numbers::Cells;
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Depth;

use crate::harness::{Stage, picture, pictures, settle};

fn view() -> Box<Depth> {
    Box::default()
}

fn small() -> Stage {
    Stage::new(view(), &Shape::small())
}

fn full() -> Stage {
    Stage::new(view(), &Shape { taps: "lens,logits".parse().unwrap(), ..Shape::full() })
}

#[test]
fn looks() {
    pictures(&|| view());
}

#[test]
fn looks_of_whole_texts_and_many_layers() {
    let mut stage = full();
    stage.selection.layer = 47;
    let mut harness = stage.open(Theme::Dark);
    picture(&mut harness, "depth-full-token");
    harness.get_by_label("text").click();
    settle(&mut harness);
    picture(&mut harness, "depth-full-text");
}

#[test]
fn looks_of_probabilities() {
    let mut harness = small().open(Theme::Light);
    harness.get_by_label("text").click();
    settle(&mut harness);
    harness.get_by_label("probability").click();
    settle(&mut harness);
    picture(&mut harness, "depth-probability");
}

#[test]
fn layers_are_chosen_by_click_and_by_arrow() {
    let mut harness = small().open(Theme::Dark);
    harness.get_by_label_contains("layer 1: ").click();
    settle(&mut harness);
    assert_eq!(harness.state().selection.layer, 1);
    harness.key_press(Key::ArrowDown);
    settle(&mut harness);
    harness.key_press(Key::ArrowDown);
    settle(&mut harness);
    assert_eq!(harness.state().selection.layer, 3);
    harness.key_press(Key::ArrowDown);
    settle(&mut harness);
    assert_eq!(harness.state().selection.layer, 3, "there is none below");
}

#[test]
fn cells_of_the_map_are_chosen_by_arrow_and_click() {
    let mut harness = small().open(Theme::Dark);
    harness.get_by_label("text").click();
    settle(&mut harness);
    let map = harness.get_by_label_contains("rank of the answer by layer and token");
    map.focus();
    harness.run_steps(2);
    harness.key_press(Key::ArrowUp);
    settle(&mut harness);
    harness.key_press(Key::ArrowRight);
    settle(&mut harness);
    let selection = harness.state().selection;
    assert_eq!((selection.layer, selection.token), (1, Some(21)));
    // The middle of the map: 44 points of labels are left of it.
    harness.get_by_label_contains("rank of the answer by layer and token").click();
    settle(&mut harness);
    let selection = harness.state().selection;
    assert!(selection.token.is_some_and(|token| (40..56).contains(&token)), "{selection:?}");
}

#[test]
fn what_was_not_recorded_is_said() {
    let mut stage = Stage::new(view(), &Shape { taps: "routing".parse().unwrap(), ..Shape::small() });
    assert!(stage.numbers().is_empty());
    stage.open(Theme::Dark).get_by_label_contains("record with --taps lens");
    let stage = Stage::new(view(), &Shape { taps: "lens:1".parse().unwrap(), ..Shape::small() });
    stage.open(Theme::Dark).get_by_label_contains("1 of 4 layers were recorded");
}

#[test]
fn answers_settle_where_the_numbers_say() {
    let mut stage = full();
    let tables = stage.numbers();
    let table = |name: &str| tables.iter().find(|table| table.name == name).unwrap();
    assert_eq!(table("lens.rank").shape, [61, 2048]);
    // 4 (1 − layer / 61) falls below 1 at layer 46.
    assert_eq!(table("lens.settles_at_layer").cells, Cells::I64(vec![46; 2048]));
    stage.open(Theme::Dark).get_by_label_contains("stays on top from layer 46 on");
}
