//! What distinguishes one build of a kernel from another.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use moewe_plan::{Latent, WeightFormat};

use crate::skeleton::{
    LATENT_F16, LATENT_F32, LATENT_FP8, LATENT_Q6, MATRIX_NARROW, MATRIX_WIDE_2, MATRIX_WIDE_4, MATRIX_WIDE_8,
    MATRIX_WIDE_16, REDUCE_NONE, REDUCE_SUBGROUP, REDUCE_WORKGROUP, WEIGHT_BF16, WEIGHT_F16, WEIGHT_F32, WEIGHT_FP8,
    WEIGHT_INT4, WEIGHT_INT8,
};

/// Value of a constant of the module `tune`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Const {
    /// `u32`.
    U32(u32),
    /// `f32`; must be finite.
    F32(f32),
}

impl fmt::Display for Const {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Const::U32(value) => write!(f, "{value}"),
            Const::F32(value) => write!(f, "{value:?}"),
        }
    }
}

/// How invocations that share a row add up: what is plugged into the socket `reduce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reduce {
    /// One invocation a row.
    None,
    /// Through workgroup memory.
    Workgroup,
    /// By subgroup shuffles.
    Subgroup,
}

impl Reduce {
    fn name(self) -> &'static str {
        match self {
            Reduce::None => "row",
            Reduce::Workgroup => "lanes",
            Reduce::Subgroup => "subgroup",
        }
    }

    pub(crate) fn source(self) -> &'static str {
        match self {
            Reduce::None => REDUCE_NONE,
            Reduce::Workgroup => REDUCE_WORKGROUP,
            Reduce::Subgroup => REDUCE_SUBGROUP,
        }
    }
}

/// Numbers of a block: what kernels that multiply rows of weights read at a time where rows divide into blocks.
pub const BLOCK: usize = 32;

/// One build of a kernel. It is the key under which equal kernels are one, and its [`Variant::name`] is the name of the
/// file, of the pipeline and of the snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// The skeleton's name.
    pub kernel: &'static str,
    /// Format of the weights, if the skeleton has a socket for them.
    pub weight: Option<WeightFormat>,
    /// Whether rows of weights are read in blocks of [`BLOCK`] numbers instead of four.
    pub wide: bool,
    /// Format of the latent cache, if the skeleton has that socket.
    pub latent: Option<Latent>,
    /// How lanes add up, if the skeleton has that socket.
    pub reduce: Option<Reduce>,
    /// Flags that are on; all others of the skeleton are off.
    pub flags: BTreeSet<&'static str>,
    /// Constants of the module `tune`.
    pub consts: BTreeMap<&'static str, Const>,
}

impl Variant {
    /// A variant without plugs, flags and constants.
    pub fn new(kernel: &'static str) -> Self {
        Self {
            kernel,
            weight: None,
            wide: false,
            latent: None,
            reduce: None,
            flags: BTreeSet::new(),
            consts: BTreeMap::new(),
        }
    }

    /// Plugs in a weight format. FP8 comes with scales: flag `scaled`. So do groups, with scales in f16: flag `half_scales`.
    #[must_use]
    pub fn weight(mut self, format: WeightFormat) -> Self {
        self.weight = Some(format);
        let grouped = format.is_grouped();
        self.flag("scaled", grouped || format == WeightFormat::Fp8).flag("half_scales", grouped)
    }

    /// Reads rows of weights in blocks of [`BLOCK`] numbers; they must divide into them.
    #[must_use]
    pub fn wide(mut self, wide: bool) -> Self {
        self.wide = wide;
        self
    }

    /// Plugs in a format of the latent cache.
    #[must_use]
    pub fn latent(mut self, latent: Latent) -> Self {
        self.latent = Some(latent);
        self
    }

    /// Plugs in a way to add up lanes.
    #[must_use]
    pub fn reduce(mut self, reduce: Reduce) -> Self {
        self.reduce = Some(reduce);
        self
    }

    /// Switches a flag.
    #[must_use]
    pub fn flag(mut self, flag: &'static str, on: bool) -> Self {
        if on {
            self.flags.insert(flag);
        } else {
            self.flags.remove(flag);
        }
        self
    }

    /// Sets an integer constant.
    #[must_use]
    pub fn int(mut self, name: &'static str, value: usize) -> Self {
        self.consts.insert(name, Const::U32(value as u32));
        self
    }

    /// Sets a float constant.
    #[must_use]
    pub fn float(mut self, name: &'static str, value: f64) -> Self {
        self.consts.insert(name, Const::F32(value as f32));
        self
    }

    /// A name that no other variant has: kernel, plugs and flags, then, behind `__`, every constant.
    pub fn name(&self) -> String {
        let mut parts = vec![self.kernel.to_owned()];
        parts.extend(self.weight.map(|format| format.name().to_owned()));
        parts.extend(self.wide.then(|| "wide".to_owned()));
        parts.extend(self.latent.map(|latent| format!("latent-{}", latent.name())));
        parts.extend(self.reduce.map(|reduce| reduce.name().to_owned()));
        parts.extend(
            self.flags.iter().filter(|flag| !["half_scales", "scaled"].contains(flag)).map(|&flag| flag.to_owned()),
        );
        let consts: Vec<String> = self
            .consts
            .iter()
            .map(|(name, value)| format!("{}{value}", name.to_lowercase().replace('_', "-")))
            .collect();
        let name = parts.join(".");
        if consts.is_empty() { name } else { format!("{name}__{}", consts.join("_")) }
    }

    pub(crate) fn latent_source(&self) -> Option<&'static str> {
        self.latent.map(|latent| match latent {
            Latent::F32 => LATENT_F32,
            Latent::F16 => LATENT_F16,
            Latent::Fp8 => LATENT_FP8,
            Latent::Q6 => LATENT_Q6,
        })
    }

    pub(crate) fn weight_source(&self) -> Option<&'static str> {
        self.weight.map(|format| match format {
            WeightFormat::F32 => WEIGHT_F32,
            WeightFormat::Bf16 => WEIGHT_BF16,
            WeightFormat::F16 => WEIGHT_F16,
            WeightFormat::Fp8 => WEIGHT_FP8,
            WeightFormat::Int8 => WEIGHT_INT8,
            WeightFormat::Int4 => WEIGHT_INT4,
        })
    }

    pub(crate) fn matrix_source(&self) -> Option<&'static str> {
        self.weight.map(|format| match format {
            _ if !self.wide => MATRIX_NARROW,
            WeightFormat::F32 => MATRIX_WIDE_16,
            WeightFormat::Bf16 | WeightFormat::F16 => MATRIX_WIDE_8,
            WeightFormat::Fp8 | WeightFormat::Int8 => MATRIX_WIDE_4,
            WeightFormat::Int4 => MATRIX_WIDE_2,
        })
    }
}
