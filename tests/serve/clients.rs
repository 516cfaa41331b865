//! Clients that go away, come in numbers, or are slow.

use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Answer, Server, chat, long_chat, shared};

/// Resident bytes of a process.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_client_may_go_at_any_moment() {
    let server = Server::start(&[]);
    let body = |stream: bool| {
        let mut body = long_chat(1500);
        body["stream"] = stream.into();
        body.to_string()
    };
    for stream in [true, false] {
        let body = body(stream);
        let head = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        let request = [head.as_bytes(), body.as_bytes()].concat();
        // Within the head, within the body, and so many milliseconds behind it.
        for part in [10, head.len(), head.len() + 20] {
            server.connect().write_all(&request[..part]).unwrap();
        }
        for wait in [0, 1, 3, 10, 30, 100, 300, 1000] {
            let mut connection = server.connect();
            connection.write_all(&request).unwrap();
            std::thread::sleep(Duration::from_millis(wait));
            if wait % 2 == 0 {
                connection.shutdown(Shutdown::Both).unwrap();
            }
        }
        server.quiet();
    }
    // In the middle of reading, and with several choices.
    for events in [1, 2, 7] {
        let mut body = long_chat(1500);
        body["n"] = 3.into();
        let mut stream = server.stream("/v1/chat/completions", &body);
        for _ in 0..events {
            stream.next_json();
        }
    }
    let begun = Instant::now();
    server.quiet();
    assert!(begun.elapsed() < Duration::from_secs(15), "it goes on without them for {:?}", begun.elapsed());
    assert!(server.metric("vllm:request_success_total{model_name=\"demo\",finished_reason=\"abort\"") >= 3.0);
    server.json("/v1/chat/completions", &chat("Hi", &json!({ "max_tokens": 2 })));
}

#[test]
fn thousands_of_idle_connections_cost_little() {
    const COUNT: usize = 2000;
    let server = Server::start(&[]);
    server.json("/v1/chat/completions", &chat("Hi", &json!({ "max_tokens": 2 })));
    let before = resident(server.pid);
    let mut connections: Vec<_> = (0..COUNT).map(|_| server.connect()).collect();
    // A third of them says nothing, a third half a head, and a third has been answered once.
    for (index, connection) in connections.iter_mut().enumerate() {
        match index % 3 {
            0 => {}
            1 => connection.write_all(b"GET /health HTTP/1.1\r\nHo").unwrap(),
            _ => connection.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").unwrap(),
        }
    }
    for connection in connections.iter_mut().skip(2).step_by(3) {
        assert_eq!(Answer::read(&mut BufReader::new(connection)).status, 200);
    }
    let grown = resident(server.pid).saturating_sub(before);
    assert!(grown < COUNT as u64 * (48 << 10), "{} bytes for each", grown / COUNT as u64);
    server.json("/v1/chat/completions", &chat("Hi", &json!({ "max_tokens": 2 })));
    // One of those that said half a head goes on.
    connections[1].write_all(b"st: a\r\n\r\n").unwrap();
    assert_eq!(Answer::read(&mut BufReader::new(&connections[1])).status, 200);
}

#[test]
fn connections_above_the_limit_are_told_so() {
    let server = Server::start(&["--max-connections", "3"]);
    let mut open: Vec<_> = (0..3).map(|_| server.connect()).collect();
    for connection in &mut open {
        connection.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert_eq!(Answer::read(&mut BufReader::new(connection)).status, 200);
    }
    let answer = server.get("/health");
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    answer.error();
    drop(open);
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.get("/health").status != 200 {
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn too_many_requests_are_told_to_come_again() {
    let server = Server::start(&["--max-running", "1", "--max-waiting", "1"]);
    let mut running = server.stream("/v1/chat/completions", &long_chat(1500));
    running.next_json();
    let waiting = server.stream("/v1/chat/completions", &long_chat(5));
    let refused = server.post("/v1/chat/completions", &chat("Hi", &json!({ "max_tokens": 1 })));
    assert_eq!((refused.status, &refused.error()["code"]), (429, &json!("rate_limit_exceeded")));
    assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    let mut streamed = chat("Hi", &json!({ "max_tokens": 1 }));
    streamed["stream"] = true.into();
    assert_eq!(server.post("/v1/chat/completions", &streamed).status, 429);
    // What waits is answered when there is a place.
    drop(running);
    assert!(waiting.all().len() > 1);
    server.json("/v1/chat/completions", &chat("Hi", &json!({ "max_tokens": 1 })));
}

#[test]
fn a_client_that_does_not_read_keeps_nobody_waiting() {
    let server = shared();
    let mut body = long_chat(1800);
    body["stream"] = true.into();
    body["logprobs"] = true.into();
    body["top_logprobs"] = 20.into();
    let deaf = server.send("POST", "/v1/chat/completions", "", body.to_string().as_bytes());
    for _ in 0..5 {
        server.json("/v1/chat/completions", &chat("Hi", &json!({ "max_tokens": 3 })));
    }
    drop(deaf);
    server.quiet();
}

#[test]
fn requests_behind_each_other_on_one_connection() {
    let server = shared();
    let mut connection = server.connect();
    let body = chat("Hi", &json!({ "max_tokens": 2 })).to_string();
    let one = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    connection.write_all(format!("{one}GET /nope HTTP/1.1\r\nHost: a\r\n\r\n{one}").as_bytes()).unwrap();
    let mut reader = BufReader::new(connection.try_clone().unwrap());
    let statuses = [0; 3].map(|_| Answer::read(&mut reader).status);
    assert_eq!(statuses, [200, 404, 200]);
    connection.shutdown(Shutdown::Write).unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}
