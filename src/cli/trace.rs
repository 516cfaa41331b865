//! `moewe trace`.

use std::borrow::Cow;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Context;
use moewe::trace::{self, Numbers, Tensor};
use safetensors::tensor::{View, serialize_to_file};
use safetensors::{Dtype, SafeTensorError};
use serde_json::json;
use tempfile::NamedTempFile;

use super::args::TraceArgs;
use super::run::encode_text;
use super::{model, output, usage};

/// Runs one forward pass and writes its tensors.
pub fn run(args: &TraceArgs) -> anyhow::Result<()> {
    if args.model.device.is_list() {
        model::open(&args.model)?;
        return Ok(());
    }
    if args.tokens.is_none() && args.prompt.is_none() {
        return usage("nothing to run: give --tokens 1,2,3 or a text");
    }
    let Some(out) = &args.out else { return usage("no --out: give the name of the file to write") };
    // Whatever is there is replaced, so only a file may be there.
    if out.exists() && !out.is_file() {
        return usage(format!("--out {}: is no regular file; give the name of a file", out.display()));
    }
    model::must_exist(folder(out), "--out is a file in a directory that exists")?;
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let tokens = match (&args.tokens, &args.prompt) {
        (Some(tokens), _) => tokens.clone(),
        (None, Some(prompt)) => encode_text(prompt, opened.text.as_ref(), args.model.path())?,
        (None, None) => unreachable!("checked above"),
    };
    let plan = opened.plan();
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
    let output = Output::new(out)?;
    let kinds = trace::kinds(plan.model.mtp_modules);
    let model = opened.load(&kinds)?;
    let mut session = model::session(&model, &args.model, &kinds, None)?;
    let chunk = args.model.prefill_chunk.map(|chunk| chunk as usize);
    let tensors = trace::trace(&mut session, &tokens, chunk, &wanted)?;
    output.write(&tensors)?;
    if args.json {
        let listed = tensors.iter().map(|(name, tensor)| {
            let dtype = if matches!(tensor.data, Numbers::F32(_)) { "F32" } else { "I32" };
            json!({ "name": name, "dtype": dtype, "shape": tensor.shape })
        });
        return output::json(&json!({ "file": out, "tensors": listed.collect::<Vec<_>>() }));
    }
    output::note(&format!("{}: {} tensors of {} tokens", out.display(), tensors.len(), tokens.len()));
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

/// A file beside the output that becomes it at the end, so that no partial output stays behind. Made before the work
/// begins: a place where nothing can be written is better refused early.
struct Output<'a> {
    partial: NamedTempFile,
    out: &'a Path,
}

impl<'a> Output<'a> {
    fn new(out: &'a Path) -> anyhow::Result<Self> {
        let everyone = Permissions::from_mode(0o666); // less the process's umask
        let partial = tempfile::Builder::new().prefix(".moewe-trace-").permissions(everyone).tempfile_in(folder(out));
        Ok(Self { partial: partial.map_err(without_path).with_context(|| failed(out))?, out })
    }

    fn write(self, tensors: &trace::Tensors) -> anyhow::Result<()> {
        let failed = || failed(self.out);
        let permissions = self.partial.as_file().metadata().with_context(failed)?.permissions();
        serialize_to_file(tensors.iter().map(|(name, tensor)| (name, Written(tensor))), None, self.partial.path())
            .map_err(|error| match error {
                SafeTensorError::IoError(error) => without_path(error),
                other => other.into(),
            })
            .with_context(failed)?;
        // `serialize_to_file` puts a file in place that only its owner may read.
        fs::set_permissions(self.partial.path(), permissions).with_context(failed)?;
        self.partial.persist(self.out).map_err(|error| error.error).with_context(failed)?;
        Ok(())
    }
}

fn failed(out: &Path) -> String {
    format!("cannot write {}, nothing was left behind", out.display())
}

/// The directory that a file is to stand in.
fn folder(file: &Path) -> &Path {
    file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What the system said, without the name of the temporary file, which tells nobody anything.
fn without_path(error: io::Error) -> anyhow::Error {
    let text = error.to_string();
    text.split_once(" at path ").map_or_else(|| error.into(), |(said, _)| anyhow::anyhow!("{said}"))
}
