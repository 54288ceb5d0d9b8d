//! The directories, the socket and the locks that a daemon must have for itself.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use nix::{errno::Errno, fcntl::Flock};
use palisade_datapath::check_pin_dir;

use crate::{
    config::{Config, Node},
    control::server,
    trusted_path::{UnsafePath, is_own, lock_dir, private_dir, walk},
};

/// What belongs to one daemon only, for as long as this value lives.
#[derive(Debug)]
pub(crate) struct PrivateDirs {
    /// The socket's path, which no other daemon listens at.
    pub socket: server::Claim,
    /// Why nothing can be kept in the state directory.
    pub state_problem: Option<String>,
    _pins: Option<Flock<File>>,
    _state: Option<Flock<File>>,
}

/// Takes the directories and the socket of a configuration. A state directory that cannot be made (its file system is
/// full or read-only) is no reason to leave a node without a daemon.
///
/// # Errors
/// Another daemon has one of them, or another user could change what is in them.
pub(super) fn take(node: &Node) -> anyhow::Result<PrivateDirs> {
    let (state, state_problem) = match private_dir(&node.state_dir, "[node] state_dir") {
        Ok(dir) => (Some(lock_dir(&dir, "state_dir")?), None),
        Err(UnsafePath::Failed(problem)) => (None, Some(problem)),
        Err(refusal) => return Err(refusal.into()),
    };
    // Another file system than a bpffs is refused before anything is made on it.
    check_pin_dir(&node.pin_dir)?;
    let pins = private_dir(&node.pin_dir, "[node] pin_dir")?;
    let pins = lock_dir(&pins, "pin_dir")?;
    Ok(PrivateDirs {
        socket: server::claim(&node.socket)?,
        state_problem,
        _pins: Some(pins),
        _state: state,
    })
}

/// The same for `palisade stop --detach` without a daemon: nothing is made that is not there.
///
/// # Errors
/// Those of [`take`]: in a pin directory of another user, what looks like a directory of pins may be a link to any other
/// directory, whose files would be removed.
pub(crate) fn take_for_detaching(node: &Node) -> anyhow::Result<PrivateDirs> {
    let lock = |dir: &Path, setting| dir.exists().then(|| lock_dir(dir, setting)).transpose();
    if node.pin_dir.exists() {
        private_dir(&node.pin_dir, "[node] pin_dir")?;
    }
    Ok(PrivateDirs {
        _state: lock(&node.state_dir, "state_dir")?,
        _pins: lock(&node.pin_dir, "pin_dir")?,
        socket: server::claim(&node.socket)?,
        state_problem: None,
    })
}

/// Files that decide what is enforced, and that other users than root can change. That may be meant.
pub(super) fn writable_by_others(config: &Config) -> Vec<String> {
    let mut found = Vec::new();
    for path in [&config.path, &config.policy.dir] {
        let Ok(metadata) = fs::metadata(path) else {
            continue;
        };
        let whose = match metadata.mode() {
            _ if !is_own(&metadata) => format!("belongs to user {}", metadata.uid()),
            mode if mode & 0o002 != 0 => "can be written by every user".to_owned(),
            _ => continue,
        };
        found.push(format!(
            "{} {whose}, who so decides what is enforced",
            path.display()
        ));
    }
    found
}

/// What of a configuration a daemon on this machine would refuse, and what it would miss. Changes nothing.
pub(crate) fn check(config: &Config) -> (Vec<String>, Vec<String>) {
    let (mut refused, mut missing) = (Vec::new(), Vec::new());
    let node = &config.node;
    let socket_dir = node.socket.parent().unwrap_or(Path::new("/"));
    for (setting, path) in [
        ("[node] pin_dir", node.pin_dir.as_path()),
        ("[node] state_dir", &node.state_dir),
        ("[node] socket", socket_dir),
    ] {
        match walk(path) {
            Err(UnsafePath::Untrusted(problem)) => refused.push(format!("{setting}: {problem}")),
            Err(UnsafePath::Failed(problem)) => missing.push(format!("{setting}: {problem}")),
            Ok(found) if found.missing.as_os_str().is_empty() => match fs::symlink_metadata(&found.there) {
                Ok(metadata) if !metadata.is_dir() => {
                    refused.push(format!("{setting}: {} is not a directory", path.display()));
                }
                Ok(metadata) if !is_own(&metadata) => refused.push(format!(
                    "{setting}: {} belongs to user {}, not to root",
                    path.display(),
                    metadata.uid()
                )),
                _ => {}
            },
            Ok(_) => {}
        }
    }
    missing.extend(writable_by_others(config));
    if let Err(problem) = check_pin_dir(&node.pin_dir) {
        missing.push(format!("[node] pin_dir: {problem}"));
    }
    if let Err(error) = fs::read_dir(&config.policy.dir) {
        missing.push(format!("[policy] dir: {}: {error}", config.policy.dir.display()));
    }
    let interfaces = config.interfaces.iter().map(|interface| &interface.name);
    for name in interfaces.chain(config.endpoints.iter().map(|endpoint| &endpoint.interface)) {
        // Not /sys/class/net, which may be another network namespace's.
        if let Err(Errno::ENODEV) = nix::net::if_::if_nametoindex(name.as_str()) {
            missing.push(format!(
                "interface {name}: is not there; it is guarded when it appears"
            ));
        }
    }
    (refused, missing)
}
