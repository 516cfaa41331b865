//! Shared experts as large as routed ones become experts like them, which the router always names behind those it chose, with
//! weight 1: their matrices stand behind those of the routed experts, and two dispatches are left instead of four. Several
//! shared experts are one larger network in the checkpoint, which is cut: W_down · a = Σ_s W_down,s · a_s, where expert s has its
//! share of the rows of gate and up, and of the columns of down.

use super::{each_node, private, replace};
use crate::graph::{Graph, NodeId, Op, SharedExperts, WeightId, WeightRef};

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
    let [width, _] = graph.weights[gate].shape[..] else { return None };
    let [shared_width, _] = graph.weights[shared_gate].shape[..] else { return None };
    let count = shared_width / width;
    let block = graph.scale_block.unwrap_or([1, 1]);
    let is_cut = count > 1;
    if shared_width % width != 0 || is_cut && block.iter().any(|size| width % size != 0) {
        return None;
    }

    let (gate_up_label, down_label) = (routed.label.clone(), node.label.clone());
    let gate = stack(graph, gate, shared_gate, count, false);
    let up = stack(graph, up, shared_up, count, false);
    let down = stack(graph, down, shared_down, count, is_cut);
    replace(graph, ids.node, Op::Router { rule, bias, shared: count }, router.inputs, router.label);
    replace(graph, y.node, Op::ExpertGateUp { gate, up, norm }, vec![x, ids], gate_up_label);
    replace(graph, id, Op::ExpertDown { weight: down }, vec![y, ids, weights, a], down_label);
    Some(())
}

/// The matrices of routed experts with those of shared ones behind them.
fn stack(graph: &mut Graph, routed: WeightId, shared: WeightId, count: usize, by_columns: bool) -> WeightId {
    let shared = Some(SharedExperts { name: graph.weights[shared].name.clone(), count, by_columns });
    graph.add_weight(WeightRef { shared, ..graph.weights[routed].clone() })
}
