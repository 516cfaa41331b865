//! The viewer's window over numbers that are made up: `cargo run -p moewe-viewer --example synthetic [-- full]`.

use std::sync::atomic::AtomicBool;

use moewe_viewer::app::{App, Options};
use moewe_viewer::synthetic::{Shape, Synthetic};
use moewe_viewer::window;

static CLOSING: AtomicBool = AtomicBool::new(false);

fn main() -> Result<(), window::Error> {
    let shape = if std::env::args().any(|word| word == "full") { Shape::full() } else { Shape::small() };
    let app = App::new(Box::new(Synthetic::new(&shape)), shape.subject(), Options::default());
    let options = window::Options {
        title: "moewe".into(),
        setup: egui_wgpu::WgpuSetup::without_display_handle(),
        closing: &CLOSING,
        theme: None,
        kept: None,
    };
    window::run(app, options)
}
