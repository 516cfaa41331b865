//! Figures of a plan that do not depend on a machine: what a token costs must not grow unnoticed.

use std::path::Path;

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, Latent, Plan, Precision, Program, ProgramKind, TapChoice};

/// The plan of a preset for a profile, without weights.
fn plan(preset: &str, profile: &str) -> Plan {
    let temp = tempfile::tempdir().unwrap();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("presets").join(format!("{preset}.json"));
    let options = Options {
        profile: Profile::load(profile).unwrap(),
        weights: None,
        latents: Latent::F16,
        reference: false,
        plan_only: true,
        taps: TapChoice::none(),
    };
    let checkpoint = Checkpoint::open(&config).unwrap();
    compile(&checkpoint, &options, &temp.path().join("bundle"), &|_, _| ()).unwrap();
    Bundle::open(&temp.path().join("bundle")).unwrap().plan
}

/// The program that decodes.
fn decode(plan: &Plan) -> &Program {
    let programs = plan.programs.iter();
    let forward = programs.filter(|p| p.kind == ProgramKind::Forward && p.precision == Precision::Exact);
    forward.min_by_key(|program| program.max_tokens).unwrap()
}

/// Dispatches of a layer.
fn dispatches(program: &Program, layer: u32) -> usize {
    program.steps.iter().filter(|step| step.layer == Some(layer)).count()
}

#[test]
fn layers_have_few_dispatches() {
    // Layer 0 is dense, layer 3 a mixture of experts. V2-Lite has no latent of the query.
    for (preset, profile, dense, mixture) in
        [("v3", "hopper", 8, 9), ("v3", "lavapipe", 8, 9), ("kimi-k2", "hopper", 8, 9), ("v2-lite", "hopper", 7, 8)]
    {
        let plan = plan(preset, profile);
        let program = decode(&plan);
        // Further shards of one weight are not counted.
        let whole = |layer: u32| {
            let steps = program.steps.iter().filter(|step| step.layer == Some(layer));
            let shards = steps.clone().filter(|step| step.params[0] > 0).count();
            dispatches(program, layer) - shards
        };
        assert_eq!((whole(0), whole(3)), (dense, mixture), "{preset} for {profile}");
    }
}
