//! A stream whose peer must accept bytes in time.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

use super::{super::measured::lock, clients::Activity};

/// Fails writes if the peer has not accepted all bytes up to a flush in time. A client that reads its answer slowly or
/// not at all would otherwise keep the text of its scrape in memory.
#[derive(Debug)]
pub(super) struct WriteDeadline<S> {
    stream: S,
    limit: Duration,
    timer: Pin<Box<Sleep>>,
    /// Whether the timer runs, from the first write that had to wait for the peer to the next complete flush.
    is_waiting: bool,
    /// Whether bytes were written since the last complete flush.
    has_written: bool,
    /// The connection is not busy any more when what was written is flushed.
    activity: Arc<Activity>,
}

impl<S> WriteDeadline<S> {
    pub(super) fn new(stream: S, limit: Duration, activity: Arc<Activity>) -> Self {
        Self {
            stream,
            limit,
            timer: Box::pin(sleep(limit)),
            is_waiting: false,
            has_written: false,
            activity,
        }
    }

    /// Returns the result of a write, or an error if the peer has taken too long.
    fn checked<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            return written;
        }
        if !self.is_waiting {
            self.is_waiting = true;
            let now = Instant::now();
            self.timer.as_mut().reset(now + self.limit);
            *lock(&self.activity.stalled_since) = Some(now.into_std());
        }
        match self.timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteDeadline<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteDeadline<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.has_written |= written.is_ready();
        self.checked(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.has_written |= written.is_ready();
        self.checked(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() && self.has_written {
            self.has_written = false;
            self.is_waiting = false;
            *lock(&self.activity.stalled_since) = None;
            self.activity.is_busy.store(false, Ordering::SeqCst);
        }
        self.checked(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.checked(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn a_peer_that_stops_reading_ends_the_write_and_one_that_reads_does_not() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let limit = Duration::from_millis(20);
            let (near, far) = tokio::io::duplex(64);
            let error = WriteDeadline::new(near, limit, Arc::default())
                .write_all(&[0; 1_000])
                .await
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            drop(far);

            // A byte now and then does not prolong the time.
            let (near, mut far) = tokio::io::duplex(64);
            let mut near = WriteDeadline::new(near, Duration::from_millis(50), Arc::default());
            let trickle = async {
                let mut byte = [0];
                while far.read(&mut byte).await.is_ok_and(|read| read > 0) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let error = tokio::select! {
                written = near.write_all(&[0; 100_000]) => written.unwrap_err(),
                () = trickle => unreachable!("the writer is open"),
            };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);

            let (near, mut far) = tokio::io::duplex(64);
            let reader = async {
                let mut read = Vec::new();
                far.read_to_end(&mut read).await.unwrap();
                read.len()
            };
            let writer = async {
                let activity = Arc::<Activity>::default();
                activity.is_busy.store(true, Ordering::SeqCst);
                let mut near = WriteDeadline::new(near, Duration::from_secs(60), Arc::clone(&activity));
                near.flush().await.unwrap();
                near.write_all(&[0; 1_000]).await.unwrap();
                assert!(
                    activity.is_busy.load(Ordering::SeqCst),
                    "the answer is not flushed"
                );
                assert!(
                    lock(&activity.stalled_since).is_some(),
                    "the peer has not accepted all at once"
                );
                near.flush().await.unwrap();
                assert!(!activity.is_busy.load(Ordering::SeqCst));
                assert!(lock(&activity.stalled_since).is_none());
                near.shutdown().await.unwrap();
            };
            assert_eq!(tokio::join!(reader, writer).0, 1_000);
        });
    }
}
