//! Kernels that run alone, on buffers of the caller's: to see what they compute, and how long that takes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use moewe_plan::Kernel;
use wgpu::BufferUsages;

use super::{STORAGE, bind};
use crate::memory::Buffer;
use crate::pipelines::{self, Pipeline};
use crate::timing::{Queries, STEP_BYTES};
use crate::{Gpu, Result};

/// A buffer on the device.
#[derive(Debug)]
pub struct Store(Buffer);

/// One dispatch of a kernel, ready to run.
#[derive(Debug)]
pub struct Dispatch {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
    grid: [u32; 3],
    /// The buffer that says how many workgroups there are, and the offset in bytes.
    indirect: Option<(wgpu::Buffer, u64)>,
}

/// A device on which single kernels run. Pipelines are made once for each kernel name.
#[derive(Debug)]
pub struct Bench {
    gpu: Arc<Gpu>,
    pipelines: HashMap<String, Arc<Pipeline>>,
    /// Where the device writes timestamps, if it does.
    clock: Option<(Queries, Buffer)>,
}

impl Bench {
    /// On an open device.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let clock = if gpu.info().timestamps {
            let usage = BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
            Some((Queries::new(gpu, 1)?, gpu.buffer("ticks", STEP_BYTES, usage)?))
        } else {
            None
        };
        Ok(Self { gpu: Arc::clone(gpu), pipelines: HashMap::new(), clock })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// A buffer of zeros, of so many words.
    ///
    /// # Errors
    /// A device that has no such room, or does not bind as much.
    pub fn store(&self, name: &str, words: u64, uniform: bool) -> Result<Store> {
        let usage = if uniform { BufferUsages::UNIFORM } else { STORAGE | BufferUsages::INDIRECT };
        let usage = usage | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        Ok(Store(self.gpu.buffer(name, words.saturating_mul(4), usage)?))
    }

    /// Writes words from the `at`-th on.
    ///
    /// # Errors
    /// What the device refuses, such as words behind the end.
    pub fn write(&self, store: &Store, at: u64, words: &[u32]) -> Result<()> {
        let write = || self.gpu.queue.write_buffer(&store.0.raw, 4 * at, bytemuck::cast_slice(words));
        self.gpu.scoped(write).map_err(|error| self.gpu.refused("writing words", &error))
    }

    /// Fills the first `count` words with a pattern, again and again.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn repeat(&self, store: &Store, count: u64, pattern: &[u32]) -> Result<()> {
        let period = pattern.len() as u64;
        self.write(store, 0, &pattern[..count.min(period) as usize])?;
        if count <= period {
            return Ok(());
        }
        // A buffer cannot be copied to itself.
        let source = self.store("pattern", period, false)?;
        self.write(&source, 0, pattern)?;
        let mut encoder = self.gpu.encoder("pattern");
        for at in (period..count).step_by(pattern.len()) {
            let bytes = 4 * period.min(count - at);
            encoder.copy_buffer_to_buffer(&source.0.raw, 0, &store.0.raw, 4 * at, bytes);
        }
        let index = self.gpu.submit(self.gpu.finish(encoder)?)?;
        self.gpu.wait_for(&index)
    }

    /// `count` words from the `at`-th on.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn read(&self, store: &Store, at: u64, count: u64) -> Result<Vec<u32>> {
        self.gpu.read(self.gpu.encoder("read"), &[(&store.0, 4 * at, 4 * count)])
    }

    /// A dispatch of a kernel on buffers in the order of its bindings. `indirect`: the buffer and the word in it from which on the
    /// grid is read when it runs.
    ///
    /// # Errors
    /// A kernel that the device has no pipeline for, and bindings that it refuses.
    pub fn dispatch(
        &mut self,
        kernel: &Kernel,
        source: &str,
        stores: &[&Store],
        grid: [u32; 3],
        indirect: Option<(&Store, u64)>,
    ) -> Result<Dispatch> {
        let pipeline = if let Some(pipeline) = self.pipelines.get(&kernel.name) {
            Arc::clone(pipeline)
        } else {
            let made = Arc::new(pipelines::make_all(&self.gpu, &[(kernel, source)], &|_| ())?.remove(0));
            self.pipelines.insert(kernel.name.clone(), Arc::clone(&made));
            made
        };
        let buffers: Vec<&Buffer> = stores.iter().map(|store| &store.0).collect();
        let group = bind(&self.gpu, &pipeline, &buffers)?;
        let indirect = indirect.map(|(store, word)| (store.0.raw.clone(), 4 * word));
        Ok(Dispatch { pipeline, group, grid, indirect })
    }

    /// Runs dispatches one after the other and waits for them.
    ///
    /// # Errors
    /// A lost device, or [`crate::Error::Interrupted`] if the caller asked to stop.
    pub fn run(&self, dispatches: &[Dispatch]) -> Result<()> {
        self.gpu.check_stop()?;
        let mut encoder = self.gpu.encoder("alone");
        record(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()), dispatches);
        let index = self.gpu.submit(self.gpu.finish(encoder)?)?;
        self.gpu.wait_for(&index)
    }

    /// Seconds of one run of `chains[0]`, on average over `times` runs of one chain after the other, by the device's clock if it
    /// has one, else by the host's. Chains do the same with other copies of their weights.
    ///
    /// # Errors
    /// As [`Bench::run`].
    pub fn time(&self, chains: &[Vec<Dispatch>], times: usize) -> Result<f64> {
        self.gpu.check_stop()?;
        let mut encoder = self.gpu.encoder("alone");
        {
            let timestamp_writes = self.clock.as_ref().map(|(queries, _)| queries.writes(0));
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
            for chain in chains.iter().cycle().take(times) {
                record(&mut pass, chain);
            }
        }
        if let Some((queries, ticks)) = &self.clock {
            queries.copy(&mut encoder, 1, ticks, 0);
        }
        let commands = self.gpu.finish(encoder)?;
        let started = Instant::now();
        let index = self.gpu.submit(commands)?;
        self.gpu.wait_for(&index)?;
        let mut seconds = started.elapsed().as_secs_f64();
        if let Some((_, ticks)) = &self.clock {
            let words = self.gpu.read(self.gpu.encoder("ticks"), &[(ticks, 0, STEP_BYTES)])?;
            let tick = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
            let period = f64::from(self.gpu.queue.get_timestamp_period());
            let told = tick(2).saturating_sub(tick(0)) as f64 * period / 1e9;
            // A clock that stands still, or tells more than went by here, tells nothing.
            if told > 0.0 && told <= seconds {
                seconds = told;
            }
        }
        Ok(seconds / times.max(1) as f64)
    }
}

fn record(pass: &mut wgpu::ComputePass<'_>, dispatches: &[Dispatch]) {
    for Dispatch { pipeline, group, grid: [x, y, z], indirect } in dispatches {
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, group, &[]);
        match indirect {
            Some((buffer, offset)) => pass.dispatch_workgroups_indirect(buffer, *offset),
            None => pass.dispatch_workgroups(*x, *y, *z),
        }
    }
}
