//! Checks of a plan before anything is allocated or uploaded. A plan is hostile until it has passed.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use crate::types::{Access, Binding, DType, Indirect, ParameterKind, Plan, ProgramKind, Role, SCALE_GROUP, Step, When};
use crate::{Dim, FORMAT_VERSION};

/// No index, size or grid of a sound plan comes near this; larger values would overflow sums.
const ABSURD: u64 = 1 << 48;
/// More experts, heads or numbers of a latent than any model has: hosts allocate that many numbers unasked.
const MANY: u32 = 1 << 20;

/// The first thing that is wrong with `plan`, in words.
pub fn verify(plan: &Plan) -> Result<(), String> {
    ensure(plan.format_version == FORMAT_VERSION, || format!("format_version {}", plan.format_version))?;
    ensure(plan.model.vocab_size > 0, || "model.vocab_size is 0".into())?;
    ensure(plan.model.max_context > 0, || "model.max_context is 0".into())?;
    let modules = plan.model.mtp_modules;
    ensure(modules as usize <= plan.programs.len(), || format!("model.mtp_modules is {modules}, without programs"))?;
    let matrices = plan.requirements.cooperative;
    ensure([0, 8, 16].contains(&matrices), || format!("requirements.cooperative is {matrices}"))?;
    let model = &plan.model;
    ensure(model.experts < MANY, || format!("model.experts is {}", model.experts))?;
    if model.experts > 0 {
        ensure((1..=model.experts).contains(&model.num_experts_per_tok), || {
            format!("model.num_experts_per_tok is {} of {} experts", model.num_experts_per_tok, model.experts)
        })?;
        ensure(
            (1..=model.experts).contains(&model.n_group) && (1..=model.n_group).contains(&model.topk_group),
            || {
                format!(
                    "model.topk_group is {} of {} groups of {} experts",
                    model.topk_group, model.n_group, model.experts
                )
            },
        )?;
    }
    for file in &plan.files {
        let path = Path::new(&file.path);
        let sound = if file.referenced { path.is_absolute() } else { is_plain_name(path) };
        ensure(sound, || format!("weight file path {:?}", file.path))?;
        ensure(file.bytes < ABSURD, || format!("weight file {:?} of {} bytes", file.path, file.bytes))?;
    }
    verify_weights(plan)?;
    for buffer in &plan.buffers {
        let at = || format!("buffer {}", buffer.name);
        verify_dim(&buffer.elements).map_err(|what| format!("{}: {what}", at()))?;
        ensure(buffer.elements != Dim::Const(0), || format!("{} is empty", at()))?;
    }
    for kernel in &plan.kernels {
        let at = || format!("kernel {}", kernel.name);
        let path = Path::new(&kernel.file);
        let sound =
            path.parent() == Some(Path::new("kernels")) && path.components().all(|c| matches!(c, Component::Normal(_)));
        ensure(sound, || format!("{}: file {:?} is not in kernels/", at(), kernel.file))?;
        let invocations = kernel.workgroup_size.iter().try_fold(1u32, |all, &size| all.checked_mul(size));
        ensure(invocations.is_some_and(|n| (1..=1024).contains(&n)), || {
            format!("{}: workgroup size {:?}", at(), kernel.workgroup_size)
        })?;
    }
    verify_parameters(plan)?;
    verify_programs(plan)
}

/// Whether the model has a layer, modules of multi-token prediction counted.
fn has_layer(plan: &Plan, layer: u32) -> bool {
    u64::from(layer) < u64::from(plan.model.layers) + u64::from(plan.model.mtp_modules)
}

fn verify_parameters(plan: &Plan) -> Result<(), String> {
    let mut seen: BTreeSet<(ParameterKind, u32)> = BTreeSet::new();
    let mut buffers: BTreeSet<u32> = BTreeSet::new();
    for parameter in &plan.parameters {
        let at = || format!("parameter {:?} of layer {}", parameter.kind, parameter.layer);
        ensure(has_layer(plan, parameter.layer), || format!("{}: there is no such layer", at()))?;
        ensure(seen.insert((parameter.kind, parameter.layer)), || format!("{} is there twice", at()))?;
        ensure((1..MANY).contains(&parameter.len), || format!("{} has {} numbers", at(), parameter.len))?;
        let buffer = plan.buffers.get(parameter.buffer as usize);
        let buffer = buffer.ok_or_else(|| format!("{}: there is no buffer {}", at(), parameter.buffer))?;
        ensure(buffer.role == Role::Parameter && buffer.dtype == DType::F32, || {
            format!("{}: buffer {} is no parameter of f32", at(), buffer.name)
        })?;
        ensure(matches!(buffer.elements, Dim::Const(n) if n >= parameter.len.into()), || {
            format!("{}: buffer {} does not have {} elements", at(), buffer.name, parameter.len)
        })?;
        ensure(buffers.insert(parameter.buffer), || format!("{}: buffer {} has two", at(), buffer.name))?;
    }
    Ok(())
}

fn verify_weights(plan: &Plan) -> Result<(), String> {
    for weight in &plan.weights {
        let at = || format!("weight {}", weight.name);
        let slice = weight.slice_bytes().filter(|&bytes| bytes > 0 && bytes < ABSURD);
        let slice = slice.ok_or_else(|| format!("{} has shape {:?}", at(), weight.shape))?;
        let has_groups = weight.shape.last().is_some_and(|columns| columns.is_multiple_of(SCALE_GROUP));
        ensure(!weight.format.is_grouped() || has_groups, || {
            format!("{}: rows of {:?} do not divide into groups of {SCALE_GROUP}", at(), weight.shape)
        })?;
        let mut next = 0;
        for shard in &weight.shards {
            let bytes = shard.segments.iter().try_fold(0u64, |sum, segment| sum.checked_add(segment.bytes));
            ensure(shard.first == next && shard.count > 0, || format!("{}: shards are not consecutive", at()))?;
            next = shard.first.checked_add(shard.count).ok_or_else(|| format!("{}: shard count", at()))?;
            // A plan compiled without weights has shards without segments.
            let expected = shard.count.checked_mul(slice);
            ensure(shard.segments.is_empty() || (bytes.is_some() && bytes == expected), || {
                format!("{}: a shard of {bytes:?} bytes, {expected:?} expected", at())
            })?;
            ensure(expected.is_some_and(|n| n <= plan.requirements.max_binding_bytes), || {
                format!("{}: a shard is larger than requirements.max_binding_bytes", at())
            })?;
            for segment in &shard.segments {
                let file = plan.files.get(segment.file as usize);
                let end = segment.offset.checked_add(segment.bytes);
                ensure(file.is_some_and(|f| end.is_some_and(|end| end <= f.bytes)), || {
                    format!("{}: a segment lies outside its file", at())
                })?;
            }
        }
        ensure(next == weight.shape[0], || format!("{}: shards cover {next} of {}", at(), weight.shape[0]))?;
    }
    Ok(())
}

fn verify_programs(plan: &Plan) -> Result<(), String> {
    for program in &plan.programs {
        let at = || format!("program {:?} {}", program.kind, program.precision.name());
        ensure(program.max_tokens > 0 && program.max_rows > 0, || format!("{}: no capacity", at()))?;
        if let ProgramKind::Draft { module } = program.kind {
            let modules = plan.model.mtp_modules;
            ensure((1..=modules).contains(&module), || format!("{}: the model has {modules} modules", at()))?;
        }
        for step in &program.steps {
            let at = || format!("{}, step {}", at(), step.label);
            let kernel = plan.kernels.get(step.kernel as usize).ok_or_else(|| format!("{}: no such kernel", at()))?;
            ensure(kernel.bindings.len() == step.bindings.len(), || {
                format!(
                    "{}: {} bindings, kernel {} has {}",
                    at(),
                    step.bindings.len(),
                    kernel.name,
                    kernel.bindings.len()
                )
            })?;
            for (binding, layout) in step.bindings.iter().zip(&kernel.bindings) {
                let sound = match *binding {
                    Binding::Weight { weight, shard } => {
                        layout.access == Access::Read
                            && plan.weights.get(weight as usize).is_some_and(|w| (shard as usize) < w.shards.len())
                    }
                    Binding::Buffer(buffer) => plan
                        .buffers
                        .get(buffer as usize)
                        .is_some_and(|b| (b.role == Role::Header) == (layout.access == Access::Uniform)),
                    Binding::Params => layout.access == Access::Uniform,
                };
                ensure(sound, || format!("{}: binding {} does not fit", at(), layout.name))?;
            }
            let taps = program.taps.len();
            let stray = step.only_for.iter().find(|&&tap| tap as usize >= taps);
            ensure(stray.is_none(), || format!("{}: only for tap {} of {taps}", at(), stray.unwrap_or(&0)))?;
            let (fits, purpose) = match step.when {
                When::Always => (true, ""),
                When::Drafting => {
                    (matches!(program.kind, ProgramKind::Forward | ProgramKind::Draft { .. }), "drafting")
                }
                When::Logprobs => {
                    (matches!(program.kind, ProgramKind::Forward | ProgramKind::Watch), "log probabilities")
                }
            };
            ensure(fits, || format!("{}: {purpose}", at()))?;
            ensure(step.when == When::Always || step.only_for.is_empty(), || {
                format!("{}: for {purpose} and for taps", at())
            })?;
            if let Some(indirect) = &step.indirect {
                verify_indirect(plan, step, indirect).map_err(|what| format!("{}: indirect grid: {what}", at()))?;
            }
            for dim in &step.grid {
                verify_dim(dim).map_err(|what| format!("{}: grid: {what}", at()))?;
            }
        }
        for tap in &program.taps {
            let sound = plan.buffers.get(tap.buffer as usize).is_some()
                && tap.offset.checked_add(tap.columns).is_some_and(|end| end <= tap.stride)
                && tap.columns > 0;
            ensure(sound, || format!("{}: tap {} does not fit its buffer", at(), tap.name))?;
            ensure(tap.layer.is_none_or(|layer| has_layer(plan, layer)), || {
                format!("{}: tap {} is of a layer that the model does not have", at(), tap.name)
            })?;
        }
    }
    Ok(())
}

/// The words must be there, and the step itself must not change them.
fn verify_indirect(plan: &Plan, step: &Step, indirect: &Indirect) -> Result<(), String> {
    let buffer = plan.buffers.get(indirect.buffer as usize);
    let buffer = buffer.ok_or_else(|| format!("there is no buffer {}", indirect.buffer))?;
    ensure(buffer.role == Role::Scratch && buffer.dtype == DType::U32, || {
        format!("buffer {} holds {:?} as {:?}, U32 as Scratch expected", buffer.name, buffer.dtype, buffer.role)
    })?;
    let end = indirect.word.checked_add(3);
    ensure(matches!((&buffer.elements, end), (Dim::Const(n), Some(end)) if end <= *n), || {
        format!("words {} … of buffer {} with {} elements", indirect.word, buffer.name, buffer.elements)
    })?;
    let kernel = &plan.kernels[step.kernel as usize];
    let changes =
        step.bindings.iter().zip(&kernel.bindings).any(|(binding, layout)| {
            *binding == Binding::Buffer(indirect.buffer) && layout.access == Access::ReadWrite
        });
    ensure(!changes, || format!("the step writes to buffer {}", buffer.name))
}

fn verify_dim(dim: &Dim) -> Result<(), String> {
    let factor = match *dim {
        Dim::Const(n) | Dim::Times(_, n) => n,
        Dim::CeilDiv(_, n) => {
            ensure(n > 0, || "division by 0".into())?;
            n
        }
        Dim::Tiles { each, size, groups, .. } => {
            ensure(size > 0, || "tiles of 0".into())?;
            each.max(size).max(groups)
        }
        Dim::Symbol(_) => 1,
    };
    ensure(factor < ABSURD, || format!("{factor} is absurd"))
}

/// Whether `path` is one plain file name.
pub(crate) fn is_plain_name(path: &Path) -> bool {
    let mut components = path.components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

fn ensure(sound: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if sound { Ok(()) } else { Err(what()) }
}
