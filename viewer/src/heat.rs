//! The heat map that most views are made of: any number of cells, with axes, legend, zoom, hover and keyboard.

use std::sync::Arc;

use egui::{
    Color32, ColorImage, CornerRadius, Key, Rect, Sense, Stroke, StrokeKind, TextureHandle, TextureOptions, Ui, pos2,
    vec2,
};

use crate::colour::{Palette, diverging};

/// Pixels of a map's image at most, in each direction; more cells than that are pooled.
const MAX_PIXELS: usize = 2048;
/// Room for the labels of the axes and the legend, in points.
const LEFT: f32 = 44.0;
const BELOW: f32 = 34.0;

/// Numbers of a map, row-major. Cells that are NaN are drawn as absent.
#[derive(Clone, Debug)]
pub struct Grid {
    /// Rows, drawn from top to bottom.
    pub rows: usize,
    /// Columns, drawn from left to right.
    pub columns: usize,
    /// `[rows, columns]`.
    pub cells: Arc<Vec<f32>>,
    /// Values of the scale's two ends.
    pub range: (f32, f32),
}

impl Grid {
    /// A grid whose scale goes from 0 to its largest number.
    pub fn from_zero(rows: usize, columns: usize, cells: Vec<f32>) -> Self {
        let most = cells.iter().copied().filter(|cell| cell.is_finite()).fold(0.0f32, f32::max);
        Self { rows, columns, cells: Arc::new(cells), range: (0.0, if most > 0.0 { most } else { 1.0 }) }
    }

    /// A grid of signed numbers whose scale is the same on both sides of 0. Use it with [`Scale::Diverging`].
    pub fn around_zero(rows: usize, columns: usize, cells: Vec<f32>) -> Self {
        let most = cells.iter().filter(|cell| cell.is_finite()).fold(0.0f32, |most, cell| most.max(cell.abs()));
        let most = if most > 0.0 { most } else { 1.0 };
        Self { rows, columns, cells: Arc::new(cells), range: (-most, most) }
    }

    /// The number of a cell.
    pub fn get(&self, row: usize, column: usize) -> Option<f32> {
        if column >= self.columns { None } else { self.cells.get(row * self.columns + column).copied() }
    }
}

/// How numbers become colours.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// From little to much.
    Sequential(Palette),
    /// From negative to positive.
    Diverging,
}

impl Scale {
    fn colour(self, value: f32, (low, high): (f32, f32)) -> Color32 {
        let unit = (value - low) / (high - low);
        match self {
            Scale::Sequential(palette) => palette.colour(unit),
            Scale::Diverging => diverging(unit.mul_add(2.0, -1.0)),
        }
    }
}

/// What a map is about.
pub struct Spec<'a> {
    /// Name for the accessibility tree, for example "experts by token, layer 3".
    pub name: &'a str,
    /// What the rows are, for example "token".
    pub row_axis: &'a str,
    /// What the columns are.
    pub column_axis: &'a str,
    /// What the numbers are, with their unit: "weight", "tokens", "nats".
    pub unit: &'a str,
    /// Colours.
    pub scale: Scale,
    /// A row that is marked.
    pub row: Option<usize>,
    /// A column that is marked.
    pub column: Option<usize>,
    /// Columns after which a line is drawn, every so many (groups of experts); 0 for none.
    pub column_groups: usize,
    /// What to say of a cell when the pointer is over it.
    pub tooltip: &'a dyn Fn(usize, usize) -> String,
    /// Largest height, in points; the width is what there is.
    pub height: f32,
}

/// What the user did with a map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The cell that was clicked, or reached with the arrow keys.
    pub chosen: Option<(usize, usize)>,
    /// The cell under the pointer.
    pub hovered: Option<(usize, usize)>,
}

/// The part of a grid that is shown, in cells: first and end of columns and rows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    x: (f32, f32),
    y: (f32, f32),
}

#[derive(Debug, PartialEq)]
struct Drawn {
    cells: *const f32,
    shape: (usize, usize),
    range: (f32, f32),
    window: Window,
    pixels: (usize, usize),
    scale: Scale,
}

/// A map's image and zoom. Keep one for each map that is drawn.
#[derive(Default)]
pub struct HeatMap {
    window: Option<Window>,
    /// A texture belongs to its context: a picture that is drawn elsewhere needs another.
    texture: Option<(egui::Context, TextureHandle)>,
    drawn: Option<(Drawn, Arc<Vec<f32>>)>,
}

impl HeatMap {
    /// Draws the map. Scrolling with Ctrl zooms, dragging moves, a double click shows all again.
    pub fn show(&mut self, ui: &mut Ui, grid: &Grid, spec: &Spec<'_>) -> Answer {
        if grid.rows == 0 || grid.columns == 0 || grid.cells.len() != grid.rows * grid.columns {
            ui.weak("nothing to show yet");
            return Answer::default();
        }
        legend(ui, spec.scale, grid.range, spec.unit);
        let width = (ui.available_width() - LEFT).max(40.0);
        // Few cells need not fill the room: no cell is taller than 22 points.
        let height = (grid.rows as f32 * 22.0).min(spec.height).max(24.0);
        let (outer, response) = ui.allocate_exact_size(vec2(width + LEFT, height + BELOW), Sense::click_and_drag());
        response.widget_info(|| {
            let label = format!(
                "{}: map of {} {} by {} {}",
                spec.name, grid.rows, spec.row_axis, grid.columns, spec.column_axis
            );
            egui::WidgetInfo::labeled(egui::Role::Image, true, label)
        });
        let area = Rect::from_min_size(outer.min + vec2(LEFT, 0.0), vec2(width, height));
        let all = Window { x: (0.0, grid.columns as f32), y: (0.0, grid.rows as f32) };
        let mut window = self.window.map_or(all, |window| clamp(window, all));
        self.navigate(ui, &response, area, &mut window, all);
        let to_cell = |at: egui::Pos2| {
            let unit = (at - area.min) / area.size();
            let column = window.x.0 + unit.x * (window.x.1 - window.x.0);
            let row = window.y.0 + unit.y * (window.y.1 - window.y.0);
            ((row as usize).min(grid.rows - 1), (column as usize).min(grid.columns - 1))
        };
        let mut answer = Answer::default();
        if let Some(at) = response.hover_pos().filter(|at| area.contains(*at)) {
            answer.hovered = Some(to_cell(at));
        }
        if response.clicked()
            && let Some(at) = response.interact_pointer_pos().filter(|at| area.contains(*at))
        {
            answer.chosen = Some(to_cell(at));
            response.request_focus();
        }
        if response.has_focus() {
            // Arrows move the mark, not the focus.
            let arrows_only =
                egui::EventFilter { horizontal_arrows: true, vertical_arrows: true, ..egui::EventFilter::default() };
            ui.memory_mut(|memory| memory.set_focus_lock_filter(response.id, arrows_only));
            let moved = arrows(ui, spec, grid);
            answer.chosen = moved.or(answer.chosen);
        }
        self.paint(ui, grid, spec, area, window);
        if response.has_focus() {
            ui.painter().rect_stroke(area, 2.0, ui.visuals().selection.stroke, StrokeKind::Outside);
        }
        if let Some((row, column)) = answer.hovered {
            response.on_hover_text_at_pointer((spec.tooltip)(row, column));
        }
        answer
    }

    fn navigate(&mut self, ui: &Ui, response: &egui::Response, area: Rect, window: &mut Window, all: Window) {
        if response.double_clicked() {
            *window = all;
        }
        let zoom = if response.hovered() { ui.input(egui::InputState::zoom_delta) } else { 1.0 };
        if (zoom - 1.0).abs() > f32::EPSILON
            && let Some(at) = response.hover_pos()
        {
            let unit = ((at - area.min) / area.size()).clamp(egui::Vec2::ZERO, egui::Vec2::splat(1.0));
            let scale = |(low, high): (f32, f32), unit: f32| {
                let (length, at) = (high - low, low + unit * (high - low));
                let length = (length / zoom).max(4.0);
                (at - unit * length, at + (1.0 - unit) * length)
            };
            *window = clamp(Window { x: scale(window.x, unit.x), y: scale(window.y, unit.y) }, all);
        }
        if response.dragged() {
            let by = response.drag_delta() / area.size();
            let shift = |(low, high): (f32, f32), by: f32| (low - by * (high - low), high - by * (high - low));
            *window = clamp(Window { x: shift(window.x, by.x), y: shift(window.y, by.y) }, all);
        }
        self.window = (*window != all).then_some(*window);
    }

    fn paint(&mut self, ui: &Ui, grid: &Grid, spec: &Spec<'_>, area: Rect, window: Window) {
        let columns = (window.x.0.floor() as usize, (window.x.1.ceil() as usize).min(grid.columns));
        let rows = (window.y.0.floor() as usize, (window.y.1.ceil() as usize).min(grid.rows));
        let density = ui.ctx().pixels_per_point();
        let pixels = |cells: usize, points: f32| cells.min((points * density).ceil() as usize).clamp(1, MAX_PIXELS);
        let pixels = (pixels(columns.1 - columns.0, area.width()), pixels(rows.1 - rows.0, area.height()));
        let shown = Window { x: (columns.0 as f32, columns.1 as f32), y: (rows.0 as f32, rows.1 as f32) };
        let drawn = Drawn {
            cells: grid.cells.as_ptr(),
            shape: (grid.rows, grid.columns),
            range: grid.range,
            window: shown,
            pixels,
            scale: spec.scale,
        };
        if self.texture.as_ref().is_some_and(|(ctx, _)| ctx != ui.ctx()) {
            (self.texture, self.drawn) = (None, None);
        }
        if self.drawn.as_ref().is_none_or(|(before, _)| *before != drawn) {
            let image = image(grid, spec.scale, columns, rows, pixels);
            if let Some((_, texture)) = &mut self.texture {
                texture.set(image, TextureOptions::NEAREST);
            } else {
                let texture = ui.ctx().load_texture("heat map", image, TextureOptions::NEAREST);
                self.texture = Some((ui.ctx().clone(), texture));
            }
            // Keeping the numbers keeps their address from being another grid's.
            self.drawn = Some((drawn, Arc::clone(&grid.cells)));
        }
        let painter = ui.painter().with_clip_rect(area);
        let at = |column: f32, row: f32| {
            pos2(
                area.min.x + (column - window.x.0) / (window.x.1 - window.x.0) * area.width(),
                area.min.y + (row - window.y.0) / (window.y.1 - window.y.0) * area.height(),
            )
        };
        if let Some((_, texture)) = &self.texture {
            let place = Rect::from_min_max(at(shown.x.0, shown.y.0), at(shown.x.1, shown.y.1));
            painter.image(texture.id(), place, Rect::from_min_max(pos2(0.0, 0.0), pos2(1.0, 1.0)), Color32::WHITE);
        }
        if spec.column_groups > 0 {
            let line = Stroke::new(1.0, ui.visuals().extreme_bg_color);
            for column in (spec.column_groups..grid.columns).step_by(spec.column_groups) {
                painter.line_segment([at(column as f32, window.y.0), at(column as f32, window.y.1)], line);
            }
        }
        let mark = Stroke::new(1.5, Color32::from_rgb(255, 80, 80));
        // Around the cells, and wide enough to be seen where cells are thinner than lines.
        let frame = |place: Rect| {
            let place = place.expand((3.0 - place.size().min_elem()).max(0.0) / 2.0);
            painter.rect_stroke(place, CornerRadius::ZERO, mark, StrokeKind::Outside);
        };
        if let Some(row) = spec.row {
            frame(Rect::from_min_max(at(window.x.0, row as f32), at(window.x.1, row as f32 + 1.0)));
        }
        if let Some(column) = spec.column {
            frame(Rect::from_min_max(at(column as f32, window.y.0), at(column as f32 + 1.0, window.y.1)));
        }
        axes(ui, spec, area, window);
    }
}

fn clamp(window: Window, all: Window) -> Window {
    let fit = |(low, high): (f32, f32), (first, end): (f32, f32)| {
        let length = (high - low).clamp(1.0, end - first);
        let low = low.clamp(first, end - length);
        (low, low + length)
    };
    Window { x: fit(window.x, all.x), y: fit(window.y, all.y) }
}

/// The cell that an arrow key leads to.
fn arrows(ui: &Ui, spec: &Spec<'_>, grid: &Grid) -> Option<(usize, usize)> {
    let moves =
        [(Key::ArrowUp, (-1, 0)), (Key::ArrowDown, (1, 0)), (Key::ArrowLeft, (0, -1)), (Key::ArrowRight, (0, 1))];
    let pressed = |key: Key| ui.input_mut(|input| input.consume_key(egui::Modifiers::NONE, key));
    let (_, (down, right)) = moves.into_iter().find(|(key, _)| pressed(*key))?;
    let step = |at: Option<usize>, by: isize, count: usize| at.unwrap_or(0).saturating_add_signed(by).min(count - 1);
    Some((step(spec.row, down, grid.rows), step(spec.column, right, grid.columns)))
}

/// One pixel for each cell, or for the largest (by distance from the scale's middle, if it is diverging) of several.
fn image(
    grid: &Grid,
    scale: Scale,
    columns: (usize, usize),
    rows: (usize, usize),
    (width, height): (usize, usize),
) -> ColorImage {
    let bins = |(first, end): (usize, usize), pixels: usize, pixel: usize| {
        let at = |pixel: usize| first + pixel * (end - first) / pixels;
        at(pixel)..at(pixel + 1).max(at(pixel) + 1)
    };
    let size = |value: f32| if scale == Scale::Diverging { value.abs() } else { value };
    let mut colours = Vec::with_capacity(width * height);
    for y in 0..height {
        for x in 0..width {
            let mut largest = f32::NAN;
            for row in bins(rows, height, y) {
                for &cell in &grid.cells[row * grid.columns..][bins(columns, width, x)] {
                    if largest.is_nan() || size(cell) > size(largest) {
                        largest = cell;
                    }
                }
            }
            let absent = Color32::from_rgba_unmultiplied(128, 128, 128, 24);
            colours.push(if largest.is_nan() { absent } else { scale.colour(largest, grid.range) });
        }
    }
    ColorImage::new([width, height], colours)
}

/// A colour bar with the numbers of its ends and what they are.
pub fn legend(ui: &mut Ui, scale: Scale, (low, high): (f32, f32), unit: &str) {
    ui.horizontal(|ui| {
        ui.weak(number(low));
        let (bar, _) = ui.allocate_exact_size(vec2(120.0, 10.0), Sense::hover());
        for i in 0..60 {
            let left = bar.min.x + 2.0 * i as f32;
            let value = low + (high - low) * (i as f32 + 0.5) / 60.0;
            let strip = Rect::from_min_size(pos2(left, bar.min.y), vec2(2.0, bar.height()));
            ui.painter().rect_filled(strip, 0.0, scale.colour(value, (low, high)));
        }
        ui.weak(format!("{} {unit}", number(high)));
    });
}

/// A number as short as it can be understood.
pub fn number(value: f32) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-3..1e5).contains(&size) {
        format!("{value:.1e}")
    } else if size >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else if size >= 1.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

fn axes(ui: &Ui, spec: &Spec<'_>, area: Rect, window: Window) {
    let painter = ui.painter();
    let (font, colour) = (egui::FontId::proportional(10.0), ui.visuals().weak_text_color());
    let ticks = |(low, high): (f32, f32), points: f32, room: f32| {
        let most = (points / room).max(1.0);
        let raw = ((high - low) / most).max(1.0);
        let power = 10f32.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|step| *step >= raw).unwrap_or(raw);
        let first = (low / step).ceil() as usize;
        (first..).map(move |i| i as f32 * step).take_while(move |tick| *tick < high).map(|tick| tick as usize)
    };
    for tick in ticks(window.x, area.width(), 44.0) {
        let x = area.min.x + (tick as f32 + 0.5 - window.x.0) / (window.x.1 - window.x.0) * area.width();
        painter.text(pos2(x, area.max.y + 2.0), egui::Align2::CENTER_TOP, tick, font.clone(), colour);
    }
    for tick in ticks(window.y, area.height(), 18.0) {
        let y = area.min.y + (tick as f32 + 0.5 - window.y.0) / (window.y.1 - window.y.0) * area.height();
        painter.text(pos2(area.min.x - 4.0, y), egui::Align2::RIGHT_CENTER, tick, font.clone(), colour);
    }
    let below = pos2(area.center().x, area.max.y + 16.0);
    painter.text(below, egui::Align2::CENTER_TOP, spec.column_axis, font.clone(), colour);
    let galley = painter.layout_no_wrap(spec.row_axis.to_owned(), font, colour);
    let at = pos2(area.min.x - LEFT + 2.0, area.center().y + galley.size().x / 2.0);
    painter.add(egui::epaint::TextShape::new(at, galley, colour).with_angle(-std::f32::consts::FRAC_PI_2));
}
