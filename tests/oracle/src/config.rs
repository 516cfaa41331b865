//! The part of config.json that the mathematics needs. Spec §2.

use serde_json::Value;

use crate::ops::MlaDims;
use crate::rope::{RopeParams, Yarn};
use crate::router::{RouterParams, Scoring, TopkMethod};
use crate::{Error, Result};

/// A model's config.json, defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// L, `num_hidden_layers`.
    pub layers: usize,
    /// K, `num_nextn_predict_layers`: MTP modules, at layer indices L and up.
    pub mtp_modules: usize,
    /// D, `hidden_size`.
    pub hidden: usize,
    /// V, `vocab_size`.
    pub vocab: usize,
    /// rq, `q_lora_rank`; nothing means a plain `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// Heads and head sizes; the softmax scale comes from `rope`.
    pub mla: MlaDims,
    /// RoPE and YaRN.
    pub rope: RopeParams,
    /// `rms_norm_eps`; the two norms inside attention use 1e-6 instead (spec §3).
    pub rms_norm_eps: f64,
    /// `first_k_dense_replace`.
    pub first_dense: usize,
    /// `moe_layer_freq`.
    pub moe_layer_freq: usize,
    /// The router; nothing when there are no routed experts, so that every layer is dense.
    pub router: Option<RouterParams>,
    /// `n_shared_experts`, 0 when absent.
    pub shared_experts: usize,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// `weight_block_size` of FP8 weights, [128, 128] when absent.
    pub fp8_block: [usize; 2],
}

impl Config {
    /// Reads the fields out of a parsed config.json.
    pub fn from_json(json: &Value) -> Result<Self> {
        let rope = rope_params(json)?;
        let has_experts = number(json, "n_routed_experts").is_some_and(|n| n > 0.0);
        Ok(Self {
            layers: count(json, "num_hidden_layers", None)?,
            mtp_modules: count(json, "num_nextn_predict_layers", Some(0))?,
            hidden: count(json, "hidden_size", None)?,
            vocab: count(json, "vocab_size", None)?,
            q_lora_rank: number(json, "q_lora_rank").filter(|&n| n > 0.0).map(|n| n as usize),
            mla: MlaDims {
                heads: count(json, "num_attention_heads", None)?,
                nope: rope.nope_dim,
                rope: rope.dim,
                value: count(json, "v_head_dim", None)?,
                latent: count(json, "kv_lora_rank", None)?,
                scale: rope.softmax_scale(),
            },
            rope,
            rms_norm_eps: number(json, "rms_norm_eps").ok_or_else(|| missing("rms_norm_eps"))?,
            first_dense: count(json, "first_k_dense_replace", Some(0))?,
            moe_layer_freq: count(json, "moe_layer_freq", Some(1))?,
            router: has_experts.then(|| router_params(json)).transpose()?,
            shared_experts: count(json, "n_shared_experts", Some(0))?,
            tied: flag(json, "tie_word_embeddings", false),
            fp8_block: fp8_block(json)?,
        })
    }

    /// Whether main-model layer `l` has experts (spec §1).
    pub fn is_moe(&self, l: usize) -> bool {
        self.router.is_some() && l >= self.first_dense && l.is_multiple_of(self.moe_layer_freq)
    }
}

/// RoPE parameters from `rope_parameters`, or `rope_scaling` and `rope_theta` (spec §§2, 4).
pub fn rope_params(json: &Value) -> Result<RopeParams> {
    let nested = if json["rope_parameters"].is_object() { &json["rope_parameters"] } else { &json["rope_scaling"] };
    let theta = if json["rope_parameters"].is_object() {
        number(nested, "rope_theta").or_else(|| number(json, "rope_theta"))
    } else {
        number(json, "rope_theta").or_else(|| number(nested, "rope_theta"))
    };
    let kind = nested["type"].as_str().or_else(|| nested["rope_type"].as_str()).unwrap_or("default");
    let yarn = match kind {
        "yarn" => Some(Yarn {
            factor: number(nested, "factor").ok_or_else(|| missing("factor"))?,
            original_max_position_embeddings: number(nested, "original_max_position_embeddings")
                .ok_or_else(|| missing("original_max_position_embeddings"))?,
            beta_fast: number(nested, "beta_fast").unwrap_or(32.0),
            beta_slow: number(nested, "beta_slow").unwrap_or(1.0),
            mscale: number(nested, "mscale"),
            mscale_all_dim: number(nested, "mscale_all_dim"),
            attention_factor: number(nested, "attention_factor"),
        }),
        "default" => None,
        other => {
            return Err(Error(format!("config.json: no reference for rope type {other:?}")));
        }
    };
    Ok(RopeParams {
        dim: count(json, "qk_rope_head_dim", None)?,
        nope_dim: count(json, "qk_nope_head_dim", None)?,
        theta: theta.unwrap_or(10_000.0),
        interleave: flag(json, "rope_interleave", true),
        yarn,
    })
}

/// Router parameters (spec §6). What is absent follows `model_type`, or, without one, `scoring_func` (spec §2).
pub fn router_params(json: &Value) -> Result<RouterParams> {
    let scoring = match (json["scoring_func"].as_str(), json["model_type"].as_str()) {
        (Some("softmax"), _) | (None, Some("deepseek_v2")) => Scoring::Softmax,
        (Some("sigmoid"), _) | (None, Some("deepseek_v3" | "kimi_k2")) => Scoring::Sigmoid,
        other => {
            return Err(Error(format!("config.json: unknown (scoring_func, model_type) {other:?}")));
        }
    };
    let method = match (json["topk_method"].as_str(), scoring) {
        (Some("greedy"), _) | (None, Scoring::Softmax) => TopkMethod::Greedy,
        (Some("group_limited_greedy"), _) => TopkMethod::GroupLimitedGreedy,
        (Some("noaux_tc"), _) | (None, Scoring::Sigmoid) => TopkMethod::NoauxTc,
        (Some(other), _) => {
            return Err(Error(format!("config.json: unknown topk_method {other:?}")));
        }
    };
    Ok(RouterParams {
        scoring,
        method,
        groups: count(json, "n_group", Some(1))?,
        topk_group: count(json, "topk_group", Some(1))?,
        top_k: count(json, "num_experts_per_tok", None)?,
        norm_topk_prob: flag(json, "norm_topk_prob", scoring == Scoring::Sigmoid),
        scale: number(json, "routed_scaling_factor").unwrap_or(1.0),
    })
}

fn fp8_block(json: &Value) -> Result<[usize; 2]> {
    let block = &json["quantization_config"]["weight_block_size"];
    if block.is_null() {
        return Ok([128, 128]);
    }
    let side = |i: usize| block[i].as_u64().filter(|&n| n > 0).map(|n| n as usize);
    side(0).zip(side(1)).map(Into::into).ok_or_else(|| Error(format!("config.json: weight_block_size {block}")))
}

fn missing(key: &str) -> Error {
    Error(format!("config.json: {key} is not there, or is not a number that makes sense"))
}

/// A number that may be absent or null.
fn number(json: &Value, key: &str) -> Option<f64> {
    json[key].as_f64()
}

/// A flag that may be absent or null.
fn flag(json: &Value, key: &str, default: bool) -> bool {
    json[key].as_bool().unwrap_or(default)
}

/// A count, with the value to take if it is absent or null.
fn count(json: &Value, key: &str, default: Option<usize>) -> Result<usize> {
    let value = if json[key].is_null() { default } else { json[key].as_u64().map(|n| n as usize) };
    value.ok_or_else(|| missing(key))
}
