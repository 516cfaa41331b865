//! What may be tried: for each choice of a profile, the other values that it can have.

use moewe_compiler::profile::{Gemm, Profile, SHAPED, Shape};

use super::cases::Case;

/// Sums that an invocation may hold: more do not fit its registers.
const MOST_SUMS: u32 = 128;

/// Profiles that differ from one in a choice.
type Others = dyn Fn(&Profile) -> Vec<Profile>;
/// Puts a choice of one profile into another.
type CopyTo = dyn Fn(&Profile, &mut Profile);

/// One choice of a profile.
pub struct Knob {
    /// What it is, in a word or two.
    pub name: String,
    /// Other profiles that differ in it; some may be illegal.
    pub others: Box<Others>,
    /// Puts this profile's choice into another one.
    pub copy: Box<CopyTo>,
    /// Whether it matters to a case.
    pub matters: Box<dyn Fn(&Case) -> bool>,
}

/// All choices, in the order in which they are made.
pub fn knobs() -> Vec<Knob> {
    let mut knobs = Vec::new();
    for kernel in SHAPED {
        let ways: [fn(Shape) -> Vec<Shape>; 3] = [lanes, workgroups, rows];
        // An invocation of `absorb_output` always has one row.
        let ways = if kernel == "absorb_output" { &ways[..2] } else { &ways[..] };
        for &way in ways {
            knobs.push(Knob {
                name: kernel.into(),
                others: Box::new(move |profile| {
                    let shapes = way(profile.shape(kernel)).into_iter();
                    shapes.map(|shape| with_shape(profile, kernel, shape)).collect()
                }),
                copy: Box::new(move |from, to| *to = with_shape(to, kernel, from.shape(kernel))),
                matters: Box::new(move |case| case.kernels.contains(kernel)),
            });
        }
    }
    let tiled = |case: &Case| case.kernels.contains("gemm") || case.kernels.contains("gemm_tiled");
    for way in [tiles, tokens, expert_tokens] {
        knobs.push(knob("tiles", tiled, move |p| way(p.gemm), |p, gemm| p.gemm = gemm, |p| p.gemm));
    }
    let shares = |case: &Case| case.tokens > 1 && case.kernels.iter().any(|kernel| SHAPED.contains(&kernel.as_str()));
    knobs.push(knob("token_tile", shares, |_| vec![2, 4, 8, 16], |p, n| p.token_tile = n, |p| p.token_tile));
    let attends = |case: &Case| case.kernels.contains("latent_attention");
    let heads = |_: &Profile| vec![4, 8, 16, 32];
    knobs.push(knob("attention", attends, heads, |p, n| p.attention_heads = n, |p| p.attention_heads));
    let splits = |_: &Profile| vec![1, 2, 4, 8, 16, 32];
    knobs.push(knob("attention", attends, splits, |p, n| p.attention_splits = n, |p| p.attention_splits));
    knobs
}

/// A choice that is a field.
fn knob<T: 'static>(
    name: &str,
    matters: fn(&Case) -> bool,
    others: impl Fn(&Profile) -> Vec<T> + 'static,
    set: fn(&mut Profile, T),
    get: fn(&Profile) -> T,
) -> Knob {
    Knob {
        name: name.into(),
        others: Box::new(move |profile| {
            let with = |value| {
                let mut profile = profile.clone();
                set(&mut profile, value);
                profile
            };
            others(profile).into_iter().map(with).collect()
        }),
        copy: Box::new(move |from, to| set(to, get(from))),
        matters: Box::new(matters),
    }
}

/// A profile with another shape of a kernel; none of its own if it is that of all.
fn with_shape(profile: &Profile, kernel: &str, shape: Shape) -> Profile {
    let mut profile = profile.clone();
    profile.kernels.remove(kernel);
    if profile.shape(kernel) != shape {
        profile.kernels.insert(kernel.into(), shape);
    }
    profile
}

/// Inputs can only be loaded together where a row has one invocation.
fn lanes(shape: Shape) -> Vec<Shape> {
    let shared = [2, 4, 8, 16, 32].map(|lanes| Shape { lanes, pool_inputs: false, ..shape });
    let alone = [true, false].map(|pool_inputs| Shape { lanes: 1, pool_inputs, ..shape });
    alone.into_iter().chain(shared).collect()
}

fn workgroups(shape: Shape) -> Vec<Shape> {
    [32, 64, 128, 256, 512].map(|workgroup| Shape { workgroup, ..shape }).to_vec()
}

fn rows(shape: Shape) -> Vec<Shape> {
    let pooled = [shape.pool_inputs, !shape.pool_inputs];
    pooled.into_iter().flat_map(|pool_inputs| [1, 2, 4, 8].map(|rows| Shape { rows, pool_inputs, ..shape })).collect()
}

/// With as many tokens as before where there were tiles in registers.
fn tiles(gemm: Option<Gemm>) -> Vec<Option<Gemm>> {
    let (tokens, expert_tokens) = match gemm {
        Some(Gemm::Registers { tokens, expert_tokens, .. }) => (tokens, expert_tokens),
        _ => (16, 16),
    };
    let registers = [1, 2, 4, 8].map(|rows| Gemm::Registers { rows, tokens, expert_tokens });
    let registers = registers.into_iter().filter(|&gemm| fits(gemm)).map(Some);
    registers.chain([Some(Gemm::Workgroup), None]).collect()
}

fn tokens(gemm: Option<Gemm>) -> Vec<Option<Gemm>> {
    let Some(Gemm::Registers { rows, expert_tokens, .. }) = gemm else { return Vec::new() };
    let with = [4, 8, 16, 32].map(|tokens| Gemm::Registers { rows, tokens, expert_tokens });
    with.into_iter().filter(|&gemm| fits(gemm)).map(Some).collect()
}

fn expert_tokens(gemm: Option<Gemm>) -> Vec<Option<Gemm>> {
    let Some(Gemm::Registers { rows, tokens, .. }) = gemm else { return Vec::new() };
    let with = [4, 8, 16, 32].map(|expert_tokens| Gemm::Registers { rows, tokens, expert_tokens });
    with.into_iter().filter(|&gemm| fits(gemm)).map(Some).collect()
}

fn fits(gemm: Gemm) -> bool {
    !matches!(gemm, Gemm::Registers { rows, tokens, expert_tokens } if rows * tokens.max(expert_tokens) > MOST_SUMS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_has_legal_others_and_can_be_copied() {
        for start in Profile::built_in() {
            for knob in knobs() {
                let others = (knob.others)(&start);
                let legal: Vec<&Profile> = others.iter().filter(|other| other.check().is_ok()).collect();
                assert!(others.len() <= 12, "{}: {} others", knob.name, others.len());
                for other in legal {
                    let mut copied = start.clone();
                    (knob.copy)(other, &mut copied);
                    assert_eq!(copied, *other, "{}", knob.name);
                    (knob.copy)(&start, &mut copied);
                    assert_eq!(copied, start, "{}: and back", knob.name);
                }
            }
        }
    }

    #[test]
    fn a_shape_that_all_have_is_not_written_down() {
        let start = Profile::load("hopper").unwrap();
        let shape = start.shape("linear");
        let other = with_shape(&start, "linear", Shape { lanes: 8, ..shape });
        assert_eq!(other.kernels.len(), 1);
        assert_eq!(with_shape(&other, "linear", shape), start);
    }
}
