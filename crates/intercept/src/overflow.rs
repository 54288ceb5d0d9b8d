//! Overflows of the accept queues in the namespaces of the proxy.

use std::{fs, io, thread};

use palisade_abi::Direction;

use crate::listen::{Place, enter};

/// Counters of the network namespace of the calling thread (`Documentation/networking/snmp_counter.rst`).
const NETSTAT: &str = "/proc/thread-self/net/netstat";

/// Returns the number of connections of clients that the kernel has dropped in the namespaces because the accept queue of
/// their listener was full. Such a client repeats its packets, and is accepted once there is room. Namespaces other than
/// those of the proxy are not counted.
///
/// # Errors
/// The error of a namespace or of its counters.
pub(crate) fn overflows(places: &[(Direction, Place)]) -> io::Result<u64> {
    // Entering a namespace changes the calling thread, so a separate thread reads the counters.
    thread::scope(|scope| {
        thread::Builder::new()
            .spawn_scoped(scope, || {
                let mut sum = 0;
                for (_, place) in places {
                    if let Place::Namespace(_) = place {
                        enter(place)?;
                        let text = fs::read_to_string(NETSTAT)?;
                        sum += listen_overflows(&text)
                            .ok_or_else(|| io::Error::other(format!("{NETSTAT} has no ListenOverflows")))?;
                    }
                }
                Ok(sum)
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that reads counters has failed")))
    })
}

/// Returns `ListenOverflows` of `TcpExt`: a line with names is followed by one with the values.
fn listen_overflows(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let place = names
        .split_whitespace()
        .position(|name| name == "ListenOverflows")?;
    values.split_whitespace().nth(place)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflows_are_found_by_name() {
        let text = "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 22 23\nIpExt: InNoRoutes\nIpExt: 5\n";
        assert_eq!(listen_overflows(text), Some(22));
        for text in ["", "TcpExt: ListenOverflows\n", "TcpExt: A\nTcpExt: 1\n"] {
            assert_eq!(listen_overflows(text), None, "{text:?}");
        }
        // The kernel of this machine has the counter.
        let own = std::fs::read_to_string(NETSTAT).expect("the counters");
        assert!(listen_overflows(&own).is_some(), "{own}");
    }
}
