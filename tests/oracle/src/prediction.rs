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

/// Log probabilities that a row of logits gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token that was drawn, if one was.
    pub drawn: Option<f64>,
    /// The likeliest tokens, best first, ties to the lowest id.
    pub top: Vec<(usize, f64)>,
}

/// What NaN and infinities count as: −∞ and ∞ as the lowest and the largest number of f32, NaN as −∞, so that there always
/// is a distribution.
fn numbers(logits: &[f64]) -> Vec<f64> {
    let largest = f64::from(f32::MAX);
    logits.iter().map(|x| if x.is_nan() { -largest } else { x.clamp(-largest, largest) }).collect()
}

/// The natural logarithm of the softmax of numbers.
fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = logits.iter().map(|x| (x - best).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - best - log_sum).collect()
}

/// Log probabilities of the token `drawn` and of the `k` likeliest (fewer if there are fewer) of logits `[V]`, none below
/// the lowest number of f32. NaN and infinities count as in [`predict`].
pub fn logprobs(logits: &[f64], k: usize, drawn: Option<usize>) -> Logprobs {
    let logits = numbers(logits);
    let logs: Vec<f64> = log_softmax(&logits).into_iter().map(|log| log.max(-f64::from(f32::MAX))).collect();
    let top = router::top_k(&logits, k.min(logits.len())).into_iter().map(|id| (id, logs[id])).collect();
    Logprobs { drawn: drawn.map(|id| logs[id]), top }
}

/// The `k` likeliest tokens (fewer if there are fewer) of logits `[V]`, and what they say of the token `asked`. NaN counts
/// as −∞; −∞ and ∞ count as the lowest and the largest number of f32, so that there always is a distribution.
pub fn predict(logits: &[f64], k: usize, asked: Option<usize>) -> Prediction {
    let logits = numbers(logits);
    let order = router::top_k(&logits, logits.len());
    let probabilities = ops::softmax(&logits);
    let logs = log_softmax(&logits);
    let log_probability = |id: usize| logs[id];
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
        let told = logprobs(&[2.0, 2.0, f64::NAN, 2.0, 2.0, f64::NEG_INFINITY], 3, Some(2));
        assert_eq!(told.top.iter().map(|top| top.0).collect::<Vec<_>>(), [0, 1, 3]);
        assert!(told.top.iter().all(|(_, log)| (log + 4f64.ln()).abs() < 1e-12));
        assert_eq!(told.drawn, Some(-f64::from(f32::MAX)));
        assert_eq!(logprobs(&[1.0], 20, None), Logprobs { drawn: None, top: vec![(0, 0.0)] });
        let nothing = predict(&[f64::NAN; 2], 8, None);
        assert_eq!((nothing.ids, nothing.probs, nothing.asked), (vec![0, 1], vec![0.5, 0.5], None));
    }
}
