//! Where the time of runs goes.

use std::sync::Arc;

use egui::{Color32, Ui};
use egui_plot::{Legend, Plot, PlotPoints, Points};

use crate::analysis::times::{self, Amount, Medians, Pass, Total};
use crate::colour::kind;
use crate::heat::{Grid, HeatMap, Scale, Spec, number};
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::store::{Run, Store};
use crate::subject::Subject;
use crate::tally::{self, Bar, Widths};
use crate::view::{Cx, View};

use super::timeline::{Timeline, duration};

/// How many of the last runs medians may be taken over.
const LAST: [usize; 4] = [16, 64, 256, 4096];
/// While a text is being written, numbers are taken anew every so many runs.
const STRIDE: u64 = 16;

/// Durations of steps against the least that moving their bytes takes.
#[derive(Default)]
pub struct Time {
    mode: Mode,
    pass: Option<Pass>,
    last: Last,
    cell: Cell,
    found: Latest<FoundKey, Found>,
    heat: HeatMap,
    run: Option<u64>,
    timeline: Timeline,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Kernels,
    Layers,
    Run,
    History,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Last(usize);

impl Default for Last {
    fn default() -> Self {
        Self(64)
    }
}

/// What a cell of the map shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Cell {
    #[default]
    Duration,
    OverFloor,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct FoundKey {
    pass: Option<Pass>,
    last: Last,
    cell: Cell,
    newest: u64,
    runs: usize,
}

/// What the runs say.
struct Found {
    /// Runs of each pass, and those whose program is not known.
    counts: [usize; 4],
    pass: Pass,
    medians: Medians,
    layers: Vec<Option<u32>>,
    grid: Grid,
    history: Vec<Total>,
}

fn find(runs: &[Arc<Run>], subject: &Subject, key: FoundKey) -> Found {
    let history: Vec<Total> = runs.iter().filter_map(|run| times::total(run, subject)).collect();
    let mut counts = Pass::ALL.map(|pass| history.iter().filter(|total| total.pass == pass).count()).to_vec();
    counts.push(runs.len() - history.len());
    let counts: [usize; 4] = counts.try_into().unwrap_or_default();
    let default = [Pass::Decode, Pass::Prefill, Pass::Draft].into_iter().find(|pass| counts[*pass as usize] > 0);
    let pass = key.pass.or(default).unwrap_or_default();
    let mut last: Vec<Arc<Run>> =
        runs.iter().rev().filter(|run| Pass::of(run, subject) == Some(pass)).take(key.last.0).cloned().collect();
    last.reverse();
    let medians = times::medians(&last, subject);
    let mut layers: Vec<Option<u32>> = medians.cells.keys().map(|(layer, _)| *layer).collect();
    layers.dedup();
    layers.sort_by_key(|layer| layer.unwrap_or(u32::MAX));
    let kernels = medians.kernels.len();
    let cell = |layer: Option<u32>, kernel: usize| {
        medians.cells.get(&(layer, kernel)).map_or(f32::NAN, |amount| match key.cell {
            Cell::Duration => (amount.seconds * 1e6) as f32,
            Cell::OverFloor => over_floor(amount, subject).unwrap_or(f64::NAN) as f32,
        })
    };
    let cells = layers.iter().flat_map(|&layer| (0..kernels).map(move |kernel| (layer, kernel)));
    let grid = Grid::from_zero(layers.len(), kernels, cells.map(|(layer, kernel)| cell(layer, kernel)).collect());
    Found { counts, pass, medians, layers, grid, history }
}

/// The least time that moving the bytes takes.
fn floor(amount: &Amount, subject: &Subject) -> Option<f64> {
    subject.bytes_per_second.filter(|speed| *speed > 0.0).map(|speed| amount.bytes / speed)
}

fn over_floor(amount: &Amount, subject: &Subject) -> Option<f64> {
    floor(amount, subject).filter(|floor| *floor > 0.0).map(|floor| amount.seconds / floor)
}

fn size(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = if bytes >= 1.0 { (bytes.log2() / 10.0) as usize } else { 0 }.min(units.len() - 1);
    format!("{} {}", number((bytes / 1024f64.powi(power as i32)) as f32), units[power])
}

fn times_floor(amount: &Amount, subject: &Subject) -> String {
    over_floor(amount, subject).map_or("–".into(), |ratio| format!("{} × floor", number(ratio as f32)))
}

fn is_running(store: &Store) -> bool {
    store.sequences().iter().any(|sequence| sequence.running)
}

impl View for Time {
    fn name(&self) -> &'static str {
        "time"
    }

    fn about(&self) -> &'static str {
        "How long each kernel takes on the device, against the least time that moving its bytes takes."
    }

    fn ui(&mut self, ui: &mut Ui, cx: &mut Cx<'_>) {
        let Some(newest) = cx.store.runs().back().map(|run| run.number) else {
            ui.label("No times were recorded: record with --taps timing");
            ui.weak(
                "If that was done, the device has no timestamps: it cannot say how long its steps take. Another device or \
                 driver may.",
            );
            return;
        };
        let newest = if is_running(cx.store) { newest / STRIDE } else { newest };
        let runs = if is_running(cx.store) { 0 } else { cx.store.runs().len() };
        let key = FoundKey { pass: self.pass, last: self.last, cell: self.cell, newest, runs };
        let found = self.found.get_prepared(ui.ctx(), &key, || {
            let runs: Vec<Arc<Run>> = cx.store.runs().iter().cloned().collect();
            let subject = Arc::clone(cx.subject);
            move || find(&runs, &subject, key)
        });
        let Some(found) = found else {
            ui.horizontal(|ui| {
                ui.spinner();
                ui.weak("adding up the steps of all runs");
            });
            return;
        };
        let (mut mode, mut pass, mut last) = (self.mode, self.pass, self.last);
        header(ui, found, &mut mode, &mut pass, &mut last);
        if found.counts[3] > 0 {
            let text = format!("{} runs are left out: their program's steps are not known.", found.counts[3]);
            ui.colored_label(ui.visuals().warn_fg_color, text);
        }
        if found.medians.runs == 0 {
            ui.label(format!("No {} run was timed yet.", found.pass.name()));
        } else {
            match self.mode {
                Mode::Kernels => {
                    summary(ui, cx, found);
                    kernels(ui, cx, &found.medians);
                }
                Mode::Layers => {
                    summary(ui, cx, found);
                    layers(ui, cx, found, &mut self.cell, &mut self.heat);
                }
                Mode::Run => one_run(ui, cx, found, &mut self.run, &mut self.timeline),
                Mode::History => history(ui, cx, found),
            }
        }
        (self.mode, self.pass, self.last) = (mode, pass, last);
    }

    fn parts(&self) -> &'static [&'static str] {
        &["kernels", "layers", "run", "history"]
    }

    fn show_part(&mut self, part: usize) {
        self.mode = [Mode::Kernels, Mode::Layers, Mode::Run, Mode::History].get(part).copied().unwrap_or_default();
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let runs: Vec<Arc<Run>> = cx.store.runs().iter().cloned().collect();
        if runs.is_empty() {
            return Vec::new();
        }
        let key = FoundKey { pass: self.pass, last: self.last, cell: Cell::Duration, newest: 0, runs: 0 };
        let found = find(&runs, cx.subject, key);
        let medians = &found.medians;
        let pass = found.pass.name();
        let name = |of: &str| format!("time.{pass}.{of}");
        let kernels = [("kernel", medians.kernels.len())];
        let of_kernels = |what: &str, of: &dyn Fn(&Amount) -> f64| {
            Table::floats(name(what), &kernels, medians.kernels.iter().map(|(_, amount)| of(amount) as f32).collect())
        };
        let floor = |amount: &Amount| floor(amount, cx.subject).unwrap_or(f64::NAN);
        let cells = [("layer", found.layers.len()), ("kernel", medians.kernels.len())];
        let of_cells = |what: &str, of: &dyn Fn(&Amount) -> f64| {
            let at = |layer: Option<u32>, kernel| medians.cells.get(&(layer, kernel)).map_or(f64::NAN, of) as f32;
            let numbers = found.layers.iter().flat_map(|&layer| (0..medians.kernels.len()).map(move |k| at(layer, k)));
            Table::floats(name(what), &cells, numbers.collect())
        };
        let history = [("run", found.history.len())];
        let of_runs = |what: &str, of: &dyn Fn(&Total) -> f64| {
            Table::floats(
                format!("time.runs.{what}"),
                &history,
                found.history.iter().map(|run| of(run) as f32).collect(),
            )
        };
        let names = medians.kernels.iter().map(|(name, _)| name.clone()).collect();
        let layers = found.layers.iter().map(|layer| layer.map_or(-1, i64::from)).collect();
        let passes = found.history.iter().map(|run| run.pass.name().to_owned()).collect();
        let numbers = found.history.iter().map(|run| run.number as i64).collect();
        vec![
            Table::integers(name("median_over_runs"), &[("count", 1)], vec![medians.runs as i64]),
            Table::words(name("kernels"), "kernel", names),
            of_kernels("kernel_seconds", &|amount| amount.seconds),
            of_kernels("kernel_bytes", &|amount| amount.bytes),
            of_kernels("kernel_floor_seconds", &floor),
            of_kernels("kernel_dispatches", &|amount| amount.dispatches as f64),
            Table::integers(name("layers"), &[("layer", found.layers.len())], layers),
            of_cells("layer_seconds", &|amount| amount.seconds),
            of_cells("layer_floor_seconds", &floor),
            Table::integers("time.runs.number", &history, numbers),
            Table::words("time.runs.pass", "run", passes),
            of_runs("seconds", &|run| run.span),
            of_runs("gap_seconds", &Total::gaps),
            of_runs("floor_seconds", &|run| floor(&run.all)),
            of_runs("tokens", &|run| run.tokens as f64),
            of_runs("dispatches", &|run| run.all.dispatches as f64),
        ]
    }

    fn is_busy(&self) -> bool {
        self.found.is_busy()
    }
}

fn header(ui: &mut Ui, found: &Found, mode: &mut Mode, pass: &mut Option<Pass>, last: &mut Last) {
    ui.horizontal_wrapped(|ui| {
        for (of, name, hint) in [
            (Mode::Kernels, "kernels", "Each kernel's time in a run, against its floor"),
            (Mode::Layers, "layers", "Every layer and kernel as a map"),
            (Mode::Run, "one run", "The steps of one run, one behind the other, with the gaps between them"),
            (Mode::History, "history", "Every run over time"),
        ] {
            ui.selectable_value(mode, of, name).on_hover_text(hint);
        }
        ui.separator();
        for (index, (of, hint)) in Pass::ALL
            .into_iter()
            .zip([
                "Runs that read a prompt or a part of one",
                "Runs that draw one token for each that they read",
                "Runs of a module of multi-token prediction",
            ])
            .enumerate()
        {
            let text = format!("{} ({})", of.name(), found.counts[index]);
            if ui.selectable_label(found.pass == of, text).on_hover_text(hint).clicked() {
                *pass = Some(of);
            }
        }
        ui.separator();
        let label =
            ui.label("median of the last").on_hover_text("The middle one of so many runs: outliers do not count.");
        let name = |count: usize| if count == 4096 { "all".to_owned() } else { count.to_string() };
        let shown = egui::ComboBox::from_id_salt("last runs").width(56.0).selected_text(name(last.0));
        let answer = shown.show_ui(ui, |ui| {
            for count in LAST {
                ui.selectable_value(&mut last.0, count, name(count));
            }
        });
        answer.response.labelled_by(label.id);
    });
}

fn counted_tokens(tokens: f64) -> String {
    if (tokens - 1.0).abs() < f64::EPSILON { "1 token".into() } else { format!("{} tokens", number(tokens as f32)) }
}

/// The run in a sentence or two.
fn summary(ui: &mut Ui, cx: &Cx<'_>, found: &Found) {
    let Medians { runs, span, gaps, tokens, rows, all, .. } = &found.medians;
    let (counted, what) = if found.pass == Pass::Prefill { (*tokens, "tokens read") } else { (*rows, "tokens drawn") };
    let rate = if *span > 0.0 { format!("{} {what} a second", number((counted / span) as f32)) } else { String::new() };
    let share = if *span > 0.0 { number((100.0 * gaps / span) as f32) } else { "0".into() };
    let floor = match floor(&all.clone(), cx.subject) {
        Some(floor) => format!("floor {} ({})", duration(floor), times_floor(all, cx.subject)),
        None => "no floor: the device's speed was not measured".to_owned(),
    };
    let runs = if *runs == 1 { "One run".to_owned() } else { format!("Median of the last {runs} runs") };
    ui.label(format!(
        "{runs}: {} of {}, {} dispatches, {share} % gaps between them; {floor}; {rate} by the device's clock.",
        duration(*span),
        counted_tokens(*tokens),
        all.dispatches,
    ))
    .on_hover_text(
        "The floor is the time in which the device copies as many bytes as the run moves: what reads them from \
         memory cannot be faster, what finds them in a cache may be. Times are the device's own; waiting for the host between runs is not in them.",
    );
}

fn kernels(ui: &mut Ui, cx: &Cx<'_>, medians: &Medians) {
    let most = medians.kernels.iter().map(|(_, amount)| amount.seconds).fold(1e-12, f64::max);
    let most = medians.kernels.iter().filter_map(|(_, amount)| floor(amount, cx.subject)).fold(most, f64::max);
    let bars: Vec<Bar> = medians
        .kernels
        .iter()
        .map(|(kernel, amount)| {
            let floor = floor(amount, cx.subject);
            let share = 100.0 * amount.seconds / medians.all.seconds.max(1e-12);
            let said = floor.map_or("no floor".into(), |floor| format!("floor {}", duration(floor)));
            Bar {
                label: format!("{kernel} × {}", amount.dispatches),
                value: (amount.seconds / most) as f32,
                mark: floor.map(|floor| (floor / most) as f32),
                text: format!(
                    "{} ({} %)   {}",
                    duration(amount.seconds),
                    number(share.round() as f32),
                    times_floor(amount, cx.subject)
                ),
                hint: format!(
                    "{kernel}: {} dispatches a run, {} together, {} moved, {said}",
                    amount.dispatches,
                    duration(amount.seconds),
                    size(amount.bytes)
                ),
            }
        })
        .collect();
    ui.add_space(4.0);
    ui.weak("kernel × dispatches; bar: time in a run; line: floor; then share of the run, and time over floor");
    let colour = accent(ui);
    let area = egui::ScrollArea::vertical().id_salt("kernels").auto_shrink([false, false]);
    area.show(ui, |ui| {
        let widths = Widths { label: 190.0, text: 210.0 };
        tally::show(ui, "kernel", &bars, widths, colour, false);
    });
}

fn layers(ui: &mut Ui, cx: &mut Cx<'_>, found: &Found, cell: &mut Cell, heat: &mut HeatMap) {
    ui.horizontal(|ui| {
        ui.selectable_value(cell, Cell::Duration, "time").on_hover_text("Time of the kernel's steps in the layer");
        let hint = "How many times the floor that is: 1 cannot be beaten by reading the same bytes";
        ui.add_enabled_ui(cx.subject.bytes_per_second.is_some(), |ui| {
            ui.selectable_value(cell, Cell::OverFloor, "time over floor").on_hover_text(hint);
        });
    });
    let kernel = |index: usize| found.medians.kernels.get(index).map_or("", |(name, _)| name.as_str());
    let layer = |row: usize| match found.layers.get(row).copied().flatten() {
        Some(layer) => format!("layer {layer}"),
        None => "outside of layers".into(),
    };
    let tooltip = |row: usize, column: usize| {
        let amount = found.layers.get(row).and_then(|layer| found.medians.cells.get(&(*layer, column)));
        let what = format!("{}, {}", layer(row), kernel(column));
        let Some(amount) = amount else { return format!("{what}: none there") };
        let floor = floor(amount, cx.subject).map_or("no floor".into(), |f| format!("floor {}", duration(f)));
        format!(
            "{what}: {} in {} dispatches\n{} moved, {floor}, {}",
            duration(amount.seconds),
            amount.dispatches,
            size(amount.bytes),
            times_floor(amount, cx.subject)
        )
    };
    let names: Vec<String> = (0..found.grid.columns).map(|index| format!("{index} {}", kernel(index))).collect();
    let has_others = found.layers.last().is_some_and(Option::is_none);
    let in_order = found.layers.iter().flatten().enumerate().all(|(row, layer)| row as u32 == *layer);
    let spec = Spec {
        name: "time by layer and kernel",
        row_axis: match (in_order, has_others) {
            (true, true) => "layer; last: outside",
            (true, false) => "layer",
            (false, _) => "recorded layer, counted",
        },
        column_axis: "kernel",
        unit: if *cell == Cell::Duration { "µs in a run" } else { "times the floor" },
        scale: Scale::Sequential(cx.palette),
        row: found.layers.iter().position(|layer| *layer == Some(cx.selection.layer)),
        column: None,
        column_groups: 0,
        tooltip: &tooltip,
        height: (ui.available_height() - 130.0).max(120.0),
    };
    if let Some((row, _)) = heat.show(ui, &found.grid, &spec).chosen
        && let Some(layer) = found.layers[row]
    {
        cx.selection.layer = layer;
    }
    ui.weak(format!("Kernels: {}", names.join(", ")));
}

fn one_run(ui: &mut Ui, cx: &mut Cx<'_>, found: &Found, chosen: &mut Option<u64>, timeline: &mut Timeline) {
    let pass = found.pass;
    let of_pass: Vec<u64> = found.history.iter().filter(|run| run.pass == pass).map(|run| run.number).collect();
    let Some(last) = of_pass.len().checked_sub(1) else { return };
    // The chosen run may have been forgotten since.
    let mut at = of_pass.iter().position(|number| Some(*number) == *chosen).unwrap_or(last);
    ui.horizontal(|ui| {
        let label = ui.label(format!("{} run", pass.name()));
        ui.spacing_mut().slider_width = 300.0;
        ui.add(egui::Slider::new(&mut at, 0..=last).show_value(false)).labelled_by(label.id);
        ui.label(format!("{} of {}", at + 1, last + 1));
        if ui.button("newest").on_hover_text("Follow the newest run").clicked() {
            at = last;
        }
    });
    *chosen = (at < last).then_some(of_pass[at]);
    let Some(run) = cx.store.runs().iter().rev().find(|run| run.number == of_pass[at]) else {
        ui.weak("This run was forgotten: only the last ones are kept.");
        return;
    };
    let (Some(total), Some(steps)) = (times::total(run, cx.subject), times::steps(run, cx.subject)) else { return };
    let share = if total.span > 0.0 { 100.0 * total.gaps() / total.span } else { 0.0 };
    ui.label(format!(
        "Run {}: {} with a context of {}, {} in {} dispatches, {} % gaps ({}); {}.",
        run.number,
        counted_tokens(run.tokens as f64),
        run.context,
        duration(total.span),
        total.all.dispatches,
        number(share as f32),
        duration(total.gaps()),
        times_floor(&total.all, cx.subject),
    ));
    let say = |index: usize, taken: u64| {
        let step = &steps[index];
        let amount = Amount { seconds: taken as f64 * 1e-9, bytes: times::bytes(step, run, pass), dispatches: 1 };
        format!(
            "{}: {}, {} moved, {}\n{}",
            step.label,
            duration(amount.seconds),
            size(amount.bytes),
            times_floor(&amount, cx.subject),
            step.kernel
        )
    };
    timeline.show(ui, run, steps, &say, &mut cx.selection.layer);
}

fn history(ui: &mut Ui, cx: &Cx<'_>, found: &Found) {
    let name = |pass: Pass| format!("{} {}", number_of(found, pass), pass.name());
    ui.label(format!(
        "Time of each run from its first step to the end of its last, by the device's clock: {}.",
        Pass::ALL.map(name).join(", ")
    ));
    let milliseconds = |of: &dyn Fn(&Total) -> Option<f64>, pass: Pass| -> Vec<[f64; 2]> {
        let runs = found.history.iter().filter(|total| total.pass == pass);
        runs.filter_map(|total| Some([total.number as f64, of(total)? * 1e3])).collect()
    };
    // Passes differ by orders of magnitude: only the chosen one is drawn.
    let pass = found.pass;
    let spans = milliseconds(&|total| Some(total.span), pass);
    let floors = milliseconds(&|total| floor(&total.all, cx.subject), pass);
    let height = (ui.available_height() - 30.0).max(120.0);
    let colour = accent(ui);
    let plot = Plot::new("history")
        .height(height)
        .include_y(0.0)
        .x_axis_label("run")
        .y_axis_label("milliseconds")
        .y_axis_min_width(44.0)
        .legend(Legend::default());
    let answer = plot.show(ui, |plot| {
        plot.points(Points::new(pass.name(), PlotPoints::from(spans)).radius(2.5).color(colour));
        if !floors.is_empty() {
            plot.line(egui_plot::Line::new("floor", PlotPoints::from(floors)).color(kind(1)).width(2.0));
        }
    });
    let label = format!("plot of {} {} runs", number_of(found, pass), pass.name());
    answer.response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Image, true, &label));
}

fn number_of(found: &Found, pass: Pass) -> usize {
    found.counts[pass as usize]
}

fn accent(ui: &Ui) -> Color32 {
    if ui.visuals().dark_mode { kind(4) } else { kind(0) }
}
