//! Resolution of request paths as servers do it. The inspector uses it, and so do `policy test` and `policy trace`.

use std::fmt;

/// The reason why a path cannot be resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathError {
    /// A percent sign that is not followed by two hexadecimal digits.
    BadEscape,
    /// An encoded NUL. Some servers end the path there, others do not.
    Nul,
    /// Percent-encoding that remains after three rounds of decoding.
    EncodedTooOften,
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BadEscape => "malformed percent-encoding",
            Self::Nul => "encoded NUL",
            Self::EncodedTooOften => "percent-encoded several times over",
        })
    }
}

impl std::error::Error for PathError {}

/// Maximum number of times that a path is decoded. A proxy can decode the path, and the server after it can decode the
/// path again; the third round is a reserve.
const ROUNDS: usize = 3;

/// Replaces the contents of `out` by `path` as a server would resolve it. `path` includes the query, which is copied
/// unchanged.
///
/// Decodes percent-encoding, replaces backslashes by slashes and repeated slashes by one slash, and resolves `.` and
/// `..` segments, including those with parameters after `;`.
///
/// # Errors
/// [`PathError`] if servers could resolve the path in different ways.
pub fn resolved(path: &str, out: &mut Vec<u8>) -> Result<(), PathError> {
    out.clear();
    let (path, query) = match path.find('?') {
        Some(at) => path.split_at(at),
        None => (path, ""),
    };
    out.extend_from_slice(path.as_bytes());
    let mut rounds = 0;
    while out.contains(&b'%') {
        if rounds == ROUNDS {
            return Err(PathError::EncodedTooOften);
        }
        // In later rounds a percent sign can be the result of decoding `%25`, so it need not begin an escape.
        if !decode(out, rounds == 0)? {
            break;
        }
        rounds += 1;
    }
    for byte in out.iter_mut().filter(|byte| **byte == b'\\') {
        *byte = b'/';
    }
    resolve(out);
    out.extend_from_slice(query.as_bytes());
    Ok(())
}

/// Decodes percent-encoding in place. Returns whether an escape was decoded. `strict`: every percent sign must begin an
/// escape.
fn decode(bytes: &mut Vec<u8>, strict: bool) -> Result<bool, PathError> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let Some(first) = bytes.iter().position(|byte| *byte == b'%') else {
        return Ok(false);
    };
    let (mut from, mut to) = (first, first);
    let mut decoded = false;
    while let Some(&raw) = bytes.get(from) {
        let mut byte = raw;
        let mut taken = 1;
        if byte == b'%' {
            match (digit(bytes.get(from + 1)), digit(bytes.get(from + 2))) {
                (Some(high), Some(low)) => {
                    byte = (high << 4 | low) as u8;
                    taken = 3;
                    decoded = true;
                    if byte == 0 {
                        return Err(PathError::Nul);
                    }
                }
                _ if strict => return Err(PathError::BadEscape),
                _ => {}
            }
        }
        if let Some(slot) = bytes.get_mut(to) {
            *slot = byte;
        }
        from += taken;
        to += 1;
    }
    bytes.truncate(to);
    Ok(decoded)
}

/// Resolves dot segments (RFC 3986, section 5.2.4), also with parameters as in `..;x`, and removes repeated slashes, in
/// place. A path that does not begin with a slash (`*`, empty) is unchanged.
fn resolve(path: &mut Vec<u8>) {
    if path.first() != Some(&b'/') {
        return;
    }
    // The output is never longer than the input read so far, so `to` does not exceed `from`.
    let mut to = 0;
    let mut from = 0;
    while from < path.len() {
        while path.get(from) == Some(&b'/') {
            from += 1;
        }
        let begin = from;
        let rest = path.get(begin..).unwrap_or_default();
        let segment = rest.split(|byte| *byte == b'/').next().unwrap_or_default();
        from += segment.len();
        let is_last = from == path.len();
        let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        match name {
            b"." => {
                if is_last {
                    put_slash(path, &mut to);
                }
            }
            b".." => {
                while to > 0 {
                    to -= 1;
                    if path.get(to) == Some(&b'/') {
                        break;
                    }
                }
                if is_last {
                    put_slash(path, &mut to);
                }
            }
            _ => {
                put_slash(path, &mut to);
                path.copy_within(begin..from, to);
                to += from - begin;
            }
        }
    }
    path.truncate(to);
    if path.is_empty() {
        path.push(b'/');
    }
}

fn put_slash(path: &mut [u8], to: &mut usize) {
    if let Some(slot) = path.get_mut(*to) {
        *slot = b'/';
        *to += 1;
    }
}
