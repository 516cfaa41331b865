//! `Router(Linear x)` → `RouterProduct(x)`: the workgroup that finishes the last logits of a token goes on to choose its experts.

use super::{each_node, producer, redirect, replace};
use crate::graph::{Graph, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let (&Op::Router { rule, bias, shared }, &[logits]) = (&node.op, &node.inputs[..]) else { return None };
    let linear = producer(graph, logits)?;
    let (&Op::Linear { weight, bias: None, norm }, [_]) = (&linear.op, &linear.inputs[..]) else { return None };
    // They may be tapped: the product leaves them, too.
    if graph.readers(logits).count() != 1 {
        return None;
    }
    let (inputs, label) = (linear.inputs.clone(), node.label.clone());
    replace(graph, id, Op::RouterProduct { weight, norm, rule, bias, shared }, inputs, label);
    redirect(graph, logits, Value { node: id, output: 2 });
    Some(())
}
