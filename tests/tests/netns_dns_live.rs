//! DNS under load: races between an answer and the connection that follows it, reloads, crashes, stopped workers. Nothing
//! allowed is lost, nothing denied passes.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use palisade_testbed::{
    Daemon,
    daemon::Settings,
    dns::{PORT, PerfPlan, query, rtype},
    load::{Leak, TcpLoad},
    ns::wait_until,
    topology::{FAMILIES, Family, INNER},
    web::curl,
};
use palisade_tests::{
    OPEN,
    fixtures::dns::{EVIL, Finish, Names, counted, names, resolver, site},
};
use serde_json::Value;

/// Port of a connection that lasts for the whole test.
const LOAD: u16 = 8082;

/// Returns a policy that allows the client to query these names and to connect to their addresses; `n` changes its text
/// only.
fn policy(n: usize) -> String {
    let extra: String = (0..n % 5)
        .map(|m| format!("        - matchName: extra{n}-{m}.example\n"))
        .collect();
    let web = if n.is_multiple_of(2) {
        "    - matchPattern: \"*.wild.example\"\n"
    } else {
        "    - matchPattern: \"*.example\"\n"
    };
    let last = 8090 + n % 7;
    format!(
        "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: client}}
spec:
  endpointSelector: {{matchLabels: {{app: client}}}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{{port: \"53\", protocol: ANY}}]
      rules:
        dns:
        - matchName: www.example
        - matchPattern: \"*.wild.example\"
        - matchPattern: \"*.race.example\"
{extra}  - toFQDNs:
    - matchName: www.example
    - matchPattern: \"*.race.example\"
{web}    toPorts:
    - ports: [{{port: \"80\", endPort: {last}, protocol: ANY}}]
"
    )
}

fn start(names: &Names, tables: &str) -> Daemon {
    let settings = Settings {
        tables: tables.into(),
        ..Settings::default()
    };
    names
        .daemon(&settings, &[("client.yaml", &policy(0))])
        .expect("daemon")
}

/// Returns `count` allowed names below `wild`.
fn allowed(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("h{n}.wild.example A")).collect()
}

fn plan(names: &[String], family: Family, seconds: u32, rate: u32) -> PerfPlan<'_> {
    PerfPlan {
        server: SocketAddr::new(resolver(family), PORT),
        queries: names,
        seconds,
        clients: 4,
        rate: Some(rate),
        outstanding: 400,
        listed: false,
        tcp: false,
    }
}

fn race(family: Family, reload: bool) {
    const ROUNDS: u32 = 5_000;
    let names = names();
    let daemon = start(&names, "");
    let _finish = Finish::start(&names).expect("listeners");
    let raced = thread::scope(|scope| {
        let race = scope.spawn(|| names.race(family, 1, ROUNDS, 100));
        let mut n = 1;
        while reload && !race.is_finished() {
            daemon.apply(&[("client.yaml", &policy(n))]).expect("apply");
            n += 1;
        }
        assert!(!reload || n > 3, "only {n} reloads");
        race.join().expect("race")
    });
    assert_eq!(raced.asked, ROUNDS);
    assert_eq!(
        (raced.unanswered, raced.wrong, raced.unconnected),
        (0, 0, 0),
        "{raced:?}\n{}",
        daemon.report()
    );
}

#[test]
fn a_connection_right_after_its_answer_is_never_lost_v4() {
    race(Family::V4, false);
}

#[test]
fn a_connection_right_after_its_answer_is_never_lost_v6() {
    race(Family::V6, false);
}

#[test]
fn a_connection_right_after_its_answer_is_never_lost_while_policies_change() {
    race(Family::V4, true);
}

#[test]
fn reload_under_load_loses_no_query_and_passes_no_denied_one() {
    let names = names();
    let daemon = start(&names, "");
    let (good, bad) = (
        allowed(50),
        vec!["evil.example A".to_owned(), "no.example AAAA".to_owned()],
    );
    let client = names.ns("client");
    let loads = [
        plan(&good, Family::V4, 6, 500).start(client).expect("dnsperf"),
        plan(&good, Family::V6, 6, 500).start(client).expect("dnsperf"),
        plan(&bad, Family::V4, 6, 200).start(client).expect("dnsperf"),
    ];
    let begin = Instant::now();
    let mut n = 0;
    while begin.elapsed() < Duration::from_secs(6) || n < 5 {
        n += 1;
        daemon.apply(&[("client.yaml", &policy(n))]).expect("apply");
    }
    let [v4, v6, refused] = loads.map(|load| load.finish().expect("dnsperf"));
    for (perf, code) in [(&v4, "NOERROR"), (&v6, "NOERROR"), (&refused, "REFUSED")] {
        assert!(perf.sent > 500, "{perf:?}");
        assert_eq!(perf.lost, 0, "{perf:?}, {n} reloads\n{}", daemon.report());
        assert_eq!(
            perf.rcodes.get(code),
            Some(&perf.sent),
            "{perf:?}\n{}",
            daemon.report()
        );
    }
    assert_eq!(names.questions("evil.example") + names.questions("no.example"), 0);
}

/// Sends denied queries and connects to denied addresses until it is dropped.
struct Forbidden {
    leaks: Vec<Leak>,
}

impl Forbidden {
    fn start(names: &Names) -> Self {
        let leaks = FAMILIES.map(|family| {
            Leak::start(
                names.ns("client"),
                names.topology.addr("client", family),
                (&names.topology.internet, INNER),
                SocketAddr::new(site(EVIL, family), 80),
                Duration::from_millis(2),
            )
            .expect("leak prober")
        });
        Self { leaks: leaks.into() }
    }

    #[track_caller]
    fn finish(self) {
        for leak in self.leaks {
            let report = leak.finish();
            assert!(report.tried > 100 && report.leaked == 0, "{report:?}");
        }
    }
}

fn crash_under_load(restart_by: fn(&mut Daemon)) {
    let names = names();
    let mut daemon = start(&names, "");
    let client = names.ns("client");
    let forbidden = Forbidden::start(&names);
    let family = Family::V4;
    names.resolves(
        &daemon,
        "client",
        resolver(family),
        "www.example",
        site(10, family),
    );
    let live = TcpLoad::start(
        client,
        &names.topology.internet,
        SocketAddr::new(site(10, family), LOAD),
        Duration::from_millis(1),
    )
    .expect("a connection by a learned address");
    assert!(live.moves(50, OPEN), "{}", daemon.report());
    let (good, bad) = (allowed(20), vec!["evil.example A".to_owned()]);
    let loads = [
        plan(&good, family, 9, 300).start(client).expect("dnsperf"),
        plan(&bad, family, 9, 300).start(client).expect("dnsperf"),
    ];
    let mut dead_time = Duration::ZERO;
    for _ in 0..2 {
        thread::sleep(Duration::from_millis(700));
        daemon.kill9().expect("kill -9");
        let begin = Instant::now();
        // A flow without inspection continues. Packets that need inspection are dropped, after those in flight.
        assert!(live.moves(200, OPEN), "the connection stands still");
        let mut asked = names.resolver.queries().len();
        let quiet = wait_until("no more questions come", OPEN, || {
            thread::sleep(Duration::from_millis(300));
            std::mem::replace(&mut asked, names.resolver.queries().len()) == asked
        });
        quiet.expect("queries pass without inspection");
        thread::sleep(Duration::from_millis(300));
        assert_eq!(
            names.resolver.queries().len(),
            asked,
            "queries pass without inspection"
        );
        assert_eq!(
            names.questions("evil.example"),
            0,
            "a question that is denied has passed"
        );
        restart_by(&mut daemon);
        dead_time += begin.elapsed();
        // Learned before and still in the map.
        names.reaches(&daemon, "client", 10, family);
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
        assert!(live.moves(50, OPEN), "{}", daemon.report());
    }
    let [good, bad] = loads.map(|load| load.finish().expect("dnsperf"));
    assert_eq!(
        names.questions("evil.example"),
        0,
        "a question that is denied has passed"
    );
    assert!(
        good.completed > 300 && good.rcodes.get("NOERROR") == Some(&good.completed),
        "{good:?}\n{}",
        daemon.report()
    );
    assert!(
        bad.rcodes.get("REFUSED") == Some(&bad.completed),
        "{bad:?}\n{}",
        daemon.report()
    );
    eprintln!(
        "dead for {dead_time:?}: lost {} of {} questions that were allowed",
        good.lost, good.sent
    );
    let status = daemon.status().expect("status");
    assert!(
        counted(&status, 230) > 0,
        "nothing was dropped for want of a worker: {:#}",
        status["drops"]
    );
    let report = live.finish(OPEN);
    assert!(report.whole(), "{report:?}");
    forbidden.finish();
}

#[test]
fn kill9_under_load_fails_closed_and_a_restart_recovers() {
    crash_under_load(|daemon| daemon.restart().expect("restart"));
}

#[test]
fn queries_are_dropped_while_workers_are_stopped() {
    let names = names();
    let daemon = start(&names, "");
    let family = Family::V4;
    names.resolves(
        &daemon,
        "client",
        resolver(family),
        "www.example",
        site(10, family),
    );
    let pid = Pid::from_raw(daemon.pid().expect("pid").cast_signed());
    kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
    thread::sleep(Duration::from_millis(1500));
    let asked = names.resolver.queries().len();
    let queries = allowed(5);
    let perf = plan(&queries, family, 1, 100)
        .run(names.ns("client"))
        .expect("dnsperf");
    let passed = names.resolver.queries().len() - asked;
    kill(pid, Signal::SIGCONT).expect("SIGCONT");
    assert_eq!((perf.completed, passed), (0, 0), "{perf:?}");
    names.resolves(
        &daemon,
        "client",
        resolver(family),
        "www.example",
        site(10, family),
    );
    daemon
        .wait_status("drops for want of a worker are counted", |status| {
            counted(status, 230) >= perf.sent / 2
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    assert_eq!(
        names.resolver.requests_for("h0.wild.example"),
        0,
        "late queries were forwarded"
    );
}

#[test]
fn on_failure_pass_forwards_queries_while_workers_are_stopped() {
    let names = names();
    let mut daemon = start(&names, "[worker]\non_failure = \"pass\"\n");
    let family = Family::V4;
    names.is_refused(&daemon, "client", resolver(family), "evil.example");
    daemon.kill9().expect("kill -9");
    thread::sleep(Duration::from_millis(1500));
    for (name, n) in [("www.example", 10), ("evil.example", EVIL)] {
        let dug = names.dig("client", resolver(family), &[name, "A"]);
        assert_eq!(dug.answers, [site(n, family).to_string()], "{}", dug.text);
    }
    daemon.restart().expect("restart");
    names.is_refused(&daemon, "client", resolver(family), "other.example");
}

/// Sends datagrams with a query, and returns how many were sent.
fn flood(names: &Names, family: Family, name: &str, count: u64) -> u64 {
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let message = query(7, &[(name, rtype::A)]);
    names.ns("client").enter(|| {
        let socket = UdpSocket::bind((any, 0)).expect("socket");
        for _ in 0..count {
            let sent = socket.send_to(&message, (resolver(family), PORT));
            assert_eq!(sent.expect("send"), message.len());
        }
    });
    count
}

#[test]
fn packets_beyond_the_frames_of_a_stopped_worker_are_counted_drops() {
    let names = names();
    let daemon = start(
        &names,
        "[worker]\nthreads = 1\nframes = 256\n[metrics]\nlisten = \"127.0.0.1:9965\"\n",
    );
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
    }
    let before = daemon.status().expect("status");
    let worker = |status: &Value, path: &str| {
        let worker = &status["workers"]["workers"][0];
        let value = path.split('.').fold(worker, |value, key| &value[key]);
        value.as_u64().expect("a number")
    };
    let since = |status: &Value, path: &str| worker(status, path) - worker(&before, path);
    // Within the time that a heartbeat counts the programs go on to punt to the stopped worker.
    let pid = Pid::from_raw(daemon.pid().expect("pid").cast_signed());
    kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
    let sent: u64 = FAMILIES
        .map(|family| flood(&names, family, "evil.example", 2_000))
        .iter()
        .sum();
    kill(pid, Signal::SIGCONT).expect("SIGCONT");
    let by_programs = |status: &Value| -> u64 {
        let drops = status["drops"].as_array().into_iter().flatten();
        drops
            .filter(|drop| drop["reason"] == 230 || drop["reason"] == 231)
            .filter_map(|drop| drop["packets"].as_u64())
            .sum()
    };
    let at_rings = |status: &Value| since(status, "ring.rx_dropped") + since(status, "ring.rx_ring_full");
    let status = daemon
        .wait_status("each packet is received or counted as lost", |status| {
            let lost = at_rings(status) + by_programs(status) - by_programs(&before);
            since(status, "packets_in") + lost == sent
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{before:#}\n{}", daemon.report()));
    // Most of the packets found the fill ring empty, and the kernel drops a packet each time.
    let starved = since(&status, "ring.rx_fill_ring_empty");
    assert!(starved > sent / 2, "{status:#}");
    assert_eq!(starved, since(&status, "ring.rx_dropped"), "{status:#}");
    // The drops have the reason 234. The worker itself can shed some of the packets that it has received.
    let overloaded = counted(&status, 234) - counted(&before, 234);
    assert!(overloaded >= at_rings(&status), "{status:#}");
    let scrape = curl(names.ns("node"), &["http://127.0.0.1:9965/metrics"], OPEN).expect("curl");
    let metric = |name: &str| -> u64 {
        let line = scrape.body.lines().find_map(|line| line.strip_prefix(name));
        let value = line.unwrap_or_else(|| panic!("{name}: {}", scrape.body));
        value.trim().parse().expect("a number")
    };
    assert_eq!(
        metric("palisade_worker_fill_ring_empty_total{worker=\"0\"}"),
        worker(&status, "ring.rx_fill_ring_empty")
    );
    assert_eq!(
        metric("palisade_worker_ring_lost_packets_total{worker=\"0\",cause=\"dropped\"}"),
        worker(&status, "ring.rx_dropped")
    );
    assert_eq!(
        metric("palisade_worker_dropped_packets_total{worker=\"0\",reason=\"OVERLOADED\"}"),
        counted(&status, 234)
    );
    // Nothing has passed, and no frame is lost: the worker answers queries as before.
    assert_eq!(names.resolver.requests_for("evil.example"), 0);
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
    }
    daemon
        .wait_status("no frame is held", |status| worker(status, "held") == 0)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    assert_eq!(
        worker(&daemon.status().expect("status"), "frames"),
        worker(&before, "frames")
    );
}
