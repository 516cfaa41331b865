//! DeepSeek-V2, V3, R1 and Kimi-K2: the decoder as a graph, with the names of their checkpoints (spec §§1, 3, 5, 6, 7).

use moewe_plan::{MAX_DRAFT_MODULES, TapChoice, TapGroup};

use crate::{
    config::{Config, Scoring, TopkMethod},
    graph::{Asked, Graph, Mla, Norm, Op, RouterRule, Value, WeightId},
};

use super::{Builder, Target};

/// eps of the norms of the two latents, whatever the configuration says (spec §3).
const LATENT_EPS: f64 = 1e-6;

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

pub(super) fn build(config: &Config, target: Target, taps: &TapChoice, in_checkpoint: &dyn Fn(&str) -> bool) -> Graph {
    let mut decoder = Decoder { config, builder: Builder::default(), target, taps };
    decoder.builder.graph.scale_block = config.quantization.as_ref().map(|q| q.weight_block_size);
    match target {
        Target::Forward => decoder.forward(),
        Target::Watch => decoder.watch(),
        Target::Trace => decoder.trace(),
        Target::Draft { module } => decoder.draft(module, in_checkpoint),
    }
    decoder.builder.graph
}

struct Decoder<'a> {
    config: &'a Config,
    builder: Builder,
    target: Target,
    taps: &'a TapChoice,
}

/// Names of the tensors and labels of the nodes of a gated feed-forward network.
struct Mlp<'a> {
    /// Before `gate_proj.weight` and the others.
    tensors: &'a str,
    /// Before `gate` and the others.
    labels: &'a str,
    width: usize,
}

impl Decoder<'_> {
    // ---- programs ----

    fn forward(&mut self) {
        let states = self.layers();
        let last = states[states.len() - 1];
        let (_, token) = self.sample(last);
        if self.config.num_nextn_predict_layers > 0 {
            self.keep_hidden(last);
        }
        self.builder.push(Op::Accept, &[token], "accept");
    }

    fn watch(&mut self) {
        self.builder.graph.parameters = true;
        self.builder.optional = true;
        let states = self.layers();
        let last = states[states.len() - 1];
        let (logits, token) = self.sample(last);
        self.keep_hidden(last);
        self.predictions(&states[1..], logits, token);
        // The batch is the next one from here on.
        self.builder.push(Op::Accept, &[token], "accept");
    }

    fn trace(&mut self) {
        let states = self.layers();
        let normed = self.keep_hidden(states[states.len() - 1]);
        let rows = self.builder.push(Op::GatherRows, &[normed], "wanted_rows");
        let logits = self.linear(rows, self.main_head(), self.config.vocab_size, false, "head");
        self.tap(TapGroup::Logits, "logits", logits);
    }

    fn draft(&mut self, module: usize, in_checkpoint: &dyn Fn(&str) -> bool) {
        let modules = self.config.num_nextn_predict_layers;
        assert!((1..=modules).contains(&module), "module {module} of {modules}");
        let (hidden_size, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let layer = self.config.num_hidden_layers + module - 1;
        let prefix = format!("model.layers.{layer}");
        let own = |name: &str, main: &str| {
            let own = format!("{prefix}.{name}");
            if in_checkpoint(&own) { own } else { main.to_owned() }
        };

        self.builder.layer = Some(layer);
        let e = self.embed(&own("embed_tokens.weight", EMBEDDING));
        let carried = if module == 1 { "hidden".to_owned() } else { format!("hidden.{}", module - 1) };
        let h = self.builder.push(Op::ReadState { name: carried.clone(), len: hidden_size }, &[], "carried_hidden");
        let e = self.norm(e, &format!("{prefix}.enorm.weight"), eps, "enorm");
        let h = self.norm(h, &format!("{prefix}.hnorm.weight"), eps, "hnorm");
        let joined = self.builder.push(Op::Concat, &[e, h], "join");
        let x = self.linear(joined, &format!("{prefix}.eh_proj.weight"), hidden_size, false, "eh_proj");
        let y = self.layer(layer, x);

        self.builder.layer = Some(layer);
        let hidden = self.norm(y, &format!("{prefix}.shared_head.norm.weight"), eps, "shared_head_norm");
        self.tap(TapGroup::Hidden, format!("mtp.{module}.hidden"), hidden);
        if module < modules {
            let name = format!("hidden.{module}");
            self.builder.push(Op::WriteState { name, drafting: false }, &[hidden], "keep_hidden");
        }
        let drafters = modules.min(MAX_DRAFT_MODULES as usize);
        let rows = self.builder.push(Op::GatherRows, &[hidden], "wanted_rows");
        if module == drafters {
            // So that the last module can go on from its own output.
            self.builder.push(Op::WriteState { name: carried, drafting: true }, &[rows], "keep_rows");
        }
        let head = own("shared_head.head.weight", self.main_head());
        let logits = self.linear(rows, &head, self.config.vocab_size, false, "head");
        self.tap(TapGroup::Logits, format!("mtp.{module}.logits"), logits);
        if self.taps.wants(TapGroup::Mtp, Some(layer as u32)) {
            self.builder.optional = true;
            let ids = self.builder.push(Op::TopTokens(Asked::Nothing), &[logits], "top");
            self.builder.tap(TapGroup::Mtp, format!("mtp.{module}.ids"), ids);
            self.builder.tap(TapGroup::Mtp, format!("mtp.{module}.probs"), Value { output: 1, ..ids });
        }
        if module <= drafters {
            let token = self.builder.push(Op::Sample, &[logits], "sample");
            self.builder.push(Op::Propose, &[token], "propose");
        }
    }

    // ---- parts ----

    /// Hidden states of the main model: the embedding, then behind each layer.
    fn layers(&mut self) -> Vec<Value> {
        let mut hidden = self.embed(EMBEDDING);
        self.tap(TapGroup::Hidden, "hidden.0", hidden);
        let mut states = vec![hidden];
        for layer in 0..self.config.num_hidden_layers {
            hidden = self.layer(layer, hidden);
            self.tap(TapGroup::Hidden, format!("hidden.{}", layer + 1), hidden);
            states.push(hidden);
        }
        self.builder.layer = None;
        states
    }

    /// For each wanted row the logits from its last hidden state, and the token that is sampled from them, whose log
    /// probability is noted.
    fn sample(&mut self, hidden: Value) -> (Value, Value) {
        let rows = self.builder.push(Op::GatherRows, &[hidden], "wanted_rows");
        let normed = self.norm(rows, FINAL_NORM, self.config.rms_norm_eps, "final_norm");
        let logits = self.linear(normed, self.main_head(), self.config.vocab_size, false, "head");
        let token = self.builder.push(Op::Sample, &[logits], "sample");
        self.builder.push(Op::Logprobs, &[logits, token], "logprobs");
        (logits, token)
    }

    /// The final norm of the last hidden state of every token, kept for modules of multi-token prediction if there are
    /// any.
    fn keep_hidden(&mut self, hidden: Value) -> Value {
        let normed = self.norm(hidden, FINAL_NORM, self.config.rms_norm_eps, "final_norm");
        self.tap(TapGroup::Hidden, "final_norm", normed);
        if self.config.num_nextn_predict_layers > 0 {
            let drafting = self.target == Target::Forward;
            self.builder.push(Op::WriteState { name: "hidden".into(), drafting }, &[normed], "keep_hidden");
        }
        normed
    }

    /// What the model predicts behind every token, and what it would from each layer's hidden state. `logits` and
    /// `sampled` are those of the wanted rows.
    fn predictions(&mut self, states: &[Value], logits: Value, sampled: Value) {
        let layers: Vec<usize> = (0..states.len()).filter(|&layer| self.wants(TapGroup::Lens, Some(layer))).collect();
        let logits_wanted = self.wants(TapGroup::Logits, None);
        let Some(last) = states.len().checked_sub(1).filter(|_| logits_wanted || !layers.is_empty()) else { return };
        if logits_wanted {
            // Enough where every token is a wanted row: the head has run already.
            let top = self.builder.push(Op::TopTokens(Asked::Next), &[logits, sampled], "row_top_tokens");
            self.tap_top(TapGroup::Logits, "logits", top);
        }
        let final_logits = self.logits(states[last], "top");
        let top = self.builder.push(Op::TopTokens(Asked::Next), &[final_logits, sampled], "top_tokens");
        if logits_wanted {
            self.tap_top(TapGroup::Logits, "logits", top);
        }
        // The last layer comes first, so that no two of these logits, which are large, are needed at once.
        for layer in layers.into_iter().rev() {
            self.builder.layer = Some(layer);
            let logits = if layer == last { final_logits } else { self.logits(states[layer], "lens") };
            let seen = self.builder.push(Op::TopTokens(Asked::Given), &[logits, top], "lens_tokens");
            self.tap_top(TapGroup::Lens, &format!("lens.{layer}"), seen);
        }
        self.builder.layer = None;
    }

    /// Logits of every token from a hidden state of the main model.
    fn logits(&mut self, hidden: Value, label: &str) -> Value {
        let normed = self.norm(hidden, FINAL_NORM, self.config.rms_norm_eps, &format!("{label}_norm"));
        self.linear(normed, self.main_head(), self.config.vocab_size, false, &format!("{label}_head"))
    }

    fn tap_top(&mut self, group: TapGroup, name: &str, top: Value) {
        for (output, part) in ["ids", "probs", "stats"].into_iter().enumerate() {
            self.builder.tap(group, format!("{name}.{part}"), Value { output, ..top });
        }
    }

    fn layer(&mut self, layer: usize, h: Value) -> Value {
        self.builder.layer = Some(layer);
        let (prefix, eps) = (format!("model.layers.{layer}"), self.config.rms_norm_eps);
        let x = self.norm(h, &format!("{prefix}.input_layernorm.weight"), eps, "input_norm");
        let attended = self.attention(layer, x);
        let a = self.builder.push(Op::Add, &[h, attended], "attention_sum");
        let x = self.norm(a, &format!("{prefix}.post_attention_layernorm.weight"), eps, "ffn_norm");
        if self.config.is_moe(layer) { self.mixture(layer, a, x) } else { self.dense(layer, a, x) }
    }

    fn attention(&mut self, layer: usize, x: Value) -> Value {
        let config = self.config;
        let mla = Mla {
            heads: config.num_attention_heads,
            nope: config.qk_nope_head_dim,
            rope: config.qk_rope_head_dim,
            v: config.v_head_dim,
            rank: config.kv_lora_rank,
            softmax_scale: config.softmax_scale(),
        };
        let Mla { heads, nope, rope, v, rank, .. } = mla;
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        let (head_dim, biased) = (config.qk_head_dim(), config.attention_bias);

        let query = if let Some(q_rank) = config.q_lora_rank {
            let latent = self.linear(x, &name("q_a_proj"), q_rank, biased, "q_a");
            let latent = self.norm(latent, &name("q_a_layernorm"), LATENT_EPS, "q_a_norm");
            self.linear(latent, &name("q_b_proj"), heads * head_dim, false, "q_b")
        } else {
            self.linear(x, &name("q_proj"), heads * head_dim, false, "q")
        };
        let query = self.builder.push(Op::Rope { heads, head_dim, rope }, &[query], "q_rope");

        let kv = self.linear(x, &name("kv_a_proj_with_mqa"), rank + rope, biased, "kv_a");
        let latent = self.builder.push(Op::Slice { start: 0, len: rank }, &[kv], "kv_latent");
        let latent = self.norm(latent, &name("kv_a_layernorm"), LATENT_EPS, "kv_norm");
        let key = self.builder.push(Op::Slice { start: rank, len: rope }, &[kv], "kv_key");
        let key = self.builder.push(Op::Rope { heads: 1, head_dim: rope, rope }, &[key], "k_rope");
        let cache = self.builder.push(Op::CacheWrite { layer }, &[latent, key], "cache");
        if self.wants(TapGroup::Latents, Some(layer)) {
            self.builder.tap_columns(TapGroup::Latents, format!("mla.{layer}.c_kv"), cache, 0, rank);
            self.builder.tap_columns(TapGroup::Latents, format!("mla.{layer}.k_rope"), cache, rank, rope);
        }

        let kv_b = self.builder.graph.weight(name("kv_b_proj"), None, &[heads * (nope + v), rank]);
        let out = self.builder.push(Op::Attention { layer, kv_b, mla }, &[query, cache], "attention");
        self.tap(TapGroup::Attention, format!("mla.{layer}.query"), Value { output: 1, ..out });
        self.linear(out, &name("o_proj"), config.hidden_size, biased, "o")
    }

    fn dense(&mut self, layer: usize, a: Value, x: Value) -> Value {
        let tensors = format!("model.layers.{layer}.mlp.");
        let down = self.mlp(x, &Mlp { tensors: &tensors, labels: "", width: self.config.intermediate_size });
        self.builder.push(Op::Add, &[a, down], "ffn_sum")
    }

    fn mixture(&mut self, layer: usize, a: Value, x: Value) -> Value {
        let prefix = format!("model.layers.{layer}.mlp");
        let mut sum = a;
        if self.config.n_shared_experts > 0 {
            let tensors = format!("{prefix}.shared_experts.");
            let width = self.config.shared_intermediate_size();
            let down = self.mlp(x, &Mlp { tensors: &tensors, labels: "shared_", width });
            sum = self.builder.push(Op::Add, &[a, down], "shared_sum");
        }
        let (ids, weights) = self.router(layer, x);

        let (hidden, width) = (self.config.hidden_size, self.config.moe_intermediate_size);
        let gate = self.expert_weight(&prefix, "gate_proj", &[width, hidden]);
        let up = self.expert_weight(&prefix, "up_proj", &[width, hidden]);
        let down = self.expert_weight(&prefix, "down_proj", &[hidden, width]);
        let b = &mut self.builder;
        let gate = b.push(Op::ExpertLinear { weight: gate }, &[x, ids], "experts_gate");
        let silu = b.push(Op::Silu, &[gate], "experts_silu");
        let up = b.push(Op::ExpertLinear { weight: up }, &[x, ids], "experts_up");
        let inner = b.push(Op::Mul, &[silu, up], "experts_product");
        let down = b.push(Op::ExpertLinear { weight: down }, &[inner, ids], "experts_down");
        let routed = b.push(Op::WeightedSum, &[down, weights], "experts_weighted");
        b.push(Op::Add, &[sum, routed], "ffn_sum")
    }

    /// Ids and weights of the chosen experts.
    fn router(&mut self, layer: usize, x: Value) -> (Value, Value) {
        let config = self.config;
        let rule = RouterRule {
            experts: config.n_routed_experts,
            top_k: config.num_experts_per_tok,
            scoring: config.scoring,
            method: config.topk_method,
            n_group: config.n_group,
            topk_group: config.topk_group,
            normalise: config.norm_topk_prob && config.scoring == Scoring::Sigmoid,
            scale: config.routed_scaling_factor,
        };
        let prefix = format!("model.layers.{layer}.mlp.gate");
        let logits = self.linear(x, &format!("{prefix}.weight"), rule.experts, false, "router_logits");
        let scores = self.builder.push(Op::RouterScore(rule.scoring), &[logits], "router_scores");
        let mut selection = scores;
        if rule.method == TopkMethod::NoauxTc {
            let name = format!("{prefix}.e_score_correction_bias");
            let bias = self.builder.graph.weight(name, None, &[rule.experts]);
            selection = self.builder.push(Op::RouterBias { bias }, &[selection], "router_bias");
        }
        if rule.limits_groups() {
            selection = self.builder.push(Op::GroupLimit(rule), &[selection], "router_groups");
        }
        let ids = self.builder.push(Op::TopK { k: rule.top_k }, &[selection], "router_ids");
        let weights = self.builder.push(Op::RouterWeights(rule), &[scores, ids], "router_weights");
        self.tap(TapGroup::Scores, format!("moe.{layer}.router_logits"), logits);
        self.tap(TapGroup::Routing, format!("moe.{layer}.ids"), ids);
        self.tap(TapGroup::Routing, format!("moe.{layer}.weights"), weights);
        (ids, weights)
    }

    /// `down(silu(gate x) · up x)`.
    fn mlp(&mut self, x: Value, mlp: &Mlp) -> Value {
        let name = |part: &str| format!("{}{part}_proj.weight", mlp.tensors);
        let label = |part: &str| format!("{}{part}", mlp.labels);
        let gate = self.linear(x, &name("gate"), mlp.width, false, &label("gate"));
        let silu = self.builder.push(Op::Silu, &[gate], &label("silu"));
        let up = self.linear(x, &name("up"), mlp.width, false, &label("up"));
        let inner = self.builder.push(Op::Mul, &[silu, up], &label("product"));
        self.linear(inner, &name("down"), self.config.hidden_size, false, &label("down"))
    }

    // ---- single nodes ----

    fn embed(&mut self, name: &str) -> Value {
        let weight = self.builder.graph.weight(name, None, &[self.config.vocab_size, self.config.hidden_size]);
        self.builder.push(Op::Embed { weight }, &[], "embed")
    }

    fn norm(&mut self, x: Value, name: &str, eps: f64, label: &str) -> Value {
        let len = self.builder.graph.ty(x).row_len();
        let weight = self.builder.graph.weight(name, None, &[len]);
        self.builder.push(Op::RmsNorm(Norm { weight, eps }), &[x], label)
    }

    /// `W x`, with the bias of the same name if `biased`.
    fn linear(&mut self, x: Value, name: &str, rows: usize, biased: bool, label: &str) -> Value {
        let columns = self.builder.graph.ty(x).row_len();
        let weight = self.builder.graph.weight(name, None, &[rows, columns]);
        let bias = biased.then(|| {
            let stem = name.strip_suffix("weight").expect("names of weights end so");
            self.builder.graph.weight(format!("{stem}bias"), None, &[rows])
        });
        self.builder.push(Op::Linear { weight, bias, norm: None }, &[x], label)
    }

    fn expert_weight(&mut self, prefix: &str, part: &str, shape: &[usize]) -> WeightId {
        let name = format!("{prefix}.experts.*.{part}.weight");
        self.builder.graph.weight(name, Some(self.config.n_routed_experts), shape)
    }

    fn main_head(&self) -> &'static str {
        if self.config.tie_word_embeddings { EMBEDDING } else { HEAD }
    }

    /// Whether the program has the taps of a group at a layer.
    fn wants(&self, group: TapGroup, layer: Option<usize>) -> bool {
        match self.target {
            Target::Forward => false,
            Target::Watch => self.taps.wants(group, layer.map(|layer| layer as u32)),
            // The tensors of spec §10.
            Target::Trace | Target::Draft { .. } => !matches!(group, TapGroup::Attention | TapGroup::Lens),
        }
    }

    /// Makes a tensor readable if its group is wanted where it stands.
    fn tap(&mut self, group: TapGroup, name: impl Into<String>, value: Value) {
        if self.wants(group, self.builder.layer) {
            self.builder.tap(group, name, value);
        }
    }
}
