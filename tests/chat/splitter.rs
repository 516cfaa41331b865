//! Taking answers to pieces.

use std::time::{Duration, Instant};

use moewe::chat::{Delta, Dialect, Splitter, ToolSyntax};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::{DEMO, EVERYTHING};

/// What the deltas of an answer add up to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    reasoning: String,
    content: String,
    /// Tools and arguments.
    calls: Vec<(String, String)>,
    /// How much content there was before each call.
    content_before: Vec<usize>,
}

impl Answer {
    fn add(&mut self, deltas: Vec<Delta>) {
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => self.reasoning += &text,
                Delta::Content(text) => self.content += &text,
                Delta::ToolCall { index, id, name } => {
                    assert_eq!(index as usize, self.calls.len());
                    assert!(id.starts_with("call_") && id.len() > 20, "{id}");
                    self.calls.push((name, String::new()));
                    self.content_before.push(self.content.len());
                }
                Delta::ToolArguments { index, text } => {
                    assert_eq!(index as usize + 1, self.calls.len(), "the last call's");
                    self.calls.last_mut().unwrap().1 += &text;
                }
            }
        }
    }
}

fn splitter(syntax: Option<ToolSyntax>, in_reasoning: bool, stop: &[&str]) -> Splitter {
    let mut dialect: Dialect = EVERYTHING.dialect.clone();
    dialect.tools = syntax;
    Splitter::new(&dialect, in_reasoning, true, stop.iter().map(|&stop| stop.to_owned()).collect())
}

/// Splits a text that comes in pieces.
fn split<'a>(mut splitter: Splitter, pieces: impl IntoIterator<Item = &'a str>) -> (Answer, bool) {
    let mut answer = Answer::default();
    for piece in pieces {
        answer.add(splitter.push(piece));
    }
    answer.add(splitter.finish());
    assert_eq!(splitter.finish(), [], "nothing comes after the end");
    (answer, splitter.stopped())
}

fn whole(syntax: ToolSyntax, text: &str) -> Answer {
    split(splitter(Some(syntax), false, &[]), [text]).0
}

/// A text cut at these places.
fn cut<'a>(text: &'a str, cuts: &[Index]) -> Vec<&'a str> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| text.floor_char_boundary(cut.index(text.len() + 1))).collect();
    at.extend([0, text.len()]);
    at.sort_unstable();
    at.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
}

fn chars(text: &str) -> Vec<&str> {
    text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]).collect()
}

fn written(syntax: &ToolSyntax, calls: &[(String, String)]) -> String {
    let call = |(i, (name, arguments)): (usize, &(String, String))| {
        let number = if syntax.numbered { format!(":{i}") } else { String::new() };
        [syntax.call_begin, name, &number, syntax.arguments_begin, arguments, syntax.call_end].concat()
    };
    let calls: Vec<String> = calls.iter().enumerate().map(call).collect();
    [syntax.section_begin, &calls.join(syntax.between), syntax.section_end].concat()
}

fn syntax() -> impl Strategy<Value = ToolSyntax> {
    select(&ToolSyntax::ALL[..])
}

/// JSON objects with all that makes their end hard to find.
fn arguments() -> impl Strategy<Value = String> {
    let text = prop_oneof![
        Just("}\n```<｜tool▁call▁end｜>".to_owned()),
        Just("<｜tool▁calls▁end｜>\\\"<|tool_call_end|>\\".to_owned()),
        Just("\u{1F600}\"{[</think>".to_owned()),
        "\\PC{0,12}",
    ];
    let leaf = prop_oneof![
        text.clone().prop_map(serde_json::Value::from),
        any::<i64>().prop_map(serde_json::Value::from),
        any::<f32>().prop_map(|x| serde_json::json!(x)),
        any::<bool>().prop_map(serde_json::Value::from),
        Just(serde_json::Value::Null),
    ];
    let value = leaf.prop_recursive(3, 12, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            prop::collection::hash_map(text.clone(), inner, 0..4)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    });
    (prop::collection::hash_map("\\PC{0,6}", value, 0..4), any::<bool>()).prop_map(|(map, pretty)| {
        let object = serde_json::Value::Object(map.into_iter().collect());
        if pretty { serde_json::to_string_pretty(&object).unwrap() } else { object.to_string() }
    })
}

fn tool_calls() -> impl Strategy<Value = Vec<(String, String)>> {
    prop::collection::vec(("[a-zA-Z][a-zA-Z0-9_-]{0,63}", arguments()), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// What a model writes by the rules comes out as it went in, however it is cut.
    #[test]
    fn well_formed_answers(
        syntax in syntax(),
        thought in prop::option::of("[a-z 思\u{1F914}][a-z<>/\n {}\"]{0,40}[a-z.]"),
        opened in any::<bool>(),
        newlines in ("\n{0,3}", "\n{0,3}", "\n{0,3}"),
        content in "[a-zA-Z\u{1F600}é<>|{}\"` ]{0,40}",
        calls in tool_calls(),
        cuts in prop::collection::vec(any::<Index>(), 0..40),
    ) {
        let mut text = String::new();
        if let Some(thought) = &thought {
            let open = if opened { "" } else { "<think>" };
            text = [open, &newlines.0, thought, &newlines.1, "</think>", &newlines.2].concat();
        }
        text += &content;
        if !calls.is_empty() {
            text += &written(&syntax, &calls);
        }
        let content_before = vec![content.len(); calls.len()];
        let expected = Answer { reasoning: thought.clone().unwrap_or_default(), content, calls, content_before };
        let splitter = splitter(Some(syntax), opened && thought.is_some(), &[]);
        prop_assert_eq!(split(splitter, cut(&text, &cuts)).0, expected);
    }

    /// Pieces do not matter, whatever the text: marks at any place, whole or not, with stop strings across them.
    #[test]
    fn any_pieces_give_the_same(
        syntax in prop::option::of(syntax()),
        in_reasoning in any::<bool>(),
        parts in prop::collection::vec(part(), 0..14),
        stop in prop::collection::vec(select(&["βγ", "β", "αβγδ", "<｜tool", "</think", "γ\n", "}", "<", "γδα"][..]), 0..3),
        cuts in prop::collection::vec(any::<Index>(), 0..40),
    ) {
        let text = parts.concat();
        let expected = split(splitter(syntax, in_reasoning, &stop), [&*text]);
        prop_assert_eq!(&split(splitter(syntax, in_reasoning, &stop), cut(&text, &cuts)), &expected);
        prop_assert_eq!(&split(splitter(syntax, in_reasoning, &stop), chars(&text)), &expected);
    }

    /// No letter of the model's is lost, doubled or moved, whatever it does with the marks. (The marks are Latin.)
    #[test]
    fn no_letter_is_lost(
        syntax in syntax(),
        in_reasoning in any::<bool>(),
        parts in prop::collection::vec(part(), 0..20),
        cuts in prop::collection::vec(any::<Index>(), 0..20),
    ) {
        let text = parts.concat();
        let greek = |text: &str| text.chars().filter(|c| ('α'..='ω').contains(c)).collect::<String>();
        let mut splitter = splitter(Some(syntax), in_reasoning, &[]);
        let mut deltas = Vec::new();
        for piece in cut(&text, &cuts) {
            deltas.extend(splitter.push(piece));
        }
        deltas.extend(splitter.finish());
        let told: String = deltas.iter().map(|delta| match delta {
            Delta::Reasoning(text) | Delta::Content(text) | Delta::ToolArguments { text, .. } => &**text,
            Delta::ToolCall { name, .. } => name,
        }).collect();
        prop_assert_eq!(greek(&told), greek(&text));
    }

    /// Without tools and reasoning an answer is its text up to the first stop string that is complete.
    #[test]
    fn stop_strings(
        text in "[ab]{0,30}",
        stop in prop::collection::vec("[ab]{1,5}", 0..4),
        cuts in prop::collection::vec(any::<Index>(), 0..20),
    ) {
        let mut expected = (text.clone(), false);
        'ends: for end in 1..=text.len() {
            for begin in 0..end {
                if stop.iter().any(|stop| *stop == text[begin..end]) {
                    expected = (text[..begin].to_owned(), true);
                    break 'ends;
                }
            }
        }
        let splitter = Splitter::new(&DEMO.dialect, false, false, stop);
        let (answer, stopped) = split(splitter, cut(&text, &cuts));
        prop_assert_eq!((answer.content, stopped), expected);
    }
}

/// Parts of answers, good and bad. Letters of the model's own are Greek.
fn part() -> impl Strategy<Value = String> {
    let fixed = [
        "<think>",
        "</think>",
        "<",
        "</",
        "<｜",
        "<｜tool▁",
        "<|tool_",
        "\n",
        "\n\n",
        " ",
        "```",
        "\n```",
        "```json\n",
        "{",
        "}",
        "\"",
        "{\"α\": \"β\"}",
        "{\"α\": {\"β\": [1, \"}\"]}}",
        "{\"γ\": \"\\\"",
        "{]",
        "{\"α\n",
        ":0",
        ":",
        "α",
        "βγδ",
        "αβ ",
        "weather",
        "functions.",
        "function",
        "function<｜tool▁sep｜>",
        "functions.δδ:0",
        "weather\n```json\n{\"α\":1}\n```",
        "\u{1F600}",
    ];
    let marks = ToolSyntax::ALL.iter().flat_map(|syntax| syntax.marks.iter().copied());
    let blank = " ".repeat(50);
    let longer = ToolSyntax::ALL.iter().flat_map(|syntax| {
        let call = [("ζζ".to_owned(), "{\"η\":0}".to_owned())];
        let calls = written(syntax, &call);
        let open = calls[..calls.rfind("{\"").unwrap()].to_owned();
        [calls, open, [syntax.section_begin, syntax.call_begin].concat(), syntax.call_end.to_owned()]
    });
    select(fixed.into_iter().chain(marks).map(str::to_owned).chain(longer).chain([blank]).collect::<Vec<_>>())
}

const V3: ToolSyntax = ToolSyntax::DEEPSEEK_V3;
const V31: ToolSyntax = ToolSyntax::DEEPSEEK_V31;
const KIMI: ToolSyntax = ToolSyntax::KIMI_K2;

fn call(name: &str, arguments: &str) -> (String, String) {
    (name.into(), arguments.into())
}

#[test]
fn calls_as_models_write_them() {
    let two = [call("weather", "{\"city\": \"Bern\"}"), call("time", "{}")];
    let texts = [
        (
            V3,
            "On it.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Bern\"}\n```<｜tool▁call▁end｜>\n\
              <｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        // White space and fences as they come.
        (
            V3,
            "On it.<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜> weather ```json{\"city\": \"Bern\"}```\n\
              <｜tool▁call▁end｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n{}\n<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>",
        ),
        (
            V31,
            "On it.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Bern\"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>time\
               <｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        // Neither beginning nor end of all calls, nor the end of one.
        (
            V31,
            "On it.<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Bern\"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}",
        ),
        (
            V31,
            "On it.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Bern\"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>time\
               <｜tool▁sep｜>{}<｜tool▁calls▁end｜>",
        ),
        (
            KIMI,
            "On it.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{\"city\": \"Bern\"}\
                <|tool_call_end|><|tool_call_begin|>functions.time:1 <|tool_call_argument_begin|> {}<|tool_call_end|><|tool_calls_section_end|>",
        ),
    ];
    for (syntax, text) in texts {
        let answer = whole(syntax, text);
        assert_eq!((&*answer.content, &answer.calls[..]), ("On it.", &two[..]), "{text}");
    }
}

#[test]
fn what_is_no_call_is_content() {
    let texts = [
        (V31, "<｜tool▁calls▁begin｜>"),
        (V31, "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
        (V31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather"),
        (
            V31,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>[1]<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (V31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜><｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        (
            V3,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>widget<｜tool▁sep｜>weather\n```json\n{}\n```<｜tool▁call▁end｜>",
        ),
        (V3, "the mark <｜tool▁sep｜> and <｜tool▁call▁end｜>"),
        (KIMI, "<|tool_calls_section_begin|><|tool_call_begin|>functions.:0<|tool_call_argument_begin|>{}"),
    ];
    for (syntax, text) in texts {
        let answer = whole(syntax, text);
        assert_eq!((&*answer.content, answer.calls.len()), (text, 0), "{text}");
    }
    // A call whose head is longer than any.
    let text = format!("<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{{}}", "x".repeat(600));
    assert_eq!(whole(V31, &text).content, text);
    // It is told before the answer ends.
    assert_eq!(splitter(Some(V31), false, &[]).push(&text), [Delta::Content(text)]);
}

#[test]
fn broken_calls_lose_nothing() {
    // JSON that breaks off, or never was any, belongs to the call that was told; what follows is content.
    let begin = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>";
    let end = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    let answer = whole(V31, &format!("{begin}{{\"a\": \"b"));
    assert_eq!((&*answer.content, &answer.calls[..]), ("", &[call("f", "{\"a\": \"b")][..]));
    let answer = whole(V31, &format!("{begin}{{a: 'b'}} {{{end}!"));
    assert_eq!((&*answer.content, &answer.calls[..]), ("!", &[call("f", "{a: 'b'} {")][..]));
    let answer = whole(V31, &format!("{begin}{{\"a\": (}}{end}!"));
    assert_eq!((&*answer.content, &answer.calls[..]), ("!", &[call("f", "{\"a\": (}")][..]));
    let answer = whole(V31, &format!("{begin}{{}}, or rather{end}!"));
    assert_eq!((&*answer.content, &answer.calls[..]), (", or rather<｜tool▁call▁end｜>!", &[call("f", "{}")][..]));
    // A string that a raw newline breaks no longer protects marks.
    let answer = whole(V3, &format!("{}f\n```json\n{{\"a\": \"b}}\n```<｜tool▁call▁end｜>!", V3.call_begin));
    assert_eq!((&*answer.content, &answer.calls[..]), ("!", &[call("f", "{\"a\": \"b}\n```")][..]));
    // A good call after a bad one.
    let answer = whole(V31, &format!("<｜tool▁calls▁begin｜>oh{begin}{{}}{end}"));
    assert_eq!((&*answer.content, &answer.calls[..]), ("<｜tool▁calls▁begin｜>oh", &[call("f", "{}")][..]));
}

#[test]
fn calls_are_told_as_they_come() {
    let mut splitter = splitter(Some(V3), false, &[]);
    assert_eq!(
        splitter.push("Wait<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"),
        [Delta::Content("Wait".into())]
    );
    let told = splitter.push("{\"a");
    let [Delta::ToolCall { index: 0, id, name }, Delta::ToolArguments { index: 0, text }] = &told[..] else {
        panic!("{told:?}")
    };
    assert_eq!((&**name, &**text), ("f", "{\"a"));
    let arguments = |text: &str| vec![Delta::ToolArguments { index: 0, text: text.into() }];
    assert_eq!(splitter.push("\": \"<｜tool"), arguments("\": \"<｜tool"));
    assert_eq!(splitter.push("\"}"), arguments("\"}"));
    assert_eq!(splitter.push("\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```"), []);
    let told = splitter.push("json\n{}");
    let Delta::ToolCall { index: 1, id: other, .. } = &told[0] else { panic!("{told:?}") };
    assert_ne!(id, other);
    assert_eq!(splitter.push("\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"), []);
    assert_eq!(splitter.finish(), []);
}

#[test]
fn text_is_held_back_only_where_it_must_be() {
    let content = |text: &str| vec![Delta::Content(text.into())];
    let mut splitter = splitter(Some(V31), false, &["STOP", "TOO"]);
    assert_eq!(splitter.push(" "), []); // reasoning may be opened after it
    assert_eq!(splitter.push("a < b <"), content(" a < b "));
    assert_eq!(splitter.push("i> ST"), content("<i> "));
    assert_eq!(splitter.push("TO"), content("ST"));
    assert_eq!(splitter.push("<｜tool"), []);
    assert_eq!(splitter.push("s STO"), content("TO<｜tools "));
    assert!(!splitter.stopped());
    assert_eq!(splitter.push("Pnever"), []);
    assert!(splitter.stopped());
    assert_eq!(splitter.push("never"), []);
    assert_eq!(splitter.finish(), []);
}

#[test]
fn white_space_after_a_call_is_not_held_back_for_ever() {
    let call = format!("{}f<｜tool▁sep｜>{{}}", V31.call_begin);
    for head in [call.clone(), call.clone() + V31.call_end] {
        let mut splitter = splitter(Some(V31), false, &[]);
        splitter.push(&head);
        assert_eq!(splitter.push(&" ".repeat(63)), []);
        assert_eq!(splitter.push(" "), [Delta::Content(" ".repeat(64))]);
    }
    // Nor does it depend on the pieces what comes after it.
    let text = [&call, V31.call_end, &" ".repeat(60), &call, V31.call_end, V31.section_end].concat();
    let once = whole(V31, &text);
    assert_eq!((once.content.len(), once.calls.len()), (60, 2));
    assert_eq!(split(splitter(Some(V31), false, &[]), chars(&text)).0, once);
}

#[test]
fn reasoning() {
    let mut splitter = splitter(None, true, &["x"]);
    let thought = |text: &str| vec![Delta::Reasoning(text.into())];
    assert_eq!(splitter.push("\n\nxa\n"), thought("xa"));
    assert_eq!(splitter.push("\nb\n\n</thi"), thought("\n\nb"));
    assert_eq!(splitter.push("ck>\n"), thought("\n\n</thick>"));
    assert!(splitter.in_reasoning());
    assert_eq!(splitter.push("</think>\n\n"), []);
    assert!(!splitter.in_reasoning());
    assert_eq!(splitter.push("\n<think>y"), vec![Delta::Content("<think>y".into())]);
    assert_eq!(splitter.push("x"), []);
    assert!(splitter.stopped());
    // Cut off within.
    assert_eq!(split(self::splitter(None, true, &[]), ["a\n</th"]).0.reasoning, "a\n</th");
    assert_eq!(split(self::splitter(None, true, &[]), ["a\n"]).0.reasoning, "a\n");
}

#[test]
fn tools_nobody_asked_for_are_text() {
    let text = written(&V31, &[call("f", "{}")]);
    let splitter = Splitter::new(&EVERYTHING.dialect, false, false, vec!["<｜tool▁calls▁end｜>".into()]);
    let (answer, stopped) = split(splitter, chars(&text));
    assert_eq!((&*answer.content, stopped), (text.strip_suffix("<｜tool▁calls▁end｜>").unwrap(), true));
    // Marks that models without reasoning write are text as well.
    let splitter = Splitter::new(&DEMO.dialect, false, true, Vec::new());
    assert_eq!(split(splitter, ["<think>a</think>"]).0.content, "<think>a</think>");
}

#[test]
fn a_stop_string_may_end_in_content_only() {
    let text = format!("a{}b STOP c", written(&V31, &[call("f", "{\"STOP\": \"STOP\"}")]));
    let (answer, stopped) = split(splitter(Some(V31), false, &["STOP", "a<"]), chars(&text));
    let expected = Answer {
        content: "ab ".into(),
        calls: vec![call("f", "{\"STOP\": \"STOP\"}")],
        content_before: vec![1],
        ..Answer::default()
    };
    assert_eq!((answer, stopped), (expected, true));
}

/// Long answers of the worst kinds, token by token and at once.
#[test]
fn time_grows_with_the_length() {
    let begin = Instant::now();
    let call = format!("{}f<｜tool▁sep｜>{{", V31.call_begin);
    for (repeated, in_reasoning) in [
        ("\n", true),
        ("\n", false),
        (" ", false),
        ("<", false),
        ("<", true),
        ("<｜tool▁calls▁begin｜>", false),
        ("<｜tool▁call▁begin｜>", false),
        ("{", false),
        (&call, false),
        ("</think>", true),
        ("a", false),
        ("ab", false),
    ] {
        let long = repeated.repeat(200_000 / repeated.len());
        for head in ["", &call] {
            let stop = ["ac", "aaaaaaaaaaab", "\n\nx"];
            let text = format!("{head}{long}");
            let once = split(splitter(Some(V31), in_reasoning, &stop), [&*text]);
            assert!(once == split(splitter(Some(V31), in_reasoning, &stop), chars(&text)), "{repeated:?}");
        }
    }
    assert!(begin.elapsed() < Duration::from_mins(1), "{:?}", begin.elapsed());
}
