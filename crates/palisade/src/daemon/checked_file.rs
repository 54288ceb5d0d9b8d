//! Sealed text files in the state directory: the first line has the length and the CRC-32 of the rest. A file that a
//! power failure has truncated, filled with zeroes or mixed with another one is detected and not used.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::files::temporary_name;

const MAGIC: &str = "# kept by palisade";

fn header(text: &str) -> String {
    format!(
        "{MAGIC} {} {:08x}\n",
        text.len(),
        crc32fast::hash(text.as_bytes())
    )
}

/// Returns the content of a sealed file: the first line, then the text.
pub(super) fn seal(text: &str) -> String {
    header(text) + text
}

/// Error: the content of a file is not what the daemon wrote to it.
#[derive(Debug, thiserror::Error)]
#[error("it is not what was written to it (truncated or changed)")]
pub(super) struct Damaged;

/// Returns the text of a sealed file.
///
/// # Errors
/// [`Damaged`] if the content is not UTF-8, or if length or CRC-32 do not match the first line.
pub(super) fn unseal(content: &[u8]) -> Result<&str, Damaged> {
    let content = std::str::from_utf8(content).map_err(|_| Damaged)?;
    match content.split_once('\n') {
        Some((first, text)) if header(text).trim_end() == first => Ok(text),
        _ => Err(Damaged),
    }
}

/// Returns whether a file begins like a sealed one. Length and CRC-32 can still be wrong.
pub(super) fn is_sealed(content: &[u8]) -> bool {
    content.starts_with(MAGIC.as_bytes())
}

/// Reads a sealed file and returns its text.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let content = fs::read(path)?;
    let text = unseal(&content).map_err(|damaged| io::Error::new(io::ErrorKind::InvalidData, damaged))?;
    Ok(text.to_owned())
}

/// Writes the sealed text to a temporary file in the directory of `path` and returns the path of the temporary file.
/// The caller flushes that file and renames it to `path`.
pub(super) fn write_beside(path: &Path, text: &str) -> io::Result<PathBuf> {
    let temporary = temporary_name(path)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(seal(text).as_bytes())?;
    Ok(temporary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_undamaged_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        for text in ["", "kind: x\n", "no newline"] {
            fs::rename(write_beside(&path, text).unwrap(), &path).unwrap();
            assert_eq!(read(&path).unwrap(), text);
        }
        let whole = fs::read(&path).unwrap();
        let mut changed = whole.clone();
        *changed.last_mut().unwrap() ^= 1;
        let zeroes = vec![0; whole.len()];
        for content in [
            &whole[..0],
            &whole[..5],
            &whole[..whole.len() - 1],
            &changed,
            &zeroes,
        ] {
            fs::write(&path, content).unwrap();
            assert!(read(&path).is_err(), "{content:?}");
        }
    }
}
