//! Edits become values of parameters, or an error that names the edit and what is possible.

mod common;

use moewe_plan::{
    Edit, FORCED, MUTED, ModelInfo, Parameter, ParameterKind, Place, Plan, Requirements, parameter_values,
};

/// Two layers with attention, the second with four experts, of which a token gets two.
fn plan() -> Plan {
    let parameters = [
        (ParameterKind::LatentScale, 0, 3),
        (ParameterKind::HeadScale, 0, 2),
        (ParameterKind::LatentScale, 1, 3),
        (ParameterKind::HeadScale, 1, 2),
        (ParameterKind::ExpertOffset, 1, 4),
        (ParameterKind::ExpertScale, 1, 4),
    ];
    let parameters = (0..).zip(parameters).map(|(buffer, (kind, layer, len))| Parameter { kind, layer, buffer, len });
    Plan {
        format_version: moewe_plan::FORMAT_VERSION,
        generator: String::new(),
        model: ModelInfo { layers: 2, moe_layers: vec![1], ..common::model() },
        warnings: Vec::new(),
        fast_latents: moewe_plan::Latent::F16,
        requirements: Requirements {
            profile: String::new(),
            tuned_on: None,
            max_binding_bytes: 0,
            storage_buffers: 0,
            workgroup_invocations: 0,
            workgroup_bytes: 0,
            subgroup_invocations: 0,
            cooperative: 0,
        },
        files: Vec::new(),
        weights: Vec::new(),
        buffers: Vec::new(),
        kernels: Vec::new(),
        parameters: parameters.collect(),
        programs: Vec::new(),
    }
}

fn place(text: &str) -> Place {
    text.parse().expect("a place")
}

#[test]
fn edits_touch_what_they_name_and_nothing_else() {
    let neutral = [vec![1.0; 3], vec![1.0; 2], vec![1.0; 3], vec![1.0; 2], vec![0.0; 4], vec![1.0; 4]];
    assert_eq!(parameter_values(&plan(), &[]).unwrap(), neutral);
    let edits = [
        Edit::Mute(place("1:0")),
        Edit::Force(place("*:2")),
        Edit::parse_scale("1:3=-0.5").unwrap(),
        Edit::ZeroLatent(place("*:1")),
        Edit::ZeroHead(place("0:1")),
    ];
    let values = parameter_values(&plan(), &edits).unwrap();
    assert_eq!(values[0], [1.0, 0.0, 1.0]);
    assert_eq!(values[1], [1.0, 0.0]);
    assert_eq!(values[2], [1.0, 0.0, 1.0]);
    assert_eq!(values[3], neutral[3]);
    assert_eq!(values[4], [MUTED, 0.0, FORCED, 0.0]);
    assert_eq!(values[5], [1.0, 1.0, 1.0, -0.5]);
    let pinned = parameter_values(&plan(), &[Edit::parse_pin("1:3+0").unwrap()]).unwrap();
    assert_eq!(pinned[4], [FORCED, 0.0, 0.0, FORCED]);
    // The last edit of a place counts.
    let twice = [Edit::Mute(place("1:0")), Edit::Force(place("1:0"))];
    assert_eq!(parameter_values(&plan(), &twice).unwrap()[4], [FORCED, 0.0, 0.0, 0.0]);
}

#[test]
fn impossible_edits_say_what_is_possible() {
    let muted = ["1:0", "1:1", "1:2"].map(|at| Edit::Mute(place(at)));
    let forced = ["1:0", "1:1", "1:2"].map(|at| Edit::Force(place(at)));
    let cases: [(&[Edit], &str); 7] = [
        (&[Edit::Mute(place("1:4"))], "mute 1:4: there is no number 4, expected 0 to 3"),
        (&[Edit::Mute(place("0:0"))], "mute 0:0: no such layer; the layers that have it are 1"),
        (&[Edit::ZeroHead(place("2:0"))], "the layers that have it are 0, 1"),
        (&[Edit::Pin(None, vec![1])], "1 experts, expected 2 different ones"),
        (&[Edit::Pin(None, vec![1, 1])], "expected 2 different ones"),
        (&muted, "layer 1: 1 experts are left, at least 2 are needed"),
        (&forced, "layer 1: 3 experts are forced, at most 2 can be"),
    ];
    for (edits, expected) in cases {
        let error = parameter_values(&plan(), edits).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    let without = Plan { parameters: Vec::new(), ..plan() };
    let error = parameter_values(&without, &[Edit::ZeroHead(place("0:0"))]).unwrap_err().to_string();
    assert!(error.contains("compile it with taps"), "{error}");
    for text in ["3", "3:", ":1", "a:1", "3:-1", "3:1:2", "4294967296:1"] {
        assert!(text.parse::<Place>().is_err(), "{text}");
    }
    for text in ["1:0", "1:0=", "1:0=x", "1:0=inf", "1:0=NaN"] {
        assert!(Edit::parse_scale(text).is_err(), "{text}");
    }
    for text in ["1", "1:", "1:a", "1:0+", "x:0"] {
        assert!(Edit::parse_pin(text).is_err(), "{text}");
    }
}
