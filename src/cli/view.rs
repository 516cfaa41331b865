//! `moewe view`: the window, and files instead of it.

mod export;
mod joined;

use std::path::Path;
use std::time::Duration;

use moewe::live::Live;
use moewe::remote::{Remote, Server};
use moewe::subject::subject;
use moewe::watch::{self, Watch};
use moewe_plan::{TapChoice, parameter_values};
use moewe_runtime::{DeviceType, Gpu};
use moewe_viewer::app::{self, App};
use moewe_viewer::colour::Palette;
use moewe_viewer::recording::Recording;
use moewe_viewer::selection::Selection;
use moewe_viewer::source::{Command, Notice, Prompt, Request, Source};
use moewe_viewer::subject::Subject;
use moewe_viewer::window;
use serde_json::{Map, Value};

use super::args::{PaletteArg, PlaceArgs, SamplingArgs, ViewArgs};
use super::watched::{name, watched_kinds};
use super::{Usage, interrupt, key, model, output, usage};

/// Time between two frames where the processor draws them.
const SOFTWARE_PACE: Duration = Duration::from_millis(400);

/// Opens a window on a model or a recording, or writes files about it.
pub fn run(args: &ViewArgs) -> anyhow::Result<()> {
    let path = args.model.path();
    let address = path.to_str().filter(|text| Server::is_address(text));
    if args.api_key_file.is_some() && address.is_none() {
        return usage("--api-key-file is for servers; MODEL is none: give http://HOST:PORT");
    }
    match address {
        Some(address) => served(args, address),
        None if path.is_file() => recorded(args, path),
        None => live(args),
    }
}

/// Views what a server writes.
fn served(args: &ViewArgs, address: &str) -> anyhow::Result<()> {
    if args.against.is_some() {
        return usage("--against compares recordings; MODEL is a server");
    }
    if !args.edits.edits().is_empty() {
        return usage(format!(
            "{address}: a server's model cannot be changed; give changes to `moewe view MODEL` or `moewe run MODEL`"
        ));
    }
    if args.sampling.ignore_eos {
        return usage("--ignore-eos: servers end texts where the model does");
    }
    let sampling = &args.sampling;
    let request = Request {
        max_new_tokens: sampling.max_new_tokens.unwrap_or(256) as usize,
        temperature: sampling.temperature.unwrap_or(0.0),
        seed: sampling.seed,
        ..Request::default()
    };
    let requests = requests(args, &request);
    if requests.is_empty() && args.export.is_any() {
        return usage("there is nothing to write files about: a server is watched from now on; give a --prompt");
    }
    let server = Server::new(address, key::presented(args.api_key_file.as_deref())?)
        .map_err(|error| Usage(error.to_string()))?;
    let Some(gpu) = model::open_device(&args.model.device)? else { return Ok(()) };
    let taps = args.taps.as_ref().map_or("routing", |taps| &taps.words);
    let (mut source, subject) = Remote::connect(server, taps, fields(sampling))?;
    for request in &requests {
        source.send(Command::Generate(request.clone()));
    }
    show(args, Box::new(source), subject, requests, Vec::new(), &gpu)
}

/// What requests to a server say of sampling, beside what [`Request`] has.
fn fields(sampling: &SamplingArgs) -> Map<String, Value> {
    // As text: 0.9 in 32 bits is not 0.9 in 64.
    let float = |number: Option<f32>| number.and_then(|number| number.to_string().parse().ok());
    let fields: [(&str, Option<Value>); 4] = [
        ("top_k", sampling.top_k.map(Into::into)),
        ("top_p", float(sampling.top_p)),
        ("min_p", float(sampling.min_p)),
        ("repetition_penalty", float(sampling.repetition_penalty)),
    ];
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

/// Views a recording.
fn recorded(args: &ViewArgs, path: &Path) -> anyhow::Result<()> {
    if !args.prompts.is_empty() || args.tokens.is_some() || !args.edits.edits().is_empty() {
        return usage(format!(
            "{}: is a recording, which cannot be continued or changed; give prompts and changes to `moewe view MODEL`",
            path.display()
        ));
    }
    let Some(gpu) = model::open_device(&args.model.device)? else { return Ok(()) };
    let mut warnings = Vec::new();
    let (mut source, subject) = open_recording(path, &mut warnings)?;
    if let Some(against) = &args.against {
        model::must_exist(against, "--against is a recording")?;
        let (other, other_subject) = open_recording(against, &mut warnings)?;
        let shape = |subject: &Subject| (subject.model.layers, subject.model.experts, subject.model.hidden_size);
        if shape(&subject) != shape(&other_subject) {
            return usage(format!(
                "{}: is of {} (layers, experts, hidden size: {:?}), {} is of {} ({:?}); only models of one shape compare",
                against.display(),
                other_subject.name,
                shape(&other_subject),
                path.display(),
                subject.name,
                shape(&subject)
            ));
        }
        source = Box::new(joined::Joined::new([source, other], &name(against)));
    }
    show(args, source, subject, Vec::new(), warnings, &gpu)
}

/// A recording. What of it cannot be read is said on standard error and goes to `told`, for the window.
fn open_recording(path: &Path, told: &mut Vec<String>) -> anyhow::Result<(Box<dyn Source>, Subject)> {
    let (recording, warnings) = Recording::open(path)?;
    for warning in warnings {
        let warning = format!("{}: {warning}", path.display());
        output::note(&format!("moewe: warning: {warning}"));
        told.push(warning);
    }
    let subject = recording.subject().clone();
    Ok((Box::new(recording), subject))
}

/// Views a model while it runs.
fn live(args: &ViewArgs) -> anyhow::Result<()> {
    if args.against.is_some() {
        return usage("--against compares recordings; MODEL is no recording");
    }
    let Some(opened) = model::open(&args.model)? else { return Ok(()) };
    let options = super::generate::options(&args.sampling, &args.model, &opened)?;
    let edits = args.edits.edits();
    parameter_values(opened.plan(), &edits)?;
    let request = Request {
        max_new_tokens: options.max_new_tokens,
        temperature: options.sampling.temperature,
        seed: args.sampling.seed,
        edits,
        ..Request::default()
    };
    let requests = requests(args, &request);
    if requests.is_empty() && args.export.is_any() {
        return usage("there is nothing to write files about: give a --prompt, or a recording");
    }
    let taps = args.taps.as_ref().map_or_else(TapChoice::all, |taps| taps.choice.clone());
    let kinds = watched_kinds(&opened, &taps)?;
    let loaded = opened.load(&kinds)?;
    let session = model::session(&loaded, &args.model, &kinds, Some(taps.clone()))?;
    let precision = args.model.precision.into();
    let subject =
        subject(&name(args.model.path()), opened.bundle(), opened.text.as_ref(), loaded.gpu(), precision, taps.timing)?;
    let gpu = loaded.gpu().clone();
    let watch = Watch::new(session.frame_receiver()?);
    let mut source = Live::new(session, watch, opened.text, options);
    for request in &requests {
        source.send(Command::Generate(request.clone()));
    }
    show(args, Box::new(source), subject, requests, Vec::new(), &gpu)
}

/// The texts that are asked for at once.
fn requests(args: &ViewArgs, request: &Request) -> Vec<Request> {
    let mut requests: Vec<Request> = args.prompts.iter().map(|prompt| named(prompt, request)).collect();
    if let Some(tokens) = &args.tokens {
        requests.push(Request { prompt: Prompt::Tokens(tokens.clone()), ..request.clone() });
    }
    requests
}

/// A prompt with its name, if it has one: a word before `=`.
fn named(prompt: &str, request: &Request) -> Request {
    let is_name = |name: &str| {
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
        !name.is_empty() && name.chars().all(plain)
    };
    let (name, text) = match prompt.split_once('=') {
        Some((name, text)) if is_name(name) => (name.to_owned(), text),
        _ => (watch::title(prompt), prompt),
    };
    Request { name: Some(name), prompt: Prompt::Text(text.to_owned()), ..request.clone() }
}

/// Opens the window, or writes what is asked for instead.
fn show(
    args: &ViewArgs,
    source: Box<dyn Source>,
    subject: Subject,
    requests: Vec<Request>,
    warnings: Vec<String>,
    gpu: &Gpu,
) -> anyhow::Result<()> {
    let title = format!("{} — moewe", subject.name);
    let is_recording = requests.is_empty() && !source.status().is_live;
    let selection = selection(&args.place, &subject)?;
    let mut app = App::new(
        source,
        subject,
        app::Options {
            budget: (args.memory as usize) << 20,
            selection,
            palette: match args.place.palette {
                PaletteArg::Viridis => Palette::Viridis,
                PaletteArg::Cividis => Palette::Cividis,
            },
            request: requests.into_iter().next_back().unwrap_or(Request { max_new_tokens: 256, ..Request::default() }),
            exports: export::exports(),
            pace: if gpu.info().device_type == DeviceType::Cpu { SOFTWARE_PACE } else { app::Options::default().pace },
            ..app::Options::default()
        },
    );
    let names = app.names();
    if let Some(view) = args.place.view_name() {
        if !names.contains(&view) {
            return usage(format!("--view is {view:?}, expected one of {}", names.join(", ")));
        }
        app.focus(view);
        if let Some(part) = args.place.part()
            && !app.show_part(view, part)
        {
            return match app.parts(view) {
                [] => usage(format!("--view is {view}:{part}, but {view} has no parts")),
                parts => usage(format!("--view is {view}:{part}, expected one of {view}:{{{}}}", parts.join(","))),
            };
        }
    }
    if args.export.is_any() {
        return export::write(args, app, gpu);
    }
    if is_recording && (args.place.text.is_some() || args.place.other.is_some()) {
        export::read_all(&mut app)?;
        export::select_texts(&mut app, &args.place)?;
    }
    for text in warnings {
        app.notify(Notice { text, is_error: true });
    }
    let setup = export::setup(&gpu.for_window()?);
    let options = window::Options { title, setup, closing: interrupt::flag(), kept: None, theme: export::theme(args) };
    Ok(window::run(app, options)?)
}

/// What is selected at the beginning, without the texts.
fn selection(place: &PlaceArgs, subject: &Subject) -> anyhow::Result<Selection> {
    let model = &subject.model;
    let limits = [
        ("--layer", place.layer, model.layers, "layers"),
        ("--expert", place.expert, model.experts, "experts"),
        ("--head", Some(place.head), model.num_attention_heads, "heads"),
    ];
    for (flag, found, count, what) in limits {
        if let Some(found) = found.filter(|found| *found >= count) {
            return usage(format!("{flag} is {found}, but the model has {count} {what}, counted from 0"));
        }
    }
    Ok(Selection {
        sequence: 0,
        token: place.token,
        layer: place.layer.or(model.moe_layers.first().copied()).unwrap_or(0),
        expert: place.expert,
        head: place.head,
        other: None,
    })
}
