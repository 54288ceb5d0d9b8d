//! systemd units of the node's own sockets, for flow records: the cgroup of the socket names the unit.
//!
//! Nothing is looked up per packet, but for each record of the node that is made, at most [`LOOKUPS_PER_SECOND`] times per
//! second. What the last record of a flow has found is kept for a while, because the socket is gone when the flow ends. Start
//! at [`Units::of`].

use std::{
    collections::{HashMap, VecDeque},
    fs,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use palisade_datapath::LocalSockets;
use palisade_flowlog::flow::Workload;
use tracing::debug;

/// Largest number of lookups of sockets per second. Each costs a system call or two.
const LOOKUPS_PER_SECOND: u32 = 2_000;
/// Largest number of flows whose unit is kept.
const MAX_FLOWS: usize = 4_096;
/// Time for which the unit of a flow without a socket is kept.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// Shortest time between two walks through the cgroups.
const WALK_INTERVAL: Duration = Duration::from_secs(1);
/// Largest number of cgroups, and of levels, of a walk.
const MAX_CGROUPS: usize = 16_384;
const MAX_DEPTH: usize = 8;
/// Kind of the workload in flow records.
const KIND: &str = "SystemdUnit";

/// Protocol, local end and remote end of a flow.
type FlowKey = (u8, SocketAddr, SocketAddr);
type Workloads = Arc<[Workload]>;

/// Finds the units of local sockets.
#[derive(Default)]
pub(super) struct Units(Mutex<State>);

#[derive(Default)]
struct State {
    sockets: Option<LocalSockets>,
    /// Units by the number of their cgroup; `None` for a cgroup of no unit.
    cgroups: HashMap<u64, Option<Workloads>>,
    walked: Option<Instant>,
    flows: HashMap<FlowKey, (Workloads, Instant)>,
    /// The keys of `flows`, the oldest first.
    order: VecDeque<FlowKey>,
    /// Begin of the present second, and the lookups in it.
    second: Option<(Instant, u32)>,
}

impl std::fmt::Debug for Units {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Units").finish_non_exhaustive()
    }
}

impl Units {
    /// Returns the unit of the socket at `local` that has, or would get, the packets of `remote`, as the workload of a flow
    /// record; empty if it is not known.
    pub(super) fn of(&self, protocol: u8, local: SocketAddr, remote: SocketAddr) -> Workloads {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let key = (protocol, local, remote);
        match state.look_up(key, now) {
            Some(unit) => {
                state.keep(key, &unit, now);
                unit
            }
            None => state.kept(&key, now),
        }
    }
}

impl State {
    fn look_up(&mut self, (protocol, local, remote): FlowKey, now: Instant) -> Option<Workloads> {
        let (since, lookups) = self.second.get_or_insert((now, 0));
        if now.duration_since(*since) >= Duration::from_secs(1) {
            (*since, *lookups) = (now, 0);
        }
        if *lookups >= LOOKUPS_PER_SECOND {
            return None;
        }
        *lookups += 1;
        if self.sockets.is_none() {
            self.sockets = LocalSockets::open().ok();
        }
        let cgroup = match self.sockets.as_mut()?.cgroup_of(protocol, local, remote) {
            Ok(cgroup) => cgroup?,
            Err(error) => {
                debug!(%error, "the socket of a flow cannot be looked up");
                // The next lookup gets a new socket: an answer that comes late must not be taken for its answer.
                self.sockets = None;
                return None;
            }
        };
        self.unit(cgroup, now)
    }

    fn unit(&mut self, cgroup: u64, now: Instant) -> Option<Workloads> {
        let is_due = self
            .walked
            .is_none_or(|walked| now.duration_since(walked) >= WALK_INTERVAL);
        if !self.cgroups.contains_key(&cgroup) && is_due {
            self.walked = Some(now);
            self.cgroups = root().map(|root| walk(&root)).unwrap_or_default();
            // So that a cgroup that the walk does not reach causes no further walks.
            self.cgroups.entry(cgroup).or_default();
        }
        self.cgroups.get(&cgroup).cloned().flatten()
    }

    fn keep(&mut self, key: FlowKey, unit: &Workloads, now: Instant) {
        if self.flows.insert(key, (Arc::clone(unit), now)).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > MAX_FLOWS
            && let Some(oldest) = self.order.pop_front()
        {
            self.flows.remove(&oldest);
        }
    }

    fn kept(&self, key: &FlowKey, now: Instant) -> Workloads {
        match self.flows.get(key) {
            Some((unit, at)) if now.duration_since(*at) < KEPT_FOR => Arc::clone(unit),
            _ => Arc::default(),
        }
    }
}

/// Returns the folder of the root of the cgroup2 hierarchy.
fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let of_root = |line: &&str| line.contains(" - cgroup2 ") && line.split(' ').nth(3) == Some("/");
    let line = mounts.lines().find(of_root)?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// Returns the units of all cgroups by number, which is the inode of the folder.
fn walk(root: &Path) -> HashMap<u64, Option<Workloads>> {
    let mut found: HashMap<u64, Option<Workloads>> = HashMap::new();
    let mut queue = VecDeque::from([(root.to_owned(), 0)]);
    // One value for all cgroups of a unit.
    let mut units: HashMap<String, Workloads> = HashMap::new();
    while let Some((dir, depth)) = queue.pop_front() {
        if found.len() >= MAX_CGROUPS {
            break;
        }
        // A cgroup can end meanwhile.
        let Ok(metadata) = fs::metadata(&dir) else {
            continue;
        };
        let path = dir
            .strip_prefix(root)
            .ok()
            .and_then(Path::to_str)
            .unwrap_or_default();
        let unit = unit_of(path).map(|name| {
            let unit = units.entry(name.to_owned()).or_insert_with(|| {
                let (name, kind) = (name.into(), KIND.into());
                [Workload { name, kind }].into()
            });
            Arc::clone(unit)
        });
        found.insert(metadata.ino(), unit);
        if depth < MAX_DEPTH {
            let children = fs::read_dir(&dir).into_iter().flatten().flatten();
            let folders = children.filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir()));
            queue.extend(folders.map(|child| (child.path(), depth + 1)));
        }
    }
    found
}

/// Returns the unit of a cgroup: the first component that is no slice. Folders below it are made by the unit itself, or by
/// its user if it is delegated, with any name; so they do not count.
fn unit_of(path: &str) -> Option<&str> {
    const UNITS: [&str; 5] = [".service", ".scope", ".socket", ".mount", ".swap"];
    let unit = path.split('/').find(|part| !part.ends_with(".slice"))?;
    // systemd puts an underscore before names that the kernel could take for its own files.
    let unit = unit.strip_prefix('_').unwrap_or(unit);
    let is_text = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    let is_unit = UNITS
        .iter()
        .any(|kind| unit.len() > kind.len() && unit.ends_with(kind));
    (is_unit && unit.bytes().all(is_text)).then_some(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_the_first_component_that_is_no_slice() {
        for (path, unit) in [
            ("system.slice/nginx.service", Some("nginx.service")),
            (
                "system.slice/system-getty.slice/getty@tty1.service",
                Some("getty@tty1.service"),
            ),
            (
                "system.slice/docker-0a1b.scope/inner.service",
                Some("docker-0a1b.scope"),
            ),
            ("system.slice/ssh.socket", Some("ssh.socket")),
            (
                "user.slice/user-1000.slice/session-3.scope",
                Some("session-3.scope"),
            ),
            // What a user runs cannot pass for a unit of the system.
            (
                "user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service",
                Some("user@1000.service"),
            ),
            ("system.slice/_cpu.service", Some("cpu.service")),
            ("init.scope", Some("init.scope")),
            ("", None),
            ("system.slice", None),
            ("init", None),
            (".service", None),
            ("a b.service", None),
            ("a\u{1b}.service", None),
            ("machine/nginx.service", None),
        ] {
            assert_eq!(unit_of(path), unit, "{path}");
        }
    }

    #[test]
    fn a_unit_is_kept_for_a_while_and_for_a_bounded_number_of_flows() {
        let mut state = State::default();
        let now = Instant::now();
        let unit: Workloads = [Workload {
            name: "a.service".into(),
            kind: KIND.into(),
        }]
        .into();
        let key = |port: u16| {
            let end = |port| SocketAddr::from(([192, 0, 2, 1], port));
            (6, end(22), end(port))
        };
        for port in 0..=MAX_FLOWS as u16 {
            state.keep(key(port), &unit, now);
            state.keep(key(port), &unit, now);
        }
        assert_eq!((state.flows.len(), state.order.len()), (MAX_FLOWS, MAX_FLOWS));
        assert_eq!(state.kept(&key(0), now), Arc::default());
        assert_eq!(state.kept(&key(1), now), unit);
        assert_eq!(state.kept(&key(1), now + KEPT_FOR), Arc::default());
    }

    #[test]
    fn lookups_are_bounded() {
        let units = Units::default();
        let end = |port| SocketAddr::from(([127, 0, 0, 1], port));
        for _ in 0..LOOKUPS_PER_SECOND + 10 {
            units.of(6, end(1), end(2));
        }
        let state = units.0.lock().unwrap();
        let (_, lookups) = state.second.unwrap();
        assert!(lookups <= LOOKUPS_PER_SECOND);
    }
}
