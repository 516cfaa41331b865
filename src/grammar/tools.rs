//! The grammar of tool calls.

use std::fmt::Write as _;

use llguidance::Matcher;
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};

use super::{GrammarError, Grammars, schema};
use crate::api::Tool;
use crate::chat::ToolSyntax;

/// Most calls in one answer.
const MOST_CALLS: usize = 16;

/// Calls of tools as a model writes them.
pub(super) struct Calls<'a> {
    pub syntax: &'a ToolSyntax,
    /// Whether there may be several.
    pub parallel: bool,
    /// Whether what begins the section of calls stands there already.
    pub begun: bool,
}

impl Calls<'_> {
    /// Compiles the grammar of calls of these tools, one at least.
    pub fn compile(&self, grammars: &Grammars, tools: &[&Tool]) -> Result<Matcher, GrammarError> {
        let arguments = tools.iter().map(|tool| match parameters(&tool.parameters) {
            Err(error) if tool.strict => Err(at(tool, error)),
            other => Ok(other.unwrap_or_else(|_| any_object())),
        });
        let mut arguments = arguments.collect::<Result<Vec<_>, _>>()?;
        let reason = match grammars.compiler.compile(self.grammar(grammars, tools, &arguments)) {
            Ok(matcher) => return Ok(matcher),
            Err(reason) => reason,
        };
        // Some tool is at fault. Those that nobody is strict about go on with arguments of any kind.
        let mut changed = false;
        for (tool, arguments) in tools.iter().zip(&mut arguments) {
            if let Err(reason) = grammars.compiler.compile(TopLevelGrammar::from_grammar(arguments.clone())) {
                if tool.strict {
                    return Err(at(tool, GrammarError::Schema { reason }));
                }
                *arguments = any_object();
                changed = true;
            }
        }
        if !changed {
            return Err(GrammarError::Schema { reason });
        }
        grammars
            .compiler
            .compile(self.grammar(grammars, tools, &arguments))
            .map_err(|reason| GrammarError::Schema { reason })
    }

    fn grammar(&self, grammars: &Grammars, tools: &[&Tool], arguments: &[GrammarWithLexer]) -> TopLevelGrammar {
        let syntax = self.syntax;
        let written = |parts: &[&str]| self.written(grammars, &parts.concat());
        let begin = if self.begun { String::new() } else { written(&[syntax.section_begin]) };
        let (between, end) = (written(&[syntax.between]), written(&[syntax.section_end]));
        let more = if self.parallel { format!("({between} call){{0,{}}}", MOST_CALLS - 1) } else { String::new() };
        let mut lark = format!("start: {begin} call {more} {end}\ncall: tool0");
        for number in 1..tools.len() {
            write!(lark, " | tool{number}").expect("strings take everything");
        }
        for (number, tool) in tools.iter().enumerate() {
            let head = if syntax.numbered {
                let (name, arguments) =
                    (written(&[syntax.call_begin, &tool.name, ":"]), written(&[syntax.arguments_begin]));
                format!("{name} /[0-9]{{1,4}}/ {arguments}")
            } else {
                written(&[syntax.call_begin, &tool.name, syntax.arguments_begin])
            };
            let end = written(&[syntax.call_end]);
            write!(lark, "\ntool{number}: {head} @arguments{number} {end}").expect("strings take everything");
        }
        let named = |(number, arguments): (usize, &GrammarWithLexer)| {
            let name = Some(format!("arguments{number}"));
            GrammarWithLexer { name, ..arguments.clone() }
        };
        let grammars = std::iter::once(GrammarWithLexer::from_lark(lark));
        TopLevelGrammar {
            grammars: grammars.chain(arguments.iter().enumerate().map(named)).collect(),
            max_tokens: None,
        }
    }

    /// A string of the syntax in the grammar's language: marks that are tokens as those tokens, the rest as text.
    fn written(&self, grammars: &Grammars, mut text: &str) -> String {
        let marks = self.syntax.marks.iter().filter_map(|mark| Some((*mark, grammars.vocabulary.control(mark)?)));
        let marks: Vec<(&str, u32)> = marks.collect();
        let mut out = String::new();
        while let Some((at, mark, id)) =
            marks.iter().filter_map(|(mark, id)| Some((text.find(mark)?, *mark, *id))).min()
        {
            push_text(&mut out, &text[..at]);
            write!(out, "<[{id}]> ").expect("strings take everything");
            text = &text[at + mark.len()..];
        }
        push_text(&mut out, text);
        out
    }
}

fn push_text(out: &mut String, text: &str) {
    if !text.is_empty() {
        write!(out, "{} ", Value::from(text)).expect("strings take everything");
    }
}

fn at(tool: &Tool, error: GrammarError) -> GrammarError {
    GrammarError::Tool { name: tool.name.clone(), error: Box::new(error) }
}

/// The grammar of a tool's arguments, which are an object whatever else its schema says.
fn parameters(schema: &Value) -> Result<GrammarWithLexer, GrammarError> {
    let mut schema = schema.clone();
    if let Value::Object(schema) = &mut schema {
        if schema.is_empty() {
            schema.insert("properties".into(), json!({}));
        }
        if !schema.contains_key("$ref") {
            schema.entry("type").or_insert("object".into());
        }
    }
    schema::grammar(&schema)
}

fn any_object() -> GrammarWithLexer {
    schema::grammar(&json!({"type": "object"})).expect("a small valid schema")
}
