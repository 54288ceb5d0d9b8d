//! One end of a connection: a socket, with or without TLS, and the bytes that arrived and have no verdict yet.

use std::{
    io::{self, BufRead as _, IoSlice, Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    time::Duration,
};

use mio::net::TcpStream;
use rustls::{Connection as Tls, ServerConnection};
use socket2::SockRef;

/// Maximum number of decrypted bytes of one end that have no verdict yet. A message head must fit.
pub(crate) const INPUT: usize = 64 << 10;

/// Maximum number of bytes that wait for further ones, so that a message head and a short body are one record and one
/// write. Longer bytes are not copied.
const SHORT: usize = 4 << 10;

/// Memory that an idle connection keeps for each buffer, bytes: a request after a pause needs no allocation.
const KEPT: usize = 1 << 10;

/// Value of [`End::bypass`] for a stream that is not inspected any more.
pub(crate) const FOREVER: u64 = u64::MAX;

/// How the stream of an end has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With a close_notify; without TLS, with a FIN.
    Clean,
    /// With a FIN, but without the close_notify that TLS requires (RFC 8446, section 6.1).
    Truncated,
}

/// Error of an end.
#[derive(Debug)]
pub(crate) enum EndError {
    /// Error of the socket.
    Io(io::Error),
    /// The peer's bytes are not acceptable, or the peer has sent a fatal alert.
    Tls(rustls::Error),
}

impl From<io::Error> for EndError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Socket to which a single buffer is written by `send`, which costs less than `writev`. The TLS library calls
/// `write_vectored` even for one record.
struct Single<'a>(&'a mut TcpStream);

impl io::Write for Single<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match buffers {
            [one] => self.0.write(one),
            _ => self.0.write_vectored(buffers),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// State of a TLS handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handshake {
    /// The handshake is complete.
    Done,
    /// The peer must send first.
    Wait,
    /// The peer has ended the stream.
    Closed,
}

/// Bytes that are added at the end and taken from the front.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    pub(crate) const fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.bytes.len() + bytes.len() > self.bytes.capacity() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn consume(&mut self, n: usize) {
        self.start = self.bytes.len().min(self.start + n);
        if self.start == self.bytes.len() {
            self.clear();
        }
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }

    /// Frees the memory of an empty buffer above [`KEPT`].
    pub(crate) fn release(&mut self) {
        if self.is_empty() && self.bytes.capacity() > KEPT {
            *self = Self::default();
        }
    }
}

impl io::Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One end of a connection.
pub(crate) struct End {
    socket: TcpStream,
    /// TLS state; `None` for plain text, and while a ClientHello is read.
    pub(crate) tls: Option<Box<Tls>>,
    /// Bytes that arrived and have no verdict yet: decrypted, if `tls` is set.
    pub(crate) input: Buffer,
    /// Bytes that the socket has not accepted yet. They precede the bytes that TLS has queued. With TLS, only
    /// [`Self::pending`] puts bytes here.
    out: Buffer,
    /// With TLS: at most [`SHORT`] bytes that are not encrypted yet. They follow the bytes that TLS has queued.
    plain: Buffer,
    /// Number of bytes that were queued since the last time that none was.
    queued: usize,
    /// Whether a read of the socket can succeed (edge-triggered events).
    readable: bool,
    writable: bool,
    /// Whether the kernel has reported that the peer has sent its FIN.
    read_closed: bool,
    /// Whether the kernel has reported an error, for example a reset by the peer.
    pub(crate) has_failed: bool,
    /// How the received stream has ended.
    pub(crate) eof: Option<Ending>,
    /// Number of the next received bytes that are forwarded without inspection.
    pub(crate) bypass: u64,
    /// Time since which a message head of the peer is incomplete, ms.
    pub(crate) head_since: Option<u64>,
    /// Whether the end of the received stream was forwarded.
    pub(crate) is_forwarded: bool,
    /// Whether the stream to the peer ends after the bytes that are queued.
    ending: bool,
    /// Whether the FIN was sent.
    shut: bool,
    /// Application bytes that were received.
    pub(crate) received: u64,
    /// Application bytes that were sent.
    pub(crate) sent: u64,
}

impl End {
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            tls: None,
            input: Buffer::default(),
            out: Buffer::default(),
            plain: Buffer::default(),
            queued: 0,
            readable: false,
            writable: true,
            read_closed: false,
            has_failed: false,
            eof: None,
            bypass: 0,
            head_since: None,
            is_forwarded: false,
            ending: false,
            shut: false,
            received: 0,
            sent: 0,
        }
    }

    pub(crate) const fn socket_mut(&mut self) -> &mut TcpStream {
        &mut self.socket
    }

    /// Returns the address of this node's end.
    pub(crate) fn local_address(&self) -> Option<SocketAddr> {
        self.socket.local_addr().ok()
    }

    /// Notes a readiness event.
    pub(crate) fn note(&mut self, event: &mio::event::Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
        self.has_failed |= event.is_error();
        self.read_closed |= event.is_read_closed() || event.is_error();
    }

    /// Returns whether [`Self::receive`] can read bytes.
    pub(crate) const fn can_receive(&self) -> bool {
        self.readable && self.eof.is_none() && self.input.len() < INPUT
    }

    /// Notes that the socket is not connected yet.
    pub(crate) const fn set_connecting(&mut self) {
        self.writable = false;
    }

    /// Returns whether the socket is connected.
    ///
    /// # Errors
    /// The error of the `connect`.
    pub(crate) fn is_connected(&self) -> io::Result<bool> {
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        match self.socket.peer_addr() {
            Ok(_) => Ok(self.writable),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns whether bytes wait for the socket. The other side is not read then.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.out.is_empty()
            || !self.plain.is_empty()
            || self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Returns whether further bytes can be queued before those that wait are written.
    pub(crate) fn has_room(&self) -> bool {
        !self.is_blocked() || (self.writable && self.queued < INPUT)
    }

    /// Returns the number of bytes that wait for the socket.
    pub(crate) fn pending(&mut self) -> Result<usize, EndError> {
        self.encrypt(&[]);
        if let Some(tls) = &mut self.tls {
            // TLS does not tell how many bytes it has.
            while tls.wants_write() {
                tls.write_tls(&mut self.out)?;
            }
        }
        Ok(self.out.len())
    }

    /// Takes the bytes that [`Self::pending`] has counted.
    pub(crate) fn take_pending(&mut self) -> Vec<u8> {
        let bytes = self.out.bytes().to_vec();
        self.out.clear();
        bytes
    }

    /// Reads from the socket once, into `input`. Returns whether the socket had bytes or the stream has ended.
    ///
    /// The caller must call [`Self::flush`] after an error too, because TLS can have queued an alert.
    pub(crate) fn receive(&mut self, scratch: &mut [u8]) -> Result<bool, EndError> {
        self.receive_for(scratch, None)
    }

    /// As [`Self::receive`], but bytes that are forwarded without inspection are queued for `other` at once.
    pub(crate) fn receive_for(
        &mut self,
        scratch: &mut [u8],
        other: Option<&mut Self>,
    ) -> Result<bool, EndError> {
        // A record is at least as long as its plaintext, so this many bytes cannot exceed the limit of `input`.
        let most = if other.is_some() && self.input.is_empty() && self.bypass >= scratch.len() as u64 {
            scratch.len()
        } else {
            scratch.len().min(INPUT.saturating_sub(self.input.len()))
        };
        let Some(room) = scratch.get_mut(..most).filter(|room| !room.is_empty()) else {
            return Ok(false);
        };
        let n = match self.socket.read(room) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(false);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => {
                self.readable = false;
                return Err(error.into());
            }
        };
        if n == 0 {
            self.readable = false;
            let is_clean = self.tls.is_none();
            self.eof.get_or_insert(if is_clean {
                Ending::Clean
            } else {
                Ending::Truncated
            });
            return Ok(true);
        }
        // A read that does not fill the buffer has emptied the socket (epoll(7)). Another event follows unless the FIN
        // has been reported already.
        self.readable = n == most || self.read_closed;
        let bytes = scratch.get(..n).unwrap_or_default();
        self.feed(bytes, other)?;
        Ok(true)
    }

    /// Handles bytes from the socket.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], mut other: Option<&mut Self>) -> Result<(), EndError> {
        let Some(tls) = &mut self.tls else {
            self.received += bytes.len() as u64;
            take_in(bytes, &mut self.bypass, &mut self.input, other);
            return Ok(());
        };
        while !bytes.is_empty() {
            if tls.read_tls(&mut bytes)? == 0 {
                return Err(EndError::Io(io::ErrorKind::InvalidData.into()));
            }
            let state = tls.process_new_packets().map_err(EndError::Tls)?;
            if state.plaintext_bytes_to_read() > 0 {
                let mut reader = tls.reader();
                while let Ok(chunk) = reader.fill_buf() {
                    let n = chunk.len();
                    if n == 0 {
                        break;
                    }
                    take_in(chunk, &mut self.bypass, &mut self.input, other.as_deref_mut());
                    self.received += n as u64;
                    reader.consume(n);
                }
            }
            if state.peer_has_closed() {
                self.eof = Some(Ending::Clean);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Begins TLS with a client whose ClientHello was read. The TLS library holds bytes that it has not processed, and
    /// `input` can hold further bytes of the client.
    pub(crate) fn accept_tls(&mut self, mut tls: ServerConnection) -> Result<(), EndError> {
        tls.set_buffer_limit(None);
        let processed = tls.process_new_packets();
        self.tls = Some(Box::new(tls.into()));
        self.received = 0;
        let early = std::mem::take(&mut self.input);
        processed.map_err(EndError::Tls)?;
        self.feed(early.bytes(), None)
    }

    /// Continues the TLS handshake with the bytes that have arrived.
    pub(crate) fn handshake(&mut self, scratch: &mut [u8]) -> Result<Handshake, EndError> {
        loop {
            let is_done = self.tls.as_ref().is_none_or(|tls| !tls.is_handshaking());
            self.flush()?;
            if is_done {
                return Ok(Handshake::Done);
            }
            if self.eof.is_some() {
                return Ok(Handshake::Closed);
            }
            if !self.can_receive() {
                return Ok(Handshake::Wait);
            }
            if let Err(error) = self.receive(scratch) {
                // TLS has queued an alert for the peer.
                let _ = self.flush();
                return Err(error);
            }
        }
    }

    /// Queues bytes for the peer without writing any to the socket.
    fn queue(&mut self, bytes: &[u8]) {
        self.sent += bytes.len() as u64;
        self.queued += bytes.len();
        if self.tls.is_none() {
            self.out.push(bytes);
        } else if self.plain.len() + bytes.len() <= SHORT {
            self.plain.push(bytes);
        } else {
            self.encrypt(bytes);
        }
    }

    /// Encrypts the bytes that wait for that, and then `bytes`. Without TLS, there are none that wait.
    fn encrypt(&mut self, bytes: &[u8]) {
        let Some(tls) = &mut self.tls else {
            return;
        };
        // A buffer without a limit takes all bytes. TLS refuses them after a fatal error, which was reported when it
        // occurred; nothing but an alert can be sent then.
        let _ = match (self.plain.bytes(), bytes) {
            ([], []) => return,
            (first, []) => tls.writer().write(first),
            ([], second) => tls.writer().write(second),
            (first, second) => tls
                .writer()
                .write_vectored(&[IoSlice::new(first), IoSlice::new(second)]),
        };
        self.plain.clear();
    }

    /// Queues bytes for the peer. Without TLS, long ones are written at once, so that they are not copied.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<(), EndError> {
        if self.tls.is_some() || bytes.len() <= SHORT || self.out.len() > SHORT || !self.writable {
            self.queue(bytes);
            return Ok(());
        }
        self.sent += bytes.len() as u64;
        self.queued += bytes.len();
        let waiting = self.out.len();
        let n = match self
            .socket
            .write_vectored(&[IoSlice::new(self.out.bytes()), IoSlice::new(bytes)])
        {
            Ok(n) => n,
            Err(error) if would_block(&error) => 0,
            Err(error) => return Err(error.into()),
        };
        self.out.consume(n.min(waiting));
        self.out
            .push(bytes.get(n.saturating_sub(waiting)..).unwrap_or_default());
        Ok(())
    }

    /// Ends the stream to the peer after the queued bytes: with close_notify and FIN, or only with a FIN.
    pub(crate) fn finish(&mut self, ending: Ending) {
        if self.ending {
            return;
        }
        self.ending = true;
        self.encrypt(&[]);
        if let (Ending::Clean, Some(tls)) = (ending, &mut self.tls) {
            tls.send_close_notify();
        }
    }

    /// Writes queued bytes to the socket, and then the FIN if the stream ends. Returns whether everything is written.
    pub(crate) fn flush(&mut self) -> Result<bool, EndError> {
        if self.shut {
            return Ok(true);
        }
        if self.writable {
            self.encrypt(&[]);
        }
        while self.writable && self.is_blocked() {
            let is_own = !self.out.is_empty();
            let written = match &mut self.tls {
                Some(tls) if !is_own => tls.write_tls(&mut Single(&mut self.socket)),
                _ => self.socket.write(self.out.bytes()),
            };
            match written {
                Ok(n) if is_own => self.out.consume(n),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.shut = true;
                    return Err(error.into());
                }
            }
        }
        if self.is_blocked() {
            return Ok(false);
        }
        self.queued = 0;
        if self.ending {
            self.shut = true;
            // An error means that the peer has reset the connection, which the next read reports.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        Ok(true)
    }

    /// Sets the socket to send a reset when it is closed.
    pub(crate) fn reset(&self) {
        // Without SO_LINGER the close would send a FIN, which a peer without TLS would take for a clean end.
        let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }

    /// Frees memory that an idle connection does not need.
    pub(crate) fn release(&mut self) {
        self.input.release();
        self.out.release();
        self.plain.release();
    }
}

/// Queues bytes for the other end that are forwarded without inspection, and keeps the rest for the inspector.
fn take_in(bytes: &[u8], bypass: &mut u64, input: &mut Buffer, other: Option<&mut End>) {
    let n = match other {
        Some(other) if input.is_empty() && *bypass > 0 => {
            let n = bytes.len().min(usize::try_from(*bypass).unwrap_or(usize::MAX));
            other.queue(bytes.get(..n).unwrap_or_default());
            if *bypass != FOREVER {
                *bypass -= n as u64;
            }
            n
        }
        _ => 0,
    };
    input.push(bytes.get(n..).unwrap_or_default());
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
