//! How kernels go through the rows of a matrix.

use serde::{Deserialize, Serialize};

use super::Profile;

/// The kernels that can have a [`Shape`] of their own: those that multiply matrices and are not cut into tiles.
pub const SHAPED: [&str; 5] = ["linear", "experts_gate_up", "experts_down", "router_product", "absorb_output"];

/// How a kernel goes through the rows of a matrix; the fields are those of [`Profile`] by these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Invocations of a workgroup; a power of two.
    pub workgroup: u32,
    /// Invocations that share a row; a power of two.
    pub lanes: u32,
    /// Rows that such invocations go through together, in batches of a few tokens. `absorb_output` always has one.
    pub rows: u32,
    /// Whether the invocations of a subgroup load inputs together, where rows divide into blocks and, in `absorb_output`, heads
    /// into subgroups.
    pub pool_inputs: bool,
}

impl Shape {
    /// Whether a device of this profile can run it.
    pub(super) fn check(&self, profile: &Profile) -> Result<(), String> {
        let Self { workgroup, lanes, rows, pool_inputs } = *self;
        for (field, value) in [("workgroup", workgroup), ("lanes", lanes)] {
            if !value.is_power_of_two() {
                return Err(format!("{field} is {value}, a power of two is expected"));
            }
        }
        let most = profile.workgroup_invocations.min(1024);
        if lanes > workgroup || workgroup > most {
            return Err(format!("lanes {lanes} ≤ workgroup {workgroup} ≤ {most} does not hold"));
        }
        if workgroup < 32 {
            return Err(format!("workgroup is {workgroup}, 32 or more are expected"));
        }
        if profile.subgroup_size.is_some_and(|size| lanes > size) {
            return Err(format!("lanes {lanes} exceed subgroup_size"));
        }
        if pool_inputs && (lanes != 1 || profile.subgroup_size.is_none_or(|size| size < 8)) {
            return Err("pool_inputs needs lanes 1 and a subgroup_size of 8 or more".into());
        }
        if !(1..=16).contains(&rows) {
            return Err(format!("rows is {rows}, 1 … 16 are expected"));
        }
        Ok(())
    }
}
