//! Drafting with modules of multi-token prediction on the device: it never changes a token, and accepts what the
//! reference accepts.

#[path = "common/golden.rs"]
mod common;

use std::sync::Arc;

use common::{Golden, bundle, gpu, options, profile};
use moewe::trace::{self, Numbers};
use moewe_compiler::synth::{self, Shape};
use moewe_oracle::ops::softmax;
use moewe_plan::{Bundle, Precision, ProgramKind, Sampling};
use moewe_runtime::{Model, Session, SessionOptions, Stepped, Work};

/// Everything that a session needs to draft.
fn drafting(model: &Arc<Model>, max_sequences: u32, precision: Precision) -> Session {
    let modules = model.plan().model.mtp_modules;
    let drafts = (1..=modules).map(|module| ProgramKind::Draft { module });
    let kinds = [ProgramKind::Forward].into_iter().chain(drafts).collect();
    let options = SessionOptions { precision, kinds, max_sequences, pages: Some(64), ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

fn golden_model(dir: &str) -> (Golden, Arc<Model>) {
    let golden = Golden::open(dir);
    let temp = tempfile::tempdir().unwrap();
    let bundle = bundle(&golden.dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
    let model = Model::load(&gpu(), &bundle, &|_| ()).unwrap();
    (golden, model)
}

/// At least `count` tokens behind a prompt, and for each pass how many drafts were verified and accepted.
fn generate(
    session: &mut Session,
    prompt: &[u32],
    count: usize,
    drafts: u32,
    burst: u32,
    chunk: usize,
    sampling: Sampling,
) -> (Vec<u32>, Vec<(u32, u32)>) {
    let sequence = session.add_sequence(prompt, sampling).unwrap();
    let (mut tokens, mut verified) = (Vec::new(), Vec::new());
    while tokens.len() < count {
        let pending = session.tokens(sequence).unwrap().len() - session.cached(sequence).unwrap();
        let work = Work { sequence, tokens: pending.min(chunk), drafts, logprobs: false };
        let Stepped { tokens: more, verified: passes, poisoned, .. } = session.step(&[work], burst).unwrap().remove(0);
        assert!(!poisoned);
        tokens.extend(more);
        verified.extend(passes);
    }
    session.remove_sequence(sequence).unwrap();
    (tokens, verified)
}

#[test]
fn greedy_tokens_are_the_golden_ones_and_acceptance_is_the_reference_s() {
    for dir in ["v3-mtp-accept-tiny", "v3-tiny", "v3-bf16-tiny", "v3-bf16-tiny-sharded", "v3-fp8-tiny"] {
        let (golden, model) = golden_model(&format!("golden/{dir}"));
        let mut session = drafting(&model, 1, Precision::Exact);
        let listed = std::fs::read(golden.dir.join("golden/golden.json")).unwrap_or_default();
        let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap_or_default();
        for sequence in &golden.sequences {
            for (drafts, burst, chunk) in [(0, 4, 256), (1, 1, 5), (1, 8, 64), (3, 5, 256), (7, 4, 1)] {
                let what = format!("{dir} {} drafts {drafts} burst {burst} chunk {chunk}", sequence.name);
                let count = sequence.greedy.len();
                let (tokens, verified) =
                    generate(&mut session, &sequence.ids, count, drafts, burst, chunk, Sampling::default());
                assert_eq!(&tokens[..count], sequence.greedy, "{what}");
                let (offered, accepted) = verified.iter().fold((0, 0), |sum, pass| (sum.0 + pass.0, sum.1 + pass.1));
                println!("{what}: {accepted} of {offered} drafts");
                let reference = &listed["sequences"][&sequence.name]["mtp_accepted"];
                if let (1, Some(reference)) = (drafts, reference.as_array()) {
                    let found: Vec<u64> = verified.iter().map(|pass| pass.1.into()).collect();
                    let reference: Vec<u64> = reference.iter().map(|n| n.as_u64().unwrap()).collect();
                    // The reference stops within a pass when it has enough tokens.
                    let passes = reference.len().min(found.len()).saturating_sub(1);
                    assert!(passes > 5, "{what}");
                    assert_eq!(found[..passes], reference[..passes], "{what}");
                }
            }
        }
    }
}

/// A checkpoint with random weights, compiled; and its own directory for the oracle.
fn synthesised(temp: &std::path::Path, seed: u64, scale: &[&str]) -> Bundle {
    let dir = temp.join("checkpoint");
    let shape = Shape::new("v3", scale, Some(synth::Storage::F32)).unwrap();
    synth::write(&shape, &dir, synth::Options { seed, ..synth::Options::default() }, &|_, _| ()).unwrap();
    bundle(&dir, &temp.join("bundle"), &options(profile("lavapipe")))
}

const SMALL: [&str; 13] = [
    "layers=2",
    "first_k_dense_replace=1",
    "hidden=32",
    "num_attention_heads=2",
    "q_lora_rank=16",
    "kv_lora_rank=16",
    "qk_nope_head_dim=8",
    "qk_rope_head_dim=8",
    "v_head_dim=8",
    "intermediate_size=32",
    "moe_intermediate_size=8",
    "n_routed_experts=16",
    "max_position_embeddings=512",
];

/// Rows of modules behind the first rest on drafts, and are made again where these were rejected: what the device
/// accepts is what the oracle accepts, whose modules start afresh each time.
#[test]
fn several_modules_accept_what_the_reference_accepts() {
    let mut some = 0;
    for (modules, seed) in [(2, 1), (3, 2), (2, 3)] {
        let temp = tempfile::tempdir().unwrap();
        let count = format!("num_nextn_predict_layers={modules}");
        // So few tokens that random modules are right now and then.
        let scale: Vec<&str> = SMALL.iter().copied().chain(["vocab=4", count.as_str()]).collect();
        let bundle = synthesised(temp.path(), seed, &scale);
        let model = Model::load(&gpu(), &bundle, &|_| ()).unwrap();
        let oracle = moewe_oracle::Model::load(temp.path().join("checkpoint")).unwrap();
        let mut session = drafting(&model, 1, Precision::Exact);
        for prompt in [vec![1], vec![2, 0], vec![3, 1, 2, 0, 1, 1, 2], (0..70).map(|i| (i * i) % 4).collect()] {
            let (expected, accepted) = oracle.speculative(&prompt, 40);
            for (drafts, burst, chunk) in [(modules, 1, 256), (modules, 6, 3), (modules + 2, 4, 256), (1, 4, 64)] {
                let what = format!("{modules} modules, {} tokens, {drafts} drafts, burst {burst}", prompt.len());
                let (tokens, verified) = generate(&mut session, &prompt, 40, drafts, burst, chunk, Sampling::default());
                assert_eq!(tokens[..40], expected, "{what}");
                if drafts == modules {
                    let found: Vec<usize> = verified.iter().map(|pass| pass.1 as usize).collect();
                    let passes = found.len().min(accepted.len()) - 1;
                    assert_eq!(found[..passes], accepted[..passes], "{what}");
                    some += found[..passes].iter().filter(|&&count| count > 1).count();
                }
            }
        }
    }
    assert!(some > 0, "no draft of a second module was ever accepted: nothing was tested");
}

/// Drawn tokens have the distribution of the model, drafts or not: 50,176 texts of two tokens behind one prompt.
#[test]
fn drafts_leave_the_distribution_alone() {
    const VOCAB: usize = 12;
    const TOGETHER: u32 = 32;
    const ROUNDS: u32 = 1568;
    let temp = tempfile::tempdir().unwrap();
    let scale: Vec<&str> = SMALL.iter().copied().chain(["vocab=12", "num_nextn_predict_layers=1"]).collect();
    let bundle = synthesised(temp.path(), 5, &scale);
    let model = Model::load(&gpu(), &bundle, &|_| ()).unwrap();
    let prompt = [3, 1];
    let temperature = 0.4;

    // What the model says, in f64.
    let mut tracing = common::session(&model, trace::kinds(1), Some(4), Precision::Exact);
    let mut probabilities = |tokens: &[u32]| -> Vec<f64> {
        let traced = trace::trace(&mut tracing, tokens, None, &|name| name == "logits").unwrap();
        let Numbers::F32(logits) = &traced["logits"].data else { panic!("logits are floats") };
        let last = logits[logits.len() - VOCAB..].iter().map(|&x| f64::from(x) / f64::from(temperature));
        softmax(&last.collect::<Vec<_>>())
    };
    let first = probabilities(&prompt);
    let expected: Vec<f64> = (0..VOCAB)
        .flat_map(|token| {
            let then = probabilities(&[&prompt[..], &[token as u32]].concat());
            let before = first[token];
            then.into_iter().map(move |p| p * before).collect::<Vec<_>>()
        })
        .collect();

    let mut session = drafting(&model, TOGETHER, Precision::Exact);
    let (mut counts, mut drafted, mut accepted) = (vec![0u32; VOCAB * VOCAB], 0, 0);
    for round in 0..ROUNDS {
        let sequences: Vec<_> = (0..TOGETHER)
            .map(|index| {
                let seed_low = round * TOGETHER + index;
                session.add_sequence(&prompt, Sampling { temperature, seed_low, ..Sampling::default() }).unwrap()
            })
            .collect();
        let works =
            |tokens| sequences.iter().map(move |&sequence| Work { sequence, tokens, drafts: 1, logprobs: false });
        let began = session.step(&works(prompt.len()).collect::<Vec<_>>(), 1).unwrap();
        let went_on = session.step(&works(1).collect::<Vec<_>>(), 1).unwrap();
        for (began, went_on) in began.iter().zip(&went_on) {
            counts[began.tokens[0] as usize * VOCAB + went_on.tokens[0] as usize] += 1;
            drafted += went_on.verified[0].0;
            accepted += went_on.verified[0].1;
        }
        for sequence in sequences {
            session.remove_sequence(sequence).unwrap();
        }
    }
    let total = f64::from(ROUNDS * TOGETHER);
    assert!(total >= 50_000.0 && drafted == ROUNDS * TOGETHER);
    // Some of both, or nothing was tested.
    let rate = f64::from(accepted) / total;
    assert!((0.02..0.98).contains(&rate), "{rate} of the drafts were accepted");
    // Chi-square over cells of some size; the rest together is one more.
    let (mut statistic, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    for (&count, p) in counts.iter().zip(&expected) {
        let (found, wanted) = (f64::from(count), p * total);
        if wanted < 8.0 {
            rare = (rare.0 + found, rare.1 + wanted);
        } else {
            statistic += (found - wanted).powi(2) / wanted;
            cells += 1;
        }
    }
    if rare.1 > 0.0 {
        statistic += (rare.0 - rare.1).powi(2) / rare.1;
        cells += 1;
    }
    let freedom = f64::from(cells - 1);
    println!("chi-square {statistic:.1} with {freedom} degrees of freedom; {rate:.3} of the drafts accepted");
    // Four standard deviations; the seeds are fixed, so it does not fail by chance.
    assert!(cells > 20 && statistic < freedom + 4.0 * (2.0 * freedom).sqrt());
}

/// Sampled text is the same with drafts and without, for every seed.
#[test]
fn sampled_tokens_do_not_depend_on_drafts() {
    let (golden, model) = golden_model("golden/v3-mtp-accept-tiny");
    for precision in [Precision::Exact, Precision::Fast] {
        let mut session = drafting(&model, 1, precision);
        let prompt = &golden.sequence("len7").ids;
        let mut accepted = 0;
        for seed_low in 0..12 {
            let settings = [
                Sampling { temperature: 0.7, seed_low, ..Sampling::default() },
                Sampling { temperature: 1.0, top_p: 0.8, repetition_penalty: 1.3, seed_low, ..Sampling::default() },
                Sampling { temperature: 1.5, top_k: 20, min_p: 0.02, seed_low, ..Sampling::default() },
            ];
            for sampling in settings {
                let (plain, _) = generate(&mut session, prompt, 40, 0, 8, 256, sampling);
                for (drafts, burst) in [(1, 5), (3, 2)] {
                    let (tokens, verified) = generate(&mut session, prompt, 40, drafts, burst, 4, sampling);
                    assert_eq!(tokens[..40], plain[..40], "seed {seed_low}, {sampling:?}, {drafts} drafts");
                    accepted += verified.iter().map(|pass| pass.1).sum::<u32>();
                }
            }
        }
        assert!(accepted > 50, "{accepted} drafts were accepted");
    }
}

/// A sequence may stop drafting and begin again, and may begin with latents that others computed.
#[test]
fn drafting_may_pause_and_go_on() {
    let (golden, model) = golden_model("golden/v3-mtp-accept-tiny");
    let mut session = drafting(&model, 2, Precision::Exact);
    let golden = golden.sequence("len7");
    let prompt = &golden.ids;
    let (expected, _) = generate(&mut session, prompt, 100, 0, 8, 256, Sampling::default());
    assert_eq!(expected[..golden.greedy.len()], golden.greedy);
    let run = |session: &mut Session, prompt: &[u32], adopt: Option<(&[u32], bool)>, pattern: &[(u32, usize)]| {
        let sequence = session.add_sequence(prompt, Sampling::default()).unwrap();
        if let Some((pages, drafted)) = adopt {
            let rest = prompt.len() - 1 - 64;
            session.adopt(sequence, &pages[..1], Some((pages[1], rest)), drafted).unwrap();
        }
        let (mut passes, mut offered, mut accepted) = (pattern.iter().cycle(), 0, 0);
        while session.tokens(sequence).unwrap().len() < prompt.len() + 50 {
            let &(drafts, count) = passes.next().unwrap();
            for _ in 0..count {
                let tokens = session.tokens(sequence).unwrap().len() - session.cached(sequence).unwrap();
                let stepped = session.step(&[Work { sequence, tokens, drafts, logprobs: false }], 1).unwrap().remove(0);
                offered += stepped.verified.iter().map(|pass| pass.0).sum::<u32>();
                accepted += stepped.verified.iter().map(|pass| pass.1).sum::<u32>();
            }
        }
        (session.tokens(sequence).unwrap()[prompt.len()..].to_vec(), sequence, f64::from(accepted) / f64::from(offered))
    };
    let (tokens, sequence, always) = run(&mut session, prompt, None, &[(1, 1)]);
    assert_eq!(tokens[..50], expected[..50]);
    assert!(session.is_drafted(sequence).unwrap());
    session.remove_sequence(sequence).unwrap();
    for pattern in [&[(1, 3), (0, 4)][..], &[(0, 5), (2, 3)], &[(3, 1), (0, 1)]] {
        let (tokens, sequence, rate) = run(&mut session, prompt, None, pattern);
        assert_eq!(tokens[..50], expected[..50], "{pattern:?}");
        assert!(!session.is_drafted(sequence).unwrap(), "{pattern:?} leaves a hole");
        println!("{pattern:?}: accepted {rate:.2}, without pauses {always:.2}");
        session.remove_sequence(sequence).unwrap();
    }
    // A text of 100 tokens, whose pages another one begins with.
    let long = [prompt, &expected[..93]].concat();
    for drafts in [1, 0] {
        let donor = session.add_sequence(&long, Sampling::default()).unwrap();
        session.step(&[Work { sequence: donor, tokens: 100, drafts, logprobs: false }], 1).unwrap();
        let pages = session.pages_of(donor).unwrap().to_vec();
        let drafted = session.is_drafted(donor).unwrap();
        assert_eq!(drafted, drafts > 0);
        let (plain, _) = generate(&mut session, &long, 50, 0, 8, 256, Sampling::default());
        let (tokens, sequence, rate) = run(&mut session, &long, Some((&pages, drafted)), &[(1, 1)]);
        assert_eq!(tokens[..50], plain[..50]);
        println!("begun with latents of a text that drafted ({drafted}): accepted {rate:.2}");
        session.remove_sequence(sequence).unwrap();
        session.remove_sequence(donor).unwrap();
        assert_eq!(session.pages().0, session.pages().1);
    }
}
