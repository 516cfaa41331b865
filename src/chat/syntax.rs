//! How a model writes calls of tools.

/// The strings around the parts of a call, in the order in which a model writes them:
///
/// ```text
/// section_begin  call  (between  call)…  section_end
/// call = call_begin  NAME  [":" N]  arguments_begin  {JSON object}  call_end
/// ```
///
/// After `section_end` the answer is over. Content may stand before `section_begin`, and a model that reasons closes its
/// reasoning first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolSyntax {
    /// Begins all calls of an answer.
    pub section_begin: &'static str,
    /// Ends all calls of an answer.
    pub section_end: &'static str,
    /// Begins each call, up to the tool's name.
    pub call_begin: &'static str,
    /// Whether a colon and the call's number, counted from 0 over the whole conversation, follow the name.
    pub numbered: bool,
    /// What stands between the name (or number) and the arguments, which are a JSON object.
    pub arguments_begin: &'static str,
    /// Ends each call.
    pub call_end: &'static str,
    /// What stands between two calls.
    pub between: &'static str,
    /// Those added tokens of the vocabulary that the strings above are made of, where the vocabulary has them; each is
    /// one token and never spelt out. What is left of the strings is ordinary text.
    pub marks: &'static [&'static str],
}

impl ToolSyntax {
    /// DeepSeek-V3 and R1: type, name, and the arguments in a fenced block.
    pub const DEEPSEEK_V3: Self = Self {
        section_begin: "<｜tool▁calls▁begin｜>",
        section_end: "<｜tool▁calls▁end｜>",
        call_begin: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        numbered: false,
        arguments_begin: "\n```json\n",
        call_end: "\n```<｜tool▁call▁end｜>",
        between: "\n",
        marks: DEEPSEEK_MARKS,
    };

    /// DeepSeek-V3.1: name and arguments, nothing else.
    pub const DEEPSEEK_V31: Self = Self {
        call_begin: "<｜tool▁call▁begin｜>",
        arguments_begin: "<｜tool▁sep｜>",
        call_end: "<｜tool▁call▁end｜>",
        between: "",
        ..Self::DEEPSEEK_V3
    };

    /// Kimi-K2: the tool's name is part of a numbered identifier.
    pub const KIMI_K2: Self = Self {
        section_begin: "<|tool_calls_section_begin|>",
        section_end: "<|tool_calls_section_end|>",
        call_begin: "<|tool_call_begin|>functions.",
        numbered: true,
        arguments_begin: "<|tool_call_argument_begin|>",
        call_end: "<|tool_call_end|>",
        between: "",
        marks: &[
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ],
    };

    /// Those that there are.
    pub const ALL: [Self; 3] = [Self::DEEPSEEK_V3, Self::DEEPSEEK_V31, Self::KIMI_K2];

    /// The mark that `call_begin` begins with, and the text after it.
    pub(super) fn call_mark(&self) -> (&'static str, &'static str) {
        let end = self.call_begin.find('>').map_or(self.call_begin.len(), |at| at + 1);
        self.call_begin.split_at(end)
    }

    /// The text that `call_end` begins with, without white space, and the mark after it.
    pub(super) fn end_mark(&self) -> (&'static str, &'static str) {
        let call_end = self.call_end.trim_start();
        call_end.split_at(call_end.find('<').unwrap_or(0))
    }
}

const DEEPSEEK_MARKS: &[&str] = &[
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
];
