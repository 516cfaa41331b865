//! `moewe eval`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use moewe::eval::{self, Comparison, Distribution, Likelihood, Part, Scorer, Window};
use moewe::text::Text;
use moewe_plan::{PAGE_TOKENS, ProgramKind};
use moewe_runtime::{Model, SessionOptions};
use serde_json::{Value, json};

use super::args::{EvalArgs, EvalCommand, KlArgs, ModelArgs, PerplexityArgs, PrecisionArg, TextArgs};
use super::model::Opened;
use super::progress::Bars;
use super::{Usage, interrupt, model, output, usage};

/// Bytes of a text.
const MAX_BYTES: u64 = 64 << 20;

/// Tokens of a window where nobody says how many.
const DEFAULT_CONTEXT: usize = 2048;

/// Measures predictions.
pub fn run(args: &EvalArgs) -> anyhow::Result<()> {
    match &args.what {
        EvalCommand::Perplexity(args) => perplexity(args),
        EvalCommand::Kl(args) => kl(args),
    }
}

fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let contents = read(&args.text, &args.model)?;
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let text = Tokens::new(&contents, &opened, args.model.path())?;
    let windows = Windows::new(&args.text, args.stride, &[&opened], &text)?;
    let mut scorers = [scorer(&opened.load(&[ProgramKind::Trace])?, args.model.precision, &windows)?];
    let mut likelihood = Likelihood::default();
    let run = windows.run(&text, &mut scorers, args.model.prefill_chunk, &mut |rows, token| {
        likelihood.add(&Distribution::new(rows[0])?, token);
        Ok(())
    })?;
    if likelihood.nats.is_empty() {
        return interrupt::check();
    }
    let bits_per_byte = text.bits_per_byte(&likelihood);
    if args.json {
        let mut report = run.json(&args.model, &text, &windows);
        report["nats_per_token"] = json!(likelihood.nats.mean());
        report["nats_standard_error"] = json!(likelihood.nats.standard_error());
        report["perplexity"] = json!(likelihood.perplexity());
        report["bits_per_byte"] = json!(bits_per_byte);
        report["top1_accuracy"] = json!(likelihood.accuracy());
        return output::json(&report);
    }
    let mut out = run.text(&text, &windows, likelihood.nats.len());
    out += &nats_line("nats/token", &likelihood);
    out += &format!("perplexity     {:.4}\n", likelihood.perplexity());
    if let Some(bits) = bits_per_byte {
        out += &format!("bits/byte      {bits:.4}\n");
    }
    out += &format!("top-1 accuracy {:.2} %\n", likelihood.accuracy() * 100.0);
    out += &run.speed();
    Ok(output::write(&out)?)
}

fn kl(args: &KlArgs) -> anyhow::Result<()> {
    if args.against.is_none() && args.against_precision == args.model.precision && !args.model.device.is_list() {
        return usage("nothing to compare with: give --against OTHER, or another --precision than --against-precision");
    }
    let contents = read(&args.text, &args.model)?;
    if let Some(other) = &args.against {
        model::must_exist(other, "--against is a checkpoint directory or a bundle")?;
    }
    let Some(compared) = compare(args, &contents)? else { return Ok(()) };
    let Compared { comparison, run, text, windows } = &compared;
    if comparison.divergence.is_empty() {
        return interrupt::check();
    }
    let Comparison { divergence, shift, model, reference, .. } = comparison;
    let (path, reference_path) = (args.model.path(), args.against.as_deref().unwrap_or(args.model.path()));
    if args.json {
        let mut report = run.json(&args.model, text, windows);
        report["against"] = json!(reference_path);
        report["against_precision"] = json!(moewe_plan::Precision::from(args.against_precision).name());
        report["kl"] = json!({
            "direction": "KL(against || model), nats",
            "mean": divergence.mean(),
            "standard_error": divergence.standard_error(),
            "median": divergence.quantile(0.5),
            "p99_9": divergence.quantile(0.999),
            "max": divergence.quantile(1.0),
        });
        report["top1_agreement"] = json!(comparison.agreement());
        report["mean_abs_delta_p"] = json!(shift.mean());
        report["perplexity"] = json!({ "model": model.perplexity(), "against": reference.perplexity() });
        return output::json(&report);
    }
    let mut out = format!(
        "KL(P || Q), P {} ({}), Q {} ({})\n",
        reference_path.display(),
        moewe_plan::Precision::from(args.against_precision).name(),
        path.display(),
        moewe_plan::Precision::from(args.model.precision).name(),
    );
    out += &run.text(text, windows, divergence.len());
    out += &format!("mean           {} ± {} nats\n", small(divergence.mean()), small(divergence.standard_error()));
    out += &format!("median         {}\n", small(divergence.quantile(0.5)));
    out += &format!("99.9 %         {}\n", small(divergence.quantile(0.999)));
    out += &format!("maximum        {}\n", small(divergence.quantile(1.0)));
    out += &format!("same top token {:.2} %\n", comparison.agreement() * 100.0);
    out += &format!("mean |Δp|      {} of P's top token\n", small(shift.mean()));
    out += &format!("perplexity     P {:.4}, Q {:.4}\n", reference.perplexity(), model.perplexity());
    out += &run.speed();
    Ok(output::write(&out)?)
}

/// What two models make of a text.
pub struct Compared {
    /// KL divergence, agreement and likelihoods.
    pub comparison: Comparison,
    run: Run,
    text: Tokens,
    windows: Windows,
}

impl Compared {
    /// Whether the whole text was run.
    pub fn is_complete(&self) -> bool {
        self.run.complete
    }

    /// Tokens of a window.
    pub fn context(&self) -> usize {
        self.windows.context
    }
}

/// Runs both models over a text, which is read already. `None` if only the devices were to be listed.
pub fn compare(args: &KlArgs, contents: &Contents) -> anyhow::Result<Option<Compared>> {
    let Some(mut opened) = model::open(&args.model)? else { return Ok(None) };
    let reference_args = args.reference();
    if args.against.is_none() {
        opened.open_for(reference_args.precision.into())?;
    }
    let other = args.against.as_ref().map(|_| model::open_on(opened.gpu().clone(), &reference_args)).transpose()?;
    let reference = other.as_ref().unwrap_or(&opened);
    let (path, reference_path) = (args.model.path(), reference_args.path());
    let sizes = [&opened, reference].map(|opened| opened.plan().model.vocab_size);
    if sizes[0] != sizes[1] {
        anyhow::bail!(
            "{} has a vocabulary of {} tokens, {} one of {}; their predictions cannot be compared",
            path.display(),
            sizes[0],
            reference_path.display(),
            sizes[1]
        );
    }
    // A model without tokenizer takes the other's tokens.
    let text = match (&opened.text, &reference.text) {
        (None, Some(_)) => Tokens::new(contents, reference, reference_path)?,
        _ => Tokens::new(contents, &opened, path)?,
    };
    if opened.text.is_some() && reference.text.is_some() && other.is_some() {
        let found = Tokens::new(contents, reference, reference_path)?;
        same_tokens(&found.ids, &text.ids, reference_path, path)?;
    }
    let windows = Windows::new(&args.text, None, &[&opened, reference], &text)?;
    let kinds = [ProgramKind::Trace];
    let loaded = opened.load(&kinds)?;
    let other = other.map(|other| other.load(&kinds)).transpose()?.unwrap_or_else(|| loaded.clone());
    let mut scorers =
        [scorer(&loaded, args.model.precision, &windows)?, scorer(&other, args.against_precision, &windows)?];
    let mut comparison = Comparison::default();
    let run = windows.run(&text, &mut scorers, args.model.prefill_chunk, &mut |rows, token| {
        comparison.add(&Distribution::new(rows[1])?, &Distribution::new(rows[0])?, token)
    })?;
    Ok(Some(Compared { comparison, run, text, windows }))
}

/// An error if two tokenizers split a text differently.
fn same_tokens(found: &[u32], expected: &[u32], found_by: &Path, expected_by: &Path) -> anyhow::Result<()> {
    if found == expected {
        return Ok(());
    }
    let index = found.iter().zip(expected).take_while(|(a, b)| a == b).count();
    let token = |ids: &[u32]| ids.get(index).map_or_else(|| "the end".to_owned(), |id| format!("token {id}"));
    anyhow::bail!(
        "the tokenizers differ: at index {index} of the text {} has {}, {} has {}; give token ids in a .json file",
        expected_by.display(),
        token(expected),
        found_by.display(),
        token(found)
    );
}

/// A small number, readable at any size.
pub fn small(number: f64) -> String {
    if number == 0.0 || (1e-3..1e6).contains(&number) { format!("{number:.6}") } else { format!("{number:.3e}") }
}

fn nats_line(name: &str, likelihood: &Likelihood) -> String {
    let Likelihood { nats, .. } = likelihood;
    format!("{name:<14} {:.4} ± {:.4}\n", nats.mean(), nats.standard_error())
}

/// FILE, read before anything takes time.
pub enum Contents {
    /// Text to be encoded.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// Only devices are listed.
    Nothing,
}

/// Reads FILE.
pub fn read(args: &TextArgs, model: &ModelArgs) -> anyhow::Result<Contents> {
    if model.device.is_list() {
        return Ok(Contents::Nothing);
    }
    let Some(file) = &args.file else { return usage("no FILE: give a text file, or token ids in a .json file") };
    model::must_exist(file, "FILE is a text file, or token ids in a .json file")?;
    if !file.is_file() {
        return usage(format!(
            "{}: is no regular file; FILE is a text file, or token ids in a .json file",
            file.display()
        ));
    }
    let cannot = || format!("cannot read {}", file.display());
    let found = file.metadata().with_context(cannot)?.len();
    if found > MAX_BYTES {
        return usage(format!("{} has {found} bytes, at most {MAX_BYTES} are possible", file.display()));
    }
    let bytes = std::fs::read(file).with_context(cannot)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{} is not UTF-8 text (first bad byte at offset {offset})", file.display())
    })?;
    if text.trim().is_empty() {
        return usage(format!("{} is empty; FILE is a text to predict", file.display()));
    }
    if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        let ids = serde_json::from_str(&text);
        return Ok(Contents::Ids(ids.with_context(|| {
            format!("{}: expected a JSON array of token ids, such as [0, 51, 82]", file.display())
        })?));
    }
    Ok(Contents::Text(text))
}

/// FILE in a model's tokens.
struct Tokens {
    ids: Vec<u32>,
    /// Bytes of the text, and tokens that they gave; unknown where FILE holds ids.
    measure: Option<(usize, usize)>,
}

impl Tokens {
    fn new(contents: &Contents, opened: &Opened, path: &Path) -> anyhow::Result<Self> {
        let tokens = match contents {
            Contents::Nothing => Self { ids: Vec::new(), measure: None },
            Contents::Ids(ids) => Self { ids: ids.clone(), measure: None },
            Contents::Text(text) => Self::encode(text, opened.text.as_ref(), path)?,
        };
        let vocab_size = opened.plan().model.vocab_size;
        if let Some(index) = tokens.ids.iter().position(|&id| id >= vocab_size) {
            let id = tokens.ids[index];
            anyhow::bail!("token {index} of FILE is {id}, {} has a vocabulary of {vocab_size}", path.display());
        }
        Ok(tokens)
    }

    fn encode(text: &str, tokenizer: Option<&Text>, path: &Path) -> anyhow::Result<Self> {
        let Some(tokenizer) = tokenizer else {
            return usage(format!(
                "{}: no tokenizer.json, so text cannot be read; give token ids in a .json file",
                path.display()
            ));
        };
        let ids = tokenizer.encode(text, true)?;
        let begins =
            usize::from(tokenizer.special_ids().bos.is_some() && ids.first() == tokenizer.special_ids().bos.as_ref());
        Ok(Self { measure: Some((text.len(), ids.len() - begins)), ids })
    }

    /// Bits that a byte of the text takes, tokens that were not predicted taken at the mean.
    fn bits_per_byte(&self, likelihood: &Likelihood) -> Option<f64> {
        let (bytes, tokens) = self.measure?;
        Some(likelihood.nats.mean() / std::f64::consts::LN_2 * tokens as f64 / bytes as f64)
    }
}

/// How a text is cut.
struct Windows {
    context: usize,
    stride: usize,
    all: Vec<Window>,
}

/// What to do with the logits of each model for a token, and the token that came.
type Row<'a> = &'a mut dyn FnMut(&[&[f32]], u32) -> Result<(), eval::Error>;

impl Windows {
    fn new(args: &TextArgs, stride: Option<usize>, models: &[&Opened], text: &Tokens) -> anyhow::Result<Self> {
        let most = models.iter().map(|opened| opened.plan().model.max_context as usize).min().unwrap_or(0);
        let context = args.context.unwrap_or(most.min(DEFAULT_CONTEXT));
        if context > most {
            return usage(format!("--context is {context}, the model has room for {most} tokens"));
        }
        let stride = stride.unwrap_or(context);
        let all = eval::windows(text.ids.len(), context, stride)
            .map_err(|error| Usage(format!("cannot cut FILE into windows: {error}")))?;
        Ok(Self { context, stride, all })
    }

    /// Tokens of the longest window.
    fn longest(&self) -> usize {
        self.all.iter().map(|window| window.tokens.len()).max().unwrap_or(0)
    }

    /// Runs the windows through all models, a part at a time, until they end or Ctrl-C.
    fn run(&self, text: &Tokens, scorers: &mut [Scorer], chunk: Option<u32>, row: Row) -> anyhow::Result<Run> {
        let capacities = scorers.iter().map(Scorer::capacity).collect::<Result<Vec<_>, _>>()?;
        let chunk = capacities.into_iter().chain(chunk.map(|chunk| chunk as usize)).min().unwrap_or(1);
        let parts: Vec<Part> = self.all.iter().flat_map(|window| window.parts(chunk)).collect();
        let total = parts.iter().map(|part| part.tokens.len()).sum::<usize>() as u64;
        let bars = Bars::default();
        let started = Instant::now();
        let mut run = Run { tokens: 0, predicted: 0, windows: 0, seconds: 0.0, complete: false };
        for part in parts {
            if interrupt::is_set() {
                return Ok(run);
            }
            bars.set("predicting", run.tokens, total, false);
            let mut logits = Vec::with_capacity(scorers.len());
            for scorer in &mut *scorers {
                logits.push(scorer.run(&text.ids, &part)?);
            }
            for (index, predicted) in (part.rows.start + 1..).take(part.rows.len()).enumerate() {
                let rows: Vec<&[f32]> = logits.iter().map(|logits| row_of(logits, index, &part.rows)).collect();
                row(&rows, text.ids[predicted])
                    .with_context(|| format!("the prediction of token {predicted} of FILE"))?;
                run.predicted += 1;
            }
            run.tokens += part.tokens.len() as u64;
            run.windows += usize::from(part.tokens.start == part.window.start);
            run.seconds = started.elapsed().as_secs_f64();
        }
        run.complete = true;
        Ok(run)
    }
}

/// A row of a matrix `[rows, vocab_size]`.
fn row_of<'a>(logits: &'a [f32], index: usize, rows: &Range<usize>) -> &'a [f32] {
    let columns = logits.len() / rows.len();
    &logits[index * columns..(index + 1) * columns]
}

fn scorer(model: &Arc<Model>, precision: PrecisionArg, windows: &Windows) -> anyhow::Result<Scorer> {
    let options = SessionOptions {
        precision: precision.into(),
        kinds: vec![ProgramKind::Trace],
        pages: Some(windows.longest().div_ceil(PAGE_TOKENS as usize) as u32),
        ..SessionOptions::default()
    };
    Ok(Scorer::new(model::session_with(model, options)?))
}

/// What was run.
struct Run {
    /// Tokens that went through the model.
    tokens: u64,
    predicted: usize,
    windows: usize,
    seconds: f64,
    /// Whether nothing is missing.
    complete: bool,
}

impl Run {
    fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn json(&self, model: &ModelArgs, text: &Tokens, windows: &Windows) -> Value {
        json!({
            "model": model.path(),
            "precision": moewe_plan::Precision::from(model.precision).name(),
            "complete": self.complete,
            "tokens": text.ids.len(),
            "predicted_tokens": self.predicted,
            "windows": self.windows,
            "context": windows.context,
            "stride": windows.stride,
            "seconds": self.seconds,
            "tokens_per_second": self.rate(),
        })
    }

    /// The first lines.
    fn text(&self, text: &Tokens, windows: &Windows, predicted: usize) -> String {
        let partial = if self.complete { "" } else { "interrupted: this is what was measured so far\n" };
        format!(
            "{partial}tokens         {}, {} predicted\nwindows        {}{} of up to {} tokens, {} apart\n",
            output::grouped(text.ids.len() as u64),
            output::grouped(predicted as u64),
            self.windows,
            if self.complete { String::new() } else { format!(" of {}", windows.all.len()) },
            output::grouped(windows.context as u64),
            output::grouped(windows.stride as u64),
        )
    }

    /// The last line.
    fn speed(&self) -> String {
        format!("seconds        {:.2}, {:.1} tokens/s\n", self.seconds, self.rate())
    }
}
