//! `palisade doctor`: collects the facts and prints the findings. Reads only; the findings are in [`crate::doctor`].

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::statvfs::{FsFlags, statvfs},
    unistd::geteuid,
};
use palisade_datapath::{
    Feature, check_pin_dir, is_clock_synchronised, occupants, offloads, probe, proxy_link_names, support,
    xdp_support,
};
use palisade_model::diagnostic::Severity;

use super::{
    output::{EXIT_NO, EXIT_OK, show},
    policy::diagnose,
};
use crate::{
    cli::Output,
    config::{Attachment, Config},
    control::{
        api::{Request, Status},
        client::{ClientError, ask_within},
    },
    daemon::{self, policy_file_names},
    doctor::{
        Clock, Configuration, DEFAULT_ATTACHMENT, DaemonState, Directory, Facts, Finding, Interface, Level,
        Limits, Policies, Role, Service, findings,
    },
    installation::Installation,
    survey::{self, Link},
    text::count,
};

/// Longest wait for the daemon.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(3);
/// Size of a frame of a worker's UMEM, bytes.
const FRAME: u64 = 4_096;
/// Largest number of workers without `[worker] threads`.
const MAX_WORKERS: usize = 8;
/// Folders of units, in the order of systemd.unit(5).
const UNIT_DIRS: [&str; 4] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Runs `palisade doctor`.
pub(super) fn run(config: &Path, socket: Option<&Path>, output: Output) -> anyhow::Result<u8> {
    let found = findings(&collect(config, socket)?);
    let errors = found.iter().any(|finding| finding.level == Level::Error);
    show(&found, output, |found, out| write_findings(found, out))?;
    Ok(if errors { EXIT_NO } else { EXIT_OK })
}

fn write_findings(found: &[Finding], out: &mut dyn Write) -> io::Result<()> {
    let width = found
        .iter()
        .map(|finding| finding.check.chars().count())
        .max()
        .unwrap_or(0);
    for finding in found {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "WARNING",
            Level::Error => "ERROR",
        };
        writeln!(out, "{level:<7}  {:<width$}  {}", finding.check, finding.text)?;
        if let Some(fix) = &finding.fix {
            writeln!(out, "{:<7}  {:<width$}  -> {fix}", "", "")?;
        }
    }
    let number = |level| found.iter().filter(|finding| finding.level == level).count();
    writeln!(
        out,
        "\n{}, {}, {}, {} ok",
        count(number(Level::Error), "error", "errors"),
        count(number(Level::Warning), "warning", "warnings"),
        count(number(Level::Note), "note", "notes"),
        number(Level::Ok)
    )
}

fn collect(path: &Path, socket: Option<&Path>) -> anyhow::Result<Facts> {
    let installation = Installation::find(path);
    let (config, errors) = match Config::load(path) {
        Ok(config) => (Some(config), Vec::new()),
        Err(errors) => (None, errors.iter().map(ToString::to_string).collect()),
    };
    let node = &installation.node;
    let socket = socket.unwrap_or(&node.socket);
    let (refused, warnings) = config.as_ref().map(daemon::check_dirs).unwrap_or_default();
    let (daemon, pid) = daemon_state(socket, &node.pin_dir);
    let links = survey::links()?;
    let mut directories = vec![
        directory("[node] state_dir", &node.state_dir),
        directory("[node] socket", node.socket.parent().unwrap_or(Path::new("/"))),
    ];
    for export in &installation.exports {
        directories.push(directory(
            "[[export]] file",
            export.parent().unwrap_or(Path::new("/")),
        ));
    }
    Ok(Facts {
        root: geteuid().is_root(),
        kernel: support(&node.pin_dir).kernel,
        features: Feature::ALL
            .into_iter()
            .map(|feature| (feature, probe(feature)))
            .collect(),
        pin_dir: (
            node.pin_dir.clone(),
            check_pin_dir(&node.pin_dir)
                .err()
                .map(|problem| problem.to_string()),
        ),
        bpffs_mode: fs::metadata("/sys/fs/bpf").ok().map(|metadata| metadata.mode()),
        limits: limits(pid),
        umem: umem(config.as_ref()),
        policies: policies(&installation, config.as_ref()),
        has_workloads: config.as_ref().is_some_and(|config| !config.endpoints.is_empty()),
        interfaces: interfaces(config.as_ref(), &installation.interface, &links),
        configuration: Configuration {
            path: path.to_owned(),
            exists: path.exists(),
            errors,
            refused,
            warnings,
            audit: config.as_ref().is_some_and(|config| config.policy.audit),
        },
        daemon,
        translations: daemon::translations(),
        forwarding: [
            sysctl("ipv4/ip_forward").map(|value| value != 0),
            sysctl("ipv6/conf/all/forwarding").map(|value| value != 0),
        ],
        clock: clock(&[path, &node.state_dir.join("state.json")]),
        directories,
        service: service(),
    })
}

/// Returns the state of the daemon, and its process id if it answers.
fn daemon_state(socket: &Path, pin_dir: &Path) -> (DaemonState, Option<u32>) {
    match ask_within::<Status>(socket, &Request::Status, DAEMON_TIMEOUT) {
        Ok(status) => (
            DaemonState::Runs {
                ready: status.ready,
                missing: status.missing,
                warnings: status.warnings,
            },
            Some(status.pid),
        ),
        Err(ClientError::NotRunning { .. }) => {
            let interfaces = match fs::read_dir(pin_dir.join("links")) {
                Ok(entries) => Some(entries.count()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Some(0),
                Err(_) => None,
            };
            (DaemonState::Stopped { interfaces }, None)
        }
        Err(error) => (DaemonState::Unknown(error.to_string()), None),
    }
}

/// Returns the limits of the daemon; if it does not run, those of the unit; else those of this process.
fn limits(pid: Option<u32>) -> Limits {
    let read = |pid: &str, of: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
        Some(parse_limits(&text, of))
    };
    if let Some(limits) = pid.and_then(|pid| read(&pid.to_string(), "the daemon")) {
        return limits;
    }
    if let Some((unit, text)) = unit().filter(|_| is_systemd()) {
        let named = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('=')?.trim().parse().ok())
        };
        // A limit that is not a number is `infinity`, or has a suffix.
        return Limits {
            of: unit.display().to_string(),
            memlock: named("LimitMEMLOCK"),
            files: named("LimitNOFILE"),
        };
    }
    read("self", "a daemon that is started from this shell").unwrap_or_default()
}

/// Parses `/proc/PID/limits`.
fn parse_limits(text: &str, of: &str) -> Limits {
    let soft = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Limits {
        of: of.to_owned(),
        memlock: soft("Max locked memory"),
        files: soft("Max open files"),
    }
}

fn umem(config: Option<&Config>) -> u64 {
    let (threads, frames) = config.map_or((0, FRAME), |config| {
        (config.worker.threads, u64::from(config.worker.frames))
    });
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 {
        cpus.min(MAX_WORKERS)
    } else {
        threads
    };
    threads as u64 * frames * FRAME
}

fn policies(installation: &Installation, config: Option<&Config>) -> Policies {
    let mut policies = Policies {
        dir: installation.policy_dir.clone(),
        exists: installation.policy_dir.exists(),
        ..Policies::default()
    };
    // An empty folder is no error: nothing is enforced yet.
    if !policies.exists || policy_file_names(&policies.dir).is_ok_and(|names| names.is_empty()) {
        return policies;
    }
    match diagnose(std::slice::from_ref(&installation.policy_dir), config) {
        Ok(diagnosis) => {
            for diagnostic in &diagnosis.diagnostics {
                match diagnostic.severity {
                    Severity::Error => policies.errors.push(diagnostic.to_string()),
                    Severity::Warning => policies.warnings.push(diagnostic.to_string()),
                    _ => {}
                }
            }
            policies.errors.extend(diagnosis.problems);
            policies.counts = (diagnosis.files, diagnosis.policies);
            policies.inspect = diagnosis.inspects;
        }
        Err(error) => policies.errors.push(format!("{error:#}")),
    }
    policies
}

fn interfaces(config: Option<&Config>, own: &str, links: &BTreeMap<u32, Link>) -> Vec<Interface> {
    let [ingress, egress] = proxy_link_names(own);
    let own = [format!("{own}0"), format!("{own}1"), ingress, egress];
    let mut found = Vec::new();
    for link in links
        .values()
        .filter(|link| !link.loopback && !own.contains(&link.name))
    {
        let (role, attachment) = configured(config, &link.name);
        let master = |kind: &str| {
            let master = link.master.and_then(|master| links.get(&master));
            master.filter(|master| master.kind == kind)
        };
        found.push(Interface {
            name: link.name.clone(),
            role,
            kind: link.kind.clone(),
            up: link.up,
            has_addresses: link.has_addresses(),
            is_bond_port: master("bond").is_some(),
            vrf: master("vrf").map(|vrf| vrf.name.clone()),
            has_vlans: links.values().any(|upper| {
                upper.kind == "vlan" && upper.lower == Some(link.index) && !upper.lower_elsewhere
            }),
            mtu: link.mtu,
            xdp: xdp_support(link.index),
            offloads: offloads(&link.name),
            occupants: occupants(link.index).map_err(|error| error.to_string()),
            rp_filter: rp_filter(&link.name),
            attachment,
        });
    }
    found
}

fn configured(config: Option<&Config>, name: &str) -> (Role, Attachment) {
    let Some(config) = config else {
        return (Role::None, DEFAULT_ATTACHMENT);
    };
    if let Some(interface) = config.interfaces.iter().find(|interface| interface.name == name) {
        return (Role::Host, interface.attachment);
    }
    match config
        .endpoints
        .iter()
        .find(|endpoint| endpoint.interface == name)
    {
        Some(endpoint) => (Role::Endpoint, endpoint.attachment),
        None => (Role::None, DEFAULT_ATTACHMENT),
    }
}

/// Returns the effective reverse path filter: the larger one of `all` and the interface.
fn rp_filter(name: &str) -> u8 {
    let read = |name: &str| sysctl(&format!("ipv4/conf/{name}/rp_filter")).unwrap_or(0);
    u8::try_from(read("all").max(read(name))).unwrap_or(0)
}

/// Returns a value below /proc/sys/net; `None` if it does not exist.
fn sysctl(key: &str) -> Option<u32> {
    fs::read_to_string(Path::new("/proc/sys/net").join(key))
        .ok()?
        .trim()
        .parse()
        .ok()
}

fn clock(files: &[&Path]) -> Clock {
    let now = SystemTime::now();
    let newer = files.iter().find(|path| {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            // Two seconds of tolerance, for file systems with coarse times.
            .is_ok_and(|time| time > now + Duration::from_secs(2))
    });
    Clock {
        synchronised: is_clock_synchronised(),
        now: now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        newer_file: newer.map(|path| path.to_path_buf()),
    }
}

/// Returns free space of the file system of a directory, or of its longest existing ancestor.
fn directory(setting: &str, path: &Path) -> Directory {
    let existing = path
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let stat = statvfs(existing).ok();
    Directory {
        setting: setting.to_owned(),
        path: path.to_owned(),
        free: stat
            .as_ref()
            .map(|stat| stat.blocks_free() * stat.fragment_size()),
        free_inodes: stat
            .as_ref()
            .filter(|stat| stat.files() != 0)
            .map(|stat| stat.files_free()),
        read_only: stat.is_some_and(|stat| stat.flags().contains(FsFlags::ST_RDONLY)),
    }
}

fn is_systemd() -> bool {
    // sd_booted(3).
    Path::new("/run/systemd/system").is_dir()
}

/// Returns path and text of the unit.
fn unit() -> Option<(PathBuf, String)> {
    UNIT_DIRS.iter().find_map(|dir| {
        let path = Path::new(dir).join("palisade.service");
        let text = fs::read_to_string(&path).ok()?;
        Some((path, text))
    })
}

fn service() -> Service {
    let unit = unit();
    let enabled = ["/etc/systemd/system", "/usr/lib/systemd/system"]
        .iter()
        .any(|dir| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries
                .filter(|entry| {
                    let name = entry.file_name();
                    let name = name.to_string_lossy();
                    name.ends_with(".wants") || name.ends_with(".requires")
                })
                .any(|entry| fs::symlink_metadata(entry.path().join("palisade.service")).is_ok())
        });
    Service {
        systemd: is_systemd(),
        enabled,
        watchdog: unit
            .as_ref()
            .is_some_and(|(_, text)| text.lines().any(|line| line.starts_with("WatchdogSec="))),
        unit: unit.map(|(path, _)| path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_limits_are_parsed() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 524288               files     \n\
                    Max locked memory         unlimited            unlimited            bytes     \n";
        let limits = parse_limits(text, "x");
        assert_eq!((limits.memlock, limits.files), (None, Some(1_024)));
    }

    #[test]
    fn a_directory_that_does_not_exist_has_the_space_of_its_ancestor() {
        let root = tempfile::tempdir().unwrap();
        let found = directory("x", &root.path().join("a/b"));
        assert!(found.free.is_some_and(|free| free > 0) && !found.read_only);
    }
}
