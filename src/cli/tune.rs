//! `moewe tune`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use moewe::tune::{Options, Outcome, knobs, tune};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::profile::{Profile, Row};
use moewe_plan::Bundle;
use serde_json::json;
use tempfile::NamedTempFile;

use super::args::TuneArgs;
use super::progress::Bars;
use super::{interrupt, model, output, usage};

/// Finds the fastest kernels for a model on a device and writes a profile.
pub fn run(args: &TuneArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let path = args.model.as_deref().unwrap_or(Path::new(""));
    if !args.device.is_list() {
        model::must_exist(path, "MODEL is a checkpoint directory or a config.json")?;
        if Bundle::is_bundle(path) {
            return usage(format!("{}: is a bundle: its kernels are chosen; tune takes a checkpoint", path.display()));
        }
    }
    let Some(gpu) = model::choose_device(&args.device)? else { return Ok(()) };
    gpu.stop_when(interrupt::flag());
    let checkpoint = Checkpoint::open(path)?;
    let start = Profile::load(model::profile_for(gpu.info()))?;
    let out = args.output.clone().unwrap_or_else(|| PathBuf::from(format!("{}.json", moewe::tune::name(gpu.info()))));
    if out.exists() {
        return usage(format!("{}: exists already; remove it or give another --output", out.display()));
    }
    // Before the time that measuring takes.
    let file = beside(&out)?;
    let bars = Bars::default();
    let options = Options {
        quick: args.quick,
        model: path.display().to_string(),
        date: jiff::Timestamp::now().strftime("%FT%TZ").to_string(),
    };
    let progress = |done: usize, total: usize| bars.set("tuning", done as u64, total as u64, false);
    let outcome = tune(&checkpoint, &gpu, &start, &options, &knobs(), &progress)?;
    drop(bars);
    interrupt::check()?;
    write(file, &out, &outcome.profile)?;
    let Outcome { profile, unchanged, dropped, skipped } = &outcome;
    let rows = profile.tuned.as_ref().map_or(&[][..], |tuned| &tuned.rows);
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let dropped: Vec<_> =
            dropped.iter().map(|d| json!({"case": d.case, "variant": d.variant, "why": d.why})).collect();
        let skipped: Vec<_> = skipped.iter().map(|(case, why)| json!({"case": case, "why": why})).collect();
        return output::json(&json!({
            "profile": out,
            "from": start.name,
            "tuned": profile.tuned,
            "dropped": dropped,
            "skipped": skipped,
            "seconds": seconds,
        }));
    }
    let mut text = table(rows, unchanged);
    for dropped in dropped {
        text += &format!("dropped, {}: {}: {}\n", dropped.case, short(&dropped.variant), dropped.why);
    }
    for (case, why) in skipped {
        text += &format!("not measured, {case}: {why}\n");
    }
    output::write(&text)?;
    output::note(&format!(
        "{}: a profile for {}, from {}, in {seconds:.0} s; compile with --target {}",
        out.display(),
        gpu.info().name,
        start.name,
        out.display()
    ));
    Ok(())
}

/// A file in the directory of `out`, which becomes it when it is whole.
fn beside(out: &Path) -> anyhow::Result<NamedTempFile> {
    let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    NamedTempFile::new_in(dir).with_context(|| cannot_write(out))
}

fn write(mut file: NamedTempFile, out: &Path, profile: &Profile) -> anyhow::Result<()> {
    file.write_all((serde_json::to_string_pretty(profile)? + "\n").as_bytes()).with_context(|| cannot_write(out))?;
    file.persist_noclobber(out).map_err(|error| error.error).with_context(|| cannot_write(out))?;
    Ok(())
}

fn cannot_write(out: &Path) -> String {
    format!("cannot write {}; choose another --output", out.display())
}

/// A line for each case.
fn table(rows: &[Row], unchanged: &[bool]) -> String {
    let mut table =
        output::table(&["what", "shape", "tokens", "before, µs", "now, µs", "ratio", "verified", "kernels"]);
    for text in [1, 7] {
        table.column_mut(text).expect("there are eight").set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    for (row, &unchanged) in rows.iter().zip(unchanged) {
        let time = |ns: u64| if ns == 0 { "wrong".to_owned() } else { format!("{:.1}", ns as f64 / 1e3) };
        let ratio = match row.before_ns {
            0 => "–".to_owned(),
            before => format!("{:.2}", row.after_ns as f64 / before as f64),
        };
        table.add_row([
            row.kernel.clone(),
            row.shape.clone(),
            row.tokens.to_string(),
            time(row.before_ns),
            time(row.after_ns),
            ratio,
            if row.after_ns == 0 { "no" } else { "yes" }.to_owned(),
            if unchanged { "as before".to_owned() } else { short(&row.variant) },
        ]);
    }
    let lines = table.to_string();
    lines.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Names of kernels with those of their constants that tuning chooses.
fn short(variant: &str) -> String {
    let one = |name: &str| {
        let (kernel, constants) = name.split_once("__").unwrap_or((name, ""));
        let chosen = ["wg", "lanes", "rows", "tile", "teams", "splits"];
        let is_chosen = |constant: &&str| {
            let word = constant.trim_end_matches(|c: char| c.is_ascii_digit());
            chosen.contains(&word)
        };
        let constants = constants.split('_').filter(is_chosen);
        let kernel = kernel.split('.').next().unwrap_or(kernel);
        let pooled = name.contains(".pooled").then_some("pooled");
        [kernel].into_iter().chain(constants).chain(pooled).collect::<Vec<_>>().join(" ")
    };
    variant.split(' ').map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn kernels_are_named_by_what_was_chosen() {
        let found =
            short("linear.bf16.wide.row.norm.pooled__eps0.000001_k512_lanes1_n96_rows4_tile1_wg32 experts_sum__n3");
        assert_eq!(found, "linear lanes1 rows4 tile1 wg32 pooled, experts_sum");
    }
}
