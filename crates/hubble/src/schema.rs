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
/// Maximum number of messages in one field of a request, such as of filters in `whitelist`. An empty filter has 2 bytes
/// encoded and about 1 KiB decoded.
pub(crate) const MAX_MESSAGES_PER_FIELD: usize = 256;
/// Maximum number of messages within a request, at all depths.
const MAX_MESSAGES: usize = 4_096;

impl Message {
    /// Returns the message with a full name.
    pub(crate) fn of(name: &str) -> Option<&'static Self> {
        MESSAGES.iter().find(|message| message.name == name)
    }

    /// Returns the field with a number, and its place in the description.
    pub(crate) fn field(&self, number: u32) -> Option<(usize, &'static Field)> {
        let mut fields = self.fields.iter().enumerate();
        fields.find(|(_, field)| field.number == number)
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

/// Returns why an encoded message is refused before it is decoded: it has a field that this server does not know, or so
/// many messages within it that they would take hundreds of times its length when decoded. `None` if it is accepted.
///
/// # Errors
/// Fails if the bytes are not an encoded message.
pub(crate) fn refusal(message: &Message, bytes: &[u8]) -> Result<Option<String>, Broken> {
    let mut messages = 0;
    Ok(check(message, bytes, MAX_DEPTH, &mut messages)?.err())
}

/// `messages` counts the messages within the request. The inner result says why the message is refused.
fn check(
    message: &Message,
    bytes: &[u8],
    depth: usize,
    messages: &mut usize,
) -> Result<Result<(), String>, Broken> {
    if depth == 0 {
        return Ok(Err(format!(
            "{}: more than {MAX_DEPTH} messages within each other",
            message.name
        )));
    }
    let mut counts = vec![0_usize; message.fields.len()];
    for part in parts(bytes) {
        let part = part?;
        let Some((at, field)) = message.field(part.number) else {
            return Ok(Err(format!(
                "field {} of {} is not known to this server",
                part.number, message.name
            )));
        };
        let (Some(inner), Some(content)) = (field.inner(), part.content) else {
            continue;
        };
        counts[at] += 1;
        *messages += 1;
        if counts[at] > MAX_MESSAGES_PER_FIELD {
            return Ok(Err(format!(
                "field {} of {} has more than {MAX_MESSAGES_PER_FIELD} messages",
                field.name, message.name
            )));
        }
        if *messages > MAX_MESSAGES {
            return Ok(Err(format!("more than {MAX_MESSAGES} messages in one request")));
        }
        if let Err(reason) = check(inner, content, depth - 1, messages)? {
            return Ok(Err(reason));
        }
    }
    Ok(Ok(()))
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
        assert_eq!(flow.field(8).unwrap().1.inner().unwrap().name, "flow.Endpoint");
        assert!(flow.field(13).unwrap().1.repeated);
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
        assert_eq!(refusal(request, &known.encode_to_vec()).unwrap(), None);
        // Field 77 of the message itself, then of a filter in its whitelist (field 6).
        let top = [0xe8, 0x04, 1];
        let said = refusal(request, &top).unwrap().unwrap();
        assert_eq!(
            said,
            "field 77 of observer.GetFlowsRequest is not known to this server"
        );
        let inner = [&[0x32, 3][..], &top].concat();
        let said = refusal(request, &inner).unwrap().unwrap();
        assert_eq!(said, "field 77 of flow.FlowFilter is not known to this server");
        assert!(refusal(request, &[0x32, 9, 0]).is_err());
        assert!(refusal(request, &[0x33]).is_err());
    }

    #[test]
    fn the_messages_of_a_request_are_counted_before_they_are_decoded() {
        let request = Message::of("observer.GetFlowsRequest").unwrap();
        // Empty filters in the whitelist (field 6).
        let filters = |count| [0x32, 0].repeat(count);
        assert_eq!(refusal(request, &filters(MAX_MESSAGES_PER_FIELD)).unwrap(), None);
        let said = refusal(request, &filters(MAX_MESSAGES_PER_FIELD + 1))
            .unwrap()
            .unwrap();
        assert!(said.contains("whitelist") && said.contains("256"), "{said}");
        // Each filter has as many event types as it may have.
        let filter = flow::FlowFilter {
            event_type: vec![flow::EventTypeFilter::default(); MAX_MESSAGES_PER_FIELD],
            ..Default::default()
        };
        let many = observer::GetFlowsRequest {
            blacklist: vec![filter; 20],
            ..Default::default()
        };
        let said = refusal(request, &many.encode_to_vec()).unwrap().unwrap();
        assert!(said.contains("4096"), "{said}");
    }
}
