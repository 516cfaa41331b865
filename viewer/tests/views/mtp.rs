use egui::{Key, Theme};
use egui_kittest::kittest::Queryable;
use moewe_viewer::numbers::Cells;
use moewe_viewer::store::Store;
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Mtp;

use crate::harness::{Stage, picture, pictures, settle};

fn view() -> Box<Mtp> {
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
fn looks_of_counts() {
    let mut harness = small().open(Theme::Light);
    harness.get_by_label("counts").click();
    settle(&mut harness);
    picture(&mut harness, "mtp-counts");
}

#[test]
fn looks_of_long_texts() {
    let mut stage = Stage::new(view(), &Shape { taps: "mtp".parse().unwrap(), ..Shape::full() });
    stage.selection.token = Some(1000);
    let mut harness = stage.open(Theme::Dark);
    picture(&mut harness, "mtp-full-text");
    harness.get_by_label("counts").click();
    settle(&mut harness);
    picture(&mut harness, "mtp-full-counts");
}

#[test]
fn three_of_four_made_up_drafts_come_true() {
    let mut stage = small();
    let tables = stage.numbers();
    let numbers = |name: &str| match &tables.iter().find(|table| table.name == name).unwrap().cells {
        Cells::I64(cells) => cells.clone(),
        _ => panic!("integers"),
    };
    let (positions, accepted) = (numbers("mtp.1.position"), numbers("mtp.1.accepted"));
    assert_eq!(positions, (1..96).collect::<Vec<i64>>());
    for (position, accepted) in positions.iter().zip(&accepted) {
        assert_eq!(*accepted, i64::from((position - 1) % 4 != 0), "{position}");
    }
    for of in ["position", "kind", "mean_probability"] {
        assert_eq!(numbers(&format!("mtp.by_{of}.drafts")).iter().sum::<i64>(), 95, "{of}");
        assert_eq!(numbers(&format!("mtp.by_{of}.accepted")).iter().sum::<i64>(), 71, "{of}");
    }
    assert_eq!(numbers("mtp.by_text.drafts"), [95, 95, 95]);
    let harness = stage.open(Theme::Dark);
    harness.get_by_label_contains("(71 of 95)");
    harness.get_by_label_contains("not a speculative run");
}

#[test]
fn only_generated_tokens_can_be_counted() {
    let mut harness = small().open(Theme::Dark);
    harness.get_by_label("generated").click();
    settle(&mut harness);
    harness.get_by_label_contains("of 72)");
    harness.get_by_label("prompt").click();
    settle(&mut harness);
    harness.get_by_label_contains("of 23)");
}

#[test]
fn tokens_are_chosen_by_click_and_by_arrow() {
    let mut harness = small().open(Theme::Dark);
    harness.get_by_label_contains("drafts along the text").focus();
    harness.run_steps(2);
    harness.key_press(Key::ArrowRight);
    settle(&mut harness);
    assert_eq!(harness.state().selection.token, Some(21));
    harness.get_by_label_contains("token 21 \" king\": not among the first 8");
    harness.get_by_label_contains("24: \"").click();
    settle(&mut harness);
    assert_eq!(harness.state().selection.token, Some(24));
}

#[test]
fn what_is_missing_is_said() {
    let stage = Stage::new(view(), &Shape { taps: "routing".parse().unwrap(), ..Shape::small() });
    stage.open(Theme::Dark).get_by_label_contains("--taps mtp");
    let mut stage = small();
    let mut subject = (*stage.subject).clone();
    subject.model.mtp_modules = 0;
    stage.subject = subject.into();
    stage.open(Theme::Dark).get_by_label_contains("no modules of multi-token prediction");
    // The second frame, tokens 64 to 95, was dropped: no drafts for tokens 65 to 95.
    let mut stage = small();
    stage.store = Store::new(32, 64 << 20);
    for event in Shape::small().events() {
        match event {
            moewe_viewer::source::Event::Frame(frame) if frame.number == 1 => {}
            event => drop(stage.store.apply(event)),
        }
    }
    stage.open(Theme::Dark).get_by_label_contains("31 tokens have no draft");
}
