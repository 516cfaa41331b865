//! From a program to recorded dispatches.

use std::collections::BTreeMap;

use moewe_plan::{Binding, Program, Symbols};
use wgpu::{BindGroup, BindGroupEntry, BindingResource, BufferBinding, BufferUsages, ComputePipeline};

use crate::buffers::Buffers;
use crate::memory::Buffer;
use crate::{Error, Model, Result};

/// A program whose bind groups exist.
#[derive(Debug)]
pub(crate) struct Prepared {
    steps: Vec<(ComputePipeline, BindGroup)>,
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
            steps.push((pipeline.pipeline.clone(), group));
        }
        Ok(Self { steps, _params: params })
    }

    /// Records all dispatches `runs` times over, in one pass.
    pub(crate) fn record(&self, encoder: &mut wgpu::CommandEncoder, grids: &[Option<[u32; 3]>], runs: u32) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        for _ in 0..runs {
            for ((pipeline, group), grid) in self.steps.iter().zip(grids) {
                if let Some([x, y, z]) = *grid {
                    pass.set_pipeline(pipeline);
                    pass.set_bind_group(0, group, &[]);
                    pass.dispatch_workgroups(x, y, z);
                }
            }
        }
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
    gpu.queue.write_buffer(&buffer.raw, 0, &bytes);
    Ok(buffer)
}

/// Workgroups of each step, `None` where there are none.
pub(crate) fn grids(program: &Program, symbols: &Symbols, limit: u32) -> Result<Vec<Option<[u32; 3]>>> {
    let grid = |step: &moewe_plan::Step| {
        let sizes = [0, 1, 2].map(|axis| step.grid[axis].eval(symbols));
        if sizes.contains(&0) {
            return Ok(None);
        }
        match sizes.into_iter().find(|&size| size > limit.into()) {
            Some(found) => Err(Error::GridTooLarge { step: step.label.clone(), found, limit: limit.into() }),
            None => Ok(Some(sizes.map(|size| size as u32))),
        }
    };
    program.steps.iter().map(grid).collect()
}
