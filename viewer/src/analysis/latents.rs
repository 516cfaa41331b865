//! What can be said of the latents of a text: lengths, outliers, similarity, and how much memory they spare.

use moewe_plan::ModelInfo;

/// Robust standard deviations from the median from which on something counts as an outlier.
pub const OUTLIER: f64 = 5.0;

/// A middle and a spread that a few outliers do not move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Robust {
    /// The median.
    pub median: f64,
    /// 1.4826 times the median distance to the median, which is the standard deviation if numbers are normal. If more than
    /// half of them are the same: 1.2533 times the mean distance. 0 if all are the same.
    pub sigma: f64,
}

impl Robust {
    /// Of numbers that are finite; others are left out. `None` if none is left.
    pub fn of(numbers: impl Iterator<Item = f64>) -> Option<Self> {
        let mut numbers: Vec<f64> = numbers.filter(|number| number.is_finite()).collect();
        let median = median(&mut numbers)?;
        for number in &mut numbers {
            *number = (*number - median).abs();
        }
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let spread = self::median(&mut numbers)?;
        Some(Self { median, sigma: if spread > 0.0 { 1.4826 * spread } else { 1.2533 * mean } })
    }

    /// How many sigma a number is above the median.
    pub fn sigmas(&self, number: f64) -> f64 {
        if self.sigma > 0.0 { (number - self.median) / self.sigma } else { 0.0 }
    }
}

fn median(numbers: &mut [f64]) -> Option<f64> {
    let middle = numbers.len() / 2;
    let even = numbers.len().is_multiple_of(2);
    if numbers.is_empty() {
        return None;
    }
    let (below, upper, _) = numbers.select_nth_unstable_by(middle, f64::total_cmp);
    let upper = *upper;
    let lower = below.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Some(if even { f64::midpoint(lower, upper) } else { upper })
}

/// A token or a dimension that stands out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outlier {
    /// Which.
    pub index: usize,
    /// How many robust sigma it is from the median.
    pub sigmas: f64,
}

/// Those further than [`OUTLIER`] sigma from the median, the furthest first.
pub fn outliers(numbers: &[f32]) -> Vec<Outlier> {
    let Some(robust) = Robust::of(numbers.iter().map(|&number| f64::from(number))) else { return Vec::new() };
    let far = |(index, &number): (usize, &f32)| {
        let sigmas = robust.sigmas(f64::from(number));
        (sigmas.abs() > OUTLIER).then_some(Outlier { index, sigmas })
    };
    let mut found: Vec<Outlier> = numbers.iter().enumerate().filter_map(far).collect();
    found.sort_by(|a, b| b.sigmas.abs().total_cmp(&a.sigmas.abs()));
    found
}

/// Lengths of tokens and sizes of dimensions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sizes {
    /// `[tokens]`, Euclidean lengths; NaN where a row is missing.
    pub norms: Vec<f32>,
    /// `[dim]`, root mean square over the tokens.
    pub rms: Vec<f32>,
    /// `[dim]`, mean over the tokens.
    pub means: Vec<f32>,
}

/// Sizes of rows, of which some are missing.
pub fn sizes<'a>(tokens: usize, dim: usize, row: impl Fn(usize) -> Option<&'a [f32]>) -> Sizes {
    let (mut sums, mut squares, mut count) = (vec![0.0f64; dim], vec![0.0f64; dim], 0usize);
    let mut norm = |at: usize| {
        let Some(row) = row(at) else { return f32::NAN };
        count += 1;
        let mut total = 0.0;
        for ((&number, sum), square) in row.iter().zip(&mut sums).zip(&mut squares) {
            let number = f64::from(number);
            *sum += number;
            *square += number * number;
            total += number * number;
        }
        total.sqrt() as f32
    };
    let norms = (0..tokens).map(&mut norm).collect();
    let count = count as f64;
    Sizes {
        norms,
        rms: squares.iter().map(|square| (square / count).sqrt() as f32).collect(),
        means: sums.iter().map(|sum| (sum / count) as f32).collect(),
    }
}

/// Rows of a map `[⌈tokens / pool⌉, dim]`: of `pool` tokens that share a row, each cell is the number furthest from 0; NaN
/// where all rows are missing.
pub fn pooled<'a>(tokens: usize, dim: usize, pool: usize, row: impl Fn(usize) -> Option<&'a [f32]>) -> Vec<f32> {
    let mut cells = vec![f32::NAN; tokens.div_ceil(pool) * dim];
    for at in 0..tokens {
        let Some(row) = row(at) else { continue };
        for (cell, &number) in cells[at / pool * dim..].iter_mut().zip(row) {
            if cell.is_nan() || number.abs() > cell.abs() {
                *cell = number;
            }
        }
    }
    cells
}

/// The size (by distance from 0) below which this share of the numbers is.
pub fn size_quantile(numbers: &[f32], share: f64) -> Option<f32> {
    let mut sizes: Vec<f32> = numbers.iter().filter(|number| number.is_finite()).map(|number| number.abs()).collect();
    if sizes.is_empty() {
        return None;
    }
    let at = ((sizes.len() - 1) as f64 * share.clamp(0.0, 1.0)).round() as usize;
    Some(*sizes.select_nth_unstable_by(at, f32::total_cmp).1)
}

/// Cosines of the angles between tokens: a map `[⌈tokens / pool⌉, ⌈tokens / pool⌉]`. Where `pool` tokens share a row, a
/// cell is the mean over all pairs of different tokens. NaN where there is no pair.
pub fn similarity<'a>(tokens: usize, dim: usize, pool: usize, row: impl Fn(usize) -> Option<&'a [f32]>) -> Vec<f32> {
    let blocks = tokens.div_ceil(pool);
    // The mean of the cosines of all pairs is the product of the sums of unit vectors over the number of pairs.
    let mut sums = vec![0.0f64; blocks * dim];
    let mut counts = vec![0u32; blocks];
    for at in 0..tokens {
        let Some(row) = row(at) else { continue };
        let norm = row.iter().map(|&number| f64::from(number).powi(2)).sum::<f64>().sqrt();
        if norm > 0.0 && norm.is_finite() {
            counts[at / pool] += 1;
            let sums = &mut sums[at / pool * dim..][..dim];
            sums.iter_mut().zip(row).for_each(|(sum, &number)| *sum += f64::from(number) / norm);
        }
    }
    let mut cells = vec![f32::NAN; blocks * blocks];
    for i in 0..blocks {
        for j in i..blocks {
            let product: f64 = sums[i * dim..][..dim].iter().zip(&sums[j * dim..][..dim]).map(|(a, b)| a * b).sum();
            let (one, other) = (f64::from(counts[i]), f64::from(counts[j]));
            let cosine = match (i == j, pool) {
                (true, 1) => product / one,
                (true, _) => (product - one) / (one * (one - 1.0)),
                (false, _) => product / (one * other),
            };
            if cosine.is_finite() {
                cells[i * blocks + j] = cosine as f32;
                cells[j * blocks + i] = cosine as f32;
            }
        }
    }
    cells
}

/// Cosines of the angles between one token and all; NaN where a row is missing or has no length.
pub fn cosines<'a>(tokens: usize, token: usize, row: impl Fn(usize) -> Option<&'a [f32]>) -> Vec<f32> {
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let Some(one) = row(token) else { return vec![f32::NAN; tokens] };
    let length = product(one, one);
    let cosine = |at: usize| {
        row(at).map_or(f32::NAN, |other| (product(one, other) / (length * product(other, other)).sqrt()) as f32)
    };
    (0..tokens).map(cosine).collect()
}

/// Bytes that the cache of attention needs for a token in all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheBytes {
    /// Numbers of a layer with latents: `kv_lora_rank + qk_rope_head_dim`.
    pub latent_numbers: u64,
    /// Numbers of a layer with keys and values of each head: heads · (qk_nope + qk_rope + v).
    pub plain_numbers: u64,
    /// Bytes of a number.
    pub number_bytes: u64,
    /// Layers.
    pub layers: u64,
}

impl CacheBytes {
    /// What a model needs at a precision (`exact` or `fast`); `None` for other precisions.
    pub fn of(model: &ModelInfo, precision: &str) -> Option<Self> {
        let number_bytes = match precision {
            "exact" => 4,
            "fast" => 2,
            _ => return None,
        };
        let head = [model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim].map(u64::from);
        Some(Self {
            latent_numbers: u64::from(model.kv_lora_rank) + u64::from(model.qk_rope_head_dim),
            plain_numbers: head.iter().sum::<u64>() * u64::from(model.num_attention_heads),
            number_bytes,
            layers: u64::from(model.layers),
        })
    }

    /// Bytes of so many tokens with latents.
    pub fn latent(&self, tokens: u64) -> u64 {
        [self.number_bytes, self.layers, tokens].into_iter().fold(self.latent_numbers, u64::saturating_mul)
    }

    /// Bytes of so many tokens with plain attention.
    pub fn plain(&self, tokens: u64) -> u64 {
        [self.number_bytes, self.layers, tokens].into_iter().fold(self.plain_numbers, u64::saturating_mul)
    }

    /// How many times smaller latents are.
    pub fn ratio(&self) -> f64 {
        self.plain_numbers as f64 / self.latent_numbers.max(1) as f64
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "the numbers are chosen so that results are exact")]
mod tests {
    use super::*;

    const ROWS: [Option<[f32; 3]>; 5] =
        [Some([3.0, 0.0, -4.0]), Some([1.0, 2.0, 2.0]), None, Some([-6.0, 0.0, 8.0]), Some([0.0, 0.0, 0.0])];

    fn row(at: usize) -> Option<&'static [f32]> {
        ROWS[at].as_ref().map(<[f32; 3]>::as_slice)
    }

    #[test]
    fn one_wild_number_does_not_move_the_robust_spread() {
        let calm = Robust::of([1.0, 2.0, 3.0, 4.0, 5.0].into_iter()).unwrap();
        let wild = Robust::of([1.0, 2.0, 3.0, 4.0, 5e9, f64::NAN].into_iter()).unwrap();
        assert_eq!((calm.median, calm.sigma), (3.0, 1.4826));
        assert_eq!(calm, wild);
        assert_eq!(Robust::of([2.0, 4.0].into_iter()).unwrap().median, 3.0);
        assert_eq!(Robust::of([f64::NAN].into_iter()), None);
    }

    #[test]
    fn outliers_are_found_even_among_numbers_that_are_all_the_same() {
        let mut numbers = [7.0; 100];
        assert_eq!(outliers(&numbers), []);
        numbers[17] = -7.0;
        let found = outliers(&numbers);
        assert_eq!((found.len(), found[0].index), (1, 17));
        assert!(found[0].sigmas < -OUTLIER);
        let spread: Vec<f32> = (0..101).map(|i| i as f32).chain([500.0, -900.0, f32::NAN]).collect();
        let indices: Vec<usize> = outliers(&spread).iter().map(|outlier| outlier.index).collect();
        assert_eq!(indices, [102, 101]);
    }

    #[test]
    fn sizes_leave_missing_rows_out() {
        let sizes = sizes(5, 3, row);
        assert_eq!(sizes.norms[..2], [5.0, 3.0]);
        assert!(sizes.norms[2].is_nan());
        assert_eq!(sizes.norms[3..], [10.0, 0.0]);
        assert_eq!(sizes.means, [-0.5, 0.5, 1.5]);
        assert_eq!(sizes.rms[0], (46.0f32 / 4.0).sqrt());
    }

    #[test]
    fn pooled_cells_keep_what_stands_out() {
        assert_eq!(pooled(5, 3, 2, row), [3.0, 2.0, -4.0, -6.0, 0.0, 8.0, 0.0, 0.0, 0.0]);
        assert!(pooled(5, 3, 1, row)[6..9].iter().all(|cell| cell.is_nan()));
        assert_eq!(size_quantile(&[-3.0, 1.0, f32::NAN, 2.0], 1.0), Some(3.0));
        assert_eq!(size_quantile(&[-3.0, 1.0, 2.0], 0.5), Some(2.0));
        assert_eq!(size_quantile(&[f32::NAN], 0.5), None);
    }

    #[test]
    fn pooled_similarity_is_the_mean_over_pairs() {
        let cosine = |a: usize, b: usize| {
            let (a, b) = (ROWS[a]?, ROWS[b]?);
            let dot = |x: [f32; 3], y: [f32; 3]| (0..3).map(|i| f64::from(x[i]) * f64::from(y[i])).sum::<f64>();
            let lengths = (dot(a, a) * dot(b, b)).sqrt();
            (lengths > 0.0).then(|| dot(a, b) / lengths)
        };
        let alone = similarity(5, 3, 1, row);
        for (at, &cell) in alone.iter().enumerate() {
            match cosine(at / 5, at % 5) {
                Some(expected) => assert!((f64::from(cell) - expected).abs() < 1e-6),
                None => assert!(cell.is_nan()),
            }
        }
        for token in 0..5 {
            for (at, found) in cosines(5, token, row).into_iter().enumerate() {
                assert!(
                    (found - alone[token * 5 + at]).abs() < 1e-6 || (found.is_nan() && alone[token * 5 + at].is_nan())
                );
            }
        }
        for pool in [2, 3, 5] {
            let blocks = 5usize.div_ceil(pool);
            for (at, &cell) in similarity(5, 3, pool, row).iter().enumerate() {
                let tokens = |block: usize| block * pool..((block + 1) * pool).min(5);
                let pairs = tokens(at / blocks).flat_map(|i| tokens(at % blocks).map(move |j| (i, j)));
                let cosines: Vec<f64> = pairs.filter(|(i, j)| i != j).filter_map(|(i, j)| cosine(i, j)).collect();
                let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
                assert!(
                    if mean.is_nan() { cell.is_nan() } else { (f64::from(cell) - mean).abs() < 1e-6 },
                    "{pool}, {at}"
                );
            }
        }
    }

    #[test]
    fn v3_keeps_70_kilobytes_a_token_at_half_precision() {
        let shape = crate::synthetic::Shape::full();
        let bytes = CacheBytes::of(&shape.subject().model, "fast").unwrap();
        assert_eq!((bytes.latent(1), bytes.plain(1)), (576 * 2 * 61, 128 * 320 * 2 * 61));
        assert!((bytes.ratio() - 71.1).abs() < 0.1);
        assert_eq!(CacheBytes::of(&shape.subject().model, "other"), None);
        assert_eq!(bytes.latent(u64::MAX), u64::MAX);
    }
}
