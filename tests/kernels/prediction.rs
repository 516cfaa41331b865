//! `top_tokens`: likeliest tokens, entropy, and what is said of one token.

use moewe_oracle::prediction::{Prediction, predict};
use moewe_shaders::Variant;

use super::data::{Rng, assert_agrees, compare, f64s};
use super::harness::Call;

/// What is asked of each row, as the kernel is told.
enum Asked<'a> {
    Nothing,
    /// `next` of each token; (token, sampled id) of each row.
    Next(&'a [u32], &'a [(u32, u32)]),
    /// First of the given ids of each row.
    Given(&'a [u32]),
}

struct Told {
    ids: Vec<u32>,
    probs: Vec<f32>,
    stats: Vec<f32>,
}

fn run(vocab: usize, workgroup: usize, logits: &[f32], asked: &Asked) -> Told {
    let (t, top) = (logits.len() / vocab, vocab.min(8));
    let variant = Variant::new("top_tokens")
        .flag("next", matches!(asked, Asked::Next(..)))
        .flag("given", matches!(asked, Asked::Given(_)))
        .int("V", vocab)
        .int("TOP", top)
        .int("WG", workgroup);
    let mut call = Call::new(&variant).floats("logits", logits).output("ids", t * top).output("probs", t * top);
    call = match asked {
        Asked::Nothing => call,
        Asked::Next(next, rows) => {
            assert_eq!(next.len(), t);
            let tokens: Vec<u32> = next.iter().flat_map(|&next| [u32::MAX, 5, 0, next]).collect();
            let (places, sampled): (Vec<u32>, Vec<u32>) = rows.iter().copied().unzip();
            let call = call.batch(t, rows.len()).words("tokens", &tokens).output("stats", t * 3);
            // No row at all: a buffer may not be empty, and what is in it must not count.
            let some = |words: Vec<u32>| if words.is_empty() { vec![0] } else { words };
            call.words("rows", &some(places)).words("sampled", &some(sampled))
        }
        Asked::Given(given) => {
            let ids: Vec<u32> = given.iter().flat_map(|&id| [vec![id], vec![u32::MAX; top - 1]].concat()).collect();
            call.words("given", &ids).output("stats", t * 3)
        }
    };
    let outputs = call.run([t, 1, 1]);
    let stats = if matches!(asked, Asked::Nothing) { Vec::new() } else { outputs.floats("stats") };
    Told { ids: outputs.words("ids").to_vec(), probs: outputs.floats("probs"), stats }
}

/// The numbers of a row as the oracle has them, with their conditions: how far a rounding of a logit moves them.
fn numbers(told: &Prediction, logits: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>) {
    let size = |p: &f64| p * (2.0 - p.max(1e-45).ln());
    let probs_size = told.probs.iter().map(size).collect();
    let (log_probability, rank) = told.asked.map_or((f64::NAN, f64::NAN), |(p, rank)| (p, rank as f64));
    let width = logits.iter().copied().filter(|x| x.is_finite()).map(f64::abs).fold(1.0, f64::max).min(100.0);
    // What exceeds f32 is infinite there.
    let stats = vec![told.entropy, f64::from(log_probability as f32), rank];
    let stats_size = vec![1.0 + told.entropy + width, 1.0 + log_probability.abs() + width, 1e-30];
    (told.probs.clone(), probs_size, stats, stats_size)
}

/// Compares every row with the oracle; `asked` is the token of each row.
fn check(what: &str, vocab: usize, logits: &[f32], told: &Told, asked: &[Option<usize>]) {
    let top = vocab.min(8);
    for (t, (logits, &asked)) in f64s(logits).chunks(vocab).zip(asked).enumerate() {
        let expected = predict(logits, 8, asked);
        let ids: Vec<usize> = told.ids[t * top..][..top].iter().map(|&id| id as usize).collect();
        assert_eq!(ids, expected.ids, "{what}, row {t}");
        let (probs, probs_size, stats, stats_size) = numbers(&expected, logits);
        assert_agrees("top_tokens", &format!("{what}, row {t}"), &told.probs[t * top..][..top], &probs, &probs_size);
        if !told.stats.is_empty() {
            let found = &told.stats[t * 3..][..3];
            assert_agrees("top_tokens", &format!("{what}, row {t}, stats"), found, &stats, &stats_size);
        }
    }
}

#[test]
fn vocabularies_of_any_size() {
    let mut rng = Rng::new(90);
    for (i, vocab) in [1, 2, 5, 7, 8, 9, 31, 64, 65, 255, 257, 1000, 4099, 20_011].into_iter().enumerate() {
        let workgroup = [32, 64, 256][i % 3];
        let t = 5;
        // Of few values there are many ties.
        let steps = if i % 2 == 0 { 0.0 } else { 4.0 };
        let logit = |rng: &mut Rng| {
            let number = rng.unit() * 24.0 - 12.0;
            (if steps > 0.0 { (number * steps).round() / steps } else { number }) as f32
        };
        let logits: Vec<f32> = (0..t * vocab).map(|_| logit(&mut rng)).collect();
        let ids: Vec<usize> = (0..t).map(|_| rng.below(vocab)).collect();
        let given: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let what = format!("{vocab} tokens, {workgroup} invocations");

        let plain = run(vocab, workgroup, &logits, &Asked::Nothing);
        check(&what, vocab, &logits, &plain, &[None; 5]);
        let told = run(vocab, workgroup, &logits, &Asked::Given(&given));
        check(&format!("{what}, given"), vocab, &logits, &told, &ids.iter().map(|&id| Some(id)).collect::<Vec<_>>());
        assert_eq!((&plain.ids, &plain.probs), (&told.ids, &told.probs), "{what}");

        // Two tokens whose next is known (one of them stands for a row, too), two that rows stand for, one of neither.
        let next = [given[0] + 1, 0, given[2] + 1, 0, 0];
        let rows = [(3, given[3]), (2, u32::MAX), (1, given[1])];
        let told = run(vocab, workgroup, &logits, &Asked::Next(&next, &rows));
        let asked = [Some(ids[0]), Some(ids[1]), Some(ids[2]), Some(ids[3]), None];
        check(&format!("{what}, next"), vocab, &logits, &told, &asked);
        assert_eq!((plain.ids, plain.probs), (told.ids, told.probs), "{what}");
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    let vocab = 300;
    let mut logits = vec![1.5; vocab];
    logits.extend((0..vocab).map(|i| if i % 2 == 0 { -0.0 } else { 0.0 }));
    // The largest stand at the end, in one invocation and in several.
    logits.extend((0..vocab).map(|i| if i >= 290 || i % 64 == 11 { 7.0 } else { -7.0 }));
    let told = run(vocab, 64, &logits, &Asked::Given(&[299, 299, 290]));
    assert_eq!(told.ids[..16], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(told.ids[16..], [11, 75, 139, 203, 267, 290, 291, 292]);
    check("ties", vocab, &logits, &told, &[Some(299), Some(299), Some(290)]);
    assert_eq!((told.stats[2], told.stats[5], told.stats[8]), (299.0, 299.0, 5.0));
    // More equals than are told, all with one invocation.
    let logits: Vec<f32> = (0..1200).map(|i| if i % 64 == 11 { 7.0 } else { -7.0 }).collect();
    let told = run(1200, 64, &logits, &Asked::Nothing);
    assert_eq!(told.ids, [11, 75, 139, 203, 267, 331, 395, 459]);
}

#[test]
fn logits_that_are_not_numbers() {
    let (vocab, nan, infinity) = (130, f32::NAN, f32::INFINITY);
    let mut rng = Rng::new(91);
    let rows: Vec<Vec<f32>> = vec![
        vec![nan; vocab],
        vec![-infinity; vocab],
        vec![infinity; vocab],
        (0..vocab).map(|i| if i == 77 { 0.25 } else { -nan }).collect(),
        (0..vocab).map(|i| if i % 50 == 49 { infinity } else { rng.number() }).collect(),
        (0..vocab).map(|i| [nan, -infinity, rng.number(), infinity, 3e38, -3e38][(i + 2) % 6]).collect(),
        (0..vocab).map(|i| if i % 3 == 0 { nan } else { rng.number() }).collect(),
        (0..vocab).map(|i| [1e30, -1e30, 0.0, 1e-40][i % 4]).collect(),
    ];
    let logits = rows.concat();
    for id in [0, 77, 129] {
        let given = vec![id; rows.len()];
        let told = run(vocab, 64, &logits, &Asked::Given(&given));
        // A subnormal may be flushed: it is then one of the ties of the last row.
        let sound = (rows.len() - 1) * vocab;
        let asked = vec![Some(id as usize); rows.len() - 1];
        check("not numbers", vocab, &logits[..sound], &told, &asked);
        assert!(told.ids.iter().all(|&id| (id as usize) < vocab));
        assert_eq!(told.ids[56..], [0, 4, 8, 12, 16, 20, 24, 28]);
    }
}

/// What the host or an earlier kernel says may be anything: then no token is asked for.
#[test]
fn tokens_outside_the_vocabulary_are_not_asked_for() {
    let vocab = 40;
    let logits = Rng::new(92).numbers(vocab * 4);
    let given = run(vocab, 32, &logits, &Asked::Given(&[40, u32::MAX, 39, 41]));
    check("given outside", vocab, &logits, &given, &[None, None, Some(39), None]);
    let next = [41, u32::MAX, 40, 0];
    let told = run(vocab, 32, &logits, &Asked::Next(&next, &[(0, 3), (1, 3), (3, 40)]));
    check("next outside", vocab, &logits, &told, &[None, None, Some(39), None]);
    let no_rows = run(vocab, 32, &logits, &Asked::Next(&[0, 0, 1, 0], &[]));
    check("no rows", vocab, &logits, &no_rows, &[None, None, Some(0), None]);
    // Rows that stand for nothing of this batch.
    let stray = run(vocab, 32, &logits, &Asked::Next(&[0; 4], &[(4, 1), (u32::MAX, 2)]));
    check("stray rows", vocab, &logits, &stray, &[None; 4]);
}

#[test]
fn wrong_results_are_noticed() {
    let vocab = 500;
    let logits = Rng::new(93).numbers(vocab);
    let told = run(vocab, 256, &logits, &Asked::Given(&[123]));
    let right = predict(&f64s(&logits), 8, Some(123));
    let mut changed = f64s(&logits);
    changed[right.ids[0]] += 1e-3;
    for (logits, fine) in [(f64s(&logits), true), (changed, false)] {
        let (probs, probs_size, stats, stats_size) = numbers(&predict(&logits, 8, Some(123)), &logits);
        assert_eq!(compare("top_tokens", &told.probs, &probs, &probs_size).is_ok(), fine);
        assert_eq!(compare("top_tokens", &told.stats, &stats, &stats_size).is_ok(), fine);
    }
    let (_, _, mut stats, stats_size) = numbers(&right, &f64s(&logits));
    stats[2] += 1.0;
    assert!(compare("top_tokens", &told.stats, &stats, &stats_size).is_err(), "another rank went unnoticed");
}
