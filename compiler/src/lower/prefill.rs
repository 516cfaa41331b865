//! Steps of experts for many tokens: slots are sorted by expert on the device, each expert's matrices are multiplied with tiles of
//! its own slots, and what a token's experts gave is added up in the end.

use moewe_plan::{Cost, DType, Dim, Indirect, Role, Symbol};

use super::{Lowering, ONE, Slot};
use crate::error::Result;
use crate::graph::{Node, Value};
use crate::pack::Matrix;
use crate::select::{Tiled, WORKGROUP, experts_sort, experts_sum};

/// Names of buffers that hold what experts need between two steps of a layer.
const TILES: &str = "experts.tiles";
const GRIDS: &str = "experts.grids";
const PRODUCTS: &str = "experts.products";

/// Slots that were sorted by expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sorted {
    /// Experts of each token.
    ids: Value,
    /// Slots of a tile.
    tile: u64,
    /// Experts that were sorted by.
    experts: u64,
    /// Buffers.
    tiles: u32,
    grids: u32,
}

impl Lowering<'_, '_> {
    /// Sorts the slots of `ids` and multiplies both matrices of the first half. `slots` has x, y and the norm.
    pub(super) fn sorted_gate_up(
        &mut self,
        node: &Node,
        tiled: &Tiled,
        slots: &[(&'static str, Slot)],
        [gate, up]: [&Matrix; 2],
        [x, ids, y]: [Value; 3],
    ) -> Result<()> {
        let (top_k, k) = (self.len(ids), self.len(x));
        let n = self.len(y) / top_k;
        let experts: u64 = gate.shards.iter().map(|(_, count)| count).sum();
        // At most, each slot is a tile.
        let words = Dim::Times(Symbol::Tokens, top_k as u64 * (2 + tiled.tokens));
        let tiles = self.shared.buffers.get(TILES, DType::U32, words, Role::Scratch);
        let grids = self.shared.buffers.get(GRIDS, DType::U32, Dim::Const(6), Role::Scratch);
        let sorted = Sorted { ids, tile: tiled.tokens, experts, tiles, grids };

        // The second half has as many columns of results as this one has of inputs.
        let second = self.selector.expert_gemm(gate.stored, k, n, 1, false, None);
        let of_second = second.map_or(1, |second| (k as u64).div_ceil(second.rows));
        let variant = experts_sort(experts as usize, top_k, tiled.tokens, [(n as u64).div_ceil(tiled.rows), of_second]);
        let sort = [
            ("batch", self.role(Role::Header)),
            ("ids", Slot::Value(ids)),
            ("tiles", Slot::Buffer(tiles)),
            ("grids", Slot::Buffer(grids)),
        ];
        let cost = Cost { token_bytes: 16 * top_k as u64, ..Cost::default() };
        self.emit(node, &variant, &sort, [ONE; 3], [0; 4], cost)?;
        self.sorted = Some(sorted);

        let mut slots = slots.to_vec();
        slots.push(("x", Slot::Value(x)));
        slots.push(("y", Slot::Value(y)));
        self.sorted_steps(node, tiled, &slots, &[("w", "w_scale", gate), ("u", "u_scale", up)], [n, k], sorted, 0)
    }

    /// The second half, if the first one sorted the slots of the same ids. Whether it did.
    pub(super) fn sorted_down(&mut self, node: &Node, matrix: &Matrix, result: Value) -> Result<bool> {
        let [y, ids, weights, residual] = node.inputs[..] else { unreachable!("verified") };
        let top_k = self.len(ids);
        let (k, n) = (self.len(y) / top_k, self.len(result));
        let tiled = self.selector.expert_gemm(matrix.stored, n, k, 1, false, None);
        let (Some(sorted), Some(tiled)) = (self.sorted.filter(|sorted| sorted.ids == ids), tiled) else {
            return Ok(false);
        };
        let products = Dim::Times(Symbol::Tokens, (top_k * n) as u64);
        let products = Slot::Buffer(self.shared.buffers.get(PRODUCTS, DType::F32, products, Role::Scratch));
        let slots = [("x", Slot::Value(y)), ("y", products)];
        self.sorted_steps(node, &tiled, &slots, &[("w", "w_scale", matrix)], [n, k], sorted, 3)?;

        let slots = [
            ("d", products),
            ("weights", Slot::Value(weights)),
            ("residual", Slot::Value(residual)),
            ("result", Slot::Value(result)),
        ];
        let grid = [Dim::Const(n.div_ceil(WORKGROUP) as u64), Dim::Symbol(Symbol::Tokens), ONE];
        let cost = Cost {
            token_bytes: 4 * (n * (top_k + 2)) as u64,
            token_flops: (n * (2 * top_k + 1)) as u64,
            ..Cost::default()
        };
        self.emit(node, &experts_sum(n, top_k), &slots, grid, [0; 4], cost)?;
        Ok(true)
    }

    /// The steps of one product of sorted slots, one for each shard of its matrices of `[n, k]` numbers. Its workgroups stand at
    /// `word` of the buffer that the sorting step wrote.
    #[expect(clippy::too_many_arguments, reason = "each product has its own of all of them")]
    fn sorted_steps(
        &mut self,
        node: &Node,
        tiled: &Tiled,
        slots: &[(&'static str, Slot)],
        matrices: &[(&'static str, &'static str, &Matrix)],
        [n, k]: [usize; 2],
        sorted: Sorted,
        word: u64,
    ) -> Result<()> {
        let top_k = self.len(sorted.ids);
        let shards = matrices[0].2.shards.clone();
        for (shard, &(first, count)) in shards.iter().enumerate() {
            let mut slots = slots.to_vec();
            slots.extend([("part", Slot::Params), ("tiles", Slot::Buffer(sorted.tiles))]);
            let mut cost = Cost::default();
            for (name, scale_name, matrix) in matrices {
                slots.push((name, Slot::Weight(matrix.weight, shard as u32)));
                slots.extend(matrix.scales.map(|scales| (*scale_name, Slot::Weight(scales, 0))));
                // The chosen experts are spread over the shards. That tokens share them is left to who knows how many do.
                cost.token_bytes += (top_k * n) as u64 * matrix.row_bytes / shards.len() as u64;
                cost.token_flops += (2 * top_k * n * k) as u64 / shards.len() as u64;
            }
            cost.token_bytes += (4 * top_k * (n + k)) as u64 / shards.len() as u64;
            let tiles =
                Dim::Tiles { of: Symbol::Tokens, each: top_k as u64, size: sorted.tile, groups: sorted.experts };
            let grid = [Dim::Const((n as u64).div_ceil(tiled.rows)), tiles, ONE];
            self.emit(node, &tiled.variant, &slots, grid, [first as u32, count as u32, 0, 0], cost)?;
            if self.selector.profile.indirect
                && let Some(step) = self.steps.last_mut()
            {
                step.indirect = Some(Indirect { buffer: sorted.grids, word });
            }
        }
        Ok(())
    }
}
