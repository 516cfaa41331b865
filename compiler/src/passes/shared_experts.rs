//! Shared experts become experts like the routed ones, which the router always names behind those it chose, with weight 1: their
//! matrices stand behind those of the routed experts, and two dispatches are left instead of four.

use super::{each_node, private, replace};
use crate::graph::{Graph, NodeId, Op, SharedExperts, WeightId, WeightRef};

pub(super) fn run(graph: &mut Graph) -> usize {
    if graph.divides_shared { each_node(graph, rewrite) } else { 0 }
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (&Op::ExpertDown { weight: down }, &[y, ids, weights, residual]) = (&node.op, &node.inputs[..]) else {
        return None;
    };
    let shared_down = private(graph, residual)?;
    let (&Op::Linear { weight: shared_down, bias: None, norm: None }, &[inner, a]) =
        (&shared_down.op, &shared_down.inputs[..])
    else {
        return None;
    };
    let shared = private(graph, inner)?;
    let &Op::GateUp { gate: shared_gate, up: shared_up, norm: shared_norm } = &shared.op else { return None };
    let routed = private(graph, y)?;
    let (&Op::ExpertGateUp { gate, up, norm }, &[x, _]) = (&routed.op, &routed.inputs[..]) else { return None };
    let router = graph.nodes[ids.node].clone();
    let Op::Router { rule, bias, shared: 0 } = router.op else { return None };
    if shared.inputs != [x] || shared_norm != norm || weights.node != ids.node {
        return None;
    }
    let width = graph.weights[gate].shape[0];
    let count = graph.weights[shared_gate].shape[0] / width;
    if count != 1 || graph.weights[shared_gate].shape[0] != count * width {
        return None;
    }

    let (gate_up_label, down_label) = (routed.label.clone(), node.label.clone());
    let gate = stack(graph, gate, shared_gate, count, false);
    let up = stack(graph, up, shared_up, count, false);
    let down = stack(graph, down, shared_down, count, true);
    replace(graph, ids.node, Op::Router { rule, bias, shared: count }, router.inputs, router.label);
    replace(graph, y.node, Op::ExpertGateUp { gate, up, norm }, vec![x, ids], gate_up_label);
    replace(graph, id, Op::ExpertDown { weight: down }, vec![y, ids, weights, a], down_label);
    Some(())
}

/// The matrices of routed experts with those of `count` shared ones behind them.
fn stack(graph: &mut Graph, routed: WeightId, shared: WeightId, count: usize, beside: bool) -> WeightId {
    let shared = Some(SharedExperts { name: graph.weights[shared].name.clone(), count, beside });
    let weight = WeightRef { shared, ..graph.weights[routed].clone() };
    graph.add_weight(weight)
}
