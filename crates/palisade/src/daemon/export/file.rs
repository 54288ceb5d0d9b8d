//! A file of lines that is renamed when it reaches its maximum size, with a bounded number of renamed files (backups).
//! The names of backups are those of lumberjack, the Go library that Cilium's exporter writes with:
//! `flows-2026-04-28T01-04-16.656.log` for `flows.log`, with the time of the renaming in UTC.
//!
//! The file contains only whole lines at any time, except after a crash; the next start removes an incomplete last
//! line.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
};

use crate::trusted_path;

/// Mode of new files. Flows contain names and paths of requests.
const FILE_MODE: u32 = 0o600;
/// Mode of the directory of the file, if it is missing.
const DIR_MODE: u32 = 0o700;
/// Length of the end of a file in which an incomplete last line is searched, bytes. Lines are shorter.
const MAX_TAIL: u64 = 1 << 20;
/// Resolution of the time in the name of a backup.
const MILLISECOND: jiff::SignedDuration = jiff::SignedDuration::from_millis(1);
/// Beginnings of the lines that the exporter writes.
const LINE_STARTS: [&[u8]; 2] = [b"{\"flow\":", b"{\"lost_events\":"];

/// A file with rotation.
pub(super) struct RotatedFile {
    path: PathBuf,
    /// Largest size of the file, bytes.
    max_size: u64,
    /// Largest number of backups.
    max_backups: usize,
    open: Option<Open>,
    /// Time in the name of the last backup.
    last_backup: Option<jiff::Timestamp>,
    /// Why backups could not be removed; `None` if they could.
    pub(super) backup_problem: Option<String>,
    /// Number of backups made.
    pub(super) rotations: u64,
}

struct Open {
    file: Flock<File>,
    /// Size up to the last whole line, bytes.
    size: u64,
    /// Device and inode.
    id: (u64, u64),
}

impl RotatedFile {
    /// Returns a file that is opened at the first write.
    pub(super) fn new(path: &Path, max_size: u64, max_backups: usize) -> Self {
        Self {
            path: path.to_owned(),
            max_size,
            max_backups,
            open: None,
            last_backup: None,
            backup_problem: None,
            rotations: 0,
        }
    }

    /// Appends lines, each with its line feed, and removes them from `lines`.
    ///
    /// # Errors
    /// A text with the path. Lines that are written nevertheless are removed from `lines`; the file has no part of the
    /// others.
    pub(super) fn append(&mut self, lines: &mut Vec<u8>) -> Result<(), String> {
        while !lines.is_empty() {
            let (max_size, path) = (self.max_size, self.path.clone());
            let open = self.current()?;
            let space = usize::try_from(max_size.saturating_sub(open.size)).unwrap_or(usize::MAX);
            let mut chunk = whole_lines(&lines[..lines.len().min(space)]);
            if chunk == 0 {
                if open.size > 0 {
                    self.rotate()?;
                    continue;
                }
                // A line longer than the maximum size gets a file of its own.
                chunk = lines
                    .iter()
                    .position(|byte| *byte == b'\n')
                    .map_or(lines.len(), |at| at + 1);
            }
            let (written, result) = write(&mut open.file, &lines[..chunk]);
            let whole = if written == chunk {
                chunk
            } else {
                whole_lines(&lines[..written])
            };
            open.size += whole as u64;
            let cut = written == whole || open.file.set_len(open.size).is_ok();
            lines.drain(..whole);
            if let Err(error) = result {
                if !cut {
                    // The incomplete line is removed when the file is opened again.
                    self.open = None;
                }
                return Err(failed(&path, &error));
            }
        }
        Ok(())
    }

    /// Returns the open file. Opens the file if the path no longer leads to the open one: another program has renamed
    /// or removed it.
    fn current(&mut self) -> Result<&mut Open, String> {
        if let Some(open) = &mut self.open {
            match fs::symlink_metadata(&self.path) {
                Ok(metadata) if (metadata.dev(), metadata.ino()) == open.id => {
                    // Another program can have truncated the file.
                    open.size = metadata.len();
                }
                _ => self.open = None,
            }
        }
        if self.open.is_none() {
            self.open = Some(open(&self.path)?);
            self.remove_backups();
        }
        self.open
            .as_mut()
            .ok_or_else(|| format!("{}: not open", self.path.display()))
    }

    /// Renames the file, so that the next write makes a new one.
    fn rotate(&mut self) -> Result<(), String> {
        self.open = None;
        // The names of backups must have the order of their content, also if several files are full within the same
        // millisecond, or the clock is set back: the oldest ones are removed.
        let next = self.last_backup.map(|last| last + MILLISECOND);
        let mut time = next.map_or_else(jiff::Timestamp::now, |next| next.max(jiff::Timestamp::now()));
        loop {
            let backup = self.path.with_file_name(backup_name(&self.path, time));
            match fs::symlink_metadata(&backup) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::rename(&self.path, &backup).map_err(|error| failed(&backup, &error))?;
                    self.rotations += 1;
                    self.last_backup = Some(time);
                    return Ok(());
                }
                Err(error) => return Err(failed(&backup, &error)),
                Ok(_) => time += MILLISECOND,
            }
        }
    }

    /// Removes the oldest backups if there are too many.
    fn remove_backups(&mut self) {
        let removed = backups(&self.path).and_then(|mut names| {
            names.sort();
            let surplus = names.len().saturating_sub(self.max_backups);
            names[..surplus].iter().try_for_each(fs::remove_file)
        });
        self.backup_problem = removed
            .err()
            .map(|error| format!("old files of {} cannot be removed: {error}", self.path.display()));
    }
}

/// Opens a file for appending and removes an incomplete last line.
fn open(path: &Path) -> Result<Open, String> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(format!("{}: not the path of a file", path.display()));
    };
    let dir = trusted_path::checked_dir(dir, DIR_MODE).map_err(|problem| problem.to_string())?;
    let path = dir.join(name);
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(FILE_MODE)
        // O_NONBLOCK: the open of a FIFO without a reader must not block.
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(&path)
        .map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ELOOP) => {
                format!(
                    "{}: a symbolic link, which is not followed: name its target",
                    path.display()
                )
            }
            _ => failed(&path, &error),
        })?;
    let metadata = file.metadata().map_err(|error| failed(&path, &error))?;
    if !metadata.is_file() {
        return Err(format!(
            "{}: not a regular file: name another one",
            path.display()
        ));
    }
    if !trusted_path::is_own(&metadata) || metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "{}: belongs to user {} with mode {:04o}, so other users than root could write it: remove it",
            path.display(),
            metadata.uid(),
            metadata.mode() & 0o7777
        ));
    }
    let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => {
            format!(
                "{}: another export or daemon writes it: name another file",
                path.display()
            )
        }
        error => failed(&path, &error.into()),
    })?;
    let size = end_last_line(&mut file, metadata.len()).map_err(|error| failed(&path, &error))?;
    Ok(Open {
        file,
        size,
        id: (metadata.dev(), metadata.ino()),
    })
}

/// Makes a file end with a line feed: removes an incomplete last line of the exporter, or ends the line of another
/// program. Returns the size.
fn end_last_line(file: &mut File, size: u64) -> io::Result<u64> {
    let tail_length = size.min(MAX_TAIL);
    file.seek(SeekFrom::Start(size - tail_length))?;
    let mut tail = Vec::new();
    file.take(tail_length).read_to_end(&mut tail)?;
    if tail.is_empty() || tail.ends_with(b"\n") {
        return Ok(size);
    }
    let line = whole_lines(&tail);
    let is_own = LINE_STARTS.iter().any(|start| {
        let compared = start.len().min(tail.len() - line);
        tail[line..line + compared] == start[..compared]
    });
    if is_own {
        let size = size - (tail.len() - line) as u64;
        file.set_len(size)?;
        return Ok(size);
    }
    file.write_all(b"\n")?;
    Ok(size + 1)
}

/// Writes bytes. Returns how many were written, with the error that prevented the others.
fn write(file: &mut File, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

/// Returns the length of the whole lines at the beginning.
fn whole_lines(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1)
}

fn failed(path: &Path, error: &io::Error) -> String {
    let fix = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room",
        io::ErrorKind::ReadOnlyFilesystem => {
            "; its file system is read-only (for the systemd unit also without ReadWritePaths=)"
        }
        _ => "",
    };
    format!("{}: {error}{fix}", path.display())
}

/// Returns the parts of a file name before and after the time of a backup: `flows-` and `.log`.
fn backup_parts(path: &Path) -> (String, String) {
    let text = |part: Option<&OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let extension = path.extension().map_or_else(String::new, |extension| {
        format!(".{}", extension.to_string_lossy())
    });
    (format!("{}-", text(path.file_stem())), extension)
}

fn backup_name(path: &Path, time: jiff::Timestamp) -> String {
    let (before, after) = backup_parts(path);
    format!("{before}{}{after}", time.strftime("%Y-%m-%dT%H-%M-%S%.3f"))
}

/// Returns the paths of the backups of a file.
pub(crate) fn backups(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (before, after) = backup_parts(path);
    let mut found = Vec::new();
    for entry in fs::read_dir(path.parent().unwrap_or(Path::new("/")))? {
        let entry = entry?;
        let name = entry.file_name();
        let time = name
            .to_str()
            .and_then(|name| name.strip_prefix(&before)?.strip_suffix(&after));
        if time.is_some_and(is_backup_time) && entry.file_type()?.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Returns whether a text has the form `2026-04-28T01-04-16.656`.
fn is_backup_time(text: &str) -> bool {
    const FORM: &[u8] = b"0000-00-00T00-00-00.000";
    text.len() == FORM.len()
        && text.bytes().zip(FORM).all(|(byte, form)| match form {
            b'0' => byte.is_ascii_digit(),
            other => byte == *other,
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn append(file: &mut RotatedFile, text: &str) -> Result<(), String> {
        let mut lines = text.as_bytes().to_vec();
        file.append(&mut lines)?;
        assert!(lines.is_empty());
        Ok(())
    }

    /// Returns the names of the files in a directory, sorted.
    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_full_file_is_renamed_and_the_oldest_backups_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let other = dir.path().join("flows-old.log");
        fs::write(&other, "x").unwrap();
        let mut file = RotatedFile::new(&path, 10, 2);
        // Each file takes two lines of 4 bytes; five files are needed.
        append(&mut file, "111\n222\n333\n444\n555\n666\n777\n888\n999\n").unwrap();
        assert_eq!(
            (fs::read_to_string(&path).unwrap().as_str(), file.rotations),
            ("999\n", 4)
        );
        let backups: Vec<String> = names(dir.path())
            .into_iter()
            .filter(|name| is_backup_time(name.trim_start_matches("flows-").trim_end_matches(".log")))
            .collect();
        assert_eq!(backups.len(), 2, "{backups:?}");
        let content: Vec<String> = backups
            .iter()
            .map(|name| fs::read_to_string(dir.path().join(name)).unwrap())
            .collect();
        assert_eq!(content, ["555\n666\n", "777\n888\n"]);
        assert!(other.exists());
        assert_eq!(file.backup_problem, None);
    }

    #[test]
    fn names_of_backups_are_those_of_lumberjack() {
        let time: jiff::Timestamp = "2026-11-04T18:30:00.05Z".parse().unwrap();
        let name = |path: &str| backup_name(Path::new(path), time);
        assert_eq!(
            name("/var/log/foo/server.log"),
            "server-2026-11-04T18-30-00.050.log"
        );
        assert_eq!(name("/var/log/flows"), "flows-2026-11-04T18-30-00.050");
        assert_eq!(name("/x/a.b.json"), "a.b-2026-11-04T18-30-00.050.json");
    }

    #[test]
    fn a_line_longer_than_the_file_gets_its_own_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let mut file = RotatedFile::new(&path, 4, 9);
        append(&mut file, "1\n123456789\n2\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "2\n");
        assert_eq!(names(dir.path()).len(), 3);
    }

    #[test]
    fn new_files_are_private_and_existing_ones_are_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/flows.log");
        append(&mut RotatedFile::new(&path, 100, 1), "1\n").unwrap();
        append(&mut RotatedFile::new(&path, 100, 1), "2\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    }

    #[test]
    fn removed_and_renamed_files_and_directories_are_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/flows.log");
        let mut file = RotatedFile::new(&path, 100, 1);
        append(&mut file, "1\n").unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        append(&mut file, "2\n").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("moved")).unwrap(), "1\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "2\n");
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        append(&mut file, "3\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "3\n");
        // A truncated file has space again.
        fs::write(&path, "").unwrap();
        append(&mut file, &"4\n".repeat(50)).unwrap();
        assert_eq!((names(path.parent().unwrap()).len(), file.rotations), (1, 0));
    }

    #[test]
    fn an_incomplete_last_line_is_removed_and_a_foreign_one_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        for (before, after) in [
            ("{\"flow\":1}\n{\"flow\":{\"ti", "{\"flow\":1}\n9\n"),
            ("{\"fl", "9\n"),
            ("{\"lost_events\":{", "9\n"),
            ("note", "note\n9\n"),
            ("", "9\n"),
        ] {
            fs::write(&path, before).unwrap();
            append(&mut RotatedFile::new(&path, 100, 1), "9\n").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn links_fifos_and_files_of_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let refused = |text: &str| {
            let mut lines = b"1\n".to_vec();
            let problem = RotatedFile::new(&path, 100, 1).append(&mut lines).unwrap_err();
            assert!(problem.contains(text), "{problem}");
            assert_eq!(lines, b"1\n");
        };
        let target = dir.path().join("target");
        fs::write(&target, "").unwrap();
        symlink(&target, &path).unwrap();
        refused("a symbolic link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused("Is a directory");
        fs::remove_dir(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        refused("not a regular file");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o622)).unwrap();
        refused("other users than root could write it");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        refused("could replace its entries");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let mut first = RotatedFile::new(&path, 100, 1);
        append(&mut first, "1\n").unwrap();
        refused("another export or daemon writes it");
    }

    #[test]
    fn a_failed_write_keeps_the_lines_that_are_not_in_the_file() {
        // `/dev/full` cannot be opened, since it is no regular file, so the file is replaced after the open.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let mut file = RotatedFile::new(&path, 100, 1);
        append(&mut file, "1\n").unwrap();
        let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
        file.open.as_mut().unwrap().file = Flock::lock(full, FlockArg::LockSharedNonblock).unwrap();
        let mut lines = b"2\n3\n".to_vec();
        let problem = file.append(&mut lines).unwrap_err();
        assert!(
            problem.contains("No space left") && problem.contains("make room"),
            "{problem}"
        );
        assert_eq!(lines, b"2\n3\n");
        file.open = None;
        file.append(&mut lines).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n3\n");
    }
}
