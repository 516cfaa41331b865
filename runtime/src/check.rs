//! Holds a plan against a device, before anything is uploaded.

use moewe_plan::{Plan, Role};

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

/// What the plan's own check leaves open: a runtime must know which buffer is meant.
pub(crate) fn check_plan(plan: &Plan) -> Result<()> {
    for role in [Role::Header, Role::Tokens, Role::Rows, Role::PageTable, Role::Sampling, Role::Seen, Role::Finished] {
        let names: Vec<&str> = plan.buffers.iter().filter(|b| b.role == role).map(|b| b.name.as_str()).collect();
        if names.len() > 1 {
            return Err(Error::Plan { what: format!("buffers {} share the role {role:?}", names.join(", ")) });
        }
    }
    Ok(())
}
