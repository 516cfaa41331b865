//! Configuration.

use super::*;

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
