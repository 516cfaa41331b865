//! What taps show of one run of a program: the currency between the runtime, recordings and views.

use std::sync::Arc;

use crate::TapGroup;

/// Tensors and times of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TapFrame {
    /// Counts the runs of a session that were watched, from 0. Where a number is missing, the frame was dropped.
    pub number: u64,
    /// The tokens of the run: row i of each tensor belongs to token i.
    pub tokens: Vec<FrameToken>,
    /// What was read.
    pub tensors: Vec<FrameTensor>,
    /// How long the steps took, if that was asked for and this run was one of the samples.
    pub times: Option<RunTimes>,
}

/// A token of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameToken {
    /// Its sequence: a number that no other sequence of the session ever has.
    pub sequence: u32,
    /// Position in the sequence, from 0.
    pub position: u32,
    /// Token id.
    pub id: u32,
}

/// A tensor of a run, `[tokens, columns]`, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct FrameTensor {
    /// Its tap's name, for example `moe.3.weights`.
    pub name: Arc<str>,
    /// Its tap's group.
    pub group: TapGroup,
    /// Its tap's layer.
    pub layer: Option<u32>,
    /// Numbers of a row.
    pub columns: u32,
    /// The numbers.
    pub data: Numbers,
}

/// Numbers of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 32-bit unsigned integers.
    U32(Vec<u32>),
}

/// How long the steps of a run took on the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunTimes {
    /// Index into [`crate::Plan::programs`].
    pub program: u32,
    /// Rows whose logits were wanted.
    pub rows: u32,
    /// Start of each step in nanoseconds since the first one's; `None` for a step that was left out.
    pub starts: Vec<Option<u64>>,
    /// Duration of each step in nanoseconds, 0 for a step that was left out.
    pub durations: Vec<u64>,
}
