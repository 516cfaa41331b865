//! What a row of logits says: the likeliest tokens, how sure it is, and what it says of one token.

use crate::{ops, router};

/// What a row of logits says.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The likeliest tokens, best first, ties to the lowest id.
    pub ids: Vec<usize>,
    /// Their probabilities.
    pub probs: Vec<f64>,
    /// Entropy in nats.
    pub entropy: f64,
    /// Log probability of the token asked for, and how many tokens come before it.
    pub asked: Option<(f64, usize)>,
}

/// The `k` likeliest tokens (fewer if there are fewer) of logits `[V]`, and what they say of the token `asked`. NaN counts
/// as −∞; −∞ and ∞ count as the lowest and the largest number of f32, so that there always is a distribution.
pub fn predict(logits: &[f64], k: usize, asked: Option<usize>) -> Prediction {
    let largest = f64::from(f32::MAX);
    let number = |x: &f64| if x.is_nan() { -largest } else { x.clamp(-largest, largest) };
    let logits: Vec<f64> = logits.iter().map(number).collect();
    let order = router::top_k(&logits, logits.len());
    let probabilities = ops::softmax(&logits);
    let best = logits[order[0]];
    let log_sum = logits.iter().map(|x| (x - best).exp()).sum::<f64>().ln();
    let log_probability = |id: usize| logits[id] - best - log_sum;
    let surprise = |id: usize| if probabilities[id] > 0.0 { -probabilities[id] * log_probability(id) } else { 0.0 };
    let rank = |id: usize| order.iter().position(|&other| other == id).expect("a token of the vocabulary");
    let ids: Vec<usize> = order.iter().copied().take(k).collect();
    Prediction {
        probs: ids.iter().map(|&id| probabilities[id]).collect(),
        entropy: (0..logits.len()).map(surprise).sum(),
        asked: asked.map(|id| (log_probability(id), rank(id))),
        ids,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likeliest_tokens_entropy_and_rank() {
        let even = predict(&[2.0, 2.0, f64::NAN, 2.0, 2.0, f64::NEG_INFINITY], 3, Some(4));
        assert_eq!(even.ids, [0, 1, 3]);
        assert!(even.probs.iter().all(|p| (p - 0.25).abs() < 1e-12));
        assert!((even.entropy - 4f64.ln()).abs() < 1e-12);
        let (log_probability, rank) = even.asked.expect("asked");
        assert!((log_probability + 4f64.ln()).abs() < 1e-12 && rank == 3);
        let nothing = predict(&[f64::NAN; 2], 8, None);
        assert_eq!((nothing.ids, nothing.probs, nothing.asked), (vec![0, 1], vec![0.5, 0.5], None));
    }
}
