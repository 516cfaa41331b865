//! What a device can do at most: copies, dispatches, submissions, matrix products.

mod alone;
mod matrix;

use std::time::Instant;

use moewe_plan::{Access, BindingLayout, Kernel};
use wgpu::BufferUsages;

use crate::memory::Buffer;
use crate::pipelines::{self, Pipeline};
use crate::{DeviceType, Gpu, Result};

pub use alone::{Bench, Dispatch, Store};
pub use matrix::{MatrixRates, matrix_rates};

/// Bytes a second, read and written ones counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Size of the copied buffer.
    pub bytes: u64,
    /// Gigabytes a second by a kernel that reads and writes 16 bytes at a time.
    pub kernel: f64,
    /// Gigabytes a second by the driver's own copy.
    pub copy: f64,
}

const COPY: &str = "
// Copies a buffer, four words at a time, with a stride of the whole grid.
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> target_: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < arrayLength(&source); i += groups.x * 256u) {
        target_[i] = source[i];
    }
}";

const COUNT: &str = "
// One invocation adds 1: each dispatch has to wait for the one before.
@group(0) @binding(0) var<storage, read_write> counter: array<u32>;

@compute @workgroup_size(1)
fn main() {
    counter[0] += 1u;
}";

const STORAGE: BufferUsages = BufferUsages::STORAGE.union(BufferUsages::COPY_SRC).union(BufferUsages::COPY_DST);

fn pipeline(gpu: &Gpu, name: &str, source: &str, accesses: &[Access]) -> Result<Pipeline> {
    let binding = |&access: &Access| BindingLayout { name: String::new(), access };
    let kernel = Kernel {
        name: name.into(),
        file: String::new(),
        workgroup_size: [1; 3],
        bindings: accesses.iter().map(binding).collect(),
        why: String::new(),
    };
    Ok(pipelines::make_all(gpu, &[(&kernel, source)], &|_| ())?.remove(0))
}

fn bind(gpu: &Gpu, pipeline: &Pipeline, buffers: &[&Buffer]) -> Result<wgpu::BindGroup> {
    let mut entries = Vec::with_capacity(buffers.len());
    for (index, buffer) in buffers.iter().enumerate() {
        entries.push(wgpu::BindGroupEntry { binding: index as u32, resource: buffer.raw.as_entire_binding() });
    }
    let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &pipeline.layout, entries: &entries };
    gpu.scoped(|| gpu.device.create_bind_group(&descriptor)).map_err(|error| gpu.refused("bindings", &error))
}

/// Seconds of the fastest of `times` submissions of what `record` records.
fn fastest(gpu: &Gpu, times: u32, record: &dyn Fn(&mut wgpu::CommandEncoder)) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..times {
        let mut encoder = gpu.encoder("measure");
        record(&mut encoder);
        let commands = gpu.finish(encoder)?;
        let started = Instant::now();
        let index = gpu.submit(commands)?;
        gpu.wait_for(&index)?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn dispatch(
    encoder: &mut wgpu::CommandEncoder,
    pipeline: &Pipeline,
    group: &wgpu::BindGroup,
    grid: [u32; 2],
    times: u32,
) {
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    pass.set_pipeline(&pipeline.pipeline);
    pass.set_bind_group(0, group, &[]);
    for _ in 0..times {
        pass.dispatch_workgroups(grid[0], grid[1], 1);
    }
}

/// Measures how fast the device copies a large buffer.
pub fn copy_bandwidth(gpu: &Gpu) -> Result<Bandwidth> {
    // Larger than any cache; a software driver has no more than the processor's.
    let wanted: u64 = if gpu.info().device_type == DeviceType::Cpu { 96 << 20 } else { 512 << 20 };
    let bytes = wanted.min(gpu.buffer_limit(STORAGE));
    let source = gpu.buffer("measure source", bytes, STORAGE)?;
    let target = gpu.buffer("measure target", bytes, STORAGE)?;
    let pipeline = pipeline(gpu, "copy", COPY, &[Access::Read, Access::ReadWrite])?;
    let group = bind(gpu, &pipeline, &[&source, &target])?;
    let grid = (bytes / 16).div_ceil(256).min(16384) as u32;
    let moved = 2.0 * bytes as f64 / 1e9;
    let kernel = fastest(gpu, 5, &|encoder| dispatch(encoder, &pipeline, &group, [grid, 1], 1))?;
    let copy = fastest(gpu, 5, &|encoder| encoder.copy_buffer_to_buffer(&source.raw, 0, &target.raw, 0, bytes))?;
    Ok(Bandwidth { bytes, kernel: moved / kernel, copy: moved / copy })
}

/// Measures what one more dispatch costs that waits for the one before, in microseconds.
pub fn dispatch_cost(gpu: &Gpu) -> Result<f64> {
    let counter = gpu.buffer("measure counter", 16, STORAGE)?;
    let pipeline = pipeline(gpu, "count", COUNT, &[Access::ReadWrite])?;
    let group = bind(gpu, &pipeline, &[&counter])?;
    let seconds = |times: u32| fastest(gpu, 5, &|encoder| dispatch(encoder, &pipeline, &group, [1, 1], times));
    let (few, many) = (100, 1100);
    Ok((seconds(many)? - seconds(few)?).max(0.0) * 1e6 / f64::from(many - few))
}

/// Measures an empty submission and waiting for it, in microseconds.
pub fn submit_latency(gpu: &Gpu) -> Result<f64> {
    let counter = gpu.buffer("measure counter", 16, STORAGE)?;
    let pipeline = pipeline(gpu, "count", COUNT, &[Access::ReadWrite])?;
    let group = bind(gpu, &pipeline, &[&counter])?;
    Ok(fastest(gpu, 30, &|encoder| dispatch(encoder, &pipeline, &group, [1, 1], 1))? * 1e6)
}
