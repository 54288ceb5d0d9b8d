//! Attaching, replacing and detaching programs, on veth pairs in namespaces.

mod common;

use std::{fs, path::Path};

use common::*;
use palisade_abi::{Decision, role};
use palisade_datapath::{AttachError, Attachment, Hook, HookKind, Role, TcMode, XdpMode, XdpSupport};

#[test]
fn every_mode_attaches_as_named_and_detaches_completely() {
    let world = World::new();
    let datapath = world.open_with(CASES[0].0, Decision::Allow);
    let ifindex = world.ifindex();
    for case in &CASES {
        datapath.apply(&whole_policy(1, case.0, Decision::Allow)).unwrap();
        let attached = datapath.attach(&attachment(&world, case)).unwrap();
        assert_eq!(
            (attached.ingress, attached.egress),
            (Some(case.4), Some(case.5)),
            "{case:?}"
        );
        assert_eq!(attached.name, "v0");
        assert_eq!(
            datapath.attachments().unwrap(),
            std::slice::from_ref(&attached),
            "{case:?}"
        );
        assert_eq!(
            attached.interface.role,
            if case.0 == Role::Host {
                role::HOST
            } else {
                role::ENDPOINT
            }
        );

        let link = world
            .node
            .run("ip", &["-d", "link", "show", "dev", "v0"])
            .unwrap();
        assert_eq!(
            link.contains("xdpgeneric"),
            case.4 == HookKind::XdpGeneric,
            "{case:?} {link}"
        );
        assert_eq!(
            link.contains("prog/xdp"),
            matches!(case.4, HookKind::XdpGeneric | HookKind::XdpNative),
            "{case:?} {link}"
        );
        assert_eq!(
            world.tc_show("qdisc").contains("clsact"),
            case.5 == HookKind::Clsact,
            "{case:?}"
        );
        assert_eq!(world.lost(5), 0, "{case:?}");

        datapath.detach(ifindex).unwrap();
        assert!(datapath.attachments().unwrap().is_empty(), "{case:?}");
        assert!(datapath.interfaces().unwrap().is_empty(), "{case:?}");
        assert!(!world.tc_show("qdisc").contains("clsact"), "{case:?}");
        let link = world
            .node
            .run("ip", &["-d", "link", "show", "dev", "v0"])
            .unwrap();
        assert!(!link.contains("prog/xdp"), "{case:?}");
    }
}

#[test]
fn programs_stay_attached_after_their_process_has_ended() {
    let world = World::new();
    let datapath = world.open_with(Role::Endpoint, Decision::Allow);
    // XDP is attached by a link, clsact without one.
    let attached = datapath.attach(&attachment(&world, &CASES[3])).unwrap();
    drop(datapath);
    assert_eq!(world.lost(3), 0);
    let link = world
        .node
        .run("ip", &["-d", "link", "show", "dev", "v0"])
        .unwrap();
    assert!(link.contains("prog/xdp"), "{link}");
    let datapath = world.open();
    assert!(!datapath.is_fresh());
    assert_eq!(datapath.attachments().unwrap(), [attached]);
    datapath.detach_all().unwrap();
    assert!(!world.options.pin_dir.exists());
}

/// Every few milliseconds the programs of another load replace the attached ones.
#[test]
fn replacing_programs_loses_no_packet() {
    let world = World::new();
    let loadings = [world.open_with(CASES[0].0, Decision::Allow), world.open()];
    // A foreign qdisc stays during the test, since adding or removing a qdisc stops the interface for a moment (the
    // kernel's qdisc_graft calls dev_deactivate). Attaching and detaching XDP does the same to the queues of a veth.
    world
        .node
        .run("tc", &["qdisc", "add", "dev", "v0", "clsact"])
        .unwrap();
    for cases in [&CASES[..1], &CASES[1..3], &CASES[2..3]] {
        loadings[1]
            .apply(&whole_policy(1, cases[0].0, Decision::Allow))
            .unwrap();
        loadings[1].attach(&attachment(&world, &cases[0])).unwrap();
        assert_eq!(world.lost(3), 0);
        let mut pings = world.start_pings(1000);
        let mut times = 0;
        while pings.running() {
            let case = &cases[times % cases.len()];
            let attached = loadings[times % 2].attach(&attachment(&world, case)).unwrap();
            assert_eq!((attached.ingress, attached.egress), (Some(case.4), Some(case.5)));
            times += 1;
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(times > 20, "{times}");
        assert_eq!(pings.lost(), 0, "{cases:?} after {times} replacements");
    }
}

#[test]
fn two_interfaces_with_one_slot_are_an_error() {
    let world = World::new();
    world
        .node
        .ip("link add a0 index 1234 type veth peer name a1\nlink add b0 index 66770 type veth peer name b1")
        .unwrap();
    let datapath = world.open();
    let first = Attachment {
        ifindex: 1234,
        ..world.attachment(Role::Endpoint, Hook::Auto, TcMode::Auto)
    };
    datapath.attach(&first).unwrap();
    let second = Attachment {
        ifindex: 66_770,
        ..first.clone()
    };
    let error = datapath.attach(&second).unwrap_err();
    assert!(
        matches!(
            error,
            AttachError::SlotCollision {
                ifindex: 66_770,
                other: 1234,
                ..
            }
        ),
        "{error}"
    );
    // The slot is free after the other interface was deleted.
    world.node.ip("link del a0").unwrap();
    datapath.attach(&second).unwrap();
    assert_eq!(
        datapath.interfaces().unwrap(),
        [interface(66_770, WORKLOAD, role::ENDPOINT)]
    );
}

#[test]
fn records_of_deleted_interfaces_are_removed() {
    let world = World::new();
    let datapath = world.open();
    world.node.ip("link add a0 type veth peer name a1").unwrap();
    let gone = world.node.ifindex("a0").unwrap();
    datapath
        .attach(&world.attachment(Role::Endpoint, Hook::Auto, TcMode::Auto))
        .unwrap();
    let links = world.options.pin_dir.join("links");
    for tc in [TcMode::Tcx, TcMode::Clsact] {
        let wanted = Attachment {
            ifindex: gone,
            ..world.attachment(Role::Endpoint, Hook::Auto, tc)
        };
        datapath.attach(&wanted).unwrap();
    }
    assert!(datapath.forget_dead().unwrap().is_empty());
    world.node.ip("link del a0").unwrap();
    assert_eq!(datapath.forget_dead().unwrap(), [gone]);
    assert!(!links.join(gone.to_string()).exists());
    assert_eq!(datapath.interfaces().unwrap().len(), 1);
    assert_eq!(datapath.attachments().unwrap().len(), 1);
    let error = datapath
        .attach(&Attachment {
            ifindex: gone,
            ..world.attachment(Role::Host, Hook::Auto, TcMode::Auto)
        })
        .unwrap_err();
    assert!(matches!(error, AttachError::NoSuchInterface { .. }), "{error}");
}

#[test]
fn a_foreign_xdp_program_is_named_and_stays() {
    let world = World::new();
    let beside = world.beside();
    let theirs = beside.open_with(Role::Host, Decision::Allow);
    theirs
        .attach(&world.attachment(Role::Host, Hook::Xdp, TcMode::Auto))
        .unwrap();

    let ours = world.open_with(Role::Host, Decision::Allow);
    let error = ours
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap_err();
    assert!(matches!(error, AttachError::ForeignXdp { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("palisade_xdp") && text.contains("ingress = \"tc\""),
        "{text}"
    );
    let attached = ours
        .attach(&world.attachment(Role::Host, Hook::Tc, TcMode::Auto))
        .unwrap();
    assert_eq!(attached.ingress, Some(HookKind::Tcx));
    assert_eq!(
        theirs.attachments().unwrap()[0].ingress,
        Some(HookKind::XdpNative)
    );
}

#[test]
fn a_pin_of_another_namespace_is_refused() {
    let here = World::new();
    let datapath = here.open();
    let index = "link add same index 4321 type veth peer name other";
    here.node.ip(index).unwrap();
    let wanted = Attachment {
        ifindex: 4321,
        ..here.attachment(Role::Host, Hook::Auto, TcMode::Auto)
    };
    datapath.attach(&wanted).unwrap();
    here.peer.ip(index).unwrap();
    here.peer.join().unwrap();
    let error = datapath.attach(&wanted).unwrap_err();
    assert!(matches!(error, AttachError::PinnedElsewhere { .. }), "{error}");
    assert!(error.to_string().contains("pin_dir"), "{error}");
}

#[test]
fn foreign_clsact_qdiscs_and_filters_stay() {
    let world = World::new();
    let datapath = world.open_with(Role::Endpoint, Decision::Allow);
    let tc = |args: &str| {
        world
            .node
            .run("tc", &args.split(' ').collect::<Vec<_>>())
            .unwrap()
    };
    let wanted = world.attachment(Role::Endpoint, Hook::Tc, TcMode::Clsact);

    tc("qdisc add dev v0 ingress");
    let error = datapath.attach(&wanted).unwrap_err();
    assert!(matches!(error, AttachError::IngressQdisc { .. }), "{error}");
    tc("qdisc del dev v0 ingress");

    tc("qdisc add dev v0 clsact");
    tc("filter add dev v0 egress prio 1 u32 match u32 0 0 flowid 1:1");
    let error = datapath.attach(&wanted).unwrap_err();
    assert!(
        matches!(&error, AttachError::ForeignFilter { kind, .. } if kind == "u32"),
        "{error}"
    );
    tc("filter del dev v0 egress");

    tc("filter add dev v0 egress prio 7 u32 match u32 0 0 flowid 1:1");
    datapath.attach(&wanted).unwrap();
    assert_eq!(world.lost(3), 0);
    datapath.detach(world.ifindex()).unwrap();
    assert!(world.tc_show("qdisc").contains("clsact"));
    assert!(
        world
            .node
            .run("tc", &["filter", "show", "dev", "v0", "egress"])
            .unwrap()
            .contains("pref 7")
    );
}

#[test]
fn detach_all_removes_everything_and_needs_no_maps() {
    let world = World::new();
    let datapath = world.open_with(Role::Endpoint, Decision::Deny);
    datapath.attach(&attachment(&world, &CASES[3])).unwrap();
    drop(datapath);
    // Maps of another version are removed as well.
    let other = world.options.pin_dir.join("v999");
    fs::create_dir(&other).unwrap();
    palisade_datapath::detach_all(&world.options.pin_dir).unwrap();
    assert!(pins_below(&world.options.pin_dir).is_empty());
    assert!(!world.options.pin_dir.exists());
    assert_eq!(world.lost(3), 0);
    palisade_datapath::detach_all(Path::new("/sys/fs/bpf/palisade-test-none")).unwrap();
}

#[test]
fn support_of_kernel_and_interface_is_reported() {
    let world = World::new();
    let support = palisade_datapath::support(&world.options.pin_dir);
    assert!(support.bpffs);
    assert!(!palisade_datapath::support(Path::new("/tmp")).bpffs);
    assert!(!support.kernel.is_empty());
    let attached = world
        .open()
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    assert_eq!(support.tcx, Some(attached.egress == Some(HookKind::Tcx)));
    // A veth has native XDP, the loopback only generic XDP. Kernels before 6.3 do not report it.
    assert_ne!(
        palisade_datapath::xdp_support(world.ifindex()),
        XdpSupport::Generic
    );
    assert_ne!(palisade_datapath::xdp_support(1), XdpSupport::Native);
}

#[test]
fn a_driver_without_xdp_is_reported_and_tc_is_used_in_auto_mode() {
    let world = World::new();
    let datapath = world.open();
    // The loopback, index 1 in every namespace, has only generic XDP.
    let auto = Attachment {
        ifindex: 1,
        ..world.attachment(Role::Host, Hook::Auto, TcMode::Auto)
    };
    let attached = datapath.attach(&auto).unwrap();
    assert_eq!(attached.ingress, Some(HookKind::Tcx));
    assert!(attached.note.unwrap().contains("native XDP"));
    let insisted = Attachment {
        ingress: Hook::Xdp,
        ..auto
    };
    let error = datapath.attach(&insisted).unwrap_err();
    assert!(matches!(error, AttachError::NativeRefused { .. }), "{error}");
    assert!(error.to_string().contains("xdp_mode = \"skb\""), "{error}");
    assert_eq!(
        datapath.attachments().unwrap()[0].ingress,
        Some(HookKind::Tcx),
        "what was there stays"
    );
    let either = Attachment {
        xdp_mode: XdpMode::NativeOrGeneric,
        ..insisted
    };
    assert_eq!(
        datapath.attach(&either).unwrap().ingress,
        Some(HookKind::XdpGeneric)
    );
}

#[test]
fn an_interface_has_programs_at_both_hooks_or_none() {
    let world = World::new();
    let datapath = world.open_with(Role::Host, Decision::Deny);
    let hooks = [
        (Hook::Xdp, XdpMode::Native),
        (Hook::Xdp, XdpMode::Generic),
        (Hook::Tc, XdpMode::Native),
    ];
    // An ingress qdisc excludes the clsact qdisc of the egress hook.
    world
        .node
        .run("tc", &["qdisc", "add", "dev", "v0", "ingress"])
        .unwrap();
    for (ingress, xdp_mode) in hooks {
        let wanted = Attachment {
            xdp_mode,
            ..world.attachment(Role::Host, ingress, TcMode::Clsact)
        };
        let error = datapath.attach(&wanted).unwrap_err();
        assert!(matches!(error, AttachError::IngressQdisc { .. }), "{error}");
        assert!(datapath.attachments().unwrap().is_empty());
        assert!(datapath.interfaces().unwrap().is_empty());
        let link = world
            .node
            .run("ip", &["-d", "link", "show", "dev", "v0"])
            .unwrap();
        assert!(!link.contains("prog/xdp"), "{link}");
        // No program is attached, so no packet is dropped.
        assert_eq!(world.lost(5), 0);
    }
    // The attached programs still enforce both directions.
    let wanted = world.attachment(Role::Host, Hook::Auto, TcMode::Auto);
    let attached = datapath.attach(&wanted).unwrap();
    assert_eq!(world.lost(5), 5);
    for (ingress, xdp_mode) in hooks {
        let other = Attachment {
            xdp_mode,
            ..world.attachment(Role::Host, ingress, TcMode::Clsact)
        };
        assert!(datapath.attach(&other).is_err());
        let now = datapath.attachments().unwrap();
        assert!(now[0].ingress.is_some(), "{now:?}");
        assert_eq!(now[0].egress, attached.egress);
        assert_eq!(world.lost(5), 5);
    }
    let again = datapath.attach(&wanted).unwrap();
    assert_eq!((again.ingress, again.egress), (attached.ingress, attached.egress));
}
