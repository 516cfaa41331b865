//! Counts and floors against published figures and arithmetic done by hand.

use std::path::Path;

use moewe_compiler::{
    checkpoint::Checkpoint,
    config::Config,
    error::Error,
    inspect::{
        Bound, CacheShape, GPUS, Gpu, GpuOptions, Options, Pass, PassCost, Report, Stage, arithmetic, inspect,
        parameters,
    },
    synth::{PRESETS, Shape},
};
use serde_json::Value;

fn preset(name: &str) -> Config {
    let (_, text) = PRESETS.iter().find(|(n, _)| *n == name).unwrap();
    Config::from_json(text, Path::new(name)).unwrap()
}

fn report(config: &Config, options: &Options) -> Report {
    inspect(config, None, options).unwrap()
}

#[track_caller]
fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-12 * b.abs(), "{a} is not {b}");
}

/// DeepSeek's README: 671 B in all, 36.6 B active "including 0.9 B for the output head"; the V3 report calls it 37 B.
#[test]
fn v3_has_671_billion_parameters_and_37_active() {
    let json: Value = serde_json::to_value(report(&preset("v3"), &Options::default())).unwrap();
    assert_eq!(json["parameters"]["total"], 671_026_419_200_u64);
    assert_eq!(json["parameters"]["active"], 36_625_618_432_u64);
    let billions = |v: &Value| (v.as_f64().unwrap() / 1e9).round();
    assert_eq!(
        (billions(&json["parameters"]["total"]) as u32, billions(&json["parameters"]["active"]) as u32),
        (671, 37)
    );
    // Attention, the layer's norms, 256 + 1 experts, router, eh_proj and three norms; published as 11.5 B.
    let attention = 1536 * (7168 + 1 + 24576) + 576 * 7168 + 512 * (1 + 32768) + 7168 * 16384;
    let mtp = attention + 257 * 3 * 7168 * 2048 + 256 * (7168 + 1) + 7168 * 14336 + 5 * 7168_u64;
    assert_eq!(json["parameters"]["mtp"], mtp);
    assert_eq!(json["latent_cache"]["numbers_per_token_per_layer"], 576);
    assert_eq!(json["latent_cache"]["bytes_per_token"], 576.0 * 61.0 * 2.0);
    assert_eq!(json["latent_cache"]["plain_attention_bytes_per_token"], 128.0 * (192.0 + 128.0) * 61.0 * 2.0);
    close(json["latent_cache"]["saved_fraction"].as_f64().unwrap(), 1.0 - 576.0 / 40960.0);
    assert!(json["assumptions"].as_array().unwrap().iter().any(|a| a.as_str().unwrap().contains("one row")));
}

/// Published: V2 236 B and 21 B, V2-Lite 15.7 B and 2.4 B, Kimi K2 1 T and 32 B.
#[test]
fn other_releases() {
    for (name, total, active) in [
        ("v2", 235_741_434_880, 20_851_512_320),
        ("v2-lite", 15_706_484_224, 2_451_435_008),
        ("kimi-k2", 1_026_408_232_448, 31_687_095_808),
    ] {
        let counts = parameters(&preset(name));
        assert_eq!((counts.total, counts.active, counts.mtp), (total, active, 0), "{name}");
        assert_eq!(counts.parts.iter().map(|p| p.total).sum::<u64>(), total);
    }
}

/// The DeepSeek-V2 report: 93.3 % less than DeepSeek 67B (grouped queries, 95 layers) with latents at 6 bits on average.
#[test]
fn v2_saves_93_3_percent_of_the_cache() {
    let v2 = CacheShape::latent(&preset("v2"), 6.0);
    assert_eq!((v2.numbers_per_layer, v2.layers), (576, 60));
    let deepseek_67b = CacheShape::grouped(8, 128, 95, 16.0);
    let saved = v2.saved_against(&deepseek_67b);
    assert_eq!(format!("{:.1}", saved * 100.0), "93.3", "{saved}");
}

#[test]
fn tied_head_counts_once() {
    let tied = Shape::new("v2-lite", &["tie_word_embeddings=true"], None).unwrap().config;
    let (tied, untied) = (parameters(&tied), parameters(&preset("v2-lite")));
    assert_eq!(untied.total - tied.total, 102_400 * 2048);
    assert_eq!(untied.active, tied.active);
}

#[test]
fn bytes_with_and_without_weights_agree() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    for name in ["v3-fp8-tiny", "v3-bf16-tiny-sharded", "v2-tiny"] {
        let checkpoint = Checkpoint::open(&golden.join(name)).unwrap();
        let options = Options { gpu: Some(GpuOptions::new(&GPUS[0])), ..Options::default() };
        let mut stored = inspect(checkpoint.config(), Some(&checkpoint), &options).unwrap();
        let implied = inspect(checkpoint.config(), None, &options).unwrap();
        assert!(stored.tensors.stored && !implied.tensors.stored);
        assert!(stored.gpu.as_ref().unwrap().weight_bytes > 0);
        if name != "v3-bf16-tiny-sharded" {
            stored.tensors.stored = false;
            assert_eq!(stored.tensors, implied.tensors, "{name}");
            assert_eq!(stored.gpu, implied.gpu, "{name}");
        }
        let files: usize = checkpoint.tensors().map(|t| t.data.len()).sum();
        assert_eq!(stored.tensors.bytes, files as u64);
        assert!(stored.tensors.groups.iter().any(|g| g.name == "model.layers.{l}.mlp.experts.{e}.up_proj.weight"));
    }
}

#[test]
fn floors_by_hand() {
    let config = preset("v3");
    let mut gpu = GpuOptions::new(Gpu::named("H200").unwrap());
    gpu.price_per_gpu_hour = Some(2.0);
    gpu.context = 1000;
    let report = report(&config, &Options { gpu: Some(gpu), ..Options::default() });
    let floors = report.gpu.unwrap();
    // 671 GB of FP8 with embeddings, heads and the rest in bf16, and scales: six of 141 GB at 90 %.
    assert!(!floors.fits_one);
    assert_eq!(floors.gpus, 6);
    assert_eq!(floors.floors.iter().map(|f| f.batch).collect::<Vec<_>>(), [1, 2, 4, 8, 16, 32, 64, 128, 256]);

    let one = &floors.floors[0];
    close(one.distinct_experts, 8.0);
    let scale = 1.0 + 4.0 / 16384.0; // one f32 per block of 128 × 128
    let expert = 3.0 * 7168.0 * 2048.0 * scale;
    let attention = (1536.0 * 7168.0 + 24576.0 * 1536.0 + 32768.0 * 512.0 + 7168.0 * 16384.0) * scale
        + 576.0 * 7168.0
        + 5.0 * 56.0 * 4.0; // kv_a has a partial block of rows
    let dense = 61.0 * (attention + 2.0 * (1536.0 + 512.0 + 2.0 * 7168.0))
        + 3.0 * 3.0 * 7168.0 * 18432.0 * scale
        + 58.0 * (expert + 256.0 * (7168.0 * 2.0 + 4.0))
        + 2.0 * 7168.0
        + 2.0 * 129_280.0 * 7168.0;
    let cache = 576.0 * 61.0 * 2.0 * 1000.0;
    let bytes = dense + 58.0 * 8.0 * expert + 7168.0 * 2.0 + cache;
    close(one.bytes, bytes);
    close(one.milliseconds, bytes / (6.0 * 4.8e12) * 1e3);
    close(one.tokens_per_second, 6.0 * 4.8e12 / bytes);
    close(one.dollars_per_million_tokens.unwrap(), 6.0 * 2.0 / 3600.0 * bytes / (6.0 * 4.8e12) * 1e6);

    let two = &floors.floors[1];
    close(two.distinct_experts, 256.0 * (1.0 - (248.0f64 / 256.0).powi(2)));
    for pair in floors.floors.windows(2) {
        assert!(pair[1].bytes > pair[0].bytes && pair[1].distinct_experts < 256.0);
        assert!(pair[1].dollars_per_million_tokens < pair[0].dollars_per_million_tokens);
    }
    let text = report.assumptions.join("\n");
    for part in ["141 GB", "4.8 TB/s", "90 %", "1000 tokens", "evenly and independently", "$2 per hour", "F8_E4M3"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn what_fits() {
    let fits = |name: &str, gpu: &str| {
        let options = Options { gpu: Some(GpuOptions::new(Gpu::named(gpu).unwrap())), ..Options::default() };
        report(&preset(name), &options).gpu.unwrap()
    };
    assert!(fits("v2-lite", "a100").fits_one);
    assert_eq!(fits("v2-lite", "rtx4090").gpus, 2);
    assert_eq!(fits("v3", "h800").gpus, 10);
    assert_eq!(fits("v3", "h20").gpus, 8);
    let dense = Shape::new("v2-lite", &["n_routed_experts=null"], None).unwrap().config;
    let options = Options { gpu: Some(GpuOptions::new(&GPUS[0])), ..Options::default() };
    let floors = report(&dense, &options).gpu.unwrap().floors;
    assert!(floors.iter().all(|f| f.distinct_experts == 0.0 && f.bytes.is_finite()));
}

#[test]
fn options_are_checked() {
    let error = Gpu::named("voodoo2").unwrap_err().to_string();
    assert!(error.contains("\"voodoo2\"") && error.contains("h100, h200, h800, h20"), "{error}");
    let mut gpu = GpuOptions::new(&GPUS[0]);
    gpu.price_per_gpu_hour = Some(-1.0);
    let bad = [
        Options { gpu: Some(gpu), ..Options::default() },
        Options { cache_bits: 0.0, ..Options::default() },
        Options { cache_bits: f64::NAN, ..Options::default() },
    ];
    for options in bad {
        assert!(matches!(inspect(&preset("v2"), None, &options), Err(Error::Argument { .. })), "{options:?}");
    }
}

// ---- passes by part

/// V3 on an H100, against sums made by hand.
#[test]
fn parts_of_a_pass() {
    let (config, gpu) = (preset("v3"), Gpu::named("h100").unwrap());
    let passes = [Pass::decode(1, 4095), Pass::decode(64, 4095), Pass::prefill(4096)];
    let [one, many, prompt] = &arithmetic(&config, None, 16.0, gpu, &passes)[..] else { unreachable!() };
    let of = |cost: &PassCost, stage: Stage| cost.parts.iter().find(|part| part.0 == stage).unwrap().1;

    // A token is multiplied with the active parameters but norms and router biases, and attends to 4096 latents.
    let pair = 2.0 * 61.0 * 128.0 * (576.0 + 512.0);
    let active = parameters(&config);
    let vectors: u64 = 61 * (2 * 7168 + 1536 + 512) + 58 * 256 + 7168;
    close(one.total.flops, 2.0 * (active.active - vectors) as f64 + 4096.0 * pair);
    close(of(one, Stage::LatentCache).flops, 4096.0 * pair);
    close(of(one, Stage::LatentCache).bytes, 4097.0 * 61.0 * 576.0 * 2.0);
    close(of(one, Stage::Head).flops, 2.0 * 129_280.0 * 7168.0);
    close(of(one, Stage::Embedding).bytes, 7168.0 * 2.0);
    // 8 of 256 experts, a byte a number and four for each block of 128².
    let expert = 3.0 * 7168.0 * 2048.0;
    close(of(one, Stage::RoutedExperts).bytes, 58.0 * 8.0 * expert * (1.0 + 4.0 / 16384.0));
    close(of(one, Stage::RoutedExperts).flops, 58.0 * 8.0 * expert * 2.0);
    close(one.total.bytes, one.parts.iter().map(|part| part.1.bytes).sum());

    // 64 tokens compute 64 times as much, and share weights.
    close(many.total.flops, 64.0 * one.total.flops);
    close(many.distinct_experts, 256.0 * (1.0 - (1.0 - 8.0 / 256.0_f64).powi(64)));
    close(of(many, Stage::MlaProjections).bytes, of(one, Stage::MlaProjections).bytes);
    close(of(many, Stage::LatentCache).bytes, 64.0 * of(one, Stage::LatentCache).bytes);
    assert!(many.distinct_experts < 256.0 && many.distinct_experts > 8.0);

    // A prompt's tokens attend to half of it in the mean, and only its last one has logits.
    close(of(prompt, Stage::LatentCache).flops, 4096.0 * 4097.0 / 2.0 * pair);
    close(of(prompt, Stage::Head).flops, of(one, Stage::Head).flops);
    // Each routed expert serves one of 32 tokens, a shared one all.
    assert_eq!(of(prompt, Stage::RoutedExperts).bound, Bound::Bytes);
    assert_eq!(of(prompt, Stage::SharedExperts).bound, Bound::Flops);
    assert_eq!((one.total.bound, prompt.total.bound), (Bound::Bytes, Bound::Flops));
    close(one.total.seconds, one.total.bytes / 3.35e12);
    close(prompt.total.seconds, prompt.total.flops / 989e12);
}

/// A tied head is read in full although a token's embedding is a row of the same tensor.
#[test]
fn a_tied_head_is_read_and_a_model_without_experts_has_none() {
    let scale = ["tie_word_embeddings=true", "n_routed_experts=null", "num_experts_per_tok=null"];
    let shape = Shape::new("v2-lite", &scale, None).unwrap();
    let cost = &arithmetic(&shape.config, None, 16.0, Gpu::named("h100").unwrap(), &[Pass::decode(1, 0)])[0];
    let head = cost.parts.iter().find(|part| part.0 == Stage::Head).unwrap().1;
    close(head.flops, 2.0 * 102_400.0 * 2048.0);
    assert!(cost.parts.iter().all(|part| part.0 != Stage::RoutedExperts));
}
