//! Loads of experts for DeepSeek's expert-parallelism load balancer.

use std::path::Path;

use serde_json::json;

use super::Error;
use super::npz::write_arrays;
use crate::store::Store;
use crate::subject::Subject;

/// Writes what EPLB's `rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)` takes: `weight`
/// (int64 `[layers, experts]`, tokens that each expert got over everything that was seen), beside it `layers` (int32,
/// which layer each row is) and `metadata` (JSON as bytes: the model, its groups, how many tokens each layer saw).
///
/// ```python
/// file = numpy.load("load.npz")
/// weight, about = torch.from_numpy(file["weight"]), json.loads(bytes(file["metadata"]))
/// eplb.rebalance_experts(weight, 288, about["num_groups"], 4, 32)
/// ```
///
/// # Errors
/// [`Error::Nothing`] if no routing was seen, [`Error::Exists`], [`Error::Write`].
pub fn eplb(store: &Store, subject: &Subject, path: &Path, overwrite: bool) -> Result<(), Error> {
    let model = &subject.model;
    let (experts, top_k) = (model.experts as usize, u64::from(model.num_experts_per_tok));
    let seen = |layer: &&u32| store.load(**layer).is_some_and(|load| load.tokens.iter().any(|tokens| *tokens > 0));
    let layers: Vec<u32> = model.moe_layers.iter().filter(seen).copied().collect();
    if layers.is_empty() || top_k == 0 {
        return Err(Error::nothing(path, "no routing was seen; watch it with --taps routing"));
    }
    let loads: Vec<&[u64]> = layers.iter().filter_map(|layer| Some(&store.load(*layer)?.tokens[..])).collect();
    let weight: Vec<i64> = loads.iter().flat_map(|tokens| tokens.iter().map(|tokens| *tokens as i64)).collect();
    let tokens: Vec<u64> = loads.iter().map(|tokens| tokens.iter().sum::<u64>() / top_k).collect();
    let metadata = json!({
        "model": subject.name,
        "checkpoint": model.checkpoint,
        "layers": layers,
        "num_experts": experts,
        "num_groups": model.n_group.max(1),
        "num_experts_per_tok": top_k,
        "tokens": tokens,
    });
    let layers: Vec<i32> = layers.iter().map(|layer| *layer as i32).collect();
    write_arrays(path, overwrite, |arrays| {
        arrays.add("weight", &[layers.len(), experts], &weight)?;
        arrays.add("layers", &[layers.len()], &layers)?;
        arrays.add_json("metadata", &metadata)
    })
}
