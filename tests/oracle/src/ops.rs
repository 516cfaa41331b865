//! The operations of the model as pure functions on row-major f64 slices. Spec §§3–5.
//!
//! `[T, K]` means T rows of K numbers; the number of rows follows from the slice's length. A slice that does not fit
//! its stated shape panics.

/// Dot product, in four partial sums so that it is not slow.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "dot product of different lengths");
    let mut sums = [0.0; 4];
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let tail: f64 = a4.remainder().iter().zip(b4.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a4.zip(b4) {
        for i in 0..4 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f64>() + tail
}

/// Elementwise a + b.
pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len(), "sum of different lengths");
    a.iter().zip(b).map(|(x, y)| x + y).collect()
}

/// `acc += factor · x`, elementwise.
pub fn add_scaled(acc: &mut [f64], factor: f64, x: &[f64]) {
    assert_eq!(acc.len(), x.len(), "sum of different lengths");
    for (a, x) in acc.iter_mut().zip(x) {
        *a += factor * x;
    }
}

/// Rows [T, D] of `table` [V, D] with D = `width`, for token ids `[T]`.
pub fn embed(table: &[f64], width: usize, tokens: &[u32]) -> Vec<f64> {
    tokens.iter().flat_map(|&t| &table[t as usize * width..][..width]).copied().collect()
}

/// [T, A] and [T, B] side by side, [T, A+B], with A = `a_width` and B = `b_width`.
pub fn concat_rows(a: &[f64], a_width: usize, b: &[f64], b_width: usize) -> Vec<f64> {
    assert_eq!(a.len() / a_width, b.len() / b_width, "different numbers of rows");
    let rows = a.chunks_exact(a_width).zip(b.chunks_exact(b_width));
    rows.flat_map(|(a, b)| a.iter().chain(b)).copied().collect()
}

/// [T, W] cut after column `at`: ([T, at], [T, W − at]), with W = `width`.
pub fn split_rows(x: &[f64], width: usize, at: usize) -> (Vec<f64>, Vec<f64>) {
    let rows = || x.chunks_exact(width);
    (rows().flat_map(|r| &r[..at]).copied().collect(), rows().flat_map(|r| &r[at..]).copied().collect())
}

/// Index of the largest value, the lowest such index.
pub fn argmax(row: &[f64]) -> usize {
    assert!(!row.is_empty(), "argmax of nothing");
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// RMS(x; w) of spec §3 on rows x [T, D], w `[D]`: w_i · x_i / sqrt(mean x² + eps).
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    assert_eq!(x.len() % w.len(), 0, "x is not whole rows of {}", w.len());
    let norm = |row: &[f64]| {
        let scale = 1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt();
        row.iter().zip(w).map(|(x, w)| w * (x * scale)).collect::<Vec<_>>()
    };
    x.chunks_exact(w.len()).flat_map(norm).collect()
}

/// y = x Wᵀ (+ b): x [T, K] with K = `inputs`, w [N, K], bias `[N]` → [T, N].
pub fn linear(x: &[f64], w: &[f64], bias: Option<&[f64]>, inputs: usize) -> Vec<f64> {
    assert_eq!(x.len() % inputs, 0, "x is not whole rows of {inputs}");
    assert_eq!(w.len() % inputs, 0, "w is not whole rows of {inputs}");
    let project = |row| w.chunks_exact(inputs).map(move |out| dot(row, out));
    let product = x.chunks_exact(inputs).flat_map(project).collect::<Vec<_>>();
    match bias {
        None => product,
        Some(bias) => product.chunks_exact(bias.len()).flat_map(|row| add(row, bias)).collect(),
    }
}

/// 1 / (1 + e^−x).
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// x · sigmoid(x).
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// silu(gate) ⊙ up, elementwise (spec §3).
pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    assert_eq!(gate.len(), up.len(), "gate and up differ");
    gate.iter().zip(up).map(|(&g, u)| silu(g) * u).collect()
}

/// MLP(x) of spec §3: x [T, D] with D = `hidden`, gate and up [I, D], down [D, I] → [T, D].
pub fn mlp(x: &[f64], gate: &[f64], up: &[f64], down: &[f64], hidden: usize) -> Vec<f64> {
    let inner = swiglu(&linear(x, gate, None, hidden), &linear(x, up, None, hidden));
    linear(&inner, down, None, down.len() / hidden)
}

/// Softmax of one row. −∞ gives 0; at least one value must be finite.
pub fn softmax(row: &[f64]) -> Vec<f64> {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    assert!(largest.is_finite(), "softmax of a row without a finite maximum");
    let exps: Vec<f64> = row.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

/// Rotates one row x `[d]` in place by cos, sin [d/2] (spec §4): pair i is (2i, 2i+1) if `interleave`, else (i, i+d/2).
pub fn rotate(x: &mut [f64], cos: &[f64], sin: &[f64], interleave: bool) {
    let half = x.len() / 2;
    assert_eq!((cos.len(), sin.len()), (half, half), "cos and sin are not half a row");
    for i in 0..half {
        let (first, second) = if interleave { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (a, b) = (x[first], x[second]);
        x[first] = a * cos[i] - b * sin[i];
        x[second] = b * cos[i] + a * sin[i];
    }
}

/// Shape of an MLA layer (spec §5).
#[derive(Debug, Clone, PartialEq)]
pub struct MlaDims {
    /// H.
    pub heads: usize,
    /// dn, query and key numbers without position.
    pub nope: usize,
    /// dr, query and key numbers that RoPE rotates.
    pub rope: usize,
    /// dv, value numbers.
    pub value: usize,
    /// r, latent numbers.
    pub latent: usize,
    /// `softmax_scale` of spec §4.
    pub scale: f64,
}

/// The latent cache of one layer: S rows in any order, each with its position.
#[derive(Debug, Clone, Copy)]
pub struct LatentRows<'a> {
    /// c, normalised, [S, r].
    pub c: &'a [f64],
    /// k_rope, rotated, [S, dr].
    pub k_rope: &'a [f64],
    /// Position of each row, `[S]`.
    pub positions: &'a [usize],
}

impl LatentRows<'_> {
    /// Attention probabilities `[S]` of a query at `position` from its unscaled scores: causal by position.
    fn probabilities(&self, position: usize, scale: f64, score: impl Fn(usize) -> f64) -> Vec<f64> {
        let masked = |(s, &p): (usize, &usize)| {
            if p <= position { score(s) * scale } else { f64::NEG_INFINITY }
        };
        softmax(&self.positions.iter().enumerate().map(masked).collect::<Vec<_>>())
    }
}

/// Naive causal MLA (spec §5): every key and value is expanded from its latent.
///
/// `q` [T, H, dn+dr] with the last dr numbers already rotated, `q_positions` `[T]`, `kv_b` [H(dn+dv), r] → [T, H·dv].
pub fn mla_naive(dims: &MlaDims, kv_b: &[f64], q: &[f64], q_positions: &[usize], cache: &LatentRows) -> Vec<f64> {
    let MlaDims { heads, nope, rope, value, latent, scale } = *dims;
    let expanded = linear(cache.c, kv_b, None, latent);
    // Row s, head h: dn key numbers, then dv value numbers.
    let key_value = |s: usize, h: usize| expanded[(s * heads + h) * (nope + value)..][..nope + value].split_at(nope);
    let mut out = vec![0.0; q_positions.len() * heads * value];
    let outputs = out.chunks_exact_mut(value);
    for (row, (q, o)) in q.chunks_exact(nope + rope).zip(outputs).enumerate() {
        let (t, h) = (row / heads, row % heads);
        let (q_nope, q_rope) = q.split_at(nope);
        let probabilities = cache.probabilities(q_positions[t], scale, |s| {
            dot(q_nope, key_value(s, h).0) + dot(q_rope, &cache.k_rope[s * rope..][..rope])
        });
        for (s, p) in probabilities.into_iter().enumerate() {
            add_scaled(o, p, key_value(s, h).1);
        }
    }
    out
}

/// Absorbed causal MLA (spec §5), the same value reassociated: [`absorb_queries`], [`attend_latent`],
/// [`expand_values`]. Arguments and result as in [`mla_naive`].
pub fn mla_absorbed(dims: &MlaDims, kv_b: &[f64], q: &[f64], q_positions: &[usize], cache: &LatentRows) -> Vec<f64> {
    let (q_nope, q_rope) = split_rows(q, dims.nope + dims.rope, dims.nope);
    let absorbed = absorb_queries(dims, kv_b, &q_nope);
    expand_values(dims, kv_b, &attend_latent(dims, &absorbed, &q_rope, q_positions, cache))
}

/// q̂_h = UK_hᵀ q_nope,h: `q_nope` [T, H, dn], `kv_b` [H(dn+dv), r] → [T, H, r].
pub fn absorb_queries(dims: &MlaDims, kv_b: &[f64], q_nope: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; q_nope.len() / dims.nope * dims.latent];
    for (row, (q, o)) in q_nope.chunks_exact(dims.nope).zip(out.chunks_exact_mut(dims.latent)).enumerate() {
        let head = row % dims.heads * (dims.nope + dims.value);
        for (i, &q) in q.iter().enumerate() {
            add_scaled(o, q, &kv_b[(head + i) * dims.latent..][..dims.latent]);
        }
    }
    out
}

/// ĉ_h = Σ_t p_h(t) c_t with scores (q̂_h · c_t + q_rope,h · k_rope,t) · scale over t at or before the query's position:
/// `q` [T, H, r], `q_rope` [T, H, dr], `q_positions` `[T]` → [T, H, r].
pub fn attend_latent(dims: &MlaDims, q: &[f64], q_rope: &[f64], q_positions: &[usize], cache: &LatentRows) -> Vec<f64> {
    let (r, dr) = (dims.latent, dims.rope);
    let mut out = vec![0.0; q.len()];
    let queries = q.chunks_exact(r).zip(q_rope.chunks_exact(dr));
    for (row, ((q, q_rope), o)) in queries.zip(out.chunks_exact_mut(r)).enumerate() {
        let probabilities = cache.probabilities(q_positions[row / dims.heads], dims.scale, |s| {
            dot(q, &cache.c[s * r..][..r]) + dot(q_rope, &cache.k_rope[s * dr..][..dr])
        });
        for (s, p) in probabilities.into_iter().enumerate() {
            add_scaled(o, p, &cache.c[s * r..][..r]);
        }
    }
    out
}

/// p_h(s), the probabilities of [`attend_latent`] themselves: arguments as there → [H, T, S].
pub fn attention_weights(
    dims: &MlaDims,
    q: &[f64],
    q_rope: &[f64],
    q_positions: &[usize],
    cache: &LatentRows,
) -> Vec<f64> {
    let (r, dr, heads) = (dims.latent, dims.rope, dims.heads);
    let weights = |h: usize, t: usize| {
        let (q, q_rope) = (&q[(t * heads + h) * r..][..r], &q_rope[(t * heads + h) * dr..][..dr]);
        cache.probabilities(q_positions[t], dims.scale, |s| {
            dot(q, &cache.c[s * r..][..r]) + dot(q_rope, &cache.k_rope[s * dr..][..dr])
        })
    };
    (0..heads).flat_map(|h| (0..q_positions.len()).flat_map(move |t| weights(h, t))).collect()
}

/// o_h = UV_h ĉ_h: `attended` [T, H, r], `kv_b` [H(dn+dv), r] → [T, H·dv].
pub fn expand_values(dims: &MlaDims, kv_b: &[f64], attended: &[f64]) -> Vec<f64> {
    let r = dims.latent;
    let expand = |(row, c): (usize, &[f64])| {
        let first = row % dims.heads * (dims.nope + dims.value) + dims.nope;
        linear(c, &kv_b[first * r..][..dims.value * r], None, r)
    };
    attended.chunks_exact(r).enumerate().flat_map(expand).collect()
}
