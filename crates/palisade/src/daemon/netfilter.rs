//! The nftables table of this daemon. It is written again when another program changes or removes it.

use std::{
    io,
    os::fd::AsFd as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt::RcvBufForce},
};
use palisade_abi::{Counter, Direction, Reason};
use palisade_datapath::{Netfilter, NetfilterError, Rules};
use tracing::{error, info, warn};

use super::nat;
use crate::config::Config;

/// `NFNLGRP_NFTABLES` as a bit of a socket's groups (linux/netfilter/nfnetlink.h).
const GROUP: u32 = 1 << (7 - 1);
/// Wait after a notification, because the kernel sends many notifications for one transaction.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// Interval at which the tables of legacy iptables are read, ms. The kernel sends no notification when these tables
/// change.
const POLL_INTERVAL_MS: u16 = 2_000;
/// Size of the socket's receive buffer, bytes.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;
/// `NFNL_SUBSYS_NFTABLES`, `NFT_MSG_NEWGEN`.
const SUBSYSTEM: u16 = 10;
const NEW_GENERATION: u16 = 15;
/// Size of `struct nlmsghdr`. [`HEADERS`] also includes `struct nfgenmsg`.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;

/// Consequence of a missing table, for log and `status`.
const OPEN_WITHOUT_TABLE: &str = "open without it: one-way datagrams that DNAT, TPROXY or routing by mark redirects to the node, and the \
                    node's own sockets towards interfaces that are configured and not guarded";

/// Name and owner of this daemon's table.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Name of the table. It equals the name of the punt link, which is unique in the network namespace.
    name: String,
    owner: String,
}

impl Place {
    pub(crate) fn new(config: &Config) -> Self {
        Self::of(&config.worker.interface, &config.node.pin_dir)
    }

    /// Returns the place of the table of an installation. `name`: `[worker] interface`.
    pub(crate) fn of(name: &str, pin_dir: &Path) -> Self {
        Self {
            name: name.to_owned(),
            owner: format!("palisade, pins in {}", pin_dir.display()),
        }
    }

    /// Returns family and name of each table that is present; none on a kernel without nf_tables.
    pub(crate) fn present(&self) -> Result<Vec<String>, NetfilterError> {
        match self.open().and_then(|mut table| table.present()) {
            Err(error) if error.is_unsupported() => Ok(Vec::new()),
            other => other,
        }
    }

    fn open(&self) -> Result<Netfilter, NetfilterError> {
        Netfilter::open(&self.name, &self.owner)
    }

    /// Returns the counters of the packets that the table has dropped; empty if the table cannot be read.
    pub(crate) fn counts(&self) -> Vec<(Reason, Direction, Counter)> {
        self.open()
            .and_then(|mut table| table.counts())
            .unwrap_or_default()
    }

    /// Removes the table.
    pub(crate) fn remove(&self) -> Result<(), NetfilterError> {
        match self.open().and_then(|mut table| table.remove()) {
            Err(error) if error.is_unsupported() => Ok(()),
            other => other,
        }
    }
}

/// Writes the table and watches it.
#[derive(Debug)]
pub(super) struct Keeper {
    place: Place,
    table: Option<Netfilter>,
    /// Netlink port of the socket that writes the table.
    port: Arc<AtomicU32>,
    written: Option<Rules>,
    /// Features that the kernel lacks.
    lacking: Vec<String>,
    problem: Option<String>,
    /// Whether the kernel has no nf_tables.
    unsupported: bool,
}

impl Keeper {
    pub(super) fn new(place: Place) -> Self {
        Self {
            place,
            table: None,
            port: Arc::default(),
            written: None,
            lacking: Vec::new(),
            problem: None,
            unsupported: false,
        }
    }

    /// Makes the table hold these rules.
    pub(super) fn write(&mut self, rules: Rules) {
        if self.written.as_ref() == Some(&rules) {
            return;
        }
        match self.try_write(&rules) {
            Ok(lacking) => {
                if self.problem.take().is_some() {
                    info!(table = self.place.name, "the nftables table is written");
                }
                if lacking != self.lacking {
                    lacking
                        .iter()
                        .for_each(|lack| warn!(table = self.place.name, lack, "nftables lacks a feature"));
                }
                (self.lacking, self.written, self.unsupported) = (lacking, Some(rules), false);
            }
            Err(problem) => {
                self.written = None;
                self.unsupported = problem.is_unsupported();
                let hint = if self.unsupported {
                    " (the kernel options CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET are needed)"
                } else {
                    ""
                };
                let text =
                    format!("the nftables table cannot be written: {problem}{hint}; {OPEN_WITHOUT_TABLE}");
                if self.problem.as_ref() != Some(&text) {
                    error!(table = self.place.name, error = %problem, "the nftables table cannot be written{hint}");
                }
                self.problem = Some(text);
            }
        }
    }

    /// Makes the table check forwarded packets. Called when the daemon ends, because no daemon will attach programs to
    /// interfaces that appear later.
    pub(super) fn close_forwarding(&mut self) {
        if let Some(rules) = self.written.clone() {
            self.write(Rules {
                forwards: true,
                ..rules
            });
        }
    }

    fn try_write(&mut self, rules: &Rules) -> Result<Vec<String>, NetfilterError> {
        let table = match &mut self.table {
            Some(table) => table,
            none => {
                let table = self.place.open()?;
                self.port.store(table.port()?, Ordering::Release);
                none.insert(table)
            }
        };
        table.write(rules)
    }

    /// Notes that another program has changed the table, or can have changed it, so that the next write is not skipped.
    /// `is_sure`: false if notifications were lost; then nothing is logged.
    pub(super) fn was_touched(&mut self, is_sure: bool) {
        if self.written.take().is_some() && is_sure {
            warn!(
                event = "nftables-restored",
                table = self.place.name,
                "another program has removed or changed the nftables table; it is written again"
            );
        }
    }

    /// Returns whether the last write failed and is to be tried again.
    pub(super) const fn has_failed(&self) -> bool {
        self.problem.is_some() && !self.unsupported
    }

    /// Returns the problem of the last write and the missing features, for `status`.
    pub(super) fn warnings(&self) -> impl Iterator<Item = String> {
        let lacking = self.lacking.iter().map(|lack| format!("nftables: {lack}"));
        self.problem.clone().into_iter().chain(lacking)
    }

    /// Starts a thread that watches nftables and legacy iptables, and passes each [`Change`] to `changed` until
    /// `changed` returns false. Returns whether this node translates addresses at the start.
    pub(super) fn watch(&self, mut changed: impl FnMut(Change) -> bool + Send + 'static) -> io::Result<bool> {
        // The socket is bound before the first dump, so that no change is missed. Without nf_tables there are no
        // notifications, and the thread only polls the legacy tables.
        let socket = Socket::new(NETLINK_NETFILTER).and_then(|mut socket| {
            socket.bind(&SocketAddr::new(0, GROUP))?;
            socket.set_non_blocking(true)?;
            // A program that replaces a rule set causes one notification per rule. After lost notifications (ENOBUFS)
            // the daemon writes its table again, so a large buffer avoids needless writes.
            let _ = setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER_BYTES);
            Ok(socket)
        });
        if let Err(problem) = &socket {
            warn!(error = %problem, "changes of nftables by other programs cannot be received");
        }
        let socket = socket.ok();
        let (name, port) = (self.place.name.clone(), Arc::clone(&self.port));
        let mut chains = nat::nft_chains() > 0;
        let mut translates = chains || !nat::legacy_tables().is_empty();
        let first = translates;
        thread::Builder::new().name("netfilter".into()).spawn(move || {
            loop {
                let seen = socket
                    .as_ref()
                    .map_or_else(wait, |socket| notified(socket, &name, &port));
                if seen.ruleset {
                    chains = nat::nft_chains() > 0;
                }
                let now = chains || !nat::legacy_tables().is_empty();
                if !seen.touched && !seen.lost && now == translates {
                    continue;
                }
                translates = now;
                let change = Change {
                    touched: seen.touched,
                    may_be_touched: seen.lost,
                    translates,
                };
                if !changed(change) {
                    return;
                }
            }
        })?;
        Ok(first)
    }
}

/// A change of nftables or legacy iptables in this network namespace by another program.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    /// Whether the table of this daemon was changed or removed.
    pub touched: bool,
    /// Whether notifications were lost, which can have concerned the table.
    pub may_be_touched: bool,
    /// Whether the node translates addresses now.
    pub translates: bool,
}

/// Content of the notifications that were read at once.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Seen {
    /// Whether another program has changed rules.
    ruleset: bool,
    /// Whether another program has changed the table of this daemon.
    touched: bool,
    /// Whether the last transaction is incomplete: its generation message was not read yet.
    is_open: bool,
    /// Whether notifications were lost.
    lost: bool,
}

fn wait() -> Seen {
    thread::sleep(Duration::from_millis(POLL_INTERVAL_MS.into()));
    Seen::default()
}

/// Waits up to [`POLL_INTERVAL_MS`] for notifications and reads them.
fn notified(socket: &Socket, table: &str, port: &AtomicU32) -> Seen {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(POLL_INTERVAL_MS)) {
        Ok(0) => return Seen::default(),
        Ok(_) => thread::sleep(DEBOUNCE),
        Err(_) => return wait(),
    }
    let mut seen = Seen::default();
    loop {
        match socket.recv_from_full() {
            Ok((received, _)) => read(&received, table, port.load(Ordering::Acquire), &mut seen),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Wait for the rest of an incomplete transaction.
                if seen.is_open && matches!(poll(&mut fds, PollTimeout::from(POLL_INTERVAL_MS)), Ok(1..)) {
                    continue;
                }
                return seen;
            }
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                // The lost notifications can have concerned the table.
                (seen.ruleset, seen.lost) = (true, true);
            }
            Err(_) => {
                thread::sleep(DEBOUNCE);
                return seen;
            }
        }
    }
}

/// Reads the messages of one datagram. Messages that result from requests of netlink port `port` are skipped, because
/// they report the daemon's own writes.
fn read(mut messages: &[u8], table: &str, port: u32, seen: &mut Seen) {
    while let Some(header) = messages.first_chunk::<HEADER>() {
        let [l0, l1, l2, l3, k0, k1, .., p0, p1, p2, p3] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let kind = u16::from_ne_bytes([k0, k1]);
        let Some(message) = messages.get(..length.max(HEADER)) else {
            return;
        };
        if kind >> 8 == SUBSYSTEM && u32::from_ne_bytes([p0, p1, p2, p3]) != port {
            seen.is_open = kind & 0xff != NEW_GENERATION;
            if kind & 0xff == NEW_GENERATION {
                seen.ruleset = true;
            } else {
                // In every other nftables message the attribute of type 1 is the name of the table (`NFTA_RULE_TABLE`
                // and so on).
                let name = message
                    .get(HEADERS..)
                    .and_then(|attributes| nat::find(attributes, 1));
                seen.touched |= name.is_some_and(|name| name.strip_suffix(b"\0") == Some(table.as_bytes()));
            }
        }
        messages = messages
            .get(length.max(HEADER).next_multiple_of(4)..)
            .unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, port: u32, table: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADERS];
        bytes.extend(((4 + table.len()) as u16).to_ne_bytes());
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(table);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes[4..6].copy_from_slice(&(SUBSYSTEM << 8 | kind).to_ne_bytes());
        bytes[12..16].copy_from_slice(&port.to_ne_bytes());
        bytes
    }

    fn seen(messages: &[Vec<u8>]) -> Seen {
        let mut seen = Seen::default();
        let bytes = messages.concat();
        read(&bytes, "palisade", 7, &mut seen);
        for cut in 0..bytes.len() {
            read(&bytes[..cut], "none", 7, &mut Seen::default());
        }
        seen
    }

    #[test]
    fn only_other_programs_changes_of_this_table_are_reported() {
        let generation = |port| message(NEW_GENERATION, port, &[0; 4]);
        let (nothing, touched) = (
            Seen::default(),
            Seen {
                ruleset: true,
                touched: true,
                ..Seen::default()
            },
        );
        assert_eq!(seen(&[message(2, 7, b"palisade\0"), generation(7)]), nothing);
        let half = [message(2, 8, b"palisade\0")];
        assert_eq!(seen(&[half[0].clone(), generation(8)]), touched);
        assert!(seen(&half).is_open && !seen(&half).ruleset);
        let others = Seen {
            ruleset: true,
            ..nothing
        };
        assert_eq!(seen(&[message(2, 8, b"palisade2\0"), generation(8)]), others);
    }
}
