//! What the two ways to compare have in common: a list beside maps, its rows, and a plot over the layers.

use egui::{
    Align2, Color32, CornerRadius, FontId, Frame, Margin, Panel, Rect, Response, Sense, StrokeKind, Ui, UiBuilder,
    pos2, vec2,
};
use egui_plot::{Line, LineStyle, Plot, Points, VLine, uniform_grid_spacer};

use crate::heat::number;
use crate::view::Cx;

/// Height of a row of the lists.
pub const ROW: f32 = 18.0;
/// Width from which on list and maps stand side by side.
const WIDE: f32 = 560.0;
/// Share of the room that the list gets.
const LIST: f32 = 0.36;

/// A list beside the maps, or above them where there is little room. Returns the room for the maps.
pub fn aside(ui: &mut Ui, name: &str, contents: impl FnOnce(&mut Ui)) -> Ui {
    let is_wide = ui.available_width() >= WIDE;
    let panel = if is_wide {
        Panel::left(name).default_size((ui.available_width() * LIST).min(360.0))
    } else {
        Panel::top(name).exact_size(ui.available_height() * LIST)
    };
    let margin = if is_wide { Margin { right: 8, ..Margin::ZERO } } else { Margin { bottom: 8, ..Margin::ZERO } };
    panel.frame(Frame::new().inner_margin(margin)).show(ui, contents);
    let mut room = ui.available_rect_before_wrap();
    room.min += if is_wide { vec2(8.0, 0.0) } else { vec2(0.0, 8.0) };
    ui.new_child(UiBuilder::new().max_rect(room))
}

/// Numbers over layers.
pub struct Curve {
    /// What it is, for tooltips.
    pub name: String,
    /// Its colour.
    pub colour: Color32,
    /// Whether it is drawn thin and dashed.
    pub thin: bool,
    /// Layer and number.
    pub points: Vec<[f64; 2]>,
}

/// Numbers by layer as points; those that are NaN are left out.
pub fn points(values: impl Iterator<Item = f32>) -> Vec<[f64; 2]> {
    let all = values.enumerate().map(|(layer, value)| [layer as f64, f64::from(value)]);
    all.filter(|[_, value]| !value.is_nan()).collect()
}

/// A plot over the layers, whose scale goes at least from 0 to `top`; a click selects a layer.
pub fn over_layers(ui: &mut Ui, cx: &mut Cx<'_>, name: &str, unit: &str, top: f64, curves: Vec<Curve>) {
    let layers = cx.subject.model.layers;
    let mark = Color32::from_rgb(255, 80, 80); // as in maps
    let height = (ui.available_height() * 0.36).clamp(90.0, 220.0);
    let plot = Plot::new(name)
        .height(height)
        .include_x(0.0)
        .include_x(f64::from(layers.saturating_sub(1)))
        .include_y(0.0)
        .include_y(top)
        .allow_drag(false)
        .allow_zoom(false)
        .allow_scroll(false)
        .allow_boxed_zoom(false)
        .x_grid_spacer(uniform_grid_spacer(|_| [1.0, 5.0, 10.0]))
        .x_axis_label("layer")
        .y_axis_label(unit)
        .label_formatter(|at| match at {
            egui_plot::HoverPosition::NearDataPoint { plot_name, position, .. } => {
                Some(format!("layer {:.0}: {}\n{plot_name}", position.x, number(position.y as f32)))
            }
            egui_plot::HoverPosition::Elsewhere { .. } => None,
        });
    let selected = f64::from(cx.selection.layer);
    let drawn = plot.show(ui, move |plot| {
        plot.vline(VLine::new("selected layer", selected).color(mark).width(1.0).allow_hover(false));
        for curve in curves {
            let (width, style) = if curve.thin { (1.0, LineStyle::dashed_dense()) } else { (2.0, LineStyle::Solid) };
            let line =
                Line::new(curve.name.clone(), curve.points.clone()).color(curve.colour).width(width).style(style);
            plot.line(line.allow_hover(false));
            let radius = if curve.thin { 1.5 } else { 2.5 };
            plot.points(Points::new(curve.name, curve.points).color(curve.colour).radius(radius));
        }
    });
    let response = drawn.response;
    response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Image, true, format!("{name}: plot")));
    if response.clicked()
        && let Some(at) = response.interact_pointer_pos()
    {
        let layer = drawn.transform.value_from_position(at).x.round().max(0.0) as u32;
        cx.selection.layer = layer.min(layers.saturating_sub(1));
    }
}

/// A row of a list that can be clicked.
pub fn row(ui: &mut Ui, selected: bool, label: &str, paint: impl FnOnce(&Ui, Rect)) -> Response {
    let (rect, response) = ui.allocate_exact_size(vec2(ui.available_width(), ROW), Sense::click());
    response.widget_info(|| egui::WidgetInfo::selected(egui::Role::Button, true, selected, label));
    let visuals = ui.visuals();
    if selected {
        ui.painter().rect_filled(rect, 2.0, visuals.selection.bg_fill.gamma_multiply(0.6));
    } else if response.hovered() {
        ui.painter().rect_filled(rect, 2.0, visuals.widgets.hovered.weak_bg_fill);
    }
    paint(ui, rect);
    if response.has_focus() {
        ui.painter().rect_stroke(rect, CornerRadius::same(2), visuals.selection.stroke, StrokeKind::Inside);
    }
    response
}

/// The four cells of a row.
pub fn columns(rect: Rect) -> [Rect; 4] {
    const FIRST: f32 = 48.0;
    const LAST: f32 = 56.0;
    let middle = ((rect.width() - FIRST - LAST) / 2.0).max(0.0);
    let edges = [0.0, FIRST, FIRST + middle, FIRST + 2.0 * middle, rect.width()].map(|x| rect.min.x + x);
    std::array::from_fn(|i| Rect::from_min_max(pos2(edges[i], rect.min.y), pos2(edges[i + 1], rect.max.y)))
}

/// Writes into the cells of a row.
pub fn paint_cells(ui: &Ui, rect: Rect, cells: &[(String, Color32); 4]) {
    for (place, (text, colour)) in columns(rect).into_iter().zip(cells) {
        let painter = ui.painter().with_clip_rect(place.intersect(ui.clip_rect()));
        let at = pos2(place.min.x + 4.0, place.center().y);
        painter.text(at, Align2::LEFT_CENTER, text, FontId::proportional(12.5), *colour);
    }
}
