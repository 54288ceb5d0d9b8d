//! Frames in a form that does not depend on where the streams were cut. The fuzz target `http2` uses it too.

use palisade_protocols::http2::{FrameHeader, flags, kind};

/// Joins neighbouring DATA frames of one stream: where a frame is cut, it is forwarded as several ones.
pub(crate) fn join(bytes: &[u8]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), bytes);
    let (mut data, mut padding) = (Vec::new(), 0);
    while let Some((head, after)) = rest.split_first_chunk::<9>() {
        let header = FrameHeader::parse(*head);
        let Some((payload, after)) = after.split_at_checked(header.length as usize) else {
            break;
        };
        rest = after;
        if header.kind != kind::DATA {
            header.write_with(payload, &mut out);
            continue;
        }
        let (pad, content) = if header.has(flags::PADDED) {
            payload.split_at(1)
        } else {
            (&[][..], payload)
        };
        let length = pad.first().copied().unwrap_or(0);
        padding += pad.len() + usize::from(length);
        data.extend_from_slice(&content[..content.len() - usize::from(length)]);
        let next = rest.first_chunk::<9>().map(|head| FrameHeader::parse(*head));
        let continues = next.is_some_and(|next| (next.kind, next.stream) == (kind::DATA, header.stream));
        if header.has(flags::END_STREAM) || !continues {
            FrameHeader {
                length: 0,
                flags: header.flags & flags::END_STREAM,
                ..header
            }
            .write_with(&data, &mut out);
            out.extend(padding.to_be_bytes());
            (data, padding) = (Vec::new(), 0);
        }
    }
    out.extend_from_slice(rest);
    out
}
