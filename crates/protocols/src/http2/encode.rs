//! Stateless encoder of header blocks (RFC 7541): fields are literals without indexing or entries of the static table.

use super::{SizeUpdates, hpack::STATIC};

/// Appends a field. A sensitive field is encoded as never indexed (RFC 7541, section 6.2.3).
pub fn field(name: &[u8], value: &[u8], sensitive: bool, out: &mut Vec<u8>) {
    let index = static_name(name);
    if let Some(index) = index
        && !sensitive
        && index <= LAST_WITH_VALUES
        && let Some(exact) = static_field(index, name, value)
    {
        return integer(exact, 7, 0x80, out);
    }
    let pattern = if sensitive { 0x10 } else { 0 };
    integer(index.unwrap_or(0), 4, pattern, out);
    if index.is_none() {
        string(name, out);
    }
    string(value, out);
}

/// Appends dynamic table size updates (RFC 7541, section 6.3).
pub fn size_updates(updates: SizeUpdates, out: &mut Vec<u8>) {
    if let Some(least) = updates.least
        && updates.last != Some(least)
    {
        integer(least as usize, 5, 0x20, out);
    }
    if let Some(last) = updates.last {
        integer(last as usize, 5, 0x20, out);
    }
}

fn integer(value: usize, prefix: u32, pattern: u8, out: &mut Vec<u8>) {
    let mask = (1 << prefix) - 1;
    if value < mask {
        out.push(pattern | value as u8);
        return;
    }
    out.push(pattern | mask as u8);
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn string(text: &[u8], out: &mut Vec<u8>) {
    integer(text.len(), 7, 0, out);
    out.extend_from_slice(text);
}

/// Index of the last entry of the static table that begins a run of entries with different values of one name.
const LAST_WITH_VALUES: usize = 16;

/// Returns the index of the entry with this name and value, among the entries from `index` on with the same name.
fn static_field(index: usize, name: &[u8], value: &[u8]) -> Option<usize> {
    let run = STATIC.iter().zip(1..).skip(index - 1);
    let mut run = run.take_while(|((known, _), _)| *known == name);
    run.find_map(|((_, known), index)| (*known == value && !known.is_empty()).then_some(index))
}

/// Returns the index of the first entry of the static table with this name.
fn static_name(name: &[u8]) -> Option<usize> {
    Some(match name {
        b":authority" => 1,
        b":method" => 2,
        b":path" => 4,
        b":scheme" => 6,
        b":status" => 8,
        b"accept-charset" => 15,
        b"accept-encoding" => 16,
        b"accept-language" => 17,
        b"accept-ranges" => 18,
        b"accept" => 19,
        b"access-control-allow-origin" => 20,
        b"age" => 21,
        b"allow" => 22,
        b"authorization" => 23,
        b"cache-control" => 24,
        b"content-disposition" => 25,
        b"content-encoding" => 26,
        b"content-language" => 27,
        b"content-length" => 28,
        b"content-location" => 29,
        b"content-range" => 30,
        b"content-type" => 31,
        b"cookie" => 32,
        b"date" => 33,
        b"etag" => 34,
        b"expect" => 35,
        b"expires" => 36,
        b"from" => 37,
        b"host" => 38,
        b"if-match" => 39,
        b"if-modified-since" => 40,
        b"if-none-match" => 41,
        b"if-range" => 42,
        b"if-unmodified-since" => 43,
        b"last-modified" => 44,
        b"link" => 45,
        b"location" => 46,
        b"max-forwards" => 47,
        b"proxy-authenticate" => 48,
        b"proxy-authorization" => 49,
        b"range" => 50,
        b"referer" => 51,
        b"refresh" => 52,
        b"retry-after" => 53,
        b"server" => 54,
        b"set-cookie" => 55,
        b"strict-transport-security" => 56,
        b"transfer-encoding" => 57,
        b"user-agent" => 58,
        b"vary" => 59,
        b"via" => 60,
        b"www-authenticate" => 61,
        _ => return None,
    })
}
