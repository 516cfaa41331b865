//! Answers that follow a grammar: JSON objects, JSON that fits a schema, regular expressions, calls of tools.
//!
//! [`Grammars`] knows a model's vocabulary and makes [`Constraint`]s, which the engine asks for the tokens that may come
//! next. The crate `llguidance` parses; this module gives it the vocabulary, keeps hostile schemas from it, and takes
//! care that answers come to an end:
//!
//! - JSON has no whitespace but one optional space behind `,` and `:`, so that a model cannot write blanks for ever.
//! - An object whose schema lists `properties` has no others, unless `additionalProperties` says so or parts of the
//!   schema are joined (`allOf`, or a reference beside other keywords). Where others are allowed, they come last.
//! - Integers without bounds stay within ±(2⁵³ − 1), which every reader of JSON has exactly.
//! - Properties come in the order of the schema. Strings, lists and fractions that nobody bounds are bounded by
//!   `max_tokens` alone: an answer that it cuts is cut JSON.
//!
//! Keywords that cannot be enforced (`not`, `if`, `uniqueItems`, `dependentRequired`, …) are errors, and so is a `oneOf`
//! whose parts may overlap. A `format` that is not known is a remark, as JSON Schema has it. Nothing is fetched.
//!
//! Text that a grammar prescribes is allowed only in the tokens that the tokenizer would read it as, which is how the
//! model saw such text in training. Control tokens never stand for the text that they are spelt as.

mod after;
mod compile;
mod finite;
mod guided;
mod one_of;
mod schema;
#[cfg(test)]
mod tests;
mod tools;
mod vocabulary;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::TokEnv;
use moewe_runtime::engine::Constraint;
use serde_json::json;

use crate::api::{OutputFormat, Tool, ToolChoice};
use crate::chat::ToolSyntax;
use crate::text::Text;
use after::{After, Marker};
use compile::Compiler;
use guided::Guided;
use vocabulary::Vocabulary;

/// The longest regular expression that is compiled, in bytes.
const LONGEST_PATTERN: usize = 8 << 10;

/// Why there is no constraint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// The model's vocabulary cannot be used.
    #[error("the vocabulary cannot be used for grammars: {reason}")]
    Vocabulary {
        /// What is wrong with it.
        reason: String,
    },
    /// A JSON schema is invalid, contradicts itself, or says what cannot be enforced.
    #[error("the JSON schema cannot be enforced: {reason}")]
    Schema {
        /// The keyword and what is wrong with it.
        reason: String,
    },
    /// A JSON schema refers to another document. Nothing is fetched.
    #[error(
        "the JSON schema refers to {reference:?}; only references within the schema, which begin with `#`, are followed"
    )]
    Reference {
        /// The reference.
        reference: String,
    },
    /// A schema or pattern is larger than what is compiled.
    #[error("{what}: found {found}, at most {limit} are allowed")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// How much there may be.
        limit: usize,
    },
    /// A regular expression is invalid or too complex.
    #[error("the regular expression cannot be enforced: {reason}")]
    Regex {
        /// What is wrong with it.
        reason: String,
    },
    /// The parameters of a tool cannot be enforced.
    #[error("the parameters of the tool {name:?}: {error}")]
    Tool {
        /// The tool.
        name: String,
        /// Why.
        error: Box<GrammarError>,
    },
    /// A tool is to be called that was not given.
    #[error("the tool {name:?} is to be called, but the tools are {tools}")]
    UnknownTool {
        /// Its name.
        name: String,
        /// The names of those that were given.
        tools: String,
    },
    /// A tool is to be called, and none was given.
    #[error("a tool is to be called, but none was given")]
    NoTools,
}

/// Makes constraints for one model.
pub struct Grammars {
    vocabulary: Arc<Vocabulary>,
    compiler: Compiler,
    markers: Mutex<HashMap<String, Arc<Marker>>>,
}

impl Grammars {
    /// Takes a model's tokens: ids from 0 to below `vocab_size`, of which those in `eos` end a text. Ids that the
    /// tokenizer does not know are never allowed.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`] if the vocabulary is empty or absurdly large, or has no such token as one of `eos`.
    pub fn new(text: &Arc<Text>, vocab_size: u32, eos: &[u32]) -> Result<Self, GrammarError> {
        Self::of(Vocabulary::of_text(text, vocab_size, eos)?)
    }

    fn of(vocabulary: Vocabulary) -> Result<Self, GrammarError> {
        let vocabulary = Arc::new(vocabulary);
        let env: TokEnv = vocabulary.clone();
        let compiler = Compiler::new(&env)?;
        Ok(Self { vocabulary, compiler, markers: Mutex::default() })
    }

    /// The constraint of a format; `None` where any text will do. Compiling takes milliseconds, for large schemas up
    /// to seconds, so that it is no work for an asynchronous task.
    ///
    /// # Errors
    /// The format's schema or pattern is at fault.
    pub fn constraint(&self, format: &OutputFormat) -> Result<Option<Box<dyn Constraint>>, GrammarError> {
        let grammar = match format {
            OutputFormat::Text => return Ok(None),
            OutputFormat::JsonObject => schema::grammar(&json!({"type": "object"}))?,
            OutputFormat::JsonSchema { schema, .. } => schema::grammar(schema)?,
            OutputFormat::Regex(pattern) => return self.regex(pattern).map(Some),
        };
        let grammar = TopLevelGrammar::from_grammar(grammar);
        let matcher = self.compiler.compile(grammar).map_err(|reason| GrammarError::Schema { reason })?;
        Ok(Some(Box::new(Guided::new(matcher))))
    }

    fn regex(&self, pattern: &str) -> Result<Box<dyn Constraint>, GrammarError> {
        let refused = |reason: &str| Err(GrammarError::Regex { reason: reason.into() });
        if pattern.len() > LONGEST_PATTERN {
            let what = "bytes of the regular expression";
            return Err(GrammarError::TooLarge { what, found: pattern.len(), limit: LONGEST_PATTERN });
        }
        let escaped = |text: &str| text.bytes().rev().take_while(|byte| *byte == b'\\').count() % 2 == 1;
        if escaped(pattern) {
            return refused("it ends in a backslash that escapes nothing");
        }
        // The whole text has to match, so that anchors at the ends say nothing.
        let inner = pattern.strip_prefix('^').unwrap_or(pattern);
        let inner = inner.strip_suffix('$').filter(|rest| !escaped(rest)).unwrap_or(inner);
        if inner.is_empty() {
            return refused("only the empty text matches it");
        }
        // Digits and word characters are those of ASCII, as in JSON schemas.
        let inner = llguidance::regex_to_lark(inner, "dw");
        let grammar = TopLevelGrammar::from_lark(format!("start: /{inner}/"));
        let matcher = self.compiler.compile(grammar).map_err(|reason| GrammarError::Regex { reason })?;
        Ok(Box::new(Guided::new(matcher)))
    }

    /// The constraint of an answer that calls tools, as a model of this syntax writes calls. With `parallel`, it may
    /// have several calls.
    ///
    /// - [`ToolChoice::Required`]: calls and nothing else. [`ToolChoice::Function`]: one call of that tool.
    /// - [`ToolChoice::Auto`]: free text that may end anywhere; once it begins a call, the call has to be valid.
    /// - [`ToolChoice::None`], or no tools: `None`.
    ///
    /// Arguments fit the tool's parameters. If those cannot be enforced, a tool that is not strict may get any object.
    ///
    /// # Errors
    /// The parameters of a strict tool are at fault, or the tool to be called was not given.
    pub fn tool_calls(
        &self,
        syntax: &ToolSyntax,
        tools: &[Tool],
        choice: &ToolChoice,
        parallel: bool,
    ) -> Result<Option<Box<dyn Constraint>>, GrammarError> {
        let (tools, parallel): (Vec<&Tool>, bool) = match choice {
            ToolChoice::None => return Ok(None),
            ToolChoice::Auto if tools.is_empty() => return Ok(None),
            ToolChoice::Required if tools.is_empty() => return Err(GrammarError::NoTools),
            ToolChoice::Auto | ToolChoice::Required => (tools.iter().collect(), parallel),
            ToolChoice::Function(name) => {
                let Some(tool) = tools.iter().find(|tool| tool.name == *name) else {
                    let tools = tools.iter().map(|tool| tool.name.as_str()).collect::<Vec<_>>().join(", ");
                    return Err(GrammarError::UnknownTool { name: name.clone(), tools });
                };
                (vec![tool], false)
            }
        };
        let free = *choice == ToolChoice::Auto;
        let matcher = tools::Calls { syntax, parallel, begun: free }.compile(self, &tools)?;
        let calls = Box::new(Guided::new(matcher));
        Ok(Some(if free { self.behind(syntax.section_begin, true, calls) } else { calls }))
    }

    /// Free until the text has the marker, then held to `inner`: for answers that begin with reasoning. The text may
    /// end before the marker only if `inner` lets it be empty behind it.
    pub fn after(&self, marker: &str, mut inner: Box<dyn Constraint>) -> Box<dyn Constraint> {
        let mut mask = vec![0; self.vocabulary.free().len()];
        // An error comes again when the engine asks.
        let optional = inner.allowed(&mut mask).is_ok()
            && self.vocabulary.eos().iter().any(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1);
        self.behind(marker, optional, inner)
    }

    fn behind(&self, marker: &str, optional: bool, inner: Box<dyn Constraint>) -> Box<dyn Constraint> {
        let mut markers = self.markers.lock().unwrap_or_else(PoisonError::into_inner);
        let marker = markers.entry(marker.to_owned()).or_insert_with(|| Arc::new(Marker::new(marker)));
        Box::new(After::new(self.vocabulary.clone(), marker.clone(), optional, inner))
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

/// What an error of the library says, without the parser's state, the grammar's source and the backtraces that it puts
/// behind.
fn reason(error: &str) -> String {
    const LONGEST: usize = 300;
    let mut lines = error.lines();
    let line = lines.next().unwrap_or_default();
    let line = line.strip_prefix("panic: ").map_or_else(|| line.to_owned(), |panic| format!("internal error: {panic}"));
    // Where it is in the grammar's source, which is not the client's.
    let line = match line.strip_prefix("at ").and_then(|line| line.split_once("): ")) {
        Some((_, line)) => line.replace(" (in regex)", ""),
        None => line,
    };
    let line = schema::shortened(&line, LONGEST);
    match lines.find_map(|line| line.strip_prefix("error: ")) {
        Some(detail) => format!("{} {detail}", line.trim_end_matches(" regex parse error:")),
        None => line,
    }
}
