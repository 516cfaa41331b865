//! Tokenizer, chat template, streaming and generation defaults, on real files, on golden cases and on bad input.

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

#[test]
fn deepseek_v3_golden_cases() {
    golden("cases.json", &v3_tokenizer(), &V3);
}

#[test]
fn deepseek_r1_golden_cases() {
    golden("cases-r1.json", &r1_tokenizer(), &R1);
}

/// The configurations of the two packages differ in `add_bos_token`.
#[test]
fn the_begin_token_is_added_where_the_configuration_says_so() {
    assert_eq!(V3.encode("Hello", true).unwrap(), [0, 19923]);
    assert_eq!(V3.encode("", true).unwrap(), [0]);
    assert_eq!(R1.encode("Hello", true).unwrap(), [19923]);
    assert_eq!(V3.encode(&format!("{BOS}Hello"), true).unwrap(), [0, 19923], "not twice");
}

#[test]
fn the_end_token_is_added_where_the_configuration_says_so() {
    let config = json!({"bos_token": BOS, "eos_token": {"content": "<｜end▁of▁sentence｜>"}, "add_eos_token": true});
    let dir = model(&[
        ("tokenizer.json", &demo_file("tokenizer.json")),
        ("tokenizer_config.json", config.to_string().as_bytes()),
    ]);
    let text = load(&dir).unwrap();
    let bare = text.encode("x", false).unwrap();
    assert_eq!(text.encode("x", true).unwrap(), [bare, vec![1]].concat());
}

/// Where the configuration is silent, the file's own post-processor decides; the Llama classes add the begin token.
#[test]
fn without_add_bos_token_the_post_processor_or_the_class_decides() {
    let mut tokenizer: Value = serde_json::from_slice(&demo_file("tokenizer.json")).unwrap();
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    });
    let bytes = tokenizer.to_string();
    let first = |config: Option<Value>| {
        let config = config.map(|config| config.to_string());
        let mut files = vec![("tokenizer.json", bytes.as_bytes())];
        files.extend(config.as_ref().map(|config| ("tokenizer_config.json", config.as_bytes())));
        load(&model(&files)).unwrap().encode("x", true).unwrap()[0]
    };
    assert_eq!(first(None), 0);
    assert_eq!(first(Some(json!({"bos_token": BOS, "add_bos_token": true}))), 0);
    assert_ne!(first(Some(json!({"bos_token": BOS, "add_bos_token": false}))), 0);

    let class = json!({"bos_token": BOS, "tokenizer_class": "LlamaTokenizerFast"}).to_string();
    let plain = demo_file("tokenizer.json");
    let text = load(&model(&[("tokenizer.json", &plain), ("tokenizer_config.json", class.as_bytes())])).unwrap();
    assert_eq!(text.encode("x", true).unwrap()[0], 0);
}

#[test]
fn a_model_without_tokenizer_has_no_text() {
    assert!(Text::load(model(&[]).path()).unwrap().is_none());
    assert!(Text::load(Path::new("/no/such/directory")).unwrap().is_none());
}

#[test]
fn the_demo_model() {
    assert_eq!(DEMO.vocab_size(), 2048);
    assert_eq!((DEMO.special_ids().bos, DEMO.special_ids().eos, DEMO.special_ids().pad), (Some(0), Some(1), Some(2)));
    let text = "The king said to\n12+7=19 Jehová á 🙂 fn main() {}";
    let ids = DEMO.encode(text, true).unwrap();
    assert_eq!(ids[0], 0);
    assert_eq!(ids[1..], *DEMO_REFERENCE.encode(text, false).unwrap().get_ids());
    assert_eq!(DEMO.decode(&ids, true), text);

    let generation = DEMO.generation();
    assert_eq!(generation.do_sample, Some(true));
    assert_eq!((generation.temperature, generation.top_p), (Some(0.7), Some(0.95)));
    assert_eq!(DEMO.eos_ids(), [1]);

    let messages = [Message::user("Hi"), Message::assistant("Hello."), Message::user("Bye")];
    let chat = DEMO.encode_chat(&messages, &ChatOptions::default()).unwrap();
    assert_eq!(chat.iter().filter(|&&id| id == 0).count(), 1, "one begin token");
    assert_eq!(
        DEMO.decode(&chat, false),
        format!("{BOS}<｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜>")
    );
}

/// Conversations and template constructs against Python's jinja2; see `tests/data/tokenizers/chat_cases.py`.
#[test]
fn templates_render_as_in_python() {
    for case in read_json("tests/data/tokenizers/chat-cases.json").as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let own;
        let text = match (case["model"].as_str(), case["template"].as_str()) {
            (Some("deepseek-v3"), _) => &*V3,
            (Some("deepseek-r1"), _) => &*R1,
            (_, template) => {
                own = with_template(template.unwrap());
                &own
            }
        };
        let options = ChatOptions {
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            tools: case["tools"].as_array().cloned(),
            ..ChatOptions::default()
        };
        match (text.render_chat(&messages(&case["messages"]), &options), case["rendered"].as_str()) {
            (Ok(found), Some(expected)) => assert_eq!(found, expected, "{name}"),
            (Err(TextError::TemplateRender { detail, .. }), None) => {
                let expected = case["error"].as_str().unwrap();
                assert!(detail.contains(expected), "{name}: {detail} lacks {expected}");
            }
            (found, expected) => panic!("{name}: found {found:?}, expected {expected:?}"),
        }
    }
}

/// The demo's tokenizer with another chat template.
fn with_template(template: &str) -> Text {
    let dir = model(&[("tokenizer.json", &demo_file("tokenizer.json")), ("chat_template.jinja", template.as_bytes())]);
    load(&dir).unwrap()
}

#[test]
fn templates_are_found_where_publishers_put_them() {
    let tokenizer = demo_file("tokenizer.json");
    let render = |files: &[(&str, Value)], tools: Option<Vec<Value>>| {
        let texts: Vec<(&str, String)> = files
            .iter()
            .map(|(name, value)| (*name, value.as_str().map_or(value.to_string(), str::to_owned)))
            .collect();
        let mut all: Vec<(&str, &[u8])> = texts.iter().map(|(name, text)| (*name, text.as_bytes())).collect();
        all.push(("tokenizer.json", &tokenizer));
        let options = ChatOptions { tools, ..ChatOptions::default() };
        load(&model(&all))?.render_chat(&[Message::user("Hi")], &options)
    };
    let config = |template: Value| ("tokenizer_config.json", json!({"bos_token": BOS, "chat_template": template}));
    let list = json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]);
    assert_eq!(render(&[config(json!("{{ bos_token }}"))], None).unwrap(), BOS);
    assert_eq!(render(&[config(list.clone())], None).unwrap(), "plain");
    assert_eq!(render(&[config(list.clone())], Some(vec![])).unwrap(), "tools");
    assert_eq!(render(&[config(json!([{"name": "rag", "template": "lone"}]))], None).unwrap(), "lone");
    assert_eq!(
        render(&[config(json!("config")), ("chat_template.jinja", json!("{{ bos_token }}file\n"))], None).unwrap(),
        format!("{BOS}file")
    );
    assert_eq!(render(&[("chat_template.json", json!({"chat_template": "json"}))], None).unwrap(), "json");
    assert!(matches!(render(&[], None), Err(TextError::NoChatTemplate { .. })));
    for bad in
        [json!(7), json!([]), json!([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]), json!([1])]
    {
        let error = render(&[config(bad.clone())], None).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: field `chat_template` is"), "{bad}: {error}");
    }
}

#[test]
fn template_variables_and_the_date() {
    let text = with_template("{{ thinking }} {{ strftime_now('%Y').isdigit() }} {{ strftime_now('%d %b %Y')|length }}");
    let variables = json!({"thinking": true}).as_object().unwrap().clone();
    let options = ChatOptions { variables, ..ChatOptions::default() };
    assert_eq!(text.render_chat(&[], &options).unwrap(), "True True 11");
}

#[test]
fn endless_and_swelling_templates_are_stopped() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    let swelling = "{% set x = 'abcdefgh' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}";
    for template in [endless, swelling] {
        let error = with_template(template).render_chat(&[], &ChatOptions::default()).unwrap_err();
        assert!(matches!(error, TextError::TemplateLimit { .. }), "{error}");
        assert!(error.to_string().contains("chat_template.jinja"), "{error}");
    }
}

#[test]
fn hostile_templates_fail_cleanly() {
    let runs = [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'default' %}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{% extends 'default' %}",
        "{{ 'a' | indent(9223372036854775807) }}",
        "{{ 'a' | indent(width=99999999999) }}",
        "{{ 'a' * 9223372036854775807 }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ [] | tojson(indent=99999999999999) }}",
        "{{ range(99999999999999) }}",
        "{{ messages[99].role.x }}",
        "{{ strftime_now('%') }}",
        "{{ strftime_now(7, 8) }}",
        "{{ 1 // 0 }}",
        "{{ -9223372036854775808 // -1 }}{{ 2 ** 99999 }}",
        "{{ 'a'.nosuch() }}",
        "{{ raise_exception('no') }}",
    ];
    for template in runs {
        let result = with_template(template).render_chat(&[Message::user("Hi")], &ChatOptions::default());
        let Err(error) = result else { panic!("{template} rendered {result:?}") };
        assert!(error.to_string().contains("chat_template.jinja: the chat template failed: "), "{template}: {error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    let deep = format!("{{{{ {} }}}}", "(".repeat(100_000));
    let lists = format!("{{{{ {} }}}}", "[".repeat(100_000));
    let blocks = "{% if 1 %}".repeat(100_000);
    let broken = ["{{", "{% for %}", "{% if %}", "{{ a b }}", "{% endfor %}", "{{ 'a", &deep, &lists, &blocks];
    for template in broken {
        let dir =
            model(&[("tokenizer.json", &demo_file("tokenizer.json")), ("chat_template.jinja", template.as_bytes())]);
        let error = load(&dir).unwrap_err();
        assert!(matches!(error, TextError::TemplateSyntax { .. }), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The streamed pieces add up to the decoding of all, with no half character on the way.
    #[test]
    fn streaming_equals_decoding(ids in prop::collection::vec(0u32..2060, 0..200), skip in any::<bool>()) {
        let expected = DEMO_REFERENCE.decode(&ids, skip).unwrap();
        prop_assert_eq!(DEMO.decode(&ids, skip), &*expected);
        let pieces = streamed(&DEMO, &ids, skip);
        prop_assert_eq!(pieces.concat(), expected);
    }

    /// Bytes alone (the byte tokens are the first after the special ones) make broken and whole characters.
    #[test]
    fn streaming_of_single_bytes(bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80u8..0xC0, Just(0xF0), Just(0xE2)], 0..40)) {
        let ids: Vec<u32> = bytes.iter().map(|&byte| byte_token(byte)).collect();
        let expected = String::from_utf8_lossy(&bytes).into_owned();
        prop_assert_eq!(streamed(&DEMO, &ids, false).concat(), expected);
    }

    /// A character comes out with its last byte, not later.
    #[test]
    fn text_comes_as_soon_as_it_is_complete(text in "\\PC{0,20}") {
        let mut stream = DEMO.stream(false);
        let (mut seen, mut bytes) = (String::new(), Vec::new());
        for &byte in text.as_bytes() {
            bytes.push(byte);
            seen += &stream.push(byte_token(byte));
            let whole = match str::from_utf8(&bytes) { Ok(all) => all.len(), Err(e) => e.valid_up_to() };
            prop_assert_eq!(seen.as_bytes(), &bytes[..whole]);
        }
        prop_assert_eq!(stream.finish(), "");
    }

    #[test]
    fn any_text_comes_back(text in "\\PC{0,60}|[ \\n\\ta0é你🙂]{0,60}") {
        for model in [&*DEMO, &*V3] {
            let ids = model.encode(&text, false).unwrap();
            prop_assert_eq!(model.decode(&ids, false), &*text);
        }
    }

    /// Whatever is damaged in the file, there is an error or a tokenizer that works, never a panic.
    #[test]
    fn damaged_tokenizers_do_not_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = small_tokenizer().to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        exercise(&bytes);
    }

    #[test]
    fn damaged_configurations_do_not_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        for name in ["tokenizer_config.json", "generation_config.json"] {
            let mut bytes = demo_file(name);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let dir = model(&[("tokenizer.json", small_tokenizer().to_string().as_bytes()), (name, &bytes)]);
            if let Ok(text) = load(&dir) {
                let _ = text.render_chat(&[Message::user("Hi")], &ChatOptions::default());
            }
        }
    }
}

/// Damage that keeps the JSON whole gets further than flipped bytes: each value in turn replaced by each of some.
#[test]
fn changed_fields_do_not_panic() {
    let json = small_tokenizer();
    let mut places = Vec::new();
    pointers(&json, String::new(), &mut places);
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1e300),
        json!(u64::MAX),
        json!(u32::MAX),
        json!(""),
        json!("a"),
        json!("Ġ é"),
        json!([]),
        json!({}),
        json!(true),
        json!([["a", "b"]]),
        json!({"type": "ByteLevel"}),
        json!({"type": "Precompiled"}),
        json!({"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]}),
    ];
    for place in places {
        for value in &values {
            let mut json = json.clone();
            *json.pointer_mut(&place).unwrap() = value.clone();
            exercise(json.to_string().as_bytes());
        }
    }
}

/// Files that made the crate `tokenizers` panic.
#[test]
fn files_that_are_no_json_inside() {
    let whole = String::from_utf8(demo_file("tokenizer.json")).unwrap();
    let decoder = whole.find("\"decoder\"").unwrap();
    for (from, to) in [("ByteLevel", "\\ud800"), ("true", "1e999"), ("ByteLevel", "\u{1}"), ("true", "[")] {
        let bytes = [&whole[..decoder], &whole[decoder..].replacen(from, to, 1)].concat();
        assert!(matches!(load(&model(&[("tokenizer.json", bytes.as_bytes())])), Err(TextError::Json { .. })));
    }
}

/// Loads a tokenizer and, if that works, uses it.
fn exercise(bytes: &[u8]) {
    let Ok(text) = load(&model(&[("tokenizer.json", bytes)])) else { return };
    for input in ["", "a", "ab <｜User｜> 12 x\n é🙂", " \n\n"] {
        if let Ok(ids) = text.encode(input, true) {
            text.decode(&ids, true);
        }
    }
    text.decode(&[0, 1, 9, u32::MAX], false);
}

/// The demo's tokenizer with few enough tokens to be damaged often in the interesting places.
fn small_tokenizer() -> Value {
    let mut json: Value = serde_json::from_slice(&demo_file("tokenizer.json")).unwrap();
    json["model"]["merges"].as_array_mut().unwrap().truncate(10);
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| id.as_u64().unwrap() < 5 + 256 + 10);
    json["post_processor"] =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    json["normalizer"] = json!({"type": "Sequence", "normalizers": []});
    json
}

/// The JSON pointers of all values below one, of the vocabulary only the first few.
fn pointers(value: &Value, here: String, found: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => {
            map.iter().take(8).map(|(key, v)| (key.replace('~', "~0").replace('/', "~1"), v)).collect()
        }
        Value::Array(list) => list.iter().take(3).enumerate().map(|(i, v)| (i.to_string(), v)).collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        pointers(child, format!("{here}/{key}"), found);
    }
    found.push(here);
}

fn byte_token(byte: u8) -> u32 {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let hidden = || (0..byte).filter(|&b| !printable(b)).count() as u32;
    let c = if printable(byte) { char::from(byte) } else { char::from_u32(0x100 + hidden()).unwrap() };
    DEMO_REFERENCE.token_to_id(&c.to_string()).unwrap()
}

#[test]
fn truncated_files_are_errors() {
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let whole = demo_file(name);
        let stride = (whole.len() / 60).max(1);
        for length in (0..whole.len()).step_by(stride) {
            let dir = model(&[("tokenizer.json", &demo_file("tokenizer.json")), (name, &whole[..length])]);
            let error = load(&dir).unwrap_err();
            assert!(matches!(error, TextError::Json { .. } | TextError::NotUtf8 { .. }), "{error}");
            let said = error.to_string();
            assert!(said.contains(name) && !said.contains('\n') && said.contains("fetch"), "{said}");
        }
    }
}

#[test]
fn each_wrong_file_is_named_with_what_to_do() {
    let tokenizer = demo_file("tokenizer.json");
    let error = |name: &str, bytes: &[u8]| {
        let error = load(&model(&[("tokenizer.json", &tokenizer), (name, bytes)])).unwrap_err().to_string();
        let path = error.find(name).unwrap_or_else(|| panic!("{error} does not name {name}"));
        error[path..].to_owned()
    };
    let changed = |pointer: &str, value: Value| {
        let mut json = small_tokenizer();
        *json.pointer_mut(pointer).unwrap() = value;
        error("tokenizer.json", json.to_string().as_bytes())
    };
    let errors = [
        error("tokenizer.json", b""),
        error("tokenizer.json", b"[]"),
        error("tokenizer.json", b"{}"),
        error("tokenizer.json", b"{\"model\": 7}"),
        changed("/model", json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})),
        changed("/model/dropout", json!(0.5)),
        changed("/decoder", json!(null)),
        changed("/decoder", json!({"type": "Fuse"})),
        changed("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("(")),
        changed("/model/merges/0", json!("no such")),
        error("tokenizer_config.json", b"[1, 2]"),
        error("tokenizer_config.json", b"{\"bos_token\": 3}"),
        error("tokenizer_config.json", b"{\"bos_token\": \"<s>\"}"),
        error("tokenizer_config.json", b"{\"add_bos_token\": \"yes\"}"),
        error("tokenizer_config.json", b"{\"add_bos_token\": true}"),
        error("chat_template.jinja", b"\xff"),
        error("chat_template.jinja", b"{% if x %}"),
        error("generation_config.json", b"{\"temperature\": -1}"),
    ];
    insta::assert_snapshot!(errors.join("\n"));
}

#[test]
fn directories_and_huge_files_are_refused() {
    let dir = model(&[]);
    fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
    assert!(matches!(load(&dir), Err(TextError::NotAFile { .. })));

    let dir = model(&[]);
    fs::File::create(dir.path().join("tokenizer.json")).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(load(&dir), Err(TextError::TooLarge { found: 0x100_0000_0000, .. })));

    let dir = model(&[("tokenizer.json", &demo_file("tokenizer.json"))]);
    fs::File::create(dir.path().join("generation_config.json")).unwrap().set_len(1 << 30).unwrap();
    assert!(matches!(load(&dir), Err(TextError::TooLarge { .. })));
}

#[cfg(unix)]
#[test]
fn a_dangling_link_is_not_a_missing_file() {
    let dir = model(&[]);
    std::os::unix::fs::symlink("gone", dir.path().join("tokenizer.json")).unwrap();
    assert!(matches!(load(&dir), Err(TextError::Read { .. })));
}

/// Truncation and padding in the file are for training batches; a prompt must go through whole.
#[test]
fn truncation_and_padding_of_the_file_are_ignored() {
    let mut json: Value = serde_json::from_slice(&demo_file("tokenizer.json")).unwrap();
    json["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 4_000_000_000u32}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "x"});
    let text = load(&model(&[("tokenizer.json", json.to_string().as_bytes())])).unwrap();
    let input = "a text of more than two tokens";
    assert_eq!(text.encode(input, false).unwrap(), DEMO.encode(input, false).unwrap());
}

/// The regular-expression engine gives up, silently, after a million steps back; runs must not take that many.
#[test]
fn long_runs_are_split_right() {
    // A run and how the text goes on behind it, from a point where a new piece begins.
    let runs = [("a", ";b."), (" ", " b."), ("\n", "b."), ("。", "b."), ("1", "b."), ("你", "1."), ("🙂", "b.")];
    for (run, tail) in runs {
        let text = format!("x{}{tail}", run.repeat(1_100_000));
        for model in [&*DEMO, &*V3] {
            let ids = model.encode(&text, false).unwrap();
            assert_eq!(model.decode(&ids, false), text);
            let tail = model.encode(tail, false).unwrap();
            assert_eq!(ids[ids.len() - tail.len()..], *tail, "{run:?}");
        }
    }
}

#[test]
fn ids_beyond_the_vocabulary_give_no_text() {
    assert_eq!(DEMO.decode(&[2048, u32::MAX], false), "");
    assert_eq!(DEMO.token(2048), None);
    assert_eq!(DEMO.token(0).as_deref(), Some(BOS));
}

fn generation(json: &Value) -> Result<GenerationDefaults, TextError> {
    GenerationDefaults::load(model(&[("generation_config.json", json.to_string().as_bytes())]).path())
}

#[test]
fn generation_defaults() {
    assert_eq!(GenerationDefaults::load(model(&[]).path()).unwrap(), GenerationDefaults::default());
    let all = generation(&json!({
        "_from_model_config": true, "do_sample": true, "temperature": 1, "top_k": 50, "top_p": 0.95, "min_p": 0.0,
        "repetition_penalty": 1.1, "eos_token_id": [5, 1, 5], "bos_token_id": 0, "max_new_tokens": 2048,
        "transformers_version": "4.46.3",
    }));
    let expected = GenerationDefaults {
        do_sample: Some(true),
        temperature: Some(1.0),
        top_k: Some(50),
        top_p: Some(0.95),
        min_p: Some(0.0),
        repetition_penalty: Some(1.1),
        eos_token_ids: Some(vec![1, 5]),
        bos_token_id: Some(0),
        max_new_tokens: Some(2048),
    };
    assert_eq!(all.unwrap(), expected);
    let empty = generation(&json!({"temperature": null, "eos_token_id": null})).unwrap();
    assert_eq!(empty, GenerationDefaults::default());
    assert_eq!(generation(&json!({"eos_token_id": 7})).unwrap().eos_token_ids, Some(vec![7]));
}

#[test]
fn wrong_generation_defaults_are_errors_that_name_the_field() {
    let wrong = [
        ("do_sample", json!(1)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_k", json!(-1)),
        ("top_k", json!(1.5)),
        ("top_k", json!(4_294_967_296u64)),
        ("top_p", json!(0)),
        ("top_p", json!(1.01)),
        ("min_p", json!(-0.01)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("eos_token_id", json!([])),
        ("eos_token_id", json!([1, -1])),
        ("eos_token_id", json!("1")),
        ("bos_token_id", json!([0])),
        ("max_new_tokens", json!(0)),
        ("max_new_tokens", json!({})),
    ];
    for (field, value) in wrong {
        let error = generation(&json!({ field: value })).unwrap_err().to_string();
        let expected = format!("generation_config.json: field `{field}` is {value}, expected ");
        assert!(error.contains(&expected), "{error}");
    }
}
