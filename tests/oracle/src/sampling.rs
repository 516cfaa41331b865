//! The reference of the sampler: which tokens may be drawn, and with what probability.
//!
//! Order: bias and mask ([`constrain`]), repetition penalty, temperature, top-k, top-p over what remains renormalised, min-p. Tokens are taken in
//! descending order of logit, the lower id first among equals, so at every threshold ties keep the lowest ids.

use crate::{ops, router};

/// Sampler settings; [`SamplingParams::default`] leaves the distribution alone.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 means greedy.
    pub temperature: f64,
    /// Tokens kept by rank; 0 means all.
    pub top_k: usize,
    /// Cumulative probability to reach; 1 or more means all.
    pub top_p: f64,
    /// Least probability, as a fraction of the greatest; 0 means all.
    pub min_p: f64,
    /// Hugging Face rule for tokens already seen: logit / p if positive, else logit · p; 1 means none.
    pub repetition_penalty: f64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub token: usize,
    /// Its probability; those of all candidates sum to 1.
    pub probability: f64,
}

/// Logits `[V]` after bias (what is added to which token) and mask (the tokens that may be drawn; without it, all). What
/// cannot be drawn is −∞: tokens outside the mask, and those whose logit is NaN or −∞, whatever their bias.
pub fn constrain(logits: &[f64], mask: Option<&[usize]>, bias: &[(usize, f64)]) -> Vec<f64> {
    let constrain = |(t, &x): (usize, &f64)| {
        if x.is_nan() || mask.is_some_and(|mask| !mask.contains(&t)) {
            return f64::NEG_INFINITY;
        }
        x + bias.iter().filter(|(token, _)| *token == t).map(|(_, bias)| bias).sum::<f64>()
    };
    logits.iter().enumerate().map(constrain).collect()
}

/// Logits `[V]` after the repetition penalty; a token seen twice is penalised once.
pub fn penalise(logits: &[f64], seen: &[usize], penalty: f64) -> Vec<f64> {
    let penalise = |(t, &x): (usize, &f64)| match (seen.contains(&t), x > 0.0) {
        (false, _) => x,
        (true, true) => x / penalty,
        (true, false) => x * penalty,
    };
    logits.iter().enumerate().map(penalise).collect()
}

/// The tokens that may follow, most probable first, from logits `[V]` and the ids seen so far.
pub fn candidates(logits: &[f64], seen: &[usize], params: &SamplingParams) -> Vec<Candidate> {
    let logits = penalise(logits, seen, params.repetition_penalty);
    let greedy = params.temperature == 0.0;
    let limit = match (greedy, params.top_k) {
        (true, _) => 1,
        (false, 0) => logits.len(),
        (false, k) => k.min(logits.len()),
    };
    let kept = router::top_k(&logits, limit);
    let temperature = if greedy { 1.0 } else { params.temperature };
    let scaled: Vec<f64> = kept.iter().map(|&t| logits[t] / temperature).collect();
    let mut kept: Vec<Candidate> = kept
        .into_iter()
        .zip(ops::softmax(&scaled))
        .map(|(token, probability)| Candidate { token, probability })
        .collect();
    kept.truncate(nucleus(&kept, params.top_p));
    let threshold = params.min_p * kept[0].probability;
    // min-p compares with the greatest probability, so whether it sees them renormalised makes no difference; the
    // first candidate stays whatever the setting.
    let mut first = true;
    kept.retain(|c| std::mem::take(&mut first) || c.probability >= threshold);
    let sum: f64 = kept.iter().map(|c| c.probability).sum();
    kept.iter().map(|c| Candidate { probability: c.probability / sum, ..*c }).collect()
}

/// Size of the smallest leading set whose probability reaches `top_p`, at least 1.
fn nucleus(sorted: &[Candidate], top_p: f64) -> usize {
    if top_p >= 1.0 {
        return sorted.len(); // not left to rounding of the sum
    }
    let mut sum = 0.0;
    let reaches = |c: &Candidate| {
        sum += c.probability;
        sum >= top_p
    };
    sorted.iter().position(reaches).map_or(sorted.len(), |i| i + 1)
}

/// 32 bits for a token (PCG4D of Jarzynski and Olano, "Hash Functions for GPU Rendering", 2020, with a third round).
pub fn hash(seed: u64, position: u32, token: u32) -> u32 {
    let step = |x: u32| x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let [mut x, mut y, mut z, mut w] = [seed as u32, (seed >> 32) as u32, position, token].map(step);
    for _ in 0..3 {
        x = x.wrapping_add(y.wrapping_mul(w));
        y = y.wrapping_add(z.wrapping_mul(x));
        z = z.wrapping_add(x.wrapping_mul(y));
        w = w.wrapping_add(y.wrapping_mul(z));
        [x, y, z, w] = [x, y, z, w].map(|word| word ^ word >> 16);
    }
    x
}

/// The draw, a race (Gumbel-max): each candidate has an exponential time by seed, position and token; the one whose time
/// divided by its probability is least wins. Returns it and its lead: how much less the logarithm is than the second's.
///
/// Two distributions that are drawn from at one seed and position mostly give the same token, with a probability of at
/// least (1 − d) / (1 + d), where d is their total variation distance (Daliri, Musco, Suresh 2024, "Coupling without
/// communication and drafter-invariant speculative decoding").
pub fn draw(candidates: &[Candidate], seed: u64, position: u32) -> (usize, f64) {
    let log_time = |token: usize| {
        let v =
            (f64::from(hash(seed, position, token as u32)) / 2f64.powi(32)).clamp(2f64.powi(-33), 1.0 - 2f64.powi(-24));
        (-(-v).ln_1p()).ln()
    };
    let times = candidates.iter().map(|c| (log_time(c.token) - c.probability.ln(), c.token));
    let mut times: Vec<(f64, usize)> = times.collect();
    times.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    (times[0].1, times.get(1).map_or(f64::INFINITY, |second| second.0 - times[0].0))
}

/// The same as a distribution over the vocabulary, `[V]`, zero where a token may not be drawn.
pub fn distribution(logits: &[f64], seen: &[usize], params: &SamplingParams) -> Vec<f64> {
    let mut out = vec![0.0; logits.len()];
    for c in candidates(logits, seen, params) {
        out[c.token] = c.probability;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Candidates of logits ln(weights) as (token, probability in whole percents).
    fn percents(weights: &[f64], seen: &[usize], params: &SamplingParams) -> Vec<(usize, u32)> {
        let logits: Vec<f64> = weights.iter().map(|w| w.ln()).collect();
        let kept = candidates(&logits, seen, params);
        kept.iter().map(|c| (c.token, (c.probability * 100.0).round() as u32)).collect()
    }

    #[test]
    fn defaults_change_nothing() {
        let kept = percents(&[0.1, 0.6, 0.3], &[0, 1], &SamplingParams::default());
        assert_eq!(kept, [(1, 60), (2, 30), (0, 10)]);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        assert_eq!(percents(&[0.2, 0.4, 0.4], &[], &params), [(1, 100)]);
    }

    #[test]
    fn top_k_keeps_the_lowest_ids_at_the_threshold() {
        let params = SamplingParams { top_k: 2, ..SamplingParams::default() };
        assert_eq!(percents(&[0.2, 0.2, 0.4, 0.2], &[], &params), [(2, 67), (0, 33)]);
    }

    #[test]
    fn top_p_works_on_what_top_k_left() {
        // After top-k: 4/7, 2/7, 1/7; the first alone misses 0.8, two reach it; without top-k three would be needed.
        let params = SamplingParams { top_k: 3, top_p: 0.8, ..SamplingParams::default() };
        assert_eq!(percents(&[0.4, 0.2, 0.1, 0.1, 0.1, 0.1], &[], &params), [(0, 67), (1, 33)]);
        let params = SamplingParams { top_p: 0.0, ..SamplingParams::default() };
        assert_eq!(percents(&[0.4, 0.6], &[], &params), [(1, 100)]);
    }

    #[test]
    fn min_p_is_relative_to_the_greatest() {
        let params = SamplingParams { min_p: 0.4, ..SamplingParams::default() };
        assert_eq!(percents(&[0.48, 0.32, 0.19, 0.01], &[], &params), [(0, 60), (1, 40)]);
    }

    /// A race of three for many positions: each wins as often as it should, and two races of close distributions mostly
    /// have one winner.
    #[test]
    fn races_are_fair_and_alike() {
        let of = |weights: [f64; 3]| {
            let logits: Vec<f64> = weights.iter().map(|w| w.ln()).collect();
            candidates(&logits, &[], &SamplingParams::default())
        };
        let (p, q) = (of([0.5, 0.3, 0.2]), of([0.4, 0.3, 0.3]));
        let (mut wins, mut alike, races) = ([0.0; 3], 0.0, 40_000);
        for position in 0..races {
            let winner = draw(&p, 5, position).0;
            wins[winner] += 1.0 / f64::from(races);
            alike += f64::from(u8::from(winner == draw(&q, 5, position).0)) / f64::from(races);
        }
        assert!(wins.iter().zip([0.5, 0.3, 0.2]).all(|(won, p)| (won - p).abs() < 0.01), "{wins:?}");
        assert!((0.9 / 1.1 - 0.01..0.91).contains(&alike), "{alike}");
        assert_eq!(draw(&p[..1], 5, 0), (0, f64::INFINITY));
    }

    #[test]
    fn what_is_outside_the_mask_or_no_number_stays_out_whatever_its_bias() {
        let (nan, infinity) = (f64::NAN, f64::INFINITY);
        let logits = [1.0, nan, -infinity, infinity, 2.0, 3.0];
        let bias = [(0, 0.5), (1, 100.0), (2, 100.0), (3, -100.0), (4, 100.0)];
        let all = constrain(&logits, None, &bias);
        assert_eq!(all, [1.5, -infinity, -infinity, infinity, 102.0, 3.0]);
        let some = constrain(&logits, Some(&[0, 1, 5]), &bias);
        assert_eq!(some, [1.5, -infinity, -infinity, -infinity, -infinity, 3.0]);
    }

    #[test]
    fn penalty_moves_both_signs_down_and_comes_before_temperature() {
        assert_eq!(penalise(&[2.0, -2.0, 1.0], &[0, 1, 1], 2.0), [1.0, -4.0, 1.0]);
        let params = SamplingParams { repetition_penalty: 2.0, temperature: 0.5, ..SamplingParams::default() };
        let d = distribution(&[2.0, 0.0], &[0], &params);
        let expected = ops::sigmoid(2.0);
        assert!((d[0] - expected).abs() < 1e-12);
    }
}
