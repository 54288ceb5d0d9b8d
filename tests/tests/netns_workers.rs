//! Workers without a working punt link: no denied packet passes, `status` reports it, and inspection resumes without a
//! restart of the daemon.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, daemon::Settings, dns::Scripted, ns::wait_until, topology::FAMILIES, web::Web,
};
use palisade_tests::{
    fixtures::apps::{Apps, Loop, apps},
    fixtures::dns::{counted, zone},
    setup::{daemon_with, question, request, tables, webs},
};
use serde_json::Value;

/// Allows the client one name and one path.
const POLICY: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: www.example}]
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http: [{path: /ok}]
"#;

/// Drop reason while no worker runs.
const NO_WORKER: u64 = 230;
/// Longest time for work that needs a CPU for some milliseconds.
const LONG: Duration = Duration::from_secs(60);
/// Responses that each kind of traffic must get for its results to count.
const ENOUGH: usize = 6;
const NOERROR: u16 = 0;
const REFUSED: u16 = 5;

/// A client that sends allowed and denied queries and requests without a pause, and its servers.
struct Busy {
    daemon: Daemon,
    apps: Arc<Apps>,
    resolver: Scripted,
    web: Web,
    traffic: [Traffic; 4],
}

/// Sends one query or request; `None`: no response.
type Ask<'a> = &'a dyn Fn() -> Option<u16>;

/// A loop of one query or request.
struct Traffic {
    what: &'static str,
    /// The response while a worker inspects.
    expected: u16,
    /// Attempts with a response so far.
    answered: Arc<AtomicUsize>,
    /// The responses of all attempts.
    attempts: Loop<Option<u16>>,
}

impl Traffic {
    fn start(
        what: &'static str,
        expected: u16,
        mut ask: impl FnMut(usize) -> Option<u16> + Send + 'static,
    ) -> Self {
        let answered = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&answered);
        let attempts = Loop::start(move |n| {
            let answer = ask(n);
            counted.fetch_add(usize::from(answer.is_some()), Relaxed);
            answer
        });
        Self {
            what,
            expected,
            answered,
            attempts,
        }
    }
}

/// Returns how often each worker was restarted.
fn restarts(status: &Value) -> Vec<u64> {
    let workers = status["workers"]["workers"].as_array();
    let workers = workers.into_iter().flatten();
    workers.filter_map(|worker| worker["restarts"].as_u64()).collect()
}

impl Busy {
    fn start() -> Self {
        let busy =
            Self::start_with(|apps, settings, policies| daemon_with(&apps.topology, settings, policies));
        busy.reads();
        busy
    }

    /// Starts the traffic; `daemon` starts the daemon.
    fn start_with(daemon: impl FnOnce(&Apps, &Settings, &[(&str, &str)]) -> Daemon) -> Self {
        let apps = apps();
        let resolver = Scripted::start(apps.ns("internet"), &apps.both("internet"), zone).expect("resolver");
        let [web] = webs(&apps, ["internet"], &[80], &[]);
        let settings = tables("[worker]\nthreads = 2\n");
        let daemon = daemon(&apps, &settings, &[("client.yaml", POLICY)]);
        let apps = Arc::new(apps);
        let asks = |name: &'static str, expected| {
            let apps = apps.clone();
            Traffic::start(name, expected, move |n| question(&apps, FAMILIES[n % 2], name))
        };
        let requests = |path: &'static str, expected| {
            let apps = apps.clone();
            Traffic::start(path, expected, move |n| request(&apps, FAMILIES[n % 2], path))
        };
        Self {
            traffic: [
                asks("www.example", NOERROR),
                asks("evil.example", REFUSED),
                requests("/ok", 200),
                requests("/denied", 403),
            ],
            daemon,
            apps,
            resolver,
            web,
        }
    }

    /// Asserts that allowed queries and requests are answered and denied ones refused, both by a worker. Repeats each: a
    /// query is sent once and waits for some milliseconds, so it may come too early or be answered too late.
    #[track_caller]
    fn reads(&self) {
        for family in FAMILIES {
            let asks: [(&str, u16, Ask<'_>); 4] = [
                ("www.example", NOERROR, &|| {
                    question(&self.apps, family, "www.example")
                }),
                ("evil.example", REFUSED, &|| {
                    question(&self.apps, family, "evil.example")
                }),
                ("/ok", 200, &|| request(&self.apps, family, "/ok")),
                ("/denied", 403, &|| request(&self.apps, family, "/denied")),
            ];
            for (what, expected, ask) in asks {
                let mut got = None;
                let read = wait_until("it is read", LONG, || {
                    got = ask();
                    got.is_some()
                });
                assert!(
                    read.is_ok() && got == Some(expected),
                    "{what} {family:?}: {got:?}\n{}",
                    self.daemon.report()
                );
            }
        }
    }

    fn ip(&self, lines: &str) {
        self.apps.ns("node").ip(lines).expect("ip");
    }

    fn status(&self) -> Value {
        self.daemon.status().expect("status")
    }

    /// Returns the names of the punt link's two ends.
    fn punt_link(&self) -> [String; 2] {
        let end = self.status()["workers"]["punt_link"]
            .as_str()
            .expect("punt_link")
            .to_owned();
        let other = format!("{}1", end.trim_end_matches('0'));
        [end, other]
    }

    /// Runs `damage` on the punt link, then waits until the link is repaired and everything is inspected. `anew`: whether
    /// the workers must restart for that.
    #[track_caller]
    fn survives(&self, what: &str, anew: bool, fault: impl FnOnce()) {
        let ends = self.punt_link();
        let before = restarts(&self.status());
        let begun = Instant::now();
        fault();
        let is_up = |end: &String| {
            let shown = self
                .apps
                .ns("node")
                .run("ip", &["-o", "link", "show", "dev", end]);
            shown.is_ok_and(|shown| shown.contains(",UP,"))
        };
        let done = self.daemon.wait_status(what, |status| {
            let restarted = restarts(status)
                .iter()
                .zip(&before)
                .all(|(now, before)| now > before);
            status["ready"] == true && (restarted || !anew) && ends.iter().all(is_up)
        });
        done.unwrap_or_else(|error| panic!("{error:#}\n{}", self.daemon.report()));
        eprintln!("{what}: all is read again after {:?}", begun.elapsed());
        self.reads();
    }

    /// Ends the traffic. Asserts that nothing denied arrived and that the unrelated flow continued.
    fn finish(self) {
        let enough = wait_until("all traffic is answered", LONG, || {
            self.traffic
                .iter()
                .all(|traffic| traffic.answered.load(Relaxed) >= ENOUGH)
        });
        for traffic in self.traffic {
            let (what, results) = (traffic.what, traffic.attempts.finish());
            let answered = results.iter().flatten().count();
            eprintln!("{what}: {answered} of {} answered", results.len());
            assert!(answered >= ENOUGH, "{what}: {results:?}");
            assert!(
                results.iter().flatten().all(|code| *code == traffic.expected),
                "{what}: {results:?}"
            );
        }
        enough.expect("all traffic is answered");
        assert_eq!(self.resolver.requests_for("evil.example"), 0);
        let seen = self.web.seen();
        assert!(
            !seen.iter().any(|seen| seen.request.contains("denied")),
            "{seen:?}"
        );
        assert!(seen.iter().any(|seen| seen.request.contains("/ok")));
    }
}

#[test]
fn a_punt_link_that_is_deleted_set_down_or_moved_is_repaired() {
    let busy = Busy::start();
    let [node_end, worker_end] = busy.punt_link();
    busy.survives("deleted", true, || busy.ip(&format!("link del {node_end}\n")));
    let log = busy.daemon.log();
    for said in [
        "the punt link is down or gone",
        "the punt link was gone and is made again",
        "runs again",
    ] {
        assert!(log.contains(said), "{said}: {log}");
    }
    // A socket stays bound while its device is down (the kernel unbinds it only when the device is removed), so a worker
    // restarts only if its check runs before the daemon has set the link up again.
    for end in [&node_end, &worker_end] {
        busy.survives("set down", false, || busy.ip(&format!("link set {end} down\n")));
    }
    busy.survives("moved", true, || {
        busy.ip(&format!(
            "link set {worker_end} netns {}\n",
            busy.apps.ns("server").name()
        ));
    });
    busy.finish();
}

#[test]
fn without_a_punt_link_packets_that_need_inspection_drop_and_status_says_why() {
    let busy = Busy::start();
    let [node_end, worker_end] = busy.punt_link();
    // Renamed while it is in use, so that its name is taken before the daemon can make the link again.
    busy.ip(&format!(
        "link set {node_end} name away\nlink add {node_end} type bridge\n"
    ));
    busy.reads();
    busy.ip("link del away\n");
    let status = busy
        .daemon
        .wait_status("no worker runs", |status| {
            let missing = status["missing"].to_string();
            missing.contains("2 of 2 workers do not run") && missing.contains("[worker] interface")
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", busy.daemon.report()));
    assert_eq!(status["ready"], false);
    let asked = busy.resolver.queries().len();
    let dropped = counted(&status, NO_WORKER);
    let counted = busy.daemon.wait_status("questions are dropped", |status| {
        counted(status, NO_WORKER) > dropped + 20
    });
    counted.unwrap_or_else(|error| panic!("{error:#}"));
    for family in FAMILIES {
        for name in ["www.example", "evil.example"] {
            assert_eq!(question(&busy.apps, family, name), None);
        }
    }
    assert_eq!(
        busy.resolver.queries().len(),
        asked,
        "queries pass without inspection"
    );
    let log = busy.daemon.log();
    let said = log
        .matches("an interface of this name exists and is not a veth")
        .count();
    assert_eq!(said, 1, "logged once: {log}");
    assert!(log.lines().count() < 60, "{log}");
    busy.survives("the name is free", false, || {
        busy.ip(&format!("link del {node_end}\n"))
    });
    assert_eq!(busy.punt_link(), [node_end, worker_end]);
    busy.finish();
}

#[test]
fn a_missing_punt_link_is_made_once_its_name_is_free() {
    // The second end: a socket could be bound to the foreign interface, and no worker may do that.
    for taken in ["palisade0", "palisade1"] {
        let busy = Busy::start_with(|apps, settings, policies| {
            apps.ns("node")
                .ip(&format!("link add {taken} type bridge\nlink set {taken} up\n"))
                .expect("ip");
            let mut daemon = Daemon::prepare(&apps.topology, settings, policies).expect("daemon");
            daemon.spawn().expect("spawn");
            // Nothing is enforced before, and there must be no traffic yet.
            let told = wait_until("no worker runs", Duration::from_secs(60), || {
                daemon.status().is_ok_and(|status| {
                    let missing = status["missing"].to_string();
                    missing.contains("2 of 2 workers do not run") && missing.contains("[worker] interface")
                })
            });
            told.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
            daemon
        });
        for family in FAMILIES {
            for name in ["www.example", "evil.example"] {
                assert_eq!(question(&busy.apps, family, name), None, "{taken}");
            }
        }
        assert_eq!(
            busy.resolver.queries().len(),
            0,
            "queries pass without inspection"
        );
        assert!(counted(&busy.status(), NO_WORKER) > 0, "{:#}", busy.status());
        let log = busy.daemon.log();
        let said = log
            .matches("an interface of this name exists and is not a veth")
            .count();
        assert_eq!(said, 1, "logged once: {log}");
        busy.survives("the name is free", false, || {
            busy.ip(&format!("link del {taken}\n"))
        });
        busy.finish();
    }
}
