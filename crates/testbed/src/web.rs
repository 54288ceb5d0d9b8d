//! Web servers (nginx, caddy, Python) and web clients (curl, wrk, h2load).

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    ns::{Ns, temp_dir, wait_until},
    probe,
    process::{Process, output},
    server::{ready, set_mode},
    tls::Certificate,
};

/// nginx with TLS, uploads and an access log.
#[derive(Debug)]
pub struct Web {
    _process: Process,
    dir: TempDir,
}

/// A line of the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Server name of the connection; empty without TLS or without a server name.
    pub server_name: String,
    /// Address of the client.
    pub from: IpAddr,
    /// Method, target and version as received.
    pub request: String,
    /// Status of the response.
    pub status: u16,
}

impl Web {
    /// Starts nginx on these ports, for IPv4 and IPv6. Clients can read and PUT files below `/files/`. nginx answers a
    /// request for `/empty` with status 204, and a request for any other path with `hello from NAME`.
    pub fn start(
        ns: &Ns,
        name: &str,
        http: &[u16],
        https: &[u16],
        certificate: &Certificate,
    ) -> Result<Self> {
        Self::run(ns, name, [(http, ""), (https, " ssl")], certificate)
    }

    /// Starts nginx with HTTP/2. On the ports `https`, the client selects HTTP/2 or HTTP/1.1 by ALPN. The ports `clear`
    /// speak only HTTP/2, without TLS.
    pub fn start_http2(
        ns: &Ns,
        name: &str,
        clear: &[u16],
        https: &[u16],
        certificate: &Certificate,
    ) -> Result<Self> {
        Self::run(ns, name, [(clear, " http2"), (https, " ssl http2")], certificate)
    }

    fn run(ns: &Ns, name: &str, listening: [(&[u16], &str); 2], certificate: &Certificate) -> Result<Self> {
        let dir = temp_dir("web")?;
        let root = dir.path();
        fs::create_dir(root.join("files"))?;
        let listen: String = listening
            .iter()
            .flat_map(|(ports, how)| ports.iter().map(move |port| (port, how)))
            .map(|(port, how)| format!("    listen {port}{how};\n    listen [::]:{port}{how};\n"))
            .collect();
        let conf = format!(
            "master_process off;\ndaemon off;\npid {0}/nginx.pid;\nerror_log stderr;\n\
             events {{ worker_connections 16384; }}\n\
             http {{\n\
             log_format seen '$ssl_server_name|$remote_addr|$status|$request';\naccess_log {0}/access.log seen;\n\
             client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi;\n\
             uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;\n\
             client_max_body_size 0; keepalive_requests 10000000; keepalive_timeout 1h; ssl_protocols TLSv1.2 TLSv1.3;\n\
             ssl_certificate {1}; ssl_certificate_key {2};\n\
             server {{\n{listen}    root {0};\n\
             location /files/ {{ dav_methods PUT; }}\n    location = /empty {{ return 204; }}\n    \
             location / {{ return 200 \"hello from {name}\\n\"; }}\n  }}\n}}\n",
            root.display(),
            certificate.cert.display(),
            certificate.key.display(),
        );
        let file = root.join("nginx.conf");
        fs::write(&file, conf)?;
        for path in [root, &root.join("files")] {
            set_mode(path, 0o777)?;
        }
        let mut command = ns.command("nginx");
        command
            .args(["-e", "stderr", "-p"])
            .arg(root)
            .arg("-c")
            .arg(&file);
        let mut process = Process::spawn("nginx", command, root)?;
        for port in listening.iter().flat_map(|(ports, _)| *ports) {
            ready(ns, &mut process, SocketAddr::new([127, 0, 0, 1].into(), *port))?;
        }
        Ok(Self {
            _process: process,
            dir,
        })
    }

    /// Returns the directory of `/files/`.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.dir.path().join("files")
    }

    /// Returns the access log once it has not grown for a moment, or after a second. nginx writes a line after it has sent
    /// the response, so the line of a response that the client has got can still be missing.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        const MOMENT: Duration = Duration::from_millis(50);
        let read = || fs::read(self.dir.path().join("access.log")).unwrap_or_default();
        let mut log = read();
        for _ in 0..20 {
            thread::sleep(MOMENT);
            let later = read();
            if later.len() == log.len() {
                break;
            }
            log = later;
        }
        String::from_utf8_lossy(&log)
            .lines()
            .filter_map(|line| {
                let mut parts = line.splitn(4, '|');
                let server_name = parts.next()?.trim_matches('-').to_owned();
                let from = parts.next()?.parse().ok()?;
                let status = parts.next()?.parse().ok()?;
                let request = parts.next()?.to_owned();
                Some(Seen {
                    server_name,
                    from,
                    request,
                    status,
                })
            })
            .collect()
    }
}

/// caddy with a certificate. It responds with `hello from NAME`.
#[derive(Debug)]
pub struct Caddy {
    _process: Process,
    _dir: TempDir,
}

impl Caddy {
    /// Starts caddy on port `http` without TLS and on port `https` with TLS, both with HTTP/1.1 only.
    pub fn start(ns: &Ns, name: &str, http: u16, https: u16, certificate: &Certificate) -> Result<Self> {
        Self::run(ns, name, http, https, certificate, "h1")
    }

    /// Starts caddy with HTTP/1.1 and HTTP/2: with TLS by ALPN, without TLS by prior knowledge or Upgrade.
    pub fn start_http2(
        ns: &Ns,
        name: &str,
        http: u16,
        https: u16,
        certificate: &Certificate,
    ) -> Result<Self> {
        Self::run(ns, name, http, https, certificate, "h1 h2 h2c")
    }

    fn run(
        ns: &Ns,
        name: &str,
        http: u16,
        https: u16,
        certificate: &Certificate,
        protocols: &str,
    ) -> Result<Self> {
        let dir = temp_dir("caddy")?;
        let conf = format!(
            "{{\n admin off\n auto_https off\n skip_install_trust\n storage file_system {0}\n \
             servers {{\n  protocols {protocols}\n }}\n}}\n\
             http://:{http} {{\n respond \"hello from {name}\n\"\n}}\n\
             https://:{https} {{\n tls {1} {2}\n respond \"hello from {name}\n\"\n}}\n",
            dir.path().display(),
            certificate.cert.display(),
            certificate.key.display()
        );
        let file = dir.path().join("Caddyfile");
        fs::write(&file, conf)?;
        let mut command = ns.command("caddy");
        command
            .args(["run", "--adapter", "caddyfile", "--config"])
            .arg(&file)
            .env("HOME", dir.path())
            .env("XDG_CONFIG_HOME", dir.path())
            .env("XDG_DATA_HOME", dir.path());
        let mut process = Process::spawn("caddy", command, dir.path())?;
        for port in [http, https] {
            ready(ns, &mut process, SocketAddr::new([127, 0, 0, 1].into(), port))?;
        }
        Ok(Self {
            _process: process,
            _dir: dir,
        })
    }
}

/// A server in Python for unusual parts of HTTP/1.1, see `http_peer.py`.
#[derive(Debug)]
pub struct Peer {
    _process: Process,
    dir: TempDir,
}

const PEER: &str = include_str!("http_peer.py");

impl Peer {
    /// Starts the server on `port` of these addresses.
    pub fn start(ns: &Ns, port: u16, addresses: &[IpAddr]) -> Result<Self> {
        Self::run(ns, port, addresses, None)
    }

    /// Starts the server on `port` of these addresses, behind TLS.
    pub fn start_tls(ns: &Ns, port: u16, addresses: &[IpAddr], certificate: &Certificate) -> Result<Self> {
        Self::run(ns, port, addresses, Some(certificate))
    }

    fn run(ns: &Ns, port: u16, addresses: &[IpAddr], certificate: Option<&Certificate>) -> Result<Self> {
        let dir = temp_dir("peer")?;
        let script = dir.path().join("peer.py");
        fs::write(&script, PEER)?;
        let mut command = ns.command("python3");
        command
            .arg(&script)
            .arg(if certificate.is_some() {
                "serve-tls"
            } else {
                "serve"
            })
            .arg(dir.path().join("requests"));
        if let Some(certificate) = certificate {
            command.arg(&certificate.cert).arg(&certificate.key);
        }
        command
            .arg(port.to_string())
            .args(addresses.iter().map(IpAddr::to_string));
        let process = Process::spawn("peer", command, dir.path())?;
        wait_until("the server is ready", Duration::from_secs(60), || {
            process.log().contains("ready")
        })
        .with_context(|| process.log())?;
        Ok(Self {
            _process: process,
            dir,
        })
    }

    /// Returns the received requests as JSON.
    #[must_use]
    pub fn requests(&self) -> Vec<Value> {
        fs::read_to_string(self.dir.path().join("requests"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Returns the number of requests with this path.
    #[must_use]
    pub fn requests_for(&self, path: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request["path"] == path)
            .count()
    }

    /// Upgrades a connection to WebSocket and sends frames to be echoed. Returns the output of the client.
    pub fn websocket(&self, from: &Ns, to: SocketAddr, path: &str) -> Result<String> {
        self.run_websocket(from, to, path, &[])
    }

    /// Does the same over TLS, by a server name and with a file of trusted certificates.
    pub fn websocket_tls(
        &self,
        from: &Ns,
        to: SocketAddr,
        path: &str,
        name: &str,
        ca: &Path,
    ) -> Result<String> {
        self.run_websocket(from, to, path, &[name.as_ref(), ca.as_os_str()])
    }

    fn run_websocket(&self, from: &Ns, to: SocketAddr, path: &str, tls: &[&OsStr]) -> Result<String> {
        let mut command = from.command("python3");
        command.arg(self.dir.path().join("peer.py")).args([
            "websocket",
            &to.ip().to_string(),
            &to.port().to_string(),
            path,
        ]);
        command.args(tls);
        let out = output(&mut command, Duration::from_secs(20))?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
    }
}

/// The result of curl.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Curl {
    /// Exit code of curl: for example, 28 after a timeout, 35 if the TLS handshake failed; -1 if a signal ended curl.
    pub code: i32,
    /// Status of the last response; 0 without a response.
    pub status: u16,
    /// The bodies of the responses, in order.
    pub body: String,
    /// The error messages.
    pub error: String,
}

/// Runs curl with these arguments.
pub fn curl(ns: &Ns, args: &[&str], timeout: Duration) -> Result<Curl> {
    let mut command = ns.command("curl");
    command
        .args(["-sS", "-g", "--path-as-is", "--no-sessionid"])
        .args(["-m", &format!("{:.1}", timeout.as_secs_f64())])
        .args(["-w", "%{stderr}\nstatus:%{http_code}\n"])
        .args(args);
    let out = output(&mut command, timeout + Duration::from_secs(3))?;
    let said = String::from_utf8_lossy(&out.stderr);
    let status = said
        .lines()
        .filter_map(|line| line.strip_prefix("status:")?.parse().ok())
        .next_back()
        .unwrap_or(0);
    Ok(Curl {
        code: out.status.code().unwrap_or(-1),
        status,
        body: String::from_utf8_lossy(&out.stdout).into_owned(),
        error: said.into_owned(),
    })
}

/// Returns curl arguments for a request by name over TLS to a given address, without verification of the certificate.
#[must_use]
pub fn by_name(name: &str, at: SocketAddr, path: &str) -> Vec<String> {
    let address = match at.ip() {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    };
    vec![
        "-k".into(),
        "--connect-to".into(),
        format!("::{address}:{}", at.port()),
        format!("https://{name}:{}{path}", at.port()),
    ]
}

/// The result of wrk or h2load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Number of requests with a response.
    pub answered: u64,
    /// Number of responses with a status other than 2xx or 3xx.
    pub other_status: u64,
    /// Number of failed connections and of requests without a response.
    pub failed: u64,
}

/// A running wrk.
#[derive(Debug)]
pub struct Wrk {
    process: Process,
    seconds: u32,
    _dir: TempDir,
}

impl Wrk {
    /// Starts wrk, which requests `url` repeatedly on `connections` connections for `seconds` seconds.
    pub fn start(ns: &Ns, url: &str, connections: u32, seconds: u32) -> Result<Self> {
        let dir = temp_dir("wrk")?;
        let mut command = ns.command("wrk");
        command.args([
            "-t1",
            &format!("-c{connections}"),
            &format!("-d{seconds}s"),
            "--timeout",
            "10s",
            "--latency",
            url,
        ]);
        Ok(Self {
            process: Process::spawn("wrk", command, dir.path())?,
            seconds,
            _dir: dir,
        })
    }

    /// Waits for the end of wrk and returns its result.
    pub fn finish(mut self) -> Result<Counted> {
        self.process
            .wait(Duration::from_secs(u64::from(self.seconds) + 15))?;
        let text = self.process.log();
        let number = |before: &str| -> u64 {
            text.split(before)
                .nth(1)
                .map(|rest| rest.trim_start())
                .and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
                .unwrap_or(0)
        };
        let answered = text
            .lines()
            .find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok())
            .with_context(|| text.clone())?;
        Ok(Counted {
            answered,
            other_status: number("Non-2xx or 3xx responses:"),
            failed: number("Socket errors: connect")
                + number(", read ")
                + number(", write ")
                + number(", timeout "),
        })
    }
}

/// Runs h2load to its end.
pub fn h2load(ns: &Ns, args: &[&str]) -> Result<Counted> {
    let mut command = ns.command("h2load");
    command.args(args);
    let out = output(&mut command, Duration::from_secs(30))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let number = |line: &str, after: &str| -> Option<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(line))?;
        line.split(',')
            .find_map(|part| part.trim().strip_suffix(after)?.trim().parse().ok())
    };
    let counted = || -> Option<Counted> {
        let bad = number("status codes:", "4xx")? + number("status codes:", "5xx")?;
        Some(Counted {
            answered: number("requests:", "succeeded")? + bad,
            other_status: bad,
            failed: number("requests:", "errored")? + number("requests:", "timeout")?,
        })
    };
    counted().with_context(|| format!("{}\n{text}", out.status))
}

/// Makes a file of random bytes.
pub fn random_file(path: &Path, size: u64) -> Result<()> {
    let mut from = fs::File::open("/dev/urandom")?.take(size);
    let mut to = fs::File::create(path).with_context(|| path.display().to_string())?;
    io::copy(&mut from, &mut to)?;
    Ok(())
}

/// Returns the SHA-256 of a file, computed by `sha256sum`.
pub fn sha256(path: &Path) -> Result<String> {
    let mut command = std::process::Command::new("sha256sum");
    command.arg(path);
    let out = output(&mut command, Duration::from_secs(60))?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

/// A TCP connection on which a test writes and reads raw bytes.
#[derive(Debug)]
pub struct Talk {
    stream: TcpStream,
    heard: Vec<u8>,
    ended: bool,
}

impl Talk {
    /// Opens a connection.
    pub fn open(ns: &Ns, to: SocketAddr, timeout: Duration) -> io::Result<Self> {
        let stream = probe::open(ns, None, to, timeout)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            heard: Vec::new(),
            ended: false,
        })
    }

    /// Returns the socket.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Receives until `done` returns true for all received bytes, the other end closes, or `timeout` has passed.
    /// Returns all received bytes.
    pub fn receive(&mut self, timeout: Duration, done: impl Fn(&[u8]) -> bool) -> io::Result<&[u8]> {
        let deadline = Instant::now() + timeout;
        let mut buffer = [0; 1 << 14];
        while !done(&self.heard) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => self.heard.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(&self.heard)
    }

    /// Returns all received bytes as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.heard).into_owned()
    }

    /// Returns whether the other end has closed the connection with a FIN.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Receives until the connection ends. Returns `true` after a FIN and `false` after `timeout`.
    ///
    /// # Errors
    /// Returns an error if receiving failed, for example because the connection was reset.
    pub fn receive_all(&mut self, timeout: Duration) -> io::Result<bool> {
        self.receive(timeout, |_| false)?;
        Ok(self.ended)
    }
}
