//! `AbsorbQuery(Rope q)` → `AbsorbQuery(q)` that rotates: the kernel has the rope part of each head in hand anyway.

use super::{each_node, private, replace};
use crate::graph::{Graph, NodeId, Op};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let Op::AbsorbQuery { kv_b, mla, rotate: false } = node.op else { return None };
    let rotated = private(graph, *node.inputs.first()?)?;
    if rotated.op != (Op::Rope { heads: mla.heads, head_dim: mla.nope + mla.rope, rope: mla.rope }) {
        return None;
    }
    let (query, label) = (rotated.inputs.clone(), node.label.clone());
    replace(graph, id, Op::AbsorbQuery { kv_b, mla, rotate: true }, query, label);
    Some(())
}
