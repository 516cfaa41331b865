//! How long masks take: `cargo test grammar::tests::speed -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use serde_json::json;

use super::schemas::Random;
use super::{DEMO, Token, Vocabulary, format, ids, schema};
use crate::api::OutputFormat;
use crate::grammar::Grammars;

const VOCAB: u32 = 129_280;

/// DeepSeek-V3's size: all bytes, and random words as a tokenizer has them.
fn large() -> Grammars {
    let mut random = Random(0);
    let mut words: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    let letters = b"etaoinshrdlucmfwypvbgkjqxz0123456789";
    while words.len() + 1 < VOCAB as usize {
        let mut word: Vec<u8> = if random.chance(50) { vec![b' '] } else { Vec::new() };
        for _ in 0..2 + random.below(8) {
            let (a, b) = (random.below(letters.len()), random.below(letters.len()));
            word.push(letters[a.min(b)]);
        }
        if random.chance(5) {
            word.extend_from_slice(random.of(&["\",", "\":", "\"}", "\", \"", "}}", "\\n"]).as_bytes());
        }
        words.push(word);
    }
    let token =
        |id: u32| words.get(id as usize).map_or(Token::Control(b"<end>".to_vec()), |word| Token::Text(word.clone()));
    Grammars::of(Vocabulary::new(VOCAB, token, &[VOCAB - 1], |_| None).expect("good")).expect("good")
}

#[test]
#[ignore = "prints times, and checks nothing"]
fn masks() {
    let began = Instant::now();
    let large = large();
    println!("{VOCAB} tokens: made in {:?}", began.elapsed());
    let person = json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0,
        "maximum": 150}, "mail": {"type": "string", "format": "email"}, "tags": {"type": "array", "items": {"type": "string",
        "maxLength": 20}}}, "required": ["name", "age", "mail", "tags"]});
    let formats = [
        ("object", OutputFormat::JsonObject),
        ("schema", schema(person)),
        ("regex", OutputFormat::Regex("[A-Z][a-z]+( [A-Z][a-z]+)*: .{1,300}".into())),
    ];
    for (size, grammars) in [("demo", &DEMO.grammars), ("large", &large)] {
        for (name, wanted) in &formats {
            let mut times = Vec::new();
            let mut made = Duration::ZERO;
            for seed in 0..20 {
                let began = Instant::now();
                let mut constraint = format(grammars, wanted).expect("good");
                made += began.elapsed() / 20;
                let mut random = Random(seed);
                let mut mask = vec![0; grammars.vocabulary.len().div_ceil(32) as usize];
                while !constraint.ended() && times.len() < 100 * (seed as usize + 1) {
                    let began = Instant::now();
                    mask.fill(0);
                    constraint.allowed(&mut mask).expect("a mask");
                    times.push(began.elapsed());
                    constraint.drawn(*random.of(&ids(&mask))).expect("allowed");
                }
            }
            times.sort();
            let mean = times.iter().sum::<Duration>() / times.len() as u32;
            let (half, most) = (times[times.len() / 2], times[times.len() * 99 / 100]);
            println!("{size} {name}: made in {made:?}; mask mean {mean:?}, median {half:?}, 99 % {most:?}");
        }
    }
}
