//! The lines in sight: laid out, drawn, and what the user does with them.

use std::collections::HashMap;

use egui::{Align, Color32, EventFilter, FontId, Key, Rect, ScrollArea, Sense, Stroke, StrokeKind, Ui, pos2, vec2};

use super::Scale;
use crate::analysis::text::{Lines, Piece};
use crate::colour::text_on;
use crate::store::Sequence;
use crate::subject::Subject;
use crate::views::{choose, pieces};

const FONT: FontId = FontId { size: 14.0, family: egui::FontFamily::Proportional };
const LINE: f32 = 24.0;
/// Room for the position of each line's first token.
const GUTTER: f32 = 48.0;
/// Distinct tokens that are measured in a frame at most.
const MEASURED: usize = 2000;

/// Where the lines of a text break.
#[derive(Default)]
pub struct Layout {
    /// What the lines were made for: text and width.
    made_for: Option<(u32, f32)>,
    /// Pixels per point that widths were measured at.
    density: f32,
    widths: HashMap<u32, f32>,
    lines: Option<Lines>,
    unfinished: bool,
}

impl Layout {
    /// Whether some of the text has no lines yet.
    pub fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// Measures tokens that were not measured yet and breaks lines, as far as that goes in a frame.
    pub fn update(&mut self, ui: &Ui, subject: &Subject, sequence: &Sequence) {
        let density = ui.ctx().pixels_per_point();
        let room = (ui.available_width() - GUTTER - 16.0).max(80.0).floor();
        if self.density.to_bits() != density.to_bits() {
            (self.density, self.made_for) = (density, None);
            self.widths.clear();
        }
        let made_for = Some((sequence.info.number, room));
        let too_many = self.lines.as_ref().is_some_and(|lines| lines.tokens() > sequence.tokens.len());
        if self.made_for != made_for || too_many {
            self.made_for = made_for;
            self.lines = None;
        }
        let lines = self.lines.get_or_insert_with(|| Lines::new(room));
        let mut measured = 0;
        for token in &sequence.tokens[lines.tokens()..] {
            let width = match self.widths.get(&token.id) {
                Some(width) => *width,
                None if measured < MEASURED => {
                    measured += 1;
                    let job = pieces::job(subject, token.id, &FONT, Color32::PLACEHOLDER);
                    // A pixel of room on both sides shows where tokens meet.
                    let width = ui.fonts_mut(|fonts| fonts.layout_job(job)).size().x.max(3.0) + 2.0;
                    *self.widths.entry(token.id).or_insert(width)
                }
                None => break,
            };
            let (begins_word, ends_line) = pieces::breaks(subject, token.id);
            lines.push(Piece { width, begins_word, ends_line });
        }
        self.unfinished = lines.tokens() < sequence.tokens.len();
        if self.unfinished {
            ui.ctx().request_repaint();
        }
    }

    /// The page of a text that this was updated for.
    pub fn page<'a>(&'a self, subject: &'a Subject, sequence: &'a Sequence, scale: &'a Scale) -> Option<Page<'a>> {
        Some(Page { subject, sequence, lines: self.lines.as_ref()?, widths: &self.widths, scale })
    }
}

/// The line that stands for "written by the model".
pub fn underline(ui: &Ui, place: Rect) {
    let y = place.max.y - 1.0;
    ui.painter().hline(place.x_range(), y, Stroke::new(1.5, ui.visuals().hyperlink_color));
}

/// A text to draw.
pub struct Page<'a> {
    subject: &'a Subject,
    sequence: &'a Sequence,
    lines: &'a Lines,
    widths: &'a HashMap<u32, f32>,
    scale: &'a Scale,
}

impl Page<'_> {
    /// The tokens of a line with their left edges and widths.
    fn places(&self, line: usize) -> impl Iterator<Item = (usize, f32, f32)> {
        self.lines.line(line).scan(0.0, |x, token| {
            let width = self.sequence.tokens.get(token).and_then(|token| self.widths.get(&token.id));
            let width = width.copied().unwrap_or(0.0);
            *x += width;
            Some((token, *x - width, width))
        })
    }

    fn token_at(&self, line: usize, x: f32) -> Option<usize> {
        self.places(line).take_while(|(_, left, _)| *left <= x).last().map(|(token, ..)| token)
    }

    /// Draws the lines in sight; `reveal` names a token to scroll to, `of` what is told of a token, `about` its tooltip.
    /// Returns the token that was chosen.
    pub fn show(
        &self,
        ui: &mut Ui,
        selected: Option<usize>,
        reveal: Option<usize>,
        follows: bool,
        of: &dyn Fn(usize) -> Option<f32>,
        about: &dyn Fn(usize) -> String,
    ) -> Option<usize> {
        let area = ScrollArea::vertical().auto_shrink(false).stick_to_bottom(follows);
        let answer = area.show_viewport(ui, |ui, seen| {
            ui.set_height(self.lines.len() as f32 * LINE);
            let whole = ui.max_rect();
            let top = whole.top();
            let first = (seen.min.y / LINE).floor().max(0.0) as usize;
            let end = ((seen.max.y / LINE).ceil().max(0.0) as usize).min(self.lines.len());
            if let Some(token) = reveal {
                reveal_line(ui, top, self.lines.line_of(token), seen);
            }
            let sight = Rect::from_min_size(pos2(whole.left(), top + seen.min.y), vec2(whole.width(), seen.height()));
            let response = ui.interact(sight, ui.make_persistent_id("tokens"), Sense::click());
            let label = self.label(selected);
            response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Document, true, &label));
            for line in first..end {
                self.paint(ui, whole.left(), top, line, selected, of);
            }
            if response.has_focus() {
                ui.painter().rect_stroke(sight, 2.0, ui.visuals().selection.stroke, StrokeKind::Inside);
            }
            let token_under = |at: egui::Pos2| {
                let line = ((at.y - top) / LINE).floor();
                if line < 0.0 || at.x < whole.left() + GUTTER {
                    return None;
                }
                let place = self.token_at(line as usize, at.x - whole.left() - GUTTER)?;
                let end = self.places(line as usize).last().map_or(0.0, |(_, left, width)| left + width);
                (at.x - whole.left() - GUTTER <= end).then_some(place)
            };
            let mut chosen = None;
            if response.clicked() {
                response.request_focus();
                chosen = response.interact_pointer_pos().and_then(token_under);
            }
            if response.has_focus() {
                let arrows = EventFilter { horizontal_arrows: true, vertical_arrows: true, ..EventFilter::default() };
                ui.memory_mut(|memory| memory.set_focus_lock_filter(response.id, arrows));
                chosen = self.moved(ui, selected, first).or(chosen);
            }
            if let Some(token) = response.hover_pos().and_then(token_under) {
                response.on_hover_ui_at_pointer(|ui| {
                    ui.label(about(token));
                });
            }
            chosen
        });
        answer.inner
    }

    fn label(&self, selected: Option<usize>) -> String {
        let name = choose::shorten(&self.sequence.info.name, 60);
        let count = self.sequence.tokens.len();
        let Some(token) = selected else { return format!("text {name}, {count} tokens") };
        let word = pieces::word(self.subject, self.sequence.tokens[token].id);
        format!("text {name}, {count} tokens, token {token} selected: {word}")
    }

    /// The token that a key leads to.
    fn moved(&self, ui: &Ui, selected: Option<usize>, first_line: usize) -> Option<usize> {
        let pressed = |key| ui.input_mut(|input| input.consume_key(egui::Modifiers::NONE, key));
        let last = self.lines.tokens().checked_sub(1)?;
        let at = selected.unwrap_or_else(|| self.lines.line(first_line).start).min(last);
        let line = self.lines.line_of(at);
        let middle = || self.places(line).find(|place| place.0 == at).map_or(0.0, |(_, x, width)| x + width / 2.0);
        if pressed(Key::ArrowLeft) {
            Some(if selected.is_some() { at.saturating_sub(1) } else { at })
        } else if pressed(Key::ArrowRight) {
            Some(if selected.is_some() { (at + 1).min(last) } else { at })
        } else if pressed(Key::ArrowUp) {
            self.token_at(line.saturating_sub(1), middle())
        } else if pressed(Key::ArrowDown) {
            self.token_at((line + 1).min(self.lines.len() - 1), middle())
        } else if pressed(Key::Home) {
            Some(0)
        } else if pressed(Key::End) {
            Some(last)
        } else {
            None
        }
    }

    fn paint(
        &self,
        ui: &Ui,
        left: f32,
        top: f32,
        line: usize,
        selected: Option<usize>,
        of: &dyn Fn(usize) -> Option<f32>,
    ) {
        let y = top + line as f32 * LINE;
        let quiet = ui.visuals().weak_text_color();
        let at = pos2(left + GUTTER - 8.0, y + LINE / 2.0);
        let first = self.lines.line(line).start;
        ui.painter().text(at, egui::Align2::RIGHT_CENTER, first, FontId::proportional(10.0), quiet);
        for (position, x, width) in self.places(line) {
            let token = self.sequence.tokens[position];
            let place = Rect::from_min_size(pos2(left + GUTTER + x, y + 1.0), vec2(width, LINE - 2.0));
            let fill = of(position).and_then(|value| self.scale.colour(value));
            let mut colour = ui.visuals().text_color();
            if let Some(fill) = fill {
                ui.painter().rect_filled(place.shrink2(vec2(0.5, 0.0)), 2.0, fill);
                colour = text_on(fill);
            }
            let job = pieces::job(self.subject, token.id, &FONT, colour);
            let galley = ui.fonts_mut(|fonts| fonts.layout_job(job));
            let from = pos2(place.min.x + 1.0, place.center().y - galley.size().y / 2.0);
            ui.painter().galley(from, galley, colour);
            if token.generated {
                underline(ui, place);
            }
            if selected == Some(position) {
                let mark = Stroke::new(2.0, Color32::from_rgb(255, 80, 80));
                ui.painter().rect_stroke(place, 2.0, mark, StrokeKind::Outside);
            }
        }
    }
}

/// Scrolls to a line if it is out of sight.
fn reveal_line(ui: &Ui, top: f32, line: usize, seen: Rect) {
    let y = line as f32 * LINE;
    if y < seen.min.y || y + LINE > seen.max.y {
        let place = Rect::from_min_size(pos2(ui.max_rect().left(), top + y), vec2(10.0, LINE));
        ui.scroll_to_rect_animation(place, Some(Align::Center), egui::style::ScrollAnimation::none());
    }
}
