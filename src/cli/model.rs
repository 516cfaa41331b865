//! From the argument MODEL to a model on a device.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use moewe::text::{GenerationDefaults, Text};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{self, Options};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, ProgramKind};
use moewe_runtime::{AdapterInfo, DeviceType, Gpu, Model, Progress, Selector, Session, SessionOptions};

use super::args::{DeviceArgs, ModelArgs};
use super::progress::Bars;
use super::{cache, interrupt, output, usage};

/// A model with all that is needed to turn text into text.
pub struct Loaded {
    /// On the device.
    pub model: Arc<Model>,
    /// Tokenizer and template, if the checkpoint has them.
    pub text: Option<Text>,
    /// What the checkpoint recommends.
    pub defaults: GenerationDefaults,
}

/// Opens a device. `--device list` prints the devices and gives `None`.
pub fn open_device(args: &DeviceArgs) -> anyhow::Result<Option<Arc<Gpu>>> {
    if args.device.as_deref() == Some("list") {
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
        _ if is_hopper && info.subgroups && info.subgroup_size == [32, 32] => "hopper",
        _ => "generic-vulkan",
    }
}

/// Opens MODEL for programs of these kinds: a bundle as it is, a checkpoint through the cache. `None` if only the devices
/// were to be listed.
pub fn load(args: &ModelArgs, kinds: impl Fn(&Bundle) -> Vec<ProgramKind>) -> anyhow::Result<Option<Loaded>> {
    let path = &args.model;
    if args.device.device.as_deref() != Some("list") && !path.exists() {
        return usage(format!(
            "{}: no such file or directory; MODEL is a checkpoint directory or a bundle",
            path.display()
        ));
    }
    let Some(gpu) = open_device(&args.device)? else { return Ok(None) };
    let bundle = if Bundle::is_bundle(path) {
        if args.target.is_some() {
            return usage("--target does not apply to a bundle: it is compiled already");
        }
        Bundle::open(path)?
    } else if path.join("manifest.json").exists() && !path.join("config.json").exists() {
        Bundle::open(path)? // says what is wrong with it
    } else {
        compiled(path, args, &gpu)?
    };
    let text = Text::load(&bundle.dir)?;
    if let Some(text) = &text
        && text.max_id() >= bundle.plan.model.vocab_size
    {
        eprintln!(
            "moewe: warning: {}: the tokenizer has ids up to {}, the model a vocabulary of {}; text with such tokens fails",
            path.display(),
            text.max_id(),
            bundle.plan.model.vocab_size
        );
    }
    let defaults = GenerationDefaults::load(&bundle.dir)?;
    let bars = Bars::bytes();
    let model = Model::load_for(&gpu, &bundle, &kinds(&bundle), &|progress| match progress {
        Progress::Verify { done, total } => bars.set("verifying weights", done, total, true),
        Progress::Upload { done, total } => bars.set("loading weights", done, total, true),
        Progress::Pipelines { done, total } => bars.set("making pipelines", done, total, false),
    })?;
    Ok(Some(Loaded { model, text, defaults }))
}

/// A session for programs of these kinds, with a progress bar for its pipelines.
pub fn session(loaded: &Loaded, args: &ModelArgs, kinds: &[ProgramKind]) -> anyhow::Result<Session> {
    let bars = Bars::bytes();
    let precision = args.precision.into();
    loaded.model.prepare(kinds, precision, &|progress| {
        if let Progress::Pipelines { done, total } = progress {
            bars.set("making pipelines", done, total, false);
        }
    })?;
    let options = SessionOptions { precision, kinds: kinds.to_vec(), ..SessionOptions::default() };
    Ok(Session::new(loaded.model.clone(), options)?)
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
    if let Ok(bundle) = Bundle::open(&dir) {
        return Ok(bundle);
    }
    let bars = Bars::bytes();
    let options = Options { profile, weights: None, reference: true, plan_only: false };
    let warnings = compile::compile(&checkpoint, &options, &dir, &|done, total| {
        bars.set("compiling", done, total, true);
    })?;
    drop(bars);
    warn(&warnings);
    if interrupt::is_set() {
        anyhow::bail!("interrupted");
    }
    Bundle::open(&dir).with_context(|| format!("the bundle of {} that was just compiled", path.display()))
}

/// Prints warnings of the compiler.
pub fn warn(warnings: &[String]) {
    for warning in warnings.iter().take(10) {
        eprintln!("moewe: warning: {warning}");
    }
    if warnings.len() > 10 {
        eprintln!("moewe: warning: … and {} more such tensors", warnings.len() - 10);
    }
}
