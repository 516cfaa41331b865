//! Operations of a model lowered alone, for measuring the kernels that a profile gives them.

use std::collections::HashMap;

use moewe_plan::{Buffer, Dim, Kernel, Precision, Role, Step, TapChoice, Weight};

use super::{Kernels, Lowering, Shared};
use crate::checkpoint::Checkpoint;
use crate::compile::requirements;
use crate::error::{Error, Result};
use crate::graph::{Graph, Node, NodeId, Op, Value, WeightId};
use crate::memory::{Buffers, symbol};
use crate::model::{Target, build};
use crate::pack::Packer;
use crate::profile::Profile;
use crate::select::{Scales, Selector};

/// The forward program of a model, from which operations are taken.
#[derive(Debug)]
pub struct Bench<'a> {
    packer: Packer<'a>,
    graph: Graph,
}

/// Steps that compute a few operations, with all that they need. Every value has a buffer of its own.
#[derive(Debug)]
pub struct Lowered {
    /// The steps, and of which operation each is.
    pub steps: Vec<(NodeId, Step)>,
    /// Kernels, by the steps' indices.
    pub kernels: Vec<Kernel>,
    /// Their WGSL.
    pub sources: Vec<String>,
    /// Buffers, by the steps' indices.
    pub buffers: Vec<Buffer>,
    /// Weights, by the steps' indices, cut as the profile wants it, without places in files.
    pub weights: Vec<Weight>,
    /// The buffers of values.
    pub values: HashMap<Value, u32>,
    /// The matrices and vectors of the checkpoint that are used, as indices of weights.
    pub tensors: HashMap<WeightId, Tensor>,
}

/// A tensor of the checkpoint among the weights.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// Its index.
    pub weight: u32,
    /// That of its scales, and their shape, if it has any.
    pub scales: Option<(u32, Scales)>,
}

impl<'a> Bench<'a> {
    /// From a checkpoint, which needs no weights.
    ///
    /// # Errors
    /// [`Error::Kernel`] if a pass fails, which is a bug of ours.
    pub fn new(checkpoint: &'a Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        let mut graph = build(config, Target::Forward, &TapChoice::none(), &|name| checkpoint.contains(name));
        crate::passes::run_all(&mut graph).map_err(|error| Error::Kernel { detail: error.to_string() })?;
        Ok(Self { packer: Packer::new(checkpoint, None, 0), graph })
    }

    /// All operations after the passes.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// For each operation, what others must have in common with it to be one for kernels: all but where they stand and which
    /// weights they have.
    ///
    /// # Errors
    /// A tensor that the checkpoint lacks, or has in a format that there are no kernels for.
    pub fn kinds(&self) -> Result<Vec<String>> {
        let mut packer = self.packer.anew(u64::MAX);
        let kind = |node: &Node| {
            let mut kind = format!("{} {:?}", node.op.name(), node.op.traits());
            for ty in node.inputs.iter().map(|&input| self.graph.ty(input)).chain(&node.outputs) {
                kind += &format!(" {ty}");
            }
            for weight in matrices(&node.op) {
                let weight = &self.graph.weights[weight];
                let stored = packer.matrix(weight, 1)?.stored;
                kind += &format!(" {:?} {:?} {stored:?}", weight.shape, weight.experts);
            }
            Ok(kind)
        };
        self.graph.nodes.iter().map(kind).collect()
    }

    /// Lowers operations, which stand in running order, for batches of `few` or of many tokens.
    ///
    /// # Errors
    /// A profile whose limits are too small for them.
    pub fn lower(&self, profile: &Profile, few: bool, nodes: &[NodeId]) -> Result<Lowered> {
        let tile = if few { 1 } else { profile.token_tile as usize };
        let fast_latents = moewe_plan::Latent::F16;
        let selector = Selector { profile, precision: Precision::Exact, fast_latents, tile, few };
        let packer = self.packer.anew(profile.max_binding_bytes);
        let mut shared =
            Shared { packer, kernels: Kernels::default(), buffers: Buffers::default(), parameters: Vec::new() };
        let mut values = HashMap::new();
        for &id in nodes {
            let node = &self.graph.nodes[id];
            let outputs = (0..node.outputs.len()).map(|output| Value { node: id, output });
            for value in node.inputs.iter().copied().chain(outputs) {
                let ty = self.graph.ty(value);
                let elements = Dim::Times(symbol(ty.rows), ty.row_len() as u64);
                values.insert(value, shared.buffers.get(&format!("value {value}"), ty.dtype, elements, Role::Scratch));
            }
        }
        let config = self.packer.checkpoint.config();
        let mut lowering = Lowering {
            config,
            graph: &self.graph,
            selector,
            first_position: 0,
            shared: &mut shared,
            values,
            steps: Vec::new(),
            sorted: None,
        };
        let mut of = Vec::new();
        for &id in nodes {
            lowering.node(id)?;
            of.resize(lowering.steps.len(), id);
        }
        let Lowering { steps, values, .. } = lowering;
        requirements(profile, &shared.kernels)?;
        let Shared { mut packer, kernels, buffers, .. } = shared;
        let mut tensors = HashMap::new();
        for &id in nodes {
            let op = &self.graph.nodes[id].op;
            for weight in matrices(op) {
                let matrix = packer.matrix(&self.graph.weights[weight], 1)?;
                let scales = matrix.scales.zip(matrix.stored.scales);
                tensors.insert(weight, Tensor { weight: matrix.weight, scales });
            }
            for weight in vectors(op) {
                let index = packer.vector(&self.graph.weights[weight])?;
                tensors.insert(weight, Tensor { weight: index, scales: None });
            }
        }
        Ok(Lowered {
            steps: of.into_iter().zip(steps).collect(),
            kernels: kernels.list,
            sources: kernels.linked.into_iter().map(|linked| linked.wgsl).collect(),
            buffers: buffers.list,
            weights: packer.items.into_iter().map(|item| item.weight).collect(),
            values,
            tensors,
        })
    }
}

/// The matrices of operations that multiply them.
fn matrices(op: &Op) -> Vec<WeightId> {
    match *op {
        Op::Linear { weight, .. } | Op::RouterProduct { weight, .. } | Op::ExpertDown { weight } => vec![weight],
        Op::LinearPair { first, second, .. } => vec![first, second],
        Op::GateUp { gate, up, .. } | Op::ExpertGateUp { gate, up, .. } => vec![gate, up],
        Op::AbsorbOutput { kv_b, .. } => vec![kv_b],
        _ => Vec::new(),
    }
}

/// The norms and biases of such operations.
fn vectors(op: &Op) -> Vec<WeightId> {
    let (norm, bias) = match *op {
        Op::Linear { norm, bias, .. } | Op::RouterProduct { norm, bias, .. } => (norm, bias),
        Op::LinearPair { norm, .. } | Op::GateUp { norm, .. } | Op::ExpertGateUp { norm, .. } => (norm, None),
        _ => (None, None),
    };
    norm.map(|norm| norm.weight).into_iter().chain(bias).collect()
}
