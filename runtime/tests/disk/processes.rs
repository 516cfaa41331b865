//! Processes that cannot write, that write at once, and that are killed.
#![cfg(unix)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use moewe_runtime::engine::disk::Disk;

use crate::{files, get, options, put};

/// Bytes of latents of these tests' pages.
const BYTES: usize = 200_000;
/// Pages that they write, more than may stay.
const PAGES: u32 = 60;
const BOUND: u64 = 32;

/// Runs a test that is only for this in a process of its own, through a shell that says something first.
fn process(test: &str, first: &str, dir: &Path) -> Child {
    let shell = format!("{first} exec \"$0\" --exact --ignored --nocapture processes::{test}");
    let mut command = Command::new("sh");
    command.arg("-c").arg(shell).arg(std::env::current_exe().unwrap()).env("DISK_CACHE", dir);
    command.stdout(Stdio::piped()).spawn().unwrap()
}

fn dir() -> PathBuf {
    std::env::var_os("DISK_CACHE").unwrap().into()
}

#[test]
#[ignore = "run by a_full_disk_is_counted_and_nothing_half_written_stays"]
fn write_larger_files_than_possible() {
    let dir = dir();
    let disk = Disk::open(options(&dir, BYTES, 100)).unwrap();
    (0..10).for_each(|page| put(&disk, page, BYTES));
    disk.flush();
    // Tried, one left out, tried, two left out, tried, four left out.
    let stats = disk.stats();
    assert_eq!((stats.writes, stats.write_errors, stats.dropped), (0, 3, 7), "{stats:?}");
    assert_eq!((stats.files, stats.bytes, files(&dir)), (0, 0, vec![]));
    let warning = disk.take_warning().unwrap();
    assert!(warning.contains(dir.to_str().unwrap()) && warning.contains("File too large"), "{warning}");
    assert_eq!(disk.take_warning(), None);
    assert!((0..10).all(|page| !get(&disk, page, BYTES)));
    drop(disk);
    // Smaller ones can be written.
    let disk = Disk::open(options(&dir, 1000, 100)).unwrap();
    put(&disk, 1, 1000);
    disk.flush();
    assert!(get(&disk, 1, 1000));
}

#[test]
fn a_full_disk_is_counted_and_nothing_half_written_stays() {
    let dir = tempfile::tempdir().unwrap();
    // Files may have a hundred blocks; what is beyond is an error instead of a signal.
    let process = process("write_larger_files_than_possible", "ulimit -f 100; trap '' XFSZ;", dir.path());
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(files(dir.path()).len(), 1);
}

/// Numbers that look random, for which pages to use and when to kill.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as u32) % bound
    }
}

/// Reads and writes pages for a while.
fn work(dir: &Path, seconds: f64) {
    let disk = Disk::open(options(dir, BYTES, BOUND)).unwrap();
    println!("\nready");
    let mut random = Random(u64::from(std::process::id()));
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        let page = random.below(PAGES);
        if !get(&disk, page, BYTES) {
            put(&disk, page, BYTES);
        }
    }
    disk.flush();
    let stats = disk.stats();
    assert!(stats.hits > 0 && stats.writes > 0, "{stats:?}");
    assert_eq!((stats.damaged, stats.write_errors), (0, 0), "{stats:?}");
    assert_eq!(disk.take_warning(), None);
}

#[test]
#[ignore = "run by two_processes_share_a_directory"]
fn work_for_a_second() {
    work(&dir(), 1.0);
}

#[test]
fn two_processes_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let children: Vec<_> = (0..2).map(|_| process("work_for_a_second", "", dir.path())).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let found = files(dir.path());
    assert!(found.len() as u64 <= BOUND + 2 * BOUND / 16, "{} files", found.len());
    assert!(found.iter().all(|path| path.extension().is_some_and(|end| end == "page")), "{found:?}");
    let disk = Disk::open(options(dir.path(), BYTES, BOUND)).unwrap();
    assert_eq!((0..PAGES).filter(|&page| get(&disk, page, BYTES)).count() as u64, disk.stats().files);
    assert_eq!(disk.stats().damaged, 0);
}

#[test]
#[ignore = "run by a_killed_process_leaves_whole_pages"]
fn work_for_ever() {
    work(&dir(), f64::INFINITY);
}

#[test]
fn a_killed_process_leaves_whole_pages() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(1);
    let (mut left, mut hits) = (0, 0);
    for round in 0..50 {
        let mut child = process("work_for_ever", "", dir.path());
        // Mostly it has begun to write.
        if round % 5 > 0 {
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap() == "ready"));
        }
        std::thread::sleep(Duration::from_millis(u64::from(random.below(50))));
        child.kill().unwrap();
        child.wait().unwrap();
        left += files(dir.path()).iter().filter(|path| path.extension().is_some_and(|end| end == "tmp")).count();
        let disk = Disk::open(options(dir.path(), BYTES, BOUND)).unwrap();
        let found = files(dir.path());
        assert!(found.iter().all(|path| path.extension().is_some_and(|end| end == "page")), "{found:?}");
        assert!(found.len() as u64 <= BOUND, "{} files", found.len());
        let read = (0..PAGES).filter(|&page| get(&disk, page, BYTES)).count();
        assert_eq!((read, disk.stats().damaged), (found.len(), 0), "round {round}");
        hits += read;
    }
    assert!(left > 0 && hits > 0, "{left} temporary files were left, {hits} pages were read");
}
