//! The crate edges of `docs/architecture.md`: who may depend on whom.
//!
//! Reads `cargo metadata`, so it sees exactly what Cargo sees; development dependencies may do more, so that a crate's
//! tests may use the oracle.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What a crate may not depend on, and why.
struct Rule {
    name: &'static str,
    /// The crates of this workspace that it may depend on.
    ours: &'static [&'static str],
    /// Crates of others that it may not depend on.
    banned: &'static [&'static str],
    reason: &'static str,
}

/// One rule for each crate.
const RULES: [Rule; 7] = [
    Rule {
        name: "moewe-plan",
        ours: &[],
        banned: &["wgpu", "wgpu-core", "wgpu-hal", "naga", "tokenizers"],
        reason: "the plan is the contract between all others: plain types that know no device, shader or model",
    },
    Rule {
        name: "moewe-shaders",
        ours: &["moewe-plan"],
        banned: &["wgpu", "wgpu-core", "wgpu-hal", "tokenizers"],
        reason: "kernels are linked and validated without a device and without a model",
    },
    Rule {
        name: "moewe-compiler",
        ours: &["moewe-plan", "moewe-shaders"],
        banned: &["wgpu", "wgpu-core", "wgpu-hal", "tokenizers"],
        reason: "compiling needs no GPU; what a device can do comes from profile files",
    },
    Rule {
        name: "moewe-runtime",
        ours: &["moewe-plan"],
        banned: &["naga", "wesl", "tokenizers"],
        reason: "the runtime executes plans: it knows no model, no kernel source and no compiler",
    },
    Rule {
        name: "moewe-viewer",
        ours: &["moewe-plan"],
        banned: &["tokenizers"],
        reason: "the viewer's library draws tap frames from anywhere and knows nothing else of ours",
    },
    Rule {
        name: "moewe-oracle",
        ours: &[],
        banned: &["wgpu", "naga", "wesl"],
        reason: "a reference that shares code with what it checks proves nothing",
    },
    Rule {
        name: "moewe",
        ours: &["moewe-plan", "moewe-shaders", "moewe-compiler", "moewe-runtime", "moewe-viewer", "moewe-oracle"],
        banned: &["naga", "wesl"],
        reason: "the binary wires the crates together and holds no kernels",
    },
];

/// The direct normal and build dependencies of each crate in the workspace.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let dependencies = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        all.filter(|dependency| dependency["kind"] != "dev")
            .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages.map(|package| (package["name"].as_str().unwrap().to_owned(), dependencies(package))).collect()
}

/// What is wrong with a crate's dependencies, each with the rule that forbids it.
fn violations(rule: &Rule, dependencies: &BTreeSet<String>) -> Vec<String> {
    let wrong = |name: &&String| {
        let ours = *name == "moewe" || name.starts_with("moewe-");
        (ours && !rule.ours.contains(&name.as_str())) || rule.banned.contains(&name.as_str())
    };
    let say = |name| format!("{} must not depend on {name}: {}", rule.name, rule.reason);
    dependencies.iter().filter(wrong).map(say).collect()
}

#[test]
fn crates_depend_only_on_what_they_may_know() {
    let all = dependencies();
    let broken: Vec<String> = RULES.iter().flat_map(|rule| violations(rule, &all[rule.name])).collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn every_crate_has_a_rule() {
    let ruled: BTreeSet<String> = RULES.iter().map(|rule| rule.name.to_owned()).collect();
    let crates: BTreeSet<String> = dependencies().into_keys().collect();
    assert_eq!(crates, ruled, "each crate of the workspace needs a rule in tests/edges.rs");
}

/// The check itself notices a wrong edge.
#[test]
fn a_wrong_edge_is_named_with_its_rule() {
    let runtime = RULES.iter().find(|rule| rule.name == "moewe-runtime").unwrap();
    let wrong = ["moewe-compiler", "moewe-plan", "naga", "wgpu"].map(str::to_owned).into();
    let found = violations(runtime, &wrong);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("moewe-runtime must not depend on moewe-compiler: the runtime executes plans"));
    assert!(found[1].starts_with("moewe-runtime must not depend on naga: "));
}
