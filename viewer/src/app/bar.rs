//! The bar on top: menus, what is selected, and the search box.

use egui::{DragValue, Id, RichText, TextEdit, ThemePreference, Ui};

use super::App;
use super::keys::step;
use super::label::{label, label_edit};
use crate::colour::Palette;
use crate::search::{Found, POSSIBLE, search, step as step_match};
use crate::store::Sequence;

/// Characters of a text's name that are shown.
const NAME_CHARS: usize = 40;

#[derive(Default)]
pub(super) struct Bar {
    /// Whether the search box is to have the keyboard.
    pub(super) wants_search: bool,
    query: String,
    answer: Option<Result<Matches, String>>,
}

/// Tokens that were found, and which of them is selected (from 1).
struct Matches {
    positions: Vec<u32>,
    number: usize,
}

pub(super) fn ui(app: &mut App, ui: &mut Ui) {
    ui.add_space(2.0);
    ui.horizontal(|ui| {
        menus(app, ui);
        ui.separator();
        ui.strong(&app.subject.name).on_hover_text(&app.subject.model.architecture);
        ui.weak(format!("{} · {}", app.subject.device, app.subject.precision));
        ui.with_layout(egui::Layout::right_to_left(egui::Align::Center), |ui| {
            let help = ui.button("?").on_hover_text("keys and words (?)");
            label(&help, "help");
            app.help.is_open ^= help.clicked();
            search_box(app, ui);
        });
    });
    ui.horizontal_wrapped(|ui| selection(app, ui));
    ui.add_space(2.0);
}

fn menus(app: &mut App, ui: &mut Ui) {
    ui.menu_button("Layout", |ui| {
        for index in 0..app.views.len() {
            let (name, about) = (app.views[index].name(), app.views[index].about());
            let mut shown = app.layout.is_shown(name);
            if ui.checkbox(&mut shown, super::panes::title(name)).on_hover_text(about).changed() {
                app.layout.set_shown(name, shown);
            }
        }
        ui.separator();
        if ui.button("Reset").on_hover_text("all views where they were at first").clicked() {
            app.layout = crate::layout::Layout::standard(&app.names());
        }
    });
    ui.menu_button("Colours", |ui| {
        let before = ui.ctx().options(|options| options.theme_preference);
        let mut theme = before;
        ui.radio_value(&mut theme, ThemePreference::System, "As the system");
        ui.radio_value(&mut theme, ThemePreference::Light, "Light");
        ui.radio_value(&mut theme, ThemePreference::Dark, "Dark");
        if theme != before {
            ui.ctx().set_theme(theme);
        }
        ui.separator();
        for palette in [Palette::Viridis, Palette::Cividis] {
            ui.radio_value(&mut app.palette, palette, format!("Maps in {}", palette.name()));
        }
    });
    super::save::menu(app, ui);
}

fn selection(app: &mut App, ui: &mut Ui) {
    let mut chosen = app.selection.sequence;
    let shown = app.store.sequence(chosen).map_or("no text yet".into(), text_name);
    let name = ui.label("Text");
    let combo = egui::ComboBox::from_id_salt("text").width(190.0).selected_text(shown);
    let combo = combo.show_ui(ui, |ui| {
        for sequence in app.store.sequences() {
            ui.selectable_value(&mut chosen, sequence.info.number, text_name(sequence));
        }
    });
    combo.response.labelled_by(name.id).on_hover_text("the text that the views show");
    if chosen != app.selection.sequence {
        app.selection.sequence = chosen;
        app.selection.token = None;
    }
    let model = &app.subject.model;
    let sequence = app.store.sequence(app.selection.sequence);
    let tokens = sequence.map_or(0, |sequence| sequence.tokens.len() as u32);
    ui.separator();
    optional(ui, "Token", &mut app.selection.token, tokens, "Left and Right; Esc for the whole text");
    if let Some(token) = app.selection.token.and_then(|at| sequence?.tokens.get(at as usize)) {
        ui.weak(format!("“{}”", app.subject.piece(token.id)));
    }
    ui.separator();
    number(ui, "Layer", &mut app.selection.layer, model.layers, "Up and Down");
    if model.experts > 0 {
        ui.separator();
        optional(ui, "Expert", &mut app.selection.expert, model.experts, "[ and ]; Esc for all");
    }
    ui.separator();
    number(ui, "Head", &mut app.selection.head, model.num_attention_heads, "comma and period");
}

/// What a text is called in the bar: its name and what was changed about the model.
pub(super) fn text_name(sequence: &Sequence) -> String {
    let mut name: String = sequence.info.name.chars().take(NAME_CHARS).collect();
    if name.len() < sequence.info.name.len() {
        name.push('…');
    }
    if name.trim().is_empty() {
        name = format!("text {}", sequence.info.number);
    }
    if !sequence.info.edits.is_empty() {
        let edits: Vec<String> = sequence.info.edits.iter().map(ToString::to_string).collect();
        name = format!("{name} ({})", edits.join(", "));
    }
    name
}

/// A number with buttons for the one before and the one behind.
fn number(ui: &mut Ui, name: &str, value: &mut u32, count: u32, keys: &str) {
    let mut some = Some(*value);
    stepper(ui, name, &mut some, count, keys);
    *value = some.unwrap_or(*value);
}

/// The same for a number that may be none.
fn optional(ui: &mut Ui, name: &str, value: &mut Option<u32>, count: u32, keys: &str) {
    stepper(ui, name, value, count, keys);
    if value.is_some() {
        let clear = ui.small_button("×").on_hover_text(format!("no {} (Esc)", name.to_lowercase()));
        label(&clear, &format!("clear {}", name.to_lowercase()));
        if clear.clicked() {
            *value = None;
        }
    }
}

fn stepper(ui: &mut Ui, name: &str, value: &mut Option<u32>, count: u32, keys: &str) {
    let lower = name.to_lowercase();
    let title = ui.label(name).on_hover_text(format!("keys: {keys}"));
    ui.add_enabled_ui(count > 0, |ui| {
        ui.spacing_mut().item_spacing.x = 2.0;
        let mut button = |ui: &mut Ui, sign: &str, what: String, by: i32| {
            let response = ui.small_button(sign);
            label(&response, &what);
            if response.on_hover_text(format!("{what} (keys: {keys})")).clicked() {
                *value = step(*value, by, count);
            }
        };
        button(ui, "‹", format!("previous {lower}"), -1);
        button(ui, "›", format!("next {lower}"), 1);
        if let Some(number) = value {
            ui.add(DragValue::new(number).range(0..=count.saturating_sub(1)).speed(0.2)).labelled_by(title.id);
        } else {
            let all = ui.button(RichText::new("all").weak());
            label(&all, &format!("all {lower}s"));
            if all.on_hover_text(format!("choose one {lower}")).clicked() {
                *value = step(None, 1, count);
            }
        }
    });
}

fn search_box(app: &mut App, ui: &mut Ui) {
    let id = Id::unique("search");
    if let Some(Ok(matches)) = &app.bar.answer {
        let count = format!("{} of {}", matches.number, matches.positions.len());
        let steps = [("›", "next match", true), ("‹", "previous match", false)];
        for (sign, what, forward) in steps {
            let button = ui.small_button(sign).on_hover_text(what);
            label(&button, what);
            if button.clicked() {
                go(app, forward);
            }
        }
        ui.label(count);
    }
    let edit =
        TextEdit::singleline(&mut app.bar.query).id(id).hint_text("search: 3:17, token 12, text").desired_width(190.0);
    let response = ui.add(edit);
    label_edit(&response, "search", &app.bar.query);
    if std::mem::take(&mut app.bar.wants_search) {
        response.request_focus();
    }
    if response.changed() {
        app.bar.answer = None;
    }
    let enter = ui.input(|input| input.key_pressed(egui::Key::Enter));
    if response.lost_focus() && enter {
        let forward = !ui.input(|input| input.modifiers.shift);
        go(app, forward);
        response.request_focus();
    }
    if let Some(Err(wrong)) = &app.bar.answer
        && response.has_focus()
    {
        let area = egui::Area::new(id.with("wrong")).order(egui::Order::Foreground);
        area.fixed_pos(response.rect.left_bottom() + egui::vec2(0.0, 4.0)).show(ui.ctx(), |ui| {
            egui::Frame::popup(ui.style()).show(ui, |ui| {
                ui.set_max_width(360.0);
                ui.colored_label(ui.visuals().error_fg_color, wrong);
            });
        });
    }
    response.on_hover_text(format!("{POSSIBLE} (Ctrl+F or /)"));
}

/// Selects what was searched for; the next or previous match if there are several.
fn go(app: &mut App, forward: bool) {
    let sequence = app.store.sequence(app.selection.sequence);
    app.bar.answer = match search(&app.bar.query, &app.subject, app.selection.layer, sequence) {
        Ok(Found::Text(positions)) => {
            let found = step_match(&positions, app.selection.token, forward);
            app.selection.token = found.map(|(_, token)| token).or(app.selection.token);
            Some(Ok(Matches { positions, number: found.map_or(0, |(number, _)| number) }))
        }
        Ok(Found::Token(token)) => {
            app.selection.token = Some(token);
            None
        }
        Ok(Found::Expert { layer, expert }) => {
            (app.selection.layer, app.selection.expert) = (layer, Some(expert));
            app.layout.focus("expert");
            None
        }
        Ok(Found::Layer(layer)) => {
            app.selection.layer = layer;
            None
        }
        Ok(Found::Head(head)) => {
            app.selection.head = head;
            None
        }
        Err(wrong) => Some(Err(wrong)),
    };
}
