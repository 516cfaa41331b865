//! `moewe tune`, and profiles with a shape for each kernel.

#[path = "common/cli.rs"]
mod cli;
#[path = "common/golden.rs"]
mod golden;

use std::collections::BTreeMap;

use cli::moewe;
use golden::Golden;
use moewe::tune::{Knob, Options, knobs, tune};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::profile::{Gemm, Profile, SHAPED, Shape};
use moewe_runtime::Error;

/// A small generator of numbers (splitmix64).
struct Random(u64);

impl Random {
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        of[(z ^ (z >> 31)) as usize % of.len()]
    }
}

/// A profile whose kernels all have shapes of their own.
fn random_profile(start: &Profile, random: &mut Random) -> Profile {
    loop {
        let shape = |random: &mut Random| Shape {
            workgroup: random.pick(&[32, 64, 128, 256]),
            lanes: random.pick(&[1, 2, 4, 8, 32]),
            rows: random.pick(&[1, 2, 3, 5]),
            pool_inputs: random.pick(&[true, false]),
        };
        let kernels: BTreeMap<String, Shape> = SHAPED.iter().map(|kernel| ((*kernel).into(), shape(random))).collect();
        let gemm = [None, Some(Gemm::Workgroup), Some(Gemm::Registers { rows: 2, tokens: 5, expert_tokens: 7 })];
        let profile = Profile {
            kernels,
            gemm: random.pick(&gemm),
            token_tile: random.pick(&[2, 3, 8]),
            attention_heads: random.pick(&[4, 8]),
            attention_splits: random.pick(&[1, 3]),
            ..start.clone()
        };
        if profile.check().is_ok() {
            return profile;
        }
    }
}

/// Grids follow shapes: whatever each kernel's is, models give what the golden files say.
#[test]
fn kernels_with_shapes_of_their_own_agree_with_golden_files() {
    let mut random = Random(7);
    for (start, dir) in [("lavapipe", "v3-tiny"), ("generic-vulkan", "v2-lite-tiny"), ("lavapipe", "v3-fp8-tiny")] {
        let profile = random_profile(&golden::profile(start), &mut random);
        println!("{dir}: {:?}, {:?}", profile.kernels, profile.gemm);
        let golden = Golden::open(&format!("golden/{dir}"));
        let checked = golden::check(&golden, &golden::options(profile), Some(4), &[None]);
        assert!(!checked.is_empty(), "{dir}: no sequence fits");
    }
}

fn named(name: &str) -> Vec<Knob> {
    knobs().into_iter().filter(|knob| knob.name == name).collect()
}

fn options() -> Options {
    Options { quick: true, model: "tiny".into(), date: "2026-01-01T00:00:00Z".into() }
}

/// What is tuned is a profile that compiles, and the model stays what it is.
#[test]
fn a_tuned_profile_compiles_and_computes_the_same() {
    let golden = Golden::open("golden/v3-tiny");
    let checkpoint = Checkpoint::open(&golden.dir).unwrap();
    let start = golden::profile("lavapipe");
    let gpu = golden::gpu();
    let outcome =
        tune(&checkpoint, &gpu, &start, &options(), &named("experts_gate_up"), &|done, all| assert!(done <= all))
            .unwrap();
    let tuned = outcome.profile.tuned.as_ref().unwrap();
    assert_eq!((&tuned.device, &tuned.driver_info), (&gpu.info().name, &gpu.info().driver_info));
    assert_eq!(tuned.rows.len(), 1);
    let row = &tuned.rows[0];
    assert!(row.tokens == 1 && row.before_ns > 0 && row.after_ns > 0, "{row:?}");
    assert!(row.variant.starts_with("experts_gate_up."), "{row:?}");
    assert_eq!(outcome.unchanged[0], outcome.profile.kernels.is_empty());
    assert!(outcome.dropped.is_empty() && outcome.skipped.is_empty(), "{outcome:?}");

    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("tuned.json");
    std::fs::write(&file, serde_json::to_string_pretty(&outcome.profile).unwrap()).unwrap();
    let profile = Profile::load(file.to_str().unwrap()).unwrap();
    assert_eq!(profile, outcome.profile);
    let options = golden::options(profile);
    golden::check(&golden, &options, Some(4), &[None]);

    // The plan knows where it belongs, and who runs it elsewhere is told.
    let bundle = golden::bundle(&golden.dir, &temp.path().join("here"), &options);
    assert_eq!(bundle.plan.requirements.tuned_on.unwrap().device, gpu.info().name);
    let run = |bundle: &str| moewe!["run", temp.path().join(bundle), "--tokens", "1,2", "-n", "1"].ok().stderr;
    assert!(!run("here").contains("was tuned on"));
    let mut elsewhere = options.clone();
    elsewhere.profile.tuned.as_mut().unwrap().device = "another GPU".into();
    golden::bundle(&golden.dir, &temp.path().join("elsewhere"), &elsewhere);
    let said = run("elsewhere");
    assert!(said.contains("was tuned on another GPU") && said.contains("moewe tune"), "{said}");
}

#[test]
fn tuning_stops_when_it_is_told_to() {
    static STOP: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    let golden = Golden::open("golden/v3-tiny");
    let checkpoint = Checkpoint::open(&golden.dir).unwrap();
    let gpu = golden::gpu();
    gpu.stop_when(&STOP);
    let stop = |_, _| STOP.store(true, std::sync::atomic::Ordering::Relaxed);
    let stopped = tune(&checkpoint, &gpu, &golden::profile("lavapipe"), &options(), &named("experts_down"), &stop);
    assert!(matches!(stopped, Err(moewe::tune::Error::Run(Error::Interrupted))), "{stopped:?}");
}

#[test]
fn wrong_calls_are_refused_before_anything_is_measured() {
    let temp = tempfile::tempdir().unwrap();
    let there = temp.path().join("there.json");
    std::fs::write(&there, "mine").unwrap();
    let model = Golden::open("golden/v3-tiny").dir;
    for (call, expected) in [
        (moewe!["tune"], "MODEL"),
        (moewe!["tune", temp.path().join("absent")], "no such file or directory"),
        (moewe!["tune", &model, "--output", &there], "exists already"),
        (moewe!["tune", &model, "--device", "no such device"], "no device is called"),
    ] {
        call.refused(2, &[expected]);
    }
    let nowhere = temp.path().join("absent").join("tuned.json");
    let began = std::time::Instant::now();
    moewe!["tune", &model, "--output", &nowhere].refused(1, &["cannot write", "tuned.json", "another --output"]);
    assert!(began.elapsed().as_secs() < 10, "all was measured first");
    assert_eq!(std::fs::read_to_string(&there).unwrap(), "mine");
}
