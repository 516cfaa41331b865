//! Masks, biases and log probabilities of a session's sequences: against the oracle's logits, with drafts and in bursts, and
//! without a trace of them in later sequences.

#[path = "common/golden.rs"]
mod common;

use common::{Golden, bundle, gpu, options, profile};
use moewe_oracle::model::Cache;
use moewe_oracle::prediction::logprobs;
use moewe_oracle::sampling::constrain;
use moewe_oracle::{ops, safetensors};
use moewe_plan::{LOGPROB_TOP, ProgramKind, Sampling};
use moewe_runtime::{Error, Model, SequenceId, Session, SessionOptions, TokenLogprobs, Work};

/// How far log probabilities may be from the oracle's: logits are off by some 1e-5.
const TOLERANCE: f64 = 1e-3;

/// A golden model in a session, with the oracle of the same checkpoint.
struct Setup {
    golden: Golden,
    session: Session,
    oracle: moewe_oracle::Model,
    vocab: usize,
    /// Drafts that were accepted so far.
    accepted: u32,
}

impl Setup {
    fn open(dir: &str, max_sequences: u32) -> Self {
        let golden = Golden::open(dir);
        let temp = tempfile::tempdir().unwrap();
        let bundle = bundle(&golden.dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
        let modules = bundle.plan.model.mtp_modules;
        let drafts = (1..=modules).map(|module| ProgramKind::Draft { module });
        let kinds: Vec<ProgramKind> = [ProgramKind::Forward].into_iter().chain(drafts).collect();
        let model = Model::load_for(&gpu(), &bundle, &kinds, &|_| ()).unwrap();
        let vocab = model.plan().model.vocab_size as usize;
        let options = SessionOptions { kinds, max_sequences, pages: Some(32), ..SessionOptions::default() };
        let session = Session::new(model, options).unwrap();
        let oracle = moewe_oracle::Model::load(&golden.dir).unwrap();
        Self { golden, session, oracle, vocab, accepted: 0 }
    }

    fn add(&mut self, prompt: &[u32], sampling: Sampling) -> SequenceId {
        self.session.add_sequence(prompt, sampling).unwrap()
    }

    /// Draws `count` tokens or more.
    fn draw(&mut self, sequence: SequenceId, count: usize, how: How) -> (Vec<u32>, Vec<TokenLogprobs>) {
        let (mut tokens, mut logs) = (Vec::new(), Vec::new());
        while tokens.len() < count {
            let pending = self.session.tokens(sequence).unwrap().len() - self.session.cached(sequence).unwrap();
            let work = Work { sequence, tokens: pending.min(how.chunk), drafts: how.drafts, logprobs: how.logprobs };
            let stepped = self.session.step(&[work], how.burst).unwrap().remove(0);
            assert!(!stepped.poisoned);
            assert_eq!(stepped.logprobs.len(), if how.logprobs { stepped.tokens.len() } else { 0 });
            self.accepted += stepped.verified.iter().map(|pass| pass.1).sum::<u32>();
            tokens.extend(stepped.tokens);
            logs.extend(stepped.logprobs);
        }
        (tokens, logs)
    }

    /// The oracle's logits behind each of these tokens.
    fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let output = self.oracle.forward(tokens, &mut Cache::default());
        output.logits.chunks(self.vocab).map(<[f64]>::to_vec).collect()
    }

    fn bits(&self, tokens: impl IntoIterator<Item = usize>) -> Vec<u32> {
        let mut mask = vec![0; self.vocab.div_ceil(32)];
        tokens.into_iter().for_each(|token| mask[token / 32] |= 1 << (token % 32));
        mask
    }
}

#[derive(Clone, Copy, Debug)]
struct How {
    drafts: u32,
    burst: u32,
    chunk: usize,
    logprobs: bool,
}

const PLAIN: How = How { drafts: 0, burst: 1, chunk: 256, logprobs: false };
const WAYS: [How; 4] = [
    How { drafts: 0, burst: 4, chunk: 256, logprobs: true },
    How { drafts: 1, burst: 1, chunk: 5, logprobs: true },
    How { drafts: 3, burst: 32, chunk: 64, logprobs: true },
    How { drafts: 7, burst: 3, chunk: 1, logprobs: true },
];

fn assert_logprobs(what: &str, told: &TokenLogprobs, logits: &[f64], drawn: u32) {
    let expected = logprobs(logits, LOGPROB_TOP as usize, Some(drawn as usize));
    let near = |found: f32, expected: f64| (f64::from(found) - expected).abs() < TOLERANCE;
    assert!(near(told.logprob, expected.drawn.unwrap()), "{what}: {} {:?}", told.logprob, expected.drawn);
    assert_eq!(told.top.len(), expected.top.len(), "{what}");
    let all = logprobs(logits, logits.len(), None).top;
    for (&(id, log), (_, expected)) in told.top.iter().zip(&expected.top) {
        // Tokens whose probabilities nearly agree may change places, but each has its own.
        let own = all.iter().find(|(token, _)| *token == id as usize).expect("a token of the vocabulary").1;
        assert!(near(log, *expected) && near(log, own), "{what}: {id} has {log}, {own} and {expected} expected");
    }
    let in_order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)).is_lt();
    assert!(told.top.is_sorted_by(in_order), "{what}: {:?}", told.top);
}

#[test]
fn log_probabilities_are_of_the_golden_logits() {
    for dir in ["golden/v3-mtp-accept-tiny", "golden/v2-lite-tiny"] {
        let mut setup = Setup::open(dir, 1);
        for name in ["len7", "len1"] {
            let Some(golden) = setup.golden.sequences.iter().find(|sequence| sequence.name == name) else { continue };
            let (prompt, greedy) = (golden.ids.clone(), golden.greedy.clone());
            let tensors = safetensors::read(&golden.file).unwrap();
            let tensor = tensors["logits"].to_tensor();
            let golden_logits = tensor.f64s()[(prompt.len() - 1) * setup.vocab..][..setup.vocab].to_vec();
            let logits = setup.logits(&[&prompt[..], &greedy].concat());
            for how in WAYS {
                let sequence = setup.add(&prompt, Sampling::default());
                let (tokens, logs) = setup.draw(sequence, greedy.len(), how);
                assert_eq!(tokens[..greedy.len()], greedy, "{dir} {name} {how:?}");
                assert_logprobs(&format!("{dir} {name}, golden"), &logs[0], &golden_logits, tokens[0]);
                for (i, (&token, told)) in greedy.iter().zip(&logs).enumerate() {
                    let what = format!("{dir} {name} {how:?} token {i}");
                    assert_logprobs(&what, told, &logits[prompt.len() - 1 + i], token);
                    assert_eq!(told.top[0], (token, told.logprob), "{what}: greedy");
                }
                setup.session.remove_sequence(sequence).unwrap();
            }
        }
        let drafts = setup.session.model().plan().model.mtp_modules > 0;
        assert_eq!(setup.accepted > 20, drafts, "{dir}: {} drafts were accepted", setup.accepted);
    }
}

/// Neither bias, mask, penalty nor temperature shows in log probabilities, and only those who ask are told.
#[test]
fn log_probabilities_are_of_the_logits_as_the_model_made_them() {
    let mut setup = Setup::open("golden/v3-mtp-accept-tiny", 3);
    let prompt = setup.golden.sequence("len7").ids.clone();
    let hot =
        |seed_low| Sampling { temperature: 1.4, top_k: 50, repetition_penalty: 1.5, seed_low, ..Sampling::default() };
    let asks = setup.add(&prompt, hot(1));
    let silent = setup.add(&prompt, hot(2));
    let reads = setup.add(&[&prompt[..], &prompt].concat(), Sampling::default());
    let odd: Vec<usize> = (0..setup.vocab).filter(|token| token % 2 == 1).collect();
    let bias: Vec<(u32, f32)> = (0..setup.vocab as u32).map(|token| (token, (token % 7) as f32)).collect();
    let mask = setup.bits(odd);
    setup.session.set_mask(asks, Some(&mask)).unwrap();
    setup.session.set_bias(asks, &bias).unwrap();
    let work = |sequence, tokens, drafts, logprobs| Work { sequence, tokens, drafts, logprobs };
    let mut logs = Vec::new();
    for round in 0..9 {
        // One has its prompt run beside the others, in two parts, and draws behind it without being asked to.
        let part = match round {
            0 => 5,
            1 => 9,
            _ => 1,
        };
        let own = if round == 0 { prompt.len() } else { 1 };
        let drafts = round % 3;
        let list = [work(silent, own, drafts, false), work(asks, own, drafts, true), work(reads, part, 0, round == 1)];
        let stepped = setup.session.step(&list, 2).unwrap();
        assert!(stepped[0].logprobs.is_empty() && !stepped[0].tokens.is_empty());
        assert_eq!(stepped[1].logprobs.len(), stepped[1].tokens.len());
        assert_eq!(stepped[2].logprobs.len(), usize::from(round == 1));
        if round == 1 {
            let logits = setup.logits(&[&prompt[..], &prompt].concat()).pop().unwrap();
            assert_logprobs("behind a part of a prompt", &stepped[2].logprobs[0], &logits, stepped[2].tokens[0]);
        }
        logs.extend(stepped[1].logprobs.clone());
    }
    let tokens = setup.session.tokens(asks).unwrap().to_vec();
    let logits = setup.logits(&tokens);
    for (i, told) in logs.iter().enumerate() {
        let drawn = tokens[prompt.len() + i];
        assert_eq!(drawn % 2, 1, "outside the mask");
        assert_logprobs(&format!("token {i}"), told, &logits[prompt.len() - 1 + i], drawn);
    }
    assert!(logs.len() >= 9);
    assert!(logs.iter().any(|told| told.logprob < told.top[0].1), "bias and temperature changed no token");
}

#[test]
fn a_mask_of_one_token_forces_it() {
    let mut setup = Setup::open("golden/v3-mtp-accept-tiny", 2);
    let golden = setup.golden.sequence("len7");
    let (prompt, greedy) = (golden.ids.clone(), golden.greedy.clone());
    let last = setup.vocab - 1;
    for sampling in [Sampling::default(), Sampling { temperature: 1.0, top_p: 0.5, min_p: 0.3, ..Sampling::default() }]
    {
        for (token, how) in [(0, PLAIN), (last, WAYS[0]), (33, WAYS[1]), (last, WAYS[2])] {
            let sequence = setup.add(&prompt, sampling);
            let beside = setup.add(&prompt, Sampling::default());
            let mask = setup.bits([token]);
            setup.session.set_mask(sequence, Some(&mask)).unwrap();
            let (tokens, _) = setup.draw(sequence, 10, how);
            assert!(tokens.iter().all(|&drawn| drawn as usize == token), "{token}: {tokens:?}");
            let (tokens, _) = setup.draw(beside, 10, how);
            assert_eq!(tokens[..10], greedy[..10], "a mask of another sequence");
            // Another mask, then none.
            let mask = setup.bits([5]);
            setup.session.set_mask(sequence, Some(&mask)).unwrap();
            let from = setup.session.tokens(sequence).unwrap().len();
            setup.draw(sequence, 3, how);
            assert!(setup.session.tokens(sequence).unwrap()[from..].iter().all(|&drawn| drawn == 5));
            setup.session.set_mask(sequence, None).unwrap();
            let text = setup.session.tokens(sequence).unwrap().to_vec();
            let (free, _) = setup.draw(sequence, 8, how);
            let other = setup.session.add_sequence(&text, sampling);
            assert!(matches!(other, Err(Error::OutOfSequences { .. })));
            setup.session.remove_sequence(beside).unwrap();
            let unmasked = setup.add(&text, sampling);
            assert_eq!(setup.draw(unmasked, 8, PLAIN).0[..8], free[..8], "a mask that is gone");
            for sequence in [sequence, unmasked] {
                setup.session.remove_sequence(sequence).unwrap();
            }
        }
    }
}

/// Greedy tokens under masks and biases that change with every token, as the host computes them from the oracle's logits.
#[test]
fn what_is_drawn_is_the_largest_that_the_host_computes() {
    let mut setup = Setup::open("golden/v3-mtp-accept-tiny", 1);
    let prompt = setup.golden.sequence("len7").ids.clone();
    let sequence = setup.add(&prompt, Sampling::default());
    let (mut tokens, mut cache) = (prompt.clone(), Cache::default());
    let mut bias: Vec<(usize, f64)> = Vec::new();
    let (mut behind, mut moved, mut close) = (prompt, 0, 0);
    for round in 0..40usize {
        let output = setup.oracle.forward(&behind, &mut cache);
        let logits = &output.logits[output.logits.len() - setup.vocab..];
        let best = ops::argmax(logits);
        // What was best is made less likely, others more; some entries are changed again later.
        let entries = [(best as u32, -0.75), ((round * 37 % setup.vocab) as u32, 0.5 + round as f32 * 0.25)];
        setup.session.set_bias(sequence, &entries).unwrap();
        for (token, number) in entries {
            bias.retain(|(other, _)| *other != token as usize);
            bias.push((token as usize, number.into()));
        }
        let allowed: Option<Vec<usize>> =
            (round % 3 > 0).then(|| (0..setup.vocab).filter(|token| !(token + round).is_multiple_of(3)).collect());
        let mask = allowed.as_ref().map(|allowed| setup.bits(allowed.iter().copied()));
        setup.session.set_mask(sequence, mask.as_deref()).unwrap();
        let limited = constrain(logits, allowed.as_deref(), &bias);
        let expected = ops::argmax(&limited);
        let (drawn, _) = setup.draw(sequence, 1, PLAIN);
        let lead = limited[expected] - limited[drawn[0] as usize];
        assert!(lead < 1e-4, "round {round}: {} instead of {expected}, by {lead}", drawn[0]);
        close += usize::from(drawn[0] as usize != expected);
        moved += usize::from(expected != best);
        behind = drawn;
        tokens.extend(&behind);
    }
    assert!(moved > 10 && close < 2, "{moved} moved, {close} close calls");
    assert_eq!(setup.session.tokens(sequence).unwrap(), tokens);
}

/// With a bias that stays, drafts and bursts change no token, and a draft is drawn under the bias, too.
#[test]
fn drafts_and_bursts_change_no_biased_text() {
    let mut setup = Setup::open("golden/v3-mtp-accept-tiny", 1);
    let prompt = setup.golden.sequence("len7").ids.clone();
    let bias: Vec<(u32, f32)> = (0..setup.vocab as u32).map(|token| (token, (token * 13 % 11) as f32 * 1.5)).collect();
    let mut text = |sampling, biased: bool, how| {
        let sequence = setup.add(&prompt, sampling);
        if biased {
            setup.session.set_bias(sequence, &bias).unwrap();
        }
        let (tokens, _) = setup.draw(sequence, 40, how);
        setup.session.remove_sequence(sequence).unwrap();
        tokens[..40].to_vec()
    };
    for sampling in [Sampling::default(), Sampling { temperature: 0.9, top_p: 0.9, ..Sampling::default() }] {
        let plain = text(sampling, true, PLAIN);
        for how in WAYS {
            assert_eq!(text(sampling, true, how), plain, "{how:?}");
        }
        assert_ne!(text(sampling, false, PLAIN), plain, "the bias changes nothing");
    }
    assert!(setup.accepted > 10, "{} drafts were accepted", setup.accepted);
}

/// Slots are used again: nothing of a sequence's mask and bias is left for the next one.
#[test]
fn nothing_is_inherited() {
    let mut setup = Setup::open("golden/v3-mtp-accept-tiny", 1);
    let golden = setup.golden.sequence("len7");
    let (prompt, greedy) = (golden.ids.clone(), golden.greedy.clone());
    let count = greedy.len().min(12);
    let mask = setup.bits([3]);
    for used in [true, false] {
        let first = setup.add(&prompt, Sampling::default());
        setup.session.set_bias(first, &[(7, 100.0), (9, 50.0)]).unwrap();
        if used {
            assert_eq!(setup.draw(first, 4, PLAIN).0, [7; 4]);
            setup.session.set_bias(first, &[(7, -100.0)]).unwrap();
            assert_eq!(setup.draw(first, 2, PLAIN).0, [9; 2]);
            setup.session.set_mask(first, Some(&mask)).unwrap();
            assert_eq!(setup.draw(first, 2, PLAIN).0, [3; 2]);
        } else {
            setup.session.set_mask(first, Some(&mask)).unwrap();
        }
        setup.session.remove_sequence(first).unwrap();
        let second = setup.add(&prompt, Sampling::default());
        assert_eq!(setup.draw(second, count, PLAIN).0[..count], greedy[..count], "flags stay");
        setup.session.remove_sequence(second).unwrap();
        let third = setup.add(&prompt, Sampling::default());
        setup.session.set_bias(third, &[(5, 0.0)]).unwrap();
        assert_eq!(setup.draw(third, count, PLAIN).0[..count], greedy[..count], "numbers of the bias stay");
        setup.session.remove_sequence(third).unwrap();
    }
}

/// Single runs, prompts in chunks and bursts without steps know masks and biases, too.
#[test]
fn prefill_and_decode_are_limited_alike() {
    let mut setup = Setup::open("golden/v3-mtp-accept-tiny", 1);
    let prompt = setup.golden.sequence("len7").ids.clone();
    let mask = setup.bits((0..setup.vocab).filter(|token| token % 5 == 2));
    let mut text = |by_steps: bool| {
        let sequence = setup.add(&prompt, Sampling { temperature: 0.8, ..Sampling::default() });
        setup.session.set_mask(sequence, Some(&mask)).unwrap();
        setup.session.set_bias(sequence, &[(2, 3.0), (7, -3.0), (12, 1.5)]).unwrap();
        if by_steps {
            setup.draw(sequence, 20, PLAIN);
        } else {
            setup.session.prefill(&[sequence], Some(4)).unwrap();
            setup.session.decode(&[sequence], 10).unwrap();
            setup.session.decode(&[sequence], 9).unwrap();
        }
        let tokens = setup.session.tokens(sequence).unwrap()[prompt.len()..].to_vec();
        setup.session.remove_sequence(sequence).unwrap();
        tokens
    };
    let tokens = text(true);
    assert_eq!(text(false), tokens);
    assert!(tokens.len() == 20 && tokens.iter().all(|token| token % 5 == 2), "{tokens:?}");
}

#[test]
fn nonsense_is_refused_and_changes_nothing() {
    let mut setup = Setup::open("golden/v3-mtp-accept-tiny", 1);
    let golden = setup.golden.sequence("len7");
    let (prompt, greedy) = (golden.ids.clone(), golden.greedy.clone());
    let (vocab, words) = (setup.vocab as u32, setup.vocab.div_ceil(32));
    let gone = setup.add(&prompt, Sampling::default());
    setup.session.remove_sequence(gone).unwrap();
    let sequence = setup.add(&prompt, Sampling::default());
    let session = &mut setup.session;
    for mask in [vec![], vec![0; words], vec![1; words + 1], vec![1; words - 1]] {
        let error = session.set_mask(sequence, Some(&mask)).unwrap_err();
        assert!(matches!(error, Error::Mask { .. }), "{error}");
    }
    for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = session.set_bias(sequence, &[(1, 100.0), (2, number)]).unwrap_err();
        assert!(matches!(error, Error::Bias { .. }), "{error}");
    }
    for token in [vocab, u32::MAX] {
        let error = session.set_bias(sequence, &[(1, 100.0), (token, 1.0)]).unwrap_err();
        assert!(matches!(error, Error::Bias { .. }), "{error}");
    }
    assert!(matches!(session.set_mask(gone, None), Err(Error::UnknownSequence { .. })));
    assert!(matches!(session.set_bias(gone, &[(1, 1.0)]), Err(Error::UnknownSequence { .. })));
    // Bits that callers set by themselves are not theirs to set.
    session.set_sampling(sequence, Sampling { constraints: u32::MAX, ..Sampling::default() }).unwrap();
    assert_eq!(setup.draw(sequence, 8, PLAIN).0[..8], greedy[..8]);
}
