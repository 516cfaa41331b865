//! Whole models cut, converted, referenced and shaped in other ways: other profiles, binding limits, weight formats,
//! precisions and batches give the same numbers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

#[path = "common/golden.rs"]
mod common;

use common::{Golden, TOLERANCE, bundle, check, compare_tensor, gpu, greedy, options, profile, session};
use moewe::trace::{self, Numbers, Tensors};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_compiler::synth::{self, Shape, Storage};
use moewe_oracle::{Data, Tensor, numeric, safetensors};
use moewe_plan::{Bundle, Precision, ProgramKind, Sampling, WeightFormat};
use moewe_runtime::{Batch, Model, Session, SessionOptions, Words};

// ---- binding limits ----

fn limited(max_binding_bytes: u64) -> Profile {
    Profile { max_binding_bytes, ..profile("lavapipe") }
}

/// The smallest binding limit that a checkpoint can be compiled for, found by doing what the error says.
fn smallest_limit(dir: &Path) -> u64 {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut limit = 1024;
    loop {
        let temp = tempfile::tempdir().unwrap();
        let options = Options { plan_only: true, ..options(limited(limit)) };
        let Err(error) = compile(&checkpoint, &options, &temp.path().join("bundle"), &|_, _| ()) else { return limit };
        let message = error.to_string();
        let advice = message.split_once("at least ").unwrap_or_else(|| panic!("no advice: {message}")).1;
        let next: u64 = advice.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("no number: {message}"));
        assert!(next > limit, "advice that does not help: {message}");
        limit = next;
    }
}

/// Number of shards of weights by the end of their names, the least where several are called so.
fn shards(bundle: &Bundle) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for weight in &bundle.plan.weights {
        let kind = weight.name.trim_end_matches(".weight").rsplit('.').next().unwrap();
        let kind = if weight.name.contains('*') { format!("experts.{kind}") } else { kind.to_owned() };
        let least = all.entry(kind).or_insert(usize::MAX);
        *least = weight.shards.len().min(*least);
    }
    all
}

#[track_caller]
fn assert_cut(bundle: &Bundle, kinds: &[&str]) {
    let shards = shards(bundle);
    for kind in kinds {
        let count = shards.get(*kind).unwrap_or_else(|| panic!("no weight {kind} among {:?}", shards.keys()));
        assert!(*count > 1, "{kind} is whole");
    }
}

/// At the smallest limit a sequence has one page or two, so only the shorter ones fit.
#[test]
fn golden_models_at_the_smallest_limit() {
    let cut_everywhere = ["embed_tokens", "experts.gate_proj", "experts.up_proj", "experts.down_proj"];
    let models: [(&str, &[&str]); 4] = [
        ("golden/v3-tiny", &["lm_head", "head", "gate_proj", "up_proj", "down_proj", "q_b_proj", "o_proj", "eh_proj"]),
        ("golden/v3-fp8-tiny", &["lm_head", "head", "gate_proj", "up_proj", "down_proj", "o_proj", "eh_proj"]),
        ("golden/kimi-k2-tiny", &["lm_head", "gate", "gate_proj", "up_proj", "down_proj"]),
        ("data/v3-odd-tiny", &["head", "eh_proj"]),
    ];
    for (dir, cut) in models {
        let golden = Golden::open(dir);
        let limit = smallest_limit(&golden.dir);
        let temp = tempfile::tempdir().unwrap();
        let options = options(limited(limit));
        let compiled = bundle(&golden.dir, &temp.path().join("bundle"), &options);
        let largest = compiled.plan.weights.iter().flat_map(|weight| {
            let slice = weight.slice_bytes().unwrap();
            weight.shards.iter().map(move |shard| shard.count * slice)
        });
        assert!(largest.max().unwrap() <= limit);
        // A page of latents of the odd model is larger than its experts.
        assert_cut(&compiled, &cut_everywhere[..if dir == "data/v3-odd-tiny" { 1 } else { 4 }]);
        let shards = shards(&compiled);
        println!("{dir} at {limit} bytes: {shards:?}");
        let any = |kind: &&str| {
            compiled.plan.weights.iter().any(|w| w.name.ends_with(&format!("{kind}.weight")) && w.shards.len() > 1)
        };
        assert!(cut.iter().all(any), "{dir}: {:?} whole", cut.iter().filter(|kind| !any(kind)).collect::<Vec<_>>());
        let checked = check(&golden, &options, None, &[None, Some(5)]);
        assert!(checked.len() >= 2, "{dir}: only {checked:?} fit");
    }
}

#[test]
fn golden_model_over_several_pages_at_a_low_limit() {
    let golden = Golden::open("golden/v3-tiny");
    let checked = check(&golden, &options(limited(40960)), None, &[None, Some(64)]);
    assert_eq!(checked.len(), golden.sequences.len());
}

/// A checkpoint of random weights.
fn synthetic(dir: &Path, base: &str, overrides: &[&str], storage: Storage, seed: u64) {
    let shape = Shape::new(base, overrides, Some(storage)).unwrap();
    synth::write(&shape, dir, synth::Options { seed, ..synth::Options::default() }, &|_, _| ()).unwrap();
}

/// Compares a trace with one of the oracle; returns the worst relative L2 error.
fn compare_trace(what: &str, got: &Tensors, want: &moewe_oracle::Trace, tolerance: f64) -> f64 {
    assert!(want.len() >= 10, "{what}: only {} tensors", want.len());
    want.iter().map(|(name, tensor)| compare_tensor(what, got, name, tensor, tolerance)).fold(0.0, f64::max)
}

fn trace_all(model: &Arc<Model>, ids: &[u32], precision: Precision) -> Tensors {
    let kinds = trace::kinds(model.plan().model.mtp_modules);
    trace::trace(&mut session(model, kinds, None, precision), ids, None, &|_| true).unwrap()
}

/// Every kind of weight in several shards, latent up-projection by heads included.
#[test]
fn every_kind_of_weight_is_cut() {
    let small = [
        "layers=2",
        "hidden=64",
        "vocab=1200",
        "experts=16",
        "intermediate_size=640",
        "moe_intermediate_size=48",
        "n_shared_experts=8",
        "n_group=4",
        "topk_group=2",
        "num_experts_per_tok=4",
        "num_attention_heads=24",
        "qk_nope_head_dim=16",
        "qk_rope_head_dim=16",
        "v_head_dim=14",
        "kv_lora_rank=60",
        "q_lora_rank=48",
        "first_k_dense_replace=1",
        "max_position_embeddings=256",
        "num_nextn_predict_layers=1",
        "rope_scaling.original_max_position_embeddings=64",
    ];
    let ids: Vec<u32> = (0..40).map(|i| (i * i * 31 + 7 * i + 3) % 1200).collect();
    for (storage, limit) in [(Storage::F32, 20480), (Storage::Fp8, 20480)] {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("checkpoint");
        synthetic(&dir, "v3", &small, storage, 5);
        let compiled = bundle(&dir, &temp.path().join("bundle"), &options(limited(limit)));
        println!("{storage:?} at {limit} bytes: {:?}", shards(&compiled));
        assert_cut(
            &compiled,
            &[
                "embed_tokens",
                "lm_head",
                "gate_proj",
                "up_proj",
                "down_proj",
                "experts.gate_proj",
                "experts.up_proj",
                "experts.down_proj",
                "q_b_proj",
                "kv_b_proj",
                "o_proj",
            ],
        );
        let model = Model::load(&gpu(), &compiled, &|_| ()).unwrap();
        let oracle = moewe_oracle::Model::load(&dir).unwrap();
        let worst = compare_trace(
            &format!("{storage:?}"),
            &trace_all(&model, &ids, Precision::Exact),
            &oracle.trace(&ids),
            TOLERANCE,
        );
        let mut generating = session(&model, vec![ProgramKind::Forward], None, Precision::Exact);
        assert_eq!(greedy(&mut generating, &ids, 8, Some(7)), oracle.greedy(&ids, 8), "{storage:?}");
        println!("{storage:?}: worst relative L2 {worst:.1e}");
    }
}

/// The software driver's own limit of 128 MiB: an embedding, which is the head too, of 200 MiB.
#[test]
fn two_hundred_mebibytes_of_embedding_and_head() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("checkpoint");
    let shape = [
        "layers=1",
        "hidden=512",
        "tie_word_embeddings=true",
        "intermediate_size=128",
        "moe_intermediate_size=64",
        "experts=8",
        "num_attention_heads=2",
        "kv_lora_rank=64",
        "max_position_embeddings=256",
    ];
    synthetic(&dir, "v2-lite", &shape, Storage::F32, 1);
    let options = Options { reference: true, ..options(profile("lavapipe")) };
    let compiled = bundle(&dir, &temp.path().join("bundle"), &options);
    let embedding = compiled.plan.weights.iter().find(|weight| weight.name.contains("embed")).unwrap();
    assert_eq!(embedding.bytes(), 102_400 * 512 * 4);
    let counts: Vec<u64> = embedding.shards.iter().map(|shard| shard.count).collect();
    assert_eq!(counts, [65536, 36864]);
    // Ids on both sides of the cut.
    let ids = [65535, 65536, 102_399, 0];
    let model = Model::load(&gpu(), &compiled, &|_| ()).unwrap();
    let traced = trace_all(&model, &ids, Precision::Exact);
    let want = moewe_oracle::Model::load(&dir).unwrap().trace(&ids);
    let worst = compare_trace("200 MiB", &traced, &want, TOLERANCE);
    println!("200 MiB: worst relative L2 {worst:.1e}");
}

// ---- profiles ----

fn check_profile(dir: &str, profile: Profile, kernel: &str) {
    let golden = Golden::open(dir);
    let temp = tempfile::tempdir().unwrap();
    let options = options(profile);
    let compiled = bundle(&golden.dir, &temp.path().join("bundle"), &options);
    let shared = compiled.plan.kernels.iter().filter(|k| k.name.split(['.', '_']).any(|part| part == kernel)).count();
    assert!(shared > 5, "only {shared} kernels add up by {kernel}");
    assert_eq!(compiled.plan.requirements.subgroup_invocations, if kernel == "subgroup" { 8 } else { 0 });
    let checked = check(&golden, &options, Some(8), &[None, Some(5)]);
    assert_eq!(checked.len(), golden.sequences.len());
}

#[test]
fn generic_vulkan() {
    check_profile("golden/v3-tiny", profile("generic-vulkan"), "lanes");
    check_profile("data/v3-odd-tiny", profile("generic-vulkan"), "lanes");
}

#[test]
fn webgpu() {
    check_profile("golden/v3-fp8-tiny", profile("webgpu"), "lanes");
    check_profile("data/v2-odd-tiny", profile("webgpu"), "lanes");
}

/// Subgroups of 8, as the software driver has them.
#[test]
fn subgroups() {
    let eight = Profile {
        name: "subgroups".into(),
        subgroup_size: Some(8),
        lanes: 8,
        pool_inputs: false,
        workgroup: 64,
        token_tile: 4,
        ..profile("lavapipe")
    };
    check_profile("golden/v2-tiny", eight.clone(), "subgroup");
    check_profile("golden/v3-fp8-tiny", eight, "subgroup");
}

// ---- weights ----

#[test]
fn weights_converted_to_f32_give_the_same_numbers() {
    for dir in ["golden/v3-fp8-tiny", "golden/v3-bf16-tiny", "data/v3-odd-tiny", "data/v2-odd-tiny"] {
        let golden = Golden::open(dir);
        let options = Options { weights: Some(WeightFormat::F32), ..options(profile("lavapipe")) };
        let temp = tempfile::tempdir().unwrap();
        let compiled = bundle(&golden.dir, &temp.path().join("bundle"), &options);
        let kept: Vec<&str> =
            compiled.plan.weights.iter().filter(|w| w.format != WeightFormat::F32).map(|w| w.name.as_str()).collect();
        assert!(kept.iter().all(|name| name.ends_with("mlp.gate.weight")), "{dir}: {kept:?} were not converted");
        assert_eq!(check(&golden, &options, Some(8), &[None]).len(), golden.sequences.len());
    }
}

/// A copy of a checkpoint in f32 with all matrices but routers rounded.
fn rounded(from: &Path, to: &Path, round: fn(f32) -> f32) {
    std::fs::create_dir(to).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let tensors = safetensors::read(&from.join("model.safetensors")).unwrap();
    let tensors: Vec<(String, Tensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let mut tensor = tensor.to_tensor();
            let Data::F64(numbers) = &mut tensor.data else { panic!("{name} has no numbers") };
            if tensor.shape.len() == 2 && !name.ends_with("mlp.gate.weight") {
                for number in numbers {
                    *number = round(*number as f32).into();
                }
            }
            (name, tensor)
        })
        .collect();
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    safetensors::write(&to.join("model.safetensors"), tensors).unwrap();
}

#[test]
fn weights_converted_to_16_bits_are_the_rounded_ones() {
    let golden = Golden::open("golden/v3-tiny");
    let bf16 = |x| numeric::bf16_to_f32(numeric::f32_to_bf16(x));
    let f16 = |x| numeric::f16_to_f32(numeric::f32_to_f16(x));
    for (format, round) in [(WeightFormat::Bf16, bf16 as fn(f32) -> f32), (WeightFormat::F16, f16)] {
        let temp = tempfile::tempdir().unwrap();
        rounded(&golden.dir, &temp.path().join("rounded"), round);
        let oracle = moewe_oracle::Model::load(temp.path().join("rounded")).unwrap();
        let options = Options { weights: Some(format), ..options(profile("lavapipe")) };
        let compiled = bundle(&golden.dir, &temp.path().join("bundle"), &options);
        assert!(compiled.plan.weights.iter().filter(|weight| weight.format == format).count() > 20);
        let model = Model::load(&gpu(), &compiled, &|_| ()).unwrap();
        for name in ["len7", "len64"] {
            let ids = &golden.sequence(name).ids;
            let traced = trace_all(&model, ids, Precision::Exact);
            let worst = compare_trace(&format!("{format:?} {name}"), &traced, &oracle.trace(ids), TOLERANCE);
            println!("{format:?} {name}: worst relative L2 {worst:.1e}");
        }
        // Rounding itself is visible, so something was rounded.
        let exact = safetensors::read(&golden.sequence("len7").file).unwrap()["logits"].to_f64();
        let got = logits(&trace_all(&model, &golden.sequence("len7").ids, Precision::Exact));
        assert!(moewe_oracle::rel_l2(&got, &exact) > TOLERANCE);
    }
}

/// The golden kit has logits of the FP8 checkpoint with dequantised weights rounded to bf16.
#[test]
fn fp8_converted_to_bf16() {
    let golden = Golden::open("golden/v3-fp8-tiny");
    let options = Options { weights: Some(WeightFormat::Bf16), ..options(profile("lavapipe")) };
    let temp = tempfile::tempdir().unwrap();
    let compiled = bundle(&golden.dir, &temp.path().join("bundle"), &options);
    let model = Model::load(&gpu(), &compiled, &|_| ()).unwrap();
    let mut compared = 0;
    for sequence in &golden.sequences {
        let tensors = safetensors::read(&sequence.file).unwrap();
        let Some(want) = tensors.get("extra.logits_bf16_weights") else { continue };
        let error = moewe_oracle::rel_l2(&logits(&trace_all(&model, &sequence.ids, Precision::Exact)), &want.to_f64());
        println!("FP8 as bf16, {}: relative L2 {error:.1e}", sequence.name);
        assert!(error <= TOLERANCE, "{}: {error:e}", sequence.name);
        compared += 1;
    }
    assert!(compared > 0, "no golden file has these logits");
}

fn logits(tensors: &Tensors) -> Vec<f64> {
    let Numbers::F32(numbers) = &tensors["logits"].data else { panic!("logits are numbers") };
    numbers.iter().map(|&number| number.into()).collect()
}

#[test]
fn referenced_weights_give_the_same_bits_as_copied_ones() {
    for dir in ["golden/v3-tiny", "golden/v3-fp8-tiny", "golden/v3-bf16-tiny-sharded"] {
        let golden = Golden::open(dir);
        let temp = tempfile::tempdir().unwrap();
        let mut results = Vec::new();
        for reference in [false, true] {
            let options = Options { reference, ..options(profile("lavapipe")) };
            let compiled = bundle(&golden.dir, &temp.path().join(format!("{reference}")), &options);
            assert_eq!(compiled.plan.files.iter().any(|file| file.referenced), reference, "{dir}");
            let model = Model::load(&gpu(), &compiled, &|_| ()).unwrap();
            results.push(trace_all(&model, &golden.sequence("len7").ids, Precision::Exact));
        }
        assert!(results[0].len() > 10);
        assert_eq!(results[0], results[1], "{dir}");
    }
}

// ---- precision ----

/// f16 latents have 11 bits. Relative L2 of the logits of a sequence was 2e-4 to 5e-4 on the software driver, and every
/// greedy token the same; the bound leaves room for a token that is routed otherwise.
const FAST_TOLERANCE: f64 = 5e-3;

#[test]
fn fast_precision_is_close() {
    let golden = Golden::open("golden/v3-tiny");
    let temp = tempfile::tempdir().unwrap();
    let compiled = bundle(&golden.dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
    let model = Model::load(&gpu(), &compiled, &|_| ()).unwrap();
    let mut generating = session(&model, vec![ProgramKind::Forward], None, Precision::Fast);
    let (mut same, mut all) = (0, 0);
    for sequence in &golden.sequences {
        let want = safetensors::read(&sequence.file).unwrap()["logits"].to_f64();
        let error = moewe_oracle::rel_l2(&logits(&trace_all(&model, &sequence.ids, Precision::Fast)), &want);
        let tokens = greedy(&mut generating, &sequence.ids, sequence.greedy.len(), None);
        let equal = tokens.iter().zip(&sequence.greedy).take_while(|(a, b)| a == b).count();
        println!("fast, {}: relative L2 {error:.1e}, {equal} of {} greedy tokens", sequence.name, tokens.len());
        assert!(error <= FAST_TOLERANCE, "{}: {error:e}", sequence.name);
        assert!(error > 1e-6, "{}: latents were not rounded", sequence.name);
        same += equal;
        all += tokens.len();
    }
    assert!(same * 10 >= all * 9, "only {same} of {all} greedy tokens");
}

// ---- batches ----

fn several(model: &Arc<Model>, kinds: Vec<ProgramKind>) -> Session {
    let options = SessionOptions { kinds, max_sequences: 3, ..SessionOptions::default() };
    Session::new(model.clone(), options).unwrap()
}

/// Logits of the last run, a row for each token.
fn rows(session: &Session) -> Vec<Vec<u32>> {
    let tap = session.read_tap(ProgramKind::Trace, "logits").unwrap();
    let Words::F32(numbers) = tap.data else { panic!("logits are numbers") };
    numbers.chunks(tap.shape[1]).map(|row| row.iter().map(|number| number.to_bits()).collect()).collect()
}

/// Sequences of different lengths in one batch, their tokens mixed, do not touch one another.
#[test]
fn ragged_batches_give_the_same_bits_as_lone_sequences() {
    let golden = Golden::open("golden/v3-tiny");
    let prompts: Vec<Vec<u32>> = ["len64", "len1", "len7"].map(|name| golden.sequence(name).ids.clone()).into();
    let temp = tempfile::tempdir().unwrap();
    for profile in [profile("lavapipe"), profile("generic-vulkan")] {
        let out = temp.path().join(&profile.name);
        let model = Model::load(&gpu(), &bundle(&golden.dir, &out, &options(profile)), &|_| ()).unwrap();

        let mut tracing = several(&model, vec![ProgramKind::Trace]);
        let ids: Vec<_> = prompts.iter().map(|ids| tracing.add_sequence(ids, Sampling::default()).unwrap()).collect();
        let mut mixed = Vec::new();
        for position in 0..64 {
            for (id, prompt) in ids.iter().zip(&prompts) {
                if position < prompt.len() {
                    mixed.extend(Batch::of(*id, &prompt[position..=position], position as u32).tokens);
                }
            }
        }
        let batch = Batch { tokens: mixed.clone(), rows: Vec::new() }.with_all_rows();
        tracing.run(ProgramKind::Trace, &batch).unwrap();
        let together = rows(&tracing);
        for (id, prompt) in ids.iter().zip(&prompts) {
            let mut alone = several(&model, vec![ProgramKind::Trace]);
            let lone = alone.add_sequence(prompt, Sampling::default()).unwrap();
            alone.run(ProgramKind::Trace, &Batch::of(lone, prompt, 0).with_all_rows()).unwrap();
            let own = mixed.iter().zip(&together).filter(|(token, _)| token.sequence == id.slot());
            let own: Vec<_> = own.map(|(_, row)| row.clone()).collect();
            assert_eq!(own.len(), prompt.len());
            assert_eq!(own, rows(&alone), "logits of a lone sequence of {} tokens", prompt.len());
        }

        // Prefilled and decoded together they say the same as alone.
        let mut forward = several(&model, vec![ProgramKind::Forward]);
        let ids: Vec<_> = prompts.iter().map(|ids| forward.add_sequence(ids, Sampling::default()).unwrap()).collect();
        let mut tokens: Vec<Vec<u32>> = forward.prefill(&ids, Some(33)).unwrap().into_iter().map(|t| vec![t]).collect();
        for steps in [1, 5, 2, 23] {
            for step in forward.decode(&ids, steps).unwrap() {
                tokens.iter_mut().zip(step).for_each(|(tokens, token)| tokens.push(token));
            }
        }
        for (tokens, name) in tokens.iter().zip(["len64", "len1", "len7"]) {
            assert_eq!(tokens, &golden.sequence(name).greedy, "{name}");
        }
    }
}

// ---- bundles ----

/// All files below a directory with their contents.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().display().to_string();
        if path.is_dir() {
            all.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            all.insert(name, std::fs::read(&path).unwrap());
        }
    }
    all
}

#[test]
fn compiling_twice_gives_the_same_bytes() {
    for dir in ["golden/v3-tiny", "golden/v3-fp8-tiny", "data/v3-odd-tiny"] {
        for weights in [None, Some(WeightFormat::Bf16)] {
            let golden = Golden::open(dir);
            let temp = tempfile::tempdir().unwrap();
            let compile = |name: &str| {
                let out = temp.path().join(name);
                bundle(&golden.dir, &out, &Options { weights, ..options(limited(43000)) });
                files(&out)
            };
            let (first, second) = (compile("first"), compile("second"));
            assert!(first.len() > 10);
            assert!(first.keys().eq(second.keys()), "{dir}: other files");
            for (name, bytes) in &first {
                assert!(*bytes == second[name], "{dir} {weights:?}: {name} differs");
            }
        }
    }
}
