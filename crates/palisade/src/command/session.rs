//! The user of a command, and the ssh session in which the command runs.
//!
//! sshd sets SSH_CONNECTION (ssh(1)), but sudo removes it from the environment. The parent processes are searched too:
//! the user's shell has it. The variable can be forged by its process, so it only adds sessions to the check; and it can be
//! older than the session (a shell in tmux that is attached anew), so a connection that no longer exists does not count. The
//! connections of parent processes, of which sshd is one, are added as well. One that a parent process has opened itself
//! can be the user's way to the node, too (a reverse tunnel, an agent), so it is added as what it is: an outgoing one.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use nix::unistd::{Uid, User, getuid};

use crate::control::api::{Author, Session};

/// Largest number of parent processes that are searched.
const MAX_PARENTS: usize = 64;
/// State of an established connection in /proc/net/tcp.
const ESTABLISHED: &str = "01";
/// State of a listening socket there.
const LISTEN: &str = "0A";

/// Returns the user of this process.
pub(super) fn author() -> Author {
    let name = |uid: Uid| {
        let user = User::from_uid(uid).ok().flatten();
        user.map_or_else(|| uid.to_string(), |user| user.name)
    };
    let uid = getuid();
    Author {
        uid: uid.as_raw(),
        user: name(uid),
        sudo_user: std::env::var("SUDO_USER")
            .ok()
            .filter(|user| !user.is_empty())
            .map(|user| user.chars().filter(|c| !c.is_control()).take(64).collect()),
    }
}

/// Returns the sessions in which this process runs.
pub(super) fn sessions() -> Vec<Session> {
    let mut found = BTreeSet::new();
    if let Ok(text) = std::env::var("SSH_CONNECTION") {
        found.extend(parse(&text));
    }
    let mut sockets = BTreeSet::new();
    let mut process = std::process::id();
    for _ in 0..MAX_PARENTS {
        let dir = Path::new("/proc").join(process.to_string());
        found.extend(of_environment(&fs::read(dir.join("environ")).unwrap_or_default()));
        sockets.extend(sockets_of(&dir.join("fd")));
        match fs::read_to_string(dir.join("stat"))
            .ok()
            .as_deref()
            .and_then(parent)
        {
            Some(parent) if parent > 1 => process = parent,
            _ => break,
        }
    }
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"].map(fs::read_to_string);
    // Without the table it is not known which connections exist, so all count. That of IPv6 is missing if IPv6 is off.
    if tables[0].is_ok() {
        let tables = tables
            .each_ref()
            .map(|table| table.as_deref().unwrap_or_default());
        retain_existing(&mut found, &tables);
    }
    let tables = tables.map(Result::unwrap_or_default);
    of_tables(&mut found, &tables, &sockets);
    found.into_iter().collect()
}

/// Removes the sessions whose connection is not established.
fn retain_existing(found: &mut BTreeSet<Session>, tables: &[&str]) {
    let lines = tables.iter().flat_map(|table| table.lines().skip(1));
    let existing: BTreeSet<[SocketAddr; 2]> = lines
        .filter_map(|line| ends_in_state(line, ESTABLISHED))
        .filter(|ends| found.iter().any(|session| session.local == ends[0]))
        .collect();
    found.retain(|session| existing.contains(&[session.local, session.peer]));
}

/// Returns the local and the remote end of a line of /proc/net/tcp or tcp6, if its socket is in a state.
fn ends_in_state(line: &str, state: &str) -> Option<[SocketAddr; 2]> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, peer) = (words.next()?, words.next()?);
    (words.next()? == state).then_some(())?;
    Some([end(local)?, end(peer)?])
}

/// Adds the established connections of some sockets. Those of `found` are known to be incoming.
fn of_tables(found: &mut BTreeSet<Session>, tables: &[String], sockets: &BTreeSet<u64>) {
    let lines = || tables.iter().flat_map(|table| table.lines().skip(1));
    let listening: BTreeSet<SocketAddr> = lines().filter_map(listens).collect();
    for mut session in lines().filter_map(|line| established(line, sockets)) {
        session.outgoing = !is_accepted(session.local, &listening);
        let incoming = Session {
            outgoing: false,
            ..session
        };
        if !found.contains(&incoming) {
            found.insert(session);
        }
    }
}

/// Returns whether a socket listens at an address and port. A socket that listens at `::` also accepts IPv4.
fn is_accepted(local: SocketAddr, listening: &BTreeSet<SocketAddr>) -> bool {
    let any_v6 = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    let any = match local {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => any_v6,
    };
    let mut addresses = [local.ip(), any, any_v6].into_iter();
    addresses.any(|address| listening.contains(&SocketAddr::new(address, local.port())))
}

/// Returns the session of an SSH_CONNECTION variable: address and port of the client, then of the server.
fn parse(text: &str) -> Option<Session> {
    let mut words = text.split_ascii_whitespace();
    let mut end = || {
        // A link-local address has its zone after a percent sign.
        let address = words.next()?.split('%').next()?.parse::<IpAddr>().ok()?;
        Some(SocketAddr::new(
            address.to_canonical(),
            words.next()?.parse().ok()?,
        ))
    };
    Some(Session {
        peer: end()?,
        local: end()?,
        outgoing: false,
    })
}

fn of_environment(environment: &[u8]) -> Option<Session> {
    let mut variables = environment.split(|byte| *byte == 0);
    let value = variables.find_map(|variable| variable.strip_prefix(b"SSH_CONNECTION="))?;
    parse(std::str::from_utf8(value).ok()?)
}

/// Returns the parent in a line of /proc/PID/stat. The name of the process is in parentheses and can have any character.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Returns the inodes of the sockets of a process.
fn sockets_of(dir: &Path) -> BTreeSet<u64> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    links
        .filter_map(|link| {
            let text = std::str::from_utf8(link.as_os_str().as_bytes()).ok()?;
            text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        })
        .collect()
}

/// Returns the session in a line of /proc/net/tcp or tcp6, if it is an established connection of one of the sockets.
fn established(line: &str, sockets: &BTreeSet<u64>) -> Option<Session> {
    let inode = line.split_ascii_whitespace().nth(9)?.parse().ok()?;
    let [local, peer] = ends_in_state(line, ESTABLISHED)?;
    let is_wanted = sockets.contains(&inode) && !peer.ip().is_loopback();
    is_wanted.then_some(Session {
        local,
        peer,
        outgoing: false,
    })
}

/// Returns the address in a line of /proc/net/tcp or tcp6, if it is that of a listening socket.
fn listens(line: &str) -> Option<SocketAddr> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let local = end(words.next()?)?;
    (words.nth(1)? == LISTEN).then_some(local)
}

/// Returns an address of /proc/net/tcp: words of the network order in the byte order of the node, and the port.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let address = match bytes.len() {
        4 => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn session(peer: &str, local: &str) -> Session {
        Session {
            peer: peer.parse().unwrap(),
            local: local.parse().unwrap(),
            outgoing: false,
        }
    }

    #[test]
    fn a_connection_that_a_parent_process_has_opened_is_an_outgoing_one() {
        let line = |local: &str, peer: &str, state: &str, inode: u64| {
            format!("0: {local} {peer} {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1 0")
        };
        let v4 = |address: [u8; 4], port: u16| format!("{:08X}:{port:04X}", u32::from_ne_bytes(address));
        let v6 = |address: Ipv6Addr, port: u16| {
            let octets = address.octets();
            let words = octets
                .chunks_exact(4)
                .map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
            let words: String = words.map(|word| format!("{word:08X}")).collect();
            format!("{words}:{port:04X}")
        };
        let node: Ipv6Addr = "2001:db8::1".parse().unwrap();
        let peer: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let listens = |local: &str| line(local, "0:0", LISTEN, 9);
        let of = |listeners: &[String]| {
            let connections = [
                line(
                    &v4([192, 0, 2, 1], 22),
                    &v4([198, 51, 100, 7], 40_000),
                    ESTABLISHED,
                    1,
                ),
                line(
                    &v4([192, 0, 2, 1], 40_001),
                    &v4([198, 51, 100, 7], 443),
                    ESTABLISHED,
                    2,
                ),
                line(&v6(node, 22), &v6(peer, 40_000), ESTABLISHED, 3),
                line(&v6(node, 40_001), &v6(peer, 443), ESTABLISHED, 4),
                // Not of a parent process.
                line(
                    &v4([192, 0, 2, 1], 40_002),
                    &v4([198, 51, 100, 7], 443),
                    ESTABLISHED,
                    5,
                ),
            ];
            let table = [
                vec!["header".to_owned()],
                listeners.to_vec(),
                connections.to_vec(),
            ]
            .concat();
            let mut found = BTreeSet::new();
            of_tables(&mut found, &[table.join("\n")], &(1..=4).collect());
            let mut shown: Vec<String> = found.iter().map(ToString::to_string).collect();
            shown.sort();
            shown
        };
        let expected = [
            "192.0.2.1:40001 -> 198.51.100.7:443",
            "198.51.100.7:40000 -> 192.0.2.1:22",
            "[2001:db8::1]:40001 -> [2001:db8::7]:443",
            "[2001:db8::7]:40000 -> [2001:db8::1]:22",
        ];
        let listeners = [listens(&v4([0; 4], 22)), listens(&v6(Ipv6Addr::UNSPECIFIED, 22))];
        assert_eq!(of(&listeners), expected);
        assert_eq!(of(&listeners[1..]), expected, "a socket at :: accepts IPv4");
        let exact = [listens(&v4([192, 0, 2, 1], 22)), listens(&v6(node, 22))];
        assert_eq!(of(&exact), expected);
        // What SSH_CONNECTION has is incoming, also if sshd listens no more.
        let table = [
            "header".to_owned(),
            line(
                &v4([192, 0, 2, 1], 22),
                &v4([198, 51, 100, 7], 40_000),
                ESTABLISHED,
                1,
            ),
        ];
        let known = session("198.51.100.7:40000", "192.0.2.1:22");
        let mut found = BTreeSet::from([known]);
        of_tables(&mut found, &[table.join("\n")], &[1].into());
        assert_eq!(found, [known].into());
    }

    #[test]
    fn the_variable_of_sshd_is_read_in_both_families() {
        let v4 = session("198.51.100.7:40000", "192.0.2.1:22");
        assert_eq!(parse("198.51.100.7 40000 192.0.2.1 22"), Some(v4));
        assert_eq!(parse("::ffff:198.51.100.7 40000 192.0.2.1 22"), Some(v4));
        assert_eq!(
            parse("fe80::1%eth0 40000 fe80::2%eth0 22"),
            Some(session("[fe80::1]:40000", "[fe80::2]:22"))
        );
        let environment = b"A=1\0SSH_CONNECTION=198.51.100.7 40000 192.0.2.1 22\0B=2\0";
        assert_eq!(of_environment(environment), Some(v4));
        for wrong in [
            "",
            "198.51.100.7",
            "198.51.100.7 x 192.0.2.1 22",
            "a 1 b 2",
            "1.2.3.4 1 5.6.7.8",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_parent_is_found_behind_any_process_name() {
        assert_eq!(parent("12 (bash) S 7 12 12 0"), Some(7));
        assert_eq!(parent("12 (a) b) R 9) S 7 12"), Some(7));
        assert_eq!(parent(""), None);
    }

    #[test]
    fn connections_are_read_from_the_table_of_the_kernel() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                continue;
            };
            let local = listener.local_addr().unwrap();
            let client = TcpStream::connect(local).unwrap();
            let (_server, _) = listener.accept().unwrap();
            let table =
                ["/proc/self/net/tcp", "/proc/self/net/tcp6"].map(|path| fs::read_to_string(path).unwrap());
            // The variable of a shell that is older than the connection names one that has ended.
            let of = |peer: SocketAddr| Session {
                peer,
                local,
                outgoing: false,
            };
            let present = of(client.local_addr().unwrap());
            let mut found = BTreeSet::from([present, of(SocketAddr::new(local.ip(), 1))]);
            retain_existing(&mut found, &table.each_ref().map(String::as_str));
            assert_eq!(found, [present].into());
            let mut ends = table.iter().flat_map(|table| table.lines()).filter_map(|line| {
                let words: Vec<&str> = line.split_ascii_whitespace().collect();
                Some((end(words.get(1)?)?, end(words.get(2)?)?))
            });
            assert!(
                ends.any(|ends| ends == (local, client.local_addr().unwrap())),
                "{address}"
            );
        }
    }
}
