//! Whole models on the device against the golden files: every checkpoint, every sequence, every tensor, with prefill
//! whole and in chunks, from a bundle with its own weights and from one that refers to the checkpoint's, as `moewe run` and
//! `moewe trace` make it of a checkpoint.

use std::path::Path;

#[path = "common/golden.rs"]
mod common;

use common::{Golden, check, options, profile};
use moewe_compiler::compile::Options;

macro_rules! golden {
    ($($name:ident: $dir:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            let golden = Golden::open($dir);
            for reference in [false, true] {
                let options = Options { reference, ..options(profile("lavapipe")) };
                let checked = check(&golden, &options, Some(8), &[None, Some(1), Some(5), Some(64)]);
                assert_eq!(checked.len(), golden.sequences.len());
            }
        })*

        /// No checkpoint lies there that is not tested.
        #[test]
        fn every_checkpoint_is_tested() {
            let tested = [$($dir),*];
            for root in ["golden", "data"] {
                for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(root)).unwrap() {
                    let path = entry.unwrap().path();
                    if path.join("config.json").exists() {
                        let name = format!("{root}/{}", path.file_name().unwrap().display());
                        assert!(tested.contains(&name.as_str()), "{name} is not tested");
                    }
                }
            }
        }
    };
}

golden! {
    kimi_k2: "golden/kimi-k2-tiny",
    v2_lite: "golden/v2-lite-tiny",
    v2: "golden/v2-tiny",
    v3_bf16: "golden/v3-bf16-tiny",
    v3_bf16_sharded: "golden/v3-bf16-tiny-sharded",
    v3_fp8: "golden/v3-fp8-tiny",
    v3_mtp_accept: "golden/v3-mtp-accept-tiny",
    v3: "golden/v3-tiny",
    v3_odd: "data/v3-odd-tiny",
    v2_odd: "data/v2-odd-tiny",
}
