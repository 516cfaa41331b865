//! Maps of routing and the lattice.

use egui::{Key, Theme};
use egui_kittest::kittest::Queryable as _;
use egui_kittest::{Harness, SnapshotResults};
use moewe_viewer::numbers::Cells;
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Routing;

use crate::harness::{self, Stage, picture, settle};

fn open(shape: &Shape, theme: Theme) -> Harness<'static, Stage> {
    Stage::new(Box::new(Routing::default()), shape).open(theme)
}

fn press(harness: &mut Harness<'static, Stage>, button: &str) {
    harness.get_by_label(button).click();
    settle(harness);
}

fn click(harness: &mut Harness<'static, Stage>, at: egui::Pos2) {
    harness.drag_at(at);
    harness.drop_at(at);
    settle(harness);
}

fn selected(harness: &Harness<'static, Stage>) -> (Option<u32>, u32, Option<u32>) {
    let selection = harness.state().selection;
    (selection.token, selection.layer, selection.expert)
}

#[test]
fn looks() {
    harness::pictures(&|| Box::new(Routing::default()));
}

#[test]
fn maps_look() {
    let mut results = SnapshotResults::new();
    for (shape, name, theme) in [(Shape::small(), "", Theme::Light), (Shape::full(), "-full", Theme::Dark)] {
        let mut harness = open(&shape, theme);
        press(&mut harness, "tokens × experts");
        picture(&mut harness, &format!("routing-tokens{name}"));
        press(&mut harness, "layers × experts");
        picture(&mut harness, &format!("routing-layers{name}"));
        press(&mut harness, "share of tokens");
        picture(&mut harness, &format!("routing-share{name}"));
        press(&mut harness, "texts × experts");
        picture(&mut harness, &format!("routing-texts{name}"));
        results.extend_harness(&mut harness);
    }
}

#[test]
fn a_text_and_an_expert_are_chosen_in_the_map_of_texts() {
    let mut harness = open(&Shape::small(), Theme::Dark);
    press(&mut harness, "texts × experts");
    let row = harness.get_by_label("experts of layer 2 in rust").rect();
    click(&mut harness, row.min + egui::vec2(row.width() * 10.5 / 32.0, 8.0));
    assert_eq!(harness.state().selection.sequence, 1);
    assert_eq!(selected(&harness), (Some(20), 2, Some(10)));
    press(&mut harness, "math");
    assert_eq!((harness.state().selection.sequence, selected(&harness).0), (2, None));
}

#[test]
fn squares_are_clicked_and_walked_over() {
    let mut harness = open(&Shape::small(), Theme::Dark);
    let lattice = harness.get_by_label_contains("experts of layer 2 as squares").rect();
    click(&mut harness, lattice.min + egui::vec2(14.0, 14.0));
    assert_eq!(selected(&harness), (Some(20), 2, Some(0)));
    // Four groups of 4 × 2 in two columns: below expert 4 stands group 2, right of expert 3 group 1.
    for (key, wanted) in [
        (Key::ArrowUp, 0),
        (Key::ArrowDown, 4),
        (Key::ArrowDown, 16),
        (Key::ArrowUp, 4),
        (Key::ArrowRight, 5),
        (Key::ArrowRight, 6),
        (Key::ArrowRight, 7),
        (Key::ArrowRight, 12),
        (Key::ArrowLeft, 7),
    ] {
        harness.key_press(key);
        harness.run_steps(2);
        assert_eq!(harness.state().selection.expert, Some(wanted), "{key:?}");
    }
}

#[test]
fn the_lattice_follows_the_newest_token_unless_one_is_selected() {
    let mut harness = open(&Shape::small(), Theme::Dark);
    harness.get_by_label_contains("token 20 chose");
    press(&mut harness, "show the newest token");
    assert_eq!(harness.state().selection.token, None);
    harness.get_by_label_contains("token 95 chose");
}

#[test]
fn cells_of_maps_are_clicked_and_walked_over() {
    let mut harness = open(&Shape::small(), Theme::Dark);
    press(&mut harness, "tokens × experts");
    let map = harness.get_by_label_contains("experts by token, layer 2").rect();
    click(&mut harness, egui::pos2(map.max.x - 2.0, map.min.y + 2.0));
    assert_eq!(selected(&harness), (Some(0), 2, Some(31)));
    for _ in 0..2 {
        harness.key_press(Key::ArrowDown);
        harness.run_steps(2);
    }
    assert_eq!(selected(&harness), (Some(2), 2, Some(31)));
    press(&mut harness, "layers × experts");
    let map = harness.get_by_label_contains("experts by layer").rect();
    click(&mut harness, egui::pos2(map.min.x + 46.0, map.min.y + 2.0));
    assert_eq!(selected(&harness), (Some(2), 0, Some(0)));
    harness.key_press(Key::ArrowRight);
    harness.run_steps(2);
    assert_eq!(selected(&harness), (Some(2), 0, Some(1)));
}

#[test]
fn the_layer_slider_knows_only_layers_with_experts() {
    let mut harness = open(&Shape::small(), Theme::Dark);
    harness.state_mut().selection.layer = 0;
    settle(&mut harness);
    harness.get_by_label("(layer 0 has no experts)");
    harness.get_by_label_contains("experts of layer 1 as squares");
    harness.get_by_role_and_label(egui::accesskit::Role::Slider, "layer").focus();
    harness.run_steps(2);
    harness.key_press(Key::ArrowRight);
    harness.run_steps(2);
    assert_eq!(harness.state().selection.layer, 2);
}

#[test]
fn what_was_not_recorded_is_said() {
    let shape = Shape { taps: "logits".parse().unwrap(), ..Shape::small() };
    let mut harness = open(&shape, Theme::Dark);
    harness.get_by_label_contains("record with --taps routing");
    let shape = Shape { taps: "routing:3".parse().unwrap(), ..Shape::small() };
    harness = open(&shape, Theme::Dark);
    harness.get_by_label_contains("The routing of token 20 in layer 2 is not held");
}

#[test]
fn numbers_are_those_of_the_maps() {
    let tables = Stage::new(Box::new(Routing::default()), &Shape::small()).numbers();
    let floats = |name: &str, shape: &[usize]| {
        let table = tables.iter().find(|table| table.name == name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(table.shape, shape, "{name}");
        let Cells::F32(cells) = &table.cells else { panic!("{name}") };
        cells.clone()
    };
    let weights = floats("routing.layer2.weights", &[96, 32]);
    let token = floats("routing.token20.weights", &[4, 32]);
    assert_eq!(weights[20 * 32..][..32], token[2 * 32..][..32]);
    let percent = floats("routing.share_percent", &[4, 32]);
    assert!((percent[32..64].iter().sum::<f32>() - 400.0).abs() < 1e-2, "each token has four experts");
    assert_eq!(floats("routing.layer2.correction_bias", &[32]).len(), 32);
}

#[test]
fn a_square_tells_what_is_known_of_it() {
    let mut harness = open(&Shape::small(), Theme::Dark);
    let lattice = harness.get_by_label_contains("experts of layer 2 as squares").rect();
    harness.hover_at(lattice.min + egui::vec2(14.0, 14.0));
    settle(&mut harness);
    harness.get_by_label_contains("layer 2, expert 0, group 0");
    picture(&mut harness, "routing-tooltip");
}
