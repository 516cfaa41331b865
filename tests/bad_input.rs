//! Bad input of every kind: each gives exit code 2 (called wrongly) or 1 (failed), one sentence that names the file and
//! the tensor or field, no panic, and leaves nothing behind. The program itself is run, except where thousands of inputs
//! are tried.

#[path = "common/cli.rs"]
mod cli;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cli::{Call, Parts, copy, demo, edit_json, golden, listing, moewe, pipe, reseal, root, tiny_bundle};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The smallest golden checkpoint.
const SMALL: &str = "v3-mtp-accept-tiny";

/// A directory with a checkpoint to damage.
struct Scene {
    temp: TempDir,
    checkpoint: PathBuf,
}

impl Scene {
    fn new(name: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let checkpoint = temp.path().join("checkpoint");
        copy(&golden(name), &checkpoint);
        Self { temp, checkpoint }
    }

    /// A path in the directory.
    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn config(&self, edit: impl FnOnce(&mut Value)) {
        edit_json(&self.checkpoint.join("config.json"), edit);
    }

    fn weights(&self) -> PathBuf {
        self.checkpoint.join("model.safetensors")
    }

    fn edit_weights(&self, edit: impl FnOnce(&mut Parts)) {
        let mut parts = Parts::read(&self.weights());
        edit(&mut parts);
        parts.write(&self.weights());
    }

    fn compile(&self) -> Call {
        moewe!["compile", &self.checkpoint, "-o", self.path("out"), "--target", "lavapipe"]
    }

    fn run(&self) -> Call {
        moewe!["run", &self.checkpoint, "--tokens", "1,2,3", "-n", "2"].env("MOEWE_CACHE", self.path("cache"))
    }

    /// `compile` refuses the checkpoint with exit code 1 and leaves nothing behind.
    fn compile_refuses(&self, words: &[&str]) {
        let before = listing(self.temp.path());
        self.compile().refused(1, words);
        assert_eq!(before, listing(self.temp.path()), "something was left behind");
    }

    /// So do `compile` and `run`.
    fn refuses(&self, words: &[&str]) {
        self.compile_refuses(words);
        self.run().refused(1, words);
        let left: Vec<_> =
            listing(&self.path("cache")).into_iter().filter(|(path, _)| path.extension().is_none()).collect();
        assert!(left.iter().all(|(path, _)| path.ends_with("bundles")), "left in the cache: {left:?}");
    }
}

/// Says what could not be tested on this machine, past the test harness, which shows no output of tests that pass.
fn not_tested(what: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "NOT TESTED HERE: {what}");
}

// ---- Safetensors files

#[test]
fn truncated_safetensors() {
    let scene = Scene::new(SMALL);
    let whole = fs::read(scene.weights()).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
    for length in [0, 4, 8, header / 2, header, whole.len() / 2, whole.len() - 1] {
        fs::write(scene.weights(), &whole[..length]).unwrap();
        scene.compile_refuses(&["model.safetensors"]);
    }
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "truncated"]);
    fs::write(scene.weights(), [&whole[..], &[0; 3]].concat()).unwrap();
    scene.refuses(&["model.safetensors", "3 bytes after the last tensor"]);
}

#[test]
fn overlapping_tensors() {
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| {
        let first = parts.header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
        parts.header["model.layers.0.post_attention_layernorm.weight"]["data_offsets"] = first;
    });
    scene.refuses(&["model.safetensors", "layernorm.weight`", "overlap"]);

    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| {
        parts.header["model.norm.weight"]["data_offsets"] = json!([1u64 << 62, (1u64 << 62) + 192]);
    });
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "data ends at byte"]);

    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header["model.norm.weight"]["data_offsets"] = json!([192, 0]));
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "ends before that"]);

    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX]));
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "does not fill"]);
}

#[test]
fn absurd_header_length() {
    let scene = Scene::new(SMALL);
    let whole = fs::read(scene.weights()).unwrap();
    for length in [u64::MAX, 1 << 40, 100_000_001, whole.len() as u64, 0, 1] {
        fs::write(scene.weights(), [&length.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
        scene.compile_refuses(&["model.safetensors", "header"]);
    }
    fs::write(scene.weights(), [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
    scene.refuses(&["model.safetensors", "header length 18446744073709551615 is absurd"]);
}

#[test]
fn wrong_dtype_or_shape() {
    let name = "model.layers.1.self_attn.o_proj.weight";
    for (dtype, factor) in [("I32", 1), ("F64", 2), ("F8_E5M2", 4), ("Q4_K", 1), ("F8_E4M3", 4)] {
        let scene = Scene::new(SMALL);
        scene.edit_weights(|parts| {
            parts.header[name]["dtype"] = json!(dtype);
            let columns = parts.header[name]["shape"][1].as_u64().unwrap();
            let columns = if dtype == "F64" { columns / factor } else { columns * factor };
            parts.header[name]["shape"][1] = json!(columns);
        });
        scene.compile_refuses(&["model.safetensors", name]);
    }
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header[name]["dtype"] = json!("I32"));
    scene.refuses(&["model.safetensors", name, "of dtype I32", "expected one of F32, F16, BF16"]);

    for shape in [json!([80, 48]), json!([3840]), json!([1, 48, 80]), json!([48, 80, 1, 1, 1, 1, 1, 1, 1])] {
        let scene = Scene::new(SMALL);
        scene.edit_weights(|parts| parts.header[name]["shape"] = shape);
        scene.compile_refuses(&["model.safetensors", name]);
    }
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header[name]["shape"] = json!([80, 48]));
    scene.refuses(&["model.safetensors", name, "shape [80, 48], expected shape [48, 80]"]);
}

#[test]
fn missing_tensor() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.remove(name));
    scene.refuses(&["checkpoint", name, "is missing, expected shape [24, 48]"]);

    let scene = Scene::new("v3-fp8-tiny");
    let name = "model.layers.0.mlp.up_proj.weight_scale_inv";
    scene.edit_weights(|parts| parts.remove(name));
    scene.refuses(&["checkpoint", name, "is missing", "block scales"]);

    let scene = Scene::new(SMALL);
    fs::remove_file(scene.weights()).unwrap();
    scene.refuses(&["checkpoint", "no weights", "model.safetensors"]);
    fs::remove_file(scene.checkpoint.join("config.json")).unwrap();
    scene.refuses(&["checkpoint: is no checkpoint: config.json is not in it"]);
}

#[test]
fn scale_of_the_wrong_shape() {
    let name = "model.layers.0.mlp.up_proj.weight_scale_inv";
    for (shape, dtype) in [(json!([2, 3]), "F32"), (json!([6]), "F32"), (json!([3, 4]), "F16")] {
        let scene = Scene::new("v3-fp8-tiny");
        scene.edit_weights(|parts| {
            parts.header[name]["shape"] = shape.clone();
            if dtype == "F16" {
                parts.header[name]["dtype"] = json!(dtype);
            }
        });
        scene.compile_refuses(&["model.safetensors", name, "expected shape [3, 2]"]);
    }
    let scene = Scene::new("v3-fp8-tiny");
    scene.edit_weights(|parts| parts.header[name]["shape"] = json!([2, 3]));
    scene.refuses(&["model.safetensors", name, "shape [2, 3], expected shape [3, 2]"]);
}

#[test]
fn index_that_names_a_missing_or_outside_file() {
    let index = |scene: &Scene| scene.checkpoint.join("model.safetensors.index.json");
    let name = "model.norm.weight";
    let point = |file: &str| {
        let scene = Scene::new("v3-bf16-tiny-sharded");
        edit_json(&index(&scene), |index| index["weight_map"][name] = json!(file));
        scene
    };
    point("model-00009-of-000003.safetensors").refuses(&["index.json", "model-00009-of-000003.safetensors", "missing"]);
    // A sound file outside of the checkpoint is not read either.
    let scene = point("../model.safetensors");
    fs::copy(golden(SMALL).join("model.safetensors"), scene.path("model.safetensors")).unwrap();
    scene.refuses(&["index.json", name, "../model.safetensors", "inside the checkpoint"]);
    point("/etc/passwd").refuses(&["index.json", name, "/etc/passwd", "inside the checkpoint"]);
    point("").refuses(&["index.json", name]);
    point("model-00001-of-000003.safetensors").refuses(&["index.json", name, "model-00001-of-000003.safetensors"]);

    let scene = Scene::new("v3-bf16-tiny-sharded");
    fs::remove_file(scene.checkpoint.join("model-00002-of-000003.safetensors")).unwrap();
    scene.refuses(&["index.json", "model-00002-of-000003.safetensors", "missing"]);
    for text in ["", "[]", "{}", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": 1}}"#] {
        fs::write(index(&scene), text).unwrap();
        scene.compile_refuses(&["model.safetensors.index.json"]);
    }
}

#[test]
fn weights_that_are_no_files() {
    let scene = Scene::new(SMALL);
    fs::remove_file(scene.weights()).unwrap();
    symlink("model.safetensors", scene.weights()).unwrap();
    scene.refuses(&["model.safetensors", "symbolic links"]);
    fs::remove_file(scene.weights()).unwrap();
    symlink("nowhere", scene.weights()).unwrap();
    scene.refuses(&["model.safetensors", "No such file"]);
    pipe(&scene.weights()); // must not wait for a writer
    scene.refuses(&["model.safetensors", "not a regular file"]);
    fs::remove_file(scene.weights()).unwrap();
    fs::create_dir(scene.weights()).unwrap();
    scene.refuses(&["model.safetensors", "not a regular file"]);
    pipe(&scene.checkpoint.join("config.json"));
    scene.refuses(&["config.json", "not a regular file"]);
    symlink("loop", scene.path("loop")).unwrap();
    moewe!["run", scene.path("loop"), "--tokens", "1"].refused(1, &["loop", "symbolic links"]);
}

// ---- Configuration

/// Whole-number fields of a V3 configuration: those that must be there, and those that may not be 0.
const NUMBERS: [(&str, bool, bool); 19] = [
    ("hidden_size", true, true),
    ("num_hidden_layers", true, true),
    ("num_attention_heads", true, true),
    ("q_lora_rank", true, true),
    ("kv_lora_rank", true, true),
    ("qk_nope_head_dim", true, true),
    ("qk_rope_head_dim", true, true),
    ("v_head_dim", true, true),
    ("intermediate_size", true, true),
    ("moe_intermediate_size", true, true),
    ("n_routed_experts", true, true),
    ("num_experts_per_tok", true, true),
    ("first_k_dense_replace", true, false),
    ("n_group", true, true),
    ("topk_group", true, true),
    ("vocab_size", true, true),
    ("max_position_embeddings", true, true),
    ("moe_layer_freq", false, true),
    ("n_shared_experts", false, false),
];

fn field_is_refused(field: &str, value: Option<Value>) {
    let scene = Scene::new(SMALL);
    scene.config(|config| match &value {
        None => drop(config.as_object_mut().unwrap().shift_remove(field)),
        Some(value) => config[field] = value.clone(),
    });
    let found = value.map_or("absent".into(), |value| value.to_string());
    scene.compile_refuses(&["config.json", &format!("field `{field}` is {found}")]);
}

#[test]
fn config_with_absent_fields() {
    for (field, _, _) in NUMBERS.iter().filter(|(_, required, _)| *required) {
        field_is_refused(field, None);
    }
    field_is_refused("routed_scaling_factor", None);
    let scene = Scene::new(SMALL);
    scene.config(|config| drop(config.as_object_mut().unwrap().shift_remove("hidden_size")));
    scene.refuses(&["config.json", "field `hidden_size` is absent, expected a whole number"]);
}

#[test]
fn config_with_zero_fields() {
    for (field, _, _) in NUMBERS.iter().filter(|(_, _, positive)| *positive) {
        field_is_refused(field, Some(json!(0)));
    }
    for field in ["rms_norm_eps", "rope_theta", "routed_scaling_factor"] {
        field_is_refused(field, Some(json!(0.0)));
    }
}

#[test]
fn config_with_negative_fields() {
    for (field, _, _) in NUMBERS {
        field_is_refused(field, Some(json!(-1)));
    }
    for field in ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "num_nextn_predict_layers", "eos_token_id"] {
        field_is_refused(field, Some(json!(-1)));
    }
}

#[test]
fn config_with_huge_fields() {
    for huge in [json!(1u64 << 40), json!(u64::MAX)] {
        for (field, _, _) in NUMBERS {
            field_is_refused(field, Some(huge.clone()));
        }
        field_is_refused("num_nextn_predict_layers", Some(huge.clone()));
        field_is_refused("bos_token_id", Some(huge.clone()));
    }
    for field in ["rms_norm_eps", "rope_theta", "routed_scaling_factor"] {
        field_is_refused(field, Some(json!(1e300)));
    }
    // Each in range, absurd together.
    let scene = Scene::new(SMALL);
    scene.config(|config| {
        for field in ["hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"] {
            config[field] = json!(1 << 20);
        }
        config["num_hidden_layers"] = json!(1024);
    });
    scene.compile_refuses(&["config.json", "field `hidden_size`", "parameters"]);
    scene.config(|config| config["n_routed_experts"] = json!(1 << 16));
    scene.compile_refuses(&["config.json", "field `n_routed_experts`", "experts in all"]);
}

#[test]
fn config_with_fields_of_the_wrong_type() {
    for (field, _, _) in NUMBERS {
        field_is_refused(field, Some(json!("48")));
        field_is_refused(field, Some(json!(48.5)));
        field_is_refused(field, Some(json!([])));
    }
    for field in ["norm_topk_prob", "tie_word_embeddings", "attention_bias", "rope_interleave"] {
        field_is_refused(field, Some(json!("yes")));
    }
    for text in ["", "{", "[]", "null", "\u{feff}{}", "{\"hidden_size\": 1e999}"] {
        let scene = Scene::new(SMALL);
        fs::write(scene.checkpoint.join("config.json"), text).unwrap();
        scene.compile_refuses(&["config.json"]);
    }
    let scene = Scene::new(SMALL);
    fs::write(scene.checkpoint.join("config.json"), "[".repeat(1 << 20)).unwrap();
    scene.compile_refuses(&["config.json", "not usable JSON"]);
    fs::write(scene.checkpoint.join("config.json"), [0xff, 0xfe]).unwrap();
    scene.compile_refuses(&["config.json", "utf-8"]);
}

#[test]
fn config_with_inconsistent_fields() {
    let cases = [
        (json!({"qk_rope_head_dim": 15}), "field `qk_rope_head_dim` is 15, expected an even number"),
        (json!({"n_group": 3}), "field `n_group` is 3, expected a divisor of n_routed_experts"),
        (json!({"topk_group": 100}), "field `topk_group` is 100"),
        (json!({"num_experts_per_tok": 9999}), "field `num_experts_per_tok` is 9999"),
        (json!({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}), "field `num_experts_per_tok` is 3"),
        (json!({"n_routed_experts": 0}), "field `n_routed_experts` is 0"),
        (json!({"scoring_func": "softmax"}), "field `scoring_func` is \"softmax\""),
        (json!({"topk_method": "greedy"}), "field `topk_method` is \"greedy\""),
        (json!({"hidden_act": "gelu"}), "field `hidden_act` is \"gelu\""),
        (json!({"torch_dtype": "int4"}), "field `torch_dtype` is \"int4\""),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), "field `rope_scaling.type` is \"linear\""),
        (json!({"rope_scaling": {"type": "yarn"}}), "field `rope_scaling.factor` is absent"),
        (json!({"rope_scaling": {"factor": 2}}), "field `rope_scaling.rope_type` is absent"),
        (json!({"rope_scaling": {"type": "yarn", "rope_type": "default"}}), "field `rope_scaling.rope_type`"),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 32}}),
            "field `rope_scaling.beta_fast` is 1",
        ),
        (
            json!({"rope_scaling": {"type": "default", "rope_theta": 5}, "rope_theta": 6}),
            "field `rope_scaling.rope_theta` is 5",
        ),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "field `quantization_config.quant_method`"),
        (json!({"quantization_config": {"quant_method": "fp8"}}), "field `quantization_config.weight_block_size`"),
        (json!({"eos_token_id": "x"}), "field `eos_token_id` is \"x\""),
        // The configuration of another model: tensors say otherwise.
        (json!({"hidden_size": 64}), "tensor `model.embed_tokens.weight`"),
        (json!({"vocab_size": 999}), "tensor `model.embed_tokens.weight` is shape [256, 48], expected shape [999, 48]"),
        (json!({"first_k_dense_replace": 0}), "tensor `model.layers.0.mlp."),
        (json!({"attention_bias": true}), "tensor `model.layers.0.self_attn.q_a_proj.bias` is missing"),
        (json!({"n_shared_experts": 0}), "n_shared_experts is 0"),
        (json!({"q_lora_rank": null}), "tensor `model.layers.0.self_attn.q_proj.weight` is missing"),
    ];
    for (fields, words) in cases {
        let scene = Scene::new(SMALL);
        scene.config(|config| config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone()));
        scene.compile_refuses(&["checkpoint", words]);
    }
}

#[test]
fn unknown_architecture() {
    for (model_type, architecture, words) in [
        (json!("llama"), json!(["LlamaForCausalLM"]), "model_type \"llama\""),
        (json!("deepseek_v3"), json!(["LlamaForCausalLM"]), "architectures \"LlamaForCausalLM\""),
        (json!("deepseek_v2"), json!(["DeepseekV3ForCausalLM"]), "model_type \"deepseek_v2\""),
        (json!(null), json!([]), "model_type absent, architectures absent"),
        (json!("deepseek_v32"), json!(["DeepseekV32ForCausalLM"]), "model_type \"deepseek_v32\""),
    ] {
        let scene = Scene::new(SMALL);
        scene.config(|config| {
            config["model_type"] = model_type;
            config["architectures"] = architecture;
        });
        scene.compile_refuses(&["config.json", "unknown architecture", words, "supported are DeepseekV2ForCausalLM"]);
    }
    let scene = Scene::new(SMALL);
    scene.config(|config| config["model_type"] = json!("llama\u{1b}[31m"));
    scene.refuses(&["config.json", "unknown architecture: model_type \"llama\\u{1b}[31m\""]);
}

#[test]
fn nan_weights_are_told_of_every_time() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| {
        let at = parts.range(name).start;
        parts.data[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let warning = format!("moewe: warning: tensor `{name}` holds 1 NaN values");
    // The second run finds a compiled bundle.
    for call in
        [scene.compile(), scene.run(), scene.run(), moewe!["run", scene.path("out"), "--tokens", "1", "-n", "2"]]
    {
        let said = call.ok();
        assert_eq!(said.stderr.matches(&warning).count(), 1, "{said:?}");
    }
}

// ---- Prompts and options

#[test]
fn tokens_out_of_vocabulary() {
    let bundle = tiny_bundle();
    for tokens in ["320", "1,2,4294967295"] {
        let words = ["token ", "the vocabulary has 320 tokens (0 to 319)"];
        moewe!["run", bundle, "--tokens", tokens].refused(1, &words);
        let out = root().join("never.safetensors");
        moewe!["trace", bundle, "--tokens", tokens, "-o", &out].refused(1, &words);
        assert!(!out.exists());
    }
    moewe!["run", golden("v3-tiny"), "--tokens", "5,320"].refused(1, &["token 1 of the prompt is 320"]);
}

#[test]
fn tokens_that_are_none() {
    let bundle = tiny_bundle();
    for tokens in ["1,,2", "a", "-1", "1,-2", "4294967296", "", "1 2", "1.5", "--json"] {
        let words = ["--tokens", "expected token ids, separated by commas, such as 1,2,3"];
        moewe!["run", bundle, "--tokens", tokens].refused(2, &words);
        moewe!["trace", bundle, "-o", "x", "--tokens", tokens].refused(2, &words);
    }
}

#[test]
fn empty_prompt() {
    moewe!["run", demo(), ""].refused(2, &["the prompt is empty"]);
    moewe!["run", demo()].refused(2, &["the prompt is empty"]); // nothing on standard input
    moewe!["run", demo(), "--prompt", "a="].refused(2, &["the prompt is empty"]);
    moewe!["run", demo(), "--prompt", "a"].refused(2, &["--prompt is \"a\", expected NAME=TEXT"]);
    moewe!["trace", demo(), "", "-o", root().join("never")].refused(2, &["the prompt is empty"]);
    moewe!["trace", demo(), "-o", root().join("never")].refused(2, &["nothing to run"]);
}

#[test]
fn context_longer_than_allowed() {
    let tokens = |n: usize| vec!["7"; n].join(",");
    let bundle = tiny_bundle();
    moewe!["run", bundle, "--tokens", tokens(257)].refused(1, &["257 tokens, the model's context holds 256"]);
    let out = root().join("long.safetensors");
    moewe!["trace", bundle, "--tokens", tokens(300), "-o", &out].refused(1, &["300 tokens", "holds 256"]);
    assert!(!out.exists());
    // A prompt that just fits is run; the text ends where the context does.
    let said = moewe!["run", bundle, "--tokens", tokens(250), "--ignore-eos", "--json"].json();
    assert_eq!((&said["stop_reason"], said["tokens"].as_array().unwrap().len()), (&json!("context"), 6));
    // A text of many thousand tokens, and one that is no prompt but an accident.
    moewe!["run", demo()].stdin("Once upon a time. ".repeat(20_000)).refused(1, &["the model's context holds 2048"]);
    moewe!["run", demo()].stdin(vec![b' '; (64 << 20) + 1]).refused(2, &["more than 67108864 bytes"]);
    moewe!["run", demo()].stdin([b'a', 0xff]).refused(1, &["standard input", "UTF-8"]);
    moewe!["chat", demo()].stdin([b'a', 0xff, b'\n']).refused(1, &["standard input", "UTF-8"]);
}

#[test]
fn options_out_of_range() {
    let bundle = tiny_bundle();
    for (option, value) in [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "warm"),
        ("--top-p", "0"),
        ("--top-p", "2"),
        ("--top-p", "-0.5"),
        ("--min-p", "1.5"),
        ("--min-p", "-1"),
        ("--top-k", "-1"),
        ("--repetition-penalty", "0"),
        ("--repetition-penalty", "-2"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-5"),
        ("--max-new-tokens", "99999999999"),
        ("--seed", "x"),
        ("--prefill-chunk", "0"),
        ("--precision", "double"),
        ("--device", "99"),
        ("--device", "radeon"),
        ("--target", "lavapipe"), // it is compiled already
    ] {
        let name = if option == "--device" { "no device is" } else { option };
        moewe!["run", bundle, "--tokens", "1", option, value].refused(2, &[name]);
    }
    moewe!["run", bundle, "--device", "radeon", "--tokens", "1"].refused(2, &["\"radeon\"", "there are: 0: "]);
    moewe!["run", golden("v3-tiny"), "--tokens", "1", "--target", "toaster"].refused(2, &["toaster", "generic-vulkan"]);
    moewe!["run", bundle, "hello"].refused(2, &["no tokenizer.json", "--tokens"]);
    moewe!["chat", bundle].refused(2, &["no tokenizer with a chat template", "moewe run"]);
    moewe!["run", bundle, "hello", "--tokens", "1"].refused(2, &["cannot be used with"]);
    moewe!["trace", bundle, "--tokens", "1", "-o", "x", "--taps", "nonsense"].refused(2, &["--taps", "moe.N.ids"]);
    let v3 = Path::new(env!("CARGO_MANIFEST_DIR")).join("compiler/presets/v3.json");
    moewe!["inspect", &v3, "--gpu", "toaster"].refused(2, &["\"toaster\"", "h100"]);
    for (option, value) in [("--price-per-gpu-hour", "-3"), ("--price-per-gpu-hour", "nan"), ("--context", "0")] {
        moewe!["inspect", &v3, "--gpu", "h100", option, value].refused(2, &[]);
    }
    for bits in ["0", "-1", "nan", "inf"] {
        moewe!["inspect", &v3, "--cache-bits", bits].refused(2, &["bits"]);
    }
    moewe!["frobnicate"].refused(2, &["frobnicate"]);
    moewe!["run", bundle, "--precison", "fast"].refused(2, &["--precison", "--precision"]);
}

#[test]
fn models_that_are_none() {
    let temp = tempfile::tempdir().unwrap();
    let missing = temp.path().join("nowhere");
    for command in ["run", "chat", "explain", "inspect"] {
        moewe![command, &missing].refused(2, &["nowhere", "no such file or directory"]);
    }
    moewe!["trace", &missing, "--tokens", "1", "-o", temp.path().join("x")].refused(2, &["nowhere"]);
    moewe!["compile", &missing, "-o", temp.path().join("x")].refused(2, &["nowhere"]);

    let config = golden("v3-tiny").join("config.json");
    moewe!["run", &config, "--tokens", "1"].refused(2, &["config.json", "is a file"]);
    moewe!["compile", &config, "-o", temp.path().join("x")].refused(2, &["config.json", "is a file", "--plan-only"]);
    moewe!["explain", &config].refused(1, &["config.json", "not a moewe bundle"]);
    moewe!["explain", golden("v3-tiny")].refused(1, &["v3-tiny", "not a moewe bundle", "moewe compile"]);
    moewe!["compile", tiny_bundle(), "-o", temp.path().join("x")].refused(2, &["is a bundle already"]);
    moewe!["run", temp.path(), "--tokens", "1"].refused(1, &["is no checkpoint", "config.json"]);

    let plan = temp.path().join("plan");
    moewe!["compile", &config, "-o", &plan, "--plan-only"].ok();
    moewe!["run", &plan, "--tokens", "1"].refused(1, &["plan", "no weights", "--plan-only"]);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

// ---- Text

#[test]
fn damaged_text_files() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = temp.path().join("checkpoint");
    copy(&demo(), &checkpoint);
    let run = || moewe!["run", &checkpoint, "Once", "-n", "1"];
    for (name, text, words) in [
        ("generation_config.json", "{\"temperature\": -1}", "temperature"),
        ("generation_config.json", "{\"top_p\": \"all\"}", "top_p"),
        ("generation_config.json", "[", "generation_config.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "", "tokenizer.json"),
        ("tokenizer_config.json", "{\"add_bos_token\": 7}", "add_bos_token"),
    ] {
        let path = checkpoint.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, text).unwrap();
        run().refused(1, &[path.to_str().unwrap(), words]);
        fs::write(&path, whole).unwrap();
    }
    let template = checkpoint.join("chat_template.jinja");
    for text in ["{% for %}", "{{ raise_exception('no') }}", "{% for i in range(100000000) %}{{ i }}{% endfor %}"] {
        fs::write(&template, text).unwrap();
        moewe!["chat", &checkpoint].stdin("hi\n").refused(1, &["chat_template.jinja"]);
    }
    fs::remove_file(&template).unwrap();
    fs::remove_file(checkpoint.join("tokenizer.json")).unwrap();
    run().refused(2, &["no tokenizer.json", "--tokens"]);
}

// ---- Bundles

/// A copy of the bundle of the demo model, to damage.
fn damaged_bundle() -> (TempDir, PathBuf) {
    static BUNDLE: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let whole = BUNDLE.get_or_init(|| {
        let bundle = root().join("demo.moewe");
        moewe!["compile", demo(), "-o", &bundle, "--target", "lavapipe"].ok();
        bundle
    });
    let temp = tempfile::tempdir().unwrap();
    let bundle = temp.path().join("bundle");
    copy(whole, &bundle);
    (temp, bundle)
}

/// A file of each sort in a bundle.
fn sorts(bundle: &Path) -> Vec<PathBuf> {
    let kernel = fs::read_dir(bundle.join("kernels")).unwrap().next().unwrap().unwrap().path();
    let names = ["manifest.json", "plan.json", "weights-00001.safetensors", "tokenizer.json", "config.json"];
    names.iter().map(|name| bundle.join(name)).chain([kernel]).collect()
}

#[test]
fn bundle_with_a_changed_byte() {
    let (_temp, bundle) = damaged_bundle();
    for path in sorts(&bundle) {
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name, "damaged bundle", "compile the checkpoint again"]);
        fs::write(&path, &whole[..at]).unwrap();
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name, "damaged bundle", "compile the checkpoint again"]);
        fs::write(&path, &whole).unwrap();
    }
    moewe!["run", &bundle, "hi", "-n", "1"].ok();
}

#[test]
fn bundle_of_another_version() {
    let (_temp, bundle) = damaged_bundle();
    for version in [json!(0), json!(9), json!(u64::MAX)] {
        edit_json(&bundle.join("manifest.json"), |manifest| manifest["format_version"] = version);
        let words = ["manifest.json", "bundle format", "this moewe reads format", "compile the checkpoint again"];
        moewe!["run", &bundle, "hi"].refused(1, &words);
        moewe!["explain", &bundle].refused(1, &words);
    }
    edit_json(&bundle.join("manifest.json"), |manifest| manifest["format_version"] = json!("1"));
    moewe!["run", &bundle, "hi"].refused(1, &["manifest.json", "format_version"]);
}

#[test]
fn bundle_with_a_missing_file() {
    let (_temp, bundle) = damaged_bundle();
    for path in sorts(&bundle) {
        let whole = fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        fs::remove_file(&path).unwrap();
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name, "missing"]);
        pipe(&path); // must not wait for a writer
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name]);
        fs::remove_file(&path).unwrap();
        fs::write(&path, whole).unwrap();
    }
    // Weights that stayed with a checkpoint that has gone or changed since.
    let scene = Scene::new(SMALL);
    let bundle = scene.path("bundle");
    moewe!["compile", &scene.checkpoint, "-o", &bundle, "--reference-weights"].ok();
    let whole = fs::read(scene.weights()).unwrap();
    fs::write(scene.weights(), &whole[..whole.len() - 4]).unwrap();
    moewe!["run", &bundle, "--tokens", "1"].refused(1, &["model.safetensors", "bytes", "expected"]);
    fs::remove_file(scene.weights()).unwrap();
    moewe!["run", &bundle, "--tokens", "1"].refused(1, &["model.safetensors", "the file is missing"]);
}

// ---- Devices

#[test]
fn no_vulkan_device() {
    for args in [
        vec!["run", tiny_bundle().to_str().unwrap(), "--tokens", "1"],
        vec!["run", "-", "--device", "list"],
        vec!["doctor"],
        vec!["chat", demo().to_str().unwrap()],
    ] {
        let call = Call::new(args.into_iter().map(Into::into).collect());
        let call = call.env("VK_DRIVER_FILES", "/nonexistent.json").env("VK_ICD_FILENAMES", "/nonexistent.json");
        call.refused(1, &["no Vulkan device", "apt-get install mesa-vulkan-drivers"]);
    }
}

/// Whether Mesa's software driver is there, whose limits and memory are known.
fn software_driver() -> bool {
    let there = moewe!["doctor", "--device", "list"].ok().stdout.contains("llvmpipe");
    if !there {
        not_tested("there is no llvmpipe");
    }
    there
}

#[test]
fn device_without_a_needed_feature() {
    if !software_driver() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    // Subgroups of 32 invocations; a software driver's are as wide as the processor's vectors.
    let bundle = temp.path().join("hopper");
    moewe!["compile", golden("v3-tiny"), "-o", &bundle, "--target", "hopper"].ok();
    let run = |bundle: &Path| moewe!["run", bundle, "--tokens", "1", "--device", "llvmpipe"];
    run(&bundle).refused(1, &["llvmpipe", "invocations in a subgroup", "needs 32", "--target lavapipe"]);

    for (field, words) in [
        ("storage_buffers", "storage buffers for a kernel"),
        ("workgroup_invocations", "invocations in a workgroup"),
        ("workgroup_bytes", "bytes of workgroup memory"),
    ] {
        let bundle = temp.path().join(field);
        copy(tiny_bundle(), &bundle);
        edit_json(&bundle.join("plan.json"), |plan| plan["requirements"][field] = json!(1 << 20));
        reseal(&bundle);
        run(&bundle).refused(1, &["llvmpipe", words, "needs 1048576", "--target lavapipe"]);
    }
    // A weight in a piece larger than a binding.
    let scene = Scene::new(SMALL);
    scene.config(|config| config["vocab_size"] = json!(900_000));
    let bundle = scene.path("bundle");
    let config = scene.checkpoint.join("config.json");
    moewe!["compile", config, "--plan-only", "-o", &bundle, "--target", "hopper"].ok();
    edit_json(&bundle.join("plan.json"), |plan| plan["requirements"]["subgroup_invocations"] = json!(0));
    reseal(&bundle);
    run(&bundle).refused(1, &["llvmpipe", "bytes in a binding", "needs 172800000", "--target lavapipe"]);
}

#[test]
fn out_of_device_memory() {
    // More weights than the machine has memory, made of the same few bytes over and over.
    const PIECE: u64 = 128 << 20;
    if !software_driver() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let bundle = temp.path().join("bundle");
    copy(tiny_bundle(), &bundle);
    let memory = fs::read_to_string("/proc/meminfo").unwrap();
    let total = memory.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
    edit_json(&bundle.join("plan.json"), |plan| {
        let file = plan["files"][0]["bytes"].as_u64().unwrap();
        let mut segments = Vec::new();
        let mut left = PIECE;
        while left > 0 {
            let bytes = left.min(file);
            segments.push(json!({"file": 0, "offset": 0, "bytes": bytes}));
            left -= bytes;
        }
        let shard = json!({"first": 0, "count": PIECE / 4096, "segments": segments});
        let first = plan["weights"].as_array().unwrap().len();
        let count = (total / PIECE + 1) as usize;
        for i in 0..count {
            let weight = json!({
                "name": format!("huge.{i}"), "format": "f32", "shape": [PIECE / 4096, 1024], "shards": [shard]
            });
            plan["weights"].as_array_mut().unwrap().push(weight);
        }
        let steps = plan["programs"][0]["steps"].as_array_mut().unwrap();
        let is_weight = |binding: &Value| binding.get("weight").is_some();
        let step = steps.iter().find(|step| step["bindings"].as_array().unwrap().iter().any(is_weight));
        let mut step = step.unwrap().clone();
        for i in first..first + count {
            for binding in step["bindings"].as_array_mut().unwrap().iter_mut().filter(|binding| is_weight(binding)) {
                *binding = json!({"weight": {"weight": i, "shard": 0}});
            }
            steps.push(step.clone());
        }
    });
    reseal(&bundle);
    let words = ["out of memory on llvmpipe", "the weights needs", "choose a smaller model"];
    moewe!["run", &bundle, "--tokens", "1", "--device", "llvmpipe"].refused(1, &words);
}

// ---- Places where nothing can be written

#[test]
fn read_only_output() {
    // Tests may run as root, whom permissions do not stop; nobody can make files in /proc, or below a file.
    let scene = Scene::new(SMALL);
    let file = scene.path("file");
    fs::write(&file, "precious").unwrap();
    let before = listing(scene.temp.path());
    for place in [Path::new("/proc/moewe"), &file] {
        let (out, shown) = (place.join("out"), place.to_str().unwrap());
        moewe!["compile", &scene.checkpoint, "-o", &out].refused(1, &["cannot write", shown]);
        let said = moewe!["synth", "--like", &scene.checkpoint, "-o", &out].refused(1, &["cannot write", shown]);
        assert!(!said.contains("partial"), "{said}");
        scene.run().env("MOEWE_CACHE", place).refused(1, &["cannot write to the cache", shown]);
    }
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", "/proc/x"].refused(1, &["cannot write /proc/x"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", file.join("x")].refused(1, &["file", "ot a directory"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", scene.path("no/x")].refused(2, &["/no: no such file"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", scene.temp.path()].refused(2, &["is no regular file"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", "/dev/null"].refused(2, &["/dev/null: is no regular file"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "--device", "0"].refused(2, &["no --out"]);
    moewe!["compile", &scene.checkpoint, "-o", "/"].refused(1, &["/", "exists already"]);
    assert_eq!(before, listing(scene.temp.path()));
    in_small_place("ro", |place| {
        vec![
            (moewe!["compile", &scene.checkpoint, "-o", place.join("out")], "out"),
            (moewe!["synth", "--like", &scene.checkpoint, "-o", place.join("out")], "out"),
            (moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", place.join("out")], "out"),
            (scene.run().env("MOEWE_CACHE", place.join("cache")), "the cache"),
        ]
    });
}

#[test]
fn disk_full() {
    // A limit on the length of files stops writing half-way, for any user.
    let scene = Scene::new(SMALL);
    let before = listing(scene.temp.path());
    let full = |call: Call| call.through("trap '' XFSZ; ulimit -f 8; exec \"$@\"");
    let said = full(scene.compile()).refused(1, &["cannot write", "out/", "nothing was left behind"]);
    assert!(!said.contains("partial"), "{said}");
    full(moewe!["compile", &scene.checkpoint, "-o", scene.path("out"), "--reference-weights"])
        .refused(1, &["cannot write", "out/"]);
    full(moewe!["synth", "--like", &scene.checkpoint, "-o", scene.path("out")])
        .refused(1, &["cannot write", "out/model.safetensors"]);
    full(moewe!["trace", tiny_bundle(), "--tokens", "1,2,3,4,5", "-o", scene.path("out")])
        .refused(1, &["cannot write", "out", "nothing was left behind"]);
    assert_eq!(before, listing(scene.temp.path()));
    full(scene.run()).refused(1, &["cannot write", "cache/bundles"]);
    assert!(listing(&scene.path("cache")).iter().all(|(path, bytes)| *bytes == 0 && !path.ends_with("plan.json")));
    moewe!["inspect", &scene.checkpoint]
        .through("\"$@\" >/dev/full")
        .refused(1, &["cannot write to standard output", "No space left"]);
    in_small_place("size=96k", |place| {
        vec![
            (moewe!["compile", &scene.checkpoint, "-o", place.join("out")], "No space left"),
            (moewe!["synth", "--like", &scene.checkpoint, "-o", place.join("out")], "No space left"),
            (scene.run().env("MOEWE_CACHE", place), "No space left"),
        ]
    });
}

/// Runs calls that must fail on a file system of their own, mounted with `options`, and checks that they leave nothing.
fn in_small_place(options: &str, calls: impl Fn(&Path) -> Vec<(Call, &'static str)>) {
    let temp = tempfile::tempdir().unwrap();
    let place = temp.path().join("place");
    fs::create_dir(&place).unwrap();
    let mount = format!("mount -t tmpfs -o {options} none {}", place.display());
    let mounts = Command::new("unshare").args(["-rm", "sh", "-c", &mount]).output();
    if !mounts.as_ref().is_ok_and(|output| output.status.success()) {
        not_tested(&format!("a file system with {options}: `unshare -rm {mount}` gives {mounts:?}"));
        return;
    }
    for (call, words) in calls(&place) {
        let script = format!(
            "exec unshare -rm sh -c '{mount} && {{ \"$@\"; code=$?; find {} -type f -size +0; exit $code; }}' sh \"$@\"",
            place.display()
        );
        let name = format!("{call:?}");
        let call = call.through(&script);
        let said = call.run();
        assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{name} left something: {said:?}");
        assert_eq!(said.stderr.lines().count(), 1, "{name}: {said:?}");
        assert!(said.stderr.starts_with("moewe: ") && said.stderr.contains(words), "{name}: {said:?}");
    }
}

#[test]
fn output_that_exists() {
    let scene = Scene::new(SMALL);
    let full = scene.path("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("thesis.tex"), "precious").unwrap();
    for out in [&full, &full.join("thesis.tex"), &scene.checkpoint] {
        let before = listing(scene.temp.path());
        moewe!["compile", &scene.checkpoint, "-o", out].refused(1, &["exists already", "choose another"]);
        moewe!["synth", "--like", &scene.checkpoint, "-o", out].refused(1, &["already exists", "choose another"]);
        assert_eq!(before, listing(scene.temp.path()));
    }
    assert_eq!(fs::read_to_string(full.join("thesis.tex")).unwrap(), "precious");
    // An empty directory is no loss, and a bundle is replaced, but only by a whole one.
    fs::create_dir(scene.path("out")).unwrap();
    scene.compile().ok();
    fs::write(scene.path("out/plan.json.old"), "").unwrap();
    let other = Scene::new("v3-tiny");
    other.edit_weights(|parts| parts.remove("model.norm.weight"));
    let before = listing(&scene.path("out"));
    moewe!["compile", &other.checkpoint, "-o", scene.path("out")].refused(1, &["model.norm.weight"]);
    assert_eq!(before, listing(&scene.path("out")));
    scene.compile().ok();
    assert!(!scene.path("out/plan.json.old").exists());
    fs::create_dir(scene.path("empty")).unwrap();
    moewe!["synth", "--like", &scene.checkpoint, "-o", scene.path("empty")].ok();
}

#[test]
fn profiles_and_shapes_that_are_none() {
    let temp = tempfile::tempdir().unwrap();
    let profile = temp.path().join("profile.json");
    let sound = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("compiler/profiles/lavapipe.json"));
    let sound: Value = serde_json::from_str(&sound.unwrap()).unwrap();
    let compile = || moewe!["compile", golden(SMALL), "-o", temp.path().join("out"), "--target", &profile];
    for (field, value) in [
        ("lanes", json!(3)),
        ("lanes", json!(0)),
        ("lanes", json!(1 << 20)),
        ("workgroup", json!(1 << 20)),
        ("workgroup", json!(16)),
        ("token_tile", json!(0)),
        ("token_tile", json!(1000)),
        ("max_binding_bytes", json!(-1)),
        ("max_binding_bytes", json!(16)),
        ("storage_buffers", json!("many")),
        ("color", json!("red")),
    ] {
        let mut broken = sound.clone();
        broken[field] = value;
        fs::write(&profile, broken.to_string()).unwrap();
        compile().refused(1, &["profile.json", field]);
    }
    for text in ["", "{}", "[]", "lavapipe"] {
        fs::write(&profile, text).unwrap();
        compile().refused(1, &["profile.json"]);
    }
    // Sound, but no row of this model fits its bindings.
    let mut small = sound.clone();
    small["max_binding_bytes"] = json!(1024);
    fs::write(&profile, small.to_string()).unwrap();
    compile().refused(2, &["max_binding_bytes", "expected at least"]);
    fs::remove_file(&profile).unwrap();
    pipe(&profile);
    compile().refused(2, &["profile.json"]);

    let out = temp.path().join("synth");
    for (like, scale, words) in [
        ("v9", "layers=1", "\"v9\""),
        ("v3", "layers=0", "num_hidden_layers"),
        ("v3", "layers", "FIELD=VALUE"),
        ("v3", "layer=3", "layers, hidden"),
        ("v3", "layers=3,hidden=-5", "hidden_size"),
        ("v3", "n_group=7", "n_group"),
    ] {
        let said = moewe!["synth", "--like", like, "--scale", scale, "-o", &out].run();
        assert!(matches!(said.code, Some(1 | 2)) && said.stderr.contains(words), "{like} {scale}: {said:?}");
        assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    }
    moewe!["synth", "--like", "v3", "--dtype", "int4", "-o", &out].refused(2, &["int4", "fp8, bf16 or f32"]);
    assert_eq!(listing(temp.path()).len(), 1);
}

// ---- Readers that go away, and Ctrl-C

#[test]
fn nobody_reads() {
    for call in [
        moewe!["run", demo(), "Once", "-n", "40"],
        moewe!["run", tiny_bundle(), "--tokens", "1", "--json"],
        moewe!["inspect", golden("v3-tiny")],
        moewe!["explain", tiny_bundle()],
        moewe!["explain", tiny_bundle(), "--json"],
        moewe!["run", "--help"],
        moewe!["doctor", "--device", "list"],
    ] {
        let name = format!("{call:?}");
        let said = call.through("{ \"$@\"; echo \"code $?\" >&2; } | head -c 1").run();
        assert_eq!((said.stderr.as_str(), said.stdout.len()), ("code 0\n", 1), "{name}: {said:?}");
    }
    // Messages that nobody reads are no reason to fail in another way.
    let said = moewe!["run", "nowhere"].through("{ \"$@\" 2>/dev/full; echo $?; }").run();
    assert_eq!(said.stdout, "2\n", "{said:?}");
}

/// Sends Ctrl-C; the child must end within two seconds (in which a busy machine may do little) with exit code 130.
fn interrupted(child: std::process::Child) -> cli::Said {
    let begun = Instant::now();
    cli::interrupt(&child);
    let said = cli::finish(child);
    assert_eq!(said.code, Some(130), "{said:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(said.stderr, "");
    said
}

#[test]
fn interrupt_while_generating() {
    use std::io::Read;
    moewe!["run", demo(), "Once", "-n", "1"].ok(); // so that it is compiled
    let call = moewe!["run", demo(), "Once upon a time", "-n", "100000", "--ignore-eos"];
    let mut child = call.spawn();
    let mut first = [0; 20];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap(); // it has begun to write
    let said = interrupted(child);
    assert!(said.stdout.ends_with('\n'), "{said:?}");
}

#[test]
fn interrupt_while_waiting_for_a_prompt() {
    for call in [moewe!["run", demo()], moewe!["chat", demo()]] {
        let mut child = call.spawn();
        let stdin = child.stdin.take(); // stays open
        std::thread::sleep(Duration::from_millis(1500));
        let said = interrupted(child);
        assert_eq!(said.stdout, "");
        drop(stdin);
    }
}

#[test]
fn interrupt_while_writing() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = temp.path().join("checkpoint");
    let big = "layers=8,experts=64,num_nextn_predict_layers=0";
    let child = moewe!["synth", "--like", "v2-lite", "--scale", big, "-o", &checkpoint].spawn();
    std::thread::sleep(Duration::from_millis(400));
    interrupted(child);
    assert_eq!(listing(temp.path()), []);

    let small = "layers=2,experts=8,hidden=1024,vocab=8192";
    moewe!["synth", "--like", "v2-lite", "--scale", small, "--dtype", "bf16", "-o", &checkpoint].ok();
    let out = temp.path().join("out");
    let before = listing(temp.path());
    let child = moewe!["compile", &checkpoint, "-o", &out, "--weights", "f32"].spawn();
    let begun = Instant::now();
    while listing(temp.path()) == before && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(2)); // until it has begun to write
    }
    interrupted(child);
    assert_eq!(before, listing(temp.path()));
}

// ---- Anything at all

/// Bytes of a checkpoint's files with a few of them changed, and some cut off at the end.
fn disturb(bytes: &mut Vec<u8>, changes: &[(u32, u8)], cut: Option<u32>) {
    for (at, value) in changes {
        let at = *at as usize % bytes.len();
        bytes[at] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut as usize % bytes.len());
    }
}

/// Opens, checks and compiles; errors are welcome, panics are not.
fn compile_anyhow(dir: &Path, out: &Path) {
    use moewe_compiler::checkpoint::Checkpoint;
    use moewe_compiler::compile::{Options, compile};
    use moewe_compiler::profile::Profile;
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    let sound = moewe_compiler::tensors::check(&checkpoint).is_ok();
    let options =
        |plan_only| Options { profile: Profile::load("lavapipe").unwrap(), weights: None, reference: true, plan_only };
    let compiled = compile(&checkpoint, &options(!sound), out, &|_, _| ());
    assert_eq!(out.exists(), compiled.is_ok());
    if compiled.is_ok() {
        moewe_plan::Bundle::open(out).unwrap();
        fs::remove_dir_all(out).unwrap();
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig {
        cases: 96, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn disturbed_safetensors_headers(
        changes in proptest::collection::vec((0u32..20_000, 0u8..), 1..4),
        cut in proptest::option::weighted(0.2, 0u32..),
    ) {
        let scene = Scene::new(SMALL);
        let mut bytes = fs::read(scene.weights()).unwrap();
        disturb(&mut bytes, &changes, cut);
        fs::write(scene.weights(), bytes).unwrap();
        compile_anyhow(&scene.checkpoint, &scene.path("out"));
    }

    #[test]
    fn disturbed_configs(
        changes in proptest::collection::vec((0u32.., b' '..b'~'), 1..4),
        cut in proptest::option::weighted(0.1, 0u32..),
        field in 0usize..64,
        value in proptest::sample::select(vec!["0", "1", "2", "7", "33", "null", "true", "[]", "-1", "1e9", "\"\""]),
    ) {
        let scene = Scene::new(SMALL);
        // One field is changed soundly as JSON goes, then some bytes are not.
        scene.config(|config| {
            let fields = config.as_object_mut().unwrap();
            let at = field % fields.len();
            *fields.values_mut().nth(at).unwrap() = serde_json::from_str(value).unwrap();
        });
        compile_anyhow(&scene.checkpoint, &scene.path("out"));
        let path = scene.checkpoint.join("config.json");
        let mut bytes = fs::read(&path).unwrap();
        disturb(&mut bytes, &changes, cut);
        fs::write(&path, bytes).unwrap();
        compile_anyhow(&scene.checkpoint, &scene.path("out"));
    }
}

/// How many values there are in a value.
fn leaves(value: &Value) -> usize {
    match value {
        Value::Object(fields) => fields.values().map(leaves).sum::<usize>().max(1),
        Value::Array(list) => list.iter().map(leaves).sum::<usize>().max(1),
        _ => 1,
    }
}

/// Changes one value somewhere in a plan. Grids and parameters of kernels are only changed a little: a plan that asks
/// for a great deal of work is slow, but sound.
fn disturb_plan(plan: &mut Value, random: &mut impl FnMut(usize) -> usize) -> String {
    let mut at = plan;
    let mut path = String::new();
    // Any value is as likely as any other, or any branch, so that the few values of small parts are changed too.
    let by_value = random(2) == 0;
    loop {
        let weights: Vec<usize> = match at {
            Value::Object(fields) => {
                let idle = ["generator", "format_version", "warnings", "why", "label", "cost"];
                fields.iter().map(|(name, value)| if idle.contains(&&**name) { 0 } else { leaves(value) }).collect()
            }
            Value::Array(list) => list.iter().map(leaves).collect(),
            _ => break,
        };
        if weights.is_empty() {
            break;
        }
        let weights: Vec<usize> = weights.into_iter().map(|n| if by_value { n } else { n.min(1) }).collect();
        let mut left = random(weights.iter().sum());
        let index = weights.iter().position(|weight| {
            let here = left < *weight;
            left = left.saturating_sub(*weight);
            here
        });
        let index = index.expect("it is below the sum");
        at = match at {
            Value::Object(fields) => {
                let (name, value) = fields.iter_mut().nth(index).unwrap();
                path = format!("{path}.{name}");
                value
            }
            Value::Array(list) => {
                path = format!("{path}[{index}]");
                if random(12) == 0 {
                    if random(2) == 0 {
                        list.remove(index);
                        return path + " removed";
                    }
                    let copy = list[index].clone();
                    list.insert(index, copy);
                    return path + " doubled";
                }
                &mut list[index]
            }
            _ => unreachable!("it has members"),
        };
    }
    let work = path.contains(".params") || path.contains(".grid");
    *at = match (&at, random(8)) {
        (Value::Number(number), choice) => {
            let number = number.as_u64().unwrap_or(1);
            let near = [number + 1, number.saturating_sub(1), number * 2, number / 2, 0, 1];
            let far = [1 << 20, (1 << 32) - 1, 1 << 33, (1 << 48) - 1, 1 << 62, u64::MAX];
            json!(if work || choice < 5 { near[random(6)] } else { far[random(6)] })
        }
        (Value::String(text), 0..4) => json!(format!("{text}x")),
        (Value::String(_), _) => json!(["", "..", "f32", "fp8", "u32", "read", "uniform", "tokens"][random(8)]),
        (Value::Bool(value), _) => json!(!*value),
        _ => [json!(null), json!(0), json!([]), json!({}), json!("tokens")][random(5)].clone(),
    };
    format!("{path} = {at}")
}

/// Runs in a process of its own, so that an abort or a hang is seen: bundles whose plan says anything at all, with a
/// manifest that agrees, are opened, loaded and run.
#[test]
#[ignore = "a part of disturbed_plans"]
fn disturbed_plans_child() {
    use moewe::trace;
    use moewe_plan::{Bundle, ProgramKind};
    use moewe_runtime::{Error, GenerateOptions, Gpu, Model, Selector, Session, SessionOptions, generate};
    let seconds = std::env::var("MOEWE_TEST_SECONDS").map_or(8, |seconds| seconds.parse().unwrap());
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut seed: u64 = std::env::var("MOEWE_TEST_SEED").unwrap().parse().unwrap();
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("bundle");
    copy(Path::new(&std::env::var_os("MOEWE_TEST_BUNDLE").unwrap()), &dir);
    let whole = cli::read_json(&dir.join("plan.json"));
    let open = || Gpu::open(&Selector::Default).unwrap();
    let mut gpu = open();
    let (mut tried, mut ran) = (0, 0);
    while Instant::now() < until {
        let mut plan = whole.clone();
        let change = disturb_plan(&mut plan, &mut random);
        println!("{change}"); // the last line names the culprit
        fs::write(dir.join("plan.json"), plan.to_string()).unwrap();
        reseal(&dir);
        tried += 1;
        let Ok(bundle) = Bundle::open(&dir) else { continue };
        let run = || -> Result<(), Error> {
            let model = Model::load(&gpu, &bundle, &|_| ())?;
            let session = |kinds| Session::new(model.clone(), SessionOptions { kinds, ..SessionOptions::default() });
            let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
            generate(&mut session(vec![ProgramKind::Forward])?, &[1, 2, 3], &options, |_| {
                std::ops::ControlFlow::Continue(())
            })?;
            let kinds = trace::kinds(bundle.plan.model.mtp_modules);
            trace::trace(&mut session(kinds)?, &[1, 2, 3], None, &|_| true)?;
            Ok(())
        };
        match run() {
            Ok(()) => ran += 1,
            Err(Error::DeviceLost { .. }) => gpu = open(),
            Err(_) => {}
        }
    }
    println!("{tried} plans tried, {ran} of them ran");
}

#[test]
fn disturbed_plans() {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = std::env::var("MOEWE_TEST_SEED").unwrap_or_else(|_| seed.to_string());
    let bundle = root().join("small.moewe");
    moewe!["compile", golden(SMALL), "-o", &bundle, "--target", "lavapipe"].ok();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "disturbed_plans_child", "--ignored", "--nocapture"]);
    child.env("MOEWE_TEST_SEED", &seed).env("MOEWE_TEST_BUNDLE", &bundle);
    child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let said = cli::finish(child.spawn().unwrap());
    let last = said.stdout.lines().rfind(|line| line.starts_with('.'));
    assert_eq!(said.code, Some(0), "MOEWE_TEST_SEED={seed}, {last:?}: {} {}", said.stdout, said.stderr);
}
