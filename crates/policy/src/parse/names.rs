//! What may be the name of something: resources, labels, ports, hosts.

/// The longest DNS name (RFC 1035, 2.3.4), as text.
const MAX_DNS_NAME: usize = 255;

/// A name of a Kubernetes resource: a DNS subdomain in lower case (RFC 1123, 2.1).
pub(super) fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_label)
}

/// A name of a namespace: one DNS label in lower case.
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

/// `[PREFIX/]NAME`: what a label's key has to be.
pub(super) fn check_label_key(key: &str) -> Result<(), &'static str> {
    let name = match key.split_once('/') {
        Some((prefix, name)) => {
            // Prefixes of addresses are labels too ("cidr:10.0.0.0/8", "cidr:2001-db8--0/32").
            if prefix.len() > 253 || !prefix.split('.').all(is_dns_label) {
                return Err("what stands before the \"/\" must be a DNS name in lower case");
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

/// What a label's value has to be. It may be empty.
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

/// A service name (RFC 6335, 5.1): at most 15 letters, digits and single hyphens inside, at least one letter.
pub(super) fn is_service_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_alphabetic())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--")
}

/// A host name or, with `wildcards`, a pattern of host names; given back in lower case without the last dot.
pub(super) fn host_name(text: &str, wildcards: bool) -> Result<String, &'static str> {
    if text.len() > MAX_DNS_NAME {
        return Err("it is longer than 255 characters");
    }
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
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.split('.').any(str::is_empty) {
        return Err("a name between two dots is empty");
    }
    Ok(name.to_ascii_lowercase())
}
