//! Damaged and hostile files.

use super::*;

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
