//! Anything at all: disturbed headers, configurations and plans.

use super::*;

/// Bytes of a checkpoint's files with a few of them changed, and some cut off at the end.
fn disturb(bytes: &mut Vec<u8>, changes: &[(u32, u8)], cut: Option<u32>) {
    for (at, value) in changes {
        let at = *at as usize % bytes.len();
        bytes[at] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut as usize % bytes.len());
    }
}

/// Opens, checks and compiles; errors are welcome, panics are not.
fn compile_anyhow(dir: &Path, out: &Path) {
    use moewe_compiler::checkpoint::Checkpoint;
    use moewe_compiler::compile::{Options, compile};
    use moewe_compiler::profile::Profile;
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    let sound = moewe_compiler::tensors::check(&checkpoint).is_ok();
    let options = |plan_only| Options {
        profile: Profile::load("lavapipe").unwrap(),
        weights: None,
        reference: true,
        plan_only,
        latents: moewe_plan::Latent::F16,
        taps: moewe_plan::TapChoice::all(),
    };
    let compiled = compile(&checkpoint, &options(!sound), out, &|_, _| ());
    assert_eq!(out.exists(), compiled.is_ok());
    if compiled.is_ok() {
        moewe_plan::Bundle::open(out).unwrap();
        fs::remove_dir_all(out).unwrap();
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig {
        cases: 96, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn disturbed_safetensors_headers(
        changes in proptest::collection::vec((0u32..20_000, 0u8..), 1..4),
        cut in proptest::option::weighted(0.2, 0u32..),
    ) {
        let scene = Scene::new(SMALL);
        let mut bytes = fs::read(scene.weights()).unwrap();
        disturb(&mut bytes, &changes, cut);
        fs::write(scene.weights(), bytes).unwrap();
        compile_anyhow(&scene.checkpoint, &scene.path("out"));
    }

    #[test]
    fn disturbed_configs(
        changes in proptest::collection::vec((0u32.., b' '..b'~'), 1..4),
        cut in proptest::option::weighted(0.1, 0u32..),
        field in 0usize..64,
        value in proptest::sample::select(vec!["0", "1", "2", "7", "33", "null", "true", "[]", "-1", "1e9", "\"\""]),
    ) {
        let scene = Scene::new(SMALL);
        // One field is changed soundly as JSON goes, then some bytes are not.
        scene.config(|config| {
            let fields = config.as_object_mut().unwrap();
            let at = field % fields.len();
            *fields.values_mut().nth(at).unwrap() = serde_json::from_str(value).unwrap();
        });
        compile_anyhow(&scene.checkpoint, &scene.path("out"));
        let path = scene.checkpoint.join("config.json");
        let mut bytes = fs::read(&path).unwrap();
        disturb(&mut bytes, &changes, cut);
        fs::write(&path, bytes).unwrap();
        compile_anyhow(&scene.checkpoint, &scene.path("out"));
    }
}

/// How many values there are in a value.
fn leaves(value: &Value) -> usize {
    match value {
        Value::Object(fields) => fields.values().map(leaves).sum::<usize>().max(1),
        Value::Array(list) => list.iter().map(leaves).sum::<usize>().max(1),
        _ => 1,
    }
}

/// Changes one value somewhere in a plan. Grids and parameters of kernels are only changed a little: a plan that asks
/// for a great deal of work is slow, but sound.
fn disturb_plan(plan: &mut Value, random: &mut impl FnMut(usize) -> usize) -> String {
    let mut at = plan;
    let mut path = String::new();
    // Any value is as likely as any other, or any branch, so that the few values of small parts are changed too.
    let by_value = random(2) == 0;
    loop {
        let weights: Vec<usize> = match at {
            Value::Object(fields) => {
                let idle = ["generator", "format_version", "warnings", "why", "label", "cost"];
                fields.iter().map(|(name, value)| if idle.contains(&&**name) { 0 } else { leaves(value) }).collect()
            }
            Value::Array(list) => list.iter().map(leaves).collect(),
            _ => break,
        };
        if weights.is_empty() {
            break;
        }
        let weights: Vec<usize> = weights.into_iter().map(|n| if by_value { n } else { n.min(1) }).collect();
        let mut left = random(weights.iter().sum());
        let index = weights.iter().position(|weight| {
            let here = left < *weight;
            left = left.saturating_sub(*weight);
            here
        });
        let index = index.expect("it is below the sum");
        at = match at {
            Value::Object(fields) => {
                let (name, value) = fields.iter_mut().nth(index).unwrap();
                path = format!("{path}.{name}");
                value
            }
            Value::Array(list) => {
                path = format!("{path}[{index}]");
                if random(12) == 0 {
                    if random(2) == 0 {
                        list.remove(index);
                        return path + " removed";
                    }
                    let copy = list[index].clone();
                    list.insert(index, copy);
                    return path + " doubled";
                }
                &mut list[index]
            }
            _ => unreachable!("it has members"),
        };
    }
    let work = path.contains(".params") || path.contains(".grid");
    *at = match (&at, random(8)) {
        (Value::Number(number), choice) => {
            let number = number.as_u64().unwrap_or(1);
            let near = [number + 1, number.saturating_sub(1), number * 2, number / 2, 0, 1];
            let far = [1 << 20, (1 << 32) - 1, 1 << 33, (1 << 48) - 1, 1 << 62, u64::MAX];
            json!(if work || choice < 5 { near[random(6)] } else { far[random(6)] })
        }
        (Value::String(text), 0..4) => json!(format!("{text}x")),
        (Value::String(_), _) => json!(["", "..", "f32", "fp8", "u32", "read", "uniform", "tokens"][random(8)]),
        (Value::Bool(value), _) => json!(!*value),
        _ => [json!(null), json!(0), json!([]), json!({}), json!("tokens")][random(5)].clone(),
    };
    format!("{path} = {at}")
}

/// Runs in a process of its own, so that an abort or a hang is seen: bundles whose plan says anything at all, with a
/// manifest that agrees, are opened, loaded and run.
#[test]
#[ignore = "a part of disturbed_plans"]
fn disturbed_plans_child() {
    use moewe::trace;
    use moewe_plan::{Bundle, ProgramKind};
    use moewe_runtime::{Error, GenerateOptions, Gpu, Model, Selector, Session, SessionOptions, generate};
    let seconds = std::env::var("MOEWE_TEST_SECONDS").map_or(8, |seconds| seconds.parse().unwrap());
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut seed: u64 = std::env::var("MOEWE_TEST_SEED").unwrap().parse().unwrap();
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("bundle");
    copy(Path::new(&std::env::var_os("MOEWE_TEST_BUNDLE").unwrap()), &dir);
    let whole = cli::read_json(&dir.join("plan.json"));
    let open = || Gpu::open(&Selector::Default).unwrap();
    let mut gpu = open();
    let (mut tried, mut ran) = (0, 0);
    while Instant::now() < until {
        let mut plan = whole.clone();
        let change = disturb_plan(&mut plan, &mut random);
        println!("{change}"); // the last line names the culprit
        fs::write(dir.join("plan.json"), plan.to_string()).unwrap();
        reseal(&dir);
        tried += 1;
        let Ok(bundle) = Bundle::open(&dir) else { continue };
        let run = || -> Result<(), Error> {
            let model = Model::load(&gpu, &bundle, &|_| ())?;
            let session = |kinds| Session::new(model.clone(), SessionOptions { kinds, ..SessionOptions::default() });
            let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
            generate(&mut session(vec![ProgramKind::Forward])?, &[1, 2, 3], &options, |_| {
                std::ops::ControlFlow::Continue(())
            })?;
            let kinds = trace::kinds(bundle.plan.model.mtp_modules);
            trace::trace(&mut session(kinds)?, &[1, 2, 3], None, &|_| true)?;
            Ok(())
        };
        match run() {
            Ok(()) => ran += 1,
            Err(Error::DeviceLost { .. }) => gpu = open(),
            Err(_) => {}
        }
    }
    println!("{tried} plans tried, {ran} of them ran");
}

#[test]
fn disturbed_plans() {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = std::env::var("MOEWE_TEST_SEED").unwrap_or_else(|_| seed.to_string());
    let bundle = root().join("small.moewe");
    moewe!["compile", golden(SMALL), "-o", &bundle, "--target", "lavapipe"].ok();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "fuzz::disturbed_plans_child", "--ignored", "--nocapture"]);
    child.env("MOEWE_TEST_SEED", &seed).env("MOEWE_TEST_BUNDLE", &bundle);
    child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let said = cli::finish(child.spawn().unwrap());
    let last = said.stdout.lines().rfind(|line| line.starts_with('.'));
    assert_eq!(said.code, Some(0), "MOEWE_TEST_SEED={seed}, {last:?}: {} {}", said.stdout, said.stderr);
}
