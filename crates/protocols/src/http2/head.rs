//! Requests, trailers and responses of decoded fields (RFC 9113, section 8).
//!
//! Many servers are behind a proxy that translates HTTP/2 to HTTP/1. So a request is refused if its HTTP/1 form would be
//! ambiguous, as in [`crate::http1`].

use std::str;

use super::{Fields, ParseError};
use crate::http1::{
    self, Body, FRAMING, Folded, Headers, MAX_HEADERS, NO_TRAILERS, Target, TrailerNames, is_authority,
    is_token,
};

/// Fields that have a meaning for one HTTP/1 connection only (RFC 9113, section 8.2.2).
const CONNECTION_FIELDS: [&[u8]; 6] = [
    b"connection",
    b"http2-settings",
    b"keep-alive",
    b"proxy-connection",
    b"transfer-encoding",
    b"upgrade",
];

/// A buffer for the fields of one head.
#[derive(Debug)]
pub struct FieldBuffer<'a>([httparse::Header<'a>; MAX_HEADERS]);

impl FieldBuffer<'_> {
    /// Creates a buffer.
    #[must_use]
    pub const fn new() -> Self {
        Self([httparse::EMPTY_HEADER; MAX_HEADERS])
    }
}

impl Default for FieldBuffer<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// The head of a request.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// The request in the form that rules are matched against. Its version is 2. `:authority` is its host.
    pub request: http1::Request<'a>,
    /// `:protocol` of an extended CONNECT (RFC 8441).
    pub protocol: Option<&'a str>,
    /// Whether the content type is that of gRPC.
    pub is_grpc: bool,
}

/// Pseudo-header fields of a request.
#[derive(Default)]
struct Pseudo<'a> {
    method: Option<&'a [u8]>,
    scheme: Option<&'a [u8]>,
    authority: Option<&'a [u8]>,
    path: Option<&'a [u8]>,
    protocol: Option<&'a [u8]>,
}

impl<'a> Pseudo<'a> {
    fn set(&mut self, name: &[u8], value: &'a [u8]) -> Result<(), ParseError> {
        let place = match name {
            b":method" => &mut self.method,
            b":scheme" => &mut self.scheme,
            b":authority" => &mut self.authority,
            b":path" => &mut self.path,
            b":protocol" => &mut self.protocol,
            _ => return Err(ParseError::PseudoHeader),
        };
        match place.replace(value) {
            None => Ok(()),
            Some(_) => Err(ParseError::PseudoHeader),
        }
    }
}

/// Reads the fields of a request. `end_stream`: whether the request has no content. `cookie` is a buffer for the
/// `cookie` field, which a client can split into several fields (RFC 9113, section 8.2.3).
///
/// # Errors
/// [`ParseError`] if the request is malformed, or if its HTTP/1 form would be ambiguous.
pub fn request<'a>(
    fields: &'a Fields,
    end_stream: bool,
    cookie: &'a mut Vec<u8>,
    buffer: &'a mut FieldBuffer<'a>,
) -> Result<RequestHead<'a>, ParseError> {
    join_cookies(fields, cookie);
    let cookie: &'a [u8] = cookie;
    let mut pseudo = Pseudo::default();
    let (mut count, mut cookies) = (0, 0);
    for (name, value, _) in fields.iter() {
        check_value(value)?;
        if name.starts_with(b":") {
            if count > 0 {
                return Err(ParseError::PseudoHeader);
            }
            pseudo.set(name, value)?;
            continue;
        }
        let name = check_name(name)?;
        if is_connection_specific(name.as_bytes(), value) {
            return Err(ParseError::ConnectionField);
        }
        let mut value = value;
        if name == "cookie" {
            cookies += 1;
            if cookies > 1 {
                continue;
            }
            value = cookie;
        }
        let place = buffer.0.get_mut(count).ok_or(ParseError::ListTooLong)?;
        *place = httparse::Header { name, value };
        count += 1;
    }
    let headers =
        Headers::of(buffer.0.get(..count).unwrap_or_default()).map_err(|_| ParseError::FieldName)?;
    if headers.has_disguised(&FRAMING) {
        return Err(ParseError::DisguisedName);
    }
    let method = pseudo.method.ok_or(ParseError::PseudoHeader)?;
    let method = check_method(method)?;
    let is_connect = method == "CONNECT";
    let protocol = pseudo.protocol.map(check_protocol).transpose()?;
    if protocol.is_some() && !is_connect {
        return Err(ParseError::PseudoHeader);
    }
    let has_target = pseudo.scheme.is_some() && pseudo.path.is_some();
    let (form, path) = if is_connect && protocol.is_none() {
        if pseudo.scheme.is_some() || pseudo.path.is_some() || pseudo.authority.is_none() {
            return Err(ParseError::PseudoHeader);
        }
        (Target::Authority, "")
    } else if has_target {
        read_path(method, pseudo.path.unwrap_or_default())?
    } else {
        return Err(ParseError::PseudoHeader);
    };
    let default_port = match pseudo.scheme {
        None => "",
        Some(scheme) if scheme.eq_ignore_ascii_case(b"http") => ":80",
        Some(scheme) if scheme.eq_ignore_ascii_case(b"https") => ":443",
        Some(_) => return Err(ParseError::Scheme),
    };
    let host = read_host(pseudo.authority, &headers, default_port)?;
    if form == Target::Authority && !has_port(host) {
        return Err(ParseError::Authority);
    }
    let mut expects = headers.values("expect");
    if let Some(expect) = expects.next()
        && (expects.next().is_some() || !expect.eq_ignore_ascii_case(b"100-continue"))
    {
        return Err(ParseError::Expect);
    }
    let length = headers.framing(1).map_err(|_| ParseError::ContentLength)?;
    let body = match length {
        // The DATA frames of CONNECT are a tunnel, not content (RFC 9113, section 8.5).
        None if is_connect => Body::None,
        Some(_) if is_connect => return Err(ParseError::ContentLength),
        None if end_stream => Body::None,
        Some(Body::Length(1..)) if end_stream => return Err(ParseError::ContentLength),
        Some(length) => length,
        None => Body::Chunked,
    };
    let is_grpc = headers.values("content-type").any(is_grpc);
    Ok(RequestHead {
        request: http1::Request {
            method,
            form,
            path,
            host,
            version: 2,
            body,
            headers,
        },
        protocol,
        is_grpc,
    })
}

/// Checks the fields of a trailer section of a request. `guarded`: names that it must not have because of the rules.
///
/// # Errors
/// [`ParseError`] if a field is malformed or not allowed in trailers.
pub fn trailers(fields: &Fields, guarded: &TrailerNames) -> Result<(), ParseError> {
    for (name, value, _) in fields.iter() {
        if name.starts_with(b":") {
            return Err(ParseError::PseudoHeader);
        }
        check_value(value)?;
        let name = check_name(name)?;
        if is_connection_specific(name.as_bytes(), value) {
            return Err(ParseError::ConnectionField);
        }
        // Some servers merge trailer fields into the header fields (RFC 9110, section 6.5.1).
        let folded = Folded::of(name);
        if folded.is_among(&NO_TRAILERS) || guarded.has(&folded) {
            return Err(ParseError::Trailers);
        }
    }
    Ok(())
}

/// The head of a response, as far as records show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// Status code; `None` for trailers or a malformed head.
    pub status: Option<u16>,
    /// Content-Length, bytes.
    pub length: Option<u64>,
    /// Value of `grpc-status`.
    pub grpc_status: Option<u32>,
}

/// Reads the fields of a response or of its trailers. The client checks the response, so a malformed one is no error.
#[must_use]
pub fn response(fields: &Fields) -> ResponseHead {
    fn number<T: str::FromStr>(value: Option<&[u8]>) -> Option<T> {
        str::from_utf8(value?).ok()?.parse().ok()
    }
    ResponseHead {
        status: number(fields.value(b":status")),
        length: number(fields.value(b"content-length")),
        grpc_status: number(fields.value(b"grpc-status")),
    }
}

/// Replaces `cookie` by the values of all `cookie` fields, joined as in a single field (RFC 9113, section 8.2.3).
fn join_cookies(fields: &Fields, cookie: &mut Vec<u8>) {
    cookie.clear();
    for (_, value, _) in fields.iter().filter(|(name, ..)| *name == b"cookie") {
        if !cookie.is_empty() {
            cookie.extend_from_slice(b"; ");
        }
        cookie.extend_from_slice(value);
    }
}

fn check_name(name: &[u8]) -> Result<&str, ParseError> {
    let is_valid = !name.is_empty()
        && name
            .iter()
            .all(|byte| is_token(*byte) && !byte.is_ascii_uppercase());
    if !is_valid {
        return Err(ParseError::FieldName);
    }
    str::from_utf8(name).map_err(|_| ParseError::FieldName)
}

fn check_value(value: &[u8]) -> Result<(), ParseError> {
    let is_white = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let is_allowed = |byte: &u8| matches!(byte, b'\t' | 0x20..=0x7e | 0x80..);
    if value.iter().all(is_allowed) && !is_white(value.first()) && !is_white(value.last()) {
        Ok(())
    } else {
        Err(ParseError::FieldValue)
    }
}

fn is_connection_specific(name: &[u8], value: &[u8]) -> bool {
    CONNECTION_FIELDS.contains(&name) || (name == b"te" && !value.eq_ignore_ascii_case(b"trailers"))
}

fn check_method(method: &[u8]) -> Result<&str, ParseError> {
    let is_token = !method.is_empty() && method.iter().all(|byte| is_token(*byte));
    // Some servers treat `head` as HEAD, so the framing of the response to `head` would be ambiguous.
    let is_misspelt = ["HEAD", "CONNECT"]
        .iter()
        .any(|name| method != name.as_bytes() && method.eq_ignore_ascii_case(name.as_bytes()));
    if !is_token || is_misspelt {
        return Err(ParseError::Method);
    }
    str::from_utf8(method).map_err(|_| ParseError::Method)
}

fn check_protocol(protocol: &[u8]) -> Result<&str, ParseError> {
    let is_token = !protocol.is_empty() && protocol.iter().all(|byte| is_token(*byte));
    str::from_utf8(protocol)
        .ok()
        .filter(|_| is_token)
        .ok_or(ParseError::Protocol)
}

fn read_path<'a>(method: &str, path: &'a [u8]) -> Result<(Target, &'a str), ParseError> {
    // As in HTTP/1: no fragment, and bytes other than visible ASCII must be percent-encoded.
    if !path
        .iter()
        .all(|byte| matches!(byte, 0x21..=0x7e) && *byte != b'#')
    {
        return Err(ParseError::Path);
    }
    let path = str::from_utf8(path).map_err(|_| ParseError::Path)?;
    match path {
        "*" if method == "OPTIONS" => Ok((Target::Asterisk, path)),
        _ if path.starts_with('/') => Ok((Target::Origin, path)),
        _ => Err(ParseError::Path),
    }
}

/// Returns the host of a request (RFC 9113, section 8.3.1).
fn read_host<'a>(
    authority: Option<&'a [u8]>,
    headers: &Headers<'a>,
    default_port: &str,
) -> Result<&'a str, ParseError> {
    let read = |value: &'a [u8]| {
        let text = str::from_utf8(value).map_err(|_| ParseError::Authority)?;
        // Some clients (h2load) send an IPv6 address without brackets, as in HTTP/1.
        if is_authority(text) || text.parse::<std::net::Ipv6Addr>().is_ok() {
            Ok(text)
        } else {
            Err(ParseError::Authority)
        }
    };
    let mut hosts = headers.values("host");
    let (host, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(ParseError::HostDiffers);
    }
    match (authority.map(read).transpose()?, host.map(read).transpose()?) {
        (Some(authority), Some(host)) => {
            let without_port = |host: &'a str| host.strip_suffix(default_port).unwrap_or(host);
            if without_port(authority).eq_ignore_ascii_case(without_port(host)) {
                Ok(authority)
            } else {
                Err(ParseError::HostDiffers)
            }
        }
        (Some(host), None) | (None, Some(host)) => Ok(host),
        (None, None) => Err(ParseError::Authority),
    }
}

fn has_port(authority: &str) -> bool {
    let port = authority.rsplit_once(':').map(|(_, port)| port);
    port.is_some_and(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Returns whether a content type is `application/grpc`, perhaps with a format or parameters.
fn is_grpc(content_type: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    content_type
        .split_at_checked(GRPC.len())
        .is_some_and(|(begin, rest)| {
            begin.eq_ignore_ascii_case(GRPC) && matches!(rest.first(), None | Some(b'+' | b';' | b' '))
        })
}
