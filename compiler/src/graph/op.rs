//! The operations of a graph, and what parametrises them.

use moewe_plan::{TOP_TOKENS, When};

use super::WeightId;
use crate::config::{Scoring, TopkMethod};

/// RMSNorm by a weight: `w · x / sqrt(mean(x²) + eps)` (spec §3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// `[K]`.
    pub weight: WeightId,
    /// Added to the mean square.
    pub eps: f64,
}

/// Shape of multi-head latent attention (spec §5).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mla {
    /// `num_attention_heads`.
    pub heads: usize,
    /// `qk_nope_head_dim`.
    pub nope: usize,
    /// `qk_rope_head_dim`.
    pub rope: usize,
    /// `v_head_dim`.
    pub v: usize,
    /// `kv_lora_rank`.
    pub rank: usize,
    /// Factor on scores before the softmax.
    pub softmax_scale: f64,
}

/// How a router selects and weighs experts (spec §6).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterRule {
    /// `n_routed_experts`.
    pub experts: usize,
    /// `num_experts_per_tok`.
    pub top_k: usize,
    /// Softmax or sigmoid.
    pub scoring: Scoring,
    /// How groups and experts are selected.
    pub method: TopkMethod,
    /// `n_group`.
    pub n_group: usize,
    /// `topk_group`.
    pub topk_group: usize,
    /// Whether the chosen scores are divided by their sum (sigmoid only, spec §6).
    pub normalise: bool,
    /// `routed_scaling_factor`.
    pub scale: f64,
}

impl RouterRule {
    /// Whether the best groups are selected before the best experts.
    pub fn limits_groups(&self) -> bool {
        self.method != TopkMethod::Greedy && self.n_group > 1
    }
}

/// The token whose log probability and rank [`Op::TopTokens`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// None; there is no third output.
    Nothing,
    /// The one that follows: as the batch says, else what was sampled for the row. The second input is the sampled token
    /// `[1]` of each wanted row. Row i of the logits belongs to token i, so logits of wanted rows are understood only
    /// where these are all tokens in their order.
    Next,
    /// The first of the second input's ids `[k]`.
    Given,
}

/// How many tokens [`Op::TopTokens`] tells of a vocabulary.
pub fn top_tokens(vocab: usize) -> usize {
    vocab.min(TOP_TOKENS as usize)
}

/// An operation. The comment gives inputs → outputs, one row each; `D` is the hidden size.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    // ---- plain operations, as the specification has them ----
    /// → `[D]`: the embedding of the row's token.
    Embed {
        /// `[V, D]`.
        weight: WeightId,
    },
    /// → `[len]`: what an earlier program left in a state buffer.
    ReadState {
        /// Name of the state.
        name: String,
        /// Numbers in a row.
        len: usize,
    },
    /// `[…]` → the same; keeps it for a later program.
    WriteState {
        /// Name of the state.
        name: String,
        /// Whether only drafting needs it.
        drafting: bool,
    },
    /// `[K]` → `[K]`.
    RmsNorm(Norm),
    /// `[K]` → `[N]`, `W x + b`. A second input `[N]` is added (fused residual).
    Linear {
        /// `[N, K]`.
        weight: WeightId,
        /// `[N]`.
        bias: Option<WeightId>,
        /// Applied to x first (fused).
        norm: Option<Norm>,
    },
    /// `[N]` → `[N]`: `x · sigmoid(x)`.
    Silu,
    /// two of a shape → the same.
    Mul,
    /// two of a shape → the same.
    Add,
    /// `[A]`, `[B]` → `[A + B]`.
    Concat,
    /// `[N]` → `[len]`.
    Slice {
        /// First number.
        start: usize,
        /// Numbers.
        len: usize,
    },
    /// `[heads · head_dim]` → the same, the last `rope` numbers of each head rotated by the row's position (§4).
    Rope {
        /// Heads.
        heads: usize,
        /// Numbers of a head.
        head_dim: usize,
        /// Rotated numbers of a head.
        rope: usize,
    },
    /// c `[rank]`, k_rope `[rope]` → `[rank + rope]`: appended to the latent cache of a layer.
    CacheWrite {
        /// Layer.
        layer: usize,
    },
    /// q `[H · (nope + rope)]` (rotated), cache `[rank + rope]` → `[H · v]`: causal attention over the layer's cache,
    /// keys and values expanded by `kv_b` (§5, naive). The second output `[H, rank + rope]` is the query absorbed by
    /// `kv_b`, the rotated part behind it, for those who want to see it.
    Attention {
        /// Layer.
        layer: usize,
        /// `[H · (nope + v), rank]`.
        kv_b: WeightId,
        /// Shape.
        mla: Mla,
    },
    /// logits `[E]` → scores `[E]`.
    RouterScore(Scoring),
    /// scores `[E]` → selection scores `[E]`, the correction bias added.
    RouterBias {
        /// `[E]`.
        bias: WeightId,
    },
    /// selection `[E]` → `[E]`, −∞ outside the best groups.
    GroupLimit(RouterRule),
    /// selection `[E]` → ids `[k]` (u32), best first, ties to the lowest index.
    TopK {
        /// Experts chosen.
        k: usize,
    },
    /// scores `[E]`, ids `[k]` → weights `[k]`.
    RouterWeights(RouterRule),
    /// x `[K]` or `[k, K]`, ids `[k]` → `[k, N]`: each chosen expert's matrix applied.
    ExpertLinear {
        /// `[N, K]` for each expert.
        weight: WeightId,
    },
    /// y `[k, D]`, weights `[k]` → `[D]`.
    WeightedSum,
    /// `[N]` of tokens → `[N]` of wanted rows.
    GatherRows,
    /// logits `[V]` of wanted rows → token `[1]` (u32), drawn by the sequence's sampling parameters.
    Sample,
    /// logits `[V]` of wanted rows, token `[1]` → nothing: notes the log probabilities of the token and of the likeliest ones
    /// in a ring, for the pass that [`Op::Accept`] ends. Only those who ask for them need it.
    Logprobs,
    /// token `[1]` → nothing: accepts drafts, notes sampled tokens as finished and seen, and makes the next batch.
    Accept,
    /// token `[1]` → nothing: notes the sampled tokens as drafts and makes the next batch. Only drafting needs it.
    Propose,
    /// logits `[V]` → ids `[k]` (u32) and probabilities `[k]` of the [`top_tokens`] likeliest tokens, best first; if a
    /// token is asked for, also `[3]`: entropy, its log probability and its rank. See [`Asked`] for a second input.
    TopTokens(Asked),

    // ---- fused operations ----
    /// `[rank + rope]` (output of kv_a) → `[rank + rope]`: RMSNorm of the latent, RoPE of the key, cache write.
    LatentWrite {
        /// Layer.
        layer: usize,
        /// Norm of the latent.
        norm: Norm,
        /// Shape.
        mla: Mla,
    },
    /// q `[H · (nope + rope)]` → `[H, rank + rope]`: nope part through `W_UK`; the rope part is rotated here if
    /// `rotate`, else it comes rotated.
    AbsorbQuery {
        /// `[H · (nope + v), rank]`.
        kv_b: WeightId,
        /// Shape.
        mla: Mla,
        /// Whether RoPE is applied here.
        rotate: bool,
    },
    /// q `[H · (nope + rope)]`, `[rank + rope]` (output of kv_a) → `[H, rank + rope]`, `[rank + rope]`: `AbsorbQuery` that rotates
    /// and `LatentWrite`.
    AbsorbWrite {
        /// `[H · (nope + v), rank]`.
        kv_b: WeightId,
        /// Layer.
        layer: usize,
        /// Norm of the latent.
        norm: Norm,
        /// Shape.
        mla: Mla,
    },
    /// `[H, rank + rope]`, cache `[rank + rope]` → `[H, rank]`: attention over latents (§5, absorbed).
    LatentAttention {
        /// Layer.
        layer: usize,
        /// Shape.
        mla: Mla,
    },
    /// `[H, rank]` → `[H · v]`, through `W_UV`.
    AbsorbOutput {
        /// `[H · (nope + v), rank]`.
        kv_b: WeightId,
        /// Shape.
        mla: Mla,
    },
    /// x `[K]` → `[N]`: `silu(gate x) · up x`.
    GateUp {
        /// `[N, K]`.
        gate: WeightId,
        /// `[N, K]`.
        up: WeightId,
        /// Applied to x first.
        norm: Option<Norm>,
    },
    /// x `[K]` → `[N]`, `[M]`: two products of one input.
    LinearPair {
        /// `[N, K]`.
        first: WeightId,
        /// `[M, K]`.
        second: WeightId,
        /// Applied to x first.
        norm: Option<Norm>,
    },
    /// logits `[E]` → ids `[k + s]` (u32), weights `[k + s]`: behind the chosen experts s shared ones, E and up, with weight 1.
    Router {
        /// Rule.
        rule: RouterRule,
        /// `[E]`.
        bias: Option<WeightId>,
        /// s.
        shared: usize,
    },
    /// x `[K]` → ids `[k + s]` (u32), weights `[k + s]`, logits `[E]`: a router with the product that it judges by.
    RouterProduct {
        /// `[E, K]`.
        weight: WeightId,
        /// Applied to x first.
        norm: Option<Norm>,
        /// Rule.
        rule: RouterRule,
        /// `[E]`, added to scores.
        bias: Option<WeightId>,
        /// s.
        shared: usize,
    },
    /// x `[K]`, ids `[k]` → `[k, N]`: `silu(gate x) · up x` of each chosen expert.
    ExpertGateUp {
        /// `[N, K]` for each expert.
        gate: WeightId,
        /// `[N, K]` for each expert.
        up: WeightId,
        /// Applied to x first.
        norm: Option<Norm>,
    },
    /// y `[k, M]`, ids `[k]`, weights `[k]`, residual `[D]` → `[D]`: `residual + Σ_j weights_j · W_{ids_j} y_j`.
    ExpertDown {
        /// `[D, M]` for each expert.
        weight: WeightId,
    },
    /// e `[D]`, h `[D]` → `[2 D]`: both normalised and joined for a module of multi-token prediction (§7).
    MtpJoin {
        /// Of the embedding.
        enorm: Norm,
        /// Of the hidden state.
        hnorm: Norm,
    },
}

impl Op {
    /// Name without parameters, for messages.
    pub fn name(&self) -> String {
        let text = format!("{self:?}");
        text.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
    }

    /// The parameters that tell variants of one operation apart, for listings.
    pub(crate) fn traits(&self) -> Vec<&str> {
        let mut traits = Vec::new();
        let normed = match self {
            Op::Linear { norm, .. }
            | Op::LinearPair { norm, .. }
            | Op::GateUp { norm, .. }
            | Op::RouterProduct { norm, .. }
            | Op::ExpertGateUp { norm, .. } => norm.is_some(),
            _ => false,
        };
        if normed {
            traits.push("norm");
        }
        match self {
            Op::Linear { bias: Some(_), .. }
            | Op::Router { bias: Some(_), .. }
            | Op::RouterProduct { bias: Some(_), .. } => traits.push("bias"),
            Op::AbsorbQuery { rotate: true, .. } => traits.push("rotate"),
            Op::ReadState { name, .. } => traits.push(name),
            Op::WriteState { name, .. } => {
                traits.push(name);
                if self.when() == When::Drafting {
                    traits.push("drafting");
                }
            }
            Op::TopTokens(Asked::Next) => traits.push("next"),
            Op::TopTokens(Asked::Given) => traits.push("given"),
            _ => {}
        }
        if let Op::Router { shared: 1.., .. } | Op::RouterProduct { shared: 1.., .. } = self {
            traits.push("shared");
        }
        traits
    }

    /// Whether it does something beside its outputs, so that it stays though nobody reads them.
    pub fn has_effect(&self) -> bool {
        matches!(
            self,
            Op::CacheWrite { .. }
                | Op::LatentWrite { .. }
                | Op::AbsorbWrite { .. }
                | Op::WriteState { .. }
                | Op::Logprobs
                | Op::Accept
                | Op::Propose
        )
    }

    /// In which passes what it does beside its outputs is needed.
    pub(super) fn when(&self) -> When {
        match self {
            Op::WriteState { drafting: true, .. } | Op::Propose => When::Drafting,
            Op::Logprobs => When::Logprobs,
            _ => When::Always,
        }
    }
}
