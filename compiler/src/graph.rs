//! The typed graph of one program: what is computed, not yet how.
//!
//! A tensor has one row for each token of the batch (or for each row whose logits are wanted) and a fixed shape per
//! row. Nodes stand in the order in which they may run: a node's inputs come before it. [`crate::model`] builds the
//! graph with plain operations; [`crate::passes`] rewrites them into the fused ones; [`crate::lower`] has a kernel
//! for each operation that is left.

use std::collections::BTreeSet;
use std::fmt;

use moewe_plan::{DType, TOP_TOKENS, TapGroup, When};

use crate::config::{Scoring, TopkMethod};

/// What the rows of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Tokens of the batch.
    Tokens,
    /// Rows of the batch whose logits are wanted.
    Wanted,
}

/// Type of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorType {
    /// Type of the numbers.
    pub dtype: DType,
    /// What its rows are.
    pub rows: Rows,
    /// Shape of one row.
    pub shape: Vec<usize>,
}

impl TensorType {
    /// Floats, one row for each token.
    pub fn tokens(shape: &[usize]) -> Self {
        Self { dtype: DType::F32, rows: Rows::Tokens, shape: shape.to_vec() }
    }

    /// Numbers in one row.
    pub fn row_len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = match self.rows {
            Rows::Tokens => "T",
            Rows::Wanted => "R",
        };
        let dtype = match self.dtype {
            DType::F32 => "f32",
            DType::U32 => "u32",
        };
        write!(f, "{dtype}[{rows}")?;
        self.shape.iter().try_for_each(|dim| write!(f, ", {dim}"))?;
        f.write_str("]")
    }
}

/// Index of a node in [`Graph::nodes`].
pub type NodeId = usize;

/// One output of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value {
    /// The node.
    pub node: NodeId,
    /// Which of its outputs.
    pub output: usize,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.node)?;
        if self.output == 0 { Ok(()) } else { write!(f, ".{}", self.output) }
    }
}

/// Index into [`Graph::weights`].
pub type WeightId = usize;

/// A tensor of the checkpoint, or as many of one shape as there are experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightRef {
    /// Name in the checkpoint; `*` stands for the expert's number if `experts` is given.
    pub name: String,
    /// Number of experts that are stacked.
    pub experts: Option<usize>,
    /// Shared experts that stand behind them, as further experts.
    pub shared: Option<SharedExperts>,
    /// Shape of one tensor: `[rows, columns]`, or `[length]` for vectors.
    pub shape: Vec<usize>,
}

/// A tensor of the checkpoint that joins several shared experts in one matrix, taken apart again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedExperts {
    /// Name in the checkpoint.
    pub name: String,
    /// Number of experts in it.
    pub count: usize,
    /// Whether they stand beside one another (columns) instead of below one another (rows).
    pub beside: bool,
}

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
    fn traits(&self) -> Vec<&str> {
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
    fn when(&self) -> When {
        match self {
            Op::WriteState { drafting: true, .. } | Op::Propose => When::Drafting,
            Op::Logprobs => When::Logprobs,
            _ => When::Always,
        }
    }
}

/// One operation with its inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it does.
    pub op: Op,
    /// What it reads.
    pub inputs: Vec<Value>,
    /// Types of its outputs.
    pub outputs: Vec<TensorType>,
    /// Where in the model it stands, for example `layers.3.router`.
    pub label: String,
    /// The layer, if it belongs to one.
    pub layer: Option<usize>,
}

/// A named result that may be read when the program has run. Passes keep it; memory planning keeps it apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Tap {
    /// Name, that of the golden files (spec §10) if they have it. Two taps may share one if the rows of one are tokens,
    /// and of the other wanted rows: where all tokens are wanted rows in their order, they hold the same.
    pub name: String,
    /// What it belongs to.
    pub group: TapGroup,
    /// The layer, if it belongs to one.
    pub layer: Option<usize>,
    /// Whether what serves only such taps may be left out when none of them is read.
    pub optional: bool,
    /// The tensor.
    pub value: Value,
    /// First number of the row that is shown.
    pub offset: usize,
    /// Numbers of the row that are shown.
    pub columns: usize,
}

/// Nodes in running order, the weights they name and the results that are wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// Operations.
    pub nodes: Vec<Node>,
    /// Tensors of the checkpoint.
    pub weights: Vec<WeightRef>,
    /// Results.
    pub taps: Vec<Tap>,
    /// Whether routers, cache writes and attention heads read the plan's parameters
    /// ([`moewe_plan::ParameterKind`]). As long as those are neutral, that makes no difference.
    pub parameters: bool,
    /// Whether shared experts can be taken apart into matrices like those of routed ones: blocks of scales must not be cut.
    pub divides_shared: bool,
}

/// Why a graph is not sound.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("node {node} ({label}): {what}")]
pub struct GraphError {
    /// The node.
    pub node: NodeId,
    /// Its label.
    pub label: String,
    /// What is wrong.
    pub what: String,
}

impl Graph {
    /// The id of a weight without shared experts, added if it is new.
    pub fn weight(&mut self, name: impl Into<String>, experts: Option<usize>, shape: &[usize]) -> WeightId {
        self.add_weight(WeightRef { name: name.into(), experts, shared: None, shape: shape.to_vec() })
    }

    /// The id of a weight, added if it is new.
    pub fn add_weight(&mut self, weight: WeightRef) -> WeightId {
        self.weights.iter().position(|w| *w == weight).unwrap_or_else(|| {
            self.weights.push(weight);
            self.weights.len() - 1
        })
    }

    /// Type of a value.
    pub fn ty(&self, value: Value) -> &TensorType {
        &self.nodes[value.node].outputs[value.output]
    }

    /// Nodes that read a value, with the position among their inputs.
    pub fn readers(&self, value: Value) -> impl Iterator<Item = (NodeId, usize)> + '_ {
        self.nodes.iter().enumerate().flat_map(move |(id, node)| {
            node.inputs.iter().enumerate().filter(move |(_, input)| **input == value).map(move |(at, _)| (id, at))
        })
    }

    /// Whether a value is wanted as a result.
    pub fn is_tapped(&self, value: Value) -> bool {
        self.taps.iter().any(|tap| tap.value == value)
    }

    /// Whether exactly one input in the graph reads `value` and nothing taps it: then it may be swallowed.
    pub fn is_private(&self, value: Value) -> bool {
        !self.is_tapped(value) && self.readers(value).count() == 1
    }

    /// For each node the optional taps (indices into [`Graph::taps`]) that it serves, if it serves nothing else; none for
    /// a node that always runs.
    pub fn only_for(&self) -> Vec<Vec<usize>> {
        let mut always: Vec<bool> = self.nodes.iter().map(|node| node.op.has_effect()).collect();
        let mut serves = vec![BTreeSet::new(); self.nodes.len()];
        for (index, tap) in self.taps.iter().enumerate() {
            if tap.optional {
                serves[tap.value.node].insert(index);
            } else {
                always[tap.value.node] = true;
            }
        }
        for (id, node) in self.nodes.iter().enumerate().rev() {
            for input in &node.inputs {
                always[input.node] |= always[id];
                let served = serves[id].clone();
                serves[input.node].extend(served);
            }
        }
        let only = |(always, serves): (bool, BTreeSet<usize>)| if always { Vec::new() } else { Vec::from_iter(serves) };
        always.into_iter().zip(serves).map(only).collect()
    }

    /// For each node in which passes it is needed: in all, if it serves more than one purpose.
    pub fn when(&self) -> Vec<When> {
        let needed = |when| {
            let serves = |node: &Node| node.op.has_effect() && node.op.when() == when;
            self.needed(self.nodes.iter().map(serves).collect())
        };
        let (drafting, logprobs, mut always) = (needed(When::Drafting), needed(When::Logprobs), needed(When::Always));
        for tap in &self.taps {
            always[tap.value.node] = true;
        }
        let always = self.needed(always);
        let when = |id: usize| match (always[id], drafting[id], logprobs[id]) {
            (false, true, false) => When::Drafting,
            (false, false, true) => When::Logprobs,
            _ => When::Always,
        };
        (0..self.nodes.len()).map(when).collect()
    }

    /// `wanted` and all nodes that those need.
    fn needed(&self, mut wanted: Vec<bool>) -> Vec<bool> {
        for (id, node) in self.nodes.iter().enumerate().rev() {
            if wanted[id] {
                for input in &node.inputs {
                    wanted[input.node] = true;
                }
            }
        }
        wanted
    }

    /// Removes nodes that nothing needs and renumbers the rest.
    pub fn sweep(&mut self) {
        let mut wanted: Vec<bool> = self.nodes.iter().map(|node| node.op.has_effect()).collect();
        for tap in &self.taps {
            wanted[tap.value.node] = true;
        }
        let live = self.needed(wanted);
        let mut renumbered = Vec::with_capacity(live.len());
        let mut next = 0;
        for &keep in &live {
            renumbered.push(next);
            next += usize::from(keep);
        }
        let mut keep = live.iter();
        self.nodes.retain(|_| *keep.next().unwrap_or(&false));
        let values =
            self.nodes.iter_mut().flat_map(|n| &mut n.inputs).chain(self.taps.iter_mut().map(|t| &mut t.value));
        for value in values {
            value.node = renumbered[value.node];
        }
    }
}

/// One line for each node, `%12 = Linear[norm](%9, %11) : f32[T, 64]   layers.0.o`, then one for each tap.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, node) in self.nodes.iter().enumerate() {
            let traits = node.op.traits();
            let traits = if traits.is_empty() { String::new() } else { format!("[{}]", traits.join(", ")) };
            let call = format!("%{id} = {}{traits}({})", node.op.name(), list(&node.inputs));
            let outputs = if node.outputs.is_empty() { "()".to_owned() } else { list(&node.outputs) };
            writeln!(f, "{call} : {outputs}   {}", node.label)?;
        }
        for tap in &self.taps {
            writeln!(f, "tap {} = {}[{}..{}]", tap.name, tap.value, tap.offset, tap.offset + tap.columns)?;
        }
        Ok(())
    }
}

/// Things with commas between them.
pub(crate) fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
