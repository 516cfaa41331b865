//! What a model's texts look like.

use serde_json::{Value, json};

use super::shield::Shield;
use super::syntax::ToolSyntax;
use crate::text::{ChatOptions, Message, Text};

/// What a model's texts look like, found out from its chat template and vocabulary, once.
#[derive(Debug, Clone)]
pub struct Dialect {
    /// The marks around reasoning, if the model has them.
    pub reasoning: Option<Reasoning>,
    /// How it writes calls of tools, if its chat template says so.
    pub tools: Option<ToolSyntax>,
    /// How it is asked to fill a gap, if its vocabulary has the marks.
    pub fim: Option<Fim>,
    pub(super) manners: Manners,
    pub(super) shield: Shield,
    /// Special tokens whose text neither clients nor a [`Splitter`](super::Splitter) should see, ascending.
    hidden: Vec<u32>,
}

/// The marks around reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reasoning {
    /// Before it.
    pub open: &'static str,
    /// After it.
    pub close: &'static str,
}

/// The marks of a text with a gap: `begin` PREFIX `hole` SUFFIX `end`, upon which the model writes what was in the gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fim {
    /// Before the prefix.
    pub begin: u32,
    /// Between prefix and suffix.
    pub hole: u32,
    /// After the suffix.
    pub end: u32,
}

const REASONING: Reasoning = Reasoning { open: "<think>", close: "</think>" };
const FIM: [&str; 3] = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"];

impl Dialect {
    /// Finds out what a model's texts look like.
    pub fn of(text: &Text) -> Self {
        let added = text.added_tokens();
        let id = |mark: &str| added.iter().find(|token| token.content == mark).map(|token| token.id);
        let known = |mark: &str| id(mark).is_some() || text.template_mentions(mark);
        let reasoning = Some(REASONING).filter(|marks| known(marks.open) && known(marks.close));
        let [begin, hole, end] = FIM.map(id);
        let fim = begin.zip(hole).zip(end).map(|((begin, hole), end)| Fim { begin, hole, end });
        let (manners, tools) = Manners::of(text);
        let marks: Vec<&str> = reasoning.iter().flat_map(|marks| [marks.open, marks.close]).collect();
        let is_mark = |token: &str| marks.contains(&token) || tools.is_some_and(|tools| tools.marks.contains(&token));
        let hidden = added.iter().filter(|token| token.special && !is_mark(&token.content)).map(|token| token.id);
        let hidden = hidden.collect();
        Self { reasoning, tools, fim, manners, shield: Shield::new(&added), hidden }
    }

    /// Whether a generated token's text is for nobody, as that of an end-of-sequence token. A token stream for a
    /// [`Splitter`](super::Splitter) takes all others, special or not: `<think>` is special in some vocabularies.
    pub fn hides(&self, id: u32) -> bool {
        self.hidden.binary_search(&id).is_ok()
    }
}

/// What a chat template does with messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manners {
    pub system: System,
    /// Whether it tells the model of tools.
    pub tools: bool,
    /// How it takes calls of tools; `None` if it does not show them.
    pub calls: Option<Calls>,
    /// Whether it shows what tools gave.
    pub results: bool,
}

/// Which system messages a template shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    All,
    /// The first of all messages only.
    First,
    None,
}

/// How a template takes calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// What it takes as the content of a message that only calls tools.
    pub no_content: Option<&'static str>,
    /// Whether arguments are objects rather than JSON text.
    pub objects: bool,
    /// Whether it shows content and calls of one message both.
    pub with_content: bool,
}

// Words that no template has.
const SYSTEM: &str = "mw-system";
const LATER: &str = "mw-later";
const CONTENT: &str = "mw-content";
const RESULT: &str = "mw-result";
const TOOL: &str = "mw_tool";
const ARGUMENTS: &str = r#"{"mw": "mw-value"}"#;

impl Manners {
    /// Renders small conversations and looks what has become of them.
    fn of(text: &Text) -> (Self, Option<ToolSyntax>) {
        let user = || Message::user("Hello");
        let render = |messages: &[Message], tools: Option<Vec<Value>>| {
            text.render_chat(messages, &ChatOptions { tools, ..ChatOptions::default() }).unwrap_or_default()
        };
        let both = [Message::system(SYSTEM), user(), Message::assistant("Hello"), Message::system(LATER), user()];
        let both = render(&both, None);
        let system = if both.contains(SYSTEM) && both.contains(LATER) {
            System::All
        } else if render(&[Message::system(SYSTEM), user()], None).contains(SYSTEM) {
            System::First
        } else {
            System::None
        };

        let function = json!({"name": TOOL, "description": "", "parameters": {"type": "object", "properties": {}}});
        let offered = vec![json!({"type": "function", "function": function})];
        let tools = render(&[user()], Some(offered.clone())).contains(TOOL);
        let offered = Some(offered).filter(|_| tools);

        let conversation = |content: Option<&str>, objects: bool| {
            let object = || serde_json::from_str(ARGUMENTS).expect("it is JSON");
            let arguments = if objects { object() } else { Value::from(ARGUMENTS) };
            let function = json!({"name": TOOL, "arguments": arguments});
            let id = format!("functions.{TOOL}:0");
            let mut call = Message { content: content.map(str::to_owned), ..Message::assistant("") };
            call.more.insert("tool_calls".into(), json!([{"id": id, "type": "function", "function": function}]));
            let mut result = Message::new("tool", RESULT);
            result.more.insert("tool_call_id".into(), id.into());
            render(&[user(), call, result], offered.clone())
        };
        // A template that prints a missing content gives Python's name for it.
        let nones = |shown: &str| shown.matches("None").count();
        let nones_before = nones(&render(&[user()], offered.clone()));
        let shows_call =
            |shown: &str| shown.contains(TOOL) && shown.contains(r#""mw-value""#) && nones(shown) <= nones_before;
        let mut shown = String::new();
        let mut calls = None;
        for (no_content, objects) in [(None, false), (Some(""), false), (None, true), (Some(""), true)] {
            shown = conversation(no_content, objects);
            if shows_call(&shown) {
                let with_content = conversation(Some(CONTENT), objects);
                let with_content = shows_call(&with_content) && with_content.contains(CONTENT);
                calls = Some(Calls { no_content, objects, with_content });
                break;
            }
        }
        let results = shown.contains(RESULT);
        (Self { system, tools, calls, results }, syntax(text, &shown))
    }
}

/// The syntax in which a template shows a call of [`TOOL`].
fn syntax(text: &Text, shown: &str) -> Option<ToolSyntax> {
    let as_shown = |syntax: &ToolSyntax| {
        let number = if syntax.numbered { ":0" } else { "" };
        let head = [syntax.call_begin, TOOL, number, syntax.arguments_begin, "{"].concat();
        shown.contains(&head) && shown.contains(&["}", syntax.call_end].concat())
    };
    // A template may differ in white space, or only speak of calls.
    let as_told = |syntax: &ToolSyntax| {
        let fenced = text.template_mentions("```json");
        syntax.marks.iter().all(|mark| text.template_mentions(mark))
            && (!syntax.arguments_begin.contains("```json") || fenced)
    };
    let all = ToolSyntax::ALL;
    all.iter().find(|syntax| as_shown(syntax)).or_else(|| all.iter().find(|syntax| as_told(syntax))).copied()
}
