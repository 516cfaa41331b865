//! Requests after parsing: every field is there and in range.

use serde_json::Value;

use crate::text::Message;

/// A conversation to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// The model's name, if one was given.
    pub model: Option<String>,
    /// The conversation, one message at least. Roles are `system`, `user`, `assistant` and `tool`. [`Message::more`]
    /// may hold `name`, `tool_call_id`, `reasoning_content` (texts) and `tool_calls`: a list of
    /// `{id, type: "function", function: {name, arguments}}`, where `arguments` is the text that the client gave.
    pub messages: Vec<Message>,
    /// Whether the last message is the beginning of the answer, to be continued: it is the assistant's then, and its
    /// content is a text.
    pub prefix: bool,
    /// The functions that the model may call, names distinct.
    pub tools: Vec<Tool>,
    /// Whether it should; with no tools, `None`.
    pub tool_choice: ToolChoice,
    /// Whether one answer may have several calls.
    pub parallel_tool_calls: bool,
    /// Whether to think before answering; `None` leaves it to the chat template.
    pub thinking: Option<bool>,
    /// What the answer must look like.
    pub format: OutputFormat,
    /// How to generate.
    pub options: Options,
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name: 1 to 64 letters, digits, `_` and `-`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// The JSON schema of its arguments, an object.
    pub parameters: Value,
    /// Whether the client insists on arguments that fit the schema.
    pub strict: bool,
    /// The tool as chat templates take it: `{type, function: {name, description, parameters}}`, with an empty
    /// description where none was given.
    pub raw: Value,
}

/// Whether the model calls functions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// As it likes.
    Auto,
    /// No.
    None,
    /// One at least.
    Required,
    /// This one.
    Function(String),
}

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputFormat {
    /// Any text.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that fits a schema.
    JsonSchema {
        /// The schema's name.
        name: String,
        /// The schema, an object.
        schema: Value,
    },
    /// Text that a regular expression matches from beginning to end.
    Regex(String),
}

/// Texts to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// The model's name, if one was given.
    pub model: Option<String>,
    /// The texts, one at least.
    pub prompts: Vec<Prompt>,
    /// What stands behind the gap that is to be filled.
    pub suffix: Option<String>,
    /// Whether the answer begins with the prompt.
    pub echo: bool,
    /// What the answer must look like.
    pub format: OutputFormat,
    /// How to generate.
    pub options: Options,
}

/// A text to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As token ids, one at least. Whether the model has them is not checked here.
    Tokens(Vec<u32>),
}

/// How to generate. `None` leaves a value to the model's own defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Most tokens to generate, 1 or more.
    pub max_tokens: Option<u32>,
    /// 0 (the likeliest token always) to 2.
    pub temperature: Option<f32>,
    /// Above 0, at most 1.
    pub top_p: Option<f32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0, at most 2.
    pub repetition_penalty: Option<f32>,
    /// The likeliest tokens to choose from; 0: all.
    pub top_k: Option<u32>,
    /// -2 to 2.
    pub presence_penalty: f32,
    /// -2 to 2.
    pub frequency_penalty: f32,
    /// The random numbers' seed; choice `i` of `n` takes `seed + i`.
    pub seed: Option<u64>,
    /// Texts that end the answer: at most 16, none empty.
    pub stop: Vec<String>,
    /// Answers to each prompt, 1 to 16.
    pub n: u32,
    /// What is added to tokens' logits, -100 to 100, by token id; each id once. Whether the model has them is not
    /// checked here.
    pub logit_bias: Vec<(u32, f32)>,
    /// Whether to tell the tokens' log probabilities, and of how many of the likeliest tokens, 0 to 20.
    pub logprobs: Option<u32>,
    /// Whether the answer is sent piece by piece.
    pub stream: bool,
    /// Whether a stream ends with a chunk that tells the usage.
    pub include_usage: bool,
    /// Whether to tell which experts each token chose.
    pub routed_experts: bool,
    /// Requests of a higher priority run first, as the engine has it. (On the wire lower ones do, as in vLLM.)
    pub priority: i32,
    /// The client's name for the person it acts for.
    pub user: Option<String>,
}

impl Default for Options {
    /// One answer, as the model's own defaults have it.
    fn default() -> Self {
        Self {
            max_tokens: None,
            temperature: None,
            top_p: None,
            min_p: None,
            repetition_penalty: None,
            top_k: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            stop: Vec::new(),
            n: 1,
            logit_bias: Vec::new(),
            logprobs: None,
            stream: false,
            include_usage: false,
            routed_experts: false,
            priority: 0,
            user: None,
        }
    }
}

/// A text whose tokens are asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizeRequest {
    /// The model's name, if one was given.
    pub model: Option<String>,
    /// The text.
    pub input: TokenizeInput,
}

/// What to tokenize.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizeInput {
    /// A text.
    Text {
        /// The text.
        prompt: String,
        /// Whether the tokenizer adds the tokens that it begins (and ends) texts with.
        add_special_tokens: bool,
    },
    /// A conversation, as it would be given to the model.
    Chat {
        /// The conversation, with its tools.
        request: Box<ChatRequest>,
        /// Whether to end with the beginning of the model's answer.
        add_generation_prompt: bool,
    },
}

/// Tokens whose text is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetokenizeRequest {
    /// The model's name, if one was given.
    pub model: Option<String>,
    /// The token ids. Whether the model has them is not checked here.
    pub tokens: Vec<u32>,
}
