//! `top_tokens` into the ring of log probabilities.

use moewe_oracle::prediction::{Logprobs, logprobs};
use moewe_plan::{LOGPROB_TOP, LOGPROB_WORDS, POISONED};
use moewe_shaders::Variant;

use super::data::{Rng, assert_agrees, compare, f64s};
use super::harness::{Call, UNTOUCHED};

const TOP: usize = LOGPROB_TOP as usize;
const WORDS: usize = LOGPROB_WORDS as usize;
const MAX_ROWS: usize = 8;
const STEPS: usize = 4;

/// What a row of the ring says: log probability of the drawn token, ids, their log probabilities.
struct Told {
    drawn: f32,
    ids: Vec<u32>,
    logs: Vec<f32>,
}

/// Rows of a pass with this number, one for each sampled token. The rest of the ring must stay as it was.
fn run(vocab: usize, workgroup: usize, logits: &[f32], sampled: &[u32], pass: u32) -> Vec<Told> {
    let variant = Variant::new("top_tokens")
        .flag("ring", true)
        .int("MAX_ROWS", MAX_ROWS)
        .int("STEPS", STEPS)
        .int("V", vocab)
        .int("TOP", vocab.min(TOP))
        .int("WG", workgroup);
    let outputs = Call::new(&variant)
        .floats("logits", logits)
        .words("sampled", sampled)
        .words("finished", &[pass, 77, 78])
        .output("logprobs", STEPS * MAX_ROWS * WORDS)
        .run([sampled.len(), 1, 1]);
    let ring = outputs.words("logprobs");
    let first = pass as usize % STEPS * MAX_ROWS * WORDS;
    let (before, rest) = ring.split_at(first);
    let (rows, behind) = rest.split_at(sampled.len() * WORDS);
    assert!(before.iter().chain(behind).all(|&word| word == UNTOUCHED), "other rows were written");
    let told = |row: &[u32]| {
        assert_eq!(row[1], 0);
        let float = |word: &u32| f32::from_bits(*word);
        let (ids, logs) = row[2..].split_at(TOP);
        Told { drawn: float(&row[0]), ids: ids.to_vec(), logs: logs.iter().map(float).collect() }
    };
    rows.chunks(WORDS).map(told).collect()
}

/// Log probabilities of a row with their conditions: how far a rounding of a logit moves them.
fn numbers(expected: &Logprobs, logits: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let width = logits.iter().copied().filter(|x| x.is_finite()).map(f64::abs).fold(1.0, f64::max).min(100.0);
    let logs: Vec<f64> =
        [expected.drawn.unwrap_or(f64::NAN)].into_iter().chain(expected.top.iter().map(|top| top.1)).collect();
    let sizes = logs.iter().map(|log| 1.0 + log.abs().max(0.0) + width).collect();
    (logs, sizes)
}

fn check(what: &str, vocab: usize, logits: &[f32], sampled: &[u32], told: &[Told]) {
    for (row, (logits, told)) in f64s(logits).chunks(vocab).zip(told).enumerate() {
        let what = format!("{what}, row {row}");
        let drawn = (sampled[row] as usize) < vocab;
        let expected = logprobs(logits, TOP, drawn.then_some(sampled[row] as usize));
        let count = expected.top.len();
        let ids: Vec<usize> = told.ids[..count].iter().map(|&id| id as usize).collect();
        assert_eq!(ids, expected.top.iter().map(|top| top.0).collect::<Vec<_>>(), "{what}");
        assert!(told.ids[count..].iter().all(|&id| id == u32::MAX), "{what}: {:?}", told.ids);
        assert!(told.logs[count..].iter().all(|&log| log.to_bits() == 0), "{what}: {:?}", told.logs);
        assert!(told.logs.iter().all(|log| log.is_finite()), "{what}: {:?}", told.logs);
        let (logs, sizes) = numbers(&expected, logits);
        assert_agrees("top_tokens", &what, &[&[told.drawn], &told.logs[..count]].concat(), &logs, &sizes);
    }
}

#[test]
fn vocabularies_of_any_size() {
    let mut rng = Rng::new(94);
    let sizes = [1, 2, 7, 19, 20, 21, 31, 64, 65, 255, 257, 1000, 4099, 20_011, 129_281];
    for (i, vocab) in sizes.into_iter().enumerate() {
        let workgroup = if vocab > 10_000 { 256 } else { [32, 64, 256, 8][i % 4] };
        let rows = if vocab > 100_000 { 2 } else { 6 };
        // Of few values there are many ties.
        let steps = if i % 2 == 0 { 0.0 } else { 4.0 };
        let logit = |rng: &mut Rng| {
            let number = rng.unit() * 24.0 - 12.0;
            (if steps > 0.0 { (number * steps).round() / steps } else { number }) as f32
        };
        let logits: Vec<f32> = (0..rows * vocab).map(|_| logit(&mut rng)).collect();
        let mut sampled: Vec<u32> = (0..rows).map(|_| rng.below(vocab) as u32).collect();
        (sampled[0], sampled[1]) = (vocab as u32 - 1, 0);
        let told = run(vocab, workgroup, &logits, &sampled, i as u32);
        check(
            &format!("log probabilities of {vocab} tokens, {workgroup} invocations"),
            vocab,
            &logits,
            &sampled,
            &told,
        );
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    let vocab = 300;
    let mut logits = vec![1.5; vocab];
    logits.extend((0..vocab).map(|i| if i % 2 == 0 { -0.0 } else { 0.0 }));
    logits.extend((0..vocab).map(|i| if i >= 285 || i % 64 == 11 { 7.0 } else { -7.0 }));
    let told = run(vocab, 64, &logits, &[299, 0, 11], 2);
    check("ties", vocab, &logits, &[299, 0, 11], &told);
    assert_eq!(told[0].ids, (0..20).collect::<Vec<u32>>());
    assert_eq!(told[2].ids[..6], [11, 75, 139, 203, 267, 285]);
    assert_eq!(told[0].drawn.to_bits(), told[0].logs[0].to_bits(), "all have the same");
    // More equals than are told, all with one invocation.
    let logits: Vec<f32> = (0..3000).map(|i| if i % 64 == 11 { 7.0 } else { -7.0 }).collect();
    assert_eq!(run(3000, 64, &logits, &[0], 0)[0].ids, (0..20).map(|i| 11 + 64 * i).collect::<Vec<u32>>());
}

/// Whatever the logits are, ids are of the vocabulary and log probabilities finite.
#[test]
fn logits_that_are_not_numbers() {
    let (vocab, nan, infinity) = (130, f32::NAN, f32::INFINITY);
    let mut rng = Rng::new(95);
    let rows: Vec<Vec<f32>> = vec![
        vec![nan; vocab],
        vec![-infinity; vocab],
        vec![infinity; vocab],
        (0..vocab).map(|i| if i == 77 { 0.25 } else { -nan }).collect(),
        (0..vocab).map(|i| if i % 50 == 49 { infinity } else { rng.number() }).collect(),
        (0..vocab).map(|i| [nan, -infinity, rng.number(), infinity, 3e38, -3e38][(i + 2) % 6]).collect(),
        (0..vocab).map(|i| if i % 3 == 0 { nan } else { rng.number() }).collect(),
        (0..vocab).map(|i| [1e30, -1e30, 0.0, 2.0][i % 4]).collect(),
    ];
    for id in [0, 77, 129, POISONED, 130] {
        let sampled = vec![id; rows.len()];
        let told = run(vocab, 64, &rows.concat(), &sampled, 3);
        check(&format!("not numbers, {id}"), vocab, &rows.concat(), &sampled, &told);
    }
}

#[test]
fn wrong_results_are_noticed() {
    let vocab = 500;
    let logits = Rng::new(96).numbers(vocab);
    let told = &run(vocab, 256, &logits, &[123], 9)[0];
    let found = [&[told.drawn], &told.logs[..]].concat();
    let mut changed = f64s(&logits);
    let best = logprobs(&changed, 1, None).top[0].0;
    changed[best] += 1e-3;
    for (logits, fine) in [(f64s(&logits), true), (changed, false)] {
        let (logs, sizes) = numbers(&logprobs(&logits, TOP, Some(123)), &logits);
        assert_eq!(compare("top_tokens", &found, &logs, &sizes).is_ok(), fine);
    }
}
