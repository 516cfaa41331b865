//! `Add(x, Linear y)` → `Linear(y, x)`: the residual is added where the product is computed.

use super::{each_node, private, replace};
use crate::graph::{Graph, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (Op::Add, &[left, right]) = (&node.op, &node.inputs[..]) else { return None };
    [(left, right), (right, left)].into_iter().find_map(|(residual, product)| fuse(graph, id, residual, product))
}

fn fuse(graph: &mut Graph, id: NodeId, residual: Value, product: Value) -> Option<()> {
    let linear = private(graph, product)?;
    let (op @ Op::Linear { .. }, &[y]) = (&linear.op, &linear.inputs[..]) else { return None };
    let (op, label) = (op.clone(), linear.label.clone());
    replace(graph, id, op, vec![y, residual], label);
    Some(())
}
