//! Files about what was seen: for the window's menus, and instead of a window.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use egui_wgpu::{WgpuSetup, WgpuSetupExisting};
use moewe_runtime::{Gpu, Handles};
use moewe_viewer::analysis::times::{self, Pass};
use moewe_viewer::app::{App, Exports, StoreExport};
use moewe_viewer::export;
use moewe_viewer::offscreen::{Picture, numbers, picture};
use moewe_viewer::store::{Run, Store};
use moewe_viewer::subject::{StepInfo, Subject};

use crate::cli::args::{PlaceArgs, ThemeArg, ViewArgs};
use crate::cli::{interrupt, output, usage};

/// How long a model may write, or a recording be read, before files are written about it.
const PATIENCE: Duration = Duration::from_hours(24);
/// Work on the store between two looks at Ctrl-C.
const SLICE: Duration = Duration::from_millis(50);
/// Pause between two looks at a source that has nothing yet.
const PAUSE: Duration = Duration::from_millis(2);

/// What draws.
pub fn setup(handles: &Handles) -> WgpuSetup {
    WgpuSetup::Existing(WgpuSetupExisting {
        instance: handles.instance.clone(),
        adapter: handles.adapter.clone(),
        device: handles.device.clone(),
        queue: handles.queue.clone(),
    })
}

/// Light or dark, if it was said.
pub fn theme(args: &ViewArgs) -> Option<egui::Theme> {
    args.place.theme.map(|theme| match theme {
        ThemeArg::Dark => egui::Theme::Dark,
        ThemeArg::Light => egui::Theme::Light,
    })
}

/// Bytes that a step of a run has to move.
fn bytes(step: &StepInfo, run: &Run, subject: &Subject) -> f64 {
    Pass::of(run, subject).map_or(0.0, |pass| times::bytes(step, run, pass))
}

fn chrome(store: &Store, subject: &Subject, path: &Path, overwrite: bool) -> Result<(), export::Error> {
    let runs = store.runs().iter().map(|run| &**run);
    export::chrome_trace(runs, subject, &|step, run| bytes(step, run, subject), path, overwrite)
}

/// What the window's menus offer.
pub fn exports() -> Exports {
    let whole = [
        (
            "Trace for Perfetto",
            "when each kernel ran and for how long",
            "json",
            Arc::new(|store: &Store, subject: &_, _: &_, path: &_| {
                chrome(store, subject, path, false).map_err(|e| e.to_string())
            }) as moewe_viewer::app::WriteStore,
        ),
        (
            "Experts of each token (npz)",
            "int16 [tokens, layers, top_k], as vLLM's routed_experts",
            "npz",
            Arc::new(|store: &Store, subject: &_, selection: &moewe_viewer::selection::Selection, path: &_| {
                let sequence = store.sequence(selection.sequence).ok_or("no text is selected")?;
                export::routed_experts(sequence, subject, path, false).map_err(|e| e.to_string())
            }),
        ),
        (
            "Load for EPLB (npz)",
            "weight [layers, experts], what DeepSeek's expert-parallel load balancer takes",
            "npz",
            Arc::new(|store: &Store, subject: &_, _: &_, path: &_| {
                export::eplb(store, subject, path, false).map_err(|e| e.to_string())
            }),
        ),
    ];
    let whole = whole.map(|(name, about, extension, write)| StoreExport {
        name: name.into(),
        about: about.into(),
        extension: extension.into(),
        write,
    });
    Exports {
        csv: Some(Arc::new(|tables, path| export::csv(tables, path, false).map(drop).map_err(|e| e.to_string()))),
        npz: Some(Arc::new(|tables, path| export::npz(tables, path, false).map_err(|e| e.to_string()))),
        whole: whole.to_vec(),
    }
}

/// Reads a source to its end. What it has to say goes to standard error; an error of the source is one of ours.
pub fn read_all(app: &mut App) -> anyhow::Result<()> {
    let started = Instant::now();
    app.show_all();
    while !app.poll(SLICE) || app.waits_for().is_some() {
        interrupt::check()?;
        anyhow::ensure!(started.elapsed() < PATIENCE, "the source did not end within {PATIENCE:?}");
        std::thread::sleep(PAUSE);
    }
    for notice in app.notices() {
        anyhow::ensure!(!notice.is_error, "{}", notice.text);
        output::note(&format!("moewe: {}", notice.text));
    }
    Ok(())
}

/// Selects the texts that are named.
pub fn select_texts(app: &mut App, place: &PlaceArgs) -> anyhow::Result<()> {
    let find = |flag: &str, wanted: &str| {
        let sequences = app.store().sequences();
        let found = sequences.iter().find(|sequence| sequence.info.name == wanted);
        let numbered = || sequences.iter().find(|sequence| wanted.parse() == Ok(sequence.info.number));
        if let Some(sequence) = found.or_else(numbered) {
            return Ok(sequence.info.number);
        }
        let names: Vec<String> = sequences.iter().map(|s| format!("{} ({:?})", s.info.number, s.info.name)).collect();
        usage(format!("{flag} is {wanted:?}, expected one of {}", names.join(", ")))
    };
    let first = app.store().sequences().first().map(|sequence| sequence.info.number);
    let text = place.text.as_deref().map(|text| find("--text", text)).transpose()?.or(first);
    let other = place.other.as_deref().map(|text| find("--other", text)).transpose()?;
    let tokens = text.and_then(|text| app.store().sequence(text)).map_or(0, |sequence| sequence.tokens.len());
    if let Some(token) = place.token.filter(|token| *token as usize >= tokens) {
        return usage(format!("--token is {token}, but the text has {tokens} tokens, counted from 0"));
    }
    let selection = app.selection_mut();
    selection.sequence = text.unwrap_or(0);
    selection.other = other;
    Ok(())
}

/// Writes all files that are asked for.
pub fn write(args: &ViewArgs, mut app: App, gpu: &Gpu) -> anyhow::Result<()> {
    let files = &args.export;
    read_all(&mut app)?;
    anyhow::ensure!(!app.store().sequences().is_empty(), "{}: there is no text in it", args.model.path().display());
    select_texts(&mut app, &args.place)?;
    let view = args.place.view_name();
    if let (Some(view), true) = (view, files.csv.is_some() || files.npz.is_some()) {
        let tables = numbers(&mut app, view, PATIENCE)?;
        if let Some(path) = &files.csv {
            export::csv(&tables, path, files.overwrite)?;
        }
        if let Some(path) = &files.npz {
            export::npz(&tables, path, files.overwrite)?;
        }
    }
    if let Some(path) = &files.chrome_trace {
        chrome(app.store(), app.subject(), path, files.overwrite)?;
    }
    if let Some(path) = &files.routed_experts {
        let text = app.store().sequence(app.selection().sequence).expect("`select_texts` chose one");
        export::routed_experts(text, app.subject(), path, files.overwrite)?;
    }
    if let Some(path) = &files.eplb {
        export::eplb(app.store(), app.subject(), path, files.overwrite)?;
    }
    if let Some(path) = &files.screenshot {
        let [width, height] = files.size.map(|side| side as f32);
        let wanted = Picture {
            size: [width, height],
            theme: theme(args).unwrap_or(egui::Theme::Dark),
            view: view.map(str::to_owned),
            ..Picture::default()
        };
        let image = picture(&mut app, &wanted, setup(&gpu.handles()))?;
        // Drawing shares the model's device, which would keep its errors to itself.
        if let Some(what) = gpu.stray_error() {
            anyhow::bail!("{}: the picture could not be drawn: {what}", path.display());
        }
        let mut png = std::io::Cursor::new(Vec::new());
        image.write_to(&mut png, image::ImageFormat::Png).context("encoding the picture")?;
        export::file(path, &png.into_inner(), files.overwrite)?;
    }
    Ok(())
}
