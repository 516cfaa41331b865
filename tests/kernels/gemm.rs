//! Matrix products of many tokens: `gemm`, also of tokens sorted by expert, and what sorts and adds them up.

use moewe_oracle::ops;
use moewe_plan::WeightFormat;
use moewe_shaders::Variant;

use super::data::{
    FORMATS, Matrix, Rng, assert_agrees, compare, f64s, magnitudes, product_size, round_f16, swiglu_size,
};
use super::harness::{Call, UNTOUCHED, bits, cooperative, subgroup};
use super::skipped::skipped;

#[path = "gemm_coop.rs"]
mod gemm_coop;

const EPS: f64 = 1e-5;

/// How a kernel cuts the product into tiles.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// In registers: rows of an invocation, tokens.
    Registers(usize, usize),
    /// In workgroup memory.
    Workgroup,
    /// By cooperative matrices of so many rows and columns.
    Cooperative(usize),
}

/// Those that this device can run.
fn ways() -> Vec<Way> {
    let mut ways = vec![Way::Registers(1, 8), Way::Registers(2, 3), Way::Workgroup];
    ways.extend(cooperative_ways());
    ways
}

/// Those by cooperative matrices that this device can run; says so if there are none.
fn cooperative_ways() -> Vec<Way> {
    if cooperative().is_empty() {
        skipped("gemm_coop needs a device with cooperative matrices of f16 (scripts/mesa-new has one)");
    }
    cooperative().iter().map(|&size| Way::Cooperative(size)).collect()
}

impl Way {
    fn kernel(self) -> &'static str {
        match self {
            Way::Registers(..) => "gemm",
            Way::Workgroup => "gemm_tiled",
            Way::Cooperative(_) => "gemm_coop",
        }
    }

    /// Rows and tokens of a workgroup.
    fn tile(self, gated: bool) -> [usize; 2] {
        match self {
            Way::Registers(rows, tokens) => [32 * rows, tokens],
            Way::Workgroup | Way::Cooperative(_) => [if gated { 32 } else { 64 }, 64],
        }
    }

    fn variant(self, w: &Matrix) -> Variant {
        let variant = w.plug(Variant::new(self.kernel())).wide(true).int("K", w.columns);
        match self {
            Way::Registers(rows, tokens) => {
                variant.flag("pooled", true).int("WG", 32).int("ROWS", rows).int("TILE", tokens)
            }
            Way::Workgroup => variant,
            Way::Cooperative(size) => variant.flag("sixteen", size == 16).int("LANES", subgroup()),
        }
    }

    /// Activations, normed if they are, and a matrix as they are multiplied.
    fn factors(self, x: &[f32], norm: Option<&[f32]>, w: Vec<f64>) -> (Vec<f64>, Vec<f64>) {
        let x = f64s(x);
        let rounded = matches!(self, Way::Cooperative(_));
        let x = match norm {
            None if rounded => x.into_iter().map(round_f16).collect(),
            None => x,
            // Rounded before the division by the root of the mean square, which the sums get.
            Some(norm) if rounded => x.chunks(norm.len()).flat_map(|row| rounded_norm(row, norm)).collect(),
            Some(norm) => ops::rms_norm(&x, &f64s(norm), EPS),
        };
        (x, if rounded { w.into_iter().map(round_f16).collect() } else { w })
    }
}

fn rounded_norm(row: &[f64], norm: &[f32]) -> Vec<f64> {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + EPS).sqrt();
    row.iter().zip(norm).map(|(x, &norm)| round_f16(x * f64::from(norm)) * scale).collect()
}

/// A call of such a kernel. Dispatches of `parts` follow one another.
struct Gemm {
    way: Way,
    w: Matrix,
    u: Option<Matrix>,
    n: usize,
    t: usize,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
    over_rows: bool,
    parts: Vec<(usize, usize)>,
}

impl Gemm {
    fn plain(way: Way, w: Matrix, x: Vec<f32>) -> Self {
        let (n, t) = (w.codes.len() / w.columns, x.len() / w.columns);
        let (u, norm, bias, residual) = (None, None, None, None);
        Self { way, w, u, n, t, x, norm, bias, residual, over_rows: false, parts: vec![(0, n)] }
    }

    fn run(&self) -> Vec<f32> {
        let mut variant = self
            .way
            .variant(&self.w)
            .flag("norm", self.norm.is_some())
            .flag("bias", self.bias.is_some())
            .flag("residual", self.residual.is_some())
            .flag("gated", self.u.is_some())
            .int("N", self.n);
        if self.norm.is_some() {
            variant = variant.float("EPS", EPS);
        }
        let mut y = vec![UNTOUCHED; self.t * self.n];
        for &(first, count) in &self.parts {
            // The other count must not matter.
            let (tokens, rows) = if self.over_rows { (1, self.t) } else { (self.t, 1) };
            let mut call = Call::new(&variant)
                .batch(tokens, rows)
                .part(first, count, self.over_rows)
                .floats("x", &self.x)
                .matrix("w", &self.w, first, count)
                .words("y", &y);
            if let Some(u) = &self.u {
                call = call.matrix("u", u, first, count);
            }
            for (name, numbers) in [("norm", &self.norm), ("bias", &self.bias), ("residual", &self.residual)] {
                if let Some(numbers) = numbers {
                    call = call.floats(name, numbers);
                }
            }
            let [rows, tokens] = self.way.tile(self.u.is_some());
            y = call.run([count.div_ceil(rows), self.t.div_ceil(tokens), 1]).words("y").to_vec();
        }
        y.into_iter().map(f32::from_bits).collect()
    }

    /// Expected numbers and their condition.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let k = self.w.columns;
        let (x, w) = self.way.factors(&self.x, self.norm.as_deref(), self.w.numbers());
        let (mut y, mut size) = (ops::linear(&x, &w, None, k), product_size(&x, &w, k));
        if let Some(u) = &self.u {
            let (_, u) = self.way.factors(&[], None, u.numbers());
            let up = ops::linear(&x, &u, None, k);
            size = swiglu_size(&y, &size, &up, &product_size(&x, &u, k));
            y = ops::swiglu(&y, &up);
        }
        for (i, (y, size)) in y.iter_mut().zip(&mut size).enumerate() {
            let bias = self.bias.as_ref().map(|bias| bias[i % self.n]);
            for more in [bias, self.residual.as_ref().map(|residual| residual[i])].into_iter().flatten() {
                *y += f64::from(more);
                *size += f64::from(more).abs();
            }
        }
        (y, size)
    }

    fn check(&self, what: &str) {
        let (want, size) = self.expected();
        assert_agrees(self.way.kernel(), what, &self.run(), &want, &size);
    }
}

/// A matrix whose scales, if it has any, are of blocks of whole 32s.
fn random(rng: &mut Rng, format: WeightFormat, n: usize, k: usize) -> Matrix {
    let block = [[5, 32], [128, 128], [1, 64]][rng.below(3)];
    Matrix::random(rng, format, n, k).blocks(rng, block)
}

fn random_experts(rng: &mut Rng, format: WeightFormat, n: usize, k: usize) -> Matrix {
    Matrix::experts(rng, format, EXPERTS, n, k).expert_blocks(rng, [3, 32])
}

#[test]
fn all_formats_ways_and_flags() {
    let mut rng = Rng::new(61);
    let (ks, ns, ts) = ([32, 64, 96, 160, 288], [1, 3, 130, 64, 257, 7], [1, 2, 15, 16, 17, 40, 70]);
    let mut cases = 0;
    for format in FORMATS {
        for way in ways() {
            for kind in [cases % 4, (cases + 3) % 4] {
                let (k, n, t) = (ks[cases % ks.len()], ns[cases % ns.len()], ts[cases % ts.len()]);
                let w = random(&mut rng, format, n, k);
                let x = rng.numbers(t * k);
                let mut case = Gemm::plain(way, w, x);
                case.norm = (cases % 2 == 0).then(|| rng.norm(k));
                if kind == 0 {
                    let block = case.w.block();
                    case.u = Some(Matrix::random(&mut rng, format, n, k).blocks(&mut rng, block));
                } else {
                    case.bias = (kind & 1 == 0).then(|| rng.numbers(n));
                    case.residual = (kind & 2 == 0).then(|| rng.numbers(t * n));
                }
                case.check(&format!("{format:?} {way:?}, K {k}, N {n}, T {t}, kind {kind}"));
                cases += 1;
            }
        }
    }
}

#[test]
fn parts_write_their_rows_only() {
    let mut rng = Rng::new(62);
    for way in ways() {
        let (n, k, t) = (37, 64, 19);
        let x = rng.numbers(t * k);
        let mut case = Gemm::plain(way, random(&mut rng, WeightFormat::Fp8, n, k), x);
        case.over_rows = true;
        case.bias = Some(rng.numbers(n));
        case.residual = Some(rng.numbers(t * n));
        case.parts = vec![(0, 13), (13, 1), (14, 23)];
        case.check(&format!("{way:?} in three parts over wanted rows"));
        case.parts = vec![(13, 9)];
        for (i, number) in case.run().iter().enumerate() {
            assert_eq!(number.to_bits() == UNTOUCHED, !(13..22).contains(&(i % n)), "number {i}");
        }
    }
}

/// A token's numbers do not depend on who is in its tile.
#[test]
fn tokens_do_not_see_one_another() {
    let mut rng = Rng::new(63);
    for way in ways() {
        let (n, k, t) = (40, 96, 23);
        let mut x = rng.numbers(t * k);
        let w = random(&mut rng, WeightFormat::Bf16, n, k);
        let norm = Some(rng.norm(k));
        let alone = |x: &[f32]| Gemm { norm: norm.clone(), ..Gemm::plain(way, w.clone(), x.to_vec()) }.run();
        let together = alone(&x);
        for token in [0, 7, 22] {
            assert_eq!(bits(&alone(&x[token * k..][..k])), bits(&together[token * n..][..n]), "{way:?}, token {token}");
        }
        x[5 * k + 3] = f32::INFINITY;
        x[6 * k + 95] = f32::NAN;
        let poisoned = alone(&x);
        for token in (0..t).filter(|token| ![5, 6].contains(token)) {
            assert_eq!(bits(&poisoned[token * n..][..n]), bits(&together[token * n..][..n]), "{way:?}, token {token}");
        }
        assert!(poisoned[6 * n..][..n].iter().all(|number| number.is_nan()));
    }
}

const EXPERTS: usize = 6;
const TOP_K: usize = 3;

/// Distinct experts for each token; expert 4 is never chosen, expert 5 always, as a shared one would be.
fn choose(rng: &mut Rng, t: usize) -> Vec<usize> {
    let token = |rng: &mut Rng| {
        let mut all = rng.permutation(4);
        all.truncate(TOP_K - 1);
        all.push(5);
        all
    };
    (0..t).flat_map(|_| token(rng)).collect()
}

/// What `experts_sort` has to find, without what is undefined: expert and slots of each tile.
fn sorted(ids: &[usize], tile: usize) -> Vec<(u32, Vec<u32>)> {
    let slots = |expert| (0..ids.len()).filter(move |&slot| ids[slot] == expert).map(|slot| slot as u32);
    let tiles = |expert| {
        let all: Vec<u32> = slots(expert).collect();
        all.chunks(tile).map(|slots| (expert as u32, slots.to_vec())).collect::<Vec<_>>()
    };
    (0..EXPERTS).flat_map(tiles).collect()
}

/// Tiles as they stand on the device, `words` words for each; `rest` is what is undefined.
fn tile_words(tiles: &[(u32, Vec<u32>)], words: usize, rest: u32) -> Vec<u32> {
    let entry = |(expert, slots): &(u32, Vec<u32>)| {
        let mut entry = vec![*expert, slots.len() as u32];
        entry.extend(slots);
        entry.resize(words, rest);
        entry
    };
    tiles.iter().flat_map(entry).collect()
}

#[test]
fn sort_agrees_with_a_stable_sort() {
    let mut rng = Rng::new(64);
    for (t, tile, workgroup) in [(1, 16, 64), (2, 1, 32), (37, 8, 64), (64, 5, 2), (100, 16, 4)] {
        let ids = choose(&mut rng, t);
        let variant = Variant::new("experts_sort").int("E", EXPERTS).int("TOP_K", TOP_K).int("TILE", tile);
        let words: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let out = Call::new(&variant.int("X0", 11).int("X1", 13).int("WG", workgroup))
            .batch(t, 1)
            .words("ids", &words)
            .output("tiles", (2 + tile) * t * TOP_K)
            .output("grids", 6)
            .run([1, 1, 1]);
        let tiles = sorted(&ids, tile);
        let want = tile_words(&tiles, 2 + tile, UNTOUCHED);
        let (full, empty) = out.words("tiles").split_at(want.len());
        assert_eq!(full, want);
        assert!(empty.chunks(2 + tile).all(|entry| entry[1] == 0));
        assert_eq!(out.words("grids"), [11, tiles.len() as u32, 1, 13, tiles.len() as u32, 1]);
    }
}

/// Ids that name no expert, which no router of ours gives, take no place and harm nobody.
#[test]
fn sort_of_ids_without_experts() {
    let variant = Variant::new("experts_sort").int("E", EXPERTS).int("TOP_K", 2).int("TILE", 4);
    let out = Call::new(&variant.int("X0", 1).int("X1", 1).int("WG", 32))
        .batch(3, 1)
        .words("ids", &[6, 1, u32::MAX, 0, 1, 7])
        .output("tiles", 36)
        .output("grids", 6)
        .run([1, 1, 1]);
    assert_eq!(out.words("tiles")[..12], tile_words(&[(0, vec![3]), (1, vec![1, 4])], 6, UNTOUCHED));
    assert!(out.words("tiles")[12..].chunks(6).all(|entry| entry[1] == 0));
    assert_eq!(out.words("grids")[1], 2);
}

/// The first half (`up` given; x is a row for each token) or the second half (a row for each slot) of experts.
struct Grouped {
    way: Way,
    w: Matrix,
    u: Option<Matrix>,
    n: usize,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    ids: Vec<usize>,
}

impl Grouped {
    fn random(rng: &mut Rng, way: Way, format: WeightFormat, [n, k, t]: [usize; 3], first: bool) -> Self {
        let (w, ids) = (random_experts(rng, format, n, k), choose(rng, t));
        let u = first.then(|| random_experts(rng, format, n, k));
        let x = rng.numbers(if first { t } else { t * TOP_K } * k);
        Self { way, w, u, n, x, norm: None, ids }
    }

    fn run(&self, parts: &[(usize, usize)]) -> Vec<f32> {
        let k = self.w.columns;
        let mut variant = self
            .way
            .variant(&self.w)
            .flag("experts", true)
            .flag("gated", self.u.is_some())
            .flag("norm", self.norm.is_some())
            .int("X_SHARE", self.ids.len() * k / self.x.len())
            .int("N", self.n);
        if self.norm.is_some() {
            variant = variant.float("EPS", EPS);
        }
        let [rows, tokens] = self.way.tile(self.u.is_some());
        // What is undefined names slots that are not there.
        let mut tiles = tile_words(&sorted(&self.ids, tokens), 2 + tokens, u32::MAX);
        tiles.resize((2 + tokens) * self.ids.len(), 0);
        let mut y = vec![UNTOUCHED; self.ids.len() * self.n];
        for &(first, count) in parts {
            let mut call = Call::new(&variant)
                .part(first, count, false)
                .floats("x", &self.x)
                .words("tiles", &tiles)
                .matrix("w", &self.w, first * self.n, count * self.n)
                .words("y", &y);
            if let Some(u) = &self.u {
                call = call.matrix("u", u, first * self.n, count * self.n);
            }
            if let Some(norm) = &self.norm {
                call = call.floats("norm", norm);
            }
            // More workgroups than tiles, as where nobody counts them first.
            y = call.run([self.n.div_ceil(rows), self.ids.len(), 1]).words("y").to_vec();
        }
        y.into_iter().map(f32::from_bits).collect()
    }

    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let k = self.w.columns;
        let share = self.ids.len() * k / self.x.len();
        let (x, _) = self.way.factors(&self.x, self.norm.as_deref(), Vec::new());
        let matrix = |w: &Matrix, expert| self.way.factors(&[], None, w.expert(expert)).1;
        let (mut want, mut size) = (Vec::new(), Vec::new());
        for (slot, &expert) in self.ids.iter().enumerate() {
            let x = &x[slot / share * k..][..k];
            let w = matrix(&self.w, expert);
            let (g, g_size) = (ops::linear(x, &w, None, k), product_size(x, &w, k));
            if let Some(u) = &self.u {
                let u = matrix(u, expert);
                let up = ops::linear(x, &u, None, k);
                size.extend(swiglu_size(&g, &g_size, &up, &product_size(x, &u, k)));
                want.extend(ops::swiglu(&g, &up));
            } else {
                want.extend(g);
                size.extend(g_size);
            }
        }
        (want, size)
    }
}

/// Parts of the experts, one of a single expert.
const PARTS: [(usize, usize); 3] = [(0, 2), (2, 1), (3, 3)];

#[test]
fn both_halves_of_experts_of_all_formats_and_ways() {
    let mut rng = Rng::new(65);
    let (ks, ns, ts) = ([32, 64, 160], [1, 35, 130], [1, 5, 40]);
    let mut cases = 0;
    for format in FORMATS {
        for way in ways() {
            for first in [true, false] {
                let shape = [ns[cases % 3], ks[cases / 2 % 3], ts[cases / 3 % 3]];
                let mut case = Grouped::random(&mut rng, way, format, shape, first);
                case.norm = (first && cases % 4 < 2).then(|| rng.norm(shape[1]));
                let (want, size) = case.expected();
                let what = format!("experts, {format:?} {way:?}, [N, K, T] {shape:?}, first half {first}");
                let whole = case.run(&[(0, EXPERTS)]);
                assert_agrees(way.kernel(), &what, &whole, &want, &size);
                assert_eq!(bits(&whole), bits(&case.run(&PARTS)), "{what}: in parts");
                cases += 1;
            }
        }
    }
}

#[test]
fn experts_of_other_parts_are_left_alone() {
    let mut rng = Rng::new(66);
    for way in ways() {
        let case = Grouped::random(&mut rng, way, WeightFormat::Fp8, [7, 32, 18], true);
        for (first, count) in PARTS {
            for (slot, row) in case.run(&[(first, count)]).chunks(7).enumerate() {
                let inside = (first..first + count).contains(&case.ids[slot]);
                assert!(row.iter().all(|number| (number.to_bits() != UNTOUCHED) == inside), "{way:?}, slot {slot}");
            }
        }
    }
}

#[test]
fn sum_of_experts() {
    let mut rng = Rng::new(67);
    for (n, t, workgroup) in [(1, 1, 32), (70, 3, 64), (64, 9, 64), (130, 2, 32)] {
        let (d, mut weights, residual) = (rng.numbers(t * TOP_K * n), rng.numbers(t * TOP_K), rng.numbers(t * n));
        weights[0] = 0.0;
        let variant = Variant::new("experts_sum").int("N", n).int("TOP_K", TOP_K).int("WG", workgroup);
        let out = Call::new(&variant)
            .floats("d", &d)
            .floats("weights", &weights)
            .floats("residual", &residual)
            .output("result", t * n)
            .run([n.div_ceil(workgroup), t, 1]);
        let mut want = f64s(&residual);
        let mut size = magnitudes(&want);
        for (slot, row) in f64s(&d).chunks(n).enumerate() {
            let (at, weight) = (slot / TOP_K * n, f64::from(weights[slot]));
            ops::add_scaled(&mut want[at..][..n], weight, row);
            ops::add_scaled(&mut size[at..][..n], weight.abs(), &magnitudes(row));
        }
        assert_agrees("experts_sum", &format!("N {n}, T {t}"), &out.floats("result"), &want, &size);
    }
}

/// The comparison notices one changed weight, a transposed matrix, swapped experts and gate for up.
#[test]
fn wrong_results_are_noticed() {
    let mut rng = Rng::new(68);
    for way in ways() {
        let k = 32;
        let mut case = Gemm::plain(way, random(&mut rng, WeightFormat::Bf16, k, k), rng.numbers(9 * k));
        let got = case.run();
        let verdict = |case: &Gemm| {
            let (want, size) = case.expected();
            compare(way.kernel(), &got, &want, &size)
        };
        assert!(verdict(&case).is_ok());
        let original = case.w.clone();
        case.w.codes[77] ^= 1;
        assert!(verdict(&case).is_err(), "a changed weight went unnoticed");
        case.w.codes = (0..k * k).map(|i| original.codes[i % k * k + i / k]).collect();
        assert!(verdict(&case).is_err(), "a transposed matrix went unnoticed");

        let mut case = Grouped::random(&mut rng, way, WeightFormat::F16, [5, 32, 6], true);
        let got = case.run(&PARTS);
        let verdict = |case: &Grouped| {
            let (want, size) = case.expected();
            compare(way.kernel(), &got, &want, &size)
        };
        assert!(verdict(&case).is_ok());
        case.ids.swap(0, 2);
        assert!(verdict(&case).is_err(), "swapped experts went unnoticed");
        case.ids.swap(0, 2);
        let Grouped { w, u: Some(u), .. } = &mut case else { unreachable!("a first half") };
        std::mem::swap(w, u);
        assert!(verdict(&case).is_err(), "gate for up went unnoticed");
    }
}

/// The tile that the profile of the software driver asks for.
#[test]
fn a_large_tile() {
    let mut rng = Rng::new(69);
    let (n, k, t) = (300, 64, 37);
    let (w, x) = (random(&mut rng, WeightFormat::Fp8, n, k), rng.numbers(t * k));
    let norm = Some(rng.norm(k));
    Gemm { norm, ..Gemm::plain(Way::Registers(4, 16), w, x) }.check("4 rows, 16 tokens");
}
