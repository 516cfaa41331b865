//! Several caches in one directory.

use std::fs::{self, File};

use moewe_runtime::engine::disk::{Chain, Disk};

use crate::{AROUND, file, files, get, options, put};

#[test]
fn what_another_process_wrote_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (options(dir.path(), 1000, 100), options(dir.path(), 1000, 100));
    let (a, b) = (Disk::open(a).unwrap(), Disk::open(b).unwrap());
    put(&a, 1, 1000);
    a.flush();
    assert!(b.contains(&Chain::default(), &crate::tokens(1), false));
    assert!(get(&b, 1, 1000));
    assert_eq!((b.stats().files, b.stats().bytes), (1, (1000 + AROUND) as u64));
}

#[test]
fn what_another_process_uses_is_not_the_oldest() {
    let dir = tempfile::tempdir().unwrap();
    let a = Disk::open(options(dir.path(), 1000, 3)).unwrap();
    (0..3).for_each(|page| put(&a, page, 1000));
    a.flush();
    let b = Disk::open(options(dir.path(), 1000, 3)).unwrap();
    assert!(get(&b, 0, 1000));
    put(&a, 3, 1000);
    a.flush();
    assert_eq!((0..4).map(|page| get(&a, page, 1000)).collect::<Vec<_>>(), [true, false, true, true]);
}

#[test]
fn the_bound_is_for_all_processes_together() {
    let dir = tempfile::tempdir().unwrap();
    let disks: Vec<_> = (0..3).map(|_| Disk::open(options(dir.path(), 100, 320)).unwrap()).collect();
    for page in 0..1500 {
        let disk = &disks[page as usize % 3];
        put(disk, page, 100);
        if page % 50 == 0 {
            disks.iter().for_each(Disk::flush);
            let found = files(dir.path()).len();
            assert!(found <= 320 + 3 * 20, "{found} files, each process may be wrong by 20");
        }
    }
    disks.iter().for_each(Disk::flush);
    let stats: Vec<_> = disks.iter().map(Disk::stats).collect();
    assert_eq!(stats.iter().map(|stats| stats.writes).sum::<u64>(), 1500, "{stats:?}");
    assert!(stats.iter().all(|stats| stats.write_errors + stats.damaged == 0), "{stats:?}");
    let evicted: u64 = stats.iter().map(|stats| stats.evicted).sum();
    assert_eq!(1500 - evicted, files(dir.path()).len() as u64);
}

#[test]
fn temporary_files_of_the_living_stay() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Disk::open(options(dir.path(), 1000, 3)).unwrap();
    let disk = open();
    put(&disk, 1, 1000);
    disk.flush();
    let page = file(dir.path());
    let temporary = page.with_file_name("moewe-1-2-3.tmp");
    fs::write(&temporary, "half of it").unwrap();
    let writer = File::open(&temporary).unwrap();
    writer.lock().unwrap();
    open();
    assert!(temporary.exists());
    drop(writer);
    open();
    assert_eq!(file(dir.path()), page);
}

#[test]
fn threads_may_share_one() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(options(dir.path(), 5000, 20)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let disk = &disk;
            scope.spawn(move || {
                for i in 0..500_u32 {
                    let page = (i * 7 + thread * 3) % 40;
                    if !get(disk, page, 5000) {
                        put(disk, page, 5000);
                    }
                }
            });
        }
    });
    disk.flush();
    let stats = disk.stats();
    assert_eq!((stats.hits + stats.misses, stats.damaged, stats.write_errors), (2000, 0, 0), "{stats:?}");
    assert!(stats.hits > 0 && stats.files <= 20, "{stats:?}");
    assert_eq!(stats.files, files(dir.path()).len() as u64);
}
