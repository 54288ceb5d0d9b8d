//! Sockets: listeners, and connections to servers that come from the client's own address and port.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    thread,
};

use nix::sched::{CloneFlags, setns};
use palisade_abi::Direction;
use palisade_inspect::Side;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::settings::{Listeners, Namespace};

/// Number of connections that the kernel completes before a thread accepts them.
const BACKLOG: i32 = 4096;

/// Where the sockets of a direction are, and how the server of a connection is found.
#[derive(Clone)]
pub(crate) enum Place {
    /// A network namespace in which every address is local. The local address of an accepted connection is the address
    /// of the server.
    Namespace(Arc<OwnedFd>),
    /// The namespace of the process, for tests: the function returns the server for the address of a client.
    Resolver(Resolver),
    /// The namespace of the calling thread, without listeners.
    Node,
}

/// Returns the server to which the connection from a client's address goes.
pub type Resolver = Arc<dyn Fn(SocketAddr) -> Option<SocketAddr> + Send + Sync>;

/// A listener and the direction of the flows that arrive at it.
pub(crate) struct Listener {
    pub(crate) direction: Direction,
    pub(crate) socket: mio::net::TcpListener,
}

/// Creates one IPv4 and one IPv6 listener in each namespace for each of `threads`, and registers the listeners of the
/// first thread. The other listeners share their ports (SO_REUSEPORT), so the kernel distributes connections over all
/// listeners.
pub(crate) fn listen(
    namespaces: &[(Direction, Place)],
    threads: usize,
    registry: &dyn Listeners,
) -> io::Result<Vec<Vec<Listener>>> {
    // Entering a namespace changes the calling thread, so a separate thread creates the sockets.
    let lists: Vec<Vec<Listener>> = thread::scope(|scope| {
        thread::Builder::new()
            .spawn_scoped(scope, || {
                (0..threads)
                    .map(|_| listeners(namespaces))
                    .collect::<io::Result<_>>()
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that creates sockets has failed")))
    })?;
    if let Some(first) = lists.first() {
        for listener in first {
            let is_v6 = listener.socket.local_addr()?.is_ipv6();
            registry.register(listener.direction, listener.socket.as_fd(), is_v6)?;
        }
    }
    Ok(lists)
}

fn listeners(namespaces: &[(Direction, Place)]) -> io::Result<Vec<Listener>> {
    let mut list = Vec::new();
    for (direction, place) in namespaces {
        enter(place)?;
        match place {
            Place::Namespace(_) => {
                for address in [
                    SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)),
                    SocketAddr::from((Ipv6Addr::LOCALHOST, PORT)),
                ] {
                    list.push(listener(*direction, address, true)?);
                }
            }
            Place::Node => {}
            Place::Resolver(_) => {
                list.push(listener(
                    *direction,
                    SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
                    false,
                )?);
            }
        }
    }
    Ok(list)
}

/// Port of the listeners in a namespace. The programs assign all connections to the listeners, so neither port nor
/// address of a listener matters. A listener at a wildcard address would block its port for connections to servers,
/// because these connections are bound to the ports of clients.
const PORT: u16 = 1;

fn listener(direction: Direction, address: SocketAddr, is_transparent: bool) -> io::Result<Listener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if is_transparent {
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        set_transparent(&socket, address)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(Listener {
        direction,
        socket: mio::net::TcpListener::from_std(socket.into()),
    })
}

fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true)
    } else {
        socket.set_ip_transparent_v6(true)
    }
}

/// Moves the calling thread to a namespace.
pub(crate) fn enter(place: &Place) -> io::Result<()> {
    match place {
        Place::Namespace(fd) => Ok(setns(&**fd, CloneFlags::CLONE_NEWNET)?),
        Place::Resolver(_) | Place::Node => Ok(()),
    }
}

/// Congestion control towards endpoints: Linux's default, which does not pace. BBR, a frequent setting of nodes, paces
/// with timers, which are slower than the link between proxy and endpoint, and that link has no queue to protect.
const ENDPOINT_CONGESTION: &[u8] = b"cubic";

/// Sets the options of a connection. `peer`: the end that it leads to. Towards other ends than the endpoint, the
/// congestion control is that of the node.
pub(crate) fn set_options(socket: SockRef<'_>, direction: Direction, peer: Side) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let is_endpoint = matches!(
        (direction, peer),
        (Direction::Egress, Side::Client) | (Direction::Ingress, Side::Server)
    );
    if is_endpoint {
        // A kernel without cubic keeps the node's.
        let _ = socket.set_tcp_congestion(ENDPOINT_CONGESTION);
    }
    Ok(())
}

/// Begins a connection to `server`. In a namespace, the connection comes from the address and port of `client`. The
/// calling thread must be in the namespace of `place`.
pub(crate) fn connect(
    place: &Place,
    direction: Direction,
    client: SocketAddr,
    server: SocketAddr,
) -> io::Result<mio::net::TcpStream> {
    let socket = Socket::new(
        Domain::for_address(server),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    if matches!(place, Place::Namespace(_)) {
        // Connections from one client port to several servers share the local address.
        socket.set_reuse_address(true)?;
        set_transparent(&socket, client)?;
        socket.bind(&client.into())?;
    }
    set_options(SockRef::from(&socket), direction, Side::Server)?;
    match socket.connect(&server.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    Ok(mio::net::TcpStream::from_std(socket.into()))
}

impl Place {
    pub(crate) fn of(namespace: Namespace) -> (Direction, Self) {
        (namespace.direction, Self::Namespace(Arc::new(namespace.fd)))
    }

    /// Returns the server of a connection that was accepted.
    pub(crate) fn server(&self, accepted: &mio::net::TcpStream, client: SocketAddr) -> Option<SocketAddr> {
        match self {
            Self::Namespace(_) => accepted.local_addr().ok(),
            Self::Resolver(resolver) => resolver(client),
            Self::Node => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, net::TcpListener};

    use super::*;

    /// Returns the congestion control of a connection to a listener of the test with the options of `direction` and
    /// `peer`.
    fn congestion(direction: Direction, peer: Side) -> String {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let stream =
            std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        set_options(SockRef::from(&stream), direction, peer).expect("the options");
        let name = SockRef::from(&stream).tcp_congestion().expect("a name");
        let text = String::from_utf8_lossy(&name);
        text.trim_end_matches('\0').to_owned()
    }

    #[test]
    fn only_the_end_towards_the_endpoint_has_a_congestion_control_of_its_own() {
        let setting = |name: &str| {
            let file = format!("/proc/sys/net/ipv4/tcp_{name}congestion_control");
            fs::read_to_string(file).expect("a setting of the kernel")
        };
        let of_node = setting("").trim().to_owned();
        let towards_endpoint = if setting("available_")
            .split_whitespace()
            .any(|name| name == "cubic")
        {
            "cubic"
        } else {
            &of_node
        };
        for (direction, endpoint, other) in [
            (Direction::Egress, Side::Client, Side::Server),
            (Direction::Ingress, Side::Server, Side::Client),
        ] {
            assert_eq!(congestion(direction, endpoint), towards_endpoint);
            assert_eq!(congestion(direction, other), of_node);
        }
    }
}
