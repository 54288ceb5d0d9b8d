//! Cost of one packet in the programs alone, by BPF_PROG_TEST_RUN: no driver, no network stack.
//!
//! The programs have maps of their own, with as many rules and identities as a measure needs. Nothing is attached.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, anyhow, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData},
    programs::{Program, SchedClassifier, TestRun, TestRunOptions, Xdp},
};
use palisade_abi::{
    Addr, CLASS_SLOTS, Class, Config, CtEntry, CtKey, DIRECTIONS, Decision, EndpointState, Interface,
    IpcacheEntry, MatchKind, PolicyEntry, PolicyKey, Share, class_slot, endpoint_flags, identity, maps,
    programs, protocol, role,
};
use palisade_datapath::Sizes;
use palisade_testbed::Ns;
use zerocopy::{Immutable, IntoBytes};

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
    traffic::{Frame, Stream},
};

/// The loopback interface, by which test packets arrive.
const IFINDEX: u32 = 1;
/// The guarded endpoint: a workload, or the node.
const ENDPOINT: u16 = 1;
/// The node's endpoint where a workload is guarded.
const NODE: u16 = 9;
const GUARDED: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 10);
const POLICY: u32 = 3;
const PORT: u16 = 80;
const SECOND: u64 = 1_000_000_000;
/// Sizes of the tables of flows and of fragments: the defaults of the daemon.
const FLOWS: u32 = 131_072;
/// Slots for new flows of each of the two endpoints and directions.
const SLOTS: usize = FLOWS as usize / 2 / 4;
const FRAGMENTS: u32 = 8_192;
/// The interface by which a packet for the workload entered the node.
const NIC: u32 = 2;

/// Programs that parse a packet and look up one flow.
const BASELINE_XDP: &str = "bench_baseline";
const BASELINE_TC: &str = "bench_baseline_tc";

/// Return values of programs that drop.
const XDP_DROP: u32 = 1;
const TC_ACT_SHOT: u32 = 2;

/// Returns the n-th peer.
fn peer(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a80_0000 + n)
}

const fn peer_identity(n: u32) -> u32 {
    identity::FIRST_LOCAL + n
}

/// A program, its hook, and the direction of its packets.
#[derive(Clone, Copy, Debug)]
struct Place {
    name: &'static str,
    program: &'static str,
    role: u8,
    to_endpoint: bool,
}

const PLACES: [Place; 3] = [
    Place {
        name: "XDP, host: to the node",
        program: programs::XDP_INGRESS,
        role: role::HOST,
        to_endpoint: true,
    },
    Place {
        name: "tc, endpoint: to the workload",
        program: programs::TC_EGRESS,
        role: role::ENDPOINT,
        to_endpoint: true,
    },
    Place {
        name: "tc, endpoint: from the workload",
        program: programs::TC_INGRESS,
        role: role::ENDPOINT,
        to_endpoint: false,
    },
];

impl Place {
    /// Returns a UDP packet between the guarded endpoint and a peer, of one of their flows.
    fn frame(&self, other: u32, flow: u16) -> Frame {
        let peer = peer(other);
        let stream = |from, to| Stream {
            from_mac: [2, 0, 0, 0, 0, 1],
            to_mac: [2, 0, 0, 0, 0, 2],
            from,
            to,
        };
        if self.to_endpoint {
            stream(peer, GUARDED).frame(flow, PORT)
        } else {
            stream(GUARDED, peer).frame(flow, PORT)
        }
    }

    fn key(&self, other: u32, flow: u16) -> CtKey {
        let (local_port, remote_port) = if self.to_endpoint {
            (PORT, flow)
        } else {
            (flow, PORT)
        };
        CtKey {
            local: Addr::from_v4(GUARDED.octets()),
            remote: Addr::from_v4(peer(other).octets()),
            local_port,
            remote_port,
            endpoint: ENDPOINT,
            protocol: protocol::UDP,
            zero: 0,
        }
    }
}

/// A `struct __sk_buff` of a packet that entered by [`NIC`], not one that the node sends.
const RECEIVED: [u8; 44] = {
    const INGRESS_IFINDEX: usize = 36;
    let mut context = [0; 44];
    context[INGRESS_IFINDEX] = NIC as u8;
    context
};

fn program_of<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a Program> {
    ebpf.program(name).with_context(|| format!("no program {name}"))
}

/// The programs with their own maps.
struct Loaded(Ebpf);

fn raw<const N: usize>(value: &(impl IntoBytes + Immutable)) -> Result<[u8; N]> {
    <[u8; N]>::try_from(value.as_bytes()).context("a key or value has not the size that is taken here")
}

impl Loaded {
    /// Loads `rules` rules about `peers` identities: rule r allows peer r mod `peers` the port class 1 + r / `peers`. The
    /// port of the traffic is of class 1.
    fn new(rules: u32, peers: u32) -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(maps::CONNTRACK, FLOWS)
            .map_max_entries(maps::FLOW_SLOTS, FLOWS / 2)
            .map_max_entries(maps::FRAGMENTS, FRAGMENTS)
            .map_max_entries(maps::FRAGMENT_SLOTS, FRAGMENTS / 2)
            .load(palisade_datapath::BENCH_OBJECT)
            .context("loading the BPF object")?;
        for (name, program) in ebpf.programs_mut() {
            match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                Program::SkLookup(program) => program.load(),
                _ => bail!("{name}: neither XDP, tc nor sk_lookup"),
            }
            .with_context(|| name.to_owned())?;
        }
        let mut loaded = Self(ebpf);
        loaded.fill(rules, peers)?;
        Ok(loaded)
    }

    fn hash<const K: usize, const V: usize>(
        &mut self,
        name: &str,
    ) -> Result<HashMap<&mut MapData, [u8; K], [u8; V]>>
    where
        [u8; K]: Pod,
        [u8; V]: Pod,
    {
        Ok(HashMap::try_from(
            self.0.map_mut(name).with_context(|| name.to_owned())?,
        )?)
    }

    fn array<const V: usize>(&mut self, name: &str) -> Result<Array<&mut MapData, [u8; V]>>
    where
        [u8; V]: Pod,
    {
        Ok(Array::try_from(
            self.0.map_mut(name).with_context(|| name.to_owned())?,
        )?)
    }

    fn configure(&mut self, host_endpoint: u16) -> Result<()> {
        let config = Config {
            tcp_opening: 60 * SECOND,
            tcp_established: 3_600 * SECOND,
            tcp_closing: 10 * SECOND,
            udp: 3_600 * SECOND,
            other: 60 * SECOND,
            fragment: 5 * SECOND,
            trace_interval: 0,
            // Events are not measured; as in any flood, nearly all of them are suppressed.
            events_per_second: 1,
            host_endpoint: host_endpoint.into(),
            world_ipv4: identity::WORLD_IPV4,
            world_ipv6: identity::WORLD_IPV6,
            rules: 65_536,
            ..Config::default()
        };
        self.array::<{ size_of::<Config>() }>(maps::CONFIG)?
            .set(0, raw(&config)?, 0)?;
        Ok(())
    }

    fn fill(&mut self, rules: u32, peers: u32) -> Result<()> {
        let sizes = Sizes {
            flows: FLOWS,
            flow_table: FLOWS / 2,
            fragment_table: FRAGMENTS / 2,
            cpus: u32::try_from(aya::util::nr_cpus().map_err(|(path, error)| anyhow!("{path}: {error}"))?)?,
        };
        let mut shares = self.array::<{ size_of::<Share>() }>(maps::SHARES)?;
        for (slot, share) in palisade_datapath::shares(&[ENDPOINT, NODE].into(), sizes) {
            shares.set(slot, raw(&share)?, 0)?;
        }

        let state = EndpointState {
            policy: POLICY,
            revision: 1,
            identity: identity::FIRST_LABELS,
            // What the compiler sets for these rules: no inspection, no deny rules.
            flags: endpoint_flags::PLAIN_INGRESS | endpoint_flags::PLAIN_EGRESS,
        };
        self.array::<{ size_of::<EndpointState>() }>(maps::ENDPOINTS)?
            .set(ENDPOINT.into(), raw(&state)?, 0)?;

        let mut classes = vec![0_u8; 2 * CLASS_SLOTS];
        for (port, class) in
            std::iter::once((PORT, 1)).chain((2..=1 + rules / peers).map(|c| (10_000 + c as u16, c)))
        {
            let at = 2 * class_slot(protocol::UDP, port) as usize;
            classes[at..at + 2].copy_from_slice(&(class as Class).to_ne_bytes());
        }
        let classes: Box<[u8; 2 * CLASS_SLOTS]> = classes
            .into_boxed_slice()
            .try_into()
            .ok()
            .context("the class table")?;
        self.array::<{ 2 * CLASS_SLOTS }>(maps::CLASSES)?
            .set(0, *classes, 0)?;

        let mut ipcache = self.hash::<{ size_of::<Addr>() }, { size_of::<IpcacheEntry>() }>(maps::IPCACHE)?;
        let mut known = |ip: Ipv4Addr, identity, endpoint| -> Result<()> {
            let entry = IpcacheEntry {
                identity,
                endpoint,
                flags: 0,
            };
            Ok(ipcache.insert(raw(&Addr::from_v4(ip.octets()))?, raw(&entry)?, 0)?)
        };
        known(GUARDED, identity::FIRST_LABELS, ENDPOINT)?;
        for n in 0..peers {
            known(peer(n), peer_identity(n), 0)?;
        }

        let mut policy =
            self.hash::<{ size_of::<PolicyKey>() }, { size_of::<PolicyEntry>() }>(maps::POLICY)?;
        let mut entry = |identity, class, decision: Decision, rule| -> Result<()> {
            for direction in DIRECTIONS {
                let key = PolicyKey {
                    policy: POLICY,
                    identity,
                    class,
                    direction: direction as u8,
                    zero: 0,
                };
                let kind = if decision == Decision::Allow {
                    MatchKind::L3L4
                } else {
                    MatchKind::None
                };
                let value = PolicyEntry {
                    decision: decision as u8,
                    flags: 0,
                    inspector: 0,
                    match_kind: kind as u8,
                    rule,
                    ruleset: 0,
                };
                policy.insert(raw(&key)?, raw(&value)?, 0)?;
            }
            Ok(())
        };
        entry(identity::ANY, palisade_abi::CLASS_ANY, Decision::Deny, 1)?;
        for rule in 0..rules {
            let class = Class::try_from(1 + rule / peers).context("more classes than there can be")?;
            entry(peer_identity(rule % peers), class, Decision::Allow, 2 + rule)?;
        }
        Ok(())
    }

    /// Configures the programs for a hook.
    fn stand_at(&mut self, place: &Place) -> Result<()> {
        self.configure(if place.role == role::HOST { ENDPOINT } else { NODE })?;
        let mut interfaces = self.array::<{ size_of::<Interface>() }>(maps::INTERFACES)?;
        for (ifindex, endpoint, role) in [(IFINDEX, ENDPOINT, place.role), (NIC, NODE, role::HOST)] {
            let interface = Interface {
                ifindex,
                endpoint,
                role,
                link: ifindex,
                ..Interface::default()
            };
            interfaces.set(ifindex, raw(&interface)?, 0)?;
        }
        Ok(())
    }

    /// Returns the mean time of `repeat` runs in ns; fails unless the packet passes.
    fn run(&self, program: &str, frame: &Frame, repeat: u32) -> Result<f64> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.repeat = repeat;
        if matches!(program_of(&self.0, program)?, Program::SchedClassifier(_)) {
            options.ctx_in = Some(&RECEIVED);
        }
        let (result, drop) = match program_of(&self.0, program)? {
            Program::Xdp(xdp) => (Xdp::test_run(xdp, options)?, XDP_DROP),
            Program::SchedClassifier(tc) => (SchedClassifier::test_run(tc, options)?, TC_ACT_SHOT),
            _ => bail!("{program}: neither XDP nor tc"),
        };
        ensure!(
            result.return_value != drop,
            "{program} drops the packet that is measured"
        );
        Ok(result.duration.as_nanos() as f64)
    }

    /// Inserts the flow that the baseline looks up: that of the packet, as ingress of endpoint 1.
    fn know(&mut self, place: &Place, other: u32, flow: u16) -> Result<()> {
        const VALUE: usize = size_of::<CtEntry>();
        let (mut key, entry) = (
            place.key(other, flow),
            CtEntry {
                expires: u64::MAX,
                ..CtEntry::default()
            },
        );
        if !place.to_endpoint {
            (key.local, key.remote) = (key.remote, key.local);
            (key.local_port, key.remote_port) = (key.remote_port, key.local_port);
            Ok(self
                .hash::<{ size_of::<CtKey>() }, VALUE>(maps::CONNTRACK)?
                .insert(raw(&key)?, raw(&entry)?, 0)?)
        } else {
            Ok(()) // The program itself has inserted it.
        }
    }

    fn forget(&mut self, key: &CtKey) -> Result<()> {
        const VALUE: usize = size_of::<CtEntry>();
        Ok(self
            .hash::<{ size_of::<CtKey>() }, VALUE>(maps::CONNTRACK)?
            .remove(&raw(key)?)?)
    }
}

/// Runs a measure in its own network namespace, where packets to a peer are forwarded.
fn apart(measure: impl FnOnce() -> Result<Measure> + Send) -> Result<Measure> {
    let ns = Ns::new("program")?;
    ns.sysctl("ipv4/ip_forward", "1")?;
    ns.ip("link add out type veth peer name far\naddr add 192.0.2.1/24 dev out\nlink set out up\nlink set far up\nroute add default dev out\n")?;
    ns.enter(measure)
}

/// Measures a packet of an established flow, against a program that parses and does one lookup in an LRU hash.
pub fn established(effort: Effort) -> Result<Measure> {
    apart(|| established_flow(effort))
}

/// Measures the first packet of a flow, for several numbers of rules and identities.
pub fn new_flow(effort: Effort) -> Result<Measure> {
    apart(|| first_packet(effort))
}

fn established_flow(effort: Effort) -> Result<Measure> {
    let (rounds, repeat) = effort.pick((11, 200_000), (31, 1_000_000));
    progress(format_args!(
        "established: {rounds} rounds of {repeat} packets at {} places",
        PLACES.len()
    ));
    let columns = [
        "program",
        "baseline, ns",
        "established flow, ns",
        "ratio",
        "spread",
    ];
    let mut table = Table::new("Time in the program for one packet", &columns);
    let mut goals = Vec::new();
    let mut loaded = Loaded::new(10, 10)?;
    for place in &PLACES {
        let baseline = match place.program {
            programs::XDP_INGRESS => BASELINE_XDP,
            _ => BASELINE_TC,
        };
        loaded.stand_at(place)?;
        let frame = place.frame(0, 30_000);
        loaded.run(place.program, &frame, 1)?;
        loaded.know(place, 0, 30_000)?;
        let [mut least, mut ours, mut ratio] = [const { Samples::new() }; 3];
        for _ in 0..rounds {
            let (a, b) = (
                loaded.run(baseline, &frame, repeat)?,
                loaded.run(place.program, &frame, repeat)?,
            );
            least.push(a);
            ours.push(b);
            ratio.push(b / a);
        }
        table.row(
            place.name,
            &[least.median(), ours.median(), ratio.median(), ratio.spread()],
        );
        goals.push(Goal::at_most(
            format!("established flow, {}", place.name),
            1.3,
            ratio.median(),
            " ×",
        ));
    }
    Ok(Measure {
        name: "established",
        title: "An established flow, in the program",
        method: format!(
            "BPF_PROG_TEST_RUN, a UDP packet of 60 bytes, IPv4, {repeat} repetitions; baseline and program in turn, {rounds} rounds."
        ),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}

/// Returns the cost of a new flow at a hook, ns: with a free slot; with a slot that names a deleted flow; and with a slot
/// that names a live flow, which is compared with another one and deleted.
fn by_slot(place: &Place) -> Result<[f64; 3]> {
    const PEERS: u32 = 10;
    const PACKETS: usize = SLOTS / 4;
    let mut loaded = Loaded::new(PEERS, PEERS)?;
    loaded.stand_at(place)?;
    let flow = |n: usize| ((n % PEERS as usize) as u32, 1_024 + (n / PEERS as usize) as u16);
    let [mut free, mut gone, mut live] = [const { Samples::new() }; 3];
    let deleted = |loaded: &mut Loaded, samples: &mut Samples| -> Result<()> {
        for (other, port) in (0..PACKETS).map(flow) {
            samples.push(loaded.run(place.program, &place.frame(other, port), 1)?);
            loaded.forget(&place.key(other, port))?;
        }
        Ok(())
    };
    deleted(&mut loaded, &mut free)?;
    // Slots are chosen at random: with this many flows hardly a slot is free.
    let filled = 6 * SLOTS;
    for (n, (other, port)) in (0..filled + PACKETS).map(|n| (n, flow(n))) {
        let time = loaded.run(place.program, &place.frame(other, port), 1)?;
        if n >= filled {
            live.push(time);
        }
    }
    for (other, port) in (0..filled + PACKETS).map(flow) {
        // Most were evicted.
        let _ = loaded.forget(&place.key(other, port));
    }
    deleted(&mut loaded, &mut gone)?;
    Ok([free.median(), gone.median(), live.median()])
}

fn first_packet(effort: Effort) -> Result<Measure> {
    let packets = effort.pick(5_000, 30_000);
    let sizes: [(u32, u32); 3] = [(10, 10), (100_000, 10), (100_000, 100_000)];
    progress(format_args!(
        "new-flow: {packets} packets each at {} places",
        PLACES.len()
    ));
    let mut loaded = sizes
        .iter()
        .map(|(rules, peers)| Loaded::new(*rules, *peers))
        .collect::<Result<Vec<_>>>()?;
    let mut tables = Vec::new();
    let mut goals = Vec::new();
    for place in &PLACES {
        let columns = [
            "rules, identities",
            "one peer, ns",
            "against the first",
            "peers at random, ns",
            "against the first",
        ];
        let mut table = Table::new(place.name, &columns);
        let mut medians = Vec::new();
        let mut samples = vec![[const { Samples::new() }; 2]; sizes.len()];
        for one in &mut loaded {
            one.stand_at(place)?;
        }
        for n in 0..packets {
            for ((one, samples), (_, peers)) in loaded.iter_mut().zip(&mut samples).zip(sizes) {
                // Distant numbers that are the same in every run (Knuth's multiplicative hash).
                let random = (n as u32).wrapping_mul(2_654_435_761) % peers;
                for (other, samples) in [0, random].into_iter().zip(samples) {
                    let flow = 1_024 + (n % 60_000) as u16;
                    samples.push(one.run(place.program, &place.frame(other, flow), 1)?);
                    one.forget(&place.key(other, flow))?;
                }
            }
        }
        for ((rules, peers), [same, random]) in sizes.iter().zip(&samples) {
            medians.push((same.median(), random.median()));
            let (first_same, first_random) = medians[0];
            table.row(
                format!("{}, {}", number(f64::from(*rules)), number(f64::from(*peers))),
                &[
                    same.median(),
                    same.median() / first_same,
                    random.median(),
                    random.median() / first_random,
                ],
            );
        }
        tables.push(table);
        let ratio = |at: usize| medians[at].0 / medians[0].0;
        goals.push(Goal::at_most(
            format!("new flow at 100,000 rules against 10, {}", place.name),
            1.15,
            ratio(1),
            " ×",
        ));
        goals.push(Goal::at_most(
            format!(
                "new flow at 100,000 identities (and as many rules) against 10, {}",
                place.name
            ),
            1.15,
            ratio(2),
            " ×",
        ));
        goals.push(Goal {
            what: format!(
                "the same, each flow with a peer at random among 100,000: cold caches, {}",
                place.name
            ),
            reach: "reported".into(),
            measured: format!("{} ×", number(medians[2].1 / medians[0].1)),
            reached: None,
        });
    }
    let mut slots = Table::new(
        "What stood in the slot that the new flow takes (10 rules, 10 identities)",
        &[
            "program",
            "nothing, ns",
            "a flow that is gone, ns",
            "a live flow, ns",
        ],
    );
    for place in &PLACES {
        slots.row(place.name, &by_slot(place)?);
    }
    tables.push(slots);
    Ok(Measure {
        name: "new-flow",
        title: "The first packet of a flow, in the program",
        method: format!(
            "BPF_PROG_TEST_RUN of one packet, {packets} times for each figure, sizes in turn; after each packet its conntrack entry is deleted, so that it finds most slots free at first and later the names of flows that are gone. Events are suppressed as they are in a flood. \"One peer\" opens all flows; \"peers at random\" are spread over all identities, so that their entries are rarely in a processor's cache."
        ),
        goals,
        tables,
        plot: None,
        notes: Vec::new(),
    })
}
