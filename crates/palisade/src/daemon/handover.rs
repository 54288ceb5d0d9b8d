//! Planned restart (`palisade restart`): the process executes its program again, in place, and the new program takes over
//! the inspected connections.
//!
//! They are in a sealed memfd that only this process has: its number is in [`VARIABLE`]. So there is no file that another
//! process could make, change or leave behind, and nothing outlives the process or the boot. The maps stay pinned and in
//! force; while no worker runs, the programs drop what needs inspection, and its sender repeats it.
//!
//! Start at [`execute`] for the old program and at [`receive`] for the new one.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use palisade_inspect::handover::{Account, VERSION};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use crate::control::api::RestartStatus;

/// Environment variable with the number of the memfd.
const VARIABLE: &str = "PALISADE_HANDOVER";
/// Name of the memfd.
const NAME: &str = "palisade-handover";
/// Seals of a memfd whose content and size are final.
const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::GROW)
    .union(SealFlags::SHRINK)
    .union(SealFlags::SEAL);
/// Maximum length of the header, bytes.
const MAX_HEADER: usize = 64 << 10;
/// Maximum size of the memfd, bytes.
const MAX_SIZE: u64 = 4 << 30;

/// What the new program must know before it reads the states.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Header {
    /// Version of the states: [`VERSION`].
    version: u32,
    /// Version of the layout of the maps, whose types are in the states: [`palisade_abi::VERSION`].
    layout: u32,
    /// Version of the old program.
    pub(super) from: String,
    /// Name of the restart.
    pub(super) token: String,
    /// Secrets of the punt link. With the cookie, a flow belongs to the same worker again.
    pub(super) cookie: u64,
    pub(super) mark: u32,
    /// Connections that are handed over, and those that cannot be.
    connections: u64,
    cut: u64,
    /// Lengths of the states, one for each worker, bytes.
    lengths: Vec<u64>,
    /// CRC-32 of the states.
    crc: u32,
}

/// Inspected connections of a process that is restarted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Handover {
    pub(super) header: Header,
    /// State of each worker, by number.
    pub(super) states: Vec<Vec<u8>>,
}

/// What the new program has found.
#[derive(Debug, Default)]
pub(super) struct Received {
    /// Name of the restart; `None` without one.
    pub(super) token: Option<String>,
    /// Version of the old program.
    pub(super) from: String,
    /// Connections that the old program has handed over, and those that it could not hand over.
    pub(super) account: Account,
    /// The connections, or why they cannot be taken over; `None` without a restart.
    pub(super) handover: Option<Result<Handover, String>>,
}

impl Received {
    /// Returns the connections to take over, and the report about them. Without the numbers of endpoints of the process
    /// before (`is_state_lost`) no connection is taken over, because the endpoints can have others now.
    pub(super) fn accept(self, is_state_lost: bool) -> (Option<Restarted>, Option<Handover>) {
        let (handover, problem) = match self.handover {
            None => return (None, None),
            Some(Ok(_)) if is_state_lost => (None, Some("the state of the daemon is lost".to_owned())),
            Some(Ok(handover)) => (Some(handover), None),
            Some(Err(problem)) => (None, Some(problem)),
        };
        let restarted = Restarted {
            token: self.token.unwrap_or_default(),
            from: self.from,
            account: self.account,
            problem,
        };
        (Some(restarted), handover)
    }
}

/// The restart with which this process began.
pub(super) struct Restarted {
    token: String,
    from: String,
    account: Account,
    problem: Option<String>,
}

impl Restarted {
    /// Returns the report, and logs it. `taken_over`: connections that the workers have taken over, and those that they
    /// have not, or why none.
    pub(super) fn finish(self, taken_over: Result<Account, String>) -> RestartStatus {
        let Account { connections, cut } = self.account;
        let (taken, problem) = match (self.problem, taken_over) {
            (None, Ok(taken)) => (taken.connections, None),
            (Some(problem), _) | (None, Err(problem)) => (0, Some(problem)),
        };
        let status = RestartStatus {
            token: self.token,
            from: self.from,
            connections: taken,
            cut: cut + connections.saturating_sub(taken),
            problem,
        };
        match &status.problem {
            None => info!(
                connections = status.connections,
                cut = status.cut,
                "the inspection of connections goes on after the restart"
            ),
            Some(problem) => warn!(
                cut = status.cut,
                error = problem,
                "the inspected connections of the program before are reset"
            ),
        }
        status
    }
}

impl Handover {
    pub(super) fn new(
        token: String,
        (cookie, mark): (u64, u32),
        account: Account,
        states: Vec<Vec<u8>>,
    ) -> Self {
        let header = Header {
            version: VERSION,
            layout: palisade_abi::VERSION,
            from: env!("CARGO_PKG_VERSION").to_owned(),
            token,
            cookie,
            mark,
            connections: account.connections,
            cut: account.cut,
            lengths: states.iter().map(|state| state.len() as u64).collect(),
            crc: checksum(&states),
        };
        Self { header, states }
    }

    /// Writes everything to a new memfd, which programs that this process executes inherit.
    fn to_memfd(&self) -> io::Result<File> {
        let mut file = File::from(memfd_create(NAME, MemfdFlags::ALLOW_SEALING)?);
        self.write(&mut file)?;
        fcntl_add_seals(&file, SEALS)?;
        Ok(file)
    }

    fn write(&self, to: &mut impl io::Write) -> io::Result<()> {
        let header = serde_json::to_vec(&self.header)?;
        let length = u32::try_from(header.len()).map_err(io::Error::other)?;
        to.write_all(&length.to_le_bytes())?;
        to.write_all(&header)?;
        for state in &self.states {
            to.write_all(state)?;
        }
        Ok(())
    }
}

fn checksum(states: &[Vec<u8>]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    for state in states {
        crc.update(state);
    }
    crc.finalize()
}

/// The program of this process, as it was started.
#[derive(Clone, Debug)]
pub(super) struct Program {
    path: Result<PathBuf, String>,
    arguments: Vec<OsString>,
}

impl Program {
    /// Must be called at the start: after an upgrade the path of the running program is that of a deleted file.
    pub(super) fn of_this_process() -> Self {
        Self {
            path: std::env::current_exe()
                .map(installed)
                .map_err(|error| error.to_string()),
            arguments: std::env::args_os().skip(1).collect(),
        }
    }

    /// Returns the path of the program.
    ///
    /// # Errors
    /// The program cannot be executed, for this reason.
    pub(super) fn check(&self) -> Result<&Path, String> {
        let path = self.path.as_ref().map_err(Clone::clone)?;
        nix::unistd::access(path, nix::unistd::AccessFlags::X_OK)
            .map_err(|error| format!("{} cannot be executed: {error}", path.display()))?;
        Ok(path)
    }
}

/// Returns where the program of a process is installed, from the path of its executable file, to which the kernel adds a
/// suffix once the file is replaced. That can happen between the start and the call.
fn installed(path: PathBuf) -> PathBuf {
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(replaced) if !path.exists() => PathBuf::from(replaced),
        _ => path,
    }
}

/// Executes the program again, in place, and hands over the connections. Returns only if that fails.
pub(super) fn execute(program: &Program, handover: &Handover) -> String {
    let path = match program.check() {
        Ok(path) => path,
        Err(problem) => return problem,
    };
    let mut command = Command::new(path);
    command.args(&program.arguments).env_remove(VARIABLE);
    // Without the connections, the new program starts as after a crash.
    let file = handover.to_memfd();
    match &file {
        Ok(file) => {
            command.env(VARIABLE, file.as_raw_fd().to_string());
        }
        Err(error) => error!(%error, "the inspected connections cannot be handed over"),
    }
    let error = command.exec();
    format!("{}: {error}", path.display())
}

/// Returns what the program before has handed over to this process.
pub(super) fn receive() -> Received {
    let Some(number) = std::env::var_os(VARIABLE) else {
        return Received::default();
    };
    match number.to_str().and_then(|number| number.parse().ok()) {
        Some(number) => match take_memfd(number) {
            Ok(file) => read(file),
            Err(error) => failed(format!("descriptor {number}: {error}")),
        },
        None => failed(format!("{VARIABLE} is no number")),
    }
}

fn failed(problem: String) -> Received {
    Received {
        handover: Some(Err(problem)),
        ..Received::default()
    }
}

/// Opens the memfd, and closes the descriptor that was inherited.
fn take_memfd(number: i32) -> io::Result<File> {
    let path = format!("/proc/self/fd/{number}");
    // The variable could be set by mistake, so a descriptor of anything else stays open.
    if !std::fs::read_link(&path)?
        .to_string_lossy()
        .starts_with(&format!("/memfd:{NAME}"))
    {
        return Err(io::Error::other("no memfd of a restart"));
    }
    let file = File::open(&path)?;
    nix::unistd::close(number)?;
    if !fcntl_get_seals(&file)?.contains(SEALS) {
        return Err(io::Error::other("the memfd is not sealed"));
    }
    Ok(file)
}

fn read(mut file: File) -> Received {
    let size = file.metadata().map(|meta| meta.len());
    match size {
        Ok(size) if size <= MAX_SIZE => parse(&mut file, size),
        Ok(size) => failed(format!("it has {size} bytes")),
        Err(error) => failed(error.to_string()),
    }
}

/// Reads a hand-over of `size` bytes.
fn parse(from: &mut impl io::Read, size: u64) -> Received {
    let header = match read_header(from) {
        Ok(header) => header,
        Err(error) => return failed(format!("its header cannot be read: {error}")),
    };
    Received {
        token: Some(header.token.clone()),
        from: header.from.clone(),
        account: Account {
            connections: header.connections,
            cut: header.cut,
        },
        handover: Some(read_states(from, header, size)),
    }
}

fn read_header(from: &mut impl io::Read) -> io::Result<Header> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_HEADER {
        return Err(io::Error::other("it is too long"));
    }
    let mut header = vec![0; length];
    from.read_exact(&mut header)?;
    Ok(serde_json::from_slice(&header)?)
}

fn read_states(from: &mut impl io::Read, header: Header, size: u64) -> Result<Handover, String> {
    if (header.version, header.layout) != (VERSION, palisade_abi::VERSION) {
        return Err(format!(
            "palisade {} hands them over in another form ({}.{}, not {VERSION}.{})",
            header.from,
            header.version,
            header.layout,
            palisade_abi::VERSION
        ));
    }
    let total = header
        .lengths
        .iter()
        .try_fold(0_u64, |sum, length| sum.checked_add(*length));
    if total.is_none_or(|total| total > size) {
        return Err("it is incomplete".to_owned());
    }
    let mut states = Vec::new();
    for length in &header.lengths {
        let mut state = Vec::new();
        let read = from.by_ref().take(*length).read_to_end(&mut state);
        match read {
            Ok(read) if read as u64 == *length => states.push(state),
            Ok(_) => return Err("it is incomplete".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    }
    if checksum(&states) != header.crc {
        return Err("its checksum is wrong".to_owned());
    }
    Ok(Handover { header, states })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn example() -> Handover {
        let account = Account {
            connections: 3,
            cut: 1,
        };
        Handover::new(
            "1-2".into(),
            (7, 9),
            account,
            vec![vec![1, 2, 3], vec![], vec![4; 5_000]],
        )
    }

    fn bytes(handover: &Handover) -> Vec<u8> {
        let mut bytes = Vec::new();
        handover.write(&mut bytes).unwrap();
        bytes
    }

    fn parsed(bytes: &[u8]) -> Received {
        parse(&mut &*bytes, bytes.len() as u64)
    }

    #[test]
    fn the_new_program_reads_what_the_old_one_has_written() {
        let file = example().to_memfd().unwrap();
        let number = file.as_raw_fd();
        std::mem::forget(file);
        let received = read(take_memfd(number).unwrap());
        assert_eq!(received.handover, Some(Ok(example())));
        assert_eq!((received.account.connections, received.account.cut), (3, 1));
        assert!(take_memfd(number).is_err(), "the inherited descriptor is closed");
    }

    #[test]
    fn a_replaced_program_is_executed_from_its_installed_path() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("palisade");
        let deleted = dir.path().join("palisade (deleted)");
        assert_eq!(installed(program.clone()), program);
        assert_eq!(installed(deleted.clone()), program);
        std::fs::write(&deleted, "a file of this name").unwrap();
        assert_eq!(installed(deleted.clone()), deleted);
    }

    #[test]
    fn only_a_sealed_memfd_of_a_restart_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memfd:palisade-handover");
        std::fs::write(&path, bytes(&example())).unwrap();
        let file = File::open(&path).unwrap();
        assert!(take_memfd(file.as_raw_fd()).is_err());
        let mut open = File::from(memfd_create(NAME, MemfdFlags::ALLOW_SEALING).unwrap());
        open.write_all(&bytes(&example())).unwrap();
        let number = open.as_raw_fd();
        std::mem::forget(open);
        assert!(take_memfd(number).is_err(), "not sealed");
    }

    #[test]
    fn a_hand_over_that_is_cut_or_changed_is_refused() {
        let whole = bytes(&example());
        for length in 0..whole.len() {
            assert!(parsed(&whole[..length]).handover.unwrap().is_err(), "{length}");
        }
        let states = whole.len() - 5_003;
        for at in states..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            assert_eq!(
                parsed(&changed).handover,
                Some(Err("its checksum is wrong".to_owned())),
                "{at}"
            );
        }
        for length in [vec![u64::MAX, 1], vec![u64::MAX], vec![1 << 40]] {
            let mut false_length = example();
            false_length.header.lengths = length;
            assert_eq!(
                parsed(&bytes(&false_length)).handover,
                Some(Err("it is incomplete".to_owned()))
            );
        }
    }

    #[test]
    fn a_hand_over_of_another_version_is_refused_and_counted() {
        for (version, layout) in [
            (VERSION + 1, palisade_abi::VERSION),
            (VERSION, palisade_abi::VERSION + 1),
        ] {
            let mut other = example();
            (other.header.version, other.header.layout) = (version, layout);
            let received = parsed(&bytes(&other));
            assert!(received.handover.unwrap().unwrap_err().contains("another form"));
            assert_eq!(received.account.connections, 3);
        }
    }
}
