//! Generation defaults.

use super::*;

fn generation(json: &Value) -> Result<GenerationDefaults, TextError> {
    GenerationDefaults::load(model(&[("generation_config.json", json.to_string().as_bytes())]).path())
}

#[test]
fn generation_defaults() {
    assert_eq!(GenerationDefaults::load(model(&[]).path()).unwrap(), GenerationDefaults::default());
    let all = generation(&json!({
        "_from_model_config": true, "do_sample": true, "temperature": 1, "top_k": 50, "top_p": 0.95, "min_p": 0.0,
        "repetition_penalty": 1.1, "eos_token_id": [5, 1, 5], "bos_token_id": 0, "max_new_tokens": 2048,
        "transformers_version": "4.46.3",
    }));
    let expected = GenerationDefaults {
        do_sample: Some(true),
        temperature: Some(1.0),
        top_k: Some(50),
        top_p: Some(0.95),
        min_p: Some(0.0),
        repetition_penalty: Some(1.1),
        eos_token_ids: Some(vec![1, 5]),
        bos_token_id: Some(0),
        max_new_tokens: Some(2048),
    };
    assert_eq!(all.unwrap(), expected);
    let empty = generation(&json!({"temperature": null, "eos_token_id": null})).unwrap();
    assert_eq!(empty, GenerationDefaults::default());
    assert_eq!(generation(&json!({"eos_token_id": 7})).unwrap().eos_token_ids, Some(vec![7]));
}

#[test]
fn wrong_generation_defaults_are_errors_that_name_the_field() {
    let wrong = [
        ("do_sample", json!(1)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_k", json!(-1)),
        ("top_k", json!(1.5)),
        ("top_k", json!(4_294_967_296u64)),
        ("top_p", json!(0)),
        ("top_p", json!(1.01)),
        ("min_p", json!(-0.01)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("eos_token_id", json!([])),
        ("eos_token_id", json!([1, -1])),
        ("eos_token_id", json!("1")),
        ("bos_token_id", json!([0])),
        ("max_new_tokens", json!(0)),
        ("max_new_tokens", json!({})),
    ];
    for (field, value) in wrong {
        let error = generation(&json!({ field: value })).unwrap_err().to_string();
        let expected = format!("generation_config.json: field `{field}` is {value}, expected ");
        assert!(error.contains(&expected), "{error}");
    }
}
