//! The HPACK decoder reads what independent encoders have written: the one of `hpack/generate.py`, which writes what the
//! public stories lack, and those of the public HPACK test stories (http2jp/hpack-test-case).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

// A development dependency for the public stories, which its package contains. Its code is not used.
use httlib_hpack as _;
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

/// Returns the folder with the public stories, one folder for each encoder.
fn public_stories() -> PathBuf {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages.iter().find(|package| package["name"] == "httlib-hpack");
    let manifest = package.unwrap()["manifest_path"].as_str().unwrap();
    Path::new(manifest).with_file_name("fixtures")
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path())
}

#[test]
fn the_public_stories_of_all_encoders_are_decoded() {
    let mut fields = Fields::default();
    let (mut encoders, mut blocks) = (0, 0);
    for encoder in entries(&public_stories()).filter(|path| path.is_dir()) {
        encoders += 1;
        for story in entries(&encoder) {
            let text = fs::read_to_string(&story).unwrap();
            let story: serde_json::Value = serde_json::from_str(&text).unwrap();
            let mut decoder = Decoder::strict();
            let mut size = 4_096;
            for case in story["cases"].as_array().unwrap() {
                // SETTINGS_HEADER_TABLE_SIZE from this block on; absent if it stays.
                let announced = case["header_table_size"].as_u64().unwrap_or(size);
                if announced != size {
                    size = announced;
                    decoder.set_limit(size.try_into().unwrap());
                }
                let block = bytes(case["wire"].as_str().unwrap());
                decoder.decode(&block, 1 << 20, &mut fields).unwrap();
                let read: Vec<(&[u8], &[u8])> = fields.iter().map(|(name, value, _)| (name, value)).collect();
                let expected = case["headers"].as_array().unwrap().iter();
                let expected: Vec<(&[u8], &[u8])> = expected
                    .flat_map(|field| field.as_object().unwrap())
                    .map(|(name, value)| (name.as_bytes(), value.as_str().unwrap().as_bytes()))
                    .collect();
                assert_eq!(read, expected);
                blocks += 1;
            }
        }
    }
    assert_eq!((encoders, blocks), (14, 47_142));
}
