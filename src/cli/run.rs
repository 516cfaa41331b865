//! `moewe run`.

use std::collections::VecDeque;
use std::io::{IsTerminal, Read};
use std::time::Instant;

use anyhow::Context;
use moewe::heatmap;
use moewe::text::Text;
use moewe::trace::{self, Numbers};
use moewe::watch;
use moewe_plan::ProgramKind;
use moewe_runtime::Session;
use serde_json::json;

use super::args::RunArgs;
use super::generate::{Outcome, Printer, as_json, options};
use super::served::Generator;
use super::{batch, interrupt, model, output, usage};

/// Bytes of a prompt from standard input.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

/// What to continue.
struct Prompt {
    name: Option<String>,
    text: Option<String>,
    tokens: Option<Vec<u32>>,
}

/// Continues prompts.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    if let Some(file) = &args.batch {
        return batch::run(args, file);
    }
    if args.out.is_some() {
        return usage("--out is where the results of --batch go; a prompt's text is printed");
    }
    let prompts = prompts(args)?;
    let started = Instant::now();
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let options = options(&args.sampling, &args.model, &opened)?;
    let text = opened.text.as_ref();
    let info = &opened.plan().model;
    if args.heatmap && info.moe_layers.is_empty() {
        return usage("--heatmap: the model has no mixture-of-experts layer");
    }
    if args.heatmap && !args.edits.edits().is_empty() {
        return usage(
            "--heatmap shows the routing of the unchanged model; --record FILE and `moewe view FILE` show the changed one's",
        );
    }
    let encoded: Vec<Vec<u32>> = prompts.iter().map(|prompt| encode(prompt, text, args)).collect::<Result<_, _>>()?;
    // Routing is read from a trace of the finished text.
    let others: &[ProgramKind] = if args.heatmap { &[ProgramKind::Trace] } else { &[] };
    let how = (&args.engine, &args.watch, &args.edits);
    let (model, mut generator) = Generator::new(&opened, &args.model, how, prompts.len(), others)?;
    let load_seconds = started.elapsed().as_secs_f64();
    // All at once, so that they share batches.
    let mut streams = VecDeque::new();
    if let Generator::Served(served) = &generator {
        for ids in &encoded {
            streams.push_back(served.submit(ids.clone(), &options, 0)?);
        }
    }

    let mut results = Vec::new();
    let mut finished: Vec<Vec<u32>> = Vec::new();
    for (prompt, ids) in prompts.iter().zip(&encoded) {
        let mut printer = Printer::new(text, args.json);
        if !args.json {
            if let Some(name) = &prompt.name {
                output::write(&format!("── {name}\n"))?;
            }
            output::write(&output::dim(prompt.text.as_deref().unwrap_or_default()))?;
        }
        let push = |token| printer.push(token);
        let outcome = match (&mut generator, streams.pop_front()) {
            (Generator::Served(served), Some(stream)) => served.follow(stream, push),
            (Generator::Served(_), None) => break, // there is a stream for each prompt
            (Generator::Watched(runner), _) => runner
                .generate(title(prompt), ids, &options, push)
                .map(|generated| Outcome::of_session(ids.len(), generated)),
        };
        if outcome.is_err() && !args.json {
            output::write("\n")?; // errors stand on a line of their own
        }
        let outcome = outcome?;
        let written = printer.finish()?;
        if args.json {
            let mut result =
                as_json(ids, &outcome, text.map(|_| written.as_str()), load_seconds, generator.mtp(opened.plan()));
            if let Some(name) = &prompt.name {
                result["name"] = json!(name);
            }
            let edits = args.edits.edits();
            if !edits.is_empty() {
                result["edits"] = json!(edits.iter().map(ToString::to_string).collect::<Vec<_>>());
            }
            results.push(result);
        } else {
            output::write("\n")?;
            if std::io::stderr().is_terminal() {
                output::note(&outcome.summary());
            }
            if prompt.name.is_some() {
                output::write("\n")?;
            }
        }
        let mut all = ids.clone();
        // The last token was drawn but not run: the trace does that.
        all.extend(&outcome.tokens);
        all.truncate(info.max_context as usize);
        finished.push(all);
        if interrupt::is_set() {
            break;
        }
    }
    drop(streams);
    generator.finish()?;
    if args.json {
        return match <[_; 1]>::try_from(results) {
            Ok([one]) if args.prompts.is_empty() => output::json(&one),
            Ok([one]) => output::json(&json!({ "prompts": [one] })),
            Err(results) => output::json(&json!({ "prompts": results })),
        };
    }
    if args.heatmap && !interrupt::is_set() {
        let mut tracing = model::session(&model, &args.model, &[ProgramKind::Trace], None)?;
        let counts: Vec<_> = finished.iter().map(|ids| expert_counts(&mut tracing, ids)).collect::<Result<_, _>>()?;
        let labels: Vec<String> = prompts
            .iter()
            .zip(1..)
            .map(|(prompt, number)| prompt.name.clone().unwrap_or_else(|| format!("prompt {number}")))
            .collect();
        output::write(&heatmap::render(&labels, &counts, &info.moe_layers, output::width(), output::color()))?;
    }
    Ok(())
}

fn prompts(args: &RunArgs) -> anyhow::Result<Vec<Prompt>> {
    if args.model.device.is_list() {
        return Ok(Vec::new());
    }
    if let Some(tokens) = &args.tokens {
        return Ok(vec![Prompt { name: None, text: None, tokens: Some(tokens.clone()) }]);
    }
    if !args.prompts.is_empty() {
        let named = args.prompts.iter().map(|prompt| match prompt.split_once('=') {
            Some((name, text)) if !name.is_empty() => {
                Ok(Prompt { name: Some(name.into()), text: Some(text.into()), tokens: None })
            }
            _ => usage(format!(
                "--prompt is {prompt:?}, expected NAME=TEXT; a prompt without name stands alone, without --prompt"
            )),
        });
        return named.collect();
    }
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None if std::io::stdin().is_terminal() => {
            return usage("no prompt: give a text, --tokens 1,2,3, or a text on standard input");
        }
        None => {
            let mut text = String::new();
            let input = std::io::stdin().take(MAX_PROMPT_BYTES + 1);
            let read = interrupt::while_waiting(|| { input }.read_to_string(&mut text)).context("standard input")?;
            if read as u64 > MAX_PROMPT_BYTES {
                return usage(format!("the prompt on standard input has more than {MAX_PROMPT_BYTES} bytes"));
            }
            text
        }
    };
    Ok(vec![Prompt { name: None, text: Some(text), tokens: None }])
}

/// What a recording calls a prompt.
fn title(prompt: &Prompt) -> String {
    match (&prompt.name, &prompt.text) {
        (Some(name), _) => name.clone(),
        (None, Some(text)) => watch::title(text),
        (None, None) => "tokens".into(),
    }
}

fn encode(prompt: &Prompt, text: Option<&Text>, args: &RunArgs) -> anyhow::Result<Vec<u32>> {
    if let Some(tokens) = &prompt.tokens {
        return Ok(tokens.clone());
    }
    encode_text(prompt.text.as_deref().unwrap_or_default(), text, args.model.path())
}

/// Token ids of a text.
pub fn encode_text(prompt: &str, text: Option<&Text>, model: &std::path::Path) -> anyhow::Result<Vec<u32>> {
    match text {
        _ if prompt.is_empty() => {
            usage("the prompt is empty; give a text, --tokens 1,2,3, or a text on standard input")
        }
        Some(text) => Ok(text.encode(prompt, true)?),
        None => usage(format!(
            "{}: no tokenizer.json, so text cannot be read; give token ids with --tokens (other tokenizer files, such as \
             tiktoken.model, are not supported)",
            model.display()
        )),
    }
}

/// How often the routers chose each expert over a text: `[moe layer][expert]`.
fn expert_counts(session: &mut Session, ids: &[u32]) -> anyhow::Result<Vec<Vec<u32>>> {
    let info = session.model().plan().model.clone();
    let names: Vec<String> = info.moe_layers.iter().map(|layer| format!("moe.{layer}.ids")).collect();
    let tensors = trace::trace(session, ids, None, &|name| names.iter().any(|wanted| wanted == name))?;
    let counts = names.iter().map(|name| {
        let mut counts = vec![0; info.experts as usize];
        if let Some(Numbers::I32(ids)) = tensors.get(name).map(|tensor| &tensor.data) {
            ids.iter().filter_map(|&id| usize::try_from(id).ok()).for_each(|id| {
                if let Some(count) = counts.get_mut(id) {
                    *count += 1;
                }
            });
        }
        counts
    });
    Ok(counts.collect())
}
