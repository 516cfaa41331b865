//! Tokenizer, chat template, streaming and generation defaults, on real files, on golden cases and on bad input.

mod generation;
mod hostile;
mod template;
mod tokenizer;

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use moewe::text::{ChatOptions, GenerationDefaults, Message, Text, TextError};
use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

const BOS: &str = "<｜begin▁of▁sentence｜>";

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read_json(path: &str) -> Value {
    serde_json::from_slice(&fs::read(root(path)).unwrap()).unwrap()
}

/// A model directory with the given files.
fn model(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn load(dir: &TempDir) -> Result<Text, TextError> {
    Text::load(dir.path()).map(|text| text.expect("there is a tokenizer.json"))
}

fn demo_file(name: &str) -> Vec<u8> {
    fs::read(root("models/demo").join(name)).unwrap()
}

static DEMO: LazyLock<Text> = LazyLock::new(|| Text::load(&root("models/demo")).unwrap().unwrap());
/// The demo's tokenizer in the crate `tokenizers`, as reference.
static DEMO_REFERENCE: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| tokenizers::Tokenizer::from_bytes(demo_file("tokenizer.json")).unwrap());
static R1: LazyLock<Text> = LazyLock::new(|| {
    let config = fs::read(root("tests/data/tokenizers/deepseek-r1-config.json")).unwrap();
    load(&model(&[("tokenizer.json", r1_tokenizer().as_bytes()), ("tokenizer_config.json", &config)])).unwrap()
});
static V3: LazyLock<Text> = LazyLock::new(|| {
    let config = fs::read(root("tests/data/tokenizers/deepseek-v3-config.json")).unwrap();
    load(&model(&[("tokenizer.json", v3_tokenizer().as_bytes()), ("tokenizer_config.json", &config)])).unwrap()
});

fn r1_tokenizer() -> String {
    let packed = fs::File::open(root("tests/data/tokenizers/deepseek-r1.json.gz")).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
    text
}

/// The V3 file has placeholders where R1's has its two thinking tokens; see the README beside the data.
fn v3_tokenizer() -> String {
    let mut text = r1_tokenizer();
    let rest = "\n            \"single_word\": false,\n            \"lstrip\": false,\n            \"rstrip\": false,\n            ";
    for (think, number) in [("<think>", 798), ("</think>", 799)] {
        let from = format!("\"{think}\",{rest}\"normalized\": true,\n            \"special\": false");
        let to =
            format!("\"<｜place▁holder▁no▁{number}｜>\",{rest}\"normalized\": false,\n            \"special\": true");
        assert_eq!(text.matches(&from).count(), 1);
        text = text.replace(&from, &to);
    }
    assert_eq!(text.pop(), Some('\n'));
    text
}

fn sha256(text: &str) -> String {
    format!("{:x}", Sha256::digest(text))
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn messages(value: &Value) -> Vec<Message> {
    let message = |m: &Value| {
        let mut more = m.as_object().unwrap().clone();
        let role = more.remove("role").unwrap().as_str().unwrap().to_owned();
        let content = more.remove("content").unwrap().as_str().map(str::to_owned);
        Message { role, content, more }
    };
    value.as_array().unwrap().iter().map(message).collect()
}

/// All of a golden file: tokenisations, decodings, special tokens, rendered and tokenised chats.
fn golden(file: &str, tokenizer: &str, text: &Text) {
    let golden = read_json(&format!("tests/golden/tokenizer/{file}"));
    assert_eq!(sha256(tokenizer), golden["tokenizer_sha256"].as_str().unwrap());
    assert_eq!(text.vocab_size() as u64, golden["vocab_with_added"].as_u64().unwrap());
    assert_eq!(text.max_id() as usize, text.vocab_size() - 1);
    assert_eq!(text.special_ids().bos.map(u64::from), golden["bos_id"].as_u64());
    assert_eq!(text.special_ids().eos.map(u64::from), golden["eos_id"].as_u64());
    for token in golden["special"].as_array().unwrap() {
        let id = token["id"].as_u64().unwrap() as u32;
        assert_eq!(text.decode(&[id], false), token["content"].as_str().unwrap());
        assert_eq!(text.decode(&[id], true).is_empty(), token["special"].as_bool().unwrap(), "{token}");
    }
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 45);
    for case in cases {
        let (input, expected) = (case["text"].as_str().unwrap(), ids(&case["ids"]));
        assert_eq!(text.encode(input, false).unwrap(), expected, "{input:?}");
        assert_eq!(text.decode(&expected, false), case["decoded"].as_str().unwrap());
        assert_eq!(text.decode(&expected, true), case["decoded_skip_special"].as_str().unwrap());
        assert_eq!(streamed(text, &expected, false).concat(), case["decoded"].as_str().unwrap());
    }
    for case in golden["chat"].as_array().unwrap() {
        let (messages, options) = (messages(&case["messages"]), ChatOptions::default());
        assert_eq!(text.render_chat(&messages, &options).unwrap(), case["rendered"].as_str().unwrap());
        assert_eq!(text.encode_chat(&messages, &options).unwrap(), ids(&case["ids"]));
    }
}

fn streamed(text: &Text, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut stream = text.stream(skip_special);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    pieces.push(stream.finish());
    pieces
}
