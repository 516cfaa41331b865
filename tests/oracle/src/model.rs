//! The whole decoder over an explicit latent cache: block, attention, experts, MTP modules. Spec §§1–8.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::Config;
use crate::ops::{self, LatentRows};
use crate::{Data, Edits, Result, Tensor, Trace, Weights, edits, router};

/// eps of `q_a_layernorm` and `kv_a_layernorm`, whatever the config says (spec §3).
const LATENT_EPS: f64 = 1e-6;

/// Which of the two equal forms of attention to compute (spec §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Expand keys and values from the latents.
    Naive,
    /// Stay in the latent space.
    Absorbed,
}

/// A loaded checkpoint.
#[derive(Debug, Clone)]
pub struct Model {
    /// Its config.json.
    pub config: Config,
    /// Its tensors.
    pub weights: Weights,
    /// Form of attention; [`Attention::Absorbed`] after loading.
    pub attention: Attention,
    /// Changes to how it runs; none after loading.
    pub edits: Edits,
    /// Whether traces of the main model also hold `mla.{l}.query` [T, H·(r+dr)] (absorbed, rotated), `mla.{l}.attention`
    /// [H, T, S] (probabilities) and `lens.{l}` [T, V] (logits from each layer's output); not after loading.
    pub extras: bool,
}

/// Latent cache of every layer that has run, MTP layers under their layer index.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cache {
    layers: BTreeMap<usize, LayerCache>,
}

/// Latent cache of one layer (spec §5).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerCache {
    /// c, [S, r].
    pub c: Vec<f64>,
    /// k_rope, rotated, [S, dr].
    pub k_rope: Vec<f64>,
    /// Position of each row, `[S]`.
    pub positions: Vec<usize>,
}

impl Cache {
    /// Rows of a layer, 0 if it has not run.
    pub fn rows(&self, layer: usize) -> usize {
        self.layers.get(&layer).map_or(0, |cache| cache.positions.len())
    }

    /// A layer's rows, if it has run.
    pub fn layer(&self, layer: usize) -> Option<&LayerCache> {
        self.layers.get(&layer)
    }

    /// Keeps the first `rows` rows of the given layers.
    pub fn truncate(&mut self, layers: std::ops::Range<usize>, rows: usize) {
        for (_, cache) in self.layers.range_mut(layers) {
            let stored = cache.positions.len();
            if rows < stored {
                cache.c.truncate(cache.c.len() / stored * rows);
                cache.k_rope.truncate(cache.k_rope.len() / stored * rows);
                cache.positions.truncate(rows);
            }
        }
    }
}

/// What a forward pass gives for each of its T tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// [T, V].
    pub logits: Vec<f64>,
    /// h, [T, D]: after `model.norm`, or after `shared_head.norm` for an MTP module (spec §7).
    pub hidden: Vec<f64>,
}

impl Model {
    /// Loads config.json and the tensors of a checkpoint directory.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let config = Config::from_json(&crate::read_json(&dir.join("config.json"))?)?;
        let weights = Weights::load(dir, config.fp8_block)?;
        Ok(Self { config, weights, attention: Attention::Absorbed, edits: Edits::default(), extras: false })
    }

    /// Runs the main model over new tokens `[T]`, which follow those in the cache.
    pub fn forward(&self, tokens: &[u32], cache: &mut Cache) -> Output {
        self.forward_traced(tokens, cache, &mut Trace::new())
    }

    /// [`Model::forward`], adding its intermediate results to `trace`.
    pub fn forward_traced(&self, tokens: &[u32], cache: &mut Cache, trace: &mut Trace) -> Output {
        let first = cache.rows(0);
        let positions: Vec<usize> = (first..first + tokens.len()).collect();
        let d = self.config.hidden;
        let mut x = ops::embed(self.tensor("model.embed_tokens.weight"), d, tokens);
        trace.insert("hidden.0".into(), Tensor::rows(x.clone(), d));
        for l in 0..self.config.layers {
            x = self.block(&x, l, self.config.is_moe(l), &positions, cache, trace);
            trace.insert(format!("hidden.{}", l + 1), Tensor::rows(x.clone(), d));
            if self.extras {
                let seen = self.norm(&x, "model.norm.weight", self.config.rms_norm_eps);
                let logits = ops::linear(&seen, self.head(), None, d);
                trace.insert(format!("lens.{l}"), Tensor::rows(logits, self.config.vocab));
            }
        }
        let hidden = self.norm(&x, "model.norm.weight", self.config.rms_norm_eps);
        let logits = ops::linear(&hidden, self.head(), None, d);
        trace.insert("final_norm".into(), Tensor::rows(hidden.clone(), d));
        trace.insert("logits".into(), Tensor::rows(logits.clone(), self.config.vocab));
        Output { logits, hidden }
    }

    /// Runs MTP module `j` (1-based) over new rows `[T]`: `hidden` [T, D] is h^{j−1} of row i and `tokens` `[T]` is t_{i+j}
    /// (spec §7). The rows follow those in the module's cache; row i is at position i + j.
    pub fn mtp(&self, j: usize, hidden: &[f64], tokens: &[u32], cache: &mut Cache, trace: &mut Trace) -> Output {
        let (l, d, eps) = (self.config.layers + j - 1, self.config.hidden, self.config.rms_norm_eps);
        let layer = |name: &str| format!("model.layers.{l}.{name}");
        // The module's own copies of the embedding and the head are optional.
        let own = |name: &str| self.weights.get(&layer(name)).map(|w| w.data.as_slice());
        let table = own("embed_tokens.weight").unwrap_or_else(|| self.tensor("model.embed_tokens.weight"));
        let embedded = self.norm(&ops::embed(table, d, tokens), &layer("enorm.weight"), eps);
        let carried = self.norm(hidden, &layer("hnorm.weight"), eps);
        let x = self.linear(&ops::concat_rows(&embedded, d, &carried, d), &layer("eh_proj"));
        let first = j + cache.rows(l);
        let positions: Vec<usize> = (first..first + tokens.len()).collect();
        // The layer is MoE whatever `first_k_dense_replace` and `moe_layer_freq` say, so the checkpoint decides.
        let moe = own("mlp.gate.weight").is_some();
        let y = self.block(&x, l, moe, &positions, cache, trace);
        let hidden = self.norm(&y, &layer("shared_head.norm.weight"), eps);
        let head = own("shared_head.head.weight").unwrap_or_else(|| self.head());
        let logits = ops::linear(&hidden, head, None, d);
        trace.insert(format!("mtp.{j}.input_ids"), token_tensor(tokens));
        trace.insert(format!("mtp.{j}.hidden"), Tensor::rows(hidden.clone(), d));
        trace.insert(format!("mtp.{j}.logits"), Tensor::rows(logits.clone(), self.config.vocab));
        Output { logits, hidden }
    }

    /// Every tensor of spec §10 for a prompt of T tokens. MTP modules see the prompt extended by the main model's
    /// argmax and then by the modules' own drafts.
    pub fn trace(&self, tokens: &[u32]) -> Trace {
        let (mut trace, mut cache) = (Trace::new(), Cache::default());
        trace.insert("input_ids".into(), token_tensor(tokens));
        let mut output = self.forward_traced(tokens, &mut cache, &mut trace);
        let mut extended = tokens.to_vec();
        for j in 1..=self.config.mtp_modules {
            extended.push(self.last_argmax(&output.logits));
            output = self.mtp(j, &output.hidden, &extended[j..], &mut cache, &mut trace);
        }
        trace
    }

    /// Argmax of row `row` of logits [T, V], the lowest id first.
    pub(crate) fn row_argmax(&self, logits: &[f64], row: usize) -> u32 {
        let vocab = self.config.vocab;
        ops::argmax(&logits[row * vocab..][..vocab]) as u32
    }

    /// Argmax of the last row of logits [T, V].
    pub(crate) fn last_argmax(&self, logits: &[f64]) -> u32 {
        self.row_argmax(logits, logits.len() / self.config.vocab - 1)
    }

    /// One decoder layer (spec §3): x [T, D] → [T, D].
    fn block(
        &self,
        x: &[f64],
        l: usize,
        moe: bool,
        positions: &[usize],
        cache: &mut Cache,
        trace: &mut Trace,
    ) -> Vec<f64> {
        let eps = self.config.rms_norm_eps;
        let normed = self.norm(x, &format!("model.layers.{l}.input_layernorm.weight"), eps);
        let a = ops::add(x, &self.attention(&normed, l, positions, cache, trace));
        let normed = self.norm(&a, &format!("model.layers.{l}.post_attention_layernorm.weight"), eps);
        let mlp = format!("model.layers.{l}.mlp");
        let ffn = if moe { self.experts(&normed, l, trace) } else { self.mlp(&normed, &mlp) };
        ops::add(&a, &ffn)
    }

    /// MLA (spec §5) of normalised x [T, D] at `positions` `[T]`, after appending its latents to the cache → [T, D].
    fn attention(&self, x: &[f64], l: usize, positions: &[usize], cache: &mut Cache, trace: &mut Trace) -> Vec<f64> {
        let dims = &self.config.mla;
        let name = |n: &str| format!("model.layers.{l}.self_attn.{n}");
        let mut q = if self.config.q_lora_rank.is_some() {
            let low = self.norm(&self.linear(x, &name("q_a_proj")), &name("q_a_layernorm.weight"), LATENT_EPS);
            self.linear(&low, &name("q_b_proj"))
        } else {
            self.linear(x, &name("q_proj"))
        };
        let joint = self.linear(x, &name("kv_a_proj_with_mqa"));
        let (c, mut k_rope) = ops::split_rows(&joint, dims.latent + dims.rope, dims.latent);
        let mut c = self.norm(&c, &name("kv_a_layernorm.weight"), LATENT_EPS);
        for i in edits::numbers(&self.edits.zero_latents, l) {
            c.iter_mut().skip(i).step_by(dims.latent).for_each(|number| *number = 0.0);
        }

        let head = dims.nope + dims.rope;
        for (t, &position) in positions.iter().enumerate() {
            let (cos, sin) = self.config.rope.cos_sin(position);
            let interleave = self.config.rope.interleave;
            ops::rotate(&mut k_rope[t * dims.rope..][..dims.rope], &cos, &sin, interleave);
            for h in 0..dims.heads {
                let q = &mut q[(t * dims.heads + h) * head..][..head];
                ops::rotate(&mut q[dims.nope..], &cos, &sin, interleave);
            }
        }

        let layer = cache.layers.entry(l).or_default();
        layer.c.extend(&c);
        layer.k_rope.extend(&k_rope);
        layer.positions.extend(positions);
        trace.insert(format!("mla.{l}.c_kv"), Tensor::rows(c, dims.latent));
        trace.insert(format!("mla.{l}.k_rope"), Tensor::rows(k_rope, dims.rope));

        let rows = LatentRows { c: &layer.c, k_rope: &layer.k_rope, positions: &layer.positions };
        let kv_b = self.tensor(&name("kv_b_proj.weight"));
        if self.extras && l < self.config.layers {
            let (q_nope, q_rope) = ops::split_rows(&q, head, dims.nope);
            let absorbed = ops::absorb_queries(dims, kv_b, &q_nope);
            let weights = ops::attention_weights(dims, &absorbed, &q_rope, positions, &rows);
            let shape = vec![dims.heads, positions.len(), rows.positions.len()];
            trace.insert(format!("mla.{l}.attention"), Tensor { shape, data: Data::F64(weights) });
            let query = ops::concat_rows(&absorbed, dims.latent, &q_rope, dims.rope);
            trace.insert(format!("mla.{l}.query"), Tensor::rows(query, dims.heads * (dims.latent + dims.rope)));
        }
        let attend = match self.attention {
            Attention::Naive => ops::mla_naive,
            Attention::Absorbed => ops::mla_absorbed,
        };
        let mut given = attend(dims, kv_b, &q, positions, &rows);
        for h in edits::numbers(&self.edits.zero_heads, l) {
            for row in given.chunks_exact_mut(dims.heads * dims.value) {
                row[h * dims.value..][..dims.value].fill(0.0);
            }
        }
        self.linear(&given, &name("o_proj"))
    }

    /// Routed and shared experts (spec §6): x [T, D] → [T, D].
    fn experts(&self, x: &[f64], l: usize, trace: &mut Trace) -> Vec<f64> {
        let (d, name) = (self.config.hidden, format!("model.layers.{l}.mlp"));
        let params = self.config.router.as_ref().expect("an MoE layer without n_routed_experts");
        let logits = self.linear(x, &format!("{name}.gate"));
        let bias = self.weights.get(&format!("{name}.gate.e_score_correction_bias")).map(|w| w.data.as_slice());
        let experts = logits.len() * d / x.len();
        let edit = self.edits.router(l);
        let route = |g: &[f64]| router::route_edited(g, bias, params, &edit).ascending();
        let routes: Vec<_> = logits.chunks_exact(experts).map(route).collect();

        let mut y = match self.config.shared_experts {
            0 => vec![0.0; x.len()],
            _ => self.mlp(x, &format!("{name}.shared_experts")),
        };
        for (t, route) in routes.iter().enumerate() {
            for (&e, &weight) in route.ids.iter().zip(&route.weights) {
                let out = self.mlp(&x[t * d..][..d], &format!("{name}.experts.{e}"));
                ops::add_scaled(&mut y[t * d..][..d], weight, &out);
            }
        }

        let ids = routes.iter().flat_map(|r| r.ids.iter().copied());
        trace.insert(format!("moe.{l}.ids"), Tensor::ids(ids, vec![routes.len(), params.top_k]));
        let weights = routes.iter().flat_map(|r| r.weights.iter().copied()).collect();
        trace.insert(format!("moe.{l}.weights"), Tensor::rows(weights, params.top_k));
        trace.insert(format!("moe.{l}.router_logits"), Tensor::rows(logits, experts));
        y
    }

    /// The MLP under `prefix` (spec §3): x [T, D] → [T, D].
    fn mlp(&self, x: &[f64], prefix: &str) -> Vec<f64> {
        let weight = |n: &str| self.tensor(&format!("{prefix}.{n}_proj.weight"));
        ops::mlp(x, weight("gate"), weight("up"), weight("down"), self.config.hidden)
    }

    /// `name.weight`, and `name.bias` if there is one, applied to x [T, in] → [T, out].
    fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
        let weight = self.weights.need(&format!("{name}.weight"));
        let bias = self.weights.get(&format!("{name}.bias")).map(|w| w.data.as_slice());
        ops::linear(x, &weight.data, bias, weight.shape[1])
    }

    fn norm(&self, x: &[f64], name: &str, eps: f64) -> Vec<f64> {
        ops::rms_norm(x, self.tensor(name), eps)
    }

    /// Numbers of a tensor that must be there.
    fn tensor(&self, name: &str) -> &[f64] {
        &self.weights.need(name).data
    }

    /// The main head [V, D].
    fn head(&self) -> &[f64] {
        self.tensor(if self.config.tied { "model.embed_tokens.weight" } else { "lm_head.weight" })
    }
}

/// Token ids `[T]` as a tensor.
fn token_tensor(tokens: &[u32]) -> Tensor {
    Tensor::ids(tokens.iter().copied(), vec![tokens.len()])
}
