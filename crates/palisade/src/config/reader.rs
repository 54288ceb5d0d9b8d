//! TOML with positions. Every value that is looked up is checked, every key that is not looked up is an error, and all
//! errors are reported, not only the first.

use std::{
    cell::RefCell,
    fmt,
    net::{IpAddr, SocketAddr},
    ops::Range,
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use toml::de::{DeTable, DeValue};

use palisade_abi::ETHER_TYPE_LLC;
use palisade_flowlog::duration;

use super::suggest::suggestion;

/// An error at a place of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigError {
    /// Path of the file.
    pub file: String,
    /// Line, from 1; 0 for the whole file.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Description of the error, with a correction.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}:{}: {}", self.file, self.column, self.message),
        }
    }
}

/// EtherTypes by name (IANA, IEEE 802 Numbers), and [`ETHER_TYPE_LLC`].
const ETHER_TYPE_NAMES: &[(&str, u16)] = &[
    ("llc", ETHER_TYPE_LLC),
    ("wol", 0x0842),
    ("rarp", 0x8035),
    ("mpls", 0x8847),
    ("mpls-multicast", 0x8848),
    ("pppoe-discovery", 0x8863),
    ("pppoe-session", 0x8864),
    ("eapol", 0x888e),
    ("profinet", 0x8892),
    ("aoe", 0x88a2),
    ("ethercat", 0x88a4),
    ("lldp", 0x88cc),
    ("macsec", 0x88e5),
    ("ptp", 0x88f7),
    ("cfm", 0x8902),
    ("fcoe", 0x8906),
    ("fip", 0x8914),
    ("roce", 0x8915),
];

/// The text, with the errors found so far.
pub(super) struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    errors: RefCell<Vec<(usize, ConfigError)>>,
    /// Paths of all keys that were looked up, for the test that each option has a reload rule.
    #[cfg(test)]
    pub asked: RefCell<std::collections::BTreeSet<String>>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a str, text: &'a str) -> Self {
        Self {
            file,
            text,
            errors: RefCell::default(),
            #[cfg(test)]
            asked: RefCell::default(),
        }
    }

    /// Notes an error at a byte offset.
    pub(super) fn error(&self, offset: usize, message: impl Into<String>) {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let error = ConfigError {
            file: self.file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            message: message.into(),
        };
        self.errors.borrow_mut().push((offset, error));
    }

    /// Returns the line of a byte offset, from 1.
    fn line(&self, offset: usize) -> u32 {
        let before = self.text.get(..offset).unwrap_or(self.text);
        u32::try_from(before.matches('\n').count() + 1).unwrap_or(u32::MAX)
    }

    /// Returns all errors, in the order of the text.
    pub(super) fn into_errors(self) -> Vec<ConfigError> {
        let mut errors = self.errors.into_inner();
        errors.sort_by_key(|(offset, _)| *offset);
        errors.into_iter().map(|(_, error)| error).collect()
    }
}

/// A value with its byte offset in the text.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub value: T,
    pub offset: usize,
}

/// One table of the text. Its unknown keys are reported by [`Section::finish`], which must be called.
pub(super) struct Section<'r, 'a> {
    reader: &'r Reader<'a>,
    name: String,
    /// `None` if the text does not have the table. Every value then has its default.
    table: Option<&'r DeTable<'r>>,
    span: Range<usize>,
    asked: RefCell<Vec<&'static str>>,
}

impl<'r, 'a> Section<'r, 'a> {
    /// Returns the whole text as a section.
    pub(super) fn root(reader: &'r Reader<'a>, table: &'r DeTable<'r>) -> Self {
        Self {
            reader,
            name: String::new(),
            table: Some(table),
            span: 0..0,
            asked: RefCell::default(),
        }
    }

    /// Notes an error about this section as a whole.
    pub(super) fn error(&self, message: impl Into<String>) {
        self.reader.error(self.span.start, message);
    }

    /// Notes an error at a value.
    pub(super) fn error_at(&self, offset: usize, message: impl Into<String>) {
        self.reader.error(offset, message);
    }

    /// Returns the line of a value, from 1.
    pub(super) fn line(&self, offset: usize) -> u32 {
        self.reader.line(offset)
    }

    fn get(&self, key: &'static str) -> Option<(&'r DeValue<'r>, Range<usize>)> {
        self.asked.borrow_mut().push(key);
        #[cfg(test)]
        self.reader.asked.borrow_mut().insert(self.path(key));
        let value = self.table?.get(key)?;
        Some((value.get_ref(), value.span()))
    }

    fn path(&self, key: &str) -> String {
        if self.name.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.name)
        }
    }

    fn wrong_type(&self, key: &str, wanted: &str, value: &DeValue<'_>, offset: usize) {
        self.reader.error(
            offset,
            format!("{} must be {wanted}, not {}", self.path(key), described(value)),
        );
    }

    /// Returns a table; a missing one reads as empty.
    pub(super) fn table(&self, key: &'static str) -> Section<'r, 'a> {
        let found = self.get(key).and_then(|(value, span)| match value {
            DeValue::Table(table) => Some((table, span)),
            other => {
                self.wrong_type(key, &format!("a table: [{}]", self.path(key)), other, span.start);
                None
            }
        });
        let span = found.as_ref().map_or(0..0, |(_, span)| span.clone());
        Section {
            reader: self.reader,
            name: self.path(key),
            table: found.map(|(table, _)| table),
            span,
            asked: RefCell::default(),
        }
    }

    /// Returns an array of tables; a missing one reads as empty.
    pub(super) fn tables(&self, key: &'static str) -> Vec<Section<'r, 'a>> {
        let Some((value, span)) = self.get(key) else {
            return Vec::new();
        };
        let wanted = format!("a list of tables: [[{key}]]");
        let DeValue::Array(array) = value else {
            self.wrong_type(key, &wanted, value, span.start);
            return Vec::new();
        };
        array
            .iter()
            .filter_map(|element| match element.get_ref() {
                DeValue::Table(table) => Some(Section {
                    reader: self.reader,
                    name: key.to_owned(),
                    table: Some(table),
                    span: element.span(),
                    asked: RefCell::default(),
                }),
                other => {
                    self.wrong_type(key, &wanted, other, element.span().start);
                    None
                }
            })
            .collect()
    }

    /// Returns a string that must exist and not be empty.
    pub(super) fn required_string(&self, key: &'static str, example: &str) -> Option<At<String>> {
        let present = self.table.is_some_and(|table| table.contains_key(key));
        match self.string(key) {
            Some(at) if at.value.is_empty() => {
                self.reader.error(
                    at.offset,
                    format!("{} is empty: write for example {example}", self.path(key)),
                );
                None
            }
            None if !present => {
                self.error(format!("[[{}]] needs {key} = {example}", self.name));
                None
            }
            found => found,
        }
    }

    /// Returns a string.
    pub(super) fn string(&self, key: &'static str) -> Option<At<String>> {
        let (value, span) = self.get(key)?;
        if let DeValue::String(text) = value {
            return Some(At {
                value: text.to_string(),
                offset: span.start,
            });
        }
        self.wrong_type(key, "a string", value, span.start);
        None
    }

    /// Returns a boolean.
    pub(super) fn boolean(&self, key: &'static str) -> Option<bool> {
        let (value, span) = self.get(key)?;
        if let DeValue::Boolean(boolean) = value {
            return Some(*boolean);
        }
        self.wrong_type(key, "true or false", value, span.start);
        None
    }

    /// Returns an integer within bounds.
    pub(super) fn integer(&self, key: &'static str, bounds: Range<u64>) -> Option<u64> {
        let (value, span) = self.get(key)?;
        let DeValue::Integer(integer) = value else {
            self.wrong_type(key, "a whole number", value, span.start);
            return None;
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok();
        let number = number.filter(|number| bounds.contains(number));
        if number.is_none() {
            self.reader.error(
                span.start,
                format!(
                    "{} must be between {} and {}",
                    self.path(key),
                    bounds.start,
                    bounds.end - 1
                ),
            );
        }
        number
    }

    /// Returns a duration within bounds.
    pub(super) fn duration(&self, key: &'static str, bounds: Range<Duration>) -> Option<Duration> {
        let at = self.string(key)?;
        match duration::parse(&at.value) {
            Ok(value) if bounds.contains(&value) => return Some(value),
            Ok(_) => self.reader.error(
                at.offset,
                format!(
                    "{} must be at least {} and less than {}",
                    self.path(key),
                    duration::format(bounds.start),
                    duration::format(bounds.end)
                ),
            ),
            Err(message) => self
                .reader
                .error(at.offset, format!("{}: {message}", self.path(key))),
        }
        None
    }

    /// Returns an absolute path.
    pub(super) fn absolute_path(&self, key: &'static str) -> Option<PathBuf> {
        let at = self.string(key)?;
        let path = PathBuf::from(&at.value);
        if path.is_absolute() {
            return Some(path);
        }
        self.reader
            .error(at.offset, format!("{} must be an absolute path", self.path(key)));
        None
    }

    /// Returns the value of one of several words.
    pub(super) fn choice<T: Copy>(&self, key: &'static str, choices: &[(&'static str, T)]) -> Option<T> {
        let at = self.string(key)?;
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == at.value) {
            return Some(*value);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.reader.error(
            at.offset,
            format!(
                "{} cannot be '{}': it is one of {}{}",
                self.path(key),
                at.value,
                names.join(", "),
                suggestion(&at.value, names.iter().copied())
            ),
        );
        None
    }

    /// Returns a list of strings, each parsed by `read`. An error of `read` is reported at the string.
    pub(super) fn list<T>(
        &self,
        key: &'static str,
        wanted: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<At<T>>> {
        let (value, span) = self.get(key)?;
        let DeValue::Array(array) = value else {
            self.wrong_type(key, wanted, value, span.start);
            return None;
        };
        let mut list = Vec::new();
        for element in array.iter() {
            let offset = element.span().start;
            match element.get_ref() {
                DeValue::String(text) => match read(text) {
                    Ok(value) => list.push(At { value, offset }),
                    Err(message) => self
                        .reader
                        .error(offset, format!("{}: {message}", self.path(key))),
                },
                other => self.wrong_type(key, wanted, other, offset),
            }
        }
        Some(list)
    }

    /// Returns a list of IP addresses.
    pub(super) fn addresses(&self, key: &'static str) -> Option<Vec<At<IpAddr>>> {
        self.list(
            key,
            "a list of IP addresses: [\"10.0.1.10\", \"fd00::10\"]",
            |text| {
                let bare = text.parse::<IpAddr>();
                let address = bare.or_else(|error| match text.parse::<IpNet>() {
                    // A prefix of full length is an address. A shorter prefix would be several addresses.
                    Ok(net) if net.prefix_len() == net.max_prefix_len() => Ok(net.addr()),
                    Ok(_) => Err(format!("'{text}' is a prefix; an address is wanted")),
                    Err(_) => Err(format!("'{text}' is no IP address ({error})")),
                })?;
                if address.is_unspecified() || address.is_multicast() {
                    return Err(format!("'{text}' cannot be the address of anybody"));
                }
                Ok(address)
            },
        )
    }

    /// Returns a list of IP addresses with ports. An address without a port gets `port`.
    pub(super) fn servers(&self, key: &'static str, port: u16) -> Option<Vec<At<SocketAddr>>> {
        self.list(
            key,
            "a list of addresses: [\"192.0.2.53\", \"[2001:db8::53]:5353\"]",
            |text| {
                let bare = text
                    .parse::<IpAddr>()
                    .map(|address| SocketAddr::new(address, port));
                bare.or_else(|_| text.parse())
                    .map_err(|_| format!("'{text}' is neither an IP address nor one with a port"))
            },
        )
    }

    /// Returns a list of header field names (RFC 9110, section 5.1), in lower case.
    pub(super) fn header_names(&self, key: &'static str) -> Option<Vec<At<String>>> {
        const LONGEST: usize = 64;
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        self.list(key, "a list of names: [\"user-agent\"]", |text| {
            if text.is_empty() || text.len() > LONGEST || !text.bytes().all(is_token) {
                return Err(format!(
                    "'{text}' cannot be the name of a header (letters, digits and '-', at most {LONGEST}); write for \
                     example \"user-agent\""
                ));
            }
            Ok(text.to_ascii_lowercase())
        })
    }

    /// Returns a list of EtherTypes: names or numbers.
    pub(super) fn ether_types(&self, key: &'static str) -> Option<Vec<At<u16>>> {
        let wanted = "a list of EtherTypes by name or number: [\"ptp\", \"0x8863\"]";
        self.list(key, wanted, |text| {
            let names = || ETHER_TYPE_NAMES.iter().map(|(name, _)| *name);
            let named = ETHER_TYPE_NAMES.iter().find(|(name, _)| *name == text);
            if let Some((_, number)) = named {
                return Ok(*number);
            }
            let number = match text.strip_prefix("0x") {
                Some(digits) => u16::from_str_radix(digits, 16),
                None => text.parse(),
            };
            match number {
                // Policies decide on these frames, so no list can let them pass.
                Ok(0x0800 | 0x86dd | 0x0806 | 0x8100 | 0x88a8) => Err(format!(
                    "'{text}' is IPv4, IPv6, ARP or a VLAN tag: policies decide on these, never a list"
                )),
                Ok(number) if number >= 1536 => Ok(number),
                Ok(_) => Err(format!(
                    "'{text}' is less than 0x0600 and so no EtherType; frames with a length instead are \"llc\""
                )),
                Err(_) => Err(format!(
                    "'{text}' is neither a number like \"0x88f7\" nor one of: {}{}",
                    names().collect::<Vec<_>>().join(", "),
                    suggestion(text, names())
                )),
            }
        })
    }

    /// Returns a list of prefixes; an address is a prefix of full length.
    pub(super) fn prefixes(&self, key: &'static str) -> Option<Vec<At<IpNet>>> {
        self.list(
            key,
            "a list of addresses or prefixes: [\"10.0.9.0/24\"]",
            |text| {
                if let Ok(address) = text.parse::<IpAddr>() {
                    return Ok(IpNet::from(address));
                }
                let net: IpNet = text.parse().map_err(|_| {
                    format!("'{text}' is neither an IP address nor a prefix like 10.0.9.0/24")
                })?;
                if net.trunc() != net {
                    return Err(format!(
                        "'{text}' has bits set after the prefix: write {}",
                        net.trunc()
                    ));
                }
                Ok(net)
            },
        )
    }

    /// Returns a table of strings, in the order of the text.
    pub(super) fn strings(&self, key: &'static str) -> Vec<(At<String>, At<String>)> {
        let Some((value, span)) = self.get(key) else {
            return Vec::new();
        };
        let DeValue::Table(table) = value else {
            self.wrong_type(key, "a table of strings: { app = \"web\" }", value, span.start);
            return Vec::new();
        };
        let mut list = Vec::new();
        for (name, value) in table.iter() {
            let offset = value.span().start;
            match value.get_ref() {
                DeValue::String(text) => list.push((
                    At {
                        value: name.get_ref().to_string(),
                        offset: name.span().start,
                    },
                    At {
                        value: text.to_string(),
                        offset,
                    },
                )),
                other => self.wrong_type(&format!("{key}.{}", name.get_ref()), "a string", other, offset),
            }
        }
        list.sort_by_key(|(name, _)| name.offset);
        list
    }

    /// Reports the keys that were not looked up.
    pub(super) fn finish(self) {
        let asked = self.asked.into_inner();
        for key in self.table.into_iter().flat_map(|table| table.keys()) {
            let name = key.get_ref().as_ref();
            if !asked.contains(&name) {
                let place = if self.name.is_empty() {
                    "at the top level".to_owned()
                } else {
                    format!("in {}", self.name)
                };
                let mut known = asked.clone();
                known.sort_unstable();
                self.reader.error(
                    key.span().start,
                    format!(
                        "unknown key '{name}' {place}{}; known here: {}",
                        suggestion(name, asked.iter().copied()),
                        known.join(", ")
                    ),
                );
            }
        }
    }
}

fn described(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
