//! Calls of tools.

use serde_json::{Value, json};

use super::super::GrammarError;
use super::schemas::Random;
use super::{bytes_and, ids, mask_of, walk};
use crate::api::{Tool, ToolChoice};
use crate::chat::ToolSyntax;

const MARKS: [&str; 10] = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
];

fn tool(name: &str, parameters: Value, strict: bool) -> Tool {
    Tool { name: name.into(), description: None, parameters, strict, raw: Value::Null }
}

fn tools() -> Vec<Tool> {
    let city = json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer",
        "minimum": 1, "maximum": 9}}, "required": ["city"]});
    let empty = json!({"type": "object", "properties": {}});
    vec![tool("get", json!({}), false), tool("get_weather", city, true), tool("get-time", empty, false)]
}

/// The calls in a text that is nothing but calls: names and arguments.
fn calls(syntax: &ToolSyntax, text: &str) -> Option<Vec<(String, Value)>> {
    let mut rest = text.strip_prefix(syntax.section_begin)?.strip_suffix(syntax.section_end)?;
    let mut calls = Vec::new();
    loop {
        rest = rest.strip_prefix(syntax.call_begin)?;
        let (name, behind) = rest.split_once(syntax.arguments_begin)?;
        let name = match (syntax.numbered, name.split_once(':')) {
            (true, Some((name, number))) => number.parse::<u32>().ok().map(|_| name)?,
            (true, None) => return None,
            (false, _) => name,
        };
        let (arguments, behind) = behind.split_once(syntax.call_end)?;
        calls.push((name.to_owned(), serde_json::from_str(arguments).ok()?));
        rest = match behind {
            "" => return Some(calls),
            behind => behind.strip_prefix(syntax.between)?,
        };
    }
}

fn fits((name, arguments): &(String, Value)) -> bool {
    let tools = tools();
    let Some(tool) = tools.iter().find(|tool| tool.name == *name) else { return false };
    let closed = name == "get_weather" || arguments == &json!({});
    closed && jsonschema::validator_for(&tool.parameters).expect("a valid schema").is_valid(arguments)
}

#[test]
fn calls_are_well_formed_in_every_syntax() {
    for syntax in [ToolSyntax::DEEPSEEK_V3, ToolSyntax::DEEPSEEK_V31, ToolSyntax::KIMI_K2] {
        // With the marks as tokens, and spelt out.
        for grammars in [bytes_and(&MARKS), bytes_and(&[])] {
            let (mut names, mut most) = (std::collections::BTreeSet::new(), 0);
            for seed in 0..60 {
                let choice = ToolChoice::Required;
                let mut constraint =
                    grammars.tool_calls(&syntax, &tools(), &choice, true).expect("good").expect("some");
                let walked = walk(&grammars, &mut *constraint, &mut Random(seed), |_, _| {}).expect("an end");
                let calls = calls(&syntax, walked.text()).unwrap_or_else(|| panic!("malformed: {}", walked.text()));
                assert!(calls.iter().all(fits), "{}", walked.text());
                most = most.max(calls.len());
                names.extend(calls.into_iter().map(|call| call.0));
                let spelt = walked.tokens.iter().filter(|id| **id < 256).count();
                let marks = walked.tokens.len() - spelt;
                assert_eq!(marks > 0, grammars.vocabulary.len() > 257, "marks are tokens where there are such tokens");
            }
            assert_eq!(names.into_iter().collect::<Vec<_>>(), ["get", "get-time", "get_weather"]);
            assert!((2..=16).contains(&most), "{most} calls at most");
        }
    }
}

#[test]
fn one_call_if_one_is_wanted() {
    let grammars = bytes_and(&MARKS);
    let syntax = ToolSyntax::DEEPSEEK_V31;
    for seed in 0..40 {
        for (choice, parallel) in [(ToolChoice::Required, false), (ToolChoice::Function("get_weather".into()), true)] {
            let mut constraint =
                grammars.tool_calls(&syntax, &tools(), &choice, parallel).expect("good").expect("some");
            let walked = walk(&grammars, &mut *constraint, &mut Random(seed), |_, _| {}).expect("an end");
            let calls = calls(&syntax, walked.text()).expect("well-formed");
            assert!(calls.len() == 1 && fits(&calls[0]), "{}", walked.text());
            assert!(choice == ToolChoice::Required || calls[0].0 == "get_weather");
        }
    }
}

#[test]
fn free_text_until_a_call_begins() {
    let grammars = bytes_and(&MARKS);
    let syntax = ToolSyntax::DEEPSEEK_V3;
    let end = grammars.vocabulary.eos()[0];
    let make = || grammars.tool_calls(&syntax, &tools(), &ToolChoice::Auto, false).expect("good").expect("some");
    let mut constraint = make();
    for byte in "Let me see.".bytes() {
        let allowed = ids(&mask_of(&grammars, &mut *constraint).expect("a mask"));
        assert_eq!(allowed.len() as u32, grammars.vocabulary.len() - 1, "all but 0xFF");
        constraint.drawn(byte.into()).expect("free");
    }
    // It may end here, or call.
    let mut silent = make();
    silent.drawn(end).expect("allowed");
    assert!(silent.ended());
    constraint.drawn(256).expect("the section's begin");
    assert_eq!(ids(&mask_of(&grammars, &mut *constraint).expect("a mask")), [258], "the call's begin");
    let walked = walk(&grammars, &mut *constraint, &mut Random(5), |_, _| {}).expect("an end");
    let calls = calls(&syntax, &format!("{}{}", syntax.section_begin, walked.text())).expect("well-formed");
    assert!(calls.len() == 1 && fits(&calls[0]));
}

#[test]
fn reasoning_may_come_before_calls() {
    let grammars = bytes_and(&MARKS);
    let make = |choice| {
        let calls = grammars.tool_calls(&ToolSyntax::DEEPSEEK_V31, &tools(), &choice, true).expect("good");
        grammars.after("</think>", calls.expect("some"))
    };
    let end = grammars.vocabulary.eos()[0];
    for (choice, may_end) in [(ToolChoice::Required, false), (ToolChoice::Auto, true)] {
        let mut constraint = make(choice);
        "I must call.".bytes().for_each(|byte| constraint.drawn(byte.into()).expect("free"));
        assert_eq!(ids(&mask_of(&grammars, &mut *constraint).expect("a mask")).contains(&end), may_end);
        "</think>".bytes().for_each(|byte| constraint.drawn(byte.into()).expect("free"));
        let allowed = ids(&mask_of(&grammars, &mut *constraint).expect("a mask"));
        assert_eq!(allowed == [256], !may_end, "{allowed:?}");
    }
}

#[test]
fn parameters_that_cannot_be_enforced() {
    let grammars = bytes_and(&MARKS);
    let syntax = ToolSyntax::DEEPSEEK_V31;
    let bad = [
        json!({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}}),
        json!({"type": "object", "properties": {"a": {"$ref": "http://localhost/schema.json"}}}),
        json!({"type": "object", "properties": {"a": {"type": "strnig"}}, "required": ["a"]}),
    ];
    for parameters in bad {
        let mut tools = tools();
        tools.push(tool("odd", parameters.clone(), true));
        let refused = grammars.tool_calls(&syntax, &tools, &ToolChoice::Required, true).expect_err("strict");
        assert!(matches!(&refused, GrammarError::Tool { name, .. } if name == "odd"), "{refused}");
        // Who is not strict gets an object of any kind.
        tools[3].strict = false;
        let choice = ToolChoice::Function("odd".into());
        let mut constraint = grammars.tool_calls(&syntax, &tools, &choice, true).expect("lenient").expect("some");
        let walked = walk(&grammars, &mut *constraint, &mut Random(9), |_, _| {}).expect("an end");
        assert!(calls(&syntax, walked.text()).expect("well-formed")[0].1.is_object());
        assert!(grammars.tool_calls(&syntax, &tools, &ToolChoice::Required, true).expect("lenient").is_some());
    }
}

#[test]
fn choices_without_a_constraint_or_a_tool() {
    let grammars = bytes_and(&MARKS);
    let syntax = ToolSyntax::KIMI_K2;
    assert!(grammars.tool_calls(&syntax, &tools(), &ToolChoice::None, true).expect("fine").is_none());
    assert!(grammars.tool_calls(&syntax, &[], &ToolChoice::Auto, true).expect("fine").is_none());
    let refused = |tools: &[Tool], choice| grammars.tool_calls(&syntax, tools, &choice, true).expect_err("impossible");
    assert_eq!(refused(&[], ToolChoice::Required), GrammarError::NoTools);
    let unknown = refused(&tools(), ToolChoice::Function("put".into()));
    assert_eq!(unknown.to_string(), r#"the tool "put" is to be called, but the tools are get, get_weather, get-time"#);
}
