//! Locks the directories and claims the socket that only one daemon can use at a time.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use nix::{errno::Errno, fcntl::Flock, unistd::geteuid};
use palisade_datapath::check_pin_dir;

use crate::{
    config::{CertificateFiles, Config, Node},
    control::server,
    trusted_path::{UnsafePath, is_own, lock_dir, private_dir, walk},
};

/// Option of the state directory, without which a daemon runs.
const STATE_DIR: &str = "[node] state_dir";

/// The locks of the directories and the claim to the socket. They are released when this value is dropped.
#[derive(Debug)]
pub(crate) struct PrivateDirs {
    /// The right to listen at the path of the socket.
    pub socket: server::Claim,
    /// Why the state directory cannot be used.
    pub state_problem: Option<String>,
    _pins: Option<Flock<File>>,
    _state: Option<Flock<File>>,
}

/// Locks the directories and claims the socket of a configuration. Missing directories are made. If the state directory
/// cannot be used, for example on a full or read-only file system, the daemon runs without it.
///
/// # Errors
/// Fails if another daemon uses one of the directories or the socket, if a user other than root and the user of this
/// process could change them, or if the pin directory or the socket cannot be used for another reason.
pub(super) fn take(node: &Node) -> anyhow::Result<PrivateDirs> {
    let (state, state_problem) = match private_dir(&node.state_dir, STATE_DIR) {
        Ok(dir) => (Some(lock_dir(&dir, "state_dir")?), None),
        Err(UnsafePath::Failed(problem)) => (None, Some(problem)),
        Err(refusal) => return Err(refusal.into()),
    };
    // The file system is checked first, so that no directory is made outside of bpffs.
    check_pin_dir(&node.pin_dir)?;
    let pins = private_dir(&node.pin_dir, "[node] pin_dir")?;
    let pins = lock_dir(&pins, "pin_dir")?;
    Ok(PrivateDirs {
        socket: server::claim(&node.socket, "[node] socket")?,
        state_problem,
        _pins: Some(pins),
        _state: state,
    })
}

/// Locks the directories and claims the socket for `palisade stop --detach` without a daemon. Missing directories are
/// not made.
///
/// # Errors
/// Those of [`take`]. The pin directory is checked, because a symbolic link that another user has put there could make
/// the command remove files elsewhere.
pub(crate) fn take_for_detaching(node: &Node) -> anyhow::Result<PrivateDirs> {
    let lock = |dir: &Path, setting| dir.exists().then(|| lock_dir(dir, setting)).transpose();
    if node.pin_dir.exists() {
        private_dir(&node.pin_dir, "[node] pin_dir")?;
    }
    Ok(PrivateDirs {
        _state: lock(&node.state_dir, "state_dir")?,
        _pins: lock(&node.pin_dir, "pin_dir")?,
        socket: server::claim(&node.socket, "[node] socket")?,
        state_problem: None,
    })
}

/// Returns a warning if the configuration file belongs to a user other than root and the user of this process, or if
/// every user can write it; likewise for the policy folder, and if another user could replace a directory of their paths.
/// These are not errors, because an operator can intend them, and a daemon that does not start enforces less.
pub(super) fn writable_by_others(config: &Config) -> Vec<String> {
    let mut found = Vec::new();
    for path in [&config.path, &config.policy.dir] {
        if let Err(UnsafePath::Untrusted(problem)) = walk(path) {
            found.push(format!(
                "{}: {problem}: another user than root can change what is enforced",
                path.display()
            ));
            continue;
        }
        let Ok(metadata) = fs::metadata(path) else {
            continue;
        };
        let whose = match metadata.mode() {
            _ if !is_own(&metadata) => format!("belongs to user {}", metadata.uid()),
            mode if mode & 0o002 != 0 => "can be written by every user".to_owned(),
            _ => continue,
        };
        found.push(format!(
            "{} {whose}: another user than root can change what is enforced",
            path.display()
        ));
    }
    found
}

/// Returns the reasons for which a daemon would refuse this configuration on this machine, and warnings, for example
/// about missing files and interfaces. Changes nothing.
pub(crate) fn check(config: &Config) -> (Vec<String>, Vec<String>) {
    let (mut refused, mut missing, mut unusable) = (Vec::new(), Vec::new(), Vec::new());
    let node = &config.node;
    let socket_dir = node.socket.parent().unwrap_or(Path::new("/"));
    for (setting, path) in [
        ("[node] pin_dir", node.pin_dir.as_path()),
        (STATE_DIR, &node.state_dir),
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
                _ => unusable.extend(found.cannot_be_made().map(|problem| (setting, problem))),
            },
            Ok(found) => unusable.extend(found.cannot_be_made().map(|problem| (setting, problem))),
        }
    }
    // The daemon runs as root, so what another user cannot do says nothing.
    unusable.retain(|_| geteuid().is_root());
    for (setting, problem) in unusable {
        match setting {
            STATE_DIR => missing.push(format!(
                "{setting}: {problem}: the daemon would run without it, and forget numbers and settings when it ends"
            )),
            _ => refused.push(format!("{setting}: {problem}")),
        }
    }
    missing.extend(writable_by_others(config));
    missing.extend(config.hubble.open_to_all());
    if let Err(problem) = check_pin_dir(&node.pin_dir) {
        missing.push(format!("[node] pin_dir: {problem}"));
    }
    if let Err(error) = fs::read_dir(&config.policy.dir) {
        missing.push(format!("[policy] dir: {}: {error}", config.policy.dir.display()));
    }
    if let Some(Err(problem)) = config.metrics.tls.as_ref().map(CertificateFiles::read) {
        missing.push(format!("[metrics] tls_certificate: {problem}"));
    }
    let interfaces = config.interfaces.iter().map(|interface| &interface.name);
    for name in interfaces.chain(config.endpoints.iter().map(|endpoint| &endpoint.interface)) {
        // The index is looked up by a system call, because /sys/class/net can belong to another network namespace.
        if let Err(Errno::ENODEV) = nix::net::if_::if_nametoindex(name.as_str()) {
            missing.push(format!(
                "interface {name}: is not there; it is guarded when it appears"
            ));
        }
    }
    (refused, missing)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn directories_that_cannot_be_made_are_named_before_a_start() {
        if !geteuid().is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let checked = |state: &str, socket: &str| {
            let text = format!("[node]\nname = \"n\"\nstate_dir = {state:?}\nsocket = {socket:?}\n");
            check(&Config::parse(&root.path().join("palisade.toml"), &text).unwrap())
        };
        let good = |name: &str| root.path().join(name).display().to_string();
        let names = |texts: &[String], start: &str| {
            texts
                .iter()
                .any(|text| text.starts_with(start) && text.contains("/proc"))
        };
        let (refused, warnings) = checked(&good("state"), &good("run/socket"));
        assert!(refused.is_empty(), "{refused:?}");
        assert!(
            !warnings.iter().any(|text| text.contains("state_dir")),
            "{warnings:?}"
        );
        assert!(!root.path().join("state").exists());
        // Without its state a daemon enforces; without its socket it does not start.
        let (refused, warnings) = checked("/proc/no-such/state", &good("run/socket"));
        assert!(refused.is_empty() && names(&warnings, STATE_DIR), "{warnings:?}");
        let (refused, _) = checked(&good("state"), "/proc/no-such/socket");
        assert!(names(&refused, "[node] socket"), "{refused:?}");
    }

    #[test]
    fn a_directory_above_configuration_or_policies_that_others_can_write_is_a_warning() {
        let root = tempfile::tempdir().unwrap();
        let above = root.path().join("above");
        let folder = above.join("policies.d");
        fs::create_dir_all(&folder).unwrap();
        let set = |mode| fs::set_permissions(&above, fs::Permissions::from_mode(mode)).unwrap();
        let warnings = |path: &Path, dir: &Path| {
            let text = format!("[node]\nname = \"n\"\n[policy]\ndir = {dir:?}\n");
            writable_by_others(&Config::parse(path, &text).unwrap())
        };
        let (inside, outside) = (above.join("palisade.toml"), root.path().join("palisade.toml"));
        set(0o755);
        assert_eq!(warnings(&outside, &folder), [""; 0]);
        set(0o777);
        for found in [warnings(&outside, &folder), warnings(&inside, root.path())] {
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(
                found[0].contains("mode 0777") && found[0].contains("can change what is enforced"),
                "{found:?}"
            );
        }
        // In a directory with the sticky bit other users cannot rename what is root's.
        set(0o1777);
        assert_eq!(warnings(&outside, &folder), [""; 0]);
    }
}
