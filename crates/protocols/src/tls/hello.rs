//! Parser of the ClientHello: server name, versions, early data, ECH (RFC 8446, section 4.1.2; RFC 6066, section 3).

use std::net::IpAddr;

use super::ParseError;
use crate::dns::Name;

/// The parts of a ClientHello that rules and records need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientHello {
    /// The highest version that the client offers: 0x0303 for TLS 1.2, 0x0304 for TLS 1.3.
    pub version: u16,
    /// The server name.
    pub server_name: ServerName,
    /// Whether the hello has an encrypted inner hello (ECH), so that `server_name` is the outer name. A GREASE
    /// extension without an inner hello looks the same (RFC 9849, section 6.2).
    pub ech: bool,
    /// Whether the client sends early data (0-RTT, RFC 8446, section 4.2.10).
    pub early_data: bool,
}

/// The server name in a ClientHello.
#[allow(
    clippy::large_enum_variant,
    reason = "only one exists per hello that is being inspected; boxing it would allocate for each"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerName {
    /// The hello has no server name.
    Missing,
    /// A host name in lower case, without the trailing dot.
    Name(Name),
    /// An IP address in text form. RFC 6066, section 3, forbids it, but some clients send it.
    Address(IpAddr),
}

const SERVER_NAME: u16 = 0;
const EARLY_DATA: u16 = 42;
const SUPPORTED_VERSIONS: u16 = 43;
const ENCRYPTED_HELLO: u16 = 0xfe0d;
/// Name type `host_name`.
const HOST_NAME: u8 = 0;

/// Maximum number of extensions in a hello. Each extension is compared with all earlier ones to find duplicates, so the
/// limit bounds a quadratic cost.
const MAX_EXTENSIONS: usize = 128;

/// Reads big-endian numbers and length-prefixed vectors from the front of a slice.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], ParseError> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(ParseError::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(ParseError::Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, ParseError> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn u16(&mut self) -> Result<u16, ParseError> {
        self.array().map(u16::from_be_bytes)
    }

    fn vector8(&mut self) -> Result<&'a [u8], ParseError> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }

    fn vector16(&mut self) -> Result<&'a [u8], ParseError> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }

    fn finish(self) -> Result<(), ParseError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(ParseError::Malformed)
        }
    }
}

impl ClientHello {
    /// Parses the body of a ClientHello, without the four bytes of handshake type and length.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ParseError> {
        let mut cursor = Cursor(body);
        let mut version = cursor.u16()?;
        cursor.take(32)?;
        if cursor.vector8()?.len() > 32 {
            return Err(ParseError::Malformed);
        }
        let suites = cursor.vector16()?;
        if suites.is_empty() || suites.len() % 2 != 0 {
            return Err(ParseError::Malformed);
        }
        if cursor.vector8()?.is_empty() {
            return Err(ParseError::Malformed);
        }
        let mut hello = Self {
            version,
            server_name: ServerName::Missing,
            ech: false,
            early_data: false,
        };
        // Extensions are optional in TLS 1.2 (RFC 5246, section 7.4.1.2).
        if cursor.0.is_empty() {
            return Ok(hello);
        }
        let mut extensions = Cursor(cursor.vector16()?);
        cursor.finish()?;
        let mut seen = [0; MAX_EXTENSIONS];
        let mut count = 0;
        while !extensions.0.is_empty() {
            let kind = extensions.u16()?;
            let data = extensions.vector16()?;
            if seen.get(..count).ok_or(ParseError::Malformed)?.contains(&kind) {
                return Err(ParseError::DuplicateExtension);
            }
            *seen.get_mut(count).ok_or(ParseError::Malformed)? = kind;
            count += 1;
            match kind {
                SERVER_NAME => hello.server_name = server_name(data)?,
                SUPPORTED_VERSIONS => version = version.max(highest_version(data)?),
                EARLY_DATA => hello.early_data = true,
                ENCRYPTED_HELLO => hello.ech = true,
                _ => {}
            }
        }
        hello.version = version;
        Ok(hello)
    }
}

fn server_name(data: &[u8]) -> Result<ServerName, ParseError> {
    let mut cursor = Cursor(data);
    let mut list = Cursor(cursor.vector16()?);
    cursor.finish()?;
    let kind = list.u8()?;
    let text = list.vector16()?;
    if kind != HOST_NAME || !list.0.is_empty() {
        return Err(ParseError::SeveralNames);
    }
    ServerName::of_host(text)
}

impl ServerName {
    /// Parses the host name of a hello: a name, or an IP address in text form.
    ///
    /// # Errors
    /// [`ParseError::BadName`] if the text is neither.
    pub fn of_host(text: &[u8]) -> Result<Self, ParseError> {
        let text = std::str::from_utf8(text).map_err(|_| ParseError::BadName)?;
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if !text.bytes().all(is_host_byte) {
            return Err(ParseError::BadName);
        }
        match text.parse::<Name>() {
            Ok(name) if !name.is_root() => Ok(Self::Name(name)),
            _ => Err(ParseError::BadName),
        }
    }
}

/// Returns whether host names can contain the byte: letters, digits, hyphens, underscores, and dots between labels.
/// Other bytes are refused because implementations could read an escape or a NUL in different ways.
fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

/// Returns the highest version in a list, without GREASE values (RFC 8701).
fn highest_version(data: &[u8]) -> Result<u16, ParseError> {
    let mut cursor = Cursor(data);
    let list = cursor.vector8()?;
    cursor.finish()?;
    let (versions, rest) = list.as_chunks();
    if versions.is_empty() || !rest.is_empty() {
        return Err(ParseError::Malformed);
    }
    Ok(versions
        .iter()
        .map(|version| u16::from_be_bytes(*version))
        .filter(|version| version & 0x0f0f != 0x0a0a)
        .max()
        .unwrap_or(0))
}
