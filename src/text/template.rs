//! Chat templates: Jinja as the Hugging Face libraries run it.
//!
//! Templates are written for Python's Jinja with the settings of transformers' `apply_chat_template`; this module gives
//! minijinja the same settings, names and Python habits. A template is a program from a stranger: it may take
//! [`MAX_STEPS`] steps, write [`MAX_OUTPUT`] bytes, and name neither files nor anything else of this machine but its
//! clock. (What a few steps can build up in memory by doubling a string again and again is not bounded.)

use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use serde::Serialize;
use serde_json::Map;

use super::TextError;
use super::source::{self, JsonFile};
use super::tokenizer::Config;

/// A long published template has 20 kB.
const TEMPLATE_LIMIT: u64 = 4 << 20;
/// Template instructions that a conversation may take; DeepSeek's templates take about fifty a message.
const MAX_STEPS: u64 = 20_000_000;
/// Bytes of text that a conversation may become.
const MAX_OUTPUT: usize = 64 << 20;
/// Macros and includes inside each other; each level takes some kilobytes of stack.
const MAX_DEPTH: usize = 64;
/// Spaces that `indent` and the widths of `format` may ask for.
const MAX_WIDTH: usize = 1000;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What is said; `None` for an assistant's message that only calls tools.
    pub content: Option<String>,
    /// Whatever else the template knows, such as `tool_calls`.
    #[serde(flatten)]
    pub more: Map<String, serde_json::Value>,
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), more: Map::new() }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// A system prompt.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// How to render a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatOptions {
    /// Whether to end with the beginning of the model's answer.
    pub add_generation_prompt: bool,
    /// Descriptions of the tools that the model may call.
    pub tools: Option<Vec<serde_json::Value>>,
    /// Further variables that the template knows, such as `thinking`.
    pub variables: Map<String, serde_json::Value>,
}

impl Default for ChatOptions {
    /// Ready for the model's answer, without tools.
    fn default() -> Self {
        Self { add_generation_prompt: true, tools: None, variables: Map::new() }
    }
}

/// A model's compiled chat templates.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// The file the template came from, for errors.
    file: PathBuf,
    special_tokens: Vec<(&'static str, String)>,
}

/// The template for most conversations, and the one for conversations with tools where there is one of its own.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Loads and compiles a model's chat templates; `None` if it has none.
    pub fn load(dir: &Path, config: &Config) -> Result<Option<Self>, TextError> {
        let Some((file, templates)) = find(dir, config)? else { return Ok(None) };
        let mut env = environment();
        for (name, text) in templates {
            let detail = |e: Error| TextError::TemplateSyntax { file: file.clone(), detail: describe(&e) };
            env.add_template_owned(name, text).map_err(detail)?;
        }
        Ok(Some(Self { env, file, special_tokens: config.special_tokens.clone() }))
    }

    /// Writes a conversation as text.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String, TextError> {
        let with_tools = options.tools.is_some() && self.env.get_template(TOOL_USE).is_ok();
        let template = self.env.get_template(if with_tools { TOOL_USE } else { DEFAULT });
        let mut variables: Vec<(&str, Value)> =
            options.variables.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value)))).collect();
        variables.extend(self.special_tokens.iter().map(|(name, token)| (*name, Value::from(token))));
        variables.extend([
            ("messages", Value::from(Serde(messages))),
            ("tools", Value::from(Serde(&options.tools))),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
        ]);
        let mut output = Bounded::default();
        let rendered =
            template.and_then(|template| template.render_captured_to(Value::from_pairs(variables), &mut output));
        match rendered {
            Ok(_) => Ok(String::from_utf8(output.bytes).expect("templates write UTF-8")),
            Err(_) if output.full => Err(self.limit(format!("{MAX_OUTPUT} bytes of output"))),
            Err(e) if e.kind() == ErrorKind::OutOfFuel => Err(self.limit(format!("{MAX_STEPS} steps"))),
            Err(e) => Err(TextError::TemplateRender { file: self.file.clone(), detail: describe(&e) }),
        }
    }

    /// Whether one of the templates has this in its source.
    pub fn mentions(&self, what: &str) -> bool {
        self.env.templates().any(|(_, template)| template.source().contains(what))
    }

    fn limit(&self, limit: String) -> TextError {
        TextError::TemplateLimit { file: self.file.clone(), limit }
    }
}

/// Templates as name and text.
type Templates = Vec<(String, String)>;

/// The templates and the file they stand in.
fn find(dir: &Path, config: &Config) -> Result<Option<(PathBuf, Templates)>, TextError> {
    let only = |text: String| vec![(DEFAULT.to_owned(), text)];
    let file = dir.join("chat_template.jinja");
    if let Some(text) = source::read_text(&file, TEMPLATE_LIMIT)? {
        return Ok(Some((file, only(text))));
    }
    let separate = JsonFile::load(&dir.join("chat_template.json"), TEMPLATE_LIMIT)?;
    for json in separate.iter().chain(config.json()) {
        let expected = "a template, or a list of templates {name, template} with one named `default`";
        let templates = json.parse("chat_template", expected, |value| match value {
            serde_json::Value::String(text) => Some(only(text.clone())),
            serde_json::Value::Array(list) => named(list),
            _ => None,
        })?;
        if let Some(templates) = templates {
            return Ok(Some((json.path().to_owned(), templates)));
        }
    }
    Ok(None)
}

/// A list of templates `{name, template}`. A lone template is the default whatever its name.
fn named(list: &[serde_json::Value]) -> Option<Templates> {
    let part = |entry: &serde_json::Value, field| entry.get(field)?.as_str().map(str::to_owned);
    let mut templates =
        list.iter().map(|entry| Some((part(entry, "name")?, part(entry, "template")?))).collect::<Option<Vec<_>>>()?;
    if let [(name, _)] = templates.as_mut_slice() {
        DEFAULT.clone_into(name);
    }
    templates.iter().any(|(name, _)| name == DEFAULT).then_some(templates)
}

/// Jinja with transformers' settings.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters"));
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_recursion_limit(MAX_DEPTH);
    env.set_fuel(Some(MAX_STEPS));
    env.set_formatter(python_print);
    env.set_unknown_method_callback(python_method);
    env.remove_global("debug");
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| {
        let bad = |e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}"));
        jiff::fmt::strtime::format(format.as_bytes(), &jiff::Zoned::now()).map_err(bad)
    });
    env.add_filter("tojson", to_json);
    env.add_filter("indent", indent);
    // Takes widths from the arguments, unbounded; chat templates have no use for it.
    env.remove_filter("format");
    env
}

/// Prints a value as Python does where minijinja differs.
fn python_print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => Ok(out.write_str("None")?),
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Python's methods of strings, lists and dictionaries.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let ("format", Some(format)) = (method, value.as_str()) {
        check_widths(format)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Refuses a format string that asks for a huge width.
fn check_widths(format: &str) -> Result<(), Error> {
    let widest = format.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
    if widest > 3 {
        return Err(Error::new(ErrorKind::InvalidOperation, "a number in a format string is longer than 3 digits"));
    }
    Ok(())
}

/// The filter `indent`, with a bound on the width.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands filters their arguments by value")]
fn indent(
    text: &str,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let width = match width {
        Some(width) => width,
        None => kwargs.get::<Option<usize>>("width")?.unwrap_or(4),
    };
    let first = first.or(kwargs.get("first")?).unwrap_or(false);
    let blank = blank.or(kwargs.get("blank")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    if width > MAX_WIDTH {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("indent by {width}, at most {MAX_WIDTH} is allowed"),
        ));
    }
    let pad = " ".repeat(width);
    let mut lines = Vec::new();
    for (i, line) in text.split('\n').enumerate() {
        let padded = (i > 0 || first) && (blank || !line.is_empty());
        lines.push(if padded { format!("{pad}{line}") } else { line.to_owned() });
    }
    Ok(lines.join("\n"))
}

/// The filter `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`, no HTML escapes.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands filters their arguments by value")]
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    let separators: Option<(String, String)> = kwargs.get::<Option<Vec<String>>>("separators")?.and_then(|pair| {
        let [item, key]: [String; 2] = pair.try_into().ok()?;
        Some((item, key))
    });
    kwargs.assert_all_used()?;
    if indent.is_some_and(|width| width > MAX_WIDTH) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the indent is too large"));
    }
    let bad = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut json = serde_json::to_value(value).map_err(bad)?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let (item, key) = separators.unwrap_or_else(|| {
        let item = if indent.is_some() { "," } else { ", " };
        (item.to_owned(), ": ".to_owned())
    });
    let mut bytes = Vec::new();
    let formatter = PythonJson { item, key, indent, depth: 0, empty: true };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(bad)?;
    Ok(String::from_utf8(bytes).expect("JSON is UTF-8"))
}

/// `json.dumps`: separators with a space by default, each element on its own line if an indent is given.
struct PythonJson {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    /// Whether the innermost list or object has no element so far.
    empty: bool,
}

impl PythonJson {
    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.new_line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn element<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(width) = self.indent else { return Ok(()) };
        write!(writer, "\n{:1$}", "", width * self.depth)
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.element(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.element(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }
}

/// Text of at most [`MAX_OUTPUT`] bytes.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            self.full = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An error's message with its line in the template and its causes, on one line.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
