//! Bundles on disk: what is written is read back; whatever is damaged or hostile is refused with an error, never a
//! panic, a crash or a file from outside.

use std::fs;
use std::path::{Path, PathBuf};

use moewe_plan::{
    Access, Binding, BindingLayout, Buffer, Bundle, Cost, DType, Dim, Entry, Error, FORMAT_VERSION, Indirect, Kernel,
    MANIFEST, Manifest, ModelInfo, PLAN, Parameter, ParameterKind, Plan, Precision, Program, ProgramKind, Requirements,
    Role, Segment, Shard, Staging, Step, Symbol, Symbols, TapGroup, TapSpec, Weight, WeightFile, WeightFiles,
    WeightFormat, When, hash_file,
};
use proptest::prelude::*;

const KERNEL: &str = "@compute @workgroup_size(1) fn main() {}";
const WEIGHTS: &str = "weights-0.safetensors";
const TOKENIZER: &str = "tokenizer.json";

fn plan() -> Plan {
    let weights = vec![7u8; 40];
    Plan {
        format_version: FORMAT_VERSION,
        generator: "test 1".into(),
        model: ModelInfo {
            architecture: "TestLM".into(),
            checkpoint: "none".into(),
            vocab_size: 10,
            max_context: 128,
            eos_token_ids: vec![1, 2],
            layers: 1,
            moe_layers: vec![0],
            experts: 2,
            num_experts_per_tok: 1,
            n_group: 2,
            topk_group: 1,
            n_shared_experts: 1,
            hidden_size: 8,
            num_attention_heads: 2,
            kv_lora_rank: 4,
            qk_rope_head_dim: 2,
            qk_nope_head_dim: 3,
            v_head_dim: 5,
            softmax_scale: 0.25,
            mtp_modules: 1,
        },
        warnings: Vec::new(),
        fast_latents: moewe_plan::Latent::F16,
        requirements: Requirements {
            profile: "test".into(),
            tuned_on: None,
            max_binding_bytes: 1 << 20,
            storage_buffers: 3,
            workgroup_invocations: 64,
            workgroup_bytes: 1024,
            subgroup_invocations: 0,
            cooperative: 0,
        },
        files: vec![WeightFile { path: WEIGHTS.into(), referenced: false, bytes: 40, blake3: hash_file(&weights) }],
        weights: vec![Weight {
            name: "w".into(),
            format: WeightFormat::Bf16,
            shape: vec![4, 3],
            shards: vec![
                Shard { first: 0, count: 1, segments: vec![Segment { file: 0, offset: 8, bytes: 8 }] },
                Shard {
                    first: 1,
                    count: 3,
                    segments: vec![
                        Segment { file: 0, offset: 16, bytes: 5 },
                        Segment { file: 0, offset: 21, bytes: 19 },
                    ],
                },
            ],
        }],
        buffers: vec![
            Buffer { name: "batch".into(), dtype: DType::U32, elements: Dim::Const(8), role: Role::Header },
            Buffer {
                name: "x".into(),
                dtype: DType::F32,
                elements: Dim::Times(Symbol::Tokens, 8),
                role: Role::Scratch,
            },
            Buffer { name: "p".into(), dtype: DType::F32, elements: Dim::Const(2), role: Role::Parameter },
        ],
        kernels: vec![Kernel {
            name: "k".into(),
            file: "kernels/k.wgsl".into(),
            workgroup_size: [64, 1, 1],
            bindings: vec![
                BindingLayout { name: "batch".into(), access: Access::Uniform },
                BindingLayout { name: "w".into(), access: Access::Read },
                BindingLayout { name: "x".into(), access: Access::ReadWrite },
                BindingLayout { name: "step".into(), access: Access::Uniform },
            ],
            why: "the only one".into(),
        }],
        parameters: vec![Parameter { kind: ParameterKind::HeadScale, layer: 0, buffer: 2, len: 2 }],
        programs: vec![Program {
            kind: ProgramKind::Draft { module: 1 },
            precision: Precision::Exact,
            max_tokens: 8,
            max_rows: 2,
            steps: vec![Step {
                label: "layers.0.k".into(),
                layer: Some(0),
                kernel: 0,
                bindings: vec![
                    Binding::Buffer(0),
                    Binding::Weight { weight: 0, shard: 1 },
                    Binding::Buffer(1),
                    Binding::Params,
                ],
                grid: [Dim::Symbol(Symbol::Tokens), Dim::CeilDiv(Symbol::Rows, 4), Dim::Const(1)],
                params: [1, 2, 3, 4],
                cost: Cost { token_flops: 5, ..Cost::default() },
                indirect: None,
                only_for: vec![0],
                when: When::Always,
            }],
            taps: vec![TapSpec {
                name: "x".into(),
                group: TapGroup::Hidden,
                layer: Some(0),
                buffer: 1,
                rows: Dim::Symbol(Symbol::Tokens),
                stride: 8,
                offset: 2,
                columns: 6,
            }],
        }],
    }
}

/// Writes a bundle around `plan`, even one that [`Staging`] would not write.
fn write(dir: &Path, plan: &Plan) {
    let mut staging = Staging::new(dir).unwrap();
    let weights = vec![7u8; 40];
    staging.write(WEIGHTS, &weights).unwrap();
    staging.weight_file(WEIGHTS, Entry { bytes: 40, blake3: hash_file(&weights) });
    staging.write("kernels/k.wgsl", KERNEL.as_bytes()).unwrap();
    staging.write(TOKENIZER, b"{}").unwrap();
    staging.finish(&self::plan()).unwrap();
    if *plan != self::plan() {
        replace_plan(dir, &serde_json::to_vec(plan).unwrap());
    }
}

/// Puts other bytes in the plan's place and mends the manifest, as an attacker would.
fn replace_plan(dir: &Path, text: &[u8]) {
    fs::write(dir.join(PLAN), text).unwrap();
    change_manifest(dir, |manifest| {
        let entry = Entry { bytes: text.len() as u64, blake3: hash_file(text) };
        manifest.files.insert(PLAN.into(), entry);
    });
}

fn change_manifest(dir: &Path, change: impl FnOnce(&mut Manifest)) {
    let path = dir.join(MANIFEST);
    let mut manifest: Manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    manifest.blake3 = hash_file(&serde_json::to_vec(&manifest.files).unwrap());
    fs::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
}

fn bundle() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    write(&path, &plan());
    (dir, path)
}

fn read(dir: &Path) -> Result<Bundle, Error> {
    let bundle = Bundle::open(dir)?;
    verified(&bundle)?;
    Ok(bundle)
}

/// The weight files and how many bytes of them were verified.
fn verified(bundle: &Bundle) -> Result<(WeightFiles, u64), Error> {
    let files = bundle.map_weights()?;
    let mut verifier = files.verifier();
    let mut end = 0;
    for window in files.windows() {
        assert_eq!(window.positions.start, end);
        files.fetch(&window);
        verifier.take(&window)?;
        end = window.positions.end;
    }
    assert_eq!(end, files.total_bytes());
    Ok((files, end))
}

/// The error of a plan that has been changed, its manifest mended.
fn refused(change: impl FnOnce(&mut Plan)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    let mut plan = plan();
    change(&mut plan);
    write(&path, &plan);
    let error = read(&path).expect_err("the plan is unsound").to_string();
    assert!(error.contains("compile the checkpoint again"), "{error}");
    error
}

#[test]
fn what_is_written_is_read_back() {
    let (_dir, path) = bundle();
    let bundle = Bundle::open(&path).unwrap();
    assert_eq!(bundle.plan, plan());
    assert_eq!(bundle.kernels, [KERNEL]);
    let (files, hashed) = verified(&bundle).unwrap();
    assert_eq!(hashed, 40);
    assert_eq!(files.bytes(&bundle.plan.weights[0].shards[1].segments[1]), [7; 19]);
    // The same input gives the same bytes, over an older bundle too.
    let first = fs::read(path.join(MANIFEST)).unwrap();
    write(&path, &plan());
    assert_eq!(fs::read(path.join(MANIFEST)).unwrap(), first);
}

#[test]
fn nothing_is_left_of_a_bundle_that_was_not_finished() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    let staging = Staging::new(&path).unwrap();
    staging.write("tokenizer.json", b"{}").unwrap();
    drop(staging);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    fs::create_dir(&path).unwrap();
    fs::write(path.join("precious"), b"mine").unwrap();
    assert!(matches!(Staging::new(&path), Err(Error::OutputExists { .. })));
    assert_eq!(fs::read(path.join("precious")).unwrap(), b"mine");
    let mut unsound = plan();
    unsound.programs[0].max_rows = 0;
    fs::remove_file(path.join("precious")).unwrap();
    assert!(Staging::new(&path).unwrap().finish(&unsound).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the empty output directory");
}

#[test]
fn every_flipped_byte_is_noticed() {
    for name in [MANIFEST, PLAN, "kernels/k.wgsl", TOKENIZER, WEIGHTS] {
        let (_dir, path) = bundle();
        let file = path.join(name);
        let sound = fs::read(&file).unwrap();
        for at in (0..sound.len()).step_by(if sound.len() > 1000 { 7 } else { 1 }) {
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&file, &bytes).unwrap();
            match read(&path) {
                Err(_) => {}
                // Whitespace of the manifest is the only thing that no hash covers.
                Ok(_) => assert!(name == MANIFEST && sound[at].is_ascii_whitespace(), "{name}, byte {at}"),
            }
        }
        fs::write(&file, &sound).unwrap();
        read(&path).unwrap();
    }
}

#[test]
fn truncated_and_missing_files_are_named() {
    for name in [MANIFEST, PLAN, "kernels/k.wgsl", TOKENIZER, WEIGHTS] {
        let (_dir, path) = bundle();
        let file = path.join(name);
        let sound = fs::read(&file).unwrap();
        for length in (0..sound.len()).step_by(13) {
            fs::write(&file, &sound[..length]).unwrap();
            let error = read(&path).expect_err(name).to_string();
            assert!(error.contains(name), "{name} cut to {length}: {error}");
        }
        let mut longer = sound.clone();
        longer.push(b' ');
        fs::write(&file, longer).unwrap();
        assert!(name == MANIFEST || read(&path).is_err(), "{name}");
        fs::remove_file(&file).unwrap();
        let error = read(&path).expect_err(name).to_string();
        assert!(error.contains(name), "{name} missing: {error}");
        // A directory in its place is no file either.
        fs::create_dir(&file).unwrap();
        read(&path).expect_err(name);
    }
}

#[test]
fn other_versions_are_refused_before_anything_else() {
    let (_dir, path) = bundle();
    for version in ["0", "1", "2", "3", "4", "5", "7", "4294967296", "18446744073709551615"] {
        fs::write(path.join(MANIFEST), format!("{{\"format_version\": {version}}}")).unwrap();
        assert!(matches!(read(&path), Err(Error::Version { expected: FORMAT_VERSION, .. })), "{version}");
    }
    for text in
        ["", "{}", "[]", "null", "{\"format_version\": \"1\"}", "{\"format_version\": 6}", "{\"format_version\": -1}"]
    {
        fs::write(path.join(MANIFEST), text).unwrap();
        assert!(matches!(read(&path), Err(Error::Damaged { .. })), "{text}");
    }
    assert!(refused(|plan| plan.format_version = 1).contains("format_version 1"));
}

#[test]
fn no_path_leads_out_of_the_bundle() {
    for file in [
        "../k.wgsl",
        "kernels/../../k.wgsl",
        "/etc/passwd",
        "kernels//etc/passwd",
        "k.wgsl",
        "kernels",
        "",
        "kernels/a/b",
    ] {
        refused(|plan| plan.kernels[0].file = file.into());
    }
    for path in ["../w.safetensors", "/etc/passwd", "a/../../w", "", ".", "..", "kernels/k.wgsl"] {
        refused(|plan| plan.files[0].path = path.into());
    }
    // What is said to be a reference must be absolute; a listed file must not be a reference.
    refused(|plan| plan.files[0].referenced = true);
    for name in ["../outside", "/etc/passwd", "a/b", "../w.safetensors"] {
        let (_dir, path) = bundle();
        change_manifest(&path, |manifest| {
            manifest.files.insert(name.into(), Entry { bytes: 0, blake3: String::new() });
        });
        let error = read(&path).expect_err(name).to_string();
        assert!(error.contains("damaged"), "{name}: {error}");
    }
}

#[test]
fn a_weight_file_must_be_the_one_of_the_plan() {
    let (_dir, path) = bundle();
    change_manifest(&path, |manifest| {
        manifest.files.insert("weights-9.safetensors".into(), Entry { bytes: 0, blake3: String::new() });
    });
    assert!(read(&path).is_err());
    let other = [8u8; 40];
    let (_dir, path) = bundle();
    fs::write(path.join(WEIGHTS), other).unwrap();
    change_manifest(&path, |manifest| {
        manifest.files.insert(WEIGHTS.into(), Entry { bytes: 40, blake3: hash_file(&other) });
    });
    assert!(read(&path).unwrap_err().to_string().contains(WEIGHTS));
}

/// The first step's workgroups stand at this place.
fn indirect(plan: &mut Plan, buffer: u32, word: u64) {
    plan.programs[0].steps[0].indirect = Some(Indirect { buffer, word });
}

/// The same in a sound buffer of six words, which the step's kernel uses so.
fn counted(plan: &mut Plan, word: u64, access: Access) {
    let buffer = plan.buffers.len() as u32;
    plan.buffers.push(Buffer {
        name: "counts".into(),
        dtype: DType::U32,
        elements: Dim::Const(6),
        role: Role::Scratch,
    });
    plan.kernels[0].bindings.push(BindingLayout { name: "counts".into(), access });
    plan.programs[0].steps[0].bindings.push(Binding::Buffer(buffer));
    indirect(plan, buffer, word);
}

#[test]
fn a_step_may_read_how_many_workgroups_it_has() {
    let mut sound = plan();
    counted(&mut sound, 3, Access::Read);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    write(&path, &sound);
    assert_eq!(read(&path).unwrap().plan, sound);
}

#[test]
fn tiles_are_counted_for_the_worst_case() {
    let most = |tokens, each, size, groups| {
        let symbols = Symbols { tokens, rows: 0, sequences: 0, pages: 0 };
        Dim::Tiles { of: Symbol::Tokens, each, size, groups }.eval(&symbols)
    };
    // By trial: all ways to spread the members over the groups.
    for (members, size, groups) in [(0, 4, 3), (1, 4, 3), (7, 4, 3), (8, 1, 3), (9, 3, 2), (12, 5, 3), (5, 2, 1)] {
        let mut worst = 0;
        let spread = |a: u64, b: u64| [a, b, members - a - b].map(|n| n.div_ceil(size)).iter().sum::<u64>();
        for a in 0..=members {
            for b in 0..=members - a {
                let used = [a, b, members - a - b].iter().filter(|&&n| n > 0).count() as u64;
                worst = if used <= groups { worst.max(spread(a, b)) } else { worst };
            }
        }
        assert_eq!(most(members, 1, size, groups), worst, "{members} members, tiles of {size}, {groups} groups");
    }
    assert_eq!(most(256, 5, 16, 33), (1280 + 33 * 15) / 16);
    assert_eq!(most(u64::MAX, u64::MAX, 1, u64::MAX), u64::MAX);
}

#[test]
fn plans_that_contradict_themselves_are_refused() {
    type Change = fn(&mut Plan);
    let second = |p: &mut Plan| p.parameters.push(p.parameters[0].clone());
    let cases: [(&str, Change); 55] = [
        ("vocab_size", |p| p.model.vocab_size = 0),
        ("max_context", |p| p.model.max_context = 0),
        ("weight file", |p| p.files[0].bytes = u64::MAX),
        ("outside its file", |p| p.weights[0].shards[0].segments[0].offset = 33),
        ("outside its file", |p| p.weights[0].shards[0].segments[0].offset = u64::MAX),
        ("outside its file", |p| p.weights[0].shards[0].segments[0].file = 1),
        ("a shard of", |p| p.weights[0].shards[1].segments[0].bytes = u64::MAX),
        ("a shard of", |p| p.weights[0].shape[1] = 5),
        ("has shape", |p| p.weights[0].shape = vec![4, u64::MAX]),
        ("has shape", |p| p.weights[0].shape = Vec::new()),
        ("divide into groups of 32", |p| p.weights[0].format = WeightFormat::Int8),
        ("a shard of", |p| (p.weights[0].format, p.weights[0].shape[1]) = (WeightFormat::Int4, 32)),
        ("shards cover", |p| p.weights[0].shape[0] = 5),
        ("not consecutive", |p| p.weights[0].shards[1].first = 0),
        ("max_binding_bytes", |p| p.requirements.max_binding_bytes = 23),
        ("requirements.cooperative is 9", |p| p.requirements.cooperative = 9),
        ("absurd", |p| p.buffers[1].elements = Dim::Times(Symbol::Pages, 1 << 50)),
        ("division by 0", |p| p.buffers[1].elements = Dim::CeilDiv(Symbol::Pages, 0)),
        ("empty", |p| p.buffers[1].elements = Dim::Const(0)),
        ("tiles of 0", |p| p.buffers[1].elements = Dim::Tiles { of: Symbol::Tokens, each: 1, size: 0, groups: 1 }),
        ("absurd", |p| {
            p.programs[0].steps[0].grid[1] = Dim::Tiles { of: Symbol::Tokens, each: 1, size: 1, groups: 1 << 50 };
        }),
        ("indirect grid: there is no buffer 3", |p| indirect(p, 3, 0)),
        ("indirect grid: buffer", |p| indirect(p, 0, 0)),
        ("indirect grid: words 18446744073709551614", |p| counted(p, u64::MAX - 1, Access::Read)),
        ("indirect grid: words 4", |p| counted(p, 4, Access::Read)),
        ("indirect grid: the step writes", |p| counted(p, 3, Access::ReadWrite)),
        ("workgroup size", |p| p.kernels[0].workgroup_size = [u32::MAX, u32::MAX, 2]),
        ("no such kernel", |p| p.programs[0].steps[0].kernel = 1),
        ("4 bindings", |p| p.kernels[0].bindings.truncate(3)),
        ("does not fit", |p| p.programs[0].steps[0].bindings[1] = Binding::Weight { weight: 0, shard: 2 }),
        ("does not fit", |p| p.programs[0].steps[0].bindings[2] = Binding::Buffer(0)),
        ("tap x", |p| p.programs[0].taps[0].offset = u32::MAX),
        ("tap x", |p| p.programs[0].taps[0].layer = Some(2)),
        ("tap x", |p| p.programs[0].taps[0].layer = Some(u32::MAX)),
        ("only for tap 1 of 1", |p| p.programs[0].steps[0].only_for = vec![0, 1]),
        ("for drafting and for taps", |p| p.programs[0].steps[0].when = When::Drafting),
        ("drafting", |p| {
            p.programs[0].kind = ProgramKind::Watch;
            p.programs[0].steps[0].when = When::Drafting;
        }),
        ("log probabilities", |p| p.programs[0].steps[0].when = When::Logprobs),
        ("for log probabilities and for taps", |p| {
            p.programs[0].kind = ProgramKind::Watch;
            p.programs[0].steps[0].when = When::Logprobs;
        }),
        ("the model has 1 modules", |p| p.programs[0].kind = ProgramKind::Draft { module: 2 }),
        ("the model has 1 modules", |p| p.programs[0].kind = ProgramKind::Draft { module: 0 }),
        ("the model has 0 modules", |p| p.model.mtp_modules = 0),
        ("only for tap 0 of 0", |p| p.programs[0].taps.clear()),
        ("num_experts_per_tok is 3 of 2", |p| p.model.num_experts_per_tok = 3),
        ("num_experts_per_tok is 0 of 2", |p| p.model.num_experts_per_tok = 0),
        ("1 of 0 groups", |p| p.model.n_group = 0),
        ("3 of 2 groups", |p| p.model.topk_group = 3),
        ("no such layer", |p| p.parameters[0].layer = 2),
        ("there twice", second),
        ("has two", |p| {
            p.parameters.push(Parameter { kind: ParameterKind::ExpertScale, ..p.parameters[0].clone() });
        }),
        ("no buffer 3", |p| p.parameters[0].buffer = 3),
        ("no parameter of f32", |p| p.parameters[0].buffer = 1),
        ("no parameter of f32", |p| p.buffers[2].dtype = DType::U32),
        ("does not have 3 elements", |p| p.parameters[0].len = 3),
        ("has 4294967295 numbers", |p| p.parameters[0].len = u32::MAX),
    ];
    for (index, (expected, change)) in cases.into_iter().enumerate() {
        let error = refused(change);
        assert!(error.contains(expected), "case {index}, {expected:?}: {error}");
    }
}

/// Some place in a JSON document, by a number.
fn place(value: &mut serde_json::Value, mut at: usize) -> &mut serde_json::Value {
    use serde_json::Value;
    let count = match value {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if count == 0 || at % 8 == 7 {
        return value;
    }
    let child = at % count;
    at /= count;
    match value {
        Value::Array(items) => place(&mut items[child], at),
        Value::Object(fields) => place(fields.values_mut().nth(child).unwrap(), at),
        _ => unreachable!("it has children"),
    }
}

fn anything() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::{Value, json};
    prop_oneof![
        Just(Value::Null),
        Just(json!([])),
        Just(json!({})),
        Just(json!(-1)),
        Just(json!(1e300)),
        any::<u64>().prop_map(|n| json!(n)),
        (0u32..64).prop_map(|shift| json!(1u64 << shift)),
        (0u64..20).prop_map(|n| json!(n)),
        "[a-z./]{0,12}".prop_map(|text| json!(text)),
        any::<u64>().prop_map(|n| json!({ "times": ["pages", n] })),
        any::<u64>().prop_map(|n| json!({ "ceil_div": ["rows", n] })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// A hostile plan with a sound manifest is refused or consistent: its segments lie inside their files, and no
    /// length overflows.
    #[test]
    fn changed_plans_never_panic(changes in prop::collection::vec((any::<usize>(), anything()), 1..4)) {
        let (_dir, path) = bundle();
        let mut json = serde_json::to_value(plan()).unwrap();
        for (at, value) in changes {
            *place(&mut json, at) = value;
        }
        replace_plan(&path, &serde_json::to_vec(&json).unwrap());
        if let Ok(bundle) = Bundle::open(&path) {
            for weight in &bundle.plan.weights {
                prop_assert!(weight.slice_bytes().is_some());
                let _ = weight.bytes();
            }
            // As hosts do before they look any further.
            let _ = moewe_plan::parameter_values(&bundle.plan, &[]);
            let symbols = Symbols { tokens: u64::MAX, rows: 1, sequences: 1 << 40, pages: 0 };
            for buffer in &bundle.plan.buffers {
                let _ = buffer.elements.eval(&symbols);
            }
            if let Ok((files, _)) = verified(&bundle) {
                let segments = bundle.plan.weights.iter().flat_map(|w| &w.shards).flat_map(|s| &s.segments);
                for segment in segments {
                    prop_assert_eq!(files.bytes(segment).len() as u64, segment.bytes);
                }
            }
        }
    }

    /// Any text in the plan's place is refused.
    #[test]
    fn any_text_is_refused(text in prop::collection::vec(any::<u8>(), 0..200)) {
        let (_dir, path) = bundle();
        replace_plan(&path, &text);
        prop_assert!(Bundle::open(&path).is_err());
    }
}
