//! From tokens to what clients are told.

use moewe::chat::{Delta, Splitter};
use proptest::prelude::*;

use super::EVERYTHING;

proptest! {
    /// A character that several tokens make up is told whole, in reasoning, content and arguments.
    #[test]
    fn characters_of_several_tokens(text in "[a\u{1F600}\u{1F468}\u{200D}é思]{1,12}") {
        let model = &*EVERYTHING;
        let syntax = model.dialect.tools.unwrap();
        let calls = [syntax.section_begin, syntax.call_begin, "f", syntax.arguments_begin, "{\"", &text, "\":0}", syntax.call_end, syntax.section_end];
        let answer = format!("<think>{text}\n</think>\n{text}{}<｜end▁of▁sentence｜>", calls.concat());
        let ids = model.text.encode(&answer, false).unwrap();
        let broken = ids.iter().any(|&id| model.text.token(id).unwrap().contains(char::REPLACEMENT_CHARACTER));
        prop_assert!(broken || !text.contains('😀'));
        let mut stream = model.text.stream(false);
        let mut splitter = Splitter::new(&model.dialect, false, true, Vec::new());
        let mut told = (String::new(), String::new(), String::new());
        let mut pieces = Vec::new();
        for id in ids {
            if !model.dialect.hides(id) {
                pieces.push(stream.push(id));
            }
        }
        pieces.push(stream.finish());
        let mut deltas: Vec<Delta> = pieces.iter().flat_map(|piece| splitter.push(piece)).collect();
        deltas.extend(splitter.finish());
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => told.0 += &text,
                Delta::Content(text) => told.1 += &text,
                Delta::ToolCall { name, .. } => prop_assert_eq!(name, "f"),
                Delta::ToolArguments { text, .. } => told.2 += &text,
            }
        }
        prop_assert_eq!(told, (text.clone(), text.clone(), format!("{{\"{text}\":0}}")));
    }
}
