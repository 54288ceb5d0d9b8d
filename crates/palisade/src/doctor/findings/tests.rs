use palisade_datapath::{Occupant, Offloads};

use super::*;
use crate::doctor::{Clock, Configuration, Directory, Limits, Policies, Service};

/// Returns the facts of a node on which everything is in order.
fn good() -> Facts {
    Facts {
        root: true,
        kernel: "6.18.5".to_owned(),
        features: Feature::ALL.map(|feature| (feature, Answer::Yes)).to_vec(),
        pin_dir: ("/sys/fs/bpf/palisade".into(), None),
        bpffs_mode: Some(0o40700),
        limits: Limits {
            of: "the daemon".to_owned(),
            memlock: None,
            files: Some(524_288),
        },
        umem: 32 << 20,
        configuration: Configuration {
            path: "/etc/palisade/palisade.toml".into(),
            exists: true,
            ..Configuration::default()
        },
        policies: Policies {
            dir: "/etc/palisade/policies.d".into(),
            exists: true,
            counts: (1, 1),
            ..Policies::default()
        },
        daemon: DaemonState::Runs {
            ready: true,
            missing: Vec::new(),
            warnings: Vec::new(),
        },
        interfaces: vec![Interface::nic("eth0")],
        has_workloads: false,
        translations: Vec::new(),
        forwarding: [Some(false), Some(false)],
        clock: Clock {
            synchronised: Some(true),
            now: EARLIEST + 1,
            newer_file: None,
        },
        directories: vec![Directory {
            setting: "[node] state_dir".to_owned(),
            path: "/var/lib/palisade".into(),
            free: Some(1 << 30),
            free_inodes: Some(1 << 20),
            read_only: false,
        }],
        service: Service {
            systemd: true,
            unit: Some("/usr/lib/systemd/system/palisade.service".into()),
            enabled: true,
            watchdog: true,
        },
    }
}

/// Returns the findings that are not `ok`: level, check, text and what to do.
fn bad(facts: &Facts) -> Vec<(Level, String, String)> {
    findings(facts)
        .into_iter()
        .filter(|finding| finding.level != Level::Ok)
        .map(|finding| {
            let fix = finding.fix.unwrap_or_default();
            assert!(!fix.is_empty(), "{} does not say what to do", finding.text);
            (finding.level, finding.check, format!("{} -> {fix}", finding.text))
        })
        .collect()
}

/// Checks that exactly one finding is not `ok`, and its level, check and parts of its text.
#[track_caller]
fn one(facts: &Facts, level: Level, check: &str, parts: &[&str]) {
    let found = bad(facts);
    let [(found_level, found_check, text)] = found.as_slice() else {
        panic!("{found:#?}");
    };
    assert_eq!((*found_level, found_check.as_str()), (level, check), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part}: {text}");
    }
}

fn with(change: impl FnOnce(&mut Facts)) -> Facts {
    let mut facts = good();
    change(&mut facts);
    facts
}

fn with_nic(change: impl FnOnce(&mut Interface)) -> Facts {
    with(|facts| change(&mut facts.interfaces[0]))
}

fn program(name: &str, hook: HookKind, direction: Direction) -> Occupant {
    Occupant {
        hook,
        direction,
        priority: 0,
        program: 7,
        name: name.to_owned(),
    }
}

#[test]
fn a_node_in_order_has_only_findings_that_say_so() {
    assert_eq!(bad(&good()), []);
    assert!(findings(&good()).len() > 12);
}

#[test]
fn kernels_that_are_too_old_or_known_to_panic_are_reported() {
    let kernel = |release: &str| with(|facts| facts.kernel = release.to_owned());
    one(
        &kernel("5.15.0-91-generic"),
        Level::Error,
        "kernel",
        &["older than 6.1"],
    );
    one(
        &kernel("6.17.3"),
        Level::Warning,
        "kernel",
        &["panics", "6.17.11"],
    );
    one(
        &kernel("custom"),
        Level::Warning,
        "kernel",
        &["no version number"],
    );
    for release in ["6.1.0-28-amd64", "6.12.1", "6.17.11", "7.0"] {
        assert_eq!(bad(&kernel(release)), [], "{release}");
    }
}

#[test]
fn a_missing_feature_is_reported_with_its_first_kernel_and_option() {
    let without = |feature| {
        with(|facts| {
            for (known, answer) in &mut facts.features {
                if *known == feature {
                    *answer = Answer::No("EINVAL".to_owned());
                }
            }
        })
    };
    one(
        &without(Feature::AfXdp),
        Level::Error,
        "af_xdp",
        &["4.18", "CONFIG_XDP_SOCKETS", "dropped"],
    );
    one(&without(Feature::Tcx), Level::Note, "tcx", &["clsact"]);
    one(
        &without(Feature::NfTables),
        Level::Warning,
        "nf_tables",
        &["CONFIG_NF_TABLES"],
    );
    let unknown = with(|facts| facts.features = vec![(Feature::Bpf, Answer::NeedsRoot)]);
    one(&unknown, Level::Note, "bpf", &["sudo"]);
}

#[test]
fn a_bpffs_that_is_missing_or_open_to_others_is_an_error() {
    let missing = with(|facts| facts.pin_dir.1 = Some("not on a bpffs".to_owned()));
    one(&missing, Level::Error, "bpffs", &["mount -t bpf"]);
    let open = with(|facts| facts.bpffs_mode = Some(0o40777));
    one(&open, Level::Error, "bpffs", &["0777", "go-w"]);
    assert_eq!(bad(&with(|facts| facts.bpffs_mode = Some(0o41777))), []);
}

#[test]
fn limits_below_the_need_are_warnings() {
    let memory = with(|facts| facts.limits.memlock = Some(8 << 20));
    one(
        &memory,
        Level::Warning,
        "locked memory",
        &["8192 KiB", "32768 KiB", "LimitMEMLOCK"],
    );
    assert_eq!(bad(&with(|facts| facts.limits.memlock = Some(32 << 20))), []);
    let files = with(|facts| facts.limits.files = Some(1_024));
    one(&files, Level::Warning, "open files", &["LimitNOFILE"]);
}

#[test]
fn a_missing_or_broken_configuration_and_broken_policies_are_errors() {
    let missing = with(|facts| facts.configuration.exists = false);
    one(&missing, Level::Error, "configuration", &["palisade init"]);
    let broken = with(|facts| facts.configuration.errors = vec!["x.toml:3:1: no such option".to_owned()]);
    one(
        &broken,
        Level::Error,
        "configuration",
        &["x.toml:3:1", "last good copy"],
    );
    let refused = with(|facts| facts.configuration.refused = vec!["belongs to user 7".to_owned()]);
    one(&refused, Level::Error, "configuration", &["user 7"]);
    let audit = with(|facts| facts.configuration.audit = true);
    one(
        &audit,
        Level::Note,
        "configuration",
        &["audit", "palisade reload"],
    );
    let policy = with(|facts| facts.policies.errors = vec!["a.yaml:1:1: error".to_owned()]);
    one(&policy, Level::Error, "policies", &["a.yaml:1:1"]);
    let gone = with(|facts| facts.policies.exists = false);
    one(&gone, Level::Error, "policies", &["policies.d", "palisade init"]);
    let none = with(|facts| facts.policies.counts = (0, 0));
    one(&none, Level::Note, "policies", &["everything passes"]);
}

#[test]
fn a_daemon_that_is_down_is_a_warning_that_says_what_is_enforced() {
    let stopped = |interfaces| with(|facts| facts.daemon = DaemonState::Stopped { interfaces });
    one(
        &stopped(Some(0)),
        Level::Warning,
        "daemon",
        &["everything passes"],
    );
    one(
        &stopped(Some(1)),
        Level::Warning,
        "daemon",
        &["still enforced at 1 interface,"],
    );
    one(&stopped(None), Level::Warning, "daemon", &["without root"]);
    let hangs = with(|facts| facts.daemon = DaemonState::Unknown("hangs".to_owned()));
    one(&hangs, Level::Error, "daemon", &["hangs", "restart"]);
    let not_ready = with(|facts| {
        facts.daemon = DaemonState::Runs {
            ready: false,
            missing: vec!["interface eth1: is not there".to_owned()],
            warnings: Vec::new(),
        };
    });
    one(&not_ready, Level::Error, "daemon", &["NOT READY", "eth1"]);
}

#[test]
fn a_full_or_read_only_directory_is_a_warning() {
    let directory = |change: fn(&mut Directory)| with(|facts| change(&mut facts.directories[0]));
    one(
        &directory(|d| d.free = Some(1 << 20)),
        Level::Warning,
        "[node] state_dir",
        &["1024 KiB"],
    );
    one(
        &directory(|d| d.free_inodes = Some(3)),
        Level::Warning,
        "[node] state_dir",
        &["3 inodes"],
    );
    one(
        &directory(|d| d.read_only = true),
        Level::Warning,
        "[node] state_dir",
        &["read-only", "remount"],
    );
}

#[test]
fn the_xdp_mode_follows_from_driver_and_options() {
    let no_native = |change: fn(&mut Interface)| {
        with_nic(|nic| {
            nic.xdp = XdpSupport::Generic;
            nic.offloads.driver = "e1000e".to_owned();
            change(nic);
        })
    };
    one(
        &no_native(|_| {}),
        Level::Note,
        "interface eth0",
        &["e1000e", "at tc"],
    );
    one(
        &no_native(|nic| nic.attachment.ingress = IngressHook::Xdp),
        Level::Error,
        "interface eth0",
        &["ingress = \"auto\""],
    );
    one(
        &no_native(|nic| nic.attachment.xdp_mode = XdpMode::Skb),
        Level::Note,
        "interface eth0",
        &["cannot inspect"],
    );
    assert_eq!(
        bad(&no_native(|nic| nic.attachment.ingress = IngressHook::Tc)),
        []
    );
    // Without a report of the kernel the table of drivers counts.
    assert_eq!(bad(&with_nic(|nic| nic.xdp = XdpSupport::Unknown)), []);
    let unknown = with_nic(|nic| {
        nic.xdp = XdpSupport::Unknown;
        nic.offloads.driver = "r8169".to_owned();
    });
    one(&unknown, Level::Note, "interface eth0", &["r8169", "6.3"]);
}

#[test]
fn offloads_mtu_and_reverse_path_filter_are_reported_where_they_matter() {
    let lro = with_nic(|nic| {
        nic.offloads = Offloads {
            lro: true,
            ..nic.offloads.clone()
        };
    });
    one(
        &lro,
        Level::Warning,
        "interface eth0",
        &["ethtool -K eth0 lro off"],
    );
    let vlan = with_nic(|nic| {
        nic.offloads.rx_vlan = true;
        nic.has_vlans = true;
    });
    one(&vlan, Level::Note, "interface eth0", &["rxvlan"]);
    assert_eq!(bad(&with_nic(|nic| nic.offloads.rx_vlan = true)), []);
    let jumbo = |inspect| {
        with(|facts| {
            facts.policies.inspect = inspect;
            facts.interfaces[0].mtu = 9_000;
        })
    };
    one(&jumbo(true), Level::Note, "interface eth0", &["9000", "232"]);
    assert_eq!(bad(&jumbo(false)), []);
    let strict = with_nic(|nic| nic.rp_filter = 1);
    one(
        &strict,
        Level::Note,
        "interface eth0",
        &["rp_filter", "net.ipv4.conf.eth0"],
    );
}

#[test]
fn programs_of_other_software_are_reported_with_their_place() {
    let occupied = |programs: &[Occupant]| with_nic(|nic| nic.occupants = Ok(programs.to_vec()));
    let (ingress, tcx) = (Direction::Ingress, HookKind::Tcx);
    let (ours, other) = (
        program("palisade_in", tcx, ingress),
        program("cil_from_netdev", tcx, ingress),
    );
    one(
        &occupied(&[program("xdp_pass", HookKind::XdpNative, ingress)]),
        Level::Error,
        "interface eth0",
        &["xdp_pass", "id 7", "ip link set dev eth0 xdp off"],
    );
    one(
        &occupied(std::slice::from_ref(&other)),
        Level::Note,
        "interface eth0",
        &["will run before it"],
    );
    one(
        &occupied(&[ours.clone(), other.clone()]),
        Level::Note,
        "interface eth0",
        &["cil_from_netdev", "runs after"],
    );
    one(
        &occupied(&[other, ours.clone()]),
        Level::Warning,
        "interface eth0",
        &["BEFORE", "restart the daemon"],
    );
    assert_eq!(bad(&occupied(&[ours])), []);
    let flower = Occupant {
        priority: 1,
        program: 0,
        ..program("flower", HookKind::Clsact, Direction::Egress)
    };
    let clsact = with_nic(|nic| {
        nic.attachment.tc = TcHook::Clsact;
        nic.occupants = Ok(vec![flower]);
    });
    one(
        &clsact,
        Level::Error,
        "interface eth0",
        &["`flower`", "priority 1"],
    );
    let unreadable = with_nic(|nic| nic.occupants = Err("EPERM".to_owned()));
    one(&unreadable, Level::Note, "interface eth0", &["EPERM", "sudo"]);
}

#[test]
fn a_nic_that_the_configuration_does_not_name_is_a_warning() {
    let other = |change: fn(&mut Interface)| {
        with(|facts| {
            let mut nic = Interface::nic("eth1");
            nic.role = Role::None;
            change(&mut nic);
            facts.interfaces.push(nic);
        })
    };
    one(
        &other(|_| {}),
        Level::Warning,
        "interface eth1",
        &["without a verdict", "[[interface]]"],
    );
    assert_eq!(bad(&other(|nic| nic.has_addresses = false)), []);
    assert_eq!(bad(&other(|nic| nic.is_bond_port = true)), []);
    assert_eq!(bad(&other(|nic| nic.kind = "bridge".to_owned())), []);
    let none = with(|facts| facts.interfaces.clear());
    one(
        &none,
        Level::Warning,
        "interfaces",
        &["not guarded", "palisade init"],
    );
}

#[test]
fn a_vrf_and_its_ports_are_named() {
    let port = with(|facts| facts.interfaces[0].vrf = Some("blue".to_owned()));
    one(
        &port,
        Level::Note,
        "interface eth0",
        &["port of the VRF blue", "do not configure blue"],
    );
    let vrf = with(|facts| {
        let mut vrf = Interface::nic("blue");
        vrf.kind = "vrf".to_owned();
        facts.interfaces.push(vrf);
    });
    one(
        &vrf,
        Level::Warning,
        "interface blue",
        &["is a VRF", "configure its ports"],
    );
}

#[test]
fn translation_and_missing_forwarding_are_reported() {
    let nat = with(|facts| facts.translations = vec!["nftables: nat chains with rules (2)".to_owned()]);
    one(&nat, Level::Note, "nat", &["nat chains", "on the wire"]);
    let workloads = |forwarding| {
        with(|facts| {
            facts.has_workloads = true;
            facts.forwarding = forwarding;
        })
    };
    one(
        &workloads([Some(true), Some(false)]),
        Level::Warning,
        "forwarding",
        &["IPv6", "net.ipv6.conf.all.forwarding=1"],
    );
    assert_eq!(bad(&workloads([Some(true), None])), []);
}

#[test]
fn a_wrong_or_unsynchronised_clock_is_reported() {
    one(
        &with(|facts| facts.clock.now = 0),
        Level::Error,
        "clock",
        &["years behind"],
    );
    let back = with(|facts| facts.clock.newer_file = Some("/etc/palisade/palisade.toml".into()));
    one(&back, Level::Warning, "clock", &["palisade.toml", "set back"]);
    let free = with(|facts| facts.clock.synchronised = Some(false));
    one(&free, Level::Note, "clock", &["NTP"]);
    assert_eq!(bad(&with(|facts| facts.clock.synchronised = None)), []);
}

#[test]
fn a_unit_that_is_missing_disabled_or_without_watchdog_is_a_warning() {
    let service = |change: fn(&mut Service)| with(|facts| change(&mut facts.service));
    one(
        &service(|s| s.unit = None),
        Level::Warning,
        "service",
        &["not installed"],
    );
    one(
        &service(|s| s.enabled = false),
        Level::Warning,
        "service",
        &["systemctl enable"],
    );
    one(
        &service(|s| s.watchdog = false),
        Level::Warning,
        "service",
        &["WatchdogSec=1m"],
    );
    one(
        &service(|s| s.systemd = false),
        Level::Note,
        "service",
        &["palisade run"],
    );
}
