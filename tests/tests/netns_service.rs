//! The daemon with only the privileges that `config/palisade.service` grants.

use std::fs;

use palisade_testbed::{
    Daemon,
    dns::{PORT, Scripted},
    ns::wait_until,
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::apps,
    fixtures::dns::zone,
    setup::{question, request, tables, webs},
};

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/palisade.service");

const CLIENT: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: www.example}]
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http: [{path: /ok}]
  - toFQDNs: [{matchName: www.example}]
"#;

/// Runs another program with a seccomp filter under which socket(2) fails with EAFNOSUPPORT for other address families, as
/// systemd does for `RestrictAddressFamilies`.
const FAMILIES_ONLY: &str = r#"
import ctypes, os, platform, socket, struct, sys
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
names, command = sys.argv[1].split(","), sys.argv[2:]
families = [44 if name == "AF_XDP" else getattr(socket, name) for name in names]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7fff0000, 0x00050000 | 97
rules = [(LOAD, 0, 0, 0), (EQUAL, 0, len(families) + 2, number), (LOAD, 0, 0, 16)]
for place, family in enumerate(families):
    rules.append((EQUAL, len(families) - place, 0, family))
rules += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    raise OSError(ctypes.get_errno(), "prctl")
socket_of_none = next(family for family in (16, 17, 29) if family not in families)
try:
    socket.socket(socket_of_none, socket.SOCK_RAW)
    sys.exit("the filter lets everything through")
except OSError as error:
    assert error.errno == 97, error
os.execvp(command[0], command)
"#;

/// Returns the words of a setting of the unit.
fn setting(unit: &str, name: &str) -> Vec<String> {
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let words = line.unwrap_or_else(|| panic!("{UNIT} has no {name}"));
    words.split_whitespace().map(str::to_owned).collect()
}

/// Returns the command that starts a program as the unit does.
fn as_a_service() -> Vec<String> {
    let unit = fs::read_to_string(UNIT).expect("the unit");
    let capabilities: Vec<String> = setting(&unit, "CapabilityBoundingSet")
        .iter()
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let bounding = format!("-all,{}", capabilities.join(","));
    let families = setting(&unit, "RestrictAddressFamilies").join(",");
    let mut command = Vec::new();
    command.extend(["setpriv", "--no-new-privs", "--inh-caps=-all"].map(str::to_owned));
    command.push(format!("--bounding-set={bounding}"));
    command.extend(["python3", "-c", FAMILIES_ONLY, &families].map(str::to_owned));
    command
}

#[test]
fn the_sandbox_of_the_unit_permits_everything_the_daemon_needs() {
    let apps = apps();
    let _resolver = Scripted::start(apps.ns("internet"), &apps.both("internet"), zone).expect("resolver");
    let [_web] = webs(&apps, ["internet"], &[80], &[]);
    // Prefetch of a name needs Internet sockets.
    let resolver = apps.at("internet", Family::V4, PORT).ip();
    // The unit also raises the limit of locked memory, which the user who runs the test may be unable to do: fewer frames
    // need less.
    let settings = tables(&format!(
        "[dns]\nprefetch = true\nservers = [\"{resolver}\"]\n[worker]\nframes = 256\n"
    ));
    let mut daemon =
        Daemon::prepare(&apps.topology, &settings, &[("client.yaml", CLIENT)]).expect("a daemon");
    daemon.start_through(as_a_service());
    daemon.spawn().expect("a process");
    daemon
        .wait()
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
    daemon
        .wait_status("the name is resolved", |status| {
            status["names"]["in_map"].as_u64() >= Some(2)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    for family in FAMILIES {
        let mut got = (None, None, None, None);
        let read = wait_until("all is read", OPEN, || {
            got = (
                question(&apps, family, "www.example"),
                question(&apps, family, "evil.example"),
                request(&apps, family, "/ok"),
                request(&apps, family, "/denied"),
            );
            got == (Some(0), Some(5), Some(200), Some(403))
        });
        assert!(read.is_ok(), "{family:?}: {got:?}\n{}", daemon.report());
    }
    let table = apps.ns("node").run("nft", &["list", "table", "inet", "palisade"]);
    assert!(table.expect("the table").contains("@enforced"));
    let log = daemon.log();
    assert!(
        !log.contains("Permission denied") && !log.contains("not permitted"),
        "{log}"
    );
}

#[test]
fn the_unit_restarts_a_failed_or_hung_daemon_without_limit() {
    let unit = fs::read_to_string(UNIT).expect("the unit");
    assert_eq!(setting(&unit, "StartLimitIntervalSec"), ["0"]);
    assert_eq!(setting(&unit, "Restart"), ["on-failure"]);
    assert!(!setting(&unit, "WatchdogSec").is_empty());
    // The daemon's own process notifies the watchdog.
    assert_eq!(setting(&unit, "Type"), ["notify"]);
    assert_eq!(setting(&unit, "NotifyAccess"), ["main"]);
    // Pins need a bpffs that only root can enter, in the host's mount namespace.
    let mounts = setting(&unit, "ExecStartPre").join(" ");
    assert!(
        mounts.starts_with('+') && mounts.contains("mount -t bpf") && mounts.contains("mode=0700"),
        "{mounts}"
    );
}
