//! The parts of the `moewe` command that do not need a device.

pub mod heatmap;
pub mod text;
pub mod trace;
