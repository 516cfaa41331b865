//! `config.json`: what is accepted, what is refused and in which words.

use std::path::{Path, PathBuf};

use moewe_compiler::config::{Config, Family, Scoring, TopkMethod};
use proptest::prelude::*;
use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn golden_value(name: &str) -> Value {
    let text = std::fs::read_to_string(golden().join(name).join("config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn parse(value: &Value) -> Result<Config, String> {
    Config::from_value(value, Path::new("some/config.json")).map_err(|e| e.to_string())
}

/// `v3-tiny` with fields replaced; `Value::Null` in `changes` stays null, see `without` for absence.
fn v3_with(changes: &[(&str, Value)]) -> Value {
    let mut value = golden_value("v3-tiny");
    for (field, v) in changes {
        value[*field] = v.clone();
    }
    value
}

fn without(field: &str) -> Value {
    let mut value = golden_value("v3-tiny");
    value.as_object_mut().unwrap().remove(field).expect(field);
    value
}

/// Asserts that the config is refused with a message that holds each of `parts`.
fn refused(value: &Value, parts: &[&str]) {
    let message = parse(value).expect_err(&format!("{parts:?} should have been refused"));
    assert!(!message.contains('\n'), "{message}");
    for part in parts.iter().chain(&["some/config.json"]) {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn golden_configs_parse() {
    let mut seen = 0;
    for dir in ["", "../data"].iter().flat_map(|dir| std::fs::read_dir(golden().join(dir)).unwrap()) {
        let file = dir.unwrap().path().join("config.json");
        if file.exists() {
            Config::load(&file).unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 10, "only {seen} golden configs");
}

#[test]
fn fields_of_each_family() {
    let v3 = parse(&golden_value("v3-fp8-tiny")).unwrap();
    assert_eq!((v3.family, v3.scoring, v3.topk_method), (Family::V3, Scoring::Sigmoid, TopkMethod::NoauxTc));
    assert_eq!(v3.quantization.unwrap().weight_block_size, [128, 128]);
    assert_eq!((v3.num_nextn_predict_layers, v3.all_layers(), v3.q_lora_rank), (1, 4, Some(96)));
    assert!(!v3.is_moe(0) && v3.is_moe(1) && v3.is_moe(3));
    assert_eq!((v3.latent_dim(), v3.qk_head_dim()), (80, 48));
    assert!(v3.norm_topk_prob);

    let lite = parse(&golden_value("v2-lite-tiny")).unwrap();
    assert_eq!((lite.family, lite.scoring, lite.topk_method), (Family::V2, Scoring::Softmax, TopkMethod::Greedy));
    assert_eq!((lite.q_lora_rank, lite.num_nextn_predict_layers), (None, 0));
    assert_eq!(lite.shared_intermediate_size(), 48);
    assert!(!lite.norm_topk_prob);

    let v2 = parse(&golden_value("v2-tiny")).unwrap();
    assert_eq!((v2.topk_method, v2.n_group, v2.topk_group), (TopkMethod::GroupLimitedGreedy, 4, 2));

    let mut stated = golden_value("v2-tiny");
    stated["norm_topk_prob"] = json!(true);
    stated.as_object_mut().unwrap().remove("routed_scaling_factor");
    let stated = parse(&stated).unwrap();
    assert!(!stated.norm_topk_prob && stated.routed_scaling_factor.to_bits() == 1f64.to_bits());

    let kimi = parse(&golden_value("kimi-k2-tiny")).unwrap();
    assert_eq!((kimi.family, kimi.n_group, kimi.n_routed_experts), (Family::KimiK2, 1, 96));
}

#[test]
fn old_and_new_spellings_mean_the_same() {
    let old = parse(&golden_value("v3-tiny")).unwrap();

    let mut value = golden_value("v3-tiny");
    let map = value.as_object_mut().unwrap();
    let mut rope = map.remove("rope_scaling").unwrap();
    let rope_map = rope.as_object_mut().unwrap();
    rope_map.remove("type");
    rope_map.insert("rope_type".into(), json!("yarn"));
    rope_map.insert("rope_theta".into(), map.remove("rope_theta").unwrap());
    let dtype = map.remove("torch_dtype").unwrap();
    map.insert("rope_parameters".into(), rope);
    map.insert("dtype".into(), dtype);
    map.insert("eos_token_id".into(), json!([1]));
    assert_eq!(parse(&value).unwrap(), old);

    let mut value = golden_value("v3-tiny");
    value["rope_scaling"].as_object_mut().unwrap().retain(|k, _| k != "rope_type" && k != "rope_theta");
    assert_eq!(parse(&value).unwrap(), old);
}

#[test]
fn defaults() {
    for (field, is_default) in [
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("norm_topk_prob", "true"),
        ("hidden_act", "silu"),
        ("model_type", "deepseek_v3"),
        ("architectures", "V3"),
        ("attention_bias", "false"),
        ("tie_word_embeddings", "false"),
        ("moe_layer_freq", "1"),
        ("rms_norm_eps", "1e-6"),
        ("rope_theta", "1e4"),
    ] {
        assert_eq!(parse(&without(field)), parse(&golden_value("v3-tiny")), "{field} absent means {is_default}");
    }
    assert!(parse(&golden_value("v3-tiny")).unwrap().rope.interleave);
    assert_eq!(parse(&without("n_shared_experts")).unwrap().n_shared_experts, 0);
    assert_eq!(parse(&without("num_nextn_predict_layers")).unwrap().num_nextn_predict_layers, 0);
    assert!(parse(&v3_with(&[("eos_token_id", json!(null))])).unwrap().eos_token_ids.is_empty());
    assert_eq!(parse(&v3_with(&[("eos_token_id", json!([1, 5]))])).unwrap().eos_token_ids, [1, 5]);
    assert!(parse(&v3_with(&[("rope_scaling", json!(null))])).unwrap().rope.yarn.is_none());
    let dense = parse(&v3_with(&[("n_routed_experts", json!(null))])).unwrap();
    assert!((0..4).all(|l| !dense.is_moe(l)));
    let every_second = parse(&v3_with(&[("moe_layer_freq", json!(2))])).unwrap();
    assert!(!every_second.is_moe(1) && every_second.is_moe(2) && !every_second.is_moe(3) && every_second.is_moe(4));
}

#[test]
fn required_fields() {
    for field in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "intermediate_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "vocab_size",
        "max_position_embeddings",
    ] {
        refused(&without(field), &[&format!("`{field}` is absent"), "expected", "config.json from the model's"]);
    }
}

#[test]
fn zero_negative_huge_and_wrong_types() {
    for field in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "moe_layer_freq",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "routed_scaling_factor",
        "n_routed_experts",
    ] {
        for bad in [json!(0), json!(-1), json!(1u64 << 62), json!("64"), json!([64]), json!(true), json!(1e300)] {
            refused(&v3_with(&[(field, bad.clone())]), &[&format!("`{field}` is {}", clipped(&bad))]);
        }
    }
    for field in
        ["n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "eos_token_id", "bos_token_id"]
    {
        for bad in [json!(-1), json!(1u64 << 62), json!("64"), json!(0.5)] {
            refused(&v3_with(&[(field, bad.clone())]), &[&format!("`{field}` is {}", clipped(&bad))]);
        }
    }
    for field in ["tie_word_embeddings", "attention_bias", "norm_topk_prob", "rope_interleave"] {
        refused(&v3_with(&[(field, json!("no"))]), &[&format!("`{field}` is \"no\""), "true or false"]);
    }
}

fn clipped(value: &Value) -> String {
    value.to_string()
}

#[test]
fn inconsistent_fields() {
    refused(&v3_with(&[("n_group", json!(5))]), &["`n_group` is 5", "divisor of n_routed_experts, which is 16"]);
    refused(&v3_with(&[("topk_group", json!(5))]), &["`topk_group` is 5", "from 1 to 4"]);
    refused(&v3_with(&[("n_group", json!(16)), ("topk_group", json!(8))]), &["`n_group` is 16", "two best experts"]);
    refused(&v3_with(&[("num_experts_per_tok", json!(9))]), &["`num_experts_per_tok` is 9", "at most 8"]);
    refused(&v3_with(&[("num_experts_per_tok", json!(17))]), &["`num_experts_per_tok` is 17", "from 1 to 16"]);
    refused(&v3_with(&[("qk_rope_head_dim", json!(15))]), &["`qk_rope_head_dim` is 15", "even"]);
    refused(&v3_with(&[("scoring_func", json!("softmax"))]), &["`scoring_func` is \"softmax\"", "V3"]);
    refused(&v3_with(&[("topk_method", json!("greedy"))]), &["`topk_method` is \"greedy\"", "noaux_tc"]);
    refused(&v3_with(&[("hidden_act", json!("gelu"))]), &["`hidden_act` is \"gelu\"", "silu"]);
    refused(&v3_with(&[("rope_theta", json!(5e4))]), &["`rope_scaling.rope_theta` is 10000", "50000"]);
    refused(
        &v3_with(&[
            ("hidden_size", json!(1 << 20)),
            ("intermediate_size", json!(1 << 20)),
            ("num_hidden_layers", json!(1024)),
        ]),
        &["`hidden_size` is 1048576", "these fields together"],
    );
    refused(
        &v3_with(&[("n_routed_experts", json!(65536)), ("num_hidden_layers", json!(400))]),
        &["`n_routed_experts` is 65536", "in all 401 layers"],
    );
    let mut v2 = golden_value("v2-tiny");
    v2.as_object_mut().unwrap().remove("topk_method");
    refused(&v2, &["`topk_method` is absent"]);
}

#[test]
fn rope_kinds() {
    for kind in ["linear", "dynamic", "llama3", "longrope"] {
        let scaling = json!({"type": kind, "factor": 4.0});
        refused(&v3_with(&[("rope_scaling", scaling)]), &[&format!("`rope_scaling.type` is \"{kind}\""), "\"yarn\""]);
    }
    let yarn = |field: &str, v: Value| {
        let mut scaling = golden_value("v3-tiny")["rope_scaling"].clone();
        scaling[field] = v;
        v3_with(&[("rope_scaling", scaling)])
    };
    for (field, bad) in [
        ("factor", json!(0)),
        ("factor", json!(-4)),
        ("original_max_position_embeddings", json!(0)),
        ("original_max_position_embeddings", json!(null)),
        ("beta_fast", json!(0)),
        ("beta_slow", json!(64)),
        ("mscale", json!("1")),
        ("attention_factor", json!(0)),
        ("rope_type", json!("default")),
    ] {
        let name = if field == "beta_slow" { "beta_fast" } else { field };
        refused(&yarn(field, bad), &[&format!("`rope_scaling.{name}` is ")]);
    }
    refused(&v3_with(&[("rope_scaling", json!({"factor": 4.0}))]), &["`rope_scaling.rope_type` is absent"]);
    refused(&v3_with(&[("rope_scaling", json!("yarn"))]), &["`rope_scaling` is \"yarn\"", "an object or null"]);
    let factor = parse(&yarn("attention_factor", json!(1.5))).unwrap().rope.cos_sin_factor();
    assert!((factor - 1.5).abs() < 1e-15);
}

#[test]
fn quantization_kinds() {
    let with = |q: Value| v3_with(&[("quantization_config", q)]);
    let good =
        json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32], "activation_scheme": "dynamic"});
    assert_eq!(parse(&with(good)).unwrap().quantization.unwrap().weight_block_size, [64, 32]);
    refused(
        &with(json!({"quant_method": "awq", "bits": 4})),
        &["`quantization_config.quant_method` is \"awq\"", "fp8"],
    );
    refused(&with(json!({"weight_block_size": [128, 128]})), &["`quantization_config.quant_method` is absent"]);
    refused(&with(json!({"quant_method": "fp8", "fmt": "e5m2"})), &["`quantization_config.fmt` is \"e5m2\"", "e4m3"]);
    for block in
        [json!(null), json!([128]), json!([0, 128]), json!([128, 0]), json!([128, 6]), json!([128, -4]), json!(128)]
    {
        refused(
            &with(json!({"quant_method": "fp8", "weight_block_size": block})),
            &["`quantization_config.weight_block_size` is ", "multiple of 4"],
        );
    }
    refused(
        &with(json!({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"})),
        &["`quantization_config.activation_scheme` is \"static\"", "dynamic"],
    );
}

#[test]
fn unknown_architectures() {
    for (model_type, architecture) in [
        ("deepseek_v32", "DeepseekV32ForCausalLM"),
        ("deepseek_v4", "DeepseekV4ForCausalLM"),
        ("deepseek", "DeepseekForCausalLM"),
        ("llama", "LlamaForCausalLM"),
        ("deepseek_v3", "DeepseekV2ForCausalLM"),
        ("deepseek_v2", "DeepseekV3ForCausalLM"),
    ] {
        refused(
            &v3_with(&[("model_type", json!(model_type)), ("architectures", json!([architecture]))]),
            &["unknown architecture", model_type, architecture, "supported are DeepseekV2ForCausalLM", "kimi_k2"],
        );
    }
    refused(&json!({}), &["unknown architecture: model_type absent, architectures absent"]);
    refused(&v3_with(&[("architectures", json!([1]))]), &["`architectures` is [1]"]);
    refused(&json!([]), &["expected an object"]);
}

#[test]
fn not_json() {
    let error = Config::from_json("{\"hidden_size\": ", Path::new("x/config.json")).unwrap_err().to_string();
    assert!(error.starts_with("x/config.json is not usable JSON: EOF"), "{error}");
    let error = Config::load(Path::new("/nowhere/config.json")).unwrap_err().to_string();
    assert!(error.starts_with("cannot read /nowhere/config.json"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let error = Config::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    assert!(Config::from_json(&"[".repeat(100_000), Path::new("x")).is_err());
}

/// RoPE tables of real configurations, computed elsewhere.
#[test]
fn rope_tables() {
    let text = std::fs::read_to_string(golden().join("units.json")).unwrap();
    let units: Value = serde_json::from_str(&text).unwrap();
    let cases = units["rope"].as_object().unwrap();
    assert!(cases.len() >= 6);
    for (name, case) in cases {
        let fields: Vec<_> = case["config"].as_object().unwrap().iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let config = parse(&v3_with(&fields)).unwrap();
        let close = |what: &str, found: f64, expected: &Value| {
            let expected = expected.as_f64().unwrap();
            assert!((found - expected).abs() <= 1e-14 * expected.abs(), "{name} {what}: {found} instead of {expected}");
        };
        let expected = case["inv_freq"].as_array().unwrap();
        let found = config.rope.inv_freq();
        assert_eq!(found.len(), expected.len(), "{name}");
        for (f, e) in found.iter().zip(expected) {
            close("inv_freq", *f, e);
        }
        close("cos_sin_factor", config.rope.cos_sin_factor(), &case["cos_sin_factor"]);
        close("softmax_scale", config.softmax_scale(), &case["softmax_scale"]);
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-4i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u32..64).prop_map(|bit| Value::from(1u64 << bit)),
        "[ -~]{0,8}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!([1, "x", null])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    /// Whatever stands in a few fields: accepted or refused, and what is accepted has usable numbers.
    #[test]
    fn any_values(changes in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4), nested in any::<bool>()) {
        let mut value = golden_value("v3-fp8-tiny");
        for (index, new) in changes {
            let mut map = value.as_object_mut().unwrap();
            if nested && let Some(Value::Object(_)) = map.get("rope_scaling") {
                map = map["rope_scaling"].as_object_mut().unwrap();
            }
            let field = map.keys().nth(index.index(map.len())).unwrap().clone();
            map.insert(field, new);
        }
        if let Ok(config) = parse(&value) {
            prop_assert!(config.num_experts_per_tok <= config.n_routed_experts);
            prop_assert!(config.rope.inv_freq().iter().all(|f| f.is_finite()));
            prop_assert!(config.softmax_scale().is_finite() && config.rope.cos_sin_factor().is_finite());
            for layer in 0..config.all_layers().min(100) {
                config.is_moe(layer);
            }
        }
    }

    #[test]
    fn any_bytes(position in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut text = golden_value("v3-fp8-tiny").to_string().into_bytes();
        let at = position.index(text.len());
        if cut { text.truncate(at) } else { text[at] = byte }
        if let Ok(text) = String::from_utf8(text) {
            let _ = Config::from_json(&text, Path::new("x"));
        }
    }
}
