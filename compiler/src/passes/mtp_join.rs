//! `Concat(RmsNorm e, RmsNorm h)` → `MtpJoin(e, h)`, the input of a module of multi-token prediction (spec §7).

use super::{each_node, private, replace};
use crate::graph::{Graph, NodeId, Op};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (Op::Concat, &[left, right]) = (&node.op, &node.inputs[..]) else { return None };
    let (e, h) = (private(graph, left)?, private(graph, right)?);
    let (&Op::RmsNorm(enorm), &Op::RmsNorm(hnorm)) = (&e.op, &h.op) else { return None };
    let (inputs, label) = (vec![e.inputs[0], h.inputs[0]], node.label.clone());
    replace(graph, id, Op::MtpJoin { enorm, hnorm }, inputs, label);
    Some(())
}
