//! The program as its user meets it: every command does what its help says, and agrees with the golden files.

#[path = "common/cli.rs"]
mod cli;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use cli::{copy, demo, edit_json, golden, listing, moewe, read_json, root, tiny_bundle};
use moewe_oracle::rel_l2;
use moewe_oracle::safetensors::{self, Dtype};
use serde_json::{Value, json};

/// Spec §9: relative L2 of each tensor. Expert ids and greedy tokens must be identical.
const TOLERANCE: f64 = 2e-5;

fn preset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("compiler/presets").join(name)
}

/// A golden sequence of v3-tiny: its tokens as an argument, what greedy sampling adds, and the file of its tensors.
fn sequence(name: &str) -> (String, Vec<Value>, PathBuf) {
    let dir = golden("v3-tiny").join("golden");
    let listed = read_json(&dir.join("golden.json"));
    let sequence = &listed["sequences"][name];
    let ids: Vec<String> = sequence["input_ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    let file = dir.join(sequence["file"].as_str().unwrap());
    (ids.join(","), sequence["greedy"].as_array().unwrap().clone(), file)
}

// ---- run

#[test]
fn greedy_tokens_are_the_golden_ones() {
    for model in [golden("v3-tiny"), tiny_bundle().to_owned()] {
        for (name, chunk) in [("len1", None), ("len7", Some("1")), ("len64", Some("5")), ("long", None)] {
            let (ids, greedy, _) = sequence(name);
            let mut args = vec!["run".into(), model.clone().into(), "--tokens".into(), ids.clone().into()];
            args.extend(["--ignore-eos", "--max-new-tokens", &greedy.len().to_string(), "--json"].map(Into::into));
            args.extend(chunk.iter().flat_map(|chunk| ["--prefill-chunk", *chunk]).map(Into::into));
            let said = cli::Call::new(args).json();
            assert_eq!(said["tokens"], json!(greedy), "{} {name}", model.display());
            assert_eq!(said["prompt_tokens"].as_array().unwrap().len(), ids.split(',').count());
            assert_eq!((&said["stop_reason"], &said["text"]), (&json!("length"), &json!(null)));
        }
    }
}

#[test]
fn run_prints_what_scripts_need() {
    let said = moewe!["run", demo(), "The king", "-n", "9", "--temperature", "0", "--ignore-eos", "--json"].json();
    assert_eq!(said["tokens"].as_array().unwrap().len(), 9);
    assert!(said["prompt_tokens"].as_array().unwrap().len() > 1);
    assert_eq!(said["stop_reason"], "length");
    let timing = said["timing"].as_object().unwrap();
    for field in ["load_seconds", "waited_seconds", "prefill_seconds", "decode_seconds", "prefill_tokens_per_second"] {
        assert!(timing[field].as_f64().unwrap() > 0.0, "{field}");
    }
    assert_eq!(
        (&said["cached_tokens"], &said["computed_tokens"], &said["mtp"]["mode"]),
        (&json!(0), &json!(3), &json!("auto"))
    );
    assert_eq!((&timing["prefill_tokens"], &timing["decode_tokens"]), (&json!(3), &json!(8)));
    // Without --json the prompt, then the text.
    let text = said["text"].as_str().unwrap();
    let plain = ["-n", "9", "--temperature", "0", "--ignore-eos"];
    let printed = moewe!["run", demo(), "The king", plain[0], plain[1], plain[2], plain[3], plain[4]].ok();
    assert_eq!((printed.stdout, printed.stderr), (format!("The king{text}\n"), String::new()));
    // The prompt may come from standard input, and several may have names.
    let piped =
        moewe!["run", demo(), "-n", "9", "--temperature", "0", "--ignore-eos", "--json"].stdin("The king").json();
    assert_eq!(piped["text"], text);
    let prompts = ["--prompt", "bible=The king", "--prompt", "json={\"name\":"];
    let named = moewe!["run", demo(), prompts[0], prompts[1], prompts[2], prompts[3], "-n", "9", "-t", "0", "--json"];
    let named = named.json();
    assert_eq!(named["prompts"][0]["name"], "bible");
    assert!(text.starts_with(named["prompts"][0]["text"].as_str().unwrap()));
    assert_eq!(named["prompts"][1]["name"], "json");
    let map = moewe!["run", demo(), prompts[0], prompts[1], prompts[2], prompts[3], "-n", "9", "--heatmap"].ok();
    assert!(map.stdout.contains("bible") && map.stdout.contains("json") && map.stdout.lines().count() > 10);
}

#[test]
fn drafts_change_no_token() {
    let (ids, count) = ("0,164,242,13,47,255", "32");
    for model in [tiny_bundle().to_owned(), golden("v3-mtp-accept-tiny")] {
        let run = |mtp: &str, more: &[&str]| {
            let mut args = vec!["run".into(), model.clone().into(), "--tokens".into(), ids.into()];
            args.extend(["--json", "--ignore-eos", "-n", count, "--mtp", mtp].iter().chain(more).map(Into::into));
            cli::Call::new(args).json()
        };
        for sampling in [&["-t", "0"][..], &["-t", "1", "--seed", "4"]] {
            let plain = run("off", sampling);
            let none = json!({"mode": "off", "drafted": 0, "accepted": 0, "acceptance": []});
            assert_eq!(plain["mtp"], none);
            for mtp in ["auto", "1", "2", "7"] {
                let said = run(mtp, sampling);
                assert_eq!(said["tokens"], plain["tokens"], "{mtp}");
                let drafting = &said["mtp"];
                assert_eq!(drafting["mode"], mtp.parse().map_or_else(|_| json!(mtp), |drafts: u64| json!(drafts)));
                let positions = drafting["acceptance"].as_array().unwrap();
                let most: usize = mtp.parse().unwrap_or(7);
                assert!(positions.len() <= most && (mtp == "auto" || !positions.is_empty()), "{mtp}: {drafting}");
                let sum = |field: &str| positions.iter().map(|position| position[field].as_u64().unwrap()).sum::<u64>();
                assert_eq!(
                    (&drafting["drafted"], &drafting["accepted"]),
                    (&json!(sum("drafted")), &json!(sum("accepted")))
                );
            }
        }
    }
    // Modules that were trained to agree with the model do.
    let said = moewe![
        "run",
        golden("v3-mtp-accept-tiny"),
        "--tokens",
        &ids,
        "-n",
        "40",
        "-t",
        "0",
        "--ignore-eos",
        "--mtp",
        "1",
        "--json"
    ];
    let said = said.json();
    assert!(said["mtp"]["accepted"].as_u64().unwrap() > 0, "{said}");
    // Models without modules say nothing, and cannot be told to.
    let plain = moewe!["run", golden("v2-tiny"), "--tokens", "1,2", "-n", "2", "--json"].json();
    assert_eq!(plain["mtp"], Value::Null);
    let refused = moewe!["run", golden("v2-tiny"), "--tokens", "1,2", "--mtp", "1"];
    refused.refused(2, &["--mtp", "no modules of multi-token prediction"]);
    moewe!["run", golden("v2-tiny"), "--tokens", "1,2", "-n", "2", "--mtp", "auto"].ok();
    for mtp in ["0", "8", "-1", "on", ""] {
        moewe!["run", tiny_bundle(), "--tokens", "1", "--mtp", mtp].refused(2, &["--mtp"]);
    }
    for more in [["--record", "never.moewe-rec"], ["--mute", "1:1"]] {
        let call = moewe!["run", tiny_bundle(), "--tokens", "1", "--mtp", "1", more[0], more[1]];
        call.refused(2, &["--mtp: nothing is drafted where the model is"]);
    }
    let watched = moewe!["run", tiny_bundle(), "--tokens", "1", "-n", "2", "--mute", "1:1", "--json"].json();
    assert_eq!(watched["mtp"]["mode"], "off");
}

#[test]
fn several_prompts_are_those_of_single_runs() {
    let options = ["-n", "11", "--seed", "7", "--ignore-eos"];
    let texts = ["The king", "Once upon a time there was", "{\"name\":", "The king"];
    let single: Vec<String> = texts
        .iter()
        .map(|text| {
            let args = vec!["run".into(), demo().into(), (*text).into()];
            cli::Call::new([args, options.iter().map(Into::into).collect()].concat()).ok().stdout
        })
        .collect();
    let mut args: Vec<std::ffi::OsString> = vec!["run".into(), demo().into()];
    for (number, text) in texts.iter().enumerate() {
        args.extend(["--prompt".into(), format!("{number}={text}").into()]);
    }
    args.extend(options.iter().map(Into::into));
    let printed: Vec<String> = (0..).zip(&single).map(|(number, text)| format!("── {number}\n{text}\n")).collect();
    assert_eq!(cli::Call::new(args).ok().stdout, printed.concat());
}

#[test]
fn prefixes_outlive_a_process() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("a/cache");
    let tokens = |last: &str| {
        let mut ids: Vec<String> = (0..150).map(|id| (id * 7 % 320).to_string()).collect();
        ids.push(last.into());
        ids.join(",")
    };
    let run = |last: &str, options: &[&str]| {
        let mut args: Vec<_> = vec!["run".into(), tiny_bundle().into(), "--tokens".into(), tokens(last).into()];
        args.extend(["-n", "8", "--ignore-eos", "-t", "0", "--json"].iter().chain(options).map(Into::into));
        let said = cli::Call::new(args).json();
        let counted = |field: &str| said[field].as_u64().unwrap();
        assert_eq!(counted("cached_tokens") + counted("computed_tokens"), 151);
        assert_eq!(said["timing"]["prefill_tokens"], said["computed_tokens"]);
        (counted("cached_tokens"), said["tokens"].clone())
    };
    let kept = ["--cache-dir", cache.to_str().unwrap()];
    let (plain, other) = (run("5", &[]).1, run("6", &["--no-prefix-cache"]).1);
    assert_eq!(run("5", &kept), (0, plain.clone()));
    // Two pages of 64 tokens are full.
    assert_eq!(run("5", &kept), (128, plain.clone()));
    assert_eq!(run("6", &[kept[0], kept[1], "--cache-size", "1G"]), (128, other));
    // Another precision has latents of its own, and so has another model.
    assert_eq!(run("5", &[kept[0], kept[1], "--precision", "fast"]).0, 0);
    // Without the directory, nothing is known.
    assert_eq!(run("5", &[]), (0, plain));
    assert!(!listing(&cache).is_empty());
    let call = |options: &[&str]| {
        let mut args: Vec<_> = vec!["run".into(), tiny_bundle().into(), "--tokens".into(), "1".into()];
        args.extend(options.iter().map(Into::into));
        cli::Call::new(args)
    };
    for size in ["0", "-1", "5x", "G", "1.5G", "99999999T", "5GB"] {
        call(&[kept[0], kept[1], "--cache-size", size]).refused(2, &["--cache-size", "such as 500M or 20G"]);
    }
    call(&["--cache-size", "5G"]).refused(2, &["--cache-dir"]);
    call(&[kept[0], kept[1], "--no-prefix-cache"]).refused(2, &["cannot be used with"]);
    call(&[kept[0], kept[1], "--mute", "1:1"]).refused(2, &["--cache-dir: no latents are kept"]);
    call(&[kept[0], kept[1], "--cache-size", "100"]).refused(1, &["may take 100 bytes", "one page"]);
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    call(&["--cache-dir", file.to_str().unwrap()]).refused(1, &["cannot hold the prefix cache"]);
}

#[test]
fn the_seed_decides_what_is_drawn() {
    let text = |seed: &str, temperature: Option<&str>| {
        let mut args: Vec<_> = vec!["run".into(), demo().into()];
        args.extend(["The king", "-n", "24", "--ignore-eos", "--seed", seed].map(Into::into));
        args.extend(temperature.iter().flat_map(|t| ["--temperature", *t]).map(Into::into));
        cli::Call::new(args).ok().stdout
    };
    // The demo model recommends sampling in its generation_config.json.
    assert_eq!(text("1", None), text("1", None));
    assert_ne!(text("1", None), text("2", None));
    assert_eq!(text("1", Some("0")), text("2", Some("0")));
    assert_ne!(text("1", Some("0")), text("1", None));
    assert_ne!(text("1", Some("2")), text("1", None));
}

#[test]
fn text_ends_where_the_model_says() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = temp.path().join("checkpoint");
    copy(&golden("v3-tiny"), &checkpoint);
    let (ids, greedy, _) = sequence("len7");
    let first = |id: &Value| greedy.iter().position(|other| other == id).unwrap();
    let run = |more: &[&str]| {
        let mut args = vec!["run".into(), checkpoint.clone().into(), "--tokens".into(), ids.clone().into()];
        args.extend(["--json", "-n", "20"].iter().chain(more).map(Into::into));
        let said = cli::Call::new(args).env("MOEWE_CACHE", temp.path().join("cache")).json();
        (said["tokens"].as_array().unwrap().len(), said["stop_reason"].as_str().unwrap().to_owned())
    };
    edit_json(&checkpoint.join("config.json"), |config| config["eos_token_id"] = greedy[9].clone());
    assert_eq!(run(&[]), (first(&greedy[9]) + 1, "eos".into()));
    assert_eq!(run(&["--ignore-eos"]), (20, "length".into()));
    edit_json(&checkpoint.join("config.json"), |config| config["eos_token_id"] = json!(1));
    let recommended = json!({"eos_token_id": [greedy[4], 319], "max_new_tokens": 3});
    fs::write(checkpoint.join("generation_config.json"), recommended.to_string()).unwrap();
    assert_eq!(run(&[]), (first(&greedy[4]) + 1, "eos".into()));
    assert_eq!(run(&["--ignore-eos"]), (20, "length".into()));
    let said = moewe!["run", &checkpoint, "--tokens", &ids, "--json"].env("MOEWE_CACHE", temp.path().join("cache"));
    assert_eq!(said.json()["tokens"].as_array().unwrap().len(), 3);
}

#[test]
fn a_checkpoint_is_compiled_once() {
    let temp = tempfile::tempdir().unwrap();
    let (checkpoint, cache) = (temp.path().join("checkpoint"), temp.path().join("cache"));
    copy(&golden("v3-mtp-accept-tiny"), &checkpoint);
    let run = || moewe!["run", &checkpoint, "--tokens", "1,2,3", "-n", "4"].env("MOEWE_CACHE", &cache).ok().stdout;
    let bundles = || -> Vec<_> {
        let all = listing(&cache.join("bundles")).into_iter().map(|(path, _)| path);
        all.filter(|path| path.ends_with("manifest.json")).collect()
    };
    let text = run();
    let first = bundles();
    assert_eq!(first.len(), 1);
    let time = first[0].metadata().unwrap().modified().unwrap();
    assert_eq!(run(), text);
    assert_eq!((bundles(), first[0].metadata().unwrap().modified().unwrap()), (first.clone(), time));
    // Another target, other weights and another configuration are other bundles.
    moewe!["run", &checkpoint, "--tokens", "1", "-n", "1", "--target", "webgpu"].env("MOEWE_CACHE", &cache).ok();
    assert_eq!(bundles().len(), 2);
    let weights = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    run();
    assert_eq!(bundles().len(), 3);
    edit_json(&checkpoint.join("config.json"), |config| config["eos_token_id"] = json!(7));
    run();
    assert_eq!(bundles().len(), 4);
    // A cached bundle that was damaged is made again.
    fs::write(first[0].with_file_name("plan.json"), "{}").unwrap();
    run();
    for manifest in bundles() {
        fs::write(manifest.with_file_name("plan.json"), "{}").unwrap();
    }
    assert_eq!(run().lines().count(), 1);
    // Several at once wait for the one that compiles.
    fs::remove_dir_all(&cache).unwrap();
    let texts: Vec<String> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3).map(|_| scope.spawn(run)).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert!(texts.iter().all(|other| *other == texts[0]));
    assert_eq!(bundles().len(), 1);
}

#[test]
fn half_precision_latents_are_near() {
    let (ids, _, _) = sequence("len64");
    let trace = |precision: &str| {
        let out = root().join(format!("{precision}.safetensors"));
        moewe!["trace", tiny_bundle(), "--tokens", &ids, "--precision", precision, "--taps", "logits", "-o", &out].ok();
        safetensors::read(&out).unwrap()["logits"].to_f64()
    };
    let error = rel_l2(&trace("fast"), &trace("exact"));
    assert!(error > 0.0 && error < 1e-2, "{error:e}");
}

// ---- chat

#[test]
fn chat_answers_every_turn() {
    let chat = |input: &str| moewe!["chat", demo(), "-n", "12", "-t", "0", "--ignore-eos"].stdin(input).ok();
    let said = chat("Write a proverb.\nAnd another one.\n");
    assert_eq!(said.stderr, "");
    let first = chat("Write a proverb.\n").stdout;
    assert!(first.trim().len() > 5 && said.stdout.len() > first.len() && said.stdout.starts_with(&first), "{said:?}");
    // What was forgotten has no influence; an empty line is none; /quit ends it.
    assert!(chat("Hello\n/clear\n\nWrite a proverb.\n/quit\nAnd another one.\n").stdout.ends_with(&first));
    assert_eq!(chat("").stdout, "");
    let system = moewe!["chat", demo(), "-n", "12", "-t", "0", "--ignore-eos", "--system", "You are a king."];
    assert!(!system.stdin("Write a proverb.\n").ok().stdout.is_empty());
}

// ---- trace

#[test]
fn traces_are_the_golden_ones() {
    for (model, name, chunk) in [
        (golden("v3-tiny"), "len7", "64"),
        (golden("v3-tiny"), "len64", "5"),
        (tiny_bundle().to_owned(), "len1", "1"),
        (tiny_bundle().to_owned(), "len64", "64"),
    ] {
        let (ids, _, file) = sequence(name);
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("trace.safetensors");
        moewe!["trace", &model, "--tokens", &ids, "-o", &out, "--prefill-chunk", chunk].ok();
        let (want, found) = (safetensors::read(&file).unwrap(), safetensors::read(&out).unwrap());
        let names: BTreeSet<&String> = want.keys().filter(|name| !name.starts_with("extra.")).collect();
        assert_eq!(found.keys().collect::<BTreeSet<_>>(), names);
        for (name, found) in &found {
            let want = &want[name];
            assert_eq!((found.dtype, &found.shape), (want.dtype, &want.shape), "{name}");
            let (found, numbers) = (found.to_f64(), want.to_f64());
            if want.dtype == Dtype::I32 {
                assert_eq!(found, numbers, "{name}");
            } else {
                let error = rel_l2(&found, &numbers);
                assert!(error <= TOLERANCE, "{name} is off by {error:e}");
            }
        }
        assert_eq!(listing(temp.path()).len(), 1, "only the trace");
    }
}

#[test]
fn taps_choose_tensors() {
    let out = root().join("taps.safetensors");
    let taps = |taps: &str| -> Vec<String> {
        let said = moewe!["trace", tiny_bundle(), "--tokens", "1,2,3", "-o", &out, "--taps", taps, "--json"].json();
        assert_eq!(said["file"], out.to_str().unwrap());
        let listed: Vec<_> = said["tensors"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
        let stored = safetensors::read(&out).unwrap();
        assert_eq!(stored.keys().map(String::as_str).collect::<BTreeSet<_>>(), listed.iter().copied().collect());
        listed.into_iter().map(str::to_owned).collect()
    };
    assert_eq!(taps("logits"), ["logits"]);
    assert_eq!(taps("hidden"), ["hidden.0", "hidden.1", "hidden.2", "hidden.3", "hidden.4"]);
    assert_eq!(taps("moe.3,mla.0.c_kv"), ["mla.0.c_kv", "moe.3.ids", "moe.3.router_logits", "moe.3.weights"]);
    assert_eq!(taps("mtp"), ["mtp.1.hidden", "mtp.1.input_ids", "mtp.1.logits"]);
    // A text goes too.
    let said = moewe!["trace", demo(), "The king", "-o", &out, "--taps", "final_norm", "--json"].json();
    assert_eq!(said["tensors"], json!([{"name": "final_norm", "dtype": "F32", "shape": [3, 192]}]));
    // One token more than a batch has, without and with the MTP layer.
    let many = ["7"; 257].join(",");
    for taps in ["input_ids", "input_ids,mtp.1.hidden"] {
        let said = moewe!["trace", demo(), "--tokens", many, "-o", &out, "--taps", taps, "--json"].json();
        assert_eq!(said["tensors"][0], json!({"name": "input_ids", "dtype": "I32", "shape": [257]}), "{taps}");
    }
}

// ---- compile

fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = listing(dir).into_iter().map(|(path, _)| path).filter(|path| path.is_file());
    files.map(|path| (path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap())).collect()
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "deeper/b"].map(|name| temp.path().join(name));
    for (options, checkpoint) in [(vec![], demo()), (vec!["--reference-weights"], golden("v3-fp8-tiny"))] {
        for out in [&a, &b] {
            let mut args = vec!["compile".into(), checkpoint.clone().into(), "-o".into(), out.into()];
            args.extend(options.iter().map(Into::into));
            cli::Call::new(args).ok();
        }
        let first = contents(&a);
        assert!(first.len() > 20 && first == contents(&b));
    }
}

#[test]
fn weights_can_be_converted_or_left_where_they_are() {
    let temp = tempfile::tempdir().unwrap();
    let (ids, greedy, _) = sequence("len7");
    for (options, bytes, exact) in [
        (vec!["--reference-weights"], 100_000, true),
        (vec!["--weights", "f32"], 3_000_000, true),
        (vec!["--weights", "bf16"], 1_600_000, false),
        (vec!["--weights", "f16"], 1_600_000, false),
    ] {
        let out = temp.path().join("out");
        let mut args = vec!["compile".into(), golden("v3-tiny").into(), "-o".into(), out.clone().into()];
        args.extend(options.iter().chain(&["--target", "lavapipe", "--json"]).map(Into::into));
        let said = cli::Call::new(args).json();
        assert_eq!((&said["target"], &said["warnings"]), (&json!("lavapipe"), &json!([])));
        let weights =
            listing(&out).into_iter().filter(|(path, _)| path.extension().is_some_and(|e| e == "safetensors"));
        assert!(weights.map(|(_, bytes)| bytes).sum::<u64>() < bytes, "{options:?}");
        let run = moewe!["run", &out, "--tokens", &ids, "--ignore-eos", "-n", "32", "--json"].json();
        if exact {
            assert_eq!(run["tokens"], json!(greedy), "{options:?}");
        }
    }
}

#[test]
fn the_largest_model_is_planned_in_seconds() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("v3");
    let begun = std::time::Instant::now();
    moewe!["compile", preset("v3.json"), "--plan-only", "-o", &out, "--target", "hopper"].ok();
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
    let said = moewe!["explain", &out, "--json", "--tokens", "4"].json();
    assert_eq!(said["target"], "hopper");
    let layers = said["programs"][0]["layers"].as_array().unwrap();
    assert_eq!(layers.iter().filter(|layer| layer["layer"].is_number()).count(), 61);
}

// ---- inspect, explain, doctor

#[test]
fn inspect_counts_the_published_numbers() {
    let said = moewe!["inspect", preset("v3.json"), "--json"].json();
    let billions = |what: &str| said["parameters"][what].as_f64().unwrap() / 1e9;
    assert!((billions("total") - 671.0).abs() < 0.1 && (billions("active") - 37.0).abs() < 0.7, "{said}");
    assert_eq!(said["latent_cache"]["numbers_per_token_per_layer"], 576);
    let said = moewe!["inspect", preset("v3.json"), "--gpu", "h200", "--price-per-gpu-hour", "3", "--json"].json();
    assert!(said["gpu"]["floors"].as_array().unwrap().len() > 5);
    for model in [golden("v3-tiny"), tiny_bundle().to_owned(), golden("v3-tiny/config.json")] {
        let said = moewe!["inspect", model, "--json"].json();
        assert_eq!(said["parameters"]["total"], 458_096);
    }
    assert!(moewe!["inspect", demo()].ok().stdout.contains("Assumptions"));
}

#[test]
fn explain_shows_every_layer_and_no_cpu_visit() {
    let said = moewe!["explain", tiny_bundle(), "--json"].json();
    let programs = said["programs"].as_array().unwrap();
    assert!(programs.iter().all(|program| program["cpu_visits"] == 0));
    let forward = programs.iter().find(|program| program["program"] == "forward").unwrap();
    let layers = forward["layers"].as_array().unwrap();
    let numbered: Vec<u64> = layers.iter().filter_map(|layer| layer["layer"].as_u64()).collect();
    assert_eq!(numbered, [0, 1, 2, 3]);
    let count = |layer: &Value| layer["dispatches"].as_u64().unwrap();
    assert_eq!(layers.iter().map(count).sum::<u64>(), forward["dispatches"].as_u64().unwrap());
    for layer in layers {
        assert_eq!(layer["steps"].as_array().unwrap().len() as u64, count(layer));
        for step in layer["steps"].as_array().unwrap() {
            assert!(step["why"].as_str().unwrap().len() > 5 && step["bytes"].as_u64().unwrap() > 0, "{step}");
        }
    }
    let text = moewe!["explain", tiny_bundle()].ok().stdout;
    assert!(text.contains("CPU visits between its tokens and dispatches: none") && text.contains("layer 3"));
    // Drafting adds a dispatch to forward passes, and passes of its own.
    let drafting = |program: &str| {
        let program = programs.iter().find(|other| other["program"] == program).unwrap();
        program["drafting_dispatches"].as_u64().unwrap()
    };
    assert_eq!((drafting("forward") > 0, drafting("trace"), drafting("draft 1")), (true, 0, 0));
    let draft = programs.iter().find(|program| program["program"] == "draft 1").unwrap()["dispatches"].to_string();
    assert!(text.contains("Drafting") && text.contains(&format!("(draft 1: {draft}, again for each further one)")));
    let plain = root().join("v2.moewe");
    moewe!["compile", golden("v2-tiny"), "-o", &plain].ok();
    assert!(!moewe!["explain", plain].ok().stdout.contains("Drafting"));
}

#[test]
fn doctor_shows_devices() {
    let said = moewe!["doctor", "--json"].json();
    let devices = said["devices"].as_array().unwrap();
    let chosen = &devices[said["chosen"].as_u64().unwrap() as usize];
    for field in ["name", "driver", "max_binding_bytes", "subgroup_size", "shader_f16", "workgroup_bytes"] {
        assert!(!chosen[field].is_null(), "{field}");
    }
    for number in ["/copy_gigabytes_per_second/kernel", "/copy_gigabytes_per_second/driver", "/dispatch_microseconds"] {
        assert!(said.pointer(number).unwrap().as_f64().unwrap() > 0.0, "{number}");
    }
    let text = moewe!["doctor"].ok().stdout;
    let name = chosen["name"].as_str().unwrap();
    assert!(text.contains(name) && text.contains("compiled for"));
    let list = moewe!["run", "--device", "list"].ok().stdout;
    assert_eq!(list.lines().count(), devices.len());
    assert!(list.contains(name));
    // By number or by a part of the name.
    let part = &name[..name.len().min(6)].to_uppercase();
    for device in [&said["chosen"].to_string(), part] {
        moewe!["run", tiny_bundle(), "--tokens", "1", "-n", "1", "--device", device].ok();
    }
}

// ---- synth

#[test]
fn synthesised_checkpoints_run() {
    let temp = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| temp.path().join(name));
    let scale = "layers=2,hidden=128,vocab=512,num_attention_heads=4,q_lora_rank=64,intermediate_size=256,\
                 moe_intermediate_size=64,num_nextn_predict_layers=1";
    for out in [&a, &b] {
        let said = moewe!["synth", "--like", "v3", "--scale", scale, "--seed", "5", "-o", out, "--json"].json();
        assert_eq!(said["checkpoint"], out.to_str().unwrap());
    }
    assert_eq!(contents(&a), contents(&b));
    let run = || moewe!["run", &a, "--tokens", "1,2,3", "-n", "5", "--ignore-eos", "--json"];
    let said = run().env("MOEWE_CACHE", temp.path().join("cache")).json();
    assert_eq!(said["tokens"].as_array().unwrap().len(), 5);
}

// ---- help

#[test]
fn help_texts() {
    for command in [
        "", "run", "chat", "view", "trace", "compile", "inspect", "explain", "doctor", "synth", "serve", "tune",
        "usage",
    ] {
        let mut args: Vec<std::ffi::OsString> = Vec::new();
        args.extend((!command.is_empty()).then(|| command.into()));
        args.push("--help".into());
        let said = cli::Call::new(args).ok();
        assert!(said.stdout.lines().all(|line| line.chars().count() <= 100), "{}", said.stdout);
        insta::assert_snapshot!(format!("help_{}", if command.is_empty() { "moewe" } else { command }), said.stdout);
    }
    // No command at all is answered by the help, too, but it is a mistake.
    let said = moewe![].run();
    assert_eq!(said.code, Some(2));
    assert!(said.stderr.contains("Commands:") && said.stderr.contains("Examples:"));
    assert!(moewe!["--version"].ok().stdout.starts_with("moewe 0."));
}
