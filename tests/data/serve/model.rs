//! The demo model with everything: see README.md beside this file.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// The marks that the demo's vocabulary lacks.
pub const MARKS: [&str; 12] = [
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
];

/// Writes the model's text files, that is all but weights and configuration, into a directory. `demo` is `models/demo`.
pub fn write_text(demo: &Path, dir: &Path) {
    for name in ["tokenizer_config.json", "generation_config.json"] {
        fs::copy(demo.join(name), dir.join(name)).unwrap();
    }
    fs::write(dir.join("chat_template.jinja"), include_str!("chat_template.jinja")).unwrap();
    let tokenizer: Value = serde_json::from_slice(&fs::read(demo.join("tokenizer.json")).unwrap()).unwrap();
    fs::write(dir.join("tokenizer.json"), with_marks(tokenizer, &MARKS).to_string()).unwrap();
}

/// Writes the whole model into a directory.
pub fn write_model(demo: &Path, dir: &Path) {
    write_text(demo, dir);
    for name in ["config.json", "model.safetensors"] {
        fs::copy(demo.join(name), dir.join(name)).unwrap();
    }
}

/// Gives the ids of the vocabulary's last tokens that no other is made of to `marks`, as added tokens that are not
/// special, like DeepSeek's.
pub fn with_marks(mut tokenizer: Value, marks: &[&str]) -> Value {
    let merges = tokenizer["model"]["merges"].as_array().unwrap().clone();
    let part_of = |merge: &Value, token: &str| merge[0] == token || merge[1] == token;
    let made_of =
        |merge: &Value, token: &str| [merge[0].as_str(), merge[1].as_str()].map(Option::unwrap).concat() == token;
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut ids: Vec<(u64, String)> = vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), token.clone())).collect();
    ids.sort_unstable();
    let is_last = |token: &str| merges.iter().any(|m| made_of(m, token)) && !merges.iter().any(|m| part_of(m, token));
    let spare: Vec<_> = ids.iter().rev().filter(|(_, token)| is_last(token)).take(marks.len()).cloned().collect();
    assert_eq!(spare.len(), marks.len(), "the vocabulary has enough tokens to spare");
    for ((id, token), mark) in spare.into_iter().rev().zip(marks) {
        let model = &mut tokenizer["model"];
        model["merges"].as_array_mut().unwrap().retain(|merge| !made_of(merge, &token));
        model["vocab"].as_object_mut().unwrap().shift_remove(&token);
        model["vocab"][*mark] = json!(id);
        let added = json!({"id": id, "content": mark, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false});
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    }
    tokenizer
}
