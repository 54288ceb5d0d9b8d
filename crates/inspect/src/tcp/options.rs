//! TCP options of inspected connections.
//!
//! An option can change how the receiver interprets a segment. MPTCP (RFC 8684) maps the payload to a position other
//! than the sequence number, fast open (RFC 7413) accepts data before the handshake, a signature (RFC 2385, RFC 5925)
//! decides whether the segment is accepted at all. The inspection supports none of these. So a segment with a signature
//! is dropped, and every other option that the inspection does not understand is overwritten with NOPs. This disables
//! an extension that both ends must negotiate, because no end sees the option of the other in the handshake (RFC 8684,
//! 3.7: both fall back to plain TCP).

use palisade_abi::tcp_flags;

use crate::packet_builder::Sum;

pub(super) const END: u8 = 0;
pub(super) const NOP: u8 = 1;
pub(super) const MSS: u8 = 2;
pub(super) const SCALE: u8 = 3;
pub(super) const SACK_PERMITTED: u8 = 4;
pub(super) const SACK: u8 = 5;
pub(super) const TIMESTAMP: u8 = 8;
const MD5: u8 = 19;
const AO: u8 = 29;
const MPTCP: u8 = 30;

/// Length of a TCP header without options, bytes.
const HEADER: usize = 20;
/// Maximum length of the options, bytes.
const MAX_OPTIONS: usize = 40;

/// Reason for which a segment is dropped because of its options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OptionProblem {
    /// The header is truncated, or the length of an option is wrong for its kind or exceeds the header.
    Length,
    /// MPTCP (kind 30) outside a SYN: the option was removed from the SYNs, so no end may use MPTCP.
    Mptcp,
    /// A signature (kind 19 or 29): generated packets cannot be signed, and the receiver drops unsigned ones.
    Signature,
}

impl OptionProblem {
    /// Returns the text that a record shows.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Length => "TCP option with a wrong length",
            Self::Mptcp => "MPTCP option in a connection without MPTCP",
            Self::Signature => "TCP signature option: the connection cannot be inspected",
        }
    }
}

/// Rewrites the options of a segment so that only options remain that the inspection understands, and updates the
/// checksum (RFC 1624). Returns whether the segment has changed.
///
/// `segment` begins with the TCP header and contains all of it. Its checksum must be valid, and stays valid. A SYN
/// keeps MSS, window scale, SACK permitted, SACK and timestamps, any other segment SACK and timestamps. Of several
/// options of one kind, the first one is kept, because receivers differ in which one they use. Bytes after the
/// end-of-options option become zero. An MSS above `mss_clamp` is lowered to it.
///
/// # Errors
/// [`OptionProblem`] if the segment must be dropped. The segment is unchanged then.
pub fn normalise(segment: &mut [u8], mss_clamp: Option<u16>) -> Result<bool, OptionProblem> {
    let Some((fixed, rest)) = segment.split_first_chunk_mut::<HEADER>() else {
        return Err(OptionProblem::Length);
    };
    let [.., offset, flags, _, _, sum0, sum1, _, _] = fixed;
    let is_syn = *flags & tcp_flags::SYN != 0;
    let length = (usize::from(*offset >> 4) * 4).checked_sub(HEADER);
    let Some(options) = length.and_then(|length| rest.get_mut(..length)) else {
        return Err(OptionProblem::Length);
    };
    // Fast path: the layout that most stacks use in an established connection.
    if !is_syn
        && (options.is_empty() || matches!(options, [NOP, NOP, TIMESTAMP, 10, ..] if options.len() == 12))
    {
        return Ok(false);
    }
    let mut room = [NOP; MAX_OPTIONS];
    let Some(rewritten) = room.get_mut(..options.len()) else {
        return Err(OptionProblem::Length);
    };
    rewritten.copy_from_slice(options);
    rewrite(rewritten, is_syn, mss_clamp)?;
    if rewritten == options {
        return Ok(false);
    }
    // RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). The options begin at an even offset and have an even length.
    let mut sum = Sum::default().add(&[!*sum0, !*sum1]);
    for word in options.as_chunks::<4>().0 {
        sum = sum.add(&word.map(|byte| !byte));
    }
    [*sum0, *sum1] = (!sum.add(rewritten).fold()).to_be_bytes();
    options.copy_from_slice(rewritten);
    Ok(true)
}

fn rewrite(options: &mut [u8], is_syn: bool, mss_clamp: Option<u16>) -> Result<(), OptionProblem> {
    let mut at = 0;
    // One bit for each kind of option that was kept already.
    let mut seen = 0u16;
    while let Some(&kind) = options.get(at) {
        match kind {
            END => {
                options.iter_mut().skip(at).for_each(|option| *option = END);
                return Ok(());
            }
            NOP => {
                at += 1;
                continue;
            }
            _ => {}
        }
        let length = options.get(at + 1).map_or(0, |length| usize::from(*length));
        let Some(option) = options.get_mut(at..at + length).filter(|_| length >= 2) else {
            return Err(OptionProblem::Length);
        };
        let fits = match kind {
            MSS => length == 4,
            SCALE => length == 3,
            SACK_PERMITTED => length == 2,
            SACK => length % 8 == 2 && length <= 34,
            TIMESTAMP => length == 10,
            _ => true,
        };
        if !fits {
            return Err(OptionProblem::Length);
        }
        let stays = match kind {
            MSS | SCALE | SACK_PERMITTED => is_syn,
            SACK | TIMESTAMP => true,
            MPTCP if !is_syn => return Err(OptionProblem::Mptcp),
            MD5 | AO => return Err(OptionProblem::Signature),
            _ => false,
        };
        if !stays || seen & (1 << kind.min(15)) != 0 {
            option.fill(NOP);
        } else {
            seen |= 1 << kind.min(15);
            if let ([MSS, _, high, low], Some(clamp)) = (option, mss_clamp)
                && u16::from_be_bytes([*high, *low]) > clamp
            {
                [*high, *low] = clamp.to_be_bytes();
            }
        }
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use palisade_abi::{Addr, protocol};

    use super::*;

    const ADDRESS: Addr = Addr([0; 4]);
    /// Offset of the checksum in a TCP header, bytes.
    const CHECKSUM: usize = 16;

    fn sum(segment: &[u8]) -> u16 {
        Sum::pseudo(ADDRESS, ADDRESS, protocol::TCP, segment.len())
            .add(segment)
            .fold()
    }

    /// Returns a segment with a valid checksum.
    fn segment(flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let length = options.len().next_multiple_of(4);
        let mut segment = vec![0x12; HEADER];
        segment[12] = ((HEADER + length) << 2) as u8;
        segment[13] = flags;
        segment[CHECKSUM..].fill(0);
        segment.extend_from_slice(options);
        segment.resize(HEADER + length, 0);
        segment.extend_from_slice(payload);
        let right = !sum(&segment);
        segment[CHECKSUM..CHECKSUM + 2].copy_from_slice(&right.to_be_bytes());
        assert_eq!(sum(&segment), 0xffff);
        segment
    }

    /// Returns the rewritten options. Checks that nothing else changes and that the checksum stays valid.
    fn rewritten(flags: u8, options: &[u8]) -> Result<Vec<u8>, OptionProblem> {
        let before = segment(flags, options, b"payload");
        let mut after = before.clone();
        let outcome = normalise(&mut after, Some(1_400));
        assert_eq!(sum(&after), 0xffff);
        assert_eq!(outcome.unwrap_or(false), before != after);
        assert_eq!(before[..CHECKSUM], after[..CHECKSUM]);
        assert_eq!(before[before.len() - 7..], after[after.len() - 7..]);
        outcome.map(|_| after[HEADER..after.len() - 7].to_vec())
    }

    #[test]
    fn a_syn_keeps_only_options_that_the_inspection_understands() {
        let usual = [2, 4, 0x05, 0x50, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7];
        assert_eq!(rewritten(2, &usual), Ok(usual.to_vec()));
        for (option, length) in [
            (&[30, 4, 1, 1][..], 4),
            (&[34, 2][..], 2),
            (&[34, 10, 1, 2, 3, 4, 5, 6, 7, 8][..], 10),
            (&[253, 4, 0xf9, 0x89][..], 4),
            (&[254, 6, 0xe2, 0xd4, 0xc3, 0xd9][..], 6),
            (&[69, 3, 9][..], 3),
            (&[14, 3, 1][..], 3),
            (&[11, 6, 0, 0, 0, 1][..], 6),
        ] {
            let with = [&[2, 4, 0x05, 0x50][..], option, &[3, 3, 7]].concat();
            let mut expected = [&[2, 4, 0x05, 0x50][..], &vec![NOP; length], &[3, 3, 7]].concat();
            expected.resize(expected.len().next_multiple_of(4), 0);
            assert_eq!(rewritten(2, &with), Ok(expected.clone()));
            assert_eq!(rewritten(0x12, &with), Ok(expected));
        }
    }

    #[test]
    fn the_mss_is_clamped_and_never_raised() {
        assert_eq!(rewritten(2, &[2, 4, 0x23, 0x28]), Ok(vec![2, 4, 0x05, 0x78]));
        assert_eq!(rewritten(2, &[2, 4, 0x02, 0x18]), Ok(vec![2, 4, 0x02, 0x18]));
        let mut jumbo = segment(2, &[2, 4, 0x23, 0x28], b"");
        assert_eq!(normalise(&mut jumbo, None), Ok(false));
    }

    #[test]
    fn the_first_of_two_options_of_a_kind_is_kept() {
        assert_eq!(
            rewritten(2, &[2, 4, 1, 0, 2, 4, 2, 0, 3, 3, 1, 3, 3, 9, 1, 1]),
            Ok(vec![2, 4, 1, 0, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1])
        );
        let timestamp = [8, 10, 1, 1, 1, 1, 2, 2, 2, 2];
        let twice = [&timestamp[..], &timestamp, &[1, 1, 1, 1]].concat();
        let once = [&timestamp[..], &[1; 14]].concat();
        assert_eq!(rewritten(0x10, &twice), Ok(once));
    }

    #[test]
    fn bytes_behind_the_end_of_the_list_become_zero() {
        assert_eq!(
            rewritten(2, &[2, 4, 1, 0, 0, 30, 4, 1]),
            Ok(vec![2, 4, 1, 0, 0, 0, 0, 0])
        );
        assert_eq!(rewritten(0x10, &[0, 30, 3, 0x20]), Ok(vec![0; 4]));
    }

    #[test]
    fn later_segments_keep_timestamps_and_selective_acknowledgements() {
        let sack = [1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2];
        assert_eq!(rewritten(0x10, &sack), Ok(sack.to_vec()));
        let both = [
            &[1, 1, 8, 10, 9, 9, 9, 9, 8, 8, 8, 8, 1, 1][..],
            &[5, 10, 0, 0, 0, 1, 0, 0, 0, 2],
        ]
        .concat();
        assert_eq!(rewritten(0x10, &both), Ok(both.clone()));
        // MSS and window scale are valid in a SYN only. AccECN (172, 174) works without its options.
        assert_eq!(rewritten(0x10, &[2, 4, 1, 0, 3, 3, 7, 1]), Ok(vec![1; 8]));
        assert_eq!(rewritten(0x10, &[172, 5, 0, 0, 1, 1, 1, 1]), Ok(vec![1; 8]));
    }

    #[test]
    fn multipath_signatures_and_wrong_lengths_are_refused() {
        let mp = [30, 8, 0x20, 1, 0, 0, 0, 1];
        for flags in [0x10, 0x18, 0x11, 0x14] {
            assert_eq!(rewritten(flags, &mp), Err(OptionProblem::Mptcp));
        }
        // MPTCP is also found after options with the layout of the fast path.
        let behind = [&[1, 1, 8, 10, 1, 1, 1, 1, 2, 2, 2, 2][..], &mp].concat();
        assert_eq!(rewritten(0x10, &behind), Err(OptionProblem::Mptcp));
        for flags in [2, 0x12, 0x10] {
            let md5 = [&[19, 18][..], &[7; 16], &[1, 1]].concat();
            assert_eq!(rewritten(flags, &md5), Err(OptionProblem::Signature));
            assert_eq!(rewritten(flags, &[29, 4, 1, 1]), Err(OptionProblem::Signature));
            for wrong in [
                &[2, 3, 1, 1][..],
                &[3, 4, 1, 1],
                &[4, 3, 1, 1],
                &[5, 4, 1, 1],
                &[8, 4, 1, 1],
                &[77, 0, 1, 1],
                &[77, 1, 1, 1],
                &[77, 5, 1, 1],
                &[1, 1, 1, 77],
            ] {
                assert_eq!(rewritten(flags, wrong), Err(OptionProblem::Length), "{wrong:?}");
            }
        }
        for length in 0..HEADER {
            assert_eq!(
                normalise(&mut vec![0x50; length], None),
                Err(OptionProblem::Length)
            );
        }
    }

    /// For random options: the result has only known options, is the same after a second rewrite, and keeps the
    /// checksum valid.
    #[test]
    fn random_options_become_known_ones() {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 24) as u8
        };
        for round in 0..200_000 {
            let mut options = vec![0; usize::from(next() % 11) * 4];
            for byte in &mut options {
                *byte = if next() & 1 == 0 { next() % 36 } else { next() };
            }
            let flags = if round % 2 == 0 { 2 } else { 0x10 };
            if let Ok(first) = rewritten(flags, &options) {
                assert_eq!(rewritten(flags, &first), Ok(first.clone()));
                let mut rest = &first[..];
                while let Some((&kind, more)) = rest.split_first() {
                    match kind {
                        END => {
                            assert!(more.iter().all(|byte| *byte == 0));
                            break;
                        }
                        NOP => rest = more,
                        MSS | SCALE | SACK_PERMITTED | SACK | TIMESTAMP => {
                            rest = &rest[usize::from(more[0])..]
                        }
                        _ => panic!("{kind} in {first:?} of {options:?}"),
                    }
                }
            }
        }
    }
}
