//! What taps show while text is written, against the golden files and the oracle: routing, weights, latents, hidden
//! states, attention, logit lens, drafts. And models changed while they run, against the oracle changed the same way.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ops::ControlFlow;

#[path = "common/golden.rs"]
mod common;

use common::{Golden, TOLERANCE, bundle, gpu, options, profile};
use moewe::watch::{self, Watch};
use moewe_oracle::model::Cache;
use moewe_oracle::prediction::predict;
use moewe_oracle::{Data, Edits, Trace, rel_l2, safetensors};
use moewe_plan::{Edit, Place, ProgramKind, TapChoice, TapGroup, parameter_values};
use moewe_runtime::{GenerateOptions, Model, Session, SessionOptions};
use moewe_viewer::analysis::attention;
use moewe_viewer::store::{Key, Part, Sequence, SequenceInfo, Store};

/// A model on the device that can be watched, with the oracle of the same checkpoint.
struct Watched {
    session: Session,
    watch: Watch,
    oracle: moewe_oracle::Model,
}

impl Watched {
    fn open(golden: &Golden) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let bundle = bundle(&golden.dir, &temp.path().join("bundle"), &options(profile("lavapipe")));
        let mut kinds = watch::kinds(&TapChoice::all(), bundle.plan.model.mtp_modules);
        kinds.push(ProgramKind::Forward);
        let model = Model::load_for(&gpu(), &bundle, &kinds, &|_| ()).unwrap();
        let watching = moewe_runtime::Watch { taps: TapChoice::all(), ring_bytes: 1 << 30 };
        let options = SessionOptions { kinds, pages: Some(8), watch: Some(watching), ..SessionOptions::default() };
        let session = Session::new(model, options).unwrap();
        let watch = Watch::new(session.frame_receiver().unwrap());
        let mut oracle = moewe_oracle::Model::load(&golden.dir).unwrap();
        oracle.extras = true;
        Self { session, watch, oracle }
    }

    /// Writes greedily behind a prompt; what was seen goes into a store.
    fn write(&mut self, prompt: &[u32], count: usize, chunk: Option<usize>) -> (Vec<u32>, Store) {
        let mut store = Store::new(self.session.model().plan().model.experts, 1 << 30);
        let options = GenerateOptions { max_new_tokens: count, ignore_eos: true, chunk, ..GenerateOptions::default() };
        let mut sink = |event| {
            assert_eq!(store.apply(event).filter(|notice| notice.is_error), None);
            Ok::<(), Infallible>(())
        };
        let generated = self
            .watch
            .generate(&mut self.session, prompt, SequenceInfo::default(), &options, &mut sink, &mut |_| {
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(store.lost(), (0, 0), "frames were lost");
        (generated.tokens, store)
    }

    /// All that the oracle makes of these tokens.
    fn trace(&self, tokens: &[u32]) -> Trace {
        let mut trace = Trace::new();
        self.oracle.forward_traced(tokens, &mut Cache::default(), &mut trace);
        trace
    }
}

/// The rows of a tap at the first `count` positions, behind one another.
fn floats(sequence: &Sequence, key: Key, count: usize) -> Vec<f64> {
    let row = |position| {
        sequence.floats(key, position).unwrap_or_else(|| panic!("no row {position} of {key:?}")).iter().copied()
    };
    (0..count).flat_map(row).map(f64::from).collect()
}

fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    let error = rel_l2(found, expected);
    assert!(error <= tolerance, "{what}: relative L2 {error:e}");
}

/// Chosen experts in ascending order, with their weights.
fn sorted_routing(sequence: &Sequence, layer: u32, count: usize) -> (Vec<i32>, Vec<f64>) {
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for position in 0..count {
        let (experts, of) = sequence.routing(layer, position).unwrap_or_else(|| panic!("no routing at {position}"));
        let mut pairs: Vec<(u32, f32)> = experts.iter().copied().zip(of.iter().copied()).collect();
        pairs.sort_by_key(|pair| pair.0);
        ids.extend(pairs.iter().map(|pair| pair.0 as i32));
        weights.extend(pairs.iter().map(|pair| f64::from(pair.1)));
    }
    (ids, weights)
}

/// Compares what was seen of the main model's layers with a trace, at the first `count` positions. Returns how many
/// tensors were compared.
fn compare_layers(what: &str, sequence: &Sequence, trace: &Trace, count: usize) -> usize {
    let mut compared = 0;
    for (name, tensor) in trace {
        let at = |part: &str| name.strip_suffix(part)?.rsplit('.').next()?.parse::<u32>().ok();
        let what = format!("{what} {name}");
        let expected = |tensor: &moewe_oracle::Tensor| {
            let columns: usize = tensor.shape[1..].iter().product();
            tensor.f64s()[..count * columns].to_vec()
        };
        let key = if let (Data::I32(ids), Some(layer)) = (&tensor.data, at(".ids")) {
            assert_eq!(sorted_routing(sequence, layer, count).0, ids[..count * tensor.shape[1]], "{what}");
            compared += 1;
            continue;
        } else if let Some(layer) = at(".weights") {
            assert_close(&what, &sorted_routing(sequence, layer, count).1, &expected(tensor), TOLERANCE);
            compared += 1;
            continue;
        } else if let Some(layer) = at(".router_logits") {
            Key::layer(TapGroup::Scores, layer, Part::RouterLogits)
        } else if let Some(layer) = at(".c_kv") {
            Key::layer(TapGroup::Latents, layer, Part::CKv)
        } else if let Some(layer) = at(".k_rope") {
            Key::layer(TapGroup::Latents, layer, Part::KRope)
        } else if let Some(layer) = at(".query") {
            Key::layer(TapGroup::Attention, layer, Part::Query)
        } else if let Some(layer) = name.strip_prefix("hidden.").and_then(|layer| layer.parse::<u32>().ok()) {
            Key { group: TapGroup::Hidden, layer: layer.checked_sub(1), part: Part::Hidden }
        } else if name == "final_norm" {
            Key { group: TapGroup::Hidden, layer: None, part: Part::FinalNorm }
        } else {
            continue;
        };
        assert_close(&what, &floats(sequence, key, count), &expected(tensor), TOLERANCE);
        compared += 1;
    }
    compared
}

/// The model's prediction at each position, and the lens of each layer.
fn compare_predictions(what: &str, sequence: &Sequence, trace: &Trace, tokens: &[u32], count: usize) {
    let top = |key: Key, position: usize| -> (Vec<usize>, Vec<f64>, Vec<f64>) {
        let ids = sequence.ints(Key { part: Part::Ids, ..key }, position).expect("ids");
        let numbers = |part| {
            let row = sequence.floats(Key { part, ..key }, position).expect("a row");
            row.iter().copied().map(f64::from).collect()
        };
        (ids.iter().map(|&id| id as usize).collect(), numbers(Part::Probs), numbers(Part::Stats))
    };
    let layers = trace.keys().filter(|name| name.starts_with("lens.")).count() as u32;
    let logits = |layer: u32, position: usize| {
        let tensor = &trace[&format!("lens.{layer}")];
        &tensor.f64s()[position * tensor.shape[1]..][..tensor.shape[1]]
    };
    for position in 0..count {
        let last = predict(logits(layers - 1, position), 8, tokens.get(position + 1).map(|&id| id as usize));
        let answer = last.ids[0];
        let lens = (0..layers).map(|layer| {
            let key = Key::layer(TapGroup::Lens, layer, Part::Ids);
            (key, predict(logits(layer, position), 8, Some(answer)))
        });
        let logits = Key { group: TapGroup::Logits, layer: None, part: Part::Ids };
        for (key, expected) in lens.chain([(logits, last)]) {
            let what = format!("{what} {key:?} at {position}");
            let (ids, probs, stats) = top(key, position);
            assert_close(&what, &probs, &expected.probs, 1e-4);
            // Tokens whose probabilities nearly agree may change places.
            for (place, (id, expected_id)) in ids.iter().zip(&expected.ids).enumerate() {
                let near = (expected.probs[place] - probs[place]).abs() < 1e-5;
                assert!(id == expected_id || (place > 0 && near), "{what}: {ids:?}, expected {:?}", expected.ids);
            }
            assert!((stats[0] - expected.entropy).abs() < 1e-3, "{what}: entropy {} {}", stats[0], expected.entropy);
            if let Some((log_probability, rank)) = expected.asked {
                assert!((stats[1] - log_probability).abs() < 1e-3, "{what}: {} {log_probability}", stats[1]);
                assert!((stats[2] - rank as f64).abs() < 1.5, "{what}: rank {} {rank}", stats[2]);
            }
        }
    }
}

/// Attention weights as the viewer computes them from what it has seen.
fn compare_attention(what: &str, sequence: &Sequence, watched: &Watched, trace: &Trace, count: usize) {
    let model = &watched.session.model().plan().model;
    for layer in 0..model.layers {
        let column = |group, part| sequence.column(Key::layer(group, layer, part)).expect("a column");
        let (c_kv, k_rope) = (column(TapGroup::Latents, Part::CKv), column(TapGroup::Latents, Part::KRope));
        let queries = column(TapGroup::Attention, Part::Query);
        let tensor = &trace[&format!("mla.{layer}.attention")];
        let [heads, rows, columns] = tensor.shape[..] else { panic!("{:?}", tensor.shape) };
        for position in [0, 1, count / 2, count - 1] {
            let keys = attention::Keys::gather(c_kv, k_rope, position + 1);
            let query = queries.floats(position).expect("a query");
            let found = attention::of_token(query, &keys, model.softmax_scale);
            assert_eq!(found.missing, 0);
            for head in 0..heads {
                let expected = &tensor.f64s()[(head * rows + position) * columns..][..=position];
                let found: Vec<f64> = found.head(head).iter().map(|&weight| f64::from(weight)).collect();
                assert_close(&format!("{what} layer {layer} head {head} at {position}"), &found, expected, 1e-4);
            }
        }
    }
}

/// Drafts for tokens of the prompt against the golden logits of the first module.
fn compare_drafts(what: &str, sequence: &Sequence, file: &std::path::Path, count: usize) -> usize {
    let golden = safetensors::read(file).unwrap();
    let Some(logits) = golden.get("mtp.1.logits") else { return 0 };
    let logits = logits.to_tensor();
    let columns = logits.shape[1];
    // Row i stands at position i + 1; behind the prompt the golden rows go on with other tokens than were written.
    for position in 1..count {
        let expected = predict(&logits.f64s()[(position - 1) * columns..][..columns], 8, None);
        let key = |part| Key { group: TapGroup::Mtp, layer: Some(sequence_layer(sequence)), part };
        let ids = sequence.ints(key(Part::Ids), position).unwrap_or_else(|| panic!("{what}: no draft at {position}"));
        assert_eq!(ids[0] as usize, expected.ids[0], "{what}: draft at {position}");
    }
    count - 1
}

/// The layer under which drafts are kept.
fn sequence_layer(sequence: &Sequence) -> u32 {
    sequence.keys().find(|key| key.group == TapGroup::Mtp).and_then(|key| key.layer).expect("drafts with a layer")
}

fn check(dir: &str) {
    let golden = Golden::open(dir);
    let mut watched = Watched::open(&golden);
    let modules = watched.session.model().plan().model.mtp_modules;
    for sequence in golden.sequences.iter().filter(|sequence| sequence.ids.len() + sequence.greedy.len() < 200) {
        for chunk in [None, Some(5)] {
            let what = format!("{dir} {} chunk {chunk:?}", sequence.name);
            let (written, store) = watched.write(&sequence.ids, sequence.greedy.len(), chunk);
            assert_eq!(written, sequence.greedy, "{what}");
            let seen = &store.sequences()[0];
            let prompt = sequence.ids.len();
            let trace: Trace = safetensors::read(&sequence.file)
                .unwrap()
                .into_iter()
                .filter(|(name, _)| !name.starts_with("extra.") && !name.starts_with("mtp."))
                .map(|(name, tensor)| (name, tensor.to_tensor()))
                .filter(|(name, _)| main_layer(name, watched.oracle.config.layers))
                .collect();
            let compared = compare_layers(&what, seen, &trace, prompt);
            assert!(compared > 10, "{what}: only {compared} tensors");
            if modules > 0 {
                assert_eq!(compare_drafts(&what, seen, &sequence.file, prompt), prompt - 1, "{what}");
            }
            // The oracle knows what the golden files do not: written tokens, queries, attention, lens.
            let tokens: Vec<u32> = sequence.ids.iter().chain(&written).copied().collect();
            let run = tokens.len() - 1; // the last token was drawn, but not run
            let trace = watched.trace(&tokens);
            assert!(compare_layers(&what, seen, &trace, run) > compared);
            compare_predictions(&what, seen, &trace, &tokens, run);
            compare_attention(&what, seen, &watched, &trace, run);
        }
    }
}

/// Whether a tensor's name is of a layer of the main model, or of none.
fn main_layer(name: &str, layers: usize) -> bool {
    let layer = name.split('.').nth(1).and_then(|layer| layer.parse::<usize>().ok());
    name.starts_with("hidden.") || layer.is_none_or(|layer| layer < layers)
}

#[test]
fn v3_as_seen_is_as_the_golden_files_say() {
    check("golden/v3-tiny");
}

#[test]
fn v3_fp8_as_seen_is_as_the_golden_files_say() {
    check("golden/v3-fp8-tiny");
}

#[test]
fn v2_as_seen_is_as_the_golden_files_say() {
    check("golden/v2-tiny");
}

#[test]
fn v2_lite_as_seen_is_as_the_golden_files_say() {
    check("golden/v2-lite-tiny");
}

#[test]
fn kimi_k2_as_seen_is_as_the_golden_files_say() {
    check("golden/kimi-k2-tiny");
}

#[test]
fn accepted_drafts_as_seen_are_as_the_golden_files_say() {
    check("golden/v3-mtp-accept-tiny");
}

// ---- changed models ----

/// A change, as users write it and as the oracle knows it.
struct Change {
    edits: Vec<Edit>,
    oracle: Edits,
}

fn place(layer: usize, number: usize) -> Place {
    Place { layer: Some(layer as u32), number: number as u32 }
}

/// Changes at the expert that a text uses most in a layer, and elsewhere.
fn changes(oracle: &moewe_oracle::Model, layer: usize, used: &[usize], unused: &[usize]) -> Vec<(String, Change)> {
    let set = |experts: &[usize]| -> BTreeSet<(usize, usize)> { experts.iter().map(|&e| (layer, e)).collect() };
    let edits = |make: fn(Place) -> Edit, experts: &[usize]| experts.iter().map(|&e| make(place(layer, e))).collect();
    let first = used[0];
    let top_k = oracle.config.router.as_ref().expect("a router").top_k;
    let pinned: Vec<usize> = unused.iter().chain(used).step_by(2).take(top_k).copied().collect();
    let everywhere: BTreeSet<(usize, usize)> =
        (0..oracle.config.layers).filter(|&l| oracle.config.is_moe(l)).map(|l| (l, first)).collect();
    let all_layers = Place { layer: None, number: first as u32 };
    let list = [
        ("mute the most used", edits(Edit::Mute, &used[..1]), Edits { muted: set(&used[..1]), ..Edits::default() }),
        ("mute three", edits(Edit::Mute, &used[..3]), Edits { muted: set(&used[..3]), ..Edits::default() }),
        ("mute in all layers", vec![Edit::Mute(all_layers)], Edits { muted: everywhere, ..Edits::default() }),
        (
            "force an unused one",
            edits(Edit::Force, &unused[..1]),
            Edits { forced: set(&unused[..1]), ..Edits::default() },
        ),
        (
            "scale",
            vec![Edit::Scale(place(layer, first), -1.5)],
            Edits { scales: [((layer, first), -1.5)].into(), ..Edits::default() },
        ),
        (
            "pin",
            vec![Edit::Pin(Some(layer as u32), pinned.iter().map(|&e| e as u32).collect())],
            Edits { forced: set(&pinned), ..Edits::default() },
        ),
        (
            "zero a latent number",
            vec![Edit::ZeroLatent(place(layer, 3))],
            Edits { zero_latents: [(layer, 3)].into(), ..Edits::default() },
        ),
        (
            "zero a head",
            vec![Edit::ZeroHead(place(layer, 1))],
            Edits { zero_heads: [(layer, 1)].into(), ..Edits::default() },
        ),
    ];
    list.into_iter().map(|(name, edits, oracle)| (name.to_owned(), Change { edits, oracle })).collect()
}

/// Experts of a layer by how often a text used them.
fn by_use(store: &Store, layer: usize) -> Vec<usize> {
    let load = &store.load(layer as u32).expect("routing was seen").tokens;
    let mut experts: Vec<usize> = (0..load.len()).collect();
    experts.sort_by_key(|&expert| std::cmp::Reverse(load[expert]));
    experts
}

fn check_changes(dir: &str) {
    let golden = Golden::open(dir);
    let mut watched = Watched::open(&golden);
    let sequence = golden.sequence("len7");
    let (plain, store) = watched.write(&sequence.ids, 24, None);
    let config = &watched.oracle.config;
    let layer = (0..config.layers).rfind(|&l| config.is_moe(l)).expect("a mixture of experts");
    let order = by_use(&store, layer);
    let unused: Vec<usize> = order.iter().rev().copied().collect();
    let mut differing = 0;
    for (name, change) in changes(&watched.oracle, layer, &order, &unused) {
        let what = format!("{dir} {name}");
        let values = parameter_values(watched.session.model().plan(), &change.edits).unwrap();
        watched.session.set_parameters(&values).unwrap();
        watched.oracle.edits = change.oracle;
        let (written, store) = watched.write(&sequence.ids, 24, Some(3));
        assert_eq!(written, watched.oracle.greedy(&sequence.ids, 24), "{what}");
        differing += usize::from(written != plain);
        let tokens: Vec<u32> = sequence.ids.iter().chain(&written).copied().collect();
        let seen = &store.sequences()[0];
        let (trace, run) = (watched.trace(&tokens), tokens.len() - 1);
        assert!(compare_layers(&what, seen, &trace, run) > 10, "{what}");
        compare_predictions(&what, seen, &trace, &tokens, run);
    }
    assert!(differing >= 3, "{dir}: only {differing} changes changed the text");
    // Without edits the model is what it was, watched or not.
    watched.oracle.edits = Edits::default();
    watched.session.set_parameters(&parameter_values(watched.session.model().plan(), &[]).unwrap()).unwrap();
    assert_eq!(watched.write(&sequence.ids, 24, None).0, plain);
    watched.session.set_watch(TapChoice::none()).unwrap();
    assert_eq!(watched.write(&sequence.ids, 24, None).0, plain);
}

#[test]
fn v3_changed_is_as_the_oracle_says() {
    check_changes("golden/v3-tiny");
}

#[test]
fn v2_changed_is_as_the_oracle_says() {
    check_changes("golden/v2-tiny");
}

#[test]
fn kimi_k2_changed_is_as_the_oracle_says() {
    check_changes("golden/kimi-k2-tiny");
}
