//! A bundle on a device: its weights and pipelines.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::sync::{Arc, OnceLock};

use moewe_plan::{Binding, Bundle, Plan, Precision, Program, ProgramKind, Shard, Weight};
use wgpu::BufferUsages;

use crate::check::{check_device, check_plan};
use crate::memory::Buffer;
use crate::pipelines::{self, Pipeline};
use crate::{Error, Gpu, Result};

/// Bytes handed to the device at once.
const CHUNK: u64 = 8 << 20;
/// Bytes in flight before the upload waits for the device, so that staging memory stays bounded.
const IN_FLIGHT: u64 = 64 << 20;

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Bytes of weight files that were held against their hashes.
    Verify {
        /// Bytes done.
        done: u64,
        /// All bytes.
        total: u64,
    },
    /// Bytes of weights that were handed to the device.
    Upload {
        /// Bytes done.
        done: u64,
        /// All bytes.
        total: u64,
    },
    /// Pipelines that were made.
    Pipelines {
        /// Pipelines done.
        done: u64,
        /// All pipelines.
        total: u64,
    },
}

/// A model on a device. Sessions share it.
#[derive(Debug)]
pub struct Model {
    gpu: Arc<Gpu>,
    plan: Plan,
    kernels: Vec<String>,
    /// By weight and shard; only those that the wanted programs bind.
    weights: BTreeMap<(u32, u32), Buffer>,
    pub(crate) pipelines: Vec<OnceLock<Pipeline>>,
    kinds: Vec<ProgramKind>,
}

impl Model {
    /// Verifies and uploads all weights of a bundle. Pipelines are made by [`Model::prepare`] or by the first session.
    pub fn load(gpu: &Arc<Gpu>, bundle: &Bundle, progress: &dyn Fn(Progress)) -> Result<Arc<Self>> {
        let mut kinds: Vec<ProgramKind> = Vec::new();
        for program in &bundle.plan.programs {
            if !kinds.contains(&program.kind) {
                kinds.push(program.kind);
            }
        }
        Self::load_for(gpu, bundle, &kinds, progress)
    }

    /// Like [`Model::load`], but uploads only the weights that programs of these kinds use.
    pub fn load_for(
        gpu: &Arc<Gpu>,
        bundle: &Bundle,
        kinds: &[ProgramKind],
        progress: &dyn Fn(Progress),
    ) -> Result<Arc<Self>> {
        let plan = bundle.plan.clone();
        check_plan(&plan)?;
        check_device(&plan, gpu)?;
        let shards: BTreeSet<(u32, u32)> = plan
            .programs
            .iter()
            .filter(|program| kinds.contains(&program.kind))
            .flat_map(|program| &program.steps)
            .flat_map(|step| &step.bindings)
            .filter_map(|binding| match *binding {
                Binding::Weight { weight, shard } => Some((weight, shard)),
                _ => None,
            })
            .collect();
        let bytes = |&(weight, shard): &(u32, u32)| padded_bytes(shard_of(&plan, weight, shard).1);
        let total = shards.iter().map(bytes).sum();
        if !gpu.memory.has(total) {
            return Err(gpu.out_of_memory("the weights", total));
        }
        let file_bytes = plan.files.iter().map(|file| file.bytes).sum();
        let verified = std::cell::Cell::new(0);
        let files = bundle.map_weights(&|bytes| {
            verified.set(verified.get() + bytes);
            progress(Progress::Verify { done: verified.get(), total: file_bytes });
        })?;
        gpu.check_stop()?;
        let mut upload = Upload { gpu, in_flight: 0, done: 0, total, progress };
        let mut weights = BTreeMap::new();
        for &(weight, shard) in &shards {
            let (tensor, piece) = shard_of(&plan, weight, shard);
            let segments = piece.segments.iter().map(|segment| files.bytes(segment));
            weights.insert((weight, shard), upload.buffer(&tensor.name, padded_bytes(piece), segments)?);
        }
        gpu.wait()?;
        let pipelines = plan.kernels.iter().map(|_| OnceLock::new()).collect();
        let (gpu, kernels, kinds) = (Arc::clone(gpu), bundle.kernels.clone(), kinds.to_vec());
        Ok(Arc::new(Self { gpu, plan, kernels, weights, pipelines, kinds }))
    }

    /// The device it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Its plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Programs of a kind and precision with their index in the plan, the smallest first.
    pub(crate) fn programs(&self, kind: ProgramKind, precision: Precision) -> Vec<(usize, &Program)> {
        let fits = |program: &Program| program.kind == kind && program.precision == precision;
        let mut programs: Vec<_> = self.plan.programs.iter().enumerate().filter(|(_, program)| fits(program)).collect();
        programs.sort_by_key(|(_, program)| (program.max_tokens, program.max_rows));
        programs
    }

    /// Makes the pipelines of programs of these kinds, in parallel. Those that exist already are kept.
    pub fn prepare(&self, kinds: &[ProgramKind], precision: Precision, progress: &dyn Fn(Progress)) -> Result<()> {
        let mut wanted = BTreeSet::new();
        for &kind in kinds {
            if !self.kinds.contains(&kind) && self.plan.programs.iter().any(|program| program.kind == kind) {
                return Err(Error::NotPrepared { kind, place: "model" });
            }
            let programs = self.programs(kind, precision);
            if programs.is_empty() {
                return Err(Error::NoProgram { kind, precision });
            }
            wanted.extend(programs.iter().flat_map(|(_, program)| &program.steps).map(|step| step.kernel as usize));
        }
        let missing: Vec<usize> = wanted.into_iter().filter(|&kernel| self.pipelines[kernel].get().is_none()).collect();
        let jobs = missing.iter().map(|&kernel| (&self.plan.kernels[kernel], self.kernels[kernel].as_str()));
        let made = pipelines::make_all(&self.gpu, &jobs.collect::<Vec<_>>(), progress)?;
        for (&kernel, pipeline) in missing.iter().zip(made) {
            // Another thread may have been faster; then its pipeline stays and ours goes.
            let _ = self.pipelines[kernel].set(pipeline);
        }
        Ok(())
    }

    /// The buffer of a shard.
    pub(crate) fn weight(&self, weight: u32, shard: u32) -> &Buffer {
        // `prepare` refuses kinds whose weights were not uploaded.
        self.weights.get(&(weight, shard)).expect("the weights of prepared programs were uploaded")
    }
}

fn shard_of(plan: &Plan, weight: u32, shard: u32) -> (&Weight, &Shard) {
    let weight = &plan.weights[weight as usize];
    (weight, &weight.shards[shard as usize])
}

fn padded_bytes(shard: &Shard) -> u64 {
    shard.segments.iter().map(|segment| segment.bytes).sum::<u64>().next_multiple_of(16)
}

/// Hands weights to the device, a bounded number of bytes at a time.
struct Upload<'a> {
    gpu: &'a Gpu,
    in_flight: u64,
    done: u64,
    total: u64,
    progress: &'a dyn Fn(Progress),
}

impl Upload<'_> {
    /// A buffer of `bytes` bytes that holds the segments behind one another and then zeros.
    fn buffer<'a>(&mut self, name: &str, bytes: u64, mut segments: impl Iterator<Item = &'a [u8]>) -> Result<Buffer> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let buffer = self.gpu.buffer(name, bytes, usage)?;
        // Segments follow one another without regard to the device's alignment of 4 bytes, so chunks are cut
        // from their concatenation.
        let mut rest: &[u8] = &[];
        let mut at = 0;
        while at < bytes {
            let size = CHUNK.min(bytes - at);
            let size = NonZero::new(size).expect("at < bytes");
            let view = self.gpu.scoped(|| self.gpu.queue.write_buffer_with(&buffer.raw, at, size));
            let mut view = match view {
                Ok(Some(view)) => view,
                Ok(None) | Err(wgpu::Error::OutOfMemory { .. }) => {
                    self.gpu.check()?;
                    return Err(self.gpu.out_of_memory("staging of weights", size.get()));
                }
                Err(error) => {
                    let (device, what) = (self.gpu.info().name.clone(), format!("weight {name}: {error}"));
                    return Err(Error::Refused { device, what });
                }
            };
            let size = size.get() as usize;
            let mut filled = 0;
            while filled < size {
                if rest.is_empty() {
                    let Some(segment) = segments.next() else {
                        view.slice(filled..size).fill(0);
                        break;
                    };
                    rest = segment;
                }
                let (now, later) = rest.split_at(rest.len().min(size - filled));
                view.slice(filled..filled + now.len()).copy_from_slice(now);
                filled += now.len();
                rest = later;
            }
            let handed = self.gpu.scoped(|| drop(view));
            handed.map_err(|error| self.gpu.refused(&format!("weight {name}"), &error))?;
            at += size as u64;
            self.count(size as u64)?;
        }
        Ok(buffer)
    }

    fn count(&mut self, bytes: u64) -> Result<()> {
        self.gpu.check_stop()?;
        self.in_flight += bytes;
        self.done += bytes;
        if self.in_flight >= IN_FLIGHT {
            self.gpu.wait()?;
            self.in_flight = 0;
        }
        (self.progress)(Progress::Upload { done: self.done, total: self.total });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Selector;

    #[test]
    fn segments_of_any_length_follow_one_another_over_many_chunks() {
        let gpu =
            Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"));
        let lengths = [1, 0, 3, CHUNK as usize - 1, 7, 2 * CHUNK as usize, 65, 0, 12_345_678, 2];
        let total: usize = lengths.iter().sum();
        let bytes: Vec<u8> = (0..total as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        let mut rest = &bytes[..];
        let mut segments = Vec::new();
        for length in lengths {
            let (segment, behind) = rest.split_at(length);
            segments.push(segment);
            rest = behind;
        }
        let last = std::cell::Cell::new(0);
        let progress = |progress| {
            if let Progress::Upload { done, .. } = progress {
                last.set(done);
            }
        };
        let padded = (total as u64).next_multiple_of(16);
        let mut upload = Upload { gpu: &gpu, in_flight: 0, done: 0, total: padded, progress: &progress };
        let buffer = upload.buffer("segments", padded, segments.into_iter()).unwrap();
        assert_eq!((buffer.bytes(), last.get()), (padded, padded));
        let words = gpu.read(gpu.encoder("read"), &[(&buffer, 0, padded)]).unwrap();
        let found: &[u8] = bytemuck::cast_slice(&words);
        assert!(found[..total] == bytes[..], "the bytes arrive in order");
        assert!(found[total..].iter().all(|&byte| byte == 0), "the padding is zero");
    }
}
