//! Holds a plan against a device, before anything is uploaded.

use std::collections::BTreeSet;

use moewe_plan::{Buffer, DType, Dim, Plan, Precision, Program, ProgramKind, Role, Symbol, TapSpec};

use crate::error::kind_name;
use crate::{AdapterInfo, Error, Gpu, Result};

/// The first thing that the plan needs and the device lacks.
pub(crate) fn check_device(plan: &Plan, gpu: &Gpu) -> Result<()> {
    let info = gpu.info();
    let needs = &plan.requirements;
    // The profile's binding limit is a promise about the weights; what counts is what the largest shard needs.
    let largest_shard = plan
        .weights
        .iter()
        .filter_map(|weight| Some((weight.slice_bytes()?, &weight.shards)))
        .flat_map(|(slice, shards)| shards.iter().map(move |shard| shard.count.saturating_mul(slice)))
        .max()
        .unwrap_or(0);
    let limit = gpu.buffer_limit(wgpu::BufferUsages::STORAGE);
    // Kernels share rows among neighbours in a subgroup; a smaller one would give wrong sums, not an error.
    let subgroup = if info.subgroups { info.subgroup_size[0] } else { 0 };
    let checks: [(&'static str, u64, u64); 5] = [
        ("bytes in a binding", limit, largest_shard),
        ("storage buffers for a kernel", info.storage_buffers.into(), needs.storage_buffers.into()),
        ("invocations in a workgroup", info.workgroup_invocations.into(), needs.workgroup_invocations.into()),
        ("bytes of workgroup memory", info.workgroup_bytes.into(), needs.workgroup_bytes.into()),
        ("invocations in a subgroup", subgroup.into(), needs.subgroup_invocations.into()),
    ];
    for (what, found, required) in checks {
        if found < required {
            return Err(Error::Requirement {
                device: info.name.clone(),
                what,
                found,
                required,
                profile: needs.profile.clone(),
                remedy: remedy(info),
            });
        }
    }
    Ok(())
}

/// Rows and columns of the cooperative matrices that programs of this precision need, 0 if none, or that the device lacks them.
pub(crate) fn check_cooperative(plan: &Plan, precision: Precision, info: &AdapterInfo) -> Result<u32> {
    let needs = &plan.requirements;
    if precision != Precision::Fast || needs.cooperative == 0 {
        return Ok(0);
    }
    // Kernels have as many subgroups as a workgroup makes of this size.
    if info.cooperative.contains(&needs.cooperative) && info.subgroup_size == [needs.subgroup_invocations; 2] {
        return Ok(needs.cooperative);
    }
    let sizes: Vec<String> = info.cooperative.iter().map(|size| format!("{size}×{size}")).collect();
    let [least, most] = info.subgroup_size;
    Err(Error::Cooperative {
        device: info.name.clone(),
        found: if sizes.is_empty() { "none".into() } else { sizes.join(" and ") },
        subgroups: if least == most { least.to_string() } else { format!("{least} to {most}") },
        size: needs.cooperative,
        lanes: needs.subgroup_invocations,
        profile: needs.profile.clone(),
        remedy: remedy(info),
    })
}

/// A profile that a device like this one can surely run.
fn remedy(info: &AdapterInfo) -> &'static str {
    if info.name.contains("llvmpipe") {
        "lavapipe"
    } else if info.storage_buffers >= 16 && info.workgroup_invocations >= 256 {
        "generic-vulkan"
    } else {
        "webgpu"
    }
}

/// What the plan's own check leaves open: a runtime must know which buffer is meant, and what may be left out or
/// changed.
pub(crate) fn check_plan(plan: &Plan) -> Result<()> {
    let single = [
        Role::Header,
        Role::Tokens,
        Role::Rows,
        Role::PageTable,
        Role::Sampling,
        Role::Seen,
        Role::Mask,
        Role::Bias,
        Role::Finished,
        Role::Logprobs,
        Role::Groups,
        Role::Drafts,
        Role::Holes,
    ];
    for role in single {
        let names: Vec<&str> = plan.buffers.iter().filter(|b| b.role == role).map(|b| b.name.as_str()).collect();
        if names.len() > 1 {
            return Err(Error::Plan { what: format!("buffers {} share the role {role:?}", names.join(", ")) });
        }
    }
    check_parameters(plan)?;
    plan.programs.iter().try_for_each(check_taps)
}

/// Each parameter has a buffer of its own, and each such buffer a parameter.
fn check_parameters(plan: &Plan) -> Result<()> {
    let wrong = |what: String| Err(Error::Plan { what });
    let mut taken = BTreeSet::new();
    for parameter in &plan.parameters {
        let name = format!("parameter {:?} of layer {}", parameter.kind, parameter.layer);
        let Some(buffer) = plan.buffers.get(parameter.buffer as usize) else {
            return wrong(format!("{name} is in buffer {} of {}", parameter.buffer, plan.buffers.len()));
        };
        let Dim::Const(elements) = buffer.elements else {
            return wrong(format!("{name}: buffer {} has {} elements, not a constant", buffer.name, buffer.elements));
        };
        if buffer.role != Role::Parameter || buffer.dtype != DType::F32 || elements < parameter.len.into() {
            let Buffer { name: buffer, role, dtype, .. } = buffer;
            let found = format!("buffer {buffer} holds {elements} {dtype:?} as {role:?}");
            return wrong(format!("{name}: {found}, {} F32 as Parameter expected", parameter.len));
        }
        if !taken.insert(parameter.buffer) {
            return wrong(format!("{name}: buffer {} is another parameter's, too", buffer.name));
        }
    }
    let free = |index: usize, buffer: &Buffer| buffer.role == Role::Parameter && !taken.contains(&(index as u32));
    match plan.buffers.iter().enumerate().find(|(index, buffer)| free(*index, buffer)) {
        Some((_, buffer)) => wrong(format!("buffer {} has the role Parameter, no parameter is in it", buffer.name)),
        None => Ok(()),
    }
}

/// Steps serve taps that exist, and taps that are read while the program runs have a row for each token. Besides, a tap
/// may come once more for the wanted rows alone: it is read where these are all tokens.
fn check_taps(program: &Program) -> Result<()> {
    let wrong = |what: String| Err(Error::Plan { what });
    for step in &program.steps {
        if let Some(tap) = step.only_for.iter().find(|&&tap| tap as usize >= program.taps.len()) {
            return wrong(format!("step {} is only for tap {tap} of {}", step.label, program.taps.len()));
        }
    }
    let of_tokens = |tap: &TapSpec| tap.rows == Dim::Symbol(Symbol::Tokens);
    let same =
        |a: &TapSpec, b: &TapSpec| (&a.name, a.group, a.layer, a.columns) == (&b.name, b.group, b.layer, b.columns);
    let has_twin = |tap: &TapSpec| program.taps.iter().any(|other| of_tokens(other) && same(tap, other));
    let for_each_token = |tap: &TapSpec| match program.kind {
        ProgramKind::Watch => of_tokens(tap) || (tap.rows == Dim::Symbol(Symbol::Rows) && has_twin(tap)),
        // Behind a watched run a draft is asked for the logits of every token.
        ProgramKind::Draft { .. } => matches!(tap.rows, Dim::Symbol(Symbol::Tokens | Symbol::Rows)),
        ProgramKind::Forward | ProgramKind::Trace => true,
    };
    match program.taps.iter().find(|tap| !for_each_token(tap)) {
        Some(tap) => {
            let kind = kind_name(program.kind);
            wrong(format!("tap {} of the {kind} program has {} rows, one for each token expected", tap.name, tap.rows))
        }
        None => Ok(()),
    }
}
