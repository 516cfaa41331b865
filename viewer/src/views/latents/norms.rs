//! How long the rows are, and which tokens and dimensions stand out.

use egui::{Ui, vec2};
use egui_plot::{HLine, Line, LineStyle, PlotPoint, Points, VLine};

use crate::analysis::latents::{OUTLIER, Outlier, Robust, Sizes, outliers, sizes};
use crate::bars::{Accent, Bars, step, still, swatches};
use crate::colour::kind;
use crate::heat::number;
use crate::jobs::Latest;
use crate::numbers::Table;
use crate::view::Cx;

use super::{Origin, Rows, Shown, say_missing};

/// Points of the curve at most; longer texts share points.
const MOST_POINTS: usize = 4096;
/// Entries of a list.
const LISTED: usize = 40;

struct Made {
    sizes: Sizes,
    /// The same as `sizes.rms`, for the bars.
    rms: Vec<f64>,
    tokens: Vec<Outlier>,
    dimensions: Vec<Outlier>,
    robust: Option<Robust>,
    /// The curve of norms in pieces without gaps, and tokens that share a point.
    curve: Vec<Vec<PlotPoint>>,
    pool: usize,
    marks: Vec<PlotPoint>,
    missing: usize,
}

#[derive(Default)]
pub(super) struct Norms {
    made: Latest<Origin, Made>,
    dimension: Option<usize>,
}

fn make(rows: &Rows) -> Made {
    let sizes = sizes(rows.tokens, rows.dim(), |at| rows.row(at));
    let tokens = outliers(&sizes.norms);
    let pool = rows.tokens.div_ceil(MOST_POINTS).max(1);
    let mut curve: Vec<Vec<PlotPoint>> = vec![Vec::new()];
    for (at, norms) in sizes.norms.chunks(pool).enumerate() {
        let largest = norms.iter().copied().fold(f32::NAN, f32::max);
        let piece = curve.last_mut().expect("there is always a piece");
        if largest.is_finite() {
            piece.push(PlotPoint::new((at * pool) as f64, f64::from(largest)));
        } else if !piece.is_empty() {
            curve.push(Vec::new());
        }
    }
    Made {
        rms: sizes.rms.iter().map(|&rms| f64::from(rms)).collect(),
        dimensions: outliers(&sizes.rms),
        robust: Robust::of(sizes.norms.iter().map(|&norm| f64::from(norm))),
        marks: tokens.iter().map(|o| PlotPoint::new(o.index as f64, f64::from(sizes.norms[o.index]))).collect(),
        missing: rows.missing(),
        tokens,
        curve,
        pool,
        sizes,
    }
}

impl Norms {
    pub(super) fn show(&mut self, ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>) {
        let rows = shown.rows.clone();
        let Some(made) = self.made.get(ui.ctx(), &shown.origin, move || make(&rows)) else {
            ui.spinner();
            return;
        };
        let dimension = &mut self.dimension;
        let height = ui.available_height() - 8.0;
        ui.horizontal_top(|ui| {
            let side = 250.0;
            ui.vertical(|ui| {
                ui.set_width((ui.available_width() - side - 12.0).max(200.0));
                ui.horizontal_wrapped(|ui| {
                    ui.strong("Norm of each token");
                    if made.pool > 1 {
                        ui.weak(format!("a point is the largest of {} tokens", made.pool));
                    }
                    say_missing(ui, made.missing, shown.rows.tokens);
                });
                curve(ui, cx, shown, made, height * 0.5 - 48.0);
                ui.strong("Size of each dimension (root mean square over the tokens)");
                let outlier = |at: usize| made.dimensions.iter().find(|outlier| outlier.index == at);
                let tooltip = |at: usize| {
                    let far = outlier(at).map_or(String::new(), |o| format!(", {:+.1} σ", o.sigmas));
                    let (rms, mean) = (made.sizes.rms[at], made.sizes.means[at]);
                    format!("dimension {at}: root mean square {}, mean {}{far}", number(rms), number(mean))
                };
                let chosen = Bars {
                    name: &format!("size of dimensions, layer {}", shown.origin.layer),
                    axis: "dimension",
                    unit: "root mean square",
                    series: &[("dimension", kind(0), &made.rms)],
                    accent: Some(Accent { name: "stands out", colour: kind(1), is: &|at| outlier(at).is_some() }),
                    lines: &[],
                    marked: *dimension,
                    tooltip: &tooltip,
                    size: vec2(ui.available_width(), height * 0.5 - 42.0),
                }
                .show(ui);
                *dimension = chosen.or(*dimension);
            });
            ui.separator();
            ui.vertical(|ui| lists(ui, cx, shown, made, dimension));
        });
    }

    pub(super) fn is_busy(&self) -> bool {
        self.made.is_busy()
    }
}

fn curve(ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>, made: &Made, height: f32) {
    let end = format!("{OUTLIER} σ from it");
    let lines = if made.tokens.is_empty() { &["median"][..] } else { &["median", &end] };
    let mut colours = vec![("norm", kind(0)), ("selected", kind(3))];
    if !made.tokens.is_empty() {
        colours.insert(1, ("stands out", kind(1)));
    }
    swatches(ui, &colours, lines);
    let plot = still("norms", "token", "norm")
        .width(ui.available_width())
        .height(height.max(80.0))
        .allow_drag([true, false])
        .allow_zoom([true, false])
        .allow_double_click_reset(true)
        .include_y(0.0);
    let weak = ui.visuals().weak_text_color();
    let selected = cx.selection.token.map(f64::from);
    let inner = plot.show(ui, |plot| {
        if let Some(robust) = made.robust {
            plot.hline(HLine::new("median", robust.median).color(weak).width(1.0).allow_hover(false));
            if !made.tokens.is_empty() {
                let style = LineStyle::dashed_loose();
                for end in [robust.median + OUTLIER * robust.sigma, robust.median - OUTLIER * robust.sigma] {
                    let line = HLine::new("", end.max(0.0));
                    plot.hline(line.color(weak).width(1.0).style(style).allow_hover(false));
                }
            }
        }
        if let Some(selected) = selected {
            plot.vline(VLine::new("selected", selected).color(kind(3)).width(1.0).allow_hover(false));
        }
        for piece in &made.curve {
            plot.line(Line::new("norm", piece.as_slice()).color(kind(0)).width(1.0).allow_hover(false));
        }
        if !made.marks.is_empty() {
            let marks = Points::new("outliers", made.marks.as_slice()).color(kind(1)).radius(3.0);
            plot.points(marks.allow_hover(false));
        }
    });
    let response = inner.response;
    response.widget_info(|| {
        let label = format!("norm of {} tokens, layer {}", shown.rows.tokens, shown.origin.layer);
        egui::WidgetInfo::labeled(egui::Role::Image, true, label)
    });
    let token_at = |at: egui::Pos2| {
        let token = inner.transform.value_from_position(at).x.round();
        (token >= 0.0 && token < shown.rows.tokens as f64).then_some(token as usize)
    };
    if response.clicked() {
        response.request_focus();
        if let Some(token) = response.interact_pointer_pos().and_then(token_at) {
            cx.selection.token = Some(token as u32);
        }
    }
    if response.has_focus()
        && let Some(token) = step(ui, response.id, cx.selection.token, shown.rows.tokens)
    {
        cx.selection.token = Some(token);
    }
    if let Some(token) = response.hover_pos().and_then(token_at) {
        let norm = made.sizes.norms.get(token).filter(|norm| !norm.is_nan());
        let norm = norm.map_or("no row".to_owned(), |norm| format!("norm {}", number(*norm)));
        response.on_hover_text_at_pointer(format!("token {}: {norm}", shown.token(cx.subject, token)));
    }
}

/// What stands out, to click.
fn lists(ui: &mut Ui, cx: &mut Cx<'_>, shown: &Shown<'_>, made: &Made, dimension: &mut Option<usize>) {
    let about = format!(
        "Further than {OUTLIER} σ from the median. σ is robust: 1.4826 × the median distance to the median, so that outliers \
         do not hide themselves."
    );
    egui::ScrollArea::vertical().auto_shrink([false, false]).show(ui, |ui| {
        ui.strong(stand_out(made.tokens.len(), "token")).on_hover_text(&about);
        for outlier in made.tokens.iter().take(LISTED) {
            let norm = number(made.sizes.norms[outlier.index]);
            let name = shown.token(cx.subject, outlier.index);
            let text = format!("{name}: norm {norm}, {:+.1} σ", outlier.sigmas);
            if ui.selectable_label(cx.selection.token == Some(outlier.index as u32), text).clicked() {
                cx.selection.token = Some(outlier.index as u32);
            }
        }
        more(ui, made.tokens.len());
        ui.add_space(8.0);
        ui.strong(stand_out(made.dimensions.len(), "dimension")).on_hover_text(&about);
        for outlier in made.dimensions.iter().take(LISTED) {
            let (rms, mean) = (made.sizes.rms[outlier.index], made.sizes.means[outlier.index]);
            let text =
                format!("{}: size {}, mean {}, {:+.1} σ", outlier.index, number(rms), number(mean), outlier.sigmas);
            if ui.selectable_label(*dimension == Some(outlier.index), text).clicked() {
                *dimension = Some(outlier.index);
            }
        }
        more(ui, made.dimensions.len());
        if let Some(at) = dimension.filter(|at| *at < made.rms.len()) {
            ui.add_space(8.0);
            let (rms, mean) = (made.sizes.rms[at], made.sizes.means[at]);
            ui.label(format!("Dimension {at}: root mean square {}, mean {}.", number(rms), number(mean)));
        }
    });
}

fn stand_out(count: usize, what: &str) -> String {
    match count {
        0 => format!("No {what} stands out"),
        1 => format!("1 {what} stands out"),
        _ => format!("{count} {what}s stand out"),
    }
}

fn more(ui: &mut Ui, count: usize) {
    if count > LISTED {
        ui.weak(format!("and {} more", count - LISTED));
    }
}

pub(super) fn tables(name: &str, rows: &Rows) -> Vec<Table> {
    let sizes = sizes(rows.tokens, rows.dim(), |at| rows.row(at));
    let sigmas = |numbers: &[f32]| -> Vec<f32> {
        let robust = Robust::of(numbers.iter().map(|&number| f64::from(number)));
        let sigma = |&number: &f32| robust.map_or(f32::NAN, |robust| robust.sigmas(f64::from(number)) as f32);
        numbers.iter().map(sigma).collect()
    };
    let (tokens, dims) = ([("token", rows.tokens)], [("dimension", rows.dim())]);
    vec![
        Table::floats(format!("{name}.norm_sigmas"), &tokens, sigmas(&sizes.norms)),
        Table::floats(format!("{name}.norms"), &tokens, sizes.norms),
        Table::floats(format!("{name}.dimension_sigmas"), &dims, sigmas(&sizes.rms)),
        Table::floats(format!("{name}.dimension_rms"), &dims, sizes.rms),
        Table::floats(format!("{name}.dimension_means"), &dims, sizes.means),
    ]
}
