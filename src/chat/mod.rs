//! Between the API's messages and the model's text.
//!
//! On the way in, [`Dialect::chat_prompt`] writes a conversation with the model's own chat template; on the way out, a
//! [`Splitter`] takes the generated text to pieces: reasoning, content, calls of tools. What a model's texts look like
//! is found out once, by [`Dialect::of`]: from the vocabulary, and by rendering small conversations with the template
//! and looking what has become of them.
//!
//! Templates are programs that nobody checks, so a request is fitted to the template rather than the reverse:
//!
//! - A template that ignores system messages gets their text in front of the first user message; one that only knows
//!   a system message at the beginning gets all of them joined there.
//! - Arguments of earlier tool calls are given as the JSON text that clients send, or parsed where the template takes
//!   nothing else. A message with content and calls becomes two messages where the template would drop either.
//! - Tools, calls and results that the template cannot show are refused, for the answer would pass over them silently.
//!
//! Text that spells a control token (`<｜User｜>` in a question) stays text: see [`encode`](crate::text::Text::encode_hidden)
//! and the module `shield`.

mod arguments;
mod dialect;
mod header;
mod marks;
mod prompt;
mod shield;
mod splitter;
mod stops;
mod syntax;

pub use dialect::{Dialect, Fim, Reasoning};
pub use prompt::ChatPrompt;
pub use splitter::{Delta, Splitter};
pub use syntax::ToolSyntax;
