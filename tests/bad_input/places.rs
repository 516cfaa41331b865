//! Places where nothing can be written.

use super::*;

#[test]
fn read_only_output() {
    // Tests may run as root, whom permissions do not stop; nobody can make files in /proc, or below a file.
    let scene = Scene::new(SMALL);
    let file = scene.path("file");
    fs::write(&file, "precious").unwrap();
    let before = listing(scene.temp.path());
    for place in [Path::new("/proc/moewe"), &file] {
        let (out, shown) = (place.join("out"), place.to_str().unwrap());
        moewe!["compile", &scene.checkpoint, "-o", &out].refused(1, &["cannot write", shown]);
        let said = moewe!["synth", "--like", &scene.checkpoint, "-o", &out].refused(1, &["cannot write", shown]);
        assert!(!said.contains("partial"), "{said}");
        scene.run().env("MOEWE_CACHE", place).refused(1, &["cannot write to the cache", shown]);
    }
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", "/proc/x"].refused(1, &["cannot write /proc/x"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", file.join("x")].refused(1, &["file", "ot a directory"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", scene.path("no/x")].refused(2, &["/no: no such file"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", scene.temp.path()].refused(2, &["is no regular file"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", "/dev/null"].refused(2, &["/dev/null: is no regular file"]);
    moewe!["trace", tiny_bundle(), "--tokens", "1", "--device", "0"].refused(2, &["no --out"]);
    moewe!["compile", &scene.checkpoint, "-o", "/"].refused(1, &["/", "exists already"]);
    assert_eq!(before, listing(scene.temp.path()));
    in_small_place("ro", |place| {
        vec![
            (moewe!["compile", &scene.checkpoint, "-o", place.join("out")], "out"),
            (moewe!["synth", "--like", &scene.checkpoint, "-o", place.join("out")], "out"),
            (moewe!["trace", tiny_bundle(), "--tokens", "1", "-o", place.join("out")], "out"),
            (scene.run().env("MOEWE_CACHE", place.join("cache")), "the cache"),
        ]
    });
}

#[test]
fn disk_full() {
    // A limit on the length of files stops writing half-way, for any user.
    let scene = Scene::new(SMALL);
    let before = listing(scene.temp.path());
    let full = |call: Call| call.through("trap '' XFSZ; ulimit -f 8; exec \"$@\"");
    let said = full(scene.compile()).refused(1, &["cannot write", "out/", "nothing was left behind"]);
    assert!(!said.contains("partial"), "{said}");
    full(moewe!["compile", &scene.checkpoint, "-o", scene.path("out"), "--reference-weights"])
        .refused(1, &["cannot write", "out/"]);
    full(moewe!["synth", "--like", &scene.checkpoint, "-o", scene.path("out")])
        .refused(1, &["cannot write", "out/model.safetensors"]);
    full(moewe!["trace", tiny_bundle(), "--tokens", "1,2,3,4,5", "-o", scene.path("out")])
        .refused(1, &["cannot write", "out", "nothing was left behind"]);
    assert_eq!(before, listing(scene.temp.path()));
    full(scene.run()).refused(1, &["cannot write", "cache/bundles"]);
    assert!(listing(&scene.path("cache")).iter().all(|(path, bytes)| *bytes == 0 && !path.ends_with("plan.json")));
    moewe!["inspect", &scene.checkpoint]
        .through("\"$@\" >/dev/full")
        .refused(1, &["cannot write to standard output", "No space left"]);
    in_small_place("size=96k", |place| {
        vec![
            (moewe!["compile", &scene.checkpoint, "-o", place.join("out")], "No space left"),
            (moewe!["synth", "--like", &scene.checkpoint, "-o", place.join("out")], "No space left"),
            (scene.run().env("MOEWE_CACHE", place), "No space left"),
        ]
    });
}

/// Runs calls that must fail on a file system of their own, mounted with `options`, and checks that they leave nothing.
fn in_small_place(options: &str, calls: impl Fn(&Path) -> Vec<(Call, &'static str)>) {
    let temp = tempfile::tempdir().unwrap();
    let place = temp.path().join("place");
    fs::create_dir(&place).unwrap();
    let mount = format!("mount -t tmpfs -o {options} none {}", place.display());
    let mounts = Command::new("unshare").args(["-rm", "sh", "-c", &mount]).output();
    if !mounts.as_ref().is_ok_and(|output| output.status.success()) {
        not_tested(&format!("a file system with {options}: `unshare -rm {mount}` gives {mounts:?}"));
        return;
    }
    for (call, words) in calls(&place) {
        let script = format!(
            "exec unshare -rm sh -c '{mount} && {{ \"$@\"; code=$?; find {} -type f -size +0; exit $code; }}' sh \"$@\"",
            place.display()
        );
        let name = format!("{call:?}");
        let call = call.through(&script);
        let said = call.run();
        assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{name} left something: {said:?}");
        assert_eq!(said.stderr.lines().count(), 1, "{name}: {said:?}");
        assert!(said.stderr.starts_with("moewe: ") && said.stderr.contains(words), "{name}: {said:?}");
    }
}

#[test]
fn output_that_exists() {
    let scene = Scene::new(SMALL);
    let full = scene.path("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("thesis.tex"), "precious").unwrap();
    for out in [&full, &full.join("thesis.tex"), &scene.checkpoint] {
        let before = listing(scene.temp.path());
        moewe!["compile", &scene.checkpoint, "-o", out].refused(1, &["exists already", "choose another"]);
        moewe!["synth", "--like", &scene.checkpoint, "-o", out].refused(1, &["already exists", "choose another"]);
        assert_eq!(before, listing(scene.temp.path()));
    }
    assert_eq!(fs::read_to_string(full.join("thesis.tex")).unwrap(), "precious");
    // An empty directory is no loss, and a bundle is replaced, but only by a whole one.
    fs::create_dir(scene.path("out")).unwrap();
    scene.compile().ok();
    fs::write(scene.path("out/plan.json.old"), "").unwrap();
    let other = Scene::new("v3-tiny");
    other.edit_weights(|parts| parts.remove("model.norm.weight"));
    let before = listing(&scene.path("out"));
    moewe!["compile", &other.checkpoint, "-o", scene.path("out")].refused(1, &["model.norm.weight"]);
    assert_eq!(before, listing(&scene.path("out")));
    scene.compile().ok();
    assert!(!scene.path("out/plan.json.old").exists());
    fs::create_dir(scene.path("empty")).unwrap();
    moewe!["synth", "--like", &scene.checkpoint, "-o", scene.path("empty")].ok();
}

#[test]
fn profiles_and_shapes_that_are_none() {
    let temp = tempfile::tempdir().unwrap();
    let profile = temp.path().join("profile.json");
    let sound = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("compiler/profiles/lavapipe.json"));
    let sound: Value = serde_json::from_str(&sound.unwrap()).unwrap();
    let compile = || moewe!["compile", golden(SMALL), "-o", temp.path().join("out"), "--target", &profile];
    for (field, value) in [
        ("lanes", json!(3)),
        ("lanes", json!(0)),
        ("lanes", json!(1 << 20)),
        ("workgroup", json!(1 << 20)),
        ("workgroup", json!(16)),
        ("token_tile", json!(0)),
        ("token_tile", json!(1000)),
        ("max_binding_bytes", json!(-1)),
        ("max_binding_bytes", json!(16)),
        ("storage_buffers", json!("many")),
        ("color", json!("red")),
    ] {
        let mut broken = sound.clone();
        broken[field] = value;
        fs::write(&profile, broken.to_string()).unwrap();
        compile().refused(1, &["profile.json", field]);
    }
    for text in ["", "{}", "[]", "lavapipe"] {
        fs::write(&profile, text).unwrap();
        compile().refused(1, &["profile.json"]);
    }
    // Sound, but no row of this model fits its bindings.
    let mut small = sound.clone();
    small["max_binding_bytes"] = json!(1024);
    fs::write(&profile, small.to_string()).unwrap();
    compile().refused(2, &["max_binding_bytes", "expected at least"]);
    fs::remove_file(&profile).unwrap();
    pipe(&profile);
    compile().refused(2, &["profile.json"]);

    let out = temp.path().join("synth");
    for (like, scale, words) in [
        ("v9", "layers=1", "\"v9\""),
        ("v3", "layers=0", "num_hidden_layers"),
        ("v3", "layers", "FIELD=VALUE"),
        ("v3", "layer=3", "layers, hidden"),
        ("v3", "layers=3,hidden=-5", "hidden_size"),
        ("v3", "n_group=7", "n_group"),
    ] {
        let said = moewe!["synth", "--like", like, "--scale", scale, "-o", &out].run();
        assert!(matches!(said.code, Some(1 | 2)) && said.stderr.contains(words), "{like} {scale}: {said:?}");
        assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    }
    moewe!["synth", "--like", "v3", "--dtype", "int4", "-o", &out].refused(2, &["int4", "fp8, bf16 or f32"]);
    assert_eq!(listing(temp.path()).len(), 1);
}
