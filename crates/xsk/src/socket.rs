//! An AF_XDP socket with its UMEM and four rings (`Documentation/networking/af_xdp.rst` of the kernel).
//!
//! This module depends on the frames, their states, and xsk-rs. Start at [`Socket::new`], then [`Socket::receive`],
//! [`Socket::send`] and [`Socket::flush`].

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
    frame_states::Counts,
};

/// Maximum number of descriptors per ring operation.
const BATCH: usize = 64;
/// Consecutive wake-ups without progress after which [`Socket::flush`] leaves the remaining packets in the transmit
/// ring.
const MAX_STALLED_KICKS: u32 = 64;
/// Time since the first wake-up without progress after which [`Socket::flush`] leaves the remaining packets in the
/// transmit ring at the next wake-up without progress.
const MAX_FLUSH_STALL: Duration = Duration::from_millis(2);
/// Delay before the first retry of `bind`. The delay doubles with each retry, up to [`MAX_BIND_RETRY`].
const MIN_BIND_RETRY: Duration = Duration::from_millis(1);
/// Longest delay between two retries of `bind`.
const MAX_BIND_RETRY: Duration = Duration::from_millis(50);

/// How a thread waits for packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// The thread sleeps in `poll` until a packet arrives.
    #[default]
    Poll,
    /// The thread polls the receive ring and never sleeps.
    Spin,
    /// The thread runs the interface's NAPI itself while it waits (`SO_PREFER_BUSY_POLL`).
    BusyPoll,
}

/// Whether the kernel copies packets between its buffers and the UMEM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CopyMode {
    /// The kernel copies unless the driver supports zero-copy.
    #[default]
    Auto,
    /// The kernel copies (`XDP_COPY`).
    Copy,
    /// The kernel does not copy (`XDP_ZEROCOPY`). Binding fails if the driver does not support zero-copy.
    ZeroCopy,
}

/// Configuration of a socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Name of the interface, in the network namespace of the calling thread.
    pub interface: String,
    /// Queue of the interface.
    pub queue: u32,
    /// Number of frames; each takes a page of locked memory. Must be a power of two, at least 16.
    pub frames: u32,
    /// Copy or zero-copy.
    pub copy_mode: CopyMode,
    /// How the thread waits for packets.
    pub mode: Mode,
    /// Time for which the kernel polls the driver in [`Mode::BusyPoll`] (`SO_BUSY_POLL`), µs.
    pub busy_poll: u32,
    /// Maximum number of packets per poll of the driver in [`Mode::BusyPoll`] (`SO_BUSY_POLL_BUDGET`).
    pub busy_budget: u32,
    /// Maximum time for which [`Socket::new`] retries while another socket is bound to the queue.
    pub bind_timeout: Duration,
}

impl Config {
    /// Returns the default configuration for a queue of an interface.
    #[must_use]
    pub fn new(interface: &str, queue: u32) -> Self {
        Self {
            interface: interface.to_owned(),
            queue,
            frames: 4096,
            copy_mode: CopyMode::Auto,
            mode: Mode::Poll,
            busy_poll: 20,
            busy_budget: 64,
            bind_timeout: Duration::from_secs(2),
        }
    }
}

/// The reason why a socket could not be made.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The number of frames is not a power of two, or too small.
    #[error("{0} frames: must be a power of two, at least 16")]
    Frames(u32),
    /// The interface name is empty or contains a zero byte.
    #[error("not an interface name: {0:?}")]
    Name(String),
    /// The kernel is built without AF_XDP.
    #[error("Linux {release} has no AF_XDP (CONFIG_XDP_SOCKETS), which brings packets to the workers")]
    Unsupported {
        /// The kernel's release.
        release: String,
    },
    /// The UMEM could not be allocated or registered.
    #[error("UMEM of {frames} frames of 4096 bytes: {source}")]
    Memory {
        /// Number of frames.
        frames: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another socket stayed bound to the queue.
    #[error("queue {queue} of {interface} is in use, still after {waited:?}")]
    Busy {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// Time for which binding was retried.
        waited: Duration,
    },
    /// Binding to the queue failed.
    #[error("socket for queue {queue} of {interface}: {source}")]
    Bind {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// A socket option of busy polling could not be set.
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

/// Returns the error for a UMEM that could not be made. xsk-rs opens an AF_XDP socket to register the UMEM; a kernel
/// without AF_XDP refuses to open the socket (`EAFNOSUPPORT`).
fn umem_error(frames: u32, source: io::Error) -> Error {
    if source.raw_os_error() != Some(libc::EAFNOSUPPORT) {
        return Error::Memory { frames, source };
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Error::Unsupported {
        release: release.trim().to_owned(),
    }
}

/// Losses and other statistics of a socket since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Packets dropped because they were larger than a frame or, in copy mode, because the fill ring was empty. In the
    /// second case the kernel counts the packet in `rx_fill_ring_empty` too.
    pub rx_dropped: u64,
    /// Packets dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// Number of times that the kernel needed a frame and found the fill ring empty. In copy mode, it drops a packet
    /// each time.
    pub rx_fill_ring_empty: u64,
    /// Invalid descriptors in the fill ring.
    pub rx_invalid: u64,
    /// Invalid descriptors in the transmit ring.
    pub tx_invalid: u64,
    /// Number of times that the kernel found the transmit ring empty, which is not a loss.
    pub tx_ring_empty: u64,
    /// Descriptors in the receive and completion rings that are invalid or whose frame the kernel did not own. A value
    /// other than 0 indicates a bug in the kernel.
    pub unexpected: u64,
}

/// A socket on one queue of one interface, with a UMEM of its own. It stays on the thread that made it.
///
/// Another socket can bind to the queue only after this socket and all of its frames have been dropped: frames keep the
/// UMEM alive, UMEM and socket share one file descriptor, and the kernel releases the queue when that descriptor is
/// closed.
#[derive(Debug)]
pub struct Socket {
    rx: RxQueue,
    tx: TxQueue,
    fill: FillQueue,
    completion: CompQueue,
    pool: Rc<Pool>,
    mode: Mode,
    zero_copy: bool,
    /// Number of free frames that are kept out of the fill ring, so that [`Socket::alloc`] succeeds under a flood.
    reserve: usize,
    rx_size: usize,
    tx_size: usize,
    fill_size: usize,
    unexpected: u64,
    /// The error number (errno) with which the socket failed; 0 if it has not failed. Reading `SO_ERROR` clears the
    /// error in the kernel, so the number is stored here.
    fatal_errno: Cell<i32>,
    scratch: Box<[FrameDesc; BATCH]>,
}

impl Socket {
    /// Makes a socket in the network namespace of the calling thread and fills its fill ring.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(config: &Config) -> Result<Self, Error> {
        let frames = config.frames;
        if !frames.is_power_of_two() || frames < 16 {
            return Err(Error::Frames(frames));
        }
        let size = |size| QueueSize::new(size).map_err(|_| Error::Frames(frames));
        let chunk = FrameSize::new(CHUNK as u32).map_err(|_| Error::Frames(frames))?;
        let umem_config = UmemConfig::builder()
            .frame_size(chunk)
            // All frames can be in transmission at once, but at most half of them are in the fill ring.
            .comp_queue_size(size(frames)?)
            .fill_queue_size(size(frames / 2)?)
            .build()
            .map_err(|_| Error::Frames(frames))?;
        let count = NonZeroU32::new(frames).ok_or(Error::Frames(frames))?;
        let (umem, blank) =
            Umem::new(umem_config, count, false).map_err(|error| umem_error(frames, cause(&error)))?;

        let copy_flags = match config.copy_mode {
            CopyMode::Auto => BindFlags::empty(),
            CopyMode::Copy => BindFlags::XDP_COPY,
            CopyMode::ZeroCopy => BindFlags::XDP_ZEROCOPY,
        };
        let socket_config = SocketConfig::builder()
            .rx_queue_size(size(frames / 2)?)
            .tx_queue_size(size(frames / 2)?)
            // Prevent libxdp from loading a program: the datapath attaches a program and inserts the socket into the
            // program's map.
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .xdp_flags(XdpFlags::XDP_FLAGS_DRV_MODE)
            .bind_flags(copy_flags | BindFlags::XDP_USE_NEED_WAKEUP)
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
            unexpected: 0,
            fatal_errno: Cell::new(0),
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

    /// Refills the fill ring and moves at most `limit` packets from the receive ring to `into`. Returns the number of
    /// descriptors removed from the ring; some of them can be invalid (see [`Statistics::unexpected`]).
    ///
    /// # Errors
    /// The kernel could not be woken, for example because the interface is down.
    pub fn receive(&mut self, into: &mut impl Extend<Frame>, limit: usize) -> io::Result<usize> {
        self.reap();
        let mut received = 0;
        while received < limit {
            // Refill before each batch: the kernel drops packets while the fill ring is empty.
            self.refill();
            let batch = BATCH.min(limit - received);
            // SAFETY: the ring only writes into `scratch`, and its descriptors are of this socket's UMEM.
            let count = unsafe { self.rx.consume(self.scratch.get_mut(..batch).unwrap_or_default()) };
            if count == 0 {
                break;
            }
            let mut unexpected = 0;
            let mut frames = self.scratch.iter().take(count).filter_map(|desc| {
                let frame = self.pool.received(*desc);
                unexpected += u64::from(frame.is_none());
                frame
            });
            into.extend(&mut frames);
            // `into` can stop before the last frame. Consume the rest, so that each descriptor's frame is freed.
            frames.for_each(drop);
            self.unexpected += unexpected;
            received += count;
        }
        if self.fill.needs_wakeup() {
            self.busy_poll_once()?;
        }
        Ok(received)
    }

    /// Returns the number of packets in the receive ring.
    #[must_use]
    pub fn rx_available(&mut self) -> usize {
        self.rx.nb_avail_exact() as usize
    }

    /// Returns the size of the receive ring.
    #[must_use]
    pub fn rx_capacity(&self) -> usize {
        self.rx_size
    }

    /// Returns a free frame, for a packet that the caller makes. `None` if all frames are in use.
    #[must_use]
    pub fn alloc(&mut self) -> Option<Frame> {
        if self.pool.free() == 0 {
            self.reap();
        }
        self.pool.alloc()
    }

    /// Puts a packet into the transmit ring. The packet can remain in the ring until the next call of
    /// [`Socket::flush`].
    ///
    /// # Errors
    /// The ring is full, the packet is empty, or the frame belongs to another socket. Returns the frame.
    pub fn send(&mut self, mut frame: Frame) -> Result<(), Frame> {
        if !frame.is_of(&self.pool) || frame.is_empty() {
            return Err(frame);
        }
        let desc = frame.prepare_to_send();
        // SAFETY: the descriptor is of this UMEM (`is_of`). `into_tx` below consumes the frame's only owner, so user
        // space does not access the chunk before the chunk returns through the completion ring.
        if unsafe { self.tx.produce_one(&desc) } == 0 {
            return Err(frame);
        }
        frame.into_tx();
        Ok(())
    }

    /// Wakes the kernel to send the packets in the transmit ring, and frees the frames of sent packets. Returns the
    /// number of packets that remain in the ring because the kernel made no progress, or because the driver sends them
    /// without being woken.
    ///
    /// # Errors
    /// The kernel could not be woken, for example because the interface is down.
    pub fn flush(&mut self) -> io::Result<usize> {
        let mut left = self.unsent();
        if left == 0 {
            self.reap();
            return Ok(0);
        }
        let mut stalled_kicks = 0;
        let mut stalled_since = None;
        loop {
            if !self.tx.needs_wakeup() {
                // The driver polls the ring without being woken.
                break;
            }
            if let Err(error) = self.kick() {
                match error.raw_os_error() {
                    // Temporary errors: for example, the kernel has reached its limit of packets per call.
                    Some(libc::EAGAIN | libc::ENOBUFS | libc::EBUSY | libc::EINTR) => {}
                    _ => return Err(error),
                }
            }
            // The kernel sends nothing while the completion ring is full.
            self.reap();
            let now_left = self.unsent();
            if now_left == 0 {
                return Ok(0);
            }
            if now_left == left {
                stalled_kicks += 1;
                let since = stalled_since.get_or_insert_with(Instant::now);
                if stalled_kicks >= MAX_STALLED_KICKS || since.elapsed() > MAX_FLUSH_STALL {
                    break;
                }
                // The thread that drains the device's queue is possibly waiting for this CPU.
                thread::yield_now();
            } else {
                stalled_kicks = 0;
            }
            left = now_left;
        }
        self.reap();
        Ok(self.unsent())
    }

    /// Returns the number of packets in the transmit ring that the kernel has not taken yet.
    #[must_use]
    pub fn unsent(&mut self) -> usize {
        self.tx_size - self.tx.nb_free_exact() as usize
    }

    /// Waits for a packet according to the socket's mode, at most for `timeout`. Returns whether a packet is available.
    ///
    /// # Errors
    /// A system call failed, for example because the interface is down.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        if self.rx_available() != 0 {
            return Ok(true);
        }
        match self.mode {
            Mode::Poll => self.sleep(timeout),
            Mode::Spin => {
                let until = Instant::now() + timeout;
                loop {
                    for _ in 0..64 {
                        if self.rx_available() != 0 {
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
                let until = Instant::now() + timeout;
                loop {
                    self.busy_poll_once()?;
                    if self.rx_available() != 0 {
                        return Ok(true);
                    }
                    if Instant::now() >= until {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Enters the kernel once on the receive side (`recvfrom`). The call wakes a driver that waits for fill ring
    /// entries and, in [`Mode::BusyPoll`], runs the interface's NAPI in this thread.
    ///
    /// # Errors
    /// A system call failed, for example because the interface is down.
    pub fn busy_poll_once(&mut self) -> io::Result<()> {
        // SAFETY: the buffer has length zero and no address is requested, so the kernel writes nothing.
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
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS | libc::EBUSY | libc::EINTR) => {}
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns the statistics of this socket.
    ///
    /// # Errors
    /// The interface is gone, or the kernel does not return the statistics.
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
            unexpected: self.unexpected,
        })
    }

    /// Returns the number of frames in each state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.pool.counts()
    }

    /// Returns whether the driver uses the UMEM without a copy.
    #[must_use]
    pub fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Returns how the socket waits for packets.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Moves free frames to the fill ring, except the reserve.
    fn refill(&mut self) {
        let mut room = self.fill.nb_free(self.fill_size as u32) as usize;
        // Refill only when there is room for a batch: each update of the ring's producer index invalidates the cached
        // index on the CPU on which the kernel reads it.
        if room < BATCH.min(self.fill_size / 2) {
            return;
        }
        loop {
            let wanted = room.min(BATCH).min(self.pool.free().saturating_sub(self.reserve));
            let mut batch = [FrameDesc::default(); BATCH];
            let mut count = 0;
            for slot in batch.iter_mut().take(wanted) {
                let Some(desc) = self.pool.take_to_fill() else {
                    break;
                };
                *slot = desc;
                count += 1;
            }
            if count == 0 {
                return;
            }
            // SAFETY: the frames were free, so no `Frame` owns them, and `take_to_fill` has set their state to
            // `Receiving`.
            let produced = unsafe { self.fill.produce(batch.get(..count).unwrap_or_default()) };
            for desc in batch.iter().take(count).skip(produced) {
                self.pool.unfilled(desc);
            }
            if produced < count {
                return;
            }
            room -= count;
        }
    }

    /// Frees the frames in the completion ring.
    fn reap(&mut self) {
        if self.pool.counts().sending == 0 {
            return;
        }
        loop {
            // SAFETY: the ring only writes into `scratch`, and its descriptors are of this socket's UMEM.
            let count = unsafe { self.completion.consume(&mut self.scratch[..]) };
            for desc in self.scratch.iter().take(count) {
                self.unexpected += u64::from(!self.pool.sent(desc));
            }
            if count < BATCH {
                return;
            }
        }
    }

    /// Enters the kernel to send from the transmit ring (`sendto`).
    fn kick(&self) -> io::Result<()> {
        // SAFETY: the buffer has length zero and there is no address, so the kernel reads nothing.
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

    fn sleep(&self, timeout: Duration) -> io::Result<bool> {
        let mut fd = libc::pollfd {
            fd: self.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let time = libc::timespec {
            tv_sec: timeout.as_secs().min(3600) as libc::time_t,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: the first two arguments describe one `pollfd`, which outlives the call, as does `time`. The signal
        // mask is null, so the kernel does not read it.
        let ready = unsafe { libc::ppoll(&raw mut fd, 1, &raw const time, ptr::null()) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
            return Ok(false);
        }
        if fd.revents & libc::POLLIN == 0 {
            // `poll` reports no event for a socket whose interface is gone (`xsk_poll`), so check for an error whenever
            // no packet is available.
            self.check()?;
        }
        Ok(fd.revents & libc::POLLIN != 0)
    }

    /// Returns the error of a socket that has failed, for example because its interface is gone. A thread that only
    /// waits for packets, without calling `sendto` or `recvfrom`, finds such a failure only through `SO_ERROR`.
    fn check(&self) -> io::Result<()> {
        let error = self.option(libc::SOL_SOCKET, libc::SO_ERROR)?;
        if error != 0 {
            self.fatal_errno.set(error);
        }
        match self.fatal_errno.get() {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
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
        // SAFETY: both pointers are to variables on this function's stack, and `length` is the size of `value`.
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
        // SAFETY: the pointer is to an argument of this function, and the length is the size of that argument.
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
        // SAFETY: the rings keep the descriptor open, and they live as long as `self`, which the returned descriptor
        // borrows.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

/// Binds a socket. Retries while the queue is in use (`EBUSY`), because the kernel can release a queue some time after
/// the process that used the queue has ended.
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
    let started = Instant::now();
    let mut retry = MIN_BIND_RETRY;
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
        let left = config.bind_timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(Error::Busy {
                interface: config.interface.clone(),
                queue: config.queue,
                waited: started.elapsed(),
            });
        }
        thread::sleep(retry.min(left));
        retry = (retry * 2).min(MAX_BIND_RETRY);
    }
}

/// Returns the system call error that caused an error of xsk-rs. Without such a cause, returns an error with the same
/// text.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_af_xdp_is_named_with_the_option_it_lacks() {
        let error = |errno| umem_error(64, io::Error::from_raw_os_error(errno));
        let unsupported = error(libc::EAFNOSUPPORT);
        let text = unsupported.to_string();
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert!(
            text.starts_with(&format!("Linux {} has no AF_XDP", release.trim()))
                && text.contains("CONFIG_XDP_SOCKETS"),
            "{text}"
        );
        assert_eq!(io::Error::from(unsupported).kind(), io::ErrorKind::Unsupported);
        // Every other error is reported as [`Error::Memory`].
        let other = error(libc::ENOMEM);
        assert!(matches!(other, Error::Memory { frames: 64, .. }), "{other}");
    }
}
