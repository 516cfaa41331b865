//! The steps of one run along a line of time.

use egui::{Color32, Key, Rect, Sense, Stroke, StrokeKind, Ui, pos2, vec2};

use crate::analysis::times;
use crate::colour::{kind, text_on};
use crate::heat::number;
use crate::store::Run;
use crate::subject::StepInfo;
use crate::tally::{self, Bar, Widths};

/// Steps that are listed below.
const LONGEST: usize = 16;
/// Height of a lane, in points.
const LANE: f32 = 44.0;

/// A line of time that can be zoomed and walked along.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    /// The part that is shown, of 0 to 1.
    window: Option<(f64, f64)>,
    step: Option<usize>,
}

/// A step on the line, in parts of the run.
struct Block {
    step: usize,
    begin: f64,
    end: f64,
    nanoseconds: u64,
}

impl Timeline {
    /// Draws layers above their steps. Ctrl and the wheel zoom, dragging moves, arrow keys lead from step to step.
    pub(super) fn show(
        &mut self,
        ui: &mut Ui,
        run: &Run,
        steps: &[StepInfo],
        say: &dyn Fn(usize, u64) -> String,
        layer: &mut u32,
    ) {
        let blocks = blocks(run);
        let Some(span) = blocks.iter().map(|block| block.end).reduce(f64::max).filter(|span| *span > 0.0) else {
            ui.weak("All steps took no time by the device's clock: it is too coarse.");
            return;
        };
        let kernels = kernels(steps, &blocks);
        ui.add_space(4.0);
        ui.horizontal_wrapped(|ui| {
            for (index, kernel) in kernels.iter().enumerate() {
                let (dot, _) = ui.allocate_exact_size(vec2(10.0, 10.0), Sense::hover());
                ui.painter().rect_filled(dot, 2.0, colour(index));
                ui.weak(*kernel);
            }
        });
        let (area, response) =
            ui.allocate_exact_size(vec2(ui.available_width(), 2.0 * LANE + 24.0), Sense::click_and_drag());
        response.widget_info(|| {
            let selected =
                self.step.and_then(|step| steps.get(step)).map_or(String::new(), |s| format!(", {}", s.label));
            let label = format!("steps of run {}: {} dispatches{selected}", run.number, blocks.len());
            egui::WidgetInfo::labeled(egui::Role::Image, true, label)
        });
        self.navigate(ui, &response, area);
        let window = self.window.unwrap_or((0.0, 1.0));
        let along = |part: f64| area.min.x + ((part / span - window.0) / (window.1 - window.0)) as f32 * area.width();
        let place = |begin: f64, end: f64, lane: f32| {
            let top = area.min.y + lane * LANE;
            Rect::from_min_max(pos2(along(begin), top), pos2(along(end).max(along(begin) + 0.5), top + LANE - 2.0))
        };
        let painter = ui.painter().with_clip_rect(area.intersect(ui.clip_rect()));
        let font = egui::TextStyle::Small.resolve(ui.style());
        painter.rect_filled(area.with_max_y(area.min.y + 2.0 * LANE), 0.0, ui.visuals().faint_bg_color);
        for (of, begin, end) in layers(steps, &blocks) {
            let rect = place(begin, end, 0.0);
            let (fill, text) = match of {
                Some(of) => {
                    let grey =
                        if ui.visuals().dark_mode { 60 + 25 * (of % 2) as u8 } else { 200 + 20 * (of % 2) as u8 };
                    (Color32::from_gray(grey), of.to_string())
                }
                None => (ui.visuals().faint_bg_color, "–".into()),
            };
            painter.rect_filled(rect, 0.0, fill);
            if of == Some(*layer) {
                let mark = Stroke::new(1.5, Color32::from_rgb(255, 80, 80));
                painter.rect_stroke(rect, 0.0, mark, StrokeKind::Inside);
            }
            if rect.width() > 18.0 {
                painter.text(rect.center(), egui::Align2::CENTER_CENTER, text, font.clone(), text_on(fill));
            }
        }
        for block in &blocks {
            let rect = place(block.begin, block.end, 1.0);
            if rect.max.x < area.min.x || rect.min.x > area.max.x {
                continue;
            }
            let kernel = &steps[block.step].kernel;
            let fill = colour(kernels.iter().position(|of| of == kernel).unwrap_or_default());
            painter.rect_filled(rect, 0.0, fill);
            // About six points a letter.
            if rect.width() > 6.0 * kernel.len() as f32 + 6.0 {
                let clip = painter.with_clip_rect(rect.intersect(painter.clip_rect()));
                clip.text(rect.center(), egui::Align2::CENTER_CENTER, kernel, font.clone(), text_on(fill));
            }
            if self.step == Some(block.step) {
                let mark = Stroke::new(2.0, Color32::from_rgb(255, 80, 80));
                painter.rect_stroke(rect.expand(1.0), 0.0, mark, StrokeKind::Outside);
            }
        }
        for tick in 0..=4u8 {
            let part = window.0 + (window.1 - window.0) * f64::from(tick) / 4.0;
            let x = area.min.x + area.width() * f32::from(tick) / 4.0;
            let align = match tick {
                0 => egui::Align2::LEFT_TOP,
                4 => egui::Align2::RIGHT_TOP,
                _ => egui::Align2::CENTER_TOP,
            };
            let text = duration(part * span * 1e-9);
            painter.text(
                pos2(x, area.min.y + 2.0 * LANE + 4.0),
                align,
                text,
                font.clone(),
                ui.visuals().weak_text_color(),
            );
        }
        if response.has_focus() {
            painter.rect_stroke(area, 2.0, ui.visuals().selection.stroke, StrokeKind::Inside);
        }
        let under = |at: egui::Pos2| {
            let hit = |block: &&Block| place(block.begin, block.end, 0.0).x_range().contains(at.x);
            blocks.iter().find(hit)
        };
        if response.clicked()
            && let Some(block) = response.interact_pointer_pos().and_then(under)
        {
            response.request_focus();
            self.step = Some(block.step);
            *layer = steps[block.step].layer.unwrap_or(*layer);
        }
        if response.has_focus() {
            self.walk(ui, &response, &blocks);
            if let Some(of) = self.step.and_then(|step| steps.get(step)).and_then(|step| step.layer) {
                *layer = of;
            }
        }
        let chosen = self.step.and_then(|step| blocks.iter().find(|block| block.step == step));
        ui.add_space(6.0);
        match chosen {
            Some(block) => ui.label(say(block.step, block.nanoseconds)),
            None => ui.weak("Click a step, or walk with the arrow keys. Ctrl and the wheel zoom, dragging moves."),
        };
        if let Some(step) = longest(ui, steps, &blocks) {
            self.step = Some(step);
            *layer = steps[step].layer.unwrap_or(*layer);
        }
        if let Some(block) = response.hover_pos().and_then(under) {
            response.on_hover_text_at_pointer(say(block.step, block.nanoseconds));
        }
    }

    fn navigate(&mut self, ui: &Ui, response: &egui::Response, area: Rect) {
        let (low, high) = self.window.unwrap_or((0.0, 1.0));
        let (mut low, mut length) = (low, high - low);
        if response.double_clicked() {
            (low, length) = (0.0, 1.0);
        }
        let zoom = if response.hovered() { f64::from(ui.input(egui::InputState::zoom_delta)) } else { 1.0 };
        if (zoom - 1.0).abs() > f64::EPSILON
            && let Some(at) = response.hover_pos()
        {
            let unit = f64::from((at.x - area.min.x) / area.width());
            let shorter = (length / zoom).clamp(1e-4, 1.0);
            low += unit * (length - shorter);
            length = shorter;
        }
        low -= f64::from(response.drag_delta().x / area.width()) * length;
        low = low.clamp(0.0, 1.0 - length);
        self.window = (length < 1.0).then_some((low, low + length));
    }

    fn walk(&mut self, ui: &Ui, response: &egui::Response, blocks: &[Block]) {
        let filter = egui::EventFilter { horizontal_arrows: true, ..Default::default() };
        ui.memory_mut(|memory| memory.set_focus_lock_filter(response.id, filter));
        let pressed = |key| ui.input_mut(|input| input.consume_key(egui::Modifiers::NONE, key));
        let at = self.step.and_then(|step| blocks.iter().position(|block| block.step == step));
        let to = if pressed(Key::ArrowLeft) {
            at.map_or(0, |at| at.saturating_sub(1))
        } else if pressed(Key::ArrowRight) {
            at.map_or(0, |at| at + 1)
        } else {
            return;
        };
        self.step = blocks.get(to).map(|block| block.step).or(self.step);
    }
}

/// The steps that took longest. Returns the one that was clicked.
fn longest(ui: &mut Ui, steps: &[StepInfo], blocks: &[Block]) -> Option<usize> {
    let mut longest: Vec<&Block> = blocks.iter().collect();
    longest.sort_by_key(|block| std::cmp::Reverse(block.nanoseconds));
    longest.truncate(LONGEST);
    let most = longest.first().map_or(1, |block| block.nanoseconds).max(1);
    let all: f64 = blocks.iter().map(|block| block.nanoseconds as f64).sum();
    let bar = |block: &&Block| Bar {
        label: steps[block.step].label.clone(),
        value: block.nanoseconds as f32 / most as f32,
        text: format!(
            "{} ({:.1} %)",
            duration(block.nanoseconds as f64 * 1e-9),
            100.0 * block.nanoseconds as f64 / all.max(1.0)
        ),
        hint: "Click to mark it above".into(),
        ..Bar::default()
    };
    let bars: Vec<Bar> = longest.iter().map(bar).collect();
    ui.add_space(6.0);
    ui.strong("longest steps");
    let colour = if ui.visuals().dark_mode { kind(4) } else { kind(0) };
    let area = egui::ScrollArea::vertical().id_salt("longest").auto_shrink([false, false]);
    let clicked =
        area.show(ui, |ui| tally::show(ui, "longest steps", &bars, Widths { label: 210.0, text: 130.0 }, colour, true));
    clicked.inner.map(|row| longest[row].step)
}

/// Times from the start of the first step, in nanoseconds.
fn blocks(run: &Run) -> Vec<Block> {
    let first = times::ran(run).map(|(_, start, _)| start).min().unwrap_or(0);
    let block = |(step, start, nanoseconds): (usize, u64, u64)| {
        let begin = (start - first) as f64;
        Block { step, begin, end: begin + nanoseconds as f64, nanoseconds }
    };
    times::ran(run).map(block).collect()
}

/// The kernels of the steps that ran, in the order in which they come.
fn kernels<'a>(steps: &'a [StepInfo], blocks: &[Block]) -> Vec<&'a str> {
    let mut kernels: Vec<&str> = Vec::new();
    for block in blocks {
        let kernel = steps[block.step].kernel.as_str();
        if !kernels.contains(&kernel) {
            kernels.push(kernel);
        }
    }
    kernels
}

/// Stretches of consecutive steps of one layer.
fn layers(steps: &[StepInfo], blocks: &[Block]) -> Vec<(Option<u32>, f64, f64)> {
    let mut layers: Vec<(Option<u32>, f64, f64)> = Vec::new();
    for block in blocks {
        let layer = steps[block.step].layer;
        match layers.last_mut() {
            Some((of, _, end)) if *of == layer => *end = end.max(block.end),
            _ => layers.push((layer, block.begin, block.end)),
        }
    }
    layers
}

/// Colours of kernels; with more than eight, later ones are lighter.
fn colour(index: usize) -> Color32 {
    let colour = kind(index);
    if index < 8 { colour } else { colour.lerp_to_gamma(Color32::WHITE, 0.45) }
}

/// Seconds as people say them.
pub(super) fn duration(seconds: f64) -> String {
    let number = |value: f64| number(value as f32);
    if seconds >= 1.0 {
        format!("{} s", number(seconds))
    } else if seconds >= 1e-3 {
        format!("{} ms", number(seconds * 1e3))
    } else if seconds >= 1e-6 {
        format!("{} µs", number(seconds * 1e6))
    } else {
        format!("{} ns", number(seconds * 1e9))
    }
}
