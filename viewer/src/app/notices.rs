//! Lines that tell the user something: news go by themselves, errors stay until they are closed.

use std::collections::VecDeque;

use egui::{Align2, Area, Context, Frame, Id, Order, Rect, RichText, vec2};

use crate::source::Notice;

/// Seconds for which news are shown.
const SECONDS: f64 = 6.0;
/// Lines that are shown, and kept, at most.
const SHOWN: usize = 5;
const KEPT: usize = 50;

#[derive(Default)]
pub(super) struct Notices {
    lines: VecDeque<Line>,
}

struct Line {
    notice: Notice,
    /// How often the same was said.
    times: u32,
    /// When it was first drawn, on egui's clock.
    since: Option<f64>,
}

impl Notices {
    pub(super) fn push(&mut self, notice: Notice) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.notice == notice) {
            (line.times, line.since) = (line.times + 1, None);
            return;
        }
        if self.lines.len() == KEPT {
            let old = self.lines.iter().position(|line| !line.notice.is_error).unwrap_or(0);
            self.lines.remove(old);
        }
        self.lines.push_back(Line { notice, times: 1, since: None });
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Notice> {
        self.lines.iter().map(|line| &line.notice)
    }
}

/// Draws them in the lower right corner of a place.
pub(super) fn ui(notices: &mut Notices, ctx: &Context, place: Rect) {
    if notices.lines.is_empty() {
        return;
    }
    let now = ctx.input(|input| input.time);
    for line in &mut notices.lines {
        line.since.get_or_insert(now);
    }
    let left =
        |line: &Line| if line.notice.is_error { f64::INFINITY } else { line.since.unwrap_or(now) + SECONDS - now };
    notices.lines.retain(|line| left(line) > 0.0);
    let soonest = notices.lines.iter().map(left).fold(f64::INFINITY, f64::min);
    if soonest.is_finite() {
        ctx.request_repaint_after(std::time::Duration::from_secs_f64(soonest));
    }
    let mut closed = None;
    let area = Area::new(Id::unique("notices")).order(Order::Foreground).pivot(Align2::RIGHT_BOTTOM);
    area.fixed_pos(place.right_bottom() - vec2(12.0, 12.0)).show(ctx, |ui| {
        ui.set_max_width(420.0);
        let hidden = notices.lines.len().saturating_sub(SHOWN);
        if hidden > 0 {
            Frame::popup(ui.style()).show(ui, |ui| ui.weak(format!("and {hidden} older")));
        }
        for (index, line) in notices.lines.iter().enumerate().skip(hidden) {
            Frame::popup(ui.style()).show(ui, |ui| {
                ui.horizontal(|ui| {
                    let close = ui.small_button("×").on_hover_text("close");
                    let what = if line.notice.is_error { "close this error" } else { "close this notice" };
                    super::label::label(&close, what);
                    if close.clicked() {
                        closed = Some(index);
                    }
                    let times = if line.times > 1 { format!(" ({} times)", line.times) } else { String::new() };
                    let mut text = RichText::new(format!("{}{times}", line.notice.text));
                    if line.notice.is_error {
                        text = text.color(ui.visuals().error_fg_color);
                    }
                    let label = ui.add(egui::Label::new(text).wrap());
                    let live = if line.notice.is_error {
                        egui::accesskit::Live::Assertive
                    } else {
                        egui::accesskit::Live::Polite
                    };
                    ctx.accesskit_node_builder(label.id, |node| node.set_live(live));
                });
            });
        }
    });
    if let Some(index) = closed {
        notices.lines.remove(index);
    }
}
