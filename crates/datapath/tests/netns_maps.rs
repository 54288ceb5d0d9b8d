//! Maps across restarts, size changes and plans; conntrack.

mod common;

use std::{thread, time::Duration};

use common::*;
use palisade_abi::{
    Addr, CtEntry, CtKey, Decision, EndpointState, IpcacheEntry, LearnedKey, PolicyEntry, PolicyKey,
    PrefixKey, class_slot, protocol,
};
use palisade_datapath::{Datapath, Fate, Hook, Limits, OpenError, Options, Role, TcMode, monotonic_coarse};
use palisade_model::op::Op;

fn entry(rule: u32) -> PolicyEntry {
    PolicyEntry {
        decision: Decision::Allow as u8,
        flags: 0,
        inspector: 0,
        match_kind: 0,
        rule,
        ruleset: 0,
    }
}

fn key(policy: u32, identity: u32) -> PolicyKey {
    PolicyKey {
        policy,
        identity,
        class: 0,
        direction: 0,
        zero: 0,
    }
}

fn ct_key(n: u16) -> CtKey {
    CtKey {
        local: Addr::from_v4(NODE_ADDR),
        remote: Addr::from_v4(PEER_ADDR),
        local_port: n,
        remote_port: 1,
        endpoint: HOST_ENDPOINT,
        protocol: protocol::TCP,
        zero: 0,
    }
}

#[test]
fn a_dump_after_a_plan_equals_the_plan() {
    let world = World::new();
    let datapath = world.open();
    assert!(datapath.is_fresh());
    let address = |n: u8| Addr::from_v4([10, 1, 0, n]);
    let prefix = |n: u8| PrefixKey {
        length: 96 + 24,
        addr: Addr::from_v4([10, n, 0, 0]),
    };
    let info = |identity| IpcacheEntry {
        identity,
        endpoint: 3,
        flags: 0,
    };
    let learned = |n: u8| LearnedKey {
        addr: address(n),
        endpoint: 3,
    };
    let state = EndpointState {
        policy: 4,
        revision: 9,
        identity: 300,
        flags: 0,
    };
    let plan = [
        Op::PolicyPut((1..=100).map(|i| (key(4, i), entry(i))).collect()),
        Op::ClassPut(vec![
            (class_slot(protocol::TCP, 80), 7),
            (class_slot(protocol::UDP, 53), 8),
        ]),
        Op::AddressPut(address(1), info(256)),
        Op::AddressPut(address(2), info(257)),
        // The last operation on a key counts.
        Op::AddressPut(address(1), info(258)),
        Op::PrefixPut(prefix(1), info(1 << 24)),
        Op::PrefixPut(prefix(2), info(2 << 24)),
        Op::LearnedPut(learned(1), 1 << 24),
        Op::LearnedPut(learned(2), 3 << 24),
        Op::LearnedPut(learned(1), 2 << 24),
        Op::EndpointPut(3, state),
        Op::PolicyDelete(vec![key(4, 50), key(4, 1000)]),
        Op::AddressDelete(address(2)),
        Op::PrefixDelete(prefix(2)),
        Op::LearnedDelete(learned(2)),
    ];
    datapath.apply(&plan).unwrap();
    drop(datapath);

    let datapath = world.open();
    assert!(!datapath.is_fresh());
    assert_eq!(datapath.learned().unwrap(), [(learned(1), 2 << 24)]);
    let dump = datapath.dump().unwrap();
    assert_eq!(dump.policy.len(), 99);
    assert!(
        dump.policy
            .iter()
            .all(|(k, e)| k.identity == e.rule && k.identity != 50)
    );
    assert_eq!(dump.addresses, [(address(1), info(258))]);
    assert_eq!(dump.prefixes, [(prefix(1), info(1 << 24))]);
    assert_eq!(dump.endpoints.into_iter().collect::<Vec<_>>(), [(3, state)]);
    assert_eq!(dump.classes.iter().filter(|&&c| c != 0).count(), 2);
    assert_eq!(dump.classes[class_slot(protocol::UDP, 53) as usize], 8);
}

#[test]
fn a_failed_step_is_named_and_earlier_steps_are_done() {
    let world = World::new();
    let datapath = world.open();
    let plan = [
        Op::EndpointPut(
            3,
            EndpointState {
                policy: 1,
                revision: 1,
                identity: 1,
                flags: 0,
            },
        ),
        Op::PolicyPut((0..2000).map(|i| (key(1, i), entry(1))).collect()),
        Op::EndpointPut(3, EndpointState::default()),
    ];
    let error = datapath.apply(&plan).unwrap_err();
    assert_eq!(error.step(), 1);
    let text = error.to_string();
    assert_eq!(
        text,
        "step 1 of 3 (write policy entries): policy map full: 1024 of 1024 entries"
    );
    assert_eq!(error.too_small(), Some("policy"));
    assert_eq!(datapath.endpoint_states().len(), 1);
    let error = datapath.apply(&[Op::ClassPut(vec![(u32::MAX, 1)])]).unwrap_err();
    assert!(error.to_string().contains("no class slot"), "{error}");
}

#[test]
fn stores_to_mapped_memory_are_visible_to_the_kernel() {
    let world = World::new();
    let datapath = world.open();
    let state = EndpointState {
        policy: 11,
        revision: 22,
        identity: 33,
        flags: 0,
    };
    datapath
        .apply(&[Op::EndpointPut(65_535, state), Op::ClassPut(vec![(0, 5)])])
        .unwrap();
    // A second instance has its own memory mappings.
    let other = world.open();
    assert_eq!(
        other.endpoint_states().into_iter().collect::<Vec<_>>(),
        [(65_535, state)]
    );
    assert_eq!(other.dump().unwrap().classes[0], 5);
}

#[test]
fn resized_maps_keep_their_entries() {
    let mut world = World::new();
    let datapath = world.open();
    datapath
        .apply(&[Op::PolicyPut((0..1000).map(|i| (key(1, i), entry(i))).collect())])
        .unwrap();
    datapath.set_config(&config()).unwrap();
    let alive = CtEntry {
        expires: u64::MAX,
        created: 7,
        ..CtEntry::default()
    };
    datapath.conntrack().seed(&[(ct_key(1), alive)]).unwrap();
    let before = datapath.conntrack();

    world.options.limits = Limits {
        policy_entries: 999,
        ..world.options.limits
    };
    let error = Datapath::open(&world.options).unwrap_err();
    assert!(
        matches!(
            error,
            OpenError::TooSmall {
                limit: 999,
                present: 1000,
                ..
            }
        ),
        "{error}"
    );

    let limits = Limits {
        policy_entries: 5000,
        conntrack_entries: 8192,
        rules: 2048,
        ..world.options.limits
    };
    world.options.limits = Limits {
        event_ring_bytes: 1 << 17,
        ..limits
    };
    let resized = world.open();
    let mut names = resized.resized().to_vec();
    names.sort();
    assert_eq!(names, ["CONNTRACK", "EVENTS", "POLICY", "RULES"]);
    assert_eq!(resized.policy_entries().unwrap().len(), 1000);
    assert_eq!(resized.config().unwrap(), Some(config()));
    assert_eq!(resized.conntrack().entries().unwrap(), [(ct_key(1), alive)]);
    assert_eq!(resized.conntrack().counts().unwrap().max_entries, 8192);

    // Attached programs of before still write to the old map; attaching the new programs copies their entries.
    before.seed(&[(ct_key(2), alive)]).unwrap();
    assert_eq!(resized.conntrack().entries().unwrap().len(), 1);
    resized
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    assert_eq!(resized.conntrack().entries().unwrap().len(), 2);

    // The next instance finds the maps with the right sizes.
    drop(resized);
    assert!(world.open().resized().is_empty());
}

#[test]
fn a_first_start_that_did_not_finish_leaves_no_maps_for_the_next() {
    let world = World::new();
    let unfinished = Datapath::open(&world.options).unwrap();
    unfinished.set_config(&config()).unwrap();
    drop(unfinished);
    let next = Datapath::open(&world.options).unwrap();
    assert!(next.is_fresh());
    assert_ne!(next.config().unwrap(), Some(config()));
    // The first attachment makes the maps permanent.
    next.attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    drop(next);
    assert!(!Datapath::open(&world.options).unwrap().is_fresh());
    // Removal also works while maps are staged.
    palisade_datapath::detach_all(&world.options.pin_dir).unwrap();
    drop(Datapath::open(&world.options).unwrap());
    palisade_datapath::detach_all(&world.options.pin_dir).unwrap();
    assert!(!world.options.pin_dir.exists());
}

/// Makes the maps of an open data path those of the version before: its pins are renamed, as a process of that version
/// would have left them.
fn make_earlier(world: &World) {
    let dir = |version: u32| world.options.pin_dir.join(format!("v{version}"));
    let own = palisade_abi::VERSION;
    std::fs::rename(dir(own), dir(own - 1)).unwrap();
}

fn flow(created: u64) -> CtEntry {
    CtEntry {
        expires: u64::MAX,
        created,
        ..CtEntry::default()
    }
}

#[test]
fn a_flow_that_ends_during_an_upgrade_does_not_come_back_after_a_crash() {
    let world = World::new();
    let old = world.open();
    let now = monotonic_coarse();
    // Copied flows are recognised with a slack of 1 s.
    let before = now.saturating_sub(10_000_000_000);
    let flows = [1, 2].map(|port| (ct_key(port), flow(before)));
    old.conntrack().seed(&flows).unwrap();
    make_earlier(&world);
    let first = Datapath::open(&world.options).unwrap();
    assert_eq!(first.take_over_flows().unwrap(), Some(2));
    first.commit().unwrap();
    first.conntrack().remove(&ct_key(1)).unwrap();
    drop(first);

    // The process has crashed; interfaces with programs of the earlier version have opened a flow meanwhile.
    let later = flow(monotonic_coarse());
    old.conntrack().seed(&[(ct_key(3), later)]).unwrap();
    let second = Datapath::open(&world.options).unwrap();
    assert_eq!(second.take_over_flows().unwrap(), Some(1));
    let mut ports: Vec<u16> = second
        .conntrack()
        .entries()
        .unwrap()
        .iter()
        .map(|(key, _)| key.local_port)
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [2, 3]);

    // Nothing of the upgrade is left beside the maps.
    second
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    second.retire_other_versions().unwrap();
    let own = world.options.pin_dir.join(format!("v{}", palisade_abi::VERSION));
    let names = std::fs::read_dir(own).unwrap();
    let left: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn a_resized_table_in_the_middle_of_an_upgrade_loses_no_flow_of_either_kind_of_programs() {
    let mut world = World::new();
    let old = world.open();
    make_earlier(&world);
    let half = Datapath::open(&world.options).unwrap();
    half.take_over_flows().unwrap();
    half.commit().unwrap();
    // A crash, and another size in the configuration.
    world.options.limits.conntrack_entries *= 2;
    let resized = Datapath::open(&world.options).unwrap();
    assert_eq!(resized.resized(), ["CONNTRACK"]);
    resized.take_over_flows().unwrap();
    // Interfaces with programs of the earlier version, and interfaces with those of this one.
    let now = monotonic_coarse();
    old.conntrack().seed(&[(ct_key(1), flow(now))]).unwrap();
    half.conntrack().seed(&[(ct_key(2), flow(now))]).unwrap();
    resized
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    resized.retire_other_versions().unwrap();
    assert_eq!(resized.conntrack().entries().unwrap().len(), 2);
}

#[test]
fn a_flow_that_only_old_programs_refresh_is_not_swept() {
    // Longer than opening the maps takes on a busy machine.
    const LIFETIME: Duration = Duration::from_secs(3);
    let world = World::new();
    let old = world.open();
    let now = monotonic_coarse();
    let flow = |expires| CtEntry {
        expires,
        created: now,
        ..CtEntry::default()
    };
    let copied = flow(now + LIFETIME.as_nanos() as u64);
    old.conntrack()
        .seed(&[(ct_key(1), copied), (ct_key(2), copied)])
        .unwrap();
    make_earlier(&world);
    let new = Datapath::open(&world.options).unwrap();
    assert_eq!(new.take_over_flows().unwrap(), Some(2));
    // `seed` leaves entries that exist.
    old.conntrack().remove(&ct_key(1)).unwrap();
    old.conntrack().seed(&[(ct_key(1), flow(u64::MAX))]).unwrap();
    while monotonic_coarse() <= copied.expires {
        thread::sleep(LIFETIME / 20);
    }
    new.take_over_flows().unwrap();
    let swept = new
        .conntrack()
        .remove_if(|_, entry| entry.expires <= monotonic_coarse(), |_, _, _| {})
        .unwrap();
    assert_eq!((swept.removed, swept.present), (1, 1));
    assert_eq!(new.conntrack().entries().unwrap(), [(ct_key(1), flow(u64::MAX))]);
}

#[test]
fn everything_is_detached_although_a_later_version_has_left_maps_that_it_was_filling() {
    let world = World::new();
    let datapath = world.open();
    let later = palisade_abi::VERSION + 1;
    let left = world.options.pin_dir.join(format!("v{later}_new"));
    let own = world.options.pin_dir.join(format!("v{}", palisade_abi::VERSION));
    std::fs::create_dir(&left).unwrap();
    std::fs::rename(own.join("FRAGMENTS"), left.join("FRAGMENTS")).unwrap();
    drop(datapath);
    palisade_datapath::detach_all(&world.options.pin_dir).unwrap();
    assert!(!world.options.pin_dir.exists());
}

#[test]
fn a_map_of_another_layout_is_refused_with_a_remedy() {
    let world = World::new();
    drop(world.open());
    let maps = world.options.pin_dir.join(format!("v{}", palisade_abi::VERSION));
    std::fs::remove_file(maps.join("POLICY")).unwrap();
    std::fs::rename(maps.join("IPCACHE"), maps.join("POLICY")).unwrap();
    let error = Datapath::open(&world.options).unwrap_err();
    assert!(matches!(error, OpenError::Layout { .. }), "{error}");
    assert!(error.to_string().contains("palisade stop --detach"), "{error}");
}

#[test]
fn a_pin_dir_outside_a_bpffs_is_refused() {
    let options = Options {
        pin_dir: "/tmp/palisade-none".into(),
        ..Options::default()
    };
    assert!(matches!(
        Datapath::open(&options),
        Err(OpenError::NotBpffs { .. })
    ));
}

#[test]
fn a_sweep_removes_expired_flows_and_counts_them() {
    let world = World::new();
    let datapath = world.open();
    let now = monotonic_coarse();
    let flow = |n, expires| {
        (
            ct_key(n),
            CtEntry {
                expires,
                ..CtEntry::default()
            },
        )
    };
    let flows: Vec<_> = (0..300)
        .map(|n| flow(n, if n % 3 == 0 { now } else { now + 1_000_000_000 }))
        .collect();
    let conntrack = datapath.conntrack();
    assert_eq!(conntrack.seed(&flows).unwrap(), 300);
    assert_eq!(conntrack.seed(&flows[..10]).unwrap(), 0);
    let mut fates = [Vec::new(), Vec::new()];
    let sweep = conntrack
        .remove_if(
            |_, entry| entry.expires <= now,
            |fate, key, _| fates[usize::from(fate == Fate::Stays)].push(key.local_port),
        )
        .unwrap();
    assert_eq!((sweep.removed, sweep.present), (100, 200));
    assert_eq!(fates.each_ref().map(Vec::len), [100, 200]);
    assert!(fates[0].iter().all(|port| port % 3 == 0));
    let counts = conntrack.counts().unwrap();
    assert_eq!(
        (counts.seeded, counts.swept, counts.present, counts.evicted),
        (300, 100, 200, 0)
    );
    let gone = conntrack
        .remove_if(|key, _| key.endpoint == HOST_ENDPOINT, |_, _, _| {})
        .unwrap();
    assert_eq!(gone.removed, 200);
    // The counters survive the process.
    drop(datapath);
    let counts = world.open().conntrack().counts().unwrap();
    assert_eq!((counts.seeded, counts.swept, counts.present), (300, 300, 0));
}

#[test]
fn a_full_conntrack_map_counts_evictions() {
    let world = World::new();
    let datapath = world.open();
    let alive = CtEntry {
        expires: u64::MAX,
        ..CtEntry::default()
    };
    let flows: Vec<_> = (0..6000).map(|n| (ct_key(n), alive)).collect();
    datapath.conntrack().seed(&flows).unwrap();
    let counts = datapath.conntrack().counts().unwrap();
    assert_eq!(counts.seeded, 6000);
    assert!(counts.present <= counts.max_entries, "{counts:?}");
    assert!(counts.evicted >= 6000 - counts.max_entries, "{counts:?}");
}

#[test]
fn flows_of_an_address_end_when_the_address_moves_to_another_endpoint() {
    let world = World::new();
    let datapath = world.open();
    let info = |endpoint| IpcacheEntry {
        identity: 1000,
        endpoint,
        flags: 0,
    };
    let [moves, stays, goes] = [[10, 1, 0, 1], [10, 1, 0, 2], [10, 1, 0, 3]].map(Addr::from_v4);
    let six = Addr([0xfd, 0, 0, 1]);
    let addresses = [moves, stays, goes, six];
    let put = |addr, endpoint| Op::AddressPut(addr, info(endpoint));
    datapath.apply(&addresses.map(|addr| put(addr, 3))).unwrap();
    let alive = CtEntry {
        expires: u64::MAX,
        ..CtEntry::default()
    };
    let flow = |local, endpoint| CtKey {
        local,
        endpoint,
        ..ct_key(1)
    };
    let flows: Vec<_> = addresses
        .iter()
        .flat_map(|&addr| [3, 4].map(|endpoint| (flow(addr, endpoint), alive)))
        .collect();
    datapath.conntrack().seed(&flows).unwrap();
    // An unchanged address ends no flow.
    datapath.apply(&[put(stays, 3)]).unwrap();
    assert_eq!(datapath.conntrack().entries().unwrap().len(), 8);
    datapath
        .apply(&[put(moves, 4), put(stays, 3), Op::AddressDelete(goes), put(six, 4)])
        .unwrap();
    let left: Vec<_> = datapath
        .conntrack()
        .entries()
        .unwrap()
        .into_iter()
        .map(|(key, _)| (key.local, key.endpoint))
        .collect();
    for gone in [(moves, 3), (goes, 3), (six, 3)] {
        assert!(!left.contains(&gone), "{gone:?}");
    }
    assert_eq!(left.len(), 5);
    assert_eq!(datapath.conntrack().counts().unwrap().swept, 3);
}

#[test]
fn every_endpoint_with_a_policy_has_a_share() {
    let world = World::new();
    let datapath = world.open();
    let put = |endpoint, policy| {
        let state = EndpointState {
            policy,
            ..EndpointState::default()
        };
        Op::EndpointPut(endpoint, state)
    };
    let alive = CtEntry {
        expires: u64::MAX,
        ..CtEntry::default()
    };
    let seeded = |n, endpoint| {
        let key = CtKey {
            endpoint,
            ..ct_key(n)
        };
        datapath.conntrack().seed(&[(key, alive)]).unwrap();
        datapath.conntrack().get(&key).unwrap().unwrap().protected
    };
    assert_eq!(seeded(1, 3), 0);
    datapath.apply(&[put(3, 1), put(4, 1)]).unwrap();
    assert_eq!((seeded(2, 3), seeded(3, 4), seeded(4, 5)), (1, 1, 0));
    datapath.apply(&[put(5, 1), put(3, 0)]).unwrap();
    assert_eq!((seeded(5, 4), seeded(6, 5)), (1, 1));
    let counts = datapath.conntrack().counts().unwrap();
    assert_eq!((counts.protected, counts.present), (4, 6));
    // Removed flows release their share.
    datapath
        .conntrack()
        .remove_if(|key, _| key.endpoint == 4, |_, _, _| {})
        .unwrap();
    assert!(datapath.conntrack().exhausted().is_empty());
    assert_eq!(datapath.conntrack().counts().unwrap().protected, 2);
}

/// The daemon uses the value in several threads.
#[test]
fn the_datapath_is_send_and_sync() {
    fn shared<T: Send + Sync>() {}
    fn moved<T: Send>() {}
    shared::<Datapath>();
    moved::<palisade_datapath::EventReader>();
}

#[test]
fn maps_of_other_versions_are_removed_on_request() {
    let world = World::new();
    let datapath = world.open();
    let own = world.options.pin_dir.join(format!("v{}", palisade_abi::VERSION));
    let other = world.options.pin_dir.join("v0");
    std::fs::create_dir(&other).unwrap();
    std::fs::rename(own.join("FRAGMENTS"), other.join("FRAGMENTS")).unwrap();
    datapath
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    datapath.retire_other_versions().unwrap();
    assert!(!other.exists());
    assert!(own.join("POLICY").exists());
    assert_eq!(datapath.attachments().unwrap().len(), 1);
}

/// Time, CPU time and growth of the peak memory of a walk through a full table. `cargo test --release ... -- --ignored
/// --nocapture` prints them.
#[test]
#[ignore = "a measure: takes a minute and 200 MB of kernel memory"]
fn a_walk_through_a_million_flows() {
    const FLOWS: u32 = 1_000_000;
    let mut world = World::new();
    world.options.limits.conntrack_entries = 1_200_000;
    let datapath = world.open();
    let conntrack = datapath.conntrack();
    let now = monotonic_coarse();
    for part in 0..FLOWS / 50_000 {
        let flow = |n: u32| {
            let key = CtKey {
                remote: Addr::from_v4(n.to_be_bytes()),
                ..ct_key(1)
            };
            let expires = if n.is_multiple_of(4) { now } else { u64::MAX };
            (
                key,
                CtEntry {
                    expires,
                    ..CtEntry::default()
                },
            )
        };
        let flows: Vec<_> = (part * 50_000..(part + 1) * 50_000).map(flow).collect();
        conntrack.seed(&flows).unwrap();
    }
    let present = conntrack.counts().unwrap().present;
    let mut all = 0;
    measure("read in batches", || {
        conntrack.for_each(|_, _| all += 1).unwrap();
    });
    measure("read at once", || {
        assert_eq!(conntrack.entries().unwrap().len(), all)
    });
    let mut removed = 0;
    measure("remove the expired quarter", || {
        let walk = conntrack.remove_if(|_, entry| entry.expires <= now, |_, _, _| {});
        removed = walk.unwrap().removed;
    });
    println!("{present} entries, {removed} removed");
    assert!(
        all as u64 == present && removed > 200_000,
        "{present} {all} {removed}"
    );
}

fn measure(what: &str, work: impl FnOnce()) {
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let cpu = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse().unwrap())
            .collect();
        fields.iter().sum::<u64>() * 10
    };
    // The kernel sets the peak to the present memory.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (begun, memory, used) = (std::time::Instant::now(), peak(), cpu());
    work();
    println!(
        "{what}: {:?}, {} ms of CPU, peak memory + {} KiB",
        begun.elapsed(),
        cpu() - used,
        peak() - memory
    );
}
