//! The whole window, with views that show little.

use std::time::{Duration, Instant};

use egui::accesskit::Role;
use egui::{Key, Modifiers};
use egui_kittest::kittest::{NodeT, Queryable};
use egui_kittest::{Harness, SnapshotOptions};
use moewe_viewer::app::{App, Exports, Options, StoreExport};
use moewe_viewer::heat::HeatMap;
use moewe_viewer::numbers::Table;
use moewe_viewer::offscreen::{self, Picture};
use moewe_viewer::selection::Selection;
use moewe_viewer::source::{Command, Event, Notice, Prompt, Request, Source};
use moewe_viewer::store::{SequenceInfo, Token};
use moewe_viewer::synthetic::{Shape, Synthetic};
use moewe_viewer::view::View;

use crate::puppets::{Busy, Plain, Puppet};

const NAMES: [&str; 6] = ["transcript", "routing", "expert", "balance", "mtp", "change"];

fn views() -> Vec<Box<dyn View>> {
    NAMES.map(|name| Box::new(Plain { name, map: HeatMap::default() }) as Box<dyn View>).into()
}

fn options() -> Options {
    let selection = Selection { layer: 2, token: Some(20), expert: Some(5), ..Selection::default() };
    Options { views: views(), selection, ..Options::default() }
}

fn app(source: impl Source + 'static) -> App {
    App::new(Box::new(source), Shape::small().subject(), options())
}

fn open(app: App, theme: egui::Theme) -> Harness<'static, App> {
    let builder = Harness::builder().with_size([1280.0, 800.0]).with_theme(theme).wgpu();
    let mut harness = builder.build_ui_state(|ui, app: &mut App| app.ui(ui), app);
    settle(&mut harness);
    harness
}

fn settle(harness: &mut Harness<'_, App>) {
    let started = Instant::now();
    harness.run_steps(2);
    while harness.state().waits_for().is_some() {
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", harness.state().waits_for());
        harness.run_steps(1);
    }
    harness.run_steps(3);
}

fn synthetic() -> Harness<'static, App> {
    open(app(Synthetic::new(&Shape::small())), egui::Theme::Dark)
}

fn live() -> (Puppet, Harness<'static, App>) {
    let puppet = Puppet::default();
    puppet.0.borrow_mut().status.is_live = true;
    (puppet.clone(), open(app(puppet), egui::Theme::Dark))
}

fn recording() -> (Puppet, Harness<'static, App>) {
    let puppet = Puppet::default();
    puppet.0.borrow_mut().is_recording = true;
    (puppet.clone(), open(app(puppet), egui::Theme::Dark))
}

fn press(harness: &mut Harness<'_, App>, key: Key) {
    harness.key_press(key);
    harness.run_steps(2);
}

fn click(harness: &mut Harness<'_, App>, label: &str) {
    harness.get_by_label(label).click();
    harness.run_steps(3);
}

/// Writes into the field of that name, which has the keyboard or gets it.
fn write(harness: &mut Harness<'_, App>, label: &str, text: &str) {
    let field = |harness: &Harness<'_, App>| harness.get_by(|node| is_field(node, label)).is_focused();
    if !field(harness) {
        harness.get_by(|node| is_field(node, label)).focus();
        harness.run_steps(2);
    }
    harness.get_by(|node| is_field(node, label)).type_text(text);
    harness.run_steps(2);
}

fn is_field(node: &egui_kittest::kittest::AccessKitNode<'_>, label: &str) -> bool {
    matches!(node.role(), Role::TextInput | Role::MultilineTextInput) && node.label().as_deref() == Some(label)
}

fn texts(harness: &Harness<'_, App>) -> Vec<String> {
    harness.state().notices().map(|notice| notice.text.clone()).collect()
}

#[test]
fn pictures() {
    let options = SnapshotOptions::new().threshold(2.0).max_failed_pixels(200);
    let mut results = egui_kittest::SnapshotResults::new();
    for (name, theme) in [("app-light", egui::Theme::Light), ("app-dark", egui::Theme::Dark)] {
        let mut harness = open(app(Synthetic::new(&Shape::small())), theme);
        harness.snapshot_options(name, &options);
        results.extend_harness(&mut harness);
    }
    let (puppet, mut harness) = live();
    puppet.0.borrow_mut().events.push_back(Event::Error("the device was lost: plug it in again".into()));
    settle(&mut harness);
    harness.snapshot_options("app-empty", &options);
    results.extend_harness(&mut harness);
    let (_, mut harness) = recording();
    click(&mut harness, "step forward");
    click(&mut harness, "to the end");
    press(&mut harness, Key::Questionmark);
    harness.snapshot_options("app-help", &options);
    results.extend_harness(&mut harness);
}

#[test]
fn keys_select_within_what_there_is() {
    let mut harness = synthetic();
    let selected = |harness: &Harness<'_, App>| *harness.state().selection();
    press(&mut harness, Key::ArrowRight);
    press(&mut harness, Key::ArrowDown);
    press(&mut harness, Key::CloseBracket);
    press(&mut harness, Key::Period);
    let now = selected(&harness);
    assert_eq!((now.token, now.layer, now.expert, now.head), (Some(21), 3, Some(6), 1));
    for _ in 0..5 {
        press(&mut harness, Key::ArrowDown);
        press(&mut harness, Key::Period);
    }
    assert_eq!((selected(&harness).layer, selected(&harness).head), (3, 3));
    press(&mut harness, Key::Escape);
    assert_eq!((selected(&harness).token, selected(&harness).expert), (None, None));
    press(&mut harness, Key::ArrowLeft);
    press(&mut harness, Key::OpenBracket);
    assert_eq!((selected(&harness).token, selected(&harness).expert), (Some(95), Some(31)));
    for _ in 0..5 {
        press(&mut harness, Key::ArrowUp);
        press(&mut harness, Key::Comma);
    }
    assert_eq!((selected(&harness).layer, selected(&harness).head), (0, 0));
    click(&mut harness, "next layer");
    click(&mut harness, "previous token");
    click(&mut harness, "clear expert");
    assert_eq!((selected(&harness).layer, selected(&harness).token, selected(&harness).expert), (1, Some(94), None));
}

#[test]
fn keys_are_letters_where_text_is_typed() {
    let (puppet, mut harness) = live();
    let before = *harness.state().selection();
    write(&mut harness, "prompt", "1,2.[/? ");
    for key in [Key::Comma, Key::Num2, Key::ArrowUp, Key::ArrowLeft, Key::Slash, Key::Questionmark, Key::Space] {
        press(&mut harness, key);
    }
    assert_eq!(*harness.state().selection(), before);
    assert!(harness.query_by_label("Keys and words").is_none());
    let prompt = harness.get_by(|node| is_field(node, "prompt")).value();
    assert_eq!(prompt.as_deref(), Some("1,2.[/? "));
    press(&mut harness, Key::Escape); // leaves the field, and does nothing else
    assert_eq!(*harness.state().selection(), before);
    press(&mut harness, Key::Period);
    assert_eq!(harness.state().selection().head, 1);
    assert!(puppet.0.borrow().commands.is_empty());
}

#[test]
fn maps_keep_the_arrows_while_they_have_the_keyboard() {
    let mut harness = synthetic();
    harness.get_by_label_contains("routing: map").focus();
    harness.run_steps(2);
    for _ in 0..3 {
        press(&mut harness, Key::ArrowDown);
    }
    press(&mut harness, Key::ArrowRight);
    let now = *harness.state().selection();
    assert_eq!((now.token, now.expert, now.layer), (Some(23), Some(6), 2), "rows are tokens here, not layers");
    press(&mut harness, Key::Escape);
    press(&mut harness, Key::ArrowDown);
    assert_eq!(harness.state().selection().layer, 3);
}

#[test]
fn search_finds_experts_tokens_and_text() {
    let mut harness = synthetic();
    press(&mut harness, Key::Slash);
    write(&mut harness, "search", "3:17");
    press(&mut harness, Key::Enter);
    let now = *harness.state().selection();
    assert_eq!((now.layer, now.expert), (3, Some(17)));
    assert!(harness.query_by_label_contains("expert shows").is_some(), "the view of experts comes to the front");

    let retype = |harness: &mut Harness<'_, App>, text: &str| {
        harness.key_press_modifiers(Modifiers::COMMAND, Key::F);
        harness.run_steps(2);
        harness.key_press_modifiers(Modifiers::COMMAND, Key::A);
        harness.run_steps(2);
        write(harness, "search", text);
        press(harness, Key::Enter);
    };
    retype(&mut harness, "token 7");
    assert_eq!(harness.state().selection().token, Some(7));
    retype(&mut harness, "token 96");
    assert!(harness.query_by_label("there is no token 96; there are 0 to 95").is_some());
    retype(&mut harness, "king");
    let king = |harness: &Harness<'_, App>| {
        let sequence = harness.state().store().sequence(0).expect("a text");
        let token = harness.state().selection().token.expect("a token");
        assert_eq!(sequence.tokens[token as usize].id, 1, "{token}");
        token
    };
    let first = king(&harness);
    assert!(first > 7);
    press(&mut harness, Key::Enter);
    assert!(king(&harness) > first);
    click(&mut harness, "previous match");
    assert_eq!(king(&harness), first);
}

#[test]
fn views_hide_and_come_back() {
    let mut harness = synthetic();
    assert!(harness.query_by_label_contains("routing shows").is_some());
    click(&mut harness, "Layout");
    harness.get_by_role_and_label(Role::CheckBox, "Routing").click();
    harness.run_steps(3);
    press(&mut harness, Key::Escape);
    assert!(!harness.state().is_shown("routing"));
    assert!(harness.query_by_label_contains("routing shows").is_none());
    press(&mut harness, Key::Num2);
    assert!(harness.query_by_label_contains("routing shows").is_some());
    press(&mut harness, Key::Num5);
    assert!(harness.query_by_label_contains("mtp shows").is_some());
    for name in NAMES {
        harness.state_mut().set_shown(name, false);
    }
    harness.run_steps(3);
    assert!(harness.query_by_label_contains("No view is shown").is_some());
}

#[test]
fn layouts_are_kept_and_damaged_ones_passed_over() {
    let mut first = app(Synthetic::new(&Shape::small()));
    first.set_shown("balance", false);
    let kept = first.kept();
    let mut second = app(Synthetic::new(&Shape::small()));
    second.restore(&kept);
    assert!(!second.is_shown("balance") && second.is_shown("routing"));
    assert_eq!(second.kept().len(), kept.len());
    for damaged in ["", "{}", "null", &kept[..kept.len() / 2], &kept.replace("balance", "nobody")] {
        let mut third = app(Synthetic::new(&Shape::small()));
        third.restore(damaged);
        assert!(NAMES.iter().all(|name| third.is_shown(name)), "{damaged}");
    }
}

#[test]
fn another_text_is_chosen() {
    let mut harness = synthetic();
    assert_eq!(harness.state().selection().sequence, 0, "a recording's first text is shown");
    harness.get_by_role_and_label(Role::ComboBox, "Text").click();
    harness.run_steps(3);
    click(&mut harness, "rust");
    let now = *harness.state().selection();
    assert_eq!((now.sequence, now.token), (1, None));
}

#[test]
fn news_go_and_errors_stay() {
    let mut harness = synthetic();
    harness.state_mut().notify(Notice { text: "some news".into(), is_error: false });
    harness.state_mut().notify(Notice { text: "an error".into(), is_error: true });
    harness.state_mut().notify(Notice { text: "an error".into(), is_error: true });
    harness.run_steps(2);
    assert!(harness.query_by_label("some news").is_some() && harness.query_by_label("an error (2 times)").is_some());
    harness.run_steps(40); // ten seconds
    assert_eq!(texts(&harness), ["an error"]);
    click(&mut harness, "close this error");
    assert_eq!(texts(&harness), [""; 0]);
}

#[test]
fn a_prompt_becomes_a_command_and_its_text_is_shown() {
    let (puppet, mut harness) = live();
    write(&mut harness, "prompt", "The king");
    harness.key_press_modifiers(Modifiers::COMMAND, Key::Enter);
    harness.run_steps(2);
    let request = Request { prompt: Prompt::Text("The king".into()), max_new_tokens: 64, ..Request::default() };
    assert_eq!(puppet.0.borrow().commands, [Command::Generate(request)]);
    {
        let mut told = puppet.0.borrow_mut();
        told.commands.clear();
        told.status.busy = true;
        for number in [7, 9] {
            let parent = (number == 9).then_some((7, 0));
            told.events.push_back(Event::Begin(SequenceInfo { number, parent, ..SequenceInfo::default() }));
            told.events.push_back(Event::Token { sequence: number, token: Token { id: 1, generated: true } });
        }
    }
    harness.run_steps(4);
    let now = *harness.state().selection();
    assert_eq!((now.sequence, now.other), (9, Some(7)), "a live source's newest text is shown, beside its parent");
    assert!(harness.get_by_label("Run").accesskit_node().is_disabled());
    click(&mut harness, "Stop");
    assert_eq!(puppet.0.borrow().commands, [Command::Stop]);
}

#[test]
fn a_recording_plays_steps_and_goes_back() {
    let (puppet, mut harness) = recording();
    let tokens = |harness: &Harness<'_, App>| {
        harness.state().store().sequences().iter().map(|sequence| sequence.tokens.len()).sum::<usize>()
    };
    assert_eq!(tokens(&harness), 0);
    click(&mut harness, "step forward");
    click(&mut harness, "step forward");
    assert_eq!(tokens(&harness), 2);
    click(&mut harness, "to the end");
    assert_eq!(tokens(&harness), 96);
    click(&mut harness, "step back");
    assert_eq!(tokens(&harness), 95);
    press(&mut harness, Key::Space);
    assert!((puppet.0.borrow().speed - 20.0).abs() < 1e-9);
    press(&mut harness, Key::Space);
    assert!(puppet.0.borrow().speed.abs() < 1e-9);
    click(&mut harness, "to the end");
    press(&mut harness, Key::Space);
    assert_eq!((tokens(&harness), puppet.0.borrow().shown), (0, 0), "from the end it plays from the beginning");
}

#[test]
fn a_selected_token_waits_for_its_text() {
    let (_, mut harness) = recording();
    let token = |harness: &Harness<'_, App>| harness.state().selection().token;
    assert_eq!(token(&harness), None, "views never see a token that is not there");
    click(&mut harness, "to the end");
    assert_eq!(token(&harness), Some(20));
    click(&mut harness, "to the beginning");
    assert_eq!(token(&harness), None);
    click(&mut harness, "to the end");
    assert_eq!(token(&harness), Some(20));
    click(&mut harness, "to the beginning");
    press(&mut harness, Key::Escape);
    click(&mut harness, "to the end");
    assert_eq!(token(&harness), None, "unless it was given up");
}

#[test]
fn going_back_keeps_the_text() {
    let (puppet, mut harness) = recording();
    let begin = |number| Event::Begin(SequenceInfo { number, ..SequenceInfo::default() });
    let tell = |harness: &mut Harness<'_, App>, events: Vec<Event>| {
        puppet.0.borrow_mut().events.extend(events);
        settle(harness);
        harness.state().selection().sequence
    };
    assert_eq!(tell(&mut harness, vec![begin(3), begin(4), begin(5)]), 3, "the first");
    harness.state_mut().selection_mut().sequence = 4;
    assert_eq!(tell(&mut harness, vec![begin(6)]), 4, "a recording that is only read does not follow");
    assert_eq!(tell(&mut harness, vec![Event::Reset, begin(3), begin(4), begin(5)]), 4, "it came back");
    assert_eq!(tell(&mut harness, vec![Event::Reset, begin(1), begin(3)]), 3, "it is gone: the last before it");
    puppet.0.borrow_mut().speed = 1.0;
    assert_eq!(tell(&mut harness, vec![begin(8)]), 8, "a recording that plays is followed");
}

#[test]
fn every_view_is_drawn_in_its_pane() {
    for shape in [Shape::small(), Shape { texts: Vec::new(), ..Shape::small() }] {
        let options = Options { selection: options().selection, ..Options::default() };
        let app = App::new(Box::new(Synthetic::new(&shape)), shape.subject(), options);
        let mut harness = open(app, egui::Theme::Light);
        for name in harness.state().names() {
            harness.state_mut().focus(name);
            settle(&mut harness);
            assert!(harness.query_all_by_label(&format!("save {name}")).next().is_some(), "{name} is in front");
        }
    }
}

#[test]
fn numbers_are_saved_under_a_new_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |tables: &[Table], path: &std::path::Path| {
        let text: Vec<String> = tables.iter().map(|table| format!("{} {:?}", table.name, table.shape)).collect();
        std::fs::write(path, text.join("\n")).map_err(|wrong| wrong.to_string())
    };
    let whole = StoreExport {
        name: "Trace".into(),
        about: "all runs".into(),
        extension: "json".into(),
        write: std::sync::Arc::new(|_, _, _, _| Err("the disk is full".into())),
    };
    let exports = Exports { csv: Some(std::sync::Arc::new(write)), npz: None, whole: vec![whole] };
    let options = Options { exports, folder: folder.path().to_owned(), ..options() };
    let app = App::new(Box::new(Synthetic::new(&Shape::small())), Shape::small().subject(), options);
    let mut harness = open(app, egui::Theme::Dark);
    let wait = |harness: &mut Harness<'_, App>, what: &str| {
        let started = Instant::now();
        while !texts(harness).iter().any(|text| text.contains(what)) {
            assert!(started.elapsed() < Duration::from_secs(10), "{what}: {:?}", texts(harness));
            harness.run_steps(1);
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for number in ["", "-2"] {
        click(&mut harness, "save routing");
        assert!(harness.query_by_label("Numbers (npz)").is_none());
        click(&mut harness, "Numbers (CSV)");
        click(&mut harness, "Save");
        let path = folder.path().join(format!("synthetic-routing-layer2{number}.csv"));
        wait(&mut harness, &format!("wrote {}", path.display()));
        assert_eq!(std::fs::read_to_string(path).expect("written"), "weights [96, 32]");
    }
    click(&mut harness, "Export");
    click(&mut harness, "Trace");
    click(&mut harness, "Save");
    wait(&mut harness, "was not written: the disk is full");
}

fn setup() -> egui_wgpu::WgpuSetup {
    egui_kittest::wgpu::default_wgpu_setup()
}

#[test]
fn pictures_without_a_window() {
    let mut app = app(Synthetic::new(&Shape::small()));
    let whole = offscreen::picture(&mut app, &Picture::default(), setup()).expect("drawn");
    assert_eq!(whole.dimensions(), (1280, 800));
    let picture = Picture {
        size: [401.0, 300.0],
        pixels_per_point: 2.0,
        theme: egui::Theme::Light,
        view: Some("routing".into()),
        ..Picture::default()
    };
    let one = offscreen::picture(&mut app, &picture, setup()).expect("drawn");
    assert_eq!(one.dimensions(), (802, 600));
    let colours: std::collections::BTreeSet<[u8; 4]> = one.pixels().map(|pixel| pixel.0).collect();
    assert!(colours.len() > 50, "{} colours", colours.len());
    let background = one.get_pixel(799, 597).0;
    assert!(background.iter().all(|channel| *channel > 200), "light: {background:?}");
    let options = SnapshotOptions::new().threshold(2.0).max_failed_pixels(200);
    egui_kittest::image_snapshot_options(&one, "app-one-view", &options);
}

#[test]
fn pictures_that_cannot_be_drawn_say_why() {
    let mut app = app(Synthetic::new(&Shape::small()));
    let mut fail = |picture: Picture| offscreen::picture(&mut app, &picture, setup()).unwrap_err().to_string();
    let none = Picture { view: Some("rooting".into()), ..Picture::default() };
    assert_eq!(
        fail(none),
        "there is no view \"rooting\"; the views are transcript, routing, expert, balance, mtp, change"
    );
    let sizes = [[0.0, 10.0], [f32::NAN, 10.0], [1e9, 10.0], [10.0, -5.0], [10.0, f32::INFINITY]];
    for size in sizes {
        assert!(fail(Picture { size, ..Picture::default() }).contains("cannot be drawn"), "{size:?}");
    }
    let options = Options { views: vec![Box::new(Busy)], ..options() };
    let mut busy = App::new(Box::new(Synthetic::new(&Shape::small())), Shape::small().subject(), options);
    let picture = Picture { timeout: Duration::from_millis(300), ..Picture::default() };
    let wrong = offscreen::picture(&mut busy, &picture, setup()).unwrap_err().to_string();
    assert_eq!(wrong, "no picture after 0 s: the view busy computes");
}

#[test]
fn numbers_without_a_window() {
    let mut app = app(Synthetic::new(&Shape::small()));
    let tables = offscreen::numbers(&mut app, "routing", Duration::from_secs(30)).expect("numbers");
    assert_eq!((tables.len(), &tables[0].shape[..]), (1, &[96, 32][..]));
    assert!(offscreen::numbers(&mut app, "nothing", Duration::from_secs(30)).is_err());
    let (puppet, _) = recording();
    let mut app = self::app(puppet);
    offscreen::numbers(&mut app, "routing", Duration::from_secs(30)).expect("numbers");
    assert_eq!(app.store().sequence(0).expect("a text").tokens.len(), 96, "a recording is read to its end");
}
