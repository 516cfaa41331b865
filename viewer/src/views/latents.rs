//! What the cache holds of each token: compressed latents and rotated keys.

mod bytes;
mod map;
mod norms;
mod projection;
mod similarity;

use egui::Ui;
use moewe_plan::TapGroup;

use crate::bars::whole_number;
use crate::numbers::Table;
use crate::store::{Column, Key, Part, Sequence};
use crate::subject::Subject;
use crate::view::{Cx, View};

/// The pages of the view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Page {
    #[default]
    Map,
    Norms,
    Similarity,
    Projection,
    Bytes,
}

/// Which of the two things that are cached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Cached {
    /// `c_kv`, the latent.
    #[default]
    Latent,
    /// `k_rope`, the rotated key.
    Key,
}

impl Cached {
    fn name(self) -> &'static str {
        match self {
            Cached::Latent => "c_kv",
            Cached::Key => "k_rope",
        }
    }

    fn about(self) -> &'static str {
        match self {
            Cached::Latent => {
                "The latent: all heads' keys and values of a token, compressed to kv_lora_rank numbers. Shown after its norm, \
                 as attention reads it."
            }
            Cached::Key => {
                "The rotated key: the part of the key that knows the position (qk_rope_head_dim numbers), shared by all heads."
            }
        }
    }

    fn key(self, layer: u32) -> Key {
        let part = if self == Cached::Latent { Part::CKv } else { Part::KRope };
        Key::layer(TapGroup::Latents, layer, part)
    }
}

/// What a page is computed from: its result is stale when this changes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Origin {
    sequence: u32,
    layer: u32,
    cached: Cached,
    tokens: u64,
    version: u64,
}

/// Rows of a text, shared with the store.
#[derive(Clone)]
struct Rows {
    tokens: usize,
    column: Column,
}

impl Rows {
    fn of(sequence: &Sequence, key: Key) -> Option<Self> {
        Some(Self { tokens: sequence.tokens.len(), column: sequence.column(key)?.clone() })
    }

    fn dim(&self) -> usize {
        self.column.columns()
    }

    fn row(&self, at: usize) -> Option<&[f32]> {
        self.column.floats(at)
    }

    fn missing(&self) -> usize {
        (0..self.tokens).filter(|&at| !self.column.has(at)).count()
    }
}

/// The view of latents.
#[derive(Default)]
pub struct LatentsView {
    page: Page,
    cached: Cached,
    /// Whether there were rows to draw in the last frame.
    has_rows: bool,
    map: map::Map,
    norms: norms::Norms,
    similarity: similarity::Similarity,
    projection: projection::Projection,
}

impl View for LatentsView {
    fn name(&self) -> &'static str {
        "latents"
    }

    fn about(&self) -> &'static str {
        "What attention remembers of each token: the compressed latent and the rotated key that the cache holds instead of \
         keys and values for every head."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        self.header(ui, cx);
        self.has_rows = false;
        ui.add_space(4.0);
        if self.page == Page::Bytes {
            bytes::show(ui, cx);
            return;
        }
        let store = cx.store;
        let Some(sequence) = store.sequence(cx.selection.sequence) else {
            ui.weak(if store.sequences().is_empty() {
                "No text yet. Run one with the tap group `latents` (--taps latents)."
            } else {
                "No text is selected. Choose one above."
            });
            return;
        };
        let key = self.cached.key(cx.selection.layer);
        let Some(rows) = Rows::of(sequence, key) else {
            self.absent(ui, cx, sequence);
            return;
        };
        let running = store.sequences().iter().any(|sequence| sequence.running);
        let origin = Origin {
            sequence: sequence.info.number,
            layer: cx.selection.layer,
            cached: self.cached,
            tokens: if sequence.running { crate::jobs::coarse(rows.tokens as u64) } else { rows.tokens as u64 },
            version: if running { 0 } else { store.version() },
        };
        self.has_rows = true;
        let shown = Shown { sequence, origin, rows };
        match self.page {
            Page::Map => self.map.show(ui, cx, &shown),
            Page::Norms => self.norms.show(ui, cx, &shown),
            Page::Similarity => self.similarity.show(ui, cx, &shown),
            Page::Projection => self.projection.show(ui, cx, &shown),
            Page::Bytes => {}
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        &["map", "norms", "similarity", "projection", "bytes"]
    }

    fn show_part(&mut self, part: usize) {
        self.page = [Page::Map, Page::Norms, Page::Similarity, Page::Projection, Page::Bytes]
            .get(part)
            .copied()
            .unwrap_or_default();
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let mut tables = bytes::tables(cx);
        let key = self.cached.key(cx.selection.layer);
        let Some(sequence) = cx.sequence() else { return tables };
        let Some(rows) = Rows::of(sequence, key) else { return tables };
        let name = format!("latents.layer{}.{}", cx.selection.layer, self.cached.name());
        let pieces = sequence.tokens.iter().map(|token| cx.subject.piece(token.id)).collect();
        tables.push(Table::words("latents.tokens", "token", pieces));
        tables.extend(map::tables(&name, &rows));
        tables.extend(norms::tables(&name, &rows));
        tables.extend(self.similarity.tables(&name, &rows, cx.selection.token));
        tables.extend(projection::tables(&name, cx, self.cached));
        tables
    }

    fn is_busy(&self) -> bool {
        // What nobody draws is not waited for.
        match self.page {
            _ if !self.has_rows => false,
            Page::Map => self.map.is_busy(),
            Page::Norms => self.norms.is_busy(),
            Page::Similarity => self.similarity.is_busy(),
            Page::Projection => self.projection.is_busy(),
            Page::Bytes => false,
        }
    }
}

/// What the pages draw.
struct Shown<'a> {
    sequence: &'a Sequence,
    origin: Origin,
    rows: Rows,
}

impl Shown<'_> {
    /// The token at a position, with its position.
    fn token(&self, subject: &Subject, position: usize) -> String {
        match self.sequence.tokens.get(position) {
            Some(token) => format!("{position} “{}”", subject.piece(token.id)),
            None => position.to_string(),
        }
    }
}

/// Says that rows are missing, if they are.
fn say_missing(ui: &mut Ui, missing: usize, tokens: usize) {
    if missing > 0 {
        ui.weak(format!("{missing} of {tokens} tokens have no row")).on_hover_text(
            "Their rows went to spare memory, or their frames were dropped, or the tap was chosen later.",
        );
    }
}

impl LatentsView {
    fn header(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        ui.horizontal_wrapped(|ui| {
            let pages = [
                (Page::Map, "Map", "Every number of every token"),
                (Page::Norms, "Norms", "How long the rows are, and which tokens and dimensions stand out"),
                (Page::Similarity, "Similarity", "Which tokens have latents that point the same way"),
                (Page::Projection, "Projection", "All rows of the layer in two dimensions (principal components)"),
                (Page::Bytes, "Bytes", "How much memory latents spare"),
            ];
            for (page, name, about) in pages {
                ui.selectable_value(&mut self.page, page, name).on_hover_text(about);
            }
            if self.page == Page::Bytes {
                return;
            }
            ui.separator();
            let label = ui.label("layer");
            let mut layer = cx.selection.layer;
            let drag = whole_number(ui, &mut layer, 0..=cx.subject.model.layers.saturating_sub(1));
            if ui.add(drag).labelled_by(label.id).on_hover_text("Drag, type, or use the arrow keys.").changed() {
                cx.selection.layer = layer;
            }
            ui.separator();
            for cached in [Cached::Latent, Cached::Key] {
                ui.selectable_value(&mut self.cached, cached, cached.name()).on_hover_text(cached.about());
            }
        });
    }

    /// Says what was recorded instead, and leads there.
    fn absent(&self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence) {
        let layers: Vec<u32> = sequence
            .keys()
            .filter(|key| key.layer.is_some_and(|layer| *key == self.cached.key(layer)))
            .filter_map(|key| key.layer)
            .collect();
        let layer = cx.selection.layer;
        let Some(nearest) = layers.iter().copied().min_by_key(|other| other.abs_diff(layer)) else {
            ui.weak(format!(
                "No latents of this text were recorded. Run it with the tap group `latents` (--taps latents, or \
                 latents:{layer} for this layer alone)."
            ));
            return;
        };
        let list: Vec<String> = layers.iter().take(12).map(u32::to_string).collect();
        let more = if layers.len() > 12 { ", …" } else { "" };
        ui.weak(format!("No latents of layer {layer} were recorded; there are those of {}{more}.", list.join(", ")));
        if ui.button(format!("Go to layer {nearest}")).clicked() {
            cx.selection.layer = nearest;
        }
    }
}
