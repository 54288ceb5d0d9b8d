//! Connections: deadlines that the HTTP/2 implementation does not have, and the end of a connection by request.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};
use tonic::transport::server::Connected;

use crate::{authority::Repair, budget::Budget, origin::Origin};

/// Time within which a client must have sent the connection preface. From then on HTTP/2 pings find a dead client.
const PREFACE_DEADLINE: Duration = Duration::from_secs(10);
/// Length of the connection preface (RFC 9113, section 3.4), bytes.
const PREFACE_BYTES: usize = 24;
/// Bytes that are read at a time.
const READ_BYTES: usize = 8 << 10;
/// Longest time for which the socket of a client may accept no byte.
const WRITE_DEADLINE: Duration = Duration::from_secs(60);

/// Handle of a connection, by which it can be closed.
#[derive(Clone, Debug, Default)]
pub struct ConnectionId(Arc<State>);

#[derive(Debug, Default)]
struct State {
    origin: Origin,
    closed: AtomicBool,
    waker: Mutex<Option<Waker>>,
    /// Requests in progress, and streams that have not ended.
    streams: AtomicUsize,
}

impl ConnectionId {
    /// Returns the handle of a new connection.
    #[must_use]
    pub fn new(origin: Origin) -> Self {
        Self(Arc::new(State {
            origin,
            ..State::default()
        }))
    }

    /// Returns where the connection comes from.
    pub(crate) fn origin(&self) -> Origin {
        self.0.origin
    }

    /// Closes the connection.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
        let waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Returns whether the connection was closed by [`Self::close`].
    pub(crate) fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// Returns a value that counts as an open stream of this connection until it is dropped.
    pub(crate) fn open(&self) -> OpenStream {
        self.0.streams.fetch_add(1, Ordering::SeqCst);
        OpenStream(self.clone())
    }

    /// Returns whether no stream is open.
    pub(crate) fn is_idle(&self) -> bool {
        self.0.streams.load(Ordering::SeqCst) == 0
    }

    /// Returns whether both are handles of the same connection.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// # Errors
    /// Fails if the connection was closed; else the task of `context` is woken when it is.
    fn check(&self, context: &Context<'_>) -> io::Result<()> {
        let mut waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *waker {
            Some(known) => known.clone_from(context.waker()),
            None => *waker = Some(context.waker().clone()),
        }
        drop(waker);
        // The flag is read after the waker is set: `close` sets the flag first.
        if self.is_closed() {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the server has closed the connection",
            ));
        }
        Ok(())
    }
}

/// Open stream of a connection, until the value is dropped.
#[derive(Debug)]
pub(crate) struct OpenStream(ConnectionId);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.0.streams.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Connection of a client.
#[derive(Debug)]
pub struct Connection<C> {
    inner: C,
    id: ConnectionId,
    /// Bytes that the preface still lacks.
    preface: usize,
    repair: Repair,
    budget: Budget,
    read_deadline: Pin<Box<Sleep>>,
    write_deadline: Pin<Box<Sleep>>,
    /// Whether the socket accepted no byte at the last attempt.
    stalled: bool,
    /// Held until the connection ends.
    _guard: Option<Box<dyn Guard>>,
}

/// Value that a connection holds until it ends.
pub trait Guard: Send + std::fmt::Debug {}

impl<T: Send + std::fmt::Debug> Guard for T {}

impl<C> Connection<C> {
    /// Returns the connection over a stream, with its handle. `guard` is dropped when the connection ends.
    pub fn new(inner: C, id: ConnectionId, guard: Option<Box<dyn Guard>>) -> Self {
        Self {
            inner,
            id,
            preface: PREFACE_BYTES,
            repair: Repair::new(PREFACE_BYTES),
            budget: Budget::new(),
            read_deadline: Box::pin(sleep(PREFACE_DEADLINE)),
            write_deadline: Box::pin(sleep(WRITE_DEADLINE)),
            stalled: false,
            _guard: guard,
        }
    }

    /// Keeps the deadline of writes. `result`: that of the write.
    fn written<T>(&mut self, result: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = false;
            return result;
        }
        if !self.stalled {
            self.stalled = true;
            self.write_deadline
                .as_mut()
                .reset(Instant::now() + WRITE_DEADLINE);
        }
        match self.write_deadline.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<C> Connected for Connection<C> {
    type ConnectInfo = ConnectionId;

    fn connect_info(&self) -> ConnectionId {
        self.id.clone()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Connection<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.id.check(context)?;
        while this.repair.ready().is_empty() && buffer.remaining() > 0 {
            // Until then the bytes stay in the socket, and the client cannot send more than its buffer has room for.
            std::task::ready!(this.budget.poll_rest(context));
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            match Pin::new(&mut this.inner).poll_read(context, &mut read)? {
                Poll::Pending if this.preface > 0 && this.read_deadline.as_mut().poll(context).is_ready() => {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) if read.filled().is_empty() => {
                    this.repair.end();
                    break;
                }
                Poll::Ready(()) => {
                    this.preface = this.preface.saturating_sub(read.filled().len());
                    this.budget.spend(this.repair.push(read.filled()));
                }
            }
        }
        let ready = this.repair.ready();
        let count = ready.len().min(buffer.remaining());
        buffer.put_slice(&ready[..count]);
        this.repair.consume(count);
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Connection<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.written(result, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(context, bytes);
        self.written(result, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(context);
        self.written(result, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(context);
        self.written(result, context)
    }
}
