//! Records of what was read: fixed in size, so that handing one on allocates nothing.

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
};

use palisade_abi::{Addr, Reason, punt_flags};
use palisade_protocols::dns::Name;

use crate::packet::PacketView;

/// Longest text of a record; longer ones are cut.
pub const TEXT: usize = 256;

/// A text in a record.
#[derive(Clone, Copy)]
pub struct Text {
    length: u16,
    bytes: [u8; TEXT],
}

impl Default for Text {
    fn default() -> Self {
        Self {
            length: 0,
            bytes: [0; TEXT],
        }
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.bytes()))
    }
}

impl From<&[u8]> for Text {
    fn from(from: &[u8]) -> Self {
        let mut text = Self::default();
        text.append(from);
        text
    }
}

impl Text {
    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }

    /// Appends bytes, as many as fit.
    fn append(&mut self, from: &[u8]) {
        let room = self.bytes.get_mut(usize::from(self.length)..).unwrap_or_default();
        self.length += copy_prefix(room, from) as u16;
    }
}

/// Writes a text, cut at the end of the room.
impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.append(text.as_bytes());
        Ok(())
    }
}

/// Copies as many bytes as fit. Returns their number.
fn copy_prefix(to: &mut [u8], from: &[u8]) -> usize {
    let length = to.len().min(from.len());
    if let (Some(to), Some(from)) = (to.get_mut(..length), from.get(..length)) {
        to.copy_from_slice(from);
    }
    length
}

impl Text {
    /// A name as people write it.
    #[must_use]
    pub fn of(name: &Name) -> Self {
        let mut text = Self::default();
        // writing to a text does not fail
        let _ = write!(text, "{name}");
        text
    }
}

/// A word in a record, at most 16 bytes; longer ones are cut.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Word {
    length: u8,
    bytes: [u8; 16],
}

impl From<&[u8]> for Word {
    fn from(from: &[u8]) -> Self {
        let mut bytes = [0; 16];
        let length = copy_prefix(&mut bytes, from) as u8;
        Self { length, bytes }
    }
}

impl Word {
    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.bytes()))
    }
}

/// Verdict of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Released.
    Forwarded,
    /// Refused, or never released.
    Dropped,
    /// Released because of audit mode.
    Audit,
}

/// Something that was read.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// The endpoint whose policy asked.
    pub endpoint: u16,
    /// Whether the *packet* goes to that endpoint.
    pub ingress: bool,
    /// Whether the packet answers the flow.
    pub reply: bool,
    /// Source of the packet.
    pub source: (Addr, u16),
    /// Destination of the packet.
    pub destination: (Addr, u16),
    /// IP protocol.
    pub protocol: u8,
    /// Identity of the other end.
    pub remote_identity: u32,
    /// The interface.
    pub ifindex: u32,
    /// Verdict.
    pub verdict: Verdict,
    /// Why, if it was dropped (or would have been).
    pub reason: Reason,
    /// The rule that decided: of an application rule that matched, the rule it stands in; else the one that has the
    /// flow read.
    pub rule: u32,
    /// Milliseconds from the request to this answer; answers only.
    pub latency: Option<u32>,
    /// What it is about.
    pub what: What,
}

/// Who talks to whom, as records say it: of one direction of a flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About {
    source: (Addr, u16),
    destination: (Addr, u16),
    remote_identity: u32,
    ifindex: u32,
    rule: u32,
    endpoint: u16,
    protocol: u8,
    ingress: bool,
    reply: bool,
}

impl About {
    pub(crate) fn of(view: &PacketView<'_>) -> Self {
        let PacketView { slot, packet, .. } = view;
        Self {
            source: (packet.source, packet.source_port),
            destination: (packet.destination, packet.destination_port),
            remote_identity: slot.remote_identity,
            ifindex: view.ifindex,
            rule: slot.rule,
            endpoint: slot.endpoint,
            protocol: packet.protocol,
            ingress: slot.flags & punt_flags::INGRESS != 0,
            reply: slot.flags & punt_flags::REPLY != 0,
        }
    }

    /// The endpoint, and whom it wants to reach; none if it is the one that is reached. Of a client's packet.
    pub(crate) fn reaches(&self) -> Option<(u16, IpAddr)> {
        (!self.ingress).then(|| (self.endpoint, self.destination.0.into()))
    }

    /// Of the other direction.
    pub(crate) const fn turned(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ingress: !self.ingress,
            reply: !self.reply,
            ..self
        }
    }
}

impl Record {
    /// Of what passes, by the rule that has it read.
    pub(crate) const fn about(about: &About, what: What) -> Self {
        Self {
            endpoint: about.endpoint,
            ingress: about.ingress,
            reply: about.reply,
            source: about.source,
            destination: about.destination,
            protocol: about.protocol,
            remote_identity: about.remote_identity,
            ifindex: about.ifindex,
            verdict: Verdict::Forwarded,
            reason: Reason::Allowed,
            rule: about.rule,
            latency: None,
            what,
        }
    }

    /// Of a packet that passes, by the rule that has it read. Where no application rule matches, that is the one to be
    /// named too: what it does not allow is denied.
    #[must_use]
    pub fn of(view: &PacketView<'_>, what: What) -> Self {
        Self::about(&About::of(view), what)
    }
}

/// What a record is about. Fixed in size, so that nothing is allocated.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// A DNS query.
    DnsQuery {
        /// The name in text form, without the last dot unless it is the root.
        name: Text,
        /// QTYPE.
        kind: u16,
    },
    /// A DNS answer.
    DnsAnswer {
        /// The name that was asked for.
        name: Text,
        /// QTYPE.
        kind: u16,
        /// RCODE.
        rcode: u16,
        /// The first addresses; `count` of them are set.
        addresses: [Addr; 8],
        /// How many addresses are set.
        count: u8,
        /// Lowest TTL, s.
        ttl: u32,
        /// Last name of the CNAME chain, empty if there is none.
        cname: Text,
    },
    /// A ClientHello.
    TlsHello {
        /// The server name in lower case, without its last dot; empty if there is none.
        name: Text,
        /// The highest version that is offered.
        version: u16,
        /// It carries an encrypted hello; the name is the outer one.
        ech: bool,
    },
    /// An HTTP request.
    HttpRequest {
        /// Method as sent; a long one is cut.
        method: Word,
        /// 0 or 1: the minor version of HTTP/1.
        version: u8,
        /// `http://HOST/PATH?QUERY`, without secrets.
        url: Text,
        /// The fields that are to be recorded, `Name: value` each with a line feed behind it; without secrets.
        headers: Text,
        /// A headerMatches of the rule did not match, and is to be logged.
        mismatch: bool,
    },
    /// An HTTP answer that is the last one to its request.
    HttpResponse {
        /// Method of the request.
        method: Word,
        /// URL of the request.
        url: Text,
        /// 0 or 1: the minor version of HTTP/1.
        version: u8,
        /// Status code.
        status: u16,
        /// Bytes of its body, where its head says so.
        length: Option<u64>,
        /// As of the request.
        headers: Text,
    },
    /// A packet that could not be read: `detail` says what was wrong.
    Unreadable {
        /// A fixed text.
        detail: &'static str,
    },
}
