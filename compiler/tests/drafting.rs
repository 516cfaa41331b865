//! Steps that serve drafting alone: which there are, and that programs without them are what they would be if no module
//! could draft.

use std::collections::BTreeSet;
use std::path::Path;

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_plan::{Access, Binding, Bundle, Dim, Plan, Program, ProgramKind, Role, Step, Symbol, When};

/// The plan of v3-tiny with this many modules of multi-token prediction, without weights.
fn plan(modules: usize) -> Plan {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-tiny/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    config["num_nextn_predict_layers"] = modules.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let out = dir.path().join("bundle");
    let profile = Profile::load("lavapipe").expect("a built-in profile");
    let taps = "all".parse().expect("a choice of taps");
    let options =
        Options { profile, weights: None, reference: true, plan_only: true, latents: moewe_plan::Latent::F16, taps };
    let checkpoint = Checkpoint::open(dir.path()).expect("a checkpoint");
    compile(&checkpoint, &options, &out, &|_, _| ()).expect("it compiles");
    Bundle::open(&out).expect("a bundle").plan
}

fn programs(plan: &Plan, kind: ProgramKind) -> Vec<&Program> {
    plan.programs.iter().filter(|program| program.kind == kind).collect()
}

fn labels(program: &Program, when: When) -> Vec<&str> {
    program.steps.iter().filter(|step| step.when == when).map(|step| step.label.as_str()).collect()
}

/// What a step does, without indices that depend on the rest of the plan.
fn text(plan: &Plan, step: &Step) -> String {
    // A kernel's constant, and its only difference between models with and without modules.
    let kernel = &plan.kernels[step.kernel as usize];
    let name: Vec<&str> = kernel.name.split('_').filter(|part| !part.starts_with("modules")).collect();
    let bound = step.bindings.iter().map(|binding| match *binding {
        Binding::Weight { weight, shard } => format!("{}/{shard}", plan.weights[weight as usize].name),
        Binding::Buffer(buffer) => format!("{:?}", plan.buffers[buffer as usize].role),
        Binding::Params => "params".into(),
    });
    let bound: Vec<String> = bound.collect();
    format!("{} {} {bound:?} {:?} {:?}", step.label, name.join("_"), step.grid, step.params)
}

/// Buffers that a step may write, or only read.
fn bound(plan: &Plan, step: &Step, access: Access) -> BTreeSet<u32> {
    let layouts = &plan.kernels[step.kernel as usize].bindings;
    let bound = step.bindings.iter().zip(layouts).filter(|(_, layout)| layout.access == access);
    bound.filter_map(|(binding, _)| if let Binding::Buffer(buffer) = binding { Some(*buffer) } else { None }).collect()
}

#[test]
fn forward_programs_only_keep_hidden_rows_for_drafts() {
    let without = plan(0);
    assert!(without.programs.iter().flat_map(|program| &program.steps).all(|step| step.when != When::Drafting));
    for modules in [1, 2, 9] {
        let plan = plan(modules);
        let pairs = programs(&plan, ProgramKind::Forward).into_iter().zip(programs(&without, ProgramKind::Forward));
        for (program, plain) in pairs {
            assert_eq!(labels(program, When::Drafting), ["final_norm"]);
            let rest: Vec<String> =
                program.steps.iter().filter(|step| step.when != When::Drafting).map(|step| text(&plan, step)).collect();
            assert_eq!(rest, plain.steps.iter().map(|step| text(&without, step)).collect::<Vec<_>>());
            assert_eq!(program.steps.last().map(|step| step.label.as_str()), Some("accept"));
        }
        for program in &plan.programs {
            if matches!(program.kind, ProgramKind::Watch | ProgramKind::Trace) {
                assert_eq!(labels(program, When::Drafting), [""; 0]);
                assert!(labels(program, When::Always).contains(&"final_norm"));
            }
        }
    }
}

/// Log probabilities are noted behind the sampler, before the next batch is made, and nothing else is there for them.
#[test]
fn log_probabilities_are_a_step_of_their_own() {
    for modules in [0, 1] {
        let plan = plan(modules);
        for program in &plan.programs {
            let samples = matches!(program.kind, ProgramKind::Forward | ProgramKind::Watch);
            let expected = if samples { vec!["logprobs"] } else { Vec::new() };
            assert_eq!(labels(program, When::Logprobs), expected, "{:?}", program.kind);
            if samples {
                let place = |label: &str| program.steps.iter().position(|step| step.label == label).expect("a step");
                assert!(place("sample") < place("logprobs") && place("logprobs") < place("accept"));
            }
        }
    }
}

/// The modules that can draft end with a sampler; the last of them leaves its wanted rows where it reads hidden rows.
#[test]
fn modules_sample_and_propose() {
    for modules in [1, 2, 3, 9] {
        let plan = plan(modules);
        let drafters = modules.min(8);
        for module in 1..=modules {
            let drafts = programs(&plan, ProgramKind::Draft { module: module as u32 });
            assert_eq!(drafts.len(), 4);
            for draft in drafts {
                let layer = 4 + module - 1;
                let name = |part: &str| format!("layers.{layer}.{part}");
                let (sample, propose) = (name("sample"), name("propose"));
                let expected = if module <= drafters { vec![sample.as_str(), propose.as_str()] } else { Vec::new() };
                assert_eq!(labels(draft, When::Drafting), expected, "module {module} of {modules}");
                assert!(draft.steps.iter().rev().zip(expected.iter().rev()).all(|(step, label)| step.label == *label));
                assert!(
                    draft
                        .steps
                        .iter()
                        .all(|step| step.when != When::Drafting || step.grid[0] != Dim::Symbol(Symbol::Tokens))
                );
                // States as they are read and written: (by which step, name).
                let states = |access| -> BTreeSet<(String, String)> {
                    let of = |step| bound(&plan, step, access).into_iter().map(move |buffer| (step, buffer));
                    let all = draft.steps.iter().flat_map(of);
                    let states = all.filter(|(_, buffer)| plan.buffers[*buffer as usize].role == Role::State);
                    states.map(|(step, b)| (step.label.clone(), plan.buffers[b as usize].name.clone())).collect()
                };
                let carried = if module == 1 { "state.hidden".into() } else { format!("state.hidden.{}", module - 1) };
                let mut written = BTreeSet::new();
                if module < modules {
                    written.insert((name("shared_head_norm"), format!("state.hidden.{module}")));
                }
                let mut read = BTreeSet::from([(name("join"), carried.clone())]);
                if module == drafters {
                    written.insert((name("wanted_rows"), carried.clone()));
                    read.insert((name("head"), carried.clone()));
                }
                if module < modules {
                    read.insert((name("wanted_rows"), format!("state.hidden.{module}")));
                }
                assert_eq!(states(Access::ReadWrite), written, "module {module} of {modules}");
                assert_eq!(states(Access::Read), read, "module {module} of {modules}");
                // A module's attention skips holes.
                let attention = draft.steps.iter().find(|step| step.label == name("attention")).unwrap();
                let roles = bound(&plan, attention, Access::Read).into_iter().map(|b| plan.buffers[b as usize].role);
                assert!(roles.collect::<Vec<_>>().contains(&Role::Holes));
            }
        }
        for buffer in plan.buffers.iter().filter(|buffer| buffer.role == Role::State) {
            assert_eq!(buffer.elements, Dim::Times(Symbol::Tokens, 64), "{}", buffer.name);
        }
        let proposing: Vec<&str> = plan
            .kernels
            .iter()
            .map(|kernel| kernel.name.as_str())
            .filter(|name| name.starts_with("accept") || name.starts_with("propose"))
            .collect();
        let constants = [format!("modules{drafters}_"), "_wg64".into()];
        assert_eq!(proposing.len(), 2, "{proposing:?}");
        assert!(proposing.iter().all(|name| constants.iter().all(|part| name.contains(part))), "{proposing:?}");
    }
}

/// Where drafting steps are left out, the rest finds what it would find if all ran: apart from states and the batch, nothing
/// that they write is read before it is written again.
#[test]
fn nothing_else_reads_what_drafting_steps_write() {
    let plan = plan(2);
    let mut looked_at = 0;
    for program in &plan.programs {
        for (index, step) in program.steps.iter().enumerate().filter(|(_, step)| step.when == When::Drafting) {
            for buffer in bound(&plan, step, Access::ReadWrite) {
                if plan.buffers[buffer as usize].role != Role::Scratch {
                    continue;
                }
                for later in &program.steps[index + 1..] {
                    let reads = bound(&plan, later, Access::Read).contains(&buffer);
                    assert!(!reads || later.when == When::Drafting, "{} reads what {} wrote", later.label, step.label);
                    if bound(&plan, later, Access::ReadWrite).contains(&buffer) {
                        break;
                    }
                }
                looked_at += 1;
            }
        }
    }
    assert_eq!(looked_at, 2 * 4, "the samplers of both modules");
}

#[test]
fn buffers_of_a_batch_have_their_sizes() {
    let plan = plan(1);
    let of = |role| {
        let mut buffers = plan.buffers.iter().filter(|buffer| buffer.role == role);
        let buffer = buffers.next().unwrap_or_else(|| panic!("no {role:?}"));
        assert!(buffers.next().is_none(), "two buffers of {role:?}");
        buffer.elements.clone()
    };
    assert_eq!(of(Role::Header), Dim::Const(8));
    assert_eq!(of(Role::Groups), Dim::Const(64 * 8));
    assert_eq!(of(Role::Drafts), Dim::Const(64 * 16));
    assert_eq!(of(Role::Holes), Dim::Times(Symbol::Sequences, 2));
    assert_eq!(of(Role::Finished), Dim::Const(1 + 32 * 64));
    assert_eq!(of(Role::Logprobs), Dim::Const(32 * 64 * 42));
    // The vocabulary has 320 tokens.
    assert_eq!(of(Role::Mask), Dim::Times(Symbol::Sequences, 10));
    assert_eq!(of(Role::Bias), Dim::Times(Symbol::Sequences, 320));
}
