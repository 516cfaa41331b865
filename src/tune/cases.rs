//! What is measured: the products and attentions of a model that a profile has a say in, each kind once.

use std::collections::{BTreeMap, BTreeSet};

use moewe_compiler::error::Result;
use moewe_compiler::graph::{Graph, Node, NodeId, Op, Rows};
use moewe_compiler::lower::Bench;
use moewe_compiler::profile::Profile;

/// The batches that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Tokens of a part of a prompt.
    pub prompt: usize,
    /// Positions that the token of a decode step attends to, its own among them.
    pub context: usize,
}

/// Operations that run one after the other, and how often a model has them.
#[derive(Clone, Debug)]
pub struct Case {
    /// What they do, in a word.
    pub name: &'static str,
    /// Their shape, in words.
    pub shape: String,
    /// The operations, in running order.
    pub nodes: Vec<NodeId>,
    /// How many of the first of them only prepare what the others read, and are not timed.
    pub prepared: usize,
    /// Tokens of the batch.
    pub tokens: usize,
    /// How often the model has them.
    pub count: usize,
    /// The kernels that the profile which is to be tuned gives them.
    pub kernels: BTreeSet<String>,
}

impl Case {
    /// How much its time counts: as many tokens of prompts as generated ones are taken to pass.
    pub fn weight(&self) -> f64 {
        self.count as f64 / self.tokens as f64
    }
}

/// The cases of a model.
///
/// # Errors
/// A checkpoint or profile that the model cannot be compiled from.
pub fn cases(bench: &Bench, start: &Profile, load: Load) -> Result<Vec<Case>> {
    let graph = bench.graph();
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    let mut cases: Vec<Case> = Vec::new();
    let kinds = bench.kinds()?;
    for (id, node) in graph.nodes.iter().enumerate() {
        for tokens in [1, load.prompt] {
            let Some((name, nodes, prepared)) = group(graph, id, tokens > 1) else { continue };
            let key: Vec<&str> = nodes.iter().map(|&node| kinds[node].as_str()).collect();
            let key = format!("{tokens} {name} {}", key.join(", "));
            if let Some(&at) = found.get(&key) {
                cases[at].count += 1;
                continue;
            }
            let lowered = bench.lower(start, tokens == 1, &nodes)?;
            let timed = lowered.steps.iter().filter(|(node, _)| nodes[prepared..].contains(node));
            let kernels = timed.map(|(_, step)| skeleton(&lowered.kernels[step.kernel as usize].name)).collect();
            found.insert(key, cases.len());
            let shape = shape(graph, node, load, tokens);
            cases.push(Case { name, shape, nodes, prepared, tokens, count: 1, kernels });
        }
    }
    Ok(cases)
}

/// The skeleton that a kernel is a variant of.
pub(super) fn skeleton(kernel: &str) -> String {
    kernel.split("__").next().and_then(|name| name.split('.').next()).unwrap_or_default().to_owned()
}

/// The operations that are measured together with the last of them, `id`, and how many of them only prepare.
fn group(graph: &Graph, id: NodeId, many: bool) -> Option<(&'static str, Vec<NodeId>, usize)> {
    let node = &graph.nodes[id];
    // Rows whose logits are wanted are few, whatever the batch; one is measured with a token.
    if many && node.outputs.first().is_some_and(|ty| ty.rows == Rows::Wanted) {
        return None;
    }
    let before = node.inputs.first().map(|input| input.node);
    match node.op {
        Op::Linear { .. } => Some(("product", vec![id], 0)),
        Op::LinearPair { .. } => Some(("two products", vec![id], 0)),
        Op::GateUp { .. } => Some(("gated product", vec![id], 0)),
        Op::RouterProduct { .. } => Some(("router", vec![id], 0)),
        Op::ExpertGateUp { .. } if !many => Some(("experts, gate and up", vec![id], 0)),
        Op::ExpertDown { .. } if !many => Some(("experts, down", vec![id], 0)),
        // For many tokens the first half sorts them for the second.
        Op::ExpertDown { .. } => Some(("experts", vec![before?, id], 0)),
        Op::LatentAttention { .. } => Some(("attention", vec![id], 0)),
        Op::AbsorbOutput { .. } => Some(("values", vec![before?, id], 1)),
        _ => None,
    }
}

/// The shape of an operation, in words.
fn shape(graph: &Graph, node: &Node, load: Load, tokens: usize) -> String {
    let length = |value| graph.ty(value).row_len();
    let of = |weight: usize| graph.weights[weight].shape.clone();
    match &node.op {
        Op::ExpertGateUp { gate, .. } | Op::ExpertDown { weight: gate } => {
            let (shape, k) = (of(*gate), length(node.inputs[1]));
            let all = graph.weights[*gate].experts.unwrap_or(0);
            format!("{} → {}, {k} of {all}", shape[1], shape[0])
        }
        Op::LatentAttention { mla, .. } => {
            let context = if tokens == 1 { load.context } else { tokens };
            format!("{} heads, {} + {}, context {context}", mla.heads, mla.rank, mla.rope)
        }
        Op::AbsorbOutput { mla, .. } => format!("{} heads, {} → {}", mla.heads, mla.rank, mla.v),
        Op::GateUp { .. } => format!("{} → 2 · {}", length(node.inputs[0]), node.outputs[0].row_len()),
        Op::LinearPair { .. } => {
            let [first, second] = [0, 1].map(|output| node.outputs[output].row_len());
            format!("{} → {first} + {second}", length(node.inputs[0]))
        }
        Op::RouterProduct { rule, .. } => format!("{} → {}", length(node.inputs[0]), rule.experts),
        _ => format!("{} → {}", length(node.inputs[0]), node.outputs[0].row_len()),
    }
}
