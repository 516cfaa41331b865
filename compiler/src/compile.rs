//! From a checkpoint to a bundle: all stages in order.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use moewe_plan::{
    Binding, Dim, FORMAT_VERSION, Latent, ModelInfo, Plan, Precision, Program, ProgramKind, Requirements, Role,
    Staging, Symbol, TapChoice, WeightFormat,
};

use crate::checkpoint::Checkpoint;
use crate::config::{Config, Family};
use crate::error::{Error, Result};
use crate::lower::{Kernels, Shared, lower};
use crate::memory::Buffers;
use crate::model::{self, Target};
use crate::pack::Packer;
use crate::passes;
use crate::profile::{Profile, Tuned};
use crate::select::{FEW_TOKENS, MAX_ROWS, Selector};
use crate::write::{Progress, Warnings, write_weights};

/// No batch is larger, so that activations stay small beside the weights.
const MAX_TOKENS: u64 = 256;
/// Workgroups that a dispatch may have in a dimension, on any device.
const MAX_GRID: u64 = 65535;

/// Files of a checkpoint that a bundle carries along: what is needed to turn text into tokens and back.
pub const COMPANIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// How a checkpoint is compiled.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device.
    pub profile: Profile,
    /// Format that linears and embeddings are converted to; `None` keeps them as stored.
    pub weights: Option<WeightFormat>,
    /// Refer to the checkpoint's files instead of copying tensors that serve as they are.
    pub reference: bool,
    /// Make the plan and the kernels, but no weights.
    pub plan_only: bool,
    /// Format of the latent cache where it need not be exact.
    pub latents: Latent,
    /// What can be watched while text is generated. If it is nothing, there are no programs to watch and no parameters.
    pub taps: TapChoice,
}

/// A plan with its kernels, before weights are written.
#[derive(Debug)]
struct Planned<'a> {
    plan: Plan,
    packer: Packer<'a>,
    kernels: Kernels,
}

/// Compiles a checkpoint into a bundle at `output`. Returns warnings.
///
/// # Errors
/// A checkpoint that does not hold what its configuration says, an output that cannot be written, or a target whose
/// limits are too small for the model. Nothing stays behind at `output` then.
pub fn compile(checkpoint: &Checkpoint, options: &Options, output: &Path, progress: Progress) -> Result<Warnings> {
    compile_until(checkpoint, options, output, progress, &AtomicBool::new(false))
}

/// Like [`compile`], and stops soon after `stop` is set from elsewhere.
///
/// # Errors
/// As [`compile`], and [`Error::Interrupted`].
pub fn compile_until(
    checkpoint: &Checkpoint,
    options: &Options,
    output: &Path,
    progress: Progress,
    stop: &AtomicBool,
) -> Result<Warnings> {
    if !options.plan_only {
        if !checkpoint.has_weights() {
            return Err(Error::NoWeights { path: checkpoint.dir().into() });
        }
        crate::tensors::check(checkpoint)?;
    }
    let Planned { mut plan, packer, kernels } = plan(checkpoint, options)?;
    let mut staging = Staging::new(output)?;
    for (kernel, linked) in plan.kernels.iter().zip(&kernels.linked) {
        staging.write(&kernel.file, linked.wgsl.as_bytes())?;
    }
    for name in COMPANIONS {
        let path = checkpoint.dir().join(name);
        if path.is_file() {
            let contents = std::fs::read(&path).map_err(|source| Error::Read { path, source })?;
            staging.write(name, &contents)?;
        }
    }
    (plan.files, plan.weights, plan.warnings) = if options.plan_only {
        packer.without_weights()
    } else {
        write_weights(packer, &mut staging, options.reference, progress, stop)?
    };
    let mut identity = blake3::Hasher::new();
    identity.update(
        &std::fs::read(checkpoint.config_path())
            .map_err(|source| Error::Read { path: checkpoint.config_path().into(), source })?,
    );
    for file in &plan.files {
        identity.update(file.blake3.as_bytes());
    }
    plan.model.checkpoint = identity.finalize().to_hex().to_string();
    staging.finish(&plan)?;
    Ok(plan.warnings)
}

fn plan<'a>(checkpoint: &'a Checkpoint, options: &Options) -> Result<Planned<'a>> {
    let config = checkpoint.config();
    let profile = &options.profile;
    let packer = Packer::new(checkpoint, options.weights, profile.max_binding_bytes);
    let mut shared =
        Shared { packer, kernels: Kernels::default(), buffers: Buffers::default(), parameters: Vec::new() };
    // Buffers grow with every program, so capacities are filled in when all are lowered.
    let mut programs = Vec::new();
    let watched = |target: &Target| *target != Target::Watch || !options.taps.is_none();
    for target in Target::all(config).into_iter().filter(watched) {
        let mut graph = model::build(config, target, &options.taps, &|name| checkpoint.contains(name));
        passes::run_all(&mut graph).map_err(|error| Error::Kernel { detail: error.to_string() })?;
        let (kind, name, first) = match target {
            Target::Forward => (ProgramKind::Forward, "forward".to_owned(), 0),
            Target::Watch => (ProgramKind::Watch, "watch".to_owned(), 0),
            Target::Trace => (ProgramKind::Trace, "trace".to_owned(), 0),
            Target::Draft { module } => {
                (ProgramKind::Draft { module: module as u32 }, format!("draft.{module}"), module)
            }
        };
        // Decode is worth a program of its own, where no row is read for tokens that are not there.
        let few = (1, FEW_TOKENS as u32);
        let many = (profile.token_tile as usize, u32::MAX);
        let tiles = if target != Target::Trace && many.0 > 1 { vec![few, many] } else { vec![many] };
        for precision in [Precision::Exact, Precision::Fast] {
            for &(tile, max_tokens) in &tiles {
                let (fast_latents, few) = (options.latents, max_tokens == FEW_TOKENS as u32);
                let selector = Selector { profile, precision, fast_latents, tile, few };
                let (steps, taps) = lower(config, &graph, selector, &name, first, &mut shared)?;
                programs.push(Program { kind, precision, max_tokens, max_rows: MAX_ROWS as u32, steps, taps });
            }
        }
    }
    let Shared { packer, kernels, buffers, parameters } = shared;
    for program in &mut programs {
        let (max_tokens, max_rows) = capacities(config, profile, &buffers, program)?;
        program.max_tokens = program.max_tokens.min(max_tokens);
        // The others end with logits instead of a sampled token for each row.
        if !matches!(program.kind, ProgramKind::Forward | ProgramKind::Watch) {
            program.max_rows = max_rows.min(program.max_tokens);
        }
    }
    let plan = Plan {
        format_version: FORMAT_VERSION,
        generator: concat!("moewe ", env!("CARGO_PKG_VERSION")).into(),
        model: info(config),
        warnings: Vec::new(),
        fast_latents: options.latents,
        requirements: requirements(profile, &kernels)?,
        files: Vec::new(),
        weights: Vec::new(),
        buffers: buffers.list,
        kernels: kernels.list.clone(),
        parameters,
        programs,
    };
    Ok(Planned { plan, packer, kernels })
}

/// Tokens and rows of logits that fit the target's binding limit in every buffer that a program uses.
fn capacities(config: &Config, profile: &Profile, buffers: &Buffers, program: &Program) -> Result<(u32, u32)> {
    let bound = program.steps.iter().flat_map(|step| &step.bindings).filter_map(|binding| match binding {
        Binding::Buffer(buffer) => Some(*buffer),
        Binding::Weight { .. } | Binding::Params => None,
    });
    let used: BTreeSet<u32> = bound.collect();
    let mut tokens = MAX_TOKENS.min(MAX_GRID / config.num_experts_per_tok.max(1) as u64);
    let mut rows = MAX_TOKENS;
    let used = used.into_iter().map(|index| &buffers.list[index as usize]);
    // The ring of log probabilities has one size everywhere, far below what any device binds.
    for buffer in used.filter(|buffer| buffer.role != Role::Logprobs) {
        // Bytes for one token, row, sequence or page, or of the whole.
        let (Dim::Const(length) | Dim::Times(_, length)) = buffer.elements else { continue };
        let least = 4 * length;
        let fit = profile.max_binding_bytes / least;
        if fit == 0 {
            return Err(Error::Argument {
                what: format!("max_binding_bytes of target {}, for buffer {},", profile.name, buffer.name),
                found: profile.max_binding_bytes.to_string(),
                expected: format!("at least {least}"),
            });
        }
        match buffer.elements {
            Dim::Times(Symbol::Tokens, _) => tokens = tokens.min(fit),
            Dim::Times(Symbol::Rows, _) => rows = rows.min(fit),
            _ => {}
        }
    }
    Ok((tokens as u32, rows as u32))
}

fn info(config: &Config) -> ModelInfo {
    ModelInfo {
        architecture: match config.family {
            Family::V2 => "DeepseekV2ForCausalLM",
            Family::V3 | Family::KimiK2 => "DeepseekV3ForCausalLM",
        }
        .into(),
        checkpoint: String::new(),
        vocab_size: config.vocab_size as u32,
        max_context: config.max_position_embeddings as u32,
        eos_token_ids: config.eos_token_ids.clone(),
        layers: config.num_hidden_layers as u32,
        moe_layers: (0..config.num_hidden_layers).filter(|&l| config.is_moe(l)).map(|l| l as u32).collect(),
        experts: config.n_routed_experts as u32,
        num_experts_per_tok: config.num_experts_per_tok as u32,
        n_group: config.n_group as u32,
        topk_group: config.topk_group as u32,
        n_shared_experts: config.n_shared_experts as u32,
        hidden_size: config.hidden_size as u32,
        num_attention_heads: config.num_attention_heads as u32,
        kv_lora_rank: config.kv_lora_rank as u32,
        qk_rope_head_dim: config.qk_rope_head_dim as u32,
        qk_nope_head_dim: config.qk_nope_head_dim as u32,
        v_head_dim: config.v_head_dim as u32,
        softmax_scale: config.softmax_scale() as f32,
        mtp_modules: config.num_nextn_predict_layers as u32,
    }
}

/// What the kernels need of a device, which the profile must grant.
pub(crate) fn requirements(profile: &Profile, kernels: &Kernels) -> Result<Requirements> {
    let storage = |kernel: &moewe_plan::Kernel| {
        kernel.bindings.iter().filter(|binding| binding.access != moewe_plan::Access::Uniform).count() as u32
    };
    let requirements = Requirements {
        profile: profile.name.clone(),
        tuned_on: profile.tuned.as_ref().map(Tuned::on),
        max_binding_bytes: profile.max_binding_bytes,
        storage_buffers: kernels.list.iter().map(storage).max().unwrap_or(0),
        workgroup_invocations: kernels.list.iter().map(|k| k.workgroup_size.iter().product()).max().unwrap_or(1),
        workgroup_bytes: kernels.linked.iter().map(|linked| linked.workgroup_bytes).max().unwrap_or(0),
        subgroup_invocations: if kernels.linked.iter().any(|linked| linked.subgroups) {
            profile.subgroup_size.unwrap_or(0)
        } else {
            0
        },
        cooperative: kernels.linked.iter().map(|linked| linked.cooperative).max().unwrap_or(0),
    };
    let limits = [
        ("storage_buffers", profile.storage_buffers, requirements.storage_buffers),
        ("workgroup_invocations", profile.workgroup_invocations, requirements.workgroup_invocations),
        ("workgroup_bytes", profile.workgroup_bytes, requirements.workgroup_bytes),
    ];
    match limits.into_iter().find(|(_, granted, needed)| granted < needed) {
        None => Ok(requirements),
        Some((field, granted, needed)) => Err(Error::Argument {
            what: format!("{field} of target {}", profile.name),
            found: granted.to_string(),
            expected: format!("at least {needed}, which a kernel of this model needs"),
        }),
    }
}
