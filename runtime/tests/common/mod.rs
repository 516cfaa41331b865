//! A tiny "language model" with handwritten kernels: the next token depends on every token before it, read through
//! the page table, so that any slip in paging, batching or feedback shows. [`next`] is the same on the host.
#![allow(dead_code)] // each test binary uses its own part of this

use std::fs;
use std::path::Path;
use std::sync::Arc;

use moewe_plan::{
    Access, Binding, BindingLayout, Buffer, Bundle, Cost, DType, Dim, Entry, FORMAT_VERSION, Kernel, ModelInfo,
    Parameter, ParameterKind, Plan, Precision, Program, ProgramKind, Requirements, Role, Segment, Shard, Staging, Step,
    Symbol, TapGroup, TapSpec, Weight, WeightFile, WeightFormat, When, hash_file,
};
use moewe_runtime::{Gpu, Model, Selector, Session, SessionOptions};

pub const VOCAB: u32 = 97;
pub const MAX_CONTEXT: u32 = 300;
pub const EOS: u32 = 11;
/// Numbers of one row of the buffer `mix`.
pub const MIX: u32 = 6;
/// Rows and columns of the weight; rows are padded to 8 bytes.
pub const TABLE: [u64; 2] = [7, 6];

/// Opens the device, or fails the test.
pub fn gpu() -> Arc<Gpu> {
    Gpu::open(&Selector::Default).unwrap_or_else(|error| panic!("this test needs a Vulkan device: {error}"))
}

/// The bytes of the weight, padding included.
pub fn table() -> Vec<u8> {
    (0..TABLE[0] * 8).map(|i| if i % 8 < TABLE[1] { (i * 37 % 251) as u8 } else { 0 }).collect()
}

/// The token that follows `tokens`; with `fresh`, the nearest one behind it that has not been seen.
pub fn next(tokens: &[u32], fresh: bool) -> u32 {
    let sum = tokens.iter().enumerate().fold(0u32, |sum, (j, &id)| sum.wrapping_add(id.wrapping_mul(j as u32 + 1)));
    let bytes = table();
    let last = *tokens.last().expect("there is a token");
    let byte = u32::from(bytes[(last % TABLE[0] as u32 * 8 + last % TABLE[1] as u32) as usize]);
    let next = sum.wrapping_mul(5).wrapping_add(tokens.len() as u32 - 1 + 3).wrapping_add(byte) % VOCAB;
    let mut candidates = (0..VOCAB).map(|i| (next + i) % VOCAB);
    candidates.find(|token| !(fresh && tokens.contains(token))).unwrap_or(next)
}

/// `count` tokens after `prompt`.
pub fn continuation(prompt: &[u32], count: usize, fresh: bool) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next(&tokens, fresh));
    }
    tokens.split_off(prompt.len())
}

/// A prompt of this length.
pub fn prompt(length: u32, seed: u32) -> Vec<u32> {
    (0..length).map(|i| (i * i * 7 + i * seed + seed) % VOCAB).collect()
}

fn buffers() -> Vec<Buffer> {
    let width = u64::from(MAX_CONTEXT.div_ceil(64));
    let buffer = |name: &str, dtype, elements, role| Buffer { name: name.into(), dtype, elements, role };
    vec![
        buffer("batch", DType::U32, Dim::Const(8), Role::Header),
        buffer("tokens", DType::U32, Dim::Times(Symbol::Tokens, 4), Role::Tokens),
        buffer("rows", DType::U32, Dim::Symbol(Symbol::Rows), Role::Rows),
        buffer("page_table", DType::U32, Dim::Times(Symbol::Sequences, width), Role::PageTable),
        buffer("sampling", DType::U32, Dim::Times(Symbol::Sequences, 8), Role::Sampling),
        buffer("seen", DType::U32, Dim::Times(Symbol::Sequences, u64::from(VOCAB.div_ceil(32))), Role::Seen),
        buffer("finished", DType::U32, Dim::Times(Symbol::Rows, 33), Role::Finished),
        buffer("cache", DType::U32, Dim::Times(Symbol::Pages, 64), Role::Cache),
        buffer("logits", DType::F32, Dim::Times(Symbol::Rows, VOCAB.into()), Role::Scratch),
        buffer("row_tokens", DType::U32, Dim::Times(Symbol::Rows, 2), Role::Scratch),
        buffer("mix", DType::U32, Dim::Times(Symbol::Tokens, MIX.into()), Role::Scratch),
        buffer("dump", DType::U32, Dim::Const(16), Role::State),
        buffer("copy", DType::U32, Dim::Times(Symbol::Tokens, 4), Role::Scratch),
        buffer("hidden", DType::U32, Dim::Symbol(Symbol::Tokens), Role::State),
        buffer("ticks", DType::U32, Dim::Const(4), Role::State),
        buffer("offset", DType::F32, Dim::Const(VOCAB.into()), Role::Parameter),
        buffer("scale", DType::F32, Dim::Const(2), Role::Parameter),
        buffer("draft_cache", DType::U32, Dim::Times(Symbol::Pages, 64), Role::Cache),
        buffer("drafted", DType::U32, Dim::Times(Symbol::Rows, 2), Role::Scratch),
    ]
}

fn kernels() -> Vec<(Kernel, &'static str)> {
    use Access::{Read, ReadWrite, Uniform};
    let kernel = |name: &str, bindings: &[(&str, Access)], source| {
        let bindings = bindings.iter().map(|&(name, access)| BindingLayout { name: name.into(), access }).collect();
        let file = format!("kernels/{name}.wgsl");
        (Kernel { name: name.into(), file, workgroup_size: [1; 3], bindings, why: String::new() }, source)
    };
    vec![
        kernel(
            "write",
            &[("batch", Uniform), ("tokens", Read), ("page_table", Read), ("cache", ReadWrite), ("step", Uniform)],
            include_str!("../kernels/write.wgsl"),
        ),
        kernel(
            "score",
            &[
                ("batch", Uniform),
                ("tokens", Read),
                ("rows", Read),
                ("page_table", Read),
                ("cache", Read),
                ("sampling", Read),
                ("seen", Read),
                ("low", Read),
                ("high", Read),
                ("logits", ReadWrite),
                ("row_tokens", ReadWrite),
                ("step", Uniform),
            ],
            include_str!("../kernels/score.wgsl"),
        ),
        kernel(
            "sample",
            &[
                ("batch", Uniform),
                ("logits", Read),
                ("row_tokens", Read),
                ("tokens", ReadWrite),
                ("rows", ReadWrite),
                ("seen", ReadWrite),
                ("finished", ReadWrite),
                ("step", Uniform),
            ],
            include_str!("../kernels/sample.wgsl"),
        ),
        kernel("advance", &[("finished", ReadWrite)], include_str!("../kernels/advance.wgsl")),
        kernel(
            "dump",
            &[("weight", Read), ("dump", ReadWrite), ("step", Uniform)],
            include_str!("../kernels/dump.wgsl"),
        ),
        kernel(
            "copy",
            &[("batch", Uniform), ("tokens", Read), ("copy", ReadWrite), ("hidden", ReadWrite)],
            include_str!("../kernels/copy.wgsl"),
        ),
        kernel("tick", &[("ticks", ReadWrite)], include_str!("../kernels/tick.wgsl")),
        kernel(
            "edit",
            &[("offset", Read), ("scale", Read), ("logits", ReadWrite), ("step", Uniform)],
            include_str!("../kernels/edit.wgsl"),
        ),
        kernel(
            "draft",
            &[
                ("batch", Uniform),
                ("tokens", Read),
                ("rows", Read),
                ("page_table", Read),
                ("draft_cache", Read),
                ("hidden", Read),
                ("drafted", ReadWrite),
                ("step", Uniform),
            ],
            include_str!("../kernels/draft.wgsl"),
        ),
        kernel("mix", &[("batch", Uniform), ("tokens", Read), ("mix", ReadWrite)], include_str!("../kernels/mix.wgsl")),
    ]
}

/// Makes steps and taps of our kernels and buffers.
struct Maker {
    kernels: Vec<(Kernel, &'static str)>,
    buffers: Vec<String>,
}

impl Maker {
    fn buffer(&self, name: &str) -> u32 {
        self.buffers.iter().position(|n| n == name).expect("a buffer of ours") as u32
    }

    fn step(&self, name: &str, shard: u32, grid: Dim, params: [u32; 4]) -> Step {
        let kernel = self.kernels.iter().position(|(kernel, _)| kernel.name == name).expect("a kernel of ours");
        let bind = |layout: &BindingLayout| match layout.name.as_str() {
            "step" => Binding::Params,
            "low" => Binding::Weight { weight: 0, shard: 0 },
            "high" => Binding::Weight { weight: 0, shard: 1 },
            "weight" => Binding::Weight { weight: 0, shard },
            name => Binding::Buffer(self.buffer(name)),
        };
        Step {
            label: name.into(),
            layer: None,
            kernel: kernel as u32,
            bindings: self.kernels[kernel].0.bindings.iter().map(bind).collect(),
            grid: [grid, Dim::Const(1), Dim::Const(1)],
            params,
            cost: Cost::default(),
            indirect: None,
            only_for: Vec::new(),
            when: When::Always,
        }
    }

    fn tap(&self, name: &str, group: TapGroup, layer: Option<u32>, buffer: &str, stride: u32) -> TapSpec {
        let rows = Dim::Symbol(Symbol::Tokens);
        TapSpec {
            name: name.into(),
            group,
            layer,
            buffer: self.buffer(buffer),
            rows,
            stride,
            offset: 0,
            columns: stride,
        }
    }
}

fn program(kind: ProgramKind, max_tokens: u32, max_rows: u32) -> Program {
    let make = Maker { kernels: kernels(), buffers: buffers().into_iter().map(|buffer| buffer.name).collect() };
    let (tokens, rows) = (Dim::Symbol(Symbol::Tokens), Dim::Symbol(Symbol::Rows));
    let width = MAX_CONTEXT.div_ceil(64);
    let params = [width, VOCAB, VOCAB.div_ceil(32), 0];
    let write = make.step("write", 0, tokens.clone(), params);
    let score = make.step("score", 0, rows.clone(), params);
    let mix = make.step("mix", 0, tokens.clone(), [0; 4]);
    let mix_tap = make.tap("mix", TapGroup::Routing, Some(0), "mix", MIX);
    let mix_part = TapSpec { name: "mix.part".into(), offset: 2, columns: 3, layer: Some(1), ..mix_tap.clone() };
    let sample = [
        make.step("sample", 0, rows.clone(), [max_rows, VOCAB, VOCAB.div_ceil(32), 0]),
        make.step("advance", 0, Dim::CeilDiv(Symbol::Rows, 1 << 40), [0; 4]),
    ];
    let (steps, taps) = match kind {
        ProgramKind::Forward => ([write, score].into_iter().chain(sample).collect(), Vec::new()),
        ProgramKind::Watch => {
            let taps = vec![
                make.tap("copy", TapGroup::Hidden, None, "copy", 4),
                mix_tap,
                mix_part,
                make.tap("lens", TapGroup::Lens, Some(0), "copy", 4),
                // Position and slot, of each token and of each wanted row.
                TapSpec { offset: 1, columns: 2, ..make.tap("told", TapGroup::Logits, None, "copy", 4) },
                TapSpec { rows: rows.clone(), ..make.tap("told", TapGroup::Logits, None, "row_tokens", 2) },
            ];
            let mut steps = vec![write, score, make.step("copy", 0, tokens, [0; 4])];
            steps.push(make.step("edit", 0, rows, params));
            steps.push(Step { only_for: vec![1, 2], ..mix });
            steps.push(Step { only_for: vec![3, 4], ..make.step("tick", 0, Dim::Const(1), [0; 4]) });
            steps.extend(sample);
            (steps, taps)
        }
        ProgramKind::Trace => {
            let mut steps = vec![write, score, mix];
            steps.push(make.step("dump", 0, Dim::Const(6), [0; 4]));
            steps.push(make.step("dump", 1, Dim::Const(8), [6, 0, 0, 0]));
            let logits = TapSpec { rows, ..make.tap("logits", TapGroup::Logits, None, "logits", VOCAB) };
            let once = |tap: TapSpec| TapSpec { rows: Dim::Const(1), ..tap };
            let weight = once(make.tap("weight", TapGroup::Hidden, None, "dump", 14));
            (steps, vec![logits, mix_tap, mix_part, weight, once(make.tap("ticks", TapGroup::Lens, None, "ticks", 4))])
        }
        ProgramKind::Draft { .. } => {
            let mut write = write;
            let cache = write.bindings.iter_mut().find(|binding| **binding == Binding::Buffer(make.buffer("cache")));
            *cache.expect("it writes the cache") = Binding::Buffer(make.buffer("draft_cache"));
            let drafted = TapSpec { rows: rows.clone(), ..make.tap("mtp.1.ids", TapGroup::Mtp, None, "drafted", 2) };
            // A tap that only traces read.
            let hidden = make.tap("hidden", TapGroup::Hidden, Some(1), "hidden", 1);
            (vec![write, make.step("draft", 0, rows, params)], vec![drafted, hidden])
        }
    };
    Program { kind, precision: Precision::Exact, max_tokens, max_rows, steps, taps }
}

/// What the draft makes of a token at a position, given the tokens of its sequence from the start on: two numbers.
pub fn draft(tokens: &[u32], position: usize) -> [u32; 2] {
    let sum = (1..=position).fold(0u32, |sum, j| sum.wrapping_add(tokens[j].wrapping_mul(j as u32 + 1)));
    let hidden = tokens[position - 1] * 1000 + position as u32 - 1;
    [sum, hidden]
}

fn parameter(kind: ParameterKind, buffer: &str, len: u32) -> Parameter {
    let buffer = buffers().iter().position(|b| b.name == buffer).expect("a buffer of ours") as u32;
    Parameter { kind, layer: 0, buffer, len }
}

/// The plan; weights are added by [`write_bundle`].
pub fn plan() -> Plan {
    Plan {
        format_version: FORMAT_VERSION,
        generator: "test".into(),
        model: ModelInfo {
            architecture: "TestLM".into(),
            checkpoint: "none".into(),
            vocab_size: VOCAB,
            max_context: MAX_CONTEXT,
            eos_token_ids: vec![EOS],
            layers: 1,
            moe_layers: Vec::new(),
            experts: 0,
            num_experts_per_tok: 0,
            n_group: 1,
            topk_group: 1,
            n_shared_experts: 0,
            hidden_size: 1,
            num_attention_heads: 1,
            kv_lora_rank: 1,
            qk_rope_head_dim: 1,
            qk_nope_head_dim: 1,
            v_head_dim: 1,
            softmax_scale: 1.0,
            mtp_modules: 1,
        },
        warnings: Vec::new(),
        fast_latents: moewe_plan::Latent::F16,
        requirements: Requirements {
            profile: "test".into(),
            tuned_on: None,
            max_binding_bytes: 1 << 27,
            storage_buffers: 8,
            workgroup_invocations: 1,
            workgroup_bytes: 0,
            subgroup_invocations: 0,
            cooperative: 0,
        },
        files: Vec::new(),
        weights: Vec::new(),
        buffers: buffers(),
        kernels: kernels().into_iter().map(|(kernel, _)| kernel).collect(),
        parameters: vec![
            parameter(ParameterKind::ExpertOffset, "offset", VOCAB),
            parameter(ParameterKind::ExpertScale, "scale", 2),
        ],
        programs: vec![
            program(ProgramKind::Forward, 32, 4),
            program(ProgramKind::Forward, 4, 2),
            program(ProgramKind::Trace, 32, 32),
            program(ProgramKind::Watch, 32, 4),
            program(ProgramKind::Watch, 4, 2),
            program(ProgramKind::Draft { module: 1 }, 8, 24),
            program(ProgramKind::Draft { module: 1 }, 24, 32),
        ],
    }
}

/// Writes the plan's bundle, its weight in two shards of oddly cut segments in two files.
pub fn write_bundle(dir: &Path, mut plan: Plan) {
    let mut staging = Staging::new(dir).expect("the bundle can be begun");
    let bytes = table();
    // File, offset and length of each segment; the offsets leave gaps that must not be uploaded.
    let cuts = [[(0, 1, 1), (1, 0, 2), (0, 3, 5), (1, 5, 16)].as_slice(), &[(1, 22, 31), (0, 9, 1)]];
    let mut files = [vec![0xee; 16], vec![0xee; 64]];
    let mut at = 0;
    let mut shards = Vec::new();
    for (cuts, (first, count)) in cuts.iter().zip([(0, 3), (3, 4)]) {
        let mut segments = Vec::new();
        for &(file, offset, length) in *cuts {
            files[file][offset..offset + length].copy_from_slice(&bytes[at..at + length]);
            segments.push(Segment { file: file as u32, offset: offset as u64, bytes: length as u64 });
            at += length;
        }
        shards.push(Shard { first, count, segments });
    }
    plan.weights.push(Weight { name: "table".into(), format: WeightFormat::Fp8, shape: TABLE.to_vec(), shards });
    for (index, contents) in files.iter().enumerate() {
        let path = format!("weights-{index}.safetensors");
        staging.write(&path, contents).expect("weights can be written");
        let entry = Entry { bytes: contents.len() as u64, blake3: hash_file(contents) };
        staging.weight_file(&path, entry.clone());
        plan.files.push(WeightFile { path, referenced: false, bytes: entry.bytes, blake3: entry.blake3 });
    }
    for (kernel, source) in kernels() {
        staging.write(&kernel.file, source.as_bytes()).expect("kernels can be written");
    }
    for kernel in &plan.kernels {
        if !fs::exists(staging.dir().join(&kernel.file)).expect("the directory can be read") {
            staging.write(&kernel.file, b"this is no kernel").expect("kernels can be written");
        }
    }
    staging.finish(&plan).expect("the bundle can be finished");
}

/// Loads a plan's bundle.
pub fn load(plan: Plan) -> moewe_runtime::Result<Arc<Model>> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("bundle");
    write_bundle(&path, plan);
    Model::load(&gpu(), &Bundle::open(&path)?, &|_| ())
}

/// Options for several sequences, forward and trace.
pub fn options(max_sequences: u32) -> SessionOptions {
    SessionOptions { kinds: vec![ProgramKind::Forward, ProgramKind::Trace], max_sequences, ..SessionOptions::default() }
}

/// A session over the plan as it is.
pub fn session(max_sequences: u32) -> Session {
    let model = load(plan()).expect("the model loads");
    Session::new(model, options(max_sequences)).expect("the session can be made")
}
