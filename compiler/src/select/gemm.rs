//! Which kernels multiply matrices with many tokens: tiles of tokens that share what was loaded and decoded of a weight.

use moewe_plan::{Dim, Precision};
use moewe_shaders::Variant;

use super::{Selector, Stored, scaled, with_norm};
use crate::graph::Rows;
use crate::memory::symbol;
use crate::profile::Gemm;

/// Lines and tokens of a tile of `gemm_tiled` and `gemm_coop`.
const WORKGROUP_TILE: u64 = 64;

/// A product in tiles.
#[derive(Clone, Debug)]
pub struct Tiled {
    /// The kernel.
    pub variant: Variant,
    /// Rows of a matrix that a workgroup computes.
    pub rows: u64,
    /// Tokens of a tile.
    pub tokens: u64,
}

impl Tiled {
    /// Workgroups for `count` rows and all rows of the activations.
    pub fn grid(&self, count: u64, rows: Rows) -> [Dim; 3] {
        [Dim::Const(count.div_ceil(self.rows)), Dim::CeilDiv(symbol(rows), self.tokens), Dim::Const(1)]
    }
}

impl Selector<'_> {
    /// The product of a matrix and all tokens in tiles, or `None` where that does not pay or cannot be: in batches of a few
    /// tokens, for wanted rows (there are few of them, mostly one), for rows that do not divide into blocks.
    pub fn gemm(
        &self,
        rows: Rows,
        stored: Stored,
        n: usize,
        k: usize,
        flags: &[(&'static str, bool)],
        eps: Option<f64>,
    ) -> Option<Tiled> {
        if rows != Rows::Tokens {
            return None;
        }
        self.tiled(stored, n, k, flags, eps, false)
    }

    /// The same for the tokens of each expert; `share` rows of y have one row of x.
    pub fn expert_gemm(
        &self,
        stored: Stored,
        n: usize,
        k: usize,
        share: usize,
        gated: bool,
        eps: Option<f64>,
    ) -> Option<Tiled> {
        let mut tiled = self.tiled(stored, n, k, &[("gated", gated)], eps, true)?;
        tiled.variant = tiled.variant.flag("experts", true).int("X_SHARE", share);
        Some(tiled)
    }

    /// Rows of a cooperative matrix and invocations of a subgroup, where tiles are multiplied by such matrices.
    pub(super) fn cooperative(&self) -> Option<(u32, u32)> {
        let wanted = self.profile.cooperative.filter(|_| self.precision == Precision::Fast);
        wanted.zip(self.profile.subgroup_size)
    }

    fn tiled(
        &self,
        stored: Stored,
        n: usize,
        k: usize,
        flags: &[(&'static str, bool)],
        eps: Option<f64>,
        experts: bool,
    ) -> Option<Tiled> {
        let gemm = self.profile.gemm?;
        if self.tile == 1 || !super::in_blocks(stored, k) {
            return None;
        }
        let gated = flags.contains(&("gated", true));
        let cooperative = self.cooperative();
        let (kernel, rows, tokens) = match gemm {
            _ if cooperative.is_some() => ("gemm_coop", WORKGROUP_TILE / if gated { 2 } else { 1 }, WORKGROUP_TILE),
            Gemm::Registers { rows, tokens, expert_tokens } => {
                // An invocation holds sums of both matrices.
                let rows = if gated { (rows / 2).max(1) } else { rows };
                let tokens = if experts { expert_tokens } else { tokens };
                ("gemm", u64::from(rows * self.profile.workgroup), u64::from(tokens))
            }
            Gemm::Workgroup => ("gemm_tiled", WORKGROUP_TILE / if gated { 2 } else { 1 }, WORKGROUP_TILE),
        };
        let mut variant = scaled(Variant::new(kernel), stored).wide(true).int("N", n).int("K", k);
        if let Some((size, lanes)) = cooperative {
            variant = variant.flag("sixteen", size == 16).int("LANES", lanes as usize);
        } else if let Gemm::Registers { .. } = gemm {
            let workgroup = self.profile.workgroup as usize;
            variant = variant.flag("pooled", true).int("WG", workgroup).int("ROWS", rows as usize / workgroup);
            variant = variant.int("TILE", tokens as usize);
        }
        let variant = flags.iter().fold(variant, |variant, (flag, on)| variant.flag(flag, *on));
        Some(Tiled { variant: with_norm(variant, eps), rows, tokens })
    }
}

/// Sorts slots by expert. `grids`: workgroups for each tile, of both halves of the experts.
pub fn experts_sort(experts: usize, top_k: usize, tile: u64, grids: [u64; 2]) -> Variant {
    Variant::new("experts_sort")
        .int("E", experts)
        .int("TOP_K", top_k)
        .int("TILE", tile as usize)
        .int("X0", grids[0] as usize)
        .int("X1", grids[1] as usize)
        .int("WG", experts.next_power_of_two().clamp(32, 256))
}

/// Adds up what the chosen experts gave.
pub fn experts_sum(n: usize, top_k: usize) -> Variant {
    Variant::new("experts_sum").int("N", n).int("TOP_K", top_k).int("WG", super::WORKGROUP)
}

#[cfg(test)]
mod tests {
    use moewe_plan::{Latent, Precision, WeightFormat};

    use super::*;
    use crate::profile::Profile;

    const STORED: Stored = Stored { format: WeightFormat::Bf16, scales: None };

    fn selector(profile: &Profile, tile: usize) -> Selector<'_> {
        Selector { profile, precision: Precision::Exact, fast_latents: Latent::F16, tile, few: false }
    }

    #[test]
    fn many_tokens_get_tiles_where_rows_divide_into_blocks() {
        for profile in Profile::built_in() {
            let many = selector(&profile, profile.token_tile as usize);
            assert!(many.gemm(Rows::Tokens, STORED, 100, 96, &[], None).is_some(), "{}", profile.name);
            assert!(many.gemm(Rows::Tokens, STORED, 100, 100, &[], None).is_none(), "{}", profile.name);
            assert!(many.gemm(Rows::Wanted, STORED, 100, 96, &[], None).is_none(), "{}", profile.name);
            let few = Selector { tile: 1, ..many };
            assert!(few.gemm(Rows::Tokens, STORED, 100, 96, &[], None).is_none(), "{}", profile.name);
        }
    }

    #[test]
    fn cooperative_matrices_are_for_fast_programs_whose_profile_has_them() {
        let with = |cooperative| Profile { cooperative, ..Profile::load("lavapipe").unwrap() };
        for (size, sixteen) in [(8, false), (16, true)] {
            let profile = with(Some(size));
            let exact = selector(&profile, 8);
            let fast = Selector { precision: Precision::Fast, ..exact };
            let tiled = |selector: &Selector| selector.expert_gemm(STORED, 300, 64, 4, true, None).unwrap();
            assert_eq!(tiled(&exact).variant.kernel, "gemm");
            let found = tiled(&fast);
            assert_eq!((found.variant.kernel, found.rows, found.tokens), ("gemm_coop", 32, 64));
            assert_eq!(found.variant.flags.contains("sixteen"), sixteen);
            assert!(fast.why("linear").contains(&format!("cooperative matrices of {size}")), "{}", fast.why("linear"));
            assert!(!exact.why("linear").contains("cooperative"), "{}", exact.why("linear"));
        }
        let profile = with(None);
        let fast = Selector { precision: Precision::Fast, ..selector(&profile, 8) };
        assert_eq!(fast.gemm(Rows::Tokens, STORED, 300, 64, &[], None).unwrap().variant.kernel, "gemm");
    }

    #[test]
    fn grids_cover_all_rows_and_tokens() {
        let profile = Profile::load("lavapipe").unwrap();
        let selector = selector(&profile, 8);
        let plain = selector.gemm(Rows::Tokens, STORED, 300, 64, &[], None).unwrap();
        assert_eq!(plain.grid(300, Rows::Tokens)[0], Dim::Const(3));
        let gated = selector.gemm(Rows::Tokens, STORED, 300, 64, &[("gated", true)], None).unwrap();
        assert_eq!(gated.grid(300, Rows::Tokens)[0], Dim::Const(5));
    }
}
