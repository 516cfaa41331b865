//! `Mul(Silu(gate x), up x)` → `GateUp(x)`, and the same for chosen experts → `ExpertGateUp(x, ids)`: x is read once and
//! neither product is written.

use super::{each_node, private, replace};
use crate::graph::{Graph, Node, NodeId, Op};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (Op::Mul, &[left, right]) = (&node.op, &node.inputs[..]) else { return None };
    let (left, right) = (private(graph, left)?, private(graph, right)?);
    let (silu, up) = if left.op == Op::Silu { (left, right) } else { (right, left) };
    if silu.op != Op::Silu {
        return None;
    }
    let gate = private(graph, silu.inputs[0])?;
    if gate.inputs != up.inputs {
        return None;
    }
    let op = fused(graph, gate, up)?;
    let (inputs, label) = (gate.inputs.clone(), format!("{}_up", gate.label));
    replace(graph, id, op, inputs, label);
    Some(())
}

/// One operation for two products of the same inputs.
fn fused(graph: &Graph, gate: &Node, up: &Node) -> Option<Op> {
    match (&gate.op, &up.op) {
        (
            &Op::Linear { weight: gate_weight, bias: None, norm: None },
            &Op::Linear { weight: up_weight, bias: None, norm: None },
        ) if gate.inputs.len() == 1 => Some(Op::GateUp { gate: gate_weight, up: up_weight, norm: None }),
        (&Op::ExpertLinear { weight: gate_weight }, &Op::ExpertLinear { weight: up_weight })
            if graph.ty(gate.inputs[0]).shape.len() == 1 =>
        {
            Some(Op::ExpertGateUp { gate: gate_weight, up: up_weight, norm: None })
        }
        _ => None,
    }
}
