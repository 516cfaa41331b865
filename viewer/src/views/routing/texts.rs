//! Each text against the experts of a layer: whether what a text is about decides where its tokens go.

use egui::{CornerRadius, Rect, RichText, ScrollArea, Sense, Stroke, StrokeKind, Ui, pos2, vec2};

use crate::analysis::routing::{keys, shares, step};
use crate::heat::{Scale, legend, number};
use crate::jobs::Latest;
use crate::store::Sequence;
use crate::view::Cx;
use crate::views::choose;

/// Height of a text's row, and room for its name, in points.
const ROW: f32 = 30.0;
const NAME: f32 = 130.0;

/// Layer, and of each text its number and how far it had come.
type Key = (u32, Vec<(u32, (u64, bool))>);

/// A text's number, its tokens that were seen, and how many percent of them each expert got.
type Share = (u32, u32, Vec<f32>);

/// The map.
#[derive(Default)]
pub struct Texts {
    shares: Latest<Key, Vec<Share>>,
}

impl Texts {
    pub fn is_busy(&self) -> bool {
        self.shares.is_busy()
    }

    pub fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, layer: u32) {
        let experts = cx.subject.model.experts as usize;
        let sequences = cx.store.sequences();
        let key = (layer, sequences.iter().map(|sequence| (sequence.info.number, step(sequence))).collect::<Vec<_>>());
        if self.shares.lacks(&key) {
            let rows: Vec<Sequence> = sequences.iter().map(|sequence| sequence.with_only(&keys(layer))).collect();
            self.shares.get(ui.ctx(), &key, move || {
                let share = |sequence: &Sequence| {
                    let (tokens, shares) = shares(sequence, layer, experts);
                    (sequence.info.number, tokens, shares)
                };
                rows.iter().map(share).collect()
            });
        }
        let Some((_, shares)) = self.shares.value() else {
            ui.spinner();
            return;
        };
        let most = shares.iter().flat_map(|(_, _, shares)| shares).copied().fold(1.0f32, f32::max);
        legend(ui, Scale::Sequential(cx.palette), (0.0, most), "% of the text's tokens");
        ui.weak(format!("layer {layer}; an even router would give each expert {} %", even(cx)));
        ScrollArea::vertical().show(ui, |ui| {
            for (text, tokens, shares) in shares {
                if let Some(sequence) = cx.store.sequence(*text) {
                    let name = choose::shorten(&sequence.info.name, 20);
                    row(ui, cx, layer, (*text, &name, *tokens), shares, most);
                }
            }
        });
    }
}

fn even(cx: &Cx<'_>) -> String {
    let model = &cx.subject.model;
    number(model.num_experts_per_tok as f32 / model.experts.max(1) as f32 * 100.0)
}

/// A text's name and its cells. A click selects text and expert.
fn row(ui: &mut Ui, cx: &mut Cx<'_>, layer: u32, (text, name, tokens): (u32, &str, u32), shares: &[f32], most: f32) {
    ui.horizontal(|ui| {
        let is_selected = cx.selection.sequence == text;
        let label = RichText::new(name);
        let label = ui.add_sized(vec2(NAME, ROW - 4.0), egui::Button::selectable(is_selected, label));
        if label.on_hover_text(format!("{tokens} tokens")).clicked() && !is_selected {
            (cx.selection.sequence, cx.selection.token) = (text, None);
        }
        let (area, response) = ui.allocate_exact_size(vec2(ui.available_width(), ROW - 4.0), Sense::click());
        let width = area.width() / shares.len().max(1) as f32;
        let place = |expert: usize| {
            let left = area.min.x + expert as f32 * width;
            Rect::from_min_max(pos2(left, area.min.y), pos2(left + width, area.max.y))
        };
        for (expert, share) in shares.iter().enumerate() {
            ui.painter().rect_filled(place(expert), CornerRadius::ZERO, cx.palette.colour(share / most));
        }
        if let Some(expert) = cx.selection.expert.map(|expert| expert as usize).filter(|e| *e < shares.len()) {
            let mark = Stroke::new(1.5, egui::Color32::from_rgb(255, 80, 80));
            ui.painter().rect_stroke(place(expert), CornerRadius::ZERO, mark, StrokeKind::Outside);
        }
        response.widget_info(|| {
            egui::WidgetInfo::labeled(egui::Role::Image, true, format!("experts of layer {layer} in {name}"))
        });
        let under = |at: egui::Pos2| (((at.x - area.min.x) / width) as usize).min(shares.len().saturating_sub(1));
        if let Some(expert) = response.interact_pointer_pos().filter(|_| response.clicked()).map(under) {
            (cx.selection.sequence, cx.selection.expert) = (text, Some(expert as u32));
        }
        if let Some(expert) = response.hover_pos().map(under) {
            let share = number(shares.get(expert).copied().unwrap_or(f32::NAN));
            response.on_hover_text_at_pointer(format!(
                "{name}: expert {expert} of layer {layer} is given {share} % of {tokens} tokens"
            ));
        }
    });
}
