//! Heads of requests and responses: target, fields, and the framing of the body (RFC 9112, section 6).

use std::{mem::MaybeUninit, str};

use super::{
    ParseError,
    head::{Folded, is_token},
};

/// Maximum number of fields in a head.
pub const MAX_HEADERS: usize = 128;

/// The fields that frame or route a message: each name, and the same name in the form of [`Folded`].
pub(crate) const FRAMING: [(&str, &[u8]); 9] = [
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

/// The framing of a body (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// The message has no body.
    None,
    /// Content-Length, bytes.
    Length(u64),
    /// Transfer-Encoding: chunked.
    Chunked,
    /// The body ends with the connection; responses only.
    UntilClose,
    /// The connection switches to another protocol: a 101 response, or a successful response to CONNECT.
    Tunnel,
}

/// The form of a request target (RFC 9112, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A path, with an optional query.
    Origin,
    /// An absolute URI, as clients send it to proxies.
    Absolute,
    /// Host and port; only CONNECT.
    Authority,
    /// `*`; only OPTIONS.
    Asterisk,
}

/// A buffer for the fields of one head.
#[derive(Debug)]
pub struct HeaderBuffer<'a>([MaybeUninit<httparse::Header<'a>>; MAX_HEADERS]);

impl HeaderBuffer<'_> {
    /// Creates a buffer without initialising it, so that it costs nothing per message.
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
    /// Returns the names and values of all fields in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.0.iter().map(|field| (field.name, field.value))
    }

    /// Returns the values of all fields with this name; letter case is ignored.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    /// Returns whether the comma-separated field `name` has the element `element`; letter case is ignored.
    #[must_use]
    pub fn has(&self, name: &str, element: &str) -> bool {
        self.elements(name)
            .any(|part| part.eq_ignore_ascii_case(element.as_bytes()))
    }

    pub(crate) fn of(parsed: &'a [httparse::Header<'a>]) -> Result<Self, ParseError> {
        let is_name = |name: &str| !name.is_empty() && name.bytes().all(is_token);
        if !parsed.iter().all(|field| is_name(field.name)) {
            return Err(ParseError::BadName);
        }
        Ok(Self(parsed))
    }

    /// Returns whether servers could disagree about the value of this field. One cause is another field that becomes
    /// the same variable in CGI and similar interfaces (`X_Role` and `X-Role`). The other cause is a `Connection` field
    /// that names this field, so that a proxy removes it (RFC 9110, section 7.6.1).
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

    /// Returns whether there is a field whose name is not in `fields`, but which some servers read as one of `fields`.
    pub(crate) fn has_disguised(&self, fields: &[(&str, &[u8])]) -> bool {
        self.iter().any(|(name, _)| {
            // Most names differ from all `fields` in the first byte of the reduced form.
            let first = name.bytes().find(u8::is_ascii_alphanumeric);
            let first = first.map(|byte| byte.to_ascii_lowercase());
            fields.iter().any(|(plain, bytes)| {
                bytes.first().copied() == first
                    && Folded::of(name).is_among(&[bytes])
                    && !name.eq_ignore_ascii_case(plain)
            })
        })
    }

    /// Returns the elements of a comma-separated field, from all of its lines, without empty elements (RFC 9110,
    /// section 5.6.1).
    pub fn elements(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.values(name)
            .flat_map(|value| value.split(|byte| *byte == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|element| !element.is_empty())
    }

    /// Returns the framing that Content-Length or Transfer-Encoding specifies; `None` if there is neither.
    pub(crate) fn framing(&self, version: u8) -> Result<Option<Body>, ParseError> {
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
                // An HTTP/1.0 message with Transfer-Encoding has faulty framing (RFC 9112, section 6.1).
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
    /// The method, as sent.
    pub method: &'a str,
    /// The form of the target.
    pub form: Target,
    /// Path and query, as sent. `/` if an absolute URI has no path, `*` for [`Target::Asterisk`], empty for CONNECT.
    pub path: &'a str,
    /// Host and optional port, as sent: from the target if it has an authority, otherwise from the Host field; empty
    /// without either.
    pub host: &'a str,
    /// The minor version of HTTP/1, 0 or 1; 2 for a request of HTTP/2.
    pub version: u8,
    /// The framing of the body.
    pub body: Body,
    /// The fields.
    pub headers: Headers<'a>,
}

impl<'a> Request<'a> {
    /// Parses a complete head, as [`super::Head::find`] delimits it.
    ///
    /// # Errors
    /// [`ParseError`] if the head is malformed or ambiguous.
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
        // Responses to HEAD and CONNECT are framed differently from others. Some servers treat `head` as HEAD, so the
        // end of the response to `head` would be ambiguous.
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
        // A proxy removes the fields that Connection names (RFC 9110, section 7.6.1). If it removed Content-Length, the
        // server would read the body as the next request.
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
                // Host is empty if the target URI has no authority (RFC 9110, section 7.2). Some clients (h2load) send
                // an IPv6 address without the brackets of RFC 3986, section 3.2.2; rules are matched against the host
                // as sent.
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

    /// Returns the protocols that the client requests with Upgrade (RFC 9110, section 7.8). The iterator is empty for
    /// HTTP/1.0, and if Connection does not contain `upgrade`.
    pub fn upgrades(&self) -> impl Iterator<Item = &'a [u8]> {
        let asks = self.version > 0 && self.headers.has("connection", "upgrade");
        self.headers.elements("upgrade").filter(move |_| asks)
    }

    /// Returns whether the request has an Upgrade field. Some servers switch protocols even if [`Self::upgrades`] is
    /// empty.
    #[must_use]
    pub fn may_upgrade(&self) -> bool {
        self.headers.values("upgrade").next().is_some()
    }

    /// Returns whether the request has a body although RFC 9110, section 9.3, defines no use of a body for its method.
    /// Many servers do not read such a body, and parse its bytes as the next request.
    #[must_use]
    pub fn has_unexpected_body(&self) -> bool {
        const WITHOUT: [&str; 6] = ["GET", "HEAD", "DELETE", "TRACE", "OPTIONS", "CONNECT"];
        !matches!(self.body, Body::None | Body::Length(0))
            && WITHOUT.iter().any(|name| self.method.eq_ignore_ascii_case(name))
    }

    /// Returns whether the client can wait for a 100 response before it sends the body (RFC 9110, section 10.1.1).
    /// HTTP/1.0 requests count too: servers must ignore their Expect, but some do not.
    #[must_use]
    pub fn expects_continue(&self) -> bool {
        self.headers.values("expect").next().is_some()
    }

    /// Returns whether another request may follow on the connection (RFC 9112, section 9.3).
    #[must_use]
    pub fn keeps_alive(&self) -> bool {
        if self.version == 0 {
            self.headers.has("connection", "keep-alive")
        } else {
            !self.headers.has("connection", "close")
        }
    }
}

/// The head of a response.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// The status code.
    pub status: u16,
    /// The minor version, 0 or 1.
    pub version: u8,
    /// The framing of the body.
    pub body: Body,
    /// The fields.
    pub headers: Headers<'a>,
}

impl<'a> Response<'a> {
    /// Parses the complete head of a response to a request with `method`, as [`super::Head::find`] delimits it.
    ///
    /// # Errors
    /// [`ParseError`] if the head is malformed or ambiguous.
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
        // Check only the names that frame a response: if they were ambiguous, the start of the next response would be
        // too.
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

    /// Returns whether this is an interim response: another response to the same request follows (RFC 9110, section
    /// 15.2). A 101 is not one, because no further response follows it.
    #[must_use]
    pub fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }

    /// Returns whether another response may follow on the connection.
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
        // `Head::find` has refused bare line ends, so this is an error in the start line.
        httparse::Error::NewLine => ParseError::BadStartLine,
        httparse::Error::TooManyHeaders => ParseError::TooManyHeaders,
        httparse::Error::Version => ParseError::Version,
        httparse::Error::Status | httparse::Error::Token => ParseError::BadStartLine,
    }
}

/// Returns an error unless the request line has exactly two spaces and no other white space (RFC 9112, section 3).
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

/// Returns form, authority and path of a request target.
fn read_target<'a>(method: &str, target: &'a str) -> Result<(Target, Option<&'a str>, &'a str), ParseError> {
    // A target has no fragment (RFC 9112, section 3.2), and bytes other than visible ASCII must be percent-encoded.
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
        // Servers differ in which path they use for an empty path before a query.
        _ if path.starts_with('?') => Err(ParseError::BadTarget),
        _ => Ok((Target::Absolute, Some(authority), path)),
    }
}

/// Returns whether the text is a host with an optional port (RFC 3986, section 3.2.2), without user information (RFC
/// 9110, section 4.2.4) and without escapes. Colons of a host must be in brackets, so that all servers agree on where
/// the port starts.
pub(crate) fn is_authority(text: &str) -> bool {
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

/// Returns whether the authority of a target and the Host field name the same host. Letter case and the default port of
/// the scheme are ignored. For CONNECT, Host can omit the port of the target.
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

/// Returns the part of an absolute target after the scheme; `None` if the target has another scheme.
fn strip_scheme<'a>(target: &'a str, scheme: &str) -> Option<&'a str> {
    let (begin, rest) = target.split_at_checked(scheme.len())?;
    begin.eq_ignore_ascii_case(scheme).then_some(rest)
}
