//! `CacheWrite(RmsNorm(Slice x), Rope(Slice x))` → `LatentWrite(x)`: what `kv_a` gives goes into the cache in one step.

use super::{each_node, private, replace, sibling};
use crate::graph::{Graph, Mla, NodeId, Op, Value};

pub(super) fn run(graph: &mut Graph) -> usize {
    each_node(graph, rewrite)
}

fn rewrite(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = &graph.nodes[id];
    let Op::CacheWrite { layer } = node.op else { return None };
    let &[latent, key] = &node.inputs[..] else { return None };
    let mla = shape(graph, id)?;

    let normed = private(graph, latent)?;
    let Op::RmsNorm(norm) = normed.op else { return None };
    let rotated = private(graph, key)?;
    if rotated.op != (Op::Rope { heads: 1, head_dim: mla.rope, rope: mla.rope }) {
        return None;
    }
    let source = sliced(graph, normed.inputs[0], 0, mla.rank)?;
    if sliced(graph, rotated.inputs[0], mla.rank, mla.rope)? != source
        || graph.ty(source).shape != [mla.rank + mla.rope]
    {
        return None;
    }

    let label = sibling(&node.label, "latent_write");
    replace(graph, id, Op::LatentWrite { layer, norm, mla }, vec![source], label);
    Some(())
}

/// The shape of the attention that reads this cache.
fn shape(graph: &Graph, cache: NodeId) -> Option<Mla> {
    graph.readers(Value { node: cache, output: 0 }).find_map(|(reader, _)| match graph.nodes[reader].op {
        Op::LatentAttention { mla, .. } | Op::Attention { mla, .. } => Some(mla),
        _ => None,
    })
}

/// What `value` is a slice of, if it is this slice and nothing else needs it.
fn sliced(graph: &Graph, value: Value, start: usize, len: usize) -> Option<Value> {
    let node = private(graph, value)?;
    (node.op == Op::Slice { start, len }).then(|| node.inputs[0])
}
