//! Finding and opening devices.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use moewe_plan::{Plan, Precision};
use wgpu::{Features, InstanceFlags, PollError, PollType};

use crate::check::{check_cooperative, check_device};
use crate::memory::{self, Memory};
use crate::pipeline_cache::PipelineCache;
use crate::{Error, Result};

/// What sort of device it is, the preferred ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceType {
    /// A card of its own.
    Discrete,
    /// Part of the processor.
    Integrated,
    /// A share of a GPU, in a virtual machine.
    Virtual,
    /// A software driver.
    Cpu,
    /// Not told.
    Other,
}

impl DeviceType {
    /// The word for lists.
    pub fn name(self) -> &'static str {
        match self {
            DeviceType::Discrete => "discrete",
            DeviceType::Integrated => "integrated",
            DeviceType::Virtual => "virtual",
            DeviceType::Cpu => "cpu",
            DeviceType::Other => "other",
        }
    }
}

/// A device that can be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterInfo {
    /// Its place in the list, for [`Selector::Index`].
    pub index: usize,
    /// Name, as the driver gives it.
    pub name: String,
    /// PCI ids of its vendor and of the device itself.
    pub ids: [u32; 2],
    /// Name of the driver.
    pub driver: String,
    /// Version of the driver.
    pub driver_info: String,
    /// The interface it is reached through.
    pub backend: String,
    /// What sort of device it is.
    pub device_type: DeviceType,
    /// Invocations of the smallest and the largest subgroup.
    pub subgroup_size: [u32; 2],
    /// Bytes of the largest storage binding.
    pub max_binding_bytes: u64,
    /// Bytes of the largest buffer.
    pub max_buffer_bytes: u64,
    /// Storage buffers that a kernel can bind.
    pub storage_buffers: u32,
    /// Invocations of the largest workgroup.
    pub workgroup_invocations: u32,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// Workgroups in one dimension of a dispatch.
    pub workgroups: u32,
    /// Whether kernels can use subgroup operations.
    pub subgroups: bool,
    /// Whether kernels can compute in f16.
    pub shader_f16: bool,
    /// Rows and columns of the cooperative matrices of f16 with sums in f32, as far as kernels can name them (8, 16) and
    /// subgroups all have one size.
    pub cooperative: Vec<u32>,
    /// Whether the device can write timestamps.
    pub timestamps: bool,
    /// Bytes of memory, where they are known (software drivers).
    pub memory_bytes: Option<u64>,
}

/// Which device to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selector {
    /// The best one: discrete before integrated before virtual before software.
    #[default]
    Default,
    /// The one with this place in [`list`].
    Index(usize),
    /// The best one whose name or driver contains this, in any case.
    Name(String),
}

impl std::str::FromStr for Selector {
    type Err = std::convert::Infallible;

    /// A number is an index; nothing or `default` is the default; anything else is part of a name.
    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(match text.trim() {
            "" | "default" => Selector::Default,
            text => text.parse().map_or_else(|_| Selector::Name(text.into()), Selector::Index),
        })
    }
}

/// Longest time in one wait for the device. wgpu holds a lock meanwhile that a window needs to show its next picture.
const WAIT_SLICE: Duration = Duration::from_millis(2);

/// Errors that the device reported outside any call of ours.
#[derive(Debug, Default)]
struct Faults {
    lost: Mutex<Option<String>>,
    stray: Mutex<Option<String>>,
}

/// What a window needs to draw with an open device. The handles are cheap to clone and keep the device open.
///
/// Whoever uses them shares the device's queue. Their commands run in the order in which both submit, and may be
/// submitted and polled for from any thread: waiting here is always for a submission of our own. wgpu gives errors to
/// the innermost error scope of the thread that caused them. All calls of this crate are in such scopes and return what
/// was refused as [`Error`]; an error outside any scope is therefore one of the other side's, and goes to
/// [`Gpu::stray_error`]. A handler set with `on_uncaptured_error` in its place does no harm.
#[derive(Clone, Debug)]
pub struct Handles {
    /// The instance, for surfaces.
    pub instance: wgpu::Instance,
    /// The adapter that was chosen.
    pub adapter: wgpu::Adapter,
    /// The device.
    pub device: wgpu::Device,
    /// Its one queue.
    pub queue: wgpu::Queue,
}

/// An open device.
#[derive(Debug)]
pub struct Gpu {
    instance: wgpu::Instance,
    adapter: wgpu::Adapter,
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) limits: wgpu::Limits,
    pub(crate) memory: Arc<Memory>,
    info: AdapterInfo,
    faults: Arc<Faults>,
    stop: OnceLock<&'static AtomicBool>,
    pipeline_cache: OnceLock<Option<PipelineCache>>,
}

/// All Vulkan devices of this machine.
pub fn list() -> Vec<AdapterInfo> {
    adapters(&instance()).iter().enumerate().map(|(index, adapter)| describe(index, adapter)).collect()
}

fn instance() -> wgpu::Instance {
    let mut flags = InstanceFlags::empty();
    if cfg!(debug_assertions) {
        flags |= InstanceFlags::DEBUG | InstanceFlags::VALIDATION;
    }
    wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN,
        flags,
        // Where the driver reports its budget, creation fails before the system begins to swap.
        memory_budget_thresholds: wgpu::MemoryBudgetThresholds {
            for_resource_creation: Some(97),
            for_device_loss: None,
        },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    })
}

fn adapters(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    pollster::block_on(instance.enumerate_adapters(wgpu::Backends::VULKAN))
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> AdapterInfo {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let features = adapter.features();
    let device_type = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => DeviceType::Discrete,
        wgpu::DeviceType::IntegratedGpu => DeviceType::Integrated,
        wgpu::DeviceType::VirtualGpu => DeviceType::Virtual,
        wgpu::DeviceType::Cpu => DeviceType::Cpu,
        wgpu::DeviceType::Other => DeviceType::Other,
    };
    AdapterInfo {
        index,
        name: info.name,
        ids: [info.vendor, info.device],
        driver: info.driver,
        driver_info: info.driver_info,
        backend: info.backend.to_string(),
        device_type,
        subgroup_size: [info.subgroup_min_size, info.subgroup_max_size],
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        max_buffer_bytes: limits.max_buffer_size,
        storage_buffers: limits.max_storage_buffers_per_shader_stage,
        workgroup_invocations: limits.max_compute_invocations_per_workgroup,
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        workgroups: limits.max_compute_workgroups_per_dimension,
        subgroups: features.contains(Features::SUBGROUP),
        shader_f16: features.contains(Features::SHADER_F16),
        cooperative: if features.contains(COOPERATIVE) && info.subgroup_min_size == info.subgroup_max_size {
            cooperative_sizes(adapter)
        } else {
            Vec::new()
        },
        timestamps: features.contains(Features::TIMESTAMP_QUERY),
        memory_bytes: (device_type == DeviceType::Cpu).then(memory::host_bytes).flatten(),
    }
}

/// What kernels with cooperative matrices need.
const COOPERATIVE: Features =
    Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(Features::SHADER_F16).union(Features::SUBGROUP);

fn cooperative_sizes(adapter: &wgpu::Adapter) -> Vec<u32> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let there = adapter.cooperative_matrix_properties();
    let has = |size: u32| {
        there.iter().any(|matrix| {
            [matrix.m_size, matrix.n_size, matrix.k_size] == [size; 3] && (matrix.ab_type, matrix.cr_type) == (F16, F32)
        })
    };
    [8, 16].into_iter().filter(|&size| has(size)).collect()
}

/// The place of the chosen adapter.
fn choose(infos: &[AdapterInfo], selector: &Selector) -> Result<usize> {
    if infos.is_empty() {
        return Err(Error::NoDevice);
    }
    let best = |matches: &dyn Fn(&AdapterInfo) -> bool| {
        infos.iter().filter(|info| matches(info)).min_by_key(|info| info.device_type).map(|info| info.index)
    };
    let (chosen, wanted) = match selector {
        Selector::Default => (best(&|_| true), String::new()),
        Selector::Index(index) => (best(&|info| info.index == *index), format!("number {index}")),
        Selector::Name(name) => {
            let part = name.to_lowercase();
            let named =
                |info: &AdapterInfo| [&info.name, &info.driver].iter().any(|n| n.to_lowercase().contains(&part));
            (best(&named), format!("called {name:?}"))
        }
    };
    chosen.ok_or_else(|| {
        let found: Vec<String> = infos.iter().map(|info| format!("{}: {}", info.index, info.name)).collect();
        Error::NoSuchDevice { wanted, found: found.join(", ") }
    })
}

impl Gpu {
    /// Opens a device with all the limits it has and the features that kernels may use, save cooperative matrices: these are
    /// experimental in wgpu, and [`Gpu::for_plan`] adds them where they are needed.
    pub fn open(selector: &Selector) -> Result<Arc<Self>> {
        let instance = instance();
        let mut adapters = adapters(&instance);
        let infos: Vec<AdapterInfo> = adapters.iter().enumerate().map(|(i, adapter)| describe(i, adapter)).collect();
        let index = choose(&infos, selector)?;
        let (adapter, info) = (adapters.swap_remove(index), infos[index].clone());
        Self::request(instance, adapter, info, false)
    }

    /// The same device if programs of this precision can run on it as it was opened, else its adapter opened once more, with
    /// cooperative matrices.
    ///
    /// # Errors
    /// [`Error::Requirement`] and [`Error::Cooperative`] if the device does not have what such programs need; [`Error::Open`].
    pub fn for_plan(self: &Arc<Self>, plan: &Plan, precision: Precision) -> Result<Arc<Self>> {
        check_device(plan, self)?;
        match check_cooperative(plan, precision, &self.info)? {
            0 => Ok(Arc::clone(self)),
            _ => self.with_cooperative(),
        }
    }

    /// The same device if it was opened with cooperative matrices or has none, else its adapter opened once more, with them.
    pub fn with_cooperative(self: &Arc<Self>) -> Result<Arc<Self>> {
        if self.info.cooperative.is_empty() || self.cooperative().is_some() {
            return Ok(Arc::clone(self));
        }
        let opened = Self::request(self.instance.clone(), self.adapter.clone(), self.info.clone(), true)?;
        if let Some(flag) = self.stop.get() {
            opened.stop_when(flag);
        }
        if let Some(cache) = self.pipeline_cache() {
            opened.cache_pipelines_in(cache.dir());
        }
        Ok(opened)
    }

    /// Rows and columns of the largest cooperative matrices (f16 with sums in f32) that kernels can use; `None` if the device was
    /// opened without them.
    pub fn cooperative(&self) -> Option<u32> {
        self.info.cooperative.iter().copied().max().filter(|_| self.device.features().contains(COOPERATIVE))
    }

    fn request(
        instance: wgpu::Instance,
        adapter: wgpu::Adapter,
        info: AdapterInfo,
        cooperative: bool,
    ) -> Result<Arc<Self>> {
        let mut wanted =
            Features::SUBGROUP | Features::SHADER_F16 | Features::TIMESTAMP_QUERY | Features::PIPELINE_CACHE;
        let mut experimental_features = wgpu::ExperimentalFeatures::disabled();
        if cooperative {
            wanted |= COOPERATIVE;
            // SAFETY: the one condition is to accept that wgpu's own code for such features may be unsound. They are used by
            // our kernels `gemm_coop` and `product_cooperative` alone.
            #[allow(unsafe_code)]
            let accepted = unsafe { wgpu::ExperimentalFeatures::enabled() };
            experimental_features = accepted;
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("moewe"),
            required_features: adapter.features() & wanted,
            required_limits: adapter.limits(),
            experimental_features,
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|error| Error::Open { device: info.name.clone(), what: error.to_string() })?;
        let faults = Arc::new(Faults::default());
        let stray = Arc::clone(&faults);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            // The first error is the cause, later ones are its consequences.
            stray.stray.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.to_string());
        }));
        let lost = Arc::clone(&faults);
        device.set_device_lost_callback(move |reason, what| {
            let what = if what.is_empty() { format!("{reason:?}") } else { what };
            lost.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
        });
        let memory = Arc::new(Memory::new(info.memory_bytes));
        let (limits, stop, pipeline_cache) = (device.limits(), OnceLock::new(), OnceLock::new());
        Ok(Arc::new(Self { instance, adapter, device, queue, limits, memory, info, faults, stop, pipeline_cache }))
    }

    /// What another part of this process needs to draw with this device.
    pub fn handles(&self) -> Handles {
        Handles {
            instance: self.instance.clone(),
            adapter: self.adapter.clone(),
            device: self.device.clone(),
            queue: self.queue.clone(),
        }
    }

    /// A second device on the same adapter, for a window that is drawn while this one computes. A surface cannot be
    /// configured on a device to which another thread submits: wgpu waits until the device is idle, refuses if it is not
    /// then, and panics when the next frame is drawn. It also has a queue of its own, so that no frame waits for a pass
    /// of the model.
    pub fn for_window(&self) -> Result<Handles> {
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("moewe window"),
            required_limits: wgpu::Limits::default().using_resolution(self.adapter.limits()),
            ..wgpu::DeviceDescriptor::default()
        };
        let (device, queue) = pollster::block_on(self.adapter.request_device(&descriptor))
            .map_err(|error| Error::Open { device: self.info.name.clone(), what: error.to_string() })?;
        Ok(Handles { instance: self.instance.clone(), adapter: self.adapter.clone(), device, queue })
    }

    /// The first error since the last call that the device reported for commands of those who share it by
    /// [`Gpu::handles`], outside any error scope of theirs. Errors of this crate's own commands are never among them.
    pub fn stray_error(&self) -> Option<String> {
        self.faults.stray.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What device this is.
    pub fn info(&self) -> &AdapterInfo {
        &self.info
    }

    /// From now on loading, making pipelines and prefill end with [`Error::Interrupted`] soon after `flag` is set.
    pub fn stop_when(&self, flag: &'static AtomicBool) {
        let _ = self.stop.set(flag); // a second flag has no say
    }

    /// From now on what the driver compiles is kept in a file in `dir`, one for each device, for pipelines of later
    /// processes. A directory that cannot be read or written, and a file that is damaged or of another device or driver, do
    /// no harm.
    pub fn cache_pipelines_in(&self, dir: &Path) {
        // A second directory has no say.
        self.pipeline_cache.get_or_init(|| {
            let can = self.device.features().contains(Features::PIPELINE_CACHE);
            can.then(|| PipelineCache::open(self, &self.adapter.get_info(), dir)).flatten()
        });
    }

    /// The driver's cache, if it is kept.
    pub(crate) fn pipeline_cache(&self) -> Option<&PipelineCache> {
        self.pipeline_cache.get()?.as_ref()
    }

    /// An error if the caller asked to stop.
    pub(crate) fn check_stop(&self) -> Result<()> {
        if self.stop.get().is_some_and(|stop| stop.load(Ordering::Relaxed)) { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Bytes of device memory that buffers of this program hold.
    pub fn held_bytes(&self) -> u64 {
        self.memory.held()
    }

    /// An error if the device was lost.
    pub(crate) fn check(&self) -> Result<()> {
        match self.faults.lost.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            None => Ok(()),
            Some(what) => Err(Error::DeviceLost { device: self.info.name.clone(), what }),
        }
    }

    /// What it means that the device refused what was done for `name`.
    pub(crate) fn refused(&self, name: &str, error: &wgpu::Error) -> Error {
        // wgpu tells of a lost device when it is polled.
        let _ = self.device.poll(PollType::Poll);
        if let Err(lost) = self.check() {
            return lost;
        }
        match error {
            wgpu::Error::OutOfMemory { .. } => self.out_of_memory(name, 0),
            error => Error::Refused { device: self.info.name.clone(), what: format!("{name}: {error}") },
        }
    }

    /// The error that device memory is exhausted.
    pub(crate) fn out_of_memory(&self, name: &str, bytes: u64) -> Error {
        Error::OutOfMemory {
            device: self.info.name.clone(),
            name: name.into(),
            bytes,
            held: self.memory.held(),
            budget: self.memory.budget(),
        }
    }

    /// Runs `make` and returns the errors it caused on the device, the first one if several.
    pub(crate) fn scoped<T>(&self, make: impl FnOnce() -> T) -> std::result::Result<T, wgpu::Error> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = make();
        let errors = [validation, internal, memory].map(|scope| pollster::block_on(scope.pop()));
        match errors.into_iter().flatten().next() {
            Some(error) => Err(error),
            None => Ok(made),
        }
    }

    /// Ends recording.
    pub(crate) fn finish(&self, encoder: wgpu::CommandEncoder) -> Result<wgpu::CommandBuffer> {
        self.scoped(|| encoder.finish()).map_err(|error| self.refused("a command", &error))
    }

    /// Submits commands, after all that was written to buffers before.
    pub(crate) fn submit(&self, commands: wgpu::CommandBuffer) -> Result<wgpu::SubmissionIndex> {
        let submitted = self.scoped(|| self.queue.submit([commands]));
        let index = submitted.map_err(|error| self.refused("a submission", &error))?;
        self.check()?;
        Ok(index)
    }

    /// Waits until the device has done all that was submitted before this call.
    pub(crate) fn wait(&self) -> Result<()> {
        let index = self.scoped(|| self.queue.submit([]));
        self.wait_for(&index.map_err(|error| self.refused("an empty submission", &error))?)
    }

    /// Waits until the device has done a submission, however much others submit meanwhile.
    pub(crate) fn wait_for(&self, index: &wgpu::SubmissionIndex) -> Result<()> {
        loop {
            let slice = PollType::Wait { submission_index: Some(index.clone()), timeout: Some(WAIT_SLICE) };
            let polled = self.device.poll(slice);
            self.check()?;
            match polled {
                Ok(_) => return Ok(()),
                Err(PollError::Timeout) => {}
                Err(error) => {
                    // A submission to a lost device has no number that could be waited for.
                    let _ = self.device.poll(PollType::Poll);
                    self.check()?;
                    return Err(Error::Refused { device: self.info.name.clone(), what: error.to_string() });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: usize, name: &str, device_type: DeviceType) -> AdapterInfo {
        AdapterInfo {
            index,
            name: name.into(),
            ids: [0; 2],
            driver: format!("{name} driver"),
            driver_info: String::new(),
            backend: "vulkan".into(),
            device_type,
            subgroup_size: [8, 8],
            max_binding_bytes: 1,
            max_buffer_bytes: 1,
            storage_buffers: 1,
            workgroup_invocations: 1,
            workgroup_bytes: 1,
            workgroups: 1,
            subgroups: false,
            shader_f16: false,
            cooperative: Vec::new(),
            timestamps: false,
            memory_bytes: None,
        }
    }

    #[test]
    fn real_devices_are_preferred_to_software() {
        let devices = [
            device(0, "llvmpipe", DeviceType::Cpu),
            device(1, "Intel Arc", DeviceType::Integrated),
            device(2, "NVIDIA H100", DeviceType::Discrete),
            device(3, "NVIDIA H100", DeviceType::Discrete),
        ];
        let chosen = |selector: &Selector| choose(&devices, selector);
        assert_eq!(chosen(&Selector::Default).unwrap(), 2);
        assert_eq!(chosen(&Selector::Index(3)).unwrap(), 3);
        assert_eq!(chosen(&Selector::Name("ARC".into())).unwrap(), 1);
        assert_eq!(chosen(&Selector::Name("driver".into())).unwrap(), 2);
        let error = chosen(&Selector::Name("radeon".into())).unwrap_err().to_string();
        assert_eq!(
            error,
            "no device is called \"radeon\"; there are: 0: llvmpipe, 1: Intel Arc, 2: NVIDIA H100, 3: NVIDIA H100"
        );
        assert!(matches!(choose(&[], &Selector::Default), Err(Error::NoDevice)));
    }
    #[test]
    fn a_lost_device_gives_an_error_from_then_on() {
        let gpu =
            Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"));
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let buffer = gpu.buffer("before", 64, usage).unwrap();
        gpu.device.destroy();
        // wgpu tells of the loss when it is polled next.
        assert!(matches!(gpu.wait(), Err(Error::DeviceLost { .. })));
        for _ in 0..2 {
            assert!(matches!(gpu.buffer("after", 64, usage), Err(Error::DeviceLost { .. })));
            assert!(matches!(gpu.read(gpu.encoder("read"), &[(&buffer, 0, 64)]), Err(Error::DeviceLost { .. })));
        }
    }
}
