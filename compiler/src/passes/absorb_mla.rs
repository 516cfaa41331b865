//! Attention over expanded keys and values → the query through `W_UK`, attention over latents, the result through `W_UV`
//! (spec §5, naive → absorbed).
//!
//! The cache then holds `rank + rope` numbers for a token instead of `heads · (nope + rope + v)`, and no key or value is
//! ever expanded.

use super::{insert, redirect, replace, sibling};
use crate::graph::{Graph, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    let mut count = 0;
    // From the back, so that nodes not yet seen keep their ids.
    for id in (0..graph.nodes.len()).rev() {
        count += usize::from(rewrite(graph, id).is_some());
    }
    count
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let Op::Attention { layer, kv_b, mla } = node.op else { return None };
    let &[query, cache] = &node.inputs[..] else { return None };
    let label = node.label.clone();

    let absorb = Op::AbsorbQuery { kv_b, mla, rotate: false };
    let absorbed = insert(graph, id, absorb, vec![query], sibling(&label, "absorb_query"));
    let attend = Op::LatentAttention { layer, mla };
    let attended = insert(graph, id + 1, attend, vec![absorbed, cache], label.clone());
    redirect(graph, Value { node: id + 2, output: 1 }, absorbed);
    let output = Op::AbsorbOutput { kv_b, mla };
    replace(graph, id + 2, output, vec![attended], sibling(&label, "absorb_output"));
    Some(())
}
