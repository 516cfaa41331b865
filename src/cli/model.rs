//! From the argument MODEL to a model on a device.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use moewe::text::{GenerationDefaults, Text};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{self, Options};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, Plan, Precision, ProgramKind, TapChoice, TunedOn};
use moewe_runtime::{
    AdapterInfo, DeviceType, Gpu, LoadOptions, Model, Progress, Selector, Session, SessionOptions, Watch,
};

use super::args::{DeviceArgs, ModelArgs};
use super::progress::Bars;
use super::{cache, interrupt, output, usage};

/// Opens a device, which keeps its pipelines on disk. `--device list` prints the devices and gives `None`.
pub fn open_device(args: &DeviceArgs) -> anyhow::Result<Option<Arc<Gpu>>> {
    let gpu = choose_device(args)?;
    // Without a cache directory kernels are compiled at each start.
    if let (Some(gpu), Ok(dir)) = (&gpu, cache::pipelines_dir()) {
        gpu.cache_pipelines_in(&dir);
    }
    Ok(gpu)
}

/// Like [`open_device`], for pipelines that nobody needs again.
pub fn choose_device(args: &DeviceArgs) -> anyhow::Result<Option<Arc<Gpu>>> {
    if args.is_list() {
        let list = moewe_runtime::list();
        if list.is_empty() {
            Gpu::open(&Selector::Default)?; // says what to do
        }
        for adapter in list {
            let kind = adapter.device_type.name();
            output::write(&format!(
                "{}  {} ({kind}, {} {})\n",
                adapter.index, adapter.name, adapter.driver, adapter.driver_info
            ))?;
        }
        return Ok(None);
    }
    let selector = args.device.as_deref().map_or(Selector::Default, |device| device.parse().unwrap_or_default());
    Ok(Some(Gpu::open(&selector)?))
}

/// The profile that suits a device.
pub fn profile_for(info: &AdapterInfo) -> &'static str {
    let is_hopper = ["H100", "H200", "H800", "H20", "GH200"].iter().any(|name| info.name.contains(name));
    match info.device_type {
        DeviceType::Cpu => "lavapipe",
        _ if is_hopper && info.subgroup_size == [32, 32] && info.cooperative.contains(&16) => "hopper",
        _ => "generic-vulkan",
    }
}

/// A model that was found and compiled, but not loaded.
pub struct Opened {
    gpu: Arc<Gpu>,
    bundle: Bundle,
    precision: Precision,
    /// Tokenizer and template, if the checkpoint has them.
    pub text: Option<Text>,
    /// What the checkpoint recommends.
    pub defaults: GenerationDefaults,
}

/// Opens MODEL: a bundle as it is, a checkpoint through the cache. `None` if only the devices were to be listed.
pub fn open(args: &ModelArgs) -> anyhow::Result<Option<Opened>> {
    let path = args.path();
    if !args.device.is_list() {
        if path.as_os_str().is_empty() {
            return usage("no MODEL: give a checkpoint directory or a bundle");
        }
        must_exist(path, "MODEL is a checkpoint directory or a bundle")?;
    }
    let Some(gpu) = open_device(&args.device)? else { return Ok(None) };
    gpu.stop_when(interrupt::flag());
    open_on(gpu, args).map(Some)
}

/// Opens MODEL, which must exist, on a device that is open already.
pub fn open_on(gpu: Arc<Gpu>, args: &ModelArgs) -> anyhow::Result<Opened> {
    let path = args.path();
    let bundle = if Bundle::is_bundle(path) {
        if args.target.is_some() {
            return usage("--target does not apply to a bundle: it is compiled already");
        }
        Bundle::open(path)?
    } else if path.join("manifest.json").exists() || path.join("plan.json").exists() {
        Bundle::open(path)? // says what is wrong with it
    } else if path.is_file() {
        return usage(format!("{}: is a file; MODEL is the directory of a checkpoint or a bundle", path.display()));
    } else {
        compiled(path, args, &gpu)?
    };
    warn(&bundle.plan.warnings);
    if let Some(on) = &bundle.plan.requirements.tuned_on {
        warn_of_other_device(&bundle.plan.requirements.profile, on, gpu.info());
    }
    // From where the user knows them, also if the bundle is a cached one.
    let text = Text::load(path)?;
    if let Some(text) = &text
        && text.max_id() >= bundle.plan.model.vocab_size
    {
        output::note(&format!(
            "moewe: warning: {}: the tokenizer has ids up to {}, the model a vocabulary of {}; text with such tokens fails",
            path.display(),
            text.max_id(),
            bundle.plan.model.vocab_size
        ));
    }
    let defaults = match &text {
        Some(text) => text.generation().clone(),
        None => GenerationDefaults::load(path)?,
    };
    let mut opened = Opened { gpu, bundle, precision: args.precision.into(), text, defaults };
    opened.open_for(args.precision.into())?;
    Ok(opened)
}

/// A usage error if there is nothing at `path`.
pub fn must_exist(path: &Path, expected: &str) -> anyhow::Result<()> {
    match path.metadata() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            usage(format!("{}: no such file or directory; {expected}", path.display()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

impl Opened {
    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.bundle.plan
    }

    /// The bundle.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Opens the device once more if programs of this precision need what it was opened without.
    pub fn open_for(&mut self, precision: Precision) -> anyhow::Result<()> {
        self.gpu = self.gpu.for_plan(&self.bundle.plan, precision)?;
        Ok(())
    }

    /// Loads the weights that programs of these kinds need, and makes their pipelines.
    pub fn load(&self, kinds: &[ProgramKind]) -> anyhow::Result<Arc<Model>> {
        self.load_first(kinds, &[])
    }

    /// Like [`Opened::load`], also with the weights of others, whose pipelines are made when they are needed.
    pub fn load_first(&self, first: &[ProgramKind], others: &[ProgramKind]) -> anyhow::Result<Arc<Model>> {
        let kinds: Vec<ProgramKind> = first.iter().chain(others).copied().collect();
        let options = LoadOptions { kinds: &kinds, prepare: first, precision: self.precision };
        let bars = Bars::default();
        Ok(Model::load_with(&self.gpu, &self.bundle, options, &|progress| match progress {
            Progress::Verify { done, total } => bars.set("verifying weights", done, total, true),
            Progress::Upload { done, total } => bars.set("loading weights", done, total, true),
            Progress::Pipelines { done, total } => bars.set("making pipelines", done, total, false),
        })?)
    }
}

/// A session for one sequence and programs of these kinds, with a progress bar for its pipelines; watched if `taps` are
/// given.
pub fn session(
    model: &Arc<Model>,
    args: &ModelArgs,
    kinds: &[ProgramKind],
    taps: Option<TapChoice>,
) -> anyhow::Result<Session> {
    let watch = taps.map(|taps| Watch { taps, ..Watch::default() });
    let precision = args.precision.into();
    session_with(model, SessionOptions { precision, kinds: kinds.to_vec(), watch, ..SessionOptions::default() })
}

/// A session for several sequences.
pub fn shared_session(
    model: &Arc<Model>,
    args: &ModelArgs,
    kinds: &[ProgramKind],
    max_sequences: u32,
) -> anyhow::Result<Session> {
    let precision = args.precision.into();
    let kinds = kinds.to_vec();
    session_with(model, SessionOptions { precision, kinds, max_sequences, ..SessionOptions::default() })
}

/// A session with these options, with a progress bar for its pipelines.
pub fn session_with(model: &Arc<Model>, options: SessionOptions) -> anyhow::Result<Session> {
    let bars = Bars::default();
    model.prepare(&options.kinds, options.precision, &|progress| {
        if let Progress::Pipelines { done, total } = progress {
            bars.set("making pipelines", done, total, false);
        }
    })?;
    Ok(Session::new(model.clone(), options)?)
}

/// The cached bundle of a checkpoint, compiled if there is none.
fn compiled(path: &Path, args: &ModelArgs, gpu: &Gpu) -> anyhow::Result<Bundle> {
    let checkpoint = Checkpoint::open(path)?;
    if !checkpoint.has_weights() {
        // Says which files were looked for.
        moewe_compiler::tensors::check(&checkpoint)?;
    }
    let profile = Profile::load(args.target.as_deref().unwrap_or_else(|| profile_for(gpu.info())))?;
    let dir = cache::bundle_dir(&checkpoint, &profile)?;
    let _lock = cache::lock(&dir)?;
    if let Ok(bundle) = Bundle::open(&dir) {
        return Ok(bundle);
    }
    let bars = Bars::default();
    let options = Options {
        profile,
        weights: None,
        reference: true,
        plan_only: false,
        latents: moewe_plan::Latent::F16,
        taps: TapChoice::all(),
    };
    let progress = |done, total| bars.set("compiling", done, total, true);
    compile::compile_until(&checkpoint, &options, &dir, &progress, interrupt::flag())?;
    drop(bars);
    Bundle::open(&dir).with_context(|| format!("the bundle of {} that was just compiled", path.display()))
}

/// Says so if a profile was tuned on another device or with another driver than this one.
fn warn_of_other_device(profile: &str, on: &TunedOn, here: &AdapterInfo) {
    let there = [&on.device, &on.driver, &on.driver_info];
    let here = [&here.name, &here.driver, &here.driver_info];
    if there != here {
        let [there, here] = [there, here].map(|[device, driver, version]| format!("{device} ({driver} {version})"));
        output::note(&format!(
            "moewe: warning: profile {profile} was tuned on {there}, and this is {here}; it may be slower than it could be, \
             `moewe tune` measures here"
        ));
    }
}

/// Prints warnings of the compiler.
pub fn warn(warnings: &[String]) {
    for warning in warnings.iter().take(10) {
        output::note(&format!("moewe: warning: {warning}"));
    }
    if warnings.len() > 10 {
        output::note(&format!("moewe: warning: … and {} more such tensors", warnings.len() - 10));
    }
}
