//! What is found out about models.

use moewe::chat::{Fim, Reasoning, ToolSyntax};
use serde_json::Value;

use super::{DEMO, EVERYTHING, Model, R1, model, read_config, with_r1_tokenizer, with_template};

const THINK: Reasoning = Reasoning { open: "<think>", close: "</think>" };

#[test]
fn of_the_demo() {
    let dialect = &DEMO.dialect;
    assert_eq!((dialect.reasoning, dialect.tools, dialect.fim), (None, None, None));
}

#[test]
fn of_everything() {
    let Model { dialect, text } = &*EVERYTHING;
    assert_eq!((dialect.reasoning, dialect.tools), (Some(THINK), Some(ToolSyntax::DEEPSEEK_V31)));
    let Fim { begin, hole, end } = dialect.fim.unwrap();
    assert_eq!(text.decode(&[begin, hole, end], false), "<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>");
    let eos = text.special_ids().eos.unwrap();
    assert!(dialect.hides(eos) && !dialect.hides(hole) && !dialect.hides(eos + 100));
}

#[test]
fn of_deepseeks_models() {
    let dialect = &R1.dialect;
    assert_eq!((dialect.reasoning, dialect.tools), (Some(THINK), Some(ToolSyntax::DEEPSEEK_V3)));
    assert!(dialect.fim.is_some());
    // V3's template, whose last call has no end of all if it is the only one.
    let v3 = with_r1_tokenizer(&read_config("deepseek-v3-config.json").to_string());
    assert_eq!(v3.dialect.tools, Some(ToolSyntax::DEEPSEEK_V3));
}

const KIMI: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}<|tool_calls_section_begin|>\
    {% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|>{% endfor %}\
    <|tool_calls_section_end|>{% endif %}{% if m.tool_call_id %}## {{ m.tool_call_id }}{% endif %}{% endfor %}<|assistant|>";

#[test]
fn of_kimi() {
    assert_eq!(with_template(ToolSyntax::KIMI_K2.marks, KIMI).dialect.tools, Some(ToolSyntax::KIMI_K2));
}

#[test]
fn of_templates_that_speak_of_calls_without_showing_them() {
    let marks = ToolSyntax::DEEPSEEK_V3.marks.concat();
    let of = |template: &str| with_template(&model::MARKS, template).dialect;
    assert_eq!(of(&format!("Write {marks}")).tools, Some(ToolSyntax::DEEPSEEK_V31));
    assert_eq!(of(&format!("Write {marks} ```json")).tools, Some(ToolSyntax::DEEPSEEK_V3));
    assert_eq!(of("Write what you like").tools, None);
    // No template, or one that always fails.
    assert_eq!(of("{{ raise_exception('no') }}").tools, None);
}

#[test]
fn marks_may_be_special() {
    let dir = tempfile::tempdir().unwrap();
    model::write_text(&super::root("models/demo"), dir.path());
    let file = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for token in tokenizer["added_tokens"].as_array_mut().unwrap() {
        token["special"] = true.into();
    }
    std::fs::write(file, tokenizer.to_string()).unwrap();
    let Model { text, dialect } = Model::of(moewe::text::Text::load(dir.path()).unwrap().unwrap());
    let hidden = |token: &str| dialect.hides(text.encode(token, false).unwrap()[0]);
    for shown in ["<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "a"] {
        assert!(!hidden(shown), "{shown}");
    }
    for nobodys in ["<｜User｜>", "<｜fim▁hole｜>", "<｜end▁of▁sentence｜>"] {
        assert!(hidden(nobodys), "{nobodys}");
    }
}
