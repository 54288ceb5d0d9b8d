//! Files that must be whole whenever somebody reads them, whatever happens to the machine.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Replaces a file: written under another name beside it, brought to the disk, and renamed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    write_all_atomic(path.parent().unwrap_or(Path::new("/")), [(name, bytes)])
}

/// Replaces files of a folder, each of them atomically. Many wait for the disk together: ten thousand, one after the
/// other, would be a minute.
pub fn write_all_atomic<'a>(
    dir: &Path,
    files: impl IntoIterator<Item = (&'a OsStr, &'a [u8])>,
) -> io::Result<()> {
    let mut written = Vec::new();
    for (name, bytes) in files {
        let mut other = OsString::from(".");
        other.push(name);
        other.push(".tmp");
        let temporary = dir.join(other);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        written.push((temporary, dir.join(name)));
    }
    match written.as_slice() {
        [] => return Ok(()),
        [(temporary, _)] => File::open(temporary)?.sync_all()?,
        _ => nix::unistd::syncfs(File::open(dir)?)?,
    }
    for (temporary, path) in written {
        fs::rename(temporary, path)?;
    }
    // The renames themselves have to survive too.
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_content_is_there_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        let files = [("a", "three"), ("b", "four"), ("state.json", "five")];
        let named = files.map(|(name, text)| (OsStr::new(name), text.as_bytes()));
        write_all_atomic(dir.path(), named).unwrap();
        for (name, text) in files {
            assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), text);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}
