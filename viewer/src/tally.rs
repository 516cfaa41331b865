//! Rows of a name, a bar and a number.

use egui::{Color32, CornerRadius, Rect, Sense, Stroke, Ui, pos2, vec2};

/// A row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bar {
    /// What it is about.
    pub label: String,
    /// Length of the bar, as a part of the room that there is.
    pub value: f32,
    /// Where a line crosses it, as a part of the same room.
    pub mark: Option<f32>,
    /// The numbers, behind the bar.
    pub text: String,
    /// What to say when the pointer is over it.
    pub hint: String,
}

/// Widths of what stands before and behind the bars, in points.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Widths {
    /// Room for the names.
    pub label: f32,
    /// Room for the numbers.
    pub text: f32,
}

/// Draws rows of bars. If they can be clicked, returns the one that was.
pub fn show(ui: &mut Ui, name: &str, bars: &[Bar], widths: Widths, colour: Color32, clickable: bool) -> Option<usize> {
    ui.scope(|ui| rows(ui, name, bars, widths, colour, clickable)).inner
}

fn rows(ui: &mut Ui, name: &str, bars: &[Bar], widths: Widths, colour: Color32, clickable: bool) -> Option<usize> {
    let mut clicked = None;
    ui.spacing_mut().item_spacing.y = 2.0;
    for (index, bar) in bars.iter().enumerate() {
        let sense = if clickable { Sense::click() } else { Sense::hover() };
        let (row, response) = ui.allocate_exact_size(vec2(ui.available_width(), 20.0), sense);
        response.widget_info(|| {
            let role = if clickable { egui::Role::Button } else { egui::Role::Label };
            egui::WidgetInfo::labeled(role, true, format!("{name}, {}: {}", bar.label, bar.text))
        });
        if clickable && (response.hovered() || response.has_focus()) {
            ui.painter().rect_filled(row, 2.0, ui.visuals().widgets.hovered.weak_bg_fill);
        }
        let font = egui::TextStyle::Body.resolve(ui.style());
        let text = |ui: &Ui, area: Rect, text: &str, right: bool| {
            let (at, align) = if right {
                (area.right_center(), egui::Align2::RIGHT_CENTER)
            } else {
                (area.left_center(), egui::Align2::LEFT_CENTER)
            };
            ui.painter().with_clip_rect(area).text(at, align, text, font.clone(), ui.visuals().text_color());
        };
        let (left, right) = (row.min.x + widths.label, (row.max.x - widths.text).max(row.min.x + widths.label));
        text(ui, Rect::from_min_max(row.min, pos2(left - 6.0, row.max.y)), &bar.label, false);
        let track = Rect::from_min_max(pos2(left, row.min.y + 4.0), pos2(right, row.max.y - 4.0));
        let along = |part: f32| track.min.x + track.width() * part.clamp(0.0, 1.0);
        ui.painter().rect_filled(track, CornerRadius::same(2), ui.visuals().faint_bg_color);
        if bar.value > 0.0 {
            let full = Rect::from_min_max(track.min, pos2(along(bar.value), track.max.y));
            ui.painter().rect_filled(full, CornerRadius::same(2), colour);
        }
        if let Some(mark) = bar.mark.filter(|mark| mark.is_finite()) {
            let line = Stroke::new(2.0, ui.visuals().strong_text_color());
            ui.painter().vline(along(mark), row.min.y + 1.0..=row.max.y - 1.0, line);
        }
        text(ui, Rect::from_min_max(pos2(right + 6.0, row.min.y), row.max), &bar.text, true);
        if response.clicked() {
            clicked = Some(index);
        }
        if !bar.hint.is_empty() {
            response.on_hover_text(&bar.hint);
        }
    }
    clicked
}
