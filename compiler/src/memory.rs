//! Memory planning: which buffer holds which value when. Values whose lives do not overlap share a buffer; values that
//! are tapped or kept for a later program have one of their own. What only optional taps need shares buffers with its like
//! alone: logits of every token would make those of other programs grow.

use std::collections::HashMap;

use moewe_plan::{Buffer, DType, Dim, Role, Symbol};

use crate::graph::{Graph, Op, Rows, TensorType, Value};

/// The buffers of a plan, shared by its programs.
#[derive(Debug, Default)]
pub struct Buffers {
    /// As in the plan.
    pub list: Vec<Buffer>,
    by_name: HashMap<String, u32>,
}

impl Buffers {
    /// The buffer of this name, made if it is new, grown if it was smaller.
    pub fn get(&mut self, name: &str, dtype: DType, elements: Dim, role: Role) -> u32 {
        if let Some(&index) = self.by_name.get(name) {
            let buffer = &mut self.list[index as usize];
            if let (Dim::Times(_, old), Dim::Times(_, new)) = (&mut buffer.elements, &elements) {
                *old = (*old).max(*new);
            }
            return index;
        }
        let index = self.list.len() as u32;
        self.list.push(Buffer { name: name.into(), dtype, elements, role });
        self.by_name.insert(name.into(), index);
        index
    }
}

/// The symbol that counts the rows of a tensor.
pub fn symbol(rows: Rows) -> Symbol {
    match rows {
        Rows::Tokens => Symbol::Tokens,
        Rows::Wanted => Symbol::Rows,
    }
}

/// A buffer for each value of `graph` that needs one. `program` names the buffers of tapped values.
pub fn assign(graph: &Graph, program: &str, buffers: &mut Buffers) -> HashMap<Value, u32> {
    let mut last_use: HashMap<Value, usize> = HashMap::new();
    let mut state: HashMap<Value, String> = HashMap::new();
    for (id, node) in graph.nodes.iter().enumerate() {
        for input in &node.inputs {
            last_use.insert(*input, id);
        }
        match &node.op {
            Op::WriteState { name, .. } => drop(state.insert(node.inputs[0], name.clone())),
            Op::ReadState { name, .. } => drop(state.insert(Value { node: id, output: 0 }, name.clone())),
            _ => {}
        }
    }
    let elements = |ty: &TensorType| Dim::Times(symbol(ty.rows), ty.row_len() as u64);

    let only_for = graph.only_for();
    let mut scratch: Vec<Scratch> = Vec::new();
    let mut in_scratch: HashMap<Value, usize> = HashMap::new();
    let mut assigned: HashMap<Value, u32> = HashMap::new();
    for (id, node) in graph.nodes.iter().enumerate() {
        for (output, ty) in node.outputs.iter().enumerate() {
            let value = Value { node: id, output };
            // What goes into the cache is read there.
            let cached = matches!((&node.op, output), (Op::LatentWrite { .. }, 0) | (Op::AbsorbWrite { .. }, 1));
            let needed = graph.is_tapped(value) || !cached;
            if let Some(name) = state.get(&value) {
                let name = format!("state.{name}");
                assigned.insert(value, buffers.get(&name, ty.dtype, elements(ty), Role::State));
            } else if graph.is_tapped(value) {
                let name = format!("{program}.{}.{output}", node.label);
                assigned.insert(value, buffers.get(&name, ty.dtype, elements(ty), Role::Scratch));
            } else if needed {
                in_scratch.insert(value, take(&mut scratch, ty, !only_for[id].is_empty()));
            }
        }
        for (value, slot) in &in_scratch {
            let end = last_use.get(value).copied().unwrap_or(value.node);
            if end == id {
                scratch[*slot].taken = false;
            }
        }
    }
    let named: Vec<u32> = scratch
        .iter()
        .enumerate()
        .map(|(index, slot)| {
            let rows = match slot.rows {
                Rows::Tokens => "tokens",
                Rows::Wanted => "rows",
            };
            let dtype = match slot.dtype {
                DType::F32 => "f32",
                DType::U32 => "u32",
            };
            let nth = scratch[..index].iter().filter(|other| other.kind() == slot.kind()).count();
            let dim = Dim::Times(symbol(slot.rows), slot.length as u64);
            let class = if slot.for_taps { "taps" } else { "scratch" };
            buffers.get(&format!("{class}.{rows}.{dtype}.{nth}"), slot.dtype, dim, Role::Scratch)
        })
        .collect();
    assigned.extend(in_scratch.into_iter().map(|(value, slot)| (value, named[slot])));
    assigned
}

/// A scratch buffer in the making.
struct Scratch {
    rows: Rows,
    dtype: DType,
    /// Whether its values serve optional taps alone.
    for_taps: bool,
    /// Numbers of a row.
    length: usize,
    /// Whether a living value is in it.
    taken: bool,
}

impl Scratch {
    /// Values of one kind share buffers.
    fn kind(&self) -> (Rows, DType, bool) {
        (self.rows, self.dtype, self.for_taps)
    }
}

/// A free slot for a tensor: the smallest that is large enough, else the largest, grown, else a new one.
fn take(scratch: &mut Vec<Scratch>, ty: &TensorType, for_taps: bool) -> usize {
    let length = ty.row_len().max(1);
    let free = |(_, slot): &(usize, &Scratch)| !slot.taken && slot.kind() == (ty.rows, ty.dtype, for_taps);
    let slots = || scratch.iter().enumerate().filter(free);
    let fitting = slots().filter(|(_, slot)| slot.length >= length).min_by_key(|(_, slot)| slot.length);
    let chosen = fitting.or_else(|| slots().max_by_key(|(_, slot)| slot.length)).map(|(index, _)| index);
    let chosen = chosen.unwrap_or_else(|| {
        scratch.push(Scratch { rows: ty.rows, dtype: ty.dtype, for_taps, length, taken: true });
        scratch.len() - 1
    });
    scratch[chosen].length = scratch[chosen].length.max(length);
    scratch[chosen].taken = true;
    chosen
}
