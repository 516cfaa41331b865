//! What the headers of views have in common: which text, layer and expert.

use egui::{ComboBox, DragValue, Slider, Ui};

use crate::store::Sequence;
use crate::view::Cx;

/// The selected text; the newest if there is no such text.
pub fn sequence<'a>(cx: &Cx<'a>) -> Option<&'a Sequence> {
    let store = cx.store;
    store.sequence(cx.selection.sequence).or(store.sequences().last())
}

/// The selected layer if it has experts, else the nearest that has.
pub fn moe_layer(cx: &Cx<'_>) -> Option<u32> {
    let selected = cx.selection.layer;
    cx.moe_layers().iter().copied().min_by_key(|layer| layer.abs_diff(selected))
}

/// The selected token of a text, if it has so many.
pub fn token(cx: &Cx<'_>, sequence: &Sequence) -> Option<usize> {
    let is_of_text = cx.selection.sequence == sequence.info.number;
    cx.selection.token.map(|token| token as usize).filter(|token| is_of_text && *token < sequence.tokens.len())
}

/// Selects a token.
pub fn select(cx: &mut Cx<'_>, sequence: &Sequence, token: usize) {
    cx.selection.sequence = sequence.info.number;
    cx.selection.token = Some(token as u32);
}

/// A menu of texts, if there are several.
pub fn text(ui: &mut Ui, cx: &mut Cx<'_>) {
    let Some(shown) = sequence(cx) else { return };
    if cx.store.sequences().len() < 2 {
        return;
    }
    let label = ui.label("text");
    let menu = ComboBox::from_id_salt("text").selected_text(shorten(&shown.info.name, 24)).show_ui(ui, |ui| {
        for sequence in cx.store.sequences() {
            let number = sequence.info.number;
            let name = format!("{} · {} tokens", shorten(&sequence.info.name, 40), sequence.tokens.len());
            if ui.selectable_label(number == shown.info.number, name).clicked() && number != cx.selection.sequence {
                cx.selection.sequence = number;
                cx.selection.token = None;
            }
        }
    });
    menu.response.labelled_by(label.id);
}

/// A slider over the layers that have experts. Returns the one that is shown.
pub fn layer(ui: &mut Ui, cx: &mut Cx<'_>) -> Option<u32> {
    let shown = moe_layer(cx)?;
    let layers = cx.moe_layers();
    let mut index = layers.iter().position(|layer| *layer == shown)?;
    let all = layers.to_vec();
    let names = all.clone();
    let label =
        ui.label("layer").on_hover_text("Layers with experts. Arrow keys move the slider when it has the focus.");
    let slider = Slider::new(&mut index, 0..=all.len() - 1)
        .custom_formatter(move |index, _| names.get(index as usize).map_or_else(String::new, u32::to_string))
        .custom_parser({
            let all = all.clone();
            move |text| {
                let wanted: u32 = text.trim().parse().ok()?;
                let nearest = all.iter().enumerate().min_by_key(|(_, layer)| layer.abs_diff(wanted));
                nearest.map(|(index, _)| index as f64)
            }
        });
    if ui.add(slider).labelled_by(label.id).changed() {
        cx.selection.layer = all[index];
    }
    if cx.selection.layer != shown && cx.selection.layer != all[index] {
        ui.weak(format!("(layer {} has no experts)", cx.selection.layer));
    }
    Some(all[index])
}

/// A number to drag or type for the expert; steps with its arrows.
pub fn expert(ui: &mut Ui, cx: &mut Cx<'_>) {
    let experts = cx.subject.model.experts;
    if experts == 0 {
        return;
    }
    let label = ui.label("expert");
    let mut number = cx.selection.expert.unwrap_or(0).min(experts - 1);
    let step = |ui: &mut Ui, name: &str, hint: &str, by: i64, cx: &mut Cx<'_>| {
        let at = cx.selection.expert.map_or(0, i64::from) + by;
        let possible = (0..i64::from(experts)).contains(&at);
        let button = ui.add_enabled(possible, egui::Button::new(name)).on_hover_text(hint);
        button.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Button, possible, hint));
        if button.clicked() {
            cx.selection.expert = Some(at as u32);
        }
    };
    step(ui, "‹", "previous expert", -1, cx);
    let value = DragValue::new(&mut number).range(0..=experts - 1).speed(1.0);
    let value = if cx.selection.expert.is_none() { value.custom_formatter(|_, _| "–".into()) } else { value };
    if ui.add(value).labelled_by(label.id).on_hover_text("Drag, or click and type a number.").changed() {
        cx.selection.expert = Some(number);
    }
    step(ui, "›", "next expert", 1, cx);
}

/// At most so many characters of a name, in one line.
pub fn shorten(name: &str, most: usize) -> String {
    let mut short: String = name.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if name.chars().count() > most {
        short.push('…');
    }
    short
}
