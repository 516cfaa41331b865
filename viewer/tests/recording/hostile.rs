//! Files by other hands.

use std::time::{Duration, Instant};

use moewe_viewer::recording::{Error, Recording};
use moewe_viewer::source::Event;
use serde_json::{Value, json};

use crate::tools::{chunks, drain, head, open, scene, sealed, store, tiny};

#[test]
fn lines_that_lie_are_told_from_chunks() {
    let scene = scene(&tiny());
    let path = scene.path.with_extension("lies");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let lines: Vec<Vec<u8>> = [
        r#"{"kind":"tokens","bytes":18446744073709551615}"#.to_owned(),
        r#"{"kind":"tokens","bytes":9223372036854775807}"#.to_owned(),
        r#"{"kind":"tokens","bytes":-1}"#.to_owned(),
        r#"{"kind":"tokens","bytes":1e300}"#.to_owned(),
        r#"{"kind":"tokens","bytes":0,"tokens":18446744073709551615}"#.to_owned(),
        r#"{"kind":"token","bytes":0}"#.to_owned(),
        r#"{"kind":"tokens"}"#.to_owned(),
        "[]".to_owned(),
        "\u{0}".to_owned(),
        format!(r#"{{"kind":"tokens","bytes":0,"events":{deep}}}"#),
        format!(r#"{{"kind":"tokens","bytes":0,"sequences":{deep}}}"#),
        format!(r#"{{"kind":"tokens","bytes":0,"x":"{}"}}"#, "x".repeat(3 << 20)),
    ]
    .into_iter()
    .map(String::into_bytes)
    .chain([b"{\"kind\":\"tokens\",\"bytes\":0,\"x\":\"\xff\xfe\"}".to_vec()])
    .collect();
    for line in lines {
        let shown = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
        std::fs::write(&path, [&head(&scene.path)[..], &line, b"\n"].concat()).unwrap();
        let (mut recording, warnings) = open(&path);
        let told = drain(&mut recording).len();
        assert!(told > 0 || warnings.len() > 1, "{shown}: {warnings:?}");
    }
    // As many beginnings as fit do not take forever.
    std::fs::write(&path, [&head(&scene.path)[..], &br#"{"kind":""#.repeat(1 << 20)].concat()).unwrap();
    let started = Instant::now();
    let (_, warnings) = open(&path);
    assert!(!warnings.is_empty() && started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

type Tensors = std::collections::BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;
type Change = Box<dyn Fn(&mut Value, &mut Tensors)>;

/// Chunks whose hash is right and whose content is not.
#[test]
fn chunks_that_make_no_sense_are_left_out_with_a_reason() {
    let scene = scene(&tiny());
    let path = scene.path.with_extension("hostile");
    let all = chunks(&scene.path);
    let (line, bytes) = &all[1];
    let tensors: Tensors = safetensors::SafeTensors::deserialize(bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    let try_with = |change: &dyn Fn(&mut Value, &mut Tensors)| {
        let (mut line, mut tensors) = (line.clone(), tensors.clone());
        change(&mut line, &mut tensors);
        let views = tensors.iter().map(|(name, (dtype, shape, data))| {
            (name.as_str(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        line.as_object_mut().unwrap().shift_remove("blake3");
        line["bytes"] = json!(bytes.len());
        std::fs::write(&path, [head(&scene.path), sealed(&line, &bytes)].concat()).unwrap();
        let (mut recording, _) = open(&path);
        let events = drain(&mut recording);
        store(&scene.subject, &events);
        events
    };
    let ints = |numbers: &[i32]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
    let set = |name: &'static str, numbers: Vec<i32>| {
        move |_: &mut Value, tensors: &mut Tensors| {
            let bytes = ints(&numbers);
            *tensors.get_mut(name).unwrap() = (safetensors::Dtype::I32, vec![numbers.len()], bytes);
        }
    };
    assert_eq!(try_with(&|_, _| {}).len(), 1 + 3 + 1 + 1, "unchanged, it is sound");

    let changes: Vec<(&str, Change)> = vec![
        ("a list is missing", Box::new(|_, t| drop(t.remove("text.token")))),
        ("a list is missing", Box::new(|_, t| drop(t.remove("events")))),
        ("a tensor is missing", Box::new(|_, t| drop(t.remove("moe.1.ids")))),
        ("rows are missing", Box::new(|_, t| drop(t.remove("rows.0")))),
        ("negative position", Box::new(set("position", vec![0, -1, 2]))),
        ("negative text", Box::new(set("text.sequence", vec![0, 0, i32::MIN]))),
        ("too few tokens", Box::new(set("text.token", vec![1, 2]))),
        ("too many rows", Box::new(set("position", vec![0, 1, 2, 3]))),
        ("rows beyond the end", Box::new(set("rows.0", vec![0, 1, 3]))),
        ("rows out of order", Box::new(set("rows.0", vec![1, 0, 2]))),
        ("the same row twice", Box::new(set("rows.0", vec![0, 0, 1]))),
        ("frames do not add up", Box::new(set("frame.rows", vec![i32::MAX]))),
        ("two frames share rows", Box::new(set("frame.rows", vec![3, 3]))),
        ("steps do not add up", Box::new(set("run.steps", vec![i32::MAX]))),
        ("unknown program", Box::new(set("run.program", vec![7]))),
        ("a run of no frame", Box::new(set("run.frame", vec![1]))),
        ("floats instead of integers", Box::new(|_, t| t.get_mut("token").unwrap().0 = safetensors::Dtype::F32)),
        ("one dimension", Box::new(|_, t| t.get_mut("moe.1.ids").unwrap().1 = vec![6])),
        ("three dimensions", Box::new(|_, t| t.get_mut("moe.1.ids").unwrap().1 = vec![3, 2, 1])),
        ("transposed", Box::new(|_, t| t.get_mut("moe.1.ids").unwrap().1 = vec![2, 3])),
        (
            "no columns",
            Box::new(|_, t| {
                *t.get_mut("moe.1.ids").unwrap() = (safetensors::Dtype::I16, vec![3, 0], vec![]);
            }),
        ),
        ("another type", Box::new(|_, t| t.get_mut("moe.1.ids").unwrap().0 = safetensors::Dtype::F16)),
        ("an expert that there is not", Box::new(|_, t| t.get_mut("moe.1.ids").unwrap().2[0] = 4)),
        ("a negative expert", Box::new(|_, t| t.get_mut("moe.1.ids").unwrap().2[1] = 0x80)),
        ("wrong kinds of events", Box::new(|_, t| t.get_mut("events").unwrap().2[0] = 1)),
        ("unknown events", Box::new(|_, t| t.get_mut("events").unwrap().2[0] = 3)),
        ("events that are not told of", Box::new(|l, _| l["events"] = json!([]))),
        ("unknown words", Box::new(|l, _| l["events"][0] = json!({ "start": 3 }))),
        ("a text without a number", Box::new(|l, _| l["events"][0]["begin"]["number"] = json!(-1))),
        ("an unknown group", Box::new(|l, _| l["taps"]["moe.1.ids"][0] = json!("rooting"))),
        ("a layer that there is not", Box::new(|l, _| l["taps"]["moe.1.ids"][1] = json!(3))),
        ("rows by another name", Box::new(|l, _| l["taps"]["moe.1.ids"][2] = json!("rows.9"))),
        ("rows that are no rows", Box::new(|l, _| l["taps"]["moe.1.ids"][2] = json!("moe.1.weights"))),
        ("a tap that is missing", Box::new(|l, _| l["taps"]["moe.9.ids"] = json!(["routing", 1, "rows.0"]))),
        ("a list as a tap", Box::new(|l, _| l["taps"]["position"] = json!(["routing", 1, "rows.0"]))),
    ];
    for (what, change) in &changes {
        let events = try_with(change.as_ref());
        let is_error = matches!(&events[..], [Event::Error(text)] if text.contains("byte"));
        assert!(is_error, "{what}: {events:?}");
    }
    // These are odd and readable: what has no place is left out.
    let events = try_with(&|line, _| line["events"][0]["begin"]["number"] = json!(77));
    assert_eq!(store(&scene.subject, &events).sequences()[0].tokens.len(), 0, "its tokens are of another text");
    let events = try_with(&set("position", vec![0, i32::MAX, i32::MAX - 1]));
    assert_eq!(store(&scene.subject, &events).sequences()[0].tokens.len(), 3);
    let events = try_with(&set("text.position", vec![0, 2, 1]));
    assert!(events.iter().any(|event| matches!(event, Event::Error(_))));
    assert_eq!(store(&scene.subject, &events).sequences()[0].tokens.len(), 1);
    // A safetensors file that is none.
    let (mut line, _) = all[1].clone();
    line.as_object_mut().unwrap().shift_remove("blake3");
    for bytes in [vec![], vec![0xff; 64], [&u64::MAX.to_le_bytes()[..], b"{}"].concat()] {
        line["bytes"] = json!(bytes.len());
        line["tokens"] = json!(0);
        std::fs::write(&path, [head(&scene.path), sealed(&line, &bytes)].concat()).unwrap();
        assert!(matches!(&drain(&mut open(&path).0)[..], [Event::Error(_)]));
    }
}

#[test]
fn first_lines_that_make_no_sense_are_typed_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    let subject = |change: &dyn Fn(&mut Value)| {
        let mut subject = serde_json::to_value(tiny().subject()).unwrap();
        change(&mut subject);
        let line = json!({ "format": "moewe recording", "version": 1, "subject": subject });
        std::fs::write(&path, sealed(&line, &[])).unwrap();
        Recording::open(&path).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(subject(&|_| {}), Ok(()));
    let wrong: [(&str, Value); 8] = [
        ("layers", json!(4_000_000_000u32)),
        ("experts", json!(4_000_000_000u32)),
        ("experts", json!(-4)),
        ("num_experts_per_tok", json!(5)),
        ("moe_layers", json!([1, 1])),
        ("moe_layers", json!([2])),
        ("kv_lora_rank", json!(4_000_000_000u32)),
        ("softmax_scale", json!(null)),
    ];
    for (field, value) in wrong {
        let error = subject(&|subject| subject["model"][field] = value.clone()).unwrap_err();
        assert!(error.contains("damaged recording"), "{field}: {error}");
    }
    for (bytes, expected) in [
        (&b""[..], "it is empty"),
        (b"GGUF\0\0\0\0", "does not begin as one"),
        (br#"{"format":"moewe recording","version":2}"#, "ends in its first line"),
        (b"{\"format\":\"moewe recording\",\"version\":2,\"new\":[]}\n", "format 2, this moewe reads format 1"),
        (b"{\"format\":\"moewe recording\",\"version\":\xff}\n", "first line"),
        (b"{\"format\":\"moewe recording\",\"version\":1,\"subject\":{}}\n", "the hash differs"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = Recording::open(&path).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(path.to_str().unwrap()), "{error}");
    }
    assert!(matches!(Recording::open(directory.path()), Err(Error::NotARecording { .. })));
    assert!(matches!(Recording::open(&directory.path().join("none")), Err(Error::Read { .. })));
}
