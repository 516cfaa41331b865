use egui_kittest::kittest::Queryable;
use egui_kittest::{Harness, SnapshotResults};
use moewe_viewer::numbers::{Cells, Table};
use moewe_viewer::source::Event;
use moewe_viewer::store::Store;
use moewe_viewer::synthetic::Shape;
use moewe_viewer::view::View;
use moewe_viewer::views::Latents;

use crate::harness::{Stage, pictures, settle};

fn view() -> Box<dyn View> {
    Box::new(Latents::default())
}

/// Opens a page and takes the pointer away.
fn open(harness: &mut Harness<'_, Stage>, page: &str) {
    harness.get_by_label(page).click();
    harness.step();
    harness.event(egui::Event::PointerGone);
    settle(harness);
}

fn full() -> Stage {
    let mut stage = Stage::new(view(), &Shape::full());
    stage.selection.layer = 3;
    stage
}

fn floats<'a>(tables: &'a [Table], name: &str) -> &'a [f32] {
    match &tables.iter().find(|table| table.name == name).unwrap_or_else(|| panic!("no table {name}")).cells {
        Cells::F32(cells) => cells,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn latents_pictures() {
    pictures(&view);
}

#[test]
fn pages_have_pictures_too() {
    let mut results = SnapshotResults::new();
    let mut picture = |harness: &mut Harness<'_, Stage>, name: &str| {
        crate::harness::picture(harness, name);
        results.extend_harness(harness);
    };
    let mut harness = Stage::new(view(), &Shape::small()).open(egui::Theme::Light);
    for page in ["Norms", "Similarity", "Projection", "Bytes"] {
        open(&mut harness, page);
        picture(&mut harness, &format!("latents-{}", page.to_lowercase()));
    }
    let mut harness = full().open(egui::Theme::Dark);
    for page in ["Norms", "Projection"] {
        open(&mut harness, page);
        picture(&mut harness, &format!("latents-{}-full", page.to_lowercase()));
    }
    // By expert, the dots of a layer tell more than one colour.
    open(&mut harness, "dominant expert");
    picture(&mut harness, "latents-projection-experts-full");
}

#[test]
fn long_texts_are_pooled_or_windowed_and_say_so() {
    let mut harness = full().open(egui::Theme::Dark);
    assert!(
        harness.query_by_label("c_kv by token and dimension, layer 3: map of 2048 token by 512 dimension").is_some()
    );
    open(&mut harness, "Similarity");
    let pooled = "similarity of tokens, layer 3: map of 512 block of 4 tokens by 512 block of 4 tokens";
    assert!(harness.query_by_label(pooled).is_some());
    harness.state_mut().selection.token = Some(1500);
    open(&mut harness, "512 around the selection");
    let window = "similarity of tokens, layer 3: map of 512 token − 1216 by 512 token − 1216";
    assert!(harness.query_by_label(window).is_some());
    open(&mut harness, "k_rope");
    open(&mut harness, "Map");
    assert!(
        harness.query_by_label("k_rope by token and dimension, layer 3: map of 2048 token by 64 dimension").is_some()
    );
}

#[test]
fn a_cell_of_the_map_selects_its_token_and_arrows_move() {
    let mut harness = Stage::new(view(), &Shape::small()).open(egui::Theme::Dark);
    harness.get_by_label("c_kv by token and dimension, layer 2: map of 96 token by 16 dimension").click();
    settle(&mut harness);
    let clicked = harness.state().selection.token.unwrap();
    assert!((44..56).contains(&clicked), "about the middle, not {clicked}");
    for (key, token) in
        [(egui::Key::ArrowDown, clicked + 1), (egui::Key::ArrowDown, clicked + 2), (egui::Key::ArrowUp, clicked + 1)]
    {
        harness.key_press(key);
        settle(&mut harness);
        assert_eq!(harness.state().selection.token, Some(token));
    }
    assert!(harness.query_by_label_contains(&format!("token {}", clicked + 1)).is_some());
}

#[test]
fn norms_and_neighbours_select_tokens() {
    let mut harness = Stage::new(view(), &Shape::small()).open(egui::Theme::Dark);
    open(&mut harness, "Norms");
    harness.get_by_label("norm of 96 tokens, layer 2").click();
    settle(&mut harness);
    let clicked = harness.state().selection.token.unwrap();
    assert!((40..56).contains(&clicked), "about the middle, not {clicked}");
    harness.key_press(egui::Key::ArrowLeft);
    settle(&mut harness);
    assert_eq!(harness.state().selection.token, Some(clicked - 1));
    open(&mut harness, "Similarity");
    assert!(harness.query_by_label_contains(&format!("Most like {}", clicked - 1)).is_some());
}

#[test]
fn a_layer_without_latents_leads_to_one_that_has_them() {
    let mut harness = Stage::new(view(), &Shape::full()).open(egui::Theme::Dark);
    harness.get_by_label("Go to layer 3").click();
    settle(&mut harness);
    assert_eq!(harness.state().selection.layer, 3);
    assert!(harness.query_by_label_contains("c_kv by token and dimension, layer 3").is_some());
}

#[test]
fn rows_that_went_are_counted_not_invented() {
    let shape = Shape::small();
    let mut stage = Stage::new(view(), &shape);
    // Too little memory for all: rows of the first text go.
    stage.store = Store::new(32, 360 << 10);
    for event in shape.events() {
        stage.store.apply(event);
    }
    stage.selection.layer = 2;
    let tables = stage.numbers();
    let norms = floats(&tables, "latents.layer2.c_kv.norms");
    let missing = norms.iter().filter(|norm| norm.is_nan()).count();
    assert!(missing > 0, "some rows must have gone");
    let cells = floats(&tables, "latents.layer2.c_kv");
    assert!(cells.chunks(16).zip(norms).all(|(row, norm)| row.iter().all(|cell| cell.is_nan()) == norm.is_nan()));
    let harness = stage.open(egui::Theme::Dark);
    assert!(harness.query_by_label(&format!("{missing} of 96 tokens have no row")).is_some());
}

#[test]
fn a_growing_text_is_followed() {
    let shape = Shape { texts: vec![("bible".into(), 640)], ..Shape::small() };
    let events: Vec<Event> = shape.events().collect();
    let mut stage = Stage::new(view(), &shape);
    stage.store = Store::new(32, 64 << 20);
    let mut harness = stage.open(egui::Theme::Dark);
    open(&mut harness, "Projection");
    for part in events.chunks(150) {
        for event in part {
            harness.state_mut().store.apply(event.clone());
        }
        settle(&mut harness);
    }
    assert!(harness.query_by_label_contains("640 rows of 1 texts").is_some());
}

#[test]
fn numbers_are_complete() {
    let mut stage = Stage::new(view(), &Shape::small());
    let tables = stage.numbers();
    let cells = floats(&tables, "latents.layer2.c_kv");
    let norms = floats(&tables, "latents.layer2.c_kv.norms");
    for (row, norm) in cells.chunks(16).zip(norms) {
        assert!((row.iter().map(|cell| cell * cell).sum::<f32>().sqrt() - norm).abs() < 1e-4);
    }
    let (axes, mean) = (floats(&tables, "latents.layer2.c_kv.components"), floats(&tables, "latents.layer2.c_kv.mean"));
    let plane = floats(&tables, "latents.layer2.c_kv.projection");
    assert_eq!((plane.len(), axes.len(), mean.len()), (288 * 2, 32, 16));
    for (row, at) in cells.chunks(16).zip(plane.chunks(2)) {
        for axis in 0..2 {
            let along: f32 = (0..16).map(|i| (row[i] - mean[i]) * axes[axis * 16 + i]).sum();
            assert!((along - at[axis]).abs() < 1e-3);
        }
    }
    assert_eq!(floats(&tables, "latents.layer2.c_kv.similarity").len(), 96 * 96);
    let bytes = |name: &str| match &tables.iter().find(|table| table.name == name).unwrap().cells {
        Cells::I64(cells) => cells.clone(),
        other => panic!("{other:?}"),
    };
    // 4 layers of 16 + 8 numbers of 4 bytes, against 4 heads of 128 + 8 + 128.
    assert_eq!((bytes("latents.bytes.latent")[0], bytes("latents.bytes.plain")[0]), (4 * 24 * 4, 4 * 4 * 264 * 4));
}
