//! Safetensors files.

use super::*;

#[test]
fn truncated_safetensors() {
    let scene = Scene::new(SMALL);
    let whole = fs::read(scene.weights()).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
    for length in [0, 4, 8, header / 2, header, whole.len() / 2, whole.len() - 1] {
        fs::write(scene.weights(), &whole[..length]).unwrap();
        scene.compile_refuses(&["model.safetensors"]);
    }
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "truncated"]);
    fs::write(scene.weights(), [&whole[..], &[0; 3]].concat()).unwrap();
    scene.refuses(&["model.safetensors", "3 bytes after the last tensor"]);
}

#[test]
fn overlapping_tensors() {
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| {
        let first = parts.header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
        parts.header["model.layers.0.post_attention_layernorm.weight"]["data_offsets"] = first;
    });
    scene.refuses(&["model.safetensors", "layernorm.weight`", "overlap"]);

    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| {
        parts.header["model.norm.weight"]["data_offsets"] = json!([1u64 << 62, (1u64 << 62) + 192]);
    });
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "data ends at byte"]);

    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header["model.norm.weight"]["data_offsets"] = json!([192, 0]));
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "ends before that"]);

    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX]));
    scene.refuses(&["model.safetensors", "tensor `model.norm.weight`", "does not fill"]);
}

#[test]
fn absurd_header_length() {
    let scene = Scene::new(SMALL);
    let whole = fs::read(scene.weights()).unwrap();
    for length in [u64::MAX, 1 << 40, 100_000_001, whole.len() as u64, 0, 1] {
        fs::write(scene.weights(), [&length.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
        scene.compile_refuses(&["model.safetensors", "header"]);
    }
    fs::write(scene.weights(), [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
    scene.refuses(&["model.safetensors", "header length 18446744073709551615 is absurd"]);
}

#[test]
fn wrong_dtype_or_shape() {
    let name = "model.layers.1.self_attn.o_proj.weight";
    for (dtype, factor) in [("I32", 1), ("F64", 2), ("F8_E5M2", 4), ("Q4_K", 1), ("F8_E4M3", 4)] {
        let scene = Scene::new(SMALL);
        scene.edit_weights(|parts| {
            parts.header[name]["dtype"] = json!(dtype);
            let columns = parts.header[name]["shape"][1].as_u64().unwrap();
            let columns = if dtype == "F64" { columns / factor } else { columns * factor };
            parts.header[name]["shape"][1] = json!(columns);
        });
        scene.compile_refuses(&["model.safetensors", name]);
    }
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header[name]["dtype"] = json!("I32"));
    scene.refuses(&["model.safetensors", name, "of dtype I32", "expected one of F32, F16, BF16"]);

    for shape in [json!([80, 48]), json!([3840]), json!([1, 48, 80]), json!([48, 80, 1, 1, 1, 1, 1, 1, 1])] {
        let scene = Scene::new(SMALL);
        scene.edit_weights(|parts| parts.header[name]["shape"] = shape);
        scene.compile_refuses(&["model.safetensors", name]);
    }
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.header[name]["shape"] = json!([80, 48]));
    scene.refuses(&["model.safetensors", name, "shape [80, 48], expected shape [48, 80]"]);
}

#[test]
fn missing_tensor() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let scene = Scene::new(SMALL);
    scene.edit_weights(|parts| parts.remove(name));
    scene.refuses(&["checkpoint", name, "is missing, expected shape [24, 48]"]);

    let scene = Scene::new("v3-fp8-tiny");
    let name = "model.layers.0.mlp.up_proj.weight_scale_inv";
    scene.edit_weights(|parts| parts.remove(name));
    scene.refuses(&["checkpoint", name, "is missing", "block scales"]);

    let scene = Scene::new(SMALL);
    fs::remove_file(scene.weights()).unwrap();
    scene.refuses(&["checkpoint", "no weights", "model.safetensors"]);
    fs::remove_file(scene.checkpoint.join("config.json")).unwrap();
    scene.refuses(&["checkpoint: is no checkpoint: config.json is not in it"]);
}

#[test]
fn scale_of_the_wrong_shape() {
    let name = "model.layers.0.mlp.up_proj.weight_scale_inv";
    for (shape, dtype) in [(json!([2, 3]), "F32"), (json!([6]), "F32"), (json!([3, 4]), "F16")] {
        let scene = Scene::new("v3-fp8-tiny");
        scene.edit_weights(|parts| {
            parts.header[name]["shape"] = shape.clone();
            if dtype == "F16" {
                parts.header[name]["dtype"] = json!(dtype);
            }
        });
        scene.compile_refuses(&["model.safetensors", name, "expected shape [3, 2]"]);
    }
    let scene = Scene::new("v3-fp8-tiny");
    scene.edit_weights(|parts| parts.header[name]["shape"] = json!([2, 3]));
    scene.refuses(&["model.safetensors", name, "shape [2, 3], expected shape [3, 2]"]);
}

#[test]
fn index_that_names_a_missing_or_outside_file() {
    let index = |scene: &Scene| scene.checkpoint.join("model.safetensors.index.json");
    let name = "model.norm.weight";
    let point = |file: &str| {
        let scene = Scene::new("v3-bf16-tiny-sharded");
        edit_json(&index(&scene), |index| index["weight_map"][name] = json!(file));
        scene
    };
    point("model-00009-of-000003.safetensors").refuses(&["index.json", "model-00009-of-000003.safetensors", "missing"]);
    // A sound file outside of the checkpoint is not read either.
    let scene = point("../model.safetensors");
    fs::copy(golden(SMALL).join("model.safetensors"), scene.path("model.safetensors")).unwrap();
    scene.refuses(&["index.json", name, "../model.safetensors", "inside the checkpoint"]);
    point("/etc/passwd").refuses(&["index.json", name, "/etc/passwd", "inside the checkpoint"]);
    point("").refuses(&["index.json", name]);
    point("model-00001-of-000003.safetensors").refuses(&["index.json", name, "model-00001-of-000003.safetensors"]);

    let scene = Scene::new("v3-bf16-tiny-sharded");
    fs::remove_file(scene.checkpoint.join("model-00002-of-000003.safetensors")).unwrap();
    scene.refuses(&["index.json", "model-00002-of-000003.safetensors", "missing"]);
    for text in ["", "[]", "{}", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": 1}}"#] {
        fs::write(index(&scene), text).unwrap();
        scene.compile_refuses(&["model.safetensors.index.json"]);
    }
}

#[test]
fn weights_that_are_no_files() {
    let scene = Scene::new(SMALL);
    fs::remove_file(scene.weights()).unwrap();
    symlink("model.safetensors", scene.weights()).unwrap();
    scene.refuses(&["model.safetensors", "symbolic links"]);
    fs::remove_file(scene.weights()).unwrap();
    symlink("nowhere", scene.weights()).unwrap();
    scene.refuses(&["model.safetensors", "No such file"]);
    pipe(&scene.weights()); // must not wait for a writer
    scene.refuses(&["model.safetensors", "not a regular file"]);
    fs::remove_file(scene.weights()).unwrap();
    fs::create_dir(scene.weights()).unwrap();
    scene.refuses(&["model.safetensors", "not a regular file"]);
    pipe(&scene.checkpoint.join("config.json"));
    scene.refuses(&["config.json", "not a regular file"]);
    symlink("loop", scene.path("loop")).unwrap();
    moewe!["run", scene.path("loop"), "--tokens", "1"].refused(1, &["loop", "symbolic links"]);
}
