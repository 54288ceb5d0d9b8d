//! The Huffman code of RFC 7541, appendix B.
//!
//! The code is canonical: codes of one length are consecutive numbers in the order of their symbols, so the lengths
//! alone define the code.

/// Length of the code of each symbol, bits. The last symbol is EOS.
#[rustfmt::skip]
const LENGTHS: [u8; SYMBOLS] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

const SYMBOLS: usize = 257;
const EOS: u16 = 256;
/// Length of the longest code, bits.
const LONGEST: u32 = 30;
/// Codes of at most this length are found by one lookup.
const SHORT: u32 = 9;

const CODE: Code = Code::new();

struct Code {
    /// Symbol and length of the code that begins with these [`SHORT`] bits; length 0: a longer code.
    short: [(u16, u8); 1 << SHORT],
    /// Symbols in the order of their codes.
    sorted: [u16; SYMBOLS],
    /// First code of each length, and the place of its symbol in `sorted`.
    first: [(u32, u16); LONGEST as usize + 1],
    /// Number of codes of each length.
    count: [u16; LONGEST as usize + 1],
}

impl Code {
    #[allow(clippy::indexing_slicing, reason = "evaluated at compile time only")]
    const fn new() -> Self {
        let mut made = Self {
            short: [(0, 0); 1 << SHORT],
            sorted: [0; SYMBOLS],
            first: [(0, 0); LONGEST as usize + 1],
            count: [0; LONGEST as usize + 1],
        };
        let (mut length, mut code, mut place) = (1, 0_u32, 0);
        while length <= LONGEST {
            code <<= 1;
            made.first[length as usize] = (code, place as u16);
            let mut symbol = 0;
            while symbol < SYMBOLS {
                if LENGTHS[symbol] as u32 == length {
                    made.sorted[place] = symbol as u16;
                    place += 1;
                    made.count[length as usize] += 1;
                    if length <= SHORT {
                        let mut tail = 0;
                        while tail < 1 << (SHORT - length) {
                            let at = (code << (SHORT - length)) | tail;
                            made.short[at as usize] = (symbol as u16, length as u8);
                            tail += 1;
                        }
                    }
                    code += 1;
                }
                symbol += 1;
            }
            length += 1;
        }
        made
    }

    /// Returns symbol and length of the code at the start of `window`, which has [`LONGEST`] bits.
    fn find(&self, window: u32) -> Option<(u16, u32)> {
        let &(symbol, length) = self.short.get((window >> (LONGEST - SHORT)) as usize)?;
        if length > 0 {
            return Some((symbol, length.into()));
        }
        for length in SHORT + 1..=LONGEST {
            let code = window >> (LONGEST - length);
            let (&(first, place), &count) =
                (self.first.get(length as usize)?, self.count.get(length as usize)?);
            let Some(offset) = code.checked_sub(first) else {
                continue;
            };
            if offset < count.into() {
                let symbol = self.sorted.get(usize::from(place) + offset as usize)?;
                return Some((*symbol, length));
            }
        }
        None
    }
}

/// Appends the decoded `input` to `out`. Returns `None` if the input is not a valid encoding: it contains EOS, or its
/// padding is longer than 7 bits or not a prefix of EOS (RFC 7541, section 5.2).
pub(super) fn decode(input: &[u8], out: &mut Vec<u8>) -> Option<()> {
    static CODES: Code = CODE;
    let mut input = input.iter();
    let (mut bits, mut have) = (0_u64, 0_u32);
    loop {
        while have <= 56
            && let Some(byte) = input.next()
        {
            bits = bits << 8 | u64::from(*byte);
            have += 8;
        }
        if have == 0 {
            return Some(());
        }
        // Missing bits are filled with ones, like the padding.
        let window = if have >= LONGEST {
            bits >> (have - LONGEST)
        } else {
            !(!bits << (LONGEST - have))
        };
        let (symbol, length) = CODES.find((window & ((1 << LONGEST) - 1)) as u32)?;
        if length > have {
            let padding = (1 << have) - 1;
            return (have < 8 && bits & padding == padding).then_some(());
        }
        if symbol == EOS {
            return None;
        }
        out.push(symbol as u8);
        have -= length;
    }
}
