//! The buffers of a session: how large they must be, and making them.

use std::collections::BTreeSet;

use moewe_plan::{
    Binding, DRAFT_WORDS, Dim, FINISHED_STEPS, LOGPROB_WORDS, Plan, Program, ProgramKind, Role, Symbol, Symbols,
};
use wgpu::BufferUsages;

use crate::memory::Buffer;
use crate::pages::pages_for;
use crate::{DeviceType, Error, Gpu, Result, SessionOptions};

/// Bytes of the latent cache when the caller does not say.
const CACHE_BYTES: u64 = 4 << 30;

/// Device buffers by their index in the plan; those that no program in use needs are absent.
#[derive(Debug)]
pub(crate) struct Buffers {
    by_index: Vec<Option<Buffer>>,
    roles: Vec<Role>,
    /// What the symbols of buffer lengths stood for.
    pub(crate) capacity: Symbols,
}

impl Buffers {
    pub(crate) fn new(gpu: &Gpu, plan: &Plan, programs: &[&Program], options: &SessionOptions) -> Result<Self> {
        let used = used_buffers(programs);
        let counts: BTreeSet<u32> = indirect_buffers(programs).collect();
        let capacity = capacities(gpu, plan, programs, &used, options)?;
        let mut by_index = Vec::with_capacity(plan.buffers.len());
        for (index, buffer) in plan.buffers.iter().enumerate() {
            if !used.contains(&(index as u32)) {
                by_index.push(None);
                continue;
            }
            let elements = elements(plan, index, programs, &capacity);
            let needed = least_elements(plan, buffer.role, programs, &capacity);
            if elements < needed {
                let what = format!("buffer {} has {elements} elements, {needed} are needed", buffer.name);
                return Err(Error::Plan { what });
            }
            let usage = if buffer.role == Role::Header { BufferUsages::UNIFORM } else { BufferUsages::STORAGE };
            let counts = if counts.contains(&(index as u32)) { BufferUsages::INDIRECT } else { BufferUsages::empty() };
            let usage = usage | counts | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
            by_index.push(Some(gpu.buffer(&buffer.name, elements.saturating_mul(4), usage)?));
        }
        Ok(Self { by_index, roles: plan.buffers.iter().map(|buffer| buffer.role).collect(), capacity })
    }

    /// A buffer, if a program in use needs it.
    pub(crate) fn find(&self, index: u32) -> Option<&Buffer> {
        self.by_index[index as usize].as_ref()
    }

    /// A buffer that a program in use needs.
    pub(crate) fn get(&self, index: u32) -> &Buffer {
        self.find(index).expect("buffers of programs in use were made")
    }

    /// Caches of layers, each with the bytes of one page.
    pub(crate) fn caches(&self, plan: &Plan) -> Vec<(&Buffer, u64)> {
        let page = Symbols { tokens: 0, rows: 0, sequences: 0, pages: 1 };
        let caches = plan.buffers.iter().zip(&self.by_index).filter(|(buffer, _)| buffer.role == Role::Cache);
        caches
            .filter_map(|(plan, buffer)| Some((buffer.as_ref()?, plan.elements.eval(&page).saturating_mul(4))))
            .collect()
    }

    /// The buffer of a role, if a program in use needs it.
    pub(crate) fn role(&self, role: Role) -> Option<&Buffer> {
        self.by_index.iter().zip(&self.roles).find(|(_, r)| **r == role).and_then(|(buffer, _)| buffer.as_ref())
    }
}

fn used_buffers(programs: &[&Program]) -> BTreeSet<u32> {
    let bound = programs.iter().flat_map(|program| &program.steps).flat_map(|step| &step.bindings);
    let bound = bound.filter_map(|binding| match *binding {
        Binding::Buffer(buffer) => Some(buffer),
        _ => None,
    });
    let tapped = programs.iter().flat_map(|program| &program.taps).map(|tap| tap.buffer);
    bound.chain(tapped).chain(indirect_buffers(programs)).collect()
}

/// Buffers that say how many workgroups there are.
fn indirect_buffers(programs: &[&Program]) -> impl Iterator<Item = u32> {
    programs.iter().flat_map(|program| &program.steps).filter_map(|step| Some(step.indirect?.buffer))
}

fn elements(plan: &Plan, index: usize, programs: &[&Program], capacity: &Symbols) -> u64 {
    let buffer = &plan.buffers[index];
    // Kernels index the rings by the program's own capacity, even where the other buffers are cut to fit the device.
    let rows = if is_ring(buffer.role) { max_rows(programs) } else { capacity.rows };
    buffer.elements.eval(&Symbols { rows, ..*capacity })
}

/// Whether a role's buffer holds the results of several runs, with room for the most rows that programs take.
fn is_ring(role: Role) -> bool {
    matches!(role, Role::Finished | Role::Logprobs)
}

fn max_rows(programs: &[&Program]) -> u64 {
    programs.iter().map(|program| u64::from(program.max_rows)).max().unwrap_or(0)
}

/// Elements that the host or the layout of the role needs at least.
fn least_elements(plan: &Plan, role: Role, programs: &[&Program], capacity: &Symbols) -> u64 {
    let samples = |program: &&&Program| matches!(program.kind, ProgramKind::Forward | ProgramKind::Watch);
    let sampling: Vec<&Program> = programs.iter().filter(samples).copied().collect();
    match role {
        // What a parameter needs was checked with the plan.
        Role::Scratch | Role::State | Role::Cache | Role::Parameter => 0,
        Role::Header => 8,
        Role::Groups => 8 * max_rows(&sampling),
        Role::Drafts => u64::from(DRAFT_WORDS) * max_rows(&sampling),
        Role::Holes => capacity.sequences * 2,
        Role::Tokens => capacity.tokens * 4,
        Role::Rows => capacity.rows,
        Role::PageTable => capacity.sequences * pages_for(plan.model.max_context as usize) as u64,
        Role::Sampling => capacity.sequences * 8,
        Role::Seen | Role::Mask => capacity.sequences * u64::from(plan.model.vocab_size.div_ceil(32)),
        Role::Bias => capacity.sequences.saturating_mul(plan.model.vocab_size.into()),
        Role::Finished => 1 + u64::from(FINISHED_STEPS) * max_rows(&sampling),
        Role::Logprobs => u64::from(FINISHED_STEPS * LOGPROB_WORDS) * max_rows(&sampling),
    }
}

/// The largest value of a symbol for which `dim` is at most `elements`; `None` if it does not depend on it.
fn largest(dim: &Dim, symbol: Symbol, elements: u64) -> Option<u64> {
    match *dim {
        Dim::Symbol(s) if s == symbol => Some(elements),
        Dim::Times(s, factor) if s == symbol => elements.checked_div(factor),
        Dim::CeilDiv(s, divisor) if s == symbol => Some(elements.saturating_mul(divisor)),
        // There are at most as many tiles as members.
        Dim::Tiles { of, each, .. } if of == symbol => elements.checked_div(each),
        _ => None,
    }
}

/// What the symbols may be at most, so that every buffer that depends on them fits a binding.
fn capacities(
    gpu: &Gpu,
    plan: &Plan,
    programs: &[&Program],
    used: &BTreeSet<u32>,
    options: &SessionOptions,
) -> Result<Symbols> {
    let limit = gpu.buffer_limit(BufferUsages::STORAGE).min(plan.requirements.max_binding_bytes);
    let sized = || used.iter().map(|&index| &plan.buffers[index as usize]).filter(|b| !is_ring(b.role));
    let fit = |symbol: Symbol, wanted: u64, least: u64| {
        let tightest = sized()
            .filter_map(|buffer| Some((largest(&buffer.elements, symbol, limit / 4)?, buffer)))
            .min_by_key(|(most, _)| *most);
        match tightest {
            Some((most, buffer)) if most < least => {
                let one = Symbols { tokens: least, rows: least, sequences: least, pages: least };
                let bytes = buffer.elements.eval(&one).saturating_mul(4);
                Err(Error::BufferTooLarge { name: buffer.name.clone(), bytes, limit })
            }
            Some((most, _)) => Ok(wanted.min(most)),
            None => Ok(wanted),
        }
    };
    let most = |of: &dyn Fn(&Program) -> u32| programs.iter().map(|program| u64::from(of(program))).max().unwrap_or(1);
    let tokens = fit(Symbol::Tokens, most(&|program| program.max_tokens), 1)?;
    let rows = fit(Symbol::Rows, most(&|program| program.max_rows), 1)?;
    let wanted = u64::from(options.max_sequences.max(1));
    let sequences = fit(Symbol::Sequences, wanted, wanted)?;
    let pages = if let Some(pages) = options.pages {
        fit(Symbol::Pages, pages.into(), pages.into())?
    } else {
        let all = sequences.saturating_mul(pages_for(plan.model.max_context as usize) as u64).min(u32::MAX.into());
        let page = Symbols { tokens: 0, rows: 0, sequences: 0, pages: 1 };
        let paged = sized().filter(|buffer| largest(&buffer.elements, Symbol::Pages, 1).is_some());
        let page_bytes: u64 = paged.map(|buffer| buffer.elements.eval(&page).saturating_mul(4)).sum();
        let mut bytes = options.cache_bytes.unwrap_or(CACHE_BYTES);
        if options.cache_bytes.is_none() && gpu.info().device_type == DeviceType::Cpu {
            // The rest is for activations and for whatever else the machine does.
            let left = gpu.memory.budget().map_or(u64::MAX, |budget| budget.saturating_sub(gpu.memory.held()));
            bytes = bytes.min(left / 2);
        }
        let affordable = bytes.checked_div(page_bytes).unwrap_or(u64::MAX).max(1);
        fit(Symbol::Pages, all.min(affordable), 1)?
    };
    Ok(Symbols { tokens, rows, sequences, pages })
}
