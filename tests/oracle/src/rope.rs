//! RoPE and YaRN: the inverse frequencies, the factor on cos and sin, and the softmax scale. Spec §4.

/// YaRN parameters, as in `rope_scaling` of config.json (spec §4).
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// Context extension factor f.
    pub factor: f64,
    /// Original context length O.
    pub original_max_position_embeddings: f64,
    /// Rotations over the original context above which a frequency is kept; 32 when absent.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`; 1 when absent.
    pub beta_slow: f64,
    /// Numerator of the cos/sin factor; counts as absent when 0.
    pub mscale: Option<f64>,
    /// Denominator of the cos/sin factor, and the softmax correction; counts as absent when 0.
    pub mscale_all_dim: Option<f64>,
    /// Overrides the cos/sin factor.
    pub attention_factor: Option<f64>,
}

/// Everything RoPE depends on (spec §4).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeParams {
    /// dr, `qk_rope_head_dim`: even.
    pub dim: usize,
    /// dn, `qk_nope_head_dim`: only the softmax scale needs it.
    pub nope_dim: usize,
    /// `rope_theta`.
    pub theta: f64,
    /// Pairs are neighbours (true, every release) or dr/2 apart (false).
    pub interleave: bool,
    /// YaRN, when configured.
    pub yarn: Option<Yarn>,
}

impl Yarn {
    /// m(s) of spec §4.
    fn magnitude(&self, s: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * s * self.factor.ln() + 1.0 }
    }
}

/// A given and nonzero number.
fn nonzero(x: Option<f64>) -> Option<f64> {
    x.filter(|&x| x != 0.0)
}

impl RopeParams {
    /// θ_i, [dr/2], YaRN included.
    pub fn inv_freq(&self) -> Vec<f64> {
        let half = self.dim / 2;
        let plain = (0..half).map(|i| self.theta.powf(-2.0 * i as f64 / self.dim as f64));
        let Some(yarn) = &self.yarn else {
            return plain.collect();
        };
        let (lo, hi) = self.ramp_bounds(yarn);
        plain
            .enumerate()
            .map(|(i, theta)| {
                let ramp = ((i as f64 - lo) / (hi - lo)).clamp(0.0, 1.0);
                theta * (1.0 - ramp) + theta / yarn.factor * ramp
            })
            .collect()
    }

    /// (lo, hi) of spec §4. The clamp on hi is dr − 1 although i stops at dr/2 − 1: so do all implementations.
    fn ramp_bounds(&self, yarn: &Yarn) -> (f64, f64) {
        let d = self.dim as f64;
        let corr = |rotations: f64| {
            let turns = yarn.original_max_position_embeddings / (2.0 * std::f64::consts::PI * rotations);
            d * turns.ln() / (2.0 * self.theta.ln())
        };
        let lo = corr(yarn.beta_fast).floor().max(0.0);
        let hi = corr(yarn.beta_slow).ceil().min(d - 1.0);
        if hi - lo == 0.0 { (lo, hi + 0.001) } else { (lo, hi) }
    }

    /// c, the factor on cos and sin.
    pub fn cos_sin_factor(&self) -> f64 {
        let Some(yarn) = &self.yarn else { return 1.0 };
        let configured = match (nonzero(yarn.mscale), nonzero(yarn.mscale_all_dim)) {
            (Some(m), Some(all)) => yarn.magnitude(m) / yarn.magnitude(all),
            _ => yarn.magnitude(1.0),
        };
        yarn.attention_factor.unwrap_or(configured)
    }

    /// The factor on attention scores: (dn+dr)^(−1/2), times m(mscale_all_dim)² under YaRN.
    pub fn softmax_scale(&self) -> f64 {
        let plain = ((self.nope_dim + self.dim) as f64).powf(-0.5);
        let yarn = self.yarn.as_ref().and_then(|y| nonzero(y.mscale_all_dim).map(|m| y.magnitude(m)));
        plain * yarn.unwrap_or(1.0).powi(2)
    }

    /// c·cos(pθ_i) and c·sin(pθ_i) at position p, [dr/2] each.
    pub fn cos_sin(&self, position: usize) -> (Vec<f64>, Vec<f64>) {
        let factor = self.cos_sin_factor();
        self.inv_freq()
            .into_iter()
            .map(|theta| {
                let (sin, cos) = (position as f64 * theta).sin_cos();
                (cos * factor, sin * factor)
            })
            .unzip()
    }
}
