//! What watching costs: tokens a second of the demo model's decode with each group of taps against none, and bytes of a
//! recording. `cargo bench --bench taps`.
//!
//! All are measured in turn, several times over, in one process, so that the ratios mean something; the absolute rates
//! are those of whatever machine this runs on.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use moewe::watch::{self, Watch};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, ProgramKind, TapChoice};
use moewe_runtime::{GenerateOptions, Gpu, Model, Selector, Session, SessionOptions};
use moewe_viewer::recording::Recorder;
use moewe_viewer::source::Event;
use moewe_viewer::store::SequenceInfo;

const TOKENS: usize = 128;
const ROUNDS: usize = 9;
const PROMPT: [u32; 8] = [0, 51, 82, 17, 300, 45, 9, 120];

fn main() {
    let gpu = Gpu::open(&Selector::Default).expect("a Vulkan device");
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("bundle");
    let profile = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_else(|| "lavapipe".into());
    let options = Options {
        profile: Profile::load(&profile).unwrap(),
        weights: None,
        reference: false,
        plan_only: false,
        latents: moewe_plan::Latent::F16,
        taps: TapChoice::all(),
    };
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    compile(&Checkpoint::open(&demo).unwrap(), &options, &dir, &|_, _| ()).unwrap();
    let bundle = Bundle::open(&dir).unwrap();
    let mut kinds = watch::kinds(&TapChoice::all(), 1);
    kinds.push(ProgramKind::Forward);
    let model = Model::load_for(&gpu, &bundle, &kinds, &|_| ()).unwrap();
    let session = SessionOptions { kinds, watch: Some(moewe_runtime::Watch::default()), ..SessionOptions::default() };
    let mut session = Session::new(model, session).unwrap();

    let names =
        ["none", "routing", "scores", "latents", "hidden", "attention", "logits", "lens", "mtp", "timing", "all"];
    let choices = names.map(|name| (name, name.parse::<TapChoice>().unwrap()));
    let mut rates = vec![Vec::new(); choices.len()];
    let mut bytes = vec![0; choices.len()];
    let mut dropped = vec![0; choices.len()];
    let mut tokens = Vec::new();
    for round in 0..=ROUNDS {
        for (i, (name, taps)) in choices.iter().enumerate() {
            session.set_watch(taps.clone()).unwrap();
            let file = temp.path().join(format!("{name}.{round}"));
            let run = run(&mut session, &file, &bundle);
            if round == 0 {
                tokens.push(run.tokens); // to warm up, and to see that watching changes nothing
                bytes[i] = run.bytes;
                dropped[i] = run.dropped;
            } else {
                rates[i].push(run.rate);
            }
        }
    }
    assert!(tokens.iter().all(|of| *of == tokens[0]), "watching changed the text");
    println!("{} ({}), {} tokens, median of {ROUNDS}", gpu.info().name, gpu.info().driver_info, TOKENS);
    println!("{:<10} {:>12} {:>9} {:>14} {:>8}", "taps", "tokens/s", "cost", "bytes a token", "dropped");
    let median = |of: &mut Vec<f64>| {
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    let base = median(&mut rates[0]);
    for (i, (name, _)) in choices.iter().enumerate() {
        let rate = median(&mut rates[i]);
        let each = bytes[i].saturating_sub(bytes[0]) as f64 / (TOKENS + PROMPT.len()) as f64;
        println!("{name:<10} {rate:>12.1} {:>8.1}% {each:>14.0} {:>8}", (base / rate - 1.0) * 100.0, dropped[i]);
    }
}

struct Run {
    tokens: Vec<u32>,
    rate: f64,
    bytes: u64,
    dropped: u64,
}

/// Generates and records, in sequence.
fn run(session: &mut Session, file: &Path, bundle: &Bundle) -> Run {
    let subject = moewe_viewer::subject::Subject::from_plan("demo", &bundle.plan, "exact", "");
    let mut recorder = Recorder::create(file, &subject).unwrap();
    let mut watch = Watch::new(session.frame_receiver().unwrap());
    let mut dropped = 0;
    let mut sink = |event| {
        if let Event::Dropped(frames) = event {
            dropped += frames;
        }
        recorder.push(&event)
    };
    let options = GenerateOptions { max_new_tokens: TOKENS, ignore_eos: true, ..GenerateOptions::default() };
    let started = Instant::now();
    let generated = watch
        .generate(session, &PROMPT, SequenceInfo::default(), &options, &mut sink, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    let rate = TOKENS as f64 / started.elapsed().as_secs_f64();
    recorder.finish().unwrap();
    Run { tokens: generated.tokens, rate, bytes: std::fs::metadata(file).unwrap().len(), dropped }
}
