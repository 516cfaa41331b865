//! `moewe quantize`: what few bits cost the demo model, what is reported, and what is refused.

#[path = "common/cli.rs"]
mod cli;

use std::fs;

use cli::{demo, golden, moewe, root, tiny_bundle};
use serde_json::Value;

/// Bits a weight, divergence and agreement of the demo model.
fn measured(bits: &str) -> (f64, f64, f64) {
    let out = root().join(format!("demo-int{bits}.moewe"));
    let report: Value = moewe!["quantize", demo(), "--bits", bits, "-o", &out, "--context", "256", "--json"].json();
    assert_eq!(report["format"], format!("int{bits}"));
    let original = &report["original"];
    assert!(report["weight_bytes"].as_u64().unwrap() < original["weight_bytes"].as_u64().unwrap());
    assert!((original["bits_per_weight"].as_f64().unwrap() - 16.0).abs() < 0.1);
    // Experts of the demo have rows of 48 numbers on their way out.
    let warnings = report["warnings"].as_array().unwrap();
    assert!(warnings.len() == 1 && warnings[0].as_str().unwrap().contains("groups of 32"), "{warnings:?}");
    let measured = &report["measured"];
    assert_eq!((measured["complete"].as_bool(), measured["predicted_tokens"].as_u64()), (Some(true), Some(1474)));
    let number = |value: &Value| value.as_f64().unwrap();
    (number(&report["bits_per_weight"]), number(&measured["kl"]["mean"]), number(&measured["top1_agreement"]))
}

#[test]
fn eight_bits_of_the_demo_model() {
    let (bits, kl, agreement) = measured("8");
    assert!((8.5..11.5).contains(&bits), "{bits}");
    assert!(kl > 1e-5 && kl < 2e-3, "{kl}");
    assert!(agreement > 0.97, "{agreement}");
}

#[test]
fn four_bits_of_the_demo_model() {
    let (bits, kl, agreement) = measured("4");
    assert!((4.5..9.0).contains(&bits), "{bits}");
    assert!(kl > 1e-3 && kl < 5e-2, "{kl}");
    assert!(agreement > 0.85, "{agreement}");
}

#[test]
fn compiled_weights_are_the_same() {
    let quantised = root().join("same-quantize.moewe");
    let compiled = root().join("same-compile.moewe");
    let model = golden("v3-fp8-tiny");
    let target = ["--target", "lavapipe"];
    let said = moewe!["quantize", &model, "--bits", "8", "-o", &quantised, target[0], target[1], "--no-measure"].ok();
    assert!(said.stdout.contains("bits a weight"), "{said:?}");
    moewe!["compile", &model, "-o", &compiled, "--weights", "int8", target[0], target[1]].ok();
    let file = "weights-00001.safetensors";
    assert_eq!(fs::read(quantised.join(file)).unwrap(), fs::read(compiled.join(file)).unwrap());
}

#[test]
fn wrong_calls() {
    let out = root().join("never.moewe");
    moewe!["quantize", demo(), "--bits", "5", "-o", &out].refused(2, &["5", "4", "8"]);
    moewe!["quantize", demo(), "-o", &out].refused(2, &["--bits"]);
    moewe!["quantize", tiny_bundle(), "--bits", "8", "-o", &out].refused(2, &["bundle already"]);
    moewe!["quantize", "nowhere", "--bits", "8", "-o", &out].refused(2, &["nowhere"]);
    moewe!["quantize", demo().join("config.json"), "--bits", "8", "-o", &out].refused(2, &["is a file"]);
    moewe!["quantize", demo(), "--bits", "8", "-o", &out, "--text", "nowhere.txt"].refused(2, &["nowhere.txt"]);
    moewe!["quantize", demo(), "--bits", "8", "-o", &out, "--target", "nowhere"].refused(2, &["nowhere"]);
    assert!(!out.exists());
}
