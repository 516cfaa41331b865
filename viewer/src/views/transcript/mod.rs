//! The text, token by token, on a background that tells something of each.

mod page;

use egui::{Color32, Rect, Sense, Ui, pos2, vec2};

use self::page::{Layout, underline};
use crate::analysis::routing::step;
use crate::analysis::text::{Along, EntropyOf, Quantity, router_entropy, value};
use crate::colour::kind;
use crate::heat::number;
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::{Key as Tensor, Part, Sequence};
use crate::subject::Subject;
use crate::view::{Cx, View};
use crate::views::{choose, pieces};

/// Surprise and prediction entropy from which on all colours are the same, in nats. Fixed, so that texts compare.
const MOST_SURPRISE: f32 = 8.0;
const MOST_ENTROPY: f32 = 6.0;
/// Dominant experts with a colour of their own.
const NAMED: usize = 7;

type AlongKey = (u32, Quantity, u32, (u64, bool));

/// The text, token by token, on a background that tells something of each.
#[derive(Default)]
pub struct Transcript {
    quantity: Quantity,
    /// Whether the page stays where it is when the text grows.
    pinned: bool,
    along: Latest<AlongKey, Along>,
    layout: Layout,
    /// The token that was in sight last.
    shown: Option<(u32, usize)>,
    named: Named,
}

impl View for Transcript {
    fn name(&self) -> &'static str {
        "transcript"
    }

    fn about(&self) -> &'static str {
        "The text as the model reads and writes it, token by token, coloured by what the model made of each token."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        let Some(sequence) = choose::sequence(cx) else {
            ui.weak(if cx.is_live {
                "No text yet: write a prompt and run it."
            } else {
                "No text was recorded: record a run with moewe run --record."
            });
            return;
        };
        ui.horizontal_wrapped(|ui| self.header(ui, cx));
        let layer = choose::moe_layer(cx).unwrap_or(cx.selection.layer);
        let key = (sequence.info.number, self.quantity, layer, step(sequence));
        if self.along.lacks(&key) {
            let (quantity, rows) = (self.quantity, sequence.with_only(&self.quantity.keys(layer)));
            self.along.get(ui.ctx(), &key, move || Along::read(&rows, quantity, layer));
        }
        let along = self
            .along
            .value()
            .filter(|((of, quantity, at, _), _)| (*of, *quantity, *at) == (sequence.info.number, self.quantity, layer));
        let scale = Scale::new(ui, cx, self.quantity, along.map(|(_, along)| along), {
            let experts = along.map_or(&[][..], |(_, along)| &along.experts);
            self.named.update((sequence.info.number, layer), experts)
        });
        legend(ui, cx, &scale, sequence, layer, along.map(|(_, along)| along));
        let values: &[f32] = along.map_or(&[], |(_, along)| &along.values);
        let quantity = self.quantity;
        let of = |position: usize| {
            let known = values.get(position).copied().filter(|value| !value.is_nan());
            known.or_else(|| value(sequence, quantity, layer, position))
        };
        self.layout.update(ui, cx.subject, sequence);
        let Some(page) = self.layout.page(cx.subject, sequence, &scale) else { return };
        let about = |position: usize| tell(cx.subject, sequence, layer, position);
        let selected = choose::token(cx, sequence);
        let follows = sequence.running && !self.pinned;
        let moved = selected.map(|token| (sequence.info.number, token));
        let reveal = if moved == self.shown { None } else { selected };
        self.shown = moved;
        if let Some(token) = page.show(ui, selected, reveal, follows, &of, &about) {
            choose::select(cx, sequence, token);
        }
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let Some(sequence) = choose::sequence(cx) else { return Vec::new() };
        let layer = choose::moe_layer(cx).unwrap_or(cx.selection.layer);
        let (tokens, count) = (&sequence.tokens, sequence.tokens.len());
        let integers = |name: &str, cells: Vec<i64>| Table::integers(name, &[("token", count)], cells);
        let along = |quantity| Along::read(sequence, quantity, layer).values;
        let floats = |name: String, quantity| Table::floats(name, &[("token", count)], along(quantity));
        let whole = |quantity| along(quantity).iter().map(|v| if v.is_nan() { -1 } else { *v as i64 }).collect();
        vec![
            Table::words("transcript.text", "token", tokens.iter().map(|t| pieces::word(cx.subject, t.id)).collect()),
            integers("transcript.id", tokens.iter().map(|token| i64::from(token.id)).collect()),
            integers("transcript.generated", tokens.iter().map(|token| i64::from(token.generated)).collect()),
            floats("transcript.surprise_nats".into(), Quantity::Surprise),
            floats("transcript.prediction_entropy_nats".into(), Quantity::PredictionEntropy),
            floats(format!("transcript.layer{layer}.router_entropy_nats"), Quantity::RouterEntropy),
            integers(&format!("transcript.layer{layer}.dominant_expert"), whole(Quantity::Expert)),
            integers("transcript.draft_accepted", whole(Quantity::Draft)),
        ]
    }

    fn is_busy(&self) -> bool {
        self.along.is_busy() || self.layout.is_unfinished()
    }
}

impl Transcript {
    fn header(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        choose::text(ui, cx);
        let label = ui.label("colour");
        let menu = egui::ComboBox::from_id_salt("colour").width(140.0).selected_text(self.quantity.name());
        let menu = menu.show_ui(ui, |ui| {
            for quantity in Quantity::ALL {
                ui.selectable_value(&mut self.quantity, quantity, quantity.name()).on_hover_text(quantity.about());
            }
        });
        menu.response.labelled_by(label.id).on_hover_text(self.quantity.about());
        if self.quantity.has_layer() {
            choose::layer(ui, cx);
        }
        let mut follow = !self.pinned;
        let hint = "Keep the newest token in sight while the text grows. Scrolling up stops it until you are back.";
        ui.checkbox(&mut follow, "follow").on_hover_text(hint);
        self.pinned = !follow;
    }
}

/// Experts that have a colour of their own.
#[derive(Default)]
struct Named {
    /// Of which text and layer.
    of: (u32, u32),
    slots: [Option<u32>; NAMED],
}

impl Named {
    /// Gives the most frequent experts a colour each. An expert keeps its colour while it stays among them.
    fn update(&mut self, of: (u32, u32), experts: &[(u32, usize)]) -> [Option<u32>; NAMED] {
        if self.of != of {
            *self = Self { of, slots: [None; NAMED] };
        }
        let most: Vec<u32> = experts.iter().take(NAMED).map(|(expert, _)| *expert).collect();
        for slot in &mut self.slots {
            *slot = slot.filter(|expert| most.contains(expert));
        }
        for expert in most {
            if !self.slots.contains(&Some(expert))
                && let Some(free) = self.slots.iter_mut().find(|slot| slot.is_none())
            {
                *free = Some(expert);
            }
        }
        self.slots
    }
}

/// How a quantity becomes a background.
struct Scale {
    quantity: Quantity,
    range: (f32, f32),
    palette: crate::colour::Palette,
    is_dark: bool,
    ground: Color32,
    named: [Option<u32>; NAMED],
}

impl Scale {
    fn new(ui: &Ui, cx: &Cx<'_>, quantity: Quantity, along: Option<&Along>, named: [Option<u32>; NAMED]) -> Self {
        let range = match quantity {
            Quantity::Surprise => (0.0, MOST_SURPRISE),
            Quantity::PredictionEntropy => (0.0, MOST_ENTROPY),
            _ => along.map_or((0.0, 1.0), |along| along.range),
        };
        // One value for all still has a colour.
        let range = if range.1 > range.0 { range } else { (range.0 - 0.5, range.0 + 0.5) };
        let visuals = ui.visuals();
        Self { quantity, range, palette: cx.palette, is_dark: visuals.dark_mode, ground: visuals.panel_fill, named }
    }

    /// Little is near the page's own colour, much is far from it, on light and on dark pages.
    fn magnitude(&self, value: f32) -> Color32 {
        let unit = ((value - self.range.0) / (self.range.1 - self.range.0)).clamp(0.0, 1.0);
        let colour = self.palette.colour(if self.is_dark { unit } else { 1.0 - unit });
        self.ground.lerp_to_gamma(colour, 0.25 + 0.75 * unit)
    }

    fn colour(&self, value: f32) -> Option<Color32> {
        let tint = |colour: Color32| self.ground.lerp_to_gamma(colour, 0.65);
        match self.quantity {
            Quantity::None => None,
            Quantity::Surprise | Quantity::PredictionEntropy | Quantity::RouterEntropy => Some(self.magnitude(value)),
            Quantity::Expert => {
                let slot = self.named.iter().position(|named| *named == Some(value as u32));
                Some(tint(kind(slot.unwrap_or(NAMED))))
            }
            Quantity::Draft => Some(tint(verdict(value))),
        }
    }
}

fn verdict(value: f32) -> Color32 {
    kind(if value > 0.5 { 0 } else { 5 })
}

fn swatch(ui: &mut Ui, colour: Color32, text: &str) {
    let (place, _) = ui.allocate_exact_size(vec2(12.0, 12.0), Sense::hover());
    ui.painter().rect_filled(place, 2.0, colour);
    ui.weak(text);
}

/// What the colours mean, and for how many tokens there is one.
fn legend(ui: &mut Ui, cx: &Cx<'_>, scale: &Scale, sequence: &Sequence, layer: u32, along: Option<&Along>) {
    let quantity = scale.quantity;
    ui.horizontal_wrapped(|ui| {
        match quantity {
            Quantity::None => {}
            Quantity::Surprise | Quantity::PredictionEntropy | Quantity::RouterEntropy => {
                let (low, high) = scale.range;
                let is_fixed = quantity != Quantity::RouterEntropy;
                ui.weak(number(low));
                let (bar, _) = ui.allocate_exact_size(vec2(120.0, 10.0), Sense::hover());
                for i in 0..60 {
                    let value = low + (high - low) * (i as f32 + 0.5) / 60.0;
                    let strip = Rect::from_min_size(pos2(bar.min.x + 2.0 * i as f32, bar.min.y), vec2(2.0, 10.0));
                    ui.painter().rect_filled(strip, 0.0, scale.magnitude(value));
                }
                let end = if is_fixed { "or more" } else { "(the range in this text)" };
                ui.weak(format!("{} nats {end}", number(high)));
            }
            Quantity::Expert => {
                for (slot, expert) in scale.named.iter().enumerate() {
                    if let Some(expert) = expert {
                        swatch(ui, scale.ground.lerp_to_gamma(kind(slot), 0.65), &expert.to_string());
                    }
                }
                if along.is_some_and(|along| along.experts.len() > NAMED) {
                    swatch(ui, scale.ground.lerp_to_gamma(kind(NAMED), 0.65), "other experts");
                }
            }
            Quantity::Draft => {
                swatch(ui, scale.ground.lerp_to_gamma(verdict(1.0), 0.65), "the draft was right");
                swatch(ui, scale.ground.lerp_to_gamma(verdict(0.0), 0.65), "it was wrong");
            }
        }
        if sequence.tokens.iter().any(|token| token.generated) {
            let (place, _) = ui.allocate_exact_size(vec2(16.0, 12.0), Sense::hover());
            underline(ui, place);
            ui.weak("written by the model");
        }
        let (Some(group), Some(along)) = (quantity.needs(), along) else { return };
        // The first token of a text is predicted by nothing.
        let tokens = along.values.len();
        let possible = if quantity.has_layer() { tokens } else { tokens.saturating_sub(1) };
        if along.known == 0 && tokens > 1 {
            let warning = if quantity == Quantity::Draft && cx.subject.model.mtp_modules == 0 {
                "this model has no module of multi-token prediction".into()
            } else {
                let layers = if quantity.has_layer() { format!(" in layer {layer}") } else { String::new() };
                format!("No {0} was seen{layers}: record with --taps {0}.", group.name())
            };
            ui.colored_label(ui.visuals().warn_fg_color, warning);
            return;
        }
        if along.known < possible {
            let hint = "Rows were dropped, let go to stay within memory, or have not come yet. Such tokens are plain.";
            ui.weak(format!("known for {} of {possible} tokens", along.known)).on_hover_text(hint);
        }
        if quantity == Quantity::RouterEntropy {
            let of = (0..sequence.tokens.len()).rev().take(128).find_map(|at| router_entropy(sequence, layer, at));
            let (text, hint) = match of {
                Some((_, EntropyOf::Logits)) => (
                    "of the softmax over all experts' logits",
                    "Whatever the model's own score function is: a softmax makes layers and models comparable.",
                ),
                _ => (
                    "of the chosen experts' weights only",
                    "The router's logits are not held. Record with --taps scores for the entropy over all experts.",
                ),
            };
            ui.weak(text).on_hover_text(hint);
        }
    });
}

/// What there is to say of a token.
fn tell(subject: &Subject, sequence: &Sequence, layer: u32, position: usize) -> String {
    let Some(token) = sequence.tokens.get(position) else { return String::new() };
    let who = if token.generated { "written by the model" } else { "prompt" };
    let mut text = format!("{}\ntoken {position}, id {}, {who}", pieces::word(subject, token.id), token.id);
    if let Some(surprise) = value(sequence, Quantity::Surprise, layer, position) {
        text += &format!("\nsurprise {} nats (the model gave it {})", number(surprise), percent((-surprise).exp()));
    }
    let of = |part| Tensor { group: moewe_plan::TapGroup::Logits, layer: None, part };
    if let Some(before) = position.checked_sub(1)
        && let (Some(ids), Some(probs)) =
            (sequence.ints(of(Part::Ids), before), sequence.floats(of(Part::Probs), before))
    {
        text += "\nexpected before it came:";
        for (&id, &prob) in ids.iter().zip(probs).take(5) {
            let mark = if id == token.id { "  (this one)" } else { "" };
            text += &format!("\n    {}  {}{mark}", percent(prob), pieces::word(subject, id));
        }
    }
    if let Some((ids, weights)) = sequence.routing(layer, position) {
        text += &format!("\nexperts of layer {layer}:");
        for (id, weight) in ids.iter().zip(weights) {
            text += &format!("\n    {}  expert {id}", number(*weight));
        }
    }
    text
}

fn percent(share: f32) -> String {
    format!("{:.1} %", 100.0 * share)
}
