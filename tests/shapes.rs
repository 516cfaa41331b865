//! Real head, latent, expert and group shapes with random weights, against the oracle.

use moewe::trace::{self, Numbers};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_compiler::synth::{self, Shape};
use moewe_oracle::{Data, rel_l2};
use moewe_plan::{Bundle, ProgramKind, TapChoice, WeightFormat};
use moewe_runtime::{GenerateOptions, Gpu, Model, Selector, Session, SessionOptions, generate};

/// As for the golden files; ids must be identical.
const TOLERANCE: f64 = 2e-5;

/// A small generator of numbers (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.next() as usize % of.len()]
    }
}

/// Traces and generates with a synthesised checkpoint on the device and compares with the oracle. Returns the number of
/// tensors compared.
fn check(like: &str, scale: &[&str], seed: u64, tokens: &[u32]) -> usize {
    check_as(None, like, scale, seed, tokens)
}

/// The same with weights converted to a format that loses nothing.
fn check_as(weights: Option<WeightFormat>, like: &str, scale: &[&str], seed: u64, tokens: &[u32]) -> usize {
    let temp = tempfile::tempdir().unwrap();
    let (dir, out) = (temp.path().join("checkpoint"), temp.path().join("bundle"));
    let shape = Shape::new(like, scale, None).unwrap();
    synth::write(&shape, &dir, synth::Options { seed, ..synth::Options::default() }, &|_, _| ()).unwrap();
    let options = Options {
        profile: Profile::load("lavapipe").unwrap(),
        weights,
        reference: weights.is_none(),
        plan_only: false,
        latents: moewe_plan::Latent::F16,
        taps: TapChoice::none(),
    };
    compile(&Checkpoint::open(&dir).unwrap(), &options, &out, &|_, _| ()).unwrap();
    let bundle = Bundle::open(&out).unwrap();
    let gpu =
        Gpu::open(&Selector::Default).expect("these tests need a Vulkan device; `make setup` installs a software one");
    let model = Model::load(&gpu, &bundle, &|_| ()).unwrap();
    let session = |kinds| {
        Session::new(model.clone(), SessionOptions { kinds, pages: Some(4), ..SessionOptions::default() }).unwrap()
    };
    let traced =
        trace::trace(&mut session(trace::kinds(bundle.plan.model.mtp_modules)), tokens, None, &|_| true).unwrap();
    let options = GenerateOptions { max_new_tokens: 4, ignore_eos: true, ..GenerateOptions::default() };
    let generated =
        generate(&mut session(vec![ProgramKind::Forward]), tokens, &options, |_| std::ops::ControlFlow::Continue(()))
            .unwrap();

    let oracle = moewe_oracle::Model::load(&dir).unwrap();
    let expected = oracle.trace(tokens);
    let mut count = 0;
    for (name, want) in &expected {
        let got = traced.get(name).unwrap_or_else(|| panic!("no tensor {name}"));
        assert_eq!(got.shape, want.shape, "shape of {name}");
        match (&got.data, &want.data) {
            (Numbers::I32(got), Data::I32(want)) => assert_eq!(got, want, "{name}"),
            (Numbers::F32(got), Data::F64(want)) => {
                let got: Vec<f64> = got.iter().map(|&n| f64::from(n)).collect();
                let error = rel_l2(&got, want);
                assert!(error <= TOLERANCE, "{name} is off by {error:e}");
            }
            _ => panic!("type of {name}"),
        }
        count += 1;
    }
    assert_eq!(generated.tokens, oracle.greedy(tokens, 4), "greedy tokens");
    count
}

/// DeepSeek-V3: 128 heads of 128 + 64, q_lora_rank 1536, kv_lora_rank 512, 256 experts in 8 groups, 8 active, FP8.
#[test]
fn deepseek_v3() {
    let scale = [
        "layers=2",
        "first_k_dense_replace=1",
        "hidden=64",
        "vocab=256",
        "intermediate_size=160",
        "moe_intermediate_size=32",
        "num_nextn_predict_layers=1",
    ];
    let shape = Shape::new("v3", &scale, None).unwrap().config;
    assert_eq!((shape.num_attention_heads, shape.q_lora_rank, shape.kv_lora_rank), (128, Some(1536), 512));
    assert_eq!((shape.n_routed_experts, shape.num_experts_per_tok, shape.n_group, shape.topk_group), (256, 8, 8, 4));
    assert!(check("v3", &scale, 3, &[0, 17, 200, 3, 91]) > 18);
}

/// Kimi-K2: 64 heads, 384 experts in one group.
#[test]
fn kimi_k2() {
    let scale = [
        "layers=2",
        "first_k_dense_replace=1",
        "hidden=64",
        "vocab=256",
        "intermediate_size=160",
        "moe_intermediate_size=32",
    ];
    assert!(check("kimi-k2", &scale, 5, &[9, 8, 7]) > 12);
}

/// DeepSeek-V2-Lite: 16 heads without q LoRA, 64 experts, 6 active, 2 shared, hidden size 2048, in FP8; only layers,
/// vocabulary and the width of experts are smaller.
#[test]
fn deepseek_v2_lite() {
    let fp8 = r#"quantization_config={"quant_method":"fp8","fmt":"e4m3","weight_block_size":[128,128]}"#;
    let scale = ["layers=2", "vocab=512", "moe_intermediate_size=176", "intermediate_size=1368", fp8];
    assert!(check("v2-lite", &scale, 7, &[1, 2, 3]) > 12);
}

/// A model of the family whose shapes are all small, odd and drawn at random.
fn random_shape(seed: u64) -> (&'static str, Vec<String>, Vec<u32>) {
    let random = &mut Random(seed);
    let like = random.pick(&["v2-lite", "v2", "v3", "kimi-k2"]);
    let vocab = random.range(11, 150);
    let groups = if matches!(like, "v3" | "v2") { random.range(1, 4) } else { 1 };
    let per_group = random.range(2, 9);
    let topk_group = random.range(1, groups);
    let top_k = random.range(1, (topk_group * per_group).min(6));
    let mut fields = vec![
        format!("layers={}", random.range(1, 3)),
        format!("first_k_dense_replace={}", random.range(0, 1)),
        format!("hidden={}", random.range(5, 90)),
        format!("vocab={vocab}"),
        format!("intermediate_size={}", random.range(3, 150)),
        format!("moe_intermediate_size={}", random.range(3, 60)),
        format!("num_attention_heads={}", random.range(1, 5)),
        format!("qk_nope_head_dim={}", random.range(1, 40)),
        format!("qk_rope_head_dim={}", 2 * random.range(1, 12)),
        format!("v_head_dim={}", random.range(1, 40)),
        format!("kv_lora_rank={}", random.range(1, 140)),
        format!("n_routed_experts={}", groups * per_group),
        format!("n_group={groups}"),
        format!("topk_group={topk_group}"),
        format!("num_experts_per_tok={top_k}"),
        format!("n_shared_experts={}", random.range(0, 2)),
        format!("tie_word_embeddings={}", random.pick(&["true", "false"])),
        format!("attention_bias={}", random.pick(&["true", "false"])),
        format!("rope_interleave={}", random.pick(&["true", "false"])),
        "max_position_embeddings=200".into(),
    ];
    fields.push(match random.range(0, 2) {
        0 => "q_lora_rank=null".into(),
        _ => format!("q_lora_rank={}", random.range(1, 70)),
    });
    if matches!(like, "v3" | "kimi-k2") {
        fields.push(format!("num_nextn_predict_layers={}", random.range(0, 2)));
    }
    let block = [random.range(1, 130), 4 * random.range(1, 32)];
    match random.range(0, 3) {
        0 => fields.push("quantization_config=null".into()),
        _ => fields.push(format!(
            r#"quantization_config={{"quant_method":"fp8","fmt":"e4m3","weight_block_size":[{},{}]}}"#,
            block[0], block[1]
        )),
    }
    let length = random.range(1, 90);
    let tokens = (0..length).map(|_| random.range(0, vocab - 1) as u32).collect();
    (like, fields, tokens)
}

/// Odd shapes that no release has: every dimension small and mostly no multiple of anything.
#[test]
fn random_shapes() {
    for seed in 0..RANDOM_SHAPES {
        let (like, fields, tokens) = random_shape(seed);
        println!("seed {seed}: {like} {fields:?}, {} tokens", tokens.len());
        let scale: Vec<&str> = fields.iter().map(String::as_str).collect();
        assert!(check(like, &scale, seed, &tokens) > 5);
    }
}

/// Matrices of a single row, as stored and converted: they are padded like any other.
#[test]
fn ranks_of_one() {
    let fp8 = r#"quantization_config={"quant_method":"fp8","fmt":"e4m3","weight_block_size":[3,4]}"#;
    let scale = [
        "layers=2",
        "first_k_dense_replace=1",
        "hidden=13",
        "vocab=17",
        "intermediate_size=1",
        "moe_intermediate_size=1",
        "num_attention_heads=1",
        "qk_nope_head_dim=1",
        "qk_rope_head_dim=2",
        "v_head_dim=1",
        "kv_lora_rank=1",
        "q_lora_rank=1",
        "n_routed_experts=4",
        "n_group=2",
        "topk_group=1",
        "num_experts_per_tok=2",
        "num_nextn_predict_layers=1",
        "max_position_embeddings=64",
        fp8,
    ];
    for weights in [None, Some(WeightFormat::F32)] {
        assert!(check_as(weights, "v3", &scale, 11, &[1, 2, 3, 16]) > 18);
    }
}

/// How many: each takes well under a second. More were tried than run every time.
const RANDOM_SHAPES: u64 = 12;
