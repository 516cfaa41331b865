//! All rows of the layer in two dimensions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use egui::{Color32, Ui};
use egui_plot::{Legend, Plot, PlotPoint, Points};
use moewe_plan::TapGroup;

use crate::analysis::pca::{Components, Moments, components};
use crate::colour::{Palette, kind};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::{Column, Key, Part, SequenceInfo, Store};
use crate::view::Cx;

use super::{Cached, Origin, Shown};

/// Points that are drawn at most.
const MOST_POINTS: usize = 8192;
/// How near the pointer must be to a point, in screen points.
const REACH: f32 = 10.0;
/// Colours of positions.
const STEPS: usize = 12;
/// Experts that have a colour of their own; the others share grey.
const EXPERTS: usize = 7;

/// What colours tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum By {
    #[default]
    Text,
    Position,
    Expert,
}

/// A text's rows and choices of experts.
struct Text {
    info: SequenceInfo,
    tokens: usize,
    rows: Column,
    experts: Option<(Column, Column)>,
}

/// The texts that have rows of a layer.
fn texts(store: &Store, layer: u32, cached: Cached) -> Vec<Text> {
    let of = |sequence: &crate::store::Sequence| {
        let routing = |part| sequence.column(Key::layer(TapGroup::Routing, layer, part)).cloned();
        Some(Text {
            info: sequence.info.clone(),
            tokens: sequence.tokens.len(),
            rows: sequence.column(cached.key(layer))?.clone(),
            experts: routing(Part::Ids).zip(routing(Part::Weights)),
        })
    };
    store.sequences().iter().filter_map(of).collect()
}

/// Rows that were added up, so that a row is added once only, when it comes.
struct Gathered {
    moments: Moments,
    /// What was added of each text: who it is, its length, and which rows (a bit each).
    added: BTreeMap<u32, (SequenceInfo, usize, Vec<u64>)>,
    /// Rows with numbers that are not finite.
    left_out: u64,
}

impl Gathered {
    fn new(dim: usize) -> Self {
        Self { moments: Moments::new(dim), added: BTreeMap::new(), left_out: 0 }
    }

    /// Adds what is new. Starts again if a text that was added is gone, is another one now or got shorter.
    fn add(&mut self, texts: &[Text]) {
        let dim = texts.first().map_or(0, |text| text.rows.columns());
        let same = |(number, (info, tokens, _)): (&u32, &(SequenceInfo, usize, Vec<u64>))| {
            texts.iter().any(|text| text.info.number == *number && text.info == *info && text.tokens >= *tokens)
        };
        if self.moments.dim() != dim || !self.added.iter().all(same) {
            *self = Self::new(dim);
        }
        for text in texts {
            let (_, tokens, rows) =
                self.added.entry(text.info.number).or_insert_with(|| (text.info.clone(), 0, Vec::new()));
            *tokens = text.tokens;
            rows.resize(text.tokens.div_ceil(64), 0);
            for at in 0..text.tokens {
                let bit = 1 << (at % 64);
                if rows[at / 64] & bit == 0
                    && let Some(row) = text.rows.floats(at)
                {
                    rows[at / 64] |= bit;
                    self.left_out += u64::from(!self.moments.push(row));
                }
            }
        }
    }
}

/// A row in the plane.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Dot {
    at: PlotPoint,
    sequence: u32,
    position: u32,
    expert: Option<u32>,
}

struct Made {
    dots: Vec<Dot>,
    /// Names of the texts by number.
    names: BTreeMap<u32, String>,
    components: Option<Components>,
    /// Rows that are held.
    held: usize,
    /// Rows that the components were computed from.
    counted: u64,
    left_out: u64,
    /// A dot for every so many rows.
    every: usize,
}

fn make(gathered: &mut Gathered, texts: &[Text]) -> Made {
    gathered.add(texts);
    let components = components(&gathered.moments, 2);
    let mut dots = Vec::new();
    let held: usize = texts.iter().map(|text| (0..text.tokens).filter(|&at| text.rows.has(at)).count()).sum();
    let every = held.div_ceil(MOST_POINTS).max(1);
    let mut number = 0;
    for text in texts {
        for position in 0..text.tokens {
            let (Some(row), Some(components)) = (text.rows.floats(position), &components) else { continue };
            number += 1;
            if number % every != 0 || row.iter().any(|number| !number.is_finite()) {
                continue;
            }
            let along = |axis: usize| if axis < components.axes.len() { components.project(row, axis) } else { 0.0 };
            dots.push(Dot {
                at: PlotPoint::new(along(0), along(1)),
                sequence: text.info.number,
                position: position as u32,
                expert: text.experts.as_ref().and_then(|experts| dominant(experts, position)),
            });
        }
    }
    Made {
        dots,
        names: texts.iter().map(|text| (text.info.number, text.info.name.clone())).collect(),
        components,
        held,
        counted: gathered.moments.count(),
        left_out: gathered.left_out,
        every,
    }
}

/// The expert with the largest weight.
fn dominant((ids, weights): &(Column, Column), position: usize) -> Option<u32> {
    let pairs = ids.ints(position)?.iter().zip(weights.floats(position)?);
    pairs.max_by(|a, b| a.1.total_cmp(b.1)).map(|(id, _)| *id)
}

/// Dots of a colour.
struct Group {
    name: String,
    colour: Color32,
    points: Vec<PlotPoint>,
}

fn groups(made: &Made, by: By, palette: Palette) -> Vec<Group> {
    let last = made.dots.iter().map(|dot| dot.position).max().unwrap_or(0) as usize;
    let step = (last + 1).div_ceil(STEPS).max(1);
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    made.dots.iter().filter_map(|dot| dot.expert).for_each(|expert| *counts.entry(expert).or_default() += 1);
    let mut common: Vec<(u32, usize)> = counts.into_iter().collect();
    common.sort_by_key(|&(expert, count)| (std::cmp::Reverse(count), expert));
    let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
    let texts: Vec<u32> = made.names.keys().copied().collect();
    for dot in &made.dots {
        let index = match by {
            By::Text => texts.iter().position(|number| *number == dot.sequence).unwrap_or(0),
            By::Position => dot.position as usize / step,
            By::Expert => {
                let place = |expert| common.iter().take(EXPERTS).position(|(other, _)| *other == expert);
                // Those without a colour of their own come first, so that the others are drawn over them.
                dot.expert.map_or(0, |expert| place(expert).map_or(1, |place| place + 2))
            }
        };
        let group = groups.entry(index).or_insert_with(|| {
            let (name, colour) = match by {
                By::Text => {
                    let name = made.names.get(&dot.sequence).cloned().unwrap_or_default();
                    (format!("{}: {name}", dot.sequence), kind(index))
                }
                By::Position => {
                    let unit = (index * step) as f32 / (last as f32).max(1.0);
                    (format!("{} to {}", index * step, ((index + 1) * step - 1).min(last)), palette.colour(unit))
                }
                By::Expert if index == 0 => ("no routing".to_owned(), kind(7).gamma_multiply(0.4)),
                By::Expert if index == 1 => ("other experts".to_owned(), kind(7).gamma_multiply(0.7)),
                By::Expert => (format!("expert {}", common[index - 2].0), kind(index - 2)),
            };
            Group { name, colour, points: Vec::new() }
        });
        group.points.push(dot.at);
    }
    groups.into_values().collect()
}

/// What a projection is computed from: layer, kind, tokens of all texts, and version while nothing runs.
type Of = (u32, Cached, u64, u64);

/// Rows gathered for a layer and kind, which jobs add to one after the other.
struct Shared {
    of: (u32, Cached),
    rows: Arc<Mutex<Gathered>>,
}

#[derive(Default)]
pub(super) struct Projection {
    by: By,
    gathered: Option<Shared>,
    made: Latest<Of, Arc<Made>>,
    /// The dots by colour, and what they were grouped from.
    grouped: Option<(Arc<Made>, By, Palette, Vec<Group>)>,
}

impl Projection {
    pub(super) fn show(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>) {
        let Origin { layer, cached, version, .. } = shown.origin;
        let of = (layer, cached);
        if self.gathered.as_ref().is_none_or(|shared| shared.of != of) {
            self.gathered = Some(Shared { of, rows: Arc::new(Mutex::new(Gathered::new(0))) });
        }
        let Some(Shared { rows: gathered, .. }) = &self.gathered else { return };
        let (gathered, store) = (Arc::clone(gathered), cx.store);
        let tokens: u64 = store.sequences().iter().map(|sequence| sequence.tokens.len() as u64).sum();
        let tokens = if version == 0 { crate::jobs::coarse(tokens) } else { tokens };
        let texts = texts(store, layer, cached);
        let make = move || {
            let mut gathered = gathered.lock().unwrap_or_else(|poisoned| {
                // A job that panicked may have left half a row: start again.
                let mut gathered = poisoned.into_inner();
                *gathered = Gathered::new(0);
                gathered
            });
            Arc::new(make(&mut gathered, &texts))
        };
        let made = self.made.get(ui.ctx(), &(layer, cached, tokens, version), make).cloned();
        self.controls(ui, layer, cx);
        let Some(made) = made else {
            ui.spinner();
            return;
        };
        describe(ui, &made);
        self.plot(ui, cx, shown, &made);
    }

    fn controls(&mut self, ui: &mut Ui, layer: u32, cx: &Cx<'_>) {
        ui.horizontal_wrapped(|ui| {
            ui.label("colour by");
            ui.selectable_value(&mut self.by, By::Text, "text").on_hover_text("Which text a token is of.");
            ui.selectable_value(&mut self.by, By::Position, "position").on_hover_text("Where in its text a token is.");
            let is_moe = cx.moe_layers().contains(&layer);
            let about = if is_moe {
                "The expert with the largest weight at this layer; the seven most frequent have colours."
            } else {
                "This layer has no experts: it is dense."
            };
            ui.add_enabled_ui(is_moe, |ui| {
                let response = ui.selectable_value(&mut self.by, By::Expert, "dominant expert");
                response.on_hover_text(about).on_disabled_hover_text(about);
            });
        });
    }

    fn plot(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>, made: &Arc<Made>) {
        let is_new = |(of, by, palette, _): &(Arc<Made>, By, Palette, Vec<Group>)| {
            !Arc::ptr_eq(of, made) || *by != self.by || *palette != cx.palette
        };
        if self.grouped.as_ref().is_none_or(is_new) {
            self.grouped = Some((Arc::clone(made), self.by, cx.palette, groups(made, self.by, cx.palette)));
        }
        let Some((.., groups)) = &self.grouped else { return };
        let explained = made.components.as_ref().map(Components::explained).unwrap_or_default();
        let axis = |i: usize| {
            let share = 100.0 * explained.get(i).copied().unwrap_or(0.0);
            format!("component {}: {share:.1} % of the variance", i + 1)
        };
        let is = |dot: &&Dot| dot.sequence == cx.selection.sequence && Some(dot.position) == cx.selection.token;
        let selected = made.dots.iter().find(is);
        let text = ui.visuals().text_color();
        let plot = Plot::new("projection")
            .height((ui.available_height() - 4.0).max(120.0))
            .data_aspect(1.0)
            .show_x(false)
            .show_y(false)
            .label_formatter(|_| None)
            .allow_boxed_zoom(false)
            .x_axis_label(axis(0))
            .y_axis_label(axis(1))
            .legend(
                Legend::default().follow_insertion_order(true).text_style(egui::TextStyle::Small).background_alpha(0.7),
            );
        let radius = if made.dots.len() > 1000 { 1.8 } else { 3.0 };
        let inner = plot.show(ui, |plot| {
            for group in groups {
                let points = Points::new(&group.name, group.points.as_slice());
                plot.points(points.color(group.colour).radius(radius).allow_hover(false));
            }
            if let Some(dot) = selected {
                let ring = Points::new("selected token", vec![[dot.at.x, dot.at.y]]).filled(false);
                plot.points(ring.color(text).radius(7.0).allow_hover(false));
            }
        });
        let response = inner.response;
        response.widget_info(|| {
            let label = format!("projection of {} rows, layer {}", made.dots.len(), shown.origin.layer);
            egui::WidgetInfo::labeled(egui::Role::Image, true, label)
        });
        let nearest = |at: egui::Pos2| {
            let distance = |dot: &Dot| inner.transform.position_from_point(&dot.at).distance(at);
            let near = made.dots.iter().map(|dot| (distance(dot), dot)).min_by(|a, b| a.0.total_cmp(&b.0));
            near.filter(|(distance, _)| *distance < REACH).map(|(_, dot)| *dot)
        };
        if response.clicked() {
            response.request_focus();
            if let Some(dot) = response.interact_pointer_pos().and_then(nearest) {
                (cx.selection.sequence, cx.selection.token) = (dot.sequence, Some(dot.position));
            }
        }
        if response.has_focus()
            && let Some(token) = crate::bars::step(ui, response.id, cx.selection.token, shown.rows.tokens)
        {
            cx.selection.token = Some(token);
        }
        if let Some(dot) = response.hover_pos().and_then(nearest) {
            response.on_hover_text_at_pointer(dot_line(cx, made, &dot));
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.made.is_busy()
    }
}

fn dot_line(cx: &Cx<'_>, made: &Made, dot: &Dot) -> String {
    let token = cx.store.sequence(dot.sequence).and_then(|sequence| sequence.tokens.get(dot.position as usize));
    let piece = token.map_or(String::new(), |token| format!(" “{}”", cx.subject.piece(token.id)));
    let name = made.names.get(&dot.sequence).map_or("", String::as_str);
    let expert = dot.expert.map_or(String::new(), |expert| format!(", expert {expert}"));
    format!("{name}: token {}{piece}{expert}", dot.position)
}

fn describe(ui: &mut Ui, made: &Made) {
    let explained: f64 = made.components.as_ref().map_or(0.0, |found| found.explained().iter().sum());
    let mut line = format!(
        "{} rows of {} texts; the plane shows {:.0} % of their variance",
        made.counted,
        made.names.len(),
        100.0 * explained
    );
    if (made.held as u64) < made.counted + made.left_out {
        line += &format!("; {} of them are held and drawn", made.held);
    }
    if made.every > 1 {
        line += &format!("; one in {} is drawn", made.every);
    }
    if made.left_out > 0 {
        line += &format!("; {} rows with numbers that are not finite were left out", made.left_out);
    }
    ui.weak(line).on_hover_text(
        "Principal components: the two directions along which the rows of this layer differ most, over all texts. Points \
         near each other need not be near in the other dimensions.",
    );
}

/// Coordinates of all held rows of all texts, and the components.
pub(super) fn tables(name: &str, cx: &Cx<'_>, cached: Cached) -> Vec<Table> {
    let texts = texts(cx.store, cx.selection.layer, cached);
    let mut gathered = Gathered::new(0);
    gathered.add(&texts);
    let Some(found) = components(&gathered.moments, 2) else { return Vec::new() };
    let (mut at, mut from) = (Vec::new(), Vec::new());
    for text in &texts {
        for position in 0..text.tokens {
            if let Some(row) = text.rows.floats(position) {
                at.extend((0..found.axes.len()).map(|axis| found.project(row, axis) as f32));
                from.extend([i64::from(text.info.number), position as i64]);
            }
        }
    }
    let (rows, axes, dim) = (from.len() / 2, found.axes.len(), found.mean.len());
    let floats = |numbers: &[f64]| numbers.iter().map(|&number| number as f32).collect::<Vec<f32>>();
    let variances = floats(&found.explained());
    vec![
        Table::integers(format!("{name}.projection_token"), &[("row", rows), ("text, position", 2)], from),
        Table::floats(format!("{name}.projection"), &[("row", rows), ("component", axes)], at),
        Table::floats(format!("{name}.explained_variance"), &[("component", axes)], variances),
        Table::floats(
            format!("{name}.components"),
            &[("component", axes), ("dimension", dim)],
            found.axes.iter().flat_map(|axis| floats(axis)).collect(),
        ),
        Table::floats(format!("{name}.mean"), &[("dimension", dim)], floats(&found.mean)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Shape;

    fn gathered(store: &Store, from: Option<Gathered>) -> Gathered {
        let mut gathered = from.unwrap_or_else(|| Gathered::new(0));
        gathered.add(&texts(store, 2, Cached::Latent));
        gathered
    }

    #[test]
    fn rows_added_as_they_come_give_the_same_as_all_at_once() {
        let shape = Shape::small();
        let mut store = Store::new(32, 64 << 20);
        let mut growing = Gathered::new(0);
        for event in shape.events() {
            store.apply(event);
            growing = gathered(&store, Some(growing));
        }
        let whole = gathered(&store, None);
        assert_eq!(growing.moments.count(), 288);
        assert_eq!(growing.moments, whole.moments, "the same rows in the same order");
        assert_eq!(components(&growing.moments, 2), components(&whole.moments, 2));
    }

    #[test]
    fn rows_that_were_evicted_stay_counted_and_others_texts_start_again() {
        let shape = Shape::small();
        let mut store = crate::synthetic::store(&shape);
        let all = gathered(&store, None);
        // A text that is replaced by another of the same number is another text.
        store.begin(SequenceInfo { number: 1, name: "other".into(), ..SequenceInfo::default() });
        let again = gathered(&store, Some(all));
        assert_eq!(again.moments.count(), 192);
        // Room for half of the rows.
        let shape = Shape { taps: "latents".parse().unwrap(), ..shape };
        let mut small = Store::new(32, 72 << 10);
        let mut growing = Gathered::new(0);
        for event in shape.events() {
            small.apply(event);
            growing = gathered(&small, Some(growing));
        }
        let held = texts(&small, 2, Cached::Latent);
        let held: usize = held.iter().map(|text| (0..text.tokens).filter(|&at| text.rows.has(at)).count()).sum();
        assert!(held < 288 && growing.moments.count() > held as u64, "{held} of {}", growing.moments.count());
    }

    #[test]
    fn every_dot_has_one_colour() {
        let store = crate::synthetic::store(&Shape::small());
        let made = make(&mut Gathered::new(0), &texts(&store, 2, Cached::Latent));
        assert_eq!((made.dots.len(), made.every), (288, 1));
        for by in [By::Text, By::Position, By::Expert] {
            let groups = groups(&made, by, Palette::Viridis);
            assert_eq!(groups.iter().map(|group| group.points.len()).sum::<usize>(), 288, "{by:?}");
            assert!(groups.len() > 1 && groups.len() <= STEPS, "{by:?}: {}", groups.len());
        }
    }
}
