//! `moewe view http://…`: watching a server, as a user does.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

#[path = "common/cli.rs"]
mod cli;
#[path = "serve/mod.rs"]
mod serve;

use cli::{Call, demo, moewe, root};
use moewe::remote::{self, Remote};
use moewe_viewer::source::{Command, Event, Prompt, Request, Source};
use moewe_viewer::subject::Subject;
use serde_json::{Map, json};
use serve::Server;

const PATIENCE: Duration = Duration::from_mins(2);
const KEY: &str = "sk-0123456789abcdef0123456789abcdef";

fn url(server: &Server) -> String {
    format!("http://{}", server.address)
}

#[test]
fn a_served_text_is_seen_as_the_model_s_own() {
    let dir = root().join("seen");
    fs::create_dir_all(&dir).unwrap();
    let server = Server::start(&["--allow-watch"]);
    let [served, own, picture, csv] = ["served.npz", "own.npz", "view.png", "view.csv"].map(|name| dir.join(name));
    let text = ["--prompt", "king=The king said to", "--max-new-tokens", "20", "--temperature", "0"];
    let view = |more: &[&std::ffi::OsStr]| {
        let args = ["view".as_ref()].into_iter().chain(more.iter().copied()).chain(text.map(AsRef::as_ref));
        Call::new(args.map(ToOwned::to_owned).collect()).ok()
    };
    let files = ["--screenshot".as_ref(), picture.as_os_str(), "--view".as_ref(), "routing".as_ref(), "--csv".as_ref()];
    let routed = ["--routed-experts".as_ref(), served.as_os_str()];
    let url = url(&server);
    let said = view(&[&[url.as_ref()][..], &files, &[csv.as_os_str()], &routed].concat());
    assert!(said.stderr.contains("ended: "), "{said:?}");
    view(&[demo().as_os_str(), "--routed-experts".as_ref(), own.as_os_str()]);
    assert_eq!(fs::read(&served).unwrap(), fs::read(&own).unwrap(), "experts differ");
    assert!(fs::read(&picture).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
}

#[test]
fn what_cannot_be_is_refused_with_a_hint() {
    let dir = root().join("refused");
    fs::create_dir_all(&dir).unwrap();
    let keys = dir.join("keys");
    fs::write(&keys, format!("# who may\nada {KEY}\n")).unwrap();
    let servers = [&["--allow-watch", "--api-key-file", keys.to_str().unwrap()][..], &[]].map(Server::start);
    let [closed, open] = servers.each_ref().map(url);
    let picture = dir.join("view.png");
    let prompt = ["--prompt", "The king", "-n", "4", "--screenshot", picture.to_str().unwrap(), "--overwrite"];
    let view = |url: &str, more: &[&str]| {
        let args = ["view", url].into_iter().chain(more.iter().copied()).chain(prompt);
        Call::new(args.map(Into::into).collect())
    };
    view(&open, &[]).refused(1, &["--allow-watch"]);
    view(&closed, &[]).refused(1, &["wants a key", "--api-key-file", "MOEWE_API_KEY"]);
    view(&closed, &[]).env("MOEWE_API_KEY", "sk-wrong").refused(1, &["does not know this key"]);
    view(&closed, &[]).env("MOEWE_API_KEY", KEY).ok();
    view(&closed, &["--api-key-file", keys.to_str().unwrap(), "--taps", "latents:2"]).ok();
    let alone = dir.join("key");
    fs::write(&alone, KEY).unwrap();
    view(&closed, &["--api-key-file", alone.to_str().unwrap()]).ok();
    fs::write(&alone, "\n# nothing\n").unwrap();
    view(&closed, &["--api-key-file", alone.to_str().unwrap()]).refused(1, &["there is no key in it"]);

    view("http://127.0.0.1:9", &[]).refused(1, &["cannot reach 127.0.0.1:9", "moewe serve"]);
    view(&open.replace("http:", "https:"), &[]).refused(2, &["tunnel"]);
    view(&format!("{open}/v2"), &[]).refused(2, &["expected http://HOST:PORT"]);
    view(&open, &["--mute", "2:3"]).refused(2, &["cannot be changed"]);
    view(&open, &["--ignore-eos"]).refused(2, &["--ignore-eos"]);
    view(&open, &["--against", "other.rec"]).refused(2, &["--against"]);
    view(demo().to_str().unwrap(), &["--api-key-file", "x"]).refused(2, &["--api-key-file is for servers"]);
    moewe!["view", open, "--screenshot", picture].refused(2, &["give a --prompt"]);
    view(&closed, &["--taps", "rooting"]).refused(2, &["rooting"]);
}

/// What the tokens of a text say, those of the prompt and those that were generated.
type Texts = BTreeMap<u32, (String, String)>;

fn read(remote: &mut Remote, subject: &Subject, texts: &mut Texts, ends: usize) -> Vec<Event> {
    let started = Instant::now();
    let mut events = Vec::new();
    while events.iter().filter(|event| matches!(event, Event::End { .. })).count() < ends {
        assert!(started.elapsed() < PATIENCE, "{texts:?}");
        let more = remote.poll();
        for event in &more {
            if let Event::Token { sequence, token } = event {
                let (prompt, written) = texts.entry(*sequence).or_default();
                let text = if token.generated { written } else { prompt };
                text.push_str(&subject.pieces[token.id as usize]);
            }
        }
        events.extend(more);
        std::thread::sleep(Duration::from_millis(5));
    }
    events
}

#[test]
fn texts_of_others_are_seen_while_they_are_written() {
    let server = Server::start(&["--allow-watch"]);
    let connect = || {
        let server = remote::Server::new(&url(&server), None).unwrap();
        Remote::connect(server, "routing", Map::new()).unwrap()
    };
    let (mut remote, subject) = connect();
    assert_eq!((subject.name.as_str(), subject.model.experts), ("demo", 32));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let completions = format!("{}/v1/completions", url(&server));
    let prompts = ["The king said to", "fn main() {", "12 + 30 ="];
    let ask = |prompt: &str| {
        let body = json!({"prompt": prompt, "max_tokens": 30, "temperature": 0});
        let asked = reqwest::Client::new().post(&completions).json(&body).send();
        async { asked.await.unwrap().json::<serde_json::Value>().await.unwrap() }
    };
    let answers = runtime.block_on(futures_util::future::join_all(prompts.map(ask)));
    let mut texts = Texts::new();
    let events = read(&mut remote, &subject, &mut texts, 3);
    assert!(!remote.status().busy);
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let text = answer["choices"][0]["text"].as_str().unwrap();
        let of = |(_, (seen, written)): &(&u32, &(String, String))| seen.ends_with(prompt) && written.starts_with(text);
        let seen = texts.iter().find(of);
        assert!(seen.is_some(), "{prompt:?} {text:?} is not in {texts:?}");
    }
    // Each token but the last of each text was run, in each layer with experts.
    let mut rows: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for frame in events.iter().filter_map(|event| if let Event::Frame(frame) = event { Some(frame) } else { None }) {
        assert_eq!(frame.tensors.len(), subject.model.moe_layers.len() * 2, "ids and weights of each layer");
        frame.tokens.iter().for_each(|token| rows.entry(token.sequence).or_default().push(token.position));
    }
    let tokens = |number| {
        let is_of = |event: &&Event| matches!(event, Event::Token { sequence, .. } if *sequence == number);
        events.iter().filter(is_of).count() as u32
    };
    for (number, mut rows) in rows {
        rows.sort_unstable();
        assert_eq!(rows, (0..tokens(number) - 1).collect::<Vec<_>>(), "text {number}");
    }

    // A text that is asked for here, and one that is stopped.
    let request = Request { prompt: Prompt::Text(prompts[0].into()), max_new_tokens: 30, ..Request::default() };
    remote.send(Command::Generate(request.clone()));
    let mut again = Texts::new();
    read(&mut remote, &subject, &mut again, 1);
    assert!(texts.values().any(|text| Some(text) == again.values().next()), "{again:?} is not in {texts:?}");
    remote.send(Command::Generate(Request { max_new_tokens: 600, temperature: 1.0, ..request }));
    let started = Instant::now();
    let mut events = Vec::new();
    while !events.iter().any(|event| matches!(event, Event::Token { token, .. } if token.generated)) {
        assert!(started.elapsed() < PATIENCE, "{events:?}");
        events.extend(remote.poll());
    }
    remote.send(Command::Stop);
    let events = read(&mut remote, &subject, &mut Texts::new(), 1);
    let Some(Event::End { reason, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!(reason, "stopped");

    // The server goes.
    drop(server);
    let started = Instant::now();
    while !remote.poll().iter().any(|event| matches!(event, Event::Note(note) if note.contains("lost"))) {
        assert!(started.elapsed() < PATIENCE);
    }
}
