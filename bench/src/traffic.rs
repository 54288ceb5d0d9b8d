//! A stream of UDP frames out of an interface, as fast as one thread can send them.
//!
//! Frames are made once and sent through a packet socket, many with one system call. Over a veth, the kernel does all
//! further work (receiving side, forwarding, filters) in the sending thread before the next frame, so the rate is that of
//! one CPU.

use std::{
    io::IoSlice,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, MultiHeaders, SockFlag, SockType, bind, send, sendmmsg, socket,
    },
    time::{ClockId, clock_gettime},
};
use palisade_testbed::Ns;

/// Frames per system call.
pub const BATCH: usize = 64;
/// Bytes of a frame: the shortest that Ethernet has, without its checksum.
const FRAME: usize = 60;

/// A frame that can be sent.
pub type Frame = [u8; FRAME];

/// A MAC address.
pub type Mac = [u8; 6];

/// Fields that all frames share.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Sender's MAC address.
    pub from_mac: Mac,
    /// MAC address of the next hop.
    pub to_mac: Mac,
    /// Source address.
    pub from: Ipv4Addr,
    /// Destination address.
    pub to: Ipv4Addr,
}

impl Stream {
    /// Returns a UDP frame filled with zeros, without a UDP checksum (optional over IPv4, RFC 768).
    #[must_use]
    pub fn frame(&self, from_port: u16, to_port: u16) -> Frame {
        let mut frame = [0; FRAME];
        frame[..6].copy_from_slice(&self.to_mac);
        frame[6..12].copy_from_slice(&self.from_mac);
        frame[12..14].copy_from_slice(&0x0800_u16.to_be_bytes());
        let ip = &mut frame[14..];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((FRAME - 14) as u16).to_be_bytes());
        ip[8] = 64;
        ip[9] = 17;
        ip[12..16].copy_from_slice(&self.from.octets());
        ip[16..20].copy_from_slice(&self.to.octets());
        let sum = palisade_testbed::packet::checksum(0, &ip[..20]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let udp = &mut ip[20..];
        udp[..2].copy_from_slice(&from_port.to_be_bytes());
        udp[2..4].copy_from_slice(&to_port.to_be_bytes());
        udp[4..6].copy_from_slice(&((FRAME - 34) as u16).to_be_bytes());
        frame
    }
}

/// A packet socket that only sends.
pub struct Sender {
    socket: OwnedFd,
}

impl Sender {
    /// Opens a socket for `interface`, which must be in the calling thread's namespace.
    pub fn open(interface: &str) -> Result<Self> {
        // Protocol 0: the socket receives nothing, so it does not slow the traffic (packet(7)).
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
            .context("a packet socket (needs root)")?;
        bind(socket.as_raw_fd(), &link(interface)?).with_context(|| interface.to_owned())?;
        Ok(Self { socket })
    }

    /// Returns a sender of batches.
    #[must_use]
    pub fn batches(&self) -> Batches<'_> {
        Batches {
            sender: self,
            headers: MultiHeaders::preallocate(BATCH, None),
        }
    }

    /// Sends each frame once.
    pub fn send(&self, frames: &[Frame]) -> Result<()> {
        for frame in frames {
            send(self.socket.as_raw_fd(), frame, MsgFlags::empty()).context("sending a frame")?;
        }
        Ok(())
    }

    /// Sends the frames in turn for `duration`. Returns how many were sent, and the CPU time, which excludes other load on
    /// the machine.
    pub fn send_for(&self, frames: &[Frame], duration: Duration) -> Result<(u64, Duration)> {
        ensure!(!frames.is_empty(), "no frames");
        let none: [Option<LinkAddr>; BATCH] = [None; BATCH];
        let mut headers = MultiHeaders::preallocate(BATCH, None);
        let mut turn = frames.iter().cycle();
        let (begin, used) = (Instant::now(), processor_time()?);
        let mut sent = 0;
        while begin.elapsed() < duration {
            let batch: Vec<_> = turn
                .by_ref()
                .take(BATCH)
                .map(|frame| [IoSlice::new(frame)])
                .collect();
            let fd = self.socket.as_raw_fd();
            match sendmmsg(fd, &mut headers, &batch, none, [], MsgFlags::empty()) {
                Ok(results) => sent += results.count() as u64,
                Err(Errno::ENOBUFS | Errno::EAGAIN) => {}
                Err(error) => return Err(error).context("sending frames"),
            }
        }
        Ok((sent, processor_time()?.saturating_sub(used)))
    }
}

/// Sends batches of frames of any length, with reused buffers.
pub struct Batches<'a> {
    sender: &'a Sender,
    headers: MultiHeaders<LinkAddr>,
}

impl Batches<'_> {
    /// Sends up to [`BATCH`] frames with one system call. Returns how many were sent.
    pub fn send(&mut self, frames: &[Vec<u8>]) -> Result<usize> {
        let frames = &frames[..frames.len().min(BATCH)];
        let batch: Vec<_> = frames.iter().map(|frame| [IoSlice::new(frame)]).collect();
        let none: [Option<LinkAddr>; BATCH] = [None; BATCH];
        let fd = self.sender.socket.as_raw_fd();
        match sendmmsg(
            fd,
            &mut self.headers,
            &batch,
            &none[..batch.len()],
            [],
            MsgFlags::empty(),
        ) {
            Ok(results) => Ok(results.count()),
            Err(Errno::ENOBUFS | Errno::EAGAIN) => Ok(0),
            Err(error) => Err(error).context("sending frames"),
        }
    }
}

/// Returns the CPU time of this thread.
fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// Returns the link-layer address of an interface in this thread's namespace.
fn link(interface: &str) -> Result<LinkAddr> {
    nix::ifaddrs::getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .with_context(|| format!("no interface {interface}"))
}

/// Returns the MAC address of an interface in a namespace.
pub fn mac(ns: &Ns, interface: &str) -> Result<Mac> {
    ns.enter(|| link(interface))?
        .addr()
        .with_context(|| format!("{interface} has no MAC address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_says_what_it_is_asked_to() {
        let stream = Stream {
            from_mac: [2, 0, 0, 0, 0, 1],
            to_mac: [2, 0, 0, 0, 0, 2],
            from: Ipv4Addr::new(198, 51, 100, 2),
            to: Ipv4Addr::new(10, 0, 1, 10),
        };
        let frame = stream.frame(20_001, 5_000);
        let packet = palisade_testbed::packet::parse(&frame, false).expect("a packet");
        assert_eq!(packet.source, stream.from);
        assert_eq!(packet.destination, stream.to);
        assert_eq!(
            palisade_testbed::packet::checksum(0, &frame[14..34]),
            0,
            "the header's checksum"
        );
        assert_eq!(frame[34..38], [78, 33, 19, 136]);
    }
}
