//! A connection that is given up if its client does nothing for too long.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// What a connection's requests are doing.
#[derive(Debug)]
pub struct Activity {
    /// Requests that are not answered yet.
    requests: AtomicUsize,
    /// When something last happened.
    last: Mutex<Instant>,
}

impl Activity {
    /// Of a connection that has just been made.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { requests: AtomicUsize::new(0), last: Mutex::new(Instant::now()) })
    }

    /// Notes a request, which is being answered until what is returned is dropped.
    pub fn begin(self: &Arc<Self>) -> Busy {
        self.requests.fetch_add(1, Ordering::SeqCst);
        Busy(Arc::clone(self))
    }

    fn touch(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Until when the client may do nothing.
    fn until(&self, idle: Duration) -> Instant {
        let busy = self.requests.load(Ordering::SeqCst) > 0;
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if busy { Instant::now() + idle } else { last + idle }
    }
}

/// A request is being answered.
#[derive(Debug)]
pub struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.touch();
        self.0.requests.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A stream that fails with [`io::ErrorKind::TimedOut`] if nothing is read for `idle` while no request is being answered,
/// or if nothing can be written for `stall`.
#[derive(Debug)]
pub struct Watched<T> {
    stream: T,
    activity: Arc<Activity>,
    idle: Duration,
    stall: Duration,
    reading: Option<Pin<Box<Sleep>>>,
    writing: Option<Pin<Box<Sleep>>>,
}

impl<T> Watched<T> {
    /// Watches a stream.
    pub fn new(stream: T, activity: Arc<Activity>, idle: Duration, stall: Duration) -> Self {
        Self { stream, activity, idle, stall, reading: None, writing: None }
    }

    /// What becomes of a write that may have to wait.
    fn written<R>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if result.is_ready() {
            self.writing = None;
            self.activity.touch();
            return result;
        }
        let stall = self.stall;
        let timer = self.writing.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + stall)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client reads nothing")))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_read(cx, buf);
        if result.is_ready() {
            this.reading = None;
            this.activity.touch();
            return result;
        }
        loop {
            let until = this.activity.until(this.idle);
            let timer = this.reading.get_or_insert_with(|| Box::pin(sleep_until(until)));
            ready!(timer.as_mut().poll(cx));
            if until <= Instant::now() {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client sends nothing")));
            }
            timer.as_mut().reset(until);
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.written(cx, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_flush(cx);
        this.written(cx, result)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.written(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const IDLE: Duration = Duration::from_millis(80);

    fn kind<T: std::fmt::Debug>(result: io::Result<T>) -> io::ErrorKind {
        result.unwrap_err().kind()
    }

    #[tokio::test]
    async fn a_client_that_sends_nothing_is_given_up() {
        let (_client, stream) = duplex(16);
        let mut watched = Watched::new(stream, Activity::new(), IDLE, IDLE);
        let begun = Instant::now();
        assert_eq!(kind(watched.read_u8().await), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= IDLE);
    }

    #[tokio::test]
    async fn but_not_while_a_request_of_its_is_being_answered() {
        let (_client, stream) = duplex(16);
        let activity = Activity::new();
        let mut watched = Watched::new(stream, Arc::clone(&activity), IDLE, IDLE);
        let busy = activity.begin();
        assert!(tokio::time::timeout(4 * IDLE, watched.read_u8()).await.is_err());
        // The time counts from the answer's end.
        drop(busy);
        let begun = Instant::now();
        assert_eq!(kind(watched.read_u8().await), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= IDLE.mul_f32(0.9), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_client_that_sends_now_and_then_is_not() {
        let (mut client, stream) = duplex(16);
        let mut watched = Watched::new(stream, Activity::new(), 2 * IDLE, IDLE);
        tokio::spawn(async move {
            for byte in 0..5 {
                tokio::time::sleep(IDLE).await;
                client.write_u8(byte).await.unwrap();
            }
        });
        for byte in 0..5 {
            assert_eq!(watched.read_u8().await.unwrap(), byte);
        }
    }

    #[tokio::test]
    async fn a_client_that_reads_nothing_is_given_up() {
        let (_client, stream) = duplex(16);
        let activity = Activity::new();
        let _busy = activity.begin();
        let mut watched = Watched::new(stream, activity, IDLE, IDLE);
        watched.write_all(&[0; 16]).await.unwrap();
        assert_eq!(kind(watched.write_u8(0).await), io::ErrorKind::TimedOut);
    }
}
