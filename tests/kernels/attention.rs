//! `absorb_query`, `absorb_output`, `latent_write` and `absorb_write`.

use moewe_oracle::ops::{self, MlaDims};
use moewe_oracle::rope::{RopeParams, Yarn};
use moewe_plan::{Latent, WeightFormat};
use moewe_shaders::Variant;

use super::cache::{Cache, group};
use super::data::{FORMATS, Matrix, Rng, assert_agrees, compare, f64s, magnitudes};
use super::harness::{Call, Outputs, UNTOUCHED, bits, subgroup, ways};
use super::skipped::skipped;

const PAGE: usize = 64;
const EPS: f64 = 1e-6;

/// YaRN with a factor on cos and sin.
fn rope(dim: usize, interleave: bool) -> RopeParams {
    let yarn = Yarn {
        factor: 40.0,
        original_max_position_embeddings: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(1.0),
        mscale_all_dim: Some(0.5),
        attention_factor: None,
    };
    RopeParams { dim, nope_dim: 0, theta: 10_000.0, interleave, yarn: Some(yarn) }
}

/// The table of angles, as `rope.wesl` has it.
fn angles(rope: &RopeParams, context: usize) -> Vec<f32> {
    let (theta, factor) = (rope.inv_freq(), rope.cos_sin_factor());
    let fine = (0..256).map(|position| (position, factor));
    let coarse = (0..context.div_ceil(256)).map(|block| (block * 256, 1.0));
    let pair = |position: usize, factor: f64, theta: f64| {
        let (sin, cos) = (position as f64 * theta).sin_cos();
        [(cos * factor) as f32, (sin * factor) as f32]
    };
    fine.chain(coarse).flat_map(|(p, factor)| theta.iter().flat_map(move |theta| pair(p, factor, *theta))).collect()
}

/// Tokens at positions of sequences.
pub fn tokens(places: &[(usize, usize)]) -> Vec<u32> {
    places.iter().flat_map(|&(sequence, position)| [9, position as u32, sequence as u32, 0]).collect()
}

/// Condition of a rotated row: both numbers of a pair go into each.
fn rotated_size(row: &[f64], interleave: bool) -> Vec<f64> {
    let half = row.len() / 2;
    let partner = |i: usize| if interleave { i ^ 1 } else { (i + half) % row.len() };
    (0..row.len()).map(|i| row[i].abs() + row[partner(i)].abs()).collect()
}

const POSITIONS: [usize; 9] = [0, 1, 63, 255, 256, 257, 4097, 100_000, 163_839];
const CONTEXT: usize = 163_840;

struct Absorb {
    dims: MlaDims,
    kv_b: Matrix,
    /// Heads of each dispatch.
    parts: Vec<(usize, usize)>,
    /// Tokens that share a row of keys.
    tile: usize,
    /// Whether subgroups load queries together.
    pooled: bool,
}

impl Absorb {
    fn random(rng: &mut Rng, format: WeightFormat, dims: MlaDims) -> Self {
        let kv_b = Matrix::random(rng, format, dims.heads * (dims.nope + dims.value), dims.latent);
        let parts = vec![(0, dims.heads)];
        Self { dims, kv_b, parts, tile: 1, pooled: false }
    }

    fn shapes(&self, variant: Variant) -> Variant {
        variant
            .int("HEADS", self.dims.heads)
            .int("NOPE", self.dims.nope)
            .int("V", self.dims.value)
            .int("RANK", self.dims.latent)
    }

    fn call(&self, variant: &Variant, (first, count): (usize, usize)) -> Call {
        let rows = self.dims.nope + self.dims.value;
        Call::new(variant).part(first, count, false).matrix("kv_b", &self.kv_b, first * rows, count * rows)
    }

    fn query(&self, rope: &RopeParams, q: &[f32], positions: &[usize]) -> Vec<f32> {
        let pairs = rope.dim / 2;
        let variant = self
            .shapes(self.kv_b.plug(Variant::new("absorb_query")))
            .flag("interleave", rope.interleave)
            .flag("pooled", self.pooled)
            .int("ROPE", rope.dim)
            .int("ROPE_PAIRS", pairs)
            .int("TILE", self.tile)
            .int("WG", 64);
        let places: Vec<(usize, usize)> = positions.iter().map(|&position| (0, position)).collect();
        let mut y = vec![UNTOUCHED; positions.len() * self.dims.heads * (self.dims.latent + rope.dim)];
        for &part in &self.parts {
            let call = self.call(&variant, part).floats("q", q).floats("angles", &angles(rope, CONTEXT));
            let columns = self.dims.latent.div_ceil(4) + pairs;
            let call = call.batch(positions.len(), 1).words("tokens", &tokens(&places)).words("y", &y);
            let tiles = positions.len().div_ceil(self.tile);
            y = call.run([columns.div_ceil(64), part.1, tiles]).words("y").to_vec();
        }
        y.into_iter().map(f32::from_bits).collect()
    }

    fn expected_query(&self, rope: &RopeParams, q: &[f32], positions: &[usize]) -> (Vec<f64>, Vec<f64>) {
        let (heads, rank) = (self.dims.heads, self.dims.latent);
        let (q_nope, mut q_rope) = ops::split_rows(&f64s(q), self.dims.nope + rope.dim, self.dims.nope);
        let kv_b = self.kv_b.numbers();
        let absorbed = ops::absorb_queries(&self.dims, &kv_b, &q_nope);
        let size = ops::absorb_queries(&self.dims, &magnitudes(&kv_b), &magnitudes(&q_nope));
        let mut rope_size = Vec::new();
        for (row, q) in q_rope.chunks_exact_mut(rope.dim).enumerate() {
            rope_size.extend(rotated_size(q, rope.interleave));
            let (cos, sin) = rope.cos_sin(positions[row / heads]);
            ops::rotate(q, &cos, &sin, rope.interleave);
        }
        let join = |a: &[f64], b: &[f64]| ops::concat_rows(a, rank, b, rope.dim);
        (join(&absorbed, &q_rope), join(&size, &rope_size))
    }
}

#[test]
fn queries_are_absorbed_and_rotated() {
    let mut rng = Rng::new(50);
    let shapes = [(3, 5, 6, 4, 9), (2, 16, 16, 20, 24), (1, 1, 2, 1, 1), (5, 14, 10, 10, 36), (2, 128, 64, 128, 512)];
    let (mut cases, mut pooled) = (0, 0);
    for format in FORMATS {
        for (heads, nope, rope_dim, value, latent) in shapes {
            let rope = rope(rope_dim, cases % 2 == 0);
            let dims = MlaDims { heads, nope, rope: rope_dim, value, latent, scale: 1.0 };
            let mut case = Absorb::random(&mut rng, format, dims);
            if heads == 5 {
                case.parts = vec![(0, 2), (2, 1), (3, 2)];
            }
            let q = rng.numbers(POSITIONS.len() * heads * (nope + rope_dim));
            let (got, (want, size)) = (case.query(&rope, &q, &POSITIONS), case.expected_query(&rope, &q, &POSITIONS));
            let what = format!("{format:?} {heads} heads, {nope} + {rope_dim} → {latent}");
            assert_agrees("absorb_query", &what, &got, &want, &size);
            // Tokens that share rows of keys get the same bits, also where the last tile is not full.
            for tile in [2, POSITIONS.len(), POSITIONS.len() + 3] {
                case.tile = tile;
                assert_eq!(bits(&case.query(&rope, &q, &POSITIONS)), bits(&got), "{what}, tile {tile}");
            }
            // So do those whose lanes load together, up to the order of products.
            if subgroup() >= 8 && (latent / 4).is_multiple_of(subgroup()) && nope.is_multiple_of(8) {
                case.pooled = true;
                let tiled = case.query(&rope, &q, &POSITIONS);
                assert_agrees("absorb_query", &format!("{what}, pooled"), &tiled, &want, &size);
                case.tile = 1;
                assert_eq!(bits(&case.query(&rope, &q, &POSITIONS)), bits(&tiled), "{what}, pooled");
                pooled += 1;
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 20);
    if pooled == 0 {
        skipped(&format!("pooled queries need subgroups of 8 … 128, the device has {}", subgroup()));
    }
}

#[test]
fn absorbed_queries_of_other_heads_and_wrong_ones() {
    let mut rng = Rng::new(51);
    let rope = rope(6, true);
    let dims = MlaDims { heads: 4, nope: 5, rope: 6, value: 3, latent: 10, scale: 1.0 };
    let mut case = Absorb::random(&mut rng, WeightFormat::Fp8, dims);
    let q = rng.numbers(2 * 4 * 11);
    let whole = case.query(&rope, &q, &[5, 70]);
    case.parts = vec![(1, 2)];
    for (row, numbers) in case.query(&rope, &q, &[5, 70]).chunks(16).enumerate() {
        if (1..3).contains(&(row % 4)) {
            assert_eq!(numbers, &whole[row * 16..][..16]);
        } else {
            assert!(numbers.iter().all(|number| number.to_bits() == UNTOUCHED), "row {row}");
        }
    }
    let verdict = |case: &Absorb, positions: &[usize]| {
        let (want, size) = case.expected_query(&rope, &q, positions);
        compare("absorb_query", &whole, &want, &size)
    };
    assert!(verdict(&case, &[5, 70]).is_ok());
    assert!(verdict(&case, &[5, 71]).is_err(), "another position went unnoticed");
    // A value row plays no part, a key row does.
    case.kv_b.codes[6 * 10] = 0x30;
    assert!(verdict(&case, &[5, 70]).is_ok());
    case.kv_b.codes[2 * 10 + 1] ^= 0x10;
    assert!(verdict(&case, &[5, 70]).is_err(), "a changed weight went unnoticed");
}

#[test]
fn values_are_expanded() {
    let mut rng = Rng::new(52);
    let shapes =
        [(3, 5, 4, 9), (2, 16, 20, 24), (1, 1, 1, 1), (5, 14, 10, 36), (2, 3, 33, 65), (1, 2, 4, 520), (3, 4, 9, 64)];
    let mut cases = 0;
    for (turn, format) in FORMATS.into_iter().enumerate() {
        for way in ways().into_iter().filter(|way| way.rows == 1) {
            // Eight neighbours that load together have rows of one head, a subgroup has those of one or of several.
            let pooled_shapes = [(3, 5, 2 * subgroup(), 64), (6, 5, 24, 64)];
            let shape = if way.pooled { pooled_shapes[turn % 2] } else { shapes[cases % shapes.len()] };
            let (heads, nope, value, latent) = shape;
            let (tile, t) = ([1, 3, 8][cases % 3], [1, 4, 7, 9][cases % 4]);
            let dims = MlaDims { heads, nope, rope: 2, value, latent, scale: 1.0 };
            let mut case = Absorb::random(&mut rng, format, dims);
            if heads > 2 {
                case.parts = vec![(0, 1), (1, heads - 2), (heads - 1, 1)];
            }
            let variant =
                way.plug(case.shapes(case.kv_b.plug(Variant::new("absorb_output"))), &case.kv_b).int("TILE", tile);
            let x = rng.numbers(t * heads * latent);
            // Plain, or with a factor for each head.
            let run = |scale: Option<&[f32]>| -> Vec<f32> {
                let variant = variant.clone().flag("edit", scale.is_some());
                let mut y = vec![UNTOUCHED; t * heads * value];
                for &part in &case.parts {
                    let mut call = case.call(&variant, part).batch(t, 1).floats("x", &x).words("y", &y);
                    if let Some(scale) = scale {
                        call = call.floats("head_scale", scale);
                    }
                    let rows = way.groups(part.1 * value);
                    y = call.run([rows, t.div_ceil(tile), 1]).words("y").to_vec();
                }
                y.into_iter().map(f32::from_bits).collect()
            };
            let got = run(None);
            assert_eq!(bits(&run(Some(&vec![1.0; heads]))), bits(&got), "factors of 1 change nothing");
            let scale: Vec<f32> = (0..heads).map(|h| [0.0, -2.0, 1.0, 0.5][h % 4]).collect();
            let scaled: Vec<f32> = (0..).zip(&got).map(|(i, plain)| plain * scale[i / value % heads]).collect();
            assert_eq!(run(Some(&scale)), scaled, "{heads} heads");
            let kv_b = case.kv_b.numbers();
            let want = ops::expand_values(&case.dims, &kv_b, &f64s(&x));
            let size = ops::expand_values(&case.dims, &magnitudes(&kv_b), &magnitudes(&f64s(&x)));
            let what = format!("{format:?} {way:?}, tile {tile}, {heads} heads, {latent} → {value}");
            assert_agrees("absorb_output", &what, &got, &want, &size);
            let mut wrong = kv_b;
            wrong[nope * latent] += 0.5;
            let wrong = ops::expand_values(&case.dims, &wrong, &f64s(&x));
            assert!(compare("absorb_output", &got, &wrong, &size).is_err(), "a changed weight went unnoticed");
            cases += 1;
        }
    }
    assert!(cases >= 20, "only {cases} cases");
}

#[test]
fn latents_are_normalised_rotated_and_written_to_their_places() {
    let mut rng = Rng::new(53);
    let places =
        [(0, 0), (1, 63), (1, 64), (0, 65), (2, 127), (2, 255), (2, 256), (0, 1), (3, 100_000), (3, 163_839), (2, 128)];
    let mut cases = 0;
    for (rank, rope_dim) in [(9, 6), (1, 2), (130, 10), (512, 64)] {
        for (interleave, tapped) in [(true, false), (false, true)] {
            for latent in Latent::ALL {
                let (rope, numbers, max_pages) = (rope(rope_dim, interleave), rank + rope_dim, CONTEXT / PAGE);
                // Only the pages that are written need to be there.
                let mut cache = Cache::new(&mut rng, latent, (rank, rope_dim), max_pages, &[66, 65, 257, 130]);
                for position in [100_000, 163_839] {
                    cache.table[3 * max_pages + position / PAGE] = cache.table[3 * max_pages + (position / PAGE) % 2];
                }
                let mut kv = rng.numbers(places.len() * numbers);
                kv[numbers..2 * numbers].iter_mut().for_each(|x| *x *= 100.0);
                kv[2 * numbers..][..rank].fill(0.0);
                kv[3 * numbers..][..rank].iter_mut().for_each(|x| *x *= 1e-20);
                let norm = rng.norm(rank);
                let writer = Writer { latent, rope: &rope, cache: &cache, norm: &norm, places: &places, tapped };
                let outputs = writer.run(&kv, None);
                assert_eq!(
                    writer.run(&kv, Some(&vec![1.0; rank])).words("cache"),
                    outputs.words("cache"),
                    "factors of 1"
                );
                // Powers of two for whole groups: what shares a scale stays what it is, if it is not too small for f16.
                let scale: Vec<f32> = (0..rank).map(|i| [2.0, -2.0, 1.0, 0.5][i / 128 % 4]).collect();
                let scaled = writer.run(&kv, Some(&scale));
                for &(sequence, position) in &places {
                    let plain = cache.read(outputs.words("cache"), sequence, position);
                    let row = cache.read(scaled.words("cache"), sequence, position);
                    for (i, (scaled, plain)) in row.into_iter().zip(plain).enumerate() {
                        let expected = plain * scale.get(i).copied().unwrap_or(1.0);
                        assert!((scaled - expected).abs() <= 6e-8, "number {i}: {scaled} instead of {expected}");
                    }
                }
                if tapped {
                    let factor = |i: usize| scale.get(i % numbers).copied().unwrap_or(1.0);
                    let plain = outputs.floats("result").into_iter().enumerate();
                    assert_eq!(scaled.floats("result"), plain.map(|(i, plain)| plain * factor(i)).collect::<Vec<_>>());
                }

                let (c, mut k) = ops::split_rows(&f64s(&kv), numbers, rank);
                let c = ops::rms_norm(&c, &f64s(&norm), EPS);
                let mut k_size = Vec::new();
                for (k, place) in k.chunks_exact_mut(rope_dim).zip(&places) {
                    k_size.extend(rotated_size(k, interleave));
                    let (cos, sin) = rope.cos_sin(place.1);
                    ops::rotate(k, &cos, &sin, interleave);
                }
                let want = ops::concat_rows(&c, rank, &k, rope_dim);
                let size = ops::concat_rows(&magnitudes(&c), rank, &k_size, rope_dim);
                let what = format!("{latent:?} {rank} + {rope_dim}, interleave {interleave}");
                if tapped {
                    assert_agrees("latent_write", &format!("{what}, tap"), &outputs.floats("result"), &want, &size);
                }
                let mut written = cache.words.clone();
                for (t, &(sequence, position)) in places.iter().enumerate() {
                    let (at, length) = (cache.at(sequence, position), cache.row_words());
                    written[at..][..length].copy_from_slice(&outputs.words("cache")[at..][..length]);
                    let got = cache.read(outputs.words("cache"), sequence, position);
                    let (want, size) = (&want[t * numbers..][..numbers], &size[t * numbers..][..numbers]);
                    if latent == Latent::F32 {
                        assert_agrees("latent_write", &what, &got, want, size);
                        continue;
                    }
                    for i in 0..numbers {
                        let error = (f64::from(got[i]) - want[i]).abs();
                        let bound = rounding(latent, rank, want, i) + 1e-6 * size[i];
                        assert!(error <= bound, "{what} token {t}: {} instead of {} at {i}", got[i], want[i]);
                    }
                }
                assert_eq!(outputs.words("cache"), written, "{what}: other rows were written");
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 32);
}

/// What workgroups that shared contexts left is added up: the same as of one that had it all. What the others would have
/// left is NaN where a context is too short for them.
#[test]
fn shares_of_a_context_are_added_up() {
    let mut rng = Rng::new(62);
    let (splits, heads) = (5, 3);
    for latent in [9, 24, 64] {
        let places = [(0, 0), (0, 255), (1, 256), (1, 700), (2, 1279), (3, 5000)];
        for way in ways().into_iter().filter(|way| way.rows == 1) {
            let value = if way.pooled { subgroup() } else { 6 };
            let dims = MlaDims { heads, nope: 4, rope: 2, value, latent, scale: 1.0 };
            let case = Absorb::random(&mut rng, WeightFormat::Bf16, dims);
            let (mut x, mut stats) = (Vec::new(), Vec::new());
            let mut whole = vec![0.0; places.len() * heads * latent];
            for (t, (_, position)) in places.iter().enumerate() {
                let pages = (position + 1usize).div_ceil(64);
                let shares = pages.div_ceil(pages.div_ceil(splits).max(4));
                let parts: Vec<Vec<(Vec<f32>, f32, f32)>> = (0..shares)
                    .map(|_| {
                        (0..heads)
                            .map(|_| (rng.numbers(latent), 50.0 * rng.number(), 1.0 + rng.unit() as f32))
                            .collect()
                    })
                    .collect();
                for h in 0..heads {
                    let largest = parts.iter().map(|part| part[h].1).fold(f32::MIN, f32::max);
                    let factor = |part: &Vec<(Vec<f32>, f32, f32)>| f64::from(part[h].1 - largest).exp();
                    let total: f64 = parts.iter().map(|part| factor(part) * f64::from(part[h].2)).sum();
                    for i in 0..latent {
                        let sum: f64 = parts.iter().map(|part| factor(part) * f64::from(part[h].0[i])).sum();
                        whole[(t * heads + h) * latent + i] = sum / total;
                    }
                }
                for share in 0..splits {
                    for h in 0..heads {
                        let part = parts.get(share).map(|part| &part[h]);
                        x.extend(part.map_or(vec![f32::NAN; latent], |part| part.0.clone()));
                        stats.extend(part.map_or([f32::NAN; 2], |part| [part.1, part.2]));
                    }
                }
            }
            let variant = way.plug(case.shapes(case.kv_b.plug(Variant::new("absorb_output"))), &case.kv_b);
            let call = case.call(&variant.flag("split", true).int("TILE", 1).int("SPLITS", splits), (0, heads));
            let call = call.batch(places.len(), 1).floats("x", &x).floats("stats", &stats);
            let call = call.words("tokens", &tokens(&places)).output("y", places.len() * heads * value);
            let got = call.run([way.groups(heads * value), places.len(), 1]).floats("y");
            let kv_b = case.kv_b.numbers();
            let want = ops::expand_values(&case.dims, &kv_b, &whole);
            let size = ops::expand_values(&case.dims, &magnitudes(&kv_b), &magnitudes(&whole));
            // Factors are exponentials of differences of up to some hundreds.
            let size: Vec<f64> = size.into_iter().map(|size| 100.0 * size).collect();
            assert_agrees("absorb_output", &format!("{way:?}, {latent}"), &got, &want, &size);
        }
    }
}

/// What storing number `i` of a row may change about it.
fn rounding(latent: Latent, rank: usize, row: &[f64], i: usize) -> f64 {
    // Half an ulp, a whole one where the device does not round to nearest.
    let half = 2f64.powi(-10) * row[i].abs() + 2f64.powi(-25);
    let largest = |group: usize| {
        let end = rank.min((i / group + 1) * group);
        row[i / group * group..end].iter().fold(0.0, |most: f64, x| most.max(x.abs()))
    };
    match latent {
        Latent::F32 => 0.0,
        Latent::F16 => half,
        // Half a step: of 2^-3 of the power of two below, of 2^-9 scales among the smallest; of a scale. Scales of what is
        // almost zero are larger than that.
        Latent::Fp8 if i < rank => {
            (row[i].abs() / 16.0).max(largest(128) / 448.0 * 2f64.powi(-10)) * (1.0 + 1e-5) + 1e-37
        }
        Latent::Q6 if i < rank => largest(32) / 31.0 * (1.0 + 2f64.powi(-7)) / 2.0 + 1e-37,
        Latent::Fp8 | Latent::Q6 => row[i].abs() * 2f64.powi(-8),
    }
}

/// What `latent_write` is given.
struct Writer<'a> {
    latent: Latent,
    rope: &'a RopeParams,
    cache: &'a Cache,
    norm: &'a [f32],
    places: &'a [(usize, usize)],
    tapped: bool,
}

impl Writer<'_> {
    fn run(&self, kv: &[f32], scale: Option<&[f32]>) -> Outputs {
        let variant = Variant::new("latent_write")
            .latent(self.latent)
            .flag("interleave", self.rope.interleave)
            .flag("tapped", self.tapped)
            .flag("edit", scale.is_some())
            .int("RANK", self.norm.len())
            .int("ROPE", self.rope.dim)
            .int("ROPE_PAIRS", self.rope.dim / 2)
            .int("MAX_PAGES", self.cache.max_pages)
            .int("WG", 64)
            .float("EPS", EPS);
        let mut call = Call::new(&variant)
            .floats("kv", kv)
            .floats("norm", self.norm)
            .floats("angles", &angles(self.rope, CONTEXT))
            .words("tokens", &tokens(self.places))
            .words("pages", &self.cache.table)
            .words("cache", &self.cache.words);
        if self.tapped {
            call = call.output("result", kv.len());
        }
        if let Some(scale) = scale {
            call = call.floats("latent_scale", scale);
        }
        call.run([self.places.len(), 1, 1])
    }
}

/// Query and latent row in one dispatch are those of the two kernels, bit for bit.
#[test]
fn queries_and_latents_in_one_dispatch() {
    let mut rng = Rng::new(61);
    let places = [(0, 0), (1, 64), (0, 65), (2, 127)];
    let positions = places.map(|(_, position)| position);
    let (heads, nope, rope_dim, value, rank, max_pages) = (3, 5, 6, 4, 37, 4);
    for (case, format) in FORMATS.into_iter().enumerate() {
        for latent in Latent::ALL {
            let dims = MlaDims { heads, nope, rope: rope_dim, value, latent: rank, scale: 1.0 };
            let absorb = Absorb::random(&mut rng, format, dims);
            let (rope, tapped) = (rope(rope_dim, case % 2 == 0), case < 2);
            let cache = Cache::new(&mut rng, latent, (rank, rope_dim), max_pages, &[66, 65, 130]);
            let q = rng.numbers(places.len() * heads * (nope + rope_dim));
            let (kv, norm) = (rng.numbers(places.len() * (rank + rope_dim)), rng.norm(rank));
            let writer = Writer { latent, rope: &rope, cache: &cache, norm: &norm, places: &places, tapped };
            let (query, written) = (absorb.query(&rope, &q, &positions), writer.run(&kv, None));
            let variant = absorb
                .shapes(absorb.kv_b.plug(Variant::new("absorb_write")))
                .latent(latent)
                .flag("interleave", rope.interleave)
                .flag("tapped", tapped)
                .int("ROPE", rope_dim)
                .int("ROPE_PAIRS", rope_dim / 2)
                .int("MAX_PAGES", max_pages)
                .int("TILE", 1)
                .int("WG", 64)
                .float("EPS", EPS);
            let mut call = absorb
                .call(&variant, (0, heads))
                .floats("q", &q)
                .floats("kv", &kv)
                .floats("norm", &norm)
                .floats("angles", &angles(&rope, CONTEXT))
                .words("tokens", &tokens(&places))
                .words("pages", &cache.table)
                .words("cache", &cache.words)
                .output("y", query.len());
            if tapped {
                call = call.output("result", kv.len());
            }
            let columns = rank.div_ceil(4) + rope_dim / 2;
            let both = call.run([columns.div_ceil(64), heads + 1, places.len()]);
            assert_eq!(both.words("y"), bits(&query), "{format:?}");
            assert_eq!(both.words("cache"), written.words("cache"), "{latent:?}");
            if tapped {
                assert_eq!(both.words("result"), written.words("result"), "{latent:?}");
            }
        }
    }
}

/// A number that is none, or too large for any scale, is not read back as a number, and those that share no scale with it are
/// as they were. Factors instead of inputs, since the norm would spread it over the row.
#[test]
fn what_is_no_number_stays_none() {
    let mut rng = Rng::new(60);
    let (rank, rope_dim) = (300, 10);
    let rope = rope(rope_dim, true);
    for latent in Latent::ALL {
        let places = [(0, 3)];
        let cache = Cache::new(&mut rng, latent, (rank, rope_dim), 1, &[4]);
        let (kv, norm) = (rng.numbers(rank + rope_dim), rng.norm(rank));
        let writer = Writer { latent, rope: &rope, cache: &cache, norm: &norm, places: &places, tapped: false };
        let plain = cache.read(writer.run(&kv, None).words("cache"), 0, 3);
        for (place, poison) in
            [(0, f32::NAN), (131, -f32::NAN), (299, f32::INFINITY), (40, f32::from_bits(0x7f80_0001))]
        {
            let mut scale = vec![1.0; rank];
            scale[place] = poison;
            let row = cache.read(writer.run(&kv, Some(&scale)).words("cache"), 0, 3);
            assert!(!row[place].is_finite(), "{latent:?}: {poison} became {}", row[place]);
            let group = group(latent).unwrap_or(1);
            for i in (0..rank + rope_dim).filter(|&i| i >= rank || i / group != place / group) {
                assert_eq!(row[i].to_bits(), plain[i].to_bits(), "{latent:?}: {poison} at {place} changed number {i}");
            }
        }
        let exact = ops::rms_norm(&f64s(&kv[..rank]), &f64s(&norm), EPS)[7] * 1e30;
        let mut huge = vec![1.0; rank];
        huge[7] = 1e30;
        let row = cache.read(writer.run(&kv, Some(&huge)).words("cache"), 0, 3);
        assert!(latent == Latent::F16 || (f64::from(row[7]) / exact - 1.0).abs() < 0.07, "{latent:?}: {}", row[7]);
        // All of the rope part.
        let mut poisoned = kv.clone();
        poisoned[rank + 2] = f32::NAN;
        let row = cache.read(writer.run(&poisoned, None).words("cache"), 0, 3);
        assert!(row[rank + 2].is_nan() && row[rank + 3].is_nan(), "{latent:?}");
        assert_eq!(row[rank + 4].to_bits(), plain[rank + 4].to_bits(), "{latent:?}");
    }
}
