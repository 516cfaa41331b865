//! `AbsorbQuery` and `LatentWrite` of a layer → `AbsorbWrite`: neither needs the other, and attention needs both.

use super::{each_node, redirect, replace, sibling};
use crate::graph::{Graph, Node, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (&Op::LatentWrite { layer, norm, mla }, &[kv]) = (&node.op, &node.inputs[..]) else { return None };
    let absorbs = |other: &Node| other.layer == node.layer && matches!(other.op, Op::AbsorbQuery { rotate: true, .. });
    let other = graph.nodes.iter().position(absorbs)?;
    let (&Op::AbsorbQuery { kv_b, .. }, &[q]) = (&graph.nodes[other].op, &graph.nodes[other].inputs[..]) else {
        return None;
    };
    if q.node >= id || other < id {
        return None;
    }
    let label = sibling(&node.label, "absorb_write");
    replace(graph, id, Op::AbsorbWrite { kv_b, layer, norm, mla }, vec![q, kv], label);
    redirect(graph, Value { node: id, output: 0 }, Value { node: id, output: 1 });
    redirect(graph, Value { node: other, output: 0 }, Value { node: id, output: 0 });
    Some(())
}
