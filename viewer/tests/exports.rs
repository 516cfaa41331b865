//! What is exported is what was there, in the form that other programs read.
#![allow(missing_docs)]

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use moewe_plan::{RunTimes, TapGroup};
use moewe_viewer::export::{self, Error};
use moewe_viewer::numbers::Table;
use moewe_viewer::store::{Key, Part, Run};
use moewe_viewer::synthetic::{self, Shape};
use npyz::npz::NpzArchive;
use serde_json::{Value, json};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn array<T: npyz::Deserialize>(path: &Path, name: &str) -> (Vec<u64>, Vec<T>) {
    let mut archive = NpzArchive::<BufReader<File>>::open(path).unwrap();
    let array = archive.by_name(name).unwrap().unwrap_or_else(|| panic!("no {name}"));
    (array.shape().to_vec(), array.into_vec().unwrap())
}

fn tables() -> Vec<Table> {
    let odd = vec![0.1, f32::NAN, -0.0, f32::INFINITY, 1e-45, 16_777_217.0];
    vec![
        Table::floats("map", &[("token", 2), ("expert", 3)], odd),
        Table::integers("cube", &[("a", 2), ("b", 1), ("c", 2)], vec![1, -2, i64::MAX, i64::MIN]),
        Table::words("words", "token", ["a,b", "\"quoted\"", "line\nbreak", " é"].map(str::to_owned).to_vec()),
        Table::integers("none", &[("token", 0), ("expert", 3)], vec![]),
    ]
}

#[test]
fn tables_become_comma_separated_values() {
    let directory = directory();
    let files = export::csv(&tables(), &directory.path().join("out"), false).unwrap();
    let names: Vec<_> = files.iter().map(|file| file.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["map.csv", "cube.csv", "words.csv", "none.csv"]);
    let text = |i: usize| std::fs::read_to_string(&files[i]).unwrap();
    assert_eq!(
        text(0),
        "token,expert 0,expert 1,expert 2\n0,0.1,NaN,-0\n1,inf,0.000000000000000000000000000000000000000000001,16777216\n"
    );
    assert_eq!(text(1), "a,b,c 0,c 1\n0,0,1,-2\n1,0,9223372036854775807,-9223372036854775808\n");
    assert_eq!(text(2), "token,words\n0,\"a,b\"\n1,\"\"\"quoted\"\"\"\n2,\"line\nbreak\"\n3, é\n");
    assert_eq!(text(3), "token,expert 0,expert 1,expert 2\n");
    // One table goes into the file that was named; several stand beside it.
    let one = directory.path().join("one.csv");
    assert_eq!(export::csv(&tables()[..1], &one, false).unwrap(), std::slice::from_ref(&one));
    let several = export::csv(&tables()[..2], &one, false).unwrap();
    assert_eq!(several[1], directory.path().join("one.cube.csv"));
}

#[test]
fn tables_become_arrays() {
    let directory = directory();
    let path = directory.path().join("a.npz");
    export::npz(&tables(), &path, false).unwrap();
    let (shape, map) = array::<f32>(&path, "map");
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let moewe_viewer::numbers::Cells::F32(expected) = &tables()[0].cells else { panic!() };
    assert_eq!((shape, bits(&map)), (vec![2, 3], bits(expected)));
    assert_eq!(array::<i64>(&path, "cube"), (vec![2, 1, 2], vec![1, -2, i64::MAX, i64::MIN]));
    assert_eq!(array::<i64>(&path, "none"), (vec![0, 3], vec![]));
    let names: Vec<String> = NpzArchive::open(&path).unwrap().array_names().map(str::to_owned).collect();
    assert!(!names.contains(&"words".to_owned()));
    let again = directory.path().join("b.npz");
    export::npz(&tables(), &again, false).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&again).unwrap(), "the same numbers give the same bytes");
}

#[test]
fn nothing_is_overwritten_without_being_asked_and_nothing_half_is_left() {
    let directory = directory();
    let path = directory.path().join("a.npz");
    std::fs::write(&path, "mine").unwrap();
    let error = export::npz(&tables(), &path, false).unwrap_err();
    assert!(matches!(&error, Error::Exists { path: named } if *named == path), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    export::npz(&tables(), &path, true).unwrap();
    assert_eq!(array::<i64>(&path, "cube").0, [2, 1, 2]);
    // The second of three is there already: the first is not written either.
    let csv = directory.path().join("csv");
    std::fs::create_dir(&csv).unwrap();
    std::fs::write(csv.join("cube.csv"), "mine").unwrap();
    assert!(matches!(export::csv(&tables(), &csv, false), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read_dir(&csv).unwrap().count(), 1);
    export::csv(&tables(), &csv, true).unwrap();
    assert_eq!(std::fs::read_dir(&csv).unwrap().count(), 4);
    // A directory is never replaced, a place that is not there is an error, and nothing is nothing.
    assert!(matches!(export::npz(&tables(), &csv, true), Err(Error::Exists { .. })));
    let none = directory.path().join("none").join("a.npz");
    assert!(matches!(export::npz(&tables(), &none, true), Err(Error::Write { .. })));
    assert!(matches!(export::npz(&tables()[2..3], &directory.path().join("w.npz"), true), Err(Error::Nothing { .. })));
    assert!(matches!(export::csv(&[], &directory.path().join("w.csv"), true), Err(Error::Nothing { .. })));
    let mut left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a.npz", "csv"]);
}

#[test]
fn names_that_are_no_names_of_files_become_some() {
    let directory = directory();
    let names = ["../../etc/passwd", "", "..", "a/b", "a b", "A_b", "a_b", "é"];
    let tables: Vec<Table> = names.map(|name| Table::integers(name, &[("x", 1)], vec![7])).to_vec();
    let files = export::csv(&tables, &directory.path().join("d"), false).unwrap();
    let found: Vec<_> = files.iter().map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let expected = [".._.._etc_passwd", "table", "table-2", "a_b", "a_b-2", "A_b-3", "a_b-4", "_"]
        .map(|name| format!("{name}.csv"));
    assert_eq!(found, expected);
    assert!(files.iter().all(|file| file.parent() == Some(&directory.path().join("d"))));
}

#[test]
fn routed_experts_are_those_of_the_text() {
    let directory = directory();
    let path = directory.path().join("a.npz");
    let shape = Shape::small();
    let (subject, mut store) = (shape.subject(), synthetic::store(&shape));
    // A last token that no pass has read.
    store.push_token(1, moewe_viewer::store::Token { id: 3, generated: true });
    let text = store.sequence(1).unwrap();
    export::routed_experts(text, &subject, &path, false).unwrap();
    let (prompt_shape, prompt) = array::<i16>(&path, "prompt_routed_experts");
    let (shape, generated) = array::<i16>(&path, "routed_experts");
    assert_eq!((prompt_shape, shape), (vec![24, 3, 4], vec![73, 3, 4]));
    let all: Vec<i16> = prompt.into_iter().chain(generated).collect();
    for (position, experts) in all.chunks(12).enumerate() {
        for (layer, experts) in [1, 2, 3].into_iter().zip(experts.chunks(4)) {
            let key = Key::layer(TapGroup::Routing, layer, Part::Ids);
            let expected =
                text.ints(key, position).map_or(vec![-1; 4], |ids| ids.iter().map(|id| *id as i16).collect());
            assert_eq!(experts, expected, "{position} {layer}");
        }
    }
    assert_eq!(all[all.len() - 12..], [-1; 12]);
    assert_eq!(array::<i32>(&path, "layers").1, [1, 2, 3]);
    let tokens: Vec<i32> = text.tokens.iter().map(|token| token.id as i32).collect();
    assert_eq!(array::<i32>(&path, "token_ids").1, tokens[24..]);
    let latents = Shape { taps: "latents".parse().unwrap(), ..Shape::small() };
    let store = synthetic::store(&latents);
    let error = export::routed_experts(&store.sequences()[0], &subject, &path, true).unwrap_err();
    assert!(error.to_string().contains("--taps routing"), "{error}");
    let mut many = subject.clone();
    many.model.experts = 40_000;
    assert!(matches!(export::routed_experts(text, &many, &path, true), Err(Error::Nothing { .. })));
}

#[test]
fn loads_are_what_eplb_takes() {
    let directory = directory();
    let path = directory.path().join("a.npz");
    let shape = Shape::small();
    let (subject, store) = (shape.subject(), synthetic::store(&shape));
    export::eplb(&store, &subject, &path, false).unwrap();
    let (found, weight) = array::<i64>(&path, "weight");
    assert_eq!(found, [3, 32]);
    // Counted again from the texts.
    let mut expected = vec![0i64; 3 * 32];
    for text in store.sequences() {
        for position in 0..text.tokens.len() {
            for layer in 1..4 {
                let (ids, _) = text.routing(layer, position).unwrap();
                for id in ids {
                    expected[(layer as usize - 1) * 32 + *id as usize] += 1;
                }
            }
        }
    }
    assert_eq!(weight, expected);
    let metadata: Value = serde_json::from_slice(&array::<u8>(&path, "metadata").1).unwrap();
    assert_eq!((&metadata["num_groups"], &metadata["layers"]), (&json!(4), &json!([1, 2, 3])));
    assert_eq!(metadata["tokens"], json!([288, 288, 288]));
    let empty = moewe_viewer::store::Store::new(32, 1 << 20);
    assert!(matches!(export::eplb(&empty, &subject, &path, true), Err(Error::Nothing { .. })));
}

#[test]
fn times_become_a_trace() {
    let directory = directory();
    let path = directory.path().join("trace.json");
    let shape = Shape::small();
    let (subject, store) = (shape.subject(), synthetic::store(&shape));
    let bytes = |step: &moewe_viewer::subject::StepInfo, run: &Run| {
        (step.cost.fixed_bytes + run.tokens as u64 * step.cost.token_bytes) as f64
    };
    let runs: Vec<Run> = store.runs().iter().map(|run| Run::clone(run)).collect();
    export::chrome_trace(&runs, &subject, &bytes, &path, false).unwrap();
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let track = |tid: u64| events.iter().filter(move |event| event["ph"] == "X" && event["tid"] == tid);
    assert_eq!([1, 2, 3].map(|tid| track(tid).count()), [runs.len(), runs.len() * 4, runs.len() * 12]);
    let time = |event: &Value| (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
    // Nothing overlaps on a track, and runs come one behind the other.
    for tid in 1..=3 {
        let slices: Vec<(f64, f64)> = track(tid).map(time).collect();
        assert!(slices.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0 + 1e-6), "track {tid}");
    }
    let total: f64 = track(3).map(|event| time(event).1).sum();
    let expected: u64 = runs.iter().flat_map(|run| &run.times.durations).sum();
    assert!((total - expected as f64 / 1e3).abs() < 1e-3);
    let step = track(3).nth(1).unwrap();
    assert_eq!((&step["name"], &step["args"]["layer"]), (&json!("layers.0.router"), &json!(0)));
    let moved = bytes(&subject.programs[0][1], &runs[0]);
    assert_eq!(step["args"]["bytes"], json!(moved));
    let floor = step["args"]["floor_us"].as_f64().unwrap();
    assert!((floor - moved / 1e9 * 1e6).abs() < 1e-9);
    assert!((step["args"]["times_floor"].as_f64().unwrap() - time(step).1 / floor).abs() < 1e-9);
}

#[test]
fn odd_times_give_a_sound_trace() {
    let directory = directory();
    let path = directory.path().join("trace.json");
    let mut subject = Shape::small().subject();
    subject.bytes_per_second = None;
    let steps = subject.programs[0].len();
    let run = |program, starts: Vec<Option<u64>>, durations: Vec<u64>| Run {
        number: 0,
        tokens: 1,
        context: 1,
        times: RunTimes { program, rows: 1, starts, durations },
    };
    let huge = run(0, vec![Some(u64::MAX); steps], vec![u64::MAX; steps]);
    let overlapping = run(0, (0..steps as u64).map(|i| Some(i * 10)).collect(), vec![25; steps]);
    let left_out = run(0, vec![None; steps], vec![0; steps]);
    let unknown = run(7, vec![Some(0); steps], vec![1; steps]);
    let short = run(0, vec![Some(0)], vec![1]);
    let bytes = |_: &moewe_viewer::subject::StepInfo, _: &Run| 0.0;
    for runs in [vec![&unknown, &short], vec![]] {
        let told = export::chrome_trace(runs, &subject, &bytes, &path, false);
        assert!(matches!(told, Err(Error::Nothing { .. })) && !path.exists());
    }
    let runs = [&overlapping, &left_out, &unknown, &huge, &huge];
    export::chrome_trace(runs, &subject, &bytes, &path, false).unwrap();
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let steps: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X" && event["tid"] == 3).collect();
    assert_eq!((&steps[0]["dur"], &steps[0]["args"]["duration_us"]), (&json!(0.01), &json!(0.025)));
    assert!(steps[0]["args"]["floor_us"].is_null());
}
