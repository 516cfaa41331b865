//! Checkpoints: what opens, and each kind of damage with the words it is reported in.

use std::{
    fs,
    path::{Path, PathBuf},
};

use moewe_compiler::{checkpoint::Checkpoint, dtype::Dtype, error::Result, tensors};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn text(result: Result<impl Sized>) -> String {
    let message = result.err().expect("should have been refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[track_caller]
fn holds(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// Something done to header and data of a file.
type Change<'a> = &'a dyn Fn(&mut Map<String, Value>, &mut Vec<u8>);

/// Header (without its length) and data of a safetensors file.
fn split(file: &[u8]) -> (Map<String, Value>, Vec<u8>) {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + n]).unwrap(), file[8 + n..].to_vec())
}

fn join(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A copy of golden checkpoint `name` whose one safetensors file went through `change`.
fn changed(name: &str, change: Change) -> TempDir {
    let (mut header, mut data) = split(&fs::read(golden(name).join("model.safetensors")).unwrap());
    change(&mut header, &mut data);
    with_file(name, &join(&Value::Object(header).to_string(), &data))
}

fn with_file(name: &str, file: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden(name).join("config.json"), dir.path().join("config.json")).unwrap();
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    dir
}

/// Removes a tensor and its bytes.
fn remove(header: &mut Map<String, Value>, data: &mut Vec<u8>, name: &str) {
    replace(header, data, name, None);
}

/// Replaces dtype, shape and bytes of a tensor (or removes it) and moves the others.
fn replace(header: &mut Map<String, Value>, data: &mut Vec<u8>, name: &str, new: Option<(&str, Value, Vec<u8>)>) {
    let entry = header.remove(name).unwrap_or_else(|| panic!("no tensor {name}"));
    let at = |v: &Value, i: usize| v["data_offsets"][i].as_u64().unwrap() as usize;
    let (begin, end) = (at(&entry, 0), at(&entry, 1));
    let bytes = new.as_ref().map_or(Vec::new(), |n| n.2.clone());
    let grown = bytes.len();
    data.splice(begin..end, bytes);
    for (_, other) in header.iter_mut().filter(|(k, _)| *k != "__metadata__") {
        if at(other, 0) >= end {
            let moved = [0, 1].map(|i| at(other, i) - (end - begin) + grown);
            other["data_offsets"] = json!(moved);
        }
    }
    if let Some((dtype, shape, _)) = new {
        header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + grown]}));
    }
}

/// Adds a tensor at the end.
fn add(header: &mut Map<String, Value>, data: &mut Vec<u8>, name: &str, dtype: &str, shape: &Value, bytes: usize) {
    let begin = data.len();
    data.resize(begin + bytes, 0);
    header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + bytes]}));
}

fn open_and_check(dir: &Path) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(dir)?;
    tensors::check(&checkpoint)?;
    Ok(checkpoint)
}

#[test]
fn golden_checkpoints_open_and_fit_their_config() {
    for name in [
        "v3-tiny",
        "v3-fp8-tiny",
        "v3-bf16-tiny",
        "v3-bf16-tiny-sharded",
        "v3-mtp-accept-tiny",
        "v2-lite-tiny",
        "v2-tiny",
        "kimi-k2-tiny",
        "../data/v2-odd-tiny",
        "../data/v3-odd-tiny",
    ] {
        open_and_check(&golden(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn tensors_are_views_of_the_files() {
    let whole = Checkpoint::open(&golden("v3-bf16-tiny")).unwrap();
    let shards = Checkpoint::open(&golden("v3-bf16-tiny-sharded")).unwrap();
    assert_eq!((whole.files().len(), shards.files().len()), (1, 3));
    assert_eq!(whole.tensors().count(), shards.tensors().count());
    for tensor in whole.tensors() {
        let other = shards.tensor(tensor.name).unwrap();
        assert_eq!(
            (tensor.dtype, tensor.shape, tensor.data),
            (other.dtype, other.shape, other.data),
            "{}",
            tensor.name
        );
        assert_eq!(tensor.data, &whole.files()[tensor.file].bytes[tensor.offset..][..tensor.data.len()]);
        assert_eq!(tensor.elements() * tensor.dtype.bytes(), tensor.data.len());
    }
    let fp8 = Checkpoint::open(&golden("v3-fp8-tiny")).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    assert_eq!(fp8.tensor(name).unwrap().dtype, Dtype::F8E4m3);
    assert_eq!(fp8.scale_of(name).unwrap().shape, [2, 3]);
    assert!(fp8.scale_of("model.norm.weight").is_none());
    holds(&text(fp8.tensor("nonsense")), &["v3-fp8-tiny", "`nonsense` is missing"]);
}

#[test]
fn without_weights() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden("v3-tiny").join("config.json"), dir.path().join("config.json")).unwrap();
    for path in [golden("v3-tiny").join("config.json"), dir.path().to_owned()] {
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert!(!checkpoint.has_weights() && checkpoint.files().is_empty() && checkpoint.tensors().next().is_none());
        holds(&text(checkpoint.tensor("model.norm.weight")), &["no weights", "model.safetensors.index.json"]);
        holds(&text(tensors::check(&checkpoint)), &["no weights"]);
    }
    holds(&text(Checkpoint::open(Path::new("/nowhere"))), &["cannot read /nowhere"]);
    let empty = tempfile::tempdir().unwrap();
    holds(&text(Checkpoint::open(empty.path())), &["is no checkpoint", "config.json"]);
}

#[test]
fn damaged_files() {
    let file = fs::read(golden("v2-tiny").join("model.safetensors")).unwrap();
    let open = |bytes: &[u8]| text(Checkpoint::open(with_file("v2-tiny", bytes).path()));
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap());

    holds(&open(&[]), &["model.safetensors: 0 bytes are too few", "download it again"]);
    holds(&open(&file[..7]), &["7 bytes are too few"]);
    holds(
        &open(&file[..100]),
        &[&format!("header length {header_len} goes beyond the end of the file, which has 100")],
    );
    holds(&open(&file[..file.len() - 1]), &["tensor `", "truncated", "model.safetensors"]);
    holds(&open(&[&file[..], &[0]].concat()), &["1 bytes after the last tensor"]);
    holds(&open(&[&[0xff; 8], &file[8..]].concat()), &["header length 18446744073709551615 is absurd"]);
    holds(&open(&[&[0; 8], &file[8..]].concat()), &["does not begin with `{`"]);
    holds(&open(&join("{\"a\": ", &[])), &["header: tensor `a`: EOF"]);
    holds(&open(&join("{\"a\": 3}", &[])), &["header: ", "tensor `a`"]);
    holds(&open(&join("{\u{0}}", &[])), &["header: "]);
    holds(&open(&join(&"{\"a\":".repeat(10_000), &[])), &["header: "]);
}

#[test]
fn damaged_entries() {
    let open = |header: &str, bytes: usize| {
        text(Checkpoint::open(with_file("v2-tiny", &join(header, &vec![0; bytes])).path()))
    };
    let f32s = |offsets: [i64; 2], n: u64| format!(r#"{{"dtype":"F32","shape":[{n}],"data_offsets":{offsets:?}}}"#);
    let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);

    holds(
        &open(&two(f32s([0, 8], 2), f32s([4, 12], 2)), 12),
        &["model.safetensors: tensor `b`", "overlap those of tensor `a`"],
    );
    holds(&open(&two(f32s([0, 8], 2), f32s([12, 16], 1)), 16), &["tensor `b`: 4 bytes before it belong to no tensor"]);
    holds(
        &open(&two(f32s([0, 8], 2), f32s([8, 4], 1)), 8),
        &["tensor `b`: data begins at byte 8 and ends before that"],
    );
    holds(&open(&two(f32s([0, 8], 2), f32s([8, 16], 2)), 12), &["tensor `b`", "truncated"]);
    holds(
        &open(&two(f32s([0, 8], 3), f32s([8, 16], 2)), 16),
        &["tensor `a`: shape [3] of F32 does not fill the stated 8 bytes"],
    );
    holds(&open(&two(f32s([0, 0], 1 << 62), f32s([0, 8], 2)), 8), &["tensor `a`: shape [4611686018427387904]"]);
    holds(&open(&two(f32s([-8, 0], 2), f32s([0, 8], 2)), 8), &["tensor `a`", "-8"]);
    let huge = r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]}}"#;
    holds(&open(huge, 0), &["tensor `a`", "truncated"]);
    let same = format!(r#"{{"a":{0},"a":{0}}}"#, f32s([0, 8], 2));
    holds(&open(&same, 8), &["tensor `a`: occurs twice"]);
    holds(
        &open(r#"{"a":{"dtype":"Q4_K","shape":[2],"data_offsets":[0,8]}}"#, 8),
        &["tensor `a`: unknown dtype \"Q4_K\""],
    );
    holds(
        &open(r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#, 4),
        &["tensor `a`: 9 dimensions"],
    );
    let nasty = r#"{"\u001b[31m\n":{"dtype":"X","shape":[],"data_offsets":[0,4]}}"#;
    holds(&open(nasty, 4), &["tensor `\\u{1b}[31m\\u{a}`"]);
}

#[test]
fn missing_wrong_and_contradicting_tensors() {
    let check = |name: &str, change: Change| text(open_and_check(changed(name, change).path()));
    let router = "model.layers.1.mlp.gate.weight";
    let message = check("v3-tiny", &|h, d| remove(h, d, router));
    holds(&message, &["tensor `model.layers.1.mlp.gate.weight` is missing", "shape [16, 64] of one of F32, F16, BF16"]);

    let message = check("v3-tiny", &|h, d| replace(h, d, router, Some(("F32", json!([64, 16]), vec![0; 4096]))));
    holds(
        &message,
        &["model.safetensors: tensor `model.layers.1.mlp.gate.weight` is shape [64, 16], expected shape [16, 64]"],
    );

    let message = check("v3-tiny", &|h, d| replace(h, d, router, Some(("I32", json!([16, 64]), vec![0; 4096]))));
    holds(&message, &["`model.layers.1.mlp.gate.weight` is of dtype I32, expected one of F32, F16, BF16"]);

    let message =
        check("v3-fp8-tiny", &|h, d| replace(h, d, router, Some(("F8_E4M3", json!([8, 160]), vec![0; 1280]))));
    holds(&message, &["`model.layers.1.mlp.gate.weight` is of dtype F8_E4M3"]);

    let down = "model.layers.0.mlp.down_proj.weight";
    let message = check("v3-tiny", &|h, d| replace(h, d, down, Some(("F8_E4M3", json!([64, 128]), vec![0; 8192]))));
    holds(&message, &[down, "F8_E4M3", "no quantization_config"]);

    let scale = "model.layers.0.mlp.down_proj.weight_scale_inv";
    let message = check("v3-fp8-tiny", &|h, d| remove(h, d, scale));
    holds(&message, &[&format!("`{scale}` is missing"), "shape [2, 3] of F32"]);
    let message = check("v3-fp8-tiny", &|h, d| replace(h, d, scale, Some(("F32", json!([3, 2]), vec![0; 24]))));
    holds(&message, &[&format!("`{scale}` is shape [3, 2], expected shape [2, 3]"), "[128, 128]", "[160, 300]"]);
    let message = check("v3-fp8-tiny", &|h, d| replace(h, d, scale, Some(("BF16", json!([2, 3]), vec![0; 12]))));
    holds(&message, &[&format!("`{scale}` is of dtype BF16, expected F32")]);
    let message = check("v3-fp8-tiny", &|h, d| replace(h, d, down, Some(("BF16", json!([160, 300]), vec![0; 96000]))));
    holds(&message, &[&format!("`{scale}`"), "BF16 and takes no block scales"]);

    let message = check("v3-tiny", &|h, d| add(h, d, "model.layers.0.self_attn.o_proj.bias", "F32", &json!([64]), 256));
    holds(&message, &["o_proj.bias` has no place in the model", "attention_bias"]);
    let shared = "model.layers.1.mlp.shared_experts.up_proj.weight";
    let dir = changed("v3-tiny", &|_, _| ());
    let config = dir.path().join("config.json");
    let text_of = fs::read_to_string(&config).unwrap();
    fs::write(&config, text_of.replace("\"n_shared_experts\": 1", "\"n_shared_experts\": null")).unwrap();
    holds(&text(open_and_check(dir.path())), &[&shared.replace("up", "down"), "has no place", "n_shared_experts is 0"]);
    let message = check("v3-tiny", &|h, d| {
        add(h, d, "model.layers.1.mlp.experts.16.up_proj.weight", "F32", &json!([32, 64]), 8192);
    });
    holds(&message, &["experts.16.up_proj.weight` has no place", "n_routed_experts is 16"]);
}

#[test]
fn harmless_differences_are_accepted() {
    // The MTP copies may be absent, a norm may be f16 between f32 tensors, a linear of an FP8 model may be bf16,
    // later layers and unknown names do not matter.
    let dir = changed("v3-tiny", &|h, d| {
        remove(h, d, "model.layers.4.embed_tokens.weight");
        remove(h, d, "model.layers.4.shared_head.head.weight");
        replace(h, d, "model.norm.weight", Some(("F16", json!([64]), vec![0; 128])));
        add(h, d, "model.layers.5.anything.weight", "I64", &json!([1]), 8);
        add(h, d, "vision.weight", "BOOL", &json!([0, 3]), 0);
    });
    open_and_check(dir.path()).unwrap();
    let dir = changed("v3-fp8-tiny", &|h, d| {
        let name = "model.layers.0.mlp.down_proj.weight";
        replace(h, d, name, Some(("BF16", json!([160, 300]), vec![0; 96000])));
        remove(h, d, "model.layers.0.mlp.down_proj.weight_scale_inv");
    });
    open_and_check(dir.path()).unwrap();
}

/// A copy of the sharded checkpoint with a changed index.
fn with_index(change: impl FnOnce(&mut Value, &Path)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(golden("v3-bf16-tiny-sharded")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let path = dir.path().join("model.safetensors.index.json");
    let mut index = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut index, dir.path());
    fs::write(&path, index.to_string()).unwrap();
    dir
}

#[test]
fn damaged_index() {
    let open = |change: &dyn Fn(&mut Value, &Path)| {
        let message = text(Checkpoint::open(with_index(change).path()));
        holds(&message, &["model.safetensors.index.json", "download"]);
        message
    };
    let norm = "model.norm.weight";
    for outside in ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\\b", "a\0b"] {
        let message = open(&|i, _| i["weight_map"][norm] = json!(outside));
        holds(&message, &["tensor `model.norm.weight`", "not a file name inside the checkpoint directory"]);
    }
    holds(
        &open(&|i, _| i["weight_map"][norm] = json!("no.safetensors")),
        &["names the file no.safetensors, which is missing"],
    );
    holds(
        &open(&|_, dir| fs::remove_file(dir.join("model-00002-of-000003.safetensors")).unwrap()),
        &["names the file model-00002-of-000003.safetensors, which is missing"],
    );
    holds(
        &open(&|i, _| i["weight_map"]["ghost.weight"] = json!("model-00001-of-000003.safetensors")),
        &["tensor `ghost.weight` is said to be in model-00001-of-000003.safetensors but is not"],
    );
    holds(
        &open(&|i, _| i["weight_map"]["model.embed_tokens.weight"] = json!("model-00003-of-000003.safetensors")),
        &["tensor `model.embed_tokens.weight`", "but is in model-00001-of-000003.safetensors"],
    );
    holds(&open(&|i, _| i["weight_map"] = json!({})), &["names no tensor"]);
    holds(&open(&|i, _| i["weight_map"] = json!([])), &["an object of tensor names"]);
    holds(&open(&|i, _| *i = json!({})), &["weight_map"]);

    let dir = with_index(|_, _| ());
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map": {"a": "x", "a": "y"}}"#).unwrap();
    holds(&text(Checkpoint::open(dir.path())), &["tensor `a` occurs twice"]);

    // The same tensor in two shards.
    let dir = with_index(|_, dir| {
        fs::copy(dir.join("model-00001-of-000003.safetensors"), dir.join("model-00002-of-000003.safetensors")).unwrap();
    });
    holds(&text(Checkpoint::open(dir.path())), &["is also in", "model-00001-of-000003.safetensors"]);
}

#[cfg(unix)]
#[test]
fn links() {
    // Hugging Face's cache links files to a store elsewhere; a dangling link is an error, not "no weights".
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::os::unix::fs::symlink(fs::canonicalize(golden("v3-tiny").join(name)).unwrap(), dir.path().join(name))
            .unwrap();
    }
    open_and_check(dir.path()).unwrap();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("/nowhere/blob", dir.path().join("model.safetensors")).unwrap();
    holds(&text(Checkpoint::open(dir.path())), &["cannot read", "model.safetensors"]);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    holds(&text(Checkpoint::open(dir.path())), &["not a regular file"]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    /// Any few changed bytes, most of them in the header: an error or a checkpoint whose every view can be read.
    #[test]
    fn any_damage(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), prop::sample::select(b"0123456789,]}\"".to_vec())]), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut file = fs::read(golden("v2-tiny").join("model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        for (at, byte) in changes {
            file[at.index(header)] = byte;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        let dir = with_file("v2-tiny", &file);
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            let sum: usize = checkpoint.tensors().map(|t| t.data.len() + t.data.iter().map(|b| *b as usize).sum::<usize>()).sum();
            prop_assert!(sum > 0);
            let _ = tensors::check(&checkpoint);
        }
    }
}
