//! How evenly the experts are used, and what replicas of the busiest would change.

mod placement;
mod report;
mod table;

use std::sync::Arc;

use egui::{Ui, vec2};

use crate::analysis::balance::{HOT, unused_by_chance};
use crate::analysis::eplb::Cluster;
use crate::bars::{Accent, Bars, whole_number};
use crate::colour::kind;
use crate::heat::{HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::view::{Cx, View};

use report::{Layer, Measure, Report, Snapshot};

/// The pages of the view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Page {
    #[default]
    Load,
    Layers,
    Placement,
}

/// What a report is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Key {
    loads: Option<(bool, u64)>,
    measure: Measure,
    cluster: Cluster,
}

/// The view of load and balance.
#[derive(Default)]
pub struct BalanceView {
    page: Page,
    measure: Measure,
    snapshot: Snapshot,
    report: Latest<Key, Arc<Report>>,
    map: HeatMap,
    table: table::Order,
    placement: placement::Controls,
}

impl View for BalanceView {
    fn name(&self) -> &'static str {
        "balance"
    }

    fn about(&self) -> &'static str {
        "How evenly tokens are spread over the experts of each layer, and what replicas of the busiest experts would change."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        if cx.moe_layers().is_empty() || cx.subject.model.experts == 0 {
            ui.weak("This model has no mixture-of-experts layers, so there is no load to balance.");
            return;
        }
        self.snapshot.refresh(cx.store, cx.subject);
        if self.snapshot.loads.is_empty() {
            self.report = Latest::default();
            ui.weak("No routing was recorded yet. Run a text with the tap group `routing` (--taps routing).");
            return;
        }
        let cluster = self.placement.cluster(cx.subject);
        let key = Key { loads: self.snapshot.of, measure: self.measure, cluster };
        let (loads, subject, measure) = (Arc::clone(&self.snapshot.loads), Arc::clone(cx.subject), self.measure);
        let make = move || Arc::new(report::report(&loads, &subject, measure, &cluster));
        let report = self.report.get(ui.ctx(), &key, make).cloned();
        self.header(ui, cx);
        let Some(report) = report else {
            ui.spinner();
            return;
        };
        ui.add_space(4.0);
        match self.page {
            Page::Load => self.load(ui, cx, &report),
            Page::Layers => table::show(ui, cx, &report, self.measure, &mut self.table),
            Page::Placement => self.placement.show(ui, cx, &report),
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        &["load", "layers", "placement"]
    }

    fn show_part(&mut self, part: usize) {
        self.page = [Page::Load, Page::Layers, Page::Placement].get(part).copied().unwrap_or_default();
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let cluster = self.placement.cluster(cx.subject);
        let report = report::report(&report::loads(cx.store, cx.subject), cx.subject, self.measure, &cluster);
        if report.layers.is_empty() {
            return Vec::new();
        }
        report::tables(&report, cx.subject, self.measure, &cluster)
    }

    fn is_busy(&self) -> bool {
        self.report.is_busy()
    }
}

impl BalanceView {
    fn header(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        ui.horizontal_wrapped(|ui| {
            let pages = [
                (Page::Load, "Load", "How much each expert got"),
                (Page::Layers, "Layers", "Measures of balance for each layer, to sort"),
                (Page::Placement, "Placement", "What replicas of the busiest experts would change on several GPUs"),
            ];
            for (page, name, about) in pages {
                ui.selectable_value(&mut self.page, page, name).on_hover_text(about);
            }
            ui.separator();
            layer_chooser(ui, cx, &self.snapshot.loads.iter().map(|(layer, _)| *layer).collect::<Vec<_>>());
            if self.page != Page::Placement {
                ui.separator();
                let label = ui.label("load in");
                egui::ComboBox::from_id_salt("measure")
                    .selected_text(self.measure.unit())
                    .show_ui(ui, |ui| {
                        for measure in [Measure::Tokens, Measure::Weights] {
                            ui.selectable_value(&mut self.measure, measure, measure.unit());
                        }
                    })
                    .response
                    .labelled_by(label.id)
                    .on_hover_text(
                        "Tokens: how many an expert was given, which is what takes time. Summed weight: how much it \
                         counted in the layer's result.",
                    );
            }
        });
        let seen = |(_, load): &(u32, crate::store::Load)| load.tokens.iter().sum::<u64>();
        let most = self.snapshot.loads.iter().map(seen).max().unwrap_or(0);
        let tokens = most / u64::from(cx.subject.model.num_experts_per_tok.max(1));
        let mut line = format!("{tokens} tokens of all texts");
        let (have, all) = (self.snapshot.loads.len(), cx.moe_layers().len());
        if have < all {
            line += &format!("; routing was recorded for {have} of {all} layers with experts");
        }
        let (_, dropped) = cx.store.lost();
        if dropped > 0 {
            line += &format!("; {dropped} frames were dropped and are not counted");
        }
        ui.weak(line)
            .on_hover_text("Running totals since the start; rows that had to go to spare memory stay counted.");
    }

    fn load(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, report: &Report) {
        let room = ui.available_height();
        let tooltip = |layer: usize, expert: usize| match report.layer(layer as u32) {
            Some(found) => expert_line(found, expert, self.measure),
            None => format!("layer {layer}: no routing"),
        };
        let spec = Spec {
            name: "load by layer and expert",
            row_axis: "layer",
            column_axis: "expert",
            unit: "× the layer's mean load (1 = its fair share)",
            scale: Scale::Sequential(cx.palette),
            row: Some(cx.selection.layer as usize),
            column: cx.selection.expert.map(|expert| expert as usize),
            column_groups: if cx.subject.model.n_group > 1 { cx.subject.experts_per_group() as usize } else { 0 },
            tooltip: &tooltip,
            height: (room - 330.0).max(80.0),
        };
        if let Some((layer, expert)) = self.map.show(ui, &report.map, &spec).chosen {
            cx.selection.layer = layer as u32;
            cx.selection.expert = Some(expert as u32);
        }
        ui.add_space(6.0);
        let Some(layer) = report.layer(cx.selection.layer) else {
            ui.weak(format!("No routing of layer {}: choose another layer above.", cx.selection.layer));
            return;
        };
        summary(ui, cx, layer);
        self.charts(ui, cx, layer);
    }

    fn charts(&self, ui: &mut Ui, cx: &mut Cx<'_>, layer: &Layer) {
        let height = (ui.available_height() - 22.0).clamp(120.0, 420.0);
        let mean = layer.loads.iter().sum::<f64>() / layer.loads.len() as f64;
        let is_hot = |expert: usize| layer.loads[expert] > HOT * mean;
        let of_expert = |expert: usize| expert_line(layer, expert, self.measure);
        ui.horizontal_top(|ui| {
            let has_groups = layer.groups.len() > 1;
            let width = ui.available_width() * if has_groups { 0.72 } else { 1.0 } - 8.0;
            let bars = Bars {
                name: &format!("load by expert, layer {}", layer.number),
                axis: "expert",
                unit: self.measure.unit(),
                series: &[("expert", kind(0), &layer.loads)],
                accent: Some(Accent { name: "hot expert", colour: kind(1), is: &is_hot }),
                lines: &[("mean", mean), ("twice the mean", HOT * mean)],
                marked: cx.selection.expert.map(|expert| expert as usize),
                tooltip: &of_expert,
                size: vec2(width, height),
            };
            let chosen = ui.vertical(|ui| bars.show(ui)).inner;
            if let Some(expert) = chosen {
                cx.selection.expert = Some(expert as u32);
            }
            if has_groups {
                let per_group = cx.subject.experts_per_group() as usize;
                let total: f64 = layer.groups.iter().sum();
                let of_group = |group: usize| {
                    let share = 100.0 * layer.groups[group] / total.max(f64::MIN_POSITIVE);
                    let (first, last) = (group * per_group, (group + 1) * per_group - 1);
                    format!("group {group}, experts {first} to {last}: {share:.1} % of the load")
                };
                let fair = total / layer.groups.len() as f64;
                let selected = cx.selection.expert.map(|expert| expert as usize / per_group);
                let bars = Bars {
                    name: &format!("load by group, layer {}", layer.number),
                    axis: "group of experts",
                    unit: "",
                    series: &[("group", kind(2), &layer.groups)],
                    accent: None,
                    lines: &[("mean", fair)],
                    marked: selected,
                    tooltip: &of_group,
                    size: vec2(ui.available_width(), height),
                };
                let chosen = ui.vertical(|ui| bars.show(ui)).inner;
                if let Some(group) = chosen.filter(|group| Some(*group) != selected) {
                    cx.selection.expert = Some((group * per_group) as u32);
                }
            }
        });
    }
}

/// The layer's measures in a line.
fn summary(ui: &mut Ui, cx: &Cx<'_>, layer: &Layer) {
    let Some(balance) = &layer.balance else {
        ui.weak(format!("Layer {} has no load yet.", layer.number));
        return;
    };
    let experts = layer.loads.len();
    let seen = layer.seen(cx.subject.model.num_experts_per_tok);
    let chance = unused_by_chance(experts, cx.subject.model.num_experts_per_tok as usize, seen as f64);
    ui.horizontal_wrapped(|ui| {
        ui.strong(format!("layer {}", layer.number));
        ui.label(format!("balancedness {:.2}", balance.balancedness)).on_hover_text(BALANCEDNESS);
        ui.weak("·");
        let bits = (experts as f64).log2();
        let share = 100.0 * balance.entropy_share;
        ui.label(format!("entropy {:.2} of {bits:.2} bits ({share:.0} %)", balance.entropy_bits))
            .on_hover_text(ENTROPY);
        ui.weak("·");
        ui.label(format!("busiest tenth gets {:.0} %", 100.0 * balance.top_share)).on_hover_text(TOP_TENTH);
        ui.weak("·");
        ui.label(format!("{} hot", balance.hot.len())).on_hover_text(HOT_EXPERTS);
        ui.weak("·");
        ui.label(format!("{} of {experts} never used in {seen} tokens", balance.dead.len())).on_hover_text(format!(
            "{DEAD} An even router would have left {} unused by chance so far.",
            number(chance as f32)
        ));
    });
}

const BALANCEDNESS: &str = "Mean load over the largest load: 1 if all experts get the same; 0.25 if the busiest gets four \
                            times its fair share.";
const ENTROPY: &str = "How spread out the load is: at its most if all experts get the same, 0 if one gets everything.";
const TOP_TENTH: &str =
    "The share of all load that the busiest tenth of the experts gets; a tenth if the load is even.";
const GINI: &str =
    "Gini coefficient, a measure of inequality: 0 if all experts get the same, near 1 if one gets everything.";
const HOT_EXPERTS: &str = "Experts that got more than twice the mean.";
const DEAD: &str = "Experts that no token was given to. It means little after few tokens.";

fn expert_line(layer: &Layer, expert: usize, measure: Measure) -> String {
    let mean = layer.loads.iter().sum::<f64>() / layer.loads.len() as f64;
    let (load, tokens) = (layer.loads[expert], layer.tokens[expert]);
    let times = if mean > 0.0 { load / mean } else { 0.0 };
    let weight = if measure == Measure::Weights { format!(", summed weight {load:.2}") } else { String::new() };
    format!("layer {}, expert {expert}: {tokens} tokens{weight}, {times:.2} × the mean", layer.number)
}

/// A stepper over the layers that have something to show.
fn layer_chooser(ui: &mut Ui, cx: &mut Cx<'_>, layers: &[u32]) {
    let (Some(first), Some(last)) = (layers.first(), layers.last()) else { return };
    let label = ui.label("layer");
    let mut layer = cx.selection.layer;
    let drag = whole_number(ui, &mut layer, *first..=*last);
    let response = ui.add(drag).labelled_by(label.id);
    if response.on_hover_text("Drag, type, or use the arrow keys.").changed() {
        cx.selection.layer = layer;
    }
}
