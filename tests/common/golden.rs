//! Compiling, running and comparing whole models with golden files.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moewe::trace::{self, Numbers, Tensors};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_oracle::safetensors::{self, Dtype};
use moewe_oracle::{Data, Tensor};
use moewe_plan::{Bundle, Precision, ProgramKind, TapChoice};
use moewe_runtime::{GenerateOptions, Gpu, Model, Selector, Session, SessionOptions, generate};

/// Spec §9: relative L2 of each tensor. Expert ids and greedy tokens must be identical.
pub const TOLERANCE: f64 = 2e-5;

/// A prompt, what greedy decoding appends to it, and the tensors of its forward pass.
pub struct Sequence {
    pub name: String,
    pub ids: Vec<u32>,
    pub greedy: Vec<u32>,
    pub file: PathBuf,
}

/// A checkpoint with golden files.
pub struct Golden {
    pub dir: PathBuf,
    pub sequences: Vec<Sequence>,
}

impl Golden {
    /// From a directory below `tests`.
    pub fn open(dir: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(dir);
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
        let sequences = listed["sequences"].as_object().unwrap().iter().map(|(name, sequence)| Sequence {
            name: name.clone(),
            ids: ids(&sequence["input_ids"]),
            greedy: ids(&sequence["greedy"]),
            file: goldens.join(sequence["file"].as_str().unwrap()),
        });
        Self { sequences: sequences.collect(), dir }
    }

    pub fn sequence(&self, name: &str) -> &Sequence {
        self.sequences.iter().find(|sequence| sequence.name == name).unwrap_or_else(|| panic!("no sequence {name}"))
    }
}

pub fn gpu() -> Arc<Gpu> {
    Gpu::open(&Selector::Default).expect("these tests need a Vulkan device; `make setup` installs a software one")
}

/// Weights as they are, copied.
pub fn options(profile: Profile) -> Options {
    Options {
        profile,
        weights: None,
        reference: false,
        plan_only: false,
        latents: moewe_plan::Latent::F16,
        taps: TapChoice::all(),
    }
}

pub fn profile(name: &str) -> Profile {
    Profile::load(name).unwrap()
}

pub fn bundle(dir: &Path, out: &Path, options: &Options) -> Bundle {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let warnings = compile(&checkpoint, options, out, &|_, _| ()).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    Bundle::open(out).unwrap()
}

/// A session; `pages` `None` takes as many as the longest context needs and a binding holds.
pub fn session(model: &Arc<Model>, kinds: Vec<ProgramKind>, pages: Option<u32>, precision: Precision) -> Session {
    let options = SessionOptions { precision, kinds, pages, ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

/// Whether a tensor of a trace agrees; returns the relative L2 error, 0 for ids.
pub fn compare_tensor(what: &str, got: &Tensors, name: &str, want: &Tensor, tolerance: f64) -> f64 {
    let found = got.get(name).unwrap_or_else(|| panic!("{what}: no tensor {name}"));
    assert_eq!(found.shape, want.shape, "{what}: shape of {name}");
    match (&found.data, &want.data) {
        (Numbers::I32(ids), Data::I32(want)) => {
            assert_eq!(ids, want, "{what}: {name} differs");
            0.0
        }
        (Numbers::F32(numbers), Data::F64(want)) => {
            let numbers: Vec<f64> = numbers.iter().map(|&n| f64::from(n)).collect();
            let error = moewe_oracle::rel_l2(&numbers, want);
            assert!(error <= tolerance, "{what}: {name} is off by {error:e}");
            error
        }
        _ => panic!("{what}: type of {name}"),
    }
}

/// Compares a trace with a golden file; returns the worst relative L2 and how many tensors were compared.
pub fn compare(what: &str, got: &Tensors, file: &Path) -> (f64, usize) {
    let golden = safetensors::read(file).unwrap();
    let (mut worst, mut count) = (0.0f64, 0);
    for (name, tensor) in golden.iter().filter(|(name, _)| !name.starts_with("extra.")) {
        assert!(matches!(tensor.dtype, Dtype::I32 | Dtype::F32), "{what}: type of {name}");
        worst = worst.max(compare_tensor(what, got, name, &tensor.to_tensor(), TOLERANCE));
        count += 1;
    }
    (worst, count)
}

/// Greedy tokens behind a prompt.
pub fn greedy(session: &mut Session, ids: &[u32], count: usize, chunk: Option<usize>) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens: count, ignore_eos: true, chunk, ..GenerateOptions::default() };
    generate(session, ids, &options, |_| std::ops::ControlFlow::Continue(())).unwrap().tokens
}

/// Traces and greedy tokens of every sequence that fits the cache, against the golden files, with prefill in chunks.
/// Returns the names of the sequences.
pub fn check(golden: &Golden, options: &Options, pages: Option<u32>, chunks: &[Option<usize>]) -> Vec<String> {
    let temp = tempfile::tempdir().unwrap();
    let bundle = bundle(&golden.dir, &temp.path().join("bundle"), options);
    let model = Model::load(&gpu(), &bundle, &|_| ()).unwrap();
    let mut tracing = session(&model, trace::kinds(bundle.plan.model.mtp_modules), pages, Precision::Exact);
    let mut generating = session(&model, vec![ProgramKind::Forward], pages, Precision::Exact);
    assert!(golden.sequences.len() >= 3);
    let mut checked = Vec::new();
    for Sequence { name, ids, greedy: expected, file } in &golden.sequences {
        let fits = ids.len() + expected.len() <= generating.max_context();
        if !fits || ids.len() + bundle.plan.model.mtp_modules as usize > tracing.max_context() {
            assert!(pages.is_none(), "{name} does not fit");
            continue;
        }
        for chunk in chunks {
            let what = format!("{} {name} {} chunk {chunk:?}", golden.dir.display(), options.profile.name);
            let traced = trace::trace(&mut tracing, ids, *chunk, &|_| true).unwrap_or_else(|e| panic!("{what}: {e}"));
            let (worst, count) = compare(&what, &traced, file);
            assert!(count > 10, "{what}: only {count} tensors");
            let tokens = greedy(&mut generating, ids, expected.len(), *chunk);
            assert_eq!(&tokens, expected, "{what}: greedy tokens");
            println!("{what}: {count} tensors, worst relative L2 {worst:.1e}");
        }
        checked.push(name.clone());
    }
    checked
}
