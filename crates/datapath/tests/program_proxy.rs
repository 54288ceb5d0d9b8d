//! Intercepted flows: their packets go to a proxy link, and packets of the proxy continue where the flow was
//! intercepted.

mod program;

use palisade_abi::{
    Config, CtEntry, CtKey, Decision, Direction, Inspector, PROXY_MAC, PolicyEntry, ProxyPath, PuntHeader,
    Reason, config_flags, identity, interface_flags, programs, punt_hook,
};
use program::packets::*;
use program::*;
use zerocopy::{FromBytes as _, IntoBytes as _};

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;
const COOKIE: u64 = 0x1122_3344_5566_7788;
const MARK: u32 = 0x5a5a_0001;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;
const UNSPEC: u32 = 0xffff_ffff;
/// Interface of a proxy link that no program of these tests runs at.
const OTHER_LINK: u32 = 77;

type End = (&'static str, u16);

/// Configures the proxy links. The one of `here` is the loopback interface, at which every program of these tests runs.
fn links(here: Direction) -> impl Fn(&mut Config) {
    move |config| {
        config.cookie = COOKIE;
        config.worker_timeout = 500_000_000;
        config.punt_ifindex = IFINDEX;
        config.workers = 1;
        config.mark = MARK;
        config.inspectors = 1 << Inspector::TlsTerminate as u32 | 1 << Inspector::Dns as u32;
        config.proxy_ifindex = [OTHER_LINK; 2];
        config.proxy_ifindex[here as usize] = IFINDEX;
    }
}

fn intercepting(rule: u32, ruleset: u32) -> PolicyEntry {
    PolicyEntry {
        inspector: Inspector::TlsTerminate as u8,
        ruleset,
        ..entry(Decision::Inspect, rule)
    }
}

/// A node at whose interface `endpoint` has port 80 intercepted in one direction; everything else is allowed.
fn world(role: u8, endpoint: u16, direction: Direction) -> World {
    let world = World::new(role, endpoint);
    world.config(links(direction));
    world.set_interface(&interface(GUARDED, NIC, HOST));
    for id in [HOST, A, B] {
        for direction in [INGRESS, EGRESS] {
            world.rule(id, direction, identity::ANY, 0, entry(Decision::Allow, 2));
        }
    }
    world.rule(endpoint, direction, identity::ANY, 5, intercepting(11, 21));
    world.beat(palisade_datapath::monotonic_coarse());
    world
}

fn source(frame: &[u8]) -> [u8; 6] {
    frame[6..12].try_into().unwrap()
}

fn destination(frame: &[u8]) -> [u8; 6] {
    frame[..6].try_into().unwrap()
}

/// Returns a frame with these MAC addresses.
fn with_mac(mut frame: Vec<u8>, destination: [u8; 6], source: [u8; 6]) -> Vec<u8> {
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    frame
}

fn to_proxy(got: &Outcome, frame: &[u8]) {
    assert!(got.carried, "{:?}", got.reason);
    assert_eq!(destination(&got.frame), PROXY_MAC);
    assert_eq!(got.frame[6..], frame[6..]);
}

fn path(world: &World, key: &CtKey) -> ProxyPath {
    let flow: CtEntry = world.flow(key).unwrap();
    ProxyPath::read_from_bytes(flow.windows.as_bytes()).unwrap()
}

const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const FAR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// What the proxy's end writes into its frames.
const PROXY: [[u8; 6]; 2] = [PROXY_MAC, PROXY_MAC];

#[test]
fn packets_of_both_ends_go_to_the_proxy_and_those_of_the_proxy_to_both_ends() {
    for (client, server) in [((A_V4, 4000), (WORLD_V4, 80)), ((A_V6, 4000), (WORLD_V6, 80))] {
        let mut world = world(WORKLOAD, A, EGRESS);
        let flow = key(A, 6, client, server);
        let syn = with_mac(tcp(client, server, SYN), HOST_MAC, FAR_MAC);
        let got = world.run_marked(programs::TC_INGRESS, &syn, 0, IFINDEX);
        // Without a mark: the packet does not cross the egress of the node's end.
        assert_eq!((got.retval, got.mark), (REDIRECT, 0));
        assert_eq!(got.reason, Some(Reason::Allowed));
        assert_eq!(destination(&got.frame), PROXY_MAC);
        assert_eq!(got.frame[6..], syn[6..]);
        let expected = ProxyPath {
            near: HOST_MAC,
            far: FAR_MAC,
            ifindex: IFINDEX | ProxyPath::RESOLVED,
        };
        assert_eq!(path(&world, &flow), expected);

        // The proxy answers the client, and opens the connection to the server.
        let answer = with_mac(tcp(server, client, SYN | ACK), PROXY[0], PROXY[1]);
        let got = world.run_marked(programs::PROXY, &answer, 0, IFINDEX);
        assert_eq!((got.retval, got.mark, got.reason), (REDIRECT, MARK, None));
        assert_eq!((destination(&got.frame), source(&got.frame)), (FAR_MAC, HOST_MAC));
        assert_eq!(got.frame[12..], answer[12..]);
        let upstream = with_mac(tcp(client, server, SYN), PROXY[0], PROXY[1]);
        let got = world.run_marked(programs::PROXY, &upstream, 0, IFINDEX);
        assert_eq!((got.retval, got.mark, got.reason), (REDIRECT, MARK, None));
        assert_eq!((destination(&got.frame), source(&got.frame)), (HOST_MAC, FAR_MAC));

        // The server's answer leaves by the same interface.
        let answer = with_mac(tcp(server, client, SYN | ACK), FAR_MAC, HOST_MAC);
        let got = world.run_marked(programs::TC_EGRESS, &answer, 0, GUARDED);
        assert_eq!((got.retval, got.mark), (REDIRECT, MARK), "{got:?}");
        assert_eq!(got.reason, Some(Reason::Established));
        assert_eq!(destination(&got.frame), PROXY_MAC);
        assert_eq!(path(&world, &flow), expected);
    }
}

#[test]
fn where_the_ingress_hook_is_xdp_packets_of_the_proxy_enter_without_a_mark() {
    let mut world = world(WORKLOAD, A, EGRESS);
    world.interface(WORKLOAD, A, interface_flags::XDP);
    let syn = with_mac(tcp((A_V4, 4000), (WORLD_V4, 80), SYN), HOST_MAC, FAR_MAC);
    assert!(world.run(Hook::Xdp, &syn).carried);
    let got = world.run_marked(programs::PROXY, &syn, 0, IFINDEX);
    assert_eq!((got.retval, got.mark), (REDIRECT, 0));
    let answer = tcp((WORLD_V4, 80), (A_V4, 4000), SYN | ACK);
    let got = world.run_marked(programs::PROXY, &answer, 0, IFINDEX);
    assert_eq!((got.retval, got.mark), (REDIRECT, MARK));
}

#[test]
fn xdp_has_a_worker_carry_the_packet_to_the_proxy_link() {
    for (client, server) in [
        ((WORLD_V4, 4000), (HOST_V4, 80)),
        ((WORLD_V6, 4000), (HOST_V6, 80)),
    ] {
        let mut world = world(NIC, HOST, INGRESS);
        let syn = tcp(client, server, SYN);
        let got = world.run(Hook::Xdp, &syn);
        assert!(got.carried, "{:?}", got.reason);
        let header = size_of::<PuntHeader>();
        let (punted, frame) = (
            PuntHeader::read_from_bytes(&got.frame[..header]).unwrap(),
            &got.frame[header..],
        );
        assert_eq!((punted.ifindex, punted.hook), (IFINDEX, punt_hook::TC_EGRESS));
        assert_eq!(punted.slots[0].inspector, Inspector::TlsTerminate as u8);
        assert_eq!(destination(frame), PROXY_MAC);
        assert_eq!(frame[6..], syn[6..]);
        // Fail open does not apply, because the server would get a stream that no proxy has read.
        world.beat(palisade_datapath::monotonic_coarse() - 2_000_000_000);
        world.config(|config| {
            links(INGRESS)(config);
            config.flags = config_flags::FAIL_OPEN;
        });
        assert_eq!(world.run(Hook::Xdp, &syn).reason, Reason::NoWorker);
        // A tc hook needs no worker.
        assert!(world.run(Hook::TcIn, &syn).carried);
    }
}

/// A host of the link can send a packet with a foreign source address and its own MAC address. It must not get the
/// proxy's answers.
#[test]
fn answers_do_not_go_to_the_mac_address_that_a_packet_from_a_nic_had() {
    let (client, server) = ((WORLD_V4, 4000), (HOST_V4, 80));
    let mut world = world(NIC, HOST, INGRESS);
    let flow = key(HOST, 6, server, client);
    let syn = with_mac(tcp(client, server, SYN), HOST_MAC, FAR_MAC);
    to_proxy(&world.run(Hook::TcIn, &syn), &syn);
    assert_eq!(path(&world, &flow).ifindex, IFINDEX);
    // The kernel resolves the next hop (bpf_redirect_neigh), and the packet has no mark that routing rules could match.
    let answer = with_mac(tcp(server, client, SYN | ACK), PROXY[0], PROXY[1]);
    let got = world.run_marked(programs::PROXY, &answer, 0, IFINDEX);
    assert_eq!((got.retval, got.mark, got.reason), (REDIRECT, 0, None));
    assert_eq!(got.frame, answer);
    // At the egress of the NIC it passes because it entered by the proxy link.
    assert_eq!(
        world.run_marked(programs::TC_EGRESS, &answer, 0, IFINDEX).retval,
        UNSPEC
    );
    // A bridge could flood it to a workload's port, where its destination is checked.
    world.interface(WORKLOAD, A, 0);
    let got = world.run_marked(programs::TC_EGRESS, &answer, 0, IFINDEX);
    assert_eq!((got.retval, got.reason), (SHOT, Some(Reason::NotTheEndpoints)));
    world.interface(NIC, HOST, 0);
    // The connection to the server enters by the NIC as the client's packets do.
    let upstream = with_mac(tcp(client, server, SYN), PROXY[0], PROXY[1]);
    let got = world.run_marked(programs::PROXY, &upstream, 0, IFINDEX);
    assert_eq!((got.retval, got.mark), (REDIRECT, MARK));
    assert_eq!((destination(&got.frame), source(&got.frame)), (HOST_MAC, FAR_MAC));
    // Once the server has answered, the resolved address is known.
    let resolved = [2, 0, 0, 0, 0, 9];
    let answer = with_mac(tcp(server, client, SYN | ACK), resolved, HOST_MAC);
    let got = world.run_local(&answer);
    to_proxy(&got, &answer);
    assert_eq!(path(&world, &flow).far, resolved);
    let got = world.run_marked(programs::PROXY, &answer, 0, IFINDEX);
    assert_eq!((got.retval, got.mark), (REDIRECT, MARK));
    assert_eq!(destination(&got.frame), resolved);
    // Later packets from the NIC do not change it, whatever their MAC addresses are.
    let forged = with_mac(tcp(client, server, ACK), [255; 6], FAR_MAC);
    to_proxy(&world.run(Hook::TcIn, &forged), &forged);
    assert_eq!(
        (path(&world, &flow).near, path(&world, &flow).far),
        (HOST_MAC, resolved)
    );
}

#[test]
fn packets_of_the_proxy_without_an_intercepted_flow_are_dropped() {
    let (client, server): (End, End) = ((A_V4, 4000), (WORLD_V4, 80));
    let foreign = |world: &mut World, frame: &[u8]| {
        let got = world.run_marked(programs::PROXY, frame, 0, IFINDEX);
        assert_eq!(got.retval, SHOT, "{got:?}");
        got.reason
    };
    let none = Some(Reason::NoProxy);
    let mut node = world(WORKLOAD, A, EGRESS);
    let syn = tcp(client, server, SYN);
    assert_eq!(foreign(&mut node, &syn), none);
    assert!(node.run(Hook::TcIn, &syn).carried);
    assert_eq!(
        node.run_marked(programs::PROXY, &syn, 0, IFINDEX).retval,
        REDIRECT
    );
    for other in [
        tcp((A_V4, 4001), server, SYN),
        tcp(client, (WORLD_V4, 81), SYN),
        tcp((B_V4, 4000), server, SYN),
        tcp((HOST_V4, 4000), server, SYN),
        udp(client, server, b"x"),
        echo(client.0, server.0, 1, false),
        arp(1, A_V4, HOST_V4),
        tagged(&syn, &[0x8100]),
        neighbour(135, "fe80::1", "ff02::1:ff00:2", "fe80::2"),
    ] {
        assert_eq!(foreign(&mut node, &other), none, "{other:x?}");
    }
    // A mark does not help.
    let other = tcp((A_V4, 4001), server, SYN);
    assert_eq!(
        node.run_marked(programs::PROXY, &other, MARK, IFINDEX).retval,
        SHOT
    );
    // The link of the other direction.
    node.config(links(INGRESS));
    assert_eq!(foreign(&mut node, &syn), none);
    node.config(links(EGRESS));
    // The interface of another endpoint, an interface without programs.
    for interface in [
        interface(IFINDEX, WORKLOAD, B),
        interface(IFINDEX, NIC, HOST),
        interface(IFINDEX, palisade_abi::role::SEEN, A),
    ] {
        node.set_interface(&interface);
        assert_eq!(foreign(&mut node, &syn), none, "{interface:?}");
    }
    node.interface(WORKLOAD, A, 0);
    assert_eq!(
        node.run_marked(programs::PROXY, &syn, 0, IFINDEX).retval,
        REDIRECT
    );
    // A flow that the policy allows without interception.
    node.rule(A, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    node.state(A, u32::from(A), 2, A_IDENTITY);
    assert_eq!(node.run(Hook::TcIn, &syn).reason, Reason::Established);
    assert_eq!(foreign(&mut node, &syn), none);
}

#[test]
fn at_the_egress_of_a_proxy_link_only_redirected_packets_pass() {
    let mut world = world(WORKLOAD, A, EGRESS);
    let frame = tcp((A_V4, 4000), (WORLD_V4, 80), SYN);
    let got = world.run_marked(programs::PROXY_FILTER, &frame, MARK, IFINDEX);
    assert_eq!((got.retval, got.mark, got.reason), (UNSPEC, 0, None));
    for mark in [0, 1, MARK - 1] {
        let got = world.run_marked(programs::PROXY_FILTER, &frame, mark, 0);
        assert_eq!((got.retval, got.reason), (SHOT, Some(Reason::PuntForeign)));
    }
    // Before the daemon has drawn the mark, no packet passes.
    world.config(|config| config.mark = 0);
    assert_eq!(
        world
            .run_marked(programs::PROXY_FILTER, &frame, 0, IFINDEX)
            .retval,
        SHOT
    );
}

#[test]
fn packets_that_cannot_be_intercepted_are_dropped() {
    let (client, server): (End, End) = ((A_V4, 4000), (WORLD_V4, 80));
    let syn = tcp(client, server, SYN);
    for hook in ENTRIES {
        // No proxy link, and no proxy at all.
        let mut node = world(WORKLOAD, A, EGRESS);
        node.config(|config| {
            links(EGRESS)(config);
            config.proxy_ifindex = [IFINDEX, 0];
        });
        assert_eq!(node.run(hook, &syn).reason, Reason::NoProxy);
        node.config(|config| {
            links(EGRESS)(config);
            config.inspectors = 0;
        });
        let other = tcp((A_V4, 4001), server, SYN);
        assert_eq!(node.run(hook, &other).reason, Reason::NoTlsTermination);
        // Not TCP.
        let mut node = world(WORKLOAD, A, EGRESS);
        assert_eq!(
            node.run(hook, &udp(client, server, b"x")).reason,
            Reason::NoTlsTermination
        );
        // A VLAN tag.
        assert_eq!(
            node.run(hook, &tagged(&syn, &[0x8100])).reason,
            Reason::PuntUnsupported
        );
        // A device without Ethernet header, and generic XDP.
        for flags in [interface_flags::LAYER3, interface_flags::XDP_GENERIC] {
            let mut node = world(WORKLOAD, A, EGRESS);
            node.interface(WORKLOAD, A, flags);
            let frame = if flags == interface_flags::LAYER3 {
                &syn[14..]
            } else {
                &syn[..]
            };
            if flags == interface_flags::LAYER3 && hook == Hook::TcIn {
                continue;
            }
            assert_eq!(node.run(hook, frame).reason, Reason::PuntUnsupported);
        }
        // The node's policy inspects or intercepts the packet too.
        for node_rule in [
            intercepting(12, 22),
            PolicyEntry {
                inspector: Inspector::Dns as u8,
                ..intercepting(12, 22)
            },
        ] {
            let mut node = world(WORKLOAD, A, EGRESS);
            node.rule(HOST, INGRESS, identity::ANY, 5, node_rule);
            let both = tcp(client, (HOST_V4, 80), SYN);
            assert_eq!(node.run(hook, &both).reason, Reason::PuntUnsupported);
        }
        // Only the node's policy intercepts it.
        let mut node = world(WORKLOAD, A, EGRESS);
        node.config(links(INGRESS));
        node.rule(A, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
        node.rule(HOST, INGRESS, identity::ANY, 5, intercepting(12, 22));
        let one = tcp(client, (HOST_V4, 80), SYN);
        assert!(node.run(hook, &one).carried);
        // The proxy's connection to the node enters by the workload's interface.
        let got = node.run_marked(programs::PROXY, &one, 0, IFINDEX);
        assert_eq!((got.retval, got.reason), (REDIRECT, None));
        assert_eq!(destination(&got.frame), destination(&one));
        let answer = tcp((HOST_V4, 80), client, SYN | ACK);
        let got = node.run_marked(programs::PROXY, &answer, 0, IFINDEX);
        assert_eq!(destination(&got.frame), source(&one));
    }
}

/// The programs keep the state of an intercepted connection, because no worker does.
#[test]
fn an_intercepted_connection_has_the_state_of_one_without_an_inspector() {
    let (client, server): (End, End) = ((A_V4, 4000), (WORLD_V4, 80));
    let mut world = world(WORKLOAD, A, EGRESS);
    let flow = key(A, 6, client, server);
    let out = |world: &mut World, flags| {
        let frame = tcp(client, server, flags);
        to_proxy(&world.run(Hook::TcIn, &frame), &frame);
    };
    let back = |world: &mut World, flags| {
        let frame = tcp(server, client, flags);
        let got = world.run_marked(programs::TC_EGRESS, &frame, 0, GUARDED);
        assert_eq!(got.retval, REDIRECT, "{got:?}");
    };
    out(&mut world, SYN);
    let first: CtEntry = world.flow(&flow).unwrap();
    // The proxy has answered the client, not the server.
    out(&mut world, ACK);
    assert_eq!(world.flow(&flow).unwrap().protected, 0);
    back(&mut world, SYN | ACK);
    out(&mut world, ACK);
    let open: CtEntry = world.flow(&flow).unwrap();
    assert_ne!(open.protected, 0);
    assert!(open.expires > first.expires + 3_000_000_000_000);
    // A simultaneous open of the server's side does not replace the entry by a flow of the other direction that passes
    // unread.
    let other_syn = tcp((WORLD_V4, 80), (A_V4, 4001), SYN);
    out(&mut world, FIN | ACK);
    back(&mut world, FIN | ACK);
    let closed: CtEntry = world.flow(&flow).unwrap();
    assert_eq!((closed.protected, closed.serial), (0, first.serial));
    assert!(closed.expires < open.expires);
    // The ports are used again.
    out(&mut world, SYN);
    assert_ne!(world.flow(&flow).unwrap().serial, first.serial);
    assert_eq!(path(&world, &flow).ifindex, IFINDEX | ProxyPath::RESOLVED);
    // While the handshake is open, the server's own SYN belongs to the intercepted flow.
    let frame = tcp((A_V4, 4001), (WORLD_V4, 80), SYN);
    to_proxy(&world.run(Hook::TcIn, &frame), &frame);
    let got = world.run_marked(programs::TC_EGRESS, &other_syn, 0, GUARDED);
    assert_eq!((got.retval, destination(&got.frame)), (REDIRECT, PROXY_MAC));
}

#[test]
fn a_connection_that_is_intercepted_from_now_on_goes_to_the_proxy_in_mid_stream() {
    let (client, server): (End, End) = ((A_V4, 4000), (WORLD_V4, 80));
    let mut world = world(WORKLOAD, A, EGRESS);
    world.rule(A, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    assert!(!world.run(Hook::TcIn, &tcp(client, server, SYN)).carried);
    world.rule(A, EGRESS, identity::ANY, 5, intercepting(11, 21));
    world.state(A, u32::from(A), 2, A_IDENTITY);
    let data = segment(client, server, ACK, b"data");
    to_proxy(&world.run(Hook::TcIn, &data), &data);
    // So the proxy can reset both ends.
    let reset = tcp(server, client, RST);
    assert_eq!(
        world.run_marked(programs::PROXY, &reset, 0, IFINDEX).retval,
        REDIRECT
    );
    // Without an entry, for example after an eviction, a packet of either end has it made again.
    world.forget_flows();
    let answer = tcp(server, client, ACK);
    let got = world.run_marked(programs::TC_EGRESS, &answer, 0, GUARDED);
    assert_eq!((got.retval, destination(&got.frame)), (REDIRECT, PROXY_MAC));
    assert_eq!(
        world.run_marked(programs::PROXY, &reset, 0, IFINDEX).retval,
        REDIRECT
    );
}

#[test]
fn icmp_errors_about_an_intercepted_flow_go_to_the_proxy_without_further_data() {
    for (client, server, router) in [
        ((A_V4, 4000), (WORLD_V4, 80), "192.0.2.1"),
        ((A_V6, 4000), (WORLD_V6, 80), "2001:db8::1"),
    ] {
        let mut world = world(WORKLOAD, A, EGRESS);
        let syn = with_mac(tcp(client, server, SYN), HOST_MAC, FAR_MAC);
        assert!(world.run(Hook::TcIn, &syn).carried);
        let before = path(&world, &key(A, 6, client, server));
        let sent = segment(client, server, ACK, &[7; 200]);
        let error = with_mac(unreachable(router, client.0, &sent), [9; 6], [8; 6]);
        let got = world.run_marked(programs::TC_EGRESS, &error, 0, GUARDED);
        assert_eq!(
            (got.retval, got.reason),
            (REDIRECT, Some(Reason::Related)),
            "{got:?}"
        );
        assert_eq!((destination(&got.frame), got.mark), (PROXY_MAC, MARK));
        assert!(got.frame.len() < error.len() - 200);
        // Any router can have sent it: it does not tell where the flow is.
        assert_eq!(path(&world, &key(A, 6, client, server)), before);
    }
}

#[test]
fn link_local_addresses_are_not_intercepted() {
    for hook in ENTRIES {
        let mut world = world(WORKLOAD, A, EGRESS);
        world.address("fe80::a", A, A_IDENTITY);
        for (client, server) in [("fe80::a", "fe80::1"), (A_V6, "fe80::1"), ("fe80::a", WORLD_V6)] {
            let syn = tcp((client, 4000), (server, 80), SYN);
            assert_eq!(world.run(hook, &syn).reason, Reason::PuntUnsupported);
        }
    }
}

#[test]
fn the_node_as_client_has_its_answers_delivered_at_the_nic() {
    for (client, server) in [
        ((HOST_V4, 4000), (WORLD_V4, 80)),
        ((HOST_V6, 4000), (WORLD_V6, 80)),
    ] {
        let mut world = world(NIC, HOST, EGRESS);
        let syn = with_mac(tcp(client, server, SYN), FAR_MAC, HOST_MAC);
        let got = world.run_local(&syn);
        to_proxy(&got, &syn);
        let answer = with_mac(tcp(server, client, SYN | ACK), PROXY[0], PROXY[1]);
        let got = world.run_marked(programs::PROXY, &answer, 0, IFINDEX);
        assert_eq!((got.retval, got.mark), (REDIRECT, MARK));
        assert_eq!((destination(&got.frame), source(&got.frame)), (HOST_MAC, FAR_MAC));
        let got = world.run_marked(programs::PROXY, &syn, 0, IFINDEX);
        assert_eq!((destination(&got.frame), source(&got.frame)), (FAR_MAC, HOST_MAC));
        // The server's answer enters by the NIC, and a forged one does not change the path.
        let answer = with_mac(answer, HOST_MAC, [7; 6]);
        to_proxy(&world.run(Hook::TcIn, &answer), &answer);
        let flow = path(&world, &key(HOST, 6, client, server));
        assert_eq!((flow.near, flow.far), (HOST_MAC, FAR_MAC));
    }
}

#[test]
fn the_request_of_an_intercepted_flow_has_the_direction_of_the_flow() {
    // Server of a workload: the verdict is at the egress of the workload's interface.
    let (client, server): (End, End) = ((WORLD_V4, 4000), (A_V4, 80));
    let mut world = world(WORKLOAD, A, INGRESS);
    let syn = with_mac(tcp(client, server, SYN), FAR_MAC, HOST_MAC);
    let got = world.run_marked(programs::TC_EGRESS, &syn, 0, GUARDED);
    assert_eq!(
        (got.retval, destination(&got.frame)),
        (REDIRECT, PROXY_MAC),
        "{got:?}"
    );
    // The proxy's connection goes to the workload, its answers leave as if the workload had sent them.
    let got = world.run_marked(programs::PROXY, &syn, 0, IFINDEX);
    assert_eq!((destination(&got.frame), source(&got.frame)), (FAR_MAC, HOST_MAC));
    let answer = tcp(server, client, SYN | ACK);
    let got = world.run_marked(programs::PROXY, &answer, 0, IFINDEX);
    assert_eq!((destination(&got.frame), source(&got.frame)), (HOST_MAC, FAR_MAC));
    // Without the link of the ingress direction it is dropped, though the other one exists.
    world.config(|config| {
        links(INGRESS)(config);
        config.proxy_ifindex = [0, IFINDEX];
    });
    let got = world.run_marked(programs::TC_EGRESS, &syn, 0, GUARDED);
    assert_eq!((got.retval, got.reason), (SHOT, Some(Reason::NoProxy)));
}
