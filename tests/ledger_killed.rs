//! The usage file while its servers are killed, and on a disk that is full: no token is handed out that is not on record,
//! and no more than one piece a stream is on record that was not handed out.
//!
//! This program runs itself as the server: with `MOEWE_LEDGER_SERVER` set, `server` meters and hands out until it is killed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use moewe::ledger::{Amount, By, Filter, Ledger, LedgerError, Prices, Row, Usage};

const ROUNDS: u32 = 60;
const STREAMS: usize = 8;

fn prices() -> Prices {
    let price = |text: &str| Some(text.parse().unwrap());
    Prices::given(price("0.55"), price("0.14"), price("2.19")).unwrap()
}

/// Tokens of the i-th piece of a stream.
fn piece(i: u64) -> u64 {
    1 + i % 4
}

/// One write to the pipe, which the reader has even when the writer is killed behind it.
fn say(line: &str) {
    io::stdout().lock().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Not a test but the server of the others, unless it was called for that.
#[test]
fn server() {
    let Some(path) = std::env::var_os("MOEWE_LEDGER_SERVER") else { return };
    let ledger = Ledger::open(Path::new(&path)).unwrap();
    say("\n+ready");
    std::thread::scope(|scope| {
        for stream in 0..STREAMS {
            let ledger = &ledger;
            scope.spawn(move || {
                for request in 0.. {
                    if let Err(error) = pollster::block_on(serve(ledger, stream as u64 + request)) {
                        let full = matches!(error, LedgerError::Full { .. });
                        say(&format!("+failed {full} {error}"));
                        return;
                    }
                }
            });
        }
    });
}

async fn serve(ledger: &Ledger, number: u64) -> Result<(), LedgerError> {
    let meter = ledger.begin(&format!("key-{}", number % 3), "demo", &prices());
    meter.prompt(number % 5, 7).await?;
    for i in 0..number * 7 % 40 {
        meter.tokens(piece(i)).await?;
        say(&format!("+out {} {}", meter.id(), piece(i)));
    }
    let cost = meter.finish("stop").await?;
    say(&format!("+done {} {} {}", meter.id(), cost.completion_tokens, cost.amount));
    Ok(())
}

/// A server that runs.
struct Server {
    child: Child,
    ready: Receiver<()>,
    reader: Option<JoinHandle<Said>>,
}

/// What a server said until it was killed.
#[derive(Default)]
struct Said {
    ready: bool,
    /// Tokens that were handed out, by request, and how many pieces that were.
    out: BTreeMap<String, (u64, u64)>,
    /// Requests that were told done, with their tokens and cost.
    done: BTreeMap<String, (u64, Amount)>,
    failed: Vec<String>,
}

impl Server {
    fn start(path: &Path, through: Option<&str>) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut command = match through {
            None => Command::new(program),
            Some(script) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", script, "sh"]).arg(program);
                shell
            }
        };
        command.args(["--exact", "server", "--nocapture", "--test-threads=1"]).env("MOEWE_LEDGER_SERVER", path);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let output = child.stdout.take().unwrap();
        let (tell, ready) = mpsc::channel();
        Self { child, ready, reader: Some(std::thread::spawn(move || listen(output, &tell))) }
    }

    /// Waits until it serves.
    fn ready(self) -> Self {
        self.ready.recv().unwrap();
        self
    }

    fn kill(mut self) -> Said {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.reader.take().unwrap().join().unwrap()
    }

    /// What it said when it ended by itself, which it has a minute for.
    fn end(mut self) -> Said {
        for _ in 0..600 {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success());
                return self.reader.take().unwrap().join().unwrap();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("it did not end");
    }
}

impl Drop for Server {
    /// None outlives a test that failed.
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

fn listen(output: impl Read, tell: &Sender<()>) -> Said {
    let mut said = Said::default();
    for line in BufReader::new(output).lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["+ready"] => {
                said.ready = true;
                let _ = tell.send(()); // not everyone waits for it
            }
            ["+out", id, tokens] => {
                let out = said.out.entry(id.to_owned()).or_default();
                *out = (out.0 + tokens.parse::<u64>().unwrap(), out.1 + 1);
            }
            ["+done", id, tokens, cost] => {
                said.done.insert(id.to_owned(), (tokens.parse().unwrap(), cost.parse().unwrap()));
            }
            ["+failed", ..] => said.failed.push(line.clone()),
            _ => {} // the test harness's own lines
        }
    }
    said
}

/// Numbers from 0 to 1 that look random.
fn random() -> impl FnMut() -> f64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("usage.sqlite");
    (dir, path)
}

fn rows(path: &Path) -> BTreeMap<String, Row> {
    let usage = Usage::open(path).unwrap();
    let rows = usage.report(&Filter { by: By::Request, since: None }).unwrap().rows;
    rows.into_iter().map(|row| (row.name.clone(), row)).collect()
}

fn reason(row: &Row) -> &str {
    &row.request.as_ref().unwrap().reason
}

/// Compares what was handed out with what is on record. How many requests had a piece on record that never left.
fn compare(said: &Said, rows: &BTreeMap<String, Row>) -> usize {
    let mut ahead = 0;
    for (id, (tokens, pieces)) in &said.out {
        let recorded = rows[id].totals.completion_tokens;
        assert!(recorded == *tokens || recorded == tokens + piece(*pieces), "{id}: {tokens} out, {recorded} on record");
        ahead += usize::from(recorded > *tokens);
    }
    for (id, (tokens, cost)) in &said.done {
        let row = &rows[id];
        assert_eq!((reason(row), row.totals.completion_tokens, row.totals.cost), ("stop", *tokens, *cost));
        assert_eq!(said.out.get(id).map_or(0, |out| out.0), *tokens);
    }
    ahead
}

/// Rows that no server said anything of: they may have their first piece on record, and nothing more.
fn compare_silent(all: &BTreeSet<String>, rows: &BTreeMap<String, Row>) {
    for (id, row) in rows.iter().filter(|(id, _)| !all.contains(*id)) {
        assert!([0, piece(0)].contains(&row.totals.completion_tokens), "{id}: {row:?}");
    }
}

#[test]
fn killed_sixty_times() {
    let (dir, path) = place();
    let mut random = random();
    let mut all = BTreeSet::new();
    let (mut running, mut ahead, mut finished, mut early) = (0, 0, 0, 0);
    for round in 0..ROUNDS {
        let mut server = Server::start(&path, None);
        if round % 4 != 0 {
            server = server.ready(); // or it may be killed while it opens the file
        }
        std::thread::sleep(Duration::from_secs_f64(if round % 4 == 0 { 0.06 } else { 0.2 } * random()));
        let said = server.kill();
        early += u32::from(!said.ready);
        all.extend(said.out.keys().chain(said.done.keys()).cloned());
        if !path.exists() {
            continue; // killed before it had begun
        }
        // Reading changes nothing: what was killed still runs.
        let found = rows(&path);
        ahead += compare(&said, &found);
        finished += said.done.len();
        running += found.values().filter(|row| reason(row) == "running").count();
        if round % 3 != 0 {
            continue; // the next server finds what two have left
        }
        let before: Amount = found.values().map(|row| row.totals.cost).sum();
        let ledger = Ledger::open(&path).unwrap();
        let found = rows(&path);
        assert_eq!(compare(&said, &found), said.out.len() - exact(&said, &found));
        assert!(found.values().all(|row| ["stop", "killed"].contains(&reason(row))), "round {round}");
        for row in found.values().filter(|row| reason(row) == "killed") {
            assert_eq!(row.request.as_ref().unwrap().ended, None);
        }
        assert_eq!(found.values().map(|row| row.totals.cost).sum::<Amount>(), before, "closing costs nothing");
        for key in ["key-0", "key-1", "key-2"] {
            let of_key = found.values().filter(|row| row.request.as_ref().unwrap().key == key);
            assert_eq!(ledger.spent(key), of_key.map(|row| row.totals.cost).sum(), "round {round}, {key}");
        }
    }
    drop(Ledger::open(&path).unwrap());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    compare_silent(&all, &rows(&path));
    println!(
        "{ROUNDS} kills: {early} before it was ready, {finished} requests done, {running} found running, {ahead} a piece ahead"
    );
    assert!(finished > 100 && running > 50, "the kills did not hit the time of serving");
}

/// Requests whose tokens on record are those that were handed out.
fn exact(said: &Said, rows: &BTreeMap<String, Row>) -> usize {
    said.out.iter().filter(|(id, (tokens, _))| rows[*id].totals.completion_tokens == *tokens).count()
}

#[test]
fn one_of_two_is_killed() {
    let (_dir, path) = place();
    let mut random = random();
    for round in 0..6 {
        let [one, two] = [(); 2].map(|()| Server::start(&path, None)).map(Server::ready);
        std::thread::sleep(Duration::from_secs_f64(0.1 + 0.3 * random()));
        let killed = one.kill();
        // A third server closes what the first left, and nothing of the second.
        drop(Ledger::open(&path).unwrap());
        let found = rows(&path);
        compare(&killed, &found);
        for id in killed.out.keys() {
            assert_ne!(reason(&found[id]), "running", "round {round}: {id}");
        }
        std::thread::sleep(Duration::from_millis(100));
        let lives = two.kill();
        let found = rows(&path);
        compare(&lives, &found);
        for id in lives.out.keys() {
            assert_ne!(reason(&found[id]), "killed", "round {round}: {id}");
        }
        assert!(!lives.done.is_empty() && lives.failed.is_empty(), "round {round}");
    }
}

#[test]
fn a_full_disk_ends_requests_and_hands_out_nothing() {
    let (_dir, path) = place();
    drop(Ledger::open(&path).unwrap());
    // No file of more than so many blocks of 512 bytes.
    let said = Server::start(&path, Some("trap '' XFSZ; ulimit -f 300; exec \"$@\"")).end();
    assert_eq!(said.failed.len(), STREAMS, "{:?}", said.failed);
    for failed in &said.failed {
        assert!(failed.starts_with("+failed true no room on the disk for the usage file"), "{failed}");
    }
    drop(Ledger::open(&path).unwrap());
    let found = rows(&path);
    assert_eq!(compare(&said, &found), 0, "what failed is not on record");
    assert!(!said.out.is_empty() && !found.values().any(|row| reason(row) == "running"));
}
