use std::fs;
use std::time::{Duration, Instant};

use pollster::block_on;
use proptest::prelude::*;
use rusqlite::Connection;
use tempfile::TempDir;

use super::*;

mod damage;

fn prices() -> Prices {
    let price = |text: &str| Some(text.parse().unwrap());
    Prices::given(price("0.55"), price("0.14"), price("2.19")).unwrap()
}

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("usage.sqlite");
    (dir, path)
}

fn amount(text: &str) -> Amount {
    text.parse().unwrap()
}

fn report(path: &Path, by: By) -> Report {
    Usage::open(path).unwrap().report(&Filter { by, since: None }).unwrap()
}

/// A file with some requests, closed in order.
fn written(path: &Path, requests: u64) {
    let ledger = Ledger::open(path).unwrap();
    for request in 0..requests {
        let meter = ledger.begin(if request % 2 == 0 { "alice" } else { "bob" }, "demo", &prices());
        block_on(meter.prompt(64, request)).unwrap();
        block_on(meter.tokens(1)).unwrap();
        block_on(meter.finish("stop")).unwrap();
    }
}

/// Waits for something that happens within a second or two.
fn eventually(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < Duration::from_secs(20), "never");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn counts_exactly() {
    let (_dir, path) = place();
    let ledger = Ledger::open(&path).unwrap();
    let meter = ledger.begin("alice", "demo", &prices());
    block_on(async {
        meter.prompt(64, 36).await.unwrap();
        for tokens in [1, 3, 0, 2] {
            meter.tokens(tokens).await.unwrap();
        }
        // 64 × 0.14 + 36 × 0.55 + 6 × 2.19, in millionths
        let expected = amount("0.0000419");
        assert_eq!(ledger.spent("alice"), expected);
        let running = report(&path, By::Request).rows.remove(0);
        assert_eq!((running.request.unwrap().reason.as_str(), running.totals.cost), ("running", expected));
        let cost = meter.finish("length").await.unwrap();
        let tokens = (cost.prompt_hit_tokens, cost.prompt_miss_tokens, cost.completion_tokens);
        assert_eq!((tokens, cost.amount), ((64, 36, 6), expected));
        assert_eq!(meter.tokens(1).await, Err(LedgerError::Ended));
        assert_eq!(meter.finish("stop").await, Err(LedgerError::Ended));
        let free = ledger.begin("bob", "other", &Prices::default());
        free.tokens(5).await.unwrap();
        assert_eq!(free.finish("stop").await.unwrap().amount, Amount::ZERO);
    });
    drop(meter);
    drop(ledger);
    let by_key = report(&path, By::Key);
    let found: Vec<_> = by_key.rows.iter().map(|row| (row.name.as_str(), row.totals.completion_tokens)).collect();
    assert_eq!(found, [("alice", 6), ("bob", 5)]);
    assert_eq!((by_key.total.requests, by_key.total.running), (2, 0));
    assert_eq!(by_key.total.cost, amount("0.0000419"));
    for by in [By::Model, By::Day, By::Request] {
        assert_eq!(report(&path, by).total, by_key.total, "{by:?}");
    }
    let day = report(&path, By::Day).rows.remove(0).name;
    assert!(day.parse::<jiff::civil::Date>().is_ok(), "{day}");
    let requests = report(&path, By::Request).rows;
    let first = requests[0].request.clone().unwrap();
    assert_eq!((first.key.as_str(), first.model.as_str(), first.reason.as_str()), ("alice", "demo", "length"));
    assert!(first.begun <= first.ended.unwrap() && first.begun.starts_with(&day) && first.begun.ends_with('Z'));
    assert_eq!(Ledger::open(&path).unwrap().spent("alice"), amount("0.0000419"));
}

#[test]
fn reports_from_a_time_on() {
    let (_dir, path) = place();
    written(&path, 3);
    let from = |since| Usage::open(&path).unwrap().report(&Filter { by: By::Key, since: Some(since) }).unwrap().total;
    assert_eq!((from(now() - 60_000).requests, from(now() + 1).requests), (3, 0));
}

#[test]
fn a_request_that_is_dropped_was_cancelled() {
    let (_dir, path) = place();
    let ledger = Ledger::open(&path).unwrap();
    let meter = ledger.begin("alice", "demo", &prices());
    block_on(meter.tokens(2)).unwrap();
    drop(meter);
    let never_begun = ledger.begin("alice", "demo", &prices());
    let left = ledger.begin("alice", "demo", &prices());
    drop(never_begun);
    drop(ledger);
    let rows = report(&path, By::Request).rows;
    let reasons: Vec<_> = rows.iter().map(|row| row.request.as_ref().unwrap().reason.as_str()).collect();
    assert_eq!(reasons.iter().filter(|reason| **reason == "cancelled").count(), 2, "{reasons:?}");
    assert_eq!(reasons.iter().filter(|reason| **reason == "stopped").count(), 1, "{reasons:?}");
    assert_eq!(block_on(left.tokens(1)), Err(LedgerError::Stopped));
    assert_eq!(block_on(left.finish("stop")), Err(LedgerError::Stopped));
}

#[test]
fn ids_sort_by_time_and_differ() {
    let (_dir, path) = place();
    let ledger = Ledger::open(&path).unwrap();
    let ids: Vec<String> = (0..200).map(|_| ledger.begin("a", "m", &prices()).id().to_owned()).collect();
    assert!(ids.is_sorted_by(|before, after| before < after), "{ids:?}");
}

#[test]
fn many_streams_at_once_add_up() {
    let (_dir, path) = place();
    let ledger = Ledger::open(&path).unwrap();
    std::thread::scope(|scope| {
        for stream in 0..32u64 {
            let ledger = &ledger;
            scope.spawn(move || {
                let meter = ledger.begin(&format!("key-{}", stream % 3), "demo", &prices());
                block_on(async {
                    meter.prompt(stream, 1).await.unwrap();
                    for _ in 0..20 {
                        meter.tokens(1 + stream % 2).await.unwrap();
                    }
                    let cost = meter.finish("stop").await.unwrap();
                    assert_eq!(cost.completion_tokens, 20 * (1 + stream % 2));
                    assert_eq!(cost.amount, prices().cost(stream, 1, cost.completion_tokens));
                });
            });
        }
    });
    let found = report(&path, By::Key);
    assert_eq!((found.total.requests, found.total.completion_tokens), (32, 960));
    assert_eq!(found.total.cost, prices().cost((0..32).sum(), 32, 960));
    for row in &found.rows {
        assert_eq!(ledger.spent(&row.name), row.totals.cost);
    }
}

#[test]
fn a_budget_ends() {
    let (dir, path) = place();
    let file = dir.path().join("keys");
    fs::write(
        &file,
        "alice sk-alice-0123456789 budget=0.00001\nbob sk-bob-0123456789abc\nnil sk-nil-0123456789abc budget=0",
    )
    .unwrap();
    let keys = Keys::load(&file).unwrap();
    let [alice, bob, nil] =
        ["sk-alice-0123456789", "sk-bob-0123456789abc", "sk-nil-0123456789abc"].map(|key| keys.check(key).unwrap());
    let ledger = Ledger::open(&path).unwrap();
    assert_eq!(ledger.check_budget(alice), Ok(()));
    assert!(ledger.check_budget(nil).is_err());
    let meter = ledger.begin(alice.name(), "demo", &prices());
    block_on(meter.tokens(4)).unwrap();
    assert_eq!(ledger.check_budget(alice), Ok(()), "0.00000876 is less than 0.00001");
    // What runs goes on.
    block_on(meter.tokens(1)).unwrap();
    let spent = ledger.check_budget(alice).unwrap_err();
    assert_eq!(spent.to_string(), "the key alice has spent 0.00001095 of its budget of 0.00001");
    block_on(meter.tokens(1)).unwrap();
    block_on(ledger.begin(bob.name(), "demo", &prices()).tokens(1000)).unwrap();
    assert_eq!(ledger.check_budget(bob), Ok(()));
    drop(ledger);
    assert!(Ledger::open(&path).unwrap().check_budget(alice).is_err());
}

#[test]
fn two_servers_share_a_file() {
    let (_dir, path) = place();
    let one = Ledger::open(&path).unwrap();
    let meter = one.begin("alice", "demo", &prices());
    block_on(meter.tokens(1)).unwrap();
    let two = Ledger::open(&path).unwrap();
    assert_eq!(two.spent("alice"), amount("0.00000219"));
    assert_eq!(report(&path, By::Key).total.running, 1, "the other server lives");
    block_on(meter.tokens(1)).unwrap();
    eventually(|| two.spent("alice") == amount("0.00000438"));
    let other = two.begin("alice", "demo", &prices());
    block_on(other.tokens(1)).unwrap();
    eventually(|| one.spent("alice") == amount("0.00000657"));
    assert_eq!(block_on(meter.finish("stop")).unwrap().completion_tokens, 2);
    drop(one);
    assert_eq!(report(&path, By::Key).total.running, 1);
}

#[test]
fn sums_beyond_64_bits() {
    let (_dir, path) = place();
    let dear = Prices::given(None, None, Some("1000000".parse().unwrap())).unwrap();
    let ledger = Ledger::open(&path).unwrap();
    for _ in 0..5 {
        block_on(ledger.begin("alice", "demo", &dear).tokens(9_000_000)).unwrap();
    }
    assert_eq!(ledger.spent("alice"), amount("45000000"));
    let meter = ledger.begin("alice", "demo", &dear);
    block_on(meter.tokens(9_000_000)).unwrap();
    assert_eq!(block_on(meter.tokens(300_000)), Err(LedgerError::TooLarge));
    assert_eq!(block_on(meter.tokens(u64::MAX)), Err(LedgerError::TooLarge));
    assert_eq!(block_on(meter.finish("stop")).unwrap().amount, amount("9000000"));
    drop(ledger);
    assert_eq!(report(&path, By::Key).total.cost, amount("54000000"));
    assert_eq!(Ledger::open(&path).unwrap().spent("alice"), amount("54000000"));
}

#[test]
fn a_full_disk_fails_requests_and_is_got_over() {
    let (_dir, path) = place();
    drop(Ledger::open(&path).unwrap());
    let store = Store::open(&path).unwrap();
    let pages: i64 = store.connection.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
    store.connection.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
    let ledger = Ledger::over(store).unwrap();
    let (mut counted, mut full) = (0, Vec::new());
    for i in 0.. {
        if full.len() == 2 {
            break;
        }
        // Rows that soon need another page.
        let meter = ledger.begin("alice", &format!("{i:0500}"), &prices());
        match block_on(meter.tokens(3)) {
            Ok(()) => {
                counted += 3;
                block_on(meter.finish("stop")).unwrap();
            }
            Err(error) => {
                assert!(matches!(error, LedgerError::Full { .. }), "{error:?}");
                assert!(error.to_string().contains("nothing is served that is not on record"), "{error}");
                full.push(meter);
            }
        }
    }
    assert!(counted > 6, "{counted}");
    assert_eq!(report(&path, By::Key).total.completion_tokens, counted);
    assert_eq!(ledger.spent("alice"), prices().cost(0, 0, counted));
    assert!(block_on(full[0].finish("error")).is_err());
    drop(full);
    // Room again: what had ended meanwhile is written, too.
    Connection::open(&path).unwrap().execute("DELETE FROM requests", []).unwrap();
    let meter = ledger.begin("alice", "small", &prices());
    eventually(|| block_on(meter.tokens(1)).is_ok());
    block_on(meter.finish("stop")).unwrap();
    drop(ledger);
    let rows = report(&path, By::Request).rows;
    let mut reasons: Vec<_> = rows.iter().map(|row| row.request.as_ref().unwrap().reason.as_str()).collect();
    reasons.sort_unstable();
    assert_eq!(reasons, ["cancelled", "error", "stop"]);
    let spent = Ledger::open(&path).unwrap().spent("alice");
    assert_eq!(spent, prices().cost(0, 0, counted + 1), "with what was deleted");
}

#[cfg(unix)]
#[test]
fn its_owner_alone_reads_it() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, path) = place();
    let ledger = Ledger::open(&path).unwrap();
    block_on(ledger.begin("alice", "demo", &prices()).tokens(1)).unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        names.push(entry.file_name().into_string().unwrap());
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{names:?}");
    }
    names.sort();
    assert_eq!(names, ["usage.sqlite", "usage.sqlite-shm", "usage.sqlite-wal", "usage.sqlite.server-1"]);
    drop(ledger);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    // A link to the file is the same file, with the same locks.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let ledger = Ledger::open(&path).unwrap();
    let meter = ledger.begin("alice", "demo", &prices());
    block_on(meter.tokens(1)).unwrap();
    drop(Ledger::open(&link).unwrap());
    assert_eq!(block_on(meter.finish("stop")).unwrap().completion_tokens, 1);
    assert_eq!(report(&link, By::Request).rows.last().unwrap().request.as_ref().unwrap().reason, "stop");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever requests of whatever keys do, rows, sums and what keys have spent agree to the picounit.
    #[test]
    fn rows_and_sums_agree(requests in proptest::collection::vec((0..3u8, 0..5000u64, 0..5000u64, proptest::collection::vec(0..9u64, 0..6)), 0..12)) {
        let (_dir, path) = place();
        let ledger = Ledger::open(&path).unwrap();
        let mut expected = std::collections::BTreeMap::<String, Amount>::new();
        for (key, hit, miss, pieces) in &requests {
            let key = format!("key-{key}");
            let meter = ledger.begin(&key, "demo", &prices());
            block_on(meter.prompt(*hit, *miss)).unwrap();
            for tokens in pieces {
                block_on(meter.tokens(*tokens)).unwrap();
            }
            let cost = block_on(meter.finish("stop")).unwrap();
            prop_assert_eq!(cost.amount, prices().cost(*hit, *miss, pieces.iter().sum()));
            *expected.entry(key).or_default() += cost.amount;
        }
        let rows = ledger.report(&Filter::default()).unwrap().rows;
        let found: std::collections::BTreeMap<_, _> = rows.into_iter().map(|row| (row.name, row.totals.cost)).collect();
        for (key, amount) in &expected {
            prop_assert_eq!(ledger.spent(key), *amount);
        }
        prop_assert_eq!(found, expected);
    }
}
