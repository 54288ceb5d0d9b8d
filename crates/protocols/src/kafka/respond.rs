//! Writes responses that deny a request, and finds the error code in the responses of a server.

use super::{
    error::ParseError,
    numbers::{
        API_VERSIONS, CLUSTER_AUTHORIZATION_FAILED, FETCH_SESSION_ID_NOT_FOUND, SIZE,
        TOPIC_AUTHORIZATION_FAILED,
    },
    reader::Reader,
    request::{Header, Request},
    table::{self, Field, Resp},
    walk::{Item, TopicId},
};

/// Longest response that denies a request, bytes. A request whose response would be longer gets none.
const MAX_RESPONSE: usize = 1 << 20;
/// Maximum number of topics, partitions and groups of a request together that gets a response.
pub(super) const MAX_PARTS: usize = 10_000;
/// Node id of the broker in a denied Metadata response: none of the cluster, so that clients do not confuse them.
const BROKER_ID: i32 = 1_000_000_000;

/// Address of the broker, for a denied Metadata response. Clients ignore such a response without a broker.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Broker {
    /// Host: the address to which the client has connected.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// A denied request: its response.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Denied {
    /// The response, with its size in front.
    pub response: Vec<u8>,
    /// Error code in the response.
    pub error: i16,
}

#[derive(Clone, Copy)]
enum TopicRef<'a> {
    Name(&'a [u8]),
    Id(TopicId),
}

/// A topic of a request.
struct Topic<'a> {
    topic: TopicRef<'a>,
    /// Number of groups of the request in front of it.
    groups: usize,
    partitions: Vec<i32>,
}

/// Parts of a request that its response repeats.
#[derive(Default)]
struct Parts<'a> {
    topics: Vec<Topic<'a>>,
    groups: Vec<&'a [u8]>,
    is_all_topics: bool,
}

impl<'a> Parts<'a> {
    fn add(&mut self, item: Item<'a>) {
        let groups = self.groups.len();
        let mut push = |topic| {
            self.topics.push(Topic {
                topic,
                groups,
                partitions: Vec::new(),
            });
        };
        match item {
            Item::Topic(name) => push(TopicRef::Name(name)),
            Item::TopicId(id) => push(TopicRef::Id(id)),
            Item::Partition(partition) => {
                if let Some(topic) = self.topics.last_mut() {
                    topic.partitions.push(partition);
                }
            }
            Item::Group(group) => self.groups.push(group),
            Item::AllTopics => self.is_all_topics = true,
            Item::Acks(_) | Item::SessionId(_) | Item::SessionEpoch(_) | Item::LastTopic => {}
        }
    }
}

/// Returns the error code of the response that denies a request, without writing the response. `error`: see [`deny`].
///
/// # Errors
/// The reason why there is no such response, as of [`deny`], except that the response may still be too long.
pub fn denial_error(request: &Request<'_>, error: Option<i16>) -> Result<i16, ParseError> {
    let api = table::find(request.header.key, request.header.version).ok_or(ParseError::Unknown)?;
    if api.response.is_empty() {
        return Err(ParseError::Unknown);
    }
    let (mut parts, mut is_about_topics) = (0_usize, false);
    if !api.request.is_empty() {
        request.walk(&mut |item| {
            parts += usize::from(matches!(
                item,
                Item::Topic(_) | Item::TopicId(_) | Item::Partition(_) | Item::Group(_)
            ));
            is_about_topics |= matches!(item, Item::Topic(_) | Item::TopicId(_) | Item::AllTopics);
        })?;
    }
    if parts > MAX_PARTS {
        return Err(ParseError::TooLong);
    }
    Ok(error.unwrap_or(if is_about_topics {
        TOPIC_AUTHORIZATION_FAILED
    } else {
        CLUSTER_AUTHORIZATION_FAILED
    }))
}

/// Returns the response that denies a request. `error`: the code of the topics or, without topics, of the request;
/// none for the authorization error that fits.
///
/// # Errors
/// The reason why there is no such response: the version is not known, the body is malformed, or the response would be
/// too long.
pub fn deny(request: &Request<'_>, error: Option<i16>, broker: &Broker) -> Result<Denied, ParseError> {
    let Header {
        key,
        version,
        correlation,
        ..
    } = request.header;
    let error = denial_error(request, error)?;
    let api = table::find(key, version).ok_or(ParseError::Unknown)?;
    let mut parts = Parts::default();
    if !api.request.is_empty() {
        request.walk(&mut |item| parts.add(item))?;
    }
    if error == FETCH_SESSION_ID_NOT_FOUND {
        parts.topics.clear();
    }
    let has_topics = api
        .response
        .iter()
        .any(|field| field.is_in(version) && matches!(field.kind, Resp::Topics(_) | Resp::Groups(_)));
    let mut writer = Writer {
        out: vec![0; SIZE],
        version,
        flexible: table::is_flexible(key, version),
        error,
        // If topics carry the error, the request as a whole has none: clients would not look at the topics.
        whole: if has_topics && !parts.topics.is_empty() && !parts.is_all_topics {
            0
        } else {
            error
        },
        parts: &parts,
        broker,
    };
    writer.out.extend(correlation.to_be_bytes());
    // The response to `ApiVersions` has header version 0 in all versions (KIP-511).
    if key != API_VERSIONS {
        writer.tags();
    }
    writer.structure(api.response, At::default())?;
    let mut response = writer.out;
    let size = i32::try_from(response.len() - SIZE).map_err(|_| ParseError::TooLong)?;
    if let Some(place) = response.first_chunk_mut() {
        *place = size.to_be_bytes();
    }
    Ok(Denied { response, error })
}

/// Position in the repeated parts.
#[derive(Clone, Copy, Default)]
struct At<'p> {
    /// Number of the group, counted from 1; 0 outside of groups.
    group: usize,
    topic: Option<&'p Topic<'p>>,
    partition: i32,
}

struct Writer<'p> {
    out: Vec<u8>,
    version: i16,
    flexible: bool,
    error: i16,
    whole: i16,
    parts: &'p Parts<'p>,
    broker: &'p Broker,
}

impl<'p> Writer<'p> {
    fn structure(&mut self, fields: &'static [Field<Resp>], at: At<'p>) -> Result<(), ParseError> {
        let version = self.version;
        for field in fields.iter().filter(|field| field.is_in(version)) {
            self.field(field.kind, at)?;
        }
        self.tags();
        if self.out.len() > MAX_RESPONSE {
            return Err(ParseError::TooLong);
        }
        Ok(())
    }

    fn field(&mut self, kind: Resp, at: At<'p>) -> Result<(), ParseError> {
        match kind {
            Resp::Zeros(n) => self.fill(n, 0),
            Resp::Ones(n) => self.fill(n, 0xff),
            Resp::NoOperations => self.out.extend(i32::MIN.to_be_bytes()),
            Resp::Error => self.out.extend(self.whole.to_be_bytes()),
            Resp::ItemError => self.out.extend(self.error.to_be_bytes()),
            Resp::SessionId => self.fill(4, 0),
            Resp::Text => self.text(b""),
            Resp::NullText => self.null_text(),
            Resp::Bytes | Resp::Empty => self.count(0),
            Resp::NullArray => {
                if self.flexible {
                    self.varint(0);
                } else {
                    self.fill(4, 0xff);
                }
            }
            Resp::NullStruct => self.fill(1, 0xff),
            Resp::Broker(fields) => {
                self.count(1);
                self.structure(fields, at)?;
            }
            Resp::BrokerId => self.out.extend(BROKER_ID.to_be_bytes()),
            Resp::BrokerHost => self.text(self.broker.host.as_bytes()),
            Resp::BrokerPort => self.out.extend(i32::from(self.broker.port).to_be_bytes()),
            Resp::Topics(fields) => {
                let parts = self.parts;
                // The topics are in the order of their groups. A scan of all topics for each group would be quadratic.
                let first = parts.topics.partition_point(|topic| topic.groups < at.group);
                let end = parts.topics.partition_point(|topic| topic.groups <= at.group);
                let topics = parts.topics.get(first..end).unwrap_or_default();
                self.count(topics.len());
                for topic in topics {
                    let at = At {
                        topic: Some(topic),
                        ..at
                    };
                    self.structure(fields, at)?;
                }
            }
            Resp::Partitions(fields) => {
                let partitions = at.topic.map_or(&[][..], |topic| &topic.partitions);
                self.count(partitions.len());
                for &partition in partitions {
                    self.structure(fields, At { partition, ..at })?;
                }
            }
            Resp::Groups(fields) => {
                let groups = self.parts.groups.len();
                self.count(groups);
                for group in 1..=groups {
                    self.structure(fields, At { group, ..at })?;
                }
            }
            Resp::Group => {
                let group = at
                    .group
                    .checked_sub(1)
                    .and_then(|index| self.parts.groups.get(index));
                self.text(group.copied().unwrap_or_default());
            }
            Resp::Name => match at.topic.map(|topic| topic.topic) {
                Some(TopicRef::Name(name)) => self.text(name),
                _ => self.null_text(),
            },
            Resp::NameOrEmpty => match at.topic.map(|topic| topic.topic) {
                Some(TopicRef::Name(name)) => self.text(name),
                _ => self.text(b""),
            },
            Resp::Id => match at.topic.map(|topic| topic.topic) {
                Some(TopicRef::Id(id)) => self.out.extend(id),
                _ => self.fill(16, 0),
            },
            Resp::Index => self.out.extend(at.partition.to_be_bytes()),
        }
        Ok(())
    }

    fn fill(&mut self, n: usize, byte: u8) {
        self.out.resize(self.out.len() + n, byte);
    }

    fn tags(&mut self) {
        if self.flexible {
            self.out.push(0);
        }
    }

    fn varint(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.out.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.out.push(value as u8);
    }

    /// Writes a text. Texts come from the request, so their length fits the type of its length field.
    fn text(&mut self, text: &[u8]) {
        if self.flexible {
            self.varint(text.len() as u32 + 1);
        } else {
            self.out.extend((text.len() as i16).to_be_bytes());
        }
        self.out.extend(text);
    }

    fn null_text(&mut self) {
        if self.flexible {
            self.varint(0);
        } else {
            self.fill(2, 0xff);
        }
    }

    fn count(&mut self, count: usize) {
        if self.flexible {
            self.varint(count as u32 + 1);
        } else {
            self.out.extend((count as i32).to_be_bytes());
        }
    }
}

/// Error code and session id of a response.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// First error code that is not 0, of the request as a whole or of one of its parts.
    pub error: i16,
    /// Session id of a Fetch response.
    pub session: Option<i32>,
}

/// Returns the error code and the session id of a response, as far as its first bytes have them. `message`: the bytes
/// behind the size, perhaps without their end.
#[must_use]
pub fn outcome(key: i16, version: i16, message: &[u8]) -> Outcome {
    let mut outcome = Outcome::default();
    if let Some(api) = table::find(key, version) {
        let flexible = table::is_flexible(key, version);
        let mut reader = Reader::new(message, flexible && key != API_VERSIONS);
        if reader.take(4).and_then(|_| reader.skip_tags()).is_ok() {
            reader.set_flexible(flexible);
            // What the first bytes do not have, or what the table of denials does not describe, stays unknown.
            let _ = seek(&mut reader, api.response, version, &mut outcome);
        }
    }
    outcome
}

/// Reads fields until the first error code other than 0. Returns whether the next field can be read.
fn seek(
    reader: &mut Reader<'_>,
    fields: &'static [Field<Resp>],
    version: i16,
    outcome: &mut Outcome,
) -> Result<bool, ParseError> {
    for field in fields.iter().filter(|field| field.is_in(version)) {
        match field.kind {
            Resp::Zeros(n) | Resp::Ones(n) => {
                reader.take(n)?;
            }
            Resp::Error | Resp::ItemError => {
                outcome.error = reader.i16()?;
                if outcome.error != 0 {
                    return Ok(false);
                }
            }
            Resp::SessionId => outcome.session = Some(reader.i32()?),
            Resp::NoOperations | Resp::Index | Resp::BrokerId | Resp::BrokerPort => {
                reader.take(4)?;
            }
            Resp::Text | Resp::NullText | Resp::Name | Resp::NameOrEmpty | Resp::Group | Resp::BrokerHost => {
                reader.text()?;
            }
            Resp::Id => {
                reader.take(16)?;
            }
            Resp::Bytes => reader.skip_bytes()?,
            // The table does not have the elements of an array that a denial leaves empty.
            Resp::Empty | Resp::NullArray => {
                if reader.count()?.is_some_and(|count| count > 0) {
                    return Ok(false);
                }
            }
            Resp::NullStruct => return Ok(false),
            Resp::Broker(fields) | Resp::Topics(fields) | Resp::Partitions(fields) | Resp::Groups(fields) => {
                for _ in 0..reader.count()?.unwrap_or_default() {
                    if !seek(reader, fields, version, outcome)? {
                        return Ok(false);
                    }
                }
            }
        }
    }
    reader.skip_tags()?;
    Ok(true)
}
