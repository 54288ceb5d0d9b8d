//! `palisade uninstall`: removes everything that the daemon has made on this node, and lists what is left.
//!
//! The list of parts ([`left`]) is the same for `--check`, `--dry-run` and the final check after a removal, so the
//! command cannot report success while it has overlooked something that `--check` knows.

use std::{
    collections::BTreeSet,
    fs::{self, Metadata},
    io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::unistd::geteuid;
use palisade_datapath::{left_links, remove_left_links};
use serde::Serialize;

use super::{
    output::{EXIT_NO, EXIT_OK, show},
    service::daemon_ended,
    session::author,
};
use crate::{
    cli::UninstallArgs,
    control::{
        api::Request,
        client::{Client, ClientError, ask, ask_within},
    },
    daemon::{self, NetfilterTable, policy_file_names},
    installation::Installation,
    trusted_path::walk,
};

/// Longest wait for the answer of a daemon to the question whether it runs.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// Entries of the state directory that the daemon makes, with temporary and replaced files. A directory whose name
/// contains `palisade` is removed as a whole; in another one only these are, because a configuration can name a
/// directory with other files of root.
const STATE_ENTRIES: [&str; 14] = [
    "state.json",
    "state.json.broken",
    ".state.json.tmp",
    "config.kept",
    ".config.kept.tmp",
    "names.journal",
    "names.journal.old",
    ".names.journal.tmp",
    "verifier.log",
    "policies",
    "policy-change.json",
    "policy-change.json.broken",
    ".policy-change.json.palisade-tmp",
    "policy-history",
];
/// Beginning of the daemon's answer to a cancellation if there is nothing to cancel.
const NOTHING_WAITS: &str = "no change waits";

/// Part of Palisade on the node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Part {
    /// Kind of the part.
    kind: Kind,
    /// Path or name.
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Daemon,
    Program,
    Pins,
    NftablesTable,
    Interface,
    State,
    Socket,
    Log,
    Policy,
    Configuration,
}

impl Kind {
    const fn text(self) -> &'static str {
        match self {
            Self::Daemon => "daemon",
            Self::Program => "program",
            Self::Pins => "pins",
            Self::NftablesTable => "nftables table",
            Self::Interface => "interface",
            Self::State => "state",
            Self::Socket => "socket",
            Self::Log => "log",
            Self::Policy => "policy",
            Self::Configuration => "configuration",
        }
    }
}

/// Runs `palisade uninstall`. `socket`: control socket of the command line.
pub(super) fn run(config: &Path, socket: Option<&Path>, args: &UninstallArgs) -> anyhow::Result<u8> {
    let mut installation = Installation::find(config);
    if let Some(socket) = socket {
        socket.clone_into(&mut installation.node.socket);
    }
    if !geteuid().is_root() {
        bail!("uninstall must run as root to see and remove BPF programs and pins: use sudo");
    }
    if let Some(note) = &installation.note {
        eprintln!("palisade: note: {note}");
    }
    if args.check || args.dry_run {
        let parts = left(&installation, args.purge)?;
        show(&parts, args.output.output, |parts, out| {
            if parts.is_empty() {
                return writeln!(out, "nothing of Palisade is left on this node");
            }
            list(parts, out)
        })?;
        return Ok(if args.check && !parts.is_empty() {
            EXIT_NO
        } else {
            EXIT_OK
        });
    }
    if args.purge && !args.yes {
        let parts = left(&installation, true)?;
        eprintln!("palisade: --purge removes these for good; repeat the command with --yes:");
        list(&parts, &mut io::stderr().lock())?;
        return Ok(EXIT_NO);
    }
    remove(&installation, args.purge)?;
    let parts = left(&installation, args.purge)?;
    if parts.is_empty() {
        show(&parts, args.output.output, |_, out| {
            writeln!(
                out,
                "Palisade is removed: nothing is enforced any more, and nothing of it is left"
            )?;
            writeln!(
                out,
                "The binary and the systemd unit stay; `systemctl disable palisade` prevents a start at boot"
            )
        })?;
        return Ok(EXIT_OK);
    }
    eprintln!("palisade: not removed:");
    list(&parts, &mut io::stderr().lock())?;
    Ok(EXIT_NO)
}

fn list(parts: &[Part], out: &mut dyn io::Write) -> io::Result<()> {
    parts
        .iter()
        .try_for_each(|part| writeln!(out, "  {:<14}  {}", part.kind.text(), part.name))
}

/// Returns the parts of Palisade that are on this node. `purge`: also configuration and policies.
fn left(installation: &Installation, purge: bool) -> anyhow::Result<Vec<Part>> {
    let node = &installation.node;
    let mut parts = BTreeSet::new();
    let mut add = |kind, name: String| parts.insert(Part { kind, name });
    if is_running(&node.socket) {
        add(Kind::Daemon, format!("listens at {}", node.socket.display()));
    }
    for (interface, program) in programs()? {
        add(Kind::Program, format!("{program} at {interface}"));
    }
    if exists(&node.pin_dir)? {
        add(Kind::Pins, node.pin_dir.display().to_string());
    }
    for table in table(installation)
        .present()
        .context("listing the nftables tables")?
    {
        add(Kind::NftablesTable, table);
    }
    for name in left_links(&installation.interface)? {
        add(Kind::Interface, name);
    }
    for path in state_entries(&node.state_dir)? {
        add(Kind::State, path.display().to_string());
    }
    for path in sockets(installation) {
        if exists(&path)? {
            add(Kind::Socket, path.display().to_string());
        }
    }
    for path in logs(installation)? {
        add(Kind::Log, path.display().to_string());
    }
    if purge {
        for path in policies(&installation.policy_dir)? {
            add(Kind::Policy, path.display().to_string());
        }
        if exists(&installation.config)? {
            add(Kind::Configuration, installation.config.display().to_string());
        }
    }
    Ok(parts.into_iter().collect())
}

/// Removes all parts. `purge`: also configuration and policies.
fn remove(installation: &Installation, purge: bool) -> anyhow::Result<()> {
    let node = &installation.node;
    end_daemon(&node.socket)?;
    // The directories are locked until this function returns, so that no daemon can start meanwhile.
    let dirs = daemon::take_for_detaching(node)?;
    // Each step is tried even if one before it has failed, so that as much as possible is removed.
    let mut problems = Vec::new();
    let mut note = |what: &str, outcome: anyhow::Result<()>| {
        if let Err(error) = outcome {
            problems.push(format!("{what}: {error:#}"));
        }
    };
    note(
        "the nftables table",
        table(installation).remove().map_err(Into::into),
    );
    note(
        "the programs",
        palisade_datapath::detach_all(&node.pin_dir).map_err(Into::into),
    );
    note(
        "the links",
        remove_left_links(&installation.interface).map_err(Into::into),
    );
    note("the state", remove_state(&node.state_dir));
    note("the logs", remove_files(logs(installation)?));
    for path in &installation.exports {
        remove_own_dir(path.parent());
    }
    if purge {
        note("the policies", remove_files(policies(&installation.policy_dir)?));
        // A folder that is a link belongs to whatever manages it; only the link is removed.
        if is_link(&installation.policy_dir) {
            note("the policies", remove_file(&installation.policy_dir));
        } else {
            let _ = fs::remove_dir(&installation.policy_dir);
        }
        note("the configuration", remove_file(&installation.config));
        remove_own_dir(installation.config.parent());
    }
    drop(dirs);
    // The lock file of the socket is removed last, since it excludes a second daemon.
    note("the sockets", remove_files(sockets(installation).into()));
    remove_own_dir(node.socket.parent());
    remove_own_dir(installation.hubble_socket.parent());
    match problems.as_slice() {
        [] => Ok(()),
        problems => bail!("not everything could be removed:\n  {}", problems.join("\n  ")),
    }
}

/// Ends a running daemon, which detaches its programs.
fn end_daemon(socket: &Path) -> anyhow::Result<()> {
    let sent = cancel_change(socket).and_then(|()| Client::send(socket, &Request::Stop { detach: true }));
    match sent {
        Ok(client) => {
            client.answer::<serde_json::Value>()?;
            daemon_ended(socket)?;
            Ok(())
        }
        Err(ClientError::NotRunning { .. }) => Ok(()),
        Err(error @ ClientError::Hangs { .. }) => Err(anyhow::Error::new(error).context(
            "end the hanging daemon with `systemctl kill -s KILL palisade`, then repeat this command",
        )),
        Err(error) => Err(error.into()),
    }
}

/// Rolls back a change of the policies that waits for its confirmation. Otherwise its files would stay in the policy
/// folder, and a later installation would enforce them although they were not confirmed.
fn cancel_change(socket: &Path) -> Result<(), ClientError> {
    let request = Request::PolicyCancel {
        author: author(),
        number: None,
        // What is enforced ends right after, so no session is lost for long.
        sessions: Vec::new(),
    };
    match ask::<u64>(socket, &request) {
        Ok(number) => {
            eprintln!(
                "palisade: note: change {number} of the policies was not confirmed, and is rolled back"
            );
        }
        Err(ClientError::Refused(problem)) if problem.starts_with(NOTHING_WAITS) => {}
        // A rollback that fails must not prevent the removal.
        Err(error @ (ClientError::Refused(_) | ClientError::Broken(_))) => {
            eprintln!("palisade: note: no change of the policies was rolled back: {error}");
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

fn is_running(socket: &Path) -> bool {
    match ask_within::<serde_json::Value>(socket, &Request::Ping, PING_TIMEOUT) {
        Ok(_) | Err(ClientError::Refused(_) | ClientError::Hangs { .. }) => true,
        Err(_) => false,
    }
}

fn table(installation: &Installation) -> NetfilterTable {
    NetfilterTable::of(&installation.interface, &installation.node.pin_dir)
}

/// Returns the programs of Palisade at the interfaces of this network namespace: interface and program.
fn programs() -> anyhow::Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for interface in nix::net::if_::if_nameindex().context("the interfaces")?.iter() {
        let name = interface.name().to_string_lossy().into_owned();
        let occupants = palisade_datapath::occupants(interface.index()).with_context(|| name.clone())?;
        for occupant in occupants.iter().filter(|occupant| occupant.is_palisade()) {
            found.push((name.clone(), format!("{} ({})", occupant.name, occupant.hook)));
        }
    }
    Ok(found)
}

/// Returns the entries of the state directory that the daemon has made; also the directory, if it is Palisade's own.
fn state_entries(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| dir.display().to_string())?,
    };
    if is_own(dir) {
        return Ok(vec![dir.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| dir.display().to_string())?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if STATE_ENTRIES.contains(&&*name) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove_state(dir: &Path) -> anyhow::Result<()> {
    // Another user must not be able to replace a directory on the path by a link to a directory of root.
    let found = walk(dir)?;
    if !found.missing.as_os_str().is_empty() {
        return Ok(());
    }
    for path in state_entries(&found.there)? {
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
        let removed = if is_dir {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.with_context(|| path.display().to_string())?;
    }
    if is_link(dir) {
        remove_file(dir)?;
    }
    // systemd owns a directory of StateDirectory=; another one is removed if it is empty now.
    let _ = fs::remove_dir(&found.there);
    Ok(())
}

/// Returns the sockets and their lock files.
fn sockets(installation: &Installation) -> [PathBuf; 4] {
    let lock = |path: &Path| {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        PathBuf::from(name)
    };
    let (control, hubble) = (&installation.node.socket, &installation.hubble_socket);
    [control.clone(), lock(control), hubble.clone(), lock(hubble)]
}

/// Returns the files of `[[export]]` and their backups.
fn logs(installation: &Installation) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in &installation.exports {
        if exists(path)? {
            found.push(path.clone());
        }
        match daemon::export_backups(path) {
            Ok(backups) => found.extend(backups),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
    }
    Ok(found)
}

/// Returns the policy files of a folder. If the folder is a symbolic link, its target belongs to other software, so the
/// only part is the link.
fn policies(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if is_link(dir) {
        return Ok(vec![dir.to_owned()]);
    }
    match policy_file_names(dir) {
        Ok(names) => Ok(names.iter().map(|name| dir.join(name)).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| dir.display().to_string()),
    }
}

fn remove_files(paths: Vec<PathBuf>) -> anyhow::Result<()> {
    paths.iter().try_for_each(|path| remove_file(path))
}

/// Removes a file or a socket. A missing one is no error.
fn remove_file(path: &Path) -> anyhow::Result<()> {
    let Some(metadata) = metadata(path)? else {
        return Ok(());
    };
    let kind = metadata.file_type();
    if !(kind.is_file() || kind.is_symlink() || kind.is_socket()) {
        bail!("{}: not a file or a socket; remove it by hand", path.display());
    }
    walk(path.parent().unwrap_or(Path::new("/")))?;
    fs::remove_file(path).with_context(|| path.display().to_string())
}

/// Removes an empty directory if it is Palisade's own by its name.
fn remove_own_dir(dir: Option<&Path>) {
    if let Some(dir) = dir.filter(|dir| is_own(dir)) {
        let _ = fs::remove_dir(dir);
    }
}

/// Returns whether a directory is used by Palisade alone, by its name.
fn is_own(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    name.contains("palisade")
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
}

fn exists(path: &Path) -> anyhow::Result<bool> {
    metadata(path).map(|metadata| metadata.is_some())
}

fn metadata(path: &Path) -> anyhow::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_files_of_palisade_are_removed_from_a_shared_state_directory() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("shared");
        for name in ["policies", "policy-history/contents"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        // Names that only begin like those of the daemon.
        let mine = ["history", "mine", "policies-of-mine", "state.json.copy"];
        for name in [
            "state.json",
            "state.json.broken",
            "config.kept",
            ".config.kept.tmp",
            "names.journal.old",
            "policies/a.yaml",
            "policy-change.json",
            ".policy-change.json.palisade-tmp",
            "policy-history/index.json",
        ]
        .into_iter()
        .chain(mine)
        {
            fs::write(dir.join(name), "x").unwrap();
        }
        // A link is removed, not its target.
        let target = root.path().join("target");
        fs::write(&target, "x").unwrap();
        symlink(&target, dir.join("verifier.log")).unwrap();
        remove_state(&dir).unwrap();
        let mut names: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, mine);
        assert!(target.exists());
        for name in mine {
            fs::remove_file(dir.join(name)).unwrap();
        }
        remove_state(&dir).unwrap();
        assert!(!dir.exists());
        remove_state(&dir).unwrap();
    }

    /// The constants are private to the daemon, so the test reads them from the source.
    #[test]
    fn every_name_of_the_daemon_in_the_state_directory_is_known() {
        let keeper = include_str!("../daemon/keeper.rs");
        let journal = include_str!("../daemon/changes/journal.rs");
        let constant = |source: &str, name: &str| {
            let declaration = format!("const {name}: &str = \"");
            let (_, rest) = source.split_once(&declaration).unwrap();
            rest.split_once('"').unwrap().0.to_owned()
        };
        let temporary = constant(include_str!("../daemon/changes/disk.rs"), "TEMPORARY");
        let (state, config) = (constant(keeper, "STATE"), constant(keeper, "CONFIG"));
        let change = constant(journal, "JOURNAL");
        for name in [
            format!(".{state}.tmp"),
            format!(".{config}.tmp"),
            format!(".{change}{temporary}"),
            format!("{state}.broken"),
            format!("{change}.broken"),
            state,
            config,
            change,
            constant(keeper, "POLICIES"),
            constant(journal, "HISTORY"),
        ] {
            assert!(STATE_ENTRIES.contains(&name.as_str()), "{name}");
        }
        let names = include_str!("../daemon/fqdn/journal.rs");
        for name in ["names.journal", "names.journal.old", ".names.journal.tmp"] {
            assert!(names.contains(&format!("join(\"{name}\")")), "{name}");
            assert!(STATE_ENTRIES.contains(&name), "{name}");
        }
        // What `uninstall` expects of the daemon's answer.
        let control = include_str!("../daemon/changes/switch.rs");
        assert!(control.contains(&format!("\"{NOTHING_WAITS} ")));
    }

    #[test]
    fn a_state_directory_of_palisade_is_removed_with_everything_in_it() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("palisade-state");
        fs::create_dir_all(dir.join("new/deep")).unwrap();
        remove_state(&dir).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn the_target_of_a_linked_policy_folder_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let (real, link) = (root.path().join("repository"), root.path().join("policies.d"));
        fs::create_dir(&real).unwrap();
        fs::write(real.join("a.yaml"), "x").unwrap();
        symlink(&real, &link).unwrap();
        assert_eq!(policies(&link).unwrap(), std::slice::from_ref(&link));
        assert_eq!(policies(&real).unwrap(), [real.join("a.yaml")]);
        remove_file(&link).unwrap();
        assert!(real.join("a.yaml").exists());
        // A directory at the place of a file is not removed.
        assert!(remove_file(&real).unwrap_err().to_string().contains("by hand"));
    }
}
