//! Runs a graph in f64 with the oracle's operations: slow, plain, and with every operation on its own.
//!
//! The cache of a layer is one list of rows instead of pages; everything else is as on the device.

use std::borrow::Cow;
use std::collections::BTreeMap;

use moewe_compiler::{
    config::{Scoring, TopkMethod},
    graph::{Asked, Graph, Mla, Node, Norm, Op, RouterRule, TensorType, WeightId, top_tokens},
};
use moewe_oracle::{
    Model, Tensor, Trace, Weights,
    ops::{self, LatentRows, MlaDims},
    prediction::predict,
    router::{self, RouterParams},
};
use moewe_plan::DType;

/// What one run of a program works on.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row.
    pub positions: Vec<usize>,
    /// Token behind each row, where it is known.
    pub next: Vec<Option<u32>>,
    /// Rows whose logits are wanted.
    pub wanted: Vec<usize>,
}

impl Batch {
    /// Tokens of one sequence from a position on, all of their logits wanted.
    pub fn sequence(tokens: &[u32], first: usize) -> Self {
        let positions = (first..first + tokens.len()).collect();
        let next = (1..=tokens.len()).map(|i| tokens.get(i).copied()).collect();
        Self { tokens: tokens.to_vec(), positions, next, wanted: (0..tokens.len()).collect() }
    }
}

/// The latent cache of one layer.
#[derive(Clone, Debug, Default)]
struct Rows {
    /// [S, rank].
    latents: Vec<f64>,
    /// [S, rope], rotated.
    keys: Vec<f64>,
    /// [S].
    positions: Vec<usize>,
}

/// What lives from one run of a program to the next.
#[derive(Clone)]
pub struct Session<'a> {
    model: &'a Model,
    caches: BTreeMap<usize, Rows>,
    states: BTreeMap<String, Vec<f64>>,
    /// Sampled tokens.
    pub finished: Vec<u32>,
}

impl<'a> Session<'a> {
    /// A session with empty caches.
    pub fn new(model: &'a Model) -> Self {
        Self { model, caches: BTreeMap::new(), states: BTreeMap::new(), finished: Vec::new() }
    }

    /// Runs a graph; the result is its taps.
    pub fn run(&mut self, graph: &Graph, batch: &Batch) -> Trace {
        let mut values: Vec<Vec<Vec<f64>>> = Vec::with_capacity(graph.nodes.len());
        for node in &graph.nodes {
            let inputs: Vec<&[f64]> = node.inputs.iter().map(|v| &values[v.node][v.output][..]).collect();
            let types = node.inputs.iter().map(|v| graph.ty(*v)).collect();
            let outputs = Step { session: self, graph, batch, node, inputs, types }.run();
            for (output, ty) in outputs.iter().zip(&node.outputs) {
                assert_eq!(output.len() % ty.row_len(), 0, "{} does not give rows of {ty}", node.label);
            }
            assert_eq!(outputs.len(), node.outputs.len(), "{}", node.label);
            values.push(outputs);
        }
        graph
            .taps
            .iter()
            .map(|tap| {
                let ty = graph.ty(tap.value);
                let rows = values[tap.value.node][tap.value.output].chunks_exact(ty.row_len());
                let shown: Vec<f64> =
                    rows.flat_map(|row| &row[tap.offset..tap.offset + tap.columns]).copied().collect();
                let tensor = match ty.dtype {
                    DType::F32 => Tensor::rows(shown, tap.columns),
                    DType::U32 => {
                        let shape = vec![shown.len() / tap.columns, tap.columns];
                        Tensor::ids(shown.into_iter().map(|id| id as i64), shape)
                    }
                };
                (tap.name.clone(), tensor)
            })
            .collect()
    }
}

/// One node at work.
struct Step<'s, 'a, 'g> {
    session: &'s mut Session<'a>,
    graph: &'g Graph,
    batch: &'g Batch,
    node: &'g Node,
    inputs: Vec<&'g [f64]>,
    types: Vec<&'g TensorType>,
}

impl Step<'_, '_, '_> {
    /// Outputs of the node, row after row; integers as floats.
    fn run(&mut self) -> Vec<Vec<f64>> {
        match self.node.op.clone() {
            Op::Router { rule, bias, shared } => self.router(self.inputs[0], &rule, bias, shared),
            Op::RouterProduct { weight, norm, rule, bias, shared } => {
                let x = self.prologue(norm.as_ref());
                let logits = ops::linear(&x, self.weight(weight), None, self.width(0));
                let mut outputs = self.router(&logits, &rule, bias, shared);
                outputs.push(logits);
                outputs
            }
            Op::AbsorbWrite { kv_b, layer, norm, mla } => {
                let query = self.rotated(self.inputs[0], mla.nope + mla.rope, mla.rope);
                vec![self.absorbed(kv_b, &mla, &query), self.latent_row(self.inputs[1], layer, &norm, &mla)]
            }
            Op::LinearPair { first, second, norm } => {
                let x = self.prologue(norm.as_ref());
                [first, second].map(|weight| ops::linear(&x, self.weight(weight), None, self.width(0))).into()
            }
            Op::Logprobs => Vec::new(),
            Op::Accept | Op::Propose => {
                let tokens = self.inputs[0].iter().map(|&t| t as u32);
                self.session.finished.extend(tokens);
                Vec::new()
            }
            Op::TopTokens(asked) => self.top_tokens(asked),
            Op::Attention { kv_b, mla, .. } => vec![self.attention(), self.absorbed(kv_b, &mla, self.inputs[0])],
            _ => vec![self.output()],
        }
    }

    fn output(&mut self) -> Vec<f64> {
        match &self.node.op {
            Op::Embed { weight } => {
                ops::embed(self.weight(*weight), self.node.outputs[0].row_len(), &self.batch.tokens)
            }
            Op::ReadState { name, .. } => self.session.states[name].clone(),
            Op::WriteState { name, .. } => {
                self.session.states.insert(name.clone(), self.inputs[0].to_vec());
                self.inputs[0].to_vec()
            }
            Op::RmsNorm(norm) => self.norm(self.inputs[0], norm),
            Op::Linear { weight, bias, norm } => {
                let x = self.prologue(norm.as_ref());
                let bias = bias.map(|bias| self.weight(bias));
                let product = ops::linear(&x, self.weight(*weight), bias, self.width(0));
                self.inputs.get(1).map_or(product.clone(), |residual| ops::add(&product, residual))
            }
            Op::Silu => self.inputs[0].iter().map(|&x| ops::silu(x)).collect(),
            Op::Mul => self.inputs[0].iter().zip(self.inputs[1]).map(|(a, b)| a * b).collect(),
            Op::Add => ops::add(self.inputs[0], self.inputs[1]),
            Op::Concat => ops::concat_rows(self.inputs[0], self.width(0), self.inputs[1], self.width(1)),
            Op::Slice { start, len } => self.rows(0).flat_map(|row| &row[*start..start + len]).copied().collect(),
            Op::GateUp { gate, up, norm } => {
                let (x, width) = (self.prologue(norm.as_ref()), self.width(0));
                let product = |weight| ops::linear(&x, self.weight(weight), None, width);
                ops::swiglu(&product(*gate), &product(*up))
            }
            Op::MtpJoin { enorm, hnorm } => {
                let (e, h) = (self.norm(self.inputs[0], enorm), self.norm(self.inputs[1], hnorm));
                ops::concat_rows(&e, self.width(0), &h, self.width(1))
            }
            Op::GatherRows => {
                let rows: Vec<_> = self.rows(0).collect();
                self.batch.wanted.iter().flat_map(|&row| rows[row]).copied().collect()
            }
            Op::Sample => self.rows(0).map(|row| ops::argmax(row) as f64).collect(),
            Op::Rope { .. }
            | Op::CacheWrite { .. }
            | Op::Attention { .. }
            | Op::LatentWrite { .. }
            | Op::AbsorbQuery { .. }
            | Op::LatentAttention { .. }
            | Op::AbsorbOutput { .. } => self.attention(),
            _ => self.experts(),
        }
    }

    fn top_tokens(&self, asked: Asked) -> Vec<Vec<f64>> {
        let k = top_tokens(self.width(0));
        let (mut ids, mut probs, mut stats) = (Vec::new(), Vec::new(), Vec::new());
        for (t, logits) in self.rows(0).enumerate() {
            let sampled = || self.batch.wanted.iter().position(|&row| row == t).map(|r| self.inputs[1][r] as usize);
            let asked = match asked {
                Asked::Nothing => None,
                Asked::Next => self.batch.next[t].map(|id| id as usize).or_else(sampled),
                Asked::Given => Some(self.inputs[1][t * k] as usize),
            };
            let told = predict(logits, k, asked);
            ids.extend(told.ids.iter().map(|&id| id as f64));
            probs.extend(told.probs);
            let (log_probability, rank) = told.asked.unwrap_or((f64::NAN, 0));
            stats.extend([told.entropy, log_probability, if told.asked.is_some() { rank as f64 } else { f64::NAN }]);
        }
        if asked == Asked::Nothing { vec![ids, probs] } else { vec![ids, probs, stats] }
    }

    /// Rotated queries through `W_UK`, the rotated part behind.
    fn absorbed(&self, kv_b: WeightId, mla: &Mla, query: &[f64]) -> Vec<f64> {
        let (nope, rope) = ops::split_rows(query, mla.nope + mla.rope, mla.nope);
        let absorbed = ops::absorb_queries(&dims(mla), self.weight(kv_b), &nope);
        ops::concat_rows(&absorbed, mla.rank, &rope, mla.rope)
    }

    fn attention(&mut self) -> Vec<f64> {
        match self.node.op.clone() {
            Op::Rope { head_dim, rope, .. } => self.rotated(self.inputs[0], head_dim, rope),
            Op::CacheWrite { layer } => {
                let (latent, key) = (self.inputs[0].to_vec(), self.inputs[1].to_vec());
                self.write(layer, &latent, &key)
            }
            Op::LatentWrite { layer, norm, mla } => self.latent_row(self.inputs[0], layer, &norm, &mla),
            Op::Attention { layer, kv_b, mla } => {
                let kv_b = self.weight(kv_b);
                ops::mla_naive(&dims(&mla), kv_b, self.inputs[0], &self.batch.positions, &self.cache(layer))
            }
            Op::AbsorbQuery { kv_b, mla, rotate } => {
                let head_dim = mla.nope + mla.rope;
                let query =
                    if rotate { self.rotated(self.inputs[0], head_dim, mla.rope) } else { self.inputs[0].to_vec() };
                self.absorbed(kv_b, &mla, &query)
            }
            Op::LatentAttention { layer, mla } => {
                let (query, rope) = ops::split_rows(self.inputs[0], mla.rank + mla.rope, mla.rank);
                ops::attend_latent(&dims(&mla), &query, &rope, &self.batch.positions, &self.cache(layer))
            }
            Op::AbsorbOutput { kv_b, mla } => ops::expand_values(&dims(&mla), self.weight(kv_b), self.inputs[0]),
            other => panic!("{} is not attention", other.name()),
        }
    }

    fn experts(&self) -> Vec<f64> {
        match &self.node.op {
            Op::RouterScore(scoring) => {
                self.rows(0).flat_map(|row| router::scores(row, oracle_scoring(*scoring))).collect()
            }
            Op::RouterBias { bias } => {
                let bias = self.weight(*bias);
                self.rows(0).flat_map(|row| router::selection_scores(row, Some(bias))).collect()
            }
            Op::GroupLimit(rule) => {
                let limit = |row: &[f64]| {
                    router::limit_groups(row, rule.n_group, rule.topk_group, oracle_scoring(rule.scoring))
                };
                self.rows(0).flat_map(limit).collect()
            }
            Op::TopK { k } => self.rows(0).flat_map(|row| router::top_k(row, *k)).map(|id| id as f64).collect(),
            Op::RouterWeights(rule) => {
                let rule = params(rule);
                self.rows(0)
                    .zip(self.rows(1))
                    .flat_map(|(scores, ids)| router::weights(scores, &usizes(ids), &rule))
                    .collect()
            }
            Op::ExpertLinear { weight } => {
                let each = |x: &[f64], expert| ops::linear(x, &self.expert_weight(*weight, expert), None, x.len());
                self.for_chosen(self.inputs[0], each)
            }
            Op::ExpertGateUp { gate, up, norm } => {
                let each = |x: &[f64], expert| {
                    let product = |weight| ops::linear(x, &self.expert_weight(weight, expert), None, x.len());
                    ops::swiglu(&product(*gate), &product(*up))
                };
                self.for_chosen(&self.prologue(norm.as_ref()), each)
            }
            Op::WeightedSum => self.weighted(self.inputs[0], self.inputs[1]),
            Op::ExpertDown { weight } => {
                let each = |y: &[f64], expert| ops::linear(y, &self.expert_weight(*weight, expert), None, y.len());
                let products = self.for_chosen(self.inputs[0], each);
                ops::add(self.inputs[3], &self.weighted(&products, self.inputs[2]))
            }
            other => panic!("no rule to run {}", other.name()),
        }
    }

    fn router(&self, logits: &[f64], rule: &RouterRule, bias: Option<WeightId>, shared: usize) -> Vec<Vec<f64>> {
        let bias = bias.map(|bias| self.weight(bias));
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for logits in logits.chunks_exact(rule.experts) {
            let route = router::route(logits, bias, &params(rule));
            ids.extend(route.ids.iter().map(|&id| id as f64));
            ids.extend((0..shared).map(|expert| (rule.experts + expert) as f64));
            weights.extend(route.weights);
            weights.extend(vec![1.0; shared]);
        }
        vec![ids, weights]
    }

    /// Applies `each` to x and the number of each chosen expert, of the second input; x has one row for a token or one
    /// for each of its experts.
    fn for_chosen(&self, x: &[f64], each: impl Fn(&[f64], usize) -> Vec<f64>) -> Vec<f64> {
        let (shape, k) = (&self.types[0].shape, self.width(1));
        let len = *shape.last().expect("rows of x");
        let row = |at: usize| if shape.len() == 1 { at / k } else { at };
        let chosen = self.inputs[1].iter().enumerate();
        chosen.flat_map(|(at, &expert)| each(&x[row(at) * len..][..len], expert as usize)).collect()
    }

    /// Sums of rows of y, one for each weight, to one row a token.
    fn weighted(&self, y: &[f64], weights: &[f64]) -> Vec<f64> {
        let len = self.node.outputs[0].row_len();
        let mut sums = vec![0.0; self.batch.tokens.len() * len];
        let k = weights.len() / self.batch.tokens.len();
        for (at, (row, &weight)) in y.chunks_exact(len).zip(weights).enumerate() {
            ops::add_scaled(&mut sums[at / k * len..][..len], weight, row);
        }
        sums
    }

    /// The last `rope` numbers of each head rotated by the position of its row.
    fn rotated(&self, x: &[f64], head_dim: usize, rope: usize) -> Vec<f64> {
        let mut out = x.to_vec();
        let config = &self.session.model.config.rope;
        let width = x.len() / self.batch.positions.len();
        for (row, &position) in out.chunks_exact_mut(width).zip(&self.batch.positions) {
            let (cos, sin) = config.cos_sin(position);
            for head in row.chunks_exact_mut(head_dim) {
                ops::rotate(&mut head[head_dim - rope..], &cos, &sin, config.interleave);
            }
        }
        out
    }

    fn latent_row(&mut self, kv: &[f64], layer: usize, norm: &Norm, mla: &Mla) -> Vec<f64> {
        let (latent, key) = ops::split_rows(kv, mla.rank + mla.rope, mla.rank);
        let latent = self.norm(&latent, norm);
        let key = self.rotated(&key, mla.rope, mla.rope);
        self.write(layer, &latent, &key)
    }

    fn write(&mut self, layer: usize, latent: &[f64], key: &[f64]) -> Vec<f64> {
        let rows = self.batch.positions.len();
        let cache = self.session.caches.entry(layer).or_default();
        cache.latents.extend(latent);
        cache.keys.extend(key);
        cache.positions.extend(&self.batch.positions);
        ops::concat_rows(latent, latent.len() / rows, key, key.len() / rows)
    }

    fn cache(&self, layer: usize) -> LatentRows<'_> {
        let rows = &self.session.caches[&layer];
        LatentRows { c: &rows.latents, k_rope: &rows.keys, positions: &rows.positions }
    }

    fn prologue(&self, norm: Option<&Norm>) -> Vec<f64> {
        norm.map_or_else(|| self.inputs[0].to_vec(), |norm| self.norm(self.inputs[0], norm))
    }

    fn norm(&self, x: &[f64], norm: &Norm) -> Vec<f64> {
        ops::rms_norm(x, self.weight(norm.weight), norm.eps)
    }

    fn weight(&self, id: WeightId) -> &[f64] {
        let weight = &self.graph.weights[id];
        assert_eq!(weight.experts, None, "{}", weight.name);
        self.tensor(&weight.name, &weight.shape)
    }

    /// The matrix of an expert; shared ones are the last.
    fn expert_weight(&self, id: WeightId, expert: usize) -> Cow<'_, [f64]> {
        let weight = &self.graph.weights[id];
        let &[rows, columns] = &weight.shape[..] else { panic!("{} is no matrix", weight.name) };
        let routed = weight.experts.expect("one matrix for each expert");
        if expert < routed {
            return Cow::Borrowed(self.tensor(&weight.name.replace('*', &expert.to_string()), &weight.shape));
        }
        let (shared, nth) = (weight.shared.as_ref().expect("shared experts"), expert - routed);
        assert!(nth < shared.count, "expert {expert} of {}", weight.name);
        if shared.by_columns {
            let all = self.tensor(&shared.name, &[rows, shared.count * columns]);
            let row = |row: &[f64]| row[nth * columns..(nth + 1) * columns].to_vec();
            Cow::Owned(all.chunks_exact(shared.count * columns).flat_map(row).collect())
        } else {
            let all = self.tensor(&shared.name, &[shared.count * rows, columns]);
            Cow::Borrowed(&all[nth * rows * columns..(nth + 1) * rows * columns])
        }
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> &[f64] {
        let weights: &Weights = &self.session.model.weights;
        let tensor = weights.need(name);
        assert_eq!(tensor.shape, shape, "{name}");
        &tensor.data
    }

    /// Numbers in a row of an input.
    fn width(&self, input: usize) -> usize {
        self.types[input].row_len()
    }

    fn rows(&self, input: usize) -> impl Iterator<Item = &[f64]> {
        self.inputs[input].chunks_exact(self.width(input))
    }
}

fn usizes(ids: &[f64]) -> Vec<usize> {
    ids.iter().map(|&id| id as usize).collect()
}

fn dims(mla: &Mla) -> MlaDims {
    let Mla { heads, nope, rope, v, rank, softmax_scale } = *mla;
    MlaDims { heads, nope, rope, value: v, latent: rank, scale: softmax_scale }
}

fn oracle_scoring(scoring: Scoring) -> router::Scoring {
    match scoring {
        Scoring::Softmax => router::Scoring::Softmax,
        Scoring::Sigmoid => router::Scoring::Sigmoid,
    }
}

fn params(rule: &RouterRule) -> RouterParams {
    RouterParams {
        scoring: oracle_scoring(rule.scoring),
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
    }
}
