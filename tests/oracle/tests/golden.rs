//! Every golden checkpoint and sequence against the oracle: all tensors, greedy tokens, accepted drafts.

use std::path::{Path, PathBuf};

use moewe_oracle::model::{Attention, Cache};
use moewe_oracle::{Data, Model, Trace, rel_l2, safetensors};
use serde_json::Value;

/// Goldens are float32 casts of float64 results, so about 3e-8 apart.
const TOLERANCE: f64 = 1e-6;

fn json(path: &Path) -> Value {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn ids(json: &Value) -> Vec<u32> {
    let list = json.as_array().unwrap_or_else(|| panic!("not a list: {json}"));
    list.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn load(dir: &Path) -> Model {
    Model::load(dir).unwrap_or_else(|e| panic!("{e}"))
}

fn tests_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Directory that holds a checkpoint's golden.json and golden tensors.
fn golden_dir(checkpoint: &Path) -> PathBuf {
    let link = checkpoint.join("golden.json");
    if !link.exists() {
        return checkpoint.join("golden");
    }
    let same_as = json(&link)["same_as"].as_str().expect("same_as").to_owned();
    checkpoint.with_file_name(same_as).join("golden")
}

/// Compares with the golden tensors, `extra.*` aside; returns how many there were.
fn compare(got: &Trace, file: &Path) -> usize {
    let golden = safetensors::read(file).unwrap_or_else(|e| panic!("{e}"));
    let wanted: Vec<_> = golden.iter().filter(|(name, _)| !name.starts_with("extra.")).collect();
    let names: Vec<_> = wanted.iter().map(|(name, _)| *name).collect();
    assert_eq!(got.keys().collect::<Vec<_>>(), names, "{}", file.display());
    for (name, want) in &wanted {
        let (got, want) = (&got[*name], want.to_tensor());
        assert_eq!(got.shape, want.shape, "{name}");
        match (&got.data, &want.data) {
            (Data::F64(got), Data::F64(want)) => {
                let error = rel_l2(got, want);
                assert!(error <= TOLERANCE, "{}: {name} is off by {error:e}", file.display());
            }
            (got, want) => assert_eq!(got, want, "{name}"),
        }
    }
    wanted.len()
}

/// Checks a checkpoint; `tensors` is the number of golden tensors of each of its `sequences` sequences.
fn check(folder: &str, sequences: usize, tensors: usize) {
    let dir = tests_dir().join(folder);
    let (model, golden) = (load(&dir), golden_dir(&dir));
    let meta = json(&golden.join("golden.json"));
    let meta = meta["sequences"].as_object().expect("sequences");
    assert_eq!(meta.len(), sequences, "sequences of {folder}");
    for (name, sequence) in meta {
        let prompt = ids(&sequence["input_ids"]);
        let file = golden.join(sequence["file"].as_str().expect("a file name"));
        assert_eq!(compare(&model.trace(&prompt), &file), tensors, "tensors of {folder}, {name}");

        let greedy = ids(&sequence["greedy"]);
        assert!(greedy.len() >= 8, "{folder}, {name}: too few greedy tokens");
        assert_eq!(model.greedy(&prompt, greedy.len()), greedy, "{folder}, {name}");
        let (tokens, accepted) = model.speculative(&prompt, greedy.len());
        assert_eq!(tokens, greedy, "{folder}, {name}: speculative decoding is not lossless");
        if model.config.mtp_modules == 0 {
            assert!(accepted.iter().all(|&n| n == 0));
        } else {
            let accepted: Vec<u32> = accepted.into_iter().map(|n| n as u32).collect();
            assert_eq!(accepted, ids(&sequence["mtp_accepted"]), "{folder}, {name}");
        }
    }
}

macro_rules! golden_tests {
    ($($test:ident: $folder:literal, $sequences:literal x $tensors:literal;)*) => {
        $(#[test] fn $test() { check($folder, $sequences, $tensors); })*
    };
}

// Tensors: 3 (ids, final norm, logits), L + 1 hidden states, 2 for each layer's attention, 3 for each MoE layer and
// for each MTP module.
golden_tests! {
    v3_tiny: "golden/v3-tiny", 4 x 33;
    v3_fp8_tiny: "golden/v3-fp8-tiny", 4 x 27;
    v3_bf16_tiny: "golden/v3-bf16-tiny", 4 x 33;
    v3_bf16_tiny_sharded: "golden/v3-bf16-tiny-sharded", 4 x 33;
    v3_mtp_accept_tiny: "golden/v3-mtp-accept-tiny", 4 x 27;
    v2_lite_tiny: "golden/v2-lite-tiny", 4 x 25;
    v2_tiny: "golden/v2-tiny", 4 x 25;
    kimi_k2_tiny: "golden/kimi-k2-tiny", 4 x 19;
    v3_odd_tiny: "data/v3-odd-tiny", 3 x 41;
    v2_odd_tiny: "data/v2-odd-tiny", 3 x 16;
}

/// A checkpoint folder that no test above names would otherwise go unnoticed.
#[test]
fn every_checkpoint_is_tested() {
    let source = include_str!("golden.rs");
    let mut found = 0;
    for folder in ["golden", "data"] {
        let entries = std::fs::read_dir(tests_dir().join(folder)).expect("a folder");
        for entry in entries.map(|e| e.expect("an entry")).filter(|e| e.path().join("config.json").exists()) {
            let name = format!("\"{folder}/{}\"", entry.file_name().display());
            assert!(source.contains(&name), "{name} has no test");
            found += 1;
        }
    }
    assert!(found >= 10, "only {found} checkpoints");
}

#[test]
fn naive_and_absorbed_attention_agree() {
    let prompt: Vec<u32> = (0..40).map(|i| i * i * 7 % 120).collect();
    for folder in ["golden/v3-tiny", "golden/v2-lite-tiny", "golden/v3-fp8-tiny", "data/v2-odd-tiny"] {
        let mut model = load(&tests_dir().join(folder));
        let absorbed = model.trace(&prompt);
        model.attention = Attention::Naive;
        let naive = model.trace(&prompt);
        assert!(absorbed.len() >= 16 && absorbed.len() == naive.len());
        assert_ne!(absorbed["logits"], naive["logits"], "both forms ran the same code");
        for (name, tensor) in &absorbed {
            match &tensor.data {
                Data::F64(values) => {
                    let error = rel_l2(naive[name].f64s(), values);
                    assert!(error <= 1e-11, "{folder}: {name} differs by {error:e}");
                }
                Data::I32(_) => assert_eq!(&naive[name], tensor, "{folder}: {name}"),
            }
        }
    }
}

/// Prefill in pieces over a cache gives what one pass gives, also after a rejected tail was cut off.
#[test]
fn a_cache_changes_nothing() {
    let model = load(&tests_dir().join("golden/v3-tiny"));
    let prompt: Vec<u32> = (0..20).map(|i| i * 31 % 300).collect();
    let whole = model.forward(&prompt, &mut Cache::default());
    let mut cache = Cache::default();
    model.forward(&prompt[..7], &mut cache);
    model.forward(&[1, 2, 3], &mut cache);
    cache.truncate(0..model.config.layers, 7);
    assert_eq!(cache.rows(0), 7);
    let rest = model.forward(&prompt[7..], &mut cache);
    let error = rel_l2(&rest.logits, &whole.logits[7 * model.config.vocab..]);
    assert!(error <= 1e-12, "off by {error:e}");
}
