//! `router`: the cases of units.json, real shapes, ties, and logits that are not numbers.

use moewe_oracle::config::router_params;
use moewe_oracle::ops;
use moewe_oracle::router::{
    RouterParams, Scoring, TopkMethod, group_scores, limit_groups, route, scores, selection_scores,
};
use moewe_plan::WeightFormat;
use moewe_shaders::Variant;
use serde_json::Value;

use super::data::{FORMATS, Matrix, Rng, assert_agrees, compare, f64s, product_size};
use super::harness::{Call, Outputs, ways};

/// Ids of each token, and the weights.
type Routes = (Vec<Vec<usize>>, Vec<f32>);

pub fn run(params: &RouterParams, logits: &[f32], experts: usize, bias: Option<&[f32]>) -> Routes {
    run_edited(params, logits, experts, bias, None)
}

/// With flag `edit` if there are offsets and scales.
pub fn run_edited(
    params: &RouterParams,
    logits: &[f32],
    experts: usize,
    bias: Option<&[f32]>,
    edit: Option<(&[f32], &[f32])>,
) -> Routes {
    let (t, k) = (logits.len() / experts, params.top_k);
    let variant = routing(Variant::new("router").int("WG", 64), params, experts, bias.is_some(), SHARED);
    let mut call = Call::new(&variant.flag("edit", edit.is_some())).floats("logits", logits);
    if let Some(bias) = bias {
        call = call.floats("bias", bias);
    }
    if let Some((offset, scale)) = edit {
        call = call.floats("expert_offset", offset).floats("expert_scale", scale);
    }
    let slots = k + SHARED;
    let outputs = call.output("ids", t * slots).output("weights", t * slots).run([t, 1, 1]);
    without_shared(&outputs, k, experts)
}

/// Shared experts behind the chosen ones.
const SHARED: usize = 2;

/// Ids and weights without the shared experts, which stand where they should.
fn without_shared(outputs: &Outputs, k: usize, experts: usize) -> Routes {
    let (ids, weights) = (outputs.words("ids"), outputs.floats("weights"));
    let shared = [experts as u32, experts as u32 + 1];
    assert!(ids.chunks(k + SHARED).all(|ids| ids[k..] == shared), "shared experts stand behind the chosen ones");
    assert!(weights.chunks(k + SHARED).all(|weights| weights[k..] == [1.0, 1.0]), "and have weight 1");
    let ids = ids.chunks(k + SHARED).map(|ids| ids[..k].iter().map(|&id| id as usize).collect()).collect();
    (ids, weights.chunks(k + SHARED).flat_map(|weights| &weights[..k]).copied().collect())
}

/// Flags and constants of the rule.
fn routing(variant: Variant, params: &RouterParams, experts: usize, bias: bool, shared: usize) -> Variant {
    let groups = params.limits_groups();
    let variant = variant
        .flag("bias", bias)
        .flag("groups", groups)
        .flag("normalise", params.norm_topk_prob && params.scoring == Scoring::Sigmoid)
        .flag("softmax", params.scoring == Scoring::Softmax)
        .flag("top2", params.method == TopkMethod::NoauxTc)
        .int("E", experts)
        .int("TOP_K", params.top_k)
        .int("SHARED", shared)
        .int("N_GROUP", if groups { params.groups } else { 1 })
        .float("SCALE", params.scale);
    if groups { variant.int("TOPK_GROUP", params.topk_group) } else { variant }
}

/// Smallest distance of scores whose order matters: the chosen experts and the next, the kept groups and the next.
fn margin(params: &RouterParams, logits: &[f64], bias: Option<&[f64]>) -> f64 {
    let selection = selection_scores(&scores(logits, params.scoring), bias);
    let closest = |mut values: Vec<f64>, from: usize, to: usize| {
        values.sort_by(|a, b| b.total_cmp(a));
        let pairs = values[..(to + 1).min(values.len())].windows(2).skip(from);
        pairs.map(|pair| pair[0] - pair[1]).fold(f64::INFINITY, f64::min)
    };
    if !params.limits_groups() {
        return closest(selection, 0, params.top_k);
    }
    let groups = group_scores(&selection, params.groups, params.scoring);
    let limited = limit_groups(&selection, params.groups, params.topk_group, params.scoring);
    closest(groups, params.topk_group - 1, params.topk_group).min(closest(limited, 0, params.top_k))
}

/// Compares with the oracle; returns how many tokens were too close to call.
fn check(what: &str, params: &RouterParams, logits: &[f32], experts: usize, bias: Option<&[f32]>) -> usize {
    let (ids, weights) = run(params, logits, experts, bias);
    let bias = bias.map(f64s);
    let (mut got, mut want, mut close) = (Vec::new(), Vec::new(), 0);
    for (t, logits) in f64s(logits).chunks(experts).enumerate() {
        if margin(params, logits, bias.as_deref()) < 1e-6 {
            close += 1;
            continue;
        }
        let route = route(logits, bias.as_deref(), params);
        assert_eq!(ids[t], route.ids, "{what}, token {t}");
        got.extend(&weights[t * params.top_k..][..params.top_k]);
        want.extend(route.weights);
    }
    assert_agrees("router", what, &got, &want, &want);
    close
}

pub fn params(scoring: Scoring, groups: usize, topk_group: usize, top_k: usize) -> RouterParams {
    let method = match (scoring, groups) {
        (Scoring::Sigmoid, _) => TopkMethod::NoauxTc,
        (Scoring::Softmax, 1) => TopkMethod::Greedy,
        (Scoring::Softmax, _) => TopkMethod::GroupLimitedGreedy,
    };
    let norm_topk_prob = scoring == Scoring::Sigmoid;
    RouterParams { scoring, method, groups, topk_group, top_k, norm_topk_prob, scale: 2.5 }
}

#[test]
fn cases_of_units_json() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/units.json");
    let units: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let numbers = |json: &Value| -> Vec<f32> {
        json.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
    };
    let cases = units["router"].as_array().unwrap();
    assert_eq!(cases.len(), 7);
    for case in cases {
        let params = router_params(&case["config"]).unwrap();
        let bias = case["bias"].is_array().then(|| numbers(&case["bias"]));
        let rows: Vec<Vec<f32>> = case["logits"].as_array().unwrap().iter().map(numbers).collect();
        let (got, weights) = run(&params, &rows.concat(), rows[0].len(), bias.as_deref());
        assert!(got.len() >= 2);
        for (t, got) in got.iter().enumerate() {
            let mut pairs: Vec<(usize, f32)> =
                got.iter().copied().zip(weights[t * params.top_k..].iter().copied()).collect();
            pairs.sort_by_key(|&(id, _)| id);
            let (ids, weights): (Vec<usize>, Vec<f32>) = pairs.into_iter().unzip();
            let want_ids: Vec<usize> =
                case["ids_ascending"][t].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as usize).collect();
            assert_eq!(ids, want_ids, "{}, token {t}", case["note"]);
            let want: Vec<f64> =
                case["weights"][t].as_array().unwrap().iter().map(|weight| weight.as_f64().unwrap()).collect();
            assert_agrees("router", &format!("{}, token {t}", case["note"]), &weights, &want, &want);
        }
    }
}

#[test]
fn shapes_of_the_releases_and_odd_ones() {
    let mut rng = Rng::new(40);
    let shapes = [
        (Scoring::Sigmoid, 256, 8, 4, 8),
        (Scoring::Sigmoid, 384, 1, 1, 8),
        (Scoring::Sigmoid, 16, 4, 2, 4),
        (Scoring::Sigmoid, 6, 3, 1, 2),
        (Scoring::Sigmoid, 130, 65, 7, 14),
        (Scoring::Softmax, 160, 8, 3, 6),
        (Scoring::Softmax, 64, 1, 1, 6),
        (Scoring::Softmax, 7, 7, 5, 5),
        (Scoring::Softmax, 5, 1, 1, 5),
        (Scoring::Softmax, 1, 1, 1, 1),
        (Scoring::Sigmoid, 2, 1, 1, 1),
        (Scoring::Sigmoid, 65, 1, 1, 3),
    ];
    for (i, (scoring, experts, groups, topk_group, top_k)) in shapes.into_iter().enumerate() {
        let mut params = params(scoring, groups, topk_group, top_k);
        let t = 20;
        let logits: Vec<f32> = (0..t * experts).map(|_| (rng.unit() * 8.0 - 4.0) as f32).collect();
        let bias: Vec<f32> = (0..experts).map(|_| (rng.unit() - 0.5) as f32).collect();
        // All biased scores below zero: the dropped groups must still lose.
        let negative: Vec<f32> = bias.iter().map(|bias| bias - 2.0).collect();
        let what = format!("{scoring:?} {experts} experts, {topk_group} of {groups} groups, top {top_k}");
        let mut close = check(&format!("{what}, bias"), &params, &logits, experts, Some(&bias));
        close += check(&format!("{what}, negative"), &params, &logits, experts, Some(&negative));
        if i % 2 == 0 {
            params.norm_topk_prob = !params.norm_topk_prob;
            params.scale = 1.0;
        }
        close += check(&format!("{what}, no bias"), &params, &logits, experts, None);
        assert!(close <= 4, "{what}: {close} tokens were too close to call");
    }
}

#[test]
fn ties_go_to_the_lowest_index() {
    for scoring in [Scoring::Sigmoid, Scoring::Softmax] {
        let flat = params(scoring, 1, 1, 5);
        let (ids, weights) = run(&flat, &[0.5; 70], 70, None);
        assert_eq!(ids, [[0, 1, 2, 3, 4]]);
        assert!(weights.iter().all(|weight| weight.to_bits() == weights[0].to_bits() && *weight > 0.0));
        // Equal pairs far apart, so that different invocations hold them.
        let mut logits = [0.0; 140];
        for (i, logit) in logits.iter_mut().enumerate() {
            *logit = (i % 70) as f32 / 16.0;
        }
        assert_eq!(run(&flat, &logits, 140, None).0, [[69, 139, 68, 138, 67]]);
        // Equal groups: the first ones stay.
        let grouped = params(scoring, 8, 3, 4);
        let logits: Vec<f32> = (0..32).map(|i| (i % 4) as f32).collect();
        assert_eq!(run(&grouped, &logits, 32, None).0, [[3, 7, 11, 2]]);
    }
    // -0 and 0 are the same score.
    let flat = params(Scoring::Sigmoid, 1, 1, 3);
    assert_eq!(run(&flat, &[0.0, -0.0, 0.0, -0.0], 4, None).0, [[0, 1, 2]]);
}

#[test]
fn extreme_logits() {
    let mut rng = Rng::new(41);
    let mut softmax: Vec<f32> = rng.permutation(40).into_iter().map(|i| i as f32 * 3.0 - 90.0).collect();
    softmax[7] = f32::NEG_INFINITY;
    softmax[8] = -3e38;
    check("softmax over 120", &params(Scoring::Softmax, 1, 1, 2), &softmax, 40, None);
    let shifted: Vec<f32> = softmax.iter().map(|logit| logit + 1e5).collect();
    check("softmax of huge logits", &params(Scoring::Softmax, 1, 1, 2), &shifted, 40, None);
    let sigmoid = [-f32::INFINITY, -200.0, -100.0, -50.0, 2.0, f32::INFINITY, 1.0, -3e38];
    check("sigmoid of extremes", &params(Scoring::Sigmoid, 1, 1, 3), &sigmoid, 8, None);
    // Nothing left to normalise by: weights are zeros, not NaN.
    let (ids, weights) = run(&params(Scoring::Sigmoid, 1, 1, 3), &[-f32::INFINITY; 8], 8, None);
    assert_eq!((ids, weights), (vec![vec![0, 1, 2]], vec![0.0; 3]));
}

/// A NaN logit is never preferred to a number, and ids stay in range and distinct even if nothing else is there.
#[test]
fn logits_that_are_not_numbers() {
    let mut rng = Rng::new(42);
    let mut rows = 0;
    for (scoring, groups, topk_group) in
        [(Scoring::Sigmoid, 1, 1), (Scoring::Softmax, 1, 1), (Scoring::Sigmoid, 8, 4), (Scoring::Softmax, 8, 3)]
    {
        for biased in [false, true] {
            let (experts, top_k) = (72, 6);
            let params = params(scoring, groups, topk_group, top_k);
            let bias: Vec<f32> = (0..experts).map(|_| (rng.unit() - 1.5) as f32).collect();
            let mut logits = Vec::new();
            for nans in [1, 36, 66, 70, 72] {
                let mut row = rng.numbers(experts);
                let nan = rng.permutation(experts);
                for &e in &nan[..nans] {
                    row[e] = if e % 2 == 0 { f32::NAN } else { -f32::NAN };
                }
                logits.extend(row);
            }
            logits.extend([f32::INFINITY; 72]);
            logits.extend([f32::NEG_INFINITY; 72]);
            let (ids, weights) = run(&params, &logits, experts, biased.then_some(&bias[..]));
            for (t, ids) in ids.iter().enumerate() {
                let mut sorted = ids.clone();
                sorted.sort_unstable();
                sorted.dedup();
                assert!(sorted.len() == top_k && sorted[top_k - 1] < experts, "{params:?} row {t}: {ids:?}");
                let row = &logits[t * experts..][..experts];
                let numbers = row.iter().filter(|logit| !logit.is_nan()).count();
                if groups == 1 {
                    let chosen = ids.iter().filter(|&&e| !row[e].is_nan()).count();
                    assert_eq!(chosen, numbers.min(top_k), "{params:?} row {t}: {ids:?}");
                }
                if row.iter().any(|logit| logit.is_finite()) {
                    assert!(weights[t * top_k..][..top_k].iter().all(|weight| weight.is_finite()), "row {t}");
                }
                rows += 1;
            }
        }
    }
    assert_eq!(rows, 8 * 7);
}

#[test]
fn wrong_results_are_noticed() {
    let mut rng = Rng::new(43);
    let mut params = params(Scoring::Sigmoid, 4, 2, 4);
    let (logits, bias) = (rng.numbers(16), rng.numbers(16));
    let (ids, weights) = run(&params, &logits, 16, Some(&bias));
    let expected = |params: &RouterParams| route(&f64s(&logits), Some(&f64s(&bias)), params);
    assert_eq!(ids[0], expected(&params).ids);
    params.scale = 2.50002;
    let wrong = expected(&params).weights;
    assert!(compare("router", &weights, &wrong, &wrong).is_err(), "another scale went unnoticed");
    params.groups = 1;
    assert_ne!(ids[0], expected(&params).ids, "the groups made no difference");
}

/// Logits and choice in one dispatch, by one workgroup for a token or by several, of which the last one chooses, dispatch after
/// dispatch with one count.
#[test]
fn products_are_judged_where_they_are_made() {
    let mut rng = Rng::new(48);
    let shapes = [(Scoring::Sigmoid, 256, 8, 4, 8), (Scoring::Softmax, 33, 1, 1, 3), (Scoring::Sigmoid, 16, 4, 2, 4)];
    let formats = FORMATS.into_iter().filter(|format| *format != WeightFormat::Fp8);
    for (case, format) in formats.enumerate() {
        for way in ways() {
            let (scoring, experts, groups, topk_group, k) = shapes[case % shapes.len()];
            let params = params(scoring, groups, topk_group, k);
            let (width, t) = ([96, 40, 33][case % 3], 5);
            let w = Matrix::random(&mut rng, format, experts, width);
            let (x, norm, bias) = (rng.numbers(t * width), rng.norm(width), rng.numbers(experts));
            let tail = experts > way.rows * way.workgroup / way.lanes;
            let variant = way.plug(Variant::new("router_product").weight(format), &w).flag("tail", tail);
            let variant = routing(variant, &params, experts, true, SHARED).flag("norm", true).float("EPS", 1e-6);
            let both = |arrived: &[u32]| {
                let mut call = Call::new(&variant.clone().int("K", width))
                    .floats("x", &x)
                    .matrix("w", &w, 0, experts)
                    .fours("norm", &norm)
                    .floats("bias", &bias);
                if tail {
                    call = call.words("arrived", arrived);
                }
                let slots = t * (k + SHARED);
                let call = call.output("logits", t * experts).output("ids", slots).output("weights", slots);
                call.run([way.groups(experts), t, 1])
            };
            let outputs = both(&vec![0; t]);
            if tail {
                assert_eq!(outputs.words("arrived"), vec![0; t], "ready for the next dispatch");
            }
            let (what, logits) = (format!("{format:?} {way:?}, {experts} experts"), outputs.floats("logits"));
            let normed = ops::rms_norm(&f64s(&x), &f64s(&norm), 1e-6);
            let numbers = w.numbers();
            let (want, size) = (ops::linear(&normed, &numbers, None, width), product_size(&normed, &numbers, width));
            assert_agrees("router_product", &what, &logits, &want, &size);
            // The choice is that of the other kernel for these logits.
            let (ids, weights) = without_shared(&outputs, k, experts);
            assert_eq!((ids, weights), run(&params, &logits, experts, Some(&bias)), "{what}");
        }
    }
}
