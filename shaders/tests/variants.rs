//! Every skeleton links and validates for every legal combination of flags and plugs, without a GPU.

use moewe_plan::{Access, Latent, WeightFormat};
use moewe_shaders::{Reduce, SKELETONS, Skeleton, Variant, link};

const FORMATS: [WeightFormat; 6] = [
    WeightFormat::F32,
    WeightFormat::Bf16,
    WeightFormat::F16,
    WeightFormat::Fp8,
    WeightFormat::Int8,
    WeightFormat::Int4,
];

/// A variant of each skeleton with small odd shapes for all constants that any of them reads.
fn with_shapes(kernel: &'static str) -> Variant {
    let ints = [
        ("K", 12),
        ("N", 10),
        ("D", 12),
        ("V", 70),
        ("WG", 64),
        ("LANES", 4),
        ("ROWS", 2),
        ("N2", 6),
        ("TILE", 3),
        ("TOP_K", 2),
        ("SHARED", 1),
        ("E", 8),
        ("N_GROUP", 4),
        ("TOPK_GROUP", 2),
        ("HEADS", 3),
        ("NOPE", 5),
        ("ROPE", 6),
        ("ROPE_PAIRS", 3),
        ("RANK", 9),
        ("MAX_PAGES", 4),
        ("FIRST", 1),
        ("SCALE_ROWS", 1),
        ("SCALE_COLUMNS", 1),
        ("BLOCK_ROWS", 128),
        ("BLOCK_COLUMNS", 128),
        ("MAX_ROWS", 64),
        ("MODULES", 2),
        ("STEPS", 32),
        ("TOP", 8),
        ("X_SHARE", 2),
        ("X0", 3),
        ("X1", 5),
    ];
    let mut variant = Variant::new(kernel).float("EPS", 1e-6).float("SCALE", 2.5).float("SOFTMAX_SCALE", 0.1);
    for (name, value) in ints {
        // `V` is the vocabulary in `sample` and the value head elsewhere; any number will do.
        variant = variant.int(name, value);
    }
    match kernel {
        "latent_attention" => variant.int("LANES", 8).int("SUBGROUP", 8).int("TEAMS", 2).int("SPLITS", 2),
        "absorb_output" => variant.int("SPLITS", 2),
        _ => variant,
    }
}

fn plugs(variant: &Variant, skeleton: &Skeleton) -> Vec<Variant> {
    let mut all = vec![variant.clone()];
    if skeleton.weight || skeleton.matrix {
        // Flags meet one format without scales, and one with each kind of them; all formats meet a kernel without flags.
        let each = if variant.flags.is_empty() { &FORMATS[..] } else { &[WeightFormat::Bf16, FORMATS[3], FORMATS[5]] };
        all = all.iter().flat_map(|v| each.iter().map(|&format| v.clone().weight(format))).collect();
    }
    if skeleton.matrix {
        all = all.iter().flat_map(|v| [v.clone(), v.clone().int("K", 64).wide(true)]).collect();
    }
    if skeleton.latent {
        all = all.iter().flat_map(|v| Latent::ALL.map(|l| v.clone().latent(l))).collect();
    }
    if skeleton.reduce {
        let ways = [(Reduce::None, 1), (Reduce::Workgroup, 4), (Reduce::Subgroup, 4)];
        all = all.iter().flat_map(|v| ways.map(|(way, lanes)| v.clone().reduce(way).int("LANES", lanes))).collect();
    }
    all
}

#[test]
fn every_variant_links_and_validates() {
    let mut count = 0;
    for skeleton in SKELETONS {
        // `scaled` and `half_scales` follow the format; the other flags are free.
        let flags: Vec<_> = skeleton.flags.iter().filter(|flag| !["scaled", "half_scales"].contains(flag)).collect();
        for bits in 0..1u32 << flags.len() {
            let mut variant = with_shapes(skeleton.name);
            for (i, flag) in flags.iter().enumerate() {
                variant = variant.flag(flag, bits >> i & 1 == 1);
            }
            // SwiGLU never carries a bias or a residual: no family has that.
            let has = |flag| variant.flags.contains(flag);
            if has("gated") && (has("bias") || has("residual")) {
                continue;
            }
            // Nothing is fused with a second matrix but a norm.
            if has("second") && (has("gated") || has("bias") || has("residual")) {
                continue;
            }
            // Nor with products of sorted slots.
            if has("experts") && (has("bias") || has("residual")) {
                continue;
            }
            // One token is asked for, or none.
            if ["next", "given", "ring"].into_iter().filter(|flag| has(flag)).count() > 1 {
                continue;
            }
            for variant in plugs(&variant, skeleton) {
                // Routers are never quantised.
                if variant.flags.contains("scaled") && !skeleton.flags.contains(&"scaled") {
                    continue;
                }
                // Inputs are shared by invocations with rows of their own, in blocks.
                // Tiles of tokens are multiplied with blocks alone.
                let tiles = skeleton.name.starts_with("gemm");
                if tiles && (!variant.wide || has("pooled") != (skeleton.name == "gemm")) {
                    continue;
                }
                let alone = variant.reduce == Some(Reduce::None) && variant.wide && has("aligned");
                if !tiles && (has("pooled") && !alone || variant.wide && !has("aligned")) {
                    continue;
                }
                let linked = link(&variant).unwrap_or_else(|error| panic!("{error}"));
                let storage = linked.bindings.iter().filter(|b| b.access != Access::Uniform).count();
                // These two are for devices that bind more; elsewhere there are two kernels for each.
                let most = if ["absorb_write", "router_product"].contains(&skeleton.name) { 12 } else { 8 };
                assert!(storage <= most, "{}: {storage} storage buffers, {most} expected", variant.name());
                assert!(linked.workgroup_bytes <= 16384, "{}: {} bytes", variant.name(), linked.workgroup_bytes);
                count += 1;
            }
        }
    }
    assert!(count > 400, "only {count} variants were tried");
}

#[test]
fn misuse_is_an_error_with_the_variants_name() {
    let missing = link(&with_shapes("linear").reduce(Reduce::None)).unwrap_err().to_string();
    assert!(missing.contains("linear") && missing.contains("socket weight"), "{missing}");
    let flag = link(&with_shapes("gather_rows").flag("gated", true)).unwrap_err().to_string();
    assert!(flag.contains("no flag gated"), "{flag}");
    let kernel = link(&Variant::new("nonsense")).unwrap_err().to_string();
    assert!(kernel.contains("no such kernel"), "{kernel}");
    let shape = link(&Variant::new("gather_rows").int("WG", 64)).unwrap_err().to_string();
    assert!(shape.contains("gather_rows"), "{shape}");
}

#[test]
fn cooperative_matrices_are_declared() {
    let plain = with_shapes("gemm_coop").weight(WeightFormat::Bf16).wide(true).int("K", 64);
    for (sixteen, size, subgroups) in [(false, 8, 16), (true, 16, 4)] {
        let linked = link(&plain.clone().flag("sixteen", sixteen)).unwrap();
        assert_eq!((linked.cooperative, linked.subgroups), (size, true));
        assert_eq!(linked.workgroup_size, [4 * subgroups, 1, 1]);
        assert!(linked.wgsl.contains("\nenable wgpu_cooperative_matrix;\n"));
    }
    let tiled = with_shapes("gemm_tiled").weight(WeightFormat::Bf16).wide(true).int("K", 64);
    let linked = link(&tiled).unwrap();
    assert_eq!(linked.cooperative, 0);
    assert!(!linked.wgsl.contains("\nenable "));
}

#[test]
fn bindings_are_numbered_without_gaps() {
    let plain = with_shapes("linear").weight(WeightFormat::Bf16).reduce(Reduce::None);
    let names = |variant: &Variant| -> Vec<String> {
        link(variant).unwrap().bindings.into_iter().map(|binding| binding.name).collect()
    };
    assert_eq!(names(&plain), ["batch", "part", "x", "w", "y"]);
    let full = plain.clone().weight(WeightFormat::Fp8).flag("bias", true).flag("norm", true).flag("residual", true);
    assert_eq!(names(&full), ["batch", "part", "x", "w", "w_scale", "norm", "bias", "residual", "y"]);
    assert!(link(&full).unwrap().wgsl.contains("@binding(8)"));
}

#[test]
fn snapshots() {
    let linear = with_shapes("linear")
        .weight(WeightFormat::Fp8)
        .reduce(Reduce::Workgroup)
        .flag("norm", true)
        .flag("aligned", true);
    insta::assert_snapshot!("linear_fp8_norm", link(&linear).unwrap().wgsl);
    let router =
        with_shapes("router").flag("bias", true).flag("groups", true).flag("top2", true).flag("normalise", true);
    insta::assert_snapshot!("router_v3", link(&router).unwrap().wgsl);
    let edited = router.flag("edit", true);
    insta::assert_snapshot!("router_v3_edit", link(&edited).unwrap().wgsl);
    insta::assert_snapshot!("top_tokens_next", link(&with_shapes("top_tokens").flag("next", true)).unwrap().wgsl);
    insta::assert_snapshot!("top_tokens_ring", link(&with_shapes("top_tokens").flag("ring", true)).unwrap().wgsl);
    let attention = with_shapes("latent_attention").latent(Latent::F16);
    insta::assert_snapshot!("latent_attention_f16", link(&attention).unwrap().wgsl);
    let holes = attention.flag("holes", true);
    insta::assert_snapshot!("latent_attention_f16_holes", link(&holes).unwrap().wgsl);
    let tile = with_shapes("gemm_coop").weight(WeightFormat::Fp8).wide(true).int("K", 64).int("LANES", 32);
    let tile = tile.flag("norm", true).flag("sixteen", true);
    insta::assert_snapshot!("gemm_coop_fp8_norm", link(&tile).unwrap().wgsl);
    insta::assert_snapshot!("accept", link(&with_shapes("accept")).unwrap().wgsl);
    insta::assert_snapshot!("propose", link(&with_shapes("propose")).unwrap().wgsl);
}
