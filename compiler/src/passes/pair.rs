//! Two `Linear`s of a layer with one input, normalised alike, → `LinearPair`: they need not wait for one another, and the input
//! is read by one dispatch. In this family that is `q_a` (or `q`) and `kv_a`.

use super::{each_node, redirect, replace};
use crate::graph::{Graph, Node, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let &Op::Linear { weight: first, bias: None, norm } = &node.op else { return None };
    node.layer?;
    let matches = |other: &Node| {
        other.layer == node.layer
            && node.inputs.len() == 1
            && other.inputs == node.inputs
            && matches!(other.op, Op::Linear { bias: None, norm: its, .. } if its == norm)
    };
    let other = (id + 1..graph.nodes.len()).find(|&other| matches(&graph.nodes[other]))?;
    let Op::Linear { weight: second, .. } = graph.nodes[other].op else { return None };
    let label = format!("{}_{}", node.label, graph.nodes[other].label.rsplit('.').next().unwrap_or_default());
    let inputs = node.inputs.clone();
    replace(graph, id, Op::LinearPair { first, second, norm }, inputs, label);
    redirect(graph, Value { node: other, output: 0 }, Value { node: id, output: 1 });
    Some(())
}
