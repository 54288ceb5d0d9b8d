//! Captures the packets on an interface. Tests use this to check which packets the firewall has passed.

use std::{
    io,
    net::IpAddr,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::{
    ns::{Ns, wait_until},
    packet::{Packet, parse},
};

const ETH_P_ALL: u16 = 0x0003;

/// A capture of the packets on one interface in both directions. Dropping it ends the capture.
#[derive(Debug)]
pub struct Capture {
    packets: Arc<Mutex<Vec<Packet>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Starts to capture the IP packets on `interface` of `ns`.
    pub fn start(ns: &Ns, interface: &str) -> Result<Self> {
        Self::start_where(ns, interface, |_| true)
    }

    /// Starts to capture the IP packets on `interface` of `ns` for which `wanted` returns true.
    pub fn start_where(
        ns: &Ns,
        interface: &str,
        wanted: impl Fn(&Packet) -> bool + Send + 'static,
    ) -> Result<Self> {
        let index = ns.ifindex(interface)?;
        let socket = ns.enter(|| open(index)).context("packet socket")?;
        let packets = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (packets, stop) = (packets.clone(), stop.clone());
            move || receive(&socket, &wanted, &packets, &stop)
        });
        Ok(Self {
            packets,
            stop,
            thread: Some(thread),
        })
    }

    /// Returns the packets captured so far.
    #[must_use]
    pub fn packets(&self) -> Vec<Packet> {
        self.packets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Returns the number of packets captured so far for which `wanted` returns true.
    pub fn count(&self, wanted: impl Fn(&Packet) -> bool) -> usize {
        self.packets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .filter(|p| wanted(p))
            .count()
    }

    /// Returns the number of incoming packets from `source` captured so far.
    #[must_use]
    pub fn received_from(&self, source: IpAddr) -> usize {
        self.count(|p| !p.outgoing && p.source == source)
    }

    /// Waits until a packet for which `wanted` returns true has been captured. Packets captured before the call count.
    pub fn wait(&self, what: &str, timeout: Duration, wanted: impl Fn(&Packet) -> bool) -> Result<()> {
        self.wait_for(1, what, timeout, wanted)
    }

    /// Waits until `count` packets for which `wanted` returns true have been captured. Packets captured before the call
    /// count.
    pub fn wait_for(
        &self,
        count: usize,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Packet) -> bool,
    ) -> Result<()> {
        wait_until(what, timeout, || self.count(&wanted) >= count)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn open(index: u32) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::PACKET,
        Type::RAW,
        Some(Protocol::from(i32::from(ETH_P_ALL.to_be()))),
    )?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the address of a packet socket is a `sockaddr_ll`, which fits into the zeroed storage.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETH_P_ALL.to_be();
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the storage holds a `sockaddr_ll` of that size, initialised above.
    let address = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
    socket.bind(&address)?;
    // The default receive buffer holds only a few hundred packets. If the buffer cannot be enlarged, the capture can
    // miss packets of a fast sender.
    let _ = socket.set_recv_buffer_size(8 << 20);
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    Ok(socket)
}

fn receive(
    socket: &Socket,
    wanted: &dyn Fn(&Packet) -> bool,
    packets: &Mutex<Vec<Packet>>,
    stop: &AtomicBool,
) {
    let mut buffer = vec![0u8; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let mut from = std::mem::MaybeUninit::<libc::sockaddr_ll>::zeroed();
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `buffer` and `from` are valid for writes of the lengths that are passed with them, and outlive the
        // call.
        let n = unsafe {
            libc::recvfrom(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
                from.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let Ok(n) = usize::try_from(n) else { continue };
        // SAFETY: `from` was zeroed, and every bit pattern is a valid `sockaddr_ll`.
        let from = unsafe { from.assume_init() };
        if let Some(packet) = parse(&buffer[..n], from.sll_pkttype == libc::PACKET_OUTGOING)
            && wanted(&packet)
        {
            packets
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(packet);
        }
    }
}
