//! Tests without a model: random tokens among those allowed, until the text ends.

mod hostile;
mod json;
mod markers;
mod patterns;
#[path = "../../../tests/constrained/schemas.rs"]
mod schemas;
mod speed;
mod tool_calls;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use moewe_runtime::engine::Constraint;

use super::vocabulary::{Token, Vocabulary};
use super::{GrammarError, Grammars};
use crate::api::OutputFormat;
use crate::text::Text;
use schemas::Random;

/// The demo model's text and grammars. Its vocabulary is taken to be padded by 20 ids that the tokenizer does not know.
struct Demo {
    text: Arc<Text>,
    grammars: Grammars,
}

const DEMO_PADDED: u32 = 2068;
const DEMO_EOS: u32 = 1;

static DEMO: LazyLock<Demo> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let text = Arc::new(Text::load(&dir).expect("the demo's text files").expect("a tokenizer"));
    let grammars = Grammars::new(&text, DEMO_PADDED, &[DEMO_EOS]).expect("the demo's vocabulary");
    Demo { text, grammars }
});

/// Grammars over made-up tokens: all bytes, then control tokens. The last one ends a text.
fn bytes_and(control: &[&str]) -> Grammars {
    let control: Vec<String> = control.iter().copied().chain(["<end>"]).map(str::to_owned).collect();
    let size = 256 + control.len() as u32;
    let token = |id: u32| match usize::try_from(id).expect("fits").checked_sub(256) {
        None => Token::Text(vec![id as u8]),
        Some(at) => Token::Control(control[at].clone().into_bytes()),
    };
    let encode = |text: &str| Some(text.bytes().map(u32::from).collect());
    Grammars::of(Vocabulary::new(size, token, &[size - 1], encode).expect("a good vocabulary")).expect("good slices")
}

fn mask_of(grammars: &Grammars, constraint: &mut dyn Constraint) -> Result<Vec<u32>, String> {
    let mut mask = vec![0; grammars.vocabulary.len().div_ceil(32) as usize];
    constraint.allowed(&mut mask)?;
    Ok(mask)
}

fn ids(mask: &[u32]) -> Vec<u32> {
    (0..mask.len() as u32 * 32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect()
}

/// A finished random text.
#[derive(Debug)]
struct Walk {
    /// The bytes of the tokens, control tokens as they are spelt, without the end.
    bytes: Vec<u8>,
    tokens: Vec<u32>,
}

impl Walk {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.bytes).expect("whole characters")
    }
}

/// Draws random tokens until the text ends. The longer the text, the more often it goes for what may close something.
/// `see` is called with the text before each draw and whether it may end there.
fn walk(
    grammars: &Grammars,
    constraint: &mut dyn Constraint,
    random: &mut Random,
    mut see: impl FnMut(&[u8], bool),
) -> Result<Walk, String> {
    const LONGEST: usize = 1_500;
    let vocabulary = &grammars.vocabulary;
    let mut walk = Walk { bytes: Vec::new(), tokens: Vec::new() };
    while !constraint.ended() {
        if walk.tokens.len() == LONGEST {
            return Err(format!("no end after {:?}", String::from_utf8_lossy(&walk.bytes)));
        }
        let mask = mask_of(grammars, constraint)?;
        assert_eq!(mask, mask_of(grammars, constraint)?, "asked twice, it answers alike");
        let allowed = ids(&mask);
        assert!(allowed.iter().all(|id| *id < vocabulary.len()), "ids that do not exist");
        let ends = |id: &u32| vocabulary.eos().contains(id);
        see(&walk.bytes, allowed.iter().any(ends));
        let closing: Vec<u32> =
            allowed.iter().copied().filter(|id| ends(id) || closes(vocabulary.spelling(*id))).collect();
        let hurry = walk.tokens.len() >= 30 || random.chance(walk.tokens.len() * 2);
        let choice = if hurry && !closing.is_empty() { &closing } else { &allowed };
        let Some(token) = (!choice.is_empty()).then(|| *random.of(choice)) else {
            return Err("nothing is allowed".into());
        };
        constraint.drawn(token)?;
        if ends(&token) {
            assert!(constraint.ended(), "it ended by a token");
        } else {
            walk.bytes.extend_from_slice(vocabulary.spelling(token));
            walk.tokens.push(token);
        }
    }
    Ok(walk)
}

fn closes(token: &[u8]) -> bool {
    matches!(token, [b'"' | b'}' | b']', ..] | [.., b'}' | b']'] | b"null" | b"," | b"A" | b"/")
}

fn format(grammars: &Grammars, format: &OutputFormat) -> Result<Box<dyn Constraint>, GrammarError> {
    Ok(grammars.constraint(format)?.expect("not any text"))
}

fn schema(schema: serde_json::Value) -> OutputFormat {
    OutputFormat::JsonSchema { name: "test".into(), schema }
}
