//! `Add(residual, WeightedSum(ExpertLinear(y, ids), weights))` → `ExpertDown(y, ids, weights, residual)`: what each chosen
//! expert gives is added where it is computed.

use super::{each_node, private, replace};
use crate::graph::{Graph, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (Op::Add, &[left, right]) = (&node.op, &node.inputs[..]) else { return None };
    [(left, right), (right, left)].into_iter().find_map(|(residual, routed)| fuse(graph, id, residual, routed))
}

fn fuse(graph: &mut Graph, id: NodeId, residual: Value, routed: Value) -> Option<()> {
    let sum = private(graph, routed)?;
    let (Op::WeightedSum, &[each, weights]) = (&sum.op, &sum.inputs[..]) else { return None };
    let linear = private(graph, each)?;
    let (&Op::ExpertLinear { weight }, &[y, ids]) = (&linear.op, &linear.inputs[..]) else { return None };
    if graph.ty(y).shape.len() != 2 {
        return None;
    }
    let label = linear.label.clone();
    replace(graph, id, Op::ExpertDown { weight }, vec![y, ids, weights, residual], label);
    Some(())
}
