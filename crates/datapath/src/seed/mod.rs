//! Reads the connections that existed before Palisade from the kernel's own tables. They are seeded into conntrack, so
//! that they continue.
//!
//! | source | contents | opener of a connection |
//! |---|---|---|
//! | nf_conntrack (`/proc` or ctnetlink) | connections of packets that the node sends, receives or forwards, if a firewall or NAT rule has enabled connection tracking | known |
//! | sockets of a network namespace (`inet_diag`) | TCP connections of that namespace | the peer, if a socket listens on the local port; else the local end |
//!
//! The sockets of the node's own namespace cover the flows of the node's endpoint. Flows of a workload are found in
//! nf_conntrack, or in the workload's namespace if the configuration names it ([`connections_of_netns`]). For any other
//! flow, the next packet of either direction is treated as the first packet of a new flow.
//!
//! A list of sockets is not trustworthy: root in a workload can create sockets with foreign addresses, or sockets for
//! which the peer seems to have opened the flow. For UDP, any user can create the latter. Therefore
//!
//! - a table is used only for the endpoints in its [`Scope`]: the sockets of a namespace only for the endpoint of that
//!   namespace, whatever addresses the sockets have;
//! - only TCP is seeded. UDP and SCTP packets do not show which side opened a flow, so a seeded entry would be the
//!   only evidence of its direction. Without an entry such a flow continues if the policy allows the direction of its
//!   next packet;
//! - the daemon seeds only once, before it attaches the first program to the first interface
//!   (`daemon::interfaces`), and not when the layout of the maps is upgraded ([`crate::upgrade`]).
//!
//! A seeded entry has revision 0, with which a flow is always evaluated again. The first packet therefore makes the programs evaluate the
//! policy of the flow in the direction in which it was opened, and the flow continues or is dropped.

mod connection;
mod ctnetlink;
mod entries;
mod procfs;
mod sock_diag;

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path};

pub use connection::{Connection, End, Progress, SeedError};
pub use entries::{LocalEndpoints, Scope, seeds};

/// Returns the connections in the calling thread's network namespace, which must be that of the node: first the
/// connections of nf_conntrack, for every endpoint, then the sockets, for the endpoint `node` only.
///
/// # Errors
/// [`SeedError`] if an existing table cannot be read.
pub fn connections(node: u16) -> Result<Vec<(Scope, Connection)>, SeedError> {
    let tracked = tracked()?.into_iter().map(|connection| (Scope::Node, connection));
    let sockets = sock_diag::sockets()?
        .into_iter()
        .map(|connection| (Scope::Endpoint(node), connection));
    Ok(tracked.chain(sockets).collect())
}

/// Returns the connections in the network namespace (`/run/netns/NAME`, `/proc/PID/ns/net`) of `endpoint`, for that
/// endpoint only.
///
/// # Errors
/// [`SeedError`] if the namespace cannot be entered or an existing table cannot be read.
pub fn connections_of_netns(path: &Path, endpoint: u16) -> Result<Vec<(Scope, Connection)>, SeedError> {
    let failed = |source| SeedError::Netns {
        path: path.to_owned(),
        source,
    };
    let namespace = File::open(path).map_err(failed)?;
    // A new thread enters the namespace and ends there, so the calling thread never leaves its own namespace.
    let inside = std::thread::Builder::new()
        .name("seed-netns".into())
        .spawn(move || {
            // SAFETY: setns takes no pointers, and the descriptor is open.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(tracked().and_then(|mut found| {
                found.extend(sock_diag::sockets()?);
                Ok(found)
            }))
        });
    let outcome = inside.map_err(failed)?.join();
    let found = outcome
        .map_err(|_| failed(io::Error::other("the reader panicked")))?
        .map_err(failed)??;
    let scope = Scope::Endpoint(endpoint);
    Ok(found.into_iter().map(|connection| (scope, connection)).collect())
}

fn tracked() -> Result<Vec<Connection>, SeedError> {
    // /proc/net would show the namespace of the main thread of the process, which need not be that of this thread.
    match std::fs::read_to_string("/proc/thread-self/net/nf_conntrack") {
        Ok(text) => Ok(text
            .lines()
            .filter_map(procfs::parse_tracked)
            .flatten()
            .flatten()
            .collect()),
        Err(_) => ctnetlink::tracked(),
    }
}
