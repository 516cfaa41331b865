//! Which tensors a configuration implies, and whether a checkpoint has them (spec §§1, 8).

use serde::Serialize;

use crate::{
    checkpoint::{Checkpoint, TensorView},
    config::{Config, TopkMethod},
    dtype::Dtype,
    error::{Error, Result},
};

/// Where the parameters of a tensor are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Token embedding, [V, D].
    Embedding,
    /// Output head, [V, D].
    Head,
    /// Projections of attention, their biases and the two latent norms.
    Attention,
    /// Dense feed-forward layers.
    DenseFfn,
    /// Router weight `[E, D]` and selection bias `[E]`.
    Router,
    /// Routed experts.
    RoutedExperts,
    /// Shared experts.
    SharedExperts,
    /// Layer norms and the final norm.
    Norms,
    /// `eh_proj`, which joins embedding and hidden state of an MTP module.
    MtpProjection,
}

/// How a tensor is used, which decides the dtypes it may be stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Matrix [out, in] that may be stored as FP8 with block scales.
    Linear,
    /// Matrix [out, in] that is never quantised: embeddings, heads, `eh_proj`, router.
    Plain,
    /// Norm weight, bias or selection bias.
    Vector,
}

impl Role {
    /// Stored dtypes that are read.
    pub fn dtypes(self) -> &'static [Dtype] {
        match self {
            Self::Linear => &[Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F8E4m3],
            Self::Plain | Self::Vector => &[Dtype::F32, Dtype::F16, Dtype::Bf16],
        }
    }
}

/// One tensor that a configuration implies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Hugging Face name.
    pub name: String,
    /// Outer dimension first.
    pub shape: Vec<usize>,
    /// Use.
    pub role: Role,
    /// Part of the model it is counted under.
    pub part: Part,
    /// Layer index, MTP modules from L on; `None` for embedding, head and final norm.
    pub layer: Option<usize>,
    /// Index of the routed expert.
    pub expert: Option<usize>,
    /// Whether it may be absent (an MTP module's copy of the embedding or head).
    pub optional: bool,
}

impl Expected {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|d| *d as u64).product()
    }

    /// Name of its FP8 block scales.
    pub fn scale_name(&self) -> String {
        format!("{}_scale_inv", self.name)
    }

    /// Shape of its FP8 block scales, [⌈out/rows⌉, ⌈in/cols⌉]; `None` if it is never quantised.
    pub fn scale_shape(&self, block: [usize; 2]) -> Option<[usize; 2]> {
        match (self.role, &self.shape[..]) {
            (Role::Linear, [rows, cols]) => Some([rows.div_ceil(block[0]), cols.div_ceil(block[1])]),
            _ => None,
        }
    }
}

/// All tensors of the model, MTP modules last, in the order in which a token meets them.
pub fn expected(config: &Config) -> Vec<Expected> {
    let mut list = List { config, out: Vec::new(), layer: None };
    let (d, v) = (config.hidden_size, config.vocab_size);
    list.push("model.embed_tokens.weight", &[v, d], Role::Plain, Part::Embedding);
    for layer in 0..config.all_layers() {
        list.layer(layer);
    }
    list.layer = None;
    let end = list.out.len();
    list.push("model.norm.weight", &[d], Role::Vector, Part::Norms);
    if !config.tie_word_embeddings {
        list.push("lm_head.weight", &[v, d], Role::Plain, Part::Head);
    }
    // The main model first, then MTP.
    let mtp = list.out.iter().position(|t| t.layer == Some(config.num_hidden_layers)).unwrap_or(end);
    let added = list.out.len() - end;
    list.out[mtp..].rotate_right(added);
    list.out
}

struct List<'a> {
    config: &'a Config,
    out: Vec<Expected>,
    layer: Option<usize>,
}

impl List<'_> {
    /// Adds a tensor; inside a layer `name` is relative to it.
    fn push(&mut self, name: &str, shape: &[usize], role: Role, part: Part) {
        let name = match self.layer {
            Some(layer) => format!("model.layers.{layer}.{name}"),
            None => name.to_owned(),
        };
        self.out.push(Expected {
            name,
            shape: shape.to_vec(),
            role,
            part,
            layer: self.layer,
            expert: None,
            optional: false,
        });
    }

    /// gate, up and down projection of a feed-forward block of width `width` under `prefix`.
    fn mlp(&mut self, prefix: &str, width: usize, part: Part) {
        let d = self.config.hidden_size;
        for (name, shape) in [("gate", [width, d]), ("up", [width, d]), ("down", [d, width])] {
            self.push(&format!("{prefix}.{name}_proj.weight"), &shape, Role::Linear, part);
        }
    }

    fn layer(&mut self, layer: usize) {
        let config = self.config;
        let (d, v) = (config.hidden_size, config.vocab_size);
        self.layer = Some(layer);
        let mtp = layer >= config.num_hidden_layers;
        if mtp {
            self.push("embed_tokens.weight", &[v, d], Role::Plain, Part::Embedding);
            self.out.last_mut().expect("just pushed").optional = true;
            self.push("enorm.weight", &[d], Role::Vector, Part::Norms);
            self.push("hnorm.weight", &[d], Role::Vector, Part::Norms);
            self.push("eh_proj.weight", &[d, 2 * d], Role::Plain, Part::MtpProjection);
        }
        self.attention();
        if config.is_moe(layer) {
            self.push("mlp.gate.weight", &[config.n_routed_experts, d], Role::Plain, Part::Router);
            if config.topk_method == TopkMethod::NoauxTc {
                let bias = "mlp.gate.e_score_correction_bias";
                self.push(bias, &[config.n_routed_experts], Role::Vector, Part::Router);
            }
            for expert in 0..config.n_routed_experts {
                let first = self.out.len();
                self.mlp(&format!("mlp.experts.{expert}"), config.moe_intermediate_size, Part::RoutedExperts);
                self.out[first..].iter_mut().for_each(|t| t.expert = Some(expert));
            }
            if config.n_shared_experts > 0 {
                self.mlp("mlp.shared_experts", config.shared_intermediate_size(), Part::SharedExperts);
            }
        } else {
            self.mlp("mlp", config.intermediate_size, Part::DenseFfn);
        }
        if mtp {
            self.push("shared_head.norm.weight", &[d], Role::Vector, Part::Norms);
            self.push("shared_head.head.weight", &[v, d], Role::Plain, Part::Head);
            self.out.last_mut().expect("just pushed").optional = true;
        }
    }

    fn attention(&mut self) {
        let config = self.config;
        let (d, r, heads) = (config.hidden_size, config.kv_lora_rank, config.num_attention_heads);
        let query = heads * config.qk_head_dim();
        self.push("input_layernorm.weight", &[d], Role::Vector, Part::Norms);
        match config.q_lora_rank {
            Some(rq) => {
                self.linear("q_a_proj", [rq, d], true);
                self.push("self_attn.q_a_layernorm.weight", &[rq], Role::Vector, Part::Attention);
                self.linear("q_b_proj", [query, rq], false);
            }
            None => self.linear("q_proj", [query, d], false),
        }
        self.linear("kv_a_proj_with_mqa", [config.latent_dim(), d], true);
        self.push("self_attn.kv_a_layernorm.weight", &[r], Role::Vector, Part::Attention);
        self.linear("kv_b_proj", [heads * (config.qk_nope_head_dim + config.v_head_dim), r], false);
        self.linear("o_proj", [d, heads * config.v_head_dim], true);
        self.push("post_attention_layernorm.weight", &[d], Role::Vector, Part::Norms);
    }

    /// A projection of attention; `biased` if it has a bias where `attention_bias` is set.
    fn linear(&mut self, name: &str, shape: [usize; 2], biased: bool) {
        self.push(&format!("self_attn.{name}.weight"), &shape, Role::Linear, Part::Attention);
        if biased && self.config.attention_bias {
            self.push(&format!("self_attn.{name}.bias"), &shape[..1], Role::Vector, Part::Attention);
        }
    }
}

/// Checks that a checkpoint holds what its configuration implies: every tensor, its shape, its dtype and, for FP8, its
/// block scales. Tensors that say nothing about the numbers (`rotary_emb.inv_freq`, layers beyond the configured
/// ones) are passed over.
///
/// # Errors
/// [`Error::NoWeights`], [`Error::MissingTensor`], [`Error::WrongTensor`], and [`Error::UnexpectedTensor`] for a tensor
/// that belongs to a configured layer, would change its output, and contradicts the configuration.
pub fn check(checkpoint: &Checkpoint) -> Result<()> {
    if !checkpoint.has_weights() {
        return Err(Error::NoWeights { path: checkpoint.dir().to_owned() });
    }
    let config = checkpoint.config();
    let list = expected(config);
    for tensor in &list {
        check_one(checkpoint, tensor)?;
    }
    let known: std::collections::HashSet<&str> = list.iter().map(|t| t.name.as_str()).collect();
    for tensor in checkpoint.tensors().filter(|t| !known.contains(t.name)) {
        check_extra(checkpoint, tensor)?;
    }
    Ok(())
}

fn check_one(checkpoint: &Checkpoint, expected: &Expected) -> Result<()> {
    let dtypes = expected.role.dtypes();
    let names = dtypes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let Some(found) = checkpoint.find(&expected.name) else {
        return if expected.optional {
            Ok(())
        } else {
            Err(Error::MissingTensor {
                path: checkpoint.dir().to_owned(),
                tensor: expected.name.clone(),
                expected: format!("shape {:?} of one of {names}", expected.shape),
            })
        };
    };
    if found.shape != expected.shape {
        return Err(wrong(
            checkpoint,
            found,
            format!("shape {:?}", found.shape),
            format!("shape {:?}", expected.shape),
        ));
    }
    if !dtypes.contains(&found.dtype) {
        return Err(wrong(checkpoint, found, format!("of dtype {}", found.dtype), format!("one of {names}")));
    }
    if found.dtype != Dtype::F8E4m3 {
        return Ok(());
    }

    let Some(quantization) = checkpoint.config().quantization else {
        let expected = "F32, F16 or BF16, as config.json has no quantization_config".to_owned();
        return Err(wrong(checkpoint, found, "of dtype F8_E4M3".into(), expected));
    };
    let shape = expected.scale_shape(quantization.weight_block_size).expect("only linears may be FP8");
    let Some(scale) = checkpoint.scale_of(&expected.name) else {
        return Err(Error::MissingTensor {
            path: checkpoint.dir().to_owned(),
            tensor: expected.scale_name(),
            expected: format!("shape {shape:?} of F32, the block scales of an F8_E4M3 tensor"),
        });
    };
    if scale.shape != shape {
        let block = quantization.weight_block_size;
        let expected = format!("shape {shape:?}, one scale for each block of {block:?} of shape {:?}", expected.shape);
        return Err(wrong(checkpoint, scale, format!("shape {:?}", scale.shape), expected));
    }
    if scale.dtype != Dtype::F32 {
        return Err(wrong(checkpoint, scale, format!("of dtype {}", scale.dtype), "F32".into()));
    }
    Ok(())
}

fn wrong(checkpoint: &Checkpoint, view: TensorView, found: String, expected: String) -> Error {
    Error::WrongTensor {
        path: checkpoint.files()[view.file].path.clone(),
        tensor: view.name.to_owned(),
        found,
        expected,
    }
}

/// A tensor that the configuration does not ask for: harmless, or a sign that the configuration is another model's.
fn check_extra(checkpoint: &Checkpoint, tensor: TensorView) -> Result<()> {
    let config = checkpoint.config();
    let unexpected = |detail: String| {
        Err(Error::UnexpectedTensor {
            path: checkpoint.files()[tensor.file].path.clone(),
            tensor: tensor.name.to_owned(),
            detail,
        })
    };
    if let Some(weight) = tensor.name.strip_suffix("_scale_inv") {
        return match checkpoint.find(weight) {
            Some(view) if view.dtype != Dtype::F8E4m3 => {
                unexpected(format!("`{weight}` is {} and takes no block scales", view.dtype))
            }
            _ => Ok(()),
        };
    }
    let Some((layer, rest)) = tensor.name.strip_prefix("model.layers.").and_then(|n| n.split_once('.')) else {
        return Ok(());
    };
    let Ok(layer) = layer.parse::<usize>() else { return Ok(()) };
    if layer >= config.all_layers() {
        return Ok(());
    }
    if rest.starts_with("self_attn.") && rest.rsplit('.').next() == Some("bias") {
        return unexpected("attention_bias is not set for it".into());
    }
    if rest.starts_with("mlp.shared_experts.") {
        return unexpected(format!("n_shared_experts is {}", config.n_shared_experts));
    }
    if rest.starts_with("mlp.experts.") {
        return unexpected(format!("n_routed_experts is {}", config.n_routed_experts));
    }
    if rest == "mlp.gate.e_score_correction_bias" {
        return unexpected("topk_method is not noaux_tc".into());
    }
    Ok(())
}
