//! Netlink requests, answers and sockets. Every length in an answer is checked. A socket belongs to the network
//! namespace of the thread that opens it.
//!
//! Hand-written: the crate `netlink-packet-route` covers only rtnetlink. nftables, ctnetlink, `sock_diag` and generic
//! netlink need this code anyway; with that crate for links and tc, there would be two netlink stacks.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use super::SyscallError;

type Result<T> = std::result::Result<T, SyscallError>;

const HEADER: usize = size_of::<libc::nlmsghdr>();
/// Mask of an attribute type without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
const TYPE_MASK: u16 = 0x3fff;

/// Request under construction.
pub(crate) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// Returns a request of message type `kind`; NLM_F_REQUEST is added to `flags`.
    pub(crate) fn new(kind: u16, flags: i32) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&((flags | libc::NLM_F_REQUEST) as u16).to_ne_bytes());
        Self { bytes }
    }

    /// Appends the fixed part of the message, which follows the header.
    pub(crate) fn fixed(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Appends an attribute.
    pub(crate) fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends an attribute that is a list of attributes.
    pub(crate) fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self = fill(self.attr(kind | libc::NLA_F_NESTED as u16, &[]));
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// Returns the bytes after the header.
    #[cfg(test)]
    pub(crate) fn payload(&self) -> &[u8] {
        &self.bytes[HEADER..]
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// Iterator over the attributes of a message or of a nested attribute: (type without flags, value). Ends at the first
/// attribute whose length does not fit.
pub(crate) struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.0, 0)?);
        let kind = u16_at(self.0, 2)? & TYPE_MASK;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    }
}

/// Returns the value of the first attribute of a type.
pub(crate) fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes(attributes)
        .find(|&(k, _)| k == kind)
        .map(|(_, value)| value)
}

/// Returns two bytes as a number in host byte order.
pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(
        bytes.get(offset..offset + 2)?.try_into().ok()?,
    ))
}

/// Returns four bytes as a number in host byte order.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(
        bytes.get(offset..offset + 4)?.try_into().ok()?,
    ))
}

/// Returns a string up to its first zero byte.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Netlink socket of one protocol.
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub(crate) fn open(protocol: libc::c_int) -> Result<Self> {
        // SAFETY: socket takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if fd < 0 {
            return Err(SyscallError::last(format!(
                "socket(AF_NETLINK, protocol {protocol})"
            )));
        }
        // SAFETY: `fd` was just opened, and no other value owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let timeout = libc::timeval {
            tv_sec: 10,
            tv_usec: 0,
        };
        // SAFETY: `timeout` is valid for its own size.
        let answer = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                std::ptr::from_ref(&timeout).cast(),
                size_of_val(&timeout) as libc::socklen_t,
            )
        };
        if answer < 0 {
            return Err(SyscallError::last("setsockopt(SO_RCVTIMEO) of a netlink socket"));
        }
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends a request and waits for the kernel's acknowledgement. `call` names the request in errors.
    pub(crate) fn execute(&mut self, request: Request, call: &str) -> Result<()> {
        self.exchange(request, libc::NLM_F_ACK, call, &mut |_, _| {})
    }

    /// Sends a request and calls `each` with type and payload of each message of the answer.
    pub(crate) fn query(
        &mut self,
        request: Request,
        flags: i32,
        call: &str,
        each: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<()> {
        self.exchange(request, flags, call, each)
    }

    /// Returns the port id of the socket. The kernel's notifications about changes that this socket has requested carry
    /// this id.
    pub(crate) fn port(&self) -> Result<u32> {
        // SAFETY: zero is a valid value of every field.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` and `length` are valid for writing, and `length` is the size of `address`.
        let answer =
            unsafe { libc::getsockname(self.fd.as_raw_fd(), (&raw mut address).cast(), &raw mut length) };
        if answer < 0 {
            return Err(SyscallError::last("getsockname of a netlink socket"));
        }
        Ok(address.nl_pid)
    }

    /// Binds the socket to a port id before the first request.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: zero is a valid value of every field. Port id 0 lets the kernel choose the id; group mask 0 joins no
        // multicast group.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` is valid for its own size.
        let answer = unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), length) };
        if answer < 0 {
            return Err(SyscallError::last("bind of a netlink socket"));
        }
        Ok(())
    }

    /// Sends requests as one nfnetlink transaction and waits for the answer. An error contains the index of the failed
    /// request, or `None` if the error concerns the whole transaction.
    pub(crate) fn batch(
        &mut self,
        requests: Vec<Request>,
        subsystem: u16,
        call: &str,
    ) -> std::result::Result<(), (Option<usize>, SyscallError)> {
        const BEGIN: u16 = 0x10;
        const END: u16 = 0x11;
        let [high, low] = subsystem.to_be_bytes();
        // struct nfgenmsg, with the number of the subsystem as resource id.
        let limit = |kind| Request::new(kind, 0).fixed(&[0, 0, high, low]);
        let first = self.sequence + 1;
        let count = requests.len();
        let mut bytes = limit(BEGIN).finish(first);
        for (number, mut request) in requests.into_iter().enumerate() {
            // The last request has NLM_F_ACK, since only kernels from 6.10 on acknowledge the end of a batch.
            if number + 1 == count {
                let flags = u16_at(&request.bytes, 6).unwrap_or(0) | libc::NLM_F_ACK as u16;
                request.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
            }
            bytes.extend(request.finish(first + 1 + number as u32));
        }
        let last = first + count as u32;
        bytes.extend(limit(END).finish(last + 1));
        self.sequence = last + 1;
        let all = |error| (None, error);
        self.make_room(bytes.len()).map_err(all)?;
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            return Err(all(SyscallError::last(call)));
        }
        let mut buffer = vec![0_u8; 65_536];
        loop {
            // SAFETY: the buffer is valid for its length.
            let got = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if got < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(all(SyscallError::new(call, error)));
            }
            let mut rest = &buffer[..got as usize];
            while let Some((message, after)) = split(rest) {
                rest = after;
                let is_ours = (first..=last + 1).contains(&message.sequence);
                if !is_ours || i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                let code = u32_at(message.payload, 0).unwrap_or(0) as i32;
                if code != 0 {
                    let about = (message.sequence > first && message.sequence <= last)
                        .then(|| (message.sequence - first - 1) as usize);
                    let error = io::Error::from_raw_os_error(-code);
                    return Err((about, SyscallError::new(call, error)));
                }
                if message.sequence == last {
                    return Ok(());
                }
            }
        }
    }

    /// Enlarges the send buffer of the socket for a long transaction, which must fit into the buffer as a whole.
    fn make_room(&self, length: usize) -> Result<()> {
        const USUAL: usize = 64 << 10;
        if length <= USUAL {
            return Ok(());
        }
        let size = libc::c_int::try_from(length.saturating_mul(2)).unwrap_or(libc::c_int::MAX);
        // SAFETY: `size` is valid for its own size.
        let answer = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDBUFFORCE,
                std::ptr::from_ref(&size).cast(),
                size_of_val(&size) as libc::socklen_t,
            )
        };
        if answer < 0 {
            return Err(SyscallError::last(
                "setsockopt(SO_SNDBUFFORCE) of a netlink socket",
            ));
        }
        Ok(())
    }

    fn exchange(
        &mut self,
        mut request: Request,
        flags: i32,
        call: &str,
        each: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<()> {
        self.sequence += 1;
        let all_flags = u16_at(&request.bytes, 6).unwrap_or(0) | flags as u16;
        request.bytes[6..8].copy_from_slice(&all_flags.to_ne_bytes());
        let bytes = request.finish(self.sequence);
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            return Err(SyscallError::last(call));
        }
        // The kernel sends a dump in messages of up to 32 kB.
        let mut buffer = vec![0_u8; 65_536];
        loop {
            // SAFETY: the buffer is valid for its length.
            let got = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if got < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(SyscallError::new(call, error));
            }
            let mut rest = &buffer[..got as usize];
            while let Some((
                Message {
                    kind,
                    flags: message_flags,
                    sequence,
                    payload,
                },
                after,
            )) = split(rest)
            {
                rest = after;
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    // NLMSG_DONE has an error code at the same offset as NLMSG_ERROR.
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        let code = u32_at(payload, 0).unwrap_or(0) as i32;
                        return if code == 0 {
                            Ok(())
                        } else {
                            Err(SyscallError::new(call, io::Error::from_raw_os_error(-code)))
                        };
                    }
                    libc::NLMSG_NOOP => {}
                    _ => {
                        each(kind, payload);
                        let ends = flags & (libc::NLM_F_DUMP | libc::NLM_F_ACK) == 0
                            && message_flags & libc::NLM_F_MULTI as u16 == 0;
                        if ends {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }
}

/// Parsed message.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// Returns the first message of a datagram, and the rest of the datagram.
fn split(bytes: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    let message = Message {
        kind: u16_at(bytes, 4)?,
        flags: u16_at(bytes, 6)?,
        sequence: u32_at(bytes, 8)?,
        payload: bytes.get(HEADER..length)?,
    };
    Some((message, bytes.get(length.next_multiple_of(4)..).unwrap_or(&[])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let request = Request::new(1, 0)
            .attr(1, b"abc")
            .nested(2, |r| r.attr(3, &7_u32.to_ne_bytes()));
        let bytes = request.finish(9);
        assert_eq!(u32_at(&bytes, 0), Some(bytes.len() as u32));
        let attributes = &bytes[HEADER..];
        assert_eq!(find(attributes, 1), Some(&b"abc"[..]));
        let nested = find(attributes, 2).unwrap();
        assert_eq!(find(nested, 3).and_then(|v| u32_at(v, 0)), Some(7));
        assert_eq!(Attributes(attributes).count(), 2);
    }

    #[test]
    fn lengths_that_do_not_fit_end_the_walk() {
        for bytes in [
            &[][..],
            &[1],
            &[3, 0, 1, 0],
            &[9, 0, 1, 0, 1, 2, 3, 4],
            &[0, 0, 0, 0],
        ] {
            assert_eq!(Attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert!(split(&[15, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_none());
    }
}
