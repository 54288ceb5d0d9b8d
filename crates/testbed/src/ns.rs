//! Network namespaces: creation, commands in them, and removal.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::process::output;

/// Directory in which `ip netns` keeps the names of the namespaces.
const NAMES: &str = "/run/netns";
const PREFIX: &str = "pal-";
/// The BPF file system. Pin directories of test daemons are named `palisade-test-<pid>-<n>`.
const BPFFS: &str = "/sys/fs/bpf";
const PIN_PREFIX: &str = "palisade-test-";
const TEMP_PREFIX: &str = "palisade-testbed-";
const TOOL_TIMEOUT: Duration = Duration::from_secs(20);

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// Returns a number that is unique in this process.
#[must_use]
pub fn serial() -> u32 {
    SERIAL.fetch_add(1, Ordering::Relaxed)
}

/// Returns the path of a pin directory that is unique on this machine.
#[must_use]
pub fn pin_dir() -> PathBuf {
    Path::new(BPFFS).join(format!("{PIN_PREFIX}{}-{}", std::process::id(), serial()))
}

/// A network namespace. Clones refer to the same namespace. Dropping the last clone kills the processes in the
/// namespace and removes the namespace.
#[derive(Clone, Debug)]
pub struct Ns(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    file: File,
}

impl Ns {
    /// Creates a namespace and brings its loopback interface up.
    pub fn new(label: &str) -> Result<Self> {
        ensure_root()?;
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let name = format!("{PREFIX}{}-{}-{label}", std::process::id(), serial());
        tool(Command::new("ip").args(["netns", "add", &name]), b"")?;
        let path = Path::new(NAMES).join(&name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) => {
                remove_name(&name);
                return Err(error).with_context(|| format!("{}", path.display()));
            }
        };
        let ns = Self(Arc::new(Inner { name, file }));
        ns.ip("link set lo up")?;
        Ok(ns)
    }

    /// Returns the name for `ip netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Returns the file descriptor of the namespace, for `setns`.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// Runs `f` on a new thread in the namespace. Sockets that `f` opens remain in the namespace.
    ///
    /// # Panics
    /// Panics if `setns` fails or `f` panics.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.join().expect("setns into a namespace of the testbed");
                f()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace permanently.
    pub fn join(&self) -> Result<()> {
        setns(&self.0.file, CloneFlags::CLONE_NEWNET).with_context(|| format!("setns {}", self.name()))
    }

    /// Returns a command that runs in the network namespace, but with the machine's mounts (`ip netns exec` would hide
    /// the BPF file system). The kernel kills the process of the command when the *thread* that spawned it ends. The
    /// process has its own process group, so Ctrl-C on the terminal does not interrupt it.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.0.file.as_raw_fd();
        let keep = self.0.clone();
        let parent = Pid::this();
        command.process_group(0);
        // SAFETY: between fork and exec the closure only makes system calls; it neither allocates nor locks. `keep`
        // makes the descriptor outlive the command.
        unsafe {
            command.pre_exec(move || {
                let _open = &keep.file;
                let ns = BorrowedFd::borrow_raw(fd);
                setns(ns, CloneFlags::CLONE_NEWNET)?;
                die_with(parent)
            });
        }
        command
    }

    /// Runs `ip` commands, one per line, as one batch.
    pub fn ip(&self, lines: &str) -> Result<()> {
        tool(
            Command::new("ip").args(["-n", self.name(), "-batch", "-"]),
            lines.as_bytes(),
        )
        .with_context(|| format!("in {}:\n{lines}", self.name()))
        .map(drop)
    }

    /// Runs a program to its end in the namespace and returns its standard output. An exit status other than 0 is an
    /// error.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        tool(self.command(program).args(args), b"").with_context(|| format!("in {}", self.name()))
    }

    /// Loads an nftables script.
    pub fn nft(&self, script: &str) -> Result<()> {
        tool(
            self.command("nft").args(["-f", "-"]),
            format!("{script}\n").as_bytes(),
        )
        .map(drop)
    }

    /// Sets a value below `/proc/sys/net`, such as `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(key);
        self.enter(|| fs::write(&path, value))
            .with_context(|| format!("{} = {value}", path.display()))
    }

    /// Returns the index of an interface.
    pub fn ifindex(&self, interface: &str) -> Result<u32> {
        self.enter(|| nix::net::if_::if_nametoindex(interface))
            .with_context(|| format!("{interface} in {}", self.name()))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Ok(meta) = self.file.metadata() {
            kill_inside(meta.dev(), meta.ino());
        }
        remove_name(&self.name);
    }
}

/// Makes the kernel kill the calling process when the thread that created the process ends. Fails if the process is no
/// longer a child of `parent`. Can be called between fork and exec.
pub(crate) fn die_with(parent: Pid) -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if Pid::parent() != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// Runs a tool with `input` as its standard input and returns its standard output. An exit status other than 0 is an
/// error.
pub(crate) fn tool(command: &mut Command, input: &[u8]) -> Result<String> {
    let out = crate::process::output_with_input(command, input, TOOL_TIMEOUT)?;
    ensure!(
        out.status.success(),
        "{command:?}: {}: {}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr),
        String::from_utf8_lossy(&out.stdout)
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn ensure_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces need root");
    }
    Ok(())
}

fn remove_name(name: &str) {
    let _ = output(Command::new("ip").args(["netns", "del", name]), TOOL_TIMEOUT);
}

/// Kills all processes in the namespace with this device and inode number, except the calling process.
fn kill_inside(dev: u64, ino: u64) {
    let Ok(processes) = fs::read_dir("/proc") else {
        return;
    };
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        if pid == std::process::id().cast_signed() {
            continue;
        }
        if fs::metadata(entry.path().join("ns/net")).is_ok_and(|m| m.ino() == ino && m.dev() == dev) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Removes the namespaces, pins and temporary directories of testbed processes that no longer exist.
pub fn sweep() {
    remove_where(|pid| kill(pid, None) == Err(Errno::ESRCH));
}

/// Removes all namespaces, pins and temporary directories of this process, even if they are in use. Must be called by a
/// process that ends without running its destructors.
pub fn remove_own() {
    remove_where(|pid| pid == Pid::this());
}

fn remove_where(wanted: impl Fn(Pid) -> bool) {
    let temporary = std::env::temp_dir();
    for (dir, prefix) in [
        (Path::new(NAMES), PREFIX),
        (Path::new(BPFFS), PIN_PREFIX),
        (&temporary, TEMP_PREFIX),
    ] {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name
                .strip_prefix(prefix)
                .and_then(|rest| rest.split('-').next()?.parse::<i32>().ok());
            let Some(pid) = pid.filter(|pid| *pid > 1).map(Pid::from_raw) else {
                continue;
            };
            if !wanted(pid) {
                continue;
            }
            if prefix == PREFIX {
                if let Ok(meta) = fs::metadata(entry.path()) {
                    kill_inside(meta.dev(), meta.ino());
                }
                remove_name(&name);
            } else {
                remove_pins(&entry.path());
            }
        }
    }
}

/// Creates a temporary directory. Dropping the result removes the directory; [`sweep`] removes the directories of
/// killed processes.
pub fn temp_dir(label: &str) -> Result<TempDir> {
    let prefix = format!("{TEMP_PREFIX}{}-{label}-", std::process::id());
    tempfile::Builder::new()
        .prefix(&prefix)
        .tempdir()
        .context("temporary directory")
}

/// Removes a directory and its contents. The kernel frees pinned programs and maps once nothing else refers to them.
pub fn remove_pins(dir: &Path) {
    // Ignore errors, for example because the directory does not exist.
    let _ = fs::remove_dir_all(dir);
}

/// Mounts the BPF file system at `/sys/fs/bpf` unless it is mounted.
pub fn ensure_bpffs() -> Result<()> {
    let mounted = || -> Result<bool> {
        let stat = nix::sys::statfs::statfs(BPFFS).context(BPFFS)?;
        Ok(stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
    };
    if mounted()? {
        return Ok(());
    }
    nix::mount::mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mounting the BPF file system at {BPFFS}"))
}

/// Calls `done` every 5 ms until it returns true.
///
/// # Errors
/// Returns an error if `done` has not returned true within `timeout`.
pub fn wait_until(what: &str, timeout: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        if done() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{what}: not within {timeout:?}");
        thread::sleep(Duration::from_millis(5));
    }
}
