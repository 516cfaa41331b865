//! A text as its tokens, each with a colour behind it: to be read, clicked, and walked through with the arrow keys.

use std::sync::Arc;

use egui::text::{LayoutJob, TextFormat};
use egui::{Color32, CornerRadius, Galley, Key, Pos2, Rect, Sense, Stroke, StrokeKind, Ui, Vec2, vec2};

use crate::colour::text_on;

/// Tokens that are laid out at most; the others are left out on both sides of the selected one.
const MAX_TOKENS: usize = 1500;

/// Points around the text.
const MARGIN: f32 = 3.0;

/// How a token looks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Look {
    /// The colour behind it.
    pub fill: Option<Color32>,
    /// Whether it is underlined: says the same as a colour to those who cannot tell it.
    pub underlined: bool,
    /// Whether it stands back.
    pub weak: bool,
}

/// A text to show.
pub struct Spec<'a> {
    /// Name for the accessibility tree.
    pub name: &'a str,
    /// How many tokens there are.
    pub tokens: usize,
    /// The one that is marked.
    pub selected: Option<usize>,
    /// The text of a token, as [`crate::subject::Subject::piece`] gives it.
    pub piece: &'a dyn Fn(usize) -> String,
    /// How a token looks.
    pub look: &'a dyn Fn(usize) -> Look,
    /// What to say of a token when the pointer is over it.
    pub tooltip: &'a dyn Fn(usize) -> String,
}

/// A text on the screen. Keep one for each that is drawn.
#[derive(Debug, Default)]
pub struct Strip {
    followed: Option<usize>,
}

impl Strip {
    /// Draws the text into the room that there is, scrolling if it is longer. Returns the token that was clicked, or
    /// reached with the arrow keys.
    pub fn show(&mut self, ui: &mut Ui, spec: &Spec<'_>) -> Option<usize> {
        let first = spec.selected.map_or(spec.tokens, |at| at + MAX_TOKENS / 2).min(spec.tokens);
        let first = first.saturating_sub(MAX_TOKENS);
        let end = (first + MAX_TOKENS).min(spec.tokens);
        if end - first < spec.tokens {
            ui.weak(format!("tokens {first} to {} of {}", end - 1, spec.tokens));
        }
        let area = egui::ScrollArea::vertical().id_salt(spec.name).auto_shrink([false, false]);
        area.show(ui, |ui| self.tokens(ui, spec, first..end)).inner
    }

    fn tokens(&mut self, ui: &mut Ui, spec: &Spec<'_>, shown: std::ops::Range<usize>) -> Option<usize> {
        let (job, starts) = job(ui, spec, shown.clone());
        let galley = ui.painter().layout_job(job);
        // Room for the mark around tokens at the edges.
        let size = galley.size().max(Vec2::splat(16.0)) + Vec2::splat(2.0 * MARGIN);
        let (area, response) = ui.allocate_exact_size(size, Sense::click());
        response.widget_info(|| {
            let of = |at: usize| format!(", token {at} {:?} selected", (spec.piece)(at));
            let label = format!("{}: {} tokens{}", spec.name, spec.tokens, spec.selected.map(of).unwrap_or_default());
            egui::WidgetInfo::labeled(egui::Role::Image, true, label)
        });
        let laid = Laid { galley, starts, first: shown.start, origin: area.min + Vec2::splat(MARGIN) };
        laid.each(|token, place| {
            if !ui.is_rect_visible(place) {
                return;
            }
            let look = (spec.look)(token);
            if let Some(fill) = look.fill {
                // A gap on each side tells neighbours apart.
                ui.painter().rect_filled(place.shrink2(vec2(0.5, 1.0)), CornerRadius::same(2), fill);
            }
            if look.underlined {
                let line = Stroke::new(1.5, colour(ui, look));
                ui.painter().hline(place.min.x + 2.0..=place.max.x - 2.0, place.max.y - 3.0, line);
            }
        });
        ui.painter().galley(laid.origin, Arc::clone(&laid.galley), ui.visuals().text_color());
        let places = spec.selected.filter(|at| shown.contains(at)).map(|at| laid.places(at)).unwrap_or_default();
        for place in &places {
            let mark = Stroke::new(2.0, Color32::from_rgb(255, 80, 80));
            ui.painter().rect_stroke(*place, CornerRadius::same(2), mark, StrokeKind::Outside);
        }
        if self.followed != spec.selected {
            self.followed = spec.selected;
            if let Some(place) = places.first() {
                ui.scroll_to_rect(*place, None);
            }
        }
        if response.has_focus() {
            let filter = egui::EventFilter { horizontal_arrows: true, vertical_arrows: true, ..Default::default() };
            ui.memory_mut(|memory| memory.set_focus_lock_filter(response.id, filter));
            ui.painter().rect_stroke(area.expand(2.0), 2.0, ui.visuals().selection.stroke, StrokeKind::Inside);
        }
        let moved = if response.has_focus() { Self::moved(ui, spec, &laid, places.first()) } else { None };
        let clicked = response.clicked().then(|| response.interact_pointer_pos()).flatten();
        if clicked.is_some() {
            response.request_focus();
        }
        let chosen = clicked.and_then(|at| laid.token(at)).or(moved);
        if chosen.is_some() {
            self.followed = chosen; // it is in sight already, or was scrolled to
        }
        if let Some(at) = response.hover_pos().and_then(|at| laid.token(at)) {
            response.on_hover_text_at_pointer((spec.tooltip)(at));
        }
        chosen
    }

    fn moved(ui: &Ui, spec: &Spec<'_>, laid: &Laid, place: Option<&Rect>) -> Option<usize> {
        let pressed = |key| ui.input_mut(|input| input.consume_key(egui::Modifiers::NONE, key));
        let last = spec.tokens.checked_sub(1)?;
        let at = spec.selected.unwrap_or(0);
        let row = place.map_or(16.0, Rect::height);
        let by_row = |rows: f32| place.and_then(|place| laid.token(place.center() + Vec2::new(0.0, rows * row)));
        let to = if pressed(Key::ArrowLeft) {
            Some(at.saturating_sub(1))
        } else if pressed(Key::ArrowRight) {
            Some(at + 1)
        } else if pressed(Key::ArrowUp) {
            by_row(-1.0)
        } else if pressed(Key::ArrowDown) {
            by_row(1.0)
        } else {
            None
        }?;
        let to = to.min(last);
        if let Some(place) = laid.places(to).first() {
            ui.scroll_to_rect(*place, None);
        }
        Some(to)
    }
}

/// The colour of a token's text.
fn colour(ui: &Ui, look: Look) -> Color32 {
    match look.fill {
        Some(fill) => text_on(fill),
        None if look.weak => ui.visuals().weak_text_color(),
        None => ui.visuals().text_color(),
    }
}

/// The tokens as one text, and the number of characters before each.
fn job(ui: &Ui, spec: &Spec<'_>, shown: std::ops::Range<usize>) -> (LayoutJob, Vec<usize>) {
    let mut job = LayoutJob::default();
    job.wrap.max_width = ui.available_width() - 2.0 * MARGIN - 4.0;
    let font = egui::TextStyle::Body.resolve(ui.style());
    let mut starts = Vec::with_capacity(shown.len());
    let mut characters = 0;
    for at in shown {
        let piece = (spec.piece)(at);
        let color = colour(ui, (spec.look)(at));
        let format = TextFormat { font_id: font.clone(), color, line_height: Some(20.0), ..TextFormat::default() };
        let mut text: String = piece.chars().map(|c| if c.is_control() { '·' } else { c }).collect();
        if text.is_empty() {
            text.push('·');
        }
        if piece.ends_with('¶') {
            text.push('\n');
        }
        starts.push(characters);
        characters += text.chars().count();
        job.append(&text, 0.0, format);
    }
    (job, starts)
}

/// Where the tokens are.
struct Laid {
    galley: Arc<Galley>,
    /// Characters before each token, from `first` on.
    starts: Vec<usize>,
    first: usize,
    origin: Pos2,
}

impl Laid {
    /// The token at a place.
    fn token(&self, at: Pos2) -> Option<usize> {
        let at = (at - self.origin).to_pos2();
        let mut characters = 0;
        for row in &self.galley.rows {
            if (row.pos.y..row.pos.y + row.size.y).contains(&at.y) {
                let x = at.x - row.pos.x;
                let glyph = row.glyphs.iter().position(|glyph| x < glyph.max_x())?;
                let behind = self.starts.partition_point(|start| *start <= characters + glyph);
                return Some(self.first + behind.checked_sub(1)?);
            }
            characters += row.glyphs.len() + usize::from(row.ends_with_newline);
        }
        None
    }

    /// Tells every token with its places, one for each row that it touches.
    fn each(&self, mut tell: impl FnMut(usize, Rect)) {
        let (mut index, mut character) = (0, 0);
        for row in &self.galley.rows {
            let corner = self.origin + row.pos.to_vec2();
            let (mut from, mut is_blank) = (None, true);
            for (at, glyph) in row.glyphs.iter().enumerate() {
                let left = *from.get_or_insert(glyph.pos.x);
                is_blank &= glyph.chr.is_whitespace();
                character += 1;
                let is_last = self.starts.get(index + 1) == Some(&character);
                // A blank that the row's end cuts off from its word is not worth a place.
                if is_last || (at + 1 == row.glyphs.len() && !is_blank) {
                    let (min, max) = (vec2(left, 0.0), vec2(glyph.max_x(), row.size.y));
                    tell(self.first + index, Rect::from_min_max(corner + min, corner + max));
                }
                if is_last {
                    (from, is_blank) = (None, true);
                    index += 1;
                }
            }
            if row.ends_with_newline {
                character += 1;
                index += usize::from(self.starts.get(index + 1) == Some(&character));
            }
        }
    }

    /// The places of a token.
    fn places(&self, token: usize) -> Vec<Rect> {
        let mut places = Vec::new();
        self.each(|of, place| {
            if of == token {
                places.push(place);
            }
        });
        places
    }
}
