//! BPF object, compiled by `build.rs` from `xdp/`.

/// BPF object with all programs and maps, aligned as its ELF reader requires.
pub const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/palisade"));
