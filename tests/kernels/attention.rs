//! `absorb_query`, `absorb_output` and `latent_write`; a cache of pages.

use moewe_oracle::numeric::{f16_to_f32, f32_to_f16};
use moewe_oracle::ops::{self, MlaDims};
use moewe_oracle::rope::{RopeParams, Yarn};
use moewe_plan::WeightFormat;
use moewe_shaders::{Latent, Variant};

use super::data::{FORMATS, Matrix, Rng, assert_agrees, compare, f64s, magnitudes};
use super::harness::{Call, Outputs, UNTOUCHED, bits, ways};

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
}

impl Absorb {
    fn random(rng: &mut Rng, format: WeightFormat, dims: MlaDims) -> Self {
        let kv_b = Matrix::random(rng, format, dims.heads * (dims.nope + dims.value), dims.latent);
        let parts = vec![(0, dims.heads)];
        Self { dims, kv_b, parts }
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
            .int("ROPE", rope.dim)
            .int("ROPE_PAIRS", pairs)
            .int("WG", 64);
        let places: Vec<(usize, usize)> = positions.iter().map(|&position| (0, position)).collect();
        let mut y = vec![UNTOUCHED; positions.len() * self.dims.heads * (self.dims.latent + rope.dim)];
        for &part in &self.parts {
            let call = self.call(&variant, part).floats("q", q).floats("angles", &angles(rope, CONTEXT));
            let columns = self.dims.latent.div_ceil(4) + pairs;
            let call = call.words("tokens", &tokens(&places)).words("y", &y);
            y = call.run([columns.div_ceil(64), part.1, positions.len()]).words("y").to_vec();
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
    let mut cases = 0;
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
            cases += 1;
        }
    }
    assert_eq!(cases, 20);
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
    for format in FORMATS {
        for way in ways().into_iter().filter(|way| way.rows == 1 && !way.pooled) {
            let (heads, nope, value, latent) = shapes[cases % shapes.len()];
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

/// A cache of pages, all NaN where nothing was written.
pub struct Cache {
    latent: Latent,
    numbers: usize,
    pub words: Vec<u32>,
    /// [sequences, max_pages]
    pub table: Vec<u32>,
    pub max_pages: usize,
}

impl Cache {
    /// Pages in random order for `lengths` tokens of each sequence, and one page that belongs to nobody. Entries of the
    /// table behind a sequence's pages lead far outside.
    pub fn new(rng: &mut Rng, latent: Latent, numbers: usize, max_pages: usize, lengths: &[usize]) -> Self {
        let needed: usize = lengths.iter().map(|length| length.div_ceil(PAGE)).sum();
        let mut free = rng.permutation(needed + 1);
        let mut table = vec![u32::MAX; lengths.len() * max_pages];
        for (sequence, length) in lengths.iter().enumerate() {
            for page in 0..length.div_ceil(PAGE) {
                table[sequence * max_pages + page] = free.pop().expect("one for each") as u32;
            }
        }
        let words = vec![u32::MAX; (needed + 1) * PAGE * latent.words(numbers as u64) as usize];
        Self { latent, numbers, words, table, max_pages }
    }

    pub fn at(&self, sequence: usize, position: usize) -> usize {
        let page = self.table[sequence * self.max_pages + position / PAGE] as usize;
        (page * PAGE + position % PAGE) * self.latent.words(self.numbers as u64) as usize
    }

    /// Writes a row, and returns it as it can be read back.
    pub fn write(&mut self, sequence: usize, position: usize, row: &[f32]) -> Vec<f64> {
        let at = self.at(sequence, position);
        match self.latent {
            Latent::F32 => row.iter().enumerate().for_each(|(i, number)| self.words[at + i] = number.to_bits()),
            Latent::F16 => row.chunks(2).enumerate().for_each(|(i, pair)| {
                let half = |number: Option<&f32>| u32::from(number.map_or(0, |&number| f32_to_f16(number)));
                self.words[at + i] = half(pair.first()) | half(pair.get(1)) << 16;
            }),
        }
        f64s(&read(self.latent, &self.words[at..], self.numbers))
    }
}

/// Numbers of a row of the cache.
fn read(latent: Latent, words: &[u32], numbers: usize) -> Vec<f32> {
    let number = |i: usize| match latent {
        Latent::F32 => f32::from_bits(words[i]),
        Latent::F16 => f16_to_f32((words[i / 2] >> (16 * (i % 2))) as u16),
    };
    (0..numbers).map(number).collect()
}

#[test]
fn latents_are_normalised_rotated_and_written_to_their_places() {
    let mut rng = Rng::new(53);
    let places =
        [(0, 0), (1, 63), (1, 64), (0, 65), (2, 127), (2, 255), (2, 256), (0, 1), (3, 100_000), (3, 163_839), (2, 128)];
    let lengths = [66, 65, 257, 163_840];
    let mut cases = 0;
    for (rank, rope_dim) in [(9, 6), (24, 16), (1, 2), (65, 10), (512, 64)] {
        for interleave in [true, false] {
            for (latent, tapped) in
                [(Latent::F32, false), (Latent::F32, true), (Latent::F16, false), (Latent::F16, true)]
            {
                let (rope, numbers, max_pages) = (rope(rope_dim, interleave), rank + rope_dim, CONTEXT / PAGE);
                // Only the pages that are written need to be there.
                let mut cache = Cache::new(&mut rng, latent, numbers, max_pages, &[66, 65, 257, 130]);
                for position in [100_000, 163_839] {
                    cache.table[3 * max_pages + position / PAGE] = cache.table[3 * max_pages + (position / PAGE) % 2];
                }
                assert_eq!(lengths.len() * max_pages, cache.table.len());
                let mut kv = rng.numbers(places.len() * numbers);
                kv[numbers..2 * numbers].iter_mut().for_each(|x| *x *= 100.0);
                kv[2 * numbers..][..rank].fill(0.0);
                let norm = rng.norm(rank);
                let variant = Variant::new("latent_write")
                    .latent(latent)
                    .flag("interleave", interleave)
                    .flag("tapped", tapped)
                    .int("RANK", rank)
                    .int("ROPE", rope_dim)
                    .int("ROPE_PAIRS", rope_dim / 2)
                    .int("MAX_PAGES", max_pages)
                    .int("WG", 64)
                    .float("EPS", EPS);
                // Plain, or with a factor for each number of the latent.
                let run = |scale: Option<&[f32]>| {
                    let mut call = Call::new(&variant.clone().flag("edit", scale.is_some()))
                        .floats("kv", &kv)
                        .floats("norm", &norm)
                        .floats("angles", &angles(&rope, CONTEXT))
                        .words("tokens", &tokens(&places))
                        .words("pages", &cache.table)
                        .words("cache", &cache.words);
                    if tapped {
                        call = call.output("rows", places.len() * numbers);
                    }
                    if let Some(scale) = scale {
                        call = call.floats("latent_scale", scale);
                    }
                    call.run([places.len(), 1, 1])
                };
                let outputs = run(None);
                assert_eq!(run(Some(&vec![1.0; rank])).words("cache"), outputs.words("cache"), "factors of 1");
                let scale: Vec<f32> = (0..rank).map(|i| [0.0, -2.0, 1.0, 0.5][i % 4]).collect();
                let scaled = run(Some(&scale));
                for &(sequence, position) in &places {
                    let (at, length) = (cache.at(sequence, position), latent.words(numbers as u64) as usize);
                    let row = |outputs: &Outputs| read(latent, &outputs.words("cache")[at..][..length], numbers);
                    for (i, (scaled, plain)) in row(&scaled).into_iter().zip(row(&outputs)).enumerate() {
                        // Powers of two, but a half may be below what f16 holds exactly.
                        let expected = plain * scale.get(i).copied().unwrap_or(1.0);
                        assert!((scaled - expected).abs() <= 6e-8, "number {i}: {scaled} instead of {expected}");
                    }
                }
                if tapped {
                    let factor = |i: usize| scale.get(i % numbers).copied().unwrap_or(1.0);
                    let plain = outputs.floats("rows").into_iter().enumerate();
                    assert_eq!(scaled.floats("rows"), plain.map(|(i, plain)| plain * factor(i)).collect::<Vec<_>>());
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
                    assert_agrees("latent_write", &format!("{what}, tap"), &outputs.floats("rows"), &want, &size);
                }
                // Half an ulp of f16, a whole one where the device does not round to nearest.
                let rounding = if latent == Latent::F16 { 2f64.powi(-10) } else { 0.0 };
                let mut written = cache.words.clone();
                for (t, &(sequence, position)) in places.iter().enumerate() {
                    let (at, length) = (cache.at(sequence, position), latent.words(numbers as u64) as usize);
                    let row = &outputs.words("cache")[at..][..length];
                    written[at..][..length].copy_from_slice(row);
                    let got = read(latent, row, numbers);
                    let (want, size) = (&want[t * numbers..][..numbers], &size[t * numbers..][..numbers]);
                    if latent == Latent::F32 {
                        assert_agrees("latent_write", &what, &got, want, size);
                    } else {
                        for i in 0..numbers {
                            let error = (f64::from(got[i]) - want[i]).abs();
                            let bound = rounding * want[i].abs() + 1e-6 * size[i] + 2f64.powi(-25);
                            assert!(error <= bound, "{what} token {t}: {} instead of {}", got[i], want[i]);
                        }
                        if numbers % 2 == 1 {
                            assert_eq!(row[length - 1] >> 16, 0, "padding is zero");
                        }
                    }
                }
                assert_eq!(outputs.words("cache"), written, "{what}: other rows were written");
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 40);
}
