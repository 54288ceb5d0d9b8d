//! The nftables table as nft lists it, in namespaces.

use palisade_datapath::{Netfilter, NetfilterError, Rules};
use palisade_testbed::ns::Ns;
use serde_json::Value;

/// Returns the JSON of nft for the table, without handles and counter values.
fn listed(ns: &Ns, family: &str) -> Value {
    let text = ns
        .run("nft", &["-j", "list", "table", family, "palisade"])
        .unwrap_or_else(|error| panic!("{error:#}"));
    let mut listed: Value = serde_json::from_str(&text).unwrap();
    forget(&mut listed, &["handle", "metainfo"]);
    listed
}

fn forget(value: &mut Value, names: &[&str]) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| forget(value, names)),
        Value::Object(fields) => {
            names.iter().for_each(|name| drop(fields.remove(*name)));
            fields.values_mut().for_each(|value| forget(value, names));
        }
        _ => {}
    }
}

fn rules() -> Rules {
    Rules {
        enforced: [1, 77].into(),
        workloads: [77].into(),
        names: ["eth0", "veth-a"].map(str::to_owned).into(),
        patterns: [].into(),
        endpoints: ["10.0.1.10", "fd00::10"].map(|a| a.parse().unwrap()).into(),
        own: ["192.0.2.1/32", "198.51.100.0/24", "2001:db8::1/128"]
            .map(|a| a.parse().unwrap())
            .into(),
        forwards: true,
        is_enforced: true,
        has_nat: true,
        has_bridge: true,
    }
}

/// `rules()` as a script for nft.
const SCRIPT: &str = r#"
table inet palisade {
  comment "palisade, pins in /p"
  counter unguarded_in { }
  counter unguarded_out { }
  counter translated { }
  set enforced { type iface_index; size 2; elements = { "lo", "v0" } }
  set workloads { type iface_index; size 1; elements = { "v0" } }
  set names { type ifname; size 2; elements = { "eth0", "veth-a" } }
  set endpoints4 { type ipv4_addr; size 1; elements = { 10.0.1.10 } }
  set endpoints6 { type ipv6_addr; size 1; elements = { fd00::10 } }
  set own4 { type ipv4_addr; flags interval; elements = { 192.0.2.1, 198.51.100.0/24, 224.0.0.0/3 } }
  set own6 { type ipv6_addr; flags interval; elements = { 2001:db8::1, ff00::/8 } }
  chain input {
    type filter hook input priority 300;
    iif 1 accept comment "the node itself"
    meta nfproto ipv4 ip saddr @endpoints4 iif != @workloads counter name "unguarded_in" drop comment "219: an address of a workload by an interface that is not guarded"
    meta nfproto ipv6 ip6 saddr @endpoints6 iif != @workloads counter name "unguarded_in" drop comment "219: an address of a workload by an interface that is not guarded"
    meta nfproto ipv6 meta l4proto ipv6-icmp iif != @enforced icmpv6 type >= 135 icmpv6 type <= 136 ip6 hoplimit 255 ip6 daddr @own6 accept comment "neighbour discovery"
    iif != @enforced iifname @names counter name "unguarded_in" drop comment "219: configured and not guarded"
    meta mark != 0 iif @enforced meta nfproto ipv4 ip daddr != @own4 fib daddr type != 2 fib daddr type != 3 fib daddr type != 4 fib daddr type != 5 counter name "translated" drop comment "229: redirected to the node by TPROXY or a mark"
    meta mark != 0 iif @enforced meta nfproto ipv6 ip6 daddr != @own6 fib daddr type != 2 fib daddr type != 3 fib daddr type != 4 fib daddr type != 5 counter name "translated" drop comment "229: redirected to the node by TPROXY or a mark"
    ct direction original ct status & dnat != 0 iif @enforced ct original ip daddr != @own4 counter name "translated" drop comment "229: redirected to the node by DNAT"
    ct direction original ct status & dnat != 0 iif @enforced ct original ip6 daddr != @own6 counter name "translated" drop comment "229: redirected to the node by DNAT"
  }
  chain forward {
    type filter hook forward priority 300;
    iif @enforced accept
    iifname @names counter name "unguarded_in" drop comment "219: configured and not guarded"
    oif != @enforced oifname @names counter name "unguarded_out" drop comment "219: configured and not guarded"
  }
  chain output {
    type filter hook output priority 300;
    meta nfproto ipv6 meta l4proto ipv6-icmp oif != @enforced icmpv6 type >= 135 icmpv6 type <= 136 ip6 hoplimit 255 accept comment "neighbour discovery"
    oif != @enforced oifname @names counter name "unguarded_out" drop comment "219: configured and not guarded"
  }
}
table bridge palisade {
  comment "palisade, pins in /p"
  counter unguarded_in { }
  counter unguarded_out { }
  set enforced { type iface_index; size 2; elements = { "lo", "v0" } }
  set names { type ifname; size 2; elements = { "eth0", "veth-a" } }
  chain prerouting {
    type filter hook prerouting priority -300;
    iif @enforced accept
    iifname @names counter name "unguarded_in" drop comment "219: configured and not guarded"
  }
  chain postrouting {
    type filter hook postrouting priority 300;
    oif @enforced accept
    oifname @names counter name "unguarded_out" drop comment "219: configured and not guarded"
  }
}
"#;

fn namespace() -> Ns {
    let ns = Ns::new("nft").unwrap_or_else(|error| panic!("{error:#}"));
    ns.ip("link add v0 index 77 type veth peer name v1").unwrap();
    ns
}

#[test]
fn nft_lists_and_restores_the_table() {
    let (own, other) = (namespace(), namespace());
    other.nft(SCRIPT).unwrap();
    let lacking = own.enter(|| Netfilter::open("palisade", "palisade, pins in /p")?.write(&rules()));
    assert_eq!(lacking.unwrap(), [""; 0]);
    for family in ["inet", "bridge"] {
        let (ours, wanted) = (listed(&own, family), listed(&other, family));
        for (ours, wanted) in ours["nftables"]
            .as_array()
            .unwrap()
            .iter()
            .zip(wanted["nftables"].as_array().unwrap())
        {
            assert_eq!(ours, wanted, "\n{ours}\n{wanted}");
        }
        assert_eq!(ours, wanted);
    }
}

#[test]
fn the_table_is_replaced_and_removed_and_other_tables_stay() {
    let ns = namespace();
    ns.nft("table inet operator {\n chain c { type filter hook input priority 0; }\n}")
        .unwrap();
    let operator = || ns.run("nft", &["list", "table", "inet", "operator"]).unwrap();
    let before = operator();
    ns.enter(|| {
        let mut table = Netfilter::open("palisade", "a").unwrap();
        assert_eq!(table.counts().unwrap().len(), 0);
        table.write(&rules()).unwrap();
        let mut more = rules();
        // More elements than one message and the default send buffer of a socket can hold.
        for n in 0..6_000_u32 {
            more.endpoints
                .insert(std::net::Ipv4Addr::from_bits(0x0a01_0000 + n).into());
            more.own
                .insert(format!("2001:db8:1:{n:x}::/128").parse().unwrap());
        }
        table.write(&more).unwrap();
        table
            .write(&Rules {
                has_bridge: false,
                ..rules()
            })
            .unwrap();
        // The same daemon with another table name.
        Netfilter::open("palisade2", "a")
            .unwrap()
            .write(&rules())
            .unwrap();
    });
    let tables = || ns.run("nft", &["list", "tables"]).unwrap();
    assert_eq!(
        tables(),
        "table inet operator\ntable inet palisade2\ntable bridge palisade2\n"
    );
    let refused = ns.enter(|| Netfilter::open("palisade2", "b").unwrap().write(&rules()));
    assert!(
        matches!(refused, Err(NetfilterError::Foreign { .. })),
        "{refused:?}"
    );
    let refused = ns.enter(|| Netfilter::open("operator", "b").unwrap().write(&rules()));
    assert!(
        matches!(refused, Err(NetfilterError::Foreign { .. })),
        "{refused:?}"
    );
    let before_removal = tables();
    ns.enter(|| {
        Netfilter::open("palisade2", "b")
            .unwrap()
            .write(&Rules::default())
    })
    .unwrap();
    assert_eq!(tables(), before_removal);
    ns.enter(|| Netfilter::open("palisade2", "a").unwrap().remove())
        .unwrap();
    ns.enter(|| Netfilter::open("palisade2", "a").unwrap().remove())
        .unwrap();
    assert_eq!(tables(), "table inet operator\n");
    assert_eq!(operator(), before);
}

#[test]
fn counters_survive_a_replacement_of_the_table() {
    let ns = namespace();
    // Multicast reports of a new interface would be counted at an unpredictable time.
    ns.sysctl("ipv6/conf/all/disable_ipv6", "1").unwrap();
    ns.ip("addr add 192.0.2.1/24 dev v0\nlink set v0 up\nlink set v1 up")
        .unwrap();
    let rules = Rules {
        names: ["v0".to_owned()].into(),
        ..Rules::default()
    };
    let counts = ns.enter(|| {
        let mut table = Netfilter::open("palisade", "a").unwrap();
        table.write(&rules).unwrap();
        let socket = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        for _ in 0..3 {
            // A drop at the output hook is an error of sendto (EPERM).
            let _ = socket.send_to(b"x", "192.0.2.255:9");
        }
        let first = table.counts().unwrap();
        table.write(&rules).unwrap();
        (first, table.counts().unwrap())
    });
    assert_eq!(counts.0, counts.1);
    let [(reason, _, count)] = counts.0[..] else {
        panic!("{counts:?}")
    };
    assert_eq!(reason, palisade_abi::Reason::Unguarded);
    assert!(count.packets >= 3 && count.bytes >= 3 * 29, "{counts:?}");
}
