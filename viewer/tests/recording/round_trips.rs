//! What goes in comes out.

use moewe_plan::{Edit, FrameTensor, FrameToken, Numbers, Place, RunTimes, TapFrame, TapGroup};
use moewe_viewer::recording::{Error, Recorder};
use moewe_viewer::source::{Event, Source};
use moewe_viewer::store::{SequenceInfo, Token};
use moewe_viewer::synthetic::Shape;
use proptest::prelude::*;
use serde_json::json;

use crate::tools::{assert_same, chunks, comparable, drain, open, read, record, scene, store, tiny};

#[test]
fn what_was_recorded_comes_back() {
    for shape in [tiny(), Shape::small()] {
        let scene = scene(&shape);
        let (mut recording, warnings) = open(&scene.path);
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(recording.subject(), &scene.subject);
        let events = drain(&mut recording);
        assert!(comparable(&events) == comparable(&scene.events), "events differ");
        assert_same(&store(&scene.subject, &events), &store(&scene.subject, &scene.events));
        let tokens = scene.events.iter().filter(|event| matches!(event, Event::Token { .. })).count() as u64;
        assert_eq!(recording.status().progress, Some((tokens, tokens)));
    }
}

#[test]
fn the_format_is_as_documented() {
    let scene = scene(&tiny());
    let chunks = chunks(&scene.path);
    assert_eq!(chunks[0].0["kind"], "subject");
    let subject = safetensors::SafeTensors::deserialize(&chunks[0].1).unwrap();
    assert_eq!(subject.tensor("pieces.end").unwrap().shape(), [12]);
    assert_eq!(subject.tensor("moe.1.bias").unwrap().shape(), [4]);
    // A text ends in each chunk, so there is one for each.
    assert_eq!(chunks.len(), 4);
    let (line, bytes) = &chunks[3];
    assert_eq!((&line["kind"], &line["tokens"], &line["rows"]), (&json!("tokens"), &json!(4), &json!(4)));
    assert_eq!((&line["frames"], &line["sequences"]), (&json!([2, 2]), &json!([2, 2])));
    assert_eq!(line["events"][0]["begin"]["name"], "c");
    assert_eq!(line["events"][1]["end"]["reason"], "length");
    assert_eq!(line["taps"]["moe.1.ids"], json!(["routing", 1, "rows.0"]));
    let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let ids = tensors.tensor("moe.1.ids").unwrap();
    assert_eq!((ids.dtype(), ids.shape()), (safetensors::Dtype::I16, &[4, 2][..]));
    let weights = tensors.tensor("moe.1.weights").unwrap();
    assert_eq!((weights.dtype(), weights.shape()), (safetensors::Dtype::F32, &[4, 2][..]));
    assert_eq!(tensors.tensor("run.duration").unwrap().shape(), [6]);
    assert_eq!(tensors.tensor("events").unwrap().data(), [2, 0, 0, 0, 0, 1, 2]);
}

#[test]
fn the_same_events_give_the_same_bytes_up_to_where_chunks_end() {
    let (one, two) = (scene(&tiny()), scene(&tiny()));
    assert_eq!(std::fs::read(&one.path).unwrap(), std::fs::read(&two.path).unwrap());
}

fn numbers(columns: u32, tokens: usize) -> impl Strategy<Value = (u32, Numbers)> {
    let len = columns as usize * tokens;
    let floats = prop::collection::vec(any::<u32>().prop_map(f32::from_bits), len).prop_map(Numbers::F32);
    prop_oneof![floats, prop::collection::vec(0u32..4, len).prop_map(Numbers::U32)].prop_map(move |n| (columns, n))
}

fn frame() -> impl Strategy<Value = TapFrame> {
    let names = prop::sample::subsequence(vec!["moe.1.ids", "moe.1.weights", "mla.0.c_kv", "mtp.1.ids", "x"], 0..=5);
    (0usize..5, names).prop_flat_map(|(tokens, names)| {
        let token = (0u32..3, 0u32..200, 0u32..12);
        let row = token.prop_map(|(sequence, position, id)| FrameToken { sequence, position, id });
        let tensor = |name: &'static str| {
            let layers = prop_oneof![Just(None), (0u32..2).prop_map(Some)];
            (layers, (1u32..4).prop_flat_map(move |columns| numbers(columns, tokens))).prop_map(
                move |(layer, (columns, data))| {
                    let group = if name.starts_with("moe") { TapGroup::Routing } else { TapGroup::Latents };
                    FrameTensor { name: name.into(), group, layer, columns, data }
                },
            )
        };
        let step = (prop::option::of(0..u64::MAX / 2), 0..u64::MAX / 2);
        let times = (any::<u16>(), prop::collection::vec(step, 6)).prop_map(|(rows, steps)| {
            let (starts, durations) = steps.into_iter().unzip();
            RunTimes { program: 0, rows: rows.into(), starts, durations }
        });
        let tensors: Vec<_> = names.into_iter().map(tensor).collect();
        (prop::collection::vec(row, tokens), tensors, prop::option::of(times), 0..u64::MAX / 2)
            .prop_map(|(tokens, tensors, times, number)| TapFrame { number, tokens, tensors, times })
    })
}

fn event() -> impl Strategy<Value = Event> {
    let edits = prop_oneof![
        (any::<f32>().prop_filter("finite", |x| x.is_finite()), any::<u32>())
            .prop_map(|(factor, number)| Edit::Scale(Place { layer: None, number }, factor)),
        prop::collection::vec(any::<u32>(), 0..4).prop_map(|experts| Edit::Pin(Some(1), experts)),
    ];
    let parents = prop::option::of((0u32..3, any::<u32>()));
    let info = (0u32..3, any::<String>(), any::<u32>(), prop::collection::vec(edits, 0..3), parents);
    let begin = info.prop_map(|(number, name, prompt_tokens, edits, parent)| {
        Event::Begin(SequenceInfo { number, name, prompt_tokens, edits, parent })
    });
    let rate = any::<f64>().prop_filter("finite", |x| x.is_finite());
    prop_oneof![
        1 => begin,
        6 => (0u32..3, 0u32..1000, any::<bool>()).prop_map(|(sequence, id, generated)| Event::Token {
            sequence,
            token: Token { id, generated },
        }),
        4 => frame().prop_map(Event::Frame),
        1 => any::<u64>().prop_map(|frames| Event::Dropped(frames / 8)),
        1 => (0u32..3, any::<String>(), rate).prop_map(|(sequence, reason, tokens_per_second)| Event::End {
            sequence,
            reason,
            tokens_per_second,
        }),
        1 => any::<String>().prop_map(Event::Note),
        1 => any::<String>().prop_map(Event::Error),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_events_come_back(events in prop::collection::vec(event(), 0..60), cuts in 0usize..4) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let subject = tiny().subject();
        let first = (0..3).map(|number| Event::Begin(SequenceInfo { number, ..SequenceInfo::default() }));
        let events: Vec<Event> = first.chain(events).collect();
        let mut recorder = Recorder::create(&path, &subject).unwrap();
        for (i, event) in events.iter().enumerate() {
            recorder.push(event).unwrap();
            if cuts > 0 && i % (cuts * 10) == 9 {
                recorder.push(&Event::Dropped(1)).unwrap(); // ends a chunk
            }
        }
        recorder.finish().unwrap();
        let without_cuts = |mut events: Vec<Event>| {
            events.retain(|event| *event != Event::Dropped(1));
            comparable(&events)
        };
        prop_assert_eq!(without_cuts(read(&path)), without_cuts(events));
    }
}

#[test]
fn events_that_make_no_sense_are_refused_and_the_others_stay() {
    let scene = scene(&tiny());
    let path = scene.path.with_extension("b");
    let mut recorder = Recorder::create(&path, &scene.subject).unwrap();
    let row = FrameToken::default();
    let tensor = |name: &str, columns, data| FrameTensor {
        name: name.into(),
        group: TapGroup::Routing,
        layer: Some(1),
        columns,
        data,
    };
    let frame = |tensors: Vec<FrameTensor>| TapFrame { tokens: vec![row], tensors, ..TapFrame::default() };
    let times =
        |program, steps: usize| RunTimes { program, rows: 1, starts: vec![None; steps], durations: vec![0; steps] };
    let far = FrameToken { position: u32::MAX, ..row };
    let sound = tensor("moe.1.ids", 2, Numbers::U32(vec![0, 3]));
    let scale = Edit::Scale(Place { layer: None, number: 0 }, f32::NAN);
    let wrong = [
        Event::Reset,
        Event::Token { sequence: 0, token: Token::default() },
        Event::Begin(SequenceInfo { edits: vec![scale], ..SequenceInfo::default() }),
        Event::Note("x".repeat(3 << 20)),
        Event::Frame(frame(vec![tensor("moe.1.ids", 2, Numbers::U32(vec![0]))])),
        Event::Frame(frame(vec![tensor("moe.1.ids", 0, Numbers::U32(vec![]))])),
        Event::Frame(frame(vec![tensor("moe.1.ids", 1, Numbers::U32(vec![4]))])),
        Event::Frame(frame(vec![FrameTensor { layer: Some(3), ..sound.clone() }])),
        Event::Frame(frame(vec![sound.clone(), sound.clone()])),
        Event::Frame(frame(vec![FrameTensor { name: "events".into(), ..sound.clone() }])),
        Event::Frame(frame(vec![FrameTensor { name: "rows.7".into(), ..sound.clone() }])),
        Event::Frame(frame(vec![FrameTensor { name: "__metadata__".into(), ..sound.clone() }])),
        Event::Frame(frame(vec![FrameTensor { name: "".into(), ..sound.clone() }])),
        Event::Frame(TapFrame { tokens: vec![far], ..TapFrame::default() }),
        Event::Frame(TapFrame { number: u64::MAX, ..frame(vec![sound.clone()]) }),
        Event::Frame(TapFrame { times: Some(times(0, 5)), ..TapFrame::default() }),
        Event::Frame(TapFrame { times: Some(times(1, 6)), ..TapFrame::default() }),
    ];
    for event in &wrong {
        let error = recorder.push(event).unwrap_err();
        assert!(matches!(&error, Error::Event { path: named, .. } if *named == path), "{error}");
        assert!(error.to_string().len() < 400, "{error}");
    }
    let begin = Event::Begin(SequenceInfo::default());
    let right = [begin, Event::Frame(frame(vec![sound]))];
    for event in &right {
        recorder.push(event).unwrap();
    }
    recorder.finish().unwrap();
    assert_eq!(comparable(&read(&path)), comparable(&right));
}

#[test]
fn a_tensor_that_changes_its_shape_begins_a_new_chunk() {
    let scene = scene(&tiny());
    let frame = |columns: u32| {
        let data = Numbers::F32(vec![1.0; columns as usize]);
        let (name, group) = ("x".into(), TapGroup::Hidden);
        let tensors = vec![FrameTensor { name, group, layer: None, columns, data }];
        Event::Frame(TapFrame { tokens: vec![FrameToken::default()], tensors, ..TapFrame::default() })
    };
    let events = [1, 1, 2, 1].map(frame);
    record(&scene.path, &scene.subject, &events);
    assert_eq!(read(&scene.path), events);
    assert_eq!(chunks(&scene.path).len(), 1 + 3);
}
