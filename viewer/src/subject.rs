//! What is watched: the facts that hold for a whole recording or session.

use std::collections::BTreeMap;

use moewe_plan::{Cost, ModelInfo, Plan, ProgramKind};
use serde::{Deserialize, Serialize};

/// A model on a device, as far as views must know it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Subject {
    /// What people call it: the directory's name.
    pub name: String,
    /// Facts of the model.
    pub model: ModelInfo,
    /// `exact` or `fast`.
    pub precision: String,
    /// The device and its driver.
    pub device: String,
    /// Bytes that the device copies in a second, as measured; what floors of step times are made of.
    pub bytes_per_second: Option<f64>,
    /// Steps of each program of the plan; only watched programs have any.
    pub programs: Vec<Vec<StepInfo>>,
    /// `e_score_correction_bias [experts]` by layer, where the router has one.
    #[serde(skip)]
    pub expert_bias: BTreeMap<u32, Vec<f32>>,
    /// The text of each token id; empty without a tokenizer.
    #[serde(skip)]
    pub pieces: Vec<String>,
}

/// A step of a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepInfo {
    /// Where in the model it belongs, for example `layers.3.router`.
    pub label: String,
    /// The layer, if it belongs to one.
    pub layer: Option<u32>,
    /// The kernel's skeleton, for example `linear`.
    pub kernel: String,
    /// Bytes and operations.
    pub cost: Cost,
}

impl Subject {
    /// What a plan says; text, bias and speed are still to be filled in.
    pub fn from_plan(name: &str, plan: &Plan, precision: &str, device: &str) -> Self {
        let steps = |program: &moewe_plan::Program| {
            let info = |step: &moewe_plan::Step| StepInfo {
                label: step.label.clone(),
                layer: step.layer,
                kernel: skeleton(&plan.kernels[step.kernel as usize].name).to_owned(),
                cost: step.cost,
            };
            // Others are never watched.
            let is_watched = matches!(program.kind, ProgramKind::Watch | ProgramKind::Draft { .. });
            if is_watched { program.steps.iter().map(info).collect() } else { Vec::new() }
        };
        Self {
            name: name.to_owned(),
            model: plan.model.clone(),
            precision: precision.to_owned(),
            device: device.to_owned(),
            bytes_per_second: None,
            programs: plan.programs.iter().map(steps).collect(),
            expert_bias: BTreeMap::new(),
            pieces: Vec::new(),
        }
    }

    /// The text of a token as it may stand in a line: white space made visible, `#id` without a tokenizer.
    pub fn piece(&self, id: u32) -> String {
        match self.pieces.get(id as usize) {
            Some(piece) => piece.replace('\n', "¶").replace('\t', "»"),
            None => format!("#{id}"),
        }
    }

    /// The experts of a token's group limit: consecutive experts in each group.
    pub fn experts_per_group(&self) -> u32 {
        self.model.experts / self.model.n_group.max(1)
    }
}

/// The part of a variant's name that says which kernel it is.
fn skeleton(variant: &str) -> &str {
    let stem = variant.split('.').next().unwrap_or(variant);
    stem.split("__").next().unwrap_or(stem)
}
