//! The Palisade daemon, running on the node of a testbed.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    ns::{Ns, ensure_bpffs, pin_dir, remove_pins, serial, temp_dir, wait_until},
    process::{Process, output},
    topology::{NIC, Topology},
    units,
};

/// Timeout of a request to the daemon.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of a start of the daemon. The kernel's verifier takes most of the time of a start.
const START: Duration = Duration::from_secs(90);

/// The hooks of the programs, as values of the configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// `ingress` of workloads: `auto`, `xdp` or `tc`.
    pub endpoint: &'static str,
    /// `ingress` of the NIC.
    pub host: &'static str,
    /// `tc` of workloads and NIC: `auto`, `tcx` or `clsact`.
    pub tc: &'static str,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            endpoint: "auto",
            host: "auto",
            tc: "auto",
        }
    }
}

/// The configuration of a daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `[policy] enforcement`.
    pub enforcement: &'static str,
    /// `[policy] audit`.
    pub audit: bool,
    /// `[policy] allow_localhost`.
    pub allow_localhost: &'static str,
    /// Whether the configuration lists the NIC as an interface of role `host`, which makes the node an endpoint.
    pub nic: bool,
    /// The hooks of the programs.
    pub hooks: Hooks,
    /// Whether the configuration names the workloads' network namespaces. The daemon seeds conntrack with the
    /// connections that are open in these namespaces.
    pub seed: bool,
    /// Further tables in TOML: `[limits]`, `[timeouts]`, `[[peer]]`, `[[namespace]]`.
    pub tables: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enforcement: "default",
            audit: false,
            allow_localhost: "policy",
            nic: true,
            hooks: Hooks::default(),
            seed: true,
            tables: String::new(),
        }
    }
}

/// A daemon with a configuration, policies, pins and state of its own.
#[derive(Debug)]
pub struct Daemon {
    binary: PathBuf,
    node: Ns,
    process: Option<Process>,
    through: Vec<String>,
    pins: PathBuf,
    dir: TempDir,
}

impl Daemon {
    /// Writes the configuration and the policies (`(file name, contents)`), starts the daemon and waits until it
    /// enforces.
    pub fn start(topology: &Topology, settings: &Settings, policies: &[(&str, &str)]) -> Result<Self> {
        let mut daemon = Self::prepare(topology, settings, policies)?;
        daemon.spawn()?;
        daemon.wait()?;
        Ok(daemon)
    }

    /// Writes the configuration and the policies without starting the daemon.
    pub fn prepare(topology: &Topology, settings: &Settings, policies: &[(&str, &str)]) -> Result<Self> {
        ensure_bpffs()?;
        let dir = temp_dir("daemon")?;
        let daemon = Self {
            binary: binary()?,
            node: topology.node.clone(),
            process: None,
            through: Vec::new(),
            pins: pin_dir(),
            dir,
        };
        fs::create_dir(daemon.policies())?;
        for (name, contents) in policies {
            daemon.write(name, contents)?;
        }
        daemon.configure(topology, settings)?;
        Ok(daemon)
    }

    /// Writes the configuration; the daemon reads it when it starts.
    pub fn configure(&self, topology: &Topology, settings: &Settings) -> Result<()> {
        let text = self.configuration(topology, settings);
        fs::write(self.config(), text).with_context(|| self.config().display().to_string())
    }

    fn configuration(&self, topology: &Topology, settings: &Settings) -> String {
        let path = |name: &str| self.dir.path().join(name);
        let Hooks { endpoint, host, tc } = settings.hooks;
        let mut text = format!(
            "[node]\nname = \"node1\"\nlabels = {{ \"node-role.kubernetes.io/worker\" = \"\" }}\n\
             pin_dir = {:?}\nstate_dir = {:?}\nsocket = {:?}\n\n\
             [policy]\ndir = {:?}\nenforcement = {:?}\naudit = {}\nallow_localhost = {:?}\n",
            self.pins,
            path("state"),
            self.socket(),
            self.policies(),
            settings.enforcement,
            settings.audit,
            settings.allow_localhost,
        );
        if settings.nic {
            let _ = writeln!(
                text,
                "\n[[interface]]\nname = {NIC:?}\nrole = \"host\"\ningress = {host:?}\ntc = {tc:?}"
            );
        }
        let table = |pairs: &std::collections::BTreeMap<String, String>| {
            let pairs: Vec<_> = pairs.iter().map(|(k, v)| format!("{k:?} = {v:?}")).collect();
            format!("{{ {} }}", pairs.join(", "))
        };
        for w in topology.all() {
            let _ = writeln!(
                text,
                "\n[[endpoint]]\nname = {:?}\nnamespace = {:?}\ninterface = {:?}\naddresses = [\"{}\", \"{}\"]\n\
                 labels = {}\nnamed_ports = {}\ningress = {endpoint:?}\ntc = {tc:?}",
                w.name,
                w.namespace,
                w.interface,
                w.v4,
                w.v6,
                table(&w.labels),
                table(&w.named_ports),
            );
            if settings.seed {
                let _ = writeln!(text, "netns = {:?}", w.ns.name());
            }
        }
        // Allow special-purpose addresses in DNS answers, because the addresses of a testbed are such addresses.
        let special = "[dns]\nallow_special = [\"10.0.0.0/8\", \"100.64.0.0/10\", \"192.0.2.0/24\", \"198.18.0.0/15\", \
                       \"198.51.100.0/24\", \"203.0.113.0/24\", \"2001:db8::/32\", \"fd00::/8\"]\n";
        let tables = match settings.tables.split_once("[dns]\n") {
            _ if settings.tables.contains("_special") => settings.tables.clone(),
            Some((before, after)) => format!("{before}{special}{after}"),
            None => format!("{}\n{special}", settings.tables),
        };
        text.push('\n');
        text.push_str(&tables);
        // The tests of policies deny port 22 of the node, too.
        if !tables.contains("[failsafe]") {
            text.push_str("\n[failsafe]\ninbound = []\noutbound = []\n");
        }
        text
    }

    /// Returns the path of the configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("palisade.toml")
    }

    /// Returns the path of the policy folder.
    #[must_use]
    pub fn policies(&self) -> PathBuf {
        self.dir.path().join("policies.d")
    }

    /// Returns the path of the control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("palisade.sock")
    }

    /// Returns the pin directory.
    #[must_use]
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Returns the process id; `None` if the daemon has not been started or has been ended by this `Daemon`.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Sets a wrapper command that starts the daemon. The daemon's command line is appended to the arguments of the
    /// wrapper, and the wrapper must `exec` that command line at its end.
    pub fn start_through(&mut self, command: Vec<String>) {
        self.through = command;
    }

    /// Starts the process without waiting until it enforces.
    pub fn spawn(&mut self) -> Result<()> {
        let mut command = match &self.through[..] {
            [] => self.node.command(&self.binary),
            [program, arguments @ ..] => {
                let mut command = self.node.command(program);
                command.args(arguments).arg(&self.binary);
                command
            }
        };
        command.arg("run").arg("--config").arg(self.config());
        self.process = Some(Process::spawn("palisade", command, self.dir.path())?);
        Ok(())
    }

    /// Waits until the daemon has attached all programs and enforces all policies.
    pub fn wait(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let out = self.try_cli(&["status", "--wait", "5s"])?;
            if out.status.success() {
                return Ok(());
            }
            if let Some(status) = self.process.as_mut().map(Process::exited).transpose()?.flatten() {
                bail!("the daemon has ended, {status}:\n{}", self.log());
            }
            ensure!(
                start.elapsed() < START,
                "not enforcing after {START:?}: {}{}\n{}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns the output of the daemon.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(self.dir.path().join("palisade.log"))
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// Returns a `palisade` command for this daemon, not started yet.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.node.command(&self.binary);
        command
            .args(args)
            .arg("--config")
            .arg(self.config())
            .arg("--socket")
            .arg(self.socket());
        command
    }

    /// Runs a `palisade` command to its end and returns its output and exit status. Checks the units of JSON.
    pub fn try_cli(&self, args: &[&str]) -> Result<Output> {
        let out = output(&mut self.command(args), REQUEST_TIMEOUT)?;
        if args.contains(&"json") {
            let text = String::from_utf8_lossy(&out.stdout);
            units::check_output(&text).with_context(|| format!("palisade {}: {text}", args.join(" ")))?;
        }
        Ok(out)
    }

    /// Runs a `palisade` command that must succeed, and returns its standard output.
    pub fn cli(&self, args: &[&str]) -> Result<String> {
        let out = self.try_cli(args)?;
        ensure!(
            out.status.success(),
            "palisade {}: {}: {}{}",
            args.join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr),
            String::from_utf8_lossy(&out.stdout)
        );
        String::from_utf8(out.stdout).context("output is not UTF-8")
    }

    /// Runs a `palisade` command with `-o json`.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut args = args.to_vec();
        args.extend(["-o", "json"]);
        let text = self.cli(&args)?;
        serde_json::from_str(&text).with_context(|| format!("palisade {}: {text}", args.join(" ")))
    }

    /// Writes one policy file atomically. Does not wait until the daemon has read it.
    pub fn write(&self, name: &str, contents: &str) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(self.dir.path())?;
        std::io::Write::write_all(&mut file, contents.as_bytes())?;
        file.persist(self.policies().join(name))?;
        Ok(())
    }

    /// Replaces the contents of the policy folder, and waits until the policies are enforced.
    ///
    /// The new files get new names, so that the file names in the daemon's status show which files the daemon has read.
    pub fn apply(&self, policies: &[(&str, &str)]) -> Result<()> {
        let n = serial();
        let old: Vec<PathBuf> = fs::read_dir(self.policies())?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        for (name, contents) in policies {
            self.write(&format!("{n}-{name}"), contents)?;
        }
        for path in old {
            fs::remove_file(path)?;
        }
        self.settle()
    }

    /// Waits until the daemon's status lists exactly the files of the policy folder.
    pub fn settle(&self) -> Result<()> {
        let mut wanted: Vec<String> = fs::read_dir(self.policies())?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        wanted.sort();
        self.wait_status("the files of the folder are read", |status| {
            let mut read: Vec<&str> = status["policy_files"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|f| f["file"].as_str())
                .collect();
            read.sort_unstable();
            read == wanted
        })
        .map(drop)
    }

    /// Returns the output of `palisade status -o json`.
    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// Waits until `wanted` returns true for the status, and returns that status.
    pub fn wait_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut status = Value::Null;
        wait_until(what, REQUEST_TIMEOUT, || {
            status = self.status().unwrap_or_default();
            wanted(&status)
        })
        .with_context(|| format!("{status:#}"))?;
        Ok(status)
    }

    /// Kills the daemon (SIGKILL). The programs remain attached.
    pub fn kill9(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon does not run")?;
        process.kill9()
    }

    /// Sends SIGTERM and waits for the end of the process. The programs remain attached.
    pub fn terminate(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon does not run")?;
        let status = process.terminate(REQUEST_TIMEOUT)?;
        ensure!(
            status.success(),
            "the daemon ended with {status}:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Ends the daemon if it runs (SIGTERM), starts it again and waits until it enforces.
    ///
    /// The old daemon must have ended before the new one starts, because a running daemon locks its directories.
    pub fn restart(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.terminate(REQUEST_TIMEOUT)?;
        }
        self.spawn()?;
        self.wait()
    }

    /// Runs `palisade stop --detach` and waits for the end of the process.
    pub fn detach(&mut self) -> Result<()> {
        self.cli(&["stop", "--detach"])?;
        if let Some(mut process) = self.process.take() {
            let status = process.wait(REQUEST_TIMEOUT)?;
            ensure!(
                status.success(),
                "the daemon ended with {status}:\n{}",
                self.log()
            );
        }
        Ok(())
    }

    /// Returns status, endpoints, recent flows and log, for the message of a failed test.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = String::new();
        for args in [
            &["status"][..],
            &["endpoint", "list"],
            &["observe", "--last", "25"],
        ] {
            let shown = match self.try_cli(args) {
                Ok(out) => format!(
                    "{}{}",
                    String::from_utf8_lossy(&out.stdout),
                    String::from_utf8_lossy(&out.stderr)
                ),
                Err(error) => format!("{error:#}"),
            };
            let _ = writeln!(text, "--- palisade {}\n{shown}", args.join(" "));
        }
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let _ = writeln!(
            text,
            "--- log\n{}",
            lines[lines.len().saturating_sub(40)..].join("\n")
        );
        text
    }

    /// Waits until the log has a text.
    pub fn wait_log(&self, text: &str) -> Result<()> {
        let found = wait_until(text, 2 * REQUEST_TIMEOUT, || self.log().contains(text));
        found.with_context(|| self.log())
    }

    /// Waits until `wanted` returns true for the flows of `observe`, and returns these flows.
    pub fn wait_flows(
        &self,
        args: &[&str],
        what: &str,
        wanted: impl Fn(&[Value]) -> bool,
    ) -> Result<Vec<Value>> {
        let mut flows = Vec::new();
        let found = wait_until(what, REQUEST_TIMEOUT, || {
            flows = self.flows(args).unwrap_or_default();
            wanted(&flows)
        });
        found.with_context(|| format!("{flows:#?}"))?;
        Ok(flows)
    }

    /// Returns the flows of `observe` as JSON objects.
    pub fn flows(&self, args: &[&str]) -> Result<Vec<Value>> {
        let mut all = vec!["observe", "-o", "json"];
        all.extend(args);
        if !args.contains(&"--last") {
            all.push("--all");
        }
        let text = self.cli(&all)?;
        text.lines()
            .map(|line| {
                let value: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
                Ok(value.get("flow").cloned().unwrap_or(value))
            })
            .collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
        if self.cli(&["stop", "--detach"]).is_err() {
            // Dropping the process kills it.
            self.process = None;
        }
        if let Some(mut process) = self.process.take() {
            let _ = process.wait(Duration::from_secs(5));
        }
        remove_pins(&self.pins);
    }
}

/// Returns the path of the `palisade` binary: `PALISADE_BIN`, or the one in the target directory of the running test.
/// Builds the latter if it does not exist.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PALISADE_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let dir = own
        .ancestors()
        .skip(1)
        .find(|dir| !dir.ends_with("deps"))
        .context("where cargo has built")?;
    let path = dir.join("palisade");
    if !path.exists() {
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build
            .args(["build", "--package", "palisade"])
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        if dir.ends_with("release") {
            build.arg("--release");
        }
        let status = build.status().context("cargo build --package palisade")?;
        ensure!(
            status.success() && path.exists(),
            "{} was not built; set PALISADE_BIN to use another binary",
            path.display()
        );
    }
    Ok(path)
}
