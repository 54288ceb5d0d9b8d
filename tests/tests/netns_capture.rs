//! `palisade capture`: what tshark reads in the files, and what is left in the kernel.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::sys::signal::Signal;
use palisade_testbed::{
    Daemon,
    daemon::{Hooks, Settings},
    ns::{temp_dir, wait_until},
    process::{Process, output},
    topology::{FAMILIES, Family},
    web::curl,
};
use palisade_tests::{World, setup::XDP_AND_CLSACT, world};
use serde_json::Value;
use tempfile::TempDir;

/// Limit for steps that need only CPU time, on a machine under load.
const LONG: Duration = Duration::from_secs(60);

const POLICIES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: allow-front}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
  - fromEndpoints: [{matchLabels: {app: front}}]
    icmps:
    - fields: [{type: 8, family: IPv4}, {type: 128, family: IPv6}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node-in}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [world]
    toPorts:
    - ports: [{port: \"22\", protocol: TCP}]
";

const OPEN_AND_DENIED: &str = "front -> back tcp/80 open
db -> back tcp/80 drop
far -> node tcp/22 open
far -> node tcp/80 drop";

/// A capture that writes to a file.
struct Capturing {
    process: Process,
    file: PathBuf,
    _dir: TempDir,
}

impl Capturing {
    /// Starts a capture and waits until its programs are attached.
    fn start(daemon: &Daemon, args: &[&str]) -> Self {
        let dir = temp_dir("capture").expect("a directory");
        let file = dir.path().join("a.pcapng");
        let path = file.to_str().expect("a path");
        let mut command = daemon.command(&["capture", "-w", path]);
        command.args(args);
        let process = Process::spawn("capture", command, dir.path()).expect("capture");
        let mut capturing = Self {
            process,
            file,
            _dir: dir,
        };
        // The section header is written once the programs are attached.
        let file = capturing.file.clone();
        if let Err(error) = wait_until("the capture begins", LONG, || {
            fs::metadata(&file).is_ok_and(|file| file.len() > 0)
        }) {
            panic!("{error:#}: {}", capturing.process.log());
        }
        assert!(capturing.process.exited().expect("a status").is_none());
        capturing
    }

    /// Ends the capture by a signal. Returns what the command has printed.
    fn end(&mut self) -> String {
        self.process.signal(Signal::SIGINT).expect("SIGINT");
        self.wait()
    }

    /// Waits until the capture ends.
    fn wait(&mut self) -> String {
        let status = self.process.wait(LONG).expect("the end of the capture");
        assert!(status.success(), "{status}: {}", self.process.log());
        self.process.log()
    }

    fn packets(&self) -> Vec<Packet> {
        packets(&self.file)
    }
}

/// A packet as tshark reads it.
#[derive(Debug)]
struct Packet {
    comment: String,
    interface: String,
    /// `in` or `out`.
    direction: &'static str,
    source: String,
    destination: String,
    /// Destination port.
    port: String,
    length: usize,
    captured: usize,
}

/// Returns the packets of a file.
fn packets(file: &Path) -> Vec<Packet> {
    let text = tshark(&[
        "-r",
        file.to_str().expect("a path"),
        "-T",
        "fields",
        "-E",
        "separator=|",
        "-e",
        "frame.comment",
        "-e",
        "frame.interface_name",
        "-e",
        "frame.packet_flags_direction",
        "-e",
        "ip.src",
        "-e",
        "ipv6.src",
        "-e",
        "ip.dst",
        "-e",
        "ipv6.dst",
        "-e",
        "tcp.dstport",
        "-e",
        "frame.len",
        "-e",
        "frame.cap_len",
    ]);
    text.lines()
        .map(|line| {
            let fields: Vec<&str> = line.split('|').collect();
            let number = |at: usize| fields[at].parse().unwrap_or_else(|_| panic!("{line}"));
            Packet {
                comment: fields[0].into(),
                interface: fields[1].into(),
                direction: if fields[2].ends_with('1') { "in" } else { "out" },
                source: [fields[3], fields[4]].concat(),
                destination: [fields[5], fields[6]].concat(),
                port: fields[7].into(),
                length: number(8),
                captured: number(9),
            }
        })
        .collect()
}

fn tshark(args: &[&str]) -> String {
    let out = output(Command::new("tshark").arg("-n").args(args), LONG).expect("tshark");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success() && !said.contains("damaged") && !said.contains("cut short"),
        "tshark {}: {said}",
        args.join(" ")
    );
    String::from_utf8(out.stdout).expect("UTF-8")
}

fn bpftool(args: &[&str]) -> Value {
    let out = output(Command::new("bpftool").arg("-j").args(args), LONG).expect("bpftool");
    serde_json::from_slice(&out.stdout).unwrap_or_else(|error| panic!("bpftool {args:?}: {error}"))
}

/// Returns the names of the programs in the kernel that copy packets of this daemon: they use its event ring, and the
/// ring of a capture.
fn capturing_programs(daemon: &Daemon) -> Vec<String> {
    let mut versions = fs::read_dir(daemon.pins()).expect("pins");
    let version = versions
        .find_map(|entry| {
            let path = entry.expect("pins").path().join("EVENTS");
            path.exists().then_some(path)
        })
        .expect("the event ring");
    let events = bpftool(&["map", "show", "pinned", version.to_str().expect("a path")])["id"].clone();
    let maps = bpftool(&["map", "show"]);
    let captured: Vec<&Value> = maps
        .as_array()
        .expect("maps")
        .iter()
        .filter(|map| map["name"] == "CAPTURED")
        .map(|map| &map["id"])
        .collect();
    let programs = bpftool(&["prog", "show"]);
    let uses = |program: &Value, id: &Value| {
        let ids = program["map_ids"].as_array();
        ids.is_some_and(|ids| ids.contains(id))
    };
    programs
        .as_array()
        .expect("programs")
        .iter()
        .filter(|program| uses(program, &events) && captured.iter().any(|id| uses(program, id)))
        .map(|program| program["name"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// Waits until no program copies packets.
#[track_caller]
fn expect_nothing_left(daemon: &Daemon) {
    wait_until("the programs of the capture are gone", LONG, || {
        capturing_programs(daemon).is_empty()
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}\n{}", capturing_programs(daemon), daemon.log()));
}

/// Returns the packets between two ends in one direction, with a destination port.
fn between<'a>(
    packets: &'a [Packet],
    world: &World,
    ends: (&str, &str),
    family: Family,
    port: &str,
) -> Vec<&'a Packet> {
    let (from, to) = (
        world.addr(ends.0, family).to_string(),
        world.addr(ends.1, family).to_string(),
    );
    packets
        .iter()
        .filter(|packet| packet.source == from && packet.destination == to && packet.port == port)
        .collect()
}

#[test]
fn tshark_shows_verdict_reason_and_rule_of_each_packet() {
    for hooks in [Hooks::default(), XDP_AND_CLSACT] {
        let world = world();
        let settings = Settings {
            hooks,
            ..Settings::default()
        };
        let daemon = world.daemon(settings, &[("p.yaml", POLICIES)]).expect("daemon");
        assert_eq!(capturing_programs(&daemon), [""; 0]);
        let mut capturing = Capturing::start(&daemon, &[]);
        let mut loaded = capturing_programs(&daemon);
        loaded.sort();
        assert_eq!(loaded, ["palisade_in", "palisade_out", "palisade_xdp"]);
        // The verdicts are the same as without a capture.
        world.expect(&daemon, OPEN_AND_DENIED);
        let said = capturing.end();
        assert!(said.contains("packets,"), "{said}");
        expect_nothing_left(&daemon);
        world.expect(&daemon, OPEN_AND_DENIED);

        let packets = capturing.packets();
        let back = &world.topology.get("back").interface;
        for family in FAMILIES {
            let open = between(&packets, &world, ("front", "back"), family, "80");
            // At the interface of the sender, and at that of the receiver.
            let opened = open
                .iter()
                .find(|packet| packet.interface == *back)
                .unwrap_or_else(|| panic!("{hooks:?}: {open:#?}"));
            assert_eq!(opened.direction, "out", "{opened:?}");
            for part in [
                "verdict FORWARDED, reason Allowed",
                "allow-front",
                "p.yaml:7",
                "to endpoint default/back",
                "at tc egress",
            ] {
                assert!(opened.comment.contains(part), "{part}: {opened:?}");
            }
            assert!(
                open.iter().any(|packet| packet.interface == *back
                    && packet.comment.contains("reason Established")
                    && packet.comment.contains("allow-front")),
                "{open:#?}"
            );
            let sent = open
                .iter()
                .find(|packet| packet.interface == world.topology.get("front").interface)
                .expect("the sender's interface");
            assert_eq!(sent.direction, "in", "{sent:?}");
            let hook = if hooks == XDP_AND_CLSACT {
                "at XDP"
            } else {
                "at tc ingress"
            };
            assert!(sent.comment.contains(hook), "{sent:?}");

            let denied = between(&packets, &world, ("db", "back"), family, "80");
            let denied = denied
                .iter()
                .find(|packet| packet.interface == *back)
                .unwrap_or_else(|| panic!("{hooks:?}: {denied:#?}"));
            for part in ["verdict DROPPED, reason Policy denied", "allow-front"] {
                assert!(denied.comment.contains(part), "{part}: {denied:?}");
            }
            // The NIC.
            let entered = between(&packets, &world, ("far", "node"), family, "22");
            let entered = entered.first().expect("a packet from far");
            assert_eq!((&*entered.interface, entered.direction), ("nic0", "in"));
            assert!(entered.comment.contains("verdict FORWARDED"), "{entered:?}");
            assert!(entered.comment.contains("node-in"), "{entered:?}");
            let refused = between(&packets, &world, ("far", "node"), family, "80");
            assert!(
                refused
                    .first()
                    .expect("a packet")
                    .comment
                    .contains("verdict DROPPED")
            );
        }
    }
}

#[test]
fn filters_select_the_packets() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let back = world.addr("back", Family::V6).to_string();
    let filters = ["--verdict", "dropped", "--to-ip", &back, "--protocol", "tcp"];
    let mut capturing = Capturing::start(&daemon, &filters);
    world.expect(&daemon, OPEN_AND_DENIED);
    capturing.end();
    let dropped = capturing.packets();
    assert!(!dropped.is_empty());
    for packet in &dropped {
        assert!(
            packet.destination == back && packet.comment.contains("verdict DROPPED"),
            "{packet:?}"
        );
    }
    // Filters that only the daemon can apply.
    let mut capturing = Capturing::start(
        &daemon,
        &["--from-label", "app=front", "--not", "--ip-version", "4"],
    );
    world.expect(&daemon, OPEN_AND_DENIED);
    capturing.end();
    let sent = capturing.packets();
    assert!(!between(&sent, &world, ("front", "back"), Family::V6, "80").is_empty());
    let front = world.addr("front", Family::V6).to_string();
    assert!(sent.iter().all(|packet| packet.source == front), "{sent:#?}");
    // Wrong filters are refused without a capture.
    let out = daemon
        .try_cli(&["capture", "-w", "/dev/null", "--ip", "10.0.0.0/99"])
        .expect("capture");
    assert!(!out.status.success());
    expect_nothing_left(&daemon);
}

#[test]
fn a_killed_client_or_daemon_leaves_no_capture() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let mut capturing = Capturing::start(&daemon, &["--port", "80"]);
    let shown = |status: &Value| status["capture"]["filters"] == "--port 80";
    daemon
        .wait_status("the capture in the status", shown)
        .expect("status");
    let text = daemon.cli(&["status"]).expect("status");
    assert!(text.contains("Capture:     running since"), "{text}");
    // One capture at a time.
    let out = daemon.try_cli(&["capture", "-w", "-"]).expect("capture");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && said.contains("another capture runs"),
        "{said}"
    );
    assert_eq!(capturing_programs(&daemon).len(), 3);
    capturing.process.kill9().expect("SIGKILL");
    expect_nothing_left(&daemon);
    daemon
        .wait_status("no capture in the status", |status| status["capture"].is_null())
        .expect("status");
    world.expect(&daemon, OPEN_AND_DENIED);

    // A daemon that ends replaces the programs.
    let mut capturing = Capturing::start(&daemon, &[]);
    daemon.terminate().expect("SIGTERM");
    assert!(!capturing.process.wait(LONG).expect("the end").success());
    assert!(
        capturing.process.log().contains("the daemon has ended"),
        "{}",
        capturing.process.log()
    );
    expect_nothing_left(&daemon);
    // A daemon that is killed leaves them enforcing; the next one replaces them.
    daemon.restart().expect("restart");
    let mut capturing = Capturing::start(&daemon, &[]);
    daemon.kill9().expect("SIGKILL");
    assert!(!capturing.process.wait(LONG).expect("the end").success());
    assert_eq!(capturing_programs(&daemon).len(), 3);
    world.expect(&daemon, OPEN_AND_DENIED);
    daemon.restart().expect("restart");
    expect_nothing_left(&daemon);
    world.expect(&daemon, OPEN_AND_DENIED);
}

#[test]
fn an_interface_that_comes_back_is_captured() {
    let mut world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let interface = world.topology.get("db").interface.clone();
    let mut capturing = Capturing::start(&daemon, &["--interface", &interface]);
    world.topology.unplug("db").expect("unplug");
    let guarded = |status: &Value| {
        let interfaces = status["interfaces"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        interfaces.iter().filter(|i| i["ingress"].is_string()).count()
    };
    daemon
        .wait_status("the interface is gone", |status| guarded(status) == 4)
        .expect("status");
    world.topology.plug("db").expect("plug");
    daemon
        .wait_status("the interface is guarded", |status| guarded(status) == 5)
        .expect("status");
    // The neighbours on the new link must be resolved first.
    world.expect(&daemon, "db -> back tcp/80 drop");
    world.expect(&daemon, "db -> back tcp/80 drop");
    capturing.end();
    expect_nothing_left(&daemon);
    world.expect(&daemon, "db -> back tcp/80 drop");
    let packets = capturing.packets();
    for family in FAMILIES {
        let sent = between(&packets, &world, ("db", "back"), family, "80");
        assert!(!sent.is_empty(), "{packets:#?}");
    }
    assert!(
        packets.iter().all(|packet| packet.interface == interface),
        "{packets:#?}"
    );
}

#[test]
fn bounds_hold_and_payload_is_written_only_on_request() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let talk = || {
        // The servers echo what they receive.
        let at = world.at("back", Family::V4, 80).to_string();
        let (host, port) = at.split_once(':').expect("a port");
        let script = format!("printf secret-payload | timeout 3 nc -N {host} {port}");
        let _ = output(world.ns("front").command("sh").args(["-c", &script]), LONG);
    };
    let holds_payload = |file: &Path| {
        let bytes = fs::read(file).expect("the file");
        bytes.windows(14).any(|part| part == b"secret-payload")
    };
    let mut headers = Capturing::start(&daemon, &["--port", "80", "--duration", "3s"]);
    talk();
    let said = headers.wait();
    assert!(said.contains("the time is over"), "{said}");
    assert!(!holds_payload(&headers.file));
    let packets = headers.packets();
    assert!(
        packets.iter().any(|packet| packet.captured < packet.length),
        "{packets:#?}"
    );

    let mut whole = Capturing::start(&daemon, &["--port", "80", "--snaplen", "65535"]);
    talk();
    whole.end();
    assert!(holds_payload(&whole.file));
    assert!(
        whole
            .packets()
            .iter()
            .all(|packet| packet.captured == packet.length)
    );

    let mut counted = Capturing::start(&daemon, &["--count", "3"]);
    world.expect(&daemon, "front -> back tcp/80 open");
    let said = counted.wait();
    assert!(
        said.contains("3 packets") && said.contains("a limit is reached"),
        "{said}"
    );
    assert_eq!(counted.packets().len(), 3);

    let mut short = Capturing::start(&daemon, &["--max-bytes", "4096"]);
    for _ in 0..3 {
        world.expect(&daemon, OPEN_AND_DENIED);
        if short.process.exited().expect("a status").is_some() {
            break;
        }
    }
    short.wait();
    assert!(fs::metadata(&short.file).expect("the file").len() <= 4096);
    assert!(!short.packets().is_empty());
    expect_nothing_left(&daemon);
}

#[test]
fn a_ring_of_files_and_a_pipe_into_tshark() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let dir = temp_dir("capture").expect("a directory");
    let path = dir.path().join("ring.pcapng");
    let args = [
        "capture",
        "-w",
        path.to_str().expect("a path"),
        "--ring-files",
        "2",
        "--ring-bytes",
        "4096",
    ];
    let mut ring = Process::spawn("ring", daemon.command(&args), dir.path()).expect("capture");
    wait_until("the first file", LONG, || {
        dir.path().join("ring_00001.pcapng").exists()
    })
    .expect("a file");
    world.expect(&daemon, OPEN_AND_DENIED);
    world.expect(&daemon, OPEN_AND_DENIED);
    ring.signal(Signal::SIGINT).expect("SIGINT");
    assert!(ring.wait(LONG).expect("the end").success(), "{}", ring.log());
    let mut files: Vec<PathBuf> = fs::read_dir(dir.path())
        .expect("the directory")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "pcapng"))
        .collect();
    files.sort();
    assert_eq!(files.len(), 2, "{files:?}");
    assert!(!files.contains(&dir.path().join("ring_00001.pcapng")));
    for file in &files {
        let packets = packets(file);
        assert!(!packets.is_empty() && packets.iter().all(|packet| !packet.interface.is_empty()));
    }
    expect_nothing_left(&daemon);

    // Standard output.
    let mut capture = daemon
        .command(&["capture", "-w", "-", "--count", "4", "--protocol", "tcp"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("capture");
    let pipe = capture.stdout.take().expect("a pipe");
    let reader = Command::new("tshark")
        .args(["-n", "-r", "-", "-T", "fields", "-e", "frame.comment"])
        .stdin(pipe)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("tshark");
    wait_until("four packets", LONG, || {
        world.expect(&daemon, "front -> back tcp/80 open");
        capture.try_wait().expect("a status").is_some()
    })
    .expect("the end of the capture");
    assert!(capture.wait().expect("the end").success());
    let read = reader.wait_with_output().expect("tshark");
    let lines = String::from_utf8(read.stdout).expect("UTF-8");
    assert_eq!(lines.matches("verdict FORWARDED").count(), 4, "{lines}");
    expect_nothing_left(&daemon);
}

#[test]
fn packets_pass_while_captures_begin_and_end() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    for family in FAMILIES {
        let back = world.addr("back", family).to_string();
        let ping = world
            .ns("front")
            .command("ping")
            .args(["-q", "-i", "0.01", "-w", "60", "-c", "400", &back])
            .stdout(Stdio::piped())
            .spawn()
            .expect("ping");
        for _ in 0..2 {
            let mut capturing = Capturing::start(&daemon, &["--protocol", "icmp", "--count", "2"]);
            capturing.wait();
            world.expect(&daemon, "db -> back tcp/80 drop");
        }
        let out = ping.wait_with_output().expect("ping");
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(text.contains(" 0% packet loss"), "{text}");
    }
}

#[test]
fn punted_packets_name_their_inspector() {
    let world = world();
    let policies = POLICIES.replace(
        "    - ports: [{port: \"80\", protocol: TCP}]\n  - from",
        "    - ports: [{port: \"80\", protocol: TCP}]\n      rules: {http: [{method: GET}]}\n  - from",
    );
    assert_ne!(policies, POLICIES);
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", &policies)])
        .expect("daemon");
    let mut capturing = Capturing::start(&daemon, &["--port", "80", "--snaplen", "4096"]);
    for family in FAMILIES {
        let url = format!("http://{}/", world.at("back", family, 80));
        // The server is no HTTP server; the request is punted all the same.
        let _ = curl(world.ns("front"), &[&url], Duration::from_secs(3));
        let _ = curl(world.ns("front"), &["-X", "PUT", &url], Duration::from_secs(3));
    }
    capturing.end();
    let packets = capturing.packets();
    let back = &world.topology.get("back").interface;
    for family in FAMILIES {
        let sent = between(&packets, &world, ("front", "back"), family, "80");
        let punted: Vec<_> = sent
            .iter()
            .filter(|packet| packet.interface == *back && packet.comment.contains("punted to http"))
            .collect();
        assert!(!punted.is_empty(), "{sent:#?}");
        // As it came: without the punt header.
        assert!(
            punted
                .iter()
                .all(|packet| packet.comment.contains("verdict FORWARDED"))
        );
        // The verdict of the inspector, at the packets with the request only.
        let decided: Vec<_> = punted
            .iter()
            .filter(|packet| packet.comment.contains("then request"))
            .map(|packet| {
                (
                    packet
                        .comment
                        .contains("then request DROPPED, reason Denied by application rules"),
                    packet,
                )
            })
            .collect();
        assert!(decided.iter().any(|(is_denied, _)| *is_denied), "{punted:#?}");
        let is_allowed = |packet: &Packet| packet.comment.contains("then request FORWARDED, reason Allowed");
        assert!(
            decided.iter().any(|(_, packet)| is_allowed(packet)),
            "{punted:#?}"
        );
        for (_, packet) in &decided {
            assert!(packet.comment.contains("p.yaml:"), "{packet:?}");
            assert!(packet.length > 100, "no request is in {packet:?}");
        }
    }
    // URLs are payload.
    assert!(packets.iter().all(|packet| !packet.comment.contains("http://")));
}

#[test]
fn a_dns_query_has_the_verdict_of_its_inspector_in_its_packet() {
    let world = world();
    let policy = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toEndpoints: [{matchLabels: {app: back}}]
    toPorts:
    - ports: [{port: \"53\", protocol: UDP}]
      rules: {dns: [{matchName: good.example}]}
";
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", policy)])
        .expect("daemon");
    let mut capturing = Capturing::start(&daemon, &["--protocol", "udp"]);
    for family in FAMILIES {
        let server = format!("@{}", world.addr("back", family));
        for name in ["good.example", "evil.example"] {
            let mut dig = world.ns("front").command("dig");
            dig.args([&server, name, "A", "+tries=1", "+time=1"]);
            let _ = output(&mut dig, LONG);
        }
    }
    capturing.end();
    let packets = capturing.packets();
    for family in FAMILIES {
        let front = world.addr("front", family).to_string();
        let verdicts: Vec<&str> = packets
            .iter()
            .filter(|packet| packet.source == front)
            .filter_map(|packet| packet.comment.split_once(", then "))
            .map(|(_, verdict)| verdict)
            .collect();
        let [good, evil] = verdicts.as_slice() else {
            panic!("{packets:#?}");
        };
        assert!(good.starts_with("request FORWARDED, reason Allowed"), "{good}");
        assert!(
            evil.starts_with("request DROPPED, reason Denied by application rules"),
            "{evil}"
        );
    }
}
