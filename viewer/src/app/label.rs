//! Words for screen readers, where a widget shows a sign or nothing.

use egui::{Color32, Response, Ui, WidgetInfo};

/// Gives a button with a sign the words that a screen reader says.
pub(super) fn label(response: &Response, words: &str) {
    response.widget_info(|| WidgetInfo::labeled(egui::Role::Button, response.enabled(), words));
}

/// The same for a text field.
pub(super) fn label_edit(response: &Response, words: &str, text: &str) {
    response.widget_info(|| {
        let mut info = WidgetInfo::text_edit(response.enabled(), text, text, words);
        info.label = Some(words.to_owned());
        info
    });
}

/// The colour of what can be stopped.
pub(super) fn warning(ui: &Ui) -> Color32 {
    ui.visuals().warn_fg_color
}
