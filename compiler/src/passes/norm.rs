//! `RmsNorm` whose readers are all matrix products of it → each of them normalises its input itself.
//!
//! A norm that is tapped, or that something else reads too, stays for all of its readers: it has to be written anyway.

use super::each_node;
use crate::graph::{Graph, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (&Op::RmsNorm(norm), &[x]) = (&node.op, &node.inputs[..]) else { return None };
    let normed = Value { node: id, output: 0 };
    let readers: Vec<_> = graph.readers(normed).collect();
    let takes = |&(reader, at): &(NodeId, usize)| at == 0 && has_room(&graph.nodes[reader].op);
    if graph.is_tapped(normed) || readers.is_empty() || !readers.iter().all(takes) {
        return None;
    }
    for (reader, at) in readers {
        let reader = &mut graph.nodes[reader];
        reader.inputs[at] = x;
        if let Op::Linear { norm: room, .. } | Op::GateUp { norm: room, .. } | Op::ExpertGateUp { norm: room, .. } =
            &mut reader.op
        {
            *room = Some(norm);
        }
    }
    Some(())
}

/// Whether an operation can normalise its first input and does not yet.
fn has_room(op: &Op) -> bool {
    matches!(op, Op::Linear { norm: None, .. } | Op::GateUp { norm: None, .. } | Op::ExpertGateUp { norm: None, .. })
}
