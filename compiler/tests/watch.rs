//! Programs to watch: which there are, that they do what the forward programs do, what may be left out, and parameters.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_plan::{
    Access, Binding, Bundle, Dim, ParameterKind, Plan, Precision, Program, ProgramKind, Role, Step, Symbol, TapGroup,
    TapSpec, When,
};

fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(name)
}

/// The plan of a checkpoint for some taps, without weights.
fn plan(name: &str, profile: Profile, taps: &str) -> Plan {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let out = dir.path().join("bundle");
    let taps = taps.parse().expect("a choice of taps");
    let options =
        Options { profile, weights: None, reference: true, plan_only: true, latents: moewe_plan::Latent::F16, taps };
    let checkpoint = Checkpoint::open(&checkpoint(name)).expect("a checkpoint");
    compile(&checkpoint, &options, &out, &|_, _| ()).expect("it compiles");
    Bundle::open(&out).expect("a bundle").plan
}

fn lavapipe() -> Profile {
    Profile::load("lavapipe").expect("a built-in profile")
}

const MTP: &str = "golden/v3-tiny";
const NO_MTP: &str = "golden/v2-lite-tiny";

fn programs(plan: &Plan, kind: ProgramKind) -> Vec<&Program> {
    plan.programs.iter().filter(|program| program.kind == kind).collect()
}

/// A kernel's name without what a program to watch adds to it.
fn plain_kernel(plan: &Plan, step: &Step) -> String {
    plan.kernels[step.kernel as usize].name.replace(".edit", "").replace(".tapped", "")
}

#[test]
fn there_is_a_program_to_watch_for_each_forward_program() {
    let draft = ProgramKind::Draft { module: 1 };
    for (name, taps, drafts) in [(MTP, "all", 4), (NO_MTP, "routing", 0), (MTP, "none", 4), (MTP, "timing", 4)] {
        let plan = plan(name, lavapipe(), taps);
        let shape = |program: &&Program| (program.precision, program.max_tokens, program.max_rows);
        let forward: Vec<_> = programs(&plan, ProgramKind::Forward).iter().map(shape).collect();
        let watch: Vec<_> = programs(&plan, ProgramKind::Watch).iter().map(shape).collect();
        assert_eq!(forward.len(), 4);
        assert_eq!(watch, if taps == "none" { Vec::new() } else { forward }, "{name}, {taps}");
        assert_eq!(plan.parameters.is_empty(), taps == "none");
        let draft: Vec<_> = programs(&plan, draft).iter().map(shape).collect();
        assert_eq!(draft.len(), drafts);
        assert!(draft.iter().all(|&(_, tokens, rows)| tokens == rows && [4, 256].contains(&tokens)), "{draft:?}");
        assert_eq!(programs(&plan, ProgramKind::Trace).len(), 2);
        let tops = plan.kernels.iter().filter(|kernel| kernel.name.starts_with("top_tokens")).count();
        // One for log probabilities is always there.
        assert_eq!(tops, if taps == "all" { 4 } else { 1 }, "{taps}");
    }
}

/// With no taps wanted, what is dispatched is what the forward program dispatches, in its order, if drafts follow.
#[test]
fn without_taps_a_watched_run_is_a_forward_run() {
    for (name, taps) in [(MTP, "all"), (NO_MTP, "all"), (MTP, "timing"), (NO_MTP, "lens:1,attention:0,logits")] {
        let plan = plan(name, lavapipe(), taps);
        for (forward, watch) in programs(&plan, ProgramKind::Forward).iter().zip(programs(&plan, ProgramKind::Watch)) {
            assert!(forward.taps.is_empty() && forward.steps.iter().all(|step| step.only_for.is_empty()));
            let always = watch.steps.iter().filter(|step| step.only_for.is_empty());
            let always: Vec<&Step> = always.collect();
            let kept = forward.steps.iter().filter(|step| step.when == When::Drafting).map(|step| step.label.as_str());
            assert_eq!(kept.collect::<Vec<_>>(), if name == MTP { vec!["final_norm"] } else { Vec::new() });
            assert!(
                watch.steps.iter().all(|step| step.when != When::Drafting),
                "a watched run leaves out what drafts need"
            );
            for (watched, step) in always.iter().zip(&forward.steps) {
                assert_eq!(watched.label, step.label);
                assert_eq!(plain_kernel(&plan, watched), plain_kernel(&plan, step), "{}", step.label);
                let same = (&watched.grid, watched.params, watched.cost, watched.layer);
                assert_eq!(same, (&step.grid, step.params, step.cost, step.layer), "{}", step.label);
            }
            assert_eq!(always.len(), forward.steps.len());
            let position = |label: &str| watch.steps.iter().position(|step| step.label == label).expect("a step");
            let taps_only = |step: &Step| !step.only_for.is_empty();
            let first = watch.steps.iter().position(taps_only).unwrap_or_else(|| position("accept"));
            assert!(first > position("sample") && position("accept") + 1 == watch.steps.len());
        }
    }
}

/// The last step before `at` that writes a buffer.
fn writer(plan: &Plan, steps: &[Step], at: usize, buffer: u32) -> Option<usize> {
    let writes = |step: &Step| {
        let layouts = &plan.kernels[step.kernel as usize].bindings;
        let mut bound = step.bindings.iter().zip(layouts);
        bound.any(|(binding, layout)| *binding == Binding::Buffer(buffer) && layout.access == Access::ReadWrite)
    };
    (0..at).rev().find(|&step| writes(&steps[step]))
}

/// The steps that a buffer's contents before step `at` come from.
fn sources(plan: &Plan, steps: &[Step], at: usize, buffer: u32, found: &mut BTreeSet<usize>) {
    let Some(step) = writer(plan, steps, at, buffer) else { return };
    if !found.insert(step) {
        return;
    }
    for (binding, layout) in steps[step].bindings.iter().zip(&plan.kernels[steps[step].kernel as usize].bindings) {
        // Where weights are not sharded, no kernel reads what it writes.
        if let (Binding::Buffer(input), Access::Read) = (binding, layout.access) {
            sources(plan, steps, step, *input, found);
        }
    }
}

/// Whatever taps are wanted, every step that they come from runs and finds what it would find if all ran; and a step that is
/// only for taps is a source of each of them.
#[test]
fn steps_are_left_out_where_no_tap_needs_them() {
    let mut optional = 0;
    for (name, taps) in [(MTP, "all"), (NO_MTP, "all"), (NO_MTP, "lens,hidden:1"), (MTP, "lens")] {
        let plan = plan(name, lavapipe(), taps);
        let kinds = [ProgramKind::Watch, ProgramKind::Draft { module: 1 }];
        for program in plan.programs.iter().filter(|program| kinds.contains(&program.kind)) {
            let steps = &program.steps;
            let mut serves: BTreeMap<usize, BTreeSet<u32>> = BTreeMap::new();
            for (index, tap) in (0..).zip(&program.taps) {
                let mut found = BTreeSet::new();
                sources(&plan, steps, steps.len(), tap.buffer, &mut found);
                assert!(!found.is_empty(), "nothing writes {}", tap.name);
                for step in found {
                    serves.entry(step).or_default().insert(index);
                    let only_for = &steps[step].only_for;
                    assert!(
                        only_for.is_empty() || only_for.contains(&index),
                        "{} needs {}",
                        tap.name,
                        steps[step].label
                    );
                }
            }
            for (index, step) in steps.iter().enumerate().filter(|(_, step)| !step.only_for.is_empty()) {
                let expected: Vec<u32> = serves[&index].iter().copied().collect();
                assert_eq!(step.only_for, expected, "{:?} {}", program.kind, step.label);
                optional += 1;
            }
            // What always runs never reads what may have been left out.
            for (at, step) in steps.iter().enumerate().filter(|(_, step)| step.only_for.is_empty()) {
                for (binding, layout) in step.bindings.iter().zip(&plan.kernels[step.kernel as usize].bindings) {
                    if let (Binding::Buffer(buffer), Access::Read) = (binding, layout.access) {
                        let from = writer(&plan, steps, at, *buffer);
                        assert!(from.is_none_or(|from| steps[from].only_for.is_empty()), "{} reads", step.label);
                    }
                }
            }
        }
    }
    assert!(optional > 100, "only {optional} steps");
}

fn names(program: &Program, group: TapGroup) -> Vec<(&str, Option<u32>, u32, &Dim)> {
    let taps = program.taps.iter().filter(|tap| tap.group == group);
    taps.map(|tap| (tap.name.as_str(), tap.layer, tap.columns, &tap.rows)).collect()
}

#[test]
fn taps_are_those_that_were_chosen() {
    let plan = plan(MTP, lavapipe(), "routing:2,latents,attention:1,logits,lens:3,mtp");
    let tokens = &Dim::Symbol(Symbol::Tokens);
    for watch in programs(&plan, ProgramKind::Watch) {
        let routing = [("moe.2.ids", Some(2), 4, tokens), ("moe.2.weights", Some(2), 4, tokens)];
        assert_eq!(names(watch, TapGroup::Routing), routing);
        assert_eq!(names(watch, TapGroup::Latents).len(), 2 * 4);
        assert_eq!(names(watch, TapGroup::Latents)[5], ("mla.2.k_rope", Some(2), 16, tokens));
        assert_eq!(names(watch, TapGroup::Attention), [("mla.1.query", Some(1), 4 * 40, tokens)]);
        let told = |name: &str| ["ids", "probs", "stats"].map(|part| format!("{name}.{part}"));
        let found = |group| names(watch, group).iter().map(|tap| tap.0.to_owned()).collect::<Vec<_>>();
        // Of the wanted rows, whose logits are there anyway, and of every token.
        assert_eq!(found(TapGroup::Logits), [told("logits"), told("logits")].concat());
        let rows: Vec<&Dim> = names(watch, TapGroup::Logits).iter().map(|tap| tap.3).collect();
        assert_eq!(rows, [[&Dim::Symbol(Symbol::Rows); 3], [tokens; 3]].concat());
        assert_eq!(found(TapGroup::Lens), told("lens.3"));
        assert!(names(watch, TapGroup::Lens).iter().all(|tap| tap.1 == Some(3)));
        assert!(
            [TapGroup::Scores, TapGroup::Hidden, TapGroup::Mtp].iter().all(|&group| names(watch, group).is_empty())
        );
    }
    // Traces and drafts have theirs whatever was chosen; the likeliest tokens of a draft are a choice.
    let trace = programs(&plan, ProgramKind::Trace)[0];
    assert_eq!(names(trace, TapGroup::Hidden).len(), 4 + 2);
    assert_eq!(names(trace, TapGroup::Hidden)[1].1, Some(0));
    assert!(trace.steps.iter().all(|step| step.only_for.is_empty()));
    let drafted = |plan: &Plan| {
        let draft = programs(plan, ProgramKind::Draft { module: 1 })[0];
        assert!(draft.taps.iter().all(|tap| tap.layer == Some(4)));
        [TapGroup::Hidden, TapGroup::Logits, TapGroup::Mtp]
            .map(|group| names(draft, group).iter().map(|tap| tap.0.to_owned()).collect::<Vec<_>>())
    };
    // What is large is of groups of its own, so that whoever watches drafts need not read it.
    assert_eq!(drafted(&plan).concat(), ["mtp.1.hidden", "mtp.1.logits", "mtp.1.ids", "mtp.1.probs"]);
    assert_eq!(drafted(&plan)[2], ["mtp.1.ids", "mtp.1.probs"]);
    assert_eq!(drafted(&self::plan(MTP, lavapipe(), "none")).concat(), ["mtp.1.hidden", "mtp.1.logits"]);
}

/// Where all tokens are wanted rows, no head runs but the one that sampling needs; for the lens of the last layer none runs
/// but the one of the predictions, whose logits these are.
#[test]
fn heads_run_no_more_often_than_they_must() {
    let plan = plan(MTP, lavapipe(), "logits,lens");
    for watch in programs(&plan, ProgramKind::Watch) {
        let heads = |rows: Symbol, groups: &[TapGroup]| -> Vec<&str> {
            let read = |tap: &TapSpec| {
                let twin = watch.taps.iter().any(|other| other.name == tap.name && other.rows != tap.rows);
                groups.contains(&tap.group) && (!twin || tap.rows == Dim::Symbol(rows))
            };
            let runs = |step: &&Step| {
                step.only_for.is_empty() || step.only_for.iter().any(|&tap| read(&watch.taps[tap as usize]))
            };
            let labels = watch.steps.iter().filter(runs).map(|step| step.label.as_str());
            labels.filter(|label| label.ends_with("head") || label.ends_with("top_tokens")).collect()
        };
        let (logits, both) = ([TapGroup::Logits], [TapGroup::Logits, TapGroup::Lens]);
        assert_eq!(heads(Symbol::Rows, &logits), ["head", "row_top_tokens"]);
        assert_eq!(heads(Symbol::Tokens, &logits), ["head", "top_head", "top_tokens"]);
        let lens = ["layers.2.lens_head", "layers.1.lens_head", "layers.0.lens_head"];
        assert_eq!(heads(Symbol::Tokens, &both), [&["head", "top_head", "top_tokens"], &lens[..]].concat());
        let all = [&["head", "row_top_tokens", "top_head", "top_tokens"], &lens[..]].concat();
        assert_eq!(heads(Symbol::Rows, &both), all);
    }
}

#[test]
fn parameters_are_read_by_programs_to_watch_alone() {
    let plan = plan(MTP, lavapipe(), "routing");
    let model = &plan.model;
    let mut expected = Vec::new();
    for layer in 0..4 {
        expected.extend([(ParameterKind::LatentScale, layer, 24), (ParameterKind::HeadScale, layer, 4)]);
        if model.moe_layers.contains(&layer) {
            expected.extend([(ParameterKind::ExpertOffset, layer, 16), (ParameterKind::ExpertScale, layer, 16)]);
        }
    }
    let found: Vec<_> = plan.parameters.iter().map(|p| (p.kind, p.layer, p.len)).collect();
    assert_eq!(found, expected);
    let facts = [model.num_experts_per_tok, model.n_group, model.topk_group, model.n_shared_experts];
    assert_eq!((facts, model.softmax_scale > 0.0), ([4, 4, 2, 1], true));
    for program in &plan.programs {
        let buffers = program.steps.iter().flat_map(|step| &step.bindings).filter_map(|binding| match binding {
            Binding::Buffer(buffer) => Some(*buffer),
            _ => None,
        });
        let read: BTreeSet<u32> =
            buffers.filter(|&buffer| plan.buffers[buffer as usize].role == Role::Parameter).collect();
        let all: BTreeSet<u32> = plan.parameters.iter().map(|parameter| parameter.buffer).collect();
        assert_eq!(read, if program.kind == ProgramKind::Watch { all } else { BTreeSet::new() });
        let edited = |step: &&Step| plan.kernels[step.kernel as usize].name.contains(".edit");
        let edits = program.steps.iter().filter(edited).count();
        assert_eq!(edits, if program.kind == ProgramKind::Watch { 4 + 4 + 3 } else { 0 });
    }
}

/// Logits of every token fill a binding long before activations do: only the programs that have them take fewer tokens.
#[test]
fn logits_of_all_tokens_do_not_shrink_other_programs() {
    let profile = Profile { max_binding_bytes: 50 * 1024, ..lavapipe() };
    let tokens = |taps: &str, kind| -> Vec<u32> {
        let plan = plan(NO_MTP, profile.clone(), taps);
        let exact = programs(&plan, kind).into_iter().filter(|program| program.precision == Precision::Exact);
        exact.map(|program| program.max_tokens).collect()
    };
    let plain = tokens("none", ProgramKind::Forward);
    assert_eq!(tokens("all", ProgramKind::Forward), plain);
    let watched = tokens("lens", ProgramKind::Watch);
    assert!(watched[0] == 4 && watched[1] < plain[1], "{watched:?}, {plain:?}");
}
