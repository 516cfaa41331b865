//! From a program to recorded dispatches.

use std::collections::BTreeMap;

use moewe_plan::{Binding, Indirect, Program, Step, Symbols};
use wgpu::{BindGroup, BindGroupEntry, BindingResource, BufferBinding, BufferUsages, ComputePipeline};

use crate::buffers::Buffers;
use crate::memory::Buffer;
use crate::timing::Queries;
use crate::{Error, Model, Result};

/// Workgroups of each step, `None` for a step that does not run.
pub(crate) type Grids = Vec<Option<[u32; 3]>>;

#[derive(Debug)]
struct PreparedStep {
    pipeline: ComputePipeline,
    group: BindGroup,
    /// The buffer that says how many workgroups there are, and the offset in bytes, for a step that asks it.
    indirect: Option<(wgpu::Buffer, u64)>,
}

/// A program whose bind groups exist.
#[derive(Debug)]
pub(crate) struct Prepared {
    steps: Vec<PreparedStep>,
    /// Kept for the count of held memory; the bind groups keep the buffer itself.
    _params: Buffer,
}

impl Prepared {
    pub(crate) fn new(model: &Model, buffers: &Buffers, program: &Program) -> Result<Self> {
        let gpu = model.gpu();
        let align = u64::from(gpu.limits.min_uniform_buffer_offset_alignment).max(16);
        // Steps with the same parameters share them.
        let mut slots: BTreeMap<[u32; 4], u64> = BTreeMap::new();
        for step in &program.steps {
            if step.bindings.contains(&Binding::Params) {
                let next = slots.len() as u64 * align;
                slots.entry(step.params).or_insert(next);
            }
        }
        let params = parameters(model, &slots, align)?;
        let mut steps = Vec::with_capacity(program.steps.len());
        for step in &program.steps {
            let pipeline = model.pipelines[step.kernel as usize].get().expect("the session prepared its programs");
            let resource = |binding: &Binding| match *binding {
                Binding::Weight { weight, shard } => model.weight(weight, shard).raw.as_entire_binding(),
                Binding::Buffer(buffer) => buffers.get(buffer).raw.as_entire_binding(),
                Binding::Params => BindingResource::Buffer(BufferBinding {
                    buffer: &params.raw,
                    offset: slots[&step.params],
                    size: wgpu::BufferSize::new(16),
                }),
            };
            let entries: Vec<BindGroupEntry<'_>> = step
                .bindings
                .iter()
                .enumerate()
                .map(|(index, binding)| BindGroupEntry { binding: index as u32, resource: resource(binding) })
                .collect();
            let descriptor =
                wgpu::BindGroupDescriptor { label: Some(&step.label), layout: &pipeline.layout, entries: &entries };
            let group = gpu.scoped(|| gpu.device.create_bind_group(&descriptor)).map_err(|error| Error::Refused {
                device: gpu.info().name.clone(),
                what: format!("bindings of step {}: {error}", step.label),
            })?;
            let words =
                |indirect: Indirect| (buffers.get(indirect.buffer).raw.clone(), indirect.word.saturating_mul(4));
            let indirect = step.indirect.map(words);
            steps.push(PreparedStep { pipeline: pipeline.pipeline.clone(), group, indirect });
        }
        Ok(Self { steps, _params: params })
    }

    /// Records all dispatches `runs` times over, in one pass.
    pub(crate) fn record(&self, encoder: &mut wgpu::CommandEncoder, grids: &[Option<[u32; 3]>], runs: u32) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        for _ in 0..runs {
            for (step, grid) in self.running(grids) {
                dispatch(&mut pass, step, grid);
            }
        }
    }

    /// Records all dispatches once, each in a pass of its own that notes when it begins and ends.
    pub(crate) fn record_timed(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        grids: &[Option<[u32; 3]>],
        queries: &Queries,
    ) {
        for (number, (step, grid)) in self.running(grids).enumerate() {
            let timestamp_writes = Some(queries.writes(number));
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
            dispatch(&mut pass, step, grid);
        }
    }

    fn running<'a>(&'a self, grids: &'a [Option<[u32; 3]>]) -> impl Iterator<Item = (&'a PreparedStep, [u32; 3])> {
        self.steps.iter().zip(grids).filter_map(|(step, grid)| Some((step, (*grid)?)))
    }
}

fn dispatch(pass: &mut wgpu::ComputePass<'_>, step: &PreparedStep, [x, y, z]: [u32; 3]) {
    pass.set_pipeline(&step.pipeline);
    pass.set_bind_group(0, &step.group, &[]);
    match &step.indirect {
        Some((buffer, offset)) => pass.dispatch_workgroups_indirect(buffer, *offset),
        None => pass.dispatch_workgroups(x, y, z),
    }
}

/// A buffer with the parameters of all steps.
fn parameters(model: &Model, slots: &BTreeMap<[u32; 4], u64>, align: u64) -> Result<Buffer> {
    let mut bytes = vec![0; slots.len() * align as usize];
    for (params, &at) in slots {
        bytes[at as usize..][..16].copy_from_slice(bytemuck::bytes_of(params));
    }
    let gpu = model.gpu();
    // Only 16 bytes of it are bound at a time, so the limit of a uniform binding does not concern it.
    let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
    let buffer = gpu.buffer_up_to("step parameters", bytes.len() as u64, usage, gpu.limits.max_buffer_size)?;
    let written = gpu.scoped(|| gpu.queue.write_buffer(&buffer.raw, 0, &bytes));
    written.map_err(|error| gpu.refused("step parameters", &error))?;
    Ok(buffer)
}

/// Workgroups of the steps that are wanted and have any.
pub(crate) fn grids(program: &Program, symbols: &Symbols, limit: u32, wanted: &dyn Fn(&Step) -> bool) -> Result<Grids> {
    let grid = |step: &Step| {
        let sizes = [0, 1, 2].map(|axis| step.grid[axis].eval(symbols));
        if sizes.contains(&0) || !wanted(step) {
            return Ok(None);
        }
        match sizes.into_iter().find(|&size| size > limit.into()) {
            Some(found) => Err(Error::GridTooLarge { step: step.label.clone(), found, limit: limit.into() }),
            None => Ok(Some(sizes.map(|size| size as u32))),
        }
    };
    program.steps.iter().map(grid).collect()
}
