//! Making compute pipelines from kernels.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use moewe_plan::{Access, Kernel};
use wgpu::{BindGroupLayoutEntry, BindingType, BufferBindingType, ShaderStages};

use crate::{Error, Gpu, Progress, Result};

/// A pipeline and the layout of its one bind group.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

/// Makes pipelines on a few threads, in the order of `jobs`; the error of the first job that failed.
pub(crate) fn make_all(gpu: &Gpu, jobs: &[(&Kernel, &str)], progress: &dyn Fn(Progress)) -> Result<Vec<Pipeline>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8).min(jobs.len());
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    let mut made: Vec<Option<Result<Pipeline>>> = jobs.iter().map(|_| None).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((kernel, source)) = jobs.get(index) else { break };
                    // The receiver lives until all senders are gone.
                    let _ = sender.send((index, gpu.check_stop().and_then(|()| make(gpu, kernel, source))));
                }
            });
        }
        drop(sender);
        for (done, (index, result)) in receiver.iter().enumerate() {
            if result.is_err() {
                next.store(jobs.len(), Ordering::Relaxed);
            }
            made[index] = Some(result);
            progress(Progress::Pipelines { done: done as u64 + 1, total: jobs.len() as u64 });
        }
    });
    gpu.check()?;
    if let Some(cache) = gpu.pipeline_cache().filter(|_| !jobs.is_empty()) {
        cache.save();
    }
    // After a failure some jobs were left out; the failure comes before them or among them.
    let failed = made.iter_mut().find(|result| matches!(result, Some(Err(_)))).and_then(Option::take);
    match failed {
        Some(Err(error)) => Err(error),
        _ => made.into_iter().map(|result| result.expect("every job was done")).collect(),
    }
}

fn make(gpu: &Gpu, kernel: &Kernel, source: &str) -> Result<Pipeline> {
    let entry = |(binding, layout): (usize, &moewe_plan::BindingLayout)| BindGroupLayoutEntry {
        binding: binding as u32,
        visibility: ShaderStages::COMPUTE,
        ty: BindingType::Buffer {
            ty: match layout.access {
                Access::Uniform => BufferBindingType::Uniform,
                Access::Read => BufferBindingType::Storage { read_only: true },
                Access::ReadWrite => BufferBindingType::Storage { read_only: false },
            },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    };
    let entries: Vec<BindGroupLayoutEntry> = kernel.bindings.iter().enumerate().map(entry).collect();
    let label = Some(kernel.name.as_str());
    let made = gpu.scoped(|| {
        let module = gpu.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let layout = gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            // Kernels write what they read of it.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: gpu.pipeline_cache().map(|cache| &cache.raw),
        });
        Pipeline { pipeline, layout }
    });
    made.map_err(|error| match error {
        wgpu::Error::OutOfMemory { .. } => gpu.out_of_memory(&format!("pipeline {}", kernel.name), 0),
        error => {
            Error::Kernel { kernel: kernel.name.clone(), device: gpu.info().name.clone(), what: error.to_string() }
        }
    })
}
