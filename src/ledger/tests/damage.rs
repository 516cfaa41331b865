//! Files that are damaged, of later versions or not ours.

use std::fs;

use rusqlite::Connection;

use super::*;

/// Opens a file both ways and expects the same error, which tells what it should, and the file as it was.
fn refused(path: &Path, tells: &str) -> LedgerError {
    let before = fs::read(path).ok();
    let error = Ledger::open(path).unwrap_err();
    assert!(error.to_string().contains(tells), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    match Usage::open(path).and_then(|usage| usage.report(&Filter::default())) {
        Err(read) => assert_eq!(std::mem::discriminant(&read), std::mem::discriminant(&error), "{read}"),
        Ok(_) => assert!(matches!(error, LedgerError::Damaged { .. }), "only a server checks the whole file"),
    }
    assert_eq!(fs::read(path).ok(), before);
    error
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let (dir, path) = place();
    for garbage in [b"abc".to_vec(), b"SQLite format 3\0".to_vec(), vec![0x5a; 5000], vec![0; 8192]] {
        fs::write(&path, garbage).unwrap();
        refused(&path, "is not a usage file of moewe");
    }
    fs::remove_file(&path).unwrap();
    let other = Connection::open(&path).unwrap();
    other.execute_batch("CREATE TABLE recipes (name TEXT); INSERT INTO recipes VALUES ('soup')").unwrap();
    drop(other);
    refused(&path, "an SQLite database of something else");
    refused(dir.path(), "no regular file");
    assert!(matches!(Ledger::open(&dir.path().join("none/usage")), Err(LedgerError::Open { .. })));
    assert!(matches!(Usage::open(&dir.path().join("none")), Err(LedgerError::Missing { .. })));
    assert!(!dir.path().join("none").exists());
    let log = dir.path().join("gone-wal");
    fs::write(&log, "what was last committed").unwrap();
    assert!(matches!(Ledger::open(&dir.path().join("gone")), Err(LedgerError::Damaged { .. })));
    assert!(log.exists());
}

#[test]
fn an_empty_file_is_a_new_one() {
    let (_dir, path) = place();
    fs::write(&path, "").unwrap();
    assert_eq!(report(&path, By::Key).rows, []);
    written(&path, 1);
    assert_eq!(report(&path, By::Key).total.requests, 1);
}

#[test]
fn a_later_version_is_told() {
    let (_dir, path) = place();
    written(&path, 1);
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 2).unwrap();
    assert!(matches!(refused(&path, "has version 2, this moewe knows version 1"), LedgerError::Newer { .. }));
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 0).unwrap();
    assert!(matches!(refused(&path, "no version 0"), LedgerError::Damaged { .. }));
}

#[test]
fn a_file_without_its_tables_is_damaged() {
    for change in ["DROP TABLE spent", "ALTER TABLE requests DROP COLUMN cost", "DROP TABLE servers"] {
        let (_dir, path) = place();
        written(&path, 1);
        Connection::open(&path).unwrap().execute_batch(change).unwrap();
        assert!(matches!(refused(&path, "is damaged"), LedgerError::Damaged { .. }), "{change}");
    }
    let (_dir, path) = place();
    written(&path, 1);
    Connection::open(&path).unwrap().execute("UPDATE requests SET cost = -1", []).unwrap();
    let read = Usage::open(&path).unwrap().report(&Filter::default());
    assert!(matches!(read, Err(LedgerError::Damaged { .. })), "{read:?}");
}

#[test]
fn a_damaged_file_is_an_error_or_sound() {
    let (_dir, path) = place();
    written(&path, 40);
    let sound = fs::read(&path).unwrap();
    assert!(sound.len() > 20_000);
    let (mut errors, total) = (0, report(&path, By::Key).total);
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..120 {
        let mut bytes = sound.clone();
        match round % 3 {
            0 => bytes.truncate(random(sound.len())),
            1 => bytes[random(sound.len() / 4096) * 4096..][..4096].fill(random(256) as u8),
            _ => (0..40).for_each(|_| bytes[random(sound.len())] = random(256) as u8),
        }
        fs::write(&path, &bytes).unwrap();
        let read = Usage::open(&path).and_then(|usage| usage.report(&Filter { by: By::Request, since: None }));
        if let Err(error) = Ledger::open(&path) {
            errors += 1;
            let told =
                matches!(error, LedgerError::Damaged { .. } | LedgerError::Foreign { .. } | LedgerError::Newer { .. });
            assert!(told, "{error:?}");
            assert!(fs::read(&path).unwrap() == bytes, "round {round}: {error} changed the file");
        } else if let Ok(read) = read {
            assert!(read.total.requests <= total.requests);
        }
    }
    assert!(errors > 60, "{errors}");
}
