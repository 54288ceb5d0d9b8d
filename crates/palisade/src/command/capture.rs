//! `palisade capture`: writes the blocks that the daemon sends to files or to standard output.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, IsTerminal as _, Write},
    net::Shutdown,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use nix::fcntl::OFlag;
use palisade_flowlog::{FilterBuilder, Timestamp};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use super::output::EXIT_OK;
use crate::{
    cli::CaptureArgs,
    control::{
        api::{Answer, CaptureRequest, CaptureSummary, Request},
        client::Client,
    },
    pcapng::{block_type, blocks},
    text::count,
};

/// Duration of a capture without `--duration`.
const DEFAULT_DURATION: Duration = Duration::from_secs(600);
/// Limit of the file without `--max-bytes` and without `--ring-files`, bytes.
const DEFAULT_MAX_BYTES: u64 = 100_000_000;
/// Exit code after a second signal.
const EXIT_INTERRUPTED: i32 = 130;

/// Runs `palisade capture`.
pub(super) fn capture(socket: &Path, args: &CaptureArgs) -> anyhow::Result<u8> {
    // The daemon builds the filters from the flags. The command builds the filters too, so that errors are reported
    // without a daemon.
    let mut builder = FilterBuilder::new(Timestamp::from_system_time(SystemTime::now()));
    for (flag, value) in &args.filters {
        builder.flag(flag, value)?;
    }
    builder.finish()?;
    let mut output = Output::new(args)?;
    let duration = args.duration.unwrap_or(DEFAULT_DURATION);
    let request = CaptureRequest {
        filters: args.filters.clone(),
        snap_length: args.snap_length,
        count: args.count,
        // A ring of files bounds the space that the capture takes.
        max_bytes: args
            .max_bytes
            .or(args.ring.is_none().then_some(DEFAULT_MAX_BYTES)),
        duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
    };
    let mut client = Client::send(socket, &Request::Capture(request))?;
    end_on_signals(&client)?;
    let mut begun = false;
    let summary: CaptureSummary = loop {
        match client.next()? {
            Some(Answer::Capture(text)) => {
                let bytes = BASE64_STANDARD
                    .decode(text)
                    .context("the daemon's answer is no base64")?;
                output.write(&bytes)?;
                if !begun {
                    begun = true;
                    eprintln!("palisade: capturing to {}; Ctrl-C ends", output.name());
                }
            }
            Some(Answer::Ok(value)) => {
                break serde_json::from_value(value).context("the daemon's summary")?;
            }
            Some(Answer::Error(message)) => bail!(message),
            Some(
                Answer::Flow(_) | Answer::Lost(_) | Answer::Agent(_) | Answer::Connections(_) | Answer::Alive,
            ) => {}
            None => {
                output.flush()?;
                bail!(
                    "the daemon has ended, or has disconnected this command because it did not write fast enough; {} \
                     is complete up to then",
                    output.name()
                )
            }
        }
    };
    output.flush()?;
    let why = match summary.ended.as_str() {
        "bound" => "; a limit is reached (--count, --max-bytes)",
        "duration" => "; the time is over (--duration)",
        _ => "",
    };
    eprintln!(
        "palisade: {}, {} bytes{why}",
        count(
            usize::try_from(summary.packets).unwrap_or(usize::MAX),
            "packet",
            "packets"
        ),
        summary.bytes
    );
    if summary.lost > 0 {
        eprintln!(
            "palisade: {} packets were lost, because they came faster than they were written; narrow the filters, or \
             lower --snaplen",
            summary.lost
        );
    }
    Ok(EXIT_OK)
}

/// Ends the capture at the first signal: the daemon notices that this end sends nothing more, and sends the statistics.
/// A second signal ends the process.
fn end_on_signals(client: &Client) -> anyhow::Result<()> {
    let stream = client.stream().context("the socket")?;
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("signals")?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut signals = signals.forever();
        signals.next();
        // An error means that the daemon has closed the connection already.
        let _ = stream.shutdown(Shutdown::Write);
        signals.next();
        std::process::exit(EXIT_INTERRUPTED);
    })?;
    Ok(())
}

/// Where blocks are written.
struct Output {
    target: Target,
    /// Section header and interface descriptions so far, with which every file begins.
    head: Vec<u8>,
}

enum Target {
    Standard(io::Stdout),
    File(PathBuf, bool, Option<BufWriter<File>>),
    Ring(Ring),
}

/// Files of which the newest are kept.
struct Ring {
    /// Path, into which the number of a file is inserted.
    path: PathBuf,
    force: bool,
    files: usize,
    /// Length of a file, bytes.
    bytes: u64,
    /// Number of the current file; the first one is 1.
    number: u64,
    kept: VecDeque<PathBuf>,
    current: Option<(BufWriter<File>, u64)>,
}

impl Output {
    fn new(args: &CaptureArgs) -> anyhow::Result<Self> {
        let target = match (args.write.to_str(), args.ring) {
            (Some("-"), Some(_)) => bail!("--ring-files needs the name of a file: -w FILE"),
            (Some("-"), None) => {
                if io::stdout().is_terminal() {
                    bail!("packets are not written to a terminal: use -w FILE, or a pipe after -w -");
                }
                Target::Standard(io::stdout())
            }
            (_, None) => {
                check_free(&args.write, args.force)?;
                Target::File(args.write.clone(), args.force, None)
            }
            (_, Some((files, bytes))) => {
                let ring = Ring {
                    path: args.write.clone(),
                    force: args.force,
                    files,
                    bytes,
                    number: 0,
                    kept: VecDeque::new(),
                    current: None,
                };
                check_free(&ring.file(1), args.force)?;
                Target::Ring(ring)
            }
        };
        Ok(Self {
            target,
            head: Vec::new(),
        })
    }

    fn name(&self) -> String {
        match &self.target {
            Target::Standard(_) => "standard output".to_owned(),
            Target::File(path, ..) => path.display().to_string(),
            Target::Ring(ring) => ring.file(ring.number.max(1)).display().to_string(),
        }
    }

    /// Writes whole blocks.
    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match &mut self.target {
            Target::Standard(out) => {
                out.write_all(bytes)?;
                out.flush()?;
            }
            Target::File(path, force, file) => {
                let file = match file {
                    Some(file) => file,
                    None => file.insert(BufWriter::new(create(path, *force)?)),
                };
                file.write_all(bytes)
                    .and_then(|()| file.flush())
                    .with_context(|| path.display().to_string())?;
            }
            Target::Ring(ring) => {
                for (kind, block) in blocks(bytes) {
                    ring.write(&self.head, block, kind == block_type::PACKET)?;
                    if matches!(kind, block_type::SECTION | block_type::INTERFACE) {
                        self.head.extend_from_slice(block);
                    }
                }
                if let Some((file, _)) = &mut ring.current {
                    file.flush()?;
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        match &mut self.target {
            Target::Standard(out) => out.flush()?,
            Target::File(path, _, Some(file)) => file.flush().with_context(|| path.display().to_string())?,
            Target::File(_, _, None) => {}
            Target::Ring(ring) => {
                if let Some((file, _)) = &mut ring.current {
                    file.flush()?;
                }
            }
        }
        Ok(())
    }
}

impl Ring {
    /// Returns the path of the file with a number: `name_00001.pcapng`.
    fn file(&self, number: u64) -> PathBuf {
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        let extension = self.path.extension().map_or_else(String::new, |extension| {
            format!(".{}", extension.to_string_lossy())
        });
        self.path.with_file_name(format!("{stem}_{number:05}{extension}"))
    }

    /// Writes a block. Only a packet begins another file, so that each file has packets: descriptions of interfaces and
    /// the statistics at the end are appended to the current one.
    fn write(&mut self, head: &[u8], block: &[u8], is_packet: bool) -> anyhow::Result<()> {
        let length = block.len() as u64;
        // A file gets at least one packet, however long that is.
        let is_full = is_packet
            && self.current.as_ref().is_some_and(|(_, written)| {
                *written > head.len() as u64 && written.saturating_add(length) > self.bytes
            });
        if self.current.is_none() || is_full {
            if let Some((mut file, _)) = self.current.take() {
                file.flush()?;
            }
            while self.kept.len() >= self.files {
                if let Some(oldest) = self.kept.pop_front() {
                    // Only files that this process has made are in the list. A file that another process has removed
                    // or moved needs no removal.
                    remove(&oldest)?;
                }
            }
            self.number += 1;
            let path = self.file(self.number);
            let mut file = BufWriter::new(create(&path, self.force)?);
            file.write_all(head)?;
            self.kept.push_back(path);
            self.current = Some((file, head.len() as u64));
        }
        if let Some((file, written)) = &mut self.current {
            file.write_all(block)?;
            *written += length;
        }
        Ok(())
    }
}

/// Checks before the capture begins that the file can be made.
fn check_free(path: &Path, force: bool) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if force && !(metadata.is_file() || metadata.is_symlink()) => {
            bail!(
                "{}: is not a file, so --force does not replace it",
                path.display()
            )
        }
        Ok(_) if force => Ok(()),
        Ok(_) => bail!("{}: exists already; --force replaces it", path.display()),
        Err(_) => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            if let Some(parent) = parent
                && !parent.is_dir()
            {
                bail!(
                    "{}: is not a directory; create it before the capture",
                    parent.display()
                );
            }
            Ok(())
        }
    }
}

/// Removes a file if it exists.
fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

/// Makes a file that only its owner can read. A file of this name is refused, or removed first with `force`: if it were
/// written to, its owner could read the packets. A symbolic link is never followed.
fn create(path: &Path, force: bool) -> anyhow::Result<File> {
    check_free(path, force)?;
    if force {
        remove(path)?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(path)
        .with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::pcapng::{Direction, LinkType, Packet, Writer};

    fn args(write: PathBuf, ring: Option<(usize, u64)>) -> CaptureArgs {
        CaptureArgs {
            write,
            ring,
            ..CaptureArgs::default()
        }
    }

    /// Returns the blocks of a capture: a section, an interface and `packets` packets.
    fn section(packets: u64) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.section("x", "y", "z", "");
        writer.interface(LinkType::Ethernet, "eth0", "", 64);
        for id in 0..packets {
            writer.packet(&Packet {
                interface: 0,
                time: id,
                bytes: &[7; 60],
                length: 60,
                direction: Direction::Inbound,
                id,
                comment: "",
            });
        }
        writer.take()
    }

    fn kinds(path: &Path) -> Vec<u32> {
        blocks(&fs::read(path).unwrap()).map(|(kind, _)| kind).collect()
    }

    #[test]
    fn a_file_is_private_and_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.pcapng");
        let mut output = Output::new(&args(path.clone(), None)).unwrap();
        output.write(&section(2)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(kinds(&path), [block_type::SECTION, 1, 6, 6]);
        let error = Output::new(&args(path.clone(), None)).err().unwrap().to_string();
        assert!(error.contains("exists already; --force"), "{error}");
    }

    #[test]
    fn force_replaces_a_file_and_a_link_but_not_their_targets_or_directories() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::write(&target, "precious").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(create(&link, false).is_err());
        create(&link, true).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        assert!(fs::symlink_metadata(&link).unwrap().is_file());
        assert!(create(dir.path(), true).is_err());
    }

    #[test]
    fn a_ring_keeps_the_newest_files_and_each_begins_with_section_and_interfaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring.pcapng");
        let mut output = Output::new(&args(path, Some((2, 400)))).unwrap();
        output.write(&section(9)).unwrap();
        output.flush().unwrap();
        let mut files: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert_eq!(files.len(), 2, "{files:?}");
        assert!(
            files[1]
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("ring_0000")
        );
        for file in &files {
            assert!(fs::metadata(file).unwrap().len() <= 400, "{file:?}");
            let kinds = kinds(file);
            assert_eq!(kinds[..3], [block_type::SECTION, 1, 6], "{file:?}");
        }
        assert!(!dir.path().join("ring_00001.pcapng").exists());
    }

    #[test]
    fn a_ring_goes_on_after_another_process_has_removed_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring.pcapng");
        let mut output = Output::new(&args(path, Some((2, 400)))).unwrap();
        output.write(&section(1)).unwrap();
        fs::remove_file(dir.path().join("ring_00001.pcapng")).unwrap();
        output.write(&section(9)).unwrap();
        output.flush().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_ring_whose_first_file_cannot_be_made_is_refused_before_the_capture() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring.pcapng");
        fs::write(dir.path().join("ring_00001.pcapng"), "precious").unwrap();
        let ring = args(path, Some((2, 400)));
        let error = Output::new(&ring).err().unwrap().to_string();
        assert!(error.contains("exists already; --force"), "{error}");
        let ring = args(dir.path().join("none/ring.pcapng"), Some((2, 400)));
        let error = Output::new(&ring).err().unwrap().to_string();
        assert!(error.contains("is not a directory"), "{error}");
    }
}
