//! `palisade restart`: the inspection of connections goes on in the new program, at every point of a message, and nothing
//! denied passes meanwhile.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::MetadataExt as _, net::UnixDatagram},
    process::Stdio,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use palisade_testbed::{
    Daemon,
    daemon::Settings,
    ns::wait_until,
    topology::{FAMILIES, Family},
};
use palisade_tests::fixtures::apps::{Apps, OK, answers_requests, apps, policy};

const PORT: u16 = 80;
/// Longest time for a step on a machine under load: while no worker runs, the ends repeat what they have sent at ever
/// longer intervals.
const SOON: Duration = Duration::from_secs(100);
/// Time until held bytes are acknowledged on behalf of the receiver and delayed acknowledgements are sent.
const SETTLED: Duration = Duration::from_millis(300);

const GET: &[u8] = b"GET /a HTTP/1.1\r\nHost: x.example\r\n\r\n";
const DENIED: &[u8] = b"GET /secret HTTP/1.1\r\nHost: x.example\r\n\r\n";

fn rules(path: &str) -> String {
    let rules = format!("      rules:\n        http: [{{method: \"GET|POST\", path: \"{path}\"}}]\n");
    policy("client", "egress", &[PORT], &rules)
}

fn start(apps: &Apps) -> Daemon {
    apps.daemon(&Settings::default(), &[("p.yaml", &rules("/a.*"))])
        .expect("daemon")
}

fn listener(apps: &Apps, family: Family) -> TcpListener {
    let at = apps.at("internet", family, PORT);
    apps.ns("internet")
        .enter(|| TcpListener::bind(at))
        .expect("listener")
}

fn connect(apps: &Apps, at: SocketAddr) -> TcpStream {
    let stream = apps
        .ns("client")
        .enter(|| TcpStream::connect_timeout(&at, SOON))
        .expect("connection");
    stream.set_nodelay(true).expect("option");
    stream.set_read_timeout(Some(SOON)).expect("timeout");
    stream
}

/// Runs `palisade restart`. Returns its output.
#[track_caller]
fn restart(daemon: &Daemon) -> String {
    let before = daemon.pid();
    let output = daemon.cli(&["restart"]).expect("palisade restart");
    assert_eq!(before, daemon.pid());
    output
}

/// Both ends of a connection.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Pair {
    fn open(apps: &Apps, listener: &TcpListener) -> Self {
        let client = connect(apps, listener.local_addr().expect("address"));
        let (server, _) = listener.accept().expect("connection");
        server.set_nodelay(true).expect("option");
        server.set_read_timeout(Some(SOON)).expect("timeout");
        Self { client, server }
    }

    #[track_caller]
    fn client_says(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).expect("client");
    }

    #[track_caller]
    fn server_says(&mut self, bytes: &[u8]) {
        self.server.write_all(bytes).expect("server");
        take(&mut self.client, bytes);
    }

    #[track_caller]
    fn server_hears(&mut self, bytes: &[u8]) {
        take(&mut self.server, bytes);
    }

    /// Exchanges an allowed request; a denied one gets a 403, and nothing of it reaches the server.
    #[track_caller]
    fn goes_on(&mut self) {
        self.client_says(GET);
        self.server_hears(GET);
        self.server_says(OK);
        self.client_says(DENIED);
        let mut answer = Vec::new();
        self.client.read_to_end(&mut answer).expect("403");
        assert!(answer.starts_with(b"HTTP/1.1 403 "), "{answer:?}");
        let mut rest = Vec::new();
        match self.server.read_to_end(&mut rest) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
            _ => assert_eq!(rest, b""),
        }
    }
}

/// Reads exactly these bytes.
#[track_caller]
fn take(stream: &mut TcpStream, expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    stream.read_exact(&mut got).expect("bytes");
    assert_eq!(got, expected);
}

#[test]
fn http_connections_go_on_at_each_point_of_a_message() {
    let apps = apps();
    let daemon = start(&apps);
    for family in FAMILIES {
        let listener = listener(&apps, family);
        let open = || Pair::open(&apps, &listener);
        let mut idle = open();
        idle.client_says(GET);
        idle.server_hears(GET);
        idle.server_says(OK);
        let mut unused = open();
        let mut asked = open();
        asked.client_says(GET);
        asked.server_hears(GET);
        // The head is held, and after a moment acknowledged on behalf of the server.
        let mut head = open();
        head.client_says(&GET[..10]);
        let mut upload = open();
        let post = b"POST /a HTTP/1.1\r\nHost: x.example\r\nContent-Length: 20\r\n\r\n0123456789";
        upload.client_says(post);
        upload.server_hears(post);
        let mut chunked = open();
        chunked.client_says(GET);
        chunked.server_hears(GET);
        chunked.server_says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        thread::sleep(SETTLED);

        let output = restart(&daemon);
        assert!(
            output.contains("the inspection of 6 connections goes on, 0 connections cut"),
            "{output}"
        );

        idle.goes_on();
        unused.goes_on();
        asked.server_says(OK);
        asked.goes_on();
        head.client_says(&GET[10..]);
        head.server_hears(GET);
        head.server_says(OK);
        head.goes_on();
        upload.client_says(b"0123456789");
        upload.server_hears(b"0123456789");
        upload.server_says(OK);
        upload.goes_on();
        chunked.server_says(b"5\r\nhello\r\n0\r\n\r\n");
        chunked.goes_on();
    }
}

#[test]
fn the_rules_in_force_decide_about_the_next_request() {
    let apps = apps();
    let daemon = start(&apps);
    for family in FAMILIES {
        let listener = listener(&apps, family);
        let mut pair = Pair::open(&apps, &listener);
        pair.client_says(GET);
        pair.server_hears(GET);
        pair.server_says(OK);
        // The restart puts the file in force, whether or not the daemon has noticed it before.
        let file = fs::read_dir(daemon.policies())
            .expect("folder")
            .next()
            .expect("policy")
            .expect("entry");
        fs::write(file.path(), rules("/b.*")).expect("policy");
        restart(&daemon);
        pair.client_says(b"GET /b HTTP/1.1\r\nHost: x.example\r\n\r\n");
        pair.server_hears(b"GET /b HTTP/1.1\r\nHost: x.example\r\n\r\n");
        pair.server_says(OK);
        pair.client_says(GET);
        let mut answer = Vec::new();
        pair.client.read_to_end(&mut answer).expect("403");
        assert!(answer.starts_with(b"HTTP/1.1 403 "), "{answer:?}");
        daemon.apply(&[("p.yaml", &rules("/a.*"))]).expect("policy");
    }
}

#[test]
fn a_restart_that_takes_no_connection_over_says_why() {
    let apps = apps();
    let settings = Settings {
        tables: "[worker]\non_failure = \"pass\"\n".to_owned(),
        ..Settings::default()
    };
    let daemon = apps
        .daemon(&settings, &[("p.yaml", &rules("/a.*"))])
        .expect("daemon");
    let listener = listener(&apps, FAMILIES[0]);
    let mut pair = Pair::open(&apps, &listener);
    pair.client_says(GET);
    pair.server_hears(GET);
    pair.server_says(OK);
    let output = daemon.try_cli(&["restart"]).expect("palisade restart");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("on_failure"), "{said}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("1 connection cut"), "{said}");
}

/// The service manager sees one process, whose start it may wait for, and the process executes the program that an upgrade
/// has installed in place of the running one.
#[test]
fn the_new_program_is_executed_and_the_service_manager_is_told() {
    let apps = apps();
    let dir = tempfile::tempdir().expect("folder");
    let socket = UnixDatagram::bind(dir.path().join("notify")).expect("socket");
    socket.set_read_timeout(Some(SOON)).expect("timeout");
    let told_until = |last: &str| {
        let mut told = String::new();
        while !told.contains(last) {
            let mut buffer = [0; 512];
            let length = socket.recv(&mut buffer).expect("notification");
            told += &String::from_utf8_lossy(&buffer[..length]);
            told.push('\n');
        }
        told
    };
    let (installed, upgrade) = (dir.path().join("palisade"), dir.path().join("palisade.new"));
    let policies = [("p.yaml", rules("/a.*"))];
    let policies = policies.each_ref().map(|(name, text)| (*name, text.as_str()));
    let mut daemon = Daemon::prepare(&apps.topology, &Settings::default(), &policies).expect("daemon");
    let program = daemon.command(&[]).get_program().to_owned();
    let program = std::path::Path::new(&program);
    fs::copy(program, &installed).expect("copy");
    fs::copy(program, &upgrade).expect("copy");
    // The wrapper executes the copy in place of the program that is appended.
    daemon.start_through(
        [
            "env",
            &format!("NOTIFY_SOCKET={}", dir.path().join("notify").display()),
            "WATCHDOG_USEC=60000000",
            "sh",
            "-c",
            "shift; exec \"$0\" \"$@\"",
            installed.to_str().expect("text"),
        ]
        .map(str::to_owned)
        .to_vec(),
    );
    daemon.spawn().expect("process");
    daemon.wait().expect("daemon");
    told_until("READY=1");
    told_until("WATCHDOG_USEC=60000000");
    let executed = || {
        let pid = daemon.pid().expect("process");
        fs::metadata(format!("/proc/{pid}/exe")).expect("program").ino()
    };
    let new = fs::metadata(&upgrade).expect("program").ino();
    assert_ne!(executed(), new);
    fs::rename(&upgrade, &installed).expect("upgrade");
    restart(&daemon);
    assert_eq!(executed(), new);
    let told = told_until("READY=1");
    assert!(told.contains("WATCHDOG_USEC=300000000"), "{told}");
    assert!(!told.contains("STOPPING=1"), "{told}");
    told_until("WATCHDOG_USEC=60000000");
    // It was executed from the installed path, so a further upgrade is found, too.
    fs::copy(program, &upgrade).expect("copy");
    fs::rename(&upgrade, &installed).expect("upgrade");
    restart(&daemon);
    assert_ne!(executed(), new);
}

/// A service manager that stops the unit at this moment must not wait for its own deadline.
#[test]
fn a_signal_while_the_process_changes_programs_ends_it() {
    let apps = apps();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let daemon = start(&apps);
        let pid = Pid::from_raw(daemon.pid().expect("process").cast_signed());
        let mut command = daemon.command(&["restart"]);
        let mut command = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("palisade restart");
        wait_until("the end of the first program", SOON, || {
            daemon.log().contains("its program is executed again")
        })
        .expect("the log");
        kill(pid, signal).expect("signal");
        wait_until("the end of the process", SOON, || {
            let state = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process");
            state.contains(") Z ")
        })
        .unwrap_or_else(|error| panic!("{error}: {}", daemon.log()));
        let _ = command.kill();
        command.wait().expect("palisade restart");
        let denied = apps.at("internet", FAMILIES[0], PORT + 1);
        let reached = apps
            .ns("client")
            .enter(|| TcpStream::connect_timeout(&denied, SETTLED));
        assert_eq!(reached.expect_err("denied").kind(), ErrorKind::TimedOut);
    }
}

/// Answers requests, and notes whether a denied one has arrived.
fn serve(listener: TcpListener, stop: &AtomicBool, leaked: &Mutex<Vec<String>>) {
    listener.set_nonblocking(true).expect("option");
    thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            let Ok((mut stream, _)) = listener.accept() else {
                thread::sleep(Duration::from_millis(2));
                continue;
            };
            scope.spawn(move || {
                stream.set_nonblocking(false).expect("option");
                let (mut all, mut done, mut buffer) = (Vec::new(), 0, [0; 4096]);
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    all.extend_from_slice(&buffer[..n]);
                    let answers = answers_requests(&mut done, &all);
                    let text = String::from_utf8_lossy(&all);
                    if text.contains("secret") {
                        leaked.lock().expect("lock").push(text.into_owned());
                    }
                    if stream.write_all(&answers).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

#[test]
fn under_load_no_connection_is_lost_and_nothing_denied_passes() {
    const CONNECTIONS: usize = 8;
    const RESTARTS: usize = 3;
    let apps = apps();
    let daemon = start(&apps);
    let descriptors = || {
        let pid = daemon.pid().expect("process");
        fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("descriptors")
            .count()
    };
    let (stop, stop_servers) = (AtomicBool::new(false), AtomicBool::new(false));
    let leaked = Mutex::new(Vec::new());
    let counts: [AtomicUsize; 2 * CONNECTIONS] = Default::default();
    let denials = AtomicUsize::new(0);
    let longest = Mutex::new(Duration::ZERO);
    thread::scope(|scope| {
        let (mut clients, mut deniers) = (Vec::new(), Vec::new());
        for (family, counts) in FAMILIES.into_iter().zip(counts.chunks(CONNECTIONS)) {
            let listener = listener(&apps, family);
            let at = listener.local_addr().expect("address");
            let (stop, stop_servers, leaked) = (&stop, &stop_servers, &leaked);
            scope.spawn(move || serve(listener, stop_servers, leaked));
            for count in counts {
                let (apps, longest) = (&apps, &longest);
                clients.push(scope.spawn(move || -> Result<(), String> {
                    let mut stream = connect(apps, at);
                    while !stop.load(Ordering::Relaxed) {
                        let begun = Instant::now();
                        let mut answer = vec![0; OK.len()];
                        stream
                            .write_all(GET)
                            .and_then(|()| stream.read_exact(&mut answer))
                            .map_err(|error| format!("{family:?}: {error}"))?;
                        if answer != OK {
                            return Err(format!("{family:?}: {}", String::from_utf8_lossy(&answer)));
                        }
                        count.fetch_add(1, Ordering::Relaxed);
                        let mut longest = longest.lock().expect("lock");
                        *longest = begun.elapsed().max(*longest);
                    }
                    Ok(())
                }));
            }
            let (apps, denials) = (&apps, &denials);
            deniers.push(scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut stream = connect(apps, at);
                    let mut answer = Vec::new();
                    // A connection whose response waits is cut, which its ends notice when they send.
                    let short = Some(Duration::from_secs(5));
                    stream.set_read_timeout(short).expect("timeout");
                    let _ = stream.write_all(GET).and_then(|()| stream.write_all(DENIED));
                    let _ = stream.read_to_end(&mut answer);
                    denials.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        // Each client goes on before the next restart: retransmissions of one request must not meet several restarts.
        let all_go_on = || {
            let before: Vec<usize> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
            let until = Instant::now() + SOON;
            let goes_on =
                |(count, before): (&AtomicUsize, &usize)| count.load(Ordering::Relaxed) > *before + 1;
            while !counts.iter().zip(&before).all(goes_on) && Instant::now() < until {
                thread::sleep(Duration::from_millis(10));
            }
        };
        all_go_on();
        restart(&daemon);
        all_go_on();
        let before = descriptors();
        for _ in 1..RESTARTS {
            println!("{}", restart(&daemon));
            all_go_on();
        }
        let after = descriptors();
        stop.store(true, Ordering::Relaxed);
        let outcomes: Vec<_> = clients
            .into_iter()
            .map(|client| client.join().expect("client"))
            .collect();
        // Their last connections need a listener.
        for denier in deniers {
            denier.join().expect("client with denied requests");
        }
        stop_servers.store(true, Ordering::Relaxed);
        println!(
            "{} requests, {} denied connections, longest request {:?}, {before} and {after} descriptors",
            counts
                .iter()
                .map(|count| count.load(Ordering::Relaxed))
                .sum::<usize>(),
            denials.load(Ordering::Relaxed),
            longest.lock().expect("lock"),
        );
        let lost: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
        assert!(lost.is_empty(), "{lost:?}\n{}", daemon.report());
        assert!(after <= before + 8, "{before}, then {after} descriptors");
    });
    assert!(denials.load(Ordering::Relaxed) > 0);
    assert_eq!(*leaked.lock().expect("lock"), Vec::<String>::new());
}
