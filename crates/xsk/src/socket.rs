//! One socket with its four rings.

use std::{
    cell::Cell,
    ffi::CString,
    io,
    num::NonZeroU32,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    ptr,
    rc::Rc,
    thread,
    time::{Duration, Instant},
};

use thiserror::Error as ThisError;
use xsk_rs::{
    config::{BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig, XdpFlags},
    socket::{RxQueue, TxQueue},
    umem::{CompQueue, FillQueue, Umem, frame::FrameDesc},
};

use crate::{
    frame::{CHUNK, Frame, Pool},
    ledger::Counts,
};

/// Descriptors that are taken from a ring or put into one at once.
const BATCH: usize = 64;
/// The kernel is told to send so often, if it takes nothing any more, before it is left for later.
const IDLE_KICKS: u32 = 64;
/// And for no longer than that.
const LONGEST_FLUSH: Duration = Duration::from_millis(2);
/// Between two tries to bind: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// How it is waited for packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// The thread sleeps until a packet comes.
    #[default]
    Poll,
    /// The thread looks again and again.
    Spin,
    /// The thread drives the interface's receive processing itself while it looks.
    BusyPoll,
}

/// Who copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Copying {
    /// The kernel does, unless the driver can write into our frames.
    #[default]
    Auto,
    /// The kernel does.
    Copy,
    /// Nobody does, or there is no socket.
    ZeroCopy,
}

/// How a socket is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The interface, in the network namespace of the thread that makes the socket.
    pub interface: String,
    /// The queue.
    pub queue: u32,
    /// Frames, of a page each: locked memory. A power of two, at least 16.
    pub frames: u32,
    /// Who copies.
    pub copying: Copying,
    /// How it is waited for packets.
    pub mode: Mode,
    /// µs that the kernel looks for packets on behalf of [`Mode::BusyPoll`].
    pub busy_poll: u32,
    /// Packets that it may then take at once.
    pub busy_budget: u32,
    /// If somebody else still has the queue, it is tried again for so long.
    pub patience: Duration,
}

impl Config {
    /// What is usual, for a queue of an interface.
    #[must_use]
    pub fn new(interface: &str, queue: u32) -> Self {
        Self {
            interface: interface.to_owned(),
            queue,
            frames: 4096,
            copying: Copying::Auto,
            mode: Mode::Poll,
            busy_poll: 20,
            busy_budget: 64,
            patience: Duration::from_secs(2),
        }
    }
}

/// Why there is no socket.
#[derive(Debug, ThisError)]
pub enum Error {
    /// That many frames cannot be.
    #[error("{0} frames: must be a power of two, at least 16")]
    Frames(u32),
    /// That is no interface's name.
    #[error("not an interface's name: {0:?}")]
    Name(String),
    /// The kernel has no AF_XDP.
    #[error("Linux {release} has no AF_XDP, by which packets reach the workers (CONFIG_XDP_SOCKETS)")]
    Unsupported {
        /// The kernel's release.
        release: String,
    },
    /// The memory cannot be had.
    #[error("{frames} frames of 4096 bytes for a socket: {source}")]
    Memory {
        /// So many were wanted.
        frames: u32,
        /// What the kernel says.
        source: io::Error,
    },
    /// Somebody else has the queue, and kept it.
    #[error("queue {queue} of {interface} is in use, still after {waited:?}")]
    Busy {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// So long it was tried.
        waited: Duration,
    },
    /// The kernel does not bind a socket to the queue.
    #[error("socket for queue {queue} of {interface}: {source}")]
    Bind {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// What the kernel says.
        source: io::Error,
    },
    /// The socket cannot be set up for busy polling.
    #[error("busy polling: {0}")]
    BusyPoll(io::Error),
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Frames(_) | Error::Name(_) => io::ErrorKind::InvalidInput,
            Error::Busy { .. } => io::ErrorKind::ResourceBusy,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::Memory { source, .. } | Error::Bind { source, .. } | Error::BusyPoll(source) => {
                source.kind()
            }
        };
        Self::new(kind, error)
    }
}

/// Why the memory of a socket cannot be had: the first thing that is asked of AF_XDP.
fn no_memory(frames: u32, source: io::Error) -> Error {
    if source.raw_os_error() != Some(libc::EAFNOSUPPORT) {
        return Error::Memory { frames, source };
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Error::Unsupported {
        release: release.trim().to_owned(),
    }
}

/// What a socket has lost since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Packets dropped for another reason than a full ring: too large for a frame, or, if the kernel copies, without
    /// one; then they are among those of `rx_fill_ring_empty` too.
    pub rx_dropped: u64,
    /// Packets dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// Packets dropped because the fill ring was empty.
    pub rx_fill_ring_empty: u64,
    /// Descriptors in the fill ring that were wrong.
    pub rx_invalid: u64,
    /// Descriptors in the transmit ring that were wrong.
    pub tx_invalid: u64,
    /// Times that the kernel looked into the transmit ring and nothing was there. Nothing bad.
    pub tx_ring_empty: u64,
    /// Frames that the kernel gave back though it did not have them. There are none.
    pub strange: u64,
}

/// A socket on one queue of one interface, with memory of its own. Of one thread.
///
/// The queue is free for another socket once this one is dropped and all of its frames are: they keep the memory, and
/// the kernel knows memory and socket as one file.
#[derive(Debug)]
pub struct Socket {
    // Before the pool: the rings go before the memory they speak of.
    rx: RxQueue,
    tx: TxQueue,
    fill: FillQueue,
    completion: CompQueue,
    pool: Rc<Pool>,
    mode: Mode,
    zero_copy: bool,
    /// So many frames stay free for packets of our own, however many come in.
    reserve: usize,
    rx_size: usize,
    tx_size: usize,
    fill_size: usize,
    strange: u64,
    /// Why it is of no use any more: the kernel says it once.
    gone: Cell<i32>,
    scratch: Box<[FrameDesc; BATCH]>,
}

impl Socket {
    /// Makes a socket, in the network namespace of this thread, with all frames free to be filled.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(config: &Config) -> Result<Self, Error> {
        let frames = config.frames;
        if !frames.is_power_of_two() || frames < 16 {
            return Err(Error::Frames(frames));
        }
        let size = |size| QueueSize::new(size).map_err(|_| Error::Frames(frames));
        let chunk = FrameSize::new(CHUNK as u32).map_err(|_| Error::Frames(frames))?;
        let umem_config = UmemConfig::builder()
            .frame_size(chunk)
            // What is sent may be all there is; what is to be filled is at most half of it.
            .comp_queue_size(size(frames)?)
            .fill_queue_size(size(frames / 2)?)
            .build()
            .map_err(|_| Error::Frames(frames))?;
        let count = NonZeroU32::new(frames).ok_or(Error::Frames(frames))?;
        let (umem, blank) =
            Umem::new(umem_config, count, false).map_err(|error| no_memory(frames, cause(&error)))?;

        let copying = match config.copying {
            Copying::Auto => BindFlags::empty(),
            Copying::Copy => BindFlags::XDP_COPY,
            Copying::ZeroCopy => BindFlags::XDP_ZEROCOPY,
        };
        let socket_config = SocketConfig::builder()
            .rx_queue_size(size(frames / 2)?)
            .tx_queue_size(size(frames / 2)?)
            // Whoever attaches the program has attached it, and puts the socket into its map.
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .xdp_flags(XdpFlags::XDP_FLAGS_DRV_MODE)
            .bind_flags(copying | BindFlags::XDP_USE_NEED_WAKEUP)
            .build();
        let (tx, rx, fill, completion) = bind(config, socket_config, &umem)?;

        let mut socket = Self {
            rx,
            tx,
            fill,
            completion,
            pool: Rc::new(Pool::new(umem, blank)),
            mode: config.mode,
            zero_copy: false,
            reserve: frames as usize / 8,
            rx_size: frames as usize / 2,
            tx_size: frames as usize / 2,
            fill_size: frames as usize / 2,
            strange: 0,
            gone: Cell::new(0),
            scratch: Box::new([FrameDesc::default(); BATCH]),
        };
        socket.zero_copy = socket.is_zero_copy();
        if config.mode == Mode::BusyPoll {
            socket
                .prefer_busy_poll(config.busy_poll, config.busy_budget)
                .map_err(Error::BusyPoll)?;
        }
        socket.refill();
        Ok(socket)
    }

    /// Takes up to `most` packets that have come in, after giving the kernel frames for the next ones. As many are
    /// put into `into`.
    ///
    /// # Errors
    /// The socket is of no use any more.
    pub fn receive(&mut self, into: &mut impl Extend<Frame>, most: usize) -> io::Result<usize> {
        self.reap();
        let mut received = 0;
        while received < most {
            // Before they are looked at: whoever starves the fill ring loses packets.
            self.refill();
            let batch = BATCH.min(most - received);
            // SAFETY: these descriptors are only written by the ring; the ring is of the same UMEM.
            let count = unsafe { self.rx.consume(&mut self.scratch[..batch]) };
            if count == 0 {
                break;
            }
            let mut strange = 0;
            let mut frames = self.scratch[..count].iter().filter_map(|desc| {
                let frame = self.pool.received(*desc);
                strange += u64::from(frame.is_none());
                frame
            });
            into.extend(&mut frames);
            // Whoever does not want them all shall not lose them.
            frames.for_each(drop);
            self.strange += strange;
            received += count;
        }
        if self.fill.needs_wakeup() {
            self.look()?;
        }
        Ok(received)
    }

    /// Packets that have come in and wait.
    #[must_use]
    pub fn waiting(&mut self) -> usize {
        self.rx.nb_avail_exact() as usize
    }

    /// As many can wait.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.rx_size
    }

    /// A free frame, for a packet of our own.
    #[must_use]
    pub fn take(&mut self) -> Option<Frame> {
        if self.pool.free() == 0 {
            self.reap();
        }
        self.pool.take()
    }

    /// Puts a packet into the ring of those to be sent. The kernel sends it at the latest with the next
    /// [`Socket::flush`].
    ///
    /// # Errors
    /// The ring is full, the packet is empty, or the frame is another socket's: the frame comes back.
    pub fn send(&mut self, mut frame: Frame) -> Result<(), Frame> {
        if !frame.is_of(&self.pool) || frame.is_empty() {
            return Err(frame);
        }
        let desc = frame.prepare_to_send();
        // SAFETY: the descriptor is of a frame of this UMEM, and nobody touches it until it is reaped: the one value
        // that would allow to is given up below.
        if unsafe { self.tx.produce_one(&desc) } == 0 {
            return Err(frame);
        }
        frame.handed_over();
        Ok(())
    }

    /// Has the kernel send what is in the ring, and takes back what it has sent. What it does not take within a
    /// bounded time stays in the ring: as many are answered.
    ///
    /// # Errors
    /// The socket is of no use any more.
    pub fn flush(&mut self) -> io::Result<usize> {
        let mut left = self.unsent();
        if left == 0 {
            self.reap();
            return Ok(0);
        }
        let mut idle = 0;
        let mut begun = None;
        loop {
            if !self.tx.needs_wakeup() {
                // A driver that looks by itself.
                break;
            }
            if let Err(problem) = self.kick() {
                match problem.raw_os_error() {
                    // It has sent a batch, or cannot take more until something has been delivered.
                    Some(libc::EAGAIN | libc::ENOBUFS | libc::EBUSY | libc::EINTR) => {}
                    _ => return Err(problem),
                }
            }
            // Its ring may be full too, then nothing is sent before it is read.
            self.reap();
            let now_left = self.unsent();
            if now_left == 0 {
                return Ok(0);
            }
            if now_left == left {
                idle += 1;
                let begun = begun.get_or_insert_with(Instant::now);
                if idle >= IDLE_KICKS || begun.elapsed() > LONGEST_FLUSH {
                    break;
                }
                // Who is to take the packets away may wait for this processor.
                thread::yield_now();
            } else {
                idle = 0;
            }
            left = now_left;
        }
        self.reap();
        Ok(self.unsent())
    }

    /// Packets in the ring that the kernel has not taken yet.
    #[must_use]
    pub fn unsent(&mut self) -> usize {
        self.tx_size - self.tx.nb_free_exact() as usize
    }

    /// Waits for a packet, in the way of the socket's mode, for no longer than this. Answers whether there is one.
    ///
    /// # Errors
    /// The socket is of no use any more.
    pub fn wait(&mut self, patience: Duration) -> io::Result<bool> {
        if self.waiting() != 0 {
            return Ok(true);
        }
        match self.mode {
            Mode::Poll => self.sleep(patience),
            Mode::Spin => {
                let until = Instant::now() + patience;
                loop {
                    for _ in 0..64 {
                        if self.waiting() != 0 {
                            return Ok(true);
                        }
                        std::hint::spin_loop();
                    }
                    if Instant::now() >= until {
                        return Ok(false);
                    }
                }
            }
            Mode::BusyPoll => {
                let until = Instant::now() + patience;
                loop {
                    self.look()?;
                    if self.waiting() != 0 {
                        return Ok(true);
                    }
                    if Instant::now() >= until {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Has the kernel look for packets, now and in this thread: what a [`Mode::BusyPoll`] socket does instead of
    /// waiting.
    ///
    /// # Errors
    /// The socket is of no use any more.
    pub fn look(&mut self) -> io::Result<()> {
        // SAFETY: nothing is read into memory: there is none.
        let outcome = unsafe {
            libc::recvfrom(
                self.as_raw_fd(),
                ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        if outcome < 0 {
            let problem = io::Error::last_os_error();
            match problem.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS | libc::EBUSY | libc::EINTR) => {}
                _ => return Err(problem),
            }
        }
        Ok(())
    }

    /// What has been lost.
    ///
    /// # Errors
    /// The socket is of no use any more: its interface is gone, for example.
    pub fn statistics(&mut self) -> io::Result<Statistics> {
        self.check()?;
        let statistics = self.rx.fd().xdp_statistics()?;
        Ok(Statistics {
            rx_dropped: statistics.rx_dropped(),
            rx_ring_full: statistics.rx_ring_full(),
            rx_fill_ring_empty: statistics.rx_fill_ring_empty_descs(),
            rx_invalid: statistics.rx_invalid_descs(),
            tx_invalid: statistics.tx_invalid_descs(),
            tx_ring_empty: statistics.tx_ring_empty_descs(),
            strange: self.strange,
        })
    }

    /// How many frames are where.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.pool.counts()
    }

    /// Whether the driver writes into our frames.
    #[must_use]
    pub fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// How it is waited for packets.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Gives the kernel frames to fill.
    fn refill(&mut self) {
        let mut room = self.fill.nb_free(self.fill_size as u32) as usize;
        // Each touch of the ring costs a cache line that the kernel has: not for a handful.
        if room < BATCH.min(self.fill_size / 2) {
            return;
        }
        loop {
            let wanted = room.min(BATCH).min(self.pool.free().saturating_sub(self.reserve));
            let mut batch = [FrameDesc::default(); BATCH];
            let mut count = 0;
            while count < wanted {
                let Some(desc) = self.pool.take_to_fill() else {
                    break;
                };
                batch[count] = desc;
                count += 1;
            }
            if count == 0 {
                return;
            }
            // SAFETY: they were free, so nobody has them but the ledger, which says now that the kernel does.
            let produced = unsafe { self.fill.produce(&batch[..count]) };
            for desc in &batch[produced..count] {
                self.pool.unfilled(desc);
            }
            if produced < count {
                return;
            }
            room -= count;
        }
    }

    /// Takes back what the kernel has sent.
    fn reap(&mut self) {
        if self.pool.counts().sending == 0 {
            return;
        }
        loop {
            // SAFETY: these descriptors are only written by the ring; the ring is of the same UMEM.
            let count = unsafe { self.completion.consume(&mut self.scratch[..]) };
            for desc in &self.scratch[..count] {
                self.strange += u64::from(!self.pool.sent(desc));
            }
            if count < BATCH {
                return;
            }
        }
    }

    fn kick(&self) -> io::Result<()> {
        // SAFETY: nothing is read from memory: there is none.
        let outcome = unsafe {
            libc::sendto(
                self.as_raw_fd(),
                ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                ptr::null(),
                0,
            )
        };
        if outcome < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn sleep(&self, patience: Duration) -> io::Result<bool> {
        let mut fd = libc::pollfd {
            fd: self.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let time = libc::timespec {
            tv_sec: patience.as_secs().min(3600) as libc::time_t,
            tv_nsec: patience.subsec_nanos().into(),
        };
        // SAFETY: one descriptor and one time, both of this function's stack; no signal mask.
        let ready = unsafe { libc::ppoll(&raw mut fd, 1, &raw const time, ptr::null()) };
        if ready < 0 {
            let problem = io::Error::last_os_error();
            if problem.kind() != io::ErrorKind::Interrupted {
                return Err(problem);
            }
            return Ok(false);
        }
        if fd.revents & libc::POLLIN == 0 {
            // Nothing wakes who waits at an interface that has gone.
            self.check()?;
        }
        Ok(fd.revents & libc::POLLIN != 0)
    }

    /// A socket that only waits learns of its interface's end nowhere else.
    fn check(&self) -> io::Result<()> {
        let problem = self.option(libc::SOL_SOCKET, libc::SO_ERROR)?;
        if problem != 0 {
            self.gone.set(problem);
        }
        match self.gone.get() {
            0 => Ok(()),
            problem => Err(io::Error::from_raw_os_error(problem)),
        }
    }

    fn is_zero_copy(&self) -> bool {
        self.option(libc::SOL_XDP, libc::XDP_OPTIONS)
            .is_ok_and(|options| options & libc::XDP_OPTIONS_ZEROCOPY as i32 != 0)
    }

    fn prefer_busy_poll(&self, time: u32, budget: u32) -> io::Result<()> {
        self.set_option(libc::SO_PREFER_BUSY_POLL, 1)?;
        self.set_option(libc::SO_BUSY_POLL, time)?;
        self.set_option(libc::SO_BUSY_POLL_BUDGET, budget)
    }

    fn option(&self, level: i32, option: i32) -> io::Result<i32> {
        let mut value: i32 = 0;
        let mut length = size_of::<i32>() as libc::socklen_t;
        // SAFETY: both pointers are to this function's stack, and the length is that of the value.
        let outcome = unsafe {
            libc::getsockopt(
                self.as_raw_fd(),
                level,
                option,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        if outcome != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(value)
    }

    fn set_option(&self, option: i32, value: u32) -> io::Result<()> {
        // SAFETY: the pointer is to an argument of this function, the length is its length.
        let outcome = unsafe {
            libc::setsockopt(
                self.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const value).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        };
        if outcome != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.rx.fd().as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the rings are, which is as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

/// Binds a socket. Who had the queue before may have gone only just now: the kernel cleans up behind a process later.
fn bind(
    config: &Config,
    socket: SocketConfig,
    umem: &Umem,
) -> Result<(TxQueue, RxQueue, FillQueue, CompQueue), Error> {
    let name = CString::new(config.interface.as_str())
        .ok()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Error::Name(config.interface.clone()))?;
    let interface = Interface::new(name);
    let failed = |source| Error::Bind {
        interface: config.interface.clone(),
        queue: config.queue,
        source,
    };
    let begun = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        // SAFETY: the UMEM is not shared, and program loading is inhibited.
        match unsafe { xsk_rs::Socket::new(socket, umem, &interface, config.queue) } {
            Ok((tx, rx, Some((fill, completion)))) => return Ok((tx, rx, fill, completion)),
            Ok((_, _, None)) => return Err(failed(io::Error::from(io::ErrorKind::InvalidData))),
            Err(error) => {
                let source = cause(&error);
                if source.raw_os_error() != Some(libc::EBUSY) {
                    return Err(failed(source));
                }
            }
        }
        let left = config.patience.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(Error::Busy {
                interface: config.interface.clone(),
                queue: config.queue,
                waited: begun.elapsed(),
            });
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What the kernel said.
fn cause(error: &(dyn std::error::Error + 'static)) -> io::Error {
    error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error)
        .map_or_else(
            || io::Error::other(error.to_string()),
            io::Error::from_raw_os_error,
        )
}
