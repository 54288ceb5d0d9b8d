//! `[hubble]`: where the flow API is served, and to whom.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use super::reader::Section;

/// Name of the socket of the flow API, in the directory of the control socket.
const SOCKET_NAME: &str = "hubble.sock";

/// `[hubble]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hubble {
    /// Path of the unix socket.
    pub socket: PathBuf,
    /// Group whose members can connect to the unix socket besides root.
    pub group: Option<String>,
    /// Address of the TCP listener.
    pub listen: Option<SocketAddr>,
    /// Certificate chain of the TCP listener, PEM.
    pub tls_certificate: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    pub tls_key: Option<PathBuf>,
    /// CAs of the certificates that clients must have, PEM.
    pub client_ca: Option<PathBuf>,
    /// Maximum number of streams of flows or events that clients read.
    pub max_readers: usize,
}

impl Hubble {
    /// Returns a warning if every client that reaches the TCP listener from the network can read the flows.
    pub(crate) fn open_to_all(&self) -> Option<String> {
        let listen = self.listen?;
        (self.client_ca.is_none() && !listen.ip().to_canonical().is_loopback()).then(|| {
            format!(
                "[hubble] listen: every client that reaches {listen} can read the flows: set hubble.client_ca to require \
                 certificates"
            )
        })
    }
}

/// Reads the section. `control_socket`: path of the control socket.
pub(super) fn hubble(section: Section<'_, '_>, control_socket: &Path) -> Hubble {
    let listen = section.string("listen").and_then(|at| {
        let address = at.value.parse::<SocketAddr>().ok();
        if address.is_none_or(|address| address.port() == 0) {
            section.error_at(
                at.offset,
                format!(
                    "'{}' is not an address with a port: write \"127.0.0.1:4245\" or \"[::1]:4245\"",
                    at.value
                ),
            );
            return None;
        }
        Some((address?, at.offset))
    });
    let hubble = Hubble {
        socket: section
            .absolute_path("socket")
            .unwrap_or_else(|| control_socket.with_file_name(SOCKET_NAME)),
        group: section.string("group").map(|at| at.value),
        listen: listen.map(|(address, _)| address),
        tls_certificate: section.absolute_path("tls_certificate"),
        tls_key: section.absolute_path("tls_key"),
        client_ca: section.absolute_path("client_ca"),
        max_readers: section
            .integer("max_readers", 1..1_025)
            .and_then(|number| usize::try_from(number).ok())
            .unwrap_or(32),
    };
    if hubble.socket == control_socket {
        section.error("hubble.socket is the path of the control socket: set another path");
    }
    if hubble.tls_certificate.is_some() != hubble.tls_key.is_some() {
        section.error("hubble.tls_certificate and hubble.tls_key belong together: set both or none");
    }
    if hubble.client_ca.is_some() && hubble.tls_certificate.is_none() {
        section.error("hubble.client_ca needs hubble.tls_certificate and hubble.tls_key");
    }
    if hubble.tls_certificate.is_some() && hubble.listen.is_none() {
        section.error("hubble.tls_certificate has no effect without hubble.listen");
    }
    if let Some((address, offset)) = listen
        && !address.ip().to_canonical().is_loopback()
        && hubble.tls_certificate.is_none()
    {
        section.error_at(
            offset,
            format!(
                "hubble.listen: {address} is not a loopback address, and without TLS everybody on the network could read the \
                 flows: set hubble.tls_certificate and hubble.tls_key, or listen on 127.0.0.1 or ::1"
            ),
        );
    }
    section.finish();
    hubble
}
