//! The page of an expert.

use egui::Theme;
use egui_kittest::Harness;
use egui_kittest::kittest::Queryable as _;
use moewe_viewer::numbers::Cells;
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Expert;

use crate::harness::{self, Stage, settle};

fn open(shape: &Shape) -> Harness<'static, Stage> {
    Stage::new(Box::new(Expert::default()), shape).open(Theme::Light)
}

#[test]
fn looks() {
    harness::pictures(&|| Box::new(Expert::default()));
}

#[test]
fn uses_and_companions_lead_on() {
    let mut harness = open(&Shape::small());
    harness.get_by_label_contains("token 19 of math").click();
    settle(&mut harness);
    let selection = harness.state().selection;
    assert_eq!((selection.sequence, selection.token, selection.expert), (2, Some(19), Some(5)));
    harness.get_by_label("expert 13").click();
    settle(&mut harness);
    assert_eq!(harness.state().selection.expert, Some(13));
    harness.get_by_label("2:13");
}

#[test]
fn experts_are_stepped_through() {
    let mut harness = open(&Shape::small());
    harness.get_by_label("next expert").click();
    settle(&mut harness);
    harness.get_by_label("2:6");
    harness.get_by_label("previous expert").click();
    settle(&mut harness);
    harness.get_by_label("2:5");
    harness.get_by_role_and_label(egui::accesskit::Role::SpinButton, "expert").focus();
    harness.run_steps(2);
    harness.key_press(egui::Key::ArrowUp);
    settle(&mut harness);
    harness.get_by_label("2:6");
}

#[test]
fn without_a_choice_the_busiest_are_offered() {
    let mut harness = open(&Shape::small());
    harness.state_mut().selection.expert = None;
    settle(&mut harness);
    let load = harness.state().store.load(2).unwrap().tokens.clone();
    let busiest = (0..32).rev().max_by_key(|expert| load[*expert]).unwrap();
    harness.get_by_label(&format!("expert {busiest}")).click();
    settle(&mut harness);
    assert_eq!(harness.state().selection.expert, Some(busiest as u32));
}

#[test]
fn what_was_not_recorded_is_said() {
    let shape = Shape { taps: "routing:1".parse().unwrap(), ..Shape::small() };
    let harness = open(&shape);
    harness.get_by_label_contains("No routing was recorded in layer 2");
}

#[test]
fn numbers_are_complete() {
    let tables = Stage::new(Box::new(Expert::default()), &Shape::small()).numbers();
    let integers = |name: &str| {
        let table = tables.iter().find(|table| table.name == name).unwrap_or_else(|| panic!("{name}"));
        let Cells::I64(cells) = &table.cells else { panic!("{name}") };
        cells.clone()
    };
    let chosen: i64 = integers("expert.2.5.texts.chosen").iter().sum();
    assert_eq!(integers("expert.2.5.uses.position").len() as i64, chosen);
    assert_eq!(integers("expert.2.5.weights.bins").iter().sum::<i64>(), chosen);
    assert_eq!(integers("expert.2.5.pairs.both").iter().sum::<i64>(), 3 * chosen);
}
