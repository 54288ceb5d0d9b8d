//! Walks through the body of a request by its table, and reports what rules and responses need.

use super::{
    error::ParseError,
    numbers::METADATA,
    reader::Reader,
    request::Request,
    table::{self, Field, Req},
};

/// UUID of a topic.
pub type TopicId = [u8; 16];

/// First version of the Metadata response with topic ids.
const METADATA_WITH_IDS: i16 = 10;
/// Last version of the Metadata response that is read.
const LAST_METADATA: i16 = 13;

/// Part of a request, in the order of the message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Item<'a> {
    /// The request names this topic.
    Topic(&'a [u8]),
    /// The request names the topic with this id.
    TopicId(TopicId),
    /// The request is about all topics, or about those that match a pattern.
    AllTopics,
    /// A partition of the last topic.
    Partition(i32),
    /// A group, or another key that the response repeats.
    Group(&'a [u8]),
    /// The `acks` of a Produce request. With 0 there is no response.
    Acks(i16),
    /// The session id of a Fetch request.
    SessionId(i32),
    /// The session epoch of a Fetch request: 0 begins a session, -1 is without one, others continue one.
    SessionEpoch(i32),
    /// The next topic is the last one of the first array of the request.
    LastTopic,
}

impl<'a> Request<'a> {
    /// Calls `found` for each part of the body.
    ///
    /// # Errors
    /// The reason why the body cannot be read completely. Parts in front of the fault have been reported.
    pub fn walk(&self, found: &mut dyn FnMut(Item<'a>)) -> Result<(), ParseError> {
        let api = table::find(self.header.key, self.header.version).ok_or(ParseError::Unknown)?;
        if api.request.is_empty() {
            return Err(ParseError::Unknown);
        }
        let mut walker = Walker {
            reader: self.body,
            version: self.header.version,
            found,
            depth: 0,
        };
        walker.structure(api.request)?;
        if walker.reader.is_empty() {
            Ok(())
        } else {
            Err(ParseError::TrailingBytes)
        }
    }
}

struct Walker<'a, 'f> {
    reader: Reader<'a>,
    version: i16,
    found: &'f mut dyn FnMut(Item<'a>),
    depth: u8,
}

impl<'a> Walker<'a, '_> {
    fn structure(&mut self, fields: &'static [Field<Req>]) -> Result<(), ParseError> {
        // Whether the structure has a field for a topic, and whether that field has a value.
        let (mut has_topic, mut is_named) = (false, false);
        let version = self.version;
        for field in fields.iter().filter(|field| field.is_in(version)) {
            match field.kind {
                Req::Topic => {
                    has_topic = true;
                    if let Some(name) = self.reader.text()? {
                        is_named = true;
                        (self.found)(Item::Topic(name));
                    }
                }
                Req::TopicId => {
                    has_topic = true;
                    let id = self.reader.array()?;
                    if id != [0; 16] {
                        is_named = true;
                        (self.found)(Item::TopicId(id));
                    }
                }
                other => self.field(other)?,
            }
        }
        if has_topic && !is_named {
            return Err(ParseError::Length);
        }
        self.reader.skip_tags()
    }

    fn field(&mut self, kind: Req) -> Result<(), ParseError> {
        match kind {
            Req::Topic | Req::TopicId => {}
            Req::Skip(n) => {
                self.reader.take(n)?;
            }
            Req::Acks => {
                let acks = self.reader.i16()?;
                (self.found)(Item::Acks(acks));
            }
            Req::SessionId => {
                let id = self.reader.i32()?;
                (self.found)(Item::SessionId(id));
            }
            Req::SessionEpoch => {
                let epoch = self.reader.i32()?;
                (self.found)(Item::SessionEpoch(epoch));
            }
            Req::Text => {
                self.text()?;
            }
            Req::NullText => {
                self.reader.text()?;
            }
            Req::Bytes => self.reader.skip_bytes()?,
            Req::TopicNames => {
                for _ in 0..self.reader.count()?.unwrap_or_default() {
                    let name = self.text()?;
                    (self.found)(Item::Topic(name));
                }
            }
            Req::TopicPattern => {
                if self.reader.text()?.is_some_and(|pattern| !pattern.is_empty()) {
                    (self.found)(Item::AllTopics);
                }
            }
            Req::Partition => {
                let partition = self.reader.i32()?;
                (self.found)(Item::Partition(partition));
            }
            Req::Partitions => {
                for _ in 0..self.count()? {
                    let partition = self.reader.i32()?;
                    (self.found)(Item::Partition(partition));
                }
            }
            Req::Group => {
                let group = self.text()?;
                (self.found)(Item::Group(group));
            }
            Req::Groups => {
                for _ in 0..self.count()? {
                    let group = self.text()?;
                    (self.found)(Item::Group(group));
                }
            }
            Req::List(fields) => {
                let count = self.count()?;
                self.list(count, fields)?;
            }
            Req::NullList(fields) => {
                let count = self.reader.count()?.unwrap_or_default();
                self.list(count, fields)?;
            }
            Req::AllIfEmpty(fields) => match self.reader.count()?.unwrap_or_default() {
                0 => (self.found)(Item::AllTopics),
                count => self.list(count, fields)?,
            },
            Req::AllList(fields) => {
                // Version 0 has no null: there the empty array stands for all topics.
                let count = self
                    .reader
                    .count()?
                    .filter(|&count| count > 0 || self.version > 0);
                match count {
                    Some(count) => self.list(count, fields)?,
                    None => (self.found)(Item::AllTopics),
                }
            }
            Req::NullStruct(fields) => {
                if self.reader.i8()? >= 0 {
                    self.structure(fields)?;
                }
            }
        }
        Ok(())
    }

    fn list(&mut self, count: usize, fields: &'static [Field<Req>]) -> Result<(), ParseError> {
        self.depth += 1;
        for left in (0..count).rev() {
            self.element(fields, left == 0 && self.depth == 1)?;
        }
        self.depth -= 1;
        Ok(())
    }

    fn element(&mut self, fields: &'static [Field<Req>], is_last: bool) -> Result<(), ParseError> {
        if is_last {
            (self.found)(Item::LastTopic);
        }
        self.structure(fields)
    }

    fn text(&mut self) -> Result<&'a [u8], ParseError> {
        self.reader.text()?.ok_or(ParseError::Length)
    }

    fn count(&mut self) -> Result<usize, ParseError> {
        self.reader.count()?.ok_or(ParseError::Length)
    }
}

/// Calls `found` for each topic with an id in a Metadata response. `message`: the bytes behind the size.
///
/// # Errors
/// The reason why the response cannot be read completely. Topics in front of the fault have been reported.
pub fn learned_topics<'a>(
    version: i16,
    message: &'a [u8],
    found: &mut dyn FnMut(TopicId, &'a [u8]),
) -> Result<(), ParseError> {
    if !(METADATA_WITH_IDS..=LAST_METADATA).contains(&version) {
        return Ok(());
    }
    // All versions with ids are flexible, and so is the header of the response.
    let mut reader = Reader::new(message, table::is_flexible(METADATA, version));
    let length = |count: Option<usize>| count.ok_or(ParseError::Length);
    reader.take(4)?;
    reader.skip_tags()?;
    reader.take(4)?;
    for _ in 0..length(reader.count()?)? {
        reader.take(4)?;
        reader.text()?;
        reader.take(4)?;
        reader.text()?;
        reader.skip_tags()?;
    }
    reader.text()?;
    reader.take(4)?;
    for _ in 0..length(reader.count()?)? {
        let error = reader.i16()?;
        let name = reader.text()?;
        let id: TopicId = reader.array()?;
        reader.take(1)?;
        for _ in 0..length(reader.count()?)? {
            // Error, number, leader, epoch of the leader.
            reader.take(14)?;
            for _ in 0..3 {
                let bytes = length(reader.count()?)?
                    .checked_mul(4)
                    .ok_or(ParseError::Length)?;
                reader.take(bytes)?;
            }
            reader.skip_tags()?;
        }
        reader.take(4)?;
        reader.skip_tags()?;
        if let Some(name) = name
            && error == 0
            && id != [0; 16]
        {
            found(id, name);
        }
    }
    Ok(())
}
