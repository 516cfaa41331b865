//! `moewe bench serve`: many clients at once, each of whom is answered what it is answered alone.

#[path = "common/cli.rs"]
mod cli;
#[path = "serve/mod.rs"]
mod harness;

use cli::moewe;
use harness::Server;
use serde_json::Value;

fn url(server: &Server) -> String {
    format!("http://{}", server.address)
}

#[test]
fn many_clients_are_answered_what_they_are_answered_alone() {
    let server = Server::start(&["--max-running", "16"]);
    let said = moewe![
        "bench",
        "serve",
        url(&server),
        "--clients",
        "24",
        "--requests",
        "48",
        "--distinct",
        "12",
        "--prompt-tokens",
        "3,120",
        "--max-tokens",
        "2,24",
        "--verify",
        "--seed",
        "3",
        "--json"
    ]
    .ok();
    let figures: Value = serde_json::from_str(&said.stdout).unwrap();
    let requests = &figures["requests"];
    assert_eq!((&requests["sent"], &requests["answered"]), (&48.into(), &48.into()), "{figures}");
    assert_eq!((&requests["differing"], &requests["failed"]), (&0.into(), &0.into()), "{figures}");
    let number =
        |pointer: &str| figures.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{figures}"));
    // Alone and again: what the ledger has is what the clients counted, and the requests that were sent alone.
    assert!(number("/tokens/new") > 48.0 && number("/tokens/cached") > 0.0 && number("/tokens/prompt") >= 48.0 * 3.0);
    let [median, worst] = ["p50", "p100"].map(|p| number(&format!("/milliseconds/first_token/{p}")));
    assert!(0.0 < median && median <= worst && worst <= number("/milliseconds/whole/p100"), "{figures}");
    assert!(number("/milliseconds/per_token/p50") > 0.0 && number("/per_second/new_tokens") > 0.0);
    server.quiet();

    let said = moewe!["bench", "serve", url(&server), "--rate", "40", "--requests", "10", "--max-tokens", "2,4"].ok();
    assert!(said.stdout.contains("10 requests: 10 answered, 0 refused"), "{}", said.stdout);
    assert!(said.stdout.contains("40 requests a second at random"), "{}", said.stdout);
}

#[test]
fn refusals_are_counted_and_are_no_failures() {
    let server = Server::start(&["--max-running", "1", "--max-waiting", "1"]);
    let said =
        moewe!["bench", "serve", url(&server), "--clients", "8", "--requests", "16", "--max-tokens", "60,60", "--json"]
            .ok();
    let requests = serde_json::from_str::<Value>(&said.stdout).unwrap()["requests"].clone();
    let [answered, refused] = ["answered", "refused"].map(|name| requests[name].as_u64().unwrap());
    assert!(answered >= 2 && refused >= 1 && answered + refused == 16, "{requests}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    let failed = |args: &[&str]| {
        let args = ["bench", "serve"].iter().chain(args).map(Into::into).collect();
        let said = cli::Call::new(args).run();
        assert_ne!(said.code, Some(0), "{}", said.stdout);
        said.stderr
    };
    assert!(failed(&["https://127.0.0.1:1"]).contains("expected http://HOST:PORT"));
    assert!(failed(&["http://127.0.0.1:1"]).contains("is `moewe serve` running there?"));
    assert!(failed(&["http://127.0.0.1:1", "--prompt-tokens", "9,3"]).contains("expected two numbers"));
    assert!(failed(&["http://127.0.0.1:1", "--api-key-file", "/nowhere"]).contains("cannot read /nowhere"));
    let keys = cli::root().join("keys.txt");
    std::fs::write(&keys, "someone sk-0123456789abcdef\n").unwrap();
    let server = Server::start(&["--api-key-file", keys.to_str().unwrap()]);
    let said = moewe!["bench", "serve", url(&server)].run();
    assert!(said.stderr.contains("401"), "{}", said.stderr);
    // One request is too long for the model.
    let said = moewe![
        "bench",
        "serve",
        url(&server),
        "--api-key-file",
        keys,
        "--requests",
        "2",
        "--prompt-tokens",
        "3000,3000"
    ]
    .run();
    assert!(said.code == Some(1) && said.stderr.contains("2 of 2 requests failed: 400"), "{}", said.stderr);
}
