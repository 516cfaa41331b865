//! Regular expressions from strangers: an error or a constraint, soon, and never a panic.

use serde_json::json;

use super::hostile::outcome;
use super::schemas::Random;
use super::{bytes_and, format, schema, walk};
use crate::api::OutputFormat;

#[test]
fn hostile_patterns() {
    let nested = format!("{}a{}", "(".repeat(2_000), ")".repeat(2_000));
    let alternatives = (0..1_000).map(|n| format!("word{n}")).collect::<Vec<_>>().join("|");
    let patterns = [
        "",
        "^$",
        "^",
        "$",
        "\\",
        "a\\",
        "(",
        ")",
        "[",
        "a{2,1}",
        "*",
        "(?=a)b",
        "(?<!a)b",
        "(a)\\1",
        "\\p{Nope}",
        "a**",
        "a{4294967296}",
        "(?x) a # comment",
        "/",
        "\\/",
        "//",
        "a/ start: b",
        "a/\nstart: /b",
        "\"",
        "\u{0}",
        "\u{7f}",
        "^a|b$",
        "\\$",
        "a\\\\$",
        "(a*)*",
        "(a?){1000}a{1000}",
        "((a{1,100}){1,100}){1,100}",
        "(x+x+)+y",
        ".*.*.*.*=.*",
        "\\p{L}{1,500}",
        "[\\s\\S]{1,100000}",
        "(?i)ſ+k",
        "(?s-u:\\xff)",
        "\\b\\w+\\b",
        "a$b",
        "a^b",
        "(([a-z])+.)+[A-Z]([a-z])+$",
        "(.{0,500}a){20}",
        "(a|b|ab)*bc(.{50}){20}",
        "(?s:.)*(?s:.)*(?s:.)*x{3}",
        "[ab]*a[ab]{200}",
        "[ab]*a[ab]{14}c",
    ];
    let long = "a|".repeat(8_000);
    for pattern in patterns.into_iter().chain([nested.as_str(), &alternatives, &long]) {
        if let Err(error) = outcome(&OutputFormat::Regex(pattern.into())) {
            assert!(
                !error.contains("panic") && !error.contains("internal") && error.len() < 10_000,
                "{pattern}: {error}"
            );
        }
    }
    for pattern in ["", "^$", "\\", "(", "(?=a)b", "a{2,1}", &long] {
        assert!(outcome(&OutputFormat::Regex(pattern.into())).is_err(), "{pattern:?}");
    }
    // A slash does not end the pattern.
    let grammars = bytes_and(&[]);
    let mut constraint = format(&grammars, &OutputFormat::Regex("a/\nstart: /b\\/".into())).expect("a good pattern");
    let walked = walk(&grammars, &mut *constraint, &mut Random(0), |_, _| {}).expect("an end");
    assert_eq!(walked.text(), "a/\nstart: /b/");
}

/// A regular expression of many parts.
fn pattern(random: &mut Random, depth: usize) -> String {
    const PARTS: [&str; 16] =
        ["a", "b", "ab", ".", "[a-f]", "[^a]", "\\d", "\\w", "\\p{L}", "(?s:.)", "é", "🦉", " ", "\"", "\\\\", "x{3}"];
    const COUNTS: [&str; 9] = ["*", "+", "?", "{2}", "{0,9}", "{5,}", "{100}", "{0,1000}", "{3,40}"];
    if depth == 0 {
        return (*random.of(&PARTS)).to_owned();
    }
    let mut parts = (0..=random.below(2)).map(|_| pattern(random, depth - 1)).collect::<Vec<_>>();
    match random.below(4) {
        0 => format!("({})", parts.join("|")),
        1 => parts.concat(),
        _ => format!("({}){}", parts.remove(0), random.of(&COUNTS)),
    }
}

#[test]
fn random_patterns() {
    let mut bad = 0;
    for seed in 0..100 {
        let mut random = Random(seed);
        let pattern = pattern(&mut random, 1 + seed as usize % 7);
        bad += usize::from(outcome(&OutputFormat::Regex(pattern.clone())).is_err());
        bad += usize::from(outcome(&schema(json!({"type": "string", "pattern": pattern, "minLength": 3}))).is_err());
    }
    assert!(bad < 67, "{bad} of 200 are too complex");
}
