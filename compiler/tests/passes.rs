//! The graph of each golden checkpoint, before and after each pass: same numbers, and those of the golden files.

mod interp;

use std::path::PathBuf;

use interp::{Batch, Session};
use moewe_compiler::{
    config::Config,
    graph::{Graph, Node, Op, Rows, Tap, TensorType, Value},
    model::{Target, build},
    passes::{PASSES, run_all, run_one},
};
use moewe_oracle::{Data, Model, Trace, rel_l2, safetensors};
use moewe_plan::{TapChoice, TapGroup};

/// Passes only reorder sums.
const BETWEEN_PASSES: f64 = 1e-10;
/// Golden files are rounded to f32.
const AGAINST_GOLDEN: f64 = 1e-6;

const CHECKPOINTS: [&str; 7] =
    ["v3-tiny", "v3-fp8-tiny", "v3-bf16-tiny-sharded", "v3-mtp-accept-tiny", "v2-lite-tiny", "v2-tiny", "kimi-k2-tiny"];

struct Checkpoint {
    config: Config,
    model: Model,
    golden: Trace,
}

impl Checkpoint {
    fn load(name: &str) -> Self {
        let root = golden_dir();
        // Shards hold the same weights as the file that they were cut from; the golden files lie there.
        let golden = root.join(name.trim_end_matches("-sharded")).join("golden/len7.safetensors");
        let golden = safetensors::read(&golden).expect("golden file");
        Self {
            config: config(name),
            model: Model::load(root.join(name)).expect("checkpoint"),
            golden: golden.iter().map(|(name, tensor)| (name.clone(), tensor.to_tensor())).collect(),
        }
    }

    fn graph(&self, target: Target) -> Graph {
        self.graph_with(target, &TapChoice::all())
    }

    fn graph_with(&self, target: Target, taps: &TapChoice) -> Graph {
        build(&self.config, target, taps, &|name| self.model.weights.get(name).is_some())
    }

    /// What the target's program works on for the golden sequence, and a session in which all programs before it ran.
    fn before(&self, target: Target) -> (Session<'_>, Batch) {
        let mut session = Session::new(&self.model);
        let batch = |name: &str, first| {
            let tokens: Vec<u32> = self.golden[name].i32s().iter().map(|&t| t as u32).collect();
            Batch::sequence(&tokens, first)
        };
        let Target::Draft { module } = target else { return (session, batch("input_ids", 0)) };
        session.run(&self.graph(Target::Trace), &batch("input_ids", 0));
        for earlier in 1..module {
            let batch = batch(&format!("mtp.{earlier}.input_ids"), earlier);
            session.run(&self.graph(Target::Draft { module: earlier }), &batch);
        }
        (session, batch(&format!("mtp.{module}.input_ids"), module))
    }
}

fn golden_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn config(name: &str) -> Config {
    Config::load(&golden_dir().join(name).join("config.json")).expect("config.json")
}

/// A configuration with some fields changed.
fn config_with(name: &str, changes: &[(&str, serde_json::Value)]) -> Config {
    let path = golden_dir().join(name).join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("file")).expect("JSON");
    for (field, value) in changes {
        json[*field] = value.clone();
    }
    Config::from_value(&json, &path).expect("still a configuration")
}

/// Experts in ascending order, as golden files have them.
fn ascending(mut trace: Trace) -> Trace {
    let layers = trace.keys().filter(|name| name.starts_with("moe.")).filter_map(|name| name.strip_suffix(".ids"));
    let layers: Vec<String> = layers.map(str::to_owned).collect();
    for layer in layers {
        let (ids_name, weights_name) = (format!("{layer}.ids"), format!("{layer}.weights"));
        let (mut ids, mut weights) = (trace[&ids_name].clone(), trace[&weights_name].clone());
        let k = ids.shape[1];
        let (Data::I32(i), Data::F64(w)) = (&mut ids.data, &mut weights.data) else { panic!("types of {layer}") };
        for (ids, weights) in i.chunks_exact_mut(k).zip(w.chunks_exact_mut(k)) {
            let mut pairs: Vec<_> = ids.iter().copied().zip(weights.iter().copied()).collect();
            pairs.sort_by_key(|&(id, _)| id);
            for (at, (id, weight)) in pairs.into_iter().enumerate() {
                (ids[at], weights[at]) = (id, weight);
            }
        }
        trace.insert(ids_name, ids);
        trace.insert(weights_name, weights);
    }
    trace
}

fn assert_agree(found: &Trace, expected: &Trace, tolerance: f64, when: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{when}");
    for (name, expected) in expected {
        let found = &found[name];
        assert_eq!(found.shape, expected.shape, "{when}: {name}");
        match &expected.data {
            Data::I32(ids) => assert_eq!(found.i32s(), ids, "{when}: {name}"),
            Data::F64(numbers) => {
                // −∞ marks experts of dropped groups; elsewhere it would be wrong, and then not the same in both.
                let numbers: Vec<(f64, f64)> = found.f64s().iter().copied().zip(numbers.iter().copied()).collect();
                let finite =
                    numbers.into_iter().filter(|&(f, e)| f.max(e) > f64::NEG_INFINITY || f.is_nan() || e.is_nan());
                let (found, expected): (Vec<_>, Vec<_>) = finite.unzip();
                let error = rel_l2(&found, &expected);
                assert!(error <= tolerance, "{when}: {name} is off by {error:e}");
            }
        }
    }
}

/// The tensors of the golden file that a target's program gives.
fn golden_of(checkpoint: &Checkpoint, graph: &Graph) -> Trace {
    let wanted = |name: &String| graph.taps.iter().any(|tap| tap.name == *name);
    checkpoint.golden.iter().filter(|(name, _)| wanted(name)).map(|(n, t)| (n.clone(), t.clone())).collect()
}

fn passes_keep_the_numbers(name: &str) {
    let checkpoint = Checkpoint::load(name);
    for target in Target::all(&checkpoint.config).into_iter().filter(|target| *target != Target::Forward) {
        let (before, batch) = checkpoint.before(target);
        let mut graph = checkpoint.graph(target);
        graph.verify().expect("the plain graph is sound");
        let plain = before.clone().run(&graph, &batch);
        let golden = golden_of(&checkpoint, &graph);
        let mut comparable = ascending(plain.clone());
        comparable.retain(|tap, _| checkpoint.golden.contains_key(tap));
        assert_agree(&comparable, &golden, AGAINST_GOLDEN, &format!("{name}, {target:?}, plain"));

        for pass in PASSES {
            run_one(pass, &mut graph).expect("the graph stays sound");
            let fused = before.clone().run(&graph, &batch);
            assert_agree(&fused, &plain, BETWEEN_PASSES, &format!("{name}, {target:?}, after {}", pass.name));
        }
    }
}

/// Every tensor of a golden file is a tap of exactly one target if nothing is to be watched.
fn all_golden_tensors_are_taps(name: &str) {
    let checkpoint = Checkpoint::load(name);
    let targets = Target::all(&checkpoint.config);
    let graphs = targets.iter().map(|target| checkpoint.graph_with(*target, &TapChoice::none()));
    let mut taps: Vec<String> = graphs.flat_map(|graph| graph.taps).map(|tap| tap.name).collect();
    taps.sort();
    let golden = checkpoint.golden.keys().filter(|n| !n.ends_with("input_ids") && !n.starts_with("extra."));
    assert_eq!(taps, golden.cloned().collect::<Vec<_>>());
}

/// `moewe run` takes this way: sampled tokens of the fused forward program, one at a time, are the golden ones.
fn forward_generates_the_golden_tokens(name: &str) {
    let checkpoint = Checkpoint::load(name);
    let file = golden_dir().join(name.trim_end_matches("-sharded")).join("golden/golden.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).expect("file")).expect("JSON");
    let greedy = json["sequences"]["len7"]["greedy"].as_array().expect("tokens");
    let greedy: Vec<u32> = greedy.iter().map(|t| t.as_u64().expect("token") as u32).take(6).collect();

    for target in [Target::Forward, Target::Watch] {
        let mut graph = checkpoint.graph(target);
        run_all(&mut graph).expect("the graph stays sound");
        let (mut session, mut batch) = checkpoint.before(target);
        batch.wanted = vec![batch.tokens.len() - 1];
        while session.finished.len() < greedy.len() {
            let taps = session.run(&graph, &batch);
            assert_eq!(taps.is_empty(), target == Target::Forward, "only the forward program has no taps");
            batch = Batch::sequence(&session.finished[session.finished.len() - 1..], 7 + session.finished.len() - 1);
        }
        assert_eq!(session.finished, greedy, "{target:?}");
    }
}

macro_rules! each_checkpoint {
    ($($test:ident: $name:literal),+ $(,)?) => {$(
        mod $test {
            #[test]
            fn passes_keep_the_numbers() {
                super::passes_keep_the_numbers($name);
            }

            #[test]
            fn all_golden_tensors_are_taps() {
                super::all_golden_tensors_are_taps($name);
            }

            #[test]
            fn forward_generates_the_golden_tokens() {
                super::forward_generates_the_golden_tokens($name);
            }
        }
    )+};
}

each_checkpoint! {
    v3: "v3-tiny",
    v3_fp8: "v3-fp8-tiny",
    v3_bf16_sharded: "v3-bf16-tiny-sharded",
    v3_mtp_accept: "v3-mtp-accept-tiny",
    v2_lite: "v2-lite-tiny",
    v2: "v2-tiny",
    kimi_k2: "kimi-k2-tiny",
}

#[test]
fn a_sequence_in_chunks_gives_the_same() {
    let checkpoint = Checkpoint::load("v3-tiny");
    let mut graph = checkpoint.graph(Target::Trace);
    run_all(&mut graph).expect("the graph stays sound");
    let (mut session, whole) = checkpoint.before(Target::Trace);
    let expected = session.clone().run(&graph, &whole);
    let first = session.run(&graph, &Batch::sequence(&whole.tokens[..3], 0));
    let second = session.run(&graph, &Batch::sequence(&whole.tokens[3..], 3));
    for name in ["logits", "hidden.4", "mla.2.k_rope"] {
        let joined = [first[name].f64s(), second[name].f64s()].concat();
        assert!(rel_l2(&joined, expected[name].f64s()) <= BETWEEN_PASSES, "{name}");
    }
}

/// A watched run leaves for a draft what a trace leaves, whatever is tapped.
#[test]
fn drafts_can_follow_a_watched_run() {
    let checkpoint = Checkpoint::load("v3-mtp-accept-tiny");
    let fused = |target, taps: &str| {
        let mut graph = checkpoint.graph_with(target, &taps.parse().expect("a choice of taps"));
        run_all(&mut graph).expect("the graph stays sound");
        graph
    };
    let draft = fused(Target::Draft { module: 1 }, "all");
    let (mut after_trace, batch) = checkpoint.before(Target::Draft { module: 1 });
    let expected = after_trace.run(&draft, &batch);
    for taps in ["timing", "hidden", "all"] {
        let (mut session, prompt) = checkpoint.before(Target::Watch);
        session.run(&fused(Target::Watch, taps), &prompt);
        assert_agree(&session.run(&draft, &batch), &expected, BETWEEN_PASSES, taps);
    }
}

/// What is told of wanted rows is what is told of tokens where all of these are wanted, whether the batch or sampling knows
/// what follows; and the lens of the last layer sees the logits that sampling sees.
#[test]
fn predictions_of_rows_are_those_of_tokens() {
    let checkpoint = Checkpoint::load("v3-tiny");
    let mut graph = checkpoint.graph_with(Target::Watch, &"logits,lens:3".parse().expect("a choice of taps"));
    run_all(&mut graph).expect("the graph stays sound");
    for at in 0..graph.taps.len() {
        if graph.ty(graph.taps[at].value).rows == Rows::Wanted {
            graph.taps[at].name += ".of_rows";
        }
    }
    let (session, mut batch) = checkpoint.before(Target::Watch);
    batch.wanted = (0..batch.tokens.len()).collect();
    for follows in [true, false] {
        if !follows {
            batch.next.fill(None);
        }
        let told = session.clone().run(&graph, &batch);
        for part in ["ids", "probs", "stats"] {
            let of_rows = &told[&format!("logits.{part}.of_rows")];
            assert_eq!(*of_rows, told[&format!("logits.{part}")], "{part}, {follows}");
            assert_eq!(of_rows.shape[0], batch.tokens.len());
        }
        for part in ["ids", "probs"] {
            assert_eq!(told[&format!("lens.3.{part}")], told[&format!("logits.{part}")], "{part}");
        }
        let (stats, lens) = (told["logits.stats"].f64s(), told["lens.3.stats"].f64s());
        // The last layer's favourite has rank 0; what is sampled at temperature 0 is the same token.
        assert!(lens.chunks(3).all(|stats| stats[2] == 0.0));
        assert_eq!(stats == lens, !follows);
    }
}

#[test]
fn only_fused_operations_remain() {
    for name in CHECKPOINTS {
        let config = config(name);
        for target in Target::all(&config) {
            let mut graph = build(&config, target, &TapChoice::all(), &|_| false);
            run_all(&mut graph).expect("the graph stays sound");
            for node in &graph.nodes {
                let fused = matches!(
                    node.op,
                    Op::Embed { .. }
                        | Op::ReadState { .. }
                        | Op::WriteState { .. }
                        | Op::RmsNorm(_)
                        | Op::Linear { .. }
                        | Op::GatherRows
                        | Op::Sample
                        | Op::Logprobs
                        | Op::Accept
                        | Op::Propose
                        | Op::TopTokens(_)
                        | Op::AbsorbWrite { .. }
                        | Op::LatentAttention { .. }
                        | Op::AbsorbOutput { .. }
                        | Op::LinearPair { .. }
                        | Op::GateUp { .. }
                        | Op::RouterProduct { .. }
                        | Op::ExpertGateUp { .. }
                        | Op::ExpertDown { .. }
                        | Op::MtpJoin { .. }
                );
                assert!(fused, "{name}, {target:?}: {} {} is left", node.label, node.op.name());
            }
        }
    }
}

/// Four layers, the first of them dense, and one draft module.
#[test]
fn each_pass_fires_as_often_as_it_should() {
    let config = config("v3-tiny");
    let draft = Target::Draft { module: 1 };
    let expected = [
        ("absorb_mla", [4, 4, 4, 1]),
        ("latent_write", [4, 4, 4, 1]),
        ("rope_query", [4, 4, 4, 1]),
        ("swiglu", [1 + 2 * 3, 1 + 2 * 3, 1 + 2 * 3, 2]),
        ("router", [3, 3, 3, 1]),
        ("experts", [3, 3, 3, 1]),
        ("mtp_join", [0, 0, 0, 1]),
        // Before attention, in the query and before the feed-forward network; the final one is tapped in a trace. To watch
        // there is one before the logits of all tokens and one before each layer's; the last layer's are the former.
        ("norm", [3 * 4 + 1, 3 * 4 + 1 + 1 + 3, 3 * 4, 3]),
        // After attention, and after the dense network or the shared experts.
        ("residual", [2 * 4, 2 * 4, 2 * 4, 2]),
        ("absorb_write", [4, 4, 4, 1]),
        ("pair", [4, 4, 4, 1]),
        ("shared_experts", [3, 3, 3, 1]),
        ("router_product", [3, 3, 3, 1]),
    ];
    for (at, target) in [Target::Forward, Target::Watch, Target::Trace, draft].into_iter().enumerate() {
        let graph = &mut build(&config, target, &TapChoice::all(), &|_| false);
        let counts = run_all(graph).expect("the graph stays sound");
        assert_eq!(counts, expected.map(|(name, counts)| (name, counts[at])), "{target:?}");
    }
}

/// Whatever one value is tapped, it is there after all passes and the same.
#[test]
fn no_pass_swallows_a_tap() {
    let checkpoint = Checkpoint::load("v3-mtp-accept-tiny");
    for target in [Target::Trace, Target::Watch, Target::Draft { module: 1 }] {
        let (before, mut batch) = checkpoint.before(target);
        if !matches!(target, Target::Draft { .. }) {
            batch = Batch::sequence(&batch.tokens[..3], 0);
        }
        let mut plain = checkpoint.graph(target);
        plain.taps.clear();
        let outputs = |(node, n): (usize, &Node)| (0..n.outputs.len()).map(move |output| Value { node, output });
        let values: Vec<_> = plain.nodes.iter().enumerate().flat_map(outputs).collect();
        for value in values {
            let ty = plain.ty(value);
            let (group, layer, optional) = (TapGroup::Hidden, None, true);
            let tap = Tap { name: "value".into(), group, layer, optional, value, offset: 0, columns: ty.row_len() };
            let tapped = Graph { taps: vec![tap], ..plain.clone() };
            let expected = before.clone().run(&tapped, &batch);
            let mut fused = tapped.clone();
            run_all(&mut fused).expect("the graph stays sound");
            let label = &plain.nodes[value.node].label;
            // Behind chosen experts there may stand shared ones.
            let (left, columns) = (fused.ty(fused.taps[0].value), fused.taps[0].columns);
            assert_eq!((left.dtype, left.rows, columns), (ty.dtype, ty.rows, ty.row_len()), "{label}");
            assert_agree(&before.clone().run(&fused, &batch), &expected, BETWEEN_PASSES, label);
        }
    }
}

#[test]
fn unusual_configurations_give_sound_graphs() {
    let changes: [(&str, serde_json::Value); 7] = [
        ("num_hidden_layers", 61.into()),
        ("n_shared_experts", 0.into()),
        ("attention_bias", true.into()),
        ("tie_word_embeddings", true.into()),
        ("moe_layer_freq", 2.into()),
        ("n_routed_experts", serde_json::Value::Null),
        ("num_nextn_predict_layers", 3.into()),
    ];
    for change in changes {
        let config = config_with("v3-tiny", std::slice::from_ref(&change));
        for target in Target::all(&config) {
            let mut graph = build(&config, target, &TapChoice::all(), &|_| true);
            graph.verify().expect("the plain graph is sound");
            run_all(&mut graph).unwrap_or_else(|e| panic!("{}: {e}", change.0));
        }
    }
}

fn weight_names(config: &Config, target: Target, in_checkpoint: bool) -> Vec<String> {
    build(config, target, &TapChoice::all(), &|_| in_checkpoint).weights.into_iter().map(|weight| weight.name).collect()
}

/// Of a linear; the correction bias of the router is called otherwise.
fn is_bias(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, last)| last == "bias")
}

#[test]
fn biases_and_tied_heads_are_taken_from_the_checkpoint_as_configured() {
    let plain = weight_names(&config("v3-tiny"), Target::Forward, false);
    assert!(!plain.iter().any(|name| is_bias(name)));
    assert!(plain.iter().any(|name| name == "lm_head.weight"));

    let changes = [("attention_bias", true.into()), ("tie_word_embeddings", true.into())];
    let changed = weight_names(&config_with("v3-tiny", &changes), Target::Forward, false);
    let biases: Vec<_> = changed.iter().filter(|name| name.contains("layers.2.") && is_bias(name)).collect();
    let prefix = "model.layers.2.self_attn";
    assert_eq!(biases, ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"].map(|n| format!("{prefix}.{n}.bias")).each_ref());
    assert!(!changed.iter().any(|name| name == "lm_head.weight"));
}

#[test]
fn a_draft_module_prefers_its_own_embedding_and_head() {
    let config = config("v3-tiny");
    let target = Target::Draft { module: 1 };
    let own = ["model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"];
    let main = ["model.embed_tokens.weight", "lm_head.weight"];
    for (in_checkpoint, named, not_named) in [(true, own, main), (false, main, own)] {
        let names = weight_names(&config, target, in_checkpoint);
        assert!(named.iter().all(|name| names.iter().any(|n| n == name)), "{names:?}");
        assert!(!not_named.iter().any(|name| names.iter().any(|n| n == name)), "{names:?}");
    }
}

/// What `verify` says of the v3-tiny graph after all passes and a change.
fn complaint(change: impl FnOnce(&mut Graph)) -> String {
    let mut graph = build(&config("v3-tiny"), Target::Trace, &TapChoice::none(), &|_| false);
    run_all(&mut graph).expect("the graph stays sound");
    change(&mut graph);
    graph.verify().expect_err("a broken graph").to_string()
}

fn find(graph: &Graph, label: &str) -> usize {
    graph.nodes.iter().position(|node| node.label == label).unwrap_or_else(|| panic!("no {label}"))
}

#[test]
fn broken_graphs_are_named() {
    let forward = complaint(|g| {
        let id = find(g, "layers.0.o");
        g.nodes[id].inputs[0].node = id + 1;
    });
    let missing_output = complaint(|g| {
        let id = find(g, "layers.0.o");
        g.nodes[id].inputs[0].output = 1;
    });
    let other_rows = complaint(|g| {
        let id = find(g, "head");
        let last = g.nodes[id - 2].inputs[0];
        g.nodes[id].inputs.push(last);
    });
    let too_few = complaint(|g| {
        let id = find(g, "layers.1.experts_down");
        g.nodes[id].inputs.pop();
    });
    let ids_for_floats = complaint(|g| {
        let id = find(g, "layers.1.experts_down");
        g.nodes[id].inputs[2] = g.nodes[id].inputs[1];
    });
    let other_layer = complaint(|g| {
        let (first, second) = (find(g, "layers.0.absorb_write"), find(g, "layers.1.attention"));
        g.nodes[second].inputs[1].node = first;
    });
    let wrong_weight = complaint(|g| {
        let weight = g.weights.iter().position(|w| w.name.ends_with("layers.2.self_attn.o_proj.weight"));
        g.weights[weight.expect("o_proj")].shape[1] += 1;
    });
    let not_of_experts = complaint(|g| {
        let weight = g
            .weights
            .iter()
            .position(|w| w.shared.is_some() && w.name.ends_with("layers.1.mlp.experts.*.up_proj.weight"));
        g.weights[weight.expect("up_proj")].experts = None;
    });
    let no_weight = complaint(|g| {
        let id = find(g, "embed");
        g.nodes[id].op = Op::Embed { weight: 9999 };
    });
    let wrong_output = complaint(|g| {
        let id = find(g, "final_norm");
        g.nodes[id].outputs = vec![TensorType { rows: Rows::Wanted, ..TensorType::tokens(&[63]) }];
    });
    let short_tap = complaint(|g| g.taps[0].columns = 65);
    insta::assert_snapshot!(
        [
            forward,
            missing_output,
            other_rows,
            too_few,
            ids_for_floats,
            other_layer,
            wrong_weight,
            not_of_experts,
            no_weight,
            wrong_output,
            short_tap
        ]
        .join("\n")
    );
}

#[test]
fn v3_tiny_forward_after_all_passes() {
    let mut graph = build(&config("v3-tiny"), Target::Forward, &TapChoice::all(), &|_| false);
    run_all(&mut graph).expect("the graph stays sound");
    insta::assert_snapshot!(graph.to_string());
}

#[test]
fn v3_tiny_watch_after_all_passes() {
    let mut graph = build(&config("v3-tiny"), Target::Watch, &TapChoice::all(), &|_| false);
    run_all(&mut graph).expect("the graph stays sound");
    insta::assert_snapshot!(graph.to_string());
}

#[test]
fn v3_tiny_draft_after_all_passes() {
    let mut graph = build(&config("v3-tiny"), Target::Draft { module: 1 }, &TapChoice::all(), &|_| false);
    run_all(&mut graph).expect("the graph stays sound");
    insta::assert_snapshot!(graph.to_string());
}
