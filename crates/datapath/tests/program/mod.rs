//! A node without interfaces: the programs and their maps, filled by the test, run by BPF_PROG_TEST_RUN in a network
//! namespace of the test's thread.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(unsafe_code, reason = "system calls")]

#[path = "../../../packet/tests/packets/mod.rs"]
pub mod packets;
pub mod sys;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd};

use aya::maps::{Map, RingBuf};
use aya::programs::{Program, ProgramError, SchedClassifier, SkLookup, Xdp};
use aya::{Ebpf, EbpfLoader};
use palisade_abi::{
    Addr, CLASS_SLOTS, CaptureHeader, CaptureSettings, Config, Counter, CtEntry, CtKey, Decision, Direction,
    EndpointState, Event, EventKind, INSIDE, Interface, IpcacheEntry, MatchKind, PolicyEntry, PolicyKey,
    PrefixKey, Reason, Share, budget_slot, endpoint_flags, identity, maps, programs, role,
};
use palisade_datapath::Sizes;
use palisade_model::snapshot::Snapshot;
use zerocopy::{FromBytes, IntoBytes};

/// BPF_PROG_TEST_RUN uses the loopback device for every packet.
pub const IFINDEX: u32 = 1;

/// Interface of a workload, for packets that entered the node by another interface than [`IFINDEX`].
pub const GUARDED: u32 = 7;

/// Endpoint of the node.
pub const HOST: u16 = 1;
/// Endpoint of a workload.
pub const A: u16 = 2;
/// Endpoint of another workload.
pub const B: u16 = 3;

pub const HOST_V4: &str = "10.0.0.1";
pub const HOST_V6: &str = "fd00::1";
pub const A_V4: &str = "10.0.1.10";
pub const A_V6: &str = "fd00:1::10";
pub const B_V4: &str = "10.0.1.20";
pub const B_V6: &str = "fd00:1::20";
/// Addresses outside without an identity.
pub const WORLD_V4: &str = "192.0.2.7";
pub const WORLD_V6: &str = "2001:db8::7";
/// Addresses outside in a prefix with an identity.
pub const PREFIX_V4: &str = "198.51.100.9";
pub const PREFIX_V6: &str = "2001:db8:1::9";

pub const A_IDENTITY: u32 = 1000;
pub const B_IDENTITY: u32 = 2000;
pub const PREFIX_IDENTITY: u32 = identity::FIRST_LOCAL;

/// Program to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    Xdp,
    TcIn,
    TcOut,
}

impl Hook {
    fn program(self) -> &'static str {
        match self {
            Hook::Xdp => programs::XDP_INGRESS,
            Hook::TcIn => programs::TC_INGRESS,
            Hook::TcOut => programs::TC_EGRESS,
        }
    }
}

/// Both hooks for packets that enter.
pub const ENTRIES: [Hook; 2] = [Hook::Xdp, Hook::TcIn];

/// Result of a run.
#[derive(Debug)]
pub struct Outcome {
    pub passed: bool,
    /// Whether the packet was punted.
    pub carried: bool,
    /// Resulting packet.
    pub frame: Vec<u8>,
    pub reason: Reason,
    pub direction: Direction,
    pub events: Vec<Event>,
}

impl Outcome {
    pub fn event(&self, kind: EventKind) -> Option<&Event> {
        self.events.iter().find(|event| event.kind == kind as u8)
    }
}

/// Result of [`World::run_marked`].
#[derive(Debug)]
pub struct Marked {
    pub retval: u32,
    pub frame: Vec<u8>,
    pub mark: u32,
    /// Reason whose counter has increased.
    pub reason: Option<Reason>,
}

/// Returns an entry of the interface table.
pub fn interface(ifindex: u32, role: u8, endpoint: u16) -> Interface {
    Interface {
        ifindex,
        endpoint,
        role,
        link: ifindex,
        ..Interface::default()
    }
}

/// Returns an entry of the policy table.
pub fn entry(decision: Decision, rule: u32) -> PolicyEntry {
    PolicyEntry {
        decision: decision as u8,
        flags: 0,
        inspector: 0,
        match_kind: MatchKind::L3L4 as u8,
        rule,
        ruleset: 0,
    }
}

pub struct World {
    ebpf: Ebpf,
    events: RingBuf<aya::maps::MapData>,
    captured: Option<RingBuf<aya::maps::MapData>>,
    counters: Vec<(u32, u64)>,
    /// Contents of POLICY and ENDPOINTS.
    rules: RefCell<HashMap<PolicyKey, PolicyEntry>>,
    states: RefCell<HashMap<u16, EndpointState>>,
}

impl World {
    /// Returns a node with endpoints, identities, and port classes for port 80 (class 5) and ICMP echo requests (class
    /// 6); rule 1 denies everything. The program is at an interface of role `role` and endpoint `endpoint`.
    pub fn new(role: u8, endpoint: u16) -> Self {
        Self::with_conntrack(role, endpoint, 1024)
    }

    pub fn with_conntrack(role: u8, endpoint: u16, conntrack: u32) -> Self {
        Self::of(palisade_datapath::OBJECT, role, endpoint, conntrack)
    }

    pub fn of(object: &[u8], role: u8, endpoint: u16, conntrack: u32) -> Self {
        own_network();
        let fragments = 1024;
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(maps::CONNTRACK, conntrack)
            .map_max_entries(maps::FLOW_SLOTS, conntrack / 2)
            .map_max_entries(maps::FRAGMENTS, fragments)
            .map_max_entries(maps::FRAGMENT_SLOTS, fragments / 2)
            .map_max_entries(maps::POLICY, 4096)
            .map_max_entries(maps::IPCACHE, 4096)
            .map_max_entries(maps::PREFIXES, 4096)
            .map_max_entries(maps::RULES, 64)
            .map_max_entries(maps::CAPTURE_BUFFERS, sys::possible_cpus() as u32)
            .load(object)
            .unwrap();
        for (_, program) in ebpf.programs_mut() {
            let mut load = || match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                Program::SkLookup(program) => program.load(),
                _ => panic!("a program of another type"),
            };
            // The verifier returns EAGAIN when a signal arrives, here SIGCHLD.
            let is_interrupted = |error: &ProgramError| matches!(error, ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EAGAIN));
            let mut loaded = load();
            while loaded.as_ref().is_err_and(is_interrupted) {
                loaded = load();
            }
            loaded.unwrap();
        }
        let events = RingBuf::try_from(ebpf.take_map(maps::EVENTS).unwrap()).unwrap();
        let world = Self {
            ebpf,
            events,
            captured: None,
            counters: Vec::new(),
            rules: RefCell::default(),
            states: RefCell::default(),
        };
        world.config(|_| ());
        world.interface(role, endpoint, 0);
        for (addr, endpoint, identity) in [
            (HOST_V4, HOST, identity::HOST),
            (HOST_V6, HOST, identity::HOST),
            (A_V4, A, A_IDENTITY),
            (A_V6, A, A_IDENTITY),
            (B_V4, B, B_IDENTITY),
            (B_V6, B, B_IDENTITY),
        ] {
            let value = IpcacheEntry {
                identity,
                endpoint,
                flags: 0,
            };
            sys::update(
                world.map(maps::IPCACHE),
                addr_of(addr).as_bytes(),
                value.as_bytes(),
            )
            .unwrap();
        }
        for (prefix, length) in [("198.51.100.0", 96 + 24), ("2001:db8:1::", 48)] {
            let key = PrefixKey {
                length,
                addr: addr_of(prefix),
            };
            let value = IpcacheEntry {
                identity: PREFIX_IDENTITY,
                endpoint: 0,
                flags: 0,
            };
            sys::update(world.map(maps::PREFIXES), key.as_bytes(), value.as_bytes()).unwrap();
        }
        world.classes(&[
            (palisade_abi::class_slot(6, 80), 5),
            (palisade_abi::class_slot(17, 80), 5),
            (palisade_abi::class_slot(132, 80), 5),
            (palisade_abi::class_slot(1, 8), 6),
            (palisade_abi::class_slot(58, 128), 6),
        ]);
        let sizes = Sizes {
            flows: conntrack,
            flow_table: conntrack / 2,
            fragment_table: fragments / 2,
            cpus: sys::possible_cpus() as u32,
        };
        for (slot, share) in palisade_datapath::shares(&[HOST, A, B].into(), sizes) {
            sys::update(world.map(maps::SHARES), slot.as_bytes(), share.as_bytes()).unwrap();
        }
        for (endpoint, identity) in [(HOST, identity::HOST), (A, A_IDENTITY), (B, B_IDENTITY)] {
            world.state(endpoint, u32::from(endpoint), 1, identity);
            for direction in [Direction::Ingress, Direction::Egress] {
                world.rule(endpoint, direction, identity::ANY, 0, entry(Decision::Deny, 1));
            }
        }
        world
    }

    fn map(&self, name: &str) -> BorrowedFd<'_> {
        match self.ebpf.map(name).unwrap() {
            Map::Array(map)
            | Map::HashMap(map)
            | Map::LruHashMap(map)
            | Map::PerCpuArray(map)
            | Map::LpmTrie(map) => map.fd().as_fd(),
            _ => panic!("{name} is of another type"),
        }
    }

    /// Changes the configuration.
    pub fn config(&self, change: impl FnOnce(&mut Config)) {
        let mut config = Config {
            tcp_opening: 60_000_000_000,
            tcp_established: 3_600_000_000_000,
            tcp_closing: 10_000_000_000,
            udp: 60_000_000_000,
            other: 30_000_000_000,
            fragment: 5_000_000_000,
            trace_interval: 0,
            events_per_second: 1000,
            host_endpoint: u32::from(HOST),
            world_ipv4: identity::WORLD_IPV4,
            world_ipv6: identity::WORLD_IPV6,
            rules: 64,
            ..Config::default()
        };
        change(&mut config);
        sys::update(self.map(maps::CONFIG), 0u32.as_bytes(), config.as_bytes()).unwrap();
    }

    /// Writes the interface by which the packets of these tests enter.
    pub fn interface(&self, role: u8, endpoint: u16, flags: u8) {
        self.set_interface(&Interface {
            ifindex: IFINDEX,
            endpoint,
            role,
            flags,
            link: IFINDEX,
            ..Interface::default()
        });
    }

    /// Writes an interface.
    pub fn set_interface(&self, interface: &Interface) {
        sys::update(
            self.map(maps::INTERFACES),
            interface.ifindex.as_bytes(),
            interface.as_bytes(),
        )
        .unwrap();
    }

    /// Writes the ipcache entry of an address.
    pub fn set_address(&self, addr: &str, endpoint: u16, identity: u32) {
        let value = IpcacheEntry {
            identity,
            endpoint,
            flags: 0,
        };
        sys::update(
            self.map(maps::IPCACHE),
            addr_of(addr).as_bytes(),
            value.as_bytes(),
        )
        .unwrap();
    }

    /// Runs a packet that entered the node by `origin` at the egress of the interface.
    pub fn run_entered(&mut self, frame: &[u8], origin: u32) -> Outcome {
        self.run_from(Hook::TcOut, frame, origin)
    }

    /// Writes policy and revision of an endpoint. The flags mark the directions without inspection, as the compiler
    /// does.
    pub fn state(&self, endpoint: u16, policy: u32, revision: u32, identity: u32) {
        let state = EndpointState {
            policy,
            revision,
            identity,
            flags: 0,
        };
        self.states.borrow_mut().insert(endpoint, state);
        self.tell(endpoint);
    }

    /// Writes the state of an endpoint.
    fn tell(&self, endpoint: u16) {
        let mut state = self.states.borrow()[&endpoint];
        state.flags = endpoint_flags::PLAIN_INGRESS | endpoint_flags::PLAIN_EGRESS;
        for (key, entry) in self.rules.borrow().iter() {
            let decision = Decision::from_u8(entry.decision);
            if key.policy == state.policy && matches!(decision, Decision::Inspect | Decision::DenyExplicit) {
                state.flags &= !if key.direction == Direction::Ingress as u8 {
                    endpoint_flags::PLAIN_INGRESS
                } else {
                    endpoint_flags::PLAIN_EGRESS
                };
            }
        }
        sys::update(
            self.map(maps::ENDPOINTS),
            u32::from(endpoint).as_bytes(),
            state.as_bytes(),
        )
        .unwrap();
    }

    /// Writes the states of the endpoints that have a policy.
    fn tell_all(&self, policy: u32) {
        let states = self.states.borrow().clone();
        for (endpoint, _) in states.iter().filter(|(_, state)| state.policy == policy) {
            self.tell(*endpoint);
        }
    }

    /// Writes the port classes by slot; every other slot has class 0.
    pub fn classes(&self, slots: &[(u32, u16)]) {
        let mut table = vec![0u16; CLASS_SLOTS];
        for &(slot, class) in slots {
            table[slot as usize] = class;
        }
        sys::update(self.map(maps::CLASSES), 0u32.as_bytes(), table.as_bytes()).unwrap();
    }

    /// Writes a policy entry. In these tests the policy id is the number of the endpoint.
    pub fn rule(&self, policy: u16, direction: Direction, identity: u32, class: u16, entry: PolicyEntry) {
        let key = PolicyKey {
            policy: u32::from(policy),
            identity,
            class,
            direction: direction as u8,
            zero: 0,
        };
        sys::update(self.map(maps::POLICY), key.as_bytes(), entry.as_bytes()).unwrap();
        self.rules.borrow_mut().insert(key, entry);
        self.tell_all(key.policy);
    }

    /// Writes an entry that decides behind a failsafe port, at hooks other than those of a NIC.
    pub fn rule_inside(
        &self,
        policy: u16,
        direction: Direction,
        identity: u32,
        class: u16,
        entry: PolicyEntry,
    ) {
        let key = PolicyKey {
            policy: u32::from(policy),
            identity,
            class,
            direction: direction as u8 | INSIDE,
            zero: 0,
        };
        sys::update(self.map(maps::POLICY), key.as_bytes(), entry.as_bytes()).unwrap();
    }

    pub fn remove_rule(&self, policy: u16, direction: Direction, identity: u32, class: u16) {
        let key = PolicyKey {
            policy: u32::from(policy),
            identity,
            class,
            direction: direction as u8,
            zero: 0,
        };
        sys::delete(self.map(maps::POLICY), key.as_bytes()).unwrap();
        self.rules.borrow_mut().remove(&key);
        self.tell_all(key.policy);
    }

    /// Lets the programs of [`palisade_datapath::CAPTURE_OBJECT`] copy packets.
    pub fn capture(&self, settings: &CaptureSettings) {
        sys::update(self.map(maps::CAPTURE), 0u32.as_bytes(), settings.as_bytes()).unwrap();
    }

    /// Returns the copied packets that were not returned before.
    pub fn take_captured(&mut self) -> Vec<(CaptureHeader, Vec<u8>)> {
        if self.captured.is_none() {
            let map = self.ebpf.take_map(maps::CAPTURED).unwrap();
            self.captured = Some(RingBuf::try_from(map).unwrap());
        }
        let ring = self.captured.as_mut().unwrap();
        let mut records = Vec::new();
        while let Some(record) = ring.next() {
            let (header, bytes) = CaptureHeader::read_from_prefix(&record).unwrap();
            records.push((header, bytes.to_vec()));
        }
        records
    }

    /// Writes compiled policies, with their endpoints and identities, instead of those of [`Self::new`].
    pub fn load(&self, snapshot: &Snapshot) {
        for (addr, entry) in snapshot.addresses.iter() {
            sys::update(self.map(maps::IPCACHE), addr.as_bytes(), entry.as_bytes()).unwrap();
        }
        for (key, entry) in snapshot.prefixes.iter() {
            sys::update(self.map(maps::PREFIXES), key.as_bytes(), entry.as_bytes()).unwrap();
        }
        sys::update(
            self.map(maps::CLASSES),
            0u32.as_bytes(),
            snapshot.classes.as_bytes(),
        )
        .unwrap();
        for (policy, table) in &snapshot.tables {
            for (key, entry) in &table.entries {
                let key = key.with_policy(*policy);
                sys::update(self.map(maps::POLICY), key.as_bytes(), entry.as_bytes()).unwrap();
            }
        }
        for (endpoint, state) in &snapshot.endpoints {
            let number = u32::from(*endpoint);
            sys::update(self.map(maps::ENDPOINTS), number.as_bytes(), state.as_bytes()).unwrap();
        }
    }

    pub fn forget_address(&self, addr: &str) {
        sys::delete(self.map(maps::IPCACHE), addr_of(addr).as_bytes()).unwrap();
    }

    pub fn program(&self, hook: Hook) -> BorrowedFd<'_> {
        self.program_named(hook.program())
    }

    pub fn program_named(&self, name: &str) -> BorrowedFd<'_> {
        match self.ebpf.program(name).unwrap() {
            Program::Xdp(program) => program.fd().unwrap().as_fd(),
            Program::SchedClassifier(program) => program.fd().unwrap().as_fd(),
            Program::SkLookup(program) => program.fd().unwrap().as_fd(),
            _ => panic!("{name} is of another type"),
        }
    }

    /// Returns the verified instructions of every program.
    pub fn verified(&self) -> Vec<(String, u32)> {
        let mut counts: Vec<_> = self
            .ebpf
            .programs()
            .map(|(name, program)| {
                let info = match program {
                    Program::Xdp(program) => Xdp::info(program),
                    Program::SchedClassifier(program) => SchedClassifier::info(program),
                    Program::SkLookup(program) => SkLookup::info(program),
                    _ => panic!("{name} is of another type"),
                };
                (
                    name.to_owned(),
                    info.unwrap().verified_instruction_count().unwrap(),
                )
            })
            .collect();
        counts.sort();
        counts
    }

    /// Runs a packet that was received by the interface.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> Outcome {
        self.run_from(hook, frame, IFINDEX)
    }

    /// Runs a packet that the node itself sent.
    pub fn run_local(&mut self, frame: &[u8]) -> Outcome {
        self.run_from(Hook::TcOut, frame, 0)
    }

    fn run_from(&mut self, hook: Hook, frame: &[u8], origin: u32) -> Outcome {
        // struct __sk_buff: ingress_ifindex is the tenth word.
        let mut skb = [0u32; 48];
        skb[9] = origin;
        let context = if hook == Hook::Xdp {
            &[][..]
        } else {
            skb.as_bytes()
        };
        let (retval, out, counted) = self.run_counted(hook.program(), frame, context);
        let carried = matches!((hook, retval), (Hook::Xdp, 4) | (Hook::TcIn | Hook::TcOut, 7));
        let passed = match (hook, retval) {
            _ if carried => true,
            (Hook::Xdp, 2) | (Hook::TcIn | Hook::TcOut, 0xffff_ffff) => true,
            (Hook::Xdp, 1) | (Hook::TcIn | Hook::TcOut, 2) => false,
            _ => panic!("{hook:?} returned {retval}"),
        };
        let [(slot, 1)] = counted[..] else {
            panic!("one packet counts once: {counted:?}")
        };
        let reason = Reason::from_u8((slot / 2) as u8).unwrap();
        assert_eq!(passed, !reason.is_drop(), "{reason:?}");
        let direction = if slot % 2 == 0 {
            Direction::Ingress
        } else {
            Direction::Egress
        };
        Outcome {
            passed,
            carried,
            frame: out,
            reason,
            direction,
            events: self.take_events(),
        }
    }

    /// Runs a packet from a worker. Returns the return value of the program, the resulting packet and the counted
    /// reasons.
    pub fn run_back(&mut self, frame: &[u8]) -> (u32, Vec<u8>, Vec<(Reason, u64)>) {
        self.run_at_punt_link(programs::REINJECT, frame)
    }

    /// Runs a packet through a tc program of the punt link. Returns the same as [`Self::run_back`].
    pub fn run_at_punt_link(&mut self, program: &str, frame: &[u8]) -> (u32, Vec<u8>, Vec<(Reason, u64)>) {
        let (retval, out, counted) = self.run_counted(program, frame, &[]);
        let counted = counted
            .into_iter()
            .map(|(slot, packets)| (Reason::from_u8((slot / 2) as u8).unwrap(), packets))
            .collect();
        (retval, out, counted)
    }

    /// Runs a program. Returns its return value, the resulting packet and the reasons whose counters increased.
    fn run_counted(
        &mut self,
        program: &str,
        frame: &[u8],
        context: &[u8],
    ) -> (u32, Vec<u8>, Vec<(u32, u64)>) {
        if self.counters.is_empty() {
            self.take_counters();
        }
        let before = std::mem::take(&mut self.counters);
        let (retval, out) = sys::test_packet(self.program_named(program), frame, context).unwrap();
        self.take_counters();
        let counted = self
            .counters
            .iter()
            .zip(&before)
            .filter(|(after, before)| after.1 != before.1)
            .map(|(after, before)| (after.0, after.1 - before.1))
            .collect();
        (retval, out, counted)
    }

    /// Returns whether a packet with a mark passes.
    pub fn passes_marked(&self, hook: Hook, frame: &[u8], mark: u32) -> bool {
        // struct __sk_buff: mark is the third word.
        let mut skb = [0u32; 48];
        skb[2] = mark;
        skb[9] = IFINDEX;
        let (retval, _) = sys::test_packet(self.program(hook), frame, skb.as_bytes()).unwrap();
        retval == 0xffff_ffff
    }

    /// Runs a tc program on a packet with a mark that entered the node by the interface `origin` (0: the node sent the
    /// packet).
    pub fn run_marked(&mut self, program: &str, frame: &[u8], mark: u32, origin: u32) -> Marked {
        if self.counters.is_empty() {
            self.take_counters();
        }
        let before = std::mem::take(&mut self.counters);
        // struct __sk_buff: mark is the third word, ingress_ifindex the tenth.
        let mut skb = [0u32; 48];
        (skb[2], skb[9]) = (mark, origin);
        let mut after = [0u32; 48];
        let program = self.program_named(program);
        let (retval, frame) =
            sys::test_context(program, frame, skb.as_bytes(), after.as_mut_bytes()).unwrap();
        self.take_counters();
        let counted = self.counters.iter().zip(&before);
        let reason = counted
            .filter(|(after, before)| after.1 != before.1)
            .map(|(after, _)| Reason::from_u8((after.0 / 2) as u8).unwrap())
            .next();
        Marked {
            retval,
            frame,
            mark: after[2],
            reason,
        }
    }

    /// Writes a heartbeat of the worker of the first queue.
    pub fn beat(&self, now: u64) {
        sys::update(self.map(maps::WORKERS), 0u32.as_bytes(), now.as_bytes()).unwrap();
    }

    /// Runs many frames without looking at the results.
    pub fn flood(&mut self, hook: Hook, frames: impl IntoIterator<Item = Vec<u8>>) {
        // See `run_from`.
        let mut skb = [0u32; 48];
        skb[9] = IFINDEX;
        let context = if hook == Hook::Xdp {
            &[][..]
        } else {
            skb.as_bytes()
        };
        for frame in frames {
            sys::test_packet(self.program(hook), &frame, context).unwrap();
        }
        self.counters.clear();
    }

    fn take_counters(&mut self) {
        self.counters = Reason::ALL
            .iter()
            .flat_map(|&reason| [reason as u32 * 2, reason as u32 * 2 + 1])
            .map(|slot| (slot, self.counter(maps::COUNTERS, slot).packets))
            .collect();
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(record) = self.events.next() {
            events.push(Event::read_from_bytes(&record).unwrap());
        }
        events
    }

    fn counter(&self, map: &str, slot: u32) -> Counter {
        let size = size_of::<Counter>();
        let values = sys::lookup(self.map(map), slot.as_bytes(), size * sys::possible_cpus()).unwrap();
        values
            .chunks(size)
            .map(|value| Counter::read_from_bytes(value).unwrap())
            .fold(Counter::default(), |sum, value| Counter {
                packets: sum.packets + value.packets,
                bytes: sum.bytes + value.bytes,
            })
    }

    /// Returns packets and bytes of a rule.
    pub fn rule_counter(&self, rule: u32) -> Counter {
        self.counter(maps::RULES, rule)
    }

    /// Returns the number of suppressed events of a kind and reason.
    pub fn suppressed(&self, kind: EventKind, reason: Reason) -> u64 {
        let slot = budget_slot(kind as u32, reason as u8);
        let values = sys::lookup(
            self.map(maps::BUDGETS),
            slot.as_bytes(),
            32 * sys::possible_cpus(),
        )
        .unwrap();
        values
            .chunks(32)
            .map(|value| u64::from_ne_bytes(value[16..24].try_into().unwrap()))
            .sum()
    }

    /// Assigns an address to an endpoint.
    pub fn address(&self, addr: &str, endpoint: u16, identity: u32) {
        let value = IpcacheEntry {
            identity,
            endpoint,
            flags: 0,
        };
        let key = addr_of(addr);
        sys::update(self.map(maps::IPCACHE), key.as_bytes(), value.as_bytes()).unwrap();
    }

    /// Returns the number of tracked fragmented datagrams.
    pub fn datagrams(&self) -> usize {
        sys::keys(self.map(maps::FRAGMENTS), size_of::<palisade_abi::FragmentKey>()).len()
    }

    /// Returns the share of an endpoint and direction.
    pub fn share(&self, endpoint: u16, direction: Direction) -> Share {
        let slot = palisade_datapath::share_slot(endpoint, direction as usize);
        let share = sys::lookup(self.map(maps::SHARES), slot.as_bytes(), size_of::<Share>()).unwrap();
        Share::read_from_bytes(&share).unwrap()
    }

    pub fn set_share(&self, endpoint: u16, direction: Direction, share: Share) {
        let slot = palisade_datapath::share_slot(endpoint, direction as usize);
        sys::update(self.map(maps::SHARES), slot.as_bytes(), share.as_bytes()).unwrap();
    }

    pub fn flow(&self, key: &CtKey) -> Option<CtEntry> {
        sys::lookup(self.map(maps::CONNTRACK), key.as_bytes(), size_of::<CtEntry>())
            .map(|value| CtEntry::read_from_bytes(&value).unwrap())
    }

    pub fn set_flow(&self, key: &CtKey, entry: &CtEntry) {
        sys::update(self.map(maps::CONNTRACK), key.as_bytes(), entry.as_bytes()).unwrap();
    }

    pub fn forget_flows(&self) {
        for key in self.flows() {
            sys::delete(self.map(maps::CONNTRACK), key.as_bytes()).unwrap();
        }
    }

    pub fn flows(&self) -> Vec<CtKey> {
        sys::keys(self.map(maps::CONNTRACK), size_of::<CtKey>())
            .iter()
            .map(|key| CtKey::read_from_bytes(key).unwrap())
            .collect()
    }
}

pub fn addr_of(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

/// Returns the key of a flow as `endpoint` sees it.
pub fn key(endpoint: u16, protocol: u8, local: (&str, u16), remote: (&str, u16)) -> CtKey {
    CtKey {
        local: addr_of(local.0),
        remote: addr_of(remote.0),
        local_port: local.1,
        remote_port: remote.1,
        endpoint,
        protocol,
        zero: 0,
    }
}

/// Gives the calling thread a network namespace in which the loopback has the addresses of the node and a default
/// route, so that the routing table tells local from forwarded packets.
fn own_network() {
    // SAFETY: takes no pointer; only the calling thread changes its namespace.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        result,
        0,
        "unshare: {} (these tests need root)",
        std::io::Error::last_os_error()
    );
    for family in ["ipv4", "ipv6"] {
        std::fs::write(format!("/proc/sys/net/{family}/conf/all/forwarding"), "1").unwrap();
    }
    std::fs::write("/proc/sys/net/ipv6/conf/lo/forwarding", "1").unwrap();
    for arguments in [
        "link set lo up",
        "addr add 10.0.0.1/32 dev lo",
        "addr add 10.0.0.99/32 dev lo",
        "addr add fd00::1/128 dev lo",
        "addr add fd00::99/128 dev lo",
        "route add default dev lo",
        "-6 route add default dev lo",
    ] {
        let output = std::process::Command::new("ip")
            .args(arguments.split(' '))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "ip {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Roles of interfaces.
pub const NIC: u8 = role::HOST;
pub const WORKLOAD: u8 = role::ENDPOINT;
