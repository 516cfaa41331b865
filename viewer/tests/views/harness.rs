//! A view alone, over made-up numbers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use egui_kittest::{Harness, SnapshotOptions, SnapshotResults};
use moewe_viewer::colour::Palette;
use moewe_viewer::selection::Selection;
use moewe_viewer::source::Command;
use moewe_viewer::store::Store;
use moewe_viewer::subject::Subject;
use moewe_viewer::synthetic::{self, Shape};
use moewe_viewer::view::{Cx, View};

/// A view and all that it needs.
pub struct Stage {
    pub view: Box<dyn View>,
    pub subject: Arc<Subject>,
    pub store: Store,
    pub selection: Selection,
    pub commands: Vec<Command>,
    pub is_live: bool,
}

impl Stage {
    /// A view of a shape that was seen completely; token 20, layer 2, expert 5 are selected.
    pub fn new(view: Box<dyn View>, shape: &Shape) -> Self {
        let selection = Selection { token: Some(20), layer: 2, expert: Some(5), ..Selection::default() };
        let (subject, store) = (Arc::new(shape.subject()), synthetic::store(shape));
        Self { view, subject, store, selection, commands: Vec::new(), is_live: true }
    }

    /// A view of a model that has not run yet.
    pub fn empty(view: Box<dyn View>) -> Self {
        let mut stage = Self::new(view, &Shape::small());
        stage.store = Store::new(32, 1 << 20);
        stage.selection = Selection::default();
        stage
    }

    fn parts(&mut self) -> (&mut dyn View, Cx<'_>) {
        let cx = Cx {
            subject: &self.subject,
            store: &self.store,
            selection: &mut self.selection,
            commands: &mut self.commands,
            is_live: self.is_live,
            palette: Palette::Viridis,
        };
        (&mut *self.view, cx)
    }

    fn ui(&mut self, ui: &mut egui::Ui) {
        let (view, mut cx) = self.parts();
        egui::Frame::central_panel(ui.style()).show(ui, |ui| {
            ui.set_min_size(ui.available_size());
            view.ui(ui, &mut cx);
        });
    }

    /// The numbers that the view gives away.
    pub fn numbers(&mut self) -> Vec<moewe_viewer::numbers::Table> {
        let (view, cx) = self.parts();
        view.numbers(&cx)
    }

    /// Puts the view on a screen of 900 × 640 points.
    pub fn open(self, theme: egui::Theme) -> Harness<'static, Stage> {
        let mut harness = Harness::builder()
            .with_size([900.0, 640.0])
            .with_theme(theme)
            .wgpu()
            .build_ui_state(|ui, stage: &mut Stage| stage.ui(ui), self);
        settle(&mut harness);
        harness
    }
}

/// Draws until nothing is being computed any more.
pub fn settle(harness: &mut Harness<'_, Stage>) {
    let started = Instant::now();
    loop {
        harness.run_steps(3);
        if !harness.state().view.is_busy() {
            break;
        }
        assert!(started.elapsed() < Duration::from_mins(1), "the view computes for a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
    harness.run_steps(2);
}

/// Compares the view with its pictures: light, dark, without data, and at full size.
pub fn pictures(make: &dyn Fn() -> Box<dyn View>) {
    let name = make().name();
    let stages = [
        (format!("{name}-light"), Stage::new(make(), &Shape::small()), egui::Theme::Light),
        (format!("{name}-dark"), Stage::new(make(), &Shape::small()), egui::Theme::Dark),
        (format!("{name}-empty"), Stage::empty(make()), egui::Theme::Dark),
        (format!("{name}-full"), Stage::new(make(), &Shape::full()), egui::Theme::Dark),
    ];
    let mut results = SnapshotResults::new();
    for (name, stage, theme) in stages {
        let mut harness = stage.open(theme);
        harness.snapshot_options(name, &options());
        results.extend_harness(&mut harness);
    }
}

/// Compares the view as it stands with a picture.
pub fn picture(harness: &mut Harness<'_, Stage>, name: &str) {
    harness.snapshot_options(name, &options());
}

/// Drivers round differently at the edges of glyphs and lines.
fn options() -> SnapshotOptions {
    SnapshotOptions::new().threshold(2.0).max_failed_pixels(200)
}
