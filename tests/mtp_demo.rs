//! The demo model's module of multi-token prediction drafts well, and its drafts change no token of 200 real prompts.

#[path = "common/golden.rs"]
mod common;

use std::path::Path;
use std::time::Instant;

use common::{bundle, gpu, options, profile};
use moewe::text::Text;
use moewe_plan::{Precision, ProgramKind};
use moewe_runtime::engine::{Engine, EngineOptions, Mtp, Request};
use moewe_runtime::{Model, Session, SessionOptions};

const PROMPTS: usize = 200;
const NEW_TOKENS: usize = 16;

#[test]
fn greedy_with_drafts_is_greedy_without_on_200_prompts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let temp = tempfile::tempdir().unwrap();
    let bundle = bundle(&root.join("models/demo"), &temp.path().join("bundle"), &options(profile("lavapipe")));
    let model = Model::load(&gpu(), &bundle, &|_| ()).unwrap();
    let text = Text::load(&root.join("models/demo")).unwrap().unwrap();
    let tokens = text.encode(&std::fs::read_to_string(root.join("tests/data/perplexity/text.txt")).unwrap(), false);
    let tokens = tokens.unwrap();
    // Of 4 to 40 tokens, from all over the text; some overlap, so that they share beginnings with nobody or with one.
    let prompt = |index: usize| {
        let length = 4 + index * 7 % 37;
        let start = index * (tokens.len() - 40) / PROMPTS;
        tokens[start..start + length].to_vec()
    };
    let requests: Vec<Request> = (0..PROMPTS)
        .map(|index| Request {
            prompt: prompt(index),
            max_new_tokens: NEW_TOKENS,
            ignore_eos: true,
            ..Request::default()
        })
        .collect();
    let run = |mtp: Mtp, max_sequences: u32| {
        let started = Instant::now();
        let kinds = vec![ProgramKind::Forward, ProgramKind::Draft { module: 1 }];
        let options = SessionOptions {
            precision: Precision::Exact,
            kinds,
            max_sequences,
            pages: Some(128),
            ..SessionOptions::default()
        };
        let session = Session::new(model.clone(), options).unwrap();
        let engine = Engine::new(session, &EngineOptions { mtp, ..EngineOptions::default() }).unwrap();
        let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.unconstrained()).unwrap()).collect();
        let texts: Vec<Vec<u32>> = streams.into_iter().map(|stream| stream.finish().unwrap().0).collect();
        let acceptance = engine.stats().acceptance;
        println!("{mtp:?}: {:?}, drafts and accepted ones by position: {acceptance:?}", started.elapsed());
        (texts, acceptance)
    };
    let (expected, drafted) = run(Mtp::Off, 32);
    assert!(drafted.is_empty() && expected.iter().all(|text| text.len() == NEW_TOKENS));
    assert!(expected.windows(2).filter(|texts| texts[0] == texts[1]).count() < PROMPTS / 10, "prompts are alike");
    // A batch has 64 rows: so many sequences have that many drafts each.
    for (drafts, max_sequences) in [(1, 32), (3, 16)] {
        let (texts, acceptance) = run(Mtp::Fixed(drafts), max_sequences);
        for (number, (found, expected)) in texts.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "prompt {number} with {drafts} drafts");
        }
        assert_eq!(acceptance.len(), drafts);
        let rates: Vec<f64> = acceptance.iter().map(|&(drafted, accepted)| accepted as f64 / drafted as f64).collect();
        assert!(acceptance.iter().all(|place| place.0 > 500) && (0.5..1.0).contains(&rates[0]), "{acceptance:?}");
        // Drafts behind the first count as accepted only if those before them are.
        assert!(rates.is_sorted_by(|before, behind| before > behind), "{rates:?}");
    }
}
