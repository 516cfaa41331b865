//! The typed graph of one program: what is computed, not yet how.
//!
//! A tensor has one row for each token of the batch (or for each row whose logits are wanted) and a fixed shape per
//! row. Nodes stand in the order in which they may run: a node's inputs come before it. [`crate::model`] builds the
//! graph with plain operations; [`crate::passes`] rewrites them into the fused ones; [`crate::lower`] has a kernel
//! for each operation that is left.

mod op;

use std::collections::BTreeSet;
use std::fmt;

use moewe_plan::{DType, TapGroup, When};

pub use op::{Asked, Mla, Norm, Op, RouterRule, top_tokens};

/// What the rows of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Tokens of the batch.
    Tokens,
    /// Rows of the batch whose logits are wanted.
    Wanted,
}

/// Type of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorType {
    /// Type of the numbers.
    pub dtype: DType,
    /// What its rows are.
    pub rows: Rows,
    /// Shape of one row.
    pub shape: Vec<usize>,
}

impl TensorType {
    /// Floats, one row for each token.
    pub fn tokens(shape: &[usize]) -> Self {
        Self { dtype: DType::F32, rows: Rows::Tokens, shape: shape.to_vec() }
    }

    /// Numbers in one row.
    pub fn row_len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = match self.rows {
            Rows::Tokens => "T",
            Rows::Wanted => "R",
        };
        let dtype = match self.dtype {
            DType::F32 => "f32",
            DType::U32 => "u32",
        };
        write!(f, "{dtype}[{rows}")?;
        self.shape.iter().try_for_each(|dim| write!(f, ", {dim}"))?;
        f.write_str("]")
    }
}

/// Index of a node in [`Graph::nodes`].
pub type NodeId = usize;

/// One output of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value {
    /// The node.
    pub node: NodeId,
    /// Which of its outputs.
    pub output: usize,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.node)?;
        if self.output == 0 { Ok(()) } else { write!(f, ".{}", self.output) }
    }
}

/// Index into [`Graph::weights`].
pub type WeightId = usize;

/// A tensor of the checkpoint, or as many of one shape as there are experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightRef {
    /// Name in the checkpoint; `*` stands for the expert's number if `experts` is given.
    pub name: String,
    /// Number of experts that are stacked.
    pub experts: Option<usize>,
    /// Shared experts, which stand behind them as experts more.
    pub shared: Option<SharedExperts>,
    /// Shape of one tensor: `[rows, columns]`, or `[length]` for vectors.
    pub shape: Vec<usize>,
}

/// A tensor of the checkpoint that has the matrices of all shared experts of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedExperts {
    /// Its name.
    pub name: String,
    /// How many there are.
    pub count: usize,
    /// Whether they have columns of it each, not rows.
    pub by_columns: bool,
}

impl WeightRef {
    /// Experts with shared ones; `None` where it is no weight of experts.
    pub fn all_experts(&self) -> Option<usize> {
        Some(self.experts? + self.shared.as_ref().map_or(0, |shared| shared.count))
    }
}

/// One operation with its inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it does.
    pub op: Op,
    /// What it reads.
    pub inputs: Vec<Value>,
    /// Types of its outputs.
    pub outputs: Vec<TensorType>,
    /// Where in the model it stands, for example `layers.3.router`.
    pub label: String,
    /// The layer, if it belongs to one.
    pub layer: Option<usize>,
}

/// A named result that may be read when the program has run. Passes keep it; memory planning keeps it apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Tap {
    /// Name, that of the golden files (spec §10) if they have it. Two taps may share one if the rows of one are tokens,
    /// and of the other wanted rows: where all tokens are wanted rows in their order, they hold the same.
    pub name: String,
    /// What it belongs to.
    pub group: TapGroup,
    /// The layer, if it belongs to one.
    pub layer: Option<usize>,
    /// Whether what serves only such taps may be left out when none of them is read.
    pub optional: bool,
    /// The tensor.
    pub value: Value,
    /// First number of the row that is shown.
    pub offset: usize,
    /// Numbers of the row that are shown.
    pub columns: usize,
}

/// Nodes in running order, the weights they name and the results that are wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// Operations.
    pub nodes: Vec<Node>,
    /// Tensors of the checkpoint.
    pub weights: Vec<WeightRef>,
    /// Results.
    pub taps: Vec<Tap>,
    /// Whether routers, cache writes and attention heads read the plan's parameters
    /// ([`moewe_plan::ParameterKind`]). As long as those are neutral, that makes no difference.
    pub parameters: bool,
    /// Rows and columns that share a scale where the checkpoint has any: matrices are not cut within them.
    pub scale_block: Option<[usize; 2]>,
}

/// Why a graph is not sound.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("node {node} ({label}): {what}")]
pub struct GraphError {
    /// The node.
    pub node: NodeId,
    /// Its label.
    pub label: String,
    /// What is wrong.
    pub what: String,
}

impl Graph {
    /// The id of a weight without shared experts, added if it is new.
    pub fn weight(&mut self, name: impl Into<String>, experts: Option<usize>, shape: &[usize]) -> WeightId {
        self.add_weight(WeightRef { name: name.into(), experts, shared: None, shape: shape.to_vec() })
    }

    /// The id of a weight, added if it is new.
    pub fn add_weight(&mut self, weight: WeightRef) -> WeightId {
        self.weights.iter().position(|w| *w == weight).unwrap_or_else(|| {
            self.weights.push(weight);
            self.weights.len() - 1
        })
    }

    /// Type of a value.
    pub fn ty(&self, value: Value) -> &TensorType {
        &self.nodes[value.node].outputs[value.output]
    }

    /// Nodes that read a value, with the position among their inputs.
    pub fn readers(&self, value: Value) -> impl Iterator<Item = (NodeId, usize)> + '_ {
        self.nodes.iter().enumerate().flat_map(move |(id, node)| {
            node.inputs.iter().enumerate().filter(move |(_, input)| **input == value).map(move |(at, _)| (id, at))
        })
    }

    /// Whether a value is wanted as a result.
    pub fn is_tapped(&self, value: Value) -> bool {
        self.taps.iter().any(|tap| tap.value == value)
    }

    /// Whether exactly one input in the graph reads `value` and nothing taps it: then it may be swallowed.
    pub fn is_private(&self, value: Value) -> bool {
        !self.is_tapped(value) && self.readers(value).count() == 1
    }

    /// For each node the optional taps (indices into [`Graph::taps`]) that it serves, if it serves nothing else; none for
    /// a node that always runs.
    pub fn only_for(&self) -> Vec<Vec<usize>> {
        let mut always: Vec<bool> = self.nodes.iter().map(|node| node.op.has_effect()).collect();
        let mut serves = vec![BTreeSet::new(); self.nodes.len()];
        for (index, tap) in self.taps.iter().enumerate() {
            if tap.optional {
                serves[tap.value.node].insert(index);
            } else {
                always[tap.value.node] = true;
            }
        }
        for (id, node) in self.nodes.iter().enumerate().rev() {
            for input in &node.inputs {
                always[input.node] |= always[id];
                let served = serves[id].clone();
                serves[input.node].extend(served);
            }
        }
        let only = |(always, serves): (bool, BTreeSet<usize>)| if always { Vec::new() } else { Vec::from_iter(serves) };
        always.into_iter().zip(serves).map(only).collect()
    }

    /// For each node in which passes it is needed: in all, if it serves more than one purpose.
    pub fn when(&self) -> Vec<When> {
        let needed = |when| {
            let serves = |node: &Node| node.op.has_effect() && node.op.when() == when;
            self.needed(self.nodes.iter().map(serves).collect())
        };
        let (drafting, logprobs, mut always) = (needed(When::Drafting), needed(When::Logprobs), needed(When::Always));
        for tap in &self.taps {
            always[tap.value.node] = true;
        }
        let always = self.needed(always);
        let when = |id: usize| match (always[id], drafting[id], logprobs[id]) {
            (false, true, false) => When::Drafting,
            (false, false, true) => When::Logprobs,
            _ => When::Always,
        };
        (0..self.nodes.len()).map(when).collect()
    }

    /// `wanted` and all nodes that those need.
    fn needed(&self, mut wanted: Vec<bool>) -> Vec<bool> {
        for (id, node) in self.nodes.iter().enumerate().rev() {
            if wanted[id] {
                for input in &node.inputs {
                    wanted[input.node] = true;
                }
            }
        }
        wanted
    }

    /// Removes nodes that nothing needs and renumbers the rest.
    pub fn sweep(&mut self) {
        let mut wanted: Vec<bool> = self.nodes.iter().map(|node| node.op.has_effect()).collect();
        for tap in &self.taps {
            wanted[tap.value.node] = true;
        }
        let live = self.needed(wanted);
        let mut renumbered = Vec::with_capacity(live.len());
        let mut next = 0;
        for &keep in &live {
            renumbered.push(next);
            next += usize::from(keep);
        }
        let mut keep = live.iter();
        self.nodes.retain(|_| *keep.next().unwrap_or(&false));
        let values =
            self.nodes.iter_mut().flat_map(|n| &mut n.inputs).chain(self.taps.iter_mut().map(|t| &mut t.value));
        for value in values {
            value.node = renumbered[value.node];
        }
    }
}

/// One line for each node, `%12 = Linear[norm](%9, %11) : f32[T, 64]   layers.0.o`, then one for each tap.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, node) in self.nodes.iter().enumerate() {
            let traits = node.op.traits();
            let traits = if traits.is_empty() { String::new() } else { format!("[{}]", traits.join(", ")) };
            let call = format!("%{id} = {}{traits}({})", node.op.name(), list(&node.inputs));
            let outputs = if node.outputs.is_empty() { "()".to_owned() } else { list(&node.outputs) };
            writeln!(f, "{call} : {outputs}   {}", node.label)?;
        }
        for tap in &self.taps {
            writeln!(f, "tap {} = {}[{}..{}]", tap.name, tap.value, tap.offset, tap.offset + tap.columns)?;
        }
        Ok(())
    }
}

/// Things with commas between them.
pub(crate) fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
