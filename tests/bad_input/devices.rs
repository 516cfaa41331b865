//! Devices.

use super::*;

#[test]
fn no_vulkan_device() {
    for args in [
        vec!["run", tiny_bundle().to_str().unwrap(), "--tokens", "1"],
        vec!["run", "-", "--device", "list"],
        vec!["doctor"],
        vec!["chat", demo().to_str().unwrap()],
    ] {
        let call = Call::new(args.into_iter().map(Into::into).collect());
        let call = call.env("VK_DRIVER_FILES", "/nonexistent.json").env("VK_ICD_FILENAMES", "/nonexistent.json");
        call.refused(1, &["no Vulkan device", "apt-get install mesa-vulkan-drivers"]);
    }
}

/// Whether Mesa's software driver is there, whose limits and memory are known.
fn software_driver() -> bool {
    let there = moewe!["doctor", "--device", "list"].ok().stdout.contains("llvmpipe");
    if !there {
        not_tested("there is no llvmpipe");
    }
    there
}

#[test]
fn device_without_a_needed_feature() {
    if !software_driver() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    // Subgroups of 32 invocations; a software driver's are as wide as the processor's vectors.
    let bundle = temp.path().join("hopper");
    moewe!["compile", golden("v3-tiny"), "-o", &bundle, "--target", "hopper"].ok();
    let run = |bundle: &Path| moewe!["run", bundle, "--tokens", "1", "--device", "llvmpipe"];
    run(&bundle).refused(1, &["llvmpipe", "invocations in a subgroup", "needs 32", "--target lavapipe"]);

    for (field, words) in [
        ("storage_buffers", "storage buffers for a kernel"),
        ("workgroup_invocations", "invocations in a workgroup"),
        ("workgroup_bytes", "bytes of workgroup memory"),
    ] {
        let bundle = temp.path().join(field);
        copy(tiny_bundle(), &bundle);
        edit_json(&bundle.join("plan.json"), |plan| plan["requirements"][field] = json!(1 << 20));
        reseal(&bundle);
        run(&bundle).refused(1, &["llvmpipe", words, "needs 1048576", "--target lavapipe"]);
    }
    // A weight in a piece larger than a binding.
    let scene = Scene::new(SMALL);
    scene.config(|config| config["vocab_size"] = json!(900_000));
    let bundle = scene.path("bundle");
    let config = scene.checkpoint.join("config.json");
    moewe!["compile", config, "--plan-only", "-o", &bundle, "--target", "hopper"].ok();
    edit_json(&bundle.join("plan.json"), |plan| plan["requirements"]["subgroup_invocations"] = json!(0));
    reseal(&bundle);
    run(&bundle).refused(1, &["llvmpipe", "bytes in a binding", "needs 172800000", "--target lavapipe"]);
}

#[test]
fn out_of_device_memory() {
    // More weights than the machine has memory, made of the same few bytes over and over.
    const PIECE: u64 = 128 << 20;
    if !software_driver() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let bundle = temp.path().join("bundle");
    copy(tiny_bundle(), &bundle);
    let memory = fs::read_to_string("/proc/meminfo").unwrap();
    let total = memory.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
    edit_json(&bundle.join("plan.json"), |plan| {
        let file = plan["files"][0]["bytes"].as_u64().unwrap();
        let mut segments = Vec::new();
        let mut left = PIECE;
        while left > 0 {
            let bytes = left.min(file);
            segments.push(json!({"file": 0, "offset": 0, "bytes": bytes}));
            left -= bytes;
        }
        let shard = json!({"first": 0, "count": PIECE / 4096, "segments": segments});
        let first = plan["weights"].as_array().unwrap().len();
        let count = (total / PIECE + 1) as usize;
        for i in 0..count {
            let weight = json!({
                "name": format!("huge.{i}"), "format": "f32", "shape": [PIECE / 4096, 1024], "shards": [shard]
            });
            plan["weights"].as_array_mut().unwrap().push(weight);
        }
        let steps = plan["programs"][0]["steps"].as_array_mut().unwrap();
        let is_weight = |binding: &Value| binding.get("weight").is_some();
        let step = steps.iter().find(|step| step["bindings"].as_array().unwrap().iter().any(is_weight));
        let mut step = step.unwrap().clone();
        for i in first..first + count {
            for binding in step["bindings"].as_array_mut().unwrap().iter_mut().filter(|binding| is_weight(binding)) {
                *binding = json!({"weight": {"weight": i, "shard": 0}});
            }
            steps.push(step.clone());
        }
    });
    reseal(&bundle);
    let words = ["out of memory on llvmpipe", "the weights needs", "choose a smaller model"];
    moewe!["run", &bundle, "--tokens", "1", "--device", "llvmpipe"].refused(1, &words);
}
