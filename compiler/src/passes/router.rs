//! `RouterScore`, `RouterBias`, `GroupLimit`, `TopK`, `RouterWeights` → `Router`, with ids and weights as its two outputs
//! (bias and group limit may be absent).

use super::{each_node, private, producer, redirect, replace, sibling};
use crate::graph::{Graph, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let Op::RouterWeights(rule) = node.op else { return None };
    let &[scores, ids] = &node.inputs[..] else { return None };
    let top = producer(graph, ids)?;
    if top.op != (Op::TopK { k: rule.top_k }) {
        return None;
    }

    let mut selection = top.inputs[0];
    if rule.limits_groups() {
        let limit = private(graph, selection)?;
        if limit.op != Op::GroupLimit(rule) {
            return None;
        }
        selection = limit.inputs[0];
    }
    let mut bias = None;
    if let Op::RouterBias { bias: weight } = graph.nodes[selection.node].op {
        bias = Some(weight);
        selection = private(graph, selection)?.inputs[0];
    }
    // The scores have two readers: what selects, and the weights.
    let score = producer(graph, scores)?;
    let swallowed = !graph.is_tapped(scores) && graph.readers(scores).count() == 2;
    if selection != scores || score.op != Op::RouterScore(rule.scoring) || !swallowed {
        return None;
    }

    // In the place of TopK: all that reads the ids or the weights comes later.
    let (logits, label) = (score.inputs.clone(), sibling(&top.label, "router"));
    replace(graph, ids.node, Op::Router { rule, bias, shared: 0 }, logits, label);
    redirect(graph, Value { node: id, output: 0 }, Value { node: ids.node, output: 1 });
    Some(())
}
