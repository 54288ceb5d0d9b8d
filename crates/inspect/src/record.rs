//! Records of requests, answers and drops. A record has a fixed size, so that passing it on allocates nothing.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use palisade_abi::{Addr, PuntRequest, Reason, protocol, punt_flags};
use palisade_protocols::dns::Name;

use crate::{
    handover::wire::{Reader, Wire, wire},
    packet::PacketView,
};

/// Maximum length of a text in a record, bytes. Longer texts are truncated.
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
    /// Returns the bytes.
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

/// Appends a text, truncated at [`TEXT`] bytes. Never fails.
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
    /// Returns the text form of a name.
    #[must_use]
    pub fn of(name: &Name) -> Self {
        let mut text = Self::default();
        // Writing to a `Text` cannot fail.
        let _ = write!(text, "{name}");
        text
    }
}

/// A word in a record, truncated at 16 bytes.
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
    /// Returns the bytes.
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

impl Wire for Text {
    fn write(&self, out: &mut Vec<u8>) {
        self.bytes().to_vec().write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let bytes = Vec::<u8>::read(from)?;
        (bytes.len() <= TEXT).then(|| Self::from(&bytes[..]))
    }
}

impl Wire for Word {
    fn write(&self, out: &mut Vec<u8>) {
        self.bytes().to_vec().write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let word = Self::from(&Vec::<u8>::read(from)?[..]);
        Some(word)
    }
}

/// Verdict of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The packet was forwarded.
    Forwarded,
    /// The packet was dropped.
    Dropped,
    /// The packet was forwarded only because of audit mode.
    Audit,
}

/// Report of an inspector about a packet.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Number of the endpoint whose policy required the inspection.
    pub endpoint: u16,
    /// Whether the *packet* goes to that endpoint; the flow can have been opened in the other direction.
    pub ingress: bool,
    /// Whether the packet is of the reply direction.
    pub reply: bool,
    /// Source address and port of the packet.
    pub source: (Addr, u16),
    /// Destination address and port of the packet.
    pub destination: (Addr, u16),
    /// IP protocol.
    pub protocol: u8,
    /// Identity of the peer.
    pub remote_identity: u32,
    /// Index of the interface at which the packet was punted.
    pub ifindex: u32,
    /// Verdict of the packet.
    pub verdict: Verdict,
    /// Reason of a drop, even if audit mode forwards the packet; [`Reason::Allowed`] for an allowed packet.
    pub reason: Reason,
    /// Number of the policy rule that decided: the one whose application rule matched, else the one that required the
    /// inspection.
    pub rule: u32,
    /// For a DNS answer or an HTTP response, the time since its query or request, ms, if that is known. `None` for any
    /// other record.
    pub latency: Option<u32>,
    /// Content of the record.
    pub what: What,
}

/// Fields of a record that are the same for all packets of one direction of a flow.
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

wire!(About {
    source,
    destination,
    remote_identity,
    ifindex,
    rule,
    endpoint,
    protocol,
    ingress,
    reply,
});

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

    /// Returns the fields of a connection that the client of `client` has opened to `server`, without a packet.
    pub(crate) const fn of_stream(
        request: &PuntRequest,
        ingress: bool,
        client: (Addr, u16),
        server: (Addr, u16),
        ifindex: u32,
    ) -> Self {
        Self {
            source: client,
            destination: server,
            remote_identity: request.remote_identity,
            ifindex,
            rule: request.rule,
            endpoint: request.endpoint,
            protocol: protocol::TCP,
            ingress,
            reply: false,
        }
    }

    /// Returns the endpoint and the address to which the endpoint connects, or `None` if the endpoint is the server.
    /// `self` must describe a packet of the client.
    pub(crate) fn reaches(&self) -> Option<(u16, IpAddr)> {
        (!self.ingress).then(|| (self.endpoint, self.destination.0.into()))
    }

    /// Returns the destination address and port of a packet of the client.
    pub(crate) fn server(&self) -> (IpAddr, u16) {
        (self.destination.0.into(), self.destination.1)
    }

    /// Returns the number of the endpoint whose policy requires the inspection.
    pub(crate) const fn endpoint(&self) -> u16 {
        self.endpoint
    }

    /// Returns whether the endpoint is the server of the connection.
    pub(crate) const fn is_flow_ingress(&self) -> bool {
        self.ingress != self.reply
    }

    /// Returns the addresses and ports of the client and of the server.
    pub(crate) fn client_and_server(&self) -> (SocketAddr, SocketAddr) {
        let socket = |(address, port): (Addr, u16)| SocketAddr::new(address.into(), port);
        let (source, destination) = (socket(self.source), socket(self.destination));
        if self.reply {
            (destination, source)
        } else {
            (source, destination)
        }
    }

    /// Returns the fields for packets of the other direction.
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
    /// Returns the record of a packet that is forwarded, with the rule that required the inspection.
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

    /// Returns the record of a packet that is forwarded, with the rule that required the inspection. If no application
    /// rule matches, that rule also decides, because it denies every other request.
    #[must_use]
    pub fn of(view: &PacketView<'_>, what: What) -> Self {
        Self::about(&About::of(view), what)
    }
}

/// Content of a record.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// A DNS query.
    DnsQuery {
        /// Name in text form, without the trailing dot unless the name is the root.
        name: Text,
        /// QTYPE.
        kind: u16,
    },
    /// A DNS answer.
    DnsAnswer {
        /// Name of the question.
        name: Text,
        /// QTYPE.
        kind: u16,
        /// RCODE.
        rcode: u16,
        /// First addresses of the answer. Only the first `count` are valid.
        addresses: [Addr; 8],
        /// Number of valid addresses.
        count: u8,
        /// Lowest TTL of the answer, s; 0 if the answer has none.
        ttl: u32,
        /// Last name of the CNAME chain; empty without a CNAME.
        cname: Text,
    },
    /// A ClientHello.
    TlsHello {
        /// Server name in lower case, without the trailing dot; empty if the hello has none.
        name: Text,
        /// Highest TLS version that the client offers.
        version: u16,
        /// Whether the hello carries an encrypted ClientHello (ECH). `name` is the server name of the outer hello.
        ech: bool,
    },
    /// An HTTP request.
    HttpRequest {
        /// Method as sent; a long one is truncated.
        method: Word,
        /// Minor version of HTTP/1: 0 or 1; 2 for HTTP/2.
        version: u8,
        /// `http://HOST/PATH?QUERY`, redacted.
        url: Text,
        /// Configured header fields, one `Name: value` per line, redacted.
        headers: Text,
        /// Whether a `headerMatches` entry of the rule with `mismatch: LOG` did not match.
        mismatch: bool,
    },
    /// The final response to an HTTP request.
    HttpResponse {
        /// Method of the request.
        method: Word,
        /// URL of the request.
        url: Text,
        /// Minor version of HTTP/1: 0 or 1; 2 for HTTP/2.
        version: u8,
        /// Status code.
        status: u16,
        /// Length of the body, bytes, if the head announces it.
        length: Option<u64>,
        /// Configured header fields, as for a request.
        headers: Text,
    },
    /// A Kafka request, or the response to one.
    Kafka {
        /// API key.
        key: i16,
        /// API version.
        version: i16,
        /// Correlation id.
        correlation: i32,
        /// Error code: of the response, or of the one that denies the request; 0 for none.
        error: i16,
        /// First topic of the request, or the one that is denied; empty without topics.
        topic: Text,
        /// Client id of the request; empty in a response.
        client: Text,
    },
    /// A connection that a proxy terminates and that failed.
    Intercept {
        /// Server name that the client has sent; empty without one.
        name: Text,
        /// What failed, in words.
        error: Text,
    },
    /// A packet that could not be inspected.
    Unreadable {
        /// Description of the problem.
        detail: &'static str,
    },
}
