//! DNS over TCP with real programs: refusals, connections with several queries, queries in pieces, long answers, zone
//! transfers.

use std::{net::IpAddr, time::Duration};

use palisade_testbed::{
    dns::Server,
    output,
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    fixtures::dns::{EVIL, Names, counted, names, resolver, site},
    setup::daemon,
};

/// Names that the client may query, and at which servers.
const CLIENT: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world, host]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns:
        - matchName: www.example
        - matchName: mail.example
        - matchName: slow.example
        - matchName: silent.example
        - matchName: long.example
        - matchName: many.shop
        - matchName: zone
  - toFQDNs: [{matchName: www.example}, {matchPattern: "*.shop"}, {matchPattern: "*.zone"}, {matchName: zone}]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
"#;

/// Sends queries over one connection and prints id and code of each response, and how the connection ends.
///
/// ask.py SERVER PAUSE CUTS NAME...: all queries form one stream; each cut is an offset at which a new write begins, after
/// a pause in ms.
const ASK: &str = r#"
import socket, struct, sys, time

def query(number, name):
    wire = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", number, 0x100, 1, 0, 0, 0) + wire + b"\0" + struct.pack("!2H", kind, 1)

server, pause, cuts, names = sys.argv[1], int(sys.argv[2]) / 1000, sys.argv[3], sys.argv[4:]
family, kind = (socket.AF_INET6, 28) if ":" in server else (socket.AF_INET, 1)
stream = b"".join(struct.pack("!H", len(q)) + q for q in (query(n, name) for n, name in enumerate(names)))
cuts = range(1, len(stream)) if cuts == "all" else [int(cut) for cut in cuts.split(",") if cut]
s = socket.socket(family, socket.SOCK_STREAM)
s.settimeout(6)
# Nagle's algorithm is on: what is written while something is not acknowledged waits
s.connect((server, 53))
for start, end in zip([0, *cuts], [*cuts, len(stream)]):
    if start:
        time.sleep(pause)
    s.sendall(stream[start:end])
got = b""
answers = 0
try:
    while answers < len(names):
        part = s.recv(65536)
        if not part:
            print("end")
            break
        got += part
        while len(got) >= 2 and len(got) >= 2 + struct.unpack("!H", got[:2])[0]:
            (length,) = struct.unpack("!H", got[:2])
            number, flags = struct.unpack("!2H", got[2:6])
            print(number, flags & 15)
            answers += 1
            got = got[2 + length:]
except ConnectionResetError:
    print("reset")
except TimeoutError:
    print("nothing")
"#;

/// Runs [`ASK`] in the namespace of a name.
#[track_caller]
fn ask(names: &Names, from: &str, server: IpAddr, pause: u32, cuts: &str, asked: &[&str]) -> String {
    let mut python = names.ns(from).command("python3");
    python
        .args(["-c", ASK, &server.to_string(), &pause.to_string(), cuts])
        .args(asked);
    let out = output(&mut python, Duration::from_secs(20)).expect("python");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).replace('\n', ";")
}

#[test]
fn a_refusal_follows_the_answers_to_earlier_queries() {
    let names = names();
    let daemon = daemon(&names.topology, &[("client.yaml", CLIENT)]);
    for family in FAMILIES {
        let server = resolver(family);
        let says = |pause, cuts: &str, asked: &[&str], expected: &str| {
            let got = ask(&names, "client", server, pause, cuts, asked);
            assert_eq!(got, expected, "{asked:?} cut {cuts}\n{}", daemon.report());
        };
        names.is_refused_over_tcp(&daemon, "client", server, "evil.example");
        names.is_refused_over_tcp(&daemon, "client", server, "api.example");
        let refused = names.questions("evil.example");
        let (www, evil) = ("www.example", "evil.example");
        // One after the other, and both at once; the length prefix apart from its message; byte by byte.
        says(0, "", &[www], "0 0;");
        says(0, "2", &[www], "0 0;");
        says(300, "2", &[www], "0 0;");
        says(0, "20", &[www], "0 0;");
        says(50, "1,3,20", &[www], "0 0;");
        says(1, "all", &[www], "0 0;");
        says(0, "", &[evil], "0 5;");
        says(0, "2", &[evil], "0 5;");
        says(1, "all", &[evil], "0 5;");
        says(0, "", &[evil, www], "0 5;end;");
        says(0, "31", &[www, evil], "0 0;1 5;");
        says(100, "31", &[www, evil], "0 0;1 5;");
        says(0, "31,63", &[www, "mail.example", evil], "0 0;1 0;2 5;");
        // The resolver is slow.
        says(0, "32", &["slow.example", evil], "0 0;1 5;");
        says(0, "32,63", &["slow.example", www, evil], "0 0;1 0;2 5;");
        // All in one write.
        says(0, "", &[www, evil], "0 0;1 5;");
        says(0, "", &[www, "mail.example", evil, evil], "0 0;1 0;2 5;3 5;");
        says(0, "", &[evil, "api.example", www], "0 5;1 5;end;");
        assert_eq!(names.questions(evil), refused, "{}", daemon.report());
        // The resolver does not answer: the connection ends without a refusal, but ends.
        let got = ask(&names, "client", server, 0, "34", &["silent.example", evil]);
        assert!(got == "nothing;" || got == "reset;", "{got}\n{}", daemon.report());
        names.reaches(&daemon, "client", 10, family);
        names.does_not_reach(&daemon, "client", EVIL, family);
    }
    daemon
        .wait_status("denied queries are counted", |status| counted(status, 240) >= 10)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    // dig sends both queries over one connection.
    let text = names
        .dig(
            "client",
            resolver(Family::V4),
            &["+tcp", "+keepopen", "www.example", "A", "evil.example", "A"],
        )
        .text;
    assert!(text.contains("status: NOERROR"), "{text}");
    assert!(text.contains("status: REFUSED"), "{text}");
}

#[test]
fn long_answers_and_zone_transfers_pass() {
    const MANY: usize = 1_200;
    let names = names();
    let t = &names.topology;
    let server: IpAddr = "192.0.2.63".parse().expect("address");
    t.internet.ip("addr add 192.0.2.63/32 dev lo\n").expect("address");
    let mut records: Vec<String> = (0..MANY)
        .map(|n| format!("many.shop. 60 IN A 198.18.{}.{}", n / 250, n % 250 + 1))
        .collect();
    // More records than one message holds.
    records.extend((0..9_000).map(|n| format!("h{n}.zone. 60 IN A 198.19.{}.{}", n / 250, n % 250 + 1)));
    records.push(format!("zone. 60 IN A {}", site(EVIL, Family::V4)));
    records.push(format!("www.secret. 60 IN A {}", site(EVIL, Family::V4)));
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let _knot = Server::knot(&t.internet, &[server], &records).expect("knot");
    let daemon = daemon(&names.topology, &[("client.yaml", CLIENT)]);

    let dug = names.dig("client", server, &["many.shop", "A", "+tcp"]);
    assert_eq!(dug.answers.len(), MANY, "{}\n{}", dug.text, daemon.report());

    // dig prints the records of a transfer, and the number of messages.
    let transfer = |from: &str, asked: &[&str]| {
        let text = names.dig(from, server, asked).text;
        let records = text
            .lines()
            .filter(|line| !line.starts_with(';') && !line.is_empty());
        let messages = text
            .split_once("(messages ")
            .and_then(|(_, rest)| rest.split_once(','));
        let messages: usize = messages.map_or(0, |(count, _)| count.parse().expect("a number"));
        (records.map(str::to_owned).collect::<Vec<_>>(), messages)
    };
    let (whole, messages) = transfer("internet", &["zone", "AXFR"]);
    assert!(whole.len() > 9_000 && messages > 1, "{messages} {whole:?}");
    for asked in [&["zone", "AXFR"][..], &["zone", "IXFR=0", "+tcp"]] {
        let (records, messages) = transfer("client", asked);
        assert!(messages > 1, "{asked:?} {records:?}\n{}", daemon.report());
        assert_eq!(records, whole, "{asked:?}\n{}", daemon.report());
    }
    // Addresses in a zone transfer are not learned.
    names.does_not_reach(&daemon, "client", EVIL, Family::V4);
    let dug = names.dig("client", server, &["zone", "A", "+tcp"]);
    assert_eq!(dug.status, "NOERROR", "{}\n{}", dug.text, daemon.report());
    names.reaches(&daemon, "client", EVIL, Family::V4);
    // A transfer of another zone is refused.
    let dug = names.dig("client", server, &["secret", "AXFR"]);
    assert!(dug.answers.is_empty(), "{}", dug.text);
    assert!(
        dug.text.contains("REFUSED") || dug.text.contains("Transfer failed"),
        "{}",
        dug.text
    );
}
