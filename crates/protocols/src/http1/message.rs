//! Heads of requests and responses: target, fields, and how the body is framed (RFC 9112, 6).

use std::{mem::MaybeUninit, str};

use super::{
    ParseError,
    head::{Folded, is_token},
};

/// Most fields of a head.
pub const MAX_HEADERS: usize = 128;

/// The fields that frame or route a message, as they are written and as [`Folded`].
const FRAMING: [(&str, &[u8]); 9] = [
    ("content-length", b"contentlength"),
    ("transfer-encoding", b"transferencoding"),
    ("connection", b"connection"),
    ("upgrade", b"upgrade"),
    ("host", b"host"),
    ("expect", b"expect"),
    ("te", b"te"),
    ("trailer", b"trailer"),
    ("http2-settings", b"http2settings"),
];

/// How the body of a message is framed (RFC 9112, 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
    /// Everything until the connection is closed; answers only.
    UntilClose,
    /// No HTTP any more: the connection was handed over (101, or an answer to CONNECT).
    Tunnel,
}

/// The form of a request's target (RFC 9112, 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A path.
    Origin,
    /// A whole URI, as proxies get it.
    Absolute,
    /// Host and port, of CONNECT.
    Authority,
    /// `*`, of OPTIONS.
    Asterisk,
}

/// HeaderBuffer for the fields of one head.
#[derive(Debug)]
pub struct HeaderBuffer<'a>([MaybeUninit<httparse::Header<'a>>; MAX_HEADERS]);

impl HeaderBuffer<'_> {
    /// Costs nothing: only what a head needs of it is ever written.
    #[must_use]
    pub const fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; MAX_HEADERS])
    }
}

impl Default for HeaderBuffer<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// The fields of a head.
#[derive(Clone, Copy, Debug)]
pub struct Headers<'a>(&'a [httparse::Header<'a>]);

impl<'a> Headers<'a> {
    /// All fields in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.0.iter().map(|field| (field.name, field.value))
    }

    /// The values of a field, whatever the case of its name.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    /// Whether a comma-separated field has an element, whatever its case.
    #[must_use]
    pub fn has(&self, name: &str, element: &str) -> bool {
        self.elements(name)
            .any(|part| part.eq_ignore_ascii_case(element.as_bytes()))
    }

    fn of(parsed: &'a [httparse::Header<'a>]) -> Result<Self, ParseError> {
        let is_name = |name: &str| !name.is_empty() && name.bytes().all(is_token);
        if !parsed.iter().all(|field| is_name(field.name)) {
            return Err(ParseError::BadName);
        }
        Ok(Self(parsed))
    }

    /// Whether some receivers take another field for this one, or may not get this one: a field's name differs from it in
    /// bytes that CGI and the interfaces made after it fold (`X_Role` for `X-Role`), or `Connection` names it, so that a
    /// proxy takes it out (RFC 9110, 7.6.1).
    #[must_use]
    pub fn is_doubtful(&self, name: &str) -> bool {
        fn folded(name: &str) -> impl Iterator<Item = u8> {
            let kept = name.bytes().filter(u8::is_ascii_alphanumeric);
            kept.map(|byte| byte.to_ascii_lowercase())
        }
        self.has("connection", name)
            || self
                .iter()
                .any(|(other, _)| !other.eq_ignore_ascii_case(name) && folded(other).eq(folded(name)))
    }

    /// Whether there is a field that is none of `fields`, and some receivers take it for one of them.
    fn has_disguised(&self, fields: &[(&str, &[u8])]) -> bool {
        self.iter().any(|(name, _)| {
            let folded = Folded::of(name);
            fields
                .iter()
                .any(|(plain, bytes)| folded.is_among(&[bytes]) && !name.eq_ignore_ascii_case(plain))
        })
    }

    /// The elements of a comma-separated field, of all its lines (RFC 9110, 5.6.1). Empty ones do not count.
    pub fn elements(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.values(name)
            .flat_map(|value| value.split(|byte| *byte == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|element| !element.is_empty())
    }

    /// How the fields frame a body, if they do.
    fn framing(&self, version: u8) -> Result<Option<Body>, ParseError> {
        let mut lengths = self.values("content-length");
        let mut encodings = self.values("transfer-encoding");
        let (length, encoding) = (lengths.next(), encodings.next());
        match (length, encoding) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(ParseError::LengthAndEncoding),
            (Some(length), None) => {
                if lengths.next().is_some() || length.is_empty() || !length.iter().all(u8::is_ascii_digit) {
                    return Err(ParseError::BadLength);
                }
                let length = str::from_utf8(length)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .ok_or(ParseError::BadLength)?;
                Ok(Some(Body::Length(length)))
            }
            (None, Some(encoding)) => {
                // RFC 9112, 6.1: a 1.0 message with a transfer coding is to be treated as faulty.
                let alone = encodings.next().is_none() && encoding.eq_ignore_ascii_case(b"chunked");
                if !alone || version == 0 {
                    return Err(ParseError::BadEncoding);
                }
                Ok(Some(Body::Chunked))
            }
        }
    }
}

/// The head of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Method, as sent.
    pub method: &'a str,
    /// Form of the target.
    pub form: Target,
    /// Path and query, as sent (`/` if an absolute URI has none; `*` of OPTIONS; empty of CONNECT).
    pub path: &'a str,
    /// Host, with its port if one was sent, as sent; empty if there is none (HTTP/1.0).
    pub host: &'a str,
    /// 0 or 1: the minor version.
    pub version: u8,
    /// How its body is framed.
    pub body: Body,
    /// Fields.
    pub headers: Headers<'a>,
}

impl<'a> Request<'a> {
    /// Reads a head that [`super::Head::find`] has found whole.
    ///
    /// # Errors
    /// If it is malformed or ambiguous.
    pub fn parse(head: &'a [u8], room: &'a mut HeaderBuffer<'a>) -> Result<Self, ParseError> {
        has_single_spaces(head)?;
        let mut parsed = httparse::Request::new(&mut []);
        match parsed.parse_with_uninit_headers(head, &mut room.0) {
            Ok(httparse::Status::Complete(length)) if length == head.len() => {}
            Ok(_) => return Err(ParseError::BadStartLine),
            Err(error) => return Err(refusal(error)),
        }
        let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
            return Err(ParseError::BadStartLine);
        };
        // What answers these methods has no body, and some servers take methods in any case.
        if ["HEAD", "CONNECT"]
            .iter()
            .any(|name| method != *name && method.eq_ignore_ascii_case(name))
        {
            return Err(ParseError::BadStartLine);
        }
        let headers = Headers::of(parsed.headers)?;
        if headers.has_disguised(&FRAMING) {
            return Err(ParseError::DisguisedName);
        }
        // A proxy takes out the fields that Connection names (RFC 9110, 7.6.1). Without its framing the body would be
        // the next request.
        let kept = ["content-length", "transfer-encoding", "host", "expect"];
        if kept.into_iter().any(|name| headers.has("connection", name)) {
            return Err(ParseError::BadConnection);
        }
        let body = headers.framing(version)?.unwrap_or(Body::None);
        let mut hosts = headers.values("host");
        let field = match (hosts.next(), hosts.next()) {
            (_, Some(_)) => return Err(ParseError::SeveralHosts),
            (Some(host), None) => {
                let host = str::from_utf8(host).map_err(|_| ParseError::BadHost)?;
                // It may be empty where the target has no authority (RFC 9110, 7.2). An IPv6 address without the brackets
                // of RFC 3986, 3.2.2 is what some clients send (h2load); rules see it as it is.
                let is_bare_address = host.parse::<std::net::Ipv6Addr>().is_ok();
                if !host.is_empty() && !is_bare_address && !is_authority(host) {
                    return Err(ParseError::BadHost);
                }
                Some(host)
            }
            (None, None) if version == 1 => return Err(ParseError::NoHost),
            (None, None) => None,
        };
        let (form, authority, path) = read_target(method, target)?;
        let mut expects = headers.values("expect");
        if let Some(expect) = expects.next()
            && (expects.next().is_some() || !expect.eq_ignore_ascii_case(b"100-continue"))
        {
            return Err(ParseError::BadExpect);
        }
        let host = match (authority, field) {
            (Some(authority), Some(host)) if !is_same_host(target, authority, host) => {
                return Err(ParseError::HostDiffers);
            }
            (Some(authority), _) => authority,
            (None, host) => host.unwrap_or_default(),
        };
        Ok(Self {
            method,
            form,
            path,
            host,
            version,
            body,
            headers,
        })
    }

    /// The protocols that the client asks to go over to (RFC 9110, 7.8). None in HTTP/1.0, and none without `upgrade`
    /// in Connection.
    pub fn upgrades(&self) -> impl Iterator<Item = &'a [u8]> {
        let asks = self.version > 0 && self.headers.has("connection", "upgrade");
        self.headers.elements("upgrade").filter(move |_| asks)
    }

    /// Whether some server may take it for a request to go over to another protocol.
    #[must_use]
    pub fn may_upgrade(&self) -> bool {
        self.headers.values("upgrade").next().is_some()
    }

    /// Whether it has a body that many servers do not read: RFC 9110, 9.3, gives the content of these methods no meaning.
    /// A server that does not read it takes it for the next request.
    #[must_use]
    pub fn has_unexpected_body(&self) -> bool {
        const WITHOUT: [&str; 6] = ["GET", "HEAD", "DELETE", "TRACE", "OPTIONS", "CONNECT"];
        !matches!(self.body, Body::None | Body::Length(0))
            && WITHOUT.iter().any(|name| self.method.eq_ignore_ascii_case(name))
    }

    /// Whether the client may wait for 100 before it sends the body (RFC 9110, 10.1.1). A server ignores that in
    /// HTTP/1.0, but not every server does.
    #[must_use]
    pub fn expects_continue(&self) -> bool {
        self.headers.values("expect").next().is_some()
    }

    /// Whether the connection may carry another request after this one (RFC 9112, 9.3).
    #[must_use]
    pub fn keeps_alive(&self) -> bool {
        if self.version == 0 {
            self.headers.has("connection", "keep-alive")
        } else {
            !self.headers.has("connection", "close")
        }
    }
}

/// The head of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// Status code.
    pub status: u16,
    /// 0 or 1: the minor version.
    pub version: u8,
    /// How its body is framed.
    pub body: Body,
    /// Fields.
    pub headers: Headers<'a>,
}

impl<'a> Response<'a> {
    /// Reads a head that [`super::Head::find`] has found whole, of an answer to a request with `method`.
    ///
    /// # Errors
    /// If it is malformed or ambiguous.
    pub fn parse(head: &'a [u8], method: &str, room: &'a mut HeaderBuffer<'a>) -> Result<Self, ParseError> {
        let mut parsed = httparse::Response::new(&mut []);
        let parser = httparse::ParserConfig::default();
        match parser.parse_response_with_uninit_headers(&mut parsed, head, &mut room.0) {
            Ok(httparse::Status::Complete(length)) if length == head.len() => {}
            Ok(_) => return Err(ParseError::BadStartLine),
            Err(error) => return Err(refusal(error)),
        }
        let (Some(status), Some(version)) = (parsed.code, parsed.version) else {
            return Err(ParseError::BadStartLine);
        };
        let headers = Headers::of(parsed.headers)?;
        // Where an answer ends decides what is taken for the next one, and a 101 has the connection left unread.
        if headers.has_disguised(&FRAMING[..2]) {
            return Err(ParseError::DisguisedName);
        }
        let framing = headers.framing(version)?;
        let body = match status {
            101 => Body::Tunnel,
            100..200 | 204 | 304 => Body::None,
            200..300 if method == "CONNECT" => Body::Tunnel,
            _ if method == "HEAD" => Body::None,
            _ => framing.unwrap_or(Body::UntilClose),
        };
        Ok(Self {
            status,
            version,
            body,
            headers,
        })
    }

    /// Whether another answer to the same request follows (RFC 9110, 15.2). 101 is the last one.
    #[must_use]
    pub fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }

    /// Whether the connection may carry another answer after this one.
    #[must_use]
    pub fn keeps_alive(&self) -> bool {
        self.body != Body::UntilClose
            && if self.version == 0 {
                self.headers.has("connection", "keep-alive")
            } else {
                !self.headers.has("connection", "close")
            }
    }
}

fn refusal(error: httparse::Error) -> ParseError {
    match error {
        httparse::Error::HeaderName => ParseError::BadName,
        httparse::Error::HeaderValue => ParseError::ControlCharacter,
        // Bare line ends do not get this far.
        httparse::Error::NewLine => ParseError::BadStartLine,
        httparse::Error::TooManyHeaders => ParseError::TooManyHeaders,
        httparse::Error::Version => ParseError::Version,
        httparse::Error::Status | httparse::Error::Token => ParseError::BadStartLine,
    }
}

/// The request line has its two spaces and no other white space (RFC 9112, 3).
fn has_single_spaces(head: &[u8]) -> Result<(), ParseError> {
    let line = head
        .split(|byte| *byte == b'\n')
        .find(|line| line.len() > 1)
        .unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let white = line.iter().filter(|byte| matches!(byte, b' ' | b'\t')).count();
    if white == 2 {
        Ok(())
    } else {
        Err(ParseError::BadStartLine)
    }
}

/// Form, authority and path of a target.
fn read_target<'a>(method: &str, target: &'a str) -> Result<(Target, Option<&'a str>, &'a str), ParseError> {
    // A fragment is never sent (RFC 9112, 3.2); what is no visible ASCII belongs in percent-encoding.
    if !target.bytes().all(|byte| matches!(byte, 0x21..=0x7e)) || target.contains('#') {
        return Err(ParseError::BadTarget);
    }
    if method == "CONNECT" {
        let (host, port) = target.rsplit_once(':').ok_or(ParseError::BadTarget)?;
        let is_port = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        if host.is_empty() || !is_port || !is_authority(target) {
            return Err(ParseError::BadTarget);
        }
        return Ok((Target::Authority, Some(target), ""));
    }
    if target == "*" {
        return if method == "OPTIONS" {
            Ok((Target::Asterisk, None, target))
        } else {
            Err(ParseError::BadTarget)
        };
    }
    if target.starts_with('/') {
        return Ok((Target::Origin, None, target));
    }
    let rest = ["http://", "https://"]
        .into_iter()
        .find_map(|scheme| strip_scheme(target, scheme))
        .ok_or(ParseError::BadTarget)?;
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if !is_authority(authority) {
        return Err(ParseError::BadTarget);
    }
    match path {
        "" => Ok((Target::Absolute, Some(authority), "/")),
        // An empty path before a query: servers differ in what they make of it.
        _ if path.starts_with('?') => Err(ParseError::BadTarget),
        _ => Ok((Target::Absolute, Some(authority), path)),
    }
}

/// A host, perhaps with a port (RFC 3986, 3.2.2). No user information (RFC 9110, 4.2.4), no escapes. Only an address
/// in brackets has colons in it, so that all receivers find the same port.
fn is_authority(text: &str) -> bool {
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        let is_address = |byte: u8| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.');
        return !address.is_empty()
            && address.bytes().all(is_address)
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (host, port) = text.split_once(':').unwrap_or((text, ""));
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !host.is_empty() && host.bytes().all(is_host) && is_port(port)
}

/// Whether the authority of a target and Host are one: whatever their case, with the scheme's default port or without;
/// Host may be without the port of CONNECT's target.
fn is_same_host(target: &str, authority: &str, host: &str) -> bool {
    let default = match () {
        () if strip_scheme(target, "http://").is_some() => ":80",
        () if strip_scheme(target, "https://").is_some() => ":443",
        () => authority
            .rfind(':')
            .and_then(|colon| authority.get(colon..))
            .unwrap_or_default(),
    };
    let without_port = |host| str::strip_suffix(host, default).unwrap_or(host);
    authority.eq_ignore_ascii_case(host) || without_port(authority).eq_ignore_ascii_case(without_port(host))
}

/// Returns what follows the scheme of an absolute target; `None` if the target has another scheme.
fn strip_scheme<'a>(target: &'a str, scheme: &str) -> Option<&'a str> {
    let (begin, rest) = target.split_at_checked(scheme.len())?;
    begin.eq_ignore_ascii_case(scheme).then_some(rest)
}
