//! The BPF object, compiled by `build.rs` from `xdp/`.

/// The BPF object with every program and map, aligned as an ELF reader wants it.
pub const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/palisade"));
