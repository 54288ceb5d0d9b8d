//! DNS: a scripted server, real servers, and real clients.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::CloneFlags,
};
use tempfile::TempDir;

use crate::{
    Outcome,
    ns::{Ns, temp_dir, wait_until},
    probe::connect,
    process::{Process, output},
};

/// The port of all DNS servers in this module.
pub const PORT: u16 = 53;
const START: Duration = Duration::from_secs(10);
/// Interval at which a thread checks whether it must stop.
const TICK: Duration = Duration::from_millis(20);

/// Numbers of record types.
pub mod rtype {
    /// IPv4 address.
    pub const A: u16 = 1;
    /// Name server.
    pub const NS: u16 = 2;
    /// Canonical name of an alias.
    pub const CNAME: u16 = 5;
    /// Text.
    pub const TXT: u16 = 16;
    /// IPv6 address.
    pub const AAAA: u16 = 28;
    /// Service binding.
    pub const SVCB: u16 = 64;
    /// Service binding of HTTP.
    pub const HTTPS: u16 = 65;
}

/// A question that a server has received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedQuery {
    /// Address and port of the client.
    pub from: SocketAddr,
    /// Address and port of the server.
    pub to: SocketAddr,
    /// Whether the transport was TCP; otherwise UDP.
    pub tcp: bool,
    /// The name, in lower case and without the trailing dot.
    pub name: String,
    /// The type.
    pub kind: u16,
}

/// A response of the scripted server.
#[derive(Clone, Debug, Default)]
pub struct ScriptedResponse {
    /// Delay before the response.
    pub delay: Duration,
    /// Response code.
    pub rcode: u8,
    /// Records of the answer section in zone file format: `www.example. 60 IN A 192.0.2.1`.
    pub answer: Vec<String>,
    /// Records of the authority section.
    pub authority: Vec<String>,
    /// Records of the additional section.
    pub additional: Vec<String>,
    /// The TC bit.
    pub truncated: bool,
    /// Bits of the id that differ from the id of the query.
    pub id_xor: u16,
    /// The name in the question section, if it differs from that of the query.
    pub question: Option<String>,
    /// Source port, if it differs from the port that the query was sent to.
    pub port: Option<u16>,
    /// Source address, if it differs from the address that the query was sent to.
    pub address: Option<IpAddr>,
    /// Record counts and raw bytes that replace all sections after the question section.
    pub raw: Option<([u16; 3], Vec<u8>)>,
}

impl ScriptedResponse {
    /// Creates a response with these records in the answer section.
    #[must_use]
    pub fn records<S: AsRef<str>>(records: &[S]) -> Self {
        Self {
            answer: records.iter().map(|r| r.as_ref().to_owned()).collect(),
            ..Self::default()
        }
    }

    /// Creates a response with a response code and without records.
    #[must_use]
    pub fn rcode(rcode: u8) -> Self {
        Self {
            rcode,
            ..Self::default()
        }
    }
}

/// A function that returns the responses to a question.
type Script = dyn Fn(&ReceivedQuery) -> Vec<ScriptedResponse> + Send + Sync;

/// A DNS server whose responses a script determines.
#[derive(Debug)]
pub struct Scripted {
    asked: Arc<Mutex<Vec<ReceivedQuery>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    ns: Ns,
}

impl Scripted {
    /// Starts a server on port 53 of each address, UDP and TCP.
    pub fn start(
        ns: &Ns,
        addresses: &[IpAddr],
        script: impl Fn(&ReceivedQuery) -> Vec<ScriptedResponse> + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut server = Self {
            asked: Arc::default(),
            stop: Arc::default(),
            threads: Vec::new(),
            ns: ns.clone(),
        };
        let script: Arc<Script> = Arc::new(script);
        for address in addresses {
            let at = SocketAddr::new(*address, PORT);
            let (datagrams, listener) = ns
                .enter(|| -> io::Result<_> { Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?)) })
                .with_context(|| format!("dns {at}"))?;
            datagrams.set_read_timeout(Some(TICK))?;
            listener.set_nonblocking(true)?;
            let serving = Serving {
                at,
                asked: Arc::clone(&server.asked),
                stop: Arc::clone(&server.stop),
                script: Arc::clone(&script),
                ns: ns.clone(),
            };
            let of_listener = serving.clone();
            server
                .threads
                .push(thread::spawn(move || serving.datagrams(&datagrams)));
            server
                .threads
                .push(thread::spawn(move || of_listener.listen(&listener)));
        }
        Ok(server)
    }

    /// Returns all questions received so far.
    #[must_use]
    pub fn queries(&self) -> Vec<ReceivedQuery> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the number of questions for a name.
    #[must_use]
    pub fn requests_for(&self, name: &str) -> usize {
        self.queries().iter().filter(|asked| asked.name == name).count()
    }

    /// Sends an unsolicited datagram from an address and port on which the server does not listen.
    pub fn push(&self, from: SocketAddr, to: SocketAddr, message: &[u8]) -> Result<()> {
        send_from(&self.ns, from, to, message).with_context(|| format!("{from} -> {to}"))
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn send_from(ns: &Ns, from: SocketAddr, to: SocketAddr, message: &[u8]) -> io::Result<()> {
    ns.enter(|| UdpSocket::bind(from)?.send_to(message, to).map(drop))
}

#[derive(Clone)]
struct Serving {
    at: SocketAddr,
    asked: Arc<Mutex<Vec<ReceivedQuery>>>,
    stop: Arc<AtomicBool>,
    script: Arc<Script>,
    ns: Ns,
}

impl Serving {
    fn note(&self, query: &Query, from: SocketAddr, tcp: bool) -> ReceivedQuery {
        let asked = ReceivedQuery {
            from,
            to: self.at,
            tcp,
            name: query.name.clone(),
            kind: query.kind,
        };
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(asked.clone());
        asked
    }

    fn datagrams(&self, socket: &UdpSocket) {
        let mut buffer = [0; 4096];
        while !self.stop.load(Relaxed) {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            let Some(query) = Query::read(&buffer[..length]) else {
                continue;
            };
            let asked = self.note(&query, from, false);
            let responses = (self.script)(&asked);
            let is_slow = responses
                .iter()
                .any(|one| !one.delay.is_zero() || one.port.is_some() || one.address.is_some());
            let send = {
                let (this, socket) = (self.clone(), socket.try_clone());
                move || {
                    for response in responses {
                        thread::sleep(response.delay);
                        let Ok(message) = query.message(&response) else {
                            continue;
                        };
                        let other = SocketAddr::new(
                            response.address.unwrap_or(this.at.ip()),
                            response.port.unwrap_or(this.at.port()),
                        );
                        // Ignore errors: sending fails if the policy blocks the response.
                        let _ = match &socket {
                            Ok(socket) if other == this.at => socket.send_to(&message, from).map(drop),
                            _ => send_from(&this.ns, other, from, &message),
                        };
                    }
                }
            };
            if is_slow {
                thread::spawn(send);
            } else {
                send();
            }
        }
    }

    fn listen(&self, listener: &TcpListener) {
        while !self.stop.load(Relaxed) {
            let Ok((stream, from)) = listener.accept() else {
                thread::sleep(TICK / 4);
                continue;
            };
            let this = self.clone();
            thread::spawn(move || {
                // Ignore errors: the client can close the connection at any time.
                let _ = this.stream(stream, from);
            });
        }
    }

    fn stream(&self, mut stream: TcpStream, from: SocketAddr) -> Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(START))?;
        stream.set_write_timeout(Some(START))?;
        stream.set_nodelay(true)?;
        while !self.stop.load(Relaxed) {
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let mut message = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut message)?;
            let query = Query::read(&message).context("no question")?;
            let asked = self.note(&query, from, true);
            for one in (self.script)(&asked) {
                thread::sleep(one.delay);
                stream.write_all(&framed(&query.message(&one)?))?;
            }
        }
        Ok(())
    }
}

/// Returns a message with the length prefix of DNS over TCP.
#[must_use]
pub fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = (message.len() as u16).to_be_bytes().to_vec();
    framed.extend(message);
    framed
}

/// The parts of a query that a response needs.
struct Query {
    id: u16,
    flags: u16,
    /// The question section as received, which the response echoes.
    question: Vec<u8>,
    name: String,
    kind: u16,
}

impl Query {
    fn read(message: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
        let mut at = 12;
        let mut name = String::new();
        loop {
            let length = usize::from(*message.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            if length > 63 {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.push_str(&String::from_utf8_lossy(message.get(at..at + length)?).to_ascii_lowercase());
            at += length;
        }
        Some(Self {
            id: word(0)?,
            flags: word(2)?,
            question: message.get(12..at + 4)?.to_vec(),
            name,
            kind: word(at)?,
        })
    }

    fn message(&self, response: &ScriptedResponse) -> Result<Vec<u8>> {
        let question = match &response.question {
            Some(name) => question(name, self.kind),
            None => self.question.clone(),
        };
        // QR, AA and RA are set; opcode and RD are copied from the query.
        let flags =
            0x8480 | self.flags & 0x7900 | u16::from(response.truncated) << 9 | u16::from(response.rcode);
        let sections = [&response.answer, &response.authority, &response.additional];
        let mut counts = sections.map(|records| records.len() as u16);
        let mut body = Vec::new();
        for line in sections.into_iter().flatten() {
            write_record(line, &mut body).with_context(|| line.clone())?;
        }
        if let Some((raw_counts, raw)) = &response.raw {
            (counts, body) = (*raw_counts, raw.clone());
        }
        let mut message = Vec::new();
        for word in [self.id ^ response.id_xor, flags, 1].into_iter().chain(counts) {
            message.extend(word.to_be_bytes());
        }
        message.extend(question);
        message.extend(body);
        Ok(message)
    }
}

/// Returns a name in wire form.
#[must_use]
pub fn wire_name(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        wire.push(label.len().min(63) as u8);
        wire.extend(label.bytes().take(63));
    }
    wire.push(0);
    wire
}

/// Returns a question of class IN in wire form.
#[must_use]
pub fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut question = wire_name(name);
    question.extend(kind.to_be_bytes());
    question.extend(1_u16.to_be_bytes());
    question
}

/// Returns a query with these questions and the RD flag.
#[must_use]
pub fn query(id: u16, questions: &[(&str, u16)]) -> Vec<u8> {
    let mut message = Vec::new();
    for word in [id, 0x0100, questions.len() as u16, 0, 0, 0] {
        message.extend(word.to_be_bytes());
    }
    for (name, kind) in questions {
        message.extend(question(name, *kind));
    }
    message
}

/// Returns the answer to a question with this id.
pub fn answer(id: u16, name: &str, kind: u16, records: &[&str]) -> Result<Vec<u8>> {
    let asked = Query {
        id,
        flags: 0x0100,
        question: question(name, kind),
        name: name.into(),
        kind,
    };
    asked.message(&ScriptedResponse::records(records))
}

/// Appends a record in wire form. `line`: the record in zone file format, such as `www.example. 60 IN A 192.0.2.1`.
fn write_record(line: &str, out: &mut Vec<u8>) -> Result<()> {
    let mut words = line.split_whitespace();
    let mut next = || words.next().context("NAME TTL IN TYPE DATA");
    let (name, ttl, class, kind) = (next()?, next()?.parse::<u32>()?, next()?, next()?);
    ensure!(class == "IN", "the class is IN");
    let rest: Vec<&str> = words.collect();
    let first = *rest.first().context("data is missing")?;
    let (kind, data) = match kind {
        "A" => (rtype::A, first.parse::<Ipv4Addr>()?.octets().to_vec()),
        "AAAA" => (rtype::AAAA, first.parse::<Ipv6Addr>()?.octets().to_vec()),
        "CNAME" => (rtype::CNAME, wire_name(first)),
        "NS" => (rtype::NS, wire_name(first)),
        "TXT" => {
            let mut data = Vec::new();
            for part in rest.join(" ").trim_matches('"').as_bytes().chunks(255) {
                data.push(part.len() as u8);
                data.extend(part);
            }
            (rtype::TXT, data)
        }
        "SVCB" => (rtype::SVCB, service(&rest)?),
        "HTTPS" => (rtype::HTTPS, service(&rest)?),
        other => bail!("{other} is no type that this server knows"),
    };
    out.extend(wire_name(name));
    out.extend(kind.to_be_bytes());
    out.extend(1_u16.to_be_bytes());
    out.extend(ttl.to_be_bytes());
    out.extend(u16::try_from(data.len())?.to_be_bytes());
    out.extend(data);
    Ok(())
}

/// Returns SVCB or HTTPS data (RFC 9460). `words`: the data in zone file format, such as `1 . ipv4hint=192.0.2.1`.
fn service(words: &[&str]) -> Result<Vec<u8>> {
    let [priority, target, parameters @ ..] = words else {
        bail!("PRIORITY TARGET PARAMETERS");
    };
    let mut data = priority.parse::<u16>()?.to_be_bytes().to_vec();
    data.extend(wire_name(target));
    // Keys must be in ascending order (RFC 9460, section 2.2).
    let mut values = BTreeMap::new();
    for parameter in parameters {
        let (key, value) = parameter.split_once('=').context("KEY=VALUE")?;
        let mut bytes: Vec<u8> = Vec::new();
        let key: u16 = match key {
            "alpn" => {
                for protocol in value.split(',') {
                    bytes.push(protocol.len() as u8);
                    bytes.extend(protocol.bytes());
                }
                1
            }
            "port" => {
                bytes.extend(value.parse::<u16>()?.to_be_bytes());
                3
            }
            "ipv4hint" => {
                for address in value.split(',') {
                    bytes.extend(address.parse::<Ipv4Addr>()?.octets());
                }
                4
            }
            "ipv6hint" => {
                for address in value.split(',') {
                    bytes.extend(address.parse::<Ipv6Addr>()?.octets());
                }
                6
            }
            other => bail!("{other} is no parameter that this server knows"),
        };
        values.insert(key, bytes);
    }
    for (key, bytes) in values {
        data.extend(key.to_be_bytes());
        data.extend(u16::try_from(bytes.len())?.to_be_bytes());
        data.extend(bytes);
    }
    Ok(data)
}

/// A DNS server program.
#[derive(Debug)]
pub struct Server {
    process: Process,
    _dir: TempDir,
}

impl Server {
    /// Starts unbound with these records in zone file format. unbound is authoritative for the top-level domain of each
    /// record's owner name.
    pub fn unbound(ns: &Ns, addresses: &[IpAddr], records: &[&str]) -> Result<Self> {
        let mut more = String::new();
        for zone in zones(records) {
            more.push_str(&format!("    local-zone: \"{zone}\" static\n"));
        }
        for record in records {
            more.push_str(&format!("    local-data: '{record}'\n"));
        }
        Self::start_unbound(ns, addresses, &more, "")
    }

    /// Starts unbound as a caching forwarder to another server.
    pub fn unbound_forwarder(ns: &Ns, addresses: &[IpAddr], to: SocketAddr) -> Result<Self> {
        Self::start_unbound(
            ns,
            addresses,
            "    do-not-query-localhost: no\n",
            &format!(
                "forward-zone:\n    name: \".\"\n    forward-addr: {}@{}\n",
                to.ip(),
                to.port()
            ),
        )
    }

    fn start_unbound(ns: &Ns, addresses: &[IpAddr], in_server: &str, more: &str) -> Result<Self> {
        let dir = temp_dir("unbound")?;
        let mut conf = format!(
            "server:\n    directory: {0:?}\n    chroot: \"\"\n    username: \"\"\n    pidfile: \"\"\n\
             \x20   do-daemonize: no\n    use-syslog: no\n    logfile: \"\"\n    verbosity: 0\n\
             \x20   num-threads: 1\n    module-config: \"iterator\"\n    minimal-responses: yes\n\
             \x20   access-control: 0.0.0.0/0 allow\n    access-control: ::0/0 allow\n",
            dir.path()
        );
        for address in addresses {
            conf.push_str(&format!("    interface: {address}\n"));
        }
        conf.push_str(in_server);
        conf.push_str("remote-control:\n    control-enable: no\n");
        conf.push_str(more);
        let file = dir.path().join("unbound.conf");
        fs::write(&file, conf)?;
        let mut command = ns.command("unbound");
        command.arg("-d").arg("-p").arg("-c").arg(&file);
        Self::run("unbound", ns, command, addresses, dir)
    }

    /// Starts dnsmasq with these A, AAAA and CNAME records.
    pub fn dnsmasq(ns: &Ns, addresses: &[IpAddr], records: &[&str]) -> Result<Self> {
        let dir = temp_dir("dnsmasq")?;
        let mut command = ns.command("dnsmasq");
        command.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            "--user=root",
            "--group=root",
            "--pid-file=",
            "--log-facility=-",
        ]);
        for address in addresses {
            command.arg(format!("--listen-address={address}"));
        }
        for zone in zones(records) {
            command.arg(format!("--local=/{}/", zone.trim_end_matches('.')));
        }
        for record in records {
            let words: Vec<&str> = record.split_whitespace().collect();
            let [name, ttl, "IN", kind, data] = words[..] else {
                bail!("{record}: NAME TTL IN TYPE DATA");
            };
            let (name, data) = (name.trim_end_matches('.'), data.trim_end_matches('.'));
            command.arg(match kind {
                "A" | "AAAA" => format!("--host-record={name},{data},{ttl}"),
                "CNAME" => format!("--cname={name},{data},{ttl}"),
                _ => bail!("{record}: dnsmasq is given A, AAAA and CNAME here"),
            });
        }
        Self::run("dnsmasq", ns, command, addresses, dir)
    }

    /// Starts knotd with these records, each in the zone of the top-level domain of its owner name. Every client can
    /// transfer the zones.
    pub fn knot(ns: &Ns, addresses: &[IpAddr], records: &[&str]) -> Result<Self> {
        let dir = temp_dir("knot")?;
        let root = dir.path().display();
        let listen: Vec<String> = addresses.iter().map(|a| format!("{a}@{PORT}")).collect();
        let mut conf = format!(
            "server:\n  rundir: \"{root}\"\n  listen: [ {} ]\n  udp-workers: 1\n  tcp-workers: 1\n\
             \x20 background-workers: 1\n\
             database:\n  storage: \"{root}\"\nlog:\n  - target: stderr\n    any: warning\n\
             acl:\n  - id: anybody\n    action: transfer\nzone:\n",
            listen.join(", ")
        );
        for zone in zones(records) {
            let mut text = format!(
                "{zone} 60 IN SOA ns.{zone} host.{zone} 1 3600 600 86400 60\n{zone} 60 IN NS ns.{zone}\n"
            );
            for record in records.iter().filter(|record| zone_of(record) == zone) {
                text.push_str(record);
                text.push('\n');
            }
            fs::write(dir.path().join(format!("{zone}zone")), text)?;
            conf.push_str(&format!(
                "  - domain: {zone}\n    storage: \"{root}\"\n    file: \"{zone}zone\"\n    acl: anybody\n"
            ));
        }
        let file = dir.path().join("knot.conf");
        fs::write(&file, conf)?;
        let mut command = ns.command("knotd");
        command.arg("-c").arg(&file);
        Self::run("knotd", ns, command, addresses, dir)
    }

    fn run(name: &str, ns: &Ns, command: Command, addresses: &[IpAddr], dir: TempDir) -> Result<Self> {
        let mut process = Process::spawn(name, command, dir.path())?;
        let mut ended = None;
        for address in addresses {
            let at = SocketAddr::new(*address, PORT);
            wait_until(&format!("{name} answers at {at}"), START, || {
                ended = process.exited().ok().flatten();
                ended.is_some() || connect(ns, at, Duration::from_secs(1)) == Outcome::Open
            })
            .with_context(|| process.log())?;
            if let Some(status) = ended {
                bail!("{name} ended at once, {status}: {}", process.log());
            }
        }
        Ok(Self { process, _dir: dir })
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Returns the output of the server.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }
}

/// Returns the last label of a record's owner as a zone name: `example.`
fn zone_of(record: &str) -> String {
    let name = record.split_whitespace().next().unwrap_or_default();
    let label = name.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    format!("{label}.")
}

fn zones(records: &[&str]) -> Vec<String> {
    let mut zones: Vec<String> = records.iter().map(|record| zone_of(record)).collect();
    zones.sort();
    zones.dedup();
    zones
}

/// The result of `dig`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dug {
    /// The response code, such as `NOERROR` or `REFUSED`; empty without a response.
    pub status: String,
    /// The flags as printed: `qr aa rd`.
    pub flags: String,
    /// The echoed question: `www.example. IN A`.
    pub question: String,
    /// The data of the records in the answer section, in order.
    pub answers: Vec<String>,
    /// Whether the response came over TCP.
    pub tcp: bool,
    /// The complete output.
    pub text: String,
}

/// Runs `dig` with one try. `args`: the name and further arguments. `dig` uses UDP first unless the arguments make it
/// use TCP.
pub fn dig(ns: &Ns, server: IpAddr, args: &[&str]) -> Result<Dug> {
    let mut command = ns.command("dig");
    command
        .arg(format!("@{server}"))
        .args(["-r", "+tries=1", "+timeout=2", "+nottlunits"])
        .args(args);
    let out = output(&mut command, Duration::from_secs(8))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut dug = Dug {
        tcp: text.contains("(TCP)"),
        text: text.clone(),
        ..Dug::default()
    };
    let mut section = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix(";; ->>HEADER<<-") {
            dug.status = between(rest, "status: ", ",").into();
        } else if let Some(rest) = line.strip_prefix(";; flags: ") {
            dug.flags = rest.split(';').next().unwrap_or_default().into();
        } else if let Some(name) = line.strip_suffix(" SECTION:") {
            section = name.trim_start_matches(";; ");
        } else if line.is_empty() {
            section = "";
        } else if section == "QUESTION" {
            let words: Vec<&str> = line.trim_start_matches(';').split_whitespace().collect();
            dug.question = words.join(" ");
        } else if section == "ANSWER" {
            let data: Vec<&str> = line.split_whitespace().skip(4).collect();
            dug.answers.push(data.join(" "));
        }
    }
    Ok(dug)
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let rest = text.split_once(before).map_or("", |(_, rest)| rest);
    rest.split_once(after).map_or(rest, |(part, _)| part)
}

/// Sends a datagram from `source` (port 0: any free port), and returns all datagrams that this port receives within
/// `wait`, from any sender.
pub fn ask(
    ns: &Ns,
    source: SocketAddr,
    server: SocketAddr,
    message: &[u8],
    wait: Duration,
) -> Result<Vec<Vec<u8>>> {
    let attempt = || -> io::Result<Vec<Vec<u8>>> {
        let socket = UdpSocket::bind(source)?;
        socket.send_to(message, server)?;
        let deadline = Instant::now() + wait;
        let mut buffer = vec![0; 1 << 16];
        let mut answers = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(answers);
            }
            socket.set_read_timeout(Some(left))?;
            match socket.recv_from(&mut buffer) {
                Ok((length, _)) => answers.push(buffer[..length].to_vec()),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(error) => return Err(error),
            }
        }
    };
    ns.enter(attempt).with_context(|| format!("{source} -> {server}"))
}

/// Returns the response code of a message; `None` if the message is too short to have one.
#[must_use]
pub fn rcode(message: &[u8]) -> Option<u8> {
    message.get(3).map(|byte| byte & 15)
}

/// Returns a command that runs in the namespace with `conf` mounted as its `/etc/resolv.conf`, in a mount namespace of
/// its own.
pub fn resolving(ns: &Ns, program: &str, conf: &Path) -> Result<Command> {
    let c_path = |path: &Path| CString::new(path.as_os_str().as_bytes()).context("a path with a zero byte");
    let (from, to) = (c_path(conf)?, c_path(Path::new("/etc/resolv.conf"))?);
    let root = c_path(Path::new("/"))?;
    let mut command = ns.command(program);
    // The environment of the test must not change how the command resolves names.
    command.env_remove("RES_OPTIONS").env_remove("LOCALDOMAIN");
    // SAFETY: between fork and exec the closure only makes system calls; its strings were allocated before.
    unsafe {
        command.pre_exec(move || {
            const NONE: Option<&CStr> = None;
            nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(NONE, root.as_c_str(), NONE, private, NONE)?;
            mount(Some(from.as_c_str()), to.as_c_str(), NONE, MsFlags::MS_BIND, NONE)?;
            Ok(())
        });
    }
    Ok(command)
}

/// Returns the addresses that Python's `socket.getaddrinfo` finds for a name, sorted. The list is empty if the name
/// does not resolve.
pub fn getaddrinfo(ns: &Ns, conf: &Path, name: &str) -> Result<Vec<IpAddr>> {
    const SCRIPT: &str = "
import socket, sys
try:
    found = socket.getaddrinfo(sys.argv[1], 80, type=socket.SOCK_STREAM)
except socket.gaierror as error:
    print('gaierror', error)
    sys.exit(0)
for address in sorted({entry[4][0] for entry in found}):
    print(address)
";
    let mut command = resolving(ns, "/usr/bin/python3", conf)?;
    command.args(["-c", SCRIPT, name]);
    let out = output(&mut command, Duration::from_secs(15))?;
    ensure!(
        out.status.success(),
        "{}: {}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut addresses: Vec<IpAddr> = text.lines().filter_map(|line| line.parse().ok()).collect();
    addresses.sort();
    Ok(addresses)
}

/// The result of dnsperf.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Perf {
    /// Number of queries sent.
    pub sent: u64,
    /// Number of queries answered.
    pub completed: u64,
    /// Number of queries without a timely answer.
    pub lost: u64,
    /// Number of answers by response code.
    pub rcodes: BTreeMap<String, u64>,
    /// Answers per second.
    pub rate: f64,
    /// Median latency, s; 0 unless [`PerfPlan::listed`] is set.
    pub p50: f64,
    /// 99th percentile of the latency, s; 0 unless [`PerfPlan::listed`] is set.
    pub p99: f64,
}

/// The parameters of dnsperf.
#[derive(Clone, Debug)]
pub struct PerfPlan<'a> {
    /// The server.
    pub server: SocketAddr,
    /// Queries as `NAME TYPE` lines, sent repeatedly.
    pub queries: &'a [String],
    /// Duration, s.
    pub seconds: u32,
    /// Number of sockets.
    pub clients: u32,
    /// Maximum number of queries per second; `None` for no limit.
    pub rate: Option<u32>,
    /// Maximum number of unanswered queries at the same time.
    pub outstanding: u32,
    /// Whether dnsperf prints the latency of each query, which slows it down.
    pub listed: bool,
    /// Whether to use TCP.
    pub tcp: bool,
}

impl PerfPlan<'_> {
    /// Starts dnsperf in the namespace. [`Perfing::finish`] waits for its end.
    pub fn start(&self, ns: &Ns) -> Result<Perfing> {
        let dir = temp_dir("dnsperf")?;
        let file = dir.path().join("queries");
        fs::write(&file, self.queries.join("\n") + "\n")?;
        let mut command = ns.command("dnsperf");
        command
            .args(["-s", &self.server.ip().to_string()])
            .args(["-p", &self.server.port().to_string()])
            .args(["-l", &self.seconds.to_string()])
            .args(["-c", &self.clients.to_string()])
            .args(["-q", &self.outstanding.to_string()])
            .args(["-T", "1", "-t", "2"])
            .arg("-d")
            .arg(&file);
        if let Some(rate) = self.rate {
            command.args(["-Q", &rate.to_string()]);
        }
        if self.listed {
            command.arg("-v");
        }
        if self.tcp {
            command.args(["-m", "tcp"]);
        }
        let process = Process::spawn("dnsperf", command, dir.path())?;
        Ok(Perfing {
            process,
            _dir: dir,
            seconds: self.seconds,
        })
    }

    /// Runs dnsperf to its end.
    pub fn run(&self, ns: &Ns) -> Result<Perf> {
        self.start(ns)?.finish()
    }
}

/// A running dnsperf.
#[derive(Debug)]
pub struct Perfing {
    process: Process,
    _dir: TempDir,
    seconds: u32,
}

impl Perfing {
    /// Waits for the end of dnsperf and returns its result.
    pub fn finish(mut self) -> Result<Perf> {
        let patience = Duration::from_secs(u64::from(self.seconds) + 10);
        let status = self.process.wait(patience)?;
        let text = self.process.log();
        ensure!(status.success(), "dnsperf: {status}: {text}");
        perf(&text)
    }
}

fn perf(text: &str) -> Result<Perf> {
    let mut perf = Perf::default();
    let mut latencies = Vec::new();
    for line in text.lines() {
        if let Some(listed) = line.strip_prefix("> ") {
            // dnsperf prints `> NOERROR www.example A 0.000123` for an answer and `> T www.example A` for a lost query.
            if let Some(Ok(latency)) = listed.split_whitespace().nth(3).map(str::parse::<f64>) {
                latencies.push(latency);
            }
            continue;
        }
        let Some((key, value)) = line.trim().split_once(':') else {
            continue;
        };
        let number = || {
            let word = value.split_whitespace().next().unwrap_or_default();
            word.parse::<f64>().with_context(|| line.to_owned())
        };
        match key {
            "Queries sent" => perf.sent = number()? as u64,
            "Queries completed" => perf.completed = number()? as u64,
            "Queries lost" => perf.lost = number()? as u64,
            "Queries per second" => perf.rate = number()?,
            "Response codes" => {
                for part in value.split(',') {
                    let mut words = part.split_whitespace();
                    if let (Some(code), Some(Ok(count))) = (words.next(), words.next().map(str::parse)) {
                        perf.rcodes.insert(code.into(), count);
                    }
                }
            }
            _ => {}
        }
    }
    ensure!(
        perf.sent > 0,
        "the output of dnsperf has no number of queries: {text}"
    );
    latencies.sort_by(f64::total_cmp);
    let at = |part: f64| {
        let last = latencies.len().saturating_sub(1);
        latencies
            .get((last as f64 * part) as usize)
            .copied()
            .unwrap_or_default()
    };
    (perf.p50, perf.p99) = (at(0.5), at(0.99));
    Ok(perf)
}
