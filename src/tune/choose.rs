//! Which candidate is taken: one choice after the other, each by the time of all cases that it matters to.

use moewe_compiler::profile::Profile;

use super::Result;
use super::candidates::Knob;
use super::cases::Case;

/// What a present choice is kept at: another one must take less than this share of its time. The rest may be noise.
const WORTHWHILE: f64 = 0.95;

/// What became of a candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The oracle agrees with it, and it takes this long.
    Seconds(f64),
    /// The oracle disagrees, or the device refuses it.
    Wrong,
    /// A kernel would exceed what the profile grants.
    Illegal,
}

impl Verdict {
    /// The time, infinite for what cannot be taken.
    pub fn seconds(self) -> f64 {
        if let Self::Seconds(seconds) = self { seconds } else { f64::INFINITY }
    }
}

/// Verifies and times candidates.
pub trait Measure {
    /// What becomes of each profile in a case.
    ///
    /// # Errors
    /// A device that is lost or full, or an interruption.
    fn times(&mut self, case: usize, profiles: &[Profile]) -> Result<Vec<Verdict>>;
}

/// The best profile that is found from `start`: every choice is tried in turn, `sweeps` times over or until nothing changes.
/// `progress` gets choices done and their number.
///
/// # Errors
/// Those of measuring.
pub fn choose(
    start: &Profile,
    knobs: &[Knob],
    cases: &[Case],
    sweeps: usize,
    measure: &mut dyn Measure,
    progress: &dyn Fn(usize, usize),
) -> Result<Profile> {
    let mut chosen = start.clone();
    for sweep in 0..sweeps {
        let before = chosen.clone();
        for (done, knob) in knobs.iter().enumerate() {
            progress(sweep * knobs.len() + done, sweeps * knobs.len());
            chosen = best(chosen, knob, cases, measure)?;
        }
        if chosen == before {
            break;
        }
    }
    progress(sweeps * knobs.len(), sweeps * knobs.len());
    Ok(chosen)
}

/// The present profile, or one that differs in this choice and is clearly faster.
fn best(present: Profile, knob: &Knob, cases: &[Case], measure: &mut dyn Measure) -> Result<Profile> {
    let mut candidates = vec![present];
    for other in (knob.others)(&candidates[0]) {
        if other.check().is_ok() && !candidates.contains(&other) {
            candidates.push(other);
        }
    }
    let mut totals = vec![0.0; candidates.len()];
    for (case, description) in cases.iter().enumerate().filter(|(_, case)| (knob.matters)(case)) {
        for (total, verdict) in totals.iter_mut().zip(measure.times(case, &candidates)?) {
            *total += description.weight() * verdict.seconds();
        }
    }
    let fastest = (0..totals.len()).min_by(|&a, &b| totals[a].total_cmp(&totals[b])).unwrap_or(0);
    let taken = if totals[fastest] < WORTHWHILE * totals[0] { fastest } else { 0 };
    Ok(candidates.swap_remove(taken))
}

/// Takes back what does not hold when both profiles are measured once more, side by side. Returns the profile and the times of
/// each case with `start` and with it.
///
/// # Errors
/// Those of measuring.
pub fn confirm(
    start: &Profile,
    mut chosen: Profile,
    knobs: &[Knob],
    cases: &[Case],
    measure: &mut dyn Measure,
) -> Result<(Profile, Vec<[Verdict; 2]>)> {
    loop {
        let mut times = Vec::new();
        for case in 0..cases.len() {
            let both = measure.times(case, &[start.clone(), chosen.clone()])?;
            times.push([both[0], both[1]]);
        }
        let mut kept = chosen.clone();
        for knob in knobs {
            let mut other = kept.clone();
            (knob.copy)(start, &mut other);
            let [before, after] = [0, 1].map(|which| {
                let matter = cases.iter().zip(&times).filter(|(case, _)| (knob.matters)(case));
                matter.map(|(case, times)| case.weight() * times[which].seconds()).sum::<f64>()
            });
            // With neither any good, the present one stays.
            if other.check().is_ok() && (after >= WORTHWHILE * before || !after.is_finite()) {
                kept = other;
            }
        }
        if kept == chosen {
            return Ok((chosen, times));
        }
        chosen = kept;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use moewe_compiler::profile::Shape;

    use super::super::candidates::knobs;
    use super::*;

    /// Times by a rule; notes what was asked for.
    struct Rule<F: Fn(usize, &Profile) -> Verdict>(F);

    impl<F: Fn(usize, &Profile) -> Verdict> Measure for Rule<F> {
        fn times(&mut self, case: usize, profiles: &[Profile]) -> Result<Vec<Verdict>> {
            Ok(profiles.iter().map(|profile| (self.0)(case, profile)).collect())
        }
    }

    fn case(kernel: &str, tokens: usize, count: usize) -> Case {
        let kernels = BTreeSet::from([kernel.to_owned()]);
        Case { name: "product", shape: String::new(), nodes: Vec::new(), prepared: 0, tokens, count, kernels }
    }

    fn tuned(cases: &[Case], rule: impl Fn(usize, &Profile) -> Verdict) -> (Profile, Vec<[Verdict; 2]>) {
        let (start, mut rule) = (Profile::load("lavapipe").unwrap(), Rule(rule));
        let chosen = choose(&start, &knobs(), cases, 2, &mut rule, &|_, _| ()).unwrap();
        confirm(&start, chosen, &knobs(), cases, &mut rule).unwrap()
    }

    #[test]
    fn the_fastest_is_taken_if_it_is_clearly_faster() {
        let by = |fast: f64| {
            move |_: usize, profile: &Profile| {
                let Shape { workgroup, rows, .. } = profile.shape("linear");
                Verdict::Seconds(if workgroup == 128 && rows == 2 { fast } else { 1.0 + f64::from(rows == 4) })
            }
        };
        let cases = [case("linear", 1, 1)];
        // Rows of 1 are as good as those of 2 until the workgroup is another.
        assert_eq!(tuned(&cases, |_, _| Verdict::Seconds(1.0)).0, Profile::load("lavapipe").unwrap());
        let (profile, times) = tuned(&cases, by(0.5));
        assert_eq!((profile.kernels.len(), profile.shape("linear").rows != 4), (1, true));
        assert_eq!(times[0][0], Verdict::Seconds(2.0));
        let nearly =
            |_: usize, profile: &Profile| Verdict::Seconds(1.0 - 0.04 * f64::from(profile.shape("linear").rows == 1));
        assert_eq!(tuned(&cases, nearly).0, Profile::load("lavapipe").unwrap());
    }

    #[test]
    fn what_is_wrong_is_never_taken_and_what_was_wrong_is_left() {
        let cases = [case("experts_down", 1, 1)];
        let (profile, _) = tuned(&cases, |_, profile| match profile.shape("experts_down").workgroup {
            32 => Verdict::Seconds(1.0),
            64 => Verdict::Seconds(0.5),
            128 => Verdict::Wrong,
            _ => Verdict::Illegal,
        });
        assert_eq!(profile.shape("experts_down").workgroup, 64);
        let (profile, times) = tuned(&cases, |_, profile| match profile.shape("experts_down").workgroup {
            32 => Verdict::Wrong,
            _ => Verdict::Seconds(7.0),
        });
        assert_ne!(profile.shape("experts_down").workgroup, 32);
        assert_eq!(times[0], [Verdict::Wrong, Verdict::Seconds(7.0)]);
    }

    #[test]
    fn a_choice_that_several_cases_share_is_made_by_their_weighted_sum() {
        let by = |case: usize, profile: &Profile| {
            let faster = profile.attention_heads == 16;
            Verdict::Seconds(if faster == (case == 0) { 1.0 } else { 2.0 })
        };
        let heads = |counts: [usize; 2]| {
            let cases = counts.map(|count| case("latent_attention", 1, count));
            tuned(&cases, by).0.attention_heads
        };
        assert_eq!(heads([3, 1]), 16);
        assert_eq!(heads([1, 3]), 4);
    }

    #[test]
    fn what_does_not_hold_is_taken_back() {
        let asked = std::cell::Cell::new(0);
        let cases = [case("linear", 1, 1)];
        let (start, mut rule) = (
            Profile::load("lavapipe").unwrap(),
            Rule(|_, _: &Profile| {
                asked.set(asked.get() + 1);
                Verdict::Seconds(1.0)
            }),
        );
        let mut chosen = start.clone();
        chosen.kernels.insert("linear".into(), Shape { workgroup: 64, ..start.shape("linear") });
        assert_eq!(confirm(&start, chosen, &knobs(), &cases, &mut rule).unwrap().0, start);
        assert_eq!(asked.get(), 4, "measured once more when it is final");
    }
}
