//! What people can see of live connections.

use std::net::SocketAddr;

use palisade_abi::Direction;
use palisade_inspect::Millis;
use rustls::{Connection as Tls, ProtocolVersion};

/// TLS parameters of one side of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsView {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// Name of the cipher suite.
    pub cipher: String,
    /// Application protocol; empty without one.
    pub alpn: String,
    /// Whether the session was resumed.
    pub is_resumed: bool,
}

/// A live connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionView {
    /// Number of the thread.
    pub thread: usize,
    /// Number of the connection, unique in its thread.
    pub id: u64,
    /// Endpoint whose policy requires the interception.
    pub endpoint: u16,
    /// Direction of the verdict.
    pub direction: Direction,
    /// Address and port of the client.
    pub client: SocketAddr,
    /// Address and port of the server.
    pub server: SocketAddr,
    /// Server name, or the address if the client has sent no name.
    pub name: String,
    /// State in words.
    pub state: &'static str,
    /// Protocol inside: `http/1.1`, `h2`, or `bytes` if it is not inspected.
    pub protocol: &'static str,
    /// Why there is no server.
    pub failure: Option<String>,
    /// TLS with the client.
    pub client_tls: Option<TlsView>,
    /// TLS with the server.
    pub server_tls: Option<TlsView>,
    /// Application bytes from the client.
    pub bytes_from_client: u64,
    /// Application bytes from the server.
    pub bytes_from_server: u64,
    /// HTTP requests.
    pub requests: u64,
    /// Time since the connection was accepted, ms.
    pub age: Millis,
    /// Time since the last byte, ms.
    pub idle: Millis,
}

impl TlsView {
    /// Returns the parameters of a session; `None` before the handshake has chosen them.
    pub(crate) fn of(tls: &Tls) -> Option<Self> {
        let version = match tls.protocol_version()? {
            ProtocolVersion::TLSv1_3 => "TLSv1.3",
            ProtocolVersion::TLSv1_2 => "TLSv1.2",
            _ => "unknown",
        };
        let cipher = tls.negotiated_cipher_suite()?.suite().as_str();
        let alpn = tls.alpn_protocol().unwrap_or_default();
        Some(Self {
            version,
            cipher: cipher.unwrap_or("unknown").to_owned(),
            alpn: String::from_utf8_lossy(alpn).into_owned(),
            is_resumed: tls.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
        })
    }
}
