//! `latent_attention`.

use std::collections::BTreeSet;

use moewe_oracle::ops::{self, LatentRows, MlaDims};
use moewe_plan::Latent;
use moewe_shaders::Variant;

use super::attention::tokens;
use super::cache::Cache;
use super::data::{Rng, assert_agrees, compare, f64s, magnitudes};
use super::harness::{Call, bits, subgroup};

/// How many invocations work together, as lanes of a subgroup of this size if it is given, and share a context.
#[derive(Clone, Copy, Debug)]
struct Team {
    subgroup: Option<usize>,
    teams: usize,
    splits: usize,
}

impl Default for Team {
    fn default() -> Self {
        Self { subgroup: None, teams: 1, splits: 1 }
    }
}

/// Teams that this device can run.
fn teams() -> Vec<Team> {
    let plain = Team::default();
    let mut teams = vec![plain, Team { teams: 2, splits: 3, ..plain }];
    if subgroup() >= 8 {
        teams.extend([(1, 1), (2, 1), (1, 2), (3, 16)].map(|(teams, splits)| Team {
            subgroup: Some(8),
            teams,
            splits,
        }));
    }
    teams
}

/// Workgroups of `splits` that have something of a context to do: at least four pages each.
fn shares(context: usize, splits: usize) -> usize {
    let pages = context.div_ceil(64);
    pages.div_ceil(pages.div_ceil(splits).max(4))
}

struct Attention {
    dims: MlaDims,
    latent: Latent,
    /// How the kernel is built.
    team: Team,
    first: usize,
    /// For each sequence positions that were never written, if the kernel is told of any.
    holes: Option<Vec<(usize, usize)>>,
    q: Vec<f32>,
    places: Vec<(usize, usize)>,
    cache: Cache,
    /// For each sequence what is in the cache, from position `first`: c and k_rope.
    rows: Vec<(Vec<f64>, Vec<f64>)>,
}

impl Attention {
    fn random(rng: &mut Rng, dims: MlaDims, latent: Latent, first: usize, places: &[(usize, usize)]) -> Self {
        let sequences = places.iter().map(|place| place.0).max().expect("some tokens") + 1;
        let length = |sequence| places.iter().filter(|place| place.0 == sequence).map(|place| place.1 + 1).max();
        let lengths: Vec<usize> = (0..sequences).map(|sequence| length(sequence).unwrap_or(0)).collect();
        let numbers = dims.latent + dims.rope;
        let mut cache = Cache::new(rng, latent, (dims.latent, dims.rope), 21, &lengths);
        let mut rows = vec![(Vec::new(), Vec::new()); sequences];
        for (sequence, &length) in lengths.iter().enumerate() {
            for position in first..length {
                let row = cache.write(sequence, position, &rng.numbers(numbers));
                rows[sequence].0.extend(&row[..dims.latent]);
                rows[sequence].1.extend(&row[dims.latent..]);
            }
        }
        let q = rng.numbers(places.len() * dims.heads * numbers);
        Self { dims, latent, team: Team::default(), first, holes: None, q, places: places.to_vec(), cache, rows }
    }

    fn run(&self) -> Vec<f32> {
        let MlaDims { heads, latent, rope, .. } = self.dims;
        let Team { subgroup, teams, splits } = self.team;
        let least = latent.div_ceil(16).max(rope.div_ceil(4)).max(8).next_power_of_two();
        let variant = Variant::new("latent_attention")
            .latent(self.latent)
            .flag("holes", self.holes.is_some())
            .flag("split", splits > 1)
            .flag("subgroup", subgroup.is_some())
            .int("HEADS", heads)
            .int("RANK", latent)
            .int("ROPE", rope)
            .int("MAX_PAGES", self.cache.max_pages)
            .int("FIRST", self.first)
            .int("LANES", least.max(subgroup.unwrap_or(8)))
            .int("SUBGROUP", subgroup.unwrap_or(8))
            .int("TEAMS", teams)
            .int("SPLITS", splits)
            .float("SOFTMAX_SCALE", self.dims.scale);
        let mut call = Call::new(&variant);
        if let Some(holes) = &self.holes {
            let words: Vec<u32> = holes.iter().flat_map(|&(from, to)| [from as u32, to as u32]).collect();
            call = call.words("holes", &words);
        }
        if splits > 1 {
            call = call.output("stats", self.places.len() * splits * heads * 2);
        }
        let outputs = call
            .floats("q", &self.q)
            .words("cache_rows", &self.cache.words)
            .words("tokens", &tokens(&self.places))
            .words("pages", &self.cache.table)
            .output("y", self.places.len() * splits * heads * latent)
            .run([heads.div_ceil(4 * teams), self.places.len(), splits]);
        let y = outputs.floats("y");
        if splits == 1 {
            return y;
        }
        // Added up as `absorb_output` does.
        let stats = outputs.floats("stats");
        let mut joined = Vec::new();
        for (t, &(_, position)) in self.places.iter().enumerate() {
            let shares = shares(position + 1, splits);
            for head in 0..heads {
                let row = |share: usize| (t * splits + share) * heads + head;
                let stat = |share: usize| (f64::from(stats[2 * row(share)]), f64::from(stats[2 * row(share) + 1]));
                let largest = (0..shares).map(|share| stat(share).0).fold(f64::MIN, f64::max);
                let factor = |share: usize| (stat(share).0 - largest).exp();
                let total: f64 = (0..shares).map(|share| factor(share) * stat(share).1).sum();
                joined.extend((0..latent).map(|i| {
                    let sum: f64 = (0..shares).map(|s| factor(s) * f64::from(y[row(s) * latent + i])).sum();
                    (sum / total) as f32
                }));
            }
        }
        joined
    }

    /// The same without the positions of holes: NaN in the cache, and not there for the oracle. A token's own position
    /// stays.
    fn with_holes(mut self, holes: &[(usize, usize)]) -> Self {
        let own: BTreeSet<(usize, usize)> = self.places.iter().copied().collect();
        let words = self.cache.row_words();
        for (sequence, &(from, to)) in holes.iter().enumerate() {
            let length = self.rows[sequence].0.len() / self.dims.latent + self.first;
            for position in (from.max(self.first)..to.min(length)).filter(|&p| !own.contains(&(sequence, p))) {
                let at = self.cache.at(sequence, position);
                self.cache.words[at..][..words].fill(u32::MAX);
            }
        }
        self.holes = Some(holes.to_vec());
        self
    }

    /// Positions of a sequence that a token sees.
    fn visible(&self, sequence: usize, own: usize) -> Vec<usize> {
        let (from, to) = self.holes.as_ref().map_or((0, 0), |holes| holes[sequence]);
        (self.first..=own).filter(|&position| position == own || !(from..to).contains(&position)).collect()
    }

    /// Expected numbers and their condition; `certain`: the scores are so far apart that their errors do not matter.
    fn expected(&self, certain: bool) -> (Vec<f64>, Vec<f64>) {
        let MlaDims { heads, latent, rope, scale, .. } = self.dims;
        let (q, q_rope) = ops::split_rows(&f64s(&self.q), latent + rope, latent);
        let (mut want, mut size) = (Vec::new(), Vec::new());
        for (t, &(sequence, position)) in self.places.iter().enumerate() {
            let (all_c, all_k) = &self.rows[sequence];
            let positions = self.visible(sequence, position);
            let of = |rows: &[f64], width: usize| -> Vec<f64> {
                positions.iter().flat_map(|p| &rows[(p - self.first) * width..][..width]).copied().collect()
            };
            let (c, k_rope) = (&of(all_c, latent), &of(all_k, rope));
            for row in t * heads..(t + 1) * heads {
                let (q, q_rope) = (&q[row * latent..][..latent], &q_rope[row * rope..][..rope]);
                let cache = LatentRows { c, k_rope, positions: &positions };
                let one = MlaDims { heads: 1, ..self.dims.clone() };
                want.extend(ops::attend_latent(&one, q, q_rope, &[position], &cache));
                // An error of a score is an error of the same size of the logarithm of a probability.
                let score_size = |s: usize| {
                    ops::dot(&magnitudes(q), &magnitudes(&c[s * latent..][..latent]))
                        + ops::dot(&magnitudes(q_rope), &magnitudes(&k_rope[s * rope..][..rope]))
                };
                let visible = positions.len();
                let scores = (0..visible).map(|s| score_size(s) * scale).fold(0.0, f64::max);
                let scores = if certain { 0.0 } else { scores };
                let largest = |i: usize| (0..visible).map(|s| c[s * latent + i].abs()).fold(0.0, f64::max);
                size.extend((0..latent).map(|i| largest(i) * (1.0 + scores)));
            }
        }
        (want, size)
    }

    /// Compares what each team finds; returns the first's.
    fn check(&mut self, what: &str, certain: bool) -> Vec<f32> {
        let (want, size) = self.expected(certain);
        let teams = teams().into_iter().map(|team| {
            self.team = team;
            let got = self.run();
            assert_agrees("latent_attention", &format!("{what}, {team:?}"), &got, &want, &size);
            got
        });
        let mut found: Vec<Vec<f32>> = teams.collect();
        found.swap_remove(0)
    }
}

fn dims(heads: usize, latent: usize, rope: usize) -> MlaDims {
    MlaDims { heads, nope: 1, rope, value: 1, latent, scale: 0.11 }
}

/// Tokens of four sequences in one batch, at and around the borders of pages, in no order.
const RAGGED: [(usize, usize); 11] =
    [(0, 0), (2, 62), (1, 63), (1, 64), (3, 128), (1, 65), (2, 127), (3, 300), (0, 1), (2, 3), (3, 191)];

#[test]
fn ragged_batches_over_shuffled_pages() {
    let mut rng = Rng::new(54);
    for (heads, latent, rope) in
        [(3, 9, 6), (1, 1, 2), (2, 24, 16), (2, 64, 4), (2, 65, 10), (6, 130, 20), (5, 512, 64)]
    {
        for storage in Latent::ALL {
            let mut case = Attention::random(&mut rng, dims(heads, latent, rope), storage, 0, &RAGGED);
            case.check(&format!("{storage:?} {heads} heads, {latent} + {rope}"), false);
        }
    }
}

/// Rows of modules of multi-token prediction begin later; what lies below, NaN here, must not be seen.
#[test]
fn positions_below_the_first_are_not_seen() {
    let mut rng = Rng::new(55);
    for storage in Latent::ALL {
        for first in [1, 2] {
            let places: Vec<_> = RAGGED.into_iter().filter(|place| place.1 >= first).chain([(0, 2)]).collect();
            let mut case = Attention::random(&mut rng, dims(2, 10, 4), storage, first, &places);
            case.check(&format!("{storage:?} from position {first}"), false);
        }
    }
}

/// Positions that a module skipped, NaN here, are not seen, on one page or over several; a token's own always is.
#[test]
fn holes_are_not_seen() {
    let mut rng = Rng::new(59);
    let cases: [[(usize, usize); 4]; 6] = [
        [(0, 0); 4],
        [(0, 1), (10, 60), (64, 128), (64, 128)],
        [(5, 9), (0, 64), (3, 62), (1, 300)],
        [(0, 1), (63, 65), (0, 128), (63, 193)],
        // Over its end, empty, turned round, and all but the tokens' own.
        [(1, 50), (64, 64), (100, 20), (0, u32::MAX as usize)],
        [(0, 300), (0, 300), (0, 300), (128, 192)],
    ];
    for storage in [Latent::F32, Latent::Fp8] {
        for first in [0, 1] {
            let places: Vec<_> = RAGGED.into_iter().filter(|place| place.1 >= first).chain([(0, 2)]).collect();
            for holes in &cases {
                let mut case = Attention::random(&mut rng, dims(2, 10, 4), storage, first, &places).with_holes(holes);
                case.check(&format!("{storage:?} from position {first}, holes {holes:?}"), false);
            }
        }
    }
    // Without holes the flag changes no bit.
    let mut case = Attention::random(&mut rng, dims(2, 10, 4), Latent::F32, 1, &[(0, 70), (1, 3)]);
    let plain = bits(&case.run());
    case.holes = Some(vec![(0, 0); 2]);
    assert_eq!(bits(&case.run()), plain);
    case.holes = Some(vec![(0, 0), (1, 2)]);
    assert_ne!(bits(&case.run()), plain, "a hole made no difference");
}

/// Contexts that several workgroups share evenly, unevenly, or not at all, and many short ones.
#[test]
fn contexts_are_shared() {
    let mut rng = Rng::new(61);
    let lengths = (0..300).step_by(7).map(|position| (0, position));
    let places: Vec<_> = lengths.chain([(1, 1023), (2, 1024), (3, 1300), (4, 256), (5, 511)]).collect();
    for latent in Latent::ALL {
        let mut case = Attention::random(&mut rng, dims(5, 20, 6), latent, 0, &places);
        case.check(&format!("{latent:?}, long"), false);
    }
}

#[test]
fn huge_scores_do_not_overflow() {
    let mut rng = Rng::new(56);
    for (storage, magnitude) in [(Latent::F32, 1e34), (Latent::F16, 1e34), (Latent::F32, 1e3)] {
        let mut case = Attention::random(&mut rng, dims(2, 12, 4), storage, 0, &[(0, 5), (1, 63), (2, 64), (0, 200)]);
        // Scores are `magnitude` times -1, 0, 1, …: all but the largest have no weight.
        for (sequence, (c, k_rope)) in case.rows.iter_mut().enumerate() {
            for (s, (c, k)) in c.chunks_exact_mut(12).zip(k_rope.chunks_exact_mut(4)).enumerate() {
                c[0] = (s * 37 % 211) as f64 - 1.0;
                let row: Vec<f32> = c.iter().chain(k.iter()).map(|&number| number as f32).collect();
                case.cache.write(sequence, s, &row);
            }
        }
        for q in case.q.chunks_exact_mut(16) {
            q.fill(0.0);
            q[0] = magnitude;
        }
        let got = case.check(&format!("{storage:?} scores of {magnitude:e}"), true);
        assert!(got.iter().all(|number| number.is_finite()));
        // All scores hugely negative but one.
        case.q.iter_mut().for_each(|q| *q = -*q);
        case.check(&format!("{storage:?} scores of -{magnitude:e}"), true);
    }
}

#[test]
fn equal_scores_give_the_mean() {
    let mut rng = Rng::new(57);
    let mut case = Attention::random(&mut rng, dims(1, 8, 2), Latent::F32, 0, &RAGGED);
    case.q.fill(0.0);
    case.check("zero queries", true);
}

#[test]
fn wrong_results_are_noticed() {
    let mut rng = Rng::new(58);
    let mut case = Attention::random(&mut rng, dims(2, 12, 4), Latent::F32, 0, &[(0, 70), (1, 3)]);
    let got = case.check("before the change", false);
    let verdict = |case: &Attention| {
        let (want, size) = case.expected(false);
        compare("latent_attention", &got, &want, &size)
    };
    case.rows[0].0[66 * 12 + 5] += 0.5;
    assert!(verdict(&case).is_err(), "a changed latent on the second page went unnoticed");
    case.rows[0].0[66 * 12 + 5] -= 0.5;
    assert!(verdict(&case).is_ok());
    case.places[1].1 = 2;
    assert!(verdict(&case).is_err(), "a shorter context went unnoticed");
}
