use egui::{Key, Theme};
use egui_kittest::kittest::{NodeT, Queryable};
use moewe_plan::{FrameToken, TapFrame};
use moewe_viewer::numbers::Cells;
use moewe_viewer::store::{SequenceInfo, Store, Token};
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Attention;

use crate::harness::{Stage, picture, pictures, settle};

fn view() -> Box<Attention> {
    Box::default()
}

fn small() -> Stage {
    Stage::new(view(), &Shape::small())
}

#[test]
fn looks() {
    pictures(&|| view());
}

#[test]
fn looks_of_the_map() {
    let mut stage = small();
    stage.selection.token = Some(70);
    let mut harness = stage.open(Theme::Light);
    harness.get_by_label("map").click();
    settle(&mut harness);
    picture(&mut harness, "attention-map");
}

#[test]
fn looks_of_the_heads() {
    let mut harness = small().open(Theme::Dark);
    harness.get_by_label("heads").click();
    settle(&mut harness);
    picture(&mut harness, "attention-heads");
}

#[test]
fn looks_at_full_size() {
    let (texts, taps) = (vec![("bible".into(), 1024)], "attention:3,latents:3".parse().unwrap());
    let mut stage = Stage::new(view(), &Shape { texts, taps, ..Shape::full() });
    stage.selection.layer = 3;
    stage.selection.token = Some(1000);
    let mut harness = stage.open(Theme::Dark);
    harness.get_by_label("heads").click();
    settle(&mut harness);
    picture(&mut harness, "attention-full-heads");
    harness.get_by_label("map").click();
    settle(&mut harness);
    harness.get_by_label_contains("map of 256 looking token");
}

#[test]
fn arrow_keys_walk_through_the_text() {
    let mut harness = small().open(Theme::Dark);
    harness.get_by_label_contains("attention over the text").focus();
    harness.run_steps(2);
    for (key, token) in [(Key::ArrowRight, 21), (Key::ArrowRight, 22), (Key::ArrowLeft, 21)] {
        harness.key_press(key);
        settle(&mut harness);
        assert_eq!(harness.state().selection.token, Some(token));
    }
    harness.get_by_label_contains("token 21");
    harness.key_press(Key::ArrowDown);
    settle(&mut harness);
    let below = harness.state().selection.token.unwrap();
    assert!(below > 22, "{below} is a row below");
    harness.key_press(Key::ArrowUp);
    settle(&mut harness);
    assert!((20..=22).contains(&harness.state().selection.token.unwrap()));
}

#[test]
fn a_click_in_the_text_chooses_the_token_under_it() {
    let mut harness = small().open(Theme::Dark);
    // Its middle is in the third of five rows.
    harness.get_by_label_contains("attention over the text").click();
    settle(&mut harness);
    let token = harness.state().selection.token.unwrap();
    assert!((45..60).contains(&token), "{token}");
}

#[test]
fn a_click_on_a_strong_token_leads_to_it() {
    let mut harness = small().open(Theme::Dark);
    let first = harness.get_all_by_label_contains("strongest, ").next().unwrap();
    let label = first.accesskit_node().label().unwrap();
    let position: u32 = label.trim_start_matches("strongest, ").split(' ').next().unwrap().parse().unwrap();
    first.click();
    settle(&mut harness);
    assert_eq!(harness.state().selection.token, Some(position));
}

#[test]
fn arrow_keys_move_along_the_map() {
    let mut harness = small().open(Theme::Dark);
    harness.get_by_label("map").click();
    settle(&mut harness);
    harness.get_by_label_contains("attention of token by token").focus();
    harness.run_steps(2);
    harness.key_press(Key::ArrowDown);
    settle(&mut harness);
    assert_eq!(harness.state().selection.token, Some(21));
    harness.key_press(Key::ArrowDown);
    settle(&mut harness);
    assert_eq!(harness.state().selection.token, Some(22));
}

#[test]
fn missing_context_is_said() {
    let shape = Shape::small();
    let mut stage = small();
    // The frame of tokens 0 to 63 was dropped; those from 64 on are there.
    let mut store = Store::new(32, 64 << 20);
    for event in shape.events() {
        match event {
            moewe_viewer::source::Event::Frame(frame) if frame.number == 0 => {}
            event => drop(store.apply(event)),
        }
    }
    stage.store = store;
    stage.selection.token = Some(70);
    let mut harness = stage.open(Theme::Light);
    harness.get_by_label_contains("64 of 71 tokens of the context are not held");
    picture(&mut harness, "attention-missing");
    let missing = harness.state_mut().numbers().into_iter().find(|table| table.name.ends_with("missing")).unwrap();
    assert_eq!(missing.cells, Cells::I64(vec![64]));
    harness.state_mut().selection.token = Some(20);
    settle(&mut harness);
    harness.get_by_label_contains("The query of token 20 is not there");
}

#[test]
fn what_was_not_recorded_is_named() {
    let mut stage = Stage::new(view(), &Shape { taps: "routing".parse().unwrap(), ..Shape::small() });
    assert!(stage.numbers().is_empty());
    stage.open(Theme::Dark).get_by_label_contains("--taps attention,latents");
    let mut stage = Stage::new(view(), &Shape { taps: "attention:3,latents:3".parse().unwrap(), ..Shape::small() });
    stage.selection.layer = 1;
    stage.open(Theme::Dark).get_by_label_contains("Recorded layers: 3");
    // Of another width than the model's heads need.
    let mut stage = small();
    let mut subject = (*stage.subject).clone();
    subject.model.num_attention_heads = 5;
    stage.subject = subject.into();
    stage.open(Theme::Dark).get_by_label_contains("Layer 2 has no queries");
}

#[test]
fn numbers_are_complete_and_sum_to_one() {
    let tables = small().numbers();
    let weights = tables.iter().find(|table| table.name == "attention.layer2.token20.weights").unwrap();
    assert_eq!(weights.shape, [4, 21]);
    let Cells::F32(cells) = &weights.cells else { panic!("floats") };
    for head in cells.chunks(21) {
        assert!((head.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
    let map = tables.iter().find(|table| table.name == "attention.layer2.head0.map").unwrap();
    assert_eq!(map.shape, [96, 96]);
    let Cells::F32(map) = &map.cells else { panic!("floats") };
    assert_eq!(map[20 * 96..][..21], cells[..21], "the selected token's row of the map");
    assert!(map[20 * 96 + 21].is_nan());
}

#[test]
fn a_text_that_began_and_has_no_rows_is_no_error() {
    let mut stage = Stage::empty(view());
    stage.store.begin(SequenceInfo::default());
    stage.store.push_token(0, Token { id: 1, generated: false });
    stage.store.push_frame(&TapFrame { tokens: vec![FrameToken::default()], ..TapFrame::default() });
    stage.open(Theme::Dark).get_by_label_contains("--taps attention,latents");
}
