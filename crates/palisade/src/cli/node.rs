//! Command lines of `palisade init`, `palisade doctor` and `palisade uninstall`.

use std::path::PathBuf;

use clap::Args;

use super::OutputArgs;

/// Text after the options of `palisade init --help`.
pub(super) const INIT_HELP: &str = "Examples:
  palisade init --dry-run
  palisade init
  palisade init --egress --config ./palisade.toml --dir ./policies.d

Looks at interfaces, routes, listening sockets, the ssh session, firewall rules, container engines and network namespaces,
and changes none of them. Every NIC becomes an interface of the configuration. Every socket that others can reach gets an
ingress rule from everywhere, with a comment that names its process; sockets at loopback addresses get none. Routes, accept
rules of nftables, and sections for workloads that can be found become comments. The configuration is in audit mode, so
nothing is dropped until you remove `audit = true`. Both files are checked before and after they are written. A
configuration that guards nothing, as the package installs it, is kept as FILE.old. As root, the names of all processes are
found.";

/// Flags of `palisade init`.
#[derive(Clone, Debug, Args)]
pub(crate) struct InitArgs {
    /// Folder of the policy file [default: policies.d beside the configuration].
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Also restrict what the node sends: DNS, NTP, DHCP, and the ports of connections that are open now.
    #[arg(long)]
    pub egress: bool,
    /// Replace files that are there; the old ones are kept as FILE.old.
    #[arg(long)]
    pub force: bool,
    /// Only print both files.
    #[arg(long)]
    pub dry_run: bool,
}

/// Text after the options of `palisade doctor --help`.
pub(super) const DOCTOR_HELP: &str = "Examples:
  palisade doctor
  palisade doctor --config ./palisade.toml
  palisade doctor -o json | jq '.[] | select(.level == \"error\")'

Reads only, and changes nothing. Needs no daemon; without root some checks are left out, and say so. Levels: ok; note,
worth knowing; WARNING, works worse than it could or can fail later; ERROR, the daemon cannot start or does not enforce
what it should. Lines with -> say what to do. Exits 0 without errors, 1 with.";

/// Text after the options of `palisade uninstall --help`.
pub(super) const UNINSTALL_HELP: &str = "Examples:
  palisade uninstall --dry-run          list what would be removed
  palisade uninstall                    keep configuration and policies
  palisade uninstall --purge --yes      remove these too
  palisade uninstall --check            list what is left; exit 0 if nothing is

Ends the daemon if it runs, detaches all programs, and removes pins, nftables table, punt link and proxy links, saved
state, sockets, and the files of [[export]]. From then on nothing is enforced. It works also if the daemon is dead, and
if the configuration is broken: the last good copy of the configuration then names the directories.

Only files that Palisade has made are removed. The binary, the systemd unit (`systemctl disable palisade`) and the
secrets of [tls] secrets_dir stay.";

/// Flags of `palisade uninstall`.
#[derive(Clone, Debug, Args)]
pub(crate) struct UninstallArgs {
    /// Also remove the configuration file and the policy files. Needs --yes.
    #[arg(long)]
    pub purge: bool,
    /// Confirm --purge.
    #[arg(long, requires = "purge")]
    pub yes: bool,
    /// Only list what would be removed.
    #[arg(long)]
    pub dry_run: bool,
    /// Only list what is left of Palisade on this node (with --purge: also configuration and policies). Exits 1 if
    /// anything is.
    #[arg(long, conflicts_with = "dry_run")]
    pub check: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}
