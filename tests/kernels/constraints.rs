//! `sample` under masks and biases.

use moewe_oracle::ops::argmax;
use moewe_oracle::sampling::{candidates, draw};
use moewe_plan::Sampling;

use super::data::Rng;
use super::sampler::{FREE, Limits, NOTHING, Sample, check_limited, params};

/// One row for each of these: logits, settings, mask and bias.
fn sample(vocab: usize, workgroup: usize, cases: &[(Vec<f32>, Sampling, Limits)]) -> Vec<usize> {
    let logits: Vec<f32> = cases.iter().flat_map(|case| case.0.iter().copied()).collect();
    // Sequences stand in another order than rows.
    let count = cases.len() as u32;
    Sample {
        vocab,
        workgroup,
        logits: &logits,
        rows: (0..count).map(|row| (3, count - 1 - row)).collect(),
        sampling: cases.iter().rev().map(|case| case.1).collect(),
        seen: vec![Vec::new(); cases.len()],
        limits: cases.iter().rev().map(|case| case.2.clone()).collect(),
    }
    .run()
}

/// The largest of what may be drawn, the lowest id of equals.
fn greedy(logits: &[f32], limits: &Limits) -> usize {
    let limited = limits.apply(logits);
    if limited.iter().all(|&logit| logit == f64::NEG_INFINITY) { NOTHING } else { argmax(&limited) }
}

/// Sixteenths, so that sums are exact and ties are many.
fn sixteenths(rng: &mut Rng, most: f32) -> f32 {
    (rng.number() * most * 16.0).round() / 16.0
}

fn mask(rng: &mut Rng, vocab: usize, kind: usize) -> Option<Vec<usize>> {
    match kind {
        0 => None,
        1 => Some(vec![rng.below(vocab)]),
        2 => Some(vec![vocab - 1]),
        3 => Some(vec![0]),
        4 => Some((0..vocab).collect()),
        5 => Some((0..vocab).filter(|token| token % 31 == 30 || *token == vocab - 1).collect()),
        _ => Some((0..vocab).filter(|token| rng.below(2) == 0 || *token == vocab / 2).collect()),
    }
}

fn bias(rng: &mut Rng, vocab: usize, kind: usize) -> Vec<(usize, f32)> {
    let last = vocab - 1;
    match kind {
        0 => Vec::new(),
        1 => vec![(rng.below(vocab), 100.0)],
        2 => vec![(rng.below(vocab), -100.0)],
        3 => (0..vocab).map(|token| (token, sixteenths(rng, 4.0))).collect(),
        4 => (0..last).filter(|_| rng.below(3) == 0).map(|token| (token, -100.0)).chain([(last, 100.0)]).collect(),
        _ => (0..vocab).map(|token| (token, 7.5)).collect(),
    }
}

#[test]
fn the_largest_is_of_the_mask_and_of_biased_logits() {
    let mut rng = Rng::new(70);
    let (mut moved, mut nothing) = (0, 0);
    for (workgroup, vocabularies) in
        [(8, [1, 2, 31, 32, 33]), (64, [64, 65, 95, 1000, 63]), (256, [255, 257, 4099, 7, 129])]
    {
        for vocab in vocabularies {
            let mut cases = Vec::new();
            for kind in 0..7 * 6 {
                let mut logits: Vec<f32> = (0..vocab).map(|_| sixteenths(&mut rng, 5.0)).collect();
                for _ in 0..kind % 3 {
                    let odd = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -f32::NAN][rng.below(4)];
                    logits[rng.below(vocab)] = odd;
                }
                let limits = Limits { mask: mask(&mut rng, vocab, kind % 7), bias: bias(&mut rng, vocab, kind / 7) };
                cases.push((logits, Sampling::default(), limits));
            }
            let want: Vec<usize> = cases.iter().map(|case| greedy(&case.0, &case.2)).collect();
            assert_eq!(sample(vocab, workgroup, &cases), want, "V {vocab}, WG {workgroup}");
            // What is drawn with a temperature is what the race says of the limited distribution.
            let mut hot = cases;
            for case in &mut hot {
                case.1 = Sampling { temperature: 0.8, top_k: 40, ..FREE };
            }
            for (i, token) in sample(vocab, workgroup, &hot).into_iter().enumerate() {
                let (logits, how, limits) = &hot[i];
                if want[i] == NOTHING {
                    assert_eq!(token, NOTHING);
                    nothing += 1;
                    continue;
                }
                let limited = limits.apply(logits);
                if limited.contains(&f64::INFINITY) {
                    assert!(limited[token] == f64::INFINITY, "V {vocab}, case {i}: {token}");
                    continue;
                }
                let mut among = candidates(&limited, &[], &params(how));
                among.retain(|candidate| candidate.probability > 0.0);
                let (winner, lead) = draw(&among, 1 | 2 << 32, 3);
                assert!(
                    token == winner || lead < 1e-4,
                    "V {vocab}, case {i}: {token} instead of {winner}, by {lead:e}"
                );
                moved += usize::from(greedy(logits, &Limits::default()) != want[i]);
            }
        }
    }
    assert!(moved > 100 && nothing > 10, "limits changed {moved} choices, and left nothing {nothing} times");
}

#[test]
fn draws_follow_the_limited_distribution() {
    let mut rng = Rng::new(71);
    let logits: Vec<f32> = (0..50).map(|_| (rng.unit() * 5.0 - 2.0) as f32).collect();
    let odd: Vec<usize> = (1..50).step_by(2).collect();
    let bias: Vec<(usize, f32)> = (0..50).step_by(3).map(|token| (token, (rng.unit() * 4.0 - 2.0) as f32)).collect();
    let masked = Limits { mask: Some(odd.clone()), bias: Vec::new() };
    let biased = Limits { mask: None, bias: bias.clone() };
    let both = Limits { mask: Some(odd), bias };
    let all = Sampling { temperature: 1.3, top_k: 20, top_p: 0.8, min_p: 0.1, repetition_penalty: 1.6, ..FREE };
    let seen: Vec<usize> = (0..50).step_by(5).collect();
    for (what, limits) in [("masked", &masked), ("biased", &biased), ("masked and biased", &both)] {
        check_limited(what, &logits, 8, 20_000, FREE, &[], limits);
        check_limited(&format!("{what}, all settings"), &logits, 64, 20_000, all, &seen, limits);
        check_limited(&format!("{what}, top-p"), &logits, 8, 10_000, Sampling { top_p: 0.6, ..FREE }, &[], limits);
    }
    // Two of three kept by top-k are outside the mask: they do not count among the three.
    let mut logits = logits;
    (logits[4], logits[8]) = (9.0, 8.0);
    check_limited("top-k of the mask", &logits, 8, 10_000, Sampling { top_k: 3, ..FREE }, &[], &masked);
    // Biases of a hundred rule out, and choose.
    let without = Limits { mask: None, bias: vec![(4, -100.0), (8, -100.0)] };
    check_limited("without two", &logits, 8, 10_000, FREE, &[], &without);
    let chosen = Limits { mask: None, bias: vec![(17, 100.0)] };
    check_limited("chosen", &logits, 8, 1_000, FREE, &[], &chosen);
}

/// Before the penalty, whose effect depends on the sign, and before the temperature.
#[test]
fn the_bias_comes_first() {
    let logits = vec![1.0, -1.0, 1.5];
    let how = Sampling { temperature: 0.0, repetition_penalty: 4.0, ..FREE };
    // 1 − 3 = −2 becomes −8; −1 + 3 = 2 becomes 0.5; 1.5 − 0.9 stays 0.6.
    let limits = Limits { mask: None, bias: vec![(0, -3.0), (1, 3.0), (2, -0.9)] };
    let run = |seen: Vec<usize>| {
        let (rows, sampling, limits) = (vec![(0, 0)], vec![how], vec![limits.clone()]);
        Sample { vocab: 3, workgroup: 8, logits: &logits, rows, sampling, seen: vec![seen], limits }.run()[0]
    };
    assert_eq!([run(vec![]), run(vec![0, 1]), run(vec![0, 1, 2])], [1, 2, 1]);
}

/// Sums that exceed all numbers are the largest or the lowest one, and can be drawn.
#[test]
fn sums_may_overflow() {
    let (max, vocab) = (f32::MAX, 40);
    let with = |numbers: &[(usize, f32)]| {
        let mut logits = vec![0.0; vocab];
        for &(token, number) in numbers {
            logits[token] = number;
        }
        logits
    };
    let only = |token| Some(vec![token]);
    for how in [Sampling::default(), FREE, Sampling { temperature: 0.5, top_p: 0.9, top_k: 3, ..FREE }] {
        let cases = [
            (with(&[(39, max)]), how, Limits { mask: None, bias: vec![(39, max)] }),
            (with(&[(5, -max)]), how, Limits { mask: only(5), bias: vec![(5, -max)] }),
            (with(&[(5, max)]), how, Limits { mask: only(7), bias: vec![(5, max), (7, -max)] }),
            (with(&[(6, f32::INFINITY)]), how, Limits { mask: None, bias: vec![(6, -max), (7, 100.0)] }),
            (with(&[(6, f32::NAN)]), how, Limits { mask: only(6), bias: vec![(6, max)] }),
            (with(&[(6, f32::NEG_INFINITY)]), how, Limits { mask: only(6), bias: vec![(6, max)] }),
        ];
        assert_eq!(sample(vocab, 64, &cases), [39, 5, 7, 6, NOTHING, NOTHING], "{how:?}");
    }
}
