//! What is in use on a node.

use std::net::IpAddr;

use crate::survey::{Link, Route};

/// Facts for the first configuration and policy.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeFacts {
    /// Host name.
    pub hostname: String,
    /// Interfaces.
    pub links: Vec<Link>,
    /// Listening sockets.
    pub listeners: Vec<Listener>,
    /// First port that the kernel gives to sockets without a port of their own.
    pub first_ephemeral_port: u16,
    /// The ssh session of this command.
    pub session: Option<Session>,
    /// DNS servers of `/etc/resolv.conf`.
    pub dns_servers: Vec<IpAddr>,
    /// Destinations of connections that the node has opened.
    pub outgoing: Vec<Outgoing>,
    /// Routes other than default routes.
    pub routes: Vec<Route>,
    /// Rules of other software that translate or filter.
    pub firewall: Vec<String>,
    /// Accept rules of nftables, as `TABLE CHAIN: RULE`, or why they are not known.
    pub accept_rules: Vec<String>,
    /// Container engines whose sockets are there.
    pub engines: Vec<Engine>,
    /// Names of network namespaces (`ip netns`).
    pub namespaces: Vec<String>,
}

/// A container engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Engine {
    /// Name.
    pub name: String,
    /// `kind` of its `[[discover]]`.
    pub kind: &'static str,
    /// Path of its socket.
    pub socket: String,
}

/// Transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// Returns the name in policies.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

/// A socket that accepts packets of peers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listener {
    /// Protocol.
    pub transport: Transport,
    /// Port.
    pub port: u16,
    /// Address of the socket.
    pub address: IpAddr,
    /// Names of the processes that have the socket; empty if they cannot be read.
    pub processes: Vec<String>,
}

/// Destination port of connections that the node has opened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Outgoing {
    /// Protocol.
    pub transport: Transport,
    /// Port at the peer.
    pub port: u16,
    /// Names of the processes.
    pub processes: Vec<String>,
}

/// An ssh session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    /// Address of the client.
    pub client: IpAddr,
    /// Port of the server.
    pub port: u16,
}
