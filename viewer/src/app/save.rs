//! Pictures and numbers that become files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use egui::{ColorImage, Context, Rect, TextEdit, Ui, ViewportCommand, Window};
use image::{ImageFormat, RgbaImage};

use super::App;
use crate::numbers::Table;
use crate::selection::Selection;
use crate::source::Notice;
use crate::store::Store;
use crate::subject::Subject;

/// Writes the numbers of a view to a new file. Runs beside the window; the error is shown as it is.
pub type WriteTables = Arc<dyn Fn(&[Table], &Path) -> Result<(), String> + Send + Sync>;
/// Writes something about all that was seen to a new file.
pub type WriteStore = Arc<dyn Fn(&Store, &Subject, &Selection, &Path) -> Result<(), String> + Send + Sync>;

/// How numbers become files. What is not there is not offered.
#[derive(Clone, Default)]
pub struct Exports {
    /// The numbers of a view as CSV.
    pub csv: Option<WriteTables>,
    /// The numbers of a view as npz.
    pub npz: Option<WriteTables>,
    /// What can be written about all that was seen.
    pub whole: Vec<StoreExport>,
}

/// A kind of file about all that was seen.
#[derive(Clone)]
pub struct StoreExport {
    /// What the menu says, for example "Trace for Perfetto".
    pub name: String,
    /// What it is for, in a sentence.
    pub about: String,
    /// How the file's name ends, for example "json".
    pub extension: String,
    /// Writes it.
    pub write: WriteStore,
}

impl Exports {
    /// What can be saved of a view.
    pub(super) fn of_view(&self, view: &str) -> Vec<What> {
        let mut all = vec![What::Picture(view.to_owned())];
        all.extend(self.csv.clone().map(|write| What::Numbers(view.to_owned(), "csv", write)));
        all.extend(self.npz.clone().map(|write| What::Numbers(view.to_owned(), "npz", write)));
        all
    }
}

/// What the user wants to save.
#[derive(Clone)]
pub(super) enum What {
    Picture(String),
    Numbers(String, &'static str, WriteTables),
    Whole(StoreExport),
}

impl What {
    pub(super) fn menu(&self) -> String {
        match self {
            What::Picture(_) => "Picture (PNG)".into(),
            What::Numbers(_, "csv", _) => "Numbers (CSV)".into(),
            What::Numbers(_, kind, _) => format!("Numbers ({kind})"),
            What::Whole(export) => export.name.clone(),
        }
    }

    pub(super) fn about(&self) -> &str {
        match self {
            What::Picture(_) => "the pane as it is on the screen",
            What::Numbers(..) => "all numbers that the view shows",
            What::Whole(export) => &export.about,
        }
    }

    fn extension(&self) -> &str {
        match self {
            What::Picture(_) => "png",
            What::Numbers(_, extension, _) => extension,
            What::Whole(export) => &export.extension,
        }
    }
}

pub(super) struct Saving {
    pub(super) exports: Exports,
    folder: PathBuf,
    dialog: Option<Dialog>,
    /// A view whose picture is to be taken as soon as the dialog is gone.
    picture: Option<(String, PathBuf)>,
    results: (Sender<Notice>, Receiver<Notice>),
}

struct Dialog {
    what: What,
    path: String,
    wrong: Option<String>,
}

impl Saving {
    pub(super) fn new(exports: Exports, folder: PathBuf) -> Self {
        Self { exports, folder, dialog: None, picture: None, results: channel() }
    }
}

/// The menu for all that was seen; none if nothing can be written.
pub(super) fn menu(app: &mut App, ui: &mut Ui) {
    if app.save.exports.whole.is_empty() {
        return;
    }
    let mut wanted = None;
    ui.menu_button("Export", |ui| {
        for export in &app.save.exports.whole {
            if ui.button(&export.name).on_hover_text(&export.about).clicked() {
                wanted = Some(What::Whole(export.clone()));
            }
        }
    });
    if let Some(what) = wanted {
        ask(app, what);
    }
}

/// Asks where to save.
pub(super) fn ask(app: &mut App, what: What) {
    let clean = |text: &str| -> String {
        text.chars().map(|c| if c.is_alphanumeric() || ".-_".contains(c) { c } else { '-' }).collect()
    };
    let name = match &what {
        What::Picture(view) | What::Numbers(view, ..) => format!("{view}-layer{}", app.selection.layer),
        What::Whole(export) => clean(&export.name.to_lowercase()),
    };
    let stem = format!("{}-{name}", clean(&app.subject.name));
    let path = |number: u32| {
        let number = if number > 1 { format!("-{number}") } else { String::new() };
        app.save.folder.join(format!("{stem}{number}.{}", what.extension()))
    };
    let free = (1..1000).map(path).find(|path| !path.exists()).unwrap_or_else(|| path(1));
    app.save.dialog = Some(Dialog { what, path: free.display().to_string(), wrong: None });
}

pub(super) fn ui(app: &mut App, ctx: &Context) {
    while let Ok(notice) = app.save.results.1.try_recv() {
        app.notices.push(notice);
    }
    if let Some((view, path)) = app.save.picture.take() {
        take_picture(app, ctx, &view, path);
    }
    let Some(dialog) = &mut app.save.dialog else { return };
    let (mut saves, mut is_open) = (false, true);
    let title = format!("Save: {}", dialog.what.menu());
    let window = Window::new(title).collapsible(false).resizable(false).anchor(egui::Align2::CENTER_CENTER, [0.0, 0.0]);
    window.open(&mut is_open).fade_out(false).show(ctx, |ui| {
        ui.label(dialog.what.about());
        let edit = ui.add(TextEdit::singleline(&mut dialog.path).desired_width(420.0));
        super::label::label_edit(&edit, "file", &dialog.path);
        if let Some(wrong) = &dialog.wrong {
            ui.colored_label(ui.visuals().error_fg_color, wrong);
        }
        let enter = edit.lost_focus() && ui.input(|input| input.key_pressed(egui::Key::Enter));
        saves = ui.button("Save").clicked() || enter;
    });
    if !is_open {
        app.save.dialog = None;
        return;
    }
    if saves {
        let path = PathBuf::from(dialog.path.trim());
        if path.exists() {
            dialog.wrong = Some("there is a file of this name: choose another".into());
        } else if !path.parent().is_some_and(|folder| folder.as_os_str().is_empty() || folder.is_dir()) {
            dialog.wrong = Some("there is no such folder".into());
        } else if let Some(dialog) = app.save.dialog.take() {
            save(app, ctx, dialog.what, path);
        }
    }
}

fn save(app: &mut App, ctx: &Context, what: What, path: PathBuf) {
    match what {
        What::Picture(view) => {
            app.save.picture = Some((view, path));
            ctx.request_repaint();
        }
        What::Numbers(view, _, write) => {
            let tables = app.numbers(&view).unwrap_or_default();
            beside(app, ctx, path, move |path| write(&tables, path));
        }
        What::Whole(export) => {
            let (store, subject, selection) = (app.store.clone(), Arc::clone(&app.subject), app.selection);
            beside(app, ctx, path, move |path| (export.write)(&store, &subject, &selection, path));
        }
    }
}

/// Writes a file beside the window, and tells how it went.
fn beside(app: &App, ctx: &Context, path: PathBuf, write: impl FnOnce(&Path) -> Result<(), String> + Send + 'static) {
    let (sender, ctx) = (app.save.results.0.clone(), ctx.clone());
    std::thread::spawn(move || {
        let written = write(&path);
        tell(&sender, &ctx, &path, written);
    });
}

fn tell(sender: &Sender<Notice>, ctx: &Context, path: &Path, written: Result<(), String>) {
    let notice = match written {
        Ok(()) => Notice { text: format!("wrote {}", path.display()), is_error: false },
        Err(wrong) => Notice { text: format!("{} was not written: {wrong}", path.display()), is_error: true },
    };
    let _ = sender.send(notice); // the window may be gone
    ctx.request_repaint();
}

fn take_picture(app: &mut App, ctx: &Context, view: &str, path: PathBuf) {
    let Some(place) = app.layout.place(view) else { return };
    let place = place * ctx.pixels_per_point();
    let (sender, waking) = (app.save.results.0.clone(), ctx.clone());
    let done = move |image: Arc<ColorImage>| {
        std::thread::spawn(move || {
            let written = crop(&image, place).and_then(|picture| write_png(&picture, &path));
            tell(&sender, &waking, &path, written);
        });
    };
    ctx.send_viewport_cmd(ViewportCommand::Screenshot(egui::ScreenshotCallback::new(done)));
}

/// The part of a picture within a place, which may reach over its edges.
fn crop(image: &ColorImage, place: Rect) -> Result<RgbaImage, String> {
    let [width, height] = image.size;
    let whole = Rect::from_min_max(egui::Pos2::ZERO, egui::pos2(width as f32, height as f32));
    let place = place.intersect(whole);
    if !place.is_positive() {
        return Err("the pane is not on the screen".into());
    }
    let (x, y) = (place.min.x as u32, place.min.y as u32);
    let size = ((place.max.x as u32).saturating_sub(x), (place.max.y as u32).saturating_sub(y));
    let picture = RgbaImage::from_fn(size.0, size.1, |column, row| {
        let pixel = image.pixels[(y + row) as usize * width + (x + column) as usize];
        image::Rgba(pixel.to_srgba_unmultiplied())
    });
    Ok(picture)
}

/// Writes a new PNG file; nothing stays of one that fails.
fn write_png(picture: &RgbaImage, path: &Path) -> Result<(), String> {
    let file = File::create_new(path).map_err(|wrong| wrong.to_string())?;
    let mut file = BufWriter::new(file);
    let written = picture.write_to(&mut file, ImageFormat::Png).map_err(|wrong| wrong.to_string());
    let written = written.and_then(|()| file.flush().map_err(|wrong| wrong.to_string()));
    if written.is_err() {
        let _ = std::fs::remove_file(path); // the error above says more
    }
    written
}
