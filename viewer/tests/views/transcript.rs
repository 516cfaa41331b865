//! The text.

use egui::{Key, Theme};
use egui_kittest::Harness;
use egui_kittest::kittest::Queryable as _;
use moewe_viewer::numbers::Cells;
use moewe_viewer::source::Event;
use moewe_viewer::store::{SequenceInfo, Token};
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Transcript;

use crate::harness::{self, Stage, picture, settle};

fn open(shape: &Shape) -> Harness<'static, Stage> {
    Stage::new(Box::new(Transcript::default()), shape).open(Theme::Light)
}

fn colour(harness: &mut Harness<'static, Stage>, quantity: &str) {
    harness.get_by_label("colour").click();
    settle(harness);
    harness.get_by_label(quantity).click();
    settle(harness);
}

#[test]
fn looks() {
    harness::pictures(&|| Box::new(Transcript::default()));
}

#[test]
fn other_colours_look() {
    let mut harness = open(&Shape::small());
    for quantity in ["dominant expert", "draft accepted", "router entropy"] {
        colour(&mut harness, quantity);
        picture(&mut harness, &format!("transcript-{}", quantity.replace(' ', "-")));
    }
}

#[test]
fn a_click_and_the_arrow_keys_select_tokens() {
    let mut harness = open(&Shape::small());
    let page = harness.get_by_label_contains("text bible").rect();
    // In the first line, right behind the positions.
    let first = egui::pos2(page.min.x + 52.0, page.min.y + 10.0);
    harness.drag_at(first);
    harness.drop_at(first);
    settle(&mut harness);
    assert_eq!(harness.state().selection.token, Some(0));
    harness.get_by_label_contains("token 0 selected");
    for (key, wanted) in [
        (Key::ArrowRight, Some(1)),
        (Key::ArrowRight, Some(2)),
        (Key::ArrowLeft, Some(1)),
        (Key::End, Some(95)),
        (Key::ArrowRight, Some(95)),
        (Key::Home, Some(0)),
        (Key::ArrowUp, Some(0)),
    ] {
        harness.key_press(key);
        harness.run_steps(2);
        assert_eq!(harness.state().selection.token, wanted, "{key:?}");
    }
    harness.key_press(Key::ArrowDown);
    harness.run_steps(2);
    let below = harness.state().selection.token.unwrap();
    assert!((20..60).contains(&below), "a line below: {below}");
    harness.key_press(Key::ArrowUp);
    harness.run_steps(2);
    assert_eq!(harness.state().selection.token, Some(0));
}

#[test]
fn a_click_beside_the_text_selects_nothing() {
    let mut harness = open(&Shape::small());
    let page = harness.get_by_label_contains("text bible").rect();
    for at in [egui::pos2(page.min.x + 10.0, page.min.y + 10.0), page.max - egui::vec2(30.0, 30.0)] {
        harness.drag_at(at);
        harness.drop_at(at);
        settle(&mut harness);
        assert_eq!(harness.state().selection.token, Some(20), "{at}");
    }
}

#[test]
fn another_text_can_be_chosen() {
    let mut harness = open(&Shape::small());
    harness.get_by_label("text").click();
    settle(&mut harness);
    harness.get_by_label_contains("math ·").click();
    settle(&mut harness);
    assert_eq!((harness.state().selection.sequence, harness.state().selection.token), (2, None));
    harness.get_by_label_contains("text math");
}

#[test]
fn what_was_not_recorded_is_said() {
    let shape = Shape { taps: "latents".parse().unwrap(), ..Shape::small() };
    let mut harness = open(&shape);
    harness.get_by_label_contains("record with --taps logits");
    colour(&mut harness, "dominant expert");
    harness.get_by_label_contains("No routing was seen in layer 2");
    let shape = Shape { taps: "routing".parse().unwrap(), ..Shape::small() };
    let mut harness = open(&shape);
    colour(&mut harness, "router entropy");
    harness.get_by_label_contains("of the chosen experts' weights only");
}

#[test]
fn a_selected_token_far_away_comes_into_sight() {
    let mut stage = Stage::new(Box::new(Transcript::default()), &Shape::small());
    let many = Token { id: 3, generated: true };
    stage.store.apply(Event::Begin(SequenceInfo { number: 9, name: "long".into(), ..SequenceInfo::default() }));
    (0..70_000).for_each(|_| drop(stage.store.apply(Event::Token { sequence: 9, token: many })));
    stage.selection.sequence = 9;
    stage.selection.token = None;
    let mut harness = stage.open(Theme::Dark);
    harness.get_by_label("text long, 70000 tokens");
    harness.state_mut().selection.token = Some(35_000);
    settle(&mut harness);
    let page = harness.get_by_label_contains("token 35000 selected").rect();
    harness.drag_at(page.center());
    harness.drop_at(page.center());
    settle(&mut harness);
    let near = harness.state().selection.token.unwrap();
    assert!(near.abs_diff(35_000) < 2000, "{near}");
    // A text that grows keeps its newest token in sight.
    harness.key_press(Key::End);
    settle(&mut harness);
    (0..5_000).for_each(|_| drop(harness.state_mut().store.apply(Event::Token { sequence: 9, token: many })));
    settle(&mut harness);
    harness.drag_at(page.center());
    harness.drop_at(page.center());
    settle(&mut harness);
    let near = harness.state().selection.token.unwrap();
    assert!(near > 74_000, "{near}");
}

#[test]
fn numbers_tell_of_each_token() {
    let tables = Stage::new(Box::new(Transcript::default()), &Shape::small()).numbers();
    let table = |name: &str| tables.iter().find(|table| table.name == name).unwrap_or_else(|| panic!("{name}"));
    assert!(tables.iter().all(|table| table.shape == [96]));
    let Cells::F32(surprise) = &table("transcript.surprise_nats").cells else { panic!() };
    assert!(surprise[0].is_nan() && surprise[1..].iter().all(|nats| (0.0..=3.0).contains(nats)));
    let Cells::I64(drafts) = &table("transcript.draft_accepted").cells else { panic!() };
    // The made-up drafts are wrong behind every fourth token.
    assert_eq!(drafts[..6], [-1, 0, 1, 1, 1, 0]);
}

#[test]
fn a_token_tells_what_is_known_of_it() {
    let mut harness = open(&Shape::small());
    let page = harness.get_by_label_contains("text bible").rect();
    harness.hover_at(page.min + egui::vec2(110.0, 10.0));
    settle(&mut harness);
    picture(&mut harness, "transcript-tooltip");
    harness.get_by_label_contains("token 2, id 3, prompt");
}
