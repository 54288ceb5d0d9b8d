//! Arguments of `palisade policy apply`, `rollback` and `diff`.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use palisade_flowlog::duration;

use super::OutputArgs;

pub(super) const APPLY_HELP: &str = "Examples:
  palisade policy apply web.yaml -m 'open port 8443 for front'
  palisade policy apply policies.new/ --confirm 60s && palisade policy confirm
  palisade policy apply policies.new/ --dry-run
  palisade policy apply host.yaml --confirm 5m --yes -m 'close the node'

FILE replaces the file of the same name in [policy] dir, or is added. DIR replaces all policy files of the folder: files
that DIR lacks are removed. All policies are compiled first; with an error (FILE:LINE:COL) nothing is written. Then the
command shows which verdicts change, which recorded flows of the last hour get another verdict and which live connections
would be cut, and asks. Without a terminal it needs --yes.

With --confirm the former policies come back by themselves unless `palisade policy confirm` is run within DURATION, also if
this command, the shell or the daemon ends; after a boot, and when the daemon is stopped, they come back at once. A set that
denies the ssh session in which the command runs is refused without --force.

Exits 0 if the policies are in force, 1 if they have errors or are refused, or the answer was no.";

pub(super) const ROLLBACK_HELP: &str = "Examples:
  palisade policy history
  palisade policy rollback 4 --confirm 60s
  palisade policy rollback 4 --dry-run

Puts the set N of the history in force, as `palisade policy apply` does with a folder.";

pub(super) const DIFF_HELP: &str = "Examples:
  palisade policy diff web.yaml
  palisade policy diff policies.new/
  palisade policy diff 3 5
  palisade policy diff 3
  palisade policy diff policies.new/ -o json
  palisade policy diff --offline --config palisade.toml policies.old/ policies.new/

With one argument the policies in force are compared with it: with FILE or DIR as `palisade policy apply` would put it in
force, or with a set of the history. Shows verdicts, not text: for which endpoint, direction, peer and ports the verdict
changes. A number is a set of `palisade policy history`; write ./3 for a file of that name. With --offline no daemon is
needed: two files or folders are compared for the endpoints and peers of the configuration.

Exits 0 if nothing differs, 1 if something does or there are errors.";

/// Flags of `palisade policy apply` and `palisade policy rollback`.
#[derive(Debug, Args)]
pub(crate) struct ChangeArgs {
    /// Roll back unless `palisade policy confirm` is run within DURATION (1s to 24h).
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub confirm: Option<Duration>,
    /// Message for the history.
    #[arg(short, long, value_name = "MESSAGE", default_value = "")]
    pub message: String,
    /// Do not ask.
    #[arg(short, long)]
    pub yes: bool,
    /// Do not ask, and apply it also if it denies the session in which the command runs.
    #[arg(long)]
    pub force: bool,
    /// Only show what would change.
    #[arg(long, conflicts_with_all = ["yes", "force"])]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Arguments of `palisade policy apply`.
#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Policy file, or folder of policy files.
    #[arg(value_name = "FILE|DIR")]
    pub path: PathBuf,
    #[command(flatten)]
    pub change: ChangeArgs,
}

/// Arguments of `palisade policy rollback`.
#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    /// Number of a set in `palisade policy history`.
    #[arg(value_name = "N")]
    pub number: u64,
    #[command(flatten)]
    pub change: ChangeArgs,
}

/// Arguments of `palisade policy diff`.
#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// Policy file, folder of policy files, or number of a set in `palisade policy history`.
    #[arg(value_name = "FILE|DIR|N")]
    pub first: PathBuf,
    /// With two arguments the first is compared with the second.
    #[arg(value_name = "FILE|DIR|N")]
    pub second: Option<PathBuf>,
    /// Compare without a daemon, for the endpoints and peers of the configuration.
    #[arg(long, requires = "second")]
    pub offline: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}
