//! Flag `edit` of `router`: muted, forced and moved experts, scaled weights. (What it does to `latent_write` and
//! `absorb_output` is tested where they are.)

use moewe_oracle::router::{RouterEdit, RouterParams, Scoring, route, route_edited};
use moewe_plan::{FORCED, MUTED};

use super::data::{Rng, assert_agrees, f64s, magnitudes};
use super::router::{params, run, run_edited};

/// An edit, as the kernel has it.
struct Edit {
    offset: Vec<f32>,
    scale: Vec<f32>,
}

impl Edit {
    fn neutral(experts: usize) -> Self {
        Self { offset: vec![0.0; experts], scale: vec![1.0; experts] }
    }

    fn mute(mut self, experts: impl IntoIterator<Item = usize>) -> Self {
        experts.into_iter().for_each(|e| self.offset[e] = MUTED);
        self
    }

    fn force(mut self, experts: impl IntoIterator<Item = usize>) -> Self {
        experts.into_iter().for_each(|e| self.offset[e] = FORCED);
        self
    }

    fn scale(mut self, expert: usize, scale: f32) -> Self {
        self.scale[expert] = scale;
        self
    }

    fn add(mut self, expert: usize, offset: f32) -> Self {
        self.offset[expert] = offset;
        self
    }

    /// The same, as the oracle has it.
    fn oracle(&self) -> RouterEdit {
        let at =
            |wanted: f32| (0..self.offset.len()).filter(|&e| self.offset[e].to_bits() == wanted.to_bits()).collect();
        let moved = self.offset.iter().enumerate().filter(|(_, offset)| offset.abs() < FORCED);
        let scales = self.scale.iter().enumerate();
        RouterEdit {
            muted: at(MUTED),
            forced: at(FORCED),
            offsets: moved.map(|(e, &offset)| (e, offset.into())).collect(),
            scales: scales.map(|(e, &scale)| (e, scale.into())).collect(),
        }
    }
}

fn edited(
    params: &RouterParams,
    logits: &[f32],
    experts: usize,
    bias: Option<&[f32]>,
    edit: &Edit,
) -> (Vec<Vec<usize>>, Vec<f32>) {
    run_edited(params, logits, experts, bias, Some((&edit.offset, &edit.scale)))
}

/// Compares with the oracle. Scores must be so far apart that nothing is close.
fn check(what: &str, params: &RouterParams, logits: &[f32], experts: usize, bias: Option<&[f32]>, edit: &Edit) {
    let (ids, weights) = edited(params, logits, experts, bias, edit);
    let bias = bias.map(f64s);
    let mut expected = Vec::new();
    for (t, row) in f64s(logits).chunks(experts).enumerate() {
        let route = route_edited(row, bias.as_deref(), params, &edit.oracle());
        assert_eq!(ids[t], route.ids, "{what}, token {t}");
        expected.extend(route.weights);
    }
    assert_agrees("router", what, &weights, &expected, &magnitudes(&expected));
}

/// Logits whose scores, and sums of two of them, are far apart, in random order for each token.
fn distinct(rng: &mut Rng, tokens: usize, experts: usize) -> Vec<f32> {
    let step = 6.0 / experts as f64;
    let levels: Vec<f32> = (0..experts).map(|i| ((i as f64 + 0.5 * rng.unit()) * step - 3.0) as f32).collect();
    (0..tokens).flat_map(|_| rng.permutation(experts)).map(|i| levels[i]).collect()
}

/// Expert scoring, experts, groups, groups kept, experts chosen.
const SHAPES: [(Scoring, usize, usize, usize, usize); 6] = [
    (Scoring::Sigmoid, 256, 8, 4, 8),
    (Scoring::Sigmoid, 16, 4, 2, 4),
    (Scoring::Sigmoid, 65, 1, 1, 3),
    (Scoring::Softmax, 160, 8, 3, 6),
    (Scoring::Softmax, 64, 1, 1, 6),
    (Scoring::Softmax, 7, 7, 5, 5),
];

#[test]
fn neutral_parameters_change_no_bit() {
    let mut rng = Rng::new(80);
    for (scoring, experts, groups, topk_group, top_k) in SHAPES {
        let params = params(scoring, groups, topk_group, top_k);
        let mut logits = rng.numbers(20 * experts);
        logits.extend((0..experts).map(|e| if e % 3 == 0 { f32::NAN } else { -0.0 }));
        logits.extend((0..experts).map(|e| [f32::INFINITY, f32::NEG_INFINITY, -200.0, 200.0][e % 4]));
        logits.extend(vec![f32::NAN; experts]);
        let bias = rng.numbers(experts);
        for bias in [None, Some(&bias[..])] {
            let (ids, weights) = run(&params, &logits, experts, bias);
            let (edited_ids, edited_weights) = edited(&params, &logits, experts, bias, &Edit::neutral(experts));
            let bits = |numbers: &[f32]| numbers.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
            assert_eq!(ids, edited_ids, "{params:?}");
            assert_eq!(bits(&weights), bits(&edited_weights), "{params:?}");
        }
    }
}

#[test]
fn edits_of_real_and_odd_shapes() {
    let mut rng = Rng::new(81);
    for (scoring, experts, groups, topk_group, top_k) in SHAPES {
        let params = params(scoring, groups, topk_group, top_k);
        let logits = distinct(&mut rng, 12, experts);
        let bias: Vec<f32> = (0..experts).map(|_| rng.unit() as f32).collect();
        let size = experts / groups;
        let neutral = || Edit::neutral(experts);
        let some = rng.permutation(experts);
        let edits = [
            ("one muted", neutral().mute([some[0]])),
            ("half muted", neutral().mute(some[..experts / 2].iter().copied().take(experts - top_k))),
            ("all but k muted", neutral().mute(some[top_k..].iter().copied())),
            ("a group muted", neutral().mute(if groups > 1 { 0..size } else { 0..1 })),
            ("all of a group but one muted", neutral().mute(if groups > 1 { 1..size } else { 1..2 })),
            ("one forced", neutral().force([some[1]])),
            ("k forced", neutral().force(some[..top_k].iter().copied())),
            ("too many forced", neutral().force(some[..(top_k + 1).min(experts)].iter().copied())),
            ("k forced, the rest muted", neutral().force(some[..top_k].iter().copied()).mute(some[top_k..].to_vec())),
            ("forced, muted and scaled", neutral().force([some[2]]).mute([some[3]]).scale(some[2], -2.0)),
            ("moved", neutral().add(some[4], 10.0).add(some[5 % experts], -10.0).add(some[6 % experts], 0.7)),
            ("all scaled", (0..experts).fold(neutral(), |edit, e| edit.scale(e, e as f32 * 0.25 - 1.0))),
            ("all zero", (0..experts).fold(neutral(), |edit, e| edit.scale(e, 0.0))),
        ];
        for (what, edit) in &edits {
            let what = format!("{scoring:?} {experts} experts, {topk_group} of {groups} groups, {what}");
            check(&what, &params, &logits, experts, None, edit);
            check(&format!("{what}, bias"), &params, &logits, experts, Some(&bias), edit);
        }
    }
}

/// Three groups of four, one is kept.
#[test]
fn forced_experts_come_first_and_muted_ones_are_as_if_not_there() {
    let params = RouterParams { norm_topk_prob: true, ..params(Scoring::Sigmoid, 3, 1, 3) };
    let logits = [2.0, 1.9, 1.8, 1.7, 3.0, 0.5, -1.0, -2.0, 0.9, 0.8, 0.7, 0.6];
    let ids = |edit: Edit| edited(&params, &logits, 12, None, &edit).0.remove(0);
    let neutral = || Edit::neutral(12);
    assert_eq!(ids(neutral()), [0, 1, 2]);
    // Two forced ones, in the order of their scores, from groups that do not stay; then the best of the one that does.
    assert_eq!(ids(neutral().force([6, 8])), [8, 6, 0]);
    // To be forced does not help the group: without 0 … 2 the second group is the best.
    assert_eq!(ids(neutral().mute([0, 1, 2]).force([10])), [10, 4, 5]);
    // Of the group that stays too few are left: its best is repeated with weight 0, and no muted one is chosen.
    let edit = neutral().mute([0, 1, 2, 5, 6, 7]).add(4, 10.0);
    let (found, weights) = edited(&params, &logits, 12, None, &edit);
    assert_eq!(found, [[4, 4, 4]]);
    assert!((weights[0] - 2.5).abs() < 1e-6 && weights[1..] == [0.0, 0.0], "{weights:?}");
    // Nobody is left at all.
    let (found, weights) = edited(&params, &logits, 12, None, &neutral().mute(0..12));
    assert_eq!((found, weights), (vec![vec![0; 3]], vec![0.0; 3]));
    // A group without members loses against groups whose scores are all below zero.
    let bias = [-5.0; 12];
    let (found, _) = edited(&params, &logits, 12, Some(&bias), &neutral().mute(0..4));
    assert_eq!(found, [[4, 5, 6]]);
}

/// Weights come from the scores of the chosen, whatever was added to choose them.
#[test]
fn offsets_choose_and_do_not_weigh() {
    let params = params(Scoring::Sigmoid, 1, 1, 2);
    let logits = [1.0, 0.0, -1.0, 0.5];
    let (ids, weights) = edited(&params, &logits, 4, None, &Edit::neutral(4).add(2, 100.0).add(1, 50.0));
    assert_eq!(ids, [[2, 1]]);
    let alone = route(&[0.0, -1.0], None, &params);
    let expected = [alone.weights[1], alone.weights[0]];
    assert_agrees("router", "offsets", &weights, &expected, &expected);
}

/// NaN logits and NaN parameters: ids stay in range, and a muted expert stays out.
#[test]
fn hostile_numbers_keep_ids_in_range() {
    let mut rng = Rng::new(82);
    for (scoring, experts, groups, topk_group, top_k) in SHAPES {
        let params = params(scoring, groups, topk_group, top_k);
        let mut logits = rng.numbers(3 * experts);
        logits[..experts].fill(f32::NAN);
        logits[experts..2 * experts].iter_mut().step_by(2).for_each(|logit| *logit = f32::NAN);
        let muted = rng.below(experts);
        let forced = (muted + 1) % experts;
        let edit = Edit::neutral(experts).mute([muted]).force([forced]);
        for (ids, t) in edited(&params, &logits, experts, None, &edit).0.iter().zip(0..) {
            assert!(ids.iter().all(|&e| e < experts && e != muted), "{params:?} {t}: {ids:?} with {muted} muted");
            assert_eq!(ids[0], forced, "{params:?} {t}");
        }
        let wild = Edit {
            offset: (0..experts).map(|e| [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38][e % 4]).collect(),
            scale: vec![f32::NAN; experts],
        };
        for ids in edited(&params, &logits, experts, None, &wild).0 {
            assert!(ids.iter().all(|&e| e < experts), "{params:?}: {ids:?}");
        }
    }
}
