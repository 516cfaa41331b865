//! Simulated devices and texts.

use super::*;

/// Uniform in [0, 1): splitmix64.
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Time of a pass with so many drafts, and acceptance of a draft, when so many tokens are done.
struct World {
    seconds: Seconds,
    acceptance: Acceptance,
}

#[derive(Default)]
struct Outcome {
    tokens: u64,
    seconds: f64,
    /// Changes between drafting and not drafting.
    changes: usize,
    /// Seconds when 0, 1, … tokens were done.
    at: Vec<f64>,
}

impl Outcome {
    fn per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Makes so many tokens. Times are off by up to 5 %, and one in 50 is twenty times as long as it is.
fn run(world: &World, mtp: Mtp, tokens: u64, seed: u64, costs: &mut Costs) -> (Outcome, Drafting) {
    let mut drafting = Drafting::new(mtp, 7);
    let mut outcome = Outcome::default();
    let (mut noise, mut text) = (seed ^ 0x55, seed);
    let mut before = 0;
    while outcome.tokens < tokens {
        let drafts = drafting.next(costs, 1);
        outcome.changes += usize::from((drafts == 0) != (before == 0));
        before = drafts;
        let accept = (world.acceptance)(outcome.tokens);
        let accepted = (0..drafts).take_while(|_| uniform(&mut text) < accept).count();
        let seconds = (world.seconds)(drafts, outcome.tokens);
        drafting.saw(drafts, accepted);
        let wild = if uniform(&mut noise) < 0.02 { 20.0 } else { 1.0 };
        costs.saw(drafts, 1, seconds * wild * (0.95 + 0.1 * uniform(&mut noise)));
        outcome.seconds += seconds;
        outcome.tokens += 1 + accepted as u64;
        outcome.at.resize(outcome.tokens as usize, outcome.seconds);
    }
    (outcome, drafting)
}

type Seconds = fn(usize, u64) -> f64;
type Acceptance = fn(u64) -> f64;

const DEVICES: [(&str, Seconds); 7] = [
    ("free", |_, _| 0.02),
    ("5 % a draft", |n, _| 0.02 * (1.0 + 0.05 * n as f64)),
    ("25 % a draft", |n, _| 0.02 * (1.0 + 0.25 * n as f64)),
    ("50 % a draft", |n, _| 0.02 * (1.0 + 0.5 * n as f64)),
    ("100 % a draft", |n, _| 0.02 * (1.0 + n as f64)),
    ("100 % any", |n, _| if n == 0 { 0.02 } else { 0.04 }),
    ("free, then 100 %", |n, t| if n == 0 || t < 2500 { 0.02 } else { 0.04 }),
];

const TEXTS: [(&str, Acceptance); 6] = [
    ("0", |_| 0.0),
    ("0.3", |_| 0.3),
    ("0.5", |_| 0.5),
    ("0.9", |_| 0.9),
    ("0.9, then 0", |t| if t < 2500 { 0.9 } else { 0.0 }),
    ("0, then 0.9", |t| if t < 2500 { 0.0 } else { 0.9 }),
];

#[test]
fn it_is_as_fast_as_the_best_fixed_length_and_never_slower_than_none() {
    const TOKENS: u64 = 5000;
    const SEEDS: u64 = 40;
    // With --nocapture: mean of all runs to the best length's mean, slowest run to none, most changes to and from 0.
    println!("{:18}{:14}{:>8}{:>8}{:>10}", "device", "acceptance", "to best", "to none", "changes");
    let mut slow = Vec::new();
    for (device, seconds) in DEVICES {
        for (text, acceptance) in TEXTS {
            let world = World { seconds, acceptance };
            let mean = |mtp| {
                let runs = (0..SEEDS).map(|seed| run(&world, mtp, TOKENS, seed, &mut Costs::default()).0.per_second());
                runs.sum::<f64>() / SEEDS as f64
            };
            let plain = mean(Mtp::Off);
            let best = (1..=7).map(|n| mean(Mtp::Fixed(n))).fold(plain, f64::max);
            let runs = (0..SEEDS).map(|seed| run(&world, Mtp::Auto, TOKENS, seed, &mut Costs::default()).0);
            let runs: Vec<_> = runs.collect();
            let to_best = runs.iter().map(Outcome::per_second).sum::<f64>() / SEEDS as f64 / best;
            let to_plain = runs.iter().map(Outcome::per_second).fold(f64::MAX, f64::min) / plain;
            let changes = runs.iter().map(|run| run.changes).max().unwrap();
            println!("{device:18}{text:14}{to_best:>8.3}{to_plain:>8.3}{changes:>10}");
            if to_best < 0.97 || to_plain < 0.97 {
                slow.push((device, text));
            }
        }
    }
    assert!(slow.is_empty(), "{slow:?}");
}

#[test]
fn it_recovers_soon_after_a_change() {
    for (device, seconds) in &DEVICES[..4] {
        for seed in 0..20 {
            let better = World { seconds: *seconds, acceptance: |t| if t < 2500 { 0.0 } else { 0.9 } };
            let good = World { seconds: *seconds, acceptance: |_| 0.9 };
            let best = (0..=7).map(|n| run(&good, Mtp::Fixed(n), 20_000, seed, &mut Costs::default()).0.per_second());
            let best = best.fold(0.0, f64::max);
            let (outcome, _) = run(&better, Mtp::Auto, 10_000, seed, &mut Costs::default());
            let late = 6000.0 / (outcome.at[9999] - outcome.at[3999]);
            assert!(late > 0.9 * best, "{device}: {late} tokens/s from 1500 tokens after it got better, best {best}");

            let worse = World { seconds: *seconds, acceptance: |t| if t < 2500 { 0.9 } else { 0.0 } };
            let (outcome, _) = run(&worse, Mtp::Auto, 5000, seed, &mut Costs::default());
            let (plain, after) = (2500.0 * 0.02, outcome.at[4999] - outcome.at[2499]);
            // Trials take their share, and until it is off, less than 150 tokens could have been made.
            assert!(
                after < (1.0 + 150.0 / 2500.0 + TRIAL_SHARE) * plain,
                "{device}: {after} s since it got worse, {plain} without drafts"
            );
        }
    }
}

#[test]
fn the_mode_is_obeyed() {
    let costs = Costs::default();
    let next = |mtp, max| Drafting::new(mtp, max).next(&costs, 1);
    assert_eq!([Mtp::Off, Mtp::Fixed(0), Mtp::Fixed(3), Mtp::Fixed(9)].map(|mtp| next(mtp, 5)), [0, 0, 3, 5]);
    assert_eq!([Mtp::Off, Mtp::Fixed(9), Mtp::Auto].map(|mtp| next(mtp, 0)), [0; 3]);
    assert_eq!([Mtp::Fixed(9), Mtp::Auto].map(|mtp| next(mtp, 99)), [7, 1]);
    let mut one = Drafting::new(Mtp::Auto, 1);
    let mut costs = Costs::default();
    for _ in 0..500 {
        let drafts = one.next(&costs, 1);
        assert!(drafts <= 1);
        one.saw(drafts, drafts);
        costs.saw(drafts, 1, 0.02);
    }
    assert_eq!(one.length, 1);
}

#[test]
fn acceptance_is_counted_by_position() {
    let mut drafting = Drafting::new(Mtp::Fixed(3), 3);
    for (drafted, accepted) in [(3, 3), (3, 1), (2, 0), (0, 0), (1, 1)] {
        drafting.saw(drafted, accepted);
    }
    assert_eq!(drafting.acceptance(), [(4, 3), (3, 1), (2, 1)]);
    // More than can be.
    drafting.saw(100, 100);
    drafting.saw(1, 5);
    assert_eq!(drafting.acceptance(), [(6, 5), (4, 2), (3, 2)]);
}

#[test]
fn times_are_medians_and_kept_apart_by_number_of_sequences() {
    let mut costs = Costs::default();
    for (drafts, seconds) in [(0, f64::NAN), (0, 0.0), (0, -1.0), (0, f64::INFINITY), (8, 1.0), (usize::MAX, 1.0)] {
        for _ in 0..10 {
            costs.saw(drafts, 1, seconds);
        }
    }
    assert!((0..LENGTHS).all(|drafts| costs.seconds(drafts, 1).is_none()));
    for seconds in [1.0, 50.0, 1.2, 70.0, 1.1] {
        assert_eq!(costs.seconds(2, 4), None);
        costs.saw(2, 4, seconds);
    }
    assert_eq!(costs.seconds(2, 4), Some(1.2));
    assert_eq!(costs.seconds(2, 7), Some(1.2));
    assert_eq!([3, 8, 0, usize::MAX].map(|sequences| costs.seconds(2, sequences)), [None; 4]);
    for seconds in [1.0, 1.2, 1.1, 1.3, 1.2, 1e9, 1e9, 1e9] {
        costs.saw(2, 4, seconds);
    }
    assert!(costs.seconds(2, 4).unwrap() < 1.5, "wild times");
    for _ in 0..100 {
        costs.saw(2, 4, 9.0);
    }
    assert!((costs.seconds(2, 4).unwrap() - 9.0).abs() < 0.01, "it has become so");
}

#[test]
fn without_any_times_drafts_are_rare() {
    let mut drafting = Drafting::new(Mtp::Auto, 3);
    let mut drafted = 0;
    for _ in 0..10_000 {
        let drafts = drafting.next(&Costs::default(), 1);
        drafting.saw(drafts, 0);
        drafted += drafts;
    }
    assert!(drafted < 40 + 10_000 / 60, "{drafted}");
}

#[test]
fn a_short_text_profits_from_times_that_others_learned() {
    let world = World { seconds: DEVICES[3].1, acceptance: |_| 0.0 };
    let mut costs = Costs::default();
    run(&world, Mtp::Auto, 5000, 1, &mut costs);
    let mut again = costs.clone();
    let (outcome, drafting) = run(&world, Mtp::Auto, 200, 2, &mut costs);
    assert!(outcome.seconds < 200.0 * 0.02 * 1.04, "{} s for 200 tokens", outcome.seconds);
    assert!(drafting.acceptance()[0].0 < 15);
    // The same again gives the same.
    assert_eq!(run(&world, Mtp::Auto, 200, 2, &mut again).0.at, outcome.at);
}

#[test]
fn a_faster_pass_without_drafts_is_noticed() {
    // 0.9 accepted: drafts pay as long as a pass takes 0.04 s anyway, and not any more when one without takes 0.01 s.
    let seconds = |n: usize, t: u64| if n == 0 && t >= 2500 { 0.01 } else { 0.04 + 0.02 * n as f64 };
    let world = World { seconds, acceptance: |_| 0.9 };
    let (outcome, _) = run(&world, Mtp::Auto, 10_000, 3, &mut Costs::default());
    let late = 4000.0 / (outcome.at[9999] - outcome.at[5999]);
    assert!(late > 97.0, "{late} tokens/s, 100 without drafts");
}
