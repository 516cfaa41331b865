//! What the engine brings: drafts against none, many sequences against one after the other, a shared beginning against
//! none; of the demo model. `cargo bench --bench engine [PROFILE]`.
//!
//! All are measured in one process, alternating, so that the ratios mean something; the absolute rates are those of
//! whatever machine this runs on. Tokens are compared on the way: none of this may change any.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moewe::text::Text;
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, ProgramKind, Sampling, TapChoice};
use moewe_runtime::engine::{Engine, EngineOptions, Finished, Mtp, Request};
use moewe_runtime::{Gpu, Model, Selector, Session, SessionOptions};

const PROMPTS: usize = 200;
const NEW_TOKENS: usize = 24;
const SEQUENCES: usize = 64;

fn main() {
    let gpu = Gpu::open(&Selector::Default).expect("a Vulkan device");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let profile = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_else(|| "lavapipe".into());
    let options = Options {
        profile: Profile::load(&profile).unwrap(),
        weights: None,
        reference: false,
        plan_only: false,
        latents: moewe_plan::Latent::F16,
        taps: TapChoice::none(),
    };
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("bundle");
    let demo = root.join("models/demo");
    compile(&Checkpoint::open(&demo).unwrap(), &options, &dir, &|_, _| ()).unwrap();
    let model = Model::load(&gpu, &Bundle::open(&dir).unwrap(), &|_| ()).unwrap();
    println!("{} ({} {}), profile {profile}", gpu.info().name, gpu.info().driver, gpu.info().driver_info);

    let text = Text::load(&demo).unwrap().expect("the demo model has a tokenizer");
    let sample = std::fs::read_to_string(root.join("tests/data/perplexity/text.txt")).unwrap();
    let ids = text.encode(&sample, false).unwrap();
    // Beginnings from all over the text, of 4 to 40 tokens.
    let prompts: Vec<Vec<u32>> =
        (0..PROMPTS).map(|i| ids[i * (ids.len() - 40) / PROMPTS..][..4 + i * 7 % 37].to_vec()).collect();
    drafts(&model, &prompts);
    batches(&model, &prompts);
    beginnings(&model, &ids);
}

fn engine(model: &Arc<Model>, max_sequences: u32, options: &EngineOptions) -> Engine {
    let kinds = vec![ProgramKind::Forward, ProgramKind::Draft { module: 1 }];
    let session = SessionOptions { kinds, max_sequences, pages: Some(512), ..SessionOptions::default() };
    Engine::new(Session::new(model.clone(), session).unwrap(), options).unwrap()
}

fn request(prompt: &[u32], max_new_tokens: usize, temperature: f32) -> Request {
    let sampling = Sampling { temperature, seed_low: 7, ..Sampling::default() };
    Request { prompt: prompt.to_vec(), max_new_tokens, sampling, ignore_eos: true, ..Request::default() }
}

/// A single stream with drafts against the same without.
fn drafts(model: &Arc<Model>, prompts: &[Vec<u32>]) {
    let modes = [("off", Mtp::Off), ("1", Mtp::Fixed(1)), ("2", Mtp::Fixed(2)), ("auto", Mtp::Auto)];
    for (name, temperature, count) in [("greedy", 0.0, prompts.len()), ("temperature 0.7", 0.7, 40)] {
        let mut seconds = vec![0.0; modes.len()];
        let mut tokens = vec![0; modes.len()];
        let mut acceptance: Vec<Vec<(u64, u64)>> = vec![Vec::new(); modes.len()];
        let engines = modes
            .map(|(_, mtp)| engine(model, 1, &EngineOptions { mtp, prefix_cache: false, ..EngineOptions::default() }));
        for prompt in &prompts[..count] {
            let mut first = Vec::new();
            for (i, engine) in engines.iter().enumerate() {
                let request = request(prompt, NEW_TOKENS, temperature);
                let (found, finished) = engine.submit(request).unwrap().finish().unwrap();
                if i == 0 {
                    first.clone_from(&found);
                }
                assert_eq!(found, first, "drafts change nothing");
                seconds[i] += finished.decode.as_secs_f64();
                tokens[i] += finished.new_tokens - 1;
                let sums = &mut acceptance[i];
                sums.resize(sums.len().max(finished.acceptance.len()), (0, 0));
                for (sum, (drafted, accepted)) in sums.iter_mut().zip(finished.acceptance) {
                    *sum = (sum.0 + drafted, sum.1 + accepted);
                }
            }
        }
        println!("\n{name}, {count} prompts of {NEW_TOKENS} new tokens, one at a time; tokens are the same");
        for (i, (mode, _)) in modes.iter().enumerate() {
            let rate = tokens[i] as f64 / seconds[i];
            let speed_up = rate / (tokens[0] as f64 / seconds[0]);
            let tried = acceptance[i].iter().filter(|position| position.0 > 0);
            let shares = tried.map(|&(drafted, accepted)| accepted as f64 / drafted.max(1) as f64);
            let shares: Vec<String> = shares.map(|share| format!("{share:.3}")).collect();
            let drafted: u64 = acceptance[i].iter().map(|position| position.0).sum();
            println!(
                "  --mtp {mode:<5} {rate:7.1} tokens/s  x{speed_up:.3}  accepted by position {shares:?} of {drafted}"
            );
        }
    }
}

/// Many sequences of mixed length and arrival against the same one after the other.
fn batches(model: &Arc<Model>, prompts: &[Vec<u32>]) {
    let requests: Vec<Request> = (0..SEQUENCES)
        .map(|i| {
            let (from, count) = (i * 3 % (prompts.len() - 6), 1 + i % 6);
            let prompt: Vec<u32> = prompts[from..from + count].concat();
            request(&prompt, 8 + i * 5 % 57, if i % 2 == 0 { 0.0 } else { 0.7 })
        })
        .collect();
    let mut alone = Vec::new();
    let single = engine(model, 1, &EngineOptions { mtp: Mtp::Off, prefix_cache: false, ..EngineOptions::default() });
    let started = Instant::now();
    for request in &requests {
        alone.push(single.submit(request.unconstrained()).unwrap().finish().unwrap());
    }
    let one_by_one = started.elapsed();
    let all: usize = alone.iter().map(|(tokens, finished)| tokens.len() + finished.prompt_tokens).sum();
    println!("\n{SEQUENCES} sequences, {all} tokens in and out; tokens are the same");
    println!("  one after the other  {:8.1} tokens/s", all as f64 / one_by_one.as_secs_f64());
    for (places, mtp) in [(8, Mtp::Off), (64, Mtp::Off), (64, Mtp::Auto)] {
        let engine = engine(model, places, &EngineOptions { mtp, prefix_cache: false, ..EngineOptions::default() });
        let started = Instant::now();
        let mut streams = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            streams.push(engine.submit(request.unconstrained()).unwrap());
            if i % 8 == 7 {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        let done: Vec<(Vec<u32>, Finished)> = streams.into_iter().map(|stream| stream.finish().unwrap()).collect();
        let elapsed = started.elapsed();
        for ((found, _), (expected, _)) in done.iter().zip(&alone) {
            assert_eq!(found, expected, "batches change nothing");
        }
        let longest = |of: &dyn Fn(&Finished) -> Duration| done.iter().map(|(_, finished)| of(finished)).max().unwrap();
        println!(
            "  {places:>2} at once, mtp {:<5} {:8.1} tokens/s  x{:.2}  worst wait {:.2} s, worst time to the first token {:.2} s",
            if mtp == Mtp::Off { "off" } else { "auto" },
            all as f64 / elapsed.as_secs_f64(),
            one_by_one.as_secs_f64() / elapsed.as_secs_f64(),
            longest(&|finished| finished.waited).as_secs_f64(),
            longest(&|finished| finished.waited + finished.prefill).as_secs_f64(),
        );
    }
}

/// A second request that begins like a first one.
fn beginnings(model: &Arc<Model>, ids: &[u32]) {
    println!("\nprompts with a shared beginning");
    for shared in [128, 1000] {
        let temp = tempfile::tempdir().unwrap();
        let cache_dir = Some((temp.path().join("cache"), 1 << 30));
        let options = EngineOptions { mtp: Mtp::Off, cache_dir, ..EngineOptions::default() };
        let prompt = |tail: &[u32]| request(&[&ids[..shared], tail].concat(), 1, 0.0);
        let tell = |name: &str, finished: &Finished| {
            println!(
                "  {shared:>4} tokens, {name:<24} computed {:>4}, first token after {:8.1} ms",
                finished.prompt_tokens - finished.cached_tokens,
                finished.prefill.as_secs_f64() * 1e3
            );
        };
        let first = engine(model, 2, &options);
        tell("nothing there", &first.submit(prompt(&[1, 2])).unwrap().finish().unwrap().1);
        tell("in the device's memory", &first.submit(prompt(&[3, 4])).unwrap().finish().unwrap().1);
        drop(first);
        let second = engine(model, 2, &options);
        tell("on disk", &second.submit(prompt(&[5, 6])).unwrap().finish().unwrap().1);
    }
}
