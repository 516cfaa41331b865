//! How evenly work is spread: over the experts of a layer, over groups of experts, over GPUs.

/// An expert is hot if it got more than this many times the mean.
pub const HOT: f64 = 2.0;

/// How evenly a layer's experts are loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// Sum of the load.
    pub total: f64,
    /// Entropy of the load in bits; the logarithm of the number of experts if all get the same.
    pub entropy_bits: f64,
    /// Entropy as a share of the most that is possible.
    pub entropy_share: f64,
    /// Gini coefficient: 0 if all get the same, near 1 if one gets everything.
    pub gini: f64,
    /// Share that the most loaded tenth of the experts (rounded up) gets.
    pub top_share: f64,
    /// Experts without load.
    pub dead: Vec<u32>,
    /// Experts with more than [`HOT`] times the mean, hottest first.
    pub hot: Vec<u32>,
    /// The expert with the most load (the first of several).
    pub hottest: u32,
    /// Mean over largest load: 1 if all get the same.
    pub balancedness: f64,
}

/// How evenly loads `[experts]`, which are not negative, are spread; `None` if there is no load.
pub fn balance(loads: &[f64]) -> Option<Balance> {
    let total: f64 = loads.iter().sum();
    if !(total.is_finite() && total > 0.0) {
        return None;
    }
    let count = loads.len() as f64;
    let mean = total / count;
    let shares = loads.iter().filter(|load| **load > 0.0).map(|load| load / total);
    let entropy_bits = -shares.map(|share| share * share.log2()).sum::<f64>();
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|&a, &b| loads[b].total_cmp(&loads[a]));
    let tenth = loads.len().div_ceil(10);
    let top: f64 = order[..tenth].iter().map(|&expert| loads[expert]).sum();
    // With loads in falling order, the i-th (from 0) is exceeded or equalled by i others.
    let ranked: f64 = order.iter().enumerate().map(|(rank, &expert)| (count - rank as f64) * loads[expert]).sum();
    let hot = order.iter().take_while(|&&expert| loads[expert] > HOT * mean);
    Some(Balance {
        total,
        entropy_bits: entropy_bits.max(0.0),
        entropy_share: if loads.len() > 1 { (entropy_bits / count.log2()).clamp(0.0, 1.0) } else { 1.0 },
        gini: (2.0 * ranked / (count * total) - (count + 1.0) / count).max(0.0),
        top_share: top / total,
        dead: (0..loads.len()).filter(|&expert| loads[expert] <= 0.0).map(|expert| expert as u32).collect(),
        hot: hot.map(|&expert| expert as u32).collect(),
        hottest: order[0] as u32,
        balancedness: balancedness(loads),
    })
}

/// Mean over largest load; 1 if all are the same or there is none.
pub fn balancedness(loads: &[f64]) -> f64 {
    let largest = loads.iter().copied().fold(0.0, f64::max);
    if largest > 0.0 { loads.iter().sum::<f64>() / loads.len() as f64 / largest } else { 1.0 }
}

/// Load of each group of consecutive experts. Groups that do not divide the experts count as one.
pub fn by_group(loads: &[f64], groups: usize) -> Vec<f64> {
    let groups = if groups > 0 && loads.len().is_multiple_of(groups) { groups } else { 1 };
    loads.chunks((loads.len() / groups).max(1)).map(|group| group.iter().sum()).collect()
}

/// Load of each GPU if consecutive experts are shared out evenly, without replicas. Where the GPUs do not divide the
/// experts, some get one expert more than others.
pub fn contiguous(loads: &[f64], gpus: usize) -> Vec<f64> {
    let mut sums = vec![0.0; gpus];
    for (expert, load) in loads.iter().enumerate() {
        sums[expert * gpus / loads.len()] += load;
    }
    sums
}

/// How many experts stay without a token by chance if a router gives each of `tokens` tokens `top_k` of `experts` experts
/// without preference. Tells whether experts that were never used mean anything yet.
pub fn unused_by_chance(experts: usize, top_k: usize, tokens: f64) -> f64 {
    let count = experts as f64;
    count * (1.0 - (top_k as f64 / count).min(1.0)).powf(tokens)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "the numbers are chosen so that results are exact")]
mod tests {
    use super::*;

    /// Loads without structure.
    fn loads(count: u64, seed: u64) -> Vec<f64> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 97) as f64).collect()
    }

    #[test]
    fn even_loads_are_balanced_and_one_expert_alone_is_not() {
        let even = balance(&[3.0; 8]).unwrap();
        assert_eq!((even.entropy_bits, even.entropy_share, even.gini, even.balancedness), (3.0, 1.0, 0.0, 1.0));
        assert!(even.dead.is_empty() && even.hot.is_empty());
        let alone = balance(&[0.0, 0.0, 9.0, 0.0]).unwrap();
        assert_eq!((alone.entropy_bits, alone.gini, alone.top_share, alone.balancedness), (0.0, 0.75, 1.0, 0.25));
        assert_eq!((alone.dead, alone.hot, alone.hottest), (vec![0, 1, 3], vec![2], 2));
    }

    #[test]
    fn nothing_and_nonsense_are_no_load() {
        for none in [&[][..], &[0.0, 0.0], &[f64::NAN, 1.0], &[f64::INFINITY, 1.0]] {
            assert_eq!(balance(none), None, "{none:?}");
        }
        assert_eq!(balance(&[5.0]).unwrap().entropy_share, 1.0);
    }

    #[test]
    fn gini_is_half_the_mean_difference_over_the_mean() {
        for seed in 0..5 {
            let loads = loads(23, seed);
            let mean = loads.iter().sum::<f64>() / 23.0;
            let differences: f64 = loads.iter().flat_map(|a| loads.iter().map(move |b| (a - b).abs())).sum();
            let expected = differences / (2.0 * 23.0 * 23.0 * mean);
            assert!((balance(&loads).unwrap().gini - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn a_tenth_is_rounded_up_and_hot_is_more_than_twice_the_mean() {
        // Mean 2: 4 is twice the mean and not more.
        let found = balance(&[4.0, 5.0, 0.0, 1.0, 1.0, 1.0, 3.0, 1.0, 2.0, 1.0, 3.0]).unwrap();
        assert_eq!(found.hot, [1]);
        assert_eq!(found.top_share, 9.0 / 22.0);
    }

    #[test]
    fn groups_and_gpus_add_up() {
        let loads = loads(24, 3);
        assert_eq!(by_group(&loads, 4)[1], loads[6..12].iter().sum::<f64>());
        assert_eq!(by_group(&loads, 5), [loads.iter().sum::<f64>()]);
        for gpus in [1, 3, 5, 24, 40] {
            let placed = contiguous(&loads, gpus);
            assert_eq!((placed.len(), placed.iter().sum::<f64>()), (gpus, loads.iter().sum::<f64>()), "{gpus}");
        }
        assert_eq!(contiguous(&[1.0, 2.0, 4.0, 8.0], 2), [3.0, 12.0]);
    }

    #[test]
    fn chance_leaves_few_experts_unused() {
        assert_eq!(unused_by_chance(256, 8, 0.0), 256.0);
        assert!((unused_by_chance(4, 1, 2.0) - 2.25).abs() < 1e-12);
        assert_eq!(unused_by_chance(4, 4, 1.0), 0.0);
    }
}
