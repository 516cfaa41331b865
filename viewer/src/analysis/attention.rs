//! Attention weights from absorbed queries and cached latents (spec §5).

use crate::store::Column;

/// Multiplications that [`summary`] may spend; more tokens than that pays for are sampled evenly.
const SUMMARY_PRODUCTS: usize = 1_000_000_000;

/// What queries are multiplied with: `[c_kv ; k_rope]` of the first tokens of a text.
#[derive(Clone, Debug)]
pub struct Keys {
    width: usize,
    /// `[tokens, width]`, zeros where a row is missing.
    cells: Vec<f32>,
    held: Vec<bool>,
}

impl Keys {
    /// The rows of the first `tokens` positions.
    pub fn gather(c_kv: &Column, k_rope: &Column, tokens: usize) -> Self {
        let (rank, width) = (c_kv.columns(), c_kv.columns() + k_rope.columns());
        let mut keys = Self { width, cells: vec![0.0; tokens * width], held: vec![false; tokens] };
        for (position, row) in keys.cells.chunks_exact_mut(width.max(1)).enumerate() {
            if let (Some(latent), Some(rotated)) = (c_kv.floats(position), k_rope.floats(position)) {
                row[..rank].copy_from_slice(latent);
                row[rank..].copy_from_slice(rotated);
                keys.held[position] = true;
            }
        }
        keys
    }

    /// Numbers of a key, `kv_lora_rank + qk_rope_head_dim`.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Rows of the first `tokens` positions that are not held.
    pub fn missing(&self, tokens: usize) -> usize {
        self.held[..tokens].iter().filter(|held| !**held).count()
    }

    /// `softmax(scale · query · key)` over the keys of the first `tokens` positions: `[tokens]`. Where rows are missing
    /// they are NaN, and the others are shares among the rows that are held, thus too large.
    pub fn weights(&self, query: &[f32], tokens: usize, scale: f32) -> Vec<f32> {
        assert_eq!(query.len(), self.width, "numbers of a query");
        let keys = self.cells.chunks_exact(self.width.max(1)).zip(&self.held).take(tokens);
        let scores: Vec<Option<f64>> =
            keys.map(|(key, held)| held.then(|| dot(query, key) * f64::from(scale))).collect();
        let most = scores.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().flatten().map(|score| (score - most).exp()).sum();
        scores.into_iter().map(|score| score.map_or(f32::NAN, |score| ((score - most).exp() / sum) as f32)).collect()
    }
}

/// A product summed in f64, in eight sums so that it runs in vector registers.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (a, rest_a) = a.as_chunks::<8>();
    let (b, rest_b) = b.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    let rest: f64 = rest_a.iter().zip(rest_b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    sums.iter().sum::<f64>() + rest
}

/// Entropy in bits of the weights that are there; 2 to its power is an effective number of tokens.
pub fn entropy(weights: &[f32]) -> f32 {
    let terms = weights.iter().filter(|weight| !weight.is_nan()).map(|&weight| {
        let weight = f64::from(weight);
        if weight > 0.0 { -weight * weight.log2() } else { 0.0 }
    });
    if weights.iter().all(|weight| weight.is_nan()) { f32::NAN } else { terms.sum::<f64>().max(0.0) as f32 }
}

/// What every head of a layer looks at from one token.
#[derive(Clone, Debug, PartialEq)]
pub struct OfToken {
    /// `[heads, tokens]`, NaN where a row is missing.
    pub weights: Vec<f32>,
    /// Tokens of the context, the looking one included.
    pub tokens: usize,
    /// Tokens of the context whose rows are missing.
    pub missing: usize,
    /// Entropy of each head in bits.
    pub entropy: Vec<f32>,
    /// Weight of each head on the first token; NaN if its row is missing.
    pub sink: Vec<f32>,
}

impl OfToken {
    /// The weights of a head.
    pub fn head(&self, head: usize) -> &[f32] {
        self.weights.get(head * self.tokens..(head + 1) * self.tokens).unwrap_or_default()
    }
}

/// The weights of all heads of the token behind `keys`' last: `query` is `[heads, width]`.
pub fn of_token(query: &[f32], keys: &Keys, scale: f32) -> OfToken {
    let tokens = keys.len();
    let mut of =
        OfToken { weights: Vec::new(), tokens, missing: keys.missing(tokens), entropy: Vec::new(), sink: Vec::new() };
    for query in query.chunks_exact(keys.width().max(1)) {
        let weights = keys.weights(query, tokens, scale);
        of.entropy.push(entropy(&weights));
        of.sink.push(weights.first().copied().unwrap_or(f32::NAN));
        of.weights.extend(weights);
    }
    of
}

/// Weights of one head from each token of `window` on each token of it, `[window, window]`: NaN behind the looking
/// token, and where query or key are missing. Keys before the window take part in the softmax but are not shown.
pub fn map(queries: &Column, head: usize, keys: &Keys, window: std::ops::Range<usize>, scale: f32) -> Vec<f32> {
    let (size, width) = (window.len(), keys.width());
    let mut cells = vec![f32::NAN; size * size];
    for (row, position) in window.clone().enumerate() {
        if let Some(query) = queries.floats(position).and_then(|row| row.get(head * width..(head + 1) * width)) {
            let weights = keys.weights(query, position + 1, scale);
            cells[row * size..][..=row].copy_from_slice(&weights[window.start..]);
        }
    }
    cells
}

/// What the heads of a layer do over a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Mean weight of each head on the first token.
    pub sink: Vec<f32>,
    /// Mean entropy of each head in bits.
    pub entropy: Vec<f32>,
    /// Tokens that were looked at.
    pub sampled: usize,
    /// Tokens whose query and whole context are held.
    pub complete: usize,
    /// Tokens of the text.
    pub tokens: usize,
}

/// Means over the tokens of a text whose query and whole context are held; if they are many, over some of them, evenly
/// spaced.
pub fn summary(queries: &Column, keys: &Keys, heads: usize, scale: f32) -> Summary {
    summary_within(queries, keys, heads, scale, SUMMARY_PRODUCTS)
}

fn summary_within(queries: &Column, keys: &Keys, heads: usize, scale: f32, products: usize) -> Summary {
    let end = keys.held.iter().position(|held| !held).unwrap_or(keys.len());
    let looking: Vec<usize> =
        (0..end).filter(|&at| queries.floats(at).is_some_and(|row| row.len() == heads * keys.width())).collect();
    let each = heads * keys.width() * (end / 2).max(1);
    let sampled = (products / each.max(1)).clamp(8, looking.len().max(8)).min(looking.len());
    let (mut sink, mut entropies) = (vec![0.0f64; heads], vec![0.0f64; heads]);
    for i in 0..sampled {
        // The middle of each of so many equal parts.
        let at = looking[(2 * i + 1) * looking.len() / (2 * sampled)];
        let row = queries.floats(at).unwrap_or_default();
        for (head, query) in row.chunks_exact(keys.width().max(1)).enumerate() {
            let weights = keys.weights(query, at + 1, scale);
            sink[head] += f64::from(weights[0]);
            entropies[head] += f64::from(entropy(&weights));
        }
    }
    let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| (sum / sampled as f64) as f32).collect();
    Summary { sink: mean(sink), entropy: mean(entropies), sampled, complete: looking.len(), tokens: keys.len() }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these numbers are exact")]
mod tests {
    use moewe_plan::{TapChoice, TapGroup};

    use super::*;
    use crate::store::{Key, Part, Sequence};
    use crate::synthetic::{self, Shape};

    fn seen(latent: (u32, u32)) -> Sequence {
        let taps: TapChoice = "latents,attention".parse().unwrap();
        let shape = Shape { latent, texts: vec![("a".into(), 70)], taps, ..Shape::small() };
        synthetic::store(&shape).sequence(0).unwrap().clone()
    }

    fn columns(sequence: &Sequence) -> [&Column; 3] {
        [(TapGroup::Latents, Part::CKv), (TapGroup::Latents, Part::KRope), (TapGroup::Attention, Part::Query)]
            .map(|(group, part)| sequence.column(Key::layer(group, 1, part)).unwrap())
    }

    /// As the formula says, without blocks, lanes or a maximum.
    fn naive(sequence: &Sequence, head: usize, position: usize, scale: f64) -> Vec<f64> {
        let [c_kv, k_rope, query] = columns(sequence);
        let width = c_kv.columns() + k_rope.columns();
        let score = |t: usize| {
            let key = c_kv.floats(t).unwrap().iter().chain(k_rope.floats(t).unwrap());
            let query = &query.floats(position).unwrap()[head * width..][..width];
            scale * query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
        };
        let powers: Vec<f64> = (0..=position).map(|t| score(t).exp()).collect();
        powers.iter().map(|power| power / powers.iter().sum::<f64>()).collect()
    }

    #[test]
    fn weights_are_those_of_the_formula() {
        // 21 + 6 numbers are no multiple of the eight lanes.
        for latent in [(16, 8), (21, 6), (3, 2)] {
            let sequence = seen(latent);
            let [c_kv, k_rope, query] = columns(&sequence);
            for position in [0, 1, 63, 64, 69] {
                let keys = Keys::gather(c_kv, k_rope, position + 1);
                let of = of_token(query.floats(position).unwrap(), &keys, 0.3);
                assert_eq!((of.tokens, of.missing, of.sink.len()), (position + 1, 0, 4));
                for head in 0..4 {
                    let expected = naive(&sequence, head, position, f64::from(0.3f32));
                    assert_eq!(of.head(head).len(), expected.len());
                    for (found, expected) in of.head(head).iter().zip(&expected) {
                        assert!((f64::from(*found) - expected).abs() < 1e-7, "{latent:?} {position} {head}");
                    }
                    let bits: f64 = expected.iter().map(|p| -p * p.log2()).sum();
                    assert!((f64::from(of.entropy[head]) - bits).abs() < 1e-5);
                    assert!((f64::from(of.sink[head]) - expected[0]).abs() < 1e-7);
                }
                assert!(of.head(4).is_empty());
            }
        }
    }

    #[test]
    fn maps_show_the_window_of_weights_over_the_whole_context() {
        let sequence = seen((16, 8));
        let [c_kv, k_rope, query] = columns(&sequence);
        let keys = Keys::gather(c_kv, k_rope, 70);
        let cells = map(query, 2, &keys, 60..70, 0.3);
        for row in 0..10 {
            let expected = naive(&sequence, 2, 60 + row, f64::from(0.3f32));
            for column in 0..10 {
                let cell = cells[row * 10 + column];
                match expected.get(60 + column) {
                    Some(expected) => assert!((f64::from(cell) - expected).abs() < 1e-7),
                    None => assert!(cell.is_nan()),
                }
            }
        }
    }

    #[test]
    fn summaries_are_means_and_say_how_many_tokens_they_saw() {
        let sequence = seen((16, 8));
        let [c_kv, k_rope, query] = columns(&sequence);
        let keys = Keys::gather(c_kv, k_rope, 70);
        let all = summary(query, &keys, 4, 0.3);
        assert_eq!((all.sampled, all.complete, all.tokens), (70, 70, 70));
        let mean = (0..70).map(|at| naive(&sequence, 1, at, f64::from(0.3f32))[0]).sum::<f64>() / 70.0;
        assert!((f64::from(all.sink[1]) - mean).abs() < 1e-6);
        let some = summary_within(query, &keys, 4, 0.3, 4 * 24 * 35 * 10);
        assert_eq!((some.sampled, some.complete), (10, 70));
        let positions = (0..10).map(|i| (2 * i + 1) * 70 / 20);
        let mean = positions.map(|at| naive(&sequence, 1, at, f64::from(0.3f32))[0]).sum::<f64>() / 10.0;
        assert!((f64::from(some.sink[1]) - mean).abs() < 1e-6);
    }

    #[test]
    fn missing_rows_are_counted_and_leave_gaps() {
        let sequence = seen((16, 8));
        let [c_kv, k_rope, query] = columns(&sequence);
        let mut keys = Keys::gather(c_kv, k_rope, 20);
        keys.held[7] = false;
        let of = of_token(query.floats(19).unwrap(), &keys, 0.3);
        assert_eq!(of.missing, 1);
        assert!(of.head(0)[7].is_nan());
        let held: f32 = of.head(0).iter().filter(|weight| !weight.is_nan()).sum();
        assert!((held - 1.0).abs() < 1e-5);
        let summary = summary(query, &keys, 4, 0.3);
        assert_eq!((summary.complete, summary.sampled, summary.tokens), (7, 7, 20), "only those before the gap");
        // Rows that never came: nothing is known.
        let keys = Keys::gather(c_kv, k_rope, 0);
        assert_eq!(super::summary(query, &keys, 4, 0.3).sampled, 0);
        assert_eq!(Keys::gather(c_kv, k_rope, 75).missing(75), 5);
    }

    #[test]
    fn extreme_scores_stay_numbers_and_hostile_ones_do_not_panic() {
        let mut keys = Keys { width: 2, cells: vec![3e38, 3e38, -3e38, 1.0, 1.0, 1.0], held: vec![true; 3] };
        assert_eq!(keys.weights(&[3e38, 1.0], 3, 1.0), [1.0, 0.0, 0.0]);
        assert_eq!(entropy(&keys.weights(&[0.0, 0.0], 3, 1.0)), 3f32.log2());
        keys.cells[2] = f32::NAN;
        assert!(keys.weights(&[1.0, 1.0], 3, 1.0).iter().all(|weight| weight.is_nan()));
        assert!(entropy(&[f32::NAN]).is_nan() && entropy(&[]).is_nan());
    }
}
