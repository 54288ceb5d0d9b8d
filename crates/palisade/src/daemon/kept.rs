//! Last good policy files on disk. There may be ten thousand of them and none is needed unless its original is broken
//! at a restart, so they are not brought to the disk one by one. A header says what a whole file is: one that a
//! power failure has cut short is known by it and not used.

use std::{
    ffi::OsString,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::Path,
};

const MAGIC: &str = "# kept by palisade";

/// Written by the same program that reads it; a hash that another version makes otherwise only means that the copy
/// is not used.
fn header(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("{MAGIC} {} {:016x}\n", text.len(), hasher.finish())
}

/// Keeps a text.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    fs::write(&temporary, header(text) + text)?;
    fs::rename(&temporary, path)
}

/// Reads a text that was kept.
pub fn read(path: &Path) -> io::Result<String> {
    let content = fs::read_to_string(path)?;
    match content.split_once('\n') {
        Some((first, text)) if header(text).trim_end() == first => Ok(text.to_owned()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "is not what was written to it",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_whole_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        for text in ["", "kind: x\n", "no newline"] {
            write(&path, text).unwrap();
            assert_eq!(read(&path).unwrap(), text);
        }
        let whole = fs::read(&path).unwrap();
        for cut in [0, 5, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(read(&path).is_err(), "{cut}");
        }
    }
}
