//! The line at the bottom: how source and store stand.

use std::collections::VecDeque;
use std::time::Duration;

use egui::{Sense, Shape, Stroke, Ui, vec2};

use super::App;
use crate::source::{Event, Status};

/// Seconds over which tokens are counted.
const WINDOW: f64 = 2.0;

/// How fast tokens are written.
#[derive(Default)]
pub(super) struct Speedometer {
    written: u64,
    marks: VecDeque<(f64, u64)>,
    /// Rate of the last text that ended.
    last: f64,
}

impl Speedometer {
    pub(super) fn count(&mut self, event: &Event) {
        match event {
            Event::Token { token, .. } if token.generated => self.written += 1,
            Event::End { tokens_per_second, .. } => self.last = *tokens_per_second,
            _ => {}
        }
    }

    /// Tokens a second over the last seconds.
    fn rate(&mut self, now: f64) -> Option<f64> {
        self.marks.push_back((now, self.written));
        while self.marks.front().is_some_and(|(at, _)| now - at > WINDOW) {
            self.marks.pop_front();
        }
        let (at, written) = *self.marks.front()?;
        let rate = (self.written - written) as f64 / (now - at);
        (now - at > 0.25 && rate > 0.0).then_some(rate)
    }
}

pub(super) fn ui(app: &mut App, ui: &mut Ui, status: &Status) {
    ui.horizontal(|ui| {
        if status.busy {
            spinner(ui, app.pace);
        }
        let is_shown = status.progress.is_none_or(|(shown, there)| shown >= there);
        let doing = match (status.doing.as_str(), status.busy, status.is_live) {
            ("", true, _) => "at work",
            ("", false, true) => "ready",
            ("", false, false) if is_shown => "all is shown",
            ("", false, false) => "paused",
            (doing, ..) => doing,
        };
        ui.label(doing);
        let now = ui.input(|input| input.time);
        let live = if status.busy && status.is_live { app.speedometer.rate(now) } else { None };
        if !status.busy {
            app.speedometer.marks.clear();
        }
        if let Some(rate) = live.or((app.speedometer.last > 0.0).then_some(app.speedometer.last)) {
            ui.separator();
            let about =
                "Tokens that the model wrote in a second: now while it writes, else of the text that ended last.";
            ui.label(format!("{rate:.1} tokens/s")).on_hover_text(about);
        }
        ui.with_layout(egui::Layout::right_to_left(egui::Align::Center), |ui| store(app, ui));
    });
}

fn store(app: &App, ui: &mut Ui) {
    let (held, budget) = app.store.memory();
    let (evicted, dropped) = app.store.lost();
    let memory = format!("memory {} of {}", bytes(held), bytes(budget));
    ui.label(memory).on_hover_text("Rows of numbers that are kept for the views, and how many may be.");
    ui.separator();
    let count = |ui: &mut Ui, number: u64, what: &str, about: &str| {
        let text = format!("{number} {what}");
        let label = if number > 0 { ui.colored_label(ui.visuals().warn_fg_color, text) } else { ui.weak(text) };
        label.on_hover_text(about);
    };
    let about = "Blocks of rows that were let go to keep within the memory: the oldest of the bulkiest kind first, routing \
                 last. Running totals keep counting them; views say where rows are missing.";
    count(ui, evicted, "blocks evicted", about);
    ui.separator();
    let about = "Frames that never came, because the model was faster than what reads them. The text is complete, but \
                 these tokens have no numbers.";
    count(ui, dropped, "frames dropped", about);
}

/// A small turning arc. It asks for a new frame only ten times a second, unlike egui's.
fn spinner(ui: &mut Ui, pace: Duration) {
    let (place, response) = ui.allocate_exact_size(vec2(12.0, 12.0), Sense::hover());
    response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::ProgressIndicator, true, "busy"));
    let turn = (ui.input(|input| input.time) * 10.0).floor() as f32 * 0.6;
    let points: Vec<egui::Pos2> =
        (0..=12).map(|i| place.center() + 5.0 * egui::Vec2::angled(turn + i as f32 * 0.35)).collect();
    ui.painter().add(Shape::line(points, Stroke::new(1.5, ui.visuals().text_color())));
    ui.ctx().request_repaint_after(pace.max(Duration::from_millis(100)));
}

/// Bytes as people write them.
pub(super) fn bytes(bytes: usize) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let power = (bytes.max(1).ilog2() / 10).min(3);
    let number = bytes as f64 / 1024f64.powi(power as i32);
    let unit = UNITS[power as usize];
    if power == 0 || number >= 100.0 || number.fract() == 0.0 {
        format!("{number:.0} {unit}")
    } else {
        format!("{number:.1} {unit}")
    }
}
