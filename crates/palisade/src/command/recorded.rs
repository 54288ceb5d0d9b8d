//! Files of recorded flows: JSON lines, each of bounded length.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, bail};

/// Longest line, bytes. A flow has a URL, headers and labels of bounded lengths.
const MAX_LINE: u64 = 1 << 20;

/// The lines of a file of recorded flows.
pub(super) struct Lines {
    shown: Arc<str>,
    input: BufReader<Box<dyn io::Read>>,
    line: Vec<u8>,
    number: u64,
    /// Bytes read.
    position: u64,
    /// Size of the file, bytes; `None` if the input is no regular file.
    size: Option<u64>,
}

impl Lines {
    /// Opens a file; `-` is the standard input.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = || path.display().to_string();
        let (input, size): (Box<dyn io::Read>, Option<u64>) = if path.as_os_str() == "-" {
            (Box::new(io::stdin()), None)
        } else {
            let file = File::open(path).with_context(shown)?;
            let metadata = file.metadata().with_context(shown)?;
            if metadata.is_dir() {
                bail!("{}: is a folder; name a file of flows", shown());
            }
            let size = metadata.is_file().then_some(metadata.len());
            (Box::new(file), size)
        };
        Ok(Self {
            shown: shown().into(),
            input: BufReader::with_capacity(1 << 16, input),
            line: Vec::new(),
            number: 0,
            position: 0,
            size,
        })
    }

    /// Returns the next line that is not blank, with its number from 1; `None` at the end.
    ///
    /// # Errors
    /// The file cannot be read, or the line is too long or not UTF-8.
    pub(super) fn next_line(&mut self) -> anyhow::Result<Option<(u64, &str)>> {
        loop {
            self.line.clear();
            self.number += 1;
            let read = (&mut self.input)
                .take(MAX_LINE)
                .read_until(b'\n', &mut self.line)
                .with_context(|| format!("{}:{}", self.shown, self.number))?;
            if read == 0 {
                return Ok(None);
            }
            self.position += read as u64;
            if read as u64 == MAX_LINE && self.line.last() != Some(&b'\n') {
                bail!(
                    "{}:{}: the line is longer than 1 MiB; flows are JSON, one on each line",
                    self.shown,
                    self.number
                );
            }
            if !self.line.iter().all(u8::is_ascii_whitespace) {
                break;
            }
        }
        let text = std::str::from_utf8(&self.line)
            .with_context(|| format!("{}:{}: not UTF-8", self.shown, self.number))?;
        Ok(Some((self.number, text.trim())))
    }

    /// Returns the path of the file, as it is shown.
    pub(super) fn place(&self) -> Arc<str> {
        Arc::clone(&self.shown)
    }

    /// Returns the part of the file that has been read, percent; `None` if its size is unknown.
    pub(super) fn percent(&self) -> Option<u64> {
        let size = self.size.filter(|size| *size > 0)?;
        Some((self.position.saturating_mul(100) / size).min(100))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn lines_are_numbered_and_bounded() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(file, "\n {{}} \n\n{{\"a\":1}}").unwrap();
        let mut lines = Lines::open(file.path()).unwrap();
        assert_eq!(lines.next_line().unwrap(), Some((2, "{}")));
        assert_eq!(lines.next_line().unwrap(), Some((4, "{\"a\":1}")));
        assert_eq!(lines.next_line().unwrap(), None);
        assert_eq!(lines.percent(), Some(100));
        file.write_all(&vec![b'x'; MAX_LINE as usize]).unwrap();
        let mut lines = Lines::open(file.path()).unwrap();
        let error = loop {
            match lines.next_line() {
                Ok(_) => {}
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains(":4: the line is longer than 1 MiB"), "{error}");
        assert!(Lines::open(Path::new("/")).is_err());
    }
}
