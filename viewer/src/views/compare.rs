//! Two texts side by side: where their words part, and how far their routing and hidden states are from each other.

mod parts;
mod shown;

use std::ops::Range;
use std::sync::Arc;

use egui::{Color32, RichText, ScrollArea, Sense, Stroke, Ui, vec2};
use moewe_plan::TapGroup;

use self::parts::{Curve, ROW, aside, columns, over_layers, paint_cells, points, row};
use self::shown::{JobKey, Measure, Shown, tensors};
use super::choose::shorten;
use super::pieces::word;
use crate::analysis::divergence::{Difference, Summary, as_wholes, branch, by_position, first_difference};
use crate::colour::kind;
use crate::heat::{HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::Sequence;
use crate::view::{Cx, View};

/// Characters of a text's name that are shown.
const NAME: usize = 40;
/// Rows that stay in sight above the one that a list is scrolled to.
const ABOVE: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    ByPosition,
    AsWholes,
}

/// Two texts, and what of them is shown.
pub struct Compare {
    job: Latest<JobKey, Shown>,
    measure: Measure,
    /// What the user chose for a pair; without it, versions are compared by position, other texts as wholes.
    mode: Option<((u32, u32), Mode)>,
    map: HeatMap,
    shares: HeatMap,
    /// The pair and the token that the list was scrolled to, and the rows that are in sight.
    scrolled: Option<((u32, u32), Option<u32>)>,
    visible: Range<usize>,
}

impl Default for Compare {
    fn default() -> Self {
        Self {
            job: Latest::default(),
            measure: Measure::Divergence,
            mode: None,
            map: HeatMap::default(),
            shares: HeatMap::default(),
            scrolled: None,
            visible: 0..0,
        }
    }
}

/// The two texts: the selected one, and the one to compare it with or its newest version.
fn pair<'a>(cx: &Cx<'a>) -> Option<(&'a Sequence, &'a Sequence)> {
    let store = cx.store;
    let a = store.sequence(cx.selection.sequence).or(store.sequences().last())?;
    let number = a.info.number;
    let not_a = |text: &&Sequence| text.info.number != number;
    let chosen = cx.selection.other.and_then(|other| store.sequence(other)).filter(not_a);
    let child = || store.sequences().iter().rev().filter(not_a).find(|t| t.info.parent.is_some_and(|p| p.0 == number));
    let parent = || a.info.parent.and_then(|(parent, _)| store.sequence(parent)).filter(not_a);
    let any = || store.sequences().iter().find(not_a);
    Some((a, chosen.or_else(child).or_else(parent).or_else(any)?))
}

impl View for Compare {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn about(&self) -> &'static str {
        "Two texts beside each other, for example before and after a change of the model: where their words part, and how \
         differently each layer routes and represents them."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        let Some((a, b)) = pair(cx) else {
            self.job = Latest::default();
            nothing(ui, cx);
            return;
        };
        let numbers = (a.info.number, b.info.number);
        let key = JobKey::new(cx.store, a, b);
        self.job.get_prepared(ui.ctx(), &key, || {
            let (subject, tensors) = (Arc::clone(cx.subject), tensors(&cx.subject.model));
            let (a, b) = (a.with_only(&tensors), b.with_only(&tensors));
            move || Shown::new(&subject.model, &a, &b)
        });
        choosers(ui, cx, a, b);
        let parts = first_difference(&a.tokens, &b.tokens);
        let mode = self.modes(ui, cx, (a, b), parts);
        ui.add_space(4.0);
        let job = std::mem::take(&mut self.job);
        match (job.value().filter(|(key, _)| key.pair == numbers), mode) {
            (None, _) => {
                ui.horizontal(|ui| {
                    ui.spinner();
                    ui.label("comparing …");
                });
            }
            (Some((_, shown)), Mode::ByPosition) => self.by_position(ui, cx, (a, b), parts, shown),
            (Some((_, shown)), Mode::AsWholes) => self.as_wholes(ui, cx, (a, b), shown),
        }
        self.job = job;
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let Some((a, b)) = pair(cx) else { return Vec::new() };
        let (model, store) = (&cx.subject.model, cx.store);
        let found = by_position(model, a, b);
        let wholes = as_wholes(model, a, b);
        let layers = model.layers as usize;
        let ids = |text: &Sequence| text.tokens.iter().map(|token| i64::from(token.id)).collect::<Vec<_>>();
        let parts = found.first_difference.map_or(-1, |at| at as i64);
        let branch = branch(store, a.info.number, b.info.number).map_or(-1, i64::from);
        let texts = vec![a.info.number.into(), b.info.number.into(), branch, parts];
        let mut tables = vec![
            Table::words("compare.names", "text", vec![a.info.name.clone(), b.info.name.clone()]),
            Table::integers("compare.texts", &[("a, b, branch, first difference", 4)], texts),
            Table::integers("compare.tokens.a", &[("token", a.tokens.len())], ids(a)),
            Table::integers("compare.tokens.b", &[("token", b.tokens.len())], ids(b)),
        ];
        for (name, map) in [("divergence", &found.divergence), ("overlap", &found.overlap), ("cosine", &found.cosine)] {
            let axes = [("layer", layers), ("token", found.positions)];
            tables.push(Table::floats(format!("compare.{name}"), &axes, map.cells.clone()));
            for (when, summaries) in [("before", &map.before), ("after", &map.after)] {
                let cells = summaries.iter().flat_map(|s| [s.mean, s.least, s.most, s.held as f32]).collect();
                let axes = [("layer", layers), ("mean, least, most, tokens", 4)];
                tables.push(Table::floats(format!("compare.{name}.{when}"), &axes, cells));
            }
        }
        tables.push(Table::floats("compare.load.divergence", &[("layer", layers)], wholes.divergence));
        for ((name, shares), held) in ["a", "b"].into_iter().zip(wholes.shares).zip(wholes.held) {
            let axes = [("layer", layers), ("expert", wholes.experts)];
            tables.push(Table::floats(format!("compare.load.{name}"), &axes, shares));
            let held = held.into_iter().map(|held| held as i64).collect();
            tables.push(Table::integers(format!("compare.load.{name}.tokens"), &[("layer", layers)], held));
        }
        tables
    }

    fn is_busy(&self) -> bool {
        self.job.is_busy()
    }
}

fn nothing(ui: &mut Ui, cx: &Cx<'_>) {
    ui.strong("It takes two texts to compare");
    ui.label(if cx.is_live {
        "Write a second one: with another prompt, or run a text again from one of its tokens with the model changed (view \
         change)."
    } else {
        "The recording holds fewer than two. Record several prompts, or open a second recording beside this one: moewe view \
         FILE --against FILE"
    });
}

/// Menus of the two texts.
fn choosers(ui: &mut Ui, cx: &mut Cx<'_>, a: &Sequence, b: &Sequence) {
    let menu = |ui: &mut Ui, name: &str, shown: &Sequence| {
        let label = ui.strong(name);
        let mut chosen = None;
        let menu = egui::ComboBox::from_id_salt(name).width(220.0).selected_text(shorten(&shown.info.name, NAME));
        let menu = menu.show_ui(ui, |ui| {
            for text in cx.store.sequences() {
                let (number, name) = (text.info.number, shorten(&text.info.name, NAME));
                let label = format!("{number} · {name} · {} tokens", text.tokens.len());
                if ui.selectable_label(number == shown.info.number, label).clicked() {
                    chosen = Some(number);
                }
            }
        });
        menu.response.labelled_by(label.id);
        chosen
    };
    ui.horizontal_wrapped(|ui| {
        let chosen_a = menu(ui, "A", a);
        let chosen_b = menu(ui, "B", b);
        let swap = ui.button("Swap").on_hover_text("B becomes A, and A becomes B").clicked();
        let (a, b) = (a.info.number, b.info.number);
        // Choosing one text for both swaps them, too.
        if swap || chosen_a == Some(b) || chosen_b == Some(a) {
            (cx.selection.sequence, cx.selection.other) = (b, Some(a));
        } else {
            cx.selection.sequence = chosen_a.unwrap_or(cx.selection.sequence);
            cx.selection.other = chosen_b.or(cx.selection.other);
        }
    });
}

impl Compare {
    /// How the two are compared, and what they are to each other.
    fn modes(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, (a, b): (&Sequence, &Sequence), parts: Option<usize>) -> Mode {
        let numbers = (a.info.number, b.info.number);
        let branch = branch(cx.store, numbers.0, numbers.1);
        let usual = if branch.is_some() { Mode::ByPosition } else { Mode::AsWholes };
        let mut mode = self.mode.filter(|(of, _)| *of == numbers).map_or(usual, |(_, mode)| mode);
        ui.horizontal_wrapped(|ui| {
            let by = ui.selectable_value(&mut mode, Mode::ByPosition, "by position");
            let by = by.on_hover_text("Token 5 of A with token 5 of B and so on: for versions of one text");
            let whole = ui.selectable_value(&mut mode, Mode::AsWholes, "as wholes");
            let whole =
                whole.on_hover_text("How each text shares its traffic out among the experts: for any two texts");
            if by.changed() || whole.changed() {
                self.mode = Some((numbers, mode));
            }
            if mode == Mode::ByPosition {
                ui.separator();
                for measure in Measure::ALL {
                    let chooser = ui.selectable_value(&mut self.measure, measure, measure.name());
                    chooser.on_hover_text(measure.about());
                }
            }
        });
        ui.horizontal_wrapped(|ui| {
            let relation = match branch {
                Some(at) => format!("Versions of one text, written anew from token {at} on."),
                None => "Not versions of one text.".to_owned(),
            };
            ui.label(relation);
            match parts {
                _ if mode == Mode::AsWholes => {}
                None => {
                    ui.label(format!("All {} words that both have are the same.", a.tokens.len().min(b.tokens.len())));
                }
                Some(at) => {
                    let go = ui.link(format!("The first different word is token {at}."));
                    if go.on_hover_text("Selects it").clicked() {
                        cx.selection.token = Some(at as u32);
                    }
                }
            }
        });
        mode
    }

    fn by_position(
        &mut self,
        ui: &mut Ui,
        cx: &mut Cx<'_>,
        texts: (&Sequence, &Sequence),
        parts: Option<usize>,
        shown: &Shown,
    ) {
        let ui = &mut aside(ui, "words of A and B", |ui| self.words(ui, cx, texts, parts, shown));
        let measure = self.measure;
        let summaries = measure.map(&shown.found);
        if summaries.is_empty() {
            missing(ui, measure.group());
            return;
        }
        let layer = cx.selection.layer as usize;
        let (same, other) = (kind(2), kind(5));
        let split = shown.found.first_difference.unwrap_or(shown.found.positions);
        ui.horizontal_wrapped(|ui| {
            ui.strong(format!("layer {layer}")).on_hover_text(measure.about());
            if measure.group() == TapGroup::Routing && !cx.moe_layers().contains(&cx.selection.layer) {
                ui.weak("has no experts");
                return;
            }
            said(ui, same, "same words", measure, summaries.before.get(layer), split);
            said(ui, other, "from there on", measure, summaries.after.get(layer), shown.found.positions - split);
            let farthest = if measure == Measure::Divergence { "largest" } else { "smallest" };
            ui.weak(format!("(solid: mean, dashed: {farthest})"));
        });
        let line = |name: &str, colour: Color32, of: &[Summary], thin: bool| Curve {
            name: if thin { format!("{name}, {}", measure.farthest(&of[0]).1) } else { format!("{name}, mean") },
            colour,
            thin,
            points: points(of.iter().map(|s| if thin { measure.farthest(s).0 } else { s.mean })),
        };
        let mut curves = Vec::new();
        for (name, colour, of) in [("same words", same, &summaries.before), ("from there on", other, &summaries.after)]
        {
            if of.iter().any(|summary| summary.held > 0) {
                curves.extend([line(name, colour, of, false), line(name, colour, of, true)]);
            }
        }
        // Overlaps and cosines are near 1 where nothing changed; divergences may be small throughout.
        let top = if measure == Measure::Divergence { 0.0 } else { 1.0 };
        over_layers(ui, cx, &format!("{} by layer", measure.name()), measure.unit(), top, curves);
        let grid = &shown.maps[measure as usize];
        let (a, b) = texts;
        let tooltip = |layer: usize, position: usize| {
            let piece =
                |text: &Sequence| text.tokens.get(position).map_or_else(String::new, |t| word(cx.subject, t.id));
            let words = match (piece(a), piece(b)) {
                (a, b) if a == b => a,
                (a, b) => format!("A {a}, B {b}"),
            };
            let value = grid.get(layer, position).filter(|value| !value.is_nan());
            let value =
                value.map_or_else(|| "not held".to_owned(), |v| format!("{} {}", number(v), measure.distance()));
            format!("layer {layer}, token {position}: {words}\n{value}")
        };
        let token = cx.selection.token.map(|token| token as usize).filter(|token| *token < grid.columns);
        let spec = Spec {
            name: &format!("{} by layer and token", measure.name()),
            row_axis: "layer",
            column_axis: "token",
            unit: measure.distance(),
            scale: Scale::Sequential(cx.palette),
            row: Some(layer).filter(|layer| *layer < grid.rows),
            column: token,
            column_groups: 0,
            tooltip: &tooltip,
            height: (ui.available_height() - 64.0).max(60.0),
        };
        if let Some((layer, token)) = self.map.show(ui, grid, &spec).chosen {
            cx.selection.layer = layer as u32;
            cx.selection.token = Some(token as u32);
        }
    }

    /// The words of both texts, a line for each position.
    fn words(
        &mut self,
        ui: &mut Ui,
        cx: &mut Cx<'_>,
        (a, b): (&Sequence, &Sequence),
        parts: Option<usize>,
        shown: &Shown,
    ) {
        let numbers = (a.info.number, b.info.number);
        let anew = branch(cx.store, numbers.0, numbers.1).map(|at| at as usize);
        let measure = self.measure;
        let map = &shown.maps[measure as usize];
        let layer = cx.selection.layer as usize;
        let heading = [String::new(), "A".into(), "B".into(), format!("layer {layer}")];
        let (_, header) = ui.allocate_space(vec2(ui.available_width(), ROW));
        paint_cells(ui, header, &heading.map(|text| (text, ui.visuals().strong_text_color())));
        let mut scroll = ScrollArea::vertical().id_salt("words").auto_shrink(false);
        let token = cx.selection.token;
        let is_new_pair = self.scrolled.is_none_or(|(pair, _)| pair != numbers);
        if self.scrolled != Some((numbers, token)) {
            let to = if is_new_pair { parts.or(anew) } else { token.map(|token| token as usize) };
            let in_sight = |row: &usize| !is_new_pair && self.visible.contains(row);
            if let Some(row) = to.filter(|row| !in_sight(row)) {
                let pitch = ROW + ui.spacing().item_spacing.y;
                scroll = scroll.vertical_scroll_offset(row.saturating_sub(ABOVE) as f32 * pitch);
            }
            self.scrolled = Some((numbers, token));
        }
        let rows = a.tokens.len().max(b.tokens.len());
        scroll.show_rows(ui, ROW, rows, |ui, visible| {
            self.visible = visible.start + 1..visible.end.saturating_sub(2);
            for position in visible {
                let piece = |text: &Sequence| text.tokens.get(position).map(|token| word(cx.subject, token.id));
                let (of_a, of_b) = (piece(a), piece(b));
                let differ = a.tokens.get(position).map(|t| t.id) != b.tokens.get(position).map(|t| t.id);
                let value = map.get(layer, position).filter(|value| !value.is_nan());
                let difference = if differ { ", different" } else { "" };
                let name = |piece: &Option<String>| piece.clone().unwrap_or_else(|| "nothing".into());
                let label = format!("token {position}: A {}, B {}{difference}", name(&of_a), name(&of_b));
                let response = row(ui, token == Some(position as u32), &label, |ui, rect| {
                    let columns = columns(rect);
                    if differ {
                        let tint = kind(1).gamma_multiply(0.3);
                        ui.painter().rect_filled(columns[1].union(columns[2]).shrink(1.0), 2.0, tint);
                    }
                    let (text, weak) = (ui.visuals().text_color(), ui.visuals().weak_text_color());
                    let cells = [
                        (position.to_string(), weak),
                        (of_a.unwrap_or_default(), text),
                        (of_b.unwrap_or_default(), text),
                        (value.map_or_else(|| "–".to_owned(), number), weak),
                    ];
                    paint_cells(ui, rect, &cells);
                    let line = |colour: Color32| {
                        ui.painter().hline(rect.x_range(), rect.min.y - 1.0, Stroke::new(2.0, colour));
                    };
                    if parts == Some(position) {
                        line(kind(5));
                    } else if anew == Some(position) {
                        line(kind(4));
                    }
                });
                let about = match position {
                    _ if parts == Some(position) => "The first different word",
                    _ if anew == Some(position) => "From here on the text was written anew",
                    _ if differ => "Different words",
                    _ => "The same word in both texts",
                };
                let value =
                    value.map_or_else(|| "not held".to_owned(), |v| format!("{} {}", number(v), measure.distance()));
                if response.on_hover_text(format!("{about}\nlayer {layer}: {value}")).clicked() {
                    cx.selection.token = Some(position as u32);
                }
            }
        });
    }

    fn as_wholes(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, (a, b): (&Sequence, &Sequence), shown: &Shown) {
        let wholes = &shown.wholes;
        let layer = cx.selection.layer as usize;
        if wholes.divergence.iter().all(|bits| bits.is_nan()) {
            missing(ui, TapGroup::Routing);
            return;
        }
        let ui = &mut aside(ui, "experts that differ most", |ui| experts(ui, cx, &shown.differences));
        ui.horizontal_wrapped(|ui| {
            let held = |of: usize| wholes.held[of].get(layer).copied().unwrap_or(0);
            let bits = wholes.divergence.get(layer).copied().unwrap_or(f32::NAN);
            let bits = if bits.is_nan() { "no routing held".into() } else { format!("{} bits", number(bits)) };
            ui.label(RichText::new(format!("layer {layer}: {bits}")).strong()).on_hover_text(
                "Jensen–Shannon divergence of the two loads: 0 bits if both texts use the experts alike, 1 bit if they have \
                 no expert in common. Texts of few tokens differ by chance, too.",
            );
            ui.weak(format!(
                "from the routing of {} of {} tokens of A and {} of {} of B",
                held(0),
                a.tokens.len(),
                held(1),
                b.tokens.len()
            ));
        });
        let curve = Curve {
            name: "divergence of loads".into(),
            colour: kind(0),
            thin: false,
            points: points(wholes.divergence.iter().copied()),
        };
        over_layers(ui, cx, "divergence of loads by layer", "bits", 0.0, vec![curve]);
        let share = |of: usize, layer: usize, expert: usize| {
            let share = wholes.shares[of].get(layer * wholes.experts + expert).copied().filter(|share| !share.is_nan());
            share.map_or_else(|| "not held".to_owned(), percent)
        };
        let tooltip = |layer: usize, expert: usize| {
            format!("expert {layer}:{expert}\nA {}, B {}", share(0, layer, expert), share(1, layer, expert))
        };
        let spec = Spec {
            name: "share in B less share in A by layer and expert",
            row_axis: "layer",
            column_axis: "expert",
            unit: "share of choices in B less in A",
            scale: Scale::Diverging,
            row: Some(layer).filter(|layer| *layer < shown.shares.rows),
            column: cx.selection.expert.map(|expert| expert as usize).filter(|expert| *expert < wholes.experts),
            column_groups: cx.subject.experts_per_group() as usize,
            tooltip: &tooltip,
            height: (ui.available_height() - 64.0).max(60.0),
        };
        if let Some((layer, expert)) = self.shares.show(ui, &shown.shares, &spec).chosen {
            cx.selection.layer = layer as u32;
            cx.selection.expert = Some(expert as u32);
        }
    }
}

/// The experts that the texts use most differently.
fn experts(ui: &mut Ui, cx: &mut Cx<'_>, differences: &[Difference]) {
    let (strong, text) = (ui.visuals().strong_text_color(), ui.visuals().text_color());
    let (_, header) = ui.allocate_space(vec2(ui.available_width(), ROW));
    paint_cells(ui, header, &["expert", "share in A", "share in B", "B − A"].map(|name| (name.to_owned(), strong)));
    if differences.is_empty() {
        ui.weak("Both use all experts alike.");
    }
    ScrollArea::vertical().id_salt("experts").auto_shrink(false).show_rows(
        ui,
        ROW,
        differences.len(),
        |ui, visible| {
            for difference in &differences[visible] {
                let &Difference { layer, expert, a, b } = difference;
                let sign = if b > a { "+" } else { "−" };
                let cells =
                    [format!("{layer}:{expert}"), percent(a), percent(b), format!("{sign}{}", percent((b - a).abs()))];
                let is_selected = cx.selection.layer == layer && cx.selection.expert == Some(expert);
                let label = format!("expert {}: A {}, B {}", cells[0], cells[1], cells[2]);
                let response =
                    row(ui, is_selected, &label, |ui, rect| paint_cells(ui, rect, &cells.map(|cell| (cell, text))));
                if response.on_hover_text("Share of a text's choices in the layer that fell on the expert").clicked() {
                    cx.selection.layer = layer;
                    cx.selection.expert = Some(expert);
                }
            }
        },
    );
}

fn percent(share: f32) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn missing(ui: &mut Ui, group: TapGroup) {
    let (what, group) = match group {
        TapGroup::Hidden => ("hidden states", group.name()),
        _ => ("routing", group.name()),
    };
    ui.strong(format!("No {what} of the same tokens of both texts"));
    ui.label(format!(
        "It was not watched, or it had to go to stay within memory. Record or watch both texts with --taps {group}."
    ));
}

/// What a layer has over some positions, of which there are so many.
fn said(ui: &mut Ui, colour: Color32, when: &str, measure: Measure, summary: Option<&Summary>, positions: usize) {
    let Some(summary) = summary.filter(|_| positions > 0) else { return };
    let (mark, _) = ui.allocate_exact_size(vec2(10.0, 10.0), Sense::hover());
    ui.painter().circle_filled(mark.center(), 4.0, colour);
    let (farthest, which) = measure.farthest(summary);
    let text = match summary.held {
        0 => format!("{when}: nothing held of {positions} tokens"),
        held => {
            let numbers = format!("{when}: mean {}, {which} {}", number(summary.mean), number(farthest));
            let of = if held < positions { format!("{held} of {positions}") } else { held.to_string() };
            format!("{numbers}, {of} tokens")
        }
    };
    ui.label(text).on_hover_text(measure.about());
}
