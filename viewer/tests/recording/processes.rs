//! Full disks and killed processes.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use moewe_viewer::recording::{Error, Recorder};
use moewe_viewer::source::Event;
use moewe_viewer::synthetic::Shape;

use crate::tools::{comparable, read, tiny};

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_that_names_the_file() {
    let error = Recorder::create(Path::new("/dev/full"), &tiny().subject()).map(|_| ()).unwrap_err();
    assert!(matches!(&error, Error::Write { .. }) && error.to_string().contains("/dev/full"), "{error}");
}

/// Runs a test that is only for this in a process of its own, through a shell that says something first.
fn process(test: &str, first: &str, path: &Path) -> std::process::Child {
    let shell = format!("{first} exec \"$0\" --exact --ignored --nocapture {test}");
    let mut command = std::process::Command::new("sh");
    command.arg("-c").arg(shell).arg(std::env::current_exe().unwrap()).env("RECORDING", path);
    command.stdout(std::process::Stdio::piped()).spawn().unwrap()
}

#[test]
#[ignore = "run by a_disk_that_gets_full_leaves_what_was_there"]
fn write_until_the_disk_is_full() {
    let path = PathBuf::from(std::env::var_os("RECORDING").unwrap());
    let shape = Shape { texts: vec![("long".into(), 100_000)], ..tiny() };
    let mut recorder = Recorder::create(&path, &shape.subject()).unwrap();
    let failed = shape.events().find_map(|event| recorder.push(&event).err());
    let error = failed.unwrap_or_else(|| recorder.finish().unwrap_err());
    assert!(matches!(&error, Error::Write { path: named, .. } if *named == path), "{error}");
}

#[test]
fn a_disk_that_gets_full_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    // Files may have some hundred blocks; what is beyond is an error instead of a signal.
    let process = process("processes::write_until_the_disk_is_full", "ulimit -f 300; trap '' XFSZ;", &path);
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let events = read(&path);
    let shape = Shape { texts: vec![("long".into(), 100_000)], ..tiny() };
    assert!(events.len() > 256, "{} events", events.len());
    let expected: Vec<Event> = shape.events().take(events.len()).collect();
    assert!(comparable(&expected) == comparable(&events));
}

#[test]
#[ignore = "run by a_killed_process_leaves_what_was_written"]
fn write_and_wait() {
    let path = PathBuf::from(std::env::var_os("RECORDING").unwrap());
    let mut recorder = Recorder::create(&path, &tiny().subject()).unwrap();
    tiny().events().take(4).for_each(|event| recorder.push(&event).unwrap());
    println!("ready");
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_mins(1));
}

#[test]
fn a_killed_process_leaves_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    let mut child = process("processes::write_and_wait", "", &path);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("ready")));
    std::thread::sleep(Duration::from_millis(2500)); // it is to be in the file after a second
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(read(&path), tiny().events().take(4).collect::<Vec<_>>());
}
