//! Weights of 8 and 4 bits: what scales and codes leave over, where their bytes stand, and what is refused. Bundles are decoded
//! here in f64, from the layout alone.

#![expect(clippy::float_cmp, reason = "what was quantised before must stay the very same numbers")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::error::Error;
use moewe_compiler::profile::Profile;
use moewe_compiler::quantize::{Codes, LEN, Numbers, codes, pack, scale};
use moewe_compiler::synth::{self, Shape, Storage};
use moewe_plan::{Bundle, Latent, TapChoice, Weight, WeightFormat};
use proptest::prelude::*;

const BOTH: [WeightFormat; 2] = [WeightFormat::Int8, WeightFormat::Int4];

fn lowest(format: WeightFormat) -> f64 {
    if format == WeightFormat::Int4 { -8.0 } else { -127.0 }
}

fn highest(format: WeightFormat) -> f64 {
    if format == WeightFormat::Int4 { 7.0 } else { 127.0 }
}

fn quantised(numbers: &Numbers, format: WeightFormat) -> (f64, Codes) {
    let scale = scale(numbers, format);
    (scale.to_f64(), codes(numbers, scale, format))
}

/// What the numbers stand for afterwards.
fn restored(numbers: &Numbers, format: WeightFormat) -> Numbers {
    let (scale, codes) = quantised(numbers, format);
    codes.map(|code| (f64::from(code) * scale) as f32)
}

fn squared_error(numbers: &Numbers, restored: &Numbers) -> f64 {
    numbers.iter().zip(restored).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum()
}

/// What rounding to steps of `peak / levels` leaves over: the quantiser without any choice.
fn plain_error(numbers: &Numbers, levels: f64) -> f64 {
    let peak = numbers.iter().fold(0f64, |peak, &x| peak.max(f64::from(x).abs()));
    let step = peak / levels;
    numbers.iter().map(|&x| (f64::from(x) - (f64::from(x) / step).round() * step).powi(2)).sum()
}

/// Every number is within half a step of what it stands for, or cut off at the end of the codes.
fn check_group(numbers: &Numbers, format: WeightFormat) {
    let (scale, codes) = quantised(numbers, format);
    assert!(scale.is_finite());
    assert_eq!(scale == 0.0, numbers.iter().all(|&x| x == 0.0), "scale {scale} of {numbers:?}");
    for (&x, code) in numbers.iter().zip(codes) {
        let (x, code) = (f64::from(x), f64::from(code));
        assert!((lowest(format)..=highest(format)).contains(&code), "{code}");
        if scale == 0.0 {
            assert!(code == 0.0);
            continue;
        }
        let exact = x / scale;
        let nearest = exact.clamp(lowest(format), highest(format));
        assert!((nearest - code).abs() <= 0.5 + 1e-4, "{x} is code {code} of step {scale}, {exact} exactly");
    }
}

fn group() -> impl Strategy<Value = Numbers> {
    let normal = (-1f32..1.0, -1f32..1.0, -1f32..1.0).prop_map(|(a, b, c)| a + b + c);
    let wild = prop_oneof![normal.clone(), Just(0.0), Just(-0.0), normal.prop_map(|x| x * 50.0)];
    let any = prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO;
    let narrow = -1f32..1.0;
    prop_oneof![
        4 => (prop::array::uniform32(narrow), -40i32..20).prop_map(|(g, e)| g.map(|x| x * (e as f32).exp2())),
        4 => (prop::array::uniform32(wild), -12i32..4).prop_map(|(g, e)| g.map(|x| x * (e as f32).exp2())),
        1 => prop::array::uniform32(any),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn numbers_are_half_a_step_off_at_most(numbers in group()) {
        for format in BOTH {
            check_group(&numbers, format);
        }
    }

    /// The sum that the choice is to make small is not above that of the plain way, save for the rounding of the scale. Only
    /// where scales are normal numbers of f16: below, their rounding is all there is.
    #[test]
    fn no_worse_than_plain_rounding(numbers in prop::array::uniform32(-1f32..1.0), exponent in -3i32..14) {
        let numbers = numbers.map(|x| x * (exponent as f32).exp2());
        prop_assume!(numbers.iter().any(|x| x.abs() > 0.02));
        let energy = squared_error(&numbers, &[0.0; LEN]);
        for format in BOTH {
            let found = squared_error(&numbers, &restored(&numbers, format));
            let plain = plain_error(&numbers, highest(format));
            prop_assert!(found <= plain * 1.02 + energy * 2f64.powi(-22), "{format:?}: {found} above {plain}");
        }
    }

    /// What was quantised before stays as it is.
    #[test]
    fn quantised_numbers_stay(numbers in prop::array::uniform32(-1f32..1.0), exponent in -6i32..20) {
        for format in BOTH {
            let once = restored(&numbers.map(|x| x * (exponent as f32).exp2()), format);
            prop_assert_eq!(restored(&once, format), once, "{:?}", format);
        }
    }
}

#[test]
fn every_grid_that_fits_is_found() {
    // Codes up to the end of a format's range, any sign of the scale, many scales.
    let mut state = 1u32;
    let mut random = move |n: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % n
    };
    for format in BOTH {
        let (low, high) = (lowest(format) as i32, highest(format) as i32);
        for _ in 0..3000 {
            let step = f16::from_bits((0x0800 + random(0x4000)) as u16 | if random(2) == 0 { 0x8000 } else { 0 });
            let mut grid: Numbers = std::array::from_fn(|_| (low + random((high - low + 1) as u32) as i32) as f32);
            grid[random(LEN as u32) as usize] = if random(2) == 0 { low as f32 } else { high as f32 };
            let numbers = grid.map(|code| code * step.to_f32());
            assert_eq!(restored(&numbers, format), numbers, "{format:?}, step {step}");
        }
    }
}

#[test]
fn extreme_groups() {
    let zeros = [0.0; LEN];
    let one = |at: usize, x: f32| std::array::from_fn(|i| if i == at { x } else { 0.0 });
    for format in BOTH {
        assert_eq!(quantised(&zeros, format), (0.0, [0; LEN]));
        assert_eq!(quantised(&zeros.map(|x: f32| -x), format), (0.0, [0; LEN]));
        for x in [3e-7f32, -4e-6, 1e-4] {
            check_group(&one(3, x), format); // the scale is a subnormal f16
        }
        for x in [1.0f32, -1.0, 0.0123, -60000.0] {
            for at in [0, 31] {
                let numbers = one(at, x);
                check_group(&numbers, format);
                let back = restored(&numbers, format)[at];
                assert!((back - x).abs() <= x.abs() * 2f32.powi(-11), "{format:?}: {x} is {back}");
            }
        }
        // Beyond the largest scale: cut off at it, never infinite.
        for x in [1e7f32, -3e7, f32::MAX, f32::MIN] {
            let numbers = [x; LEN];
            let back = restored(&numbers, format)[0];
            let least = x.abs().min(65504.0 * highest(format) as f32) * 0.99;
            assert!(back.abs() >= least && back.abs() <= x.abs() * 1.01, "{format:?}: {x} is {back}");
            assert!(back.is_sign_negative() == x.is_sign_negative());
            check_group(&numbers, format);
            check_group(&one(7, x), format);
        }
        // Below the smallest one: nothing is left.
        for x in [1e-9f32, -1e-20, f32::MIN_POSITIVE, 1e-45] {
            assert_eq!(restored(&[x; LEN], format).map(f32::abs), zeros);
        }
        // One number outshines all others.
        let mut numbers = [1e-3f32; LEN];
        numbers[9] = 1.0;
        check_group(&numbers, format);
        assert!((restored(&numbers, format)[9] - 1.0).abs() < 0.1);
        // Two of opposite signs, equal in magnitude.
        numbers[10] = -1.0;
        check_group(&numbers, format);
    }
}

#[test]
fn bytes_of_a_group() {
    let codes: Codes = std::array::from_fn(|i| (i % 16) as i8 - 8);
    let mut bytes = [0; 16];
    pack(&codes, WeightFormat::Int4, &mut bytes);
    // Number i of a row is in bits 4 · (i mod 8) of word ⌊i / 8⌋.
    let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    assert_eq!(words, [0x7654_3210, 0xfedc_ba98, 0x7654_3210, 0xfedc_ba98]);
    let codes: Codes = std::array::from_fn(|i| (i as i8 - 16) * 7);
    let mut bytes = [0; 32];
    pack(&codes, WeightFormat::Int8, &mut bytes);
    assert_eq!(bytes[0], 0x90); // −112
    assert!(bytes.iter().zip(codes).all(|(&byte, code)| byte == code as u8));
}

// ---- bundles

fn options(weights: WeightFormat) -> Options {
    Options {
        latents: Latent::F16,
        profile: Profile::load("lavapipe").unwrap(),
        weights: Some(weights),
        reference: false,
        plan_only: false,
        taps: TapChoice::none(),
    }
}

/// Bytes of a weight on the device: the segments of its shards, behind one another.
fn bytes(bundle: &Bundle, weight: &Weight) -> Vec<u8> {
    let mut out = Vec::new();
    for segment in weight.shards.iter().flat_map(|shard| &shard.segments) {
        let file = &bundle.plan.files[segment.file as usize];
        let path = if file.referenced { PathBuf::from(&file.path) } else { bundle.dir.join(&file.path) };
        let contents = fs::read(path).unwrap();
        out.extend_from_slice(&contents[segment.offset as usize..(segment.offset + segment.bytes) as usize]);
    }
    out
}

fn weight<'a>(bundle: &'a Bundle, name: &str) -> &'a Weight {
    bundle.plan.weights.iter().find(|weight| weight.name == name).unwrap_or_else(|| panic!("no {name}"))
}

/// The numbers of a quantised weight, row after row, expert after expert, in f64; and their steps.
fn decode(bundle: &Bundle, name: &str) -> Vec<(f64, f64)> {
    let weight = weight(bundle, name);
    let scales = self::weight(bundle, &format!("{name}_scale"));
    assert_eq!(scales.format, WeightFormat::F16);
    let (codes, scale_bytes) = (bytes(bundle, weight), bytes(bundle, scales));
    let count: u64 = weight.shape.iter().product();
    assert_eq!(scales.shape, [1, count / 32]);
    assert_eq!(codes.len() as u64, count * weight.format.bits() / 8);
    let number = |i: usize| {
        let code = match weight.format {
            WeightFormat::Int8 => f64::from(codes[i] as i8),
            WeightFormat::Int4 => {
                let word = u32::from_le_bytes(codes[i / 8 * 4..][..4].try_into().unwrap());
                f64::from(word >> (4 * (i % 8)) & 15) - 8.0
            }
            other => panic!("{name} is {other:?}"),
        };
        let at = i / 32 * 2;
        let scale = f16::from_le_bytes([scale_bytes[at], scale_bytes[at + 1]]).to_f64();
        (code * scale, scale.abs())
    };
    (0..count as usize).map(number).collect()
}

/// A tensor of a checkpoint in f64, FP8 with its blocks of 128 × 128.
fn stored(checkpoint: &Checkpoint, name: &str) -> Vec<f64> {
    let tensor = checkpoint.tensor(name).unwrap();
    let data = tensor.data;
    match tensor.dtype.safetensors_name() {
        "F32" => data.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
        "BF16" => data.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
        "F8_E4M3" => {
            let scales = stored(checkpoint, &format!("{name}_scale_inv"));
            let columns = tensor.shape[1];
            let scale = |i: usize| scales[i / columns / 128 * columns.div_ceil(128) + i % columns / 128];
            let number = |code: u8| f64::from(moewe_oracle::numeric::e4m3_to_f32(code));
            data.iter().enumerate().map(|(i, &code)| number(code) * scale(i)).collect()
        }
        other => panic!("{other}"),
    }
}

const SMALL: [&str; 9] = [
    "layers=3",
    "hidden=192",
    "vocab=300",
    "experts=16",
    "moe_intermediate_size=96",
    "intermediate_size=224",
    "num_attention_heads=3",
    "q_lora_rank=160",
    "kv_lora_rank=64",
];

fn checkpoint(dir: &Path, storage: Storage, more: &[&str]) -> Checkpoint {
    let scale: Vec<&str> = SMALL.iter().chain(more).copied().collect();
    let shape = Shape::new("v3", &scale, Some(storage)).unwrap();
    synth::write(&shape, dir, synth::Options::default(), &|_, _| ()).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn compiled(checkpoint: &Checkpoint, options: &Options, out: &Path) -> (Bundle, Vec<String>) {
    let warnings = compile(checkpoint, options, out, &|_, _| ()).unwrap();
    (Bundle::open(out).unwrap(), warnings)
}

/// The numbers that a weight is made of: shared experts may stand behind the routed ones, with rows or columns of one tensor each.
fn numbers_of(checkpoint: &Checkpoint, weight: &Weight) -> Vec<f64> {
    let [experts, _, columns] = weight.shape[..] else { return stored(checkpoint, &weight.name) };
    let routed = (0..experts).map(|expert| weight.name.replace('*', &expert.to_string()));
    let routed: Vec<String> = routed.filter(|name| checkpoint.find(name).is_some()).collect();
    let mut numbers: Vec<f64> = routed.iter().flat_map(|name| stored(checkpoint, name)).collect();
    let (missing, columns) = (experts as usize - routed.len(), columns as usize);
    if missing > 0 {
        let name = weight.name.replace("experts.*", "shared_experts");
        let (shared, width) = (stored(checkpoint, &name), checkpoint.tensor(&name).unwrap().shape[1]);
        for first in (0..width).step_by(columns) {
            numbers.extend(shared.chunks(width).flat_map(|row| &row[first..first + columns]));
        }
    }
    numbers
}

#[test]
fn bundles_hold_the_numbers_in_few_bits() {
    let two: &[&str] = &["n_shared_experts=2", "moe_intermediate_size=128"];
    let none: &[&str] = &[];
    for (storage, more) in
        [(Storage::Bf16, none), (Storage::Fp8, none), (Storage::F32, none), (Storage::Bf16, two), (Storage::Fp8, two)]
    {
        let temp = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(&temp.path().join("model"), storage, more);
        for format in BOTH {
            let (bundle, warnings) = compiled(&checkpoint, &options(format), &temp.path().join(format.name()));
            assert!(warnings.is_empty(), "{warnings:?}");
            let mut found: BTreeMap<WeightFormat, Vec<&str>> = BTreeMap::new();
            for weight in bundle.plan.weights.iter().filter(|weight| !weight.name.ends_with("_scale")) {
                let stem = weight.name.trim_end_matches(".weight");
                found.entry(weight.format).or_default().push(stem.rsplit('.').next().unwrap());
                if !weight.format.is_grouped() {
                    continue;
                }
                let expected = numbers_of(&checkpoint, weight);
                let got = decode(&bundle, &weight.name);
                assert_eq!(got.len(), expected.len());
                let (mut noise, mut signal) = (0.0, 0.0);
                for (i, (&(number, step), &expected)) in got.iter().zip(&expected).enumerate() {
                    noise += (number - expected).powi(2);
                    signal += expected.powi(2);
                    // Half a step; what is largest in its group may be cut off at the last code.
                    let (last, most) = if weight.format == WeightFormat::Int8 { (127.0, 1.1) } else { (7.0, 2.6) };
                    let most = if number.abs() >= last * step { most } else { 0.501 };
                    let off = (number - expected).abs();
                    assert!(off <= most * step + 1e-12, "{} {i}: {number} {expected}, step {step}", weight.name);
                }
                let relative = (noise / signal).sqrt();
                let bound = if weight.format == WeightFormat::Int8 { 0.007 } else { 0.1 };
                assert!(relative < bound && relative > bound / 10.0, "{}: {relative}", weight.name);
            }
            // Every kind of matrix is where it belongs.
            let of = |format| found.get(&format).cloned().unwrap_or_default();
            let (eight, four) = (of(WeightFormat::Int8), of(WeightFormat::Int4));
            for name in ["embed_tokens", "lm_head", "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "eh_proj"] {
                assert!(eight.contains(&name) && !four.contains(&name), "{name}");
            }
            let list = if format == WeightFormat::Int4 { &four } else { &eight };
            for name in ["q_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] {
                assert!(list.contains(&name), "{name}");
            }
            let rest: Vec<&str> =
                found.iter().filter(|(format, _)| !format.is_grouped()).flat_map(|(_, names)| names.clone()).collect();
            assert!(rest.contains(&"gate") && !rest.iter().any(|name| name.ends_with("_proj")), "{rest:?}");
        }
    }
}

#[test]
fn the_same_bytes_again() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&temp.path().join("model"), Storage::Bf16, &[]);
    for format in BOTH {
        let hashes = ["a", "b"].map(|name| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(if name == "a" { 1 } else { 3 }).build().unwrap();
            let out = temp.path().join(format!("{}-{name}", format.name()));
            let (bundle, _) = pool.install(|| compiled(&checkpoint, &options(format), &out));
            bundle.plan.files.iter().map(|file| file.blake3.clone()).collect::<Vec<_>>()
        });
        assert_eq!(hashes[0], hashes[1]);
    }
}

#[test]
fn rows_that_do_not_divide_stay_as_they_are() {
    for (storage, kept) in [(Storage::Bf16, WeightFormat::Bf16), (Storage::Fp8, WeightFormat::Fp8)] {
        let temp = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(&temp.path().join("model"), storage, &["moe_intermediate_size=72"]);
        let options = Options { reference: true, ..options(WeightFormat::Int4) };
        let (bundle, warnings) = compiled(&checkpoint, &options, &temp.path().join("out"));
        let [warning] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(warning.contains("groups of 32") && warning.contains("rows of 72"), "{warning}");
        let down = weight(&bundle, "model.layers.3.mlp.experts.*.down_proj.weight");
        let up = weight(&bundle, "model.layers.3.mlp.experts.*.up_proj.weight");
        assert_eq!((down.format, up.format), (kept, WeightFormat::Int4));
        // Kept ones may be referenced, converted ones never are.
        let referenced = |weight: &Weight| {
            let mut segments = weight.shards.iter().flat_map(|shard| &shard.segments);
            segments.any(|segment| bundle.plan.files[segment.file as usize].referenced)
        };
        assert!(referenced(down) && !referenced(up));
        // A plan alone says the same.
        let plan_only = Options { plan_only: true, ..options };
        let (_, said) = compiled(&checkpoint, &plan_only, &temp.path().join("plan"));
        assert_eq!(said, warnings);
    }
}

#[test]
fn numbers_that_are_none_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("model");
    let opened = checkpoint(&dir, Storage::Bf16, &[]);
    let name = "model.layers.3.mlp.experts.5.up_proj.weight";
    let tensor = opened.tensor(name).unwrap();
    let (offset, columns) = (tensor.offset, tensor.shape[1]);
    let path = opened.files()[tensor.file].path.clone();
    drop(opened);
    let original = fs::read(&path).unwrap();
    for bits in [0x7fc0u16, 0x7f80, 0xff80] {
        let mut damaged = original.clone();
        let at = offset + 2 * (3 * columns + 17);
        damaged[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        fs::write(&path, damaged).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        for format in BOTH {
            let out = temp.path().join("out");
            let error = compile(&checkpoint, &options(format), &out, &|_, _| ()).unwrap_err();
            assert!(matches!(&error, Error::NotFinite { row: 3, column: 17, .. }), "{error}");
            assert!(error.to_string().contains(name) && !out.exists(), "{error}");
        }
    }
}
