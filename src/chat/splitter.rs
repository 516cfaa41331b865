//! Takes a generated text to pieces as it grows.

use super::arguments::{Arguments, Next};
use super::dialect::{Dialect, Reasoning};
use super::header::{self, Header};
use super::marks::{self, Begins, Found, begins, window};
use super::stops::Stops;
use super::syntax::ToolSyntax;

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// More of what the model thinks before it answers.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// A call of a tool begins.
    ToolCall {
        /// The call's number in this answer, from 0.
        index: u32,
        /// A name for it that no other call has.
        id: String,
        /// The tool's name, as the model has it: whether there is such a tool is not checked.
        name: String,
    },
    /// More of a call's arguments, the text of a JSON object.
    ToolArguments {
        /// The call's number.
        index: u32,
        /// More of the arguments.
        text: String,
    },
}

/// White space before a mark in places where both give no text: more of it than this is text.
const BLANK: usize = 64;

/// Takes the generated text piece by piece, whole characters, and gives what clients are told.
///
/// However a text is cut into pieces, the deltas add up to the same. Text is held back only as long as it may turn out
/// to be a mark, the head of a call, or a stop string.
///
/// - Reasoning goes up to its closing mark. Newlines right after the opening mark and on both sides of the closing one
///   are not told. A model may also open reasoning itself: with the opening mark as the first of its answer.
/// - A call is told as soon as its arguments begin with a brace, and the arguments as they come. What looks like a call
///   and is none is told as content, marks and all. Arguments that break off or are no JSON are told as they are: by
///   then the client knows of the call. Text after a call's arguments that belongs to no call is content.
/// - Stop strings end the answer where content has them. Reasoning and the arguments of calls may have them, as with
///   DeepSeek's API; the marks of calls are never part of them.
#[derive(Debug)]
pub struct Splitter {
    reasoning: Option<Reasoning>,
    tools: Option<ToolSyntax>,
    state: State,
    /// Text that is not decided upon.
    text: String,
    stops: Stops,
    calls: u32,
    deltas: Vec<Delta>,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space so far, after which the model may open its reasoning.
    Begin,
    /// Within reasoning; `newlines` of its end are not told yet.
    Reasoning { begun: bool, newlines: usize },
    /// Within content. `begun`: it has more than newlines. `section`: calls were begun and not ended.
    Answer { begun: bool, section: bool },
    /// At a mark that begins one call or all of them.
    Header { section: bool },
    /// Within a call's arguments.
    Arguments(Arguments),
    /// Between a call's arguments and its end.
    AfterArguments,
    /// Between two calls, or the last one and the end of all.
    BetweenCalls,
}

impl Splitter {
    /// For the answer to a prompt. `in_reasoning`: the prompt opened the reasoning. Without `tools_wanted`, what looks
    /// like calls is content. `stop`: texts that end the content and are not told.
    pub fn new(dialect: &Dialect, in_reasoning: bool, tools_wanted: bool, stop: Vec<String>) -> Self {
        let reasoning = dialect.reasoning;
        let state = match reasoning {
            Some(_) if in_reasoning => State::Reasoning { begun: false, newlines: 0 },
            Some(_) => State::Begin,
            None => State::Answer { begun: true, section: false },
        };
        let tools = dialect.tools.filter(|_| tools_wanted);
        Self { reasoning, tools, state, text: String::new(), stops: Stops::new(stop), calls: 0, deltas: Vec::new() }
    }

    /// Takes the next piece and gives what is certain by now.
    pub fn push(&mut self, piece: &str) -> Vec<Delta> {
        self.text += piece;
        self.advance(false);
        std::mem::take(&mut self.deltas)
    }

    /// Ends the text and gives what was held back.
    pub fn finish(&mut self) -> Vec<Delta> {
        self.advance(true);
        self.flush();
        std::mem::take(&mut self.deltas)
    }

    /// Whether a stop string was met: the answer is over, and nothing more will be told.
    pub fn stopped(&self) -> bool {
        self.stops.hit()
    }

    /// Whether the text so far ends within reasoning.
    pub fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning { .. })
    }

    fn advance(&mut self, ended: bool) {
        let text = std::mem::take(&mut self.text);
        let mut at = 0;
        while !self.stopped()
            && let Some(taken) = self.step(&text[at..], ended)
        {
            at += taken;
        }
        if !self.stopped() {
            text[at..].clone_into(&mut self.text);
        }
    }

    /// Decides upon the beginning of the text: how many bytes of it are done, or `None` if that depends on what follows
    /// or nothing is left. What it does with a text must not depend on what follows, nor on `ended` but at the end.
    fn step(&mut self, text: &str, ended: bool) -> Option<usize> {
        match (&self.state, self.reasoning, self.tools) {
            (State::Begin, Some(marks), _) => self.begin(text, marks, ended),
            (State::Reasoning { .. }, Some(marks), _) => self.reason(text, marks, ended),
            (State::Header { section }, _, Some(syntax)) => self.header(text, &syntax, *section, ended),
            (State::Arguments(_), _, Some(syntax)) => self.arguments(text, &syntax, ended),
            (State::AfterArguments, _, Some(syntax)) => self.after_arguments(text, &syntax, ended),
            (State::BetweenCalls, _, Some(syntax)) => self.between_calls(text, &syntax, ended),
            _ => self.answer(text, ended),
        }
    }

    fn begin(&mut self, text: &str, marks: Reasoning, ended: bool) -> Option<usize> {
        let rest = text.trim_start();
        let blank = text.len() - rest.len();
        if blank <= BLANK {
            if rest.starts_with(marks.open) {
                self.state = State::Reasoning { begun: false, newlines: 0 };
                return Some(blank + marks.open.len());
            }
            if !ended && marks.open.starts_with(rest) {
                return None;
            }
        }
        self.state = State::Answer { begun: true, section: false };
        Some(0)
    }

    fn reason(&mut self, text: &str, marks: Reasoning, ended: bool) -> Option<usize> {
        match marks::find(text, &[marks.close], ended) {
            Found::Mark(_, at) => {
                self.tell_reasoning(&text[..at], false);
                self.state = State::Answer { begun: false, section: false };
                Some(at + marks.close.len())
            }
            Found::Beginning(at) => {
                self.tell_reasoning(&text[..at], false);
                (at > 0).then_some(at)
            }
            Found::Nothing => {
                self.tell_reasoning(text, ended);
                (!text.is_empty()).then_some(text.len())
            }
        }
    }

    fn answer(&mut self, text: &str, ended: bool) -> Option<usize> {
        let State::Answer { begun, section } = self.state else { return None };
        let rest = if begun { text } else { text.trim_start_matches('\n') };
        let newlines = text.len() - rest.len();
        if rest.is_empty() {
            return (newlines > 0).then_some(newlines);
        }
        self.state = State::Answer { begun: true, section };
        let Some(syntax) = self.tools else {
            self.tell(rest);
            return Some(text.len());
        };
        let marks = [syntax.section_begin, syntax.call_mark().0, syntax.section_end];
        let taken = match marks::find(rest, &marks[..if section { 3 } else { 2 }], ended) {
            Found::Nothing => rest.len(),
            Found::Beginning(at) => at,
            Found::Mark(2, at) => {
                self.tell(&rest[..at]);
                self.state = State::Answer { begun: true, section: false };
                return Some(newlines + at + syntax.section_end.len());
            }
            Found::Mark(_, at) => {
                self.tell(&rest[..at]);
                self.state = State::Header { section };
                return Some(newlines + at);
            }
        };
        self.tell(&rest[..taken]);
        (newlines + taken > 0).then_some(newlines + taken)
    }

    fn header(&mut self, text: &str, syntax: &ToolSyntax, section: bool, ended: bool) -> Option<usize> {
        match header::parse(syntax, text) {
            Header::Call(name, taken) => {
                self.flush();
                let id = format!("call_{}", uuid::Uuid::new_v4().simple());
                self.deltas.push(Delta::ToolCall { index: self.calls, id, name });
                self.calls += 1;
                self.state = State::Arguments(Arguments::default());
                Some(taken)
            }
            Header::Unfinished if !ended => None,
            Header::Unfinished | Header::Bad => {
                let (call, _) = syntax.call_mark();
                let mark = if text.starts_with(call) { call } else { syntax.section_begin };
                self.state = State::Answer { begun: true, section };
                self.tell(mark);
                Some(mark.len())
            }
        }
    }

    fn arguments(&mut self, text: &str, syntax: &ToolSyntax, ended: bool) -> Option<usize> {
        let State::Arguments(arguments) = &mut self.state else { return None };
        let (taken, next) = arguments.take(text, &[syntax.end_mark().1, syntax.section_end], ended);
        if next != Next::More {
            self.state = State::AfterArguments;
        }
        if taken > 0 {
            let (index, more) = (self.calls - 1, &text[..taken]);
            match self.deltas.last_mut() {
                Some(Delta::ToolArguments { text, .. }) => text.push_str(more),
                _ => self.deltas.push(Delta::ToolArguments { index, text: more.to_owned() }),
            }
        }
        (taken > 0 || next != Next::More).then_some(taken)
    }

    fn after_arguments(&mut self, text: &str, syntax: &ToolSyntax, ended: bool) -> Option<usize> {
        let (fence, mark) = syntax.end_mark();
        let (inside, full) = window(text, BLANK);
        let mut maybe = false;
        // A call may lack its end where the end of all follows.
        for (end, ends_all) in [(mark, false), (syntax.section_end, true)] {
            for fence in [fence, ""] {
                match begins(inside, &[fence, end]) {
                    Begins::Yes(taken) if ends_all => {
                        self.state = State::Answer { begun: true, section: false };
                        return Some(taken);
                    }
                    Begins::Yes(taken) => {
                        self.state = State::BetweenCalls;
                        return Some(taken);
                    }
                    Begins::Maybe => maybe = true,
                    Begins::No => {}
                }
            }
        }
        if maybe && !full && !ended {
            return None;
        }
        self.state = State::Answer { begun: true, section: true };
        let rest = text.trim();
        Some(if ended && (rest.is_empty() || rest == fence) { text.len() } else { 0 })
    }

    fn between_calls(&mut self, text: &str, syntax: &ToolSyntax, ended: bool) -> Option<usize> {
        let (inside, full) = window(text, BLANK);
        let (call, _) = syntax.call_mark();
        let found = (begins(inside, &[call]), begins(inside, &[syntax.section_end]));
        match found {
            (Begins::Yes(taken), _) => {
                self.state = State::Header { section: true };
                return Some(taken - call.len());
            }
            (_, Begins::Yes(taken)) => {
                self.state = State::Answer { begun: true, section: false };
                return Some(taken);
            }
            (Begins::No, Begins::No) => {}
            _ if !full && !ended => return None,
            _ => {}
        }
        self.state = State::Answer { begun: true, section: true };
        Some(if ended && text.trim().is_empty() { text.len() } else { 0 })
    }

    /// Tells reasoning, but not newlines at its beginning, nor at what may be its end unless it is `cut` there.
    fn tell_reasoning(&mut self, text: &str, cut: bool) {
        let State::Reasoning { begun, newlines } = &mut self.state else { return };
        let text = if *begun { text } else { text.trim_start_matches('\n') };
        *begun |= !text.is_empty();
        let body = if cut { text } else { text.trim_end_matches('\n') };
        let after = text.len() - body.len();
        if body.is_empty() && !cut {
            *newlines += after;
            return;
        }
        let mut told = "\n".repeat(std::mem::replace(newlines, after));
        told += body;
        match self.deltas.last_mut() {
            _ if told.is_empty() => {}
            Some(Delta::Reasoning(text)) => *text += &told,
            _ => self.deltas.push(Delta::Reasoning(told)),
        }
    }

    /// Tells content, as far as no stop string may be in it.
    fn tell(&mut self, text: &str) {
        let text = self.stops.push(text);
        self.tell_content(text);
    }

    /// Tells the content that was held back.
    fn flush(&mut self) {
        let text = self.stops.flush();
        self.tell_content(text);
    }

    fn tell_content(&mut self, told: String) {
        match self.deltas.last_mut() {
            _ if told.is_empty() => {}
            Some(Delta::Content(text)) => *text += &told,
            _ => self.deltas.push(Delta::Content(told)),
        }
    }
}
