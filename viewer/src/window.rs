//! The window.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use egui::{ViewportBuilder, ViewportCommand};
use egui_wgpu::{WgpuConfiguration, WgpuSetup};

use crate::app::App;

/// Name under which layouts and colours are kept, and which window managers see.
const APP_ID: &str = "moewe";
/// How often `closing` is looked at.
const WATCH: Duration = Duration::from_millis(100);

/// How the window is opened.
pub struct Options {
    /// Its title.
    pub title: String,
    /// The device that draws. With [`WgpuSetup::Existing`] it is the model's own.
    pub setup: WgpuSetup,
    /// Closes the window when it becomes true (Ctrl-C in the terminal).
    pub closing: &'static AtomicBool,
    /// Light or dark; what the user chose last, or the system's, without it.
    pub theme: Option<egui::Theme>,
    /// The file that keeps layout and colours between runs; without one, the place where the system keeps such files.
    pub kept: Option<PathBuf>,
}

/// Why there is no window.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing to show a window on.
    #[error(
        "there is no display to open a window on ({0}); draw a picture with --screenshot FILE, or record with --record FILE \
         and view the recording on another machine; over ssh, `ssh -X` forwards a display, and Xvfb makes one in memory"
    )]
    NoDisplay(String),
    /// There is a display, but the window could not be drawn on it.
    #[error("the window could not be opened: {0}; --screenshot FILE draws a picture without one")]
    Window(String),
}

/// Opens a window and runs it until it is closed. Must be called on the main thread, and once only.
pub fn run(app: App, options: Options) -> Result<(), Error> {
    let Options { title, setup, closing, theme, kept } = options;
    let native = eframe::NativeOptions {
        viewport: ViewportBuilder::default()
            .with_app_id(APP_ID)
            .with_title(&title)
            .with_inner_size([1280.0, 800.0])
            .with_min_inner_size([640.0, 400.0]),
        renderer: eframe::Renderer::Wgpu,
        wgpu_options: WgpuConfiguration { wgpu_setup: setup, ..WgpuConfiguration::default() },
        persistence_path: kept,
        ..eframe::NativeOptions::default()
    };
    let create = |creation: &eframe::CreationContext<'_>| -> Result<Box<dyn eframe::App>, _> {
        let mut app = app;
        if let Some(kept) = creation.storage.and_then(|storage| storage.get_string(APP_ID)) {
            app.restore(&kept);
        }
        if let Some(theme) = theme {
            creation.egui_ctx.set_theme(theme);
        }
        let alive = Arc::new(());
        watch(Arc::downgrade(&alive), closing, creation.egui_ctx.clone());
        Ok(Box::new(Shell { app, closing, _alive: alive }))
    };
    eframe::run_native(&title, native, Box::new(create)).map_err(|wrong| match wrong {
        eframe::Error::WinitEventLoop(wrong) => Error::NoDisplay(wrong.to_string()),
        eframe::Error::Winit(wrong) => Error::NoDisplay(wrong.to_string()),
        wrong => Error::Window(wrong.to_string()),
    })
}

/// Wakes the window when it is to close, so that it need not draw just to look. Ends with the window.
fn watch(alive: Weak<()>, closing: &'static AtomicBool, ctx: egui::Context) {
    std::thread::spawn(move || {
        while alive.strong_count() > 0 {
            if closing.load(Ordering::Relaxed) {
                ctx.request_repaint();
            }
            std::thread::sleep(WATCH);
        }
    });
}

struct Shell {
    app: App,
    closing: &'static AtomicBool,
    _alive: Arc<()>,
}

impl eframe::App for Shell {
    fn ui(&mut self, ui: &mut egui::Ui, _frame: &mut eframe::Frame) {
        if self.closing.load(Ordering::Relaxed) {
            ui.ctx().send_viewport_cmd(ViewportCommand::Close);
        }
        self.app.ui(ui);
    }

    fn save(&mut self, storage: &mut dyn eframe::Storage) {
        storage.set_string(APP_ID, self.app.kept());
    }
}
