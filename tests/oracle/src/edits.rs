//! Changes to a model while it runs: experts, latents and heads of single layers.

use std::collections::{BTreeMap, BTreeSet};

use crate::router::RouterEdit;

/// Changes, each at a (layer, number). [`Edits::default`] changes nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Edits {
    /// Experts that are never chosen.
    pub muted: BTreeSet<(usize, usize)>,
    /// Experts that are always chosen.
    pub forced: BTreeSet<(usize, usize)>,
    /// Factors on the weights of experts.
    pub scales: BTreeMap<(usize, usize), f64>,
    /// Numbers of the latent that are zero in the cache.
    pub zero_latents: BTreeSet<(usize, usize)>,
    /// Heads that give nothing.
    pub zero_heads: BTreeSet<(usize, usize)>,
}

impl Edits {
    /// Those of a layer's router.
    pub fn router(&self, layer: usize) -> RouterEdit {
        let at = |places: &BTreeSet<(usize, usize)>| numbers(places, layer).collect();
        let scales = self.scales.iter().filter(|((l, _), _)| *l == layer).map(|((_, e), &scale)| (*e, scale)).collect();
        RouterEdit { muted: at(&self.muted), forced: at(&self.forced), offsets: BTreeMap::new(), scales }
    }
}

/// The numbers that are named for a layer.
pub fn numbers(places: &BTreeSet<(usize, usize)>, layer: usize) -> impl Iterator<Item = usize> {
    places.iter().filter(move |(l, _)| *l == layer).map(|&(_, number)| number)
}
