//! `moewe eval`: the mathematics against numbers made by hand and the oracle, perplexity against PyTorch
//! (`tests/data/perplexity/reference.py`), both measures against traces and golden files, and what is refused.

#[path = "common/cli.rs"]
mod cli;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cli::{copy, demo, edit_json, finish, golden, interrupt, moewe, read_json, root, tiny_bundle};
use moewe::eval::{Comparison, Distribution, Error, Likelihood, Part, Sample, Window, windows};
use moewe_oracle::prediction::predict;
use moewe_oracle::safetensors;
use serde_json::{Value, json};

// ---- windows

/// Each predicted token, with the tokens that its window shows before it.
fn predictions(tokens: usize, context: usize, stride: usize) -> Vec<(usize, usize)> {
    let cut = windows(tokens, context, stride).unwrap();
    let of = |window: &Window| {
        assert!(window.tokens.len() <= context && window.tokens.end <= tokens);
        (window.first_predicted..window.tokens.end)
            .map(|token| (token, token - window.tokens.start))
            .collect::<Vec<_>>()
    };
    cut.iter().flat_map(of).collect()
}

#[test]
fn windows_count_every_token_once() {
    let cut = |tokens, context, stride| -> Vec<(usize, usize, usize)> {
        let cut = windows(tokens, context, stride).unwrap();
        cut.into_iter().map(|w| (w.tokens.start, w.tokens.end, w.first_predicted)).collect()
    };
    assert_eq!(cut(10, 4, 4), [(0, 4, 1), (4, 8, 5), (8, 10, 9)]);
    assert_eq!(cut(9, 4, 4), [(0, 4, 1), (4, 8, 5)]); // a token alone is not predicted
    assert_eq!(cut(10, 4, 3), [(0, 4, 1), (3, 7, 4), (6, 10, 7)]);
    assert_eq!(cut(10, 4, 1).len(), 7);
    assert_eq!(cut(10, 100, 100), [(0, 10, 1)]);
    assert_eq!(cut(2, 2, 1), [(0, 2, 1)]);
    for (tokens, context) in [(2, 2), (7, 3), (64, 10), (65, 64), (100, 7)] {
        for stride in 1..context {
            let all = predictions(tokens, context, stride);
            assert!(all.iter().map(|(token, _)| *token).eq(1..tokens), "{tokens} {context} {stride}");
            // Behind the first window each token sees at least what does not move on.
            let late = all.iter().filter(|(token, _)| *token >= context);
            assert!(late.clone().all(|(_, seen)| *seen >= context - stride), "{tokens} {context} {stride}");
        }
        let disjoint = predictions(tokens, context, context);
        assert!(disjoint.iter().map(|(token, _)| *token).eq((0..tokens).filter(|token| token % context != 0)));
    }
    assert_eq!(windows(1, 4, 4), Err(Error::TooShort { tokens: 1 }));
    assert_eq!(windows(9, 1, 1), Err(Error::Context { context: 1 }));
    assert_eq!(windows(9, 4, 0), Err(Error::Stride { stride: 0, context: 4 }));
    assert_eq!(windows(9, 4, 5), Err(Error::Stride { stride: 5, context: 4 }));
    assert_eq!(windows(9, usize::MAX, usize::MAX).unwrap().len(), 1);
}

#[test]
fn parts_run_all_but_the_last_token() {
    let window = Window { tokens: 10..20, first_predicted: 17 };
    let part = |tokens, rows| Part { window: 10..20, tokens, rows };
    assert_eq!(window.parts(4), [part(10..14, 14..14), part(14..18, 16..18), part(18..19, 18..19)]);
    assert_eq!(window.parts(100), [part(10..19, 16..19)]);
    assert_eq!(window.parts(0), window.parts(1));
    for chunk in 1..12 {
        let parts = window.parts(chunk);
        assert!(parts.iter().flat_map(|part| part.tokens.clone()).eq(10..19));
        assert!(parts.iter().flat_map(|part| part.rows.clone()).eq(16..19));
        assert!(parts.iter().all(|part| part.tokens.len() <= chunk));
    }
}

// ---- mathematics

/// Logits with these probabilities, moved by something that a softmax does not see.
fn logits(probabilities: &[f32], shift: f32) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() + shift).collect()
}

fn near(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected.abs().max(1e-30), "{found} is not {expected}");
}

#[test]
fn distributions_are_softmax() {
    let row = logits(&[0.125, 0.5, 0.25, 0.125], 3.0);
    let known = Distribution::new(&row).unwrap();
    near(known.log_probability(1).exp(), 0.5, 1e-6);
    near(known.log_probability(0), 0.125_f64.ln(), 1e-6);
    assert_eq!((known.top(), known.log_probability(4)), (1, f64::NEG_INFINITY));
    // Ties go to the first; one token is certain.
    assert_eq!(Distribution::new(&[1.0, 7.0, 7.0]).unwrap().top(), 1);
    assert_eq!(Distribution::new(&[-9.0]).unwrap().log_probability(0).to_bits(), 0.0_f64.to_bits());
    // Far apart, far out, and many.
    let many: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 1013) as f32 * 0.05 - 20.0).collect();
    for row in [vec![3e4, -3e4, 2.9e4], vec![f32::MAX, f32::MIN, 0.0], vec![-1e4; 3], many] {
        let found = Distribution::new(&row).unwrap();
        let wide: Vec<f64> = row.iter().map(|&logit| f64::from(logit)).collect();
        for token in [0, 1, 2, row.len() - 1] {
            let (expected, _) = predict(&wide, 1, Some(token)).asked.unwrap();
            assert!((found.log_probability(token) - expected).abs() <= 1e-9 * expected.abs() + 1e-10, "{token}");
        }
        assert_eq!(found.top(), predict(&wide, 1, None).ids[0]);
        assert_eq!(found.divergence(&found).unwrap().to_bits(), 0.0_f64.to_bits());
    }
}

#[test]
fn divergence_has_a_direction() {
    let (p, q) = (logits(&[0.5, 0.5], -4.0), logits(&[0.25, 0.75], 90.0));
    let (p, q) = (Distribution::new(&p).unwrap(), Distribution::new(&q).unwrap());
    // KL(P ‖ Q) = ½ ln 2 + ½ ln ⅔; KL(Q ‖ P) = ¼ ln ½ + ¾ ln 3/2.
    near(p.divergence(&q).unwrap(), 0.5 * 2.0_f64.ln() + 0.5 * (2.0_f64 / 3.0).ln(), 1e-5);
    near(q.divergence(&p).unwrap(), 0.25 * 0.5_f64.ln() + 0.75 * 1.5_f64.ln(), 1e-5);
    // A constant moves nothing; what P rules out costs nothing, what Q nearly rules out costs a lot.
    let moved = logits(&[0.5, 0.5], 4.0);
    let again = p.divergence(&Distribution::new(&moved).unwrap()).unwrap();
    assert!((0.0..1e-12).contains(&again), "{again:e}");
    let (sure, other) = ([0.0, -1e4], [-1e4, 0.0]);
    let (sure, other) = (Distribution::new(&sure).unwrap(), Distribution::new(&other).unwrap());
    near(sure.divergence(&other).unwrap(), 1e4, 1e-12);
    let three = [0.0; 3];
    let three = Distribution::new(&three).unwrap();
    assert_eq!(p.divergence(&three), Err(Error::Vocabulary { found: 3, expected: 2 }));
}

#[test]
fn broken_logits_are_refused() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = Distribution::new(&[0.0, 1.0, value, 2.0]).unwrap_err().to_string();
        assert_eq!(error, format!("the logit of token 2 is {value}, expected a finite number"));
    }
    assert_eq!(Distribution::new(&[]).unwrap_err(), Error::Vocabulary { found: 0, expected: 1 });
}

#[test]
fn samples_have_means_and_quantiles() {
    let sample = |numbers: &[f64]| {
        let mut sample = Sample::default();
        for &number in numbers {
            sample.push(number);
        }
        sample
    };
    let four = sample(&[4.0, 1.0, 3.0, 2.0]);
    near(four.mean(), 2.5, 1e-15);
    near(four.standard_error(), (5.0_f64 / 3.0 / 4.0).sqrt(), 1e-15);
    for (share, expected) in [(0.0, 1.0), (0.5, 2.5), (0.25, 1.75), (1.0, 4.0), (9.0, 4.0)] {
        near(four.quantile(share), expected, 1e-15);
    }
    near(sample(&(0..=1000).map(f64::from).collect::<Vec<_>>()).quantile(0.999), 999.0, 1e-12);
    let (none, one) = (sample(&[]), sample(&[7.0]));
    assert!(none.is_empty() && none.mean().is_nan() && none.quantile(0.5).is_nan());
    assert!(one.standard_error().is_nan());
    near(one.quantile(0.999), 7.0, 1e-15);
}

#[test]
fn perplexity_and_comparison_of_rows_made_by_hand() {
    let (a, b) = (logits(&[0.5, 0.25, 0.25], 0.0), logits(&[0.125, 0.125, 0.75], 0.0));
    let (a, b) = (Distribution::new(&a).unwrap(), Distribution::new(&b).unwrap());
    let mut likelihood = Likelihood::default();
    likelihood.add(&a, 0); // ½, the likeliest
    likelihood.add(&b, 0); // ⅛
    near(likelihood.perplexity(), 4.0, 1e-6); // √(2 · 8)
    near(likelihood.accuracy(), 0.5, 1e-15);
    let mut comparison = Comparison::default();
    comparison.add(&a, &b, 0).unwrap();
    comparison.add(&a, &a, 1).unwrap();
    near(comparison.divergence.quantile(1.0), a.divergence(&b).unwrap(), 1e-15);
    near(comparison.divergence.mean(), a.divergence(&b).unwrap() / 2.0, 1e-15);
    near(comparison.shift.quantile(1.0), 0.375, 1e-6); // ½ became ⅛
    near(comparison.agreement(), 0.5, 1e-15);
    near(comparison.reference.perplexity(), 8.0_f64.sqrt(), 1e-6); // √(2 · 4)
    near(comparison.model.perplexity(), 32.0_f64.sqrt(), 1e-6); // √(8 · 4)
}

// ---- perplexity

fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/perplexity/text.txt")
}

/// PyTorch's figures for a context and stride.
fn reference(context: u64, stride: u64) -> Value {
    let all = read_json(&text().with_file_name("reference.json"));
    let runs = all["runs"].as_array().unwrap();
    let mut found = runs.iter().find(|run| run["context"] == context && run["stride"] == stride).unwrap().clone();
    found["tokens"] = all["tokens"].clone();
    found["bytes"] = all["bytes"].clone();
    found
}

/// The demo model's perplexity is PyTorch's, to 4 significant digits and further.
fn agrees_with_pytorch(context: u64, stride: u64, options: &[&str]) {
    let mut args = vec!["eval".into(), "perplexity".into(), demo().into(), text().into(), "--json".into()];
    args.extend(options.iter().map(Into::into));
    let said = cli::Call::new(args).json();
    let expected = reference(context, stride);
    assert_eq!((&said["context"], &said["stride"]), (&json!(context), &json!(stride)));
    let float64 = &expected["float64"];
    for field in ["windows", "predicted_tokens"] {
        assert_eq!(said[field], float64[field], "{field}");
    }
    assert_eq!(said["tokens"], expected["tokens"]);
    let number = |value: &Value| value.as_f64().unwrap();
    for field in ["perplexity", "nats_per_token"] {
        let (found, wanted) = (number(&said[field]), number(&float64[field]));
        println!("{context}/{stride} {field}: {found}, PyTorch {wanted}, relative {:.1e}", found / wanted - 1.0);
        near(found, wanted, 1e-5);
    }
    // Rounding may turn a near tie.
    assert!((number(&said["top1_accuracy"]) - number(&float64["top1_accuracy"])).abs() < 0.0015);
    let text_tokens = number(&said["tokens"]) - 1.0; // without the begin token
    let bits = number(&float64["nats_per_token"]) / 2.0_f64.ln() * text_tokens / number(&expected["bytes"]);
    near(number(&said["bits_per_byte"]), bits, 1e-5);
}

#[test]
fn one_window_as_in_pytorch() {
    agrees_with_pytorch(2048, 2048, &[]);
}

#[test]
fn several_windows_as_in_pytorch() {
    agrees_with_pytorch(256, 256, &["--context", "256", "--prefill-chunk", "100"]);
}

#[test]
fn overlapping_windows_as_in_pytorch() {
    agrees_with_pytorch(256, 96, &["--context", "256", "--stride", "96"]);
}

/// A golden sequence of v3-tiny as a file of ids, and its tensors.
fn ids(name: &str) -> (PathBuf, Vec<usize>, PathBuf) {
    let dir = golden("v3-tiny").join("golden");
    let sequence = &read_json(&dir.join("golden.json"))["sequences"][name];
    let file = root().join(format!("{name}-{:?}.json", std::thread::current().id()));
    fs::write(&file, sequence["input_ids"].to_string()).unwrap();
    let ids = sequence["input_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as usize);
    (file, ids.collect(), dir.join(sequence["file"].as_str().unwrap()))
}

/// Rows of the tensor `logits`.
fn rows(file: &Path) -> Vec<Vec<f64>> {
    let tensor = &safetensors::read(file).unwrap()["logits"];
    tensor.to_f64().chunks(tensor.shape[1]).map(<[f64]>::to_vec).collect()
}

#[test]
fn golden_logits_give_the_same_perplexity() {
    for name in ["len7", "len64", "long"] {
        let (file, ids, tensors) = ids(name);
        let nats: Vec<f64> = rows(&tensors)
            .iter()
            .zip(&ids[1..])
            .map(|(row, &next)| -predict(row, 1, Some(next)).asked.unwrap().0)
            .collect();
        let mean = nats.iter().sum::<f64>() / nats.len() as f64;
        for model in [golden("v3-tiny"), tiny_bundle().to_owned()] {
            let said = moewe!["eval", "perplexity", &model, &file, "--json", "--prefill-chunk", "9"].json();
            assert_eq!(said["predicted_tokens"], nats.len());
            assert_eq!((&said["windows"], &said["bits_per_byte"]), (&json!(1), &json!(null)));
            near(said["nats_per_token"].as_f64().unwrap(), mean, 1e-5);
            near(said["perplexity"].as_f64().unwrap(), mean.exp(), 1e-5);
        }
    }
}

#[test]
fn perplexity_prints_what_scripts_need() {
    let (file, ids, _) = ids("len64");
    let said = moewe!["eval", "perplexity", tiny_bundle(), &file, "--context", "20", "--stride", "10", "--json"].json();
    let keys: Vec<&String> = said.as_object().unwrap().keys().collect();
    let expected = [
        "model",
        "precision",
        "complete",
        "tokens",
        "predicted_tokens",
        "windows",
        "context",
        "stride",
        "seconds",
        "tokens_per_second",
        "nats_per_token",
        "nats_standard_error",
        "perplexity",
        "bits_per_byte",
        "top1_accuracy",
    ];
    assert_eq!(keys, expected);
    assert_eq!((&said["complete"], &said["precision"]), (&json!(true), &json!("exact")));
    assert_eq!((&said["tokens"], &said["windows"]), (&json!(ids.len()), &json!(6)));
    assert!(said["tokens_per_second"].as_f64().unwrap() > 0.0 && said["nats_standard_error"].as_f64().unwrap() > 0.0);
    let printed = moewe!["eval", "perplexity", tiny_bundle(), &file].ok();
    assert_eq!(printed.stderr, "");
    for word in ["tokens         64, 63 predicted", "nats/token", "perplexity", "top-1 accuracy", "tokens/s"] {
        assert!(printed.stdout.contains(word), "{word}: {}", printed.stdout);
    }
    assert!(!printed.stdout.contains("bits/byte"));
    assert!(moewe!["eval", "perplexity", "--device", "list"].ok().stdout.contains("0  "));
}

#[test]
fn an_interrupted_measurement_says_so() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("long.txt");
    fs::write(&file, fs::read_to_string(text()).unwrap().repeat(300)).unwrap();
    moewe!["run", demo(), "--tokens", "1", "-n", "1"].ok(); // compiles it
    let child = moewe!["eval", "perplexity", demo(), &file, "--context", "16", "--json"].spawn();
    std::thread::sleep(Duration::from_secs(8));
    interrupt(&child);
    let said = finish(child);
    assert_eq!((said.code, said.stderr.as_str()), (Some(130), ""), "{said:?}");
    if !said.stdout.is_empty() {
        let said: Value = serde_json::from_str(&said.stdout).unwrap();
        assert_eq!(said["complete"], false);
        let count = |field: &str| said[field].as_u64().unwrap();
        assert!(count("predicted_tokens") > 0 && count("predicted_tokens") < count("tokens") / 2, "{said}");
        assert!(said["perplexity"].as_f64().unwrap() > 1.0);
    }
}

// ---- kl

#[test]
fn a_model_does_not_differ_from_itself() {
    let (file, _, _) = ids("len64");
    let said = moewe!["eval", "kl", tiny_bundle(), &file, "--against", golden("v3-tiny"), "--json"].json();
    for field in ["mean", "standard_error", "median", "p99_9", "max"] {
        assert_eq!(said["kl"][field], 0.0, "{field}: {said}");
    }
    assert_eq!((&said["top1_agreement"], &said["mean_abs_delta_p"]), (&json!(1.0), &json!(0.0)));
    assert_eq!(said["perplexity"]["model"], said["perplexity"]["against"]);
    let alone = moewe!["eval", "perplexity", tiny_bundle(), &file, "--json"].json();
    assert_eq!(said["perplexity"]["model"], alone["perplexity"]);
}

/// What the demo of FP8 stands on: its weights are the demo model's own, and cost next to nothing.
#[test]
fn the_demo_model_in_fp8_is_close_to_the_one_in_bf16() {
    let said = moewe![
        "eval",
        "kl",
        demo().with_file_name("demo-fp8"),
        text(),
        "--against",
        demo(),
        "--context",
        "256",
        "--json"
    ];
    let said = said.json();
    let (mean, agreement) = (&said["kl"]["mean"], &said["top1_agreement"]);
    println!("KL {mean} nats, top-1 agreement {agreement}");
    assert!((1e-5..=0.01).contains(&mean.as_f64().unwrap()), "{mean}");
}

#[test]
fn divergence_is_that_of_the_traces() {
    let (file, ids, _) = ids("long");
    let list: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let other = root().join("v3-tiny-f16.moewe");
    moewe!["compile", golden("v3-tiny"), "-o", &other, "--target", "lavapipe", "--weights", "f16"].ok();
    for (model, precision, against) in [(tiny_bundle(), "fast", tiny_bundle()), (&other, "exact", tiny_bundle())] {
        let mut said =
            moewe!["eval", "kl", model, &file, "--against", against, "--precision", precision, "--json"].json();
        if model == against {
            // The same model in another precision needs no --against.
            let brief = moewe!["eval", "kl", model, &file, "--precision", precision, "--json"].json();
            assert_eq!(brief["kl"], said["kl"]);
            said = brief;
        }
        let trace = |model: &Path, precision: &str| {
            let out = root().join("kl.safetensors");
            let tokens = list.join(",");
            moewe!["trace", model, "--tokens", tokens, "--precision", precision, "--taps", "logits", "-o", &out].ok();
            rows(&out)
        };
        let (p, q) = (trace(against, "exact"), trace(model, precision));
        let softmax = |row: &[f64]| moewe_oracle::ops::softmax(row);
        let best = |row: &[f64]| predict(row, 1, None).ids[0];
        let mut all = Vec::new();
        let (mut shift, mut agreed) = (0.0, 0);
        for (p, q) in p.iter().zip(&q).take(ids.len() - 1) {
            let top = best(p);
            agreed += usize::from(top == best(q));
            let (p, q) = (softmax(p), softmax(q));
            all.push(p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>());
            shift += (p[top] - q[top]).abs();
        }
        let count = all.len() as f64;
        let kl = |field: &str| said["kl"][field].as_f64().unwrap();
        let mean = all.iter().sum::<f64>() / count;
        assert!(mean > 0.0);
        near(kl("mean"), mean, 1e-6);
        near(kl("max"), all.iter().copied().fold(0.0, f64::max), 1e-6);
        let squares: f64 = all.iter().map(|x| (x - mean).powi(2)).sum();
        near(kl("standard_error"), (squares / (count - 1.0) / count).sqrt(), 1e-6);
        near(said["mean_abs_delta_p"].as_f64().unwrap(), shift / count, 1e-6);
        near(said["top1_agreement"].as_f64().unwrap(), agreed as f64 / count, 1e-12);
        assert!(kl("median") <= kl("p99_9") && kl("p99_9") <= kl("max"));
        assert_eq!(said["against_precision"], "exact");
    }
    let printed = moewe!["eval", "kl", &other, &file, "--against", tiny_bundle()].ok().stdout;
    assert!(printed.starts_with(&format!("KL(P || Q), P {}", tiny_bundle().display())), "{printed}");
    for word in ["mean", "median", "99.9 %", "maximum", "same top token", "mean |Δp|", "perplexity     P"] {
        assert!(printed.contains(word), "{word}: {printed}");
    }
}

// ---- what is refused

#[test]
fn files_that_are_no_text() {
    let temp = tempfile::tempdir().unwrap();
    let file = |name: &str, contents: &[u8]| {
        fs::write(temp.path().join(name), contents).unwrap();
        temp.path().join(name)
    };
    let refused = |file: &Path, code: i32, words: &[&str]| {
        moewe!["eval", "perplexity", tiny_bundle(), file].refused(code, words);
    };
    refused(Path::new("/nowhere/text"), 2, &["/nowhere/text", "no such file"]);
    refused(temp.path(), 2, &["no regular file"]);
    refused(&file("empty.txt", b""), 2, &["empty.txt is empty"]);
    refused(&file("blank.json", b" \n"), 2, &["is empty"]);
    refused(&file("latin1.txt", b"caf\xe9 au lait"), 1, &["is not UTF-8 text", "offset 3"]);
    refused(&file("text.json", b"hello"), 1, &["JSON array of token ids"]);
    refused(&file("object.json", b"{\"a\":1}"), 1, &["JSON array of token ids"]);
    refused(&file("minus.json", b"[1,-2]"), 1, &["JSON array of token ids"]);
    refused(&file("large.json", b"[1,2,320]"), 1, &["token 2 of FILE is 320", "vocabulary of 320"]);
    refused(&file("none.json", b"[]"), 2, &["0 tokens, expected 2 or more"]);
    refused(&file("one.json", b"[1]"), 2, &["1 tokens, expected 2 or more"]);
    refused(&file("text.txt", b"The king"), 2, &["no tokenizer.json", ".json"]);
    moewe!["eval", "perplexity", tiny_bundle()].refused(2, &["FILE"]);
    moewe!["eval", "perplexity"].refused(2, &["MODEL"]);
    moewe!["eval", "perplexity", "/nowhere", file("two.json", b"[1,2]")].refused(2, &["/nowhere"]);
}

#[test]
fn windows_that_do_not_fit() {
    let (file, _, _) = ids("len64");
    let config = read_json(&golden("v3-tiny").join("config.json"));
    let most = config["max_position_embeddings"].as_u64().unwrap();
    let refused = |options: [&str; 4], words: &[&str]| {
        let options = options.iter().filter(|option| !option.is_empty());
        let mut args = vec!["eval".into(), "perplexity".into(), tiny_bundle().into(), file.clone().into()];
        args.extend(options.map(Into::into));
        cli::Call::new(args).refused(2, words);
    };
    let (above, fits) = ((most + 1).to_string(), most.to_string());
    refused(["--context", &above, "", ""], &[&format!("--context is {above}"), &format!("room for {most}")]);
    refused(["--context", "1", "", ""], &["a context of 1 tokens, expected 2 or more"]);
    refused(["--context", "0", "", ""], &["a context of 0 tokens"]);
    refused(["--context", "8", "--stride", "0"], &["a stride of 0 tokens, expected 1 to the context's 8"]);
    refused(["--context", "8", "--stride", "9"], &["a stride of 9 tokens"]);
    refused(["--stride", "-1", "", ""], &["-1"]);
    moewe!["eval", "perplexity", tiny_bundle(), &file, "--context", &fits].ok();
    moewe!["eval", "perplexity", tiny_bundle(), &file, "--context", "2"].ok();
}

#[test]
fn models_that_cannot_be_compared() {
    let (file, _, _) = ids("len7");
    moewe!["eval", "kl", tiny_bundle(), &file].refused(2, &["nothing to compare with", "--against"]);
    moewe!["eval", "kl", tiny_bundle(), &file, "--against", "/nowhere"].refused(2, &["--against", "/nowhere"]);
    let sizes = ["vocabulary of 320 tokens", "one of 2048"];
    moewe!["eval", "kl", tiny_bundle(), &file, "--against", demo()].refused(1, &sizes);
    // The same vocabulary, but other tokens for the text.
    let temp = tempfile::tempdir().unwrap();
    let other = temp.path().join("other");
    copy(&demo(), &other);
    edit_json(&other.join("tokenizer_config.json"), |config| config["add_bos_token"] = json!(false));
    let words = ["the tokenizers differ: at index 0", "token 0", ".json"];
    moewe!["eval", "kl", demo(), text(), "--against", &other].refused(1, &words);
    let two = temp.path().join("two.json");
    fs::write(&two, "[5, 6, 7]").unwrap();
    moewe!["eval", "kl", demo(), &two, "--against", &other].ok();
}

#[test]
fn broken_weights_are_named_by_position() {
    let temp = tempfile::tempdir().unwrap();
    let broken = temp.path().join("broken");
    copy(&golden("v3-tiny"), &broken);
    let weights = broken.join("model.safetensors");
    let mut parts = cli::Parts::read(&weights);
    let norm = parts.range("model.norm.weight");
    parts.data[norm].fill(0xff);
    parts.write(&weights);
    let (file, _, _) = ids("len7");
    let words = ["the prediction of token 1 of FILE", "the logit of token 0 is NaN"];
    moewe!["eval", "perplexity", &broken, &file].env("MOEWE_CACHE", temp.path().join("cache")).refused(1, &words);
    moewe!["eval", "kl", &broken, &file, "--against", tiny_bundle()]
        .env("MOEWE_CACHE", temp.path().join("cache"))
        .refused(1, &words);
}

// ---- help

#[test]
fn help_texts() {
    for command in [&["eval"][..], &["eval", "perplexity"], &["eval", "kl"]] {
        let said = cli::Call::new(command.iter().chain(&["--help"]).map(Into::into).collect()).ok();
        assert!(said.stdout.lines().all(|line| line.chars().count() <= 100), "{}", said.stdout);
        insta::assert_snapshot!(format!("help_{}", command.join("_")), said.stdout);
    }
}
