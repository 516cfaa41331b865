//! Whole models on the device against the golden files: every checkpoint, every sequence, every tensor, with prefill
//! whole and in chunks, from a compiled bundle.

use std::path::{Path, PathBuf};

use moewe::trace::{self, Numbers, Tensors};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_oracle::safetensors::{self, Dtype};
use moewe_plan::{Bundle, Precision, ProgramKind};
use moewe_runtime::{GenerateOptions, Gpu, Model, Selector, Session, SessionOptions, generate};

/// Spec §9: relative L2 of each tensor. Expert ids and greedy tokens must be identical.
const TOLERANCE: f64 = 2e-5;

struct Golden {
    dir: PathBuf,
    sequences: Vec<(String, Vec<u32>, Vec<u32>, PathBuf)>,
}

impl Golden {
    fn open(dir: &Path) -> Self {
        let read = |path: &Path| -> serde_json::Value {
            serde_json::from_str(&std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
                .unwrap()
        };
        let same = dir.join("golden.json");
        let goldens = if same.exists() {
            dir.parent().unwrap().join(read(&same)["same_as"].as_str().unwrap()).join("golden")
        } else {
            dir.join("golden")
        };
        let ids = |value: &serde_json::Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let listed = read(&goldens.join("golden.json"));
        let sequences = listed["sequences"].as_object().unwrap().iter().map(|(name, sequence)| {
            let file = goldens.join(sequence["file"].as_str().unwrap());
            (name.clone(), ids(&sequence["input_ids"]), ids(&sequence["greedy"]), file)
        });
        Self { dir: dir.into(), sequences: sequences.collect() }
    }
}

fn gpu() -> std::sync::Arc<Gpu> {
    Gpu::open(&Selector::Default).expect("these tests need a Vulkan device; `make setup` installs a software one")
}

fn bundle(dir: &Path, out: &Path, profile: Profile) -> Bundle {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options = Options { profile, weights: None, reference: false, plan_only: false };
    let warnings = compile(&checkpoint, &options, out, &|_, _| ()).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    Bundle::open(out).unwrap()
}

fn session(model: &std::sync::Arc<Model>, kinds: Vec<ProgramKind>) -> Session {
    let options = SessionOptions { precision: Precision::Exact, kinds, pages: Some(8), ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

/// Compares a trace with a golden file; returns the worst relative L2 and how many tensors were compared.
fn compare(what: &str, got: &Tensors, file: &Path) -> (f64, usize) {
    let golden = safetensors::read(file).unwrap();
    let (mut worst, mut count) = (0.0f64, 0);
    for (name, tensor) in golden.iter().filter(|(name, _)| !name.starts_with("extra.")) {
        let found = got.get(name).unwrap_or_else(|| panic!("{what}: no tensor {name}"));
        assert_eq!(found.shape, tensor.shape, "{what}: shape of {name}");
        let want = tensor.to_f64();
        match &found.data {
            Numbers::I32(ids) => {
                assert_eq!(tensor.dtype, Dtype::I32, "{what}: type of {name}");
                assert!(ids.iter().map(|&id| f64::from(id)).eq(want.iter().copied()), "{what}: {name} differs");
            }
            Numbers::F32(numbers) => {
                let numbers: Vec<f64> = numbers.iter().map(|&n| f64::from(n)).collect();
                let error = moewe_oracle::rel_l2(&numbers, &want);
                assert!(error <= TOLERANCE, "{what}: {name} is off by {error:e}");
                worst = worst.max(error);
            }
        }
        count += 1;
    }
    (worst, count)
}

fn check_checkpoint(dir: &Path, profile: Profile, chunks: &[Option<usize>]) {
    let golden = Golden::open(dir);
    let temp = tempfile::tempdir().unwrap();
    let bundle = bundle(&golden.dir, &temp.path().join("bundle"), profile);
    let gpu = gpu();
    let model = Model::load(&gpu, &bundle, &|_| ()).unwrap();
    let mut tracing = session(&model, trace::kinds(bundle.plan.model.mtp_modules));
    let mut generating = session(&model, vec![ProgramKind::Forward]);
    assert!(golden.sequences.len() >= 3);
    for (name, ids, greedy, file) in &golden.sequences {
        for chunk in chunks {
            let what = format!("{} {name} chunk {chunk:?}", dir.file_name().unwrap().display());
            let traced = trace::trace(&mut tracing, ids, *chunk, &|_| true).unwrap_or_else(|e| panic!("{what}: {e}"));
            let (worst, count) = compare(&what, &traced, file);
            assert!(count > 10, "{what}: only {count} tensors");
            let options = GenerateOptions {
                max_new_tokens: greedy.len(),
                ignore_eos: true,
                chunk: *chunk,
                ..GenerateOptions::default()
            };
            let generated = generate(&mut generating, ids, &options, |_| std::ops::ControlFlow::Continue(())).unwrap();
            assert_eq!(&generated.tokens, greedy, "{what}: greedy tokens");
            println!("{what}: {count} tensors, worst relative L2 {worst:.1e}");
        }
    }
}

macro_rules! golden {
    ($($name:ident: $dir:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join($dir);
            check_checkpoint(&dir, Profile::load("lavapipe").unwrap(), &[None, Some(1), Some(5), Some(64)]);
        })*

        /// No checkpoint lies there that is not tested.
        #[test]
        fn every_checkpoint_is_tested() {
            let tested = [$($dir),*];
            for root in ["golden", "data"] {
                for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(root)).unwrap() {
                    let path = entry.unwrap().path();
                    if path.join("config.json").exists() {
                        let name = format!("{root}/{}", path.file_name().unwrap().display());
                        assert!(tested.contains(&name.as_str()), "{name} is not tested");
                    }
                }
            }
        }
    };
}

golden! {
    kimi_k2: "golden/kimi-k2-tiny",
    v2_lite: "golden/v2-lite-tiny",
    v2: "golden/v2-tiny",
    v3_bf16: "golden/v3-bf16-tiny",
    v3_bf16_sharded: "golden/v3-bf16-tiny-sharded",
    v3_fp8: "golden/v3-fp8-tiny",
    v3_mtp_accept: "golden/v3-mtp-accept-tiny",
    v3: "golden/v3-tiny",
    v3_odd: "data/v3-odd-tiny",
    v2_odd: "data/v2-odd-tiny",
}
