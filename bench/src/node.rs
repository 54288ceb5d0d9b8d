//! A Palisade daemon in the node's namespace of a testbed, as anybody runs it: by its command line.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use palisade_testbed::{
    Process, Topology, Workload,
    ns::{ensure_bpffs, pin_dir, remove_pins},
    output,
    topology::NIC,
};
use tempfile::TempDir;

/// What starting, applying 10,000 policies and stopping may take on a machine that has other things to do.
const TIMEOUT: Duration = Duration::from_secs(60);

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Which `palisade` is measured.
pub fn set_program(path: PathBuf) {
    // The first one stays: it is set once, from the command line.
    let _ = PROGRAM.set(path);
}

/// How the node's NIC is guarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nic {
    /// Not at all.
    Open,
    /// By XDP.
    Xdp,
    /// By tc.
    Tc,
}

/// A running daemon. Detaches and removes everything when it is dropped.
pub struct Daemon {
    process: Process,
    config: PathBuf,
    policies: PathBuf,
    pins: PathBuf,
    _dir: TempDir,
}

impl Daemon {
    /// Guards a workload's interface, and the NIC if asked to, by the policy files given as name and text. Returns once
    /// everything is enforced.
    pub fn start(
        topology: &Topology,
        workload: &Workload,
        nic: Nic,
        policies: &[(String, String)],
    ) -> Result<Self> {
        ensure_bpffs()?;
        let dir = tempfile::Builder::new().prefix("palisade-bench-").tempdir()?;
        let folder = dir.path().join("policies.d");
        fs::create_dir(&folder)?;
        for (name, text) in policies {
            fs::write(folder.join(name), text)?;
        }
        let pins = pin_dir();
        let config = dir.path().join("palisade.toml");
        fs::write(&config, configuration(dir.path(), &pins, workload, nic))?;
        let mut command = topology.node.command(program()?);
        command.arg("run").arg("--config").arg(&config);
        let process = Process::spawn("palisade", command, dir.path())?;
        let mut daemon = Self {
            process,
            config,
            policies: folder,
            pins,
            _dir: dir,
        };
        daemon.wait()?;
        Ok(daemon)
    }

    /// The folder of the policies.
    #[must_use]
    pub fn policies(&self) -> &Path {
        &self.policies
    }

    /// Runs a command of `palisade` for this daemon.
    pub fn ask(&self, args: &[&str]) -> Result<String> {
        let mut command = std::process::Command::new(program()?);
        command.args(args).arg("--config").arg(&self.config);
        let out = output(&mut command, TIMEOUT)?;
        ensure!(
            out.status.success(),
            "palisade {}: {}\n{}",
            args.join(" "),
            String::from_utf8_lossy(&out.stderr),
            self.process.log()
        );
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn wait(&mut self) -> Result<()> {
        let seconds = format!("{}s", TIMEOUT.as_secs());
        self.ask(&["status", "--wait", &seconds]).map(drop)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.ask(&["stop", "--detach"]);
        let _ = self.process.wait(TIMEOUT);
        remove_pins(&self.pins);
    }
}

fn program() -> Result<&'static Path> {
    let path = PROGRAM
        .get()
        .context("which palisade is measured has not been said")?;
    ensure!(
        path.exists(),
        "{} is not there: build it with cargo build --release -p palisade",
        path.display()
    );
    Ok(path)
}

fn configuration(dir: &Path, pins: &Path, workload: &Workload, nic: Nic) -> String {
    let mut text = format!(
        "[node]\nname = \"node1\"\npin_dir = \"{}\"\nstate_dir = \"{}\"\nsocket = \"{}\"\n\n[policy]\ndir = \"policies.d\"\n",
        pins.display(),
        dir.join("state").display(),
        dir.join("palisade.sock").display(),
    );
    let hook = match nic {
        Nic::Open => None,
        Nic::Xdp => Some("xdp"),
        Nic::Tc => Some("tc"),
    };
    if let Some(hook) = hook {
        let _ = write!(
            text,
            "\n[[interface]]\nname = \"{NIC}\"\nrole = \"host\"\ningress = \"{hook}\"\n"
        );
    }
    let _ = write!(
        text,
        "\n[[endpoint]]\nname = \"{}\"\nnamespace = \"{}\"\ninterface = \"{}\"\naddresses = [\"{}\", \"{}\"]\nlabels = {{ app = \"{}\" }}\n",
        workload.name, workload.namespace, workload.interface, workload.v4, workload.v6, workload.name,
    );
    text
}
