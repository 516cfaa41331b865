//! Bundles.

use super::*;

/// A copy of the bundle of the demo model, to damage.
fn damaged_bundle() -> (TempDir, PathBuf) {
    static BUNDLE: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let whole = BUNDLE.get_or_init(|| {
        let bundle = root().join("demo.moewe");
        moewe!["compile", demo(), "-o", &bundle, "--target", "lavapipe"].ok();
        bundle
    });
    let temp = tempfile::tempdir().unwrap();
    let bundle = temp.path().join("bundle");
    copy(whole, &bundle);
    (temp, bundle)
}

/// A file of each sort in a bundle.
fn sorts(bundle: &Path) -> Vec<PathBuf> {
    let kernel = fs::read_dir(bundle.join("kernels")).unwrap().next().unwrap().unwrap().path();
    let names = ["manifest.json", "plan.json", "weights-00001.safetensors", "tokenizer.json", "config.json"];
    names.iter().map(|name| bundle.join(name)).chain([kernel]).collect()
}

#[test]
fn bundle_with_a_changed_byte() {
    let (_temp, bundle) = damaged_bundle();
    for path in sorts(&bundle) {
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name, "damaged bundle", "compile the checkpoint again"]);
        fs::write(&path, &whole[..at]).unwrap();
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name, "damaged bundle", "compile the checkpoint again"]);
        fs::write(&path, &whole).unwrap();
    }
    moewe!["run", &bundle, "hi", "-n", "1"].ok();
}

#[test]
fn bundle_of_another_version() {
    let (_temp, bundle) = damaged_bundle();
    for version in [json!(0), json!(9), json!(u64::MAX)] {
        edit_json(&bundle.join("manifest.json"), |manifest| manifest["format_version"] = version);
        let words = ["manifest.json", "bundle format", "this moewe reads format", "compile the checkpoint again"];
        moewe!["run", &bundle, "hi"].refused(1, &words);
        moewe!["explain", &bundle].refused(1, &words);
    }
    edit_json(&bundle.join("manifest.json"), |manifest| manifest["format_version"] = json!("1"));
    moewe!["run", &bundle, "hi"].refused(1, &["manifest.json", "format_version"]);
}

#[test]
fn bundle_with_a_missing_file() {
    let (_temp, bundle) = damaged_bundle();
    for path in sorts(&bundle) {
        let whole = fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        fs::remove_file(&path).unwrap();
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name, "missing"]);
        pipe(&path); // must not wait for a writer
        moewe!["run", &bundle, "hi", "-n", "1"].refused(1, &[name]);
        fs::remove_file(&path).unwrap();
        fs::write(&path, whole).unwrap();
    }
    // Weights that stayed with a checkpoint that has gone or changed since.
    let scene = Scene::new(SMALL);
    let bundle = scene.path("bundle");
    moewe!["compile", &scene.checkpoint, "-o", &bundle, "--reference-weights"].ok();
    let whole = fs::read(scene.weights()).unwrap();
    fs::write(scene.weights(), &whole[..whole.len() - 4]).unwrap();
    moewe!["run", &bundle, "--tokens", "1"].refused(1, &["model.safetensors", "bytes", "expected"]);
    fs::remove_file(scene.weights()).unwrap();
    moewe!["run", &bundle, "--tokens", "1"].refused(1, &["model.safetensors", "the file is missing"]);
}
