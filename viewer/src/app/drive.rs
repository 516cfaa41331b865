//! The panel that drives the source: a prompt for a live one, time for a recording.

use egui::{DragValue, Id, Key, Modifiers, RichText, Slider, TextEdit, Ui};

use super::App;
use super::label::{label, label_edit, warning};
use crate::source::{Command, Prompt, Request, Status};

pub(super) struct Drive {
    prompt: String,
    request: Request,
    /// Tokens a second while a recording plays.
    speed: f64,
}

impl Drive {
    pub(super) fn new(request: Request, speed: f64) -> Self {
        let prompt = match &request.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Tokens(_) => String::new(),
        };
        Self { prompt, request, speed }
    }
}

pub(super) fn ui(app: &mut App, ui: &mut Ui, status: &Status) {
    ui.add_space(2.0);
    if status.is_live {
        prompt(app, ui, status);
    } else {
        replay(app, ui);
    }
    ui.add_space(2.0);
}

fn prompt(app: &mut App, ui: &mut Ui, status: &Status) {
    let Drive { prompt, request, .. } = &mut app.drive;
    let id = Id::unique("prompt");
    let has_focus = ui.memory(|memory| memory.has_focus(id));
    let mut run = has_focus && ui.input_mut(|input| input.consume_key(Modifiers::COMMAND, Key::Enter));
    ui.horizontal_top(|ui| {
        let width = (ui.available_width() - 330.0).max(160.0);
        let edit = TextEdit::multiline(prompt).id(id).desired_rows(2).desired_width(width);
        let response = ui.add(edit.hint_text("what the model is to go on with"));
        label_edit(&response, "prompt", prompt);
        ui.vertical(|ui| {
            ui.horizontal(|ui| {
                let button = egui::Button::new(RichText::new("Run").strong());
                let can_run = !status.busy && !prompt.is_empty();
                let response = ui.add_enabled(can_run, button).on_hover_text("write on (Ctrl+Enter)");
                let response = response.on_disabled_hover_text(if status.busy {
                    "it is writing: stop it first, or wait"
                } else {
                    "write something first"
                });
                label(&response, "Run");
                run = can_run && (run || response.clicked());
                let stop = egui::Button::new(RichText::new("Stop").color(warning(ui)));
                let stop = ui.add_enabled(status.busy, stop).on_hover_text("stop writing");
                label(&stop, "Stop");
                if stop.clicked() {
                    app.commands.push(Command::Stop);
                }
            });
            ui.horizontal(|ui| {
                let tokens = DragValue::new(&mut request.max_new_tokens).range(1..=1 << 20);
                let about = "most tokens to write";
                let title = ui.label("tokens").on_hover_text(about);
                ui.add(tokens).labelled_by(title.id).on_hover_text(about);
                let about = "0 always takes the likeliest token; larger draws more freely";
                let title = ui.label("temperature").on_hover_text(about);
                let temperature = DragValue::new(&mut request.temperature).range(0.0..=5.0).speed(0.01).max_decimals(2);
                ui.add(temperature).labelled_by(title.id).on_hover_text(about);
                let about = "the same seed draws the same tokens";
                let title = ui.label("seed").on_hover_text(about);
                ui.add(DragValue::new(&mut request.seed)).labelled_by(title.id).on_hover_text(about);
            });
        });
    });
    if run {
        app.commands.push(Command::Generate(Request { prompt: Prompt::Text(prompt.clone()), ..request.clone() }));
    }
}

fn replay(app: &mut App, ui: &mut Ui) {
    let speed = &mut app.drive.speed;
    let Some(replay) = app.source.replay() else { return };
    let (position, there, is_playing) = (replay.position(), replay.len(), replay.speed() > 0.0);
    let mut to = position;
    let mut plays = is_playing;
    ui.horizontal(|ui| {
        let button = |ui: &mut Ui, sign: &str, what: &str, about: &str, enabled: bool| {
            let response = ui.add_enabled(enabled, egui::Button::new(sign)).on_hover_text(about);
            label(&response, what);
            response.clicked()
        };
        if button(ui, "|‹", "to the beginning", "to the beginning", position > 0) {
            to = 0;
        }
        if button(ui, "‹", "step back", "one token back", position > 0) {
            (to, plays) = (position.saturating_sub(1), false);
        }
        let (sign, what) = if is_playing { ("Pause", "pause") } else { ("Play", "play") };
        if button(ui, sign, what, "play and pause (Space)", there > 0) {
            plays = !is_playing;
        }
        if button(ui, "›", "step forward", "one token on", position < there) {
            (to, plays) = (position + 1, false);
        }
        if button(ui, "›|", "to the end", "to the end", position < there) {
            to = there;
        }
        ui.spacing_mut().slider_width = (ui.available_width() - 250.0).max(80.0);
        let slider = ui.add(Slider::new(&mut to, 0..=there).show_value(false));
        slider.widget_info(|| egui::WidgetInfo::slider(true, to as f64, "time, in tokens"));
        ui.label(format!("{position} of {there} tokens"));
        let drag = DragValue::new(speed).range(0.5..=10_000.0).speed(0.5).max_decimals(1).suffix(" tokens/s");
        let drag = ui.add(drag).on_hover_text("how fast it plays");
        if drag.changed() && is_playing {
            replay.set_speed(*speed);
        }
    });
    if to < position {
        app.pending.clear(); // it is of before; all comes again
    }
    let Some(replay) = app.source.replay() else { return };
    if to != position {
        replay.seek(to);
    }
    if plays != is_playing {
        toggle(app);
    }
}

/// Plays or pauses a recording; plays it from the beginning when it is at its end.
pub(super) fn toggle(app: &mut App) {
    let speed = app.drive.speed;
    let Some(replay) = app.source.replay() else { return };
    if replay.speed() > 0.0 {
        replay.set_speed(0.0);
        return;
    }
    if replay.position() >= replay.len() {
        replay.seek(0);
        app.pending.clear();
    }
    replay.set_speed(speed);
}
