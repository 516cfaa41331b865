use egui_kittest::kittest::Queryable;
use egui_kittest::{Harness, SnapshotResults};
use moewe_viewer::numbers::{Cells, Table};
use moewe_viewer::synthetic::Shape;
use moewe_viewer::view::View;
use moewe_viewer::views::Balance;

use crate::harness::{Stage, pictures, settle};

fn view() -> Box<dyn View> {
    Box::new(Balance::default())
}

/// Opens a page and takes the pointer away.
fn open(harness: &mut Harness<'_, Stage>, page: &str) {
    harness.get_by_label(page).click();
    harness.step();
    harness.event(egui::Event::PointerGone);
    settle(harness);
}

fn table<'a>(tables: &'a [Table], name: &str) -> &'a Table {
    tables.iter().find(|table| table.name == name).unwrap_or_else(|| panic!("no table {name}"))
}

fn integers(table: &Table) -> &[i64] {
    match &table.cells {
        Cells::I64(cells) => cells,
        other => panic!("{}: {other:?}", table.name),
    }
}

#[test]
fn balance_pictures() {
    pictures(&view);
}

#[test]
fn pages_have_pictures_too() {
    let mut results = SnapshotResults::new();
    for (page, name, shape) in [
        ("Layers", "balance-layers", Shape::small()),
        ("Placement", "balance-placement", Shape::small()),
        ("Placement", "balance-placement-full", Shape::full()),
    ] {
        let mut harness = Stage::new(view(), &shape).open(egui::Theme::Light);
        open(&mut harness, page);
        crate::harness::picture(&mut harness, name);
        results.extend_harness(&mut harness);
    }
}

#[test]
fn a_cell_of_the_map_selects_layer_and_expert_and_arrows_move() {
    let mut harness = Stage::new(view(), &Shape::small()).open(egui::Theme::Dark);
    let map = "load by layer and expert: map of 4 layer by 32 expert";
    harness.get_by_label(map).click();
    settle(&mut harness);
    let chosen = harness.state().selection;
    assert!(chosen.expert != Some(5), "the middle is not expert 5: {chosen:?}");
    for (key, layer, expert) in
        [(egui::Key::ArrowDown, 1, 0), (egui::Key::ArrowRight, 0, 1), (egui::Key::ArrowRight, 0, 1)]
    {
        let before = harness.state().selection;
        harness.key_press(key);
        settle(&mut harness);
        let after = harness.state().selection;
        let moved = (after.layer, after.expert.unwrap());
        assert_eq!(moved, ((before.layer + layer).min(3), (before.expert.unwrap() + expert).min(31)));
    }
}

#[test]
fn bars_select_experts_and_arrows_move_between_them() {
    let mut harness = Stage::new(view(), &Shape::small()).open(egui::Theme::Dark);
    harness.get_by_label("load by expert, layer 2: 32 bars, one for each expert").click();
    settle(&mut harness);
    let clicked = harness.state().selection.expert.unwrap();
    assert!((14..18).contains(&clicked), "the middle of 32 experts, not {clicked}");
    for (key, expert) in
        [(egui::Key::ArrowRight, clicked + 1), (egui::Key::ArrowLeft, clicked), (egui::Key::ArrowLeft, clicked - 1)]
    {
        harness.key_press(key);
        settle(&mut harness);
        assert_eq!(harness.state().selection.expert, Some(expert));
    }
}

#[test]
fn the_table_sorts_and_selects() {
    let mut harness = Stage::new(view(), &Shape::full()).open(egui::Theme::Dark);
    open(&mut harness, "Layers");
    let top = |harness: &Harness<'_, Stage>, layer: &str| harness.get_by_label(layer).rect().top();
    assert!(top(&harness, "1") < top(&harness, "3"));
    open(&mut harness, "layer (rising)");
    assert!(harness.query_by_label("layer (falling)").is_some());
    assert!(top(&harness, "60") < top(&harness, "58"));
    harness.get_by_label("58").click();
    settle(&mut harness);
    assert_eq!(harness.state().selection.layer, 58);
}

#[test]
fn what_cannot_be_placed_is_explained() {
    let mut harness = Stage::new(view(), &Shape::small()).open(egui::Theme::Dark);
    open(&mut harness, "Placement");
    assert!(harness.query_by_label_contains("8 experts have copies").is_some());
    harness.get_by_role_and_label(egui::accesskit::Role::SpinButton, "nodes").focus();
    harness.run_steps(3);
    for _ in 0..2 {
        harness.key_press(egui::Key::ArrowUp);
        settle(&mut harness);
    }
    assert!(harness.query_by_label("8 GPUs cannot be shared out evenly over 3 nodes. Change GPUs or nodes.").is_some());
}

#[test]
fn numbers_agree_with_each_other() {
    let mut stage = Stage::new(view(), &Shape::small());
    let tables = stage.numbers();
    assert_eq!(integers(table(&tables, "balance.layers")), [1, 2, 3]);
    assert_eq!(integers(table(&tables, "balance.seen_tokens")), [288; 3]);
    let weight = table(&tables, "eplb.weight");
    assert_eq!((weight.shape.as_slice(), integers(weight).iter().sum::<i64>()), (&[3, 32][..], 3 * 288 * 4));
    let (phy2log, log2phy) = (table(&tables, "eplb.phy2log"), table(&tables, "eplb.log2phy"));
    let counts = integers(table(&tables, "eplb.logical_count"));
    assert_eq!(phy2log.shape, [3, 40]);
    let most = log2phy.shape[2];
    for (row, slots) in integers(log2phy).chunks(most).enumerate() {
        let held: Vec<i64> = slots.iter().copied().filter(|slot| *slot >= 0).collect();
        assert_eq!(held.len() as i64, counts[row]);
        let (layer, expert) = (row / 32, row as i64 % 32);
        assert!(held.iter().all(|&slot| integers(phy2log)[layer * 40 + slot as usize] == expert));
    }
    assert!(Stage::empty(view()).numbers().is_empty());
}

#[test]
fn a_model_without_experts_is_told_so() {
    let mut stage = Stage::new(view(), &Shape::small());
    let mut subject = (*stage.subject).clone();
    (subject.model.moe_layers, subject.model.experts) = (Vec::new(), 0);
    stage.subject = std::sync::Arc::new(subject);
    assert!(stage.numbers().is_empty());
    let harness = stage.open(egui::Theme::Dark);
    assert!(harness.query_by_label_contains("no mixture-of-experts layers").is_some());
}
