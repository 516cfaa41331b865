//! Device profiles: what a plan is compiled for. They are files, so compiling needs no GPU.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result, clip};

/// Limits of a class of devices and how its kernels are shaped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name.
    pub name: String,
    /// What devices it is for, in a line.
    pub description: String,
    /// Largest storage buffer binding, in bytes. Larger weights are sharded.
    pub max_binding_bytes: u64,
    /// Storage buffers that a kernel may bind.
    pub storage_buffers: u32,
    /// Invocations that a workgroup may have.
    pub workgroup_invocations: u32,
    /// Workgroup memory, in bytes.
    pub workgroup_bytes: u32,
    /// Subgroup size, if subgroup operations may be used and it is always this.
    pub subgroup_size: Option<u32>,
    /// Invocations of a workgroup of kernels that multiply matrices; a power of two.
    pub workgroup: u32,
    /// Invocations that share a row of a matrix; a power of two.
    pub lanes: u32,
    /// Rows of a matrix that such invocations go through together, in batches of a few tokens.
    pub rows: u32,
    /// Whether the invocations of a subgroup load the numbers that a matrix is multiplied with together, each a part, and hand
    /// them to one another. For lanes 1 and subgroups of eight or more.
    pub pool_inputs: bool,
    /// Tokens that share a row of a matrix in batches of more than a few tokens.
    pub token_tile: u32,
    /// Heads that a workgroup of attention has, in teams of invocations for four each; a multiple of four.
    pub attention_heads: u32,
    /// Most workgroups that share the context of a token in batches of a few tokens.
    pub attention_splits: u32,
    /// How products of matrices and many tokens are cut into tiles, if they are.
    pub gemm: Option<Gemm>,
    /// Whether the device starts as many workgroups as one of its own results says. Otherwise the most that there can be are
    /// started, and those that have nothing to do end.
    pub indirect: bool,
}

/// How products of matrices and many tokens are cut into tiles, for rows that divide into blocks of 32 numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Gemm {
    /// Each invocation holds rows and tokens in registers; needs `pool_inputs`.
    Registers {
        /// Rows of an invocation; of both matrices together where two are multiplied.
        rows: u32,
        /// Tokens of a workgroup.
        tokens: u32,
        /// Tokens of one expert of a workgroup.
        expert_tokens: u32,
    },
    /// A workgroup of 128 holds 64 rows and 64 tokens in 16 KiB of its memory.
    Workgroup,
}

const BUILT_IN: &[&str] = &[
    include_str!("../profiles/generic-vulkan.json"),
    include_str!("../profiles/hopper.json"),
    include_str!("../profiles/lavapipe.json"),
    include_str!("../profiles/webgpu.json"),
];

impl Profile {
    /// The profiles that come with moewe.
    pub fn built_in() -> Vec<Self> {
        BUILT_IN.iter().map(|text| serde_json::from_str(text).expect("built-in profiles are tested")).collect()
    }

    /// A built-in profile by name, or one from a file.
    pub fn load(name_or_path: &str) -> Result<Self> {
        let mut built_in = Self::built_in();
        if let Some(at) = built_in.iter().position(|profile| profile.name == name_or_path) {
            return Ok(built_in.swap_remove(at));
        }
        let path = Path::new(name_or_path);
        if !path.is_file() {
            let names: Vec<_> = built_in.into_iter().map(|profile| profile.name).collect();
            return Err(Error::Target { found: name_or_path.into(), known: names.join(", ") });
        }
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        Self::parse(&text).map_err(|detail| Error::Profile { path: path.into(), detail })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
        // serde does not say which field has a wrong number.
        for field in ["max_binding_bytes", "storage_buffers", "workgroup_invocations", "workgroup_bytes", "workgroup"]
            .into_iter()
            .chain(["lanes", "rows", "token_tile", "attention_heads", "attention_splits"])
        {
            let limit = if field == "max_binding_bytes" { 1 << 48 } else { u32::MAX.into() };
            let found = value.get(field).map_or_else(|| "absent".into(), |value| clip(&value.to_string()));
            if value.get(field).and_then(Value::as_u64).is_none_or(|number| number > limit) {
                return Err(format!("field `{field}` is {found}, expected a whole number"));
            }
        }
        let profile: Self = serde_json::from_value(value).map_err(|error| clip(&error.to_string()))?;
        profile.check()?;
        Ok(profile)
    }

    fn check(&self) -> Result<(), String> {
        let powers = [("workgroup", self.workgroup), ("lanes", self.lanes)];
        for (field, value) in powers {
            if !value.is_power_of_two() {
                return Err(format!("{field} is {value}, a power of two is expected"));
            }
        }
        if self.lanes > self.workgroup || self.workgroup > self.workgroup_invocations.min(1024) {
            return Err(format!("lanes {} ≤ workgroup {} ≤ 1024 does not hold", self.lanes, self.workgroup));
        }
        if self.subgroup_size.is_some_and(|size| self.lanes > size) {
            return Err(format!("lanes {} exceed subgroup_size", self.lanes));
        }
        if self.pool_inputs && (self.lanes != 1 || self.subgroup_size.is_none_or(|size| size < 8)) {
            return Err("pool_inputs needs lanes 1 and a subgroup_size of 8 or more".into());
        }
        match self.gemm {
            Some(Gemm::Registers { .. }) if !self.pool_inputs => {
                return Err("gemm registers needs pool_inputs".into());
            }
            Some(Gemm::Registers { rows, tokens, expert_tokens })
                if [rows, tokens, expert_tokens].iter().any(|n| !(1..=64).contains(n)) =>
            {
                return Err("gemm registers: rows, tokens and expert_tokens of 1 … 64 are expected".into());
            }
            Some(Gemm::Workgroup) if self.workgroup_bytes < 16384 || self.workgroup_invocations < 128 => {
                return Err("gemm workgroup needs 16384 workgroup_bytes and 128 workgroup_invocations".into());
            }
            _ => {}
        }
        if !(1..=16).contains(&self.rows) {
            return Err(format!("rows is {}, 1 … 16 are expected", self.rows));
        }
        if !self.attention_heads.is_multiple_of(4) || !(4..=64).contains(&self.attention_heads) {
            return Err(format!(
                "attention_heads is {}, a multiple of four from 4 to 64 is expected",
                self.attention_heads
            ));
        }
        if !(1..=64).contains(&self.attention_splits) {
            return Err(format!("attention_splits is {}, 1 … 64 are expected", self.attention_splits));
        }
        if self.workgroup < 32 || !(1..=64).contains(&self.token_tile) || self.max_binding_bytes < 1024 {
            return Err("workgroup ≥ 32, token_tile 1 … 64 and max_binding_bytes ≥ 1024 are expected".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_are_sound_and_named_like_their_files() {
        let profiles = Profile::built_in();
        assert_eq!(profiles.len(), 4);
        for profile in profiles {
            profile.check().unwrap();
            assert_eq!(Profile::load(&profile.name).unwrap(), profile);
        }
    }

    #[test]
    fn unknown_profile_names_the_known_ones() {
        let message = Profile::load("toaster").unwrap_err().to_string();
        assert!(message.contains("toaster") && message.contains("lavapipe"), "{message}");
    }
}
