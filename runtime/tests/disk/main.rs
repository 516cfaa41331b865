//! The disk tier of the prefix cache: what is put is read again or missed, never anything else.

mod damage;
mod processes;
mod sharing;

use std::fs;
use std::path::{Path, PathBuf};

use moewe_runtime::Error;
use moewe_runtime::engine::disk::{Chain, Disk, DiskOptions, DiskPage, DiskStats};

/// Bytes around the latents in a file: header and checksum.
const AROUND: usize = 376 + 32;

fn options(dir: &Path, page_bytes: usize, pages: u64) -> DiskOptions {
    DiskOptions { dir: dir.into(), max_bytes: pages * (page_bytes + AROUND) as u64, model: [7; 32], page_bytes }
}

/// The tokens of a page that is told from others by a number.
fn tokens(page: u32) -> [u32; 64] {
    std::array::from_fn(|i| page * 1000 + i as u32)
}

/// Its latents, which no other page has.
fn latents(page: u32, bytes: usize) -> Vec<u8> {
    let mut latents = vec![0; bytes];
    blake3::Hasher::new().update(&page.to_le_bytes()).finalize_xof().fill(&mut latents);
    latents
}

/// Puts the first page of a text.
fn put(disk: &Disk, page: u32, page_bytes: usize) {
    disk.put(&Chain::default(), &tokens(page), false, latents(page, page_bytes));
}

/// Reads the first page of a text and checks it. Says whether it was there.
fn get(disk: &Disk, page: u32, page_bytes: usize) -> bool {
    let Some(found) = disk.get(&Chain::default(), &tokens(page)) else { return false };
    assert!(found.bytes == latents(page, page_bytes), "page {page} is another");
    true
}

/// All files below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// The one file in a directory.
fn file(dir: &Path) -> PathBuf {
    let files = files(dir);
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

fn chain(disk: &Disk, pages: &[u32]) -> Chain {
    pages.iter().fold(Chain::default(), |chain, &page| disk.next(&chain, &tokens(page)))
}

#[test]
fn what_is_put_is_read_again_by_the_same_text_only() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 100)).unwrap();
    for (number, text) in [&[1][..], &[1, 2], &[2, 2], &[1, 2, 3]].into_iter().enumerate() {
        let (last, before) = text.split_last().unwrap();
        assert!(!disk.contains(&chain(&disk, before), &tokens(*last), false));
        disk.put(&chain(&disk, before), &tokens(*last), number == 2, latents(number as u32, 1000));
        assert!(disk.contains(&chain(&disk, before), &tokens(*last), false));
    }
    disk.flush();
    let check = |disk: &Disk| {
        let page = |number, drafted| Some(DiskPage { bytes: latents(number, 1000), drafted });
        assert_eq!(disk.get(&Chain::default(), &tokens(1)), page(0, false));
        assert_eq!(disk.get(&chain(disk, &[1]), &tokens(2)), page(1, false));
        assert_eq!(disk.get(&chain(disk, &[2]), &tokens(2)), page(2, true));
        assert_eq!(disk.get(&chain(disk, &[1, 2]), &tokens(3)), page(3, false));
        assert_eq!(disk.get(&Chain::default(), &tokens(2)), None);
        assert_eq!(disk.get(&chain(disk, &[2, 1]), &tokens(3)), None);
        assert!(disk.contains(&chain(disk, &[2]), &tokens(2), true));
        assert!(!disk.contains(&chain(disk, &[1]), &tokens(2), true));
    };
    check(&disk);
    let sizes = DiskStats { bytes: 4 * (1000 + AROUND) as u64, files: 4, ..DiskStats::default() };
    assert_eq!(disk.stats(), DiskStats { hits: 4, misses: 2, writes: 4, ..sizes });
    assert_eq!(disk.take_warning(), None);
    drop(disk);
    let disk = Disk::open(options(dir.path(), 1000, 100)).unwrap();
    assert_eq!(disk.stats(), sizes);
    check(&disk);
}

#[test]
fn dropping_writes_what_waits() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 100_000, 100)).unwrap();
    (0..50).for_each(|page| put(&disk, page, 100_000));
    drop(disk);
    assert_eq!(files(dir.path()).len(), 50);
}

#[test]
fn a_page_is_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let first = Disk::open(options(dir.path(), 1000, 100)).unwrap();
    let second = Disk::open(options(dir.path(), 1000, 100)).unwrap();
    (0..5).for_each(|_| put(&first, 1, 1000));
    first.flush();
    (0..5).for_each(|_| put(&first, 1, 1000));
    first.flush();
    // The second does not know of the file before it looks.
    put(&second, 1, 1000);
    second.flush();
    assert_eq!((first.stats().writes, second.stats().writes), (1, 0));
    assert_eq!((first.stats().files, second.stats().files), (1, 1));
}

#[test]
fn drafted_pages_replace_others_and_are_not_replaced() {
    for reopen in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let open = || Disk::open(options(dir.path(), 10, 100)).unwrap();
        let mut disk = open();
        let mut step = |drafted, byte: u8| {
            disk.put(&Chain::default(), &tokens(1), drafted, vec![byte; 10]);
            disk.flush();
            if reopen {
                disk = open();
            }
            let page = disk.get(&Chain::default(), &tokens(1)).unwrap();
            (page.drafted, page.bytes[0])
        };
        assert_eq!(step(false, 1), (false, 1));
        assert_eq!(step(false, 2), (false, 1));
        assert_eq!(step(true, 3), (true, 3));
        assert_eq!(step(true, 4), (true, 3));
        assert_eq!(step(false, 5), (true, 3));
        file(dir.path());
        // Both waiting at once.
        disk.put(&Chain::default(), &tokens(2), false, vec![1; 10]);
        disk.put(&Chain::default(), &tokens(2), true, vec![2; 10]);
        disk.put(&Chain::default(), &tokens(2), false, vec![3; 10]);
        disk.flush();
        assert_eq!(disk.get(&Chain::default(), &tokens(2)), Some(DiskPage { bytes: vec![2; 10], drafted: true }));
    }
}

#[test]
fn the_files_used_least_recently_make_room() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 4)).unwrap();
    (0..4).for_each(|page| put(&disk, page, 1000));
    disk.flush();
    assert!(get(&disk, 0, 1000) && get(&disk, 2, 1000));
    (4..6).for_each(|page| put(&disk, page, 1000));
    disk.flush();
    assert_eq!((0..6).map(|page| get(&disk, page, 1000)).collect::<Vec<_>>(), [true, false, true, false, true, true]);
    let stats = disk.stats();
    assert_eq!((stats.evicted, stats.files, stats.bytes), (2, 4, 4 * (1000 + AROUND) as u64));
    assert_eq!(files(dir.path()).len(), 4);
    // The order outlives the process, and a smaller bound holds at once.
    assert!(get(&disk, 4, 1000) && get(&disk, 2, 1000));
    drop(disk);
    let disk = Disk::open(options(dir.path(), 1000, 2)).unwrap();
    assert_eq!((disk.stats().evicted, disk.stats().files, files(dir.path()).len()), (2, 2, 2));
    assert_eq!((0..6).map(|page| get(&disk, page, 1000)).collect::<Vec<_>>(), [false, false, true, false, true, false]);
}

#[test]
fn the_bound_is_for_all_models_together() {
    let dir = tempfile::tempdir().unwrap();
    let other = DiskOptions { model: [8; 32], ..options(dir.path(), 500, 10) };
    let disk = Disk::open(other).unwrap();
    (0..8).for_each(|page| put(&disk, page, 500));
    drop(disk);
    let disk = Disk::open(options(dir.path(), 1000, 4)).unwrap();
    (0..4).for_each(|page| put(&disk, page, 1000));
    disk.flush();
    let stats = disk.stats();
    assert_eq!((stats.files, stats.evicted), (4, 8));
    assert!((0..4).all(|page| get(&disk, page, 1000)));
}

#[test]
fn a_time_in_the_future_does_not_keep_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 3)).unwrap();
    put(&disk, 0, 1000);
    drop(disk);
    let written = fs::File::options().write(true).open(file(dir.path())).unwrap();
    written.set_modified(std::time::SystemTime::now() + std::time::Duration::from_hours(10_000)).unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 3)).unwrap();
    (1..4).for_each(|page| put(&disk, page, 1000));
    disk.flush();
    assert_eq!((0..4).map(|page| get(&disk, page, 1000)).collect::<Vec<_>>(), [false, true, true, true]);
}

#[test]
fn directories_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let occupied = dir.path().join("file");
    fs::write(&occupied, "").unwrap();
    for path in [occupied.clone(), occupied.join("below"), "/proc/moewe".into()] {
        let error = Disk::open(options(&path, 1000, 3)).unwrap_err();
        assert!(matches!(&error, Error::CacheDir { path: named, .. } if *named == path), "{error}");
        assert!(
            error.to_string().starts_with(&format!("{} cannot hold the prefix cache: ", path.display())),
            "{error}"
        );
    }
    let error = Disk::open(DiskOptions { max_bytes: 1407, ..options(dir.path(), 1000, 1) }).unwrap_err();
    assert!(matches!(error, Error::CacheTooSmall { max_bytes: 1407, page: 1408 }), "{error}");
    Disk::open(DiskOptions { max_bytes: 1408, ..options(dir.path(), 1000, 1) }).unwrap();
}

#[test]
fn a_page_of_another_length_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 3)).unwrap();
    disk.put(&Chain::default(), &tokens(1), false, vec![0; 999]);
    disk.flush();
    assert_eq!(disk.stats(), DiskStats { write_errors: 1, ..DiskStats::default() });
    assert_eq!(disk.take_warning().unwrap(), "a page has 999 bytes, 1000 expected");
    assert_eq!(disk.take_warning(), None);
}
