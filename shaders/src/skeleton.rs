//! The kernel skeletons and the plug modules, as text.

/// A kernel source with its sockets.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "one for each socket")]
pub struct Skeleton {
    /// Name, also the file's.
    pub name: &'static str,
    /// WESL text.
    pub source: &'static str,
    /// Flags that switch parts of it on.
    pub flags: &'static [&'static str],
    /// Whether it decodes weights, four numbers at a time.
    pub weight: bool,
    /// Whether it multiplies rows of weights, a block at a time.
    pub matrix: bool,
    /// Whether it reads or writes the latent cache.
    pub latent: bool,
    /// Whether several invocations may share a row.
    pub reduce: bool,
    /// Whether it multiplies by cooperative matrices of f16: 8 × 8, or 16 × 16 with the flag `sixteen`.
    pub cooperative: bool,
}

macro_rules! skeleton {
    ($name:literal, [$($flag:literal),*], [$($socket:ident),*]) => {
        Skeleton {
            name: $name,
            source: include_str!(concat!("../wesl/", $name, ".wesl")),
            flags: &[$($flag),*],
            $($socket: true,)*
            ..EMPTY
        }
    };
}

const EMPTY: Skeleton = Skeleton {
    name: "",
    source: "",
    flags: &[],
    weight: false,
    matrix: false,
    latent: false,
    reduce: false,
    cooperative: false,
};

/// Every kernel.
pub const SKELETONS: &[Skeleton] = &[
    skeleton!("absorb_output", ["aligned", "edit", "half_scales", "pooled", "scaled", "split"], [matrix, reduce]),
    skeleton!("absorb_query", ["half_scales", "interleave", "pooled", "scaled"], [weight]),
    skeleton!("absorb_write", ["edit", "half_scales", "interleave", "pooled", "scaled", "tapped"], [weight, latent]),
    skeleton!("accept", [], []),
    skeleton!("embed", ["half_scales", "scaled"], [weight]),
    skeleton!("experts_down", ["aligned", "half_scales", "residual", "scaled", "pooled"], [matrix, reduce]),
    skeleton!("experts_gate_up", ["aligned", "half_scales", "norm", "scaled", "pooled"], [matrix, reduce]),
    skeleton!("experts_sort", [], []),
    skeleton!("experts_sum", [], []),
    skeleton!("gather_rows", [], []),
    skeleton!("gemm", ["bias", "experts", "gated", "half_scales", "norm", "pooled", "residual", "scaled"], [matrix]),
    skeleton!(
        "gemm_coop",
        ["bias", "experts", "gated", "half_scales", "norm", "residual", "scaled", "sixteen"],
        [matrix, cooperative]
    ),
    skeleton!("gemm_tiled", ["bias", "experts", "gated", "half_scales", "norm", "residual", "scaled"], [matrix]),
    skeleton!("latent_attention", ["holes", "split", "subgroup"], [latent]),
    skeleton!("latent_write", ["edit", "interleave", "tapped"], [latent]),
    skeleton!(
        "linear",
        ["aligned", "bias", "gated", "half_scales", "norm", "residual", "scaled", "second", "pooled"],
        [matrix, reduce]
    ),
    skeleton!("mtp_join", [], []),
    skeleton!("propose", [], []),
    skeleton!("rms_norm", [], []),
    skeleton!("router", ["bias", "edit", "groups", "normalise", "softmax", "top2"], []),
    skeleton!(
        "router_product",
        ["aligned", "bias", "edit", "groups", "norm", "normalise", "pooled", "softmax", "tail", "top2"],
        [matrix, reduce]
    ),
    skeleton!("sample", [], []),
    skeleton!("top_tokens", ["given", "next", "ring"], []),
];

/// The kernel of this name.
pub fn skeleton(name: &str) -> Option<&'static Skeleton> {
    SKELETONS.iter().find(|skeleton| skeleton.name == name)
}

/// Modules that skeletons import, by name; those with sockets have several implementations.
pub(crate) const SHARED: &[(&str, &str)] = &[
    ("batch", include_str!("../wesl/batch.wesl")),
    ("cache", include_str!("../wesl/cache.wesl")),
    ("mean_square", include_str!("../wesl/mean_square.wesl")),
    ("latent_row", include_str!("../wesl/latent_row.wesl")),
    ("positions", include_str!("../wesl/positions.wesl")),
    ("query", include_str!("../wesl/query.wesl")),
    ("rope", include_str!("../wesl/rope.wesl")),
    ("routing", include_str!("../wesl/routing.wesl")),
    ("row", include_str!("../wesl/row.wesl")),
    ("scale", include_str!("../wesl/scale.wesl")),
    ("splits", include_str!("../wesl/splits.wesl")),
];

/// Flags that shared modules and plugs ask for.
pub(crate) const MODULE_FLAGS: &[&str] = &["half_scales", "pooled", "tail"];

pub(crate) const WEIGHT_F32: &str = include_str!("../wesl/weight/f32.wesl");
pub(crate) const WEIGHT_BF16: &str = include_str!("../wesl/weight/bf16.wesl");
pub(crate) const WEIGHT_F16: &str = include_str!("../wesl/weight/f16.wesl");
pub(crate) const WEIGHT_FP8: &str = include_str!("../wesl/weight/fp8.wesl");
pub(crate) const WEIGHT_INT8: &str = include_str!("../wesl/weight/int8.wesl");
pub(crate) const WEIGHT_INT4: &str = include_str!("../wesl/weight/int4.wesl");
pub(crate) const BLOCK_NARROW: &str = include_str!("../wesl/block/narrow.wesl");
pub(crate) const BLOCK_WIDE: &str = include_str!("../wesl/block/wide.wesl");
pub(crate) const MATRIX_NARROW: &str = include_str!("../wesl/matrix/narrow.wesl");
pub(crate) const MATRIX_WIDE_2: &str = include_str!("../wesl/matrix/wide_2.wesl");
pub(crate) const MATRIX_WIDE_4: &str = include_str!("../wesl/matrix/wide_4.wesl");
pub(crate) const MATRIX_WIDE_8: &str = include_str!("../wesl/matrix/wide_8.wesl");
pub(crate) const MATRIX_WIDE_16: &str = include_str!("../wesl/matrix/wide_16.wesl");
pub(crate) const LATENT_F32: &str = include_str!("../wesl/latent/f32.wesl");
pub(crate) const LATENT_F16: &str = include_str!("../wesl/latent/f16.wesl");
pub(crate) const LATENT_FP8: &str = include_str!("../wesl/latent/fp8.wesl");
pub(crate) const LATENT_Q6: &str = include_str!("../wesl/latent/q6.wesl");
pub(crate) const REDUCE_NONE: &str = include_str!("../wesl/reduce/none.wesl");
pub(crate) const REDUCE_WORKGROUP: &str = include_str!("../wesl/reduce/workgroup.wesl");
pub(crate) const REDUCE_SUBGROUP: &str = include_str!("../wesl/reduce/subgroup.wesl");
