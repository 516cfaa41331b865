//! Requests as they should not be.

use std::io::{BufReader, Read, Write};

use serde_json::{Value, json};

use crate::harness::{Answer, chat, shared};

/// Asks something sound; the server still answers.
fn still_fine() {
    let server = shared();
    server.json("/v1/chat/completions", &chat("Hi", &json!({ "max_tokens": 1 })));
}

#[test]
fn bodies_that_will_not_do_are_refused_with_the_field() {
    let server = shared();
    let with = |more: Value| chat("Hi", &more).to_string().into_bytes();
    let deep = format!("{{\"messages\": {}1{}}}", "[".repeat(50_000), "]".repeat(50_000)).into_bytes();
    let cases: [(Vec<u8>, Option<&str>); 25] = [
        (b"".to_vec(), None),
        (b"{".to_vec(), None),
        (b"{\"messages\": [".to_vec(), None),
        (b"not json".to_vec(), None),
        (b"[]".to_vec(), None),
        (b"null".to_vec(), None),
        (b"{\"messages\": \"\xff\xfe\"}".to_vec(), None),
        (deep, None),
        (b"{}".to_vec(), Some("messages")),
        (b"{\"messages\": []}".to_vec(), Some("messages")),
        (b"{\"messages\": 5}".to_vec(), Some("messages")),
        (b"{\"messages\": [{\"role\": \"user\"}]}".to_vec(), Some("messages[0].content")),
        (b"{\"messages\": [{\"role\": \"nobody\", \"content\": \"\"}]}".to_vec(), Some("messages[0].role")),
        (with(json!({ "temperature": -0.5 })), Some("temperature")),
        (with(json!({ "temperature": "hot" })), Some("temperature")),
        (with(json!({ "top_p": 0 })), Some("top_p")),
        (with(json!({ "n": 1_000_000_000 })), Some("n")),
        (with(json!({ "max_tokens": 0 })), Some("max_tokens")),
        (with(json!({ "max_tokens": -1 })), Some("max_tokens")),
        (with(json!({ "top_logprobs": 21, "logprobs": true })), Some("top_logprobs")),
        (with(json!({ "logit_bias": { "1": 1e30 } })), None),
        (with(json!({ "stop": vec!["a"; 17] })), Some("stop")),
        (with(json!({ "stream": "yes" })), Some("stream")),
        (with(json!({ "response_format": { "type": "yaml" } })), None),
        (with(json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] })), None),
    ];
    for (body, param) in cases {
        for path in ["/v1/chat/completions", "/chat/completions"] {
            let answer = server.ask("POST", path, "", &body);
            let beginning = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
            assert_eq!(answer.status, 400, "{beginning}: {answer:?}");
            let error = answer.error();
            if let Some(param) = param {
                assert_eq!(error["param"], param, "{beginning}: {error}");
            }
        }
    }
    still_fine();
}

#[test]
fn what_the_model_cannot_do_is_said() {
    let server = shared();
    let refused = |path: &str, body: &Value| {
        let answer = server.post(path, body);
        (answer.status, answer.error())
    };
    let (status, error) = refused("/v1/chat/completions", &chat("Hi", &json!({ "model": "gpt-5" })));
    assert_eq!((status, &error["code"], &error["param"]), (404, &json!("model_not_found"), &json!("model")));
    // Context: the prompt alone, and with the answer.
    let long = "word ".repeat(3000);
    for (body, param) in
        [(chat(&long, &json!({})), "messages"), (chat("Hi", &json!({ "max_tokens": 2048 })), "messages")]
    {
        let (status, error) = refused("/v1/chat/completions", &body);
        assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")), "{error}");
        assert_eq!(error["param"], param);
    }
    let (status, error) = refused("/v1/completions", &json!({ "prompt": vec![7; 2048] }));
    assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")), "{error}");
    // Tokens that there are not.
    for body in [json!({ "prompt": [1, 2048] }), json!({ "prompt": [1, 4_000_000_000_u32] })] {
        let (status, error) = refused("/v1/completions", &body);
        assert_eq!((status, &error["param"]), (400, &json!("prompt")), "{error}");
    }
    assert_eq!(refused("/detokenize", &json!({ "tokens": [5000] })).0, 400);
    assert_eq!(refused("/v1/chat/completions", &chat("Hi", &json!({ "logit_bias": { "2048": 1 } }))).0, 400);
    let (status, error) = refused("/beta/completions", &json!({ "prompt": "a", "suffix": "b" }));
    assert_eq!((status, &error["param"]), (400, &json!("suffix")));
    let schema =
        json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": { "$ref": "http://127.0.0.1/x" } } });
    assert_eq!(refused("/v1/chat/completions", &chat("Hi", &json!({ "response_format": schema }))).0, 400);
    assert_eq!(refused("/v1/completions", &json!({ "prompt": vec!["a"; 2000] })).0, 400);
    // In a stream it is no stream then.
    let (status, _) = refused("/v1/chat/completions", &chat(&long, &json!({ "stream": true })));
    assert_eq!(status, 400);
    still_fine();
}

#[test]
fn paths_and_methods_that_there_are_not() {
    let server = shared();
    for path in ["/nope", "/v1", "/v1/chat", "/v1/chat/completions/", "//", "/%2e%2e/etc/passwd", "/v1/models/"] {
        let answer = server.get(path);
        assert_eq!((answer.status, &answer.error()["code"]), (404, &json!("unknown_url")), "{path}");
    }
    for (method, path, allowed) in [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("BREW", "/", "GET, HEAD"),
    ] {
        let answer = server.ask(method, path, "", b"");
        assert_eq!((answer.status, answer.header("allow")), (405, Some(&*allowed.to_lowercase())), "{method} {path}");
        assert_eq!(answer.error()["code"], "method_not_allowed");
    }
    // A page elsewhere may not ask in its reader's name.
    let answer = server.ask("GET", "/v1/models", "Origin: https://elsewhere.example\r\n", b"");
    assert_eq!(answer.status, 403);
    answer.error();
    let own = format!("Origin: http://{}\r\n", server.address);
    assert_eq!(server.ask("GET", "/v1/models", &own, b"").status, 200);
    // Watching takes a websocket and taps that there are.
    for path in ["/v1/watch", "/v1/watch?taps=nothing-known"] {
        let answer = server.get(path);
        assert!((400..430).contains(&answer.status), "{answer:?}");
        answer.error();
    }
}

#[test]
fn bodies_and_heads_that_are_too_large() {
    let server = shared();
    // Known beforehand: nothing of it need be sent.
    let mut stream = server.connect();
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999\r\n\r\n").unwrap();
    let answer = Answer::read(&mut BufReader::new(stream));
    assert_eq!((answer.status, &answer.error()["code"]), (413, &json!("request_too_large")));
    // Found out on the way.
    let mut stream = server.connect();
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    let chunk = [b"100000\r\n".to_vec(), vec![b' '; 1 << 20], b"\r\n".to_vec()].concat();
    for _ in 0..17 {
        stream.write_all(&chunk).unwrap();
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    let answer = Answer::read(&mut BufReader::new(stream));
    assert_eq!(answer.status, 413, "{answer:?}");
    // Just below the limit it is only no JSON.
    let answer = server.ask("POST", "/v1/completions", "", &vec![b'x'; 16 << 20]);
    assert_eq!(answer.status, 400);
    // Heads.
    let many = "X: a\r\n".repeat(150);
    let long = format!("X: {}\r\n", "a".repeat(200_000));
    for headers in [many, long] {
        let mut stream = server.connect();
        let _ = stream.write_all(format!("GET /health HTTP/1.1\r\nHost: a\r\n{headers}\r\n").as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer); // it may end in a reset, since not all was read
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&answer));
    }
    still_fine();
}

#[test]
fn what_is_no_http() {
    let server = shared();
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GET\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\ngarbage that is no frame at all, and long enough for one",
    ] {
        let mut stream = server.connect();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer); // a reset ends it as well
        let text = String::from_utf8_lossy(&answer);
        assert!(!text.contains(" 200 "), "{garbage:?}: {text}");
    }
    still_fine();
}
