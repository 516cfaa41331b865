//! Tokens and the files around them.

use super::*;

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

/// A bundle carries along whatever text needs.
#[test]
fn the_compiler_copies_every_file_that_is_read_here() {
    for name in moewe::text::TEXT_FILES {
        assert!(moewe_compiler::compile::COMPANIONS.contains(&name), "{name}");
    }
}
