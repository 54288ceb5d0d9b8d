//! Servers: echo servers in threads, nginx, iperf3 and other programs.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tempfile::TempDir;

use crate::{
    Outcome,
    ns::{Ns, temp_dir, wait_until},
    probe::connect,
    process::Process,
};

const START: Duration = Duration::from_secs(10);

/// A connection or a datagram that an echo server has received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contact {
    /// Address and port of the client.
    pub from: SocketAddr,
    /// Address and port of the server.
    pub to: SocketAddr,
    /// Whether the transport was TCP; otherwise UDP.
    pub tcp: bool,
}

/// An echo server for TCP and UDP on several addresses and ports of one namespace.
#[derive(Debug)]
pub struct Echo {
    contacts: Arc<Mutex<Vec<Contact>>>,
    /// Closing this socket stops the thread.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts a server on the ports `tcp` and `udp` at each of `addresses`.
    pub fn start(ns: &Ns, addresses: &[IpAddr], tcp: &[u16], udp: &[u16]) -> Result<Self> {
        let mut sockets = Vec::new();
        for address in addresses {
            for port in tcp {
                let at = SocketAddr::new(*address, *port);
                let listener = ns
                    .enter(|| TcpListener::bind(at))
                    .with_context(|| format!("tcp {at}"))?;
                listener.set_nonblocking(true)?;
                sockets.push(Open::Listener(listener, at));
            }
            for port in udp {
                let at = SocketAddr::new(*address, *port);
                let socket = ns
                    .enter(|| UdpSocket::bind(at))
                    .with_context(|| format!("udp {at}"))?;
                socket.set_nonblocking(true)?;
                sockets.push(Open::Datagrams(socket, at));
            }
        }
        let (stop, stopped) = UnixStream::pair()?;
        let contacts = Arc::new(Mutex::new(Vec::new()));
        let thread = thread::spawn({
            let contacts = contacts.clone();
            move || echo(sockets, &stopped, &contacts)
        });
        Ok(Self {
            contacts,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Returns all connections and datagrams so far.
    #[must_use]
    pub fn contacts(&self) -> Vec<Contact> {
        self.contacts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Returns the number of connections and datagrams from `from` to `to`.
    #[must_use]
    pub fn reached(&self, from: IpAddr, to: SocketAddr) -> usize {
        self.contacts()
            .iter()
            .filter(|c| c.from.ip() == from && c.to == to)
            .count()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Open {
    Listener(TcpListener, SocketAddr),
    Datagrams(UdpSocket, SocketAddr),
    Stream(TcpStream),
}

impl AsFd for Open {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listener(socket, _) => socket.as_fd(),
            Self::Datagrams(socket, _) => socket.as_fd(),
            Self::Stream(socket) => socket.as_fd(),
        }
    }
}

/// Serves all sockets until `stopped` becomes readable because its other end was closed.
fn echo(mut sockets: Vec<Open>, stopped: &UnixStream, contacts: &Mutex<Vec<Contact>>) {
    let mut buffer = vec![0; 1 << 16];
    let note = |contact| {
        contacts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(contact)
    };
    loop {
        let mut polled: Vec<_> = std::iter::once(stopped.as_fd())
            .chain(sockets.iter().map(AsFd::as_fd))
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        let outcome = poll(&mut polled, PollTimeout::NONE);
        let ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(true)).collect();
        match outcome {
            Err(Errno::EINTR) => continue,
            Err(_) => return,
            Ok(_) if ready[0] => return,
            Ok(_) => {}
        }
        let mut new = Vec::new();
        let mut at = 0;
        sockets.retain_mut(|socket| {
            at += 1;
            if !ready[at] {
                return true;
            }
            match socket {
                Open::Listener(listener, to) => {
                    if let Ok((stream, from)) = listener.accept() {
                        note(Contact {
                            from,
                            to: *to,
                            tcp: true,
                        });
                        // A client that does not read its echo must not block the other connections for long.
                        if stream.set_write_timeout(Some(Duration::from_secs(1))).is_ok() {
                            new.push(Open::Stream(stream));
                        }
                    }
                    true
                }
                Open::Datagrams(socket, to) => {
                    if let Ok((n, from)) = socket.recv_from(&mut buffer) {
                        note(Contact {
                            from,
                            to: *to,
                            tcp: false,
                        });
                        // Ignore errors: sending fails if the policy blocks the response.
                        let _ = socket.send_to(&buffer[..n], from);
                    }
                    true
                }
                Open::Stream(stream) => match stream.read(&mut buffer) {
                    Ok(n @ 1..) => stream.write_all(&buffer[..n]).is_ok(),
                    _ => false,
                },
            }
        });
        sockets.append(&mut new);
    }
}

/// nginx with a configuration of its own. [`Nginx::start`] lists the responses.
#[derive(Debug)]
pub struct Nginx {
    _process: Process,
    _dir: TempDir,
}

impl Nginx {
    /// Starts nginx on `ports`, for IPv4 and IPv6. nginx answers a request for `/big` with `big` bytes, and a request
    /// for any other path with `hello from <name>`.
    pub fn start(ns: &Ns, name: &str, ports: &[u16], big: usize) -> Result<Self> {
        let dir = temp_dir("nginx")?;
        let root = dir.path();
        fs::write(root.join("big"), vec![b'x'; big])?;
        let listen: String = ports
            .iter()
            .map(|port| format!("    listen {port};\n    listen [::]:{port};\n"))
            .collect();
        let conf = format!(
            "master_process off;\ndaemon off;\npid {0}/nginx.pid;\nerror_log stderr;\n\
             events {{ worker_connections 256; }}\n\
             http {{\n  access_log off;\n\
             client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi;\n\
             uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;\n\
             server {{\n{listen}    root {0};\n\
             location = /big {{ }}\n    location / {{ return 200 \"hello from {name}\\n\"; }}\n  }}\n}}\n",
            root.display()
        );
        let file = root.join("nginx.conf");
        fs::write(&file, conf)?;
        // A temporary directory is only accessible to its owner, but nginx can run as another user.
        set_mode(root, 0o755)?;
        let mut command = ns.command("nginx");
        command
            .args(["-e", "stderr", "-p"])
            .arg(root)
            .arg("-c")
            .arg(&file);
        let mut process = Process::spawn("nginx", command, root)?;
        for port in ports {
            ready(ns, &mut process, SocketAddr::new([127, 0, 0, 1].into(), *port))?;
        }
        Ok(Self {
            _process: process,
            _dir: dir,
        })
    }
}

pub(crate) fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(|| path.display().to_string())
}

/// An iperf3 server.
#[derive(Debug)]
pub struct Iperf3 {
    _process: Process,
    _dir: TempDir,
}

impl Iperf3 {
    /// Starts iperf3 on `port`.
    pub fn start(ns: &Ns, port: u16) -> Result<Self> {
        let dir = temp_dir("iperf3")?;
        let mut command = ns.command("iperf3");
        command.args(["-s", "--forceflush", "-p", &port.to_string()]);
        let process = Process::spawn("iperf3", command, dir.path())?;
        // Do not connect to check that iperf3 listens: iperf3 serves one client at a time, so the check would block the
        // first real client.
        wait_until("iperf3 listens", START, || process.log().contains("listening"))?;
        Ok(Self {
            _process: process,
            _dir: dir,
        })
    }
}

/// A server program.
#[derive(Debug)]
pub struct Program {
    /// The process.
    pub process: Process,
    dir: TempDir,
}

impl Program {
    /// Starts a program in the namespace. If `at` is set, waits until the program accepts a connection there.
    pub fn start(ns: &Ns, program: &str, args: &[&str], at: Option<SocketAddr>) -> Result<Self> {
        let dir = temp_dir("program")?;
        let mut command = ns.command(program);
        command.args(args).current_dir(dir.path());
        let mut process = Process::spawn(program, command, dir.path())?;
        if let Some(at) = at {
            ready(ns, &mut process, at)?;
        }
        Ok(Self { process, dir })
    }

    /// Returns the working directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.dir.path().into()
    }
}

/// Waits until a server accepts connections from its own namespace.
pub(crate) fn ready(ns: &Ns, process: &mut Process, at: SocketAddr) -> Result<()> {
    let mut ended = None;
    wait_until(&format!("{at} accepts connections"), START, || {
        ended = process.exited().ok().flatten();
        ended.is_some() || connect(ns, at, Duration::from_secs(1)) == Outcome::Open
    })
    .with_context(|| process.log())?;
    match ended {
        None => Ok(()),
        Some(status) => anyhow::bail!("ended at once, {status}: {}", process.log()),
    }
}
