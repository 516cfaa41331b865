//! Texts that are held to something only behind a marker.

use serde_json::json;

use super::schemas::Random;
use super::{DEMO, DEMO_EOS, bytes_and, format, ids, mask_of, schema, walk};
use crate::api::OutputFormat;

#[test]
fn what_follows_the_marker_is_held_to_the_grammar() {
    let grammars = bytes_and(&["</think>"]);
    let mut texts = Vec::new();
    for seed in 0..20 {
        let inner = format(&grammars, &schema(json!({"enum": ["x", 1]}))).expect("a good schema");
        let mut constraint = grammars.after("aab", inner);
        let mut random = Random(seed);
        let mut bytes = Vec::new();
        while !constraint.ended() {
            let allowed = ids(&mask_of(&grammars, &mut *constraint).expect("a mask"));
            let letters: Vec<u32> = allowed.iter().copied().filter(|id| (97..99).contains(id)).collect();
            let token = if letters.is_empty() { *random.of(&allowed) } else { *random.of(&letters) };
            constraint.drawn(token).expect("allowed");
            bytes.push(token as u8);
        }
        texts.push(String::from_utf8(bytes).expect("text"));
    }
    for text in &texts {
        let (before, behind) = text.split_at(text.find("aab").expect("the marker") + 3);
        assert!(before.bytes().all(|byte| byte == b'a' || byte == b'b'), "{text}");
        assert!([r#""x""#, "1"].contains(&behind), "{text}");
    }
}

#[test]
fn no_token_slips_over_the_marker() {
    // In the demo's vocabulary, `>` and `."` are tokens, so a token may end the marker and go on.
    let marker = "he";
    for seed in 0..50 {
        let inner = format(&DEMO.grammars, &OutputFormat::Regex("[0-9]{2}".into())).expect("a good pattern");
        let mut constraint = DEMO.grammars.after(marker, inner);
        let see = |text: &[u8], ends: bool| {
            let behind = String::from_utf8_lossy(text).find(marker).map(|at| at + marker.len());
            let digits = behind.map_or(0, |at| String::from_utf8_lossy(text)[at..].len());
            assert_eq!(ends, digits == 2 && behind.is_some(), "{:?}", String::from_utf8_lossy(text));
        };
        let mut random = Random(seed);
        let mut text = Vec::new();
        while !constraint.ended() && text.len() < 10_000 {
            let allowed = ids(&mask_of(&DEMO.grammars, &mut *constraint).expect("a mask"));
            see(&text, allowed.contains(&DEMO_EOS));
            let token = *random.of(&allowed);
            constraint.drawn(token).expect("allowed");
            text.extend_from_slice(DEMO.grammars.vocabulary.spelling(token));
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        if let Some(at) = text.find(marker) {
            assert!(text[at + 2..].len() == 2 && text[at + 2..].bytes().all(|byte| byte.is_ascii_digit()), "{text}");
        }
    }
}

#[test]
fn a_control_token_is_a_marker_too() {
    let grammars = bytes_and(&["</think>"]);
    let inner = format(&grammars, &OutputFormat::JsonObject).expect("a good grammar");
    let mut constraint = grammars.after("</think>", inner);
    constraint.drawn(u32::from(b'x')).expect("free");
    assert!(!ids(&mask_of(&grammars, &mut *constraint).expect("a mask")).contains(&257), "it must not end here");
    constraint.drawn(256).expect("free");
    assert_eq!(ids(&mask_of(&grammars, &mut *constraint).expect("a mask")), [u32::from(b'{')]);
    constraint.drawn(u32::from(b'{')).expect("allowed");
    constraint.drawn(u32::from(b'}')).expect("allowed");
    assert!(constraint.ended());
}

#[test]
fn a_text_may_end_early_only_if_nothing_is_wanted_behind() {
    let grammars = bytes_and(&[]);
    let end = grammars.vocabulary.eos()[0];
    for (pattern, optional) in [("(x)?", true), ("x", false)] {
        let inner = format(&grammars, &OutputFormat::Regex(pattern.into())).expect("a good pattern");
        let mut constraint = grammars.after("!", inner);
        constraint.drawn(u32::from(b'a')).expect("free");
        assert_eq!(ids(&mask_of(&grammars, &mut *constraint).expect("a mask")).contains(&end), optional);
        if optional {
            constraint.drawn(end).expect("allowed");
            assert!(constraint.ended());
        }
    }
}

#[test]
fn padding_ids_are_never_allowed() {
    for wanted in [OutputFormat::JsonObject, OutputFormat::Regex("(?s:.*)".into())] {
        let inner = format(&DEMO.grammars, &wanted).expect("a good grammar");
        let mut free = DEMO.grammars.after("never", inner);
        let mut held = format(&DEMO.grammars, &wanted).expect("a good grammar");
        for constraint in [&mut free, &mut held] {
            let allowed = ids(&mask_of(&DEMO.grammars, &mut **constraint).expect("a mask"));
            assert!(allowed.iter().all(|id| *id < 2048), "{allowed:?}");
        }
    }
    let inner = format(&DEMO.grammars, &OutputFormat::Regex("x".into())).expect("a good pattern");
    walk(&DEMO.grammars, &mut *DEMO.grammars.after("", inner), &mut Random(0), |_, _| {}).expect("an end");
}
