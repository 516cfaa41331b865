//! Rotary position embedding and its YaRN extension (spec §4), in f64.

use std::f64::consts::PI;

use serde::Serialize;

use super::{Fields, MAX_POSITION};
use crate::error::Result;

/// Rotary position embedding of the `dim` rope channels of each head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rope {
    /// dr, rotated channels per head (`qk_rope_head_dim`), even.
    pub dim: usize,
    /// `rope_theta`, the base of the geometric series of frequencies, > 1.
    pub theta: f64,
    /// true: pair i is channels (2i, 2i+1); false: (i, i + dr/2).
    pub interleave: bool,
    /// Context extension, where configured.
    pub yarn: Option<Yarn>,
}

/// YaRN parameters. `mscale` and `mscale_all_dim` are `None` when absent or zero, which mean the same.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Yarn {
    /// f, by how much the context was extended, ≥ 1.
    pub factor: f64,
    /// O, context length before extension in tokens (`original_max_position_embeddings`).
    pub original: usize,
    /// Frequencies with more turns than this over O stay as they are.
    pub beta_fast: f64,
    /// Frequencies with fewer turns than this over O are divided by `factor`.
    pub beta_slow: f64,
    /// Magnitude correction of cos and sin, numerator.
    pub mscale: Option<f64>,
    /// Magnitude correction of cos and sin, denominator, and of the softmax scale.
    pub mscale_all_dim: Option<f64>,
    /// Replaces the cos and sin factor where given.
    pub attention_factor: Option<f64>,
}

/// m(s) of spec §4.
fn magnitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

impl Rope {
    /// θ_i in radians per position, i = 0 … dr/2 − 1, YaRN applied.
    pub fn inv_freq(&self) -> Vec<f64> {
        let dim = self.dim as f64;
        let base = (0..self.dim / 2).map(|i| self.theta.powf(-(2.0 * i as f64) / dim));
        let Some(yarn) = &self.yarn else { return base.collect() };
        let corr = |turns: f64| dim * (yarn.original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let lo = corr(yarn.beta_fast).floor().max(0.0);
        let mut hi = corr(yarn.beta_slow).ceil().min(dim - 1.0);
        #[expect(clippy::float_cmp, reason = "both are whole numbers; the rule is about equality")]
        if lo == hi {
            hi += 0.001;
        }
        base.enumerate()
            .map(|(i, theta)| {
                let ramp = ((i as f64 - lo) / (hi - lo)).clamp(0.0, 1.0);
                theta * (1.0 - ramp) + theta / yarn.factor * ramp
            })
            .collect()
    }

    /// c, the factor on cos and sin (1 in every release).
    pub fn cos_sin_factor(&self) -> f64 {
        let Some(yarn) = &self.yarn else { return 1.0 };
        match (yarn.attention_factor, yarn.mscale, yarn.mscale_all_dim) {
            (Some(factor), _, _) => factor,
            (None, Some(m), Some(all)) => magnitude(yarn.factor, m) / magnitude(yarn.factor, all),
            (None, _, _) => magnitude(yarn.factor, 1.0),
        }
    }

    /// Factor on q·k before the softmax; `head_dim` is dn + dr.
    pub fn softmax_scale(&self, head_dim: usize) -> f64 {
        let plain = (head_dim as f64).powf(-0.5);
        match &self.yarn {
            Some(Yarn { factor, mscale_all_dim: Some(all), .. }) => plain * magnitude(*factor, *all).powi(2),
            _ => plain,
        }
    }

    /// Reads the old spelling (`rope_theta` + `rope_scaling`) and the new one (`rope_parameters`).
    pub(super) fn parse(top: Fields, dim: usize) -> Result<Self> {
        let interleave = top.bool_or("rope_interleave", true)?;
        let path = top.path();
        let mut objects = Vec::new();
        for name in ["rope_parameters", "rope_scaling"] {
            if let Some(map) = top.object_opt(name)? {
                objects.push((name, map));
            }
        }

        let mut theta = top.float_opt("rope_theta", MIN_THETA, MAX_THETA)?;
        let mut yarn: Option<Option<Yarn>> = None;
        for (name, map) in objects {
            let prefix = format!("{name}.");
            let fields = Fields::new(path, map, &prefix);
            let inner = fields.float_opt("rope_theta", MIN_THETA, MAX_THETA)?;
            if let (Some(outer), Some(value)) = (theta, inner)
                && outer.to_bits() != value.to_bits()
            {
                return Err(fields.bad("rope_theta", format!("{outer}, the rope_theta stated elsewhere in this file")));
            }
            theta = theta.or(inner);
            let found = Yarn::parse(fields)?;
            if yarn.as_ref().is_some_and(|other| *other != found) {
                return Err(top.bad(name, "the same scaling as rope_parameters"));
            }
            yarn = Some(found);
        }
        Ok(Self { dim, theta: theta.unwrap_or(1e4), interleave, yarn: yarn.flatten() })
    }
}

/// Below this the logarithm of the base, which YaRN divides by, is useless.
const MIN_THETA: f64 = 1.001;
const MAX_THETA: f64 = 1e15;

impl Yarn {
    fn parse(fields: Fields) -> Result<Option<Self>> {
        const KINDS: [(&str, bool); 2] = [("default", false), ("yarn", true)];
        let old = fields.choice("type", &KINDS)?;
        let new = fields.choice("rope_type", &KINDS)?;
        if let (Some(old), Some(new)) = (old, new)
            && old != new
        {
            return Err(fields.bad("rope_type", "the same as `type` beside it"));
        }
        let Some(is_yarn) = new.or(old) else {
            // An object with nothing but rope_theta means no scaling; one with a factor must say of which kind.
            return if fields.present("factor").is_some() {
                Err(fields.bad("rope_type", "\"yarn\" or \"default\""))
            } else {
                Ok(None)
            };
        };
        if !is_yarn {
            return Ok(None);
        }
        let nonzero =
            |name: &str| -> Result<Option<f64>> { Ok(fields.float_opt(name, 0.0, 1e3)?.filter(|v| *v != 0.0)) };
        let beta_fast = fields.float_opt("beta_fast", 1e-6, 1e6)?.unwrap_or(32.0);
        let beta_slow = fields.float_opt("beta_slow", 1e-6, 1e6)?.unwrap_or(1.0);
        if beta_fast < beta_slow {
            return Err(fields.bad("beta_fast", format!("at least beta_slow, which is {beta_slow}")));
        }
        Ok(Some(Self {
            factor: fields.float("factor", 1.0, 1e6)?,
            original: fields.uint("original_max_position_embeddings", 1, MAX_POSITION)?,
            beta_fast,
            beta_slow,
            mscale: nonzero("mscale")?,
            mscale_all_dim: nonzero("mscale_all_dim")?,
            attention_factor: fields.float_opt("attention_factor", 1e-6, 1e6)?,
        }))
    }
}
