//! A bundle on a device: its weights and pipelines.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use moewe_plan::{Binding, Bundle, Plan, Precision, Program, ProgramKind};

use crate::check::{check_cooperative, check_device, check_plan};
use crate::load::{self, Loaded, ShardId, padded_bytes, shard_of};
use crate::memory::Buffer;
use crate::pipelines::{self, Pipeline};
use crate::{Error, Gpu, Result};

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
    weights: BTreeMap<ShardId, Buffer>,
    pub(crate) pipelines: Vec<OnceLock<Pipeline>>,
    kinds: Vec<ProgramKind>,
    loaded: Loaded,
}

/// What is loaded of a bundle.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions<'a> {
    /// Programs whose weights are uploaded.
    pub kinds: &'a [ProgramKind],
    /// Programs whose pipelines are made meanwhile; [`Model::prepare`] makes others later.
    pub prepare: &'a [ProgramKind],
    /// The precision of those.
    pub precision: Precision,
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
        Self::load_with(gpu, bundle, LoadOptions { kinds, prepare: &[], precision: Precision::Exact }, progress)
    }

    /// Verifies the bundle's weights, uploads those that are needed, and makes pipelines, all at the same time.
    pub fn load_with(
        gpu: &Arc<Gpu>,
        bundle: &Bundle,
        options: LoadOptions,
        progress: &dyn Fn(Progress),
    ) -> Result<Arc<Self>> {
        let plan = bundle.plan.clone();
        check_plan(&plan)?;
        check_device(&plan, gpu)?;
        let pipelines = plan.kernels.iter().map(|_| OnceLock::new()).collect();
        let (gpu, kernels, kinds) = (Arc::clone(gpu), bundle.kernels.clone(), options.kinds.to_vec());
        let (weights, loaded) = (BTreeMap::new(), Loaded::default());
        let mut model = Self { gpu, plan, kernels, weights, pipelines, kinds, loaded };
        let shards: BTreeSet<ShardId> = model
            .plan
            .programs
            .iter()
            .filter(|program| options.kinds.contains(&program.kind))
            .flat_map(|program| &program.steps)
            .flat_map(|step| &step.bindings)
            .filter_map(|binding| match *binding {
                Binding::Weight { weight, shard } => Some((weight, shard)),
                _ => None,
            })
            .collect();
        let total = shards.iter().map(|&id| padded_bytes(shard_of(&model.plan, id).1)).sum();
        if !model.gpu.memory.has(total) {
            return Err(model.gpu.out_of_memory("the weights", total));
        }
        let files = bundle.map_weights()?;
        let prepare = |progress: &dyn Fn(Progress)| model.prepare(options.prepare, options.precision, progress);
        (model.weights, model.loaded) = load::load(&model.gpu, &model.plan, &files, &shards, &prepare, progress)?;
        Ok(Arc::new(model))
    }

    /// How its weights were loaded.
    pub fn loaded(&self) -> Loaded {
        self.loaded
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

    /// Makes the pipelines of programs of these kinds, in parallel. Those that exist already are kept. Programs may need a device
    /// that was opened by [`Gpu::for_plan`].
    pub fn prepare(&self, kinds: &[ProgramKind], precision: Precision, progress: &dyn Fn(Progress)) -> Result<()> {
        if check_cooperative(&self.plan, precision, self.gpu.info())? > 0 && self.gpu.cooperative().is_none() {
            return Err(Error::NotCooperative { device: self.gpu.info().name.clone() });
        }
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
