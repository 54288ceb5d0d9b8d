//! Syntax of names: resources, labels, ports, hosts.

/// Longest DNS name (RFC 1035, section 2.3.4), in characters.
const MAX_DNS_NAME: usize = 255;

/// Returns whether the name is valid for a Kubernetes resource: a DNS subdomain in lower case (RFC 1123, section 2.1).
pub(super) fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_label)
}

/// Returns whether the name is valid for a namespace: one DNS label in lower case.
pub(super) fn is_namespace(name: &str) -> bool {
    is_dns_label(name)
}

fn is_dns_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    let inside = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(inside)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Checks the key of a label, `[PREFIX/]NAME`.
pub(super) fn check_label_key(key: &str) -> Result<(), &'static str> {
    let name = match key.split_once('/') {
        Some((prefix, name)) => {
            // The keys of prefix labels also pass, such as "10.0.0.0/8" of "cidr:10.0.0.0/8", or "2001-db8--0/32".
            if prefix.len() > 253 || !prefix.split('.').all(is_dns_label) {
                return Err("the part before the \"/\" must be a DNS name in lower case");
            }
            name
        }
        None => key,
    };
    match name.len() {
        0 => return Err("it has no name"),
        1..=63 => {}
        _ => return Err("its name is longer than 63 characters"),
    }
    if is_label_text(name) {
        Ok(())
    } else {
        Err("only letters, digits, \"-\", \"_\" and \".\" are allowed in it, a letter or digit at both ends")
    }
}

/// Checks the value of a label. An empty value is valid.
pub(super) fn check_label_value(value: &str) -> Result<(), &'static str> {
    if value.len() > 63 {
        Err("it is longer than 63 characters")
    } else if value.is_empty() || is_label_text(value) {
        Ok(())
    } else {
        Err("only letters, digits, \"-\", \"_\" and \".\" are allowed in it, a letter or digit at both ends")
    }
}

fn is_label_text(text: &str) -> bool {
    let end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    end(bytes.first())
        && end(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Returns whether the name is a service name (RFC 6335, section 5.1): at most 15 letters, digits and single inner
/// hyphens, with at least one letter.
pub(super) fn is_service_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_alphabetic())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--")
}

/// Parses a port number. Also returns whether the text has a base prefix or a `_`. As in Cilium, `0x`, `0b`, `0o` and a
/// leading `0` are base prefixes, and `_` can separate digits. A text like `0x50` can also be a port *name*
/// ([`is_service_name`]).
pub(super) fn port_number(text: &str) -> Option<(u16, bool)> {
    let lower = text.to_ascii_lowercase();
    let (base, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    let based = base != 10;
    // A `_` can also follow the base prefix.
    let plain = if based {
        digits.strip_prefix('_').unwrap_or(digits)
    } else {
        digits
    };
    let digit = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
    if !plain.split('_').all(digit) {
        return None;
    }
    let port = u16::from_str_radix(&plain.replace('_', ""), base).ok()?;
    Some((port, based || plain.contains('_')))
}

/// Parses a host name or, with `wildcards`, a pattern of host names. Returns the name in lower case without the
/// trailing dot.
pub(super) fn host_name(text: &str, wildcards: bool) -> Result<String, &'static str> {
    let allowed =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.') || wildcards && b == b'*';
    if !text.bytes().all(allowed) {
        return Err(if wildcards {
            "only letters, digits, \"-\", \"_\", \".\" and \"*\" are allowed in it"
        } else if text.contains('*') {
            "\"*\" is allowed in matchPattern only"
        } else {
            "only letters, digits, \"-\", \"_\" and \".\" are allowed in it"
        });
    }
    Ok(text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase())
}

/// Returns the reason why no host name can match a name or pattern of valid characters; `None` if a host name can
/// match.
pub(super) fn names_no_host(text: &str) -> Option<&'static str> {
    if text.len() > MAX_DNS_NAME {
        Some("it is longer than 255 characters")
    } else if text
        .strip_suffix('.')
        .unwrap_or(text)
        .split('.')
        .any(str::is_empty)
    {
        Some("a name between two dots is empty")
    } else {
        None
    }
}
