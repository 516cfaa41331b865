//! Memory planning: no buffer holds two values that are both still needed.

use std::collections::HashMap;
use std::path::Path;

use moewe_compiler::config::Config;
use moewe_compiler::graph::{Graph, Op, Value};
use moewe_compiler::memory::{Buffers, assign};
use moewe_compiler::model::{Target, build};
use moewe_compiler::passes::run_all;
use moewe_plan::{Dim, Role, TapChoice};

fn configs() -> Vec<Config> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden = ["golden/v3-tiny", "golden/v2-lite-tiny", "golden/kimi-k2-tiny", "data/v3-odd-tiny"];
    let golden = golden.iter().map(|name| root.join("../tests").join(name).join("config.json"));
    let presets = ["v3", "v2-lite"].iter().map(|name| root.join("presets").join(format!("{name}.json")));
    golden.chain(presets).map(|path| Config::load(&path).unwrap()).collect()
}

/// The last node that reads each value; values that are tapped or kept for a later program live to the end.
fn last_reads(graph: &Graph) -> HashMap<Value, usize> {
    let mut last = HashMap::new();
    for (id, node) in graph.nodes.iter().enumerate() {
        for input in &node.inputs {
            let kept = matches!(node.op, Op::WriteState { .. });
            last.insert(*input, if kept { usize::MAX } else { last.get(input).copied().unwrap_or(0).max(id) });
        }
    }
    for tap in &graph.taps {
        last.insert(tap.value, usize::MAX);
    }
    last
}

#[test]
fn values_that_live_at_once_have_buffers_of_their_own() {
    let mut values = 0;
    for config in configs() {
        let mut buffers = Buffers::default();
        let everything = Target::all(&config).into_iter().map(|target| (target, TapChoice::all()));
        // Hidden states that the lens reads and nobody taps.
        for (target, taps) in everything.chain([(Target::Watch, "lens:1,logits".parse().unwrap())]) {
            let mut graph = build(&config, target, &taps, &|_| false);
            run_all(&mut graph).unwrap();
            let assigned = assign(&graph, "program", &mut buffers);
            let last = last_reads(&graph);
            for (value, buffer) in &assigned {
                let needed = graph.ty(*value).row_len() as u64;
                let Dim::Times(_, length) = buffers.list[*buffer as usize].elements else {
                    panic!("{value:?} is in a buffer that does not grow with the batch");
                };
                assert!(length >= needed, "{value:?} needs {needed} numbers a row, its buffer has {length}");
                // Another value that is written while this one is still needed, or by the node that reads it last.
                let end = last.get(value).copied().unwrap_or(value.node);
                for (other, other_buffer) in &assigned {
                    let clash =
                        other != value && buffer == other_buffer && other.node >= value.node && other.node <= end;
                    assert!(!clash, "{target:?}: {other:?} overwrites {value:?}");
                }
                values += 1;
            }
        }
        let scratch = buffers.list.iter().filter(|buffer| buffer.name.starts_with("scratch.tokens.f32")).count();
        assert!(scratch <= 8, "{scratch} scratch buffers: values do not share them");
        assert!(buffers.list.iter().all(|buffer| matches!(buffer.role, Role::Scratch | Role::State)));
    }
    assert!(values > 1000, "only {values} values were looked at");
}
