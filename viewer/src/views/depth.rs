//! What the model would say if it stopped at each layer.

use egui::{Color32, Rect, Sense, Ui, pos2, vec2};
use egui_plot::{Line, PlotPoints, Points, VLine};
use moewe_plan::TapGroup;

use crate::analysis::depth::{Lens, Measure, settles};
use crate::bars::still;
use crate::colour::{kind, text_on};
use crate::heat::{Grid, HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::{Key, Part, Sequence};
use crate::view::{Cx, View};

/// Tokens that come between two pictures of a text that is being written.
const STRIDE: usize = 32;

/// The logit lens: what each layer's hidden state would predict, by layer for one token, or for a whole text.
#[derive(Default)]
pub struct Depth {
    mode: Mode,
    measure: Measure,
    map: Latest<MapKey, Map>,
    heat: HeatMap,
    shown: Option<(u32, u32)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Token,
    Text,
}

#[derive(Clone, Debug, PartialEq)]
struct MapKey {
    sequence: u32,
    tokens: usize,
    layers: Vec<u32>,
    measure: Measure,
    version: u64,
}

struct Map {
    key: MapKey,
    grid: Grid,
    settling: Vec<Option<u32>>,
    missing: usize,
}

fn ids(layer: u32) -> Key {
    Key::layer(TapGroup::Lens, layer, Part::Ids)
}

fn probs(layer: u32) -> Key {
    Key::layer(TapGroup::Lens, layer, Part::Probs)
}

/// The selected token, or the newest.
fn looking(sequence: &Sequence, token: Option<u32>) -> usize {
    let last = sequence.tokens.len().saturating_sub(1);
    token.map_or(last, |token| (token as usize).min(last))
}

impl View for Depth {
    fn name(&self) -> &'static str {
        "depth"
    }

    fn about(&self) -> &'static str {
        "What the model would predict if it stopped at each layer (the logit lens), and from which layer on its answer \
         stands."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        let store = cx.store;
        let Some(sequence) = store.sequence(cx.selection.sequence).filter(|sequence| !sequence.tokens.is_empty())
        else {
            ui.weak("No text has been seen yet. Predictions by layer appear as soon as a text runs.");
            return;
        };
        let lens = Lens::of(sequence);
        if lens.layers.is_empty() {
            ui.label("No predictions by layer were recorded: record with --taps lens");
            ui.weak(
                "Every layer costs one more product with the head. A few layers are cheaper: --taps lens:10,lens:20",
            );
            return;
        }
        ui.horizontal_wrapped(|ui| {
            let hint = "What each layer would predict behind the selected token";
            ui.selectable_value(&mut self.mode, Mode::Token, "token").on_hover_text(hint);
            let hint = "Every layer at every token of the text";
            ui.selectable_value(&mut self.mode, Mode::Text, "text").on_hover_text(hint);
            if self.mode == Mode::Text {
                ui.separator();
                for (measure, name, hint) in [
                    (Measure::Rank, "rank", "How many tokens the layer holds likelier than the final prediction"),
                    (Measure::Probability, "probability", "What the layer gives to the final prediction"),
                    (Measure::Entropy, "entropy", "How undecided the layer is: 0 is sure of one token"),
                ] {
                    ui.selectable_value(&mut self.measure, measure, name).on_hover_text(hint);
                }
            }
            let layers = cx.subject.model.layers as usize;
            if lens.layers.len() < layers {
                ui.weak(format!("— {} of {layers} layers were recorded", lens.layers.len()));
            }
        });
        match self.mode {
            Mode::Token => self.token(ui, cx, sequence, &lens),
            Mode::Text => self.text(ui, cx, sequence, &lens),
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        &["token", "text"]
    }

    fn show_part(&mut self, part: usize) {
        self.mode = [Mode::Token, Mode::Text].get(part).copied().unwrap_or_default();
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let Some(sequence) = cx.sequence() else { return Vec::new() };
        let lens = Lens::of(sequence);
        let (layers, tokens) = (lens.layers.len(), sequence.tokens.len());
        if layers == 0 {
            return Vec::new();
        }
        let axes = [("layer", layers), ("token", tokens)];
        let settling = lens.settling(tokens).into_iter().map(|layer| layer.map_or(-1, i64::from)).collect();
        let at = looking(sequence, cx.selection.token);
        let width = lens.layers.iter().filter_map(|&layer| sequence.ints(ids(layer), at)).map(<[u32]>::len).max();
        let width = width.unwrap_or(0);
        let (mut top, mut likely) = (Vec::new(), Vec::new());
        for &layer in &lens.layers {
            let (ids, probs) = (sequence.ints(ids(layer), at), sequence.floats(probs(layer), at));
            top.extend((0..width).map(|i| ids.and_then(|ids| ids.get(i)).map_or(-1, |id| i64::from(*id))));
            likely.extend((0..width).map(|i| probs.and_then(|probs| probs.get(i)).copied().unwrap_or(f32::NAN)));
        }
        let top_axes = [("layer", layers), ("place", width)];
        vec![
            Table::words("lens.tokens", "token", sequence.tokens.iter().map(|t| cx.subject.piece(t.id)).collect()),
            Table::integers("lens.layers", &[("layer", layers)], lens.layers.iter().map(|l| i64::from(*l)).collect()),
            Table::floats("lens.rank", &axes, lens.map(tokens, Measure::Rank)),
            Table::floats("lens.probability", &axes, lens.map(tokens, Measure::Probability)),
            Table::floats("lens.entropy_nats", &axes, lens.map(tokens, Measure::Entropy)),
            Table::integers("lens.settles_at_layer", &[("token", tokens)], settling),
            Table::integers(format!("lens.token{at}.top_ids"), &top_axes, top),
            Table::floats(format!("lens.token{at}.top_probabilities"), &top_axes, likely),
        ]
    }

    fn is_busy(&self) -> bool {
        self.map.is_busy()
    }
}

impl Depth {
    fn token(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence, lens: &Lens) {
        let at = looking(sequence, cx.selection.token);
        let ranks = lens.at(at, Measure::Rank);
        let piece = cx.subject.piece(sequence.tokens[at].id);
        let next = sequence.tokens.get(at + 1).map(|next| cx.subject.piece(next.id));
        let settled = settles(&ranks).map(|index| lens.layers[index]);
        let what = match settled {
            Some(layer) => format!("the answer stays on top from layer {layer} on"),
            None if ranks.iter().all(|rank| rank.is_nan()) => "nothing was recorded at it".into(),
            None => "the answer is not on top in the last recorded layer".into(),
        };
        let next = next.map_or(String::new(), |next| format!(" (the text goes on with {next:?})"));
        ui.label(format!("Behind token {at} {piece:?}: {what}{next}."))
            .on_hover_text("The answer is the likeliest token to the whole model; the text may have drawn another.");
        if ranks.iter().all(|rank| rank.is_nan()) {
            ui.weak("Its frame was dropped, or its rows went to stay within memory. Choose another token.");
            return;
        }
        let width = ui.available_width();
        ui.horizontal_top(|ui| {
            let size = vec2(width * 0.62, ui.available_height());
            ui.allocate_ui(size, |ui| self.layers(ui, cx, sequence, lens, at, settled));
            ui.vertical(|ui| plots(ui, cx, lens, at));
        });
    }

    /// A row for each layer with its likeliest tokens.
    fn layers(
        &mut self,
        ui: &mut Ui,
        cx: &mut Cx<'_>,
        sequence: &Sequence,
        lens: &Lens,
        at: usize,
        settled: Option<u32>,
    ) {
        ui.vertical(|ui| {
            probability_legend(ui, cx);
            let area = egui::ScrollArea::vertical().id_salt("layers").auto_shrink([false, false]);
            area.show(ui, |ui| {
                ui.spacing_mut().item_spacing.y = 1.0;
                let follow = self.shown.replace((cx.selection.layer, cx.selection.token.unwrap_or(u32::MAX)));
                let follow = follow.map(|shown| shown.0) != Some(cx.selection.layer);
                let mut chosen = None;
                for (index, &layer) in lens.layers.iter().enumerate() {
                    let response = layer_row(ui, cx, sequence, layer, at, settled == Some(layer));
                    let selected = layer == cx.selection.layer;
                    if selected && follow {
                        response.scroll_to_me(None);
                    }
                    if response.clicked() {
                        response.request_focus();
                        chosen = Some(layer);
                    }
                    if response.has_focus() {
                        let filter = egui::EventFilter { vertical_arrows: true, ..Default::default() };
                        ui.memory_mut(|memory| memory.set_focus_lock_filter(response.id, filter));
                        let pressed = |key| ui.input_mut(|i| i.consume_key(egui::Modifiers::NONE, key));
                        let selected = lens.layers.iter().position(|layer| *layer == cx.selection.layer);
                        let from = selected.unwrap_or(index);
                        if pressed(egui::Key::ArrowUp) {
                            chosen = lens.layers.get(from.saturating_sub(1)).copied();
                        } else if pressed(egui::Key::ArrowDown) {
                            chosen = lens.layers.get(from + 1).copied();
                        }
                    }
                }
                if let Some(layer) = chosen {
                    cx.selection.layer = layer;
                }
            });
        });
    }

    fn text(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, sequence: &Sequence, lens: &Lens) {
        let tokens = sequence.tokens.len();
        let key = MapKey {
            sequence: sequence.info.number,
            tokens: if sequence.running { tokens / STRIDE * STRIDE } else { tokens }.max(1),
            layers: lens.layers.clone(),
            measure: self.measure,
            version: if sequence.running { 0 } else { cx.store.version() },
        };
        let found = self.map.get_prepared(ui.ctx(), &key, || {
            let (lens, key) = (lens.clone(), key.clone());
            move || map(&lens, key)
        });
        let Some(map) = found.filter(|map| map.key.sequence == sequence.info.number) else {
            ui.horizontal(|ui| {
                ui.spinner();
                ui.weak("gathering the layers of all tokens");
            });
            return;
        };
        settling(ui, map);
        let (unit, measure) = match map.key.measure {
            Measure::Rank => ("digits of the rank: log10(1 + rank), 0 is on top", "rank"),
            Measure::Probability => ("probability of the answer", "probability"),
            Measure::Entropy => ("nats of entropy", "entropy"),
        };
        let layers = &map.key.layers;
        let complete = layers.iter().enumerate().all(|(index, layer)| index as u32 == *layer);
        let row_axis = if complete { "layer" } else { "recorded layer, counted" };
        let tooltip = |row: usize, at: usize| {
            let layer = layers[row];
            let piece = sequence.tokens.get(at).map_or(String::new(), |token| cx.subject.piece(token.id));
            let (Some(ids), Some(probs)) = (sequence.ints(ids(layer), at), sequence.floats(probs(layer), at)) else {
                return format!("layer {layer}, token {at} {piece:?}: not held");
            };
            let likeliest = ids.iter().zip(probs).take(3);
            let likeliest = likeliest.map(|(id, p)| format!("{:?} {}", cx.subject.piece(*id), number(*p)));
            let likeliest: Vec<String> = likeliest.collect();
            let stats = sequence.floats(Key::layer(TapGroup::Lens, layer, Part::Stats), at).unwrap_or_default();
            format!(
                "layer {layer}, behind token {at} {piece:?}: {}\nthe answer: rank {}, probability {}; entropy {} nats",
                likeliest.join(", "),
                number(Measure::Rank.of(stats)),
                number(Measure::Probability.of(stats)),
                number(Measure::Entropy.of(stats)),
            )
        };
        let spec = Spec {
            name: &format!("{measure} of the answer by layer and token"),
            row_axis,
            column_axis: "token",
            unit,
            scale: Scale::Sequential(cx.palette),
            row: layers.iter().position(|layer| *layer == cx.selection.layer),
            column: cx.selection.token.map(|token| token as usize).filter(|token| *token < map.grid.columns),
            column_groups: 0,
            tooltip: &tooltip,
            height: (ui.available_height() - 70.0).max(120.0),
        };
        if let Some((row, token)) = self.heat.show(ui, &map.grid, &spec).chosen {
            cx.selection.layer = layers[row];
            cx.selection.token = Some(token as u32);
        }
    }
}

fn map(lens: &Lens, key: MapKey) -> Map {
    let cells = lens.map(key.tokens, key.measure);
    let missing = (0..key.tokens).filter(|&at| cells.iter().skip(at).step_by(key.tokens).any(|c| c.is_nan())).count();
    let settling = lens.settling(key.tokens);
    let rows = lens.layers.len();
    let grid = match key.measure {
        Measure::Rank => {
            Grid::from_zero(rows, key.tokens, cells.into_iter().map(|rank| (1.0 + rank).log10()).collect())
        }
        Measure::Probability => Grid { range: (0.0, 1.0), ..Grid::from_zero(rows, key.tokens, cells) },
        Measure::Entropy => Grid::from_zero(rows, key.tokens, cells),
    };
    Map { key, grid, settling, missing }
}

/// Where answers settle over the text, and what is missing.
fn settling(ui: &mut Ui, map: &Map) {
    let mut layers: Vec<u32> = map.settling.iter().flatten().copied().collect();
    layers.sort_unstable();
    let text = match layers.get(layers.len() / 2) {
        Some(half) => format!(
            "Half of the answers that settle ({} of {} tokens) stay on top from layer {half} on or earlier.",
            layers.len(),
            map.settling.len()
        ),
        None => "No answer is on top in the last recorded layer.".to_owned(),
    };
    ui.label(text).on_hover_text("An answer settles at the first layer from which on no other token is likelier.");
    if map.missing > 0 {
        let text =
            format!("{} of {} tokens have layers that are not held: they are grey.", map.missing, map.key.tokens);
        ui.colored_label(ui.visuals().warn_fg_color, text);
    }
}

fn layer_row(ui: &mut Ui, cx: &Cx<'_>, sequence: &Sequence, layer: u32, at: usize, settled: bool) -> egui::Response {
    let (row, response) = ui.allocate_exact_size(vec2(ui.available_width() - 8.0, 22.0), Sense::click());
    let ids = sequence.ints(ids(layer), at).unwrap_or_default();
    let probs = sequence.floats(probs(layer), at).unwrap_or_default();
    let selected = layer == cx.selection.layer;
    let words = || -> Vec<String> {
        ids.iter().zip(probs).map(|(id, p)| format!("{:?} {}", cx.subject.piece(*id), number(*p))).collect()
    };
    response.widget_info(|| {
        let label = format!("layer {layer}: {}", words().join(", "));
        egui::WidgetInfo::selected(egui::Role::Button, true, selected, label)
    });
    if !ui.is_rect_visible(row) {
        return response;
    }
    let font = egui::TextStyle::Body.resolve(ui.style());
    let painter = ui.painter().with_clip_rect(row.intersect(ui.clip_rect()));
    let colour = if selected { ui.visuals().strong_text_color() } else { ui.visuals().weak_text_color() };
    let label = if settled { format!("{layer} settles") } else { layer.to_string() };
    painter.text(row.left_center() + vec2(4.0, 0.0), egui::Align2::LEFT_CENTER, label, font.clone(), colour);
    let left = row.min.x + 66.0;
    let width = (row.max.x - left) / ids.len().max(1) as f32;
    for (i, (id, p)) in ids.iter().zip(probs).enumerate() {
        let min = pos2(left + i as f32 * width, row.min.y);
        let cell = Rect::from_min_size(min, vec2(width - 1.0, row.height()));
        let fill = cx.palette.colour(*p);
        painter.rect_filled(cell, 0.0, fill);
        let text = cx.subject.piece(*id);
        let clip = painter.with_clip_rect(cell.shrink2(vec2(2.0, 0.0)).intersect(painter.clip_rect()));
        clip.text(cell.left_center() + vec2(4.0, 0.0), egui::Align2::LEFT_CENTER, text, font.clone(), text_on(fill));
    }
    if ids.is_empty() {
        painter.text(pos2(left, row.center().y), egui::Align2::LEFT_CENTER, "not held", font, colour);
    }
    if selected {
        let mark = egui::Stroke::new(1.5, Color32::from_rgb(255, 80, 80));
        painter.rect_stroke(row, 0.0, mark, egui::StrokeKind::Inside);
    }
    if response.has_focus() {
        painter.rect_stroke(row.shrink(2.0), 0.0, ui.visuals().selection.stroke, egui::StrokeKind::Inside);
    }
    response.on_hover_ui(|ui| {
        ui.label(format!("Layer {layer} would predict, best first:"));
        for word in words() {
            ui.label(word);
        }
    })
}

fn probability_legend(ui: &mut Ui, cx: &Cx<'_>) {
    ui.horizontal(|ui| {
        ui.weak("0");
        let (bar, _) = ui.allocate_exact_size(vec2(120.0, 10.0), Sense::hover());
        for i in 0..60u16 {
            let left = pos2(bar.min.x + 2.0 * f32::from(i), bar.min.y);
            let strip = Rect::from_min_size(left, vec2(2.0, bar.height()));
            ui.painter().rect_filled(strip, 0.0, cx.palette.colour((f32::from(i) + 0.5) / 60.0));
        }
        ui.weak("1 probability; likeliest tokens from left to right");
    });
}

/// Probability, rank and entropy over the layers.
fn plots(ui: &mut Ui, cx: &mut Cx<'_>, lens: &Lens, at: usize) {
    let height = ((ui.available_height() - 70.0) / 3.0).max(60.0);
    let top = f64::from(cx.subject.model.layers.max(2) - 1);
    let colour = if ui.visuals().dark_mode { kind(4) } else { kind(0) };
    for (measure, title, hint) in [
        (Measure::Probability, "probability of the answer", "What each layer gives to the model's final prediction"),
        (Measure::Rank, "rank of the answer, log10(1 + rank)", "0: no other token is likelier at this layer"),
        (Measure::Entropy, "entropy, nats", "How undecided the layer is: 0 is sure of one token"),
    ] {
        ui.label(title).on_hover_text(hint);
        let numbers = lens.at(at, measure);
        let points: Vec<[f64; 2]> = lens
            .layers
            .iter()
            .zip(numbers)
            .filter(|(_, number)| number.is_finite())
            .map(|(&layer, number)| {
                let number = f64::from(number);
                [
                    f64::from(layer),
                    if measure == Measure::Rank { number.ln_1p() / std::f64::consts::LN_10 } else { number },
                ]
            })
            .collect();
        let plot = still(title, "layer", "").height(height).include_x(0.0).include_x(top).include_y(0.0).include_y(1.0);
        let answer = plot.show(ui, |plot| {
            let mark = Color32::from_rgb(255, 80, 80);
            plot.vline(VLine::new("layer", f64::from(cx.selection.layer)).color(mark).allow_hover(false));
            plot.line(Line::new(title, PlotPoints::from(points.clone())).color(colour));
            plot.points(Points::new(title, PlotPoints::from(points)).radius(2.5).color(colour));
            plot.pointer_coordinate()
        });
        answer
            .response
            .widget_info(|| egui::WidgetInfo::labeled(egui::Role::Image, true, format!("plot over layers: {title}")));
        if let Some(at) = answer.inner.filter(|_| answer.response.clicked()) {
            let nearest = lens.layers.iter().min_by_key(|layer| (f64::from(**layer) - at.x).abs() as u64);
            cx.selection.layer = nearest.copied().unwrap_or(cx.selection.layer);
        }
    }
}
