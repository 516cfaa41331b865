//! Runs one kernel on the Vulkan device: named buffers in, named buffers out.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use moewe_plan::Access;
use moewe_shaders::{BLOCK, Linked, Reduce, Variant, link};

use super::data::Matrix;

/// Words behind the end of each storage buffer. Behind inputs all bits are set (NaN, or an index far outside), so that
/// reading there shows; outputs must keep theirs.
const GUARD: usize = 64;

/// What outputs hold before a kernel writes them: a NaN that no kernel computes.
pub const UNTOUCHED: u32 = 0x7fde_adbe;

struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    /// Lanes that subgroup shuffles surely reach; 0 without such operations.
    subgroup: u32,
    /// Sizes of cooperative matrices of f16 with sums in f32, for subgroups that all have `subgroup` lanes.
    cooperative: Vec<usize>,
    kernels: Mutex<HashMap<String, Arc<Kernel>>>,
}

struct Kernel {
    linked: Linked,
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// The one device of this process.
fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: wgpu::Backends::VULKAN,
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::VULKAN));
        assert!(!adapters.is_empty(), "these tests need a Vulkan device; `make setup` installs a software one");
        adapters.sort_by_key(|adapter| adapter.get_info().device_type != wgpu::DeviceType::DiscreteGpu);
        let (adapter, info) = (&adapters[0], adapters[0].get_info());
        let matrices = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16;
        let mut features = adapter.features() & (wgpu::Features::SUBGROUP | matrices);
        let subgroup = if features.contains(wgpu::Features::SUBGROUP) { info.subgroup_min_size } else { 0 };
        let fixed = subgroup > 0 && subgroup == info.subgroup_max_size && features.contains(matrices);
        let sizes = if fixed { cooperative_sizes(adapter) } else { Vec::new() };
        if sizes.is_empty() {
            features.remove(matrices);
        }
        println!(
            "device: {} ({}), subgroups of {subgroup}, cooperative matrices {sizes:?}",
            info.name, info.driver_info
        );
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("kernel tests"),
            required_features: features,
            required_limits: adapter.limits(),
            experimental_features: experimental(!sizes.is_empty()),
            ..Default::default()
        }))
        .unwrap_or_else(|error| panic!("{} cannot be opened: {error}", info.name));
        Gpu { device, queue, subgroup, cooperative: sizes, kernels: Mutex::default() }
    })
}

/// Rows and columns of an adapter's cooperative matrices of f16 with sums in f32.
fn cooperative_sizes(adapter: &wgpu::Adapter) -> Vec<usize> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let there = adapter.cooperative_matrix_properties();
    let has = |size: u32| {
        there.iter().any(|matrix| {
            [matrix.m_size, matrix.n_size, matrix.k_size] == [size; 3] && (matrix.ab_type, matrix.cr_type) == (F16, F32)
        })
    };
    [8, 16].into_iter().filter(|&size| has(size)).map(|size| size as usize).collect()
}

#[expect(unsafe_code, reason = "wgpu asks for it where its features are experimental")]
fn experimental(wanted: bool) -> wgpu::ExperimentalFeatures {
    if wanted {
        // SAFETY: the one condition is to know that wgpu's code for such features may be unsound.
        unsafe { wgpu::ExperimentalFeatures::enabled() }
    } else {
        wgpu::ExperimentalFeatures::disabled()
    }
}

/// A way to go through the rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// How lanes add up.
    pub reduce: Reduce,
    pub workgroup: usize,
    /// Invocations that share rows.
    pub lanes: usize,
    /// Rows that they share.
    pub rows: usize,
    /// Whether subgroups load inputs together, where rows divide into blocks.
    pub pooled: bool,
}

impl Way {
    pub const fn new(reduce: Reduce, workgroup: usize, lanes: usize) -> Self {
        Self { reduce, workgroup, lanes, rows: 1, pooled: false }
    }

    /// Plugs the way into a variant that multiplies rows of this matrix: in blocks where that is possible.
    pub fn plug(self, variant: Variant, matrix: &Matrix) -> Variant {
        let wide = matrix.divides_into(BLOCK);
        variant
            .reduce(self.reduce)
            .wide(wide)
            .flag("aligned", matrix.columns.is_multiple_of(4))
            .flag("pooled", self.pooled && wide)
            .int("WG", self.workgroup)
            .int("LANES", self.lanes)
            .int("ROWS", self.rows)
    }

    /// Workgroups for so many rows of a matrix.
    pub fn groups(self, rows: usize) -> usize {
        rows.div_ceil(self.rows * self.workgroup / self.lanes)
    }
}

/// Ways to go through rows that this device can run.
pub fn ways() -> Vec<Way> {
    let mut ways = vec![
        Way::new(Reduce::None, 32, 1),
        Way { rows: 3, ..Way::new(Reduce::None, 32, 1) },
        Way::new(Reduce::Workgroup, 128, 32),
        Way { rows: 2, ..Way::new(Reduce::Workgroup, 128, 16) },
        Way::new(Reduce::Workgroup, 32, 32),
        Way::new(Reduce::Workgroup, 64, 2),
    ];
    let subgroup = gpu().subgroup as usize;
    let lanes = [4, 8, 32].into_iter().filter(|&lanes| lanes <= subgroup);
    ways.extend(lanes.map(|lanes| Way::new(Reduce::Subgroup, 64, lanes)));
    if subgroup >= 8 {
        ways.extend([1, 4].map(|rows| Way { rows, pooled: true, ..Way::new(Reduce::None, 32, 1) }));
    }
    ways
}

/// Lanes that subgroup shuffles surely reach; 0 without such operations.
pub fn subgroup() -> usize {
    gpu().subgroup as usize
}

/// Rows and columns of this device's cooperative matrices of f16 with sums in f32; empty without them.
pub fn cooperative() -> &'static [usize] {
    &gpu().cooperative
}

impl Kernel {
    /// The kernel of a variant, made once.
    fn get(variant: &Variant) -> Arc<Self> {
        let name = variant.name();
        let find = || gpu().kernels.lock().unwrap_or_else(PoisonError::into_inner).get(&name).cloned();
        find().unwrap_or_else(|| {
            let made = Arc::new(Self::make(variant));
            gpu().kernels.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), made.clone());
            made
        })
    }

    fn make(variant: &Variant) -> Self {
        let linked = link(variant).unwrap_or_else(|error| panic!("{error}"));
        let (device, name) = (&gpu().device, variant.name());
        let label = Some(name.as_str());
        let entries: Vec<_> = (0..)
            .zip(&linked.bindings)
            .map(|(binding, layout)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match layout.access {
                        Access::Uniform => wgpu::BufferBindingType::Uniform,
                        Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
                        Access::ReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let source = wgpu::ShaderSource::Wgsl(linked.wgsl.as_str().into());
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label, source });
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            // Kernels write what they read of it.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        Self { linked, pipeline, layout }
    }
}

/// A dispatch in the making.
pub struct Call {
    kernel: Arc<Kernel>,
    buffers: BTreeMap<String, Vec<u32>>,
}

/// What a dispatch left in the buffers that it may write.
pub struct Outputs(BTreeMap<String, Vec<u32>>);

impl Outputs {
    pub fn words(&self, name: &str) -> &[u32] {
        self.0.get(name).unwrap_or_else(|| panic!("no output {name}"))
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name).iter().map(|&word| f32::from_bits(word)).collect()
    }
}

impl Call {
    pub fn new(variant: &Variant) -> Self {
        Self { kernel: Kernel::get(variant), buffers: BTreeMap::new() }
    }

    pub fn words(mut self, name: &str, words: &[u32]) -> Self {
        assert!(self.buffers.insert(name.into(), words.to_vec()).is_none(), "{name} is there already");
        self
    }

    pub fn floats(self, name: &str, numbers: &[f32]) -> Self {
        self.words(name, &bits(numbers))
    }

    /// A vector of numbers that the kernel reads in fours.
    pub fn fours(self, name: &str, numbers: &[f32]) -> Self {
        let mut padded = bits(numbers);
        padded.resize(numbers.len().next_multiple_of(4), 0);
        self.words(name, &padded)
    }

    /// An output of so many words, none of them written yet.
    pub fn output(self, name: &str, words: usize) -> Self {
        self.words(name, &vec![UNTOUCHED; words])
    }

    pub fn batch(self, tokens: usize, rows: usize) -> Self {
        self.words("batch", &[tokens as u32, rows as u32, 0, 0, 0, 0, 0, 0])
    }

    pub fn part(self, first: usize, count: usize, over_rows: bool) -> Self {
        self.words("part", &[first as u32, count as u32, u32::from(over_rows), 0])
    }

    /// Rows `first … first + count - 1` of a matrix, with all its scales under `{name}_scale`.
    pub fn matrix(self, name: &str, matrix: &Matrix, first: usize, count: usize) -> Self {
        let call = self.words(name, &matrix.row_words(first, count));
        let scales = matrix.scale_words();
        if scales.is_empty() { call } else { call.words(&format!("{name}_scale"), &scales) }
    }

    /// Dispatches and waits. Every binding must have a buffer, and every buffer a binding.
    pub fn run(mut self, grid: [usize; 3]) -> Outputs {
        let gpu = gpu();
        let (mut buffers, mut outputs) = (Vec::new(), Vec::new());
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let create = |words: usize, usage| {
            let size = 4 * words as u64;
            gpu.device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        for layout in &self.kernel.linked.bindings {
            let name = &layout.name;
            let mut words = self.buffers.remove(name).unwrap_or_else(|| panic!("nothing is bound to {name}"));
            let usage = match layout.access {
                Access::Uniform => wgpu::BufferUsages::UNIFORM,
                Access::Read | Access::ReadWrite => wgpu::BufferUsages::STORAGE,
            };
            let length = words.len();
            match layout.access {
                Access::Uniform => assert!(length == 4 || length == 8, "{name} is a uniform of {length} words"),
                Access::Read => words.extend([u32::MAX; GUARD]),
                Access::ReadWrite => words.extend([UNTOUCHED; GUARD]),
            }
            let both = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
            let buffer = create(words.len(), usage | both);
            gpu.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
            if layout.access == Access::ReadWrite {
                outputs.push((name.clone(), length, buffers.len()));
            }
            buffers.push(buffer);
        }
        assert!(self.buffers.is_empty(), "no bindings for {:?}", self.buffers.keys());

        let entries: Vec<_> = (0..)
            .zip(&buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let group = gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.kernel.layout,
            entries: &entries,
        });
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&self.kernel.pipeline);
            pass.set_bind_group(0, &group, &[]);
            let [x, y, z] = grid.map(|size| size as u32);
            pass.dispatch_workgroups(x, y, z);
        }
        let mut reads = Vec::new();
        for (name, length, index) in outputs {
            let words = length + GUARD;
            let target = create(words, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);
            encoder.copy_buffer_to_buffer(&buffers[index], 0, &target, 0, 4 * words as u64);
            reads.push((name, length, target));
        }
        gpu.queue.submit([encoder.finish()]);
        for (_, _, target) in &reads {
            target.slice(..).map_async(wgpu::MapMode::Read, |result| result.expect("the device reads back"));
        }
        gpu.device.poll(wgpu::PollType::wait_indefinitely()).expect("the device finishes");
        let read = |(name, length, target): (String, usize, wgpu::Buffer)| {
            let view = target.slice(..).get_mapped_range().expect("mapped above");
            let mut words: Vec<u32> = bytemuck::cast_slice(&view).to_vec();
            let guard = words.split_off(length);
            assert!(guard.iter().all(|&word| word == UNTOUCHED), "the kernel wrote behind the end of {name}");
            (name, words)
        };
        Outputs(reads.into_iter().map(read).collect())
    }
}

/// Bits of numbers.
pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}
