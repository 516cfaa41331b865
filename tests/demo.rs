//! What the demo model is for: its module of multi-token prediction drafts well and changes no token, it adds numbers that it was
//! never shown, and topics have experts of their own. `models/demo/README.md` has the figures on the whole validation set.

#[path = "common/golden.rs"]
mod common;

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use common::{bundle, gpu, options, profile};
use moewe::text::Text;
use moewe_plan::{Precision, ProgramKind};
use moewe_runtime::engine::{Engine, EngineOptions, Event, Mtp, Request};
use moewe_runtime::{Model, Session, SessionOptions, Watch};

const PROMPTS: usize = 200;
const NEW_TOKENS: usize = 16;

static DEMO: LazyLock<(Arc<Model>, Text)> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let temp = tempfile::tempdir().unwrap();
    let bundle = bundle(&dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
    (Model::load(&gpu(), &bundle, &|_| ()).unwrap(), Text::load(&dir).unwrap().unwrap())
});

fn text() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/perplexity/text.txt")).unwrap()
}

fn engine(kinds: Vec<ProgramKind>, mtp: Mtp, max_sequences: u32) -> Engine {
    let is_watched = kinds.contains(&ProgramKind::Watch);
    let options = SessionOptions {
        precision: Precision::Exact,
        kinds,
        watch: is_watched.then(|| Watch { taps: "routing".parse().unwrap(), ring_bytes: 1 << 24 }),
        max_sequences,
        pages: Some(128),
        ..SessionOptions::default()
    };
    let session = Session::new(DEMO.0.clone(), options).unwrap();
    Engine::new(session, &EngineOptions { mtp, ..EngineOptions::default() }).unwrap()
}

#[test]
fn greedy_with_drafts_is_greedy_without_on_200_prompts() {
    let tokens = DEMO.1.encode(&text(), false).unwrap();
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
        let engine = engine(vec![ProgramKind::Forward, ProgramKind::Draft { module: 1 }], mtp, max_sequences);
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

/// Two-digit sums that the corpus leaves out (`held_out` in models/train/synthetic.py).
const SUMS: [(u32, u32); 40] = [
    (13, 69),
    (23, 83),
    (31, 47),
    (50, 35),
    (79, 96),
    (48, 12),
    (56, 63),
    (71, 99),
    (55, 61),
    (63, 56),
    (91, 14),
    (65, 57),
    (29, 17),
    (28, 24),
    (33, 21),
    (49, 56),
    (93, 32),
    (40, 57),
    (61, 45),
    (27, 87),
    (58, 64),
    (73, 42),
    (66, 41),
    (41, 72),
    (97, 23),
    (48, 10),
    (49, 28),
    (79, 16),
    (11, 65),
    (21, 50),
    (40, 42),
    (20, 83),
    (21, 25),
    (23, 77),
    (58, 27),
    (47, 90),
    (65, 56),
    (64, 70),
    (57, 59),
    (68, 70),
];

#[test]
fn adds_numbers_that_it_was_not_shown() {
    let engine = engine(vec![ProgramKind::Forward], Mtp::Off, 32);
    let text = &DEMO.1;
    let ask = |&(a, b): &(u32, u32)| {
        let prompt = text.encode(&format!("25+31=56\n18+7=25\n{a}+{b}="), true).unwrap();
        engine.submit(Request { prompt, max_new_tokens: 4, ..Request::default() }).unwrap()
    };
    let streams: Vec<_> = SUMS.iter().map(ask).collect();
    let answers = streams.into_iter().map(|stream| text.decode(&stream.finish().unwrap().0, true));
    let wrong: Vec<_> = SUMS
        .iter()
        .zip(answers)
        .filter(|&(&(a, b), ref answer)| answer.lines().next() != Some((a + b).to_string().as_str()))
        .collect();
    assert!(wrong.len() <= 1, "{wrong:?}");
}

/// Mutual information (bits) of the rows and columns of a table of counts, rows weighed alike.
fn information(table: &[Vec<f64>]) -> f64 {
    let shares: Vec<Vec<f64>> = table
        .iter()
        .map(|row| row.iter().map(|count| count / row.iter().sum::<f64>() / table.len() as f64).collect())
        .collect();
    let column = |expert: usize| shares.iter().map(|row| row[expert]).sum::<f64>();
    let of_row = |row: &Vec<f64>| -> f64 {
        let total: f64 = row.iter().sum();
        let term = |(expert, &p): (usize, &f64)| if p > 0.0 { p * (p / (total * column(expert))).log2() } else { 0.0 };
        row.iter().enumerate().map(term).sum()
    };
    shares.iter().map(of_row).sum()
}

#[test]
fn topics_have_experts_of_their_own() {
    let info = &DEMO.0.plan().model;
    let (layers, chosen) = (info.moe_layers.len(), info.num_experts_per_tok as usize);
    let text = text();
    let begins = ["It is a truth", "En un lugar", "//! Counts", "{\n  \"id\"", "12+7=19"];
    let ends = ["En un lugar", "//! Counts", "{\n  \"id\"", "12+7=19", "\nIn the beginning"];
    let engine = engine(vec![ProgramKind::Forward, ProgramKind::Watch], Mtp::Off, 8);
    let mut counts = vec![vec![vec![0.0; info.experts as usize]; begins.len()]; layers];
    for (topic, (begin, end)) in begins.into_iter().zip(ends).enumerate() {
        let part = &text[text.find(begin).unwrap()..text.find(end).unwrap()];
        let prompt = DEMO.1.encode(part, true).unwrap();
        let request = Request { prompt, max_new_tokens: 1, experts: true, ..Request::default() };
        let mut stream = engine.submit(request).unwrap();
        while let Some(event) = stream.recv() {
            let Event::Tokens(tokens) = event else { continue };
            for token in tokens.prompt_experts.chunks(layers * chosen) {
                for (layer, experts) in token.chunks(chosen).enumerate() {
                    for &expert in experts {
                        counts[layer][topic][expert as usize] += 1.0;
                    }
                }
            }
        }
    }
    let bits: Vec<f64> = counts.iter().map(|table| information(table)).collect();
    println!("bits by layer, of {:.2}: {bits:.3?}", (begins.len() as f64).log2());
    assert!(bits.iter().skip(1).all(|&bits| bits > 0.8), "{bits:?}");
}
