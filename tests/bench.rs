//! `moewe bench`: what its lines say agrees with itself, its floors agree with `explain` and with the plan, and what does not
//! fit is left out.

#[path = "common/cli.rs"]
mod cli;

use std::path::Path;

use cli::{golden, moewe, read_json, root, tiny_bundle};
use moewe_plan::{Binding, Bundle, Latent, Plan, Precision, ProgramKind};
use serde_json::{Value, json};

fn near(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected.abs().max(1e-30), "{found} is not {expected}");
}

fn bench_of(model: &Path, options: &[&str]) -> cli::Call {
    let mut args = vec!["bench".into(), model.into()];
    args.extend(options.iter().map(Into::into));
    cli::Call::new(args)
}

fn bench(options: &[&str]) -> cli::Call {
    bench_of(tiny_bundle(), options)
}

/// A number in a line.
fn at(line: &Value, path: &str) -> f64 {
    line.pointer(path).unwrap_or_else(|| panic!("{path}: {line}")).as_f64().unwrap_or_else(|| panic!("{path}: {line}"))
}

/// The lines of a kind.
fn lines<'a>(said: &'a Value, kind: &str) -> Vec<&'a Value> {
    said["lines"].as_array().unwrap().iter().filter(|line| line["kind"] == kind).collect()
}

/// What every line must say, of a time for so many tokens.
fn check_times(line: &Value, tokens: f64) {
    let [median, min, max] = ["median", "min", "max"].map(|part| at(line, &format!("/seconds/{part}")));
    assert!(0.0 < min && min <= median && median <= max, "{line}");
    near(at(line, "/tokens_per_second/median"), tokens / median, 1e-9);
    near(at(line, "/tokens_per_second/min"), tokens / max, 1e-9);
    near(at(line, "/tokens_per_second/max"), tokens / min, 1e-9);
    near(at(line, "/share_of_floor"), at(line, "/floor/seconds") / median, 1e-9);
    near(at(line, "/floor/tokens_per_second"), tokens / at(line, "/floor/seconds"), 1e-9);
    assert!(at(line, "/floor/flops") > 0.0 && at(line, "/floor/bytes") > 0.0);
    if cfg!(unix) {
        let [median, min, max] = ["median", "min", "max"].map(|part| at(line, &format!("/cpu_seconds/{part}")));
        assert!(0.0 < min && min <= median && median <= max, "{line}");
        near(at(line, "/cpu_seconds_per_token"), median / tokens, 1e-9);
    }
}

/// What floors rest on in what `bench` said: bytes and operations a second.
fn rates(said: &Value) -> (f64, f64) {
    let copy = |kind: &str| at(said, &format!("/copy_gigabytes_per_second/{kind}"));
    (copy("kernel").max(copy("driver")) * 1e9, at(said, "/matrix_flops_per_second/f32"))
}

/// A floor of a single run is the longer of its two times.
fn check_single_run(said: &Value, floor: &Value) {
    let (bytes, flops) = rates(said);
    let (moving, computing) = (at(floor, "/bytes") / bytes, at(floor, "/flops") / flops);
    near(at(floor, "/seconds"), moving.max(computing), 1e-9);
    assert_eq!(floor["bound"], if moving >= computing { "bytes" } else { "flops" });
}

#[test]
fn bench_measures_beside_a_floor() {
    let options = ["--prompt-tokens", "3,20", "--batch", "1,2", "--context", "0,9", "--decode-tokens", "5"];
    let said = bench(&[&options[..], &["--repeat", "2", "--json"]].concat()).json();
    for field in ["/device/name", "/device/driver", "/versions/moewe", "/date", "/target", "/precision"] {
        assert!(said.pointer(field).unwrap().as_str().unwrap().len() > 2, "{field}");
    }
    assert!(said["copy_gigabytes_per_second"]["kernel"].as_f64().unwrap() > 0.0);
    assert_eq!((&said["complete"], &said["skipped"], &said["repeat"]), (&json!(true), &json!([]), &json!(2)));
    let lines: Vec<&Value> = ["prefill", "decode"].iter().flat_map(|kind| lines(&said, kind)).collect();
    let of = |line: &&Value| {
        let number = |field: &str| line[field].as_u64();
        let size = number("prompt_tokens").or(number("context")).unwrap();
        (line["kind"].as_str().unwrap().to_owned(), number("batch").unwrap(), size)
    };
    let expected = [
        ("prefill", 1, 3),
        ("prefill", 1, 20),
        ("prefill", 2, 3),
        ("prefill", 2, 20),
        ("decode", 1, 0),
        ("decode", 1, 9),
        ("decode", 2, 0),
        ("decode", 2, 9),
    ];
    assert_eq!(lines.iter().map(of).collect::<Vec<_>>(), expected.map(|(kind, b, size)| (kind.to_owned(), b, size)));
    for line in &lines {
        let tokens = if line["kind"] == "prefill" { at(line, "/prompt_tokens") } else { at(line, "/decode_tokens") };
        check_times(line, tokens * at(line, "/batch"));
        let median = at(line, "/seconds/median");
        if line["kind"] == "prefill" {
            near(at(line, "/first_token_seconds"), median, 1e-9);
        } else {
            near(at(line, "/step_seconds"), median / 5.0, 1e-9);
        }
    }
    // More work moves more; two sequences share weights, two prompts of 20 fit one run.
    let bytes: Vec<f64> = lines.iter().map(|line| at(line, "/floor/bytes")).collect();
    assert!(bytes[0] < bytes[1] && bytes[4] < bytes[5] && bytes[4] < bytes[6], "{bytes:?}");
    assert!(bytes[3] < 2.0 * bytes[1] && bytes[6] < 2.0 * bytes[4], "{bytes:?}");
}

/// One token's bytes are those that `explain` adds up: nothing is shared between the tokens of such a run.
#[test]
fn the_floor_of_one_token_is_what_explain_shows() {
    let options = ["--prompt-tokens", "1", "--batch", "1", "--context", "40", "--decode-tokens", "1", "--json"];
    let said = bench(&[&options[..], &["--mtp", "off"]].concat()).json();
    let explained = moewe!["explain", tiny_bundle(), "--json", "--context", "41"].json();
    let forward = explained["programs"].as_array().unwrap().iter().find(|p| p["program"] == "forward").unwrap();
    let steps = forward["layers"].as_array().unwrap().iter().flat_map(|layer| layer["steps"].as_array().unwrap());
    let (bytes, flops) = steps.fold((0.0, 0), |(bytes, flops), step| {
        (bytes + step["bytes"].as_f64().unwrap(), flops + step["flops"].as_u64().unwrap())
    });
    let floor = &said["lines"][1]["floor"];
    check_single_run(&said, floor);
    check_single_run(&said, &said["lines"][0]["floor"]);
    near(floor["bytes"].as_f64().unwrap(), bytes, 1e-9);
    assert_eq!(floor["flops"], flops);
}

/// A prompt's logits are wanted behind its last token: a larger batch costs more in the layers, and the same at the end.
#[test]
fn explain_counts_the_head_once() {
    let steps = |tokens: &str| -> Vec<(String, u64, u64)> {
        let said = moewe!["explain", tiny_bundle(), "--json", "--tokens", tokens, "--context", "9"].json();
        let forward = said["programs"].as_array().unwrap().iter().find(|p| p["program"] == "forward").unwrap();
        let steps = forward["layers"].as_array().unwrap().iter().flat_map(|layer| layer["steps"].as_array().unwrap());
        let figures = |step: &Value| (step["bytes"].as_u64().unwrap(), step["flops"].as_u64().unwrap());
        steps.map(|step| (step["label"].as_str().unwrap().to_owned(), figures(step).0, figures(step).1)).collect()
    };
    let (one, four) = (steps("1"), steps("4"));
    for (one, four) in one.iter().zip(&four) {
        assert_eq!(one.0, four.0);
        if ["wanted_rows", "head", "sample", "accept"].contains(&one.0.as_str()) {
            assert_eq!(one, four);
        } else {
            assert!(four.1 > one.1 && four.2 >= one.2, "{one:?} {four:?}");
        }
    }
}

/// A floor is that of the plan, whether the model is run or not; without a model the device's figures are left.
#[test]
fn floors_need_no_run() {
    let sizes = ["--prompt-tokens", "3,200", "--batch", "1,2", "--context", "0,9", "--decode-tokens", "5", "--json"];
    let said = bench(&[&["--floor"], &sizes[..]].concat()).json();
    let ran = bench(&[&["--only", "prefill,decode", "--repeat", "1"], &sizes[..]].concat()).json();
    let (floors, lines) = (said["lines"].as_array().unwrap(), ran["lines"].as_array().unwrap());
    assert_eq!((floors.len(), lines.len()), (8, 8));
    for (floor, line) in floors.iter().zip(lines) {
        for field in ["/kind", "/batch", "/prompt_tokens", "/context", "/floor/bytes", "/floor/flops"] {
            assert_eq!(floor.pointer(field), line.pointer(field), "{field}");
        }
        assert!(floor["seconds"].is_null() && at(floor, "/floor/seconds") > 0.0, "{floor}");
    }
    let printed = bench(&["--floor", "--prompt-tokens", "3,100000", "--batch", "1", "--context", "9"]).ok().stdout;
    for words in ["The device at most", "matrix product", "decode behind", "left out: prefill of 1 × 100000", "bound"]
    {
        assert!(printed.contains(words), "{words}: {printed}");
    }

    let said = moewe!["bench", "--floor", "--json"].json();
    for number in ["/dispatch_microseconds", "/submit_and_wait_microseconds", "/matrix_flops_per_second/f32"] {
        assert!(at(&said, number) > 0.0, "{number}: {said}");
    }
    assert!(said["matrix_flops_per_second"].get("cooperative").is_some() && said.get("lines").is_none());
    assert!(moewe!["bench", "--floor"].ok().stdout.contains("chained dispatch"));
    moewe!["bench"].refused(2, &["MODEL"]);
    moewe!["bench", "--floor", "--repeat", "2"].refused(2, &["--repeat"]);
    moewe!["bench", "--only", "nothing"].refused(2, &["--only"]);
}

/// Parts that are not asked for are not measured; sequences that share a beginning still read latents of their own.
#[test]
fn parts_are_chosen() {
    let options = ["--batch", "3", "--context", "1,64,130,200", "--decode-tokens", "2", "--repeat", "1", "--json"];
    let said = bench(&[&["--only", "decode"], &options[..]].concat()).json();
    assert_eq!((lines(&said, "decode").len(), said["lines"].as_array().unwrap().len()), (4, 4));
    assert_eq!(said["skipped"], json!([]));
    for line in lines(&said, "decode") {
        check_times(line, 6.0);
    }
    let bytes: Vec<f64> = lines(&said, "decode").iter().map(|line| at(line, "/floor/bytes")).collect();
    assert!(bytes.windows(2).all(|pair| pair[0] < pair[1]), "{bytes:?}");
    let said = bench(&["--only", "drafts", "--decode-tokens", "2", "--repeat", "1", "--json"]).json();
    assert_eq!((lines(&said, "mtp").len(), said["lines"].as_array().unwrap().len()), (3, 3));
}

/// The tables in `docs/performance.md` are what the commands above them print. `UPDATE_SNAPSHOTS=1` writes them anew.
#[test]
fn tables_in_the_documentation_are_printed_by_moewe() {
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = home.join("docs/performance.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (mut fresh, mut tables) = (String::new(), 0);
    let mut rest = text.as_str();
    while let Some(at) = rest.find("```\n$ moewe ") {
        let (command, behind) = rest[at + 12..].split_once('\n').unwrap();
        let (_, behind) = behind.split_at(behind.find("```").unwrap());
        let args = command.split(' ').map(|arg| {
            let file = home.join(arg);
            if file.is_file() { file.into_os_string() } else { arg.into() }
        });
        let said = cli::Call::new(args.collect()).ok().stdout;
        assert!(said.contains("MLA projections"), "{said}");
        fresh += &format!("{}```\n$ moewe {command}\n{said}", &rest[..at]);
        (rest, tables) = (behind, tables + 1);
    }
    fresh += rest;
    assert_eq!(tables, 2);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, fresh).unwrap();
    } else {
        assert!(fresh == text, "docs/performance.md is not what moewe prints; UPDATE_SNAPSHOTS=1 writes it anew");
    }
}

// ---- drafts

/// Bytes that a run of a program must move for a sequence of which `context` tokens are in the cache, made from the plan.
fn moved(plan: &Plan, kind: ProgramKind, (tokens, rows): (u32, u32), context: u32, drafts: bool) -> f64 {
    let fits = |p: &&moewe_plan::Program| {
        (p.kind, p.precision) == (kind, Precision::Exact) && p.max_tokens >= tokens && p.max_rows >= rows
    };
    let program = plan.programs.iter().find(fits).unwrap();
    let (experts, each) = (f64::from(plan.model.experts), f64::from(plan.model.num_experts_per_tok));
    let distinct = experts * (1.0 - (1.0 - each / experts).powi(tokens as i32));
    let mut bytes = 0.0;
    for step in program.steps.iter().filter(|step| step.only_for.is_empty() && step.when.holds(drafts, false)) {
        let times = if format!("{:?}", step.grid).contains("Tokens") { tokens } else { rows };
        bytes += step.cost.fixed_bytes as f64 + f64::from(times) * step.cost.token_bytes as f64;
        bytes += f64::from(context + tokens) * step.cost.context_bytes as f64;
        for binding in &step.bindings {
            // Experts that several tokens choose are read once, and so are shared ones, which all choose. The tiny models have
            // no shards and no scales.
            if let Binding::Weight { weight, .. } = binding
                && plan.weights[*weight as usize].shape.len() == 3
                && step.label.contains("experts")
            {
                let weight = &plan.weights[*weight as usize];
                let (all, tokens) = (weight.shape[0] as f64, f64::from(tokens));
                let shared = all - experts;
                bytes -= (tokens * (each + shared) - (distinct + shared)) * weight.bytes() as f64 / all;
            }
        }
    }
    bytes
}

/// The tiny model whose module of multi-token prediction is right more often than not.
fn drafting_bundle() -> std::path::PathBuf {
    let bundle = root().join("v3-mtp-accept-tiny.moewe");
    moewe!["compile", golden("v3-mtp-accept-tiny"), "-o", &bundle, "--target", "lavapipe"].ok();
    bundle
}

#[test]
fn drafts_are_measured_against_none() {
    let bundle = drafting_bundle();
    let options = ["--prompt-tokens", "1", "--batch", "1", "--context", "65", "--repeat", "2", "--json"];
    let modes = ["--decode-tokens", "8", "--mtp", "off,1,3,auto"];
    let said = bench_of(&bundle, &[&options[..], &modes].concat()).json();
    let measured = lines(&said, "mtp");
    let named: Vec<&Value> = measured.iter().map(|line| &line["mode"]).collect();
    assert_eq!(named, [&json!("off"), &json!(1), &json!(3), &json!("auto")]);
    for line in &measured {
        assert_eq!((at(line, "/prompt_tokens"), at(line, "/decode_tokens")), (65.0, 32.0));
        assert_eq!((&line["same_text"], &line["temperature"]), (&json!(true), &json!(0.8)), "{line}");
        check_times(line, 31.0);
        let ratio = at(line, "/ratio_to_off/median");
        assert!(ratio > 0.0 && ratio.is_finite());
        let positions = line["acceptance"].as_array().unwrap();
        let sum = |field: &str| positions.iter().map(|position| position[field].as_u64().unwrap()).sum::<u64>();
        assert_eq!((&line["drafted"], &line["accepted"]), (&json!(sum("drafted")), &json!(sum("accepted"))));
    }
    let [off, one, three, _] = measured[..] else { unreachable!() };
    assert_eq!((at(off, "/ratio_to_off/min"), at(off, "/ratio_to_off/max")), (1.0, 1.0));
    assert_eq!((&off["acceptance"], at(off, "/tokens_per_pass")), (&json!([]), 1.0));

    // Floors: that of no drafts is decode's; that of drafts is made from the plan.
    let decode = bench_of(&bundle, &[&options[..], &["--decode-tokens", "31", "--mtp", "off"]].concat()).json();
    let decode = lines(&decode, "decode")[0].clone();
    near(at(off, "/floor/bytes"), at(&decode, "/floor/bytes"), 1e-9);
    near(at(off, "/floor/flops"), at(&decode, "/floor/flops"), 1e-9);
    let plan = Bundle::open(&bundle).unwrap().plan;
    let middle = 65 + 15;
    let module = ProgramKind::Draft { module: 1 };
    let pass = |drafts: u32| {
        if drafts == 0 {
            return moved(&plan, ProgramKind::Forward, (1, 1), middle, false);
        }
        moved(&plan, ProgramKind::Forward, (1 + drafts, 1 + drafts), middle, true)
            + moved(&plan, module, (1 + drafts, 1), middle, true)
            + f64::from(drafts - 1) * moved(&plan, module, (1, 1), middle, true)
    };
    for (line, drafts) in [(one, 1), (three, 3)] {
        let positions = line["acceptance"].as_array().unwrap();
        assert_eq!(positions.len(), drafts as usize);
        let at_least = |drafts: u32| positions.get(drafts as usize - 1).map_or(0.0, |place| at(place, "/drafted"));
        let accepted = at(line, "/accepted");
        assert!(accepted > 0.0 && accepted < at(line, "/drafted"), "{line}");
        // Two texts of 31 tokens behind the first: one for each pass, and those accepted. What is left are passes without
        // drafts, such as those behind which a single token is wanted.
        let without = (62.0 - at_least(1) - accepted).max(0.0);
        assert!(at_least(1) > 5.0 * without, "{line}");
        let moved = (1..=drafts).map(|drafts| (at_least(drafts) - at_least(drafts + 1)) * pass(drafts)).sum::<f64>();
        let passes = without + at_least(1);
        near(at(line, "/tokens_per_pass"), (passes + accepted) / passes, 1e-9);
        near(at(line, "/floor/bytes"), 31.0 / (passes + accepted) * (without * pass(0) + moved), 1e-9);
    }
    let printed =
        bench_of(&bundle, &["--prompt-tokens", "1", "--batch", "1", "--context", "0", "--decode-tokens", "2"]);
    let printed = printed.ok().stdout;
    for word in ["Drafting: one stream of 8 tokens", "of off", "\n off ", "\n 1 ", "\n auto "] {
        assert!(printed.contains(word), "{word}: {printed}");
    }
    assert!(!printed.contains("was not the same"), "{printed}");
}

#[test]
fn models_without_modules_do_not_draft() {
    let plain = golden("v2-tiny");
    let options = ["--prompt-tokens", "1", "--batch", "1", "--context", "0", "--decode-tokens", "1", "--repeat", "1"];
    let said = bench_of(&plain, &[&options[..], &["--json"]].concat()).json();
    assert!(lines(&said, "mtp").is_empty() && said["skipped"] == json!([]), "{said}");
    let said = bench_of(&plain, &[&options[..], &["--json", "--mtp", "off"]].concat()).json();
    assert_eq!(lines(&said, "mtp").len(), 1);
    for mode in ["1", "auto", "off,2"] {
        bench_of(&plain, &["--mtp", mode]).refused(2, &["--mtp", "no modules of multi-token prediction"]);
    }
    for mode in ["8", "0", "-1", "on", ","] {
        bench(&["--mtp", mode]).refused(2, &["--mtp", "expected auto, off"]);
    }
    let said = bench(&[&options[..], &["--json", "--mtp", "1"]].concat()).json();
    assert_eq!(lines(&said, "mtp")[0]["ratio_to_off"], json!(null));
}

// ---- prefix cache

#[test]
fn beginnings_are_found_in_memory_and_on_disk() {
    let options = ["--prompt-tokens", "70,78,64,20", "--batch", "1", "--context", "0", "--decode-tokens", "1"];
    let config = read_json(&golden("v3-tiny").join("config.json"));
    let size = |field: &str| config[field].as_u64().unwrap();
    let row = Latent::F32.words(size("kv_lora_rank"), size("qk_rope_head_dim"));
    let page = size("num_hidden_layers") * 64 * row * 4;
    let plan = Bundle::open(tiny_bundle()).unwrap().plan;
    for chunk in ["256", "50"] {
        let more = ["--repeat", "2", "--mtp", "off", "--json", "--prefill-chunk", chunk];
        let said = bench(&[&options[..], &more].concat()).json();
        let found = lines(&said, "prefix_cache");
        let of = |line: &&Value| {
            let number = |field: &str| line[field].as_u64().unwrap();
            (
                number("beginning"),
                line["kept"].as_str().unwrap().to_owned(),
                number("computed_tokens"),
                number("copied_bytes"),
            )
        };
        // On disk are full pages alone; in memory one that is not full is copied.
        let expected = [
            (70, "nowhere", 78, 0),
            (70, "device", 8, page),
            (70, "disk", 14, page),
            (78, "nowhere", 86, 0),
            (78, "device", 8, page),
            (78, "disk", 22, page),
            (64, "nowhere", 72, 0),
            (64, "device", 8, 0),
            (64, "disk", 8, page),
            (20, "nowhere", 28, 0),
            (20, "device", 8, page),
            (20, "disk", 28, 0),
        ];
        let expected =
            expected.map(|(beginning, kept, computed, copied)| (beginning, kept.to_owned(), computed, copied));
        assert_eq!(found.iter().map(of).collect::<Vec<_>>(), expected);
        for line in &found {
            near(at(line, "/prompt_tokens"), at(line, "/beginning") + 8.0, 0.0);
            near(at(line, "/first_token_seconds"), at(line, "/seconds/median"), 1e-9);
            check_times(line, at(line, "/prompt_tokens"));
        }
        // A prompt of which nothing is known is one as in prefill; what is known is not run, but may be moved.
        let bytes: Vec<f64> = found.iter().map(|line| at(line, "/floor/bytes")).collect();
        let prefill = lines(&said, "prefill");
        assert_eq!(prefill[1]["prompt_tokens"], 78);
        near(bytes[0], at(prefill[1], "/floor/bytes"), 1e-9);
        let resumed = moved(&plan, ProgramKind::Forward, (8, 1), 64, false);
        near(bytes[7], resumed, 1e-9);
        near(bytes[8], resumed + 2.0 * page as f64, 1e-9);
        near(bytes[1], moved(&plan, ProgramKind::Forward, (8, 1), 70, false) + 2.0 * page as f64, 1e-9);
    }
}

// ---- what is left out

#[test]
fn bench_leaves_out_what_does_not_fit() {
    let most = read_json(&golden("v3-tiny").join("config.json"))["max_position_embeddings"].as_u64().unwrap();
    let prompts = format!("2,{}", most + 1);
    let context = format!("{},{}", most - 1, most);
    let options = ["--prompt-tokens", &prompts, "--batch", "1,1000", "--context", &context, "--decode-tokens", "1"];
    let said = bench(&[&options[..], &["--repeat", "1", "--json"]].concat()).json();
    let count = |kind: &str| lines(&said, kind).len();
    assert_eq!(["prefill", "decode", "mtp", "prefix_cache"].map(count), [1, 1, 3, 3]);
    let skipped = said["skipped"].as_array().unwrap();
    assert_eq!(skipped.len(), 6 + 3);
    let reason = |index: usize| skipped[index]["reason"].as_str().unwrap();
    assert_eq!(reason(0), format!("{} positions, the model has {most}", most + 1));
    assert!(reason(1).starts_with("at most ") && reason(1).ends_with("sequences run at once"), "{said}");
    assert_eq!(reason(6), format!("{} positions, the model has {most}", most + 10));
    assert_eq!((&skipped[8]["kind"], &skipped[8]["kept"]), (&json!("prefix_cache"), &json!("disk")));
    let long = ["--prompt-tokens", "1", "--batch", "1", "--context", "0", "--repeat", "1", "--decode-tokens"];
    let said = bench(&[&long[..], &[&(most / 4).to_string(), "--json"]].concat()).json();
    assert_eq!(said["skipped"].as_array().unwrap().len(), 3);
    assert_eq!(said["skipped"][1]["mode"], 1);
    assert_eq!(said["skipped"][0]["reason"], format!("{} positions, the model has {most}", 65 + most / 4 * 4 + 14));
    let said = bench(&["--prompt-tokens", &prompts, "--batch", "1", "--context", "0", "--repeat", "1"]).ok();
    for word in [
        "Prefill",
        "Decode",
        "Floor",
        "median of 1",
        "left out: prefill of 1 ×",
        "reached",
        "Prefix cache",
        "left out: prefix",
    ] {
        assert!(said.stdout.contains(word), "{word}: {}", said.stdout);
    }
    assert!(said.stdout.lines().all(|line| line.chars().count() <= 130), "{}", said.stdout);
    for (flag, value) in [("--batch", "0"), ("--repeat", "0"), ("--decode-tokens", "0"), ("--prompt-tokens", "1,x")] {
        bench(&[flag, value]).refused(2, &[flag]);
    }
}

#[test]
fn help_text() {
    let said = moewe!["bench", "--help"].ok();
    assert!(said.stdout.lines().all(|line| line.chars().count() <= 100), "{}", said.stdout);
    insta::assert_snapshot!("help_bench", said.stdout);
    let said = moewe!["bench", "serve", "--help"].ok();
    assert!(said.stdout.lines().all(|line| line.chars().count() <= 100), "{}", said.stdout);
    insta::assert_snapshot!("help_bench_serve", said.stdout);
}
