//! Facts about a node, as they were read.

use std::path::PathBuf;

use palisade_datapath::{Answer, Feature, Occupant, Offloads, XdpSupport};

use crate::config::{Attachment, IngressHook, TcHook, XdpMode};

/// All facts.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Whether the command runs as root.
    pub root: bool,
    /// Kernel release.
    pub kernel: String,
    /// Kernel features.
    pub features: Vec<(Feature, Answer)>,
    /// Pin directory, and why it cannot hold pins.
    pub pin_dir: (PathBuf, Option<String>),
    /// Mode of the root of the bpffs; `None` if it cannot be read.
    pub bpffs_mode: Option<u32>,
    /// Limits of the daemon's process.
    pub limits: Limits,
    /// Memory that the sockets of all workers lock, bytes.
    pub umem: u64,
    /// The configuration.
    pub configuration: Configuration,
    /// The policies.
    pub policies: Policies,
    /// The daemon.
    pub daemon: DaemonState,
    /// Interfaces of this network namespace without the loopback and Palisade's own.
    pub interfaces: Vec<Interface>,
    /// Whether the configuration has endpoints besides the node.
    pub has_workloads: bool,
    /// Rules that translate addresses or redirect packets.
    pub translations: Vec<String>,
    /// Whether the node forwards IPv4 and IPv6; `None` if the family is disabled.
    pub forwarding: [Option<bool>; 2],
    /// The clocks.
    pub clock: Clock,
    /// Directories that the daemon writes to.
    pub directories: Vec<Directory>,
    /// The service manager.
    pub service: Service,
}

/// Limits of a process. `None`: unlimited.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limits {
    /// Whose limits these are, for the text of a finding: `the daemon`, `this shell`.
    pub of: String,
    /// Locked memory (RLIMIT_MEMLOCK), bytes.
    pub memlock: Option<u64>,
    /// Open files (RLIMIT_NOFILE).
    pub files: Option<u64>,
}

/// State of the configuration file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configuration {
    /// Path of the file.
    pub path: PathBuf,
    /// Whether the file exists.
    pub exists: bool,
    /// Errors of the file.
    pub errors: Vec<String>,
    /// Why the daemon would refuse to start with it on this node.
    pub refused: Vec<String>,
    /// Warnings about the node, such as missing interfaces.
    pub warnings: Vec<String>,
    /// Whether `[policy] audit` is set.
    pub audit: bool,
}

/// State of the policy folder.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policies {
    /// Path of the folder.
    pub dir: PathBuf,
    /// Whether the folder exists.
    pub exists: bool,
    /// Numbers of files and policies.
    pub counts: (usize, usize),
    /// Errors.
    pub errors: Vec<String>,
    /// Warnings.
    pub warnings: Vec<String>,
    /// Whether a rule needs inspection.
    pub inspect: bool,
}

/// State of the daemon.
#[derive(Clone, Debug)]
pub(crate) enum DaemonState {
    /// It does not run. `interfaces`: interfaces at which an earlier daemon has left programs; `None` if unknown.
    Stopped {
        /// Number of interfaces.
        interfaces: Option<usize>,
    },
    /// It answers.
    Runs {
        /// Whether everything is attached and enforced.
        ready: bool,
        /// What is not.
        missing: Vec<String>,
        /// Warnings of `palisade status`.
        warnings: Vec<String>,
    },
    /// It cannot be queried, for this reason.
    Unknown(String),
}

/// Use of an interface in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// `[[interface]]`.
    Host,
    /// `[[endpoint]]`.
    Endpoint,
    /// Not configured.
    None,
}

/// An interface.
#[derive(Clone, Debug)]
pub(crate) struct Interface {
    /// Name.
    pub name: String,
    /// Use in the configuration.
    pub role: Role,
    /// Kind of a virtual interface (`veth`, `bridge`, `bond`, `vlan`); empty for a NIC.
    pub kind: String,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it has an address besides a link-local one.
    pub has_addresses: bool,
    /// Whether it is a port of a bond.
    pub is_bond_port: bool,
    /// Name of the VRF of which it is a port.
    pub vrf: Option<String>,
    /// Whether VLAN interfaces stand on it.
    pub has_vlans: bool,
    /// MTU, bytes.
    pub mtu: u32,
    /// XDP support of the driver.
    pub xdp: XdpSupport,
    /// Driver and offloads.
    pub offloads: Offloads,
    /// Programs at its hooks, or why they cannot be read.
    pub occupants: Result<Vec<Occupant>, String>,
    /// Effective reverse path filter: 0 off, 1 strict, 2 loose.
    pub rp_filter: u8,
    /// Hooks of the configuration.
    pub attachment: Attachment,
}

impl Interface {
    /// Returns a NIC without a program that is configured as an interface of the node.
    #[cfg(test)]
    pub(crate) fn nic(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            role: Role::Host,
            kind: String::new(),
            up: true,
            has_addresses: true,
            is_bond_port: false,
            vrf: None,
            has_vlans: false,
            mtu: 1_500,
            xdp: XdpSupport::Native,
            offloads: Offloads {
                driver: "ixgbe".to_owned(),
                ..Offloads::default()
            },
            occupants: Ok(Vec::new()),
            rp_filter: 2,
            attachment: DEFAULT_ATTACHMENT,
        }
    }
}

/// Hooks of an interface without options.
pub(crate) const DEFAULT_ATTACHMENT: Attachment = Attachment {
    ingress: IngressHook::Auto,
    xdp_mode: XdpMode::Native,
    tc: TcHook::Auto,
};

/// The clocks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    /// Whether the kernel's clock is synchronised (adjtimex(2)); `None` if that cannot be read.
    pub synchronised: Option<bool>,
    /// Wall clock, s since 1970.
    pub now: u64,
    /// A file of Palisade with a later time of modification, if there is one.
    pub newer_file: Option<PathBuf>,
}

/// A directory to which the daemon writes.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    /// Option of the configuration.
    pub setting: String,
    /// Path.
    pub path: PathBuf,
    /// Free space for root, bytes; `None` if the file system cannot be queried.
    pub free: Option<u64>,
    /// Free inodes; `None` if the file system has no fixed number.
    pub free_inodes: Option<u64>,
    /// Whether the file system is mounted read-only.
    pub read_only: bool,
}

/// The service manager.
#[derive(Clone, Debug, Default)]
pub(crate) struct Service {
    /// Whether systemd is the service manager.
    pub systemd: bool,
    /// Path of the unit.
    pub unit: Option<PathBuf>,
    /// Whether the unit is started at boot.
    pub enabled: bool,
    /// Whether the unit has a watchdog.
    pub watchdog: bool,
}
