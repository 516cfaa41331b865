//! Accepting connections, and what one client may cost.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::app::App;
use super::io::{Activity, Watched};
use super::routes;

/// What connections may do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once; others are told to come again. Bounded by the files that the process may open, too.
    pub connections: usize,
    /// A connection without a request is closed after this long, and a request's head may take as long.
    pub idle: Duration,
    /// A connection whose client takes nothing of what is sent is closed after this long.
    pub stall: Duration,
    /// A streamed answer that has nothing to say for this long says so.
    pub keep_alive: Duration,
    /// Time for a request's body, and for each piece of it.
    pub body: (Duration, Duration),
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Bytes of all requests' bodies that are being read or worked on.
    pub bodies_bytes: usize,
}

impl Default for Limits {
    /// 8192 connections, 75 s idle, 30 s stalled, 5 minutes for a body with pauses of 30 s, 16 MiB each and 512 MiB in all.
    fn default() -> Self {
        Self {
            connections: 8192,
            idle: Duration::from_secs(75),
            stall: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            body: (Duration::from_mins(5), Duration::from_secs(30)),
            body_bytes: 16 << 20,
            bodies_bytes: 512 << 20,
        }
    }
}

/// Headers of a request: their number and bytes. More are answered with 431.
const MAX_HEADERS: usize = 100;
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Requests of one HTTP/2 connection at once.
const MAX_STREAMS: u32 = 128;
/// Connections that are told at once that there are too many.
const MAX_REFUSALS: usize = 64;
/// Files that are kept for other things than connections.
const OTHER_FILES: usize = 128;
/// Pause after the system refused another connection.
const PAUSE: Duration = Duration::from_millis(100);
/// What one gets who comes when there are too many connections.
const REFUSAL: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n\
    Connection: close\r\nContent-Length: 141\r\n\r\n\
    {\"error\":{\"message\":\"the server has too many connections; try again later\",\
    \"type\":\"server_error\",\"param\":null,\"code\":\"too_many_connections\"}}";

/// Accepts connections and serves them until `graceful` is shut down or this is dropped.
pub async fn accept(listener: TcpListener, app: Arc<App>, graceful: &GracefulShutdown) -> Infallible {
    let limits = app.limits.clone();
    let places = Arc::new(Semaphore::new(limits.connections.min(files().saturating_sub(OTHER_FILES)).max(1)));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // The client has gone already.
            Err(error) if is_of_the_client(&error) => continue,
            // No files, no memory: it passes when others end. Those who wait stay in the system's queue.
            Err(_) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            let (app, watcher) = (Arc::clone(&app), graceful.watcher());
            tokio::spawn(async move {
                serve(stream, app, watcher).await;
                drop(place);
            });
        } else if let Ok(refusal) = Arc::clone(&refusals).try_acquire_owned() {
            tokio::spawn(async move {
                let _ = tokio::time::timeout(Duration::from_secs(1), refuse(stream)).await; // too slow to be told
                drop(refusal);
            });
        }
    }
}

fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// Files that this process may open, where that is known.
fn files() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(usize::MAX)
}

/// Tells a client that there are too many. What it sends is read, since it might not be told otherwise.
async fn refuse(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(REFUSAL.as_bytes()).await?;
    stream.shutdown().await?;
    let mut buffer = [0; 4096];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Serves the requests of one connection.
async fn serve(stream: TcpStream, app: Arc<App>, watcher: Watcher) {
    let _ = stream.set_nodelay(true); // it is only slower without
    let limits = &app.limits;
    let activity = Activity::new();
    let io = Watched::new(stream, Arc::clone(&activity), limits.idle, limits.stall);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let mut http1 = builder.http1();
    http1.timer(TokioTimer::new()).header_read_timeout(limits.idle).max_headers(MAX_HEADERS);
    http1.max_buf_size(MAX_HEAD_BYTES);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(limits.idle).keep_alive_timeout(limits.stall);
    http2.max_concurrent_streams(MAX_STREAMS).max_header_list_size(MAX_HEAD_BYTES as u32);
    let service = service_fn({
        let app = Arc::clone(&app);
        move |request: hyper::Request<Incoming>| {
            let (app, busy) = (Arc::clone(&app), activity.begin());
            async move { Ok::<_, Infallible>(routes::answer(app, busy, request).await) }
        }
    });
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(io), service);
    // Whatever went wrong, there is nobody left to tell.
    let _ = watcher.watch(connection.into_owned()).await;
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::app::{Log, Policy};
    use super::*;
    use crate::ledger::{Keys, Ledger};

    const IDLE: Duration = Duration::from_millis(300);

    /// A server without a model, and the folder that it needs.
    async fn server(limits: Limits) -> (std::net::SocketAddr, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("usage.sqlite")).unwrap();
        let policy = Policy { keys: Keys::anonymous(), prices: None, ledger, log: Log::Nothing };
        let app = App::new("none".into(), policy, limits);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let graceful = GracefulShutdown::new();
            match accept(listener, app, &graceful).await {}
        });
        (address, folder)
    }

    /// What is read until the connection ends, and how long that took.
    async fn until_end(stream: &mut TcpStream) -> (String, Duration) {
        let begun = Instant::now();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
        let _ = read.expect("the connection ends"); // a reset is an end, too
        (String::from_utf8(answer).unwrap(), begun.elapsed())
    }

    #[tokio::test]
    async fn clients_that_do_not_go_on_are_let_go() {
        let (address, _folder) = server(Limits { idle: IDLE, ..Limits::default() }).await;
        let health = "GET /health HTTP/1.1\r\nHost: a\r\n\r\n";
        for beginning in ["", "G", "GET /health HT", "GET /health HTTP/1.1\r\nHo", "PRI * HTTP/2.0\r\n\r\nSM", health] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(beginning.as_bytes()).await.unwrap();
            let (answer, took) = until_end(&mut stream).await;
            assert_eq!(answer.starts_with("HTTP/1.1 200 OK"), beginning == health, "{beginning:?}: {answer}");
            assert!(took >= IDLE.mul_f32(0.9) && took < 10 * IDLE, "{beginning:?}: {took:?}");
        }
    }

    #[tokio::test]
    async fn a_head_that_comes_byte_by_byte_has_a_deadline() {
        let (address, _folder) = server(Limits { idle: IDLE, ..Limits::default() }).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let begun = Instant::now();
        let mut head = "GET /health HTTP/1.1\r\nX: ".bytes().chain(std::iter::repeat(b'a'));
        while begun.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(IDLE / 20).await;
            if stream.write_all(&[head.next().unwrap()]).await.is_err() {
                return;
            }
        }
        panic!("it may go on for ever");
    }

    #[tokio::test]
    async fn heads_that_are_too_large_are_refused() {
        let (address, _folder) = server(Limits::default()).await;
        let many = "X: a\r\n".repeat(MAX_HEADERS + 1);
        let long = format!("X: {}\r\n", "a".repeat(MAX_HEAD_BYTES));
        for headers in [many, long] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(format!("GET /health HTTP/1.1\r\n{headers}\r\n").as_bytes()).await.unwrap();
            let (answer, _) = until_end(&mut stream).await;
            assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        }
    }

    #[tokio::test]
    async fn without_a_model_requests_are_told_to_come_again() {
        let (address, _folder) = server(Limits { idle: IDLE, ..Limits::default() }).await;
        for (path, status) in [("/health", "200"), ("/ready", "503"), ("/v1/models", "503"), ("/metrics", "503")] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
            let (answer, _) = until_end(&mut stream).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {answer}");
            assert_eq!(answer.contains("retry-after: "), status == "503", "{path}: {answer}");
        }
    }

    #[test]
    fn the_refusal_is_well_formed() {
        let (head, body) = REFUSAL.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())), "{}", body.len());
        assert!(serde_json::from_str::<serde_json::Value>(body).unwrap()["error"]["code"].is_string());
    }
}
