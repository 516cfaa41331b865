//! One forward pass with everything on the way: the tensors of spec §10, from a session's trace and draft programs.

use std::collections::BTreeMap;

use moewe_plan::{ProgramKind, Sampling};
use moewe_runtime::{Batch, Error, Session, Words};

/// A tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Rows and columns, or only rows for lists.
    pub shape: Vec<usize>,
    /// Numbers.
    pub data: Numbers,
}

/// Numbers of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// Token or expert ids.
    I32(Vec<i32>),
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// The programs that a session needs for [`trace`].
pub fn kinds(mtp_modules: u32) -> Vec<ProgramKind> {
    let drafts = (1..=mtp_modules).map(|module| ProgramKind::Draft { module });
    [ProgramKind::Trace].into_iter().chain(drafts).collect()
}

/// Runs `tokens` through the model in chunks of at most `chunk` and returns the tensors whose names `wanted` picks.
///
/// Modules of multi-token prediction see the tokens shifted, extended by the main model's most likely next token and then
/// by each module's own (spec §7). Experts of a token stand in ascending order.
///
/// # Errors
/// As [`Session::run`]; the session must have been made for [`kinds`], or for the trace program alone if no tensor of a
/// module of multi-token prediction is wanted.
pub fn trace(
    session: &mut Session,
    tokens: &[u32],
    chunk: Option<usize>,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Tensors, Error> {
    // What drafts come to is no tensor of spec §10; their logits are.
    let is_draft = |name: &str| {
        let part = name.rsplit('.').next().unwrap_or_default();
        name.starts_with("mtp.") && ["ids", "probs"].contains(&part)
    };
    let wanted = |name: &str| wanted(name) && !is_draft(name);
    let sequence = session.add_sequence(tokens, Sampling::default())?;
    let traced = trace_sequence(session, sequence, tokens, chunk, &wanted);
    session.remove_sequence(sequence)?;
    let mut tensors = traced?;
    sort_experts(&mut tensors);
    Ok(tensors)
}

fn trace_sequence(
    session: &mut Session,
    sequence: moewe_runtime::SequenceId,
    tokens: &[u32],
    chunk: Option<usize>,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Tensors, Error> {
    let modules = if wants_mtp(session, wanted) { session.model().plan().model.mtp_modules as usize } else { 0 };
    let mut capacity = usize::MAX;
    for kind in kinds(modules as u32) {
        let (tokens, rows) = session.capacity(kind)?;
        capacity = capacity.min(tokens).min(rows);
    }
    // The last chunk may have as many rows more as there are modules but one.
    let limit = chunk.unwrap_or(usize::MAX).min(capacity.saturating_sub(modules.saturating_sub(1))).max(1);
    let mut tensors = Tensors::new();
    // The tokens, and behind them what each stage predicted for the end.
    let mut extended = tokens.to_vec();
    let mut start = 0;
    while start < tokens.len() {
        // Row i of module j needs token i + j. Where that is only predicted, by the last chunk, the row must be in it.
        let end = if start + limit + modules > tokens.len() { tokens.len() } else { start + limit };
        let is_last = end == tokens.len();
        let batch = Batch::of(sequence, &tokens[start..end], start as u32).with_all_rows();
        session.run(ProgramKind::Trace, &batch)?;
        collect(session, ProgramKind::Trace, wanted, &mut tensors)?;
        if is_last && modules > 0 {
            extended.push(argmax_of_last(session, ProgramKind::Trace, "logits")?);
        }
        for shift in 1..=modules {
            let module = shift as u32;
            let kind = ProgramKind::Draft { module };
            // Row i of module j reads token i + j and stands at that token's position.
            let shifted = &extended[start + shift..end + shift];
            let batch = Batch::of(sequence, shifted, (start + shift) as u32).with_all_rows();
            session.run(kind, &batch)?;
            collect(session, kind, wanted, &mut tensors)?;
            let name = format!("mtp.{module}.input_ids");
            if wanted(&name) {
                let ids = shifted.iter().map(|&id| id as i32).collect();
                append(&mut tensors, name, Tensor { shape: vec![shifted.len()], data: Numbers::I32(ids) })?;
            }
            if is_last {
                extended.push(argmax_of_last(session, kind, &format!("mtp.{module}.logits"))?);
            }
        }
        start = end;
    }
    if wanted("input_ids") {
        let ids = tokens.iter().map(|&id| id as i32).collect();
        append(&mut tensors, "input_ids".into(), Tensor { shape: vec![tokens.len()], data: Numbers::I32(ids) })?;
    }
    Ok(tensors)
}

/// Whether any tensor of a draft module is asked for.
fn wants_mtp(session: &Session, wanted: &dyn Fn(&str) -> bool) -> bool {
    let drafts = session.model().plan().programs.iter().filter(|p| matches!(p.kind, ProgramKind::Draft { .. }));
    drafts.flat_map(|program| &program.taps).any(|tap| wanted(&tap.name))
}

fn collect(
    session: &Session,
    kind: ProgramKind,
    wanted: &dyn Fn(&str) -> bool,
    tensors: &mut Tensors,
) -> Result<(), Error> {
    for tap in session.read_chosen(kind, |spec| wanted(&spec.name))? {
        let data = match tap.data {
            Words::F32(numbers) => Numbers::F32(numbers),
            Words::U32(ids) => Numbers::I32(ids.into_iter().map(|id| id as i32).collect()),
        };
        append(tensors, tap.name, Tensor { shape: tap.shape.to_vec(), data })?;
    }
    Ok(())
}

/// Puts the rows of a chunk behind those of the chunks before.
fn append(tensors: &mut Tensors, name: String, more: Tensor) -> Result<(), Error> {
    match tensors.entry(name) {
        std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert(more)),
        std::collections::btree_map::Entry::Occupied(mut entry) => {
            let what = format!("taps called {} differ in kind", entry.key());
            let tensor = entry.get_mut();
            let same_columns = tensor.shape[1..] == more.shape[1..];
            match (&mut tensor.data, more.data) {
                (Numbers::F32(all), Numbers::F32(more)) if same_columns => all.extend(more),
                (Numbers::I32(all), Numbers::I32(more)) if same_columns => all.extend(more),
                _ => return Err(Error::Plan { what }),
            }
            tensor.shape[0] += more.shape[0];
        }
    }
    Ok(())
}

fn argmax_of_last(session: &Session, kind: ProgramKind, name: &str) -> Result<u32, Error> {
    let tap = session.read_tap(kind, name)?;
    let [rows, columns] = tap.shape;
    let last = match &tap.data {
        Words::F32(logits) if rows > 0 => &logits[(rows - 1) * columns..],
        _ => return Err(Error::Plan { what: format!("tap {name} holds no logits") }),
    };
    // The first of the largest, as the sampler has it.
    let best = last.iter().enumerate().fold(0, |best, (i, logit)| if *logit > last[best] { i } else { best });
    Ok(best as u32)
}

/// Puts the experts of each token, and with them their weights, in ascending order.
fn sort_experts(tensors: &mut Tensors) {
    let layers: Vec<String> = tensors.keys().filter_map(|name| name.strip_suffix(".ids").map(str::to_owned)).collect();
    for layer in layers {
        let Some(Tensor { shape, data: Numbers::I32(ids) }) = tensors.get(&format!("{layer}.ids")).cloned() else {
            continue;
        };
        let Some(k) = shape.get(1).filter(|k| **k > 0) else { continue };
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.chunks_mut(*k).for_each(|row| row.sort_by_key(|&i| ids[i]));
        for name in [format!("{layer}.ids"), format!("{layer}.weights")] {
            if let Some(tensor) = tensors.get_mut(&name).filter(|tensor| tensor.shape == shape) {
                match &mut tensor.data {
                    Numbers::F32(all) => *all = order.iter().map(|&i| all[i]).collect(),
                    Numbers::I32(all) => *all = order.iter().map(|&i| all[i]).collect(),
                }
            }
        }
    }
}
