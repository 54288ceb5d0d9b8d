//! Names and numbers of all fields of the API, and the structure of encoded messages.

use prost::encoding::{WireType, decode_key, decode_varint};

/// Error for bytes that are not an encoded message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("its bytes are not a protobuf message")]
pub(crate) struct Broken;

/// Description of a message.
#[derive(Debug)]
pub(crate) struct Message {
    /// Full name, such as `flow.Flow`.
    pub(crate) name: &'static str,
    pub(crate) fields: &'static [Field],
}

/// Description of a field.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) number: u32,
    pub(crate) name: &'static str,
    /// Index of the field's message in [`MESSAGES`]; `None` for scalars.
    pub(crate) message: Option<usize>,
    pub(crate) repeated: bool,
}

static MESSAGES: &[Message] = include!(concat!(env!("OUT_DIR"), "/schema.rs"));

/// Longest chain of messages within messages in a request. No message of the API needs more.
const MAX_DEPTH: usize = 16;

impl Message {
    /// Returns the message with a full name.
    pub(crate) fn of(name: &str) -> Option<&'static Self> {
        MESSAGES.iter().find(|message| message.name == name)
    }

    pub(crate) fn field(&self, number: u32) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.number == number)
    }

    pub(crate) fn field_by_name(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}

impl Field {
    pub(crate) fn inner(&self) -> Option<&'static Message> {
        self.message.and_then(|index| MESSAGES.get(index))
    }
}

/// Field of an encoded message.
pub(crate) struct Part<'a> {
    pub(crate) number: u32,
    /// The whole field, with its key.
    pub(crate) whole: &'a [u8],
    /// Content of a length-delimited field, which a message, a text and a packed list are.
    pub(crate) content: Option<&'a [u8]>,
}

/// Splits an encoded message into its fields.
pub(crate) fn parts(message: &[u8]) -> impl Iterator<Item = Result<Part<'_>, Broken>> {
    let mut rest = message;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let next = part(&mut rest);
        if next.is_err() {
            rest = &[];
        }
        Some(next)
    })
}

fn part<'a>(rest: &mut &'a [u8]) -> Result<Part<'a>, Broken> {
    let begin = *rest;
    let (number, kind) = decode_key(rest).map_err(|_| Broken)?;
    let mut content = None;
    match kind {
        WireType::Varint => {
            decode_varint(rest).map_err(|_| Broken)?;
        }
        WireType::LengthDelimited => {
            let length = decode_varint(rest).map_err(|_| Broken)?;
            content = Some(take(rest, length)?);
        }
        WireType::ThirtyTwoBit => {
            take(rest, 4)?;
        }
        WireType::SixtyFourBit => {
            take(rest, 8)?;
        }
        // Groups are not part of proto3.
        WireType::StartGroup | WireType::EndGroup => return Err(Broken),
    }
    Ok(Part {
        number,
        whole: &begin[..begin.len() - rest.len()],
        content,
    })
}

fn take<'a>(rest: &mut &'a [u8], length: u64) -> Result<&'a [u8], Broken> {
    let length = usize::try_from(length).map_err(|_| Broken)?;
    let (content, after) = rest.split_at_checked(length).ok_or(Broken)?;
    *rest = after;
    Ok(content)
}

/// Returns a text that names the first field of an encoded message that this server does not know; `None` if it knows
/// all of them.
///
/// # Errors
/// Fails if the bytes are not an encoded message.
pub(crate) fn unknown_field(message: &Message, bytes: &[u8]) -> Result<Option<String>, Broken> {
    unknown_below(message, bytes, MAX_DEPTH)
}

fn unknown_below(message: &Message, bytes: &[u8], depth: usize) -> Result<Option<String>, Broken> {
    if depth == 0 {
        return Ok(Some(format!(
            "{}: messages within messages, too deep",
            message.name
        )));
    }
    for part in parts(bytes) {
        let part = part?;
        let Some(field) = message.field(part.number) else {
            return Ok(Some(format!("field {} of {}", part.number, message.name)));
        };
        if let (Some(inner), Some(content)) = (field.inner(), part.content)
            && let Some(unknown) = unknown_below(inner, content, depth - 1)?
        {
            return Ok(Some(unknown));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::{flow, observer};

    #[test]
    fn the_schema_has_the_numbers_of_the_public_definition() {
        let flow = Message::of("flow.Flow").unwrap();
        for (name, number) in [
            ("time", 1),
            ("uuid", 34),
            ("Summary", 100_000),
            ("egress_allowed_by", 21_001),
            ("is_reply", 26),
            ("drop_reason_desc", 25),
        ] {
            assert_eq!(flow.field_by_name(name).unwrap().number, number, "{name}");
        }
        assert_eq!(flow.field(8).unwrap().inner().unwrap().name, "flow.Endpoint");
        assert!(flow.field(13).unwrap().repeated);
    }

    #[test]
    fn unknown_fields_are_named_at_every_depth() {
        let request = Message::of("observer.GetFlowsRequest").unwrap();
        let mut known = observer::GetFlowsRequest {
            number: 3,
            ..Default::default()
        };
        known.whitelist.push(flow::FlowFilter {
            source_ip: vec!["10.0.0.1".into()],
            ..Default::default()
        });
        assert_eq!(unknown_field(request, &known.encode_to_vec()).unwrap(), None);
        // Field 77 of the message itself, then of a filter in its whitelist (field 6).
        let top = [0xe8, 0x04, 1];
        let said = unknown_field(request, &top).unwrap().unwrap();
        assert_eq!(said, "field 77 of observer.GetFlowsRequest");
        let inner = [&[0x32, 3][..], &top].concat();
        let said = unknown_field(request, &inner).unwrap().unwrap();
        assert_eq!(said, "field 77 of flow.FlowFilter");
        assert!(unknown_field(request, &[0x32, 9, 0]).is_err());
        assert!(unknown_field(request, &[0x33]).is_err());
    }
}
