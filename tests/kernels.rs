//! Each kernel alone on the Vulkan device against the f64 oracle, on adversarial inputs.

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/cache.rs"]
mod cache;
#[path = "kernels/constraints.rs"]
mod constraints;
#[path = "kernels/data.rs"]
mod data;
#[path = "kernels/drafting.rs"]
mod drafting;
#[path = "kernels/edits.rs"]
mod edits;
#[path = "kernels/experts.rs"]
mod experts;
#[path = "kernels/gemm.rs"]
mod gemm;
#[path = "kernels/harness.rs"]
mod harness;
#[path = "kernels/latents.rs"]
mod latents;
#[path = "kernels/linear.rs"]
mod linear;
#[path = "kernels/logprobs.rs"]
mod logprobs;
#[path = "kernels/norms.rs"]
mod norms;
#[path = "kernels/prediction.rs"]
mod prediction;
#[path = "kernels/router.rs"]
mod router;
#[path = "kernels/sampler.rs"]
mod sampler;
#[path = "common/skipped.rs"]
mod skipped;

/// What subgroups share does not depend on how many invocations they have.
#[test]
fn subgroups_of_any_width() {
    for width in [4, 16] {
        // Mesa's software driver makes them of vectors of so many bits.
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "attention::values_are_expanded",
                "attention::queries_are_absorbed_and_rotated",
            ])
            .env("LP_NATIVE_VECTOR_WIDTH", (32 * width).to_string())
            // Its cache does not tell widths apart.
            .env("MESA_SHADER_CACHE_DISABLE", "true")
            .output()
            .unwrap();
        let [said, wrong] = [&child.stdout, &child.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        assert!(child.status.success(), "subgroups of {width}: {wrong}");
        assert!(said.contains("2 passed"), "{said}");
        if !said.contains(&format!("subgroups of {width},")) {
            skipped::skipped(&format!("subgroups of {width} need Mesa's software driver"));
        }
    }
}

#[test]
fn every_kernel_has_a_tolerance_with_a_reason() {
    let mut named: Vec<&str> = data::TOLERANCES.iter().map(|tolerance| tolerance.kernel).collect();
    let mut kernels: Vec<&str> = moewe_shaders::SKELETONS.iter().map(|skeleton| skeleton.name).collect();
    named.sort_unstable();
    kernels.sort_unstable();
    assert_eq!(named, kernels);
    assert!(data::TOLERANCES.iter().all(|tolerance| tolerance.bound < 1e-4 && !tolerance.reason.is_empty()));
}
