//! Steps of multi-head latent attention.

use moewe_plan::{Cost, DType, Dim, ParameterKind, Role, Symbol};

use super::{Lowering, ONE, Slot};
use crate::error::Result;
use crate::graph::{Mla, Node, Norm, Value, WeightId};
use crate::pack::Matrix;
use crate::select::{self, FEW_TOKENS, WORKGROUP};

/// What is bound to the bindings of a kernel, by their names.
type Slots = Vec<(&'static str, Slot)>;

impl Lowering<'_, '_> {
    pub(super) fn latent_write(
        &mut self,
        node: &Node,
        kv: Value,
        layer: usize,
        norm: Norm,
        mla: &Mla,
        row: Value,
    ) -> Result<()> {
        let (slots, flags) = self.latent_row(node, kv, layer, norm, mla, row)?;
        let variant = self.selector.latent_write(mla, norm.eps, self.max_pages(), &flags);
        let cost = self.latent_cost(mla);
        self.emit(node, &variant, &slots, [Dim::Symbol(Symbol::Tokens), ONE, ONE], [0; 4], cost)
    }

    /// What writing a latent row binds, and its flags.
    fn latent_row(
        &mut self,
        node: &Node,
        kv: Value,
        layer: usize,
        norm: Norm,
        mla: &Mla,
        row: Value,
    ) -> Result<(Slots, [(&'static str, bool); 3])> {
        let (tapped, edit) = (self.values.contains_key(&row), self.graph.parameters);
        let mut slots = vec![
            ("kv", Slot::Value(kv)),
            ("norm", self.vector(norm.weight)?),
            ("angles", self.angles()?),
            ("tokens", self.role(Role::Tokens)),
            ("pages", self.role(Role::PageTable)),
            ("cache", self.cache(layer)),
        ];
        if tapped {
            slots.push(("result", Slot::Value(row)));
        }
        if edit {
            slots.push(("latent_scale", self.parameter(node, ParameterKind::LatentScale, mla.rank)?));
        }
        Ok((slots, [("interleave", self.config.rope.interleave), ("tapped", tapped), ("edit", edit)]))
    }

    fn latent_cost(&self, mla: &Mla) -> Cost {
        let words = self.selector.latent().words(mla.rank as u64, mla.rope as u64);
        Cost { token_bytes: 4 * ((mla.rank + mla.rope) as u64 + words), ..Cost::default() }
    }

    fn max_pages(&self) -> usize {
        select::max_pages(self.config.max_position_embeddings)
    }

    /// Query and latent row in one step in batches of a few tokens, where a kernel can bind all that both need; else one step
    /// for each.
    pub(super) fn absorb_write(
        &mut self,
        node: &Node,
        kv_b: WeightId,
        layer: usize,
        norm: Norm,
        mla: &Mla,
        [y, row]: [Value; 2],
    ) -> Result<()> {
        let [q, kv] = node.inputs[..] else { unreachable!("verified") };
        let matrix = self.matrix(kv_b, mla.nope + mla.v)?;
        let (mut slots, flags) = self.latent_row(node, kv, layer, norm, mla, row)?;
        let variant = self.selector.absorb_write(matrix.stored, mla, norm.eps, self.max_pages(), &flags);
        if self.selector.tile > 1 || matrix.shards.len() > 1 || !self.fits(&variant)? {
            self.latent_write(node, kv, layer, norm, mla, row)?;
            return self.absorb_query(node, q, kv_b, mla, y);
        }
        slots.extend([
            ("part", Slot::Params),
            ("q", Slot::Value(q)),
            ("kv_b", Slot::Weight(matrix.weight, 0)),
            ("y", Slot::Value(y)),
        ]);
        slots.extend(matrix.scales.map(|scales| ("kv_b_scale", Slot::Weight(scales, 0))));
        let heads = mla.heads as u64;
        let cost = query_cost(mla, heads, &matrix);
        let cost = Cost { token_bytes: cost.token_bytes + self.latent_cost(mla).token_bytes, ..cost };
        let grid = [Dim::Const(query_groups(mla)), Dim::Const(heads + 1), Dim::Symbol(Symbol::Tokens)];
        self.emit(node, &variant, &slots, grid, [0, heads as u32, 0, 0], cost)
    }

    pub(super) fn absorb_query(&mut self, node: &Node, q: Value, kv_b: WeightId, mla: &Mla, y: Value) -> Result<()> {
        let matrix = self.matrix(kv_b, mla.nope + mla.v)?;
        let variant = self.selector.absorb_query(matrix.stored, mla, self.config.rope.interleave);
        for (shard, heads) in head_shards(&matrix, mla).into_iter().enumerate() {
            let mut slots = vec![
                ("batch", self.role(Role::Header)),
                ("part", Slot::Params),
                ("q", Slot::Value(q)),
                ("kv_b", Slot::Weight(matrix.weight, shard as u32)),
                ("angles", self.angles()?),
                ("tokens", self.role(Role::Tokens)),
                ("y", Slot::Value(y)),
            ];
            slots.extend(matrix.scales.map(|scales| ("kv_b_scale", Slot::Weight(scales, 0))));
            let tiles = Dim::CeilDiv(Symbol::Tokens, self.selector.tile as u64);
            let grid = [Dim::Const(query_groups(mla)), Dim::Const(heads.1), tiles];
            let cost = query_cost(mla, heads.1, &matrix);
            self.emit(node, &variant, &slots, grid, [heads.0 as u32, heads.1 as u32, 0, 0], cost)?;
        }
        Ok(())
    }

    pub(super) fn latent_attention(&mut self, node: &Node, layer: usize, mla: &Mla, y: Value) -> Result<()> {
        let max_pages = select::max_pages(self.config.max_position_embeddings);
        // Modules of multi-token prediction may have skipped positions.
        let holes = self.first_position > 0;
        let splits = self.splits(y);
        let variant = self.selector.latent_attention(mla, max_pages, self.first_position, holes, splits);
        let mut slots = vec![
            ("q", Slot::Value(node.inputs[0])),
            ("cache_rows", self.cache(layer)),
            ("tokens", self.role(Role::Tokens)),
            ("pages", self.role(Role::PageTable)),
            ("y", if splits > 1 { self.shares("sums", splits, mla.heads * mla.rank) } else { Slot::Value(y) }),
        ];
        if splits > 1 {
            slots.push(("stats", self.shares("stats", splits, 2 * mla.heads)));
        }
        if holes {
            slots.push(("holes", self.role(Role::Holes)));
        }
        let numbers = mla.rank + mla.rope;
        let cost = Cost {
            token_bytes: 4 * (mla.heads * (numbers + mla.rank)) as u64,
            context_bytes: 4 * self.selector.latent().words(mla.rank as u64, mla.rope as u64),
            context_flops: 2 * (mla.heads * (numbers + mla.rank)) as u64,
            ..Cost::default()
        };
        let groups = mla.heads.div_ceil(self.selector.attention_heads(mla)) as u64;
        let grid = [Dim::Const(groups), Dim::Symbol(Symbol::Tokens), Dim::Const(splits as u64)];
        self.emit(node, &variant, &slots, grid, [0; 4], cost)
    }

    /// Workgroups that share a context in the attention that gives `y`. A value that is tapped is wanted in one piece.
    fn splits(&self, y: Value) -> usize {
        if self.graph.is_tapped(y) { 1 } else { self.selector.splits() }
    }

    /// What the workgroups leave that share a context, of `len` numbers for each token and share.
    fn shares(&mut self, what: &str, splits: usize, len: usize) -> Slot {
        let elements = Dim::Const((FEW_TOKENS * splits * len) as u64);
        Slot::Buffer(self.shared.buffers.get(&format!("attention.{what}"), DType::F32, elements, Role::Scratch))
    }

    pub(super) fn absorb_output(&mut self, node: &Node, kv_b: WeightId, mla: &Mla, y: Value) -> Result<()> {
        let matrix = self.matrix(kv_b, mla.nope + mla.v)?;
        let edit = self.graph.parameters;
        let splits = self.splits(node.inputs[0]);
        let variant = self.selector.absorb_output(matrix.stored, mla, edit, splits);
        for (shard, heads) in head_shards(&matrix, mla).into_iter().enumerate() {
            let mut slots = vec![
                ("batch", self.role(Role::Header)),
                ("part", Slot::Params),
                (
                    "x",
                    if splits > 1 {
                        self.shares("sums", splits, mla.heads * mla.rank)
                    } else {
                        Slot::Value(node.inputs[0])
                    },
                ),
                ("kv_b", Slot::Weight(matrix.weight, shard as u32)),
                ("y", Slot::Value(y)),
            ];
            if splits > 1 {
                slots.push(("stats", self.shares("stats", splits, 2 * mla.heads)));
                slots.push(("tokens", self.role(Role::Tokens)));
            }
            if edit {
                slots.push(("head_scale", self.parameter(node, ParameterKind::HeadScale, mla.heads)?));
            }
            slots.extend(matrix.scales.map(|scales| ("kv_b_scale", Slot::Weight(scales, 0))));
            let rows = heads.1 * mla.v as u64;
            let grid = [
                Dim::Const(rows.div_ceil(self.selector.rows_per_workgroup("absorb_output"))),
                Dim::CeilDiv(Symbol::Tokens, self.selector.tile as u64),
                ONE,
            ];
            let cost = Cost {
                fixed_bytes: rows * matrix.row_bytes,
                token_bytes: 4 * heads.1 * (mla.rank + mla.v) as u64,
                token_flops: 2 * rows * mla.rank as u64,
                ..Cost::default()
            };
            self.emit(node, &variant, &slots, grid, [heads.0 as u32, heads.1 as u32, 0, 0], cost)?;
        }
        Ok(())
    }
}

/// Workgroups for the query of a head.
fn query_groups(mla: &Mla) -> u64 {
    (mla.rank.div_ceil(4) + mla.rope / 2).div_ceil(WORKGROUP) as u64
}

/// Cost of absorbing the queries of so many heads.
fn query_cost(mla: &Mla, heads: u64, matrix: &Matrix) -> Cost {
    Cost {
        fixed_bytes: heads * mla.nope as u64 * matrix.row_bytes,
        token_bytes: 4 * heads * (mla.nope + mla.rank + 2 * mla.rope) as u64,
        token_flops: 2 * heads * (mla.nope * mla.rank) as u64,
        ..Cost::default()
    }
}

/// The heads of each shard of `kv_b`: first and number.
fn head_shards(matrix: &Matrix, mla: &Mla) -> Vec<(u64, u64)> {
    let rows = (mla.nope + mla.v) as u64;
    matrix.shards.iter().map(|(first, count)| (first / rows, count / rows)).collect()
}
