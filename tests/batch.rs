//! `moewe run --batch`: results are those of single runs whatever shares their batches, a batch that was stopped goes on,
//! and what is wrong with a file is said with its line.

#[path = "common/cli.rs"]
mod cli;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cli::{Call, demo, golden, moewe, pipe, read_json, tiny_bundle};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A directory with a batch in it.
struct Scene {
    temp: TempDir,
}

impl Scene {
    fn new(requests: &[Value]) -> Self {
        let scene = Self { temp: tempfile::tempdir().unwrap() };
        scene.requests(requests);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn write(&self, text: impl AsRef<[u8]>) {
        fs::write(self.path("batch.jsonl"), text).unwrap();
    }

    fn requests(&self, requests: &[Value]) {
        self.write(requests.iter().map(|request| request.to_string() + "\n").collect::<String>());
    }

    fn call(&self, model: &Path, options: &[&str]) -> Call {
        let mut args: Vec<OsString> = vec!["run".into(), model.into(), "--batch".into()];
        args.push(self.path("batch.jsonl").into());
        args.extend(options.iter().map(Into::into));
        Call::new(args)
    }

    fn out(&self) -> PathBuf {
        self.path("batch.results.jsonl")
    }

    /// The results, by line; each is there once.
    fn results(&self) -> BTreeMap<u64, Value> {
        let text = fs::read_to_string(self.out()).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        let results: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let by_line: BTreeMap<u64, Value> =
            results.iter().map(|result| (result["line"].as_u64().unwrap(), result.clone())).collect();
        assert_eq!(by_line.len(), results.len(), "a request was run twice: {text}");
        by_line
    }
}

/// Requests of golden sequences with what greedy sampling adds.
fn golden_requests() -> (Vec<Value>, Vec<Value>) {
    let listed = read_json(&golden("v3-tiny").join("golden/golden.json"));
    let sequences = ["len1", "len7", "len64", "long"].map(|name| &listed["sequences"][name]);
    let request = |sequence: &Value| {
        let count = sequence["greedy"].as_array().unwrap().len();
        json!({"tokens": sequence["input_ids"], "max_new_tokens": count, "ignore_eos": true})
    };
    (sequences.iter().map(|s| request(s)).collect(), sequences.iter().map(|s| s["greedy"].clone()).collect())
}

/// Many requests that end at different times.
fn many(count: u64) -> Vec<Value> {
    let request = |number: u64| {
        json!({
            "id": format!("request {number}"), "tokens": [1 + number, 7, 9 + number % 5], "ignore_eos": true,
            "max_new_tokens": 2 + number * 9, "temperature": 0.9, "seed": number,
        })
    };
    (0..count).map(request).collect()
}

#[test]
fn results_are_the_golden_ones() {
    let (requests, greedy) = golden_requests();
    let scene = Scene::new(&requests);
    for options in [&["--mtp", "off"][..], &["--mtp", "2"], &["--no-prefix-cache", "--prefill-chunk", "5"]] {
        let said = scene.call(tiny_bundle(), options).ok();
        assert!(said.stdout.contains("4 of 4 requests done (0 of them before), 0 failed"), "{said:?}");
        assert_eq!(said.stderr, "");
        let results = scene.results();
        for (line, greedy) in (1..).zip(&greedy) {
            assert_eq!(results[&line]["tokens"], *greedy, "{line} {options:?}");
            assert_eq!((&results[&line]["stop_reason"], &results[&line]["text"]), (&json!("length"), &Value::Null));
            let tokens = requests[line as usize - 1]["tokens"].as_array().unwrap().len();
            assert_eq!(results[&line]["prompt_tokens"], tokens);
        }
        fs::remove_file(scene.out()).unwrap();
    }
}

#[test]
fn results_are_those_of_single_runs() {
    let requests = [
        json!({"id": "greedy", "prompt": "The king said to", "temperature": 0}),
        json!({"id": 2, "prompt": "The king said to", "seed": 5}),
        json!({"prompt": "Once upon a time", "seed": 5, "temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01,
               "repetition_penalty": 1.1, "max_new_tokens": 9, "ignore_eos": true, "priority": 3}),
        json!({"id": 2.5, "messages": [{"role": "user", "content": "Write a proverb."}], "temperature": 0}),
    ];
    let scene = Scene::new(&requests);
    let said = scene.call(&demo(), &["-n", "14", "--seed", "3", "--json"]).json();
    let field = |name: &str| said[name].as_u64().unwrap();
    assert_eq!((field("requests"), field("done"), field("resumed"), field("failed")), (4, 4, 0, 0));
    assert_eq!(said["results"], scene.out().to_str().unwrap());
    let results = scene.results();
    let tokens = |line: u64| results[&line]["tokens"].as_array().unwrap().len() as u64;
    assert_eq!(field("new_tokens"), (1..=4).map(tokens).sum::<u64>());
    assert_eq!(said["mtp"]["mode"], "auto");
    let same = |line: u64, options: &[&str]| {
        let mut args: Vec<OsString> = vec!["run".into(), demo().into(), "--json".into()];
        args.extend(options.iter().map(Into::into));
        let single = Call::new(args).json();
        let result = &results[&line];
        for field in ["tokens", "text", "stop_reason"] {
            assert_eq!(result[field], single[field], "{line} {field}");
        }
        assert_eq!(result["prompt_tokens"], single["prompt_tokens"].as_array().unwrap().len());
        for field in ["waited_seconds", "prefill_seconds", "decode_seconds", "decode_tokens_per_second"] {
            assert!(result["timing"][field].is_f64() && single["timing"][field].is_f64(), "{field}");
        }
    };
    same(1, &["The king said to", "-n", "14", "-t", "0"]);
    same(2, &["The king said to", "-n", "14", "--seed", "5"]);
    let all = "--seed 5 -t 1.2 --top-k 20 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 -n 9 --ignore-eos";
    same(3, &["Once upon a time"].into_iter().chain(all.split(' ')).collect::<Vec<_>>());
    let chat = moewe!["chat", demo(), "-n", "14", "-t", "0"].stdin("Write a proverb.\n").ok().stdout;
    assert_eq!(results[&4]["text"].as_str().unwrap().to_owned() + "\n", chat);
    let ids: Vec<&Value> = results.values().map(|result| &result["id"]).collect();
    assert_eq!(ids, [&json!("greedy"), &json!(2), &Value::Null, &json!(2.5)]);
    // A token that ends the text, for one request alone.
    let stop = &results[&1]["tokens"][4];
    scene.requests(&[
        requests[0].clone(),
        json!({"prompt": "The king said to", "temperature": 0, "stop_token_ids": [stop]}),
    ]);
    scene.call(&demo(), &["-n", "14", "--out", scene.path("x.jsonl").to_str().unwrap()]).ok();
    let text = fs::read_to_string(scene.path("x.jsonl")).unwrap();
    let other: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let stopped = other.iter().find(|result| result["line"] == 2).unwrap();
    assert_eq!((&stopped["stop_reason"], stopped["tokens"].as_array().unwrap().len()), (&json!("eos"), 5));
}

#[test]
fn the_order_of_requests_changes_nothing() {
    let mut requests = many(16);
    let scene = Scene::new(&requests);
    let by_id = || -> BTreeMap<String, Value> {
        scene.call(tiny_bundle(), &[]).ok();
        let results = scene.results().into_values();
        let by_id = results.map(|result| (result["id"].to_string(), result["tokens"].clone())).collect();
        fs::remove_file(scene.out()).unwrap();
        by_id
    };
    let first = by_id();
    assert_eq!(first.len(), 16);
    requests.reverse();
    requests.swap(3, 11);
    scene.requests(&requests);
    assert_eq!(by_id(), first);
}

/// Waits until there are so many whole lines of results.
fn wait_for(out: &Path, lines: usize) {
    let begun = Instant::now();
    while fs::read_to_string(out).map_or(0, |text| text.matches('\n').count()) < lines {
        assert!(begun.elapsed() < Duration::from_mins(1), "no results");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_batch_that_was_killed_goes_on() {
    let scene = Scene::new(&many(24));
    let mut child = scene.call(tiny_bundle(), &[]).spawn();
    wait_for(&scene.out(), 3);
    child.kill().unwrap();
    child.wait().unwrap();
    let before = fs::read_to_string(scene.out()).unwrap();
    let whole = &before[..=before.rfind('\n').unwrap()];
    let there = whole.lines().count();
    assert!((3..24).contains(&there), "{there}");
    let said = scene.call(tiny_bundle(), &["--json"]).json();
    assert_eq!((said["resumed"].as_u64(), said["done"].as_u64()), (Some(there as u64), Some(24 - there as u64)));
    assert!(fs::read_to_string(scene.out()).unwrap().starts_with(whole));
    let results = scene.results();
    assert_eq!(results.keys().copied().collect::<Vec<_>>(), (1..=24).collect::<Vec<_>>());
    // Nothing is left, so nothing is loaded.
    let complete = fs::read_to_string(scene.out()).unwrap();
    let said = scene.call(tiny_bundle(), &["--json"]).json();
    assert_eq!((said["resumed"].as_u64(), said["new_tokens"].as_u64()), (Some(24), Some(0)));
    assert_eq!(fs::read_to_string(scene.out()).unwrap(), complete);
    // A line that was not written whole is written again, wherever it broke off.
    let last = complete.trim_end().rfind('\n').unwrap() + 1;
    let line: u64 = serde_json::from_str::<Value>(&complete[last..]).unwrap()["line"].as_u64().unwrap();
    for cut in [last + 1, last + 5, last + 40, complete.len() - 1] {
        fs::write(scene.out(), &complete[..cut]).unwrap();
        let said = scene.call(tiny_bundle(), &[]).ok();
        assert!(said.stdout.contains("24 of 24 requests done (23 of them before)"), "{said:?}");
        assert!(said.stderr.contains("23 results are there already"), "{said:?}");
        let again = scene.results();
        assert_eq!(again.len(), 24);
        assert_eq!(again[&line]["tokens"], results[&line]["tokens"]);
    }
}

#[test]
fn ctrl_c_stops_a_batch_that_goes_on_later() {
    let scene = Scene::new(&many(24));
    let child = scene.call(tiny_bundle(), &[]).spawn();
    wait_for(&scene.out(), 1);
    cli::interrupt(&child);
    let said = cli::finish(child);
    assert_eq!((said.code, said.stderr.as_str()), (Some(130), ""), "{said:?}");
    let there = scene.results().len();
    assert!((1..24).contains(&there));
    assert!(said.stdout.contains(&format!("{there} of 24 requests done")), "{said:?}");
    scene.call(tiny_bundle(), &[]).ok();
    assert_eq!(scene.results().len(), 24);
}

#[test]
fn a_request_that_fails_leaves_the_others() {
    let mut requests = many(3);
    requests.insert(1, json!({"id": "long", "tokens": vec![7; 257]}));
    let scene = Scene::new(&requests);
    let words = ["1 of 4 requests failed", "batch.results.jsonl"];
    scene.call(tiny_bundle(), &[]).refused(1, &words);
    let results = scene.results();
    assert_eq!((results.len(), &results[&2]["id"]), (4, &json!("long")));
    assert!(results[&2]["error"].as_str().unwrap().contains("257 tokens, the model's context holds 256"));
    assert!(results[&2].get("tokens").is_none());
    assert!([1, 3, 4].iter().all(|line| results[line].get("error").is_none()));
    // It alone is tried again, and has one line.
    let kept: BTreeSet<String> = fs::read_to_string(scene.out()).unwrap().lines().map(str::to_owned).collect();
    let said = scene.call(tiny_bundle(), &["--json"]).run();
    assert_eq!(said.code, Some(1));
    let summary: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!((&summary["resumed"], &summary["failed"], &summary["done"]), (&json!(3), &json!(1), &json!(0)));
    let again: BTreeSet<String> = fs::read_to_string(scene.out()).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(again, kept);
    scene.results();
    assert_eq!(fs::read_dir(scene.temp.path()).unwrap().count(), 2, "the batch and its results");
}

#[test]
fn results_of_others_are_left_alone() {
    let requests = many(3);
    let scene = Scene::new(&requests);
    scene.call(tiny_bundle(), &[]).ok();
    let out = scene.out();
    let bytes = fs::read(&out).unwrap();
    let refused = |model: &Path, options: &[&str], words: &[&str]| {
        let before = fs::read(&out).unwrap();
        scene.call(model, options).refused(2, &[words, &["batch.results.jsonl:", "give another --out"]].concat());
        assert_eq!(fs::read(&out).unwrap(), before);
    };
    let other = ["is of another model, with other options, or of another request"];
    refused(&golden("v3-mtp-accept-tiny"), &[], &other);
    refused(tiny_bundle(), &["--top-k", "3"], &other);
    refused(tiny_bundle(), &["--precision", "fast"], &other);
    // What the requests say themselves goes before the command line.
    scene.call(tiny_bundle(), &["--temperature", "0.1", "-n", "5", "--seed", "9"]).ok();
    scene.requests(&[requests[1].clone(), requests[0].clone(), requests[2].clone()]);
    refused(tiny_bundle(), &[], &[":1:", other[0]]);
    scene.requests(&requests[..2]);
    refused(tiny_bundle(), &[], &[":3:", other[0]]);
    scene.requests(&requests);
    // What is no result at all is never cut off.
    for text in ["my notes", "my notes\n", "{\"line\":1}\n", "[]\n", "\n", "\0\0\0\n", "{\"lines\": [1, 2"] {
        fs::write(&out, text).unwrap();
        refused(tiny_bundle(), &[], &["is no result of"]);
    }
    let batch = scene.path("batch.jsonl");
    let itself = scene.call(tiny_bundle(), &["--out", batch.to_str().unwrap()]);
    itself.refused(2, &["batch.jsonl: is the batch itself"]);
    for place in ["/dev/null", scene.temp.path().to_str().unwrap()] {
        scene.call(tiny_bundle(), &["--out", place]).refused(2, &[place, "is no plain file"]);
    }
    scene.call(tiny_bundle(), &["--out", "/nowhere/x"]).refused(1, &["cannot write /nowhere/x"]);
    // One process at a time.
    fs::write(&out, &bytes).unwrap();
    let locked = File::open(&out).unwrap();
    locked.lock().unwrap();
    scene.call(tiny_bundle(), &[]).refused(1, &["batch.results.jsonl: another process writes results to it"]);
    drop(locked);
    scene.call(tiny_bundle(), &[]).ok();
}

#[test]
fn empty_batches() {
    for text in ["", "\n", "\n  \r\n\t\n"] {
        let scene = Scene::new(&[]);
        scene.write(text);
        let said = scene.call(tiny_bundle(), &["--json"]).json();
        assert_eq!((&said["requests"], &said["done"]), (&json!(0), &json!(0)));
        assert_eq!(fs::read(scene.out()).unwrap(), b"");
    }
    // Lines are counted with the empty ones, and the last may lack its end.
    let scene = Scene::new(&[]);
    scene.write("\n\n{\"tokens\": [1], \"max_new_tokens\": 1}\r\n\n {\"tokens\": [2], \"max_new_tokens\": 1}");
    scene.call(tiny_bundle(), &[]).ok();
    assert_eq!(scene.results().keys().copied().collect::<Vec<_>>(), [3, 5]);
}

#[test]
fn malformed_requests() {
    let scene = Scene::new(&[]);
    let wrong = |model: &Path, line: &[u8], words: &[&str]| {
        scene.write([b"{\"tokens\": [1]}\n\n", line, b"\n{\"tokens\": [2]}\n"].concat());
        scene.call(model, &[]).refused(1, &[&["batch.jsonl:3: "], words].concat());
        assert!(!scene.out().exists(), "nothing ran");
    };
    let tiny = tiny_bundle();
    for (line, words) in [
        ("{\"tokens\": [1]", &["expected a JSON object", "column"][..]),
        ("{\"tokens\": [1]} {}", &["trailing characters"]),
        ("[1, 2]", &["expected a JSON object", "invalid type: sequence"]),
        ("null", &["expected a JSON object"]),
        ("hello", &["expected a JSON object"]),
        ("{\"tokens\": [1], \"tokens\": [2]}", &["\"tokens\" is there twice"]),
        ("{}", &["one of the fields \"prompt\", \"tokens\" and \"messages\", found none"]),
        ("{\"tokens\": [1], \"prompt\": \"a\"}", &["no tokenizer.json"]),
        ("{\"tokens\": [1], \"temprature\": 1}", &["unknown field \"temprature\"", "there are prompt", "temperature"]),
        ("{\"tokens\": []}", &["\"tokens\" is []", "at least one"]),
        ("{\"tokens\": [1, 320]}", &["\"tokens\" is [1,320]", "ids from 0 to 319"]),
        ("{\"tokens\": [1, -1]}", &["\"tokens\""]),
        ("{\"tokens\": [1.5]}", &["\"tokens\""]),
        ("{\"tokens\": \"1,2\"}", &["\"tokens\" is \"1,2\""]),
        ("{\"tokens\": null}", &["\"tokens\" is null"]),
        ("{\"tokens\": [1], \"id\": [1]}", &["\"id\" is [1]", "a text or a number"]),
        ("{\"tokens\": [1], \"max_new_tokens\": 0}", &["\"max_new_tokens\" is 0", "from 1 to"]),
        ("{\"tokens\": [1], \"max_new_tokens\": 4294967296}", &["\"max_new_tokens\" is 4294967296"]),
        ("{\"tokens\": [1], \"max_new_tokens\": 1.5}", &["\"max_new_tokens\" is 1.5"]),
        ("{\"tokens\": [1], \"temperature\": -1}", &["\"temperature\" is -1", "0 or more"]),
        ("{\"tokens\": [1], \"temperature\": 1e300}", &["\"temperature\" is inf"]),
        ("{\"tokens\": [1], \"temperature\": \"warm\"}", &["\"temperature\" is \"warm\"", "a number"]),
        ("{\"tokens\": [1], \"top_p\": 0}", &["\"top_p\" is 0", "above 0"]),
        ("{\"tokens\": [1], \"min_p\": 2}", &["\"min_p\" is 2"]),
        ("{\"tokens\": [1], \"repetition_penalty\": 0}", &["\"repetition_penalty\" is 0"]),
        ("{\"tokens\": [1], \"top_k\": -1}", &["\"top_k\" is -1"]),
        ("{\"tokens\": [1], \"seed\": -1}", &["\"seed\" is -1"]),
        ("{\"tokens\": [1], \"stop_token_ids\": 3}", &["\"stop_token_ids\" is 3", "a list of token ids"]),
        ("{\"tokens\": [1], \"ignore_eos\": 1}", &["\"ignore_eos\" is 1", "true or false"]),
        ("{\"tokens\": [1], \"priority\": 2147483648}", &["\"priority\" is 2147483648"]),
        ("{\"prompt\": \"a\"}", &["\"prompt\"", "no tokenizer.json"]),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", &["\"messages\"", "chat template"]),
    ] {
        wrong(tiny, line.as_bytes(), words);
    }
    wrong(tiny, b"{\"tokens\": [1], \"id\": \"\xff\"}", &["expected a JSON object"]);
    wrong(tiny, "[".repeat(100_000).as_bytes(), &["expected a JSON object"]);
    for (line, words) in [
        ("{\"prompt\": \"\"}", &["\"prompt\" is empty"][..]),
        ("{\"prompt\": 5}", &["\"prompt\" is 5", "a text"]),
        ("{\"prompt\": \"a\", \"tokens\": [1]}", &["found several"]),
        ("{\"messages\": []}", &["\"messages\" is []", "at least one"]),
        ("{\"messages\": [{\"content\": \"a\"}]}", &["\"messages\" has", "\"role\""]),
        ("{\"messages\": [{\"role\": \"user\", \"content\": 5}]}", &["\"messages\" has"]),
        ("{\"messages\": [\"a\"]}", &["\"messages\" has \"a\""]),
    ] {
        wrong(&demo(), line.as_bytes(), words);
    }
    // A line that never ends is not read into memory.
    scene.write(vec![b' '; (64 << 20) + 2]);
    scene.call(tiny, &[]).refused(1, &["batch.jsonl:1: the line is longer than 67108864 bytes"]);
}

#[test]
fn calls_that_make_no_sense() {
    let scene = Scene::new(&many(1));
    let tiny = tiny_bundle();
    scene.call(tiny, &["a prompt"]).refused(2, &["cannot be used with"]);
    scene.call(tiny, &["--tokens", "1"]).refused(2, &["cannot be used with"]);
    scene.call(tiny, &["--prompt", "a=b"]).refused(2, &["cannot be used with"]);
    scene.call(tiny, &["--heatmap"]).refused(2, &["cannot be used with"]);
    scene.call(tiny, &["--record", "x"]).refused(2, &["--batch serves the unchanged model unwatched"]);
    scene.call(tiny, &["--mute", "1:1"]).refused(2, &["--batch serves the unchanged model unwatched"]);
    scene.call(&golden("v2-tiny"), &["--mtp", "2"]).refused(2, &["no modules of multi-token prediction"]);
    moewe!["run", tiny, "--tokens", "1", "--out", "x"].refused(2, &["--batch"]);
    moewe!["run", tiny, "--batch", scene.path("none")].refused(2, &["none: no such file"]);
    moewe!["run", tiny, "--batch", scene.temp.path()].refused(2, &["is no plain file"]);
    pipe(&scene.path("pipe"));
    moewe!["run", tiny, "--batch", scene.path("pipe")].refused(2, &["is no plain file"]);
    assert!(!scene.out().exists());
}
