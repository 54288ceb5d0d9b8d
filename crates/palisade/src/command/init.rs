//! `palisade init`: collects what is in use on the node, and writes the first configuration and policy. The texts are in
//! [`crate::init`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use palisade_model::diagnostic::Severity;
use palisade_policy::parse::parse;

use super::{
    output::{EXIT_FAILED, EXIT_OK},
    policy,
    service::check_config,
};
use crate::{
    cli::InitArgs,
    config::{Config, DEFAULT_INTERFACE},
    control::{
        api::{Request, Status},
        client::{ClientError, ask},
    },
    daemon,
    init::{
        Engine, Generated, Listener, NodeFacts, Outgoing, POLICY_FILE, Session, Transport, accept_rules,
        generate,
    },
    installation::Installation,
    survey::{self, Link},
    trusted_path::checked_dir,
};

/// State of a listening TCP socket in /proc/net/tcp (`TCP_LISTEN`).
const LISTEN: &str = "0A";
/// State of an established TCP connection (`TCP_ESTABLISHED`).
const ESTABLISHED: &str = "01";
/// State of a UDP socket without a peer (`TCP_CLOSE`).
const UNCONNECTED: &str = "07";
/// Mode of the files. They contain no secrets.
const FILE_MODE: u32 = 0o644;
/// Mode of new folders.
const DIR_MODE: u32 = 0o755;
/// Longest chain of parent processes in which the ssh session is searched.
const MAX_PARENTS: usize = 32;

/// Runs `palisade init`.
pub(super) fn run(config: &Path, args: &InitArgs) -> anyhow::Result<u8> {
    let config = std::path::absolute(config)?;
    let dir = match &args.dir {
        Some(dir) => std::path::absolute(dir)?,
        None => config.parent().unwrap_or(Path::new("/")).join("policies.d"),
    };
    let generated = generate(&collect()?, &dir.display().to_string(), args.egress);
    check(&config, &generated)?;
    if args.dry_run {
        let mut out = io::stdout().lock();
        writeln!(out, "### {}\n{}", config.display(), generated.config)?;
        writeln!(
            out,
            "### {}\n{}",
            dir.join(POLICY_FILE).display(),
            generated.policy
        )?;
        return Ok(EXIT_OK);
    }
    let runs = runs_without_interfaces(&config)?;
    let policy_file = dir.join(POLICY_FILE);
    let empty_config = guards_nothing(&config);
    if !args.force {
        let there: Vec<String> = [&config, &policy_file]
            .iter()
            .filter(|path| fs::symlink_metadata(path).is_ok())
            .filter(|path| !(empty_config && **path == &config))
            .map(|path| path.display().to_string())
            .collect();
        if !there.is_empty() {
            bail!(
                "{}: there already, and nothing is changed; --dry-run prints the proposal, --force replaces the files and \
                 keeps the old ones as FILE.old",
                there.join(", ")
            );
        }
    }
    for folder in [Some(dir.as_path()), config.parent()].into_iter().flatten() {
        // Another user must not be able to replace the folder, or what is written to it.
        checked_dir(folder, DIR_MODE)?;
    }
    // The policy is written first. A daemon that starts in between finds no configuration and does not start, or one that
    // guards nothing.
    write_new(&policy_file, &generated.policy, args.force)?;
    write_new(&config, &generated.config, args.force || empty_config)?;
    if check_config(&config)? != EXIT_OK
        || policy::validate(std::slice::from_ref(&dir), false, Some(&config))? != EXIT_OK
    {
        eprintln!("palisade: the files are written, but not everything is valid: see above");
        return Ok(EXIT_FAILED);
    }
    next_steps(&config, &policy_file, &generated, runs)?;
    Ok(EXIT_OK)
}

fn next_steps(config: &Path, policy_file: &Path, generated: &Generated, runs: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let is_default = config == Path::new(crate::config::DEFAULT_PATH);
    let start = if runs && is_default {
        "palisade reload".to_owned()
    } else if is_default {
        "systemctl enable --now palisade".to_owned()
    } else {
        format!("palisade run --config {}", config.display())
    };
    let option = if is_default {
        String::new()
    } else {
        format!(" --config {}", config.display())
    };
    writeln!(
        out,
        "
Written, in audit mode (nothing is dropped):
  {}    interfaces: {}
  {}    open ports: {}

Next:
  1. read both files, and remove the rules that are not needed
  2. palisade doctor{option}
  3. {start}
  4. palisade status --wait 10s{option}
  5. palisade observe --follow --verdict audit{option}     shows what would be dropped
  6. remove `audit = true` from {}, then palisade reload{option}",
        config.display(),
        generated.interfaces,
        policy_file.display(),
        generated.ports,
        config.display(),
    )
}

/// Checks the texts before anything is written.
fn check(path: &Path, generated: &Generated) -> anyhow::Result<()> {
    if let Err(errors) = Config::parse(path, &generated.config) {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        bail!("the proposed configuration is not valid: {}", lines.join("; "));
    }
    let parsed = parse(POLICY_FILE, &generated.policy);
    let errors: Vec<String> = parsed
        .diagnostics
        .iter()
        .filter(|diagnostic| diagnostic.severity == Severity::Error)
        .map(ToString::to_string)
        .collect();
    if !errors.is_empty() {
        bail!("the proposed policy is not valid: {}", errors.join("; "));
    }
    Ok(())
}

/// Returns whether the configuration is valid and names no interface, no workload and no way to find workloads, as that of
/// the package does.
fn guards_nothing(path: &Path) -> bool {
    let is_file = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file());
    is_file
        && Config::load(path).is_ok_and(|config| {
            config.interfaces.is_empty() && config.endpoints.is_empty() && config.discover.is_empty()
        })
}

/// Returns whether a daemon runs with the configuration.
///
/// # Errors
/// The daemon guards an interface: its policy folder is watched, so a new file would be in force at once, perhaps without
/// audit mode. Or the daemon does not answer.
fn runs_without_interfaces(config: &Path) -> anyhow::Result<bool> {
    let installation = Installation::find(config);
    let socket = &installation.node.socket;
    match ask::<Status>(socket, &Request::Status) {
        Err(ClientError::NotRunning { .. }) => Ok(false),
        Ok(status) if status.interfaces.is_empty() && guards_nothing(config) => Ok(true),
        _ => bail!(
            "a daemon listens at {}: `palisade init` is for the first start. `palisade init --dry-run` prints a proposal; \
             `palisade policy suggest` proposes policies for recorded flows",
            socket.display()
        ),
    }
}

/// Writes a new file, never through a link and never over another file. `replace`: an old file is renamed to FILE.old.
fn write_new(path: &Path, text: &str, replace: bool) -> anyhow::Result<()> {
    let shown = || path.display().to_string();
    if replace && fs::symlink_metadata(path).is_ok() {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        fs::rename(path, &old).with_context(shown)?;
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(path)
        .with_context(shown)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // A half of a configuration is worse than none.
        let _ = fs::remove_file(path);
        return Err(error).with_context(shown);
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(shown)
}

fn collect() -> anyhow::Result<NodeFacts> {
    let processes = socket_processes();
    let sockets: Vec<Entry> = [
        ("tcp", Transport::Tcp),
        ("tcp6", Transport::Tcp),
        ("udp", Transport::Udp),
        ("udp6", Transport::Udp),
    ]
    .into_iter()
    .flat_map(|(name, transport)| {
        // A disabled address family has no file.
        let text = fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
        entries(&text, transport)
    })
    .collect();
    let names = |entry: &Entry| processes.get(&entry.inode).cloned().unwrap_or_default();
    let mut listeners: Vec<Listener> = sockets
        .iter()
        .filter(|entry| match entry.transport {
            Transport::Tcp => entry.state == LISTEN,
            Transport::Udp => entry.state == UNCONNECTED && entry.peer_port == 0,
        })
        .map(|entry| Listener {
            transport: entry.transport,
            port: entry.port,
            address: entry.address,
            processes: names(entry),
        })
        .collect();
    listeners.sort();
    listeners.dedup();
    let listening: BTreeSet<(Transport, u16)> =
        listeners.iter().map(|one| (one.transport, one.port)).collect();
    let mut outgoing: Vec<Outgoing> = sockets
        .iter()
        .filter(|entry| entry.state == ESTABLISHED && !entry.peer.to_canonical().is_loopback())
        .filter(|entry| !listening.contains(&(entry.transport, entry.port)))
        .map(|entry| Outgoing {
            transport: entry.transport,
            port: entry.peer_port,
            processes: names(entry),
        })
        .collect();
    outgoing.sort();
    outgoing.dedup();
    let resolv = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    Ok(NodeFacts {
        hostname: fs::read_to_string("/proc/sys/kernel/hostname")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        links: links()?,
        listeners,
        first_ephemeral_port: range
            .split_whitespace()
            .next()
            .and_then(|port| port.parse().ok())
            .unwrap_or(32_768),
        session: session(),
        dns_servers: nameservers(&resolv),
        outgoing,
        routes: survey::routes()?,
        accept_rules: accepted_by_nftables(),
        firewall: firewall(),
        engines: engines(),
        namespaces: names_in(Path::new("/run/netns")),
    })
}

/// Returns the interfaces without Palisade's own.
fn links() -> anyhow::Result<Vec<Link>> {
    let own = palisade_datapath::left_links(DEFAULT_INTERFACE)?;
    Ok(survey::links()?
        .into_values()
        .filter(|link| !own.contains(&link.name))
        .collect())
}

/// Line of /proc/net/tcp or udp.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    transport: Transport,
    address: IpAddr,
    port: u16,
    peer: IpAddr,
    peer_port: u16,
    state: String,
    inode: u64,
}

fn entries(text: &str, transport: Transport) -> Vec<Entry> {
    text.lines()
        .skip(1)
        .filter_map(|line| entry(line, transport))
        .collect()
}

fn entry(line: &str, transport: Transport) -> Option<Entry> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = endpoint(fields.get(1)?)?;
    let (peer, peer_port) = endpoint(fields.get(2)?)?;
    Some(Entry {
        transport,
        address,
        port,
        peer,
        peer_port,
        state: (*fields.get(3)?).to_owned(),
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// Parses `0100007F:0016`. The kernel prints an address as words of 32 bits in the byte order of the machine.
fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let address = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(bytes) => IpAddr::V4(Ipv4Addr::from(bytes)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?)),
    };
    Some((address, port))
}

/// Returns the names of the processes that have a socket, by its inode. Without root, only those of the own user.
fn socket_processes() -> BTreeMap<u64, Vec<String>> {
    let mut found = BTreeMap::<u64, BTreeSet<String>>::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let is_process = process.file_name().to_string_lossy().parse::<u32>().is_ok();
        if !is_process {
            continue;
        }
        let path = process.path();
        let descriptors = fs::read_dir(path.join("fd")).into_iter().flatten().flatten();
        let inodes: Vec<u64> = descriptors
            .filter_map(|descriptor| {
                let target = fs::read_link(descriptor.path()).ok()?;
                let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
                inode.parse().ok()
            })
            .collect();
        if inodes.is_empty() {
            continue;
        }
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        for inode in inodes {
            found.entry(inode).or_default().insert(name.trim().to_owned());
        }
    }
    found
        .into_iter()
        .map(|(inode, names)| (inode, names.into_iter().collect()))
        .collect()
}

/// Returns the ssh session of this command: from SSH_CONNECTION of the command or of a parent process, because sudo
/// removes the variable.
fn session() -> Option<Session> {
    if let Ok(text) = std::env::var("SSH_CONNECTION") {
        return parse_session(&text);
    }
    let mut pid = std::os::unix::process::parent_id();
    for _ in 0..MAX_PARENTS {
        if pid <= 1 {
            return None;
        }
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let value = environment
            .split(|byte| *byte == 0)
            .find_map(|variable| variable.strip_prefix(b"SSH_CONNECTION="));
        if let Some(session) = value.and_then(|value| parse_session(&String::from_utf8_lossy(value))) {
            return Some(session);
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        pid = status
            .lines()
            .find_map(|line| line.strip_prefix("PPid:"))?
            .trim()
            .parse()
            .ok()?;
    }
    None
}

/// Parses `CLIENT PORT SERVER PORT`.
fn parse_session(text: &str) -> Option<Session> {
    let fields: Vec<&str> = text.split_whitespace().collect();
    let [client, _, _, port] = fields.as_slice() else {
        return None;
    };
    // A link-local client has its interface behind the address.
    let client = client.split('%').next()?.parse().ok()?;
    Some(Session {
        client,
        port: port.parse().ok()?,
    })
}

fn nameservers(resolv: &str) -> Vec<IpAddr> {
    resolv
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().split('%').next()?.parse().ok())
        .collect()
}

/// Returns the nftables tables of other software. A kernel without nf_tables has none.
fn other_tables() -> Vec<String> {
    let mut tables = palisade_datapath::nftables().unwrap_or_default();
    tables.retain(|table| !table.ends_with(&format!(" {DEFAULT_INTERFACE}")));
    tables
}

/// Returns the accept rules of other software's nftables tables in the words of nft(8), or why they are not known.
fn accepted_by_nftables() -> Vec<String> {
    if other_tables().is_empty() {
        return Vec::new();
    }
    let listed = Command::new("nft")
        .args(["--stateless", "list", "ruleset"])
        .stdin(Stdio::null())
        .output();
    match listed {
        Ok(listed) if listed.status.success() => {
            accept_rules(&String::from_utf8_lossy(&listed.stdout), DEFAULT_INTERFACE)
        }
        Ok(listed) => vec![format!(
            "(not known: nft: {})",
            String::from_utf8_lossy(&listed.stderr).trim()
        )],
        Err(error) => vec![format!("(not known: nft: {error})")],
    }
}

/// Returns the rules of other software, as a summary.
fn firewall() -> Vec<String> {
    let mut found = Vec::new();
    let tables = other_tables();
    if !tables.is_empty() {
        found.push(format!("nftables: the tables {}", tables.join(", ")));
    }
    for (program, path) in [
        ("iptables (legacy)", "/proc/thread-self/net/ip_tables_names"),
        ("ip6tables (legacy)", "/proc/thread-self/net/ip6_tables_names"),
    ] {
        let tables = fs::read_to_string(path).unwrap_or_default();
        let tables: Vec<&str> = tables.lines().collect();
        if !tables.is_empty() {
            found.push(format!("{program}: the tables {}", tables.join(", ")));
        }
    }
    found.extend(daemon::translations());
    found
}

fn engines() -> Vec<Engine> {
    [
        ("docker", "docker", "/run/docker.sock"),
        ("containerd", "containerd", "/run/containerd/containerd.sock"),
        // Podman has the API of Docker.
        ("podman", "docker", "/run/podman/podman.sock"),
    ]
    .into_iter()
    .filter(|(_, _, path)| Path::new(path).exists())
    .map(|(name, kind, path)| Engine {
        name: name.to_owned(),
        kind,
        socket: path.to_owned(),
    })
    .collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn sockets_of_proc_are_parsed() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                    0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   999        0 12345 1 0\n   \
                    1: garbage\n";
        let found = entries(text, Transport::Tcp);
        let [entry] = found.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!((entry.address, entry.port), (Ipv4Addr::LOCALHOST.into(), 0x1538));
        assert_eq!((entry.state.as_str(), entry.inode), (LISTEN, 12_345));
        let (address, port) = endpoint("B80D0120000000000000000001000000:01BB").unwrap();
        assert_eq!((address, port), ("2001:db8::1".parse().unwrap(), 443));
        assert_eq!(endpoint("00:16"), None);
    }

    #[test]
    fn session_and_nameservers_are_parsed() {
        let session = parse_session("fe80::1%eth0 50000 fe80::2 22").unwrap();
        assert_eq!((session.client, session.port), ("fe80::1".parse().unwrap(), 22));
        assert_eq!(parse_session("x"), None);
        let servers = nameservers("search x\nnameserver 192.0.2.1\n nameserver fe80::1%eth0\nnameserver x\n");
        assert_eq!(
            servers,
            ["192.0.2.1", "fe80::1"].map(|one| one.parse::<IpAddr>().unwrap())
        );
    }

    #[test]
    fn a_file_is_written_once_and_replaced_only_by_force() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("palisade.toml");
        write_new(&path, "one", false).unwrap();
        assert!(write_new(&path, "two", false).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        write_new(&path, "two", true).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(
            fs::read_to_string(root.path().join("palisade.toml.old")).unwrap(),
            "one"
        );
        // A link at the place of the file is not followed.
        let (target, link) = (root.path().join("target"), root.path().join("link"));
        symlink(&target, &link).unwrap();
        assert!(write_new(&link, "x", false).is_err());
        write_new(&link, "x", true).unwrap();
        assert!(!target.exists());
    }
}
