//! Settings, rewritten so that both peers stay within what the filter can follow.

use palisade_protocols::http2::{ParseError, Settings, TABLE_SIZE, setting};

use super::config::Http2Limits;

/// Lowest and highest value of SETTINGS_MAX_FRAME_SIZE.
const FRAME_SIZES: std::ops::RangeInclusive<u32> = 16_384..=(1 << 24) - 1;
/// Highest flow-control window.
pub(super) const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Settings of one peer that the filter follows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Announced {
    /// Size of the dynamic table, as forwarded.
    pub(super) table: u32,
    /// Flow-control window of a new stream.
    pub(super) window: u32,
    /// Maximum length of a frame, as forwarded.
    pub(super) frame: u32,
}

impl Default for Announced {
    fn default() -> Self {
        Self {
            table: TABLE_SIZE,
            window: 65_535,
            frame: 16_384,
        }
    }
}

/// Appends the settings of a peer to `out` as the other peer gets them. `before`: the settings that this peer has
/// announced before; `None` in its first SETTINGS. Returns the settings afterwards, and the lowest table size of the
/// frame.
pub(super) fn rewrite(
    settings: Settings<'_>,
    from_client: bool,
    before: Option<Announced>,
    limits: &Http2Limits,
    out: &mut Vec<u8>,
) -> Result<(Announced, u32), ParseError> {
    let mut now = before.unwrap_or_default();
    let mut least_table = now.table;
    let (mut has_streams, mut has_list) = (false, false);
    let mut put = |id: u16, value: u32| {
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    };
    let list = u32::try_from(limits.head.block).unwrap_or(u32::MAX);
    for (id, value) in settings.iter() {
        let value = match id {
            setting::HEADER_TABLE_SIZE => {
                now.table = value.min(TABLE_SIZE);
                least_table = least_table.min(now.table);
                now.table
            }
            setting::ENABLE_PUSH => {
                if value > u32::from(from_client) {
                    return Err(ParseError::Setting);
                }
                continue;
            }
            setting::MAX_CONCURRENT_STREAMS => {
                has_streams = true;
                if from_client {
                    value
                } else {
                    value.min(limits.streams)
                }
            }
            setting::INITIAL_WINDOW_SIZE => {
                if value > MAX_WINDOW {
                    return Err(ParseError::Window);
                }
                now.window = value;
                value
            }
            setting::MAX_FRAME_SIZE => {
                if !FRAME_SIZES.contains(&value) {
                    return Err(ParseError::Setting);
                }
                now.frame = value.min(limits.frame).max(*FRAME_SIZES.start());
                now.frame
            }
            setting::MAX_HEADER_LIST_SIZE => {
                has_list = true;
                if from_client { value } else { value.min(list) }
            }
            setting::ENABLE_CONNECT_PROTOCOL | setting::NO_RFC7540_PRIORITIES => {
                if value > 1 {
                    return Err(ParseError::Setting);
                }
                value
            }
            // An unknown setting could permit frames or semantics that the filter does not know.
            _ => continue,
        };
        put(id, value);
    }
    if before.is_none() {
        if from_client {
            put(setting::ENABLE_PUSH, 0);
        } else {
            if !has_streams {
                put(setting::MAX_CONCURRENT_STREAMS, limits.streams);
            }
            if !has_list {
                put(setting::MAX_HEADER_LIST_SIZE, list);
            }
        }
    }
    Ok((now, least_table))
}
