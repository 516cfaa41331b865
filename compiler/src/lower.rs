//! From a fused graph to the steps of a program: one kernel for each operation, one dispatch for each shard of its weights.

mod alone;
mod attention;
mod experts;
mod prefill;
mod router;

use std::collections::HashMap;

use moewe_plan::{
    Access, Binding, Cost, DRAFT_WORDS, DType, Dim, FINISHED_STEPS, Kernel, LOGPROB_WORDS, MAX_DRAFT_MODULES,
    Parameter, ParameterKind, Role, Step, Symbol, TapSpec, When,
};
use moewe_shaders::{Linked, Variant, link};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::graph::{Asked, Graph, Node, NodeId, Norm, Op, Rows, Value, WeightId};
use crate::memory::{Buffers, assign, symbol};
use crate::pack::{Matrix, Packer};
use crate::select::{self, MAX_ROWS, Selector, Tiled, WORKGROUP};
use router::Routed;

pub use alone::{Bench, Lowered, Tensor};

/// Name of the RoPE table among the weights.
const ANGLES: &str = "moewe.rope_angles";

/// The kernels of a plan, each variant once.
#[derive(Debug, Default)]
pub struct Kernels {
    /// As in the plan.
    pub list: Vec<Kernel>,
    /// What each was linked to.
    pub linked: Vec<Linked>,
    by_name: HashMap<String, u32>,
}

impl Kernels {
    fn get(&mut self, variant: &Variant, why: &str) -> Result<u32> {
        let name = variant.name();
        if let Some(&index) = self.by_name.get(&name) {
            return Ok(index);
        }
        let linked = link(variant).map_err(|error| Error::Kernel { detail: error.to_string() })?;
        let index = self.list.len() as u32;
        self.list.push(Kernel {
            file: format!("kernels/{name}.wgsl"),
            workgroup_size: linked.workgroup_size,
            bindings: linked.bindings.clone(),
            why: why.to_owned(),
            name: name.clone(),
        });
        self.linked.push(linked);
        self.by_name.insert(name, index);
        Ok(index)
    }
}

/// What the programs of a plan share while they are lowered.
#[derive(Debug)]
pub struct Shared<'a> {
    /// Weights.
    pub packer: Packer<'a>,
    /// Kernels.
    pub kernels: Kernels,
    /// Buffers.
    pub buffers: Buffers,
    /// Parameters.
    pub parameters: Vec<Parameter>,
}

/// What a binding of a kernel is to be.
#[derive(Clone, Copy, Debug)]
enum Slot {
    Value(Value),
    Weight(u32, u32),
    Buffer(u32),
    Params,
}

/// Lowers one graph.
struct Lowering<'a, 'b> {
    config: &'a Config,
    graph: &'a Graph,
    selector: Selector<'a>,
    /// Position of the first row of this program's latent caches.
    first_position: usize,
    shared: &'a mut Shared<'b>,
    values: HashMap<Value, u32>,
    steps: Vec<Step>,
    /// Slots that were sorted by expert last.
    sorted: Option<prefill::Sorted>,
}

/// Steps and taps of a graph. `program` names the buffers of its tapped values; positions of its rows start at
/// `first_position`.
pub fn lower(
    config: &Config,
    graph: &Graph,
    selector: Selector,
    program: &str,
    first_position: usize,
    shared: &mut Shared,
) -> Result<(Vec<Step>, Vec<TapSpec>)> {
    let values = assign(graph, program, &mut shared.buffers);
    let (only_for, when) = (graph.only_for(), graph.when());
    let mut lowering =
        Lowering { config, graph, selector, first_position, shared, values, steps: Vec::new(), sorted: None };
    for id in 0..graph.nodes.len() {
        let first = lowering.steps.len();
        lowering.node(id)?;
        for step in &mut lowering.steps[first..] {
            step.only_for = only_for[id].iter().map(|&tap| tap as u32).collect();
            step.when = when[id];
        }
    }
    let taps = graph.taps.iter().map(|tap| {
        let ty = graph.ty(tap.value);
        TapSpec {
            name: tap.name.clone(),
            group: tap.group,
            layer: tap.layer.map(|layer| layer as u32),
            buffer: lowering.values[&tap.value],
            rows: Dim::Symbol(symbol(ty.rows)),
            stride: ty.row_len() as u32,
            offset: tap.offset as u32,
            columns: tap.columns as u32,
        }
    });
    let taps = taps.collect();
    Ok((lowering.steps, taps))
}

impl Lowering<'_, '_> {
    fn role(&mut self, role: Role) -> Slot {
        let config = self.config;
        let token_bits = Dim::Times(Symbol::Sequences, config.vocab_size.div_ceil(32) as u64);
        let (name, dtype, elements) = match role {
            Role::Header => ("batch.header", DType::U32, Dim::Const(8)),
            Role::Tokens => ("batch.tokens", DType::U32, Dim::Times(Symbol::Tokens, 4)),
            Role::Rows => ("batch.rows", DType::U32, Dim::Symbol(Symbol::Rows)),
            Role::PageTable => {
                let pages = select::max_pages(config.max_position_embeddings) as u64;
                ("batch.pages", DType::U32, Dim::Times(Symbol::Sequences, pages))
            }
            Role::Sampling => ("batch.sampling", DType::U32, Dim::Times(Symbol::Sequences, 8)),
            Role::Seen => ("batch.seen", DType::U32, token_bits),
            Role::Mask => ("batch.mask", DType::U32, token_bits),
            Role::Bias => ("batch.bias", DType::F32, Dim::Times(Symbol::Sequences, config.vocab_size as u64)),
            Role::Finished => {
                ("batch.finished", DType::U32, Dim::Const(1 + u64::from(FINISHED_STEPS) * MAX_ROWS as u64))
            }
            Role::Logprobs => {
                let row = u64::from(FINISHED_STEPS * LOGPROB_WORDS);
                ("batch.logprobs", DType::U32, Dim::Const(row * MAX_ROWS as u64))
            }
            Role::Groups => ("batch.groups", DType::U32, Dim::Const(8 * MAX_ROWS as u64)),
            Role::Drafts => ("batch.drafts", DType::U32, Dim::Const(u64::from(DRAFT_WORDS) * MAX_ROWS as u64)),
            Role::Holes => ("batch.holes", DType::U32, Dim::Times(Symbol::Sequences, 2)),
            Role::Scratch | Role::State | Role::Cache | Role::Parameter => unreachable!("named by what they hold"),
        };
        Slot::Buffer(self.shared.buffers.get(name, dtype, elements, role))
    }

    fn cache(&mut self, layer: usize) -> Slot {
        let latent = self.selector.latent();
        let words = latent.words(self.config.kv_lora_rank as u64, self.config.qk_rope_head_dim as u64)
            * u64::from(moewe_plan::PAGE_TOKENS);
        let name = format!("cache.{}.{layer}", self.selector.precision.name());
        Slot::Buffer(self.shared.buffers.get(&name, DType::U32, Dim::Times(Symbol::Pages, words), Role::Cache))
    }

    /// The buffer of a parameter of the node's layer.
    fn parameter(&mut self, node: &Node, kind: ParameterKind, len: usize) -> Result<Slot> {
        let layer = node.layer.ok_or_else(|| Error::Kernel { detail: format!("{} is in no layer", node.label) })?;
        let name = match kind {
            ParameterKind::ExpertOffset => "expert_offset",
            ParameterKind::ExpertScale => "expert_scale",
            ParameterKind::LatentScale => "latent_scale",
            ParameterKind::HeadScale => "head_scale",
        };
        let name = format!("parameter.{layer}.{name}");
        let buffer = self.shared.buffers.get(&name, DType::F32, Dim::Const(len as u64), Role::Parameter);
        if !self.shared.parameters.iter().any(|parameter| parameter.buffer == buffer) {
            let parameter = Parameter { kind, layer: layer as u32, buffer, len: len as u32 };
            self.shared.parameters.push(parameter);
        }
        Ok(Slot::Buffer(buffer))
    }

    /// Table of RoPE angles (see shaders/wesl/rope.wesl for the layout).
    fn angles(&mut self) -> Result<Slot> {
        let (rope, positions) =
            (&self.config.rope, self.config.max_position_embeddings + self.config.num_nextn_predict_layers);
        let index = self.shared.packer.generated(ANGLES, || {
            let (theta, factor) = (rope.inv_freq(), rope.cos_sin_factor());
            let fine = (0..256).map(|position| (f64::from(position), factor));
            let coarse = (0..positions.div_ceil(256)).map(|block| (block as f64 * 256.0, 1.0));
            fine.chain(coarse)
                .flat_map(|(position, factor)| {
                    theta.iter().flat_map(move |theta| {
                        let (sin, cos) = (position * theta).sin_cos();
                        [(cos * factor) as f32, (sin * factor) as f32]
                    })
                })
                .collect()
        })?;
        Ok(Slot::Weight(index, 0))
    }

    fn matrix(&mut self, weight: WeightId, granule: usize) -> Result<Matrix> {
        self.shared.packer.matrix(&self.graph.weights[weight], granule as u64)
    }

    fn vector(&mut self, weight: WeightId) -> Result<Slot> {
        Ok(Slot::Weight(self.shared.packer.vector(&self.graph.weights[weight])?, 0))
    }

    fn norm(&mut self, norm: Option<Norm>, slots: &mut Vec<(&'static str, Slot)>) -> Result<Option<f64>> {
        if let Some(norm) = norm {
            slots.push(("norm", self.vector(norm.weight)?));
        }
        Ok(norm.map(|norm| norm.eps))
    }

    /// Length of a row of a value.
    fn len(&self, value: Value) -> usize {
        self.graph.ty(value).row_len()
    }

    fn emit(
        &mut self,
        node: &Node,
        variant: &Variant,
        slots: &[(&'static str, Slot)],
        grid: [Dim; 3],
        params: [u32; 4],
        cost: Cost,
    ) -> Result<()> {
        let why = self.selector.why(variant.kernel);
        let kernel = self.shared.kernels.get(variant, &why)?;
        let bindings = self.shared.kernels.list[kernel as usize].bindings.iter().map(|layout| {
            let slot = slots.iter().find(|(name, _)| *name == layout.name).map(|(_, slot)| *slot);
            match slot {
                Some(Slot::Value(value)) => Ok(Binding::Buffer(self.values[&value])),
                Some(Slot::Weight(weight, shard)) => Ok(Binding::Weight { weight, shard }),
                Some(Slot::Buffer(buffer)) => Ok(Binding::Buffer(buffer)),
                Some(Slot::Params) => Ok(Binding::Params),
                None => Err(Error::Kernel { detail: format!("{}: nothing bound to {}", variant.name(), layout.name) }),
            }
        });
        let bindings = bindings.collect::<Result<_>>()?;
        let layer = node.layer.map(|layer| layer as u32);
        self.steps.push(Step {
            label: node.label.clone(),
            layer,
            kernel,
            bindings,
            grid,
            params,
            cost,
            indirect: None,
            only_for: Vec::new(),
            when: When::Always,
        });
        Ok(())
    }

    fn node(&mut self, id: NodeId) -> Result<()> {
        let graph = self.graph;
        let node = &graph.nodes[id];
        let out = |output| Value { node: id, output };
        match &node.op {
            Op::Embed { weight } => self.embed(node, *weight, out(0)),
            Op::ReadState { .. } | Op::WriteState { .. } => Ok(()), // the value lives in the state's buffer
            Op::RmsNorm(norm) => self.rms_norm(node, *norm, out(0)),
            Op::Linear { weight, bias, norm } => self.linear(node, *weight, *bias, *norm, out(0)),
            Op::LinearPair { first, second, norm } => {
                self.linear_pair(node, [*first, *second], *norm, [out(0), out(1)])
            }
            Op::GateUp { gate, up, norm } => self.gate_up(node, *gate, *up, *norm, out(0)),
            Op::GatherRows => self.gather_rows(node, out(0)),
            Op::Sample => self.sample(node, out(0)),
            Op::Logprobs => self.logprobs(node),
            Op::Accept => self.accept(node),
            Op::Propose => self.propose(node),
            Op::TopTokens(asked) => self.top_tokens(node, *asked, id),
            Op::LatentWrite { layer, norm, mla } => self.latent_write(node, node.inputs[0], *layer, *norm, mla, out(0)),
            Op::AbsorbQuery { kv_b, mla, rotate: true } => self.absorb_query(node, node.inputs[0], *kv_b, mla, out(0)),
            Op::AbsorbWrite { kv_b, layer, norm, mla } => {
                self.absorb_write(node, *kv_b, *layer, *norm, mla, [out(0), out(1)])
            }
            Op::LatentAttention { layer, mla } => self.latent_attention(node, *layer, mla, out(0)),
            Op::AbsorbOutput { kv_b, mla } => self.absorb_output(node, *kv_b, mla, out(0)),
            Op::Router { rule, bias, shared } => {
                let routed = Routed { rule, bias: *bias, shared: *shared };
                self.router(node, node.inputs[0], routed, [out(0), out(1)])
            }
            Op::RouterProduct { weight, norm, rule, bias, shared } => {
                let routed = Routed { rule, bias: *bias, shared: *shared };
                self.router_product(node, *weight, *norm, routed, [out(0), out(1), out(2)])
            }
            Op::ExpertGateUp { gate, up, norm } => self.experts_gate_up(node, *gate, *up, *norm, out(0)),
            Op::ExpertDown { weight } => self.experts_down(node, *weight, out(0)),
            Op::MtpJoin { enorm, hnorm } => {
                let n = self.len(node.inputs[0]);
                let slots = [
                    ("e", Slot::Value(node.inputs[0])),
                    ("h", Slot::Value(node.inputs[1])),
                    ("enorm", self.vector(enorm.weight)?),
                    ("hnorm", self.vector(hnorm.weight)?),
                    ("y", Slot::Value(out(0))),
                ];
                let cost = Cost { token_bytes: 16 * n as u64, ..Cost::default() };
                let grid = [Dim::Symbol(Symbol::Tokens), Dim::Const(2), ONE];
                self.emit(node, &select::mtp_join(n, enorm.eps), &slots, grid, [0; 4], cost)
            }
            other => Err(Error::Kernel { detail: format!("{}: no kernel for {}", node.label, other.name()) }),
        }
    }

    fn embed(&mut self, node: &Node, weight: WeightId, y: Value) -> Result<()> {
        let matrix = self.matrix(weight, 1)?;
        let d = self.len(y);
        let variant = self.selector.embed(matrix.stored, d);
        for (shard, &(first, count)) in matrix.shards.iter().enumerate() {
            let mut slots = vec![
                ("part", Slot::Params),
                ("tokens", self.role(Role::Tokens)),
                ("w", Slot::Weight(matrix.weight, shard as u32)),
                ("y", Slot::Value(y)),
            ];
            slots.extend(matrix.scales.map(|scales| ("w_scale", Slot::Weight(scales, 0))));
            let grid = [Dim::Const(d.div_ceil(4).div_ceil(WORKGROUP) as u64), Dim::Symbol(Symbol::Tokens), ONE];
            let cost =
                Cost { token_bytes: (matrix.row_bytes + 4 * d as u64) / matrix.shards.len() as u64, ..Cost::default() };
            self.emit(node, &variant, &slots, grid, [first as u32, count as u32, 0, 0], cost)?;
        }
        Ok(())
    }

    fn rms_norm(&mut self, node: &Node, norm: Norm, y: Value) -> Result<()> {
        let n = self.len(y);
        let slots = [("x", Slot::Value(node.inputs[0])), ("norm", self.vector(norm.weight)?), ("y", Slot::Value(y))];
        let rows = Dim::Symbol(symbol(self.graph.ty(y).rows));
        let cost = Cost { token_bytes: 8 * n as u64, ..Cost::default() };
        self.emit(node, &select::rms_norm(n, norm.eps), &slots, [rows, ONE, ONE], [0; 4], cost)
    }

    fn linear(
        &mut self,
        node: &Node,
        weight: WeightId,
        bias: Option<WeightId>,
        norm: Option<Norm>,
        y: Value,
    ) -> Result<()> {
        let (x, residual) = (node.inputs[0], node.inputs.get(1).copied());
        let mut slots = vec![("x", Slot::Value(x)), ("y", Slot::Value(y))];
        let eps = self.norm(norm, &mut slots)?;
        if let Some(bias) = bias {
            slots.push(("bias", self.vector(bias)?));
        }
        slots.extend(residual.map(|residual| ("residual", Slot::Value(residual))));
        let matrix = self.matrix(weight, 1)?;
        let flags = [("bias", bias.is_some()), ("residual", residual.is_some())];
        self.matrix_steps(node, &flags, eps, &slots, &[("w", "w_scale", &matrix)], x, y)
    }

    fn gate_up(&mut self, node: &Node, gate: WeightId, up: WeightId, norm: Option<Norm>, y: Value) -> Result<()> {
        let x = node.inputs[0];
        let mut slots = vec![("x", Slot::Value(x)), ("y", Slot::Value(y))];
        let eps = self.norm(norm, &mut slots)?;
        let (gate, up) = (self.matrix(gate, 1)?, self.matrix(up, 1)?);
        self.same_format(node, &gate, &up)?;
        let matrices = [("w", "w_scale", &gate), ("u", "u_scale", &up)];
        self.matrix_steps(node, &[("gated", true)], eps, &slots, &matrices, x, y)
    }

    /// One step for both products where a kernel can bind all they need, else one for each.
    fn linear_pair(&mut self, node: &Node, weights: [WeightId; 2], norm: Option<Norm>, y: [Value; 2]) -> Result<()> {
        let x = node.inputs[0];
        let matrices = [self.matrix(weights[0], 1)?, self.matrix(weights[1], 1)?];
        let [first, second] = &matrices;
        let (k, n) = (self.len(x), y.map(|y| self.len(y)));
        let mut slots = vec![("x", Slot::Value(x)), ("y", Slot::Value(y[0]))];
        let eps = self.norm(norm, &mut slots)?;
        let alike = match (first.stored.scales, second.stored.scales) {
            (Some(first), Some(second)) => first.block == second.block,
            (first, second) => first.is_none() && second.is_none(),
        };
        let whole = matrices.iter().all(|matrix| matrix.shards.len() == 1);
        // In tiles, each product has enough to do by itself.
        let tiled = self.selector.gemm(self.graph.ty(x).rows, first.stored, n[0], k, &[], eps).is_some();
        let variant = self.selector.linear_pair(first.stored, n, k, eps);
        if tiled || first.stored.format != second.stored.format || !alike || !whole || !self.fits(&variant)? {
            for (weight, y) in weights.into_iter().zip(y) {
                self.linear(node, weight, None, norm, y)?;
            }
            return Ok(());
        }
        slots.extend([
            ("batch", self.role(Role::Header)),
            ("part", Slot::Params),
            ("w", Slot::Weight(first.weight, 0)),
            ("v", Slot::Weight(second.weight, 0)),
            ("y2", Slot::Value(y[1])),
        ]);
        slots.extend(first.scales.map(|scales| ("w_scale", Slot::Weight(scales, 0))));
        slots.extend(second.scales.map(|scales| ("v_scale", Slot::Weight(scales, 0))));
        let rows = (n[0] + n[1]) as u64;
        let cost = Cost {
            fixed_bytes: n[0] as u64 * first.row_bytes + n[1] as u64 * second.row_bytes,
            token_bytes: 4 * (k as u64 + rows),
            token_flops: 2 * rows * k as u64,
            ..Cost::default()
        };
        let tile = self.selector.tile as u64;
        let grid = [
            Dim::Const(rows.div_ceil(self.selector.rows_per_workgroup("linear"))),
            Dim::CeilDiv(symbol(self.graph.ty(x).rows), tile),
            ONE,
        ];
        let over_rows = u32::from(self.graph.ty(x).rows == Rows::Wanted);
        self.emit(node, &variant, &slots, grid, [0, n[0] as u32, over_rows, 0], cost)
    }

    /// Whether a kernel binds no more storage buffers than the device has.
    fn fits(&mut self, variant: &Variant) -> Result<bool> {
        let bindings = link(variant).map_err(|error| Error::Kernel { detail: error.to_string() })?.bindings;
        let storage = bindings.iter().filter(|binding| binding.access != Access::Uniform).count();
        Ok(storage <= self.selector.profile.storage_buffers as usize)
    }

    fn same_format(&self, node: &Node, a: &Matrix, b: &Matrix) -> Result<()> {
        if a.stored == b.stored {
            return Ok(());
        }
        Err(Error::WrongTensor {
            path: self.shared.packer.checkpoint.dir().into(),
            tensor: format!("{}: up_proj", node.label),
            found: b.stored.format.name().into(),
            expected: format!("{}, like its gate_proj", a.stored.format.name()),
        })
    }

    /// The steps of a product, one for each shard of its matrices.
    #[expect(clippy::too_many_arguments, reason = "each product has its own of all of them")]
    fn matrix_steps(
        &mut self,
        node: &Node,
        flags: &[(&'static str, bool)],
        eps: Option<f64>,
        slots: &[(&'static str, Slot)],
        matrices: &[(&'static str, &'static str, &Matrix)],
        x: Value,
        y: Value,
    ) -> Result<()> {
        let rows = self.graph.ty(y).rows;
        let (stored, n, k) = (matrices[0].2.stored, self.len(y), self.len(x));
        let selector = self.selector.over(rows);
        let tiled = selector.gemm(rows, stored, n, k, flags, eps).unwrap_or_else(|| Tiled {
            variant: selector.linear(stored, n, k, flags, eps),
            rows: selector.rows_per_workgroup("linear"),
            tokens: selector.tile as u64,
        });
        let shards = matrices[0].2.shards.clone();
        for (shard, &(first, count)) in shards.iter().enumerate() {
            let mut slots = slots.to_vec();
            slots.push(("batch", self.role(Role::Header)));
            slots.push(("part", Slot::Params));
            let mut cost = Cost::default();
            for (name, scale_name, matrix) in matrices {
                slots.push((name, Slot::Weight(matrix.weight, shard as u32)));
                slots.extend(matrix.scales.map(|scales| (*scale_name, Slot::Weight(scales, 0))));
                cost.fixed_bytes += count * matrix.row_bytes;
                cost.token_flops += 2 * count * self.len(x) as u64;
            }
            cost.token_bytes = 4 * (self.len(x) as u64 + count * (node.inputs.len() as u64));
            let params = [first as u32, count as u32, u32::from(rows == Rows::Wanted), 0];
            self.emit(node, &tiled.variant, &slots, tiled.grid(count, rows), params, cost)?;
        }
        Ok(())
    }

    fn gather_rows(&mut self, node: &Node, y: Value) -> Result<()> {
        let n = self.len(y);
        let slots = [("x", Slot::Value(node.inputs[0])), ("rows", self.role(Role::Rows)), ("y", Slot::Value(y))];
        let grid = [Dim::Const(n.div_ceil(WORKGROUP) as u64), Dim::Symbol(Symbol::Rows), ONE];
        let cost = Cost { token_bytes: 8 * n as u64, ..Cost::default() };
        self.emit(node, &select::gather_rows(n), &slots, grid, [0; 4], cost)
    }

    fn sample(&mut self, node: &Node, sampled: Value) -> Result<()> {
        let vocab = self.len(node.inputs[0]);
        let slots = [
            ("logits", Slot::Value(node.inputs[0])),
            ("tokens", self.role(Role::Tokens)),
            ("rows", self.role(Role::Rows)),
            ("sampling", self.role(Role::Sampling)),
            ("seen", self.role(Role::Seen)),
            ("mask", self.role(Role::Mask)),
            ("bias", self.role(Role::Bias)),
            ("sampled", Slot::Value(sampled)),
        ];
        let cost = Cost { token_bytes: 4 * vocab as u64, ..Cost::default() };
        let grid = [Dim::Symbol(Symbol::Rows), ONE, ONE];
        self.emit(node, &select::sample(vocab, self.selector.profile), &slots, grid, [0; 4], cost)
    }

    fn logprobs(&mut self, node: &Node) -> Result<()> {
        let vocab = self.len(node.inputs[0]);
        let slots = [
            ("logits", Slot::Value(node.inputs[0])),
            ("sampled", Slot::Value(node.inputs[1])),
            ("finished", self.role(Role::Finished)),
            ("logprobs", self.role(Role::Logprobs)),
        ];
        let cost = Cost { token_bytes: 8 * vocab as u64 + 4 * u64::from(LOGPROB_WORDS), ..Cost::default() };
        let grid = [Dim::Symbol(Symbol::Rows), ONE, ONE];
        self.emit(node, &select::logprobs(vocab, self.selector.profile), &slots, grid, [0; 4], cost)
    }

    /// The bindings of both kernels that make the next batch of what was sampled.
    fn next_batch(&mut self, node: &Node) -> Vec<(&'static str, Slot)> {
        vec![
            ("batch", self.role(Role::Header)),
            ("groups", self.role(Role::Groups)),
            ("sampled", Slot::Value(node.inputs[0])),
            ("tokens", self.role(Role::Tokens)),
            ("rows", self.role(Role::Rows)),
            ("drafts", self.role(Role::Drafts)),
        ]
    }

    fn accept(&mut self, node: &Node) -> Result<()> {
        let mut slots = self.next_batch(node);
        slots.extend([("seen", self.role(Role::Seen)), ("finished", self.role(Role::Finished))]);
        let variant = select::accept(self.config.vocab_size, self.drafters());
        self.emit(node, &variant, &slots, [ONE; 3], [0; 4], Cost { token_bytes: 60, ..Cost::default() })
    }

    fn propose(&mut self, node: &Node) -> Result<()> {
        let slots = self.next_batch(node);
        let variant = select::propose(self.drafters());
        self.emit(node, &variant, &slots, [ONE; 3], [0; 4], Cost { token_bytes: 60, ..Cost::default() })
    }

    /// Modules of multi-token prediction that can draft.
    fn drafters(&self) -> usize {
        self.config.num_nextn_predict_layers.min(MAX_DRAFT_MODULES as usize)
    }

    fn top_tokens(&mut self, node: &Node, asked: Asked, id: NodeId) -> Result<()> {
        let logits = node.inputs[0];
        let out = |output| Slot::Value(Value { node: id, output });
        let mut slots = vec![("logits", Slot::Value(logits)), ("ids", out(0)), ("probs", out(1))];
        if asked != Asked::Nothing {
            slots.push(("stats", out(2)));
        }
        match asked {
            Asked::Nothing => {}
            Asked::Next => slots.extend([
                ("batch", self.role(Role::Header)),
                ("tokens", self.role(Role::Tokens)),
                ("rows", self.role(Role::Rows)),
                ("sampled", Slot::Value(node.inputs[1])),
            ]),
            Asked::Given => slots.push(("given", Slot::Value(node.inputs[1]))),
        }
        let vocab = self.len(logits);
        let cost = Cost { token_bytes: 8 * vocab as u64, ..Cost::default() };
        let grid = [Dim::Symbol(symbol(self.graph.ty(logits).rows)), ONE, ONE];
        self.emit(node, &select::top_tokens(vocab, asked, self.selector.profile), &slots, grid, [0; 4], cost)
    }
}

const ONE: Dim = Dim::Const(1);
