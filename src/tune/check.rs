//! Holds what kernels computed on the device against the oracle: all of it for what was never written, a sample of tokens and
//! rows for its numbers.

use std::collections::HashMap;

use moewe_compiler::config::{Scoring, TopkMethod};
use moewe_compiler::graph::{Graph, Mla, NodeId, Norm, Op, RouterRule, Value, WeightId};
use moewe_compiler::lower::Lowered;
use moewe_oracle::ops::{self, LatentRows, MlaDims};
use moewe_oracle::router::{self, RouterParams};
use moewe_oracle::tolerance::{compare, magnitudes, swiglu_size};
use moewe_plan::{DType, Dim, Latent, PAGE_TOKENS, Role};

use super::data::{Numbers, Random};

/// What outputs hold before a kernel writes them: a NaN that no kernel computes.
pub(super) const UNTOUCHED: u32 = 0x7fde_adbe;

/// Buffers that the parts of an attention leave, if several share a context; as the compiler names them.
const SUMS: &str = "attention.sums";
const STATS: &str = "attention.stats";
/// Pages that a part has at least (`shaders/wesl/splits.wesl`).
const LEAST_PAGES: usize = 4;

/// What a run of a case left on the device.
pub(super) struct Run<'a> {
    pub(super) graph: &'a Graph,
    pub(super) lowered: &'a Lowered,
    pub(super) numbers: &'a Numbers,
    /// Tokens of the batch, one after the other in a sequence.
    pub(super) tokens: usize,
    /// Position of the first of them.
    pub(super) position: usize,
    /// Where the pages of the sequence stand.
    pub(super) pages: &'a [u32],
    /// The words of buffers.
    pub(super) contents: HashMap<u32, Vec<u32>>,
}

/// Numbers that a kernel gave, those that it should have given, and their conditions.
#[derive(Default)]
struct Compared {
    got: Vec<f32>,
    want: Vec<f64>,
    size: Vec<f64>,
}

impl Compared {
    fn push(&mut self, got: f64, want: f64, size: f64) {
        self.got.push(got as f32);
        self.want.push(want);
        self.size.push(size);
    }

    fn judge(&self, kernel: &str) -> Result<(), String> {
        compare(kernel, &self.got, &self.want, &self.size).map(drop)
    }
}

/// The buffers whose contents the check of an operation reads.
pub(super) fn needed(graph: &Graph, lowered: &Lowered, id: NodeId) -> Vec<u32> {
    let node = &graph.nodes[id];
    let outputs = (0..node.outputs.len()).map(|output| Value { node: id, output });
    let mut needed: Vec<u32> = node.inputs.iter().copied().chain(outputs).map(|value| lowered.values[&value]).collect();
    let named = |name: &str| (0u32..).zip(&lowered.buffers).find(|(_, buffer)| buffer.name == name);
    needed.extend([SUMS, STATS].iter().filter_map(|name| named(name)).map(|(index, _)| index));
    if let Op::LatentAttention { .. } = node.op {
        needed.extend(cache(lowered));
    }
    needed
}

fn cache(lowered: &Lowered) -> Option<u32> {
    (0..).zip(&lowered.buffers).find(|(_, buffer)| buffer.role == Role::Cache).map(|(index, _)| index)
}

/// Numbers below `n`: the ends, both sides of every power of two, where tiles, workgroups and shards begin, and a few others.
fn sample(n: usize, edges: impl IntoIterator<Item = usize>, others: usize) -> Vec<usize> {
    let powers = (0..usize::BITS - 1).map(|bit| 1usize << bit).take_while(|&power| power <= n);
    let mut random = Random::named(n as u64, "sample");
    let mut all: Vec<usize> = powers.chain(edges).flat_map(|edge| [edge.saturating_sub(1), edge]).collect();
    all.extend([0, n - 1]);
    all.extend((0..others).map(|_| random.below(n)));
    all.retain(|&row| row < n);
    all.sort_unstable();
    all.dedup();
    all
}

impl Run<'_> {
    /// Whether an operation gave what it should have; if not, where not.
    pub(super) fn check(&self, id: NodeId) -> Result<(), String> {
        let node = &self.graph.nodes[id];
        let out = |output| Value { node: id, output };
        let input = |at: usize| node.inputs[at];
        match &node.op {
            Op::Linear { weight, bias, norm } => {
                let residual = node.inputs.get(1).copied();
                self.product(input(0), out(0), [*weight, *weight], false, *norm, *bias, residual)
            }
            Op::LinearPair { first, second, norm } => [*first, *second]
                .into_iter()
                .enumerate()
                .try_for_each(|(at, weight)| self.product(input(0), out(at), [weight; 2], false, *norm, None, None)),
            Op::GateUp { gate, up, norm } => self.product(input(0), out(0), [*gate, *up], true, *norm, None, None),
            Op::RouterProduct { weight, norm, rule, bias, shared } => {
                self.product(input(0), out(2), [*weight; 2], false, *norm, None, None)?;
                self.choice(rule, *bias, *shared, [out(0), out(1), out(2)])
            }
            Op::ExpertGateUp { gate, up, norm } => self.gate_up([input(0), input(1), out(0)], [*gate, *up], *norm),
            Op::ExpertDown { weight } => self.down([input(0), input(1), input(2), input(3), out(0)], *weight),
            Op::LatentAttention { mla, .. } => self.attention(input(0), out(0), mla),
            Op::AbsorbOutput { kv_b, mla } => self.values(input(0), out(0), *kv_b, mla),
            other => Err(format!("there is no check for {}", other.name())),
        }
    }

    fn words(&self, value: Value) -> &[u32] {
        &self.contents[&self.lowered.values[&value]]
    }

    fn row_of(&self, value: Value, row: usize) -> Vec<f64> {
        let length = self.graph.ty(value).row_len();
        self.words(value)[row * length..][..length].iter().map(|&word| f64::from(f32::from_bits(word))).collect()
    }

    /// An error if a number of a value was never written, or is none.
    fn written(&self, value: Value) -> Result<(), String> {
        let is_float = self.graph.ty(value).dtype == DType::F32;
        // What is untouched is no number, either.
        let wrong = |&word: &u32| word == UNTOUCHED || is_float && !f32::from_bits(word).is_finite();
        match self.words(value).iter().position(wrong) {
            None => Ok(()),
            Some(at) if self.words(value)[at] == UNTOUCHED => Err(format!("number {at} was not written")),
            Some(at) => Err(format!("number {at} is {}", f32::from_bits(self.words(value)[at]))),
        }
    }

    fn sampled_tokens(&self, most: usize) -> Vec<usize> {
        let all = sample(self.tokens, [], 2);
        let step = all.len().div_ceil(most);
        let mut some: Vec<usize> = all.iter().copied().step_by(step).collect();
        some.push(self.tokens - 1);
        some.dedup();
        some
    }

    /// Rows of a matrix that are looked at. Slices of a shard are rows where there are no experts.
    fn sampled_rows(&self, weight: WeightId, others: usize) -> Vec<usize> {
        let matrix = &self.lowered.weights[self.lowered.tensors[&weight].weight as usize];
        let stacked = self.graph.weights[weight].experts.is_some();
        let shards = matrix.shards.iter().filter(|_| !stacked).map(|shard| shard.first as usize);
        sample(self.graph.weights[weight].shape[0], shards, others)
    }

    fn matrix_row(&self, weight: WeightId, expert: Option<usize>, row: usize) -> Vec<f64> {
        self.numbers.row(&self.lowered.weights, self.lowered.tensors[&weight], expert, row)
    }

    fn vector(&self, weight: WeightId) -> Vec<f64> {
        self.numbers.vector(self.lowered.tensors[&weight], self.graph.weights[weight].shape[0])
    }

    fn normed(&self, x: Value, row: usize, norm: Option<Norm>) -> Vec<f64> {
        let x = self.row_of(x, row);
        norm.map_or(x.clone(), |norm| ops::rms_norm(&x, &self.vector(norm.weight), norm.eps))
    }

    /// A product, or silu of the first times the second.
    #[expect(clippy::too_many_arguments, reason = "as many as can be fused into a product")]
    fn product(
        &self,
        x: Value,
        y: Value,
        weights: [WeightId; 2],
        gated: bool,
        norm: Option<Norm>,
        bias: Option<WeightId>,
        residual: Option<Value>,
    ) -> Result<(), String> {
        self.written(y)?;
        let wanted = self.words(y).len() / self.graph.ty(y).row_len();
        let tokens: Vec<usize> = self.sampled_tokens(16).into_iter().filter(|&token| token < wanted).collect();
        let inputs: Vec<Vec<f64>> = tokens.iter().map(|&token| self.normed(x, token, norm)).collect();
        let bias = bias.map(|bias| self.vector(bias));
        let mut compared = Compared::default();
        for row in self.sampled_rows(weights[0], 32) {
            let [w, u] = weights.map(|weight| self.matrix_row(weight, None, row));
            for (&token, x) in tokens.iter().zip(&inputs) {
                let (mut want, mut size) = if gated { swiglu(x, &w, &u) } else { dot(x, &w) };
                let residual = residual.map(|residual| self.row_of(residual, token)[row]);
                for more in [bias.as_ref().map(|bias| bias[row]), residual].into_iter().flatten() {
                    want += more;
                    size += more.abs();
                }
                compared.push(self.row_of(y, token)[row], want, size);
            }
        }
        compared.judge("linear")
    }

    fn gate_up(&self, [x, ids, y]: [Value; 3], [gate, up]: [WeightId; 2], norm: Option<Norm>) -> Result<(), String> {
        self.written(y)?;
        let top_k = self.graph.ty(ids).row_len();
        let n = self.graph.ty(y).row_len() / top_k;
        let mut compared = Compared::default();
        for token in self.sampled_tokens(4) {
            let (x, y) = (self.normed(x, token, norm), self.row_of(y, token));
            for (slot, &expert) in self.words(ids)[token * top_k..][..top_k].iter().enumerate() {
                for row in self.sampled_rows(gate, 4) {
                    let [g, u] = [gate, up].map(|weight| self.matrix_row(weight, Some(expert as usize), row));
                    let (want, size) = swiglu(&x, &g, &u);
                    compared.push(y[slot * n + row], want, size);
                }
            }
        }
        compared.judge("experts_gate_up")
    }

    fn down(&self, [y, ids, weights, residual, result]: [Value; 5], weight: WeightId) -> Result<(), String> {
        self.written(result)?;
        let top_k = self.graph.ty(ids).row_len();
        let mut compared = Compared::default();
        for token in self.sampled_tokens(8) {
            let [y, weights, residual, got] = [y, weights, residual, result].map(|value| self.row_of(value, token));
            let k = y.len() / top_k;
            for row in self.sampled_rows(weight, 8) {
                let (mut want, mut size) = (residual[row], residual[row].abs());
                for (slot, &expert) in self.words(ids)[token * top_k..][..top_k].iter().enumerate() {
                    let (sum, sum_size) =
                        dot(&y[slot * k..][..k], &self.matrix_row(weight, Some(expert as usize), row));
                    want += weights[slot] * sum;
                    size += weights[slot].abs() * sum_size;
                }
                compared.push(got[row], want, size);
            }
        }
        // Tiles have a kernel of their own, with its tolerance.
        let tiled = self.lowered.kernels.iter().any(|kernel| kernel.name.starts_with("gemm"));
        compared.judge(if tiled { "gemm" } else { "experts_down" })
    }

    /// The experts that a router chose by its logits, and their weights.
    fn choice(
        &self,
        rule: &RouterRule,
        bias: Option<WeightId>,
        shared: usize,
        [ids, weights, logits]: [Value; 3],
    ) -> Result<(), String> {
        self.written(ids)?;
        self.written(weights)?;
        let params = RouterParams {
            scoring: match rule.scoring {
                Scoring::Softmax => router::Scoring::Softmax,
                Scoring::Sigmoid => router::Scoring::Sigmoid,
            },
            method: match rule.method {
                TopkMethod::Greedy => router::TopkMethod::Greedy,
                TopkMethod::GroupLimitedGreedy => router::TopkMethod::GroupLimitedGreedy,
                TopkMethod::NoauxTc => router::TopkMethod::NoauxTc,
            },
            groups: rule.n_group,
            topk_group: rule.topk_group,
            top_k: rule.top_k,
            norm_topk_prob: rule.normalise,
            scale: rule.scale,
        };
        let bias = bias.map(|bias| self.vector(bias));
        let mut compared = Compared::default();
        for token in 0..self.tokens {
            let route = router::route(&self.row_of(logits, token), bias.as_deref(), &params);
            let slots = rule.top_k + shared;
            let want: Vec<u32> =
                route.ids.iter().copied().chain(rule.experts..).map(|id| id as u32).take(slots).collect();
            let got = &self.words(ids)[token * slots..][..slots];
            if got != want {
                return Err(format!("token {token} has experts {got:?} instead of {want:?}"));
            }
            let found = self.row_of(weights, token);
            for (found, want) in found.into_iter().zip(route.weights.into_iter().chain(std::iter::repeat(1.0))) {
                compared.push(found, want, want.abs());
            }
        }
        compared.judge("router")
    }

    /// What attention gave for a head of a token, and its condition: of one workgroup, or of several added up.
    fn attended(&self, value: Value, token: usize, head: usize, mla: &Mla) -> (Vec<f64>, Vec<f64>) {
        let index = |name: &str| self.lowered.buffers.iter().position(|buffer| buffer.name == name);
        let (Some(sums), Some(stats)) = (index(SUMS), index(STATS)) else {
            let row = self.row_of(value, token)[head * mla.rank..][..mla.rank].to_vec();
            return (row.clone(), magnitudes(&row));
        };
        let of = |buffer: usize, at: usize| f64::from(f32::from_bits(self.contents[&(buffer as u32)][at]));
        let splits = self.lowered.steps.iter().find(|(node, _)| *node == value.node).map_or(1, |(_, step)| {
            let Dim::Const(splits) = step.grid[2] else { unreachable!("splits are known when compiling") };
            splits as usize
        });
        let pages = (self.position + token + 1).div_ceil(PAGE_TOKENS as usize);
        let shares = pages.div_ceil(pages.div_ceil(splits).max(LEAST_PAGES));
        let row = |share: usize| (token * splits + share) * mla.heads + head;
        let largest = (0..shares).map(|share| of(stats, 2 * row(share))).fold(f64::MIN, f64::max);
        let factor = |share: usize| (of(stats, 2 * row(share)) - largest).exp();
        let total: f64 = (0..shares).map(|share| factor(share) * of(stats, 2 * row(share) + 1)).sum();
        let part = |share: usize, i: usize| factor(share) * of(sums, row(share) * mla.rank + i) / total;
        let add = |f: fn(f64) -> f64| (0..mla.rank).map(|i| (0..shares).map(|s| f(part(s, i))).sum()).collect();
        (add(|x| x), add(f64::abs))
    }

    fn attention(&self, q: Value, y: Value, mla: &Mla) -> Result<(), String> {
        let words = &self.contents[&cache(self.lowered).expect("attention reads a cache")];
        let stride = Latent::F32.words(mla.rank as u64, mla.rope as u64) as usize;
        let page = PAGE_TOKENS as usize;
        let numbers = |position: usize, from: usize, count: usize| {
            let row = self.pages[position / page] as usize * page + position % page;
            words[row * stride + from..][..count].iter().map(|&word| f64::from(f32::from_bits(word)))
        };
        let mut compared = Compared::default();
        for token in self.sampled_tokens(6) {
            let own = self.position + token;
            let positions: Vec<usize> = (0..=own).collect();
            let c: Vec<f64> = positions.iter().flat_map(|&p| numbers(p, 0, mla.rank)).collect();
            let rope = |p: &usize| numbers(*p, mla.rank.next_multiple_of(16), mla.rope);
            let k_rope: Vec<f64> = positions.iter().flat_map(rope).collect();
            let cache = LatentRows { c: &c, k_rope: &k_rope, positions: &positions };
            for head in sample(mla.heads, [], 0) {
                let all = self.row_of(q, token);
                let (q, q_rope) = all[head * (mla.rank + mla.rope)..][..mla.rank + mla.rope].split_at(mla.rank);
                let (rank, rope) = (mla.rank, mla.rope);
                let dims =
                    MlaDims { heads: 1, nope: mla.nope, rope, value: mla.v, latent: rank, scale: mla.softmax_scale };
                let want = ops::attend_latent(&dims, q, q_rope, &[own], &cache);
                // An error of a score is one of the same size of the logarithm of a probability.
                let score = |s: usize| dot(q, &c[s * rank..][..rank]).1 + dot(q_rope, &k_rope[s * rope..][..rope]).1;
                let scores = positions.iter().map(|&s| score(s) * mla.softmax_scale).fold(0.0, f64::max);
                let (got, _) = self.attended(y, token, head, mla);
                for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
                    let largest = positions.iter().map(|s| c[s * rank + i].abs()).fold(0.0, f64::max);
                    compared.push(got, want, largest * (1.0 + scores));
                }
            }
        }
        compared.judge("latent_attention")
    }

    fn values(&self, x: Value, y: Value, kv_b: WeightId, mla: &Mla) -> Result<(), String> {
        self.written(y)?;
        let mut compared = Compared::default();
        for token in self.sampled_tokens(8) {
            let got = self.row_of(y, token);
            for head in sample(mla.heads, [], 0) {
                let (x, x_size) = self.attended(x, token, head, mla);
                for i in sample(mla.v, [], 4) {
                    let row = self.matrix_row(kv_b, None, head * (mla.nope + mla.v) + mla.nope + i);
                    compared.push(got[head * mla.v + i], ops::dot(&x, &row), ops::dot(&x_size, &magnitudes(&row)));
                }
            }
        }
        compared.judge("absorb_output")
    }
}

/// A product, and its condition.
fn dot(a: &[f64], b: &[f64]) -> (f64, f64) {
    (ops::dot(a, b), a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum())
}

/// silu of one product times another, and its condition.
fn swiglu(x: &[f64], gate: &[f64], up: &[f64]) -> (f64, f64) {
    let ((g, g_size), (u, u_size)) = (dot(x, gate), dot(x, up));
    (ops::swiglu(&[g], &[u])[0], swiglu_size(&[g], &[g_size], &[u], &[u_size])[0])
}
