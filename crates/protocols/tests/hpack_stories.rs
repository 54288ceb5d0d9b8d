//! The HPACK decoder reads what an independent encoder has written, see `hpack/generate.py`.

use palisade_protocols::http2::{Decoder, Fields, encode};

type List = Vec<(Vec<u8>, Vec<u8>, bool)>;

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.trim_matches('-').as_bytes();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn list(fields: &Fields) -> List {
    fields
        .iter()
        .map(|(name, value, sensitive)| (name.to_vec(), value.to_vec(), sensitive))
        .collect()
}

/// Calls `check` with the decoder of each story, the block and its fields.
fn stories(mut check: impl FnMut(&mut Decoder, &[u8], &List)) -> usize {
    let mut decoder = Decoder::strict();
    let mut lines = include_str!("hpack/stories.txt").lines().peekable();
    let mut blocks = 0;
    while let Some(line) = lines.next() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["story"] => decoder = Decoder::strict(),
            ["limit", limit] => decoder.set_limit(limit.parse().unwrap()),
            ["block", block] => {
                let mut fields = List::new();
                while let Some(field) =
                    lines.next_if(|line| line.starts_with("field") || line.starts_with("sensitive"))
                {
                    let words: Vec<&str> = field.split(' ').collect();
                    fields.push((bytes(words[1]), bytes(words[2]), words[0] == "sensitive"));
                }
                check(&mut decoder, &bytes(block), &fields);
                blocks += 1;
            }
            _ => panic!("{line}"),
        }
    }
    blocks
}

#[test]
fn blocks_of_an_independent_encoder_are_decoded() {
    let mut fields = Fields::default();
    let blocks = stories(|decoder, block, expected| {
        decoder.decode(block, 1 << 20, &mut fields).unwrap();
        assert_eq!(&list(&fields), expected);
        // A decoder without state of these stories reads the block as it is forwarded.
        let mut again = Vec::new();
        for (name, value, sensitive) in fields.iter() {
            encode::field(name, value, sensitive, &mut again);
        }
        let mut forwarded = Fields::default();
        Decoder::strict().decode(&again, 1 << 20, &mut forwarded).unwrap();
        assert_eq!(&list(&forwarded), expected);
    });
    assert_eq!(blocks, 72);
}

#[test]
fn every_cut_or_changed_byte_of_a_block_ends_in_fields_or_an_error() {
    let mut fields = Fields::default();
    stories(|decoder, block, _| {
        for at in 0..block.len() {
            let _ = decoder.clone().decode(&block[..at], 2_000, &mut fields);
            for bit in [1, 0x40, 0x80] {
                let mut changed = block.to_vec();
                changed[at] ^= bit;
                let _ = decoder.clone().decode(&changed, 2_000, &mut fields);
                assert!(
                    fields
                        .iter()
                        .map(|(name, value, _)| name.len() + value.len())
                        .sum::<usize>()
                        <= 2_000
                );
            }
        }
        decoder.decode(block, 1 << 20, &mut fields).unwrap();
    });
}
