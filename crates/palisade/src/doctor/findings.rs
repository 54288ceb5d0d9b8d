//! Findings about a node: what is in order, what is not, what it means and what to do.

use std::time::Duration;

use palisade_abi::Direction;
use palisade_datapath::{Answer, Feature, HookKind, XdpSupport, panics_after_reinjection};
use palisade_flowlog::duration;
use serde::Serialize;

use super::facts::{DaemonState, Facts, Interface, Role};
use crate::{
    config::{IngressHook, TcHook, XdpMode},
    text::count,
};

/// Severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Level {
    /// In order.
    Ok,
    /// Worth knowing.
    Note,
    /// Something does not work as well as it could, or can fail later.
    Warning,
    /// The daemon cannot start, or does not enforce what it should.
    Error,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// Severity.
    pub level: Level,
    /// What was checked: `kernel`, `interface eth0`.
    pub check: String,
    /// What was found, and what it means.
    pub text: String,
    /// What to do; `None` if everything is in order.
    pub fix: Option<String>,
}

/// First kernel on which Palisade works.
const FIRST_KERNEL: (u32, u32) = (6, 1);
/// Longest punted frame, and longest segment of an inspected connection, bytes (`docs/OPERATIONS.md`, Limits).
const MAX_FRAME: u32 = palisade_abi::MAX_PUNT_FRAME;
/// Length of an Ethernet header, bytes.
const ETHERNET: u32 = 14;
/// Free space below which a warning is due, bytes.
const LOW_SPACE: u64 = 64 << 20;
/// Free inodes below which a warning is due.
const LOW_INODES: u64 = 1_000;
/// File descriptors that the daemon needs besides those of connections of the proxy.
const MIN_FILES: u64 = 4_096;
/// Start of 2026, s since 1970: an earlier wall clock is wrong.
const EARLIEST: u64 = 1_767_225_600;
/// Drivers with native XDP, for kernels that do not report it (before 6.3).
const XDP_DRIVERS: [&str; 26] = [
    "bnxt_en",
    "bonding",
    "ena",
    "fsl_dpaa2_eth",
    "fsl_enetc",
    "gve",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "nfp",
    "nicvf",
    "qede",
    "sfc",
    "stmmac",
    "tun",
    "veth",
    "virtio_net",
];

/// Returns the findings, in the order of the checks.
pub(crate) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings(Vec::new());
    kernel(facts, &mut found);
    bpffs(facts, &mut found);
    limits(facts, &mut found);
    configuration(facts, &mut found);
    policies(facts, &mut found);
    daemon(facts, &mut found);
    directories(facts, &mut found);
    for interface in &facts.interfaces {
        check_interface(facts, interface, &mut found);
    }
    if !facts
        .interfaces
        .iter()
        .any(|interface| interface.role == Role::Host)
        && facts.configuration.exists
    {
        found.add(
            Level::Warning,
            "interfaces",
            "no interface of the configuration is present: the node itself is not guarded",
            "add each NIC (`[[interface]]`, role = \"host\"); `palisade init --dry-run` proposes them",
        );
    }
    routing(facts, &mut found);
    clock(facts, &mut found);
    service(facts, &mut found);
    found.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, check: impl Into<String>, text: impl Into<String>) {
        self.push(Level::Ok, check.into(), text.into(), None);
    }

    fn add(
        &mut self,
        level: Level,
        check: impl Into<String>,
        text: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.push(level, check.into(), text.into(), Some(fix.into()));
    }

    fn push(&mut self, level: Level, check: String, text: String, fix: Option<String>) {
        self.0.push(Finding {
            level,
            check,
            text,
            fix,
        });
    }
}

/// Returns major and minor number of a kernel release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(facts: &Facts, found: &mut Findings) {
    let release = &facts.kernel;
    match version(release) {
        Some(version) if version < FIRST_KERNEL => found.add(
            Level::Error,
            "kernel",
            format!("Linux {release} is older than 6.1, for which Palisade is written"),
            "install a kernel of 6.1 or newer",
        ),
        Some(_) if panics_after_reinjection(release) => found.add(
            Level::Warning,
            "kernel",
            format!(
                "Linux {release} panics when a frame of an AF_XDP socket reaches the IP layer over a veth pair (6.16.8 to \
                 6.17.10). Palisade prevents that by an XDP program at the punt link, which costs a copy of each \
                 reinjected packet"
            ),
            "install 6.17.11, 6.18 or newer",
        ),
        Some(_) => found.ok("kernel", format!("Linux {release}")),
        None => found.add(
            Level::Warning,
            "kernel",
            format!("the release {release:?} has no version number: known faults of kernels are not recognised"),
            "compare the version of the kernel with 6.16.8 to 6.17.10, which panic; see `uname -a`",
        ),
    }
    for (feature, answer) in &facts.features {
        let (name, since, option, means) = about(*feature);
        match answer {
            Answer::Yes => found.ok(name, format!("present (since Linux {since})")),
            Answer::NeedsRoot => found.add(
                Level::Note,
                name,
                "cannot be probed without root",
                "run `sudo palisade doctor`",
            ),
            Answer::No(error) => {
                let level = match feature {
                    Feature::Tcx => Level::Note,
                    Feature::NfTables => Level::Warning,
                    _ => Level::Error,
                };
                let fix = if *feature == Feature::Tcx {
                    format!("nothing, or use a kernel of {since} or newer with {option}")
                } else {
                    format!("use a kernel of {since} or newer with {option}")
                };
                found.add(level, name, format!("missing ({error}): {means}"), fix);
            }
        }
    }
}

/// Returns name, first kernel, configuration option of a feature, and what its absence means.
fn about(feature: Feature) -> (&'static str, &'static str, &'static str, &'static str) {
    match feature {
        Feature::Bpf => ("bpf", "3.18", "CONFIG_BPF_SYSCALL", "no program can be loaded"),
        Feature::Btf => (
            "btf",
            "5.4",
            "CONFIG_DEBUG_INFO_BTF",
            "the programs cannot be loaded",
        ),
        Feature::RingBuffer => (
            "ring buffer",
            "5.8",
            "CONFIG_BPF_SYSCALL",
            "the programs cannot be loaded",
        ),
        Feature::SocketMaps => (
            "socket maps",
            "4.18",
            "CONFIG_XDP_SOCKETS and CONFIG_BPF_STREAM_PARSER",
            "no worker and no proxy can run",
        ),
        Feature::AfXdp => (
            "af_xdp",
            "4.18",
            "CONFIG_XDP_SOCKETS",
            "no worker runs, and packets that need inspection (dns, http, kafka, serverNames) are dropped",
        ),
        Feature::Tcx => (
            "tcx",
            "6.6",
            "CONFIG_NET_XGRESS",
            "programs are attached behind a clsact qdisc instead, so a program that detaches the qdisc detaches them",
        ),
        Feature::NfTables => (
            "nf_tables",
            "3.13",
            "CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET",
            "packets that DNAT, TPROXY or routing by mark redirects to the node, and those of interfaces that are \
             configured and not yet guarded, are not stopped",
        ),
    }
}

fn bpffs(facts: &Facts, found: &mut Findings) {
    let (dir, problem) = &facts.pin_dir;
    match problem {
        Some(problem) => found.add(
            Level::Error,
            "bpffs",
            format!("[node] pin_dir cannot hold pins: {problem}"),
            "mount -t bpf -o nosuid,nodev,noexec,mode=0700 bpf /sys/fs/bpf (the systemd unit does that)",
        ),
        None => match facts.bpffs_mode {
            Some(mode) if mode & 0o022 != 0 && mode & 0o1000 == 0 => found.add(
                Level::Error,
                "bpffs",
                format!(
                    "/sys/fs/bpf can be written by other users than root (mode {:04o}): they could replace pins",
                    mode & 0o7777
                ),
                "chmod go-w /sys/fs/bpf, or mount it with mode=0700",
            ),
            _ => found.ok("bpffs", format!("mounted; pins are in {}", dir.display())),
        },
    }
}

fn limits(facts: &Facts, found: &mut Findings) {
    let (limits, need) = (&facts.limits, facts.umem);
    match limits.memlock {
        Some(limit) if limit < need => found.add(
            Level::Warning,
            "locked memory",
            format!(
                "{} may lock {} KiB; the frames of all workers need {} KiB unless the process has CAP_IPC_LOCK: workers may \
                 not start, and packets that need inspection are dropped",
                limits.of,
                limit >> 10,
                need >> 10
            ),
            "LimitMEMLOCK=infinity in the unit (config/palisade.service has it), `ulimit -l unlimited` in a shell, or fewer \
             [worker] frames",
        ),
        Some(limit) => found.ok(
            "locked memory",
            format!("{} may lock {} KiB, {} KiB are needed", limits.of, limit >> 10, need >> 10),
        ),
        None => found.ok("locked memory", format!("no limit for {}", limits.of)),
    }
    match limits.files {
        Some(limit) if limit < MIN_FILES => found.add(
            Level::Warning,
            "open files",
            format!(
                "{} may open {limit} files: intercepted connections need two each and fail beyond that",
                limits.of
            ),
            "LimitNOFILE=524288 in the unit (config/palisade.service has it)",
        ),
        _ => found.ok("open files", format!("enough for {}", limits.of)),
    }
}

fn configuration(facts: &Facts, found: &mut Findings) {
    let configuration = &facts.configuration;
    let path = configuration.path.display();
    if !configuration.exists {
        found.add(
            Level::Error,
            "configuration",
            format!("{path} does not exist: the daemon cannot start"),
            "`palisade init` writes a first one in audit mode",
        );
        return;
    }
    for error in &configuration.errors {
        found.add(
            Level::Error,
            "configuration",
            error.clone(),
            "correct the line; until then the last good copy is in force",
        );
    }
    for problem in &configuration.refused {
        found.add(
            Level::Error,
            "configuration",
            format!("the daemon refuses to start: {problem}"),
            "as the message says",
        );
    }
    for warning in &configuration.warnings {
        found.add(
            Level::Warning,
            "configuration",
            warning.clone(),
            "correct what the message names; `palisade run --check-config` prints it again",
        );
    }
    if configuration.errors.is_empty() && configuration.refused.is_empty() {
        found.ok("configuration", format!("{path} is valid"));
    }
    if configuration.audit {
        found.add(
            Level::Note,
            "configuration",
            "[policy] audit = true: what policy denies passes, and is reported as AUDIT",
            "look at `palisade observe --verdict audit`; remove `audit = true` and `palisade reload` to enforce",
        );
    }
}

fn policies(facts: &Facts, found: &mut Findings) {
    let policies = &facts.policies;
    if !policies.exists {
        found.add(
            Level::Error,
            "policies",
            format!(
                "the folder {} does not exist: the daemon does not start without it",
                policies.dir.display()
            ),
            "make it, or let `palisade init` write a first policy",
        );
        return;
    }
    for error in &policies.errors {
        found.add(
            Level::Error,
            "policies",
            error.clone(),
            "correct the file; until then its last good content is in force, or nothing of it",
        );
    }
    for warning in &policies.warnings {
        found.add(
            Level::Warning,
            "policies",
            warning.clone(),
            "see that the policy means what you want; `palisade policy validate` prints the warning again",
        );
    }
    let (files, number) = policies.counts;
    if number == 0 && policies.errors.is_empty() {
        found.add(
            Level::Note,
            "policies",
            format!("{} has no policy: everything passes", policies.dir.display()),
            "`palisade init --dry-run` proposes one for this node",
        );
    } else if policies.errors.is_empty() {
        found.ok(
            "policies",
            format!(
                "{} in {} of {} are valid",
                count(number, "policy", "policies"),
                count(files, "file", "files"),
                policies.dir.display()
            ),
        );
    }
}

fn daemon(facts: &Facts, found: &mut Findings) {
    match &facts.daemon {
        DaemonState::Runs {
            ready,
            missing,
            warnings,
        } => {
            if *ready {
                found.ok("daemon", "runs; everything is attached and enforced");
            }
            for text in missing {
                found.add(
                    Level::Error,
                    "daemon",
                    format!("NOT READY: {text}"),
                    "`palisade status` shows the whole state",
                );
            }
            for text in warnings {
                found.add(
                    Level::Warning,
                    "daemon",
                    text.clone(),
                    "`palisade status` shows the whole state, docs/TROUBLESHOOTING.md the causes",
                );
            }
        }
        DaemonState::Stopped { interfaces: Some(0) } => found.add(
            Level::Warning,
            "daemon",
            "is not running, and nothing is attached: everything passes",
            "systemctl start palisade",
        ),
        DaemonState::Stopped {
            interfaces: Some(number),
        } => found.add(
            Level::Warning,
            "daemon",
            format!(
                "is not running; its last policy is still enforced at {}, packets that need inspection are dropped",
                count(*number, "interface", "interfaces")
            ),
            "systemctl start palisade",
        ),
        DaemonState::Stopped { interfaces: None } => found.add(
            Level::Warning,
            "daemon",
            "is not running; whether its last policy is still enforced cannot be read without root",
            "systemctl start palisade",
        ),
        DaemonState::Unknown(problem) => found.add(
            if facts.root { Level::Error } else { Level::Note },
            "daemon",
            problem.clone(),
            if facts.root {
                "systemctl restart palisade"
            } else {
                "run `sudo palisade doctor`"
            },
        ),
    }
}

fn directories(facts: &Facts, found: &mut Findings) {
    for directory in &facts.directories {
        let (name, path) = (&directory.setting, directory.path.display());
        if directory.read_only {
            found.add(
                Level::Warning,
                name,
                format!("{path} is on a read-only file system: the daemon runs, but nothing is saved"),
                "mount -o remount,rw, or set another directory",
            );
        } else if directory.free.is_some_and(|free| free < LOW_SPACE) {
            found.add(
                Level::Warning,
                name,
                format!(
                    "{path} has {} KiB free: soon nothing can be saved, and changes are lost at the next start",
                    directory.free.unwrap_or(0) >> 10
                ),
                "make room on this file system",
            );
        } else if directory.free_inodes.is_some_and(|free| free < LOW_INODES) {
            found.add(
                Level::Warning,
                name,
                format!("{path} has {} inodes free", directory.free_inodes.unwrap_or(0)),
                "remove files from this file system",
            );
        } else if let Some(free) = directory.free {
            found.ok(name, format!("{path}: {} MiB free", free >> 20));
        }
    }
}

/// Returns whether the ingress program of an interface would be an XDP program.
fn wants_xdp(interface: &Interface) -> bool {
    match interface.attachment.ingress {
        IngressHook::Xdp => true,
        IngressHook::Tc => false,
        // A tunnel has no Ethernet header.
        IngressHook::Auto => {
            let is_tunnel = matches!(
                interface.kind.as_str(),
                "wireguard" | "tun" | "ipip" | "sit" | "gre" | "ip6gre" | "ip6tnl" | "ppp"
            );
            interface.role == Role::Host && !is_tunnel
        }
    }
}

fn check_interface(facts: &Facts, interface: &Interface, found: &mut Findings) {
    let check = format!("interface {}", interface.name);
    if interface.kind == "vrf" && interface.role != Role::None {
        found.add(
            Level::Warning,
            check.clone(),
            "is a VRF: its packets get their verdict at its ports, and a second one here",
            "configure its ports, the NICs and veths, in its place",
        );
    }
    if interface.role == Role::None {
        let is_way_in = interface.kind.is_empty() && interface.has_addresses && !interface.is_bond_port;
        if is_way_in && facts.configuration.exists {
            found.add(
                Level::Warning,
                check,
                "a NIC with addresses that the configuration does not name: packets pass there without a verdict",
                format!("add `[[interface]] name = \"{}\" role = \"host\"`", interface.name),
            );
        }
        return;
    }
    let before = found.0.len();
    if !interface.up {
        found.add(
            Level::Note,
            check.clone(),
            "is down",
            format!(
                "nothing if that is intended; else `ip link set dev {} up`",
                interface.name
            ),
        );
    }
    xdp_mode(interface, &check, found);
    if interface.offloads.lro && interface.role == Role::Host {
        found.add(
            Level::Warning,
            check.clone(),
            "LRO is on: the NIC merges TCP segments. Drivers refuse native XDP with it, and merged frames longer than a \
             punted frame are dropped where they need inspection (232)",
            format!("ethtool -K {} lro off", interface.name),
        );
    }
    if interface.offloads.rx_vlan && interface.has_vlans && wants_xdp(interface) {
        found.add(
            Level::Note,
            check.clone(),
            "VLAN interfaces stand on it and the NIC removes the tags of received frames (rxvlan): an XDP program sees \
             these frames without their tag. The verdict does not depend on the tag",
            format!(
                "nothing; `ethtool -K {} rxvlan off` leaves the tags in captured frames",
                interface.name
            ),
        );
    }
    if let Some(vrf) = &interface.vrf {
        found.add(
            Level::Note,
            check.clone(),
            format!(
                "is a port of the VRF {vrf}: its packets get their verdict here, and {vrf} has no programs of its own; no kernel \
                 with VRFs was tested"
            ),
            format!("nothing; do not configure {vrf} too, see docs/INTERFACES.md"),
        );
    }
    if facts.policies.inspect && interface.mtu + ETHERNET > MAX_FRAME {
        found.add(
            Level::Note,
            check.clone(),
            format!(
                "its MTU of {} exceeds the longest punted frame ({MAX_FRAME} bytes): inspected connections use smaller \
                 segments, and longer datagrams that need inspection are dropped (232)",
                interface.mtu
            ),
            format!(
                "nothing for TCP; for datagrams that need inspection, an MTU of at most {}",
                MAX_FRAME - ETHERNET
            ),
        );
    }
    if interface.rp_filter == 1 && interface.role == Role::Host {
        found.add(
            Level::Note,
            check.clone(),
            "rp_filter is 1 (strict): after Palisade has passed a packet, the kernel drops it unless the route to its source \
             leads through this interface. Flow records do not show such drops (`nstat -az TcpExtIPReversePathFilter` \
             counts them)",
            format!(
                "nothing with symmetric routes; else sysctl net.ipv4.conf.{}.rp_filter=2",
                interface.name
            ),
        );
    }
    occupants(interface, &check, found);
    if found.0[before..]
        .iter()
        .all(|finding| finding.level < Level::Warning)
    {
        let attached = interface.occupants.as_ref().ok().and_then(|occupants| {
            occupants
                .iter()
                .find(|one| one.is_palisade() && one.direction == Direction::Ingress)
        });
        let how = match (wants_xdp(interface), interface.xdp) {
            _ if attached.is_some_and(|one| one.hook == HookKind::XdpNative) => "native XDP",
            _ if attached.is_some_and(|one| one.hook == HookKind::XdpGeneric) => "generic XDP",
            _ if attached.is_some() => "tc",
            (true, XdpSupport::Native) => "native XDP",
            (true, _) if native_by_driver(interface) => "native XDP (by its driver)",
            (true, _) if interface.attachment.xdp_mode == XdpMode::Skb => "generic XDP",
            _ => "tc",
        };
        let driver = match interface.offloads.driver.as_str() {
            "" => String::new(),
            driver => format!(", driver {driver}"),
        };
        let verb = if attached.is_some() {
            "guarded"
        } else {
            "will be guarded"
        };
        found.ok(
            check,
            format!("{verb} by {how} at ingress{driver}, MTU {}", interface.mtu),
        );
    }
}

fn native_by_driver(interface: &Interface) -> bool {
    interface.xdp == XdpSupport::Unknown && XDP_DRIVERS.contains(&interface.offloads.driver.as_str())
}

fn xdp_mode(interface: &Interface, check: &str, found: &mut Findings) {
    if !wants_xdp(interface) || interface.xdp == XdpSupport::Native || native_by_driver(interface) {
        return;
    }
    let driver = match interface.offloads.driver.as_str() {
        "" => "its driver".to_owned(),
        driver => format!("the driver {driver}"),
    };
    if interface.xdp == XdpSupport::Unknown {
        found.add(
            Level::Note,
            check,
            format!("whether {driver} has native XDP is unknown (Linux reports it since 6.3)"),
            "the first start shows it: see INGRESS in `palisade status`",
        );
        return;
    }
    match (interface.attachment.ingress, interface.attachment.xdp_mode) {
        (IngressHook::Xdp, XdpMode::Native) => found.add(
            Level::Error,
            check,
            format!("{driver} has no native XDP, and ingress = \"xdp\" requires it: the interface would not be guarded"),
            "set ingress = \"auto\" or \"tc\" for this interface",
        ),
        (_, XdpMode::Auto | XdpMode::Skb) => found.add(
            Level::Note,
            check,
            format!("{driver} has no native XDP: generic XDP is used, which is slow and cannot inspect"),
            "set ingress = \"tc\" for this interface",
        ),
        _ => found.add(
            Level::Note,
            check,
            format!("{driver} has no native XDP: the program runs at tc, after the kernel has allocated its packet buffer"),
            "nothing; a NIC with native XDP drops packets at less cost",
        ),
    }
}

/// Adds what other software has attached, and its place in the order.
fn occupants(interface: &Interface, check: &str, found: &mut Findings) {
    let occupants = match &interface.occupants {
        Ok(occupants) => occupants,
        Err(problem) => {
            found.add(
                Level::Note,
                check,
                format!("programs of other software at its hooks cannot be read: {problem}"),
                "run `sudo palisade doctor`",
            );
            return;
        }
    };
    for (place, other) in occupants
        .iter()
        .enumerate()
        .filter(|(_, other)| !other.is_palisade())
    {
        let name = match (other.name.as_str(), other.program) {
            ("", id) => format!("id {id}"),
            (name, 0) => format!("`{name}`"),
            (name, id) => format!("`{name}` (id {id})"),
        };
        let hook = match other.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        match other.hook {
            HookKind::XdpNative | HookKind::XdpGeneric if wants_xdp(interface) => found.add(
                Level::Error,
                check,
                format!("another XDP program, {name}, is attached: Palisade's cannot be"),
                format!(
                    "remove it (`ip link set dev {} xdp off`, or end the software that holds it), or set ingress = \"tc\" for \
                     this interface",
                    interface.name
                ),
            ),
            HookKind::XdpNative | HookKind::XdpGeneric => found.add(
                Level::Note,
                check,
                format!("an XDP program of other software, {name}, sees packets before Palisade and can change or redirect them"),
                "see that this program is meant to be there: policies decide about what it leaves",
            ),
            HookKind::Clsact if interface.attachment.tc == TcHook::Clsact && other.priority <= 1 => found.add(
                Level::Error,
                check,
                format!("the {hook} filter {name} has priority {}, which Palisade's filter needs", other.priority),
                "give it a higher priority number",
            ),
            _ => {
                let before = occupants[..place]
                    .iter()
                    .all(|one| !(one.is_palisade() && one.direction == other.direction));
                let is_present = occupants
                    .iter()
                    .any(|one| one.is_palisade() && one.direction == other.direction);
                let order = match (is_present, before) {
                    (false, _) => "Palisade's program will run before it",
                    (true, false) => "it runs after Palisade's, and sees only what passes",
                    (true, true) => {
                        "it runs BEFORE Palisade's program: it can pass packets past the firewall, or change them"
                    }
                };
                // At egress the program that runs last sees the packet as it is sent.
                let level = if is_present && before { Level::Warning } else { Level::Note };
                let fix = if level == Level::Warning {
                    "restart the daemon (it attaches in front), or move the other program"
                } else {
                    "nothing if you know this program"
                };
                found.add(
                    level,
                    check,
                    format!("the {} program {name} of other software is at {hook}: {order}", other.hook),
                    fix,
                );
            }
        }
    }
}

fn routing(facts: &Facts, found: &mut Findings) {
    for translation in &facts.translations {
        found.add(
            Level::Note,
            "nat",
            format!(
                "{translation}: addresses and ports of a packet at the hook can differ from those at its socket. The verdict \
                 follows those on the wire"
            ),
            "docs/OPERATIONS.md, Limits; write rules for the addresses on the wire, and try `palisade policy trace`",
        );
    }
    if facts.translations.is_empty() {
        found.ok("nat", "no rules that translate or redirect");
    }
    if !facts.has_workloads {
        return;
    }
    for ((family, sysctl), forwards) in [
        ("IPv4", "net.ipv4.ip_forward"),
        ("IPv6", "net.ipv6.conf.all.forwarding"),
    ]
    .into_iter()
    .zip(facts.forwarding)
    {
        match forwards {
            Some(true) => found.ok("forwarding", format!("{family} is forwarded")),
            Some(false) => found.add(
                Level::Warning,
                "forwarding",
                format!("{family} is not forwarded: workloads behind routed interfaces reach only the node"),
                format!("sysctl -w {sysctl}=1, and the same line in /etc/sysctl.d (not needed if they are bridged)"),
            ),
            None => {}
        }
    }
}

fn clock(facts: &Facts, found: &mut Findings) {
    let clock = &facts.clock;
    if clock.now < EARLIEST {
        found.add(
            Level::Error,
            "clock",
            "the wall clock is years behind: certificates are not valid yet, and flow records have wrong times",
            "set the clock, and let chrony or systemd-timesyncd keep it",
        );
    } else if let Some(file) = &clock.newer_file {
        found.add(
            Level::Warning,
            "clock",
            format!(
                "the wall clock is behind the time at which {} was written: it was set back, or is wrong",
                file.display()
            ),
            "check it with `timedatectl`",
        );
    } else if clock.synchronised == Some(false) {
        found.add(
            Level::Note,
            "clock",
            "is not synchronised (NTP): flow records of several nodes cannot be compared, and certificates may be refused",
            "install chrony or enable systemd-timesyncd",
        );
    } else {
        found.ok("clock", "plausible");
    }
}

fn service(facts: &Facts, found: &mut Findings) {
    let service = &facts.service;
    if !service.systemd {
        found.add(
            Level::Note,
            "service",
            "systemd is not the service manager here",
            "let yours start `palisade run` before the network, and restart it when it fails",
        );
        return;
    }
    let Some(unit) = &service.unit else {
        found.add(
            Level::Warning,
            "service",
            "the unit palisade.service is not installed: nothing starts the daemon at boot",
            "install config/palisade.service (README, Install)",
        );
        return;
    };
    if !service.enabled {
        found.add(
            Level::Warning,
            "service",
            format!(
                "{} is not enabled: after a boot everything passes",
                unit.display()
            ),
            "systemctl enable palisade",
        );
    }
    if !service.watchdog {
        found.add(
            Level::Warning,
            "service",
            format!(
                "{} has no WatchdogSec=: a hanging daemon is not restarted",
                unit.display()
            ),
            format!("set WatchdogSec={}", duration::format(Duration::from_secs(60))),
        );
    }
    if service.enabled && service.watchdog {
        found.ok(
            "service",
            format!("{} is enabled and has a watchdog", unit.display()),
        );
    }
}

#[cfg(test)]
mod tests;
