//! Who may ask, and for how much.

use std::fs;

use serde_json::json;

use crate::cli::root;
use crate::harness::{Server, chat};

const ADA: &str = "sk-ada-0123456789abcdef";
const BOB: &str = "sk-bob-0123456789abcdef";

#[test]
fn only_keys_of_the_file_may_ask_and_only_within_their_budget() {
    let file = root().join("keys");
    fs::write(&file, format!("# who\nada {ADA}\nbob {BOB} budget=0.0001\n")).unwrap();
    let file = file.to_str().unwrap();
    let server =
        Server::start(&["--api-key-file", file, "--price-input", "1", "--price-output", "2", "--log", "--log-prompts"]);
    let body = chat("A secret question", &json!({ "max_tokens": 3 })).to_string();
    let ask = |headers: &str| server.ask("POST", "/v1/chat/completions", headers, body.as_bytes());
    let bearer = |key: &str| format!("Authorization: Bearer {key}\r\n");
    for headers in [
        String::new(),
        bearer(""),
        bearer("sk-eve-0123456789abcdef"),
        bearer(&ADA[..20]),
        bearer(&format!("{ADA}x")),
        bearer("ada"),
        bearer(&"x".repeat(10_000)),
        format!("Authorization: Basic {ADA}\r\n"),
        format!("Authorization: {ADA}\r\n"),
        "Authorization: Bearer \u{fc}\r\n".to_owned(),
        format!("X-Api-Key: {ADA}\r\n"),
    ] {
        let answer = ask(&headers);
        assert_eq!((answer.status, &answer.error()["code"]), (401, &json!("invalid_api_key")), "{headers}");
        assert!(!answer.text().contains("sk-"), "{}", answer.text());
    }
    for path in ["/metrics", "/v1/models", "/openapi.json", "/v1/watch"] {
        assert_eq!(server.get(path).status, 401, "{path}");
        assert_ne!(server.ask("GET", path, &bearer(BOB), b"").status, 401, "{path}");
    }
    for path in ["/", "/health", "/ready"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert_eq!(ask(&bearer(ADA)).status, 200);
    assert_eq!(ask(&bearer(ADA).replace("Bearer", "bearer")).status, 200);
    // Bob's budget is spent soon; Ada's is none.
    let spent = (0..30).map(|_| ask(&bearer(BOB))).find(|answer| answer.status != 200).expect("it is spent");
    assert_eq!((spent.status, &spent.error()["code"]), (402, &json!("insufficient_balance")));
    assert_eq!(ask(&bearer(BOB)).status, 402);
    assert_eq!(ask(&bearer(ADA)).status, 200);
    // The log names who asked, and what, but no key.
    server.says(" 402 POST /v1/chat/completions key=bob ");
    let log = server.stderr();
    assert!(log.contains(" 200 POST /v1/chat/completions key=ada prompt="), "{log}");
    assert!(log.contains("A secret question"), "{log}");
    assert!(!log.contains("sk-"), "{log}");
}

#[test]
fn a_viewer_needs_permission_and_prompts_are_not_logged_unasked() {
    let server = Server::start(&["--log"]);
    let answer = server.get("/v1/watch");
    assert_eq!(answer.status, 403);
    assert!(answer.error()["message"].as_str().unwrap().contains("--allow-watch"));
    server.json("/v1/chat/completions", &chat("A secret question", &json!({ "max_tokens": 1 })));
    server.says(" 200 POST /v1/chat/completions key=anonymous prompt=");
    assert!(!server.stderr().contains("secret"), "{}", server.stderr());
}
