//! `moewe serve`.

use std::cell::OnceCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use moewe::ledger::{self, Keys, Ledger, Prices};
use moewe::serve::{self, App, Limits, Log, Notice, Parts, Policy};
use moewe::subject;
use moewe_plan::ProgramKind;
use moewe_runtime::engine::{Engine, EngineOptions, Mtp};
use moewe_runtime::{SessionOptions, Watch};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{LogArgs, ServeArgs};
use super::{interrupt, model, output, served, usage};

/// Time between two looks whether Ctrl-C was pressed.
const LOOK: Duration = Duration::from_millis(50);
/// Time for what is left of the server's threads at the end.
const THREADS: Duration = Duration::from_secs(2);

/// Serves until Ctrl-C or SIGTERM.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    if args.model.device.is_list() {
        return model::open(&args.model).map(drop);
    }
    let args = Arc::new(args);
    let name = name(&args)?;
    // What can be wrong without the model is said before it is loaded.
    let app = App::new(name.clone(), policy(&args)?, limits(&args));
    // Once the model is loaded, requests are ended one by one.
    let noted = OnceCell::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let address = SocketAddr::new(args.host, args.port);
        let listener = TcpListener::bind(address).await;
        let listener =
            listener.with_context(|| format!("cannot listen at {address}; another --port or --host may do"))?;
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() && args.money.api_key_file.is_none() {
            model::warn(&["anybody who reaches this address may use the model; --api-key-file says who may".into()]);
        }
        let stop = stop(signal(SignalKind::terminate())?);
        let load = {
            let (args, name) = (Arc::clone(&args), name.clone());
            move || load(&args, &name)
        };
        let drain = Duration::from_secs(args.limits.drain_seconds.into());
        let notice = |notice| {
            if notice == Notice::Ready {
                noted.get_or_init(interrupt::Noted::new);
            }
            tell(notice, &args, address, &name);
        };
        serve::serve(listener, Arc::clone(&app), load, stop, drain, notice).await
    });
    runtime.shutdown_timeout(THREADS);
    let Some(host) = result? else { return Ok(()) };
    // What the prefix cache on disk is still to have.
    host.engine.flush();
    model::warn(&host.engine.stats().warnings);
    Ok(())
}

/// The name that requests ask for.
fn name(args: &ServeArgs) -> anyhow::Result<String> {
    let of_directory = || {
        let path = args.model.path();
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let name = args.model_name.clone().unwrap_or_else(of_directory);
    if name.is_empty() || name.chars().any(char::is_control) {
        return usage(format!("{name:?} is no name to serve a model under; give another with --model-name"));
    }
    Ok(name)
}

fn policy(args: &ServeArgs) -> anyhow::Result<Policy> {
    let money = &args.money;
    let keys = money.api_key_file.as_deref().map_or_else(|| Ok(Keys::anonymous()), Keys::load)?;
    let prices = Prices::given(money.price_input, money.price_cache_hit, money.price_output);
    model::warn(&keys.warning().map(str::to_owned).into_iter().collect::<Vec<_>>());
    if keys.any_budget() && prices.is_none() {
        model::warn(&["keys have budgets, but nothing costs anything without --price-input and --price-output".into()]);
    }
    let path = money.usage_db.clone().map_or_else(ledger::default_path_made, Ok)?;
    let log = match &args.log {
        LogArgs { log_prompts: true, .. } => Log::Prompts,
        LogArgs { log: true, .. } => Log::Requests,
        LogArgs { .. } => Log::Nothing,
    };
    Ok(Policy { keys, prices, ledger: Ledger::open(&path)?, log })
}

fn limits(args: &ServeArgs) -> Limits {
    let usual = Limits::default();
    let body_bytes = usize::try_from(args.limits.max_body).unwrap_or(usize::MAX);
    Limits {
        connections: args.limits.max_connections as usize,
        body_bytes,
        // One body fits, however large it may be.
        bodies_bytes: usual.bodies_bytes.max(body_bytes),
        ..usual
    }
}

/// Loads the model, and makes the engine.
fn load(args: &ServeArgs, name: &str) -> anyhow::Result<Parts> {
    let opened = model::open(&args.model)?.context("no device")?;
    let plan = opened.plan();
    let mtp = served::mtp(plan, &args.engine)?;
    let modules = if mtp == Mtp::Off { 0 } else { served::draft_modules(plan) };
    let mut kinds = vec![ProgramKind::Forward];
    kinds.extend((1..=modules).map(|module| ProgramKind::Draft { module }));
    // A bundle that was compiled without taps is served without them.
    let has_taps = plan.programs.iter().any(|program| program.kind == ProgramKind::Watch);
    kinds.extend(has_taps.then_some(ProgramKind::Watch));
    if args.allow_watch && !has_taps {
        return usage("--allow-watch: the bundle was compiled without taps");
    }
    let loaded = opened.load(&kinds)?;
    let options = SessionOptions {
        precision: args.model.precision.into(),
        kinds,
        max_sequences: args.limits.max_running,
        watch: has_taps.then(Watch::default),
        ..SessionOptions::default()
    };
    let session = model::session_with(&loaded, options)?;
    let subject = if args.allow_watch {
        let (bundle, text, precision) = (opened.bundle(), opened.text.as_ref(), args.model.precision.into());
        Some(subject::subject(name, bundle, text, loaded.gpu(), precision, true)?)
    } else {
        None
    };
    let engine = Engine::new(
        session,
        &EngineOptions {
            mtp,
            prefix_cache: !args.engine.no_prefix_cache,
            cache_dir: args.engine.cache_dir.clone().map(|dir| (dir, args.engine.cache_size)),
            prefill_chunk: args.model.prefill_chunk.map(|chunk| chunk as usize),
            max_waiting: Some(args.limits.max_waiting),
            ..EngineOptions::default()
        },
    )?;
    let model = opened.plan().model.clone();
    let defaults = opened.defaults.clone();
    let Some(text) = opened.text else {
        return usage(format!(
            "{}: the model has no tokenizer.json, so nobody could talk with it; `moewe run --tokens` continues ids",
            args.model.path().display()
        ));
    };
    Ok(Parts { engine, model, text, defaults, max_running: args.limits.max_running as usize, subject })
}

/// Says what happens.
fn tell(notice: Notice, args: &ServeArgs, address: SocketAddr, name: &str) {
    let said = match notice {
        Notice::Ready if args.json => {
            let pid = std::process::id();
            output::write(&format!("{}\n", json!({ "url": format!("http://{address}"), "model": name, "pid": pid })))
        }
        Notice::Ready => output::write(&format!("{name} is served at http://{address}\n")),
        Notice::Left(left) => return output::note(&format!("moewe: {} left", requests(left))),
        Notice::Cancelled(left) => return output::note(&format!("moewe: {} cut short", requests(left))),
    };
    drop(said); // that nobody reads it does not matter
}

fn requests(count: usize) -> String {
    format!("{count} {}", if count == 1 { "request" } else { "requests" })
}

/// Returns when the server is to end: at the first Ctrl-C or SIGTERM. The next one ends the program.
async fn stop(mut terminate: Signal) {
    let first = tokio::select! {
        _ = terminate.recv() => SignalKind::terminate(),
        () = interrupted() => SignalKind::interrupt(),
    };
    if first == SignalKind::terminate() {
        interrupt::stop();
    }
    tokio::spawn(async move {
        let next = if first == SignalKind::terminate() {
            tokio::select! {
                _ = terminate.recv() => 143,
                () = interrupted() => 130,
            }
        } else {
            // A second Ctrl-C ends the program without us.
            terminate.recv().await;
            143
        };
        std::process::exit(next);
    });
}

async fn interrupted() {
    while !interrupt::is_set() {
        tokio::time::sleep(LOOK).await;
    }
}
