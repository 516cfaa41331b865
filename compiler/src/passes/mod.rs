//! Rewrites of plain operations into fused ones: named, in order, each leaving a sound graph that computes the same.
//!
//! A rewrite never swallows a value that is tapped or that anything else reads.

mod absorb_mla;
mod absorb_write;
mod experts;
mod latent_write;
mod mtp_join;
mod norm;
mod pair;
mod residual;
mod rope_query;
mod router;
mod router_product;
mod shared_experts;
mod swiglu;

use crate::{
    graph::{Graph, GraphError, Node, NodeId, Op, Value},
    infer,
};

/// A rewrite of the whole graph.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Name of its file.
    pub name: &'static str,
    /// What it does, in a line.
    pub what: &'static str,
    /// Rewrites what it can and says how often it did. What it makes superfluous stays until [`Graph::sweep`].
    pub run: fn(&mut Graph) -> usize,
}

/// All passes, in the order in which they run.
pub const PASSES: &[Pass] = &[
    Pass {
        name: "absorb_mla",
        what: "attention over expanded keys and values becomes attention over latents",
        run: absorb_mla::run,
    },
    Pass {
        name: "latent_write",
        what: "norm of the latent, RoPE of the key and cache write become one",
        run: latent_write::run,
    },
    Pass { name: "rope_query", what: "RoPE of the query joins its absorption", run: rope_query::run },
    Pass { name: "swiglu", what: "gate, up, SiLU and product become one, with and without experts", run: swiglu::run },
    Pass { name: "router", what: "scores, bias, group limit, top-k and weights become one", run: router::run },
    Pass {
        name: "experts",
        what: "down projection of experts, weighted sum and residual become one",
        run: experts::run,
    },
    Pass { name: "mtp_join", what: "both norms and the joining of a draft module become one", run: mtp_join::run },
    Pass { name: "norm", what: "a norm moves into every matrix product that reads it", run: norm::run },
    Pass { name: "residual", what: "the sum after a matrix product moves into it", run: residual::run },
    Pass {
        name: "absorb_write",
        what: "absorption of the query and write of the latent become one",
        run: absorb_write::run,
    },
    Pass { name: "pair", what: "two products of one input become one", run: pair::run },
    Pass {
        name: "shared_experts",
        what: "shared experts become experts that are always chosen",
        run: shared_experts::run,
    },
    Pass { name: "router_product", what: "the router joins the product that it judges by", run: router_product::run },
];

/// A pass left an unsound graph: a bug of that pass.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("after pass {pass}: {error}")]
pub struct PassError {
    /// The pass.
    pub pass: &'static str,
    /// What is wrong with the graph.
    #[source]
    pub error: GraphError,
}

/// Runs one pass, removes what it made superfluous and checks the graph. Returns the number of rewrites.
pub fn run_one(pass: &Pass, graph: &mut Graph) -> Result<usize, PassError> {
    let count = (pass.run)(graph);
    graph.sweep();
    graph.verify().map_err(|error| PassError { pass: pass.name, error })?;
    Ok(count)
}

/// Runs all passes. Returns the name and the number of rewrites of each.
pub fn run_all(graph: &mut Graph) -> Result<Vec<(&'static str, usize)>, PassError> {
    PASSES.iter().map(|pass| Ok((pass.name, run_one(pass, graph)?))).collect()
}

/// Applies `rewrite` to the id of each node; it says whether it rewrote.
fn each_node(graph: &mut Graph, rewrite: impl Fn(&mut Graph, NodeId) -> Option<()>) -> usize {
    (0..graph.nodes.len()).filter(|&id| rewrite(graph, id).is_some()).count()
}

/// The node whose first output is `value`.
fn producer(graph: &Graph, value: Value) -> Option<&Node> {
    (value.output == 0).then(|| &graph.nodes[value.node])
}

/// The node whose first output is `value`, if nothing else reads or taps that.
fn private(graph: &Graph, value: Value) -> Option<&Node> {
    producer(graph, value).filter(|_| graph.is_private(value))
}

/// `label` with another last part: `layers.3.attention` → `layers.3.{part}`.
fn sibling(label: &str, part: &str) -> String {
    label.rsplit_once('.').map_or_else(|| part.to_owned(), |(stem, _)| format!("{stem}.{part}"))
}

/// Puts another operation in the place of a node; what read the node now reads that.
fn replace(graph: &mut Graph, id: NodeId, op: Op, inputs: Vec<Value>, label: String) {
    let outputs = types(graph, &op, &inputs, &label);
    let layer = graph.nodes[id].layer;
    graph.nodes[id] = Node { op, inputs, outputs, label, layer };
}

/// Puts a node before the node `id`, whose layer it gets; `id` and all after it move up by one. `inputs` come before `id`.
fn insert(graph: &mut Graph, id: NodeId, op: Op, inputs: Vec<Value>, label: String) -> Value {
    let outputs = types(graph, &op, &inputs, &label);
    let layer = graph.nodes[id].layer;
    let values = graph.nodes.iter_mut().flat_map(|n| &mut n.inputs).chain(graph.taps.iter_mut().map(|t| &mut t.value));
    for value in values.filter(|value| value.node >= id) {
        value.node += 1;
    }
    graph.nodes.insert(id, Node { op, inputs, outputs, label, layer });
    Value { node: id, output: 0 }
}

/// Makes everything that read or tapped `old` read or tap `new`, which must not come later.
fn redirect(graph: &mut Graph, old: Value, new: Value) {
    let values = graph.nodes.iter_mut().flat_map(|n| &mut n.inputs).chain(graph.taps.iter_mut().map(|t| &mut t.value));
    for value in values.filter(|value| **value == old) {
        *value = new;
    }
}

fn types(graph: &Graph, op: &Op, inputs: &[Value], label: &str) -> Vec<crate::graph::TensorType> {
    infer::output_types(graph, op, inputs)
        .unwrap_or_else(|what| panic!("{label}: a rewrite gave a wrong {}: {what}", op.name()))
}
