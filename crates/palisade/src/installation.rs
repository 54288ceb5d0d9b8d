//! Where the parts of an installation are: directories, sockets and files that the configuration names. For commands
//! that must also work if the configuration is broken or missing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    config::{
        Config, DEFAULT_INTERFACE, DEFAULT_PIN_DIR, DEFAULT_SOCKET, DEFAULT_STATE_DIR, Node, WithoutPolicies,
    },
    daemon,
};

/// Default folder of policies.
const DEFAULT_POLICY_DIR: &str = "/etc/palisade/policies.d";

/// Parts of an installation.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    /// The configuration file.
    pub config: PathBuf,
    /// `[node]`, of which only the paths are used.
    pub node: Node,
    /// Prefix of the names of punt link and proxy links; name of the nftables table.
    pub interface: String,
    /// Socket of the flow API.
    pub hubble_socket: PathBuf,
    /// Policy folder.
    pub policy_dir: PathBuf,
    /// Files of `[[export]]`.
    pub exports: Vec<PathBuf>,
    /// Why the parts are not those of the configuration file; `None` if they are.
    pub note: Option<String>,
}

impl Installation {
    /// Returns the parts that a configuration names. If it cannot be used: those of its last good copy, else the
    /// readable paths of the file and the defaults.
    pub(crate) fn find(path: &Path) -> Self {
        let errors = match Config::load(path) {
            Ok(config) => return Self::of(&config, None),
            Err(errors) => errors,
        };
        let problem = errors.first().map(ToString::to_string).unwrap_or_default();
        match daemon::last_good_config(path) {
            Ok((config, copy)) => {
                let note = format!("{problem}; using its last good copy, {}", copy.display());
                Self::of(&config, Some(note))
            }
            Err(_) => Self::from_defaults(
                path,
                format!("{problem}; using the readable paths and the defaults"),
            ),
        }
    }

    fn of(config: &Config, note: Option<String>) -> Self {
        Self {
            config: config.path.clone(),
            node: config.node.clone(),
            interface: config.worker.interface.clone(),
            hubble_socket: config.hubble.socket.clone(),
            policy_dir: config.policy.dir.clone(),
            exports: config.exports.iter().map(|export| export.file.clone()).collect(),
            note,
        }
    }

    fn from_defaults(path: &Path, note: String) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let named =
            |key: &str, default: &str| Config::node_path(&text, key).unwrap_or_else(|| default.into());
        let socket = named("socket", DEFAULT_SOCKET);
        Self {
            config: path.to_owned(),
            hubble_socket: socket.with_file_name("hubble.sock"),
            node: Node {
                name: String::new(),
                labels: Vec::new(),
                addresses: Vec::new(),
                pin_dir: named("pin_dir", DEFAULT_PIN_DIR),
                state_dir: named("state_dir", DEFAULT_STATE_DIR),
                socket,
                on_failure: WithoutPolicies::Open,
            },
            interface: DEFAULT_INTERFACE.to_owned(),
            policy_dir: DEFAULT_POLICY_DIR.into(),
            exports: Vec::new(),
            note: Some(note),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_of_a_broken_configuration_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("palisade.toml");
        let state = dir.path().join("state");
        fs::write(
            &path,
            format!("[node]\npin_dir = \"/sys/fs/bpf/other\"\nstate_dir = {state:?}\n[[interface]\n"),
        )
        .unwrap();
        let found = Installation::find(&path);
        assert_eq!(found.node.pin_dir, Path::new("/sys/fs/bpf/other"));
        assert_eq!(found.node.state_dir, state);
        assert_eq!(found.node.socket, Path::new(DEFAULT_SOCKET));
        let note = found.note.unwrap();
        assert!(
            note.contains("palisade.toml:") && note.contains("the defaults"),
            "{note}"
        );
    }

    #[test]
    fn the_parts_are_those_of_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("palisade.toml");
        let text = "[node]\nname = \"n\"\nsocket = \"/run/x/p.sock\"\n[policy]\ndir = \"p\"\n[worker]\ninterface = \"wall\"\n\
                    [[export]]\nname = \"flows\"\nfile = \"/var/log/x/flows.log\"\n";
        fs::write(&path, text).unwrap();
        let found = Installation::find(&path);
        assert_eq!(found.note, None);
        assert_eq!(found.interface, "wall");
        assert_eq!(found.policy_dir, dir.path().join("p"));
        assert_eq!(found.exports, [Path::new("/var/log/x/flows.log")]);
        assert_eq!(found.hubble_socket, Path::new("/run/x/hubble.sock"));
    }
}
