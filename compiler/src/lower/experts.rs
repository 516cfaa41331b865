//! Steps of chosen experts, shared ones among them.

use moewe_plan::{Cost, Dim, Symbol};

use super::{Lowering, ONE, Slot};
use crate::error::Result;
use crate::graph::{Node, Norm, Value, WeightId};

impl Lowering<'_, '_> {
    pub(super) fn experts_gate_up(
        &mut self,
        node: &Node,
        gate: WeightId,
        up: WeightId,
        norm: Option<Norm>,
        y: Value,
    ) -> Result<()> {
        let (x, ids) = (node.inputs[0], node.inputs[1]);
        let mut slots = Vec::new();
        let eps = self.norm(norm, &mut slots)?;
        let (gate, up) = (self.matrix(gate, 1)?, self.matrix(up, 1)?);
        self.same_format(node, &gate, &up)?;
        let (top_k, k) = (self.len(ids), self.len(x));
        let n = self.len(y) / top_k;
        if let Some(tiled) = self.selector.expert_gemm(gate.stored, n, k, top_k, true, eps) {
            return self.sorted_gate_up(node, &tiled, &slots, [&gate, &up], [x, ids, y]);
        }
        slots.extend([("x", Slot::Value(x)), ("ids", Slot::Value(ids)), ("y", Slot::Value(y))]);
        let variant = self.selector.experts_gate_up(gate.stored, n, k, top_k, eps);
        for (shard, &(first, count)) in gate.shards.iter().enumerate() {
            let mut slots = slots.clone();
            slots.extend([
                ("part", Slot::Params),
                ("gate", Slot::Weight(gate.weight, shard as u32)),
                ("up", Slot::Weight(up.weight, shard as u32)),
            ]);
            slots.extend(gate.scales.map(|scales| ("gate_scale", Slot::Weight(scales, 0))));
            slots.extend(up.scales.map(|scales| ("up_scale", Slot::Weight(scales, 0))));
            let grid = [
                Dim::Const((n as u64).div_ceil(self.selector.rows_per_workgroup("experts_gate_up"))),
                Dim::Times(Symbol::Tokens, top_k as u64),
                ONE,
            ];
            let shards = gate.shards.len() as u64; // the chosen experts are spread over the shards
            let cost = Cost {
                token_bytes: top_k as u64 * (n as u64 * (2 * gate.row_bytes + 4) + 4 * k as u64) / shards,
                token_flops: 4 * (top_k * n * k) as u64 / shards,
                ..Cost::default()
            };
            self.emit(node, &variant, &slots, grid, [first as u32, count as u32, 0, 0], cost)?;
        }
        Ok(())
    }

    pub(super) fn experts_down(&mut self, node: &Node, weight: WeightId, result: Value) -> Result<()> {
        let [y, ids, weights, residual] = node.inputs[..] else { unreachable!("verified") };
        let matrix = self.matrix(weight, 1)?;
        if self.sorted_down(node, &matrix, result)? {
            return Ok(());
        }
        let top_k = self.len(ids);
        let (k, n) = (self.len(y) / top_k, self.len(result));
        for (shard, &(first, count)) in matrix.shards.iter().enumerate() {
            let variant = self.selector.experts_down(matrix.stored, n, k, top_k, shard == 0);
            let mut slots = vec![
                ("part", Slot::Params),
                ("y", Slot::Value(y)),
                ("ids", Slot::Value(ids)),
                ("weights", Slot::Value(weights)),
                ("down", Slot::Weight(matrix.weight, shard as u32)),
                ("residual", Slot::Value(residual)),
                ("result", Slot::Value(result)),
            ];
            slots.extend(matrix.scales.map(|scales| ("down_scale", Slot::Weight(scales, 0))));
            let groups = (n as u64).div_ceil(self.selector.rows_per_workgroup("experts_down"));
            let grid = [Dim::Const(groups), Dim::Symbol(Symbol::Tokens), ONE];
            let shards = matrix.shards.len() as u64;
            let cost = Cost {
                token_bytes: (top_k as u64 * (n as u64 * matrix.row_bytes + 4 * k as u64)) / shards + 8 * n as u64,
                token_flops: 2 * (top_k * n * k) as u64 / shards,
                ..Cost::default()
            };
            self.emit(node, &variant, &slots, grid, [first as u32, count as u32, 0, 0], cost)?;
        }
        Ok(())
    }
}
