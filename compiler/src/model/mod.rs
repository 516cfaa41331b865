//! From a configuration to a graph of plain operations. Each family of models has one file.

mod deepseek;

use moewe_plan::{TapChoice, TapGroup};

use crate::{
    config::Config,
    graph::{Graph, Node, Op, Tap, Value},
    infer,
};

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Generates: from tokens to sampled tokens.
    Forward,
    /// Generates exactly as [`Target::Forward`] does, and shows on the way what was chosen ([`TapChoice`]); reads the
    /// plan's parameters. For modules of multi-token prediction it leaves what [`Target::Trace`] leaves.
    Watch,
    /// Shows everything on the way: logits of wanted rows and a tap for each tensor of spec §10.
    Trace,
    /// A module of multi-token prediction: from the hidden state that [`Target::Trace`], [`Target::Watch`] or the module
    /// before it left to logits and taps (spec §7).
    Draft {
        /// 1 … `num_nextn_predict_layers`.
        module: usize,
    },
}

impl Target {
    /// The targets that a model has.
    pub fn all(config: &Config) -> Vec<Target> {
        let drafts = (1..=config.num_nextn_predict_layers).map(|module| Target::Draft { module });
        [Target::Forward, Target::Watch, Target::Trace].into_iter().chain(drafts).collect()
    }
}

/// The graph of a program, of plain operations alone. `taps` says what [`Target::Watch`] shows, and whether drafts show
/// their likeliest tokens. `in_checkpoint` says whether the checkpoint has a tensor: modules of
/// multi-token prediction may bring their own embedding and head.
///
/// # Panics
/// If the target names a module that the model does not have.
pub fn build(config: &Config, target: Target, taps: &TapChoice, in_checkpoint: &dyn Fn(&str) -> bool) -> Graph {
    deepseek::build(config, target, taps, in_checkpoint)
}

/// A graph that grows node by node.
#[derive(Default)]
struct Builder {
    graph: Graph,
    /// Where following nodes stand.
    layer: Option<usize>,
    /// Whether following taps are optional.
    optional: bool,
}

impl Builder {
    /// Adds a node; the result is its first output. The label is put behind the layer's, if there is one.
    fn push(&mut self, op: Op, inputs: &[Value], label: &str) -> Value {
        let label = self.layer.map_or_else(|| label.to_owned(), |layer| format!("layers.{layer}.{label}"));
        let outputs = infer::output_types(&self.graph, &op, inputs)
            .unwrap_or_else(|what| panic!("{label}: a checked configuration gave a wrong {}: {what}", op.name()));
        let node = Node { op, inputs: inputs.to_vec(), outputs, label, layer: self.layer };
        self.graph.nodes.push(node);
        Value { node: self.graph.nodes.len() - 1, output: 0 }
    }

    /// Makes a whole tensor readable under a name. It belongs to the layer of following nodes.
    fn tap(&mut self, group: TapGroup, name: impl Into<String>, value: Value) {
        let columns = self.graph.ty(value).row_len();
        self.tap_columns(group, name, value, 0, columns);
    }

    /// Makes some columns of a tensor readable under a name.
    fn tap_columns(&mut self, group: TapGroup, name: impl Into<String>, value: Value, offset: usize, columns: usize) {
        let (name, layer, optional) = (name.into(), self.layer, self.optional);
        self.graph.taps.push(Tap { name, group, layer, optional, value, offset, columns });
    }
}
