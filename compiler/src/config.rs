//! `config.json` of a DeepSeek-family model, resolved (every default filled in) and validated (spec §§1, 2, 4, 8).
//! A field may be absent where implementations agree on its default, or where the tensors would contradict a wrong one.
//!
//! Everything behind this file may rely on the ranges checked here: no size derived from a [`Config`] overflows 64 bits.

mod fields;
mod rope;

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use self::fields::{Fields, ORIGINAL};
pub use self::rope::{Rope, Yarn};
use crate::{
    dtype::Dtype,
    error::{Error, Result, clip},
};

/// Largest hidden, intermediate or low-rank width.
const MAX_WIDTH: usize = 1 << 20;
/// Largest head width.
const MAX_HEAD_DIM: usize = 1 << 13;
const MAX_HEADS: usize = 1 << 12;
const MAX_LAYERS: usize = 1 << 10;
const MAX_EXPERTS: usize = 1 << 16;
const MAX_VOCAB: usize = 1 << 24;
const MAX_MTP: usize = 64;
const MAX_POSITION: usize = 1 << 30;
/// Most routed experts of all layers together; the largest release has 23 thousand.
const MAX_ALL_EXPERTS: usize = 1 << 20;
/// Most parameters of all layers together, MTP modules included.
const MAX_PARAMETERS: u128 = 1 << 50;
/// Largest config.json in bytes.
const MAX_FILE: u64 = 1 << 24;

/// Model family; decides defaults and which router is legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Family {
    /// `deepseek_v2`: softmax router.
    V2,
    /// `deepseek_v3`: sigmoid router with selection bias (V3, V3.1, R1).
    V3,
    /// `kimi_k2`: as V3, one expert group.
    KimiK2,
}

/// How router logits become scores (spec §6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Logistic function of each logit.
    Sigmoid,
}

/// How experts are chosen from scores (spec §6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum TopkMethod {
    /// The k best of all.
    Greedy,
    /// The k best of the groups with the best maximum.
    GroupLimitedGreedy,
    /// The k best biased scores of the groups with the best sum of two; has `e_score_correction_bias`.
    NoauxTc,
}

/// FP8 e4m3 weights with one f32 multiplier a block (spec §8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Quantization {
    /// Rows and columns of a block; columns are a multiple of 4.
    pub weight_block_size: [usize; 2],
}

/// A resolved, validated model configuration. Fields are spelled as in `config.json` and the papers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// Model family.
    pub family: Family,
    /// D, width of the residual stream.
    pub hidden_size: usize,
    /// L, decoder layers, MTP modules not counted.
    pub num_hidden_layers: usize,
    /// H, attention heads.
    pub num_attention_heads: usize,
    /// rq, width of the query latent; `None`: one plain `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// r, width of the key-value latent that is cached.
    pub kv_lora_rank: usize,
    /// dn, key and query channels per head without position.
    pub qk_nope_head_dim: usize,
    /// dr, key and query channels per head with rotary position; even.
    pub qk_rope_head_dim: usize,
    /// dv, value channels per head.
    pub v_head_dim: usize,
    /// I, width of a dense feed-forward layer.
    pub intermediate_size: usize,
    /// M, width of one expert; 0 without experts.
    pub moe_intermediate_size: usize,
    /// E, routed experts per MoE layer; 0: every layer is dense.
    pub n_routed_experts: usize,
    /// Shared experts per MoE layer, fused to one MLP of width M · this; may be 0.
    pub n_shared_experts: usize,
    /// k, routed experts per token; 0 without experts.
    pub num_experts_per_tok: usize,
    /// Layers before this one are dense.
    pub first_k_dense_replace: usize,
    /// Only layers divisible by this are MoE.
    pub moe_layer_freq: usize,
    /// Expert groups, a divisor of E; 1 for [`TopkMethod::Greedy`].
    pub n_group: usize,
    /// Groups kept per token, ≤ `n_group`.
    pub topk_group: usize,
    /// Router scoring function.
    pub scoring: Scoring,
    /// Router selection.
    pub topk_method: TopkMethod,
    /// Whether the k weights are divided by their sum; never in the V2 family, whatever the file says (spec §6).
    pub norm_topk_prob: bool,
    /// Factor on the weights of routed experts.
    pub routed_scaling_factor: f64,
    /// eps of the root-mean-square norms (the two latent norms use 1e-6, spec §3).
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// V, tokens in the vocabulary.
    pub vocab_size: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Whether the embedding serves as output head.
    pub tie_word_embeddings: bool,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias.
    pub attention_bias: bool,
    /// MTP modules, stored as layers L, L+1, ….
    pub num_nextn_predict_layers: usize,
    /// Begin-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Storage type that the file states (`torch_dtype` or `dtype`); tensors carry their own.
    pub torch_dtype: Option<Dtype>,
    /// FP8 block quantisation of the linears, where configured.
    pub quantization: Option<Quantization>,
}

impl Config {
    /// Reads and validates a `config.json`.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_value(&read_json(path, MAX_FILE)?, path)
    }

    /// Validates the text of a `config.json`; `path` is for messages.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let value =
            serde_json::from_str(text).map_err(|e| Error::Json { path: path.to_owned(), detail: e.to_string() })?;
        Self::from_value(&value, path)
    }

    /// Validates a parsed `config.json`; `path` is for messages.
    pub fn from_value(value: &Value, path: &Path) -> Result<Self> {
        let Some(map) = value.as_object() else {
            return Err(Error::Json {
                path: path.to_owned(),
                detail: "expected an object with the fields of a model configuration".into(),
            });
        };
        let top = Fields::new(path, map, "");
        let family = parse_family(top)?;

        top.choice("hidden_act", &[("silu", ())])?;
        let qk_rope_head_dim = top.uint("qk_rope_head_dim", 2, MAX_HEAD_DIM)?;
        if !qk_rope_head_dim.is_multiple_of(2) {
            return Err(top.bad("qk_rope_head_dim", "an even number, as channels are rotated in pairs"));
        }
        if top.get("q_lora_rank").is_none() {
            return Err(top.bad("q_lora_rank", "the width of the query latent, or null for a plain q_proj"));
        }
        let moe = Moe::parse(top, family)?;
        let config = Self {
            family,
            hidden_size: top.uint("hidden_size", 1, MAX_WIDTH)?,
            num_hidden_layers: top.uint("num_hidden_layers", 1, MAX_LAYERS)?,
            num_attention_heads: top.uint("num_attention_heads", 1, MAX_HEADS)?,
            q_lora_rank: top.uint_opt("q_lora_rank", 1, MAX_WIDTH)?,
            kv_lora_rank: top.uint("kv_lora_rank", 1, MAX_WIDTH)?,
            qk_nope_head_dim: top.uint("qk_nope_head_dim", 1, MAX_HEAD_DIM)?,
            qk_rope_head_dim,
            v_head_dim: top.uint("v_head_dim", 1, MAX_HEAD_DIM)?,
            intermediate_size: top.uint("intermediate_size", 1, MAX_WIDTH)?,
            moe_intermediate_size: moe.intermediate_size,
            n_routed_experts: moe.experts,
            n_shared_experts: moe.shared,
            num_experts_per_tok: moe.per_tok,
            first_k_dense_replace: moe.first_k_dense_replace,
            moe_layer_freq: moe.layer_freq,
            n_group: moe.n_group,
            topk_group: moe.topk_group,
            scoring: moe.scoring,
            topk_method: moe.topk_method,
            norm_topk_prob: moe.norm_topk_prob,
            routed_scaling_factor: moe.routed_scaling_factor,
            rms_norm_eps: top.float_opt("rms_norm_eps", 1e-30, 1.0)?.unwrap_or(1e-6),
            rope: Rope::parse(top, qk_rope_head_dim)?,
            vocab_size: top.uint("vocab_size", 1, MAX_VOCAB)?,
            max_position_embeddings: top.uint("max_position_embeddings", 1, MAX_POSITION)?,
            tie_word_embeddings: top.bool_or("tie_word_embeddings", false)?,
            attention_bias: top.bool_or("attention_bias", false)?,
            num_nextn_predict_layers: top.uint_opt("num_nextn_predict_layers", 0, MAX_MTP)?.unwrap_or(0),
            bos_token_id: parse_token_ids(top, "bos_token_id")?.first().copied(),
            eos_token_ids: parse_token_ids(top, "eos_token_id")?,
            torch_dtype: parse_dtype(top)?,
            quantization: parse_quantization(top)?,
        };
        config.check_size(top)?;
        Ok(config)
    }

    /// Whether the feed-forward part of layer `layer` has experts. MTP layers (`layer` ≥ L) have them whenever the model has.
    pub fn is_moe(&self, layer: usize) -> bool {
        let main = layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq);
        self.n_routed_experts > 0 && (main || layer >= self.num_hidden_layers)
    }

    /// Layers with an attention block of their own: L plus the MTP modules.
    pub fn all_layers(&self) -> usize {
        self.num_hidden_layers + self.num_nextn_predict_layers
    }

    /// dn + dr, channels of a query or key head.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// r + dr, numbers cached per token and layer.
    pub fn latent_dim(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// S, width of the fused shared-expert MLP; 0 without shared experts.
    pub fn shared_intermediate_size(&self) -> usize {
        self.moe_intermediate_size * self.n_shared_experts
    }

    /// Factor on q·k before the softmax, YaRN included.
    pub fn softmax_scale(&self) -> f64 {
        self.rope.softmax_scale(self.qk_head_dim())
    }

    /// Rejects models whose sizes are each in range but absurd together.
    fn check_size(&self, top: Fields) -> Result<()> {
        let layers = self.all_layers();
        if layers * self.n_routed_experts > MAX_ALL_EXPERTS {
            return Err(top.bad(
                "n_routed_experts",
                format!("at most {MAX_ALL_EXPERTS} experts in all {layers} layers together"),
            ));
        }
        let n = |v: usize| v as u128;
        let d = n(self.hidden_size);
        let heads = n(self.num_attention_heads);
        let query = heads * n(self.qk_head_dim());
        let attention = self.q_lora_rank.map_or(d * query, |rq| n(rq) * (d + query))
            + d * n(self.latent_dim())
            + n(self.kv_lora_rank) * heads * n(self.qk_nope_head_dim + self.v_head_dim)
            + d * heads * n(self.v_head_dim);
        let experts = n(self.moe_intermediate_size) * n(self.n_routed_experts + self.n_shared_experts);
        let mtp = n(self.num_nextn_predict_layers);
        let total = n(layers) * (attention + 3 * d * (n(self.intermediate_size) + experts))
            + mtp * 2 * d * d
            + (2 + 2 * mtp) * d * n(self.vocab_size);
        if total > MAX_PARAMETERS {
            return Err(top.bad(
                "hidden_size",
                format!("a model of at most {MAX_PARAMETERS} parameters, and these fields together describe {total}"),
            ));
        }
        Ok(())
    }
}

/// Reads a JSON file of at most `limit` bytes.
pub(crate) fn read_json(path: &Path, limit: u64) -> Result<Value> {
    let text = read_text(path, limit)?;
    serde_json::from_str(&text).map_err(|e| Error::Json { path: path.to_owned(), detail: e.to_string() })
}

/// Reads a UTF-8 file of at most `limit` bytes. Only regular files: opening a pipe would wait forever.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let meta = std::fs::metadata(path).map_err(read)?;
    let bad = |detail: String| Error::Json { path: path.to_owned(), detail };
    if !meta.is_file() {
        return Err(bad("it is not a regular file".into()));
    }
    if meta.len() > limit {
        return Err(bad(format!("it has {} bytes, more than the {limit} that such a file may have", meta.len())));
    }
    String::from_utf8(std::fs::read(path).map_err(read)?).map_err(|e| bad(e.to_string()))
}

/// The fields that only mixture-of-experts models need.
struct Moe {
    intermediate_size: usize,
    experts: usize,
    shared: usize,
    per_tok: usize,
    first_k_dense_replace: usize,
    layer_freq: usize,
    n_group: usize,
    topk_group: usize,
    scoring: Scoring,
    topk_method: TopkMethod,
    norm_topk_prob: bool,
    routed_scaling_factor: f64,
}

impl Moe {
    fn parse(top: Fields, family: Family) -> Result<Self> {
        let (scoring, method) = match family {
            Family::V2 => (Scoring::Softmax, TopkMethod::Greedy),
            Family::V3 | Family::KimiK2 => (Scoring::Sigmoid, TopkMethod::NoauxTc),
        };
        let mut moe = Self {
            intermediate_size: 0,
            experts: top.uint_opt("n_routed_experts", 0, MAX_EXPERTS)?.unwrap_or(0),
            shared: 0,
            per_tok: 0,
            first_k_dense_replace: 0,
            layer_freq: 1,
            n_group: 1,
            topk_group: 1,
            scoring,
            topk_method: method,
            norm_topk_prob: family != Family::V2,
            routed_scaling_factor: 1.0,
        };
        if moe.experts == 0 {
            // null says "dense" clearly; leaving the field out or writing 0 only does where nothing else speaks of experts.
            let explicit = top.get("n_routed_experts").is_some_and(Value::is_null);
            if !explicit && top.uint_opt("num_experts_per_tok", 0, MAX_EXPERTS)?.is_some_and(|k| k > 0) {
                return Err(top.bad(
                    "n_routed_experts",
                    format!("a whole number from 1 to {MAX_EXPERTS}, as num_experts_per_tok is given, or null for a dense model"),
                ));
            }
            return Ok(moe);
        }

        moe.intermediate_size = top.uint("moe_intermediate_size", 1, MAX_WIDTH)?;
        moe.shared = top.uint_opt("n_shared_experts", 0, 1024)?.unwrap_or(0);
        moe.per_tok = top.uint("num_experts_per_tok", 1, moe.experts.min(1024))?;
        moe.first_k_dense_replace = top.uint("first_k_dense_replace", 0, MAX_LAYERS)?;
        moe.layer_freq = top.uint_opt("moe_layer_freq", 1, MAX_LAYERS)?.unwrap_or(1);
        moe.norm_topk_prob = top.bool_or("norm_topk_prob", moe.norm_topk_prob)? && family != Family::V2;
        moe.routed_scaling_factor = match family {
            Family::V2 => top.float_opt("routed_scaling_factor", 1e-6, 1e6)?.unwrap_or(1.0),
            // Implementations disagree on the default of this family.
            Family::V3 | Family::KimiK2 => top.float("routed_scaling_factor", 1e-6, 1e6)?,
        };

        let stated = top.choice("scoring_func", &[("softmax", Scoring::Softmax), ("sigmoid", Scoring::Sigmoid)])?;
        if stated.is_some_and(|s| s != scoring) {
            return Err(
                top.bad("scoring_func", format!("{scoring:?} in lower case, the scoring of the {family:?} family"))
            );
        }
        let methods = match family {
            Family::V2 => {
                &[("greedy", TopkMethod::Greedy), ("group_limited_greedy", TopkMethod::GroupLimitedGreedy)][..]
            }
            Family::V3 | Family::KimiK2 => &[("noaux_tc", TopkMethod::NoauxTc)][..],
        };
        match top.choice("topk_method", methods)? {
            Some(stated) => moe.topk_method = stated,
            None if family == Family::V2 && top.uint_opt("n_group", 1, MAX_EXPERTS)?.is_some_and(|n| n > 1) => {
                return Err(top.bad("topk_method", "\"greedy\" or \"group_limited_greedy\", as n_group is above 1"));
            }
            None => {}
        }
        moe.parse_groups(top)?;
        Ok(moe)
    }

    fn parse_groups(&mut self, top: Fields) -> Result<()> {
        if self.topk_method == TopkMethod::Greedy {
            return Ok(());
        }
        let experts = self.experts;
        for name in ["n_group", "topk_group"] {
            if top.get(name).is_none() {
                return Err(top.bad(name, "a number of expert groups, 1 for no groups"));
            }
        }
        self.n_group = top.uint_opt("n_group", 1, experts)?.unwrap_or(1);
        self.topk_group = top.uint_opt("topk_group", 1, self.n_group)?.unwrap_or(1);
        if !experts.is_multiple_of(self.n_group) {
            return Err(top.bad("n_group", format!("a divisor of n_routed_experts, which is {experts}")));
        }
        let group = experts / self.n_group;
        if self.topk_method == TopkMethod::NoauxTc && self.n_group > 1 && group < 2 {
            return Err(
                top.bad("n_group", format!("at most {}, as each group is scored by its two best experts", experts / 2))
            );
        }
        let kept = self.topk_group * group;
        if self.per_tok > kept {
            return Err(top.bad(
                "num_experts_per_tok",
                format!("at most {kept}, the experts in the {} groups of {group} that a token keeps", self.topk_group),
            ));
        }
        Ok(())
    }
}

/// Family from `model_type` and `architectures`, which must agree where both are present.
fn parse_family(top: Fields) -> Result<Family> {
    let model_type = top.str_opt("model_type")?;
    let architecture = match top.present("architectures") {
        None => None,
        Some(Value::Array(list)) if list.is_empty() => None,
        Some(Value::Array(list)) if list.len() == 1 && list[0].is_string() => list[0].as_str(),
        Some(_) => return Err(top.bad("architectures", "a list of one name")),
    };
    let unknown = || {
        let show = |v: Option<&str>| v.map_or_else(|| "absent".into(), |s| format!("\"{}\"", clip(s)));
        Error::UnknownArchitecture {
            path: top.path().to_owned(),
            found: format!("model_type {}, architectures {}", show(model_type), show(architecture)),
        }
    };
    let by_type = match model_type {
        None => None,
        Some("deepseek_v2") => Some(Family::V2),
        Some("deepseek_v3") => Some(Family::V3),
        Some("kimi_k2") => Some(Family::KimiK2),
        Some(_) => return Err(unknown()),
    };
    match (by_type, architecture) {
        (Some(family), None) => Ok(family),
        (None | Some(Family::V2), Some("DeepseekV2ForCausalLM")) => Ok(Family::V2),
        (Some(Family::KimiK2), Some("DeepseekV3ForCausalLM")) => Ok(Family::KimiK2),
        (None | Some(Family::V3), Some("DeepseekV3ForCausalLM")) => Ok(Family::V3),
        _ => Err(unknown()),
    }
}

/// A token id or a list of them; absent and null give an empty list.
fn parse_token_ids(top: Fields, name: &str) -> Result<Vec<u32>> {
    let bad = || top.bad(name, "a token id, a list of token ids, or null");
    let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok()).ok_or_else(bad);
    match top.present(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= 1024 => list.iter().map(id).collect(),
        Some(v) => Ok(vec![id(v)?]),
    }
}

fn parse_dtype(top: Fields) -> Result<Option<Dtype>> {
    const NAMES: [(&str, Dtype); 4] =
        [("bfloat16", Dtype::Bf16), ("float16", Dtype::F16), ("float32", Dtype::F32), ("float8_e4m3fn", Dtype::F8E4m3)];
    let new = top.choice("dtype", &NAMES)?;
    Ok(top.choice("torch_dtype", &NAMES)?.or(new))
}

fn parse_quantization(top: Fields) -> Result<Option<Quantization>> {
    let Some(map) = top.object_opt("quantization_config")? else { return Ok(None) };
    let fields = Fields::new(top.path(), map, "quantization_config.");
    if fields.choice("quant_method", &[("fp8", ())])?.is_none() {
        return Err(fields.bad("quant_method", "\"fp8\""));
    }
    fields.choice("fmt", &[("e4m3", ())])?;
    fields.choice("activation_scheme", &[("dynamic", ())])?;
    let block = fields.get("weight_block_size").and_then(Value::as_array).and_then(|list| match &list[..] {
        [rows, cols] => Some([usize::try_from(rows.as_u64()?).ok()?, usize::try_from(cols.as_u64()?).ok()?]),
        _ => None,
    });
    match block {
        Some([rows, cols]) if (1..=MAX_WIDTH).contains(&rows) && (4..=MAX_WIDTH).contains(&cols) && cols % 4 == 0 => {
            Ok(Some(Quantization { weight_block_size: [rows, cols] }))
        }
        _ => Err(fields.bad_advice(
            "weight_block_size",
            "two whole numbers [rows, columns], columns a multiple of 4",
            ORIGINAL,
        )),
    }
}
