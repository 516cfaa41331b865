//! What attention heads look at.

mod inputs;

use std::sync::Arc;

use egui::{Color32, Ui};
use egui_plot::{Line, PlotPoints, Points, VLine};

use self::inputs::{OfKey, STRIDE, Tensors, layers, looking, window};
use crate::analysis::attention::{self, OfToken, Summary, entropy};
use crate::bars::still;
use crate::colour::kind;
use crate::heat::{Grid, HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::Sequence;
use crate::strip::{self, Look, Strip};
use crate::tally::{self, Bar, Widths};
use crate::view::{Cx, View};

/// Tokens that are listed with their weights.
const STRONGEST: usize = 16;
/// The logarithm at which colours end.
const LEAST: f32 = -4.0;

/// What an attention head looks at: over the text, as a map, and all heads of a layer side by side.
#[derive(Default)]
pub struct Attention {
    mode: Mode,
    of_token: Latest<OfKey, Seen>,
    map: Latest<(OfKey, u32), Map>,
    summary: Latest<OfKey, Summary>,
    strip: Strip,
    linear: bool,
    heads_map: HeatMap,
    token_map: HeatMap,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Text,
    Map,
    Heads,
}

/// What all heads see from a token.
struct Seen {
    key: OfKey,
    of: OfToken,
    grids: Grids,
}

/// A map of token by token.
struct Map {
    key: OfKey,
    first: usize,
    missing: usize,
    grids: Grids,
}

/// Weights to be drawn on either scale.
struct Grids {
    linear: Grid,
    /// log10, cut off at [`LEAST`].
    logarithmic: Grid,
}

impl Grids {
    fn new(rows: usize, columns: usize, weights: Vec<f32>) -> Self {
        let logarithms =
            weights.iter().map(|weight| if weight.is_nan() { f32::NAN } else { weight.log10().max(LEAST) });
        let (cells, range) = (Arc::new(logarithms.collect()), (LEAST, 0.0));
        let logarithmic = Grid { rows, columns, cells, range };
        Self { linear: Grid::from_zero(rows, columns, weights), logarithmic }
    }

    fn on(&self, linear: bool) -> (&Grid, &'static str) {
        if linear {
            (&self.linear, "attention weight")
        } else {
            (&self.logarithmic, "log10 of the attention weight, -4 and less")
        }
    }
}

impl View for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn about(&self) -> &'static str {
        "What each attention head looks at: the weights that a token gives to the tokens before it, computed from queries \
         and latents."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        let store = cx.store;
        let Some(sequence) = store.sequence(cx.selection.sequence).filter(|sequence| !sequence.tokens.is_empty())
        else {
            ui.weak("No text has been seen yet. Attention appears as soon as a text runs.");
            return;
        };
        let layers = layers(sequence);
        if layers.is_empty() {
            ui.label("No queries and latents were recorded: record with --taps attention,latents");
            ui.weak("One layer is enough, and much smaller: --taps attention:3,latents:3");
            return;
        }
        self.header(ui, cx, &layers);
        let layer = cx.selection.layer;
        let heads = cx.subject.model.num_attention_heads;
        let Some(tensors) = Tensors::of(sequence, layer, heads) else {
            let list: Vec<String> = layers.iter().map(u32::to_string).collect();
            ui.add_space(8.0);
            ui.label(format!(
                "Layer {layer} has no queries and latents. Recorded layers: {}. Choose one of them above.",
                list.join(", ")
            ));
            return;
        };
        let Some(position) = looking(sequence, cx.selection.token) else { return };
        if !tensors.query.has(position) {
            ui.label(format!(
                "The query of token {position} is not there: its frame was dropped, or it went to stay within memory. \
                 Choose another token."
            ));
            return;
        }
        match self.mode {
            Mode::Text => self.text(ui, cx, sequence, &tensors, position),
            Mode::Map => self.map(ui, cx, sequence, &tensors, position),
            Mode::Heads => self.heads(ui, cx, sequence, &tensors, position),
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        &["text", "map", "heads"]
    }

    fn show_part(&mut self, part: usize) {
        self.mode = [Mode::Text, Mode::Map, Mode::Heads].get(part).copied().unwrap_or_default();
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let layer = cx.selection.layer;
        let Some(sequence) = cx.sequence() else { return Vec::new() };
        let Some(tensors) = Tensors::of(sequence, layer, cx.subject.model.num_attention_heads) else {
            return Vec::new();
        };
        let Some(position) = looking(sequence, cx.selection.token) else { return Vec::new() };
        let Some(query) = tensors.query.floats(position) else { return Vec::new() };
        let scale = cx.subject.model.softmax_scale;
        let keys = tensors.keys(position + 1)();
        let of = attention::of_token(query, &keys, scale);
        let heads = of.sink.len();
        let name = |of: &str| format!("attention.layer{layer}.{of}");
        let token = |of: &str| name(&format!("token{position}.{of}"));
        let window = window(position, sequence.tokens.len());
        let (end, size, head) = (window.end, window.len(), cx.selection.head as usize);
        let keys = tensors.keys(end)();
        let map = attention::map(tensors.query, head, &keys, window.clone(), scale);
        let all = tensors.keys(sequence.tokens.len())();
        let summary = attention::summary(tensors.query, &all, heads, scale);
        let pieces = sequence.tokens.iter().map(|token| cx.subject.piece(token.id)).collect();
        vec![
            Table::words(name("tokens"), "token", pieces),
            Table::floats(token("weights"), &[("head", heads), ("token", position + 1)], of.weights),
            Table::floats(token("entropy_bits"), &[("head", heads)], of.entropy),
            Table::floats(token("weight_on_first"), &[("head", heads)], of.sink),
            Table::integers(token("missing"), &[("count", 1)], vec![of.missing as i64]),
            Table::integers(name("map.first_token"), &[("count", 1)], vec![window.start as i64]),
            Table::floats(name(&format!("head{head}.map")), &[("query", size), ("key", size)], map),
            Table::floats(name("mean.entropy_bits"), &[("head", heads)], summary.entropy),
            Table::floats(name("mean.weight_on_first"), &[("head", heads)], summary.sink),
            Table::integers(name("mean.tokens"), &[("count", 1)], vec![summary.sampled as i64]),
        ]
    }

    fn is_busy(&self) -> bool {
        self.of_token.is_busy() || self.map.is_busy() || self.summary.is_busy()
    }
}

impl Attention {
    fn header(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, layers: &[u32]) {
        ui.horizontal_wrapped(|ui| {
            for (mode, name, hint) in [
                (Mode::Text, "text", "The text, each token shaded by the weight that it gets"),
                (Mode::Map, "map", "Every token against every token before it, for one head"),
                (Mode::Heads, "heads", "All heads of the layer side by side"),
            ] {
                ui.selectable_value(&mut self.mode, mode, name).on_hover_text(hint);
            }
            ui.separator();
            let layer = egui::ComboBox::new("attention layer", "layer").selected_text(cx.selection.layer.to_string());
            layer.width(56.0).show_ui(ui, |ui| {
                for layer in layers {
                    ui.selectable_value(&mut cx.selection.layer, *layer, layer.to_string());
                }
            });
            let heads = cx.subject.model.num_attention_heads;
            cx.selection.head = cx.selection.head.min(heads.saturating_sub(1));
            let label = ui.label("head").on_hover_text(
                "Each layer looks at the text with several heads, each in its own way. Drag, or click and type a number.",
            );
            let range = 0..=heads.saturating_sub(1);
            ui.add(egui::DragValue::new(&mut cx.selection.head).range(range).speed(0.1)).labelled_by(label.id);
            ui.weak(format!("of {heads}"));
            if self.mode != Mode::Text {
                ui.separator();
                let hint = "Few tokens get most of the weight; by their logarithms, the small weights can be told apart too";
                ui.selectable_value(&mut self.linear, false, "logarithmic").on_hover_text(hint);
                let hint = "Colours by the weights themselves, up to the largest";
                ui.selectable_value(&mut self.linear, true, "linear").on_hover_text(hint);
            }
        });
    }

    /// The weights of the looking token, once they are there.
    fn seen(&mut self, ui: &mut Ui, cx: &Cx<'_>, sequence: &Sequence, of: &Tensors<'_>, at: usize) -> Option<&Seen> {
        let key = of.key(sequence, cx.selection.layer, at);
        let scale = cx.subject.model.softmax_scale;
        let found = self.of_token.get_prepared(ui.ctx(), &key, || {
            let keys = of.keys(at + 1);
            let query = of.query.floats(at).unwrap_or_default().to_vec();
            move || {
                let of = attention::of_token(&query, &keys(), scale);
                let grids = Grids::new(of.sink.len(), of.tokens, of.weights.clone());
                Seen { key, of, grids }
            }
        });
        let is_same = |seen: &&Seen| (seen.key.sequence, seen.key.layer) == (key.sequence, key.layer);
        let found = found.filter(is_same).filter(|seen| seen.key.position < sequence.tokens.len());
        if found.is_none() {
            waiting(ui, "computing the weights of all heads");
        }
        found
    }

    fn text(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence, tensors: &Tensors<'_>, position: usize) {
        let head = cx.selection.head as usize;
        let mut strip = std::mem::take(&mut self.strip);
        if let Some(seen) = self.seen(ui, cx, sequence, tensors, position) {
            let weights = seen.of.head(head);
            let position = seen.key.position;
            let piece = |at: usize| sequence.tokens.get(at).map_or(String::new(), |token| cx.subject.piece(token.id));
            let sink = match weights.first() {
                Some(sink) if !sink.is_nan() => format!("{} of it goes to the first token", percent(*sink)),
                _ => "what the first token gets is not known".to_owned(),
            };
            let of = match seen.of.tokens - seen.of.missing {
                held if seen.of.missing > 0 => format!("the {held} held tokens of {}", seen.of.tokens),
                all => format!("{all} tokens"),
            };
            ui.label(format!(
                "Token {position} {:?} spreads its attention over {} of {of} (entropy {} bits); {sink}.",
                piece(position),
                number(entropy(weights).exp2()),
                number(entropy(weights)),
            ))
            .on_hover_text(
                "2 to the power of the entropy is the number of tokens over which equal weights would be spread as \
                 widely. Many heads rest on the first token when they have nothing to look for: it is their sink.",
            );
            incomplete(ui, seen.of.missing, seen.of.tokens);
            let most = weights.iter().copied().filter(|weight| weight.is_finite()).fold(1e-6f32, f32::max);
            shade_legend(ui, most, seen.of.missing > 0);
            let dark = ui.visuals().dark_mode;
            let mut chosen = None;
            let list = 300.0f32.min(ui.available_width() * 0.45);
            ui.horizontal_top(|ui| {
                let size = egui::vec2(ui.available_width() - list - 12.0, ui.available_height());
                ui.allocate_ui_with_layout(size, egui::Layout::top_down(egui::Align::Min), |ui| {
                    let look = |at: usize| match weights.get(at) {
                        Some(weight) if weight.is_nan() => Look { weak: true, underlined: true, fill: None },
                        Some(weight) => Look { fill: shade(dark, weight / most), ..Look::default() },
                        None => Look { weak: true, ..Look::default() },
                    };
                    let tooltip = |at: usize| match weights.get(at) {
                        Some(weight) if weight.is_nan() => format!("{at} {:?}: not held", piece(at)),
                        Some(weight) => format!("{at} {:?}: {}", piece(at), percent(*weight)),
                        None => format!("{at} {:?}: behind the looking token, which cannot see it", piece(at)),
                    };
                    let spec = strip::Spec {
                        name: "attention over the text",
                        tokens: sequence.tokens.len(),
                        selected: Some(position),
                        piece: &piece,
                        look: &|at| look(at),
                        tooltip: &tooltip,
                    };
                    chosen = strip.show(ui, &spec);
                });
                ui.vertical(|ui| {
                    ui.strong("strongest");
                    let bars = strongest(weights).into_iter().map(|(at, weight)| Bar {
                        label: format!("{at} {}", piece(at)),
                        value: weight / most,
                        text: percent(weight),
                        hint: "Click to see what this token looks at".into(),
                        ..Bar::default()
                    });
                    let places: Vec<usize> = strongest(weights).into_iter().map(|(at, _)| at).collect();
                    let bars: Vec<Bar> = bars.collect();
                    let widths = Widths { label: 110.0, text: 56.0 };
                    let clicked = tally::show(ui, "strongest", &bars, widths, accent(ui.visuals().dark_mode), true);
                    chosen = clicked.map(|row| places[row]).or(chosen);
                });
            });
            if let Some(at) = chosen {
                cx.selection.token = Some(at as u32);
            }
        }
        self.strip = strip;
    }

    fn map(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence, tensors: &Tensors<'_>, position: usize) {
        let window = window(position, sequence.tokens.len());
        let end = if sequence.running { window.end / 16 * 16 } else { window.end }.max(window.start + 1);
        let window = window.start..end;
        let (head, scale) = (cx.selection.head, cx.subject.model.softmax_scale);
        let key = tensors.key(sequence, cx.selection.layer, end - 1);
        let found = self.map.get_prepared(ui.ctx(), &(key, head), || {
            let (keys, query, window) = (tensors.keys(end), tensors.query.clone(), window.clone());
            move || {
                let keys = keys();
                let cells = attention::map(&query, head as usize, &keys, window.clone(), scale);
                let grids = Grids::new(window.len(), window.len(), cells);
                Map { key, first: window.start, missing: keys.missing(window.end), grids }
            }
        });
        let Some(map) = found.filter(|map| (map.key.sequence, map.key.layer) == (key.sequence, key.layer)) else {
            waiting(ui, "computing the map");
            return;
        };
        let first = map.first;
        let (weights, (grid, unit)) = (&map.grids.linear, map.grids.on(self.linear));
        if grid.rows < sequence.tokens.len() {
            ui.weak(format!(
                "tokens {first} to {} of {}: those around the selected one",
                first + grid.rows - 1,
                sequence.tokens.len()
            ));
        }
        incomplete(ui, map.missing, map.key.position + 1);
        let piece = |at: usize| sequence.tokens.get(at).map_or(String::new(), |token| cx.subject.piece(token.id));
        let axis = |what: &str| if first == 0 { what.to_owned() } else { format!("{what} (0 is token {first})") };
        let tooltip = |row: usize, column: usize| {
            let (from, to) = (first + row, first + column);
            let weight = match weights.get(row, column) {
                _ if to > from => "behind the looking token, which cannot see it".to_owned(),
                Some(weight) if !weight.is_nan() => percent(weight),
                _ => "not held".to_owned(),
            };
            format!("{from} {:?} looks at {to} {:?}\n{weight}", piece(from), piece(to))
        };
        let spec = Spec {
            name: &format!("attention of token by token, layer {}, head {head}", cx.selection.layer),
            row_axis: &axis("looking token"),
            column_axis: &axis("token looked at"),
            unit,
            scale: Scale::Sequential(cx.palette),
            row: position.checked_sub(first).filter(|row| *row < grid.rows),
            column: None,
            column_groups: 0,
            tooltip: &tooltip,
            height: (ui.available_height() - 70.0).max(120.0),
        };
        if let Some((row, _)) = self.token_map.show(ui, grid, &spec).chosen {
            cx.selection.token = Some((first + row) as u32);
        }
    }

    fn heads(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence, tensors: &Tensors<'_>, position: usize) {
        let summary = self.summarise(ui, cx, sequence, tensors);
        let mut map = std::mem::take(&mut self.heads_map);
        let linear = self.linear;
        if let Some(seen) = self.seen(ui, cx, sequence, tensors, position) {
            let position = seen.key.position;
            let piece = |at: usize| sequence.tokens.get(at).map_or(String::new(), |token| cx.subject.piece(token.id));
            incomplete(ui, seen.of.missing, seen.of.tokens);
            let (weights, (grid, unit)) = (&seen.grids.linear, seen.grids.on(linear));
            let tooltip = |head: usize, at: usize| {
                let weight = weights.get(head, at).unwrap_or(f32::NAN);
                let weight = if weight.is_nan() { "not held".into() } else { percent(weight) };
                format!("head {head}: token {position} {:?} looks at {at} {:?}\n{weight}", piece(position), piece(at))
            };
            let spec = Spec {
                name: &format!("heads by token looked at, layer {}, token {position}", cx.selection.layer),
                row_axis: "head",
                column_axis: "token looked at",
                unit,
                scale: Scale::Sequential(cx.palette),
                row: Some(cx.selection.head as usize),
                column: None,
                column_groups: 0,
                tooltip: &tooltip,
                height: (ui.available_height() - 360.0).max(100.0),
            };
            if let Some((head, _)) = map.show(ui, grid, &spec).chosen {
                cx.selection.head = head as u32;
            }
            let height = ((ui.available_height() - 50.0) / 2.0).max(60.0);
            let mean = summary.as_ref();
            let mut plot = |ui: &mut Ui, what: &str, hint: &str, of: &[f32], mean: Option<&[f32]>, name: &str| {
                ui.label(what).on_hover_text(hint);
                if let Some(head) = by_head(ui, name, height, of, mean, cx.selection.head) {
                    cx.selection.head = head;
                }
            };
            plot(
                ui,
                &format!("entropy in bits: dots token {position}, line {}", over(mean)),
                "Few bits: the head looks at few tokens. Each bit more doubles their number.",
                &seen.of.entropy,
                mean.map(|mean| mean.entropy.as_slice()),
                "entropy by head",
            );
            plot(
                ui,
                &format!("weight on the first token: dots token {position}, line {}", over(mean)),
                "Heads that have nothing to look for rest on the first token: their sink.",
                &seen.of.sink,
                mean.map(|mean| mean.sink.as_slice()),
                "sink by head",
            );
        }
        self.heads_map = map;
    }

    /// Means over the text, once they are there.
    fn summarise(&mut self, ui: &Ui, cx: &Cx<'_>, sequence: &Sequence, tensors: &Tensors<'_>) -> Option<Summary> {
        let tokens = sequence.tokens.len();
        let end = if sequence.running { tokens / STRIDE * STRIDE } else { tokens };
        let key = tensors.key(sequence, cx.selection.layer, end.max(1) - 1);
        let (heads, scale) = (cx.subject.model.num_attention_heads as usize, cx.subject.model.softmax_scale);
        let found = self.summary.get_prepared(ui.ctx(), &key, || {
            let (keys, query) = (tensors.keys(end), tensors.query.clone());
            move || attention::summary(&query, &keys(), heads, scale)
        });
        found.filter(|summary| summary.sampled > 0).cloned()
    }
}

fn over(summary: Option<&Summary>) -> String {
    match summary {
        None => "(no mean yet)".into(),
        Some(summary) if summary.sampled == summary.tokens => format!("mean over all {} tokens", summary.tokens),
        Some(Summary { sampled, complete, tokens, .. }) if complete == tokens => {
            format!("mean over {sampled} of {tokens} tokens, evenly spaced")
        }
        Some(Summary { sampled, complete, tokens, .. }) => {
            format!("mean over {sampled} of the {complete} tokens (of {tokens}) whose context is complete")
        }
    }
}

/// Numbers by head. Returns the head that was clicked.
fn by_head(ui: &mut Ui, name: &str, height: f32, of: &[f32], mean: Option<&[f32]>, selected: u32) -> Option<u32> {
    let points = |numbers: &[f32]| -> PlotPoints<'static> {
        numbers.iter().enumerate().map(|(head, &number)| [head as f64, f64::from(number)]).collect()
    };
    let heads = of.len();
    let dark = ui.visuals().dark_mode;
    let answer =
        still(name, "head", "").height(height).include_x(-0.5).include_x(heads as f64 - 0.5).include_y(0.0).show(
            ui,
            |plot| {
                let mark = Color32::from_rgb(255, 80, 80);
                plot.vline(VLine::new("selected", f64::from(selected)).color(mark).allow_hover(false));
                if let Some(mean) = mean {
                    plot.line(Line::new("mean over the text", points(mean)).color(kind(1)).width(2.0));
                }
                plot.points(Points::new("this token", points(of)).radius(3.0).color(accent(dark)));
                plot.pointer_coordinate()
            },
        );
    let label = format!("{name}: {heads} heads, head {selected} selected");
    answer.response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Image, true, &label));
    let at = answer.inner.filter(|_| answer.response.clicked())?;
    (heads > 0).then(|| (at.x.round().max(0.0) as u32).min(heads as u32 - 1))
}

fn waiting(ui: &mut Ui, what: &str) {
    ui.horizontal(|ui| {
        ui.spinner();
        ui.weak(what);
    });
}

/// Says what is missing, if anything is.
fn incomplete(ui: &mut Ui, missing: usize, tokens: usize) {
    if missing > 0 {
        let text = format!(
            "{missing} of {tokens} tokens of the context are not held (dropped, or gone to stay within memory). Weights \
             are shares among the others, and larger than the model's."
        );
        ui.colored_label(ui.visuals().warn_fg_color, text);
    }
}

/// The tokens with the largest weights, largest first.
fn strongest(weights: &[f32]) -> Vec<(usize, f32)> {
    let mut all: Vec<(usize, f32)> =
        weights.iter().copied().enumerate().filter(|(_, weight)| weight.is_finite()).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.truncate(STRONGEST);
    all
}

fn percent(share: f32) -> String {
    if share.is_nan() { "?".into() } else { format!("{} %", number(share * 100.0)) }
}

/// The colour of bars and dots, on a dark ground or a light one.
fn accent(dark: bool) -> Color32 {
    if dark { kind(4) } else { kind(0) }
}

/// The shade behind a token for a weight from 0 to 1 of the largest; nothing below a 400th.
fn shade(dark: bool, unit: f32) -> Option<Color32> {
    let ground = if dark { Color32::from_gray(27) } else { Color32::from_gray(248) };
    (unit > 0.0025).then(|| ground.lerp_to_gamma(accent(dark), unit.clamp(0.0, 1.0).sqrt()))
}

fn shade_legend(ui: &mut Ui, most: f32, gaps: bool) {
    let dark = ui.visuals().dark_mode;
    ui.horizontal(|ui| {
        ui.weak("weight 0");
        let (bar, _) = ui.allocate_exact_size(egui::vec2(120.0, 10.0), egui::Sense::hover());
        for i in 0..60u16 {
            let unit = (f32::from(i) + 0.5) / 60.0;
            let left = egui::pos2(bar.min.x + 2.0 * f32::from(i), bar.min.y);
            let strip = egui::Rect::from_min_size(left, egui::vec2(2.0, bar.height()));
            ui.painter().rect_filled(strip, 0.0, shade(dark, unit).unwrap_or(Color32::TRANSPARENT));
        }
        ui.weak(percent(most));
        ui.weak(if gaps { "underlined: not held" } else { "tokens behind the marked one cannot be seen from it" });
    });
}
