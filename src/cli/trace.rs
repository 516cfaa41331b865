//! `moewe trace`.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Context;
use moewe::trace::{self, Numbers, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{View, serialize_to_file};
use serde_json::json;

use super::args::TraceArgs;
use super::run::encode_text;
use super::{model, output, usage};

/// Runs one forward pass and writes its tensors.
pub fn run(args: &TraceArgs) -> anyhow::Result<()> {
    let lists_devices = args.model.device.device.as_deref() == Some("list");
    if args.tokens.is_none() && args.prompt.is_none() && !lists_devices {
        return usage("nothing to run: give --tokens 1,2,3 or a text");
    }
    let modules = |bundle: &moewe_plan::Bundle| trace::kinds(bundle.plan.model.mtp_modules);
    let Some(loaded) = model::load(&args.model, modules)? else { return Ok(()) };
    let tokens = match (&args.tokens, &args.prompt) {
        (Some(tokens), _) => tokens.clone(),
        (None, Some(prompt)) => encode_text(prompt, loaded.text.as_ref(), &args.model.model)?,
        (None, None) => unreachable!("checked above"),
    };
    let plan = loaded.model.plan();
    let names: Vec<&str> =
        plan.programs.iter().flat_map(|program| &program.taps).map(|tap| tap.name.as_str()).collect();
    let matches = |pattern: &str, name: &str| {
        name.strip_prefix(pattern).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    for pattern in &args.taps {
        let known = names.iter().any(|name| matches(pattern, name)) || pattern == "input_ids";
        if !known {
            return usage(format!(
                "--taps: {pattern:?} names no tensor of this model; there are logits, final_norm, hidden.N, moe.N.ids, \
                 moe.N.weights, moe.N.router_logits, mla.N.c_kv, mla.N.k_rope, mtp.N.hidden, mtp.N.logits, input_ids"
            ));
        }
    }
    let wanted = |name: &str| args.taps.is_empty() || args.taps.iter().any(|pattern| matches(pattern, name));
    let mut session = model::session(&loaded, &args.model, &trace::kinds(plan.model.mtp_modules))?;
    let chunk = args.model.prefill_chunk.map(|chunk| chunk as usize);
    let tensors = trace::trace(&mut session, &tokens, chunk, &wanted)?;
    write(&args.out, &tensors)?;
    if args.json {
        let listed = tensors.iter().map(|(name, tensor)| {
            let dtype = if matches!(tensor.data, Numbers::F32(_)) { "F32" } else { "I32" };
            json!({ "name": name, "dtype": dtype, "shape": tensor.shape })
        });
        return output::json(&json!({ "file": args.out, "tensors": listed.collect::<Vec<_>>() }));
    }
    eprintln!("{}: {} tensors of {} tokens", args.out.display(), tensors.len(), tokens.len());
    Ok(())
}

/// A tensor as the safetensors crate wants it.
struct Written<'a>(&'a Tensor);

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        match self.0.data {
            Numbers::F32(_) => Dtype::F32,
            Numbers::I32(_) => Dtype::I32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.0.data {
            Numbers::F32(numbers) => Cow::Borrowed(bytemuck::cast_slice(numbers)),
            Numbers::I32(numbers) => Cow::Borrowed(bytemuck::cast_slice(numbers)),
        }
    }

    fn data_len(&self) -> usize {
        self.data().len()
    }
}

/// Writes beside the output and moves it there, so that no partial file stays behind.
fn write(out: &Path, tensors: &trace::Tensors) -> anyhow::Result<()> {
    let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = tempfile::Builder::new()
        .prefix(".moewe-trace-")
        .tempfile_in(dir)
        .with_context(|| format!("cannot write to {}", dir.display()))?;
    serialize_to_file(tensors.iter().map(|(name, tensor)| (name, Written(tensor))), None, partial.path())
        .with_context(|| format!("cannot write {}; nothing was left behind", out.display()))?;
    partial.persist(out).map_err(|error| error.error).with_context(|| format!("cannot write {}", out.display()))?;
    Ok(())
}
