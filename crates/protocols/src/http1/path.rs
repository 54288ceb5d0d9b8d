//! Paths of HTTP requests as servers resolve them. Here, as the compiler's own judgement of requests needs them too.

use std::fmt;

/// Why a path cannot be resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathError {
    /// A percent sign that two hexadecimal digits do not follow.
    BadEscape,
    /// An encoded NUL: where it ends the path depends on who reads it.
    Nul,
    /// Still percent-encoded after having been decoded several times.
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

/// How often a path is decoded: once by the server, once more by what stands behind it, and one to spare.
const ROUNDS: usize = 3;

/// Writes `path` (with its query, as sent) into `out` as a server would resolve it: percent-encoding decoded, encoded
/// or back slashes taken for slashes, repeated ones for one, `.` and `..` segments resolved (also with parameters
/// behind `;`). The query stays as it is. `out` is cleared first; its memory is used again.
///
/// # Errors
/// If servers would differ in what they make of it.
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
        // A percent sign that was itself encoded need not begin an escape.
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

/// Decodes in place; whether anything was decoded. `strict`: every percent sign must begin an escape.
fn decode(bytes: &mut Vec<u8>, strict: bool) -> Result<bool, PathError> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let (mut from, mut to) = (0, 0);
    let mut decoded = false;
    while from < bytes.len() {
        let mut byte = bytes[from];
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
        bytes[to] = byte;
        from += taken;
        to += 1;
    }
    bytes.truncate(to);
    Ok(decoded)
}

/// Takes repeated slashes and dot segments out, in place (RFC 3986, 5.2.4). The path begins with a slash or is kept
/// as it is (`*`, empty).
fn resolve(path: &mut Vec<u8>) {
    if path.first() != Some(&b'/') {
        return;
    }
    // What is written never overtakes what is read.
    let mut to = 0;
    let mut from = 0;
    while from < path.len() {
        while from < path.len() && path[from] == b'/' {
            from += 1;
        }
        let begin = from;
        while from < path.len() && path[from] != b'/' {
            from += 1;
        }
        let is_last = from == path.len();
        let segment = &path[begin..from];
        let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        match name {
            b"." => {
                if is_last {
                    path[to] = b'/';
                    to += 1;
                }
            }
            b".." => {
                while to > 0 {
                    to -= 1;
                    if path[to] == b'/' {
                        break;
                    }
                }
                if is_last {
                    path[to] = b'/';
                    to += 1;
                }
            }
            _ => {
                path[to] = b'/';
                path.copy_within(begin..from, to + 1);
                to += 1 + (from - begin);
            }
        }
    }
    path.truncate(to);
    if path.is_empty() {
        path.push(b'/');
    }
}
