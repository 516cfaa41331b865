//! What replicas of the busiest experts over several GPUs would change.

use egui::{Ui, vec2};
use egui_plot::{Line, Points};

use crate::analysis::eplb::Cluster;
use crate::bars::{Bars, still, swatches, whole_number};
use crate::colour::kind;
use crate::heat::{Grid, HeatMap, Scale, Spec};
use crate::subject::Subject;
use crate::view::Cx;

use super::report::{Layer, Placed, Report};

/// GPUs, nodes and replicas, as the user chose them.
#[derive(Default)]
pub(super) struct Controls {
    gpus: Option<usize>,
    nodes: Option<usize>,
    redundant: Option<usize>,
    slots: HeatMap,
    /// The slots' map, and what it was made of.
    drawn: Option<((u32, Vec<f64>), Grid)>,
}

impl Controls {
    /// The cluster that was chosen. The replicas are rounded up so that each GPU gets equally many.
    pub(super) fn cluster(&self, subject: &Subject) -> Cluster {
        let (experts, gpus) = (subject.model.experts as usize, self.gpus.unwrap_or(8));
        let redundant = self.redundant.unwrap_or(experts / 8);
        Cluster {
            gpus,
            nodes: self.nodes.unwrap_or(1),
            groups: subject.model.n_group as usize,
            replicas: (experts + redundant).div_ceil(gpus) * gpus,
        }
    }

    fn controls(&mut self, ui: &mut Ui, cx: &Cx<'_>) {
        let cluster = self.cluster(cx.subject);
        let experts = cx.subject.model.experts as usize;
        let redundant = self.redundant.unwrap_or(experts / 8);
        ui.horizontal_wrapped(|ui| {
            let mut step = |name: &str, value: usize, range: std::ops::RangeInclusive<usize>, about: &str| {
                let label = ui.label(name);
                let mut changed = value;
                let drag = whole_number(ui, &mut changed, range);
                ui.add(drag).labelled_by(label.id).on_hover_text(about);
                (changed != value).then_some(changed)
            };
            let gpus = step("GPUs", cluster.gpus, 1..=1024, "GPUs that a layer's experts are spread over.");
            let nodes = step(
                "nodes",
                cluster.nodes,
                1..=128,
                "Machines that the GPUs stand in. Groups of experts stay on one node if they can be shared out evenly.",
            );
            let more = step(
                "redundant experts",
                redundant,
                0..=experts * 4,
                "Slots for second, third … copies of busy experts. Rounded up so that all GPUs hold equally many.",
            );
            self.gpus = gpus.or(self.gpus);
            self.nodes = nodes.or(self.nodes);
            self.redundant = more.or(self.redundant);
            let copies = cluster.replicas - experts;
            ui.weak(format!(
                "{} slots on each GPU; {copies} of all slots are for copies",
                cluster.replicas / cluster.gpus
            ));
        });
    }

    /// Draws the page.
    pub(super) fn show(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, report: &Report) {
        self.controls(ui, cx);
        if let Some(Err(error)) = report.layers.first().map(|layer| &layer.placed) {
            ui.add_space(8.0);
            ui.colored_label(ui.visuals().warn_fg_color, format!("{error}. Change GPUs or nodes."));
            return;
        }
        balancedness(ui, cx, report);
        let Some(layer) = report.layer(cx.selection.layer) else {
            ui.weak(format!("No routing of layer {}: choose another layer above.", cx.selection.layer));
            return;
        };
        let Ok(placed) = &layer.placed else { return };
        let largest = |loads: &[f64]| loads.iter().copied().fold(0.0, f64::max);
        ui.horizontal_wrapped(|ui| {
            ui.strong(format!("layer {}", layer.number));
            ui.label(format!(
                "balancedness over GPUs {:.2} before, {:.2} after; the busiest GPU has {:.0} tokens before, {:.0} after",
                layer.balancedness_before(),
                layer.balancedness_after().unwrap_or(f64::NAN),
                largest(&layer.before),
                largest(&placed.gpus),
            ))
            .on_hover_text(ABOUT);
        });
        gpu_loads(ui, layer, placed);
        self.slots(ui, cx, layer, placed);
        copies(ui, cx, placed);
    }

    fn slots(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, layer: &Layer, placed: &Placed) {
        let (gpus, count) = (placed.gpus.len(), placed.slots.len());
        let per_gpu = count / gpus;
        // Transposed, so that a GPU's slots stand below its bar.
        let slot = |row: usize, gpu: usize| gpu * per_gpu + row;
        let of = (layer.number, placed.slots.clone());
        if self.drawn.as_ref().is_none_or(|(drawn, _)| *drawn != of) {
            let cells = (0..count).map(|at| placed.slots[slot(at / gpus, at % gpus)] as f32).collect();
            self.drawn = Some((of, Grid::from_zero(per_gpu, gpus, cells)));
        }
        let Some((_, grid)) = &self.drawn else { return };
        let expert = |row: usize, gpu: usize| placed.placement.phy2log[slot(row, gpu)];
        let tooltip = |row: usize, gpu: usize| {
            let (expert, at) = (expert(row, gpu), slot(row, gpu));
            let copies = placed.placement.counts[expert as usize];
            let rank = placed.placement.rank[at] + 1;
            let tokens = placed.slots[at];
            format!("GPU {gpu}, slot {row}: expert {expert}, copy {rank} of {copies}, {tokens:.0} tokens")
        };
        let held = cx.selection.expert.and_then(|expert| placed.placement.phy2log.iter().position(|&e| e == expert));
        let spec = Spec {
            name: &format!("slots of the GPUs, layer {}", layer.number),
            row_axis: "slot",
            column_axis: "GPU",
            unit: "tokens of a slot (copies share their expert's tokens evenly)",
            scale: Scale::Sequential(cx.palette),
            row: held.map(|slot| slot % per_gpu),
            column: held.map(|slot| slot / per_gpu),
            column_groups: 0,
            tooltip: &tooltip,
            height: (ui.available_height() - 112.0).clamp(60.0, 240.0),
        };
        if let Some((row, gpu)) = self.slots.show(ui, grid, &spec).chosen {
            cx.selection.expert = Some(expert(row, gpu));
        }
    }
}

/// Buttons of experts with copies.
const LISTED: usize = 20;

const ABOUT: &str = "Mean load over the largest load of a GPU: all wait for the busiest one. Before: consecutive experts on \
                     each GPU, no copies. After: DeepSeek's EPLB, computed from the tokens seen so far, as if the same \
                     load came again.";

/// Balancedness of all layers before and after.
fn balancedness(ui: &mut Ui, cx: &mut Cx<'_>, report: &Report) {
    let before: Vec<[f64; 2]> =
        report.layers.iter().map(|layer| [f64::from(layer.number), layer.balancedness_before()]).collect();
    let after: Vec<[f64; 2]> =
        report.layers.iter().filter_map(|layer| Some([f64::from(layer.number), layer.balancedness_after()?])).collect();
    let mean = |points: &[[f64; 2]]| points.iter().map(|point| point[1]).sum::<f64>() / points.len().max(1) as f64;
    let least = |points: &[[f64; 2]]| points.iter().map(|point| point[1]).fold(1.0, f64::min);
    ui.label(format!(
        "All layers: balancedness over GPUs {:.2} before, {:.2} after (mean); {:.2} before, {:.2} after (worst layer)",
        mean(&before),
        mean(&after),
        least(&before),
        least(&after)
    ))
    .on_hover_text(ABOUT);
    swatches(ui, &[("before: consecutive experts on each GPU, no copies", kind(5)), ("after: EPLB", kind(2))], &[]);
    let height = (ui.available_height() * 0.24).clamp(90.0, 160.0);
    let selected = f64::from(cx.selection.layer);
    let mark = ui.visuals().weak_text_color();
    let plot = still("balancedness by layer", "layer", "mean / max").height(height).include_y(0.0).include_y(1.0);
    let inner = plot.show(ui, |plot| {
        plot.vline(egui_plot::VLine::new("", selected).color(mark).width(1.0).allow_hover(false));
        for (name, colour, points) in [("after: EPLB", kind(2), &after), ("before: consecutive", kind(5), &before)] {
            plot.line(Line::new(name, points.clone()).color(colour).width(1.5).allow_hover(false));
            plot.points(Points::new(name, points.clone()).color(colour).radius(2.5).allow_hover(false));
        }
    });
    let response = inner.response;
    let layer_at = |at: egui::Pos2| {
        let x = inner.transform.value_from_position(at).x;
        report.layers.iter().min_by(|a, b| (f64::from(a.number) - x).abs().total_cmp(&(f64::from(b.number) - x).abs()))
    };
    response.widget_info(|| {
        egui::WidgetInfo::labeled(egui::Role::Image, true, "balancedness over GPUs by layer, before and after")
    });
    if response.clicked()
        && let Some(layer) = response.interact_pointer_pos().and_then(layer_at)
    {
        cx.selection.layer = layer.number;
    }
    if let Some(layer) = response.hover_pos().and_then(layer_at) {
        response.on_hover_text_at_pointer(format!(
            "layer {}: {:.2} before, {:.2} after",
            layer.number,
            layer.balancedness_before(),
            layer.balancedness_after().unwrap_or(f64::NAN)
        ));
    }
}

/// Load of each GPU before and after.
fn gpu_loads(ui: &mut Ui, layer: &Layer, placed: &Placed) {
    let mean = placed.gpus.iter().sum::<f64>() / placed.gpus.len() as f64;
    let tooltip = |gpu: usize| {
        let (before, after) = (layer.before[gpu], placed.gpus[gpu]);
        format!("GPU {gpu}: {before:.0} tokens before, {after:.0} after; mean {mean:.0}")
    };
    let _ = Bars {
        name: &format!("load of the GPUs, layer {}", layer.number),
        axis: "GPU",
        unit: "tokens",
        series: &[("before", kind(5), &layer.before), ("after", kind(2), &placed.gpus)],
        accent: None,
        lines: &[("mean", mean)],
        marked: None,
        tooltip: &tooltip,
        size: vec2(ui.available_width(), (ui.available_height() * 0.32).clamp(90.0, 160.0)),
    }
    .show(ui);
}

/// The experts with more than one copy, as buttons.
fn copies(ui: &mut Ui, cx: &mut Cx<'_>, placed: &Placed) {
    let mut copied: Vec<(u32, u32)> =
        (0u32..).zip(placed.placement.counts.iter().copied()).filter(|(_, count)| *count > 1).collect();
    copied.sort_by_key(|&(expert, count)| (std::cmp::Reverse(count), expert));
    ui.horizontal_wrapped(|ui| {
        ui.label(format!("{} experts have copies:", copied.len()));
        for (expert, count) in copied.iter().take(LISTED) {
            let selected = cx.selection.expert == Some(*expert);
            let text = format!("{expert} ×{count}");
            let about = format!("Expert {expert} has {count} copies. Click to select it.");
            if ui.selectable_label(selected, text).on_hover_text(about).clicked() {
                cx.selection.expert = Some(*expert);
            }
        }
        if copied.len() > LISTED {
            ui.weak(format!("and {} more", copied.len() - LISTED));
        }
    });
}
