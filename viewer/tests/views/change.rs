//! The view change: what is added, what is refused, and what is asked of the source.

use egui::Theme;
use egui_kittest::kittest::Queryable as _;
use moewe_plan::Edit;
use moewe_viewer::source::{Command, Prompt, Request};
use moewe_viewer::synthetic::Shape;
use moewe_viewer::views::Change;

use crate::compare::add_version;
use crate::harness::{Stage, picture, pictures, settle};

type Harness = egui_kittest::Harness<'static, Stage>;

fn stage() -> Stage {
    let mut stage = Stage::new(Box::<Change>::default(), &Shape::small());
    add_version(&mut stage, &Shape::small(), 3);
    stage
}

fn open() -> Harness {
    stage().open(Theme::Dark)
}

fn click(harness: &mut Harness, label: &str) {
    harness.get_by_label(label).click();
    settle(harness);
}

fn type_in(harness: &mut Harness, text: &str) {
    let field = harness.get_by_label("or type");
    field.focus();
    field.type_text(text);
    settle(harness);
    harness.key_press(egui::Key::Enter);
    settle(harness);
}

fn generated(harness: &mut Harness) -> Request {
    match harness.state_mut().commands.drain(..).collect::<Vec<_>>().as_slice() {
        [Command::Generate(request)] => request.clone(),
        other => panic!("expected one text to write, found {other:?}"),
    }
}

fn written(edits: &[Edit]) -> Vec<String> {
    edits.iter().map(Edit::to_string).collect()
}

#[test]
fn looks() {
    pictures(&|| Box::<Change>::default());
}

#[test]
fn looks_with_changes() {
    let mut harness = stage().open(Theme::Light);
    for edit in ["mute 3:17", "scale *:5=0.5", "pin 2:1+5+8+17", "zero latent 9:3", "zero head *:2"] {
        type_in(&mut harness, edit);
    }
    type_in(&mut harness, "mutr 3:17");
    picture(&mut harness, "change-edits");
}

#[test]
fn looks_of_a_recording() {
    let mut stage = stage();
    stage.is_live = false;
    let mut harness = stage.open(Theme::Dark);
    harness.get_by_label("A recording cannot be changed");
    assert!(harness.query_by_label("Run from token 20").is_none());
    picture(&mut harness, "change-recording");
}

#[test]
fn the_selection_becomes_changes_and_a_text_to_write() {
    let mut harness = open();
    for label in ["Mute expert 5", "Force expert 5", "Scale expert 5", "Pin the 4 experts of token 20"] {
        click(&mut harness, label);
    }
    click(&mut harness, "remove force 2:5");
    click(&mut harness, "all layers");
    click(&mut harness, "Zero head 0");
    click(&mut harness, "Zero latent direction");
    click(&mut harness, "Mute expert 5");
    click(&mut harness, "Run from token 20");
    let request = generated(&mut harness);
    let stage = harness.state();
    let text = stage.store.sequence(0).unwrap();
    let (chosen, _) = text.routing(2, 20).unwrap();
    let pin = Edit::Pin(Some(2), chosen.to_vec()).to_string();
    assert_eq!(
        written(&request.edits),
        ["mute 2:5", "scale 2:5=0.5", &pin, "zero head *:0", "zero latent *:0", "mute *:5"]
    );
    let kept: Vec<u32> = text.tokens[..21].iter().map(|token| token.id).collect();
    assert_eq!(request.prompt, Prompt::Tokens(kept));
    assert_eq!(request.parent, Some((0, 21)));
    assert_eq!((request.max_new_tokens, request.seed), (75, 0));
    assert!(request.temperature == 0.0);
    assert_eq!(request.name.as_deref(), Some("bible, 6 changes"));
}

#[test]
fn the_end_of_the_prompt_is_where_it_begins_without_a_token() {
    let mut stage = stage();
    stage.selection.token = None;
    let mut harness = stage.open(Theme::Dark);
    click(&mut harness, "Run from token 23");
    let request = generated(&mut harness);
    assert_eq!((request.parent, request.max_new_tokens), (Some((0, 24)), 72));
    assert_eq!(request.name.as_deref(), Some("bible, again"));
    // The last token of a text: there is nothing behind it, so some are written.
    harness.state_mut().selection.token = Some(95);
    settle(&mut harness);
    click(&mut harness, "Run from token 95");
    let request = generated(&mut harness);
    assert_eq!((request.parent, request.max_new_tokens), (Some((0, 96)), 32));
}

#[test]
fn what_is_typed_is_added_or_explained() {
    let mut harness = open();
    type_in(&mut harness, "scale 3:17=0.25");
    harness.get_by_label("remove scale 3:17=0.25");
    type_in(&mut harness, "scale 3:17");
    harness.get_by_label("\"3:17\": expected LAYER:EXPERT=FACTOR, such as 3:17=0.5");
    assert!(harness.query_by_label("remove scale 3:17").is_none());
}

#[test]
fn what_the_model_cannot_do_is_not_run() {
    let mut harness = open();
    type_in(&mut harness, "mute 0:3");
    harness.get_by_label("no such layer; the layers that have it are 1 to 3");
    click(&mut harness, "Run from token 20");
    assert!(harness.state().commands.is_empty());
    click(&mut harness, "remove mute 0:3");
    for expert in 0..5 {
        type_in(&mut harness, &format!("force 1:{expert}"));
    }
    harness.get_by_label("layer 1: 5 experts are forced, at most 4 can be");
    click(&mut harness, "Run from token 20");
    assert!(harness.state().commands.is_empty());
    click(&mut harness, "remove force 1:4");
    click(&mut harness, "Run from token 20");
    assert_eq!(generated(&mut harness).edits.len(), 4);
}

#[test]
fn nothing_is_run_while_a_text_is_written() {
    let mut stage = stage();
    stage.store.begin(moewe_viewer::store::SequenceInfo { number: 9, ..Default::default() });
    let mut harness = stage.open(Theme::Dark);
    click(&mut harness, "Run from token 20");
    assert!(harness.state().commands.is_empty());
    click(&mut harness, "Stop");
    assert_eq!(harness.state().commands, [Command::Stop]);
}

#[test]
fn layers_without_experts_offer_no_expert() {
    let mut stage = stage();
    stage.selection.layer = 0;
    let mut harness = stage.open(Theme::Dark);
    click(&mut harness, "Mute expert 5");
    click(&mut harness, "Zero head 0");
    click(&mut harness, "Run from token 20");
    assert_eq!(written(&generated(&mut harness).edits), ["zero head 0:0"]);
}

#[test]
fn versions_are_listed_and_chosen() {
    let mut harness = open();
    harness.get_by_label("Versions of this text");
    click(&mut harness, "compare with bible, mute 2:5");
    assert_eq!(harness.state().selection.other, Some(3));
    click(&mut harness, "bible, mute 2:5");
    assert_eq!(harness.state().selection.sequence, 3);
    click(&mut harness, "Run from token 20");
    assert_eq!(generated(&mut harness).parent, Some((3, 21)));
    let tables = harness.state_mut().numbers();
    let versions = tables.iter().find(|table| table.name == "change.versions").expect("a table");
    assert_eq!(versions.shape, [2, 4]);
    assert_eq!(versions.cells, moewe_viewer::numbers::Cells::I64(vec![0, -1, -1, 96, 3, 0, 32, 96]));
}

#[test]
fn changes_of_a_text_can_be_taken_over() {
    let mut stage = stage();
    stage.selection.sequence = 3;
    let mut harness = stage.open(Theme::Dark);
    click(&mut harness, "Take over those of this text");
    harness.get_by_label("remove mute 2:5");
}
