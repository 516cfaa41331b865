//! Prompts, options and models.

use super::*;

#[test]
fn tokens_out_of_vocabulary() {
    let bundle = tiny_bundle();
    for tokens in ["320", "1,2,4294967295"] {
        let words = ["token ", "the vocabulary has 320 tokens (0 to 319)"];
        moewe!["run", bundle, "--tokens", tokens].refused(1, &words);
        let out = root().join("never.safetensors");
        moewe!["trace", bundle, "--tokens", tokens, "-o", &out].refused(1, &words);
        assert!(!out.exists());
    }
    moewe!["run", golden("v3-tiny"), "--tokens", "5,320"].refused(1, &["token 1 of the prompt is 320"]);
}

#[test]
fn tokens_that_are_none() {
    let bundle = tiny_bundle();
    for tokens in ["1,,2", "a", "-1", "1,-2", "4294967296", "", "1 2", "1.5", "--json"] {
        let words = ["--tokens", "expected token ids, separated by commas, such as 1,2,3"];
        moewe!["run", bundle, "--tokens", tokens].refused(2, &words);
        moewe!["trace", bundle, "-o", "x", "--tokens", tokens].refused(2, &words);
    }
}

#[test]
fn empty_prompt() {
    moewe!["run", demo(), ""].refused(2, &["the prompt is empty"]);
    moewe!["run", demo()].refused(2, &["the prompt is empty"]); // nothing on standard input
    moewe!["run", demo(), "--prompt", "a="].refused(2, &["the prompt is empty"]);
    moewe!["run", demo(), "--prompt", "a"].refused(2, &["--prompt is \"a\", expected NAME=TEXT"]);
    moewe!["trace", demo(), "", "-o", root().join("never")].refused(2, &["the prompt is empty"]);
    moewe!["trace", demo(), "-o", root().join("never")].refused(2, &["nothing to run"]);
}

#[test]
fn context_longer_than_allowed() {
    let tokens = |n: usize| vec!["7"; n].join(",");
    let bundle = tiny_bundle();
    moewe!["run", bundle, "--tokens", tokens(257)].refused(1, &["257 tokens, the model's context holds 256"]);
    let out = root().join("long.safetensors");
    moewe!["trace", bundle, "--tokens", tokens(300), "-o", &out].refused(1, &["300 tokens", "holds 256"]);
    assert!(!out.exists());
    // A prompt that just fits is run; the text ends where the context does.
    let said = moewe!["run", bundle, "--tokens", tokens(250), "--ignore-eos", "--json"].json();
    assert_eq!((&said["stop_reason"], said["tokens"].as_array().unwrap().len()), (&json!("context"), 6));
    // A text of many thousand tokens, and one that is no prompt but an accident.
    moewe!["run", demo()].stdin("Once upon a time. ".repeat(20_000)).refused(1, &["the model's context holds 2048"]);
    moewe!["run", demo()].stdin(vec![b' '; (64 << 20) + 1]).refused(2, &["more than 67108864 bytes"]);
    moewe!["run", demo()].stdin([b'a', 0xff]).refused(1, &["standard input", "UTF-8"]);
    moewe!["chat", demo()].stdin([b'a', 0xff, b'\n']).refused(1, &["standard input", "UTF-8"]);
}

#[test]
fn options_out_of_range() {
    let bundle = tiny_bundle();
    for (option, value) in [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "warm"),
        ("--top-p", "0"),
        ("--top-p", "2"),
        ("--top-p", "-0.5"),
        ("--min-p", "1.5"),
        ("--min-p", "-1"),
        ("--top-k", "-1"),
        ("--repetition-penalty", "0"),
        ("--repetition-penalty", "-2"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-5"),
        ("--max-new-tokens", "99999999999"),
        ("--seed", "x"),
        ("--prefill-chunk", "0"),
        ("--precision", "double"),
        ("--device", "99"),
        ("--device", "radeon"),
        ("--target", "lavapipe"), // it is compiled already
    ] {
        let name = if option == "--device" { "no device is" } else { option };
        moewe!["run", bundle, "--tokens", "1", option, value].refused(2, &[name]);
    }
    moewe!["run", bundle, "--device", "radeon", "--tokens", "1"].refused(2, &["\"radeon\"", "there are: 0: "]);
    moewe!["run", golden("v3-tiny"), "--tokens", "1", "--target", "toaster"].refused(2, &["toaster", "generic-vulkan"]);
    moewe!["run", bundle, "hello"].refused(2, &["no tokenizer.json", "--tokens"]);
    moewe!["chat", bundle].refused(2, &["no tokenizer with a chat template", "moewe run"]);
    moewe!["run", bundle, "hello", "--tokens", "1"].refused(2, &["cannot be used with"]);
    moewe!["trace", bundle, "--tokens", "1", "-o", "x", "--taps", "nonsense"].refused(2, &["--taps", "moe.N.ids"]);
    let v3 = Path::new(env!("CARGO_MANIFEST_DIR")).join("compiler/presets/v3.json");
    moewe!["inspect", &v3, "--gpu", "toaster"].refused(2, &["\"toaster\"", "h100"]);
    for (option, value) in [("--price-per-gpu-hour", "-3"), ("--price-per-gpu-hour", "nan"), ("--context", "0")] {
        moewe!["inspect", &v3, "--gpu", "h100", option, value].refused(2, &[]);
    }
    for bits in ["0", "-1", "nan", "inf"] {
        moewe!["inspect", &v3, "--cache-bits", bits].refused(2, &["bits"]);
    }
    moewe!["frobnicate"].refused(2, &["frobnicate"]);
    moewe!["run", bundle, "--precison", "fast"].refused(2, &["--precison", "--precision"]);
}

#[test]
fn models_that_are_none() {
    let temp = tempfile::tempdir().unwrap();
    let missing = temp.path().join("nowhere");
    for command in ["run", "chat", "explain", "inspect"] {
        moewe![command, &missing].refused(2, &["nowhere", "no such file or directory"]);
    }
    moewe!["trace", &missing, "--tokens", "1", "-o", temp.path().join("x")].refused(2, &["nowhere"]);
    moewe!["compile", &missing, "-o", temp.path().join("x")].refused(2, &["nowhere"]);

    let config = golden("v3-tiny").join("config.json");
    moewe!["run", &config, "--tokens", "1"].refused(2, &["config.json", "is a file"]);
    moewe!["compile", &config, "-o", temp.path().join("x")].refused(2, &["config.json", "is a file", "--plan-only"]);
    moewe!["explain", &config].refused(1, &["config.json", "not a moewe bundle"]);
    moewe!["explain", golden("v3-tiny")].refused(1, &["v3-tiny", "not a moewe bundle", "moewe compile"]);
    moewe!["compile", tiny_bundle(), "-o", temp.path().join("x")].refused(2, &["is a bundle already"]);
    moewe!["run", temp.path(), "--tokens", "1"].refused(1, &["is no checkpoint", "config.json"]);

    let plan = temp.path().join("plan");
    moewe!["compile", &config, "-o", &plan, "--plan-only"].ok();
    moewe!["run", &plan, "--tokens", "1"].refused(1, &["plan", "no weights", "--plan-only"]);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}
