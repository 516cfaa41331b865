//! The experts of a layer as squares.

use egui::{Align2, Color32, EventFilter, FontId, Key, Pos2, Rect, Sense, Stroke, StrokeKind, Ui, pos2, vec2};
use moewe_plan::TapGroup;

use crate::analysis::routing::{Kept, Lattice as Places, glow, kept_groups};
use crate::colour::{diverging, text_on};
use crate::heat::{Scale, legend, number};
use crate::store::{Key as Tensor, Part, Sequence};
use crate::view::Cx;
use crate::views::{choose, pieces};

/// Between blocks, in points.
const GAP: f32 = 8.0;
/// Tokens before and behind the one that is shown, in the line of text above.
const CONTEXT: (usize, usize) = (10, 6);

/// How the lattice is drawn.
pub struct Lattice {
    fade: usize,
    has_bias: bool,
    /// The largest weight since the text and layer were chosen: the scale's end, which must not flicker.
    most: Option<((u32, u32), f32)>,
}

impl Default for Lattice {
    fn default() -> Self {
        Self { fade: 8, has_bias: true, most: None }
    }
}

/// What is known of a layer at a token.
struct Now<'a> {
    layer: u32,
    position: usize,
    ids: &'a [u32],
    weights: &'a [f32],
    light: Vec<f32>,
    most: f32,
    kept: Option<Kept>,
    bias: Option<&'a [f32]>,
    logits: Option<&'a [f32]>,
}

impl Now<'_> {
    fn weight(&self, expert: usize) -> Option<f32> {
        let at = self.ids.iter().position(|id| *id as usize == expert)?;
        self.weights.get(at).copied()
    }
}

impl Lattice {
    /// Draws it for the selected token, or for the newest.
    pub fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence, layer: u32) {
        let subject = cx.subject.clone();
        let experts = subject.model.experts as usize;
        let selected = choose::token(cx, sequence);
        // The newest token may stand in the text before its routing has come.
        let newest = || (0..sequence.tokens.len()).rev().take(256).find(|at| sequence.routing(layer, *at).is_some());
        let Some(position) = selected.or_else(newest) else {
            ui.weak("Waiting for a token.");
            return;
        };
        let bias = subject.expert_bias.get(&layer).filter(|bias| bias.len() == experts);
        ui.horizontal_wrapped(|ui| {
            let label = ui.label("afterglow");
            let hint = "For how many tokens an expert stays visible after it was chosen, ever fainter.";
            let value = egui::DragValue::new(&mut self.fade).range(0..=64).suffix(" tokens").speed(1.0);
            ui.add(value).labelled_by(label.id).on_hover_text(hint);
            if bias.is_some() {
                ui.checkbox(&mut self.has_bias, "correction bias").on_hover_text(
                    "What is added to an expert's score when experts are chosen, not to its weight: it was learned to \
                     keep the load of experts even.",
                );
            }
            let newest = ui.add_enabled(selected.is_some(), egui::Button::new("show the newest token"));
            if newest.on_hover_text("Clears the selected token; the lattice then follows the text.").clicked() {
                cx.selection.token = None;
            }
        });
        context(ui, cx, sequence, position);
        let Some((ids, weights)) = sequence.routing(layer, position) else {
            let why = format!(
                "The routing of token {position} in layer {layer} is not held: it was dropped, let go to stay within \
                 memory, or not recorded (--taps routing)."
            );
            ui.colored_label(ui.visuals().warn_fg_color, why);
            return;
        };
        let light = glow(sequence, layer, experts, position, self.fade);
        let of = (sequence.info.number, layer);
        let before = self.most.filter(|(before, _)| *before == of).map_or(0.0, |(_, most)| most);
        let most = light.iter().copied().filter(|light| light.is_finite()).fold(before, f32::max);
        self.most = Some((of, most));
        let now = Now {
            layer,
            position,
            ids,
            weights,
            light,
            most: if most > 0.0 { most } else { 1.0 },
            kept: kept_groups(&subject, sequence, layer, position),
            bias: bias.map(Vec::as_slice).filter(|_| self.has_bias),
            logits: sequence.floats(Tensor::layer(TapGroup::Scores, layer, Part::RouterLogits), position),
        };
        self.legend(ui, cx, &now);
        squares(ui, cx, &now);
    }

    fn legend(&self, ui: &mut Ui, cx: &Cx<'_>, now: &Now<'_>) {
        ui.horizontal_wrapped(|ui| {
            let unit = if self.fade > 0 { "weight (faint: tokens before)" } else { "weight" };
            legend(ui, Scale::Sequential(cx.palette), (0.0, now.most), unit);
            if let Some(bias) = now.bias {
                let most = bias.iter().fold(0f32, |most, bias| most.max(bias.abs()));
                for (colour, sign) in [(bias_colour(1.0), "+"), (bias_colour(-1.0), "−")] {
                    let (place, _) = ui.allocate_exact_size(vec2(14.0, 4.0), Sense::hover());
                    ui.painter().rect_filled(place, 0.0, colour);
                    ui.weak(sign);
                }
                ui.weak(format!("bias, full width {}", number(most)));
            }
            let model = &cx.subject.model;
            if let Some(kept) = &now.kept {
                let (known, all) = (kept.groups.len(), model.topk_group);
                let text = if kept.is_complete {
                    format!("framed: the {known} of {} groups it kept", model.n_group)
                } else {
                    format!("framed: groups it chose from ({known} of {all} kept)")
                };
                ui.weak(text).on_hover_text(
                    "The router first keeps a few groups of experts, then chooses experts from these only. Which other \
                     groups it kept is told by its scores (--taps scores).",
                );
            }
        });
    }
}

fn squares(ui: &mut Ui, cx: &mut Cx<'_>, now: &Now<'_>) {
    let model = &cx.subject.model;
    let (experts, shared) = (model.experts as usize, model.n_shared_experts as usize);
    let places = Places::new(experts, model.n_group as usize);
    let (columns, rows) = places.shape();
    let (gaps_across, gaps_down) = ((places.blocks.0 - 1) as f32, (places.blocks.1 - 1) as f32);
    let room = ui.available_size() - vec2(8.0, 8.0);
    let extra = if shared > 0 { 1.5 } else { 0.0 };
    let side = ((room.x - GAP * gaps_across) / (columns as f32 + extra))
        .min((room.y - GAP * gaps_down) / rows as f32)
        .clamp(6.0, 80.0)
        .floor();
    let size = vec2((columns as f32 + extra) * side + GAP * gaps_across, rows as f32 * side + GAP * gaps_down);
    let (area, response) = ui.allocate_exact_size(size + vec2(8.0, 8.0), Sense::click());
    let corner = area.min + vec2(4.0, 4.0);
    let square = |expert: usize| {
        let (column, row) = places.place(expert);
        let block = vec2((column / places.block.0) as f32, (row / places.block.1) as f32);
        Rect::from_min_size(corner + vec2(column as f32, row as f32) * side + block * GAP, vec2(side, side))
    };
    let label = label(cx, now);
    response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Image, true, &label));
    frames(ui, now, &places, &square);
    for expert in 0..experts {
        paint(ui, cx, now, expert, square(expert));
    }
    let shared_at = |i: usize| {
        let at = corner + vec2(columns as f32 * side + GAP * gaps_across + side / 2.0, i as f32 * (side + 2.0));
        Rect::from_min_size(at, vec2(side, side))
    };
    for i in 0..shared {
        let place = shared_at(i).shrink(1.0);
        let colour = cx.palette.colour(1.0);
        ui.painter().rect_filled(place, 3.0, colour);
        let font = FontId::proportional((side * 0.2).clamp(7.0, 13.0));
        let text = if side >= 28.0 { "shared" } else { "S" };
        ui.painter().text(place.center(), Align2::CENTER_CENTER, text, font, text_on(colour));
    }
    if let Some(expert) = cx.selection.expert.map(|expert| expert as usize).filter(|expert| *expert < experts) {
        let mark = Stroke::new(2.0, Color32::from_rgb(255, 80, 80));
        ui.painter().rect_stroke(square(expert), 3.0, mark, StrokeKind::Inside);
    }
    let under = |at: Pos2| (0..experts).find(|expert| square(*expert).contains(at));
    if response.clicked() {
        response.request_focus();
        if let Some(expert) = response.interact_pointer_pos().and_then(under) {
            cx.selection.expert = Some(expert as u32);
            cx.selection.layer = now.layer;
        }
    }
    if response.has_focus() {
        ui.painter().rect_stroke(area, 2.0, ui.visuals().selection.stroke, StrokeKind::Inside);
        let arrows = EventFilter { horizontal_arrows: true, vertical_arrows: true, ..EventFilter::default() };
        ui.memory_mut(|memory| memory.set_focus_lock_filter(response.id, arrows));
        if let Some(expert) = moved(ui, &places, cx.selection.expert) {
            cx.selection.expert = Some(expert as u32);
            cx.selection.layer = now.layer;
        }
    }
    let Some(at) = response.hover_pos() else { return };
    if let Some(expert) = under(at) {
        let text = tell(cx, now, expert);
        response.on_hover_text_at_pointer(text);
    } else if (0..shared).any(|i| shared_at(i).contains(at)) {
        response.on_hover_text_at_pointer("shared expert: every token uses it beside those that it is sent to");
    }
}

/// Blocks of groups: those that were kept have a frame.
fn frames(ui: &Ui, now: &Now<'_>, places: &Places, square: &dyn Fn(usize) -> Rect) {
    let groups = places.experts.div_ceil(places.size);
    if groups < 2 {
        return;
    }
    for group in 0..groups {
        let members = group * places.size..((group + 1) * places.size).min(places.experts);
        let block = members.map(square).reduce(Rect::union).unwrap_or(Rect::NOTHING);
        let is_kept = now.kept.as_ref().is_some_and(|kept| kept.groups.contains(&(group as u32)));
        let stroke = if is_kept {
            Stroke::new(2.0, ui.visuals().hyperlink_color)
        } else {
            Stroke::new(1.0, ui.visuals().widgets.noninteractive.bg_stroke.color)
        };
        ui.painter().rect_stroke(block.expand(1.5), 3.0, stroke, StrokeKind::Middle);
    }
}

fn bias_colour(sign: f32) -> Color32 {
    diverging(sign * 0.7)
}

fn paint(ui: &Ui, cx: &Cx<'_>, now: &Now<'_>, expert: usize, square: Rect) {
    let place = square.shrink(1.0);
    let painter = ui.painter();
    let ground = ui.visuals().panel_fill.lerp_to_gamma(ui.visuals().text_color(), 0.06);
    let light = now.light.get(expert).copied().unwrap_or(0.0);
    let weight = now.weight(expert);
    // An expert that is not lit is no part of the scale: it has the page's colour.
    let strength = (light / now.most).clamp(0.0, 1.0);
    let colour = if weight.is_some() {
        cx.palette.colour(strength)
    } else if light > 0.0 {
        // Afterglow sinks into the page.
        ground.lerp_to_gamma(cx.palette.colour(strength), (0.25 + strength).min(0.75))
    } else {
        ground
    };
    painter.rect_filled(place, 3.0, colour);
    if weight.is_some() {
        painter.rect_stroke(place, 3.0, Stroke::new(1.5, ui.visuals().strong_text_color()), StrokeKind::Inside);
    }
    if place.width() >= 22.0 {
        let is_lit = weight.is_some();
        let ink = if is_lit || strength > 0.25 { text_on(colour) } else { ui.visuals().weak_text_color() };
        let corner = if is_lit { place.center() - vec2(0.0, place.height() * 0.2) } else { place.center() };
        let small = FontId::proportional((place.width() * 0.24).clamp(8.0, 14.0));
        painter.text(corner, Align2::CENTER_CENTER, expert, small.clone(), ink);
        if let Some(weight) = weight {
            let below = place.center() + vec2(0.0, place.height() * 0.16);
            painter.text(below, Align2::CENTER_CENTER, format!("{weight:.2}"), small, ink);
        }
    }
    if let Some(bias) = now.bias {
        let most = bias.iter().fold(0f32, |most, bias| most.max(bias.abs()));
        let length = if most > 0.0 { bias[expert].abs() / most * (place.width() - 4.0) } else { 0.0 };
        let at = pos2(place.min.x + 2.0, place.max.y - 4.0);
        if length.is_finite() && length > 0.0 {
            painter.rect_filled(Rect::from_min_size(at, vec2(length, 2.0)), 0.0, bias_colour(bias[expert].signum()));
        }
    }
}

/// The words around a token, the token itself marked.
fn context(ui: &mut Ui, cx: &Cx<'_>, sequence: &Sequence, position: usize) {
    let font = FontId::proportional(13.0);
    let (quiet, strong) = (ui.visuals().text_color(), ui.visuals().strong_text_color());
    let mut job = egui::text::LayoutJob::default();
    let format = |colour| egui::TextFormat::simple(FontId::proportional(11.0), colour);
    job.append(&format!("token {position}   "), 0.0, format(quiet));
    let first = position.saturating_sub(CONTEXT.0);
    let end = (position + 1 + CONTEXT.1).min(sequence.tokens.len());
    for (at, token) in sequence.tokens[first..end].iter().enumerate() {
        let is_it = first + at == position;
        let from = job.sections.len();
        pieces::append(&mut job, cx.subject, token.id, &font, if is_it { strong } else { quiet });
        if is_it {
            for section in &mut job.sections[from..] {
                section.format.background = ui.visuals().selection.bg_fill;
            }
        }
    }
    job.wrap = egui::text::TextWrapping::truncate_at_width(ui.available_width());
    ui.label(job);
}

fn label(cx: &Cx<'_>, now: &Now<'_>) -> String {
    let chosen: Vec<String> =
        now.ids.iter().zip(now.weights).map(|(id, weight)| format!("{id} ({})", number(*weight))).collect();
    let Now { layer, position, .. } = now;
    let count = cx.subject.model.experts;
    format!("experts of layer {layer} as squares, {count} of them; token {position} chose {}", chosen.join(", "))
}

fn tell(cx: &Cx<'_>, now: &Now<'_>, expert: usize) -> String {
    let mut text = format!("layer {}, expert {expert}", now.layer);
    if cx.subject.model.n_group > 1 {
        let group = expert / cx.subject.experts_per_group().max(1) as usize;
        text += &format!(", group {group}");
    }
    text += &match (now.weight(expert), now.light.get(expert)) {
        (Some(weight), _) => {
            let rank = now.ids.iter().position(|id| *id as usize == expert).map_or(0, |at| at + 1);
            format!("\nchosen, number {rank} of {}: weight {}", now.ids.len(), number(weight))
        }
        (None, Some(light)) if *light > 0.0 => "\nnot chosen now, but for a token shortly before".into(),
        _ => "\nnot chosen".into(),
    };
    if let Some(logit) = now.logits.and_then(|logits| logits.get(expert)) {
        text += &format!("\nrouter logit {} (before score function and bias)", number(*logit));
    }
    if let Some(bias) = cx.subject.expert_bias.get(&now.layer).and_then(|bias| bias.get(expert)) {
        text += &format!("\ncorrection bias {} (added when experts are chosen, not to weights)", number(*bias));
    }
    text
}

/// The expert that an arrow key leads to.
fn moved(ui: &Ui, places: &Places, selected: Option<u32>) -> Option<usize> {
    let moves =
        [(Key::ArrowUp, (0, -1)), (Key::ArrowDown, (0, 1)), (Key::ArrowLeft, (-1, 0)), (Key::ArrowRight, (1, 0))];
    let pressed = |key: Key| ui.input_mut(|input| input.consume_key(egui::Modifiers::NONE, key));
    let (_, (right, down)) = moves.into_iter().find(|(key, _)| pressed(*key))?;
    let Some(selected) = selected.map(|expert| expert as usize).filter(|expert| *expert < places.experts) else {
        return Some(0);
    };
    let (column, row) = places.place(selected);
    let (column, row) = (column.checked_add_signed(right)?, row.checked_add_signed(down)?);
    places.expert(column, row)
}
