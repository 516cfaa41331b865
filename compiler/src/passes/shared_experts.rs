//! A shared expert as large as a routed one becomes an expert like them, which the router always names behind those it chose, with
//! weight 1: its matrices stand behind those of the routed experts, and two dispatches are left instead of four. (Several shared
//! experts are one larger network in the checkpoint, which stays what it is.)

use super::{each_node, private, replace};
use crate::graph::{Graph, NodeId, Op, WeightId, WeightRef};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
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
    if graph.weights[shared_gate].shape != graph.weights[gate].shape {
        return None;
    }

    let (gate_up_label, down_label) = (routed.label.clone(), node.label.clone());
    let gate = stack(graph, gate, shared_gate);
    let up = stack(graph, up, shared_up);
    let down = stack(graph, down, shared_down);
    replace(graph, ids.node, Op::Router { rule, bias, shared: 1 }, router.inputs, router.label);
    replace(graph, y.node, Op::ExpertGateUp { gate, up, norm }, vec![x, ids], gate_up_label);
    replace(graph, id, Op::ExpertDown { weight: down }, vec![y, ids, weights, a], down_label);
    Some(())
}

/// The matrices of routed experts with that of the shared one behind them.
fn stack(graph: &mut Graph, routed: WeightId, shared: WeightId) -> WeightId {
    let shared = Some(graph.weights[shared].name.clone());
    graph.add_weight(WeightRef { shared, ..graph.weights[routed].clone() })
}
