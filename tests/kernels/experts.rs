//! `experts_gate_up` and `experts_down`: routed experts, whole and in parts.

use moewe_oracle::ops;
use moewe_plan::WeightFormat;
use moewe_shaders::{Reduce, Variant};

use super::data::{FORMATS, GROUPED, Matrix, Rng, assert_agrees, compare, f64s, product_size, swiglu_size};
use super::harness::{Call, UNTOUCHED, Way, bits, ways};

const EPS: f64 = 1e-6;
const EXPERTS: usize = 6;
const TOP_K: usize = 3;
/// Parts of the experts, one of a single expert.
const PARTS: [(usize, usize); 3] = [(0, 2), (2, 1), (3, 3)];

/// Distinct experts for each token; expert 4 is never chosen.
fn choose(rng: &mut Rng, t: usize) -> Vec<usize> {
    let token = |rng: &mut Rng| {
        let mut all = rng.permutation(EXPERTS);
        all.retain(|&expert| expert != 4);
        all.truncate(TOP_K);
        all
    };
    (0..t).flat_map(|_| token(rng)).collect()
}

fn words(ids: &[usize]) -> Vec<u32> {
    ids.iter().map(|&id| id as u32).collect()
}

struct GateUp {
    gate: Matrix,
    up: Matrix,
    n: usize,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    ids: Vec<usize>,
    way: Way,
}

impl GateUp {
    fn random(rng: &mut Rng, format: WeightFormat, n: usize, k: usize, t: usize, way: Way) -> Self {
        let gate = Matrix::experts(rng, format, EXPERTS, n, k);
        let up = Matrix::experts(rng, format, EXPERTS, n, k);
        let (x, ids) = (rng.numbers(t * k), choose(rng, t));
        Self { gate, up, n, x, norm: None, ids, way }
    }

    fn run(&self, parts: &[(usize, usize)]) -> Vec<f32> {
        let k = self.gate.columns;
        let mut variant = self
            .way
            .plug(self.gate.plug(Variant::new("experts_gate_up")), &self.gate)
            .flag("norm", self.norm.is_some())
            .int("N", self.n)
            .int("K", k)
            .int("TOP_K", TOP_K);
        if self.norm.is_some() {
            variant = variant.float("EPS", EPS);
        }
        let mut y = vec![UNTOUCHED; self.ids.len() * self.n];
        for &(first, count) in parts {
            let mut call = Call::new(&variant)
                .part(first, count, false)
                .floats("x", &self.x)
                .words("ids", &words(&self.ids))
                .matrix("gate", &self.gate, first * self.n, count * self.n)
                .matrix("up", &self.up, first * self.n, count * self.n)
                .words("y", &y);
            if let Some(norm) = &self.norm {
                call = call.fours("norm", norm);
            }
            y = call.run([self.way.groups(self.n), self.ids.len(), 1]).words("y").to_vec();
        }
        y.into_iter().map(f32::from_bits).collect()
    }

    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let k = self.gate.columns;
        let mut x = f64s(&self.x);
        if let Some(norm) = &self.norm {
            x = ops::rms_norm(&x, &f64s(norm), EPS);
        }
        let (mut want, mut size) = (Vec::new(), Vec::new());
        for (slot, &expert) in self.ids.iter().enumerate() {
            let x = &x[slot / TOP_K * k..][..k];
            let (gate, up) = (self.gate.expert(expert), self.up.expert(expert));
            let (g, u) = (ops::linear(x, &gate, None, k), ops::linear(x, &up, None, k));
            size.extend(swiglu_size(&g, &product_size(x, &gate, k), &u, &product_size(x, &up, k)));
            want.extend(ops::swiglu(&g, &u));
        }
        (want, size)
    }
}

#[test]
fn gate_up_of_all_formats_and_ways() {
    let mut rng = Rng::new(20);
    let (ks, ns) = ([1, 3, 5, 64, 65, 130, 96], [1, 5, 35, 133]);
    let mut cases = 0;
    for format in FORMATS {
        for way in ways() {
            let (k, n, t) = (ks[cases % ks.len()], ns[cases % ns.len()], 1 + cases % 4);
            let mut case = GateUp::random(&mut rng, format, n, k, t, way);
            case.norm = (cases % 2 == 1).then(|| rng.norm(k));
            let (want, size) = case.expected();
            let what = format!("{format:?} {way:?}, K {k}, N {n}, T {t}");
            assert_agrees("experts_gate_up", &what, &case.run(&[(0, EXPERTS)]), &want, &size);
            assert_agrees("experts_gate_up", &format!("{what}, in parts"), &case.run(&PARTS), &want, &size);
            cases += 1;
        }
    }
    assert!(cases >= 20, "only {cases} cases");
}

#[test]
fn gate_up_leaves_experts_of_other_parts_alone() {
    let mut rng = Rng::new(21);
    for way in ways() {
        let case = GateUp::random(&mut rng, WeightFormat::Fp8, 7, 12, 8, way);
        for (first, count) in PARTS {
            let got = case.run(&[(first, count)]);
            for (slot, row) in got.chunks(7).enumerate() {
                let inside = (first..first + count).contains(&case.ids[slot]);
                assert!(row.iter().all(|number| (number.to_bits() == UNTOUCHED) != inside), "slot {slot}");
            }
        }
        // Nobody chose expert 4.
        assert!(case.run(&[(4, 1)]).iter().all(|number| number.to_bits() == UNTOUCHED));
    }
}

struct Down {
    experts: Matrix,
    n: usize,
    y: Vec<f32>,
    ids: Vec<usize>,
    weights: Vec<f32>,
    residual: Vec<f32>,
    way: Way,
}

impl Down {
    fn random(rng: &mut Rng, format: WeightFormat, n: usize, k: usize, t: usize, way: Way) -> Self {
        let experts = Matrix::experts(rng, format, EXPERTS, n, k);
        let (y, ids) = (rng.numbers(t * TOP_K * k), choose(rng, t));
        let mut weights = rng.numbers(t * TOP_K);
        weights[0] = 0.0;
        Self { experts, n, y, ids, weights, residual: rng.numbers(t * n), way }
    }

    fn run(&self, parts: &[(usize, usize)]) -> Vec<f32> {
        let k = self.experts.columns;
        let t = self.ids.len() / TOP_K;
        let mut result = vec![UNTOUCHED; t * self.n];
        for (i, &(first, count)) in parts.iter().enumerate() {
            let variant = self
                .way
                .plug(self.experts.plug(Variant::new("experts_down")), &self.experts)
                .flag("residual", i == 0)
                .int("N", self.n)
                .int("K", k)
                .int("TOP_K", TOP_K);
            let mut call = Call::new(&variant)
                .part(first, count, false)
                .floats("y", &self.y)
                .words("ids", &words(&self.ids))
                .floats("weights", &self.weights)
                .matrix("down", &self.experts, first * self.n, count * self.n)
                .words("result", &result);
            if i == 0 {
                call = call.floats("residual", &self.residual);
            }
            result = call.run([self.way.groups(self.n), t, 1]).words("result").to_vec();
        }
        result.into_iter().map(f32::from_bits).collect()
    }

    /// Expected numbers if only these experts contribute.
    fn expected(&self, contributes: impl Fn(usize) -> bool) -> (Vec<f64>, Vec<f64>) {
        let k = self.experts.columns;
        let mut want = f64s(&self.residual);
        let mut size = super::data::magnitudes(&want);
        let y = f64s(&self.y);
        for (slot, &expert) in self.ids.iter().enumerate().filter(|(_, expert)| contributes(**expert)) {
            let (y, weight) = (&y[slot * k..][..k], f64::from(self.weights[slot]));
            let (down, at) = (self.experts.expert(expert), slot / TOP_K * self.n);
            ops::add_scaled(&mut want[at..][..self.n], weight, &ops::linear(y, &down, None, k));
            ops::add_scaled(&mut size[at..][..self.n], weight.abs(), &product_size(y, &down, k));
        }
        (want, size)
    }
}

#[test]
fn groups_with_scales_of_their_own() {
    let mut rng = Rng::new(29);
    for format in GROUPED {
        for way in ways() {
            let (n, k, t) = (37, 96, 2);
            let case = GateUp::random(&mut rng, format, n, k, t, way);
            let (want, size) = case.expected();
            assert_agrees("experts_gate_up", &format!("{format:?} {way:?}"), &case.run(&PARTS), &want, &size);
            let case = Down::random(&mut rng, format, n, k, t, way);
            let (want, size) = case.expected(|_| true);
            assert_agrees("experts_down", &format!("{format:?} {way:?}"), &case.run(&PARTS), &want, &size);
        }
    }
}

#[test]
fn down_of_all_formats_and_ways() {
    let mut rng = Rng::new(22);
    let (ks, ns) = ([2, 3, 5, 64, 65, 140, 96], [1, 6, 33, 133]);
    let mut cases = 0;
    for format in FORMATS {
        for way in ways() {
            let (k, n, t) = (ks[cases % ks.len()], ns[cases % ns.len()], 1 + cases % 4);
            let case = Down::random(&mut rng, format, n, k, t, way);
            let (want, size) = case.expected(|_| true);
            let what = format!("{format:?} {way:?}, K {k}, N {n}, T {t}");
            assert_agrees("experts_down", &what, &case.run(&[(0, EXPERTS)]), &want, &size);
            assert_agrees("experts_down", &format!("{what}, in parts"), &case.run(&PARTS), &want, &size);
            // A part that holds none or few of the chosen experts passes on what was there.
            let (want, size) = case.expected(|expert| expert == 2);
            assert_agrees("experts_down", &format!("{what}, one part"), &case.run(&[(2, 1)]), &want, &size);
            let (want, size) = case.expected(|_| false);
            assert_agrees("experts_down", &format!("{what}, no expert"), &case.run(&[(4, 1)]), &want, &size);
            cases += 1;
        }
    }
    assert!(cases >= 20, "only {cases} cases");
}

/// The comparison notices one changed weight of one expert, and a wrong expert.
#[test]
fn wrong_results_are_noticed() {
    let mut rng = Rng::new(23);
    for format in FORMATS {
        let mut case = Down::random(&mut rng, format, 5, 8, 2, Way::new(Reduce::None, 32, 1));
        let got = case.run(&[(0, EXPERTS)]);
        let verdict = |case: &Down| {
            let (want, size) = case.expected(|_| true);
            compare("experts_down", &got, &want, &size)
        };
        assert!(verdict(&case).is_ok());
        let at = case.ids[1] * 5 * 8 + 3;
        let original = std::mem::replace(&mut case.experts.codes[at], super::data::encode(format, 1.75));
        assert!(verdict(&case).is_err(), "{format:?}: a changed weight went unnoticed");
        case.experts.codes[at] = original;
        case.ids.swap(1, 2);
        assert!(verdict(&case).is_err(), "{format:?}: swapped experts went unnoticed");

        let mut case = GateUp::random(&mut rng, format, 5, 8, 2, Way::new(Reduce::None, 32, 1));
        let got = case.run(&[(0, EXPERTS)]);
        std::mem::swap(&mut case.gate, &mut case.up);
        let (want, size) = case.expected();
        assert!(compare("experts_gate_up", &got, &want, &size).is_err(), "{format:?}: gate for up went unnoticed");
    }
    // What NaN weights poison is their own expert's row.
    let mut case = Down::random(&mut rng, WeightFormat::Fp8, 5, 8, 3, Way::new(Reduce::Workgroup, 64, 2));
    let expert = case.ids[0];
    case.weights[0] = 0.5;
    case.experts.codes[(expert * 5 + 2) * 8 + 6] = 0x7f;
    let (want, size) = case.expected(|_| true);
    assert!(want.iter().enumerate().all(|(i, number)| number.is_finite() || i % 5 == 2));
    assert_agrees("experts_down", "NaN weight", &case.run(&PARTS), &want, &size);
    assert_eq!(bits(&case.run(&PARTS)), bits(&case.run(&PARTS)), "not deterministic");
}
