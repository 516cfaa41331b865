//! Watching servers: the project's own stream with made-up events, servers that go and come, and hostile ones.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use moewe_plan::{Edit, FrameTensor, FrameToken, Numbers, Place, TapFrame, TapGroup};
use moewe_runtime::engine::Watched;
use moewe_viewer::recording::wire::{Encoder, beginning};
use moewe_viewer::source::{Command, Event, Prompt, Request, Source};
use moewe_viewer::store::SequenceInfo;
use moewe_viewer::subject::Subject;
use moewe_viewer::synthetic::Shape;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;
use tungstenite::Message;

use super::{Error, Remote, Server};
use crate::serve::watch::{self, Gallery, MAX_VIEWERS, Watching};

const PATIENCE: Duration = Duration::from_secs(20);

/// An engine's end of a viewer's events.
struct Events(Mutex<Receiver<Watched>>, Mutex<bool>);

impl Watching for Events {
    fn recv_timeout(&self, timeout: Duration) -> Option<Watched> {
        use std::sync::mpsc::RecvTimeoutError::Disconnected;
        match self.0.lock().unwrap().recv_timeout(timeout) {
            Ok(event) => Some(event),
            Err(error) => {
                *self.1.lock().unwrap() |= error == Disconnected;
                None
            }
        }
    }

    fn is_closed(&self) -> bool {
        *self.1.lock().unwrap()
    }
}

/// A server with a made-up engine.
#[derive(Clone)]
struct Host {
    gallery: Arc<Gallery>,
    viewers: Arc<Mutex<Vec<Sender<Watched>>>>,
    asked: Arc<Mutex<Vec<Value>>>,
    stop: CancellationToken,
}

impl Host {
    fn start(subject: &Subject, port: u16) -> (Self, u16) {
        let gallery = Arc::new(Gallery::new(subject.clone()).unwrap());
        let (viewers, asked, stop) = Default::default();
        let host = Self { gallery, viewers, asked, stop };
        let listener = bind(port);
        let port = listener.local_addr().unwrap().port();
        listener.set_nonblocking(true).unwrap();
        let routes = Router::new().route("/v1/watch", get(watching)).route("/v1/completions", post(completion));
        let (routes, stop) = (routes.with_state(host.clone()), host.stop.clone());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    served = axum::serve(listener, routes) => served.unwrap(),
                    () = async { stop.cancelled().await; tokio::time::sleep(Duration::from_millis(300)).await; } => {}
                }
            });
            runtime.shutdown_timeout(Duration::from_secs(1));
        });
        (host, port)
    }

    fn tell(&self, event: &Watched) {
        self.viewers.lock().unwrap().retain(|viewer| viewer.send(event.clone()).is_ok());
    }

    fn text(&self, request: u32, ids: &[u32]) {
        self.tell(&Watched::Began { request, prompt: vec![1, 2] });
        self.tell(&Watched::Frame(Arc::new(frame(request, 2))));
        self.tell(&Watched::Tokens { request, ids: ids.to_vec() });
        self.tell(&Watched::Ended { request, reason: "length".into(), tokens_per_second: 5.0 });
    }
}

/// A listener at a port that an earlier server may only just have left.
fn bind(port: u16) -> TcpListener {
    let started = Instant::now();
    loop {
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(listener) => return listener,
            Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

async fn watching(
    State(host): State<Host>,
    Query(query): Query<Map<String, Value>>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    let refused =
        |status: StatusCode, what: &str| (status, json!({"error": {"message": what}}).to_string()).into_response();
    if headers.get("authorization").is_none_or(|key| key != "Bearer open sesame") {
        return refused(StatusCode::UNAUTHORIZED, "a key is needed");
    }
    if let Err(what) = watch::taps(query.get("taps").and_then(Value::as_str)) {
        return refused(StatusCode::BAD_REQUEST, &what);
    }
    let Some(seat) = host.gallery.seat() else {
        return refused(StatusCode::SERVICE_UNAVAILABLE, "all places for viewers are taken");
    };
    let (sender, receiver) = channel();
    host.viewers.lock().unwrap().push(sender);
    let events = Events(Mutex::new(receiver), Mutex::new(false));
    let (gallery, stop) = (Arc::clone(&host.gallery), host.stop.clone());
    watch::limited(upgrade).on_upgrade(move |socket| watch::serve(socket, gallery, seat, events, stop))
}

async fn completion(State(host): State<Host>, body: String) -> Response {
    let body: Value = serde_json::from_str(&body).unwrap();
    host.asked.lock().unwrap().push(body.clone());
    match body["prompt"].as_str() {
        Some("full") => {
            (StatusCode::TOO_MANY_REQUESTS, json!({"error": {"message": "come\nlater"}}).to_string()).into_response()
        }
        Some("slow") => {
            host.tell(&Watched::Began { request: 50, prompt: vec![1] });
            tokio::time::sleep(PATIENCE * 2).await;
            String::new().into_response()
        }
        _ => {
            // What is shown comes behind the answer.
            tokio::task::spawn_blocking(move || {
                thread::sleep(Duration::from_millis(300));
                host.text(40, &[3, 4]);
            });
            "data: [DONE]\n\n".into_response()
        }
    }
}

fn subject() -> Subject {
    Shape::small().subject()
}

fn frame(sequence: u32, tokens: u32) -> TapFrame {
    let data = Numbers::U32((0..tokens * 2).collect());
    let tensor = FrameTensor { name: "moe.1.ids".into(), group: TapGroup::Routing, layer: Some(1), columns: 2, data };
    let tokens = (0..tokens).map(|position| FrameToken { sequence, position, id: position + 1 }).collect();
    TapFrame { number: 9, tokens, tensors: vec![tensor], ..TapFrame::default() }
}

fn server(port: u16) -> Server {
    Server::new(&format!("http://127.0.0.1:{port}"), Some("open sesame".into())).unwrap()
}

fn connect(port: u16) -> Remote {
    Remote::connect(server(port), "routing", Map::new()).unwrap().0
}

/// Polls until something holds of all events so far.
fn poll(remote: &mut Remote, events: &mut Vec<Event>, mut until: impl FnMut(&[Event], &Remote) -> bool) {
    let started = Instant::now();
    loop {
        events.extend(remote.poll());
        if until(events, remote) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{events:?} {:?}", remote.status());
        thread::sleep(Duration::from_millis(5));
    }
}

fn ends(events: &[Event]) -> usize {
    events.iter().filter(|event| matches!(event, Event::End { .. })).count()
}

fn tokens(events: &[Event], number: u32) -> Vec<(u32, bool)> {
    let token = |event: &Event| match event {
        Event::Token { sequence, token } if *sequence == number => Some((token.id, token.generated)),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

#[test]
fn what_a_server_writes_is_seen() {
    let (host, port) = Host::start(&subject(), 0);
    let (mut remote, told) = Remote::connect(server(port), "routing,latents:1", Map::new()).unwrap();
    assert_eq!(told, subject());
    assert!(remote.status().is_live && !remote.status().busy);
    let mut events = Vec::new();
    host.tell(&Watched::Began { request: 17, prompt: vec![1, 2] });
    poll(&mut remote, &mut events, |events, _| !events.is_empty());
    assert!(remote.status().busy);
    host.tell(&Watched::Frame(Arc::new(frame(17, 2))));
    host.tell(&Watched::Tokens { request: 17, ids: vec![5, 6] });
    host.tell(&Watched::Dropped(3));
    host.tell(&Watched::Ended { request: 17, reason: "stop".into(), tokens_per_second: 4.5 });
    poll(&mut remote, &mut events, |events, _| ends(events) == 1);
    assert!(!remote.status().busy);
    let info = SequenceInfo { number: 17, name: "request 17".into(), prompt_tokens: 2, ..SequenceInfo::default() };
    assert_eq!(events[0], Event::Begin(info));
    assert_eq!(tokens(&events, 17), [(1, false), (2, false), (5, true), (6, true)]);
    assert!(events.contains(&Event::Frame(frame(17, 2))));
    assert!(events.contains(&Event::Dropped(3)));
    let end = Event::End { sequence: 17, reason: "stop".into(), tokens_per_second: 4.5 };
    assert_eq!(events.last(), Some(&end));
}

#[test]
fn texts_are_asked_for_and_the_source_is_busy_until_they_are_shown() {
    let (host, port) = Host::start(&subject(), 0);
    let fields = json!({"top_k": 5}).as_object().unwrap().clone();
    let (mut remote, _) = Remote::connect(server(port), "routing", fields).unwrap();
    let request = Request {
        prompt: Prompt::Text("The king".into()),
        max_new_tokens: 7,
        temperature: 0.7,
        seed: u64::MAX,
        ..Request::default()
    };
    let mut events = Vec::new();
    remote.send(Command::Generate(request.clone()));
    assert!(remote.status().busy);
    poll(&mut remote, &mut events, |_, remote| !remote.status().busy);
    assert_eq!(tokens(&events, 40), [(1, false), (2, false), (3, true), (4, true)]);
    let expected = json!({
        "top_k": 5, "prompt": "The king", "max_tokens": 7, "temperature": 0.7, "seed": u64::MAX, "stream": true
    });
    assert_eq!(host.asked.lock().unwrap()[..], [expected]);
    remote.send(Command::Generate(Request { prompt: Prompt::Tokens(vec![1, 2]), ..request.clone() }));
    poll(&mut remote, &mut events, |events, remote| ends(events) == 2 && !remote.status().busy);
    assert_eq!(host.asked.lock().unwrap()[1]["prompt"], json!([1, 2]));

    events.clear();
    remote.send(Command::Generate(Request { prompt: Prompt::Text("full".into()), ..request.clone() }));
    poll(&mut remote, &mut events, |events, _| !events.is_empty());
    let refused = format!("127.0.0.1:{port}: the text was refused (HTTP 429): come later");
    assert_eq!(events, [Event::Error(refused)]);
    let edits = vec![Edit::Mute(Place { layer: None, number: 0 })];
    remote.send(Command::Generate(Request { edits, ..request.clone() }));
    assert!(matches!(&remote.poll()[..], [Event::Error(what)] if what.contains("cannot be changed")));
    assert_eq!(host.asked.lock().unwrap().len(), 3);

    remote.send(Command::Generate(Request { prompt: Prompt::Text("slow".into()), ..request }));
    poll(&mut remote, &mut events, |_, _| host.asked.lock().unwrap().len() == 4);
    assert!(remote.status().busy);
    remote.send(Command::Stop);
    host.tell(&Watched::Ended { request: 50, reason: "cancelled".into(), tokens_per_second: 0.0 });
    poll(&mut remote, &mut events, |_, remote| !remote.status().busy);
}

#[test]
fn a_server_that_comes_back_is_followed_and_numbers_go_on() {
    let (host, port) = Host::start(&subject(), 0);
    let mut remote = connect(port);
    let mut events = Vec::new();
    host.text(3, &[5]);
    host.tell(&Watched::Began { request: 8, prompt: vec![1] });
    poll(&mut remote, &mut events, |events, _| ends(events) == 1 && tokens(events, 8).len() == 1);
    host.stop.cancel();
    poll(&mut remote, &mut events, |events, _| matches!(events.last(), Some(Event::Note(_))));
    let lost = Event::End { sequence: 8, reason: "the server was lost".into(), tokens_per_second: 0.0 };
    assert_eq!(events[events.len() - 2], lost);
    let note = format!("lost 127.0.0.1:{port}: the server stops; trying to reach it again");
    assert_eq!(events.last(), Some(&Event::Note(note)));
    assert!(!remote.status().busy);

    let (host, _) = Host::start(&subject(), port);
    events.clear();
    poll(&mut remote, &mut events, |events, _| !events.is_empty());
    assert_eq!(events, [Event::Note(format!("reached 127.0.0.1:{port} again"))]);
    events.clear();
    host.text(0, &[6]);
    poll(&mut remote, &mut events, |events, _| ends(events) == 1);
    assert_eq!(tokens(&events, 9), [(1, false), (2, false), (6, true)]);
    let moved = TapFrame { number: 19, ..frame(9, 2) };
    assert!(events.contains(&Event::Frame(moved)), "{events:?}");

    // Another model at the same place is not shown as if it were the same.
    host.stop.cancel();
    poll(&mut remote, &mut events, |events, _| matches!(events.last(), Some(Event::Note(_))));
    let other = Shape { experts: (8, 2), ..Shape::small() };
    let _host = Host::start(&other.subject(), port);
    poll(&mut remote, &mut events, |events, _| matches!(events.last(), Some(Event::Error(_))));
    let Some(Event::Error(what)) = events.last() else { unreachable!() };
    assert!(what.contains("another model"), "{what}");
}

#[test]
fn there_is_room_for_so_many_viewers() {
    let (host, port) = Host::start(&subject(), 0);
    let viewers: Vec<Remote> = (0..MAX_VIEWERS).map(|_| connect(port)).collect();
    assert_eq!(host.gallery.viewers(), MAX_VIEWERS);
    let Err(Error::Refused { status: 503, what, .. }) = server(port).watch("routing") else { panic!("expected 503") };
    assert_eq!(what, "all places for viewers are taken");
    drop(viewers);
    let started = Instant::now();
    while host.gallery.viewers() > 0 {
        assert!(started.elapsed() < PATIENCE, "{} viewers stay", host.gallery.viewers());
        thread::sleep(Duration::from_millis(20));
    }
    connect(port);
}

#[test]
fn refusals_are_told_from_each_other() {
    let (_host, port) = Host::start(&subject(), 0);
    let address = format!("http://127.0.0.1:{port}");
    let said = |key: Option<&str>, taps: &str| {
        let server = Server::new(&address, key.map(Into::into)).unwrap();
        Remote::connect(server, taps, Map::new()).err().unwrap().to_string()
    };
    assert!(said(None, "routing").contains("give --api-key-file"));
    assert!(said(Some("wrong"), "routing").contains("does not know this key"));
    assert!(said(Some("open sesame"), "rooting").contains("\"rooting\" is no group of taps"));
    // A port that nobody listens at.
    let nobody = bind(0).local_addr().unwrap().port();
    let error = server(nobody).watch("routing").err().unwrap();
    assert!(error.is_passing());
    assert!(error.to_string().contains("is `moewe serve` running there"), "{error}");
}

#[test]
fn a_viewer_that_takes_nothing_holds_nobody_up() {
    let (host, port) = Host::start(&subject(), 0);
    let (_socket, _) = server(port).watch("routing").unwrap(); // never read again
    let mut remote = connect(port);
    let wide = |number| {
        let data = Numbers::F32(vec![0.5; 1 << 20]);
        let tensor =
            FrameTensor { name: "hidden.1".into(), group: TapGroup::Hidden, layer: Some(0), columns: 1 << 20, data };
        Watched::Frame(Arc::new(TapFrame { number, tensors: vec![tensor], ..frame(1, 1) }))
    };
    let started = Instant::now();
    (0..16).for_each(|number| host.tell(&wide(number)));
    host.text(2, &[3]);
    let mut events = Vec::new();
    poll(&mut remote, &mut events, |events, _| ends(events) == 1);
    assert!(started.elapsed() < PATIENCE);
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Frame(_))).count(), 17);
}

/// A server that does as it likes with one connection after the other.
fn hostile(answer: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let listener = bind(0);
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || listener.incoming().flatten().for_each(answer));
    port
}

fn wrong(port: u16) -> String {
    let error = server(port).watch("routing").err().expect("a refusal");
    let text = error.to_string();
    assert!(text.len() < 600 && !text.chars().any(char::is_control), "{text:?}");
    text
}

#[test]
fn what_is_no_moewe_server_is_told_from_one() {
    let http = |answer: String| {
        hostile(move |mut stream| {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer.as_bytes());
        })
    };
    let answer = |status: &str, body: &str| {
        http(format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()))
    };
    assert!(wrong(answer("200 OK", "<html>")).contains("HTTP 200 where a websocket was asked for"));
    assert!(wrong(answer("404 Not Found", "no")).contains("nothing at /v1/watch"));
    assert!(wrong(answer("403 Forbidden", "")).contains("--allow-watch"));
    let long = json!({"error": {"message": "\u{1b}[31m".to_owned() + &"x".repeat(1500)}}).to_string();
    assert!(wrong(answer("500 Oh", &long)).contains("xxx"));
    assert!(wrong(http("SSH-2.0-OpenSSH_9.2\r\n".into())).contains("does not answer as `moewe serve` does"));
    assert!(wrong(http(String::new())).contains("does not answer as `moewe serve` does"));
    assert!(wrong(http("HTTP/1.1 200 OK\r\n".to_owned() + &"x: y\r\n".repeat(100_000))).contains("does not answer"));
}

#[test]
fn messages_that_make_no_sense_end_it_with_a_reason() {
    let sending = |messages: Vec<Message>| {
        hostile(move |stream| {
            let Ok(mut socket) = tungstenite::accept(stream) else { return };
            for message in &messages {
                let _ = socket.send(message.clone());
            }
            while socket.read().is_ok() {}
        })
    };
    let first = Message::from(beginning(&subject()).unwrap());
    assert!(wrong(sending(vec!["hello".into()])).contains("text where the model is to be described"));
    assert!(wrong(sending(vec![vec![0; 100].into()])).contains("no line ends"));
    assert!(wrong(sending(vec![Message::Close(None)])).contains("it closes the connection"));

    let mut encoder = Encoder::new(Arc::new(subject()));
    encoder.push(&Event::Begin(SequenceInfo { number: 1, ..SequenceInfo::default() })).unwrap();
    let sound = encoder.messages().unwrap().remove(0);
    let mut changed = sound.clone();
    *changed.last_mut().unwrap() ^= 1;
    let mut remote = connect(sending(vec![first.clone(), sound.into(), changed.into()]));
    let mut events = Vec::new();
    poll(&mut remote, &mut events, |events, _| events.len() == 2);
    assert!(matches!(&events[0], Event::Begin(info) if info.number == 1));
    assert!(
        matches!(&events[1], Event::Error(what) if what.contains("makes no sense") && what.contains("hash")),
        "{events:?}"
    );
    poll(&mut remote, &mut events, |_, remote| !remote.status().busy);

    // A frame that says it is larger than any may be is refused by its head alone.
    let port = hostile(|stream| {
        let Ok(mut socket) = tungstenite::accept(stream) else { return };
        let _ = socket.get_mut().write_all(&[0x82, 127, 0, 0, 0, 1, 0, 0, 0, 0]);
        while socket.read().is_ok() {}
    });
    assert!(wrong(port).contains("does not answer"));
}
