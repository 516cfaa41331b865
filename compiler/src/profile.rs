//! Device profiles: what a plan is compiled for. They are files, so compiling needs no GPU.

mod shape;
mod tuned;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result, clip};

pub use shape::{SHAPED, Shape};
pub use tuned::{Row, Tuned};

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
    /// Kernels of [`SHAPED`] that go through rows in another way.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kernels: BTreeMap<String, Shape>,
    /// Tokens that share a row of a matrix in batches of more than a few tokens.
    pub token_tile: u32,
    /// Heads that a workgroup of attention has, in teams of invocations for four each; a multiple of four.
    pub attention_heads: u32,
    /// Most workgroups that share the context of a token in batches of a few tokens.
    pub attention_splits: u32,
    /// How products of matrices and many tokens are cut into tiles, if they are.
    pub gemm: Option<Gemm>,
    /// Rows and columns, 8 or 16, of the cooperative matrices (f16 with sums in f32) that programs of precision `fast` multiply
    /// such tiles by, if the device has them; needs `subgroup_size`.
    pub cooperative: Option<u32>,
    /// Whether the device starts as many workgroups as one of its own results says. Otherwise the most that there can be are
    /// started, and those that have nothing to do end.
    pub indirect: bool,
    /// Where these choices were measured, if they were (`moewe tune`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned: Option<Tuned>,
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

    /// How a kernel of [`SHAPED`] goes through the rows of a matrix.
    pub fn shape(&self, kernel: &str) -> Shape {
        let Self { workgroup, lanes, rows, pool_inputs, .. } = *self;
        self.kernels.get(kernel).copied().unwrap_or(Shape { workgroup, lanes, rows, pool_inputs })
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

    /// Whether all values are in their ranges and go together.
    ///
    /// # Errors
    /// What is wrong, with the name of its field.
    pub fn check(&self) -> Result<(), String> {
        self.shape("").check(self)?;
        for (kernel, shape) in &self.kernels {
            if !SHAPED.contains(&kernel.as_str()) {
                return Err(format!("kernels: `{}` is none of {}", clip(kernel), SHAPED.join(", ")));
            }
            shape.check(self).map_err(|what| format!("kernels: {kernel}: {what}"))?;
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
        self.check_cooperative()?;
        if !self.attention_heads.is_multiple_of(4) || !(4..=64).contains(&self.attention_heads) {
            return Err(format!(
                "attention_heads is {}, a multiple of four from 4 to 64 is expected",
                self.attention_heads
            ));
        }
        if !(1..=64).contains(&self.attention_splits) {
            return Err(format!("attention_splits is {}, 1 … 64 are expected", self.attention_splits));
        }
        if !(1..=64).contains(&self.token_tile) || self.max_binding_bytes < 1024 {
            return Err("token_tile 1 … 64 and max_binding_bytes ≥ 1024 are expected".into());
        }
        Ok(())
    }

    fn check_cooperative(&self) -> Result<(), String> {
        let Some(size) = self.cooperative else { return Ok(()) };
        if ![8, 16].contains(&size) {
            return Err(format!("cooperative is {size}, 8 or 16 is expected"));
        }
        let (Some(lanes), Some(_)) = (self.subgroup_size, self.gemm) else {
            return Err("cooperative needs a subgroup_size, and gemm".into());
        };
        // A subgroup has 2 × 2 matrices of a tile of 64 × 64.
        let subgroups = (32 / size).pow(2);
        let invocations = lanes.saturating_mul(subgroups);
        if self.workgroup_invocations < invocations || self.workgroup_bytes < 16384 {
            return Err(format!(
                "cooperative {size} needs {invocations} workgroup_invocations ({subgroups} subgroups) and 16384 workgroup_bytes"
            ));
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
    fn cooperative_matrices_need_a_size_that_kernels_have_and_room() {
        let hopper = Profile::load("hopper").unwrap();
        let refused = |profile: Profile| profile.check().unwrap_err();
        assert_eq!(
            refused(Profile { cooperative: Some(32), ..hopper.clone() }),
            "cooperative is 32, 8 or 16 is expected"
        );
        let no_tiles = Profile { gemm: None, ..hopper.clone() };
        let lavapipe = Profile::load("lavapipe").unwrap();
        let no_subgroups =
            Profile { subgroup_size: None, pool_inputs: false, gemm: None, cooperative: Some(8), ..lavapipe.clone() };
        for profile in [no_tiles, no_subgroups] {
            assert_eq!(refused(profile), "cooperative needs a subgroup_size, and gemm");
        }
        let narrow = Profile { cooperative: Some(8), workgroup_invocations: 256, ..hopper };
        assert!(refused(narrow).contains("needs 512 workgroup_invocations (16 subgroups)"));
        let small = Profile { cooperative: Some(8), workgroup_bytes: 16380, ..lavapipe };
        assert!(refused(small).contains("16384 workgroup_bytes"));
    }

    #[test]
    fn unknown_profile_names_the_known_ones() {
        let message = Profile::load("toaster").unwrap_err().to_string();
        assert!(message.contains("toaster") && message.contains("lavapipe"), "{message}");
    }

    #[test]
    fn kernels_may_have_shapes_of_their_own() {
        let text = serde_json::to_string(&Profile::load("lavapipe").unwrap()).unwrap();
        assert!(!text.contains("kernels") && !text.contains("tuned"), "{text}");
        let with = |field: &str, value: &str| {
            let mut profile: Value = serde_json::from_str(&text).unwrap();
            profile[field] = serde_json::from_str(value).unwrap();
            Profile::parse(&profile.to_string())
        };
        let linear = r#"{"linear": {"workgroup": 128, "lanes": 8, "rows": 2, "pool_inputs": false}}"#;
        let profile = with("kernels", linear).unwrap();
        assert_eq!(profile.shape("linear"), Shape { workgroup: 128, lanes: 8, rows: 2, pool_inputs: false });
        assert_eq!(profile.shape("experts_down"), Shape { workgroup: 32, lanes: 1, rows: 4, pool_inputs: true });
        let shape = |old: &str, new: &str| with("kernels", &linear.replace(old, new)).unwrap_err();
        for (old, new, expected) in [
            ("linear", "sampler", "kernels: `sampler` is none of linear, experts_gate_up"),
            ("128", "96", "kernels: linear: workgroup is 96, a power of two"),
            ("128", "0", "kernels: linear: workgroup is 0"),
            ("128", "2048", "kernels: linear: lanes 8 ≤ workgroup 2048 ≤ 1024"),
            ("128", "16", "kernels: linear: workgroup is 16, 32 or more"),
            ("\"lanes\": 8", "\"lanes\": 16", "kernels: linear: lanes 16 exceed subgroup_size"),
            ("\"rows\": 2", "\"rows\": 17", "kernels: linear: rows is 17, 1 … 16"),
            ("false", "true", "kernels: linear: pool_inputs needs lanes 1"),
            ("\"rows\": 2", "\"rows\": -2", "-2"),
            ("\"rows\": 2", "\"columns\": 2", "columns"),
        ] {
            let found = shape(old, new);
            assert!(found.contains(expected), "{new}: {found}");
        }
    }

    #[test]
    fn what_was_measured_is_kept_and_checked() {
        let row = Row {
            kernel: "linear".into(),
            shape: "512 × 512".into(),
            tokens: 1,
            variant: "linear__wg64".into(),
            before_ns: 10,
            after_ns: 9,
        };
        let tuned = Tuned {
            device: "a GPU".into(),
            ids: [1, 2],
            driver: "a driver".into(),
            driver_info: "1.0".into(),
            date: "2026-01-01T00:00:00Z".into(),
            model: "a model".into(),
            rows: vec![row],
        };
        let profile = Profile { tuned: Some(tuned), ..Profile::load("hopper").unwrap() };
        let text = serde_json::to_string(&profile).unwrap();
        assert_eq!(Profile::parse(&text).unwrap(), profile);
        let found = Profile::parse(&text.replace("\"driver_info\"", "\"version\"")).unwrap_err();
        assert!(found.contains("version"), "{found}");
        let found = Profile::parse(&text.replace("\"before_ns\":10", "\"before_ns\":-1")).unwrap_err();
        assert!(found.contains("-1"), "{found}");
    }
}
