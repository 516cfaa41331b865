//! Edits against changed weights that do the same, and the tensors that only watching shows.

use std::path::Path;

use moewe_oracle::ops::{self, LatentRows};
use moewe_oracle::{Edits, Model, Trace, rel_l2};

fn load(name: &str) -> Model {
    Model::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(name)).unwrap_or_else(|e| panic!("{e}"))
}

fn prompt() -> Vec<u32> {
    (0..30).map(|i| i * i * 7 % 120).collect()
}

fn edited(name: &str, edits: Edits) -> Trace {
    Model { edits, ..load(name) }.trace(&prompt())
}

fn assert_same(found: &Trace, expected: &Trace, tensor: &str) {
    let error = rel_l2(found[tensor].f64s(), expected[tensor].f64s());
    assert!(error <= 1e-12, "{tensor} is off by {error:e}");
}

fn assert_other(found: &Trace, plain: &Trace, tensor: &str) {
    let change = rel_l2(found[tensor].f64s(), plain[tensor].f64s());
    assert!(change > 1e-4, "{tensor} changed by {change:e}");
}

const CHECKPOINTS: [&str; 2] = ["v3-tiny", "v2-tiny"];

#[test]
fn zeroed_and_scaled_parts_are_as_with_such_weights() {
    for name in CHECKPOINTS {
        let (plain, model) = (load(name).trace(&prompt()), load(name));
        let dims = &model.config.mla;
        let (heads, latent) = (dims.heads, dims.latent);

        let mut changed = model.clone();
        let o_proj = changed.weights.need_mut("model.layers.1.self_attn.o_proj.weight");
        let columns = o_proj.shape[1];
        for row in o_proj.data.chunks_exact_mut(columns) {
            row[2 * columns / heads..3 * columns / heads].fill(0.0);
        }
        let found = edited(name, Edits { zero_heads: [(1, 2)].into(), ..Edits::default() });
        assert_same(&found, &changed.trace(&prompt()), "logits");
        assert_other(&found, &plain, "hidden.2");
        assert_same(&found, &plain, "hidden.1");

        let mut changed = model.clone();
        changed.weights.need_mut("model.layers.0.self_attn.kv_a_layernorm.weight").data[5] = 0.0;
        let found = edited(name, Edits { zero_latents: [(0, 5)].into(), ..Edits::default() });
        assert_same(&found, &changed.trace(&prompt()), "logits");
        assert_other(&found, &plain, "hidden.1");
        assert!(found["mla.0.c_kv"].f64s().iter().skip(5).step_by(latent).all(|&number| number == 0.0));

        let mut changed = model.clone();
        let down = changed.weights.need_mut("model.layers.2.mlp.experts.3.down_proj.weight");
        down.data.iter_mut().for_each(|weight| *weight *= -1.5);
        let found = edited(name, Edits { scales: [((2, 3), -1.5)].into(), ..Edits::default() });
        assert_same(&found, &changed.trace(&prompt()), "logits");
        assert_other(&found, &plain, "hidden.3");
    }
}

#[test]
fn experts_are_muted_forced_and_pinned() {
    for name in CHECKPOINTS {
        let plain = load(name).trace(&prompt());
        let ids = |trace: &Trace| -> Vec<Vec<i32>> {
            let tensor = &trace["moe.1.ids"];
            tensor.i32s().chunks(tensor.shape[1]).map(<[i32]>::to_vec).collect()
        };
        let favourite = ids(&plain)[0][0];
        let place = (1, favourite as usize);
        assert!(ids(&plain).iter().any(|ids| !ids.contains(&favourite)));
        let muted = edited(name, Edits { muted: [place].into(), ..Edits::default() });
        assert!(ids(&muted).iter().all(|ids| !ids.contains(&favourite)), "{name}");
        let forced = edited(name, Edits { forced: [place].into(), ..Edits::default() });
        assert!(ids(&forced).iter().all(|ids| ids.contains(&favourite)), "{name}");
        // Tokens that would have chosen it anyway choose as ever, with the same weights.
        let k = plain["moe.1.ids"].shape[1];
        let weights = |trace: &Trace, t: usize| trace["moe.1.weights"].f64s()[t * k..][..k].to_vec();
        for (t, chosen) in ids(&plain).into_iter().enumerate().filter(|(_, ids)| ids.contains(&favourite)) {
            assert_eq!(chosen, ids(&forced)[t], "{name}");
            assert!(rel_l2(&weights(&forced, t), &weights(&plain, t)) < 1e-12, "{name}");
        }
        let pinned: Vec<usize> = (0..k).map(|i| 3 * i + 1).collect();
        let edits = Edits { forced: pinned.iter().map(|&e| (1, e)).collect(), ..Edits::default() };
        let expected: Vec<i32> = pinned.iter().map(|&e| e as i32).collect();
        assert!(ids(&edited(name, edits)).iter().all(|ids| *ids == expected), "{name}");
    }
}

#[test]
fn what_only_watching_shows_agrees_with_the_rest() {
    for name in ["v3-tiny", "v2-lite-tiny", "kimi-k2-tiny"] {
        let model = Model { extras: true, ..load(name) };
        let (trace, plain) = (model.trace(&prompt()), load(name).trace(&prompt()));
        let extra: Vec<&String> = trace.keys().filter(|tensor| !plain.contains_key(*tensor)).collect();
        assert_eq!(extra.len(), 3 * model.config.layers, "{extra:?}");
        assert!(plain.iter().all(|(tensor, value)| trace[tensor] == *value));
        let last = model.config.layers - 1;
        assert_same(&trace, &Trace::from([(format!("lens.{last}"), trace["logits"].clone())]), &format!("lens.{last}"));

        let (dims, t) = (&model.config.mla, prompt().len());
        let positions: Vec<usize> = (0..t).collect();
        for layer in 0..=last {
            let tensor = |part: &str| &trace[&format!("mla.{layer}.{part}")];
            let weights = tensor("attention");
            assert_eq!(weights.shape, [dims.heads, t, t]);
            for (row, weights) in weights.f64s().chunks(t).enumerate() {
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert!(weights[row % t + 1..].iter().all(|&weight| weight == 0.0));
            }
            // The weighted latents are what attention gives for the query.
            let (query, rope) = ops::split_rows(tensor("query").f64s(), dims.latent + dims.rope, dims.latent);
            let c = tensor("c_kv").f64s();
            let rows = LatentRows { c, k_rope: tensor("k_rope").f64s(), positions: &positions };
            let attended = ops::attend_latent(dims, &query, &rope, &positions, &rows);
            for (row, expected) in attended.chunks(dims.latent).enumerate() {
                let (token, head) = (row / dims.heads, row % dims.heads);
                let mut sum = vec![0.0; dims.latent];
                for (s, weight) in weights.f64s()[(head * t + token) * t..][..t].iter().enumerate() {
                    ops::add_scaled(&mut sum, *weight, &c[s * dims.latent..][..dims.latent]);
                }
                assert!(rel_l2(&sum, expected) < 1e-12, "layer {layer}, token {token}, head {head}");
            }
        }
    }
}
