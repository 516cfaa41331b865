//! `sample`.

use moewe_oracle::sampling::{SamplingParams, candidates, constrain, distribution, draw};
use moewe_plan::{BIASED, MASKED, POISONED, Sampling};
use moewe_shaders::Variant;

use super::data::{Rng, f64s};
use super::harness::Call;

/// What a dispatch samples for.
pub struct Sample<'a> {
    pub vocab: usize,
    pub workgroup: usize,
    /// [R, V]
    pub logits: &'a [f32],
    /// For each row: position and sequence.
    pub rows: Vec<(u32, u32)>,
    /// For each sequence.
    pub sampling: Vec<Sampling>,
    /// For each sequence.
    pub seen: Vec<Vec<usize>>,
    /// For each sequence; those behind the last have none.
    pub limits: Vec<Limits>,
}

/// Mask and bias of a sequence.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// The tokens that may be drawn.
    pub mask: Option<Vec<usize>>,
    /// What is added to which token's logit.
    pub bias: Vec<(usize, f32)>,
}

impl Limits {
    /// Logits as the oracle limits them.
    pub fn apply(&self, logits: &[f32]) -> Vec<f64> {
        let bias: Vec<(usize, f64)> = self.bias.iter().map(|&(token, bias)| (token, bias.into())).collect();
        constrain(&f64s(logits), self.mask.as_deref(), &bias)
    }

    /// As the kernel is told: bits of constraints, mask, bias. What does not count is such that it would be noticed.
    fn words(&self, vocab: usize) -> (u32, Vec<u32>, Vec<f32>) {
        let (mut mask, mut bias, mut bits) = (vec![0u32; vocab.div_ceil(32)], vec![f32::NAN; vocab], 0);
        for token in self.mask.iter().flatten() {
            mask[token / 32] |= 1 << (token % 32);
        }
        if self.mask.is_some() {
            bits |= MASKED;
            // Bits behind the vocabulary are of no token.
            if !vocab.is_multiple_of(32) {
                mask[vocab / 32] |= u32::MAX << (vocab % 32);
            }
        }
        if !self.bias.is_empty() {
            bits |= BIASED;
            bias.fill(0.0);
            self.bias.iter().for_each(|&(token, number)| bias[token] = number);
        }
        (bits, mask, bias)
    }
}

impl Sample<'_> {
    /// Sampled tokens, or [`NOTHING`].
    pub fn run(&self) -> Vec<usize> {
        // Rows stand behind a token that nobody asks about, in reverse. Their tokens are none of the vocabulary.
        let places = [(77, u32::MAX)].into_iter().chain(self.rows.iter().rev().copied());
        let tokens: Vec<[u32; 4]> = places.map(|(position, sequence)| [u32::MAX, position, sequence, 0]).collect();
        let rows: Vec<u32> = (1..=self.rows.len() as u32).rev().collect();
        self.run_batch(&tokens.concat(), &rows)
    }

    /// The same for a batch of these tokens and wanted rows.
    fn run_batch(&self, tokens: &[u32], rows: &[u32]) -> Vec<usize> {
        let (vocab, count) = (self.vocab, rows.len());
        assert_eq!(self.logits.len(), count * vocab);
        let variant = Variant::new("sample").int("V", vocab).int("WG", self.workgroup);
        let limits = |sequence: usize| self.limits.get(sequence).cloned().unwrap_or_default().words(vocab);
        let (mut mask, mut bias) = (Vec::new(), Vec::new());
        let sampling: Vec<u32> = (0..)
            .zip(&self.sampling)
            .flat_map(|(sequence, s)| {
                let (constraints, its_mask, its_bias) = limits(sequence);
                mask.extend(its_mask);
                bias.extend(its_bias);
                let floats = [s.temperature, s.top_p, s.min_p, s.repetition_penalty].map(f32::to_bits);
                floats.into_iter().chain([s.top_k, s.seed_low, s.seed_high, constraints])
            })
            .collect();
        let words = vocab.div_ceil(32);
        let mut seen = vec![0u32; self.sampling.len() * words];
        for (sequence, tokens) in self.seen.iter().enumerate() {
            for token in tokens {
                seen[sequence * words + token / 32] |= 1 << (token % 32);
            }
        }
        let outputs = Call::new(&variant)
            .floats("logits", self.logits)
            .words("tokens", tokens)
            .words("rows", rows)
            .words("sampling", &sampling)
            .words("seen", &seen)
            .words("mask", &mask)
            .floats("bias", &bias)
            .output("sampled", count)
            .run([count, 1, 1]);
        let sampled: Vec<usize> = outputs.words("sampled").iter().map(|&token| token as usize).collect();
        assert!(
            sampled.iter().all(|&token| token < vocab || token == NOTHING),
            "a token beyond the vocabulary: {sampled:?}"
        );
        sampled
    }
}

/// What is sampled where nothing can be.
pub const NOTHING: usize = POISONED as usize;

/// One row for each setting, each with a sequence of its own.
fn sample_each(vocab: usize, workgroup: usize, logits: &[f32], sampling: Vec<Sampling>) -> Vec<usize> {
    let rows = (0..sampling.len() as u32).map(|sequence| (3, sequence)).collect();
    let seen = vec![Vec::new(); sampling.len()];
    Sample { vocab, workgroup, logits, rows, sampling, seen, limits: Vec::new() }.run()
}

pub const FREE: Sampling = Sampling {
    temperature: 1.0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    top_k: 0,
    seed_low: 1,
    seed_high: 2,
    constraints: 0,
};

pub fn params(sampling: &Sampling) -> SamplingParams {
    SamplingParams {
        temperature: sampling.temperature.into(),
        top_k: sampling.top_k as usize,
        top_p: sampling.top_p.into(),
        min_p: sampling.min_p.into(),
        repetition_penalty: sampling.repetition_penalty.into(),
    }
}

#[test]
fn greedy_takes_the_lowest_of_the_largest() {
    let mut rng = Rng::new(60);
    for (workgroup, vocabularies) in [(8, [1, 5, 33, 63]), (64, [2, 32, 65, 1000]), (256, [1, 31, 256, 257])] {
        for vocab in vocabularies {
            let mut logits = Vec::new();
            let mut want = Vec::new();
            for row in 0..6 {
                let mut numbers = rng.numbers(vocab);
                let best = rng.below(vocab);
                match row {
                    0 => numbers.fill(-1.5),
                    1 => numbers[best..].iter_mut().step_by(3).for_each(|number| *number = 9.0),
                    2 => numbers.fill(f32::NEG_INFINITY),
                    3 => numbers[best] = f32::INFINITY,
                    4 => numbers.iter_mut().for_each(|number| *number *= 1e37),
                    _ => numbers[best] = f32::NAN,
                }
                let clean: Vec<f32> = numbers.iter().map(|n| if n.is_nan() { f32::NEG_INFINITY } else { *n }).collect();
                let dead = clean.iter().all(|logit| *logit == f32::NEG_INFINITY);
                want.push(if dead { NOTHING } else { moewe_oracle::ops::argmax(&f64s(&clean)) });
                logits.extend(numbers);
            }
            // Neither seed nor the other settings matter.
            let odd = Sampling { temperature: 0.0, top_k: 3, top_p: 0.2, min_p: 0.9, seed_low: 8, ..FREE };
            let settings = vec![Sampling::default(), odd, odd, odd, odd, Sampling::default()];
            assert_eq!(sample_each(vocab, workgroup, &logits, settings), want, "V {vocab}, WG {workgroup}");
        }
    }
}

#[test]
fn seen_tokens_are_penalised() {
    let logits = [2.0, 1.5, -0.5, -0.4, 0.0].repeat(5);
    let penalty = Sampling { temperature: 0.0, repetition_penalty: 2.0, ..FREE };
    let seen = vec![vec![], vec![0], vec![0, 1, 4], vec![3, 0, 1, 4], vec![]];
    let rows = vec![(0, 0), (5, 1), (6, 2), (7, 3), (8, 4)];
    let mut sampling = vec![penalty; 5];
    sampling[4].repetition_penalty = 0.25; // a reward
    let case =
        Sample { vocab: 5, workgroup: 8, logits: &logits, rows, sampling, seen: seen.clone(), limits: Vec::new() };
    let tokens = case.run();
    let want: Vec<usize> =
        (0..5).map(|i| candidates(&f64s(&logits[..5]), &seen[i], &params(&case.sampling[i]))[0].token).collect();
    assert_eq!(tokens, want);
    assert_eq!(&tokens[..3], [0, 1, 0]);
}

/// The tokens of a batch are seen by the rows behind them of the same sequence, up to seven before a row's own, whether the
/// drafts among them will be accepted or not.
#[test]
fn tokens_before_a_row_are_penalised() {
    let vocab = 40;
    // Token i of the batch is token i; sequence 0 has 3, sequence 1 has 12, sequence 0 again 3.
    let sequences = [vec![0; 3], vec![1; 12], vec![0; 3]].concat();
    let tokens: Vec<u32> = (0..).zip(&sequences).flat_map(|(i, &sequence)| [i, 50 + i, sequence, 0]).collect();
    let rows: Vec<u32> = (0..18).rev().collect();
    // The larger id, the less; whatever is penalised falls behind all others.
    let logits: Vec<f32> = (0..vocab).map(|i| 9.0 - i as f32 * 0.01).collect();
    let how = Sampling { temperature: 0.0, repetition_penalty: 2.0, ..FREE };
    let seen = vec![vec![1, 5], vec![0, 2, 13]];
    for (penalty, workgroup) in [(2.0, 8), (2.0, 64), (1.0, 64)] {
        let how = Sampling { repetition_penalty: penalty, ..how };
        let logits = logits.repeat(18);
        let case = Sample {
            vocab,
            workgroup,
            logits: &logits,
            rows: Vec::new(),
            sampling: vec![how; 2],
            seen: seen.clone(),
            limits: Vec::new(),
        };
        let found = case.run_batch(&tokens, &rows);
        for (&row, token) in rows.iter().zip(found) {
            let row = row as usize;
            let before = (0..=row).rev().take(8).take_while(|&i| sequences[i] == sequences[row]);
            let seen: Vec<usize> = before.chain(seen[sequences[row] as usize].iter().copied()).collect();
            let want = candidates(&f64s(&logits[..vocab]), &seen, &params(&how))[0].token;
            assert_eq!(token, want, "row {row}, penalty {penalty}");
        }
    }
}

/// Draws many tokens of one distribution and compares with the oracle's: only candidates come out, about as often as
/// they should. Seeds and positions are fixed, so the outcome is, too.
fn check_distribution(what: &str, logits: &[f32], workgroup: usize, draws: usize, how: Sampling, seen: &[usize]) {
    check_limited(what, logits, workgroup, draws, how, seen, &Limits::default());
}

/// The same for a sequence with mask and bias.
pub fn check_limited(
    what: &str,
    logits: &[f32],
    workgroup: usize,
    draws: usize,
    how: Sampling,
    seen: &[usize],
    limits: &Limits,
) {
    let (vocab, rows) = (logits.len(), 1000);
    let mut want = candidates(&limits.apply(logits), seen, &params(&how));
    want.retain(|candidate| candidate.probability > 0.0);
    let mut counts = vec![0usize; vocab];
    let repeated = logits.repeat(rows);
    for block in 0..draws / rows {
        // Half the draws differ by position, half by seed.
        let by_seed = block % 2 == 1;
        let place = |row: usize| (if by_seed { 5 } else { (block * rows + row) as u32 }, row as u32);
        let seed = |row: usize| Sampling { seed_high: if by_seed { (block * rows + row) as u32 } else { 7 }, ..how };
        let case = Sample {
            vocab,
            workgroup,
            logits: &repeated,
            rows: (0..rows).map(place).collect(),
            sampling: (0..rows).map(seed).collect(),
            seen: vec![seen.to_vec(); rows],
            limits: vec![limits.clone(); rows],
        };
        for (row, token) in case.run().into_iter().enumerate() {
            counts[token] += 1;
            // Where the race is not all but undecided, the winner is known.
            let sampling = &case.sampling[row];
            let seed = u64::from(sampling.seed_low) | u64::from(sampling.seed_high) << 32;
            let (winner, lead) = draw(&want, seed, case.rows[row].0);
            assert!(token == winner || lead < 1e-4, "{what}: {token} won instead of {winner}, by {lead:e}");
        }
    }
    let drawn = counts.iter().sum::<usize>() as f64;
    assert_eq!(drawn as usize, draws);
    let (mut chi2, mut cells, mut inside) = (0.0, 0, 0);
    for candidate in &want {
        let (expected, count) = (candidate.probability * drawn, counts[candidate.token]);
        inside += count;
        if expected >= 5.0 {
            chi2 += (count as f64 - expected).powi(2) / expected;
            cells += 1;
        }
    }
    assert_eq!(inside, draws, "{what}: tokens came out that are no candidates");
    let freedom = f64::from(cells) - 1.0;
    println!("sample {what}: {} candidates, χ² {chi2:.1} with {freedom} degrees of freedom", want.len());
    assert!(chi2 <= freedom + 4.0 * (2.0 * freedom.max(1.0)).sqrt() + 4.0, "{what}: χ² {chi2} for {freedom}");
}

fn logits_of_50() -> Vec<f32> {
    let mut rng = Rng::new(61);
    (0..50).map(|_| (rng.unit() * 5.0 - 2.0) as f32).collect()
}

#[test]
fn draws_follow_the_distribution() {
    let logits = logits_of_50();
    let check = |what: &str, draws, how| check_distribution(what, &logits, 8, draws, how, &[]);
    check("plain", 60_000, FREE);
    check("hot", 50_000, Sampling { temperature: 1.7, ..FREE });
    check("cold", 50_000, Sampling { temperature: 0.4, ..FREE });
    check("top-k 7", 50_000, Sampling { top_k: 7, ..FREE });
    check("top-k 1", 2_000, Sampling { top_k: 1, ..FREE });
    check("top-k of all", 2_000, Sampling { top_k: 50, ..FREE });
    check("top-p 0.7", 50_000, Sampling { top_p: 0.7, ..FREE });
    check("top-p of next to nothing", 2_000, Sampling { top_p: 1e-6, ..FREE });
    check("min-p 0.2", 50_000, Sampling { min_p: 0.2, ..FREE });
    check("min-p 1", 2_000, Sampling { min_p: 1.0, ..FREE });
}

#[test]
fn settings_work_together() {
    let logits = logits_of_50();
    let all = Sampling { temperature: 1.3, top_k: 20, top_p: 0.8, min_p: 0.15, ..FREE };
    check_distribution("all at once", &logits, 8, 50_000, all, &[]);
    let seen: Vec<usize> = (0..50).step_by(3).collect();
    let penalty = Sampling { repetition_penalty: 1.6, ..FREE };
    check_distribution("penalty", &logits, 8, 50_000, penalty, &seen);
    let both = Sampling { repetition_penalty: 1.6, ..all };
    check_distribution("all and penalty", &logits, 8, 50_000, both, &seen);
    check_distribution("64 invocations", &logits, 64, 2_000, both, &seen);
}

#[test]
fn ties_at_a_threshold_keep_the_lowest_ids() {
    let mut logits = vec![1.0; 37];
    logits[30] = 2.0;
    logits[3] = -5.0;
    check_distribution("top-k 6 of ties", &logits, 8, 4_000, Sampling { top_k: 6, ..FREE }, &[]);
    check_distribution("top-k 1 of ties", &[0.5; 37], 8, 1_000, Sampling { top_k: 1, ..FREE }, &[]);
    // Halves of powers of two, so that sums of probabilities are exact.
    let equal = vec![0.0; 32];
    check_distribution("top-p of ties", &equal, 8, 4_000, Sampling { top_p: 0.25, ..FREE }, &[]);
    let kept = candidates(&f64s(&equal), &[], &params(&Sampling { top_p: 0.25, ..FREE }));
    assert_eq!(kept.len(), 8);
}

/// Each size of the vocabulary around multiples of the workgroup, and a large one.
#[test]
fn vocabularies_of_any_size() {
    let mut rng = Rng::new(62);
    let how = Sampling { temperature: 0.9, top_k: 9, top_p: 0.9, min_p: 0.02, repetition_penalty: 1.2, ..FREE };
    let mut differ = 0;
    for (workgroup, vocabularies) in [(64, [1, 2, 63, 64, 65, 129]), (256, [7, 9, 127, 255, 256, 1500])] {
        for vocab in vocabularies {
            let (logits, rows) = (rng.numbers(vocab), 24);
            let sampling: Vec<Sampling> = (0..rows).map(|seed| Sampling { seed_low: seed, ..how }).collect();
            let tokens = sample_each(vocab, workgroup, &logits.repeat(rows as usize), sampling);
            let allowed: Vec<usize> =
                candidates(&f64s(&logits), &[], &params(&how)).iter().map(|candidate| candidate.token).collect();
            assert!(tokens.iter().all(|token| allowed.contains(token)), "V {vocab}: {tokens:?} of {allowed:?}");
            differ += usize::from(tokens.iter().any(|token| *token != tokens[0]));
        }
    }
    assert!(differ > 8, "seeds made a difference only {differ} times");
}

#[test]
fn the_draw_depends_on_seed_and_position_only() {
    let logits = logits_of_50();
    let repeated = logits.repeat(40);
    let run = |seed: u32, first: u32, workgroup| {
        let rows = (0..40).map(|row| (first + row, row)).collect();
        let sampling = vec![Sampling { seed_low: seed, ..FREE }; 40];
        Sample {
            vocab: 50,
            workgroup,
            logits: &repeated,
            rows,
            sampling,
            seen: vec![Vec::new(); 40],
            limits: Vec::new(),
        }
        .run()
    };
    let base = run(11, 100, 8);
    assert_eq!(run(11, 100, 8), base, "not deterministic");
    // The same position in another row, and another workgroup size, draw the same.
    assert_eq!(run(11, 110, 8)[..30], base[10..]);
    assert_eq!(run(11, 100, 64), base);
    let same = |other: &[usize]| base.iter().zip(other).filter(|(a, b)| a == b).count();
    assert!(same(&run(12, 100, 8)) < 20 && same(&run(11, 5000, 8)) < 20);
    assert!(base.iter().any(|token| *token != base[0]), "every position drew the same");
}

/// For each place (seed and position) the token that is drawn.
fn draws(logits: &[f32], how: Sampling, places: &[(u64, u32)]) -> Vec<usize> {
    let block = |places: &[(u64, u32)]| {
        let seeded =
            |&(seed, _): &(u64, u32)| Sampling { seed_low: seed as u32, seed_high: (seed >> 32) as u32, ..how };
        let case = Sample {
            vocab: logits.len(),
            workgroup: 8,
            logits: &logits.repeat(places.len()),
            rows: (0..).zip(places).map(|(sequence, place)| (place.1, sequence)).collect(),
            sampling: places.iter().map(seeded).collect(),
            seen: vec![Vec::new(); places.len()],
            limits: Vec::new(),
        };
        case.run()
    };
    places.chunks(1000).flat_map(block).collect()
}

/// Another place for a seed and a position.
type Other = fn(u64, u32) -> (u64, u32);

/// Draws of neighbouring positions and seeds tell nothing of each other.
#[test]
fn draws_are_independent() {
    let weights = [0.3f32, 0.25, 0.2, 0.15, 0.1];
    let logits = weights.map(f32::ln);
    let places: Vec<(u64, u32)> = (0..20_000).map(|i| (u64::from(i % 10) * 3, i / 10 * 2)).collect();
    let first = draws(&logits, FREE, &places);
    let others: [(&str, Other); 7] = [
        ("the next position", |seed, position| (seed, position + 1)),
        ("the next seed", |seed, position| (seed + 1, position)),
        ("a seed with another high half", |seed, position| (seed | 1 << 32, position)),
        ("the next seed and the position before", |seed, position| (seed + 1, position.wrapping_sub(1))),
        ("a seed whose low half has another highest bit", |seed, position| (seed ^ 1 << 31, position)),
        ("a seed whose high half has another highest bit", |seed, position| (seed ^ 1 << 63, position)),
        ("a distant position", |seed, position| (seed, position ^ 0x8000_0000)),
    ];
    for (what, other) in others {
        let second = draws(&logits, FREE, &places.iter().map(|&(s, p)| other(s, p)).collect::<Vec<_>>());
        let mut counts = [[0.0; 5]; 5];
        first.iter().zip(&second).for_each(|(&a, &b)| counts[a][b] += 1.0);
        let expected = |a: usize, b: usize| f64::from(weights[a] * weights[b]) * places.len() as f64;
        let cells = (0..25).map(|i| (i / 5, i % 5));
        let chi2: f64 = cells.map(|(a, b)| (counts[a][b] - expected(a, b)).powi(2) / expected(a, b)).sum();
        println!("sample, {what}: χ² {chi2:.1} with 24 degrees of freedom");
        assert!(chi2 < 60.0, "{what}: χ² {chi2} for 24");
    }
}

/// Rows of one position whose distributions are close mostly draw the same token: as often as the coupling promises, and
/// never more often than any could.
#[test]
fn close_distributions_draw_alike() {
    let mut rng = Rng::new(65);
    let logits = logits_of_50();
    let places: Vec<(u64, u32)> = (0..20_000).map(|i| (77, i)).collect();
    for (noise, how, other) in [
        (0.0, FREE, FREE),
        (0.1, FREE, FREE),
        (1.0, FREE, FREE),
        (4.0, FREE, FREE),
        (0.3, Sampling { top_k: 7, ..FREE }, Sampling { top_k: 7, ..FREE }),
        (0.3, Sampling { top_p: 0.8, temperature: 0.7, ..FREE }, Sampling { top_p: 0.8, temperature: 0.7, ..FREE }),
        (0.0, Sampling { min_p: 0.1, ..FREE }, Sampling { temperature: 1.5, ..FREE }),
    ] {
        let noisy: Vec<f32> = logits.iter().map(|logit| logit + noise * rng.number()).collect();
        let (p, q) =
            (distribution(&f64s(&logits), &[], &params(&how)), distribution(&f64s(&noisy), &[], &params(&other)));
        let distance = p.iter().zip(&q).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0;
        let (a, b) = (draws(&logits, how, &places), draws(&noisy, other, &places));
        let alike = a.iter().zip(&b).filter(|(a, b)| a == b).count() as f64 / places.len() as f64;
        println!("sample: distance {distance:.3}, alike {alike:.3}");
        assert!(alike >= (1.0 - distance) / (1.0 + distance) - 0.015, "{alike} at a distance of {distance}");
        assert!(alike <= 1.0 - distance + 0.015, "{alike} at a distance of {distance}");
    }
}

/// Logits that are no numbers never hang the sampler. A token that has a logit above −∞ comes out if there is any.
#[test]
fn logits_that_are_not_numbers() {
    let mut rng = Rng::new(63);
    let vocab = 70;
    let settings = [
        FREE,
        Sampling::default(),
        Sampling { top_k: 5, ..FREE },
        Sampling { top_p: 0.5, ..FREE },
        Sampling { min_p: 0.5, repetition_penalty: 1.5, ..FREE },
        Sampling { temperature: 1e-30, ..FREE },
        Sampling { temperature: 1e30, top_k: 3, top_p: 0.9, ..FREE },
        Sampling { top_k: 70, top_p: 0.01, min_p: 1.0, ..FREE },
    ];
    let mut half = rng.numbers(vocab);
    half.iter_mut().step_by(2).for_each(|logit| *logit = f32::NAN);
    let mut one_infinite = rng.numbers(vocab);
    one_infinite[33] = f32::INFINITY;
    let mut all_but_one = vec![f32::NAN; vocab];
    all_but_one[69] = -4.0;
    let rows = [
        vec![f32::NAN; vocab],
        vec![-f32::NAN; vocab],
        half,
        one_infinite,
        all_but_one,
        vec![f32::INFINITY; vocab],
        vec![f32::NEG_INFINITY; vocab],
        vec![f32::MAX; vocab],
        vec![f32::MIN; vocab],
    ];
    let logits: Vec<f32> = rows.iter().flat_map(|row| row.repeat(settings.len())).collect();
    let sampling: Vec<Sampling> = rows.iter().flat_map(|_| settings).collect();
    for workgroup in [8, 64] {
        let tokens = sample_each(vocab, workgroup, &logits, sampling.clone());
        for (row, tokens) in tokens.chunks(settings.len()).enumerate() {
            let dead = [0, 1, 6].contains(&row);
            assert!(tokens.iter().all(|&token| (token == NOTHING) == dead), "row {row}: {tokens:?}");
            match row {
                2 => assert!(tokens.iter().all(|token| token % 2 == 1), "NaN was drawn: {tokens:?}"),
                3 => assert!(tokens.iter().enumerate().all(|(i, &token)| token == 33 || i == 6), "{tokens:?}"),
                4 => assert!(tokens.iter().all(|&token| token == 69), "NaN was drawn: {tokens:?}"),
                _ => {}
            }
        }
    }
}
