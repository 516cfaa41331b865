//! Programs of precision `fast` that multiply by cooperative matrices: close to the exact ones where a device has such matrices,
//! refused in words where it has none. `scripts/mesa-new -- cargo test --test cooperative` has a driver with them.

#[path = "common/golden.rs"]
mod common;
#[path = "common/skipped.rs"]
mod skipped;

use common::{Golden, bundle, gpu, greedy, options, profile, session};
use moewe::trace::{self, Numbers, Tensors};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, Precision, ProgramKind};
use moewe_runtime::{Gpu, Model};
use skipped::skipped;

/// Whether a device has such matrices, in such subgroups.
fn has(gpu: &Gpu, size: u32, lanes: u32) -> bool {
    gpu.info().cooperative.contains(&size) && gpu.info().subgroup_size == [lanes; 2]
}

/// A profile with cooperative matrices, and whether the device has them: Hopper's where that can be, else the software driver's.
fn with_matrices(gpu: &Gpu) -> (Profile, bool) {
    if has(gpu, 16, 32) {
        return (profile("hopper"), true);
    }
    (Profile { name: "eight".into(), cooperative: Some(8), ..profile("lavapipe") }, has(gpu, 8, 8))
}

fn compiled(golden: &Golden, profile: Profile, out: &std::path::Path) -> Bundle {
    let size = profile.cooperative;
    let compiled = bundle(&golden.dir, out, &options(profile));
    assert_eq!(Some(compiled.plan.requirements.cooperative), size);
    let uses = |program: &moewe_plan::Program| {
        let mut kernels = program.steps.iter().map(|step| compiled.plan.kernels[step.kernel as usize].name.as_str());
        kernels.any(|name| name.starts_with("gemm_coop."))
    };
    for program in &compiled.plan.programs {
        let many = program.max_tokens > 4 || program.kind == ProgramKind::Trace;
        assert_eq!(uses(program), many && program.precision == Precision::Fast, "{:?}", program.kind);
    }
    compiled
}

fn is_choice(name: &str) -> bool {
    name.strip_prefix("moe.").and_then(|layer| layer.strip_suffix(".ids")).is_some()
}

/// Tokens before the first one that was routed otherwise anywhere. Those behind it attend to what is another number there.
fn routed_alike(exact: &Tensors, fast: &Tensors) -> usize {
    let changed = exact.iter().filter(|(name, _)| is_choice(name)).map(|(name, ids)| {
        let (Numbers::I32(a), Numbers::I32(b)) = (&ids.data, &fast[name].data) else { panic!("{name} are ids") };
        let mut rows = a.chunks(ids.shape[1]).zip(b.chunks(ids.shape[1]));
        rows.position(|(a, b)| a != b).unwrap_or(ids.shape[0])
    });
    changed.min().expect("layers of experts")
}

/// Mean over the first `count` tokens of the divergence (nats) of the distributions that two lists of logits stand for.
fn divergence(exact: &Tensors, fast: &Tensors, count: usize) -> f64 {
    let vocab = exact["logits"].shape[1];
    let rows = |tensors: &Tensors| -> Vec<Vec<f64>> {
        let Numbers::F32(numbers) = &tensors["logits"].data else { panic!("logits are numbers") };
        let numbers: Vec<f64> = numbers.iter().map(|&number| number.into()).collect();
        numbers.chunks(vocab).map(moewe_oracle::ops::softmax).collect()
    };
    let (exact, fast) = (rows(exact), rows(fast));
    let of_row = |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
    exact.iter().zip(&fast).take(count).map(of_row).sum::<f64>() / count as f64
}

/// Factors have 11 bits: hidden rows are off by 6e-4 a layer. On the software driver, mean divergence of a sequence was at most
/// 7.7e-6 nats, as far as tokens were routed alike: what is nearly a tie between two experts may turn, which is no small error then.
const DIVERGENCE: f64 = 2e-5;

#[test]
fn fast_programs_are_close_to_exact_ones() {
    for dir in ["golden/v3-tiny", "golden/v3-fp8-tiny", "golden/v2-tiny"] {
        let golden = Golden::open(dir);
        let temp = tempfile::tempdir().unwrap();
        let plain = gpu();
        let (profile, can_run) = with_matrices(&plain);
        let size = profile.cooperative;
        let compiled = compiled(&golden, profile, &temp.path().join("bundle"));
        if !can_run {
            skipped(&format!(
                "{dir} by cooperative matrices needs a device with 16×16 of f16 and subgroups of 32, or 8×8 and 8 (scripts/mesa-new \
                 has that)"
            ));
            continue;
        }
        let gpu = plain.for_plan(&compiled.plan, Precision::Fast).unwrap();
        assert_eq!((plain.cooperative(), gpu.cooperative()), (None, size));
        let model = Model::load(&gpu, &compiled, &|_| ()).unwrap();
        let kinds = trace::kinds(compiled.plan.model.mtp_modules);
        let mut tracing = [Precision::Exact, Precision::Fast].map(|p| session(&model, kinds.clone(), None, p));
        let mut generating = session(&model, vec![ProgramKind::Forward], None, Precision::Fast);
        let mut alike = 0;
        for sequence in &golden.sequences {
            let [exact, fast] = [0, 1].map(|i| trace::trace(&mut tracing[i], &sequence.ids, None, &|_| true).unwrap());
            let count = routed_alike(&exact, &fast);
            let found = divergence(&exact, &fast, count);
            let what = format!("{dir} {}: {count} of {} tokens routed alike", sequence.name, sequence.ids.len());
            let tokens = greedy(&mut generating, &sequence.ids, sequence.greedy.len(), None);
            let equal = tokens.iter().zip(&sequence.greedy).take_while(|(a, b)| a == b).count();
            println!("{what}, divergence {found:.1e}; {equal} of {} greedy tokens", tokens.len());
            assert!(found <= DIVERGENCE, "{what}: {found:e} nats");
            assert!(found > 0.0, "{what}: the same numbers");
            assert!(equal > 0 || count < sequence.ids.len(), "{what}: another token follows");
            alike += count;
        }
        assert!(alike >= 64, "{dir}: only {alike} tokens could be compared");
    }
}

/// Devices without the matrices, and those that were opened without them, run the exact programs and refuse the fast ones.
#[test]
fn only_fast_programs_need_the_matrices() {
    let golden = Golden::open("golden/v3-tiny");
    let temp = tempfile::tempdir().unwrap();
    let plain = gpu();
    let (profile, can_run) = with_matrices(&plain);
    let mut compiled = compiled(&golden, profile, &temp.path().join("bundle"));
    let exact = plain.for_plan(&compiled.plan, Precision::Exact).unwrap();
    assert!(std::sync::Arc::ptr_eq(&exact, &plain));
    let model = Model::load(&exact, &compiled, &|_| ()).unwrap();
    let sequence = &golden.sequences[0];
    let mut generating = session(&model, vec![ProgramKind::Forward], None, Precision::Exact);
    assert_eq!(greedy(&mut generating, &sequence.ids, sequence.greedy.len(), None), sequence.greedy);

    let refused = model.prepare(&[ProgramKind::Forward], Precision::Fast, &|_| ()).unwrap_err().to_string();
    if can_run {
        assert!(refused.contains("Gpu::for_plan"), "{refused}");
    } else {
        assert!(refused.contains("needs 8×8 in subgroups of 8"), "{refused}");
        let none = plain.info().cooperative.is_empty();
        assert_eq!(refused.contains("cooperative matrices of f16: none"), none, "{refused}");
    }
    // Larger ones than the software driver has.
    compiled.plan.requirements.cooperative = 16;
    if plain.info().cooperative.contains(&16) {
        skipped("the refusal of 16×16 needs a device without them");
        return;
    }
    let refused = plain.for_plan(&compiled.plan, Precision::Fast).unwrap_err().to_string();
    for part in [&plain.info().name, "16×16 in subgroups of 8", "--precision exact", "--target lavapipe", "for eight"]
    {
        assert!(refused.contains(part), "{part} is not in: {refused}");
    }
}
