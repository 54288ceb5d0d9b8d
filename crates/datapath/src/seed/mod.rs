//! The connections that were there before Palisade, from the kernel's own tables, so that they live on.
//!
//! | source | knows | who opened |
//! |---|---|---|
//! | nf_conntrack (`/proc` or ctnetlink) | what the node sends, receives and forwards, where a firewall or NAT rule has switched it on | told |
//! | sockets of a network namespace (`inet_diag`) | TCP connections and connected UDP sockets of that namespace | the other end, if something listens on the local port; else this end |
//!
//! The sockets of the node's own namespace know the flows of the node's endpoint. The flows of a workload are known
//! if nf_conntrack sees them, or if the configuration names the workload's namespace ([`connections_of_netns`]).
//! A flow that no table knows is judged by its first packet, whichever direction that has.
//!
//! A socket list is no proof: root of a workload, and for UDP any user, can make one that names foreign addresses or
//! that lets a flow look as if the other end had opened it. Therefore
//!
//! - a table speaks only for the endpoints in its [`Scope`]: the sockets of a namespace for the endpoint that lives in
//!   that namespace, and for no other endpoint, whatever addresses its sockets have;
//! - only TCP is seeded. UDP and SCTP packets do not show who opened a flow, so a seeded entry would be the only
//!   evidence for its direction. Without an entry such a flow goes on if the policy allows the direction of its next
//!   packet;
//! - the daemon seeds once, before it attaches the first program to the first interface (`daemon::guard`).
//!
//! A seeded entry has revision 0, which no endpoint has: its first packet has *the flow* judged, in the direction in
//! which it was opened. What the policy allows lives, what it denies is cut.

mod connection;
mod ctnetlink;
mod entries;
mod procfs;
mod sock_diag;

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path};

pub use connection::{Connection, End, Progress, SeedError};
pub use entries::{LocalEndpoints, Scope, seeds};

/// Returns the connections that the kernel knows of in the calling thread's network namespace, the node's: those of
/// nf_conntrack first, for every endpoint, then the sockets, for the endpoint `node` alone.
///
/// # Errors
/// If a table is there and cannot be read.
pub fn connections(node: u16) -> Result<Vec<(Scope, Connection)>, SeedError> {
    let tracked = tracked()?.into_iter().map(|connection| (Scope::Node, connection));
    let sockets = sock_diag::sockets()?
        .into_iter()
        .map(|connection| (Scope::Endpoint(node), connection));
    Ok(tracked.chain(sockets).collect())
}

/// Returns the connections that the kernel knows of in the network namespace (`/run/netns/NAME`, `/proc/PID/ns/net`)
/// of the endpoint with the number `endpoint`, for that endpoint alone.
///
/// # Errors
/// If the namespace cannot be entered, or a table is there and cannot be read.
pub fn connections_of_netns(path: &Path, endpoint: u16) -> Result<Vec<(Scope, Connection)>, SeedError> {
    let failed = |source| SeedError::Netns {
        path: path.to_owned(),
        source,
    };
    let namespace = File::open(path).map_err(failed)?;
    // In a thread of its own, which ends in there: no way back has to be found.
    let inside = std::thread::Builder::new()
        .name("seed-netns".into())
        .spawn(move || {
            // SAFETY: no pointers; the descriptor is open.
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
    // Of the calling thread: /proc/net is of the process's first thread.
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
