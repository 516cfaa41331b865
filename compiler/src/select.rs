//! Which variant of a kernel serves an operation: a pure function of the operation and the device profile, which can say
//! why it chose.

mod gemm;

use moewe_plan::{FINISHED_STEPS, LOGPROB_TOP, Latent, PAGE_TOKENS, Precision, WeightFormat};
use moewe_shaders::{BLOCK, Reduce, Variant};

use crate::config::{Scoring, TopkMethod};
use crate::graph::{Asked, Mla, RouterRule, Rows, top_tokens as top_count};
use crate::profile::{Gemm, Profile, Shape};

pub use gemm::{Tiled, experts_sort, experts_sum};

/// Batches of at most this many tokens are served by kernels that read the weights once for each token, and waste nothing
/// on absent tokens.
pub const FEW_TOKENS: usize = 4;

/// Its invocations have one row each: a row's input is its head's.
const ABSORB_OUTPUT: &str = "absorb_output";

/// What variants depend on beside the operation itself.
#[derive(Clone, Copy, Debug)]
pub struct Selector<'a> {
    /// The device.
    pub profile: &'a Profile,
    /// How latents are kept: in f32, or
    pub precision: Precision,
    /// in this format if they need not be exact.
    pub fast_latents: Latent,
    /// Tokens that share a row of a matrix.
    pub tile: usize,
    /// Whether batches have at most [`FEW_TOKENS`] tokens.
    pub few: bool,
}

/// Shape of the scales of a quantised weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scales {
    /// Rows of scales.
    pub rows: usize,
    /// Columns of scales.
    pub columns: usize,
    /// Rows and columns of a block.
    pub block: [usize; 2],
}

/// A weight as a kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Format.
    pub format: WeightFormat,
    /// Scales, if the format has them.
    pub scales: Option<Scales>,
}

impl Selector<'_> {
    /// How a kernel goes through the rows of a matrix. Where many tokens share rows, an invocation has enough to hold: then it
    /// has one.
    fn shape(&self, kernel: &str) -> Shape {
        let shape = self.profile.shape(kernel);
        let many = self.tile <= 2 && kernel != ABSORB_OUTPUT;
        Shape { rows: if many { shape.rows } else { 1 }, ..shape }
    }

    /// The same for products over wanted rows. A prompt wants one row; where arithmetic is dear, it is not done for eight.
    #[must_use]
    pub fn over(self, rows: Rows) -> Self {
        let fewer = rows == Rows::Wanted && self.profile.shape("linear").pool_inputs;
        Self { tile: if fewer { self.tile.min(2) } else { self.tile }, ..self }
    }

    /// Rows of a matrix that a workgroup of this kernel computes.
    pub fn rows_per_workgroup(&self, kernel: &str) -> u64 {
        let shape = self.shape(kernel);
        u64::from(shape.workgroup / shape.lanes * shape.rows)
    }

    /// Format of the latent cache.
    pub fn latent(&self) -> Latent {
        match self.precision {
            Precision::Exact => Latent::F32,
            Precision::Fast => self.fast_latents,
        }
    }

    /// Workgroups that share the context of a token. Batches of many tokens have enough of them.
    pub fn splits(&self) -> usize {
        if self.few { self.profile.attention_splits as usize } else { 1 }
    }

    /// Why a kernel looks as it does, in a line.
    pub fn why(&self, kernel: &str) -> String {
        let shape = self.profile.shape(kernel);
        let lanes = match (shape.lanes, self.profile.subgroup_size) {
            (1, _) => "one invocation a row".to_owned(),
            (lanes, Some(_)) => format!("{lanes} lanes a row, added by subgroup shuffles"),
            (lanes, None) => format!("{lanes} lanes a row, added through workgroup memory"),
        };
        let tile = match (self.tile, shape.rows) {
            (1, 1) => "each token reads its rows".to_owned(),
            (1, rows) => format!("each token reads its rows, {rows} at a time"),
            (tile, _) => format!("{tile} tokens share a row that was read"),
        };
        let inputs = if shape.pool_inputs { "; a subgroup loads inputs together" } else { "" };
        let tiles = match self.profile.gemm {
            _ if self.tile == 1 => String::new(),
            None => "; no tiles".into(),
            _ if let Some((size, _)) = self.cooperative() => {
                format!("; rows of whole blocks in tiles by cooperative matrices of {size}")
            }
            Some(Gemm::Workgroup) => "; rows of whole blocks in tiles in workgroup memory".into(),
            Some(Gemm::Registers { rows, tokens, expert_tokens }) => {
                format!(
                    "; rows of whole blocks in tiles in registers, {rows} × {tokens} ({expert_tokens} of an expert)"
                )
            }
        };
        let tuned = if self.profile.kernels.contains_key(kernel) { "; a shape of its own" } else { "" };
        format!("profile {}: {lanes}; {tile}{inputs}{tiles}{tuned}", self.profile.name)
    }

    fn matrix(&self, kernel: &'static str, stored: Stored, k: usize) -> Variant {
        let shape = self.shape(kernel);
        let reduce = match (shape.lanes, self.profile.subgroup_size) {
            (1, _) => Reduce::None,
            (_, Some(_)) => Reduce::Subgroup,
            (_, None) => Reduce::Workgroup,
        };
        let wide = in_blocks(stored, k);
        scaled(Variant::new(kernel), stored)
            .reduce(reduce)
            .wide(wide)
            .flag("aligned", k.is_multiple_of(4))
            .int("WG", shape.workgroup as usize)
            .int("LANES", shape.lanes as usize)
    }

    /// The same for kernels that go through several rows, and whose rows all have one input.
    fn rows_of_matrix(&self, kernel: &'static str, stored: Stored, k: usize) -> Variant {
        let shape = self.shape(kernel);
        let variant = self.matrix(kernel, stored, k).int("ROWS", shape.rows as usize);
        let pooled = shape.pool_inputs && variant.wide;
        variant.flag("pooled", pooled)
    }

    /// Two products of one input.
    pub fn linear_pair(&self, stored: Stored, n: [usize; 2], k: usize, eps: Option<f64>) -> Variant {
        let variant = self.rows_of_matrix("linear", stored, k).flag("second", true).int("N", n[0]).int("N2", n[1]);
        with_norm(variant.int("K", k).int("TILE", self.tile), eps)
    }

    /// Matrix product with what is fused into it.
    pub fn linear(
        &self,
        stored: Stored,
        n: usize,
        k: usize,
        flags: &[(&'static str, bool)],
        eps: Option<f64>,
    ) -> Variant {
        let variant = self.rows_of_matrix("linear", stored, k).int("N", n).int("K", k).int("TILE", self.tile);
        with_norm(flags.iter().fold(variant, |variant, (flag, on)| variant.flag(flag, *on)), eps)
    }

    /// First half of routed experts.
    pub fn experts_gate_up(&self, stored: Stored, n: usize, k: usize, top_k: usize, eps: Option<f64>) -> Variant {
        with_norm(self.rows_of_matrix("experts_gate_up", stored, k).int("N", n).int("K", k).int("TOP_K", top_k), eps)
    }

    /// Second half of routed experts.
    pub fn experts_down(&self, stored: Stored, n: usize, k: usize, top_k: usize, residual: bool) -> Variant {
        self.rows_of_matrix("experts_down", stored, k)
            .int("N", n)
            .int("K", k)
            .int("TOP_K", top_k)
            .flag("residual", residual)
    }

    /// Router with the product that it judges by.
    pub fn router_product(&self, stored: Stored, k: usize, eps: Option<f64>, routing: &Routing) -> Variant {
        let tail = routing.rule.experts as u64 > self.rows_per_workgroup("router_product");
        let variant = self.rows_of_matrix("router_product", stored, k).int("K", k).flag("tail", tail);
        with_norm(routing.plug(variant), eps)
    }

    /// Value half of absorbed attention. `edit`: heads are scaled by a parameter. `splits`: as in the attention before it.
    pub fn absorb_output(&self, stored: Stored, mla: &Mla, edit: bool, splits: usize) -> Variant {
        let variant = self.matrix(ABSORB_OUTPUT, stored, mla.rank).flag("edit", edit).flag("split", splits > 1);
        let variant = if splits > 1 { variant.int("SPLITS", splits) } else { variant };
        let pooled = variant.wide && self.shape(ABSORB_OUTPUT).pool_inputs && mla.v.is_multiple_of(8);
        variant
            .flag("pooled", pooled)
            .int("HEADS", mla.heads)
            .int("NOPE", mla.nope)
            .int("V", mla.v)
            .int("RANK", mla.rank)
            .int("TILE", self.tile)
    }

    /// Whether so many neighbours divide into subgroups.
    fn has_whole_subgroups(&self, neighbours: usize) -> bool {
        self.profile.subgroup_size.is_some_and(|size| neighbours.is_multiple_of(size as usize))
    }

    /// Query half of absorbed attention.
    pub fn absorb_query(&self, stored: Stored, mla: &Mla, interleave: bool) -> Variant {
        self.query("absorb_query", stored, mla).flag("interleave", interleave).int("TILE", self.tile)
    }

    /// What the absorption of queries needs.
    fn query(&self, kernel: &'static str, stored: Stored, mla: &Mla) -> Variant {
        let pooled = self.profile.pool_inputs
            && mla.rank.is_multiple_of(4)
            && mla.nope.is_multiple_of(8)
            && self.has_whole_subgroups(mla.rank / 4)
            && self.has_whole_subgroups(WORKGROUP);
        scaled(Variant::new(kernel), stored)
            .flag("pooled", pooled)
            .int("HEADS", mla.heads)
            .int("NOPE", mla.nope)
            .int("ROPE", mla.rope)
            .int("ROPE_PAIRS", mla.rope / 2)
            .int("V", mla.v)
            .int("RANK", mla.rank)
            .int("WG", WORKGROUP)
    }

    /// Invocations that have a head's columns together: 16 of the latent, four of the rope part each, and no fewer than those of
    /// a subgroup, or eight, which add up scores together.
    fn attention_lanes(&self, mla: &Mla) -> usize {
        let columns = mla.rank.div_ceil(16).max(mla.rope.div_ceil(4));
        columns.max(self.profile.subgroup_size.unwrap_or(0) as usize).max(8).next_power_of_two()
    }

    /// Teams of such invocations in a workgroup, each of which has four heads.
    fn attention_teams(&self, mla: &Mla) -> usize {
        let fit = self.profile.workgroup_invocations as usize / self.attention_lanes(mla);
        (self.profile.attention_heads as usize / 4).min(mla.heads.div_ceil(4)).min(fit).max(1)
    }

    /// Heads of a workgroup of attention.
    pub fn attention_heads(&self, mla: &Mla) -> usize {
        4 * self.attention_teams(mla)
    }

    /// Attention over latents; positions below `first` were never written, nor those of the batch's holes if it has any. With
    /// `splits` > 1 workgroups share a context.
    pub fn latent_attention(&self, mla: &Mla, max_pages: usize, first: usize, holes: bool, splits: usize) -> Variant {
        let subgroup = self.profile.subgroup_size.filter(|&size| size >= 8);
        Variant::new("latent_attention")
            .latent(self.latent())
            .flag("holes", holes)
            .flag("split", splits > 1)
            .flag("subgroup", subgroup.is_some())
            .int("LANES", self.attention_lanes(mla))
            .int("SUBGROUP", subgroup.unwrap_or(8) as usize)
            .int("TEAMS", self.attention_teams(mla))
            .int("SPLITS", splits)
            .int("HEADS", mla.heads)
            .int("RANK", mla.rank)
            .int("ROPE", mla.rope)
            .int("MAX_PAGES", max_pages)
            .int("FIRST", first)
            .float("SOFTMAX_SCALE", mla.softmax_scale)
    }

    /// Norm of the latent, RoPE of the key, cache write. `flags` are `interleave`, `tapped` (the row is written once more),
    /// `edit` (the latent is scaled by a parameter).
    pub fn latent_write(&self, mla: &Mla, eps: f64, max_pages: usize, flags: &[(&'static str, bool)]) -> Variant {
        self.latent_row(Variant::new("latent_write"), mla, eps, max_pages, flags)
    }

    /// Both.
    pub fn absorb_write(
        &self,
        stored: Stored,
        mla: &Mla,
        eps: f64,
        max_pages: usize,
        flags: &[(&'static str, bool)],
    ) -> Variant {
        let variant = self.query("absorb_write", stored, mla).int("TILE", 1);
        self.latent_row(variant, mla, eps, max_pages, flags)
    }

    fn latent_row(
        &self,
        variant: Variant,
        mla: &Mla,
        eps: f64,
        max_pages: usize,
        flags: &[(&'static str, bool)],
    ) -> Variant {
        flags
            .iter()
            .fold(variant.latent(self.latent()), |variant, (flag, on)| variant.flag(flag, *on))
            .int("RANK", mla.rank)
            .int("ROPE", mla.rope)
            .int("ROPE_PAIRS", mla.rope / 2)
            .int("MAX_PAGES", max_pages)
            .int("WG", WORKGROUP)
            .float("EPS", eps)
    }

    /// Row of the embedding.
    pub fn embed(&self, stored: Stored, d: usize) -> Variant {
        scaled(Variant::new("embed"), stored).int("D", d).int("WG", WORKGROUP)
    }
}

/// Whether rows of `k` numbers divide into blocks, each with one scale.
fn in_blocks(stored: Stored, k: usize) -> bool {
    k.is_multiple_of(BLOCK) && stored.scales.is_none_or(|scales| scales.block[1].is_multiple_of(BLOCK))
}

/// Invocations of kernels that are bound by latency.
pub const WORKGROUP: usize = 64;
/// Rows of logits that a batch may ask for: one workgroup of `accept` has an invocation for each.
pub const MAX_ROWS: usize = WORKGROUP;

/// How a router chooses.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// The rule.
    pub rule: &'a RouterRule,
    /// Whether a bias is added to scores.
    pub bias: bool,
    /// Shared experts, which follow the chosen ones.
    pub shared: usize,
    /// Whether parameters change selection scores and weights.
    pub edit: bool,
}

impl Routing<'_> {
    fn plug(&self, variant: Variant) -> Variant {
        let (rule, groups) = (self.rule, self.rule.limits_groups());
        let variant = variant
            .flag("bias", self.bias)
            .flag("edit", self.edit)
            .flag("groups", groups)
            .flag("normalise", rule.normalise)
            .flag("softmax", rule.scoring == Scoring::Softmax)
            .flag("top2", rule.method == TopkMethod::NoauxTc)
            .int("E", rule.experts)
            .int("TOP_K", rule.top_k)
            .int("SHARED", self.shared)
            .int("N_GROUP", if groups { rule.n_group } else { 1 })
            .float("SCALE", rule.scale);
        if groups { variant.int("TOPK_GROUP", rule.topk_group) } else { variant }
    }
}

/// Router.
pub fn router(routing: &Routing) -> Variant {
    routing.plug(Variant::new("router").int("WG", WORKGROUP))
}

/// Standalone norm.
pub fn rms_norm(n: usize, eps: f64) -> Variant {
    Variant::new("rms_norm").int("N", n).int("WG", WORKGROUP).float("EPS", eps)
}

/// Entry of a module of multi-token prediction.
pub fn mtp_join(n: usize, eps: f64) -> Variant {
    Variant::new("mtp_join").int("N", n).int("WG", WORKGROUP).float("EPS", eps)
}

/// Rows whose logits are wanted.
pub fn gather_rows(n: usize) -> Variant {
    Variant::new("gather_rows").int("N", n).int("WG", WORKGROUP)
}

/// Sampler.
pub fn sample(vocab: usize, profile: &Profile) -> Variant {
    Variant::new("sample").int("V", vocab).int("WG", wide_workgroup(profile))
}

/// Likeliest tokens.
pub fn top_tokens(vocab: usize, asked: Asked, profile: &Profile) -> Variant {
    Variant::new("top_tokens")
        .flag("next", asked == Asked::Next)
        .flag("given", asked == Asked::Given)
        .int("V", vocab)
        .int("TOP", top_count(vocab))
        .int("WG", wide_workgroup(profile))
}

/// Log probabilities of sampled and likeliest tokens.
pub fn logprobs(vocab: usize, profile: &Profile) -> Variant {
    Variant::new("top_tokens")
        .flag("ring", true)
        .int("MAX_ROWS", MAX_ROWS)
        .int("STEPS", FINISHED_STEPS as usize)
        .int("V", vocab)
        .int("TOP", vocab.min(LOGPROB_TOP as usize))
        .int("WG", wide_workgroup(profile))
}

/// Invocations that go through a vocabulary together; a power of two.
fn wide_workgroup(profile: &Profile) -> usize {
    1 << profile.workgroup_invocations.clamp(1, 256).ilog2()
}

/// End of a pass of the main model: drafts are accepted and the next batch is made. `modules` draft.
pub fn accept(vocab: usize, modules: usize) -> Variant {
    Variant::new("accept")
        .int("MAX_ROWS", MAX_ROWS)
        .int("MODULES", modules)
        .int("STEPS", FINISHED_STEPS as usize)
        .int("V", vocab)
        .int("WG", MAX_ROWS)
}

/// End of a pass of a module of multi-token prediction, one of `modules`.
pub fn propose(modules: usize) -> Variant {
    Variant::new("propose").int("MODULES", modules).int("WG", MAX_ROWS)
}

/// Pages that the longest sequence needs.
pub fn max_pages(max_context: usize) -> usize {
    max_context.div_ceil(PAGE_TOKENS as usize)
}

fn scaled(variant: Variant, stored: Stored) -> Variant {
    let variant = variant.weight(stored.format);
    match stored.scales {
        None => variant,
        Some(scales) => variant
            .int("SCALE_ROWS", scales.rows)
            .int("SCALE_COLUMNS", scales.columns)
            .int("BLOCK_ROWS", scales.block[0])
            .int("BLOCK_COLUMNS", scales.block[1]),
    }
}

fn with_norm(variant: Variant, eps: Option<f64>) -> Variant {
    match eps {
        None => variant,
        Some(eps) => variant.flag("norm", true).float("EPS", eps),
    }
}
