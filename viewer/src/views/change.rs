//! Change the model and run a text again from one of its tokens.

use egui::text::{LayoutJob, TextFormat};
use egui::{Button, ComboBox, DragValue, Label, RichText, Stroke, TextEdit, TextStyle, Ui};
use moewe_plan::{Edit, ModelInfo, Place, check_edits};

use super::choose::shorten;
use super::pieces::word;
use crate::analysis::divergence::branch;
use crate::numbers::Table;
use crate::source::{Command, Prompt, Request};
use crate::store::{Sequence, Store};
use crate::subject::Subject;
use crate::view::{Cx, View};

/// Tokens to write where the text itself ends at the chosen token.
const NEW_TOKENS: usize = 32;
/// Tokens of the text that are shown on either side of the chosen one.
const CONTEXT: usize = 10;
/// Characters of a name or a list of changes that are shown.
const NAME: usize = 40;

/// A list of changes and how to run with them.
pub struct Change {
    edits: Vec<Edit>,
    /// What of it the model cannot do, and for which list that was found out.
    checked: Option<(Vec<Edit>, Checked)>,
    typed: String,
    complaint: Option<String>,
    in_all_layers: bool,
    factor: f32,
    direction: u32,
    /// As many as the text has there without a number.
    new_tokens: Option<usize>,
    temperature: f32,
    seed: u64,
}

/// What is wrong with each change alone, and with all of them together.
#[derive(Default)]
struct Checked {
    each: Vec<Option<String>>,
    together: Option<String>,
}

impl Checked {
    fn new(model: &ModelInfo, edits: &[Edit]) -> Self {
        let alone = |edit| check_edits(model, std::slice::from_ref(edit)).err().map(|error| error.what);
        let each: Vec<_> = edits.iter().map(alone).collect();
        let is_sound = each.iter().all(Option::is_none);
        let together = if is_sound { check_edits(model, edits).err().map(|error| error.to_string()) } else { None };
        Self { each, together }
    }

    fn is_sound(&self) -> bool {
        self.together.is_none() && self.each.iter().all(Option::is_none)
    }
}

impl Default for Change {
    fn default() -> Self {
        Self {
            edits: Vec::new(),
            checked: None,
            typed: String::new(),
            complaint: None,
            in_all_layers: false,
            factor: 0.5,
            direction: 0,
            new_tokens: None,
            temperature: 0.0,
            seed: 0,
        }
    }
}

/// The selected text and the token to run again from: the selected one, or the last of the prompt.
fn start<'a>(cx: &Cx<'a>) -> Option<(&'a Sequence, usize)> {
    let store = cx.store;
    let text = store.sequence(cx.selection.sequence).or(store.sequences().last())?;
    let last = text.tokens.len().checked_sub(1)?;
    let of_prompt = text.info.prompt_tokens.saturating_sub(1) as usize;
    let selected = cx.selection.token.filter(|_| cx.selection.sequence == text.info.number);
    Some((text, selected.map_or(of_prompt, |token| token as usize).min(last)))
}

/// Versions of a text, itself among them, oldest first.
fn family(store: &Store, number: u32) -> impl Iterator<Item = &Sequence> {
    store.sequences().iter().filter(move |text| branch(store, number, text.info.number).is_some())
}

impl View for Change {
    fn name(&self) -> &'static str {
        "change"
    }

    fn about(&self) -> &'static str {
        "Mute, force or scale experts, pin the router's choice, zero latent directions or heads, and run the text again from \
         any token to see what they were good for."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        egui::ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
            if cx.is_live {
                self.live(ui, cx);
            } else {
                recorded(ui, cx.subject);
            }
            versions(ui, cx);
        });
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let mut tables = vec![Table::words("change.edits", "edit", self.edits.iter().map(Edit::to_string).collect())];
        if let Some((text, at)) = start(cx) {
            let from = vec![i64::from(text.info.number), at as i64];
            tables.push(Table::integers("change.from", &[("text, token", 2)], from));
            let versions: Vec<&Sequence> = family(cx.store, text.info.number).collect();
            let parents =
                versions.iter().map(|text| text.info.parent.map_or([-1, -1], |(n, at)| [n.into(), at.into()]));
            let cells = versions.iter().zip(parents).flat_map(|(text, [parent, position])| {
                [text.info.number.into(), parent, position, text.tokens.len() as i64]
            });
            let axes = [("version", versions.len()), ("number, parent, position, tokens", 4)];
            tables.push(Table::integers("change.versions", &axes, cells.collect()));
            let names = versions.iter().map(|text| text.info.name.clone()).collect();
            tables.push(Table::words("change.versions.name", "version", names));
            let edits = versions.iter().map(|text| listed(&text.info.edits)).collect();
            tables.push(Table::words("change.versions.edits", "version", edits));
        }
        tables
    }
}

/// Why nothing can be changed here.
fn recorded(ui: &mut Ui, subject: &Subject) {
    ui.strong("A recording cannot be changed");
    ui.label(format!(
        "It holds what {} did once; there is no model behind it that could run. To change the model and run again, open it \
         itself:",
        subject.name
    ));
    ui.monospace("moewe view MODEL");
    ui.weak("Texts that were changed when this was recorded can be looked at, and compared in the view compare.");
    ui.add_space(8.0);
}

impl Change {
    fn live(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        let Some((text, at)) = start(cx) else {
            ui.strong("There is no text yet");
            ui.label("Write one first: put something into the prompt box and run it. Then choose a token of it, change the model here, and run it again from there.");
            return;
        };
        beginning(ui, cx, text, at);
        ui.add_space(6.0);
        ui.strong("Changes");
        self.list(ui, &cx.subject.model, &text.info.edits);
        ui.add_space(6.0);
        self.add_from_selection(ui, cx, text, at);
        self.add_typed(ui);
        ui.add_space(6.0);
        self.run(ui, cx, text, at);
        ui.add_space(8.0);
    }

    fn check(&mut self, model: &ModelInfo) {
        if self.checked.as_ref().is_none_or(|(of, _)| *of != self.edits) {
            self.checked = Some((self.edits.clone(), Checked::new(model, &self.edits)));
        }
    }

    /// The changes as sentences whose numbers can be changed.
    fn list(&mut self, ui: &mut Ui, model: &ModelInfo, of_text: &[Edit]) {
        self.check(model);
        if self.edits.is_empty() {
            ui.horizontal_wrapped(|ui| {
                ui.weak("None yet: the text would be repeated as the model is. Add some below.");
                if !of_text.is_empty() && ui.button("Take over those of this text").clicked() {
                    self.edits = of_text.to_vec();
                }
            });
            return;
        }
        let mut removed = None;
        for (index, edit) in self.edits.iter_mut().enumerate() {
            ui.push_id(index, |ui| {
                ui.horizontal(|ui| {
                    let remove = ui.small_button("×").on_hover_text("Take this change off the list");
                    remove
                        .widget_info(|| egui::WidgetInfo::labeled(egui::Role::Button, true, format!("remove {edit}")));
                    if remove.clicked() {
                        removed = Some(index);
                    }
                    sentence(ui, model, edit);
                    let wrong = self.checked.as_ref().and_then(|(_, checked)| checked.each.get(index)?.as_ref());
                    if let Some(wrong) = wrong {
                        ui.colored_label(ui.visuals().error_fg_color, wrong);
                    }
                });
            });
        }
        if let Some(index) = removed {
            self.edits.remove(index);
        }
        if let Some(wrong) = self.checked.as_ref().and_then(|(_, checked)| checked.together.as_ref()) {
            ui.colored_label(ui.visuals().error_fg_color, wrong);
        }
    }

    fn add(&mut self, edit: Edit) {
        if !self.edits.contains(&edit) {
            self.edits.push(edit);
        }
    }

    fn add_from_selection(&mut self, ui: &mut Ui, cx: &Cx<'_>, text: &Sequence, at: usize) {
        let model = &cx.subject.model;
        let layer = cx.selection.layer.min(model.layers.saturating_sub(1));
        let has_experts = self.in_all_layers && !model.moe_layers.is_empty() || model.moe_layers.contains(&layer);
        ui.horizontal_wrapped(|ui| {
            ui.label("Add for");
            ui.selectable_value(&mut self.in_all_layers, false, format!("layer {layer}"))
                .on_hover_text("The layer that is selected in all views");
            ui.selectable_value(&mut self.in_all_layers, true, "all layers");
        });
        let layer_of_edit = (!self.in_all_layers).then_some(layer);
        let place = |number| Place { layer: layer_of_edit, number };
        let without_experts = format!("Layer {layer} has no experts; choose another layer.");
        let unselected = "Select an expert first: click one in a map of routing.";
        let button = |ui: &mut Ui, label: String, about: &str, obstacle: Option<&str>| {
            let button = ui.add_enabled(obstacle.is_none(), Button::new(label)).on_hover_text(about);
            button.on_disabled_hover_text(obstacle.unwrap_or_default()).clicked()
        };
        let mut added = Vec::new();
        ui.horizontal_wrapped(|ui| {
            let expert = cx.selection.expert;
            let obstacle = match expert {
                _ if !has_experts => Some(without_experts.as_str()),
                None => Some(unselected),
                Some(_) => None,
            };
            let name = expert.map_or_else(|| "expert".to_owned(), |expert| format!("expert {expert}"));
            let number = expert.unwrap_or(0);
            if button(ui, format!("Mute {name}"), "It is never chosen; the next best is.", obstacle) {
                added.push(Edit::Mute(place(number)));
            }
            if button(ui, format!("Force {name}"), "Every token is given it, in place of its worst other.", obstacle) {
                added.push(Edit::Force(place(number)));
            }
            if button(ui, format!("Scale {name}"), "What it adds is multiplied by this factor.", obstacle) {
                added.push(Edit::Scale(place(number), self.factor));
            }
            let times = ui.label("by");
            ui.add(DragValue::new(&mut self.factor).speed(0.05).max_decimals(3)).labelled_by(times.id);
            let chosen = text.routing(layer, at).map(|(ids, _)| ids);
            let obstacle = match chosen {
                _ if !has_experts => Some(without_experts.as_str()),
                None => Some("The experts of the token were not recorded: watch with --taps routing."),
                Some(_) => None,
            };
            let label = format!("Pin the {} experts of token {at}", model.num_experts_per_tok);
            let about = "Every token is given the experts that this token was given in the selected layer.";
            if button(ui, label, about, obstacle) {
                added.push(Edit::Pin(layer_of_edit, chosen.unwrap_or_default().to_vec()));
            }
        });
        ui.horizontal_wrapped(|ui| {
            let head = cx.selection.head;
            if button(ui, format!("Zero head {head}"), "The attention head gives nothing.", None) {
                added.push(Edit::ZeroHead(place(head)));
            }
            let about =
                "One number of the latent, the short vector that stands for a token's keys and values, becomes 0.";
            if button(ui, "Zero latent direction".into(), about, None) {
                added.push(Edit::ZeroLatent(place(self.direction)));
            }
            let last = model.kv_lora_rank.saturating_sub(1);
            let value = DragValue::new(&mut self.direction).speed(0.2).range(0..=last);
            let value = ui.add(value).on_hover_text(format!("Which direction, 0 to {last}"));
            value.widget_info(|| egui::WidgetInfo::labeled(egui::Role::SpinButton, true, "latent direction"));
        });
        for edit in added {
            self.add(edit);
        }
    }

    fn add_typed(&mut self, ui: &mut Ui) {
        ui.horizontal_wrapped(|ui| {
            let label = ui.label("or type");
            let field = TextEdit::singleline(&mut self.typed)
                .id_salt("typed change")
                .hint_text("mute 3:17, scale *:5=0.5, …")
                .desired_width(240.0)
                .font(TextStyle::Monospace);
            let field = ui.add(field).labelled_by(label.id).on_hover_text(
                "LAYER:NUMBER, * for all layers:\nmute 3:17\nforce 3:17\nscale 3:17=0.5\npin 3:1+5+8+17\nzero latent 3:7\n\
                 zero head *:2",
            );
            if field.changed() {
                self.complaint = None;
            }
            let entered = field.lost_focus() && ui.input(|input| input.key_pressed(egui::Key::Enter));
            let can_add = !self.typed.trim().is_empty();
            if ui.add_enabled(can_add, Button::new("Add")).clicked() || entered && can_add {
                match self.typed.parse() {
                    Ok(edit) => {
                        self.add(edit);
                        self.typed.clear();
                    }
                    Err(complaint) => self.complaint = Some(complaint),
                }
                field.request_focus();
            }
        });
        if let Some(complaint) = &self.complaint {
            ui.colored_label(ui.visuals().error_fg_color, complaint);
        }
    }

    fn run(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, text: &Sequence, at: usize) {
        self.check(&cx.subject.model);
        let is_sound = self.checked.as_ref().is_none_or(|(_, checked)| checked.is_sound());
        let is_writing = cx.store.sequences().iter().any(|text| text.running);
        let room = (cx.subject.model.max_context as usize).saturating_sub(at + 1);
        let behind = text.tokens.len() - 1 - at;
        let as_before = if behind == 0 { NEW_TOKENS } else { behind }.min(room);
        let obstacle = match () {
            () if is_writing => Some("A text is being written. Stop it, or wait until it is done."),
            () if !is_sound => Some("The model cannot do all of these changes; see what is wrong above."),
            () if room == 0 => Some("The context is full: choose an earlier token."),
            () => None,
        };
        let mut new_tokens = self.new_tokens.unwrap_or(as_before).min(room);
        ui.horizontal_wrapped(|ui| {
            let label = RichText::new(format!("Run from token {at}")).strong();
            let button = ui.add_enabled(obstacle.is_none(), Button::new(label));
            if button.on_disabled_hover_text(obstacle.unwrap_or_default()).clicked() {
                cx.commands.push(Command::Generate(self.request(text, at, new_tokens)));
            }
            if is_writing && ui.button("Stop").on_hover_text("Stop writing").clicked() {
                cx.commands.push(Command::Stop);
            }
            let label = ui.label("tokens to write");
            let value = DragValue::new(&mut new_tokens).speed(0.5).range(1..=room.max(1));
            let value = ui.add(value).labelled_by(label.id);
            if value.on_hover_text("As many as the text has behind the token, if you do not change it").changed() {
                self.new_tokens = Some(new_tokens);
            }
            let label = ui.label("temperature");
            let value = DragValue::new(&mut self.temperature).speed(0.02).range(0.0..=5.0).max_decimals(2);
            let value = ui.add(value).labelled_by(label.id);
            value.on_hover_text("How freely tokens are drawn; 0 always takes the likeliest one");
            let label = ui.label("seed");
            let value = ui.add_enabled(self.temperature > 0.0, DragValue::new(&mut self.seed)).labelled_by(label.id);
            value
                .on_hover_text("The same seed draws the same tokens")
                .on_disabled_hover_text("Without temperature nothing is drawn");
        });
        if let Some(obstacle) = obstacle {
            ui.weak(obstacle);
        }
        ui.label(format!(
            "The changes act on the whole text: tokens 0 to {at} stay the same words, but are computed again with the changes, so \
             their routing and latents may differ, too."
        ));
    }

    fn request(&self, text: &Sequence, at: usize, max_new_tokens: usize) -> Request {
        let name = match self.edits.as_slice() {
            [] => format!("{}, again", text.info.name),
            [edit] => format!("{}, {edit}", text.info.name),
            edits => format!("{}, {} changes", text.info.name, edits.len()),
        };
        Request {
            prompt: Prompt::Tokens(text.tokens[..=at].iter().map(|token| token.id).collect()),
            name: Some(name),
            max_new_tokens,
            temperature: self.temperature,
            seed: self.seed,
            edits: self.edits.clone(),
            parent: Some((text.info.number, at as u32 + 1)),
        }
    }
}

/// Which text, from which token on, and the words around it.
fn beginning(ui: &mut Ui, cx: &Cx<'_>, text: &Sequence, at: usize) {
    ui.horizontal_wrapped(|ui| {
        ui.label("Repeat");
        ui.strong(&text.info.name);
        ui.label(format!("and write anew behind token {at}"));
        if cx.selection.token.is_none() {
            ui.weak("(the end of its prompt: no token is selected)");
        }
        if !text.info.edits.is_empty() {
            ui.weak(format!("It was written with {}.", listed(&text.info.edits)));
        }
    });
    let font = TextStyle::Monospace.resolve(ui.style());
    let (kept, gone) = (ui.visuals().text_color(), ui.visuals().weak_text_color());
    let mut job = LayoutJob::default();
    let mut append = |text: &str, format: TextFormat| job.append(text, 0.0, format);
    let first = at.saturating_sub(CONTEXT);
    if first > 0 {
        append("…", TextFormat::simple(font.clone(), gone));
    }
    for (position, token) in text.tokens.iter().enumerate().take(at + 1 + CONTEXT).skip(first) {
        let colour = if position > at { gone } else { kept };
        let mut format = TextFormat::simple(font.clone(), colour);
        if position == at {
            format.background = ui.visuals().selection.bg_fill;
            format.color = ui.visuals().selection.stroke.color;
        } else if position > at {
            format.strikethrough = Stroke::new(1.0, gone);
        }
        append(&word(cx.subject, token.id), format);
    }
    if at + 1 + CONTEXT < text.tokens.len() {
        append("…", TextFormat::simple(font, gone));
    }
    ui.add(Label::new(job)).on_hover_text("What stays, the chosen token, and what is written anew");
}

/// A change in words, with its numbers to drag or type.
fn sentence(ui: &mut Ui, model: &ModelInfo, edit: &mut Edit) {
    let experts = model.experts.saturating_sub(1);
    match edit {
        Edit::Mute(place) => of_place(ui, model, "mute expert", place, experts),
        Edit::Force(place) => of_place(ui, model, "force expert", place, experts),
        Edit::Scale(place, factor) => {
            of_place(ui, model, "scale expert", place, experts);
            let label = ui.label("by");
            ui.add(DragValue::new(factor).speed(0.05).max_decimals(3)).labelled_by(label.id);
        }
        Edit::Pin(layer, pinned) => {
            let label = ui.label("pin");
            layers(ui, &label, layer, &model.moe_layers);
            ui.label("to experts");
            for expert in pinned {
                ui.add(DragValue::new(expert).speed(0.1).range(0..=experts)).labelled_by(label.id);
            }
        }
        Edit::ZeroLatent(place) => {
            of_place(ui, model, "zero latent direction", place, model.kv_lora_rank.saturating_sub(1));
        }
        Edit::ZeroHead(place) => of_place(ui, model, "zero head", place, model.num_attention_heads.saturating_sub(1)),
    }
}

fn of_place(ui: &mut Ui, model: &ModelInfo, what: &str, place: &mut Place, last: u32) {
    let label = ui.label(what);
    // What was typed is shown as it was typed; what is wrong with it stands behind it.
    let number = DragValue::new(&mut place.number).speed(0.1).range(0..=last).clamp_existing_to_range(false);
    ui.add(number).labelled_by(label.id);
    let label = ui.label("in");
    if what.ends_with("expert") {
        layers(ui, &label, &mut place.layer, &model.moe_layers);
    } else {
        layers(ui, &label, &mut place.layer, &(0..model.layers).collect::<Vec<_>>());
    }
}

fn layers(ui: &mut Ui, label: &egui::Response, layer: &mut Option<u32>, possible: &[u32]) {
    let name = |layer: Option<u32>| layer.map_or_else(|| "all layers".to_owned(), |layer| format!("layer {layer}"));
    let menu = ComboBox::from_id_salt("layer").width(84.0).selected_text(name(*layer)).show_ui(ui, |ui| {
        ui.selectable_value(layer, None, name(None));
        for &one in possible {
            ui.selectable_value(layer, Some(one), name(Some(one)));
        }
    });
    menu.response.labelled_by(label.id);
}

/// The versions of the selected text, to look at and to compare.
fn versions(ui: &mut Ui, cx: &mut Cx<'_>) {
    let store = cx.store;
    let Some((text, _)) = start(cx) else { return };
    let number = text.info.number;
    let versions: Vec<&Sequence> = family(store, number).collect();
    if versions.len() < 2 {
        return;
    }
    ui.strong("Versions of this text");
    egui::Grid::new("versions").striped(true).num_columns(4).show(ui, |ui| {
        for version in versions {
            let info = &version.info;
            if ui.selectable_label(info.number == number, shorten(&info.name, NAME)).on_hover_text(&info.name).clicked()
            {
                cx.selection.sequence = info.number;
            }
            let what = match info.parent {
                _ if !info.edits.is_empty() => listed(&info.edits),
                None => "as the model is".to_owned(),
                Some(_) => "no changes".to_owned(),
            };
            ui.label(shorten(&what, NAME)).on_hover_text(what);
            let from = info.parent.map_or_else(String::new, |(_, position)| format!("anew from token {position}"));
            let state = if version.running { ", being written" } else { "" };
            ui.weak(format!("{} tokens {from}{state}", version.tokens.len()));
            let is_other = info.number != number;
            let compare = ui.add_enabled(is_other, Button::new("Compare").small());
            compare.widget_info(|| {
                egui::WidgetInfo::labeled(egui::Role::Button, is_other, format!("compare with {}", info.name))
            });
            if compare.on_hover_text("Shows it beside the selected text in the view compare").clicked() {
                cx.selection.other = Some(info.number);
            }
            ui.end_row();
        }
    });
}

fn listed(edits: &[Edit]) -> String {
    edits.iter().map(Edit::to_string).collect::<Vec<_>>().join(", ")
}
