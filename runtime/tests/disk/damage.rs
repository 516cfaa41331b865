//! Files that are not what their names say.

use std::fs;
use std::path::Path;

use moewe_runtime::engine::disk::{Chain, Disk, DiskOptions};

use crate::{AROUND, file, files, get, options, put, tokens};

/// Puts `contents` where a page stands and asks for the page, which must be a miss, and the file removed.
fn must_be_refused(disk: &Disk, path: &Path, contents: &[u8], what: &str) {
    fs::write(path, contents).unwrap();
    let before = disk.stats();
    assert!(disk.get(&Chain::default(), &tokens(1)).is_none(), "{what}");
    let after = disk.stats();
    assert_eq!((after.damaged, after.misses), (before.damaged + 1, before.misses + 1), "{what}");
    assert!(!path.exists(), "{what}");
    assert_eq!((after.files, after.bytes), (0, 0), "{what}");
    assert!(!disk.contains(&Chain::default(), &tokens(1), false), "{what}");
}

#[test]
fn no_changed_byte_and_no_other_length_is_read() {
    const BYTES: usize = 40;
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), BYTES, 100)).unwrap();
    put(&disk, 1, BYTES);
    disk.flush();
    let path = file(dir.path());
    let good = fs::read(&path).unwrap();
    assert_eq!(good.len(), AROUND + BYTES);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            must_be_refused(&disk, &path, &bad, &format!("bit {bit} of byte {at}"));
        }
        must_be_refused(&disk, &path, &good[..at], &format!("{at} bytes"));
    }
    must_be_refused(&disk, &path, &[&good[..], b"x"].concat(), "one more");
    must_be_refused(&disk, &path, &good.repeat(3), "three times");
    // Still usable, and the good file is good.
    fs::write(&path, &good).unwrap();
    assert!(get(&disk, 1, BYTES));
}

/// Sets bytes and makes the checksum right again.
fn forged(good: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = good[..good.len() - 32].to_vec();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    let checksum = blake3::hash(&file);
    file.extend(checksum.as_bytes());
    file
}

#[test]
fn a_right_checksum_does_not_make_it_the_right_page() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 40, 100)).unwrap();
    put(&disk, 1, 40);
    disk.flush();
    let path = file(dir.path());
    let good = fs::read(&path).unwrap();
    assert_eq!(forged(&good, 0, b"moewepag"), good);
    let bad: [(&str, usize, &[u8]); 10] = [
        ("magic", 0, b"moewepa9"),
        ("version", 8, &[2, 0, 0, 0]),
        ("flag", 12, &[2, 0, 0, 0]),
        ("model", 16, &[8; 32]),
        ("key", 48, &[0; 32]),
        ("key before", 80, &[1; 32]),
        ("first token", 112, &[9, 9, 9, 9]),
        ("last token", 364, &[9, 9, 9, 9]),
        ("too long", 368, &u64::MAX.to_le_bytes()),
        ("too short", 368, &39_u64.to_le_bytes()),
    ];
    for (what, at, bytes) in bad {
        must_be_refused(&disk, &path, &forged(&good, at, bytes), what);
    }
    // The file of another page, and of another model's page.
    put(&disk, 2, 40);
    disk.flush();
    let other = fs::read(file(dir.path())).unwrap();
    fs::remove_file(file(dir.path())).unwrap();
    assert!(!get(&disk, 2, 40));
    must_be_refused(&disk, &path, &other, "another page");
    let elsewhere = tempfile::tempdir().unwrap();
    let another = Disk::open(DiskOptions { model: [9; 32], ..options(elsewhere.path(), 40, 100) }).unwrap();
    put(&another, 1, 40);
    another.flush();
    must_be_refused(&disk, &path, &fs::read(file(elsewhere.path())).unwrap(), "another model");
}

#[test]
fn models_do_not_see_each_others_pages() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 40, 100)).unwrap();
    put(&disk, 1, 40);
    let chain = disk.next(&Chain::default(), &tokens(1));
    disk.put(&chain, &tokens(2), false, vec![1; 40]);
    disk.flush();
    // One that differs late, so that it has the same folder.
    let mut model = [7; 32];
    model[31] = 8;
    for model in [model, [8; 32]] {
        let other = Disk::open(DiskOptions { model, ..options(dir.path(), 40, 100) }).unwrap();
        assert!(!get(&other, 1, 40));
        // Asking with the other's chain does not help.
        assert!(other.get(&chain, &tokens(2)).is_none());
        assert_eq!(other.stats().damaged, 0);
    }
    assert!(get(&disk, 1, 40) && disk.get(&chain, &tokens(2)).is_some());
}

#[test]
fn files_and_folders_may_vanish() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("cache");
    let disk = Disk::open(options(&root, 40, 100)).unwrap();
    for page in 0..10 {
        put(&disk, page, 40);
    }
    disk.flush();
    fs::remove_file(&files(&root)[0]).unwrap();
    assert_eq!((0..10).filter(|&page| get(&disk, page, 40)).count(), 9);
    assert_eq!(disk.stats().files, 9);
    fs::remove_dir_all(&root).unwrap();
    assert_eq!((0..10).filter(|&page| get(&disk, page, 40)).count(), 0);
    assert_eq!((disk.stats().files, disk.stats().bytes), (0, 0));
    (0..10).for_each(|page| put(&disk, page, 40));
    disk.flush();
    assert!((0..10).all(|page| get(&disk, page, 40)));
    let stats = disk.stats();
    assert_eq!((stats.writes, stats.write_errors, stats.damaged), (20, 0, 0));
}

#[test]
fn names_that_are_not_ours_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 2)).unwrap();
    put(&disk, 1, 1000);
    drop(disk);
    let page = file(dir.path());
    let folder = page.parent().unwrap();
    let model = folder.parent().unwrap();
    let name = page.file_name().unwrap().to_str().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = [
        dir.path().join("README"),
        dir.path().join(name),
        dir.path().join("moewe-1-2-3.tmp"),
        dir.path().join("0123456789abcdeg/ab/x.page"),
        model.join(name),
        model.join("notes.txt"),
        model.join("abc").join(name),
        folder.join("notes.page"),
        folder.join(name.to_uppercase()),
        folder.join(format!("{name}~")),
        folder.join(format!("00{}", &name[2..])), // of another folder
        folder.join("é.page"),
        folder.join("x.tmp"),
        elsewhere.path().join("ab").join(name),
    ];
    for path in &foreign {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, vec![1; 5000]).unwrap();
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink(elsewhere.path(), dir.path().join("0123456789abcdef")).unwrap();
        symlink(elsewhere.path().join("ab"), model.join("zz")).unwrap();
    }
    let disk = Disk::open(options(dir.path(), 1000, 2)).unwrap();
    assert_eq!((disk.stats().files, disk.stats().evicted), (1, 0));
    (2..5).for_each(|page| put(&disk, page, 1000));
    disk.flush();
    assert_eq!((disk.stats().files, disk.stats().evicted), (2, 2));
    for path in &foreign {
        assert!(path.exists(), "{}", path.display());
    }
}

#[cfg(unix)]
#[test]
fn links_pipes_and_folders_in_the_place_of_a_page_are_not_read() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 2)).unwrap();
    put(&disk, 1, 1000);
    disk.flush();
    let path = file(dir.path());
    let target = elsewhere.path().join("page");
    fs::rename(&path, &target).unwrap();
    let good = fs::read(&target).unwrap();

    // A link is neither followed nor removed; a page put there replaces it and not what it leads to.
    symlink(&target, &path).unwrap();
    assert!(!get(&disk, 1, 1000));
    assert!(path.is_symlink());
    let disk = Disk::open(options(dir.path(), 1000, 2)).unwrap();
    assert_eq!(disk.stats().files, 0);
    fs::write(&target, "other").unwrap();
    put(&disk, 1, 1000);
    disk.flush();
    assert!(!path.is_symlink() && get(&disk, 1, 1000));
    assert_eq!(fs::read_to_string(&target).unwrap(), "other");
    assert!(fs::read(&path).unwrap() == good);

    fs::remove_file(&path).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    assert!(!get(&disk, 1, 1000));
    fs::remove_file(&path).unwrap();

    fs::create_dir(&path).unwrap();
    assert!(!get(&disk, 1, 1000));

    // A folder that leads elsewhere is not written to.
    let folder = path.parent().unwrap();
    fs::remove_dir_all(folder).unwrap();
    symlink(elsewhere.path(), folder).unwrap();
    let disk = Disk::open(options(dir.path(), 1000, 2)).unwrap();
    put(&disk, 1, 1000);
    disk.flush();
    assert_eq!(disk.stats().write_errors, 1);
    assert_eq!(files(elsewhere.path()), [target]);
}
