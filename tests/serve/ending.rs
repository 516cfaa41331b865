//! How the server begins and ends.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cli::{demo, moewe, root};
use crate::harness::{Answer, Server, chat, connect, long_chat, wait};

#[test]
fn it_says_when_it_is_ready() {
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let port = address.port().to_string();
    let beginning = Server::begin(None, &demo(), &["--port", &port]);
    let get = |path: &str| {
        use std::io::{BufReader, Write};
        let mut stream = connect(address).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").ok()?;
        Some(Answer::read(&mut BufReader::new(stream)))
    };
    let deadline = Instant::now() + Duration::from_mins(1);
    let mut seen = 0;
    loop {
        assert!(Instant::now() < deadline);
        let Some(ready) = get("/ready") else { continue };
        assert_eq!(get("/health").unwrap().status, 200);
        if ready.status == 200 {
            break;
        }
        assert_eq!(ready.status, 503);
        assert!(ready.header("retry-after").is_some());
        ready.error();
        seen += 1;
    }
    assert!(seen > 0, "it was never seen to load");
    assert_eq!(beginning.ready().address, address);
}

#[test]
fn what_is_running_comes_to_its_end() {
    let mut server = Server::start(&["--drain-seconds", "100"]);
    // Long enough behind the other that one request is left for more than the second between two looks.
    let mut stream = server.stream("/v1/chat/completions", &long_chat(1000));
    stream.next_json();
    let whole = std::thread::spawn({
        let body = long_chat(200).to_string();
        let reader = server.send("POST", "/v1/chat/completions", "", body.as_bytes());
        move || Answer::read(&mut { reader })
    });
    let running = || server.metric("vllm:num_requests_running");
    wait("two requests run", || running() >= 2.0, || running().to_string());
    server.signal("TERM");
    server.says("moewe: 2 requests left");
    assert!(connect(server.address).is_err(), "nobody is let in any more");
    let events = stream.all();
    let usage = |answer: &serde_json::Value| answer["usage"]["completion_tokens"].clone();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(usage(&whole.join().unwrap().json()), 200);
    assert_eq!(server.wait(), Some(0), "{}", server.stderr());
    assert!(server.stderr().contains("moewe: 1 request left"), "{}", server.stderr());
    assert!(!server.stderr().contains("cut short"), "{}", server.stderr());
}

#[test]
fn what_takes_too_long_is_cut_short() {
    let mut server = Server::start(&["--drain-seconds", "1"]);
    let mut stream = server.stream("/v1/chat/completions", &long_chat(1900));
    stream.next_json();
    server.signal("TERM");
    let mut last = None;
    while let Some(data) = stream.next_data() {
        last = Some(data);
    }
    let last: serde_json::Value = serde_json::from_str(&last.unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "service_unavailable", "{last}");
    assert_eq!(server.wait(), Some(0), "{}", server.stderr());
    assert!(server.stderr().contains("moewe: 1 request cut short"), "{}", server.stderr());
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::start(&["--drain-seconds", "1000"]);
    let mut stream = server.stream("/v1/chat/completions", &long_chat(1900));
    stream.next_json();
    server.signal("TERM");
    server.says("1 request left");
    server.signal("TERM");
    assert_eq!(server.wait(), Some(143));
    // Ctrl-C has its own code.
    let mut server = Server::start(&[]);
    server.signal("INT");
    assert_eq!(server.wait(), Some(130), "{}", server.stderr());
}

#[test]
fn what_was_sent_is_on_record_even_if_it_is_killed() {
    let mut server = Server::start(&["--price-output", "2"]);
    let mut stream = server.stream("/v1/chat/completions", &long_chat(1900));
    let mut tokens = 0;
    while tokens < 30 {
        let chunk = stream.next_json();
        tokens += usize::from(chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()));
    }
    server.signal("KILL");
    server.wait();
    let usage = moewe!["usage", "--usage-db", &server.usage_db, "--json"].json();
    let recorded = usage["total"]["completion_tokens"].as_u64().unwrap();
    assert!(recorded >= 30, "{usage}");
}

#[test]
fn what_is_wrong_is_said_before_the_model_is_loaded() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let db = root().join("usage-wrong.sqlite");
    moewe!["serve", demo(), "--port", &port, "--usage-db", &db].refused(1, &["cannot listen at 127.0.0.1", "--port"]);
    moewe!["serve", demo(), "--api-key-file", "/nonexistent/keys", "--usage-db", &db]
        .refused(1, &["/nonexistent/keys"]);
    moewe!["serve", demo(), "--usage-db", "/nonexistent/u.sqlite"].refused(1, &["/nonexistent/u.sqlite"]);
    moewe!["serve", "/nonexistent/model", "--port", "0", "--usage-db", &db].refused(2, &["/nonexistent/model"]);
    moewe!["serve", demo(), "--model-name", "", "--usage-db", &db].refused(2, &["--model-name"]);
    for (flag, value) in [("--max-running", "65"), ("--max-body", "0"), ("--price-input", "-1"), ("--host", "nowhere")]
    {
        moewe!["serve", demo(), flag, value, "--usage-db", &db].refused(2, &[flag]);
    }
    // A model of another name.
    let server = Server::start(&["--model-name", "deepseek-chat"]);
    let body = chat("Hi", &json!({ "max_tokens": 1, "model": "deepseek-chat" }));
    assert_eq!(server.json("/v1/chat/completions", &body)["model"], "deepseek-chat");
}
