//! HTTP/1 messages: the parser finds the same in a stream wherever it is cut, and what it accepts has one reading only.
//!
//! The first byte of the input selects the cuts.

use palisade_protocols::http1::resolved;
use palisade_protocols::http1::{
    Body, Chunks, Head, HeaderBuffer, Limits, ParseError, Piece, Request, Response,
};

/// Parses one stream.
pub fn run(input: &[u8]) {
    let Some((&cut, stream)) = input.split_first() else {
        return;
    };
    let step = usize::from(cut % 32) + 1;
    head(stream, step);
    chunks(stream, step);
    if let Ok(path) = std::str::from_utf8(stream) {
        path_of(path);
    }
}

fn head(stream: &[u8], step: usize) {
    let limits = Limits {
        line: 512,
        block: 2_048,
    };
    let whole = Head::default().find(stream, &limits);
    let mut head = Head::default();
    let in_pieces = (1..=stream.len().div_ceil(step))
        .map(|n| head.find(&stream[..stream.len().min(n * step)], &limits))
        .find(|found| *found != Ok(None));
    assert_eq!(in_pieces.unwrap_or(Ok(None)), whole);
    let Ok(Some(length)) = whole else { return };
    let head = &stream[..length];
    assert!(head.ends_with(b"\r\n\r\n") && length <= limits.block);
    for method in ["GET", "HEAD", "CONNECT"] {
        let _ = Response::parse(head, method, &mut HeaderBuffer::new());
    }
    if let Ok(request) = Request::parse(head, &mut HeaderBuffer::new()) {
        accepted(head, &request);
    }
}

/// Checks an accepted head against a simple parser.
fn accepted(head: &[u8], request: &Request<'_>) {
    let ends = |byte| head.iter().filter(|b| **b == byte).count();
    assert!(ends(0) == 0 && ends(b'\r') == ends(b'\n'));
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split("\r\n").skip_while(|line| line.is_empty());
    let first = lines.next().unwrap_or_default();
    let parts: Vec<&str> = first.split(' ').collect();
    assert_eq!(parts.len(), 3, "{first}");
    assert_eq!(parts[0], request.method);
    assert_eq!(parts[2], format!("HTTP/1.{}", request.version));
    let fields: Vec<(String, &str)> = lines
        .take_while(|line| !line.is_empty())
        .map(|line| {
            let (name, value) = line.split_once(':').expect("a colon");
            assert!(!name.is_empty() && !name.contains([' ', '\t']), "{line}");
            (name.to_ascii_lowercase(), value.trim())
        })
        .collect();
    let all = |wanted: &str| -> Vec<&str> {
        fields
            .iter()
            .filter(|(name, _)| name == wanted)
            .map(|(_, value)| *value)
            .collect()
    };
    let (lengths, codings, hosts) = (all("content-length"), all("transfer-encoding"), all("host"));
    assert!(hosts.len() <= 1 && lengths.len() <= 1 && codings.len() <= 1);
    assert!(lengths.is_empty() || codings.is_empty());
    // A server that normalizes names of fields must not find other framing fields.
    let folded = |name: &str| -> String { name.chars().filter(char::is_ascii_alphanumeric).collect() };
    for (name, _) in &fields {
        for plain in [
            "content-length",
            "transfer-encoding",
            "host",
            "connection",
            "upgrade",
            "expect",
        ] {
            assert!(name == plain || folded(name) != folded(plain), "{name}");
        }
    }
    match request.body {
        Body::Chunked => assert!(codings[0].eq_ignore_ascii_case("chunked")),
        Body::Length(n) => assert_eq!(lengths[0].parse::<u64>().ok(), Some(n)),
        _ => assert!(lengths.is_empty() && codings.is_empty()),
    }
    assert_eq!(request.headers.iter().count(), fields.len());
}

/// Content, end of the body, and why the body was refused.
type Followed = (Vec<u8>, Option<usize>, Option<ParseError>);

fn chunks(stream: &[u8], step: usize) {
    let whole = follow(Chunks::default(), stream, stream.len());
    assert_eq!(follow(Chunks::default(), stream, step), whole);
    let of_answer = follow(Chunks::of_answer(), stream, stream.len());
    assert_eq!(follow(Chunks::of_answer(), stream, step), of_answer);
    let (content, end, _) = &whole;
    if let Some(end) = *end {
        assert!(stream[..end].ends_with(b"\r\n") && content.len() < end);
        // A careless parser, which ends a line at any line feed and reads leading digits only, must find the same content.
        assert_eq!(careless(&stream[..end]).as_ref(), Some(content));
        assert_eq!(of_answer, whole);
    }
}

/// Returns the content as a parser finds it that knows neither extensions nor trailers.
fn careless(mut stream: &[u8]) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    loop {
        let line = stream.iter().position(|byte| *byte == b'\n')?;
        let digits = stream.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let size = std::str::from_utf8(&stream[..digits]).ok()?;
        let size = usize::from_str_radix(size, 16).ok()?;
        stream = &stream[line + 1..];
        if size == 0 {
            return Some(content);
        }
        content.extend_from_slice(stream.get(..size)?);
        stream = stream.get(size + 2..)?;
    }
}

fn follow(mut chunks: Chunks, stream: &[u8], step: usize) -> Followed {
    let (mut content, mut left, mut at) = (Vec::new(), 0_u64, 0);
    for piece in stream.chunks(step.max(1)) {
        let mut input = piece;
        while !input.is_empty() {
            if left > 0 {
                let n = left.min(input.len() as u64) as usize;
                content.extend_from_slice(&input[..n]);
                input = &input[n..];
                left -= n as u64;
                continue;
            }
            match chunks.next(&mut input) {
                Ok(Piece::More) => assert!(input.is_empty()),
                Ok(Piece::Content(n)) => left = n,
                Ok(Piece::End) => return (content, Some(at + piece.len() - input.len()), None),
                Err(refusal) => return (content, None, Some(refusal)),
            }
        }
        at += piece.len();
    }
    (content, None, None)
}

fn path_of(path: &str) {
    let mut out = Vec::new();
    if !path.starts_with('/') || resolved(path, &mut out).is_err() {
        return;
    }
    let query = path.find('?').map_or(0, |at| path.len() - at);
    let resolved = String::from_utf8_lossy(&out[..out.len() - query]).into_owned();
    assert!(resolved.starts_with('/'), "{path}: {resolved}");
    for never in ["//", "/./", "/../", "\\"] {
        assert!(!resolved.contains(never), "{path}: {resolved}");
    }
    assert!(
        !resolved.ends_with("/..") && !resolved.ends_with("/."),
        "{path}: {resolved}"
    );
}
