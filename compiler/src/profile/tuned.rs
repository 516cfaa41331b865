//! Where the choices of a profile were measured, and what was found.

use moewe_plan::TunedOn;
use serde::{Deserialize, Serialize};

/// The device that a profile was tuned on, and the times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// The device's name, as its driver gives it.
    pub device: String,
    /// PCI ids of its vendor and of the device itself.
    pub ids: [u32; 2],
    /// Name of the driver.
    pub driver: String,
    /// Version of the driver.
    pub driver_info: String,
    /// When, in UTC as RFC 3339 has it.
    pub date: String,
    /// The model whose shapes were measured.
    pub model: String,
    /// What was measured.
    pub rows: Vec<Row>,
}

impl Tuned {
    /// The device, as plans keep it.
    pub fn on(&self) -> TunedOn {
        let Self { device, driver, driver_info, .. } = self.clone();
        TunedOn { device, driver, driver_info }
    }
}

/// One product or attention of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The kernel, or what several do together.
    pub kernel: String,
    /// Its shape, in words.
    pub shape: String,
    /// Tokens of the batch.
    pub tokens: u32,
    /// The variant that was chosen, or the variants in the order in which they run, separated by spaces.
    pub variant: String,
    /// Nanoseconds of what the profile had before,
    pub before_ns: u64,
    /// and of what was chosen.
    pub after_ns: u64,
}
