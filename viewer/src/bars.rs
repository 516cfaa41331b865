//! What several views are made of beside maps: bar charts whose bars can be chosen with mouse and keyboard, plots that stay as
//! they are, keys to colours, numbers to step.

use std::ops::RangeInclusive;

use egui::{Color32, Key, Stroke, Ui};
use egui_plot::{AxisHints, Bar, BarChart, GridInput, GridMark, HLine, LineStyle, Plot, PlotBounds, PlotPoint, Points};

/// What a bar chart shows.
pub struct Bars<'a> {
    /// Name for the accessibility tree.
    pub name: &'a str,
    /// What the bars are, for example "expert".
    pub axis: &'a str,
    /// What their heights are, with the unit.
    pub unit: &'a str,
    /// Heights, by series: its name, its colour, and a height for each bar. All have the same length.
    pub series: &'a [(&'a str, Color32, &'a [f64])],
    /// Bars of the first series that have a colour of their own.
    pub accent: Option<Accent<'a>>,
    /// Horizontal lines: their names and heights. The first is solid, the others are dashed.
    pub lines: &'a [(&'a str, f64)],
    /// The bar that is marked.
    pub marked: Option<usize>,
    /// What to say of a bar when the pointer is over it.
    pub tooltip: &'a dyn Fn(usize) -> String,
    /// Width and height in points, without the key above it.
    pub size: egui::Vec2,
}

/// Bars that are different from the others.
#[derive(Clone, Copy)]
pub struct Accent<'a> {
    /// What they are.
    pub name: &'a str,
    /// Their colour.
    pub colour: Color32,
    /// Which they are.
    pub is: &'a dyn Fn(usize) -> bool,
}

impl Bars<'_> {
    /// Draws it. Returns the bar that was clicked, or reached with the arrow keys.
    pub fn show(&self, ui: &mut Ui) -> Option<usize> {
        let count = self.series.first().map_or(0, |(_, _, heights)| heights.len());
        if count == 0 {
            ui.weak("nothing to show yet");
            return None;
        }
        let highest = self.series.iter().flat_map(|(_, _, heights)| heights.iter().copied()).fold(0.0, f64::max);
        let highest = self.lines.iter().map(|(_, at)| *at).fold(highest, f64::max);
        self.key(ui);
        let plot =
            still(self.name, self.axis, self.unit).width(self.size.x).height(self.size.y).show_grid([false, true]);
        let (text, weak) = (ui.visuals().text_color(), ui.visuals().weak_text_color());
        let inner = plot.show(ui, |plot| {
            let top = if highest > 0.0 { highest * 1.08 } else { 1.0 };
            plot.set_plot_bounds(PlotBounds::from_min_max([-0.7, 0.0], [count as f64 - 0.3, top]));
            // Gaps between very thin bars would only flicker.
            let all = if count > 128 { 1.0 } else { 0.8 };
            let width = all / self.series.len() as f64;
            for (s, (name, colour, heights)) in self.series.iter().enumerate() {
                let at = |i: usize| i as f64 + (s as f64 + 0.5) * width - all / 2.0;
                let accent =
                    |i: usize| self.accent.filter(|accent| s == 0 && (accent.is)(i)).map(|accent| accent.colour);
                let fill = |i: usize| accent(i).unwrap_or(*colour);
                let bar = |(i, &height): (usize, &f64)| {
                    Bar::new(at(i), height).width(width).fill(fill(i)).stroke(Stroke::NONE)
                };
                let bars = heights.iter().enumerate().filter(|(_, height)| height.is_finite()).map(bar).collect();
                plot.bar_chart(BarChart::new(*name, bars).color(*colour).allow_hover(false));
            }
            for (i, (name, at)) in self.lines.iter().enumerate() {
                let style = if i == 0 { LineStyle::Solid } else { LineStyle::dashed_loose() };
                plot.hline(HLine::new(*name, *at).color(weak).width(1.0).style(style).allow_hover(false));
            }
            if let Some(marked) = self.marked.filter(|marked| *marked < count) {
                let points = vec![[marked as f64, top * 0.985]];
                let mark = Points::new("", points).shape(egui_plot::MarkerShape::Down).radius(5.0).color(text);
                plot.points(mark.allow_hover(false));
            }
        });
        let response = inner.response;
        let bar_at = |at: egui::Pos2| {
            let PlotPoint { x, .. } = inner.transform.value_from_position(at);
            (x.round() >= 0.0 && x.round() < count as f64).then_some(x.round() as usize)
        };
        response.widget_info(|| {
            let label = format!("{}: {count} bars, one for each {}", self.name, self.axis);
            egui::WidgetInfo::labeled(egui::Role::Image, true, label)
        });
        let mut chosen = None;
        if response.clicked() {
            response.request_focus();
            chosen = response.interact_pointer_pos().and_then(bar_at);
        }
        if response.has_focus() {
            let marked = self.marked.map(|marked| marked as u32);
            chosen = step(ui, response.id, marked, count).map(|bar| bar as usize).or(chosen);
            ui.painter().rect_stroke(
                *inner.transform.frame(),
                2.0,
                ui.visuals().selection.stroke,
                egui::StrokeKind::Inside,
            );
        }
        if let Some(bar) = response.hover_pos().and_then(bar_at) {
            response.on_hover_text_at_pointer((self.tooltip)(bar));
        }
        chosen
    }

    /// What colours and lines mean, if there is more than one.
    fn key(&self, ui: &mut Ui) {
        let series = self.series.iter().map(|(name, colour, _)| (*name, *colour));
        let accent = self.accent.iter().map(|accent| (accent.name, accent.colour));
        let colours: Vec<(&str, Color32)> = series.chain(accent).collect();
        if colours.len() > 1 || !self.lines.is_empty() {
            let lines: Vec<&str> = self.lines.iter().map(|(name, _)| *name).collect();
            swatches(ui, &colours, &lines);
        }
    }
}

/// A line that says what colours mean, and lines: the first of these is solid, the others are dashed.
pub fn swatches(ui: &mut Ui, colours: &[(&str, Color32)], lines: &[&str]) {
    let small = |text: &str| egui::RichText::new(text).small();
    ui.horizontal_wrapped(|ui| {
        ui.spacing_mut().item_spacing.x = 4.0;
        for (name, colour) in colours {
            let (rect, _) = ui.allocate_exact_size(egui::vec2(9.0, 9.0), egui::Sense::hover());
            ui.painter().rect_filled(rect, 1.0, *colour);
            ui.label(small(name));
            ui.add_space(6.0);
        }
        for (i, name) in lines.iter().enumerate() {
            let (rect, _) = ui.allocate_exact_size(egui::vec2(18.0, 9.0), egui::Sense::hover());
            let ends = [rect.left_center(), rect.right_center()];
            let stroke = Stroke::new(1.0, ui.visuals().weak_text_color());
            if i == 0 {
                ui.painter().line_segment(ends, stroke);
            } else {
                ui.painter().extend(egui::Shape::dashed_line(&ends, stroke, 4.0, 3.0));
            }
            ui.label(small(name));
            ui.add_space(6.0);
        }
    });
}

/// A plot that stays as it is: no zoom, no axes to drag. The horizontal axis counts things.
pub fn still<'a>(name: &str, x: &str, y: &str) -> Plot<'a> {
    let counts =
        |mark: GridMark, _: &RangeInclusive<f64>| if mark.value < 0.0 { String::new() } else { mark.value.to_string() };
    let numbers = |mark: GridMark, _: &RangeInclusive<f64>| {
        let decimals = (-mark.step_size.log10().floor()).clamp(0.0, 9.0) as usize;
        format!("{:.decimals$}", mark.value)
    };
    Plot::new(name)
        .allow_drag(false)
        .allow_zoom(false)
        .allow_scroll(false)
        .allow_boxed_zoom(false)
        .allow_axis_zoom_drag(false)
        .allow_double_click_reset(false)
        .show_x(false)
        .show_y(false)
        .label_formatter(|_| None)
        .x_grid_spacer(|input| marks(&input, 6.0, 1.0))
        .y_grid_spacer(|input| marks(&input, 3.0, 0.0))
        .custom_x_axes(vec![AxisHints::new_x().label(x.to_owned()).formatter(counts).label_spacing(8.0..=16.0)])
        .custom_y_axes(vec![AxisHints::new_y().label(y.to_owned()).formatter(numbers).label_spacing(8.0..=16.0)])
}

/// Marks in steps of 1, 2 or 5 times a power of ten, `apart` times the least distance of grid lines from each other.
fn marks(input: &GridInput, apart: f64, least: f64) -> Vec<GridMark> {
    let raw = (input.base_step_size * apart).max(least);
    let power = 10f64.powf(raw.log10().floor());
    let step_size = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|step| *step >= raw).unwrap_or(raw);
    let (first, last) = ((input.bounds.0 / step_size).ceil() as i64, (input.bounds.1 / step_size).floor() as i64);
    (first..=last.min(first + 200)).map(|i| GridMark { value: i as f64 * step_size, step_size }).collect()
}

/// Where the left and right arrow keys lead from a number below `count`, while a widget has the keyboard. Tells egui that
/// these keys are for this widget, not for moving on to another one.
pub fn step(ui: &Ui, id: egui::Id, at: Option<u32>, count: usize) -> Option<u32> {
    let filter = egui::EventFilter { horizontal_arrows: true, ..egui::EventFilter::default() };
    ui.memory_mut(|memory| memory.set_focus_lock_filter(id, filter));
    let pressed = |key: Key| ui.input_mut(|input| input.consume_key(egui::Modifiers::NONE, key));
    let last = (count as u32).checked_sub(1)?;
    if pressed(Key::ArrowRight) {
        Some(at.map_or(0, |at| at.saturating_add(1)).min(last))
    } else if pressed(Key::ArrowLeft) {
        Some(at.map_or(0, |at| at.saturating_sub(1)).min(last))
    } else {
        None
    }
}

/// A whole number to drag, to type, or to step with the arrow keys.
pub fn whole_number<'a, Number: egui::emath::Numeric>(
    ui: &Ui,
    number: &'a mut Number,
    range: RangeInclusive<Number>,
) -> egui::DragValue<'a> {
    // A key moves by the speed too, and less than 1 would not move it at all.
    let speed = if ui.input(|input| input.pointer.any_down()) { 0.1 } else { 1.0 };
    egui::DragValue::new(number).range(range).clamp_existing_to_range(false).speed(speed)
}
