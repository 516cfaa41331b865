//! Prompts and answers of chats: what models are given, and what clients are told.

mod dialects;
mod prompts;
mod shield;
mod splitter;
mod streams;

#[path = "../data/serve/model.rs"]
#[allow(dead_code)] // the server's tests use the rest
mod model;

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use moewe::api::{ChatRequest, Options, OutputFormat, Tool, ToolChoice};
use moewe::chat::Dialect;
use moewe::text::{Message, Text};
use serde_json::{Value, json};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A model's texts and what was found out about them.
struct Model {
    text: Text,
    dialect: Dialect,
}

impl Model {
    fn of(text: Text) -> Self {
        Self { dialect: Dialect::of(&text), text }
    }

    /// The text of a prompt, control tokens included.
    fn prompt(&self, request: &ChatRequest) -> String {
        self.text.decode(&self.dialect.chat_prompt(&self.text, request).unwrap().tokens, false)
    }
}

static DEMO: LazyLock<Model> = LazyLock::new(|| Model::of(Text::load(&root("models/demo")).unwrap().unwrap()));
/// The demo model with everything.
static EVERYTHING: LazyLock<Model> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    model::write_text(&root("models/demo"), dir.path());
    Model::of(Text::load(dir.path()).unwrap().unwrap())
});
/// DeepSeek-R1, published tokenizer and template.
static R1: LazyLock<Model> = LazyLock::new(|| {
    let config = read_config("deepseek-r1-config.json").to_string();
    with_r1_tokenizer(&config)
});

fn with_r1_tokenizer(config: &str) -> Model {
    let packed = fs::File::open(root("tests/data/tokenizers/deepseek-r1.json.gz")).unwrap();
    let mut tokenizer = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut tokenizer).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    Model::of(Text::load(dir.path()).unwrap().unwrap())
}

/// The demo's vocabulary with these marks, and another template.
fn with_template(marks: &[&str], template: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let demo = root("models/demo");
    let tokenizer = serde_json::from_slice(&fs::read(demo.join("tokenizer.json")).unwrap()).unwrap();
    fs::write(dir.path().join("tokenizer.json"), model::with_marks(tokenizer, marks).to_string()).unwrap();
    fs::copy(demo.join("tokenizer_config.json"), dir.path().join("tokenizer_config.json")).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    Model::of(Text::load(dir.path()).unwrap().unwrap())
}

fn chat(messages: Vec<Message>) -> ChatRequest {
    ChatRequest {
        model: None,
        messages,
        prefix: false,
        tools: Vec::new(),
        tool_choice: ToolChoice::None,
        parallel_tool_calls: true,
        thinking: None,
        format: OutputFormat::Text,
        options: Options::default(),
    }
}

fn with_tools(request: ChatRequest) -> ChatRequest {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let function = json!({"name": "weather", "description": "the <weather> now", "parameters": parameters});
    let tool = Tool {
        name: "weather".into(),
        description: Some("the <weather> now".into()),
        parameters,
        strict: false,
        raw: json!({"type": "function", "function": function}),
    };
    ChatRequest { tools: vec![tool], tool_choice: ToolChoice::Auto, ..request }
}

/// A message that calls tools: names of the calls, tools, arguments.
fn calls(content: Option<&str>, calls: &[(&str, &str, &str)]) -> Message {
    let call = |(id, name, arguments): &(&str, &str, &str)| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let mut message = Message { content: content.map(str::to_owned), ..Message::assistant("") };
    message.more.insert("tool_calls".into(), calls.iter().map(call).collect());
    message
}

/// What a tool gave.
fn result(id: &str, content: &str) -> Message {
    let mut message = Message::new("tool", content);
    message.more.insert("tool_call_id".into(), Value::from(id));
    message
}

/// The tokenizer_config.json of a published model.
fn read_config(name: &str) -> Value {
    serde_json::from_slice(&fs::read(root("tests/data/tokenizers").join(name)).unwrap()).unwrap()
}
