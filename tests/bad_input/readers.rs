//! Readers that go away, and Ctrl-C.

use super::*;

#[test]
fn nobody_reads() {
    for call in [
        moewe!["run", demo(), "Once", "-n", "40"],
        moewe!["run", tiny_bundle(), "--tokens", "1", "--json"],
        moewe!["inspect", golden("v3-tiny")],
        moewe!["explain", tiny_bundle()],
        moewe!["explain", tiny_bundle(), "--json"],
        moewe!["run", "--help"],
        moewe!["doctor", "--device", "list"],
    ] {
        let name = format!("{call:?}");
        let said = call.through("{ \"$@\"; echo \"code $?\" >&2; } | head -c 1").run();
        assert_eq!((said.stderr.as_str(), said.stdout.len()), ("code 0\n", 1), "{name}: {said:?}");
    }
    // Messages that nobody reads are no reason to fail in another way.
    let said = moewe!["run", "nowhere"].through("{ \"$@\" 2>/dev/full; echo $?; }").run();
    assert_eq!(said.stdout, "2\n", "{said:?}");
}

/// Sends Ctrl-C; the child must end within two seconds (in which a busy machine may do little) with exit code 130.
fn interrupted(child: std::process::Child) -> cli::Said {
    let begun = Instant::now();
    cli::interrupt(&child);
    let said = cli::finish(child);
    assert_eq!(said.code, Some(130), "{said:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(said.stderr, "");
    said
}

#[test]
fn interrupt_while_generating() {
    use std::io::Read;
    moewe!["run", demo(), "Once", "-n", "1"].ok(); // so that it is compiled
    let call = moewe!["run", demo(), "Once upon a time", "-n", "100000", "--ignore-eos"];
    let mut child = call.spawn();
    let mut first = [0; 20];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap(); // it has begun to write
    let said = interrupted(child);
    assert!(said.stdout.ends_with('\n'), "{said:?}");
}

#[test]
fn interrupt_while_waiting_for_a_prompt() {
    for call in [moewe!["run", demo()], moewe!["chat", demo()]] {
        let mut child = call.spawn();
        let stdin = child.stdin.take(); // stays open
        std::thread::sleep(Duration::from_millis(1500));
        let said = interrupted(child);
        assert_eq!(said.stdout, "");
        drop(stdin);
    }
}

#[test]
fn interrupt_while_writing() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = temp.path().join("checkpoint");
    let big = "layers=8,experts=64,num_nextn_predict_layers=0";
    let child = moewe!["synth", "--like", "v2-lite", "--scale", big, "-o", &checkpoint].spawn();
    std::thread::sleep(Duration::from_millis(400));
    interrupted(child);
    assert_eq!(listing(temp.path()), []);

    let small = "layers=2,experts=8,hidden=1024,vocab=8192";
    moewe!["synth", "--like", "v2-lite", "--scale", small, "--dtype", "bf16", "-o", &checkpoint].ok();
    let out = temp.path().join("out");
    let before = listing(temp.path());
    let child = moewe!["compile", &checkpoint, "-o", &out, "--weights", "f32"].spawn();
    let begun = Instant::now();
    while listing(temp.path()) == before && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(2)); // until it has begun to write
    }
    interrupted(child);
    assert_eq!(before, listing(temp.path()));
}
