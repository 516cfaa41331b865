//! Time and memory of the window at the size of DeepSeek-V3, drawn where nobody sees it:
//! `cargo bench -p moewe-viewer --bench frame`.

use std::time::{Duration, Instant};

use moewe_viewer::app::{App, Options};
use moewe_viewer::offscreen::{Picture, Stage};
use moewe_viewer::store::Store;
use moewe_viewer::synthetic::{Shape, Synthetic};

/// Frames that are measured.
const FRAMES: usize = 200;

fn main() {
    let shape = Shape::full();
    let started = Instant::now();
    let source = Box::new(Synthetic::new(&shape));
    println!("{:.1} s to make up {} tokens", started.elapsed().as_secs_f64(), tokens(&shape));
    let mut app = App::new(source, shape.subject(), Options::default());
    let picture = Picture::default();
    let mut stage = match Stage::new(&picture, egui_wgpu::WgpuSetup::without_display_handle()) {
        Ok(stage) => stage,
        Err(wrong) => return println!("frames are not measured: {wrong}"),
    };
    let (started, mut times) = (Instant::now(), Vec::new());
    loop {
        let frame = Instant::now();
        stage.frame(|ui| app.ui(ui));
        times.push(frame.elapsed().as_secs_f64() * 1e3);
        if app.waits_for().is_none() {
            break;
        }
    }
    let (held, budget) = app.store().memory();
    let (median, most) = percentiles(times);
    println!(
        "{:.2} s to take them in while drawing, ui {median:.2} ms a frame, 99 % {most:.2} ms; {} MiB of {} MiB held, {} \
         MiB resident",
        started.elapsed().as_secs_f64(),
        held >> 20,
        budget >> 20,
        resident()
    );
    println!("\nmilliseconds of a frame        ui: median    99 %   tessellate: median    99 %   draw: median    99 %");
    for view in app.names() {
        app.focus(view);
        measure(&mut app, &mut stage, &format!("standing, {view} in front"), false);
    }
    measure(&mut app, &mut stage, "another token each frame", true);
    println!("\n{} MiB resident", resident());
    drop((app, stage));
    an_hour();
}

/// Memory while a model of that size writes for an hour at 20 tokens a second, with routing and latents watched.
fn an_hour() {
    const TOKENS: u32 = 72_000;
    let shape = Shape {
        texts: vec![("hour".into(), TOKENS)],
        taps: "routing,latents".parse().expect("groups"),
        ..Shape::full()
    };
    let mut store = Store::new(shape.experts.0, Options::default().budget);
    let mut most = 0;
    let mut worst = Duration::ZERO;
    for event in shape.events() {
        let started = Instant::now();
        store.apply(event);
        worst = worst.max(started.elapsed());
        most = most.max(store.memory().0);
    }
    let load: u64 = store.load(30).map_or(0, |load| load.tokens.iter().sum());
    assert_eq!(load, u64::from(TOKENS) * u64::from(shape.experts.1), "running totals lose nothing");
    println!(
        "an hour, {TOKENS} tokens: at most {} MiB held, {} blocks of rows let go, {} MiB resident; {:.2} ms for the \
         slowest of its frames of 64 tokens",
        most >> 20,
        store.lost().0,
        resident(),
        worst.as_secs_f64() * 1e3
    );
}

fn tokens(shape: &Shape) -> u32 {
    shape.texts.iter().map(|(_, tokens)| tokens).sum()
}

/// Times of frames, after everything has been computed once.
fn measure(app: &mut App, stage: &mut Stage, name: &str, moves: bool) {
    let settled = Instant::now();
    while settled.elapsed() < Duration::from_secs(30) {
        stage.frame(|ui| app.ui(ui));
        if app.waits_for().is_none() {
            break;
        }
    }
    let mut times: [Vec<f64>; 3] = [Vec::new(), Vec::new(), Vec::new()];
    for frame in 0..FRAMES {
        if moves {
            app.selection_mut().token = Some(frame as u32 * 7);
        }
        let mut timed = |slot: usize, work: &mut dyn FnMut()| {
            let started = Instant::now();
            work();
            times[slot].push(started.elapsed().as_secs_f64() * 1e3);
        };
        timed(0, &mut || stage.frame(|ui| app.ui(ui)));
        timed(1, &mut || drop(stage.tessellate()));
        if frame % 10 == 0 {
            timed(2, &mut || drop(stage.read().expect("drawn")));
        }
    }
    let [ui, tessellate, draw] = times.map(percentiles);
    println!(
        "{name:<36} {:>7.2} {:>7.2} {:>20.2} {:>7.2} {:>14.1} {:>7.1}",
        ui.0, ui.1, tessellate.0, tessellate.1, draw.0, draw.1
    );
}

/// The median, and what 99 % stay below.
fn percentiles(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    (at(0.5), at(0.99))
}

/// MiB of this process in memory, where the system tells.
fn resident() -> String {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.as_deref().and_then(|pages| pages.split(' ').nth(1)?.parse::<usize>().ok());
    pages.map_or("?".into(), |pages| ((pages * 4096) >> 20).to_string())
}
