//! Every section of units.json against the oracle.

use std::collections::BTreeSet;

use moewe_oracle::{config, numeric, ops, rel_l2, router};
use serde_json::Value;

fn units() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../golden/units.json");
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn list(json: &Value) -> &[Value] {
    json.as_array().unwrap_or_else(|| panic!("not a list: {json}"))
}

fn number(json: &Value) -> f64 {
    json.as_f64().unwrap_or_else(|| panic!("not a number: {json}"))
}

fn numbers(json: &Value) -> Vec<f64> {
    list(json).iter().map(number).collect()
}

fn singles(json: &Value) -> Vec<f32> {
    numbers(json).into_iter().map(|x| x as f32).collect()
}

fn indices(json: &Value) -> Vec<usize> {
    numbers(json).into_iter().map(|x| x as usize).collect()
}

/// Agreement up to float64 rounding.
fn assert_close(got: &[f64], want: &[f64], what: &str) {
    assert!(!want.is_empty(), "{what}: nothing to compare");
    let error = rel_l2(got, want);
    assert!(error <= 1e-13, "{what}: relative error {error:e}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= 1e-12 * w.abs(), "{what}[{i}]: {g} instead of {w}");
    }
}

/// A section without a test here would otherwise go unnoticed.
#[test]
fn every_section_is_covered() {
    let units = units();
    let sections: BTreeSet<_> = units.as_object().expect("an object").keys().map(String::as_str).collect();
    let covered = [
        "rope",
        "rotate",
        "e4m3fn_decode",
        "e4m3fn_encode_saturating_rne",
        "act_quant_1x128",
        "block_dequant",
        "router",
    ];
    assert_eq!(sections, covered.into());
}

#[test]
fn rope_tables() {
    let units = units();
    let cases = units["rope"].as_object().expect("an object");
    assert_eq!(cases.len(), 6);
    for (name, case) in cases {
        let rope = config::rope_params(&case["config"]).expect("a RoPE configuration");
        let factor = number(&case["cos_sin_factor"]);
        assert_close(&rope.inv_freq(), &numbers(&case["inv_freq"]), name);
        assert_close(&[rope.cos_sin_factor()], &[factor], name);
        assert_close(&[rope.softmax_scale()], &[number(&case["softmax_scale"])], name);
        // cos and sin follow from the golden frequencies and the golden factor.
        for position in [0, 1, 37, 4095, 163_839] {
            let angles = numbers(&case["inv_freq"]).into_iter().map(|theta| position as f64 * theta);
            let (want_cos, want_sin): (Vec<f64>, Vec<f64>) =
                angles.map(|a| (a.cos() * factor, a.sin() * factor)).unzip();
            let (cos, sin) = rope.cos_sin(position);
            // An ulp of θ is p ulps of the angle.
            let tolerance = 1e-15 * (position as f64 + 10.0);
            for (got, want) in cos.iter().chain(&sin).zip(want_cos.iter().chain(&want_sin)) {
                assert!((got - want).abs() <= tolerance, "{name} at {position}: {got} instead of {want}");
            }
        }
    }
}

#[test]
fn rotation() {
    let case = &units()["rotate"];
    let x = numbers(&case["x"]);
    for (key, interleave) in [("interleaved", true), ("half_split", false)] {
        let (nope_dim, theta) = (0, number(&case["theta"]));
        let rope = moewe_oracle::rope::RopeParams { dim: x.len(), nope_dim, theta, interleave, yarn: None };
        let (cos, sin) = rope.cos_sin(number(&case["position"]) as usize);
        let mut got = x.clone();
        ops::rotate(&mut got, &cos, &sin, interleave);
        assert_close(&got, &numbers(&case[key]), key);
    }
}

#[test]
fn e4m3_decode() {
    let units = units();
    let table = list(&units["e4m3fn_decode"]);
    assert_eq!(table.len(), 256);
    for (code, want) in (0..=255u8).zip(table) {
        let got = numeric::e4m3_to_f32(code);
        match want.as_f64() {
            Some(want) => assert_eq!(f64::from(got).to_bits(), want.to_bits(), "code {code:#x}"),
            None => assert!(got.is_nan() && matches!(code, 0x7F | 0xFF), "code {code:#x} is null in the table"),
        }
    }
}

#[test]
fn e4m3_encode() {
    let case = &units()["e4m3fn_encode_saturating_rne"];
    let (x, codes) = (singles(&case["x"]), indices(&case["code"]));
    assert_eq!((x.len(), codes.len()), (40, 40));
    for (x, code) in x.into_iter().zip(codes) {
        assert_eq!(usize::from(numeric::f32_to_e4m3(x)), code, "{x}");
    }
}

#[test]
fn activation_quantisation() {
    let case = &units()["act_quant_1x128"];
    let rows = list(&case["x"]);
    assert_eq!(rows.len(), 2);
    for (key, ue8m0) in [("dequantised", false), ("dequantised_ue8m0", true)] {
        let x: Vec<f32> = rows.iter().flat_map(singles).collect();
        let want: Vec<f64> = list(&case[key]).iter().flat_map(numbers).collect();
        let quantised = numeric::quantise_activations(&x, 160, 128, ue8m0);
        assert_eq!(quantised.scales.len(), 4);
        let got = quantised.dequantise();
        assert_eq!(got.len(), want.len());
        // The table was printed from float64 products or float32 ones; either is within half an ulp of f32.
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!((g - w).abs() <= w.abs() * 2f64.powi(-24), "{key}[{i}]: {g} instead of {w}");
        }
    }
}

#[test]
fn fp8_block_dequantisation() {
    let case = &units()["block_dequant"];
    let shape = indices(&case["shape"]);
    let scales: Vec<f32> = list(&case["scale_inv"]).iter().flat_map(singles).collect();
    let samples: Vec<Vec<f64>> = list(&case["samples"]).iter().map(numbers).collect();
    assert_eq!(samples.len(), 7);
    let mut codes = vec![0; shape[0] * shape[1]];
    let place = |s: &[f64]| s[0] as usize * shape[1] + s[1] as usize;
    for s in &samples {
        codes[place(s)] = s[2] as u8;
    }
    let got = numeric::block_dequant(&codes, [shape[0], shape[1]], &scales, [128, 128]);
    for s in &samples {
        assert_eq!(f64::from(got[place(s)]).to_bits(), s[3].to_bits(), "sample {s:?}");
    }
}

#[test]
fn routing() {
    let units = units();
    let cases = list(&units["router"]);
    assert_eq!(cases.len(), 7);
    for case in cases {
        let note = &case["note"];
        let params = config::router_params(&case["config"]).expect("a router configuration");
        let bias = case["bias"].is_array().then(|| numbers(&case["bias"]));
        let logits = list(&case["logits"]);
        assert!(logits.len() >= 2, "{note}");
        assert_eq!(logits.len(), list(&case["ids_ascending"]).len(), "{note}");
        for (t, logits) in logits.iter().enumerate() {
            let route = router::route(&numbers(logits), bias.as_deref(), &params).ascending();
            assert_eq!(route.ids, indices(&case["ids_ascending"][t]), "{note}, token {t}");
            assert_close(&route.weights, &numbers(&case["weights"][t]), &format!("{note}, token {t}"));
        }
    }
}
