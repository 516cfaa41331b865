//! `moewe bench serve`: what many people at once see of a server.

mod client;
mod figures;
mod work;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::cli::args::LoadArgs;
use crate::cli::progress::Bars;
use crate::cli::{interrupt, output};
use client::{Answer, Client};
use figures::Figures;
use work::Work;

/// Time between two looks whether Ctrl-C was pressed.
const LOOK: Duration = Duration::from_millis(50);
/// How long a client waits that was refused and not told how long.
const PAUSE: Duration = Duration::from_secs(1);

/// Sends the requests and shows the figures. It fails if any request did.
pub fn run(args: &LoadArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let figures = runtime.block_on(async {
        tokio::select! {
            figures = measure(args) => figures,
            () = interrupted() => Err(anyhow::anyhow!("interrupted")),
        }
    })?;
    if args.json {
        output::json(&figures.json(args))?;
    } else {
        output::write(&figures.text(args))?;
    }
    match figures.failure() {
        Some(failure) => Err(anyhow::anyhow!(failure)),
        None => Ok(()),
    }
}

async fn interrupted() {
    while !interrupt::is_set() {
        tokio::time::sleep(LOOK).await;
    }
}

async fn measure(args: &LoadArgs) -> anyhow::Result<Figures> {
    let client = Arc::new(Client::new(args)?);
    let work = Arc::new(Work::new(args, &client.prepare().await?)?);
    let bars = Bars::default();
    let mut alone = Vec::new();
    if args.verify {
        for (done, job) in work.jobs.iter().enumerate() {
            bars.set("each alone", done as u64, work.jobs.len() as u64, false);
            match client.complete(job, Instant::now()).await {
                Answer::Done(done) => alone.push(done.text),
                other => anyhow::bail!("request {done}, alone: {}", other.describe()),
            }
        }
    }
    let figures = send_all(args, &client, &work, &alone, &bars).await;
    Ok(figures)
}

/// Sends requests as they come, and takes in the answers.
async fn send_all(args: &LoadArgs, client: &Arc<Client>, work: &Arc<Work>, alone: &[String], bars: &Bars) -> Figures {
    let mut random = fastrand::Rng::with_seed(args.seed ^ 0x9e37_79b9_7f4a_7c15);
    let places = Arc::new(Semaphore::new(args.clients as usize));
    let mut flying: JoinSet<(usize, Answer)> = JoinSet::new();
    let mut figures = Figures::default();
    let started = Instant::now();
    let mut arrival = started;
    let mut sent = 0_u32;
    let is_over = |sent, arrival: Instant| match args.seconds {
        Some(seconds) => arrival.max(Instant::now()) - started >= Duration::from_secs(seconds.into()),
        None => sent >= args.requests,
    };
    while !is_over(sent, arrival) {
        match args.rate {
            Some(rate) => {
                // Gaps of a Poisson process have an exponential distribution.
                arrival += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / rate);
                tokio::time::sleep_until(arrival.into()).await;
            }
            None => arrival = Instant::now(),
        }
        if is_over(sent, arrival) {
            break;
        }
        let chosen = random.usize(..work.jobs.len());
        let (client, work, places) = (Arc::clone(client), Arc::clone(work), Arc::clone(&places));
        let place = if args.rate.is_none() { places.clone().acquire_owned().await.ok() } else { None };
        let begun = if args.rate.is_none() { Instant::now() } else { arrival };
        flying.spawn(async move {
            let place = match place {
                Some(place) => Some(place),
                None => places.acquire_owned().await.ok(),
            };
            let answer = client.complete(&work.jobs[chosen], begun).await;
            if let Answer::Refused { retry_after } = &answer {
                tokio::time::sleep(retry_after.unwrap_or(PAUSE)).await;
            }
            drop(place);
            (chosen, answer)
        });
        sent += 1;
        while let Some(Ok((chosen, answer))) = flying.try_join_next() {
            figures.take(answer, alone.get(chosen));
        }
        let (done, all) = match args.seconds {
            Some(seconds) => (started.elapsed().as_secs(), seconds.into()),
            None => (sent.into(), args.requests.into()),
        };
        bars.set("requests", done, all, false);
    }
    while let Some(joined) = flying.join_next().await {
        if let Ok((chosen, answer)) = joined {
            figures.take(answer, alone.get(chosen));
        }
    }
    figures.seconds = started.elapsed().as_secs_f64();
    figures.sent = sent.into();
    figures
}
